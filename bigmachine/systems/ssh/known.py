"""The keys by which hosts are known: files in the format of sshd(8), ``SSH_KNOWN_HOSTS FILE FORMAT``. Pure.

Plain names, patterns, negated and hashed names, and revoked keys are understood; certificate authorities are not, so that a
host that is known by one only is unknown here.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import hmac
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

DEFAULT_PORT = 22


@dataclass(frozen=True)
class HostKey:
    """A public key: its type (``ssh-ed25519``) and its bytes."""

    kind: str
    blob: bytes

    def __str__(self) -> str:
        digest = base64.b64encode(hashlib.sha256(self.blob).digest()).decode().rstrip("=")
        return f"{self.kind} SHA256:{digest}"


@dataclass(frozen=True)
class Known:
    """What is known of one host."""

    keys: tuple[HostKey, ...] = ()
    revoked: tuple[HostKey, ...] = ()


def place(host: str, port: int) -> str:
    """By which name `host` is entered: with its port, where that is an unusual one."""
    return host if port == DEFAULT_PORT else f"[{host}]:{port}"


def known(texts: Iterable[str], name: str) -> Known:
    """What the files `texts` say of `name`, which is a `place`. Lines that are not understood are left out."""
    keys: list[HostKey] = []
    revoked: list[HostKey] = []
    for marker, names, key in (entry for text in texts for entry in _entries(text)):
        if marker in ("", "@revoked") and _match(names, name):
            (revoked if marker else keys).append(key)
    return Known(tuple(dict.fromkeys(keys)), tuple(dict.fromkeys(revoked)))


def _entries(text: str) -> Iterator[tuple[str, str, HostKey]]:
    for line in text.splitlines():
        fields = line.split()
        marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
        if len(fields) >= 3 and not fields[0].startswith("#"):
            names, kind, encoded = fields[:3]
            try:
                yield marker, names, HostKey(kind, base64.b64decode(encoded, validate=True))
            except binascii.Error:
                continue


def _match(names: str, name: str) -> bool:
    if names.startswith("|1|"):
        return _hashed(names, name)
    found = False
    for pattern in names.split(","):
        if _like(name, pattern.removeprefix("!")):
            if pattern.startswith("!"):
                return False
            found = True
    return found


def _like(name: str, pattern: str) -> bool:
    """``*`` and ``?`` alone mean more than themselves: a bracket is a part of an address."""
    return fnmatch.fnmatchcase(name.lower(), pattern.lower().replace("[", "[[]"))


def _hashed(entry: str, name: str) -> bool:
    try:
        salt, digest = (base64.b64decode(field, validate=True) for field in entry[3:].split("|"))
    except ValueError:  # Not base64, or not two fields.
        return False
    return hmac.compare_digest(hmac.digest(salt, name.lower().encode(), "sha1"), digest)
