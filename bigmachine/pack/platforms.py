"""What the name of a platform stands for: which distributions its Python accepts, and what their markers see.

Behind each name and Python lies a data file (``platforms_data/``), which ``python packaging/platforms.py`` writes; there it
says which glibc and which macOS are assumed, and why. A file's ``*`` in a tag stands for each of its platforms in turn.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources

from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from ..errors import PackError
from ..info import platform_name

NAMES = ("linux/amd64", "linux/arm64", "darwin/arm64", "darwin/amd64")
"""The platforms that there are."""

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
"""The Pythons that each of them may have."""

_SYSTEMS = {"linux": r"linux", "darwin": r"darwin|mac ?os|os ?x|\bmac\b|apple"}
_MACHINES = {"amd64": r"amd ?64|x86 ?64|\bx64\b|intel", "arm64": r"arm ?64|aarch ?64|silicon|\bm[1-9]\b|graviton"}
_FOREIGN = {
    r"\bwin|windows|cygwin": "Windows",
    r"musl|alpine": "Linux without glibc",
    r"bsd|solaris|aix|android|\bios\b": "that system",
}
"""Patterns over a name in lower case, with blanks between its words: other words for what there is, and what there is not."""


@dataclass(frozen=True)
class Platform:
    """A platform and its Python. `tags` has the most specific first; `markers` are named as in PEP 508."""

    name: str
    python: str
    markers: Mapping[str, str] = field(hash=False)
    tags: tuple[str, ...]

    def complete(self) -> str:
        """The file that pex takes as ``--complete-platform``; always the same bytes."""
        return json.dumps({"marker_environment": dict(self.markers), "compatible_tags": self.tags}, indent=1) + "\n"

    def environment(self) -> dict[str, str]:
        """For `packaging.markers.Marker.evaluate`."""
        return dict(self.markers)

    def accepts(self, filename: str) -> bool:
        """Whether a wheel of this name can be installed. False for what is no wheel's name."""
        try:
            _, _, _, tags = parse_wheel_filename(filename)
        except InvalidWheelFilename:
            return False
        return not self._tags.isdisjoint(map(str, tags))

    @cached_property
    def _tags(self) -> frozenset[str]:
        return frozenset(self.tags)


def load(name: str, python: str) -> Platform:
    """The platform of this name with this Python (``"3.11"``). Raises `PackError`, which says what may have been meant."""
    if name not in NAMES:
        raise PackError(_unknown(name))
    if python not in PYTHONS:
        raise PackError(f"no such Python for {name}: {python}; there are {', '.join(PYTHONS)}")
    file = resources.files(__package__) / "platforms_data" / f"{name.replace('/', '-')}-{python}.json"
    data = json.loads(file.read_text("utf-8"))
    return Platform(name, python, data["markers"], tuple(_unfold(data["tags"], data["platforms"])))


def this_platform() -> str:
    """The name of the platform that this process runs on; it need not be one of `NAMES`."""
    return platform_name()


def _unfold(tags: list[str], platforms: list[str]) -> list[str]:
    found: list[str] = []
    for tag in tags:
        found += [tag[:-1] + platform for platform in platforms] if tag.endswith("*") else [tag]
    return found


def _unknown(name: str) -> str:
    start = f"no such platform: {name}"
    words = re.sub(r"[^a-z0-9]+", " ", name.lower())
    # In this order: "darwin" has "win" in it, and "musllinux" has "linux".
    for pattern, what in _FOREIGN.items():
        if re.search(pattern, words):
            return f"{start}; {what} is not supported, only Linux with glibc and macOS are: {', '.join(NAMES)}"
    system = next((system for system, pattern in _SYSTEMS.items() if re.search(pattern, words)), "")
    machine = next((machine for machine, pattern in _MACHINES.items() if re.search(pattern, words)), "")
    fitting = [known for known in NAMES if (system or machine) and known.startswith(system) and known.endswith(machine)]
    # "lunix/amd64" fits two by its machine, and is closer to one of them.
    meant = fitting if len(fitting) == 1 else difflib.get_close_matches(name.lower(), fitting or NAMES, n=1, cutoff=0.8)
    return f"{start}; did you mean {meant[0]}?" if meant else f"{start}; there are {', '.join(fitting or NAMES)}"
