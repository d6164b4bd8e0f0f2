"""Which of the calls that we need the identity may make, found out without making them.

Those that look are made; those that would change something are made with ``DryRun``: AWS then answers by an error of its own,
``DryRunOperation``, where the call would be allowed, and by a refusal where it would not. What such a call names need not
exist: AWS decides about permissions first. (A policy that depends on the tags of what is named may refuse all the same.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .api import DENIED, Ec2Error
from .instances import Calls
from .prices import HOME

NO_INSTANCE = "i-00000000000000000"
NO_GROUP = "sg-00000000000000000"
NOBODY = "bigmachine-doctor"
"""What does not exist."""

_WOULD = "DryRunOperation"


@dataclass(frozen=True)
class Wish:
    """A call that we make: `why` says for what, where machines can be had without."""

    service: str
    operation: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    region: str = ""

    @property
    def name(self) -> str:
        return f"{self.service}:{self.operation}"


@dataclass(frozen=True)
class Outcome:
    """Of a `Wish`: whether it is allowed, and what else AWS had against it."""

    wish: Wish
    allowed: bool
    problem: Ec2Error | None = None


LOOKS: Sequence[Wish] = (
    Wish("ec2", "DescribeInstances", {"MaxResults": 5}),
    Wish("ec2", "GetConsoleOutput", {"InstanceId": NO_INSTANCE}, "the report of a failed boot"),
    Wish("ec2", "DescribeLaunchTemplates", {"MaxResults": 1}, "bigmachine gc"),
    Wish("ec2", "DescribeRegions", {}, "bigmachine ps --all-regions"),
    Wish("ec2", "DescribeSpotPriceHistory", {"MaxResults": 1}, "costs"),
    Wish("pricing", "GetProducts", {"ServiceCode": "AmazonEC2", "MaxResults": 1}, "costs", HOME),
)
"""Besides those whose answers are needed for other checks."""

_TEMPLATE = {"LaunchTemplateName": NOBODY}
_FLEET: Sequence[Wish] = (
    Wish("ec2", "CreateLaunchTemplate", {**_TEMPLATE, "LaunchTemplateData": {"InstanceType": "m7i.large"}}),
    Wish(
        "ec2",
        "CreateFleet",
        {
            "Type": "instant",
            "LaunchTemplateConfigs": [{"LaunchTemplateSpecification": {**_TEMPLATE, "Version": "1"}}],
            "TargetCapacitySpecification": {"TotalTargetCapacity": 1, "DefaultTargetCapacityType": "spot"},
        },
    ),
    Wish("ec2", "DeleteLaunchTemplate", _TEMPLATE),
)


def changes(runs: Sequence[Mapping[str, Any]], several: bool, group: str | None) -> Iterator[Wish]:
    """What a launch does. `runs` are the parameters of RunInstances, for each market; `several` is whether several types are
    wanted; `group` what of our security group is missing: ``"group"``, ``"port"`` or ``""``, None where it is not ours."""
    for parameters in runs:
        yield Wish("ec2", "RunInstances", parameters)
    yield Wish("ec2", "TerminateInstances", {"InstanceIds": [NO_INSTANCE]})
    tags = [{"Key": "bigmachine:expires", "Value": "never"}]
    yield Wish("ec2", "CreateTags", {"Resources": [NO_INSTANCE], "Tags": tags})
    for wish in _FLEET:
        yield wish if several else replace(wish, why="launches of several types")
    if group is not None:
        parameters = {"GroupName": NOBODY, "Description": NOBODY}
        yield Wish("ec2", "CreateSecurityGroup", parameters, "" if group == "group" else "other networks")
        rule = {"IpProtocol": "tcp", "FromPort": 443, "ToPort": 443, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
        parameters = {"GroupId": NO_GROUP, "IpPermissions": [rule]}
        yield Wish("ec2", "AuthorizeSecurityGroupIngress", parameters, "" if group else "other ports and networks")


def look(api: Calls, wish: Wish) -> Outcome:
    """Make the call."""
    return _ask(api, wish, wish.parameters)


def dry_run(api: Calls, wish: Wish) -> Outcome:
    """Ask whether the call could be made."""
    outcome = _ask(api, wish, {**wish.parameters, "DryRun": True})
    if outcome.allowed or "IamInstanceProfile" not in wish.parameters:
        return outcome
    # AWS does not say which of the two it is: the launch, or the role that goes with it.
    without = {name: value for name, value in wish.parameters.items() if name != "IamInstanceProfile"}
    if _ask(api, wish, {**without, "DryRun": True}).allowed:
        return Outcome(Wish("iam", "PassRole"), False)
    return outcome


def _ask(api: Calls, wish: Wish, parameters: Mapping[str, Any]) -> Outcome:
    try:
        api.call(wish.service, wish.operation, region=wish.region, **parameters)
    except Ec2Error as error:
        if error.code in DENIED:
            return Outcome(wish, False)
        # What does not exist is our invention, but in a launch: what that names, the user has chosen.
        invented = wish.operation != "RunInstances" and ("NotFound" in error.code or "Malformed" in error.code)
        return Outcome(wish, True, None if invented or error.code == _WOULD else error)
    return Outcome(wish, True)
