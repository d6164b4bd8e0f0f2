"""What the doctor finds: in moto's account, which has a network but no way out of it, and where something is denied or missing.

Packing is faked, as it asks an index; what it raises is not.
"""

from __future__ import annotations

import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from moto_cloud import REGION, Cloud, moto_server, reset

from bigmachine.errors import PackError, ResolveError
from bigmachine.info import python_version
from bigmachine.pack.archive import Contents
from bigmachine.pack.build import Request
from bigmachine.pack.image import Manifest, Part
from bigmachine.pack.itself import TOOLKIT
from bigmachine.systems.ec2 import doctor, quotas
from bigmachine.systems.ec2.api import Api, Ec2Error
from bigmachine.systems.ec2.doctor import Check, checks
from bigmachine.systems.ec2.prices import ON_DEMAND, SPOT
from bigmachine.systems.ec2.settings import Settings

PORT = 443


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMACHINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with moto_server() as address:
        yield address


@pytest.fixture
def cloud(moto: str) -> Cloud:
    """An account in which machines can be had."""
    reset(moto)
    cloud = Cloud()
    vpc = the_vpc(cloud)
    gateway = cloud.call("ec2", "CreateInternetGateway")["InternetGateway"]["InternetGatewayId"]
    cloud.call("ec2", "AttachInternetGateway", InternetGatewayId=gateway, VpcId=vpc)
    table = cloud.call("ec2", "DescribeRouteTables")["RouteTables"][0]["RouteTableId"]
    cloud.call("ec2", "CreateRoute", RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", GatewayId=gateway)
    cloud.calls.clear()
    return cloud


@pytest.fixture(autouse=True)
def packing(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What is to be packed; it always can be."""
    requests: list[Request] = []

    def fake(request: Request, cache: object, shown: object) -> Any:
        requests.append(request)
        part = Part("h2", "4.1", "distribution", "0" * 64, 3 << 20, 1 << 20, True, "h2.whl")
        manifest = Manifest(request.platforms[0], python_version(), (part,))
        return SimpleNamespace(contents=SimpleNamespace(manifest=lambda platform: manifest))

    monkeypatch.setattr(doctor, "pack", fake)
    return requests


def the_vpc(cloud: Api) -> str:
    return str(cloud.call("ec2", "DescribeVpcs")["Vpcs"][0]["VpcId"])


def examine(cloud: Cloud, **values: Any) -> dict[str, Check]:
    """The checks, by name, with settings of `values`; ``count`` and ``program`` are the examination's."""
    more = {name: values.pop(name) for name in ("count", "program") if name in values}
    return {check.name: check for check in checks(cloud, Settings(**values), **more)}


def failed(found: dict[str, Check]) -> list[str]:
    return [name for name, check in found.items() if check.ok is False]


def inventory(cloud: Cloud) -> list[int]:
    """How much there is of whatever a launch would make."""
    listed = {
        "DescribeInstances": "Reservations",
        "DescribeVolumes": "Volumes",
        "DescribeSecurityGroups": "SecurityGroups",
        "DescribeSecurityGroupRules": "SecurityGroupRules",
        "DescribeLaunchTemplates": "LaunchTemplates",
        "DescribeFleets": "Fleets",
        "DescribeSpotInstanceRequests": "SpotInstanceRequests",
        "DescribeTags": "Tags",
    }
    return [len(list(cloud.pages("ec2", operation, key))) for operation, key in listed.items()]


# -- Where all is well ---------------------------------------------------------------------------------------------------


def test_all_is_well_and_nothing_has_changed(cloud: Cloud, packing: list[Request]) -> None:
    before = inventory(cloud)
    cloud.calls.clear()
    found = examine(cloud)
    made = list(cloud.calls)
    assert inventory(cloud) == before
    assert list(found) == [
        "region",
        "credentials",
        "permissions to look",
        "instance types",
        "image",
        "subnets",
        "zones",
        "route",
        "security group",
        "user-data",
        "permissions to launch",
        "quota, spot",
        "quota, on demand",
        "program",
    ]
    assert {name for name, check in found.items() if check.ok is not True} == {"zones"}  # One of them lacks the type.
    for name, parameters in made:
        operation = name.partition(":")[2]
        assert operation.startswith(("Describe", "Get", "List")) or parameters.get("DryRun") is True, name
    assert found["region"].found == "us-east-1 (AWS's own configuration)"
    assert "in account 123456789012" in found["credentials"].found
    assert found["instance types"].found == "m7i.large: 2 vCPUs, 8 GiB; amd64"
    assert "none of ours in vpc-" in found["security group"].found
    assert found["program"].found.startswith("bigmachine alone: wheels for linux/amd64")
    assert [request.target for request in packing] == [TOOLKIT]


def test_the_dry_run_is_of_the_request_that_a_launch_makes(cloud: Cloud) -> None:
    examine(cloud, diskspace=77, tags={"team": "physics"})
    spot, on_demand = cloud.made("ec2:RunInstances")
    assert spot["InstanceMarketOptions"]["MarketType"] == "spot"
    assert "InstanceMarketOptions" not in on_demand
    for request in (spot, on_demand):
        assert request["DryRun"] is True
        assert request["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] == 77
        assert {"Key": "team", "Value": "physics"} in request["TagSpecifications"][0]["Tags"]
        assert len(request["UserData"]) > 5000


def test_arm64(cloud: Cloud, packing: list[Request]) -> None:
    found = examine(cloud, types=("m7g.large", "c7g.xlarge"), ondemand=True)
    assert failed(found) == []
    assert found["instance types"].found.endswith("; arm64")
    assert "quota, spot" not in found
    assert packing[0].platforms == ("linux/arm64",)


# -- What there is nothing without ---------------------------------------------------------------------------------------


def test_without_a_region_nothing_else_is_looked_at(moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    (check,) = checks(Api(Settings()), Settings())
    assert check == Check(
        "region",
        False,
        "ec2: no region is configured (NoRegionError)",
        "choose one: -bigm.ec2region=us-east-1, AWS_REGION, or `aws configure`",
    )


def test_without_credentials_nothing_else_is_looked_at(moto: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    settings = Settings(region=REGION)
    region, check = checks(Api(settings), settings)
    assert region.ok
    assert check.ok is False
    assert "NoCredentialsError" in check.found
    assert "aws configure" in check.fix


# -- Permissions ---------------------------------------------------------------------------------------------------------


def test_permissions_that_are_missing_are_listed(cloud: Cloud) -> None:
    cloud.denied = {"ec2:RunInstances", "ec2:CreateTags", "ec2:CreateFleet"}
    check = examine(cloud)["permissions to launch"]
    assert check.ok is False
    assert check.found == "denied: ec2:RunInstances, ec2:CreateTags"
    # What is only sometimes needed is in the policy as well.
    assert check.fix == "give the identity a policy that allows ec2:RunInstances, ec2:CreateTags, ec2:CreateFleet"


def test_permissions_that_can_be_done_without(cloud: Cloud) -> None:
    cloud.denied = {"ec2:CreateFleet", "ec2:GetConsoleOutput", "pricing:GetProducts"}
    found = examine(cloud)
    assert failed(found) == []
    assert "ec2:CreateFleet (for launches of several types)" in found["permissions to launch"].found
    assert "pricing:GetProducts (for costs)" in found["permissions to look"].found
    assert found["permissions to look"].ok is None
    assert failed(examine(cloud, types=("m7i.large", "m6i.large"))) == ["permissions to launch"]


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        ("ec2:DescribeInstances", "permissions to look"),
        ("ec2:DescribeInstanceTypes", "instance types"),
        ("ec2:DescribeSubnets", "subnets"),
        ("ec2:DescribeSecurityGroups", "security group"),
        ("ssm:GetParameter", "image"),
    ],
)
def test_what_may_not_be_looked_at(cloud: Cloud, operation: str, name: str) -> None:
    cloud.denied = {operation}
    found = examine(cloud)
    assert name in failed(found)
    assert operation in found[name].fix


def test_a_role_that_may_not_be_passed(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Cloud.call

    def refuse(self: Cloud, service: str, operation: str, **parameters: Any) -> dict[str, Any]:
        if "IamInstanceProfile" in parameters:
            raise Ec2Error("ec2:RunInstances", "UnauthorizedOperation", "no")
        return call(self, service, operation, **parameters)

    monkeypatch.setattr(Cloud, "call", refuse)
    check = examine(cloud, instanceprofile="reader")["permissions to launch"]
    assert check.found == "denied: iam:PassRole"


def test_what_else_aws_has_against_a_launch(cloud: Cloud) -> None:
    cloud.errors["ec2:RunInstances"] = Ec2Error("ec2:RunInstances", "InvalidKeyPair.NotFound", "no key pair 'me'", REGION)
    found = examine(cloud, keypair="me")
    assert failed(found) == ["RunInstances"]
    assert found["RunInstances"].found == "ec2:RunInstances: no key pair 'me' (InvalidKeyPair.NotFound)"
    assert "-bigm.ec2keypair" in found["RunInstances"].fix


def test_what_a_proxy_says_is_cut(cloud: Cloud) -> None:
    cloud.errors["ec2:RunInstances"] = Ec2Error("ec2:RunInstances", "503", "<html>" * 1000, REGION)
    assert len(examine(cloud)["RunInstances"].found) < 400


def test_an_account_that_has_never_had_spot_instances(cloud: Cloud) -> None:
    cloud.spot_role = False
    check = examine(cloud)["spot role"]
    assert check.ok is None
    assert check.fix == "aws iam create-service-linked-role --aws-service-name spot.amazonaws.com"
    assert "spot role" not in examine(cloud, ondemand=True)
    cloud.denied = {"iam:GetRole"}  # Few may, and nothing else needs it.
    assert "spot role" not in examine(cloud)


# -- Types, image, network -----------------------------------------------------------------------------------------------


def test_a_type_that_does_not_exist(cloud: Cloud) -> None:
    found = examine(cloud, types=("m99.large",))
    assert "instance types" in failed(found)
    assert "-bigm.ec2type" in found["instance types"].fix


def test_types_of_two_architectures(cloud: Cloud) -> None:
    check = examine(cloud, types=("m7i.large", "m7g.large"))["instance types"]
    assert check.ok is False
    assert "m7g.large is arm64, m7i.large is amd64" in check.found or "m7i.large is amd64" in check.found


def test_a_type_without_spot_instances(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = doctor.instance_types

    def without(api: Any, names: Any, *, cache: Any = None) -> list[Any]:
        return [type(each)(**{**vars(each), "spot": False}) for each in plain(api, names, cache=cache)]

    monkeypatch.setattr(doctor, "instance_types", without)
    assert examine(cloud)["instance types"].ok is None
    assert examine(cloud, ondemand=True)["instance types"].ok is True
    check = examine(cloud, spotonly=True)["instance types"]
    assert check.ok is False
    assert "-bigm.ec2spotonly" in check.fix


def test_an_image_for_another_architecture(cloud: Cloud) -> None:
    check = examine(cloud, types=("m7g.large",), ami="ami-12c6146b")["image"]
    assert check.ok is False
    assert check.fix.startswith("-bigm.ec2ami")


def test_too_few_addresses(cloud: Cloud) -> None:
    check = examine(cloud, count=100_000)["subnets"]
    assert check.ok is False
    assert "free addresses for 100000 machines" in check.found
    assert "-bigm.ec2subnets" in check.fix


def test_a_zone_without_the_type(cloud: Cloud) -> None:
    subnets = cloud.call("ec2", "DescribeSubnets")["Subnets"]
    (lacking,) = (each["SubnetId"] for each in subnets if each["AvailabilityZone"] == "us-east-1e")
    check = examine(cloud, subnets=(lacking,))["zones"]
    assert check.ok is False
    assert "us-east-1a" in check.fix


def test_a_network_without_a_way_out(moto: str) -> None:
    reset(moto)
    cloud = Cloud()
    check = examine(cloud)["route"]
    assert check.ok is False
    assert check.found == f"no route to the internet from {the_vpc(cloud)}"
    assert "-bigm.ec2publicip=false" in check.fix
    assert "route" not in examine(cloud, publicip=False)
    cloud.denied = {"ec2:DescribeRouteTables"}  # Nothing but this needs it.
    assert examine(cloud)["route"].ok is None


def test_a_subnet_with_a_route_table_of_its_own(cloud: Cloud) -> None:
    first, second = (each["SubnetId"] for each in cloud.call("ec2", "DescribeSubnets")["Subnets"][:2])
    table = cloud.call("ec2", "CreateRouteTable", VpcId=the_vpc(cloud))["RouteTable"]["RouteTableId"]
    cloud.call("ec2", "AssociateRouteTable", RouteTableId=table, SubnetId=first)
    check = examine(cloud, subnets=(first, second))["route"]
    assert check.ok is False
    assert check.found == f"no route to the internet from {first}"


def test_our_security_group(cloud: Cloud) -> None:
    make = {"GroupName": "bigmachine", "Description": "ours", "VpcId": the_vpc(cloud)}
    group = cloud.call("ec2", "CreateSecurityGroup", **make)["GroupId"]
    cloud.denied = {"ec2:AuthorizeSecurityGroupIngress"}
    found = examine(cloud)
    assert "the next launch opens it" in found["security group"].found
    assert found["permissions to launch"].found == "denied: ec2:AuthorizeSecurityGroupIngress"
    cloud.denied = set()
    open_port(cloud, group, PORT, IpRanges=[{"CidrIp": "0.0.0.0/0"}], Ipv6Ranges=[{"CidrIpv6": "::/0"}])
    cloud.denied = {"ec2:AuthorizeSecurityGroupIngress", "ec2:CreateSecurityGroup"}
    found = examine(cloud)
    assert found["security group"].found == f"{group}: port 443 is open, and guarded by mutual TLS"
    assert failed(found) == []
    assert [each["NetworkInterfaces"][0]["Groups"] for each in cloud.made("ec2:RunInstances")[-2:]] == [[group]] * 2


def open_port(cloud: Cloud, group: str, port: int, **sources: Any) -> None:
    rule = {"IpProtocol": "tcp", "FromPort": port, "ToPort": port, **sources}
    cloud.call("ec2", "AuthorizeSecurityGroupIngress", GroupId=group, IpPermissions=[rule])


def test_a_security_group_of_the_users_own(cloud: Cloud) -> None:
    make = {"GroupName": "mine", "Description": "mine", "VpcId": the_vpc(cloud)}
    group = cloud.call("ec2", "CreateSecurityGroup", **make)["GroupId"]
    check = examine(cloud, securitygroups=(group,))["security group"]
    assert check.found == f"{group}: port 443 is open to nobody"
    assert check.fix == (
        f"aws ec2 authorize-security-group-ingress --region us-east-1 --group-id {group} "
        "--protocol tcp --port 443 --cidr 0.0.0.0/0"
    )
    open_port(cloud, group, PORT, IpRanges=[{"CidrIp": "10.0.0.0/8"}])
    check = examine(cloud, securitygroups=(group,))["security group"]
    assert check.ok
    assert "open to 10.0.0.0/8; this host and the machines must be among them" in check.found
    # Nobody needs to make groups then.
    cloud.denied = {"ec2:CreateSecurityGroup", "ec2:AuthorizeSecurityGroupIngress"}
    assert failed(examine(cloud, securitygroups=(group,))) == []
    missing = examine(cloud, securitygroups=("sg-0123456789abcdef0",))["security group"]
    assert missing.ok is False


# -- Quotas --------------------------------------------------------------------------------------------------------------


def test_a_quota_that_is_too_low(cloud: Cloud) -> None:
    cloud.quotas = {"L-34B43A08": 5.0, "L-1216C47A": 8.0}
    found = examine(cloud, count=8)
    assert found["quota, spot"] == Check(
        "quota, spot",
        False,
        "0 of 5 vCPUs (Standard types) are in use: room for 2 machines of m7i.large, not for 8",
        "aws service-quotas request-service-quota-increase --region us-east-1 --service-code ec2 "
        "--quota-code L-34B43A08 --desired-value 16",
    )
    assert failed(found) == ["quota, spot", "quota, on demand"]
    # One market with room will do, unless only the other is wanted.
    cloud.quotas["L-1216C47A"] = 16.0
    assert failed(examine(cloud, count=8)) == []
    assert examine(cloud, count=8)["quota, spot"].ok is None
    assert failed(examine(cloud, count=8, spotonly=True)) == ["quota, spot"]


def test_a_quota_that_others_use_up(cloud: Cloud) -> None:
    cloud.quotas = {"L-1216C47A": 5.0}
    cpu = {"CoreCount": 2, "ThreadsPerCore": 2}
    more = {"ImageId": "ami-12c6146b", "MinCount": 1, "MaxCount": 1, "CpuOptions": cpu}
    cloud.call("ec2", "RunInstances", InstanceType="c5.xlarge", **more)
    found = examine(cloud, ondemand=True)["quota, on demand"]
    taken = quotas.used(quotas._running(cloud), ON_DEMAND, quotas.STANDARD)
    assert f"{taken} of 5 vCPUs" in found.found


def test_what_counts_for_a_quota() -> None:
    def one(type: str, market: str, cores: int) -> dict[str, Any]:
        return {
            "InstanceType": type,
            "CpuOptions": {"CoreCount": cores, "ThreadsPerCore": 2},
            **({"InstanceLifecycle": "spot"} if market == SPOT else {}),
        }

    there = [one("m7i.large", SPOT, 1), one("c7i.8xlarge", SPOT, 16), one("m7i.large", ON_DEMAND, 1), one("g5.xlarge", SPOT, 2)]
    assert quotas.used(there, SPOT, "Standard") == 34
    assert quotas.used(there, ON_DEMAND, "Standard") == 2
    assert quotas.used(there, SPOT, "G and VT") == 4


@pytest.mark.parametrize(
    ("type", "kind"),
    [
        ("m7i.large", "Standard"),
        ("t3.micro", "Standard"),
        ("im4gn.large", "Standard"),
        ("is4gen.large", "Standard"),
        ("inf2.xlarge", "Inf"),
        ("p5.48xlarge", "P"),
        ("g6e.xlarge", "G and VT"),
        ("vt1.3xlarge", "G and VT"),
        ("x2gd.medium", "X"),
        ("dl1.24xlarge", ""),
        ("mac2.metal", ""),
        ("u-6tb1.metal", ""),
        ("hpc7a.96xlarge", ""),
    ],
)
def test_classes_of_types(type: str, kind: str) -> None:
    assert quotas.kind_of(type) == kind


def test_quotas_that_may_not_be_seen(cloud: Cloud) -> None:
    cloud.denied = {"service-quotas:GetServiceQuota"}
    found = examine(cloud)
    assert failed(found) == []
    assert found["quota, spot"].ok is None
    assert "servicequotas:GetServiceQuota" in found["quota, spot"].fix


def test_a_quota_that_nobody_has_changed(cloud: Cloud) -> None:
    cloud.errors["service-quotas:GetServiceQuota"] = Ec2Error("service-quotas:GetServiceQuota", "NoSuchResourceException", "no")
    assert "64 vCPUs" in examine(cloud)["quota, spot"].found
    assert cloud.made("service-quotas:GetAWSDefaultServiceQuota")


# -- User-data and program -----------------------------------------------------------------------------------------------


def test_user_data_that_is_too_long(cloud: Cloud, tmp_path: Path) -> None:
    extra = tmp_path / "extra.yaml"
    noise = random.Random(1)
    extra.write_text("#cloud-config\n" + "".join(f"# {noise.random()}\n" for _ in range(1500)))
    check = examine(cloud, cloudconfig=(str(extra),))["user-data"]
    assert check.ok is False
    assert "extra.yaml" in check.found
    missing = examine(cloud, units=(str(tmp_path / "my.service"),))["user-data"]
    assert missing.ok is False
    assert "my.service" in missing.found


def test_a_program_whose_wheels_are_missing(cloud: Cloud, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(error: PackError) -> Callable[..., Any]:
        def pack(*_: Any) -> Any:
            raise error

        return pack

    program = tmp_path / "app.py"
    program.write_text("")
    reason = "no wheel of pywin32 308 for linux/amd64: there are ones for win_amd64"
    monkeypatch.setattr(doctor, "pack", fails(ResolveError(reason, "much more")))
    found = examine(cloud, program=program)
    assert found["program"].found == reason
    assert found["program"].fix
    assert failed(found) == ["program"]
    monkeypatch.setattr(doctor, "pack", fails(PackError("the package index cannot be reached: no network")))
    assert failed(examine(cloud, program=program)) == ["program"]


def test_a_packed_program(cloud: Cloud, monkeypatch: pytest.MonkeyPatch, packing: list[Request], tmp_path: Path) -> None:
    program = tmp_path / "app.pex"
    with zipfile.ZipFile(program, "w") as archive:
        archive.writestr("app.py", "")
    part = Part("h2", "4.1", "distribution", "0" * 64, 3 << 20, 1 << 20, True, "h2.whl")
    manifests = (Manifest("linux/amd64", "3.13", (part,)),)
    contents = Contents("app", "app.py", "3.13", "0.1.0", "pex", "0" * 64, "app.py", (), manifests)
    monkeypatch.setattr(doctor, "read_contents", lambda path: contents)
    found = examine(cloud, program=program)
    assert failed(found) == []
    assert "Debian 13 with Python 3.13" in found["image"].found, "what it was packed for decides"
    assert packing == [], "it is packed already"
    check = examine(cloud, program=program, types=("m7g.large",))["program"]
    assert check.ok is False
    assert check.found == "app was packed for linux/amd64, not for linux/arm64: pack it with --platform linux/arm64"


def test_a_program_with_its_name(cloud: Cloud, packing: list[Request], tmp_path: Path) -> None:
    program = tmp_path / "app.py"
    program.write_text("")
    check = examine(cloud, program=program)["program"]
    assert check.found == f"app.py: wheels for linux/amd64 and Python {python_version()}; a machine is sent 1.0 MiB"
    (request,) = packing
    assert request.target == program
    assert request.installed, "as a program that packs itself does"
