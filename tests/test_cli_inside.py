"""The commands that look into a running driver: against a server that says what a test wants, and against sessions."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import io
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from rich.console import Console
from screens import Screen

import bigmachine
from bigmachine.cli import attach, exits, files, main, profile, screen, text, view
from bigmachine.cli.attach import Address, Driver, parse, shown
from bigmachine.cli.logs import Painter, whole_lines
from bigmachine.cli.view import View, chosen, doing, header, machine_cells, press, printed, scrolled
from bigmachine.inside import pprof, server
from bigmachine.logs import PALETTE
from bigmachine.profiling.values import Place, Profile, Sample
from bigmachine.session import Session
from bigmachine.testing import TestSystem
from bigmachine.testing.conformance import SOON

PREFIX = "/debug/bigmachine"

Query = dict[str, list[str]]
Reply = bytes | Callable[["Handler"], None]


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers what its server has in `replies`, by path below the prefix; and writes down what it was asked."""

    protocol_version = "HTTP/1.1"
    server: Stub

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.server.asked.append(self.path)
        reply = self.server.replies.get(parts.path.removeprefix(f"{PREFIX}/"), (404, b"there is nothing here\n", {}))
        if callable(reply):
            reply(self)
            return
        status, body, headers = reply
        self.start(status, {"Content-Length": str(len(body)), **headers})
        self.wfile.write(body)

    def start(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {attach.MARK: "1.0", "Connection": "close", **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class Stub(http.server.ThreadingHTTPServer):
    """Something that answers like a driver."""

    block_on_close = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: dict[str, Any] = {"pprof/": (200, b"", {})}
        self.asked: list[str] = []
        self.address = f"127.0.0.1:{self.server_port}"
        self.released = threading.Event()

    def reply(self, path: str, body: bytes | str, status: int = 200, **headers: str) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.replies[path] = status, data, {name.replace("_", "-"): value for name, value in headers.items()}

    def query(self) -> Query:
        """Of the last question."""
        return parse_qs(urlsplit(self.asked[-1]).query)

    def handle_error(self, *_: object) -> None:
        pass  # A client that has gone away.


@contextlib.contextmanager
def stubbed() -> Iterator[Stub]:
    with Stub() as stub:
        thread = threading.Thread(target=lambda: stub.serve_forever(0.01))
        thread.start()
        try:
            yield stub
        finally:
            stub.released.set()
            stub.shutdown()
            thread.join()


@pytest.fixture
def stub() -> Iterator[Stub]:
    with stubbed() as found:
        yield found


@contextlib.contextmanager
def answering(data: bytes) -> Iterator[str]:
    """Something that sends `data` to whoever connects, and hangs up. Its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                with listener.accept()[0] as connection:
                    connection.sendall(data)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1024):
                        pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def unused() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    return captured.out, captured.err


# -- Whom to ask ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("localhost:3333", "http://localhost:3333/debug/bigmachine/"),
        ("ada", "http://ada:3333/debug/bigmachine/"),
        (":4000", "http://localhost:4000/debug/bigmachine/"),
        ("4000", "http://localhost:4000/debug/bigmachine/"),
        ("[::1]:4000", "http://[::1]:4000/debug/bigmachine/"),
        ("http://ada:4000", "http://ada:4000/debug/bigmachine/"),
        ("http://ada:4000/debug/bigmachine/", "http://ada:4000/debug/bigmachine/"),
        ("http://ada:4000/debug/bigmachine/#logs", "http://ada:4000/debug/bigmachine/"),
        ("ada:4000/ops/big one", "http://ada:4000/ops/big%20one/"),
        ("https://ada.example.org/ops/", "https://ada.example.org:443/ops/"),
        ("http://ada", "http://ada:80/debug/bigmachine/"),
    ],
)
def test_addresses(written: str, meant: str) -> None:
    assert str(parse(written)) == meant
    assert parse(meant) == parse(written)


@pytest.mark.parametrize(
    "written",
    ["", "http://", "ftp://ada:21", "ada:99999", "ada:x", "ada:0", "[::1", "a da:3333", "me@ada:3333", "-x@y", "http:///x"],
)
def test_what_is_no_address(written: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--", written]) == exits.WRONG
    assert said(capsys) == (
        "",
        f"bigmachine: not an address of a driver: {written!r}; give host:port or a URL, such as localhost:3333\n",
    )


HINT = "give the address that the driver has printed (`status at …`)"


@pytest.mark.parametrize(
    "words", ["status", "status --json", "top", "logs", "logs -f", "logs --json", "profile heap", "bundle"]
)
def test_nobody_is_there(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    address = unused()
    assert main([*words.split(), address]) == exits.FAILED
    assert said(capsys) == ("", f"bigmachine: no driver at http://{address}{PREFIX}/: connection refused; {HINT}\n")
    assert not os.listdir()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "what answers there does not speak HTTP"),
        (b"\x16\x03\x01\x1b[2J\xff", "what answers there does not speak HTTP"),
        (b"", "the connection was closed without an answer"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n<html>hi</html>",
            "what answers there is something else (200 OK)",
        ),
        (
            b"HTTP/1.1 404 No\x1b[2Jt\r\nContent-Length: 0\r\n\r\n",
            "what answers there is something else (404 Not)",
        ),
    ],
    ids=["ssh", "garbage", "hangs-up", "a-page", "not-found"],
)
def test_somebody_else_is_there(data: bytes, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with answering(data) as address:
        assert main(["status", address]) == exits.FAILED
    assert said(capsys) == ("", f"bigmachine: no driver at http://{address}{PREFIX}/: {reason}; {HINT}\n")


def test_a_name_that_is_no_host(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "a..b:3333"]) == exits.FAILED
    assert "no driver at http://a..b:3333/debug/bigmachine/: that is no name of a host; give" in said(capsys)[1]


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        (400, exits.WRONG, "seconds of a profile must be a number: 'abc'"),
        (404, exits.WRONG, "seconds of a profile must be a number: 'abc'"),
        (503, exits.FAILED, "the driver says: seconds of a profile must be a number: 'abc'"),
        (429, exits.FAILED, "the driver says: seconds of a profile must be a number: 'abc'"),
    ],
)
def test_what_the_driver_refuses(
    stub: Stub, status: int, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.reply("pprof/profile", "seconds of a profile must be a \x1b[2Jnumber: 'abc'\nmore\n", status)
    assert main(["profile", "profile", "--seconds", "abc", stub.address]) == code
    assert said(capsys) == ("", f"bigmachine: {line}\n")
    assert stub.query() == {"seconds": ["abc"]}


def test_a_driver_that_does_not_answer(stub: Stub) -> None:
    stub.replies["status"] = lambda handler: stub.released.wait(SOON)
    silent = pytest.raises(attach.Slow, match=r"/debug/bigmachine/ does not answer: nothing within 0\.05 s")
    with silent, Driver.at(stub.address).ask("status", patience=0.05):
        pass


def test_an_answer_that_breaks_off(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.reply("status", "half of", Content_Length="100")
    assert main(["status", stub.address]) == exits.GONE
    line = f"the driver at http://{stub.address}{PREFIX}/ has gone: the connection ended in the midst of the answer"
    assert said(capsys) == ("", f"bigmachine: {line}\n")


def test_a_driver_that_has_answered_before_is_gone(stub: Stub) -> None:
    stub.reply("status", "all is well")
    driver = Driver.at(stub.address)
    assert driver.text("status") == "all is well"
    driver.address = parse(unused())  # The port that it had, after its end.
    with pytest.raises(exits.Gone, match="has gone: connection refused"):
        driver.text("status")


def test_failures_of_who_asks_are_his_own(stub: Stub) -> None:
    stub.reply("status", "all is well")
    with pytest.raises(BrokenPipeError), Driver.at(stub.address).ask("status"):
        raise BrokenPipeError


def test_no_json(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.reply("status.json", "{")
    assert main(["status", "--json", stub.address]) == exits.FAILED
    assert said(capsys)[1].endswith("/ has answered status.json with something that is no JSON\n")


@pytest.mark.parametrize(
    ("said", "plain", "coloured"),
    [
        ("a\tb\nü\n", "a\tb\nü\n", "a\tb\nü\n"),
        ("\x1b[31mred\x1b[0m", "red", "\x1b[31mred\x1b[0m"),
        ("\x1b[2J\x1b[Ha\rb\bc\x07\x00d\x9b3m", "abcd3m", "abcd3m"),
        ("\x1b]0;title\x07a\x1b]8;;http://x\x1b\\link", "alink", "alink"),
        ("\x1b[?1049h\x1b(0a", "(0a", "(0a"),
    ],
)
def test_what_machines_say_does_not_move_the_cursor(said: str, plain: str, coloured: str) -> None:
    assert (shown(said), shown(said, colours=True)) == (plain, coloured)


# -- status --------------------------------------------------------------------------------------------------------------


def test_status(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.reply("status", "counter.py\n\n3 RUNNING\x1b[2J\n")
    stub.reply("status.json", '{"counts": {"RUNNING": 3}}')
    assert main(["status", stub.address]) == exits.DONE
    assert said(capsys) == ("counter.py\n\n3 RUNNING\n", "")
    assert main(["status", "--json", stub.address]) == exits.DONE
    assert json.loads(said(capsys)[0]) == {"counts": {"RUNNING": 3}}


def test_another_prefix(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.replies["/ops/big%20one/status"] = 200, b"here", {}
    assert main(["status", f"http://{stub.address}/ops/big one/"]) == exits.DONE
    assert said(capsys) == ("here\n", "")


# -- Files ---------------------------------------------------------------------------------------------------------------


def test_new_files_have_new_names(tmp_path: Path) -> None:
    Path("x.002.txt").touch()
    assert [str(files.keep([b"a", b"b"], None, "x.{}.txt")) for _ in range(3)] == ["x.001.txt", "x.003.txt", "x.004.txt"]
    assert Path("x.003.txt").read_bytes() == b"ab"
    assert stat.S_IMODE(Path("x.003.txt").stat().st_mode) == 0o600


def test_a_file_is_whole_or_as_it_was() -> None:
    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise exits.Gone("the driver has gone")

    Path("x").write_bytes(b"old")
    for path in (Path("x"), None):
        with pytest.raises(exits.Gone):
            files.keep(pieces(), path, "y.{}")
    assert (os.listdir(), Path("x").read_bytes()) == (["x"], b"old")
    files.check(Path("x"))
    files.check(None)
    assert files.keep([b"new"], Path("x"), "y.{}") == Path("x")
    assert (os.listdir(), Path("x").read_bytes()) == (["x"], b"new")


def test_what_is_no_file_is_written_into() -> None:
    os.mkfifo("pipe")
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(Path("pipe").read_bytes()))
    reader.start()
    files.check(Path("pipe"))
    files.keep([b"a", b"b"], Path("pipe"), "")
    reader.join()
    assert found == [b"ab"]
    assert Path("pipe").is_fifo()


def test_where_no_file_can_be_is_said_before_anything_is_asked(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    Path("file").touch()
    for target, line in {
        "folder": "is a directory, not a file: folder",
        "none/x": "no such file or directory: none",
        "file/x": "not a directory: file",
    }.items():
        for command in (["profile", "heap"], ["bundle"]):
            assert main([*command, "-o", target, stub.address]) == exits.FAILED
            assert said(capsys) == ("", f"bigmachine: {line}\n")
    assert stub.asked == []


# -- profile -------------------------------------------------------------------------------------------------------------


def a_profile(*comments: str) -> bytes:
    place = Place("spin", "app.py", 3, 1)
    sample = Sample((0,), (3, 30_000_000), (("machine", "m"),))
    types = (("samples", "count"), ("cpu", "nanoseconds"))
    return pprof.encode(Profile("profile", types, "cpu", [place], [sample], 1.0, 2.0, 10, comments, "p"))


def test_profile_is_a_file(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.reply("pprof/profile", a_profile("of 2 processes"), X_Bigmachine_Missing="0")
    assert main(["profile", "profile", "--seconds", "5", "--machine", "m-1", stub.address]) == exits.DONE
    name = "bigmachine.profile.001.pb.gz"
    assert said(capsys) == (f"{name}: {text.size(len(a_profile('of 2 processes')))}\ngo tool pprof -http=: {name}\n", "")
    assert Path(name).read_bytes() == a_profile("of 2 processes")
    assert stub.query() == {"seconds": ["5"], "machine": ["m-1"]}
    assert main(["profile", "profile", "-o", "my profile", stub.address]) == exits.DONE
    assert said(capsys)[0].endswith("\ngo tool pprof -http=: 'my profile'\n")


def test_profile_says_who_is_missing(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["m-1 0 is missing: no answer within 35 s", "m-2 0 is missing: it was shut\x1b[2J down"]
    stub.reply("pprof/heap", a_profile("m-3: of a sample", *lines), X_Bigmachine_Missing="2")
    stub.reply("pprof/threads", "\n".join(["threads: now", *(f"# {each}" for each in lines), "total: 1", "# no"]))
    missing = [each.replace("\x1b[2J", "") for each in lines]
    expected = "bigmachine: 2 processes missing from this profile:\n" + "".join(f"  {each}\n" for each in missing)
    assert main(["profile", "heap", "--gc", stub.address]) == exits.DONE
    assert said(capsys)[1] == expected
    assert stub.query() == {"gc": ["1"]}
    assert main(["profile", "threads", "--text", stub.address]) == exits.DONE
    assert said(capsys) == (f"threads: now\n# {missing[0]}\n# {missing[1]}\ntotal: 1\n# no\n", expected)
    assert stub.query() == {"debug": ["1"]}
    assert main(["profile", "heap", "--json", "-o", "x", stub.address]) == exits.DONE
    out, err = said(capsys)
    assert err == expected
    size = Path("x").stat().st_size
    assert json.loads(out) == {"file": "x", "size": size, "kind": "heap", "missing": missing}


def test_profile_as_text_into_a_file_and_as_json(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.reply("pprof/heap", "heap: now\ntotal: 1 bytes\n")
    assert main(["profile", "heap", "--text", "-o", "heap.txt", stub.address]) == exits.DONE
    assert said(capsys) == ("heap.txt: 25 B\n", "")
    assert main(["profile", "heap", "--text", "--json", stub.address]) == exits.DONE
    assert json.loads(said(capsys)[0]) == {"kind": "heap", "missing": [], "text": "heap: now\ntotal: 1 bytes"}


@pytest.mark.parametrize(
    "body",
    [b"", b"no gzip", a_profile("x")[:-9], gzip.compress(b"\x6a\x05\x09"), gzip.compress(b"\xff")],
    ids=["nothing", "no gzip", "cut", "cut within", "no profile"],
)
def test_what_is_no_profile(stub: Stub, body: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    stub.reply("pprof/heap", body)
    assert main(["profile", "heap", stub.address]) == exits.FAILED
    assert said(capsys)[1].endswith("/ has sent is no profile, or not all of one\n")
    assert not os.listdir()


def test_comments_of_many_are_read() -> None:
    lines = [f"comment {number} × {'x' * number}" for number in range(300)]
    assert list(profile.comments(a_profile(*lines), Driver(Address("h", 1)))) == lines


def test_a_kind_is_no_path(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "../status?x=1&", stub.address]) == exits.WRONG
    assert stub.asked[1:] == [f"{PREFIX}/pprof/..%2Fstatus%3Fx%3D1%26"]


@pytest.mark.parametrize("command", [["profile", "heap"], ["bundle"]])
def test_a_driver_that_ends_meanwhile(stub: Stub, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    stub.replies["pprof/heap"] = stub.replies["bundle"] = lambda handler: setattr(handler, "close_connection", True)
    assert main([*command, stub.address]) == exits.GONE
    line = f"the driver at http://{stub.address}{PREFIX}/ has gone: the connection was closed without an answer"
    assert said(capsys) == ("", f"bigmachine: {line}\n")
    assert not os.listdir()


def test_how_long_a_profile_is_waited_for() -> None:
    assert [profile._seconds(each) for each in (None, "5", "0", "-1", "abc", "nan", "inf")] == [30, 5, 0, 0, 0, 0, 0]


# -- bundle --------------------------------------------------------------------------------------------------------------


def test_bundle(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("status.txt", "well")
        archive.writestr("logs/m-1.log", "hello")
    stub.reply("bundle", data.getvalue())
    size = len(data.getvalue())
    assert main(["bundle", stub.address]) == exits.DONE
    assert said(capsys) == (f"bigmachine.001.zip: {size} B, 2 files\n", "")
    assert Path("bigmachine.001.zip").read_bytes() == data.getvalue()
    assert main(["bundle", "-o", "report.zip", "--json", stub.address]) == exits.DONE
    found = {"file": "report.zip", "size": size, "names": ["status.txt", "logs/m-1.log"]}
    assert json.loads(said(capsys)[0]) == found
    stub.reply("bundle", data.getvalue()[: size // 2])
    assert main(["bundle", "-o", "half.zip", stub.address]) == exits.FAILED
    assert "/ has sent is no zip file: File is not a zip file\n" in said(capsys)[1]
    stub.reply("bundle", data.getvalue(), Content_Length=str(size + 1))
    assert main(["bundle", stub.address]) == exits.GONE
    assert sorted(os.listdir()) == ["bigmachine.001.zip", "report.zip"]


# -- logs ----------------------------------------------------------------------------------------------------------------


def test_logs(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.reply("logs", "https://h:1/m-1/: one\x1b[2J\nbigmachine: two ü\n")
    assert main(["logs", stub.address]) == exits.DONE
    assert said(capsys) == ("https://h:1/m-1/: one\nbigmachine: two ü\n", "")
    assert stub.query() == {"n": ["100"]}
    assert main(["logs", "--machine", "m-1", "-n", "7", stub.address]) == exits.DONE
    assert stub.query() == {"n": ["7"], "machine": ["m-1"]}


def test_logs_as_json(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"number": 1, "time": 2.5, "machine": "m-1", "process": "0", "stream": "stdout", "text": "one"}]
    stub.reply("logs.json", json.dumps({"lines": lines, "number": 9, "lost": 0, "under_way": []}))
    assert main(["logs", "--json", "-n", "1", stub.address]) == exits.DONE
    assert json.loads(said(capsys)[0]) == {"lines": lines, "under_way": []}
    assert stub.query() == {"n": ["1"]}
    assert main(["logs", "--json", "-f", stub.address]) == exits.WRONG
    assert said(capsys) == ("", "bigmachine: --json prints what there is, once: leave out --follow, or --json\n")


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([], []),
        ([b"one\n", b"two\nthr", b"ee", b"\nfo", b"ur"], ["one\n", "two\n", "three\n", "four\n"]),
        (["ü\n".encode()[:1], "ü\n".encode()[1:], b"\xff\n"], ["ü\n", "\ufffd\n"]),
        ([b"a\nb\nc\n"], ["a\nb\nc\n"]),
    ],
)
def test_lines_are_printed_whole(pieces: list[bytes], expected: list[str]) -> None:
    assert list(whole_lines(pieces)) == expected


def test_machines_have_colours() -> None:
    painter = Painter()
    one, two = (f"\x1b[38;5;{colour}m" for colour in PALETTE[:2])
    assert painter.paint("https://h:1/m-1/: a\nbigmachine: b\nhttps://h:2/m-2/: https://h:1/m-1/: c\n") == (
        f"{one}https://h:1/m-1/:\x1b[0m a\nbigmachine: b\n{two}https://h:2/m-2/:\x1b[0m https://h:1/m-1/: c\n"
    )
    assert painter.paint("https://h:1/m-1/: d\n").startswith(one)


def chunks(stub: Stub, end: bytes, said: str = "https://h:1/m-1/: one\n") -> Callable[[Handler], None]:
    """A handler that sends `said`, and, when `stub.released` is set, `end`."""

    def handle(handler: Handler) -> None:
        handler.start(200, {"Transfer-Encoding": "chunked"})
        handler.wfile.write(f"{len(said.encode()):x}\r\n{said}\r\n".encode())
        stub.released.wait(SOON)
        handler.wfile.write(end)

    return handle


COMMAND = [sys.executable, "-m", "bigmachine"]


@contextlib.contextmanager
def following(stub: Stub) -> Iterator[subprocess.Popen[str]]:
    """``logs -f``, when it has printed its first line."""
    command = [*COMMAND, "logs", "-f", stub.address]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "https://h:1/m-1/: one\n"
            assert stub.query() == {"n": ["100"], "follow": ["1"]}
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [
        (b"4\r\ntwo\n\r\n0\r\n\r\n", exits.DONE, ""),
        (b"4\r\ntwo\n\r\n", exits.GONE, "the connection ended in the midst of the answer"),
    ],
    ids=["the-session-ends", "the-driver-is-killed"],
)
def test_lines_are_followed_to_the_end(stub: Stub, end: bytes, code: int, line: str) -> None:
    stub.replies["logs"] = chunks(stub, end)
    with following(stub) as process:
        stub.released.set()
        out, err = process.communicate(timeout=SOON)
    assert (process.returncode, out) == (code, "two\n")
    assert err == (f"bigmachine: the driver at http://{stub.address}{PREFIX}/ has gone: {line}\n" if line else "")


def test_who_follows_is_interrupted(stub: Stub) -> None:
    stub.replies["logs"] = chunks(stub, b"")
    with following(stub) as process:
        process.send_signal(2)
        assert process.communicate(timeout=SOON) == ("", "bigmachine: interrupted\n")
    assert process.returncode == exits.INTERRUPTED


def test_a_reader_that_leaves_ends_it(stub: Stub) -> None:
    stub.replies["logs"] = chunks(stub, b"4\r\ntwo\n\r\n" * 1000)
    with following(stub) as process:
        assert process.stdout is not None
        process.stdout.close()
        stub.released.set()
        assert process.wait(SOON) == exits.UNREAD
        assert process.stderr is not None
        assert process.stderr.read() == ""


# -- top -----------------------------------------------------------------------------------------------------------------


def a_machine(number: int, state: str = "RUNNING", **more: Any) -> dict[str, Any]:
    """As in a document. `cpu`, `rss`, `load` are figures; `busy` says what it does."""
    running = state == "RUNNING"
    memory = {"total": 8 << 30, "used": 2 << 30, "percent": 25.0, "processes": more.pop("rss", 64 << 20)}
    load = [more.pop("load", 1.5), 1.0, 0.5]
    process = {"process": "0", "pid": 7, "rss": 1, "cpu": 2.0, "percent": more.pop("cpu", 50.0), "threads": 3}
    calls = [
        {"method": method, "seconds": seconds, "where": "app.py:1", "thread": "t"} for method, seconds in more.pop("busy", ())
    ]
    return {
        "id": f"m-{number:06}",
        "address": f"https://h:{number}/m-{number:06}/",
        "host": f"host{number}",
        "state": state,
        "uptime": 65.0 if running else None,
        "detail": {"type": "m7i.large"},
        "error": None,
        "notice": None,
        "unhealthy": None,
        "missing": None,
        "vitals": {"memory": memory, "load": load, "cpu": 30.0} if running else None,
        "history": {"calls": [None, 12.0] if running else []},
        "processes": [{**process, "doing": calls}] if running else [],
        "step": "",
        **more,
    }


def a_method(name: str, rate: float | None = 2.0, errors: int = 0) -> dict[str, Any]:
    figures = {"count": 40, "rate": rate, "errors": errors, "p50": 0.000143, "p99": 0.0315, "max": 12.0, "seconds": 3.0}
    return {"method": name, "served": figures, "called": None}


def a_document(*machines: dict[str, Any], methods: Any = (), **session: Any) -> dict[str, Any]:
    known = {"name": "s-1a2b3c4d", "system": "local", "program": "bigpi.py", "began": 1000.0, "ended": None}
    money = {"hourly": None, "cost": None, "failed": None}
    counts: dict[str, int] = {}
    for each in machines:
        counts[each["state"]] = counts.get(each["state"], 0) + 1
    return {
        "now": 1125.0,
        "session": {**known, **money, **session},
        "counts": counts,
        "machines": list(machines),
        "methods": list(methods),
    }


def ids(document: dict[str, Any], view: View) -> list[int]:
    return [int(each["id"][2:]) for each in chosen(document, view)]


def typed(view: View, *keys: str) -> View:
    for key in keys:
        after = press(view, key)
        assert after is not None
        view = after
    return view


@pytest.mark.parametrize(
    ("key", "expected"), [("o", [1, 2, 3, 4]), ("c", [2, 1, 3, 4]), ("m", [3, 1, 2, 4]), ("l", [2, 3, 1, 4])]
)
def test_keys_sort_machines(key: str, expected: list[int]) -> None:
    document = a_document(
        a_machine(1, cpu=20.0, rss=200, load=0.1),
        a_machine(2, cpu=90.0, rss=100, load=3.0),
        a_machine(3, cpu=10.0, rss=300, load=2.0),
        a_machine(4, "STARTING"),
    )
    assert ids(document, typed(View(), key)) == expected


def test_machines_are_filtered_by_words() -> None:
    document = a_document(
        a_machine(1, busy=[("PI.sample", 1.0)]),
        a_machine(2, "STOPPED", error="killed by the kernel"),
        a_machine(3, detail={"type": "c7g.large"}),
    )
    assert ids(document, typed(View(), "/", *"pi.SAMPLE", "enter")) == [1]
    assert ids(document, typed(View(), "/", *"kernel stopped")) == [2]
    assert ids(document, typed(View(), "/", *"c7g")) == [3]
    assert ids(document, typed(View(), "/", *"c7gx", "backspace", "enter")) == [3]
    assert ids(document, typed(View(), "/", *"none", "enter")) == []
    assert ids(document, typed(View(), "/", *"none", "escape")) == [1, 2, 3]
    assert ids(document, typed(View(filter="none"), "escape")) == [1, 2, 3]


def test_while_one_types_keys_are_letters() -> None:
    assert typed(View(), "/", "q", "c", "up", "p") == View(filter="qcp", typing=True)
    assert press(typed(View(), "/"), "ctrl-c") is None
    assert [press(View(), key) for key in ("q", "ctrl-c", "ctrl-d")] == [None] * 3


def test_it_scrolls_as_far_as_there_is_something() -> None:
    assert scrolled(typed(View(), *["down"] * 3, "up"), 10, 4).first == 2
    assert scrolled(typed(View(), "end"), 10, 4).first == 6
    assert scrolled(typed(View(), "end", "home"), 10, 4).first == 0
    assert scrolled(typed(View(), "up"), 10, 4).first == 0
    assert scrolled(View(first=5), 3, 4).first == 0
    assert typed(View(first=5), "c").first == 0
    assert typed(View(), "x", "left") == View()
    assert typed(View(), "p").paused
    assert not typed(View(), "p", "p").paused


@pytest.mark.parametrize(
    ("sent", "keys"),
    [
        ("qü", ["q", "ü"]),
        ("\x1b[A\x1bOB\x1b[5~j", ["up", "down", "page-up", "j"]),
        ("\x1b", ["escape"]),
        ("\x7f\r\x03", ["backspace", "enter", "ctrl-c"]),
        ("\x1b[200~\x1b[1;5C\x00c", ["c"]),
    ],
)
def test_keys_as_terminals_send_them(sent: str, keys: list[str]) -> None:
    assert screen.names(sent) == keys


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (a_machine(1, busy=[("PI.sample", 65.0), ("PI.sample", 3.0), ("W.x", 0.25)]), "PI.sample ×2 1m05s, W.x 250 ms"),
        (a_machine(1, busy=[("PI.sample", None)]), "PI.sample 0.0 µs"),
        (a_machine(1), ""),
        (a_machine(1, unhealthy="memory 96 % full", busy=[("W.x", 2.0)]), "memory 96 % full; W.x 2s"),
        (a_machine(1, missing="no answer for 4 s"), "no answer for 4 s"),
        (a_machine(1, notice={"text": "taken away in 2 min"}), "taken away in 2 min"),
        (a_machine(1, "STOPPED", error="it was killed"), "it was killed"),
        (a_machine(1, "STOPPED"), "shut down"),
        (a_machine(1, "STARTING", step="upload"), "upload"),
        (a_machine(1, "UNSTARTED", step=None), ""),
    ],
)
def test_what_a_machine_does(machine: dict[str, Any], expected: str) -> None:
    assert doing(machine) == expected


def test_the_header_says_what_is_known() -> None:
    document = a_document(a_machine(1), a_machine(2), a_machine(3, "STOPPED"))
    assert header(document) == (
        "bigpi.py  s-1a2b3c4d  local  up 2m05s",
        "3 machines  2 RUNNING  1 STOPPED  24 calls/s",
    )
    document["session"] |= {"hourly": 0.25, "cost": 1.5, "ended": 1060.0, "failed": "ValueError: \x1b[2Jx\ny", "program": ""}
    assert header(document) == (
        "s-1a2b3c4d  local  ended after 1m00s",
        "3 machines  2 RUNNING  1 STOPPED  24 calls/s  0.25 USD/h  1.50 USD so far  failed: ValueError: x y",
    )


def test_what_nobody_knows_is_left_out() -> None:
    machine = a_machine(1, vitals=None, processes=[], history={"calls": []}, uptime=None)
    assert machine_cells(machine) == ("m-000001", "RUNNING", *[""] * 7)
    assert machine_cells(a_machine(1, cpu=None))[3] == "30%"
    silent = a_method("PI.sample", rate=None)
    silent["served"] |= {"p50": None, "p99": None, "max": None}
    assert view.method_cells(silent) == ("PI.sample", "40", "", "", "", "", "")
    called = {"method": "PI.sample", "served": None, "called": silent["served"]}
    assert view.method_cells(called) == view.method_cells(silent)
    assert view.busiest(a_document(methods=[{"method": "x", "served": None, "called": None}])) == []


def test_printed_once() -> None:
    machines = a_machine(1, busy=[("PI.sample", 3.0)]), a_machine(2, "STOPPED", error="a \x1b[2J\nlong story")
    methods = a_method("PI.sample"), a_method("PI.reset", rate=12.0, errors=3)
    assert "\n".join(printed(a_document(*machines, methods=methods), View())) == """\
bigpi.py  s-1a2b3c4d  local  up 2m05s
2 machines  1 RUNNING  1 STOPPED  12 calls/s

machine   state       up  cpu  mem  rss  load  calls/s  doing
m-000001  RUNNING  1m05s  50%  25%  64M   1.5       12  PI.sample 3s
m-000002  STOPPED                                       a long story

method     calls  calls/s  errors     p50      p99     max
PI.reset      40       12       3  143 µs  31.5 ms  12.0 s
PI.sample     40      2.0          143 µs  31.5 ms  12.0 s"""


@pytest.mark.parametrize(("columns", "lines"), [(80, 24), (60, 10), (200, 60), (20, 3)])
@pytest.mark.parametrize("count", [0, 1, 200])
def test_a_frame_fits(columns: int, lines: int, count: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=columns, height=lines, force_terminal=True, color_system=None)
    machines = [a_machine(number, busy=[("A.method" * 20, 5.0)]) for number in range(count)]
    methods = [a_method(f"Service.method{number}" * 5) for number in range(count)]
    console.print(screen.frame(a_document(*machines, methods=methods), View(first=count // 2), lines))
    rows = stream.getvalue().splitlines()
    assert max(map(len, rows)) <= columns
    assert len(rows) <= max(lines, screen.FRAME + 1)
    if lines >= 10:
        assert rows[-1].startswith("o c m l" if count < 2 else f"{count // 2 + 1} to ")
    if (columns, count) == (80, 200):
        assert f"m-{count // 2:06} RUNNING   1m05s  50%  25%   64M  1.5      12 A.method" in rows[3]
        assert len(rows) == lines


@pytest.mark.parametrize(
    ("words", "expected"), [("top", True), ("top --once --sort cpu", True), ("top --filter m-000002", False)]
)
def test_top_where_there_is_no_terminal(
    stub: Stub, words: str, expected: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.reply("status.json", json.dumps(a_document(a_machine(1), a_machine(2))))
    assert main([*words.split(), stub.address]) == exits.DONE
    out, err = said(capsys)
    assert ("m-000001" in out, "m-000002" in out, err) == (expected, True, "")
    assert "\x1b" not in out


@contextlib.contextmanager
def watching(stub: Stub, document: dict[str, Any], *words: str, **environ: str) -> Iterator[Screen]:
    """``top`` on a terminal."""
    stub.reply("status.json", json.dumps(document))
    with Screen(["bigmachine", "top", *words, stub.address], module=True, environ=environ) as found:
        found.until(lambda text: view.HELP in text)
        yield found


def has_left(terminal: Screen) -> bool:
    """Whether the terminal is as it was before."""
    raw = terminal.raw
    switched = raw.count(b"\x1b[?1049h") == raw.count(b"\x1b[?1049l") == 1
    return switched and terminal.mode == terminal.before and raw.rfind(b"\x1b[?25h") > raw.rfind(b"\x1b[?25l")


def test_top_on_a_terminal(stub: Stub) -> None:
    document = a_document(a_machine(1, cpu=5.0), a_machine(2, cpu=95.0, busy=[("PI.sample", 3.0)]))
    document["methods"] = [a_method("PI.sample")]
    with watching(stub, document) as terminal:
        rows = terminal.rows
        assert rows[:2] == ["bigpi.py  s-1a2b3c4d  local  up 2m05s", "2 machines  2 RUNNING  24 calls/s"]
        assert rows[2].split() == list(view.MACHINES)
        assert [row.split()[0] for row in rows[3:5]] == ["m-000001", "m-000002"]
        assert rows[4].endswith("PI.sample 3s")
        assert rows[-2].split() == ["PI.sample", "40", "2.0", "143", "µs", "31.5", "ms", "12.0", "s"]
        terminal.press("c")
        terminal.until(lambda text: text.index("m-000002") < text.index("m-000001"))
        terminal.press("/000001")
        terminal.until(lambda text: "filter: 000001▏" in text and "m-000002" not in text)
        terminal.press("\r")
        terminal.until(lambda text: f"filter: 000001   {view.HELP}" in text)
        stub.replies["status.json"] = lambda handler: stub.released.wait(SOON)  # What is drawn from now on is drawn for that.
        terminal.resize(100, 12)
        terminal.until(lambda text: len(text.splitlines()) == 12 and "m-000001" in text and view.HELP in text)
        terminal.press("q")
        assert terminal.end() == exits.DONE
        assert has_left(terminal)


@pytest.mark.slow
def test_top_shows_what_changes(stub: Stub) -> None:
    with watching(stub, a_document(a_machine(1, "STARTING", step="upload"))) as terminal:
        assert "upload" in terminal.text
        stub.reply("status.json", json.dumps(a_document(a_machine(1, "STOPPED", error="no quota"))))
        terminal.until(lambda text: "no quota" in text and "upload" not in text)
        stub.reply("status.json", "too many ask\n", 503)
        assert terminal.end() == exits.FAILED
        assert terminal.after == "bigmachine: the driver says: too many ask"
        assert has_left(terminal)


@pytest.mark.slow
def test_top_ends_with_the_driver() -> None:
    with stubbed() as stub:
        address = stub.address
        stub.reply("status.json", json.dumps(a_document(a_machine(1))))
        terminal = Screen(["bigmachine", "top", address], module=True, columns=200)
        terminal.until(lambda text: view.HELP in text)
    with terminal:
        assert terminal.end() == exits.GONE
        line = f"bigmachine: the driver at http://{address}{PREFIX}/ has gone: connection refused"
        assert terminal.after == line
        assert has_left(terminal)


@pytest.mark.parametrize("key", ["\x03", "\x04", "Q"])
def test_leaving_top(stub: Stub, key: str) -> None:
    with watching(stub, a_document()) as terminal:
        terminal.press(key)
        assert terminal.end() == exits.DONE
        assert has_left(terminal)


def test_top_is_ended_by_a_signal(stub: Stub) -> None:
    with watching(stub, a_document()) as terminal:
        terminal.process.terminate()
        assert terminal.end() == 128 + 15
        assert terminal.after == "bigmachine: ended by SIGTERM"
        assert has_left(terminal)


def test_top_in_colour_or_not(stub: Stub) -> None:
    green, bad = b"\x1b[32m", a_document(a_machine(1, error="it hurts"))
    with watching(stub, bad) as terminal:
        assert green in terminal.raw
    with watching(stub, bad, NO_COLOR="1") as terminal:
        assert green not in terminal.raw


def test_top_on_a_dumb_terminal_is_printed_once(stub: Stub) -> None:
    stub.reply("status.json", json.dumps(a_document(a_machine(1))))
    with Screen(["bigmachine", "top", stub.address], module=True, environ={"TERM": "dumb"}) as terminal:
        assert terminal.end() == exits.DONE
        assert "m-000001" in terminal.text
        assert b"\x1b" not in terminal.raw


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0s"), (59.9, "59s"), (185, "3m05s"), (7830, "2h10m"), (86399, "23h59m"), (4 * 86400 + 3 * 3600, "4d03h")],
)
def test_times_that_have_passed(value: float, expected: str) -> None:
    assert text.short(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0.0 µs"),
        (0.0000123, "12.3 µs"),
        (0.000143, "143 µs"),
        (0.0012, "1.2 ms"),
        (0.9999, "1.0 s"),
        (31, "31.0 s"),
        (2000, "33m20s"),
    ],
)
def test_times_that_something_takes(value: float, expected: str) -> None:
    assert text.latency(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (999, "999"), (1000, "1.0K"), (34 << 20, "34M"), (3 << 29, "1.5G"), (1023 << 20, "1.0G"), (1 << 42, "4.0T")],
)
def test_large_numbers(value: float, expected: str) -> None:
    assert text.brief(value) == expected


# -- Sessions ------------------------------------------------------------------------------------------------------------


class Talker:
    def say(self, text: str) -> None:
        print(text, flush=True)

    def spin(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sum(range(1000))


@pytest.fixture(params=["test", pytest.param("local", marks=pytest.mark.slow)])
def attached(request: pytest.FixtureRequest) -> Iterator[tuple[Session, str]]:
    """A session with two machines, and its address."""
    with bigmachine.start(TestSystem() if request.param == "test" else "local") as b:
        served = server.start(b, "localhost:0")
        assert served is not None
        b.at_end(served.close)
        for machine in b.start(2, {"Talker": Talker()}):
            machine.call("Talker.spin", 0.0)
        yield b, served.authority


def test_a_session_is_looked_into(attached: tuple[Session, str], capsys: pytest.CaptureFixture[str]) -> None:
    b, address = attached
    one, two = b.machines()
    for machine in (one, two):  # What machines of the system `test` print is this process's own output.
        b.logs.feed(machine.id, lambda: "").line("is here")
    said(capsys)
    for command in (["status"], ["top"]):
        assert main([*command, address]) == exits.DONE
        out, err = said(capsys)
        assert all(word in out for word in (b.name, one.id, two.id, "RUNNING", "Talker.spin"))
        assert err == ""
    for command in (["status", "--json"], ["top", "--json"]):
        assert main([*command, address]) == exits.DONE
        assert [each["id"] for each in json.loads(said(capsys)[0])["machines"]] == [one.id, two.id]
    assert main(["logs", "--machine", one.id, address]) == exits.DONE
    out, err = said(capsys)
    assert out.endswith(f"{one.addr}: bigmachine: is here\n")
    assert two.addr not in out
    assert main(["logs", "-n", "2", "--json", address]) == exits.DONE
    lines = json.loads(said(capsys)[0])["lines"]
    assert [(line["machine"], line["text"]) for line in lines] == [(each.id, "bigmachine: is here") for each in (one, two)]
    assert main(["logs", "--machine", "m-none", address]) == exits.WRONG
    assert said(capsys)[1] == f"bigmachine: no such machine: 'm-none'; there are {one.id}, {two.id}\n"


@pytest.mark.slow
def test_a_session_is_profiled(attached: tuple[Session, str], capsys: pytest.CaptureFixture[str]) -> None:
    b, address = attached
    one, _ = b.machines()
    call = one.submit("Talker.spin", 60.0)
    assert main(["profile", "profile", "--seconds", "0.5", "--text", address]) == exits.DONE
    assert "Talker.spin" in said(capsys)[0]
    assert main(["profile", "threads", "-o", "t.pb.gz", "--machine", "driver", address]) == exits.DONE
    assert said(capsys)[0].endswith("go tool pprof -http=: t.pb.gz\n")
    assert Path("t.pb.gz").stat().st_size > 100
    call.cancel()
    for words, line in {
        "moon": "no such profile: 'moon'; there are profile, heap, ",
        "profile --seconds 0": "seconds of a profile must be a number above 0",
        "profile --seconds 1e9": "seconds of a profile must be a number above 0",
        "heap --machine m-none": "no such machine: 'm-none'",
    }.items():
        assert main(["profile", *words.split(), address]) == exits.WRONG
        out, err = said(capsys)
        assert out == ""
        assert err.startswith(f"bigmachine: {line}")
        assert err.count("\n") == 1


@pytest.mark.slow
def test_a_session_is_reported(attached: tuple[Session, str], capsys: pytest.CaptureFixture[str]) -> None:
    b, address = attached
    assert main(["bundle", "-o", "report.zip", "--json", address]) == exits.DONE
    names = json.loads(said(capsys)[0])["names"]
    assert {"status.txt", "status.json", *(f"logs/{each.id}.log" for each in b.machines())} <= set(names)


@pytest.mark.slow
def test_lines_are_followed_to_the_end_of_a_session() -> None:
    with bigmachine.start("local") as b:
        served = server.start(b, "localhost:0")
        assert served is not None
        b.at_end(served.close)
        (machine,) = b.start(1, {"Talker": Talker()})
        machine.call("Talker.say", "the first")
        command = [*COMMAND, "logs", "-f", served.authority]
        process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with process:
            try:
                assert process.stdout is not None
                while not (line := process.stdout.readline()).endswith("the first\n"):
                    assert line
                machine.call("Talker.say", "the last")
                b.shutdown()
                out, err = process.communicate(timeout=SOON)
            finally:
                process.kill()
    assert f"{machine.addr}: the last\n" in out
    assert (process.returncode, err) == (exits.DONE, "")
