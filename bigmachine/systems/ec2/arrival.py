"""From an instance that AWS has begun to start to an agent that answers: what is waited for, and why it does not come."""

from __future__ import annotations

import enum
import errno
import socket
import time
from collections.abc import Callable, Mapping, Sequence

from ...info import Step
from .launching import Placed
from .watch import Seen

KNOCK = 1.0
"""Seconds for a connection to be accepted. A host that is not up yet does not answer, and TCP asks again after 1, 3, 7 s: a new
attempt asks sooner. More than any round trip on earth."""

PAUSE = 0.2
"""Seconds between two attempts."""


class Found(enum.Enum):
    """How the last attempt to connect has ended."""

    OPEN = "open"
    REFUSED = "refused"
    SILENT = "silent"
    NO_ROUTE = "no route"


def knock(host: str, port: int, timeout: float = KNOCK) -> Found:
    """Whether somebody listens there."""
    try:
        socket.create_connection((host, port), timeout).close()
    except ConnectionRefusedError:
        return Found.REFUSED
    except OSError as error:
        return Found.NO_ROUTE if error.errno in (errno.ENETUNREACH, errno.EADDRNOTAVAIL) else Found.SILENT
    return Found.OPEN


def reach(
    host: str,
    port: int,
    within: float,
    wanted: Callable[[], bool],
    knock: Callable[[str, int], Found] = knock,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> Found:
    """Knock until somebody opens, `within` seconds, or until nobody is `wanted` any more; says what came of the last attempt
    (`REFUSED`, if ever there was one: the host was up)."""
    deadline = clock() + within
    worst = Found.SILENT
    while True:
        found = knock(host, port)
        if found is Found.OPEN:
            return found
        worst = Found.REFUSED if Found.REFUSED in (found, worst) else found
        if clock() >= deadline or not wanted():
            return worst
        sleep(PAUSE)


def unreachable(found: Found, host: str, port: int, public: bool, within: float) -> str:
    """Why the agent cannot be reached, as far as that can be told from here. `public` says whether `host` is a public address.
    Pure."""
    after = f"nobody answered at {host} port {port} within {within:g} s"
    if found is Found.REFUSED:
        return f"{after}: the instance is up, and refuses: no agent runs there; its console may say why (cloud-init, Python)"
    if found is Found.NO_ROUTE:
        return f"{after}: this host has no route to that address"
    if not public:
        return (
            f"{after}, which is a private address: this driver must be in the same network (VPC, VPN), and the security "
            f"group let port {port} in; or leave out -bigm.ec2publicip=false"
        )
    return (
        f"{after}: does a firewall between here and there, the instance's security group (-bigm.ec2securitygroups), or its "
        f"network ACL drop port {port} (-bigm.port chooses another), or has its subnet no internet gateway "
        "(-bigm.ec2subnets)? "
        "`bigmachine doctor ec2` looks"
    )


def no_address(seen: Seen | None, publicip: bool, within: float, trouble: str = "") -> str:
    """Why it has no address to connect to after `within` seconds. Pure."""
    if seen is None:
        return f"AWS did not describe it within {within:g} s{f': {trouble}' if trouble else ''}"
    if publicip and seen.private:
        return (
            "it has no public address: does its subnet's network have an internet gateway (-bigm.ec2subnets)? A driver in "
            "the same network needs none: -bigm.ec2publicip=false"
        )
    return f"it was still {seen.state}, without an address, after {within:g} s"


def agent_said(console: str) -> str:
    """The last line of the agent's own on the console; empty where there is none."""
    for line in reversed(console.splitlines()):
        _, mark, rest = line.partition("bigmachine agent: ")
        if mark and rest.strip():
            return rest.strip()
    return ""


def name(placed: Placed, zone: str = "") -> str:
    """An instance, for people: ``i-0abc (spot m7i.large in us-east-1a)``."""
    where = placed.zone or zone
    return f"{placed.id} ({placed.market.replace('-', ' ')} {placed.type}{f' in {where}' if where else ''})"


def boot_steps(launched: float, placed: float, answered: float, ages: Mapping[str, float]) -> list[Step]:
    """The steps of a boot, up to the agent's first answer: `launched`, `placed` and `answered` are as of `time.time`,
    `ages` are the agent's when it answered.

    Clocks differ, and so do roundings, and a container's kernel is older than its instance: no step begins before the one
    before it has. Pure.
    """
    kernel = answered - ages.get("kernel", 0.0)
    if kernel < launched or "kernel" not in ages:
        kernel = answered - ages.get("init", 0.0)
    marks = [
        ("pending", placed),
        ("kernel", kernel),
        ("cloud-init", answered - ages.get("cloud-init", ages.get("agent", 0.0))),
        ("agent", answered - ages.get("agent", 0.0)),
    ]
    return [Step("api", launched, placed - launched), *_between(marks, answered)]


def _between(marks: Sequence[tuple[str, float]], end: float) -> list[Step]:
    began: list[float] = []
    for _, at in marks:
        began.append(min(end, max(at, began[-1] if began else at)))
    return [
        Step(name, start, stop - start) for (name, _), start, stop in zip(marks, began, [*began[1:], end], strict=True)
    ]
