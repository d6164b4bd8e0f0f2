"""Where instances are put: subnets, one of each zone, and a security group that lets in one port.

The port is open to everybody: who may speak to a machine is decided by mutual TLS, before a byte of a request is read. A group
that knew the driver's address would fail whenever that changes (a laptop, a train), and behind most NATs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...errors import UsageError
from .api import Ec2Error

GROUP = "bigmachine"
"""The name of our security group; there is one in each network that was used. It costs nothing, and stays."""

ANYWHERE = ("0.0.0.0/0", "::/0")
"""Those in the group among them."""


PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds between tries to find, or to open, a group that AWS, where it has just been made, does not know everywhere yet."""


class Calls(Protocol):
    """The part of `api.Api` that is used here."""

    @property
    def region(self) -> str: ...
    def call(self, service: str, operation: str, **parameters: Any) -> dict[str, Any]: ...
    def pages(self, service: str, operation: str, key: str, **parameters: Any) -> Iterator[Any]: ...


class Chosen(Protocol):
    """The part of `settings.Settings` that is used here."""

    @property
    def subnets(self) -> tuple[str, ...]: ...
    @property
    def securitygroups(self) -> tuple[str, ...]: ...
    @property
    def port(self) -> int: ...


@dataclass(frozen=True)
class Subnet:
    """`free` is how many addresses it has left."""

    id: str
    zone: str
    vpc: str
    free: int


@dataclass(frozen=True)
class Network:
    """`subnets` in the order in which they are to be tried, all of one VPC; `groups` are ids."""

    subnets: tuple[Subnet, ...]
    groups: tuple[str, ...]


def find_network(api: Calls, settings: Chosen, tags: Mapping[str, str]) -> Network:
    """The subnets and groups that `settings` mean. Our own group is made where it is missing, with `tags`. Raises `UsageError`,
    `Ec2Error`."""
    subnets = find_subnets(api, settings)
    if settings.securitygroups:
        return Network(subnets, settings.securitygroups)
    return Network(subnets, (own_group(api, subnets[0].vpc, settings.port, tags),))


def find_subnets(api: Calls, settings: Chosen) -> tuple[Subnet, ...]:
    """Those of the settings, in their order, or the default VPC's, the one with most free addresses first."""
    if settings.subnets:
        found = _subnets(api, SubnetIds=list(settings.subnets))
        by_id = {subnet.id: subnet for subnet in found}
        chosen = tuple(by_id[id] for id in settings.subnets)
        if len({subnet.vpc for subnet in chosen}) > 1:
            raise UsageError(f"the subnets are of different networks (VPCs): {', '.join(settings.subnets)}: -bigm.ec2subnets")
        return chosen
    filters = [{"Name": "default-for-az", "Values": ["true"]}]
    found = _subnets(api, Filters=filters)
    if not found:
        raise Ec2Error("ec2:DescribeSubnets", "VPCIdNotSpecified", "there are no default subnets", api.region)
    return tuple(sorted(found, key=lambda subnet: (-subnet.free, subnet.zone)))


def _subnets(api: Calls, **parameters: Any) -> list[Subnet]:
    return [
        Subnet(entry["SubnetId"], entry["AvailabilityZone"], entry["VpcId"], entry.get("AvailableIpAddressCount", 0))
        for entry in api.pages("ec2", "DescribeSubnets", "Subnets", **parameters)
        if entry.get("State", "available") == "available" or "SubnetIds" in parameters
    ]


def own_group(api: Calls, vpc: str, port: int, tags: Mapping[str, str]) -> str:
    """The id of our group in `vpc`, which has `port` open."""
    group = find_group(api, vpc)
    if group is None:
        try:
            answer = api.call(
                "ec2",
                "CreateSecurityGroup",
                GroupName=GROUP,
                Description="Machines of bigmachine: their port, guarded by mutual TLS",
                VpcId=vpc,
                TagSpecifications=[{"ResourceType": "security-group", "Tags": pairs(tags)}],
            )
            group = {"GroupId": answer["GroupId"]}
        except Ec2Error as error:
            if error.code != "InvalidGroup.Duplicate":
                raise
            group = _appears(api, vpc)  # Another driver was faster.
            if group is None:
                raise
    for missing in closed(group.get("IpPermissions", []), port):
        _open(api, str(group["GroupId"]), missing)
    return str(group["GroupId"])


def _appears(api: Calls, vpc: str) -> Mapping[str, Any] | None:
    """Our group, which is there, though AWS may not show it yet."""
    for pause in (*PAUSES, 0.0):
        if (group := find_group(api, vpc)) is not None:
            return group
        time.sleep(pause)
    return None


def _open(api: Calls, group: str, permission: Mapping[str, Any]) -> None:
    for pause in (*PAUSES, None):
        try:
            api.call("ec2", "AuthorizeSecurityGroupIngress", GroupId=group, IpPermissions=[permission])
            return
        except Ec2Error as error:
            if error.code == "InvalidPermission.Duplicate":
                return
            if error.code != "InvalidGroup.NotFound" or pause is None:
                raise
        time.sleep(pause)


def find_group(api: Calls, vpc: str) -> Mapping[str, Any] | None:
    """Our group in `vpc`, as DescribeSecurityGroups has it."""
    filters = [{"Name": "vpc-id", "Values": [vpc]}, {"Name": "group-name", "Values": [GROUP]}]
    return next(api.pages("ec2", "DescribeSecurityGroups", "SecurityGroups", Filters=filters), None)


def closed(permissions: Sequence[Mapping[str, Any]], port: int) -> list[dict[str, Any]]:
    """What is to be added to a group's `permissions` so that everybody can connect to `port`. Pure."""
    open_to: set[str] = set()
    for each in permissions:
        everything = each.get("IpProtocol") == "-1"
        if everything or (each.get("IpProtocol") == "tcp" and each.get("FromPort", 0) <= port <= each.get("ToPort", 65535)):
            open_to.update(entry["CidrIp"] for entry in each.get("IpRanges", ()))
            open_to.update(entry["CidrIpv6"] for entry in each.get("Ipv6Ranges", ()))
    missing: list[dict[str, Any]] = []
    for cidr in ANYWHERE:
        if cidr not in open_to:
            ranges = {"Ipv6Ranges": [{"CidrIpv6": cidr}]} if ":" in cidr else {"IpRanges": [{"CidrIp": cidr}]}
            missing.append({"IpProtocol": "tcp", "FromPort": port, "ToPort": port, **ranges})
    return missing


def pairs(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Tags as the API has them."""
    return [{"Key": key, "Value": value} for key, value in tags.items()]
