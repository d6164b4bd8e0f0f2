"""A part on its way to an agent.

The standard library only, Python 3.9 and later: see `agent`.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable

from .parts import PartError, unpack
from .store import Refused, Store, refusal

MAX_AHEAD = 16
"""Pieces of an upload, each of `CHUNK` bytes at most, that wait to be unpacked."""


class Upload:
    """One part: its compressed bytes are kept, and unpacked while they arrive. `busy` is held by who sends them."""

    def __init__(self, store: Store, digest: str, size: int) -> None:
        self.digest = digest
        self.size = size
        self.offset = 0
        self.busy = threading.Lock()
        self.active = time.monotonic()
        self.cut: Callable[[], object] = int  # Breaks off whatever is being received now.
        self.over: Refused | None = None
        self._store = store
        self._folder = tempfile.mkdtemp(dir=store.work)
        self._kept = open(os.path.join(self._folder, "z"), "wb", buffering=0)  # noqa: SIM115 - closed by `_run`
        self._inflate = zlib.decompressobj()
        self._ahead: list[bytes | None] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def feed(self, pieces: Iterable[bytes]) -> None:
        """Bytes of the stream, up to its end; returns when the part is there. Raises `Refused`, or what `pieces` do: then
        it can go on at `offset`."""
        try:
            for piece in pieces:
                self._put(piece)
            self._put(None)
        except Refused as refused:
            self._stop(refused)
        self._thread.join()
        if self.over is not None and self.over.status != 201:
            raise self.over

    def _put(self, piece: bytes | None) -> None:
        self.active = time.monotonic()
        with self._changed:
            self._changed.wait_for(lambda: self.over is not None or len(self._ahead) < MAX_AHEAD)
            if self.over is not None:
                raise self.over
            self._ahead.append(piece)
            self._changed.notify_all()
            self.offset += len(piece or b"")

    def _next(self) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: self._ahead or self.over is not None)
            if self.over is not None:
                raise OSError(errno.ECANCELED, str(self.over))
            piece = self._ahead.pop(0)
            self._changed.notify_all()
        view = memoryview(piece or b"")
        while view:
            view = view[self._kept.write(view) :]
        return piece

    def read(self, size: int) -> bytes:
        """Of the tar: for `unpack`."""
        data = self._inflate.unconsumed_tail
        while not self._inflate.eof:
            try:
                found = self._inflate.decompress(data, size)
            except zlib.error as error:
                raise OSError(errno.EINVAL, str(error)) from None
            if found:
                return found
            more = None if self._inflate.eof else self._next()
            if more is None:
                break
            data = more
        return b""

    def _run(self) -> None:
        tree = os.path.join(self._folder, "tree")
        try:
            unpack(self, tree, self.digest, self.size)  # type: ignore[arg-type] # It needs no more than `read`.
            if not self._inflate.eof or self._inflate.unused_data or self._next() is not None:
                raise PartError(f"part {self.digest} is not usable: bytes follow its end; fetch it again")
            self._kept.close()
            os.chmod(self._folder, 0o755)
            self._store.keep(self._folder, "parts", self.digest)
            result = Refused(201, "")
        except Exception as error:  # Whatever it is, whoever waits is to know.
            self._kept.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            result = refusal(error)
        self._stop(result)

    def abort(self, why: Refused) -> None:
        """Nobody will go on with it."""
        self._stop(why)
        self.cut()
        self._thread.join()

    def _stop(self, why: Refused) -> None:
        with self._changed:
            self.over = self.over or why
            self._changed.notify_all()
