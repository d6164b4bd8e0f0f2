"""Machines in this process: for unit tests of programs that use bigmachine.

Everything is real but for the processes: each machine listens on loopback, with certificates of its own, mutual TLS and
HTTP/2, and what is sent is pickled. A machine starts in milliseconds, and `kill` ends one as a power cut would.
"""

from __future__ import annotations

import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

from ..credentials import Credentials, server_context
from ..errors import UsageError
from ..info import Notice
from ..machine import Machine
from ..program import digest
from ..rpc.reactor import reactor
from ..supervisor.pressure import HOST, Pressure, Reading
from ..supervisor.serve import Supervisor
from ..supervisor.workers import POLL, Event
from ..system import Launched, Order
from ..worker import Worker

KINDS = ("interruption", "rebalance")
"""Of notices."""


class _Threads:
    """`supervisor.workers.Workers` without processes: each "process" is a server of its own, with its own services."""

    def __init__(
        self,
        machine: str,
        credentials: Credentials,
        context: ssl.SSLContext,
        address: str,
        maxprocs: int,
        names: frozenset[str],
    ) -> None:
        self.maxprocs = maxprocs
        self._workers = [Worker(machine, address, credentials, names, maxprocs, context) for _ in range(maxprocs)]
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._obituary: str | None = None

    def await_ready(self, timeout: float) -> str:
        """This program is running already."""
        return digest()

    def install(self, blob: bytes, replicas: bool, timeout: float) -> bytes | None:
        """See `Workers`."""
        for worker in self._workers if replicas else self._workers[:1]:
            failure = worker.install(blob)
            if failure is not None:
                return failure
        return None

    def adopt(self, process: int, sock: socket.socket) -> None:
        """See `Workers`."""
        if process >= self.maxprocs:
            raise ValueError(f"there is no service process {process}")
        self._workers[process].server.adopt(sock)

    def events(self, gone: Callable[[], bool]) -> Iterator[Event]:
        """See `Workers`. Output is this process's own and needs no carrying."""
        while not gone():
            try:
                event = self._events.get(timeout=POLL)
            except queue.Empty:
                continue
            if event is None:
                return
            yield event

    def discard(self) -> None:
        """See `Workers`."""

    def log(self, text: str) -> None:
        """See `Workers`."""
        self._events.put(("log", text))

    def tell(self, event: Event) -> None:
        """See `Workers`."""
        self._events.put(event)

    def obituary(self) -> str | None:
        """See `Workers`."""
        return self._obituary

    def notice(self, notice: Notice) -> None:
        """See `Workers`."""
        self._events.put(("notice", notice.kind, notice.deadline, notice.text))
        if notice.kind == "interruption":
            for worker in self._workers:
                worker.handler.drain(notice.deadline)

    def die(self, how: str) -> None:
        """As if a service process had died."""
        self._obituary = how
        self._events.put(("death", how, ""))
        for worker in self._workers:
            worker.server.close(abort=True)

    def pids(self) -> dict[int, int]:
        """See `Workers`."""
        return dict.fromkeys(range(self.maxprocs), os.getpid())

    def stop(self, grace: float, *, abort: bool = False) -> None:
        """See `Workers`."""
        for worker in self._workers:
            worker.server.close("the machine was shut down", abort=abort)
            worker.session.shutdown()
        self._events.put(None)


class _Machine:
    """One machine in this process, as its host."""

    def __init__(self, order: Order, maxprocs: int, names: frozenset[str]) -> None:
        self.maxprocs = maxprocs
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self.launched = Launched(order.id, "localhost", self._listener.getsockname()[1], maxprocs)
        context = server_context(order.credentials)
        self.workers = _Threads(order.id, order.credentials, context, self.launched.address, maxprocs, names)
        self.ended = threading.Event()
        self.callbacks: list[Callable[[str], None]] = []
        self.notify: Callable[[Notice], None]
        self.reason: str | None = None
        self.pressure = Pressure()
        self.supervisor = Supervisor(order.id, context, self, self.workers, reactor(), order.lease)
        self.thread = threading.Thread(target=self._run, name=f"bigmachine-{order.id}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.exit(self.supervisor.run())

    def listener(self) -> socket.socket:
        """See `system.Host`."""
        return self._listener

    def driver_gone(self) -> list[int]:
        """See `system.Host`: it cannot be without us."""
        return []

    def renewed(self, lease: float) -> None:
        """See `system.Host`: nobody else waits."""

    def watch(self, notify: Callable[[Notice], None]) -> None:
        """See `system.Host`: `TestLauncher.notice` is who takes it away."""
        self.notify = notify

    def exit(self, reason: str) -> None:
        """See `system.Host`."""
        if not self.ended.is_set():
            self.reason = self.reason or reason
            self.ended.set()
            for callback in self.callbacks:
                callback(self.reason)


class TestLauncher:
    """The system ``test``. `maxprocs`: service "processes" (threads, here) of each machine.

    `names` are those of `__main__` that pickle by reference; everything importable does anyway.
    """

    __test__ = False  # pytest takes a class of this name for a test otherwise.

    name = "test"

    def __init__(self, maxprocs: int = 1, names: frozenset[str] = frozenset()) -> None:
        if maxprocs < 1:
            raise UsageError(f"maxprocs must be at least 1: {maxprocs}")
        self._maxprocs = maxprocs
        self._names = names
        self._machines: dict[str, _Machine] = {}

    def prepare(self) -> None:
        """See `system.Launcher`: there is nothing to be prepared."""

    def launch(self, orders: Sequence[Order]) -> list[Future[Launched]]:
        """See `system.Launcher`."""
        futures = []
        for order in orders:
            future: Future[Launched] = Future()
            try:
                machine = self._machines[order.id] = _Machine(order, self._maxprocs, self._names)
                future.set_result(machine.launched)
            except Exception as error:  # Whatever it is, it is this machine's failure alone.
                future.set_exception(error)
            futures.append(future)
        return futures

    def kill(self, machine: Machine) -> None:
        """End `machine` as a power cut would: connections are reset, nobody says goodbye. Idempotent."""
        there = self._of(machine)
        there.reason = there.reason or "it was killed"
        there.supervisor.kill()
        there.thread.join(5.0)

    def crash(self, machine: Machine, how: str = "service process 0 (pid 1) was killed by SIGSEGV") -> None:
        """End `machine` as the death of a service process would: its supervisor tells `how`."""
        self._of(machine).workers.die(how)

    def notice(self, machine: Machine, kind: str = "interruption", seconds: float | None = 120.0) -> None:
        """As if whoever lends `machine` said that it would be taken away in so many seconds: its services are drained, and it
        goes on. `kind` is as in `info.Notice`; ``"rebalance"`` is said without a time."""
        if kind not in KINDS:
            raise UsageError(f"no such kind of notice: {kind!r}; there are {', '.join(KINDS)}")
        if kind == "rebalance" or seconds is None:
            self._of(machine).notify(Notice(kind, None, "the machine may be taken away"))
        else:
            text = f"the machine will be taken away in {seconds:g} s"
            self._of(machine).notify(Notice(kind, time.time() + seconds, text))

    def fill(self, machine: Machine, percent: float = 97.0) -> None:
        """As if so much of the memory of `machine`'s host were in use: from 95 on it is unhealthy, below 90 no more."""
        total = 1 << 34
        said = self._of(machine).pressure.look(time.monotonic(), [Reading(round(total * percent / 100), total, HOST)])
        if said is not None:
            self._of(machine).workers.tell(said)

    def _of(self, machine: Machine) -> _Machine:
        there = self._machines.get(machine.id)
        if there is None:
            raise UsageError(f"machine {machine.addr} is not of this test system")
        return there

    def stop(self, id: str, grace: float) -> None:
        """See `system.Launcher`."""
        there = self._machines.get(id)
        if there is None or there.ended.is_set():
            return
        if grace > 0:
            there.supervisor.end("its system has stopped it", 0.0)  # Perhaps nobody could reach it to ask it to end.
            there.ended.wait(grace)
        if not there.ended.is_set():
            there.supervisor.kill()
            there.ended.wait(5.0)

    def ended(self, id: str) -> str | None:
        """See `system.Launcher`."""
        there = self._machines.get(id)
        return there.reason if there is not None and there.ended.is_set() else None

    def on_end(self, id: str, callback: Callable[[str], None]) -> None:
        """See `system.Launcher`."""
        there = self._machines.get(id)
        if there is not None:
            there.callbacks.append(callback)
            if there.ended.is_set():
                callback(there.reason or "")

    def console(self, id: str) -> str:
        """See `system.Launcher`: there is none but this process's own."""
        return ""

    def close(self) -> None:
        """See `system.Launcher`."""
        for id in list(self._machines):
            self.stop(id, 0.0)
