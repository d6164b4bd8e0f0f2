"""The document of a session's state, how machines are asked for it, and its form as text."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bigmachine
from bigmachine import State
from bigmachine.errors import MachineStopped
from bigmachine.info import Notice
from bigmachine.inside import monitor, text
from bigmachine.inside.monitor import Monitor
from bigmachine.inside.status import details, first_line
from bigmachine.machine import Machine
from bigmachine.session import Session
from bigmachine.supervisor.service import SupervisorService
from bigmachine.systems.local import LocalLauncher
from bigmachine.testing import TestSystem
from bigmachine.testing.conformance import SOON, eventually
from bigmachine.worker import ProcessService


class Counted:
    def count(self, n: int) -> int:
        return n + 1

    def fail(self) -> None:
        raise ValueError("it cannot be\nfor a reason")


class Broken:
    def setup(self, b: Session) -> None:
        raise ValueError("no disk\nfor a reason")


class System(TestSystem):
    """Whose machines are something, and cost something."""

    def detail(self, id: str) -> dict[str, str]:
        return {"instance": f"i-{id}"}

    def hourly(self, id: str) -> float | None:
        return 3600.0


@pytest.fixture
def session() -> Iterator[Session]:
    with bigmachine.start(System()) as b:
        yield b


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents are made when they are asked for, and not before."""
    monkeypatch.setattr(monitor, "INTERVAL", 3600.0)


def machine_of(document: dict[str, Any], machine: Machine) -> dict[str, Any]:
    (found,) = (each for each in document["machines"] if each["id"] == machine.id)
    return dict(found)


# -- The document --------------------------------------------------------------------------------------------------------


def test_a_machine_that_runs(session: Session, hurried: None) -> None:
    (machine,) = session.start(1, {"Counted": Counted()})
    machine.call("Counted.count", 1)
    watching = Monitor(session)
    document = watching.snapshot().value
    assert document["counts"] == {"RUNNING": 1}
    assert document["session"]["name"] == session.name
    assert (document["session"]["system"], document["session"]["hourly"]) == ("test", 3600.0)
    assert document["session"]["ended"] is None
    found = machine_of(document, machine)
    assert found["address"] == machine.addr
    assert found["state"] == "RUNNING"
    assert list(found["entered"]) == ["UNSTARTED", "STARTING", "RUNNING"]
    assert sorted(found["entered"].values()) == list(found["entered"].values())
    assert 0 <= found["uptime"] <= document["now"] - document["session"]["began"]
    assert found["detail"] == {"instance": f"i-{machine.id}"}
    assert found["hourly"] == 3600.0
    assert found["cost"] == pytest.approx(document["now"] - found["entered"]["STARTING"], abs=0.5)
    assert (found["error"], found["notice"], found["unhealthy"], found["missing"]) == (None, None, None, None)
    assert found["vitals"]["memory"]["total"] > found["vitals"]["memory"]["used"] > 0
    assert [each["process"] for each in found["processes"]] == ["supervisor", "0"]
    assert all(each["rss"] > 0 and each["threads"] > 0 for each in found["processes"])
    assert [each["name"] for each in found["boot"]][-1] == "setup"
    assert not any(each["failed"] for each in found["boot"])
    assert found["keepalive"]["late"] is False
    assert document["methods"][0]["method"] == "Counted.count"
    assert len(document["methods"]) == 1  # None of ours.
    for end in ("served", "called"):
        figures = document["methods"][0][end]
        assert (figures["count"], figures["errors"], figures["rate"]) == (1, 0, None)
        assert 0 < figures["p50"] <= figures["p99"] <= figures["max"]
    assert document["events"][0]["kind"] == "session.started"
    json.dumps(document, allow_nan=False)


def test_rates_and_histories(session: Session, hurried: None) -> None:
    (machine,) = session.start(1, {"Counted": Counted()})
    machine.call("Counted.count", 0)
    watching = Monitor(session)
    assert machine_of(watching.snapshot().value, machine)["history"]["calls"] == [None]
    for number in range(20):
        machine.call("Counted.count", number)
    document = watching.snapshot(fresh=True).value
    history = machine_of(document, machine)["history"]
    assert [len(points) for points in history.values()] == [2, 2, 2, 2]
    assert history["calls"][1] > 0
    (figures,) = document["methods"]
    assert (figures["served"]["count"], figures["called"]["count"]) == (21, 21)
    assert figures["served"]["rate"] > 0
    assert figures["called"]["rate"] > 0
    assert all(each["percent"] is not None for each in machine_of(document, machine)["processes"])
    quiet = watching.snapshot(fresh=True).value["methods"][0]
    assert (quiet["served"]["rate"], quiet["called"]["rate"]) == (0.0, 0.0)


def test_who_has_not_looked_for_long_begins_anew(
    session: Session, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line between two points that are an hour apart would be a lie."""
    (machine,) = session.start(1, {"Counted": Counted()})
    machine.wait()
    watching = Monitor(session)
    watching.snapshot()
    monkeypatch.setattr(monitor, "LINGER", 0.0)
    assert len(machine_of(watching.snapshot(fresh=True).value, machine)["history"]["memory"]) == 1


def test_a_machine_that_failed(session: Session, hurried: None) -> None:
    (machine,) = session.start(1, {"Broken": Broken()})
    with pytest.raises(ValueError, match="no disk"):
        machine.wait()
    document = Monitor(session).snapshot().value
    found = machine_of(document, machine)
    assert (found["state"], found["error"], found["uptime"]) == ("STOPPED", "no disk", None)
    assert "for a reason" in found["error_details"]
    assert [each["name"] for each in found["boot"] if each["failed"]] == [found["boot"][-1]["name"]] == ["setup"]
    assert (found["vitals"], found["processes"], found["missing"]) == (None, [], None)
    assert document["session"]["hourly"] is None  # It costs no more.
    assert document["session"]["cost"] == found["cost"] >= 0
    ended = found["cost"]
    assert machine_of(Monitor(session).snapshot().value, machine)["cost"] == ended


def test_a_machine_that_was_shut_down_has_not_failed(session: Session, hurried: None) -> None:
    """Its figures stay."""
    (machine,) = session.start(1, {"Counted": Counted()})
    machine.call("Counted.count", 1)
    watching = Monitor(session)
    watching.snapshot()
    machine.shutdown()
    document = watching.snapshot(fresh=True).value
    found = machine_of(document, machine)
    assert (found["state"], found["error"], found["missing"]) == ("STOPPED", None, None)
    assert not any(each["failed"] for each in found["boot"])
    assert found["uptime"] > 0
    assert found["keepalive"]["next"] is None
    assert document["methods"][0]["served"]["count"] == 1


def test_notices_and_ill_health(session: Session, hurried: None) -> None:
    (machine,) = session.start(1, {"Counted": Counted()})
    machine.wait()
    machine.noticed(Notice("interruption", 12.5, "it will be taken away"))
    machine.unhealthy = "memory is at 97 %"
    session.captures.append({"machine": machine.id, "time": 1.0, "reason": "memory", "files": ["a", "b"]})
    document = Monitor(session).snapshot().value
    found = machine_of(document, machine)
    assert found["notice"] == {"kind": "interruption", "deadline": 12.5, "text": "it will be taken away"}
    assert found["unhealthy"] == "memory is at 97 %"
    assert document["captures"] == session.captures


def test_a_late_keepalive(session: Session, hurried: None) -> None:
    (machine,) = session.start(1, {"Counted": Counted()})
    machine.wait()
    eventually(lambda: machine.keepalive_reply_times, "the first keepalive's reply")  # The next is far away.
    watching = Monitor(session)
    lease = session.fleet.lease
    for replies, due, late in [
        ((0.1, lease / 4), 1.0, True),
        ((lease / 4, 0.1), 1.0, False),
        ((), -lease / 4, True),
        ((), -1.0, False),
    ]:
        machine.keepalive_reply_times, machine.next_keepalive = replies, time.monotonic() + due
        found = machine_of(watching.snapshot(fresh=True).value, machine)["keepalive"]
        assert (found["late"], found["replies"]) == (late, list(replies))
    machine.keepalive_error = "no reply within 30 s"  # And the next attempt is soon.
    assert machine_of(watching.snapshot(fresh=True).value, machine)["keepalive"]["late"] is True


def test_what_errors_say() -> None:
    error = MachineStopped("https://h:1/m-1/", "killed; its last output:\nsegfault", sent=True)
    assert first_line(error) == str(error).splitlines()[0]
    assert first_line(KeyError()) == "KeyError"
    error.add_note("a note")
    error.__cause__ = ValueError("the cause")
    assert details(error).splitlines()[1:] == ["segfault", "a note", "the cause"]


# -- Asking --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The ids of machines whose supervisors do not answer."""
    ids: set[str] = set()
    done = threading.Event()
    vitals = SupervisorService.vitals

    def held(service: SupervisorService) -> Any:
        if service.ping() in ids:
            done.wait(60.0)
        return vitals(service)

    monkeypatch.setattr(SupervisorService, "vitals", held)
    monkeypatch.setattr(monitor, "WAIT", 0.3)
    yield ids
    done.set()


def test_who_does_not_answer_holds_nobody_up(session: Session, hurried: None, silent: set[str]) -> None:
    well, ill = session.start(2, {"Counted": Counted()})
    for machine in (well, ill):
        machine.wait()
    silent.add(ill.id)
    watching = Monitor(session)
    document = watching.snapshot().value
    assert machine_of(document, well)["vitals"] is not None
    assert machine_of(document, well)["missing"] is None
    assert machine_of(document, ill)["vitals"] is None
    assert machine_of(document, ill)["missing"] == "no answer for 0 s"
    asked: list[str] = []
    call = monitor._ask

    def counted(client: Any, method: str, *rest: Any) -> None:
        asked.append(f"{method} of {client.address}")
        call(client, method, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(monitor, "_ask", counted)
        again = watching.snapshot(fresh=True).value
    assert f"Supervisor.vitals of {well.addr}" in asked
    assert f"Supervisor.vitals of {ill.addr}" not in asked  # It has been asked.
    assert machine_of(again, ill)["missing"] is not None


def test_a_service_that_does_not_answer(
    session: Session, hurried: None, silent: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process is missing; what the supervisor says is there."""
    done = threading.Event()
    monkeypatch.setattr(ProcessService, "stats", lambda service: done.wait(60.0))
    (machine,) = session.start(1, {"Counted": Counted()})
    machine.wait()
    found = machine_of(Monitor(session).snapshot().value, machine)
    assert found["vitals"] is not None
    assert found["missing"] == "process 0: no answer for 0 s"
    done.set()


def test_an_answer_that_is_an_error(session: Session, hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(service: SupervisorService) -> Any:
        raise OSError("no /proc here\nat all")

    monkeypatch.setattr(SupervisorService, "vitals", broken)
    (machine,) = session.start(1, {"Counted": Counted()})
    machine.wait()
    found = machine_of(Monitor(session).snapshot().value, machine)
    assert (found["missing"], found["vitals"]) == ("no /proc here", None)


def test_machines_that_come_and_go(session: Session, hurried: None) -> None:
    watching = Monitor(session)
    assert watching.snapshot().value["machines"] == []
    (first,) = session.start(1, {"Counted": Counted()})
    first.wait()
    assert machine_of(watching.snapshot(fresh=True).value, first)["vitals"] is not None
    (second,) = session.start(1, {"Counted": Counted()})
    second.wait()
    first.cancel()
    document = watching.snapshot(fresh=True).value
    assert document["counts"] == {"RUNNING": 1, "STOPPED": 1}
    assert machine_of(document, first)["error"].endswith("it was cancelled")


def test_what_it_does_now(session: Session, hurried: None) -> None:
    class Slow:
        def setup(self, b: Session) -> None:
            import threading

            self.done = threading.Event()

        def wait(self) -> None:
            self.done.wait(30.0)

        def stop(self) -> None:
            self.done.set()

    (machine,) = session.start(1, {"Slow": Slow()})
    call = machine.submit("Slow.wait")
    watching = Monitor(session)

    def doing() -> list[dict[str, Any]]:
        processes = machine_of(watching.snapshot(fresh=True).value, machine)["processes"]
        return [one for process in processes for one in process["doing"]]

    machine.wait()
    eventually(doing, "the call that runs")
    (one,) = doing()
    assert one["method"] == "Slow.wait"
    assert one["seconds"] >= 0
    assert one["thread"]
    machine.call("Slow.stop")
    call.result(SOON)
    assert doing() == []


def test_one_monitor_for_all_who_look(session: Session, hurried: None) -> None:
    watching = monitor.of(session)
    assert monitor.of(session) is watching
    first = watching.snapshot()
    assert watching.current() is first
    assert watching.snapshot() is first
    second = watching.snapshot(fresh=True)
    assert second.value["tick"] == first.value["tick"] + 1
    assert second.tag != first.tag


def test_a_bug_of_ours_is_said_and_not_for_ever(
    session: Session, hurried: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = monitor.document

    def broken(*args: Any, **named: Any) -> dict[str, Any]:
        raise RuntimeError("a bug of ours")

    watching = Monitor(session)
    monkeypatch.setattr(monitor, "document", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        watching.snapshot()
    assert "unexpected error in the status of the session" in capsys.readouterr().err
    monkeypatch.setattr(monitor, "document", document)
    assert watching.snapshot().value["session"]["name"] == session.name


def test_who_looks_while_the_interpreter_ends() -> None:
    """When Python has ended its pools of threads, and the machines are still being ended: it is no bug of ours."""
    ran = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True, timeout=60.0)
    assert (ran.stdout, ran.stderr) == ("1\nRUNNING 1\n", "")


ENDING = """
import atexit
import bigmachine
from bigmachine.inside.monitor import Monitor
from bigmachine.testing import TestSystem
from bigmachine.testing.services import Probe

b = bigmachine.start(TestSystem())
(machine,) = b.start(1, {"Probe": Probe()})
machine.wait()
watching = Monitor(b)
print(len(watching.snapshot().value["machines"][0]["history"]["memory"]))

def look():
    document = watching.snapshot(fresh=True).value
    print(document["machines"][0]["state"], len(document["machines"]))

atexit.register(look)
"""


def test_a_session_that_has_ended() -> None:
    with bigmachine.start(TestSystem()) as b:
        b.start(1, {"Counted": Counted()})[0].wait()
        watching = Monitor(b)
        running = watching.snapshot()
        assert running.value["session"]["ended"] is None
    ended = watching.snapshot()
    assert ended.value["session"]["ended"] >= running.value["now"]
    assert ended.value["counts"] == {"STOPPED": 1}
    assert ended.tag != running.tag
    assert watching.snapshot() is ended


# -- Text ----------------------------------------------------------------------------------------------------------------

FIGURES = {
    "count": 12000,
    "rate": 41.26,
    "errors": 3,
    "p50": 0.00042,
    "p99": 0.0123,
    "max": 2.5,
    "seconds": 60.0,
    "sent": 1,
    "received": 1,
}
MACHINE: dict[str, Any] = {
    "id": "m-7f3a9c",
    "address": "https://localhost:42409/m-7f3a9c/",
    "state": "RUNNING",
    "began": 900.0,
    "uptime": 90.0,
    "detail": {"instance": "i-0abc", "type": "m7i.large"},
    "error": None,
    "notice": {"kind": "interruption", "deadline": 1120.0, "text": "it will be taken away"},
    "unhealthy": "memory is at 97 %",
    "keepalive": {"next": 27.4, "replies": [0.5, 0.00061, 0.0021, 0.012], "late": False},
    "vitals": {
        "memory": {"total": 16 << 30, "used": 3 << 30, "percent": 18.7, "processes": 1},
        "disk": {"total": 500 << 30, "used": 100 << 20, "percent": 0.4, "path": "/tmp"},
        "load": [0.5, 1.25, 12.0],
        "cpu": 37.6,
    },
    "missing": "process 0: no answer for 3 s",
    "processes": [
        {"rss": 26 << 20, "threads": 5, "doing": []},
        {"rss": 800, "threads": 2, "doing": [{}, {}]},
    ],
    "step": "",
}
STARTING = {
    **MACHINE,
    "id": "m-51c2d0",
    "address": "m-51c2d0",
    "state": "STARTING",
    "uptime": None,
    "detail": {},
    "notice": None,
    "unhealthy": None,
    "keepalive": {"next": None, "replies": [], "late": False},
    "vitals": None,
    "missing": None,
    "processes": [],
    "step": "upload",
}
STOPPED = {
    **STARTING,
    "id": "m-c0ffee",
    "address": "https://10.0.0.7:443/m-c0ffee/",
    "state": "STOPPED",
    "uptime": 7400.0,
    "error": "machine https://10.0.0.7:443/m-c0ffee/ has stopped: killed by signal 9",
    "step": "",
}
DOCUMENT: dict[str, Any] = {
    "now": 1000.0,
    "session": {
        "name": "s-1a2b3c4d",
        "system": "ec2",
        "program": "bigpi.py",
        "began": 910.0,
        "pid": 77,
        "host": "ada",
        "hourly": 1.25,
        "cost": 0.031,
        "ended": None,
        "failed": None,
    },
    "counts": {"RUNNING": 1, "STARTING": 1, "STOPPED": 1},
    "machines": [MACHINE, STARTING, STOPPED],
    "methods": [
        {"method": "PI.sample", "served": {**FIGURES, "rate": None}, "called": FIGURES},
        {"method": "PI.reset", "served": None, "called": {**FIGURES, "seconds": 0.1, "p99": None}},
    ],
    "captures": [{"machine": "m-7f3a9c", "time": 950.0, "reason": "memory is at 97 %", "files": ["/tmp/a/heap.pb.gz"]}],
}
GOLDEN = Path(__file__).with_name("status_text.txt")


def test_the_text() -> None:
    assert text.status(DOCUMENT) == GOLDEN.read_text()


def test_the_text_of_nothing() -> None:
    session = {**DOCUMENT["session"], "cost": None, "program": "", "ended": 970.0, "failed": "ValueError: no"}
    nothing = {**DOCUMENT, "session": session, "counts": {}, "machines": [], "methods": [], "captures": []}
    assert text.status(nothing) == (
        "bigmachine (pid 77 on ada): session s-1a2b3c4d, system ec2, 1m00s\n"
        "machines: none\nfailed: ValueError: no\nended\n"
    )


def test_a_late_keepalive_as_text() -> None:
    late = {**MACHINE, "keepalive": {"next": -3.0, "replies": [], "late": True}}
    assert "  late  " in text.status({**DOCUMENT, "machines": [late]})


def test_many_methods_as_text() -> None:
    methods = [
        {"method": f"S.m{number:03}", "served": None, "called": {**FIGURES, "seconds": float(number)}}
        for number in range(60)
    ]
    said = text.status({**DOCUMENT, "methods": methods})
    assert "S.m059" in said
    assert "S.m009" not in said
    assert "and 10 more" in said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        *((None, "–"), (0.0, "0us"), (0.0009, "900us"), (0.25, "250ms"), (1.0, "1.0s"), (59.4, "59s"), (59.6, "1m00s")),
        *((3599.7, "1h00m"), (86399.0, "23h59m"), (86400.0, "1d00h"), (273600.0, "3d04h")),
    ],
)
def test_durations(seconds: float | None, said: str) -> None:
    assert text.duration(seconds) == said


@pytest.mark.parametrize(
    ("amount", "said"),
    [
        *((0, "0B"), (999, "999B"), (1000, "1.0K"), (26 << 20, "26M"), (10188 << 10, "9.9M")),
        *((252 << 30, "252G"), (1 << 60, "1048576T")),
    ],
)
def test_sizes(amount: int, said: str) -> None:
    assert text.size(amount) == said


# -- Real processes ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_machines(hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process stands still, one machine dies: the others are to be seen."""
    monkeypatch.setattr(monitor, "WAIT", 2.0)
    with bigmachine.start(LocalLauncher(maxprocs=2)) as b:
        machines = b.start(3, {"Counted": parallel()})
        for machine in machines:
            machine.call("Counted.count", 1)
        watching = Monitor(b)
        first = watching.snapshot().value
        pids = {}
        for machine in machines:
            found = machine_of(first, machine)
            assert [each["process"] for each in found["processes"]] == ["supervisor", "0", "1"]
            assert found["missing"] is None
            assert found["vitals"]["memory"]["processes"] > 1_000_000
            pids[machine.id] = [each["pid"] for each in found["processes"]]
        assert len({pid for each in pids.values() for pid in each}) == 9
        well, still, dead = machines
        os.kill(pids[still.id][1], signal.SIGSTOP)
        os.kill(pids[dead.id][2], signal.SIGKILL)
        try:
            dead.wait(State.STOPPED, timeout=SOON)
            document = watching.snapshot(fresh=True).value
        finally:
            os.kill(pids[still.id][1], signal.SIGCONT)
        assert machine_of(document, well)["missing"] is None
        assert machine_of(document, still)["missing"].startswith("process 0: no answer for ")
        assert machine_of(document, still)["vitals"] is not None
        assert "SIGKILL" in machine_of(document, dead)["error"]
        assert document["counts"] == {"RUNNING": 2, "STOPPED": 1}
        (figures,) = document["methods"]
        assert figures["served"]["count"] == 3  # The dead one's, too.


def parallel() -> Any:
    """A service. Its class travels by value: machines do not import this file."""

    class Counted:
        @bigmachine.parallel
        def count(self, n: int) -> int:
            return n + 1

    return Counted()


@pytest.mark.parametrize(
    ("machines", "lookers", "expected"),
    [(1, 1, (2.0, 2.0)), (40, 20, (2.0, 2.0)), (5, 50, (2.0, 5.0)), (200, 1, (5.0, 5.0)), (200, 80, (5.0, 8.0))],
)
def test_many_are_asked_and_look_less_often(machines: int, lookers: int, expected: tuple[float, float]) -> None:
    assert monitor.pace(machines, lookers) == expected


def test_who_looks_is_told_when_to_come_back(
    session: Session, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "POLLS", 1 / monitor.INTERVAL)  # One look in an interval is enough.
    watched = monitor.of(session)
    assert watched.snapshot().value["poll"] == monitor.INTERVAL
    for _ in range(20):
        watched.current()
    assert watched.snapshot(fresh=True).value["poll"] == 22 * monitor.INTERVAL
