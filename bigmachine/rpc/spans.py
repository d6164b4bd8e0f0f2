"""OpenTelemetry's spans for calls: see `tracing`. Imported where the process has it loaded already."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from types import TracebackType

from opentelemetry import context as contexts
from opentelemetry import propagate, trace
from opentelemetry.trace import ProxyTracerProvider, Span, SpanKind, Status, StatusCode, Tracer, TracerProvider

from ..info import VERSION
from .methods import CallContext

_tracer: tuple[TracerProvider, Tracer] | None = None
"""The last provider that was asked, and what it gave: asking costs more than a span."""


def calling(method: str, place: Callable[[], Mapping[str, str | int]]) -> Calling | None:
    """See `tracing.calling`."""
    tracer = _current_tracer()
    if tracer is None and not trace.get_current_span().get_span_context().is_valid:
        return None
    return Calling(tracer, method, place)


def serving(context: CallContext, carrier: object) -> Serving | None:
    """See `tracing.serving`. What is no carrier is taken for an empty one."""
    tracer = _current_tracer()
    if tracer is None and not carrier:
        return None
    headers = {name: value for name, value in carrier.items() if isinstance(value, str)} if isinstance(carrier, dict) else {}
    return Serving(tracer, context, headers)


def _current_tracer() -> Tracer | None:
    """None where nobody has set a provider, and so nobody would see spans."""
    global _tracer
    provider = trace.get_tracer_provider()
    if type(provider) is ProxyTracerProvider:
        return None
    known = _tracer
    if known is None or known[0] is not provider:
        known = _tracer = provider, provider.get_tracer("bigmachine", VERSION)
    return known[1]


class Calling:
    """See `tracing.Calling`. It is nobody's current span: between its ends only the toolkit runs."""

    def __init__(self, tracer: Tracer | None, method: str, place: Callable[[], Mapping[str, str | int]]) -> None:
        self._lock = threading.Lock()
        self._ended = False
        self._span: Span | None = None
        self.carrier: dict[str, str] = {}
        if tracer is None:
            propagate.inject(self.carrier)
            return
        self._span = tracer.start_span(method, kind=SpanKind.CLIENT, attributes={**_attributes(method), **place()})
        propagate.inject(self.carrier, trace.set_span_in_context(self._span))

    def end(self, error: BaseException | None = None) -> None:
        """The call has ended."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        if self._span is not None:
            _end(self._span, error)


class Serving:
    """See `tracing.Serving`."""

    def __init__(self, tracer: Tracer | None, context: CallContext, carrier: dict[str, str]) -> None:
        self._tracer = tracer
        self._span: Span | None = None
        self._context = context
        self._carrier = carrier

    def __enter__(self) -> Serving:
        # Whatever span this thread last had is none of this call's: what it is a part of, the caller has said.
        above = propagate.extract(self._carrier, contexts.Context())
        if self._tracer is not None:
            method = self._context.method
            attributes = _attributes(method) | {"bigmachine.caller": self._context.caller}
            self._span = self._tracer.start_span(method, above, SpanKind.SERVER, attributes)
            above = trace.set_span_in_context(self._span, above)
        self._token = contexts.attach(above)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        contexts.detach(self._token)
        if self._span is not None:
            _end(self._span, error)


def _attributes(method: str) -> dict[str, str | int]:
    service, _, name = method.partition(".")
    return {"rpc.system": "bigmachine", "rpc.service": service, "rpc.method": name}


def _end(span: Span, error: BaseException | None) -> None:
    """`GeneratorExit` says that nobody wants the rest: no error. What is no `Exception` has nothing to tell but its type."""
    if error is not None and not isinstance(error, GeneratorExit) and span.is_recording():
        text = type(error).__name__
        if isinstance(error, Exception):
            try:
                text = f"{text}: {error}" if str(error) else text
                span.record_exception(error)
            except Exception:  # The user's class takes part: its text may raise.
                pass
        span.set_status(Status(StatusCode.ERROR, text))
    span.end()
