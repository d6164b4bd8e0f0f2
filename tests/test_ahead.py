"""Reading ahead of a slow consumer: nothing is lost, and the order stays."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from bigmachine.logs.ahead import Ahead

SOON = 30.0


def test_it_reads_no_further_than_it_is_asked_to() -> None:
    source = iter(range(5))
    ahead = Ahead(source)
    assert [next(ahead), next(ahead)] == [0, 1]
    assert next(source) == 2
    assert list(ahead) == [3, 4]
    assert list(ahead) == []


def test_the_rest_is_read_while_the_consumer_is_busy() -> None:
    source = iter(range(1000))
    ahead = Ahead(source)
    assert next(ahead) == 0
    ahead.rest()
    assert next(source, None) is None
    assert list(ahead) == list(range(1, 1000))


def test_an_error_comes_when_the_consumer_gets_there() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ConnectionResetError("by peer")

    ahead = Ahead(items())
    ahead.rest()
    assert [next(ahead), next(ahead)] == [1, 2]
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            next(ahead)


def test_two_read_at_once() -> None:
    for _ in range(20):
        ahead = Ahead(iter(range(2000)))
        other = threading.Thread(target=ahead.rest)
        other.start()
        assert list(ahead) == list(range(2000))
        other.join(SOON)
