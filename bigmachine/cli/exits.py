"""Exit codes of the command line: part of its interface, as scripts ask for them."""

from __future__ import annotations

import os
import sys

from ..errors import BigmachineError

DONE = 0
FAILED = 1
WRONG = 2
UNRESOLVED = 3
GONE = 4
INTERRUPTED = 130
"""128 + SIGINT, as shells put it."""
UNREAD = 141
"""128 + SIGPIPE: what a program exits with that does not look at its writes."""

MEANINGS = {
    DONE: "done",
    FAILED: "it could not be done: one line on standard error says why; or doctor has found something",
    WRONG: "the command line is wrong: an unknown command, option, platform or builder",
    UNRESOLVED: "the program's requirements cannot be met",
    GONE: "the driver has ended while it was looked into",
    INTERRUPTED: "interrupted (Ctrl-C)",
    "128+n": "ended by signal n (SIGTERM, SIGHUP)",
    UNREAD: "nobody reads the output any more",
}
"""For ``--help``."""


class Ended(Exception):
    """Raised by a command that has something to print, and ends with another code than `DONE`: a diagnosis that is none."""

    def __init__(self, output: str, code: int = FAILED) -> None:
        super().__init__(output, code)
        self.output = output
        self.code = code


class Gone(BigmachineError):
    """The driver has answered, and does not any more: it has ended, most likely. Not that there is none, which is an error."""


def show(output: str) -> None:
    """Write to standard output. Raises `Ended` with `UNREAD` where nobody reads it, `OSError` where it cannot be written."""
    try:
        print(output, end="", flush=True)
    except OSError as error:
        # The rest is in a buffer, which the interpreter would try to write when it ends, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise Ended("", UNREAD) from None
        raise
