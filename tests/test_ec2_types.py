"""What instance types are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from amazon import Scripted
from moto_cloud import moto_server

from bigmachine.cache import Cache
from bigmachine.errors import UsageError
from bigmachine.systems.ec2.api import Api, Ec2Error
from bigmachine.systems.ec2.settings import Settings
from bigmachine.systems.ec2.types import InstanceType, architecture, instance_types


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    with moto_server():
        yield Api(Settings())


def entry(name: str = "m7i.large", **fields: Any) -> dict[str, Any]:
    """As DescribeInstanceTypes has it."""
    return {
        "InstanceType": name,
        "ProcessorInfo": {"SupportedArchitectures": ["x86_64"]},
        "VCpuInfo": {"DefaultVCpus": 2},
        "MemoryInfo": {"SizeInMiB": 8192},
        "EbsInfo": {"EbsOptimizedSupport": "default"},
        "CurrentGeneration": True,
        "SupportedUsageClasses": ["on-demand", "spot"],
        **fields,
    }


def test_from_aws(api: Api, tmp_path: Path) -> None:
    names = ["i3en.xlarge", "m7i.large", "m7g.large"]
    disks, plain, arm = instance_types(api, names, cache=Cache(tmp_path))
    assert plain == InstanceType("m7i.large", 2, 8 << 30, "amd64", (0, 0), True, True, True)
    assert disks.nvme == (1, 2500)
    assert (arm.arch, arm.vcpus) == ("arm64", 2)


def test_a_type_that_there_is_not(api: Api, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"m7i\.lagre.*-bigm\.ec2type"):
        instance_types(api, ["m7i.lagre"], cache=Cache(tmp_path))
    asked = Scripted({"DescribeInstanceTypes": lambda **_: {"InstanceTypes": [entry("m7i.large")]}})
    with pytest.raises(UsageError, match=r"no instance type m6i\.large in us-east-1: -bigm\.ec2type"):
        instance_types(asked, ["m7i.large", "m6i.large"], cache=Cache(tmp_path))


def test_what_is_no_mistake_of_the_user_s_passes(tmp_path: Path) -> None:
    def refuse(**_: Any) -> dict[str, Any]:
        raise Ec2Error("ec2:DescribeInstanceTypes", "UnauthorizedOperation", "no")

    with pytest.raises(Ec2Error):
        instance_types(Scripted({"DescribeInstanceTypes": refuse}), ["m7i.large"], cache=Cache(tmp_path))


def test_it_is_asked_once(tmp_path: Path) -> None:
    api = Scripted({"DescribeInstanceTypes": lambda **_: {"InstanceTypes": [entry("m7i.large"), entry("m6i.large")]}})
    for names in (["m7i.large", "m6i.large"], ["m6i.large", "m7i.large"]):
        assert [each.name for each in instance_types(api, names, cache=Cache(tmp_path))] == names
    assert len(api.calls) == 1
    elsewhere = Scripted(api.answers, region="eu-west-1")
    instance_types(elsewhere, ["m7i.large", "m6i.large"], cache=Cache(tmp_path))
    assert len(elsewhere.calls) == 1


def test_without_a_cache_and_with_a_damaged_one(tmp_path: Path) -> None:
    api = Scripted({"DescribeInstanceTypes": lambda **_: {"InstanceTypes": [entry("m7i.large")]}})
    (tmp_path / "file").write_text("")
    assert instance_types(api, ["m7i.large"], cache=Cache(tmp_path / "file"))[0].vcpus == 2
    instance_types(api, ["m7i.large"], cache=Cache(tmp_path / "cache"))
    (kept,) = (tmp_path / "cache").rglob("types.json")
    for text in ("{", "[{}]", "null"):
        kept.write_text(text)
        assert instance_types(api, ["m7i.large"], cache=Cache(tmp_path / "cache"))[0].vcpus == 2


def test_without_spot_and_without_anything_else() -> None:
    lonely = {name: entry()[name] for name in ("InstanceType", "ProcessorInfo", "VCpuInfo", "MemoryInfo")}
    parsed = InstanceType.parse(lonely)
    assert (parsed.nvme, parsed.ebs_optimized, parsed.current_generation, parsed.spot) == ((0, 0), False, True, True)
    assert not InstanceType.parse(entry(SupportedUsageClasses=["on-demand"])).spot


def test_disks_that_are_not_nvme_are_none() -> None:
    """Those of older types are only there where they are mapped, and have other names."""
    disks = [{"SizeInGB": 32, "Count": 2, "Type": "ssd"}]
    for support, found in (("unsupported", (0, 0)), ("required", (2, 64)), ("supported", (2, 64))):
        store = {"TotalSizeInGB": 64, "Disks": disks, "NvmeSupport": support}
        assert InstanceType.parse(entry(InstanceStorageInfo=store)).nvme == found


def test_one_architecture() -> None:
    arm = InstanceType.parse(entry("m7g.large", ProcessorInfo={"SupportedArchitectures": ["arm64"]}))
    assert architecture([arm]) == "arm64"
    with pytest.raises(UsageError, match=r"m7i\.large is amd64, m7g\.large is arm64"):
        architecture([InstanceType.parse(entry()), arm])
    with pytest.raises(UsageError, match=r"instances of type mac1\.metal are x86_64_mac"):
        InstanceType.parse(entry("mac1.metal", ProcessorInfo={"SupportedArchitectures": ["x86_64_mac"]}))
