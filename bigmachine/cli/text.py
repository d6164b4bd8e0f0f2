"""Figures and tables as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    """``1 part``, ``2 parts``, ``2 entries``."""
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
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
