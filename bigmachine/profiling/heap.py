"""Memory of Python objects by the stack that allocated it, from `tracemalloc`.

Tracing starts with the first profile that is asked for, as it makes allocation slower; what was allocated before is not
seen, and so the first profile has all objects by type instead (`objects`). It stops when nobody has asked for `KEEP` seconds.
Where the program itself traces (``PYTHONTRACEMALLOC``), that is used and left alone.
"""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from collections.abc import Iterator
from inspect import CO_OPTIMIZED
from types import CodeType, FunctionType

from ..rpc.reactor import Timer, reactor
from .objects import TYPES, census
from .values import Place, Places, Profile, Sample

DEPTH = 24
"""Frames that are kept of each allocation: below the call path's own, which are 8, there is room for the method's."""

KEEP = 600.0
"""Seconds for which tracing goes on after the last profile: long enough to look, think, and look again."""


class Tracing:
    """Whether this process traces, since when, and on whose account."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since: float | None = None  # As of `time.monotonic`; None while we do not trace.
        self._timer: Timer | None = None

    def ask(self) -> str:
        """See to it that there is tracing, for some while. Returns what a reader has to know about it."""
        with self._lock:
            if self._since is None and tracemalloc.is_tracing():
                return "the program traces its memory itself: what was allocated before it began to is not in here"
            first = self._since is None or not tracemalloc.is_tracing()
            if first:
                self._since = time.monotonic()
                tracemalloc.start(DEPTH)
            if self._timer is not None:
                self._timer.cancel()
            self._timer = reactor().call_later(KEEP, self.stop)
            assert self._since is not None
            if first:
                return "tracing begins with this profile: ask again in a while for who has allocated what since"
            age = time.monotonic() - self._since
            return f"traced for {age:.0f} s: what was allocated before is not in here"

    def stop(self) -> None:
        """End the tracing that `ask` began."""
        with self._lock:
            if self._since is not None:
                self._since = None
                tracemalloc.stop()


_tracing = Tracing()


def take(collect: bool) -> Profile:
    """What is allocated now, since tracing began; with `collect` without what only the garbage collector would find. Where it
    begins just now, all objects by type."""
    if collect:
        gc.collect()
    places = Places()
    counted, remarks = ([], ()) if tracemalloc.is_tracing() else census(places)
    comment = _tracing.ask()
    started = time.time()
    try:
        ours = [tracemalloc.Filter(False, file) for file in (__file__, tracemalloc.__file__)]
        grouped = tracemalloc.take_snapshot().filter_traces(ours).statistics("traceback")
    except RuntimeError:
        comments = ("tracing was stopped meanwhile", *remarks)
        return Profile("heap", TYPES, "inuse_space", places.places, counted, started, comments=comments)
    lines = {(frame.filename, frame.lineno) for each in grouped for frame in each.traceback}
    functions = _functions({file for file, _ in lines})
    number = {}
    for file, line in lines:
        code = functions.get((file, line))
        place = Place(code.co_qualname, file, line, code.co_firstlineno) if code else Place("<module>", file, line)
        number[file, line] = places.number(place)
    samples = [
        Sample(tuple(number[frame.filename, frame.lineno] for frame in reversed(each.traceback)), (each.count, each.size))
        for each in grouped
    ]
    comments = (comment, f"tracemalloc itself uses {tracemalloc.get_tracemalloc_memory()} bytes", *remarks)
    return Profile("heap", TYPES, "inuse_space", places.places, counted + samples, started, comments=comments)


def _functions(files: set[str]) -> dict[tuple[str, int], CodeType]:
    """Which function a line belongs to: `tracemalloc` does not say. From the functions that exist, as sources may not; of
    several on a line, the outermost: comprehensions and lambdas are nested ones, too."""
    functions = (each for each in gc.get_objects() if type(each) is FunctionType)
    codes = {id(each.__code__): each.__code__ for each in functions if each.__code__.co_filename in files}
    found: dict[tuple[str, int], CodeType] = {}
    for code in [nested for each in codes.values() if each.co_flags & CO_OPTIMIZED for nested in _nested(each)]:
        for _, _, line in code.co_lines():
            if line is not None:
                other = found.setdefault((code.co_filename, line), code)
                if len(code.co_qualname) < len(other.co_qualname):
                    found[code.co_filename, line] = code
    return found


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType) and constant.co_flags & CO_OPTIMIZED:  # No body of a class.
            yield from _nested(constant)
