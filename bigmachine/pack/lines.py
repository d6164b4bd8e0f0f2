"""Lines of requirements, as `requirements.Wanted` has them: PEP 508, perhaps with ``--hash`` options."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.requirements import InvalidRequirement, Requirement

from ..errors import ResolveError
from .platforms import Platform
from .wheels import Wheel


def requirement_of(line: str) -> Requirement:
    try:
        return Requirement(split_hashes(line)[0])
    except InvalidRequirement as error:
        raise ResolveError(f"not a requirement: {line}: {str(error).splitlines()[0]}") from None


def split_hashes(line: str) -> tuple[str, list[str]]:
    """A requirement's line, and what its ``--hash`` options say (``sha256:<hex>``)."""
    requirement, *hashes = re.split(r"\s--hash[= ]", line)
    return requirement.strip(), [text.strip() for text in hashes]


def has_hash(wheel: Wheel, algorithm: str, digest: str) -> bool:
    if algorithm == "sha256":
        return wheel.sha256 == digest.lower()
    with wheel.path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest() == digest.lower()


def without_login(line: str) -> str:
    """The line, for showing it to anybody: without user and password in an address."""
    return re.sub(r"://[^/@\s]+@", "://", line)


def holds(requirement: Requirement, platform: Platform) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({**platform.environment(), "extra": ""})


def path_of(url: str) -> Path:
    """The file or folder that a ``file://`` address or a path means."""
    return Path(unquote(urlsplit(url).path)) if url.startswith("file:") else Path(url).expanduser()
