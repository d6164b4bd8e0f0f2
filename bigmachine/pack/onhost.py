"""An image on this host: what a machine elsewhere would get of a packed program, unpacked as it would be there."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..bootstrap import parts
from ..cache import Cache
from ..errors import PackError
from .archive import Contents, read_contents, unpack_code, write_part
from .image import Manifest, Part


@dataclass(frozen=True)
class Unpacked:
    """`site` holds the distributions of the worker's set, `folder` the program's code (see `program.Packed`)."""

    site: Path
    folder: Path


def unpack_image(file: Path, platform: str, cache: Cache) -> Unpacked:
    """The image of the packed program `file` for `platform`; parts that are here already are not unpacked again.

    Raises `PackError` where the file is damaged, or was not packed for this platform; `CacheError`; OSError.
    """
    contents = read_contents(file)
    manifest = contents.manifest(platform)
    distributions = [part for part in manifest.worker() if part.kind != "code"]
    folders = [_unpacked(file, part, cache) for part in distributions]

    def fill(folder: Path) -> None:
        parts.install(folders, folder / "site")
        unpack_code(file, folder)

    try:
        folder = cache.put("images", _key(contents, manifest), fill)
    except parts.PartError as error:
        raise PackError(str(error)) from error
    return Unpacked(folder / "site", folder)


def _key(contents: Contents, manifest: Manifest) -> str:
    said = [contents.digest, manifest.platform, [part.digest for part in manifest.worker()]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _unpacked(file: Path, part: Part, cache: Cache) -> Path:
    def fill(folder: Path) -> None:
        with tempfile.TemporaryFile() as tar:
            write_part(file, part, tar)
            tar.seek(0)
            parts.unpack(tar, folder / "tree", part.digest, part.size)

    try:
        return cache.put("images", f"part-{part.digest}", fill) / "tree"
    except parts.PartError as error:
        raise PackError(str(error)) from error
