"""The messages of the call channel: packed, cut anywhere, and parsed."""

from __future__ import annotations

import pytest

from bigmachine.rpc.channel import (
    CALL,
    CANCEL,
    LARGE,
    MAX_BUFFERS,
    MAX_MESSAGE,
    RAISED,
    REFUSED,
    RESULT,
    SMALL,
    MessageError,
    Messages,
    call_parts,
    pack,
    parse_call,
    parse_refused,
    parse_result,
    refused_parts,
    result_parts,
)

MESSAGES = [
    (CALL, 1, b"a call"),
    (CANCEL, 2**32 - 1, b""),
    (RESULT, 3, bytes(range(256))),
    (LARGE, 0, b""),
    (RAISED, 7, b"\0" * 30),
    (REFUSED, 8, b"x"),
]
STREAM = b"".join(pack(*message) for message in MESSAGES)


def test_messages_cut_at_every_boundary() -> None:
    for i in range(len(STREAM) + 1):
        messages = Messages()
        assert messages.empty
        found = messages.feed(STREAM[:i])
        assert messages.empty == (STREAM[:i] == b"".join(pack(*message) for message in found))
        assert found + messages.feed(STREAM[i:]) == MESSAGES, i
        assert messages.empty


@pytest.mark.parametrize("size", [1, 2, 8, 9, 10, 100])
def test_messages_in_pieces(size: int) -> None:
    messages = Messages()
    found = []
    for i in range(0, len(STREAM), size):
        found += messages.feed(bytearray(STREAM[i : i + size]))  # A bytearray serves as well.
    assert found == MESSAGES


def test_bodies_are_independent_of_the_buffer_they_came_in() -> None:
    data = bytearray(STREAM)
    found = Messages().feed(data)
    data[:] = bytes(len(data))
    assert found == MESSAGES


def test_nothing() -> None:
    messages = Messages()
    assert messages.feed(b"") == []
    assert messages.empty


def test_largest_message() -> None:
    messages = Messages()
    body = bytes(MAX_MESSAGE)
    assert messages.feed(pack(RESULT, 1, body)) == [(RESULT, 1, body)]


def test_message_over_the_limit_is_refused_before_it_arrives() -> None:
    messages = Messages()
    assert messages.feed(pack(CALL, 1, b"fine")) == [(CALL, 1, b"fine")]
    head = pack(CALL, 2, bytes(MAX_MESSAGE + 1))[:9]
    assert messages.feed(head[:8]) == []
    with pytest.raises(MessageError, match=f"{MAX_MESSAGE + 1} bytes on the call channel; the limit is {MAX_MESSAGE}"):
        messages.feed(head[8:])


@pytest.mark.parametrize("buffers", [[], [b"one"], [b"", b"x", b""], [b"b" * i for i in range(MAX_BUFFERS)]])
def test_call(buffers: list[bytes]) -> None:
    body = b"".join(call_parts("Sërvice.method".encode(), 2.5, b"the pickle", [memoryview(buffer) for buffer in buffers]))
    method, timeout, pickle, found = parse_call(body)
    assert (method.decode(), timeout, bytes(pickle), found) == ("Sërvice.method", 2.5, b"the pickle", buffers)
    for buffer in found:
        buffer[:1] = b"W"  # Arrays on them are writable.


@pytest.mark.parametrize("buffers", [[], [b"one"], [b"", b"x", b""], [b"b" * i for i in range(MAX_BUFFERS)]])
def test_result(buffers: list[bytes]) -> None:
    body = b"".join(result_parts(b"the pickle", [memoryview(buffer) for buffer in buffers]))
    pickle, found = parse_result(body)
    assert (bytes(pickle), found) == (b"the pickle", buffers)
    for buffer in found:
        buffer[:1] = b"W"


def test_payloads_at_the_limit_fit_a_message() -> None:
    buffers = [memoryview(bytes(SMALL // MAX_BUFFERS))] * MAX_BUFFERS
    assert sum(map(len, call_parts(b"n" * 255, 1.0, bytes(1000), buffers))) <= MAX_MESSAGE
    assert sum(map(len, refused_parts(404, "ü" * 100_000))) <= MAX_MESSAGE


def test_refused() -> None:
    assert parse_refused(b"".join(refused_parts(404, "no such thing: ü"))) == (404, "no such thing: ü")
    status, reason = parse_refused(b"".join(refused_parts(400, "ü" * 100_000)))
    assert status == 400
    assert len(reason) <= 8192  # Cut, and readable even where that was within a character.


@pytest.mark.parametrize("body", [b"", b"\0" * 9, b"\0" * 8 + b"\x05\x02" + b"\0\0\0", b"\0" * 9 + b"\xff"])
def test_malformed_calls_raise_something_that_is_caught(body: bytes) -> None:
    try:
        parse_call(body)
    except Exception as error:
        assert type(error).__module__ in ("struct", "builtins")  # noqa: PT017
