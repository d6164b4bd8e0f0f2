"""Events: what happened in a session, in order, for whoever looks: the page, a file (``-bigm.events``), a report.

=====================  =====================================================================================
kind                   fields
=====================  =====================================================================================
session.started        ``session``, ``system``, ``program``, ``digest``, ``version``, ``python``
session.ended          ``error``: why the program failed, null where it did not
machine.ordered        ``services``: their names
machine.state          ``state``, ``address``, ``error``: of STOPPED, null where it was asked to stop
boot.step              ``step``, ``began`` (seconds as of 1970), ``seconds``, ``failed``; told when it has ended
machine.notice         ``notice`` (``"interruption"``, ``"rebalance"``), ``deadline`` (seconds as of 1970, or null), ``text``
keepalive.late         ``seconds`` that the reply took, more than an eighth of the lease; before, with null, that it is awaited
keepalive.failed       ``error``
call.failed            ``method``, ``process`` (``"0"``, …, ``"supervisor"``), ``seconds`` that it took, ``error``, ``count``
machine.unhealthy      ``percent``, ``used``, ``total`` (bytes), ``text``
capture.saved          ``files``, ``reason``
=====================  =====================================================================================

``error`` is the exception's type and the first line of its text. Of the calls of one method of one machine there is an event
when the first one fails, and then at most one a second: its ``count`` is how many have failed since the one before, its other
fields are the last one's. The driver's calls are meant, also those that were never sent; not those that it cancelled, and not
those that services make.

Emitting never raises and never waits for a reader. Fields are what JSON can write.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, NamedTuple, Protocol

KEPT = 10_000
"""Events that are remembered: those of a session with a thousand machines."""


PERIOD = 1.0
"""Seconds between two events of failed calls of one method of one machine: a loop around a call may fail thousands of times."""

MAX_ERROR = 1000
"""Characters of an error's first line that an event has."""


class Event(NamedTuple):
    """`number` counts a session's events from 1; `time` is as of `time.time`; `machine` is an id, or empty for the session."""

    number: int
    time: float
    kind: str
    machine: str
    fields: Mapping[str, Any]


class Events:
    """The events of a session. Safe to use from any thread."""

    def __init__(self, kept: int = KEPT) -> None:
        self._lock = threading.RLock()  # A subscriber may emit, too.
        self._process = os.getpid()
        self._last = 0
        self._kept: deque[Event] = deque(maxlen=kept)
        self._subscribers: list[Callable[[Event], None]] = []

    def emit(self, kind: str, machine: str = "", /, **fields: Any) -> None:
        """It has happened now. Subscribers are called here, in the order of events. Without effect in a fork of the driver."""
        if self.elsewhere:
            return  # The lock may be held for ever there, and the file is the driver's.
        with self._lock:
            self._last += 1
            event = Event(self._last, time.time(), kind, machine, fields)
            self._kept.append(event)
            for subscriber in tuple(self._subscribers):  # One that leaves now must not hide it from the next.
                try:
                    subscriber(event)
                except Exception:  # Who looks must not be in the way of what happens.
                    pass

    @property
    def elsewhere(self) -> bool:
        """Whether this is a fork of the process whose events they are."""
        return os.getpid() != self._process

    def since(self, after: int, limit: int = 1000) -> list[Event]:
        """The oldest `limit` of those that are kept and came after number `after`."""
        with self._lock:
            first = max(0, len(self._kept) - (self._last - after))
            return list(islice(self._kept, first, min(len(self._kept), first + limit)))

    def last(self, limit: int) -> list[Event]:
        """The newest `limit`."""
        return self.since(max(0, self._last - limit), limit)

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call `callback` with every event from now on; it must be quick, and wait for no machine: whatever else happens waits
        for it. Returns what ends that."""
        with self._lock:
            self._subscribers.append(callback)

        def unsubscribe() -> None:
            with self._lock:
                if callback in self._subscribers:
                    self._subscribers.remove(callback)

        return unsubscribe


def first_line(error: BaseException) -> str:
    """``"ValueError: what it says"``, for an event's ``error``. Never raises."""
    try:
        text = str(error).strip().partition("\n")[0]
    except Exception as problem:  # The user's class takes part.
        text = f"(str() of it raised {type(problem).__name__})"
    name = type(error).__qualname__
    return f"{name}: {text}"[:MAX_ERROR] if text else name


class Timer(Protocol):
    def cancel(self) -> None: ...


class Failures:
    """Makes events of the calls that failed, as the module says. `call_later` is that of the reactor."""

    def __init__(self, events: Events, call_later: Callable[[float, Callable[[], None]], Timer]) -> None:
        self._events = events
        self._call_later = call_later
        self._lock = threading.Lock()
        self._since: dict[tuple[str, str], tuple[int, dict[str, Any]]] = {}  # Since the last event.
        self._timer: Timer | None = None
        self._closed = False

    def failed(self, machine: str, method: str, process: str, seconds: float, error: BaseException) -> None:
        """A call has failed."""
        if self._events.elsewhere:
            return  # As in `emit`.
        fields = {"method": method, "process": process, "seconds": round(seconds, 6), "error": first_line(error)}
        with self._lock:
            known = self._since.get((machine, method))
            if known is not None:
                self._since[machine, method] = known[0] + 1, fields
                return
            if not self._closed:
                self._since[machine, method] = 0, fields
                if self._timer is None:
                    self._timer = self._call_later(PERIOD, self._tick)
        self._events.emit("call.failed", machine, **fields, count=1)

    def _tick(self) -> None:
        """A period has passed."""
        with self._lock:
            told, self._since = self._since, {key: (0, last) for key, (count, last) in self._since.items() if count}
            self._timer = self._call_later(PERIOD, self._tick) if self._since and not self._closed else None
        self._tell(told)

    def close(self) -> None:
        """Tell what has not been told."""
        with self._lock:
            self._closed = True
            told, self._since = self._since, {}
            if self._timer is not None:
                self._timer.cancel()
        self._tell(told)

    def _tell(self, told: Mapping[tuple[str, str], tuple[int, dict[str, Any]]]) -> None:
        for (machine, _), (count, fields) in told.items():
            if count:
                self._events.emit("call.failed", machine, **fields, count=count)
