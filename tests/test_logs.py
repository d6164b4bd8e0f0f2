"""The lines of a session: their order, their prefixes and colours, who waits for whom, files, bars at the bottom, readers."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest
import tqdm

from bigmachine.errors import UsageError
from bigmachine.logs import KEEP, PALETTE, SHOWN, Feed, Line, Logs, in_colour
from bigmachine.testing.conformance import eventually

SOON = 30.0


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def feed(logs: Logs, machine: str = "m-1") -> Feed:
    return logs.feed(machine, lambda: f"https://h/{machine}/")


class Terminal:
    """A pseudo-terminal of 100 × 60 that is looked at: `rows` are what a user sees."""

    def __init__(self) -> None:
        self._master, slave = pty.openpty()
        self.screen = pyte.Screen(100, 60)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.file = open(slave, "w", encoding="utf-8")  # noqa: SIM115
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 1 << 16)
            except OSError:  # What the end of a terminal is on Linux.
                return
            self.raw += data
            self._stream.feed(data)

    def close(self) -> None:
        """Returns when all has been seen."""
        self.file.close()
        self._reader.join(SOON)
        os.close(self._master)

    @property
    def rows(self) -> list[str]:
        rows = [row.rstrip() for row in self.screen.display]
        while rows and not rows[-1]:
            rows.pop()
        return rows


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    if not terminal.file.closed:
        terminal.close()


# -- The stream ----------------------------------------------------------------------------------------------------------


def test_lines_have_the_address_in_front() -> None:
    out = io.StringIO()
    logs = Logs(out)
    address = "https://m-1/"
    one, two = logs.feed("m-1", lambda: address), feed(logs, "m-2")
    one.data("0", "stdout", b"hello\nwor")
    two.data("0", "stdout", b"\n")
    address = "https://h:5/m-1/"  # Known later, for some systems.
    one.data("0", "stderr", b"err")
    one.line("closed a connection")
    one.data("0", "stdout", b"ld\n")
    logs.say("two\nlines")
    logs.close()
    assert out.getvalue() == (
        "https://m-1/: hello\n"
        "https://h/m-2/: \n"
        "https://h:5/m-1/: bigmachine: closed a connection\n"
        "https://h:5/m-1/: world\n"
        "bigmachine: two\n"
        "bigmachine: lines\n"
        "https://h:5/m-1/: err\n"
    )
    logs.close()
    logs.say("after the end")
    assert out.getvalue().endswith("bigmachine: after the end\n")


def test_standard_error_is_what_it_is_at_the_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = Logs()
    logs.say("one")
    assert capsys.readouterr().err == "bigmachine: one\n"
    other = io.StringIO()
    monkeypatch.setattr("sys.stderr", other)
    logs.say("two")
    assert other.getvalue() == "bigmachine: two\n"
    monkeypatch.setattr("sys.stderr", None)
    logs.say("three")
    assert [line.text for line in logs.last(3)] == [f"bigmachine: {number}" for number in ("one", "two", "three")]


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_stream_that_nobody_reads_any_more() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (closed, Gone()):
        logs = Logs(stream)
        feed(logs).data("0", "stdout", b"into the void\n")
        assert feed(logs).tail(1) == ["into the void"]


def test_an_encoding_that_lacks_characters() -> None:
    raw = io.BytesIO()
    logs = Logs(io.TextIOWrapper(raw, encoding="ascii"))
    feed(logs).data("0", "stdout", "π = 3\n".encode())
    assert raw.getvalue() == b"https://h/m-1/: \\u03c0 = 3\n"


def test_a_slow_reader_holds_up_who_writes_and_nobody_who_reads() -> None:
    read, write = os.pipe()
    with open(read, "rb") as reader, open(write, "w") as writer:
        logs = Logs(writer, keep=10**6, characters=10**9)
        one = feed(logs)
        chunk = b"".join(b"line %d\n" % number for number in range(1000))
        done = []

        def talk() -> None:
            for _ in range(100):
                one.data("0", "stdout", chunk)
                done.append(None)

        talker = threading.Thread(target=talk)
        talker.start()
        eventually(lambda: logs.count("m-1") >= 1000 * len(done) + 1000, "a chunk that is being written")
        # All that a page asks, while the terminal stands still.
        assert logs.last(5, "m-1")[-1].text == "line 999"
        assert logs.since(0, limit=3)[0][0].text == "line 0"
        assert logs.under_way() == []
        assert feed(logs, "m-2").tail(5) == []
        received = [reader.readline() for _ in range(100_000)]
        talker.join(SOON)
        assert len(done) == 100
    assert received == [b"https://h/m-1/: line %d\n" % (number % 1000) for number in range(100_000)]


def test_a_stream_that_somebody_has_made_non_blocking() -> None:
    """Standard error is shared with whoever else has it; all of it arrives nevertheless."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    chunk = "".join(f"π line {number}\n" for number in range(5000)).encode()
    with open(read, "rb") as reader, open(write, "w", encoding="utf-8") as writer:
        logs = Logs(writer)
        talker = threading.Thread(target=lambda: [feed(logs).data("0", "stdout", chunk) for _ in range(20)])
        talker.start()
        received = [reader.readline().decode() for _ in range(100_000)]
        talker.join(SOON)
    assert received == [f"https://h/m-1/: π line {number % 5000}\n" for number in range(100_000)]


def test_many_machines_at_once() -> None:
    """Lines are whole, in order for each, numbered in the order in which they were written; two sessions share the stream."""
    out = io.StringIO()
    sessions = [Logs(out, keep=10**6), Logs(out, keep=10**6)]
    names = [f"m-{number}" for number in range(8)]

    def talk(index: int) -> None:
        one = feed(sessions[index % 2], names[index])
        for number in range(500):
            one.data("0", "stdout", b"%d\n%d" % (2 * number, 2 * number + 1))
            one.data("0", "stdout", b"\n")

    threads = [threading.Thread(target=talk, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    found = [re.fullmatch(r"https://h/(m-\d)/: (\d+)", line) for line in out.getvalue().splitlines()]
    assert None not in found
    for name in names:
        assert [int(match[2]) for match in found if match and match[1] == name] == list(range(1000))
    for logs in sessions:
        lines, lost = logs.since(0, limit=10**6)
        assert lost == 0
        assert [line.number for line in lines] == list(range(1, 4001))


# -- Colours -------------------------------------------------------------------------------------------------------------


def luminance(colour: int) -> float:
    """Of one of xterm's 256, as of WCAG."""
    if colour < 232:
        steps = [0, 95, 135, 175, 215, 255]
        rgb = [steps[(colour - 16) // 36], steps[(colour - 16) // 6 % 6], steps[(colour - 16) % 6]]
    else:
        rgb = [8 + 10 * (colour - 232)] * 3
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (each / 255 for each in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_can_be_read_on_white_and_on_black() -> None:
    assert len(set(PALETTE)) == len(PALETTE)
    for colour in PALETTE:
        light = luminance(colour)
        assert 1.05 / (light + 0.05) >= 3, (colour, "on white")
        assert (light + 0.05) / 0.05 >= 3, (colour, "on black")


@pytest.mark.parametrize(
    ("environ", "on_terminal", "elsewhere"),
    [
        ({}, True, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "0"}, True, False),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_when_there_is_colour(
    environ: dict[str, str], on_terminal: bool, elsewhere: bool, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert in_colour(terminal.file) == on_terminal
    assert in_colour(io.StringIO()) == elsewhere
    closed = io.StringIO()
    closed.close()
    assert not in_colour(closed) or elsewhere


def test_machines_have_colours_on_a_terminal(terminal: Terminal) -> None:
    logs = Logs(terminal.file)
    for name in ("m-1", "m-2"):
        feed(logs, name).data("0", "stdout", b"plain, \x1b[31mred\nplain\n")
    feed(logs, "m-1").line("its own")
    logs.say("the session's")
    terminal.close()
    assert terminal.rows == [
        *(f"https://h/{name}/: {text}" for name in ("m-1", "m-2") for text in ("plain, red", "plain")),
        "https://h/m-1/: bigmachine: its own",
        "bigmachine: the session's",
    ]
    cells = terminal.screen.buffer
    prefixes = [cells[row][0].fg for row in range(6)]
    assert prefixes[0] == prefixes[1] == prefixes[4]
    assert prefixes[2] == prefixes[3]
    assert len({prefixes[0], prefixes[2], prefixes[5]}) == 3
    assert prefixes[5] == "default"
    at = len("https://h/m-1/: ")
    assert cells[0][at].fg == "default"
    assert cells[0][at + len("plain, ")].fg == "red"
    assert cells[1][at].fg == "default", "a colour ends with its line"


def test_no_colours_elsewhere() -> None:
    out = io.StringIO()
    logs = Logs(out)
    feed(logs).data("0", "stdout", b"\x1b[1;31mred\x1b[0m\n\x1b[2Jcleared\n")
    assert out.getvalue() == "https://h/m-1/: red\nhttps://h/m-1/: cleared\n"
    assert [line.text for line in logs.last(2)] == ["red", "cleared"]


# -- Bars ----------------------------------------------------------------------------------------------------------------


class Pipe(io.StringIO):
    """A worker's standard error."""

    def __init__(self, one: Feed) -> None:
        super().__init__()
        self._feed = one

    def write(self, text: str) -> int:
        self._feed.data("0", "stderr", text.encode())
        return len(text)


def test_workers_bars_do_not_wreck_the_terminal(terminal: Terminal) -> None:
    logs = Logs(terminal.file)

    def work(name: str) -> None:
        pipe = Pipe(feed(logs, name))
        for number in tqdm.trange(3, desc=f"outer {name}", file=pipe, mininterval=0, ncols=60):
            for _ in tqdm.trange(50, desc=f"inner {name}", file=pipe, mininterval=0, ncols=60, leave=False):
                pass
            print(f"between {number}", file=pipe)

    for name in ("m-1", "m-2"):
        work(name)
    logs.close()
    terminal.close()
    assert all(re.match(r"https://h/m-\d/: \S", row) for row in terminal.rows), terminal.rows
    assert len(terminal.rows) < 40
    for name in ("m-1", "m-2"):
        mine = [row for row in terminal.rows if row.startswith(f"https://h/{name}/")]
        assert f"outer {name}: 100%" in mine[-1]
    assert b"\x1b[A" not in terminal.raw


def test_a_bar_that_stands_still_is_shown_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process has nothing more to say, and may go on for hours."""
    now = 1000.0
    monkeypatch.setattr("bigmachine.logs.time.monotonic", lambda: now)
    out = io.StringIO()
    logs = Logs(out)
    one = feed(logs)
    one.data("0", "stderr", b"\r 57%")
    assert out.getvalue() == ""
    assert [(line.number, line.text) for line in logs.under_way("m-1")] == [(0, " 57%")]
    now = 1006.0
    one.show_states()
    assert out.getvalue() == "https://h/m-1/:  57%\n"
    one.data("0", "stderr", b"\r100%\n")
    assert out.getvalue() == "https://h/m-1/:  57%\nhttps://h/m-1/: 100%\n"
    assert logs.under_way() == []
    logs.close()


def test_states_are_shown_by_a_thread_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigmachine.logs.lines.Lines.__init__.__defaults__", (1 << 20, 0.01))
    out = io.StringIO()
    logs = Logs(out)
    for _ in range(3):
        feed(logs).data("0", "stderr", b"\r 57%")
        eventually(lambda: out.getvalue().endswith(" 57%\n"), "the state")
        eventually(lambda: not any(thread.name == "bigmachine-bars" for thread in threading.enumerate()), "the end")
        feed(logs).data("0", "stderr", b"\r 0%\n")
    logs.close()


def test_a_bar_stands_at_the_bottom(terminal: Terminal) -> None:
    logs = Logs(terminal.file)
    bar = tqdm.tqdm(total=400, desc="calls", file=terminal.file, mininterval=0, ncols=80)

    def talk(name: str) -> None:
        for number in range(20):
            feed(logs, name).data("0", "stdout", b"line %d\n" % number)
            time.sleep(0)

    with logs.beside(bar):
        threads = [threading.Thread(target=talk, args=(f"m-{n}",)) for n in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(400):
            bar.update()
        for thread in threads:
            thread.join(SOON)
    bar.close()
    logs.say("after it")
    terminal.close()
    rows = terminal.rows
    assert sorted(rows[:40]) == sorted(f"https://h/m-{n}/: line {number}" for n in range(2) for number in range(20))
    assert rows[40].startswith("calls: 100%|")
    assert "400/400" in rows[40]
    assert rows[41:] == ["bigmachine: after it"]


def test_a_bar_of_the_programs_own_stands_at_the_bottom(terminal: Terminal) -> None:
    """Nobody has said so: lines are to be seen, and the bar, too."""
    logs = Logs(terminal.file)
    with tqdm.tqdm(total=3, desc="own", file=terminal.file, mininterval=0, ncols=80) as bar:
        for number in range(3):
            feed(logs).data("0", "stdout", b"line %d\n" % number)
            bar.update()
    logs.say("after it")
    terminal.close()
    *rows, bar_row, after = terminal.rows
    assert rows == [f"https://h/m-1/: line {number}" for number in range(3)]
    assert bar_row.startswith("own: 100%|")
    assert after == "bigmachine: after it"


class Broken:
    def clear(self) -> None:
        raise ValueError("I/O operation on closed file")

    refresh = clear


def test_a_bar_that_fails_is_not_in_the_way() -> None:
    out = io.StringIO()
    logs = Logs(out)
    with logs.beside(Broken()):
        logs.say("said")
    assert out.getvalue() == "bigmachine: said\n"


# -- Readers -------------------------------------------------------------------------------------------------------------


def texts(lines: list[Line]) -> list[str]:
    return [line.text for line in lines]


def test_what_readers_get() -> None:
    logs = Logs(io.StringIO())
    one, two = feed(logs, "m-1"), feed(logs, "m-2")
    before = time.time()
    one.data("0", "stdout", b"a\nb\n")
    two.data("3", "stderr", b"c\n")
    one.line("d")
    logs.say("e")
    assert logs.number == 5
    lines, lost = logs.since(0)
    assert lost == 0
    assert [line._replace(time=0) for line in lines] == [
        Line(1, 0, "m-1", "0", "stdout", "a"),
        Line(2, 0, "m-1", "0", "stdout", "b"),
        Line(3, 0, "m-2", "3", "stderr", "c"),
        Line(4, 0, "m-1", "bigmachine", "log", "bigmachine: d"),
        Line(5, 0, "", "driver", "log", "bigmachine: e"),
    ]
    assert all(before <= line.time <= time.time() for line in lines)
    assert texts(logs.since(1)[0]) == ["b", "c", "bigmachine: d", "bigmachine: e"]
    assert texts(logs.since(1, limit=2)[0]) == ["b", "c"]
    assert texts(logs.since(1, "m-1")[0]) == ["b", "bigmachine: d"]
    assert texts(logs.since(0, "")[0]) == ["bigmachine: e"]
    assert texts(logs.since(0, text="bigmachine")[0]) == ["bigmachine: d", "bigmachine: e"]
    assert logs.since(5) == ([], 0)
    assert logs.since(99) == ([], 0)
    assert logs.since(0, "m-3") == ([], 0)
    assert texts(logs.last(2)) == ["bigmachine: d", "bigmachine: e"]
    assert texts(logs.last(2, "m-1")) == ["b", "bigmachine: d"]
    assert texts(logs.last(100, "m-2")) == ["c"]
    assert logs.last(0) == logs.last(5, "m-3") == []
    assert one.tail(1) == ["bigmachine: d"]
    assert [logs.count(machine) for machine in ("m-1", "m-2", "", "m-3")] == [3, 1, 1, 0]


def test_what_is_not_kept_any_more() -> None:
    logs = Logs(io.StringIO(), keep=10)
    one, two = feed(logs, "m-1"), feed(logs, "m-2")
    two.data("0", "stdout", b"early\n")
    for number in range(100):
        one.data("0", "stdout", b"%d\n" % number)
    lines, lost = logs.since(0)
    assert texts(lines) == ["early", *map(str, range(90, 100))]
    assert lost == 90
    assert logs.since(0, "m-1")[1] == 90
    assert logs.since(0, "m-2") == ([lines[0]], 0)
    assert logs.since(lines[1].number - 1)[1] == 0
    assert logs.since(lines[1].number - 3)[1] == 2
    assert logs.count("m-1") == 100
    one.data("0", "stdout", b"".join(b"%d\n" % number for number in range(100, 200)))  # In one piece.
    lines, lost = logs.since(0, "m-1")
    assert texts(lines) == [str(number) for number in range(190, 200)]
    assert [line.number for line in lines] == list(range(192, 202))
    assert lost == 190
    assert texts(logs.last(3, "m-1")) == ["197", "198", "199"]


def test_memory_is_bounded() -> None:
    logs = Logs(io.StringIO(), characters=110_000)
    one = feed(logs)
    for _ in range(100):
        one.data("0", "stdout", b"x" * 50_000 + b"\n")
    (first, *_), lost = logs.since(0)
    assert lost == 98
    assert len(first.text) < SHOWN + 50
    assert first.text.endswith("x… (50000 characters)")
    for _ in range(100):
        one.data("0", "stdout", b"\n" * KEEP)
    assert len(logs.since(0, limit=10**6)[0]) == KEEP


def test_waiting_for_lines() -> None:
    logs = Logs(io.StringIO())
    assert not logs.wait(0, 0.0)
    threading.Thread(target=lambda: logs.say("a line")).start()
    assert logs.wait(0, SOON)
    assert logs.wait(0, 0.0)
    threading.Thread(target=logs.close).start()
    assert not logs.wait(1, SOON), "nothing follows"
    assert logs.closed


# -- Files ---------------------------------------------------------------------------------------------------------------

STAMP = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"


def test_one_file_for_each_machine(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "logs"
    logs = Logs(io.StringIO(), directory)
    assert [path.name for path in directory.iterdir()] == ["driver.log"]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    one = feed(logs, "m-1")
    assert (directory / "m-1.log").exists(), "at once: a machine that says nothing has one"
    one.data("0", "stdout", "\x1b[31mπ\x1b[0m\n\nthree\nfo".encode())
    one.line("its own")
    logs.say("the session's")
    path = directory / "m-1.log"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    expected = ["0 stdout π", "0 stdout ", "0 stdout three", "bigmachine log bigmachine: its own"]
    said = path.read_text().splitlines()
    assert all(re.match(STAMP + " ", line) for line in said)
    assert [line.partition(" ")[2] for line in said] == expected
    logs.close()
    assert path.read_text().endswith(" 0 stdout fo\n")
    assert re.fullmatch(STAMP + " driver log bigmachine: the session's\n", (directory / "driver.log").read_text())
    logs.say("after the end")


def test_a_directory_that_has_logs_of_others(tmp_path: Path) -> None:
    for name in ("m-1", "m-2"):
        logs = Logs(io.StringIO(), tmp_path)
        feed(logs, name).data("0", "stdout", b"hello\n")
        logs.say(name)
        logs.close()
    assert len((tmp_path / "driver.log").read_text().splitlines()) == 2
    assert len((tmp_path / "m-1.log").read_text().splitlines()) == 1


def test_a_directory_that_cannot_be_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for bad in (file, file / "below"):
        with pytest.raises(UsageError, match=f"cannot write logs to {re.escape(str(bad))}: .*; name a directory"):
            Logs(io.StringIO(), bad)


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    (tmp_path / "m-1.log").symlink_to("/dev/full")
    out = io.StringIO()
    logs = Logs(out, tmp_path)
    for _ in range(3):
        feed(logs, "m-1").data("0", "stdout", b"one\ntwo\n")
    feed(logs, "m-2").data("0", "stdout", b"three\n")
    logs.close()
    said = out.getvalue().splitlines()
    assert [line for line in said if not line.startswith("https://")] == [
        f"bigmachine: cannot write logs to {tmp_path}: No space left on device; the rest of the run goes without",
        f"bigmachine: 7 lines are missing in {tmp_path}: No space left on device",
    ]
    assert len(said) == 9


# -- Whole programs ------------------------------------------------------------------------------------------------------

PROGRAM = """
import os, sys, signal, threading, time
import bigmachine
from bigmachine import driver

class Talker:
    def lines(self, name, n):
        for number in range(n):
            print(name, number, file=sys.stderr if number % 2 else sys.stdout)

    def bar(self, name):
        import tqdm
        for _ in tqdm.trange(200, desc=name, ncols=60):
            time.sleep(0.001)

    def write_some(self, n):
        sys.stderr.write(n * (1023 * "x" + "\\n"))
        return os.getppid()

    def write_until_nobody_reads(self):
        said = [0, -1]

        def write():
            while True:
                os.write(2, b"%08d%s\\n" % (said[0], 1000 * b"x"))
                said[0] += 1

        threading.Thread(target=write, daemon=True).start()
        while said[0] != said[1]:
            said[1] = said[0]
            time.sleep(1)
        print(said[0])
        os.kill(os.getpid(), signal.SIGKILL)

    def write_and_crash(self, n):
        self.write_some(n)
        os.kill(os.getpid(), signal.SIGKILL)

    def crash(self):
        os.write(1, b"last words")
        sys.stderr.write("famous last words\\n")
        os.kill(os.getpid(), signal.SIGSEGV)

    def write(self, path, n):
        text = 1023 * "x"
        for number in range(n):
            sys.stderr.write(text + "\\n")
            if number % 64 == 0:
                with open(path, "w") as file:
                    file.write(str(number))

    def wait(self):
        print("I wait")
        time.sleep(600)
"""


@pytest.fixture
def program(tmp_path: Path) -> Any:
    def make(body: str, *flags: str) -> list[str]:
        path = tmp_path / "program.py"
        indented = "\n".join("    " + line for line in body.strip().splitlines())
        path.write_text(f"{PROGRAM}\nwith driver.start(http='off') as b:\n{indented}\n")
        return [sys.executable, str(path), *flags]

    return make


@pytest.mark.slow
def test_ten_machines_with_ten_thousand_lines(program: Any, tmp_path: Path) -> None:
    command = program(
        """
machines = b.start(10, {"Talker": Talker()})
calls = [machine.submit("Talker.lines", f"name{number}", 10_000) for number, machine in enumerate(machines)]
for call in calls:
    call.result()
""",
        f"-bigm.logdir={tmp_path / 'logs'}",
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stderr.splitlines()
    assert len(lines) == 100_000
    for number in range(10):
        mine = [
            line.partition(": ") for line in lines if line.endswith(tuple("0123456789")) and f" name{number} " in line
        ]
        assert len({prefix for prefix, _, _ in mine}) == 1
        for odd in (0, 1):  # Each stream is in order.
            said = [int(text.split()[1]) for _, _, text in mine]
            assert [n for n in said if n % 2 == odd] == list(range(odd, 10_000, 2))
    files = sorted((tmp_path / "logs").glob("m-*.log"))
    assert len(files) == 10
    assert sum(len(file.read_text().splitlines()) for file in files) == 100_000


@pytest.mark.slow
def test_last_words_before_a_crash(program: Any) -> None:
    command = program("""
machine, = b.start(1, {"Talker": Talker()})
try:
    machine.call("Talker.crash")
except Exception as error:
    print(error)
""")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = [line.partition("/: ")[2] for line in done.stderr.splitlines()]
    assert "last words" in said
    assert "famous last words" in said
    assert any("Segmentation fault" in line for line in said)


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_what_was_said(program: Any, tmp_path: Path) -> None:
    command = program(
        """
machine, = b.start(1, {"Talker": Talker()})
machine.call("Talker.lines", "name", 1000)
machine.call("Talker.wait")
""",
        f"-bigm.logdir={tmp_path / 'logs'}",
    )
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as driver:
        assert driver.stderr is not None
        for line in driver.stderr:
            if line.endswith("I wait\n"):
                break
        driver.kill()
    (file,) = (tmp_path / "logs").glob("m-*.log")
    said = [line.split()[-1] for line in file.read_text().splitlines()]
    assert sorted(said[:-1], key=int) == [str(number) for number in range(1000)]
    assert file.read_text().endswith(" 0 stdout I wait\n")


@pytest.mark.slow
def test_a_terminal_that_stands_still_stops_who_writes(program: Any, tmp_path: Path) -> None:
    """64 MB are written on a machine while nobody reads the driver's standard error: most of it has to wait, none is lost."""
    count = tmp_path / "count"
    command = program(f"""
machine, = b.start(1, {{"Talker": Talker()}})
machine.call("Talker.write", {str(count)!r}, 65536)
print("done")
""")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        assert driver.stderr is not None
        eventually(count.exists, "the first line")
        before = None
        while (now := count.read_text()) != before:  # Until it does not move any more.
            before = now
            time.sleep(0.5)
        assert int(now or 0) < 32768
        received = driver.stderr.read()
        assert driver.stdout.read() == b"done\n"
        assert driver.wait(SOON) == 0
    lines = received.splitlines()
    assert len(lines) == 65536
    assert {line.partition(b"/: ")[2] for line in lines} == {1023 * b"x"}


@pytest.mark.slow
def test_a_machine_does_not_wait_for_a_terminal_that_stands_still_and_nothing_is_lost(program: Any) -> None:
    """Nobody reads the driver's standard error until its machine has gone."""
    command = program("""
machine, = b.start(1, {"Talker": Talker()})
print(machine.call("Talker.write_some", 1500), flush=True)
""")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        assert driver.stderr is not None
        supervisor = Path("/proc", driver.stdout.readline().decode().strip())
        eventually(lambda: not supervisor.exists(), "the machine's end")
        assert driver.poll() is None
        lines = driver.stderr.read().splitlines()
        assert driver.wait(SOON) == 0
    assert len(lines) == 1500
    assert {line.partition(b"/: ")[2] for line in lines} == {1023 * b"x"}


@pytest.mark.slow
def test_a_death_is_explained_though_a_terminal_stands_still(program: Any) -> None:
    command = program("""
machine, = b.start(1, {"Talker": Talker()})
try:
    machine.call("Talker.write_and_crash", 500)
except Exception as error:
    print(type(error).__name__, str(error).splitlines()[0], flush=True)
machine.wait(bigmachine.State.STOPPED, 30)
print(type(machine.error).__name__, str(machine.error).splitlines()[0], flush=True)
""")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        assert driver.stderr is not None
        for said in (driver.stdout.readline().decode(), driver.stdout.readline().decode()):
            assert re.search(r"^MachineStopped .*service process 0 \(pid \d+\) was killed by SIGKILL", said), said
        lines = driver.stderr.read().splitlines()
        assert driver.wait(SOON) == 0
    assert len([line for line in lines if line.endswith(1023 * b"x")]) == 500


@pytest.mark.skipif(not os.environ.get("BIGMACHINE_SLOW"), reason="takes some seconds: BIGMACHINE_SLOW=1")
def test_last_words_wait_for_a_terminal_that_stands_still(program: Any) -> None:
    """Longer than a machine whose services have died waits for a driver that is not there; much has to wait on the machine."""
    command = program("""
machine, = b.start(1, {"Talker": Talker()})
try:
    machine.call("Talker.write_until_nobody_reads")
except Exception as error:
    print(type(error).__name__, flush=True)
time.sleep(8)
print("on", flush=True)
machine.wait(bigmachine.State.STOPPED, 30)
""")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as driver:
        assert driver.stdout is not None
        assert driver.stderr is not None
        assert [driver.stdout.readline(), driver.stdout.readline()] == [b"MachineStopped\n", b"on\n"]
        lines = [line.partition(b"/: ")[2] for line in driver.stderr.read().splitlines()]
        assert driver.wait(SOON) == 0
    numbers = [int(line[:8]) for line in lines if line.endswith(b"x")]
    assert numbers == list(range(len(numbers)))
    assert max(int(line) for line in lines if len(line) < 8) <= len(numbers)


@pytest.mark.slow
def test_a_whole_program_on_a_terminal(program: Any, terminal: Terminal) -> None:
    command = program("""
machines = b.start(2, {"Talker": Talker()})
calls = [machine.submit("Talker.bar", f"bar{number}") for number, machine in enumerate(machines)]
for call in calls:
    call.result()
b.say("done")
""")
    with contextlib.closing(terminal):
        assert subprocess.run(command, stderr=terminal.file, timeout=60).returncode == 0
    assert "bigmachine: done" in terminal.rows
    bars = [row for row in terminal.rows if row != "bigmachine: done"]
    assert all(re.match(r"https://localhost:\d+/m-\w+/: bar[01]: ", row) for row in bars), terminal.rows
    for number in range(2):
        assert any(f"bar{number}: 100%" in row for row in bars)
    assert terminal.screen.buffer[0][0].fg != "default"


def test_a_bad_directory_is_said_before_any_machine_starts(program: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    command = program("print('not reached')", f"-bigm.logdir={tmp_path / 'file'}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"cannot write logs to {tmp_path / 'file'}: File exists; name a directory" in done.stderr.splitlines()[-1]
