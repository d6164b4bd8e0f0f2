"""How instances come about: which markets, zones and types are tried, in which order, and what is asked of AWS for each.

Rule 1. Spot first, unless only on demand is wanted; then on demand, unless only spot is wanted.
Rule 2. With one type: RunInstances, in one zone after the other. Each gives as many as it can (MinCount 1), the next gives the
rest. With several: CreateFleet, which knows better than we do in which pool the interruptions are rare.
Rule 3. What one zone, or one type, is short of (`NEXT`), the next may have. What the account may not have in this market
(`NEXT_MARKET`), no zone has. Anything else would be the same again, and ends the launch.
Rule 4. What has been got is used, whatever happens to the rest.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...errors import BigmachineError
from .api import Ec2Error
from .images import Image
from .naming import specifications
from .network import Network, Subnet
from .prices import ON_DEMAND, SPOT
from .types import InstanceType

NEXT = {
    "InsufficientInstanceCapacity",
    "InsufficientHostCapacity",
    "InsufficientReservedInstanceCapacity",
    "InsufficientCapacity",
    "InsufficientCapacityOnHost",
    "InsufficientFreeAddressesInSubnet",
    "UnfulfillableCapacity",
    "SpotMaxPriceTooLow",  # Prices differ between zones.
    "Unsupported",  # The type is not offered in that zone.
    "UnsupportedOperation",
    "InvalidFleetConfiguration",  # What CreateFleet says of a type that the zone does not have.
    "Server.InternalError",
    "InternalError",
    "Unavailable",
}
"""Codes after which another zone or type may do."""

NEXT_MARKET = {
    "MaxSpotInstanceCountExceeded",
    "VcpuLimitExceeded",
    "InstanceLimitExceeded",
    "AuthFailure.ServiceLinkedRoleCreationNotPermitted",  # Of the account's first spot request.
}
"""Codes after which only the other market may do."""

THROUGHPUT = 250
"""MiB/s of a root disk. gp3's baseline is 125, and a boot reads for more than ten seconds at that; the difference is 5 USD a
month for each disk, less than a cent an hour."""

STRIPE = 100
"""GiB of data space that a volume has at least, before there is another."""

STRIPES = 4
"""Volumes at most: together they are as quick as most instances' connection to them."""

STRIPED = "fghijklm"
"""The last letters of their device names, ``/dev/sdf``, as AWS recommends."""


PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before a fleet is asked for again whose template AWS does not know yet."""


@dataclass(frozen=True)
class Attempt:
    """One thing to try: instances in `market`, of one of `types`, in one of `subnets`."""

    market: str
    types: tuple[str, ...]
    subnets: tuple[Subnet, ...]

    def __str__(self) -> str:
        zones = dict.fromkeys(subnet.zone for subnet in self.subnets)
        return f"{self.market.replace('-', ' ')} {' or '.join(self.types)} in {' or '.join(zones)}"


@dataclass(frozen=True)
class Placed:
    """An instance that AWS has begun to start. `zone` is empty where it has not said which."""

    id: str
    type: str
    market: str
    zone: str


@dataclass(frozen=True)
class Refusal:
    """Why an attempt gave no more."""

    attempt: Attempt
    code: str
    message: str


class NoCapacity(BigmachineError):
    """`missing` of `wanted` instances could not be had; `tried` says, line by line, what was tried and what AWS said."""

    def __init__(self, wanted: int, missing: int, tried: Sequence[str], hint: str) -> None:
        super().__init__(wanted, missing, tried, hint)
        self.wanted = wanted
        self.missing = missing
        self.tried = tried
        self.hint = hint

    def __str__(self) -> str:
        lacking = "no instance" if self.missing == self.wanted else f"{self.missing} of {self.wanted} instances not"
        return f"{lacking} to be had: {'; '.join(self.tried)}; {self.hint}"


# -- What to try: pure ---------------------------------------------------------------------------------------------------


class Wishes(Protocol):
    """The part of `settings.Settings` that says which market."""

    @property
    def ondemand(self) -> bool: ...
    @property
    def spotonly(self) -> bool: ...


def markets(wishes: Wishes, types: Sequence[InstanceType]) -> list[str]:
    """In the order in which they are tried."""
    spot = [] if wishes.ondemand or not any(each.spot for each in types) else [SPOT]
    return spot if wishes.spotonly else [*spot, ON_DEMAND]


def attempts(markets: Sequence[str], types: Sequence[InstanceType], subnets: Sequence[Subnet]) -> list[Attempt]:
    """All that is to be tried, in order; see the module."""
    planned: list[Attempt] = []
    for market in markets:
        fitting = tuple(each.name for each in types if each.spot or market != SPOT)
        if len(fitting) > 1:
            planned.append(Attempt(market, fitting, tuple(subnets)))
        else:
            planned += [Attempt(market, fitting, (subnet,)) for subnet in subnets]
    return planned


def place(
    count: int,
    planned: Sequence[Attempt],
    launch: Callable[[Attempt, int], tuple[Sequence[Placed], Sequence[Ec2Error]]],
    got: Callable[[Sequence[Placed]], None],
) -> list[Refusal]:
    """Make `planned` attempts until there are `count` instances; each goes to `got` as soon as it is there. `launch` makes one.

    Returns why some were refused. Raises `NoCapacity` when nothing is left to be tried, and whatever other `Ec2Error` it was.
    """
    missing = count
    refused: list[Refusal] = []
    closed: set[str] = set()
    for attempt in planned:
        if attempt.market in closed:
            continue
        try:
            placed, errors = launch(attempt, missing)
        except Ec2Error as error:
            placed, errors = (), (error,)
        if placed:
            missing -= len(placed)
            got(placed)
        if missing <= 0:
            return refused
        refused += [Refusal(attempt, each.code, each.message) for each in errors]
        closed.update(attempt.market for each in errors if each.code in NEXT_MARKET)
        if hopeless := [each for each in errors if each.code not in NEXT | NEXT_MARKET]:
            raise hopeless[0]
    raise NoCapacity(count, missing, _told(refused), _hint(planned, refused))


def _told(refused: Sequence[Refusal]) -> list[str]:
    """What was tried, and what AWS said: a line for those that differ in the zone only."""
    zones: dict[tuple[str, str], list[str]] = {}
    for each in refused:
        what, _, where = str(each.attempt).partition(" in ")
        zones.setdefault((what, each.code), []).append(where)
    return [f"{what} in {', '.join(sorted({*where}))}: {code}" for (what, code), where in zones.items()]


def _hint(planned: Sequence[Attempt], refused: Sequence[Refusal]) -> str:
    if {each.code for each in refused} & NEXT_MARKET:
        return "ask for a higher quota (`bigmachine doctor ec2` says which), or for fewer or smaller machines"
    if not any(attempt.market == ON_DEMAND for attempt in planned):
        return "leave out -bigm.ec2spotonly, or name more types: -bigm.ec2type=m7i.large,m6i.large"
    return "name more types (-bigm.ec2type=m7i.large,m6i.large), or use another region: -bigm.ec2region"


# -- What is asked of AWS: pure ------------------------------------------------------------------------------------------


class Shape(Protocol):
    """The part of `settings.Settings` that instances are made by."""

    @property
    def maxprice(self) -> str: ...
    @property
    def diskspace(self) -> int: ...
    @property
    def dataspace(self) -> int: ...
    @property
    def publicip(self) -> bool: ...
    @property
    def instanceprofile(self) -> str: ...
    @property
    def keypair(self) -> str: ...


@dataclass(frozen=True)
class Wanted:
    """What all instances of a launch have in common."""

    settings: Shape
    types: Sequence[InstanceType]
    image: Image
    network: Network
    user_data: bytes
    tags: Mapping[str, str]


def data_space(types: Sequence[InstanceType], gib: int) -> str:
    """Where data space comes from: ``"nvme"`` the types' own disks, where all have enough, or ``"ebs"``; empty for none."""
    if not gib:
        return ""
    return "nvme" if all(each.nvme[1] * 1e9 >= gib * 2**30 for each in types) else "ebs"


def volumes(types: Sequence[InstanceType], gib: int) -> int:
    """How many disks data space is striped over."""
    kind = data_space(types, gib)
    if kind == "nvme":
        return min(each.nvme[0] for each in types)
    return max(1, min(STRIPES, gib // STRIPE)) if kind else 0


def disks(wanted: Wanted) -> list[dict[str, Any]]:
    """Block device mappings: everything goes with the instance."""

    def volume(device: str, size: int) -> dict[str, Any]:
        ebs = {"VolumeSize": size, "VolumeType": "gp3", "Throughput": THROUGHPUT, "DeleteOnTermination": True}
        return {"DeviceName": device, "Ebs": ebs}

    found = [volume(wanted.image.root_device, wanted.settings.diskspace)]
    gib = wanted.settings.dataspace
    if data_space(wanted.types, gib) == "ebs":
        count = volumes(wanted.types, gib)
        found += [volume(f"/dev/sd{letter}", -(-gib // count)) for letter in STRIPED[:count]]
    return found


def common(wanted: Wanted, market: str) -> dict[str, Any]:
    """What RunInstances and a launch template both know."""
    settings = wanted.settings
    interface: dict[str, Any] = {
        "DeviceIndex": 0,
        "Groups": list(wanted.network.groups),
        "AssociatePublicIpAddress": settings.publicip,
        "DeleteOnTermination": True,
    }
    request: dict[str, Any] = {
        "ImageId": wanted.image.id,
        "NetworkInterfaces": [interface],
        "BlockDeviceMappings": disks(wanted),
        "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled"},
        "TagSpecifications": specifications(wanted.tags, ["instance", "volume"]),
    }
    if market != SPOT:  # A spot instance that powers off is terminated anyway, and AWS refuses to be told so.
        request["InstanceInitiatedShutdownBehavior"] = "terminate"
    if all(each.ebs_optimized for each in wanted.types):
        request["EbsOptimized"] = True
    if settings.keypair:
        request["KeyName"] = settings.keypair
    if settings.instanceprofile:
        kind = "Arn" if settings.instanceprofile.startswith("arn:") else "Name"
        request["IamInstanceProfile"] = {kind: settings.instanceprofile}
    return request


def run_instances(wanted: Wanted, attempt: Attempt, count: int, token: str) -> dict[str, Any]:
    """The parameters of RunInstances, for an attempt with one type and one subnet."""
    request = common(wanted, attempt.market)
    request["NetworkInterfaces"][0]["SubnetId"] = attempt.subnets[0].id
    request |= {"InstanceType": attempt.types[0], "MinCount": 1, "MaxCount": count, "ClientToken": token}
    request["UserData"] = wanted.user_data  # boto3 encodes it, here.
    if attempt.market == SPOT:
        options = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
        if wanted.settings.maxprice:
            options["MaxPrice"] = wanted.settings.maxprice
        request["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": options}
        request["TagSpecifications"] += specifications(wanted.tags, ["spot-instances-request"])
    return request


def launch_template(wanted: Wanted, market: str, name: str, token: str) -> dict[str, Any]:
    """The parameters of CreateLaunchTemplate."""
    data = common(wanted, market)
    data["UserData"] = base64.b64encode(wanted.user_data).decode("ascii")  # And not here.
    return {
        "LaunchTemplateName": name,
        "LaunchTemplateData": data,
        "TagSpecifications": specifications(wanted.tags, ["launch-template"]),
        "ClientToken": token,
    }


def create_fleet(wanted: Wanted, attempt: Attempt, count: int, template: str, token: str) -> dict[str, Any]:
    """The parameters of CreateFleet, with the id of the launch template."""
    price = {"MaxPrice": wanted.settings.maxprice} if attempt.market == SPOT and wanted.settings.maxprice else {}
    overrides = [
        {"InstanceType": type, "SubnetId": subnet.id, **price} for type in attempt.types for subnet in attempt.subnets
    ]
    request: dict[str, Any] = {
        "Type": "instant",
        "LaunchTemplateConfigs": [
            {
                "LaunchTemplateSpecification": {"LaunchTemplateId": template, "Version": "1"},
                "Overrides": overrides,
            }
        ],
        "TargetCapacitySpecification": {"TotalTargetCapacity": count, "DefaultTargetCapacityType": attempt.market},
        "TagSpecifications": specifications(wanted.tags, ["fleet"]),
        "ClientToken": token,
    }
    if attempt.market == SPOT:
        strategy = {"AllocationStrategy": "capacity-optimized", "InstanceInterruptionBehavior": "terminate"}
        request["SpotOptions"] = strategy
    else:
        request["OnDemandOptions"] = {"AllocationStrategy": "lowest-price"}
    return request


# -- Doing it ------------------------------------------------------------------------------------------------------------


class Calls(Protocol):
    """The part of `api.Api` that is used here."""

    @property
    def region(self) -> str: ...
    def call(self, service: str, operation: str, **parameters: Any) -> dict[str, Any]: ...


def launch(api: Calls, wanted: Wanted, attempt: Attempt, count: int) -> tuple[list[Placed], list[Ec2Error]]:
    """Make one attempt: the instances that there are now, and what AWS said of the others. Raises `Ec2Error`."""
    if len(attempt.types) == 1 and len(attempt.subnets) == 1:
        answer = api.call("ec2", "RunInstances", **run_instances(wanted, attempt, count, _token()))
        zone = attempt.subnets[0].zone
        return [Placed(each["InstanceId"], attempt.types[0], attempt.market, zone) for each in answer["Instances"]], []
    name = f"bigmachine-{secrets.token_hex(8)}"
    request = launch_template(wanted, attempt.market, name, _token())
    template = api.call("ec2", "CreateLaunchTemplate", **request)["LaunchTemplate"]["LaunchTemplateId"]
    try:
        answer = _fleet(api, wanted, attempt, count, template)
    finally:
        try:
            api.call("ec2", "DeleteLaunchTemplate", LaunchTemplateId=template)
        except Ec2Error:
            pass  # It costs nothing, and `bigmachine gc` finds it by its tags.
    return list(_of_fleet(answer, attempt)), _fleet_errors(answer, api.region)


def _fleet(api: Calls, wanted: Wanted, attempt: Attempt, count: int, template: str) -> dict[str, Any]:
    """CreateFleet; again after a while, where AWS does not know a template everywhere that it has just made."""
    for pause in (*PAUSES, None):
        try:
            answer = api.call("ec2", "CreateFleet", **create_fleet(wanted, attempt, count, template, _token()))
        except Ec2Error as error:
            if pause is None or not _unknown_template(error.code):
                raise
        else:
            codes = [error.get("ErrorCode", "") for error in answer.get("Errors", ())]
            if pause is None or answer.get("Instances") or not any(map(_unknown_template, codes)):
                return answer
        time.sleep(pause)
    raise AssertionError


def _unknown_template(code: str) -> bool:
    return code.startswith("InvalidLaunchTemplate") and "NotFound" in code


def _of_fleet(answer: Mapping[str, Any], attempt: Attempt) -> Iterator[Placed]:
    zones = {subnet.id: subnet.zone for subnet in attempt.subnets}
    for group in answer.get("Instances", ()):
        override = group.get("LaunchTemplateAndOverrides", {}).get("Overrides", {})
        zone = override.get("AvailabilityZone") or zones.get(override.get("SubnetId", ""), "")
        type = group.get("InstanceType") or override.get("InstanceType") or attempt.types[0]
        for id in group.get("InstanceIds", ()):
            yield Placed(id, type, attempt.market, zone)


def _fleet_errors(answer: Mapping[str, Any], region: str) -> list[Ec2Error]:
    """One of each code: there is one for each pool."""
    by_code: dict[str, Ec2Error] = {}
    for error in answer.get("Errors", ()):
        code = error.get("ErrorCode", "Unknown")
        by_code.setdefault(code, Ec2Error("ec2:CreateFleet", code, error.get("ErrorMessage", ""), region))
    return list(by_code.values())


def _token() -> str:
    return secrets.token_hex(16)
