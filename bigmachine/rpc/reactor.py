"""The threads of a process: one poller, shared by worker threads that are all alike.

Theory of operation
-------------------
Idle workers wait in the kernel's poller (epoll or kqueue), on one-shot registrations: exactly one of them wakes for a
file descriptor that became ready, and the descriptor stays silent until it is armed again. That worker runs the
callback to its end *on its own thread*, user code included: there is no hand-off between reading a call and running it.

Rule 1. A callback that takes longer than `TICK` costs nobody anything. The monitor thread, which is awake only while a
worker is busy, sees that a worker made no progress between two ticks; it then makes sure that an idle worker waits in
the poller (starting one, up to `max_workers`), and asks the worker's current `Stealable` to give up what it was holding.

Rule 2. What a worker may hold while user code runs is announced with `enter(stealable)` and withdrawn with `leave()`;
`leave` says whether it was stolen in the meantime. Both are a few attribute writes: they are on the path of every call.

Rule 3. Callbacks do not raise. One that does is a bug of this package: it is printed with its traceback, and the worker
goes on.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Protocol

READ = 1
WRITE = 2

MAX_TICK = 0.008
"""Seconds between ticks at most: while nothing is slow they become rarer. One costs the thread that it interrupts 0.1 ms
(the interpreter's lock goes there and back), which at 1 ms is a tenth of all calls."""

TICK = 0.001
"""Seconds after which a running callback counts as slow. Shorter costs processor time while calls run; longer
delays whatever arrived on the same connection behind a slow method."""

IDLE_TICKS = 20
"""Ticks without a busy worker after which the monitor sleeps: waking it again delays the first call."""

MAX_WORKERS = 1000
"""Threads in a process at most. Calls beyond it wait; methods that call each other in a cycle deeper than this would
deadlock. A waiting thread holds about 16 kB of memory of its own (measured with 200)."""


class Stealable(Protocol):
    """Something a worker holds while it runs user code and that another thread can take over."""

    def steal(self) -> None:
        """Give up the role that the worker holds; called on the monitor thread, must not block."""


class Lingering(Protocol):
    """Something that a user's thread was reading until just now, and will most likely read again at once."""

    def settle(self) -> bool:
        """Once a tick, on the monitor thread: True where nobody came back, and a worker watches it again from now on."""


class _Poller(Protocol):
    def add(self, fd: int) -> None: ...
    def arm(self, fd: int, events: int) -> None: ...
    def remove(self, fd: int) -> None: ...
    def wait(self) -> tuple[int, int] | None: ...
    def close(self) -> None: ...


class _Epoll:
    def __init__(self) -> None:
        self._epoll = select.epoll()

    def add(self, fd: int) -> None:
        self._epoll.register(fd, select.EPOLLONESHOT)

    def arm(self, fd: int, events: int) -> None:
        mask = select.EPOLLONESHOT
        if events & READ:
            mask |= select.EPOLLIN | select.EPOLLRDHUP
        if events & WRITE:
            mask |= select.EPOLLOUT
        self._epoll.modify(fd, mask)

    def remove(self, fd: int) -> None:
        self._epoll.unregister(fd)

    def wait(self) -> tuple[int, int] | None:
        ready = self._epoll.poll(-1, 1)
        if not ready:
            return None
        fd, mask = ready[0]
        events = READ if mask & ~select.EPOLLOUT else 0
        if mask & (select.EPOLLOUT | select.EPOLLERR | select.EPOLLHUP):
            events |= WRITE
        return fd, events

    def close(self) -> None:
        self._epoll.close()


class _Kqueue:
    """The same on macOS and the BSDs. A read and a write filter are two registrations there, each one-shot."""

    def __init__(self) -> None:
        self._kqueue = select.kqueue()  # type: ignore[attr-defined,unused-ignore]

    def add(self, fd: int) -> None:
        pass

    def arm(self, fd: int, events: int) -> None:
        changes = []
        for event, kind in ((READ, select.KQ_FILTER_READ), (WRITE, select.KQ_FILTER_WRITE)):  # type: ignore[attr-defined,unused-ignore]
            if events & event:
                flags = select.KQ_EV_ADD | select.KQ_EV_ONESHOT  # type: ignore[attr-defined,unused-ignore]
                changes.append(select.kevent(fd, kind, flags))  # type: ignore[attr-defined,unused-ignore]
            else:
                self._delete(fd, kind)
        if changes:
            self._kqueue.control(changes, 0)

    def _delete(self, fd: int, kind: int) -> None:
        try:
            self._kqueue.control([select.kevent(fd, kind, select.KQ_EV_DELETE)], 0)  # type: ignore[attr-defined,unused-ignore]
        except OSError:
            pass  # It was not armed: one-shot registrations vanish when they fire.

    def remove(self, fd: int) -> None:
        self._delete(fd, select.KQ_FILTER_READ)  # type: ignore[attr-defined,unused-ignore]
        self._delete(fd, select.KQ_FILTER_WRITE)  # type: ignore[attr-defined,unused-ignore]

    def wait(self) -> tuple[int, int] | None:
        ready = self._kqueue.control([], 1, None)
        if not ready:
            return None
        kind = ready[0].filter
        return ready[0].ident, (READ if kind == select.KQ_FILTER_READ else WRITE)  # type: ignore[attr-defined,unused-ignore]

    def close(self) -> None:
        self._kqueue.close()


def _poller() -> _Poller:
    return _Epoll() if hasattr(select, "epoll") else _Kqueue()


class Watch:
    """A file descriptor in the reactor. Silent until `arm`; its callback gets the events that are ready, once an `arm`."""

    def __init__(self, reactor: Reactor, fd: int, on_ready: Callable[[int], None]) -> None:
        self._reactor = reactor
        self.fd = fd
        self.on_ready = on_ready
        self.closed = False

    def arm(self, events: int = READ) -> None:
        """Call back once, when any of `events` (`READ | WRITE`) is ready. Replaces what was armed before."""
        if not self.closed:
            try:
                self._reactor._poller.arm(self.fd, events)
            except (OSError, ValueError):
                if not self.closed and not self._reactor.closed:  # Else it has just ended: nobody is to be called back.
                    raise

    def disarm(self) -> None:
        """Stay silent. A callback that a worker has already been woken for may still run."""
        self.arm(0)

    def close(self) -> None:
        """Forget the descriptor, *before* the caller closes it. Idempotent."""
        with self._reactor._lock:
            if self.closed:
                return
            self.closed = True
            if self._reactor._watches.get(self.fd) is self:
                del self._reactor._watches[self.fd]
                try:
                    self._reactor._poller.remove(self.fd)
                except (OSError, ValueError):
                    if not self._reactor.closed:
                        raise


class Timer:
    """Returned by `Reactor.call_later`; `cancel()` is idempotent, and harmless after it has run."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Worker(threading.Thread):
    """One thread of the pool. `turn` changes whenever it makes progress; `holding` is what can be stolen from it."""

    def __init__(self, reactor: Reactor, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._reactor = reactor
        self.turn = 0
        self.busy = False
        self.slow = False
        self.lingering = False  # It waits for more of what it has just served: neither idle nor at work.
        self.holding: list[Stealable] = []  # At most one. `list.pop` is atomic: it decides between `leave` and the monitor.

    def run(self) -> None:
        reactor = self._reactor
        _current.worker = self
        while not reactor.closed:
            self.busy = False
            ready = reactor._poller.wait()
            self.slow = False
            self.turn += 1
            self.busy = True
            if reactor._asleep:
                reactor._wake_monitor()
            if ready is None:
                continue
            fd, events = ready
            try:
                if fd == reactor._wake_fd:
                    reactor._run_job()
                else:
                    watch = reactor._watches.get(fd)
                    if watch is not None:
                        watch.on_ready(events)
            except BaseException:  # Rule 3: the last line of defence of a thread that nobody joins.
                report_bug("a reactor callback")
            if self.slow and reactor._retire(self):
                return
        reactor._leave(self)


class _Current(threading.local):
    worker: Worker | None = None


_current = _Current()


def report_bug(where: str) -> None:
    """Print the exception in flight to stderr: what a thread's top does with an exception that is nobody else's."""
    stderr = sys.stderr
    if stderr is not None:
        stderr.write(f"bigmachine: unexpected error in {where}; please report it\n{traceback.format_exc()}")


def enter(stealable: Stealable) -> Worker | None:
    """Announce that this thread is about to run user code while it holds `stealable`. Returns a token for `leave`."""
    worker = _current.worker
    if worker is not None:
        worker.turn += 1
        worker.holding.append(stealable)
        if worker._reactor._asleep:  # It found us slow in something else, and went to sleep over it.
            worker._reactor._wake_monitor()
    return worker


def begin_linger() -> Worker | None:
    """The worker that this thread is, if it may linger: not while it is being replaced for being slow."""
    worker = _current.worker
    return None if worker is None or worker.slow else worker


def leave(worker: Worker | None) -> bool:
    """User code has returned. True where the stealable is still held."""
    if worker is None:
        return True
    worker.turn += 1
    try:
        worker.holding.pop()
    except IndexError:
        return False
    return True


class Reactor:
    """The poller and its threads. One a process (`reactor()`); tests make their own, and close them."""

    def __init__(self, *, max_workers: int = MAX_WORKERS) -> None:
        self._poller = _poller()
        self._max_workers = max_workers
        self._lock = threading.Lock()
        self._watches: dict[int, Watch] = {}
        self._workers: set[Worker] = set()
        self._names = itertools.count(1)
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake_fd, self._wake_write = os.pipe()
        os.set_blocking(self._wake_fd, False)
        os.set_blocking(self._wake_write, False)
        self._poller.add(self._wake_fd)
        self._poller.arm(self._wake_fd, READ)
        self._lingering: list[Lingering] = []
        self._timers: list[tuple[float, int, Timer]] = []
        self._timer_ids = itertools.count()
        self._monitor: threading.Thread | None = None
        self._asleep = False
        self._tick_length = TICK
        self._bell = threading.Lock()
        self._bell.acquire()
        self.closed = False

    # -- What others call --------------------------------------------------------------------------------------------

    def watch(self, fd: int, on_ready: Callable[[int], None]) -> Watch:
        """Register `fd`, silent until it is armed. `on_ready(events)` runs on a worker thread."""
        watch = Watch(self, fd, on_ready)
        with self._lock:
            self._watches[fd] = watch
            self._poller.add(fd)
        self._start()
        return watch

    def execute(self, job: Callable[[], None]) -> None:
        """Run `job` on a worker thread, soon."""
        self._jobs.append(job)
        self._start()
        self._wake()

    def linger(self, lingering: Lingering) -> None:
        """Ask `lingering` once a tick whether it has settled, until it has."""
        with self._lock:
            self._lingering.append(lingering)
        self._start()
        if self._asleep:
            self._wake_monitor()

    def call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        """Run `callback` on a worker thread `delay` seconds from now."""
        timer = Timer(time.monotonic() + delay, callback)
        with self._lock:
            heapq.heappush(self._timers, (timer.when, next(self._timer_ids), timer))
            first = self._timers[0][2] is timer
        self._start()
        if first:
            self._wake_monitor()
        return timer

    def close(self) -> None:
        """Stop all threads that are idle; busy ones end with their callback. Only tests and a fork need it."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            if not self._workers:
                self._release()
        self._wake_monitor()
        self._wake()  # One worker; each that leaves wakes the next.

    def _leave(self, worker: Worker) -> None:
        """The reactor is closed, and `worker` ends: the last one clears up."""
        with self._lock:
            self._workers.discard(worker)
            if not self._workers:
                self._release()

    def _release(self) -> None:
        self._poller.close()
        fds, self._wake_fd, self._wake_write = (self._wake_fd, self._wake_write), -1, -1
        for fd in fds:
            os.close(fd)

    # -- The threads -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._monitor is not None:
            return
        with self._lock:
            if self._monitor is None and not self.closed:
                self._monitor = threading.Thread(target=self._watch_workers, name="bigmachine-monitor", daemon=True)
                self._monitor.start()
                self._add_worker()

    def _add_worker(self) -> None:
        if len(self._workers) < self._max_workers and not self.closed:
            worker = Worker(self, f"bigmachine-{next(self._names)}")
            self._workers.add(worker)
            worker.start()

    def _retire(self, worker: Worker) -> bool:
        """A worker that was slow, and therefore replaced, ends when enough others are idle."""
        with self._lock:
            if sum(1 for other in self._workers if not other.busy) >= 4:
                self._workers.discard(worker)
                return True
        return False

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"x")
        except BlockingIOError:
            pass  # The pipe is full: it will wake somebody anyway.
        except OSError:
            if not self.closed:
                raise

    def _run_job(self) -> None:
        if self.closed:
            self._poller.arm(self._wake_fd, READ)  # The pipe keeps what woke us, for the next one.
            self._wake()
            return
        try:
            os.read(self._wake_fd, 4096)
        except BlockingIOError:
            pass
        try:
            job = self._jobs.popleft()
        except IndexError:
            job = None
        if self._jobs or self.closed:
            self._wake()
        self._poller.arm(self._wake_fd, READ)
        if job is not None:
            job()

    # -- The monitor -------------------------------------------------------------------------------------------------

    def _wake_monitor(self) -> None:
        self._asleep = False
        try:
            self._bell.release()
        except RuntimeError:
            pass  # It is already awake.

    def _watch_workers(self) -> None:
        seen: dict[Worker, int] = {}
        quiet = 0
        while not self.closed:
            try:
                busy = self._tick(seen) | self._settle()
                due = self._run_timers()
            except BaseException:  # Rule 3, as in the workers: nobody joins this thread.
                report_bug("the reactor's monitor")
                busy, due = True, None
            quiet = 0 if busy else quiet + 1
            if quiet < IDLE_TICKS:
                time.sleep(self._tick_length if due is None else min(self._tick_length, due))
                self._tick_length = min(MAX_TICK, self._tick_length * 1.25)
                continue
            self._tick_length = TICK
            self._asleep = True
            if self._lingering or any(worker.busy and not worker.slow for worker in list(self._workers)):
                self._asleep = False  # It became busy after the tick, and may have found the monitor awake.
                continue
            if due is None:
                self._bell.acquire()
            else:
                self._bell.acquire(timeout=min(due, threading.TIMEOUT_MAX))
            self._asleep = False

    def _tick(self, seen: dict[Worker, int]) -> bool:
        """Look at every worker once; True while one is busy that has not been found slow yet."""
        busy = False
        idle = 0
        with self._lock:
            workers = list(self._workers)
        for worker in workers:
            if not worker.busy:
                idle += 1
                continue
            if worker.lingering:
                continue
            turn = worker.turn
            if seen.get(worker) != turn:
                seen[worker] = turn
                worker.slow = False
                busy = True
                continue
            if not worker.slow:
                worker.slow = True
                try:
                    stealable = worker.holding.pop()
                except IndexError:
                    continue
                stealable.steal()
                self._tick_length = TICK
        if not idle:
            with self._lock:  # Whoever is busy may serve one lively connection for long: others need somebody, too.
                self._add_worker()
        if len(seen) > len(workers):
            for gone in seen.keys() - set(workers):
                del seen[gone]
        return busy

    def _settle(self) -> bool:
        """True while something lingers."""
        if not self._lingering:
            return False
        settled = [lingering for lingering in self._lingering if lingering.settle()]
        with self._lock:
            for lingering in settled:
                self._lingering.remove(lingering)
        return bool(self._lingering)

    def _run_timers(self) -> float | None:
        """Hand due timers to the workers; seconds until the next, None where there is none."""
        now = time.monotonic()
        with self._lock:
            while self._timers:
                when, _, timer = self._timers[0]
                if timer.callback is None:
                    heapq.heappop(self._timers)
                elif when <= now:
                    heapq.heappop(self._timers)
                    self._jobs.append(timer.callback)
                    self._wake()
                else:
                    return when - now
        return None


_shared: Reactor | None = None
_shared_lock = threading.Lock()


def reactor() -> Reactor:
    """This process's reactor, made when first asked for. A forked child gets one of its own."""
    global _shared
    if _shared is None:
        with _shared_lock:
            if _shared is None:
                _shared = Reactor()
    return _shared


def _forget_after_fork() -> None:
    global _shared, _shared_lock
    _shared = None
    _shared_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
