"""Where a process's time goes: a thread that looks at all others' stacks, 100 times a second, while somebody wants to know.

Theory of operation
-------------------
Every look gives each thread's stack the processor time that the kernel says the thread has used since the look before
(``cpu``), and the time that has passed (``wall``): what is in ``wall`` and not in ``cpu``, it has waited. So native code counts
for the Python function that called it, whether it holds the interpreter's lock or not. Threads that the interpreter does not
know, such as those of a numeric library, are one sample of their own: what the process has used, less all that is known.

Rule 1. Nothing is patched, and while nobody profiles nothing runs. Several profiles at once share one sampler: each is the
difference between two states of its table.

Rule 2. A thread that has used no time since the last look stands where it stood: its stack is not walked again. So hundreds
of waiting threads cost a system call each.

Rule 3. A thread's clock is asked for by the kernel's number of the thread. ``pthread_getcpuclockid`` takes an address, and
may crash where the thread has ended between two lines of ours.

The sampler needs the interpreter's lock in order to look, and gets it where the thread that holds it lets go: at the next
call that waits, or after the interpreter's switch interval, 5 ms. What is shorter than that is seen less often than it should
be, and its time counts for what comes next in the same thread. Hence `SWITCH`.
"""

from __future__ import annotations

import operator
import os
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NamedTuple

from .calls import labels_of
from .values import Labels, Place, Places, Profile, Sample, Stack

RATE = 100
"""Looks a second, as in Go: 30 s tell 1 % from 2 %. A loop that computes takes 1 % longer (median of 40 pairs),
and the sampler 2 % of another processor."""

MAX_SHARE = 0.02
"""Of its time, what the sampler may spend looking: with hundreds of threads it looks less often (100 that wait take 0.3 ms)."""

SWITCH = 0.001
"""The interpreter's switch interval, in seconds, while a profile is taken; see above. Four threads that compute lose 3 % by
it, and would lose 16 % by half of it; one loses nothing."""

MAX_STACKS = 50_000
"""Different stacks that are told apart: each takes about half a kilobyte. What comes beyond is counted as one."""

POLL = 0.1
"""Seconds after which a cancelled profile ends."""

WAITING = ("/threading.py", "/selectors.py", "/queue.py", "/socket.py", "/ssl.py", "/rpc/reactor.py", "/supervisor/control.py")
"""Who stands in one of these files most likely waits: for where threads have no clocks."""

TYPES = (("samples", "count"), ("cpu", "nanoseconds"), ("wall", "nanoseconds"))

OTHERS = Place("[threads that are not Python's]")

OVERFLOW = Place("[too many different stacks]")

Key = tuple[Stack, Labels]
Table = dict[Key, tuple[int, int, int]]


class _Seen(NamedTuple):
    """A thread, when it was last looked at: its time of processor, and where it stood."""

    cpu: int
    key: Key


def thread_clock(native: int) -> int:
    """The id of the clock of the processor time of thread `native`: Linux, ``MAKE_THREAD_CPUCLOCK``."""
    return (~native << 3) | 6


def _has_clocks() -> bool:
    """Whether one thread can ask for another's time by the kernel's number: elsewhere than on Linux it cannot."""
    try:
        mine = time.clock_gettime_ns(thread_clock(threading.get_native_id()))
    except (OSError, OverflowError):
        return False
    return 0 <= time.thread_time_ns() - mine < 1_000_000_000


class State(NamedTuple):
    """What has been seen so far, in nanoseconds: by stack, and what the process has used; of that, the profiling itself."""

    table: Table
    process: int = 0
    own: int = 0


class Sampler:
    """The table of what was seen, and the thread that fills it while anybody is interested."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._interval: float | None = None
        self._waiters: set[int] = set()  # Threads that wait for their profile: they are none of the program's.
        self._clear()

    def _clear(self) -> None:
        self._places = Places()
        self._overflow: Key = ((self._places.number(OVERFLOW),), ())
        self._natives: dict[int, int] = {}
        self._seen: dict[int, _Seen] = {}
        self._state = State({})
        self._mine = 0  # What the sampler's own thread had used at the last look.
        self.clocks = _has_clocks()

    def enter(self) -> State:
        """From now on somebody wants to know."""
        with self._lock:
            self._waiters.add(threading.get_ident())
            self._users += 1
            if self._users == 1:
                self._begin()
            ready = self._ready
        ready.wait()  # Not under the lock, which the sampler takes.
        with self._lock:
            return self._state._replace(table=dict(self._state.table))

    def _begin(self) -> None:
        self._clear()
        self._stop, self._ready = threading.Event(), threading.Event()
        work = threading.Thread(target=self._run, args=(self._stop, self._ready), name="bigmachine-sampler")
        work.daemon = True
        try:
            work.start()
        except RuntimeError:  # There can be no more threads.
            self._users = 0
            self._waiters.clear()
            raise
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(min(self._interval, SWITCH))

    def restore(self) -> None:
        """The interpreter's switch interval, as it was."""
        if self._interval is not None:
            sys.setswitchinterval(self._interval)
            self._interval = None

    def leave(self) -> tuple[State, list[Place]]:
        """As `enter`, now, with the places. The last one ends the sampling."""
        with self._lock:
            self._waiters.discard(threading.get_ident())
            self._users -= 1
            if not self._users:
                self._stop.set()
                self.restore()
            return self._state._replace(table=dict(self._state.table)), list(self._places.places)

    def _run(self, stop: threading.Event, ready: threading.Event) -> None:
        try:
            last = due = time.perf_counter()
            took = 0.0
            self._mine = time.thread_time_ns()
            self._look(stop, 0)
            ready.set()
            while not stop.is_set():
                now = time.perf_counter()
                due = max(due + 1 / RATE, now + took / MAX_SHARE)  # Looks that were missed are not made up for.
                time.sleep(due - now)
                now = time.perf_counter()
                took = self._look(stop, round((now - last) * 1e9))
                last = now
        finally:
            ready.set()

    def _look(self, stop: threading.Event, passed: int) -> float:
        """Look at all threads, `passed` nanoseconds after the last time; 0 is the first, which only sets the clocks. Returns
        the seconds of processor that it took."""
        me = threading.get_ident()
        begun = time.thread_time_ns()
        frames = sys._current_frames()
        with self._lock:
            if stop.is_set():
                return 0.0  # The next sampler may have begun.
            seen = {ident: self._see(ident, frame) for ident, frame in frames.items() if ident != me}
            process, mine = time.process_time_ns(), time.thread_time_ns()
            used = self._used(seen) if self.clocks else self._guessed(seen, process - self._state.process)
            own = self._state.own + mine - self._mine + sum(used[ident] for ident in self._waiters & used.keys())
            if passed:
                for ident in used.keys() - self._waiters:
                    self._add(seen[ident].key, used[ident], passed)
            self._seen, self._mine, self._state = seen, mine, State(self._state.table, process, own)
            return (mine - begun) / 1e9

    def _see(self, ident: int, frame: FrameType) -> _Seen:
        before = self._seen.get(ident)
        cpu = self._cpu(ident) if self.clocks else 0
        if self.clocks and before is not None and cpu == before.cpu:
            return before
        stack, walked = self._places.of_stack(frame)
        return _Seen(cpu, (stack, labels_of(walked)))

    def _used(self, seen: dict[int, _Seen]) -> dict[int, int]:
        """What each thread has used since the last look; one that is new, nothing."""
        return {ident: max(0, now.cpu - self._seen.get(ident, now).cpu) for ident, now in seen.items()}

    def _guessed(self, seen: dict[int, _Seen], process: int) -> dict[int, int]:
        """The same where threads have no clocks: what the process has used, shared by those that do not seem to wait."""
        places = self._places.places
        busy = {ident for ident, now in seen.items() if not places[now.key[0][0]].file.endswith(WAITING)} - self._waiters
        return {ident: process // len(busy) if ident in busy else 0 for ident in seen}

    def _add(self, key: Key, used: int, passed: int) -> None:
        table = self._state.table
        count, cpu, wall = table.get(key, (0, 0, 0))
        if not count and len(table) >= MAX_STACKS:
            key = self._overflow
            count, cpu, wall = table.get(key, (0, 0, 0))
        table[key] = (count + 1, cpu + used, wall + passed)

    def _cpu(self, ident: int) -> int:
        """Nanoseconds of processor that a thread has used; 0 of one that has ended, or is not Python's own."""
        native = self._natives.get(ident)
        if native is None:
            self._natives = {thread.ident: thread.native_id for thread in threading.enumerate()}  # type: ignore[misc]
            native = self._natives.get(ident)
        if native is None:
            return 0
        try:
            return time.clock_gettime_ns(thread_clock(native))
        except OSError:
            del self._natives[ident]  # The number of a thread that has ended may be another's by now.
            return 0


_sampler = Sampler()


def _after_fork() -> None:
    """A fork has no sampler thread, and perhaps a lock that nobody holds."""
    global _sampler
    _sampler.restore()
    _sampler = Sampler()


os.register_at_fork(after_in_child=_after_fork)


def take(seconds: float, cancelled: Callable[[], bool]) -> Profile:
    """What all threads of the process did in the next `seconds`; less, when `cancelled` turns true."""
    sampler = _sampler
    started, begun = time.time(), time.perf_counter()
    before = sampler.enter()
    try:
        while (left := begun + seconds - time.perf_counter()) > 0 and not cancelled():
            time.sleep(min(left, POLL))
    finally:
        after, places = sampler.leave()
    process, own = after.process - before.process, after.own - before.own
    samples = []
    known = 0
    for (stack, labels), values in after.table.items():
        count, cpu, wall = map(operator.sub, values, before.table.get((stack, labels), (0, 0, 0)))
        if count:
            samples.append(Sample(stack, (count, cpu, wall), labels))
            known += cpu
    rest = process - known - own
    if sampler.clocks and rest > process // 100:
        samples.append(Sample((len(places),), (0, rest, 0)))
        places.append(OTHERS)
    comments = [f"the process used {process / 1e9:.3f} s of processor, profiling {own / 1e9:.3f} s of that"]
    if not sampler.clocks:
        comments.append("threads have no clocks here: cpu is shared by those that do not seem to wait")
    passed = time.perf_counter() - begun
    return Profile("profile", TYPES, "cpu", places, samples, started, passed, 1_000_000_000 // RATE, tuple(comments))
