"""Which calls run now: of machines in this process, and of real ones."""

from __future__ import annotations

import gc
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import bigmachine
from bigmachine.machine import Machine
from bigmachine.profiling.doing import Doing
from bigmachine.session import Session
from bigmachine.systems.local import LocalLauncher
from bigmachine.testing import TestSystem
from bigmachine.testing.conformance import SOON, eventually

HERE = Path(__file__).name


def idle() -> Any:
    """A service. Its class travels by value: machines do not import this file."""

    class Idle:
        def setup(self, b: Session) -> None:
            import threading

            self.done = threading.Event()

        def stop(self) -> None:
            self.done.set()

        def wait(self, data: bytes = b"") -> None:
            self.done.wait(20.0)

        @bigmachine.parallel
        def share(self) -> None:
            self.done.wait(20.0)

        async def rest(self, data: bytes = b"") -> None:
            import asyncio

            while not self.done.is_set():
                await asyncio.sleep(0.01)

        async def hog(self) -> None:
            self.done.wait(20.0)

        def steps(self) -> Iterator[int]:
            yield 1
            self.done.wait(20.0)

        async def paces(self) -> AsyncIterator[int]:
            import asyncio

            yield 1
            while not self.done.is_set():
                await asyncio.sleep(0.01)

    return Idle()


def started(b: Session, n: int = 1) -> list[Machine]:
    machines = b.start(n, {"Idle": idle()})
    for machine in machines:
        machine.wait(timeout=SOON)
    return machines


def told(machine: Machine) -> list[Doing]:
    """Of all its processes."""
    return [each for name, client in machine.processes[1:] for each in client.call("Process.doing", (), {}, SOON)]


def shows(machine: Machine, *methods: str) -> list[Doing]:
    """Waits until exactly these run, and each has come to its method's code."""
    found: list[list[Doing]] = []

    def as_wanted() -> bool:
        found.append(told(machine))
        there = all(each.where.endswith(f"<locals>.{each.method}") for each in found[-1])
        return there and sorted(each.method for each in found[-1]) == sorted(methods)

    eventually(as_wanted, f"{', '.join(methods) or 'nothing'} runs")
    return found[-1]


@pytest.fixture(scope="module")
def local() -> Iterator[Session]:
    with bigmachine.start(LocalLauncher(maxprocs=2)) as b:
        yield b


LARGE = bytes(1 << 20)
"""Its call has a stream of its own."""


@pytest.mark.parametrize("args", [(), (LARGE,)], ids=["small", "large"])
@pytest.mark.parametrize("method", ["wait", "rest"])
def test_a_call_shows_while_it_runs(local: Session, method: str, args: tuple[bytes, ...]) -> None:
    (machine,) = started(local)
    call = machine.submit(f"Idle.{method}", *args)
    (first,) = shows(machine, f"Idle.{method}")
    assert re.fullmatch(rf"{HERE}:\d+ idle\.<locals>\.Idle\.{method}", first.where)
    assert first.thread
    (second,) = told(machine)
    assert 0 <= first.seconds < second.seconds < SOON
    machine.submit("Idle.stop").result(SOON)
    call.result(SOON)
    assert told(machine) == []
    machine.shutdown()


@pytest.mark.parametrize("method", ["steps", "paces"])
def test_a_generator_shows_where_it_waits(local: Session, method: str) -> None:
    (machine,) = started(local)
    stream = machine.stream(f"Idle.{method}")
    assert next(stream) == 1
    shows(machine, f"Idle.{method}")
    machine.submit("Idle.stop").result(SOON)
    assert list(stream) == []
    machine.shutdown()


def test_a_method_that_blocks_the_event_loop(local: Session) -> None:
    (machine,) = started(local)
    calls = [machine.submit("Idle.rest"), machine.submit("Idle.hog")]
    shows(machine, "Idle.rest", "Idle.hog")
    machine.submit("Idle.stop").result(SOON)
    for call in calls:
        call.result(SOON)
    machine.shutdown()


def test_each_process_tells_of_its_own(local: Session) -> None:
    (machine,) = started(local)
    calls = [machine.submit("Idle.share") for _ in range(2)]
    shows(machine, "Idle.share", "Idle.share")
    assert [len(client.call("Process.doing", (), {}, SOON)) for _, client in machine.processes[1:]] == [1, 1]
    machine.cancel()
    assert all(call.exception(SOON) is not None for call in calls)


def test_one_that_is_cancelled_shows_until_it_ends(local: Session) -> None:
    (machine,) = started(local)
    call = machine.submit("Idle.wait")
    shows(machine, "Idle.wait")
    call.cancel()
    assert [each.method for each in told(machine)] == ["Idle.wait"]
    machine.submit("Idle.stop").result(SOON)
    shows(machine)
    machine.shutdown()


def test_the_longest_first_and_no_more_than_asked_for(local: Session) -> None:
    (machine,) = started(local)
    for number in range(3):
        machine.submit("Idle.wait")
        shows(machine, *["Idle.wait"] * (number + 1))
    lengths = [each.seconds for each in told(machine)]
    assert lengths == sorted(lengths, reverse=True)
    _, (_, client) = machine.processes[:2]
    (longest,) = client.call("Process.doing", (1,), {}, SOON)
    assert longest.seconds > lengths[0]
    machine.cancel()


def test_machines_of_one_process_are_told_apart() -> None:
    with bigmachine.start(TestSystem(maxprocs=1)) as b:
        one, two = started(b, 2)
        calls = [one.submit("Idle.wait"), one.submit("Idle.rest"), two.submit("Idle.rest"), two.submit("Idle.hog")]
        shows(one, "Idle.wait", "Idle.rest")
        shows(two, "Idle.rest", "Idle.hog")
        for machine in (one, two):
            machine.submit("Idle.stop").result(SOON)
        for call in calls:
            call.result(SOON)
        assert told(one) == told(two) == []


def test_asking_leaves_no_garbage() -> None:
    with bigmachine.start(TestSystem(maxprocs=1)) as b:
        (machine,) = started(b)
        call = machine.submit("Idle.wait")
        shows(machine, "Idle.wait")
        gc.collect()
        gc.disable()
        try:
            gc.set_debug(gc.DEBUG_SAVEALL)
            shows(machine, "Idle.wait")
            gc.collect()
            frames = [each.f_code.co_filename for each in gc.garbage if isinstance(each, FrameType)]
            assert not [file for file in frames if "profiling" in file]  # Others may have ended just then.
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        machine.submit("Idle.stop").result(SOON)
        call.result(SOON)


def test_a_call_that_waits_for_its_turn_counts_from_its_turn() -> None:
    with bigmachine.start(TestSystem(maxprocs=1)) as b:
        (machine,) = started(b)
        client = dict(machine.processes)["0"]
        calls = [machine.submit("Idle.share") for _ in range(3)]
        (first,) = shows(machine, "Idle.share")
        assert client.call("Process.doing", (), {}, SOON)[0].thread == first.thread
        machine.submit("Idle.stop").result(SOON)
        for call in calls:
            call.result(SOON)
