"""What machines say about themselves: values that cross the wire, all of them plain and small."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

VERSION = "0.1.0"
"""Of this package."""


@dataclass(frozen=True)
class Info:
    """Who a machine is and what it runs. `digest` is the packed program's; empty before it runs, and where it is not packed."""

    id: str
    hostname: str
    pid: int
    maxprocs: int
    python: str
    platform: str
    version: str
    digest: str = ""


@dataclass(frozen=True)
class MemInfo:
    """Memory in bytes: of the machine's host, and what the machine's own processes hold (`processes`)."""

    total: int
    available: int
    used: int
    used_percent: float
    processes: int


@dataclass(frozen=True)
class DiskInfo:
    """The file system that holds the machine's temporary files, in bytes."""

    total: int
    free: int
    used: int
    used_percent: float
    path: str


@dataclass(frozen=True)
class LoadInfo:
    """Load averages of the host over 1, 5 and 15 minutes: processes that run or wait for a processor or a disk."""

    load1: float
    load5: float
    load15: float


@dataclass(frozen=True)
class ProcessInfo:
    """A process of a machine: ``"supervisor"``, ``"0"``, …; bytes that it holds, seconds of processors that it has used since
    it began, threads."""

    process: str
    pid: int
    rss: int
    cpu: float
    threads: int


@dataclass(frozen=True)
class Vitals:
    """All that is asked for again and again while somebody looks. `cpu` is the share of the host's processors that was busy
    since it was asked for last, in percent; None the first time."""

    memory: MemInfo
    disk: DiskInfo
    load: LoadInfo
    cpu: float | None
    processes: tuple[ProcessInfo, ...]


@dataclass(frozen=True)
class Notice:
    """A machine will be taken away by whoever lends it (`kind` ``"interruption"``), or probably will (``"rebalance"``).

    `deadline` is when, in seconds as of `time.time`; None where nobody has said. `text` is one line for people.
    """

    kind: str
    deadline: float | None
    text: str


@dataclass(frozen=True)
class Step:
    """A step of a machine's boot that has ended, or failed: when it began, as of `time.time`, and the `seconds` it took."""

    name: str
    began: float
    seconds: float


def python_version() -> str:
    """The minor version, ``"3.11"``: what driver and machine must share, as pickles and bytecode depend on it."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def platform_name() -> str:
    """``linux/amd64``, ``darwin/arm64``, …"""
    machine = os.uname().machine.lower()
    return f"{sys.platform}/{ {'x86_64': 'amd64', 'aarch64': 'arm64'}.get(machine, machine) }"
