"""A file for each machine's lines, ``-bigm.logdir=DIR``: ``DIR/m-1a2b3c.log``, and ``DIR/driver.log`` for the session's own.

Each line is ``TIME PROCESS STREAM TEXT``: ``2026-11-22T19:20:01.123456Z 0 stderr hello``; TIME is when it came here, in UTC.
Nothing is buffered: what was written is there, even if the driver is killed. A disk that is full ends the files, not the run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from ..errors import UsageError

DRIVER = "driver"
"""The process of the session's own lines, and the name of their file."""


class Files:
    """See the module. `complain` gets a line about files that cannot be written, and, in the end, what is missing.

    The directory is made, for its owner alone, as output may be private. Raises `UsageError` where it cannot be written to.
    """

    def __init__(self, directory: Path, complain: Callable[[str], None]) -> None:
        self._directory = directory
        self._complain = complain
        self._lock = threading.Lock()
        self._fds: dict[str, int] = {}
        self._closed = False
        self._error = ""
        self._missing = 0
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fds[""] = self._create(DRIVER)
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(
                f"cannot write logs to {directory}: {reason}; name a directory that can be written to"
            ) from None

    def _create(self, name: str) -> int:
        return os.open(self._directory / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def open(self, machine: str) -> None:
        """Make the machine's file."""
        try:
            with self._lock:
                if machine not in self._fds and not self._error and not self._closed:
                    self._fds[machine] = self._create(machine)
        except OSError as error:
            self._fail(error, 0)

    def write(self, machine: str, now: float, source: str, text: str, lines: int) -> None:
        """So many whole `lines` of `source`, a process and a stream."""
        head = f"{datetime.fromtimestamp(now, UTC):%Y-%m-%dT%H:%M:%S.%fZ} {source} "
        data = memoryview(f"{head}{text[:-1].replace(chr(10), chr(10) + head)}\n".encode(errors="replace"))
        try:
            with self._lock:
                fd = self._fds.get(machine)
                if self._error:
                    self._missing += lines
                elif fd is not None:
                    while data:
                        data = data[os.write(fd, data) :]
        except OSError as error:
            self._fail(error, lines)

    def _fail(self, error: OSError, lines: int) -> None:
        with self._lock:
            self._missing += lines
            first, self._error = not self._error, error.strerror or str(error)
        if first:
            self._complain(f"cannot write logs to {self._directory}: {self._error}; the rest of the run goes without")

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            fds, self._fds = list(self._fds.values()), {}
            missing, self._missing = self._missing, 0
            self._closed = True
        for fd in fds:
            os.close(fd)
        if missing:
            self._complain(f"{missing} lines are missing in {self._directory}: {self._error}")
