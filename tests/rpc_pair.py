"""A server and a client of it over real TLS on the loopback interface, with reactors of their own, for the tests of `rpc`.

Whatever a test leaves behind (threads, descriptors, calls that were not completed, noise on stderr) fails it: `Pair.close`.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from bigmachine.authority import Authority
from bigmachine.credentials import Credentials, Role, client_context, peer_identity, server_context, server_name
from bigmachine.errors import UnknownMethod
from bigmachine.rpc.calls import Call
from bigmachine.rpc.client import Client
from bigmachine.rpc.codec import Codec
from bigmachine.rpc.methods import Gate, Method
from bigmachine.rpc.reactor import READ, Reactor
from bigmachine.rpc.server import Server
from bigmachine.rpc.streams import Stream
from bigmachine.services import method_kind, public_methods

SOON = 10.0
"""Seconds that anything may take which happens at once."""

AUTHORITY = Authority("s-test")
DRIVER = AUTHORITY.issue(Role.DRIVER, "driver")
MACHINE = AUTHORITY.issue(Role.MACHINE, "m-0123ab")
NAME = server_name("m-0123ab", 0)

SERVER_CONTEXT = server_context(MACHINE)
CLIENT_CONTEXT = client_context(DRIVER)


def until(condition: Callable[[], object], what: str = "") -> None:
    """Poll: for conditions that nobody tells of."""
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline, what or "it did not come about"
        time.sleep(0.001)


class Handler:
    """Serves the public methods of one object as ``T.<name>``; those in `gated` one at a time."""

    def __init__(self, service: object, gated: frozenset[str] = frozenset()) -> None:
        gate = Gate()
        self.methods = {
            f"T.{name}": Method(f"T.{name}", method_kind(function), function, gate if name in gated else None)
            for name, function in public_methods(service).items()
        }
        self.refuse: Exception | None = None

    def find(self, name: str, caller: object) -> Method:
        if self.refuse is not None:
            raise self.refuse
        method = self.methods.get(name)
        if method is None:
            raise UnknownMethod(name, f"service 'T' has no method {name!r}; it has {', '.join(self.methods)}")
        return method


class Listener:
    """Accepts, and hands each connection to `adopt`. `address` is where."""

    def __init__(self, reactor: Reactor, adopt: Callable[[socket.socket], None]) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.sock.setblocking(False)
        self.port: int = self.sock.getsockname()[1]
        self.adopt = adopt
        self.accepted = 0
        self._lock = threading.Lock()
        self._watch = reactor.watch(self.sock.fileno(), self._on_ready)
        self._watch.arm(READ)

    def _on_ready(self, _: int) -> None:
        with self._lock:
            if self._watch.closed:
                return
            try:
                sock, _address = self.sock.accept()
                self.accepted += 1
            except BlockingIOError:
                sock = None
            self._watch.arm(READ)
        if sock is not None:
            self.adopt(sock)

    def close(self) -> None:
        with self._lock:
            self._watch.close()
            self.sock.close()


class Pair:
    """See the module. `service` is what is served."""

    def __init__(self, service: object, gated: frozenset[str] = frozenset()) -> None:
        self.before = resources()
        self.logged: list[str] = []
        self.there = Reactor()
        self.here = Reactor()
        self.handler = Handler(service, gated)
        self.codec = Codec(stream_type=Stream)
        self.server = Server(
            self.handler, SERVER_CONTEXT, self.codec, self.there, identify=peer_identity, log=self.logged.append
        )
        self.listener = Listener(self.there, self.server.adopt)
        self.clients: list[Client] = []
        self.client = self.new_client()

    def new_client(self, credentials: Credentials | None = None, name: str = NAME, **options: Any) -> Client:
        context = CLIENT_CONTEXT if credentials is None else client_context(credentials)
        client = Client(
            "127.0.0.1", self.listener.port, name, context, self.codec, self.here, address="the machine", **options
        )
        self.clients.append(client)
        return client

    def call(self, method: str, *args: Any, timeout: float | None = SOON, **kwargs: Any) -> Any:
        return self.client.call(f"T.{method}", args, kwargs, timeout)

    def submit(self, method: str, *args: Any, timeout: float | None = None, **kwargs: Any) -> Call[Any]:
        call: Call[Any] = Call()
        self.client.submit(call, f"T.{method}", self.codec.encode_call(f"T.{method}", args, kwargs), timeout)
        return call

    def stream(self, method: str, *args: Any, timeout: float | None = SOON, **kwargs: Any) -> Any:
        return self.client.stream(f"T.{method}", args, kwargs, timeout)

    def server_connection(self) -> Any:
        (connection,) = self.server._all()
        return connection

    def close(self) -> None:
        for client in self.clients:
            connection = client._connection
            client.close()
            if connection is not None:
                assert not connection._pendings
                until(lambda c=connection: not c._exchanges, "calls were not completed")
                assert connection._slots._value == 255, "a slot of a stream was not given back"
        self.listener.close()
        self.server.close()
        self.here.close()
        self.there.close()
        try:
            until(lambda: resources() <= self.before)
        except AssertionError:
            left = sorted(resources() - self.before)
            raise AssertionError(f"{len(left)} things were left behind: {left[:10]}") from None


def resources() -> set[str]:
    """Threads and descriptors of this process, by name. Descriptors are counted: their numbers are reused."""
    threads = {f"thread {thread.name} {thread.ident}" for thread in threading.enumerate()}
    count = len(os.listdir("/dev/fd"))
    return threads | {f"descriptor {i}" for i in range(count)}
