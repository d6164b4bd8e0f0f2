"""What is written on everything that is made in the account: whose it is, of which session, and until when.

Every instance, volume, launch template and request has these tags from the moment at which it exists: they are in the call that
makes it. `bigmachine ps` and `bigmachine gc` go by them, and so can people who look at a bill.
"""

from __future__ import annotations

import datetime
import getpass
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ...info import VERSION
from .api import Ec2Error
from .drivers import this_driver
from .network import pairs

SESSION = "bigmachine:session"
OWNER = "bigmachine:owner"
DRIVER = "bigmachine:driver"
CREATED = "bigmachine:created"
EXPIRES = "bigmachine:expires"
MADE_BY = "bigmachine:version"

LIFE = 3600.0
"""Seconds for which an instance is good from its launch, and from each renewal: what has expired, nobody's driver wants."""

RENEW = 1200.0
"""Seconds between two renewals: two may fail."""

MAX_VALUE = 255
"""Characters of a tag's value (AWS: 256)."""

_FOREIGN = re.compile(r"[^\w\s.:/=+@-]")
"""What AWS does not take in tags everywhere."""


class Calls(Protocol):
    """The part of `api.Api` that is used here."""

    def call(self, service: str, operation: str, **parameters: Any) -> dict[str, Any]: ...


def value(text: str) -> str:
    """`text` as a tag's value: one line, of characters that tags may have, cut where it is too long."""
    text = _FOREIGN.sub("_", " ".join(text.split()))
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 3] + "..."


def instance_name(user: str, program: str, digest: str, args: Sequence[str]) -> str:
    """What the console shows: ``"ada bigmachine bigpi.py 1a2b3c4d -n 100"``."""
    return value(" ".join([user, "bigmachine", program, digest[:8], *args]))


def login() -> str:
    """Who has started this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A user without a name, as in containers.
        return f"uid-{os.getuid()}"


def owner(api: Calls) -> str:
    """Who is billed for whom: the identity that AWS knows, or the login name where that may not be asked."""
    try:
        return value(str(api.call("sts", "GetCallerIdentity")["Arn"]))
    except Ec2Error:
        return value(login())


def stamp(when: float) -> str:
    """ISO 8601, in UTC: ``2025-01-31T12:00:00Z``."""
    return datetime.datetime.fromtimestamp(when, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def tags(name: str, session: str, owner: str, now: float, more: Mapping[str, str]) -> dict[str, str]:
    """All that an instance gets."""
    return {
        **more,
        "Name": name,
        SESSION: session,
        OWNER: owner,
        DRIVER: value(this_driver()),
        CREATED: stamp(now),
        EXPIRES: stamp(now + LIFE),
        MADE_BY: VERSION,
    }


def specifications(tags: Mapping[str, str], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """For the call that makes things of these `kinds` (``"instance"``, ``"volume"``, …)."""
    return [{"ResourceType": kind, "Tags": pairs(tags)} for kind in kinds]
