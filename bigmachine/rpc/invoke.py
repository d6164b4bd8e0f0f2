"""Running a method: decoding its arguments, calling it, and telling a caller's mistake from the method's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from sys import modules
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import BadArguments
from .codec import Codec
from .methods import CallContext, Handler, Kind, Method, current_call
from .reactor import Reactor
from .stats import Stats
from .tracing import OPENTELEMETRY, TRACE, Serving, async_items, awaited, items, serving

if TYPE_CHECKING:
    from .eventloop import EventLoop


class Serves(Protocol):
    """What a connection needs of the server that it belongs to."""

    handler: Handler
    codec: Codec
    reactor: Reactor
    stats: Stats

    def event_loop(self) -> EventLoop: ...


class NotRun(BadArguments):
    """A call that did not get as far as its method. Other refusals that come out of one are of calls that it made."""


def invoke(
    codec: Codec, method: Method, context: CallContext, pickle: Any, buffers: Any, streams: tuple[object, ...] = ()
) -> tuple[Any, BaseException | None]:
    """Decode the arguments and run the method: (result, None) or (None, what it raised)."""
    token = current_call.set(context)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    try:
        try:
            args, kwargs = codec.decode(pickle, buffers, streams)
        except BaseException as error:  # Users' classes take part in decoding: they may raise anything.
            return None, NotRun(method.name, f"the arguments cannot be decoded: {error}")
        carrier = kwargs.pop(TRACE) if kwargs and TRACE in kwargs else None
        span = serving(context, carrier) if OPENTELEMETRY in modules else None
        if span is None:
            return method.function(*args, **kwargs), None
        if method.kind is not Kind.PLAIN:
            return _traced_items(span, method, method.function(*args, **kwargs)), None
        with span:
            return method.function(*args, **kwargs), None
    except BaseException as error:  # Whatever the method raises is its answer.
        return None, bad_arguments(method, args, kwargs, error)
    finally:
        current_call.reset(token)


def _traced_items(span: Serving, method: Method, generator: Any) -> Any:
    return items(span, generator) if method.kind is Kind.GENERATOR else async_items(span, generator)


def start_async(
    codec: Codec,
    loop: Callable[[], EventLoop],
    method: Method,
    context: CallContext,
    pickle: Any,
    buffers: Any,
    finish: Callable[..., None],
    streams: tuple[object, ...] = (),
) -> None:
    try:
        args, kwargs = codec.decode(pickle, buffers, streams=streams)
        carrier = kwargs.pop(TRACE) if kwargs and TRACE in kwargs else None
        coroutine = functools.partial(method.function, *args, **kwargs)
    except BaseException as error:  # As in `_invoke`.
        finish(None, NotRun(method.name, f"the arguments cannot be decoded: {error}"), flush=True)
        return

    def make() -> Any:
        try:
            running = coroutine()
        except TypeError as error:
            raise bad_arguments(method, args, kwargs, error) from None
        span = serving(context, carrier) if OPENTELEMETRY in modules else None
        return running if span is None else awaited(span, running)

    loop().start(make, context, functools.partial(finish, flush=True))


def bad_arguments(method: Method, args: Any, kwargs: Any, error: BaseException) -> BaseException:
    """Tell a `TypeError` because of arguments that do not fit from one that the method's own code raised.

    The first never entered a frame below the caller's; the signature confirms it.
    """
    traceback = error.__traceback__
    if not isinstance(error, TypeError) or (traceback is not None and traceback.tb_next is not None):
        return error
    try:
        inspect.signature(method.function).bind(*args, **kwargs)
    except TypeError as mismatch:
        return NotRun(method.name, f"{mismatch} (its signature is {inspect.signature(method.function)})")
    except ValueError:
        pass  # A builtin without a signature.
    return error
