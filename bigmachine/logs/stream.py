"""Where the lines of all machines are seen: standard error, which is a terminal, a file, or a pipe to somebody slow.

On a terminal each machine's address has a colour, and lines keep theirs; bars that the driver draws there (`Stream.beside`, and
tqdm's of its own program) are taken away while lines are written. Elsewhere there are no colours.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TextIO

from .lines import plain

PALETTE = (33, 166, 29, 133, 136, 30, 169, 64, 99, 130, 31, 171, 100, 69, 168, 28)
"""Colours (of 256) that can be read on white and on black, and told from their neighbours here; no red, which means trouble."""

_RESET = "\x1b[0m"

_writing = threading.Lock()
"""Held by who writes what machines say: an unbuffered stderr (``python -u``) would cut large pieces of two into each other."""


class Bar(Protocol):
    """What stands at the bottom of a terminal: tqdm's bars are such. With a method ``get_lock``, that lock is held."""

    def clear(self) -> Any: ...

    def refresh(self) -> Any: ...


class Stream:
    """See the module. None is what ``sys.stderr`` is at the time of writing. Safe to use from any thread."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._looked_at: TextIO | None = None  # The stream that the next two are about.
        self._in_colour = False
        self._live = False
        self._bars: list[Bar] = []

    def write(self, text: str, prefix: str = "", colour: int | None = None, coloured: bool = False) -> None:
        """Whole lines, each with `prefix` in front, in a colour of its own; returns when the stream has them."""
        stream: TextIO | None = sys.stderr if self._stream is None else self._stream
        if stream is None:
            return  # A program without a standard error.
        if stream is not self._looked_at:
            self._in_colour, self._live = in_colour(stream), _is_terminal(stream)
            self._looked_at = stream
        if coloured:
            text = text.replace("\n", f"{_RESET}\n") if self._in_colour and "\x1b" in text else plain(text)
        if prefix:
            if self._in_colour and colour is not None:
                prefix = f"\x1b[38;5;{colour}m{prefix}{_RESET}"
            text = f"{prefix} {text[:-1].replace(chr(10), f'{chr(10)}{prefix} ')}\n"
        with _writing:
            bars = [*self._bars, *_bars_of_tqdm()] if self._live else self._bars
            if bars:
                with _aside(bars):
                    _write(stream, text)
            else:
                _write(stream, text)

    @contextlib.contextmanager
    def beside(self, bar: Bar) -> Iterator[None]:
        """While this lasts, `bar` is cleared before lines are written, and drawn again after them."""
        with _writing:
            self._bars.append(bar)
        try:
            yield
        finally:
            with _writing:
                self._bars.remove(bar)


def in_colour(stream: TextIO) -> bool:
    """Whether to write colours: to a terminal, unless NO_COLOR or TERM=dumb say otherwise; anywhere with FORCE_COLOR."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return os.environ.get("TERM") != "dumb" and _is_terminal(stream)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (OSError, ValueError, AttributeError):
        return False


# -- Bars ----------------------------------------------------------------------------------------------------------------


def _bars_of_tqdm() -> list[Bar]:
    """Those that the program itself draws on a terminal, where it uses tqdm."""
    tqdm = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    try:
        # `start_t` is what tqdm itself looks at, in `external_write_mode`: without it a bar is not complete yet.
        return [
            bar for bar in list(getattr(tqdm, "_instances", ())) if hasattr(bar, "start_t") and _is_terminal(bar.fp)
        ]
    except (AttributeError, RuntimeError):  # Another version's; one that was begun just now.
        return []


@contextlib.contextmanager
def _aside(bars: list[Bar]) -> Iterator[None]:
    """Nothing stands at the bottom while this lasts, and nobody draws it."""
    distinct = list({id(bar): bar for bar in bars}.values())
    with contextlib.ExitStack() as stack:
        for bar in distinct:
            if (lock := getattr(bar, "get_lock", None)) is not None:
                stack.enter_context(lock())
        for bar in distinct:
            _try(bar.clear)
        try:
            yield
        finally:
            for bar in distinct:
                _try(bar.refresh)


def _try(act: Callable[[], Any]) -> None:
    try:
        act()
    except Exception:  # A bar is an ornament, and somebody else's code.
        pass


# -- Writing -------------------------------------------------------------------------------------------------------------


def _write(stream: TextIO, text: str) -> None:
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BlockingIOError as error:
        _write_on(stream, text, error)
    except (OSError, ValueError):
        pass  # Nobody reads it any more; that is no reason for the program to fail.


def _write_on(stream: TextIO, text: str, error: BlockingIOError) -> None:
    """Somebody has made standard error non-blocking, for all who share it: wait for its reader nevertheless."""
    try:
        data = memoryview(text.encode(stream.encoding or "utf-8", "backslashreplace"))[error.characters_written :]
        while True:
            select.select([], [stream], [], 1.0)
            try:
                if data:
                    data = data[stream.buffer.write(data) :]
                else:
                    stream.buffer.flush()
                    return
            except BlockingIOError as again:
                data = data[again.characters_written :]
    except (OSError, ValueError, AttributeError):
        pass
