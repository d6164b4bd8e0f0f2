"""The machines that a driver owns: how they are ordered, booted, kept alive, listened to, and ended."""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

from .boot import NOTICE, Boot, Services
from .credentials import Credentials, Role
from .errors import BigmachineError, MachineStopped, Unreachable, UsageError
from .events import Events, Failures, first_line
from .info import Notice, Step
from .keepalive import LEASE, Keepalive
from .logs import Logs
from .logs.ahead import Ahead
from .machine import Machine, Network
from .rpc.calls import Call
from .rpc.streams import pack_item
from .services import check_services, parallel_methods
from .state import State
from .system import Launcher, Order, Program

GRACE = 3.0
"""Seconds that services have between SIGTERM and SIGKILL when a machine is shut down."""

LATE = 8
"""A keepalive's reply is late after this part of the lease: half the time after which it is taken to have failed."""

GIVE_UP = 10.0
"""Seconds after `GRACE` in which a machine that was asked to end must have done so; then its system ends it."""

READ_ON = 0.5
"""Seconds in which a machine that is gone is still read: it may have said why. Shorter than `machine.EXPLAIN_WITHIN`."""

SAVED = "what was saved when its memory ran short is in"

AT_LEISURE = 0.3
"""Seconds after a machine's end in which its output is mostly written; what then is not is read into memory."""

TAIL = 40
"""Lines of a machine's output that error messages show."""


class Issuer(Protocol):
    """Who can make credentials: `authority.Authority`, on the driver."""

    def issue(self, role: Role, name: str, *, lifetime: timedelta | None = None) -> Credentials: ...


class Fleet:
    """What starts machines for a session: where they come from, who vouches for them, what they execute."""

    def __init__(
        self,
        launcher: Launcher,
        issuer: Issuer,
        program: Program,
        network: Network,
        *,
        lease: float = LEASE,
        name: str = "",
        logs: Logs | None = None,
    ) -> None:
        """`name` is the session's; `logs` gets what machines say, by default standard error alone."""
        self.launcher = launcher
        self.issuer = issuer
        self.program = program
        self.network = network
        self.lease = lease
        self.name = name
        self.began = time.time()
        self.events = Events()
        self._failures = Failures(self.events, network.reactor.call_later)
        network.on_failure = self._failures.failed
        self.logs = Logs() if logs is None else logs
        self.environ: dict[str, str] = {}
        """What was added to machines' environments: reports must not have its secrets."""
        self.unhealthy: Callable[[Machine, Sequence[Any]], None] = lambda machine, event: None
        """Called with what a machine's supervisor says of its memory; quick, and set by whoever can do something about it."""

    def start(
        self,
        n: int,
        services: Mapping[str, object],
        environ: Mapping[str, str],
        args: Sequence[str] | None,
        taken: Collection[str],
    ) -> list[Owned]:
        """Start `n` machines; `taken` are ids not to be used. See `Session.start`."""
        if n < 1:
            raise UsageError(f"cannot start {n} machines")
        check_services(services)
        encoded = Services(self._encode(services), parallel_methods(services))
        program = _with(self.program, environ, args)
        self.environ.update(environ)
        owned = [Owned(id, self, encoded) for id in _new_ids(n, taken)]
        for each in owned:
            self.events.emit("machine.ordered", each.machine.id, services=sorted(services))
        threading.Thread(target=_launch, args=(self, program, owned), name="bigmachine-launch", daemon=True).start()
        return owned

    def guest(self, lifetime: float) -> Credentials:
        """See `Session.credentials`."""
        return self.issuer.issue(Role.DRIVER, f"guest-{secrets.token_hex(3)}", lifetime=timedelta(seconds=lifetime))

    def _encode(self, services: Mapping[str, object]) -> bytes:
        codec = self.network.codec
        for name, service in services.items():
            codec.encode(service, f"service {name!r}")  # So that an error names it.
        encoded = codec.encode(dict(services), "the services")
        return b"".join(pack_item(encoded.pickle, encoded.buffers))

    def timeline(self, id: str) -> Sequence[Step]:
        """The steps of machine `id`'s launch, where the system knows any."""
        steps: Callable[[str], Sequence[Step]] | None = getattr(self.launcher, "timeline", None)
        return steps(id) if steps is not None else ()

    def detail(self, id: str) -> Mapping[str, str]:
        """What machine `id` is to its system, such as the instance and its type, where the system knows."""
        detail: Callable[[str], Mapping[str, str]] | None = getattr(self.launcher, "detail", None)
        return detail(id) if detail is not None else {}

    def hourly(self, id: str) -> float | None:
        """USD an hour that machine `id` costs; None where nobody says."""
        hourly: Callable[[str], float | None] | None = getattr(self.launcher, "hourly", None)
        return hourly(id) if hourly is not None else None

    def summary(self) -> str:
        """What the session has cost, where the system knows."""
        summary: Callable[[], str] | None = getattr(self.launcher, "summary", None)
        return summary() if summary is not None else ""

    def ended(self, failure: BaseException | None) -> None:
        """The session has ended; `failure` is why the program did."""
        self.events.emit("session.ended", error=None if failure is None else first_line(failure))

    def close(self) -> None:
        """All machines are ended: release what the launcher holds."""
        self._failures.close()
        self.launcher.close()


def _new_ids(n: int, taken: Collection[str]) -> list[str]:
    ids: set[str] = set()
    while len(ids) < n:
        id = f"m-{secrets.token_hex(3)}"
        if id not in taken:
            ids.add(id)
    return list(ids)


def _with(program: Program, environ: Mapping[str, str], args: Sequence[str] | None) -> Program:
    merged = {**program.environ, **environ}
    for name, value in merged.items():
        if not name or "=" in name or "\0" in name + value:
            raise UsageError(f"not an environment variable: {name!r}")
    if args is None:
        return dataclasses.replace(program, environ=merged)
    kept = program.argv[: len(program.argv) - program.own_args]
    return dataclasses.replace(program, argv=(*kept, *args), environ=merged, own_args=len(args))


def _launch(fleet: Fleet, program: Program, owned: Sequence[Owned]) -> None:
    """Order the machines, and boot each on a thread of its own."""
    wanted = [each for each in owned if each.starting()]
    try:
        orders = [
            Order(each.machine.id, fleet.issuer.issue(Role.MACHINE, each.machine.id), program, fleet.lease)
            for each in wanted
        ]
        futures = fleet.launcher.launch(orders) if orders else []
    except Exception as error:  # A launcher is somebody else's code: whatever it raises, the machines are not to hang.
        for each in wanted:
            each.ordered.set()
            each.lost(error)
        return
    for each, future in zip(wanted, futures, strict=True):
        try:
            each.boot(future)
        except Exception as error:  # No thread for it, most likely; the others are not to hang.
            each.ordered.set()
            each.lost(error)


class Owned:
    """One machine that this session owns: its boot, its keepalive, its output, its end."""

    def __init__(self, id: str, fleet: Fleet, services: Services) -> None:
        network = fleet.network
        self.machine = Machine(id, network, owned=True)
        self.machine.on_end(self.end)
        self.machine.on_death(self._died)
        self.machine.on_state(self._on_state)
        self._fleet = fleet
        self._network = network
        self._services = services
        self._feed = fleet.logs.feed(id, lambda: self.machine.addr)
        self._keepalive = Keepalive(network.reactor, self._renew, self._lost_lease, lease=fleet.lease)
        self._reader: threading.Thread | None = None
        self._events: Ahead[tuple[Any, ...]] | None = None
        self._lock = threading.Lock()
        self._ending = False
        self._dead = False  # The last keepalive said that its services are.
        self._begun = threading.Event()
        self._finishing = False
        self._graceful = True
        self._asked: Call[Any] | None = None
        self._gone = threading.Event()
        self.ordered = threading.Event()
        """The launcher knows of the machine, or never will: from now on its `stop` is effective."""

    # -- Birth -------------------------------------------------------------------------------------------------------

    def starting(self) -> bool:
        """The machine is about to be ordered. False where it has been ended before that."""
        with self._lock:
            if not self._ending:
                self.machine.starting()
                return True
        self.ordered.set()
        return False

    def boot(self, launched: Any) -> None:
        """Boot on a thread."""
        self.ordered.set()
        boot = Boot(
            self.machine,
            launched,
            self._services,
            self._connected,
            self._last_output,
            lambda: self._fleet.launcher.ended(self.machine.id),
            lambda: self._fleet.timeline(self.machine.id),
            self._network.codec,
            self._fleet.program.digest,
            self._on_step,
        )
        self.machine.on_timeline(boot.timeline, boot.step)
        self._fleet.launcher.on_end(self.machine.id, self._vanished)
        threading.Thread(target=self._boot, args=(boot,), name=f"bigmachine-boot-{self.machine.id}", daemon=True).start()

    def _boot(self, boot: Boot) -> None:
        try:
            boot.run()
        except BaseException as error:  # The machine ends with it, and whoever waits for the machine gets it.
            self.lost(error)
            return
        try:
            self.machine.running()
        except BigmachineError:
            pass  # It was stopped at the last moment.

    def _emit(self, kind: str, **fields: Any) -> None:
        self._fleet.events.emit(kind, self.machine.id, **fields)

    def _on_state(self, machine: Machine) -> None:
        error = None if machine.error is None else first_line(machine.error)
        self._emit("machine.state", state=str(machine.state), address=machine.addr, error=error)

    def _on_step(self, step: Step, failed: bool) -> None:
        self._emit("boot.step", step=step.name, began=step.began, seconds=round(step.seconds, 6), failed=failed)

    def _connected(self) -> None:
        with self._lock:
            if self._ending:
                raise MachineStopped(self.machine.addr, "it was ended while it started")
            self._keepalive.start()
            self._reader = threading.Thread(target=self._read, name=f"bigmachine-output-{self.machine.id}", daemon=True)
            self._reader.start()

    # -- Life --------------------------------------------------------------------------------------------------------

    def _renew(self, lease: float, on_reply: Any) -> None:
        started = time.monotonic()
        call: Call[Any] = Call()
        late = self._network.reactor.call_later(lease / LATE, lambda: self._emit("keepalive.late", seconds=None))

        def done(_: object) -> None:
            late.cancel()
            error, seconds = call.exception(), time.monotonic() - started
            on_reply(seconds if error is None else error)  # First: whoever is told of events may be slow.
            self.machine.keepalive_reply_times = tuple(self._keepalive.reply_times)
            self.machine.next_keepalive = self._keepalive.next_keepalive
            if error is not None:
                self._unkept(error)
                return
            self.machine.keepalive_error = ""
            if seconds > lease / LATE:
                self._emit("keepalive.late", seconds=round(seconds, 6))
            dead = call.result() == 0.0
            if dead and self._dead:
                self._ask_how()
            self._dead = dead

        call.add_done_callback(done)
        codec = self._network.codec
        encoded = codec.encode_call("Supervisor.keepalive", (lease,), {})
        try:
            self.machine.supervisor.submit(call, "Supervisor.keepalive", encoded, lease / 4)
        except Exception as error:  # Whatever it is, it counts as a failure (`keepalive.Keepalive`).
            late.cancel()
            self._unkept(error)
            raise

    def _ask_how(self) -> None:
        """The services died a keepalive ago, and what the machine says of it is still behind its output, which nobody reads."""
        call: Call[Any] = Call()

        def done(_: object) -> None:
            if call.exception() is None and call.result() is not None:
                self._died(call.result())

        call.add_done_callback(done)
        encoded = self._network.codec.encode_call("Supervisor.obituary", (), {})
        try:
            self.machine.supervisor.submit(call, "Supervisor.obituary", encoded, GIVE_UP)
        except BigmachineError:
            pass  # The next keepalive fails of it, too, or says it again.

    def _unkept(self, error: BaseException) -> None:
        """A keepalive has failed. The system may know what it would take a lease to find out."""
        self.machine.keepalive_error = first_line(error)
        if not self._ending:
            self._emit("keepalive.failed", error=first_line(error))
        reason = self._fleet.launcher.ended(self.machine.id)
        if reason is not None:
            self._vanished(reason)

    def _lost_lease(self, reason: str) -> None:
        why = self._fleet.launcher.ended(self.machine.id) or reason
        self.lost(MachineStopped(self.machine.addr, why, sent=True))

    def _vanished(self, reason: str) -> None:
        """The system has noticed that the machine is gone. The supervisor may have said why, and it may still be read."""
        if self._ending:
            return  # That is why.

        def end() -> None:
            if self._reader is not None:
                self._reader.join(READ_ON)
            if self.machine.state < State.RUNNING:
                self._begun.wait(2 * NOTICE)  # For the boot, which fails of it, and knows at which step.
            self.lost(MachineStopped(self.machine.addr, reason, sent=True))

        threading.Thread(target=end, name=f"bigmachine-lost-{self.machine.id}", daemon=True).start()

    def _read(self) -> None:
        """Write what the machine says, until it has said everything."""
        machine = self.machine
        while True:
            try:
                with machine.supervisor.stream("Supervisor.events", (), {}, None) as events:
                    self._events = Ahead(events)
                    for event in self._events:
                        self._on_event(event)
                break
            except Unreachable:
                self._fleet.launcher.ended(self.machine.id)  # Where the launcher has to look, it is time to.
                if self._ending or machine.state is State.STOPPED or not self._retry_reading():
                    break
        self._feed.close()

    def _retry_reading(self) -> bool:
        try:
            self.machine.supervisor.connection(5.0)
        except Unreachable:
            return False
        return True

    def _on_event(self, event: tuple[Any, ...]) -> None:
        match event:
            case ("output", int(process), str(stream), bytes(data)):
                self._feed.data("supervisor" if process < 0 else str(process), stream, data)
            case ("log", str(text)):
                self._feed.line(text)
            case ("unhealthy" | "healthy", *_):
                self._fleet.unhealthy(self.machine, event)
            case ("notice", str(kind), float() | None as deadline, str(text)):
                self.machine.noticed(Notice(kind, deadline, text))
                self._emit("machine.notice", notice=kind, deadline=deadline, text=text)
                self._feed.line(text)
            case ("death", _, _) if self.machine.state < State.RUNNING:
                pass  # The boot is told as well, and knows at which step it was.
            case ("death", str(summary), str(last_output)):
                if self.machine.saved:
                    summary += f"; {SAVED} {self.machine.saved}"
                text = f"{summary}; its last output:\n{last_output.rstrip()}" if last_output.strip() else summary
                self._died(text)

    def _last_output(self) -> str:
        return "\n".join(self._feed.tail(TAIL)) or self._fleet.launcher.console(self.machine.id)

    # -- Death -------------------------------------------------------------------------------------------------------

    def _died(self, text: str) -> None:
        """The machine's services have: its supervisor says so among the rest of what it says, or was asked by a call."""
        error = MachineStopped(self.machine.addr, text, sent=True)
        name = f"bigmachine-lost-{self.machine.id}"
        try:
            threading.Thread(target=self.lost, args=(error,), name=name, daemon=True).start()
        except RuntimeError:
            self.begin_end(error)  # The program ends, and the session with it, which does the rest.

    def lost(self, error: BaseException) -> None:
        """The machine is gone, or of no use: calls fail at once; then whatever is left of it is ended."""
        if self.begin_end(error):
            self._finish()

    def end(self, graceful: bool) -> None:
        """Shut the machine down; returns when it is gone and its output is written. Later calls wait for the first."""
        self.begin_end(None if graceful else MachineStopped(self.machine.addr, "it was cancelled", sent=True), graceful)
        self._finish()

    def begin_end(self, error: BaseException | None, graceful: bool = True) -> bool:
        """Fail all calls with `error`, and ask the machine to end; does not wait. False where that has been done."""
        with self._lock:
            if self._ending:
                return False
            self._ending = True
            self._graceful = graceful
        try:
            self._keepalive.stop()
            self.machine.stopped(error)
            if graceful:
                self._ask_to_end()
        finally:
            self._begun.set()
        return True

    def _ask_to_end(self) -> None:
        if self._fleet.launcher.ended(self.machine.id) is not None:
            return  # Nobody would answer; where its power was cut, nobody would say so either.
        call: Call[Any] = Call()
        try:
            supervisor = self.machine.supervisor
            if supervisor.connected:
                encoded = self._network.codec.encode_call("Supervisor.shutdown", (GRACE,), {})
                supervisor.submit(call, "Supervisor.shutdown", encoded, GRACE + GIVE_UP)
                self._asked = call
        except (BigmachineError, OSError):
            pass  # Its system ends it.

    def _finish(self) -> None:
        """Returns when the machine is gone: by itself, or ended by its system. The first caller sees to it."""
        with self._lock:
            first, self._finishing = not self._finishing, True
        if not first:
            self._gone.wait()
            return
        try:
            self._begun.wait()
            self._await_end()
            self.machine.disconnect()
            self.ordered.wait(GIVE_UP)
            self._fleet.launcher.stop(self.machine.id, GIVE_UP if self._graceful else 0.0)
            self.await_output(GIVE_UP)
        finally:
            self._gone.set()

    def await_output(self, timeout: float | None = None) -> None:
        """Until all that the machine has said is written; it is gone, but who reads our standard error may be slow."""
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join(timeout)

    def _await_end(self) -> None:
        """Until the machine has done as it was asked, and its output is here."""
        try:
            if self._asked is None or self._asked.exception(GRACE + GIVE_UP + 1.0) is not None:
                return
        except TimeoutError:
            return
        reader = self._reader
        if reader is None or reader is threading.current_thread():
            return
        reader.join(AT_LEISURE)
        if reader.is_alive() and self._events is not None:
            rest = threading.Thread(target=self._events.rest, name=f"bigmachine-rest-{self.machine.id}", daemon=True)
            try:
                rest.start()
            except RuntimeError:
                self._events.rest()  # From Python 3.12 on, `atexit` is too late for threads.
            else:
                rest.join(GIVE_UP)
