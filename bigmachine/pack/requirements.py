"""Which distributions a program needs, and who says so.

The first of these that there is decides:

1. a PEP 723 block in the script. It is part of the program: ``-r`` or ``--project`` beside it is an error;
2. requirements files (``-r FILE``), or a project (``--project DIR``), but not both;
3. what is installed here: the distributions that the program's imports come from, in the versions that they have here.

``bigmachine`` is never among them: it comes from where it is installed, and a program that asks for another version of it
is refused. An *editable* install is on no index: where the program needs one, its code is named in `Wanted.editable`, and
what it requires takes its place.

What the program imports is checked only where what is installed decides: with explicit requirements nobody can know which
distribution a module's name will come from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ..errors import PackError
from .asked import Asked, Line, without_ourselves
from .block import read_block
from .imports import read_text
from .installed import Installed, find_module
from .lines import without_login
from .project import locked_versions, read_project
from .reqfile import read_files
from .source import Source
from .wheels import shipped_requirements

HERE = "what is installed here"


@dataclass(frozen=True)
class Wanted:
    """What is to be resolved.

    `lines`: requirements (PEP 508, with ``--hash=…`` where a file had hashes), without ``bigmachine``. `constraints`: the
    lines of constraints files, and ``name==version`` of what must be as it is here. `options`: what a requirements file
    says about indexes, as pip takes it. `lock`: a ``pylock.toml`` that stands in the place of `lines`. `roots`: canonical
    names, with extras (``uvicorn[standard]``), of what the program asks for itself. `editable`: top-level modules of
    editable installs, each with its package directory or file. `origin` says who decided, `python` is a requires-python.
    """

    lines: tuple[str, ...]
    constraints: tuple[str, ...]
    options: tuple[str, ...]
    lock: Path | None
    roots: tuple[str, ...]
    editable: Mapping[str, Path]
    origin: str
    python: str | None


def find_requirements(
    script: Path, source: Source, *, files: Sequence[Path] = (), project: Path | None = None, installed: bool = False
) -> Wanted:
    """What the program `source`, started as `script`, needs. Raises `PackError`.

    `installed`: for a program that packs itself while it runs. Whoever decides what is needed, the versions must be those
    that are installed here, and what is not installed is an error.
    """
    here = Installed()
    asked = _asked(script, source, files, project)
    pinned = installed
    if asked is None:
        pinned = True
        asked = _from_imports(source, here)
    elif installed:
        _check_installed(asked, here)
    lines = without_ourselves(asked.lines)
    lines, editable, names = _replace_editables(lines, source, here, pinned)
    constraints = list(asked.constraints)
    if pinned:
        constraints += _as_installed(here, lines, {"bigmachine", *names}, "==" if installed else "<=")
    return Wanted(
        lines=() if asked.lock is not None else tuple(dict.fromkeys(line.text for line in lines)),
        constraints=tuple(dict.fromkeys(constraints)),
        options=asked.options,
        lock=asked.lock,
        roots=tuple(dict.fromkeys([*names, *(line.root for line in lines)])),
        editable=editable,
        origin=asked.origin,
        python=asked.python,
    )


def _as_installed(here: Installed, lines: Sequence[Line], left_out: Collection[str], ours: str) -> list[str]:
    """Constraints to the versions that are installed here. What is there for bigmachine alone is bound by `ours`: where no
    driver is running yet, an older version will do, as a platform may have no newer one."""
    required = [Requirement(text) for text in shipped_requirements(map(str, here.requires("bigmachine")))]
    theirs = here.closure([line.requirement for line in lines])
    both = {**here.closure(required), **theirs}
    return [
        f"{name}{'==' if name in theirs else ours}{version}"
        for name, version in sorted(both.items())
        if name not in left_out
    ]


def _asked(script: Path, source: Source, files: Sequence[Path], project: Path | None) -> Asked | None:
    """What was written down; None where nothing was."""
    entry = source.files[source.entry]
    shown = script.name if script.is_file() else source.entry
    block = read_block(read_text(entry, shown), shown)
    given = [option for option, value in (("-r", files), ("--project", project)) if value]
    if len(given) > 1:
        raise PackError("-r and --project both say what the program needs: give one of them")
    if block is not None and given:
        raise PackError(
            f"{shown} says itself what it needs, in a block (PEP 723): leave {given[0]} out, or remove the block"
        )
    if block is not None:
        return block
    if files:
        return read_files(files)
    return read_project(project) if project is not None else None


def _from_imports(source: Source, here: Installed) -> Asked:
    """The distributions that the program's imports come from. Raises `PackError` for one that is nowhere."""
    lines: dict[str, Line] = {}
    for module, names in here.providers(source.imports).items():
        where = source.imports[module]
        if not names and module not in source.optional:
            raise _unknown(module, where)
        for name in names:
            if (origin := here.origin(name)) and here.editable(name) is None and name != "bigmachine":
                raise PackError(
                    f"{where} imports {module}, of {name} {here.version(name)}, which was installed from "
                    f"{without_login(origin)}: no index has that; build a wheel of it (pip wheel), and give a requirements "
                    "file with --find-links FOLDER"
                )
            lines.setdefault(name, Line(Requirement(f"{name}=={here.version(name)}"), where))
    return Asked(tuple(line for _, line in sorted(lines.items())), HERE)


def _unknown(module: str, where: str) -> PackError:
    path = find_module(module)
    if path is not None:
        return PackError(
            f"{where} imports {module}, which is {path} and belongs to no installed distribution: --add it"
        )
    return PackError(
        f"{where} imports {module}, which is neither installed here nor beside the script: install it, or --add it"
    )


def _check_installed(asked: Asked, here: Installed) -> None:
    """Raises `PackError` naming all that is not installed here as it is asked for."""
    wrong = [text for line in asked.lines if line.applies() and (text := _mismatch(line.requirement, here))]
    if asked.lock is not None:
        wrong = []
        for name, version in locked_versions(asked.lock).items():
            found = here.version(name)
            # One that is locked and not here may be for another platform.
            if found is not None and version and found != version and name != "bigmachine":
                wrong.append(f"{name}=={version}, and {found} is installed here")
    if wrong:
        raise PackError(f"{asked.origin} asks for {'; for '.join(wrong)}: install it, or run a packed program")


def _mismatch(requirement: Requirement, here: Installed) -> str:
    """What is wrong with what is installed here; empty where it is what `requirement` asks for."""
    name = canonicalize_name(requirement.name)
    shown = str(requirement).partition(";")[0].strip()
    if name == "bigmachine":
        return ""  # It is running; `without_ourselves` compares versions.
    version = here.version(name)
    if version is None:
        return f"{shown}, which is not installed here"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{shown}, and {version} is installed here"
    return ""


def _replace_editables(
    lines: Iterable[Line], source: Source, here: Installed, pinned: bool
) -> tuple[list[Line], dict[str, Path], list[str]]:
    """Each editable install by what it requires: the lines that are left, the code of the editable installs, their names."""
    editables = frozenset(here.editables())
    kept: list[Line] = []
    code: dict[str, Path] = {}
    names: list[str] = []
    seen: set[str] = set()
    waiting = list(lines)
    if editables and source.imports:
        known = {name for found in here.providers(source.imports).values() for name in found} & editables
        waiting += [Line(Requirement(name), "") for name in sorted(known - {line.name for line in waiting})]
    while waiting:
        line = waiting.pop(0)
        if line.name not in editables or not line.applies() or _mismatch(line.requirement, here):
            kept.append(line)
            continue
        if line.root in seen:
            continue  # Two that require each other, or a requirement that is made twice.
        seen.add(line.root)
        if line.name not in names:
            names.append(line.name)
            code |= here.code(line.name, source.imports)
        where = f"{line.name}, which is installed in editable form"
        required = [Line(item, where) for item in here.requires(line.name, line.requirement.extras)]
        waiting += without_ourselves(_pin(item, here) if pinned else item for item in required)
    return kept, code, names


def _pin(line: Line, here: Installed) -> Line:
    """The version that is installed here, where one is."""
    version = here.version(line.name)
    return line if version is None else Line(Requirement(f"{line.root}=={version}"), line.where)
