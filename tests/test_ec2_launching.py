"""What is tried to get instances, in which order, and what is asked of AWS for it."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from amazon import Scripted

from bigmachine.systems.ec2 import launching
from bigmachine.systems.ec2.api import Ec2Error
from bigmachine.systems.ec2.images import Image
from bigmachine.systems.ec2.launching import (
    NEXT,
    NEXT_MARKET,
    Attempt,
    NoCapacity,
    Placed,
    Wanted,
    attempts,
    common,
    create_fleet,
    data_space,
    disks,
    launch,
    launch_template,
    markets,
    place,
    run_instances,
    volumes,
)
from bigmachine.systems.ec2.network import Network, Subnet
from bigmachine.systems.ec2.settings import Settings
from bigmachine.systems.ec2.types import InstanceType

A, B, C = (Subnet(f"subnet-{zone}", f"us-east-1{zone}", "vpc-1", 100) for zone in "abc")
LARGE = InstanceType("m7i.large", 2, 8 << 30, "amd64", (0, 0), True, True, True)
OTHER = replace(LARGE, name="m6i.large")
NO_SPOT = replace(LARGE, name="x1.large", spot=False)
DISKS = replace(LARGE, name="m7id.large", nvme=(1, 118))

SPOT_FIRST = ["spot", "on-demand"]


# -- What to try ---------------------------------------------------------------------------------------------------------


def test_markets() -> None:
    assert markets(Settings(), [LARGE]) == SPOT_FIRST
    assert markets(Settings(ondemand=True), [LARGE]) == ["on-demand"]
    assert markets(Settings(spotonly=True), [LARGE]) == ["spot"]
    assert markets(Settings(), [NO_SPOT]) == ["on-demand"]
    assert markets(Settings(spotonly=True), [NO_SPOT]) == []
    assert markets(Settings(), [NO_SPOT, LARGE]) == SPOT_FIRST


def test_one_type_is_tried_in_each_zone_in_turn() -> None:
    assert attempts(SPOT_FIRST, [LARGE], [B, A]) == [
        Attempt("spot", ("m7i.large",), (B,)),
        Attempt("spot", ("m7i.large",), (A,)),
        Attempt("on-demand", ("m7i.large",), (B,)),
        Attempt("on-demand", ("m7i.large",), (A,)),
    ]


def test_several_types_are_one_attempt_in_each_market() -> None:
    planned = attempts(SPOT_FIRST, [LARGE, OTHER], [A, B])
    assert planned == [Attempt(market, ("m7i.large", "m6i.large"), (A, B)) for market in SPOT_FIRST]
    assert str(planned[1]) == "on demand m7i.large or m6i.large in us-east-1a or us-east-1b"


def test_what_there_is_not_on_the_spot_is_not_tried_there() -> None:
    first, second, both = attempts(SPOT_FIRST, [LARGE, NO_SPOT], [A, B])
    assert (first.types, second.types, both.types) == (("m7i.large",), ("m7i.large",), ("m7i.large", "x1.large"))


class Aws:
    """Gives what is in `room`, by market and zone, and refuses with a code, where it is one."""

    def __init__(self, room: dict[tuple[str, str], int | str]) -> None:
        self.room = room
        self.tried: list[tuple[str, str, int]] = []
        self.got: list[Placed] = []
        self._ids = itertools.count()

    def launch(self, attempt: Attempt, count: int) -> tuple[Sequence[Placed], Sequence[Ec2Error]]:
        zone = attempt.subnets[0].zone[-1]
        self.tried.append((attempt.market, zone, count))
        room = self.room.get((attempt.market, zone), "InsufficientInstanceCapacity")
        if isinstance(room, str):
            raise Ec2Error("ec2:RunInstances", room, "no")
        return [Placed(f"i-{next(self._ids)}", "m7i.large", attempt.market, zone) for _ in range(min(room, count))], []

    def place(self, count: int, markets: Sequence[str] = SPOT_FIRST) -> list[str]:
        refused = place(count, attempts(markets, [LARGE], [A, B, C]), self.launch, self.got.extend)
        return [refusal.code for refusal in refused]


def test_the_first_zone_has_all() -> None:
    aws = Aws({("spot", "a"): 100})
    assert aws.place(5) == []
    assert (aws.tried, len(aws.got)) == ([("spot", "a", 5)], 5)


def test_what_one_zone_lacks_the_next_gives() -> None:
    aws = Aws({("spot", "a"): 2, ("spot", "c"): 100})
    assert aws.place(5) == ["InsufficientInstanceCapacity"]
    assert aws.tried == [("spot", "a", 5), ("spot", "b", 3), ("spot", "c", 3)]
    assert len(aws.got) == 5


@pytest.mark.parametrize("code", sorted(NEXT))
def test_every_zone_then_on_demand(code: str) -> None:
    aws = Aws({("spot", "a"): code, ("spot", "b"): code, ("spot", "c"): code, ("on-demand", "b"): 100})
    assert aws.place(2) == [code] * 3 + ["InsufficientInstanceCapacity"]
    assert [tried[:2] for tried in aws.tried] == [("spot", zone) for zone in "abc"] + [("on-demand", zone) for zone in "ab"]
    assert {placed.market for placed in aws.got} == {"on-demand"}


@pytest.mark.parametrize("code", sorted(NEXT_MARKET))
def test_what_no_zone_may_give_is_not_asked_of_the_others(code: str) -> None:
    aws = Aws({("spot", "a"): code, ("on-demand", "a"): 100})
    assert aws.place(2) == [code]
    assert [tried[:2] for tried in aws.tried] == [("spot", "a"), ("on-demand", "a")]


def test_nothing_anywhere() -> None:
    aws = Aws({("spot", "a"): 1})
    with pytest.raises(NoCapacity) as caught:
        aws.place(3, ["spot"])
    assert len(aws.got) == 1, "what there is is used"
    text = str(caught.value)
    tried = "spot m7i.large in us-east-1b, us-east-1c: InsufficientInstanceCapacity"
    assert text.startswith(f"2 of 3 instances not to be had: {tried}; ")
    assert "leave out -bigm.ec2spotonly" in text
    with pytest.raises(NoCapacity, match=r"no instance to be had: .* use another region: -bigm\.ec2region"):
        Aws({}).place(1)
    with pytest.raises(NoCapacity, match="ask for a higher quota"):
        Aws({("spot", "a"): "MaxSpotInstanceCountExceeded", ("on-demand", "a"): "VcpuLimitExceeded"}).place(1)


def test_what_would_be_the_same_again_ends_it() -> None:
    aws = Aws({("spot", "a"): 1, ("spot", "b"): "UnauthorizedOperation", ("spot", "c"): 100})
    with pytest.raises(Ec2Error, match="allow ec2:RunInstances"):
        aws.place(3)
    assert len(aws.got) == 1
    assert [zone for _, zone, _ in aws.tried] == ["a", "b"]


# -- What is asked of AWS ------------------------------------------------------------------------------------------------


def wanted(types: Sequence[InstanceType] = (LARGE,), **settings: Any) -> Wanted:
    network = Network((A, B), ("sg-1",))
    image = Image("ami-1", "Debian 12", "admin", "/dev/xvda")
    return Wanted(Settings(**settings), types, image, network, b"#!user-data", {"Name": "ada"})


SPOT = Attempt("spot", ("m7i.large",), (A,))
ON_DEMAND = Attempt("on-demand", ("m7i.large",), (A,))


def test_run_instances_on_demand() -> None:
    request = run_instances(wanted(), ON_DEMAND, 5, "token")
    assert request == {
        "ImageId": "ami-1",
        "InstanceType": "m7i.large",
        "MinCount": 1,
        "MaxCount": 5,
        "ClientToken": "token",
        "UserData": b"#!user-data",
        "EbsOptimized": True,
        "InstanceInitiatedShutdownBehavior": "terminate",
        "MetadataOptions": {"HttpTokens": "required", "HttpEndpoint": "enabled"},
        "NetworkInterfaces": [
            {
                "DeviceIndex": 0,
                "SubnetId": "subnet-a",
                "Groups": ["sg-1"],
                "AssociatePublicIpAddress": True,
                "DeleteOnTermination": True,
            }
        ],
        "BlockDeviceMappings": [
            {
                "DeviceName": "/dev/xvda",
                "Ebs": {"VolumeSize": 50, "VolumeType": "gp3", "Throughput": 250, "DeleteOnTermination": True},
            }
        ],
        "TagSpecifications": [
            {"ResourceType": "instance", "Tags": [{"Key": "Name", "Value": "ada"}]},
            {"ResourceType": "volume", "Tags": [{"Key": "Name", "Value": "ada"}]},
        ],
    }


def test_run_instances_on_the_spot() -> None:
    request = run_instances(wanted(), SPOT, 1, "token")
    assert "InstanceInitiatedShutdownBehavior" not in request
    options = {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}
    assert request["InstanceMarketOptions"] == {"MarketType": "spot", "SpotOptions": options}
    kinds = [each["ResourceType"] for each in request["TagSpecifications"]]
    assert kinds == ["instance", "volume", "spot-instances-request"]
    priced = run_instances(wanted(maxprice="0.05"), SPOT, 1, "token")
    assert priced["InstanceMarketOptions"]["SpotOptions"] == {**options, "MaxPrice": "0.05"}


def test_what_the_user_has_set() -> None:
    request = common(wanted(keypair="me", instanceprofile="reader", publicip=False, diskspace=200), "spot")
    assert (request["KeyName"], request["IamInstanceProfile"]) == ("me", {"Name": "reader"})
    assert request["NetworkInterfaces"][0]["AssociatePublicIpAddress"] is False
    assert request["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] == 200
    arn = "arn:aws:iam::1:instance-profile/reader"
    assert common(wanted(instanceprofile=arn), "spot")["IamInstanceProfile"] == {"Arn": arn}
    assert "EbsOptimized" not in common(wanted([LARGE, replace(OTHER, ebs_optimized=False)]), "spot")


@pytest.mark.parametrize(
    ("types", "gib", "kind", "sizes"),
    [
        ([LARGE], 0, "", []),
        ([LARGE], 10, "ebs", [10]),
        ([LARGE], 250, "ebs", [125, 125]),
        ([LARGE], 1001, "ebs", [251] * 4),
        ([DISKS], 0, "", []),
        ([DISKS], 100, "nvme", []),
        ([DISKS], 120, "ebs", [120]),
        ([DISKS, LARGE], 100, "ebs", [100]),
    ],
)
def test_data_space(types: list[InstanceType], gib: int, kind: str, sizes: list[int]) -> None:
    assert data_space(types, gib) == kind
    root, *data = disks(wanted(types, dataspace=gib))
    assert root["DeviceName"] == "/dev/xvda"
    assert [each["Ebs"]["VolumeSize"] for each in data] == sizes
    assert volumes(types, gib) == (1 if kind == "nvme" else len(sizes))
    assert [each["DeviceName"] for each in data] == ["/dev/sdf", "/dev/sdg", "/dev/sdh", "/dev/sdi"][: len(data)]
    assert all(each["Ebs"]["DeleteOnTermination"] for each in data)


def test_a_fleet_and_its_template() -> None:
    attempt = Attempt("spot", ("m7i.large", "m6i.large"), (A, B))
    both = wanted([LARGE, OTHER], maxprice="0.05")
    template = launch_template(both, "spot", "name", "token")
    data = template["LaunchTemplateData"]
    assert base64.b64decode(data["UserData"]) == b"#!user-data"
    assert "SubnetId" not in data["NetworkInterfaces"][0], "the fleet's overrides say which"
    assert "InstanceInitiatedShutdownBehavior" not in data
    assert [each["ResourceType"] for each in template["TagSpecifications"]] == ["launch-template"]
    fleet = create_fleet(both, attempt, 7, "lt-1", "token")
    assert fleet["Type"] == "instant"
    assert fleet["TargetCapacitySpecification"] == {"TotalTargetCapacity": 7, "DefaultTargetCapacityType": "spot"}
    assert fleet["SpotOptions"]["AllocationStrategy"] == "capacity-optimized"
    (config,) = fleet["LaunchTemplateConfigs"]
    assert config["LaunchTemplateSpecification"] == {"LaunchTemplateId": "lt-1", "Version": "1"}
    pools = [(each["InstanceType"], each["SubnetId"]) for each in config["Overrides"]]
    assert pools == list(itertools.product(attempt.types, ["subnet-a", "subnet-b"]))
    assert {each["MaxPrice"] for each in config["Overrides"]} == {"0.05"}
    other = create_fleet(both, replace(attempt, market="on-demand"), 7, "lt-1", "token")
    assert "SpotOptions" not in other
    assert all("MaxPrice" not in each for each in other["LaunchTemplateConfigs"][0]["Overrides"])
    data = launch_template(both, "on-demand", "name", "token")["LaunchTemplateData"]
    assert data["InstanceInitiatedShutdownBehavior"] == "terminate"


def test_one_attempt_with_one_type() -> None:
    api = Scripted({"RunInstances": lambda **_: {"Instances": [{"InstanceId": "i-1"}, {"InstanceId": "i-2"}]}})
    placed, errors = launch(api, wanted(), SPOT, 3)
    assert placed == [Placed(id, "m7i.large", "spot", "us-east-1a") for id in ("i-1", "i-2")]
    assert errors == []
    launch(api, wanted(), SPOT, 3)
    tokens = [request["ClientToken"] for request in api.made("RunInstances")]
    assert len(set(tokens)) == 2


def test_one_attempt_with_several_types() -> None:
    override = {"InstanceType": "m6i.large", "SubnetId": "subnet-b"}
    answer = {
        "Instances": [
            {"InstanceIds": ["i-1", "i-2"], "InstanceType": "m6i.large", "LaunchTemplateAndOverrides": {"Overrides": override}},
            {"InstanceIds": ["i-3"], "LaunchTemplateAndOverrides": {"Overrides": {"AvailabilityZone": "us-east-1c"}}},
        ],
        "Errors": [{"ErrorCode": "InsufficientInstanceCapacity", "ErrorMessage": "no"}] * 3,
    }
    api = Scripted(
        {
            "CreateLaunchTemplate": lambda **_: {"LaunchTemplate": {"LaunchTemplateId": "lt-1"}},
            "CreateFleet": lambda **_: answer,
            "DeleteLaunchTemplate": lambda **_: {},
        }
    )
    attempt = Attempt("spot", ("m7i.large", "m6i.large"), (A, B))
    placed, errors = launch(api, wanted([LARGE, OTHER]), attempt, 4)
    assert placed == [
        Placed("i-1", "m6i.large", "spot", "us-east-1b"),
        Placed("i-2", "m6i.large", "spot", "us-east-1b"),
        Placed("i-3", "m7i.large", "spot", "us-east-1c"),
    ]
    assert [error.code for error in errors] == ["InsufficientInstanceCapacity"]
    assert api.made("DeleteLaunchTemplate") == [{"LaunchTemplateId": "lt-1"}]


@pytest.mark.parametrize("raised", [True, False])
def test_a_template_that_aws_does_not_know_yet(raised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has just been made."""
    monkeypatch.setattr(launching, "PAUSES", (0.0, 0.0))
    code = "InvalidLaunchTemplateId.NotFound"

    def fleet(**_: Any) -> dict[str, Any]:
        if len(api.made("CreateFleet")) == 3:
            return {"Instances": [{"InstanceIds": ["i-1"], "InstanceType": "m6i.large"}], "Errors": []}
        if raised:
            raise Ec2Error("ec2:CreateFleet", code, "no such template")
        return {"Instances": [], "Errors": [{"ErrorCode": code, "ErrorMessage": "no such template"}]}

    api = Scripted(
        {
            "CreateLaunchTemplate": lambda **_: {"LaunchTemplate": {"LaunchTemplateId": "lt-1"}},
            "CreateFleet": fleet,
            "DeleteLaunchTemplate": lambda **_: {},
        }
    )
    placed, errors = launch(api, wanted([LARGE, OTHER]), Attempt("spot", ("m7i.large", "m6i.large"), (A, B)), 1)
    assert [each.id for each in placed] == ["i-1"]
    assert errors == []
    assert len({request["ClientToken"] for request in api.made("CreateFleet")}) == 3


def test_the_template_goes_whatever_happens() -> None:
    def refuse(**_: Any) -> dict[str, Any]:
        raise Ec2Error("ec2:CreateFleet", "UnauthorizedOperation", "no")

    api = Scripted(
        {
            "CreateLaunchTemplate": lambda **_: {"LaunchTemplate": {"LaunchTemplateId": "lt-1"}},
            "CreateFleet": refuse,
            "DeleteLaunchTemplate": refuse,
        }
    )
    with pytest.raises(Ec2Error, match="allow ec2:CreateFleet"):
        launch(api, wanted([LARGE, OTHER]), Attempt("spot", ("m7i.large", "m6i.large"), (A,)), 4)
    assert len(api.made("DeleteLaunchTemplate")) == 1
