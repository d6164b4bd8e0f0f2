"""The machine's one port: which process a connection is for (`hello`, pure), and what becomes of other visitors (`door`)."""

from __future__ import annotations

import os
import random
import socket
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from bigmachine.rpc.reactor import Reactor
from bigmachine.supervisor import door as door_module
from bigmachine.supervisor.door import Door
from bigmachine.supervisor.hello import MAX_HELLO, NotTls, server_name
from bigmachine.testing.conformance import eventually

SUPERVISOR = "supervisor.m-1.bigmachine"


def hello(name: str | None, *, alpn: int = 1) -> bytes:
    """A real ClientHello; one of any size, by the number of protocols that it offers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([f"protocol-{i:06d}" for i in range(alpn)])
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def records(data: bytes, size: int) -> bytes:
    """The same handshake message in records of `size` bytes."""
    message = data[5:]
    pieces = [message[i : i + size] for i in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece for piece in pieces)


# -- The ClientHello -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SUPERVISOR, "0.m-1.bigmachine", "x" * 63 + ".example"])
def test_finds_the_server_name(name: str) -> None:
    assert server_name(hello(name)) == name
    assert server_name(hello(name) + b"whatever follows") == name


def test_a_client_that_names_nobody() -> None:
    assert server_name(hello(None)) == ""


def test_every_beginning_needs_more() -> None:
    data = hello(SUPERVISOR)
    assert {server_name(data[:n]) for n in range(len(data))} == {None}


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_hello_in_several_records(size: int) -> None:
    data = records(hello(SUPERVISOR), size)
    assert server_name(data) == SUPERVISOR
    assert server_name(data[:-1]) is None


def test_a_large_hello() -> None:
    data = hello(SUPERVISOR, alpn=500)
    assert len(data) > 7000
    assert server_name(data) == SUPERVISOR


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "b'GET / HTTP/1.1"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "not TLS"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "b'SSH-2.0"),
        (b"\0", "not TLS"),
        (b"\x15\x03\x01\x00\x02\x02\x28", "not TLS"),
        (b"\x16\x02\x01\x00\x10\x01\x00\x00\x0c", "not a TLS ClientHello"),
        (b"\x16\x03\x01\x00\x10\x02\x00\x00\x0c", "not a TLS ClientHello"),
        (b"\x16\x03\x01\x00\x10\x01\xff\xff\xff", "a ClientHello of 16777215 bytes"),
        (b"\x16\x03\x01\x00\x04\x01\x00\x00\x0c" + b"\x17\x03\x01\x00\x01x", "interrupted"),
        (b"\x16\x03\x01\x00\x04\x01\x00\x00\x0c" + b"\x16\x03\x01\x00\x00", "not a TLS ClientHello"),
        (b"\x16\x03\x01\x00\x05\x01\x00\x00\x01x", "malformed"),
    ],
)
def test_what_is_no_hello(data: bytes, text: str) -> None:
    with pytest.raises(NotTls, match=text):
        server_name(data)


def test_damaged_hellos_never_do_worse() -> None:
    data, chance = hello(SUPERVISOR), random.Random(7)
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            server_name(bytes(damaged[: chance.randint(1, len(damaged))]))
        except NotTls:
            pass


# -- The door ------------------------------------------------------------------------------------------------------------


class Hall:
    """A door, and what came through it."""

    def __init__(self, reactor: Reactor) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = self.listener.getsockname()
        self.arrived: list[tuple[int | None, socket.socket]] = []
        self.logged: list[str] = []
        self.door = Door(self.listener, "m-1", self.route, reactor, self.logged.append)

    def route(self, process: int | None, sock: socket.socket) -> None:
        if process == 9:
            raise ValueError("there is no service process 9")
        self.arrived.append((process, sock))

    def knock(self, data: bytes = b"") -> socket.socket:
        visitor = socket.create_connection(self.address, 5)
        visitor.sendall(data)
        return visitor

    def await_log(self, text: str) -> None:
        eventually(lambda: any(text in line for line in self.logged), f"{text!r} in {self.logged}")


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    reactor = Reactor()
    yield reactor
    reactor.close()


@pytest.fixture
def hall(reactor: Reactor) -> Iterator[Hall]:
    hall = Hall(reactor)
    yield hall
    hall.door.close()
    for _, sock in hall.arrived:
        sock.close()


def assert_closed(visitor: socket.socket, within: float = 5.0) -> None:
    visitor.settimeout(within)
    with visitor:
        try:
            assert visitor.recv(1) == b""
        except ConnectionResetError:
            pass


@pytest.mark.parametrize(("name", "process"), [(SUPERVISOR, None), ("0.m-1.bigmachine", 0), ("12.m-1.bigmachine", 12)])
def test_a_visitor_is_passed_on_untouched(hall: Hall, name: str, process: int | None) -> None:
    data = hello(name)
    with hall.knock(data):
        eventually(lambda: hall.arrived, "the visitor")
        ((wanted, sock),) = hall.arrived
        assert wanted == process
        sock.settimeout(5)
        assert sock.recv(100_000) == data
    assert not hall.logged


def test_a_hello_that_comes_in_drops(hall: Hall) -> None:
    data = records(hello(SUPERVISOR, alpn=20), 50)
    with hall.knock() as visitor:
        visitor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(0, len(data), 97):
            visitor.sendall(data[i : i + 97])
            time.sleep(0.001)
        eventually(lambda: hall.arrived, "the visitor")
        sock = hall.arrived[0][1]
        sock.settimeout(5)
        received = b""
        while len(received) < len(data):
            received += sock.recv(100_000)
        assert received == data
        visitor.sendall(b"!")
        assert sock.recv(10) == b"!", "the low-water mark must not stay"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "not TLS: the connection begins with b'GET / HTTP/1.1"),
        (os.urandom(3) and b"\x80\x01\x02", "not TLS"),
        (hello("supervisor.m-2.bigmachine"), "it wants machine m-2; this is m-1"),
        (hello("example.org"), "not a server name"),
        (hello(None), "not a server name"),
        (hello("9.m-1.bigmachine"), "there is no service process 9"),
    ],
    ids=["http", "garbage", "another machine", "another name", "no name", "no such process"],
)
def test_other_visitors_are_shown_out(hall: Hall, data: bytes, text: str) -> None:
    assert_closed(hall.knock(data))
    hall.await_log(text)
    assert "127.0.0.1:" in hall.logged[0]
    assert not hall.arrived


def test_a_visitor_that_says_nothing_and_leaves(hall: Hall) -> None:
    hall.knock().close()
    hall.await_log("it ended before it said what it wants")


def test_a_visitor_that_leaves_in_the_middle_of_a_word(hall: Hall) -> None:
    visitor = hall.knock(hello(SUPERVISOR)[:50])
    visitor.shutdown(socket.SHUT_WR)
    assert_closed(visitor, within=3.0)
    hall.await_log("it ended before it said what it wants")


def test_a_half_open_visitor_costs_no_processor_time(hall: Hall) -> None:
    visitor = hall.knock(hello(SUPERVISOR)[:50])
    time.sleep(0.05)
    started = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - started < 0.15
    visitor.close()


def test_a_visitor_that_hesitates_too_long(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "HELLO_TIMEOUT", 0.1)
    slow = hall.knock(hello(SUPERVISOR)[:-1])
    silent = hall.knock()
    assert_closed(slow)
    assert_closed(silent)
    hall.await_log("no TLS ClientHello within 0.1 s")


def test_a_hello_without_end(hall: Hall) -> None:
    message = b"\x01" + (MAX_HELLO - 10).to_bytes(3, "big") + bytes(MAX_HELLO)
    endless = b"".join(b"\x16\x03\x01\x00\x01" + message[i : i + 1] for i in range(MAX_HELLO // 6 + 1))
    assert_closed(hall.knock(endless))
    hall.await_log(f"a ClientHello of more than {MAX_HELLO} bytes")


def test_too_many_visitors(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "MAX_WAITING", 3)
    waiting = [hall.knock(b"\x16") for _ in range(3)]
    eventually(lambda: len(hall.door._waiting) == 3, "three visitors")
    assert_closed(hall.knock())
    hall.await_log("more than 3 connections have not said what they want")
    waiting.pop().close()
    eventually(lambda: len(hall.door._waiting) == 2, "one to leave")
    with hall.knock(hello(SUPERVISOR)):
        eventually(lambda: hall.arrived, "somebody who knows what he wants")
    for visitor in waiting:
        visitor.close()


def test_many_visitors_at_once(hall: Hall) -> None:
    data = hello(SUPERVISOR)
    with ThreadPoolExecutor(8) as pool:
        visitors = list(pool.map(hall.knock, [data] * 200))
    eventually(lambda: len(hall.arrived) == 200, "200 visitors")
    assert not hall.logged
    for visitor in visitors:
        visitor.close()


def test_a_closed_door(hall: Hall) -> None:
    waiting = hall.knock(b"\x16")
    eventually(lambda: hall.door._waiting, "the visitor")
    hall.door.close()
    assert_closed(waiting)
    with pytest.raises(ConnectionRefusedError):
        hall.knock()
    assert not hall.logged
