"""`Session.progress`: which calls come when, and what a terminal, a notebook and a file get to see meanwhile."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from screens import Screen

import bigmachine
from bigmachine import progress as module
from bigmachine.errors import UsageError
from bigmachine.logs import Logs
from bigmachine.machine import Machine
from bigmachine.progress import Counts, Lines, due, line, progress
from bigmachine.session import Session
from bigmachine.testing import TestSystem
from bigmachine.testing.conformance import SOON, eventually


class Speaker:
    """As much of a session as is needed."""

    def __init__(self) -> None:
        self.logs = Logs()
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def ended(value: object) -> Future[Any]:
    """A call that has ended: with `value`, or with that exception."""
    future: Future[Any] = Future()
    if isinstance(value, BaseException):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


def summary(speaker: Speaker) -> str:
    """The last line that was said, without its times."""
    return speaker.said[-1].partition(" in ")[0]


# -- Which calls come, and when ------------------------------------------------------------------------------------------


def test_calls_come_as_they_end() -> None:
    speaker = Speaker()
    futures: list[Future[int]] = [Future() for _ in range(3)]
    calls = progress(speaker, futures)
    found = []
    for index in (2, 0, 1):
        futures[index].set_result(index)
        found.append(next(calls))
    assert found == [futures[2], futures[0], futures[1]]
    assert all(call.done() for call in found)
    assert next(calls, None) is None
    assert summary(speaker) == "calls: 3 of 3 ended"


def test_a_list_of_it_waits_for_all() -> None:
    futures: list[Future[int]] = [Future() for _ in range(3)]
    found: list[list[Future[int]]] = []
    waiter = threading.Thread(target=lambda: found.append(list(progress(Speaker(), futures))))
    waiter.start()
    for future in futures:
        assert not found
        future.set_result(1)
    waiter.join(SOON)
    assert set(found[0]) == set(futures)


@pytest.mark.parametrize("calls", [[], (), {}, iter(())])
def test_no_calls(calls: Any) -> None:
    speaker = Speaker()
    assert list(progress(speaker, calls, "nothing")) == []
    assert speaker.said[-1].startswith("nothing: 0 ")


def test_failed_and_cancelled_calls_are_counted() -> None:
    speaker = Speaker()
    cancelled: Future[Any] = Future()
    cancelled.cancel()
    calls = [ended(1), ended(ValueError("no")), cancelled, ended(ValueError("no")), ended(2)]
    found = list(progress(speaker, calls, "sampling"))
    assert set(found) == set(calls)
    assert summary(speaker) == "sampling: 5 of 5 ended (2 failed, 1 cancelled)"


@pytest.mark.parametrize("calls", [[1], 7, "ab", [None], iter([ended(1), object()])], ids=["1", "7", "ab", "None", "mixed"])
def test_what_is_no_call(calls: Any) -> None:
    with pytest.raises(UsageError, match=r"^progress is shown of calls, as `machine\.submit` returns them, not of "):
        list(progress(Speaker(), calls))


def test_calls_of_a_generator_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 4)
    made: list[Future[int]] = []

    def submitted() -> Iterator[Future[int]]:
        for _ in range(20):
            made.append(Future())
            yield made[-1]

    def under_way() -> int:
        return sum(not each.done() for each in made)

    def answer() -> None:
        try:
            for number in range(20):
                wanted = min(number + 4, 20)
                eventually(lambda wanted=wanted: len(made) == wanted, f"{wanted} calls made")  # type: ignore[misc]
                assert under_way() == wanted - number
                made[number].set_result(number)
        except BaseException:
            for each in made:
                each.cancel()
            raise

    speaker = Speaker()
    calls = progress(speaker, submitted(), total=20)
    assert made == []  # Nothing is submitted before somebody iterates.
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(answer)
        assert [call.result() for call in calls] == list(range(20))
        answering.result()
    assert summary(speaker) == "calls: 20 of 20 ended"


def test_who_makes_calls_slowly_holds_up_none_that_have_ended() -> None:
    def submitted() -> Iterator[Future[int]]:
        yield ended(1)
        yield ended(2)
        pytest.fail("the first call is to come before this one is made")

    calls = progress(Speaker(), submitted())
    assert next(calls).result() == 1
    calls.close()  # type: ignore[attr-defined]


def test_endlessly_many_calls() -> None:
    calls = progress(Speaker(), (ended(number) for number in itertools.count()))
    assert [call.result() for call in itertools.islice(calls, 5000)] == list(range(5000))


def test_leaving_leaves_the_other_calls_alone() -> None:
    speaker = Speaker()
    pending: Future[int] = Future()
    for call in progress(speaker, [ended(1), pending]):
        assert call.result() == 1
        break
    assert not pending.done()
    assert summary(speaker) == "calls: 1 of 2 ended"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_is_raised_in_the_loop_closes_it(error: type[BaseException]) -> None:
    speaker = Speaker()

    def run() -> None:
        for call in progress(speaker, [ended(error("stop")), Future()]):
            call.result()

    with pytest.raises(error, match="stop"):
        run()
    assert summary(speaker) == "calls: 1 of 2 ended (1 failed)"


def test_an_error_while_calls_are_made_passes_through() -> None:
    def submitted() -> Iterator[Future[int]]:
        yield ended(1)
        raise ValueError("cannot submit")

    speaker = Speaker()
    with pytest.raises(ValueError, match="cannot submit"):
        list(progress(speaker, submitted()))
    assert summary(speaker) == "calls: 0 ended"  # That the first has ended, nobody was told.


# -- Calls of machines ---------------------------------------------------------------------------------------------------


class Worker:
    def square(self, number: int) -> int:
        if number < 0:
            raise ValueError(number)
        return number * number


class Sleeper:
    async def sleep(self) -> None:
        import asyncio

        await asyncio.sleep(1000)


@pytest.fixture
def started() -> Iterator[tuple[Session, Machine]]:
    with bigmachine.start(TestSystem(), http="off") as b:
        (machine,) = b.start(1, {"Worker": Worker(), "Sleeper": Sleeper()})
        yield b, machine


def test_calls_of_a_session(started: tuple[Session, Machine], capsys: pytest.CaptureFixture[str]) -> None:
    b, machine = started
    calls = [machine.submit("Worker.square", number) for number in range(-1, 3)]
    squares = []
    for call in b.progress(calls, "squares"):
        if call.exception() is None:
            squares.append(call.result())
    assert sorted(squares) == [0, 1, 4]
    assert re.search(r"^bigmachine: squares: 4 of 4 ended \(1 failed\) in .* s, .*/s$", capsys.readouterr().err, re.MULTILINE)


def test_more_calls_than_anybody_would_hold(started: tuple[Session, Machine]) -> None:
    b, machine = started
    calls = (machine.submit("Worker.square", number) for number in range(1500))
    assert sum(call.result() for call in b.progress(calls, total=1500)) == sum(number**2 for number in range(1500))


def test_a_call_that_is_cancelled_meanwhile(started: tuple[Session, Machine]) -> None:
    b, machine = started
    asleep = machine.submit("Sleeper.sleep")
    for call in b.progress([machine.submit("Worker.square", 2), asleep]):
        if call is asleep:
            with pytest.raises(CancelledError):
                call.result()
        else:
            assert call.result() == 4
            asleep.cancel()


def test_a_service_has_no_progress() -> None:
    class Asked:
        def setup(self, b: Session) -> None:
            self.b = b

        def ask(self) -> None:
            self.b.progress([])

    with bigmachine.start(TestSystem(), http="off") as b, pytest.raises(UsageError, match="only the driver's session"):
        b.start(1, {"Asked": Asked()})[0].call("Asked.ask")


# -- Lines ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "more", "total", "expected"),
    [
        (9.9, 100, 100, False),
        (10.0, 10, 100, True),
        (10.0, 9, 100, False),
        (59.0, 9, 100, False),
        (60.0, 0, 100, True),
        (10.0, 0, None, True),
        (9.9, 1000, None, False),
    ],
)
def test_when_there_is_a_line(seconds: float, more: int, total: int | None, expected: bool) -> None:
    assert due(seconds, more, total) is expected


@pytest.mark.parametrize(
    ("count", "failed", "total", "seconds", "expected"),
    [
        (400, 2, 1000, 20.0, "400 of 1000 ended (2 failed) in 20 s, 20.0/s, 30 s left"),
        (1000, 0, 1000, 5.0, "1000 of 1000 ended in 5.0 s, 200.0/s"),
        (0, 0, 10, 61.0, "0 of 10 ended in 1 min 1 s"),
        (3, 0, None, 300.0, "3 ended in 5 min 0 s, 1 min 40 s each"),
        (1, 0, 100, 7800.0, "1 of 100 ended in 2 h 10 min, 2 h 10 min each, 214 h 30 min left"),
    ],
)
def test_what_a_line_says(count: int, failed: int, total: int | None, seconds: float, expected: str) -> None:
    counts = Counts(total)
    for number in range(count):
        counts.add(ended(ValueError() if number < failed else 1))
    assert line(counts, seconds) == expected


def test_lines_as_time_goes_by() -> None:
    now, said = 0.0, list[str]()
    counts = Counts(100)
    lines = Lines(said.append, "sampling", lambda: now)
    for _ in range(100):
        now += 0.5
        counts.add(ended(1))
        lines.add(counts)
    lines.close(counts)
    assert [each.split(" in ")[0] for each in said] == [f"sampling: {count} of 100 ended" for count in (20, 40, 60, 80, 100)]
    said.clear()
    lines = Lines(said.append, "", lambda: now)
    now += 61.0
    lines.tick(Counts(100))
    assert said == ["calls: 0 of 100 ended in 1 min 1 s"]


def test_a_file_gets_a_line(started: tuple[Session, Machine], capsys: pytest.CaptureFixture[str]) -> None:
    b, machine = started
    list(b.progress([machine.submit("Worker.square", 2)]))
    (found,) = (each for each in capsys.readouterr().err.splitlines() if "ended" in each)
    assert found.startswith("bigmachine: calls: 1 of 1 ended in ")
    assert "\r" not in found
    assert "\x1b" not in found


# -- Bars ----------------------------------------------------------------------------------------------------------------

PROGRAM = """
import signal, sys, threading
import bigmachine
from bigmachine.testing import TestSystem
from concurrent.futures import Future

def play(b, futures):
    feed = b.logs.feed("m-1", lambda: "https://h:1/m-1/")
    for words in open(sys.argv[1]):
        what, _, number = words.strip().partition(" ")
        if what == "say":
            feed.data("0", "stdout", f"line {number}\\n".encode())
        elif what == "fail":
            futures[int(number)].set_exception(ValueError("no"))
        elif what == "end":
            futures[int(number)].set_result(number)
        else:
            signal.raise_signal(signal.SIGINT)

with bigmachine.start(TestSystem(), http="off") as b:
    futures = [Future() for _ in range(4)]
    threading.Thread(target=play, args=(b, futures), daemon=True).start()
    try:
        for call in b.progress(futures, "sampling"):
            pass
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print("after", flush=True)
"""


class Play:
    """A program that shows progress, and does as it is told."""

    def __init__(self, folder: Path) -> None:
        self.orders = folder / "orders"
        self.words = [str(folder / "program.py"), str(self.orders)]
        Path(self.words[0]).write_text(PROGRAM)
        os.mkfifo(self.orders)

    @contextlib.contextmanager
    def told(self) -> Iterator[Callable[[str], None]]:
        with self.orders.open("w", buffering=1) as orders:
            yield lambda order: print(order, file=orders)


@pytest.fixture
def play(tmp_path: Path) -> Play:
    return Play(tmp_path)


def bars(text: str) -> list[str]:
    return [row for row in text.splitlines() if "sampling:" in row]


@pytest.mark.slow
def test_a_bar_on_a_terminal(play: Play) -> None:
    # Warnings are errors: tqdm is to have none, about ipywidgets for one.
    with Screen(play.words, columns=90, environ={"PYTHONWARNINGS": "error"}) as terminal, play.told() as tell:
        terminal.until(lambda text: re.search(r"^sampling:   0%\|.*0/4 \[", text, re.MULTILINE))
        tell("end 1")
        terminal.until(lambda text: re.search(r"sampling:  25%\|.*1/4 \[", text))
        for number in range(3):
            tell(f"say {number}")
            text = terminal.until(lambda text: f"m-1/: line {number}\n" in text and bars(text))  # noqa: B023
            rows = [row for row in text.splitlines() if row]
            assert rows[: number + 1] == [f"https://h:1/m-1/: line {each}" for each in range(number + 1)]
            assert rows[number + 1 :] == bars(text)  # Once, and below.
        tell("fail 0")
        terminal.until(lambda text: re.search(r"sampling:  50%\|.*2/4 \[.*, 1 failed\]", text))
        tell("end 2")
        tell("end 3")
        assert terminal.end() == 0
        rows = [row for row in terminal.rows if row]
        assert rows[:3] == [f"https://h:1/m-1/: line {number}" for number in range(3)]
        assert re.fullmatch(r"sampling: 100%\|█+\| 4/4 \[.*, 1 failed\]", rows[3])
        assert rows[4:] == ["after"]


@pytest.mark.slow
def test_times_go_on_while_nothing_ends(play: Play) -> None:
    with Screen(play.words, columns=90) as terminal, play.told() as tell:
        terminal.until(lambda text: re.search(r"0/4 \[00:0[1-9]<", text))
        tell("interrupt 0")
        terminal.until(lambda text: "after" in text)
        assert terminal.end() == 0
        rows = [row for row in terminal.rows if row]
        assert rows[0].startswith("sampling:   0%|")
        assert rows[1:] == ["interrupted", "after"]


@pytest.mark.slow
def test_a_dumb_terminal_gets_lines(play: Play) -> None:
    with Screen(play.words, environ={"TERM": "dumb"}) as terminal, play.told() as tell:
        for number in range(4):
            tell(f"end {number}")
        assert terminal.end() == 0
        rows = [row for row in terminal.rows if row]
        assert rows[0].startswith("bigmachine: sampling: 4 of 4 ended in ")
        assert rows[1:] == ["after"]
        assert b"\x1b" not in terminal.raw


NOTEBOOK = """
import sys, types
shown = []

class Widget:
    def __init__(self, **values):
        self.layout = types.SimpleNamespace()
        self.style = types.SimpleNamespace()
        self.bar_style = ""
        self.__dict__.update(values)
        shown.append(self)

class Shell:
    config = {"IPKernelApp": {}}

def module(name, **values):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__dict__.update(values)

module("ipykernel")
module("ipykernel.zmqshell")
module("IPython", get_ipython=Shell)
module("IPython.display", display=lambda what: None)
if sys.argv[1:] == ["widgets"]:
    module("ipywidgets", HTML=Widget, FloatProgress=Widget, HBox=Widget)
else:
    sys.modules["ipywidgets"] = None
from concurrent.futures import Future
from bigmachine.logs import Logs
from bigmachine.progress import progress

class Session:
    logs = Logs()

call = Future()
call.set_result(1)
print([call.result() for call in progress(Session(), [call], "sampling")], end=" ")
print([each.value for each in shown if hasattr(each, "max")])
"""
"""As much of a notebook as tqdm looks at."""


@pytest.mark.parametrize(
    ("words", "printed", "drawn"), [(["widgets"], "[1] [1]\n", False), ([], "[1] []\n", True)], ids=["widgets", "text"]
)
def test_a_bar_in_a_notebook(words: list[str], printed: str, drawn: bool) -> None:
    command = [sys.executable, "-W", "error", "-c", NOTEBOOK, *words]
    done = subprocess.run(command, text=True, capture_output=True, timeout=SOON, check=True)
    assert done.stdout.endswith(printed)
    assert bool(re.search(r"\nsampling: 100%\|.*1/1 \[", done.stderr)) is drawn


def test_a_bar_is_not_loaded_where_there_is_none() -> None:
    program = "import sys, bigmachine.session, bigmachine.progress; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=True, timeout=SOON)
    assert "bigmachine.progress" in done.stdout.split()
    assert "tqdm" not in done.stdout.split()
