"""What the supervisor asks of whoever runs the services: real processes here, threads in the test system."""

from __future__ import annotations

import base64
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ..credentials import Credentials
from ..errors import ProgramEnded
from ..info import Notice
from ..rpc.reactor import Reactor
from .control import Message
from .death import Death
from .output import OutputCapture
from .processes import Processes

Event = tuple[Any, ...]
"""``("output", process, stream, data)``, ``("log", text)``, ``("notice", kind, deadline, text)`` as in `info.Notice`, what
`pressure` says of the memory, or ``("death", summary, last_output)``."""

POLL = 5.0
"""Seconds between two looks whether the reader of events is still there. What happens wakes it at once."""


class Workers(Protocol):
    """The service processes of one machine, as a whole."""

    maxprocs: int

    def await_ready(self, timeout: float) -> str:
        """Until the program has reached `driver.start()`; its digest. Raises `ProgramEnded`, `TimeoutError`."""

    def install(self, blob: bytes, replicas: bool, timeout: float) -> bytes | None:
        """Install the services in every process. None, or how it failed, as `rpc.failures` encodes it."""

    def adopt(self, process: int, sock: socket.socket) -> None:
        """Give a connection to a process. Raises `ValueError` where there is no such process."""

    def events(self, gone: Callable[[], bool]) -> Iterator[Event]:
        """What happens, as it happens; ends after `stop`, when all has been said, or when its reader is `gone`. One reader."""

    def discard(self) -> None:
        """Nobody will read the events any more."""

    def log(self, text: str) -> None:
        """An event of the supervisor's own, for people."""

    def tell(self, event: Event) -> None:
        """An event of the supervisor's own."""

    def notice(self, notice: Notice) -> None:
        """The machine will be taken away: an event; where it is sure, the services are drained in every process that holds
        any, or will hold any."""

    def obituary(self) -> str | None:
        """How the first process that died did so; None while all live."""

    def pids(self) -> dict[int, int]:
        """By process number."""

    def stop(self, grace: float) -> None:
        """End all; returns when nothing is left."""


class ProcessWorkers:
    """`Workers` over `Processes` and their control sockets."""

    def __init__(
        self, processes: Processes, machine: str, credentials: Credentials, address: str, maxprocs: int, reactor: Reactor
    ) -> None:
        self.maxprocs = maxprocs
        self._processes = processes
        self._reactor = reactor
        self._identity = {
            "type": "identity",
            "machine": machine,
            "address": address,
            "maxprocs": maxprocs,
            "credentials": credentials.to_json(),
        }
        self._changed = threading.Condition()
        self._ready: dict[int, Message] = {}
        self._installed: dict[int, bytes | None] = {}
        self._problem = ""
        self._death: Death | None = None
        self._own: list[Event] = []
        self._draining: Message | None = None
        self._holding = 0  # How many processes have, or are setting up, services.
        self._stopping = False
        self._capture = OutputCapture(reactor)
        processes.attach(reactor, self._capture, self._on_message, self._on_exit)

    # -- What the processes say --------------------------------------------------------------------------------------

    def _on_message(self, process: int, message: Message, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)  # None of these messages carries any.
        with self._changed:
            match message.get("type"):
                case "ready":
                    self._ready[process] = message
                case "installed":
                    failure = message.get("failure")
                    self._installed[process] = base64.b64decode(failure) if failure else None
                case "failed":
                    self._problem = str(message.get("error"))
            self._changed.notify_all()

    def _on_exit(self, death: Death) -> None:
        with self._changed:
            if self._death is None and not self._stopping:
                self._death = death
            self._changed.notify_all()
        self._capture.poke()

    def _wait(self, done: Any, timeout: float, what: str) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: done() or self._death or self._problem or self._stopping, timeout):
                raise TimeoutError(f"{what} took more than {timeout:g} s")
            if done():
                return
            if self._death is not None:
                raise ProgramEnded(self._death.summary(), self._death.last_output)
            raise ProgramEnded(self._problem or "the machine was stopped")

    # -- Workers -----------------------------------------------------------------------------------------------------

    def await_ready(self, timeout: float) -> str:
        """See `Workers`."""
        self._wait(lambda: 0 in self._ready, timeout, "the program's way to driver.start()")
        return str(self._ready[0].get("digest", ""))

    def install(self, blob: bytes, replicas: bool, timeout: float) -> bytes | None:
        """See `Workers`. Replicas are started first, as process 0 may be forked only before it has threads."""
        count = self.maxprocs if replicas else 1
        if count > 1:
            self._processes.start_replicas(count, self._ready[0]["single_threaded"])
            self._wait(lambda: len(self._ready) == count, timeout, "starting replicas")
        fd = _memory_file(blob)
        try:
            for process in range(count):
                self._processes.send(process, self._identity)
                self._processes.send(process, {"type": "services"}, [fd])
            with self._changed:
                self._holding = count
                draining = self._draining
            if draining is not None:
                self._drain(draining, count)
        finally:
            os.close(fd)
        self._wait(
            lambda: len(self._installed) == count or any(self._installed.values()), timeout, "setting the services up"
        )
        return next((failure for failure in self._installed.values() if failure), None)

    def adopt(self, process: int, sock: socket.socket) -> None:
        """See `Workers`."""
        try:
            self._processes.send(process, {"type": "connection"}, [sock.fileno()])
        except OSError as error:
            raise ValueError(f"service process {process} cannot take it: {error.strerror or error}") from None
        sock.close()

    def events(self, gone: Callable[[], bool]) -> Iterator[Event]:
        """See `Workers`."""
        told = False
        while True:
            # Looked at before the read: once a death is known, all that the process has said is there to be read. After
            # it would be too late: a read that takes the last words takes the poke, too, and the next one would wait.
            death = None if told else self._death
            outputs = self._capture.read(POLL if death is None else 0.0)
            if not outputs and gone():
                return
            while self._own:
                yield self._own.pop(0)
            for output in outputs or ():
                yield "output", output.process, output.stream, output.data
            if death is not None:
                told = True
                yield "death", death.summary(), death.last_output
            elif outputs is None and self._all_is_said(told):
                return

    def _all_is_said(self, told: bool) -> bool:
        """The pipes have ended: wait for a death that was not `told`, for our own events, for `stop`. True where nothing
        follows."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._own or (self._death and not told), POLL)
            return self._stopping and not self._own and (told or self._death is None)

    def discard(self) -> None:
        """See `Workers`."""
        self._capture.discard()

    def log(self, text: str) -> None:
        """See `Workers`. At most a thousand wait: somebody may knock at the door for hours."""
        if len(self._own) < 1000:
            self.tell(("log", text))

    def tell(self, event: Event) -> None:
        """See `Workers`."""
        with self._changed:
            self._own.append(event)
            self._changed.notify_all()
        self._capture.poke()

    def notice(self, notice: Notice) -> None:
        """See `Workers`."""
        self.tell(("notice", notice.kind, notice.deadline, notice.text))
        if notice.kind == "interruption":
            message = {"type": "drain", "deadline": notice.deadline}
            with self._changed:
                self._draining = message
                count = self._holding
            self._drain(message, count)

    def _drain(self, message: Message, count: int) -> None:
        for process in range(count):
            try:
                self._processes.send(process, message)
            except OSError:
                pass  # It has ended, which the supervisor knows, or is about to know.

    def obituary(self) -> str | None:
        """See `Workers`."""
        return None if self._death is None else self._death.describe()

    def pids(self) -> dict[int, int]:
        """See `Workers`."""
        return self._processes.pids()

    def stop(self, grace: float) -> None:
        """See `Workers`."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._capture.poke()
        survivors = self._processes.stop(grace)
        if survivors:
            self.log(f"processes {survivors} do not end, not even killed")
        self._capture.close()


def _memory_file(data: bytes) -> int:
    """A file without a name that holds `data`; never on disk where the system has memory files."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("bigmachine-services")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return fd
