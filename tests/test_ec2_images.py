"""Which image, and where instances are put."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from amazon import Scripted
from moto_cloud import moto_server

from bigmachine.errors import UsageError
from bigmachine.pack.platforms import PYTHONS
from bigmachine.systems.ec2 import network
from bigmachine.systems.ec2.api import Api, Ec2Error
from bigmachine.systems.ec2.images import IMAGES, find_image, flavour_for
from bigmachine.systems.ec2.network import ANYWHERE, Subnet, closed, find_group, find_network, find_subnets, own_group
from bigmachine.systems.ec2.settings import Settings


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with moto_server():
        yield


@pytest.fixture
def api(server: None) -> Api:
    return Api(Settings())


# -- Images --------------------------------------------------------------------------------------------------------------


def test_there_is_one_for_each_python_that_can_be_packed_for() -> None:
    assert tuple(flavour.python for flavour in IMAGES) == PYTHONS


@pytest.mark.parametrize("arch", ["amd64", "arm64"])
def test_by_its_public_parameter(arch: str) -> None:
    api = Scripted({"GetParameter": lambda Name: {"Parameter": {"Value": f"ami-{len(Name)}"}}})
    image = find_image(api, Settings(), "3.11", arch)
    (asked,) = api.made("GetParameter")
    assert asked["Name"] == f"/aws/service/debian/release/12/latest/{arch}"
    assert (image.flavour, image.user, image.root_device) == ("Debian 12", "admin", "/dev/xvda")
    assert image.id == f"ami-{len(asked['Name'])}"
    assert flavour_for("3.12").parameter.format(arch=arch).startswith("/aws/service/canonical/ubuntu/server/24.04/")


def test_a_python_of_which_nobody_makes_an_image() -> None:
    with pytest.raises(UsageError, match=re.escape("Python 3.9; there are such with 3.11 (Debian 12), 3.12 (Ubuntu 24.04)")):
        find_image(Scripted({}), Settings(), "3.9", "amd64")


def test_a_region_that_has_none() -> None:
    def missing(Name: str) -> dict[str, Any]:
        raise Ec2Error("ssm:GetParameter", "ParameterNotFound", "", "eu-west-9")

    with pytest.raises(Ec2Error, match=r"Debian 13 \(which has Python 3\.13\) is not published for arm64 .* -bigm\.ec2ami"):
        find_image(Scripted({"GetParameter": missing}), Settings(), "3.13", "arm64")


def test_an_image_of_the_user_s(api: Api) -> None:
    images = api.call("ec2", "DescribeImages", Owners=["amazon"])["Images"]
    given = next(image for image in images if image["Architecture"] == "x86_64")
    image = find_image(api, Settings(ami=given["ImageId"], user="me"), "3.11", "amd64")
    assert (image.id, image.user, image.root_device) == (given["ImageId"], "me", given["RootDeviceName"])
    with pytest.raises(UsageError, match=r"is for amd64, the instance type is arm64: -bigm\.ec2ami, -bigm\.ec2type"):
        find_image(api, Settings(ami=given["ImageId"]), "3.11", "arm64")
    with pytest.raises(Ec2Error, match=r"-bigm\.ec2ami"):
        find_image(api, Settings(ami="ami-0123456789abcdef0"), "3.11", "amd64")


# -- Networks ------------------------------------------------------------------------------------------------------------


def test_the_default_network_and_a_group_of_our_own(api: Api) -> None:
    network = find_network(api, Settings(), {"bigmachine:owner": "ada"})
    zones = {zone["ZoneName"] for zone in api.call("ec2", "DescribeAvailabilityZones")["AvailabilityZones"]}
    assert {subnet.zone for subnet in network.subnets} == zones
    assert len({subnet.vpc for subnet in network.subnets}) == 1
    group = find_group(api, network.subnets[0].vpc)
    assert group is not None
    assert (network.groups, group["GroupName"]) == ((group["GroupId"],), "bigmachine")
    assert {"Key": "bigmachine:owner", "Value": "ada"} in group["Tags"]
    assert closed(group["IpPermissions"], 443) == []
    assert find_network(api, Settings(), {}) == network
    assert find_network(api, Settings(port=8443), {}) == network  # One more port of the same group.
    again = find_group(api, network.subnets[0].vpc)
    assert again is not None
    assert closed(again["IpPermissions"], 443) == closed(again["IpPermissions"], 8443) == []
    assert len(closed(again["IpPermissions"], 80)) == 2


def test_subnets_and_groups_of_the_user_s(api: Api) -> None:
    ours = [subnet.id for subnet in find_subnets(api, Settings())][:2]
    for ids in (tuple(ours), tuple(reversed(ours))):
        network = find_network(api, Settings(subnets=ids, securitygroups=("sg-1", "sg-2")), {})
        assert tuple(subnet.id for subnet in network.subnets) == ids
        assert network.groups == ("sg-1", "sg-2")
    with pytest.raises(Ec2Error, match=r"-bigm\.ec2subnets"):
        find_subnets(api, Settings(subnets=("subnet-0123456789abcdef0",)))


def test_subnets_of_two_networks(api: Api) -> None:
    vpc = api.call("ec2", "CreateVpc", CidrBlock="10.99.0.0/16")["Vpc"]["VpcId"]
    other = api.call("ec2", "CreateSubnet", VpcId=vpc, CidrBlock="10.99.1.0/24")["Subnet"]["SubnetId"]
    with pytest.raises(UsageError, match="different networks"):
        find_subnets(api, Settings(subnets=(find_subnets(api, Settings())[0].id, other)))
    assert find_subnets(api, Settings(subnets=(other,)))[0].vpc == vpc


def test_the_emptiest_zone_first() -> None:
    common = {"VpcId": "v", "State": "available"}
    rows = [{"SubnetId": f"subnet-{n}", "AvailabilityZone": f"z{n}", "AvailableIpAddressCount": n, **common} for n in range(3)]
    api = Scripted({"DescribeSubnets": lambda **_: {"Subnets": rows}})
    assert find_subnets(api, Settings()) == tuple(Subnet(f"subnet-{n}", f"z{n}", "v", n) for n in (2, 1, 0))


def test_no_default_network() -> None:
    api = Scripted({"DescribeSubnets": lambda **_: {"Subnets": []}})
    with pytest.raises(Ec2Error, match=r"no default subnets .*-bigm\.ec2subnets"):
        find_subnets(api, Settings())


def test_another_driver_makes_the_group_at_the_same_time() -> None:
    answers = [[], [{"GroupId": "sg-1", "IpPermissions": []}]]

    def refuse(code: str) -> Any:
        def call(**_: Any) -> dict[str, Any]:
            raise Ec2Error("ec2:Create", code, "")

        return call

    api = Scripted(
        {
            "DescribeSecurityGroups": lambda **_: {"SecurityGroups": answers.pop(0)},
            "CreateSecurityGroup": refuse("InvalidGroup.Duplicate"),
            "AuthorizeSecurityGroupIngress": refuse("InvalidPermission.Duplicate"),
        }
    )
    assert own_group(api, "vpc-1", 443, {}) == "sg-1"
    api.answers["CreateSecurityGroup"] = refuse("UnauthorizedOperation")
    answers.append([])
    with pytest.raises(Ec2Error, match="allow ec2:Create"):
        own_group(api, "vpc-1", 443, {})


def test_a_group_that_aws_does_not_know_everywhere_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "PAUSES", (0.0, 0.0))

    def open_port(**_: Any) -> dict[str, Any]:
        if len(api.made("AuthorizeSecurityGroupIngress")) < 3:
            raise Ec2Error("ec2:AuthorizeSecurityGroupIngress", "InvalidGroup.NotFound", "no such group")
        return {}

    api = Scripted(
        {
            "DescribeSecurityGroups": lambda **_: {"SecurityGroups": []},
            "CreateSecurityGroup": lambda **_: {"GroupId": "sg-1"},
            "AuthorizeSecurityGroupIngress": open_port,
        }
    )
    assert own_group(api, "vpc-1", 443, {}) == "sg-1"
    assert len(api.made("AuthorizeSecurityGroupIngress")) == 2 + len(ANYWHERE)


@pytest.mark.parametrize(
    ("permission", "missing"),
    [
        ({"IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}, ["::/0"]),
        ({"IpProtocol": "tcp", "FromPort": 400, "ToPort": 500, "Ipv6Ranges": [{"CidrIpv6": "::/0"}]}, ["0.0.0.0/0"]),
        ({"IpProtocol": "tcp", "FromPort": 444, "ToPort": 500, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}, list(ANYWHERE)),
        ({"IpProtocol": "udp", "FromPort": 443, "ToPort": 443, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}, list(ANYWHERE)),
        ({"IpProtocol": "tcp", "FromPort": 443, "ToPort": 443, "IpRanges": [{"CidrIp": "10.0.0.0/8"}]}, list(ANYWHERE)),
    ],
)
def test_what_is_still_closed(permission: dict[str, Any], missing: list[str]) -> None:
    found = closed([permission], 443)
    ranges = [each.get("IpRanges", []) + each.get("Ipv6Ranges", []) for each in found]
    cidrs = [next(iter(range.values())) for (range,) in ranges]
    assert cidrs == missing
    assert all((each["FromPort"], each["ToPort"], each["IpProtocol"]) == (443, 443, "tcp") for each in found)
