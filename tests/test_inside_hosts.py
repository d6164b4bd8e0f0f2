"""Seeing inside machines elsewhere, on real hosts of both kinds, when these fail: what is the same on all systems when nothing
does, `bigmachine.testing.conformance` has.

All hosts are started within one control group, so that a test can make their memory scarce.
"""

from __future__ import annotations

import contextlib
import gzip
import http.client
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pprof_schema
import pytest
from debug_pages import PATH
from hosts import ec2, network
from hosts.ec2 import FakeEc2
from hosts.network import Network, SshHost

import bigmachine
from bigmachine import Machine, State
from bigmachine.errors import MachineStopped
from bigmachine.inside import server
from bigmachine.inside.server import DebugServer
from bigmachine.session import Session
from bigmachine.system import Launcher
from bigmachine.systems.ec2 import Ec2Launcher
from bigmachine.systems.ssh import SshLauncher
from bigmachine.testing.conformance import eventually

pytestmark = pytest.mark.slow

WITHIN = 60.0
"""Seconds for a start, with much else to do."""

MEMORY = Path("/sys/fs/cgroup/memory")
"""Where control groups of version 1 are."""

OURS = f"{sys.version_info[0]}.{sys.version_info[1]}"


# -- Hosts of both kinds -------------------------------------------------------------------------------------------------


class Place(Protocol):
    """Where machines come from: two at a time, each on a host of its own."""

    steps: tuple[str, ...]
    """Of a launch; the boot's own come after them."""

    def launcher(self) -> Launcher: ...
    def flags(self) -> list[str]:
        """For a program, that it has machines from here."""
        ...

    def detail(self, machine: Machine) -> dict[str, str]:
        """What the page is to say of where it runs."""
        ...

    def hourly(self) -> float | None: ...
    def kill(self, machine: Machine) -> None:
        """Cut its host's power: nobody hears a thing."""
        ...

    def partition(self, machine: Machine) -> contextlib.AbstractContextManager[None]:
        """For the block, it neither hears nor is heard."""
        ...


class OverSsh:
    steps: tuple[str, ...] = ("ssh", "agent")

    def __init__(self, network: Network, folder: Path, group: Path | None) -> None:
        self._network = network
        self._config = folder / "config"
        self._group = group
        self._names = itertools.count(1)

    def _hosts(self) -> str:
        """Two; for those that a test has broken there are others."""
        while len(self._network.hosts) < 2:
            with within(self._group):
                host = self._network.host(f"h{next(self._names)}")
            if self._group is not None:  # Groups are to be seen there, as on most hosts.
                host.run("sh", "-c", f"mount -t tmpfs none {MEMORY.parent} && mkdir {MEMORY}")
                host.run("mount", "-t", "cgroup", "-o", "memory", "none", str(MEMORY))
        self._network.config(self._config)
        return ",".join(self._network.hosts)

    def launcher(self) -> Launcher:
        return SshLauncher(self._hosts(), str(self._config), maxprocs=1)

    def flags(self) -> list[str]:
        return ["-bigm.system=ssh", f"-bigm.hosts={self._hosts()}", f"-bigm.sshconfig={self._config}"]

    def _host(self, machine: Machine) -> SshHost:
        return next(host for host in self._network.hosts.values() if host.address == machine.hostname)

    def detail(self, machine: Machine) -> dict[str, str]:
        return {"host": self._host(machine).name}

    def hourly(self) -> float | None:
        return None

    def kill(self, machine: Machine) -> None:
        host = self._host(machine)
        host.unplug()  # Before its kernel can say farewell.
        host.close()

    def partition(self, machine: Machine) -> contextlib.AbstractContextManager[None]:
        return self._host(machine).partition()


class OnEc2:
    steps: tuple[str, ...] = ("api", "pending", "kernel", "cloud-init", "agent")

    def __init__(self, cloud: FakeEc2) -> None:
        self._cloud = cloud

    def launcher(self) -> Launcher:
        return Ec2Launcher(maxprocs=1)

    def flags(self) -> list[str]:
        return ["-bigm.system=ec2"]

    def _instance(self, machine: Machine) -> str:
        return next(id for id in self._cloud.live() if self._cloud.about(id).public == machine.hostname)

    def detail(self, machine: Machine) -> dict[str, str]:
        return {"instance": self._instance(machine), "type": "m7i.large", "market": "spot", "zone": "us-east-1a"}

    def hourly(self) -> float | None:
        from hosts.wares import SPOT_SHARE, on_demand  # moto, which is not everywhere.

        return SPOT_SHARE * on_demand("m7i.large")

    def kill(self, machine: Machine) -> None:
        self._cloud.kill(self._instance(machine))

    def partition(self, machine: Machine) -> contextlib.AbstractContextManager[None]:
        return self._cloud.partition(self._instance(machine))


@pytest.fixture(scope="module")
def group() -> Iterator[Path | None]:
    """A control group that all hosts are in; None where there can be none."""
    group = MEMORY / f"bigmachine-hosts-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    yield group
    eventually(lambda: not (group / "cgroup.procs").read_text(), "the end of all hosts", WITHIN)
    group.rmdir()


@contextlib.contextmanager
def within(group: Path | None) -> Iterator[None]:
    """Processes that are started in the block are in the group."""
    if group is None:
        yield
        return
    ours = re.search(r":memory:/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    before = MEMORY / ours[1] if ours is not None else MEMORY
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        # A container may see the path as its host knows it, while its own group is mounted as the root.
        ((before if before.is_dir() else MEMORY) / "cgroup.procs").write_text(str(os.getpid()))


@pytest.fixture(scope="module", params=["ssh", "ec2"])
def place(request: pytest.FixtureRequest, group: Path | None) -> Iterator[Place]:
    if reason := {"ssh": network.unavailable, "ec2": ec2.unavailable}[request.param]():
        pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        if request.param == "ssh":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            yield OverSsh(stack.enter_context(Network()), folder, group)
        else:
            with within(group):
                cloud = stack.enter_context(FakeEc2((OURS,)))
            for name, value in cloud.environ().items():
                patch.setenv(name, value)
            yield OnEc2(cloud)


# -- A session that is looked into ---------------------------------------------------------------------------------------


def worker() -> object:
    """A service; its class travels by value, as machines do not have this module."""

    class Worker:
        def __init__(self) -> None:
            self.kept: list[bytearray] = []

        def say(self, text: str) -> None:
            print(text, flush=True)

        def spin(self, seconds: float) -> None:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                pass

        def keep(self, size: int) -> None:
            self.kept.append(bytearray(b"x") * size)

    return Worker()


class Looked(NamedTuple):
    """A session with a debug server, and its machines, which run."""

    b: Session
    served: DebugServer
    machines: list[Machine]

    def get(self, path: str) -> tuple[dict[str, str], bytes]:
        """What is served there: headers, in lower case, and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.served.port, timeout=WITHIN)
        try:
            connection.request("GET", f"{PATH}/{path}")
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == 200, body
            return {name.lower(): value for name, value in answer.getheaders()}, body
        finally:
            connection.close()

    def entry(self, machine: Machine) -> dict[str, Any]:
        """What the page shows of it now."""
        shown: list[dict[str, Any]] = json.loads(self.get("status.json")[1])["machines"]
        return next(each for each in shown if each["id"] == machine.id)

    def kinds(self, machine: Machine) -> list[str]:
        """What has happened to it."""
        return [event.kind for event in self.b.events.since(0) if event.machine == machine.id]


@contextlib.contextmanager
def looked(place: Place, n: int = 2, lease: float = 120.0, **options: Any) -> Iterator[Looked]:
    with bigmachine.start(place.launcher(), http="off", **options) as b:
        b.fleet.lease = lease
        served = server.start(b, "localhost:0")
        assert served is not None
        b.at_end(served.close)
        machines = b.start(n, {"Worker": worker()})
        for machine in machines:
            machine.wait(State.RUNNING, WITHIN)
        yield Looked(b, served, machines)


def test_the_page_says_where_machines_are_and_how_they_came_up(place: Place) -> None:
    with looked(place) as session:
        for number, machine in enumerate(session.machines):
            machine.call("Worker.say", f"I am number {number}")
        if place.hourly() is not None:  # It is asked for when somebody looks.
            eventually(lambda: session.entry(session.machines[0])["hourly"], "a price", WITHIN)
        document = json.loads(session.get("status.json")[1])
        for number, machine in enumerate(session.machines):
            entry = session.entry(machine)
            assert entry["host"] == machine.hostname
            assert entry["detail"] == place.detail(machine)
            assert entry["hourly"] == (None if place.hourly() is None else pytest.approx(place.hourly()))
            names = [step["name"] for step in entry["boot"]]
            assert tuple(names[: len(place.steps)]) == place.steps
            assert names[-5:] == ["connect", "check", "exec", "register", "setup"]
            began, ran = entry["entered"]["STARTING"], entry["entered"]["RUNNING"]
            for step in entry["boot"]:
                assert began - 0.1 <= step["began"] <= step["began"] + step["seconds"] <= ran + 0.1, step
            _, log = session.get(f"logs?machine={machine.id}")
            assert f"I am number {number}" in log.decode()
            assert f"I am number {1 - number}" not in log.decode()
        if (hourly := place.hourly()) is not None:
            assert document["session"]["hourly"] == pytest.approx(2 * hourly)
            spent = sum(document["now"] - each["entered"]["STARTING"] for each in document["machines"])
            assert document["session"]["cost"] == pytest.approx(hourly * spent / 3600, rel=1e-3)


def test_a_host_that_dies_while_it_is_profiled(place: Place) -> None:
    with looked(place, lease=8.0) as session, ThreadPoolExecutor(1) as pool:
        stays, dies = session.machines
        spinning = [machine.submit("Worker.spin", 600.0) for machine in session.machines]
        eventually(lambda: session.entry(dies)["processes"][1]["doing"], "that it is busy")
        asked = pool.submit(session.get, "pprof/profile?seconds=5")
        eventually(lambda: any(each.name == "bigmachine-profile" for each in threading.enumerate()), "a profile")
        place.kill(dies)
        headers, body = asked.result(WITHIN)
        assert headers["x-bigmachine-missing"] == "1"
        profile = pprof_schema.read(body)
        (missing,) = (comment for comment in profile.comments if "is missing" in comment)
        assert missing.startswith(f"{dies.addr} 0 is missing: ")
        assert str(dies.error).splitlines()[0] in missing
        found = {labels["machine"] for _, _, labels in profile.samples}
        assert found == {"driver", stays.addr}
        spun = sum(values["cpu"] for _, values, labels in profile.samples if labels.get("method") == "spin")
        assert spun > 0
        with pytest.raises(MachineStopped):
            spinning[1].result(WITHIN)
        assert not spinning[0].done()


def test_a_partition_is_seen_while_it_lasts(place: Place) -> None:
    with looked(place, 1, lease=6.0) as session:
        (machine,) = session.machines
        assert session.entry(machine)["keepalive"]["late"] is False
        with place.partition(machine):
            shown = []
            while (entry := session.entry(machine))["state"] == "RUNNING":
                shown.append((entry["keepalive"]["late"], entry["missing"], session.get("status")[1].decode()))
                time.sleep(0.1)  # As a page would: it is asked again and again.
            assert str(machine.error) == entry["error"]
            assert "no keepalive reply for" in entry["error"]
        first = next(number for number, (late, *_) in enumerate(shown) if late)
        assert all(late for late, *_ in shown[first:]), "until it is answered, which it never is"
        assert any("late" in text for _, _, text in shown[first:])
        assert any(missing and missing.startswith("no answer for") for _, missing, _ in shown)
        happened = session.kinds(machine)
        assert happened.index("keepalive.late") < happened.index("keepalive.failed")
        stopped = next(event for event in session.b.events.since(0) if event.fields.get("state") == "STOPPED")
        assert entry["error"] in stopped.fields["error"]


def used(group: Path) -> int:
    """Bytes that cannot be had otherwise, as a machine counts them."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    cached = sum(int(stat[name]) for name in ("total_inactive_file", "total_active_file"))
    return int((group / "memory.usage_in_bytes").read_text()) - cached


def test_memory_that_runs_short(place: Place, group: Path | None, tmp_path: Path) -> None:
    """What fills it is saved at the driver; then the kernel kills, which is said, and where to look."""
    if group is None:
        pytest.skip("no control group can be made here")
    limit = group / "memory.limit_in_bytes"
    try:
        with looked(place, 1, logdir=str(tmp_path / "logs")) as session:
            (machine,) = session.machines
            most = used(group) + (800 << 20)
            limit.write_text(str(most))
            while used(group) < 0.96 * most:
                machine.call("Worker.keep", 4 << 20)
            eventually(lambda: session.entry(machine)["unhealthy"], "that it is unhealthy", WITHIN)
            assert "of the memory of its control group is in use" in session.entry(machine)["unhealthy"]
            eventually(lambda: session.b.captures, "a capture", WITHIN)
            with pytest.raises(MachineStopped) as caught:
                machine.call("Worker.keep", 2 << 30)
            eventually(lambda: session.entry(machine)["error"], "the cause of its end", WITHIN)
            entry = session.entry(machine)
            captures = json.loads(session.get("status.json")[1])["captures"]
            happened = session.kinds(machine)
    finally:
        limit.write_text("-1")
    (folder,) = (tmp_path / "logs").glob("unhealthy-*")
    said = "was killed by the kernel for lack of memory (out-of-memory killer); what was saved when its memory ran short is in"
    assert f"{said} {folder}" in str(caught.value)
    assert f"{said} {folder}" in entry["error"]
    assert b"bytearray" in gzip.decompress((folder / "heap.pb.gz").read_bytes())
    assert "keep" in (folder / "vars.json").read_text()
    assert [each["files"] for each in captures] == [sorted(map(str, folder.iterdir()))]
    assert happened.index("machine.unhealthy") < happened.index("capture.saved") < len(happened)


# -- A program that fails ------------------------------------------------------------------------------------------------

LINES = 20_000

PROGRAM = f"""
import ctypes
from bigmachine import driver

class Chatter:
    def crash(self):
        for number in range({LINES}):
            print("line", number)
        ctypes.string_at(0)

    def say(self):
        print("still here", flush=True)

with driver.start() as b:
    first, second = b.start(2, {{"Chatter": Chatter()}})
    for machine in (first, second):
        machine.wait()
    second.call("Chatter.say")
    first.call("Chatter.crash")
"""


def test_a_program_that_fails_leaves_a_report_and_all_that_was_said(place: Place, tmp_path: Path) -> None:
    (tmp_path / "chatter.py").write_text(PROGRAM)
    flags = ["-bigm.bundle=reports", "-bigm.logdir=logs", "-bigm.events=events.jsonl", "-bigm.http=localhost:0"]
    command = [sys.executable, "-u", "chatter.py", *place.flags(), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    assert "SIGSEGV" in done.stderr
    address = re.search(r"MachineStopped: machine \S+/(m-\w+)/ stopped: ", done.stderr)
    assert address is not None, done.stderr
    dead = address[1]
    logs = {file.stem: file.read_text() for file in (tmp_path / "logs").glob("m-*.log")}
    (alive,) = logs.keys() - {dead}
    lines = [line.split(" ", 3) for line in logs[dead].splitlines()]
    assert [text for _, process, stream, text in lines if (process, stream) == ("0", "stdout")] == [
        f"line {number}" for number in range(LINES)
    ]
    assert "still here" in logs[alive]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    (failed,) = (event for event in events if event["kind"] == "call.failed")
    assert (failed["machine"], failed["method"]) == (dead, "Chatter.crash")
    assert [event["machine"] for event in events if event.get("state") == "STOPPED"] == [dead, alive]
    assert events[-1]["kind"] == "session.ended"
    (file,) = (tmp_path / "reports").iterdir()
    with zipfile.ZipFile(file) as archive:
        report = {name: archive.read(name).decode("utf-8", "replace") for name in archive.namelist()}
    missing = report["README.txt"].partition("\nMissing:\n")[2]
    assert re.search(rf"{dead}/: STOPPED, and could not be asked", missing)
    assert alive not in missing
    assert f"line {LINES - 1}\n" in report[f"logs/{dead}.log"]
    assert "SIGSEGV" in report["error.txt"]
    assert "SIGSEGV" in report["boot.txt"]
    assert alive in report["profiles/threads.txt"]
    assert list(json.loads(report["versions.json"])["machines"]) == [alive]
