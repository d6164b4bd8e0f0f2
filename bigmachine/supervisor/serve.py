"""The supervisor: the process on a machine that never runs user code. This puts its parts together."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Callable

from ..credentials import Credentials, Identity, Role, peer_identity, server_context
from ..rpc.codec import Codec
from ..rpc.reactor import Reactor
from ..rpc.server import Server
from ..services import Services
from ..system import Host
from .door import Door
from .pressure import Meter, Pressure
from .service import OWNER_ONLY, SupervisorService
from .watchdog import Watchdog
from .workers import Workers

FIRST_CONTACT = 60.0
"""Seconds that a driver has to contact a machine that it has just started; an agent's machine was contacted already."""

LINGER = 5.0
"""Seconds for which a machine whose services died waits to be asked why, and to be shut down, where no driver is connected. One
that is may be held up by output that nobody reads, the last words among it: then it learns from its keepalives."""

OBITUARY = 0.3
"""Seconds for which a machine whose services died, and which was shut down for it, can still be asked why: by other
machines, whose calls failed at the same moment and which have to connect first."""

ORPHAN_GRACE = 2.0
"""Seconds between SIGTERM and SIGKILL where the driver is gone: nobody waits for a result any more."""


class Supervisor:
    """A machine that serves. `run` returns when it has ended; `host.exit` is the caller's to call."""

    def __init__(
        self, machine: str, context: ssl.SSLContext, host: Host, workers: Workers, reactor: Reactor, lease: float
    ) -> None:
        self._machine = machine
        self._host = host
        self._workers = workers
        self._reactor = reactor
        self._watchdog = Watchdog(time.monotonic(), lease, FIRST_CONTACT)
        self._meter, self._pressure = Meter(), Pressure()
        self._lock = threading.Lock()
        self._ending = False
        self._alone = False  # Nobody will hang up, whatever connections seem to be open.
        self._ended = threading.Event()
        self.reason = ""
        service = SupervisorService(machine, workers, lambda: self._server.stats, self._renew, self.end)
        handler = Services({"Supervisor": service}, OWNER_ONLY)
        handler.installed()
        self._server = Server(handler, context, Codec(), reactor, identify=peer_identity, log=workers.log)
        self._door = Door(host.listener(), machine, self._route, reactor, workers.log)
        self._watch_driver(host.driver_gone())
        host.watch(workers.notice)
        self._check()

    def _route(self, process: int | None, sock: socket.socket) -> None:
        if process is None:
            self._server.adopt(sock)
        else:
            self._workers.adopt(process, sock)

    def _watch_driver(self, fds: list[int]) -> None:
        def gone(fd: int) -> Callable[[int], None]:
            def check(_: int) -> None:
                self._reactor.execute(lambda: self.end("the driver has ended", ORPHAN_GRACE, orphan=True))

            return check

        for fd in fds:
            self._reactor.watch(fd, gone(fd)).arm()

    def _renew(self, lease: float) -> None:
        with self._lock:
            self._watchdog.renew(time.monotonic(), lease)
        self._host.renewed(lease)

    def _check(self) -> None:
        """Look at the lease, at the services, and at the memory, every second, for the rest of the machine's life."""
        if self._ending:
            return
        self._reactor.call_later(1.0, self._check)  # First: whatever goes wrong below, the lease counts.
        with self._lock:
            expired = self._watchdog.expired(time.monotonic())
        if expired is not None:
            self._reactor.execute(lambda: self.end(expired, ORPHAN_GRACE, orphan=True))
            return
        if self._workers.obituary() is not None and not self._driver_listens():
            with self._lock:
                self._watchdog.renew(time.monotonic(), min(LINGER, self._watchdog.remaining(time.monotonic())))
        said = self._pressure.look(time.monotonic(), self._meter.read())
        if said is not None:
            self._workers.tell(said)

    def end(self, reason: str, grace: float, *, orphan: bool = False) -> None:
        """End the services' processes; then the machine. Returns when the processes are gone. Later calls wait for that."""
        with self._lock:
            first, self._ending = not self._ending, True
        if not first:
            self._ended.wait(grace + 10.0)
            return
        self.reason = reason
        try:
            if orphan:
                self._alone = True
                self._workers.discard()
            self._workers.stop(grace)
        finally:  # Nobody looks at the lease any more: whatever was in the way, the host must end.
            self._ended.set()

    def kill(self) -> None:
        """As a power cut would: for the test system."""
        self._door.close()
        self._server.close(abort=True)
        self.end("it was killed", 0.0, orphan=True)

    def _driver_listens(self) -> bool:
        return any(isinstance(caller, Identity) and caller.role is Role.DRIVER for caller in self._server.callers)

    def run(self) -> str:
        """Until the machine has ended; the driver has then had time to read what was left to say. Returns why."""
        self._ended.wait()
        if self._workers.obituary() is not None and not self._alone:
            time.sleep(OBITUARY)
        self._door.close()
        deadline = time.monotonic() + LINGER
        while not self._alone and self._driver_listens() and time.monotonic() < deadline:
            time.sleep(0.01)  # The driver hangs up when it has read everything.
        self._server.close(f"machine {self._machine} has ended: {self.reason}")
        return self.reason


def serve(machine: str, credentials: Credentials, host: Host, workers: Workers, reactor: Reactor, lease: float) -> None:
    """Be machine `machine` until it ends."""
    supervisor = Supervisor(machine, server_context(credentials), host, workers, reactor, lease)
    host.exit(supervisor.run())


def pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when process `pid` ends; None where the system has no such thing."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
