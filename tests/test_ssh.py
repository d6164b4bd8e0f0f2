"""The system `ssh` on real hosts: it conforms, and what may happen to hosts, to networks and to drivers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from hosts.network import CHECKOUT, Network, SshHost, unavailable

from bigmachine import Machine, State
from bigmachine.errors import BootError, MachineStopped
from bigmachine.keepalive import LEASE
from bigmachine.pack.archive import read_contents
from bigmachine.system import Launcher
from bigmachine.systems.ssh import SshLauncher, system
from bigmachine.testing.conformance import Cluster, Conformance, _toolkit, eventually
from bigmachine.testing.services import Probe

if unavailable():
    pytest.skip(unavailable(), allow_module_level=True)

pytestmark = pytest.mark.slow

WITHIN = 30.0
"""Seconds for a start."""


class Hosts:
    """Two hosts, for a module of tests."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network = network
        self.ada = network.host("ada")
        self.grace = network.host("grace", port=2222)
        self.config = network.config(folder / "config")
        self._folder = folder

    def launcher(self, hosts: str = "ada,grace", **options: Any) -> SshLauncher:
        return SshLauncher(hosts, str(self.config), **{"maxprocs": 1, **options})

    @contextlib.contextmanager
    def cluster(self, hosts: str = "ada,grace", *, lease: float = 120.0, **options: Any) -> Iterator[Cluster]:
        cluster = Cluster(self.launcher(hosts, **options), lease=lease)
        with cluster.session:
            yield cluster

    @contextlib.contextmanager
    def another(self, name: str, **options: Any) -> Iterator[SshHost]:
        """A host for one test."""
        host = self.network.host(name, **options)
        self.config = self.network.config(self.config)
        try:
            yield host
        finally:
            host.close()


the_hosts: list[Hosts] = []
"""For `Conformance.launcher`, which no fixture reaches."""


@pytest.fixture(scope="module", autouse=True)
def no_agent() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        yield


@pytest.fixture(scope="module", autouse=True)
def hosts() -> Iterator[Hosts]:
    with Network() as network, tempfile.TemporaryDirectory() as folder:
        the_hosts.append(Hosts(network, Path(folder)))
        yield the_hosts[0]
        the_hosts.clear()


def running(cluster: Cluster, n: int = 1, **options: Any) -> list[Machine]:
    machines = cluster.start(n, **options)
    for machine in machines:
        machine.wait(State.RUNNING, WITHIN)
    return machines


def work_left(host: SshHost) -> str:
    """What agents have begun there, and neither finished nor removed."""
    return host.run("sh", "-c", "ls -A /home/ada/.cache/bigmachine-hosts/work")


def failure(cluster: Cluster) -> str:
    """Why a machine could not be had."""
    (machine,) = cluster.start(1)
    with pytest.raises(BootError) as caught:
        machine.wait(State.RUNNING, WITHIN)
    return str(caught.value)


class TestConformance(Conformance):
    """All on one host, so that machines share it."""

    def launcher(self) -> Launcher:
        return the_hosts[0].launcher("ada", maxprocs=2)


# -- A program -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tunnel", [False, True])
def test_bigpi(hosts: Hosts, tunnel: bool) -> None:
    flags = ["-bigm.system=ssh", "-bigm.hosts=ada,grace", f"-bigm.sshconfig={hosts.config}"]
    flags += ["-bigm.sshtunnel"] if tunnel else []
    command = [sys.executable, str(CHECKOUT / "examples/bigpi.py"), *flags, "-n", "20000", "-nmach", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("π = 3.")
    places = ["localhost"] if tunnel else [hosts.ada.address, hosts.grace.address]
    for place in places:
        assert f"machine https://{place}:" in done.stderr
    assert (hosts.ada.processes(), hosts.grace.processes()) == ({}, {})


def test_a_second_run_sends_little(hosts: Hosts) -> None:
    with hosts.another("fresh") as fresh:
        received = [fresh.received()]
        for _ in range(2):
            with hosts.cluster("fresh") as cluster:
                (machine,) = running(cluster)
                assert machine.call("Probe.hello", "there") == "hello there!"
            received.append(fresh.received())
        assert received[1] - received[0] > 500_000
        assert received[2] - received[1] < 50_000
        assert isinstance(cluster.launcher, SshLauncher)
        assert cluster.launcher.sent == 0


def test_what_many_hosts_need_crosses_a_narrow_uplink_once(hosts: Hosts) -> None:
    """The rest they give each other."""
    names = [f"h{number}" for number in range(8)]
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(hosts.another(name))
        stack.enter_context(hosts.network.limit(20.0))
        cluster = stack.enter_context(hosts.cluster(",".join(names)))
        before = hosts.network.sent()
        machines = running(cluster, 8)
        crossed = hosts.network.sent() - before
        assert [machine.call("Probe.echo", 1) for machine in machines] == [1] * 8
        assert len({machine.hostname for machine in machines}) == 8
    assert isinstance(cluster.launcher, SshLauncher)
    (manifest,) = read_contents(_toolkit(cluster.launcher.ships).file).platforms
    whole = sum(part.packed for part in manifest.worker())
    assert whole <= cluster.launcher.sent <= 1.5 * whole
    assert crossed < cluster.launcher.sent + 8 * 60_000, "an agent, and the handshakes, are about 30 kB a host"


def test_packets_that_get_lost(hosts: Hosts) -> None:
    with hosts.another("lossy") as lossy, lossy.loss(1.0), hosts.cluster("lossy") as cluster:
        (machine,) = running(cluster)
        assert [machine.call("Probe.echo", number) for number in range(200)] == list(range(200))
        data = os.urandom(3_000_000)
        assert machine.call("Probe.echo", data) == data
        assert list(machine.stream("Probe.count", 1000)) == list(range(1000))
        machine.shutdown()
        assert machine.error is None
        assert lossy.processes() == {}


def test_machines_are_spread_over_hosts_and_call_each_other(hosts: Hosts) -> None:
    with hosts.cluster() as cluster:
        machines = running(cluster, 3)
        assert sorted(machine.hostname for machine in machines) == sorted(
            [hosts.ada.address, hosts.ada.address, hosts.grace.address]
        )
        by_host = {machine.hostname: machine for machine in machines}
        first, second = by_host[hosts.ada.address], by_host[hosts.grace.address]
        assert first.call("Probe.relay", second.addr, "Probe.hello", "you") == "hello you!"
        assert {machine.call("Probe.environ", "HOME") for machine in machines} == {"/home/ada"}
    assert (hosts.ada.processes(), hosts.grace.processes()) == ({}, {})


def test_every_core_where_nothing_else_is_said(hosts: Hosts) -> None:
    with hosts.cluster("ada", maxprocs=0) as cluster:
        assert running(cluster)[0].maxprocs == os.cpu_count()


def test_ports_count_up_on_each_host(hosts: Hosts) -> None:
    with hosts.cluster(port=7001) as cluster:
        places = {machine.addr.split("/")[2] for machine in running(cluster, 3)}
    ada, grace = hosts.ada.address, hosts.grace.address
    assert places == {f"{ada}:7001", f"{ada}:7002", f"{grace}:7001"}


def test_secrets_are_nowhere_to_be_read(hosts: Hosts) -> None:
    with hosts.cluster("ada") as cluster:
        running(cluster)
        processes = hosts.ada.processes()
        assert len(processes) >= 2
        for pid in processes:
            for name in ("cmdline", "environ"):
                assert b"PRIVATE KEY" not in Path(f"/proc/{pid}/{name}").read_bytes()
        assert hosts.ada.run("sh", "-c", "grep -rl 'BEGIN.*PRIVATE KEY' /home /tmp /var/tmp /run /root || true") == ""


NOTEBOOK = """\
import sys
import bigmachine

config = sys.argv[1]
offset = 40

class Adder:
    def add(self, n):
        return n + offset

with bigmachine.start("ssh", hosts="ada,grace", sshconfig=config, maxprocs=1) as b:
    machines = b.start(2, {"Adder": Adder()})
    print([machine.call("Adder.add", 2) for machine in machines])
"""


@pytest.mark.parametrize("how", ["a program on the standard input", "a command"])
def test_what_was_typed_in(hosts: Hosts, how: str) -> None:
    """As in a notebook: there is no program to be sent. The toolkit is, and the service goes by value."""
    words, text = (["-"], NOTEBOOK) if how.startswith("a program") else (["-c", NOTEBOOK], "")
    command = [sys.executable, *words, str(hosts.config)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[42, 42]\n"), done.stderr


# -- What may be wrong with a host ---------------------------------------------------------------------------------------


def test_a_firewall_and_the_way_through_it(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "DIRECT_WITHIN", 0.5)
    with hosts.another("walled") as walled, walled.only_ssh():
        started = time.monotonic()
        with hosts.cluster("walled") as cluster:
            text = failure(cluster)
        assert time.monotonic() - started < 10.0
        assert "ssh gets through to it, but its port" in text
        assert "-bigm.sshtunnel" in text
        assert walled.processes() == {}
        assert work_left(walled) == "", "the agent was not asked before it was killed"
        with hosts.cluster("walled", sshtunnel=True) as cluster:
            first, second = running(cluster, 2)
            assert first.hostname == "localhost"
            assert [first.call("Probe.hello", "there"), second.call("Probe.echo", 2)] == ["hello there!", 2]
            data = os.urandom(3_000_000)
            assert first.call("Probe.echo", data) == data
            assert list(first.stream("Probe.count", 1000)) == list(range(1000))
        assert walled.processes() == {}


def test_a_host_that_is_down_is_no_trouble_for_the_others(hosts: Hosts) -> None:
    hosts.grace.run("iptables", "-I", "INPUT", "-p", "tcp", "--syn", "-j", "REJECT", "--reject-with", "tcp-reset")
    try:
        with hosts.cluster() as cluster:
            machines = cluster.start(2)
            errors = []
            for machine in machines:
                try:
                    machine.wait(State.RUNNING, WITHIN)
                    assert machine.call("Probe.echo", 1) == 1
                    assert machine.hostname == hosts.ada.address
                except BootError as error:
                    errors.append(str(error))
            assert len(errors) == 1
            assert "grace: nothing listens at" in errors[0]
    finally:
        hosts.grace.run("iptables", "-F", "INPUT")


def other_python() -> Path | None:
    """The oldest Python that can run an agent, yet not the program."""
    ours = f"{sys.version_info[0]}.{sys.version_info[1]}."
    found = sorted(Path("~/.pyenv/versions").expanduser().glob("3.*/bin/python3"))
    fit = {int(path.parts[-3].split(".")[1]): path.parents[1] for path in found}
    return next((fit[minor] for minor in sorted(fit) if minor >= 9 and not fit[minor].name.startswith(ours)), None)


def test_a_host_with_another_python(hosts: Hosts) -> None:
    other = other_python()
    if other is None:
        pytest.skip("there is no other Python here (~/.pyenv/versions)")
    gone = ["/usr/bin/python3", *(str(path) for path in Path("/usr/bin").glob("python3.*"))]
    with hosts.another("old", gone=gone, pythons=[str(other)]) as old:
        with hosts.cluster("old") as cluster:
            text = failure(cluster)
        minor = ".".join(other.name.split(".")[:2])
        assert f"no Python {sys.version_info[0]}.{sys.version_info[1]}" in text
        assert f"{minor} (/opt/{other.name}/bin/python" in text
        assert old.processes() == {}


def test_a_host_without_any_python(hosts: Hosts) -> None:
    gone = [str(path) for place in ("/usr/bin", "/usr/local/bin") for path in Path(place).glob("python3*")]
    with hosts.another("none", gone=gone, pythons=[]), hosts.cluster("none") as cluster:
        text = failure(cluster)
    assert "none: no agent started: no Python 3.9 or later there, but none at all: install python3" in text


def test_a_host_that_forwards_nothing(hosts: Hosts) -> None:
    with hosts.another("strict") as strict:
        strict.configure("AllowTcpForwarding no")
        with hosts.cluster("strict", sshtunnel=True) as cluster:
            text = failure(cluster)
        assert "strict: its sshd forwards nothing to port" in text
        assert "AllowTcpForwarding" in text
        assert strict.processes() == {}


def test_a_port_that_cannot_be_had(hosts: Hosts) -> None:
    with hosts.cluster("ada", port=7001) as first, hosts.cluster("ada", port=7001) as second:
        running(first)
        text = failure(second)
    assert "ada: no agent started: " in text
    assert "cannot listen at port 7001 of 0.0.0.0: Address already in use; -bigm.port chooses another" in text
    assert hosts.ada.processes() == {}


def test_a_full_disk(hosts: Hosts) -> None:
    """Nothing is left there of what was tried, so that there is room once there is room."""
    with hosts.another("tiny", size="12m") as tiny:
        tiny.run("dd", "if=/dev/zero", "of=/home/ada/file", "bs=1M", "count=11", "status=none")
        with hosts.cluster("tiny") as cluster:
            text = failure(cluster)
        assert "tiny: no space left on tiny" in text
        assert tiny.processes() == {}
        assert work_left(tiny) == ""
        tiny.run("rm", "/home/ada/file")
        with hosts.cluster("tiny") as cluster:
            (machine,) = running(cluster)
            assert machine.call("Probe.echo", 1) == 1


# -- What may happen to a machine ----------------------------------------------------------------------------------------


def test_a_machine_that_is_killed_is_noticed_at_once(hosts: Hosts) -> None:
    with hosts.cluster("ada") as cluster:
        (machine,) = running(cluster)
        waiting = machine.submit("Probe.block")
        leader = next(pid for pid, command in hosts.ada.processes().items() if machine.id in command)
        os.kill(leader, signal.SIGKILL)
        with pytest.raises(MachineStopped):
            waiting.result(5.0)
        machine.wait(State.STOPPED, 5.0)
        assert "on ada) was killed" in str(machine.error)
        eventually(lambda: hosts.ada.processes() == {}, "the end of its processes")


def test_what_a_service_has_left_is_killed(hosts: Hosts) -> None:
    class Leaver:
        def leave(self) -> None:
            os.system("sleep 1000 & (trap '' TERM; sleep 1000) &")

    with hosts.cluster("ada") as cluster:
        (machine,) = running(cluster, services={"Leaver": Leaver()})
        machine.call("Leaver.leave")
        assert any("sleep 1000" in command for command in hosts.ada.processes().values())
    assert hosts.ada.processes() == {}


@pytest.mark.parametrize("tunnel", [False, True])
def test_the_connection_may_end(hosts: Hosts, tunnel: bool) -> None:
    """It was for starting the machine, which lives on; to kill what it leaves, and for a tunnel, there is another one."""
    with hosts.cluster("ada", sshtunnel=tunnel) as cluster:
        (machine,) = running(cluster)
        hosts.ada.run("pkill", "-KILL", "-f", "sshd: ada")
        eventually(lambda: not hosts.ada.run("sh", "-c", "pgrep -f 'sshd: [a]da' || true"), "the connection's end")
        assert machine.retry_call("Probe.hello", "still") == "hello still!"
        assert machine.state is State.RUNNING
    assert hosts.ada.processes() == {}
    assert cluster.launcher.ended(machine.id) is not None


@pytest.mark.parametrize(
    ("seconds", "lease"),
    [
        (2.5, 12.0),  # Several keepalives are due in that time; TCP tries again half a second after it.
        pytest.param(
            20.0,
            LEASE,
            marks=pytest.mark.skipif(not os.environ.get("BIGMACHINE_SLOW"), reason="takes 26 s: BIGMACHINE_SLOW=1"),
        ),
    ],
)
def test_a_partition_shorter_than_the_lease_is_survived(hosts: Hosts, seconds: float, lease: float) -> None:
    """What was called before and during it is answered after it."""

    class Sleeper:
        def sleep(self, seconds: float) -> float:
            time.sleep(seconds)
            return seconds

    with hosts.cluster("ada", lease=lease) as cluster:
        (machine,) = running(cluster, services={"Probe": Probe(), "Sleeper": Sleeper()})
        before = machine.submit("Sleeper.sleep", seconds / 2)
        with hosts.ada.partition():
            during = machine.submit("Probe.echo", 1)
            time.sleep(seconds)  # So long takes the partition, which is what is tested.
            assert not before.done()
        assert during.result(WITHIN) == 1
        assert before.result(WITHIN) == seconds / 2
        assert machine.state is State.RUNNING
        assert list(machine.stream("Probe.count", 100)) == list(range(100))


def test_a_partition_longer_than_the_lease(hosts: Hosts) -> None:
    """The machine ends itself, and the driver says so, before they can hear of each other again."""
    with hosts.cluster("ada", lease=2.0) as cluster:
        (machine,) = running(cluster)
        with hosts.ada.partition():
            machine.wait(State.STOPPED, WITHIN)
            assert "no keepalive reply for" in str(machine.error)
            eventually(lambda: hosts.ada.processes() == {}, "the machine's end", 15.0)


DRIVER = """\
import sys
from bigmachine import State
from bigmachine.systems.ssh import SshLauncher
from bigmachine.testing import conformance

config, hosts, tunnel = sys.argv[1:]
cluster = conformance.Cluster(SshLauncher(hosts, config, sshtunnel=tunnel == "True", maxprocs=1), lease=2.0)
machines = cluster.start(hosts.count(",") + 1)
print("starting", flush=True)
for machine in machines:
    machine.wait(State.RUNNING, 30.0)
print("running", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def driver(config: Path, hosts: str, tunnel: bool = False) -> Iterator[IO[str]]:
    """A driver of its own, by what it says; it is killed at the end of the block."""
    command = [sys.executable, "-c", DRIVER, str(config), hosts, str(tunnel)]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "starting\n"
            yield process.stdout
        finally:
            process.kill()


def test_a_driver_that_is_killed_leaves_nothing(hosts: Hosts) -> None:
    """Neither one whose machines are reached directly, nor one who goes through tunnels."""
    with driver(hosts.config, "ada,grace") as direct, driver(hosts.config, "ada,grace", tunnel=True) as tunnelled:
        assert [direct.readline(), tunnelled.readline()] == ["running\n"] * 2
        for host in (hosts.ada, hosts.grace):
            assert len({word for line in host.processes().values() for word in line.split() if word.startswith("m-")}) == 2
    eventually(lambda: not {**hosts.ada.processes(), **hosts.grace.processes()}, "the machines' end", 15.0)


def test_a_driver_that_is_killed_while_machines_start_leaves_nothing(hosts: Hosts) -> None:
    with hosts.ada.only_ssh():  # So that it gets no further than to an agent.
        with driver(hosts.config, "ada"):
            eventually(lambda: "m-" in " ".join(hosts.ada.processes().values()), "an agent")
        eventually(lambda: hosts.ada.processes() == {}, "its end")


def test_ended_while_they_start(hosts: Hosts) -> None:
    for pause in (0.0, 0.1, 0.3, 0.6):
        with hosts.cluster() as cluster:
            cluster.start(4)
            time.sleep(pause)  # No event is waited for: the moment is meant to be any.
        assert (hosts.ada.processes(), hosts.grace.processes()) == ({}, {})
