"""A session and its machines, with launchers that do what real ones seldom do."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from bigmachine import State, boot
from bigmachine.errors import BootError, MachineStopped, NotPicklable, Unreachable, UsageError
from bigmachine.fleet import Owned, _with
from bigmachine.info import Notice, Step
from bigmachine.logs.lines import MAX_LINE
from bigmachine.rpc.calls import Call
from bigmachine.session import Session
from bigmachine.system import Launched, Launcher, Order, Program
from bigmachine.testing import TestSystem
from bigmachine.testing.conformance import SOON, Cluster, eventually
from bigmachine.testing.services import Probe


class Odd:
    """A launcher that hands orders to `launched` and remembers what it was asked."""

    name = "odd"

    def __init__(self, launched: Callable[[Sequence[Order]], list[Future[Launched]]]) -> None:
        self.launch = launched
        self.stopped: list[str] = []
        self.closed = 0

    def stop(self, id: str, grace: float) -> None:
        self.stopped.append(id)

    def ended(self, id: str) -> str | None:
        return None

    def on_end(self, id: str, callback: Callable[[str], None]) -> None: ...

    def console(self, id: str) -> str:
        return "the console says this"

    def close(self) -> None:
        self.closed += 1


def futures(orders: Sequence[Order]) -> list[Future[Launched]]:
    """Nothing ever comes of these."""
    return [Future() for _ in orders]


def failed(orders: Sequence[Order]) -> list[Future[Launched]]:
    found = futures(orders)
    for future in found:
        future.set_exception(OSError("no such subnet: subnet-1"))
    return found


def raising(orders: Sequence[Order]) -> list[Future[Launched]]:
    raise PermissionError("not with these credentials")


def unreachable(orders: Sequence[Order]) -> list[Future[Launched]]:
    found = futures(orders)
    for order, future in zip(orders, found, strict=True):
        future.set_result(Launched(order.id, "localhost", 1, 1))
    return found


def start(launcher: Launcher, n: int = 2) -> Cluster:
    cluster = Cluster(launcher)
    cluster.start(n, {"Probe": Probe()})
    return cluster


# -- Launches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launched", "kind", "text"),
    [
        (raising, PermissionError, "not with these credentials"),
        (failed, BootError, "boot step 'launch' after .* no such subnet: subnet-1"),
        (unreachable, BootError, "boot step 'connect' .* cannot connect to localhost:1: Connection refused"),
    ],
)
def test_a_launch_that_fails(
    launched: Callable[[Sequence[Order]], list[Future[Launched]]], kind: type[Exception], text: str
) -> None:
    launcher = Odd(launched)
    with start(launcher).session as b:
        for machine in b.machines():
            with pytest.raises(kind, match=text) as caught:
                machine.wait(State.RUNNING, SOON)
            if kind is BootError:
                assert "the console says this" in str(caught.value)
            with pytest.raises(MachineStopped):
                machine.call("Probe.echo")
    assert sorted(launcher.stopped) == sorted(machine.id for machine in b.machines())
    assert launcher.closed == 1


def test_the_steps_within_a_launch() -> None:
    """Where the system knows them, the error names the one that failed, and they stand in the machine's timeline."""
    launcher = Odd(failed)
    steps = [Step("api", 100.0, 1.5), Step("pending", 101.5, 60.0)]
    launcher.timeline = lambda id: steps  # type: ignore[attr-defined]
    with start(launcher, 1).session as b:
        (machine,) = b.machines()
        with pytest.raises(BootError, match="boot step 'pending' after") as caught:
            machine.wait(State.RUNNING, SOON)
    assert caught.value.step == "pending"
    assert machine.timeline == tuple(steps)


def test_the_timeline_of_a_boot() -> None:
    system = TestSystem()
    began = time.time()
    with start(system, 1).session as b:
        (machine,) = b.machines()
        machine.wait(State.RUNNING, SOON)
        timeline = machine.timeline
        ended = time.time()
    assert [step.name for step in timeline] == ["launch", "connect", "check", "exec", "register", "setup"]
    assert all(step.seconds >= 0 for step in timeline)
    assert began <= timeline[0].began
    assert [step.began for step in timeline] == sorted(step.began for step in timeline)
    assert sum(step.seconds for step in timeline) <= ended - began + 0.1


def test_what_a_session_has_cost_is_said_once() -> None:
    launcher = Odd(futures)
    launcher.summary = lambda: "1 × m7i.large for 3 min: $0.01"  # type: ignore[attr-defined]
    cluster = start(launcher, 1)
    cluster.session.shutdown()
    cluster.session.shutdown()
    assert cluster.output.getvalue() == "bigmachine: 1 × m7i.large for 3 min: $0.01\n"


def test_a_launcher_that_cannot_say_what_it_has_cost_is_closed() -> None:
    launcher = Odd(futures)
    closed: list[bool] = []

    def summary() -> str:
        raise RuntimeError("no threads left")

    launcher.summary = summary  # type: ignore[attr-defined]
    launcher.close = lambda: closed.append(True)  # type: ignore[method-assign]
    cluster = start(launcher, 1)
    with pytest.raises(RuntimeError):
        cluster.session.shutdown()
    assert closed


@pytest.mark.parametrize("how", ["raises", "fails"])
def test_a_failed_keepalive_asks_the_system_at_once(how: str) -> None:
    """It may know what the keepalive would find out when the lease is over."""

    class Gone(TestSystem):
        def ended(self, id: str) -> str | None:
            return "the spot market took it"

    def raises(call: Call[Any], *rest: Any) -> None:
        raise Unreachable(machine.addr, "no route to host", False)

    def fails(call: Call[Any], *rest: Any) -> None:
        call.complete(lambda: raises(call))

    cluster = Cluster(Gone())
    with cluster.session:
        (machine,) = cluster.start(1)
        machine.wait(State.RUNNING, SOON)
        supervisor = machine.supervisor
        submit = supervisor.submit
        supervisor.submit = {"raises": raises, "fails": fails}[how]  # type: ignore[method-assign]
        with contextlib.suppress(Unreachable):
            cluster.session._owned[0]._renew(120.0, lambda outcome: None)
        supervisor.submit = submit  # type: ignore[method-assign]
        eventually(lambda: machine.state is State.STOPPED, "the machine's end")
        assert str(machine.error).endswith("the spot market took it")


def test_a_launch_that_never_ends() -> None:
    launcher = Odd(futures)
    cluster = start(launcher)
    machines = cluster.session.machines()
    for machine in machines:
        machine.wait(State.STARTING, SOON)
    pending = machines[0].submit("Probe.echo")
    started = time.monotonic()
    cluster.session.shutdown()
    assert time.monotonic() - started < 1.0
    assert sorted(launcher.stopped) == sorted(machine.id for machine in machines)
    with pytest.raises(MachineStopped, match="shut down"):
        pending.result(SOON)


def test_a_launch_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(boot.DEADLINES, boot.LAUNCH, 0.1)
    (machine,) = start(Odd(futures), 1).session.machines()
    with pytest.raises(BootError, match=r"it took more than 0\.1 s"):
        machine.wait(State.RUNNING, SOON)


def test_a_boot_that_cannot_begin_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Owned.boot
    doomed: list[str] = []

    def refused(self: Owned, launched: Any) -> None:
        if not doomed:
            doomed.append(self.machine.id)
            raise RuntimeError("can't start new thread")
        begin(self, launched)

    monkeypatch.setattr(Owned, "boot", refused)
    launcher = Odd(failed)
    machines = start(launcher, 2).session.machines()
    for machine in machines:
        with pytest.raises(Exception, match=r"new thread|no such subnet"):
            machine.wait(State.RUNNING, SOON)
    eventually(lambda: sorted(launcher.stopped) == sorted(machine.id for machine in machines), "the end of both", SOON)


def test_a_machine_whose_services_cannot_be_stopped_ends() -> None:
    """As when its supervisor has no descriptors left: its lease is not looked at any more."""
    system = TestSystem()
    cluster = start(system, 1)
    (machine,) = cluster.session.machines()
    machine.wait(State.RUNNING, SOON)
    there = system._of(machine)
    stop = there.workers.stop

    def refused(grace: float, **_: Any) -> None:
        raise OSError("too many open files")

    there.workers.stop = refused  # type: ignore[method-assign, assignment]
    try:
        with pytest.raises(OSError, match="too many open files"):
            there.supervisor.end("the lease has lapsed", 0.0, orphan=True)
        assert there.ended.wait(SOON)
    finally:
        stop(0.0)
        cluster.session.shutdown()


def test_a_machine_that_dies_while_the_interpreter_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.12 on there are no new threads then: calls fail all the same, and what it says is still read."""

    class Threads:
        def Thread(self, **_: Any) -> None:
            raise RuntimeError("can't create new thread at interpreter shutdown")

    cluster = start(TestSystem(), 1)
    (owned,) = cluster.session._owned
    owned.machine.wait(State.RUNNING, SOON)
    with monkeypatch.context() as patch:
        patch.setattr("bigmachine.fleet.threading", Threads())
        owned._died("service process 0 was killed by signal SIGSEGV")
    assert owned.machine.state is State.STOPPED
    with pytest.raises(MachineStopped, match="SIGSEGV"):
        owned.machine.call("Probe.echo", 1)
    cluster.session.shutdown()


def test_a_session_that_ends_during_a_launch_stops_what_was_launched() -> None:
    """`stop` before the launcher knows the machine would be without effect, and the machine would live."""
    reached, released = threading.Event(), threading.Event()

    def slow(orders: Sequence[Order]) -> list[Future[Launched]]:
        reached.set()
        assert released.wait(SOON)
        assert not launcher.stopped
        return futures(orders)

    launcher = Odd(slow)
    cluster = start(launcher)
    assert reached.wait(SOON)
    ending = threading.Thread(target=cluster.session.shutdown)
    ending.start()
    for machine in cluster.session.machines():
        machine.wait(State.STOPPED, SOON)
    released.set()
    ending.join(SOON)
    assert not ending.is_alive()
    assert sorted(launcher.stopped) == sorted(machine.id for machine in cluster.session.machines())


def test_a_machine_that_is_cancelled_at_once_is_not_ordered_and_takes_no_other_with_it() -> None:
    ordered: list[str] = []

    def remember(orders: Sequence[Order]) -> list[Future[Launched]]:
        ordered.extend(order.id for order in orders)
        return system.launch(orders)

    system = TestSystem()
    launcher = Odd(remember)
    launcher.stop = system.stop  # type: ignore[method-assign]
    launcher.close = system.close  # type: ignore[method-assign]
    cluster = Cluster(launcher)
    with cluster.session as b:
        for _ in range(20):
            first, second = b.start(2, {"Probe": Probe()})
            first.cancel()
            second.wait(State.RUNNING, SOON)
            assert first.state is State.STOPPED
            second.cancel()
    assert {machine.id for machine in b.machines()} >= set(ordered)


# -- Orders --------------------------------------------------------------------------------------------------------------


def test_what_a_launch_changes_of_the_program() -> None:
    program = Program(("python", "app.py", "-n", "5"), {"A": "1"}, "/here", own_args=2)
    assert _with(program, {}, None) == program
    assert _with(program, {"A": "2", "B": "x=y"}, ["-n", "7", "z"]) == Program(
        ("python", "app.py", "-n", "7", "z"), {"A": "2", "B": "x=y"}, "/here", own_args=3
    )
    assert _with(program, {}, []).argv == ("python", "app.py")
    for name, value in (("", "x"), ("A=B", "x"), ("A", "x\0y")):
        with pytest.raises(UsageError, match="not an environment variable"):
            _with(program, {name: value}, None)


def test_what_cannot_be_started() -> None:
    cluster = Cluster(Odd(futures))
    with cluster.session as b:
        with pytest.raises(UsageError, match="cannot start 0 machines"):
            b.start(0, {})
        with pytest.raises(NotPicklable, match="service 'Lock'"):
            b.start(1, {"Probe": Probe(), "Lock": threading.Lock()})
        assert b.machines() == []
    with pytest.raises(UsageError, match="has been shut down"):
        b.start(1, {"Probe": Probe()})


def test_a_service_only_dials() -> None:
    session = Session(Cluster(Odd(futures)).session._network, address="https://localhost:5/m-1/")
    with pytest.raises(UsageError, match="machines are started by the driver"):
        session.start(1, {})
    machine = session.dial("https://localhost:6/m-2/")
    assert session.dial("https://localhost:6/m-2/") is machine
    assert session.machines() == [machine]
    session.shutdown()
    with pytest.raises(MachineStopped):
        machine.call("Probe.echo")


# -- Output --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoken() -> Iterator[tuple[Owned, io.StringIO]]:
    cluster = start(Odd(futures), 1)
    with cluster.session:
        yield cluster.session._owned[0], cluster.output


def lines(spoken: tuple[Owned, io.StringIO]) -> list[str]:
    owned, output = spoken
    prefix = f"{owned.machine.addr}: "
    written = output.getvalue()
    assert all(line.startswith(prefix) for line in written.splitlines())
    return [line.removeprefix(prefix) for line in written.split("\n")]


def test_output_is_written_in_whole_lines(spoken: tuple[Owned, io.StringIO]) -> None:
    say = spoken[0]._on_event
    say(("output", 0, "stdout", b"one\ntw"))
    say(("output", 0, "stderr", b"err"))
    say(("output", 1, "stdout", b"another process\n"))
    say(("output", 0, "stdout", b"o\n\nthree\n"))
    say(("log", "closed a connection"))
    say(("output", 0, "stderr", b"or\n"))
    assert lines(spoken) == [
        "one",
        "another process",
        "two",
        "",
        "three",
        "bigmachine: closed a connection",
        "error",
        "",
    ]


def test_characters_that_are_cut_in_two(spoken: tuple[Owned, io.StringIO]) -> None:
    for byte in "π = 3,14… €\n".encode():
        spoken[0]._on_event(("output", 0, "stdout", bytes([byte])))
    spoken[0]._on_event(("output", 0, "stdout", b"\xff\n"))
    assert lines(spoken) == ["π = 3,14… €", "\ufffd", ""]


def test_a_line_without_end_is_cut(spoken: tuple[Owned, io.StringIO]) -> None:
    for _ in range(40):
        spoken[0]._on_event(("output", 0, "stdout", b"x" * (MAX_LINE // 16)))
    assert [len(line) for line in lines(spoken)][:2] == [MAX_LINE + MAX_LINE // 16] * 2


def test_output_that_nobody_takes(spoken: tuple[Owned, io.StringIO]) -> None:
    spoken[1].close()
    spoken[0]._on_event(("output", 0, "stdout", b"into the void\n"))
    assert "into the void" in spoken[0]._last_output()


def test_a_notice_is_said_and_told_to_whoever_wants_to_know(spoken: tuple[Owned, io.StringIO]) -> None:
    owned, told = spoken[0], []
    machine = owned.machine
    machine.on_notice(lambda machine: told.append(machine.notice))
    soon = Notice("rebalance", None, "the instance will probably be interrupted")
    now = Notice("interruption", 1234.5, "the instance will be interrupted at 00:20:34")
    for notice in (soon, now, soon):
        owned._on_event(("notice", notice.kind, notice.deadline, notice.text))
    eventually(lambda: len(told) == 2, "both to be told")
    assert machine.notice == now
    later: list[Notice | None] = []
    machine.on_notice(lambda machine: later.append(machine.notice))
    eventually(lambda: later == [now], "what has been said to be told")
    machine.running()
    assert repr(machine) == f"<Machine {machine.addr} RUNNING, {now.text}>"
    assert lines(spoken)[:2] == [f"bigmachine: {soon.text}", f"bigmachine: {now.text}"]


def test_a_death_before_the_machine_runs_is_the_boots_affair(spoken: tuple[Owned, io.StringIO]) -> None:
    owned = spoken[0]
    owned.machine.wait(State.STARTING, SOON)
    owned._on_event(("death", "process 0 exited with code 1", ""))
    assert owned.machine.state is State.STARTING
    owned.machine.running()
    owned._on_event(("death", "process 0 exited with code 1", "the last\nwords\n"))
    eventually(lambda: owned.machine.state is State.STOPPED, "the machine's end")
    assert str(owned.machine.error).endswith("process 0 exited with code 1; its last output:\nthe last\nwords")
