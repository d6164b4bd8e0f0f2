"""How commands ask a driver that runs: over HTTP, at the address of its debug page. What there is to ask is in `inside.routes`.

Who asks must be told three things apart: that nobody answers (an error, with the way to another address), that somebody else
does (the same), and that a driver has answered before and does not any more (`Gone`): its program has ended, most likely.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from ..errors import BigmachineError, UsageError
from .arguments import DRIVER
from .exits import Gone

PREFIX = "/debug/bigmachine"
"""Where the page is, on a driver's own server; elsewhere the program has chosen. As in `inside.server`."""

MARK = "X-Bigmachine"
"""A header of all answers of drivers."""

PATIENCE = 30.0
"""Seconds for an answer: a driver looks at all its machines for some of them, within a few seconds."""

MAX_LINE = 500
"""Characters of an error that the other side has worded."""

CHUNK = 1 << 16

HINT = "give the address that the driver has printed (`status at …`)"

_SEQUENCE = re.compile(
    r"\x1b\[([0-?]*)[ -/]*([@-~])|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
"""What does more to a terminal than to fill it: sequences, and control characters but for tab and line feed."""


@dataclass(frozen=True)
class Address:
    """Where a driver's page is. Made of what the user has written, by `parse`."""

    host: str
    port: int
    prefix: str = PREFIX
    secure: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.prefix}/"


def parse(text: str) -> Address:
    """``localhost:3333``, ``:3333``, ``3333``, ``[::1]:3333``, or a URL, of which a path is the prefix. Raises `UsageError`."""
    written = text.strip()
    bare = "://" not in written
    if bare:
        written = f":{written}" if written.isdecimal() else written
        written = f"http://{'localhost' if written.startswith(':') else ''}{written}"
    try:
        parts = urlsplit(written)
        port = parts.port
    except ValueError:  # Not a port, not an IPv6 address.
        parts, port = urlsplit(""), None
    host = parts.hostname or ""
    sound = parts.scheme in ("http", "https") and re.fullmatch(r"[\w.:%-]+", host) and "@" not in parts.netloc
    if not sound or port == 0:
        raise UsageError(f"not an address of a driver: {text!r}; give host:port or a URL, such as {DRIVER}")
    if port is None:
        port = int(DRIVER.rpartition(":")[2]) if bare else 443 if parts.scheme == "https" else 80
    path = quote(parts.path.rstrip("/"), safe="/%:@!$&'()*+,;=~")
    return Address(host, port, path or PREFIX, parts.scheme == "https")


class Driver:
    """A driver at an address. Each question has a connection of its own, so that several threads may ask."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._met = False

    @classmethod
    def at(cls, text: str) -> Driver:
        """As the user has written it. Raises `UsageError`; whether somebody is there, the first question shows."""
        return cls(parse(text))

    def meet(self) -> None:
        """Make sure that there is a driver, before something that takes long: from then on its silence is its end."""
        with self.ask("pprof/") as answer:
            answer.read()

    def text(self, path: str, **query: str | int | None) -> str:
        """What `path`, below the prefix, answers, without control characters."""
        with self.ask(path, query) as answer:
            return shown(answer.read().decode("utf-8", "replace"))

    def json(self, path: str, **query: str | int | None) -> Any:
        """The same, of JSON."""
        with self.ask(path, query) as answer:
            try:
                return json.loads(answer.read())
            except ValueError:
                raise BigmachineError(f"{self.address} has answered {path} with something that is no JSON") from None

    @contextlib.contextmanager
    def ask(
        self, path: str, query: Mapping[str, str | int | None] = MappingProxyType({}), patience: float | None = PATIENCE
    ) -> Iterator[Answer]:
        """The answer, to be read in the block. Values of `query` that are None are left out.

        `patience` is for each piece of it; None: however long it takes. Raises `UsageError` with what the driver says to
        a question that cannot be answered, `Gone`, `Slow`, and `BigmachineError` where there is no driver.
        """
        values = {name: value for name, value in query.items() if value is not None}
        target = f"{self.address.prefix}/{path}" + (f"?{urlencode(values)}" if values else "")
        connection = _connection(self.address, patience)
        try:
            with self._translated(patience):
                connection.connect()
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                connection.request("GET", target)
                response = connection.getresponse()
                self._check(response)
            self._met = True
            yield Answer(response, lambda: self._translated(patience))
        finally:
            connection.close()

    def _check(self, response: http.client.HTTPResponse) -> None:
        """Raises where it is not what was asked for."""
        if response.headers.get(MARK) is None:
            said = f"what answers there is something else ({response.status} {_line(response.reason)})"
            raise BigmachineError(f"no driver at {self.address}: {said}; {HINT}")
        if response.status >= 400:
            line = _line(response.read(CHUNK).decode("utf-8", "replace")) or _line(response.reason)
            if response.status >= 500 or response.status == 429:  # Nothing is wrong with the question.
                raise BigmachineError(f"the driver says: {line}")
            raise UsageError(line)
        if response.status != 200:
            raise BigmachineError(f"unexpected answer of {self.address}: {response.status} {_line(response.reason)}")

    @contextlib.contextmanager
    def _translated(self, patience: float | None) -> Iterator[None]:
        """Failures of the connection, as what they mean here. Around nothing else: who asks has files of his own."""
        try:
            yield
        except (http.client.HTTPException, OSError, UnicodeError) as error:
            reason = _reason(error, patience)
            if isinstance(error, TimeoutError):
                raise Slow(f"{self.address} does not answer: {reason}") from None
            if self._met:
                raise Gone(f"the driver at {self.address} has gone: {reason}") from None
            raise BigmachineError(f"no driver at {self.address}: {reason}; {HINT}") from None


class Slow(BigmachineError):
    """There was no answer in time. There may be one the next time."""


class Answer:
    """What a driver says, as it comes."""

    def __init__(
        self, response: http.client.HTTPResponse, translated: Callable[[], contextlib.AbstractContextManager[None]]
    ) -> None:
        self._response = response
        self._translated = translated

    def header(self, name: str) -> str:
        """Empty where there is none."""
        return self._response.headers.get(name, "")

    def read(self) -> bytes:
        """All of it."""
        return b"".join(self.pieces())

    def pieces(self) -> Iterator[bytes]:
        """What has come, as soon as it has. Raises where it ends before its end."""
        while True:
            with self._translated():
                piece = self._response.read1(CHUNK)
                if not piece and self._response.length:  # `read1` does not mind.
                    raise http.client.IncompleteRead(b"", self._response.length)
            if not piece:
                return
            yield piece


def shown(text: str, colours: bool = False) -> str:
    """`text` without what would do more to a terminal than to fill it; with its `colours`, or without."""
    return _SEQUENCE.sub(lambda found: found[0] if colours and found[2] == "m" else "", text)


def _connection(address: Address, patience: float | None) -> http.client.HTTPConnection:
    if address.secure:
        return http.client.HTTPSConnection(address.host, address.port, timeout=patience)
    return http.client.HTTPConnection(address.host, address.port, timeout=patience)


def _line(text: str) -> str:
    """The first line of what somebody else has worded."""
    lines = shown(text).strip().splitlines()
    return lines[0][:MAX_LINE] if lines else ""


def _reason(error: Exception, patience: float | None) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing within {patience:g} s" if patience is not None else "nothing for too long"
    if isinstance(error, http.client.RemoteDisconnected):  # Also a BadStatusLine, and a ConnectionError.
        return "the connection was closed without an answer"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection ended in the midst of the answer"
    if isinstance(error, ssl.SSLError | http.client.HTTPException):
        return "what answers there does not speak HTTP" + ("S" if isinstance(error, ssl.SSLError) else "")
    if isinstance(error, UnicodeError):
        return "that is no name of a host"
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return text[0].lower() + text[1:]
