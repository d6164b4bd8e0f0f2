"""The certificate authority of one session. The driver's alone: it is made in memory, and ends with the process.

The certificates it issues name a role and an identity (see `credentials`) and carry what the role may do:

=======  ======================  ==========================================  ===========================================
role     may be                  DNS names                                   for
=======  ======================  ==========================================  ===========================================
driver   client                  none                                        calling every machine
machine  server and client       ``<id>.bigmachine``, ``*.<id>.bigmachine``  being called, calling other machines
agent    server                  ``agent.<id>.bigmachine``                   being bootstrapped by the driver, only
=======  ======================  ==========================================  ===========================================
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NoReturn

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from .credentials import Credentials, Identity, Role, agent_server_name, machine_domain
from .errors import UsageError

LIFETIME = timedelta(days=30)
"""Of the CA: no connection can be made in a session that is older. What protects a session is that the CA's key dies
with the driver; this only has to be longer than anybody runs one."""

BACKDATED = timedelta(hours=1)
"""How far a machine's clock may be behind the driver's (a fresh virtual machine, a laptop that slept)."""

_PURPOSES = {
    Role.DRIVER: [ExtendedKeyUsageOID.CLIENT_AUTH],
    Role.MACHINE: [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
    Role.AGENT: [ExtendedKeyUsageOID.SERVER_AUTH],
}


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Authority:
    """An ephemeral CA (EC P-256) for `session`, valid from `BACKDATED` before ``now()`` until `lifetime` after it.

    `now` returns aware datetimes. An `Authority` may be used from several threads.
    """

    def __init__(self, session: str, *, now: Callable[[], datetime] = _utc_now, lifetime: timedelta = LIFETIME) -> None:
        self.session = Identity(Role.DRIVER, "driver", session).session  # validated
        self._now = now
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = _name("session", session)
        identifier = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        self._authority_identifier = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
        start = now()
        self._expiry = start + lifetime
        certificate = (
            self._builder(self._subject, self._key.public_key(), start, self._expiry)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(key_cert_sign=True), critical=True)
            .add_extension(identifier, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self._pem = certificate.public_bytes(Encoding.PEM)

    @property
    def ca(self) -> bytes:
        """The CA's certificate in PEM: what every party of the session trusts."""
        return self._pem

    def issue(self, role: Role, name: str, *, lifetime: timedelta | None = None) -> Credentials:
        """New credentials for `name`, with a key of their own, valid for `lifetime` but never longer than the CA.

        Raises `BadIdentity` for a name that cannot be certified, `UsageError` once the CA has expired.
        """
        identity = Identity(role, name, self.session)
        now = self._now()
        if now >= self._expiry:
            expired = f"{self._expiry:%Y-%m-%d %H:%M %Z}"
            raise UsageError(f"the certificates of session {self.session} expired: {expired}; start a new session")
        expiry = self._expiry if lifetime is None else min(self._expiry, now + lifetime)
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.UniformResourceIdentifier(identity.uri), *map(x509.DNSName, _dns_names(identity))]
        certificate = (
            self._builder(_name(role, name), key.public_key(), now, expiry)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage(_PURPOSES[role]), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(self._authority_identifier, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return Credentials(
            identity,
            certificate.public_bytes(Encoding.PEM),
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            self._pem,
        )

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, start: datetime, expiry: datetime
    ) -> x509.CertificateBuilder:
        return x509.CertificateBuilder(
            issuer_name=self._subject,
            subject_name=subject,
            public_key=key,
            serial_number=x509.random_serial_number(),
            not_valid_before=start - BACKDATED,
            not_valid_after=expiry,
        )

    def __repr__(self) -> str:
        return f"Authority({self.session!r})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"the authority of session {self.session} holds its private key and is not pickled")


def _dns_names(identity: Identity) -> list[str]:
    match identity.role:
        case Role.MACHINE:
            domain = machine_domain(identity.name)
            return [domain, f"*.{domain}"]
        case Role.AGENT:
            return [agent_server_name(identity.name)]
        case Role.DRIVER:
            return []


def _name(kind: str, name: str) -> x509.Name:
    # For people who look at a certificate: identities are in the subjectAltName. The CA's must differ from all others,
    # also from that of a machine called like the session: a certificate with equal subject and issuer counts as a root.
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, f"bigmachine {kind}"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


def _key_usage(*, digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
