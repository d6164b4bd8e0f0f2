"""One connection to a process, at its client: calls and streams that are sent on it, and what comes back.

Small calls go through the call channel, larger ones and streams have an HTTP/2 stream of their own (`Exchange`).
"""

from __future__ import annotations

import itertools
import ssl
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import (
    BadArguments,
    CallRefused,
    Forbidden,
    NotReady,
    RemoteError,
    UnknownMethod,
    Unreachable,
    UsageError,
)
from .calls import Call, Outcome, Pending
from .channel import (
    CALL,
    CANCEL,
    LARGE,
    MAX_BUFFERS,
    RAISED,
    REFUSED,
    RESULT,
    SMALL,
    Message,
    call_parts,
    parse_refused,
    parse_result,
)
from .codec import Codec, Encoded
from .connection import MAX_STREAMS, Connection, ConnectionFailed, Data, Ended, Event, Filled, GoneAway, Headed, Reset
from .failures import decode_failure
from .items import Exchange, ItemStream
from .reactor import Reactor
from .stats import Stats
from .streams import Body, Inbox, Stream, copy_into, layout, parse_layout
from .transport import Closed, Transport

ACKNOWLEDGE = 256 * 1024
"""Bytes of channel messages after which the peer's window is given back: rarely, as it costs a frame."""

MAX_NAME = 255
"""Bytes of ``Service.method``: what the call channel has room for."""

MAX_NAMES = 1000
"""Methods whose encoded name is kept."""

OVERLAP = 4
"""Calls under way on a connection from which on another `submit` may wait for more of them, for a tick at most: it is not
the first thing that the machine will do."""

MAX_FAILURE = 4 * 1024 * 1024
"""Bytes of an error body that are read: a pickled exception is at most 1 MiB, its traceback 64 KiB."""

_REFUSALS: dict[int, type[CallRefused]] = {400: BadArguments, 403: Forbidden, 404: UnknownMethod, 503: NotReady}


def refusal(status: int, method: str, reason: str) -> CallRefused:
    """The error for a 4xx or 503 answer."""
    return _REFUSALS.get(status, CallRefused)(method, reason)


class ClientConnection:
    """One connection. Made by `Client`; ends once, and then every call on it fails."""

    def __init__(
        self,
        sock: ssl.SSLSocket,
        authority: str,
        address: str,
        codec: Codec,
        reactor: Reactor,
        stats: Stats,
        explain: Callable[[Unreachable], BaseException],
    ) -> None:
        self.address = address
        self._explain = explain
        self._authority = authority
        self.codec = codec
        self.reactor = reactor
        self._stats = stats
        self._connection = Connection(client=True)
        self._numbers = itertools.count(1)
        self._names: dict[str, bytes] = {}
        self._pendings: dict[int, Pending] = {}
        self._exchanges: dict[int, Exchange] = {}
        self._slots = threading.Semaphore(MAX_STREAMS - 1)  # The channel has one.
        self.transport = Transport(sock, self._connection, reactor, self, leads=True)
        self.transport.start()

    @property
    def usable(self) -> bool:
        """New calls may be started."""
        return self.transport.closed is None and self._connection.goaway is None

    @property
    def closed(self) -> Closed | None:
        return self.transport.closed

    # -- Calls -------------------------------------------------------------------------------------------------------

    def start(self, method: str, encoded: Encoded, timeout: float, call: Call[Any] | None) -> Pending:
        """Send a call. Raises `Unreachable` where it could not be sent."""
        nbytes = encoded.nbytes if encoded.buffers else len(encoded.pickle)
        pending = Pending(method, nbytes)
        pending.call = call
        if nbytes > SMALL or encoded.streams or len(encoded.buffers) > MAX_BUFFERS:
            self._open(Exchange(pending), method, encoded, timeout)
            return pending
        transport, connection = self.transport, self._connection
        if connection.out_bytes > SMALL:
            transport.wait_for_room(_deadline(timeout))
        name = self._names.get(method) or self._name(method)
        pending.number = number = next(self._numbers)
        with transport.lock:
            if transport.closed is not None or connection.goaway is not None:
                raise self._not_sent()
            if connection.channel < 0:
                connection.use_channel(connection.open(self._headers("", "application/x-bigmachine-calls")))
            self._pendings[number] = pending
            data = None if encoded.buffers else connection.call_message(number, timeout, name, encoded.pickle)
            if data is None:
                pass
            elif call is not None and len(self._pendings) > OVERLAP:
                transport.send_soon(data)
            else:
                transport.send_now(data)
        if data is None:
            try:
                parts = call_parts(name, timeout, encoded.pickle, encoded.buffers)
                transport.send_message(CALL, number, parts, _deadline(timeout))
            except Closed:
                pass  # `on_closed` has completed, or will complete, the call.
        return pending

    def _name(self, method: str) -> bytes:
        name = method.encode()
        if len(name) > MAX_NAME:
            raise UnknownMethod(method[:MAX_NAME], f"a method's name has at most {MAX_NAME} bytes")
        if len(self._names) < MAX_NAMES:
            self._names[method] = name
        return name

    def _not_sent(self) -> Unreachable:
        closed = self.transport.closed
        return Unreachable(self.address, str(closed) if closed else "the connection is going away", sent=False)

    def _headers(self, path: str, content_type: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
        return [
            (":method", "POST"),
            (":scheme", "https"),
            (":authority", self._authority),
            (":path", f"/bigrpc/{path}"),
            ("content-type", content_type),
            *more,
        ]

    def _open(self, exchange: Exchange, method: str, encoded: Encoded, timeout: float) -> None:
        """Start `exchange` and send its request, on this thread; as much of it as can be sent before the timeout."""
        deadline = _deadline(timeout)
        more = [("bigm-layout", layout(encoded.pickle, encoded.buffers))]
        if timeout:
            more.append(("bigm-timeout", f"{timeout:.6f}"))
        if exchange.items:
            more.append(("accept", "application/x-bigmachine-items"))
        if encoded.streams:
            more.append(("bigm-stream", "1"))
        if len(encoded.streams) > 1:
            raise UsageError(f"{method}: one argument of a call can be a Stream, not {len(encoded.streams)}")
        self._begin(exchange, self._headers(method, "application/x-bigmachine-pickle", *more), deadline=deadline)
        try:
            alive = self.transport.send_body(exchange.stream, [encoded.pickle, *encoded.buffers], deadline)
            for stream in encoded.streams:
                alive = alive and self._send_stream(exchange, stream, deadline)
        except Closed:
            return  # `on_closed` completes it.
        if alive:
            with self.transport.lock:
                self._connection.end(exchange.stream)
                self.transport.flush()

    def _send_stream(self, exchange: Exchange, stream: object, deadline: float | None) -> bool:
        assert isinstance(stream, Stream)
        try:
            return self.transport.send_body(exchange.stream, stream.chunks(), deadline)
        except Closed:
            raise
        except BaseException as error:
            self._give_up(exchange, error)
            raise

    def _begin(
        self, exchange: Exchange, headers: Sequence[tuple[str, str]], *, end: bool = False, deadline: float | None = None
    ) -> None:
        """Open a stream. Raises `Unreachable(sent=False)`, also where `deadline` passes before there is one."""
        transport = self.transport
        while not self._slots.acquire(timeout=1.0 if deadline is None else max(0.0, min(1.0, deadline - time.monotonic()))):
            if transport.closed is not None:
                raise self._not_sent()
            if deadline is not None and time.monotonic() >= deadline:
                raise Unreachable(self.address, f"{MAX_STREAMS - 1} large calls are under way on the connection", sent=False)
        try:
            with transport.lock:
                if transport.closed is not None or self._connection.goaway is not None:
                    raise self._not_sent()
                exchange.stream = self._connection.open(headers, end=end)
                self._exchanges[exchange.stream] = exchange
                transport.flush()
        except ConnectionFailed as error:
            self._slots.release()
            raise Unreachable(self.address, str(error), sent=False) from error
        except BaseException:  # Whatever it is (Ctrl-C, too): the slot is given back.
            self._slots.release()
            raise

    def stream(self, method: str, encoded: Encoded, timeout: float) -> ItemStream:
        """Call a generator method."""
        exchange = Exchange(Pending(method, encoded.nbytes), items=True)
        exchange.inbox = Inbox(lambda size: self._consumed(exchange.stream, size))
        self._open(exchange, method, encoded, timeout)
        return ItemStream(self, exchange, timeout)

    def cancel(self, pending: Pending) -> None:
        """Give `pending` up, on the far side too."""
        with self.transport.lock:
            if self.transport.closed is not None:
                return
            if self._pendings.pop(pending.number, None) is not None:
                data = self._connection.message(CANCEL, pending.number, ())
                if data is not None:
                    self.transport.send_now(data)
                else:
                    self.reactor.execute(lambda: self._send_cancel(pending.number))
        exchange = next((found for found in list(self._exchanges.values()) if found.pending is pending), None)
        if exchange is not None:
            self._give_up(exchange, None)
        else:
            self.transport.interrupt(pending)

    def _send_cancel(self, number: int) -> None:
        try:
            self.transport.send_message(CANCEL, number, ())
        except Closed:
            pass  # Nobody runs it any more.

    def _give_up(self, exchange: Exchange, error: BaseException | None) -> None:
        self._drop(exchange)
        with self.transport.lock:
            if self.transport.closed is None:
                self._connection.reset(exchange.stream)
                self.transport.flush()
        if exchange.inbox is not None:
            exchange.inbox.end(error)
        self.transport.interrupt(exchange.pending)

    def abandon(self, exchange: Exchange) -> None:
        """Nobody wants the rest of `exchange`. Harmless where it has ended."""
        if exchange.stream in self._exchanges:
            self._give_up(exchange, None)

    def _drop(self, exchange: Exchange) -> bool:
        if self._exchanges.pop(exchange.stream, None) is None:
            return False
        self._slots.release()
        return True

    def _consumed(self, stream: int, size: int) -> None:
        with self.transport.lock:
            if self.transport.closed is None:
                self._connection.consumed(stream, size)
                self.transport.flush()

    def close(self, reason: str) -> None:
        """Say goodbye and end the connection; calls under way fail with `reason`."""
        with self.transport.lock:
            self._connection.close(0, reason)
            self.transport.flush()
        self.transport.fail(Closed(reason))

    # -- What arrives (connection owner) -----------------------------------------------------------------------------

    def on_readable(self) -> None:
        """A reactor worker reads while nobody waits: nobody else sends what waits for company, now that there are answers."""
        self.transport.read()
        self.transport.send_deferred()
        self.transport.release()

    def on_event(self, event: Event) -> None:
        """Dispatch; by the holder of the role."""
        if type(event) is GoneAway:
            self._on_goaway(event)
            return
        exchange = self._exchanges.get(event[0])
        if exchange is None:
            if event[0] == self._connection.channel and type(event) in (Reset, Ended):
                self.transport.fail(Closed("the peer closed the call channel"))
            return
        if type(event) is Headed:
            self._on_headed(exchange, event)
        elif type(event) is Data:
            self._on_data(exchange, event)
        elif type(event) is Ended:
            self._on_ended(exchange, event.trailers)
        elif type(event) is Reset:
            self._on_reset(exchange, event)
        elif type(event) is Filled:
            pass  # The end follows.

    def on_messages(self, messages: list[Message]) -> None:
        """Replies; by the holder of the role."""
        for kind, number, body in messages:
            pending = self._pendings.pop(number, None)
            if pending is None:
                continue  # Cancelled.
            if kind == RESULT:
                pending.received = len(body)
                pending.body = body
                if pending.call is None:  # The caller decodes it on his own thread.
                    seconds = time.perf_counter() - pending.started
                    self._stats.record(pending.method, seconds, pending.sent, pending.received, False)
                    pending.wake()
                else:
                    self._finish(pending, self._result_outcome(body))
            elif kind == RAISED:
                self._finish(pending, self._failure_outcome(pending, body), failed=True)
            elif kind == REFUSED:
                self._finish(pending, raiser(refusal(parse_refused(body)[0], pending.method, parse_refused(body)[1])))
            elif kind == LARGE:
                self._collect(pending)
        connection = self._connection
        if connection.messages_size >= ACKNOWLEDGE:
            size, connection.messages_size = connection.messages_size, 0
            self._consumed(connection.channel, size)

    def _collect(self, pending: Pending) -> None:
        """The reply is large: ask for it on a stream of its own. On a worker, as a stream may have to be waited for."""
        headers = self._headers("-/reply", "application/octet-stream", ("bigm-call", str(pending.number)))
        exchange = Exchange(pending)

        def begin() -> None:
            try:
                self._begin(exchange, headers, end=True)
            except Unreachable as error:
                self._finish(pending, raiser(Unreachable(self.address, error.reason, sent=True)))
                self.transport.interrupt(pending)

        if self._slots.acquire(blocking=False):
            self._slots.release()
            begin()
        else:
            self.reactor.execute(begin)

    def _on_headed(self, exchange: Exchange, event: Headed) -> None:
        exchange.status = int(event.headers.get(":status", "0"))
        if exchange.status == 200 and not exchange.items and "bigm-layout" in event.headers:
            try:
                exchange.body = Body(parse_layout(event.headers["bigm-layout"]))
            except (MemoryError, ValueError) as error:
                self._end_exchange(exchange, raiser(_no_memory(exchange.pending.method, error)))
                self._reset(exchange.stream)
                return
            with self.transport.lock:
                self._connection.set_sink(event.stream, exchange.body)
                self.transport.flush()
        if exchange.items and exchange.status == 200:
            exchange.pending.wake()
        if event.ended:
            self._on_ended(exchange, {})

    def _on_data(self, exchange: Exchange, event: Data) -> None:
        if exchange.status != 200:
            if len(exchange.failure) < MAX_FAILURE:
                exchange.failure += event.data
            self._consumed(event.stream, event.size)
        elif exchange.inbox is not None:
            exchange.inbox.feed(event.data, event.size)
            exchange.pending.wake()
        elif exchange.body is not None:
            copy_into(exchange.body, event.data)
        else:
            self._consumed(event.stream, event.size)

    def _on_ended(self, exchange: Exchange, trailers: dict[str, str]) -> None:
        pending = exchange.pending
        if "bigm-error" in trailers:
            failure = b64decode(trailers["bigm-error"])
            self._end_exchange(exchange, self._failure_outcome(pending, failure), failed=True)
        elif exchange.status == 590:
            self._end_exchange(exchange, self._failure_outcome(pending, bytes(exchange.failure)), failed=True)
        elif exchange.status != 200:
            reason = exchange.failure.decode("utf-8", "replace") or f"HTTP status {exchange.status}"
            self._end_exchange(exchange, raiser(refusal(exchange.status, pending.method, reason)))
        elif exchange.items:
            self._end_exchange(exchange, None)
        elif exchange.body is None or exchange.body.left:
            self._end_exchange(exchange, raiser(Unreachable(self.address, "the reply was cut short", sent=True)))
        else:
            body = exchange.body
            pending.received = body.size
            self._end_exchange(exchange, lambda: self.codec.decode(body.pickle, body.buffers))

    def _on_reset(self, exchange: Exchange, event: Reset) -> None:
        refused = event.code == 0x7  # REFUSED_STREAM: it certainly did not run.
        reason = "the machine refused the stream" if refused else f"the machine gave the call up (HTTP/2 code {event.code})"
        self._end_exchange(exchange, raiser(Unreachable(self.address, reason, sent=not refused)))

    def _on_goaway(self, event: GoneAway) -> None:
        reason = event.reason or "the machine is going away"
        for stream, exchange in list(self._exchanges.items()):
            if stream > event.last:
                self._end_exchange(exchange, raiser(Unreachable(self.address, reason, sent=False)))
        if event.code or self._connection.channel > event.last:
            self.transport.fail(Closed(f"the peer closed the connection: {reason} (HTTP/2 code {event.code})"))

    def on_closed(self, closed: Closed) -> None:
        """Every call under way fails, as soon as it is known why."""
        pendings = list(self._pendings.values())
        self._pendings.clear()
        exchanges = list(self._exchanges.values())
        if not pendings and not exchanges:
            return

        def fail() -> None:
            error = self.lost(closed)
            for pending in pendings:
                self._finish(pending, raiser(error), failed=True)
            for exchange in exchanges:
                self._end_exchange(exchange, raiser(error), failed=True)

        self.reactor.execute(fail)

    def lost(self, closed: Closed) -> BaseException:
        """The error for a call that was under way when the connection ended. A refused certificate shows only after
        the request was sent, and then nothing ran."""
        refused = "ALERT" in str(closed) or "CERTIFICATE" in str(closed)
        return self._explain(Unreachable(self.address, str(closed), sent=not refused))

    # -- Completion --------------------------------------------------------------------------------------------------

    def _reset(self, stream: int) -> None:
        with self.transport.lock:
            self._connection.reset(stream)
            self.transport.flush()

    def _end_exchange(self, exchange: Exchange, outcome: Outcome | None, *, failed: bool = False) -> None:
        if not self._drop(exchange):
            return
        if exchange.inbox is not None:
            exchange.inbox.end(_error_of(outcome))
        self._finish(exchange.pending, outcome or (lambda: None), failed=failed)

    def _finish(self, pending: Pending, outcome: Outcome, *, failed: bool = False) -> None:
        """Complete `pending`. A future is completed here, unless that may take long or run somebody's code."""
        seconds = time.perf_counter() - pending.started
        self._stats.record(pending.method, seconds, pending.sent, pending.received, failed)
        pending.outcome = outcome
        if pending.timer is not None:
            pending.timer.cancel()
        call = pending.call
        if call is None:
            pending.wake()
            return

        if call.watched or pending.received > SMALL:
            pending.wake()  # First: a thread that reads in order to get this reply must not go on reading.
            self.reactor.execute(lambda: call.complete(outcome))
        else:
            call.complete(outcome, self.reactor.execute)
            pending.wake()

    def _result_outcome(self, body: bytes) -> Outcome:
        def outcome() -> Any:
            pickle, buffers = parse_result(body)
            return self.codec.decode(pickle, buffers)

        return outcome

    def _failure_outcome(self, pending: Pending, failure: bytes) -> Outcome:
        def outcome() -> Any:
            raise decode_failure(failure, method=pending.method, address=self.address, codec=self.codec)

        return outcome


def raiser(error: BaseException) -> Outcome:
    """The outcome of a call that failed."""
    def outcome() -> Any:
        raise error.with_traceback(None)  # One error may be that of many calls: let it not grow with each.

    return outcome


def _deadline(timeout: float) -> float | None:
    return time.monotonic() + timeout if timeout else None


def _error_of(outcome: Outcome | None) -> BaseException | None:
    if outcome is None:
        return None
    try:
        outcome()
    except BaseException as error:
        return error
    return None


def _no_memory(method: str, error: Exception) -> Exception:
    if isinstance(error, MemoryError):
        return MemoryError(f"no memory for the reply of {method}: {error}")
    return RemoteError(method, type(error).__name__, str(error))
