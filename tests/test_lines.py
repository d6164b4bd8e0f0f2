"""What a process writes, as lines: chunks cut anywhere, colours, progress bars as tqdm and rich draw them."""

from __future__ import annotations

import io
import random
import time

import pytest
import rich.console
import rich.live
import rich.progress
import tqdm

from bigmachine.logs.lines import MAX_ROWS, STATE_EVERY, Lines, plain

RED, RESET = "\x1b[31m", "\x1b[0m"


def said(*chunks: bytes | str, lines: Lines | None = None, end: bool = False, now: float = 0.0) -> list[str]:
    lines = lines or Lines()
    texts = [lines.feed(chunk.encode() if isinstance(chunk, str) else chunk, now).text for chunk in chunks]
    if end:
        texts.append(lines.end().text)
    assert all(text.endswith("\n") for text in texts if text)
    return "".join(texts).split("\n")[:-1]


# -- Lines ---------------------------------------------------------------------------------------------------------------


def test_a_line_is_said_when_it_ends() -> None:
    lines = Lines()
    assert said("one\n\ntw", lines=lines) == ["one", ""]
    assert lines.under_way() == ["tw"]
    assert said("o\nthree", lines=lines) == ["two"]
    assert said(lines=lines, end=True) == ["three"]
    assert said(lines=lines, end=True) == []
    assert lines.under_way() == []


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("a\tb\n", "a\tb"),
        ("a\r\nb\r\n", "a\nb"),
        ("nul \0, bell \a, backspace x\b, delete \x7f\n", "nul , bell , backspace , delete"),
        ("c1 \x85\x9b31m.\n", "c1 31m."),
        (f"{RED}red{RESET}\n", f"{RED}red{RESET}"),
        ("\x1b[38;5;208morange\x1b[48:2::1:2:3m\n", "\x1b[38;5;208morange\x1b[48:2::1:2:3m"),
        ("\x1b]0;a title\x07text\n", "text"),
        ("\x1b]8;;https://a.b/\x1b\\link\x1b]8;;\x1b\\\n", "link"),
        ("\x1bPdevice\x1b\\control\n", "control"),
        ("\x1b[2J\x1b[H\x1b[?25l\x1b[?1049hcleared\x1bc\x1b(B\x1b7\x1b[6n\n", "cleared"),
        ("\x1b[>4;1mno colour\n", "no colour"),
        ("out of\x1b[10;20H place\x1b[5C\x1b[3P\n", "out of place"),
        (b"\xff\xfe \xc3( \xe2\x82\n", "\ufffd\ufffd \ufffd( \ufffd"),
        ("line\u2028separator, \u202eright to left\n", "line\u2028separator, \u202eright to left"),
    ],
)
def test_what_is_left_of_what_was_written(written: str | bytes, shown: str) -> None:
    """In one chunk, and in chunks of a byte."""
    data = written.encode() if isinstance(written, str) else written
    assert "\n".join(said(data)) == shown
    assert "\n".join(said(*(bytes([byte]) for byte in data))) == shown


def test_a_control_sequence_without_an_end() -> None:
    lines = Lines()
    assert said("\x1b]0;" + 100 * "x", lines=lines) == []
    assert said("\nno title\n", lines=lines) == ["0;" + 100 * "x", "no title"]
    assert said("\x1b]0;", 8000 * "x", "\nseen\n", lines=lines) == ["0;" + 8000 * "x", "seen"]
    assert said("a\x1b[", end=True) == ["a"]
    assert said("\x1b", end=True) == []


def test_a_line_that_is_too_long_is_cut() -> None:
    lines = Lines(max_line=10)
    assert said("12345678", "90", lines=lines) == []
    assert said("1", "2\n", lines=lines) == ["12345678901", "2"]
    assert said("\r", "12345678", "90", "1", "2\n", lines=lines) == ["12345678901", "2"]
    assert said("x" * 25 + "\n" + "y" * 25, lines=lines) == ["x" * 25, "y" * 25]


def test_however_it_is_cut() -> None:
    """Chunks of any size say the same."""
    generator = random.Random(5)
    bars = ["\r10%", "\r20%", "\x1b[2K", "\x1b[A", "\b", "\x1b]0;t\x07"]
    pieces = ["plain\n", "π €\n", f"{RED}red{RESET}\n", "\r\n", "\n", "end\n", *bars]
    for _ in range(300):
        data = "".join(generator.choices(pieces, k=12)).encode()
        whole = said(data, end=True)
        cuts = sorted(generator.sample(range(len(data) + 1), 4))
        parts = [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert said(*parts, end=True) == whole, (data, parts)


# -- Bars ----------------------------------------------------------------------------------------------------------------


def test_the_states_of_a_bar() -> None:
    lines = Lines()
    assert said("\r 0%", now=100.0, lines=lines) == []
    assert lines.due == 100.0 + STATE_EVERY
    assert said("\r 1%", "\r 2%", now=104.0, lines=lines) == []
    assert lines.states(104.9).text == ""
    assert lines.under_way() == [" 2%"]
    assert lines.states(105.0).text == " 2%\n"
    assert lines.due is None, "there is no news"
    assert lines.states(200.0).text == ""
    assert said("\r 3%", now=201.0, lines=lines) == []
    assert lines.due == 206.0
    assert said("\r 4%\nnext\n", now=202.0, lines=lines) == [" 4%", "next"]
    assert lines.due is None
    assert lines.under_way() == []


def test_a_state_that_was_shown_is_not_shown_again_at_the_end() -> None:
    lines = Lines()
    said("\rdone", now=0.0, lines=lines)
    assert lines.states(5.0).text == "done\n"
    assert said("\nnext\n", now=6.0, lines=lines) == ["next"]


@pytest.mark.parametrize(
    "written", ["10%\r20%\r30%\r", "\x1b[G10%\x1b[G\x1b[K30%", "|\b/\b-\b30%", "1\x1b[2K\r30%", "0%\r\x1b[K30%"]
)
def test_ways_to_write_a_line_again(written: str) -> None:
    assert said(written, "\n") == ["30%"]
    lines = Lines()
    said(written, lines=lines)
    assert lines.states(5.0).text == "30%\n"


def test_a_bar_that_is_wiped_out_leaves_nothing() -> None:
    assert said("\r 50%", "\r     \r", "next\n") == ["next"]
    assert said("\r 50%", "\r\x1b[K", end=True) == []


def test_colours_of_a_bar() -> None:
    assert said(f"{RED}1%{RESET}\r{RED}2%{RESET}", "\n") == [f"{RED}2%{RESET}"]
    assert plain(f"{RED}2%{RESET}") == "2%"


class Terminal(io.StringIO):
    """What a worker's stderr is not: real terminals get the same from tqdm, but for the width."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = Lines()
        self.shown: list[str] = []
        self.now = 0.0

    def write(self, text: str) -> int:
        self.shown += said(text, lines=self.lines, now=self.now)
        return len(text)


def test_tqdm() -> None:
    out = Terminal()
    for _ in tqdm.tqdm(range(3), desc="samples", file=out, mininterval=0, ncols=60):
        pass
    print("after", file=out)
    bar, after = out.shown
    assert bar.startswith("samples: 100%|")
    assert "3/3" in bar
    assert after == "after"


def test_tqdm_while_it_goes_on() -> None:
    out = Terminal()
    with tqdm.tqdm(total=4, file=out, mininterval=0, ncols=60) as bar:
        for _ in range(3):
            out.now += 3.0
            bar.update()
            out.shown += out.lines.states(out.now).text.split("\n")[:-1]
        assert [line.split("%")[0].strip() for line in out.shown] == ["50"]
        assert "3/4" in out.lines.under_way()[0]
        out.write("\n")  # What a `print` of the program does to a bar of its own.
        assert "3/4" in out.shown[-1]


def test_tqdm_in_tqdm() -> None:
    out = Terminal()
    for _ in tqdm.trange(3, desc="outer", file=out, mininterval=0, ncols=60):
        for _ in tqdm.trange(20, desc="inner", file=out, mininterval=0, ncols=60, leave=False):
            assert len(out.lines.under_way()) <= 2
    print("after", file=out)
    print("the end", file=out)
    said_of_it = [line.split("|")[0].split(":")[0] for line in out.shown]
    # The outer one's beginning had a line of its own, before the inner one was there.
    assert said_of_it.count("outer") <= 2, out.shown
    assert said_of_it.count("inner") <= 3, out.shown
    assert out.shown[-2:] == ["after", "the end"]
    assert any("outer: 100%" in line for line in out.shown)


def test_rich() -> None:
    out = Terminal()
    console = rich.console.Console(
        file=out, force_terminal=True, width=60, color_system="256", _environ={"TERM": "xterm"}
    )
    with rich.progress.Progress(console=console, auto_refresh=False) as progress:
        tasks = [progress.add_task(name, total=50) for name in ("alpha", "beta", "gamma")]
        for _ in range(50):
            for task in tasks:
                progress.advance(task)
            progress.refresh()
    print("after", file=out)
    print("the end", file=out)
    shown = [plain(line) for line in out.shown]
    for name in ("alpha", "beta", "gamma"):
        assert 1 <= sum(name in line for line in shown) <= 3, shown
        assert "100%" in [line for line in shown if name in line][-1]
    assert shown[-2:] == ["after", "the end"]
    assert not any("\x1b" in line for line in shown)


def test_rich_prints_above_its_bars() -> None:
    out = Terminal()
    console = rich.console.Console(file=out, force_terminal=True, width=60, _environ={"TERM": "xterm"})
    with rich.live.Live("bar one\nbar two", console=console, auto_refresh=False) as live:
        for number in range(20):
            console.print(f"line {number}")
            live.update("bar one\nbar two", refresh=True)
    print("after", file=out)
    shown = [plain(line) for line in out.shown]
    assert [line for line in shown if line.startswith("line")] == [f"line {number}" for number in range(20)]
    assert shown[-1] == "after"


def test_a_block_is_bounded() -> None:
    lines = Lines()
    shown = said(*(f"\x1b[{2000}A\rup {n}\x1b[999B\rdown {n}\n" for n in range(1000)), lines=lines, end=True)
    assert len(lines.under_way()) <= MAX_ROWS
    assert "down 999" in shown


# -- Speed ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", [b"an ordinary line of some length\n", b"\x1b[32mINFO\x1b[0m a coloured line\n", b"\rbar 10%"]
)
def test_it_takes_no_longer_per_line_where_there_are_many(line: bytes) -> None:
    """Nothing is quadratic: ten times as much takes ten times as long, give or take a busy host."""

    def seconds(count: int) -> float:
        lines = Lines()
        data = line * (count // 50)
        begun = time.process_time()
        for _ in range(50):
            lines.feed(data, 0.0)
        return time.process_time() - begun

    seconds(1000)
    assert seconds(50_000) < 100 * max(seconds(5000), 0.0005)
