"""Keeping a machine alive: the contract between the driver and its machines.

The driver calls ``keepalive(lease)`` on each machine it owns: *end yourself unless you hear from me again within
`lease` seconds*. So nothing is left running when the driver is killed, its host sleeps, or the network goes.

Rule 1. A machine that answered is asked again after a quarter of the lease; one that did not, after a sixteenth.

Rule 2. The driver gives a machine up when its lease has certainly lapsed, reckoned from when its last reply *arrived*
(it was granted earlier than that), and at least one attempt since then has failed. A driver that was itself stopped
for longer than a lease (Ctrl-Z, a debugger) therefore asks once more before it gives up.

Rule 3. An attempt whose request arrived and whose reply was lost renews the lease too. So a machine that was given up
may live on, but for no longer than a lease after the last attempt: nobody renews it any more.

`Schedule` decides and `Keepalive` acts. All times are seconds, and instants are on the caller's monotonic clock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

LEASE = 120.0
"""Seconds. User code in the driver may keep the GIL for a minute, and must find its machines still there; a machine
without a driver costs money for this long. A driver that dies is noticed sooner, where the machine can see it."""

RETRY_MIN = 1.0
"""Seconds between attempts at the least: a host that is down is not helped by more of them."""

REPLY_TIMES = 10


class Schedule:
    """When to ask one machine next, and whether to give it up. Pure; its owner holds a lock.

    A lease is taken to have been granted at `now`; the first attempt is due at once.
    """

    def __init__(self, now: float, lease: float = LEASE) -> None:
        if lease <= 0:
            raise ValueError(f"lease must be positive: {lease}")
        self.lease = lease
        self.interval = lease / 4
        self.retry = min(self.interval, max(RETRY_MIN, lease / 16))
        self.reply_times: deque[float] = deque(maxlen=REPLY_TIMES)
        """How long the last replies took, in seconds, oldest first."""
        self.next_keepalive = now
        """The instant at which the next attempt is due."""
        self._lapse = now + lease
        self._reason: str | None = None

    def next_due(self, now: float) -> float:
        """The instant of the next attempt or verdict, whichever is due first; never before `now`."""
        due = self.next_keepalive if self._reason is None else min(self.next_keepalive, self._lapse)
        return max(now, due)

    def attempt_timeout(self, now: float) -> float:
        """Seconds that an attempt made `now` may take: an interval, less where the lease lapses before."""
        return max(self.retry, min(self.interval, self._lapse - now))

    def succeeded(self, now: float, reply_time: float) -> None:
        """A reply arrived `now`, `reply_time` seconds after it was asked for."""
        self.reply_times.append(reply_time)
        self.next_keepalive = now + self.interval
        self._lapse = now + self.lease
        self._reason = None

    def failed(self, now: float, reason: str) -> None:
        """An attempt ended `now` without a reply, because of `reason`."""
        self.next_keepalive = now + self.retry
        self._reason = reason

    def verdict(self, now: float) -> str | None:
        """Why the machine is given up; None while there is hope."""
        if self._reason is None or now < self._lapse:
            return None
        return f"no keepalive reply for {now - self._lapse + self.lease:.0f} s: {self._reason}"


class Timer(Protocol):
    def cancel(self) -> None: ...


class Timers(Protocol):
    """What the loop needs of the reactor."""

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer: ...


class Keepalive:
    """Drives the schedule of one machine with the reactor's timers. It has no thread of its own, and may be used from any.

    `send(lease, on_reply)` sends one request, does not block, and calls `on_reply` at most once, from any thread: with
    the reply time in seconds, or with the exception that ended the request. An exception out of `send` counts the same.
    At most one request is awaited at a time. One that is unanswered at its deadline counts as failed, but its reply is
    welcome when it comes later: the machine has renewed the lease.

    `on_lost(reason)` is called once, when the machine is given up, and never after `stop`; then all has ended.
    """

    def __init__(
        self,
        timers: Timers,
        send: Callable[[float, Callable[[float | BaseException], None]], None],
        on_lost: Callable[[str], None],
        *,
        lease: float = LEASE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timers = timers
        self._send = send
        self._on_lost = on_lost
        self._clock = clock
        self._lock = threading.Lock()
        self._schedule = Schedule(clock(), lease)
        self._running = False
        self._attempts = 0
        self._awaited = 0  # The number of the attempt in flight, from 1.
        self._timer: Timer | None = None  # The deadline of the attempt in flight; without one, for what is due next.

    @property
    def reply_times(self) -> list[float]:
        """How long the last ten replies took, in seconds, oldest first."""
        with self._lock:
            return list(self._schedule.reply_times)

    @property
    def next_keepalive(self) -> float:
        """The instant, on the monotonic clock, at which the next attempt is due."""
        with self._lock:
            return self._schedule.next_keepalive

    def start(self) -> None:
        """Begin a lease now, and ask for its renewal at once. Idempotent while it runs."""
        with self._lock:
            if not self._running:
                self._running = True
                self._schedule = Schedule(self._clock(), self._schedule.lease)
                self._arm()

    def stop(self) -> None:
        """Ask no more. A request in flight is left to itself, and its reply is ignored. Idempotent."""
        with self._lock:
            self._end()

    # -- Timers and replies ------------------------------------------------------------------------------------------

    def _due(self) -> None:
        with self._lock:
            step = self._next_step()
        if isinstance(step, str):
            self._on_lost(step)
        elif step is not None:
            try:
                self._send(self._schedule.lease, lambda outcome: self._ended(step, outcome))
            except Exception as error:  # Whatever it is, the loop must go on: it is all that keeps the machine.
                self._ended(step, error)

    def _ended(self, attempt: int, outcome: float | BaseException) -> None:
        with self._lock:
            awaited = attempt == self._awaited
            if not self._running or (isinstance(outcome, BaseException) and not awaited):
                return
            now = self._clock()
            if isinstance(outcome, BaseException):
                self._schedule.failed(now, str(outcome) or type(outcome).__name__)
            else:
                self._schedule.succeeded(now, outcome)
            if awaited:
                self._awaited = 0
            if not self._awaited:
                self._arm()

    # -- With the lock held ------------------------------------------------------------------------------------------

    def _next_step(self) -> int | str | None:
        """What to do now: give up, for the reason returned; send the attempt of the number returned; or nothing."""
        now = self._clock()
        if not self._running or self._awaited:
            return None
        lost = self._schedule.verdict(now)
        if lost is not None:
            self._end()
            return lost
        if now < self._schedule.next_due(now):  # The timer was early, or a late reply has moved what is due.
            self._arm()
            return None
        self._attempts += 1
        attempt = self._awaited = self._attempts
        timeout = self._schedule.attempt_timeout(now)
        self._set_timer(timeout, lambda: self._ended(attempt, TimeoutError(f"no reply within {timeout:g} s")))
        return attempt

    def _arm(self) -> None:
        now = self._clock()
        self._set_timer(self._schedule.next_due(now) - now, self._due)

    def _set_timer(self, delay: float, callback: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._timers.call_later(delay, callback)

    def _end(self) -> None:
        self._running = False
        self._awaited = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
