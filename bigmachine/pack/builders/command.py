"""Running a builder's tool."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import PackError

TIMEOUT = 600.0
"""Seconds for a tool that neither waits for the network nor compiles. pex takes one or two, with wheels of 60 MB some more."""


def run_tool(tool: str, arguments: Sequence[str], environ: Mapping[str, str], folder: Path) -> None:
    """Run ``python -m tool``, with `environ` added and none of the user's settings for it. Raises `PackError`.

    Its temporary files are in `folder`: where it is interrupted, it does not clear up, and whoever made that does.
    The tool writes nothing to our standard streams, and sees no module of the working directory.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PEX_", "SHIV_", "PYTHON"))}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", tool, *arguments],
            env={**kept, **environ, "PYTHONHASHSEED": "0", "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise PackError(f"{tool} did not end within {TIMEOUT:g} s") from None
    if done.returncode:
        lines = done.stdout.strip().splitlines() or [f"exit code {done.returncode}, and no word"]
        raise PackError(f"{tool} failed: {lines[-1].strip()}", done.stdout)
