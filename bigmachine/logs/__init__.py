"""The output of a session's machines on the driver: live on standard error, in files, and kept for whoever looks.

Rule 1. Whole lines, those of a machine in the order in which they came, each with the machine's address in front. None is lost.
Rule 2. Whoever feeds lines in waits until they are written: a terminal that is stopped stops the machines that write to it, and
nothing is dropped. Readers (the page, a report) never make anybody wait: the last lines are kept for them, and who is late is
told how many have gone (`backlog`).
Rule 3. On a terminal, machines have colours, and bars that stand at the bottom stay there (`stream`).
Rule 4. With a directory, each machine has a file there; what was written is there, even if the driver is killed (`files`).

What is left of a worker's control sequences, and of its progress bars: `lines`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from .backlog import CHARACTERS, KEEP, SHOWN, Backlog, Line
from .files import DRIVER, Files
from .lines import Lines, Said, plain
from .stream import PALETTE, Bar, Stream, in_colour

STUCK = 1.0
"""Seconds for which `Logs.close` waits for who is writing: he should have ended, and something else has gone wrong."""

__all__ = ["DRIVER", "KEEP", "PALETTE", "SHOWN", "Bar", "Feed", "Line", "Logs", "in_colour"]


class Logs:
    """The lines of a session; see the module. `stream` None is what ``sys.stderr`` is at the time of writing; `keep` lines of a
    machine, of so many `characters`, are kept for readers.

    Raises `UsageError` where `directory` cannot be written to.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        directory: Path | None = None,
        keep: int = KEEP,
        *,
        characters: int = CHARACTERS,
    ) -> None:
        self.directory = directory
        self.stream = Stream(stream)
        self.backlog = Backlog(keep, characters)
        self._files = Files(directory, self._complain) if directory is not None else None
        self._lock = threading.Lock()
        self._feeds: dict[str, Feed] = {}
        self._watcher: threading.Thread | None = None
        self._ending = threading.Event()

    # -- Whoever writes ----------------------------------------------------------------------------------------------

    def feed(self, machine: str, address: Callable[[], str]) -> Feed:
        """For what machine `machine` (its id) says; `address()` is what stands before its lines."""
        with self._lock:
            feed = self._feeds.get(machine)
            if feed is None:
                feed = self._feeds[machine] = Feed(self, machine, address, PALETTE[len(self._feeds) % len(PALETTE)])
        if self._files is not None:
            self._files.open(machine)
        return feed

    def say(self, text: str) -> None:
        """Lines of the session's own."""
        said = _own_words(text)
        if said.text:
            self.keep("", DRIVER, "log", said)
            self.stream.write(said.text)

    def keep(self, machine: str, process: str, stream: str, said: Said) -> None:
        """For readers, and into the machine's file."""
        text = plain(said.text) if said.coloured else said.text
        count = text.count("\n")
        now = self.backlog.add(machine, process, stream, text, count)
        if self._files is not None:
            self._files.write(machine, now, f"{process} {stream}", text, count)

    def beside(self, bar: Bar) -> contextlib.AbstractContextManager[None]:
        """While this lasts, `bar` is cleared before lines are written, and drawn again after them."""
        return self.stream.beside(bar)

    def close(self) -> None:
        """All has been said: write what is left. Idempotent; what is said after it is still written, but to no file."""
        with self._lock:
            feeds = list(self._feeds.values())
        for feed in feeds:
            feed.close(STUCK)
        self._ending.set()
        self.backlog.close()
        if self._files is not None:
            self._files.close()
        watcher = self._watcher
        if watcher is not None and watcher is not threading.current_thread():
            watcher.join(1.0)

    def _complain(self, text: str) -> None:
        self.stream.write(_own_words(text).text)

    # -- Whoever reads: see `Backlog` --------------------------------------------------------------------------------

    def since(
        self, after: int, machine: str | None = None, limit: int = 1000, text: str = ""
    ) -> tuple[list[Line], int]:
        """See `Backlog.since`."""
        return self.backlog.since(after, machine, limit, text)

    def last(self, n: int, machine: str | None = None) -> list[Line]:
        """See `Backlog.last`."""
        return self.backlog.last(n, machine)

    def wait(self, after: int, timeout: float) -> bool:
        """See `Backlog.wait`."""
        return self.backlog.wait(after, timeout)

    def count(self, machine: str) -> int:
        """How many lines the machine has said."""
        return self.backlog.count(machine)

    def under_way(self, machine: str | None = None) -> list[Line]:
        """What stands now in lines that have not ended, progress bars above all: lines without a number (0)."""
        with self._lock:
            feeds = [feed for id, feed in self._feeds.items() if machine in (None, id)]
        now = time.time()
        return [
            Line(0, now, feed.machine, process, stream, text[:SHOWN])
            for feed in feeds
            for process, stream, text in feed.under_way()
        ]

    @property
    def number(self) -> int:
        """The last line's."""
        return self.backlog.number

    @property
    def closed(self) -> bool:
        """Whether all has been said."""
        return self.backlog.closed

    # -- Bars that stand still ---------------------------------------------------------------------------------------

    def watch(self) -> None:
        """A bar is being drawn somewhere: see to it that its state is shown in time, even if its process does no more."""
        with self._lock:
            if self._ending.is_set() or self._watcher is not None:
                return
            self._watcher = threading.Thread(target=self._show_states, name="bigmachine-bars", daemon=True)
            try:
                self._watcher.start()
            except RuntimeError:
                self._watcher = None  # The interpreter ends: so do the lines.

    def _show_states(self) -> None:
        while True:
            with self._lock:
                feeds = list(self._feeds.values())
                dues = [due for feed in feeds if (due := feed.due()) is not None]
                if self._ending.is_set() or not dues:
                    self._watcher = None
                    return
            self._ending.wait(min(dues) - time.monotonic())
            for feed in feeds:
                feed.show_states()


class Feed:
    """What one machine says. Safe to use from any thread."""

    def __init__(self, logs: Logs, machine: str, address: Callable[[], str], colour: int) -> None:
        self.machine = machine
        self._logs = logs
        self._address = address
        self._colour = colour
        self._lock = threading.Lock()
        self._sources: dict[tuple[str, str], Lines] = {}

    def data(self, process: str, stream: str, data: bytes) -> None:
        """`process` has written `data` to `stream`. Returns when what is to be shown of it is written."""
        with self._lock:
            lines = self._sources.get((process, stream))
            if lines is None:
                lines = self._sources[process, stream] = Lines()
            idle = lines.due is None
            self._emit(process, stream, lines.feed(data, time.monotonic()))
            if lines.due is not None:
                self._emit(process, stream, lines.states(time.monotonic()))
            begun = idle and lines.due is not None
        if begun:
            self._logs.watch()

    def line(self, text: str) -> None:
        """bigmachine's own words on this machine."""
        with self._lock:
            self._emit("bigmachine", "log", _own_words(text))

    def tail(self, n: int) -> list[str]:
        """The texts of the machine's last `n` lines."""
        return [line.text for line in self._logs.last(n, self.machine)]

    def close(self, timeout: float = -1) -> None:
        """Nothing more will come: write lines that have no end. Idempotent. Without effect where somebody else is still being
        held up after `timeout` seconds."""
        if not self._lock.acquire(timeout=timeout):
            return
        try:
            sources, self._sources = self._sources, {}
            for (process, stream), lines in sources.items():
                self._emit(process, stream, lines.end())
        finally:
            self._lock.release()

    def under_way(self) -> list[tuple[str, str, str]]:
        """Process, stream, text of lines that have not ended. Does not wait for who writes."""
        sources = list(self._sources.items())
        return [(*source, text) for source, lines in sources for text in lines.under_way()]

    def due(self) -> float | None:
        """When `show_states` has something to do next, as of `time.monotonic`. Does not wait."""
        dues = [due for lines in list(self._sources.values()) if (due := lines.due) is not None]
        return min(dues, default=None)

    def show_states(self) -> None:
        """Write the states of bars that are due."""
        with self._lock:
            now = time.monotonic()
            for (process, stream), lines in self._sources.items():
                self._emit(process, stream, lines.states(now))

    def _emit(self, process: str, stream: str, said: Said) -> None:
        if said.text:
            self._logs.keep(self.machine, process, stream, said)
            self._logs.stream.write(said.text, f"{self._address()}:", self._colour, said.coloured)


def _own_words(text: str) -> Said:
    """As somebody else's: there may be a machine's output in them."""
    return Lines().feed("".join(f"bigmachine: {line}\n" for line in text.splitlines()).encode(errors="replace"), 0.0)
