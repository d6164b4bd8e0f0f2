"""Who is told how packing goes on: a `Progress`. The command line shows it; a program that packs itself may not care."""

from __future__ import annotations

from typing import Protocol, TextIO


class Progress(Protocol):
    """Told while packing goes on, by the thread that packs. Must not raise."""

    def step(self, text: str) -> None:
        """What is being done from now on, ``"resolving for linux/amd64"``; the step before has ended."""

    def note(self, text: str) -> None:
        """Something that the user should read, one line; it ends no step."""


class Silent:
    """A `Progress` that tells nobody."""

    def step(self, text: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class Lines:
    """A `Progress` that writes a line for each step and note, each begun by `prefix`; what has been said is not said again."""

    def __init__(self, stream: TextIO, prefix: str = "") -> None:
        self._stream = stream
        self._prefix = prefix
        self._step = ""
        self._notes: set[str] = set()

    def step(self, text: str) -> None:
        if text != self._step:
            self._step = text
            self._say(text)

    def note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.add(text)
            self._say(f"note: {text}")

    def _say(self, text: str) -> None:
        print(f"{self._prefix}{text}", file=self._stream, flush=True)
