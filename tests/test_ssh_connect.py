"""Connections to real hosts by SSH: the ways that work, and what each of the others says."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts.network import USER, Network, make_key, unavailable
from paramiko import Transport

from bigmachine.systems.remote import RemoteHostError
from bigmachine.systems.ssh.config import Config
from bigmachine.systems.ssh.connect import connect
from bigmachine.systems.ssh.connections import Connections
from bigmachine.systems.ssh.tunnel import Tunnel

if unavailable():
    pytest.skip(unavailable(), allow_module_level=True)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network() as network:
        network.host("ada")
        network.host("grace", port=2222)
        yield network


@pytest.fixture(autouse=True)
def no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)


def run(transport: Transport, command: str) -> str:
    with contextlib.closing(transport.open_session()) as channel:
        channel.exec_command(command)
        return channel.makefile().read().decode().strip()


def reach(file: Path, spec: str, within: float = 10.0) -> str:
    """Who one is there, and where."""
    transport = connect(Config(str(file)).target(spec), within)
    try:
        return run(transport, "echo $(id -un)@$(hostname)")
    finally:
        transport.close()


def refusal(file: Path, spec: str, within: float = 10.0) -> str:
    with pytest.raises(RemoteHostError) as caught:
        reach(file, spec, within)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{spec.rpartition('@')[2].partition(':')[0]}: ")
    return text


def lock(key: Path) -> None:
    """Give it a passphrase."""
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", key], check=True, capture_output=True)


@contextlib.contextmanager
def ssh_agent(monkeypatch: pytest.MonkeyPatch, folder: Path, *keys: Path) -> Iterator[None]:
    file = folder / "agent"
    with subprocess.Popen(["ssh-agent", "-D", "-a", file], stdout=subprocess.DEVNULL) as process:
        try:
            monkeypatch.setenv("SSH_AUTH_SOCK", str(file))
            for key in keys:
                while subprocess.run(["ssh-add", "-q", key], capture_output=True).returncode == 2:
                    pass  # It does not listen yet.
            yield
        finally:
            process.terminate()


# -- Ways that work ------------------------------------------------------------------------------------------------------


def test_hosts_by_name(network: Network, tmp_path: Path) -> None:
    config = network.config(tmp_path / "config")
    assert reach(config, "ada") == f"{USER}@ada"
    assert reach(config, "grace") == f"{USER}@grace"
    assert reach(config, "root@ada") == "root@ada"


def test_a_port_that_is_given_goes_before_the_configured_one(network: Network, tmp_path: Path) -> None:
    config = network.config(tmp_path / "config")
    grace = network.hosts["grace"]
    config.write_text(config.read_text().replace("Port 2222", "Port 22"))
    assert "nothing listens" in refusal(config, "grace")
    assert reach(config, "grace:2222") == f"{USER}@grace"
    assert reach(config, f"{USER}@{grace.name}:2222") == f"{USER}@grace"


def test_through_another_host(network: Network, tmp_path: Path) -> None:
    config = network.config(tmp_path / "config")
    config.write_text(config.read_text().replace("Host grace\n", "Host grace\n    ProxyJump ada\n"))
    network.hosts["grace"].run("iptables", "-I", "INPUT", "-s", network.gateway, "-j", "DROP")
    try:
        before = set(threading.enumerate())
        assert reach(config, "grace") == f"{USER}@grace"
        for thread in set(threading.enumerate()) - before:
            thread.join(10.0)
            assert not thread.is_alive()
        config.write_text(config.read_text().replace("Port 2222", "Port 2223"))
        assert "the host before it (ProxyJump) cannot connect to" in refusal(config, "grace")
    finally:
        network.hosts["grace"].run("iptables", "-F", "INPUT")


def test_known_by_its_hash(network: Network, tmp_path: Path) -> None:
    config = network.config(tmp_path / "config")
    subprocess.run(["ssh-keygen", "-H", "-f", tmp_path / "known_hosts"], check=True, capture_output=True)
    assert "10.213" not in (tmp_path / "known_hosts").read_text()
    assert reach(config, "grace") == f"{USER}@grace"


def test_keys_of_ssh_agent(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is the last of many, more than sshd lets one try; and one that has a passphrase in the file."""
    config = network.config(tmp_path / "config", IdentityFile=str(tmp_path / "mine"))
    shutil.copy(network.identity, tmp_path / "mine")
    shutil.copy(network.identity.with_suffix(".pub"), tmp_path / "mine.pub")
    others = [tmp_path / f"other{n}" for n in range(7)]
    for other in others:
        make_key(other)
    with ssh_agent(monkeypatch, tmp_path, *others, tmp_path / "mine"):
        lock(tmp_path / "mine")
        assert reach(config, "ada") == f"{USER}@ada"
        (tmp_path / "mine").unlink()
        assert reach(config, "ada") == f"{USER}@ada"
        (tmp_path / "mine.pub").unlink()
        text = refusal(config, "ada")
        assert "then it hung up: name the right one (IdentityFile) with IdentitiesOnly yes" in text


@pytest.mark.parametrize(("kind", "bits"), [("rsa", "2048"), ("ecdsa", "256")])
def test_other_kinds_of_keys(network: Network, tmp_path: Path, kind: str, bits: str) -> None:
    make_key(tmp_path / "key", "-t", kind, "-b", bits)
    public = (tmp_path / "key.pub").read_text()
    network.hosts["ada"].run("sh", "-c", f"echo '{public}' >> /root/.ssh/authorized_keys")
    config = network.config(tmp_path / "config", "root", IdentityFile=str(tmp_path / "key"))
    assert reach(config, "ada") == "root@ada"


def test_a_silent_agent_does_not_matter(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "nothing"))
    assert reach(network.config(tmp_path / "config"), "ada") == f"{USER}@ada"


# -- Ways that do not ----------------------------------------------------------------------------------------------------


def test_a_name_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("")
    text = refusal(tmp_path / "config", "no-such-host.invalid")
    assert "no such host name: no-such-host.invalid" in text
    assert "HostName" in text


@pytest.mark.slow
def test_a_host_that_is_down(network: Network, tmp_path: Path) -> None:
    config = network.config(tmp_path / "config")
    config.write_text(config.read_text().replace(network.hosts["ada"].address, str(network.subnet[200])))
    text = refusal(config, "ada", 5.0)
    assert f"{network.subnet[200]}:22" in text
    assert f"`ssh {USER}@ada` must work" in text


def test_a_host_that_says_nothing(network: Network, tmp_path: Path) -> None:
    network.hosts["ada"].run("iptables", "-I", "INPUT", "-p", "tcp", "--syn", "-j", "DROP")
    try:
        text = refusal(network.config(tmp_path / "config"), "ada", 0.5)
    finally:
        network.hosts["ada"].run("iptables", "-F", "INPUT")
    assert f"no answer from {network.hosts['ada'].address}:22 in time: is it up" in text


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 No\r\n\r\n", b"", None], ids=["another", "hung up", "silent"])
def test_something_else_listens_there(tmp_path: Path, greeting: bytes | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as kept:

        def answer() -> None:
            sock = kept.enter_context(server.accept()[0])
            if greeting is not None:
                sock.sendall(greeting)
                sock.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=answer)
        thread.start()
        (tmp_path / "config").write_text(f"Host odd\n HostName 127.0.0.1\n Port {server.getsockname()[1]}\n")
        assert "no sshd at 127.0.0.1:" in refusal(tmp_path / "config", "odd", 1.0)
        thread.join()


def test_a_key_that_nobody_has_accepted(network: Network, tmp_path: Path) -> None:
    config = network.config(tmp_path / "config", StrictHostKeyChecking="no")
    known = tmp_path / "known_hosts"
    known.write_text("")
    grace = network.hosts["grace"]
    text = refusal(config, "grace")
    shown = subprocess.run(["ssh-keyscan", "-p", "2222", grace.address], capture_output=True, text=True).stdout
    (tmp_path / "scanned").write_text(shown)
    listed = subprocess.run(["ssh-keygen", "-lf", tmp_path / "scanned"], capture_output=True, text=True).stdout
    assert f"its key is unknown: ssh-ed25519 {listed.split()[1]};" in text
    advice = text.rpartition("`ssh-keyscan")[2].rstrip("`")
    subprocess.run(f"ssh-keyscan{advice}", shell=True, check=True, capture_output=True)
    assert reach(config, "grace") == f"{USER}@grace"


def test_a_key_that_has_changed(network: Network, tmp_path: Path) -> None:
    config = network.config(tmp_path / "config")
    known = tmp_path / "known_hosts"
    ada, grace = network.hosts["ada"], network.hosts["grace"]
    known.write_text(ada.known_hosts.replace(ada.address, f"[{grace.address}]:2222"))
    text = refusal(config, "grace")
    assert "its key has changed: known is ssh-ed25519 SHA256:" in text
    advice = text.split("`")[1]
    subprocess.run(advice, shell=True, check=True, capture_output=True)
    assert "its key is unknown" in refusal(config, "grace")
    known.write_text(f"{grace.known_hosts}\n@revoked * {grace.known_hosts.split(' ', 1)[1]}")
    assert "its key is revoked" in refusal(config, "grace")


def test_no_key_that_it_takes(network: Network, tmp_path: Path) -> None:
    make_key(tmp_path / "wrong")
    config = network.config(tmp_path / "config", IdentityFile=str(tmp_path / "wrong"))
    text = refusal(config, "grace")
    assert f"it does not let {USER} in with {tmp_path / 'wrong'}; add the key there" in text
    assert f"`ssh-copy-id -p 2222 {USER}@grace`" in text
    assert "USER@grace" in text
    text = refusal(network.config(tmp_path / "config", "nobody-there"), "ada")
    assert "it does not let nobody-there in" in text


def test_no_key_at_all(network: Network, tmp_path: Path) -> None:
    config = network.config(tmp_path / "config", IdentityFile=str(tmp_path / "missing"))
    assert f"there is no key to log in with as {USER}: name one" in refusal(config, "ada")
    make_key(tmp_path / "locked")
    lock(tmp_path / "locked")
    config = network.config(tmp_path / "config", IdentityFile=str(tmp_path / "locked"))
    assert f"{tmp_path / 'locked'} has a passphrase: `ssh-add {tmp_path / 'locked'}`" in refusal(config, "ada")
    (tmp_path / "damaged").write_text("nonsense")
    config = network.config(tmp_path / "config", IdentityFile=str(tmp_path / "damaged"))
    assert f"{tmp_path / 'damaged'} cannot be used" in refusal(config, "ada")


def test_a_host_that_wants_more_than_a_key(network: Network, tmp_path: Path) -> None:
    host = network.host("strict")
    try:
        config = network.config(tmp_path / "config")
        host.configure("PubkeyAuthentication no", "PasswordAuthentication yes")
        assert f"it wants {USER} to log in by password" in refusal(config, "strict")
        host.configure("PubkeyAuthentication yes", "AuthenticationMethods publickey,password")
        assert f"it wants {USER} to log in by password" in refusal(config, "strict")
    finally:
        host.close()


# -- What goes over them -------------------------------------------------------------------------------------------------


def test_more_sessions_than_a_connection_takes(network: Network, tmp_path: Path) -> None:
    """sshd's MaxSessions is 10 where nobody has changed it."""
    config = network.config(tmp_path / "config")
    dialled: list[Transport] = []
    connections = Connections(
        Config(str(config)).target("ada"), lambda target, within: dialled.append(connect(target, within)) or dialled[-1]
    )
    with contextlib.closing(connections):
        sessions = [connections.session() for _ in range(23)]
        assert len(dialled) == 3
        sessions[0].exec_command("echo one")
        sessions[-1].exec_command("echo two")
        assert (sessions[0].recv(100), sessions[-1].recv(100)) == (b"one\n", b"two\n")
        dialled[0].close()
        assert connections.session() is not None
    with pytest.raises(RemoteHostError, match="has ended"):
        connections.session()


def test_several_who_want_a_connection_share_what_comes_of_it(network: Network, tmp_path: Path) -> None:
    config = network.config(tmp_path / "config")
    config.write_text(config.read_text().replace("Port 22\n", "Port 21\n"))
    dialled = []
    go_on = threading.Event()

    def dial(target: object, within: float) -> Transport:
        dialled.append(target)
        go_on.wait(10.0)
        return connect(target, within)  # type: ignore[arg-type]

    connections = Connections(Config(str(config)).target("ada"), dial)
    errors = []

    def want() -> None:
        with pytest.raises(RemoteHostError) as caught:
            connections.session()
        errors.append(str(caught.value))

    threads = [threading.Thread(target=want) for _ in range(5)]
    for thread in threads:
        thread.start()
    while connections._pending is None:
        pass
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(set(errors)) == 1
    assert len(dialled) <= 5
    assert "nothing listens at" in errors[0]


ECHO = """\
import socketserver
class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(self.rfile.read())
with socketserver.ThreadingTCPServer(('127.0.0.1', 0), Echo) as server:
    print(server.server_address[1], flush=True)
    server.serve_forever()
"""
"""Sends back what it gets, at its end."""


def test_a_tunnel(network: Network, tmp_path: Path) -> None:
    """Bytes in both directions, ends in both directions, several connections; and its end."""
    ada = network.hosts["ada"]
    config = network.config(tmp_path / "config")
    connections = Connections(Config(str(config)).target("ada"))
    before = threading.active_count()
    with contextlib.closing(connections):
        session = connections.session()
        session.exec_command(f'python3 -c "{ECHO}"')
        port = int(session.recv(100))
        tunnel = Tunnel(lambda: connections.forward(port), "m-1")
        data = os.urandom(3_000_000)
        socks = [socket.create_connection(("127.0.0.1", tunnel.port), 10.0) for _ in range(3)]
        for sock in socks:
            threading.Thread(target=lambda sock=sock: (sock.sendall(data), sock.shutdown(socket.SHUT_WR))).start()
        for sock in socks:
            with sock, sock.makefile("rb") as file:
                assert file.read() == data
        open_one = socket.create_connection(("127.0.0.1", tunnel.port), 10.0)
        dead = Tunnel(lambda: connections.forward(1), "m-2")
        with socket.create_connection(("127.0.0.1", dead.port), 10.0) as sock:
            assert sock.recv(1) == b""
        dead.close()
        tunnel.close()
        tunnel.close()
        with open_one:
            assert open_one.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", tunnel.port), 10.0)
        # Who has been hung up on knows it a moment before the thread that did so has ended.
        for thread in threading.enumerate():
            if "-tunnel-m-2" in thread.name:
                thread.join(10.0)
                assert not thread.is_alive()
    for thread in threading.enumerate():
        if "tunnel" in thread.name:
            thread.join(10.0)
    assert threading.active_count() <= before + 1
    ada.run("true")
