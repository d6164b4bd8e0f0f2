"""The control socket: what the supervisor and each of its service processes say to each other.

The wire: a stream socketpair (``AF_UNIX``). A message is a JSON object in UTF-8, its length in four bytes (big endian)
in front. A message may carry file descriptors; then it has the key ``"fds"``, their number, which `send` adds and which
is taken out again before the message is delivered. The descriptors travel with the message's first byte: a kernel may
glue bytes of several messages before it, but none after it, into one receive, so descriptors arrive in the order of the
messages that own them and never later than these. The receiver therefore keeps them in one queue, first in, first out.

Payloads that are not small travel as descriptors too (``os.memfd_create``); JSON is for orders, not for data.

The messages that this package itself defines (see ``processes`` and ``forking``):

====================  =======================  ====================================================================
from → to             message                  fields
====================  =======================  ====================================================================
process → supervisor  ``ready``                ``process``, ``pid``, ``single_threaded``: may it be forked?
supervisor → 0        ``fork``                 ``processes``: their indices, ``supervisor``: its pid; three descriptors
                                               for each: control socket, stdout, stderr
0 → supervisor        ``forked``               ``process`` and either ``pid`` or ``error``
====================  =======================  ====================================================================
"""

from __future__ import annotations

import array
import json
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import MutableMapping, Sequence
from typing import Any

from ..errors import BigmachineError

Message = dict[str, Any]

CONTROL = "BIGMACHINE_CONTROL"
"""The environment variable that tells a service process which descriptor its control socket is."""

MAX_MESSAGE = 16 << 20
"""Bytes of a message at most. Orders are small; the limit only keeps a confused peer from filling the memory."""

MAX_FDS = 96
"""Descriptors of one message at most: 32 replicas of 3 each. Linux allows 253 (``SCM_MAX_FD``), others fewer."""

SEND_TIMEOUT = 10.0
"""Seconds in which the far side must make room. The buffer holds hundreds of messages: who does not read for so long is
stuck in C code that holds the interpreter lock, and would not see the message any time soon."""

_CHUNK = 64 << 10
_HEADER = 4
_RIGHTS_SIZE = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)


class ControlError(BigmachineError):
    """The far end of a control socket sent something that is no message, or a message's descriptors were lost."""


def encode(message: Message, fds: int = 0) -> bytes:
    """`message`, which carries `fds` descriptors, as bytes."""
    if "fds" in message:
        raise ValueError("the key 'fds' of a control message is reserved for the number of its descriptors")
    if fds > MAX_FDS:
        raise ValueError(f"a control message carries at most {MAX_FDS} descriptors: {fds}")
    body = json.dumps({**message, "fds": fds} if fds else message, separators=(",", ":")).encode()
    if len(body) > MAX_MESSAGE:
        raise ValueError(f"a control message has at most {MAX_MESSAGE} bytes: {len(body)}; pass large data as a memfd")
    return len(body).to_bytes(_HEADER, "big") + body


class Decoder:
    """Turns the bytes and descriptors that arrive into messages. No I/O, except that `close` closes descriptors."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._fds: deque[int] = deque()

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> None:
        self._buffer += data
        self._fds.extend(fds)

    def pop(self) -> tuple[Message, list[int]] | None:
        """The next whole message with its descriptors, which are the caller's from now on; None until one is there."""
        if len(self._buffer) < _HEADER:
            return None
        size = int.from_bytes(self._buffer[:_HEADER], "big")
        if size > MAX_MESSAGE:
            raise ControlError(f"a control message has at most {MAX_MESSAGE} bytes; the peer announced {size}")
        if len(self._buffer) < _HEADER + size:
            return None
        body = bytes(self._buffer[_HEADER : _HEADER + size])
        del self._buffer[: _HEADER + size]
        message = _parse(body)
        count = message.pop("fds", 0)
        if not isinstance(count, int) or not 0 <= count <= len(self._fds):
            raise ControlError(f"a control message claims {count!r} descriptors, {len(self._fds)} have arrived")
        return message, [self._fds.popleft() for _ in range(count)]

    def close(self) -> None:
        """Close the descriptors that no message has taken."""
        while self._fds:
            os.close(self._fds.popleft())


def _rights(fds: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """The ancillary data that carries `fds`. (`socket.send_fds` and `recv_fds` drop their argument ``flags``.)"""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []


def _descriptors(level: int, kind: int, data: bytes) -> list[int]:
    if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
        return []
    fds = array.array("i")
    fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def _parse(body: bytes) -> Message:
    try:
        message = json.loads(body)
    except ValueError as error:
        raise ControlError(f"a control message is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise ControlError(f"a control message must be an object, not {type(message).__name__}")
    return message


class ControlSocket:
    """One end. Any number of threads may `send`; one at a time receives, blocking or from the reactor."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes over `sock`, which stays in blocking mode: `receive_ready` asks for every single read not to block."""
        sock.setblocking(True)
        sock.set_inheritable(False)
        self._socket = sock
        self._decoder = Decoder()
        self._sending = threading.Lock()
        self._receiving = threading.Lock()
        self.eof = False

    @classmethod
    def from_fd(cls, fd: int) -> ControlSocket:
        """The control socket that is the open descriptor `fd`, which it takes over."""
        return cls(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd))

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ) -> ControlSocket | None:
        """A service process's own; None in a process that no supervisor has started.

        The variable is removed: a subprocess that a service starts, perhaps this very program, is no service process.
        Nor is one that was started before: it has inherited the variable, but not the descriptor.
        """
        value = environ.pop(CONTROL, "")
        if not value.isdecimal():
            return None
        try:
            sock = socket.socket(fileno=int(value))
        except OSError:
            return None
        if sock.family == socket.AF_UNIX:
            return cls(sock)
        sock.detach()  # Somebody else's.
        return None

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message, fds: Sequence[int] = (), timeout: float = SEND_TIMEOUT) -> None:
        """Send one message; the caller keeps (and closes) its own copies of `fds`.

        Raises `TimeoutError` where the far side makes no room, `OSError` (`BrokenPipeError`) where it is gone. After a
        timeout in the middle of a message the socket is shut down: what would follow could not be understood.
        """
        frame = memoryview(encode(message, len(fds)))
        deadline = time.monotonic() + timeout
        if not self._sending.acquire(timeout=timeout):
            raise TimeoutError("the control socket's peer does not read")
        try:
            sent = self._send_some(frame, fds, deadline)
            try:
                while sent < len(frame):
                    sent += self._send_some(frame[sent:], (), deadline)
            except TimeoutError:
                self._socket.shutdown(socket.SHUT_RDWR)
                raise
        finally:
            self._sending.release()

    def _send_some(self, data: memoryview, fds: Sequence[int], deadline: float) -> int:
        while True:
            try:
                return self._socket.sendmsg([data], _rights(fds), socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._wait_for_room(deadline)

    def _wait_for_room(self, deadline: float) -> None:
        poller = select.poll()
        poller.register(self._socket, select.POLLOUT)
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(left * 1000):
            raise TimeoutError("the control socket's peer does not read")

    def receive(self) -> tuple[Message, list[int]] | None:
        """Wait for the next message and its descriptors (close-on-exec, now the caller's). None at the end.

        Raises `ControlError` where what arrives is no message; the socket is of no use after that.
        """
        with self._receiving:
            while True:
                found = self._decoder.pop()
                if found is not None:
                    return found
                if self.eof:
                    return None
                self._receive_some(0)

    def receive_ready(self) -> list[tuple[Message, list[int]]]:
        """What has arrived, without waiting; `eof` is set where nothing will follow. Raises as `receive` does."""
        messages = []
        with self._receiving:
            try:
                while not self.eof:
                    self._receive_some(socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
            while (found := self._decoder.pop()) is not None:
                messages.append(found)
        return messages

    def _receive_some(self, flags: int) -> None:
        flags |= getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        try:
            data, ancillary, outcome, _ = self._socket.recvmsg(_CHUNK, _RIGHTS_SIZE, flags)
        except ConnectionError:  # The peer was closed before it had read everything: an end like any other.
            data, ancillary, outcome = b"", [], 0
        fds = [fd for level, kind, rights in ancillary for fd in _descriptors(level, kind, rights)]
        for fd in fds:
            os.set_inheritable(fd, False)  # Only a system without MSG_CMSG_CLOEXEC needs it.
        self._decoder.feed(data, fds)
        if not data:
            self.eof = True
            self._decoder.close()
        if outcome & socket.MSG_CTRUNC:
            raise ControlError("file descriptors of a control message were lost: this process has too many open files")

    def close(self) -> None:
        """End the connection, for both ends; whoever waits in `send` or `receive` here is woken. Idempotent."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # The peer is gone, or this end is closed.
        self.abandon()

    def abandon(self) -> None:
        """Close this process's copy only: what a forked process does with its parent's control socket."""
        with self._receiving, self._sending:
            self.eof = True
            self._decoder.close()
            self._socket.close()
