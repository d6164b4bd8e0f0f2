"""A bar for calls under way: how many have ended, how many have failed, how fast, and how long it will still take.

`progress` iterates over calls as they end, in whatever order that is. What is shown depends on who looks:

- On a terminal, a bar of tqdm's, on standard error. What machines say meanwhile is written above it.
- In a notebook, tqdm's bar there; where ipywidgets is not installed, its bar of text.
- Elsewhere (a file, a pipe) a line now and then, `due`, as the session says other things.

Calls that are a sequence are under way already. Those of a generator are taken from it, and so submitted, as others end: at
most `WINDOW` are under way, so that a million of them need neither be held here nor wait at machines.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from .errors import UsageError
from .logs import Logs

F = TypeVar("F", bound="Future[Any]")

WINDOW = 1024
"""Calls of a generator that are under way at the same time: some for each processor of some hundred machines."""

GROWTH = 2
"""Calls that are made for each that has ended, until there are so many under way: more, and one that has ended would wait for
whoever makes them, who may take his time."""

REDRAW = 1.0
"""Seconds after which the times are drawn anew, though no call has ended."""

LINE_EVERY = 10.0
SHARE = 0.1
"""Between two lines there are so many seconds, and so much of the whole; or, however little has been done, `LINE_AT_LEAST`."""

LINE_AT_LEAST = 60.0


class Speaker(Protocol):
    """What is needed of a `session.Session`."""

    @property
    def logs(self) -> Logs: ...

    def say(self, text: str) -> None: ...


class Shown(Protocol):
    """What shows progress: `add` when a call has ended, `tick` when none has for a while."""

    def add(self, ended: Counts) -> None: ...

    def tick(self, ended: Counts) -> None: ...

    def close(self, ended: Counts) -> None: ...


class Counts:
    """How many calls have ended, and of these, failed, and been cancelled; `total` is None where nobody knows."""

    def __init__(self, total: int | None) -> None:
        self.total = total
        self.ended = self.failed = self.cancelled = 0

    def add(self, call: Future[Any]) -> None:
        self.ended += 1
        if call.cancelled():
            self.cancelled += 1
        elif call.exception() is not None:
            self.failed += 1

    @property
    def remarks(self) -> str:
        """``3 failed, 1 cancelled``; empty where all is well."""
        said = ((self.failed, "failed"), (self.cancelled, "cancelled"))
        return ", ".join(f"{count} {what}" for count, what in said if count)


def progress(session: Speaker, calls: Iterable[F], desc: str = "", total: int | None = None) -> Iterator[F]:
    """Iterate over `calls` as they end: each is done, and its ``result()`` returns or raises at once.

    `desc` stands before the bar; `total` is the number of calls, where `calls` has no length. Leaving the loop leaves the other
    calls as they are. Raises `UsageError` for what is no call.
    """
    logs = session.logs  # Raises in a service.
    if not isinstance(calls, Iterable):
        raise UsageError(f"progress is shown of calls, as `machine.submit` returns them, not of {calls!r:.80}")
    if isinstance(calls, Sized):
        counts = Counts(len(calls) if total is None else total)
        return _as_they_end(session, logs, iter(calls), math.inf, math.inf, desc, counts)
    return _as_they_end(session, logs, iter(calls), WINDOW, GROWTH, desc, Counts(total))


def _as_they_end(
    session: Speaker, logs: Logs, calls: Iterator[F], window: float, growth: float, desc: str, counts: Counts
) -> Iterator[F]:
    ended: SimpleQueue[Any] = SimpleQueue()
    more, under_way = True, 0
    with _shown(session, logs, desc, counts) as shown:
        while more or under_way:
            taken = 0
            while more and under_way < window and (taken < growth or ended.empty()):
                more = _begin(calls, ended)
                under_way += more
                taken += 1
            try:
                call = ended.get(timeout=REDRAW if under_way else 0)
            except Empty:
                shown.tick(counts)
                continue
            under_way -= 1
            counts.add(call)
            shown.add(counts)
            yield call


def _begin(calls: Iterator[F], ended: SimpleQueue[Any]) -> bool:
    """Take a call, which goes to `ended` when it has; False where there is none any more."""
    for call in calls:
        if not isinstance(call, Future):
            raise UsageError(f"progress is shown of calls, as `machine.submit` returns them, not of {call!r:.80}")
        call.add_done_callback(ended.put)
        return True
    return False


# -- What is shown -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _shown(session: Speaker, logs: Logs, desc: str, counts: Counts) -> Iterator[Shown]:
    """Whatever can be shown here, for as long as the block lasts."""
    if "ipykernel" not in sys.modules and not is_live():
        lines = Lines(session.say, desc)
        try:
            yield lines
        finally:
            lines.close(counts)
        return
    bar = Bar()
    with logs.beside(bar):  # Before it is there: else a line could come between.
        bar.begin(desc, counts)
        try:
            yield bar
        finally:
            bar.close(counts)


def is_live() -> bool:
    """Whether standard error is a terminal on which a line can be drawn again and again."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Bar:
    """tqdm's, on a terminal or in a notebook, from `begin` to `close`. A `logs.Bar`."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # A notebook without ipywidgets has a bar of text: no reason to complain.
            from tqdm.auto import tqdm

        class Unwatched(tqdm):  # type: ignore[misc, unused-ignore]
            monitor_interval = 0  # A thread for bars whose `miniters` turn out wrong: ours are not guessed.

        self._kind = Unwatched
        self._drawn: Any = None

    def begin(self, desc: str, counts: Counts) -> None:
        self._drawn = self._kind(
            desc=desc or None, total=counts.total, unit="call", file=sys.stderr, dynamic_ncols=True, miniters=1
        )

    def add(self, ended: Counts) -> None:
        self._remark(ended)
        self._drawn.update()

    def tick(self, ended: Counts) -> None:
        self._drawn.refresh()

    def close(self, ended: Counts) -> None:
        self._remark(ended)
        self._drawn.close()

    def clear(self) -> None:
        if self._drawn is not None:
            self._drawn.clear()

    def refresh(self) -> None:
        if self._drawn is not None:
            self._drawn.refresh()

    def get_lock(self) -> Any:
        return self._kind.get_lock()

    def _remark(self, ended: Counts) -> None:
        if ended.remarks:
            self._drawn.set_postfix_str(ended.remarks, refresh=False)


class Lines:
    """Lines, for files and pipes."""

    def __init__(self, say: Callable[[str], None], desc: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._desc = desc or "calls"
        self._clock = clock
        self._began = self._said = clock()
        self._ended = 0

    def add(self, ended: Counts) -> None:
        now = self._clock()
        if ended.ended != ended.total and due(now - self._said, ended.ended - self._ended, ended.total):
            self._say(f"{self._desc}: {line(ended, now - self._began)}")
            self._said, self._ended = now, ended.ended

    def tick(self, ended: Counts) -> None:
        self.add(ended)

    def close(self, ended: Counts) -> None:
        self._say(f"{self._desc}: {line(ended, self._clock() - self._began)}")


def due(seconds: float, more: int, total: int | None) -> bool:
    """Whether it is time for another line, so many `seconds` and `more` ended calls after the last one."""
    return seconds >= LINE_AT_LEAST or (seconds >= LINE_EVERY and (not total or more >= SHARE * total))


def line(ended: Counts, seconds: float) -> str:
    """``400 of 1000 ended (2 failed) in 20 s, 20.0/s, 30 s left``."""
    of = "" if ended.total is None else f" of {ended.total}"
    remarks = f" ({ended.remarks})" if ended.remarks else ""
    text = f"{ended.ended}{of} ended{remarks} in {_seconds(seconds)}"
    if not ended.ended or seconds <= 0:
        return text
    rate = ended.ended / seconds
    text += f", {rate:.1f}/s" if rate >= 0.1 else f", {_seconds(1 / rate)} each"
    if ended.total is not None and ended.ended < ended.total:
        text += f", {_seconds((ended.total - ended.ended) / rate)} left"
    return text


def _seconds(seconds: float) -> str:
    """``12 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
