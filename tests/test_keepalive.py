"""keepalive.py: the schedule, and the loop with a clock that only the test moves. Nothing here sleeps."""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from bigmachine.keepalive import LEASE, Keepalive, Schedule
from bigmachine.rpc.reactor import reactor


def test_it_asks_at_once_and_then_every_quarter_of_the_lease() -> None:
    schedule = Schedule(now=1000.0)
    assert schedule.next_due(1000.0) == 1000.0
    schedule.succeeded(1000.5, 0.5)
    assert schedule.next_keepalive == schedule.next_due(1001.0) == 1000.5 + LEASE / 4


def test_what_is_due_is_never_in_the_past() -> None:
    assert Schedule(now=0.0).next_due(50.0) == 50.0


def test_a_failure_is_followed_by_another_attempt_sooner() -> None:
    schedule = Schedule(now=0.0, lease=120.0)
    schedule.failed(10.0, "refused")
    assert schedule.next_due(10.0) == 17.5
    schedule.succeeded(18.0, 0.1)
    assert schedule.next_due(18.0) == 48.0


@pytest.mark.parametrize(("lease", "retry"), [(120.0, 7.5), (8.0, 1.0), (2.0, 0.5)])
def test_a_retry_is_never_later_than_the_next_attempt_would_be(lease: float, retry: float) -> None:
    schedule = Schedule(now=0.0, lease=lease)
    schedule.failed(0.0, "refused")
    assert schedule.next_due(0.0) == retry


def test_the_verdict_comes_when_the_lease_has_lapsed_and_names_the_last_reason() -> None:
    schedule = Schedule(now=0.0, lease=120.0)
    schedule.succeeded(1.0, 0.1)
    schedule.failed(40.0, "no route to host")
    schedule.failed(118.0, "connection refused")
    assert schedule.verdict(120.9) is None
    assert schedule.next_due(119.0) == 121.0, "the lapse is due before the next retry"
    assert schedule.verdict(121.0) == "no keepalive reply for 120 s: connection refused"


def test_a_driver_that_was_stopped_itself_asks_once_more_before_it_gives_up() -> None:
    schedule = Schedule(now=0.0, lease=120.0)
    schedule.succeeded(1.0, 0.1)
    assert schedule.verdict(900.0) is None
    assert schedule.next_due(900.0) == 900.0
    schedule.failed(901.0, "connection refused")
    assert schedule.next_due(901.0) == 901.0
    assert schedule.verdict(901.0) == "no keepalive reply for 900 s: connection refused"


def test_an_attempt_may_take_an_interval_but_hardly_outlasts_the_lease() -> None:
    schedule = Schedule(now=0.0, lease=120.0)
    assert schedule.attempt_timeout(0.0) == 30.0
    assert schedule.attempt_timeout(100.0) == 20.0
    assert schedule.attempt_timeout(119.0) == 7.5
    assert schedule.attempt_timeout(500.0) == 7.5


def test_it_remembers_the_last_ten_reply_times() -> None:
    schedule = Schedule(now=0.0)
    for i in range(12):
        schedule.succeeded(float(i), i / 1000)
    assert list(schedule.reply_times) == [i / 1000 for i in range(2, 12)]


def test_a_lease_of_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="lease must be positive: 0"):
        Schedule(now=0.0, lease=0)


# -- The loop ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class FakeTimer:
    callback: Callable[[], None] | None

    def cancel(self) -> None:
        self.callback = None


class FakeTimers:
    """Timers and their clock: `advance` runs what falls due, in order. A callback may set further timers."""

    def __init__(self) -> None:
        self.now = 5000.0
        self._heap: list[tuple[float, int, FakeTimer]] = []
        self._ids = itertools.count()

    def call_later(self, delay: float, callback: Callable[[], None]) -> FakeTimer:
        assert delay >= 0
        timer = FakeTimer(callback)
        heapq.heappush(self._heap, (self.now + delay, next(self._ids), timer))
        return timer

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self._heap and self._heap[0][0] <= end:
            when, _, timer = heapq.heappop(self._heap)
            self.now = max(self.now, when)
            if timer.callback is not None:
                timer.callback()
        self.now = end

    def sleep(self, seconds: float) -> None:
        """Let time pass without running anything, as when the process is stopped."""
        self.now += seconds

    @property
    def armed(self) -> int:
        return sum(1 for _, _, timer in self._heap if timer.callback is not None)


@dataclass
class Rig:
    """A loop, and a machine that answers, fails or is silent as `answer` says."""

    answer: float | BaseException | None = 0.01
    timers: FakeTimers = field(default_factory=FakeTimers)
    sent: list[float] = field(default_factory=list)  # When.
    leases: set[float] = field(default_factory=set)
    replies: list[Callable[[float | BaseException], None]] = field(default_factory=list)
    lost: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.epoch = self.timers.now
        self.loop = Keepalive(self.timers, self.send, self.on_lost, lease=120.0, clock=lambda: self.timers.now)
        self.loop.start()

    def send(self, lease: float, on_reply: Callable[[float | BaseException], None]) -> None:
        self.sent.append(self.timers.now - self.epoch)
        self.leases.add(lease)
        self.replies.append(on_reply)
        if self.answer is not None:
            on_reply(self.answer)

    def on_lost(self, reason: str) -> None:
        self.lost.append((self.timers.now - self.epoch, reason))


def test_the_loop_asks_at_once_and_then_every_interval() -> None:
    rig = Rig()
    rig.timers.advance(100.0)
    assert rig.sent == [0.0, 30.0, 60.0, 90.0]
    assert rig.leases == {120.0}
    assert rig.loop.reply_times == [0.01] * 4
    assert rig.loop.next_keepalive == rig.epoch + 120.0
    assert rig.lost == []


def test_a_machine_that_refuses_is_given_up_after_the_lease_and_not_asked_again() -> None:
    rig = Rig()
    rig.timers.advance(10.0)
    rig.answer = ConnectionRefusedError("connection refused")
    rig.timers.advance(1000.0)
    assert rig.sent[:4] == [0.0, 30.0, 37.5, 45.0]
    assert rig.lost == [(120.0, "no keepalive reply for 120 s: connection refused")]
    assert rig.sent[-1] < 120.0
    assert rig.timers.armed == 0


def test_a_silent_machine_is_given_up_after_the_lease() -> None:
    rig = Rig()
    rig.timers.advance(10.0)
    rig.answer = None
    rig.timers.advance(1000.0)
    assert rig.sent == [0.0, 30.0, 67.5, 105.0], "each attempt ends after 30 s, and the next follows 7.5 s later"
    assert rig.lost == [(120.0, "no keepalive reply for 120 s: no reply within 15 s")]


def test_one_attempt_is_in_flight_at_most() -> None:
    rig = Rig(answer=None)
    rig.timers.advance(29.0)
    assert rig.sent == [0.0]


def test_a_machine_that_answers_again_is_kept() -> None:
    rig = Rig(answer=ConnectionRefusedError("connection refused"))
    rig.timers.advance(100.0)
    rig.answer = 0.2
    rig.timers.advance(1000.0)
    assert rig.lost == []
    assert rig.sent[-1] - rig.sent[-2] == 30.0


def test_a_reply_after_the_deadline_is_welcome() -> None:
    rig = Rig(answer=None)
    rig.timers.advance(31.0)
    rig.replies[0](30.9)
    assert rig.loop.reply_times == [30.9]
    rig.timers.advance(29.0)
    assert rig.sent == [0.0], "no retry after all"
    rig.timers.advance(1.0)
    assert rig.sent == [0.0, 61.0]


def test_a_late_reply_while_the_next_attempt_is_in_flight_leaves_that_alone() -> None:
    rig = Rig(answer=None)
    rig.timers.advance(40.0)
    assert rig.sent == [0.0, 37.5]
    rig.replies[0](40.0)
    rig.replies[1](2.5)
    rig.timers.advance(31.0)
    assert rig.loop.reply_times == [40.0, 2.5]
    assert rig.sent == [0.0, 37.5, 70.0]


def test_a_late_failure_counts_once() -> None:
    rig = Rig(answer=None)
    rig.timers.advance(30.0)
    due = rig.loop.next_keepalive
    rig.timers.advance(5.0)
    rig.replies[0](OSError("reset"))
    assert rig.loop.next_keepalive == due


def test_an_exception_out_of_send_is_a_failed_attempt() -> None:
    rig = Rig()
    rig.loop.stop()

    def send(lease: float, on_reply: Callable[[float | BaseException], None]) -> None:
        rig.sent.append(rig.timers.now - rig.epoch)
        raise OSError("too many open files")

    rig.timers = FakeTimers()
    rig.sent.clear()
    loop = Keepalive(rig.timers, send, rig.on_lost, lease=120.0, clock=lambda: rig.timers.now)
    loop.start()
    rig.timers.advance(200.0)
    assert len(rig.sent) == 16
    assert rig.lost == [(120.0, "no keepalive reply for 120 s: too many open files")]


def test_a_driver_that_slept_asks_again_before_it_gives_up() -> None:
    rig = Rig()
    rig.timers.advance(10.0)
    rig.timers.sleep(3600.0)
    rig.timers.advance(31.0)
    assert rig.lost == []
    assert rig.sent == [0.0, 3610.0, 3640.0]


def test_nothing_happens_after_stop() -> None:
    rig = Rig(answer=None)
    rig.timers.advance(1.0)
    rig.loop.stop()
    rig.loop.stop()
    assert rig.timers.armed == 0
    rig.replies[0](0.1)
    rig.timers.advance(1000.0)
    assert rig.sent == [0.0]
    assert rig.lost == []
    assert rig.loop.reply_times == []


def test_a_timer_that_was_already_running_when_it_was_stopped_does_nothing() -> None:
    rig = Rig()
    queued = [timer.callback for _, _, timer in rig.timers._heap if timer.callback is not None]
    rig.loop.stop()
    for callback in queued:
        callback()
    assert rig.sent == []


def test_start_is_idempotent() -> None:
    rig = Rig()
    rig.loop.start()
    rig.timers.advance(1.0)
    assert rig.sent == [0.0]


def test_the_reactor_fits_the_seam() -> None:
    replied = threading.Event()

    def send(lease: float, on_reply: Callable[[float | BaseException], None]) -> None:
        on_reply(0.001)
        replied.set()

    loop = Keepalive(reactor(), send, lambda reason: None)
    loop.start()
    assert replied.wait(10)
    loop.stop()
