"""The connections to one host: one for all its machines, and more where its sshd wants few sessions on each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from paramiko import Channel, SSHException, Transport

from ..remote import RemoteHostError
from .config import Target
from .connect import CONNECT_WITHIN, connect


class Connections:
    """Connects when that is needed, and again where a connection has been lost. May be used from any thread."""

    def __init__(self, target: Target, dial: Callable[[Target, float], Transport] = connect) -> None:
        self.target = target
        self._dial = dial
        self._lock = threading.Lock()
        self._open: list[Transport] = []
        self._used: set[Transport] = set()  # Those that have had a session: they allow some.
        self._pending: Future[Transport] | None = None
        self._closed = threading.Event()

    def begin(self) -> None:
        """Connect while the caller does other things. Whoever needs the connection learns what is wrong with it."""

        def run() -> None:
            try:
                self._transport([], time.monotonic() + CONNECT_WITHIN)
            except Exception:  # As the docstring says; the next attempt makes a new one.
                pass

        threading.Thread(target=run, name=f"bigmachine-ssh-{self.target.name}", daemon=True).start()

    def session(self, within: float = CONNECT_WITHIN) -> Channel:
        """A channel in which one command can be executed, within about that many seconds. Raises `RemoteHostError`."""
        full: list[Transport] = []
        deadline = time.monotonic() + within
        while True:
            transport = self._transport(full, deadline)
            try:
                channel = transport.open_session(timeout=_left(deadline))
            except (SSHException, EOFError) as error:
                if time.monotonic() >= deadline:
                    raise RemoteHostError(self.target.name, f"its sshd has not answered for {within:g} s") from error
                if not transport.is_active():
                    continue  # Lost between two sessions: once more, with a new one.
                if transport not in self._used:
                    reason = f"its sshd allows no session: {error}; see MaxSessions in its sshd_config"
                    raise RemoteHostError(self.target.name, reason) from error
                full.append(transport)
                continue
            self._used.add(transport)
            return channel

    def forward(self, port: int, within: float = CONNECT_WITHIN) -> Channel:
        """A channel to a port of the host's own. Raises `RemoteHostError`."""
        deadline = time.monotonic() + within
        transport = self._transport([], deadline)
        there = ("127.0.0.1", port)
        try:
            return transport.open_channel("direct-tcpip", there, ("127.0.0.1", 0), timeout=_left(deadline))
        except (SSHException, EOFError) as error:
            reason = f"its sshd forwards nothing to port {port}: {error}; see AllowTcpForwarding in its sshd_config"
            raise RemoteHostError(self.target.name, reason) from error

    def _transport(self, full: list[Transport], deadline: float) -> Transport:
        """One that is open and not in `full`. Several who need a new one at a time share it, or what came in its way."""
        with self._lock:
            if self._closed.is_set():
                raise RemoteHostError(self.target.name, "the session with it has ended")
            for transport in list(self._open):
                if not transport.is_active():
                    self._open.remove(transport)
                    transport.close()
                elif transport not in full:
                    return transport
            pending = self._pending
            mine = Future[Transport]()
            if pending is None:
                self._pending = mine
        if pending is not None:
            try:
                return pending.result(_left(deadline))
            except TimeoutError:
                raise RemoteHostError(self.target.name, "no connection to it in time") from None
        try:
            transport = self._dial(self.target, _left(deadline))
        except BaseException as error:
            with self._lock:
                self._pending = None
            mine.set_exception(error)
            raise
        with self._lock:
            self._pending = None
            self._open.append(transport)
        mine.set_result(transport)
        if self._closed.is_set():
            transport.close()
        return transport

    def close(self) -> None:
        """End them all. Idempotent."""
        with self._lock:
            self._closed.set()
            transports, self._open = self._open, []
        for transport in transports:
            transport.close()


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.01)
