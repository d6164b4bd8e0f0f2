"""The agent, as a process on the loopback interface with real TLS; and a machine that it becomes."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.client
import json
import os
import random
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import AgentLauncher, AgentProcess, MadePart, make_part, pack_bare
from rpc_pair import SOON, until
from test_packed import another_python

from bigmachine import State
from bigmachine.authority import Authority
from bigmachine.bootstrap.agent import PROTOCOL
from bigmachine.bootstrap.requests import ticket
from bigmachine.bootstrap.store import UNUSED
from bigmachine.cache import Cache
from bigmachine.credentials import Credentials, Role, client_context, server_context
from bigmachine.errors import BootError
from bigmachine.info import platform_name, python_version
from bigmachine.pack.archive import read_contents
from bigmachine.systems.remote import AgentUnreachable, RemoteHostError, Trust
from bigmachine.systems.remote.client import AgentClient, AgentInfo, Peer
from bigmachine.systems.remote.source import LOADER, agent_source, agent_text
from bigmachine.testing import conformance
from bigmachine.testing.conformance import Cluster

TRUST = Trust()

USER_DATA = 16 * 1024
"""Bytes that EC2 takes."""

NOISE = random.Random(1).randbytes(3_000_000)
"""What does not compress."""


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    with AgentProcess(TRUST, tmp_path / "host") as agent:
        yield agent


@pytest.fixture
def part(tmp_path: Path) -> MadePart:
    return make_part(tmp_path / "parts", {"package/module.py": b"x = 1\n", "package/data": NOISE})


def tls(agent: AgentProcess, context: ssl.SSLContext | None = None) -> ssl.SSLSocket:
    """A connection as the driver's, for what `AgentClient` would not do."""
    sock = socket.create_connection(("127.0.0.1", agent.port), SOON)
    return (context or TRUST.context).wrap_socket(sock, server_hostname=f"agent.{agent.id}.bigmachine")


def ask(sock: ssl.SSLSocket, text: str, body: bytes = b"") -> tuple[int, Any]:
    """The answer to a request: its status, and its body."""
    sock.sendall(f"{text}\r\n".encode() + (f"Content-Length: {len(body)}\r\n\r\n".encode() if body else b"\r\n") + body)
    return answer(sock)


def answer(sock: ssl.SSLSocket) -> tuple[int, Any]:
    response = http.client.HTTPResponse(sock)
    response.begin()
    data = response.read()
    return response.status, json.loads(data) if data else None


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def held(agent: AgentProcess, part: MadePart) -> bool:
    """Whether the part is there, whole."""
    tree = agent.cache / "parts" / part.digest / "tree"
    return tree.is_dir() and files(tree) == {"package/module.py": b"x = 1\n", "package/data": NOISE}


def refuses(agent: AgentProcess, request: str = "GET /info HTTP/1.1", context: ssl.SSLContext | None = None) -> int:
    """The status with which it refuses; 0 where it hangs up."""
    try:
        with tls(agent, context) as sock:
            return ask(sock, request)[0]
    except (OSError, http.client.HTTPException):
        return 0


# -- What it says --------------------------------------------------------------------------------------------------------


def test_info(agent: AgentProcess) -> None:
    info = agent.client().info()
    assert (info.id, info.platform, info.protocol) == ("agent.m-1.bigmachine", platform_name(), PROTOCOL)
    assert info.hostname == socket.gethostname()
    assert info.cpus == len(os.sched_getaffinity(0))
    assert info.free > 0
    assert info.parts == frozenset()
    assert (python_version(), sys.executable) in info.pythons
    assert info.secret not in repr(info)
    found = {os.path.realpath(path) for _, path in info.pythons}
    assert len(found) == len(info.pythons)


def test_info_of_one_version_looks_for_no_more(agent: AgentProcess) -> None:
    info = agent.client().info(python=python_version())
    assert info.pythons == ((python_version(), sys.executable),)
    assert len(agent.client().info(python="3.1").pythons) >= 1


def test_an_unknown_request(agent: AgentProcess) -> None:
    for request, status in (
        ("GET /", 404),
        ("GET /parts/../../etc/passwd", 404),
        ("PUT /info", 404),
        ("BREW /info", 501),
    ):
        assert refuses(agent, f"{request} HTTP/1.1") == status


@pytest.mark.parametrize("body", [b"{", b"[]", b"{}", b'{"digest": 1, "size": 1, "from": 1}'])
def test_a_request_that_is_none(agent: AgentProcess, body: bytes) -> None:
    for verb in ("fetch", "exec"):
        with tls(agent) as sock:
            status, reply = ask(sock, f"POST /{verb} HTTP/1.1", body)
            assert status == 400, reply
    assert agent.client().info()


def test_the_text_fits_into_user_data() -> None:
    """As it goes to a standard input, one line of ASCII; and compressed as cloud-init takes it."""
    settings = {"bind": "0.0.0.0", "port": 49152, "idle": 600.0, "on_exit": ["systemctl", "poweroff"]}
    line = agent_source(TRUST.agent("m-0123456789"), settings)
    assert line.isascii()
    assert line.count(b"\n") == 1
    assert len(line) < USER_DATA
    text = agent_text(TRUST.agent("m-0123456789"), settings)
    assert len(gzip.compress(text.encode(), 9)) < 13 * 1024
    compile(text, "agent", "exec")


@pytest.mark.parametrize("how", ["loader", "stdin", "file"])
def test_ways_to_start_it(tmp_path: Path, how: str) -> None:
    source = agent_source(TRUST.agent("m-1"), {"bind": "127.0.0.1", "cache": str(tmp_path / "host")})
    (tmp_path / "agent.py").write_bytes(source)
    words = {"loader": ["-c", LOADER], "stdin": ["-"], "file": [str(tmp_path / "agent.py")]}[how]
    with subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if how != "file":
            process.stdin.write(source)
            process.stdin.flush()
        if how == "stdin":
            process.stdin.close()
        port = json.loads(process.stdout.readline())["port"]
        client = AgentClient("127.0.0.1", port, "m-1", TRUST.context)
        assert client.info().id
        client.shutdown()
        assert process.wait(SOON) == 0


def test_nothing_secret_can_be_seen(agent: AgentProcess) -> None:
    for name in ("cmdline", "environ"):
        assert b"PRIVATE KEY" not in Path(f"/proc/{agent.process.pid}/{name}").read_bytes()
    assert not [path for path in agent.cache.rglob("*") if path.is_file() and b"PRIVATE" in path.read_bytes()]


@pytest.mark.parametrize("minor", [9, 10, 12, 13, 14])
def test_a_python_of_another_version_runs_it(tmp_path: Path, part: MadePart, minor: int) -> None:
    python = another_python(minor)
    if python is None:
        pytest.skip(f"no other Python 3.{minor} on this host")
    with AgentProcess(TRUST, tmp_path / "host", python=python) as agent:
        client = agent.client()
        assert f"3.{minor}" in {version for version, _ in client.info().pythons}
        client.put_part(*part[:3])
        assert held(agent, part)
        client.shutdown()
        assert agent.wait() == 0
        assert agent.stderr() == "bigmachine agent: ended: the driver said so\n"


def test_it_says_why_it_does_not_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AssertionError, match=rf"cannot listen at port {port} of 127\.0\.0\.1: .*in use"):
            AgentProcess(TRUST, tmp_path / "host", port=port)
    (tmp_path / "file").write_text("")
    with pytest.raises(AssertionError, match=r"bigmachine agent: .*Error: "):
        AgentProcess(TRUST, tmp_path / "file")


# -- Parts ---------------------------------------------------------------------------------------------------------------


def test_a_part_is_unpacked_and_kept(agent: AgentProcess, part: MadePart) -> None:
    client = agent.client()
    assert client.put_part(*part[:3]) == part.packed
    assert held(agent, part)
    assert client.info().parts == {part.digest}
    assert (agent.cache / "parts" / part.digest / "z").read_bytes() == part.path.read_bytes()
    assert client.put_part(*part[:3]) == part.packed  # Sent again: nothing changes.
    until(lambda: not agent.work())


def test_unpacking_overlaps_the_transfer(agent: AgentProcess, part: MadePart) -> None:
    data = part.path.read_bytes()
    with tls(agent) as sock:
        head = f"PUT /parts/{part.digest}?size={part.size} HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n"
        sock.sendall(head.encode() + data[: len(data) // 2])
        until(lambda: any(path.stat().st_size > 1_000_000 for path in agent.cache.glob("work/*/*/*/package/data")))
        assert not (agent.cache / "parts" / part.digest).exists()
        sock.sendall(data[len(data) // 2 :])
        assert answer(sock)[0] == 201
    assert held(agent, part)


def test_a_chunked_body(agent: AgentProcess, part: MadePart) -> None:
    data = part.path.read_bytes()
    with tls(agent) as sock:
        sock.sendall(
            f"PUT /parts/{part.digest}?size={part.size} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        for at in range(0, len(data), 1_000_000):
            piece = data[at : at + 1_000_000]
            sock.sendall(b"%x\r\n%b\r\n" % (len(piece), piece))
        sock.sendall(b"0\r\n\r\n")
        assert answer(sock)[0] == 201
    assert held(agent, part)


def damaged(part: MadePart, how: str) -> bytes:
    tar = zlib.decompress(part.path.read_bytes())
    if how == "another content":
        return zlib.compress(tar[:1000] + b"?" + tar[1001:])
    if how == "another tar":
        return zlib.compress(bytes(10240))
    if how == "no zlib":
        return b"x" * 1000
    if how == "cut short":
        return part.path.read_bytes()[:-1000]
    if how == "longer than announced":
        return zlib.compress(tar + bytes(512))
    assert how == "followed by bytes"
    return part.path.read_bytes() + b"x"


@pytest.mark.parametrize(
    "how", ["another content", "another tar", "no zlib", "cut short", "longer than announced", "followed by bytes"]
)
def test_a_part_that_is_not_what_it_should_be(agent: AgentProcess, part: MadePart, how: str) -> None:
    client = agent.client()
    bad = part.path.with_name("bad")
    bad.write_bytes(damaged(part, how))
    with pytest.raises(RemoteHostError, match=f"^127.0.0.1: part {part.digest} is not usable: .*; fetch it again$"):
        client.put_part(part.digest, part.size, bad)
    assert client.info().parts == frozenset()
    until(lambda: not agent.work())
    client.put_part(*part[:3])
    assert held(agent, part)


class Cutter:
    """Cuts the client's connection after it was given `after` bytes, once."""

    def __init__(self, agent: AgentProcess, after: int) -> None:
        self.left = after
        self.sent = 0
        self.cuts = 0
        self.port = agent.port
        self.sock: socket.socket | None = None

    def connect(self, timeout: float) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout)
        if not self.cuts:
            self.sock = socket.socket(fileno=os.dup(sock.fileno()))
        return sock

    def progress(self, sent: int) -> None:
        self.sent += sent
        if 0 < self.left <= self.sent:
            assert self.sock is not None
            self.sock.shutdown(socket.SHUT_RDWR)
            self.sock.close()
            self.left = 0
            self.cuts += 1


def test_a_broken_connection_is_resumed(agent: AgentProcess, part: MadePart) -> None:
    cutter = Cutter(agent, 1_500_000)
    client = agent.client(connect=cutter.connect)
    sent = client.put_part(*part[:3], cutter.progress)
    assert held(agent, part)
    assert cutter.cuts == 1
    assert sent == cutter.sent
    assert part.packed <= sent < 1.5 * part.packed, "it was begun again"


def test_how_far_it_has_got(agent: AgentProcess, part: MadePart) -> None:
    data = part.path.read_bytes()
    head = f"PUT /parts/{part.digest}?size={part.size} HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    offset = -1
    with tls(agent) as sock:
        sock.sendall(head + data[:100_000])
    client = agent.client()

    def arrived() -> bool:
        nonlocal offset
        offset = client._offset(part.digest) or 0
        return offset == 100_000

    until(arrived)
    for start in (99_999, 100_001):
        with tls(agent) as sock:
            request = f"PUT /parts/{part.digest}?size={part.size} HTTP/1.1\r\nUpload-Offset: {start}"
            status, reply = ask(sock, request, data[start : start + 1000])
            assert (status, reply["offset"]) == (409, 100_000)
    with tls(agent) as sock:
        request = f"PUT /parts/{part.digest}?size={part.size} HTTP/1.1\r\nUpload-Offset: 100000"
        assert ask(sock, request, data[100_000:])[0] == 201
    assert held(agent, part)
    assert client._offset(part.digest) is None


def test_a_dead_connection_is_taken_over(tmp_path: Path, part: MadePart) -> None:
    """One from which nothing comes any more, though nobody has closed it."""
    data = part.path.read_bytes()
    head = f"PUT /parts/{part.digest}?size={part.size} HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    constants = {"TAKE_OVER": 0.3}
    with AgentProcess(TRUST, tmp_path / "host", constants=constants) as agent, tls(agent) as sock:
        sock.sendall(head + data[:100_000])
        client = agent.client()
        until(lambda: client._offset(part.digest) == 100_000)
        assert client.put_part(*part[:3]) >= part.packed - 100_000
        assert held(agent, part)


def test_two_uploads_at_once(agent: AgentProcess, part: MadePart) -> None:
    threads = [threading.Thread(target=agent.client().put_part, args=part[:3]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    assert held(agent, part)
    until(lambda: not agent.work())


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def test_a_full_disk(tmp_path: Path, part: MadePart) -> None:
    """As far as the agent can tell: no file may become larger."""
    with AgentProcess(TRUST, tmp_path / "host", limits=small_files) as agent:
        client = agent.client()
        with pytest.raises(RemoteHostError, match=f"^127.0.0.1: no space left on {socket.gethostname()}: ") as caught:
            client.put_part(*part[:3])
        assert "\n" not in str(caught.value)
        with pytest.raises(RemoteHostError, match="no space left"):
            client.put_part(*part[:3])
        with tls(agent) as sock:
            request = f"PUT /parts/{part.digest}?size={part.size} HTTP/1.1"
            assert ask(sock, request, part.path.read_bytes())[0] == 507
        until(lambda: not agent.work())
        assert client.info().parts == frozenset()


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, part: MadePart) -> None:
    """A temporary directory takes its place, and is gone afterwards."""
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    environ = {"XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "tmp")}
    with AgentProcess(TRUST, None, environ=environ) as agent:
        agent.client().put_part(*part[:3])
        (temporary,) = (tmp_path / "tmp").iterdir()
        assert (temporary / "parts" / part.digest / "tree").is_dir()
        agent.process.terminate()
        assert agent.wait() == 0
    assert not list((tmp_path / "tmp").iterdir())


def test_what_was_not_used_for_long_is_removed(tmp_path: Path, part: MadePart) -> None:
    cache = tmp_path / "host"
    other = make_part(tmp_path / "parts", {"y": b"y"})
    with AgentProcess(TRUST, cache) as agent:
        agent.client().put_part(*part[:3])
        agent.client().put_part(*other[:3])
        agent.process.kill()
        agent.wait()
    left = next((cache / "work").iterdir())
    before = time.time() - UNUSED - 100
    for path in (cache / "parts" / part.digest, left):
        os.utime(path, (before, before))
    with AgentProcess(TRUST, cache) as agent:
        until(lambda: not (cache / "parts" / part.digest).exists())
        until(lambda: not left.exists())
        assert agent.client().info().parts == {other.digest}


# -- Whom it obeys -------------------------------------------------------------------------------------------------------


def context_of(credentials: Credentials) -> ssl.SSLContext:
    context = client_context(credentials)
    context.load_verify_locations(cadata=TRUST.agent("m-9").ca.decode())
    return context


def test_who_is_refused(agent: AgentProcess, part: MadePart) -> None:
    authority = TRUST._authority
    foreign = Authority("s-other")
    anonymous = ssl.create_default_context(cadata=authority.ca.decode())
    assert refuses(agent, context=anonymous) == 403
    assert refuses(agent, context=context_of(authority.issue(Role.MACHINE, "m-2"))) == 403
    assert refuses(agent, context=context_of(authority.issue(Role.AGENT, "m-1"))) == 0
    assert refuses(agent, context=context_of(foreign.issue(Role.DRIVER, "driver"))) == 0
    assert refuses(agent) == 200
    for request in (
        "PUT /parts/" + part.digest,
        "GET /parts/" + part.digest,
        "POST /exec",
        "POST /shutdown",
    ):
        assert refuses(agent, f"{request} HTTP/1.1", anonymous) == 403
    assert agent.process.poll() is None


def test_older_tls_is_refused(agent: AgentProcess) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname = False
    old.verify_mode = ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    assert refuses(agent, context=old) == 0


def test_the_driver_refuses_another_agent(agent: AgentProcess) -> None:
    client = AgentClient("127.0.0.1", agent.port, "m-2", TRUST.context)
    with pytest.raises(AgentUnreachable, match=f"^the agent at 127.0.0.1:{agent.port} is unreachable: not its agent answers"):
        client.info()


def test_nobody_is_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(AgentUnreachable, match="refused"):
        AgentClient("127.0.0.1", port, "m-1", TRUST.context).info()


def test_who_is_rude_keeps_nobody_waiting(agent: AgentProcess) -> None:
    """Garbage, half a ClientHello, nothing at all, half a request without a certificate."""
    anonymous = ssl.create_default_context(cadata=TRUST._authority.ca.decode())
    rude = [socket.create_connection(("127.0.0.1", agent.port), SOON) for _ in range(30)]
    for number, sock in enumerate(rude):
        sock.sendall([b"", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00\x01\x00"][number % 3])
    slow = [tls(agent, anonymous) for _ in range(10)]
    for tls_sock in slow:
        tls_sock.sendall(b"GET /info HTTP/1.1\r\nX: ")
    started = time.monotonic()
    assert agent.client().info(python=python_version())
    assert time.monotonic() - started < 5.0
    for sock in (*rude, *slow):
        sock.close()
    assert agent.client().info(python=python_version())
    assert "Traceback" not in agent.stderr()


@pytest.mark.slow
def test_who_proves_nothing_is_cut_off(tmp_path: Path) -> None:
    """Also one who sends a byte now and then."""
    with AgentProcess(TRUST, tmp_path / "host", constants={"PROVE_WITHIN": 0.5}) as agent:
        cut_off(agent)


def cut_off(agent: AgentProcess) -> None:
    anonymous = ssl.create_default_context(cadata=TRUST._authority.ca.decode())
    silent = socket.create_connection(("127.0.0.1", agent.port), 20.0)
    dribbling = tls(agent, anonymous)
    dribbling.sendall(b"GET /info HTTP/1.1\r\n")
    over = threading.Event()

    def dribble() -> None:
        try:
            while not over.wait(0.05):
                dribbling.sendall(b"X")
        except OSError:
            pass

    thread = threading.Thread(target=dribble)
    thread.start()
    with silent:
        assert silent.recv(1) == b""
    dribbling.settimeout(20.0)
    try:
        assert dribbling.recv(1) == b""
    except OSError:
        pass  # Or cut without a word.
    over.set()
    thread.join()
    dribbling.close()


# -- From each other -----------------------------------------------------------------------------------------------------


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[AgentProcess]:
    with AgentProcess(TRUST, tmp_path / "peer", "m-2") as agent:
        yield agent


def peer_of(agent: AgentProcess, info: AgentInfo, digest: str, **changes: Any) -> Peer:
    right = Peer("127.0.0.1", agent.port, f"agent.{agent.id}.bigmachine", ticket(info.secret, digest))
    return dataclasses.replace(right, **changes)


def test_a_part_from_another_agent(agent: AgentProcess, peer: AgentProcess, part: MadePart) -> None:
    source, client = agent.client(), peer.client()
    source.put_part(*part[:3])
    nobody = Peer("127.0.0.1", 1, "agent.m-3.bigmachine", "")
    client.fetch(part.digest, part.size, [nobody, peer_of(agent, source.info(), part.digest)])
    assert held(peer, part)
    assert client.info().parts == {part.digest}
    client.fetch(part.digest, part.size, [])  # It is there.


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ticket": "0" * 64}, "only the session's driver may do that"),
        ({"ticket": ""}, "only the session's driver may do that"),
        ({"name": "agent.m-3.bigmachine"}, "certificate verify failed"),
    ],
)
def test_a_peer_that_does_not_give_it(
    agent: AgentProcess, peer: AgentProcess, part: MadePart, changes: dict[str, str], reason: str
) -> None:
    source, client = agent.client(), peer.client()
    source.put_part(*part[:3])
    wrong = peer_of(agent, source.info(), part.digest, **changes)
    with pytest.raises(RemoteHostError, match=f"no peer gave it: 127.0.0.1:{agent.port}: .*{reason}"):
        client.fetch(part.digest, part.size, [wrong])
    with pytest.raises(RemoteHostError, match="no such part"):
        client.fetch("0" * 64, 1, [peer_of(agent, source.info(), "0" * 64)])
    until(lambda: not peer.work())
    client.put_part(*part[:3])
    assert held(peer, part)


def test_a_ticket_is_for_one_part(agent: AgentProcess, part: MadePart) -> None:
    client = agent.client()
    client.put_part(*part[:3])
    secret = client.info().secret
    anonymous = ssl.create_default_context(cadata=TRUST._authority.ca.decode())
    for digest, status in ((part.digest, 200), ("0" * 64, 403)):
        request = (
            f"GET /parts/{part.digest} HTTP/1.1\r\nTicket: {ticket(secret, digest)}\r\nUpload-Offset: {part.packed}"
        )
        assert refuses(agent, request, anonymous) == status


def test_another_peer_goes_on_where_one_broke_off(peer: AgentProcess, agent: AgentProcess, part: MadePart) -> None:
    """The first gives half of it and hangs up."""
    data = part.path.read_bytes()
    offsets = []
    context = server_context(TRUST.agent("m-3"))
    context.verify_mode = ssl.CERT_OPTIONAL

    def serve() -> None:
        sock, _ = server.accept()
        with context.wrap_socket(sock, server_side=True) as connection:
            request = connection.recv(65536).decode()
            offsets.append(request.partition("Upload-Offset: ")[2].split("\r\n")[0])
            connection.sendall(
                f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data[: len(data) // 2]
            )

    source, client = agent.client(), peer.client()
    source.put_part(*part[:3])
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        half = Peer("127.0.0.1", server.getsockname()[1], "agent.m-3.bigmachine", "")
        client.fetch(part.digest, part.size, [half, peer_of(agent, source.info(), part.digest)])
        thread.join(SOON)
    assert offsets == ["0"]
    assert held(peer, part)


# -- The end -------------------------------------------------------------------------------------------------------------


def test_no_driver_comes(tmp_path: Path) -> None:
    with AgentProcess(TRUST, tmp_path / "host", idle=0.2) as agent:
        assert agent.wait() == 0
        assert agent.stderr() == "bigmachine agent: ended: no driver within 0.2 s\n"
        assert not list((tmp_path / "host" / "work").iterdir())


def test_who_is_no_driver_does_not_keep_it_alive(tmp_path: Path) -> None:
    anonymous = ssl.create_default_context(cadata=TRUST._authority.ca.decode())
    with AgentProcess(TRUST, tmp_path / "host", idle=0.5) as agent:
        deadline = time.monotonic() + SOON
        while agent.process.poll() is None:
            assert time.monotonic() < deadline
            refuses(agent, context=anonymous)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it(agent: AgentProcess, part: MadePart, number: signal.Signals) -> None:
    data = part.path.read_bytes()
    with tls(agent) as sock:
        head = f"PUT /parts/{part.digest}?size={part.size} HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n"
        sock.sendall(head.encode() + data[:100_000])
        until(agent.work)
        agent.process.send_signal(number)
        assert agent.wait() == 0
    assert f"signal {int(number)}" in agent.stderr()
    assert not list((agent.cache / "work").iterdir())


def test_the_driver_ends_it_and_what_is_executed_then(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with AgentProcess(TRUST, tmp_path / "host", on_exit=["touch", str(mark)]) as agent:
        agent.client().shutdown()
        assert agent.wait() == 0
        assert mark.exists()


def test_a_driver_that_is_killed_in_the_middle_of_an_upload(tmp_path: Path, part: MadePart) -> None:
    with AgentProcess(TRUST, tmp_path / "host", idle=0.5) as agent:
        pid = os.fork()
        if not pid:
            try:
                data = part.path.read_bytes()
                sock = tls(agent)
                head = f"PUT /parts/{part.digest}?size={part.size} HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n"
                sock.sendall(head.encode() + data[:1_000_000])
                os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        assert agent.wait() == 0
        assert "no driver within 0.5 s" in agent.stderr()
        assert not list((agent.cache / "work").iterdir())
        assert not list((agent.cache / "parts").iterdir())


# -- The machine ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The packed toolkit."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "packed"
    folder.mkdir(exist_ok=True)
    return pack_bare(folder)


@pytest.fixture
def packed(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The packed toolkit, as the program of the tests' sessions."""
    program = dataclasses.replace(conformance.bare_program(), digest=read_contents(file).digest, file=file)
    monkeypatch.setattr(conformance, "bare_program", lambda: program)
    return file


@pytest.fixture
def launcher(packed: Path, tmp_path: Path) -> AgentLauncher:
    return AgentLauncher([tmp_path / "host"], packed, cache=Cache(tmp_path / "cache"))


@pytest.mark.slow
def test_it_becomes_a_machine(launcher: AgentLauncher, tmp_path: Path) -> None:
    cluster = Cluster(launcher)
    with cluster.session:
        (machine,) = cluster.start(environ={"GREETING": "x"})
        machine.wait(State.RUNNING, 20.0)
        (agent,) = launcher.agents.values()
        assert machine.info().pid == agent.process.pid
        assert machine.maxprocs == 2
        assert machine.call("Probe.hello", "you", mark="!") == "hello you!"
        assert machine.call("Probe.address") == machine.addr
        pids = [agent.process.pid, *machine.call("Supervisor.pids").values()]
        for pid in pids:
            for name in ("cmdline", "environ"):
                assert b"PRIVATE KEY" not in Path(f"/proc/{pid}/{name}").read_bytes()
        fds = {os.readlink(path) for path in Path(f"/proc/{pids[1]}/fd").iterdir()}
        assert not [link for link in fds if link.endswith("/lock")]
        assert not list((tmp_path / "host" / "work").iterdir())
    assert agent.process.returncode == 0
    assert "PRIVATE" not in agent.stderr()
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


@pytest.mark.slow
def test_a_second_machine_is_sent_what_is_missing(launcher: AgentLauncher) -> None:
    cluster = Cluster(launcher)
    with cluster.session:
        for sent in (True, False):
            (machine,) = cluster.start()
            machine.wait(State.RUNNING, 20.0)
            assert bool(launcher.deliveries[-1].sent) == sent
            assert machine.call("Probe.echo", 1) == 1


@pytest.mark.slow
def test_its_cache_is_in_use_while_a_machine_runs(launcher: AgentLauncher, tmp_path: Path) -> None:
    cluster = Cluster(launcher)
    host = tmp_path / "host"
    before = time.time() - UNUSED - 100
    with cluster.session:
        (machine,) = cluster.start()
        machine.wait(State.RUNNING, 20.0)
        for path in [*(host / "parts").iterdir(), *(host / "images").iterdir()]:
            os.utime(path, (before, before))
        with AgentProcess(TRUST, host):
            until(lambda: not list((host / "parts").iterdir()))
        assert len(list((host / "images").iterdir())) == 2
        assert machine.call("Probe.echo", 1) == 1
    with AgentProcess(TRUST, host):
        until(lambda: not list((host / "images").iterdir()))


@pytest.mark.slow
def test_a_killed_driver_leaves_no_machine(packed: Path, tmp_path: Path) -> None:
    """The lease ends it: nothing else tells."""
    launcher = AgentLauncher([tmp_path / "host"], packed, cache=Cache(tmp_path / "cache"))
    cluster = Cluster(launcher, lease=2.0)
    with cluster.session:
        (machine,) = cluster.start()
        machine.wait(State.RUNNING, 20.0)
        pids = machine.call("Supervisor.pids").values()
        (agent,) = launcher.agents.values()
        cluster.session._owned[0]._keepalive.stop()
        assert agent.process.wait(SOON) == 0
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


@pytest.mark.slow
def test_a_signal_ends_a_machine(launcher: AgentLauncher) -> None:
    cluster = Cluster(launcher)
    with cluster.session:
        (machine,) = cluster.start()
        machine.wait(State.RUNNING, 20.0)
        pids = machine.call("Supervisor.pids").values()
        (agent,) = launcher.agents.values()
        agent.process.terminate()
        assert agent.process.wait(SOON) == 0
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
        until(lambda: "the driver has ended" in launcher.console(machine.id))


@pytest.mark.slow
def test_what_is_executed_when_the_machine_has_ended(packed: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    launcher = AgentLauncher([tmp_path / "host"], packed, cache=Cache(tmp_path / "cache"), on_exit=["touch", str(mark)])
    cluster = Cluster(launcher)
    with cluster.session:
        (machine,) = cluster.start()
        machine.wait(State.RUNNING, 20.0)
        assert not mark.exists()
    assert mark.exists()


@pytest.mark.slow
def test_an_agent_of_an_older_python_finds_the_right_one(packed: Path, tmp_path: Path) -> None:
    python = another_python(9)
    if python is None:
        pytest.skip("no Python 3.9 on this host")
    launcher = AgentLauncher([tmp_path / "host"], packed, cache=Cache(tmp_path / "cache"), python=python)
    cluster = Cluster(launcher)
    with cluster.session:
        (machine,) = cluster.start()
        machine.wait(State.RUNNING, 20.0)
        assert machine.info().python == python_version()


def request_for(agent: AgentProcess, **changes: Any) -> dict[str, Any]:
    request = {
        "machine": "m-1",
        "credentials": {},
        "address": "https://localhost:1/m-1/",
        "lease": 1.0,
        "maxprocs": 0,
        "python": python_version(),
        "parts": [],
        "code": "0" * 64,
        "program": {},
        "args": [],
        "environ": {},
        "supervisor": [],
        "worker": [],
    }
    return {**request, **changes}


def test_no_such_python(agent: AgentProcess) -> None:
    client = agent.client()
    with pytest.raises(RemoteHostError) as caught:
        client.execute(request_for(agent, python="3.4"))
    assert f"no Python 3.4 on {socket.gethostname()}; there are " in str(caught.value)
    assert f"{python_version()} ({sys.executable})" in str(caught.value)
    assert client.info()


def test_parts_that_are_missing(agent: AgentProcess) -> None:
    with tls(agent) as sock:
        status, reply = ask(sock, "POST /exec HTTP/1.1", json.dumps(request_for(agent)).encode())
        assert (status, reply["missing"]) == (409, ["0" * 64])


def test_what_cannot_be_executed(agent: AgentProcess, tmp_path: Path) -> None:
    code = make_part(tmp_path / "parts", {"main.py": b""})
    client = agent.client()
    client.put_part(*code[:3])
    with pytest.raises(RemoteHostError, match=r"with a NUL: 'a.x00'"):
        client.execute(request_for(agent, code=code.digest, args=["a\0"]))
    assert client.execute(request_for(agent, code=code.digest, args=["x" * 1_000_000])) > 0
    assert agent.wait() == 1
    assert "Argument list too long" in agent.stderr()


def test_a_boot_that_fails_says_why(packed: Path, tmp_path: Path) -> None:
    launcher = AgentLauncher([tmp_path / "host"], packed, cache=Cache(tmp_path / "cache"), limits=small_files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigmachine.systems.remote.deliver.LEVEL", 0)
        cluster = Cluster(launcher)
        with cluster.session:
            (machine,) = cluster.start()
            with pytest.raises(BootError, match="no space left on"):
                machine.wait(State.RUNNING, 20.0)


def test_the_digest_is_the_tars(part: MadePart) -> None:
    assert hashlib.sha256(zlib.decompress(part.path.read_bytes())).hexdigest() == part.digest
