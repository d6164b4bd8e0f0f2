"""``bigmachine profile``: a profile of a running driver and its machines, in one file for ``go tool pprof``.

Which there are is in `bigmachine.profiling`. Who has not answered is said on standard error.

With ``--json``: ``file`` and ``size`` (bytes), or with ``--text`` ``text``; ``kind``; ``missing``: who has not answered, why.
"""

from __future__ import annotations

import gzip
import json
import math
import shlex
import sys
import zlib
from argparse import Namespace
from collections.abc import Iterator
from urllib.parse import quote

from ..errors import BigmachineError
from .attach import Driver, shown
from .files import check, keep
from .terminal import progress
from .text import number, size

DEFAULT_SECONDS = 30.0
"""What the driver takes where nothing is said."""

SLACK = 90.0
"""Seconds for the answer, besides those that the profile takes. More than the driver waits for its machines."""

MISSING = " is missing: "
"""In a comment of a profile, between who has not answered and why (`bigmachine.inside.profiles`)."""

_COMMENTS = 13
_TEXTS = 6
"""Numbers of fields, as in `bigmachine.inside.pprof`."""


def run(arguments: Namespace) -> str:
    """Take the profile that `arguments` ask for. Raises `UsageError` where there is no such one, `BigmachineError`, OSError."""
    driver = Driver.at(arguments.address)
    check(arguments.output)
    driver.meet()
    query = {
        "seconds": arguments.seconds,
        "machine": arguments.machine,
        "gc": 1 if arguments.gc else None,
        "debug": 1 if arguments.text else None,
    }
    with progress(silent=arguments.json or not sys.stderr.isatty()) as steps:
        steps.step(f"taking a profile ({arguments.kind})")
        patience = _seconds(arguments.seconds) + SLACK
        with driver.ask(f"pprof/{quote(arguments.kind, safe='')}", query, patience) as answer:
            taken = answer.read()
            absent = int(answer.header("X-Bigmachine-Missing") or 0)
    notes = [shown(line)[2:] for line in _head(taken)] if arguments.text else list(comments(taken, driver))
    missing = [note for note in notes if MISSING in note]
    if missing or absent:
        print(f"bigmachine: {number(max(absent, len(missing)), 'process')} missing from this profile:", file=sys.stderr)
        print(*(f"  {line}" for line in missing), sep="\n", file=sys.stderr, flush=True)
    found: dict[str, object] = {"kind": arguments.kind, "missing": missing}
    if arguments.text and arguments.output is None:
        text = shown(taken.decode("utf-8", "replace")).rstrip("\n")
        return json.dumps({**found, "text": text}, indent=1) if arguments.json else text
    name = f"bigmachine.{arguments.kind}.{{}}.{'txt' if arguments.text else 'pb.gz'}"
    path = keep([taken], arguments.output, name)
    if arguments.json:
        return json.dumps({"file": str(path), "size": len(taken), **found}, indent=1)
    line = f"{path}: {size(len(taken))}"
    return line if arguments.text else f"{line}\ngo tool pprof -http=: {shlex.quote(str(path))}"


def _seconds(text: str | None) -> float:
    """How long the driver will take. What cannot be, it says itself."""
    try:
        number = float(DEFAULT_SECONDS if text is None else text)
    except ValueError:
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0


def _head(text: bytes) -> Iterator[str]:
    """The comments of a profile that is text."""
    for line in text.decode("utf-8", "replace").splitlines()[1:]:
        if not line.startswith("# "):
            return
        yield line


# -- The comments of a profile that is not --------------------------------------------------------------------------------


def comments(profile: bytes, driver: Driver) -> Iterator[str]:
    """The comments of a gzipped ``perftools.profiles.Profile``. Raises `BigmachineError` where it is none."""
    try:
        fields = list(_fields(gzip.decompress(profile)))
        if not fields:
            raise EOFError
        texts = [value for number, value in fields if number == _TEXTS]
        for number, value in fields:
            if number == _COMMENTS:
                for index in _numbers(value):
                    yield shown(texts[index].decode("utf-8", "replace"))
    except (OSError, EOFError, zlib.error, LookupError):
        raise BigmachineError(f"what {driver.address} has sent is no profile, or not all of one") from None


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each field that has a length; the others are numbers, which nobody asks for here."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        length, at = _varint(message, at)
        if key & 7 == 2:
            yield key >> 3, message[at : at + length]
            at += length


def _numbers(packed: bytes) -> Iterator[int]:
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
