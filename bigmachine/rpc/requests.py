"""Calls on HTTP/2 streams of their own: large payloads, streams of bytes and of items, JSON. The server's half.

They run on workers that hold no role, as they may have to wait for their client.
"""

from __future__ import annotations

import functools
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from sys import modules
from typing import Any

from ..errors import BadArguments, CallRefused
from .codec import Encoded
from .connection import Connection, Data, Ended, Filled, Headed, Reset
from .failures import encode_failure, reduce_failure
from .invoke import NotRun, Serves, invoke, start_async
from .jsonform import json_arguments, json_failure, to_json
from .methods import CallContext, Kind, Method, current_call
from .streams import Body, Inbox, copy_into, incoming_file, layout, pack_item, parse_layout
from .tracing import OPENTELEMETRY, TRACE
from .transport import Closed, Transport

MAX_UNANNOUNCED = 64 * 1024 * 1024
"""Bytes of a body whose layout its client did not announce (JSON, other people's clients)."""

MAX_TRAILER = 16 * 1024
"""Bytes of a failure in a trailer: header lists are limited to 64 KiB on the wire, in base64."""

JSON = "application/json"
PICKLE = "application/x-bigmachine-pickle"
ITEMS = "application/x-bigmachine-items"
BYTES = "application/octet-stream"


class Request:
    """A call on a stream of its own, while it arrives and while it runs."""

    __slots__ = ("accept", "body", "content_type", "context", "headers", "inbox", "method", "raw", "size", "started", "stream")

    def __init__(self, stream: int, method: Method, context: CallContext, headers: dict[str, str]) -> None:
        self.stream = stream
        self.method = method
        self.context = context
        self.headers = headers
        self.content_type = headers.get("content-type", PICKLE).partition(";")[0].strip().lower()
        self.accept = headers.get("accept", "")
        self.body: Body | None = None
        self.raw = bytearray()
        self.inbox: Inbox | None = None
        self.started = False
        self.size = 0


class Requests:
    """Those of one connection."""

    def __init__(self, caller: object, connection: Connection, transport: Transport, server: Serves) -> None:
        self._caller = caller
        self._caller_name = str(caller)
        self._connection = connection
        self._transport = transport
        self._server = server
        self._requests: dict[int, Request] = {}

    def on_call(self, event: Headed, name: str) -> None:
        """A call has begun: find its method and prepare for its body; refuse before anything is decoded."""
        headers = event.headers
        try:
            method = self._server.handler.find(name, self._caller)
            timeout = float(headers.get("bigm-timeout", "0"))
            deadline = time.monotonic() + timeout if timeout > 0 else None
            request = Request(event.stream, method, CallContext(method.name, self._caller_name, deadline), headers)
            if request.content_type not in (JSON, PICKLE):
                raise BadArguments(name, f"content-type {request.content_type!r}: use {JSON} or {PICKLE}")
            if request.content_type == PICKLE:
                if "bigm-layout" in headers:
                    request.body = Body(parse_layout(headers["bigm-layout"]))
                    _check_kind(method, request.accept)
                elif "bigm-stream" in headers:
                    raise BadArguments(name, "a stream argument needs a bigm-layout")
        except CallRefused as error:
            self.respond_text(event.stream, error.status, error.reason)
        except MemoryError:
            self.respond_text(event.stream, 413, "no memory for arguments of that size")
        except ValueError as error:
            self.respond_text(event.stream, 400, f"malformed header: {error}")
        else:
            self._requests[event.stream] = request
            if "bigm-stream" in headers and request.body is not None:
                request.inbox = Inbox(lambda size: self._consumed(event.stream, size))
            if request.body is not None:
                with self._transport.lock:
                    self._connection.set_sink(event.stream, request.body)
                    self._transport.flush()
            if event.ended or (request.inbox is not None and request.body is not None and not request.body.left):
                self._start(request)

    def on_event(self, event: Data | Filled | Ended | Reset) -> bool:
        """Something happened on a stream. False where that is none of these calls'."""
        request = self._requests.get(event.stream)
        if request is None:
            return False
        self._on_body(request, event)
        return True

    def _on_body(self, request: Request, event: Data | Filled | Ended | Reset) -> None:
        if type(event) is Data:
            data = event.data
            if request.body is not None and request.body.left:
                take = min(request.body.left, len(data))
                copy_into(request.body, data[:take])
                data = data[take:]
                self._consumed(event.stream, take)
                if not request.body.left and request.inbox is not None:
                    self._start(request)
            if not data:
                return
            if request.inbox is not None:
                request.inbox.feed(data, len(data))
                return
            request.raw += data
            self._consumed(event.stream, len(data))
            if len(request.raw) > MAX_UNANNOUNCED:
                self._requests.pop(request.stream, None)
                self.respond_text(request.stream, 413, f"more than {MAX_UNANNOUNCED} bytes without a bigm-layout")
        elif type(event) is Filled:
            if request.inbox is not None:
                self._start(request)
        elif type(event) is Ended:
            if request.inbox is not None:
                request.inbox.end()
            self._start(request)
        elif type(event) is Reset:
            self._drop(request, ConnectionError(f"{self._caller} gave the call up"))

    def _drop(self, request: Request, error: Exception) -> None:
        self._requests.pop(request.stream, None)
        if request.inbox is not None:
            request.inbox.end(error)
        request.context._cancel()

    def _consumed(self, stream: int, size: int) -> None:
        with self._transport.lock:
            if self._transport.closed is None:
                self._connection.consumed(stream, size)
                self._transport.flush()

    def _start(self, request: Request) -> None:
        """All that is needed to run the method is here. It runs on a worker without a role, as it may wait for us."""
        if request.started:
            return
        request.started = True
        if request.body is not None and request.body.left:
            self._requests.pop(request.stream, None)
            self.respond_text(request.stream, 400, "the body is shorter than its bigm-layout")
            return
        gate = request.method.gate
        if gate is None:
            self._server.reactor.execute(functools.partial(self._run_request, request))
            return

        def run() -> None:
            try:
                self._run_request(request)
            finally:
                following = gate.leave()
                if following is not None:
                    self._server.reactor.execute(following)

        if gate.enter(run):
            self._server.reactor.execute(run)

    def _run_request(self, request: Request) -> None:
        """On a worker: decode, run, answer."""
        started = time.perf_counter()
        method, context = request.method, request.context
        context.started = started
        streams: tuple[object, ...] = () if request.inbox is None else (incoming_file(request.inbox),)
        body = request.body
        if request.content_type == JSON:
            try:
                pickle: Any = self._server.codec.encode(_from_json(request), "JSON").pickle
            except NotRun as refused:
                self._end_request(request, started, refused)
                return
            buffers: Any = ()
        else:
            pickle, buffers = (body.pickle, body.buffers) if body is not None else (bytes(request.raw), ())
        request.size = body.size if body is not None else len(request.raw)
        if method.kind is Kind.ASYNC:
            ended = threading.Event()
            outcome: list[tuple[Any, BaseException | None]] = []

            def finish(result: Any, error: BaseException | None, *, flush: bool) -> None:
                outcome.append((result, error))
                ended.set()

            start_async(self._server.codec, self._server.event_loop, method, context, pickle, buffers, finish, streams)
            ended.wait()
            result, error = outcome[0]
        else:
            result, error = invoke(self._server.codec, method, context, pickle, buffers, streams)
        if error is not None:
            self._end_request(request, started, error)
        elif method.kind is Kind.GENERATOR:
            self._send_items(request, started, iter(result))
        elif method.kind is Kind.ASYNC_GENERATOR:
            self._send_items(request, started, self._server.event_loop().iterate(result, context))
        else:
            self._send_result(request, started, result)

    def _send_result(self, request: Request, started: float, result: Any) -> None:
        what = f"the reply of {request.method.name}"
        try:
            if request.content_type == JSON:
                encoded = Encoded(to_json(result, what), [], [])
            else:
                encoded = self._server.codec.encode(result, what)
        except BaseException as error:  # Users' classes take part in encoding.
            self._end_request(request, started, error)
            return
        self._record(request, started, encoded.nbytes, failed=False)
        content_type = JSON if request.content_type == JSON else PICKLE
        self.respond(request.stream, 200, content_type, encoded.pickle, encoded.buffers)
        self._requests.pop(request.stream, None)

    def _send_items(self, request: Request, started: float, items: Iterator[Any]) -> None:
        """Send what a generator yields, each when the client has room for it; close it when the client has gone."""
        raw = request.accept == BYTES
        transport, stream = self._transport, request.stream
        sent, headed, failure = 0, False, None
        token = current_call.set(request.context)
        try:
            for item in items:
                parts = self._item_parts(request, item, raw)
                if not headed:
                    headed = self._head(stream, 200, _items_type(request, raw))
                sent += sum(len(part) for part in parts)
                # Not at its deadline: that would look like its end. The caller resets the stream when he gives up.
                if request.context._cancelled or not transport.send_body(stream, parts):
                    break
        except Closed:
            pass
        except BaseException as error:  # The generator's own, or that of encoding what it yielded.
            failure = error
        finally:
            try:
                close = getattr(items, "close", None)
                if close is not None:
                    close()
            except BaseException as error:  # A generator that does not let itself be closed quietly.
                failure = failure or error
            current_call.reset(token)
        if failure is not None and not headed:
            self._end_request(request, started, failure)
            return
        self._record(request, started, sent, failed=failure is not None)
        self._requests.pop(stream, None)
        if not headed:
            self._head(stream, 200, _items_type(request, raw))
        with transport.lock:
            if failure is not None:
                trailer = self._trailer(request, failure)
                self._connection.send_headers(stream, [("bigm-error", b64encode(trailer).decode())], end=True)
            self._connection.finish(stream)
            transport.flush()

    def _trailer(self, request: Request, failure: BaseException) -> bytes:
        if request.content_type == JSON:
            return json_failure(failure)[:MAX_TRAILER]
        data = encode_failure(failure, self._server.codec)
        return reduce_failure(data, MAX_TRAILER) if len(data) > MAX_TRAILER else data

    def _item_parts(self, request: Request, item: Any, raw: bool) -> list[Any]:
        if raw:
            return [memoryview(item).cast("B")]
        what = f"an item of {request.method.name}"
        if request.content_type == JSON:
            return [to_json(item, what) + b"\n"]
        encoded = self._server.codec.encode(item, what)
        return pack_item(encoded.pickle, encoded.buffers)

    def _end_request(self, request: Request, started: float, error: BaseException) -> None:
        """Answer with `error`."""
        self._record(request, started, 0, failed=True)
        self._requests.pop(request.stream, None)
        if isinstance(error, NotRun):
            self.respond_text(request.stream, error.status, error.reason)
        elif request.content_type == JSON:
            self.respond(request.stream, 590, JSON, json_failure(error))
        else:
            failure = encode_failure(error, self._server.codec)
            self.respond(request.stream, 590, "application/x-bigmachine-failure", failure)

    def _record(self, request: Request, started: float, sent: int, *, failed: bool) -> None:
        seconds = time.perf_counter() - started
        self._server.stats.record(request.method.name, seconds, sent, request.size, failed)

    def _head(self, stream: int, status: int, content_type: str, *more: tuple[str, str]) -> bool:
        headers = [(":status", str(status)), ("content-type", content_type), *more]
        with self._transport.lock:
            sent = self._connection.send_headers(stream, headers)
            self._transport.flush()
        return sent

    def respond_text(self, stream: int, status: int, text: str) -> None:
        """A refusal: small, so that it needs no waiting, and may come before the request has arrived whole."""
        data = text.encode("utf-8", "replace")[:8192]
        with self._transport.lock:
            connection = self._connection
            headers = [(":status", str(status)), ("content-type", "text/plain; charset=utf-8")]
            if connection.send_headers(stream, headers) and connection.window(stream) >= len(data):
                connection.send_data(stream, len(data), data)
            connection.finish(stream)
            self._transport.flush()

    def respond(self, stream: int, status: int, content_type: str, pickle: bytes, buffers: Any = ()) -> None:
        """A whole response, on a worker without a role."""
        more = () if content_type == JSON else (("bigm-layout", layout(pickle, buffers)),)
        try:
            if self._head(stream, status, content_type, *more) and self._transport.send_body(stream, [pickle, *buffers]):
                with self._transport.lock:
                    self._connection.finish(stream)
                    self._transport.flush()
        except Closed:
            pass  # The client has gone: nobody is waiting for it.

    def close(self, error: Exception) -> None:
        """The client is gone: cancel whatever runs."""
        for request in list(self._requests.values()):
            self._drop(request, error)


def _from_json(request: Request) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call in the JSON form. Raises `NotRun`."""
    args, kwargs = json_arguments(request.method.name, request.raw)
    if OPENTELEMETRY in modules:
        kwargs[TRACE] = request.headers
    return args, kwargs


def _check_kind(method: Method, accept: str) -> None:
    """Our own clients say whether they iterate: tell them apart from those who only hold the wrong end."""
    yields = method.kind is Kind.GENERATOR or method.kind is Kind.ASYNC_GENERATOR
    if yields and not accept:
        raise BadArguments(method.name, "it yields: call it with `stream`")
    if accept == ITEMS and not yields:
        raise BadArguments(method.name, "it does not yield: call it with `call` or `submit`")


def _items_type(request: Request, raw: bool) -> str:
    if raw:
        return BYTES
    return "application/x-ndjson" if request.content_type == JSON else ITEMS
