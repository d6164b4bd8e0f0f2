"""A call that is under way: what the caller holds, and what the connection completes."""

from __future__ import annotations

import concurrent.futures
import time
from _thread import allocate_lock
from collections.abc import Callable, Generator
from typing import Any, Generic, Protocol, TypeVar

from .reactor import Timer
from .tracing import Calling
from .transport import Transport, Waiter

T = TypeVar("T")

Outcome = Callable[[], Any]
"""Returns what the method returned, or raises what it raised. Decodes: not under a lock, not on the reader's thread."""


Report = Callable[[str, str, float, BaseException], None]
"""Told of a failed call: its method, the process that it was for, the seconds since it was submitted, the error."""


class Pending(Waiter):
    """A call that has been sent. Completed once, by `finish`; `call` is the future that somebody holds of it, if any."""

    __slots__ = ("body", "call", "deadline", "method", "number", "outcome", "received", "sent", "started", "timer")

    def __init__(self, method: str, sent: int) -> None:
        self.done = False  # The fields of a Waiter are set here, too: a call of its constructor costs as much as all of them.
        self.leading = False
        self.sleeper = None
        self.method = method
        self.number = 0
        self.outcome: Outcome | None = None
        self.body: bytes | None = None  # A small result that has not been decoded, in place of an outcome.
        self.call: Call[Any] | None = None
        self.timer: Timer | None = None
        self.deadline: float | None = None  # After which `timer` completes the call: who reads for it stops by himself.
        self.started = time.perf_counter()
        self.sent = sent  # Bytes of arguments and, below, of the result.
        self.received = 0


class _Way(Protocol):
    """The connection that a call was sent on."""

    transport: Transport

    def cancel(self, pending: Pending) -> None: ...


class Call(concurrent.futures.Future[T], Generic[T]):
    """A submitted call: a `concurrent.futures.Future` that can be awaited too.

    ``result(timeout)`` raises what the method raised, or a `BigmachineError`; its timeout, as in the standard library, is
    that of waiting, and leaves the call running. ``cancel()`` cancels the call on the far side as well; it is True
    wherever the call had not ended, and `result` then raises `concurrent.futures.CancelledError`.
    """

    process = "0"

    def __init__(self, method: str = "", report: Report | None = None) -> None:
        """`report` is told how a call of `method` fails, by whoever completes it."""
        super().__init__()
        self._method = method
        self._report = report
        self._began = time.perf_counter()
        self._way: _Way | None = None
        self._pending: Pending | None = None
        self._watched = False
        self._execute: Callable[[Callable[[], None]], None] | None = None
        self._reader = allocate_lock()  # Of the thread that reads in order to get the reply: a `Waiter` is for one.

    def under_way(self, way: _Way, pending: Pending) -> None:
        """The call was sent on `way`, and is `pending` there."""
        self._pending = pending
        self._way = way
        if self.cancelled():
            way.cancel(pending)

    @property
    def watched(self) -> bool:
        """Somebody's callbacks run when the call completes: not a thing for the thread that reads the connection."""
        return self._watched

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[T]], object]) -> None:
        """As in the standard library; callbacks run on a thread of the pool."""
        self._watched = True
        super().add_done_callback(fn)

    def result(self, timeout: float | None = None) -> T:
        """What the method returned. Raises what it raised, `TimeoutError` after `timeout` seconds."""
        return super().result(self._read(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the method raised, None where it returned. Raises `TimeoutError` after `timeout` seconds."""
        return super().exception(self._read(timeout))

    def _read(self, timeout: float | None) -> float | None:
        """Lead the connection until the reply is there; returns what is left of `timeout`."""
        way, pending = self._way, self._pending
        if way is None or pending is None or pending.done or self.done():  # In a callback `pending` is not done yet.
            return timeout
        if not self._reader.acquire(blocking=False):
            return timeout
        try:
            if timeout is None:
                way.transport.wait(pending, pending.deadline)
                return None
            deadline = time.monotonic() + timeout
            way.transport.wait(pending, deadline if pending.deadline is None else min(deadline, pending.deadline))
            return max(0.0, deadline - time.monotonic())
        finally:
            self._reader.release()

    def cancel(self) -> bool:
        """See the class."""
        if self.cancelled():
            return True
        if not super().cancel():
            return False
        if self._way is not None and self._pending is not None:
            self._way.cancel(self._pending)
        return True

    def complete(self, outcome: Outcome, execute: Callable[[Callable[[], None]], None] | None = None) -> None:
        """Set the result or the exception that `outcome` gives; without effect where the call was cancelled. Callbacks are
        run by `execute`: one may have been added since `watched` was looked at."""
        self._execute = execute
        try:
            try:
                value = outcome()
            except BaseException as error:  # Whatever the method raised is the caller's, not this thread's.
                self.set_exception(error)
            else:
                self.set_result(value)
        except concurrent.futures.InvalidStateError:
            pass  # Cancelled, or timed out, in the meantime.

    def set_exception(self, exception: BaseException | None) -> None:
        """As in the standard library; then it has been told."""
        if self._report is not None and exception is not None and not self.done():
            self._report(self._method, self.process, time.perf_counter() - self._began, exception)
        super().set_exception(exception)

    def _invoke_callbacks(self) -> None:
        if self._execute is None or not self._watched:
            super()._invoke_callbacks()  # type: ignore[misc]
        else:
            self._execute(super()._invoke_callbacks)  # type: ignore[misc]

    def __await__(self) -> Generator[Any, None, T]:
        import asyncio  # 15 ms that a worker does not spend; whoever awaits has paid them.

        return asyncio.wrap_future(self).__await__()


class TracedCall(Call[T]):
    """A call with a span (`tracing`), which has ended when the result is there."""

    def __init__(self, method: str, report: Report, span: Calling) -> None:
        super().__init__(method, report)
        self._span = span

    @property
    def watched(self) -> bool:
        """Whoever exports spans may take his time: not on the thread that reads the connection."""
        return True

    def complete(self, outcome: Outcome, execute: Callable[[Callable[[], None]], None] | None = None) -> None:
        """See `Call`."""

        def ended() -> Any:
            try:
                value = outcome()
            except BaseException as error:  # Of the method, whatever it is.
                self._span.end(error)
                raise
            self._span.end()
            return value

        super().complete(ended, execute)

    def cancel(self) -> bool:
        """See `Call`."""
        if not super().cancel():
            return False
        self._span.end(concurrent.futures.CancelledError())
        return True
