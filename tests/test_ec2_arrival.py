"""From an instance to its agent: what is waited for, and what is said where it does not come."""

from __future__ import annotations

import errno
import itertools
import socket
from typing import Any

import pytest

from bigmachine.systems.ec2.arrival import Found, agent_said, boot_steps, knock, name, no_address, reach, unreachable
from bigmachine.systems.ec2.launching import Placed
from bigmachine.systems.ec2.watch import Seen


def test_somebody_listens_or_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert knock("127.0.0.1", port) is Found.OPEN
    assert knock("127.0.0.1", port) is Found.REFUSED


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (TimeoutError(), Found.SILENT),
        (OSError(errno.EHOSTUNREACH, "as of a host that is not up yet"), Found.SILENT),
        (OSError(errno.ENETUNREACH, "no network"), Found.NO_ROUTE),
    ],
)
def test_how_it_fails(error: OSError, found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert knock("203.0.113.1", 443) is found


@pytest.mark.parametrize(
    ("knocks", "found"),
    [
        ([Found.OPEN], Found.OPEN),
        ([Found.SILENT, Found.REFUSED, Found.OPEN], Found.OPEN),
        ([Found.SILENT] * 9, Found.SILENT),
        ([Found.SILENT, Found.REFUSED, Found.SILENT, Found.SILENT], Found.REFUSED),
        ([Found.NO_ROUTE] * 9, Found.NO_ROUTE),
    ],
)
def test_until_somebody_opens(knocks: list[Found], found: Found) -> None:
    times = itertools.count()
    answers = iter(knocks)
    assert reach("h", 1, 3.0, lambda: True, lambda *_: next(answers), lambda: float(next(times)), lambda _: None) is found


def test_until_nobody_wants_to_know() -> None:
    wanted = iter([True, True, False])
    answers = iter([Found.SILENT] * 3)
    assert reach("h", 1, 9.0, lambda: next(wanted), lambda *_: next(answers), lambda: 0.0, lambda _: None) is Found.SILENT


def test_why_it_cannot_be_reached() -> None:
    silent = unreachable(Found.SILENT, "1.2.3.4", 443, True, 240.0)
    assert silent.startswith("nobody answered at 1.2.3.4 port 443 within 240 s: ")
    assert "security group (-bigm.ec2securitygroups)" in silent
    assert "-bigm.port chooses another" in silent
    assert "-bigm.ec2publicip=false" in unreachable(Found.SILENT, "10.0.0.1", 443, False, 240.0)
    assert "no agent runs there" in unreachable(Found.REFUSED, "1.2.3.4", 443, True, 240.0)
    assert "no route" in unreachable(Found.NO_ROUTE, "1.2.3.4", 443, True, 240.0)
    assert "\n" not in silent


def test_why_it_has_no_address() -> None:
    assert no_address(None, True, 180.0, "slow down") == "AWS did not describe it within 180 s: slow down"
    assert "it has no public address" in no_address(Seen("i-1", "running", private="10.0.0.1"), True, 180.0)
    assert no_address(Seen("i-1", "pending"), True, 180.0) == "it was still pending, without an address, after 180 s"


def test_what_the_agent_said() -> None:
    console = "[ 1.0] systemd\n[ 2.0] python3[68]: bigmachine agent: one\n[ 3.0] python3[68]: bigmachine agent: two\n[4] x"
    assert agent_said(console) == "two"
    assert agent_said("nothing\nof it") == ""


def test_an_instance_for_people() -> None:
    assert name(Placed("i-1", "m7i.large", "on-demand", "us-east-1a")) == "i-1 (on demand m7i.large in us-east-1a)"
    assert name(Placed("i-1", "m7i.large", "spot", "")) == "i-1 (spot m7i.large)"


def steps(ages: dict[str, float]) -> list[tuple[str, float]]:
    found = boot_steps(100.0, 102.0, 120.0, ages)
    assert found[0].began == 100.0
    for before, after in itertools.pairwise(found):
        assert before.began + before.seconds == pytest.approx(after.began)
        assert before.seconds >= 0
    assert found[-1].began + found[-1].seconds == pytest.approx(120.0)
    return [(step.name, round(step.seconds, 6)) for step in found]


def test_the_steps_of_a_boot() -> None:
    ages = {"kernel": 13.0, "init": 12.0, "cloud-init": 5.0, "agent": 1.5}
    assert steps(ages) == [("api", 2.0), ("pending", 5.0), ("kernel", 8.0), ("cloud-init", 3.5), ("agent", 1.5)]


@pytest.mark.parametrize(
    "ages",
    [
        {"kernel": 99999.0, "init": 12.0, "cloud-init": 5.0, "agent": 1.5},  # A container.
        {"kernel": 13.0, "init": 12.0, "cloud-init": 1.0, "agent": 1.5},  # Rounded.
        {"kernel": 19.5, "cloud-init": 19.0, "agent": 18.9},  # Our clock was set meanwhile.
        {"kernel": -5.0, "agent": -1.0},
        {},
    ],
)
def test_no_step_begins_before_the_one_before(ages: dict[str, float]) -> None:
    assert [name for name, _ in steps(ages)] == ["api", "pending", "kernel", "cloud-init", "agent"]
    if ages.get("kernel") == 99999.0:
        assert steps(ages)[1] == ("pending", 6.0)
