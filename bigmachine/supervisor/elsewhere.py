"""The supervisor of a machine on another host, after `remote`. On the standard input is who it is."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from ..credentials import Credentials
from ..info import Notice
from ..rpc.reactor import reactor
from .local import read_handover
from .notices import watch
from .processes import Processes
from .serve import serve
from .workers import ProcessWorkers

MARGIN = 60.0
"""Seconds that a dead man's switch waits after the lease: the machine ends by itself before, and says why."""


class RemoteHost:
    """`system.Host`: the listening socket is the agent's. Whether the driver lives, only the lease tells; SIGTERM, from whoever
    started the agent, means the same as its end.

    Of the handover, ``deadman`` is a file, if any, that says until when the host is to live, in seconds since its start; an
    agent wrote it before (`bootstrap.agent.live`). ``notices`` is the URL of a metadata service, or empty.
    """

    def __init__(self, handover: dict[str, Any]) -> None:
        self.maxprocs: int = handover["maxprocs"]
        self._listener = socket.socket(fileno=handover["listener"])
        self._on_exit: list[str] = handover["on_exit"]
        self._remove: str = handover["remove"]
        self._deadman: str = handover["deadman"]
        self._notices: str = handover["notices"]
        self._ended, self._end = os.pipe()
        signal.signal(signal.SIGTERM, lambda *_: os.write(self._end, b"!"))

    def listener(self) -> socket.socket:
        """See `system.Host`."""
        return self._listener

    def driver_gone(self) -> list[int]:
        """See `system.Host`."""
        return [self._ended]

    def renewed(self, lease: float) -> None:
        """See `system.Host`. In place, and as long as ever: so that it needs no space, and nobody reads half of it."""
        if not self._deadman:
            return
        until = time.clock_gettime(time.CLOCK_BOOTTIME) + lease + MARGIN
        try:
            fd = os.open(self._deadman, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(fd, b"%-15d\n" % until, 0)
            finally:
                os.close(fd)
        except OSError as error:
            os.write(2, f"bigmachine: {self._deadman}: {error.strerror}: this host will end\n".encode())

    def watch(self, notify: Callable[[Notice], None]) -> None:
        """See `system.Host`."""
        if self._notices:
            work = threading.Thread(target=watch, args=(self._notices, notify), name="bigmachine-notices", daemon=True)
            work.start()

    def exit(self, reason: str) -> NoReturn:
        """See `system.Host`. The reason is for whoever reads what this host says; then the command of the handover, if any,
        which ends the host, takes this process's place."""
        if self._remove:
            shutil.rmtree(self._remove, ignore_errors=True)
        try:
            sys.stderr.write(f"{reason}\n")
            sys.stderr.flush()
        except OSError:
            pass  # The connection over which it was read is gone.
        if self._on_exit:
            try:
                os.execvp(self._on_exit[0], self._on_exit)
            except OSError as error:
                os.write(2, f"bigmachine: cannot execute {self._on_exit[0]}: {error.strerror}\n".encode())
        os._exit(0)


def serve_remote(processes: Processes | str) -> None:
    """Be a machine, with these processes, or end with the reason for having none; see `remote.begin`."""
    handover = read_handover()
    silence = os.open(os.devnull, os.O_RDONLY)
    os.dup2(silence, 0)
    os.close(silence)
    host = RemoteHost(handover)
    if isinstance(processes, str):
        host.exit(processes)
    credentials = Credentials.from_json(handover["credentials"])
    machine = credentials.identity.name
    workers = ProcessWorkers(processes, machine, credentials, handover["address"], host.maxprocs, reactor())
    serve(machine, credentials, host, workers, reactor(), handover["lease"])
