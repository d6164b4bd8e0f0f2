"""Resolving: pex's resolver, once for each platform, until all of them have the same versions (`resolve` says how)."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from ..cache import Cache
from ..errors import PackError, ResolveError
from .explain import explain
from .index import Index
from .lines import has_hash, holds, requirement_of, split_hashes
from .platforms import Platform
from .wheels import Wheel, store_wheel

if TYPE_CHECKING:
    from .requirements import Wanted

NETWORK = ("--retries", "1", "--timeout", "10")
"""pip's patience. Its own (5 times, 15 s) would make whoever has no network wait for minutes."""

ROUNDS = 5
"""How often platforms are resolved again until they agree. A round binds at least one more distribution."""

LIMIT = 300.0
"""Seconds for one round, downloads and all: without wheels for something that is required, pip may never come to an end."""

GRACE = 2.0
"""Seconds that an interrupted resolver has to remove what it has begun."""


class _Failed(Exception):
    """The resolver's run for `platform` failed and said `report`."""

    def __init__(self, platform: Platform, report: str) -> None:
        super().__init__(platform.name, report)
        self.platform = platform
        self.report = report


@dataclass(frozen=True)
class _Run:
    """One run of the resolver: what is asked of it. With a lock, of no index."""

    platform: Platform
    lines: Sequence[str]
    constraints: Sequence[str]
    lock: Path | None = None


class Resolver:
    """Resolves what is `wanted` and what `local` wheels require, without what is in the cache. `scratch` is a directory
    for files."""

    def __init__(self, wanted: Wanted, local: Sequence[Wheel], cache: Cache, index: Index, scratch: Path) -> None:
        self._wanted = wanted
        self._local = {wheel.name: wheel for wheel in local}
        self._cache = cache
        self._index = index
        self._scratch = scratch
        self._hashes = dict(split_hashes(line) for line in wanted.lines)
        self._lines = [line for line in self._hashes if not self._is_local(requirement_of(line))]

    def resolve(self, platforms: Sequence[Platform]) -> dict[str, list[Wheel]]:
        locked = self._locked(platforms)
        if differing := _differing(locked):
            raise _disagreement(differing, f"in {self._wanted.lock}; lock again for all of them")
        pins = {name: wheel.version for wheels in locked.values() for name, wheel in wheels.items()}
        found = self._agree(platforms, pins)
        for name, wheels in locked.items():
            found[name] |= wheels
        for platform in platforms:
            self._check(platform, found[platform.name])
        return {platform.name: list(found[platform.name].values()) for platform in platforms}

    def _locked(self, platforms: Sequence[Platform]) -> dict[str, dict[str, Wheel]]:
        """What the lock has, where there is one."""
        if self._wanted.lock is None:
            return {}
        try:
            return self._run_all([_Run(platform, (), (), self._wanted.lock) for platform in platforms])
        except _Failed as failure:
            raise self._explained(failure) from None

    def _explained(self, failure: _Failed) -> ResolveError:
        return explain(failure.report, failure.platform, self._wanted, self._local, self._index)

    def _agree(self, platforms: Sequence[Platform], pins: dict[str, str]) -> dict[str, dict[str, Wheel]]:
        """By platform and name, the same versions on all platforms; those in `pins` where there are any."""
        lines = [*self._lines, *(line for wheel in self._local.values() for line in wheel.requires)]
        lines = [line for line in dict.fromkeys(lines) if not self._is_local(requirement_of(line))]
        # Without hashes: a single one would make pip demand one for everything. They are checked afterwards.
        bounds = [split_hashes(line)[0] for line in self._wanted.constraints]
        found: dict[str, dict[str, Wheel]] = {platform.name: {} for platform in platforms}
        todo = list(platforms) if lines else []
        differing: dict[str, dict[str, list[str]]] = {}
        for _ in range(ROUNDS):
            constraints = [*bounds, *(f"{name}=={version}" for name, version in pins.items())]
            try:
                found |= self._run_all([_Run(platform, lines, constraints) for platform in todo])
            except _Failed as failure:
                if differing:
                    raise _disagreement(
                        differing, "ask for one version that all of them have", failure.report
                    ) from None
                raise self._explained(failure) from None
            differing = _differing(found)
            if not differing:
                return found
            pins |= {name: self._common(name, versions, platforms) for name, versions in differing.items()}
            todo = [
                platform
                for platform in platforms
                if any(
                    name in found[platform.name] and found[platform.name][name].version != pins[name]
                    for name in differing
                )
            ]
        raise _disagreement(differing, "ask for one version that all of them have")

    def _common(self, name: str, versions: Mapping[str, object], platforms: Sequence[Platform]) -> str:
        """The version to try where platforms differ: the oldest of them, or the newest before that has a wheel for all."""
        oldest = min(map(Version, versions))
        try:
            files = self._index.files(name)
        except OSError:
            return str(oldest)
        sets = [{file.version for file in files if file.fits(platform) and not file.yanked} for platform in platforms]
        common = [version for version in set.intersection(*sets) if version <= oldest and not version.is_prerelease]
        return str(max(common, default=oldest))

    def _run_all(self, runs: Sequence[_Run]) -> dict[str, dict[str, Wheel]]:
        """All of them at once; the wheels that each found, by platform and name. Raises `_Failed`."""
        started: list[_Process] = []
        try:
            for run in runs:
                folder = self._scratch / f"{len(list(self._scratch.iterdir()))}"
                started.append(_Process(run, folder, self._arguments(run, folder), self._environment()))
            deadline = time.monotonic() + LIMIT
            while (waiting := [process for process in started if process.running()]) and not any(
                map(_Process.failed, started)
            ):
                waiting[0].wait(0.05)
                if time.monotonic() > deadline:
                    raise ResolveError(
                        f"resolving took more than {LIMIT:g} s: pip goes through combinations of versions, as one of what is "
                        f"required needs what there is not, or downloads for long; bind versions (name==version) and try again"
                    )
        finally:
            for process in started:
                process.end()
        for process in started:
            if process.failed():
                raise _Failed(process.run.platform, process.report())
        return {
            process.run.platform.name: {wheel.name: wheel for wheel in self._kept(process.wheels)}
            for process in started
        }

    def _kept(self, folder: Path) -> list[Wheel]:
        wheels = [store_wheel(path, self._cache) for path in sorted(folder.glob("*.whl"))]
        return [wheel for wheel in wheels if wheel.name not in self._local]

    def _arguments(self, run: _Run, folder: Path) -> list[str]:
        folder.mkdir()
        platform, constraints = folder / "platform.json", folder / "constraints.txt"
        platform.write_text(run.platform.complete(), "utf-8")
        constraints.write_text("".join(f"{line}\n" for line in run.constraints), "utf-8")
        arguments = ["download", "--no-build", "--use-pip-config", "--resolver-version", "pip-2020-resolver", *NETWORK]
        arguments += ["--pex-root", str(self._cache.path("builders", "pex")), "--dest-dir", str(folder / "wheels")]
        arguments += ["--complete-platform", str(platform), "--tmpdir", str(folder)]
        arguments += ["--pylock", str(run.lock)] if run.lock else ["--constraints", str(constraints)]
        for name in self._local:
            arguments += ["--exclude", name]
        return [*arguments, *run.lines]

    def _environment(self) -> dict[str, str]:
        """Ours, without what would make pex another, and with what pip is configured to in the form that comes first."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PEX_", "PIP_", "PYTHON"))}
        chosen = {f"PIP_{name.upper().replace('-', '_')}": value for name, value in self._index.settings.items()}
        return {**kept, **chosen, "PIP_CONFIG_FILE": os.devnull, "PYTHONUTF8": "1"}

    def _is_local(self, requirement: Requirement) -> bool:
        return canonicalize_name(requirement.name) in self._local

    def _check(self, platform: Platform, wheels: Mapping[str, Wheel]) -> None:
        """What pip did not: whether the local wheels are what others require, and whether hashes are those asked for."""
        asking = [(f"{wheel.name} {wheel.version} needs", line) for wheel in wheels.values() for line in wheel.requires]
        for who, line in [*(("you ask for", line) for line in self._hashes), *asking]:
            requirement = requirement_of(line)
            ours = self._local.get(canonicalize_name(requirement.name))
            if (
                ours
                and not requirement.specifier.contains(ours.version, prereleases=True)
                and holds(requirement, platform)
            ):
                raise ResolveError(f"{who} {requirement}, and what is installed here is {ours.name} {ours.version}")
        for line, hashes in self._hashes.items():
            wheel = wheels.get(canonicalize_name(requirement_of(line).name))
            if wheel and hashes and not any(has_hash(wheel, *text.split(":", 1)) for text in hashes):
                raise ResolveError(
                    f"{wheel.filename}, for {platform.name}, has none of the hashes that are allowed for {wheel.name}: "
                    f"its own is sha256:{wheel.sha256}"
                )


class _Process:
    """A resolver that runs, in a process group of its own: an interrupt of ours is not its own, and it has children."""

    def __init__(self, run: _Run, folder: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self.run = run
        self.wheels = folder / "wheels"
        self._log = folder / "log.txt"
        self._ended = False
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*_command(), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,
            )

    def running(self) -> bool:
        return self._process.poll() is None

    def failed(self) -> bool:
        return bool(self._process.poll()) and not self._ended

    def wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def end(self) -> None:
        """Where it still runs: with its children, and soon."""
        if self.running():
            self._ended = True
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
                self.wait(GRACE)

    def report(self) -> str:
        """What it said, without pex's own line about which command it ran."""
        lines = self._log.read_text("utf-8", "replace").splitlines()
        return "\n".join(
            line.strip().removeprefix("pip:").strip() for line in lines if not re.match(r"pid \d+ -> ", line)
        )


def _command() -> list[str]:
    """pex, by this interpreter, whatever lies in the working directory or has its name in ``$PATH``."""
    spec = importlib.util.find_spec("pex")
    if spec is None or spec.origin is None:
        raise PackError("pex is not installed, which finds the distributions: pip install pex")
    folder = str(Path(spec.origin).parent.parent)
    # Where this program was unpacked from an archive, a new process does not find what this one finds.
    code = "import sys; sys.path.append(sys.argv.pop(1)); from pex.cli.pex import main; sys.exit(main())"
    return [sys.executable, "-P", "-c", code, folder]


def _differing(found: Mapping[str, Mapping[str, Wheel]]) -> dict[str, dict[str, list[str]]]:
    """By name and version, the platforms that have it; where there is more than one version. Local versions (``+cpu``) are
    builds of the same one."""
    versions: dict[str, dict[str, list[str]]] = {}
    for platform, wheels in found.items():
        for name, wheel in wheels.items():
            versions.setdefault(name, {}).setdefault(Version(wheel.version).public, []).append(platform)
    return {name: table for name, table in versions.items() if len(table) > 1}


def _disagreement(differing: Mapping[str, Mapping[str, Sequence[str]]], hint: str, report: str = "") -> ResolveError:
    name, versions = next(iter(differing.items()))
    each = ", ".join(f"{version} for {' and '.join(platforms)}" for version, platforms in versions.items())
    return ResolveError(f"{name} has no version for all platforms: {each}; {hint}", report)
