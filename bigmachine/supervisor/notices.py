"""Notices that a machine will be taken away, from the metadata service of its instance: EC2's, version 2.

Two documents, each missing (404) until there is something to say: ``spot/instance-action``, two minutes before the end of a
spot instance, and ``events/recommendations/rebalance``, which is earlier, and no more than a probability. The service wants to
be asked with a token (401 where that has expired).

The requests are made by hand: `http.client` takes 25 ms to import, and a machine is waited for while it starts.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from ..info import Notice

POLL = 5.0
"""Seconds between two looks, as AWS recommends."""

TIMEOUT = 2.0
"""Seconds for an answer, which comes from the host below this one."""

TOKEN_LIFE = 6 * 3600
"""Seconds; no token may live longer."""

MAX_DOCUMENT = 64 * 1024

ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
TOKEN = "/latest/api/token"


class NoAnswer(Exception):
    """The metadata service did not say, this time."""


class Notices:
    """What the metadata service at `url` (``http://host[:port]``) says."""

    def __init__(self, url: str) -> None:
        scheme, _, self._host = url.partition("://")
        if scheme != "http":
            raise ValueError(f"not the address of a metadata service: {url!r}")
        host, _, port = self._host.partition("]" if self._host.startswith("[") else ":")
        self._address = (host.lstrip("["), int(port.lstrip(":") or 80))
        self._token = ""
        self._said: set[Notice] = set()

    def look(self) -> list[Notice]:
        """What is new. Raises `NoAnswer`."""
        new = []
        for path, read in ((ACTION, _interruption), (REBALANCE, _rebalance)):
            document = self._get(path)
            if document is not None and (notice := read(document)) not in self._said:
                self._said.add(notice)
                new.append(notice)
        return new

    def _get(self, path: str) -> Any:
        """A document; None where there is none."""
        status, body = self._request("GET", path, f"X-aws-ec2-metadata-token: {self._token}") if self._token else (401, b"")
        if status == 401:
            self._token = self._new_token()
            status, body = self._request("GET", path, f"X-aws-ec2-metadata-token: {self._token}")
        if status == 404:
            return None
        if status != 200:
            raise NoAnswer(f"{path}: status {status}")
        try:
            return json.loads(body)
        except ValueError as error:
            raise NoAnswer(f"{path}: {error}") from None

    def _new_token(self) -> str:
        status, body = self._request("PUT", TOKEN, f"X-aws-ec2-metadata-token-ttl-seconds: {TOKEN_LIFE}")
        token = body.decode("latin-1").strip()
        if status != 200 or not token.isprintable():
            raise NoAnswer(f"{TOKEN}: status {status}")
        return token

    def _request(self, method: str, path: str, header: str) -> tuple[int, bytes]:
        request = f"{method} {path} HTTP/1.0\r\nHost: {self._host}\r\nContent-Length: 0\r\n{header}\r\n\r\n"
        answer = b""
        try:
            with socket.create_connection(self._address, TIMEOUT) as sock:
                sock.sendall(request.encode("latin-1"))
                while len(answer) < MAX_DOCUMENT and (data := sock.recv(MAX_DOCUMENT)):
                    answer += data
        except OSError as error:
            raise NoAnswer(f"{path}: {error}") from None
        head, _, body = answer.partition(b"\r\n\r\n")
        words = head.split(maxsplit=2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1") or not words[1].isdigit():
            raise NoAnswer(f"{path}: no HTTP: {answer[:80]!r}")
        return int(words[1]), body


def watch(url: str, notify: Callable[[Notice], None], pause: Callable[[float], object] = time.sleep) -> None:
    """Look again and again; for a thread of its own. The first time after a while, as the machine has just begun to start; and
    whoever does not answer is asked again: there is nothing else that could be done about it. Ends when `pause` says true."""
    notices = Notices(url)
    while not pause(POLL):
        try:
            for notice in notices.look():
                notify(notice)
        except NoAnswer:
            pass


def _interruption(document: Any) -> Notice:
    """``{"action": "terminate", "time": "2026-11-22T15:57:44Z"}``; the action may be ``stop`` or ``hibernate``, too."""
    action, deadline = _field(document, "action"), _time(_field(document, "time"))
    verb = {"terminate": "terminated", "stop": "stopped", "hibernate": "hibernated"}.get(action, f"taken away ({action})")
    return Notice("interruption", deadline, f"the instance will be {verb} at {_clock(deadline)}: spot capacity is needed")


def _rebalance(document: Any) -> Notice:
    """``{"noticeTime": "2026-11-22T15:57:44Z"}``"""
    said = _time(_field(document, "noticeTime"))
    return Notice("rebalance", None, f"the instance is at elevated risk of interruption, EC2 said at {_clock(said)}")


def _field(document: Any, name: str) -> str:
    value = document.get(name) if isinstance(document, dict) else None
    if not isinstance(value, str):
        raise NoAnswer(f"no {name} in {document!r}")
    return value


def _time(text: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise NoAnswer(f"not a time: {text!r}") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _clock(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).strftime("%H:%M:%S UTC")
