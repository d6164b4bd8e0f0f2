"""A session's events (`events`) in a file, as JSON lines: ``-bigm.events=FILE``.

    {"time": 1732301999.25, "session": "s-1a2b3c4d", "number": 7, "kind": "machine.state", "machine": "m-7f3a9c", "state": …}

``time`` is in seconds as of 1970, ``number`` counts a session's events from 1, ``machine`` is empty for the session's own; what
follows are the fields of that kind. All is ASCII, and one line is one event.

Rule 1. Lines are appended, so that several sessions, at once too, may have the same file.

Rule 2. A line is there as soon as the event has been emitted, whole or not at all: a driver that is killed loses nothing.

Rule 3. The file never holds up, or ends, the session. What cannot be written (a full disk, a pipe that nobody reads) is left
out; that is said once when it begins, and how many lines are missing at the end.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections.abc import Callable

from ..errors import UsageError
from ..events import Event
from .cluster import Cluster


def begin(session: Cluster, file: str) -> Callable[[], object]:
    """Write every event of `session` from now on to `file`; returns what ends that. Raises `UsageError` where it cannot be."""
    try:
        # Not to wait, in emitting, for whoever reads a pipe. Private: texts of errors may quote data.
        fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o600)
    except (OSError, ValueError) as error:
        raise UsageError(f"events cannot be written to {file!r}: {_reason(error)}; give -bigm.events another file") from None
    written = _EventFile(fd, session.name, lambda reason: _say(session, f"events are missing in {file}: {reason}"))
    unsubscribe = session.events.subscribe(written.write)

    def end() -> None:
        unsubscribe()
        if missing := written.close():
            session.say(f"{missing} events are missing in {file}")

    return end


def as_line(event: Event, session: str) -> str:
    """`event` of `session` as it stands in a file, without the end of line. What JSON does not have stands there as text."""
    head = {
        "time": round(event.time, 6),
        "session": session,
        "number": event.number,
        "kind": event.kind,
        "machine": event.machine,
    }
    try:
        return json.dumps({**head, **event.fields, **head}, allow_nan=False, default=str)
    except (TypeError, ValueError):
        return json.dumps(head | {"fields": repr(event.fields)})


class _EventFile:
    """The open file. `problem` is called with the reason when a line could not be written, once."""

    def __init__(self, fd: int, session: str, problem: Callable[[str], None]) -> None:
        self._fd = fd
        self._session = session
        self._problem: Callable[[str], None] | None = problem
        self._regular = stat.S_ISREG(os.fstat(fd).st_mode)
        self._rest = b""  # Of a line that a pipe has taken a part of.
        self._missing = 0
        self._lock = threading.Lock()

    def write(self, event: Event) -> None:
        """Append its line; never raises `OSError`."""
        line = as_line(event, self._session).encode("ascii") + b"\n"
        with self._lock:
            if self._fd < 0:
                return
            try:
                self._append(line)
            except OSError as error:
                self._missing += 1
                problem, self._problem = self._problem, None
                if problem is not None:
                    problem(_reason(error))

    def _append(self, line: bytes) -> None:
        if self._rest:
            self._rest = self._rest[os.write(self._fd, self._rest) :]
            if self._rest:
                raise BlockingIOError(errno.EAGAIN, "nobody reads it fast enough")
        written = os.write(self._fd, line)
        if written == len(line):
            return
        if not self._regular:
            self._rest = line[written:]
            return
        # The disk is full. What is there of the line is taken away again, unless somebody else has written behind it.
        end = os.lseek(self._fd, 0, os.SEEK_CUR)
        if os.fstat(self._fd).st_size == end:
            os.ftruncate(self._fd, end - written)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> int:
        """How many lines could not be written."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            return self._missing


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _say(session: Cluster, text: str) -> None:
    """On a thread of its own: whoever emits does not wait for what may be slow, such as a terminal."""
    try:
        threading.Thread(target=session.say, args=(text,), name="bigmachine-events", daemon=True).start()
    except RuntimeError:
        pass  # The interpreter ends; how many are missing is said all the same.
