"""A browser for tests of the debug page: Debian's Chromium, without a window."""

from __future__ import annotations

from pathlib import Path

PROGRAM = Path("/usr/bin/chromium")

PACKAGES = "chromium fonts-dejavu-core"
"""Without any font there are no letters on the page, and no widths of texts."""


def unavailable() -> str:
    """Why there is none; empty where there is."""
    return "" if PROGRAM.exists() else f"{PROGRAM} is not there; on Debian: apt-get install {PACKAGES}"
