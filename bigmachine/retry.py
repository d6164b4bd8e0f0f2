"""How long to wait between tries: the policy alone. It neither sleeps nor reads a clock; the caller does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .errors import UsageError


@dataclass(frozen=True)
class Backoff:
    """Delays in seconds that grow by `factor` from `first` to `ceiling`.

    They end after `attempts` tries (the first try counts, so that n tries have n - 1 delays between them), or when
    together they reach `limit` seconds (the last is cut to fit; what the tries themselves take is not counted). Either
    may be None, not both: every wait ends.
    """

    first: float = 0.1
    factor: float = 2.0
    ceiling: float = 5.0
    """Also what a caller waits at most for a machine that is already back."""
    attempts: int | None = None
    limit: float | None = 60.0
    jitter: float = 0.5
    """The share of each delay that is left to chance, so that callers who failed together do not return together."""

    def __post_init__(self) -> None:
        if self.attempts is None and self.limit is None:
            raise UsageError("a backoff needs an end: set attempts or limit")
        if not (0 < self.first <= self.ceiling and self.factor >= 1 and 0 <= self.jitter <= 1):
            raise UsageError(f"a backoff needs 0 < first <= ceiling, factor >= 1 and 0 <= jitter <= 1: {self}")

    def delays(self, random: Callable[[], float]) -> Iterator[float]:
        """The delays before the second try, the third, …; `random` gives numbers in [0, 1) (``random.random``)."""
        left = float("inf") if self.limit is None else self.limit
        tries_left = float("inf") if self.attempts is None else self.attempts - 1
        step = self.first
        while tries_left > 0 and left > 0:
            delay = min(left, step * (1 - self.jitter * random()))
            yield delay
            left -= delay
            tries_left -= 1
            step = min(self.ceiling, step * self.factor)
