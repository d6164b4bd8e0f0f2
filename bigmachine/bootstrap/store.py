"""What an agent keeps on its host: parts, and what machines execute.

The standard library only, Python 3.9 and later: see `agent`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from typing import Any

from .parts import PartError

UNUSED = 30 * 86400.0
"""Seconds after which parts and images that nobody used are removed."""

SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a system says when there is no room for more."""


class Refused(Exception):
    """The answer to a request that is not fulfilled."""

    def __init__(self, status: int, text: str, **more: Any) -> None:
        super().__init__(text)
        self.status = status
        self.body = {"error": text, **more}


class Store:
    """The cache: ``parts/<digest>/{tree,z}`` and ``images/<key>/…``, each whole from the moment it has its name; ``work/`` is
    what agents are making, in a locked directory each. With an empty `root` in the user's cache directory, or, where that
    cannot be written to, in a temporary one."""

    def __init__(self, root: str) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        self.temporary = ""
        try:
            self._open(root or os.path.join(home, "bigmachine-hosts"))
        except OSError:
            if root:
                raise
            self.temporary = tempfile.mkdtemp(prefix="bigmachine-")
            self._open(self.temporary)

    def _open(self, root: str) -> None:
        self.root = root
        for kind in ("parts", "images", "work"):
            os.makedirs(os.path.join(root, kind), 0o700, exist_ok=True)
        self.work = tempfile.mkdtemp(dir=os.path.join(root, "work"))
        self.lock = os.open(os.path.join(self.work, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.id = self._identity()

    def _identity(self) -> str:
        """The same for all agents that share this directory."""
        path = os.path.join(self.root, "id")
        mine = os.path.join(self.work, "id")
        with open(mine, "w") as file:
            file.write(os.urandom(8).hex())
        with contextlib.suppress(FileExistsError):
            os.link(mine, path)
        with open(path) as file:
            return file.read()

    def path(self, kind: str, key: str) -> str:
        return os.path.join(self.root, kind, key)

    def holds(self, kind: str, key: str) -> bool:
        """Whether it is there; if so it counts as used."""
        try:
            os.utime(self.path(kind, key))
        except OSError:
            return False
        return True

    def held(self) -> list[str]:
        return sorted(self._names("parts"))

    def _names(self, kind: str) -> list[str]:
        try:
            return os.listdir(os.path.join(self.root, kind))
        except OSError:
            return []  # It is gone, as a temporary one in the end.

    def keep(self, folder: str, kind: str, key: str) -> str:
        """Give what was made in `folder` its name; where that is taken, somebody was faster, with the same content."""
        target = self.path(kind, key)
        try:
            os.rename(folder, target)
        except OSError:
            if not os.path.isdir(target):
                raise
            shutil.rmtree(folder, ignore_errors=True)
        return target

    def make(self, kind: str, key: str, fill: Callable[[str], None]) -> str:
        """The path of an entry, which `fill` makes where there is none."""
        if not self.holds(kind, key):
            folder = tempfile.mkdtemp(dir=self.work)
            try:
                fill(folder)
                os.chmod(folder, 0o755)
                self.keep(folder, kind, key)
            except (PartError, OSError) as error:
                shutil.rmtree(folder, ignore_errors=True)
                raise refusal(error) from error
        return self.path(kind, key)

    def clean(self) -> None:
        """Remove what was not used for long, and what agents that were killed have left."""
        for kind in ("parts", "images"):
            for name in self._names(kind):
                with contextlib.suppress(OSError):  # Somebody else is doing the same.
                    path = self.path(kind, name)
                    if time.time() - os.stat(path).st_mtime > UNUSED and unlocked(path):
                        os.rename(path, os.path.join(self.work, name))
                        shutil.rmtree(os.path.join(self.work, name), ignore_errors=True)
        for name in self._names("work"):
            path = self.path("work", name)
            with contextlib.suppress(OSError):
                if path != self.work and time.time() - os.stat(path).st_mtime > 1 and unlocked(path):
                    shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        for _ in range(50):  # Threads that were told to end may still be writing into it.
            shutil.rmtree(self.work, ignore_errors=True)
            if not os.path.exists(self.work):
                break
            time.sleep(0.02)
        with contextlib.suppress(OSError):  # It may be closed already.
            os.close(self.lock)


def unlocked(path: str) -> bool:
    """Whether nobody uses it: holds its file ``lock``."""
    fd = os.open(os.path.join(path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def refusal(error: Exception) -> Refused:
    """What to answer where something could not be unpacked or written."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError) and cause.errno in SPACE:
        return Refused(507, f"no space left on {socket.gethostname()}: {error}")
    return Refused(422 if isinstance(error, PartError) else 500, str(error))


def locked(folder: str) -> int:
    """In use, as long as the descriptor is open."""
    fd = os.open(os.path.join(folder, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd
