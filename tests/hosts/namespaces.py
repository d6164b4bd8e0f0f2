"""What hosts are made of: processes in namespaces of their own, and interfaces between those.

A namespace is held by a process, which dies with the one that has started it, however that ends: with the thread, to be
exact, so that threads that start some must last. Interfaces and mounts go with their namespaces. The kernel clears those
away some time *after* their last process has ended, though, and until then the far end of a pair of interfaces still has
its name: whoever wants the name deletes the interface first (`wire`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()
"""What to put before a command that is to end when the thread that starts it does."""

LATENCY = "400ms"
"""The most that a narrow link holds back before it drops: 1 MB of 20 Mbit/s. TCP shall see a queue, not losses."""


def unavailable(needed: Sequence[str], packages: str) -> str:
    """Why there can be no hosts here that need these commands, which are in these packages; empty where there can."""
    if sys.platform != "linux":
        return "hosts are made of Linux namespaces"
    if os.geteuid() != 0:
        return "only root can make hosts"
    if missing := [command for command in needed if shutil.which(command) is None]:
        return f"hosts need {', '.join(missing)}: apt-get install {packages}"
    trial = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here: {trial.stderr.strip()}" if trial.returncode else ""


@contextlib.contextmanager
def claim(kind: str, numbers: Iterable[int] = range(1, 255)) -> Iterator[int]:
    """The first of `numbers` that no other process on this host has at this time for the same `kind`."""
    for number in numbers:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as holder:
            try:
                holder.bind(f"\0bigmachine-{kind}-{number}")  # Abstract: it is free again when its process has ended.
            except OSError:
                continue
            yield number
            return
    raise RuntimeError(f"all {kind} are in use")


@contextlib.contextmanager
def process(
    command: Sequence[str], environ: Mapping[str, str] | None = None, console: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A process that has said ``unshared`` when it is in its namespaces; it dies with this one, and at the end of the block."""
    with contextlib.ExitStack() as stack:
        log = subprocess.DEVNULL if console is None else stack.enter_context(open(console, "w"))
        started = subprocess.Popen(
            [*DIES_WITH_US, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environ,
            text=True,
            start_new_session=True,
        )
        with started:
            try:
                assert started.stdout is not None
                if started.stdout.readline() != "unshared\n":
                    said = console.read_text() if console is not None else ""
                    raise RuntimeError(f"no namespaces: {started.wait()}: {said}")
                yield started
            finally:
                kill(started)


def kill(started: subprocess.Popen[str]) -> None:
    """End what ``unshare --pid --fork`` has started, with all that is in the namespace: returns when nothing of it is left.

    The first process in there is its parent's zombie only when all others are gone."""
    while started.poll() is None and (child := first_child(started.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 9)
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(5)
    started.kill()
    started.wait()


@contextlib.contextmanager
def switch() -> Iterator[int]:
    """A network namespace; gives the id of the process that holds it."""
    with process(["unshare", "--net", "sh", "-c", "echo unshared; exec sleep inf"]) as holder:
        yield holder.pid


@contextlib.contextmanager
def wire(name: str, pid: int, far: str) -> Iterator[None]:
    """An interface `name` here, the other end of which is `far` in the namespace of process `pid`."""
    unwire(name)
    ip(f"link add {name} type veth peer name {far} netns {pid}")
    try:
        yield
    finally:
        unwire(name)


def unwire(name: str) -> None:
    """Delete an interface, if there is one of this name: one of a network that is gone, too."""
    subprocess.run(["ip", "link", "del", name], capture_output=True)


def inside(pid: int) -> list[str]:
    """What to put before a command that is to run in the network namespace of process `pid`."""
    return ["nsenter", f"--net=/proc/{pid}/ns/net", "--"]


def ip(lines: str, pid: int | None = None) -> None:
    """Commands of ``ip -batch``, here or in the network namespace of process `pid`."""
    where = [] if pid is None else inside(pid)
    done = subprocess.run([*where, "ip", "-batch", "-"], input=lines, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip: {done.stderr.strip()}: {lines!r}")


def rate(interface: str, mbit: float, pid: int | None = None) -> None:
    """What leaves by `interface` from now on does so at `mbit` Mbit/s at most; 0: as fast as it can."""
    where = [] if pid is None else inside(pid)
    subprocess.run([*where, "tc", "qdisc", "del", "dev", interface, "root"], capture_output=True)
    if mbit:
        shape = ["tbf", "rate", f"{mbit}mbit", "burst", "64kb", "latency", LATENCY]
        done = subprocess.run([*where, "tc", "qdisc", "add", "dev", interface, "root", *shape], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"tc: {done.stderr.strip()}")


@contextlib.contextmanager
def limited(mbit: float, *ends: tuple[str, int | None]) -> Iterator[None]:
    """For the block, limit the `rate` of a line, given its ends."""
    try:
        for interface, pid in ends:
            rate(interface, mbit, pid)
        yield
    finally:
        for interface, pid in ends:
            rate(interface, 0, pid)


def first_child(pid: int) -> int:
    """The id of the process that `pid` has started first, of those that still run; 0 if there is none."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return int(children[0]) if children else 0


def processes(first: int) -> dict[int, str]:
    """The command lines of the processes in the process namespace of `first`, by process id here."""
    ours, found = namespace(first), {}
    for entry in Path("/proc").iterdir() if ours else ():
        if entry.name.isdigit() and namespace(int(entry.name)) == ours:
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if command:
                    found[int(entry.name)] = command
    return found


def run(first: int, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command as root in all namespaces of the process `first`."""
    spaces = [f"--target={first}", "--net", "--mount", "--pid", "--uts", "--ipc", "--time", "--root", "--wd"]
    environ = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    done = subprocess.run(["nsenter", *spaces, "--", *command], capture_output=True, text=True, env=environ)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
    return done


def eventually(what: Callable[[], object], within: float) -> bool:
    """Whether `what` becomes true in that many seconds; for what nothing tells of."""
    deadline = time.monotonic() + within
    while not (true := bool(what())) and time.monotonic() < deadline:
        time.sleep(0.02)
    return true


def namespace(pid: int) -> str:
    """Of processes; which one `pid` is in. "" if there is no such process."""
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""
