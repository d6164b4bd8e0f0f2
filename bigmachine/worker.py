"""A service process: the program, re-executed up to `driver.start()`, which lands here and never returns.

The supervisor talks to it over the control socket (`supervisor.control`), on the main thread:

- ``fork``: become several processes (`supervisor.forking`), before there is any thread.
- ``identity``: the machine's credentials. Everything that needs threads or TLS begins with it.
- ``services`` and a descriptor: install them; the answer is ``installed``, with a ``failure`` where they could not be.
- ``drain``: the machine will be taken away at ``deadline``: tell the services that want to know.
- ``connection`` and a descriptor: a client, whose first byte has not been read.

The process ends with the supervisor (end of the control socket), and by SIGTERM.
"""

from __future__ import annotations

import atexit
import base64
import io
import mmap
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from .credentials import Credentials, client_context, peer_identity, server_context
from .errors import BigmachineError
from .machine import Network, merge_stats
from .program import digest
from .rpc.codec import Codec
from .rpc.failures import encode_failure
from .rpc.methods import call_context
from .rpc.reactor import reactor
from .rpc.server import Server
from .rpc.stats import MethodStats
from .rpc.streams import Items, Stream
from .services import Services, parallel_methods
from .session import Session
from .supervisor.control import ControlSocket, Message
from .supervisor.forking import PROCESS, fork_replicas, ready_message

if TYPE_CHECKING:
    from .profiling.doing import Doing
    from .profiling.values import Profile
    from .vars import Sample

WAKE = signal.SIGURG
"""Interrupts whatever the main thread waits in. Nobody uses it for what it was made for, and its default is to do nothing."""


class ProcessService:
    """Served as ``Process`` by every service process."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def describe(self) -> tuple[int, frozenset[str]] | None:
        """How many processes serve the machine's parallel methods, and which these are: what a caller has to know. None
        before the services are set up."""
        return self._worker.described

    def stats(self) -> dict[str, MethodStats]:
        """Figures per method of the calls that this process has served."""
        return self._worker.server.stats.snapshot()

    def vars(self, besides: str = "") -> list[Sample]:
        """This process's variables, and the figures of the calls that it has served and made.

        `besides` is the `vars.origin` of whoever asks. Where that is this process (machines of the system `test` are in the
        driver's), what the program has published is known there, and left out here.
        """
        from .vars import origin, rpc_samples, snapshot

        made: dict[str, MethodStats] = {}
        for machine in self._worker.session.machines():
            merge_stats(made, machine.call_stats())
        figures = rpc_samples("server", self.stats()) + rpc_samples("client", made)
        return figures if besides == origin() else snapshot() + figures

    def profile(self, kind: str, seconds: float, gc: bool = False) -> Profile:
        """A profile of this process (`profiling.take`); ends when its caller cancels it. Raises `UsageError`."""
        from .profiling import take

        context = call_context()
        return take(kind, seconds, gc, lambda: context.cancelled)

    def doing(self, limit: int = 100) -> list[Doing]:
        """The calls of services that this process runs now; of more than `limit`, those that have run longest."""
        from .profiling.doing import doing

        return doing(self._worker.server, limit)


class Worker:
    """The state of a service process once it has an identity."""

    def __init__(
        self,
        machine: str,
        address: str,
        credentials: Credentials,
        main_names: frozenset[str],
        maxprocs: int,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.described: tuple[int, frozenset[str]] | None = None
        self._maxprocs = maxprocs
        self.codec = Codec(main_names, Stream)
        self.handler = Services({"Process": ProcessService(self)})
        self.session = Session(Network(lambda: client_context(credentials), self.codec, reactor()), address=address)
        self.server = Server(
            self.handler,
            context or server_context(credentials),
            self.codec,
            reactor(),
            identify=peer_identity,
            log=_log,
        )
        self.machine = machine

    def install(self, blob: Any) -> bytes | None:
        """Decode the services, set them up, serve them. None, or how it failed."""
        try:
            services: Mapping[str, object] = decode_services(self.codec, blob)
            self.handler.install(services, self.session)
            parallel = parallel_methods(services)
            self.described = (self._maxprocs if parallel else 1), parallel
        except BaseException as error:  # The user's code runs in here; whatever it raises is told to the driver.
            return encode_failure(error, self.codec)
        return None


def decode_services(codec: Codec, blob: Any) -> Mapping[str, object]:
    """What `session.encode_services` made. Raises whatever unpickling the user's objects raises."""
    (body,) = Items().feed(blob)
    services: Mapping[str, object] = codec.decode(body.pickle, body.buffers)
    return services


def _log(text: str) -> None:
    sys.stderr.write(f"bigmachine: {text}\n")


def run(control: ControlSocket, main_names: frozenset[str]) -> NoReturn:
    """Serve until the supervisor, or a signal, says that it is enough."""
    _prepare_output()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's; it ends us in good order.
    signal.signal(signal.SIGTERM, _terminate)
    process = int(os.environ.pop(PROCESS, "0"))
    control.send(ready_message(process, digest()))
    worker: Worker | None = None
    early: list[socket.socket] = []
    while (received := control.receive()) is not None:
        message, fds = received
        match message["type"]:
            case "fork":
                before = process
                process, control = fork_replicas(process, control, message, fds)
                if process != before:
                    os.environ.pop(PROCESS, None)
                    control.send(ready_message(process, digest()))
            case "identity":
                credentials = Credentials.from_json(message["credentials"])
                worker = Worker(message["machine"], message["address"], credentials, main_names, message["maxprocs"])
                for sock in early:
                    worker.server.adopt(sock)
                early.clear()
                _hear_signals()
            case "services":
                assert worker is not None
                threading.Thread(target=_install, args=(worker, control, fds[0]), name="bigmachine-setup").start()
            case "drain":
                assert worker is not None
                worker.handler.drain(message["deadline"])
            case "connection":
                sock = socket.socket(fileno=fds[0])
                if worker is None:
                    early.append(sock)
                else:
                    worker.server.adopt(sock)
    _exit()


def _install(worker: Worker, control: ControlSocket, fd: int) -> None:
    """On a thread of its own: a `setup` may take long, and call services of other machines."""
    size = os.fstat(fd).st_size
    with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as blob:
        os.close(fd)
        view = memoryview(blob)
        failure = worker.install(view)
        view.release()
    answer: Message = {"type": "installed"}
    if failure is not None:
        answer["failure"] = base64.b64encode(failure).decode()
    try:
        control.send(answer)
    except (OSError, BigmachineError):
        _exit()  # The supervisor is gone.


def _prepare_output() -> None:
    """Whole lines leave at once, so that nothing is lost in a crash and lines of threads do not mix."""
    os.environ.pop("PYTHONUNBUFFERED", None)
    os.environ.pop("PYTHONFAULTHANDLER", None)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


def _hear_signals() -> None:
    """See to it that SIGTERM is heard, once there are threads.

    Its handler runs on the main thread, which waits in a system call. The kernel may give the signal to any thread that
    is just in the kernel, and then does not wake the main one (seen in 1 of 15 stops of busy processes). Whoever gets it,
    the interpreter writes its number to this pipe; then a worker wakes the main thread, with a signal that means nothing
    else: a fork that is about to forget this pipe may have written to it, too.
    """
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.signal(WAKE, lambda *_: None)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    main = threading.main_thread().ident
    assert main is not None

    def on_signal(_: int) -> None:
        if any(number != WAKE for number in os.read(heard, 4096)):
            signal.pthread_kill(main, WAKE)
        watch.arm()

    watch = reactor().watch(heard, on_signal)
    watch.arm()
    os.register_at_fork(after_in_child=_be_nobody)


def _be_nobody() -> None:
    """In a fork that a service has made (`multiprocessing`): a signal is its own affair, not that of its parent."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    _exit()


def _exit() -> NoReturn:
    """End now: run what the program registered with `atexit`, and write what is buffered. Other threads are not waited for."""
    try:
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                pass  # Nobody reads it any more.
        os._exit(0)


def bare() -> NoReturn:
    """A service process without a program: `session.bare_program` starts it. Services come by value, or are importable."""
    control = ControlSocket.from_environment()
    if control is None:
        raise SystemExit("bigmachine: this is started by a machine's supervisor, not by hand")
    run(control, frozenset())
