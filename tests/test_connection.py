"""The connection core without I/O: two of them joined, and each against a plain `h2` on the other side.

Every script runs with its bytes delivered whole, one at a time, and cut at every boundary in turn.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import pytest

from bigmachine.rpc import connection as module
from bigmachine.rpc.channel import CALL, MAX_MESSAGE, RESULT, pack
from bigmachine.rpc.connection import (
    CONNECTION_WINDOW,
    FRAME_SIZE,
    MAX_CONTROL_FRAME,
    MAX_STREAMS,
    PREFACE,
    SCRATCH,
    STREAM_WINDOW,
    Connection,
    ConnectionFailed,
    Data,
    Ended,
    Event,
    Filled,
    GoneAway,
    Headed,
    Reset,
)
from bigmachine.rpc.streams import Body

REQUEST = [(":method", "POST"), (":scheme", "https"), (":authority", "x"), (":path", "/bigrpc/A.b")]
RESPONSE = [(":status", "200")]

Cut = Callable[[bytes], Iterator[bytes]]


def whole(data: bytes) -> Iterator[bytes]:
    yield data


def single(data: bytes) -> Iterator[bytes]:
    for i in range(len(data)):
        yield data[i : i + 1]


def chunks_of(size: int) -> Cut:
    def cut(data: bytes) -> Iterator[bytes]:
        for i in range(0, len(data), size):
            yield data[i : i + size]

    return cut


def take_out(connection: Connection) -> bytes:
    """What the connection wants to send; its count of those bytes must be right."""
    data = b"".join(bytes(part) for part in connection.out)
    assert connection.out_bytes == len(data)
    connection.out.clear()
    connection.out_bytes = 0
    return data


def give(connection: Connection, data: bytes, cut: Cut = whole) -> None:
    """Receive `data` as the transport would: into the buffer that the connection offers."""
    for piece in cut(data):
        view = memoryview(piece)
        while view:
            buffer = connection.get_buffer()
            assert len(buffer) > 0
            n = min(len(buffer), len(view))
            buffer[:n] = view[:n]
            connection.received(n)
            view = view[n:]


def take_events(connection: Connection) -> list[Event]:
    """What happened; Data events of the same stream that follow each other are joined."""
    found: list[Event] = []
    for event in connection.events:
        if isinstance(event, Data):
            assert event.data
            assert event.size == len(event.data)
            if found and isinstance(found[-1], Data) and found[-1].stream == event.stream:
                before = found.pop()
                assert isinstance(before, Data)
                event = Data(event.stream, bytes(before.data) + bytes(event.data), before.size + event.size)
        found.append(event)
    connection.events.clear()
    return found


class Pair:
    """A client and a server that are joined. `exchange` moves bytes until both have nothing more to say."""

    def __init__(self, cut: Cut = whole) -> None:
        self.client = Connection(client=True)
        self.server = Connection(client=False)
        self.cut = cut
        self.exchange()

    def exchange(self) -> None:
        while self.client.out or self.server.out:
            give(self.server, take_out(self.client), self.cut)
            give(self.client, take_out(self.server), self.cut)

    def request(self, headers: Sequence[tuple[str, str]] = REQUEST, *, end: bool = False) -> int:
        stream = self.client.open(headers, end=end)
        self.exchange()
        event = take_events(self.server)
        assert event == [Headed(stream, dict(headers), end)]
        return stream


CUTS = [pytest.param(whole, id="whole"), pytest.param(single, id="bytes"), pytest.param(chunks_of(7), id="sevens")]


@pytest.fixture(params=CUTS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def send(connection: Connection, stream: int, data: bytes) -> None:
    """All of `data`, in frames; the window must allow it."""
    view = memoryview(data)
    while view:
        n = min(len(view), connection.frame_size, connection.window(stream))
        assert n > 0
        connection.send_data(stream, n, view[:n])
        view = view[n:]


class Loop:
    """A sink that is never full of what it has got: so that gigabytes need no memory."""

    def __init__(self, left: int) -> None:
        self.left = left
        self._memory = memoryview(bytearray(SCRATCH))

    def view(self) -> memoryview:
        return self._memory[: self.left]

    def advance(self, n: int) -> None:
        self.left -= n


# -- A call ----------------------------------------------------------------------------------------------------------


def test_request_and_response(pair: Pair) -> None:
    stream = pair.request()
    pair.client.send_data(stream, 5, b"hello")
    pair.client.end(stream)
    pair.exchange()
    assert take_events(pair.server) == [Data(stream, b"hello", 5), Ended(stream, {})]
    assert pair.server.send_headers(stream, [*RESPONSE, ("x-sharp", "ß")])
    pair.server.send_data(stream, 2, b"ok")
    pair.server.end(stream)
    pair.exchange()
    assert take_events(pair.client) == [
        Headed(stream, {":status": "200", "x-sharp": "ß"}, False),
        Data(stream, b"ok", 2),
        Ended(stream, {}),
    ]


def test_the_same_cut_at_every_boundary() -> None:
    def script(cut: Cut) -> list[list[Event]]:
        pair = Pair()
        stream = pair.client.open(REQUEST)
        send(pair.client, stream, b"0123456789" * 3)
        pair.client.end(stream)
        pair.client.open(REQUEST, end=True)
        data = take_out(pair.client)
        give(pair.server, data, cut)
        events = [take_events(pair.server)]
        pair.server.send_headers(stream, RESPONSE)
        send(pair.server, stream, b"answer")
        pair.server.send_headers(stream, [("trailer", "1")], end=True)
        give(pair.client, take_out(pair.server), cut)
        events.append(take_events(pair.client))
        return events

    def cut_at(i: int) -> Cut:
        return lambda data: iter([piece for piece in (data[:i], data[i:]) if piece])

    expected = script(whole)
    assert len(expected[0]) == 4
    assert len(expected[1]) == 3
    for i in range(1, 250):
        assert script(cut_at(i)) == expected, i


def test_headers_with_end_of_stream(pair: Pair) -> None:
    stream = pair.request(end=True)
    assert pair.server.send_headers(stream, RESPONSE, end=True)
    pair.exchange()
    assert take_events(pair.client) == [Headed(stream, {":status": "200"}, True)]
    assert pair.client.window(stream) == -1
    assert pair.server.window(stream) == -1


def test_data_frame_with_end_of_stream_is_data_and_then_the_end() -> None:
    pair = Pair()
    stream = pair.request()
    give(pair.server, struct.pack(">BHBBI", 0, 3, 0, 1, stream) + b"abc", single)
    assert take_events(pair.server) == [Data(stream, b"abc", 3), Ended(stream, {})]


def test_empty_data_frames(pair: Pair) -> None:
    stream = pair.request()
    give(pair.server, struct.pack(">BHBBI", 0, 0, 0, 0, stream), pair.cut)
    assert take_events(pair.server) == []
    give(pair.server, struct.pack(">BHBBI", 0, 0, 0, 1, stream), pair.cut)
    assert take_events(pair.server) == [Ended(stream, {})]


def test_trailers(pair: Pair) -> None:
    stream = pair.request(end=True)
    pair.server.send_headers(stream, RESPONSE)
    send(pair.server, stream, b"some")
    assert pair.server.send_headers(stream, [("bigm-error", "x" * 20_000)], end=True)
    pair.exchange()
    assert take_events(pair.client) == [
        Headed(stream, {":status": "200"}, False),
        Data(stream, b"some", 4),
        Ended(stream, {"bigm-error": "x" * 20_000}),
    ]


def test_trailers_of_a_request(pair: Pair) -> None:
    stream = pair.request()
    assert pair.client.send_headers(stream, [("why", "not")], end=True)
    pair.exchange()
    assert take_events(pair.server) == [Ended(stream, {"why": "not"})]


def test_streams_are_independent(pair: Pair) -> None:
    first, second = pair.client.open(REQUEST), pair.client.open(REQUEST)
    for i in range(3):
        send(pair.client, first, b"a%d" % i)
        send(pair.client, second, b"b%d" % i)
    pair.client.end(second)
    pair.exchange()
    events = take_events(pair.server)
    assert b"".join(bytes(event.data) for event in events if isinstance(event, Data) and event.stream == first) == b"a0a1a2"
    assert b"".join(bytes(event.data) for event in events if isinstance(event, Data) and event.stream == second) == b"b0b1b2"
    assert events[-1] == Ended(second, {})


def test_ping_is_answered(pair: Pair) -> None:
    give(pair.server, struct.pack(">BHBBI", 0, 8, 6, 0, 0) + b"12345678", pair.cut)
    assert take_out(pair.server) == struct.pack(">BHBBI", 0, 8, 6, 1, 0) + b"12345678"


def test_unknown_frames_are_ignored(pair: Pair) -> None:
    give(pair.server, struct.pack(">BHBBI", 0, 4, 0x50, 0, 0) + b"what", pair.cut)
    assert take_events(pair.server) == []
    assert pair.request()


# -- Large bodies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [whole, chunks_of(100_000), chunks_of(4099)])
def test_data_larger_than_a_frame(cut: Cut) -> None:
    pair = Pair(cut)
    stream = pair.request()
    data = bytes(range(256)) * 4096 + b"!"  # 1 MiB and a byte.
    send(pair.client, stream, data)
    assert sum(len(part) == 9 for part in pair.client.out) >= 4
    pair.client.end(stream)
    pair.exchange()
    assert take_events(pair.server) == [Data(stream, data, len(data)), Ended(stream, {})]


def test_window_is_used_up_and_opened_by_consumption_only() -> None:
    pair = Pair()
    stream = pair.request()
    assert pair.client.window(stream) == STREAM_WINDOW
    send(pair.client, stream, bytes(STREAM_WINDOW))
    pair.exchange()
    assert pair.client.window(stream) == 0  # Nobody has consumed.
    opened = pair.client.windows_opened
    pair.server.consumed(stream, STREAM_WINDOW // 2 - 1)
    pair.exchange()
    assert pair.client.window(stream) == 0  # Too little to be worth a frame.
    pair.server.consumed(stream, 1)
    pair.exchange()
    assert pair.client.window(stream) == STREAM_WINDOW // 2
    assert pair.client.windows_opened == opened + 1
    send(pair.client, stream, bytes(STREAM_WINDOW // 2))
    pair.exchange()
    assert sum(event.size for event in take_events(pair.server) if isinstance(event, Data)) == STREAM_WINDOW * 3 // 2


def test_one_slow_stream_does_not_stall_others() -> None:
    pair = Pair()
    slow, fast = pair.client.open(REQUEST), pair.client.open(REQUEST)
    send(pair.client, slow, bytes(STREAM_WINDOW))
    pair.exchange()
    for _ in range(3):
        send(pair.client, fast, bytes(STREAM_WINDOW))
        pair.exchange()
        pair.server.consumed(fast, STREAM_WINDOW)
        pair.exchange()
    assert pair.client.window(slow) == 0
    assert pair.client.window(fast) == STREAM_WINDOW


def test_more_than_the_window_breaks_the_protocol() -> None:
    pair = Pair()
    stream = pair.request()
    send(pair.client, stream, bytes(STREAM_WINDOW))
    pair.exchange()
    with pytest.raises(ConnectionFailed, match="flow-control window"):
        give(pair.server, struct.pack(">BHBBI", 0, 1, 0, 0, stream) + b"x")
    give(pair.client, take_out(pair.server))
    assert take_events(pair.client) == [
        GoneAway(stream, 3, "the peer sent more than the flow-control window of a stream allows")
    ]


def test_connection_window_is_given_back_at_arrival() -> None:
    pair = Pair()
    before = CONNECTION_WINDOW // 4 - 8 * STREAM_WINDOW  # Half a gigabyte has arrived before this begins.
    pair.server._received_since_update = before
    pair.client._h2.outbound_flow_control_window -= before
    for _ in range(8):
        stream = pair.client.open(REQUEST)
        send(pair.client, stream, bytes(STREAM_WINDOW))
        pair.exchange()
        pair.server.events.clear()  # Nobody consumes any of it.
    assert pair.client._h2.outbound_flow_control_window == CONNECTION_WINDOW


def test_connection_window_lasts_for_gigabytes() -> None:
    """The counters of 5 GiB, in frames of no bytes at all: only the headers are made up."""
    pair = Pair()
    sent = 0
    stream = pair.request()
    for _ in range(5 * 1024**3 // STREAM_WINDOW):
        pair.client._h2.outbound_flow_control_window -= STREAM_WINDOW
        assert pair.client._h2.outbound_flow_control_window >= 0
        state = pair.server._receiving[stream]
        pair.server._debit(stream, state, STREAM_WINDOW)
        pair.server.consumed(stream, STREAM_WINDOW)
        pair.client._h2.streams[stream].outbound_flow_control_window -= STREAM_WINDOW
        pair.exchange()
        sent += STREAM_WINDOW
    assert sent > 2 * CONNECTION_WINDOW


# -- Sinks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [whole, single, chunks_of(7), chunks_of(70_001)])
def test_sink_is_filled_across_its_parts(cut: Cut) -> None:
    pair = Pair(cut)
    stream = pair.request()
    parts = [b"p" * 10, b"", b"q" * 100_001 if cut is not single else b"q" * 300, b"r"]
    body = Body([len(part) for part in parts])
    pair.server.set_sink(stream, body)
    pair.exchange()
    send(pair.client, stream, b"".join(parts) + b"and more")
    pair.client.end(stream)
    pair.exchange()
    assert [bytes(part) for part in body.parts] == parts
    assert body.left == 0
    assert take_events(pair.server) == [Filled(stream), Data(stream, b"and more", 8), Ended(stream, {})]


def test_sink_receives_without_a_copy() -> None:
    pair = Pair()
    stream = pair.request()
    body = Body([10, 5000])
    pair.server.set_sink(stream, body)
    pair.exchange()
    send(pair.client, stream, b"x" * 5010)
    data = take_out(pair.client)
    give(pair.server, data[: 9 + 100])
    buffer = pair.server.get_buffer()
    assert pair.server.direct
    assert len(buffer) == 4910  # The rest of the second part, itself.
    buffer[:10] = b"0123456789"
    pair.server.received(10)
    assert bytes(body.parts[1][90:100]) == b"0123456789"


def test_sink_opens_the_window_for_all_of_it() -> None:
    pair = Pair()
    stream = pair.request()
    pair.server.set_sink(stream, Loop(64 << 20))
    pair.exchange()
    assert pair.client.window(stream) == (64 << 20) + STREAM_WINDOW


def test_body_that_had_begun_before_the_sink_was_there(pair: Pair) -> None:
    stream = pair.request()
    send(pair.client, stream, b"0123")
    pair.exchange()
    (event,) = take_events(pair.server)
    assert event == Data(stream, b"0123", 4)
    body = Body([10])
    body.view()[:4] = b"0123"
    body.advance(4)
    pair.server.set_sink(stream, body)
    send(pair.client, stream, b"456789")
    pair.exchange()
    assert bytes(body.pickle) == b"0123456789"
    assert take_events(pair.server) == [Filled(stream)]


def test_sink_of_no_bytes(pair: Pair) -> None:
    stream = pair.request()
    pair.server.set_sink(stream, Body([0, 0]))
    send(pair.client, stream, b"abc")
    pair.client.end(stream)
    pair.exchange()
    assert take_events(pair.server) == [Data(stream, b"abc", 3), Ended(stream, {})]


def test_body_beyond_the_largest_window() -> None:
    """A sink of 5 GiB: its stream's window, at most 2 GiB, is opened again and again. Counters only."""
    pair = Pair()
    stream = pair.request()
    size = 5 * 1024**3
    pair.server.set_sink(stream, Loop(size))
    left = size
    while left:
        pair.exchange()
        window = min(pair.client.window(stream), left, FRAME_SIZE * 1024)
        assert window > 0, left
        pair.client._h2.outbound_flow_control_window -= window
        pair.client._h2.streams[stream].outbound_flow_control_window -= window
        pair.server._debit(stream, pair.server._receiving[stream], window)
        left -= window


def test_sink_that_is_too_short_for_what_is_announced_never_stalls(pair: Pair) -> None:
    stream = pair.request()
    body = Body([4])
    pair.server.set_sink(stream, body)
    for _ in range(3):
        send(pair.client, stream, b"abcdefgh")
    pair.exchange()
    events = take_events(pair.server)
    assert events == [Filled(stream), Data(stream, b"efgh" + b"abcdefgh" * 2, 20)]


# -- Resets ----------------------------------------------------------------------------------------------------------


def test_reset_while_data_is_in_flight(pair: Pair) -> None:
    stream = pair.request()
    pair.server.reset(stream)
    send(pair.client, stream, b"in flight" * 100)
    pair.client.end(stream)
    pair.exchange()
    assert take_events(pair.client) == [Reset(stream, 8)]
    assert take_events(pair.server) == []  # Dropped.
    assert pair.request()  # The connection lives.


def test_window_of_a_reset_stream_is_gone_at_once() -> None:
    """A sender must not go on, or wait for a window that nobody will ever open."""
    pair = Pair()
    stream = pair.request()
    send(pair.client, stream, bytes(100))
    pair.server.reset(stream)
    opened = pair.client.windows_opened
    pair.exchange()
    assert pair.client.window(stream) == -1
    assert pair.client.windows_opened > opened  # Whoever waits for it looks again.
    other = pair.request()
    pair.client.reset(other)
    assert pair.client.window(other) == -1
    pair.client.reset(other)
    pair.client.end(other)
    assert not pair.client.send_headers(other, [("a", "b")], end=True)
    assert pair.client.window(999) == -1


def test_unread_data_of_a_reset_stream_is_given_back_to_the_connection() -> None:
    pair = Pair()
    lost = CONNECTION_WINDOW // 4 - 1_000_000  # As if that much had been sent to streams that were reset.
    pair.client._h2.outbound_flow_control_window -= lost
    pair.server._received_since_update += lost
    stream = pair.request()
    send(pair.client, stream, bytes(1_000_000))
    pair.server.reset(stream)
    pair.exchange()
    assert pair.client._h2.outbound_flow_control_window >= CONNECTION_WINDOW - 1_000_000


def test_what_is_on_its_way_of_a_stream_that_was_given_up_is_not_answered(pair: Pair) -> None:
    """Thousands of small frames may be: what comes behind them must not wait for an answer to each."""
    stream, other = pair.request(), pair.request()
    for each in (stream, other):
        pair.server.send_headers(each, RESPONSE)
    pair.exchange()
    take_events(pair.client)
    for _ in range(20):
        send(pair.server, stream, b"an item")
    pair.server.send_data(stream, 0)
    send(pair.server, other, b"other")
    pair.client.reset(stream)
    goodbye = take_out(pair.client)
    give(pair.client, take_out(pair.server), pair.cut)
    assert take_events(pair.client) == [Data(other, b"other", 5)]
    assert take_out(pair.client) == b""
    give(pair.server, goodbye, pair.cut)
    assert Reset(stream, 8) in take_events(pair.server)
    assert pair.request()  # The connection lives.


def test_streams_that_were_given_up_long_ago_are_still_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_GIVEN_UP", 2)
    pair = Pair()
    streams = [pair.request() for _ in range(4)]
    for stream in streams:
        pair.server.send_headers(stream, RESPONSE)
    pair.exchange()
    take_events(pair.client)
    for stream in streams:
        send(pair.server, stream, b"in flight")
        pair.client.reset(stream)
    assert list(pair.client._given_up) == streams[2:]
    pair.exchange()
    assert take_events(pair.client) == []
    assert take_events(pair.server) == [Reset(stream, 8) for stream in streams]
    assert pair.request()


def test_reset_in_the_middle_of_a_frame() -> None:
    pair = Pair()
    stream, other = pair.request(), pair.request()
    body = Body([2000])
    pair.server.set_sink(stream, body)
    send(pair.client, stream, b"x" * 1000)
    pair.client.end(stream)
    send(pair.client, other, b"other")
    data = take_out(pair.client)
    give(pair.server, data[:300])
    pair.server.reset(stream)
    give(pair.server, data[300:], single)
    assert take_events(pair.server) == [Data(other, b"other", 5)]
    assert body.left > 0


def test_refused_stream(pair: Pair) -> None:
    stream = pair.request()
    pair.server.reset(stream, 7)
    pair.exchange()
    assert take_events(pair.client) == [Reset(stream, 7)]


def test_answer_before_the_request_has_ended(pair: Pair) -> None:
    stream = pair.request()
    pair.server.send_headers(stream, [(":status", "404")], end=True)
    pair.server.reset(stream, 0)
    pair.exchange()
    assert take_events(pair.client) == [Headed(stream, {":status": "404"}, True), Reset(stream, 0)]
    assert pair.client.window(stream) == -1


def test_finish_turns_the_rest_of_the_request_away(pair: Pair) -> None:
    stream = pair.request()
    pair.server.send_headers(stream, [(":status", "404")])
    pair.server.finish(stream)
    pair.exchange()
    assert take_events(pair.client) == [Headed(stream, {":status": "404"}, False), Ended(stream, {}), Reset(stream, 0)]
    stream = pair.request(end=True)
    pair.server.send_headers(stream, [(":status", "404")])
    pair.server.finish(stream)  # There is no rest.
    pair.exchange()
    assert take_events(pair.client) == [Headed(stream, {":status": "404"}, False), Ended(stream, {})]


def test_finish_lets_a_request_with_a_content_length_end_by_itself() -> None:
    """curl takes a reset that comes with the response for an error, and does not show the response."""
    foreign, ours = foreign_client()
    foreign.send_headers(1, [*REQUEST, ("content-length", "5")])
    talk(foreign, ours)
    ours.send_headers(1, [(":status", "404")])
    ours.finish(1)
    events = talk(foreign, ours)
    assert not any(isinstance(event, h2.events.StreamReset) for event in events)
    foreign.send_data(1, b"12345", end_stream=True)
    talk(foreign, ours)
    assert not ours._receiving


# -- GOAWAY ----------------------------------------------------------------------------------------------------------


def test_goaway_lets_what_runs_end(pair: Pair) -> None:
    stream = pair.request()
    pair.server.go_away("draining")
    pair.exchange()
    assert take_events(pair.client) == [GoneAway(stream, 0, "draining")]
    assert not pair.client.can_open()
    send(pair.client, stream, b"the rest")
    pair.client.end(stream)
    pair.exchange()
    assert take_events(pair.server) == [Data(stream, b"the rest", 8), Ended(stream, {})]
    pair.server.send_headers(stream, RESPONSE)
    send(pair.server, stream, b"answer")
    pair.server.end(stream)
    pair.exchange()
    assert take_events(pair.client) == [
        Headed(stream, {":status": "200"}, False),
        Data(stream, b"answer", 6),
        Ended(stream, {}),
    ]


def test_goaway_twice(pair: Pair) -> None:
    stream = pair.request(end=True)
    pair.server.go_away("soon")
    pair.server.close(2, "now")
    pair.exchange()
    assert take_events(pair.client) == [GoneAway(stream, 0, "soon"), GoneAway(stream, 2, "now")]
    assert pair.client.goaway == GoneAway(stream, 2, "now")


def test_goaway_says_which_streams_did_not_run() -> None:
    pair = Pair()
    first = pair.request(end=True)
    second = pair.client.open(REQUEST, end=True)  # Crosses the GOAWAY.
    pair.server.go_away("full")
    give(pair.client, take_out(pair.server))
    assert take_events(pair.client) == [GoneAway(first, 0, "full")]
    assert second > first


@pytest.mark.parametrize(
    "frame", [struct.pack(">BHBBI", 0, 4, 7, 0, 0) + b"abcd", struct.pack(">BHBBIII", 0, 8, 7, 0, 1, 0, 0)]
)
def test_malformed_goaway(frame: bytes) -> None:
    pair = Pair()
    with pytest.raises(ConnectionFailed, match="GOAWAY"):
        give(pair.client, frame)


def test_close_says_why(pair: Pair) -> None:
    pair.client.close(0, "gö" * 1000)
    pair.exchange()
    (event,) = take_events(pair.server)
    assert isinstance(event, GoneAway)
    assert event.reason.startswith("gögö")
    assert len(event.reason) < 300
    assert not pair.client.send_headers(1, RESPONSE)


# -- The peer's settings ---------------------------------------------------------------------------------------------


def foreign_client(**settings: int) -> tuple[h2.connection.H2Connection, Connection]:
    """A plain h2 client, shaken hands with a server of ours."""
    foreign = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
    ours = Connection(client=False)
    if settings:
        codes = h2.settings.SettingCodes
        foreign.local_settings.update({codes[name.upper()]: value for name, value in settings.items()})
    foreign.initiate_connection()
    talk(foreign, ours)
    return foreign, ours


def talk(foreign: h2.connection.H2Connection, ours: Connection, cut: Cut = whole) -> list[h2.events.Event]:
    events: list[h2.events.Event] = []
    while data := foreign.data_to_send():
        give(ours, data, cut)
        if ours.out:
            events += foreign.receive_data(take_out(ours))
    if ours.out:
        events += foreign.receive_data(take_out(ours))
        events += talk(foreign, ours, cut)
    return events


def test_negative_window_is_no_window() -> None:
    foreign, ours = foreign_client()
    foreign.send_headers(1, REQUEST, end_stream=True)
    talk(foreign, ours)
    ours.send_headers(1, RESPONSE)
    send(ours, 1, bytes(60_000))
    foreign.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 1000})
    talk(foreign, ours)
    assert ours._h2.streams[1].outbound_flow_control_window < 0
    assert ours.window(1) == 0  # Not -1: the stream is there.
    opened = ours.windows_opened
    foreign.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 100_000})
    talk(foreign, ours)
    assert ours.window(1) == 5535  # The connection's.
    assert ours.windows_opened > opened


def test_frame_size_follows_the_peer() -> None:
    foreign, ours = foreign_client()
    assert ours.frame_size == 16384
    foreign.update_settings({h2.settings.SettingCodes.MAX_FRAME_SIZE: 1 << 20})
    talk(foreign, ours)
    assert ours.frame_size == FRAME_SIZE


def test_max_concurrent_streams_of_the_peer_is_respected() -> None:
    client, server = Connection(client=True), h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    server.local_settings = h2.settings.Settings(
        client=False, initial_values={h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 2}
    )
    server.initiate_connection()
    server.receive_data(take_out(client))
    give(client, server.data_to_send())
    assert client.can_open()
    client.open(REQUEST)
    client.open(REQUEST)
    assert not client.can_open()
    with pytest.raises(ConnectionFailed, match="cannot open a stream"):
        client.open(REQUEST)
    client.reset(1)
    assert client.can_open()


def test_more_streams_than_allowed_break_the_protocol() -> None:
    pair = Pair()
    for _ in range(MAX_STREAMS):
        pair.client.open(REQUEST)
    pair.exchange()
    pair.client._h2.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 1000
    pair.client._h2.remote_settings.acknowledge()
    pair.client.open(REQUEST)
    with pytest.raises(ConnectionFailed):
        pair.exchange()


def test_closed_streams_do_not_count() -> None:
    pair = Pair()
    for _ in range(MAX_STREAMS + 10):
        stream = pair.client.open(REQUEST, end=True)
        pair.exchange()
        pair.server.send_headers(stream, RESPONSE, end=True)
        pair.exchange()
        pair.client.events.clear()
        pair.server.events.clear()
    assert not pair.server._receiving
    assert not pair.client._receiving
    assert len(pair.server._h2.streams) <= 1


# -- Other people's clients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", CUTS)
def test_request_with_content_length(cut: Cut) -> None:
    foreign, ours = foreign_client()
    foreign.send_headers(1, [*REQUEST, ("content-length", "11")])
    foreign.send_data(1, b"hello ")
    foreign.send_data(1, b"world", end_stream=True)
    talk(foreign, ours, cut)
    assert take_events(ours) == [
        Headed(1, {**dict(REQUEST), "content-length": "11"}, False),
        Data(1, b"hello world", 11),
        Ended(1, {}),
    ]
    ours.consumed(1, 11)  # After its end: harmless.


def test_wrong_content_length_breaks_the_protocol() -> None:
    foreign, ours = foreign_client()
    foreign.send_headers(1, [*REQUEST, ("content-length", "3")])
    foreign.send_data(1, b"hello ", end_stream=True)
    with pytest.raises(ConnectionFailed, match="InvalidBodyLength"):
        talk(foreign, ours)


def test_content_length_and_windows() -> None:
    """The stream's window waits for its consumer, the connection's does not, and neither is ever lost."""
    foreign, ours = foreign_client()
    connection_window = foreign.outbound_flow_control_window
    size = STREAM_WINDOW * 2
    foreign.send_headers(1, [*REQUEST, ("content-length", str(size))])
    talk(foreign, ours)
    left = size
    while left:
        n = min(foreign.local_flow_control_window(1), left, foreign.max_outbound_frame_size)
        if not n:
            assert left == size - STREAM_WINDOW  # All that fits unread.
            for event in take_events(ours):
                if isinstance(event, Data):
                    ours.consumed(1, event.size)
        else:
            foreign.send_data(1, bytes(n))
            left -= n
        talk(foreign, ours)
    foreign.end_stream(1)
    talk(foreign, ours)
    assert isinstance(take_events(ours)[-1], Ended)
    assert foreign.outbound_flow_control_window == connection_window


@pytest.mark.parametrize("cut", CUTS)
def test_padded_data(cut: Cut) -> None:
    foreign, ours = foreign_client()
    foreign.send_headers(1, REQUEST)
    foreign.send_data(1, b"hello ", pad_length=200)
    foreign.send_data(1, b"", pad_length=3)
    foreign.send_data(1, b"world", end_stream=True, pad_length=0)
    talk(foreign, ours, cut)
    assert take_events(ours) == [Headed(1, dict(REQUEST), False), Data(1, b"hello world", 11), Ended(1, {})]


@pytest.mark.parametrize("cut", [whole, chunks_of(1000)])
def test_padded_data_into_a_sink(cut: Cut) -> None:
    foreign, ours = foreign_client()
    foreign.send_headers(1, REQUEST)
    talk(foreign, ours)
    body = Body([30, 0, 50])
    ours.set_sink(1, body)
    foreign.send_data(1, b"a" * 20, pad_length=100)
    foreign.send_data(1, b"b" * 40, pad_length=255)
    foreign.send_data(1, b"c" * 25, pad_length=1, end_stream=True)
    talk(foreign, ours, cut)
    assert [bytes(part) for part in body.parts] == [b"a" * 20 + b"b" * 10, b"", b"b" * 30 + b"c" * 20]
    assert take_events(ours)[1:] == [Filled(1), Data(1, b"c" * 5, 5), Ended(1, {})]


def test_padding_does_not_use_up_windows() -> None:
    foreign, ours = foreign_client()
    foreign.send_headers(1, REQUEST)
    talk(foreign, ours)
    for _ in range(2 * STREAM_WINDOW // 1255):
        assert foreign.local_flow_control_window(1) > 1300
        foreign.send_data(1, bytes(1000), pad_length=254)
        talk(foreign, ours)
        take_events(ours)
        ours.consumed(1, 1000)


def test_more_padding_than_payload() -> None:
    pair = Pair()
    stream = pair.request()
    with pytest.raises(ConnectionFailed, match="padding"):
        give(pair.server, struct.pack(">BHBBI", 0, 3, 0, 8, stream) + b"\x03ab")


# -- What is refused -------------------------------------------------------------------------------------------------


def fails(data: bytes, match: str, cut: Cut = whole) -> Connection:
    """A fresh server, after the preface, refuses `data`, and says so in a GOAWAY."""
    pair = Pair()
    with pytest.raises(ConnectionFailed, match=match):
        give(pair.server, data, cut)
    give(pair.client, take_out(pair.server))
    (event,) = take_events(pair.client)
    assert isinstance(event, GoneAway)
    assert event.code
    return pair.server


@pytest.mark.parametrize("cut", [whole, single])
def test_oversized_frame(cut: Cut) -> None:
    length = MAX_CONTROL_FRAME + 1
    head = struct.pack(">BHBBI", length >> 16, length & 0xFFFF, 4, 0, 0)
    fails(head, "type 4 with 65537 bytes", cut)


def test_oversized_data_frame() -> None:
    pair = Pair()
    stream = pair.request()
    length = FRAME_SIZE + 1
    with pytest.raises(ConnectionFailed, match="type 0 with 262145 bytes"):
        give(pair.server, struct.pack(">BHBBI", length >> 16, length & 0xFFFF, 0, 0, stream))


def test_data_on_a_stream_that_was_never_opened() -> None:
    fails(struct.pack(">BHBBI", 0, 1, 0, 0, 7) + b"x", "StreamClosed|ProtocolError|NoSuchStream")


def test_data_after_the_end_of_the_stream() -> None:
    pair = Pair()
    stream = pair.request(end=True)
    give(pair.server, struct.pack(">BHBBI", 0, 1, 0, 0, stream) + b"x")
    assert take_events(pair.server) == [Reset(stream, 5)]  # An error of the stream alone: RFC 9113, 5.1.
    pair.exchange()
    assert take_events(pair.client) == [Reset(stream, 5)]


@pytest.mark.parametrize("cut", [whole, single])
@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"\x00" * 40, b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n"])
def test_garbage_instead_of_the_preface(data: bytes, cut: Cut) -> None:
    server = Connection(client=False)
    with pytest.raises(ConnectionFailed, match="not HTTP/2") as failure:
        give(server, data, cut)
    assert cut is single or repr(data[:24])[2:-1] in str(failure.value)


def test_garbage_behind_the_preface() -> None:
    server = Connection(client=False)
    with pytest.raises(ConnectionFailed):
        give(server, PREFACE + b"\x00\x00\x05\x04\x00\x00\x00\x00\x00aaaaa")


@pytest.mark.parametrize(
    "name", [(b"x", b"\xff\xfe"), (b"Upper", b"x"), (b"connection", b"close"), (b":path", b"/twice"), (b"", b"x")]
)
def test_bad_headers(name: tuple[bytes, bytes]) -> None:
    foreign = h2.connection.H2Connection(
        h2.config.H2Configuration(
            client_side=True, validate_outbound_headers=False, normalize_outbound_headers=False, header_encoding=None
        )
    )
    ours = Connection(client=False)
    foreign.initiate_connection()
    talk(foreign, ours)
    foreign.send_headers(1, [*((a.encode(), b.encode()) for a, b in REQUEST), name])
    with pytest.raises(ConnectionFailed):
        give(ours, foreign.data_to_send())


def test_headers_beyond_the_limit() -> None:
    pair = Pair()
    pair.client.open([*REQUEST, *((f"x-{i}", "y" * 1000) for i in range(70))])
    with pytest.raises(ConnectionFailed):
        pair.exchange()


# -- The call channel ------------------------------------------------------------------------------------------------


def channel_pair(cut: Cut = whole) -> Pair:
    pair = Pair(cut)
    stream = pair.client.open(REQUEST)
    pair.client.use_channel(stream)
    pair.exchange()
    pair.server.use_channel(stream)
    pair.server.send_headers(stream, RESPONSE)
    pair.exchange()
    pair.client.events.clear()
    pair.server.events.clear()
    return pair


def transfer(pair: Pair, frames: Sequence[bytes]) -> list[tuple[int, int, bytes]]:
    for frame in frames:
        give(pair.server, frame, pair.cut)
    messages, pair.server.messages = pair.server.messages, []
    return messages


@pytest.mark.parametrize("cut", [*CUTS, pytest.param(chunks_of(18), id="eighteens"), pytest.param(chunks_of(19), id="19s")])
def test_messages(cut: Cut) -> None:
    pair = channel_pair(cut)
    frames = []
    expected = []
    for i, size in enumerate([0, 1, 9, 100, 40_000 if cut is not single else 400, 0, 3]):
        body = bytes([i]) * size
        frame = pair.client.message(CALL, i, (body[:1], body[1:]))
        assert frame is not None
        frames.append(frame)
        expected.append((CALL, i, body))
    assert transfer(pair, frames) == expected
    assert pair.server.messages_size == sum(len(frame) - 9 for frame in frames)
    assert transfer(pair, [b"".join(frames)]) == expected
    assert not pair.server.events


def test_messages_in_frames_that_are_not_cut_alike(pair: Pair) -> None:
    pair = channel_pair(pair.cut)
    data = b"".join(pack(RESULT, i, b"r" * i) for i in range(40))
    frames = [struct.pack(">BHBBI", 0, len(data[i : i + 11]), 0, 0, 1) + data[i : i + 11] for i in range(0, len(data), 11)]
    assert transfer(pair, frames) == [(RESULT, i, b"r" * i) for i in range(40)]


def test_half_a_message_and_then_one_frame_that_looks_like_a_whole_one() -> None:
    """The short way through may be taken between messages only."""
    pair = channel_pair()
    inner = pack(CALL, 2, b"inner")
    outer = pack(CALL, 1, inner)
    first, second = outer[:9], outer[9:]
    frames = [struct.pack(">BHBBI", 0, len(part), 0, 0, 1) + part for part in (first, second)]
    assert transfer(pair, frames) == [(CALL, 1, inner)]


def test_message_that_does_not_fit_the_window() -> None:
    pair = channel_pair()
    body = bytes(60_000)
    frames = []
    while (frame := pair.client.message(CALL, 1, (body,))) is not None:
        frames.append(frame)
    assert len(frames) == STREAM_WINDOW // 60_009
    assert pair.client.message(CALL, 1, ()) is not None  # A smaller one does.
    transfer(pair, frames)
    pair.server.consumed(1, pair.server.messages_size)
    pair.exchange()
    assert pair.client.message(CALL, 1, (body,)) is not None


def test_message_over_the_limit() -> None:
    pair = channel_pair()
    with pytest.raises(ConnectionFailed, match="the limit is"):
        transfer(pair, [struct.pack(">BHBBI", 0, 9, 0, 0, 1) + struct.pack(">IBI", MAX_MESSAGE + 1, CALL, 1)])


def test_padded_message() -> None:
    pair = channel_pair()
    message = pack(CALL, 5, b"body")
    frame = struct.pack(">BHBBI", 0, len(message) + 4, 0, 8, 1) + b"\x03" + message + b"\0\0\0"
    assert transfer(pair, [frame]) == [(CALL, 5, b"body")]


def test_channel_ends() -> None:
    pair = channel_pair()
    pair.client.end(1)
    pair.exchange()
    assert take_events(pair.server) == [Ended(1, {})]
    assert transfer(pair, [struct.pack(">BHBBI", 0, 13, 0, 0, 1) + pack(CALL, 1, b"late")]) == []
    assert take_events(pair.server) == [Reset(1, 5)]


def test_constants_fit_each_other() -> None:
    assert MAX_MESSAGE < STREAM_WINDOW // 2  # A message that waits for the window always finds it open some time.
    assert FRAME_SIZE <= STREAM_WINDOW
    assert SCRATCH > 9
    assert module.CONNECTION_WINDOW == 2**31 - 1


def test_scratch_is_never_empty_handed() -> None:
    """Whatever is left over of a frame's header at the end of the buffer, there is room for more."""
    pair = Pair()
    stream = pair.request()
    payload = bytes(SCRATCH - 9 - 5)
    frame = struct.pack(">BHBBI", 0, len(payload), 0, 0, stream) + payload
    data = frame + struct.pack(">BHBBI", 0, 2, 0, 0, stream) + b"ab"
    give(pair.server, data[:SCRATCH])
    give(pair.server, data[SCRATCH:])
    events: list[Any] = take_events(pair.server)
    assert events[-1].data.endswith(b"ab")
    assert events[-1].size == len(payload) + 2
