"""Reading ahead of somebody slow.

What a machine says is read as fast as it can be written, and no faster: that is what holds its services up. But a machine that
ends does not wait for a terminal that stands still. What is under way from it, a few megabytes, is then read into memory,
and whoever writes it goes on from there.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Iterates over `items`, in order, for one consumer. What they raise, it raises, when the consumer gets there."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._reading = threading.Lock()
        self._waiting: deque[T] = deque()
        self._end: Exception | None = None

    def __iter__(self) -> Ahead[T]:
        return self

    def __next__(self) -> T:
        with self._reading:
            if not self._waiting:
                self._read()
            if self._waiting:
                return self._waiting.popleft()
            assert self._end is not None
            raise self._end

    def rest(self) -> None:
        """Read all that will come, for the consumer to find. Returns when nothing more will; call it from another thread."""
        while self._end is None:
            with self._reading:
                self._read()

    def _read(self) -> None:
        if self._end is None:
            try:
                self._waiting.append(next(self._items))
            except Exception as error:  # StopIteration, or what became of the connection.
                self._end = error
