"""Parts as they travel: tars.

A distribution's tar is what ``pip install --target`` would lay out, without what pip generates (launchers in ``bin/`` for
entry points, bytecode). It depends on the content of the wheel's files alone: not on their order, dates or compression.
"""

from __future__ import annotations

import csv
import io
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from ..errors import PackError

SCHEMES = {"purelib": "", "platlib": "", "data": "", "scripts": "bin/", "headers": None}
"""Where the directories of a wheel's ``.data`` go; None: nowhere."""

Content = Path | bytes | tuple[bytes, bool]
"""A file of the user's code: on this disk, or its bytes, perhaps with whether it is executable."""


def write_wheel_tar(wheel: IO[bytes] | Path, out: IO[bytes]) -> None:
    """Write the tar of a wheel, a file that can seek, in constant memory; `out` need not.

    Raises `PackError` where it is no wheel, is damaged, has two files for one place or one that would lie outside of the
    tree; OSError.
    """
    called = wheel.name if isinstance(wheel, Path) else os.path.basename(str(getattr(wheel, "name", "a wheel")))
    try:
        with zipfile.ZipFile(wheel) as archive, _open_tar(out) as tar:
            for target, (entry, executable) in sorted(_layout(archive, called).items()):
                with archive.open(entry) as file:
                    _add(tar, target, file, entry.file_size, executable)
    # What zipfile raises besides: encrypted entries and unknown compression (RuntimeError), damaged names (UnicodeError).
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, UnicodeError) as error:
        raise PackError(f"a damaged wheel: {called}: {error}; remove it, so that it is fetched again") from error


def write_code_tar(files: Mapping[str, Content], out: IO[bytes]) -> None:
    """Write the tar of the user's code: by the path in the tree, a file here, or its content.

    Raises `PackError` where a path would lie outside of the tree; OSError.
    """
    with _open_tar(out) as tar:
        for target, content in sorted(files.items()):
            check_place(target, "the program")
            if isinstance(content, Path):
                with content.open("rb") as file:
                    status = os.fstat(file.fileno())
                    _add(tar, target, file, status.st_size, bool(status.st_mode & stat.S_IXUSR))
            else:
                data, executable = content if isinstance(content, tuple) else (content, False)
                _add(tar, target, io.BytesIO(data), len(data), executable)


def _layout(archive: zipfile.ZipFile, called: str) -> dict[str, tuple[zipfile.ZipInfo, bool]]:
    """Where in the tree each entry goes, and whether it is executable there."""
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    heads = {entry.filename.partition("/")[0] for entry in entries}
    data = [f"{head.removesuffix('.dist-info')}.data" for head in heads if head.endswith(".dist-info")]
    found: dict[str, tuple[zipfile.ZipInfo, bool]] = {}
    for entry in entries:
        mode = entry.external_attr >> 16
        # A mode without a type is a file's; a link's has every bit, and means nothing.
        executable = bool(mode & 0o111) and stat.S_IFMT(mode) in (0, stat.S_IFREG)
        target = _place(entry.filename, data, called)
        if target is None:
            continue
        executable = executable or (target != entry.filename and target.startswith("bin/"))
        if target in found:
            raise PackError(f"{called} has two files for one place: {target}")
        found[target] = (entry, executable)
    return found


def recorded_places(record: str, info: str) -> Iterator[str]:
    """Where the files are that a distribution's RECORD lists, in a tree that was laid out like its tar; `info` is the name of
    its ``.dist-info``. Raises `PackError`."""
    data = [f"{info.removesuffix('.dist-info')}.data"]
    for row in csv.reader(record.splitlines()):
        if row and (target := _place(row[0], data, info)) is not None:
            yield target


def _place(name: str, data: Sequence[str], called: str) -> str | None:
    """Where in the tree a wheel's file belongs, if anywhere; `data` are the names of its ``.data`` directories."""
    target = name
    head, _, rest = name.partition("/")
    if head in data:
        scheme, _, rest = rest.partition("/")
        if scheme not in SCHEMES:
            raise PackError(f"{called} has a file that belongs nowhere: {name}")
        if (folder := SCHEMES[scheme]) is None:
            return None
        target = folder + rest
    check_place(target, called)
    return target


def check_place(target: str, called: str) -> None:
    """Refuse a path that is not one below the tree, or that a tar cannot hold."""
    if any(part in ("", ".", "..") for part in target.split("/")) or "\0" in target:
        raise PackError(f"{called} has a file that would lie outside of its tree: {target!r}")
    try:
        target.encode()
    except UnicodeEncodeError:
        raise PackError(f"{called} has a file whose name is not UTF-8: {target!r}; rename it") from None


def _open_tar(out: IO[bytes]) -> tarfile.TarFile:
    # The pax format, and "w|": nothing of it depends on the time, the user or this system; `out` need not seek.
    return tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="strict")


def _add(tar: tarfile.TarFile, target: str, file: IO[bytes], size: int, executable: bool) -> None:
    entry = tarfile.TarInfo(target)  # Its defaults: a regular file, of nobody, from 1970.
    entry.size = size
    entry.mode = 0o755 if executable else 0o644
    tar.addfile(entry, file)
