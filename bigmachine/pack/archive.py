"""Reading a packed file: what it says it is, whether it is whole, and the parts that machines get from it."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import PackError
from .image import Manifest, Part
from .prelude import Damaged, check_whole, seal
from .tars import check_place, recorded_places, write_code_tar, write_wheel_tar

FOLDER = ".bigmachine"
CONTENTS = f"{FOLDER}/program.json"
CODE = f"{FOLDER}/code/"
FORMAT = 1
"""Of `CONTENTS`: raised when an older bigmachine could not read it any more."""


_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError)
"""What zipfile raises of archives that were damaged, wherever the damage is."""


@dataclass(frozen=True)
class Contents:
    """What a packed program is. `entry` is the path below its code of what is run, `version` that of bigmachine,
    `origin` where its requirements were found, `digest` what driver and machines compare (`program_digest`)."""

    name: str
    entry: str
    python: str
    version: str
    builder: str
    digest: str
    origin: str
    requirements: tuple[str, ...]
    platforms: tuple[Manifest, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "format": FORMAT,
            "name": self.name,
            "entry": self.entry,
            "python": self.python,
            "bigmachine": self.version,
            "builder": self.builder,
            "digest": self.digest,
            "origin": self.origin,
            "requirements": list(self.requirements),
            "platforms": [manifest.to_json() for manifest in self.platforms],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Contents:
        """The inverse of `to_json`. Raises KeyError and the like on other values."""
        return cls(
            name=value["name"],
            entry=value["entry"],
            python=value["python"],
            version=value["bigmachine"],
            builder=value["builder"],
            digest=value["digest"],
            origin=value["origin"],
            requirements=tuple(value["requirements"]),
            platforms=tuple(Manifest.from_json(manifest) for manifest in value["platforms"]),
        )

    def manifest(self, platform: str) -> Manifest:
        """What machines of `platform` get. Raises `PackError` where it was not packed for that."""
        for manifest in self.platforms:
            if manifest.platform == platform:
                return manifest
        packed = ", ".join(manifest.platform for manifest in self.platforms)
        raise PackError(f"{self.name} was packed for {packed}, not for {platform}: pack it with --platform {platform}")


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        seal(str(path))
        archive = zipfile.ZipFile(path)
    except FileNotFoundError:
        raise PackError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise PackError(f"a directory, not a packed program: {path}") from None
    except OSError as error:
        raise PackError(f"cannot read {path}: {error.strerror}") from error
    except Damaged as error:
        with open(path, "rb") as file:
            if b": packed by bigmachine " in file.read(1024):
                raise PackError(str(error)) from None
        if zipfile.is_zipfile(path):
            raise PackError(f"{path} was not packed by bigmachine: `bigmachine pack` its program") from None
        raise PackError(f"{path} is not a packed program") from None
    except zipfile.BadZipFile:
        raise PackError(f"{path} is damaged: it is no archive any more; copy or pack it again") from None
    with archive:
        yield archive


def read_contents(path: Path) -> Contents:
    """What the packed file at `path` says it is. Raises `PackError`."""
    with _opened(path) as archive:
        try:
            value = json.loads(archive.read(CONTENTS))
            if value["format"] != FORMAT:
                raise PackError(
                    f"{path} was packed by bigmachine {value['bigmachine']}, in another form ({value['format']}): pack it again"
                )
            return Contents.from_json(value)
        except (KeyError, TypeError, ValueError, *_UNREADABLE) as error:
            raise PackError(
                f"{path} is damaged: its table of contents cannot be read; copy or pack it again"
            ) from error


def verify(path: Path) -> None:
    """Raises `PackError` unless every byte of the file is what was packed."""
    with _opened(path):
        try:
            check_whole(str(path))
        except Damaged as error:
            raise PackError(str(error)) from None


def unpack_code(path: Path, folder: Path) -> None:
    """The user's own code, and the table of contents beside it: ``folder/code/``, ``folder/program.json``."""
    with _opened(path) as archive:
        (folder / "code").mkdir()
        (folder / "program.json").write_bytes(archive.read(CONTENTS))
        for info in archive.infolist():
            if info.filename.startswith(CODE):
                target = folder / "code" / _inside(info.filename.removeprefix(CODE), path)
                target.parent.mkdir(parents=True, exist_ok=True)
                data, executable = _file(archive, info.filename)
                target.write_bytes(data)
                target.chmod(0o555 if executable else 0o444)  # It is shared: nobody is to write into it.


def write_part(path: Path, part: Part, out: IO[bytes]) -> None:
    """The tar of a part of the packed file at `path`, whose digest is the part's own. Raises `PackError`, OSError."""
    with _opened(path) as archive:
        try:
            if part.kind == "code":
                names = [name.removeprefix(CODE) for name in archive.namelist() if name.startswith(CODE)]
                write_code_tar({_inside(name, path): _file(archive, CODE + name) for name in names}, out)
            elif part.file.endswith(".whl"):
                with archive.open(part.file) as wheel:
                    write_wheel_tar(wheel, out)
            else:  # A tree that is laid out already, with others.
                site, _, info = part.file.rpartition("/")
                record = archive.read(f"{part.file}/RECORD").decode()
                write_code_tar(
                    {place: _file(archive, f"{site}/{place}") for place in recorded_places(record, info)}, out
                )
        except (KeyError, ValueError, *_UNREADABLE) as error:
            raise PackError(f"{path} is damaged: {part.name} cannot be read; copy or pack it again") from error


def _file(archive: zipfile.ZipFile, name: str) -> tuple[bytes, bool]:
    """Its content, and whether it is executable."""
    return archive.read(name), bool(archive.getinfo(name).external_attr >> 16 & 0o100)


def _inside(name: str, path: Path) -> str:
    """`name`, which must stay below the directory that it is relative to."""
    check_place(name, str(path))
    return name
