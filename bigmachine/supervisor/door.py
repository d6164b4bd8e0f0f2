"""The machine's one listener. It looks at the first bytes of every connection and passes it on, untouched.

The bytes are peeked at (`MSG_PEEK`) until the TLS ClientHello is whole; its server name says which process the connection
is for. The handshake happens there: nothing is proxied. A connection that does not say what it wants within
`HELLO_TIMEOUT`, or says it wrongly, is closed and logged.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable

from ..credentials import parse_server_name
from ..rpc.reactor import READ, Reactor
from .hello import MAX_HELLO, NotTls, server_name

HELLO_TIMEOUT = 10.0
"""Seconds that a peer has for its first message: a round trip, however slow the network."""

MAX_WAITING = 500
"""Connections whose ClientHello is awaited; more are closed at once, so that descriptors are left for others."""

BACKLOG = 1024

STALL = 0.1
"""Seconds until the next look at a peer of whom there is no more to see than before."""


class Door:
    """Accepts on `listener`, and calls `route(process, socket)`; process None is the supervisor itself.

    `route` owns the socket from then on, must not block, and may raise `ValueError` with the reason for not having it.
    """

    def __init__(
        self,
        listener: socket.socket,
        machine: str,
        route: Callable[[int | None, socket.socket], None],
        reactor: Reactor,
        log: Callable[[str], None],
    ) -> None:
        self._listener = listener
        self._machine = machine
        self._route = route
        self._reactor = reactor
        self._log = log
        self._lock = threading.Lock()
        self._waiting: set[_Visitor] = set()
        self._closed = False
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._watch = reactor.watch(listener.fileno(), self._on_ready)
        self._watch.arm(READ)

    def _on_ready(self, _: int) -> None:
        while not self._closed:
            try:
                sock, _address = self._listener.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if not self._closed:
                    self._log(f"cannot accept a connection: {error.strerror}")
                    self._reactor.call_later(0.1, lambda: self._watch.arm(READ))  # Out of descriptors, most likely.
                return
            sock.setblocking(False)
            visitor = _Visitor(sock, self)
            with self._lock:
                full = len(self._waiting) >= MAX_WAITING
                if not full:
                    self._waiting.add(visitor)
            if full:
                visitor.leave(f"more than {MAX_WAITING} connections have not said what they want")
            else:
                visitor.start()
        self._watch.arm(READ)

    def admit(self, visitor: _Visitor, name: str) -> None:
        """The visitor has named whom he wants."""
        self.forget(visitor)
        try:
            machine, process = parse_server_name(name)
            if machine != self._machine:
                raise ValueError(f"it wants machine {machine}; this is {self._machine}")
            self._route(process, visitor.sock)
        except ValueError as error:
            visitor.sock.close()
            self._log(f"closed a connection from {visitor.peer}: {error}")

    def turn_away(self, visitor: _Visitor, reason: str) -> None:
        """Close and log."""
        self.forget(visitor)
        visitor.sock.close()
        if not self._closed:
            self._log(f"closed a connection from {visitor.peer}: {reason}")

    def forget(self, visitor: _Visitor) -> None:
        """The visitor is not waiting any more."""
        with self._lock:
            self._waiting.discard(visitor)

    @property
    def reactor(self) -> Reactor:
        return self._reactor

    def close(self) -> None:
        """Accept no more; close those that have not said what they want."""
        self._closed = True
        self._watch.close()
        self._listener.close()
        with self._lock:
            waiting = list(self._waiting)
        for visitor in waiting:
            visitor.leave("the machine is stopping")


class _Visitor:
    """A connection whose ClientHello is awaited."""

    def __init__(self, sock: socket.socket, door: Door) -> None:
        self.sock = sock
        try:
            self.peer = "{}:{}".format(*sock.getpeername()[:2])
        except OSError:
            self.peer = "a peer that has gone"
        self._door = door
        self._lock = threading.Lock()
        self._over = False
        self._seen = -1
        self._watch = door.reactor.watch(sock.fileno(), self._look)
        timeout = f"no TLS ClientHello within {HELLO_TIMEOUT:g} s"
        self._timer = door.reactor.call_later(HELLO_TIMEOUT, lambda: self.leave(timeout))

    def start(self) -> None:
        """Look at what is there already: most often, all."""
        self._look(READ)

    def _look(self, _: int) -> None:
        with self._lock:
            if self._over:
                return
            problem = ""
            try:
                data = self.sock.recv(MAX_HELLO, socket.MSG_PEEK)
                if not data:
                    raise NotTls("it ended before it said what it wants")
                name = server_name(data)
                if name is None:
                    stalled, self._seen = len(data) == self._seen, len(data)
                    if len(data) >= MAX_HELLO:
                        raise NotTls(f"a ClientHello of more than {MAX_HELLO} bytes")
                    if _hung_up(self.sock):
                        raise NotTls("it ended before it said what it wants")
                    # Peeked bytes stay readable: wake when there are more than these.
                    self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, len(data) + 1)
                    if stalled:  # A system that does not know of this mark, or of hanging up.
                        self._door.reactor.call_later(STALL, lambda: self._watch.arm(READ))
                        return
            except BlockingIOError:
                name = None
            except (NotTls, OSError) as error:
                problem, name = str(error), ""
            if name is None:
                self._watch.arm(READ)
                return
            self._over = True
            self._watch.close()
        self._timer.cancel()
        if problem:
            self._door.turn_away(self, problem)
            return
        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        except OSError:
            pass  # It has gone; whoever gets it will notice.
        self._door.admit(self, name)

    def leave(self, reason: str) -> None:
        """Give up waiting."""
        with self._lock:
            if self._over:
                return
            self._over = True
            self._watch.close()
        self._timer.cancel()
        self._door.turn_away(self, reason)


def _hung_up(sock: socket.socket) -> bool:
    """Whether the peer will send no more, where the system tells that while there are bytes to read."""
    if not hasattr(select, "POLLRDHUP"):
        return False
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))
