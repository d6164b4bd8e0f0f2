"""A machine as its users hold it: lanes, and what does not need a real one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bigmachine import State
from bigmachine.errors import MachineStopped, UsageError, WaitTimeout
from bigmachine.machine import SHORT_TASK, SHORT_WINDOW, Lanes, Machine, Network, merge_stats
from bigmachine.rpc.codec import Codec
from bigmachine.rpc.reactor import Reactor
from bigmachine.rpc.stats import MethodStats


@pytest.fixture
def machine() -> Iterator[Machine]:
    """One that is never launched. Connecting would fail the test."""

    def no_context() -> Any:
        raise AssertionError("it has tried to connect")

    reactor = Reactor()
    yield Machine("m-1", Network(no_context, Codec(), reactor), owned=True)
    reactor.close()


# -- Lanes ---------------------------------------------------------------------------------------------------------------


def test_long_calls_go_to_free_lanes_and_then_queue() -> None:
    lanes, started = Lanes(3), []
    for i in range(5):
        lanes.enter(lambda lane, i=i: started.append((i, lane)))
    assert started == [(0, 0), (1, 1), (2, 2)]
    lanes.leave(1, 1.0)
    lanes.leave(0, 1.0)
    assert started[3:] == [(3, 1), (4, 0)]
    for lane in (0, 1, 2):
        lanes.leave(lane, 1.0)
    lanes.enter(lambda lane: started.append((5, lane)))
    assert started[5] == (5, 0)


def test_short_calls_wait_at_their_lanes() -> None:
    lanes, started = Lanes(2), []
    for _ in range(10):
        lanes.enter(started.append)
        lanes.leave(started[-1], SHORT_TASK / 100)
    started.clear()
    for _ in range(2 * SHORT_WINDOW + 3):
        lanes.enter(started.append)
    assert len(started) == 2 * SHORT_WINDOW
    assert started.count(0) == started.count(1)
    lanes.leave(0, 0.0001)
    assert started[-1] == 0


def test_a_lane_that_is_left_while_it_is_entered() -> None:
    """A call that was cancelled leaves at once, and lets the next one in from there."""
    lanes, order = Lanes(1), []

    def run(i: int, lane: int) -> None:
        order.append(i)
        lanes.leave(lane, 1.0)

    for i in range(100):
        lanes.enter(lambda lane, i=i: run(i, lane))
    assert order == list(range(100))


# -- Waiting -------------------------------------------------------------------------------------------------------------


def test_waiting_for_a_state(machine: Machine) -> None:
    with pytest.raises(WaitTimeout, match=r"machine m-1 is UNSTARTED, not RUNNING, after 0\.01 s") as caught:
        machine.wait(State.RUNNING, 0.01)
    assert isinstance(caught.value, TimeoutError)
    machine.starting()
    machine.wait(State.STARTING)
    threading.Timer(0.02, machine.running).start()
    machine.wait(timeout=5.0)
    machine.stopped(None)
    machine.wait(State.STOPPED, 0)
    with pytest.raises(MachineStopped, match="it was shut down"):
        machine.wait()


def test_waiting_raises_the_machines_own_error(machine: Machine) -> None:
    machine.starting()
    threading.Timer(0.02, lambda: machine.stopped(LookupError("no model"))).start()
    with pytest.raises(LookupError, match="no model"):
        machine.wait(State.RUNNING, 5.0)
    assert isinstance(machine.error, LookupError)
    assert not machine.stopped(None)
    assert isinstance(machine.error, LookupError)


def test_calls_that_are_made_before_the_machine_runs(machine: Machine) -> None:
    machine.starting()
    waiting, hasty, cancelled = machine.submit("S.f"), machine.submit("S.f", timeout=0.01), machine.submit("S.f")
    with pytest.raises(WaitTimeout):
        machine.call("S.f", timeout=0.01)
    with pytest.raises(WaitTimeout):
        machine.stream("S.f", timeout=0.01)
    with pytest.raises(WaitTimeout):
        hasty.result(5.0)
    assert cancelled.cancel()
    assert not waiting.done()
    machine.stopped(LookupError("no model"))
    with pytest.raises(MachineStopped, match="no model") as caught:
        waiting.result(5.0)
    assert isinstance(caught.value.__cause__, LookupError)
    assert cancelled.cancelled()
    started = time.monotonic()
    for ask in (machine.call, machine.stream, machine.retry_call, lambda method: machine.submit(method).result(5.0)):
        with pytest.raises(MachineStopped, match="no model"):
            ask("S.f")
    assert time.monotonic() - started < 1.0


def test_states_are_told(machine: Machine) -> None:
    seen: list[State] = []
    machine.on_state(lambda machine: seen.append(machine.state))
    machine.starting()
    machine.running()
    machine.stopped(None)
    machine.stopped(None)
    assert seen == [State.STARTING, State.RUNNING, State.STOPPED]


# -- The rest ------------------------------------------------------------------------------------------------------------


def test_a_machine_is_not_sent(machine: Machine) -> None:
    with pytest.raises(TypeError, match="pass its `addr`"):
        machine.__reduce__()


@pytest.mark.parametrize(
    "address", ["", "localhost:1", "http://localhost:1/m-1/", "https://localhost/m-1/", "https://h:1/"]
)
def test_what_is_no_address(machine: Machine, address: str) -> None:
    with pytest.raises(UsageError, match="not a machine's address"):
        Machine.dialled(address, machine._network)


def test_only_the_owner_ends_a_machine() -> None:
    reactor = Reactor()
    network = Network(lambda: None, Codec(), reactor)  # type: ignore[arg-type,return-value]
    machine = Machine.dialled("https://[::1]:5/m-1/", network)
    assert (machine.hostname, machine.id, machine.owned) == ("::1", "m-1", False)
    for end in (machine.shutdown, machine.cancel):
        with pytest.raises(UsageError, match="only its owner can end it"):
            end()
    reactor.close()


def test_a_stand_in_knows_the_methods_of_its_class(machine: Machine) -> None:
    class Counter:
        def add(self, k: int) -> int:
            return k

        def setup(self, b: object) -> None: ...

    counter = machine.service("Counter", Counter)
    assert dir(counter) == ["add"]
    assert repr(counter.add) == "<Counter.add on m-1>"
    with pytest.raises(AttributeError, match="no public method 'sub'; it has add"):
        _ = counter.sub  # type: ignore[attr-defined]


def test_figures_add_up() -> None:
    total = {"A.f": MethodStats()}
    first, second = MethodStats(), MethodStats()
    figures = vars(first).keys() - {"latencies"}  # These have tests of their own.
    for stats, n in ((first, 3), (second, 5)):
        for figure in figures:
            setattr(stats, figure, n)
    merge_stats(total, {"A.f": first, "A.g": first})
    merge_stats(total, {"A.f": second})
    assert {name: vars(total["A.f"])[name] for name in figures} == {
        figure: 5 if figure.startswith("max_") else 8 for figure in figures
    }
    assert vars(total["A.g"]) == vars(first)
