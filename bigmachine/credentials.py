"""Who a process is, and the TLS contexts that prove it.

Used on drivers and on workers, so it needs the standard library only; certificates are issued in `authority`.

Rule 1. A certificate says who its holder is in one URI subjectAltName, ``bigmachine://<session>/<role>/<name>``. The
server authorises by it: `peer_identity`.

Rule 2. Clients verify *the machine*, not an address. They ask for it by server name:
``supervisor.<machine id>.bigmachine`` for its supervisor, ``<n>.<machine id>.bigmachine`` for its service process n,
and ``agent.<launch id>.bigmachine`` for a host that waits to be bootstrapped. No agent's certificate is valid for a
machine's name.

Rule 3. Both sides verify, against the session's CA and nothing else, in TLS 1.3 and nothing else. What a certificate
may be used for (`extendedKeyUsage`) is checked too: an agent cannot be a client, a driver cannot be a server.

Rule 4. A private key is in memory and on pipes between processes: never on disk, in a pickle, or in a `repr`.

In TLS 1.3 a client has finished its handshake before the server has looked at its certificate: a client that is refused
learns so from its first read (an `ssl.SSLError` with the alert), not from `do_handshake`.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from .errors import BigmachineError

ALPN = "h2"
"""The only protocol offered and accepted. A peer that offers others, or none, gets through the handshake: look at
``selected_alpn_protocol()`` after it."""

MAX_PEM = 4096
"""Bytes of a certificate or key at most: what the kernel takes into any pipe without a reader, even from a user who has
used up the allowance for pipe buffers. Ours are below 1 KiB."""

# 63: the limit of a DNS label, and below the 64 of a certificate's commonName. Both hold such names.
_NAME = r"[A-Za-z0-9._-]{1,63}"
_URI = re.compile(rf"bigmachine://({_NAME})/(driver|machine|agent)/({_NAME})")

# One label of lower case letters, digits and inner hyphens. A dot would let the machine "supervisor.m-1" pass for the
# supervisor of "m-1"; host names are compared without case; and OpenSSL matches no wildcard above other characters, or
# above a label that says it is punycode.
_LABEL = r"(?!xn--)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_SERVER_NAME = re.compile(rf"(supervisor|0|[1-9][0-9]{{0,5}})\.({_LABEL})\.bigmachine")


class BadIdentity(BigmachineError, ValueError):
    """``what`` (a name, a URI, a certificate's names) does not identify anybody, because of ``reason``."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what, reason)
        self.what = what
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason}: {self.what!r}"


class Role(enum.StrEnum):
    DRIVER = "driver"
    MACHINE = "machine"
    AGENT = "agent"


@dataclass(frozen=True)
class Identity:
    """``name`` is a machine id, an agent's launch id, or what the driver calls itself: one per role and ``session``.

    Raises `BadIdentity` for names other than 1 to 63 of ``A-Z a-z 0-9 . _ -``.
    """

    role: Role
    name: str
    session: str

    def __post_init__(self) -> None:
        for name in (self.name, self.session):
            if not re.fullmatch(_NAME, name):
                raise BadIdentity(name, "not a name, which has 1 to 63 letters, digits, dots, underscores and hyphens")

    @classmethod
    def parse(cls, uri: str) -> Identity:
        """The inverse of `uri`. Raises `BadIdentity`."""
        match = _URI.fullmatch(uri)
        if match is None:
            raise BadIdentity(uri, "not an identity, which is bigmachine://<session>/<role>/<name>")
        session, role, name = match.groups()
        return cls(Role(role), name, session)

    @property
    def uri(self) -> str:
        return f"bigmachine://{self.session}/{self.role}/{self.name}"

    def __str__(self) -> str:
        return f"{self.role} {self.name}"


@dataclass(frozen=True)
class Credentials:
    """What a process proves its identity with, in PEM: its certificate, that one's private key, the CA it trusts."""

    identity: Identity
    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    ca: bytes = field(repr=False)

    def to_json(self) -> dict[str, str]:
        """For handing over on a pipe. Contains the private key: not for argv, the environment, disk or logs."""
        return {
            "identity": self.identity.uri,
            "certificate": self.certificate.decode("ascii"),
            "key": self.key.decode("ascii"),
            "ca": self.ca.decode("ascii"),
        }

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write ``ca.pem``, ``cert.pem`` and ``key.pem`` into `folder`, for a program such as ``curl`` that reads them there.

        The one case in which a private key goes to disk: at the user's word, and readable by him alone. Raises OSError,
        where a file exists already, too.
        """
        for name, data in (("ca.pem", self.ca), ("cert.pem", self.certificate), ("key.pem", self.key)):
            fd = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(fd, "wb") as file:
                file.write(data)

    @classmethod
    def from_json(cls, fields: dict[str, str]) -> Credentials:
        """The inverse of `to_json`. Raises `KeyError` for a missing field, `BadIdentity` for a malformed identity."""
        return cls(
            Identity.parse(fields["identity"]),
            fields["certificate"].encode("ascii"),
            fields["key"].encode("ascii"),
            fields["ca"].encode("ascii"),
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"the credentials of {self.identity} hold a private key and are not pickled; see to_json")


def server_context(credentials: Credentials) -> ssl.SSLContext:
    """For the accepting side. Make one per process. Raises `BadIdentity` for credentials that do not fit together."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # they would cost each connection two records, and we do not resume sessions
    _configure(context, credentials)
    return context


def client_context(credentials: Credentials) -> ssl.SSLContext:
    """For the connecting side, which must ask for a server name. Make one per process. Raises `BadIdentity`."""
    context = _ClientContext(ssl.PROTOCOL_TLS_CLIENT)  # which verifies certificates and host names
    context.hostname_checks_common_name = False
    _configure(context, credentials)
    return context


def peer_identity(tls: ssl.SSLSocket | ssl.SSLObject) -> Identity:
    """Whom we are connected to; to be called after the handshake. Raises `BadIdentity`."""
    names: Any = (tls.getpeercert() or {}).get("subjectAltName", ())  # pairs; typeshed has one type for all fields
    uris = [value for kind, value in names if kind == "URI"]
    if len(uris) != 1:
        raise BadIdentity(", ".join(uris), "the peer's certificate does not hold exactly one identity")
    return Identity.parse(uris[0])


def server_name(machine_id: str, process: int | None) -> str:
    """By which a client asks for a machine's service process, or for its supervisor (None). Raises `BadIdentity`."""
    name = f"{'supervisor' if process is None else process}.{machine_domain(machine_id)}"
    if not _SERVER_NAME.fullmatch(name):
        raise BadIdentity(str(process), "not the number of a service process, which is 0 to 999999")
    return name


def parse_server_name(name: str) -> tuple[str, int | None]:
    """The inverse of `server_name`. Raises `BadIdentity`: `name` may come from anybody who can connect."""
    match = _SERVER_NAME.fullmatch(name)
    if match is None:
        raise BadIdentity(name, "not a server name, which is supervisor.<machine id>.bigmachine or <n>.<id>.bigmachine")
    process, machine_id = match.groups()
    return machine_id, None if process == "supervisor" else int(process)


def agent_server_name(launch_id: str) -> str:
    """By which the driver asks for an agent. Raises `BadIdentity`."""
    return f"agent.{machine_domain(launch_id)}"


def machine_domain(machine_id: str) -> str:
    """The DNS name above all server names of a machine. Raises `BadIdentity`."""
    if not re.fullmatch(_LABEL, machine_id):
        raise BadIdentity(machine_id, "not a machine id, which has 1 to 63 of a-z, 0-9 and inner hyphens")
    return f"{machine_id}.bigmachine"


class _ClientContext(ssl.SSLContext):
    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        # wrap_socket refuses this; wrap_bio would silently accept any machine of the session.
        if server_hostname is None:
            raise ValueError("a client must say whom it wants to reach: server_hostname is missing")
        return super().wrap_bio(incoming, outgoing, server_side, server_hostname, session)


def _configure(context: ssl.SSLContext, credentials: Credentials) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # not a default before 3.13: the same rules on every Python
    context.set_alpn_protocols([ALPN])
    with _readable(credentials.certificate) as certificate, _readable(credentials.key) as key:
        try:
            context.load_verify_locations(cadata=credentials.ca.decode("ascii"))
            context.load_cert_chain(certificate, key)
        except OSError as error:
            # Python prefers a stale errno to OpenSSL's reason: ESPIPE only says that OpenSSL tried to seek in the pipe.
            if not isinstance(error, ssl.SSLError) and error.errno != errno.ESPIPE:
                raise
            reason = "damaged credentials, or a certificate and a key that are not a pair"
            raise BadIdentity(str(credentials.identity), reason) from error


@contextlib.contextmanager
def _readable(pem: bytes) -> Iterator[str]:
    """A path from which `pem` can be read once: OpenSSL is given file names only, and a key must not reach a disk."""
    if len(pem) > MAX_PEM:
        raise BadIdentity(f"{len(pem)} bytes", f"a certificate or key of more than {MAX_PEM} bytes")
    reader, writer = os.pipe()
    try:
        try:
            os.write(writer, pem)
        finally:
            os.close(writer)  # OpenSSL reads certificates up to the end of the file
        yield f"/dev/fd/{reader}"
    finally:
        os.close(reader)
