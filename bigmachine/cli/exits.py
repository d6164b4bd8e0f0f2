"""Exit codes of the command line: part of its interface, as scripts ask for them."""

from __future__ import annotations

DONE = 0
FAILED = 1
WRONG = 2
UNRESOLVED = 3
INTERRUPTED = 130
"""128 + SIGINT, as shells put it."""
UNREAD = 141
"""128 + SIGPIPE: what a program exits with that does not look at its writes."""

MEANINGS = {
    DONE: "done",
    FAILED: "it could not be done: one line on standard error says why; or doctor has found something",
    WRONG: "the command line is wrong: an unknown command, option, platform or builder",
    UNRESOLVED: "the program's requirements cannot be met",
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
