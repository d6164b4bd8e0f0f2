"""The debug server: where it listens, what it costs while nobody looks, whom it answers, and how it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from debug_pages import PATH, Echo, ask, serving
from descriptors import descriptors

import bigmachine
from bigmachine.errors import UsageError
from bigmachine.inside import monitor, server
from bigmachine.inside.server import DebugServer, Place, parse
from bigmachine.session import Session
from bigmachine.testing import TestSystem
from bigmachine.testing.conformance import SOON, eventually


@pytest.fixture
def session() -> Iterator[Session]:
    with bigmachine.start(TestSystem()) as b:
        yield b


@pytest.fixture(scope="module")
def served() -> Iterator[DebugServer]:
    """For all who only ask."""
    with bigmachine.start(TestSystem()) as b:
        debug = server.start(b, "localhost:0")
        assert debug is not None
        yield debug
        debug.close()


@pytest.fixture
def own(session: Session) -> Iterator[DebugServer]:
    """For who changes something."""
    debug = server.start(session, "localhost:0")
    assert debug is not None
    yield debug
    debug.close()


# -- Where it listens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "place"),
    [
        ("localhost:3333", Place("localhost", 3333)),
        (":3333", Place("", 3333)),
        ("0.0.0.0:80", Place("0.0.0.0", 80)),
        ("[::1]:3333", Place("::1", 3333)),
        ("ada.example:0", Place("ada.example", 0)),
        ("off", None),
    ],
)
def test_places(where: str, place: Place | None) -> None:
    assert parse(where) == place


@pytest.mark.parametrize(
    "where",
    [
        "",
        "3333",
        "localhost",
        "localhost:",
        "localhost:http",
        "localhost:-1",
        "localhost:65536",
        "localhost:٣",
        "::1:3333",
        *("[::1]", "[localhost]:3333", "[]:1", "http://localhost:3333", "a b:1", "user@host:1", "Off", "on"),
    ],
)
def test_what_is_no_place(where: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{where!r}; give host:port, such as localhost:3333, or off")):
        parse(where)


def test_off_is_off(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert server.start(session, "off") is None
    assert capsys.readouterr().err == ""


def test_it_says_where_it_is(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    debug = server.start(session, "localhost:0")
    assert debug is not None
    assert capsys.readouterr().err == f"bigmachine: status at http://localhost:{debug.port}{PATH}/\n"
    debug.close()


def test_the_next_port_that_is_free(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    """Even where only one of the two addresses of localhost is taken: else it would be chance who answers."""
    first = server.start(session, "localhost:0")
    assert first is not None
    second = server.start(session, f"localhost:{first.port}")
    assert second is not None
    assert first.port < second.port <= first.port + server.FURTHER
    with socket.create_server(("127.0.0.1", 0)) as taken:
        third = server.start(session, f"localhost:{taken.getsockname()[1]}")
        assert third is not None
        assert third.port > taken.getsockname()[1]
    for each in (first, second, third):
        each.close()
    assert capsys.readouterr().err.count("status at") == 3


def test_answers_do_not_wait_for_acknowledgements(served: DebugServer) -> None:
    """asyncio turns that off for connections of which it sees that they are of TCP: they have it from who listens."""
    assert {sock.proto for sock in served.sockets} == {socket.IPPROTO_TCP}


def test_both_addresses_of_localhost(served: DebugServer) -> None:
    addresses = {sock.getsockname()[0] for sock in served.sockets}
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("no IPv6 here")
    assert addresses == {"127.0.0.1", "::1"}
    assert len({sock.getsockname()[1] for sock in served.sockets}) == 1
    for host in addresses:
        connection = http.client.HTTPConnection(host, served.port, timeout=SOON)
        connection.request("GET", f"{PATH}/status")
        assert connection.getresponse().status == 200
        connection.close()


def test_who_lets_others_in_is_told_so(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    debug = server.start(session, "0.0.0.0:0")
    assert debug is not None
    debug.close()
    assert "anybody who can reach" in capsys.readouterr().err


def test_no_host_is_all_addresses(session: Session) -> None:
    debug = server.start(session, ":0")
    assert debug is not None
    with contextlib.closing(debug):
        assert debug.sockets[0].getsockname()[0] == "0.0.0.0"


@pytest.mark.parametrize("host", ["a" * 64, "."], ids=["a label that is too long", "no label"])
def test_a_host_that_cannot_be_a_name(session: Session, host: str) -> None:
    with pytest.raises(UsageError, match="cannot listen at"):
        server.start(session, f"{host}:0")


def test_an_address_of_somebody_else(session: Session) -> None:
    with pytest.raises(UsageError, match=r"cannot listen at 192\.0\.2\.1:3333 for the debug page: "):
        server.start(session, "192.0.2.1:3333")
    with pytest.raises(UsageError, match=r"cannot listen at 'nobody\.invalid' for the debug page: "):
        server.start(session, "nobody.invalid:3333")


def test_no_port_is_free(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FURTHER", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"no free port for the debug page from {port} to {port}: "):
            server.start(session, f"127.0.0.1:{port}")


# -- What it costs -------------------------------------------------------------------------------------------------------

LAZY = """
import http.client, sys, threading
from bigmachine import driver

class Echo:
    def echo(self, what): return what

if __name__ == "__main__":
    with driver.start(http="localhost:0") as b:
        machine = b.start(1, {"Echo": Echo()})[0]
        machine.call("Echo.echo", 1)
        heavy = ("asyncio", "starlette", "uvicorn", "h11", "anyio", "bigmachine.inside.routes", "bigmachine.inside.monitor")
        print("before", sorted(set(heavy) & set(sys.modules)), flush=True)
        print("threads", [each.name for each in threading.enumerate() if "http" in each.name or "status" in each.name])
        port = int(b.logs.last(1, "")[0].text.rpartition(":")[2].partition("/")[0])
        connection = http.client.HTTPConnection("localhost", port)
        connection.request("GET", "/debug/bigmachine/status.json")
        print("status", connection.getresponse().status, "starlette" in sys.modules)
        connection.close()
"""


@pytest.mark.slow
def test_nothing_is_there_before_somebody_looks(tmp_path: Path) -> None:
    script = tmp_path / "lazy.py"
    script.write_text(LAZY)
    ran = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert ran.stdout.splitlines() == ["before []", "threads []", "status 200 True"], ran.stderr
    assert ran.returncode == 0
    assert [line for line in ran.stderr.splitlines() if "bigmachine: status at" not in line] == []


def test_the_monitor_rests_when_nobody_looks(own: DebugServer, monkeypatch: pytest.MonkeyPatch) -> None:
    before = serving()
    monkeypatch.setattr(monitor, "LINGER", 0.0)
    monkeypatch.setattr(monitor, "INTERVAL", 0.05)
    assert ask(own, f"{PATH}/status.json").status == 200
    eventually(
        lambda: [each.name for each in serving() - before] == ["bigmachine-http"], "the end of the monitor's thread"
    )
    assert ask(own, f"{PATH}/status.json").status == 200  # And begins again.


def test_fifty_clients_get_the_same_document(
    session: Session, own: DebugServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    document = monitor.document

    def counted(of: Session, *args: Any, **named: Any) -> dict[str, Any]:
        if of is session:  # Others have their own.
            made.append(1)
        return document(of, *args, **named)

    monkeypatch.setattr(monitor, "document", counted)
    monkeypatch.setattr(monitor, "INTERVAL", 3600.0)
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: ask(own, f"{PATH}/status.json"), range(200)))
    assert {each.status for each in answers} == {200}
    assert len({each.body for each in answers}) == len({each.headers["etag"] for each in answers}) == len(made) == 1


# -- Whom it answers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:3333", "LOCALHOST:1", "localhost.:80", "127.0.0.1", "127.0.0.1:9", "[::1]", "[::1]:3333"],
)
def test_its_own_names(served: DebugServer, host: str) -> None:
    assert ask(served, f"{PATH}/status", Host=host).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:3333",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "192.0.2.7:3333",
        "[::2]",
        "",
        ":3333",
        "localhost:evil",
        "::1",
        "localhost@evil.example",
        "localhost:80:80",
        "[localhost]x:1",
    ],
)
def test_a_name_that_was_made_to_lead_here(served: DebugServer, host: str) -> None:
    """DNS rebinding: the browser takes us for that site."""
    for path in ("/", f"{PATH}/", f"{PATH}/logs", "/metrics"):
        answer = ask(served, path, Host=host)
        assert answer.status == 421
        assert answer.line.startswith("misdirected: ")


def test_no_name_and_two_names(served: DebugServer) -> None:
    for head in ("", "Host: localhost\r\nHost: evil.example\r\n"):
        with socket.create_connection(("127.0.0.1", served.port), SOON) as sock:
            sock.sendall(f"GET {PATH}/status HTTP/1.1\r\n{head}Connection: close\r\n\r\n".encode())
            said = b"".join(iter(lambda: sock.recv(4096), b""))
        assert re.match(rb"HTTP/1.1 4\d\d ", said)
        assert b"session" not in said


def test_any_address_where_it_is_bound_to_all(session: Session) -> None:
    debug = server.start(session, "0.0.0.0:0")
    assert debug is not None
    assert ask(debug, f"{PATH}/status", Host="192.0.2.7:3333").status == 200
    assert ask(debug, f"{PATH}/status", Host=debug.authority).status == 200
    assert ask(debug, f"{PATH}/status", Host="evil.example").status == 421
    debug.close()


def test_other_sites_pages(served: DebugServer) -> None:
    for path in (f"{PATH}/status.json", f"{PATH}/", "/metrics"):
        answer = ask(served, path, Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors", Sec_Fetch_Dest="image")
        assert answer.status == 403
        assert answer.line.startswith("refused: another site's page has asked for it")
    framed = ask(served, f"{PATH}/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate", Sec_Fetch_Dest="iframe")
    assert framed.status == 403
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert ask(served, f"{PATH}/", **link).status == 200
    assert ask(served, f"{PATH}/pprof/profile", **link).status == 403
    assert ask(served, f"{PATH}/status.json", Sec_Fetch_Site="same-origin").status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_it_only_reads(served: DebugServer, method: str) -> None:
    for path in ("/", f"{PATH}/status", f"{PATH}/nothing"):
        answer = ask(served, path, method)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


def test_only_our_own_scripts(served: DebugServer) -> None:
    for path in (f"{PATH}/", f"{PATH}/logs", f"{PATH}/nothing", f"{PATH}/status.json"):
        headers = ask(served, path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] in ("no-store", "no-cache")
        assert "access-control-allow-origin" not in headers


# -- What goes wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "garbage",
    [b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"\x00" * 70_000, b"GET / HTTP/1.1\r\nHost: x"],
    ids=range(4),
)
def test_garbage(served: DebugServer, garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(("127.0.0.1", served.port), SOON) as sock:
        try:
            sock.sendall(garbage)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
        except OSError:
            pass  # It has had enough.
    assert ask(served, f"{PATH}/status").status == 200
    assert caplog.records == []


def test_who_connects_and_leaves_is_nobody(served: DebugServer) -> None:
    for _ in range(20):
        socket.create_connection(("127.0.0.1", served.port), SOON).close()
    assert ask(served, f"{PATH}/status").status == 200


def test_the_programs_own_logging_is_left_alone(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    handler = logging.NullHandler()
    loggers = [logging.getLogger(f"uvicorn{each}") for each in ("", ".error", ".access", ".asgi")]
    loggers[2].addHandler(handler)
    before = [(each.level, list(each.handlers), each.propagate, list(each.filters)) for each in loggers]
    with caplog.at_level(logging.DEBUG):
        debug = server.start(session, "localhost:0")
        assert debug is not None
        assert ask(debug, f"{PATH}/status").status == 200
        loggers[1].info("the program's own server")
        debug.close()
    assert [(each.level, list(each.handlers), each.propagate, list(each.filters)) for each in loggers] == before
    loggers[2].removeHandler(handler)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("uvicorn")] == [
        "the program's own server"
    ]


def test_an_error_of_ours_is_an_answer(own: DebugServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **named: Any) -> dict[str, Any]:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("bigmachine.inside.text.status", broken)
    answer = ask(own, f"{PATH}/status")
    assert (answer.status, answer.line) == (500, "RuntimeError: a bug of ours")


# -- The end -------------------------------------------------------------------------------------------------------------


def test_nothing_is_left() -> None:
    before = serving()
    with bigmachine.start(TestSystem()) as b:
        b.start(1, {"Echo": Echo()})[0].wait()
        debug = server.start(b, "localhost:0")
        assert debug is not None
        idle = http.client.HTTPConnection("127.0.0.1", debug.port, timeout=SOON)
        idle.request("GET", f"{PATH}/status")
        assert idle.getresponse().read()  # And the connection stays open.
        debug.close()
        eventually(lambda: "bigmachine-http" not in {each.name for each in serving() - before}, "the end of its thread")
        with pytest.raises(ConnectionRefusedError):
            ask(debug, f"{PATH}/status")
        idle.close()
    eventually(lambda: serving() <= before, "the end of all threads")


def test_who_never_was_asked_leaves_nothing(session: Session) -> None:
    threads = serving()
    before = descriptors()
    debug = server.start(session, "localhost:0")
    assert debug is not None
    debug.close()
    debug.close()
    assert descriptors() <= before
    assert serving() <= threads


def test_a_client_that_does_not_read(session: Session) -> None:
    before = serving()
    session.logs.say("\n".join(["x" * 1000] * 2000))
    debug = server.start(session, "localhost:0")
    assert debug is not None
    with socket.create_connection(("127.0.0.1", debug.port), SOON) as sock:
        for _ in range(20):
            sock.sendall(f"GET {PATH}/logs?follow=1 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        sock.recv(1)
        debug.close()
        eventually(lambda: "bigmachine-http" not in {each.name for each in serving() - before}, "the end of its thread")


def test_the_end_of_the_session_ends_it() -> None:
    before = serving()
    with bigmachine.start(TestSystem(), http="localhost:0") as b:
        said = b.logs.last(1, "")[0].text
        port = int(said.rpartition(":")[2].partition("/")[0])
        connection = http.client.HTTPConnection("localhost", port, timeout=SOON)
        connection.request("GET", f"{PATH}/status.json")
        assert json.loads(connection.getresponse().read())["session"]["name"] == b.name
        connection.close()
    eventually(lambda: serving() <= before, "the end of all threads")


def test_a_fork_of_the_driver_does_not_keep_the_port(session: Session) -> None:
    debug = server.start(session, "127.0.0.1:0")
    assert debug is not None
    told, tell = os.pipe()
    ready, say = os.pipe()
    child = os.fork()
    if not child:  # Lives longer than the server.
        os.close(tell)
        os.write(say, b"x")
        os.read(told, 1)
        os._exit(0)
    try:
        os.close(told)
        assert os.read(ready, 1)
        debug.close()
        again = server.start(session, f"127.0.0.1:{debug.port}")
        assert again is not None
        again.close()
        assert again.port == debug.port
    finally:
        for fd in (tell, ready, say):
            os.close(fd)
        os.waitpid(child, 0)
