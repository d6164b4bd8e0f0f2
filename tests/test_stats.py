"""Figures per method."""

from __future__ import annotations

import math
import pickle
import random
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest

from bigmachine.rpc.stats import BATCH, MethodStats, Stats


def test_sums_and_maxima() -> None:
    stats = Stats()
    stats.record("A.b", 1.0, 10, 1000, False)
    stats.record("A.b", 3.0, 5, 2000, True)
    stats.record("A.b", 2.0, 20, 500, False)
    stats.record("A.c", 0.5, 0, 0, True)
    found = stats.snapshot()
    assert {name: sum(each.latencies.values()) for name, each in found.items()} == {"A.b": 3, "A.c": 1}
    assert {name: replace(each, latencies={}) for name, each in found.items()} == {
        "A.b": MethodStats(
            count=3, errors=1, seconds=6.0, max_seconds=3.0, sent=35, max_sent=20, received=3500, max_received=2000
        ),
        "A.c": MethodStats(count=1, errors=1, seconds=0.5, max_seconds=0.5),
    }


def test_snapshot_is_a_copy() -> None:
    stats = Stats()
    stats.record("A.b", 1.0, 1, 1, False)
    before = stats.snapshot()
    stats.record("A.b", 1.0, 1, 1, False)
    assert before["A.b"].count == 1
    before["A.b"].count = 100
    before["A.b"].latencies.clear()
    after = stats.snapshot()["A.b"]
    assert after.count == sum(after.latencies.values()) == 2


def test_threads() -> None:
    stats = Stats()
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait(10)
        for _ in range(2000):
            stats.record("A.b", 1.0, 2, 3, False)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    found = stats.snapshot()["A.b"]
    assert (found.count, found.seconds, found.sent, found.received) == (16_000, 16_000.0, 32_000, 48_000)
    assert sum(found.latencies.values()) == 16_000


# -- How long calls take -------------------------------------------------------------------------------------------------


def figures(times: Sequence[float]) -> MethodStats:
    stats = Stats()
    for seconds in times:
        stats.record("A.b", seconds, 0, 0, False)
    return stats.snapshot()["A.b"]


@pytest.mark.parametrize("count", [1, 2, BATCH - 1, BATCH, BATCH + 1, 1000])
def test_quantiles_are_right_within_a_few_percent(count: int) -> None:
    times = [1e-6 * 1.03**number for number in range(count)]  # From 1 µs: a thousand of them go beyond any call.
    mixed = times.copy()
    random.Random(count).shuffle(mixed)
    found = figures(mixed)
    for q in (0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 1.0):
        exact = times[max(0, math.ceil(q * count) - 1)]
        assert found.quantile(q) == pytest.approx(exact, rel=0.032), q


def test_no_quantile_is_above_the_longest_call() -> None:
    found = figures([1.0, 1.0 + 1e-9])
    assert found.quantile(0.5) == found.quantile(1.0) == found.max_seconds


def test_calls_that_take_no_time() -> None:
    assert figures([0.0, 0.0, 3.0]).quantile(0.5) == pytest.approx(0.0)


def test_there_is_no_quantile_of_no_calls() -> None:
    assert MethodStats().quantile(0.5) is None


def test_what_two_have_counted_adds_up() -> None:
    one = figures([0.001] * 98)
    other = pickle.loads(pickle.dumps(figures([1.0, 5.0])))
    one.add(other)
    assert (one.count, one.seconds, one.max_seconds) == (100, pytest.approx(6.098), 5.0)
    assert one.quantile(0.5) == pytest.approx(0.001, rel=0.032)
    assert one.quantile(0.99) == pytest.approx(1.0, rel=0.032)
    assert one.quantile(1.0) == pytest.approx(5.0, rel=0.032)
    assert other.quantile(0.5) == pytest.approx(1.0, rel=0.032)


def test_they_take_little_room() -> None:
    times = random.Random(1)
    found = figures([times.lognormvariate(-7, 2) for _ in range(20_000)])  # From microseconds to seconds.
    assert len(pickle.dumps(found)) < 4000
    assert len(pickle.dumps(figures([1e-4] * 10_000))) < 400
