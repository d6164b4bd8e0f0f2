"""From what a builder made to a packed file: our header, our first lines of ``__main__.py``, the user's code, the seal.

Two steps, because the first one depends on the distributions alone and is cached: `make_base` writes the builder's archive
anew, and `finish` copies that and appends. Names are sorted and times fixed: equal inputs give equal bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from ..errors import PackError
from . import prelude
from .archive import CODE, CONTENTS, Contents
from .header import make_header, with_size
from .prelude import SEAL, digest_before_seal

EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every entry: the earliest that a zip archive can tell."""

_CHUNK = 1 << 20
_MAIN = "__main__.py"
_BEGIN = """

begin(os.path.dirname(os.path.abspath(__file__)), {python!r})


# What follows is the builder's.
"""
"""After the text of `prelude`. In a zip archive that is executed, ``__file__`` is ``<archive>/__main__.py``."""


def make_base(built: Path, edits: Mapping[str, bytes], base: Path, python: str) -> None:
    """Write the archive in the file `built` to the file `base`, without what stands before it, with some files replaced, and
    with ``__main__.py`` begun by `prelude`. What is compressed already is stored."""
    lines = Path(prelude.__file__).read_text("utf-8") + _BEGIN.format(python=python)
    with zipfile.ZipFile(built) as source, zipfile.ZipFile(base, "w") as target:
        for info in sorted(source.infolist(), key=lambda info: info.filename):
            if info.is_dir() and not info.filename.startswith(".bootstrap"):
                continue
            executable = bool(info.external_attr >> 16 & 0o100)
            if info.filename.endswith(".whl"):
                _copy(source, info, target)
                continue
            data = edits[info.filename] if info.filename in edits else source.read(info)
            if info.filename == _MAIN:
                data = lines.encode() + data
            _write(target, info.filename, data, executable)


def finish(base: Path, warm: str, code: Mapping[str, tuple[bytes, bool]], contents: Contents, output: Path) -> None:
    """Write the packed program to `output`, which is replaced at once or not at all. Raises `PackError`."""
    real = Path(os.path.realpath(output))  # A link stays one.
    try:
        fd, name = tempfile.mkstemp(prefix=".bigmachine-", dir=real.parent)
    except OSError as error:
        raise _unwritable(output, error) from error
    os.close(fd)
    temporary = Path(name)
    try:
        _finish(base, warm, code, contents, temporary)
        temporary.replace(real)
    except OSError as error:
        raise _unwritable(output, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(output: Path, error: OSError) -> PackError:
    return PackError(f"cannot write {output}: {error.strerror or error}; choose another place with -o")


def _finish(base: Path, warm: str, code: Mapping[str, tuple[bytes, bool]], contents: Contents, output: Path) -> None:
    header = make_header(contents.name, contents.version, contents.python, warm)
    with open(output, "w+b") as file:
        file.write(header)
        with open(base, "rb") as archive:
            shutil.copyfileobj(archive, file, _CHUNK)
        with zipfile.ZipFile(file, "a") as target:
            _write(target, CONTENTS, json.dumps(contents.to_json(), indent=1, ensure_ascii=False).encode(), False)
            for name, (data, executable) in sorted(code.items()):
                _write(target, CODE + name, data, executable)
            target.comment = SEAL + bytes(64)
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(with_size(header, size))
    digest = digest_before_seal(str(output))
    with open(output, "r+b") as file:
        file.seek(size - len(digest))
        file.write(digest.encode())
    output.chmod(0o777 & ~_umask() | 0o100)


def _write(archive: zipfile.ZipFile, name: str, data: bytes, executable: bool) -> None:
    info = _entry(name, executable)
    if not name.endswith("/"):
        info.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(info, data)


def _copy(source: zipfile.ZipFile, wheel: zipfile.ZipInfo, target: zipfile.ZipFile) -> None:
    """A wheel, which may be large. Most are compressed; those that we make are not."""
    info = _entry(wheel.filename, executable=False)
    info.file_size = wheel.file_size
    with source.open(wheel) as data:
        head = data.read(65536)
        if len(zlib.compress(head, 1)) < 0.9 * len(head):
            info.compress_type = zipfile.ZIP_DEFLATED
        with target.open(info, "w") as out:
            out.write(head)
            shutil.copyfileobj(data, out, _CHUNK)


def _entry(name: str, executable: bool) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, EPOCH)
    info.external_attr = (0o100755 if executable else 0o100644) << 16
    info.create_system = 3  # Unix, whatever this is.
    return info


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
