"""Who drives: a mark on a machine by which others can tell whether the process that started it still runs.

A mark is ``host:pid:start@table``, such as ``ada:4242:816093@5f2c81d0a9be``. A host's name and a process id say nothing by
themselves: names repeat (containers of one image, laptops of one make), ids are used again. So `start` is when that process
began, and `table` names the process table in which the id means something: a digest of the boot and of the namespaces.

`is_running` knows only about processes in its own table. Of all others it says that it does not know: whoever wants to end a
machine because its driver is gone must be sure of it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import socket
import subprocess
import sys
from typing import NamedTuple

import psutil

LINUX = sys.platform == "linux"


class Driver(NamedTuple):
    """A mark, taken apart."""

    host: str
    pid: int
    start: str
    table: str


def this_driver() -> str:
    """The mark of this process."""
    pid = os.getpid()
    host = socket.gethostname().replace(":", "-")[:128]  # A tag's value has 256 characters.
    return f"{host}:{pid}:{_start(pid) or '?'}@{process_table()}"


def parse(mark: str) -> Driver | None:
    """None where it is no mark."""
    try:
        host, pid, rest = mark.rsplit(":", 2)
        start, _, table = rest.partition("@")
        return Driver(host, int(pid), start, table)
    except ValueError:
        return None


def is_running(mark: str) -> bool | None:
    """Whether the driver with this mark runs; None where this process cannot know."""
    driver = parse(mark)
    if driver is None or driver.pid <= 0 or driver.start in ("", "?", "_") or not driver.table:  # "_": "?" in a tag.
        return None
    if driver.table != process_table():
        return None
    try:
        os.kill(driver.pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # It is somebody else's, and there.
    start = _start(driver.pid)
    # Nothing to be read of a process that is there: /proc may hide those of other users.
    return None if start is None else start == driver.start


@functools.cache
def process_table() -> str:
    """Names what process ids mean here; empty where that cannot be told."""
    if LINUX:
        facts = [_read("/proc/sys/kernel/random/boot_id"), _link("/proc/self/ns/pid"), _link("/proc/self/ns/time")]
        known = bool(facts[0] and facts[1])  # Older kernels have no namespaces of time.
    else:
        facts = [_boot_session()]
        known = bool(facts[0])
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:12] if known else ""


def _start(pid: int) -> str | None:
    """When a process began, as a text that stays the same while it lives; ``"ended"`` of one that only waits to be reaped, None
    where it cannot be read."""
    if LINUX:
        # In ticks since the boot: psutil's seconds move when somebody sets the clock.
        _, _, rest = _read(f"/proc/{pid}/stat").rpartition(")")
        fields = rest.split()
        if len(fields) < 20:
            return None
        return "ended" if fields[0] in "ZX" else fields[19]
    try:
        process = psutil.Process(pid)
        return "ended" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.3f}"
    except psutil.Error:
        return None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _boot_session() -> str:
    """macOS has a name for each boot."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["/usr/sbin/sysctl", "-n", "kern.bootsessionuuid"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return ""
