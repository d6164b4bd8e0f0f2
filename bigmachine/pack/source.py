"""The user's own code: the script, and what it imports from beside it, transitively, with the data of its packages.

What is packed
--------------
- The entry, and every module that it imports from the search roots: the script's directory, what was added, then `roots`
  (as ``PYTHONPATH`` would). Modules are looked up as Python does it: what is compiled into the interpreter comes first,
  then the roots, then the standard library and what is installed; a directory without ``__init__.py`` comes last of all.
- A package whole, as soon as anything of it is imported: its data may be what it needs. Of a namespace directory, what is
  imported from it.
- What was added: below the script's directory at its place, from elsewhere at the top, under its own name.

``bigmachine`` is no part of it, wherever it lies: it comes from where it is installed.

How sure is an import?
----------------------
Files that are executed for certain (the entry, what it imports, a file that was added) must be right: a syntax error in
one of them is an error here. Other files of a package (its tests, templates, plug-ins) are read as well, and what is wrong
in them is a note. An import is *optional* if it stands only where its failure is expected (``except ImportError``, a
condition on version or operating system) or in such other files.
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import PackError
from .imports import Import, Parsed, does_something, find_imports, only_imports, parse
from .modules import Finder, Found, Place, compiled_in, installed_module
from .tree import Tree, excluded_directory, excluded_file


@dataclass(frozen=True)
class Source:
    """A program's own files, and what it imports from elsewhere.

    `entry` and the keys of `files` are posix paths in the tree; `files` is in their order. `imports`: top-level modules
    that are neither the program's, nor the standard library's, nor ``bigmachine``, each with where it is first imported
    (``app.py:3``); those that are only ever imported optionally are in `optional` too. `notes`: one line each.
    """

    name: str
    entry: str
    files: Mapping[str, Path]
    imports: Mapping[str, str]
    notes: tuple[str, ...]
    optional: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Entry:
    name: str
    root: Path
    path: Path
    inside: str
    package: Path | None = None


def find_source(target: Path, add: Sequence[Path] = (), roots: Sequence[Path] = ()) -> Source:
    """What the program `target` consists of: a script, or a directory with ``__main__.py``. Raises `PackError`.

    A directory that is a package is run as ``python -m`` would: its parent is the root. `add`: files and directories.
    """
    entry = _find_entry(target)
    added = [_place(path, entry.root) for path in add]
    elsewhere = [Place(path.parent, path.name) for name, path in added if name == path.name]
    others = [Place(Path(os.path.abspath(path))) for path in roots]
    walk = _Walk(entry, Finder([Place(entry.root), *elsewhere, *others]))
    if entry.package is not None:
        walk.tree.add_directory(entry.package.name, entry.package)
        walk.reach(f"{entry.package.name}/__init__.py", entry.package / "__init__.py")
    walk.tree.add_file(entry.inside, entry.path)
    walk.reach(entry.inside, entry.path)
    for name, path in added:
        if path.is_dir():
            walk.tree.add_directory(name, path)
            path, name = path / "__init__.py", f"{name}/__init__.py"
        else:
            walk.tree.add_file(name, path)
        if name.endswith(".py") and path.is_file():
            walk.reach(name, path)
    walk.run()
    files = walk.tree.finish()
    imports = dict(sorted(walk.imports.items()))
    notes = (*walk.notes, *walk.tree.notes)
    return Source(entry.name, entry.inside, files, imports, notes, frozenset(imports.keys() - walk.required))


def _find_entry(target: Path) -> _Entry:
    if target.is_dir():
        directory = Path(os.path.abspath(target))
        main = directory / "__main__.py"
        if not main.is_file():
            raise PackError(
                f"{target} is a directory without __main__.py: give the script to be run, or add __main__.py"
            )
        if (directory / "__init__.py").is_file():
            top = directory
            while (top.parent / "__init__.py").is_file():  # A package within a package.
                top = top.parent
            inside = main.relative_to(top.parent).as_posix()
            return _Entry(directory.name, top.parent, main, inside, top)
        return _Entry(directory.name, directory, main, "__main__.py")
    if not target.exists():
        raise PackError(f"no such file: {target}")
    if not target.is_file():
        raise PackError(f"neither a script nor a directory: {target}")
    if target.suffix == ".ipynb":
        raise PackError(f"{target} is a notebook: export it as a script first (jupyter nbconvert --to script)")
    try:
        packed = zipfile.is_zipfile(target)
    except OSError as error:
        raise PackError(f"cannot read {target}: {error.strerror or error}") from error
    if packed:
        raise PackError(f"{target} is packed already: run it")
    # As Python does: the script's directory is the one of the file that a link leads to.
    path = Path(os.path.realpath(target)) if target.is_symlink() else Path(os.path.abspath(target))
    given = Path(os.path.abspath(target))
    return _Entry(given.parent.name if given.stem == "__main__" else given.stem, path.parent, path, path.name)


def _place(path: Path, root: Path) -> tuple[str, Path]:
    """Where in the tree an added path goes, and the path made absolute."""
    if not path.exists():
        raise PackError(f"--add: no such file or directory: {path}")
    absolute = Path(os.path.abspath(path))
    if excluded_file(absolute.name) or (path.is_dir() and excluded_directory(absolute)):
        raise PackError(f"--add: {path} is never packed: version control, a cache, or a virtual environment")
    for candidate, base in ((absolute, root), (absolute.resolve(), root.resolve())):
        if candidate.is_relative_to(base):
            inside = candidate.relative_to(base).as_posix()
            return "" if inside == "." else inside, absolute
    return absolute.name, absolute


class _Walk:
    """Follows the imports from file to file: first of all that is executed for certain, then of what else is packed."""

    def __init__(self, entry: _Entry, finder: Finder) -> None:
        self.entry = entry
        self.finder = finder
        self.tree = Tree()
        self.imports: dict[str, str] = {}
        self.required: set[str] = set()
        self.notes: list[str] = []
        self._certain = True
        self._queue: deque[tuple[str, Path]] = deque()
        self._seen: set[str] = set()
        self._packages: set[str] = set()
        self._local: set[str] = set()
        self._bare: dict[str, str] = {}
        self._installed: dict[str, bool] = {}
        self._cwd = Path.cwd()

    def reach(self, name: str, path: Path) -> None:
        """The file `path`, `name` in the tree, is executed."""
        if name not in self._seen:
            self._seen.add(name)
            self._queue.append((name, path))

    def run(self) -> None:
        self._drain()
        self._certain = False
        while rest := sorted(name for name in self.tree.files.keys() - self._seen if name.endswith(".py")):
            for name in rest:
                self.reach(name, self.tree.files[name])
            self._drain()
        for name, where in self._bare.items():
            if name not in self._local:  # A directory that happens to have the name of something installed elsewhere.
                self._elsewhere(name, where, optional=True)

    def _drain(self) -> None:
        while self._queue:
            name, path = self._queue.popleft()
            shown = self._shown(name, path)
            try:
                parsed = parse(path, shown, whole=self._certain)
            except PackError as error:
                if self._certain:
                    raise
                self.notes.append(f"{error.reason}; it is packed as it is, since nothing imports it")
                continue
            package = name.split("/")[:-1]
            local = [self._follow(item, package, f"{shown}:{item.line}") for item in find_imports(parsed)]
            if name == self.entry.inside:
                _check_main(parsed, shown, any(local))

    def _shown(self, name: str, path: Path) -> str:
        return path.relative_to(self._cwd).as_posix() if path.is_relative_to(self._cwd) else name

    def _follow(self, item: Import, package: list[str], where: str) -> bool:
        """Whether the import leads to the program's own code, which is then packed."""
        optional = item.optional or not self._certain
        if item.computed:
            if not optional:
                self.notes.append(
                    f"{where} imports a module whose name is known at run time only: --add it, if it is yours"
                )
            return False
        parts = _absolute(item, package, where, optional)
        if not parts or (not item.level and (parts[0] == "bigmachine" or compiled_in(parts[0]))):
            return False
        found = self.finder.find(parts)
        if found is None or (found.namespace and not item.level and self._is_installed(parts[0])):
            return self._missing(item, parts, where, optional, None)
        below = [self.finder.find([*parts, name]) for name in item.names]
        whole = [one for one in below if one is not None and one.depth > len(parts)]
        for one in (found, *whole):
            self._pack(one, parts[0])
        if found.depth < len(parts) or (not found.files and item.names and not whole):
            return self._missing(item, parts, where, optional, found)
        if not found.files and not item.names:
            self._bare.setdefault(parts[0], where)
        return True

    def _missing(self, item: Import, parts: list[str], where: str, optional: bool, found: Found | None) -> bool:
        if not item.level and (found is None or not found.files):
            self._elsewhere(parts[0], where, optional)
            return False
        if not optional:
            self.notes.append(f"{where} imports {'.'.join(parts)}, which is not there")
        return found is not None

    def _elsewhere(self, name: str, where: str, optional: bool) -> None:
        if name in sys.stdlib_module_names:
            return
        if not optional and name not in self.required:
            self.required.add(name)
            self.imports[name] = where  # This one must succeed: of more use than an earlier one that need not.
        self.imports.setdefault(name, where)

    def _is_installed(self, name: str) -> bool:
        if name not in self._installed:
            self._installed[name] = installed_module(name, [place.path for place in self.finder.places])
        return self._installed[name]

    def _pack(self, found: Found, top: str) -> None:
        if found.package is not None and found.package[0] not in self._packages:
            self._packages.add(found.package[0])
            self.tree.add_directory(*found.package)
        if found.files:
            self._local.add(top)
        for name, path in found.files.items():
            self.tree.add_file(name, path)
            if name.endswith(".py"):
                self.reach(name, path)


def _absolute(item: Import, package: list[str], where: str, optional: bool) -> list[str]:
    """The dotted name as parts; empty where a relative import leads nowhere. Raises `PackError` where that is certain."""
    names = item.module.split(".") if item.module else []
    if not item.level:
        return names
    if item.level > len(package):
        if optional:
            return []
        shown = "." * item.level + item.module
        raise PackError(
            f"{where}: relative import beyond the top of the program: {shown}; pack the package's directory instead"
        )
    return [*package[: len(package) - item.level + 1], *names]


def _check_main(parsed: Parsed, shown: str, imports_own: bool) -> None:
    if does_something(parsed.tree) or (only_imports(parsed.tree) and imports_own):
        return
    raise PackError(
        f"{shown} has no __main__ code: it only defines, and would run and do nothing; "
        'add: if __name__ == "__main__": main()'
    )
