"""How a machine is doing: memory, disk, load.

Importing this module imports psutil (about 20 ms), so the supervisor imports it when somebody asks for the first time.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping

import psutil

from ..info import DiskInfo, LoadInfo, MemInfo, ProcessInfo, Vitals

SOON = 0.2
"""Seconds between two looks at how busy the processors are: over less it says nothing, as the kernel counts in hundredths."""

WORTH = 100
"""Weighing shared pages (`_held_by`) takes milliseconds for each gigabyte. It is done again after that many times as long as it
took: it takes a hundredth of the time at most, however often somebody asks."""


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


class Gauge:
    """The vitals of one machine, asked for every few seconds: what has to be known of the time before is kept here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._looked = 0.0
        self._busy = self._passed = 0.0
        self._cpu: float | None = None
        self._memory: MemInfo | None = None
        self._weigh_at = 0.0

    def read(self, pids: Mapping[str, int]) -> Vitals:
        """Of the host, and of the machine's processes `pids`, by name. Processes that are gone are left out."""
        with self._lock:
            processes = tuple(info for info in (_process_info(name, pid) for name, pid in pids.items()) if info is not None)
            return Vitals(self._mem_info(pids), disk_info(), load_info(), self._share(), processes)

    def _mem_info(self, pids: Mapping[str, int]) -> MemInfo:
        began = time.monotonic()
        if self._memory is not None and began < self._weigh_at:
            now = mem_info(())
            return MemInfo(now.total, now.available, now.used, now.used_percent, self._memory.processes)
        self._memory = mem_info(set(pids.values()))
        ended = time.monotonic()
        self._weigh_at = ended + WORTH * (ended - began)
        return self._memory

    def _share(self) -> float | None:
        now = time.monotonic()
        if self._looked and now - self._looked < SOON:
            return self._cpu
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        # A guest's time is counted in `user`, too.
        passed = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        busy = passed - idle
        if self._looked and passed > self._passed:
            share = 100.0 * (busy - self._busy) / (passed - self._passed)
            self._cpu = min(100.0, max(0.0, share))
        self._looked, self._busy, self._passed = now, busy, passed
        return self._cpu


def _process_info(name: str, pid: int) -> ProcessInfo | None:
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times = process.cpu_times()
            return ProcessInfo(name, pid, process.memory_info().rss, times.user + times.system, process.num_threads())
    except psutil.Error:
        return None
