"""``bigmachine bundle``: all that there is to know about a run, in one zip file. `bigmachine.inside.bundle` says what is in it.

With ``--json``: ``file``, ``size`` (bytes), and ``names``: what is in it.
"""

from __future__ import annotations

import json
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

from ..errors import BigmachineError
from .attach import Driver
from .files import check, keep
from .terminal import progress
from .text import number, size

NAME = "bigmachine.{}.zip"

PATIENCE = 120.0
"""Seconds until the first byte, and between two: the driver asks its machines for profiles before."""


def run(arguments: Namespace) -> str:
    """Write what the driver says that `arguments` name. Raises `BigmachineError`, OSError; there is no file then."""
    driver = Driver.at(arguments.address)
    check(arguments.output)
    driver.meet()
    with progress(silent=arguments.json or not sys.stderr.isatty()) as shown:
        shown.step("asking all machines")
        with driver.ask("bundle", patience=PATIENCE) as answer:
            path = keep(answer.pieces(), arguments.output, NAME, lambda file: _names(file, driver))
    if not path.is_file():  # /dev/stdout, say: there is nothing to tell that would not spoil it.
        return ""
    taken, names = path.stat().st_size, _names(path, driver)
    if arguments.json:
        return json.dumps({"file": str(path), "size": taken, "names": names}, indent=1)
    return f"{path}: {size(taken)}, {number(len(names), 'file')}"


def _names(file: Path, driver: Driver) -> list[str]:
    """What is in it. Raises `BigmachineError` where that is nothing."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    except zipfile.BadZipFile as error:
        raise BigmachineError(f"what {driver.address} has sent is no zip file: {error}") from None
