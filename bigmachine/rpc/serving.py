"""One client's connection, at the server: the call channel, and who gets what else arrives.

A plain method that came through the call channel runs on the thread that read it, which writes the reply too; the role of
reading is taken from that thread when the method turns out to be slow (`reactor`, `transport`).
"""

from __future__ import annotations

import functools
import math
import ssl
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from ..errors import BadArguments, CallRefused
from . import channel
from .codec import ATOMS, Encoded, encode_simple
from .connection import Connection, ConnectionFailed, Data, Ended, Event, Filled, GoneAway, Headed, Reset
from .failures import encode_failure, reduce_failure
from .invoke import NotRun, Serves, invoke, start_async
from .methods import CallContext, Kind, Method
from .reactor import begin_linger, enter, leave
from .requests import BYTES, Requests
from .transport import Closed, Transport

REPLY_DELAY = 0.0002
"""Seconds for which the reply of a fast call may wait for those of others that arrived with it, to share a TLS record."""

MAX_METHODS = 1000
"""Methods that a connection remembers."""

_CANCELLED = CallContext("", "", None, True)


class Owner(Serves, Protocol):
    """The server, as its connections see it."""

    def forget(self, connection: ServerConnection) -> None: ...


class ServerConnection:
    """One client's connection. Owner of its transport; what it serves is the server's."""

    def __init__(self, sock: ssl.SSLSocket, caller: object, server: Owner) -> None:
        self.caller = caller
        self._server = server
        self._connection = Connection(client=False)
        self._caller_name = str(caller)
        self._inbox: deque[channel.Message] = deque()
        self._calls: dict[int, CallContext | None] = {}  # Calls of the channel that have not been answered.
        self._large: dict[int, Encoded] = {}
        self._methods: dict[bytes, Method] = {}
        self._oldest_reply = math.inf
        self.transport = Transport(sock, self._connection, server.reactor, self, leads=False)
        self._requests = Requests(caller, self._connection, self.transport, server)

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
            method = self._methods.get(name) or self._find(name)
        except CallRefused as refused:
            self._calls.pop(number, None)
            self._reply(channel.REFUSED, number, channel.refused_parts(refused.status, refused.reason))
            return True
        except Exception as malformed:  # Whatever it makes of the parser.
            self.transport.fail(Closed(f"a malformed call: {malformed}"))
            return True
        deadline = time.monotonic() + timeout if timeout else None
        context = CallContext(method.name, self._caller_name, deadline)
        context.started = started
        self._calls[number] = context
        gate = method.gate
        if gate is not None or method.kind is Kind.ASYNC:
            finish = functools.partial(self._answer, number, context, started, len(body))
            if method.kind is Kind.ASYNC:
                start_async(self._server.codec, self._server.event_loop, method, context, pickle, buffers, finish)
                return True
            assert gate is not None
            if not gate.enter(functools.partial(self._run_gated, method, context, pickle, buffers, finish)):
                return True
        token = enter(self)
        result, error = invoke(self._server.codec, method, context, pickle, buffers)
        held = leave(token)
        self._answer(number, context, started, len(body), result, error, flush=not held)
        if gate is not None:
            following = gate.leave()
            if following is not None:
                self._server.reactor.execute(following)
        return held

    def _find(self, name: bytes) -> Method:
        """Ask the handler, once: a method that this caller may call stays so."""
        method = self._server.handler.find(name.decode(), self.caller)
        if method.kind is Kind.GENERATOR or method.kind is Kind.ASYNC_GENERATOR:
            raise BadArguments(method.name, "it yields: call it with `stream`")
        if len(self._methods) < MAX_METHODS:
            self._methods[name] = method
        return method

    def _run_gated(
        self, method: Method, context: CallContext, pickle: Any, buffers: Any, finish: Callable[..., None]
    ) -> None:
        """A call whose turn at the gate has come; on a worker without a role."""
        assert method.gate is not None
        if context.cancelled:
            self._forget(context)
        else:
            context.started = time.perf_counter()  # It may have waited for long.
            result, error = invoke(self._server.codec, method, context, pickle, buffers)
            finish(result, error, flush=True)
        following = method.gate.leave()
        if following is not None:
            self._server.reactor.execute(following)

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
                if type(result) in ATOMS:
                    encoded = encode_simple(result)
                else:
                    encoded = codec.encode(result, f"the reply of {context.method}")
            except BaseException as problem:  # Users' classes take part in encoding.
                error = problem
            else:
                pickle, buffers, _ = encoded
                sent = encoded.nbytes if buffers else len(pickle)
                if sent > channel.SMALL or len(buffers) > channel.MAX_BUFFERS:
                    self._large[number] = encoded
                else:
                    kind = channel.RESULT
                    parts = channel.result_parts(pickle, buffers) if buffers else (b"\0", pickle)
        if isinstance(error, NotRun):
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
            data = self._connection.message(kind, number, parts)
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
        if isinstance(event, Headed):
            self._on_request(event)
        elif isinstance(event, GoneAway):
            if event.code:
                self.transport.fail(Closed(f"the client gave up: {event.reason} (HTTP/2 code {event.code})"))
        else:
            self._on_stream(event)

    def _on_stream(self, event: Data | Filled | Ended | Reset) -> None:
        if self._requests.on_event(event) or event.stream != self._connection.channel:
            return  # In the latter case, of a call that was refused or given up.
        if type(event) is Data:
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
            self._requests.respond_text(event.stream, 405, "only POST is understood here")
        elif not path.startswith("/bigrpc/"):
            self._requests.respond_text(event.stream, 404, f"no such path: {path}; calls go to /bigrpc/<Service>.<method>")
        elif path == "/bigrpc/":
            if self._connection.channel >= 0:
                self._requests.respond_text(event.stream, 400, "a connection has one call channel")
                return
            with self.transport.lock:
                self._connection.use_channel(event.stream)
                self._connection.send_headers(event.stream, [(":status", "200")])
        elif path == "/bigrpc/-/reply":
            self._on_collect(event.stream, headers.get("bigm-call", ""))
        else:
            self._requests.on_call(event, path[len("/bigrpc/") :])

    def _on_collect(self, stream: int, number: str) -> None:
        encoded = self._large.pop(int(number), None) if number.isdecimal() and number.isascii() else None
        if encoded is None:
            self._requests.respond_text(stream, 404, f"no reply is kept for call {number!r}")
            return
        send = functools.partial(self._requests.respond, stream, 200, BYTES, encoded.pickle, encoded.buffers)
        self._server.reactor.execute(send)

    def on_closed(self, closed: Closed) -> None:
        """The client is gone: whatever still runs for it is cancelled."""
        self._server.forget(self)
        self._inbox.clear()
        self._large.clear()
        contexts = [context for context in list(self._calls.values()) if context is not None]
        self._calls.clear()
        for context in contexts:
            context._cancel()
        self._requests.close(ConnectionError(f"the connection to {self.caller} ended: {closed}"))
