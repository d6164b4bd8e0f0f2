"""What a machine's supervisor tells of its service processes, in which order, and when."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import pytest

from bigmachine.authority import Authority
from bigmachine.credentials import Role
from bigmachine.info import Notice
from bigmachine.rpc.reactor import Reactor, reactor
from bigmachine.supervisor.death import Death
from bigmachine.supervisor.output import OutputCapture
from bigmachine.supervisor.processes import Processes
from bigmachine.supervisor.workers import POLL, Event, ProcessWorkers

AT_ONCE = POLL / 2
"""Seconds that the reader of events may take: far more than it needs, and less than where it is not woken."""

DEATH = Death(0, 4711, 3, None, False, "about to go\n", 1.0)


class FakeProcesses:
    """One service process, whose output and death are the test's to make."""

    def __init__(self) -> None:
        self.capture: OutputCapture
        self.die: Callable[[Death], None]
        self.fd = -1
        self.sent: list[tuple[int, str, Any]] = []
        self.gone: set[int] = set()

    def send(self, process: int, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
        """As processes that do all at once: they have set their services up when they are told which."""
        if process in self.gone:
            raise BrokenPipeError
        self.sent.append((process, message["type"], message.get("deadline")))
        if message["type"] == "services":
            self.say(process, {"type": "installed"}, [])

    def start_replicas(self, count: int, single_threaded: bool) -> None:
        for process in range(1, count):
            self.say(process, {"type": "ready"}, [])

    def attach(
        self, reactor: Reactor, output: OutputCapture, on_message: Any, on_exit: Callable[[Death], None]
    ) -> None:
        self.capture, self.die, self.say = output, on_exit, on_message
        read, self.fd = os.pipe()
        output.add(0, "stdout", read)

    def write(self, data: bytes) -> None:
        """Returns when the supervisor has read it."""
        os.write(self.fd, data)
        self.capture.last_output(0)

    def end(self) -> None:
        """Its pipe has no writer any more."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def stop(self, grace: float) -> list[int]:
        self.end()
        return []


class Reader:
    """Who reads the events, on a thread."""

    def __init__(self, workers: ProcessWorkers) -> None:
        self.events: list[Event] = []
        self._changed = threading.Condition()
        self._workers = workers
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for event in self._workers.events(lambda: False):
            with self._changed:
                self.events.append(event)
                self._changed.notify_all()

    def wait(self, *kinds: str) -> None:
        """Until these have come, in this order, and no others."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.events) >= len(kinds), AT_ONCE), self.events
            assert [event[0] for event in self.events] == list(kinds)

    def join(self) -> None:
        self._thread.join(AT_ONCE)
        assert not self._thread.is_alive(), "the events do not end"


@pytest.fixture
def processes() -> FakeProcesses:
    return FakeProcesses()


@pytest.fixture
def workers(processes: FakeProcesses) -> Iterator[ProcessWorkers]:
    credentials = Authority("s-workers").issue(Role.MACHINE, "m-000001")
    workers = ProcessWorkers(cast(Processes, processes), "m-000001", credentials, "", 3, reactor())
    yield workers
    workers.stop(0.0)


@pytest.mark.parametrize("held", [False, True], ids=["ended", "held open"])
def test_a_death_is_told_with_the_last_words_before_it(
    workers: ProcessWorkers, processes: FakeProcesses, held: bool
) -> None:
    """What it has started may hold its pipes open; and its last words are read together with the news of its death."""
    processes.write(b"about to go\n")
    processes.die(DEATH)
    if not held:
        processes.end()
    reader = Reader(workers)
    reader.wait("output", "death")
    assert reader.events == [
        ("output", 0, "stdout", b"about to go\n"),
        ("death", DEATH.summary(), DEATH.last_output),
    ]
    workers.stop(0.0)
    reader.join()


def test_a_death_is_told_while_somebody_talks_without_end(workers: ProcessWorkers, processes: FakeProcesses) -> None:
    processes.write(b"about to go\n")
    processes.die(DEATH)
    told = []
    for event in workers.events(lambda: False):
        told.append(event[0])
        if len(told) == 2:
            break
        processes.write(b"still here\n")  # There is something to read at each look.
    assert told == ["output", "death"]


def test_a_death_after_the_end_of_the_output(workers: ProcessWorkers, processes: FakeProcesses) -> None:
    processes.end()
    reader = Reader(workers)
    processes.die(DEATH)
    reader.wait("death")
    workers.log("somebody knocks")
    reader.wait("death", "log")
    workers.stop(0.0)
    reader.join()
    reader.wait("death", "log")  # Once.


def test_whoever_has_told_of_a_death_waits_for_the_end(
    workers: ProcessWorkers, processes: FakeProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rather than look again and again, at the cost of the calls that the supervisor has to answer then."""
    looks = []
    read = processes.capture.read
    monkeypatch.setattr(processes.capture, "read", lambda timeout: (looks.append(timeout), read(timeout))[1])
    processes.end()
    processes.die(DEATH)
    reader = Reader(workers)
    reader.wait("death")
    time.sleep(0.05)  # For nothing to happen.
    assert len(looks) < 10
    workers.stop(0.0)
    reader.join()


def test_a_machine_that_is_stopped_has_no_death_to_tell(workers: ProcessWorkers, processes: FakeProcesses) -> None:
    reader = Reader(workers)
    processes.write(b"bye\n")
    workers.stop(0.0)
    processes.die(DEATH)
    reader.join()
    reader.wait("output")
    assert workers.obituary() is None


INTERRUPTION = Notice("interruption", 1234.5, "the instance will be terminated")
REBALANCE = Notice("rebalance", None, "the instance may be terminated")


def drained(processes: FakeProcesses) -> list[tuple[int, float]]:
    return [(process, deadline) for process, kind, deadline in processes.sent if kind == "drain"]


@pytest.mark.parametrize("replicas", [False, True])
def test_an_interruption_drains_every_process_that_holds_services(
    workers: ProcessWorkers, processes: FakeProcesses, replicas: bool
) -> None:
    processes.say(0, {"type": "ready", "single_threaded": True}, [])
    assert workers.install(b"blob", replicas, AT_ONCE) is None
    workers.notice(REBALANCE)
    assert drained(processes) == []
    workers.notice(INTERRUPTION)
    assert drained(processes) == [(process, 1234.5) for process in range(3 if replicas else 1)]
    reader = Reader(workers)
    reader.wait("notice", "notice")
    assert reader.events == [("notice", *vars(REBALANCE).values()), ("notice", *vars(INTERRUPTION).values())]


def test_an_interruption_before_there_are_services(workers: ProcessWorkers, processes: FakeProcesses) -> None:
    workers.notice(INTERRUPTION)
    assert processes.sent == []
    processes.say(0, {"type": "ready", "single_threaded": True}, [])
    workers.install(b"blob", True, AT_ONCE)
    assert [kind for process, kind, _ in processes.sent if process == 2] == ["identity", "services", "drain"]
    assert drained(processes) == [(process, 1234.5) for process in range(3)]


def test_a_process_that_has_ended_keeps_no_other_from_being_drained(
    workers: ProcessWorkers, processes: FakeProcesses
) -> None:
    processes.say(0, {"type": "ready", "single_threaded": True}, [])
    workers.install(b"blob", True, AT_ONCE)
    processes.gone.add(1)
    workers.notice(INTERRUPTION)
    assert [process for process, _ in drained(processes)] == [0, 2]


def test_a_notice_wakes_whoever_reads_the_events(workers: ProcessWorkers, processes: FakeProcesses) -> None:
    processes.end()
    reader = Reader(workers)
    workers.notice(REBALANCE)
    reader.wait("notice")
    workers.log("somebody knocks")
    reader.wait("notice", "log")
