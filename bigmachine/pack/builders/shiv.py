"""The builder ``shiv``: one file for one platform, which unpacks its distributions at its first start.

shiv copies a directory of installed distributions. We lay it out from the wheels ourselves, as for a machine: pip would need
an interpreter of the program's version, and would add files of its own.
"""

from __future__ import annotations

import importlib.metadata
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...bootstrap import parts
from ...cache import Cache
from ..measure import wheel_part
from ..platforms import Platform
from ..tars import write_wheel_tar
from ..wheels import Wheel
from . import Built
from .command import run_tool

ENTRY = "bigmachine.program:main"
SITE = "site-packages"


class Shiv:
    """See `builders.Builder`."""

    name = "shiv"
    suffix = ".pyz"
    several = False

    def version(self) -> str:
        """See `Builder`."""
        return importlib.metadata.version("shiv")

    def build(
        self, wheels: Mapping[str, Sequence[Wheel]], platforms: Sequence[Platform], folder: Path, cache: Cache
    ) -> Built:
        """See `Builder`."""
        (group,) = wheels.values()
        unpacked = []
        for wheel in group:
            tar = io.BytesIO()
            with open(wheel.path, "rb") as file:
                write_wheel_tar(file, tar)
            tar.seek(0)
            unpacked.append(folder / "parts" / wheel.name)
            parts.unpack(tar, str(unpacked[-1]), wheel_part(wheel, cache, worker=True).digest)
        parts.install([str(path) for path in unpacked], str(folder / SITE))
        output = folder / "built.pyz"
        arguments = ["--site-packages", str(folder / SITE), "--entry-point", ENTRY, "--reproducible", "-o", str(output)]
        run_tool("shiv", arguments, {}, folder)
        return Built(output)

    def place(self, wheel: Wheel) -> str:
        """See `Builder`: the directory with the distribution's list of files."""
        return f"{SITE}/{'-'.join(wheel.filename.split('-')[:2])}.dist-info"
