"""Leader and follower: one `Transport` over real TLS, and at the other end a `Connection` that the test drives by hand."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rpc_pair import CLIENT_CONTEXT, NAME, SERVER_CONTEXT, SOON, resources, until

from bigmachine.rpc import transport as module
from bigmachine.rpc.channel import Message
from bigmachine.rpc.connection import STREAM_WINDOW, Connection, Data, Ended, Event, Filled, Headed, Reset
from bigmachine.rpc.reactor import Reactor
from bigmachine.rpc.streams import Body
from bigmachine.rpc.transport import OUTBOX_HIGH, Closed, Transport, Waiter

REQUEST = [(":method", "POST"), (":scheme", "https"), (":authority", "x"), (":path", "/")]


class Owner:
    """Keeps what it is told. `expected[stream]` are waiters that are woken, one for each Data event on the stream."""

    transport: Transport

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.closed: list[Closed] = []
        self.expected: dict[int, list[Waiter]] = {}
        self.readers: list[str] = []
        self.on_data: Callable[[Data], None] = lambda event: None

    def on_event(self, event: Event) -> None:
        self.readers.append(threading.current_thread().name)
        self.events.append(event)
        if isinstance(event, Data):
            self.on_data(event)
            waiting = self.expected.get(event.stream)
            if waiting:
                waiting.pop(0).wake()

    def on_messages(self, messages: list[Message]) -> None:
        raise AssertionError("there is no channel")

    def on_readable(self) -> None:
        self.transport.read()
        self.transport.release()

    def on_closed(self, closed: Closed) -> None:
        self.closed.append(closed)


class OneAtATime:
    """`Transport._poll`, which notices when two threads are in it: then two hold the role."""

    def __init__(self, poll: Any) -> None:
        self._poll = poll
        self._lock = threading.Lock()
        self.entered = threading.Semaphore(0)
        self.twice = False

    def poll(self, *args: float) -> Any:
        if not self._lock.acquire(blocking=False):
            self.twice = True
            return []
        try:
            self.entered.release()
            return self._poll.poll(*args)
        finally:
            self._lock.release()


class Rig:
    """The transport (of a client, or of a server that serves a request on stream 1), and its peer."""

    def __init__(self, *, client: bool = True) -> None:
        self.before = resources()
        self.reactor = Reactor()
        self.owner = Owner()
        ours, theirs = socket.socketpair()
        contexts = (CLIENT_CONTEXT, SERVER_CONTEXT) if client else (SERVER_CONTEXT, CLIENT_CONTEXT)
        wrapped: list[ssl.SSLSocket] = []

        def wrap_theirs() -> None:
            name = None if client else NAME
            wrapped.append(contexts[1].wrap_socket(theirs, server_side=client, server_hostname=name))

        theirs.settimeout(SOON)
        thread = threading.Thread(target=wrap_theirs)
        thread.start()
        ours.settimeout(SOON)
        sock = contexts[0].wrap_socket(ours, server_side=not client, server_hostname=NAME if client else None)
        thread.join(SOON)
        sock.setblocking(False)
        (self.peer_sock,) = wrapped
        self.peer = Connection(client=not client)
        self.connection = Connection(client=client)
        self.transport = self.owner.transport = Transport(
            sock, self.connection, self.reactor, self.owner, leads=client
        )
        self.poll = OneAtATime(self.transport._poll)
        self.transport._poll = self.poll  # type: ignore[assignment]
        self.transport.start()
        self.stream = 1
        if client:
            with self.transport.lock:
                self.connection.open(REQUEST)
                self.transport.flush()
            self.until_peer(lambda: any(isinstance(event, Headed) for event in self.peer.events))
            self.peer.send_headers(1, [(":status", "200")])
        else:
            self.peer.open(REQUEST)
        self.peer_flush()
        until(lambda: any(isinstance(event, Headed) for event in self.owner.events))
        if not client:
            with self.transport.lock:
                self.connection.send_headers(1, [(":status", "200")])
                self.transport.flush()

    def until_peer(self, condition: Callable[[], object]) -> None:
        """The peer reads, and answers what HTTP/2 asks for, until `condition`."""
        while not condition():
            self.peer_read()

    def peer_read(self) -> None:
        n = self.peer_sock.recv_into(self.peer.get_buffer())
        assert n, "the transport hung up"
        self.peer.received(n)
        self.peer_flush()

    def peer_flush(self) -> None:
        data = b"".join(map(bytes, self.peer.out))
        self.peer.out.clear()
        self.peer.out_bytes = 0
        if data:
            self.peer_sock.sendall(data)

    def peer_data(self, data: bytes) -> None:
        self.peer.send_data(self.stream, len(data), data)
        self.peer_flush()

    def expect(self) -> Waiter:
        waiter = Waiter()
        self.owner.expected.setdefault(self.stream, []).append(waiter)
        return waiter

    def received(self) -> bytes:
        return b"".join(bytes(event.data) for event in self.owner.events if isinstance(event, Data))

    def close(self) -> None:
        self.transport.fail(Closed("the test is over"))
        self.peer_sock.close()
        assert not self.poll.twice, "two threads held the role"
        until(lambda: self.transport._ended, "the descriptor was never closed")
        self.reactor.close()
        until(lambda: resources() <= self.before, "something was left behind")


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


@pytest.fixture
def server_rig() -> Iterator[Rig]:
    rig = Rig(client=False)
    yield rig
    rig.close()


def run(target: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Run `target` on a thread; its result, or exception, is put into the list."""
    found: list[object] = []

    def work() -> None:
        try:
            found.append(target())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, found


# -- Reading ---------------------------------------------------------------------------------------------------------


def test_nobody_waits_and_a_worker_reads(rig: Rig) -> None:
    rig.peer_data(b"hello")
    until(lambda: rig.received() == b"hello")
    assert all(name.startswith("bigmachine-") for name in rig.owner.readers)


def test_who_waits_reads(rig: Rig) -> None:
    waiter = rig.expect()
    thread, found = run(lambda: rig.transport.wait(waiter, time.monotonic() + SOON))
    assert rig.poll.entered.acquire(timeout=SOON)
    rig.peer_data(b"hello")
    thread.join(SOON)
    assert found == [True]
    assert rig.owner.readers[-1] == thread.name


def test_reading_goes_on_when_the_leader_has_gone(rig: Rig) -> None:
    assert rig.transport.wait(Waiter(), time.monotonic() + 0.01) is False
    rig.peer_data(b"hello")
    until(lambda: rig.received() == b"hello")


def test_followers_take_over(rig: Rig) -> None:
    """Each is answered in turn; whoever leads is answered first, and hands the reading on."""
    waiters = [rig.expect() for _ in range(8)]
    threads = [run(lambda waiter=waiter: rig.transport.wait(waiter, None)) for waiter in waiters]
    until(lambda: rig.transport._reading and len(rig.transport._followers) == 7)
    for i in range(8):
        rig.peer_data(b"%d" % i)
        until(lambda i=i: waiters[i].done)
    for thread, found in threads:
        thread.join(SOON)
        assert found == [True]


def test_followers_that_give_up_are_not_handed_anything(rig: Rig) -> None:
    leader = rig.expect()
    thread, found = run(lambda: rig.transport.wait(leader, None))
    assert rig.poll.entered.acquire(timeout=SOON)
    for _ in range(5):
        assert rig.transport.wait(Waiter(), time.monotonic() + 0.005) is False
    assert not rig.transport._followers
    rig.peer_data(b"x")
    thread.join(SOON)
    assert found == [True]
    rig.peer_data(b"y")
    until(lambda: rig.received() == b"xy")


def test_leaders_that_give_up_while_others_wait(rig: Rig) -> None:
    """The role goes round among threads with deadlines of all lengths; what arrives arrives, and nobody holds it twice."""
    stop = threading.Event()

    def impatient(pause: float) -> None:
        while not stop.is_set():
            rig.transport.wait(Waiter(), time.monotonic() + pause)

    threads = [run(lambda pause=pause: impatient(pause)) for pause in (0.0, 0.0005, 0.001, 0.002)]
    sent = b""
    for i in range(300):
        waiter = rig.expect()
        rig.peer_data(b"%d," % i)
        sent += b"%d," % i
        assert rig.transport.wait(waiter, time.monotonic() + SOON), i
    stop.set()
    for thread, found in threads:
        thread.join(SOON)
        assert found == [None]
    assert rig.received() == sent


def test_round_trips_of_threads_that_are_answered_by_each_other(rig: Rig) -> None:
    """The answer of one may have been read by another before it begins to wait: it must not wait for more then."""
    echo, echoed = run(lambda: _echo(rig))
    lock = threading.Lock()

    def caller() -> int:
        done = 0
        for _ in range(100):
            with lock:  # In the order in which they are expected.
                waiter = rig.expect()
                with rig.transport.lock:
                    rig.connection.send_data(rig.stream, 1, b"x")
                    rig.transport.flush()
            rig.transport.round_trip(waiter)
            assert waiter.done
            done += 1
        return done

    threads = [run(caller) for _ in range(6)]
    for thread, found in threads:
        thread.join(SOON)
        assert found == [100]
    rig.transport.fail(Closed("enough"))
    echo.join(SOON)
    assert echoed == [None]


def test_round_trip_whose_answer_is_here_already(rig: Rig) -> None:
    for _ in range(20):
        rig.transport.wait(Waiter(), time.monotonic() + 0.001)  # Somebody has led, and lingers.
        waiter = Waiter()
        waiter.wake()
        thread, found = run(lambda waiter=waiter: rig.transport.round_trip(waiter))
        thread.join(SOON)
        assert found == [None]


def _echo(rig: Rig) -> None:
    while True:
        try:
            n = rig.peer_sock.recv_into(rig.peer.get_buffer())
        except OSError:
            return
        if not n:
            return
        rig.peer.received(n)
        while rig.peer.events:
            event = rig.peer.events.popleft()
            if isinstance(event, Data):
                for _ in bytes(event.data):
                    rig.peer.send_data(rig.stream, 1, b"y")
        try:
            rig.peer_flush()
        except OSError:
            return


def test_interrupt_reaches_the_leader(rig: Rig) -> None:
    waiter = Waiter()
    thread, found = run(lambda: rig.transport.wait(waiter, None))
    assert rig.poll.entered.acquire(timeout=SOON)
    rig.transport.interrupt(waiter)
    thread.join(SOON)
    assert found == [True]
    rig.transport.interrupt(Waiter())  # Nobody leads: it must not make a noise that never ends.
    again = rig.expect()
    rig.peer_data(b"x")
    assert rig.transport.wait(again, time.monotonic() + SOON)


def test_data_that_tls_holds_back_is_read(rig: Rig) -> None:
    """One record with the end of a body and the frames behind it: the poller knows of it once only."""
    body = Body([20_000])
    with rig.transport.lock:
        rig.connection.set_sink(rig.stream, body)
        rig.transport.flush()
    frame = struct.pack(">BHBBI", 0, 20_000, 0, 0, rig.stream) + b"b" * 20_000
    tail = struct.pack(">BHBBI", 0, 5, 0, 0, rig.stream) + b"after" + struct.pack(">BHBBI", 0, 0, 0, 1, rig.stream)
    with rig.transport.lock:  # So that all of it is there when it is read.
        rig.peer_sock.sendall(frame[:10_000])  # A record each.
        rig.peer_sock.sendall(frame[10_000:] + tail)
    until(lambda: any(isinstance(event, Ended) for event in rig.owner.events))
    assert bytes(body.pickle) == b"b" * 20_000
    assert [event for event in rig.owner.events if not isinstance(event, Headed)] == [
        Filled(rig.stream),
        Data(rig.stream, b"after", 5),
        Ended(rig.stream, {}),
    ]


@pytest.mark.parametrize("size", [1, 100, 16_384])
def test_any_division_into_records(rig: Rig, size: int) -> None:
    sizes = range(400) if size > 1 else range(40)
    data = b"".join(struct.pack(">BHBBI", 0, n, 0, 0, rig.stream) + bytes([n % 256]) * n for n in sizes)
    expected = b"".join(bytes([n % 256]) * n for n in sizes)
    for i in range(0, len(data), size):
        rig.peer_sock.sendall(data[i : i + size])
    until(lambda: rig.received() == expected)


def test_owner_that_raises_loses_the_connection_and_not_the_role(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(event: Data) -> None:
        raise KeyError("of the owner")

    rig.owner.on_data = fail
    rig.peer_data(b"x")
    until(lambda: rig.owner.closed)
    assert "KeyError" in str(rig.owner.closed[0])
    assert "KeyError: 'of the owner'" in capfd.readouterr().err


def test_waiting_on_a_server_is_not_reading(server_rig: Rig) -> None:
    """A thread that waits for a window at a server's end must leave the reading to the workers, who run what arrives."""
    rig = server_rig
    thread, found = run(lambda: rig.transport.send_body(1, [bytes(STREAM_WINDOW + 10)]))
    seen = 0
    while seen < STREAM_WINDOW:
        rig.peer_read()
        seen += sum(event.size for event in rig.peer.events if isinstance(event, Data))
        rig.peer.events.clear()
    until(lambda: rig.transport._writers)
    for i in range(20):
        rig.peer_data(b"%d" % (i % 10))
        until(lambda i=i: len(rig.received()) == i + 1)
    assert thread.name not in rig.owner.readers
    rig.peer.consumed(1, STREAM_WINDOW)
    rig.peer_flush()
    rig.until_peer(lambda: sum(event.size for event in rig.peer.events if isinstance(event, Data)) == 10)
    thread.join(SOON)
    assert found == [True]


# -- Sending ---------------------------------------------------------------------------------------------------------


def test_body_waits_for_the_socket_and_arrives(rig: Rig) -> None:
    data = bytes(range(256)) * (8 << 12)  # 8 MiB: more than sockets buffer.
    thread, found = run(lambda: rig.transport.send_body(1, [data[:100], data[100:]]))
    until(lambda: rig.transport._pollers or rig.transport._writers)
    assert rig.connection.out_bytes < OUTBOX_HIGH + (512 << 10)
    received = bytearray()
    while len(received) < len(data):
        rig.peer_read()
        while rig.peer.events:
            event = rig.peer.events.popleft()
            if isinstance(event, Data):
                received += event.data
                rig.peer.consumed(1, event.size)
        rig.peer_flush()
    thread.join(SOON)
    assert found == [True]
    assert received == data


def test_reset_ends_a_body_that_waits_for_its_window(rig: Rig) -> None:
    thread, found = run(lambda: rig.transport.send_body(1, [bytes(STREAM_WINDOW * 2)]))
    seen = 0
    while seen < STREAM_WINDOW:
        rig.peer_read()
        seen += sum(event.size for event in rig.peer.events if isinstance(event, Data))
        rig.peer.events.clear()
    until(lambda: rig.transport._writers)
    rig.peer.reset(1)
    rig.peer_flush()
    thread.join(SOON)
    assert found == [False]
    until(lambda: Reset(1, 8) in rig.owner.events)


def test_deadline_ends_a_body_that_waits_for_the_socket(rig: Rig) -> None:
    assert rig.transport.send_body(1, [bytes(STREAM_WINDOW)], time.monotonic() + 0.05) is False
    assert rig.transport.closed is None


def test_peer_that_does_not_read_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEND_STALL", 0.05)
    with pytest.raises(Closed, match="has not read for"):
        rig.transport.send_body(1, [bytes(STREAM_WINDOW)])
    assert len(rig.owner.closed) == 1


def test_window_is_waited_for_as_long_as_it_takes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer may pause: that is not a peer that stopped reading."""
    monkeypatch.setattr(module, "SEND_STALL", 0.01)
    thread, found = run(lambda: rig.transport.send_body(1, [bytes(STREAM_WINDOW)] * 2, time.monotonic() + 0.3))
    seen = 0
    while seen < STREAM_WINDOW:
        rig.peer_read()
        seen += sum(event.size for event in rig.peer.events if isinstance(event, Data))
        rig.peer.events.clear()
    thread.join(SOON)
    assert found == [False]  # Its own deadline.
    assert rig.transport.closed is None


def test_writers_do_not_mix(rig: Rig) -> None:
    """Frames of several bodies, of small messages and of resets of the window, from many threads."""
    streams = [1]
    with rig.transport.lock:
        streams += [rig.connection.open(REQUEST) for _ in range(5)]
        rig.transport.flush()
    bodies = {stream: bytes([stream]) * 700_000 for stream in streams}
    threads = [run(lambda stream=stream: rig.transport.send_body(stream, [bodies[stream]])) for stream in streams]
    received = {stream: bytearray() for stream in streams}
    while any(len(received[stream]) < 700_000 for stream in streams):
        rig.peer_read()
        while rig.peer.events:
            event = rig.peer.events.popleft()
            if isinstance(event, Data):
                received[event.stream] += event.data
    for thread, found in threads:
        thread.join(SOON)
        assert found == [True]
    assert received == bodies


# -- The end ---------------------------------------------------------------------------------------------------------


def test_failure_wakes_everybody_and_is_told_once(rig: Rig) -> None:
    threads = [run(lambda: rig.transport.wait(Waiter(), None)) for _ in range(5)]
    until(lambda: rig.transport._reading and len(rig.transport._followers) == 4)
    failing = [run(lambda i=i: rig.transport.fail(Closed(f"reason {i}"))) for i in range(4)]
    for thread, _ in threads + failing:
        thread.join(SOON)
        assert not thread.is_alive()
    assert len(rig.owner.closed) == 1
    assert rig.transport.closed is rig.owner.closed[0]
    with pytest.raises(Closed):
        rig.transport.send_body(1, [b"x"])
    assert rig.transport.wait(Waiter(), None) is True


def test_descriptor_is_not_closed_under_the_leader(rig: Rig) -> None:
    """Its number could be somebody else's before the leader polls it again."""
    fd = rig.transport._fd
    with rig.transport.lock:
        until(lambda: not rig.transport._reading)
        rig.transport._reading = True  # This thread leads, and is about to poll.
    rig.transport.fail(Closed("gone"))
    assert rig.transport._sock.fileno() == fd
    rig.transport.release()
    assert rig.transport._sock.fileno() == -1


def test_end_of_the_peer(rig: Rig) -> None:
    rig.peer_data(b"last words")
    rig.peer_sock.close()
    until(lambda: rig.owner.closed)
    assert rig.received() == b"last words"
    assert "closed the connection" in str(rig.owner.closed[0])


def test_last_words_are_read_although_writing_fails(rig: Rig) -> None:
    rig.peer.close(2, "I was refused a certificate")
    with rig.transport.lock:
        rig.peer_flush()
        rig.transport._write = _broken  # type: ignore[method-assign]
        rig.connection.send_data(1, 1, b"x")
        rig.transport.flush()
    until(lambda: rig.owner.closed)
    assert any("certificate" in str(event) for event in rig.owner.events)


def _broken(data: Any) -> int:
    raise BrokenPipeError(32, "Broken pipe")


def test_goodbye_is_not_cut_in_the_middle_of_a_frame(rig: Rig) -> None:
    """What was not written whole is not followed by anything: the peer would take it for the rest."""
    written: list[int] = []
    write = rig.transport._write

    def short(data: Any) -> int:
        written.append(len(data))
        return int(write(bytes(data[:10])))

    with rig.transport.lock:
        rig.transport._write = short  # type: ignore[method-assign]
        rig.connection.send_data(1, 5000, bytes(5000))
        rig.connection.close(0, "bye")
        rig.transport._blocked = True
    rig.transport.fail(Closed("bye"))
    assert len(written) <= 2


def test_abort_resets_the_connection(rig: Rig) -> None:
    rig.transport.abort()
    until(lambda: rig.transport._ended)
    assert str(rig.transport.closed) == "aborted"
