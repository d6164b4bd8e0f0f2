"""The supervisor's own service: what the driver, and in part other machines, can ask of a machine."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ..info import VERSION, DiskInfo, Info, LoadInfo, MemInfo, Vitals, platform_name, python_version
from ..rpc.methods import call_context
from ..rpc.stats import MethodStats, Stats
from .workers import Event, Workers

if TYPE_CHECKING:
    from ..vars import Sample
    from .vitals import Gauge

DEATH_WITHIN = 0.3
"""Seconds within which a supervisor knows of a death: the kernel tells it at once, but its last output is read first."""

OWNER_ONLY = frozenset(
    f"Supervisor.{method}" for method in ("await_ready", "register", "install", "keepalive", "events", "shutdown")
)
"""Methods that change the machine, or show what its services say: the session's driver's alone."""


class SupervisorService:
    """Served as ``Supervisor``. None of it runs, imports or unpickles what is the user's."""

    def __init__(
        self,
        machine: str,
        workers: Workers,
        stats: Callable[[], Stats],
        renew: Callable[[float], None],
        end: Callable[[str, float], None],
    ) -> None:
        self._machine = machine
        self._workers = workers
        self._stats = stats
        self._renew = renew
        self._end = end
        self._lock = threading.Lock()
        self._blob: bytes | None = None
        self._digest = ""
        self._parallel: list[str] = []
        self._gauge: Gauge | None = None

    def ping(self) -> str:
        """Says the machine's id."""
        return self._machine

    def info(self) -> Info:
        """Who this is, and what it runs."""
        return Info(
            id=self._machine,
            hostname=socket.gethostname(),
            pid=os.getpid(),
            maxprocs=self._workers.maxprocs,
            python=python_version(),
            platform=f"{platform_name()} {os.uname().release}",
            version=VERSION,
            digest=self._digest,
        )

    def await_ready(self, timeout: float) -> str:
        """Returns when the program has reached `driver.start()`: its digest, empty where it is not packed. Raises how it
        ended instead, or `TimeoutError`."""
        self._digest = self._workers.await_ready(timeout)
        return self._digest

    def register(self, blob: bytes, parallel: list[str]) -> None:
        """The services, as `session` encodes them, and the names of their parallel methods. Nothing is decoded here."""
        with self._lock:
            if self._blob is not None:
                raise RuntimeError("the services of this machine are registered already")
            self._blob = blob
            self._parallel = parallel

    def install(self, timeout: float) -> bytes | None:
        """Install the registered services. None, or how it failed: as bytes, for only the driver may decode them."""
        blob, self._blob = self._blob, b""
        assert blob is not None
        return self._workers.install(blob, bool(self._parallel), timeout)

    def keepalive(self, lease: float) -> float:
        """End yourself unless called again within `lease` seconds. Returns the lease that was granted; 0 where the services
        have died, which the driver may not have read yet, behind output for which there is no room."""
        self._renew(lease)
        return lease if self._workers.obituary() is None else 0.0

    def events(self) -> Iterator[Event]:
        """Output, logs and deaths as they come; ends when the machine has been shut down and all is said."""
        context = call_context()
        yield from self._workers.events(lambda: context.cancelled)

    def obituary(self) -> str | None:
        """How a service process died; None while all live. Asked by those whose connection to one has ended, who may
        have noticed before the supervisor has: waits a little."""
        deadline = time.monotonic() + DEATH_WITHIN
        while (obituary := self._workers.obituary()) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return obituary

    def mem_info(self) -> MemInfo:
        """Memory, in bytes."""
        from .vitals import mem_info  # psutil: 20 ms and 1.6 MB, for machines that are asked.

        return mem_info([os.getpid(), *self._workers.pids().values()])

    def disk_info(self) -> DiskInfo:
        """The file system of temporary files, in bytes."""
        from .vitals import disk_info

        return disk_info()

    def load_info(self) -> LoadInfo:
        """Load averages."""
        from .vitals import load_info

        return load_info()

    def vitals(self) -> Vitals:
        """Memory, disk, load, and the machine's processes: for whoever looks again and again."""
        from .vitals import Gauge

        with self._lock:
            gauge = self._gauge = self._gauge or Gauge()
        pids = {"supervisor": os.getpid(), **{str(number): pid for number, pid in self._workers.pids().items()}}
        return gauge.read(pids)

    def pids(self) -> dict[int, int]:
        """The service processes' process ids, by number."""
        return self._workers.pids()

    def stats(self) -> dict[str, MethodStats]:
        """Figures of the calls that the supervisor itself has served."""
        return self._stats().snapshot()

    def vars(self) -> list[Sample]:
        """The same, as variables."""
        from ..vars import rpc_samples  # Only for those who ask.

        return rpc_samples("server", self.stats())

    def shutdown(self, grace: float) -> None:
        """End the services' processes, SIGTERM first, SIGKILL after `grace` seconds; returns when they are gone."""
        self._end("the driver shut it down", grace)
