"""Files that commands write: whole or not at all, and for their owner's eyes, as they tell what a program does."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

MAX_NAMES = 10_000
"""Names that are tried for a new file: who has so many in one directory gives a name."""


def check(path: Path | None) -> None:
    """Whether `keep` could write there: to be asked before something that takes long. Raises OSError."""
    if path is not None and path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory, not a file", str(path))
    if path is None or not path.exists() or path.is_file():
        handle, temporary = _temporary(path)
        os.close(handle)
        os.unlink(temporary)


def keep(
    pieces: Iterable[bytes], path: Path | None, name: str, sound: Callable[[Path], object] = lambda file: None
) -> Path:
    """Write `pieces` to `path`, or, where that is None, to a new file in this directory; returns where they are.

    `name` is the new file's, with ``{}`` in it for a number. Raises OSError, what `pieces` raises, and what `sound` does, which
    gets the file when it is written; there is none then.
    """
    if path is not None and path.exists() and not path.is_file():  # /dev/stdout is not to become a file.
        with path.open("wb") as special:
            for piece in pieces:
                special.write(piece)
        return path
    handle, temporary = _temporary(path)
    try:
        with os.fdopen(handle, "wb") as file:
            for piece in pieces:
                file.write(piece)
        sound(Path(temporary))
        target = _new(name) if path is None else path
        os.replace(temporary, target)
        return target
    except BaseException:  # Ctrl-C, too: no half of a file is left.
        os.unlink(temporary)
        raise


def _temporary(path: Path | None) -> tuple[int, str]:
    """A new file in the directory of `path`: a descriptor of it, and its name."""
    folder = Path() if path is None else path.parent
    try:
        return tempfile.mkstemp(prefix=".bigmachine-", dir=folder)
    except OSError as error:  # The name is ours, and nobody knows it.
        raise OSError(error.errno, error.strerror, str(folder)) from None


def _new(name: str) -> Path:
    """Take a name that nothing has yet, not even what comes at the same time."""
    for number in range(1, MAX_NAMES):
        path = Path(name.format(f"{number:03}"))
        with contextlib.suppress(FileExistsError):
            path.touch(0o600, exist_ok=False)
            return path
    raise FileExistsError(errno.EEXIST, "there are too many of these: give a name with -o", name)
