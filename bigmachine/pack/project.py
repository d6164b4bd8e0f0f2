"""What a project asks for: its ``pylock.toml`` (PEP 751), else ``[project] dependencies`` in its ``pyproject.toml``."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ..errors import PackError
from ..info import VERSION
from .asked import Asked, Line, parse_list, parse_requirement, parse_specifier


def read_project(path: Path) -> Asked:
    """Of a project's directory, or of either file. With a lock, `lines` are what the project asks for directly, as far as
    that is known: the dependencies in the ``pyproject.toml`` beside it, else all that is locked.

    Raises `PackError`.
    """
    if path.is_dir():
        lock, project = path / "pylock.toml", path / "pyproject.toml"
        if lock.is_file():
            return _read_lock(lock)
        if project.is_file():
            return _read_pyproject(project)
        raise PackError(f"--project: neither pylock.toml nor pyproject.toml in {path}")
    if not path.exists():
        raise PackError(f"--project: no such file or directory: {path}")
    if path.name.startswith("pylock.") and path.suffix == ".toml":
        return _read_lock(path)
    if path.name == "pyproject.toml":
        return _read_pyproject(path)
    raise PackError(f"--project: neither a directory, nor a pyproject.toml, nor a pylock.toml: {path}")


def _read_pyproject(path: Path) -> Asked:
    table = _load(path).get("project")
    if not isinstance(table, dict):
        raise PackError(f"{path} has no [project] table: give the requirements with -r FILE")
    if "dependencies" in parse_list(table.get("dynamic", []), "dynamic", str(path)):
        raise PackError(
            f"{path}: the dependencies are dynamic: only building the project tells them; give them with -r FILE"
        )
    requirements = parse_list(table.get("dependencies", []), "dependencies", str(path))
    return Asked(
        lines=tuple(Line(parse_requirement(item, str(path)), str(path)) for item in requirements),
        origin=path.name,
        python=_python(table, path),
    )


def _read_lock(path: Path) -> Asked:
    table = _load(path)
    version = table.get("lock-version")
    if not isinstance(version, str) or not version.startswith("1."):
        raise PackError(
            f"{path}: lock-version is not 1.x: {version!r}; lock again, or give the requirements with -r FILE"
        )
    locked = locked_versions(path)
    if locked.get("bigmachine", VERSION) != VERSION:
        raise PackError(
            f"{path}: the lock has bigmachine {locked['bigmachine']}, and this is bigmachine {VERSION}: "
            "lock again, or install that version"
        )
    # All of it is the program's: what is locked may be there for an extra or a group that pyproject.toml does not show.
    lines = tuple(Line(Requirement(name), str(path)) for name in locked)
    return Asked(lines=lines, origin=path.name, lock=path, python=_python(table, path))


def locked_versions(path: Path) -> dict[str, str]:
    """The packages in a lock by canonical name; without a version (a directory, a repository): ``""``. Raises `PackError`."""
    packages = _load(path).get("packages", [])
    versions: dict[str, str] = {}
    for package in packages if isinstance(packages, list) else [packages]:
        try:
            name = Requirement(package["name"]).name
        except (InvalidRequirement, TypeError, KeyError):
            raise PackError(f"{path}: packages is no array of tables with names: lock again") from None
        versions[canonicalize_name(name)] = str(package.get("version", ""))
    return versions


def _python(table: dict[str, Any], path: Path) -> str | None:
    python = table.get("requires-python", "")
    if not isinstance(python, str):
        raise PackError(f"{path}: requires-python must be a string, not: {python!r}")
    return parse_specifier(python, str(path))


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise PackError(f"{path} is no TOML: {error}") from None
    except UnicodeDecodeError:
        raise PackError(f"{path} is not UTF-8: TOML must be") from None
    except OSError as error:
        raise PackError(f"cannot read {path}: {error.strerror or error}") from error
