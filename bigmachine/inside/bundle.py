"""A report of a session, for whoever has to find out what happened: one zip file. What is in it: `evidence`.

Rule 1. A report is written while the machines are still there: what they do, and what fills them, is in it.
Rule 2. It takes `evidence.WITHIN` seconds at most: who does not answer is missing, and the report says so.
Rule 3. It is meant to be given away: no environment, no arguments, nothing of variables but what
`bigmachine.vars` publishes, and `redact` goes over all texts.
Rule 4. A file is there whole or not at all, and readable by the user alone.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import BinaryIO

from ..errors import UsageError
from .cluster import Cluster


def write(session: Cluster, file: BinaryIO | Path, why: str = "") -> list[str]:
    """Write a report of `session` to `file`; `why` it was made stands in it. Returns the names of what is in it. Raises
    OSError; a path is left as it was then."""
    from .evidence import gather, pack  # zipfile, and whatever looks inside: for those who write one.

    if not isinstance(file, Path):
        return pack(gather(session, why), file)
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}")  # Not one that somebody else has made for us.
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(fd, "wb") as out:
            names = pack(gather(session, why), out)
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return names


class Reports:
    """Those of failures of one session, in `folder`. Raises `UsageError` where there can be none."""

    def __init__(self, session: Cluster, folder: Path) -> None:
        from . import evidence  # noqa: F401  # Now: when the program has failed, it may be too late for imports.

        self._session = session
        self._folder = folder = folder.absolute()  # The program may change its directory.
        probe = folder / f".bigmachine-{session.name}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            probe.unlink()
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(
                f"cannot write reports to {folder}: {reason}; give -bigm.bundle a directory that can be written to"
            ) from None

    def at_failure(self, error: BaseException) -> None:
        """The program ends by `error`."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        file = self._folder / f"bigmachine-{self._session.name}-{stamp}.zip"
        try:
            write(self._session, file, f"the program failed: {type(error).__name__}")
        except OSError as problem:
            self._session.say(f"cannot write a report to {file}: {problem.strerror or problem}")
        else:
            self._session.say(f"a report of the failure is in {file}")
