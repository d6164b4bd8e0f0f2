"""A program that is not packed packs itself, because machines are to be started that have nothing of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..cache import Cache
from .build import Request, pack
from .prelude import seal
from .progress import Lines

TOOLKIT = Path(__file__).parents[1] / "toolkit.py"
"""For machines that run no program."""


def pack_itself(target: Path, platforms: Sequence[str]) -> tuple[Path, str]:
    """The packed file of the running program `target`, in the cache, and its digest; distributions have the versions that
    are installed here. Raises as `build.pack` does."""
    cache = Cache()
    with cache.use(), cache.scratch() as scratch:
        output = scratch / f"{target.stem}.pex"
        request = Request(target, tuple(platforms), output=output, installed=True)
        result = pack(request, cache, Lines(sys.stderr, f"bigmachine: packing {target.name}: "))
        key = seal(str(output))
        folder = cache.put("packed", key, lambda folder: _move(output, folder))
    return folder / output.name, result.contents.digest


def _move(file: Path, folder: Path) -> None:
    file.rename(folder / file.name)
