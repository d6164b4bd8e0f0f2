"""What a program asks for: requirements as somebody wrote them down, each with where."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from ..errors import PackError
from ..info import VERSION

REPOSITORIES = ("git+", "hg+", "svn+", "bzr+")
"""How the address of a version control system begins."""

PATHS = (".", "/", "~", "file:")
"""How a path on this disk begins."""


@dataclass(frozen=True)
class Line:
    """One requirement; `hashes` as a requirements file gives them (``--hash=sha256:…``), `where` for errors."""

    requirement: Requirement
    where: str
    hashes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Canonical."""
        return canonicalize_name(self.requirement.name)

    @property
    def text(self) -> str:
        return " ".join([str(self.requirement), *self.hashes])

    @property
    def root(self) -> str:
        """The canonical name with the extras that are asked for."""
        extras = ",".join(sorted(self.requirement.extras))
        return f"{self.name}[{extras}]" if extras else self.name

    def applies(self) -> bool:
        """Whether it is a requirement at all in this environment."""
        return self.requirement.marker is None or self.requirement.marker.evaluate()


@dataclass(frozen=True)
class Asked:
    """What was written down in one place (`origin`). The fields are as in `requirements.Wanted`."""

    lines: tuple[Line, ...]
    origin: str
    constraints: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    lock: Path | None = None
    python: str | None = None


def parse_requirement(text: str, where: str) -> Requirement:
    """Raises `PackError` where it is invalid, or stands for something that is no wheel."""
    text = text.strip()
    if text.startswith(REPOSITORIES):
        raise _no_wheel(where, "a repository", text)
    archive = text.endswith((".whl", ".zip", ".tar.gz")) and "@" not in text
    if text.startswith(PATHS) or (archive and "://" not in text):
        raise _no_wheel(where, "a local path", text)
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        reason = str(error).splitlines()[0]
        raise PackError(f"{where}: invalid requirement: {text}: {reason}") from None
    if requirement.url is not None:
        _check_url(requirement.url, text, where)
    return requirement


def _check_url(url: str, text: str, where: str) -> None:
    address = urlsplit(url)
    if address.scheme.startswith(REPOSITORIES):
        raise _no_wheel(where, "a repository", text)
    if address.scheme not in ("http", "https"):
        raise _no_wheel(where, "a local path", text)
    if not address.path.endswith(".whl"):
        raise _no_wheel(where, "a source archive", text)


def _no_wheel(where: str, what: str, text: str) -> PackError:
    return PackError(
        f"{where}: wheels only, and this is {what}: {text}; build a wheel of it (pip wheel), "
        "and name it in a requirements file that has --find-links with the wheel's directory"
    )


def parse_specifier(text: str, where: str) -> str | None:
    """A requires-python, None where it allows everything. Raises `PackError`."""
    try:
        return str(SpecifierSet(text)) or None
    except InvalidSpecifier:
        raise PackError(f"{where}: requires-python is no version specifier: {text}") from None


def parse_list(value: object, key: str, where: str) -> list[str]:
    """A TOML array of strings. Raises `PackError` where it is something else."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise PackError(f"{where}: {key} must be an array of strings, not: {value!r}")
    return value


def without_ourselves(lines: Iterable[Line]) -> list[Line]:
    """The lines but for ``bigmachine``, which comes from where it is installed.

    Raises `PackError` where that is another version than a line asks for.
    """
    kept = []
    for line in lines:
        if line.name != "bigmachine":
            kept.append(line)
        elif line.applies() and not line.requirement.specifier.contains(VERSION, prereleases=True):
            raise PackError(
                f"{line.where}: the program asks for {line.requirement}, and this is bigmachine {VERSION}: "
                "change the requirement, or install the version that it asks for"
            )
    return kept
