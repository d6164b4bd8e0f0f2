"""retry.py: the delays, with a random source that is not."""

from __future__ import annotations

import itertools
import random

import pytest

from bigmachine.errors import UsageError
from bigmachine.retry import Backoff


def never() -> float:
    """A random source that takes nothing off a delay."""
    return 0.0


def test_delays_double_up_to_the_ceiling() -> None:
    backoff = Backoff(first=0.1, factor=2.0, ceiling=0.5, attempts=6)
    assert list(backoff.delays(never)) == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])


@pytest.mark.parametrize(("attempts", "delays"), [(1, 0), (2, 1), (5, 4)])
def test_n_attempts_have_one_delay_less(attempts: int, delays: int) -> None:
    assert len(list(Backoff(attempts=attempts).delays(never))) == delays


def test_the_delays_add_up_to_the_limit() -> None:
    delays = list(Backoff(first=1.0, limit=10.0).delays(never))
    assert delays == [1.0, 2.0, 4.0, 3.0]


def test_whichever_bound_comes_first_ends_it() -> None:
    assert list(Backoff(first=1.0, limit=100.0, attempts=3).delays(never)) == [1.0, 2.0]
    assert list(Backoff(first=1.0, limit=1.5, attempts=30).delays(never)) == [1.0, 0.5]


def test_jitter_shortens_a_delay_by_at_most_its_share() -> None:
    drawn = random.Random(1)
    backoff = Backoff(first=2.0, factor=1.0, ceiling=2.0, jitter=0.5, limit=None, attempts=1000)
    delays = list(backoff.delays(drawn.random))
    assert 1.0 < min(delays) < 1.05
    assert 1.95 < max(delays) <= 2.0


def test_a_policy_can_be_used_again() -> None:
    backoff = Backoff(attempts=4)
    assert list(backoff.delays(never)) == list(backoff.delays(never))


def test_it_does_not_overflow() -> None:
    delays = Backoff(factor=1e300, limit=None, attempts=10_000).delays(never)
    assert list(itertools.islice(delays, 5000))[-1] == 5.0


@pytest.mark.parametrize(
    "fields",
    [
        {"attempts": None, "limit": None},
        {"first": 0.0},
        {"first": 9.0, "ceiling": 1.0},
        {"factor": 0.5},
        {"jitter": 1.5},
    ],
)
def test_a_policy_that_cannot_work_is_refused(fields: dict[str, float | None]) -> None:
    with pytest.raises(UsageError):
        Backoff(**fields)  # type: ignore[arg-type]
