"""How many virtual processors an account may have at once, of which kinds of types, and how many of them are taken.

AWS counts by classes of families (m, c and r are of one, g and vt of another) and by market, and has no call that says which
type is of which class: hence the table. A class that is not in it has a quota, too; it is only not known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .api import Ec2Error
from .instances import Calls
from .prices import ON_DEMAND, SPOT

STANDARD = "Standard"

FAMILIES: Mapping[str, str] = {
    **dict.fromkeys(("a", "c", "d", "h", "i", "im", "is", "m", "r", "t", "z"), STANDARD),
    **dict.fromkeys(("g", "gr", "vt"), "G and VT"),
    "p": "P",
    "x": "X",
    "f": "F",
    "inf": "Inf",
}
"""The class of a family's types, by the letters before the generation: `m` of m7i.large."""

CODES: Mapping[tuple[str, str], str] = {
    (ON_DEMAND, STANDARD): "L-1216C47A",
    (ON_DEMAND, "G and VT"): "L-DB2E81BA",
    (ON_DEMAND, "P"): "L-417A185B",
    (ON_DEMAND, "X"): "L-7295265B",
    (ON_DEMAND, "F"): "L-74FC7D96",
    (ON_DEMAND, "Inf"): "L-1945791B",
    (SPOT, STANDARD): "L-34B43A08",
    (SPOT, "G and VT"): "L-3819A6DF",
    (SPOT, "P"): "L-7212CCBC",
    (SPOT, "X"): "L-E3A00192",
    (SPOT, "F"): "L-88CF9481",
    (SPOT, "Inf"): "L-B5D1601B",
}
"""The quotas' names in AWS's API, which are the same in all regions."""


@dataclass(frozen=True)
class Quota:
    """Virtual processors: how many there may be (`limit`) and are (`used`), in `market`, of types of the class `kind`."""

    market: str
    kind: str
    code: str
    limit: int
    used: int

    def room(self, vcpus: int) -> int:
        """For how many machines of so many each."""
        return max(0, self.limit - self.used) // vcpus


def kind_of(type: str) -> str:
    """The class of an instance type; empty where it is not known."""
    letters = re.match(r"[a-z]+", type)
    return FAMILIES.get(letters[0], "") if letters else ""


def find_quota(api: Calls, market: str, kind: str) -> Quota:
    """Raises `Ec2Error`; KeyError where `kind` is not in the table."""
    code = CODES[market, kind]
    try:
        answer = api.call("service-quotas", "GetServiceQuota", ServiceCode="ec2", QuotaCode=code)
    except Ec2Error as error:
        if error.code != "NoSuchResourceException":
            raise
        # An account whose quota nobody has changed may have none of its own.
        answer = api.call("service-quotas", "GetAWSDefaultServiceQuota", ServiceCode="ec2", QuotaCode=code)
    return Quota(market, kind, code, int(answer["Quota"]["Value"]), used(_running(api), market, kind))


def used(instances: Iterable[Mapping[str, Any]], market: str, kind: str) -> int:
    """The virtual processors of those `instances`, as DescribeInstances has them, that count. Pure."""
    total = 0
    for each in instances:
        theirs = SPOT if each.get("InstanceLifecycle") == "spot" else ON_DEMAND
        if theirs == market and kind_of(each.get("InstanceType", "")) == kind:
            options = each.get("CpuOptions", {})
            total += options.get("CoreCount", 0) * options.get("ThreadsPerCore", 0)
    return total


def _running(api: Calls) -> Iterable[Mapping[str, Any]]:
    filters = [{"Name": "instance-state-name", "Values": ["pending", "running"]}]
    for reservation in api.pages("ec2", "DescribeInstances", "Reservations", Filters=filters):
        yield from reservation.get("Instances", ())
