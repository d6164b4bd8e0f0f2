"""File systems of a minimal Debian with Python, systemd and cloud-init, for hosts to start from.

They are made once, by mmdebstrap, and kept: in $BIGMACHINE_TEST_ROOTS, else ~/.cache/bigmachine-tests/roots. Whatever is in
the list of packages, or in the recipe, is part of a root's name, so that a change makes another. Hosts see them through
overlays and never write to them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUITES = {"3.11": "bookworm", "3.13": "trixie"}
"""Debian's releases, by the minor version of their Python."""

PACKAGES = (
    "ca-certificates cloud-init curl dbus ifupdown iproute2 iputils-ping isc-dhcp-client libpam-systemd netbase openssh-server "
    "procps python3 python3-venv sudo systemd-sysv tini"
)

RECIPE = ("--quiet", "--mode=root", "--variant=minbase", "--dpkgopt=force-unsafe-io", f"--include={','.join(PACKAGES.split())}")
"""Plain debootstrap fails to configure cloud-init."""

COMMAND = "mmdebstrap"
"""Of the package of that name; with arch-test it also knows whether this kernel runs the result."""


def folder() -> Path:
    """Where roots are kept."""
    given = os.environ.get("BIGMACHINE_TEST_ROOTS")
    return Path(given) if given else Path.home() / ".cache/bigmachine-tests/roots"


def root(suite: str) -> Path:
    """The root of a release of Debian; made, if it is not there, which takes half a minute (bookworm 50 s, trixie 33 s)."""
    key = hashlib.sha256("\n".join([suite, *RECIPE]).encode()).hexdigest()[:8]
    made = folder() / f"{suite}-{key}"
    if made.is_dir():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    with _lock(made.with_suffix(".lock")):
        if not made.is_dir():
            _make(suite, made)
    return made


def _make(suite: str, made: Path) -> None:
    # Renamed when it is complete: what a build that was cut short has left is never taken for a root.
    partial = made.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    done = subprocess.run([COMMAND, *RECIPE, suite, str(partial)], capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(partial, ignore_errors=True)
        raise RuntimeError(f"no file system for hosts: {COMMAND} {suite}: {done.stderr.strip()[-2000:]}")
    partial.rename(made)


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    with open(file, "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
