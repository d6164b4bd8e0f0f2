"""Machines on this host: each a supervisor in a session (process group) of its own, and its service processes.

The driver opens the machine's port, so that its address is known before the machine runs, and a port that is taken is an
error here and now. The machine gets the listening socket, and, on the pipe that is its standard input, who it is: never
on its command line, in its environment or on disk. The pipe stays open: its end tells the machine that the driver is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BigmachineError, UsageError
from ..info import platform_name
from ..program import ENVIRON, OPTIONS, PACKAGE, RUN, packed
from ..settings import Section, load, setting
from ..supervisor.control import ControlSocket, Message
from ..system import Launched, Order, Program

if TYPE_CHECKING:
    from ..pack.onhost import Unpacked

MAIN = "import sys; sys.path.append(sys.argv.pop(1)); from bigmachine.supervisor.{} import main; main()"
"""What a supervisor, or the nursery, executes; its first argument is where this package is."""

BASE_INTERPRETER: str = getattr(sys, "_base_executable", sys.executable)
"""The interpreter without its virtual environment, for machines that are to have none."""

KILL_WAIT = 5.0
"""Seconds to wait for a killed process group."""


def _supervisor_command(site: Path | None = None) -> Callable[[str], list[str]]:
    """The command that runs ``main`` of a module of the supervisor's: without the working directory, where something could
    shadow it; in a packed program with nothing but what was packed; or of the image whose distributions are in `site`."""
    options = ["-P"] if site is None and packed() is None else ["-I", "-S"]
    interpreter, package = (sys.executable, PACKAGE) if site is None else (BASE_INTERPRETER, str(site))
    return lambda module: [interpreter, *options, "-c", MAIN.format(module), package]


class _Child:
    """One machine's supervisor, as the driver sees it."""

    def __init__(self, id: str, stderr: int, lifeline: int) -> None:
        self.id = id
        self.stderr = stderr
        self.lifeline = lifeline
        self.said: deque[str] = deque(maxlen=40)
        self.known = threading.Event()
        self.pid = 0  # From `known` on; 0 then where it could not be started.
        self.exited = threading.Event()
        self.status: int | None = None
        self.ended = threading.Event()
        self.reason = ""
        self.callbacks: list[Callable[[str], None]] = []
        self.stopping = False

    def started(self, pid: int) -> None:
        """It runs."""
        self.pid = pid
        self.known.set()

    def failed(self, reason: str) -> None:
        """It could not be started."""
        self.reason = reason
        self.known.set()
        self.exited.set()

    def exit(self, code: int) -> None:
        """It has ended, with `code` as in `os.waitstatus_to_exitcode`."""
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        self.reason = f"its supervisor (pid {self.pid}) {how}"
        self.exited.set()


class _Nursery:
    """The driver's end of `supervisor.nursery`."""

    def __init__(self, command: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._control = ControlSocket(ours)
        self._lock = threading.Lock()
        self._children: dict[str, _Child] = {}
        self._by_pid: dict[int, _Child] = {}
        self._gone = False
        threading.Thread(target=self._listen, name="bigmachine-nursery", daemon=True).start()

    def bear(self, child: _Child, order: Message, fds: Sequence[int]) -> None:
        """Order a machine. Raises OSError where the nursery is gone."""
        with self._lock:
            self._children[child.id] = child
        self._control.send({"type": "machine", **order}, fds)

    def _listen(self) -> None:
        try:
            while (received := self._control.receive()) is not None:
                self._on_message(received[0])
        except (OSError, BigmachineError):
            pass  # It is gone, whichever way we learn of it.
        with self._lock:
            left = [child for child in self._children.values() if not child.exited.is_set()]
        for child in left:
            if child.pid:
                child.exited.set()  # It lives on, or not: nobody can tell how it ends.
            else:
                child.failed("the process that starts machines has ended")

    def _on_message(self, message: Message) -> None:
        match message["type"]:
            case "started":
                child = self._children[message["id"]]
                self._by_pid[message["pid"]] = child
                child.started(message["pid"])
            case "failed":
                self._children[message["id"]].failed(message["error"])
            case "ended":
                child = self._by_pid.pop(message["pid"])
                child.exit(os.waitstatus_to_exitcode(message["status"]))

    def close(self) -> None:
        """End it, after its machines."""
        self._control.close()
        self._process.wait(KILL_WAIT)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Section):
    """The settings of `LocalLauncher`; what each means stands with its flag, in `driver.FLAGS`. Raises `UsageError` on values
    that cannot be."""

    maxprocs: int = setting(1, flag="maxprocs")
    port: int = setting(0, flag="port")
    image: bool = setting(False, flag="image")

    def __post_init__(self) -> None:
        if self.maxprocs < 1:
            raise self.wrong("maxprocs", f"maxprocs must be at least 1: {self.maxprocs}")
        if not 0 <= self.port <= 65535:
            raise self.wrong("port", f"not a port: {self.port}")


class LocalLauncher:
    """The system ``local``. What is not given is taken from the environment and from files, see `settings`. `maxprocs`:
    service processes a machine; `port`: of the first machine, the next ones count up from it (0: any free port); `image`:
    machines run the program's image, as machines of other hosts do."""

    name = "local"

    def __init__(self, maxprocs: int | None = None, port: int | None = None, image: bool | None = None) -> None:
        settings = load(Settings, "local", {"maxprocs": maxprocs, "port": port, "image": image})
        self._maxprocs = settings.maxprocs
        self._port = settings.port
        self.ships: tuple[str, ...] = (platform_name(),) if settings.image else ()
        self._supervisor = _supervisor_command()
        self._lock = threading.Lock()
        self._children: dict[str, _Child] = {}
        self._nursery: _Nursery | None = None
        self._image: Unpacked | None = None
        self._in_use = contextlib.ExitStack()

    # -- Launcher ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """See `system.Launcher`: the nursery imports what it needs while the driver does the same."""
        if not self.ships:
            self._start_nursery()

    def _start_nursery(self) -> None:
        with self._lock:
            if self._nursery is None and sys.platform == "linux":
                try:
                    self._nursery = _Nursery(self._supervisor("nursery"))
                except OSError:
                    pass  # No process to be had: `launch` will say so, if that is still the case.

    def launch(self, orders: Sequence[Order]) -> list[Future[Launched]]:
        """See `system.Launcher`."""
        if len(orders) > 1:
            self.prepare()
        futures = []
        for order in orders:
            future: Future[Launched] = Future()
            try:
                future.set_result(self._launch(self._with_image(order) if self.ships else order))
            except Exception as error:  # An OSError, most likely; whichever, it is this machine's failure alone.
                future.set_exception(error)
            futures.append(future)
        return futures

    def _with_image(self, order: Order) -> Order:
        """The order, to execute the image of its program; what that takes is done once."""
        program = order.program
        if program.file is None:
            raise UsageError("there is no program to make an image of: image is for programs in files")
        with self._lock:
            if self._image is None:
                from ..cache import Cache  # These, and what they import, are for programs that ask for it.
                from ..pack.onhost import unpack_image

                cache = Cache()
                with contextlib.ExitStack() as stack:
                    stack.enter_context(cache.use())
                    self._image = unpack_image(program.file, self.ships[0], cache)
                    self._in_use = stack.pop_all()
                self._supervisor = _supervisor_command(self._image.site)
        self._start_nursery()
        own = program.argv[len(program.argv) - program.own_args :]
        argv = (BASE_INTERPRETER, *OPTIONS, "-c", RUN, str(self._image.site), str(self._image.folder), *own)
        environ = {**ENVIRON, **program.environ}
        return dataclasses.replace(order, program=dataclasses.replace(program, argv=argv, environ=environ))

    def _launch(self, order: Order) -> Launched:
        with self._listen() as listener:
            launched = Launched(order.id, "localhost", listener.getsockname()[1], self._maxprocs)
            child = self._spawn(order, listener, launched.address, self._nursery)
        with self._lock:
            self._children[order.id] = child
        threading.Thread(target=self._watch, args=(child,), name=f"bigmachine-{order.id}", daemon=True).start()
        return launched

    def _listen(self) -> socket.socket:
        with self._lock:
            port = self._port
            if port:
                self._port += 1
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            listener.listen(1024)
        except OSError as error:
            listener.close()
            raise OSError(error.errno, f"port {port} is taken: {error.strerror}; choose another, or 0 for any") from None
        return listener

    def _spawn(self, order: Order, listener: socket.socket, address: str, nursery: _Nursery | None) -> _Child:
        handover = {
            "credentials": order.credentials.to_json(),
            "address": address,
            "listener": listener.fileno(),
            "maxprocs": self._maxprocs,
            "lease": order.lease,
            "driver": os.getpid(),
        }
        stdin, lifeline = os.pipe()
        said, stderr = os.pipe()
        child = _Child(order.id, said, lifeline)
        try:
            if nursery is None:
                self._execute(child, order.program, listener.fileno(), stdin, stderr)
            else:
                self._fork(child, order.program, listener.fileno(), stdin, stderr, nursery)
        except BaseException:
            os.close(lifeline)
            os.close(said)
            raise
        finally:
            os.close(stdin)
            os.close(stderr)
        try:
            os.write(lifeline, json.dumps(handover).encode() + b"\n")  # Below a pipe's 64 KiB: does not block.
        except BrokenPipeError:
            pass  # It has died; whoever watches it says how.
        return child

    def _execute(self, child: _Child, program: Program, listener: int, stdin: int, stderr: int) -> None:
        process = subprocess.Popen(
            [*self._supervisor("main"), child.id, *program.argv],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=[listener],
            env={**os.environ, **program.environ},
            cwd=program.cwd,
            start_new_session=True,
        )
        child.started(process.pid)
        name = f"bigmachine-wait-{child.id}"
        threading.Thread(target=lambda: child.exit(process.wait()), name=name, daemon=True).start()

    def _fork(
        self, child: _Child, program: Program, listener: int, stdin: int, stderr: int, nursery: _Nursery
    ) -> None:
        order = {
            "id": child.id,
            "argv": list(program.argv),
            "environ": {**os.environ, **program.environ},
            "cwd": program.cwd or os.getcwd(),
            "listener": listener,
        }
        nursery.bear(child, order, [stdin, stderr, listener])

    def _watch(self, child: _Child) -> None:
        """Read what the supervisor itself says, and wait for its end."""
        with open(child.stderr, encoding="utf-8", errors="replace") as stderr:
            for line in stderr:
                child.said.append(line.rstrip("\n"))
        child.exited.wait()
        if child.said:
            child.reason = f"{child.reason}: {child.said[-1]}"
        if child.pid:
            _kill_session(child.pid)
        with self._lock:
            child.ended.set()
            callbacks, child.callbacks = child.callbacks, []
        for callback in callbacks:
            callback(child.reason)

    def stop(self, id: str, grace: float) -> None:
        """See `system.Launcher`."""
        with self._lock:
            child = self._children.get(id)
            if child is None or child.stopping:
                return
            child.stopping = True
        try:
            os.close(child.lifeline)
        except OSError:
            pass
        if child.ended.wait(grace) or not child.known.wait(KILL_WAIT):
            return
        if child.pid and not child.exited.is_set():
            try:
                os.kill(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        child.ended.wait(KILL_WAIT)  # Also where it has just exited: what it left is being killed.

    def ended(self, id: str) -> str | None:
        """See `system.Launcher`."""
        child = self._children.get(id)
        return child.reason if child is not None and child.ended.is_set() else None

    def on_end(self, id: str, callback: Callable[[str], None]) -> None:
        """See `system.Launcher`."""
        with self._lock:
            child = self._children.get(id)
            if child is None:
                return
            if not child.ended.is_set():
                child.callbacks.append(callback)
                return
        callback(child.reason)

    def console(self, id: str) -> str:
        """See `system.Launcher`: the supervisor's own stderr."""
        child = self._children.get(id)
        return "\n".join(child.said) if child is not None else ""

    def close(self) -> None:
        """See `system.Launcher`."""
        with self._lock:
            ids = list(self._children)
            nursery, self._nursery = self._nursery, None
        for id in ids:
            self.stop(id, 0.0)
        if nursery is not None:
            nursery.close()
        self._in_use.close()


def _kill_session(session: int) -> None:
    """Kill what is left of a supervisor that was killed: its service processes die with it on Linux, what they started
    in groups of their own may not. Each service process leads a group; all are in the supervisor's session."""
    deadline = time.monotonic() + KILL_WAIT
    while time.monotonic() < deadline:
        left = [pid for pid in _session_members(session) if pid != session]
        if not left:
            return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        time.sleep(0.01)


def _session_members(session: int) -> list[int]:
    """The living processes of a session; none where there is no /proc (they end with their control sockets there)."""
    members = []
    for entry in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if entry.isdigit():
            try:
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                members.append(int(entry))
    return members
