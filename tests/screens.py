"""A process on a terminal, looked at as a user does: rows of text, keys, another size."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyte

from bigmachine.testing.conformance import SOON

RUN = """\
import fcntl, runpy, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
del sys.argv[0]
runpy.{}(sys.argv[0], run_name="__main__")
"""
"""The terminal becomes the process's own, as a shell sees to it: else nobody tells it that the size has changed."""

END = b"\x1aEND\x1a"
"""The test's own last word: nothing comes after it."""


class Screen:
    """`words` executed by this Python on a terminal: a module's name (`module`) or a file, and its arguments."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        module: bool = False,
        columns: int = 80,
        lines: int = 24,
        environ: Mapping[str, str] = {},
    ) -> None:
        self._screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self._screen)
        self._changed = threading.Condition()
        self._ended = False
        self.raw = b""
        self.master, slave = pty.openpty()
        self.before = termios.tcgetattr(slave)
        self._set_size(columns, lines)
        unwanted = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES", "COLORTERM")
        inherited = {name: value for name, value in os.environ.items() if name not in unwanted}
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN.format("run_module" if module else "run_path"), *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**inherited, "TERM": "xterm-256color", "PYTHONPATH": os.pathsep.join(sys.path), **environ},
        )
        self._slave = slave  # Kept open, to see in what state the terminal was left.
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            data = os.read(self.master, 1 << 16)
            with self._changed:
                self._ended = data.endswith(END)
                self.raw += data.removesuffix(END)
                self._stream.feed(data.removesuffix(END))
                self._changed.notify_all()
                if self._ended:
                    return

    @property
    def rows(self) -> list[str]:
        """What stands there now."""
        with self._changed:
            return [row.rstrip() for row in self._screen.display]

    @property
    def text(self) -> str:
        return "\n".join(self.rows)

    def until(self, seen: Callable[[str], Any], within: float = SOON) -> str:
        """Wait until `seen` is true of what stands there; returns that."""

        def is_seen() -> Any:
            return seen("\n".join(row.rstrip() for row in self._screen.display))

        with self._changed:
            assert self._changed.wait_for(is_seen, within), "in vain; there is:\n" + "\n".join(self._screen.display)
        return self.text

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        with self._changed:
            self._screen.resize(lines, columns)
            self._screen.reset()
        self._set_size(columns, lines)

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    @property
    def after(self) -> str:
        """What has been written since the alternate screen was left."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw.rpartition(b"\x1b[?1049l")[2].decode()).strip()

    def end(self) -> int:
        """Wait for the process to end, and for all that it has written; its exit code."""
        code = self.process.wait(SOON)
        self._mark_end()
        return code

    @property
    def mode(self) -> list[Any]:
        """The terminal's, as the process has left it."""
        return termios.tcgetattr(self._slave)

    def _mark_end(self) -> None:
        if not self._ended:
            os.write(self._slave, END)
            self._reader.join(SOON)

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(SOON)
        self._mark_end()
        os.close(self._slave)
        os.close(self.master)
