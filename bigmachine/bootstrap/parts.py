"""Parts of a program, as they arrive on a machine: a part is a tar of files, named by the sha256 of its bytes.

Rule 1: nobody is trusted before the digest is known. Only regular files and directories are made, below a directory that
        nobody else uses, and never through a link: there are none.
Rule 2: a part is there whole, under its name, or it is not there: it is unpacked beside its place and renamed.
Rule 3: memory does not grow with the size of a part or of its files.

This reads the format itself (POSIX ustar with pax paths and sizes, as `bigmachine.pack.image` writes it): `tarfile` takes a
damaged header for the end of the archive, and reads extended headers of any size into memory.

The standard library only, Python 3.9 and later, and no import of bigmachine: this file is sent to machines.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from typing import IO

BLOCK = 512
"""What a tar is made of."""

CHUNK = 1 << 18
"""Bytes read and written at once."""

MAX_PATH = 1024
"""Bytes of a path in a part: macOS takes no longer ones."""

MAX_EXTENDED = 1 << 14
"""Bytes of an extended header, which holds a path and a size."""


class PartError(Exception):
    """A part was not unpacked, and left nothing behind; or a tree was not made of parts. The text is one line."""


def unpack(stream: IO[bytes], folder: str | os.PathLike[str], digest: str, limit: int | None = None) -> None:
    """Unpack the tar that `stream` yields to its end into `folder`, if the sha256 of all its bytes is `digest` (hex).

    `folder` must not exist. Where it does, somebody was faster: nothing is read and nothing done. A part of more than
    `limit` bytes is refused. Raises `PartError`, also where `stream` or the file system raises OSError.
    """
    folder = os.fspath(folder)
    if os.path.isdir(folder):
        return
    reader = _Reader(stream, digest, limit)
    with _Unfinished(folder) as place:
        _extract(reader, place.path)
        reader.finish()
        place.keep()


def install(parts: Iterable[str | os.PathLike[str]], site: str | os.PathLike[str]) -> None:
    """Make one tree, `site`, of unpacked parts: hard links where the file system can, else copies.

    Of two files with one path the first part's stays. `site` must not exist; where it does, somebody was faster. Files
    share their content with the parts: replace them, never write into them. Raises `PartError`.
    """
    site = os.fspath(site)
    if os.path.isdir(site):
        return
    with _Unfinished(site) as place:
        for part in parts:
            _link_tree(os.fspath(part), place.path)
        place.keep()


class _Unfinished:
    """A directory beside `target` that gets its name by `keep`; it is removed at the block's end where it did not.

    What the file system refuses in the block becomes a `PartError`.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.path = f"{target}.{os.urandom(8).hex()}.unfinished"

    def __enter__(self) -> _Unfinished:
        try:
            os.makedirs(self.path)
        except OSError as error:
            raise _refused(error, self.target) from error
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError):
            raise _refused(error, self.target) from error

    def keep(self) -> None:
        try:
            os.rename(self.path, self.target)
        except OSError:
            if not os.path.isdir(self.target):  # Else somebody was faster, with the same content.
                raise


class _Reader:
    """Exact reads from a stream, hashed and counted."""

    def __init__(self, stream: IO[bytes], digest: str, limit: int | None) -> None:
        self.stream = stream
        self.wanted = digest
        self.limit = limit
        self.count = 0
        self.hash = hashlib.sha256()

    def some(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end."""
        try:
            data = self.stream.read(size)
        except OSError as error:
            raise self.error(f"the stream failed after {self.count} bytes: {error}") from error
        self.count += len(data)
        if self.limit is not None and self.count > self.limit:
            raise self.error(f"it is longer than the {self.limit} bytes that were announced")
        self.hash.update(data)
        return data

    def chunks(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes, piece by piece."""
        while size:
            data = self.some(min(size, CHUNK))
            if not data:
                raise self.error(f"it is cut short, after {self.count} bytes")
            size -= len(data)
            yield data

    def exactly(self, size: int) -> bytes:
        return b"".join(self.chunks(size))

    def skip(self, size: int) -> None:
        for _ in self.chunks(size):
            pass

    def finish(self) -> None:
        """Read what is left, which is padding, and compare the digest."""
        while data := self.some(CHUNK):
            if data.strip(b"\0"):
                raise self.error("bytes follow its end")
        if self.hash.hexdigest() != self.wanted:
            raise self.error(f"its {self.count} bytes have the digest {self.hash.hexdigest()}")

    def error(self, reason: str) -> PartError:
        return PartError(f"part {self.wanted} is not usable: {reason}; fetch it again")


def _extract(reader: _Reader, place: str) -> None:
    """Make the files and directories of the tar, up to its end mark."""
    extended: dict[str, str] = {}
    folders = {place}
    while (header := reader.exactly(BLOCK)) != bytes(BLOCK):
        size = _number(header[124:136], reader)
        if _number(header[148:156], reader) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            raise reader.error("a header is damaged")
        kind = header[156:157]
        if kind == b"x":
            if size > MAX_EXTENDED:
                raise reader.error(f"an extended header has {size} bytes")
            extended = _extended(reader.exactly(size), reader)
            reader.skip(-size % BLOCK)
            continue
        size = _decimal(extended.get("size", str(size)), reader)
        name = _checked(extended.get("path") or _name(header, reader), reader)
        extended = {}
        path = os.path.join(place, name)
        if kind in (b"0", b"\0") and not name.endswith("/"):
            _make_folder(os.path.dirname(path), folders)
            _write(path, _number(header[100:108], reader), reader.chunks(size), reader)
            reader.skip(-size % BLOCK)
        elif kind == b"5" and not size:
            _make_folder(path.rstrip("/"), folders)
        else:
            raise reader.error(f"{name!r} is neither a file nor a directory")


def _write(path: str, mode: int, chunks: Iterator[bytes], reader: _Reader) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o755 if mode & 0o111 else 0o644)
    except FileExistsError:
        raise reader.error(f"{os.path.basename(path)!r} is in it twice") from None
    with open(fd, "wb", buffering=0) as file:
        for chunk in chunks:
            view = memoryview(chunk)
            while view:  # A nearly full disk takes a part of it.
                view = view[file.write(view) :]


def _make_folder(path: str, known: set[str]) -> None:
    if path not in known:
        os.makedirs(path, exist_ok=True)
        known.add(path)


def _name(header: bytes, reader: _Reader) -> str:
    if header[257:263] != b"ustar\0":
        raise reader.error("it is no POSIX tar")
    name, prefix = header[:100].rstrip(b"\0"), header[345:500].rstrip(b"\0")
    try:
        return (prefix + b"/" + name if prefix else name).decode()
    except UnicodeDecodeError:
        raise reader.error("a name in it is not UTF-8") from None


def _checked(name: str, reader: _Reader) -> str:
    """`name`, which must lead to a place below the directory that it is relative to; a directory's may end with a slash."""
    if not name or "\0" in name or any(part in ("", ".", "..") for part in name.removesuffix("/").split("/")):
        raise reader.error(f"it has a file called {name!r}")
    if len(os.fsencode(name)) > MAX_PATH:
        raise reader.error(f"it has a file with a name of {len(os.fsencode(name))} bytes")
    return name


def _extended(data: bytes, reader: _Reader) -> dict[str, str]:
    """The records of a pax header: ``<length of all this> <key>=<value>\\n``."""
    found: dict[str, str] = {}
    while data:
        digits = data[:8].partition(b" ")[0].decode("latin-1")
        length = _decimal(digits, reader)
        key, equals, value = data[len(digits) + 1 : length].partition(b"=")
        if not equals or value[-1:] != b"\n" or length > len(data):
            raise reader.error("an extended header is damaged")
        try:
            found[key.decode()] = value[:-1].decode()
        except UnicodeDecodeError:
            raise reader.error("a name in it is not UTF-8") from None
        data = data[length:]
    return found


def _number(field: bytes, reader: _Reader) -> int:
    text = field.strip(b" \0").decode("latin-1")
    if any(digit not in "01234567" for digit in text):
        raise reader.error("a header is damaged")
    return int(text or "0", 8)


def _decimal(text: str, reader: _Reader) -> int:
    # isdecimal alone would take other scripts' digits; 16 digits are more than any file has.
    if not (text.isascii() and text.isdecimal() and len(text) <= 16):
        raise reader.error("a header is damaged")
    return int(text)


def _link_tree(part: str, place: str) -> None:
    def failed(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(part, onerror=failed):
        into = os.path.join(place, os.path.relpath(parent, part))
        for folder in folders:
            os.makedirs(os.path.join(into, folder), exist_ok=True)
        for name in names:
            source, target = os.path.join(parent, name), os.path.join(into, name)
            if os.path.isdir(target):  # The other way round, makedirs says so.
                raise FileExistsError(errno.EEXIST, "a file in one part, a directory in another", target)
            if not os.path.exists(target):
                try:
                    os.link(source, target)
                except OSError:  # Another file system, one without links, or too many of them.
                    shutil.copy2(source, target)


def _refused(error: OSError, target: str) -> PartError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return PartError(f"no space left for {target}: free some, or choose another directory")
    return PartError(f"cannot make {target}: {error.strerror or error}: {error.filename or ''}".removesuffix(": "))
