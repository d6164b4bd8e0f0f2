"""The called end: connections to one process, and the calls that run on them.

A plain method that came through the call channel runs on the thread that read it, which writes the reply too; the role of
reading is taken from that thread when the method turns out to be slow (`reactor`, `transport`). Everything that may
have to wait for its client (large payloads, streams of items) runs on a worker that holds no role.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterator
from pickle import dumps
from typing import TYPE_CHECKING, Any

from ..errors import BadArguments, CallRefused
from . import channel
from .client import copy_into
from .codec import Codec, Encoded
from .connection import Connection, ConnectionFailed, Data, Ended, Event, Filled, GoneAway, Headed, Reset
from .failures import encode_failure, reduce_failure
from .methods import CallContext, Handler, Kind, Method, current_call
from .reactor import READ, WRITE, Reactor, Timer, Watch, begin_linger, enter, leave
from .stats import Stats
from .streams import Body, Inbox, incoming_file, layout, pack_item, parse_layout
from .transport import Closed, Transport

if TYPE_CHECKING:
    from .eventloop import EventLoop

HANDSHAKE_TIMEOUT = 10.0
"""Seconds that a peer has for TLS: a few round trips on any network."""

REPLY_DELAY = 0.0002
"""Seconds for which the reply of a fast call may wait for those of others that arrived with it, to share a TLS record."""

MAX_UNANNOUNCED = 64 * 1024 * 1024
"""Bytes of a body whose layout its client did not announce (JSON, other people's clients)."""

MAX_TRAILER = 16 * 1024
"""Bytes of a failure in a trailer: header lists are limited to 64 KiB on the wire, in base64."""

JSON = "application/json"
PICKLE = "application/x-bigmachine-pickle"
ITEMS = "application/x-bigmachine-items"
BYTES = "application/octet-stream"

_ATOMS = frozenset({int, float, bool, type(None)})
"""Types of small results that need no look at what they may contain."""

_NOTHING: list[Any] = []

_CANCELLED = CallContext("", "", None, True)


class _NotRun(BadArguments):
    """A call that did not get as far as its method. Other refusals that come out of one are of calls that it made."""


class _Request:
    """A call on a stream of its own, while it arrives and while it runs."""

    __slots__ = ("accept", "body", "content_type", "context", "inbox", "method", "raw", "size", "started", "stream")

    def __init__(self, stream: int, method: Method, context: CallContext, headers: dict[str, str]) -> None:
        self.stream = stream
        self.method = method
        self.context = context
        self.content_type = headers.get("content-type", PICKLE).partition(";")[0].strip().lower()
        self.accept = headers.get("accept", "")
        self.body: Body | None = None
        self.raw = bytearray()
        self.inbox: Inbox | None = None
        self.started = False
        self.size = 0


class ServerConnection:
    """One client's connection. Owner of its transport; what it serves is the server's."""

    def __init__(self, sock: ssl.SSLSocket, caller: object, server: Server) -> None:
        self.caller = caller
        self._server = server
        self._connection = Connection(client=False)
        self._caller_name = str(caller)
        self._inbox: deque[channel.Message] = deque()
        self._calls: dict[int, CallContext | None] = {}  # Calls of the channel that have not been answered.
        self._large: dict[int, Encoded] = {}
        self._requests: dict[int, _Request] = {}
        self._oldest_reply = math.inf
        self.transport = Transport(sock, self._connection, server.reactor, self, leads=False)

    # -- The channel: reading, running, answering --------------------------------------------------------------------

    def on_readable(self) -> None:
        """A worker has the role: read, run what came, answer."""
        transport = self.transport
        worker = begin_linger()
        while True:
            transport.read()
            if not self._drain():
                return  # The monitor has passed the role on.
            if not transport.linger(worker):
                break
        transport.release()

    def _go_on(self) -> None:
        """On another worker: what is left of a batch in which a call was slow."""
        if self._drain():
            self.transport.release()

    def _drain(self) -> bool:
        """Run what has arrived, and write the answers. False where the role was lost."""
        inbox = self._inbox
        while inbox:
            try:
                _, number, body = inbox.popleft()
            except IndexError:
                break  # The connection has ended in the meantime.
            if not self._run(number, body):
                return False
        self._acknowledge()
        return True

    def _acknowledge(self) -> None:
        """All calls that have arrived are running, or have run: let the client send more. By the holder of the role."""
        connection = self._connection
        if connection.messages_size >= channel.SMALL:
            with self.transport.lock:
                size, connection.messages_size = connection.messages_size, 0
                connection.consumed(connection.channel, size)

    def steal(self) -> None:
        """The method that runs on this connection's reader is slow: somebody else goes on (see `reactor.Stealable`)."""
        if self._inbox:
            self._flush()
            self._server.reactor.execute(self._go_on)
        else:
            self._acknowledge()
            self.transport.release()

    def _flush(self) -> None:
        self._oldest_reply = math.inf
        with self.transport.lock:
            self.transport.flush()

    def _run(self, number: int, body: bytes) -> bool:
        """Run one call of the channel. False where the role was lost meanwhile."""
        if self._calls.get(number) is _CANCELLED:
            del self._calls[number]
            return True
        started = time.perf_counter()
        try:
            name, timeout, pickle, buffers = channel.parse_call(body)
            method = self._server.handler.find(name.decode(), self.caller)
            if method.kind is Kind.GENERATOR or method.kind is Kind.ASYNC_GENERATOR:
                raise BadArguments(method.name, "it yields: call it with `stream`")
        except CallRefused as refused:
            self._calls.pop(number, None)
            self._reply(channel.REFUSED, number, channel.refused_parts(refused.status, refused.reason))
            return True
        except Exception as malformed:  # Whatever it makes of the parser.
            self.transport.fail(Closed(f"a malformed call: {malformed}"))
            return True
        deadline = time.monotonic() + timeout if timeout else None
        context = CallContext(method.name, self._caller_name, deadline)
        self._calls[number] = context
        gate = method.gate
        if gate is not None or method.kind is Kind.ASYNC:
            finish = functools.partial(self._answer, number, context, started, len(body))
            if method.kind is Kind.ASYNC:
                self._start_async(method, context, pickle, buffers, finish)
                return True
            assert gate is not None
            if not gate.enter(functools.partial(self._run_gated, method, context, pickle, buffers, finish)):
                return True
        token = enter(self)
        result, error = self._invoke(method, context, pickle, buffers)
        held = leave(token)
        self._answer(number, context, started, len(body), result, error, flush=not held)
        if gate is not None:
            following = gate.leave()
            if following is not None:
                self._server.reactor.execute(following)
        return held

    def _run_gated(
        self, method: Method, context: CallContext, pickle: Any, buffers: Any, finish: Callable[..., None]
    ) -> None:
        """A call whose turn at the gate has come; on a worker without a role."""
        assert method.gate is not None
        if context.cancelled:
            self._forget(context)
        else:
            result, error = self._invoke(method, context, pickle, buffers)
            finish(result, error, flush=True)
        following = method.gate.leave()
        if following is not None:
            self._server.reactor.execute(following)

    def _invoke(
        self, method: Method, context: CallContext, pickle: Any, buffers: Any, streams: tuple[object, ...] = ()
    ) -> tuple[Any, BaseException | None]:
        """Decode the arguments and run the method: (result, None) or (None, what it raised)."""
        token = current_call.set(context)
        args: tuple[Any, ...] = ()
        kwargs: dict[str, Any] = {}
        try:
            try:
                args, kwargs = self._server.codec.decode(pickle, buffers, streams=streams)
            except BaseException as error:  # Users' classes take part in decoding: they may raise anything.
                return None, _NotRun(method.name, f"the arguments cannot be decoded: {error}")
            return method.function(*args, **kwargs), None
        except BaseException as error:  # Whatever the method raises is its answer.
            return None, _bad_arguments(method, args, kwargs, error)
        finally:
            current_call.reset(token)

    def _start_async(
        self,
        method: Method,
        context: CallContext,
        pickle: Any,
        buffers: Any,
        finish: Callable[..., None],
        streams: tuple[object, ...] = (),
    ) -> None:
        try:
            args, kwargs = self._server.codec.decode(pickle, buffers, streams=streams)
            coroutine = functools.partial(method.function, *args, **kwargs)
        except BaseException as error:  # As in `_invoke`.
            finish(None, _NotRun(method.name, f"the arguments cannot be decoded: {error}"), flush=True)
            return

        def make() -> Any:
            try:
                return coroutine()
            except TypeError as error:
                raise _bad_arguments(method, args, kwargs, error) from None

        self._server.event_loop().start(make, context, functools.partial(finish, flush=True))

    def _answer(
        self,
        number: int,
        context: CallContext,
        started: float,
        received: int,
        result: Any,
        error: BaseException | None,
        *,
        flush: bool,
    ) -> None:
        """Send the outcome of a call of the channel."""
        codec = self._server.codec
        sent = 0
        kind = channel.LARGE
        parts: tuple[channel.Bytes, ...] = ()
        if error is None:
            try:
                if type(result) in _ATOMS:
                    encoded = Encoded(dumps(result, 5), _NOTHING, _NOTHING)
                else:
                    encoded = codec.encode(result, f"the reply of {context.method}")
            except BaseException as problem:  # Users' classes take part in encoding.
                error = problem
            else:
                sent = encoded.nbytes if encoded.buffers else len(encoded.pickle)
                if sent > channel.SMALL or len(encoded.buffers) > channel.MAX_BUFFERS:
                    self._large[number] = encoded
                else:
                    kind, parts = channel.RESULT, channel.result_parts(encoded.pickle, encoded.buffers)
        if isinstance(error, _NotRun):
            kind, parts = channel.REFUSED, channel.refused_parts(error.status, error.reason)
        elif error is not None:
            failure = encode_failure(error, codec)
            if len(failure) > channel.SMALL:
                failure = reduce_failure(failure, channel.SMALL)
            kind, parts = channel.RAISED, (failure,)
        if self._calls.pop(number, None) is None:
            self._large.pop(number, None)  # Cancelled, or the client is gone.
        else:
            self._reply(kind, number, parts, flush=flush)
        self._server.stats.record(context.method, time.perf_counter() - started, sent, received, error is not None)

    def _reply(self, kind: int, number: int, parts: tuple[channel.Bytes, ...], *, flush: bool = False) -> None:
        """Write an answer; it waits for others only where more calls of the same batch are about to be answered."""
        transport = self.transport
        with transport.lock:
            if transport.closed is not None:
                return
            data = self._connection.message(kind, number, sum(map(len, parts)), parts)
            if data is None:
                pass
            elif flush or not self._inbox:
                transport.send_now(data)
            else:
                self._connection.out.append(data)
                self._connection.out_bytes += len(data)
                now = time.perf_counter()
                if now - self._oldest_reply > REPLY_DELAY:
                    self._oldest_reply = math.inf
                    transport.flush()
                elif self._oldest_reply == math.inf:
                    self._oldest_reply = now
        if data is None:
            self._server.reactor.execute(lambda: self._reply_slowly(kind, number, parts))

    def _reply_slowly(self, kind: int, number: int, parts: tuple[channel.Bytes, ...]) -> None:
        """When the client has not read its replies: on a worker without the role, which waits until it does."""
        try:
            self.transport.send_message(kind, number, parts)
        except Closed:
            pass

    def _forget(self, context: CallContext) -> None:
        for number, other in list(self._calls.items()):
            if other is context:
                self._calls.pop(number, None)

    # -- What arrives (connection owner) -----------------------------------------------------------------------------

    def on_event(self, event: Event) -> None:
        """Dispatch; by the holder of the role."""
        if type(event) is Headed:
            self._on_request(event)
        elif type(event) is GoneAway:
            if event.code:
                self.transport.fail(Closed(f"the client gave up: {event.reason} (HTTP/2 code {event.code})"))
        else:
            request = self._requests.get(event.stream)  # type: ignore[union-attr]
            if request is not None:
                self._on_body(request, event)
            elif event.stream != self._connection.channel:  # type: ignore[union-attr]
                pass  # Of a call that was refused or given up.
            elif type(event) is Data:
                self._on_first_messages(event)
            elif type(event) is not Filled:
                self.transport.fail(Closed("the client closed the call channel"))

    def _on_first_messages(self, event: Data) -> None:
        """They came together with the headers that opened the channel."""
        try:
            self._connection.take_messages(bytes(event.data))
        except ConnectionFailed as error:
            self.transport.fail(Closed(str(error)))
        messages, self._connection.messages = self._connection.messages, []
        self.on_messages(messages)

    def on_messages(self, messages: list[channel.Message]) -> None:
        """Calls and cancellations; by the holder of the role, who runs them afterwards."""
        for message in messages:
            kind, number, _ = message
            if kind == channel.CALL:
                self._calls[number] = None
                self._inbox.append(message)
            elif kind == channel.CANCEL:
                context = self._calls.get(number, _CANCELLED)
                if context is None:
                    self._calls[number] = _CANCELLED  # It waits in the inbox, which is ours.
                elif context is not _CANCELLED:
                    self._calls.pop(number, None)
                    context._cancel()
                self._large.pop(number, None)  # After the others: `_answer` looks for them when it has put it there.

    def _on_request(self, event: Headed) -> None:
        """Headers of a new stream: find the method, and prepare for the body. Refuse before anything is decoded."""
        headers = event.headers
        path = headers.get(":path", "")
        if headers.get(":method") != "POST":
            self._respond_text(event.stream, 405, "only POST is understood here")
        elif not path.startswith("/bigrpc/"):
            self._respond_text(event.stream, 404, f"no such path: {path}; calls go to /bigrpc/<Service>.<method>")
        elif path == "/bigrpc/":
            if self._connection.channel >= 0:
                self._respond_text(event.stream, 400, "a connection has one call channel")
                return
            with self.transport.lock:
                self._connection.use_channel(event.stream)
                self._connection.send_headers(event.stream, [(":status", "200")])
        elif path == "/bigrpc/-/reply":
            self._on_collect(event.stream, headers.get("bigm-call", ""))
        else:
            self._on_call(event, path[len("/bigrpc/") :], headers)

    def _on_call(self, event: Headed, name: str, headers: dict[str, str]) -> None:
        try:
            method = self._server.handler.find(name, self.caller)
            timeout = float(headers.get("bigm-timeout", "0"))
            deadline = time.monotonic() + timeout if timeout > 0 else None
            request = _Request(event.stream, method, CallContext(method.name, self._caller_name, deadline), headers)
            if request.content_type not in (JSON, PICKLE):
                raise BadArguments(name, f"content-type {request.content_type!r}: use {JSON} or {PICKLE}")
            if request.content_type == PICKLE:
                if "bigm-layout" in headers:
                    request.body = Body(parse_layout(headers["bigm-layout"]))
                    _check_kind(method, request.accept)
                elif "bigm-stream" in headers:
                    raise BadArguments(name, "a stream argument needs a bigm-layout")
        except CallRefused as error:
            self._respond_text(event.stream, error.status, error.reason)
        except MemoryError:
            self._respond_text(event.stream, 413, "no memory for arguments of that size")
        except ValueError as error:
            self._respond_text(event.stream, 400, f"malformed header: {error}")
        else:
            self._requests[event.stream] = request
            if "bigm-stream" in headers and request.body is not None:
                request.inbox = Inbox(lambda size: self._consumed(event.stream, size))
            if request.body is not None:
                with self.transport.lock:
                    self._connection.set_sink(event.stream, request.body)
                    self.transport.flush()
            if event.ended or (request.inbox is not None and request.body is not None and not request.body.left):
                self._start(request)

    def _on_collect(self, stream: int, number: str) -> None:
        encoded = self._large.pop(int(number), None) if number.isdecimal() and number.isascii() else None
        if encoded is None:
            self._respond_text(stream, 404, f"no reply is kept for call {number!r}")
            return
        send = functools.partial(self._respond, stream, 200, BYTES, encoded.pickle, encoded.buffers)
        self._server.reactor.execute(send)

    def _on_body(self, request: _Request, event: Event) -> None:
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
                self._respond_text(request.stream, 413, f"more than {MAX_UNANNOUNCED} bytes without a bigm-layout")
        elif type(event) is Filled:
            if request.inbox is not None:
                self._start(request)
        elif type(event) is Ended:
            if request.inbox is not None:
                request.inbox.end()
            self._start(request)
        elif type(event) is Reset:
            self._drop(request, ConnectionError(f"{self.caller} gave the call up"))

    def _drop(self, request: _Request, error: Exception) -> None:
        self._requests.pop(request.stream, None)
        if request.inbox is not None:
            request.inbox.end(error)
        request.context._cancel()

    def _consumed(self, stream: int, size: int) -> None:
        with self.transport.lock:
            if self.transport.closed is None:
                self._connection.consumed(stream, size)
                self.transport.flush()

    def on_closed(self, closed: Closed) -> None:
        """The client is gone: whatever still runs for it is cancelled."""
        self._server.forget(self)
        self._inbox.clear()
        self._large.clear()
        contexts = [context for context in list(self._calls.values()) if context is not None]
        self._calls.clear()
        for context in contexts:
            context._cancel()
        for request in list(self._requests.values()):
            self._drop(request, ConnectionError(f"the connection to {self.caller} ended: {closed}"))

    # -- Calls on streams of their own -------------------------------------------------------------------------------

    def _start(self, request: _Request) -> None:
        """All that is needed to run the method is here. It runs on a worker without a role, as it may wait for us."""
        if request.started:
            return
        request.started = True
        if request.body is not None and request.body.left:
            self._requests.pop(request.stream, None)
            self._respond_text(request.stream, 400, "the body is shorter than its bigm-layout")
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

    def _run_request(self, request: _Request) -> None:
        """On a worker: decode, run, answer."""
        started = time.perf_counter()
        method, context = request.method, request.context
        streams: tuple[object, ...] = () if request.inbox is None else (incoming_file(request.inbox),)
        body = request.body
        if request.content_type == JSON:
            try:
                pickle: Any = self._server.codec.encode(_json_arguments(method.name, request.raw), "JSON").pickle
            except _NotRun as refused:
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

            self._start_async(method, context, pickle, buffers, finish, streams)
            ended.wait()
            result, error = outcome[0]
        else:
            result, error = self._invoke(method, context, pickle, buffers, streams)
        if error is not None:
            self._end_request(request, started, error)
        elif method.kind is Kind.GENERATOR:
            self._send_items(request, started, iter(result))
        elif method.kind is Kind.ASYNC_GENERATOR:
            self._send_items(request, started, self._server.event_loop().iterate(result, context))
        else:
            self._send_result(request, started, result)

    def _send_result(self, request: _Request, started: float, result: Any) -> None:
        what = f"the reply of {request.method.name}"
        try:
            if request.content_type == JSON:
                encoded = Encoded(_to_json(result, what), [], [])
            else:
                encoded = self._server.codec.encode(result, what)
        except BaseException as error:  # Users' classes take part in encoding.
            self._end_request(request, started, error)
            return
        self._record(request, started, encoded.nbytes, failed=False)
        content_type = JSON if request.content_type == JSON else PICKLE
        self._respond(request.stream, 200, content_type, encoded.pickle, encoded.buffers)
        self._requests.pop(request.stream, None)

    def _send_items(self, request: _Request, started: float, items: Iterator[Any]) -> None:
        """Send what a generator yields, each when the client has room for it; close it when the client has gone."""
        raw = request.accept == BYTES
        transport, stream = self.transport, request.stream
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

    def _trailer(self, request: _Request, failure: BaseException) -> bytes:
        if request.content_type == JSON:
            return _json_failure(failure)[:MAX_TRAILER]
        data = encode_failure(failure, self._server.codec)
        return reduce_failure(data, MAX_TRAILER) if len(data) > MAX_TRAILER else data

    def _item_parts(self, request: _Request, item: Any, raw: bool) -> list[Any]:
        if raw:
            return [memoryview(item).cast("B")]
        what = f"an item of {request.method.name}"
        if request.content_type == JSON:
            return [_to_json(item, what) + b"\n"]
        encoded = self._server.codec.encode(item, what)
        return pack_item(encoded.pickle, encoded.buffers)

    def _end_request(self, request: _Request, started: float, error: BaseException) -> None:
        """Answer with `error`."""
        self._record(request, started, 0, failed=True)
        self._requests.pop(request.stream, None)
        if isinstance(error, _NotRun):
            self._respond_text(request.stream, error.status, error.reason)
        elif request.content_type == JSON:
            text = {"type": type(error).__qualname__, "message": _text(error)}
            self._respond(request.stream, 590, JSON, json.dumps({"error": text}).encode())
        else:
            failure = encode_failure(error, self._server.codec)
            self._respond(request.stream, 590, "application/x-bigmachine-failure", failure)

    def _record(self, request: _Request, started: float, sent: int, *, failed: bool) -> None:
        seconds = time.perf_counter() - started
        self._server.stats.record(request.method.name, seconds, sent, request.size, failed)

    def _head(self, stream: int, status: int, content_type: str, *more: tuple[str, str]) -> bool:
        headers = [(":status", str(status)), ("content-type", content_type), *more]
        with self.transport.lock:
            sent = self._connection.send_headers(stream, headers)
            self.transport.flush()
        return sent

    def _respond_text(self, stream: int, status: int, text: str) -> None:
        """A refusal: small, so that it needs no waiting, and may come before the request has arrived whole."""
        data = text.encode("utf-8", "replace")[:8192]
        with self.transport.lock:
            connection = self._connection
            headers = [(":status", str(status)), ("content-type", "text/plain; charset=utf-8")]
            if connection.send_headers(stream, headers) and connection.window(stream) >= len(data):
                connection.send_data(stream, len(data), data)
            connection.finish(stream)
            self.transport.flush()

    def _respond(self, stream: int, status: int, content_type: str, pickle: bytes, buffers: Any = ()) -> None:
        """A whole response, on a worker without a role."""
        more = () if content_type == JSON else (("bigm-layout", layout(pickle, buffers)),)
        try:
            if self._head(stream, status, content_type, *more) and self.transport.send_body(stream, [pickle, *buffers]):
                with self.transport.lock:
                    self._connection.finish(stream)
                    self.transport.flush()
        except Closed:
            pass  # The client has gone: nobody is waiting for it.


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as problem:  # The user's class takes part.
        return f"(str() of it raised {type(problem).__name__})"


def _check_kind(method: Method, accept: str) -> None:
    """Our own clients say whether they iterate: tell them apart from those who only hold the wrong end."""
    yields = method.kind is Kind.GENERATOR or method.kind is Kind.ASYNC_GENERATOR
    if yields and not accept:
        raise BadArguments(method.name, "it yields: call it with `stream`")
    if accept == ITEMS and not yields:
        raise BadArguments(method.name, "it does not yield: call it with `call` or `submit`")


def _items_type(request: _Request, raw: bool) -> str:
    if raw:
        return BYTES
    return "application/x-ndjson" if request.content_type == JSON else ITEMS


def _json_arguments(name: str, raw: bytearray) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An array is the positional arguments, an object the keyword arguments, nothing none, any other value the only one."""
    if not raw.strip():
        return (), {}
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise _NotRun(name, f"the body is not JSON: {error}") from None
    if isinstance(value, list):
        return tuple(value), {}
    if isinstance(value, dict):
        return (), value
    return (value,), {}


def _plain(value: Any) -> Any:
    """The JSON form of what has none: of the figures that bigmachine's own services return."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"Object of type {type(value).__qualname__} is not JSON serializable")


def _to_json(value: Any, what: str) -> bytes:
    try:
        return json.dumps(value, allow_nan=False, default=_plain).encode()
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what} has no JSON form: {error}; call it with pickle") from None


def _json_failure(error: BaseException) -> bytes:
    return json.dumps({"error": {"type": type(error).__qualname__, "message": str(error)}}).encode()


def _bad_arguments(method: Method, args: Any, kwargs: Any, error: BaseException) -> BaseException:
    """Tell a `TypeError` because of arguments that do not fit from one that the method's own code raised.

    The first never entered a frame below the caller's; the signature confirms it.
    """
    traceback = error.__traceback__
    if not isinstance(error, TypeError) or (traceback is not None and traceback.tb_next is not None):
        return error
    try:
        inspect.signature(method.function).bind(*args, **kwargs)
    except TypeError as mismatch:
        return _NotRun(method.name, f"{mismatch} (its signature is {inspect.signature(method.function)})")
    except ValueError:
        pass  # A builtin without a signature.
    return error


class Server:
    """Serves `handler`'s methods on connections that somebody else accepted (`adopt`)."""

    def __init__(
        self,
        handler: Handler,
        context: ssl.SSLContext,
        codec: Codec,
        reactor: Reactor,
        *,
        identify: Callable[[ssl.SSLSocket], object],
        log: Callable[[str], None],
        ready: bool = True,
    ) -> None:
        self.handler = handler
        self.codec = codec
        self.reactor = reactor
        self.stats = Stats()
        self._context = context
        self._identify = identify
        self._log = log
        self._lock = threading.Lock()
        self._connections: set[ServerConnection] = set()
        self._handshakes: set[_Handshake] = set()
        self._event_loop: EventLoop | None = None
        self._closed = False

    def adopt(self, raw: socket.socket) -> None:
        """Serve a connection whose first byte has not been read yet. Returns at once; failures are logged."""
        raw.setblocking(False)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock = self._context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
        except OSError as error:
            raw.close()
            self._log(f"refused a connection: {error}")
            return
        handshake = _Handshake(sock, self)
        with self._lock:
            self._handshakes.add(handshake)
        handshake.start()

    def handshake_ended(self, handshake: _Handshake, error: str | None) -> None:
        """Go on with a connection whose TLS is up; drop one whose is not."""
        with self._lock:
            self._handshakes.discard(handshake)
            closed = self._closed
        sock = handshake.sock
        try:
            if error is not None:
                raise Closed(error)
            if sock.selected_alpn_protocol() != "h2":
                raise Closed("the client does not speak HTTP/2")
            caller = self._identify(sock)
            if closed:
                raise Closed("the server is closed")
        except Exception as refusal:  # `identify` has errors of its own; whichever it is, this client is refused.
            self._log(f"refused a connection from {handshake.peer}: {refusal}")
            sock.close()
            return
        connection = ServerConnection(sock, caller, self)
        with self._lock:
            self._connections.add(connection)
            closed = self._closed
        connection.transport.start()
        if closed:
            connection.transport.fail(Closed("the server is closed"))

    def event_loop(self) -> EventLoop:
        """The loop that runs `async def` methods."""
        with self._lock:
            if self._event_loop is None:
                from .eventloop import EventLoop  # See there: asyncio is for those who use it.

                self._event_loop = EventLoop()
            return self._event_loop

    def forget(self, connection: ServerConnection) -> None:
        """The connection has ended."""
        with self._lock:
            self._connections.discard(connection)

    def drain(self, reason: str) -> None:
        """Take no new streams; what runs may end."""
        for connection in self._all():
            with connection.transport.lock:
                connection._connection.go_away(reason)
                connection.transport.flush()

    def close(self, reason: str = "the server is closed", *, abort: bool = False) -> None:
        """End all connections; with `abort` as a power cut would."""
        with self._lock:
            self._closed = True
            handshakes = list(self._handshakes)
            event_loop = self._event_loop
        for handshake in handshakes:
            handshake.end("the server is closed")
        for connection in self._all():
            if abort:
                connection.transport.abort()
            else:
                with connection.transport.lock:
                    connection._connection.close(0, reason)
                    connection.transport.flush()
                connection.transport.fail(Closed(reason))
        if event_loop is not None:
            event_loop.close()  # After the connections: what is cancelled by it is not to be answered.

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    @property
    def callers(self) -> list[object]:
        """Who is connected, as `identify` says."""
        return [connection.caller for connection in self._all()]

    def _all(self) -> list[ServerConnection]:
        with self._lock:
            return list(self._connections)


class _Handshake:
    """TLS is being set up, without a thread that waits: a peer that dawdles costs a descriptor for ten seconds."""

    def __init__(self, sock: ssl.SSLSocket, server: Server) -> None:
        self.sock = sock
        self._server = server
        self._lock = threading.Lock()
        self._ended = False
        try:
            self.peer = "{}:{}".format(*sock.getpeername()[:2])
        except OSError:
            self.peer = "a peer that has gone"
        self._watch: Watch | None = None
        self._timer: Timer | None = None

    def start(self) -> None:
        """Begin, on this thread."""
        reactor = self._server.reactor
        with self._lock:  # A worker may be on its way that woke for another user of the same descriptor.
            if self._ended:
                return
            self._watch = reactor.watch(self.sock.fileno(), self.step)
            self._timer = reactor.call_later(HANDSHAKE_TIMEOUT, lambda: self.end("no TLS handshake within 10 s"))
        self.step(0)

    def step(self, _: int) -> None:
        """Go as far as what has arrived allows."""
        with self._lock:
            if self._ended or self._watch is None:
                return
            try:
                self.sock.do_handshake()
            except ssl.SSLWantReadError:
                self._watch.arm(READ)
                return
            except ssl.SSLWantWriteError:
                self._watch.arm(WRITE)
                return
            except (OSError, ValueError) as error:
                problem = getattr(error, "reason", None) or str(error)
            else:
                problem = None
        self.end(problem)

    def end(self, error: str | None) -> None:
        """Once: hand the socket back to the server."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            if self._watch is not None:
                self._watch.close()
        if self._timer is not None:
            self._timer.cancel()
        self._server.handshake_ended(self, error)


