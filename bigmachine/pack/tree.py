"""The files of a program: collected from directories, without what tools leave there, under names that fit everywhere."""

from __future__ import annotations

import heapq
import os
import unicodedata
from pathlib import Path

from ..errors import PackError

LIMIT = 50 * 2**20
"""Bytes of own code. All of it goes to every machine again whenever one line of it changes: 42 s at 10 Mbit/s."""

MOST = 50_000
"""Files: more is somebody's home directory, not a program."""

EXCLUDED = frozenset(
    {
        *(".git", ".hg", ".svn"),
        *("__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".tox", ".nox", ".ipynb_checkpoints", ".eggs"),
        *("node_modules", ".DS_Store"),
    }
)
"""Never packed, file or directory: history, caches, what other tools install."""

ENVIRONMENTS = ("venv", ".venv", "env")
"""Names of virtual environments, where they hold an interpreter."""


def excluded_file(name: str) -> bool:
    """Whether a file of this name is never packed: caches, and what editors keep beside a file."""
    if name in EXCLUDED or name.endswith((".pyc", ".pyo", "~")):
        return True
    swap = name.startswith(".") and name.endswith((".swp", ".swo", ".swn"))
    return swap or name.startswith(".#") or (name.startswith("#") and name.endswith("#"))


def excluded_directory(path: Path) -> bool:
    """Whether a directory is never packed: by its name, or because it says itself that it is an environment or a cache."""
    if path.name in EXCLUDED or os.path.lexists(path / "pyvenv.cfg") or os.path.lexists(path / "CACHEDIR.TAG"):
        return True
    return path.name in ENVIRONMENTS and os.path.lexists(path / "bin" / "python")


class Tree:
    """Files by their posix path in the tree, and `notes` on what was left out or may not fit.

    Whatever it raises is a `PackError`.
    """

    def __init__(self) -> None:
        self.files: dict[str, Path] = {}
        self.notes: list[str] = []

    def add_file(self, name: str, path: Path) -> None:
        """`path` is to be `name`."""
        there = self.files.get(name)
        if there is None:
            _check_name(path)
            self.files[name] = path
            if name.endswith(".so"):
                self.notes.append(f"{name} is an extension module: it fits one platform only")
            if len(self.files) > MOST:
                raise PackError(f"more than {MOST} files, lastly {name}: --add less, or move what is no code elsewhere")
        elif there != path and not os.path.samefile(there, path):
            raise PackError(f"{there} and {path} clash: both would be {name} in the packed program; rename one")

    def add_directory(self, name: str, path: Path) -> None:
        """All that is below `path` is to be below `name` (``""``: at the top)."""
        self._walk(name, path, (os.path.realpath(path),))

    def _walk(self, name: str, path: Path, chain: tuple[str, ...]) -> None:
        try:
            with os.scandir(path) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            raise PackError(f"cannot read {path}: {error.strerror or error}") from error
        for entry in entries:
            inside = path / entry.name
            below = f"{name}/{entry.name}" if name else entry.name
            if excluded_file(entry.name):
                continue
            if os.path.isdir(inside):  # Of a link that leads to itself, `entry` would raise.
                if not excluded_directory(inside):
                    _check_name(inside)
                    self._enter(below, inside, chain, entry.is_symlink())
            elif os.path.isfile(inside):
                if _is_packed(inside):
                    self._note(f"{below} is a packed program: left out")
                else:
                    self.add_file(below, inside)
            elif entry.is_symlink() and not os.path.exists(inside):
                self._note(f"{below} is a broken symbolic link: left out")
            else:
                self._note(f"{below} is neither file nor directory: left out")

    def _enter(self, name: str, path: Path, chain: tuple[str, ...], link: bool) -> None:
        real = os.path.join(chain[-1], path.name)
        if link:
            real = os.path.realpath(path)
            if any(_holds(real, parent) for parent in chain):
                self._note(f"{name} is a symbolic link to a directory that holds it: left out")
                return
            if _in_excluded(Path(real), Path(chain[0])):
                self._note(f"{name} is a symbolic link to what is never packed: left out")
                return
        self._walk(name, path, (*chain, real))

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def finish(self) -> dict[str, Path]:
        """The files in the order of their names, once it is certain that all can be read, packed and unpacked."""
        files = dict(sorted(self.files.items()))
        _check_clashes(files)
        sizes = {name: _size(path) for name, path in files.items()}
        if sum(sizes.values()) > LIMIT:
            largest = heapq.nlargest(3, sizes, key=sizes.__getitem__)
            named = ", ".join(f"{files[name]} ({sizes[name] / 2**20:.1f} MiB)" for name in largest)
            raise PackError(
                f"the program's own files take {sum(sizes.values()) / 2**20:.1f} MiB, more than {LIMIT >> 20} MiB: {named}; "
                "move data out of the packages, to where machines can read it"
            )
        return files


def _is_packed(path: Path) -> bool:
    """Whether we made this file: packing again must not pack what was packed before."""
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError:
        return False  # `finish` says it.
    return head.startswith(b"#!/bin/sh\n# ") and b": packed by bigmachine " in head


def _size(path: Path) -> int:
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise PackError(f"cannot read {path}: {error.strerror or error}") from error


def _check_name(path: Path) -> None:
    try:
        path.name.encode()
    except UnicodeEncodeError:
        shown = os.fsencode(path.name).decode("utf-8", "backslashreplace")
        raise PackError(f"a file name is not UTF-8: {shown} in {path.parent}; rename it") from None


def _check_clashes(files: dict[str, Path]) -> None:
    """Names that macOS takes for one: it compares without case and with accents composed."""
    names: dict[str, str] = {}
    for name in files:
        key = unicodedata.normalize("NFC", name).casefold()
        other = names.setdefault(key, name)
        if other != name:
            raise PackError(f"{other} and {name} clash: on macOS they would be the same file; rename one")
    for key, name in names.items():
        while (key := key.rpartition("/")[0]) and key not in names:
            pass
        if key:
            raise PackError(f"{names[key]} and {name} clash: one is a file, and a directory in the other; rename one")


def _holds(directory: str, path: str) -> bool:
    """Whether `path` is `directory`, or below it."""
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _in_excluded(target: Path, root: Path) -> bool:
    """Whether `target`, or a directory that it is in and `root` is not, is never packed."""
    return any(excluded_directory(path) for path in (target, *target.parents) if not _holds(str(path), str(root)))
