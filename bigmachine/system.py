"""The seams between bigmachine and the places where machines come from.

A system is two narrow protocols: a `Launcher` on the driver and a `Host` on the machine. Values cross, handles do not: a
system is given `Order`s and answers with `Launched`; it never sees a session, a service or a call. Third parties
register theirs by the entry point group ``bigmachine.systems``, and check it with ``bigmachine.testing.conformance``.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .address import format_address
from .credentials import Credentials
from .info import Notice

ENTRY_POINTS = "bigmachine.systems"


@dataclass(frozen=True)
class Program:
    """What a machine executes to get service processes: a command that reaches `driver.start()`.

    `argv` includes the interpreter; `environ` is added to the environment that the machine has anyway; `cwd` is the
    working directory where that exists on the machine, None for the machine's default. The last `own_args` of `argv` are
    the program's own arguments, which a launch may replace. `digest` is the packed program's, which its service processes
    must report, empty where it is not packed, None where nobody knows. `file` is the packed program, for systems whose
    machines have nothing yet.
    """

    argv: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    own_args: int = 0
    digest: str | None = None
    file: Path | None = None

    @property
    def name(self) -> str:
        """For people: ``bigpi.py``, ``app.pex``; empty where it is none that could be executed again."""
        if self.file is not None and self.digest:
            return self.file.name
        kept = self.argv[1 : len(self.argv) - self.own_args]
        return Path(kept[-1]).name if kept and "-c" not in kept else ""


@dataclass(frozen=True)
class Order:
    """One machine, please: who it will be, what proves it, and what it is to run."""

    id: str
    credentials: Credentials
    program: Program
    lease: float


@dataclass(frozen=True)
class Launched:
    """A machine that has been started: `host` and `port` to connect to, how many service processes it may run."""

    id: str
    host: str
    port: int
    maxprocs: int

    @property
    def address(self) -> str:
        """``https://localhost:42409/m-7f3a9c/``: where it is, and who must be there."""
        return format_address(self.host, self.port, self.id)


class Launcher(Protocol):
    """The driver's side. All methods may be called from any thread.

    A launcher whose machines have nothing of the program yet has an attribute ``ships``: the platforms that they may have
    (``("linux/amd64",)``). It is given the program as a packed file then (`Program.file`), packed where it is not yet.

    It may have a method ``timeline(id) -> Sequence[info.Step]``: the steps within `launch`, as far as machine `id` has got, the
    last of them the one that failed. And ``summary() -> str``: a line about what the session has cost, which the driver
    prints when all machines are ended; empty where there is nothing to say.

    For whoever looks at the session: ``detail(id) -> Mapping[str, str]``, what machine `id` is to the system (``{"instance":
    "i-0abc", "type": "m7i.large"}``), and ``hourly(id) -> float | None``, the USD an hour that it costs. These two are asked
    often, and answer at once, without looking anything up.
    """

    name: str

    def prepare(self) -> None:
        """A session is being opened: begin what takes time and every launch will need. Neither waits nor raises."""

    def launch(self, orders: Sequence[Order]) -> list[Future[Launched]]:
        """Start one machine for each order. Returns at once; each future ends with the machine, or with the reason
        why there is none, as an exception whose text a user can act on."""

    def stop(self, id: str, grace: float) -> None:
        """Make sure that nothing of machine `id` runs, within about `grace` seconds. Where it could be reached, it was asked
        to end by itself before. Idempotent, and without effect on a machine that is not this launcher's."""

    def ended(self, id: str) -> str | None:
        """Why machine `id` is known to be gone; None where it may be running. Returns at once: asked whenever a keepalive has
        failed. A launcher that has to look goes and looks, and reports by `on_end`."""

    def on_end(self, id: str, callback: Callable[[str], None]) -> None:
        """Call back, once, with the reason, when the system notices that machine `id` is gone. It may never notice."""

    def console(self, id: str) -> str:
        """The last lines of what the machine said outside of its services' output: for the report of a failed boot."""

    def close(self) -> None:
        """Release what the launcher itself holds; its machines are stopped already."""


class Host(Protocol):
    """The machine's side, in the supervisor."""

    maxprocs: int

    def listener(self) -> socket.socket:
        """A listening TCP socket. Raises OSError."""

    def driver_gone(self) -> list[int]:
        """File descriptors of which one becomes readable when the driver has ended; none where the host cannot know."""

    def renewed(self, lease: float) -> None:
        """A driver was here, and the machine lives for `lease` seconds more: for a host with a dead man's switch."""

    def watch(self, notify: Callable[[Notice], None]) -> None:
        """Begin to look for notices that the machine will be taken away; each goes to `notify`, once, from any thread."""

    def exit(self, reason: str) -> None:
        """End the machine: after this the supervisor has nothing left to do. Does not return on a real one."""
