"""The supervisor of a machine that its driver started on the same host (`systems.local`)."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from ..credentials import Credentials
from ..info import Notice
from ..rpc.reactor import reactor
from .processes import Processes
from .serve import pidfd, serve
from .workers import ProcessWorkers

MAX_HANDOVER = 64 * 1024


class LocalHost:
    """`system.Host`: the listening socket is inherited; the driver is gone when the standard input ends."""

    def __init__(self, handover: dict[str, Any]) -> None:
        self.maxprocs: int = handover["maxprocs"]
        self._listener = socket.socket(fileno=handover["listener"])
        self._driver: int = handover["driver"]

    def listener(self) -> socket.socket:
        """See `system.Host`."""
        return self._listener

    def driver_gone(self) -> list[int]:
        """See `system.Host`. The pipe ends with the driver; or later, where the driver forked, so that its process is
        watched too."""
        fd = pidfd(self._driver)
        return [0] if fd is None else [0, fd]

    def renewed(self, lease: float) -> None:
        """See `system.Host`: nobody else waits."""

    def watch(self, notify: Callable[[Notice], None]) -> None:
        """See `system.Host`: nobody takes it away."""

    def exit(self, reason: str) -> NoReturn:
        """See `system.Host`. The reason is for the launcher, who reads it."""
        sys.stderr.write(f"{reason}\n")
        sys.stderr.flush()
        os._exit(0)


def read_handover() -> dict[str, Any]:
    """The first line of the standard input. Raises SystemExit where the driver died before it was written."""
    line = b""
    while not line.endswith(b"\n"):
        data = os.read(0, MAX_HANDOVER)
        if not data:
            raise SystemExit("bigmachine: the driver ended before it had said what this machine is")
        line += data
    handover: dict[str, Any] = json.loads(line)
    return handover


def serve_local(machine: str, processes: Processes) -> None:
    """Be machine `machine` until it ends."""
    handover = read_handover()
    host = LocalHost(handover)
    credentials = Credentials.from_json(handover["credentials"])
    workers = ProcessWorkers(processes, machine, credentials, handover["address"], host.maxprocs, reactor())
    serve(machine, credentials, host, workers, reactor(), handover["lease"])
