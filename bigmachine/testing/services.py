"""The services with which `conformance` tests a system: in a module of their own, so that machines need no pytest."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import IO, Any

from ..errors import BigmachineError
from ..rpc.methods import call_context
from ..services import parallel
from ..session import Session

WAIT = 20.0
"""Seconds that a service waits for another call at most: the tests never wait so long."""


class Trouble(Exception):
    """An exception of the user's own, whose constructor takes more than it hands on."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class Probe:
    """Answers, raises, streams, dials: one method for each thing that a machine must be able to do."""

    def __init__(self, greeting: str = "") -> None:
        self.greeting = greeting
        self.token = ""
        self._setups = 0

    def setup(self, b: Session) -> None:
        self._session = b
        self._setups += 1
        self.token = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._inside = 0
        self._closed = threading.Event()
        self._cancelled = threading.Semaphore(0)
        self._napping = threading.Semaphore(0)
        self._woken = threading.Semaphore(0)
        self._opened = threading.Event()

    def echo(self, value: Any = None) -> Any:
        return value

    def hello(self, name: str, *, mark: str = "!") -> str:
        return f"{self.greeting} {name}{mark}"

    def fail(self, text: str, code: int) -> None:
        raise Trouble(text, code)

    def unpicklable(self) -> object:
        return threading.Lock()

    def setups(self) -> tuple[str, int]:
        """A token of this replica, and how often it was set up."""
        return self.token, self._setups

    def environ(self, name: str) -> str | None:
        return os.environ.get(name)

    def pid(self) -> int:
        return os.getpid()

    def address(self) -> str:
        """The machine's own."""
        return self._session.address

    def caller(self) -> str:
        return call_context().caller

    def relay(self, address: str, method: str, *args: Any) -> Any:
        """Call `method` of the machine at `address`."""
        return self._session.dial(address).call(method, *args)

    def bounce(self, addresses: list[str], times: int) -> int:
        """A call to the next address, which calls the next, …: the number of calls that are on the way at the end."""
        if times <= 0:
            return 0
        following = [*addresses[1:], addresses[0]]
        return 1 + int(self._session.dial(following[0]).call("Probe.bounce", following, times - 1))

    # -- Streams -----------------------------------------------------------------------------------------------------

    def count(self, n: int, fail: bool = False) -> Iterator[int]:
        try:
            yield from range(n)
            if fail:
                raise Trouble("after the last item", n)
        finally:
            self._closed.set()

    async def acount(self, n: int) -> AsyncIterator[int]:
        try:
            for i in range(n):
                await asyncio.sleep(0)
                yield i
        finally:
            self._closed.set()

    def blocks(self, count: int, size: int) -> Iterator[bytes]:
        for i in range(count):
            yield bytes([i % 256]) * size

    def closed(self) -> bool:
        """Whether a generator has ended since this was asked for the last time; waits for it."""
        ended = self._closed.wait(WAIT)
        self._closed.clear()
        return ended

    def digest(self, file: IO[bytes]) -> tuple[int, str]:
        """Reads a byte stream: its size and SHA-256."""
        size, digest = 0, hashlib.sha256()
        while block := file.read(50_000):
            size += len(block)
            digest.update(block)
        return size, digest.hexdigest()

    # -- Waiting -----------------------------------------------------------------------------------------------------

    def nap(self) -> None:
        """Wait until the call is cancelled; then for `wake`, as an answer might still be in time."""
        context = call_context()
        deadline = time.monotonic() + WAIT
        self._napping.release()
        while not context.cancelled:
            if time.monotonic() > deadline:
                raise TimeoutError("nobody has cancelled the call")
            time.sleep(0.002)
        self._cancelled.release()
        self._woken.acquire(timeout=WAIT)

    async def anap(self) -> None:
        """The same, on the event loop."""
        self._napping.release()
        try:
            await asyncio.sleep(WAIT)
        except asyncio.CancelledError:
            self._cancelled.release()
            raise

    def napping(self) -> bool:
        """Wait until one more `nap` has begun."""
        return self._napping.acquire(timeout=WAIT)

    def wake(self) -> None:
        self._woken.release()

    def cancelled(self) -> bool:
        """Wait until one more `nap` has been cancelled."""
        return self._cancelled.acquire(timeout=WAIT)

    def block(self) -> None:
        """Wait for `open`."""
        if not self._opened.wait(WAIT):
            raise TimeoutError("nobody has called open")

    def open(self) -> None:
        self._opened.set()

    # -- Parallel ----------------------------------------------------------------------------------------------------

    @parallel
    def where(self) -> tuple[str, int]:
        """As `setups`, of whichever replica is asked."""
        return self.setups()

    @parallel
    def meet(self, parties: int) -> str:
        """Wait until `parties` calls of this run on this machine at the same time; the replica's token."""
        self._session.dial(self._session.address).call("Meeting.arrive", parties)
        return self.token

    @parallel
    def crowd(self) -> int:
        """How many calls of this are running in this replica."""
        with self._lock:
            self._inside += 1
        time.sleep(0.005)  # For others to come in, if they could.
        with self._lock:
            inside, self._inside = self._inside, self._inside - 1
        return inside


class Meeting:
    """Where the parallel calls of a machine wait for each other."""

    def setup(self, b: Session) -> None:
        self._lock = threading.Lock()
        self._barriers: dict[int, threading.Barrier] = {}

    def arrive(self, parties: int) -> None:
        with self._lock:
            barrier = self._barriers.setdefault(parties, threading.Barrier(parties))
        barrier.wait(WAIT)


class BadSetup:
    """A service that cannot be set up."""

    def setup(self, b: Session) -> None:
        raise Trouble("no such model", 7)


class Bomb:
    """Leaves a file behind where somebody unpickles it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return _explode, (self._path,)


def _explode(path: str) -> None:
    with contextlib.suppress(OSError, BigmachineError), open(path, "x", encoding="utf-8"):
        pass
