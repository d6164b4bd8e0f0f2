"""Writes the data files of `bigmachine.pack.platforms`: ``python packaging/platforms.py``.

Which tags an interpreter accepts, and in which order, is what `packaging` says for this baseline:

- Linux: glibc 2.34, of Amazon Linux 2023. It is the oldest among the images that machines run (Ubuntu 22.04 has 2.35,
  Debian 12 2.36, Ubuntu 24.04 2.39). Older would find less: numpy 2.4 has no wheel below manylinux_2_27.
- macOS: 14.0, for both architectures. numpy and scipy make the wheels that use the system's own linear algebra for 14.0 and
  later. Apple promises nothing, but in practice updates its latest three releases, and none of them is older.

Markers that name a patch release say ``.0``: a distribution that the first release takes, every later one takes, and what
a marker adds for early releases does no harm on later ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from packaging.tags import compatible_tags, cpython_tags, mac_platforms

DATA = Path(__file__).parent.parent / "bigmachine" / "pack" / "platforms_data"

PYTHONS = ("3.11", "3.12", "3.13", "3.14")

GLIBC = 34
"""The minor version: of the baseline, and of the oldest that `packaging` lists, per architecture."""
OLDEST_GLIBC = {"x86_64": 5, "aarch64": 17}

LEGACY = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
"""What wheels for a glibc were called before PEP 600."""

LINUX_WHY = "glibc 2.34: Amazon Linux 2023, the oldest of the supported images; packaging/platforms.py says more"
MACOS_WHY = "macOS 14.0: the first that numpy's and scipy's smaller wheels are for; packaging/platforms.py says more"


class Target(NamedTuple):
    """A platform's name here, and what Python calls it."""

    name: str
    machine: str
    system: str
    release: str
    version: str


# Releases are those of the baseline's kernels, as plain versions: markers may compare them.
TARGETS = (
    Target("linux/amd64", "x86_64", "Linux", "5.15.0", "#1 SMP"),
    Target("linux/arm64", "aarch64", "Linux", "5.15.0", "#1 SMP"),
    Target("darwin/arm64", "arm64", "Darwin", "23.0.0", "Darwin Kernel Version 23.0.0"),
    Target("darwin/amd64", "x86_64", "Darwin", "23.0.0", "Darwin Kernel Version 23.0.0"),
)


def linux_platforms(machine: str) -> Iterator[str]:
    """As `packaging` lists them where it runs on this glibc; its own function is for the machine that it runs on."""
    for minor in range(GLIBC, OLDEST_GLIBC[machine] - 1, -1):
        yield f"manylinux_2_{minor}_{machine}"
        if minor in LEGACY:
            yield f"{LEGACY[minor]}_{machine}"
    # Last, as in pex and the older `packaging`: such a wheel promises nothing about other machines than where it was built.
    yield f"linux_{machine}"


def macos_platforms(machine: str) -> Iterator[str]:
    """As `packaging` lists them, but for one format of 32-bit times, for which its versions have two names."""
    for platform in mac_platforms((14, 0), machine):
        if not platform.endswith(("_fat3", "_fat32")):
            yield platform


def markers(target: Target, python: str) -> dict[str, str]:
    """The values of environment markers (PEP 508)."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": target.machine,
        "platform_python_implementation": "CPython",
        "platform_release": target.release,
        "platform_system": target.system,
        "platform_version": target.version,
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": target.system.lower(),
    }


def tags(python: str, platforms: list[str]) -> list[str]:
    """Every tag, the most specific first."""
    major, minor = map(int, python.split("."))
    interpreter = f"cp{major}{minor}"
    own = cpython_tags((major, minor), [interpreter], platforms)
    return [str(tag) for tag in (*own, *compatible_tags((major, minor), interpreter, platforms))]


def folded(every: list[str], platforms: list[str]) -> list[str]:
    """The same tags with one ``cp311-abi3-*`` for a run over all platforms, in their order."""
    short: list[str] = []
    i = 0
    while i < len(every):
        prefix = every[i].rpartition("-")[0]
        if every[i : i + len(platforms)] == [f"{prefix}-{platform}" for platform in platforms]:
            short.append(f"{prefix}-*")
            i += len(platforms)
        else:
            short.append(every[i])
            i += 1
    return short


def content(target: Target, python: str) -> str:
    """The text of one data file."""
    linux = target.system == "Linux"
    platforms = list(linux_platforms(target.machine) if linux else macos_platforms(target.machine))
    data = {
        "why": LINUX_WHY if linux else MACOS_WHY,
        "markers": markers(target, python),
        "platforms": platforms,
        "tags": folded(tags(python, platforms), platforms),
    }
    return json.dumps(data, indent=1) + "\n"


def main(folder: Path = DATA) -> None:
    for target in TARGETS:
        for python in PYTHONS:
            (folder / f"{target.name.replace('/', '-')}-{python}.json").write_text(content(target, python), "utf-8")


if __name__ == "__main__":
    main()
