"""What ``bigmachine top`` shows of a document of a driver's (`bigmachine.inside.status`), and what keys change about that.

Nothing here acts: `screen` draws it and reads the keys, `top` prints it where there is no terminal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .attach import shown
from .text import brief, latency, number, short, table

Json = Mapping[str, Any]
"""A part of the document, or all of it."""

MACHINES = ("machine", "state", "up", "cpu", "mem", "rss", "load", "calls/s", "doing")
METHODS = ("method", "calls", "calls/s", "errors", "p50", "p99", "max")

RIGHT = frozenset(range(2, 8))
"""Columns of numbers in the table of machines. In that of methods all but the first are."""

KEYS = {"o": "start", "c": "cpu", "m": "memory", "l": "load"}
"""By which the user sorts, each for one of `arguments.SORTS`."""

HELP = "o c m l sort   / filter   j k scroll   p pause   q quit"

QUIT = frozenset({"q", "Q", "ctrl-c", "ctrl-d"})
DOWN = {"j": 1, "down": 1, "page-down": 10, " ": 10, "end": 1 << 30}
UP = {"k": 1, "up": 1, "page-up": 10, "b": 10, "home": 1 << 30}


@dataclass(frozen=True)
class View:
    """What of the document is shown: how it is sorted, which machines, the first of them. `typing`: keys go to the filter."""

    sort: str = "start"
    filter: str = ""
    first: int = 0
    typing: bool = False
    paused: bool = False


def press(view: View, key: str) -> View | None:
    """What is shown after `key` (a character, or a name such as "up"); None where the user leaves."""
    if view.typing:
        if key in ("enter", "escape"):
            return dataclasses.replace(view, typing=False, filter=view.filter if key == "enter" else "")
        if key in ("ctrl-c", "ctrl-d"):
            return None
        text = view.filter[:-1] if key == "backspace" else view.filter + key if len(key) == 1 else view.filter
        return dataclasses.replace(view, filter=text, first=0)
    if key in QUIT:
        return None
    if key in KEYS:
        return dataclasses.replace(view, sort=KEYS[key], first=0)
    if key == "/":
        return dataclasses.replace(view, typing=True)
    if key == "escape":
        return dataclasses.replace(view, filter="", first=0)
    if key == "p":
        return dataclasses.replace(view, paused=not view.paused)
    return dataclasses.replace(view, first=max(0, view.first + DOWN.get(key, 0) - UP.get(key, 0)))


def scrolled(view: View, count: int, rows: int) -> View:
    """`view` such that of `count` machines the last ones still fill the `rows`."""
    return dataclasses.replace(view, first=max(0, min(view.first, count - rows)))


def chosen(document: Json, view: View) -> list[Json]:
    """The machines that `view` is about, in its order. Each word of the filter stands somewhere in what is known of one."""
    words = view.filter.lower().split()
    found = [each for each in document["machines"] if all(word in _searched(each) for word in words)]
    if view.sort == "start":
        return found
    figure = {"cpu": processors, "memory": memory, "load": load}[view.sort]
    known = [(value, each) for each in found if (value := figure(each)) is not None]
    known.sort(key=lambda pair: pair[0], reverse=True)
    return [*(each for _, each in known), *(each for each in found if figure(each) is None)]


# -- Cells ---------------------------------------------------------------------------------------------------------------


def header(document: Json) -> tuple[str, str]:
    """Two lines: whose session it is; what it has."""
    session = document["session"]
    end = session.get("ended")
    life = short((end or document["now"]) - session["began"])
    first = [session["program"], session["name"], session["system"], f"ended after {life}" if end else f"up {life}"]
    second = [number(len(document["machines"]), "machine")]
    second += [f"{count} {state}" for state, count in document["counts"].items()]
    rates = [each["history"]["calls"][-1] for each in document["machines"] if each["history"]["calls"]]
    if known := [rate for rate in rates if rate is not None]:
        second.append(f"{sum(known):.0f} calls/s")
    if session.get("hourly") is not None:
        second.append(f"{session['hourly']:.2f} USD/h")
    if session.get("cost") is not None:
        second.append(f"{session['cost']:.2f} USD so far")
    if session.get("failed"):
        second.append(f"failed: {session['failed']}")
    return "  ".join(_clean(each) for each in first if each), "  ".join(map(_clean, second))


def machine_cells(machine: Json) -> tuple[str, ...]:
    """A row below `MACHINES`."""
    vitals = machine["vitals"] if machine["state"] == "RUNNING" else None
    rates = machine["history"]["calls"][-1:] if vitals is not None else ()
    return (
        machine["id"],
        machine["state"],
        _shown(machine["uptime"], short),
        _shown(processors(machine), lambda value: f"{value:.0f}%"),
        _shown(vitals and vitals["memory"]["percent"], lambda value: f"{value:.0f}%"),
        _shown(memory(machine), brief),
        _shown(load(machine), lambda value: f"{value:.1f}"),
        "".join(_shown(each, _rate) for each in rates),
        _clean(doing(machine)),
    )


def method_cells(method: Json) -> tuple[str, ...]:
    """A row below `METHODS`: as the machines have served it, or, where none has said, as the driver has called it."""
    figures = method["served"] or method["called"]
    return (
        _clean(method["method"]),
        str(figures["count"]),
        _shown(figures["rate"], _rate),
        str(figures["errors"] or ""),
        *(_shown(figures[name], latency) for name in ("p50", "p99", "max")),
    )


def busiest(document: Json) -> list[Json]:
    """The methods, those first that take most of the machines' time."""

    def key(method: Json) -> tuple[float, float]:
        figures = method["served"] or method["called"]
        return figures["rate"] or 0.0, figures["seconds"]

    return sorted((each for each in document["methods"] if each["served"] or each["called"]), key=key, reverse=True)


def is_bad(machine: Json) -> bool:
    """Whether there is something that the user should see."""
    return bool(machine["error"] or machine["unhealthy"] or machine["missing"] or machine["notice"])


def doing(machine: Json) -> str:
    """What a machine does, in a few words; or what is wrong with it."""
    if machine["state"] == "STOPPED":
        return machine["error"] or "shut down"
    if machine["state"] != "RUNNING":
        return machine["step"] or ""
    notice = machine["notice"] and machine["notice"]["text"]
    wrong = [each for each in (machine["unhealthy"], notice, machine["missing"]) if each]
    calls: dict[str, list[float]] = {}
    for process in machine["processes"]:
        for each in process["doing"]:
            calls.setdefault(each["method"], []).append(each["seconds"] or 0.0)
    longest = sorted(calls.items(), key=lambda pair: max(pair[1]), reverse=True)
    return "; ".join([*wrong, ", ".join(_call(method, seconds) for method, seconds in longest)]).removesuffix("; ")


def processors(machine: Json) -> float | None:
    """The percentage of a processor that its processes use; of all together where nobody knows that."""
    if machine["state"] != "RUNNING":
        return None
    known = [each["percent"] for each in machine["processes"] if each.get("percent") is not None]
    if known:
        return float(sum(known))
    return None if machine["vitals"] is None else machine["vitals"]["cpu"]


def memory(machine: Json) -> float | None:
    """Bytes that its processes have."""
    if machine["state"] != "RUNNING" or not machine["vitals"]:
        return None
    return float(machine["vitals"]["memory"]["processes"])


def load(machine: Json) -> float | None:
    """Of the last minute."""
    return float(machine["vitals"]["load"][0]) if machine["state"] == "RUNNING" and machine["vitals"] else None


def _call(method: str, seconds: Sequence[float]) -> str:
    times = f" ×{len(seconds)}" if len(seconds) > 1 else ""
    return f"{method}{times} {latency(max(seconds)) if max(seconds) < 1 else short(max(seconds))}"


def _rate(value: float) -> str:
    return f"{value:.1f}" if 0 < value < 9.95 else f"{value:.0f}"


def _shown(value: float | None, form: Callable[[float], str]) -> str:
    return "" if value is None else form(value)


def _clean(text: str) -> str:
    return " ".join(shown(text).split())


def _searched(machine: Json) -> str:
    parts = [machine["id"], machine["address"], machine["host"], machine["state"], doing(machine)]
    return " ".join([*parts, *machine["detail"].values()]).lower()


# -- Printed once --------------------------------------------------------------------------------------------------------


def printed(document: Json, view: View) -> Iterator[str]:
    """All of it, as lines."""
    yield from header(document)
    yield ""
    yield from table([MACHINES, *map(machine_cells, chosen(document, view))], right=RIGHT, indent="")
    if methods := busiest(document):
        yield ""
        yield from table([METHODS, *map(method_cells, methods)], right=frozenset(range(1, len(METHODS))), indent="")
