"""A session: the handle on bigmachine. The driver's starts machines and ends them; a service's dials them.

What it takes to own machines (`fleet`) is not imported here: a service's process has no use for it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .credentials import Credentials
from .errors import UsageError
from .machine import Machine, Network

if TYPE_CHECKING:
    from .events import Events
    from .fleet import Fleet, Owned
    from .logs import Logs
    from .rpc.calls import Call


class Session:
    """See the module. A driver's session is a context manager: at its end all its machines are shut down.

    ``address`` is this process's own machine's in a service, "" in the driver. ``failed`` is the exception that has ended the
    program, None where none has. ``captures`` are what was saved of machines that were not well.
    """

    def __init__(self, network: Network, *, address: str = "", fleet: Fleet | None = None) -> None:
        self.address = address
        self._network = network
        self._fleet = fleet
        self._lock = threading.Lock()
        self._owned: list[Owned] = []
        self._dialled: dict[str, Machine] = {}
        self._closed = False
        self._interrupted = False  # Who was to end the session was not let.
        self._process = os.getpid()
        self._at_failure: list[Callable[[BaseException], object]] = []
        self._at_end: list[Callable[[], object]] = []
        self.failed: BaseException | None = None
        self.captures: list[dict[str, Any]] = []

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
            new = self._fleet.start(n, services, environ or {}, args, taken)
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

    # -- Seeing inside -----------------------------------------------------------------------------------------------

    @property
    def fleet(self) -> Fleet:
        """What a driver's session is made of. Raises `UsageError` in a service."""
        if self._fleet is None:
            raise UsageError("only the driver's session knows that; this one is a service's")
        return self._fleet

    @property
    def name(self) -> str:
        """``s-1a2b3c4d``, which is in the driver's certificate; raises `UsageError` in a service."""
        return self.fleet.name

    @property
    def system(self) -> str:
        """Where its machines come from: ``"local"``, ``"ec2"``, …; raises `UsageError` in a service."""
        return self.fleet.launcher.name

    @property
    def events(self) -> Events:
        """What has happened; raises `UsageError` in a service."""
        return self.fleet.events

    @property
    def logs(self) -> Logs:
        """What its machines have said; raises `UsageError` in a service."""
        return self.fleet.logs

    def handle_debug(self, app: Any = None, prefix: str = "/debug/bigmachine") -> Any:
        """Serve the debug page, and all below it, under `prefix` of an ASGI application of yours. Returns the application:
        `app` itself where it can mount others (Starlette, FastAPI), else one that serves `prefix`, and hands all else to `app`.

        Who may ask is that application's affair. Raises `UsageError` in a service.
        """
        from .inside.routes import mount  # The driver's, and of no use to most.

        self.fleet  # noqa: B018  # Raises in a service.
        return mount(self, app, prefix)

    def progress(self, calls: Iterable[Call[Any]], desc: str = "", total: int | None = None) -> Iterator[Call[Any]]:
        """Iterate over `calls` as they end, beside a bar on the terminal, or in the notebook, with rate and time left.

        `total` is their number, where they have no length. See `bigmachine.progress`.
        """
        from .progress import progress  # tqdm: for those who want a bar.

        return progress(self, calls, desc, total)

    def say(self, text: str) -> None:
        """Write a line of bigmachine's own."""
        if self._fleet is not None:
            self._fleet.logs.say(text)
        else:
            print(f"bigmachine: {text}", file=sys.stderr)

    # -- The end -----------------------------------------------------------------------------------------------------

    def at_failure(self, callback: Callable[[BaseException], object]) -> None:
        """Call `callback(error)` when the program fails, while the machines are still there."""
        self._at_failure.append(callback)

    def at_end(self, callback: Callable[[], object]) -> None:
        """Call `callback()` when all machines are ended; the last one that was given first."""
        self._at_end.append(callback)

    def fail(self, error: BaseException) -> None:
        """The program has failed. Only the first error counts, and none after the end."""
        if self.failed is not None or self._closed or os.getpid() != self._process:
            return
        self.failed = error
        for callback in self._at_failure:
            try:
                callback(error)
            except Exception as failure:  # The program's own error is the one to be seen.
                self.say(f"{type(failure).__name__} while the failure was looked into: {failure}")

    def shutdown(self) -> None:
        """End every machine of the session, at the same time; returns when they are gone and their output is written.
        Idempotent. Without effect in a fork of the driver: it has copies of everything, but nothing is its own."""
        if os.getpid() != self._process:
            return
        with self._lock:
            first, self._closed = not self._closed or self._interrupted, True
            self._interrupted = False
            owned = list(self._owned)
            dialled = list(self._dialled.values())
        try:
            _end_all(owned)
        except BaseException:  # Ctrl-C: whoever comes again, at the program's exit at the latest, does the rest.
            self._interrupted |= first
            raise
        for machine in dialled:
            machine.stopped(None)
            machine.disconnect()
        try:
            if first:  # Whoever is interrupted here, and comes again at the program's exit, does not wait again.
                for each in owned:
                    each.await_output()
            if self._fleet is not None and first and (summary := self._fleet.summary()):
                self.say(summary)
        finally:
            if self._fleet is not None:
                self._fleet.close()  # A launch may still be under way.
            if first:
                self._end()

    def _end(self) -> None:
        """All machines are ended."""
        if self._fleet is not None:
            self._fleet.ended(self.failed)
        while self._at_end:
            try:
                self._at_end.pop()()
            except Exception as error:  # The others are to be ended, too.
                self.say(f"{type(error).__name__} at the end: {error}")

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is not None and is_failure(error):
                self.fail(error)
        finally:
            self.shutdown()


def _end_all(owned: Sequence[Owned]) -> None:
    """End machines, all at the same time; returns when they are gone."""
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


def is_failure(error: BaseException) -> bool:
    """Whether a program that ends by `error` has failed: not where it has said that all is well, ``sys.exit(0)``, nor where
    SIGTERM or SIGHUP has ended it (`driver`), as whoever sent that waits. Ctrl-C counts: what is interrupted often hung."""
    return not (isinstance(error, SystemExit) and error.code in (None, 0, *SIGNALLED))


SIGNALLED = (128 + signal.SIGTERM, 128 + signal.SIGHUP)
"""Exit codes."""
