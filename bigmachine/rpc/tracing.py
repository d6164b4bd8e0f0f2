"""Traces: where a process has loaded OpenTelemetry, its calls and those that it serves are spans of one trace.

The caller's span (kind CLIENT, ``Service.method``) begins when the call is made, before it waits for anything, and ends with
its outcome. The called process's (kind SERVER) is around the method, whose own spans and calls are children of it. What ties
the two together travels as OpenTelemetry's propagators write it (W3C: ``traceparent``, ``tracestate``, ``baggage``):

- in the pickle form of a call, and on the call channel, as one more keyword argument, `TRACE`, which no method has: a dict of
  header names and values. A process that knows nothing of traces takes it out all the same.
- in the JSON form of a call, as headers of the request.

Rule 1. A process that has not loaded ``opentelemetry.trace`` pays for one look into `sys.modules` at each end of a call, and
sends nothing. One that has, but has no provider of spans, hands on the context that a call came with, and makes no spans.

Rule 2. ``Supervisor.…`` and ``Process.…`` are ours, and no part of anybody's trace.

What knows OpenTelemetry is `spans`, which is imported by the first call that needs it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol, TypeVar

from .methods import CallContext

T = TypeVar("T")

OPENTELEMETRY = "opentelemetry.trace"
"""The module whose presence in `sys.modules` turns tracing on. Looked for in place, at both ends: asking costs a call."""

TRACE = "\0trace"
"""The keyword argument that carries the context."""

_OURS = ("Supervisor.", "Process.")


class Calling(Protocol):
    """The caller's span. Ended once; what comes later is ignored."""

    @property
    def carrier(self) -> dict[str, str]: ...

    def end(self, error: BaseException | None = None) -> None: ...


class Serving(Protocol):
    """The called process's span: a context manager for one thread, or one task."""

    def __enter__(self) -> object: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def calling(method: str, place: Callable[[], Mapping[str, str | int]]) -> Calling | None:
    """Begin the span of a call to `method`; `place` gives attributes that say of which machine. None where there is nothing to
    tell the machine, and nobody here to tell. Only where `OPENTELEMETRY` is loaded."""
    if method.startswith(_OURS):
        return None
    from .spans import calling  # For those who have OpenTelemetry.

    return calling(method, place)


def serving(context: CallContext, carrier: object) -> Serving | None:
    """The span of the call that `context` is of, begun on entering it. As `calling`."""
    if context.method.startswith(_OURS):
        return None
    from .spans import serving  # As in `calling`.

    return serving(context, carrier)


def with_trace(kwargs: dict[str, Any], span: Calling) -> dict[str, Any]:
    """The keyword arguments to send for a call with this span."""
    return {**kwargs, TRACE: span.carrier}


async def awaited(span: Serving, method: Awaitable[T]) -> T:
    """What the method returns, run within `span`."""
    with span:
        return await method


def items(span: Serving, generator: Iterator[T]) -> Iterator[T]:
    """What the method yields, run within `span`; on one thread."""
    with span:
        yield from generator


async def async_items(span: Serving, generator: AsyncIterator[T]) -> AsyncIterator[T]:
    """The same for an async generator, in one task."""
    with span:
        try:
            async for item in generator:
                yield item
        finally:
            close = getattr(generator, "aclose", None)
            if close is not None:
                await close()
