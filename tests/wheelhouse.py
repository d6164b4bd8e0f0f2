"""Wheels of what is installed here, for tests of packing: no index is asked, whatever the network is like."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bigmachine.pack.wheels import shipped_requirements


def make_wheelhouse(folder: Path) -> Path:
    """A directory with wheels of all that a packed program has of bigmachine's requirements, and of what those require."""
    folder.mkdir(parents=True, exist_ok=True)
    ours = shipped_requirements(importlib.metadata.requires("bigmachine") or [])
    waiting, done = [Requirement(line).name for line in ours], set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in done:
            continue
        done.add(name)
        distribution = importlib.metadata.distribution(name)
        for line in distribution.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
        _make_wheel(folder, distribution)
    return folder


def _make_wheel(folder: Path, distribution: importlib.metadata.Distribution) -> None:
    """The installed files in a wheel again; pip's own additions, scripts and bytecode stay out."""
    site = Path(str(distribution.locate_file("")))
    files = [file for file in distribution.files or [] if ".." not in file.parts and file.suffix != ".pyc"]
    (info,) = {file.parts[0] for file in files if file.parts[0].endswith(".dist-info")}
    lines = (distribution.read_text("WHEEL") or "").splitlines()
    tags = [line.partition(": ")[2] for line in lines if line.startswith("Tag: ")]
    pythons, abis, platforms = zip(*(tag.split("-") for tag in tags), strict=True)
    tag = "-".join(".".join(dict.fromkeys(each)) for each in (pythons, abis, platforms))
    path = folder / f"{info.removesuffix('.dist-info')}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as wheel:
        kept = [file for file in files if file.name not in ("INSTALLER", "REQUESTED", "RECORD", "direct_url.json")]
        for file in sorted(kept, key=str):
            wheel.write(site / file, str(file))
        wheel.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in [*kept, f"{info}/RECORD"]))


def offline(wheelhouse: Path) -> dict[str, str]:
    """Variables under which the resolver finds these wheels and nothing else. From Python 3.12 on pex fetches a pip for
    itself first: there the index may be asked for that."""
    found = {"PIP_FIND_LINKS": str(wheelhouse), "PIP_CONFIG_FILE": os.devnull}
    return {**found, "PIP_NO_INDEX": "1"} if sys.version_info < (3, 12) else found
