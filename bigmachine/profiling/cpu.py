"""Where a process's time goes: a thread that looks at all others' stacks, 100 times a second, while somebody wants to know.

Theory of operation
-------------------
Every look gives each thread's stack the processor time that the kernel says the thread has used since the look before
(``cpu``), and the time that has passed (``wall``): what is in ``wall`` and not in ``cpu``, it has waited. So native code counts
for the Python function that called it, whether it holds the interpreter's lock or not. Threads that the interpreter does not
know, such as those of a numeric library, are one sample of their own: what the process has used, less all that is known.

Rule 1. Nothing is patched, and while nobody profiles nothing runs. Several profiles at once share one sampler: each is the
difference between two states of its table.

Rule 2. A thread that has used no time since the last look stands where it stood: its stack is not walked again, and the table
is told of its wait when that ends, or when somebody reads it. So hundreds of waiting threads cost a system call each.

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

from .calls import current_frames, labels_of
from .values import Labels, Place, Places, Profile, Sample, Stack

RATE = 100
"""Looks a second, as in Go: 30 s tell 1 % from 2 %. The sampler's thread takes 0.9 to 1.4 % of a processor, of which most is
waking up. With what it costs others besides: a loop that computes took 2 to 4 % more processor time, null calls no more
(-5 to 0 %), calls of 0.2 ms 2 to 8 % (low quantiles of 160 pieces each, on two shared cores that vary by 3 % between runs)."""

MAX_SHARE = 0.02
"""Of its time, what the sampler may use of a processor: with hundreds of threads it looks less often (100 that wait take
0.15 ms, six of which one computes 0.08 ms)."""

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


class _Seen:
    """A thread, since it last used any time: the time of processor that it had used then, where it stood (None of who waits for
    a profile), and how many looks, and nanoseconds, of the sampler's life had passed then and are told in the table."""

    __slots__ = ("cpu", "key", "looks", "wall")

    def __init__(self, cpu: int, key: Key | None, looks: int, wall: int) -> None:
        self.cpu = cpu
        self.key = key
        self.looks = looks
        self.wall = wall


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
    process: int
    own: int


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
        self._clocks: dict[int, int] = {}
        self._seen: dict[int, _Seen] = {}
        self._looks = self._wall = 0
        self._table: Table = {}
        self._process = self._own = 0
        self._mine = 0  # What the sampler's own thread had used at the last look.
        self._renewed = False
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
            return self._state()

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
            return self._state(), list(self._places.places)

    def _state(self) -> State:
        """What has been seen until now; the lock is held."""
        for seen in self._seen.values():
            self._settle(seen)
        return State(dict(self._table), self._process, self._own)

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
        the seconds of processor that the sampler has used since then, with waking up and getting the interpreter's lock."""
        frames = current_frames()
        del frames[threading.get_ident()]
        with self._lock:
            if stop.is_set():
                return 0.0  # The next sampler may have begun.
            process = time.process_time_ns()
            of_waiters = self._see(frames, passed) if self.clocks else self._guess(frames, passed, process - self._process)
            mine = time.thread_time_ns()
            took = mine - self._mine
            self._own += took + of_waiters
            self._process, self._mine = process, mine
            return took / 1e9

    def _see(self, frames: dict[int, FrameType], passed: int) -> int:
        """Look at each thread's clock, and at the stacks of those that have used time. Returns what the waiters have used."""
        known, looks, wall = self._seen, self._looks, self._wall
        self._looks, self._wall = looks + (passed > 0), wall + passed
        of_waiters = 0
        self._renewed = False
        for ident, frame in frames.items():
            seen = known.get(ident)
            cpu = self._cpu(ident)
            if seen is not None and seen.cpu == cpu:
                continue
            used = 0 if seen is None else max(0, cpu - seen.cpu)
            if seen is not None:
                self._settle(seen, looks, wall)
            key = None
            if ident in self._waiters:
                of_waiters += used
            else:
                stack, walked = self._places.of_stack(frame)
                key = stack, labels_of(walked)
                if passed:
                    self._add(key, 1, used, passed)
            known[ident] = _Seen(cpu, key, self._looks, self._wall)
        if len(known) > len(frames):
            for ident in known.keys() - frames.keys():
                self._settle(known.pop(ident), looks, wall)
        return of_waiters

    def _settle(self, seen: _Seen, looks: int | None = None, wall: int | None = None) -> None:
        """Tell the table how long a thread has waited; until now, or until another look."""
        looks, wall = (self._looks, self._wall) if looks is None or wall is None else (looks, wall)
        if looks > seen.looks and seen.key is not None:
            self._add(seen.key, looks - seen.looks, 0, wall - seen.wall)
        seen.looks, seen.wall = looks, wall

    def _guess(self, frames: dict[int, FrameType], passed: int, process: int) -> int:
        """The same where threads have no clocks: what the process has used, shared by those that do not seem to wait."""
        keys: dict[int, Key] = {}
        for ident in frames.keys() - self._waiters:
            stack, walked = self._places.of_stack(frames[ident])
            keys[ident] = stack, labels_of(walked)
        places = self._places.places
        busy = [ident for ident, (stack, _) in keys.items() if not places[stack[0]].file.endswith(WAITING)]
        for ident, key in keys.items():
            if passed:
                self._add(key, 1, process // len(busy) if ident in busy else 0, passed)
        return 0

    def _add(self, key: Key, looks: int, used: int, passed: int) -> None:
        table = self._table
        count, cpu, wall = table.get(key, (0, 0, 0))
        if not count and len(table) >= MAX_STACKS:
            key = self._overflow
            count, cpu, wall = table.get(key, (0, 0, 0))
        table[key] = (count + looks, cpu + used, wall + passed)

    def _cpu(self, ident: int) -> int:
        """Nanoseconds of processor that a thread has used; 0 of one that has ended, or is not Python's own."""
        clock = self._clocks.get(ident)
        if clock is None:
            if not self._renewed:  # Once a look, however many are not Python's own.
                self._renewed = True
                threads = threading.enumerate()
                self._clocks = {each.ident: thread_clock(each.native_id or 0) for each in threads if each.ident}
            clock = self._clocks.get(ident)
        if clock is None:
            return 0
        try:
            return time.clock_gettime_ns(clock)
        except OSError:
            del self._clocks[ident]  # The number of a thread that has ended may be another's by now.
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
