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
    done: Future[bool] = field(default_factory=Future)


class Batch:
    """Collects ids, and acts on them together: `act` is given all that came within `collect` seconds."""

    def __init__(self, act: Callable[[Sequence[str]], None], collect: float = COLLECT) -> None:
        self._act = act
        self._collect = collect
        self._lock = threading.Lock()
        self._round: _Round | None = None

    def add(self, ids: Sequence[str]) -> None:
        """Returns when it was done for these; what `act` raises is raised for all who are in it."""
        while not self._added(ids):
            pass  # The user has interrupted whoever did it for all: the others do it again.

    def _added(self, ids: Sequence[str]) -> bool:
        with self._lock:
            first = self._round is None
            mine = self._round = self._round or _Round()
            mine.ids.extend(ids)
        if not first:
            return mine.done.result()
        try:
            threading.Event().wait(self._collect)
            self._close(mine)
            self._act(list(dict.fromkeys(mine.ids)))
        except Exception as error:
            mine.done.set_exception(error)
            raise
        except BaseException:  # Ctrl-C, in the main thread.
            self._close(mine)
            mine.done.set_result(False)
            raise
        mine.done.set_result(True)
        return True

    def _close(self, mine: _Round) -> None:
        """Nobody joins it any more."""
        with self._lock:
            if self._round is mine:
                self._round = None
