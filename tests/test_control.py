"""The control socket: messages, descriptors, and what happens at the end."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from bigmachine.supervisor import control
from bigmachine.supervisor.control import ControlError, ControlSocket, Decoder, encode

Pair = tuple[ControlSocket, ControlSocket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ends = ControlSocket(left), ControlSocket(right)
    yield ends
    for end in ends:
        end.close()


def temporary(content: bytes) -> int:
    """A descriptor from which `content` can be read."""
    read, write = os.pipe()
    os.write(write, content)
    os.close(write)
    return read


def contents(fds: list[int]) -> list[bytes]:
    found = []
    for fd in fds:
        found.append(os.read(fd, 100))
        os.close(fd)
    return found


def test_message_there_and_back(pair: Pair) -> None:
    left, right = pair
    left.send({"type": "hello", "name": "Ünïcode", "values": [1, 2.5, None]})
    assert right.receive() == ({"type": "hello", "name": "Ünïcode", "values": [1, 2.5, None]}, [])
    right.send({"ok": True})
    assert left.receive() == ({"ok": True}, [])


def test_descriptors_travel_with_their_message(pair: Pair) -> None:
    left, right = pair
    mine = [temporary(b"one"), temporary(b"two")]
    left.send({"type": "take"}, mine)
    assert contents(mine) != []  # The sender's copies are still its own: same pipes, now empty.
    found = right.receive()
    assert found is not None
    message, fds = found
    assert message == {"type": "take"}
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in fds)
    assert contents(fds) == [b"", b""]


def test_many_small_messages_glued_keep_their_descriptors(pair: Pair) -> None:
    left, right = pair
    for number in range(60):
        fds = [temporary(b"%d.%d" % (number, index)) for index in range(number % 4)]
        left.send({"number": number}, fds)
        for fd in fds:
            os.close(fd)
    received = right.receive_ready()
    assert [message["number"] for message, _ in received] == list(range(60))
    for number, (_, fds) in enumerate(received):
        assert contents(fds) == [b"%d.%d" % (number, index) for index in range(number % 4)]


def test_as_many_descriptors_as_allowed(pair: Pair) -> None:
    left, right = pair
    read = temporary(b"")
    left.send({}, [read] * control.MAX_FDS)
    found = right.receive()
    assert found is not None
    assert len(found[1]) == control.MAX_FDS
    contents([read, *found[1]])


def test_large_message_while_the_receiver_is_slow(pair: Pair) -> None:
    left, right = pair
    text = "x" * (3 << 20)
    read = temporary(b"with it")
    sender = threading.Thread(target=lambda: left.send({"text": text}, [read]))
    sender.start()
    found = right.receive()
    sender.join(10)
    assert found is not None
    assert found[0] == {"text": text}
    assert contents(found[1]) == [b"with it"]
    os.close(read)


def test_threads_send_whole_messages(pair: Pair) -> None:
    left, right = pair
    texts = [character * 200_000 for character in "abcd"]

    def send(text: str) -> None:
        for _ in range(5):
            left.send({"t": text})

    senders = [threading.Thread(target=send, args=(text,)) for text in texts]
    for sender in senders:
        sender.start()
    received = [right.receive() for _ in range(20)]
    for sender in senders:
        sender.join(10)
    assert sorted(found[0]["t"] for found in received if found) == sorted(texts * 5)


def test_nothing_ready(pair: Pair) -> None:
    assert pair[0].receive_ready() == []
    assert not pair[0].eof


def test_end_of_the_peer_after_its_last_message(pair: Pair) -> None:
    left, right = pair
    left.send({"last": 1})
    left.close()
    assert right.receive_ready() == [({"last": 1}, [])]
    assert right.eof
    assert right.receive() is None
    with pytest.raises(OSError, match="Broken pipe"):
        right.send({})


def test_peer_that_ends_without_having_read_is_an_end_like_any_other(pair: Pair) -> None:
    left, right = pair
    right.send({"unread": 1})
    left.send({"last": 1})
    left.abandon()
    assert right.receive() == ({"last": 1}, [])
    assert right.receive() is None


def test_descriptors_of_an_unfinished_message_are_closed_at_the_end() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    receiver = ControlSocket(near)
    read, write = os.pipe()
    socket.send_fds(far, [encode({"long": "message"}, 1)[:-3]], [write])
    os.close(write)
    far.close()
    assert receiver.receive_ready() == []
    assert os.read(read, 1) == b""  # The write end that was under way is closed.
    os.close(read)
    receiver.close()


def test_close_wakes_a_waiting_receiver(pair: Pair) -> None:
    left, _ = pair
    found: list[object] = []
    waiting = threading.Thread(target=lambda: found.append(left.receive()))
    waiting.start()
    left.close()
    waiting.join(10)
    assert found == [None]
    left.close()


def test_peer_that_does_not_read_is_a_timeout(pair: Pair) -> None:
    left, right = pair
    with pytest.raises(TimeoutError, match="does not read"):
        left.send({"text": "x" * (8 << 20)}, timeout=0.05)
    with pytest.raises(OSError, match="Broken pipe"):  # Half a message is on its way: nothing can follow.
        left.send({})
    assert right.receive() is None


def test_message_too_large(pair: Pair) -> None:
    with pytest.raises(ValueError, match="memfd"):
        pair[0].send({"text": "x" * control.MAX_MESSAGE})


def test_too_many_descriptors(pair: Pair) -> None:
    with pytest.raises(ValueError, match="at most 96"):
        pair[0].send({}, [0] * 97)


def test_reserved_key(pair: Pair) -> None:
    with pytest.raises(ValueError, match="reserved"):
        pair[0].send({"fds": 1})


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"\x00\x00\x00\x03{]}", "not JSON"),
        (b"\x00\x00\x00\x02[]", "must be an object, not list"),
        (b"\x7f\x00\x00\x00", "announced 2130706432"),
        (encode({}, 2), "claims 2 descriptors, 0 have arrived"),
        (b"\x00\x00\x00\x0c" + b'{"fds":"no"}', "claims 'no' descriptors"),
    ],
)
def test_what_is_no_message(data: bytes, complaint: str) -> None:
    decoder = Decoder()
    decoder.feed(data)
    with pytest.raises(ControlError, match=complaint):
        decoder.pop()


def test_decoder_byte_by_byte() -> None:
    decoder = Decoder()
    found = []
    for byte in encode({"a": 1}) + encode({"b": "ü"}):
        decoder.feed(bytes([byte]))
        if (message := decoder.pop()) is not None:
            found.append(message)
    assert found == [({"a": 1}, []), ({"b": "ü"}, [])]


def test_from_environment_takes_the_variable_away() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    environ = {"BIGMACHINE_CONTROL": str(far.detach()), "OTHER": "1"}
    mine = ControlSocket.from_environment(environ)
    assert mine is not None
    assert environ == {"OTHER": "1"}
    assert fcntl.fcntl(mine.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    other = ControlSocket(near)
    other.send({"hello": 1})
    assert mine.receive() == ({"hello": 1}, [])
    mine.close()
    other.close()


@pytest.mark.parametrize("kind", ["no variable", "no number", "closed", "no socket", "another socket"])
def test_no_supervisor(kind: str) -> None:
    """A subprocess of a service process may inherit the variable; the descriptor is closed there, or something else."""
    read, write = os.pipe()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as other:
        values = {"no number": "x", "closed": "1000000", "no socket": str(read), "another socket": str(other.fileno())}
        environ = {"BIGMACHINE_CONTROL": values[kind]} if kind in values else {}
        assert ControlSocket.from_environment(environ) is None
        assert environ == {}
        assert other.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_STREAM  # It was left alone.
    os.close(read)
    os.close(write)
