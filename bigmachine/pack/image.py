"""The image: what a machine gets of a packed program, as parts that are named by their content.

A part is one distribution, or the user's own code. It travels as a tar (`tars`), which `bigmachine.bootstrap.parts`
unpacks; the tar's sha256 is the part's name, so that a machine that has one already is not sent it again. A `Manifest`
lists the parts for one platform, and tells those that every machine needs (`closure`) from those that only a driver does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """`kind` is "distribution" or "code". `digest` is the sha256 of the tar in hex, `size` its bytes, `packed` those that
    are sent of it (zlib's level 6). `worker` is False for what only a driver needs. `file` says where it is in the packed
    file: its wheel's name, unless the builder lays it out otherwise; empty for the code."""

    name: str
    version: str
    kind: str
    digest: str
    size: int
    packed: int
    worker: bool
    file: str


@dataclass(frozen=True)
class Manifest:
    """The parts of a program for one platform and its Python."""

    platform: str
    python: str
    parts: tuple[Part, ...]

    def worker(self) -> tuple[Part, ...]:
        """What every machine needs."""
        return tuple(part for part in self.parts if part.worker)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"platform": self.platform, "python": self.python, "parts": [asdict(part) for part in self.parts]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """The inverse of `to_json`. Raises KeyError or TypeError on other values."""
        return cls(value["platform"], value["python"], tuple(Part(**part) for part in value["parts"]))


def missing(have: Collection[str], want: Iterable[Part]) -> list[Part]:
    """Which parts must be sent to somebody who has those with the digests `have`: in their order, each content once."""
    unsent: dict[str, Part] = {}
    for part in want:
        if part.digest not in have:
            unsent.setdefault(part.digest, part)
    return list(unsent.values())
