"""Profiles of one process: where its time goes (`cpu`), what holds its memory (`heap`, `objects`), what every thread does
(`threads`); and which calls run (`doing`).

It runs in the process that it is about: the standard library only, imported when somebody asks for the first profile. A
profile is a plain value (`values.Profile`) that travels to the driver, which merges those of all processes (`inside.profiles`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import UsageError
from . import cpu, heap, objects, threads
from .values import Profile

KINDS = {
    "profile": "processor time, and waiting, by stack, over some seconds",
    "heap": "memory of Python objects by the stack that allocated it, since the first such profile; that one is by type",
    "objects": "memory of all Python objects by type",
    "threads": "the stacks of all threads and asyncio tasks",
}
"""What there is, by the names that Go's pprof has for it."""

MAX_SECONDS = 3600.0
"""A mistaken 1e9 is not to keep a thread for 30 years, and an hour at 100 Hz is more than enough to see what is rare."""


def checked(kind: object, seconds: object) -> float:
    """`seconds` as a number; it may be a text that is one, as in a URL. Raises `UsageError`, which lists what there is."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise UsageError(f"no such profile: {kind!r}; there are {', '.join(KINDS)}")
    try:
        number = float(seconds)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number <= MAX_SECONDS:
        raise UsageError(f"seconds of a profile must be a number above 0, at most {MAX_SECONDS:g}: {seconds!r}")
    return number


def take(kind: str, seconds: float, gc: bool, cancelled: Callable[[], bool]) -> Profile:
    """A profile of this process. `seconds` are for those that take time, `gc` collects garbage before a heap profile.

    Ends early when `cancelled` turns true: nobody waits for the result then. Raises `UsageError` on what there is not.
    """
    number = checked(kind, seconds)
    if kind == "profile":
        return cpu.take(number, cancelled)
    return heap.take(gc) if kind == "heap" else objects.take(gc) if kind == "objects" else threads.take()
