"""Machines on this host: each a supervisor in a session (process group) of its own, and its service processes.

The driver opens the machine's port, so that its address is known before the machine runs, and a port that is taken is an
error here and now. The machine gets the listening socket, and, on the pipe that is its standard input, who it is: never
on its command line, in its environment or on disk. The pipe stays open: its end tells the machine that the driver is gone.
"""

from __future__ import annotations

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

from ..errors import UsageError
from ..system import Launched, Order

MAIN = "import sys; sys.path.append(sys.argv.pop(1)); from bigmachine.supervisor.main import main; main()"
"""Executed with ``-P``: nothing in the working directory can shadow a module of the supervisor's."""

KILL_WAIT = 5.0
"""Seconds to wait for a killed process group."""


class _Child:
    """One machine's supervisor, as its parent sees it."""

    def __init__(self, order: Order, process: subprocess.Popen[bytes], lifeline: int) -> None:
        self.order = order
        self.process = process
        self.lifeline = lifeline
        self.said: deque[str] = deque(maxlen=40)
        self.ended = threading.Event()
        self.reason = ""
        self.callbacks: list[Callable[[str], None]] = []
        self.stopping = False


class LocalLauncher:
    """The system ``local``. `maxprocs`: service processes a machine; `port`: of the first machine, the next ones count
    up from it (0: any free port)."""

    name = "local"

    def __init__(self, maxprocs: int = 1, port: int = 0) -> None:
        if maxprocs < 1:
            raise UsageError(f"maxprocs must be at least 1: {maxprocs}")
        if not 0 <= port <= 65535:
            raise UsageError(f"not a port: {port}")
        self._maxprocs = maxprocs
        self._port = port
        self._lock = threading.Lock()
        self._children: dict[str, _Child] = {}

    # -- Launcher ----------------------------------------------------------------------------------------------------

    def launch(self, orders: Sequence[Order]) -> list[Future[Launched]]:
        """See `system.Launcher`."""
        futures = []
        for order in orders:
            future: Future[Launched] = Future()
            try:
                future.set_result(self._launch(order))
            except Exception as error:  # An OSError, most likely; whichever, it is this machine's failure alone.
                future.set_exception(error)
            futures.append(future)
        return futures

    def _launch(self, order: Order) -> Launched:
        listener = self._listen()
        try:
            launched = Launched(order.id, "localhost", listener.getsockname()[1], self._maxprocs)
            child = self._spawn(order, listener, launched.address)
        finally:
            listener.close()
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

    def _spawn(self, order: Order, listener: socket.socket, address: str) -> _Child:
        program = order.program
        package = str(Path(__file__).parents[2])
        handover = {
            "credentials": order.credentials.to_json(),
            "address": address,
            "listener": listener.fileno(),
            "maxprocs": self._maxprocs,
            "lease": order.lease,
            "driver": os.getpid(),
        }
        read, lifeline = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", MAIN, package, order.id, *program.argv],
                stdin=read,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                env={**os.environ, **program.environ},
                cwd=program.cwd,
                start_new_session=True,
            )
        except OSError:
            os.close(lifeline)
            raise
        finally:
            os.close(read)
        try:
            os.write(lifeline, json.dumps(handover).encode() + b"\n")  # Below PIPE_BUF's 64 KiB: does not block.
        except BrokenPipeError:
            pass  # It has died; whoever watches it says how.
        return _Child(order, process, lifeline)

    def _watch(self, child: _Child) -> None:
        """Read what the supervisor itself says, and wait for its end."""
        assert child.process.stderr is not None
        for line in child.process.stderr:
            child.said.append(line.decode("utf-8", "replace").rstrip("\n"))
        child.process.stderr.close()
        code = child.process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        child.reason = f"its supervisor (pid {child.process.pid}) {how}"
        with self._lock:
            child.ended.set()
            callbacks, child.callbacks = child.callbacks, []
        _kill_session(child.process.pid)
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
        if not child.ended.wait(grace):
            try:
                os.kill(child.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.ended.wait(KILL_WAIT)

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
        for id in ids:
            self.stop(id, 0.0)


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
