"""Figures and tables as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..inside.text import clock

UNITS = ("KiB", "MiB", "GiB", "TiB")


def size(count: int) -> str:
    """A number of bytes: ``512 B``, ``1.5 KiB``, ``20.0 MiB``."""
    if count < 1024:
        return f"{count} B"
    value, unit = count / 1024, 0
    while round(value, 1) >= 1024 and unit + 1 < len(UNITS):  # Rounded as it is printed: not "1024.0 KiB".
        value, unit = value / 1024, unit + 1
    return f"{value:.1f} {UNITS[unit]}"


def number(count: int, noun: str) -> str:
    """``1 part``, ``2 parts``, ``2 entries``, ``2 processes``."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + ("es" if noun.endswith("s") else "s")
    return f"{count} {noun if count == 1 else plural}"


def table(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset(), indent: str = "  ") -> Iterator[str]:
    """Lines whose columns are aligned; those in `right` to the right. All rows are equally long."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield (indent + "  ".join(cells)).rstrip()


def short(seconds: float) -> str:
    """A time that has passed, in six characters: ``42s``, ``3m05s``, ``2h10m``, ``4d03h``."""
    return clock(max(0, int(seconds)))


def latency(seconds: float) -> str:
    """A time that something takes, with three digits: ``143 µs``, ``1.2 ms``, ``31.0 s``."""
    for unit, scale in (("µs", 1e6), ("ms", 1e3)):
        if seconds * scale < 999.5:
            value = seconds * scale
            return f"{value:.0f} {unit}" if value >= 99.5 else f"{value:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 999.5 else short(seconds)


def brief(count: float) -> str:
    """A large number, in five characters: ``512``, ``34M``, ``1.5G``; of bytes, by 1024."""
    for unit in ("", "K", "M", "G"):
        if count < 999.5:
            return f"{count:.1f}{unit}" if unit and count < 9.95 else f"{count:.0f}{unit}"
        count /= 1024
    return f"{count:.1f}T"
