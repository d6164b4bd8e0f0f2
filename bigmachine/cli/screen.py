"""``bigmachine top`` on a terminal: keys are read and frames are drawn here, in the terminal's alternate screen.

One thread asks the driver. The main thread waits for it, for keys, and for another size of the terminal, whatever comes first:
so no key waits for a driver that is slow.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..errors import BigmachineError
from .attach import Driver, Slow
from .text import short
from .view import (
    HELP,
    MACHINES,
    METHODS,
    RIGHT,
    Json,
    View,
    busiest,
    chosen,
    header,
    is_bad,
    machine_cells,
    method_cells,
    press,
    scrolled,
)

INTERVAL = 2.0
"""Seconds between two questions, as between two documents of the driver's."""

METHODS_SHARE = 4
"""At most one of so many lines is a method's."""

FRAME = 6
"""Lines of a frame that are neither machines nor methods: the header's two, the titles of two tables, a gap, the last one."""

NAMES = {
    "\x1b[A": "up", "\x1bOA": "up", "\x1b[B": "down", "\x1bOB": "down", "\x1b[5~": "page-up", "\x1b[6~": "page-down",
    "\x1b[H": "home", "\x1b[1~": "home", "\x1b[F": "end", "\x1b[4~": "end", "\x1b": "escape", "\r": "enter", "\n": "enter",
    "\x7f": "backspace", "\b": "backspace", "\x03": "ctrl-c", "\x04": "ctrl-d",
}  # fmt: skip
"""What terminals send for keys that are no characters."""

_KEY = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|\x1bO[A-Z]|.", re.DOTALL)

STATES = {"RUNNING": "green", "STARTING": "yellow", "UNSTARTED": "dim", "STOPPED": "dim"}


def watch(driver: Driver, document: Json, view: View) -> None:
    """Show what `driver` says, from `document` on, until the user leaves. Raises `Gone` when the driver does."""
    console = Console(markup=False, emoji=False, highlight=False)
    asked = Asker(driver)
    live = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    with asked, keyboard() as keys, live, _resized(asked):
        silent, seen = "", time.monotonic()
        while True:
            rows = console.height - FRAME - method_rows(document, console.height)
            view = scrolled(view, len(chosen(document, view)), rows)
            note = silent and f"as it was {short(time.monotonic() - seen)} ago: {silent}"
            live.update(frame(document, view, console.height, note), refresh=True)
            waited = [each for each in (keys, asked.awake) if each is not None]
            ready, _, _ = select.select(waited, [], [], INTERVAL if silent else None)
            for key in read_keys(keys) if keys in ready else ():
                after = press(view, key)
                if after is None:
                    return
                view = after
            for answer in asked.answers():
                if isinstance(answer, Slow):
                    silent = str(answer)
                elif isinstance(answer, BaseException):
                    raise answer
                elif not view.paused:
                    document, silent, seen = answer, "", time.monotonic()


# -- Drawing -------------------------------------------------------------------------------------------------------------


def frame(document: Json, view: View, height: int, silent: str = "") -> Group:
    """All that stands on a terminal with `height` lines: no more of them."""
    methods = busiest(document)[: method_rows(document, height)]
    rows = max(1, height - FRAME - len(methods))
    machines = chosen(document, view)
    first, second = header(document)
    seen = machines[view.first : view.first + rows]
    parts: list[Text | Table] = [_text(first, "bold"), _text(second), _machines(seen, view)]
    parts += [Text()] * (rows - len(seen) + 1)
    parts.append(_methods(methods) if methods else _text("no calls yet", "dim"))
    parts.append(_last(view, len(machines), rows, silent))
    return Group(*parts)


def method_rows(document: Json, height: int) -> int:
    """How many methods are shown: what the machines leave, and a share of the screen at least."""
    machines = len(document["machines"])
    return min(len(document["methods"]), max(height // METHODS_SHARE - 1, height - FRAME - machines, 0))


def _machines(machines: Sequence[Json], view: View) -> Table:
    titles = {"start": "machine", "cpu": "cpu", "memory": "rss", "load": "load"}
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, expand=True, header_style="reverse")
    for index, title in enumerate(MACHINES):
        last = index == len(MACHINES) - 1
        table.add_column(
            _text(title, "bold underline" if title == titles[view.sort] else ""),
            justify="right" if index in RIGHT else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if last else None,
            min_width=(8, 9, 5, 4, 4, 5, 4, 7, 10)[index],
        )
    for machine in machines:
        cells = [_text(cell) for cell in machine_cells(machine)]
        cells[1].stylize(STATES.get(machine["state"], ""))
        if is_bad(machine):
            cells[-1].stylize("red")
        table.add_row(*cells)
    return table


def _methods(methods: Sequence[Json]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, expand=True, header_style="reverse")
    for index, title in enumerate(METHODS):
        if index:
            table.add_column(title, justify="right", no_wrap=True, min_width=7)
        else:
            table.add_column(title, no_wrap=True, overflow="ellipsis", ratio=1)
    for method in methods:
        cells = [_text(cell) for cell in method_cells(method)]
        cells[3].stylize("red")
        table.add_row(*cells)
    return table


def _last(view: View, found: int, rows: int, silent: str) -> Text:
    """What the user can do, and what he should know."""
    if view.typing:
        return _text(f"filter: {view.filter}▏ enter keeps it, escape clears it", "bold")
    said = []
    if found > rows:
        said.append(f"{view.first + 1} to {min(view.first + rows, found)} of {found}")
    if view.filter:
        said.append(f"filter: {view.filter}")
    if view.paused:
        said.append("paused")
    if silent:
        said.append(silent)
    return _text("   ".join([*said, HELP]), "bold red" if silent else "dim")


def _text(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


# -- Keys ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def keyboard() -> Iterator[int | None]:
    """Keys come one by one, and are not shown: the descriptor to read them from; None where nobody has a keyboard."""
    if not sys.stdin or not sys.stdin.isatty():
        yield None
        return
    keys = sys.stdin.fileno()
    before = termios.tcgetattr(keys)
    try:
        tty.setcbreak(keys, termios.TCSANOW)
        mode = termios.tcgetattr(keys)
        for control in (termios.VINTR, termios.VSUSP, termios.VQUIT):
            mode[6][control] = b"\0"  # Stopped, it would leave its screen to the shell.
        termios.tcsetattr(keys, termios.TCSANOW, mode)
        yield keys
    finally:
        termios.tcsetattr(keys, termios.TCSAFLUSH, before)


def read_keys(keys: int | None) -> list[str]:
    """The keys that have been pressed: characters, or names. Where the terminal is gone, "ctrl-d"."""
    assert keys is not None
    data = os.read(keys, 1024)
    return names(data.decode("utf-8", "ignore")) if data else ["ctrl-d"]


def names(text: str) -> list[str]:
    """What terminals send, as keys; what is none of them is left out."""
    found = (NAMES.get(key, key) for key in _KEY.findall(text))
    return [key for key in found if key in NAMES.values() or key.isprintable()]


@contextlib.contextmanager
def _resized(asked: Asker) -> Iterator[None]:
    before = signal.signal(signal.SIGWINCH, lambda *_: asked.wake())
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)


# -- Asking --------------------------------------------------------------------------------------------------------------


class Asker:
    """Asks `driver` for documents on a thread of its own. `awake` can be read when there is something to do."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._found: SimpleQueue[Json | BaseException] = SimpleQueue()
        self._left = threading.Event()
        self.awake, self._waker = socket.socketpair()
        self._waker.setblocking(False)

    def __enter__(self) -> Asker:
        # A daemon: who leaves does not wait for a driver that does not answer.
        threading.Thread(target=self._run, name="bigmachine-top", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self.awake.close()

    def wake(self) -> None:
        """Make `awake` readable."""
        with contextlib.suppress(OSError):  # There is enough in it already; or nobody waits any more.
            self._waker.send(b"x")

    def answers(self) -> Iterator[Json | BaseException]:
        """The documents that have come, and what has gone wrong. Returns at once."""
        with contextlib.suppress(BlockingIOError):
            self.awake.recv(1024, socket.MSG_DONTWAIT)
        with contextlib.suppress(Empty):
            while True:
                yield self._found.get_nowait()

    def _run(self) -> None:
        try:
            while not self._left.wait(INTERVAL):
                try:
                    self._found.put(self._driver.json("status.json"))
                except Slow as error:
                    self._found.put(error)
                self.wake()
        except BaseException as error:  # For the main thread, whatever it is: there it ends the command.
            if not isinstance(error, BigmachineError):
                error.add_note("while the driver was asked")
            self._found.put(error)
            self.wake()
        finally:
            self._waker.close()
