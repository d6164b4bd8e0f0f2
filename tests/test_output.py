"""Output capture: whole lines, nothing lost, nobody blocked but by the limit."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from bigmachine.rpc.reactor import Reactor
from bigmachine.rpc.reactor import reactor as shared
from bigmachine.supervisor.output import MAX_LINE, LineBuffer, Output, OutputCapture, Tail, merge

DEADLINE = 10.0
NEVER = 1000.0
"""An age that no partial line reaches in a test."""


@pytest.fixture
def reactor() -> Reactor:
    return shared()


class Writer:
    """The process's end of a captured pipe."""

    def __init__(self, capture: OutputCapture, process: int = 0, stream: str = "stdout") -> None:
        read, self.fd = os.pipe()
        capture.add(process, stream, read)

    def write(self, data: bytes) -> None:
        os.write(self.fd, data)

    def write_and_end(self, data: bytes) -> None:
        self.write(data)
        self.end()

    def end(self) -> None:
        os.close(self.fd)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.001)


def read_all(capture: OutputCapture) -> list[Output]:
    found: list[Output] = []
    while (outputs := capture.read(DEADLINE)) is not None:
        assert outputs, "no output, and no end"
        found += outputs
    return merge(found)


def read_bytes(capture: OutputCapture, size: int) -> bytes:
    data = b""
    while len(data) < size:
        outputs = capture.read(DEADLINE)
        assert outputs, f"only {len(data)} of {size} bytes came"
        data += b"".join(output.data for output in outputs)
    return data


# -- Pure --------------------------------------------------------------------------------------------------------------


def test_line_buffer_holds_the_beginning_of_a_line() -> None:
    lines = LineBuffer()
    assert lines.feed(b"one\ntw", 1.0) == b"one\n"
    assert lines.since == 1.0
    assert lines.feed(b"", 2.0) == b""
    assert lines.feed(b"o", 2.0) == b""
    assert lines.since == 1.0
    assert lines.feed(b"\nthr", 3.0) == b"two\n"
    assert lines.since == 3.0
    assert lines.flush() == b"thr"
    assert lines.flush() == b""


def test_line_buffer_gives_up_on_long_lines() -> None:
    lines = LineBuffer()
    assert lines.feed(b"x" * MAX_LINE, 1.0) == b""
    assert lines.feed(b"yz", 1.0) == b"x" * MAX_LINE + b"yz"
    assert lines.feed(b"\n", 1.0) == b"\n"


def test_tail_keeps_the_last_lines() -> None:
    tail = Tail(lines=3, size=1000)
    for number in range(10):
        tail.add(b"line %d\n" % number)
    assert tail.text() == "line 7\nline 8\nline 9\n"
    assert tail.text(b"half") == "line 8\nline 9\nhalf"


def test_tail_is_bounded_and_starts_with_a_whole_line() -> None:
    tail = Tail(lines=100, size=20)
    for number in range(1000):
        tail.add(b"line %d\n" % number)
    assert tail.text() == "line 998\nline 999\n"
    tail.add(b"x" * 100)
    assert tail.text() == "x" * 20


def test_tail_of_what_is_no_text() -> None:
    tail = Tail()
    tail.add(b"\xff\xfe\n")
    assert tail.text() == "��\n"


def test_merge_joins_neighbours_only() -> None:
    a, b = Output(0, "stdout", b"a"), Output(0, "stderr", b"b")
    assert merge([a, a, b, a]) == [Output(0, "stdout", b"aa"), b, a]


# -- With pipes --------------------------------------------------------------------------------------------------------


def test_output_and_its_end(reactor: Reactor) -> None:
    capture = OutputCapture(reactor)
    out, err = Writer(capture, 3, "stdout"), Writer(capture, 3, "stderr")
    out.write(b"hello\n")
    assert capture.read(DEADLINE) == [Output(3, "stdout", b"hello\n")]
    err.write(b"world\n")
    assert capture.read(DEADLINE) == [Output(3, "stderr", b"world\n")]
    out.end()
    err.write(b"no newline")
    err.end()
    assert read_all(capture) == [Output(3, "stderr", b"no newline")]
    assert capture.read(0) is None


def test_nothing_to_read_within_the_timeout(reactor: Reactor) -> None:
    capture = OutputCapture(reactor)
    assert capture.read(0) == []
    writer = Writer(capture)
    assert capture.read(0) == []
    writer.end()
    assert capture.read(DEADLINE) is None


def test_lines_of_two_processes_do_not_mix(reactor: Reactor) -> None:
    capture = OutputCapture(reactor, partial_age=NEVER)
    one, two = Writer(capture, 1), Writer(capture, 2)
    for number in range(200):
        one.write(b"one ")
        two.write(b"two ")
        one.write(b"%d\n" % number)
        two.write(b"%d\n" % number)
    one.end()
    two.end()
    outputs = read_all(capture)
    assert all(output.data.endswith(b"\n") for output in outputs)
    for process, name in ((1, b"one"), (2, b"two")):
        data = b"".join(output.data for output in outputs if output.process == process)
        assert data == b"".join(name + b" %d\n" % number for number in range(200))


def test_beginning_of_a_line_is_held_until_it_is_old(reactor: Reactor) -> None:
    capture = OutputCapture(reactor, partial_age=NEVER)
    held, other = Writer(capture, 1), Writer(capture, 2)
    held.write(b"progress 50 %")
    eventually(lambda: capture.last_output(1) == "progress 50 %")
    other.write(b"line\n")
    assert capture.read(DEADLINE) == [Output(2, "stdout", b"line\n")]
    held.end()
    assert capture.read(DEADLINE) == [Output(1, "stdout", b"progress 50 %")]
    other.end()


def test_old_beginning_of_a_line_is_delivered(reactor: Reactor) -> None:
    capture = OutputCapture(reactor, partial_age=0.01)
    writer = Writer(capture)
    writer.write(b"Continue? ")
    assert capture.read(DEADLINE) == [Output(0, "stdout", b"Continue? ")]
    writer.write(b"yes")
    assert capture.read(DEADLINE) == [Output(0, "stdout", b"yes")]
    writer.end()


def test_very_long_line_is_delivered_in_pieces(reactor: Reactor) -> None:
    capture = OutputCapture(reactor, partial_age=NEVER)
    writer = Writer(capture)
    text = b"x" * (3 * MAX_LINE)
    thread = threading.Thread(target=writer.write_and_end, args=(text,))
    thread.start()
    assert read_bytes(capture, len(text)) == text
    thread.join(DEADLINE)


def test_writer_waits_when_nobody_reads_and_nothing_is_lost(reactor: Reactor) -> None:
    limit = 100_000
    capture = OutputCapture(reactor, limit=limit)
    writer = Writer(capture)
    os.set_blocking(writer.fd, False)
    line = b"0123456789" * 9 + b"abcdefghi\n"
    written = 0

    def full() -> bool:
        nonlocal written
        while True:
            try:
                written += os.write(writer.fd, line)
            except BlockingIOError:
                return capture._held >= limit

    eventually(full)
    assert capture._held == limit
    assert written >= limit + 4096  # The pipe is full as well.
    os.set_blocking(writer.fd, True)
    more = threading.Thread(target=writer.write_and_end, args=(line * 5000,))
    more.start()
    data = b"".join(output.data for output in read_all(capture))
    more.join(DEADLINE)
    assert data == line * (written // len(line)) + line[: written % len(line)] + line * 5000


def test_discard_frees_whoever_is_blocked(reactor: Reactor) -> None:
    capture = OutputCapture(reactor, limit=1000)
    writer = Writer(capture)
    blocked = threading.Thread(target=writer.write, args=(b"x\n" * 500_000,))
    blocked.start()
    eventually(lambda: capture._held >= 1000)
    capture.discard()
    assert capture.read(DEADLINE) is None
    blocked.join(DEADLINE)
    assert not blocked.is_alive()
    writer.write(b"famous last words\n")
    assert capture.last_output(0).endswith("famous last words\n")  # Still told with a death.
    writer.end()


def test_last_output_has_what_is_still_in_the_pipe(reactor: Reactor) -> None:
    capture = OutputCapture(reactor, limit=110)
    out, err = Writer(capture, 0, "stdout"), Writer(capture, 0, "stderr")
    out.write(b"many lines\n" * 50)
    eventually(lambda: capture._held >= 110)
    err.write(b"Fatal Python error: Segmentation fault")
    assert capture.last_output(0).startswith("many lines\n" * 50)
    assert capture.last_output(0).endswith("Fatal Python error: Segmentation fault")
    assert capture.last_output(1) == ""
    out.end()
    err.end()
    assert b"".join(o.data for o in read_all(capture) if o.stream == "stdout") == b"many lines\n" * 50


def test_close_after_ends_pipes_that_somebody_holds(reactor: Reactor) -> None:
    capture = OutputCapture(reactor, partial_age=NEVER)
    writer = Writer(capture)
    writer.write(b"line\nhalf")
    capture.close_after(0.001)
    assert read_all(capture) == [Output(0, "stdout", b"line\nhalf")]
    with pytest.raises(BrokenPipeError):
        writer.write(b"nobody listens")
    writer.end()


def test_close_without_any_pipe_is_the_end(reactor: Reactor) -> None:
    capture = OutputCapture(reactor)
    capture.close()
    assert capture.read(DEADLINE) is None
