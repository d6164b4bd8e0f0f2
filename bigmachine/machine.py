"""A machine, as the driver and other machines hold it: its state, and calls to its services."""

from __future__ import annotations

import functools
import os
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from sys import modules
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from .address import format_address, parse_address
from .credentials import server_name
from .errors import BigmachineError, MachineStopped, NotReady, RemoteTraceback, Unreachable, UsageError, WaitTimeout
from .retry import Backoff
from .rpc.calls import Call, TracedCall
from .rpc.client import Client
from .rpc.codec import Codec, Encoded
from .rpc.items import ItemStream
from .rpc.reactor import Reactor
from .rpc.stats import MethodStats
from .rpc.tracing import OPENTELEMETRY, TRACE, calling, with_trace
from .services import public_methods
from .state import History, State

if TYPE_CHECKING:
    from .info import (  # Values that are unpickled: nothing to import before.
        DiskInfo,
        Info,
        LoadInfo,
        MemInfo,
        Notice,
        Step,
    )

S = TypeVar("S")

EXPLAIN_WITHIN = 0.8
"""Seconds for which a call that lost its connection waits to learn how the machine ended: its supervisor tells within
milliseconds, and a user who waits longer for an error is worse off than with a vague one."""

VITALS_TIMEOUT = 30.0
"""Seconds for a question to a supervisor, which never runs user code."""

SHORT_TASK = 0.005
"""Seconds below which parallel calls are short: then several wait at each process, as the way there and back (0.2 ms)
counts; longer ones wait here, so that whichever process is free first gets the next."""

SHORT_WINDOW = 16

MAX_DIRECT = 1000
"""Methods that a machine remembers its way to; names that are made up as the program goes are looked up each time."""


class Network:
    """What all connections of a session have in common."""

    def __init__(self, context: Callable[[], ssl.SSLContext], codec: Codec, reactor: Reactor) -> None:
        """`context` makes the TLS context when the first machine is called: most services call none, and it takes 1 ms."""
        self._make_context = context
        self.codec = codec
        self.reactor = reactor
        self.on_failure: Callable[[str, str, str, float, BaseException], None] | None = None
        """Told of every call that fails, where somebody wants to know: machine's id, method, process, seconds, error."""

    @functools.cached_property
    def context(self) -> ssl.SSLContext:
        return self._make_context()

    def client(
        self, host: str, port: int, id: str, process: int | None, explain: Callable[[Unreachable], BaseException]
    ) -> Client:
        """A client of the supervisor (None) or of a service process. Nothing is sent yet."""
        address = format_address(host, port, id)
        name = server_name(id, process)
        return Client(host, port, name, self.context, self.codec, self.reactor, address=address, explain=explain)


class Lanes:
    """Which of a machine's processes gets the next parallel call: the least busy; where all are busy, calls queue here."""

    def __init__(self, count: int) -> None:
        self._lock = threading.Lock()
        self._load = [0] * count
        self._queue: deque[Callable[[int], None]] = deque()
        self._mean = SHORT_TASK  # Seconds a call takes, smoothed.

    def enter(self, run: Callable[[int], None]) -> None:
        """Call `run(lane)` now, or when a lane has room. Each run ends with `leave(lane, seconds)`."""
        with self._lock:
            lane = self._free()
            if lane is None:
                self._queue.append(run)
                return
            self._load[lane] += 1
        run(lane)

    def leave(self, lane: int, seconds: float) -> None:
        """A call on `lane` has ended after `seconds`; whoever waits goes on."""
        started: list[tuple[Callable[[int], None], int]] = []
        with self._lock:
            self._mean += (seconds / self._load[lane] - self._mean) / 8
            self._load[lane] -= 1
            while self._queue and (free := self._free()) is not None:
                self._load[free] += 1
                started.append((self._queue.popleft(), free))
        for run, free in started:
            run(free)

    def _free(self) -> int | None:
        least = min(range(len(self._load)), key=self._load.__getitem__)
        window = 1 if self._mean >= SHORT_TASK else SHORT_WINDOW
        return least if self._load[least] < window else None


class Machine:
    """One machine. Made by `Session.start` (owned: this process keeps it alive) or `Session.dial` (another's).

    ``addr`` is its address, ``https://host:port/<id>/`` (the bare id until it is launched); ``maxprocs`` the number of
    service processes that its parallel methods may use; ``error`` why it stopped, None where it was asked to; ``notice`` that
    it will be taken away, None unless whoever lends it has said so; ``unhealthy`` in what way it is not well, empty where it
    is, and ``saved`` the directory with what was saved of it then; ``began`` when it was asked for, and ``entered`` when it
    has entered each state, in seconds as of `time.time`.
    """

    def __init__(self, id: str, network: Network, *, owned: bool) -> None:
        self.id = id
        self.owned = owned
        self.addr = id
        self.hostname = ""
        self.maxprocs = 1
        self.error: BaseException | None = None
        self.notice: Notice | None = None
        self.unhealthy = ""
        self.saved = ""
        self.began = time.time()
        self.entered: dict[State, float] = {State.UNSTARTED: self.began}
        self.keepalive_reply_times: Sequence[float] = ()
        self.next_keepalive: float | None = None
        self.keepalive_error = ""  # Why the last keepalive has failed; empty where it has not.
        self.parallel: frozenset[str] = frozenset()
        self._network = network
        self._changed = threading.Condition()
        self._history = History(id)
        self._direct: dict[str, Client] = {}  # Whom to ask, by method, while the machine runs: past all questions.
        self._when_running: list[Callable[[], None]] = []
        self._on_state: list[Callable[[Machine], None]] = []
        self._on_notice: list[Callable[[Machine], None]] = []
        self._timeline: Callable[[], Sequence[Step]] = tuple
        self._step: Callable[[], str] = str
        self._supervisor: Client | None = None
        self._processes: list[Client] = []
        self._lanes = Lanes(1)
        self._met = owned  # Whether we know what is parallel there. The owner has said so itself.
        self._meeting = threading.Lock()
        self._ender: Callable[[bool], None] = lambda graceful: None
        self._mourner: Callable[[str], None] | None = None

    def __repr__(self) -> str:
        taken = f", {self.notice.text}" if self.notice is not None and self.state is State.RUNNING else ""
        return f"<Machine {self.addr} {self.state}{taken}>"

    def __reduce__(self) -> Any:
        raise TypeError("a Machine cannot be sent: pass its `addr`, and `b.dial(addr)` there")

    # -- State -------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """UNSTARTED, STARTING, RUNNING, STOPPED: only ever forward."""
        return self._history.state

    def wait(self, state: State = State.RUNNING, timeout: float | None = None) -> None:
        """Until the machine has reached `state`. Raises the machine's own error where it stopped instead, and
        `WaitTimeout` (a TimeoutError) after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.state >= state, timeout):
                raise WaitTimeout(self.addr, str(self.state), str(state), timeout or 0.0)
        if self.state is State.STOPPED and state is not State.STOPPED:
            raise self.error or self._stopped("it was shut down")

    def on_state(self, callback: Callable[[Machine], None]) -> None:
        """Call `callback(machine)` at every change of state, on the thread that changes it."""
        self._on_state.append(callback)

    def on_notice(self, callback: Callable[[Machine], None]) -> None:
        """Call `callback(machine)`, on a thread of its own, when whoever lends the machine says that it will be taken away,
        which is its ``notice`` then; at once, where it has been said."""
        with self._changed:
            self._on_notice.append(callback)
            if self.notice is None:
                return
        self._tell([callback])

    def noticed(self, notice: Notice) -> None:
        """The machine will be taken away. What is sure is not forgotten for what is probable."""
        with self._changed:
            if self.notice is not None and notice.kind != "interruption":
                return
            self.notice = notice
            callbacks = list(self._on_notice)
        self._tell(callbacks)

    def _tell(self, callbacks: Sequence[Callable[[Machine], None]]) -> None:
        for callback in callbacks:
            threading.Thread(target=callback, args=(self,), name=f"bigmachine-notice-{self.id}", daemon=True).start()

    @property
    def timeline(self) -> Sequence[Step]:
        """The steps of the machine's boot that have ended; empty for another's machine. The last one may have failed."""
        return tuple(self._timeline())

    @property
    def step(self) -> str:
        """The step of the boot that is under way; empty where none is."""
        return self._step() if self.state is State.STARTING else ""

    def on_timeline(self, timeline: Callable[[], Sequence[Step]], step: Callable[[], str]) -> None:
        """Say who knows them."""
        self._timeline = timeline
        self._step = step

    @property
    def processes(self) -> Sequence[tuple[str, Client]]:
        """``("supervisor", its client)``, ``("0", …)`` and so on: the processes of a running machine. There are no further
        service processes where nothing of it is parallel."""
        if self.state is not State.RUNNING:
            return ()
        services = self._processes if self.parallel else self._processes[:1]
        return [("supervisor", self.supervisor), *((str(n), client) for n, client in enumerate(services))]

    def starting(self) -> None:
        """The boot has begun."""
        self._move(State.STARTING)

    def located(self, host: str, port: int, maxprocs: int) -> None:
        """The machine listens at `host`, `port`."""
        with self._changed:
            self.addr = format_address(host, port, self.id)
            self.hostname = host
            self.maxprocs = maxprocs
            self._supervisor = self._network.client(host, port, self.id, None, self._explain)
            self._processes = [self._network.client(host, port, self.id, n, self._explain) for n in range(maxprocs)]
            self._lanes = Lanes(maxprocs)

    def running(self) -> None:
        """The services are set up. Calls that waited go ahead."""
        self._move(State.RUNNING)
        with self._changed:
            waiting, self._when_running = self._when_running, []
        for go in waiting:
            go()

    def stopped(self, error: BaseException | None) -> bool:
        """The machine is gone, or is being given up: every call fails from now on. False where it was stopped already."""
        with self._changed:
            if self.state is State.STOPPED:
                return False
            self.error = error
            self._history.move(State.STOPPED)
            self.entered[State.STOPPED] = time.time()
            self._direct = {}
            waiting, self._when_running = self._when_running, []
            self._changed.notify_all()
        for client in self._processes:
            client.close(self._reason())
        for go in waiting:
            go()
        for callback in self._on_state:
            callback(self)
        return True

    def disconnect(self) -> None:
        """The supervisor has nothing more to say."""
        if self._supervisor is not None:
            self._supervisor.close(self._reason())

    def _move(self, state: State) -> None:
        with self._changed:
            self._history.move(state)
            self.entered[state] = time.time()
            self._changed.notify_all()
        for callback in self._on_state:
            callback(self)

    def _clients(self) -> list[Client]:
        return ([self._supervisor] if self._supervisor else []) + self._processes

    def _reason(self) -> str:
        if isinstance(self.error, MachineStopped):
            return self.error.reason
        return str(self.error) if self.error is not None else "it was shut down"

    def _stopped(self, reason: str | None = None, *, sent: bool = False) -> MachineStopped:
        error = MachineStopped(self.addr, reason or self._reason(), sent)
        error.__cause__ = self.error
        return error

    def _explain(self, error: Unreachable) -> BaseException:
        """A connection was lost: say how the machine ended, where it did."""
        if isinstance(error, MachineStopped):
            return error
        if self.owned and self.state < State.RUNNING:
            return error  # Of a step of its boot, which finds out for itself.
        if self.owned:
            with self._changed:
                self._changed.wait_for(lambda: self.state is State.STOPPED, EXPLAIN_WITHIN)
            if self.state is State.STOPPED:
                return self._stopped(sent=error.sent)
            # Who listens to the supervisor may be held up by what else it says, which nobody reads.
        try:
            assert self._supervisor is not None
            obituary = self._supervisor.call("Supervisor.obituary", (), {}, EXPLAIN_WITHIN)
        except BigmachineError:
            return error  # The supervisor is gone too: there is no more to say.
        if obituary and self._mourner is not None:
            self._mourner(obituary)
        return MachineStopped(self.addr, obituary, error.sent) if obituary else error

    # -- Calls -------------------------------------------------------------------------------------------------------

    def call(self, method: str, /, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        """Call ``"Service.method"`` and return what it returns.

        Waits until the machine is running, first; `timeout` (seconds) covers that too. Raises what the method raised, with
        the remote traceback as its cause; `CallRefused` where it cannot be called so; `NotPicklable`; `CallTimeout`;
        `MachineStopped` or `Unreachable`.
        """
        span = calling(method, self._place) if OPENTELEMETRY in modules else None
        if span is None:
            return self._call(method, args, kwargs, timeout)
        try:
            result = self._call(method, args, with_trace(kwargs, span), timeout)
        except BaseException as error:  # Ctrl-C ends it, too.
            span.end(error)
            raise
        span.end()
        return result

    def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float | None) -> Any:
        began = time.perf_counter()
        try:
            client, left = self._direct.get(method), timeout
            if client is None:
                deadline = None if timeout is None else time.monotonic() + timeout
                client = self._client_for(method, deadline)
                left = None if deadline is None else max(0.001, deadline - time.monotonic())
                if client is not None:
                    self._remember(method, client)
            if client is not None:
                try:
                    return client.call(method, args, kwargs, left)
                except Unreachable as error:
                    raise self._if_stopped(error) from error.__cause__
        except Exception as error:  # Whatever it is: it is only told of, here.
            self._failed(method, "0", time.perf_counter() - began, error)
            raise
        return self.submit(method, *args, timeout=timeout, **kwargs).result()

    def submit(self, method: str, /, *args: Any, timeout: float | None = None, **kwargs: Any) -> Call[Any]:
        """Start a call; the `Call` (a future that can be awaited too) ends with what `call` would return or raise.

        Returns when the arguments are on their way (at once, where the machine is not running yet).
        """
        span = None
        if OPENTELEMETRY in modules and TRACE not in kwargs:  # Else `call` has made one.
            span = calling(method, self._place)
            kwargs = kwargs if span is None else with_trace(kwargs, span)
        try:
            encoded = self._network.codec.encode_call(method, args, kwargs)
        except Exception as error:  # As in `_call`.
            self._failed(method, "0", 0.0, error)
            if span is not None:
                span.end(error)
            raise
        call: Call[Any] = Call(method, self._failed) if span is None else TracedCall(method, self._failed, span)
        client = self._direct.get(method)
        if client is not None:
            self._send(client, call, method, encoded, timeout)
        else:
            self._submit(call, method, encoded, timeout)
        return call

    def _failed(self, method: str, process: str, seconds: float, error: BaseException) -> None:
        """A call has failed, `seconds` after it was made."""
        on_failure = self._network.on_failure
        if on_failure is not None:
            on_failure(self.id, method, "supervisor" if method.startswith("Supervisor.") else process, seconds, error)

    def _place(self) -> Mapping[str, str | int]:
        """For spans. Only the machine's id, while nobody knows where it will be."""
        try:
            host, port, _ = parse_address(self.addr)
        except ValueError:
            return {"bigmachine.machine": self.id}
        return {"bigmachine.machine": self.id, "server.address": host, "server.port": port}

    def _send(self, client: Client, call: Call[Any], method: str, encoded: Encoded, timeout: float | None) -> None:
        try:
            client.submit(call, method, encoded, timeout)
        except Exception as error:  # Of the transport, or of a `Stream`'s source: either way it is how the call ends.
            failure = self._if_stopped(error) if isinstance(error, Unreachable) else error
            call.complete(lambda: _raise(failure))

    def _submit(self, call: Call[Any], method: str, encoded: Encoded, timeout: float | None) -> None:
        """Send, when the machine is running, to whichever process it is for."""
        deadline = None if timeout is None else time.monotonic() + timeout

        def left() -> float | None:
            return None if deadline is None else max(0.001, deadline - time.monotonic())

        def go() -> None:
            if call.done():
                return  # Cancelled, or timed out, before the machine was running.
            if self.state is State.STOPPED:
                stopped = self._stopped()
                call.complete(lambda: _raise(stopped))
            elif method in self.parallel and self.maxprocs > 1:
                self._lanes.enter(on_lane)
            else:
                client = self._client_of(method)
                self._remember(method, client)
                self._send(client, call, method, encoded, left())

        def on_lane(lane: int) -> None:
            started = time.perf_counter()
            call.add_done_callback(lambda _: self._lanes.leave(lane, time.perf_counter() - started))
            call.process = str(lane)
            if not call.done():
                self._send(self._processes[lane], call, method, encoded, left())

        def expire() -> None:
            if self.state < State.RUNNING:
                waited = WaitTimeout(self.addr, str(self.state), str(State.RUNNING), timeout or 0.0)
                call.complete(lambda: _raise(waited))

        reactor = self._network.reactor
        with self._changed:
            early = self.state < State.RUNNING and not method.startswith("Supervisor.")
            if early:
                self._when_running.append(lambda: reactor.execute(go))
        if early and timeout is not None:
            reactor.call_later(timeout, expire)
        elif not early:
            try:
                self._meet(method, deadline)
            except BigmachineError as error:
                unmet = error
                call.complete(lambda: _raise(unmet))
            go()

    def _remember(self, method: str, client: Client) -> None:
        with self._changed:
            if self.state is State.RUNNING and len(self._direct) < MAX_DIRECT:
                self._direct[method] = client

    def stream(self, method: str, /, *args: Any, timeout: float | None = None, **kwargs: Any) -> ItemStream:
        """Call a generator method and iterate over what it yields, as it comes; a slow reader slows the method down.

        Closing the iterator closes the generator on the machine. `timeout` bounds the whole, in seconds.
        """
        began = time.perf_counter()
        span = calling(method, self._place) if OPENTELEMETRY in modules else None

        def ended(error: BaseException | None) -> None:
            if error is not None:
                self._failed(method, "0", time.perf_counter() - began, error)
            if span is not None:
                span.end(error)

        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            client = self._client_for(method, deadline) or self._processes[0]
            try:
                items = client.stream(method, args, kwargs if span is None else with_trace(kwargs, span), timeout)
            except Unreachable as error:
                raise self._if_stopped(error) from error.__cause__
        except BaseException as error:  # Ctrl-C ends it, too.
            ended(error)
            raise
        items.on_end = ended
        return items

    def retry_call(self, method: str, /, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        """As `call`, trying again, with growing pauses, while that is certainly safe: only where the request did not
        run (it was never sent, or the machine refused it for now). Up to `timeout` seconds, by default five minutes."""
        deadline = time.monotonic() + (300.0 if timeout is None else timeout)
        for pause in Backoff(first=0.1, ceiling=10.0, limit=None, attempts=1_000_000).delays(_chance):
            left = deadline - time.monotonic()
            try:
                return self.call(method, *args, timeout=max(0.001, left), **kwargs)
            except MachineStopped:
                raise
            except (Unreachable, NotReady) as error:
                raised_there = isinstance(error.__cause__, RemoteTraceback)  # By the method: it has run.
                if raised_there or getattr(error, "sent", False) or left < pause:
                    raise
            time.sleep(pause)
        raise AssertionError("the pauses never end")

    def service(self, name: str, cls: type[S]) -> S:
        """A stand-in for service `name` of class `cls`: ``m.service("PI", CirclePI).sample(10)`` is a call, and
        ``.sample.submit(10)``, ``.sample.stream(10)`` are the others. Typed as `cls`, for editors and type checkers."""
        return cast(S, _Service(self, name, cls))

    def _client_for(self, method: str, deadline: float | None) -> Client | None:
        """Whom to ask, once the machine is running; None where the call has to go through the lanes."""
        if self.state is not State.RUNNING and not method.startswith("Supervisor."):
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            with self._changed:
                if not self._changed.wait_for(lambda: self.state >= State.RUNNING, timeout):
                    raise WaitTimeout(self.addr, str(self.state), str(State.RUNNING), timeout or 0.0)
            if self.state is State.STOPPED:
                raise self._stopped()
        self._meet(method, deadline)
        if method in self.parallel and self.maxprocs > 1:
            return None
        return self._client_of(method)

    def _meet(self, method: str, deadline: float | None) -> None:
        """Before the first call to a machine that was dialled: ask it which of its methods are parallel."""
        if self._met or method.startswith("Supervisor."):
            return
        left = VITALS_TIMEOUT if deadline is None else max(0.001, deadline - time.monotonic())
        with self._meeting:
            if self._processes[1:] or self.parallel:
                return  # Somebody else has asked in the meantime.
            try:
                described = self._processes[0].call("Process.describe", (), {}, min(left, VITALS_TIMEOUT))
            except Unreachable as error:
                raise self._if_stopped(error) from error.__cause__
            if described is not None:  # Else its services are not set up yet, as the call will be told, too.
                maxprocs, parallel = described
                host, port, id = parse_address(self.addr)
                self._processes += [self._network.client(host, port, id, n, self._explain) for n in range(1, maxprocs)]
                self._lanes = Lanes(maxprocs)
                self.maxprocs, self.parallel = maxprocs, parallel
                self._met = True

    def _client_of(self, method: str) -> Client:
        if method.startswith("Supervisor."):
            return self.supervisor
        return self._processes[0]

    @property
    def supervisor(self) -> Client:
        """The client of the machine's supervisor. Raises `UsageError` before the machine is launched."""
        if self._supervisor is None:
            raise UsageError(f"machine {self.id} has not been launched yet")
        return self._supervisor

    def _if_stopped(self, error: Unreachable) -> BaseException:
        """Calls of a machine that has stopped end in the same error, however early or late they noticed."""
        if isinstance(error, MachineStopped) or isinstance(error.__cause__, RemoteTraceback):
            return error  # The latter: the method raised it, about somebody else.
        if self.state is State.RUNNING and self.owned:
            return self._explain(error)
        return self._stopped(sent=error.sent) if self.state is State.STOPPED else error

    # -- What it says of itself --------------------------------------------------------------------------------------

    def info(self) -> Info:
        """Its identity, Python, platform."""
        return cast("Info", self.supervisor.call("Supervisor.info", (), {}, VITALS_TIMEOUT))

    def mem_info(self) -> MemInfo:
        """Memory of its host, and of its own processes, in bytes."""
        return cast("MemInfo", self.supervisor.call("Supervisor.mem_info", (), {}, VITALS_TIMEOUT))

    def disk_info(self) -> DiskInfo:
        """The file system of its temporary files, in bytes."""
        return cast("DiskInfo", self.supervisor.call("Supervisor.disk_info", (), {}, VITALS_TIMEOUT))

    def load_info(self) -> LoadInfo:
        """Load averages of its host."""
        return cast("LoadInfo", self.supervisor.call("Supervisor.load_info", (), {}, VITALS_TIMEOUT))

    def call_stats(self) -> dict[str, MethodStats]:
        """Figures per method of the calls that this process made to the machine."""
        merged: dict[str, MethodStats] = {}
        for client in self._clients():
            merge_stats(merged, client.stats.snapshot())
        return merged

    def served_stats(self) -> dict[str, MethodStats]:
        """Figures per method of the calls that the machine served, from wherever they came."""
        merged: dict[str, MethodStats] = {}
        merge_stats(merged, self.supervisor.call("Supervisor.stats", (), {}, VITALS_TIMEOUT))
        for client in self._processes if self.parallel else self._processes[:1]:
            merge_stats(merged, client.call("Process.stats", (), {}, VITALS_TIMEOUT))
        return merged

    # -- The end -----------------------------------------------------------------------------------------------------

    def on_end(self, ender: Callable[[bool], None]) -> None:
        """Set what ends an owned machine: `ender(graceful)`, which returns when it is gone."""
        self._ender = ender

    def on_death(self, mourner: Callable[[str], None]) -> None:
        """Set who is told how an owned machine's services died, where a call that failed of it asked: `mourner(text)`."""
        self._mourner = mourner

    def shutdown(self) -> None:
        """End the machine: its services' processes are stopped, its output is waited for. Returns when it is gone."""
        self._end(True)

    def cancel(self) -> None:
        """End the machine at once, without waiting for its output; calls under way fail."""
        self._end(False)

    def _end(self, graceful: bool) -> None:
        if not self.owned:
            raise UsageError(f"machine {self.addr} was dialled, not started, here: only its owner can end it")
        self._ender(graceful)

    @classmethod
    def dialled(cls, address: str, network: Network) -> Machine:
        """A machine that another process owns. Nothing is sent yet. Raises `UsageError` on a malformed address."""
        try:
            host, port, id = parse_address(address)
        except ValueError as error:
            raise UsageError(str(error)) from None
        machine = cls(id, network, owned=False)
        machine.starting()
        machine.located(host, port, 1)
        machine.running()  # As far as we know: a call will show.
        return machine


def merge_stats(into: dict[str, MethodStats], more: dict[str, MethodStats]) -> None:
    """Add figures up; the maxima are the larger ones."""
    for name, stats in more.items():
        into.setdefault(name, MethodStats()).add(stats)


def _chance() -> float:
    """A number in [0, 1), without `random`: that takes 3 ms of a worker's start."""
    return int.from_bytes(os.urandom(4), "big") / 2**32


def _raise(error: BaseException) -> Any:
    raise error


class _Service(Generic[S]):
    """See `Machine.service`."""

    def __init__(self, machine: Machine, name: str, cls: type[S]) -> None:
        self._machine = machine
        self._name = name
        self._class = cls

    def __getattr__(self, name: str) -> RemoteMethod:
        known = public_methods(self._class)
        if name not in known:
            raise AttributeError(f"{self._class.__qualname__} has no public method {name!r}; it has {', '.join(sorted(known))}")
        return RemoteMethod(self._machine, f"{self._name}.{name}")

    def __dir__(self) -> Iterator[str]:
        return iter(public_methods(self._class))


class RemoteMethod:
    """One method of one service of one machine; calling it calls it there."""

    def __init__(self, machine: Machine, name: str) -> None:
        self._machine = machine
        self.name = name

    def __call__(self, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        """See `Machine.call`."""
        return self._machine.call(self.name, *args, timeout=timeout, **kwargs)

    def submit(self, *args: Any, timeout: float | None = None, **kwargs: Any) -> Call[Any]:
        """See `Machine.submit`."""
        return self._machine.submit(self.name, *args, timeout=timeout, **kwargs)

    def stream(self, *args: Any, timeout: float | None = None, **kwargs: Any) -> ItemStream:
        """See `Machine.stream`."""
        return self._machine.stream(self.name, *args, timeout=timeout, **kwargs)

    def retry(self, *args: Any, timeout: float | None = None, **kwargs: Any) -> Any:
        """See `Machine.retry_call`."""
        return self._machine.retry_call(self.name, *args, timeout=timeout, **kwargs)

    def __repr__(self) -> str:
        return f"<{self.name} on {self._machine.addr}>"
