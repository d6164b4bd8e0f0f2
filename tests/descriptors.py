"""The open descriptors of this process, for tests that must not leave any behind."""

from __future__ import annotations

import os


def descriptors() -> set[tuple[int, int, int]]:
    """Each descriptor's number, and what it refers to (device and inode), as numbers are reused.

    What is here after a test and was not before it was left by the test. The other way round nothing follows, and so
    they are not counted: what an earlier test has begun to close, on a thread of its own, may go at any moment.
    """
    found = set()
    for name in os.listdir("/dev/fd"):
        try:
            status = os.fstat(int(name))
        except OSError:
            continue  # That of the listing itself.
        found.add((int(name), status.st_dev, status.st_ino))
    return found
