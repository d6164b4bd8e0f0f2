"""Profiles of a session's processes, merged: of machines in this process, and of real ones."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pprof_schema import Read, read

import bigmachine
from bigmachine import State
from bigmachine.errors import Unreachable, UsageError
from bigmachine.inside import profiles
from bigmachine.inside.profiles import Taken, take
from bigmachine.machine import Machine
from bigmachine.profiling.values import Profile
from bigmachine.rpc.calling import raiser
from bigmachine.rpc.calls import Call
from bigmachine.session import Session
from bigmachine.systems.local import LocalLauncher
from bigmachine.testing import TestSystem
from bigmachine.testing.conformance import SOON, eventually


def busy() -> Any:
    """A service. Its class travels by value: machines do not import this file."""

    class Busy:
        def setup(self, b: Session) -> None:
            import threading

            self.session = b
            self.done = threading.Event()
            self.kept: list[bytes] = []

        def stop(self) -> None:
            self.done.set()

        @bigmachine.parallel
        def spin(self, seconds: float) -> None:
            import time

            end = time.monotonic() + seconds
            while time.monotonic() < end:
                sum(range(1000))

        def wait(self) -> None:
            self.done.wait(20.0)

        async def rest(self) -> None:
            import asyncio

            while not self.done.is_set():
                await asyncio.sleep(0.01)

        def steps(self) -> Iterator[int]:
            while not self.done.is_set():
                sum(range(1000))
                yield 1

        def keep(self, size: int) -> None:
            self.kept.append(bytes(size))

        def refuse(self) -> str:
            try:
                self.session.profile()
            except Exception as error:
                return str(error)
            return ""

    return Busy()


@pytest.fixture(scope="module")
def local() -> Iterator[tuple[Session, list[Machine]]]:
    with bigmachine.start(LocalLauncher(maxprocs=2)) as b:
        machines = b.start(2, {"Busy": busy()})
        for machine in machines:
            machine.wait()
        yield b, machines


def decoded(taken: Taken) -> Read:
    return read(taken.pprof())


def methods(found: Read, type_: str) -> dict[tuple[str, str, str], int]:
    """Values by machine, process and method of the calls."""
    sums: dict[tuple[str, str, str], int] = {}
    for _, values, labels in found.samples:
        if labels.get("service") == "Busy":
            key = labels["machine"], labels["process"], labels["method"]
            sums[key] = sums.get(key, 0) + values[type_]
    return sums


def test_processor_time_of_all_processes(local: tuple[Session, list[Machine]]) -> None:
    b, (one, two) = local
    calls = [one.submit("Busy.spin", 3.0), one.submit("Busy.spin", 3.0), two.submit("Busy.wait"), two.submit("Busy.rest")]
    taken = take(b, "profile", "0.4")
    two.call("Busy.stop")
    for call in calls:
        call.result(SOON)
    found = decoded(taken)
    ran, passed = methods(found, "cpu"), methods(found, "wall")
    assert set(taken.processes) == {("driver", "driver"), *((each.addr, number) for each in (one, two) for number in "01")}
    assert not taken.missing
    spun = ran[one.addr, "0", "spin"], ran[one.addr, "1", "spin"]
    waited = (two.addr, "0", "wait")
    assert min(spun) > 10 * ran[waited]
    assert passed[waited] > 100_000_000
    assert any(stack[0][0].endswith("Busy.spin") for stack, _, labels in found.samples if labels.get("method") == "spin")
    assert {labels["machine"] for _, _, labels in found.samples} == {"driver", one.addr, two.addr}
    assert 0.3 < found.duration / 1e9 < 5.0


def test_threads_and_tasks(local: tuple[Session, list[Machine]]) -> None:
    b, _ = local
    (machine,) = b.start(1, {"Busy": busy()})
    calls = [machine.submit("Busy.wait"), machine.submit("Busy.rest")]
    stream = machine.stream("Busy.steps")
    next(stream)
    texts: list[str] = []

    def all_there() -> bool:
        taken = take(b, "threads", machine=machine)
        texts.append(taken.text())
        assert {where for where, _ in taken.processes} == {machine.addr}
        return {"wait", "rest", "steps"} <= {labels.get("method") for _, _, labels in decoded(taken).samples}

    machine.wait()
    eventually(all_there, "all calls show")
    machine.call("Busy.stop")
    stream.close()
    for call in calls:
        call.result(SOON)
    assert "method=rest process=0 service=Busy task=" in texts[-1]
    machine.shutdown()


def test_heap_says_what_a_method_keeps(local: tuple[Session, list[Machine]]) -> None:
    b, (one, _) = local
    take(b, "heap", machine=one.id)
    one.call("Busy.keep", 3_000_000)
    found = read(b.profile("heap", machine=one.addr, gc=True))
    kept = [(values, labels) for stack, values, labels in found.samples if stack[0][0].endswith("Busy.keep")]
    assert kept[0][0]["inuse_space"] >= 3_000_000
    assert kept[0][1] == {"machine": one.addr, "process": "0"}
    assert found.default == "inuse_space"
    assert any("traced for" in comment for comment in found.comments)


def test_a_machine_that_stops_meanwhile_is_left_out(local: tuple[Session, list[Machine]]) -> None:
    b, (one, _) = local
    (lost,) = b.start(1, {"Busy": busy()})
    lost.wait()
    found: list[Taken] = []
    taking = threading.Thread(target=lambda: found.append(take(b, "profile", 2.0)))
    taking.start()
    eventually(lambda: any(each.name == "bigmachine-sampler" for each in threading.enumerate()), "the profile's begin")
    time.sleep(0.5)  # For the others, of whose samplers nobody tells.
    lost.cancel()
    taking.join(20.0)
    (taken,) = found
    assert {machine for machine, _ in taken.missing} == {lost.addr}
    assert (one.addr, "0") in taken.processes
    assert any(comment.startswith(f"{lost.addr} 0 is missing: machine") for comment in decoded(taken).comments)


def test_the_driver_alone(local: tuple[Session, list[Machine]]) -> None:
    taken = take(local[0], "threads", machine="driver")
    assert taken.processes == [("driver", "driver")]
    assert "test_the_driver_alone" in taken.text()


@pytest.mark.parametrize(
    ("kind", "seconds", "machine", "text"),
    [
        ("profile", 0, None, "seconds of a profile must be a number above 0, at most 3600: 0"),
        ("profile", -1, None, "at most 3600: -1"),
        ("heap", 1e9, None, "at most 3600: 1000000000.0"),
        ("profile", "abc", None, "at most 3600: 'abc'"),
        ("goroutine", 1, None, "no such profile: 'goroutine'; there are profile, heap, objects, threads"),
        ("heap", 1, "m-0", "no such machine is running: 'm-0'; there are driver, https://"),
    ],
)
def test_what_cannot_be(local: tuple[Session, list[Machine]], kind: str, seconds: Any, machine: str, text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text)):
        take(local[0], kind, seconds, machine=machine)


def test_an_error_lists_few_of_many_machines(monkeypatch: pytest.MonkeyPatch, local: tuple[Session, list[Machine]]) -> None:
    monkeypatch.setattr(profiles, "MAX_NAMES", 1)
    with pytest.raises(UsageError, match=r"there are driver and 2 more$"):
        take(local[0], "heap", machine="m-0")


def test_the_far_side_refuses_too(local: tuple[Session, list[Machine]]) -> None:
    with pytest.raises(UsageError, match="no such profile"):
        local[1][0].call("Process.profile", "goroutine", 1)


def test_a_service_does_not_take_profiles(local: tuple[Session, list[Machine]]) -> None:
    assert "taken by the driver" in local[1][0].call("Busy.refuse")


def test_a_profile_can_be_cancelled(local: tuple[Session, list[Machine]]) -> None:
    machine = local[1][0]

    def sampled() -> bool:
        found = decoded(take(local[0], "threads", machine=machine))
        return any(labels.get("thread") == "bigmachine-sampler" for _, _, labels in found.samples)

    call = machine.submit("Process.profile", "profile", 60.0)
    eventually(sampled, "it is sampled")
    call.cancel()
    eventually(lambda: not sampled(), "nothing is sampled any more")


# -- Machines in this process --------------------------------------------------------------------------------------------


def test_a_process_counts_once() -> None:
    with bigmachine.start(TestSystem(maxprocs=2)) as b:
        one, two = b.start(2, {"Busy": busy()})
        two.wait()
        call = one.submit("Busy.spin", 2.0)
        taken = take(b, "profile", 0.3)
        call.result(SOON)
    assert taken.processes == [("driver", "driver")]
    found = decoded(taken)
    assert methods(found, "cpu")["driver", "driver", "spin"] > 0
    assert f"{two.addr} 1 is in the same process as driver driver, and counted there" in found.comments


def test_who_does_not_answer_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(client: object, call: Call[Profile], *_: object) -> None:
        call.complete(raiser(TimeoutError()))  # As when one has waited for it.

    with bigmachine.start(TestSystem()) as b:
        (machine,) = b.start(1, {"Busy": busy()})
        machine.wait()
        monkeypatch.setattr(profiles, "_ask", ask)
        taken = take(b, "threads", 0.1)
        assert taken.missing == {(machine.addr, "0"): "no answer within 30 s"}
        with pytest.raises(Unreachable, match="there is nothing to make a profile of: no answer within 30 s"):
            take(b, "threads", 0.1, machine=machine)


def test_machines_that_do_not_run_are_not_asked() -> None:
    with bigmachine.start(TestSystem()) as b:
        (machine,) = b.start(1, {"Busy": busy()})
        machine.wait()
        machine.shutdown()
        assert machine.state is State.STOPPED
        assert take(b, "threads").processes == [("driver", "driver")]
        with pytest.raises(UsageError, match=r"there are driver$"):
            take(b, "threads", machine=machine)
