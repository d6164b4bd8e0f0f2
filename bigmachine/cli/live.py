"""The line that lives while a program is packed. The one module that imports rich."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

RATE = 10
"""Times a second that the line is drawn: a spinner that moves smoothly enough, and few bytes over a slow connection."""

SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
PLAIN_SPINNER = "-\\|/"
"""Where the terminal's encoding has nothing else."""


class LiveLine:
    """A `Progress` on a terminal, drawn by a thread between ``with`` and its end."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        # Text is shown as it is: neither `[markup]` nor :emoji: nor highlighted numbers.
        self._console = Console(file=stream, markup=False, emoji=False, highlight=False)
        self._spinner = SPINNER if self._console.encoding.startswith("utf") else PLAIN_SPINNER
        self._clock = clock
        self._start = clock()
        self._step = ""
        self._notes: set[str] = set()
        self._live = Live(
            console=self._console,
            get_renderable=self._line,
            refresh_per_second=RATE,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def step(self, text: str) -> None:
        self._step = text
        if self._live.is_started:
            self._live.refresh()
        else:
            self._live.start(refresh=True)

    def note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.add(text)
            self._console.print(f"note: {text}", soft_wrap=True)

    def _line(self) -> Text:
        elapsed = self._clock() - self._start
        frame = self._spinner[int(elapsed * RATE) % len(self._spinner)]
        # Too long a step is cut: of two lines only one would be drawn again.
        line = Text(no_wrap=True, overflow="ellipsis", end="")
        return line.append(frame, "cyan").append(f" {self._step}  {elapsed:.0f} s")
