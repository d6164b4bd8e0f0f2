"""What the processes of a machine write to stdout and stderr, on its way to the driver.

Rule 1. Nothing is lost: what was written before a process died is read from the pipe after its death. When nobody takes
the output, at most `LIMIT` bytes are kept; then the pipes are not read any more, and whoever writes to them waits.
Rule 2. `discard` ends rule 1: the driver is gone, and no process may be blocked by output that nobody wants.
Rule 3. Lines stay whole: a chunk ends at the end of a line, so that lines of two processes do not mix. Exceptions, as a
progress bar must be seen and memory is bounded: a line older than `PARTIAL_AGE` or longer than `MAX_LINE`, and the end.
Rule 4. The last lines of every process are kept beside that, for the report of its death (`last_output`).
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple

from ..rpc.reactor import Reactor, Watch

LIMIT = 1 << 20
"""Bytes that wait for the reader at most: enough for a second of very talkative processes."""

PARTIAL_AGE = 0.2
"""Seconds after which the beginning of a line is delivered without its end. An unbuffered `print` writes the line and
its newline one after the other: these belong together; a prompt or a progress bar should be seen."""

MAX_LINE = 64 << 10
"""Bytes of a line that are held back at most. The capacity of a pipe; nobody reads longer lines."""

TAIL_LINES = 100
TAIL_BYTES = 16 << 10
"""What is kept for a report: a long traceback and the stacks of a few threads fit."""

DRAIN = 1 << 20
"""Bytes read from a pipe at most after its process's death: the largest capacity a pipe can be given by default."""

SUPERVISOR = -1
"""The "process" number of the supervisor's own output."""

_CHUNK = 64 << 10


class Output(NamedTuple):
    """Bytes that process number `process` wrote to `stream`, ``"stdout"`` or ``"stderr"``."""

    process: int
    stream: str
    data: bytes


def merge(outputs: Iterable[Output]) -> list[Output]:
    """The same with neighbours of the same stream joined: an unbuffered writer makes a chunk of every line."""
    groups = itertools.groupby(outputs, lambda output: (output.process, output.stream))
    return [Output(*key, b"".join(output.data for output in group)) for key, group in groups]


class LineBuffer:
    """Holds back the beginning of a line until its end is there. Pure; `since` is when what it holds began to wait."""

    def __init__(self) -> None:
        self.held = bytearray()
        self.since = 0.0

    def feed(self, data: bytes, now: float) -> bytes:
        """What may be delivered now: whole lines, or everything where too much would be held."""
        end = data.rfind(b"\n") + 1
        whole = b""
        if end:
            whole = bytes(self.held) + data[:end]
            self.held.clear()
        if end < len(data):
            if not self.held:
                self.since = now
            self.held += data[end:]
        return whole + self.flush() if len(self.held) > MAX_LINE else whole

    def flush(self) -> bytes:
        held = bytes(self.held)
        self.held.clear()
        return held


class Tail:
    """The last lines of a process. Pure."""

    def __init__(self, lines: int = TAIL_LINES, size: int = TAIL_BYTES) -> None:
        self._lines = lines
        self._size = size
        self._data = bytearray()

    def add(self, data: bytes) -> None:
        self._data += data[-self._size :] if len(data) > self._size else data
        if len(self._data) > 4 * self._size:  # Seldom, as it moves memory.
            del self._data[: -2 * self._size]

    def text(self, held: bytes = b"") -> str:
        """The last lines, with `held` (beginnings of lines that `add` has not seen yet) behind them."""
        data = bytes(self._data) + held
        if len(data) > self._size:
            cut = data[-self._size :]
            start = cut.find(b"\n") + 1
            data = cut[start:] if start < len(cut) else cut
        return b"".join(data.splitlines(keepends=True)[-self._lines :]).decode(errors="replace")


class _Pipe:
    __slots__ = ("fd", "lines", "paused", "process", "stream", "timed", "watch")

    def __init__(self, process: int, stream: str, fd: int) -> None:
        self.process = process
        self.stream = stream
        self.fd = fd
        self.lines = LineBuffer()
        self.watch: Watch | None = None
        self.paused = False
        self.timed = False


class OutputCapture:
    """Reads pipes with the reactor and hands what they say, in order, to one reader."""

    def __init__(self, reactor: Reactor, limit: int = LIMIT, partial_age: float = PARTIAL_AGE) -> None:
        self._reactor = reactor
        self._limit = limit
        self._partial_age = partial_age
        self._changed = threading.Condition()
        self._pipes: list[_Pipe] = []
        self._tails: dict[int, Tail] = {}
        self._queue: list[Output] = []
        self._held = 0  # Bytes that count against the limit: the queue and what the line buffers hold.
        self._discarding = False
        self._poked = False
        self._used = False

    # -- What the supervisor calls -----------------------------------------------------------------------------------

    def add(self, process: int, stream: str, fd: int) -> None:
        """Read the pipe `fd`, which is the capture's from now on, until its end."""
        os.set_blocking(fd, False)
        pipe = _Pipe(process, stream, fd)
        with self._changed:
            self._used = True
            self._pipes.append(pipe)
            self._tails.setdefault(process, Tail())
            pipe.watch = self._reactor.watch(fd, lambda events: self._on_ready(pipe))
            pipe.watch.arm()

    def read(self, timeout: float | None = None) -> list[Output] | None:
        """What has been written since the last call, waiting for it; ``[]`` after `timeout` seconds or a `poke`, None at the
        end.

        The end is there when every pipe is at its own (see `close_after`) and all has been read, or after `discard`.
        """
        with self._changed:
            in_time = self._changed.wait_for(lambda: self._queue or self._poked or self._ended(), timeout)
            poked, self._poked = self._poked, False
            if not in_time or (poked and not self._queue and not self._ended()):
                return []
            if not self._queue:
                return None
            outputs, self._queue = self._queue, []
            self._held -= sum(len(output.data) for output in outputs)
            self._resume()
        return merge(outputs)

    def poke(self) -> None:
        """Let a `read` that waits return: there is something else for its caller to look at."""
        with self._changed:
            self._poked = True
            self._changed.notify_all()

    def last_output(self, process: int) -> str:
        """The last lines of `process`, both streams, including what it wrote just before it died."""
        with self._changed:
            pipes = [pipe for pipe in self._pipes if pipe.process == process]
            for pipe in pipes:
                self._drain(pipe)
            held = b"".join(bytes(pipe.lines.held) for pipe in pipes)
            tail = self._tails.get(process)
            return "" if tail is None else tail.text(held)

    def discard(self) -> None:
        """Nobody wants the output any more: from now on all is read and thrown away. `read` returns None."""
        with self._changed:
            self._discarding = True
            self._queue.clear()
            self._held = 0
            self._resume()
            self._changed.notify_all()

    def close_after(self, delay: float) -> None:
        """In `delay` seconds, read what is in the pipes and end: processes that nobody knows of may hold them open."""
        self._reactor.call_later(delay, self.close)

    def close(self) -> None:
        """Read what is in the pipes now and end. What has been read can still be taken with `read`."""
        with self._changed:
            self._used = True
            for pipe in list(self._pipes):
                self._drain(pipe)
                self._end(pipe)
            self._changed.notify_all()

    # -- Under the lock ----------------------------------------------------------------------------------------------

    def _ended(self) -> bool:
        return self._discarding or (self._used and not self._pipes)

    def _on_ready(self, pipe: _Pipe) -> None:
        """May be called without having been armed (epoll reports a hang-up unasked), so it looks for itself."""
        with self._changed:
            room = _CHUNK if self._discarding else min(_CHUNK, self._limit - self._held)
            if room <= 0:
                pipe.paused = True
            elif self._read_some(pipe, room) is not None and pipe.watch is not None:
                pipe.watch.arm()

    def _read_some(self, pipe: _Pipe, size: int) -> int | None:
        """Read once: how many bytes there were, 0 where none were ready, None where the pipe has ended."""
        if pipe not in self._pipes:
            return None
        try:
            data = os.read(pipe.fd, size)
        except BlockingIOError:
            return 0
        except OSError:
            data = b""
        if not data:
            self._end(pipe)
            return None
        self._held += 0 if self._discarding else len(data)
        self._deliver(pipe, pipe.lines.feed(data, time.monotonic()))
        if pipe.lines.held and not pipe.timed:
            pipe.timed = True
            self._reactor.call_later(self._partial_age, lambda: self._on_age(pipe))
        return len(data)

    def _drain(self, pipe: _Pipe) -> None:
        """Read all that is there, whatever the limit says: it is no more than the pipe holds."""
        left = DRAIN
        while left > 0:
            count = self._read_some(pipe, _CHUNK)
            if not count:
                return
            left -= count

    def _deliver(self, pipe: _Pipe, data: bytes) -> None:
        if not data:
            return
        self._tails[pipe.process].add(data)
        if not self._discarding:
            self._queue.append(Output(pipe.process, pipe.stream, data))
            self._changed.notify_all()

    def _on_age(self, pipe: _Pipe) -> None:
        with self._changed:
            pipe.timed = False
            if not pipe.lines.held:
                return
            left = pipe.lines.since + self._partial_age - time.monotonic()
            if left <= 0:
                self._deliver(pipe, pipe.lines.flush())
            else:
                pipe.timed = True
                self._reactor.call_later(left, lambda: self._on_age(pipe))

    def _end(self, pipe: _Pipe) -> None:
        if pipe not in self._pipes:
            return
        self._deliver(pipe, pipe.lines.flush())
        self._pipes.remove(pipe)
        if pipe.watch is not None:
            pipe.watch.close()
        os.close(pipe.fd)
        self._changed.notify_all()

    def _resume(self) -> None:
        for pipe in self._pipes:
            if pipe.paused and pipe.watch is not None:
                pipe.paused = False
                pipe.watch.arm()
