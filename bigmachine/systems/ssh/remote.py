"""One machine's process on a host, as it is seen through SSH: started, listened to, and, if nothing else helps, killed.

It leads a session of its own, and does not need the connection that it was started by: what ends with that is only our
knowledge of it. Nothing secret is on its command line, which anybody there may read.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from paramiko import Channel, SSHException

from ..remote import RemoteHostError
from ..remote.source import LOADER
from .connections import Connections

START_WITHIN = 60.0
"""Seconds until an agent must listen: it takes half of one, on a host with two cores that are busy."""

OWN_END = 2.0
"""Seconds for ending by itself: a machine that could be asked to was asked before it is stopped, and has answered."""

TERM_WAIT = 2.0
"""Seconds that an agent, or a supervisor, has for leaving nothing behind: it takes them milliseconds."""

KILL_WAIT = 5.0
"""Seconds for killing what is left of a machine."""

LOSS = 0.3
"""Seconds until a connection that breaks is known to be broken: its channels learn of it a moment before."""

MAX_LINE = 1 << 16
"""Bytes without an end of line that are kept; a supervisor says little, and in lines."""

FIND = """\
for p in python3 /usr/bin/python3 /usr/local/bin/python3 python3.14 python3.13 python3.12 python3.11 python3.10 python3.9 \
"$HOME"/.pyenv/versions/3.*/bin/python3 /opt/*/bin/python3; do \
v=$("$p" -S -E -c "import sys; print(sys.version_info[0] * 100 + sys.version_info[1])" 2>/dev/null </dev/null) || continue; \
if [ "$v" -ge 309 ]; then exec "$p" -I -S "$@"; fi; \
f="$f $p ($((v / 100)).$((v % 100)))"; \
done; \
echo "no Python 3.9 or later there, but${f:- none at all}: install python3" >&2; exit 127"""
"""Becomes the first Python that can run an agent, with the arguments given. For any shell of POSIX; holds no single quote, so
that all login shells hand it on."""

LEAD = (
    "import os, select, threading; "
    "os.getsid(0) == os.getpid() or os.setsid(); "
    "poll = select.poll(); poll.register(0, select.POLLRDHUP); "
    "threading.Thread(target=lambda: (poll.poll(), os.kill(os.getpid(), 15)), daemon=True).start(); "
)
"""Before an agent: it leads a session, as sshd has it anyway, and others need not. And until it becomes a machine, which has a
lease, it ends with the connection: else it would wait long for a driver that was killed."""

KILLER = """\
import os, sys, time
session, mark = int(sys.argv[1]), sys.argv[2].encode()
def read(pid, name):
    try:
        with open("/proc/%s/%s" % (pid, name), "rb") as file:
            return file.read()
    except OSError:
        return b""
def members():
    for pid in os.listdir("/proc"):
        if pid.isdigit():
            fields = read(pid, "stat").rpartition(b")")[2].split()
            if fields and int(fields[3]) == session and fields[0] != b"Z":
                yield int(pid)
leader = read(session, "cmdline")
deadline = time.monotonic() + float(sys.argv[3])
if mark in leader:
    try:
        os.kill(session, 15)
    except OSError:
        pass
    while session in members() and time.monotonic() < deadline:
        time.sleep(0.01)
deadline = time.monotonic() + float(sys.argv[4])
while (not leader or mark in leader) and time.monotonic() < deadline:
    left = list(members())
    if not left:
        break
    for pid in left:
        try:
            os.kill(pid, 9)
        except OSError:
            pass
    time.sleep(0.01)
"""
"""Ends a session, unless another process has got its leader's number meanwhile: asks the leader, then kills what is left."""


class RemoteProcess:
    """An agent, and the machine `id` that it becomes. `port` and `pid` are what it has said."""

    def __init__(self, id: str, connections: Connections) -> None:
        self.id = id
        self.port = 0
        self.pid = 0
        self.said: deque[str] = deque(maxlen=40)
        self.reason = ""
        self.ended = threading.Event()
        self._host = connections.target.name
        self._connections = connections
        self._channel: Channel | None = None
        self._greeted = threading.Event()
        self._lock = threading.Lock()
        self._unwanted = False
        self._killing = threading.Lock()
        self._swept = False
        self._callbacks: list[Callable[[str], None]] = []

    def start(self, source: bytes, connected: Callable[[], None] = lambda: None) -> None:
        """Start the agent `source`; returns when it listens, after calling `connected`. Raises `RemoteHostError`."""
        channel = self._connections.session()
        connected()
        with self._lock:
            if not self._unwanted:
                self._channel = channel
        if self._channel is None:
            channel.close()
            raise RemoteHostError(self._host, f"machine {self.id} was ended while it started")
        channel.set_combine_stderr(True)
        try:
            with _closed_after(channel, START_WITHIN):
                channel.exec_command(command("-c", LEAD + LOADER, self.id))
                threading.Thread(target=self._listen, name=f"bigmachine-said-{self.id}", daemon=True).start()
                channel.sendall(source)
        except (SSHException, EOFError, OSError) as error:
            if not self._greeted.wait(1.0) or not self.said:  # What it has said is the better reason.
                self._greeted.set()
                raise RemoteHostError(self._host, f"no command could be started there: {error}") from error
        if not self._greeted.wait(START_WITHIN):
            self.kill()
            raise RemoteHostError(self._host, f"the agent did not start within {START_WITHIN:g} s{self._last()}")
        if not self.port:
            raise RemoteHostError(self._host, f"no agent started{self._last()}")
        threading.Thread(target=self._watch, name=f"bigmachine-wait-{self.id}", daemon=True).start()

    def _last(self) -> str:
        return f": {self.said[-1]}" if self.said else ""

    def _listen(self) -> None:
        """Read what it says, to the end."""
        assert self._channel is not None
        rest = b""
        with contextlib.suppress(OSError, EOFError):
            while data := self._channel.recv(MAX_LINE):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._hear(line.decode("utf-8", "replace").rstrip("\r"))
                rest = rest[-MAX_LINE:]
        if rest:
            self._hear(rest.decode("utf-8", "replace"))
        self._greeted.set()

    def _hear(self, line: str) -> None:
        if not self._greeted.is_set() and line.startswith("{"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                greeting: dict[str, Any] = json.loads(line)
                self.port, self.pid = int(greeting["port"]), int(greeting["pid"])
                self._greeted.set()
                return
        self.said.append(line)

    def _watch(self) -> None:
        """Wait for its end, which sshd reports, or for that of the connection, which says nothing."""
        assert self._channel is not None
        status = self._channel.recv_exit_status()
        if status < 0 and not self._channel.eof_received:  # Of a process that was killed sshd says that its output has ended.
            transport = self._channel.get_transport()
            transport.join(LOSS)
            if not transport.is_active():
                return
        how = f"ended with code {status}" if status >= 0 else "was killed"
        self._end(f"its supervisor (pid {self.pid} on {self._host}) {how}{self._last()}")

    def _end(self, reason: str) -> None:
        with self._lock:
            if self.ended.is_set():
                return
            self.reason = reason
            self.ended.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(reason)

    def on_end(self, callback: Callable[[str], None]) -> None:
        """See `system.Launcher.on_end`."""
        with self._lock:
            if not self.ended.is_set():
                self._callbacks.append(callback)
                return
        callback(self.reason)

    def kill(self) -> None:
        """End it with all that it has started, or is to start. Where the host cannot be reached, its lease will end it. Does
        not raise."""
        with self._lock:
            self._unwanted = True
        if self._channel is not None:
            self._greeted.wait(KILL_WAIT)  # Until then nobody knows what to kill.
        with self._killing:
            if self.pid and not self._swept:
                self._swept = self._killed()
                if self._swept and self._alive():
                    self.ended.wait(KILL_WAIT)  # For sshd to report how it has ended.
        if self._channel is not None:
            self._channel.close()
        self._end(f"it was ended on {self._host}")

    def _killed(self) -> bool:
        try:
            channel = self._connections.session(KILL_WAIT)
            with contextlib.closing(channel), _closed_after(channel, TERM_WAIT + 2 * KILL_WAIT):
                channel.exec_command(command("-", str(self.pid), self.id, str(TERM_WAIT), str(KILL_WAIT)))
                channel.sendall(KILLER.encode())
                channel.shutdown_write()
                channel.recv(1)  # The end of it: it says nothing.
        except (RemoteHostError, SSHException, EOFError, OSError, RuntimeError):  # The last: no thread for a new connection.
            return False
        return True

    def _alive(self) -> bool:
        return self._channel is not None and self._channel.get_transport().is_active()

    def close_after(self, grace: float) -> None:
        """Return when it has ended, by itself within `grace` seconds, or killed; and with it whatever it has started."""
        deadline = time.monotonic() + min(grace, OWN_END)
        while self._alive() and not self.ended.is_set() and time.monotonic() < deadline:
            self.ended.wait(0.2)  # Not at once to the end: a lost connection would not tell.
        self.kill()


@contextlib.contextmanager
def _closed_after(channel: Channel, seconds: float) -> Iterator[None]:
    """The block fails when the time is up: not all that one can do with a channel has a deadline of its own."""
    timer = threading.Timer(seconds, channel.close)
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # In Python 3.12, `atexit` is too late for threads.
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def command(*arguments: str) -> str:
    """The command that becomes a Python there, for whatever shell the user has."""
    return f"exec sh -c {shlex.quote(FIND)} bigmachine {shlex.join(arguments)}"
