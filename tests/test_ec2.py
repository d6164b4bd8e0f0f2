"""The system `ec2` on real instances, in a cloud of our own: it conforms, and what may happen to instances and drivers."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hosts.ec2 import FakeEc2, unavailable

from bigmachine import Machine, State
from bigmachine.errors import BootError, Unreachable
from bigmachine.keepalive import LEASE
from bigmachine.system import Launcher
from bigmachine.systems.ec2 import Ec2Launcher, booting
from bigmachine.testing.conformance import Cluster, Conformance, eventually
from bigmachine.testing.services import Probe

if unavailable():
    pytest.skip(unavailable(), allow_module_level=True)

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[1]

OURS = f"{sys.version_info[0]}.{sys.version_info[1]}"
OTHER = "3.11" if OURS == "3.13" else "3.13"

WITHIN = 40.0
"""Seconds for a start: 7 on two cores with nothing else to do."""

GONE = 15.0
"""Seconds for the end of an instance."""

the_cloud: list[FakeEc2] = []
"""For `Conformance.launcher`, which no fixture reaches."""


@pytest.fixture(scope="module", autouse=True)
def cloud() -> Iterator[FakeEc2]:
    with FakeEc2((OURS, OTHER)) as cloud, pytest.MonkeyPatch.context() as patch:
        for name, value in cloud.environ().items():
            patch.setenv(name, value)
        the_cloud.append(cloud)
        yield cloud
        the_cloud.clear()


@pytest.fixture(autouse=True)
def nothing_is_left(cloud: FakeEc2, request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does, no instance of its goes on to cost money."""
    yield
    if request.cls is None:  # Those of a class share two machines.
        eventually(lambda: cloud.live() == [], "the end of all instances", GONE)


def launcher(**options: Any) -> Ec2Launcher:
    return Ec2Launcher(**{"maxprocs": 1, **options})


@contextlib.contextmanager
def session(*, lease: float = 120.0, **options: Any) -> Iterator[Cluster]:
    cluster = Cluster(launcher(**options), lease=lease)
    with cluster.session:
        yield cluster


def running(cluster: Cluster, n: int = 1, **options: Any) -> list[Machine]:
    machines = cluster.start(n, **options)
    for machine in machines:
        machine.wait(State.RUNNING, WITHIN)
    return machines


def instance_of(machine: Machine, cloud: FakeEc2) -> str:
    """The id of its instance."""
    return next(id for id in cloud.live() if cloud.about(id).public == machine.hostname)


def failure(cluster: Cluster) -> str:
    """Why a machine could not be had."""
    (machine,) = cluster.start(1)
    with pytest.raises(BootError) as caught:
        machine.wait(State.RUNNING, WITHIN)
    return str(caught.value)


ports = itertools.count(4430)
"""What is left of a machine is found by its port, among the sockets of this process."""


class TestConformance(Conformance):
    start_within = WITHIN

    def launcher(self) -> Launcher:
        return launcher(maxprocs=2, port=next(ports))

    def test_nothing_is_left(self) -> None:
        """But for processes: here, those of instances are this one's. `nothing_is_left` looks at instances."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(psutil.Process, "children", lambda *_, **options: [])
            super().test_nothing_is_left()


# -- A program -----------------------------------------------------------------------------------------------------------


def test_bigpi(cloud: FakeEc2) -> None:
    command = [sys.executable, str(CHECKOUT / "examples/bigpi.py"), "-bigm.system=ec2", "-n", "20000", "-nmach", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("π = 3.")
    assert done.stderr.count(" RUNNING\n") == 2
    assert "all machines are ready" in done.stderr
    assert "2 machines (2 m7i.large spot) ran for" in done.stderr


def test_eight_at_once_and_each_step_of_theirs(cloud: FakeEc2) -> None:
    with session() as cluster:
        machines = running(cluster, 8)
        assert {machine.call("Probe.hello", "there") for machine in machines} == {"hello there!"}
        assert machines[0].call("Probe.relay", machines[7].addr, "Probe.hello", "you") == "hello you!"
        steps = cluster.launcher.timeline(machines[0].id)  # type: ignore[attr-defined]
        names = [step.name for step in steps]
        assert names[:5] == ["api", "pending", "kernel", "cloud-init", "agent"]
        assert names[-1] == "exec"
        for before, after in itertools.pairwise(steps[:5]):
            assert before.seconds >= 0
            assert before.began + before.seconds == pytest.approx(after.began)


def test_everything_is_tagged_from_the_beginning(cloud: FakeEc2) -> None:
    with session(ec2tags="team=physics") as cluster:
        (machine,) = running(cluster)
        id = instance_of(machine, cloud)
        launched = cluster.launcher
        assert isinstance(launched, Ec2Launcher)
        answer = launched._api.call("ec2", "DescribeTags", Filters=[{"Name": "resource-id", "Values": [id]}])
    tags = {tag["Key"]: tag["Value"] for tag in answer["Tags"]}
    assert "bigmachine" in tags["Name"]
    assert tags["team"] == "physics"
    assert tags["bigmachine:session"].startswith("s-")
    assert tags["bigmachine:driver"].split(":")[1] == str(os.getpid())
    assert tags["bigmachine:created"] < tags["bigmachine:expires"]


def test_parts_cross_a_slow_line_once(cloud: FakeEc2) -> None:
    """Eight machines share them, over a line of 20 Mbit/s; what else is said to them is little."""
    with session() as alone:
        running(alone)
    with cloud.limit(20), session() as cluster:
        machines = running(cluster, 8)
        received = [cloud.received(instance_of(machine, cloud)) for machine in machines]
    one, eight = (each.launcher.sent for each in (alone, cluster))  # type: ignore[attr-defined]
    assert one > 100_000
    assert eight < 1.1 * one
    assert min(received) > 0.9 * one, "each has got all of them"


# -- What AWS may be short of --------------------------------------------------------------------------------------------


def test_on_demand_where_spot_is_short(cloud: FakeEc2, capsys: pytest.CaptureFixture[str]) -> None:
    cloud.fail("InsufficientInstanceCapacity", 100, market="spot")
    try:
        with session() as cluster:
            machines = running(cluster, 2)
            assert {cloud.about(instance_of(machine, cloud)).market for machine in machines} == {"on-demand"}
            assert "2 m7i.large on demand" in cluster.launcher.summary()  # type: ignore[attr-defined]
    finally:
        cloud.fail("InsufficientInstanceCapacity", 0)
    assert "(InsufficientInstanceCapacity); went on to others" in capsys.readouterr().err


def test_some_of_each_where_spot_has_room_for_some(cloud: FakeEc2) -> None:
    cloud.room(1, market="spot")
    try:
        with session() as cluster:
            machines = running(cluster, 3)
            markets = sorted(cloud.about(instance_of(machine, cloud)).market for machine in machines)
            assert markets == ["on-demand", "on-demand", "spot"]
    finally:
        cloud.room(-1, market="spot")


def test_nowhere_any_room(cloud: FakeEc2) -> None:
    cloud.fail("InsufficientInstanceCapacity", 100)
    try:
        with session(ec2spotonly=True) as cluster:
            text = failure(cluster)
    finally:
        cloud.fail("InsufficientInstanceCapacity", 0)
    assert "no instance to be had: spot m7i.large in us-east-1" in text
    assert "InsufficientInstanceCapacity" in text
    assert "leave out -bigm.ec2spotonly" in text


def test_several_types(cloud: FakeEc2) -> None:
    """By CreateFleet; of the launch template nothing is left."""
    with session(ec2type="m7i.large,m6i.large") as cluster:
        running(cluster, 2)
    assert "ec2:CreateFleet" in cloud.calls()
    launcher = cluster.launcher
    assert isinstance(launcher, Ec2Launcher)
    assert list(launcher._api.pages("ec2", "DescribeLaunchTemplates", "LaunchTemplates")) == []


# -- What may be wrong with an instance ----------------------------------------------------------------------------------


def test_no_way_to_the_port(cloud: FakeEc2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(booting, "AGENT_WITHIN", 6.0)
    cloud.drop_port(443)
    try:
        with session() as cluster:
            started = time.monotonic()
            text = failure(cluster)
            assert time.monotonic() - started < 20.0
    finally:
        cloud.drop_port(443, dropped=False)
    assert "failed at boot step 'agent'" in text
    assert "port 443 within 6 s: does a firewall between here and there, the instance's security group" in text
    assert "(spot m7i.large in us-east-1" in text
    assert '{"port": 443' in text, "the console's tail"


def test_the_agent_cannot_listen(cloud: FakeEc2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The instance ends with its agent, and the console says why."""
    unit = tmp_path / "squatter.service"
    unit.write_text(
        "[Unit]\nDefaultDependencies=no\n[Service]\nType=notify\nNotifyAccess=all\nExecStart=/usr/bin/python3 -c "
        "'import socket,subprocess,time; s=socket.create_server((\"0.0.0.0\",443)); "
        'subprocess.call(["systemd-notify","--ready"]); time.sleep(600)\'\n'
    )
    monkeypatch.setattr(booting, "AGENT_WITHIN", 20.0)
    with session(ec2units=str(unit)) as cluster:
        text = failure(cluster)
    assert "is terminated: Client.InstanceInitiatedShutdown" in text
    assert "its agent said: OSError: cannot listen at port 443 of 0.0.0.0: Address already in use" in text


def test_another_python_on_the_image(cloud: FakeEc2) -> None:
    """Which the user has named."""
    with session() as cluster:
        launcher = cluster.launcher
        assert isinstance(launcher, Ec2Launcher)
        name = "/aws/service/debian/release/12/latest/amd64"
        image = launcher._api.call("ssm", "GetParameter", Name=name)["Parameter"]["Value"]
    cloud.image(image, OTHER)
    try:
        with session() as cluster:
            text = failure(cluster)
    finally:
        cloud.image(image, OURS)
    assert f"no Python {OURS} on " in text
    assert f"; there are {OTHER} (" in text
    assert "-bigm.ec2ami names an image that has it" in text


@pytest.mark.parametrize("how", ["its power is cut", "somebody terminates it", "it is interrupted"])
def test_an_instance_that_ends(cloud: FakeEc2, how: str) -> None:
    """Calls fail with the cause; the others go on."""
    with session(lease=20.0) as cluster:
        first, second = running(cluster, 2)
        waiting = first.submit("Probe.block")
        id = instance_of(first, cloud)
        started = time.monotonic()
        if how == "its power is cut":
            cloud.kill(id)
        elif how == "it is interrupted":
            cloud.interrupt(id, 1)
        else:
            launcher = cluster.launcher
            assert isinstance(launcher, Ec2Launcher)
            launcher._api.call("ec2", "TerminateInstances", InstanceIds=[id])
        with pytest.raises(Unreachable) as caught:
            waiting.result(WITHIN)
        first.wait(State.STOPPED, 5.0)
        assert time.monotonic() - started < 15.0
        assert f"its instance {id} is " in str(first.error)
        if how == "its power is cut":  # Nothing else had told of it.
            assert str(caught.value) == str(first.error)
        assert second.call("Probe.hello", "still") == "hello still!"


def test_an_instance_that_ends_while_it_boots(cloud: FakeEc2) -> None:
    with session() as cluster:
        (machine,) = cluster.start(1)
        eventually(lambda: cloud.live(), "an instance", WITHIN)
        cloud.kill(cloud.live()[0])
        with pytest.raises(BootError) as caught:
            machine.wait(State.RUNNING, WITHIN)
    assert "is terminated" in str(caught.value) or "is shutting-down" in str(caught.value) or "is stopped" in str(caught.value)


def test_a_notice(cloud: FakeEc2) -> None:
    """Of an interruption: the driver is told, and so are the services; before the instance is gone."""

    class Drained:
        def __init__(self) -> None:
            self._told: list[float | None] = []

        def drain(self, deadline: float | None) -> None:
            self._told.append(deadline)

        def deadline(self) -> float | None:
            while not self._told:
                time.sleep(0.01)
            return self._told[0]

    with session() as cluster:
        (machine,) = running(cluster, services={"Drained": Drained()})
        heard = threading.Event()
        machine.on_notice(lambda _: heard.set())
        cloud.interrupt(instance_of(machine, cloud), 20)
        assert heard.wait(WITHIN)
        assert machine.notice is not None
        assert machine.notice.kind == "interruption"
        deadline = machine.call("Drained.deadline", timeout=WITHIN)
        assert deadline == machine.notice.deadline
        assert time.time() < deadline < time.time() + 20


def test_packets_that_get_lost(cloud: FakeEc2) -> None:
    """One in a hundred."""
    with cloud.loss(1.0), session() as cluster:
        (machine,) = running(cluster)
        assert machine.call("Probe.echo", bytes(10_000_000), timeout=WITHIN) == bytes(10_000_000)
        assert [machine.call("Probe.echo", n, timeout=WITHIN) for n in range(100)] == list(range(100))


@pytest.mark.parametrize(
    ("seconds", "lease"),
    [
        (2.5, 12.0),  # Several keepalives are due in that time; TCP tries again half a second after it.
        pytest.param(
            20.0,
            LEASE,
            marks=pytest.mark.skipif(not os.environ.get("BIGMACHINE_SLOW"), reason="takes 30 s: BIGMACHINE_SLOW=1"),
        ),
    ],
)
def test_a_partition_shorter_than_the_lease_is_survived(cloud: FakeEc2, seconds: float, lease: float) -> None:
    """What was called before and during it is answered after it."""

    class Sleeper:
        def sleep(self, seconds: float) -> float:
            time.sleep(seconds)
            return seconds

    with session(lease=lease) as cluster:
        (machine,) = running(cluster, services={"Probe": Probe(), "Sleeper": Sleeper()})
        before = machine.submit("Sleeper.sleep", seconds / 2)
        with cloud.partition(instance_of(machine, cloud)):
            during = machine.submit("Probe.echo", 1)
            time.sleep(seconds)  # So long takes the partition, which is what is tested.
            assert not before.done()
        assert during.result(WITHIN) == 1
        assert before.result(WITHIN) == seconds / 2
        assert machine.state is State.RUNNING


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeEc2((OURS,), size="3m") as small:
        for name, value in small.environ().items():
            monkeypatch.setenv(name, value)
        with session() as cluster:
            text = failure(cluster)
        eventually(lambda: small.live() == [], "the end of the instance", GONE)
    assert "no space left on " in text


def test_a_partition_longer_than_the_lease(cloud: FakeEc2) -> None:
    """The instance ends itself, and the driver says so, before they can hear of each other again."""
    with session(lease=4.0) as cluster:
        (machine,) = running(cluster)
        id = instance_of(machine, cloud)
        cloud.unplug(id)
        machine.wait(State.STOPPED, WITHIN)
        assert machine.error is not None
        cloud.wait(id, "terminated", WITHIN)


# -- What may happen to the driver ---------------------------------------------------------------------------------------

DRIVER = """\
import sys
from bigmachine.systems.ec2 import Ec2Launcher
from bigmachine.testing.conformance import Cluster
from bigmachine import State

cluster = Cluster(Ec2Launcher(maxprocs=1), lease=5.0)
machines = cluster.start(2)
for machine in machines:
    machine.wait(State.RUNNING)
print("running", flush=True)
sys.stdin.read()
"""


def test_a_driver_that_is_killed(cloud: FakeEc2) -> None:
    """Its instances terminate by themselves."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "running\n"
        assert len(cloud.live()) == 2
        driver.send_signal(signal.SIGKILL)
    eventually(lambda: cloud.live() == [], "the end of its instances", 30.0)
