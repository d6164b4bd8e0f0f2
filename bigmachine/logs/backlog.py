"""The last lines of a session's machines, for whoever looks: the page, the command line, reports of failures.

Lines are numbered in the order in which they came, all machines' in one series. Adding takes no longer because somebody reads:
what has come together is kept in one piece, and taken apart by its readers, outside of the lock.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import NamedTuple

KEEP = 2000
"""Lines that are kept of a machine: what a page shows, and a report wants."""

CHARACTERS = 1 << 19
"""Characters that are kept of a machine: 200 talkative ones are 100 MB."""

SHOWN = 1 << 14
"""Characters of a line that a reader gets. The whole line is on standard error, and in the file."""


class Line(NamedTuple):
    """`number` counts a session's lines from 1; `time` is as of `time.time`; `machine` is its id, empty for the session's own;
    `process` is ``"0"``, …, ``"supervisor"``, ``"bigmachine"`` for its own words on a machine, or ``"driver"``; `stream` is
    ``"stdout"``, ``"stderr"``, or ``"log"`` for our own; `text` has no colours."""

    number: int
    time: float
    machine: str
    process: str
    stream: str
    text: str


class _Block(NamedTuple):
    """Lines that came together: `lines` of them, from `number` on. `text` has an end of line after each."""

    number: int
    lines: int
    time: float
    process: str
    stream: str
    text: str

    @property
    def last(self) -> int:
        return self.number + self.lines - 1


class _Kept:
    """The last lines of one machine."""

    def __init__(self) -> None:
        self.blocks: deque[_Block] = deque()
        self.said = 0
        self.lines = 0
        self.characters = 0
        self.dropped = 0  # The number of the last line that is not kept any more.

    def add(self, block: _Block, keep: int, characters: int) -> None:
        self.said += block.lines
        if block.lines > keep:
            text = "\n".join(block.text.rsplit("\n", keep + 1)[1:])
            block = block._replace(number=block.last + 1 - keep, lines=keep, text=text)
            self.dropped = block.number - 1
        self.blocks.append(block)
        self.lines += block.lines
        self.characters += len(block.text)
        while len(self.blocks) > 1:
            first = self.blocks[0]
            if self.lines - first.lines < keep and self.characters <= characters:
                break
            self.blocks.popleft()
            self.lines -= first.lines
            self.characters -= len(first.text)
            self.dropped = max(self.dropped, first.last)

    def after(self, number: int) -> list[_Block]:
        """The blocks that have lines after `number`, the newest first."""
        found = []
        for block in reversed(self.blocks):
            if block.last <= number:
                break
            found.append(block)
        return found

    def newest(self, n: int) -> list[_Block]:
        """Those that have the last `n` lines, the newest first."""
        found = []
        for block in reversed(self.blocks):
            if n <= 0:
                break
            found.append(block)
            n -= block.lines
        return found


class Backlog:
    """See the module. Safe to use from any thread."""

    def __init__(self, keep: int = KEEP, characters: int = CHARACTERS) -> None:
        self._keep = keep
        self._characters = characters
        self._changed = threading.Condition()
        self._machines: dict[str, _Kept] = {}
        self.number = 0
        self.closed = False

    def add(self, machine: str, process: str, stream: str, text: str, lines: int) -> float:
        """So many whole `lines` have come: now, which is returned."""
        now = time.time()
        with self._changed:
            kept = self._machines.get(machine)
            if kept is None:
                kept = self._machines[machine] = _Kept()
            kept.add(_Block(self.number + 1, lines, now, process, stream, text), self._keep, self._characters)
            self.number += lines
            self._changed.notify_all()
        return now

    def close(self) -> None:
        """Nothing more will come."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def since(
        self, after: int, machine: str | None = None, limit: int = 1000, text: str = ""
    ) -> tuple[list[Line], int]:
        """The oldest `limit` of the lines that are kept and came after number `after`: of `machine` (its id, "" for the
        session's own; None: of all), and with `text` in them. And how many that came after it are not kept any more (of one
        machine: at most)."""
        with self._changed:
            some = self._some(machine)
            found = [(id, block) for id, kept in some.items() for block in kept.after(after)]
            if machine is None:
                have = sum(block.last - max(block.number - 1, after) for _, block in found)
                lost = max(0, self.number - after) - have
            else:
                lost = sum(min(kept.said - kept.lines, max(0, kept.dropped - after)) for kept in some.values())
        found.sort(key=lambda each: each[1].number)
        lines: list[Line] = []
        for id, block in found:
            for line in _lines_of(id, block):
                if len(lines) >= limit:
                    return lines, lost
                if line.number > after and text in line.text:
                    lines.append(line)
        return lines, lost

    def last(self, n: int, machine: str | None = None) -> list[Line]:
        """The newest `n` lines that are kept, in order; of all machines, or of `machine`."""
        with self._changed:
            found = [(id, block) for id, kept in self._some(machine).items() for block in kept.newest(n)]
        found.sort(key=lambda each: each[1].number)
        first, have = len(found), 0
        while first > 0 and have < n:
            first -= 1
            have += found[first][1].lines
        lines = [line for id, block in found[first:] for line in _lines_of(id, block)]
        return lines[max(0, len(lines) - n) :]

    def wait(self, after: int, timeout: float) -> bool:
        """Until there is a line after number `after`; False when there was none in `timeout` seconds, or none will come."""
        with self._changed:
            self._changed.wait_for(lambda: self.number > after or self.closed, timeout)
            return self.number > after

    def count(self, machine: str) -> int:
        """How many lines the machine has said."""
        with self._changed:
            kept = self._machines.get(machine)
            return 0 if kept is None else kept.said

    def _some(self, machine: str | None) -> dict[str, _Kept]:
        if machine is None:
            return self._machines
        kept = self._machines.get(machine)
        return {} if kept is None else {machine: kept}


def _lines_of(machine: str, block: _Block) -> list[Line]:
    number, _, time, process, stream, whole = block
    texts = whole.split("\n")[:-1]
    return [Line(number + index, time, machine, process, stream, _cut(text)) for index, text in enumerate(texts)]


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text)} characters)"
