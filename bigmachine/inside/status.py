"""The state of a session at a moment, as one document: what ``/status.json`` serves, and page and terminal show.

::

    {"now": 1763800000.0, "interval": 2.0, "poll": 2.0,    # seconds as of 1970; between two documents; until to look again
     "tick": 17,                                           # this one's number
     "session": {"name", "system", "program", "digest", "version", "python", "began", "pid", "host", "lease",
                 "hourly", "cost", "ended", "failed"},     # USD; when it ended; by what, in a line
     "counts": {"RUNNING": 4, …},                          # machines by state
     "machines": [{"id", "address", "host", "state", "entered": {"RUNNING": 1763799990.0, …}, "began", "uptime",
                   "detail": {"instance": "i-0abc", …}, "hourly", "cost",
                   "error", "error_details",               # its first line, and all of it
                   "notice": {"kind", "deadline", "text"}, "unhealthy", "maxprocs",
                   "keepalive": {"next", "replies", "late"},              # seconds from now; that the last ones took
                   "vitals": {"memory": {"total", "used", "percent", "processes"},
                              "disk": {"total", "used", "percent", "path"}, "load": [1, 5, 15], "cpu"},
                   "missing",                              # why it has not answered
                   "history": {"memory": […], "cpu": […], "load": […], "calls": […]},   # percent, percent, load, calls/s
                   "processes": [{"process", "pid", "rss", "cpu", "percent", "threads",
                                  "doing": [{"method", "seconds", "where", "thread"}]}],
                   "boot": [{"name", "began", "seconds", "failed"}], "step",            # the one under way
                   "lines"}],                              # of its output, so far
     "methods": [{"method", "served": {"count", "rate", "errors", "p50", "p99", "max", "seconds", "sent", "received"},
                  "called": {…}}],                         # by all processes; by this one
     "captures": [{"machine", "time", "reason", "files"}],
     "events": [{"number", "time", "kind", "machine", "fields"}]}          # the newest

Sizes are bytes, times seconds; what nobody knows is null. ``cpu`` of a process is seconds that it has used, ``percent`` the
share of one processor since the document before.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..events import Event
from ..info import VERSION, Vitals, python_version
from ..machine import Machine
from ..rpc.stats import MethodStats
from ..state import State
from .cluster import Cluster

HISTORY = 90
"""Points of a history: of three minutes."""

EVENTS = 50
"""Events of a document; ``/events.json`` has more."""

LATE = 1 / 8
"""Of a lease: a keepalive that is overdue for longer, or has taken longer, is late; so is one that has failed, until another
one is answered. A quarter of the lease lies between two."""

OURS = ("Process.", "Supervisor.")
"""Methods of our own, which are in no document: looking would show itself."""


@dataclass
class Seen:
    """What a machine has said so far; what it has not been asked for lately is as it was then.

    `stats` and `doing` are by process, `percents` the processors' share of each. `rate` is calls per second.
    """

    vitals: Vitals | None = None
    stats: dict[str, dict[str, MethodStats]] = field(default_factory=dict)
    doing: dict[str, Sequence[Any]] = field(default_factory=dict)
    percents: dict[str, float] = field(default_factory=dict)
    missing: str = ""
    memory: deque[float | None] = field(default_factory=lambda: deque(maxlen=HISTORY))
    cpu: deque[float | None] = field(default_factory=lambda: deque(maxlen=HISTORY))
    load: deque[float | None] = field(default_factory=lambda: deque(maxlen=HISTORY))
    calls: deque[float | None] = field(default_factory=lambda: deque(maxlen=HISTORY))


@dataclass(frozen=True)
class Figures:
    """Of a method at both ends: totals so far, and calls per second, None where there is nothing to compare with."""

    served: MethodStats | None
    served_rate: float | None
    called: MethodStats | None
    called_rate: float | None


def is_ours(method: str) -> bool:
    """Whether `method` belongs to the toolkit."""
    return method.startswith(OURS)


# -- The document --------------------------------------------------------------------------------------------------------


def document(
    session: Cluster,
    seen: Mapping[str, Seen],
    methods: Mapping[str, Figures],
    *,
    tick: int,
    interval: float,
    poll: float,
    ended: float | None = None,
) -> dict[str, Any]:
    """See the module. `seen` is by machines' ids."""
    now = time.time()
    instant = time.monotonic()
    nothing = Seen()
    machines = session.machines()
    entries = [_machine(session, each, seen.get(each.id, nothing), now, instant) for each in machines]
    return {
        "now": now,
        "interval": interval,
        "poll": poll,
        "tick": tick,
        "session": _session(session, entries, ended),
        "counts": dict(sorted(Counter(str(each.state) for each in machines).items())),
        "machines": entries,
        "methods": [method_entry(name, methods[name]) for name in sorted(methods)],
        "captures": list(session.captures),
        "events": [as_event(each) for each in session.events.last(EVENTS)],
    }


def as_event(event: Event) -> dict[str, Any]:
    """For JSON."""
    return {
        "number": event.number,
        "time": event.time,
        "kind": event.kind,
        "machine": event.machine,
        "fields": dict(event.fields),
    }


def _session(session: Cluster, machines: Iterable[Mapping[str, Any]], ended: float | None) -> dict[str, Any]:
    fleet = session.fleet
    live = [each["hourly"] for each in machines if each["state"] != str(State.STOPPED)]
    costs = [each["cost"] for each in machines]
    return {
        "name": session.name,
        "system": session.system,
        "program": fleet.program.name,
        "digest": fleet.program.digest or "",
        "version": VERSION,
        "python": python_version(),
        "began": fleet.began,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "lease": fleet.lease,
        "hourly": _sum(live),
        "cost": _sum(costs),
        "ended": ended,
        "failed": None if session.failed is None else first_line(session.failed),
    }


def _sum(known: Iterable[float | None]) -> float | None:
    values = [value for value in known if value is not None]
    return sum(values) if values else None


def _machine(session: Cluster, machine: Machine, seen: Seen, now: float, instant: float) -> dict[str, Any]:
    state = machine.state
    entered = dict(machine.entered)
    ran = entered.get(State.RUNNING)
    end = entered.get(State.STOPPED, now)
    hourly = session.fleet.hourly(machine.id)
    paid = max(0.0, end - entered.get(State.STARTING, end)) / 3600
    notice = machine.notice
    running = state is State.RUNNING
    return {
        "id": machine.id,
        "address": machine.addr,
        "host": machine.hostname,
        "state": str(state),
        "entered": {str(each): when for each, when in entered.items()},
        "began": machine.began,
        "uptime": None if ran is None else max(0.0, end - ran),
        "detail": dict(session.fleet.detail(machine.id)),
        "hourly": hourly,
        "cost": None if hourly is None else hourly * paid,
        "error": None if machine.error is None else first_line(machine.error),
        "error_details": None if machine.error is None else details(machine.error),
        "notice": None if notice is None else {"kind": notice.kind, "deadline": notice.deadline, "text": notice.text},
        "unhealthy": machine.unhealthy or None,
        "maxprocs": machine.maxprocs,
        "keepalive": _keepalive(machine, session.fleet.lease, instant),
        "vitals": None if seen.vitals is None else _vitals(seen.vitals),
        "missing": seen.missing or None if running else None,
        "history": {
            "memory": list(seen.memory),
            "cpu": list(seen.cpu),
            "load": list(seen.load),
            "calls": list(seen.calls),
        },
        "processes": _processes(seen) if running else [],
        "boot": _boot(machine),
        "step": machine.step,
        "lines": session.logs.count(machine.id),
    }


def first_line(error: BaseException) -> str:
    """What `error` says, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def details(error: BaseException) -> str:
    """All that `error` says, with its notes, and with what caused it: the last output, a remote traceback."""
    parts = [str(error).strip() or type(error).__name__, *getattr(error, "__notes__", ())]
    cause = error.__cause__
    if cause is not None and str(cause).strip() not in parts[0]:
        parts.append(str(cause).strip())
    return "\n".join(parts)


def _keepalive(machine: Machine, lease: float, instant: float) -> dict[str, Any]:
    replies = list(machine.keepalive_reply_times)
    due = machine.next_keepalive
    if due is None or machine.state is State.STOPPED:
        return {"next": None, "replies": replies, "late": False}
    failed = bool(machine.keepalive_error)  # Then another attempt is due soon, which says nothing.
    late = failed or instant - due > lease * LATE or (bool(replies) and replies[-1] > lease * LATE)
    return {"next": due - instant, "replies": replies, "late": late}


def _vitals(vitals: Vitals) -> dict[str, Any]:
    memory, disk, load = vitals.memory, vitals.disk, vitals.load
    return {
        "memory": {
            "total": memory.total,
            "used": memory.used,
            "percent": memory.used_percent,
            "processes": memory.processes,
        },
        "disk": {"total": disk.total, "used": disk.used, "percent": disk.used_percent, "path": disk.path},
        "load": [load.load1, load.load5, load.load15],
        "cpu": vitals.cpu,
    }


def _processes(seen: Seen) -> list[dict[str, Any]]:
    if seen.vitals is None:
        return []
    return [
        {
            "process": each.process,
            "pid": each.pid,
            "rss": each.rss,
            "cpu": each.cpu,
            "percent": seen.percents.get(each.process),
            "threads": each.threads,
            "doing": [
                {"method": one.method, "seconds": one.seconds, "where": one.where, "thread": one.thread}
                for one in seen.doing.get(each.process, ())
            ],
        }
        for each in seen.vitals.processes
    ]


def _boot(machine: Machine) -> list[dict[str, Any]]:
    """The last step of a machine that has stopped before it ran is the one that failed."""
    steps = machine.timeline
    failed = machine.state is State.STOPPED and State.RUNNING not in machine.entered and machine.error is not None
    return [
        {"name": each.name, "began": each.began, "seconds": each.seconds, "failed": failed and number == len(steps)}
        for number, each in enumerate(steps, 1)
    ]


def method_entry(name: str, figures: Figures) -> dict[str, Any]:
    """An element of ``methods``."""
    return {
        "method": name,
        "served": _figures(figures.served, figures.served_rate),
        "called": _figures(figures.called, figures.called_rate),
    }


def _figures(stats: MethodStats | None, rate: float | None) -> dict[str, Any] | None:
    if stats is None:
        return None
    return {
        "count": stats.count,
        "rate": None if rate is None or not math.isfinite(rate) else rate,
        "errors": stats.errors,
        "p50": stats.quantile(0.5),
        "p99": stats.quantile(0.99),
        "max": stats.max_seconds,
        "seconds": stats.seconds,
        "sent": stats.sent,
        "received": stats.received,
    }
