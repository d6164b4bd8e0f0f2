"""The builder ``pex``: one file for several platforms, which makes itself a virtual environment at its first start.

pex is given the wheels as files (``--pre-resolved-dists``), stores them as they are (``--no-pre-install-wheels``), and knows
the platforms from our data. It is not told the program's Python: it would want an interpreter of that version here. So pex
takes the one that it runs with for granted, and its path goes into the name of the environment; `_constrain` corrects that.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...cache import Cache
from ...errors import PackError
from ..platforms import Platform
from ..wheels import Wheel
from . import Built
from .command import run_tool

ENTRY = "bigmachine.program:pex_main"
INFO = "PEX-INFO"
MAIN = "__main__.py"

WARM = """\
root="${{PEX_ROOT:-{root}}}"
installed="$root/{installed}"
if [ -e "$installed" ] && ! [ -x "$installed/bin/python" ]; then
    real=$(cd -P "$installed" && pwd) && rm -rf "$real" "$installed"
fi
chosen="${{PEX_TOOLS:-}}${{PEX_PYTHON:-}}${{PEX_PYTHON_PATH:-}}${{PEX_PATH:-}}${{PEX_VENV:-}}"
if [ -x "$installed/bin/python" ] && [ -z "$chosen" ]; then
    PEX="$0" exec "$installed/bin/python" -I "$installed" "$@"
fi
"""
"""As pex's own boot script does, for which variables it does not. What was installed with an interpreter that is gone, as
after an upgrade, is removed: pex would try it, and fail."""

ROOT = "~/.cache/pex"
"""Where pex installs on every platform: its default on Linux. On macOS that would differ, and with it the file's bytes."""


class Pex:
    """See `builders.Builder`."""

    name = "pex"
    suffix = ".pex"
    several = True

    def version(self) -> str:
        """See `Builder`."""
        return importlib.metadata.version("pex")

    def build(
        self, wheels: Mapping[str, Sequence[Wheel]], platforms: Sequence[Platform], folder: Path, cache: Cache
    ) -> Built:
        """See `Builder`."""
        every = {wheel.filename: wheel for group in wheels.values() for wheel in group}
        links = folder / "wheels"
        links.mkdir()
        for wheel in every.values():
            (links / wheel.filename).symlink_to(wheel.path)
        complete = []
        for platform in platforms:
            file = folder / f"{platform.name.replace('/', '-')}.json"
            file.write_text(platform.complete())
            complete += ["--complete-platform", str(file)]
        output = folder / "built.pex"
        root = cache.path("builders", "pex")
        arguments = ["--pre-resolved-dists", str(links), "--no-build", *complete, "--entry-point", ENTRY]
        arguments += ["--venv", "--sh-boot", "--no-pre-install-wheels", "--runtime-pex-root", ROOT, "-o", str(output)]
        requirements = sorted({f"{wheel.name}=={wheel.version}" for wheel in every.values()})
        run_tool("pex", [*arguments, *_marked(requirements, wheels)], {"PEX_ROOT": str(root)}, folder)
        return _constrain(output, platforms[0].python)

    def place(self, wheel: Wheel) -> str:
        """See `Builder`."""
        return f".deps/{wheel.filename}"


def _marked(requirements: Sequence[str], wheels: Mapping[str, Sequence[Wheel]]) -> list[str]:
    """The requirements, each for those platforms only that have such a wheel."""
    marked = []
    for requirement in requirements:
        name, _, version = requirement.partition("==")
        having = [
            platform for platform, group in wheels.items() if any((w.name, w.version) == (name, version) for w in group)
        ]
        if len(having) == len(wheels):
            marked.append(requirement)
        else:
            marked.append(f"{requirement}; {' or '.join(map(_marker, having))}")
    return marked


def _marker(platform: str) -> str:
    system, _, machine = platform.partition("/")
    spelled = {"amd64": "x86_64", "arm64": "arm64" if system == "darwin" else "aarch64"}[machine]
    return f"(sys_platform == '{system}' and platform_machine == '{spelled}')"


def _constrain(built: Path, python: str) -> Built:
    """Tie the archive to Python `python`, any interpreter of that version: in pex's own words, as if it had been told."""
    with zipfile.ZipFile(built) as archive:
        info = json.loads(archive.read(INFO))
        main = archive.read(MAIN).decode()
    old = info["pex_hash"]
    new = hashlib.sha1(f"{old} {python}".encode()).hexdigest()
    info["pex_hash"] = new
    info["interpreter_constraints"] = [f"CPython=={python}.*"]
    edited, count = re.subn(r"\bhas_interpreter_constraints=False\b", "has_interpreter_constraints=True", main)
    if count != 1 or old not in main:
        raise PackError(
            f"pex {importlib.metadata.version('pex')} writes files of another form: install another version of it"
        )
    edits = {INFO: json.dumps(info, sort_keys=True).encode(), MAIN: edited.replace(old, new).encode()}
    return Built(built, _warm(built, new), edits)


def _warm(built: Path, pex_hash: str) -> str:
    """The shell's way to what is installed. pex names the directory after a digest of how the interpreter was chosen: here,
    by a constraint, and by no variable."""
    with open(built, "rb") as file:
        script = file.read(64 * 1024).decode("latin-1")
    place = re.search(r'^INSTALLED_PEX="\$\{PEX_ROOT\}/(venvs/\d+)/', script, re.MULTILINE)
    if place is None:
        return ""  # Slower: pex finds it by itself.
    chosen = json.dumps({"pex_path": {}, "PEX_PYTHON_PATH": None}, sort_keys=True)
    digest = hashlib.sha1(chosen.encode()).hexdigest()
    return WARM.format(root=ROOT.replace("~", "${HOME:-}"), installed=f"{place[1]}/{pex_hash}/{digest}")
