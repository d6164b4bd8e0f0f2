"""Authority and credentials, by real TLS handshakes in memory and over socket pairs. Nothing here sleeps or waits."""

from __future__ import annotations

import ast
import copy
import itertools
import pickle
import resource
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from descriptors import descriptors

from bigmachine import credentials as credentials_module
from bigmachine.authority import BACKDATED, LIFETIME, Authority
from bigmachine.credentials import (
    MAX_PEM,
    BadIdentity,
    Credentials,
    Identity,
    Role,
    agent_server_name,
    client_context,
    machine_domain,
    parse_server_name,
    peer_identity,
    server_context,
    server_name,
)
from bigmachine.errors import UsageError

NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)

AUTHORITY = Authority("s-1")
DRIVER = AUTHORITY.issue(Role.DRIVER, "driver")
MACHINE = AUTHORITY.issue(Role.MACHINE, "m-7f3a9c")
OTHER_MACHINE = AUTHORITY.issue(Role.MACHINE, "m-000001")
AGENT = AUTHORITY.issue(Role.AGENT, "l-42")

SUPERVISOR = server_name("m-7f3a9c", None)


class Clock:
    def __init__(self, time: datetime = NOW) -> None:
        self.time = time

    def __call__(self) -> datetime:
        return self.time


class Link:
    """A TLS connection in memory. `handshake` raises what the first end to refuse raises."""

    def __init__(self, server: ssl.SSLContext, client: ssl.SSLContext, name: str | None) -> None:
        self.to_server, self.to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.server = server.wrap_bio(self.to_server, self.to_client, server_side=True)
        self.client = client.wrap_bio(self.to_client, self.to_server, server_hostname=name)

    def handshake(self) -> Link:
        shake(self.client, self.server)
        return self


def shake(*ends: ssl.SSLObject | ssl.SSLSocket) -> None:
    """Let the ends, which do not block, take turns until all are done or one raises."""
    waiting = list(ends)
    for _ in range(10):
        waiting = [end for end in waiting if not finished(end)]
        if not waiting:
            return
    raise AssertionError("the handshake does not end")


def finished(end: ssl.SSLObject | ssl.SSLSocket) -> bool:
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def connect(server: Credentials, client: Credentials, name: str = SUPERVISOR) -> Link:
    return Link(server_context(server), client_context(client), name).handshake()


# Handshakes that succeed


@pytest.mark.parametrize(
    ("server", "client", "name"),
    [
        pytest.param(MACHINE, DRIVER, SUPERVISOR, id="driver calls supervisor"),
        pytest.param(MACHINE, DRIVER, server_name("m-7f3a9c", 0), id="driver calls service process"),
        pytest.param(MACHINE, DRIVER, server_name("m-7f3a9c", 127), id="driver calls another service process"),
        pytest.param(MACHINE, DRIVER, machine_domain("m-7f3a9c"), id="driver calls the machine's bare name"),
        pytest.param(MACHINE, OTHER_MACHINE, SUPERVISOR, id="machine calls machine"),
        pytest.param(MACHINE, MACHINE, SUPERVISOR, id="machine calls itself"),
        pytest.param(AGENT, DRIVER, agent_server_name("l-42"), id="driver bootstraps agent"),
    ],
)
def test_both_ends_know_whom_they_talk_to(server: Credentials, client: Credentials, name: str) -> None:
    link = connect(server, client, name)
    assert peer_identity(link.client) == server.identity
    assert peer_identity(link.server) == client.identity
    assert link.client.version() == link.server.version() == "TLSv1.3"
    assert link.client.selected_alpn_protocol() == link.server.selected_alpn_protocol() == "h2"


def test_bytes_flow_both_ways() -> None:
    link = connect(MACHINE, DRIVER)
    link.client.write(b"ping")
    assert link.server.read(100) == b"ping"
    link.server.write(b"pong")
    assert link.client.read(100) == b"pong"


def test_over_sockets() -> None:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setblocking(False)
    with (
        server_context(MACHINE).wrap_socket(theirs, server_side=True, do_handshake_on_connect=False) as server,
        client_context(DRIVER).wrap_socket(ours, server_hostname=SUPERVISOR, do_handshake_on_connect=False) as client,
    ):
        shake(client, server)
        assert str(peer_identity(server)) == "driver driver"
        assert str(peer_identity(client)) == "machine m-7f3a9c"


def test_server_sends_no_session_tickets() -> None:
    link = connect(MACHINE, DRIVER)
    assert link.to_client.pending == 0
    with pytest.raises(ssl.SSLWantReadError):
        link.client.read(1)


@pytest.mark.parametrize("machine_id", ["m-7f3a9c", "m", "0", "i-0abcdef1234567890", "m--1", "s-1", "agent", "x" * 63])
def test_wildcard_covers_every_valid_machine_id(machine_id: str) -> None:
    machine = AUTHORITY.issue(Role.MACHINE, machine_id)
    for process in (None, 0, 15):
        connect(machine, DRIVER, server_name(machine_id, process))


def test_machine_and_session_of_one_name() -> None:
    authority = Authority("same")
    connect(authority.issue(Role.MACHINE, "same"), authority.issue(Role.DRIVER, "same"), server_name("same", None))


def test_clock_skew_up_to_an_hour_is_allowed() -> None:
    authority = Authority("s-1", now=Clock(NOW + BACKDATED - MINUTE))
    connect(authority.issue(Role.MACHINE, "m-7f3a9c"), authority.issue(Role.DRIVER, "driver"))


# Refused by the client


def refused_by_client(server: Credentials, client: Credentials, match: str, name: str = SUPERVISOR) -> None:
    link = Link(server_context(server), client_context(client), name)
    with pytest.raises(ssl.SSLCertVerificationError, match=match):
        link.handshake()
    with pytest.raises(ssl.SSLError, match=r"(?i)alert"):
        link.server.do_handshake()


def test_client_refuses_another_machine_on_the_address() -> None:
    refused_by_client(OTHER_MACHINE, DRIVER, "Hostname mismatch")


@pytest.mark.parametrize("name", ["m-7f3a9c", "supervisor.x.m-7f3a9c.bigmachine", "bigmachine", "127.0.0.1"])
def test_client_refuses_names_beside_the_machine_s(name: str) -> None:
    refused_by_client(MACHINE, DRIVER, "mismatch", name)


def test_client_refuses_an_agent_in_the_place_of_a_machine() -> None:
    agent = AUTHORITY.issue(Role.AGENT, "m-7f3a9c")
    for process in (None, 0):
        refused_by_client(agent, DRIVER, "Hostname mismatch", server_name("m-7f3a9c", process))


def test_client_refuses_a_driver_as_server() -> None:
    refused_by_client(DRIVER, DRIVER, "unsuitable certificate purpose|invalid purpose")


def test_client_refuses_a_machine_of_another_session() -> None:
    for session in ("s-2", "s-1"):  # also one that claims the same name
        machine = Authority(session).issue(Role.MACHINE, "m-7f3a9c")
        refused_by_client(machine, DRIVER, "unable to get local issuer|self.signed|signature failure")


def test_client_refuses_an_expired_machine() -> None:
    clock = Clock()
    authority = Authority("s-1", now=clock)
    driver = authority.issue(Role.DRIVER, "driver")
    clock.time = NOW - 2 * MINUTE
    machine = authority.issue(Role.MACHINE, "m-7f3a9c", lifetime=MINUTE)
    refused_by_client(machine, driver, "certificate has expired")


def test_client_refuses_a_machine_that_is_not_yet_valid() -> None:
    clock = Clock()
    authority = Authority("s-1", now=clock)
    driver = authority.issue(Role.DRIVER, "driver")
    clock.time = NOW + BACKDATED + HOUR
    refused_by_client(authority.issue(Role.MACHINE, "m-7f3a9c"), driver, "not yet valid")


def test_client_refuses_everything_of_an_expired_session() -> None:
    authority = Authority("s-1", now=Clock(NOW - 2 * HOUR), lifetime=HOUR)
    machine, driver = authority.issue(Role.MACHINE, "m-7f3a9c"), authority.issue(Role.DRIVER, "driver")
    refused_by_client(machine, driver, "certificate has expired")


def test_client_must_say_whom_it_wants() -> None:
    with pytest.raises(ValueError, match="server_hostname"):
        Link(server_context(MACHINE), client_context(DRIVER), None)
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ValueError, match="server_hostname"):
        client_context(DRIVER).wrap_socket(ours, do_handshake_on_connect=False)


# Refused by the server


def refused_by_server(client: ssl.SSLContext, match: str, server: Credentials = MACHINE) -> None:
    link = Link(server_context(server), client, SUPERVISOR)
    with pytest.raises(ssl.SSLError, match=match):
        link.handshake()
    with pytest.raises(ssl.SSLError, match=r"(?i)alert"):  # see credentials: in TLS 1.3 the client learns it by reading
        link.client.read(1)


def test_server_refuses_a_client_without_certificate() -> None:
    anonymous = ssl.create_default_context(cadata=AUTHORITY.ca.decode())
    refused_by_server(anonymous, r"(?i)peer.did.not.return.a.certificate")


def test_server_refuses_a_client_of_another_session() -> None:
    for session in ("s-2", "s-1"):
        context = client_context(Authority(session).issue(Role.DRIVER, "driver"))
        context.load_verify_locations(cadata=AUTHORITY.ca.decode())
        refused_by_server(context, "unable to get local issuer|self.signed|signature failure")


def test_server_refuses_an_agent_as_client() -> None:
    refused_by_server(client_context(AGENT), "unsuitable certificate purpose|invalid purpose")


def test_server_refuses_an_expired_client() -> None:
    clock = Clock()
    authority = Authority("s-1", now=clock)
    machine = authority.issue(Role.MACHINE, "m-7f3a9c")
    clock.time = NOW - 2 * MINUTE
    driver = authority.issue(Role.DRIVER, "driver", lifetime=MINUTE)
    refused_by_server(client_context(driver), "certificate has expired", machine)


def test_server_refuses_a_client_that_is_not_yet_valid() -> None:
    clock = Clock()
    authority = Authority("s-1", now=clock)
    machine = authority.issue(Role.MACHINE, "m-7f3a9c")
    clock.time = NOW + BACKDATED + HOUR
    driver = authority.issue(Role.DRIVER, "driver")
    refused_by_server(client_context(driver), "not yet valid", machine)


def test_server_refuses_a_machine_that_plays_ca() -> None:
    forger = Authority("s-1")
    # The forger has the key and certificate of a machine, and issues with them.
    key = load_pem_private_key(MACHINE.key, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    forger._key = key
    forger._subject = x509.load_pem_x509_certificate(MACHINE.certificate).subject
    forger._authority_identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    forged = forger.issue(Role.DRIVER, "driver")
    chained = Credentials(forged.identity, forged.certificate + MACHINE.certificate, forged.key, AUTHORITY.ca)
    refused_by_server(client_context(chained), "invalid CA certificate")


def test_server_refuses_tls_1_2() -> None:
    context = client_context(DRIVER)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    refused_by_server(context, r"(?i)unsupported.protocol")


def test_client_refuses_tls_1_2() -> None:
    context = server_context(MACHINE)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)unsupported.protocol|protocol.version"):
        Link(context, client_context(DRIVER), SUPERVISOR).handshake()


# Contexts


@pytest.mark.parametrize("make", [server_context, client_context])
def test_contexts_are_strict(make: Callable[[Credentials], ssl.SSLContext]) -> None:
    context = make(MACHINE)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.verify_flags & ssl.VERIFY_X509_STRICT
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
    assert len(context.get_ca_certs()) == 1
    assert context.check_hostname is (make is client_context)


def test_contexts_leak_no_descriptors() -> None:
    before = descriptors()
    contexts = [make(MACHINE) for make in (server_context, client_context) * 5]
    assert not descriptors() - before
    assert len(contexts) == 10


@pytest.mark.parametrize(
    ("certificate", "key", "ca", "reason"),
    [
        pytest.param(
            MACHINE.certificate, OTHER_MACHINE.key, MACHINE.ca, "not a pair: 'machine m-7", id="another's key"
        ),
        pytest.param(b"", MACHINE.key, MACHINE.ca, "damaged", id="empty certificate"),
        pytest.param(MACHINE.certificate, b"", MACHINE.ca, "damaged", id="empty key"),
        pytest.param(MACHINE.certificate[:300], MACHINE.key, MACHINE.ca, "damaged", id="cut certificate"),
        pytest.param(b"junk", b"junk", MACHINE.ca, "damaged", id="junk"),
        pytest.param(MACHINE.certificate, MACHINE.key, b"junk", "damaged", id="junk for CA"),
        pytest.param(b"x" * (MAX_PEM + 1), MACHINE.key, MACHINE.ca, "more than 4096", id="certificate too large"),
        pytest.param(MACHINE.certificate, b"x" * (MAX_PEM + 1), MACHINE.ca, "more than 4096", id="key too large"),
    ],
)
def test_bad_credentials_are_refused_and_leak_no_descriptors(
    certificate: bytes, key: bytes, ca: bytes, reason: str
) -> None:
    before = descriptors()
    for make in (server_context, client_context):
        with pytest.raises(BadIdentity, match=reason):
            make(Credentials(MACHINE.identity, certificate, key, ca))
    assert not descriptors() - before


def test_other_failures_keep_their_own_error() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            server_context(MACHINE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_contexts_write_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # from here on, a write to any file fails
    try:
        server_context(MACHINE)
        client_context(MACHINE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_workers_need_the_standard_library_only() -> None:
    tree = ast.parse(Path(credentials_module.__file__).read_text(encoding="utf-8"))
    absolute = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    relative = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) if node.level}
    absolute |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) if not node.level}
    assert {name.partition(".")[0] for name in absolute} <= sys.stdlib_module_names
    assert relative == {"errors"}


# Credentials do not leak


def test_repr_does_not_show_the_key() -> None:
    body = MACHINE.key.splitlines()[1].decode()
    for text in (repr(MACHINE), str(MACHINE), f"{MACHINE!r:>10}", repr([MACHINE])):
        assert body not in text
        assert "PRIVATE" not in text
    assert "m-7f3a9c" in repr(MACHINE)
    assert repr(AUTHORITY) == "Authority('s-1')"


@pytest.mark.parametrize("secret", [MACHINE, AUTHORITY], ids=["credentials", "authority"])
def test_secrets_are_not_pickled(secret: object) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="private key"):
            pickle.dumps([secret], protocol)
    with pytest.raises(TypeError, match="private key"):
        cloudpickle.dumps(lambda: secret)
    with pytest.raises(TypeError, match="private key"):
        copy.deepcopy(secret)


def test_credentials_cross_a_pipe_as_json() -> None:
    fields = MACHINE.to_json()
    assert all(isinstance(value, str) for value in fields.values())
    assert Credentials.from_json(fields) == MACHINE
    connect(Credentials.from_json(fields), Credentials.from_json(DRIVER.to_json()))


def test_json_with_a_field_missing_or_malformed() -> None:
    fields = MACHINE.to_json()
    for name in fields:
        with pytest.raises(KeyError, match=name):
            Credentials.from_json({key: value for key, value in fields.items() if key != name})
    with pytest.raises(BadIdentity):
        Credentials.from_json({**fields, "identity": "m-7f3a9c"})


# Certificates


def certificate_of(holder: Credentials) -> x509.Certificate:
    return x509.load_pem_x509_certificate(holder.certificate)


def test_certificates_are_valid_from_an_hour_ago_until_the_ca_s_end() -> None:
    clock = Clock()
    authority = Authority("s-1", now=clock)
    clock.time = NOW + HOUR
    end = (NOW + LIFETIME).replace(microsecond=0)
    for lifetime in (None, 2 * LIFETIME):
        certificate = certificate_of(authority.issue(Role.MACHINE, "m-1", lifetime=lifetime))
        assert certificate.not_valid_before_utc == (NOW + HOUR - BACKDATED).replace(microsecond=0)
        assert certificate.not_valid_after_utc == end
    short = certificate_of(authority.issue(Role.AGENT, "l-1", lifetime=HOUR))
    assert short.not_valid_after_utc == (NOW + 2 * HOUR).replace(microsecond=0)


def test_expired_authority_says_so() -> None:
    clock = Clock()
    authority = Authority("s-1", now=clock, lifetime=HOUR)
    clock.time = NOW + HOUR
    with pytest.raises(UsageError, match=r"session s-1 expired: .* UTC; start a new session"):
        authority.issue(Role.MACHINE, "m-1")


def test_serials_and_keys_are_fresh() -> None:
    issued = [MACHINE, AUTHORITY.issue(Role.MACHINE, "m-7f3a9c")]
    assert len({certificate_of(each).serial_number for each in issued}) == 2
    assert len({each.key for each in issued}) == 2


def test_pems_fit_a_pipe() -> None:
    largest = Authority("s" * 63).issue(Role.MACHINE, "m" * 63)
    assert max(len(pem) for pem in (largest.certificate, largest.key, largest.ca)) < MAX_PEM / 2


def test_openssl_s_strict_verification(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(AUTHORITY.ca)
    for holder, purpose in itertools.product([DRIVER, MACHINE, AGENT], ["sslclient", "sslserver"]):
        (tmp_path / "leaf.pem").write_bytes(holder.certificate)
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", "ca.pem", "leaf.pem"]
        try:
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=60)
        except FileNotFoundError:
            pytest.skip("needs the openssl command")
        refused = (holder.identity.role, purpose) in {(Role.DRIVER, "sslserver"), (Role.AGENT, "sslclient")}
        assert (done.returncode != 0) == refused, done


# Names


@pytest.mark.parametrize("role", Role)
def test_identity_round_trip(role: Role) -> None:
    identity = Identity(role, "A.b_c-9", "s-1")
    assert identity.uri == f"bigmachine://s-1/{role.value}/A.b_c-9"
    assert Identity.parse(identity.uri) == identity
    assert pickle.loads(pickle.dumps(identity)) == identity
    assert str(identity) == f"{role.value} A.b_c-9"


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "m-1",
        "bigmachine://",
        "bigmachine://s-1/machine",
        "bigmachine://s-1/machine/",
        "bigmachine:///machine/m-1",
        "bigmachine://s-1/root/m-1",
        "bigmachine://s-1/Machine/m-1",
        "bigmachine://s-1/machine/m-1/",
        "bigmachine://s-1/machine/m-1\n",
        "bigmachine://s-1/machine/m 1",
        "bigmachine://s-1/machine/m%2d1",
        "bigmachine://s-1/machine/mé",
        "bigmachine://s-1/machine/" + "m" * 64,
        " bigmachine://s-1/machine/m-1",
        "https://s-1/machine/m-1",
    ],
)
def test_malformed_uri(uri: str) -> None:
    with pytest.raises(BadIdentity) as caught:
        Identity.parse(uri)
    assert caught.value.what == uri
    assert repr(uri) in str(caught.value)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a\n", "é", "x" * 64])
def test_malformed_identity(name: str) -> None:
    with pytest.raises(BadIdentity):
        Identity(Role.MACHINE, name, "s-1")
    with pytest.raises(BadIdentity):
        Authority(name)
    for role in Role:
        with pytest.raises(BadIdentity):
            AUTHORITY.issue(role, name)


def test_bad_identity_pickles() -> None:
    error = pickle.loads(pickle.dumps(BadIdentity("x y", "not a name")))
    assert (error.what, error.reason, str(error)) == ("x y", "not a name", "not a name: 'x y'")


def test_server_names_round_trip() -> None:
    assert server_name("m-7f3a9c", None) == "supervisor.m-7f3a9c.bigmachine"
    assert server_name("m-7f3a9c", 3) == "3.m-7f3a9c.bigmachine"
    for process in (None, 0, 9, 10, 999_999):
        assert parse_server_name(server_name("m-1", process)) == ("m-1", process)


@pytest.mark.parametrize(
    "machine_id", ["", "m.1", "supervisor.m-1", "m_1", "M-1", "-m", "m-", "xn--m", "m\n", "m" * 64]
)
def test_machine_ids_that_no_server_name_can_hold(machine_id: str) -> None:
    for act in (
        lambda: server_name(machine_id, None),
        lambda: agent_server_name(machine_id),
        lambda: AUTHORITY.issue(Role.MACHINE, machine_id),
        lambda: AUTHORITY.issue(Role.AGENT, machine_id),
    ):
        with pytest.raises(BadIdentity):
            act()


@pytest.mark.parametrize("process", [-1, 1_000_000])
def test_process_numbers_out_of_range(process: int) -> None:
    with pytest.raises(BadIdentity, match=str(process)):
        server_name("m-1", process)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "m-1.bigmachine",
        "m-1",
        "agent.m-1.bigmachine",
        "00.m-1.bigmachine",
        "01.m-1.bigmachine",
        "-1.m-1.bigmachine",
        "1000000.m-1.bigmachine",
        "٣.m-1.bigmachine",
        "0.m-1.bigmachine.",
        "0.m-1.bigmachine\n",
        "0.m-1.bigmachine.example.com",
        "0..bigmachine",
        "0.x.m-1.bigmachine",
        "*.m-1.bigmachine",
        "SUPERVISOR.m-1.bigmachine",
    ],
)
def test_malformed_server_name(name: str) -> None:
    with pytest.raises(BadIdentity) as caught:
        parse_server_name(name)
    assert caught.value.what == name


@pytest.mark.parametrize("uris", [[], ["https://example.com/"], [MACHINE.identity.uri, DRIVER.identity.uri]])
def test_peer_without_a_single_identity(uris: list[str]) -> None:
    class Peer(ssl.SSLObject):
        def __init__(self) -> None: ...

        def getpeercert(self, binary_form: bool = False) -> Any:
            return {"subjectAltName": (("DNS", "m-1.bigmachine"), *(("URI", uri) for uri in uris))}

    with pytest.raises(BadIdentity):
        peer_identity(Peer())


def test_peer_without_certificate() -> None:
    careless = server_context(MACHINE)
    careless.verify_mode = ssl.CERT_NONE
    link = Link(careless, client_context(DRIVER), SUPERVISOR).handshake()
    with pytest.raises(BadIdentity, match="does not hold exactly one identity"):
        peer_identity(link.server)
