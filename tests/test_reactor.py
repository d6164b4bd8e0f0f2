"""The reactor: its threads, watches, jobs and timers, and what is stolen from whom."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from descriptors import descriptors

from bigmachine.rpc import reactor as module
from bigmachine.rpc.reactor import READ, WRITE, Reactor, enter, leave

SOON = 10.0


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    reactor = Reactor()
    yield reactor
    reactor.close()
    ended(reactor)


def ended(reactor: Reactor) -> None:
    """Wait until the threads of a closed reactor are gone."""
    deadline = time.monotonic() + SOON
    with reactor._lock:  # The last worker holds it from when it is not in the list any more until all is closed.
        workers = list(reactor._workers)
    for thread in [*workers, *([reactor._monitor] if reactor._monitor else [])]:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), thread.name


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    yield left, right
    left.close()
    right.close()


class Log:
    """What happened, and waiting for it to have happened."""

    def __init__(self) -> None:
        self.entries: list[object] = []
        self._changed = threading.Condition()

    def add(self, entry: object) -> None:
        with self._changed:
            self.entries.append(entry)
            self._changed.notify_all()

    def wait(self, n: int) -> list[object]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.entries) >= n, SOON), self.entries
            return list(self.entries)


def barrier(reactor: Reactor) -> None:
    """Returns when a job that was handed in now has run."""
    done = threading.Event()
    reactor.execute(done.set)
    assert done.wait(SOON)


# -- Watches ---------------------------------------------------------------------------------------------------------


def test_watch_is_silent_until_armed_and_then_calls_once(reactor: Reactor, pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    log = Log()
    watch = reactor.watch(left.fileno(), log.add)
    right.send(b"x")
    barrier(reactor)
    assert log.entries == []
    watch.arm(READ)
    assert log.wait(1) == [READ]
    barrier(reactor)  # It is readable still, and not armed.
    assert log.entries == [READ]
    watch.arm(READ)
    assert log.wait(2) == [READ, READ]
    watch.close()


def test_watch_for_both(reactor: Reactor, pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    log = Log()
    watch = reactor.watch(left.fileno(), log.add)
    right.send(b"x")
    watch.arm(READ | WRITE)
    (events,) = log.wait(1)
    assert isinstance(events, int)
    assert events & WRITE or events & READ  # kqueue tells one at a time.
    watch.arm(WRITE)
    assert log.wait(2)[1] == WRITE
    watch.close()


def test_disarm(reactor: Reactor, pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    log = Log()
    watch = reactor.watch(left.fileno(), log.add)
    watch.arm(READ)
    watch.disarm()
    right.send(b"x")
    barrier(reactor)
    assert log.entries == []
    watch.arm(READ)
    log.wait(1)
    watch.close()


def test_hang_up_is_something_to_read(reactor: Reactor, pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    log = Log()
    watch = reactor.watch(left.fileno(), log.add)
    watch.arm(READ)
    right.close()
    (events,) = log.wait(1)
    assert isinstance(events, int)
    assert events & READ
    watch.close()


def test_watch_after_close(reactor: Reactor, pair: tuple[socket.socket, socket.socket]) -> None:
    left, right = pair
    log = Log()
    watch = reactor.watch(left.fileno(), log.add)
    watch.close()
    watch.close()
    watch.arm(READ)
    watch.disarm()
    right.send(b"x")
    barrier(reactor)
    assert log.entries == []
    again = reactor.watch(left.fileno(), log.add)  # The same descriptor: it has been forgotten.
    again.arm(READ)
    log.wait(1)
    watch.close()  # Not the other one's.
    again.arm(READ)
    log.wait(2)
    again.close()


def test_callbacks_of_different_watches_run_at_the_same_time(reactor: Reactor) -> None:
    pairs = [socket.socketpair() for _ in range(6)]
    meeting = threading.Barrier(6)
    log = Log()

    def on_ready(_: int) -> None:
        meeting.wait(SOON)
        log.add("met")

    watches = [reactor.watch(left.fileno(), on_ready) for left, _ in pairs]
    for watch, (_, right) in zip(watches, pairs, strict=True):
        watch.arm(READ)
        right.send(b"x")
    log.wait(6)  # Each of them is slow, and is replaced.
    for watch, (left, right) in zip(watches, pairs, strict=True):
        watch.close()
        left.close()
        right.close()


# -- Jobs and timers -------------------------------------------------------------------------------------------------


def test_jobs_all_run(reactor: Reactor) -> None:
    log = Log()
    for i in range(5000):
        reactor.execute(lambda i=i: log.add(i))
    assert sorted(log.wait(5000)) == list(range(5000))  # type: ignore[type-var]


def test_jobs_of_jobs(reactor: Reactor) -> None:
    log = Log()
    reactor.execute(lambda: reactor.execute(lambda: reactor.execute(lambda: log.add("inner"))))
    log.wait(1)


def test_job_that_waits_for_a_later_job(reactor: Reactor) -> None:
    event = threading.Event()
    log = Log()
    reactor.execute(lambda: log.add(event.wait(SOON)))
    reactor.execute(event.set)
    assert log.wait(1) == [True]


def test_timers_do_not_run_early(reactor: Reactor) -> None:
    log = Log()
    start = time.monotonic()
    for delay in (0.03, 0.0, 0.015):
        reactor.call_later(delay, lambda delay=delay: log.add((delay, time.monotonic() - start >= delay)))
    assert set(log.wait(3)) == {(0.0, True), (0.015, True), (0.03, True)}  # In any order, where they are late.


def test_timer_that_comes_before_the_one_that_is_waited_for(reactor: Reactor) -> None:
    late = reactor.call_later(3600, lambda: None)
    barrier(reactor)
    log = Log()
    reactor.call_later(0.001, lambda: log.add("early"))
    log.wait(1)
    late.cancel()


def test_cancelled_timer_does_not_run(reactor: Reactor) -> None:
    log = Log()
    timer = reactor.call_later(0.005, lambda: log.add("cancelled"))
    timer.cancel()
    timer.cancel()
    reactor.call_later(0.01, lambda: log.add("later"))
    assert log.wait(1) == ["later"]
    timer.cancel()


def test_timer_wakes_a_monitor_that_sleeps(reactor: Reactor, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier(reactor)
    deadline = time.monotonic() + SOON
    while not reactor._asleep:  # Its own ticks end that; nothing else does here.
        assert time.monotonic() < deadline
        time.sleep(0.001)
    log = Log()
    reactor.call_later(0.0, lambda: log.add("awake"))
    log.wait(1)


def test_callback_that_raises_is_reported_and_costs_no_thread(
    reactor: Reactor, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ValueError("of a job")

    reactor.execute(fail)
    barrier(reactor)
    barrier(reactor)
    deadline = time.monotonic() + SOON
    text = ""
    while "ValueError: of a job" not in text:
        assert time.monotonic() < deadline
        text += capsys.readouterr().err
    assert "please report it" in text


# -- Slow callbacks --------------------------------------------------------------------------------------------------


class Role:
    """Something to steal."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def steal(self) -> None:
        self._log.add("stolen")


def test_slow_callback_is_replaced_within_ticks(reactor: Reactor) -> None:
    go_on = threading.Event()
    reactor.execute(lambda: go_on.wait(SOON))
    started = time.monotonic()
    barrier(reactor)
    assert time.monotonic() - started < 5.0  # Ticks; generous, as machines stutter.
    go_on.set()


def test_slow_holder_is_stolen_from_exactly_once(reactor: Reactor) -> None:
    log = Log()
    outcome = Log()
    go_on = threading.Event()

    def job() -> None:
        token = enter(Role(log))
        go_on.wait(SOON)
        outcome.add(leave(token))

    reactor.execute(job)
    log.wait(1)
    for _ in range(3):
        barrier(reactor)
        time.sleep(3 * module.TICK)  # Not for something to happen, but for nothing to.
    go_on.set()
    assert outcome.wait(1) == [False]
    assert log.entries == ["stolen"]


def test_quick_holder_is_not_stolen_from(reactor: Reactor) -> None:
    log = Log()
    outcome = Log()

    def job() -> None:
        for _ in range(1000):
            outcome.add(leave(enter(Role(log))))

    reactor.execute(job)
    found = outcome.wait(1000)
    assert found.count(False) == len(log.entries)  # Each told once; on a machine that stutters there may be some.


def test_every_one_of_many_slow_holders_is_stolen_from(reactor: Reactor) -> None:
    log = Log()
    outcome = Log()
    go_on = threading.Event()

    def job() -> None:
        token = enter(Role(log))
        go_on.wait(SOON)
        outcome.add(leave(token))

    for _ in range(20):
        reactor.execute(job)
    log.wait(20)
    go_on.set()
    assert outcome.wait(20) == [False] * 20
    assert log.entries == ["stolen"] * 20


def test_holder_after_something_slow_is_still_watched(reactor: Reactor) -> None:
    """A worker is slow without holding anything, long enough for the monitor to go to sleep; then it holds something."""
    log = Log()
    outcome = Log()
    go_on = threading.Event()

    def job() -> None:
        deadline = time.monotonic() + SOON
        while not reactor._asleep and time.monotonic() < deadline:
            time.sleep(module.TICK)
        token = enter(Role(log))
        go_on.wait(SOON)
        outcome.add(leave(token))

    reactor.execute(job)
    assert log.wait(1) == ["stolen"]
    go_on.set()
    assert outcome.wait(1) == [False]


def test_outside_of_a_worker_nothing_is_stolen() -> None:
    log = Log()
    token = enter(Role(log))
    assert token is None
    assert leave(token)


def test_threads_are_bounded() -> None:
    reactor = Reactor(max_workers=3)
    go_on = threading.Event()
    running = Log()

    def job() -> None:
        running.add("running")
        go_on.wait(SOON)

    for _ in range(10):
        reactor.execute(job)
    running.wait(3)
    time.sleep(5 * module.TICK)  # For nothing to happen.
    assert len(running.entries) == 3
    assert len(reactor._workers) == 3
    go_on.set()
    running.wait(10)
    reactor.close()
    ended(reactor)


def test_threads_that_replaced_slow_ones_end(reactor: Reactor) -> None:
    go_on = threading.Event()
    log = Log()

    def job() -> None:
        log.add("running")
        go_on.wait(SOON)

    for _ in range(30):
        reactor.execute(job)
    log.wait(30)
    go_on.set()
    deadline = time.monotonic() + SOON
    while len(reactor._workers) > 10:
        assert time.monotonic() < deadline
        time.sleep(0.001)


# -- The end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [lambda reactor: None, barrier, lambda reactor: reactor.call_later(3600, lambda: None)])
def test_close_leaves_nothing_behind(use: Callable[[Reactor], object], capfd: pytest.CaptureFixture[str]) -> None:
    before = descriptors()
    reactor = Reactor()
    use(reactor)
    reactor.close()
    reactor.close()
    ended(reactor)
    assert not descriptors() - before
    assert capfd.readouterr().err == ""


def test_close_ends_many_idle_threads_and_busy_ones_after_their_callback(capfd: pytest.CaptureFixture[str]) -> None:
    before = descriptors()
    for _ in range(20):
        reactor = Reactor()
        meeting = threading.Barrier(4)
        log = Log()
        go_on = threading.Event()

        def meet(meeting: threading.Barrier = meeting, log: Log = log) -> None:
            meeting.wait(SOON)
            log.add("met")

        for _ in range(4):
            reactor.execute(meet)
        log.wait(4)
        reactor.execute(lambda log=log, go_on=go_on: (log.add("busy"), go_on.wait(SOON)))
        log.wait(5)
        reactor.close()
        go_on.set()
        ended(reactor)
    assert not descriptors() - before
    assert capfd.readouterr().err == ""


def test_use_after_close_is_quiet(pair: tuple[socket.socket, socket.socket], capfd: pytest.CaptureFixture[str]) -> None:
    reactor = Reactor()
    watch = reactor.watch(pair[0].fileno(), lambda events: None)
    watch.arm()
    reactor.close()
    ended(reactor)
    watch.arm()
    watch.disarm()
    reactor.execute(lambda: None)
    reactor.call_later(0.0, lambda: None)
    watch.close()
    assert capfd.readouterr().err == ""


def test_shared_reactor_is_one() -> None:
    assert module.reactor() is module.reactor()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_forked_child_gets_its_own() -> None:
    parent = module.reactor()
    barrier(parent)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer = b"failed"
        try:
            child = module.reactor()
            assert child is not parent
            done = threading.Event()
            child.execute(done.set)
            if done.wait(SOON):
                answer = b"fine"
        finally:
            os.write(write, answer)
            os._exit(0)
    os.close(write)
    assert os.read(read, 100) == b"fine"
    os.close(read)
    os.waitpid(pid, 0)
    barrier(parent)
