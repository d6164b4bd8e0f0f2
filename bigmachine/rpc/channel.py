"""The call channel: small calls as messages on one long-lived stream.

A message is a header `>IBI` (bytes that follow the header, kind, call number) and a body. The number is chosen by the client,
unique among its calls on that connection. Client to server: `CALL`, `CANCEL`. Server to client: `RESULT`, `RAISED`, `REFUSED`,
`LARGE`. Messages are packed into DATA frames without regard to their boundaries.

- `CALL`: `>dBB` (seconds until the deadline, 0 for none; bytes of the method's name; number of buffers), the buffers' sizes as
  `>I` each, the name, the buffers, then the pickle.
- `RESULT`: `>B` (number of buffers), their sizes, the buffers, the pickle.
- `RAISED`: a failure (`failures`). `REFUSED`: `>H` status and the reason as UTF-8. `CANCEL`: empty.
- `LARGE`: empty. The result is too large for the channel; the client collects it with `POST /bigrpc/-/reply` and the header
  `bigm-call: <number>`, on a stream of its own. It is kept until then, or until the call is cancelled.

No I/O, no state but the bytes of a message that has not arrived whole.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

CALL, CANCEL, RESULT, RAISED, REFUSED, LARGE = 1, 2, 3, 4, 5, 6

SMALL = 64 * 1024
"""Payload bytes up to which a call or reply goes through the channel: what others wait for is 0.1 ms then."""

MAX_MESSAGE = 2 * SMALL
"""A longer message breaks the protocol: a payload at the limit, a name, a traceback (at most 64 KiB) fit."""

MAX_BUFFERS = 255

HEADER = struct.Struct(">IBI")
_CALL = struct.Struct(">dBB")
_STATUS = struct.Struct(">H")

Bytes = bytes | bytearray | memoryview
Message = tuple[int, int, bytes]
"""(kind, call number, body)."""


def pack(kind: int, number: int, *parts: Bytes) -> bytes:
    """A message of `kind` for call `number`."""
    size = 0
    for part in parts:
        size += len(part)
    return b"".join((HEADER.pack(size, kind, number), *parts))


def call_parts(method: bytes, timeout: float, pickle: bytes, buffers: Sequence[memoryview]) -> tuple[Bytes, ...]:
    """The body of a `CALL`."""
    head = _CALL.pack(timeout, len(method), len(buffers))
    if not buffers:
        return head, method, pickle
    return head, struct.pack(f">{len(buffers)}I", *map(len, buffers)), method, *buffers, pickle


def parse_call(body: bytes) -> tuple[bytes, float, bytes, list[bytearray]]:
    """(method, timeout, pickle, buffers). The buffers are copies: writable, and free of the rest of the message."""
    timeout, name_size, count = _CALL.unpack_from(body)
    offset = _CALL.size + 4 * count
    method = body[offset : offset + name_size]
    offset += name_size
    if not count:
        return method, timeout, body[offset:], []
    pickle, buffers = _split(body, _CALL.size, count, offset)
    return method, timeout, pickle, buffers


def result_parts(pickle: bytes, buffers: Sequence[memoryview]) -> tuple[Bytes, ...]:
    """The body of a `RESULT`."""
    if not buffers:
        return b"\0", pickle
    return struct.pack(f">B{len(buffers)}I", len(buffers), *map(len, buffers)), *buffers, pickle


def parse_result(body: bytes) -> tuple[bytes, list[bytearray]]:
    """(pickle, buffers), the buffers as in `parse_call`."""
    count = body[0]
    if not count:
        return body[1:], []
    return _split(body, 1, count, 1 + 4 * count)


def _split(body: bytes, sizes_at: int, count: int, offset: int) -> tuple[bytes, list[bytearray]]:
    buffers = []
    view = memoryview(body)
    for size in struct.unpack_from(f">{count}I", body, sizes_at):
        buffers.append(bytearray(view[offset : offset + size]))
        offset += size
    return body[offset:], buffers


def refused_parts(status: int, reason: str) -> tuple[Bytes, ...]:
    """The body of a `REFUSED`; a long reason is cut at 8 KiB."""
    return _STATUS.pack(status), reason.encode("utf-8", "replace")[:8192]


def parse_refused(body: bytes) -> tuple[int, str]:
    """(status, reason)."""
    return _STATUS.unpack_from(body)[0], body[2:].decode("utf-8", "replace")


class MessageError(Exception):
    """The bytes on the channel are not messages."""


class Messages:
    """Cuts the bytes of one direction into messages."""

    def __init__(self) -> None:
        self._rest = b""

    @property
    def empty(self) -> bool:
        """No message has begun and not ended."""
        return not self._rest

    def feed(self, data: bytes | bytearray) -> list[Message]:
        """The messages that `data` completes. Raises `MessageError` on a message longer than `MAX_MESSAGE`."""
        if self._rest:
            data = self._rest + data
        messages: list[Message] = []
        view = memoryview(data)
        start, end = 0, len(data)
        while end - start >= 9:
            size, kind, number = HEADER.unpack_from(data, start)
            if size > MAX_MESSAGE:
                raise MessageError(f"a message of {size} bytes on the call channel; the limit is {MAX_MESSAGE}")
            stop = start + 9 + size
            if stop > end:
                break
            messages.append((kind, number, bytes(view[start + 9 : stop])))
            start = stop
        self._rest = bytes(view[start:]) if start < end else b""
        return messages
