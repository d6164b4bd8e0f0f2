"""What the server needs to know of the methods that it serves. The server looks up; who registered them is not its affair."""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import UsageError


class Kind(enum.Enum):
    """How a method is run: on the thread that read the call, on the event loop, or as a stream of items."""

    PLAIN = "plain"
    ASYNC = "async"
    GENERATOR = "generator"
    ASYNC_GENERATOR = "async generator"


class Gate:
    """Lets one call in at a time; the others queue, and each that leaves lets the next one in."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy = False
        self._queue: deque[Callable[[], None]] = deque()

    def enter(self, run: Callable[[], None]) -> bool:
        """True: go ahead, and `leave` afterwards. False: `run` will be handed out by somebody's `leave`."""
        with self._lock:
            if self._busy:
                self._queue.append(run)
                return False
            self._busy = True
            return True

    def leave(self) -> Callable[[], None] | None:
        """The next in the queue, to be run (the gate is kept for it), or None."""
        with self._lock:
            if self._queue:
                return self._queue.popleft()
            self._busy = False
            return None


@dataclass(frozen=True, slots=True)
class Method:
    """A method that can be called: `name` is ``"PI.sample"``."""

    name: str
    kind: Kind
    function: Callable[..., Any]
    gate: Gate | None = None


class Handler(Protocol):
    """Who is asked for methods."""

    def find(self, name: str, caller: object) -> Method:
        """The method `name` for `caller` (whatever the server was told of the connection's peer).

        Raises a `CallRefused`. Called before any byte of the arguments is decoded.
        """


@dataclass(slots=True)
class CallContext:
    """What a running method can ask of its call.

    ``caller`` is who calls, as in the certificate ("driver s-1f…", "machine m-7f3a9c"); ``deadline`` is in `time.monotonic`
    seconds, None where the caller set none; ``cancelled`` turns true when the caller has gone, cancelled the call or
    given it up after its timeout. A plain method that runs for long should look at it now and then; an ``async def`` is
    cancelled. ``started`` is when it began, as of `time.perf_counter`.
    """

    method: str
    caller: str
    deadline: float | None = None
    _cancelled: bool = field(default=False, repr=False)
    _on_cancel: Callable[[], None] | None = field(default=None, repr=False, compare=False)
    started: float = field(default=0.0, repr=False, compare=False)

    def _cancel(self) -> None:
        """The caller does not want it any more."""
        self._cancelled = True
        if self._on_cancel is not None:
            self._on_cancel()

    def _when_cancelled(self, callback: Callable[[], None]) -> None:
        """`callback` at the cancellation, at once where that has been; twice at worst. It must not block."""
        self._on_cancel = callback
        if self._cancelled:
            callback()

    @property
    def cancelled(self) -> bool:
        return self._cancelled or (self.deadline is not None and time.monotonic() >= self.deadline)

    @property
    def remaining(self) -> float | None:
        """Seconds until the deadline, None where there is none."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())


current_call: ContextVar[CallContext | None] = ContextVar("bigmachine_call", default=None)


def call_context() -> CallContext:
    """The context of the call that the calling code runs for. Raises `UsageError` outside of one."""
    context = current_call.get()
    if context is None:
        raise UsageError("call_context() is for the code of a service's method, while it is called")
    return context
