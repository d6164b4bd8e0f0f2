"""A session: the handle on bigmachine. The driver's starts machines and ends them; a service's dials them.

What it takes to own machines (`fleet`) is not imported here: a service's process has no use for it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from .credentials import Credentials
from .errors import UsageError
from .machine import Machine, Network

if TYPE_CHECKING:
    from .fleet import Fleet, Owned


_writing = threading.Lock()
"""Held by who writes what machines say: an unbuffered stderr (``python -u``) would cut large pieces of two into each other."""


class Session:
    """See the module. A driver's session is a context manager: at its end all its machines are shut down.

    ``address`` is this process's own machine's in a service, "" in the driver.
    """

    def __init__(
        self, network: Network, *, address: str = "", fleet: Fleet | None = None, output: TextIO | None = None
    ) -> None:
        self.address = address
        self._network = network
        self._fleet = fleet
        self._output = output
        self._lock = threading.Lock()
        self._owned: list[Owned] = []
        self._dialled: dict[str, Machine] = {}
        self._closed = False
        self._process = os.getpid()

    # -- Machines ----------------------------------------------------------------------------------------------------

    def start(
        self,
        n: int,
        services: Mapping[str, object],
        *,
        environ: Mapping[str, str] | None = None,
        args: Sequence[str] | None = None,
    ) -> list[Machine]:
        """Start `n` machines that serve `services`, by name. Returns at once; the machines are UNSTARTED or STARTING.

        `environ` is added to the environment of the program there; `args` replace the arguments with which the
        program is executed there. The objects are copied to every machine (and to each process of it, where methods
        are `parallel`); their ``setup(b)`` runs there. Raises `NotPicklable`, `UsageError`.
        """
        if self._fleet is None:
            raise UsageError("machines are started by the driver; a service can only dial them")
        with self._lock:
            if self._closed:
                raise UsageError("the session has been shut down")
            taken = {owned.machine.id for owned in self._owned}
            new = self._fleet.start(n, services, environ or {}, args, self._write, taken)
            self._owned.extend(new)
        return [owned.machine for owned in new]

    def credentials(self, lifetime: float = 3600.0) -> Credentials:
        """Credentials with the driver's rights, for other HTTP/2 clients (``curl``), good for `lifetime` seconds.

        ``write(folder)`` on them makes the files that such clients want. Raises `UsageError` in a service.
        """
        if self._fleet is None:
            raise UsageError("only the driver has credentials to give")
        return self._fleet.guest(lifetime)

    def dial(self, addr: str) -> Machine:
        """A handle on the machine at `addr`, whoever owns it; the same for the same address. Raises `UsageError` on what
        is no address; whether the machine is there shows when it is called."""
        with self._lock:
            for owned in self._owned:
                if owned.machine.addr == addr:
                    return owned.machine
            machine = self._dialled.get(addr)
            if machine is None:
                machine = self._dialled[addr] = Machine.dialled(addr, self._network)
            return machine

    def machines(self) -> list[Machine]:
        """Every machine that this session started, in that order, stopped ones included; and those it dialled."""
        with self._lock:
            return [*(owned.machine for owned in self._owned), *self._dialled.values()]

    def variables(self, timeout: float = 5.0) -> dict[str, Any]:
        """The variables (`bigmachine.vars`) of all processes, summed and by machine: `inside.variables.as_json` has the form.

        All running machines are asked at the same time; which processes have not answered after `timeout` seconds is
        said in it. Raises `UsageError` in a service, and for a timeout that is none.
        """
        if self._fleet is None:
            raise UsageError("variables are collected by the driver; a service publishes its own, with bigmachine.vars")
        from .inside.variables import as_json, collect  # The driver's, and of no use to most.

        return as_json(collect(self, timeout))

    def profile(
        self, kind: str = "profile", seconds: float = 30.0, machine: Machine | str | None = None, gc: bool = False
    ) -> bytes:
        """A profile of all processes (or of those of `machine`, "driver" among them) in one, in the format of pprof: write it
        to a file, and ``go tool pprof -http=: FILE``.

        `kind` is "profile" (processor time over some `seconds`), "heap" (`gc`: without garbage) or "threads". Comments in it
        say who is missing; `inside.profiles.take` tells more. Raises `UsageError`, and `Unreachable` where nobody has answered.
        """
        if self._fleet is None:
            raise UsageError("profiles are taken by the driver, of all processes at once")
        from .inside.profiles import take  # The driver's, and of no use to most.

        return take(self, kind, seconds, gc, machine).pprof()

    # -- The end -----------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """End every machine of the session, at the same time; returns when they are gone and their output is written.
        Idempotent. Without effect in a fork of the driver: it has copies of everything, but nothing is its own."""
        if os.getpid() != self._process:
            return
        with self._lock:
            first, self._closed = not self._closed, True
            owned = list(self._owned)
            dialled = list(self._dialled.values())
        for each in owned:
            each.begin_end(None)  # First all, as it does not wait; `end` does.
        enders = []
        for each in owned:
            ender = threading.Thread(target=each.end, args=(True,), name="bigmachine-end")
            try:
                ender.start()
            except RuntimeError:
                each.end(True)  # From Python 3.12 on, `atexit` is too late for threads.
            else:
                enders.append(ender)
        for ender in enders:
            ender.join()
        for machine in dialled:
            machine.stopped(None)
            machine.disconnect()
        if self._fleet is not None:
            try:
                if first and (summary := self._fleet.summary()):
                    self._write(f"bigmachine: {summary}\n")
            finally:  # A launch may still be under way.
                self._fleet.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _write(self, text: str) -> None:
        stream = self._output or sys.stderr
        try:
            with _writing:
                stream.write(text)
                stream.flush()
        except (OSError, ValueError):
            pass  # Nobody reads it any more; that is no reason for the program to fail.
