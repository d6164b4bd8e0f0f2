"""Hosts that are lent: what their agents and machines do about a dead man's switch, and about notices."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agents import AgentLauncher, AgentProcess
from rpc_pair import until
from test_deliver import cache, file, packed  # noqa: F401 # Fixtures.
from test_notices import THEN, Metadata

import bigmachine
from bigmachine import State
from bigmachine.bootstrap import agent as agent_module
from bigmachine.cache import Cache
from bigmachine.supervisor import elsewhere
from bigmachine.systems.remote import Trust
from bigmachine.testing.conformance import Cluster

linux = pytest.mark.skipif(sys.platform != "linux", reason="hosts that are lent run Linux")

TRUST = Trust()


def uptime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@linux
def test_an_agent_says_how_old_things_are(tmp_path: Path) -> None:
    mark, nonsense = tmp_path / "mark", tmp_path / "nonsense"
    mark.write_text(f"{uptime() - 1000.0:.2f}\n")
    nonsense.write_text("soon\n")
    empty = tmp_path / "empty"
    empty.touch()
    marks = {"cloud-init": mark, "nonsense": nonsense, "empty": empty, "missing": tmp_path / "missing"}
    before = uptime()
    with AgentProcess(TRUST, tmp_path / "host", ages={name: str(path) for name, path in marks.items()}) as agent:
        ages = agent.client().info().ages
        assert set(ages) == {"kernel", "init", "agent", "cloud-init"}
        assert before <= ages["kernel"] <= uptime()
        assert ages["kernel"] >= ages["init"] > ages["agent"]
        assert ages["agent"] < uptime() - before + 0.02  # A tick of the kernel's.
        assert 1000 <= ages["cloud-init"] <= 1000 + uptime() - before + 0.02


@linux
def test_a_driver_that_talks_to_an_agent_keeps_the_host_alive(tmp_path: Path) -> None:
    switch = tmp_path / "until"
    with AgentProcess(TRUST, tmp_path / "host", deadman=str(switch), idle=300.0) as agent:
        assert not switch.exists()
        before = uptime()
        agent.client().info()
        margin = 300.0 + agent_module.MARGIN
        assert int(before + margin) <= int(switch.read_text()) <= uptime() + margin
        assert switch.stat().st_mode & 0o777 == 0o600
        switch.write_text("9" * 15 + "\n")
        agent.client().info()  # Within the same second: that is enough.
        agent.process.terminate()
        assert agent.wait() == 0


@linux
def test_an_agent_whose_switch_cannot_be_told_goes_on(tmp_path: Path) -> None:
    """It has until the end of the first period, and the driver is not to be troubled."""
    with AgentProcess(TRUST, tmp_path / "host", deadman=str(tmp_path / "missing" / "until")) as agent:
        assert agent.client().info().id


@pytest.fixture
def service() -> Iterator[Metadata]:
    service = Metadata()
    yield service
    service.close()


@linux
@pytest.mark.slow
def test_a_machine_that_is_lent(
    packed: Path,  # noqa: F811
    cache: Cache,  # noqa: F811
    tmp_path: Path,
    service: Metadata,
) -> None:
    """Its keepalives are told to the dead man's switch; a notice drains its services, and comes to the driver."""

    class Lent:
        """By value: the toolkit alone is there."""

        def drain(self, deadline: float | None) -> None:
            print(f"drained until {deadline}")

        @bigmachine.parallel
        def compute(self) -> int:
            return 1

    switch = tmp_path / "until"
    settings = {"deadman": str(switch), "notices": service.url}
    launcher = AgentLauncher([tmp_path / "host"], packed, maxprocs=2, cache=cache, **settings)
    cluster = Cluster(launcher, lease=20.0)
    with cluster.session:
        (machine,) = cluster.start(1, {"Lent": Lent()})
        machine.wait(State.RUNNING, 40.0)
        # The agent had said ten minutes; a lease is shorter.
        until(lambda: int(switch.read_text()) <= uptime() + 20.0 + elsewhere.MARGIN)
        assert int(switch.read_text()) > uptime() + elsewhere.MARGIN
        service.interrupt()
        until(lambda: machine.notice is not None)
        assert machine.notice is not None
        assert (machine.notice.kind, machine.notice.deadline) == ("interruption", THEN)
        until(lambda: cluster.output.getvalue().count(f"drained until {THEN}") == 2)
        assert machine.call("Lent.compute") == 1
    assert "the instance will be terminated at 16:02:03 UTC" in cluster.output.getvalue()
