"""Client and server together, over real TLS: every kind of call, and every way in which one can end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import json
import os
import pickle
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import weakref
from base64 import b64decode
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import IO, Any

import h2.config
import h2.connection
import h2.events
import numpy as np
import pytest
from rpc_pair import CLIENT_CONTEXT, DRIVER, MACHINE, NAME, SERVER_CONTEXT, SOON, Listener, Pair, until

from bigmachine.authority import Authority
from bigmachine.credentials import Credentials, Role, client_context
from bigmachine.errors import (
    BadArguments,
    BigmachineError,
    CallRefused,
    CallTimeout,
    Forbidden,
    NotPicklable,
    RemoteError,
    UnknownMethod,
    Unreachable,
    UsageError,
)
from bigmachine.rpc import server as server_module
from bigmachine.rpc import transport as transport_module
from bigmachine.rpc.calls import Call
from bigmachine.rpc.client import Client
from bigmachine.rpc.connection import STREAM_WINDOW, Connection
from bigmachine.rpc.methods import call_context
from bigmachine.rpc.reactor import Reactor
from bigmachine.rpc.streams import Stream
from bigmachine.rpc.transport import OUTBOX_HIGH

LARGE = 8 << 20


class Custom(Exception):
    """An exception with a type of its own."""


class Bomb:
    """Sets a flag where it is unpickled."""

    exploded = threading.Event()

    def __reduce__(self) -> Any:
        return _explode, ()


def _explode() -> None:
    Bomb.exploded.set()


class Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("it holds a socket")


class Service:
    """What is served."""

    def __init__(self) -> None:
        self.started = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.ended: list[str] = []
        self.changed = threading.Condition()
        self.produced = 0
        self.running = 0
        self.most_running = 0
        self.other: Client | None = None

    def _note(self, what: str) -> None:
        with self.changed:
            self.ended.append(what)
            self.changed.notify_all()

    def _wait_for_note(self, what: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: what in self.ended, SOON), self.ended

    # Plain methods.

    def echo(self, value: Any = None, *, twice: bool = False) -> Any:
        return (value, value) if twice else value

    def add(self, a: int, b: int) -> int:
        return a + b

    def fail(self, message: str) -> None:
        raise Custom(message)

    def type_error(self, value: Any) -> None:
        len(value)  # Raises below this frame for an int, with the traceback ending here.

    def deeper_type_error(self) -> None:
        self.add(1)  # type: ignore[call-arg]

    def exit(self) -> None:
        raise SystemExit("it would end the process")

    def unpicklable(self) -> Any:
        return [1, Unpicklable()]

    def wait(self) -> str:
        """Until told; then says whether it was cancelled meanwhile."""
        self.started.release()
        self.go_on.wait(SOON)
        return "cancelled" if call_context().cancelled else "not cancelled"

    def watch_cancellation(self) -> None:
        self.started.release()
        deadline = time.monotonic() + SOON
        while not call_context().cancelled and time.monotonic() < deadline:
            time.sleep(0.001)
        self._note("saw it" if call_context().cancelled else "never")

    def hold(self, data: Any) -> int:
        self.started.release()
        self.go_on.wait(SOON)
        return len(data)

    def context(self) -> tuple[str, str, float | None]:
        context = call_context()
        return context.method, context.caller, context.remaining

    def gated(self) -> int:
        with self.changed:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        time.sleep(0.002)  # Long enough for others to try.
        with self.changed:
            self.running -= 1
        return self.most_running

    def gated_wait(self) -> None:
        self.started.release()
        self.go_on.wait(SOON)
        self._note("gated")

    def make(self, n: int) -> bytes:
        return bytes(n)

    def array(self, n: int) -> Any:
        return np.arange(n, dtype=np.uint8)

    def total(self, array: Any) -> tuple[int, bool]:
        writable = array.flags.writeable
        array[0] = 1
        return int(array.sum(dtype=np.int64)), writable

    def call_other(self, depth: int) -> int:
        if not depth:
            return 0
        assert self.other is not None
        return 1 + int(self.other.call("T.call_other", (depth - 1,), {}, SOON))

    # async def.

    async def async_echo(self, value: Any) -> Any:
        await asyncio.sleep(0)
        return value

    async def async_fail(self) -> None:
        await asyncio.sleep(0)
        raise Custom("async")

    async def async_wait(self) -> None:
        self.started.release()
        try:
            await asyncio.sleep(SOON)
        except asyncio.CancelledError:
            self._note("cancelled")
            raise

    async def async_context(self) -> str:
        await asyncio.sleep(0)
        return call_context().method

    async def async_read(self, file: IO[bytes]) -> int:
        return len(await asyncio.to_thread(file.read))

    # Generators.

    def count(self, n: int) -> Iterator[int]:
        for i in range(n):
            self.produced += 1
            yield i

    def items(self, values: list[Any]) -> Iterator[Any]:
        yield from values

    def blocks(self, n: int, size: int) -> Iterator[bytes]:
        try:
            for i in range(n):
                with self.changed:
                    self.produced += 1
                    self.changed.notify_all()
                yield bytes([i % 256]) * size
        finally:
            self._note("closed")

    def two_then_fail(self) -> Iterator[int]:
        yield 1
        yield 2
        raise Custom("after two")

    def fail_at_once(self) -> Iterator[int]:
        raise Custom("before the first")
        yield 1

    def long_failure(self) -> Iterator[int]:
        yield 1
        raise Custom("x" * 100_000)

    def unpicklable_item(self) -> Iterator[Any]:
        yield 1
        yield Unpicklable()

    def slow_items(self) -> Iterator[int]:
        yield 1
        self.go_on.wait(SOON)
        yield 2

    async def async_count(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            await asyncio.sleep(0)
            yield i

    async def async_forever(self) -> AsyncIterator[int]:
        try:
            yield 1
            self.started.release()
            await asyncio.sleep(SOON)
            yield 2
        except asyncio.CancelledError:
            self._note("cancelled")
            raise
        except GeneratorExit:
            self._note("generator exit")
            raise

    async def async_timeouts(self) -> AsyncIterator[int]:
        async with asyncio.timeout(SOON):  # Which must be left in the task that entered it.
            yield 1
            yield 2

    async def async_two_then_fail(self) -> AsyncIterator[int]:
        yield 1
        raise Custom("async generator")

    # Streams.

    def read(self, name: str, file: IO[bytes]) -> tuple[str, int]:
        return name, len(file.read())

    def read_some(self, n: int, file: IO[bytes]) -> bytes:
        return file.read(n)

    def read_slowly(self, file: IO[bytes]) -> int:
        size = len(file.read(10))
        self.started.release()
        self.go_on.wait(SOON)
        return size + len(file.read())

    def read_error(self, file: IO[bytes]) -> None:
        self.started.release()
        try:
            file.read()
        except OSError as error:
            self._note(type(error).__name__)
            raise

    def ignore(self, file: IO[bytes]) -> str:
        return "did not read it"

    def fail_with_stream(self, file: IO[bytes]) -> None:
        raise Custom("would not read it")

    def double(self, file: IO[bytes]) -> Iterator[bytes]:
        for line in file:
            yield line * 2


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def pair(service: Service, capfd: pytest.CaptureFixture[str]) -> Iterator[Pair]:
    pair = Pair(service, gated=frozenset({"gated", "gated_wait"}))
    yield pair
    service.go_on.set()
    pair.close()
    noise = capfd.readouterr().err
    assert "please report it" not in noise, noise


# -- Kinds of methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 1, "ü", [1, {"a": (2.5, b"x")}], b"y" * 100, {1, 2}])
def test_plain_method(pair: Pair, value: Any) -> None:
    assert pair.call("echo", value) == value
    assert pair.call("echo", value, twice=True) == (value, value)
    assert pair.call("echo") is None
    assert pair.submit("echo", value).result(SOON) == value


def test_exception_has_its_own_type_and_the_remote_traceback(pair: Pair) -> None:
    for call in (lambda: pair.call("fail", "why"), lambda: pair.submit("fail", "why").result(SOON)):
        with pytest.raises(Custom, match="why") as failure:
            call()
        assert "in fail" in str(failure.value.__cause__)
        assert failure.value.__notes__ == ["raised on the machine by T.fail"]
    assert isinstance(pair.submit("fail", "why").exception(SOON), Custom)


def test_exit_of_a_method_is_an_exception_of_the_call(pair: Pair) -> None:
    with pytest.raises(RemoteError, match="SystemExit"):
        pair.call("exit")
    assert pair.call("add", 1, 2) == 3


def test_async_method(pair: Pair) -> None:
    assert pair.call("async_echo", 5) == 5
    assert pair.call("async_context") == "T.async_context"
    with pytest.raises(Custom, match="async") as failure:
        pair.call("async_fail")
    assert "in async_fail" in str(failure.value.__cause__)
    calls = [pair.submit("async_echo", i) for i in range(200)]
    assert [call.result(SOON) for call in calls] == list(range(200))


def test_async_method_with_large_arguments(pair: Pair) -> None:
    data = os.urandom(1 << 20)
    assert pair.call("async_echo", data) == data
    with pytest.raises(BadArguments, match="signature"):
        pair.call("async_echo", data, data)


@pytest.mark.parametrize("method", ["count", "async_count"])
def test_generator(pair: Pair, method: str) -> None:
    assert list(pair.stream(method, 100)) == list(range(100))
    assert list(pair.stream(method, 0)) == []
    stream = pair.stream(method, 1)
    assert next(stream) == 0
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(stream)


def test_async_generator_runs_in_one_task(pair: Pair) -> None:
    assert list(pair.stream("async_timeouts")) == [1, 2]


def test_items_of_all_sizes(pair: Pair) -> None:
    values = [b"", None, b"x" * 100_000, np.arange(300_000), "text", np.zeros(0), [np.ones(5000), np.ones(5000)]]
    found = list(pair.stream("items", values))
    assert len(found) == len(values)
    assert found[2] == values[2]
    assert (found[3] == values[3]).all()
    assert found[3].flags.writeable
    assert found[6][1].sum() == 5000


def test_generator_and_call_are_not_mixed_up(pair: Pair) -> None:
    with pytest.raises(BadArguments, match="call it with `stream`"):
        pair.call("count", 3)
    with pytest.raises(BadArguments, match="call it with `stream`"):
        pair.call("items", bytes(100_000))
    with pytest.raises(BadArguments, match="does not yield"):
        list(pair.stream("add", 1, 2))


def test_gated_methods_run_one_at_a_time(pair: Pair) -> None:
    calls = [pair.submit("gated") for _ in range(20)]
    assert [call.result(SOON) for call in calls] == [1] * 20
    assert pair.call("gated") == 1


def test_gated_method_does_not_hold_up_others(pair: Pair, service: Service) -> None:
    calls = [pair.submit("gated_wait") for _ in range(3)]
    assert service.started.acquire(timeout=SOON)
    assert pair.call("add", 1, 2) == 3
    service.go_on.set()
    for call in calls:
        call.result(SOON)


def test_slow_method_does_not_hold_up_others(pair: Pair, service: Service) -> None:
    slow = [pair.submit("wait") for _ in range(5)]
    assert pair.call("add", 1, 2) == 3
    for _ in range(5):
        assert service.started.acquire(timeout=SOON)
    assert not any(call.done() for call in slow)
    service.go_on.set()
    assert [call.result(SOON) for call in slow] == ["not cancelled"] * 5


def test_context(pair: Pair) -> None:
    assert pair.call("context", timeout=None) == ("T.context", "driver driver", None)
    method, caller, remaining = pair.call("context", timeout=5.0)
    assert (method, caller) == ("T.context", "driver driver")
    assert 0 < remaining <= 5.0
    with pytest.raises(UsageError):
        call_context()


def test_await(pair: Pair) -> None:
    async def main() -> list[int]:
        return await asyncio.gather(*[pair.submit("add", i, 1) for i in range(50)])

    assert asyncio.run(main()) == list(range(1, 51))


# -- Large things ----------------------------------------------------------------------------------------------------


def test_large_array_as_argument(pair: Pair) -> None:
    array = np.arange(LARGE, dtype=np.uint8)
    total = int(array.sum(dtype=np.int64))
    assert pair.call("total", array) == (total + 1, True)
    assert array[0] == 0  # The caller's own is as it was.
    assert pair.submit("total", array).result(SOON) == (total + 1, True)


def test_large_array_as_reply(pair: Pair) -> None:
    for array in (pair.call("array", LARGE), pair.submit("array", LARGE).result(SOON)):
        assert (array == np.arange(LARGE, dtype=np.uint8)).all()
        array[:] = 7


def test_large_both_ways_at_once(pair: Pair) -> None:
    arrays = [np.full(LARGE // 4, i, dtype=np.uint8) for i in range(6)]
    calls: list[Any] = [None] * 6

    def work(i: int) -> None:
        calls[i] = pair.call("echo", arrays[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    assert pair.call("add", 1, 2) == 3
    for thread in threads:
        thread.join(SOON)
    for array, found in zip(arrays, calls, strict=True):
        assert (array == found).all()


@pytest.mark.parametrize("size", [65_000, 65_530, 65_536, 65_537, 70_000, 262_144, 262_145])
def test_around_the_limits_of_the_channel(pair: Pair, size: int) -> None:
    data = os.urandom(size)
    assert pair.call("echo", data) == data
    assert pair.call("make", size) == bytes(size)


def test_many_buffers(pair: Pair) -> None:
    arrays = [np.full(5000, i) for i in range(400)]
    found = pair.call("echo", arrays)
    assert all((a == b).all() for a, b in zip(arrays, found, strict=True))
    small = [np.full(600, i, dtype=np.float64) for i in range(10)]
    found = pair.call("echo", small)
    for array in found:
        array += 1


def test_large_messages_on_the_channel_do_not_mix(pair: Pair) -> None:
    """More than a window of them, from many threads: whoever has to wait for it must not send a message in pieces."""
    data = [bytes([i]) * 60_000 for i in range(16)]
    failures: list[object] = []

    def work(i: int) -> None:
        for _ in range(20):
            if pair.call("echo", data[i]) != data[i]:
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert not failures
    calls = [pair.submit("echo", data[i % 16]) for i in range(200)]  # 12 MB, no reply of which is waited for.
    assert all(call.result(SOON) == data[i % 16] for i, call in enumerate(calls))


def test_slow_calls_do_not_use_up_the_window_for_good(pair: Pair, service: Service) -> None:
    """Each takes up part of the channel's window while it arrives, not while it runs."""
    calls = [pair.submit("hold", bytes(14_000)) for _ in range(STREAM_WINDOW // 14_000 + 20)]
    assert pair.call("add", 1, 2) == 3
    service.go_on.set()
    assert {call.result(SOON) for call in calls} == {14_000}


# -- Refusals --------------------------------------------------------------------------------------------------------


def test_unknown_method_says_what_exists(pair: Pair) -> None:
    for call in (
        lambda: pair.call("nothing"),
        lambda: pair.submit("nothing").result(SOON),
        lambda: pair.call("nothing", bytes(100_000)),
        lambda: next(pair.stream("nothing")),
    ):
        with pytest.raises(UnknownMethod, match=r"no method 'T.nothing'; it has T\.add, ") as failure:
            call()
        assert failure.value.method == "T.nothing"


def test_long_name(pair: Pair) -> None:
    with pytest.raises(UnknownMethod, match="255 bytes"):
        pair.call("x" * 300)
    assert pair.call("add", 1, 2) == 3


@pytest.mark.parametrize("padding", [b"", bytes(100_000)])
def test_bad_arguments_say_the_signature(pair: Pair, padding: bytes) -> None:
    with pytest.raises(BadArguments, match=r"its signature is \(a: 'int', b: 'int'\) -> 'int'") as failure:
        pair.call("add", padding)
    assert failure.value.method == "T.add"
    with pytest.raises(BadArguments, match="'c'"):
        pair.call("add", 1, 2, c=padding)
    with pytest.raises(BadArguments, match="signature"):
        pair.call("async_context", padding)
    with pytest.raises(BadArguments, match="signature"):
        list(pair.stream("count", padding, 2, 3))


def test_type_errors_of_the_method_itself_stay_type_errors(pair: Pair) -> None:
    with pytest.raises(TypeError, match="has no len"):
        pair.call("type_error", 5)
    with pytest.raises(TypeError, match="missing 1 required") as failure:
        pair.call("deeper_type_error")
    assert not isinstance(failure.value, BigmachineError)


def test_nothing_is_sent_of_what_does_not_pickle(pair: Pair) -> None:
    pair.call("add", 1, 2)
    before = pair.client.stats.snapshot()
    with pytest.raises(NotPicklable, match=r"argument 2 of T\.add: it holds a socket"):
        pair.call("add", 1, Unpicklable())
    with pytest.raises(NotPicklable):
        pair.submit("add", 1, Unpicklable())
    with pytest.raises(NotPicklable):
        pair.stream("count", Unpicklable())
    assert pair.client.stats.snapshot() == before


def test_reply_that_does_not_pickle(pair: Pair) -> None:
    with pytest.raises(NotPicklable, match=r"the reply of T\.unpicklable: it holds a socket \(at \[1\]\)"):
        pair.call("unpicklable")
    with pytest.raises(NotPicklable, match="an item of"):
        list(pair.stream("unpicklable_item"))


def test_arguments_that_cannot_be_decoded(pair: Pair) -> None:
    class Local:
        def __reduce__(self) -> Any:
            return int, ("not a number",)

    with pytest.raises(BadArguments, match="cannot be decoded: invalid literal"):
        pair.call("echo", Local())
    with pytest.raises(BadArguments, match="cannot be decoded: invalid literal"):
        pair.call("echo", [Local(), bytes(100_000)])


@pytest.mark.parametrize("padding", [b"", bytes(100_000)])
def test_nothing_is_unpickled_for_who_may_not_call(pair: Pair, padding: bytes) -> None:
    pair.handler.refuse = Forbidden("T.echo", "only the session's driver may call it")
    Bomb.exploded.clear()
    for call in (lambda: pair.call("echo", Bomb(), padding), lambda: next(pair.stream("echo", Bomb(), padding))):
        with pytest.raises(Forbidden, match="only the session's driver"):
            call()
    assert not Bomb.exploded.is_set()
    pair.handler.refuse = None
    pair.call("echo", Bomb())
    assert Bomb.exploded.is_set()  # It does work.


def test_refusal_of_a_nested_call_is_not_that_of_the_call(pair: Pair, service: Service) -> None:
    """The outer call ran: that must not look as if it had not."""
    service.other = pair.new_client()
    pair.handler.methods["T.nested"] = pair.handler.methods["T.echo"].__class__(
        "T.nested", pair.handler.methods["T.echo"].kind, lambda: service.other.call("T.nothing", (), {}, SOON)  # type: ignore[union-attr]
    )
    with pytest.raises(UnknownMethod) as failure:
        pair.call("nested")
    assert failure.value.method == "T.nothing"
    assert "raised on the machine by T.nested" in failure.value.__notes__
    assert failure.value.__cause__ is not None


# -- Byte streams ----------------------------------------------------------------------------------------------------


def test_stream_argument(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3_000_000))
    with path.open("rb") as file:
        assert pair.call("read", "name", Stream(file)) == ("name", 3_000_000)
    assert pair.call("read", "n", Stream([])) == ("n", 0)
    assert pair.call("read", "n", file=Stream([b"a", bytearray(b"b"), b"", memoryview(b"c")])) == ("n", 3)
    assert pair.submit("read", bytes(100_000), Stream([b"abc"])).result(SOON) == (bytes(100_000), 3)
    assert pair.call("async_read", Stream([b"abc"] * 1000)) == 3000


def test_stream_argument_and_items_at_the_same_time(pair: Pair) -> None:
    assert list(pair.stream("double", Stream([b"one\ntw", b"o\n"]))) == [b"one\none\n", b"two\ntwo\n"]


def test_stream_to_a_slow_reader_waits_for_it(pair: Pair, service: Service) -> None:
    taken = 0
    changed = threading.Condition()

    def source() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(16):
            with changed:
                taken += 1
                changed.notify_all()
            yield bytes(1 << 20)

    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(pair.call("read_slowly", Stream(source()))))
    thread.start()
    assert service.started.acquire(timeout=SOON)
    pair_connection = pair.client._connection
    assert pair_connection is not None
    until(lambda: pair_connection.transport._writers, "nobody waits for the window")
    assert taken <= STREAM_WINDOW // (1 << 20) + 2
    assert pair.call("add", 1, 2) == 3  # Others get through.
    service.go_on.set()
    thread.join(SOON)
    assert found == [16 << 20]


def test_source_that_raises(pair: Pair, service: Service) -> None:
    def source() -> Iterator[bytes]:
        yield b"some"
        assert service.started.acquire(timeout=SOON)
        raise Custom("no more")

    with pytest.raises(Custom, match="no more"):
        pair.call("read_error", Stream(source()))
    service._wait_for_note("ConnectionError")
    assert pair.call("add", 1, 2) == 3


def test_source_that_yields_no_bytes(pair: Pair) -> None:
    with pytest.raises(TypeError):
        pair.call("read", "n", Stream(["text"]))  # type: ignore[list-item]
    assert pair.call("add", 1, 2) == 3


@pytest.mark.parametrize("method", ["ignore", "fail_with_stream"])
def test_stream_that_nobody_reads(pair: Pair, method: str) -> None:
    """More than its window: the sender must learn that there is no use in waiting."""
    taken = 0

    def source() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(64):
            taken += 1
            yield bytes(1 << 20)

    if method == "ignore":
        assert pair.call(method, Stream(source())) == "did not read it"
    else:
        with pytest.raises(Custom, match="would not read it"):
            pair.call(method, Stream(source()))
    assert taken < 16
    assert pair.call("add", 1, 2) == 3


def test_one_stream_a_call(pair: Pair) -> None:
    with pytest.raises(UsageError, match="one argument of a call can be a Stream, not 2"):
        pair.call("echo", [Stream([]), Stream([])])


def test_stream_with_a_timeout_does_not_outlast_it(pair: Pair, service: Service) -> None:
    started = time.monotonic()
    with pytest.raises(CallTimeout):
        pair.call("read_slowly", Stream(bytes(1 << 20) for _ in range(16)), timeout=0.2)
    assert time.monotonic() - started < SOON / 2
    assert pair.call("add", 1, 2) == 3


# -- Streams of items ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["two_then_fail", "async_two_then_fail"])
def test_exception_in_mid_stream(pair: Pair, method: str) -> None:
    stream = pair.stream(method)
    assert next(stream) == 1
    with pytest.raises(Custom) as failure:
        list(stream)
    assert f"in {method}" in str(failure.value.__cause__)
    with pytest.raises(StopIteration):
        next(stream)


def test_exception_before_the_first_item(pair: Pair) -> None:
    with pytest.raises(Custom, match="before the first"):
        next(pair.stream("fail_at_once"))


def test_exception_that_does_not_fit_a_trailer_is_cut(pair: Pair) -> None:
    stream = pair.stream("long_failure")
    assert next(stream) == 1
    with pytest.raises((Custom, RemoteError), match="xxx"):
        next(stream)
    assert pair.call("add", 1, 2) == 3


def test_consumer_that_stops_stops_the_producer(pair: Pair, service: Service) -> None:
    size = 100_000
    with pair.stream("blocks", 1000, size) as stream:
        assert next(stream)[0] == 0
        connection = pair.server_connection()
        until(lambda: connection.transport._writers, "the producer does not wait")
        ahead = service.produced
        assert ahead * size <= STREAM_WINDOW + 3 * size
        assert pair.call("add", 1, 2) == 3  # The connection is free for others, though a sender waits at the far end.
        assert pair.submit("add", 1, 2).result(SOON) == 3
        for i in range(1, 100):
            assert next(stream)[0] == i % 256
        assert service.produced > ahead
    service._wait_for_note("closed")
    assert service.produced < 1000


def test_calls_are_served_while_a_producer_waits(pair: Pair, service: Service) -> None:
    """The thread that waits for a window at the server's end must never be the one that reads: it runs no calls."""
    with pair.stream("blocks", 1000, 100_000) as stream:
        next(stream)
        connection = pair.server_connection()
        until(lambda: connection.transport._writers)
        for i in range(200):
            assert pair.call("add", i, 2) == i + 2
            assert pair.call("async_echo", i) == i


@pytest.mark.parametrize("end", ["close", "with", "break", "delete"])
def test_closing_the_iterator_closes_the_generator(pair: Pair, service: Service, end: str) -> None:
    stream = pair.stream("blocks", 1000, 100_000)
    next(stream)
    if end == "close":
        stream.close()
        stream.close()
        assert list(stream) == []
    elif end == "with":
        with stream:
            pass
    elif end == "break":
        with stream:
            for _ in stream:
                break
    else:
        cycle = [stream]
        cycle.append(cycle)  # type: ignore[arg-type]
        del stream, cycle
        gc.collect()
    service._wait_for_note("closed")
    assert pair.call("add", 1, 2) == 3


def test_closing_the_iterator_of_an_async_generator(pair: Pair, service: Service) -> None:
    stream = pair.stream("async_forever")
    assert next(stream) == 1
    assert service.started.acquire(timeout=SOON)
    stream.close()  # It waits for what will not come: a cancellation is what reaches it.
    service._wait_for_note("cancelled")


def test_close_from_another_thread_ends_the_iteration(pair: Pair, service: Service) -> None:
    stream = pair.stream("slow_items", timeout=None)
    assert next(stream) == 1
    found: list[list[int]] = []
    thread = threading.Thread(target=lambda: found.append(list(stream)))
    thread.start()
    until(lambda: stream._exchange.pending.done is False)
    stream.close()
    thread.join(SOON)
    assert found == [[]]


def test_timeout_of_a_stream(pair: Pair) -> None:
    stream = pair.stream("slow_items", timeout=0.1)
    assert next(stream) == 1
    with pytest.raises(CallTimeout):
        next(stream)
    assert pair.call("add", 1, 2) == 3


def test_deadline_of_a_stream_never_looks_like_its_end(pair: Pair) -> None:
    for _ in range(3):
        with pytest.raises(CallTimeout):
            for _ in pair.stream("count", 10**9, timeout=0.05):
                pass


def test_many_streams_at_once(pair: Pair) -> None:
    """More than a connection may have: the others wait for a place."""
    found: list[int] = []

    def work() -> None:
        for _ in range(10):
            found.append(sum(pair.stream("count", 5)))

    threads = [threading.Thread(target=work) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert found == [10] * 120


def test_no_place_for_another_stream(pair: Pair) -> None:
    assert pair.call("add", 1, 2) == 3
    connection = pair.client._connection
    assert connection is not None
    for _ in range(250):
        assert connection._slots.acquire(blocking=False)
    streams = [pair.stream("slow_items") for _ in range(5)]
    assert pair.call("add", 1, 2) == 3
    with pytest.raises(Unreachable, match="255 large calls") as failure:
        pair.stream("slow_items", timeout=0.05)
    assert not failure.value.sent
    streams.pop().close()
    assert list(pair.stream("count", 3)) == [0, 1, 2]
    for stream in streams:
        stream.close()
    connection._slots.release(250)


# -- Cancellation and deadlines --------------------------------------------------------------------------------------


def test_cancel_of_a_running_plain_call(pair: Pair, service: Service) -> None:
    call = pair.submit("watch_cancellation")
    assert service.started.acquire(timeout=SOON)
    assert call.cancel()
    assert call.cancelled()
    assert call.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        call.result(SOON)
    service._wait_for_note("saw it")


def test_cancel_of_a_running_async_call(pair: Pair, service: Service) -> None:
    call = pair.submit("async_wait")
    assert service.started.acquire(timeout=SOON)
    assert call.cancel()
    service._wait_for_note("cancelled")
    assert pair.call("add", 1, 2) == 3


def test_cancel_of_a_large_async_call(pair: Pair, service: Service) -> None:
    pair.handler.methods["T.large_wait"] = pair.handler.methods["T.async_wait"].__class__(
        "T.large_wait", pair.handler.methods["T.async_wait"].kind, _ignoring(service.async_wait)
    )
    call = pair.submit("large_wait", bytes(100_000))
    assert service.started.acquire(timeout=SOON)
    assert call.cancel()
    service._wait_for_note("cancelled")


def _ignoring(function: Any) -> Any:
    async def method(_: object) -> Any:
        return await function()

    return method


def test_cancel_of_a_queued_call(pair: Pair, service: Service) -> None:
    first = pair.submit("gated_wait")
    assert service.started.acquire(timeout=SOON)
    queued = [pair.submit("gated_wait") for _ in range(3)]
    pair.call("add", 1, 2)  # All are there.
    assert queued[1].cancel()
    pair.call("add", 1, 2)
    service.go_on.set()
    for call in (first, queued[0], queued[2]):
        call.result(SOON)
    assert service.ended == ["gated"] * 3


def test_cancel_wakes_whoever_waits_for_the_result(pair: Pair, service: Service) -> None:
    """Also the thread that reads the connection while it waits: nothing will come over it."""
    call = pair.submit("wait")
    assert service.started.acquire(timeout=SOON)
    found: list[BaseException] = []

    def wait() -> None:
        try:
            call.result()
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    connection = pair.client._connection
    assert connection is not None
    until(lambda: connection.transport._reading)
    assert call.cancel()
    for thread in threads:
        thread.join(SOON)
    assert [type(error) for error in found] == [concurrent.futures.CancelledError] * 3


def test_timeout_wakes_whoever_waits_for_the_result(pair: Pair, service: Service) -> None:
    call = pair.submit("wait", timeout=0.1)
    started = time.monotonic()
    with pytest.raises(CallTimeout):
        call.result()
    assert time.monotonic() - started < SOON / 2
    other = pair.submit("wait")
    with pytest.raises(TimeoutError):
        other.result(0.01)  # That of waiting: the call goes on.
    service.go_on.set()
    assert other.result(SOON) == "not cancelled"


@pytest.mark.parametrize("padding", [(), (bytes(100_000),)])
def test_timeout(pair: Pair, service: Service, padding: tuple[bytes, ...]) -> None:
    method = "hold" if padding else "wait"
    for call in (
        lambda: pair.call(method, *padding, timeout=0.05),
        lambda: pair.submit(method, *padding, timeout=0.05).result(),
        lambda: pair.submit(method, *padding, timeout=0.05).exception(),
    ):
        try:
            error = call()
        except CallTimeout as raised:
            error = raised
        assert isinstance(error, CallTimeout)
        assert isinstance(error, TimeoutError)
        assert str(error) == f"T.{method} on the machine: no answer within 0.05 s; cancelled there"
    assert pair.call("add", 1, 2) == 3  # The connection is as good as ever.


def test_timeout_cancels_there(pair: Pair, service: Service) -> None:
    with pytest.raises(CallTimeout):
        pair.call("watch_cancellation", timeout=0.05)
    service._wait_for_note("saw it")
    with pytest.raises(CallTimeout):
        pair.call("async_wait", timeout=0.05)
    service._wait_for_note("cancelled")


def test_deadline_crosses_the_wire(pair: Pair) -> None:
    for padding in ((), (bytes(100_000),)):
        pair.handler.methods["T.remaining"] = pair.handler.methods["T.echo"].__class__(
            "T.remaining", pair.handler.methods["T.echo"].kind, lambda *_: call_context().remaining
        )
        assert 4 < pair.call("remaining", *padding, timeout=5.0) <= 5
        assert pair.call("remaining", *padding, timeout=None) is None


def test_end_of_the_connection_cancels(pair: Pair, service: Service) -> None:
    client = pair.new_client()
    for method in ("T.watch_cancellation", "T.async_wait"):
        call: Call[Any] = Call()
        client.submit(call, method, pair.codec.encode_call(method, (), {}), None)
        assert service.started.acquire(timeout=SOON)
    stream = client.stream("T.blocks", (1000, 100_000), {}, None)
    next(stream)
    client.close("enough")
    for note in ("saw it", "cancelled", "closed"):
        service._wait_for_note(note)
    with pytest.raises(Unreachable, match="enough"):
        list(stream)


# -- Many calls ------------------------------------------------------------------------------------------------------


def test_ten_thousand_submits_at_once(pair: Pair) -> None:
    calls = []
    most = 0
    pair.call("add", 1, 2)
    connection = pair.client._connection
    assert connection is not None
    for i in range(10_000):
        calls.append(pair.submit("add", i, 1))
        most = max(most, connection._connection.out_bytes)
    assert [call.result(SOON) for call in calls] == list(range(1, 10_001))
    assert most < OUTBOX_HIGH + 100_000
    assert not connection._pendings


def test_submits_to_who_does_not_answer_wait_for_room(pair: Pair, service: Service) -> None:
    """16 MB of calls while the server's end does not read: what is not sent is not kept."""
    pair.call("add", 1, 2)
    theirs = pair.server_connection()
    there = theirs.transport.lock
    calls: list[Call[Any]] = []
    with there:  # Whoever would read there waits for this.
        thread = threading.Thread(target=lambda: calls.extend(pair.submit("echo", bytes(16_000)) for _ in range(1000)))
        thread.start()
        connection = pair.client._connection
        assert connection is not None
        until(lambda: connection.transport._pollers or connection.transport._writers, "the caller does not wait")
        assert connection._connection.out_bytes < OUTBOX_HIGH + 100_000
    thread.join(SOON)
    assert {len(call.result(SOON)) for call in calls} == {16_000}


def test_64_threads(pair: Pair) -> None:
    failures: list[object] = []

    def work(i: int) -> None:
        try:
            for j in range(20):
                if pair.call("add", i, j, timeout=None) != i + j:
                    failures.append((i, j))
                if j % 10 == 0 and len(pair.call("make", 100_000)) != 100_000:
                    failures.append((i, j))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SOON)
        assert not thread.is_alive()
    assert not failures


def test_threads_with_and_without_timeouts(pair: Pair, service: Service) -> None:
    """Leaders that give up hand the reading on."""
    pair.call("add", 1, 2)
    failures: list[object] = []
    stop = threading.Event()

    def impatient() -> None:
        while not stop.is_set():
            try:
                pair.call("async_wait", timeout=0.002)
            except CallTimeout:
                pass
            except BaseException as error:
                failures.append(error)

    def patient() -> None:
        for i in range(100):
            if pair.call("add", i, 1, timeout=None) != i + 1:
                failures.append(i)

    threads = [threading.Thread(target=work, daemon=True) for work in [impatient] * 3 + [patient] * 3]
    for thread in threads:
        thread.start()
    for thread in threads[3:]:
        thread.join(2 * SOON)
        assert not thread.is_alive()
    stop.set()
    service.go_on.set()
    for thread in threads[:3]:
        thread.join(SOON)
    assert not failures


def test_calls_from_within_done_callbacks(pair: Pair) -> None:
    found: list[int] = []
    done = threading.Event()

    def then(call: concurrent.futures.Future[int]) -> None:
        found.append(pair.call("add", call.result(), 1, timeout=None))
        if len(found) == 200:
            done.set()

    for i in range(200):
        pair.submit("add", i, 1).add_done_callback(then)
    assert done.wait(SOON)
    assert sorted(found) == list(range(2, 202))


def test_callback_that_is_added_while_the_call_completes(pair: Pair) -> None:
    """Whenever it is added, it never runs on the thread that reads the connection: it may need it."""
    call: Call[Any] = Call()
    complete = call.set_result
    blocked: list[bool] = []
    done = threading.Event()

    def callback(_: object) -> None:
        blocked.append(pair.call("add", 1, 2, timeout=2.0) == 3)
        done.set()

    def add_first(value: object) -> None:
        call.add_done_callback(callback)
        complete(value)

    call.set_result = add_first  # type: ignore[method-assign]
    pair.client.submit(call, "T.add", pair.codec.encode_call("T.add", (1, 2), {}), None)
    assert done.wait(SOON)
    assert blocked == [True]


def test_calls_that_only_callbacks_wait_for(pair: Pair, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait for company are sent as soon as others are answered, and all answers are read: it takes no tick."""
    monkeypatch.setattr(pair.here, "linger", lambda lingering: None)  # No monitor asks anybody whether he has settled.
    done = threading.Semaphore(0)
    for _ in range(12):  # Some are sent at once; the others wait for company.
        pair.submit("wait").add_done_callback(lambda _: done.release())
    service.go_on.set()
    for _ in range(12):
        assert done.acquire(timeout=SOON)


def test_waiting_in_the_ways_of_the_standard_library(pair: Pair, service: Service) -> None:
    calls = [pair.submit("add", i, 1) for i in range(20)]
    assert {call.result() for call in concurrent.futures.as_completed(calls, SOON)} == set(range(1, 21))
    slow = pair.submit("wait")
    done, not_done = concurrent.futures.wait([slow, pair.submit("add", 1, 1)], SOON, concurrent.futures.FIRST_COMPLETED)
    assert len(done) == 1
    assert not_done == {slow}


def test_nested_calls_in_a_cycle(pair: Pair, service: Service, capfd: pytest.CaptureFixture[str]) -> None:
    """A calls B calls A …, each over the one connection that it has to the other."""
    theirs = Service()
    other = Pair(theirs)
    theirs.other = pair.new_client(MACHINE)
    service.other = other.client
    try:
        assert pair.call("call_other", 20) == 20
        calls = [pair.submit("call_other", 6) for _ in range(20)]
        assert [call.result(SOON) for call in calls] == [6] * 20
    finally:
        other.before = other.before | _all_resources()
        theirs.other.close()
        other.close()


def _all_resources() -> set[str]:
    from rpc_pair import resources

    return resources()


# -- Statistics ------------------------------------------------------------------------------------------------------


def test_stats_on_both_ends(pair: Pair) -> None:
    for _ in range(3):
        pair.call("make", 1000)
    pair.call("make", 200_000)
    pair.call("echo", bytes(200_000))
    list(pair.stream("blocks", 2, 1000))
    with pytest.raises(Custom):
        pair.call("fail", "x")
    with pytest.raises(Custom):
        list(pair.stream("two_then_fail"))
    until(lambda: "T.two_then_fail" in pair.server.stats.snapshot())
    for stats, out, back in ((pair.client.stats, "sent", "received"), (pair.server.stats, "received", "sent")):
        found = stats.snapshot()
        make = found["T.make"]
        assert (make.count, make.errors) == (4, 0)
        assert 0 < make.max_seconds <= make.seconds < SOON
        assert 203_000 < getattr(make, back) < 204_000
        assert 200_000 <= getattr(make, f"max_{back}") < 201_000
        assert getattr(make, out) < 1000
        assert 200_000 <= getattr(found["T.echo"], out) < 201_000
        assert (found["T.fail"].count, found["T.fail"].errors) == (1, 1)
        assert (found["T.two_then_fail"].count, found["T.two_then_fail"].errors) == (1, 1)
        assert found["T.blocks"].count == 1


# -- The end of connections ------------------------------------------------------------------------------------------


def ways(pair: Pair, service: Service) -> list[Call[Any]]:
    """Calls under way of each kind."""
    calls = [pair.submit("wait"), pair.submit("hold", bytes(100_000)), pair.submit("async_wait")]
    for _ in calls:
        assert service.started.acquire(timeout=SOON)
    return calls


def test_peer_that_vanishes(pair: Pair, service: Service) -> None:
    calls = ways(pair, service)
    stream = pair.stream("slow_items")
    assert next(stream) == 1
    started = time.monotonic()
    pair.server.close(abort=True)
    for call in calls:
        with pytest.raises(Unreachable, match="the call may have run") as failure:
            call.result(SOON)
        assert failure.value.sent
        assert failure.value.address == "the machine"
    with pytest.raises(Unreachable):
        next(stream)
    assert time.monotonic() - started < SOON / 2


def test_peer_that_vanishes_under_a_waiting_caller(pair: Pair, service: Service) -> None:
    found: list[BaseException] = []

    def wait() -> None:
        try:
            pair.call("wait", timeout=None)
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert service.started.acquire(timeout=SOON)
    pair.server.close(abort=True)
    for thread in threads:
        thread.join(SOON)
    assert [type(error) for error in found] == [Unreachable] * 4


def test_server_that_says_goodbye(pair: Pair, service: Service) -> None:
    calls = ways(pair, service)
    pair.server.close("machine m-0123ab has ended: it was shut down")
    for call in calls:
        with pytest.raises(Unreachable, match=r"ended: it was shut down|closed the connection"):
            call.result(SOON)
    with pytest.raises(Unreachable) as failure:
        pair.call("add", 1, 2)
    assert "the server is closed" in str(failure.value) or "closed the connection" in str(failure.value)


def test_drain_lets_calls_end_and_new_ones_reconnect(pair: Pair, service: Service) -> None:
    call = pair.submit("wait")
    large = pair.submit("hold", bytes(100_000))
    stream = pair.stream("slow_items")
    assert next(stream) == 1
    for _ in range(2):
        assert service.started.acquire(timeout=SOON)
    first = pair.client._connection
    assert first is not None
    pair.server.drain("moving")
    until(lambda: not first.usable)
    assert pair.call("add", 1, 2) == 3
    assert pair.listener.accepted == 2
    service.go_on.set()
    assert call.result(SOON) == "not cancelled"
    assert large.result(SOON) == 100_000
    assert list(stream) == [2]
    first.close("done")


def test_reconnect_on_the_next_call(pair: Pair) -> None:
    assert pair.call("add", 1, 2) == 3
    assert pair.client.connected
    pair.server_connection().transport.abort()
    until(lambda: not pair.client.connected)
    assert pair.call("add", 1, 2) == 3
    assert pair.listener.accepted == 2


def test_closed_client(pair: Pair) -> None:
    pair.call("add", 1, 2)
    pair.client.close("the session was shut down")
    with pytest.raises(Unreachable, match="the session was shut down") as failure:
        pair.call("add", 1, 2)
    assert not failure.value.sent
    pair.client.close()


def test_nobody_listens(pair: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    client = Client("127.0.0.1", port, NAME, CLIENT_CONTEXT, pair.codec, pair.here, address="nowhere")
    with pytest.raises(Unreachable, match=r"cannot connect to 127\.0\.0\.1:") as failure:
        client.call("T.add", (1, 2), {}, SOON)
    assert not failure.value.sent


def test_one_error_for_many_calls_does_not_grow(pair: Pair, service: Service) -> None:
    calls = [pair.submit("wait") for _ in range(50)]
    pair.server.close(abort=True)
    depths = []
    for call in calls:
        error = call.exception(SOON)
        assert error is not None
        depth, traceback = 0, error.__traceback__
        while traceback is not None:
            depth, traceback = depth + 1, traceback.tb_next
        depths.append(depth)
    assert max(depths) < 10


def test_explanation(pair: Pair, service: Service) -> None:
    class Died(Unreachable):
        pass

    client = pair.new_client(explain=lambda error: Died(error.address, "it ran out of memory", error.sent))
    call: Call[Any] = Call()
    client.submit(call, "T.wait", pair.codec.encode_call("T.wait", (), {}), None)
    assert service.started.acquire(timeout=SOON)
    pair.server.close(abort=True)
    with pytest.raises(Died, match="out of memory"):
        call.result(SOON)


def test_interrupt_of_a_waiting_caller_does_not_take_the_reading_with_it(pair: Pair, service: Service) -> None:
    """Ctrl-C in a notebook: whoever waited is gone, the connection is not."""
    pair.call("add", 1, 2)
    connection = pair.client._connection
    assert connection is not None
    transport = connection.transport
    others = pair.submit("wait")

    class Poll:
        def __init__(self) -> None:
            self.calls = 0
            self.real = transport._poll

        def poll(self, *args: float) -> Any:
            self.calls += 1
            if self.calls == 1:
                raise KeyboardInterrupt
            return self.real.poll(*args)

    for timeout in (None, SOON):
        transport._poll = Poll()  # type: ignore[assignment]
        with pytest.raises(KeyboardInterrupt):
            pair.call("wait", timeout=timeout)
        transport._poll = transport._poll.real  # type: ignore[attr-defined]
        assert pair.call("add", 1, 2, timeout=None) == 3
        assert len(connection._pendings) == 1  # What was interrupted was cancelled.
    service.go_on.set()
    assert others.result(SOON) == "not cancelled"


def test_interrupt_while_connecting_leaves_no_socket(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    connect = ssl.SSLSocket.connect

    def interrupted(self: ssl.SSLSocket, address: Any) -> None:
        connect(self, address)
        opened.append(self)
        raise KeyboardInterrupt  # The signal came meanwhile: its handler runs before anything else does.

    client = pair.new_client()
    monkeypatch.setattr(ssl.SSLSocket, "connect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        client.call("T.add", (1, 2), {}, SOON)
    monkeypatch.undo()
    assert [sock.fileno() for sock in opened] == [-1]
    assert client.call("T.add", (1, 2), {}, SOON) == 3


def test_a_peer_that_resets_at_once_is_unreachable(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the reset comes between TCP's connection and TLS's first word; and no socket is left."""
    connect = ssl.SSLSocket.connect

    def connect_slowly(self: ssl.SSLSocket, address: Any) -> None:
        connect(self, address)
        peer, _ = server.accept()
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()

    monkeypatch.setattr(ssl.SSLSocket, "connect", connect_slowly)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = Client("127.0.0.1", port, NAME, CLIENT_CONTEXT, pair.codec, pair.here, address="x")
        with pytest.raises(Unreachable, match="reset") as caught:
            client.call("T.add", (1, 2), {}, SOON)
    assert not caught.value.sent


# -- Who is refused --------------------------------------------------------------------------------------------------


def test_client_of_another_session(pair: Pair) -> None:
    stranger = Authority("s-other").issue(Role.DRIVER, "driver")
    mixed = Credentials(stranger.identity, stranger.certificate, stranger.key, DRIVER.ca)  # Trusts us; we do not trust it.
    for credentials in (stranger, mixed):
        client = pair.new_client(credentials)
        with pytest.raises(Unreachable) as failure:
            client.call("T.add", (1, 2), {}, SOON)
        assert not failure.value.sent, failure.value
    assert pair.call("add", 1, 2) == 3
    until(lambda: len(pair.logged) >= 2)
    assert all("refused a connection from 127.0.0.1:" in line for line in pair.logged)


def test_client_without_a_certificate(pair: Pair) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=DRIVER.ca.decode())
    context.set_alpn_protocols(["h2"])
    client = Client("127.0.0.1", pair.listener.port, NAME, context, pair.codec, pair.here, address="the machine")
    Bomb.exploded.clear()
    with pytest.raises(Unreachable) as failure:
        client.call("T.echo", (Bomb(),), {}, SOON)
    assert not failure.value.sent
    assert not Bomb.exploded.is_set()
    client.close()


def test_server_is_not_who_was_asked_for(pair: Pair) -> None:
    client = pair.new_client(name="0.m-999999.bigmachine")
    with pytest.raises(Unreachable, match=r"(?i)certificate") as failure:
        client.call("T.add", (1, 2), {}, SOON)
    assert not failure.value.sent


def raw_connection(pair: Pair) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", pair.listener.port), SOON)
    sock.settimeout(SOON)
    return sock


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", os.urandom(500), b"\x16\x03\x01\x00\x05hello"])
def test_garbage_instead_of_tls(pair: Pair, data: bytes) -> None:
    with raw_connection(pair) as sock:
        sock.sendall(data)
        try:
            while sock.recv(1000):
                pass
        except ConnectionResetError:
            pass
    until(lambda: pair.logged)
    assert pair.call("add", 1, 2) == 3


def test_handshake_that_dawdles(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HANDSHAKE_TIMEOUT", 0.05)
    pair = Pair(service)
    with raw_connection(pair) as sock:
        assert sock.recv(1000) == b""
    until(lambda: any("no TLS handshake" in line for line in pair.logged))
    monkeypatch.setattr(server_module, "HANDSHAKE_TIMEOUT", 10.0)
    assert pair.call("add", 1, 2) == 3
    pair.close()


def test_server_that_dawdles(pair: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        client = Client(
            "127.0.0.1", sock.getsockname()[1], NAME, CLIENT_CONTEXT, pair.codec, pair.here, address="the machine"
        )
        with pytest.raises(Unreachable, match="no answer to the TLS handshake") as failure:
            client.call("T.add", (1, 2), {}, 0.05)
        assert not failure.value.sent


def tls_connection(pair: Pair, alpn: str | None = "h2") -> ssl.SSLSocket:
    context = client_context(DRIVER)
    if alpn != "h2":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=DRIVER.ca.decode())
        context.hostname_checks_common_name = False
        _load(context, DRIVER)
        if alpn:
            context.set_alpn_protocols([alpn])
    return context.wrap_socket(raw_connection(pair), server_hostname=NAME)


def _load(context: ssl.SSLContext, credentials: Credentials) -> None:
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        file.write(credentials.certificate + credentials.key)
        file.flush()
        context.load_cert_chain(file.name)


@pytest.mark.parametrize("alpn", [None, "http/1.1"])
def test_client_that_does_not_speak_http2(pair: Pair, alpn: str | None) -> None:
    with tls_connection(pair, alpn) as sock:
        try:
            assert sock.recv(1000) == b""
        except (ConnectionResetError, ssl.SSLError):
            pass
    until(lambda: any("does not speak HTTP/2" in line for line in pair.logged))
    assert pair.call("add", 1, 2) == 3


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", os.urandom(1000), b"\0" * 100])
def test_garbage_inside_tls(pair: Pair, data: bytes) -> None:
    with tls_connection(pair) as sock:
        sock.sendall(data)
        received = b""
        try:
            while chunk := sock.recv(1000):
                received += chunk
        except (ConnectionResetError, ssl.SSLError):
            pass
    assert b"not HTTP/2" in received  # A GOAWAY that says why.
    until(lambda: not pair.server.connections)
    assert pair.call("add", 1, 2) == 3


# -- Other people's clients ------------------------------------------------------------------------------------------


class Foreign:
    """A minimal HTTP/2 client: `h2` on a blocking socket."""

    def __init__(self, pair: Pair) -> None:
        self.sock = tls_connection(pair)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        self.sock.sendall(self.h2.data_to_send())

    def begin(self, path: str, headers: dict[str, str], method: str = "POST") -> int:
        stream = self.h2.get_next_available_stream_id()
        head = {":method": method, ":scheme": "https", ":authority": NAME, ":path": path, **headers}
        self.h2.send_headers(stream, list(head.items()))
        self.flush()
        return stream

    def request(
        self, path: str, body: bytes, headers: dict[str, str], method: str = "POST"
    ) -> tuple[dict[str, str], bytes, dict[str, str]]:
        stream = self.begin(path, headers, method)
        self.h2.send_data(stream, body, end_stream=True)
        self.flush()
        return self.response(stream)

    def response(self, stream: int) -> tuple[dict[str, str], bytes, dict[str, str]]:
        """(headers, body, trailers)."""
        found: dict[str, str] = {}
        trailers: dict[str, str] = {}
        body = b""
        while True:
            data = self.sock.recv(65536)
            assert data, "the server closed the connection"
            for event in self.h2.receive_data(data):
                if getattr(event, "stream_id", stream) != stream:
                    continue
                if isinstance(event, h2.events.ResponseReceived):
                    found = {str(name): str(value) for name, value in event.headers or ()}
                elif isinstance(event, h2.events.DataReceived):
                    body += event.data or b""
                    self.h2.acknowledge_received_data(event.flow_controlled_length or 0, stream)
                elif isinstance(event, h2.events.TrailersReceived):
                    trailers = {str(name): str(value) for name, value in event.headers or ()}
                elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                    self.flush()
                    return found, body, trailers
            self.flush()

    def json(self, method: str, value: Any, **headers: str) -> tuple[str, Any]:
        head, body, _ = self.request(
            f"/bigrpc/T.{method}", json.dumps(value).encode(), {"content-type": "application/json", **headers}
        )
        return head[":status"], json.loads(body) if head["content-type"] == "application/json" else body.decode()


@pytest.fixture
def foreign(pair: Pair) -> Iterator[Foreign]:
    foreign = Foreign(pair)
    yield foreign
    foreign.sock.close()


def test_json(foreign: Foreign) -> None:
    assert foreign.json("add", [1, 2]) == ("200", 3)
    assert foreign.json("add", {"a": 1, "b": 2}) == ("200", 3)
    assert foreign.json("echo", "text") == ("200", "text")
    assert foreign.json("echo", [[1, 2]]) == ("200", [1, 2])
    assert foreign.json("async_echo", [{"a": None}]) == ("200", {"a": None})
    head, body, _ = foreign.request("/bigrpc/T.echo", b"", {"content-type": "application/json; charset=utf-8"})
    assert (head[":status"], body) == ("200", b"null")


def test_json_errors(foreign: Foreign) -> None:
    assert foreign.json("fail", ["why"]) == ("590", {"error": {"type": "Custom", "message": "why"}})
    status, text = foreign.json("add", [1])
    assert status == "400"
    assert "its signature is (a: 'int', b: 'int') -> 'int'" in text
    status, text = foreign.json("nothing", [])
    assert status == "404"
    assert "it has T.add" in text
    status, error = foreign.json("make", [5])
    assert status == "590"
    assert "no JSON form" in error["error"]["message"]
    head, body, _ = foreign.request("/bigrpc/T.add", b"{not json", {"content-type": "application/json"})
    assert head[":status"] == "400"
    assert b"not JSON" in body
    assert foreign.json("add", [1, 2], **{"bigm-timeout": "soon"})[0] == "400"
    assert foreign.json("add", [1, 2]) == ("200", 3)


def test_json_with_headers_that_have_no_meaning_there(foreign: Foreign) -> None:
    assert foreign.json("add", [1, 2], **{"bigm-layout": "6"}) == ("200", 3)
    assert foreign.json("add", [1, 2], **{"bigm-stream": "1"}) == ("200", 3)


def test_other_paths_and_methods(foreign: Foreign) -> None:
    for path, method, status in (
        ("/", "POST", "404"),
        ("/bigrpc/T.add", "GET", "405"),
        ("/bigrpc/T.add", "PUT", "405"),
        ("/bigrpc/-/reply", "POST", "404"),
    ):
        head, body, _ = foreign.request(path, b"", {"content-type": "application/json"}, method)
        assert head[":status"] == status
        assert head["content-type"].startswith("text/plain")
        assert body
    for number in ("0", "²", "-1", "x"):
        head, _, _ = foreign.request("/bigrpc/-/reply", b"", {"bigm-call": number})
        assert head[":status"] == "404"
    head, body, _ = foreign.request("/bigrpc/T.add", b"", {"content-type": "text/html"})
    assert head[":status"] == "400"
    assert b"text/html" in body


@pytest.mark.parametrize(
    ("layout", "body", "status"),
    [
        ("99999999999999999999999", b"", "413"),
        ("4611686018427387904", b"", "413"),
        ("-1", b"", "400"),
        ("x", b"", "400"),
        ("10", b"short", "400"),
        ("0", b"", "400"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_layouts(foreign: Foreign, layout: str, body: bytes, status: str, stream: bool) -> None:
    headers = {"bigm-layout": layout, **({"bigm-stream": "1"} if stream else {})}
    head, _, _ = foreign.request("/bigrpc/T.echo", body, headers)
    assert head[":status"] == status
    assert foreign.json("add", [1, 2]) == ("200", 3)


def test_pickle_without_a_layout(foreign: Foreign) -> None:
    head, body, _ = foreign.request("/bigrpc/T.add", pickle.dumps(((1, 2), {}), 5), {})
    assert head[":status"] == "200"
    assert head["content-type"] == "application/x-bigmachine-pickle"
    assert head["bigm-layout"] == str(len(body))
    assert pickle.loads(body) == 3
    head, body, _ = foreign.request("/bigrpc/T.fail", pickle.dumps((("x",), {}), 5), {})
    assert head[":status"] == "590"
    assert b"Custom" in body


def test_ndjson(foreign: Foreign) -> None:
    head, body, trailers = foreign.request("/bigrpc/T.count", b"[3]", {"content-type": "application/json"})
    assert (head[":status"], head["content-type"], body, trailers) == ("200", "application/x-ndjson", b"0\n1\n2\n", {})
    head, body, _ = foreign.request("/bigrpc/T.count", b"[0]", {"content-type": "application/json"})
    assert (head[":status"], body) == ("200", b"")
    head, body, trailers = foreign.request("/bigrpc/T.two_then_fail", b"", {"content-type": "application/json"})
    assert (head[":status"], body) == ("200", b"1\n2\n")
    assert b"after two" in b64decode(trailers["bigm-error"])
    assert foreign.json("fail_at_once", []) == ("590", {"error": {"type": "Custom", "message": "before the first"}})


def test_octet_stream(foreign: Foreign) -> None:
    head, body, trailers = foreign.request(
        "/bigrpc/T.blocks", b"[40, 50000]", {"content-type": "application/json", "accept": "application/octet-stream"}
    )
    assert (head["content-type"], trailers) == ("application/octet-stream", {})
    assert body == b"".join(bytes([i]) * 50_000 for i in range(40))  # Beyond the client's windows of 64 KiB.
    _, body, trailers = foreign.request(
        "/bigrpc/T.count", b"[3]", {"content-type": "application/json", "accept": "application/octet-stream"}
    )
    assert b"memoryview" in body  # Items that are not bytes: an error before the first.


def test_content_length(foreign: Foreign) -> None:
    body = json.dumps({"value": "x" * 60_000}).encode()
    stream = foreign.begin("/bigrpc/T.echo", {"content-type": "application/json", "content-length": str(len(body))})
    for i in range(0, len(body), 16_000):
        foreign.h2.send_data(stream, body[i : i + 16_000])
        foreign.flush()
    foreign.h2.end_stream(stream)
    foreign.flush()
    head, answer, _ = foreign.response(stream)
    assert head[":status"] == "200"
    assert json.loads(answer) == "x" * 60_000


def test_reset_of_a_request_that_has_not_arrived(foreign: Foreign) -> None:
    stream = foreign.begin("/bigrpc/T.echo", {"content-type": "application/json"})
    foreign.h2.send_data(stream, b"[")
    foreign.h2.reset_stream(stream)
    foreign.flush()
    assert foreign.json("add", [1, 2]) == ("200", 3)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(pair: Pair, tmp_path: Path) -> None:
    features = subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True).stdout
    if "HTTP2" not in features:
        pytest.skip("this curl has no HTTP/2")
    for name, content in (("ca", DRIVER.ca), ("cert", DRIVER.certificate), ("key", DRIVER.key)):
        (tmp_path / name).write_bytes(content)
    command = ["curl", "--silent", "--show-error", "--http2", "--tlsv1.3", "--max-time", "10"]
    command += ["--cacert", str(tmp_path / "ca"), "--cert", str(tmp_path / "cert"), "--key", str(tmp_path / "key")]
    command += ["--connect-to", f"::127.0.0.1:{pair.listener.port}", "--write-out", " %{http_code} %{http_version}"]
    command += ["-H", "content-type: application/json"]

    def curl(method: str, data: str, *more: str) -> str:
        url = f"https://{NAME}/bigrpc/T.{method}"
        done = subprocess.run([*command, *more, "-d", data, url], capture_output=True, text=True, check=False)
        assert not done.returncode, f"{method}: {done.stderr}"
        return done.stdout

    assert curl("add", "[1, 2]") == "3 200 2"
    assert curl("count", "[3]") == "0\n1\n2\n 200 2"
    assert curl("nothing", "[]").endswith(" 404 2")
    assert curl("fail", '["why"]') == '{"error": {"type": "Custom", "message": "why"}} 590 2'
    (tmp_path / "large").write_text(json.dumps({"value": "x" * 1_000_000}))
    assert curl("echo", f"@{tmp_path / 'large'}") == '"' + "x" * 1_000_000 + '" 200 2'


def test_peer_that_stops_reading(pair: Pair, service: Service) -> None:
    """It asks for more and more, and takes nothing: that costs memory for its windows, and nobody else anything."""
    foreign = Foreign(pair)
    for _ in range(10):
        stream = foreign.begin("/bigrpc/T.blocks", {"content-type": "application/json", "accept": "application/octet-stream"})
        foreign.h2.send_data(stream, b"[1000, 100000]", end_stream=True)
        foreign.flush()
    until(lambda: pair.server.connections)
    theirs = pair.server_connection()
    until(lambda: theirs.transport._writers or theirs.transport._pollers)
    assert pair.call("add", 1, 2) == 3
    assert theirs._connection.out_bytes < OUTBOX_HIGH + 300_000
    assert service.produced < 200
    foreign.sock.close()
    for _ in range(10):
        until(lambda: service.ended.count("closed") == 10)


def test_our_client_and_a_server_that_stops_reading(pair: Pair) -> None:
    """Its calls end with their timeouts, whatever they were doing."""
    adopted: list[socket.socket] = []

    def accept(sock: socket.socket) -> None:
        sock.setblocking(True)
        adopted.append(SERVER_CONTEXT.wrap_socket(sock, server_side=True))

    listener = Listener(pair.there, accept)
    client = Client("127.0.0.1", listener.port, NAME, CLIENT_CONTEXT, pair.codec, pair.here, address="the machine")
    try:
        for args in ((b"small",), (bytes(60_000),), (bytes(64 << 20),), (Stream(bytes(1 << 20) for _ in range(64)),)):
            started = time.monotonic()
            with pytest.raises(CallTimeout):
                client.call("T.echo", args, {}, 0.1)
            assert time.monotonic() - started < SOON / 2
        assert client._connection is not None
        assert client._connection._connection.out_bytes < OUTBOX_HIGH + 300_000
    finally:
        client.close()
        listener.close()
        for sock in adopted:
            sock.close()


def test_answers_that_make_no_sense(pair: Pair) -> None:
    """A server of the session that is out of its mind: a clear error, and no thread lost."""

    reply: Any = None

    def answer(sock: socket.socket) -> None:
        sock.setblocking(True)
        with SERVER_CONTEXT.wrap_socket(sock, server_side=True) as tls:
            connection = Connection(client=False)
            headed = 0
            while not headed:
                tls.sendall(b"".join(map(bytes, connection.out)))
                connection.out.clear()
                n = tls.recv_into(connection.get_buffer())
                if not n:
                    return
                connection.received(n)
                headed = next((event[0] for event in connection.events if type(event).__name__ == "Headed"), 0)
            reply(connection, headed)
            tls.sendall(b"".join(map(bytes, connection.out)))
            while tls.recv(65536):
                pass

    replies = [
        lambda c, s: c.send_headers(s, [(":status", "200"), ("bigm-layout", "99999999999999999999")]),
        lambda c, s: c.send_headers(s, [(":status", "200"), ("bigm-layout", "x,y")]),
        lambda c, s: c.send_headers(s, [(":status", "200")], end=True),
        lambda c, s: (c.send_headers(s, [(":status", "200")]), c.send_headers(s, [("bigm-error", "!")], end=True)),
        lambda c, s: (c.send_headers(s, [(":status", "590")]), c.end(s)),
        lambda c, s: (c.send_headers(s, [(":status", "777")]), c.end(s)),
        lambda c, s: c.reset(s, 7),
        lambda c, s: c.close(0, "bye"),
        lambda c, s: c.close(2, "bye"),
        lambda c, s: c.go_away("bye"),
    ]
    for reply in replies:  # noqa: B007 - `answer` uses it.
        listener = Listener(pair.there, answer)
        client = Client("127.0.0.1", listener.port, NAME, CLIENT_CONTEXT, pair.codec, pair.here, address="the machine")
        with pytest.raises((Unreachable, RemoteError, CallRefused, MemoryError, CallTimeout)):
            client.call("T.echo", (bytes(100_000),), {}, 0.2)
        client.close()
        listener.close()


# -- Faults ----------------------------------------------------------------------------------------------------------


class Faults:
    """Lets the n-th operation on the sockets of a connection fail, or be short."""

    def __init__(self, n: int, kind: str) -> None:
        self.left = n
        self.kind = kind
        self.happened = False
        self._lock = threading.Lock()

    def due(self) -> bool:
        with self._lock:
            self.left -= 1
            if self.left == 0:
                self.happened = True
                return True
            return False


def inject(transport: Any, faults: Faults) -> None:
    read, write = transport._read, transport._write

    def faulty_read(size: int, buffer: Any) -> int:
        if faults.due():
            if faults.kind == "error":
                raise OSError(5, "Input/output error")
            if faults.kind == "reset":
                raise ConnectionResetError(104, "Connection reset by peer")
            if faults.kind == "end":
                socket.socket.shutdown(transport._sock, socket.SHUT_RD)  # Past TLS: as if the peer had closed.
            if faults.kind == "blocked":
                raise ssl.SSLWantReadError
            # TLS reads are short at the end of a record only.
        return int(read(size, buffer))

    def faulty_write(data: Any) -> int:
        if faults.due():
            if faults.kind == "error":
                raise OSError(5, "Input/output error")
            if faults.kind == "reset":
                raise BrokenPipeError(32, "Broken pipe")
            if faults.kind == "end":
                raise ssl.SSLEOFError(8, "EOF occurred in violation of protocol")
            if faults.kind == "short":
                return int(write(bytes(data[:1])))
            raise ssl.SSLWantWriteError
        return int(write(data))

    transport._read, transport._write = faulty_read, faulty_write


def script(pair: Pair) -> None:
    """A little of everything, on one connection that has been made."""
    assert pair.call("add", 1, 2, timeout=2.0) == 3
    calls = [pair.submit("add", i, 1, timeout=2.0) for i in range(5)]
    assert [call.result(2.0) for call in calls] == [1, 2, 3, 4, 5]
    assert pair.call("make", 70_000, timeout=2.0) == bytes(70_000)
    assert pair.call("echo", bytes(70_000), timeout=2.0) == bytes(70_000)
    assert list(pair.stream("count", 3, timeout=2.0)) == [0, 1, 2]
    assert pair.call("read", "n", Stream([bytes(10_000)] * 2), timeout=2.0) == ("n", 20_000)


@pytest.mark.parametrize("end", ["client", "server"])
@pytest.mark.parametrize("kinds", [("error", "reset"), ("end",), ("short", "blocked")])
def test_any_operation_may_fail(
    service: Service, end: str, kinds: tuple[str, ...], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In sqlite's manner: the first operation on the socket fails, then the second, … until the script passes untouched."""
    monkeypatch.setattr(transport_module, "LAST_WORDS", 0.002)  # There will be none.
    pair = Pair(service)
    for n in range(1, 1000):
        assert pair.call("add", 1, 1) == 2
        connection: Any = pair.client._connection
        until(lambda: len(pair.server._all()) == 1)
        theirs = pair.server_connection()
        kind = kinds[n % len(kinds)]
        faults = Faults(n, kind)
        inject(connection.transport if end == "client" else theirs.transport, faults)
        started = time.monotonic()
        try:
            script(pair)
        except (Unreachable, CallTimeout) as raised:
            error: BaseException | None = raised
        else:
            error = None
        if error is not None:
            assert faults.happened
            assert isinstance(error, Unreachable), f"{n}: {error}"
            assert kind in ("error", "reset", "end"), f"{n}: {error}"
            assert str(error).startswith("the machine is unreachable: ")
        assert time.monotonic() - started < SOON / 2, n
        happened = faults.happened
        if happened and kind in ("error", "reset", "end"):
            until(lambda: connection.closed is not None, f"{n}: nobody noticed")  # noqa: B023
            assert not connection._pendings
            until(lambda: not connection._exchanges)  # noqa: B023
            until(lambda: not theirs._calls and not theirs._requests._requests)  # noqa: B023
        if not happened:
            break
    assert n > 20, "the script has more operations than that"
    pair.close()
    noise = capfd.readouterr().err
    assert "please report it" not in noise, noise


# -- Threads that wait -----------------------------------------------------------------------------------------------


def test_nothing_keeps_a_call_alive(pair: Pair) -> None:
    call = pair.submit("add", 1, 2)
    assert call.result(SOON) == 3
    alive = weakref.ref(call)
    del call
    until(lambda: (gc.collect(), alive() is None)[1])


def test_constants() -> None:
    assert transport_module.SEND_STALL > SOON  # Else the tests above would mistake it for an answer.


def test_close_while_calls_are_made(pair: Pair) -> None:
    """Whatever happens first, every call ends."""
    for _ in range(10):
        client = pair.new_client()
        barrier = threading.Barrier(4)
        failures: list[object] = []

        def work(client: Client = client, barrier: threading.Barrier = barrier, failures: list[object] = failures) -> None:
            barrier.wait(SOON)
            try:
                for i in range(50):
                    assert client.call("T.add", (i, 1), {}, None) == i + 1
            except Unreachable:
                pass
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        barrier.wait(SOON)
        client.close("enough")
        for thread in threads:
            thread.join(SOON)
            assert not thread.is_alive()
        assert not failures


def test_reactor_of_its_own_is_enough() -> None:
    reactor = Reactor()
    reactor.close()
