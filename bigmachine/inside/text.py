"""The document of `status` as text, for terminals and reports: machines with the columns of Go's, and methods.

A pure function of the document: times are relative to its ``now``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

REPLIES = 3
"""The last reply times of keepalives that are shown."""

MAX_METHODS = 50
"""Of the table of methods: those with the most time in them."""

UNKNOWN = "–"

MACHINES = (
    *("machine", "state", "uptime", "keepalive", "replies", "memory", "disk", "load", "cpu"),
    *("rss", "threads", "calls"),
)
"""The last ones are of the machine's own processes: what they hold, and the calls that run now."""

METHODS = ("method", "served", "/s", "errors", "p50", "p99", "max", "called", "/s", "errors", "p50", "p99", "max")


def status(document: Mapping[str, Any]) -> str:
    """All of it; ends with a line feed."""
    machines = document["machines"]
    parts = [_head(document)]
    if machines:
        rows = [_machine(each) for each in machines]
        below = [list(_remarks(each, document["now"])) for each in machines]
        parts.append(table(MACHINES, rows, below))
    if document["methods"]:
        parts.append(_methods(document["methods"]))
    for each in document["captures"]:
        parts.append(f"saved of {each['machine']}: {each['reason']}: {', '.join(map(str, each['files']))}\n")
    return "\n".join(parts)


def _head(document: Mapping[str, Any]) -> str:
    session = document["session"]
    counts = ", ".join(f"{number} {state}" for state, number in document["counts"].items()) or "none"
    said = [
        f"{session['program'] or 'bigmachine'} (pid {session['pid']} on {session['host']}): session {session['name']}, "
        f"system {session['system']}, {duration((session['ended'] or document['now']) - session['began'])}",
        f"machines: {counts}",
    ]
    if session["cost"] is not None:
        hourly = "" if session["hourly"] is None else f", {session['hourly']:.2f} an hour"
        said.append(f"cost: {session['cost']:.2f} USD{hourly}")
    if session["failed"]:
        said.append(f"failed: {session['failed']}")
    if session["ended"]:
        said.append("ended")
    return "\n".join(said) + "\n"


def _machine(machine: Mapping[str, Any]) -> list[str]:
    vitals = machine["vitals"]
    keepalive = machine["keepalive"]
    replies = " ".join(duration(each) for each in keepalive["replies"][-REPLIES:])
    row = [machine["address"], machine["state"], duration(machine["uptime"]), _due(keepalive), replies or UNKNOWN]
    if vitals is None:
        return [*row, *[UNKNOWN] * (len(MACHINES) - len(row))]
    memory, disk = vitals["memory"], vitals["disk"]
    return [
        *row,
        _of(memory),
        _of(disk),
        " ".join(f"{each:.1f}" for each in vitals["load"]),
        UNKNOWN if vitals["cpu"] is None else f"{vitals['cpu']:.0f}%",
        *_runtime(machine["processes"]),
    ]


def _of(space: Mapping[str, Any]) -> str:
    return f"{size(space['used'])}/{size(space['total'])} {space['percent']:.0f}%"


def _due(keepalive: Mapping[str, Any]) -> str:
    if keepalive["next"] is None:
        return UNKNOWN
    due = max(0.0, keepalive["next"])
    return "late" if keepalive["late"] else f"in {duration(due)}"


def _runtime(processes: Sequence[Mapping[str, Any]]) -> list[str]:
    if not processes:
        return [UNKNOWN] * 3
    threads = sum(each["threads"] for each in processes)
    doing = sum(len(each["doing"]) for each in processes)
    return [size(sum(each["rss"] for each in processes)), str(threads), str(doing)]


def _remarks(machine: Mapping[str, Any], now: float) -> Iterable[str]:
    """Lines below a machine's."""
    if machine["detail"]:
        yield ", ".join(f"{name} {value}" for name, value in machine["detail"].items())
    if machine["step"]:
        yield f"starting: {machine['step']}, for {duration(now - machine['began'])} in all"
    if machine["missing"]:
        yield f"missing: {machine['missing']}"
    if machine["unhealthy"]:
        yield f"unhealthy: {machine['unhealthy']}"
    notice = machine["notice"]
    if notice is not None:
        when = "" if notice["deadline"] is None else f" (in {duration(max(0.0, notice['deadline'] - now))})"
        yield f"{notice['kind']}: {notice['text']}{when}"
    if machine["error"]:
        yield f"error: {machine['error']}"


def _methods(methods: Sequence[Mapping[str, Any]]) -> str:
    def weight(method: Mapping[str, Any]) -> float:
        return sum(float(end["seconds"]) for end in (method["served"], method["called"]) if end is not None)

    shown = sorted(methods, key=lambda method: (-weight(method), method["method"]))[:MAX_METHODS]
    rows = [[each["method"], *_end(each["served"]), *_end(each["called"])] for each in shown]
    text = table(METHODS, rows)
    return text if len(shown) == len(methods) else f"{text}and {len(methods) - len(shown)} more\n"


def _end(figures: Mapping[str, Any] | None) -> list[str]:
    if figures is None:
        return [UNKNOWN] * 6
    rate = UNKNOWN if figures["rate"] is None else f"{figures['rate']:.1f}"
    times = [duration(figures[name]) for name in ("p50", "p99", "max")]
    return [str(figures["count"]), rate, str(figures["errors"]), *times]


# -- Forms ---------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]], below: Sequence[Sequence[str]] = ()) -> str:
    """Columns of equal width, two spaces between them; `below` are lines that follow each row."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for number, row in enumerate([head, *rows]):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number and number <= len(below):
            lines += [f"    {line}" for line in below[number - 1]]
    return "\n".join(lines) + "\n"


def size(amount: float) -> str:
    """Of bytes: ``"840B"``, ``"26M"`` (mebibytes), ``"2.5G"``."""
    for unit in "BKMGT":
        if amount < 1000 or unit == "T":
            return f"{amount:.1f}{unit}" if amount < 9.95 and unit != "B" else f"{amount:.0f}{unit}"
        amount /= 1024
    raise AssertionError("the last unit takes all")


def duration(seconds: float | None) -> str:
    """``"840us"``, ``"3.4ms"``, ``"12s"``, ``"2m10s"``, ``"1h02m"``, ``"3d04h"``: as short as can be."""
    if seconds is None:
        return UNKNOWN
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f}us"
    if seconds < 1:
        return f"{seconds * 1e3:.3g}ms"
    if seconds < 10:
        return f"{seconds:.1f}s"
    return clock(round(seconds))


def clock(whole: int) -> str:
    """Whole seconds: ``"42s"``, ``"3m05s"``, ``"2h10m"``, ``"4d03h"``."""
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
