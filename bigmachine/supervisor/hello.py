"""Reading a TLS ClientHello without consuming it: which process does this connection want? Pure."""

from __future__ import annotations

from typing import Final

MAX_HELLO = 16 * 1024
"""Bytes of a ClientHello at most; real ones are below 2 KiB. It must fit the socket's buffer, as it is only peeked at."""

_HANDSHAKE: Final = 0x16
_CLIENT_HELLO: Final = 0x01
_SERVER_NAME: Final = 0


class NotTls(Exception):
    """The bytes are not the beginning of a ClientHello; the text says what they look like."""


def server_name(data: bytes) -> str | None:
    """The server name (SNI) that `data`, the first bytes of a connection, ask for; "" for a ClientHello without one.

    None where more bytes are needed. Raises `NotTls`.
    """
    message = _unwrap(data)
    if message and message[0] != _CLIENT_HELLO:
        raise NotTls(f"not a TLS ClientHello: {data[:9].hex()}")
    size = _size(message)
    if size is None or len(message) < size:
        return None
    return _find(message[4:size])


def _size(message: bytes | bytearray) -> int | None:
    """Bytes of the whole handshake message; None where that is not known yet."""
    if len(message) < 4:
        return None
    size = int.from_bytes(message[1:4], "big")
    if size > MAX_HELLO:
        raise NotTls(f"a ClientHello of {size} bytes; the limit is {MAX_HELLO}")
    return 4 + size


def _unwrap(data: bytes) -> bytes:
    """What there is of the first handshake message, which may be spread over several records."""
    message = bytearray()
    at = 0
    while at < len(data):
        size = _size(message)
        if size is not None and len(message) >= size:
            break
        if data[at] != _HANDSHAKE:
            problem = "a ClientHello that is interrupted by" if at else "not TLS: the connection begins with"
            raise NotTls(f"{problem} {data[at : at + 24]!r}")
        if len(data) < at + 5:
            break
        length = int.from_bytes(data[at + 3 : at + 5], "big")
        if data[at + 1] != 3 or not length:
            raise NotTls(f"not a TLS ClientHello: {data[at : at + 9].hex()}")
        message += data[at + 5 : at + 5 + length]
        at += 5 + length
    return bytes(message)


def _find(hello: bytes) -> str:
    try:
        at = 2 + 32  # Version and random.
        at += 1 + hello[at]  # Session id.
        at += 2 + int.from_bytes(hello[at : at + 2], "big")  # Cipher suites.
        at += 1 + hello[at]  # Compression methods.
        end = at + 2 + int.from_bytes(hello[at : at + 2], "big")
        at += 2
        while at + 4 <= min(end, len(hello)):
            kind = int.from_bytes(hello[at : at + 2], "big")
            size = int.from_bytes(hello[at + 2 : at + 4], "big")
            if kind == _SERVER_NAME:
                length = int.from_bytes(hello[at + 7 : at + 9], "big")
                return hello[at + 9 : at + 9 + length].decode("ascii")
            at += 4 + size
    except (IndexError, UnicodeDecodeError) as error:
        raise NotTls(f"a malformed ClientHello: {error}") from error
    return ""
