"""Builders: from wheels to an archive that installs them and calls an entry point, when it is executed.

A builder is used as a command of its own, in a process of its own: its Python interface is nobody's promise. What differs
between builders is said here, once: how a base is made, and where a part of it lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ...cache import Cache
from ..platforms import Platform
from ..wheels import Wheel


@dataclass(frozen=True)
class Built:
    """What a builder made: an archive, lines for ``/bin/sh`` that execute it where it is installed already (or nothing), and
    files of the archive that are to be others."""

    archive: Path
    warm: str = ""
    edits: Mapping[str, bytes] = field(default_factory=dict)


class Builder(Protocol):
    """One way to make a base."""

    name: str
    suffix: str
    """Of packed files: ``".pex"``."""
    several: bool
    """Whether one file may be for several platforms."""

    def version(self) -> str:
        """Of the builder; another one may make another base of the same wheels."""

    def build(
        self, wheels: Mapping[str, Sequence[Wheel]], platforms: Sequence[Platform], folder: Path, cache: Cache
    ) -> Built:
        """The wheels of each platform, by its name; `folder` is empty, and for the builder to fill. Raises `PackError`."""

    def place(self, wheel: Wheel) -> str:
        """Where the archive has the wheel, for `image.Part.file`."""
