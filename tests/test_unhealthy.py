"""What the driver does about machines that run out of memory."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bigmachine
from bigmachine import State
from bigmachine.errors import MachineStopped
from bigmachine.inside import unhealthy
from bigmachine.inside.unhealthy import AT_ONCE, MOST, Captures
from bigmachine.machine import Machine
from bigmachine.profiling import objects
from bigmachine.session import Session
from bigmachine.testing import TestSystem
from bigmachine.testing.conformance import SOON, eventually

KILLED = "service process 0 (pid 1) was killed by the kernel for lack of memory (out-of-memory killer)"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where captures go when nobody has said where: they stay when the session ends."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


class Hoard:
    def __init__(self) -> None:
        self.kept: list[bytearray] = []

    def keep(self, size: int) -> None:
        self.kept.append(bytearray(size))


class Cluster:
    def __init__(self, session: Session, system: TestSystem, machines: list[Machine]) -> None:
        self.session = session
        self.system = system
        self.machines = machines


@contextlib.contextmanager
def running(n: int = 1, **options: Any) -> Iterator[Cluster]:
    system = TestSystem()
    with bigmachine.start(system, **options) as session:
        machines = session.start(n, {"Hoard": Hoard()})
        for machine in machines:
            machine.wait(State.RUNNING, SOON)
        yield Cluster(session, system, machines)


def kinds(session: Session) -> list[str]:
    found = [event.kind for event in session.events.since(0)]
    return [kind for kind in found if kind in ("machine.unhealthy", "capture.saved")]


def test_what_fills_it_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is pytest's own process, whose many objects are not to be counted all."""
    monkeypatch.setattr(objects, "SECONDS", 10.0)
    with running(2, logdir=str(tmp_path / "logs")) as cluster:
        machine, other = cluster.machines
        machine.call("Hoard.keep", 64 << 20)
        cluster.system.fill(machine, 97.0)
        eventually(lambda: cluster.session.captures, "a capture", 20.0)
        assert machine.unhealthy == "97.0 % of the memory of its host is in use: 15.52 of 16.00 GiB"
        assert other.unhealthy == other.saved == ""
        (capture,) = cluster.session.captures
        assert (capture["machine"], capture["reason"]) == (machine.id, machine.unhealthy)
        folder = Path(machine.saved)
        assert folder.parent == tmp_path / "logs"
        assert folder.name.startswith(f"unhealthy-{machine.id}-")
        assert sorted(capture["files"]) == sorted(str(file) for file in folder.iterdir())
        names = {file.name for file in folder.iterdir()}
        assert names == {"heap.pb.gz", "threads.txt", "vars.json", "status.txt"}
        assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert b"[objects] " in gzip.decompress((folder / "heap.pb.gz").read_bytes())
        assert (folder / "threads.txt").read_text().startswith("threads: ")
        said = json.loads((folder / "vars.json").read_text())
        assert said["variables"]['bigmachine_rpc_calls_total{end="server",method="Hoard.keep"}'] == 1
        assert machine.unhealthy in (folder / "status.txt").read_text()
        assert kinds(cluster.session) == ["machine.unhealthy", "capture.saved"]
        cluster.system.fill(machine, 50.0)
        eventually(lambda: not machine.unhealthy, "that it is well again")
    assert (folder / "heap.pb.gz").exists()
    lines = capsys.readouterr().err
    assert f"bigmachine: machine {machine.addr} is unhealthy: 97.0 %" in lines
    assert f"is saved in {folder}: " in lines
    assert re.search(r"is saved in .*: .*\d MiB \w", lines)
    assert f"bigmachine: machine {machine.addr} has memory again: 50.0 %" in lines


def test_at_most_once_a_minute() -> None:
    with running() as cluster:
        (machine,) = cluster.machines
        for _ in range(3):
            cluster.system.fill(machine, 97.0)
            eventually(lambda: machine.unhealthy, "that its memory runs short")
            eventually(lambda: cluster.session.captures, "a capture", 20.0)
            cluster.system.fill(machine, 80.0)
            eventually(lambda: not machine.unhealthy, "that it is well again")
    assert len(cluster.session.captures) == 1
    assert kinds(cluster.session) == ["machine.unhealthy", "capture.saved", "machine.unhealthy", "machine.unhealthy"]


def test_at_most_so_many() -> None:
    with running(2) as cluster:
        session = cluster.session
        session.captures.extend({"machine": "m-1", "time": 0.0, "reason": "", "files": []} for _ in range(MOST - 1))
        for machine in cluster.machines:
            cluster.system.fill(machine)
            eventually(lambda: len(session.captures) == MOST, "the last capture", 20.0)
            eventually(lambda machine=machine: machine.unhealthy, "that its memory runs short")
    assert len(session.captures) == MOST
    assert [bool(machine.saved) for machine in cluster.machines] == [True, False]


def test_without_a_directory_of_the_user_s(temporary: Path) -> None:
    with running() as cluster:
        (machine,) = cluster.machines
        cluster.system.fill(machine)
        eventually(lambda: cluster.session.captures, "a capture", 20.0)
        base = Path(machine.saved).parent
        assert base.parent == temporary
        assert base.name.startswith(f"bigmachine-{cluster.session.name}-")
        assert stat.S_IMODE(base.stat().st_mode) == 0o700


def test_two_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, at_once, most, done = threading.Semaphore(0), 0, 0, []
    lock = threading.Lock()

    def capture(self: Captures, machine: Machine, reason: str) -> None:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        go_on.acquire()
        with lock:
            at_once -= 1
            done.append(machine.id)

    monkeypatch.setattr(Captures, "_capture", capture)
    with running(5) as cluster:
        for machine in cluster.machines:
            cluster.system.fill(machine)
            eventually(lambda machine=machine: machine.unhealthy, "that its memory runs short")
        well = cluster.machines[-1]
        cluster.system.fill(well, 10.0)
        eventually(lambda: not well.unhealthy, "that it is well again")
        eventually(lambda: at_once == AT_ONCE, "captures under way")
        for _ in cluster.machines[:-1]:
            go_on.release()
        eventually(lambda: len(done) == 4, "all that are still unhealthy")
        assert (most, sorted(done)) == (AT_ONCE, sorted(machine.id for machine in cluster.machines[:-1]))


def test_who_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = threading.Event()

    def hang(self: Captures, machine: Machine, folder: Path, gone: threading.Event) -> list[str]:
        gone.wait(60.0)
        stopped.set()
        return []

    def fail(self: Captures, machine: Machine, folder: Path, gone: threading.Event) -> None:
        raise ValueError("no threads today")

    monkeypatch.setattr(Captures, "_save_heap", hang)
    monkeypatch.setattr(Captures, "_save_threads", fail)
    monkeypatch.setattr(unhealthy, "WITHIN", 0.3)
    with running() as cluster:
        (machine,) = cluster.machines
        cluster.system.fill(machine)
        eventually(lambda: cluster.session.captures, "a capture")
        missing = (Path(machine.saved) / "missing.txt").read_text()
        assert "heap: no answer\nthreads: no threads today\n" in missing
        assert stopped.wait(SOON)


def test_the_end_of_the_session_ends_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, stopped = threading.Event(), threading.Event()

    def hang(self: Captures, machine: Machine, folder: Path, gone: threading.Event) -> list[str]:
        begun.set()
        gone.wait(60.0)
        stopped.set()
        return []

    monkeypatch.setattr(Captures, "_save_heap", hang)
    with running() as cluster:
        cluster.system.fill(cluster.machines[0])
        assert begun.wait(SOON)
    assert stopped.wait(SOON)


def test_a_directory_that_cannot_be_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = tmp_path / "reports"
    with running(bundle=str(reports)) as cluster:
        (machine,) = cluster.machines
        reports.rmdir()
        reports.write_text("no directory any more")
        cluster.system.fill(machine)
        said: list[str] = []
        eventually(lambda: said.append(capsys.readouterr().err) or "cannot save" in "".join(said), "a complaint")
        assert machine.call("Hoard.keep", 1) is None
        assert cluster.session.captures == []


def test_a_machine_that_starts_is_not_asked() -> None:
    with running() as cluster:
        (machine,) = cluster.machines
        machine.shutdown()
        cluster.session.fleet.unhealthy(machine, ("unhealthy", 96.0, 96, 100, "nearly full"))
        assert machine.saved == ""


def test_the_error_of_a_kill_says_where_to_look() -> None:
    with running() as cluster:
        (machine,) = cluster.machines
        cluster.system.fill(machine)
        eventually(lambda: cluster.session.captures, "a capture", 20.0)
        cluster.system.crash(machine, KILLED)
        machine.wait(State.STOPPED, SOON)
        with pytest.raises(MachineStopped) as caught:
            machine.call("Hoard.keep", 1)
        assert f"{KILLED}; what was saved when its memory ran short is in {machine.saved}" in str(caught.value)

        def last() -> Any:
            return [event for event in cluster.session.events.since(0) if event.kind == "machine.state"][-1].fields

        eventually(lambda: last()["state"] == "STOPPED", "the event, which comes after the state")
        assert "for lack of memory" in last()["error"]
        assert machine.saved in last()["error"]


# -- A kernel that kills -------------------------------------------------------------------------------------------------

PROGRAM = """
import time
from bigmachine import driver, errors
from bigmachine.supervisor.pressure import GROUP, Meter

def full():
    return max(reading.percent for reading in Meter().read() if reading.whose == GROUP) > 96

class Hoard:
    def __init__(self):
        self.kept = []

    def keep(self, size):
        self.kept.append(bytearray(b"x") * size)

with driver.start() as b:
    (machine,) = b.start(1, {"Hoard": Hoard()})
    machine.wait()
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if b.captures or not full():
                machine.call("Hoard.keep", 2 << 20)
            else:
                time.sleep(0.01)
    except errors.MachineStopped as error:
        print("unhealthy:", machine.unhealthy)
        print("captures:", len(b.captures))
        print("error:", str(error).splitlines()[0])
"""

LIMIT = 400 << 20


@pytest.fixture
def control_group() -> Iterator[Path]:
    """One that may use `LIMIT` bytes, where we may make such."""
    folder = Path("/sys/fs/cgroup/memory") / f"bigmachine-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no control group can be made here")
    try:
        (folder / "memory.limit_in_bytes").write_text(str(LIMIT))
        yield folder
    finally:
        eventually(lambda: not (folder / "cgroup.procs").read_text(), "the end of its processes", 20.0)
        folder.rmdir()


@pytest.mark.slow
def test_a_machine_that_the_kernel_kills(tmp_path: Path, control_group: Path) -> None:
    command = ["sh", "-c", f'echo $$ > {control_group}/cgroup.procs && exec "$@"', "sh", sys.executable, "-c", PROGRAM]
    flags = [f"-bigm.bundle={tmp_path / 'reports'}", f"-bigm.events={tmp_path / 'events'}", "-bigm.http=off"]
    done = subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert "of the memory of its control group is in use" in said["unhealthy"], done.stderr
    assert said["captures"] == "1", done.stderr
    assert "was killed by the kernel for lack of memory (out-of-memory killer); what was saved" in said["error"]
    (folder,) = (tmp_path / "reports").iterdir()
    assert str(folder) in said["error"]
    assert b"bytearray" in gzip.decompress((folder / "heap.pb.gz").read_bytes())
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert "capture.saved" in [event["kind"] for event in events]
    assert "for lack of memory" in next(event["error"] for event in events if event.get("state") == "STOPPED")
