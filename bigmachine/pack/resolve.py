"""From requirements to wheels: one per distribution and platform, of the same version on every platform.

How
---
1. What was resolved before is in the cache, under a digest of everything that decides the result: the requirements, what
   pip is configured to, the platforms, the versions of the tools. New releases on an index are not in that digest: an
   entry is like a lock, until `resolve` is told to refresh it.
2. Else pex's resolver (it drives a pip of its own) runs once for each platform, all of them at the same time. Wheels that
   are ours (`local`) are excluded there, so that no index can serve others in their place; what they require is asked for.
3. Where a distribution's versions differ, the platforms with the newer ones are resolved again, bound to the older.
4. Where a run fails, its report is condensed to a line. pip says "no matching distribution" of everything that it does not
   find; what there would be instead is asked of the indexes, by their simple API.

A lock is resolved first, exactly as it is; what bigmachine needs beyond is resolved bound to the versions in it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cache import Cache
from ..errors import ResolveError
from .lines import path_of, requirement_of
from .pipconfig import pip_settings
from .platforms import Platform
from .progress import Progress
from .wheels import Wheel, file_digest, stored_wheel

if TYPE_CHECKING:
    from .requirements import Wanted

FORMAT = 1
"""Of the entries in the cache; it is part of their keys."""


def resolve(
    wanted: Wanted,
    platforms: Sequence[Platform],
    local: Sequence[Wheel],
    cache: Cache,
    progress: Progress,
    refresh: bool = False,
) -> dict[str, tuple[Wheel, ...]]:
    """By the platform's name: a wheel for everything that `wanted` and the `local` wheels require, and the `local` ones;
    sorted by name.

    Raises `ResolveError` where that cannot be, with the resolver's own report as details.
    """
    settings = pip_settings(wanted.options, os.environ)
    key = _key(wanted, platforms, local, settings)
    found = None if refresh else _load(key, platforms, cache)
    if found is None:
        from .index import Index  # And http: not for what was resolved before.
        from .resolver import Resolver

        names = ", ".join(platform.name for platform in platforms)
        progress.step(f"resolving for {names}")
        index = Index(settings)
        index.reach(progress)
        with cache.scratch() as scratch:
            resolver = Resolver(wanted, local, cache, index, scratch)
            found = resolver.resolve(platforms)
        _save(key, found, cache)
    return {name: tuple(sorted([*wheels, *local], key=lambda wheel: wheel.name)) for name, wheels in found.items()}


def _key(wanted: Wanted, platforms: Sequence[Platform], local: Sequence[Wheel], settings: Mapping[str, str]) -> str:
    inputs = [
        FORMAT,
        importlib.metadata.version("pex"),
        wanted.lines,
        wanted.constraints,
        [file_digest(path) for path in _files_named(wanted.lines)],
        wanted.lock and file_digest(wanted.lock),
        [(platform.name, platform.complete()) for platform in platforms],
        [(wheel.name, wheel.version, wheel.requires) for wheel in local],
        dict(settings),
    ]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _files_named(lines: Iterable[str]) -> Iterator[Path]:
    """The files that requirements name by ``file://`` addresses: their content decides, too."""
    for line in lines:
        url = requirement_of(line).url or ""
        if url.startswith("file:"):
            path = path_of(url)
            if not path.is_file():
                raise ResolveError(f"no such file: {path}, which is required by its address: {line}")
            yield path


def _load(key: str, platforms: Sequence[Platform], cache: Cache) -> dict[str, list[Wheel]] | None:
    """What was resolved, where all of it is still in the cache."""
    folder = cache.get("resolved", key)
    if folder is None:
        return None
    try:
        entry: dict[str, list[dict[str, Any]]] = json.loads((folder / "wheels.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None  # Damaged: it is made again.
    found: dict[str, list[Wheel]] = {}
    for platform in platforms:
        wheels = found[platform.name] = []
        for values in entry[platform.name]:
            path = stored_wheel(values["sha256"], values["filename"], cache)
            if path is None:
                return None
            wheels.append(Wheel(**{**values, "path": path, "requires": tuple(values["requires"])}))
    return found


def _save(key: str, found: Mapping[str, Sequence[Wheel]], cache: Cache) -> None:
    def fill(folder: Path) -> None:
        entry = {name: [{**asdict(wheel), "path": None} for wheel in wheels] for name, wheels in found.items()}
        (folder / "wheels.json").write_text(json.dumps(entry, indent=1), "utf-8")

    # An entry stays once it is there, and this one is newer. Whoever reads in between resolves for himself.
    shutil.rmtree(cache.path("resolved", key), ignore_errors=True)
    cache.put("resolved", key, fill)
