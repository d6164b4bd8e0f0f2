"""The system `local`: it conforms, and what is particular to processes on this host."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import pytest

from bigmachine import State
from bigmachine.errors import UsageError
from bigmachine.system import Launcher
from bigmachine.systems import local
from bigmachine.systems.local import LocalLauncher
from bigmachine.testing.conformance import SOON, Cluster, Conformance


class TestConformance(Conformance):
    def launcher(self) -> Launcher:
        return LocalLauncher(maxprocs=2)


def neighbours() -> int:
    """The first of two free ports."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


def test_ports_count_up() -> None:
    port = neighbours()
    cluster = Cluster(LocalLauncher(port=port))
    with cluster.session:
        machines = cluster.start(2)
        for machine in machines:
            machine.wait(State.RUNNING, 20.0)
        assert [machine.addr.split("/")[2] for machine in machines] == [f"localhost:{port}", f"localhost:{port + 1}"]


def test_a_launcher_leaves_alone_what_is_not_its_own() -> None:
    launcher = LocalLauncher()
    launcher.stop("m-unknown", 1.0)
    launcher.on_end("m-unknown", print)
    assert launcher.ended("m-unknown") is None
    assert launcher.console("m-unknown") == ""
    launcher.close()
    launcher.close()


def test_stop_waits_for_what_a_machine_that_has_just_ended_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine may end by itself at the moment in which it is stopped; what it left is killed after that."""
    begun, go_on = threading.Event(), threading.Event()

    def kill_session(session: int) -> None:
        begun.set()
        go_on.wait(SOON)

    cluster = Cluster(LocalLauncher())
    with cluster.session:
        (machine,) = cluster.start()
        machine.wait(State.RUNNING, 20.0)
        monkeypatch.setattr(local, "_kill_session", kill_session)
        os.kill(machine.info().pid, signal.SIGKILL)
        assert begun.wait(SOON)
        later = threading.Timer(0.1, go_on.set)  # When `stop` waits; were it late, the test would only be easier.
        later.start()
        cluster.launcher.stop(machine.id, 0.0)
        assert "was killed by signal 9" in str(cluster.launcher.ended(machine.id))
        later.join()


def test_secrets_are_neither_on_the_command_line_nor_in_the_environment() -> None:
    cluster = Cluster(LocalLauncher(maxprocs=2))
    with cluster.session:
        (machine,) = cluster.start()
        machine.wait(State.RUNNING, 20.0)
        pids = [machine.info().pid, *machine.call("Supervisor.pids").values()]
        assert len(pids) == 3
        for pid in pids:
            for name in ("cmdline", "environ"):
                assert b"PRIVATE KEY" not in Path(f"/proc/{pid}/{name}").read_bytes()
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                target = os.readlink(entry)
                assert not target.startswith(("/tmp", "/dev/shm")) or "deleted" in target, target


@pytest.mark.parametrize("options", [{"maxprocs": 0}, {"port": -1}, {"port": 65536}])
def test_options_that_cannot_be(options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        LocalLauncher(**options)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc to look into")
def test_machines_of_one_launch_share_no_descriptors() -> None:
    """Else one would keep another's pipes and port open, and nobody would notice that it has gone."""
    cluster = Cluster(LocalLauncher())
    with cluster.session:
        machines = cluster.start(4)
        held = []
        for machine in machines:
            machine.wait(State.RUNNING, 20.0)
            fds = Path(f"/proc/{machine.info().pid}/fd")
            links = {os.readlink(fd) for fd in fds.iterdir() if fd.exists() or fd.is_symlink()}
            held.append({link for link in links if link.startswith(("pipe:", "socket:"))})
        for number, one in enumerate(held):
            for other in held[number + 1 :]:
                assert not one & other
