"""Bodies: memory for payloads of known size, byte streams that a method reads as they are sent, and streams of items."""

from __future__ import annotations

import io
import mmap
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

HUGE = 1024 * 1024
"""From this size on memory is mapped with transparent huge pages where the kernel has them: page faults on 64 MiB of a
`bytearray` take longer (37 ms) than moving the bytes over TLS; on huge pages 8 ms."""

READ_CHUNK = 64 * 1024
"""Bytes read at once from a user's file."""


class Stream:
    """Marks an argument that is to be *streamed*: `m.call("Store.put", "name", bigmachine.Stream(open(path, "rb")))`.

    The method receives a readable binary file (`io.BufferedReader`) in its place, whose bytes arrive while it reads: a
    slow reader slows the sender down. `source` is a binary file or an iterable of bytes-like objects; it is read once, on
    the caller's thread for `call`. One argument of a call can be a stream. Where reading `source` raises, the call raises
    that exception, and the method's `read` raises `OSError`.
    """

    def __init__(self, source: IO[bytes] | Iterable[bytes | bytearray | memoryview]) -> None:
        self.source = source

    def __reduce_ex__(self, _: object) -> Any:
        raise TypeError("a Stream can only be an argument of a call itself or part of one; it cannot be stored or returned")

    def chunks(self) -> Iterator[bytes | bytearray | memoryview]:
        """The bytes, in pieces of any size."""
        read: Callable[[int], bytes] | None = getattr(self.source, "read1", None) or getattr(self.source, "read", None)
        if read is None:
            yield from self.source
            return
        while chunk := read(READ_CHUNK):
            yield chunk


# -- Memory for bodies of known size ---------------------------------------------------------------------------------


def allocate(size: int) -> bytearray | mmap.mmap:
    """Writable memory of `size` bytes. Raises MemoryError."""
    if size < HUGE:
        return bytearray(size)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"cannot map {size} bytes: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # A kernel without them.
    return memory


class Body:
    """A payload of known layout: the pickle and its buffers, each in memory of its own. It is the sink they are read into."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.parts = [allocate(size) for size in sizes]
        self.size = self.left = sum(sizes)
        self._views: deque[memoryview] = deque(memoryview(part) for part in self.parts if len(part))

    def view(self) -> memoryview:
        """See `connection.Sink`."""
        return self._views[0]

    def advance(self, n: int) -> None:
        """See `connection.Sink`."""
        self.left -= n
        view = self._views[0]
        if n == len(view):
            self._views.popleft()
        else:
            self._views[0] = view[n:]

    @property
    def pickle(self) -> bytearray | mmap.mmap:
        """The pickle; only when nothing is `left`."""
        return self.parts[0]

    @property
    def buffers(self) -> list[bytearray | mmap.mmap]:
        """Its out-of-band buffers."""
        return self.parts[1:]


def copy_into(body: Body, data: bytes | bytearray) -> None:
    """Bytes that had arrived before the memory was there. More than was announced is dropped."""
    view = memoryview(data)
    while body.left and view:
        target = body.view()
        n = min(len(target), len(view))
        target[:n] = view[:n]
        body.advance(n)
        view = view[n:]


def layout(pickle: bytes, buffers: Sequence[memoryview]) -> str:
    """The value of the header `bigm-layout`: the sizes in bytes of the pickle and of each buffer, in order."""
    return ",".join(str(len(part)) for part in (pickle, *buffers))


def parse_layout(text: str) -> list[int]:
    """Raises ValueError."""
    sizes = [int(size) for size in text.split(",")]
    if min(sizes) < 0:
        raise ValueError(f"a negative size in {text!r}")
    return sizes


# -- Chunks that wait for a reader -----------------------------------------------------------------------------------


class Inbox:
    """Chunks of one stream that have arrived and that nobody has taken yet; bounded by flow control.

    `wait` is how a taker waits until `ready()`: on the far side of a call a condition, at the caller the connection's own
    way of waiting. `consumed(size)` is called for what was taken.
    """

    def __init__(self, consumed: Callable[[int], None]) -> None:
        self._chunks: deque[tuple[bytes | bytearray, int]] = deque()
        self._consumed = consumed
        self._condition = threading.Condition()
        self._end: BaseException | None = None
        self._ended = False

    def feed(self, data: bytes | bytearray, size: int) -> None:
        """`data` arrived and takes up `size` bytes of the window."""
        with self._condition:
            self._chunks.append((data, size))
            self._condition.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will come; `error` if that is not as it should be. The first end counts."""
        with self._condition:
            if not self._ended:
                self._ended = True
                self._end = error
            self._condition.notify_all()

    def ready(self) -> bool:
        """True where `take` would not block."""
        return bool(self._chunks) or self._ended

    def wait(self, timeout: float | None = None) -> bool:
        """Until `ready()`; False on a timeout (seconds)."""
        with self._condition:
            return self._condition.wait_for(self.ready, timeout)

    def take(self) -> bytes | bytearray | None:
        """The next chunk; None at the end. Raises the error that the stream ended with. Call only when `ready()`."""
        with self._condition:
            if self._chunks:
                data, size = self._chunks.popleft()
            elif self._end is not None:
                raise self._end
            else:
                return None
        self._consumed(size)
        return data


class _Incoming(io.RawIOBase):
    """The file that a method reads a `Stream` argument from."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            self._inbox.wait()
            chunk = self._inbox.take()
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        target = memoryview(buffer).cast("B")
        n = min(len(target), len(self._rest))
        target[:n] = self._rest[:n]
        self._rest = self._rest[n:]
        return n


def incoming_file(inbox: Inbox) -> io.BufferedReader:
    """A readable binary file over `inbox`."""
    return io.BufferedReader(_Incoming(inbox), READ_CHUNK)


# -- Items -----------------------------------------------------------------------------------------------------------

_ITEM = struct.Struct(">QB")


def pack_item(pickle: bytes, buffers: Sequence[memoryview]) -> list[bytes | memoryview]:
    """One item of a stream of items: `>QB` (bytes of the pickle, number of buffers), `>Q` a buffer, the pickle, the buffers."""
    head = _ITEM.pack(len(pickle), len(buffers)) + struct.pack(f">{len(buffers)}Q", *map(len, buffers))
    return [head, pickle, *buffers]


class Items:
    """Cuts the chunks of a stream of items into items. An item is a `Body` that is full."""

    def __init__(self) -> None:
        self._head = b""
        self._body: Body | None = None

    def feed(self, chunk: bytes | bytearray) -> Iterator[Body]:
        """The items that `chunk` completes."""
        view = memoryview(chunk)
        while True:
            if self._body is None:
                view = self._read_head(view)
                if self._body is None:
                    return
            while self._body.left and view:
                target = self._body.view()
                n = min(len(target), len(view))
                target[:n] = view[:n]
                self._body.advance(n)
                view = view[n:]
            if self._body.left:
                return
            body, self._body = self._body, None
            yield body

    @property
    def partial(self) -> bool:
        """True in the middle of an item."""
        return self._body is not None or bool(self._head)

    def _read_head(self, view: memoryview) -> memoryview:
        """Take what belongs to an item's head; returns the rest of `view`."""
        before = len(self._head)
        self._head += bytes(view[: _ITEM.size + 8 * 255 - before])
        if len(self._head) < _ITEM.size:
            return memoryview(b"")
        size, count = _ITEM.unpack_from(self._head)
        needed = _ITEM.size + 8 * count
        if len(self._head) < needed:
            return memoryview(b"")
        self._body = Body([size, *struct.unpack_from(f">{count}Q", self._head, _ITEM.size)])
        self._head = b""
        return view[needed - before :]
