"""How a machine is doing: memory, disk, load.

Importing this module imports psutil (about 20 ms), so the supervisor imports it when somebody asks for the first time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable

import psutil

from ..info import DiskInfo, LoadInfo, MemInfo


def mem_info(pids: Iterable[int]) -> MemInfo:
    """The host's memory, and what the processes `pids` hold together. Processes that are gone count as nothing."""
    memory = psutil.virtual_memory()
    return MemInfo(
        total=memory.total,
        available=memory.available,
        used=memory.used,
        used_percent=memory.percent,
        processes=sum(_held_by(pid) for pid in pids),
    )


def _held_by(pid: int) -> int:
    """Bytes. Where the system tells, a page that n processes share counts 1/n: forked replicas share most of theirs."""
    try:
        process = psutil.Process(pid)
        try:
            return int(process.memory_full_info().pss)
        except (psutil.AccessDenied, AttributeError):
            return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def disk_info(path: str | None = None) -> DiskInfo:
    """The file system that holds `path`, by default the one of temporary files."""
    path = path or _temporary()
    usage = psutil.disk_usage(path)
    return DiskInfo(total=usage.total, free=usage.free, used=usage.used, used_percent=usage.percent, path=path)


def _temporary() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # It tries to write, and nothing can be written: just then somebody asks.
        return next((path for path in (os.environ.get("TMPDIR", ""), "/tmp") if os.path.isdir(path)), os.sep)


def load_info() -> LoadInfo:
    """The host's load averages; zeros where it keeps none."""
    try:
        return LoadInfo(*os.getloadavg())
    except OSError:
        return LoadInfo(0.0, 0.0, 0.0)
