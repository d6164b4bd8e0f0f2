"""The Pythons of a host.

The standard library only, Python 3.9 and later: see `agent`.
"""

from __future__ import annotations

import glob
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable

PYTHON_TIMEOUT = 10.0
"""Seconds in which an interpreter must say what it is."""

ASK = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
"""What each is asked."""


class Pythons:
    """The interpreters of this host: those on the search path, and where they usually are. Each was executed and asked what it
    is, as a name proves nothing; but not before somebody needs to know."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[str, tuple[str, str]] = {}
        self._searched = False
        self._note(f"{sys.version_info[0]}.{sys.version_info[1]}", sys.executable)

    def _note(self, version: str, path: str) -> None:
        self._found.setdefault(os.path.realpath(path), (version, path))

    def all(self) -> list[tuple[str, str]]:
        """(version, path) of each."""
        with self._lock:
            if not self._searched:
                self._ask(candidates())
                self._searched = True
            return list(self._found.values())

    def find(self, version: str) -> str | None:
        """The path of one of that minor version."""
        with self._lock:
            if not (found := self._known(version)) and not self._searched:
                self._ask([path for path in candidates() if path.endswith(version)])
                found = self._known(version)
        if found is None:
            self.all()
            found = self._known(version)
        return found

    def _known(self, version: str) -> str | None:
        return next((path for found, path in self._found.values() if found == version), None)

    def _ask(self, paths: Iterable[str]) -> None:
        running = [(path, asked(path)) for path in paths if os.path.realpath(path) not in self._found]
        deadline = time.monotonic() + PYTHON_TIMEOUT
        for path, process in running:
            if process is not None:
                try:
                    left = max(0.1, deadline - time.monotonic())
                    version, _, itself = process.communicate(timeout=left)[0].partition(" ")
                    if re.fullmatch(r"3\.\d+", version):
                        self._note(version, itself.strip() or path)
                except (subprocess.TimeoutExpired, ValueError):
                    process.kill()
                    process.wait()


def candidates() -> list[str]:
    """Each file once that may be a Python, the one to be preferred first."""
    home = os.path.expanduser("~")
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/usr/bin", "/usr/local/bin", "/opt/homebrew/bin"]
    for pattern in (f"{home}/.pyenv/versions/*/bin", f"{home}/*conda*/bin", "/opt/*/bin", f"{home}/.local/bin"):
        folders += sorted(glob.glob(pattern), reverse=True)
    paths: dict[str, str] = {}
    for folder in dict.fromkeys(folders):
        # pyenv's shims are slow, and what they stand for is found without them.
        if folder and not folder.endswith("/shims"):
            for path in sorted(glob.glob(os.path.join(glob.escape(folder), "python3*")), reverse=True):
                if re.fullmatch(r"python3(\.\d+)?", os.path.basename(path)) and os.access(path, os.X_OK):
                    paths.setdefault(os.path.realpath(path), path)
    return list(paths.values())


def asked(path: str) -> subprocess.Popen[str] | None:
    quiet = subprocess.DEVNULL
    try:
        return subprocess.Popen(
            [path, "-I", "-S", "-c", ASK], stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, text=True, cwd="/"
        )
    except OSError:
        return None
