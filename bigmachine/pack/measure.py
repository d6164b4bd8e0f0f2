"""The parts of wheels and of code: their digests and sizes, which are kept in the cache."""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from ..cache import Cache
from ..errors import CacheError
from .image import Part
from .tars import Content, write_code_tar, write_wheel_tar
from .wheels import Wheel

LAYOUT = 1
"""Of the tars: part of the key under which a wheel's digest is kept, so that another layout is another part."""

LEVEL = 6
"""How hard zlib tries, for `Part.packed`; whoever sends parts does as well."""


def wheel_part(wheel: Wheel, cache: Cache, worker: bool) -> Part:
    """The part that a wheel makes. What is measured is kept in the cache: the next time, the wheel is not read.

    Raises what `write_wheel_tar` does, and `CacheError`.
    """

    def fill(folder: Path) -> None:
        measured = _measure(lambda out: write_wheel_tar(wheel.path, out))
        (folder / "part.json").write_text(json.dumps(measured), "utf-8")

    folder = cache.put("parts", f"{wheel.sha256}-{LAYOUT}", fill)
    try:
        digest, size, packed = json.loads((folder / "part.json").read_text("utf-8"))
    except (OSError, ValueError, TypeError) as error:
        raise CacheError(f"the cache is damaged: {folder}; bigmachine cache clear makes it new") from error
    return Part(wheel.name, wheel.version, "distribution", digest, size, packed, worker, wheel.filename)


def code_part(files: Mapping[str, Content], name: str = "code") -> Part:
    """The part that the user's own code makes. Raises what `write_code_tar` does."""
    digest, size, packed = _measure(lambda out: write_code_tar(files, out))
    return Part(name, "", "code", digest, size, packed, worker=True, file="")


class _Meter(io.BytesIO):
    """Measures what is written to it, and keeps nothing. (A BytesIO, as `IO[bytes]` is a class, not a protocol.)"""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.size = 0
        self.packed = 0
        self._compressor = zlib.compressobj(LEVEL)

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.packed += len(self._compressor.compress(data))
        self.size += len(data)
        return len(data)

    def result(self) -> tuple[str, int, int]:
        """Digest, size, and size when packed. Once."""
        return self.hash.hexdigest(), self.size, self.packed + len(self._compressor.flush())


def _measure(write: Callable[[IO[bytes]], None]) -> tuple[str, int, int]:
    meter = _Meter()
    write(meter)
    return meter.result()
