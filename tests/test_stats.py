"""Figures per method."""

from __future__ import annotations

import threading

from bigmachine.rpc.stats import MethodStats, Stats


def test_sums_and_maxima() -> None:
    stats = Stats()
    stats.record("A.b", 1.0, 10, 1000, False)
    stats.record("A.b", 3.0, 5, 2000, True)
    stats.record("A.b", 2.0, 20, 500, False)
    stats.record("A.c", 0.5, 0, 0, True)
    assert stats.snapshot() == {
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
    assert stats.snapshot()["A.b"].count == 2


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
