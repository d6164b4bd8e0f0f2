"""What is installed in this environment: which distribution a module comes from, and what that requires in turn."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from importlib.metadata import Distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ..errors import PackError
from .tree import excluded_directory


class Installed:
    """The distributions on this process's search path. Names are canonical; of two with one name, the first counts."""

    def __init__(self) -> None:
        self._known: dict[str, Distribution | None] = {}

    @cached_property
    def _distributions(self) -> dict[str, Distribution]:
        found: dict[str, Distribution] = {}
        for distribution in importlib.metadata.distributions():
            name = _field(distribution, "Name")
            if name:  # Else what an interrupted installation has left.
                found.setdefault(canonicalize_name(name), distribution)
        return found

    def _get(self, name: str) -> Distribution | None:
        if name not in self._known:
            try:
                self._known[name] = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                self._known[name] = None
        return self._known[name]

    def version(self, name: str) -> str | None:
        """Of the distribution with this canonical name; None where it is not installed."""
        found = self._get(name)
        return _field(found, "Version") if found is not None else None

    def requires(self, name: str, extras: Collection[str] = ()) -> list[Requirement]:
        """What a distribution with these extras requires here. One that an extra has brought comes without its marker."""
        found = self._get(name)
        lines = _fields(found, "Requires-Dist") or found.requires or () if found is not None else ()
        wanted: list[Requirement] = []
        environment = {key: str(value) for key, value in default_environment().items()}
        for text in lines:
            try:
                requirement = Requirement(text)
            except InvalidRequirement:
                continue  # Written before there were rules: pip passes over it, too.
            marker = requirement.marker
            if marker is None or marker.evaluate({**environment, "extra": ""}):
                wanted.append(requirement)
            elif any(marker.evaluate({**environment, "extra": extra}) for extra in extras):
                requirement.marker = None
                wanted.append(requirement)
        return wanted

    def closure(self, requirements: Iterable[Requirement]) -> dict[str, str]:
        """Versions of what is required, directly or not, as far as it is installed. Sorted by name."""
        versions: dict[str, str] = {}
        waiting = [item for item in requirements if item.marker is None or item.marker.evaluate()]
        seen: set[tuple[str, frozenset[str]]] = set()
        while waiting:
            requirement = waiting.pop()
            name = canonicalize_name(requirement.name)
            key = (name, frozenset(requirement.extras))
            version = self.version(name)
            if version is not None and key not in seen:
                seen.add(key)
                versions[name] = version
                waiting += self.requires(name, requirement.extras)
        return dict(sorted(versions.items()))

    # -- Modules ---------------------------------------------------------------------------------------------------------

    def providers(self, modules: Iterable[str]) -> dict[str, list[str]]:
        """For each top-level module all distributions that it comes from: of a namespace, there may be many."""
        # Its own reading instead of `packages_distributions`: that makes a path of every file of every distribution.
        wanted = list(modules)
        found: dict[str, list[str]] = {module: [] for module in wanted}
        for name, distribution in self._distributions.items() if wanted else ():
            if name == "bigmachine":
                continue  # Beside a checkout of it may lie what is not packed with it.
            record = distribution.read_text("RECORD")
            if record is None:  # Not from a wheel.
                record = "".join(f"{file.as_posix()},\n" for file in distribution.files or ())
            declared = (distribution.read_text("top_level.txt") or "").split()
            folders = _path_entries(distribution) if self.editable(name) else []
            for module in wanted:
                if (
                    _records(record, module)
                    or module in declared
                    or any(_module_in(folder, module) for folder in folders)
                ):
                    found[module].append(name)
        return found

    def editable(self, name: str) -> Path | None:
        """The directory of the project that a distribution is installed from in editable form; else None."""
        found = self._get(name)
        text = found.read_text("direct_url.json") if found is not None else None
        try:
            table = json.loads(text or "{}")
            if table.get("dir_info", {}).get("editable") is not True:
                return None
            return Path(unquote(urlsplit(table["url"]).path))
        except (ValueError, KeyError, AttributeError):
            return None  # Not as the standard has it: no editable install that we know of.

    def origin(self, name: str) -> str:
        """Where it was installed from, if an index has something else under its name, or nothing: a repository, or what
        still lies here. Else empty: conda's distributions name directories of the computers that have built them."""
        found = self._get(name)
        try:
            table = json.loads((found and found.read_text("direct_url.json")) or "{}")
            url = str(table.get("url", ""))
            local = url.startswith("file:") and Path(unquote(urlsplit(url).path)).exists()
        except (ValueError, AttributeError):
            return ""
        return url if local or "vcs_info" in table else ""

    def editables(self) -> list[str]:
        """The names of all editable installs but our own."""
        return sorted(name for name in self._distributions if name != "bigmachine" and self.editable(name))

    def code(self, name: str, imported: Collection[str]) -> dict[str, Path]:
        """Of an editable install: its top-level modules, each with its package directory or file. Those in `imported` are
        looked for where the distribution does not say what it consists of. Raises `PackError` where none is found.
        """
        distribution, project = self._get(name), self.editable(name)
        assert distribution is not None, name
        assert project is not None, name
        folders = _path_entries(distribution)
        modules = {*(distribution.read_text("top_level.txt") or "").split()}
        own = {*imported, name.replace("-", "_")}
        if not modules:
            for folder in folders:
                flat = any((folder / file).is_file() for file in ("pyproject.toml", "setup.py"))
                # Beside the project's own files, not all that can be imported belongs to it: tests, tools.
                modules |= {module for module in _modules(folder) if not flat or module in own}
        found: dict[str, Path] = {}
        for module in sorted(modules | own):
            place = next((path for folder in folders if (path := _module_in(folder, module))), None)
            place = place or _find(module, project)
            if place is not None and not (place.is_dir() and excluded_directory(place)):
                found[module] = place
        if not found:
            raise PackError(
                f"{name} is installed in editable form from {project}, and its code is not found: install it anew"
            )
        return found


def _fields(distribution: Distribution, key: str) -> list[str]:
    """The values of a metadata field. Parsing all of it costs more than reading it, and most of it is a README."""
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    return re.findall(rf"(?m)^{key}: *(\S.*?)\s*$", text.partition("\n\n")[0])


def _field(distribution: Distribution, key: str) -> str | None:
    return next(iter(_fields(distribution, key)), None)


def _path_entries(distribution: Distribution) -> list[Path]:
    """The directories that an editable install puts on the search path, by a ``.pth`` file."""
    folders = []
    for file in distribution.files or ():
        if file.suffix == ".pth":
            try:
                lines = Path(str(distribution.locate_file(file))).read_text("utf-8").splitlines()
            except (OSError, UnicodeDecodeError):
                continue  # As `site` does.
            folders += [Path(line) for line in lines if os.path.isabs(line) and os.path.isdir(line)]
    return folders


def _records(record: str, module: str) -> bool:
    """Whether a RECORD has code that is imported as `module`."""
    if f"{module}/" not in record and f"{module}." not in record:
        return False
    return re.search(rf'(?m)^"?{re.escape(module)}(/[^\n]*|(\.[^/,\n]+)?)\.(py|so)"?,', record) is not None


def _modules(folder: Path) -> Iterator[str]:
    for path in sorted(folder.iterdir()):
        if (path / "__init__.py").is_file() and not excluded_directory(path):
            yield path.name
        elif path.suffix == ".py" and path.stem.isidentifier() and path.is_file():
            yield path.stem


def _module_in(folder: Path, module: str) -> Path | None:
    for path in (folder / module, folder / f"{module}.py"):
        if (path / "__init__.py").is_file() or (path.suffix == ".py" and path.is_file()):
            return path
    # A namespace package: some code below.
    return folder / module if any((folder / module).glob("*/__init__.py")) else None


def find_module(module: str) -> Path | None:
    """Where Python finds a top-level module: its package directory or its file. Imports nothing."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None  # What is in sys.modules under this name was not imported, or a finder is broken.
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin and os.path.isfile(spec.origin) else None


def _find(module: str, project: Path) -> Path | None:
    path = find_module(module)
    return path if path is not None and path.resolve().is_relative_to(project.resolve()) else None
