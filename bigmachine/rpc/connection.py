"""One HTTP/2 connection, either end, without any I/O.

Theory of operation
-------------------
Rule 1. `h2` is the protocol machine: the preface, SETTINGS, header blocks, the states of streams, RST_STREAM, PING and the
windows for *sending* are its own. A GOAWAY that arrives is not: after it `h2` would refuse every frame, but what runs may
end.

Rule 2. The other exception is the payload of DATA frames, which never passes through `h2`: a frame on an open stream costs
about 20 µs at each end there, and every byte of it is copied on its way. Here the nine bytes of a frame's header are read and
written directly, and a payload is received straight into the buffer that the application will get (`sink`). `h2` still
learns of END_STREAM (as an empty DATA frame), and its windows are debited for what is sent, so that its state is true. Only a
request with a `content-length`, which `h2` insists on checking, goes through it whole: no client of ours sends one.

Rule 3. Windows for *receiving* are kept here. A stream's is given back when the application consumes (`consumed`), never
by the reader; a stream whose sink is the caller's own memory is given all that it needs at once. The connection's is given
back at arrival: what is unread is bounded stream by stream, and one slow stream does not stall the others.

Rule 4. DATA of a stream that this end has given up is thrown away here. A stream of small items may have thousands of
frames on their way then, and `h2` takes about 0.15 ms for each, and answers each with another RST_STREAM; what comes behind
them on the connection, say, the reply to the next call, would have to wait for seconds.

Rule 5. Calls are not synchronised: the transport holds its lock around each. Nothing here blocks, and what is to be
sent collects in `out`.

Input goes `get_buffer()` → the transport reads into it → `received(n)`; what happened is appended to `events`.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

from .channel import CALL, Message, MessageError, Messages
from .channel import HEADER as MESSAGE_HEADER

Headers = Sequence[tuple[str, str]]

FRAME_SIZE = 256 * 1024
"""Payload bytes of a DATA frame at most, both ways. It is what a small call may have to wait for on a connection that
moves a large payload (0.4 ms at 700 MB/s); smaller ones cost a header, a small TLS record, more often."""

STREAM_WINDOW = 4 * 1024 * 1024
"""Bytes a peer may send on a stream ahead of its consumer: the memory that a slow reader costs. 4 MiB keep 1 Gbit/s
busy over 30 ms. Bodies of known size are not bound by it (rule 3)."""

CONNECTION_WINDOW = 2**31 - 1
"""The largest there is: see rule 3."""

MAX_STREAMS = 256
"""Concurrent streams a peer may open: with STREAM_WINDOW the bound on what one connection can make this process hold
(1 GiB). Small calls do not count: they share one stream."""

MAX_CONTROL_FRAME = 64 * 1024
"""A frame that is not DATA and is larger than this is refused: our header blocks are below 32 KiB."""

SCRATCH = 64 * 1024
"""Bytes read at once where nobody has asked for them: four TLS records."""

MAX_GIVEN_UP = 1000
"""Streams that are remembered as given up: nothing says when a peer's last frame of one was sent. Those that were given
up before them are `h2`'s again, which remembers more."""

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

_HEADER = struct.Struct(">BHBBI")
_HEADERS = struct.Struct(">BHBBIIBI")  # A DATA frame's header and that of the only message in it.
_DATA = 0x0
_GOAWAY = 0x7
_CALL_HEADERS = struct.Struct(">BHBBIIBIdBB")  # These, and the fixed part of a CALL.
_END_STREAM = 0x1
_PADDED = 0x8
_WINDOW_UPDATE = struct.Struct(">BHBBII")


class ConnectionFailed(Exception):
    """The connection cannot go on: the peer broke the protocol (`theirs`) or it ended. The text says how."""


class Headed(NamedTuple):
    """A request arrived (server), or a response's headers (client); `ended` where no body follows."""

    stream: int
    headers: dict[str, str]
    ended: bool


class Data(NamedTuple):
    """Body bytes that no sink took. `size` is what `consumed` must be told, some time."""

    stream: int
    data: bytes | bytearray
    size: int


class Filled(NamedTuple):
    """The stream's sink has got all that it wanted; further bytes come as `Data`."""

    stream: int


class Ended(NamedTuple):
    """The peer has sent all of the stream; `trailers` may be empty."""

    stream: int
    trailers: dict[str, str]


class Reset(NamedTuple):
    """The peer gave the stream up; `code` is HTTP/2's."""

    stream: int
    code: int


class GoneAway(NamedTuple):
    """The peer takes no streams above `last`: they did not run. `reason` is its debug text."""

    last: int
    code: int
    reason: str


Event = Headed | Data | Filled | Ended | Reset | GoneAway


class Sink(Protocol):
    """Memory of the application that a body goes to. Never returns an empty view while `left` is positive."""

    left: int

    def view(self) -> memoryview:
        """Where the next bytes go: contiguous, at most `left` bytes."""

    def advance(self, n: int) -> None:
        """`n` bytes were written to `view()`."""


class _Receiving:
    """The receiving half of one stream."""

    __slots__ = ("sink", "through_h2", "unacknowledged", "ungranted", "window")

    def __init__(self) -> None:
        self.sink: Sink | None = None
        self.window = STREAM_WINDOW
        self.unacknowledged = 0
        self.ungranted = 0  # What the sink needs beyond the largest window that there is.
        self.through_h2 = False


class Connection:
    """See the module. `out` holds what is to be sent, in order; whoever sends it takes it from there."""

    def __init__(self, *, client: bool) -> None:
        self.client = client
        self.events: deque[Event] = deque()
        self.out: deque[bytes | memoryview] = deque()
        self.out_bytes = 0
        self.channel = -1  # The stream that carries messages, once there is one.
        self.messages: list[Message] = []  # What has arrived on it: whoever takes them says `consumed(messages_size)`.
        self.messages_size = 0
        self._cut = Messages()
        self._channel_stream: Any = None
        self.windows_opened = 0  # Counts whatever may let a blocked sender go on.
        self.goaway: GoneAway | None = None
        self._h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=client,
                header_encoding="utf-8",
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self._h2.local_settings = h2.settings.Settings(
            client=client,
            initial_values={
                h2.settings.SettingCodes.ENABLE_PUSH: 0,
                h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                h2.settings.SettingCodes.MAX_FRAME_SIZE: FRAME_SIZE,
                h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: MAX_STREAMS,
                h2.settings.SettingCodes.MAX_HEADER_LIST_SIZE: MAX_CONTROL_FRAME,
            },
        )
        self._receiving: dict[int, _Receiving] = {}
        self._given_up: dict[int, None] = {}  # In that order.
        self._received_since_update = 0
        self._buffer = bytearray(SCRATCH)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._need_preface = not client
        self._left = 0  # Payload bytes of the current DATA frame that have not arrived.
        self._stream = 0
        self._ends = False
        self._whole: bytearray | None = None  # A frame that is collected for h2, and how much of it is here.
        self._whole_have = 0
        self.direct = False  # The last `get_buffer` gave the application's own memory: fill it before `received`.
        self._h2.max_inbound_frame_size = FRAME_SIZE  # It was set from the settings before these.
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(CONNECTION_WINDOW - 65535)
        self._collect()

    # -- Sending -----------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        data = self._h2.data_to_send()
        if data:
            self.out.append(data)
            self.out_bytes += len(data)

    def can_open(self) -> bool:
        """True where the peer's limit lets this end open another stream."""
        return self.goaway is None and self._h2.open_outbound_streams < self._h2.remote_settings.max_concurrent_streams

    def open(self, headers: Headers, *, end: bool = False) -> int:
        """Start a stream (client) with its request's headers; returns its number."""
        try:
            stream = self._h2.get_next_available_stream_id()
            self._h2.send_headers(stream, headers, end_stream=end)
        except h2.exceptions.ProtocolError as error:
            raise ConnectionFailed(f"cannot open a stream: {error}") from error
        self._receiving[stream] = _Receiving()
        self._collect()
        return stream

    def send_headers(self, stream: int, headers: Headers, *, end: bool = False) -> bool:
        """A response's headers, or the trailers of either side. False where the stream is gone."""
        try:
            self._h2.send_headers(stream, headers, end_stream=end)
        except h2.exceptions.ProtocolError:
            return False
        self._collect()
        return True

    def window(self, stream: int) -> int:
        """Bytes that may be sent on `stream` now; -1 where it is gone."""
        machine = self._h2
        state = machine.streams.get(stream)
        if state is None or state.closed:
            return -1
        # Negative where the peer has lowered the initial window of streams that had used more: RFC 9113, 6.9.2.
        return max(0, min(machine.outbound_flow_control_window, state.outbound_flow_control_window))

    def send_data(self, stream: int, size: int, *parts: bytes | memoryview) -> None:
        """One DATA frame of `size` bytes, which the caller has checked against `window` and `FRAME_SIZE`."""
        machine = self._h2
        machine.outbound_flow_control_window -= size
        machine.streams[stream].outbound_flow_control_window -= size
        header = _HEADER.pack(size >> 16, size & 0xFFFF, _DATA, 0, stream)
        if size <= 2048:
            self.out.append(b"".join((header, *parts)))
        else:
            self.out.append(header)
            self.out.extend(parts)
        self.out_bytes += size + 9

    def use_channel(self, stream: int) -> None:
        """`stream` carries messages: what arrives on it collects in `messages`, not in `events`."""
        self.channel = stream
        self._channel_stream = self._h2.streams[stream]

    def take_messages(self, data: bytes) -> None:
        """`data` arrived on the channel. Raises `ConnectionFailed`."""
        try:
            self.messages += self._cut.feed(data)
        except MessageError as error:
            raise ConnectionFailed(str(error)) from error
        self.messages_size += len(data)

    def message(self, kind: int, number: int, parts: tuple[bytes | bytearray | memoryview, ...]) -> bytes | None:
        """The bytes of a DATA frame that holds one message (see `channel`) with `parts` as its body, to be sent next. None
        where the channel's window has no room for it."""
        size = 0
        for part in parts:
            size += len(part)
        total = size + 9
        machine, stream = self._h2, self._channel_stream
        if machine.outbound_flow_control_window < total or stream.outbound_flow_control_window < total:
            return None
        machine.outbound_flow_control_window -= total
        stream.outbound_flow_control_window -= total
        if total > machine.max_outbound_frame_size:  # Somebody else's client: ours take four times the largest message.
            return self._frames(MESSAGE_HEADER.pack(size, kind, number) + b"".join(parts))
        head = _HEADERS.pack(total >> 16, total & 0xFFFF, _DATA, 0, self.channel, size, kind, number)
        return b"".join((head, *parts))

    def _frames(self, data: bytes) -> bytes:
        """`data` as DATA frames of the channel, one behind the other."""
        limit = self._h2.max_outbound_frame_size
        frames = []
        for start in range(0, len(data), limit):
            piece = data[start : start + limit]
            frames.append(_HEADER.pack(len(piece) >> 16, len(piece) & 0xFFFF, _DATA, 0, self.channel) + piece)
        return b"".join(frames)

    def call_message(self, number: int, timeout: float, method: bytes, pickle: bytes) -> bytes | None:
        """`message` for a `CALL` without buffers, in one go: it is on the path of every small call."""
        size = 10 + len(method) + len(pickle)
        total = size + 9
        machine, stream = self._h2, self._channel_stream
        if machine.outbound_flow_control_window < total or stream.outbound_flow_control_window < total:
            return None
        if total > machine.max_outbound_frame_size:
            return None  # `message` cuts it.
        machine.outbound_flow_control_window -= total
        stream.outbound_flow_control_window -= total
        head = _CALL_HEADERS.pack(
            total >> 16, total & 0xFFFF, _DATA, 0, self.channel, size, CALL, number, timeout, len(method), 0
        )
        return head + method + pickle

    @property
    def frame_size(self) -> int:
        """Payload bytes of a DATA frame that the peer accepts, at most `FRAME_SIZE`."""
        return min(self._h2.max_outbound_frame_size, FRAME_SIZE)

    def end(self, stream: int) -> None:
        """Half-close: nothing more will be sent on `stream`. Harmless where it is gone."""
        try:
            self._h2.end_stream(stream)
        except h2.exceptions.ProtocolError:
            return
        self._collect()

    def finish(self, stream: int) -> None:
        """`end` a response; what is still on its way of its request is turned away."""
        self.end(stream)
        state = self._h2.streams.get(stream)
        receiving = self._receiving.get(stream)
        foreign = receiving is not None and receiving.through_h2  # curl would report the reset, and not the response.
        if state is not None and not state.closed and not foreign:
            self.reset(stream, h2.errors.ErrorCodes.NO_ERROR)

    def reset(self, stream: int, code: int = h2.errors.ErrorCodes.CANCEL) -> None:
        """Give `stream` up. Harmless where it is gone."""
        if self._receiving.pop(stream, None) is not None:
            self._given_up[stream] = None
            if len(self._given_up) > MAX_GIVEN_UP:
                del self._given_up[next(iter(self._given_up))]
        try:
            self._h2.reset_stream(stream, code)
        except h2.exceptions.ProtocolError:
            return
        self._collect()

    def close(self, code: int = 0, reason: str = "") -> None:
        """Say GOAWAY: no stream is taken any more."""
        try:
            self._h2.close_connection(code, reason.encode()[:256] or None)
        except h2.exceptions.ProtocolError:
            return
        self._collect()

    def go_away(self, reason: str) -> None:
        """Announce that new streams will be refused while those that run are finished (the peer may still send)."""
        payload = struct.pack(">II", self._h2.highest_inbound_stream_id, 0) + reason.encode()[:256]
        frame = struct.pack(">BHBBI", 0, len(payload), 0x7, 0, 0) + payload
        self.out.append(frame)
        self.out_bytes += len(frame)

    # -- Receiving: flow control -------------------------------------------------------------------------------------

    def set_sink(self, stream: int, sink: Sink, *, ahead: int = 0) -> None:
        """Receive the next bytes of `stream` into `sink`; lets the peer send all of it, and `ahead` bytes more."""
        receiving = self._receiving.get(stream)
        if receiving is None or receiving.through_h2:
            return
        receiving.sink = sink if sink.left else None
        receiving.ungranted = sink.left + ahead
        self._grant(stream, receiving)

    def _grant(self, stream: int, receiving: _Receiving) -> None:
        grant = min(receiving.ungranted, CONNECTION_WINDOW - receiving.window)
        if grant > 0:
            receiving.ungranted -= grant
            receiving.window += grant
            self._window_update(stream, grant)

    def consumed(self, stream: int, size: int) -> None:
        """The application has consumed `size` bytes of `stream`: let the peer send as many more."""
        receiving = self._receiving.get(stream)
        if receiving is None:
            return
        if receiving.through_h2:
            try:
                self._h2.increment_flow_control_window(size, stream)
            except h2.exceptions.ProtocolError:
                return
            self._collect()
            return
        receiving.unacknowledged += size
        if receiving.unacknowledged >= STREAM_WINDOW // 2:
            self._window_update(stream, receiving.unacknowledged)
            receiving.window += receiving.unacknowledged
            receiving.unacknowledged = 0

    def _window_update(self, stream: int, size: int) -> None:
        self.out.append(_WINDOW_UPDATE.pack(0, 4, 0x8, 0, stream, size))
        self.out_bytes += 13

    def _debit_connection(self, size: int) -> None:
        self._received_since_update += size
        if self._received_since_update >= CONNECTION_WINDOW // 4:  # h2 keeps back up to half, of what it throws away.
            self._window_update(0, self._received_since_update)
            self._received_since_update = 0

    def _debit(self, stream: int, receiving: _Receiving, size: int) -> None:
        self._debit_connection(size)
        receiving.window -= size
        if receiving.window < 0:
            code = h2.errors.ErrorCodes.FLOW_CONTROL_ERROR
            raise self._broken("the peer sent more than the flow-control window of a stream allows", code)
        if receiving.ungranted and receiving.window < CONNECTION_WINDOW // 2:
            self._grant(stream, receiving)

    def _broken(self, text: str, code: int = h2.errors.ErrorCodes.PROTOCOL_ERROR) -> ConnectionFailed:
        """The peer broke the protocol: tell it, and whoever catches what is to be raised."""
        self.close(code, text)
        return ConnectionFailed(text)

    # -- Receiving ---------------------------------------------------------------------------------------------------

    def get_buffer(self) -> memoryview:
        """Where the next bytes from the network go; `direct` afterwards says whether that is a sink."""
        self.direct = False
        if not self._left and self._start == self._end and self._whole is None:
            self._start = self._end = 0
            return self._view
        if self._whole is not None:
            return memoryview(self._whole)[self._whole_have :]
        if self._left and self._start == self._end:
            receiving = self._receiving.get(self._stream)
            if receiving is not None and receiving.sink is not None and receiving.sink.left:
                self.direct = True
                view = receiving.sink.view()
                return view[: self._left] if len(view) > self._left else view
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == SCRATCH:
            rest = self._end - self._start
            self._buffer[:rest] = self._buffer[self._start : self._end]
            self._start, self._end = 0, rest
        return self._view[self._end :]

    def received(self, n: int) -> None:
        """`n` bytes were read into the buffer. Raises `ConnectionFailed` where the peer breaks the protocol."""
        if self._whole is not None:
            self._whole_have += n
            if self._whole_have == len(self._whole):
                frame, self._whole = self._whole, None
                self._take_frame(bytes(frame))
            return
        if self.direct:
            self.direct = False
            receiving = self._receiving[self._stream]
            assert receiving.sink is not None
            receiving.sink.advance(n)
            self._left -= n
            self._after_data(receiving, n)
            return
        if n >= 18 and not self._end and not self._left and self._cut.empty:
            # By far the most frequent: one frame, with one message in it, as `message` makes them.
            high, low, kind, flags, stream, size, what, number = _HEADERS.unpack_from(self._buffer)
            channel = self._receiving.get(stream) if stream == self.channel else None
            if channel is not None and n == size + 18 == (high << 16 | low) + 9 and not kind and not flags:
                self._debit(stream, channel, n - 9)
                self.messages.append((what, number, self._view[18:n].tobytes()))
                self.messages_size += n - 9
                return
        self._end += n
        if self._need_preface and not self._read_preface():
            return
        while self._start < self._end:
            if self._left:
                self._read_payload()
            elif not self._read_frame():
                return

    def _read_preface(self) -> bool:
        have = bytes(self._view[self._start : min(self._end, self._start + 24)])
        if not PREFACE.startswith(have):
            raise self._broken(f"not HTTP/2: the connection begins with {have!r}")
        if len(have) < 24:
            return False
        self._start += 24
        self._need_preface = False
        self._feed(have)
        return True

    def _read_frame(self) -> bool:
        """Begin the frame at the start of the buffer; False where too little of it is there."""
        start = self._start
        available = self._end - start
        if available < 9:
            return False
        high, low, kind, flags, stream = _HEADER.unpack_from(self._buffer, start)
        length = high << 16 | low
        if kind == _DATA and not flags & _PADDED:
            receiving = self._receiving.get(stream)
            if receiving is not None and not receiving.through_h2:
                if length > FRAME_SIZE:
                    raise self._too_large(kind, length, FRAME_SIZE)
                self._debit(stream, receiving, length)
                self._start = start + 9
                self._left = length
                self._stream = stream
                self._ends = bool(flags & _END_STREAM)
                if not length:
                    self._end_data()
                return True
            if receiving is None and stream in self._given_up and length <= FRAME_SIZE:
                self._debit_connection(length)
                self._start = start + 9
                self._left = length
                self._stream = stream
                self._ends = False  # To h2 it has ended.
                return True
        limit = FRAME_SIZE if kind == _DATA else MAX_CONTROL_FRAME
        if length > limit:
            raise self._too_large(kind, length, limit)
        if available >= 9 + length:
            self._start = start + 9 + length
            self._take_frame(bytes(self._view[start : start + 9 + length]))
            return True
        self._whole = bytearray(9 + length)
        self._whole[:available] = self._view[start : self._end]
        self._whole_have = available
        self._start = self._end
        return False

    def _too_large(self, kind: int, length: int, limit: int) -> ConnectionFailed:
        code = h2.errors.ErrorCodes.FRAME_SIZE_ERROR
        return self._broken(f"a frame of type {kind} with {length} bytes; the limit is {limit}", code)

    def _take_frame(self, frame: bytes) -> None:
        """A whole frame: h2's, but for two that it would not do the right thing with."""
        _, _, kind, _, stream = _HEADER.unpack_from(frame)
        if kind == _GOAWAY:
            self._take_goaway(stream, frame[9:])
            return
        if kind == _DATA:
            receiving = self._receiving.get(stream)
            if receiving is not None and not receiving.through_h2:
                self._take_padded(stream, receiving, frame)
                return
        self._feed(frame)

    def _take_goaway(self, stream: int, payload: bytes) -> None:
        """h2 would refuse every later frame, also of the streams that the peer goes on to serve."""
        if stream or len(payload) < 8:
            raise self._broken("a malformed GOAWAY")
        last, code = struct.unpack_from(">II", payload)
        self.goaway = GoneAway(last & 0x7FFFFFFF, code, payload[8:].decode("utf-8", "replace"))
        self.windows_opened += 1
        self.events.append(self.goaway)

    def _take_padded(self, stream: int, receiving: _Receiving, frame: bytes) -> None:
        """Padding counts against the window, and nobody consumes it: it is given back here."""
        length = len(frame) - 9
        if not length or frame[9] >= length:
            raise self._broken("a DATA frame with more padding than payload")
        self._debit(stream, receiving, length)
        self._stream = stream
        self._ends = bool(frame[4] & _END_STREAM)
        data = memoryview(frame)[10 : len(frame) - frame[9]]
        self.consumed(stream, length - len(data))
        while data and receiving.sink is not None and receiving.sink.left:
            view = receiving.sink.view()
            n = min(len(view), len(data))
            view[:n] = data[:n]
            receiving.sink.advance(n)
            data = data[n:]
        if receiving.sink is not None and not receiving.sink.left:
            receiving.sink = None
            self.events.append(Filled(stream))
        if data and stream == self.channel:
            self.take_messages(bytes(data))
        elif data:
            self.events.append(Data(stream, bytes(data), len(data)))
        self._end_data()

    def _read_payload(self) -> None:
        """Deliver what the buffer holds of the current DATA frame."""
        n = min(self._left, self._end - self._start)
        receiving = self._receiving.get(self._stream)
        if receiving is not None and receiving.sink is not None and receiving.sink.left:
            view = receiving.sink.view()
            n = min(n, len(view))
            view[:n] = self._view[self._start : self._start + n]
            receiving.sink.advance(n)
        elif self._stream == self.channel:
            self.take_messages(bytes(self._view[self._start : self._start + n]))
        elif receiving is not None:
            self.events.append(Data(self._stream, bytes(self._view[self._start : self._start + n]), n))
        self._start += n
        self._left -= n
        self._after_data(receiving, n)

    def _after_data(self, receiving: _Receiving | None, n: int) -> None:
        if receiving is not None and receiving.sink is not None and not receiving.sink.left:
            receiving.sink = None
            self.events.append(Filled(self._stream))
        if not self._left:
            self._end_data()

    def _end_data(self) -> None:
        if self._ends:
            self._ends = False
            self._feed(_HEADER.pack(0, 0, _DATA, _END_STREAM, self._stream))

    def _feed(self, data: bytes) -> None:
        """Give `data`, whole frames, to h2, and translate what it makes of them."""
        try:
            happened = self._h2.receive_data(data)
        except (h2.exceptions.ProtocolError, UnicodeDecodeError) as error:
            self._collect()  # h2 has prepared a GOAWAY that says why.
            raise ConnectionFailed(f"{type(error).__name__}: {error}") from error
        for event in happened:
            translate = _TRANSLATE.get(type(event))
            if translate is not None:
                translate(self, event)
        self._collect()

    # -- What h2 says ------------------------------------------------------------------------------------------------

    def _on_request(self, event: h2.events.RequestReceived) -> None:
        headers = {str(name): str(value) for name, value in event.headers or ()}
        receiving = self._receiving[event.stream_id] = _Receiving()
        receiving.through_h2 = "content-length" in headers
        self.events.append(Headed(event.stream_id, headers, event.stream_ended is not None))

    def _on_response(self, event: h2.events.ResponseReceived) -> None:
        headers = {str(name): str(value) for name, value in event.headers or ()}
        receiving = self._receiving.get(event.stream_id)
        if receiving is not None:
            receiving.through_h2 = "content-length" in headers
        self.events.append(Headed(event.stream_id, headers, event.stream_ended is not None))

    def _on_data(self, event: h2.events.DataReceived) -> None:
        size = event.flow_controlled_length or 0
        if size:  # Else it is an END_STREAM alone (rule 2).
            self._h2.increment_flow_control_window(size)
            self.events.append(Data(event.stream_id, event.data or b"", size))

    def _on_trailers(self, event: h2.events.TrailersReceived) -> None:
        trailers = {str(name): str(value) for name, value in event.headers or ()}
        self.events.append(Ended(event.stream_id, trailers))
        self._receiving.pop(event.stream_id, None)

    def _on_end(self, event: h2.events.StreamEnded) -> None:
        # Trailers, and headers that end the stream, were reported with them.
        if not (self.events and self.events[-1][0] == event.stream_id and _says_end(self.events[-1])):
            self.events.append(Ended(event.stream_id, {}))
        self._receiving.pop(event.stream_id, None)  # What follows is not DATA, or h2 says what is wrong with it.

    def _on_reset(self, event: h2.events.StreamReset) -> None:
        self._receiving.pop(event.stream_id, None)
        self.windows_opened += 1
        self.events.append(Reset(event.stream_id, int(event.error_code or 0)))

    def _on_window(self, event: h2.events.Event) -> None:
        self.windows_opened += 1


def _says_end(event: Event) -> bool:
    return isinstance(event, Ended) or (isinstance(event, Headed) and event.ended)


_TRANSLATE: dict[type[h2.events.Event], Callable[[Connection, Any], None]] = {
    h2.events.RequestReceived: Connection._on_request,
    h2.events.ResponseReceived: Connection._on_response,
    h2.events.DataReceived: Connection._on_data,
    h2.events.TrailersReceived: Connection._on_trailers,
    h2.events.StreamEnded: Connection._on_end,
    h2.events.StreamReset: Connection._on_reset,
    h2.events.WindowUpdated: Connection._on_window,
    h2.events.RemoteSettingsChanged: Connection._on_window,
}
