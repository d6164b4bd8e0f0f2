"""Instance types, as AWS describes them: there is no table of ours to grow old."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...cache import Cache
from ...errors import CacheError, UsageError
from .api import Ec2Error

ARCHITECTURES = {"x86_64": "amd64", "arm64": "arm64"}
"""AWS's words, and ours."""

KEPT = 7 * 24 * 3600
"""Seconds for which an answer is kept: a type's data do not change, but a region may get spot for it."""

_KIND = "ec2"
_FORM = 2
"""Of what is kept."""


class Pages(Protocol):
    """The part of `api.Api` that is used here."""

    @property
    def region(self) -> str: ...
    def pages(self, service: str, operation: str, key: str, **parameters: Any) -> Iterator[Any]: ...


@dataclass(frozen=True)
class InstanceType:
    """`memory` is in bytes; `nvme` the instance store's number of disks and their size together in GB; `spot` says whether
    there are spot instances of it."""

    name: str
    vcpus: int
    memory: int
    arch: str
    nvme: tuple[int, int]
    ebs_optimized: bool
    current_generation: bool
    spot: bool

    @classmethod
    def parse(cls, entry: Mapping[str, Any]) -> InstanceType:
        """From DescribeInstanceTypes. Raises `UsageError` where nothing of ours can run on it."""
        name = entry["InstanceType"]
        theirs = entry["ProcessorInfo"].get("SupportedArchitectures", [])
        arch = next((ours for word, ours in ARCHITECTURES.items() if word in theirs), None)
        if arch is None:
            raise UsageError(f"instances of type {name} are {', '.join(theirs)}: choose x86_64 or arm64, -bigm.ec2type")
        store = entry.get("InstanceStorageInfo", {})  # Older types have disks that nobody gets who does not map them.
        disks = store.get("Disks", []) if store.get("NvmeSupport") != "unsupported" else []
        nvme = sum(disk["Count"] for disk in disks), sum(disk["Count"] * disk["SizeInGB"] for disk in disks)
        return cls(
            name=name,
            vcpus=entry["VCpuInfo"]["DefaultVCpus"],
            memory=entry["MemoryInfo"]["SizeInMiB"] << 20,
            arch=arch,
            nvme=nvme,
            ebs_optimized=entry.get("EbsInfo", {}).get("EbsOptimizedSupport", "unsupported") != "unsupported",
            current_generation=bool(entry.get("CurrentGeneration", True)),
            spot="spot" in entry.get("SupportedUsageClasses", ["on-demand", "spot"]),
        )


def instance_types(api: Pages, names: Sequence[str], *, cache: Cache | None = None) -> list[InstanceType]:
    """What `names` are, in that order. Raises `UsageError` where a type does not exist in the region, `Ec2Error`."""

    def fill(folder: Path) -> None:
        found = [dataclasses.asdict(each) for each in _asked(api, names)]
        (folder / "types.json").write_text(json.dumps(found), "utf-8")

    wanted = [_FORM, api.region, sorted(names), int(time.time() // KEPT)]
    key = hashlib.sha256(json.dumps(["types", *wanted]).encode()).hexdigest()
    try:
        kept = json.loads(((cache or Cache()).put(_KIND, key, fill) / "types.json").read_text("utf-8"))
        found = [InstanceType(**{**entry, "nvme": tuple(entry["nvme"])}) for entry in kept]
    except (CacheError, OSError, ValueError, TypeError, KeyError):
        found = _asked(api, names)  # Without a cache, or with a damaged one: it is only slower.
    by_name = {each.name: each for each in found}
    return [by_name[name] for name in names]


def _asked(api: Pages, names: Sequence[str]) -> list[InstanceType]:
    wanted = sorted(set(names))
    try:
        entries = list(api.pages("ec2", "DescribeInstanceTypes", "InstanceTypes", InstanceTypes=wanted))
    except Ec2Error as error:
        if error.code == "InvalidInstanceType":
            raise UsageError(f"{error.message.rstrip('. ')}: -bigm.ec2type chooses others, -bigm.ec2region where") from error
        raise
    found = [InstanceType.parse(entry) for entry in entries]
    if missing := set(wanted) - {each.name for each in found}:
        raise UsageError(
            f"no instance type {sorted(missing)[0]} in {api.region}: -bigm.ec2type chooses others, -bigm.ec2region where"
        )
    return found


def architecture(types: Sequence[InstanceType]) -> str:
    """That of all `types`. Raises `UsageError` where they differ: a launch has one image, and programs are packed for it."""
    archs = {each.arch: each.name for each in types}
    if len(archs) > 1:
        which = ", ".join(f"{name} is {arch}" for arch, name in sorted(archs.items()))
        raise UsageError(f"types of one launch must have one architecture: {which}; leave out one, -bigm.ec2type")
    return next(iter(archs))
