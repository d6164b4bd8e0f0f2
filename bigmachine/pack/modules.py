"""Where the import system would find a module, without importing anything."""

from __future__ import annotations

import importlib.machinery
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from .tree import excluded_directory


@dataclass(frozen=True)
class Place:
    """A directory on the search path; with `only`, just that one entry of it."""

    path: Path
    only: str = ""


@dataclass
class Found:
    """What of a dotted name is there: its first `depth` parts.

    `files`: what importing it executes, by path in the tree. `package`: the outermost package with an ``__init__`` on the
    way, by path in the tree. `namespace`: the first part is a directory without; such a one comes after all that is installed.
    """

    depth: int = 0
    namespace: bool = False
    files: dict[str, Path] = field(default_factory=dict)
    package: tuple[str, Path] | None = None


@dataclass(frozen=True)
class _Listing:
    names: frozenset[str]
    extensions: tuple[str, ...]


class Finder:
    """Looks modules up in `places`, in this order. What it has listed stays so."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = tuple(places)
        self._list = cache(_list)
        self._directory = cache(_is_directory)

    def find(self, parts: Sequence[str]) -> Found | None:
        """None where not even the first part is there. A module wins over a namespace, the first place over the next."""
        found = Found()
        places = self.places
        for part in parts:
            prefix = "/".join(parts[: found.depth])
            files, places = self._look(part, places)
            if not files and not places:
                break
            found.depth += 1
            if found.depth == 1:
                found.namespace = not files
            if places and files and found.package is None:
                found.package = ("/".join(parts[: found.depth]), places[0].path)
            for file in files:
                name = f"{part}/{file.name}" if places else file.name
                found.files[f"{prefix}/{name}" if prefix else name] = file
            if not places:  # A module: nothing is below it.
                break
        return found if found.depth else None

    def _look(self, part: str, places: Sequence[Place]) -> tuple[list[Path], tuple[Place, ...]]:
        """The files that are module `part`, and where its submodules are to be looked for."""
        portions = []
        for place in places:
            listing = self._list(place.path)
            inside = place.path / part
            directory = part in listing.names and place.only in ("", part) and self._directory(inside)
            if directory and (inits := self._files(inside, "__init__", "")):
                return inits, (Place(inside),)
            if modules := self._files(place.path, part, place.only):
                return modules, ()
            if directory:
                portions.append(Place(inside))
        return [], tuple(portions)

    def _files(self, directory: Path, stem: str, only: str) -> list[Path]:
        """Extension modules first, as Python does; the source beside them is for the other platforms."""
        listing = self._list(directory)
        names = [name for name in listing.extensions if name.partition(".")[0] == stem]
        if f"{stem}.py" in listing.names:
            names.append(f"{stem}.py")
        return [directory / name for name in names if only in ("", name) and os.path.isfile(directory / name)]


def _list(directory: Path) -> _Listing:
    try:
        names = frozenset(os.listdir(directory))
    except OSError:
        names = frozenset()  # The import system passes over it as well.
    return _Listing(names, tuple(sorted(name for name in names if name.endswith(".so"))))


def _is_directory(path: Path) -> bool:
    return os.path.isdir(path) and not excluded_directory(path)


def compiled_in(name: str) -> bool:
    """Whether a module is part of the interpreter, so that no file on the search path can take its place."""
    return (
        name in sys.builtin_module_names
        or name in ("encodings", "__main__")  # They are there before there is a search path.
        or importlib.machinery.FrozenImporter.find_spec(name) is not None
    )


def installed_module(name: str, without: Sequence[Path]) -> bool:
    """Whether this environment, `without` these directories, has a module or package `name` that is no namespace."""
    if name in sys.stdlib_module_names:
        return True
    hidden = {os.path.realpath(path) for path in without}
    paths = [path for path in sys.path if os.path.realpath(path or ".") not in hidden]
    spec = importlib.machinery.PathFinder.find_spec(name, paths)
    return spec is not None and spec.origin is not None
