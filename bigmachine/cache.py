"""The cache on disk: content that can be made again, under keys that are digests of what it is made from.

It lies in the platform's cache directory (``~/.cache/bigmachine``, ``~/Library/Caches/bigmachine``), or in
``$BIGMACHINE_CACHE``. Entries are directories ``<kind>/<key>/``, each complete from the moment it has its name: they are
made under another name and renamed, so that several processes may use one cache; the first one's entry stays.

Whoever works with entries holds the cache in use (`Cache.use`); `clear` waits for nobody, and refuses while somebody does.
The directory says by its `TAG` that it is a cache: no other is ever used or cleared.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import CacheError

VARIABLE = "BIGMACHINE_CACHE"
"""The environment variable that names another directory."""

KINDS = {
    "wheels": "distributions, as the index serves them",
    "resolved": "which distributions a set of requirements means",
    "parts": "what is sent to machines",
    "bases": "packed programs without their own code",
    "packed": "programs that packed themselves",
    "programs": "the code of packed programs that ran here",
    "images": "what machines on this host ran, as it would be sent to others",
    "builders": "the builders' own caches",
    "ec2": "what AWS says about instance types and prices",
}
"""What there is, for `bigmachine cache info`."""

STALE = 24 * 3600.0
"""Seconds after which an unfinished entry is certainly nobody's any more."""

UNUSED = 30 * 24 * 3600.0
"""Seconds after which entries of `PASSING` kinds are removed: each edit of a program makes new ones."""

PASSING = ("packed", "programs", "images", "ec2")

TAG = "CACHEDIR.TAG"
"""As backup programs know it: https://bford.info/cachedir/"""

_TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# Made by bigmachine, which can make all of it again.\n"

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems say that have no locks: there, nobody should clear the cache while a program runs."""


@dataclass(frozen=True)
class Usage:
    """Of one kind: how many entries, how many bytes they take."""

    kind: str
    entries: int
    bytes: int


def default_root() -> Path:
    """Where the cache is."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen).absolute()
    from platformdirs import user_cache_path  # Not on workers, and not where the variable is set.

    try:
        return user_cache_path("bigmachine")
    except RuntimeError as error:  # Of pathlib: neither a variable nor the system says where home is.
        raise CacheError(f"there is no home directory for the cache: name a directory in ${VARIABLE}") from error


class Cache:
    """A cache below `root`. Creates nothing before the first entry. Raises `CacheError` where the file system refuses."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    def path(self, kind: str, key: str) -> Path:
        """The directory of an entry, whether or not it exists."""
        assert kind in KINDS, kind
        return self.root / kind / key

    def get(self, kind: str, key: str) -> Path | None:
        """The directory of an entry; None where there is none."""
        path = self.path(kind, key)
        if not path.is_dir():
            return None
        if kind in PASSING:
            with contextlib.suppress(OSError):
                os.utime(path)
        return path

    def put(self, kind: str, key: str, fill: Callable[[Path], None]) -> Path:
        """The directory of an entry; where there is none, `fill` makes its content in an empty directory given to it.

        What `fill` raises passes through, and leaves nothing behind.
        """
        if (found := self.get(kind, key)) is not None:
            return found
        path = self.path(kind, key)
        with self.scratch() as folder:
            fill(folder)
            with self._refusals("write"):
                path.parent.mkdir(parents=True, exist_ok=True)
                try:
                    folder.rename(path)
                except OSError:
                    if not path.is_dir():  # Else somebody was faster, with the same content.
                        raise
        return path

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty directory on the cache's file system; what is left in it is removed in the end."""
        folder = self.root / "unfinished" / secrets.token_hex(8)
        with self._refusals("write"):
            self._make_root()
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Keep `clear` from removing entries while the block lasts."""
        fd = self._lock(fcntl.LOCK_SH)
        try:
            self._sweep()
            yield
        finally:
            os.close(fd)

    def hold(self) -> None:
        """Keep `clear` from removing entries while this process, or one that it has forked, lasts."""
        self._lock(fcntl.LOCK_SH)

    def usage(self) -> list[Usage]:
        """What there is of each kind."""
        return [self._usage(kind) for kind in KINDS]

    def clear(self) -> int:
        """Remove everything. Returns the number of bytes. Raises `CacheError` where somebody uses it."""
        if not self.root.is_dir() or not os.listdir(self.root):
            return 0
        fd = self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            before = sum(usage.bytes for usage in self.usage())
            with self._refusals("clear"):
                for kind in (*KINDS, "unfinished"):
                    if (self.root / kind).exists():
                        shutil.rmtree(self.root / kind)
        finally:
            os.close(fd)
        return before

    def _usage(self, kind: str) -> Usage:
        entries = size = 0
        folder = self.root / kind
        if folder.is_dir():
            entries = sum(1 for _ in folder.iterdir())
            for parent, _, names in os.walk(folder):
                for name in names:
                    try:
                        size += os.lstat(os.path.join(parent, name)).st_size
                    except FileNotFoundError:
                        pass  # Somebody has just finished with it.
        return Usage(kind, entries, size)

    def _lock(self, how: int) -> int:
        """A descriptor; who closes it gives the lock back."""
        with self._refusals("use"):
            self._make_root()
            fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, how)
        except BlockingIOError:
            os.close(fd)
            reason = "a program that it holds runs, or is being packed"
            raise CacheError(f"the cache {self.root} is in use: {reason}") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(fd)
                with self._refusals("lock"):
                    raise
        except BaseException:  # Ctrl-C, while it waited.
            os.close(fd)
            raise
        return fd

    def _make_root(self) -> None:
        """Raises `CacheError` where the directory is somebody else's, OSError."""
        if (self.root / TAG).exists():
            return
        self.root.mkdir(parents=True, exist_ok=True)
        if any(not name.startswith(TAG) for name in os.listdir(self.root)) and not (self.root / TAG).exists():
            raise CacheError(
                f"not a cache of bigmachine's, and not empty: {self.root}; name another directory in ${VARIABLE}"
            )
        with open(self.root / f"{TAG}.{secrets.token_hex(4)}", "x") as file:
            file.write(_TAG_TEXT)
        os.rename(file.name, self.root / TAG)

    def _sweep(self) -> None:
        """Remove what processes that were killed have left unfinished, and what nobody has used for long."""
        now = time.time()
        for kind, age in (("unfinished", STALE), *((kind, UNUSED) for kind in PASSING)):
            with contextlib.suppress(OSError):
                for folder in (self.root / kind).iterdir():
                    if now - folder.stat().st_mtime > age:
                        shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _refusals(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise CacheError(
                f"cannot {verb} the cache {self.root}: {reason}; name another directory in ${VARIABLE}"
            ) from error
