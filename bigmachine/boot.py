"""How a machine that was launched becomes RUNNING: a list of named steps, each with a deadline.

=========  ===========================================================================================
launch     the system starts it and says where it is; a system may know the steps within (`system.Launcher`)
connect    TLS to its supervisor: it is the machine that we started, and it is up
check      both sides run the same bigmachine and Python
exec       the program, re-executed there, reaches `driver.start()`; it is the same one
register   the services are sent
setup      every service process decodes them and runs their `setup`
=========  ===========================================================================================

A step that fails, or takes longer than it may, ends the machine with a `BootError` that says which, after how long,
why, and what the machine printed last. Where the services' own code raised, it is that exception.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from .errors import BigmachineError, BootError, ProgramEnded, ProgramMismatch, Unreachable
from .info import VERSION, Info, Step, python_version
from .machine import Machine
from .rpc.failures import decode_failure
from .system import Launched

LAUNCH, CONNECT, CHECK, EXEC, REGISTER, SETUP = "launch", "connect", "check", "exec", "register", "setup"

DEADLINES: dict[str, float] = {
    LAUNCH: 1800.0,  # A cloud's instance takes minutes, as does a slow line; a system that knows better ends it sooner.
    CONNECT: 30.0,  # The supervisor is executing by now; a loaded host may take seconds.
    CHECK: 30.0,
    EXEC: 300.0,  # The program's imports, on a cold disk.
    REGISTER: 600.0,  # The services may hold gigabytes.
    SETUP: 3600.0,  # The user's own code: it may load a model.
}
"""Seconds for each step."""

NOTICE = 0.5
"""Seconds in which a system that notices ends of machines has noticed one: it says more than a broken connection."""


@dataclass(frozen=True)
class Services:
    """What is to run on a machine, encoded once for all machines of a launch."""

    blob: bytes
    parallel: frozenset[str]


@dataclass
class Boot:
    """One machine's way to RUNNING. `connected` is called when the supervisor answers, before the program is there; `within`
    are the launch's own steps; `digest` is that of the driver's program, None where it may be any; `on_step` is told of each
    step of the timeline when it has ended, and whether it failed."""

    machine: Machine
    launched: Future[Launched]
    services: Services
    connected: Callable[[], None]
    console: Callable[[], str]
    ended: Callable[[], str | None]
    within: Callable[[], Sequence[Step]]
    decode: Any
    digest: str | None = None
    on_step: Callable[[Step, bool], object] = lambda step, failed: None
    _steps: list[Step] = field(default_factory=list)
    _step: str = ""
    _began: float = 0.0
    _started: float = 0.0

    def step(self) -> str:
        """The one under way; empty where none is."""
        return self._step

    def timeline(self) -> list[Step]:
        """The steps that have ended so far; the last one may have failed."""
        within = list(self.within())
        return within + [step for step in self._steps if not within or step.name != LAUNCH]

    def run(self) -> None:
        """Take the steps. Raises `BootError`, or what the services' own code raised."""
        machine = self.machine
        begun = time.monotonic()
        try:
            self._enter(LAUNCH)
            place = self._launched()
            machine.located(place.host, place.port, place.maxprocs)
            self._enter(CONNECT)
            machine.supervisor.connection(DEADLINES[CONNECT])
            self._enter(CHECK)
            self._check(self._ask("info"))
            self.connected()
            self._enter(EXEC)
            digest = self._ask("await_ready", DEADLINES[EXEC])
            if self.digest is not None:
                self._compare("the program's digest", self.digest, digest)
            self._enter(REGISTER)
            self._ask("register", self.services.blob, sorted(self.services.parallel))
            self._enter(SETUP)
            failure = self._ask("install", DEADLINES[SETUP])
            machine.parallel = self.services.parallel
        except Exception as error:
            raise self._failed(error, time.monotonic() - begun) from error
        self._enter("", failed=failure is not None)
        if failure is not None:
            raise decode_failure(failure, method="setup", address=machine.addr, codec=self.decode)

    def _launched(self) -> Launched:
        try:
            return self.launched.result(DEADLINES[LAUNCH])
        except TimeoutError:
            if self.launched.done():
                raise
            raise TimeoutError(f"it took more than {DEADLINES[LAUNCH]:g} s") from None

    def _enter(self, step: str, *, failed: bool = False) -> None:
        now = time.monotonic()
        if self._step:
            ended = Step(self._step, self._began, now - self._started)
            self._steps.append(ended)
            told = (list(self.within()) if ended.name == LAUNCH else []) or [ended]
            for each in told:
                self.on_step(each, failed and each is told[-1])
        self._step = step
        self._began, self._started = time.time(), now

    def _ask(self, method: str, *args: Any) -> Any:
        timeout = DEADLINES[self._step] + 5.0
        return self.machine.supervisor.call(f"Supervisor.{method}", args, {}, timeout)

    def _check(self, info: Info) -> None:
        self._compare("the Python version", python_version(), info.python)
        self._compare("the version of bigmachine", VERSION, info.version)

    def _compare(self, what: str, ours: str, theirs: str) -> None:
        if ours != theirs:
            raise ProgramMismatch(what, ours or "none", theirs or "none")

    def _failed(self, error: Exception, elapsed: float) -> BaseException:
        step = self._step
        self._enter("", failed=True)
        if self.machine.error is not None:
            return self.machine.error  # It was stopped meanwhile, by somebody who knew why.
        if isinstance(error, ProgramEnded):
            step = EXEC if step in (EXEC, REGISTER) else step
            return BootError(self.machine.addr, step, elapsed, error.reason, error.output)
        reason = str(error) or type(error).__name__
        if isinstance(error, Unreachable):
            reason = self._end() or reason
        if not isinstance(error, (BigmachineError, OSError, TimeoutError)):
            reason = f"{type(error).__name__}: {reason}"
        if step == LAUNCH and (within := self.within()):
            step = within[-1].name
        return BootError(self.machine.addr, step, elapsed, reason, self.console())

    def _end(self) -> str | None:
        """How the machine ended, where its system notices that soon."""
        deadline = time.monotonic() + NOTICE
        while (reason := self.ended()) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return reason
