"""Calls that many threads want to make at the same moment, made as one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

COLLECT = 0.05
"""Seconds for which others are waited for: nothing beside what a call takes."""


@dataclass
class _Round:
    ids: list[str] = field(default_factory=list)
    done: Future[None] = field(default_factory=Future)


class Batch:
    """Collects ids, and acts on them together: `act` is given all that came within `collect` seconds."""

    def __init__(self, act: Callable[[Sequence[str]], None], collect: float = COLLECT) -> None:
        self._act = act
        self._collect = collect
        self._lock = threading.Lock()
        self._round: _Round | None = None

    def add(self, ids: Sequence[str]) -> None:
        """Returns when it was done for these; what `act` raises is raised for all who are in it."""
        with self._lock:
            first = self._round is None
            mine = self._round = self._round or _Round()
            mine.ids.extend(ids)
        if first:
            threading.Event().wait(self._collect)
            with self._lock:
                self._round = None
            try:
                self._act(list(dict.fromkeys(mine.ids)))
                mine.done.set_result(None)
            except BaseException as error:
                mine.done.set_exception(error)
        mine.done.result()
