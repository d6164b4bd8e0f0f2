"""Figures per method, at either end of its calls."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass
class MethodStats:
    """What is known of one method. Times in seconds: from sending to the reply at the client, of running at the server;
    bytes are those of arguments and results as encoded. The maxima are of single calls."""

    count: int = 0
    errors: int = 0
    seconds: float = 0.0
    max_seconds: float = 0.0
    sent: int = 0
    max_sent: int = 0
    received: int = 0
    max_received: int = 0


class Stats:
    """Figures of all methods; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._methods: dict[str, MethodStats] = {}

    def record(self, method: str, seconds: float, sent: int, received: int, failed: bool) -> None:
        """One call of `method` has ended."""
        with self._lock:
            stats = self._methods.get(method)
            if stats is None:
                stats = self._methods[method] = MethodStats()
            stats.count += 1
            if failed:
                stats.errors += 1
            stats.seconds += seconds
            stats.sent += sent
            stats.received += received
            if seconds > stats.max_seconds:
                stats.max_seconds = seconds
            if sent > stats.max_sent:
                stats.max_sent = sent
            if received > stats.max_received:
                stats.max_received = received

    def snapshot(self) -> dict[str, MethodStats]:
        """Copies, by method name."""
        with self._lock:
            return {name: MethodStats(**vars(stats)) for name, stats in self._methods.items()}
