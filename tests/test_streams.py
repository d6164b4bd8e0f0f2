"""Bodies, inboxes, incoming files and streams of items: without a connection."""

from __future__ import annotations

import io
import mmap
import pickle
import threading
from collections.abc import Callable, Iterator

import pytest

from bigmachine.rpc import streams
from bigmachine.rpc.streams import (
    HUGE,
    READ_CHUNK,
    Body,
    Inbox,
    Items,
    Stream,
    allocate,
    incoming_file,
    layout,
    pack_item,
    parse_layout,
)

SOON = 10.0


# -- Streams as arguments --------------------------------------------------------------------------------------------


def test_chunks_of_a_file() -> None:
    data = bytes(range(256)) * 1000
    chunks = list(Stream(io.BytesIO(data)).chunks())
    assert b"".join(chunks) == data
    assert all(len(chunk) <= READ_CHUNK for chunk in chunks)


def test_chunks_of_something_that_only_reads() -> None:
    class Reader:
        left = 3

        def read(self, n: int) -> bytes:
            self.left -= 1
            return b"abc" if self.left >= 0 else b""

    assert b"".join(Stream(Reader()).chunks()) == b"abc" * 3  # type: ignore[arg-type]


def test_chunks_of_an_iterable_may_be_of_any_kind_and_empty() -> None:
    assert list(Stream([b"a", b"", bytearray(b"b"), memoryview(b"c")]).chunks()) == [b"a", b"", b"b", b"c"]


def test_stream_is_not_pickled() -> None:
    with pytest.raises(TypeError, match="only be an argument"):
        pickle.dumps(Stream([]))


# -- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, HUGE - 1, HUGE, HUGE + 1])
def test_memory_is_writable_and_of_the_size(size: int) -> None:
    memory = allocate(size)
    assert isinstance(memory, mmap.mmap) == (size >= HUGE)
    view = memoryview(memory)
    assert len(view) == size
    assert not view.readonly
    view[:] = b"x" * size
    view.release()


@pytest.mark.parametrize("size", [2**62, 2**63, 2**64, 10**30])
def test_memory_that_nobody_has(size: int) -> None:
    with pytest.raises(MemoryError):
        allocate(size)


@pytest.mark.parametrize("sizes", [[0], [5], [0, 0], [3, 0, 4], [0, 3, 0, 0, 4, 0]])
@pytest.mark.parametrize("step", [1, 2, 100])
def test_body_is_filled_in_any_steps(sizes: list[int], step: int) -> None:
    body = Body(sizes)
    data = bytes(range(sum(sizes)))
    assert body.size == body.left == len(data)
    while body.left:
        view = body.view()
        assert 0 < len(view) <= body.left
        n = min(step, len(view))
        view[:n] = data[len(data) - body.left :][:n]
        body.advance(n)
    assert b"".join([bytes(body.pickle), *map(bytes, body.buffers)]) == data
    assert [len(body.pickle), *map(len, body.buffers)] == sizes


def test_layout() -> None:
    text = layout(b"pickle", [memoryview(b""), memoryview(b"12345678")])
    assert text == "6,0,8"
    assert parse_layout(text) == [6, 0, 8]


@pytest.mark.parametrize("text", ["", "a", "1,", "1,-2", "-1", "1 2", "1.5"])
def test_bad_layouts(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - int's own messages, or ours.
        parse_layout(text)


# -- Inbox -----------------------------------------------------------------------------------------------------------


def inbox_and_log() -> tuple[Inbox, list[int]]:
    consumed: list[int] = []
    return Inbox(consumed.append), consumed


def test_inbox_gives_what_it_got_and_says_when() -> None:
    inbox, consumed = inbox_and_log()
    assert not inbox.ready()
    inbox.feed(b"one", 10)
    inbox.feed(b"two", 20)
    assert inbox.ready()
    assert consumed == []
    assert inbox.take() == b"one"
    assert consumed == [10]
    assert inbox.take() == b"two"
    assert consumed == [10, 20]
    assert not inbox.ready()
    inbox.end()
    assert inbox.ready()
    assert inbox.take() is None
    assert inbox.take() is None
    assert consumed == [10, 20]


def test_inbox_error_comes_after_what_arrived_before_it() -> None:
    inbox, _ = inbox_and_log()
    inbox.feed(b"one", 1)
    inbox.end(OSError("gone"))
    assert inbox.take() == b"one"
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            inbox.take()


def test_first_end_of_an_inbox_counts() -> None:
    inbox, _ = inbox_and_log()
    inbox.end()
    inbox.end(OSError("late"))
    assert inbox.take() is None
    inbox, _ = inbox_and_log()
    inbox.end(OSError("first"))
    inbox.end()
    with pytest.raises(OSError, match="first"):
        inbox.take()


def test_inbox_wakes_who_waits() -> None:
    for wake in (lambda inbox: inbox.feed(b"x", 1), lambda inbox: inbox.end(), lambda inbox: inbox.end(OSError())):
        inbox, _ = inbox_and_log()
        assert not inbox.wait(0)
        done: list[bool] = []
        thread = threading.Thread(target=lambda inbox=inbox, done=done: done.append(inbox.wait(SOON)))
        thread.start()
        wake(inbox)
        thread.join(SOON)
        assert done == [True]


# -- Incoming files --------------------------------------------------------------------------------------------------


class Feeder:
    """Feeds an inbox on a thread of its own: the next chunk only when all before it was taken."""

    def __init__(self, chunks: list[bytes], error: BaseException | None = None) -> None:
        self._taken = threading.Semaphore(0)
        self.inbox = Inbox(lambda size: self._taken.release())
        self._thread = threading.Thread(target=self._run, args=(chunks, error), daemon=True)
        self._thread.start()

    def _run(self, chunks: list[bytes], error: BaseException | None) -> None:
        for chunk in chunks:
            self.inbox.feed(chunk, len(chunk))
            if not self._taken.acquire(timeout=SOON):
                return
        self.inbox.end(error)


LINES = [b"first line\nsec", b"", b"ond line\n", b"th", b"ird, without an end"]


def test_file_read_whole() -> None:
    with incoming_file(Feeder(LINES).inbox) as file:
        assert file.readable()
        assert not file.writable()
        assert not file.seekable()
        assert file.read() == b"".join(LINES)
        assert file.read() == b""


def test_file_read_in_pieces() -> None:
    with incoming_file(Feeder(LINES).inbox) as file:
        pieces = list(iter(lambda: file.read(7), b""))
    assert b"".join(pieces) == b"".join(LINES)
    assert all(len(piece) == 7 for piece in pieces[:-1])


def test_file_readline_and_iteration_as_data_arrives() -> None:
    with incoming_file(Feeder(LINES).inbox) as file:
        assert file.readline() == b"first line\n"
        assert list(file) == [b"second line\n", b"third, without an end"]


def test_read1_does_not_wait_for_more_than_there_is() -> None:
    inbox, _ = inbox_and_log()
    inbox.feed(b"there", 5)
    with incoming_file(inbox) as file:
        assert file.read1() == b"there"
        inbox.feed(b"more", 4)
        assert file.read1(2) == b"mo"
        inbox.end()
        assert file.read() == b"re"


def test_file_readinto_and_text() -> None:
    with incoming_file(Feeder(LINES).inbox) as file:
        target = bytearray(12)
        assert file.readinto(target) == 12
        assert target == b"first line\ns"
        assert io.TextIOWrapper(file, encoding="utf-8").read() == "econd line\nthird, without an end"


def test_large_chunks() -> None:
    chunks = [bytes([i]) * 300_000 for i in range(4)]
    with incoming_file(Feeder(chunks).inbox) as file:
        assert file.read() == b"".join(chunks)


@pytest.mark.parametrize("read", [lambda file: file.read(), lambda file: list(file), lambda file: file.read(1000)])
def test_error_while_reading(read: Callable[[io.BufferedReader], object]) -> None:
    error = ConnectionError("driver s-1 gave the call up")
    with incoming_file(Feeder([b"some"], error).inbox) as file, pytest.raises(OSError, match="gave the call up"):
        read(file)


def test_consumption_is_told_as_the_method_reads() -> None:
    inbox, consumed = inbox_and_log()
    for _ in range(10):
        inbox.feed(bytes(READ_CHUNK), READ_CHUNK)
    with incoming_file(inbox) as file:
        file.read(10)
        assert sum(consumed) <= 2 * READ_CHUNK
        file.read(5 * READ_CHUNK)
        assert 5 * READ_CHUNK <= sum(consumed) <= 7 * READ_CHUNK


# -- Items -----------------------------------------------------------------------------------------------------------

ITEMS: list[tuple[bytes, list[bytes]]] = [
    (b"pickle", []),
    (b"with a buffer", [b"buffer"]),
    (b"p", [b"", b"x", b""]),
    (b"", []),
    (b"many", [bytes([i % 256]) * (i % 3) for i in range(255)]),
    (b"last", [b""]),
]


def packed(items: list[tuple[bytes, list[bytes]]]) -> bytes:
    return b"".join(bytes(part) for pickle, buffers in items for part in pack_item(pickle, [memoryview(b) for b in buffers]))


def plain(bodies: Iterator[Body] | list[Body]) -> list[tuple[bytes, list[bytes]]]:
    return [(bytes(body.pickle), [bytes(buffer) for buffer in body.buffers]) for body in bodies]


def test_items_at_once() -> None:
    items = Items()
    assert plain(items.feed(packed(ITEMS))) == ITEMS
    assert not items.partial


def test_items_cut_at_every_boundary() -> None:
    expected = [(pickle, buffers[:9]) for pickle, buffers in ITEMS]
    data = packed(expected)
    ends = {len(packed(expected[:n])) for n in range(len(expected) + 1)}
    for i in range(len(data) + 1):
        items = Items()
        found = plain(items.feed(data[:i]))
        assert items.partial == (i not in ends), i
        assert found + plain(items.feed(bytearray(data[i:]))) == expected, i


@pytest.mark.parametrize("size", [1, 3, 9, 16, 17, 1000])
def test_items_in_pieces(size: int) -> None:
    data = packed(ITEMS)
    items = Items()
    found: list[Body] = []
    for i in range(0, len(data), size):
        found += items.feed(data[i : i + size])
    assert plain(found) == ITEMS


def test_items_can_be_larger_than_what_a_bytearray_is_used_for() -> None:
    items = Items()
    buffer = bytes(range(256)) * (HUGE // 128)
    (body,) = items.feed(packed([(b"p", [buffer])]))
    assert bytes(body.buffers[0]) == buffer
    assert isinstance(body.buffers[0], mmap.mmap)


def test_empty_chunk() -> None:
    assert list(Items().feed(b"")) == []


def test_copy_into_drops_what_was_not_announced() -> None:
    from bigmachine.rpc.streams import copy_into

    body = Body([2, 0, 3])
    copy_into(body, b"abc")
    copy_into(body, b"defgh")
    assert plain([body]) == [(b"ab", [b"", b"cde"])]
    assert not body.left


def test_module_knows_its_limits() -> None:
    assert streams._ITEM.size == 9
