"""What happens in a session, as events; and the file that gets them."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rpc_pair import until

import bigmachine
from bigmachine import Machine, Session, State, parallel
from bigmachine.errors import (
    BadArguments,
    BootError,
    CallTimeout,
    MachineStopped,
    NotPicklable,
    UnknownMethod,
    Unreachable,
    UsageError,
)
from bigmachine.events import MAX_ERROR, Event, Events, Failures, first_line
from bigmachine.fleet import LATE
from bigmachine.info import Step
from bigmachine.inside.eventfile import _EventFile, as_line
from bigmachine.rpc.calls import Call
from bigmachine.testing import TestSystem
from bigmachine.testing.conformance import Cluster

SOON = 20.0

released = threading.Event()
"""Ends `Troubled.wait`, which runs in this process."""


class Troubled:
    def __init__(self, bad: bool = False) -> None:
        self._bad = bad

    def setup(self, b: Session) -> None:
        if self._bad:
            raise ValueError("no such model\nat all")

    def echo(self, value: Any = None) -> Any:
        return value

    def fail(self, text: str = "why") -> None:
        raise ValueError(text)

    async def afail(self) -> None:
        raise KeyError("why")

    def fail_later(self) -> Iterator[int]:
        yield 1
        raise ValueError("why")

    def count(self, n: int) -> Iterator[int]:
        yield from range(n)

    @parallel
    def fail_anywhere(self) -> None:
        raise ValueError("why")

    def wait(self) -> None:
        released.wait(SOON)


@pytest.fixture
def system() -> TestSystem:
    return TestSystem(maxprocs=2)


@pytest.fixture
def b(system: TestSystem) -> Iterator[Session]:
    with bigmachine.start(system) as b:
        released.clear()
        yield b
        released.set()


def running(b: Session, n: int = 1) -> list[Machine]:
    machines = b.start(n, {"T": Troubled()})
    for machine in machines:
        machine.wait(State.RUNNING, SOON)
    return machines


def of_kind(b: Session, *kinds: str) -> list[Event]:
    return [event for event in b.events.since(0) if event.kind in kinds]


# -- Events ------------------------------------------------------------------------------------------------------------


def test_events_are_numbered_and_kept() -> None:
    events = Events(kept=3)
    assert events.since(0) == events.last(5) == []
    for n in range(5):
        events.emit("x", "m-1", n=n)
    assert [(event.number, event.fields["n"]) for event in events.since(0)] == [(3, 2), (4, 3), (5, 4)]
    assert [event.number for event in events.since(3)] == [4, 5]
    assert [event.number for event in events.since(0, limit=2)] == [3, 4]
    assert [event.number for event in events.since(4, limit=sys.maxsize)] == [5]
    assert [event.number for event in events.last(2)] == [4, 5]
    assert events.since(5) == events.since(100) == []
    times = [event.time for event in events.since(0)]
    assert times == sorted(times)


def test_subscribers_see_every_event_in_order_from_then_on() -> None:
    events, seen = Events(), []

    def again(event: Event) -> None:
        seen.append((event.kind, event.machine))
        if event.kind == "first":
            events.emit("second", "m-2")

    def broken(event: Event) -> None:
        raise ZeroDivisionError

    events.emit("before")
    end_broken = events.subscribe(broken)
    end = events.subscribe(again)
    events.emit("first", "m-1")
    end()
    end()
    end_broken()
    events.emit("after")
    assert seen == [("first", "m-1"), ("second", "m-2")]
    assert [event.kind for event in events.since(0)] == ["before", "first", "second", "after"]


def test_a_subscriber_that_leaves_hides_nothing_from_the_next() -> None:
    events, seen = Events(), []
    end = events.subscribe(lambda event: end())
    events.subscribe(lambda event: seen.append(event.kind))
    events.emit("first")
    events.emit("second")
    assert seen == ["first", "second"]


def test_threads_emit_at_the_same_time() -> None:
    events, seen = Events(), []
    events.subscribe(lambda event: seen.append(event.number))
    threads = [threading.Thread(target=lambda: [events.emit("x") for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [event.number for event in events.since(0, 5000)] == list(range(1, 2001))


class Untellable(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (ValueError("\n  one\ntwo"), "ValueError: one"),
        (ValueError(), "ValueError"),
        (Untellable(), "Untellable: (str() of it raised ZeroDivisionError)"),
        (ValueError("x" * 10_000), "ValueError: " + "x" * (MAX_ERROR - 12)),
    ],
    ids=["lines", "blank", "empty", "untellable", "long"],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line


# -- Floods of failures ------------------------------------------------------------------------------------------------


class Clock:
    """Timers that the test sets off."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], None]] = []

    def call_later(self, delay: float, callback: Callable[[], None]) -> Clock:
        assert not self.pending, "one timer is enough"
        self.pending.append(callback)
        return self

    def cancel(self) -> None:
        self.pending.clear()

    def tick(self) -> None:
        self.pending.pop()()


def test_failures_are_told_at_once_and_then_once_a_period() -> None:
    events, clock = Events(), Clock()
    failures = Failures(events, clock.call_later)

    seen: list[Event] = []

    def told() -> list[tuple[str, str, int, str]]:
        new = events.since(len(seen))
        seen.extend(new)
        return [(each.machine, each.fields["method"], each.fields["count"], each.fields["error"]) for each in new]

    failures.failed("m-1", "T.a", "0", 0.5, ValueError("first"))
    assert told() == [("m-1", "T.a", 1, "ValueError: first")]
    for n in range(1000):
        failures.failed("m-1", "T.a", "0", 0.5, ValueError(f"number {n}"))
    failures.failed("m-2", "T.a", "0", 0.5, ValueError("elsewhere"))
    failures.failed("m-1", "T.b", "0", 0.5, ValueError("another"))
    assert told() == [("m-2", "T.a", 1, "ValueError: elsewhere"), ("m-1", "T.b", 1, "ValueError: another")]
    clock.tick()
    assert told() == [("m-1", "T.a", 1000, "ValueError: number 999")]
    failures.failed("m-1", "T.a", "0", 0.5, ValueError("goes on"))
    failures.failed("m-1", "T.b", "0", 0.5, ValueError("was quiet for a period"))
    assert told() == [("m-1", "T.b", 1, "ValueError: was quiet for a period")]
    clock.tick()
    assert told() == [("m-1", "T.a", 1, "ValueError: goes on")]
    clock.tick()
    assert told() == []
    assert not clock.pending  # Nothing is awaited where nothing fails.


def test_what_has_not_been_told_is_told_at_the_end() -> None:
    events, clock = Events(), Clock()
    failures = Failures(events, clock.call_later)
    for _ in range(3):
        failures.failed("m-1", "T.a", "0", 0.5, ValueError("why"))
    failures.close()
    assert [event.fields["count"] for event in events.since(0)] == [1, 2]
    assert not clock.pending
    failures.failed("m-1", "T.a", "0", 0.5, ValueError("late"))
    assert [event.fields["count"] for event in events.since(0)] == [1, 2, 1]
    assert not clock.pending


# -- What a session tells ----------------------------------------------------------------------------------------------


def test_the_life_of_a_machine(system: TestSystem) -> None:
    with bigmachine.start(system) as b:
        (machine,) = running(b)
        machine.call("T.echo")
    first, *between, last = b.events.since(0)
    assert (first.kind, first.fields["session"], first.fields["system"]) == ("session.started", b.name, "test")
    assert (last.kind, last.fields) == ("session.ended", {"error": None})
    assert {event.machine for event in between} == {machine.id}
    told = [(event.kind, event.fields.get("state") or event.fields.get("step")) for event in between]
    assert told == [
        ("machine.ordered", None),
        ("machine.state", "STARTING"),
        ("boot.step", "launch"),
        ("boot.step", "connect"),
        ("boot.step", "check"),
        ("boot.step", "exec"),
        ("boot.step", "register"),
        ("boot.step", "setup"),
        ("machine.state", "RUNNING"),
        ("machine.state", "STOPPED"),
    ]
    assert between[0].fields == {"services": ["T"]}
    steps = [event.fields for event in between if event.kind == "boot.step"]
    assert [(step["step"], round(step["began"], 6), step["seconds"], step["failed"]) for step in steps] == [
        (step.name, round(step.began, 6), round(step.seconds, 6), False) for step in machine.timeline
    ]
    states = [event.fields for event in between if event.kind == "machine.state"]
    assert [(each["address"], each["error"]) for each in states] == [
        (machine.id, None),
        (machine.addr, None),
        (machine.addr, None),
    ]


def test_a_boot_that_fails(b: Session) -> None:
    (machine,) = b.start(1, {"T": Troubled(bad=True)})
    with pytest.raises(ValueError, match="no such model"):
        machine.wait(State.RUNNING, SOON)
    until(lambda: of_kind(b, "machine.state")[-1].fields["state"] == "STOPPED")
    assert [event.fields["failed"] for event in of_kind(b, "boot.step")] == [False] * 5 + [True]
    assert of_kind(b, "machine.state")[-1].fields["error"] == "ValueError: no such model"


class Detailed(TestSystem):
    """Knows the steps of its launches."""

    __test__ = False

    def timeline(self, id: str) -> Sequence[Step]:
        return [Step("allocate", 1.0, 2.0), Step("boot", 3.0, 4.0)]


def test_the_steps_within_a_launch_take_its_place() -> None:
    with bigmachine.start(Detailed()) as b:
        running(b)
        told = [(event.fields["step"], event.fields["seconds"]) for event in of_kind(b, "boot.step")]
    assert told[:2] == [("allocate", 2.0), ("boot", 4.0)]
    assert [step for step, _ in told[2:]] == ["connect", "check", "exec", "register", "setup"]


class Failing(Detailed):
    def launch(self, orders: Sequence[Any]) -> list[Any]:
        futures: list[Any] = [Future() for _ in orders]
        for future in futures:
            future.set_exception(OSError("no capacity"))
        return futures


def test_a_launch_that_fails_names_the_step_within() -> None:
    with bigmachine.start(Failing()) as b:
        (machine,) = b.start(1, {"T": Troubled()})
        with pytest.raises(BootError, match="no capacity"):
            machine.wait(State.RUNNING, SOON)
        told = [(event.fields["step"], event.fields["failed"]) for event in of_kind(b, "boot.step")]
    assert told == [("allocate", False), ("boot", True)]


def test_a_machine_that_dies(system: TestSystem, b: Session) -> None:
    (machine,) = running(b)
    system.crash(machine, "service process 0 (pid 1) was killed by SIGSEGV")
    machine.wait(State.STOPPED, SOON)
    until(lambda: of_kind(b, "machine.state")[-1].fields["state"] == "STOPPED")
    error = of_kind(b, "machine.state")[-1].fields["error"]
    assert error.startswith("MachineStopped: ")
    assert "was killed by SIGSEGV" in error


def test_notices(system: TestSystem, b: Session) -> None:
    (machine,) = running(b)
    system.notice(machine, "rebalance")
    system.notice(machine, seconds=60.0)
    until(lambda: len(of_kind(b, "machine.notice")) == 2)
    first, second = (event.fields for event in of_kind(b, "machine.notice"))
    assert first == {"notice": "rebalance", "deadline": None, "text": "the machine may be taken away"}
    assert second["notice"] == "interruption"
    assert second["deadline"] > 1e9


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero\nof all"), Untellable()], ids=["lines", "untellable"])
def test_the_session_says_why_the_program_failed(system: TestSystem, error: Exception) -> None:
    b = bigmachine.start(system)
    with pytest.raises(type(error)), b:
        raise error
    assert b.events.last(1)[0].fields == {"error": first_line(error)}


# -- Keepalives --------------------------------------------------------------------------------------------------------


class Awaited:
    """A supervisor's client whose keepalives are answered when the test says so."""

    def __init__(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Call[Any]] = []
        self.refuse: Exception | None = None
        supervisor, submit = machine.supervisor, machine.supervisor.submit

        def replaced(call: Call[Any], method: str, *args: Any) -> None:
            if method != "Supervisor.keepalive":
                submit(call, method, *args)
            elif self.refuse is not None:
                raise self.refuse
            else:
                self.calls.append(call)

        monkeypatch.setattr(supervisor, "submit", replaced)


@pytest.fixture
def lively(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Session, Any, Awaited]]:
    """A session with a machine, the machine's owner, and its keepalives; the machine's own are far away."""
    cluster = Cluster(TestSystem(), lease=3600.0)
    with cluster.session as b:
        (machine,) = cluster.start()
        machine.wait(State.RUNNING, SOON)
        until(lambda: machine.keepalive_reply_times)
        (owned,) = b._owned
        yield b, owned, Awaited(machine, monkeypatch)


def test_a_keepalive_in_time_is_no_event(lively: tuple[Session, Any, Awaited], monkeypatch: pytest.MonkeyPatch) -> None:
    b, owned, awaited = lively
    reactor, timers = owned._network.reactor, []
    call_later = reactor.call_later

    def observed(delay: float, callback: Callable[[], None]) -> Any:
        timer = call_later(delay, callback)
        if delay == 3600.0 / LATE:
            timers.append(timer)
        return timer

    monkeypatch.setattr(reactor, "call_later", observed)
    replies: list[Any] = []
    owned._renew(3600.0, replies.append)
    awaited.calls[0].complete(lambda: None)
    until(lambda: replies)
    assert of_kind(b, "keepalive.late", "keepalive.failed") == []
    assert [timer.callback for timer in timers] == [None]


def test_a_keepalive_that_is_late(lively: tuple[Session, Any, Awaited]) -> None:
    """First that it is awaited, then how long it took."""
    b, owned, awaited = lively
    replies: list[Any] = []
    owned._renew(0.02 * LATE, replies.append)
    until(lambda: of_kind(b, "keepalive.late"))
    assert not replies
    awaited.calls[0].complete(lambda: None)
    until(lambda: replies)
    first, second = of_kind(b, "keepalive.late", "keepalive.failed")
    assert first.fields == {"seconds": None}
    assert second.fields["seconds"] >= 0.02
    assert first.machine == second.machine == owned.machine.id


def test_a_keepalive_that_fails(lively: tuple[Session, Any, Awaited]) -> None:
    b, owned, awaited = lively
    replies: list[Any] = []
    owned._renew(3600.0, replies.append)
    error = Unreachable("the machine", "no route", sent=False)
    awaited.calls[0].complete(lambda: _raise(error))
    until(lambda: replies)
    awaited.refuse = error
    with pytest.raises(Unreachable):
        owned._renew(3600.0, replies.append)
    text = first_line(error)
    until(lambda: len(of_kind(b, "keepalive.failed")) == 2)
    assert [event.fields for event in of_kind(b, "keepalive.late", "keepalive.failed")] == [{"error": text}] * 2
    assert owned.machine.keepalive_error == text
    awaited.refuse = None
    owned._renew(3600.0, replies.append)
    awaited.calls[1].complete(lambda: None)
    until(lambda: owned.machine.keepalive_error == "")


def _raise(error: Exception) -> None:
    raise error


def test_services_that_died_unheard(lively: tuple[Session, Any, Awaited], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine says of it may be behind output that nobody reads: two keepalives that say so are enough."""
    b, owned, awaited = lively
    (there,) = b.fleet.launcher._machines.values()
    monkeypatch.setattr(there.workers, "_obituary", "service process 0 (pid 1) was killed by SIGSEGV")
    replies: list[Any] = []
    for _ in range(2):
        assert owned.machine.state is State.RUNNING
        answered = len(replies)
        owned._renew(3600.0, replies.append)
        granted = owned.machine.supervisor.call("Supervisor.keepalive", (3600.0,), {}, SOON)
        awaited.calls[-1].complete(partial(float, granted))
        until(partial(lambda count: len(replies) > count, answered))
    owned.machine.wait(State.STOPPED, SOON)
    assert "was killed by SIGSEGV" in str(owned.machine.error)


# -- Calls that fail ---------------------------------------------------------------------------------------------------

WAYS: Mapping[str, Callable[[Machine], Any]] = {
    "it raises": lambda m: m.call("T.fail"),
    "it raises, submitted": lambda m: m.submit("T.fail").result(SOON),
    "it raises, async": lambda m: m.call("T.afail"),
    "it raises, with large arguments": lambda m: m.call("T.fail", "x" * 100_000),
    "it raises, parallel": lambda m: m.call("T.fail_anywhere"),
    "it raises, parallel, submitted": lambda m: m.submit("T.fail_anywhere").result(SOON),
    "it raises before the first item": lambda m: list(m.stream("T.count", "x")),
    "it raises after the first item": lambda m: list(m.stream("T.fail_later")),
    "there is no such method": lambda m: m.call("T.nothing"),
    "the arguments do not fit": lambda m: m.call("T.echo", 1, 2, 3),
    "the arguments do not pickle": lambda m: m.call("T.echo", threading.Lock()),
    "the arguments do not pickle, submitted": lambda m: m.submit("T.echo", threading.Lock()),
    "it takes too long": lambda m: m.call("T.wait", timeout=0.01),
    "it takes too long, submitted": lambda m: m.submit("T.wait", timeout=0.01).result(SOON),
    "the reply does not pickle": lambda m: m.call("T.echo", Unsendable()),
    "the supervisor refuses": lambda m: m.call("Supervisor.nothing"),
}


class Unsendable:
    """Pickles once, on its way there."""

    sent = False

    def __init__(self, sent: bool = False) -> None:
        self.sent = sent

    def __reduce__(self) -> Any:
        if self.sent:
            raise pickle.PicklingError("once is enough")
        return Unsendable, (True,)


@pytest.mark.parametrize("way", WAYS)
def test_a_call_that_fails_is_one_event(b: Session, way: str) -> None:
    (machine,) = running(b)
    machine.call("T.echo", 1)  # Connected: a timeout is of the call then.
    with pytest.raises(
        (ValueError, KeyError, TypeError, UnknownMethod, BadArguments, NotPicklable, CallTimeout)
    ) as raised:
        WAYS[way](machine)
    (event,) = of_kind(b, "call.failed")
    fields = dict(event.fields)
    assert event.machine == machine.id
    assert fields.pop("method").startswith("Supervisor." if "supervisor" in way else "T.")
    assert fields.pop("process") in (
        ("supervisor",) if "supervisor" in way else ("0", "1") if "parallel" in way else ("0",)
    )
    assert (0.01 if "too long" in way else 0.0) <= fields.pop("seconds") <= SOON
    assert fields == {"error": first_line(raised.value), "count": 1}


@pytest.mark.parametrize("way", ["call", "submit", "stream"])
def test_a_call_of_a_machine_that_has_stopped(b: Session, way: str) -> None:
    ways: Mapping[str, Callable[[Machine], Any]] = {
        "call": lambda m: m.call("T.echo"),
        "submit": lambda m: m.submit("T.echo").result(SOON),
        "stream": lambda m: list(m.stream("T.count", 1)),
    }
    (machine,) = running(b)
    machine.cancel()
    with pytest.raises(MachineStopped):
        ways[way](machine)
    (event,) = of_kind(b, "call.failed")
    assert event.fields["error"].startswith("MachineStopped: ")


def test_calls_that_wait_for_a_machine_that_never_runs(b: Session) -> None:
    (machine,) = b.start(1, {"T": Troubled(bad=True)})
    calls = [machine.submit("T.echo") for _ in range(3)]
    for call in calls:
        with pytest.raises(MachineStopped):
            call.result(SOON)
    b.shutdown()
    assert sum(event.fields["count"] for event in of_kind(b, "call.failed")) == 3


def test_what_is_no_failure(b: Session) -> None:
    (machine,) = running(b)
    machine.call("T.echo")
    machine.submit("T.echo").result(SOON)
    assert list(machine.stream("T.count", 3)) == [0, 1, 2]
    with machine.stream("T.count", 1_000_000) as items:
        next(items)
    cancelled = machine.submit("T.wait")
    assert cancelled.cancel()
    machine.call("T.echo")
    machine.call("Supervisor.ping")
    assert of_kind(b, "call.failed") == []


def test_each_of_many_failures_is_counted(b: Session) -> None:
    (machine,) = running(b)
    for _ in range(300):
        with pytest.raises(ValueError, match="why"):
            machine.call("T.fail")
    b.shutdown()
    told = of_kind(b, "call.failed")
    assert sum(event.fields["count"] for event in told) == 300
    assert told[0].fields["count"] == 1


# -- The file ----------------------------------------------------------------------------------------------------------


def lines(file: Path) -> list[dict[str, Any]]:
    text = file.read_text("ascii")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_the_file_has_every_event(system: TestSystem, tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    with bigmachine.start(system, events=str(file)) as b:
        (machine,) = running(b)
        with pytest.raises(ValueError, match="größer"):
            machine.call("T.fail", "größer\u2028als")
        written = lines(file)  # At once, not at the end.
        assert written[-1]["error"] == "ValueError: größer\u2028als"
    assert [line["number"] for line in lines(file)] == [event.number for event in b.events.since(0)]
    for line, event in zip(lines(file), b.events.since(0), strict=True):
        assert list(line)[:5] == ["time", "session", "number", "kind", "machine"]
        assert line == {
            **event.fields,
            "time": round(event.time, 6),
            "session": b.name,
            "number": event.number,
            "kind": event.kind,
            "machine": event.machine,
        }
    assert lines(file)[-1]["kind"] == "session.ended"
    assert file.stat().st_mode & 0o777 == 0o600


def test_sessions_share_a_file(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    names = []
    for _ in range(2):
        with (
            bigmachine.start(TestSystem(), events=str(file)) as b,
            bigmachine.start(TestSystem(), events=str(file)) as c,
        ):
            running(b)
            running(c)
            names += [b.name, c.name]
    assert {line["session"] for line in lines(file)} == set(names)
    for name in names:
        numbers = [line["number"] for line in lines(file) if line["session"] == name]
        assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("missing/events.jsonl", os.strerror(errno.ENOENT)),
        ("folder", os.strerror(errno.EISDIR)),
        ("pipe", os.strerror(errno.ENXIO)),
        ("a\0b", "embedded null byte"),
    ],
    ids=["no folder", "a folder", "a pipe without a reader", "no name"],
)
def test_a_file_that_cannot_be_written(tmp_path: Path, where: str, reason: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    file = f"{tmp_path}/{where}"
    with pytest.raises(UsageError) as caught:
        bigmachine.start(TestSystem(), events=file)
    text = str(caught.value)
    assert text == f"events cannot be written to {file!r}: {reason}; give -bigm.events another file"


def test_what_json_does_not_have() -> None:
    line = as_line(Event(1, 2.5, "x", "m-1", {"path": Path("a"), "kind": "not this"}), "s-1")
    assert json.loads(line) == {"time": 2.5, "session": "s-1", "number": 1, "kind": "x", "machine": "m-1", "path": "a"}
    line = as_line(Event(1, 2.5, "x", "m-1", {"seconds": float("nan")}), "s-1")
    assert json.loads(line)["fields"] == "{'seconds': nan}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_ends_nothing(system: TestSystem, capfd: pytest.CaptureFixture[str]) -> None:
    with bigmachine.start(system, events="/dev/full") as b:
        (machine,) = running(b)
        assert machine.call("T.echo", 1) == 1
    full = os.strerror(errno.ENOSPC)
    until(lambda: said(b, capfd).count("events are missing") >= 2)
    missing = len(b.events.since(0))
    assert sorted(line for line in said(b, capfd).splitlines() if "missing" in line) == [
        f"bigmachine: {missing} events are missing in /dev/full",
        f"bigmachine: events are missing in /dev/full: {full}",
    ]


_said: dict[str, str] = {}


def said(b: Session, capfd: pytest.CaptureFixture[str]) -> str:
    """All that has come on standard error since the session began."""
    _said[b.name] = _said.get(b.name, "") + capfd.readouterr().err
    return _said[b.name]


LIMITED = """
import json, resource, signal, sys
from bigmachine.events import Event
from bigmachine.inside.eventfile import _EventFile
import os
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
problems = []
file = _EventFile(fd, "s-1", problems.append)
for number in range(100):
    file.write(Event(number, 1.0, "x", "m-1", {"text": "y" * (number % 30)}))
print(json.dumps([file.close(), problems]))
"""


def test_a_line_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    """The file may have 1000 bytes: the kernel takes a part of the line at which it is full, as it does on a full disk."""
    file = tmp_path / "events.jsonl"
    ran = subprocess.run([sys.executable, "-c", LIMITED, file], capture_output=True, text=True, timeout=60, check=True)
    missing, problems = json.loads(ran.stdout)
    assert len(lines(file)) == 100 - missing
    assert 900 < file.stat().st_size <= 1000
    assert len(problems) == 1


def test_a_pipe_that_nobody_reads_holds_nothing_up() -> None:
    """It is full after some hundred events; what follows is left out, and all that comes out of it are whole lines."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    problems: list[str] = []
    file = _EventFile(writing, "s-1", problems.append)
    events = [Event(number, 1.0, "x", "m-1", {"text": "y" * 5000}) for number in range(1, 101)]
    for event in events:
        file.write(event)
    received = os.read(reading, 1 << 20)
    file.write(events[-1])  # Where the pipe has taken a part of a line, the rest of it comes first.
    missing = file.close()
    assert missing > 0
    with open(reading, "rb") as rest:
        received += rest.read()
    numbers = [json.loads(line)["number"] for line in received.splitlines()]
    assert received.endswith(b"\n")
    assert numbers[:-1] == list(range(1, len(numbers)))
    assert len(numbers) == 101 - missing
    assert problems == [os.strerror(errno.EAGAIN)] or "fast enough" in problems[0]


def test_what_is_emitted_after_the_end_is_nobodys(tmp_path: Path) -> None:
    with bigmachine.start(TestSystem(), events=str(tmp_path / "events.jsonl")) as b:
        pass
    before = lines(tmp_path / "events.jsonl")
    assert not b.events._subscribers
    b.events.emit("late")
    assert lines(tmp_path / "events.jsonl") == before


PROGRAM = """
import os, signal, sys, time
from bigmachine import State, driver

class S:
    def pid(self):
        return os.getpid()
    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    b = driver.start(http="off")
    m, n = b.start(2, {"S": S()})
    n.wait()
    assert m.call("S.pid") != os.getpid()
    try:
        m.call("S.die")
    except Exception as error:
        print(error)
    m.wait(State.STOPPED, 20.0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_all_events(tmp_path: Path) -> None:
    program, file = tmp_path / "program.py", tmp_path / "events.jsonl"
    program.write_text(PROGRAM)
    ran = subprocess.run(
        [sys.executable, program, f"-bigm.events={file}"], capture_output=True, text=True, timeout=100, check=False
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    written = lines(file)
    assert (written[0]["kind"], written[0]["system"], written[0]["program"]) == (
        "session.started",
        "local",
        "program.py",
    )
    machines = [line["machine"] for line in written if line["kind"] == "machine.ordered"]
    states = {
        m: [line["state"] for line in written if line["kind"] == "machine.state" and line["machine"] == m]
        for m in machines
    }
    assert sorted(states.values()) == [["STARTING", "RUNNING"], ["STARTING", "RUNNING", "STOPPED"]]
    (failed,) = [line for line in written if line["kind"] == "call.failed"]
    assert (failed["method"], failed["process"], failed["count"]) == ("S.die", "0", 1)
    assert "was killed by" in failed["error"]
    (stopped,) = [line for line in written if line.get("state") == "STOPPED"]
    assert stopped["machine"] == failed["machine"]
    assert "was killed by" in stopped["error"]
