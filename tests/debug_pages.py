"""A session's debug pages, asked as any client would: for tests."""

from __future__ import annotations

import http.client
import threading
from typing import NamedTuple

from bigmachine.inside.server import DebugServer
from bigmachine.testing.conformance import SOON

PATH = "/debug/bigmachine"


class Echo:
    def echo(self, what: object) -> object:
        return what


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def line(self) -> str:
        """Of an error: its only one."""
        (line,) = self.body.decode().splitlines()
        return line


def ask(served: DebugServer, path: str, method: str = "GET", **headers: str) -> Answer:
    """`headers` with underscores for dashes; names in the answer are in lower case."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=SOON)
    try:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=sent)
        answer = connection.getresponse()
        return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


THREADS = ("bigmachine-http", "bigmachine-status")


def serving() -> set[threading.Thread]:
    """The threads of servers and monitors."""
    return {each for each in threading.enumerate() if each.name in THREADS}
