"""What a metadata service says about the end of an instance (`supervisor.notices`), and a host that may be taken away."""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rpc_pair import SOON

from bigmachine.info import Notice
from bigmachine.supervisor import elsewhere, notices
from bigmachine.supervisor.notices import ACTION, REBALANCE, NoAnswer, Notices

WHEN = "2026-11-22T16:02:03Z"
THEN = 1795363323.0


class Metadata:
    """A metadata service: `documents` by path. A token is good until `forget`."""

    def __init__(self) -> None:
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def reply(self, status: int, body: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def do_PUT(self) -> None:
                assert self.path == "/latest/api/token"
                assert 0 < int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21600
                service.tokens += 1
                self.reply(200, f"token-{service.tokens}")

            def do_GET(self) -> None:
                service.asked += 1
                if self.headers["X-aws-ec2-metadata-token"] != f"token-{service.tokens}" or not service.tokens:
                    self.reply(401, "")
                elif service.broken:
                    self.reply(500, "")
                elif self.path in service.documents:
                    self.reply(200, service.documents[self.path])
                else:
                    self.reply(404, "no such thing")

            def log_message(self, format: str, *args: object) -> None: ...

        self.documents: dict[str, str] = {}
        self.broken = False
        self.tokens = 0
        self.asked = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def interrupt(self, action: str = "terminate", when: str = WHEN) -> None:
        self.documents[ACTION] = json.dumps({"action": action, "time": when})

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def service() -> Iterator[Metadata]:
    service = Metadata()
    yield service
    service.close()


def test_nothing_is_said_until_there_is_something(service: Metadata) -> None:
    found = Notices(service.url)
    assert found.look() == found.look() == []
    assert service.tokens == 1


@pytest.mark.parametrize(
    ("action", "verb"),
    [("terminate", "terminated"), ("stop", "stopped"), ("hibernate", "hibernated"), ("x", "taken away (x)")],
)
def test_an_interruption_is_said_once(service: Metadata, action: str, verb: str) -> None:
    found = Notices(service.url)
    service.interrupt(action)
    text = f"the instance will be {verb} at 16:02:03 UTC: spot capacity is needed"
    assert found.look() == [Notice("interruption", THEN, text)]
    assert found.look() == []
    service.interrupt(action, "2026-11-22T16:03:03Z")
    (again,) = found.look()
    assert again.deadline == THEN + 60


def test_a_rebalance_recommendation(service: Metadata) -> None:
    found = Notices(service.url)
    service.documents[REBALANCE] = json.dumps({"noticeTime": WHEN})
    text = "the instance is at elevated risk of interruption, EC2 said at 16:02:03 UTC"
    assert found.look() == [Notice("rebalance", None, text)]
    service.interrupt()
    (notice,) = found.look()
    assert notice.kind == "interruption"


def test_a_token_that_has_expired_is_replaced(service: Metadata) -> None:
    found = Notices(service.url)
    assert found.look() == []
    service.tokens += 1  # As if it were another's.
    service.interrupt()
    assert len(found.look()) == 1
    assert service.tokens == 3


def test_times_are_utc(service: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    service.interrupt(when="2026-11-22T16:02:03")  # A time without a zone is UTC.
    monkeypatch.setenv("TZ", "America/New_York")
    (notice,) = Notices(service.url).look()
    assert notice.deadline == THEN


@pytest.mark.parametrize(
    "document",
    ["", "{", "[]", '{"action": "stop"}', '{"action": 1, "time": "x"}', '{"action": "stop", "time": "soon"}'],
)
def test_nonsense_is_no_notice(service: Metadata, document: str) -> None:
    found = Notices(service.url)
    service.documents[ACTION] = document
    with pytest.raises(NoAnswer):
        found.look()
    service.interrupt()
    assert len(found.look()) == 1


def test_a_service_that_fails_is_asked_again(service: Metadata) -> None:
    found = Notices(service.url)
    service.interrupt()
    service.broken = True
    with pytest.raises(NoAnswer, match="status 500"):
        found.look()
    service.broken = False
    assert len(found.look()) == 1


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with pytest.raises(NoAnswer, match="refused"):
        Notices(f"http://127.0.0.1:{port}").look()


def test_somebody_who_speaks_something_else() -> None:
    def answer() -> None:
        with sock.accept()[0] as peer:
            peer.recv(1000)
            peer.sendall(b"SSH-2.0-nonsense\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as sock:
        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(NoAnswer, match="no HTTP"):
            Notices(f"http://127.0.0.1:{sock.getsockname()[1]}").look()


def test_addresses() -> None:
    assert Notices("http://169.254.169.254")._address == ("169.254.169.254", 80)
    assert Notices("http://[fd00:ec2::254]")._address == ("fd00:ec2::254", 80)
    assert Notices("http://[::1]:81")._address == ("::1", 81)
    with pytest.raises(ValueError, match="not the address"):
        Notices("https://169.254.169.254")


def test_whoever_does_not_answer_is_asked_again(service: Metadata) -> None:
    over = threading.Event()
    heard: list[Notice] = []

    def pause(seconds: float) -> bool:
        assert seconds == notices.POLL
        if service.asked == 6:
            service.broken = False
            service.interrupt()
        return over.is_set()

    def notify(notice: Notice) -> None:
        heard.append(notice)
        over.set()

    service.broken = True
    notices.watch(service.url, notify, pause)
    assert [notice.deadline for notice in heard] == [THEN]


def test_a_host_watches_where_the_handover_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    called: queue.SimpleQueue[tuple[object, ...]] = queue.SimpleQueue()
    monkeypatch.setattr(elsewhere, "watch", lambda *args: called.put(args))
    host = object.__new__(elsewhere.RemoteHost)
    for url in ("", "http://192.0.2.1"):
        host._notices = url
        host.watch(print)
    assert called.get(timeout=SOON) == ("http://192.0.2.1", print)
    assert called.empty()


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="no host with a dead man's switch")
def test_a_host_says_until_when_it_lives(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In seconds since its start, at any time a whole number and nothing else: in place, and as long as ever."""
    host = object.__new__(elsewhere.RemoteHost)
    host._deadman = ""
    host.renewed(10.0)
    until = tmp_path / "until"
    until.write_text("9" * 15 + "\n")
    host._deadman = str(until)
    before = until.stat()
    host.renewed(10.0)
    wanted = time.clock_gettime(time.CLOCK_BOOTTIME) + 10.0 + elsewhere.MARGIN
    assert wanted - 2 <= int(until.read_text()) <= wanted
    assert (until.stat().st_ino, until.stat().st_size) == (before.st_ino, before.st_size)
    host.renewed(100.0)
    assert int(until.read_text()) >= wanted + 80
    assert capfd.readouterr().err == ""
    host._deadman = str(tmp_path / "missing" / "until")
    host.renewed(10.0)
    assert "No such file or directory: this host will end" in capfd.readouterr().err
