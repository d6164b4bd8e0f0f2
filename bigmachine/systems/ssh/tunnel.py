"""A port on this host that leads to a port of another host, through the SSH connection to it."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable

from paramiko import Channel

from ..remote import RemoteHostError

CHUNK = 1 << 18
"""Bytes read at once; paramiko sends them in packets of 32 KiB."""


class Tunnel:
    """Listens on 127.0.0.1 at `port`; each connection gets a channel out of `forward`. Threads carry `label` in their name."""

    def __init__(self, forward: Callable[[], Channel], label: str) -> None:
        self._forward = forward
        self._label = label
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._awake, self._wake = socket.socketpair()
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._closed = threading.Event()
        self._thread = self._start(self._accept)

    def _start(self, run: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=run, name=f"bigmachine-tunnel-{self._label}", daemon=True)
        thread.start()
        return thread

    def _accept(self) -> None:
        while True:
            select.select([self._listener, self._awake], [], [])
            if self._closed.is_set():
                return
            try:
                sock, _ = self._listener.accept()
            except OSError:  # Whoever it was has gone again; or there are no more descriptors for now.
                continue
            self._start(lambda sock=sock: self._serve(sock))  # type: ignore[misc]

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            try:
                channel = self._forward()
            except RemoteHostError:
                return  # Who connected is hung up on, as by a port that nobody listens at any more.
            link = _Link(sock, channel)
            with self._lock:
                self._links.add(link)
            try:
                if not self._closed.is_set():
                    other = self._start(link.to_there)
                    link.to_here()
                    other.join()
            finally:
                link.close()
                with self._lock:
                    self._links.discard(link)

    def close(self) -> None:
        """Close the port and all that goes through it. Idempotent."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            links = list(self._links)
        self._wake.close()
        self._thread.join()
        self._listener.close()
        self._awake.close()
        for link in links:
            link.close()


class _Link:
    """One connection through the tunnel."""

    def __init__(self, sock: socket.socket, channel: Channel) -> None:
        self._sock = sock
        self._channel = channel
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def to_there(self) -> None:
        try:
            while data := self._sock.recv(CHUNK):
                self._channel.sendall(data)
            self._channel.shutdown_write()
        except (OSError, EOFError):  # Either end has gone, so the other is to go.
            self.close()

    def to_here(self) -> None:
        try:
            while data := self._channel.recv(CHUNK):
                self._sock.sendall(data)
            self._sock.shutdown(socket.SHUT_WR)
        except (OSError, EOFError):
            self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError, EOFError):
            self._channel.close()
