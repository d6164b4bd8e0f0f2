"""Who is told how packing goes on: a `Progress`. The command line shows it; a program that packs itself may not care."""

from __future__ import annotations

from typing import Protocol


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
