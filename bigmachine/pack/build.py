"""Packing, from start to end: what the command line and a program that packs itself both call."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.specifiers import SpecifierSet

from ..cache import Cache
from ..errors import PackError
from ..info import VERSION, python_version
from . import assemble
from .archive import Contents
from .builders import Builder
from .builders.choose import BUILDERS, find_builder
from .closure import worker_names
from .image import Manifest, Part
from .lines import without_login
from .measure import code_part, wheel_part
from .platforms import Platform, load, this_platform
from .progress import Progress
from .requirements import Wanted, find_requirements
from .resolve import resolve
from .source import Source, find_source
from .wheels import Wheel, module_wheel, shipped_wheel

__all__ = ["BUILDERS", "Request", "Result", "pack"]

WORKERS = "linux/amd64"
"""What machines elsewhere mostly are: packed for besides this platform where nobody says otherwise."""


@dataclass(frozen=True)
class Request:
    """What is to be packed. `platforms` empty: this one and `WORKERS`, or what the builder can; `python` empty: this one's
    version; `output` None: in the current directory, under the program's name. `installed`: the versions
    that are installed here, as they are what the running driver has."""

    target: Path
    platforms: tuple[str, ...] = ()
    python: str = ""
    builder: str = "pex"
    output: Path | None = None
    requirements: tuple[Path, ...] = ()
    project: Path | None = None
    add: tuple[Path, ...] = ()
    refresh: bool = False
    installed: bool = False


@dataclass(frozen=True)
class Result:
    """A packed file of `size` bytes, after `seconds`. `reused` says what of it was in the cache: ``"dependencies"`` or
    nothing; `notes` are for the user, a line each."""

    path: Path
    size: int
    contents: Contents
    seconds: float
    notes: tuple[str, ...]
    reused: str


def pack(request: Request, cache: Cache, progress: Progress) -> Result:
    """Pack a program. Raises `PackError`, of which `ResolveError` says that its requirements cannot be met; `CacheError`;
    OSError."""
    begun = time.monotonic()
    with cache.use():
        builder = find_builder(request.builder)
        platforms = _platforms(request, builder)
        progress.step(f"reading {request.target.absolute().name}")
        source = find_source(request.target, request.add, _roots(request.project))
        output = _output(request, source, builder)
        wanted = find_requirements(
            request.target, source, files=request.requirements, project=request.project, installed=request.installed
        )
        _check_python(wanted, platforms[0].python)
        local = [shipped_wheel(cache), *(module_wheel(name, path, cache) for name, path in wanted.editable.items())]
        wheels = resolve(wanted, platforms, local, cache, progress, request.refresh)
        roots = {*wanted.roots, *(wheel.name for wheel in local[1:])}
        code = _read_code(source)
        own = code_part(code)
        manifests = [_manifest(platform, wheels[platform.name], roots, own, builder, cache) for platform in platforms]
        contents = _contents(source, wanted, builder, manifests)
        key = _base_key(builder, platforms, wheels)
        reused = "dependencies" if cache.get("bases", key) else ""
        base = cache.put("bases", key, lambda folder: _fill_base(folder, builder, platforms, wheels, cache, progress))
        progress.step(f"writing {output.name}")
        assemble.finish(base / "base", (base / "warm.sh").read_text(), code, contents, output)
    size = output.stat().st_size
    return Result(output, size, contents, time.monotonic() - begun, source.notes, reused)


def _platforms(request: Request, builder: Builder) -> list[Platform]:
    here = this_platform()
    names = list(dict.fromkeys(request.platforms or ((here, WORKERS) if builder.several else (here,))))
    if len(names) > 1 and not builder.several:
        raise PackError(
            f"{builder.name} packs for one platform at a time: {', '.join(names)}; choose one, or the builder pex"
        )
    return [load(name, request.python or python_version()) for name in names]


def _roots(project: Path | None) -> list[Path]:
    """Where a project's own packages lie, beside the script's directory."""
    if project is None:
        return []
    folder = project if project.is_dir() else project.parent
    return [path for path in (folder / "src", folder) if path.is_dir()]


def _output(request: Request, source: Source, builder: Builder) -> Path:
    output = request.output or Path(source.name + builder.suffix)
    if output.is_dir():
        raise PackError(f"cannot write {output}: it is a directory; name a file with -o")
    if output.exists() and not output.is_file():
        raise PackError(f"cannot write {output}: it is no regular file; name another with -o")
    if not output.absolute().parent.is_dir():
        raise PackError(f"cannot write {output}: there is no directory {output.parent}")
    if not os.access(output.absolute().parent, os.W_OK):
        raise PackError(f"cannot write {output}: its directory may not be written to; name another file with -o")
    if output.exists() and request.target.exists() and output.samefile(request.target):
        raise PackError(f"cannot write {output}: it is the program itself; name another file with -o")
    return output


def _check_python(wanted: Wanted, python: str) -> None:
    """Some patch release of it must do."""
    if wanted.python and not any(SpecifierSet(wanted.python).contains(f"{python}.{patch}") for patch in range(100)):
        raise PackError(f"{wanted.origin} wants Python {wanted.python}, not {python}: choose another with --python")


def _read_code(source: Source) -> Mapping[str, tuple[bytes, bool]]:
    """The program's own files, once: what is measured must be what is written, even if the user saves one meanwhile."""
    code = {}
    for name, path in source.files.items():
        try:
            with path.open("rb") as file:
                code[name] = file.read(), bool(os.fstat(file.fileno()).st_mode & stat.S_IXUSR)
        except OSError as error:
            raise PackError(f"cannot read {path}: {error.strerror or error}") from error
    return code


def _manifest(
    platform: Platform, wheels: Sequence[Wheel], roots: set[str], code: Part, builder: Builder, cache: Cache
) -> Manifest:
    needed = worker_names(wheels, roots, platform)
    parts = [replace(wheel_part(wheel, cache, wheel.name in needed), file=builder.place(wheel)) for wheel in wheels]
    return Manifest(platform.name, platform.python, (code, *parts))


def _contents(source: Source, wanted: Wanted, builder: Builder, manifests: Sequence[Manifest]) -> Contents:
    return Contents(
        name=source.name,
        entry=source.entry,
        python=manifests[0].python,
        version=VERSION,
        builder=builder.name,
        digest=_program_digest(source.entry, manifests),
        origin=wanted.origin,
        requirements=tuple(map(without_login, wanted.lines)),
        platforms=tuple(manifests),
    )


def _program_digest(entry: str, manifests: Sequence[Manifest]) -> str:
    """What driver and machines compare: equal where the same code runs with the same distributions."""
    parts = [
        (manifest.platform, part.name, part.version, part.digest, part.worker)
        for manifest in manifests
        for part in manifest.parts
    ]
    said = [entry, manifests[0].python, sorted(parts)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _base_key(builder: Builder, platforms: Sequence[Platform], wheels: Mapping[str, Sequence[Wheel]]) -> str:
    """A digest of all that goes into a base."""
    folder = Path(__file__).parent
    ours = [
        path.read_text("utf-8")
        for path in (folder / "prelude.py", folder / "assemble.py", *folder.glob("builders/*.py"))
    ]
    files = [(name, wheel.filename, wheel.sha256) for name, group in wheels.items() for wheel in group]
    said = [builder.name, builder.version(), sorted(ours), [platform.complete() for platform in platforms], files]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _fill_base(
    folder: Path,
    builder: Builder,
    platforms: Sequence[Platform],
    wheels: Mapping[str, Sequence[Wheel]],
    cache: Cache,
    progress: Progress,
) -> None:
    progress.step(f"building with {builder.name}")
    with cache.scratch() as scratch:
        built = builder.build(wheels, platforms, scratch, cache)
        assemble.make_base(built.archive, built.edits, folder / "base", platforms[0].python)
    (folder / "warm.sh").write_text(built.warm)
