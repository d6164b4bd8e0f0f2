"""Figures per method, at either end of its calls.

How long calls take is kept as counts by range of seconds: enough to say what all but one of a hundred calls stay below,
a few hundred bytes a method, and what several processes have counted adds up. A range is 1/16 of a power of two, so what
it says is right within 3 %. Its number is the upper 16 bits of any of its times as a 64-bit float (sign, exponent, four bits
of the fraction): no logarithm is needed, and many are made at once.
"""

from __future__ import annotations

import struct
import sys
import threading
from array import array
from dataclasses import dataclass, field, fields

BATCH = 64
"""Calls of a method whose times are sorted into ranges at once: that takes half as long as one by one."""

_TOP = 3 if sys.byteorder == "little" else 0
"""Which of the four 16-bit parts of a float, as this processor stores them, is the uppermost."""


@dataclass
class MethodStats:
    """What is known of one method. Times in seconds: from sending to the reply at the client, of running at the server;
    bytes are those of arguments and results as encoded. The maxima are of single calls; `latencies` are counts of calls by
    range of seconds (see the module), for `quantile`."""

    count: int = 0
    errors: int = 0
    seconds: float = 0.0
    max_seconds: float = 0.0
    sent: int = 0
    max_sent: int = 0
    received: int = 0
    max_received: int = 0
    latencies: dict[int, int] = field(default_factory=dict)

    def quantile(self, q: float) -> float | None:
        """The seconds within which the fraction `q` of the calls, from 0 to 1, have ended, failed or not: 0.5 is the median.
        Right within 3 %. None where there was none."""
        wanted = q * sum(self.latencies.values())
        passed = 0
        middle = None
        for number in sorted(self.latencies):
            passed += self.latencies[number]
            middle = min((_least(number) + _least(number + 1)) / 2, self.max_seconds)
            if passed >= wanted:
                break
        return middle

    def add(self, other: MethodStats) -> None:
        """Count those of `other`, too."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _MAXIMA:
            setattr(self, name, max(getattr(self, name), getattr(other, name)))
        for number, count in other.latencies.items():
            self.latencies[number] = self.latencies.get(number, 0) + count


_MAXIMA = [each.name for each in fields(MethodStats) if each.name.startswith("max_")]
_SUMS = [each.name for each in fields(MethodStats) if each.name not in ("latencies", *_MAXIMA)]


def _least(number: int) -> float:
    """The shortest time of a range."""
    (seconds,) = struct.unpack(">d", struct.pack(">Hxxxxxx", number))
    return float(seconds)


class Stats:
    """Figures of all methods; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._methods: dict[str, tuple[MethodStats, list[float]]] = {}  # With the times that are in no range yet.

    def record(self, method: str, seconds: float, sent: int, received: int, failed: bool) -> None:
        """One call of `method` has ended."""
        with self._lock:
            entry = self._methods.get(method)
            if entry is None:
                entry = self._methods[method] = (MethodStats(), [])
            stats, recent = entry
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
            recent.append(seconds)
            if len(recent) == BATCH:
                _sort(recent, stats.latencies)

    def snapshot(self) -> dict[str, MethodStats]:
        """Copies, by method name."""
        copies = {}
        with self._lock:
            for name, (stats, recent) in self._methods.items():
                _sort(recent, stats.latencies)
                copies[name] = MethodStats(**{**vars(stats), "latencies": stats.latencies.copy()})
        return copies


def _sort(times: list[float], latencies: dict[int, int]) -> None:
    """Move `times` into their ranges."""
    for number in array("H", array("d", times).tobytes())[_TOP::4]:
        latencies[number] = latencies.get(number, 0) + 1
    times.clear()
