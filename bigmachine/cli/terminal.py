"""How packing is shown while it goes on.

On a terminal one line lives: a spinner, the step, the seconds so far; it is gone in the end. Elsewhere each step is a line.
Both go to standard error; colour only on a terminal, and not with ``NO_COLOR``.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TextIO

from ..pack.progress import Lines, Progress, Silent


def is_live(stream: TextIO, environ: Mapping[str, str]) -> bool:
    """Whether a line can be written again and again: a terminal that can move its cursor."""
    return stream.isatty() and environ.get("TERM", "dumb") != "dumb"


@contextlib.contextmanager
def progress(silent: bool = False, stream: TextIO | None = None) -> Iterator[Progress]:
    """What shows steps and notes on `stream` (default: standard error), for as long as the block lasts."""
    stream = sys.stderr if stream is None else stream
    if silent or stream is None:  # Without a standard error there is nobody to tell.
        yield Silent()
    elif is_live(stream, os.environ):
        from .live import LiveLine  # rich takes longer to load than the rest of the command line: only for terminals.

        with LiveLine(stream) as line:
            yield line
    else:
        yield Lines(stream)
