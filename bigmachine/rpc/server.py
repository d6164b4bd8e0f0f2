"""The called end: accepts connections from whoever has a listener, sets TLS up, and serves a handler's methods on them.

What happens on a connection is `serving`'s (small calls) and `requests`' (all others).
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from .codec import Codec
from .methods import Handler
from .reactor import READ, WRITE, Reactor, Timer, Watch
from .serving import ServerConnection
from .stats import Stats
from .transport import Closed

if TYPE_CHECKING:
    from .eventloop import EventLoop

HANDSHAKE_TIMEOUT = 10.0
"""Seconds that a peer has for TLS: a few round trips on any network."""


class Server:
    """Serves `handler`'s methods on connections that somebody else accepted (`adopt`)."""

    def __init__(
        self,
        handler: Handler,
        context: ssl.SSLContext,
        codec: Codec,
        reactor: Reactor,
        *,
        identify: Callable[[ssl.SSLSocket], object],
        log: Callable[[str], None],
        ready: bool = True,
    ) -> None:
        self.handler = handler
        self.codec = codec
        self.reactor = reactor
        self.stats = Stats()
        self._context = context
        self._identify = identify
        self._log = log
        self._lock = threading.Lock()
        self._connections: set[ServerConnection] = set()
        self._handshakes: set[_Handshake] = set()
        self._event_loop: EventLoop | None = None
        self._closed = False

    def adopt(self, raw: socket.socket) -> None:
        """Serve a connection whose first byte has not been read yet. Returns at once; failures are logged."""
        raw.setblocking(False)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock = self._context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
        except OSError as error:
            raw.close()
            self._log(f"refused a connection: {error}")
            return
        handshake = _Handshake(sock, self)
        with self._lock:
            self._handshakes.add(handshake)
        handshake.start()

    def handshake_ended(self, handshake: _Handshake, error: str | None) -> None:
        """Go on with a connection whose TLS is up; drop one whose is not."""
        with self._lock:
            self._handshakes.discard(handshake)
            closed = self._closed
        sock = handshake.sock
        try:
            if error is not None:
                raise Closed(error)
            if sock.selected_alpn_protocol() != "h2":
                raise Closed("the client does not speak HTTP/2")
            caller = self._identify(sock)
            if closed:
                raise Closed("the server is closed")
        except Exception as refusal:  # `identify` has errors of its own; whichever it is, this client is refused.
            self._log(f"refused a connection from {handshake.peer}: {refusal}")
            sock.close()
            return
        connection = ServerConnection(sock, caller, self)
        with self._lock:
            self._connections.add(connection)
            closed = self._closed
        connection.transport.start()
        if closed:
            connection.transport.fail(Closed("the server is closed"))

    def event_loop(self) -> EventLoop:
        """The loop that runs `async def` methods."""
        with self._lock:
            if self._event_loop is None:
                from .eventloop import EventLoop  # See there: asyncio is for those who use it.

                self._event_loop = EventLoop()
            return self._event_loop

    @property
    def running_loop(self) -> EventLoop | None:
        """The same, where there is one."""
        return self._event_loop

    def forget(self, connection: ServerConnection) -> None:
        """The connection has ended."""
        with self._lock:
            self._connections.discard(connection)

    def drain(self, reason: str) -> None:
        """Take no new streams; what runs may end."""
        for connection in self._all():
            with connection.transport.lock:
                connection._connection.go_away(reason)
                connection.transport.flush()

    def close(self, reason: str = "the server is closed", *, abort: bool = False) -> None:
        """End all connections; with `abort` as a power cut would."""
        with self._lock:
            self._closed = True
            handshakes = list(self._handshakes)
            event_loop = self._event_loop
        for handshake in handshakes:
            handshake.end("the server is closed")
        for connection in self._all():
            if abort:
                connection.transport.abort()
            else:
                with connection.transport.lock:
                    connection._connection.close(0, reason)
                    connection.transport.flush()
                connection.transport.fail(Closed(reason))
        if event_loop is not None:
            event_loop.close()  # After the connections: what is cancelled by it is not to be answered.

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    @property
    def callers(self) -> list[object]:
        """Who is connected, as `identify` says."""
        return [connection.caller for connection in self._all()]

    def _all(self) -> list[ServerConnection]:
        with self._lock:
            return list(self._connections)


class _Handshake:
    """TLS is being set up, without a thread that waits: a peer that dawdles costs a descriptor for ten seconds."""

    def __init__(self, sock: ssl.SSLSocket, server: Server) -> None:
        self.sock = sock
        self._server = server
        self._lock = threading.Lock()
        self._ended = False
        try:
            self.peer = "{}:{}".format(*sock.getpeername()[:2])
        except OSError:
            self.peer = "a peer that has gone"
        self._watch: Watch | None = None
        self._timer: Timer | None = None

    def start(self) -> None:
        """Begin, on this thread."""
        reactor = self._server.reactor
        with self._lock:  # A worker may be on its way that woke for another user of the same descriptor.
            if self._ended:
                return
            self._watch = reactor.watch(self.sock.fileno(), self.step)
            self._timer = reactor.call_later(HANDSHAKE_TIMEOUT, lambda: self.end("no TLS handshake within 10 s"))
        self.step(0)

    def step(self, _: int) -> None:
        """Go as far as what has arrived allows."""
        with self._lock:
            if self._ended or self._watch is None:
                return
            try:
                self.sock.do_handshake()
            except ssl.SSLWantReadError:
                self._watch.arm(READ)
                return
            except ssl.SSLWantWriteError:
                self._watch.arm(WRITE)
                return
            except (OSError, ValueError) as error:
                problem = getattr(error, "reason", None) or str(error)
            else:
                problem = None
        self.end(problem)

    def end(self, error: str | None) -> None:
        """Once: hand the socket back to the server."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            if self._watch is not None:
                self._watch.close()
        if self._timer is not None:
            self._timer.cancel()
        self._server.handshake_ended(self, error)
