"""The debug server of a driver: ``http://localhost:3333/debug/bigmachine/``, where `routes` says what there is.

Most sessions are never looked at, and pay for a listening socket alone: the reactor watches it, and what serves HTTP is
imported, and gets its thread, when the first client connects.

It binds to loopback unless told otherwise. Everything that answers there is for whoever can connect: logs, profiles, names of
files. Against pages of other sites in the user's own browser, which can connect too, there is `guard`.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UsageError
from ..rpc.reactor import Watch, reactor, report_bug
from .cluster import Cluster
from .settings import ANY, HTTP, OFF, PREFIX

if TYPE_CHECKING:
    from .serving import Serving

FURTHER = 100
"""Ports that are tried after one that is taken: by other drivers, mostly, of which a host has fewer."""

BACKLOG = 128
"""Connections that wait for the server's thread, which takes 0.2 s to start: a browser opens six."""

END_WITHIN = 2.0
"""Seconds in which the server must have ended. A client that does not read is not waited for."""

LOOPBACK = ("127.0.0.1", "::1")


class Place(NamedTuple):
    """Where to listen. An empty `host` is every address of this host."""

    host: str
    port: int


def parse(where: str) -> Place | None:
    """``"localhost:3333"``, ``":3333"``, ``"[::1]:3333"``; None for "off". Port 0 is any free one. Raises `UsageError`."""
    if where == OFF:
        return None
    host, colon, number = where.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    try:
        port = int(number) if number.isascii() and number.isdigit() else -1
        if not colon or not 0 <= port <= 65535 or (":" in host) != bracketed:
            raise ValueError
        if bracketed:
            ipaddress.IPv6Address(host.partition("%")[0])
        elif any(letter.isspace() or letter in "/?#@[]" for letter in host):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"not a place for the debug page: {where!r}; give host:port, such as {HTTP}, or {OFF}"
        ) from None
    return Place(host, port)


def start(session: Cluster, where: str = HTTP) -> DebugServer | None:
    """Listen at `where`, or, where its port is taken, at the next free one, and say so. None for "off".

    Raises `UsageError` where that cannot be.
    """
    place = parse(where)
    if place is None:
        return None
    server = DebugServer(session, place.host, listen(place))
    if any(not _is_loopback(sock.getsockname()[0]) for sock in server.sockets):
        session.say(f"anybody who can reach {server.authority} can read this session's logs and profiles")
    session.say(f"status at {server.address}")
    return server


# -- The sockets ---------------------------------------------------------------------------------------------------------


def listen(place: Place) -> list[socket.socket]:
    """Listening sockets, all with the same port: ``localhost`` has two addresses where there is IPv6, and whoever takes only
    one of them would leave it to chance who answers. Raises `UsageError`."""
    try:
        addresses = _addresses(place.host)
    except (OSError, UnicodeError) as error:  # A label that is too long for a name is the latter.
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen at {place.host[:100]!r} for the debug page: {why}") from None
    for port in range(place.port, min(place.port + FURTHER, 65535) + 1):
        try:
            return _bound(addresses, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UsageError(
                    f"cannot listen at {place.host}:{port} for the debug page: {error.strerror or error}"
                ) from None
    last = min(place.port + FURTHER, 65535)
    raise UsageError(f"no free port for the debug page from {place.port} to {last}: give another, or -bigm.http={OFF}")


def _addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    if host == "localhost":
        return [(socket.AF_INET, LOOPBACK[0]), *([(socket.AF_INET6, LOOPBACK[1])] if _has_ipv6() else [])]
    found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    addresses = {(family, str(address[0])): None for family, _, _, _, address in found}
    return [each for each in addresses if each[0] == socket.AF_INET or _has_ipv6()]


def _has_ipv6() -> bool:
    if not socket.has_ipv6:
        return False
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind((LOOPBACK[1], 0))
    except OSError:
        return False
    return True


def _bound(addresses: Sequence[tuple[socket.AddressFamily, str]], port: int) -> list[socket.socket]:
    """Raises OSError, and leaves nothing open then. Of port 0, the first address decides; the others may find it taken."""
    sockets: list[socket.socket] = []
    try:
        for family, address in addresses:
            # Named, else asyncio does not see that connections are of TCP, and each answer waits 40 ms for an acknowledgement.
            sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # What a driver just before has left lingers.
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address, port))
            port = sock.getsockname()[1]
        for sock in sockets:
            sock.listen(BACKLOG)
            sock.setblocking(False)
    except BaseException:  # Ctrl-C, too: no port stays taken.
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


# -- The server ----------------------------------------------------------------------------------------------------------


class DebugServer:
    """Serves what can be seen of `session`, from now on. `address` is where to look, `authority` its host and port."""

    def __init__(self, session: Cluster, host: str, sockets: Sequence[socket.socket]) -> None:
        self.sockets = sockets
        self.host = host
        self.port: int = sockets[0].getsockname()[1]
        shown = socket.gethostname() if host in ANY else host
        self.authority = f"[{shown}]:{self.port}" if ":" in shown else f"{shown}:{self.port}"
        self.address = f"http://{self.authority}{PREFIX}/"
        self._session = session
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._serving: Serving | None = None
        self._closed = False
        self._watches: list[Watch] = [reactor().watch(sock.fileno(), lambda _: self._begin()) for sock in sockets]
        _servers.add(self)
        for watch in self._watches:
            watch.arm()

    def close(self) -> None:
        """End, within `END_WITHIN` seconds: answers that are under way end as they are. Idempotent."""
        with self._lock:
            first, self._closed = not self._closed, True
            thread, serving = self._thread, self._serving
        if not first:
            return
        self._unwatch()
        if thread is None:
            self._close_sockets()
            return
        if serving is not None:
            serving.close()
        thread.join(END_WITHIN)

    def forget(self) -> None:
        """In a fork of the driver: whoever connects is the driver's, and its port is free when the driver is gone."""
        self._closed = True
        self._close_sockets()

    def _begin(self) -> None:
        """Somebody has connected."""
        with self._lock:
            if self._closed or self._thread is not None:
                return
            thread = self._thread = threading.Thread(target=self._run, name="bigmachine-http", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # The interpreter is ending.
                self._thread = None
                return
        self._unwatch()

    def _unwatch(self) -> None:
        for watch in self._watches:
            watch.close()

    def _close_sockets(self) -> None:
        for sock in self.sockets:
            sock.close()

    def _run(self) -> None:
        try:
            from .serving import Serving  # The web server: 0.2 s, for those who look.

            serving = Serving(self._session, self.host, self.sockets)
            with self._lock:
                self._serving = serving
                if self._closed:
                    return
            serving.run()
        except BaseException:  # Nobody would hear of it.
            report_bug("the debug server")
        finally:
            self._close_sockets()


_servers: weakref.WeakSet[DebugServer] = weakref.WeakSet()


def _forget_after_fork() -> None:
    for server in list(_servers):
        server.forget()
    _servers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
