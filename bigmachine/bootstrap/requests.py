"""The requests that an agent answers: what they are, and who may make them, stands in `agent`.

The standard library only, Python 3.9 and later.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .parts import CHUNK
from .store import Refused

PROVE_WITHIN = 10.0
"""Seconds that a connection has for its TLS handshake, and one without a certificate for each of its requests."""

STALL = 60.0
"""Seconds without a byte after which a connection counts as dead."""

MAX_JSON = 1 << 20
"""Bytes of a request other than an upload."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = STALL
    connection: ssl.SSLSocket

    @property
    def agent(self) -> Any:
        """The `agent.Agent` that was asked."""
        return self.server

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads it."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class does not understand."""
        self.answer(code, {"error": message or "no such request"})

    def do(self) -> None:
        """Any request."""
        agent = self.agent
        agent.visitors[self.connection] = float("inf")
        try:
            try:
                url = urlsplit(self.path)
                verb, _, digest = url.path[1:].partition("/")
                if verb == "parts" and not re.fullmatch("[0-9a-f]{64}", digest):
                    raise Refused(404, f"not a digest: {digest[:80]!r}")
                name = f"{self.command.lower()}_{verb}"
                if not (name == "get_parts" and self._has_ticket(digest)):
                    self._demand_driver()
                method = getattr(self, name, None)
                if method is None:
                    raise Refused(404, f"no such thing: {self.command} {url.path[:80]}")
                self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
                method(digest)
            except Refused as refused:
                self.answer(refused.status, refused.body)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                self.answer(400, {"error": f"not such a request: {type(error).__name__}: {error}"})
        except (OSError, EOFError):
            self.close_connection = True  # It has gone.
        agent.visitors[self.connection] = patience(self.connection)

    do_GET = do_HEAD = do_PUT = do_POST = do

    def _demand_driver(self) -> None:
        names: Any = (self.connection.getpeercert() or {}).get("subjectAltName", ())
        roles = [value.split("/")[3:4] for kind, value in names if kind == "URI"]
        if roles != [["driver"]]:
            raise Refused(403, "only the session's driver may do that")
        self.agent.touch()

    def _has_ticket(self, digest: str) -> bool:
        return hmac.compare_digest(self.headers.get("Ticket", "").encode(), ticket(self.agent.secret, digest).encode())

    def answer(self, status: int, body: Any = None, headers: Iterable[tuple[str, object]] = ()) -> None:
        """Send a reply. Where the request's own body was not read, the connection ends after it."""
        data = b"" if body is None else json.dumps(body).encode() + b"\n"
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, str(value))
        if status != 204:
            self.send_header("Content-Length", str(len(data)))
        if status >= 400:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        if status >= 400 and self.command in ("PUT", "POST"):
            self._drain()

    def _drain(self) -> None:
        """Let the peer send on for a moment: else the system would reset the connection, and our answer with it."""
        self.connection.settimeout(1.0)
        deadline = time.monotonic() + 2.0
        with contextlib.suppress(OSError, Refused):
            while time.monotonic() < deadline and self.connection.recv(CHUNK):
                pass

    def body(self) -> Iterator[bytes]:
        """The request's body, piece by piece. Raises EOFError where it is cut."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := self._length(self.rfile.readline(128).partition(b";")[0].decode("latin-1"), 16):
                yield from self._exactly(size)
                self.rfile.readline(128)
            while len(self.rfile.readline(1024)) > 2:
                pass  # Trailers.
        else:
            yield from self._exactly(self._length(self.headers.get("Content-Length", "0"), 10))

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size:
            data = self.rfile.read1(min(size, CHUNK))
            if not data:
                raise EOFError("the connection ended")
            self.agent.touch()
            size -= len(data)
            yield data

    def _length(self, text: str, base: int) -> int:
        if not text.strip():
            raise EOFError("the connection ended")
        try:
            if (size := int(text, base)) >= 0:
                return size
        except ValueError:
            pass
        raise Refused(400, f"not a length: {text[:80]!r}")

    def json(self) -> Any:
        data = b""
        for piece in self.body():
            data += piece
            if len(data) > MAX_JSON:
                raise Refused(413, f"a request of more than {MAX_JSON} bytes")
        try:
            return json.loads(data)
        except ValueError as error:
            raise Refused(400, f"not JSON: {error}") from None

    # -- Each ------------------------------------------------------------------------------------------------------------

    def get_info(self, _: str) -> None:
        self.answer(200, self.agent.info(self.query.get("python", "")))

    def head_parts(self, digest: str) -> None:
        upload = self.agent.uploads.get(digest)
        if self.agent.store.holds("parts", digest):
            self.answer(200)
        elif upload is not None and upload.over is not None:
            self.answer(upload.over.status, None, [("Upload-Error", upload.over)])
        else:
            self.answer(204, None, [("Upload-Offset", upload.offset if upload is not None else 0)])

    def get_parts(self, digest: str) -> None:
        if not self.agent.store.holds("parts", digest):
            raise Refused(404, f"no such part: {digest}")
        offset = self._length(self.headers.get("Upload-Offset", "0"), 10)
        with open(os.path.join(self.agent.store.path("parts", digest), "z"), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(min(offset, size))
            self.send_response(200)
            self.send_header("Content-Length", str(size - file.tell()))
            self.end_headers()
            while data := file.read(CHUNK):
                self.wfile.write(data)

    def put_parts(self, digest: str) -> None:
        if self.agent.store.holds("parts", digest):
            for _ in self.body():
                pass
        else:
            connection = self.connection
            size = self._length(self.query["size"], 10)
            offset = self._length(self.headers.get("Upload-Offset", "0"), 10)
            with self.agent.sending(digest, size, offset, lambda: cut_off(connection)) as upload:
                upload.feed(self.body())
        self.answer(201)

    def post_fetch(self, _: str) -> None:
        wanted = self.json()
        if not self.agent.store.holds("parts", wanted["digest"]):
            self.agent.fetch(wanted["digest"], wanted["size"], wanted["from"])
        self.answer(201)

    def post_exec(self, _: str) -> None:
        plan = self.agent.prepare(self.json())
        self.agent.become(plan)
        try:
            self.close_connection = True
            self.answer(200, {"address": plan.address, "maxprocs": plan.maxprocs}, [("Connection", "close")])
        finally:
            self.agent.answered()

    def post_shutdown(self, _: str) -> None:
        self.answer(200, {})
        self.agent.end("the driver said so")


def patience(connection: ssl.SSLSocket) -> float:
    """Until when the next request must have come."""
    return float("inf") if connection.getpeercert() else time.monotonic() + PROVE_WITHIN


def ticket(secret: str, digest: str) -> str:
    """What a peer shows to get a part."""
    return hmac.new(secret.encode(), digest.encode(), hashlib.sha256).hexdigest()


def cut_off(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # The connection's; SSLSocket's own would forget its TLS state.
