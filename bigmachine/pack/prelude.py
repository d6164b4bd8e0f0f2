"""The first lines of a packed file's ``__main__.py``: is this the right Python, and is the file whole?

The text of this module stands at the top of that file, with a call of `begin` after it. So it imports nothing of ours, and
keeps to what Python 3.8 understands: older ones do not
execute an archive with a comment at all. `bigmachine.program` uses `seal` and `check_whole`, too.
"""

import hashlib
import os
import sys

SEAL = b"bigmachine sha256:"
"""The archive's comment: this, and 64 hexadecimal digits, the digest of all bytes before the comment."""

_SEAL_SIZE = len(SEAL) + 64
_CHUNK = 1 << 20


class Damaged(Exception):
    """A packed file that is not as it was made; the text says what is wrong and what to do."""


def seal(path: str) -> str:
    """The digest that the file at `path` says it has. Raises `Damaged`; OSError where it cannot be read."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - _SEAL_SIZE))
        comment = file.read()
    if len(comment) != _SEAL_SIZE or not comment.startswith(SEAL):
        raise Damaged(f"{path} is damaged: its end is missing; copy or pack it again")
    return comment[len(SEAL) :].decode("ascii", "replace")


def digest_before_seal(path: str) -> str:
    """What the seal should say. Raises OSError."""
    digest = hashlib.sha256()
    left = os.path.getsize(path) - _SEAL_SIZE
    with open(path, "rb") as file:
        while left > 0:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                break
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest()


def check_whole(path: str) -> None:
    """Compare all of the file with its `seal`. Raises as that does."""
    if seal(path) != digest_before_seal(path):
        raise Damaged(f"{path} is damaged: its content is not what was packed; copy or pack it again")


def begin(path: str, minor: str) -> None:
    """Exit with a line on standard error where this is another Python than `minor` ("3.11"), or the file is damaged."""
    this = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if this != minor:
        name = os.path.basename(path)
        sys.exit(
            f"bigmachine: {name} needs Python {minor}, and this is {this} ({sys.executable}): "
            f"run it with python{minor}, or pack it again for another version"
        )
    if not os.path.isfile(path):
        return  # The builder has unpacked the file, and executes it once more.
    try:
        check_whole(path)
    except (OSError, Damaged) as error:
        sys.exit(f"bigmachine: {error}")
