"""How packing is shown: lines in a file, one live line on a terminal (a pseudo terminal, as a person has)."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterator

import pytest

from bigmachine.cli.live import LiveLine
from bigmachine.cli.terminal import is_live, progress
from bigmachine.pack.progress import Lines

COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """A pseudo terminal: `stream` is what a program writes to."""

    def __init__(self) -> None:
        self._master, slave = os.openpty()
        self.stream = os.fdopen(slave, "w", encoding="utf-8")

    def shown(self) -> str:
        """All that was written. Less than the kernel's buffer takes, so nobody had to read meanwhile."""
        self.stream.write("\0")
        self.stream.flush()
        found = b""
        while not found.endswith(b"\0"):
            found += os.read(self._master, 65536)
        return found[:-1].decode()

    def close(self) -> None:
        self.stream.close()
        os.close(self._master)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    found = Terminal()
    yield found
    found.close()


def play(stream: io.TextIOBase | object) -> None:
    with progress(stream=stream) as shown:  # type: ignore[arg-type]
        shown.step("resolving for linux/amd64")
        shown.note("app.py imports [oddments] :smile:, which is not installed")
        shown.step("writing app.pex")


def test_on_a_terminal_one_line_lives_and_is_gone_in_the_end(terminal: Terminal) -> None:
    play(terminal.stream)
    shown = terminal.shown()
    assert COLOUR.search(shown)
    assert "resolving for linux/amd64  0 s" in SEQUENCE.sub("", shown)
    assert "note: app.py imports [oddments] :smile:, which is not installed\r\n" in SEQUENCE.sub("", shown)
    # What comes last is: erase the line, and show the cursor again.
    after = shown[shown.rindex("writing app.pex") :]
    assert "\x1b[2K" in after
    assert "\x1b[?25h" in after
    assert "writing" not in after[1:]


def test_no_color_is_honoured(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    play(terminal.stream)
    shown = terminal.shown()
    assert "writing app.pex" in shown
    assert not COLOUR.search(shown)


def test_a_dumb_terminal_gets_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    play(terminal.stream)
    assert "\x1b" not in terminal.shown()


@pytest.mark.parametrize(("term", "expected"), [("xterm", True), ("dumb", False), (None, False)])
def test_which_terminals_can_move_their_cursor(terminal: Terminal, term: str | None, expected: bool) -> None:
    assert is_live(terminal.stream, {} if term is None else {"TERM": term}) is expected
    assert not is_live(io.StringIO(), {"TERM": "xterm"})


def test_seconds_count_from_the_start(terminal: Terminal) -> None:
    times = iter([100.0])
    clock: Callable[[], float] = lambda: next(times, 175.0)  # noqa: E731
    with LiveLine(terminal.stream, clock) as line:
        line.step("resolving")
    assert "resolving  75 s" in SEQUENCE.sub("", terminal.shown())


def test_a_long_step_is_cut(terminal: Terminal) -> None:
    with LiveLine(terminal.stream) as line:
        line.step("x" * 500)
    shown = SEQUENCE.sub("", terminal.shown())
    assert "…" in shown
    assert "x" * 80 not in shown


def test_an_error_ends_the_line(terminal: Terminal) -> None:
    line = LiveLine(terminal.stream)
    line.step("resolving")
    line.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert "\x1b[?25h" in terminal.shown()


def test_lines_say_nothing_twice() -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    for _ in range(2):
        lines.step("resolving for linux/amd64")
        lines.note("something odd")
    lines.step("writing app.pex")
    assert stream.getvalue() == "resolving for linux/amd64\nnote: something odd\nwriting app.pex\n"
