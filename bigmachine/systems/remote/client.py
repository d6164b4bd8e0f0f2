"""The driver's side of one agent's HTTPS: see `bigmachine.bootstrap.agent` for what is said."""

from __future__ import annotations

import http.client
import json
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...bootstrap.agent import PROTOCOL
from ...credentials import agent_server_name
from . import AgentUnreachable, RemoteHostError

CHUNK = 1 << 18
"""Bytes sent at once."""

TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""

RETRY_WITHIN = 90.0
"""Seconds for which a broken upload is tried again, since its last progress. Below the two minutes for which agents keep it."""

PAUSES = (0.1, 0.3, 1.0, 2.0, 5.0)
"""Seconds before each further try; the last one again and again."""

BUSY = 0.1
"""Seconds between two looks whether somebody else has finished sending a part."""

LAY_OUT = 300.0
"""Seconds that `execute` may take: hard links for every file of the program, on a slow disk."""

LOOK = 5.0
"""Seconds without an answer after which `execute` looks who listens by now; and those that a look takes at most."""

LOOK_WITHIN = 60.0
"""Seconds for which that is tried: a machine that no driver has called for so long after its start ends itself."""


@dataclass(frozen=True)
class AgentInfo:
    """What an agent says about its host. `pythons` are (minor version, path), `parts` the digests that it holds, `free` bytes;
    agents with the same `store` share a cache; `secret` is what tickets for its parts are made with. `ages`: how many seconds
    ago things began, as it answered: ``kernel``, ``init``, ``agent``, and what its settings name (`bootstrap.agent.ages`)."""

    id: str
    hostname: str
    platform: str
    glibc: str
    cpus: int
    pythons: tuple[tuple[str, str], ...]
    parts: frozenset[str]
    free: int
    store: str
    secret: str = field(repr=False)
    protocol: int
    ages: Mapping[str, float]


@dataclass(frozen=True)
class Peer:
    """Where another agent may fetch a part, and by what right."""

    host: str
    port: int
    name: str
    ticket: str = field(repr=False)


class _Refused(Exception):
    """The agent's answer was an error."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        super().__init__(str(body.get("error") or f"status {status}"))
        self.status = status
        self.body = body


class _Replaced(Exception):
    """Somebody else listens where the agent did."""


class AgentClient:
    """One agent. Usable from several threads; each request takes a connection that is free, or a new one.

    `host` and `port` are where it listens, as this process sees it; `connect` makes a connected socket otherwise (it is given
    seconds). All methods raise `AgentUnreachable` where nobody answers, and `RemoteHostError` with the agent's own words.
    """

    def __init__(
        self,
        host: str,
        port: int,
        launch_id: str,
        context: ssl.SSLContext,
        connect: Callable[[float], socket.socket] | None = None,
    ) -> None:
        self.host = host
        self.port = port
        self.launch_id = launch_id
        self.name = agent_server_name(launch_id)
        self.address = f"{host}:{port}"
        self._context = context
        self._connect = connect
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self.closed = False

    # -- Requests --------------------------------------------------------------------------------------------------------

    def info(self, timeout: float = TIMEOUT, python: str = "") -> AgentInfo:
        """What it is. With `python`, a minor version, all its interpreters only where it has none of that: to find one is
        quicker. Tried once: who waits for an agent to come up knows how long to."""
        answer = self._once("GET", f"/info?python={python}", timeout=timeout)
        if answer["agent"] != PROTOCOL:
            raise RemoteHostError(self.host, f"its agent speaks version {answer['agent']}, not {PROTOCOL}")
        return AgentInfo(
            id=answer["id"],
            hostname=answer["hostname"],
            platform=answer["platform"],
            glibc=answer["glibc"],
            cpus=answer["cpus"],
            pythons=tuple((each["version"], each["path"]) for each in answer["pythons"]),
            parts=frozenset(answer["parts"]),
            free=answer["free"],
            store=answer["store"],
            secret=answer["secret"],
            protocol=answer["agent"],
            ages=answer["ages"],
        )

    def put_part(self, digest: str, size: int, path: Path, progress: Callable[[int], None] | None = None) -> int:
        """Send the part whose compressed form is the file `path`; `size` is that of its tar. Where the connection breaks, it
        goes on where the agent got to. `progress` is called with each number of bytes that were sent; the sum is returned."""
        sent = 0

        def count(n: int) -> None:
            nonlocal sent
            sent += n
            tries.progressed()
            if progress is not None:
                progress(n)

        tries = _Tries(self)
        offset: int | None = 0
        while offset is not None:
            try:
                self._put(digest, size, path, offset, count)
                return sent
            except _Refused as refused:
                if refused.status != 409:
                    raise RemoteHostError(self.host, str(refused)) from None
                offset = self._await_turn(digest)
            except (OSError, http.client.HTTPException) as error:
                tries.failed(error)
                offset = self._arrived(digest, tries)
        return sent

    def _put(self, digest: str, size: int, path: Path, offset: int, count: Callable[[int], None]) -> None:
        with open(path, "rb") as file, self._connection(TIMEOUT) as connection:
            length = os.fstat(file.fileno()).st_size - offset
            file.seek(offset)
            connection.putrequest("PUT", f"/parts/{digest}?size={size}")
            connection.putheader("Upload-Offset", str(offset))
            connection.putheader("Content-Length", str(length))
            connection.endheaders()
            try:
                while data := file.read(CHUNK):
                    connection.send(data)
                    count(len(data))
            except (BrokenPipeError, ConnectionError, ssl.SSLError) as error:
                try:
                    _answer(connection)  # It may have said why, before it hung up.
                except (OSError, http.client.HTTPException):
                    raise error from None
            _answer(connection)

    def _arrived(self, digest: str, tries: _Tries) -> int | None:
        """How far a part has got, None where it is there; asks until there is an answer."""
        while True:
            try:
                return self._offset(digest)
            except _Refused as refused:
                raise RemoteHostError(self.host, str(refused)) from None
            except (OSError, http.client.HTTPException) as error:
                tries.failed(error)

    def _await_turn(self, digest: str) -> int | None:
        """As `_arrived`, while somebody else seems to be sending it: as long as that goes on."""
        tries = _Tries(self)
        last, since = -1, time.monotonic()
        while True:
            offset = self._arrived(digest, tries)
            if offset is None or (offset == last and time.monotonic() - since > 20 * BUSY):
                return offset
            if offset != last:
                last, since = offset, time.monotonic()
            time.sleep(BUSY)

    def _offset(self, digest: str) -> int | None:
        with self._connection(TIMEOUT) as connection:
            connection.request("HEAD", f"/parts/{digest}")
            response = connection.getresponse()
            response.read()
            if response.status not in (200, 204):
                raise _Refused(response.status, {"error": response.headers.get("Upload-Error", "")})
            return None if response.status == 200 else int(response.headers["Upload-Offset"])

    def fetch(self, digest: str, size: int, peers: Sequence[Peer], timeout: float = 600.0) -> None:
        """Let the agent get a part from one of `peers`. Returns when it is there."""
        wanted = [{"host": peer.host, "port": peer.port, "name": peer.name, "ticket": peer.ticket} for peer in peers]
        self._once("POST", "/fetch", {"digest": digest, "size": size, "from": wanted}, timeout)

    def execute(self, request: Mapping[str, Any]) -> int:
        """Let the agent become a machine: fields as in `bootstrap.agent._Plan`. Returns its maxprocs.

        Where the answer is lost, who listens there by now decides: the agent is asked again; anybody else is taken for the
        machine. That may be a stranger, which shows when the machine's own certificate is asked for, which comes next.
        """
        maxprocs: int = request["maxprocs"]
        tries, deadline = _Tries(self, LOOK_WITHIN), time.monotonic() + LAY_OUT
        while True:
            try:
                maxprocs = self._execute(request, tries, deadline)
                break
            except _Refused as refused:
                if not refused.body.get("becoming"):
                    raise RemoteHostError(self.host, str(refused)) from None
                break  # An earlier request has arrived.
            except _Replaced:
                break
            except (OSError, http.client.HTTPException) as error:
                if time.monotonic() > deadline:
                    raise AgentUnreachable(self.address, _reason(error)) from error
                tries.failed(error)
        self.close()
        return maxprocs

    def _execute(self, request: Mapping[str, Any], tries: _Tries, deadline: float) -> int:
        try:
            with self._connection(TIMEOUT) as connection:
                connection.request("POST", "/exec", json.dumps(request).encode())
                while not _readable(connection.sock, LOOK) and time.monotonic() < deadline:
                    self._look(tries)
                    tries.progressed()
                maxprocs: int = _answer(connection)["maxprocs"]
                return maxprocs
        except (OSError, http.client.HTTPException):
            self._look(tries)
            raise

    def _look(self, tries: _Tries) -> None:
        """Returns where the agent listens. Raises `_Replaced` where somebody else does, `AgentUnreachable` where nobody."""
        while True:
            try:
                self.open(LOOK).close()
                return
            except ConnectionRefusedError as error:
                raise AgentUnreachable(self.address, "it has ended, and no machine took its place") from error
            except (ssl.SSLError, ConnectionError) as error:
                raise _Replaced from error
            except OSError as error:
                tries.failed(error)

    def shutdown(self) -> None:
        """Ask the agent to end; does not raise."""
        try:
            self._once("POST", "/shutdown", {}, 5.0)
        except (AgentUnreachable, RemoteHostError):
            pass  # It has gone, most likely; else its idle timer ends it.
        self.close()

    def close(self) -> None:
        """Hang up. What is under way fails when its connection does, and is not tried again."""
        with self._lock:
            self.closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    # -- Connections -----------------------------------------------------------------------------------------------------

    def _once(self, method: str, path: str, body: Any = None, timeout: float = TIMEOUT) -> Any:
        try:
            with self._connection(timeout) as connection:
                connection.request(method, path, None if body is None else json.dumps(body).encode())
                return _answer(connection)
        except _Refused as refused:
            raise RemoteHostError(self.host, str(refused)) from None
        except (OSError, http.client.HTTPException) as error:
            raise AgentUnreachable(self.address, _reason(error)) from error

    @contextmanager
    def _connection(self, timeout: float) -> Iterator[http.client.HTTPConnection]:
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None and _hung_up(connection):
            connection.close()
            connection = None
        if connection is None:
            connection = _Connection(self)
        try:
            connection.timeout = min(timeout, TIMEOUT)
            if connection.sock is None:
                connection.connect()
            connection.sock.settimeout(timeout)
            yield connection
        except BaseException:
            connection.close()
            raise
        with self._lock:
            if connection.sock is not None and not self.closed:
                self._idle.append(connection)
                return
        connection.close()

    def open(self, timeout: float) -> ssl.SSLSocket:
        """A new connection to the agent, which has proved to be the right one."""
        if self._connect is not None:
            raw = self._connect(timeout)
            try:
                raw.settimeout(timeout)
                return self._context.wrap_socket(raw, server_hostname=self.name)
            except BaseException:
                raw.close()
                raise
        failure: OSError | None = None
        for family, kind, protocol, _, address in socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM):
            # Wrapped before it is connected: where the peer resets it between the two, Python would forget to close it.
            sock = self._context.wrap_socket(socket.socket(family, kind, protocol), server_hostname=self.name)
            try:
                sock.settimeout(timeout)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.connect(address)
                return sock
            except OSError as error:
                sock.close()
                failure = error
            except BaseException:
                sock.close()
                raise
        assert failure is not None  # There is an address, or the system has raised that there is none.
        try:
            raise failure
        finally:
            del failure  # It refers to this frame.


class _Connection(http.client.HTTPConnection):
    def __init__(self, client: AgentClient) -> None:
        super().__init__(client.host, client.port, timeout=TIMEOUT)
        self._client = client

    def connect(self) -> None:
        self.sock = self._client.open(self.timeout or TIMEOUT)


class _Tries:
    """How often something may fail."""

    def __init__(self, client: AgentClient, within: float = 0.0) -> None:
        self._client = client
        self._within = within or RETRY_WITHIN
        self.progressed()

    def progressed(self) -> None:
        self._count = 0
        self._deadline = time.monotonic() + self._within

    def failed(self, error: Exception) -> None:
        """Waits before the next try. Raises `AgentUnreachable` where there is none."""
        pause = PAUSES[min(self._count, len(PAUSES) - 1)]
        self._count += 1
        hopeless = self._client.closed or isinstance(error, ssl.SSLCertVerificationError)
        if hopeless or time.monotonic() + pause > self._deadline:
            raise AgentUnreachable(self._client.address, _reason(error)) from error
        time.sleep(pause)


def _answer(connection: http.client.HTTPConnection) -> Any:
    response = connection.getresponse()
    data = response.read()
    try:
        body = json.loads(data) if data else {}
    except ValueError:
        body = {"error": data[:200].decode("utf-8", "replace")}
    if response.status >= 400:
        raise _Refused(response.status, body)
    return body


def _hung_up(connection: http.client.HTTPConnection) -> bool:
    """Whether the agent has closed a connection on which nothing is under way."""
    return connection.sock is None or _readable(connection.sock, 0.0)


def _readable(sock: socket.socket, within: float) -> bool:
    poll = select.poll()  # Not `select`: a driver of many machines has more descriptors than that knows.
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(within * 1000))


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"not its agent answers there, but a proxy or another host of that address ({error.verify_message})"
    return str(error) or type(error).__name__
