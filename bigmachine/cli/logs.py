"""``bigmachine logs``: what the machines of a running driver have said, and, with ``-f``, what they say from now on.

On a terminal, machines have colours, as where the driver runs.

With ``--json``: ``lines``, a list of ``number``, ``time`` (seconds as of 1970), ``machine`` (its id, empty for the driver's own
lines), ``process``, ``stream`` and ``text``; and ``under_way``, the same of lines that have not ended, which have no number.
"""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator

from ..errors import UsageError
from ..logs import PALETTE, in_colour
from .attach import PATIENCE, Driver, shown
from .exits import show

_PREFIX = re.compile(r"^https://\S+/: ", re.MULTILINE)
"""What stands before a machine's line: its address."""

_RESET = "\x1b[0m"


def run(arguments: Namespace) -> str:
    """Print the lines that `arguments` ask for, as they come. Raises `Gone` where the driver ends in the midst of them."""
    driver = Driver.at(arguments.address)
    if arguments.json:
        if arguments.follow:
            raise UsageError("--json prints what there is, once: leave out --follow, or --json")
        answer = driver.json("logs.json", machine=arguments.machine, n=arguments.n)
        return json.dumps({"lines": answer["lines"], "under_way": answer["under_way"]}, indent=1)
    query = {"machine": arguments.machine, "n": arguments.n, "follow": 1 if arguments.follow else None}
    painter = Painter()
    in_colours = in_colour(sys.stdout)
    # A machine may say nothing for hours.
    with driver.ask("logs", query, None if arguments.follow else PATIENCE) as answer:
        for text in whole_lines(answer.pieces()):
            clean = shown(text)
            show(printable(painter.paint(clean) if in_colours else clean))
    return ""


class Painter:
    """Gives each machine a colour, in the order in which they turn up."""

    def __init__(self) -> None:
        self._colours: dict[str, int] = {}

    def paint(self, text: str) -> str:
        """`text` with addresses in colour."""
        return _PREFIX.sub(lambda found: self._painted(found[0]), text)

    def _painted(self, prefix: str) -> str:
        colour = self._colours.setdefault(prefix, PALETTE[len(self._colours) % len(PALETTE)])
        return f"\x1b[38;5;{colour}m{prefix[:-1]}{_RESET} "


def printable(text: str) -> str:
    """`text` as standard output can encode it."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def whole_lines(pieces: Iterable[bytes]) -> Iterator[str]:
    """`pieces` as they come, but cut after ends of lines only: one that has not ended waits for the next piece."""
    rest = b""
    for piece in pieces:
        head, end, tail = piece.rpartition(b"\n")
        if end:
            yield (rest + head + end).decode("utf-8", "replace")
            rest = tail
        else:
            rest += piece
    if rest:
        yield rest.decode("utf-8", "replace") + "\n"
