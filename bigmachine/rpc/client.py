"""The calling end: one connection to one process, made when first needed and again when it was lost.

The wire is specified in the package's docstring; what happens on a connection is `calling`'s.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import (
    CallTimeout,
    Unreachable,
)
from .calling import ClientConnection, raiser
from .calls import Call
from .channel import (
    parse_result,
)
from .codec import Codec, Encoded
from .items import ItemStream
from .reactor import Reactor
from .stats import Stats
from .transport import Closed, handshake

CONNECT_TIMEOUT = 20.0
"""Seconds for TCP and TLS together; a machine that is up answers in milliseconds, or in a few round trips."""


class Client:
    """Calls to one process of one machine, over one connection that is made when first needed."""

    def __init__(
        self,
        host: str,
        port: int,
        server_name: str,
        context: ssl.SSLContext,
        codec: Codec,
        reactor: Reactor,
        *,
        address: str,
        explain: Callable[[Unreachable], BaseException] = lambda error: error,
    ) -> None:
        self.address = address
        self._explain = explain
        self.stats = Stats()
        self.codec = codec
        self._host, self._port = host, port
        self._server_name = server_name
        self._context = context
        self._reactor = reactor
        self._lock = threading.Lock()
        self._connection: ClientConnection | None = None
        self._closed = ""

    def connection(self, timeout: float | None = None) -> ClientConnection:
        """The connection, made anew where there is none. Raises `Unreachable(sent=False)`."""
        connection = self._connection
        if connection is not None and connection.usable:
            return connection
        with self._lock:
            self._check_open()
            connection = self._connection
            if connection is None or not connection.usable:
                connection = self._connection = self._connect(min(CONNECT_TIMEOUT, timeout or CONNECT_TIMEOUT))
            try:
                self._check_open()  # Again: `close` does not wait for a connection that is being made.
            except Unreachable:
                self._connection = None
                connection.close(self._closed)
                raise
            return connection

    def _check_open(self) -> None:
        if self._closed:
            raise Unreachable(self.address, self._closed, sent=False)

    def _connect(self, timeout: float) -> ClientConnection:
        deadline = time.monotonic() + timeout
        try:
            sock = _open(self._host, self._port, timeout, self._wrap)
        except OSError as error:
            reason = error.strerror or str(error)
            raise Unreachable(self.address, f"cannot connect to {self._host}:{self._port}: {reason}") from error
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)
            handshake(sock, deadline)
            if sock.selected_alpn_protocol() != "h2":
                raise Closed("the peer does not speak HTTP/2")
            return ClientConnection(
                sock, self._server_name, self.address, self.codec, self._reactor, self.stats, self._explain
            )
        except (Closed, OSError) as error:
            sock.close()
            raise Unreachable(self.address, getattr(error, "strerror", None) or str(error), sent=False) from error
        except BaseException:  # Whatever it is (Ctrl-C, too): no descriptor is left.
            sock.close()
            raise

    def _wrap(self, raw: socket.socket) -> ssl.SSLSocket:
        return self._context.wrap_socket(
            raw, server_hostname=self._server_name, do_handshake_on_connect=False, suppress_ragged_eofs=True
        )

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float | None = None) -> Any:
        """Call `method` and return its result. Raises what it raised, or a `BigmachineError`."""
        encoded = self.codec.encode_call(method, args, kwargs)
        deadline = None if timeout is None else time.monotonic() + timeout
        connection = self._connection
        if connection is None or not connection.usable:
            connection = self.connection(timeout)
        pending = connection.start(method, encoded, timeout or 0.0, None)
        try:
            if deadline is None:
                connection.transport.round_trip(pending)
            else:
                connection.transport.wait(pending, deadline)
        except BaseException:  # Ctrl-C: nobody waits for it any more.
            connection.cancel(pending)
            raise
        body = pending.body
        if body is not None:
            return self.codec.decode(*parse_result(body))
        outcome = pending.outcome
        if outcome is not None:
            return outcome()
        if connection.closed is not None:
            raise connection.lost(connection.closed)
        connection.cancel(pending)
        raise CallTimeout(method, self.address, timeout or 0.0)

    def submit(self, call: Call[Any], method: str, encoded: Encoded, timeout: float | None = None) -> None:
        """Send a call; `call` is completed when it ends. Returns when the arguments are on their way."""
        connection = self.connection(timeout)
        pending = connection.start(method, encoded, timeout or 0.0, call)
        call.under_way(connection, pending)
        if timeout is not None:
            pending.deadline = time.monotonic() + timeout
            error = CallTimeout(method, self.address, timeout)

            def expire() -> None:
                if not pending.done:
                    call.complete(raiser(error), self._reactor.execute)
                    connection.cancel(pending)

            timer = self._reactor.call_later(timeout, expire)
            if pending.done:
                timer.cancel()
            else:
                pending.timer = timer

    def stream(
        self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float | None = None
    ) -> ItemStream:
        """Call a generator method; iterate over the result."""
        encoded = self.codec.encode_call(method, args, kwargs)
        return self.connection(timeout).stream(method, encoded, timeout or 0.0)

    @property
    def connected(self) -> bool:
        """There is a connection that can be used."""
        connection = self._connection
        return connection is not None and connection.usable

    def close(self, reason: str = "closed") -> None:
        """End the connection; calls under way, and later ones, fail with `reason`."""
        self._closed = self._closed or reason
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close(reason)


def _open(host: str, port: int, timeout: float, wrap: Callable[[socket.socket], ssl.SSLSocket]) -> ssl.SSLSocket:
    """A TCP connection, to the first of the host's addresses that takes it. Raises `OSError`: the last address's.

    `socket.create_connection` does the same, but leaves its socket open when Ctrl-C interrupts it. And the socket is wrapped
    before it is connected: where the peer resets it between the two, Python would forget to close it.
    """
    failures: list[OSError] = []
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = wrap(socket.socket(family, kind, protocol))
        try:
            sock.settimeout(timeout)
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failures = [error]
        except BaseException:  # Whatever it is: no descriptor is left.
            sock.close()
            raise
    try:
        raise failures[0] if failures else OSError(f"there is no address for {host}")
    finally:
        failures.clear()  # It refers to this frame.
