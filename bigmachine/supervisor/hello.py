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
    if data[:1] and data[0] != _HANDSHAKE:
        raise NotTls(f"not TLS: the connection begins with {data[:24]!r}")
    if len(data) < 9:
        return None
    if data[1] != 3 or data[5] != _CLIENT_HELLO:
        raise NotTls(f"not a TLS ClientHello: {data[:9].hex()}")
    size = int.from_bytes(data[6:9], "big")
    if size > MAX_HELLO:
        raise NotTls(f"a ClientHello of {size} bytes; the limit is {MAX_HELLO}")
    hello = _unwrap(data, 4 + size)
    return None if hello is None else _find(hello[4:])


def _unwrap(data: bytes, size: int) -> bytes | None:
    """The handshake message, which may be spread over several records; None where it is not whole."""
    message = b""
    while len(message) < size:
        if len(data) < 5:
            return None
        if data[0] != _HANDSHAKE:
            raise NotTls("a ClientHello that is interrupted by another record")
        length = int.from_bytes(data[3:5], "big")
        if not length:
            raise NotTls("an empty TLS record")
        message += data[5 : 5 + length]
        data = data[5 + length :]
    return message[:size]


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
