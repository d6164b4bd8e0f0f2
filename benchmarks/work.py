"""What workers are asked to do; the same for every peer. Light to import: NumPy only where an array is needed."""

from __future__ import annotations

import os
import random
from typing import Any


class Work:
    """A service. Stateless but for the array that `give` returns, which is made once a size."""

    def __init__(self) -> None:
        self._given: dict[int, Any] = {}

    def inc(self, x: int) -> int:
        return x + 1

    def take(self, array: Any) -> int:
        return int(array[:10].sum())

    def give(self, size: int) -> Any:
        if size not in self._given:
            import numpy as np

            self._given[size] = np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8)
        return self._given[size]

    def pi(self, samples: int) -> int:
        """How many of `samples` random points of a square fall into the circle in it."""
        draw = random.random
        inside = 0
        for _ in range(samples):
            x, y = draw() - 0.5, draw() - 0.5
            if x * x + y * y < 0.25:
                inside += 1
        return inside

    def pid(self) -> int:
        return os.getpid()
