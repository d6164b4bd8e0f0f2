"""The system `test`: it conforms, it is fast, and machines die in it at will."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import pytest

import bigmachine
from bigmachine import State
from bigmachine.errors import BootError, MachineStopped, UsageError
from bigmachine.system import Launcher
from bigmachine.testing import TestSystem
from bigmachine.testing.conformance import SOON, Cluster, Conformance
from bigmachine.testing.services import Probe


class TestConformance(Conformance):
    isolated = False

    def launcher(self) -> Launcher:
        return TestSystem(maxprocs=2)


@pytest.fixture
def system() -> TestSystem:
    return TestSystem()


@pytest.fixture
def b(system: TestSystem) -> Iterator[bigmachine.Session]:
    with bigmachine.start(system) as b:
        yield b


def running(b: bigmachine.Session, n: int = 1) -> list[bigmachine.Machine]:
    machines = b.start(n, {"Probe": Probe()})
    for machine in machines:
        machine.wait(State.RUNNING, SOON)
    return machines


def test_a_machine_starts_in_milliseconds(b: bigmachine.Session) -> None:
    """12 ms on an idle computer. What it costs is judged by this process's own processor time, to which others that work
    there do not add; whether it waits for something, by the quickest of several, as what disturbs only ever adds."""
    running(b)
    seconds, spent = [], []
    for _ in range(7):
        started, before = time.perf_counter(), time.process_time()
        running(b)
        seconds.append(time.perf_counter() - started)
        spent.append(time.process_time() - before)
    assert min(spent) < 0.04
    assert min(seconds) < 0.1


@pytest.mark.parametrize("how", ["kill", "crash"])
def test_a_machine_dies_at_will(system: TestSystem, b: bigmachine.Session, how: str) -> None:
    victim, other = running(b, 2)
    assert other.call("Probe.relay", victim.addr, "Probe.echo", 1) == 1
    pending = [victim.submit("Probe.block") for _ in range(3)]
    started = time.monotonic()
    if how == "kill":
        system.kill(victim)
        cause = "it was killed"
    else:
        system.crash(victim, "service process 0 (pid 7) was killed by the kernel")
        cause = "was killed by the kernel"
    for call in pending:
        with pytest.raises(MachineStopped, match=cause):
            call.result(1.0)
    with pytest.raises(MachineStopped, match=cause):
        victim.call("Probe.echo")
    victim.wait(State.STOPPED, 1.0)
    assert time.monotonic() - started < 1.0
    assert cause in str(victim.error)
    with pytest.raises(bigmachine.errors.Unreachable):
        other.call("Probe.relay", victim.addr, "Probe.echo", 1, timeout=SOON)
    assert other.call("Probe.echo", 2) == 2


def test_killing_is_idempotent_and_only_for_its_own(system: TestSystem, b: bigmachine.Session) -> None:
    (machine,) = running(b)
    system.kill(machine)
    system.kill(machine)
    machine.shutdown()
    with Cluster(TestSystem()).session as stranger, pytest.raises(UsageError, match="not of this test system"):
        system.kill(running(stranger)[0])


def test_killing_a_machine_while_it_starts(system: TestSystem, b: bigmachine.Session) -> None:
    reached, released = threading.Event(), threading.Event()
    _events.update(reached=reached, released=released)
    (machine,) = b.start(1, {"Slow": SlowSetup()})
    assert reached.wait(SOON)
    system.kill(machine)
    with pytest.raises(BootError, match=r"boot step 'setup' .* it was killed"):
        machine.wait(State.RUNNING, SOON)
    released.set()


_events: dict[str, threading.Event] = {}


class SlowSetup:
    """Found by name, as it shares events with its test."""

    def setup(self, b: bigmachine.Session) -> None:
        _events["reached"].set()
        _events["released"].wait(SOON)


def test_by_name() -> None:
    with bigmachine.start("test", maxprocs=3) as b:
        (machine,) = running(b)
        assert machine.maxprocs == 3
    with pytest.raises(UsageError, match="at least 1"):
        TestSystem(maxprocs=0)


def test_idle_machines_need_few_threads(b: bigmachine.Session) -> None:
    """One that waits for its end, and one that reads what it says: no more."""
    machines = running(b, 10)
    for machine in machines:
        named = [thread for thread in threading.enumerate() if machine.id in thread.name]
        assert len(named) <= 2


_told: queue.SimpleQueue[float | None] = queue.SimpleQueue()


class Draining(Probe):
    """Found by name, as it shares a queue with its test."""

    def drain(self, deadline: float | None) -> None:
        _told.put(deadline)

    @bigmachine.parallel
    def compute(self) -> int:
        return 1


def test_a_machine_is_taken_away_at_will() -> None:
    system = TestSystem(maxprocs=2)
    with bigmachine.start(system) as b:
        (machine,) = b.start(1, {"Draining": Draining()})
        machine.wait(State.RUNNING, SOON)
        came: queue.SimpleQueue[bigmachine.Machine] = queue.SimpleQueue()
        machine.on_notice(came.put)
        system.notice(machine, "rebalance")
        assert came.get(timeout=SOON) is machine
        assert machine.notice is not None
        assert (machine.notice.kind, machine.notice.deadline) == ("rebalance", None)
        before = time.time()
        system.notice(machine, seconds=120.0)
        came.get(timeout=SOON)
        deadline = machine.notice.deadline
        assert deadline is not None
        assert before + 120 <= deadline <= time.time() + 120
        assert machine.notice.text == "the machine will be taken away in 120 s"
        # In every process that holds the service.
        assert [_told.get(timeout=SOON), _told.get(timeout=SOON)] == [deadline] * 2
        assert machine.call("Draining.compute") == 1
        assert _told.empty()
        with pytest.raises(UsageError, match="no such kind of notice: 'eviction'; there are interruption, rebalance"):
            system.notice(machine, "eviction")
