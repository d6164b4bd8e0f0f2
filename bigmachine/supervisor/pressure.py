"""Whether a machine is about to run out of memory, so that somebody can look before the kernel kills it.

Two things can run out: the memory of the host (``/proc/meminfo``), and what the machine's control group may use, or one that
it lies in (``memory.max`` in version 2, ``memory.limit_in_bytes`` in version 1), as in containers and batch systems. Files
that are cached count as free in both, as the kernel drops those first.

What decides is pure and comes first; `Meter` reads, which takes 35 µs (measured, in a group three deep). Where there is no
``/proc`` (macOS) nothing is read, and no machine is ever unhealthy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

UNHEALTHY = 95.0
"""Percent of memory in use from which on a machine is unhealthy, as in Go's bigmachine."""

HEALTHY = 90.0
"""Percent below which it is healthy again: not the same, or one that goes up and down a little would say so every second."""

REMIND = 60.0
"""Seconds after which an unhealthy machine says so again."""

HOST = "its host"
GROUP = "its control group"

Event = tuple[str, float, int, int, str]
"""``(kind, percent, used, total, text)``: kind ``"unhealthy"`` or ``"healthy"``, bytes, and one line for people."""


class Reading(NamedTuple):
    """`used` of `total` bytes of the memory that `whose` (`HOST`, `GROUP`) is."""

    used: int
    total: int
    whose: str

    @property
    def percent(self) -> float:
        return 100.0 * self.used / self.total

    def __str__(self) -> str:
        used, total = (f"{size / (1 << 30):.2f}" for size in (self.used, self.total))
        return f"{self.percent:.1f} % of the memory of {self.whose} is in use: {used} of {total} GiB"


class Pressure:
    """When to say what: at every crossing, and every minute for as long as the machine is unhealthy."""

    def __init__(self) -> None:
        self._told: float | None = None  # When it was last said that it is unhealthy; None while it is healthy.

    def look(self, now: float, readings: Iterable[Reading]) -> Event | None:
        """What there is to be said at `now`, of which the fullest of `readings` decides. None: nothing, or nothing new."""
        worst = max(readings, key=lambda reading: reading.percent, default=None)
        if worst is None:
            return None
        percent = round(worst.percent, 1)
        if worst.percent >= UNHEALTHY and (self._told is None or now - self._told >= REMIND):
            self._told = now
            return "unhealthy", percent, worst.used, worst.total, str(worst)
        if worst.percent < HEALTHY and self._told is not None:
            self._told = None
            return "healthy", percent, worst.used, worst.total, str(worst)
        return None


# -- What the kernel says ------------------------------------------------------------------------------------------------


def host(meminfo: str) -> Reading | None:
    """Of the text of ``/proc/meminfo``. None where it does not say (before Linux 3.14)."""
    sizes = _numbers(meminfo, ("MemTotal:", "MemAvailable:"))
    total, available = sizes.get("MemTotal:", 0) * 1024, sizes.get("MemAvailable:")
    if total <= 0 or available is None:
        return None
    return Reading(max(0, total - available * 1024), total, HOST)


class Files(NamedTuple):
    """Where a control group says what it may use, what it uses, and how much of that is only cached."""

    limit: str
    usage: str
    stat: str
    cached: tuple[str, ...]


V2 = Files("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file", "slab_reclaimable"))
V1 = Files(
    "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", ("total_inactive_file", "total_active_file")
)


def folders(cgroups: str) -> list[tuple[str, Files]]:
    """Where limits may be, below ``/sys/fs/cgroup``, for the text of ``/proc/self/cgroup``: those of the group, and of all that
    it lies in. A container may see its group's path as the host knows it, while its own group is mounted as the root."""
    found: list[tuple[str, Files]] = []
    for line in cgroups.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names = [name for name in path.split("/") if name]
        if ".." in names:
            names = []  # Outside of what this namespace may see.
        if "memory" in controllers.split(","):
            root, files = ["memory"], V1
        elif hierarchy == "0" and not controllers:
            root, files = [], V2
        else:
            continue
        found += [("/".join([*root, *names[:depth]]), files) for depth in range(len(names), -1, -1)]
    return found


def limited(limit: str, usage: str) -> tuple[int, int] | None:
    """The numbers; None where there is no limit (``max``, or in version 1 a number beyond all memory)."""
    if not limit.strip().isdecimal() or not usage.strip().isdecimal():
        return None
    most = int(limit)
    return (int(usage), most) if 0 < most < 1 << 60 else None


def _numbers(text: str, names: Sequence[str]) -> dict[str, int]:
    """Those of the lines ``name number …`` that have one of `names`."""
    found = {}
    for line in text.splitlines():
        name, *words = line.split()[:2] or ("",)
        if name in names and words and words[0].isdecimal():
            found[name] = int(words[0])
    return found


class Meter:
    """Reads. The arguments are where the kernel's file systems are."""

    def __init__(self, proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> None:
        self._proc = proc
        self._cgroups = cgroups
        self._folders: list[tuple[str, Files]] | None = None

    def read(self) -> list[Reading]:
        """What there is to be read now. Never raises."""
        whole = host(_read(f"{self._proc}/meminfo", 256))
        found = [whole] if whole is not None else []
        if self._folders is None:
            # Looked for once: nobody moves a machine's processes to another group, but limits are changed.
            there = ((f"{self._cgroups}/{path}", files) for path, files in folders(_read(f"{self._proc}/self/cgroup")))
            self._folders = [(path, files) for path, files in there if os.path.exists(f"{path}/{files.limit}")]
        for path, files in self._folders:
            numbers = limited(_read(f"{path}/{files.limit}"), _read(f"{path}/{files.usage}"))
            if numbers is None:
                continue
            used, total = numbers
            if used * 100 >= total * HEALTHY:  # Else it does not matter how much of it is cached.
                used -= sum(_numbers(_read(f"{path}/{files.stat}"), files.cached).values())
            found.append(Reading(max(0, used), total, GROUP))
        return found


def _read(path: str, size: int = 16384) -> str:
    """The beginning of a small file of the kernel's; nothing where it cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, size).decode("ascii", "replace")
        finally:
            os.close(fd)
    except OSError:
        return ""
