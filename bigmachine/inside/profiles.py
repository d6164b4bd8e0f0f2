"""Profiles of all processes of a session, taken at the same time and merged into one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from .. import profiling
from ..errors import Unreachable, UsageError
from ..machine import Machine
from ..profiling.values import Profile
from ..rpc.calling import raiser
from ..rpc.calls import Call
from ..rpc.client import Client
from ..state import State
from . import pprof

DRIVER = "driver"
"""Stands for the machine, and for the process, where the driver's own is meant."""

SLACK = 30.0
"""Seconds that a process has for its answer, besides those that the profile takes: its code may keep the interpreter lock, and
a heap of a million objects takes some to describe."""

ASKERS = 64
"""Threads that ask at the same time. One is busy for 0.1 ms, or, where a connection has to be made that nobody takes, until the
deadline."""

LOOK = 0.2
"""Seconds between two looks whether somebody still waits for the profile."""

MAX_NAMES = 10
"""Machines that an error lists."""

Who = tuple[str, str]
"""A machine's address, and the number of a process of it."""


class Cluster(Protocol):
    """A `session.Session`."""

    def machines(self) -> list[Machine]: ...


@dataclass(frozen=True)
class Taken:
    """`profile` is of all processes: its samples have the labels ``machine`` (the address, or "driver") and ``process``,
    and, in a call, ``service`` and ``method``. `processes` are those that it is of, `missing` those that have not answered,
    with the reason.
    """

    profile: Profile
    processes: Sequence[Who]
    missing: Mapping[Who, str]

    def pprof(self) -> bytes:
        """For ``go tool pprof``; gzipped."""
        return pprof.encode(self.profile)

    def text(self) -> str:
        """For people."""
        return pprof.text(self.profile)


class Cancelled(Exception):
    """Nobody waits for the profile any more."""


def take(
    cluster: Cluster,
    kind: str,
    seconds: object = 30,
    gc: bool = False,
    machine: Machine | str | None = None,
    gone: threading.Event | None = None,
    slack: float = SLACK,
) -> Taken:
    """A profile of the driver and of every service process of all running machines, or of `machine` alone: one, its address
    or its id, or "driver". `kind`, `seconds` and `gc` are as in `profiling.take`.

    A machine that stops meanwhile is left out, and is among the missing; so is who has not answered `slack` seconds after the
    time. Processes count once: the machines of the system `test` are the driver's. Raises `UsageError`, and `Unreachable`
    where nobody has answered, and `Cancelled` when `gone` has been set meanwhile: then all stop.
    """
    number = profiling.checked(kind, seconds)
    gone = threading.Event() if gone is None else gone
    asked: dict[Who, Call[Profile]] = {}
    within = (number if kind == "profile" else 0.0) + slack
    deadline = time.monotonic() + within
    askers = ThreadPoolExecutor(ASKERS, "bigmachine-profiles")
    parts: list[tuple[Who, Profile]] = []
    missing: dict[Who, str] = {}
    try:
        for who, client in _processes(cluster, machine):
            call = asked[who] = Call()
            if client is not None:
                askers.submit(_ask, client, call, (kind, number, gc), deadline)
            else:
                own = threading.Thread(target=_tell, args=(call, kind, number, gc, gone.is_set), name="bigmachine-profile")
                own.daemon = True  # Who is interrupted, and leaves, is not to wait for it.
                own.start()
        for who, call in asked.items():
            try:
                parts.append((who, _result(call, deadline, gone)))
            except Cancelled:
                raise
            except TimeoutError:
                missing[who] = f"no answer within {within:g} s"
            except Exception as error:  # It stopped meanwhile, or whatever else: the others are to be seen.
                missing[who] = str(error) or type(error).__name__
    finally:  # Ctrl-C, too: nobody goes on for nothing.
        gone.set()
        for call in asked.values():
            call.cancel()
        askers.shutdown(wait=False, cancel_futures=True)
    return _merged(kind, parts, missing)


def _processes(cluster: Cluster, machine: Machine | str | None) -> list[tuple[Who, Client | None]]:
    """Whom to ask; None is this process."""
    running = [each for each in cluster.machines() if each.state is State.RUNNING]
    if machine is not None and machine != DRIVER:
        chosen = [each for each in running if machine in (each, each.addr, each.id)]
        if not chosen:
            names = [DRIVER, *(each.addr for each in running)]
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            wanted = machine.addr if isinstance(machine, Machine) else machine
            raise UsageError(f"no such machine is running: {wanted!r}; there are {', '.join(names[:MAX_NAMES])}{more}")
        running = chosen
    found: list[tuple[Who, Client | None]] = []
    if machine is None or machine == DRIVER:
        found.append(((DRIVER, DRIVER), None))
    if machine == DRIVER:
        return found
    for each in running:
        # Not the supervisor, which comes first: it runs nothing of the program.
        found += [((each.addr, process), client) for process, client in each.processes[1:]]
    return found


def _result(call: Call[Profile], deadline: float, gone: threading.Event) -> Profile:
    while True:
        left = max(0.0, deadline - time.monotonic())
        try:
            return call.result(min(left, LOOK))
        except TimeoutError:
            if gone.is_set():
                raise Cancelled("the profile was cancelled") from None
            if call.done() or left <= LOOK:
                raise


def _ask(client: Client, call: Call[Profile], args: tuple[str, float, bool], deadline: float) -> None:
    """Send the question; does not wait for the answer, but perhaps for a connection."""
    left = deadline - time.monotonic()
    if left <= 0 or call.done():
        return
    try:
        client.submit(call, "Process.profile", client.codec.encode_call("Process.profile", args, {}), left)
    except Exception as error:  # Nobody else would hear of it.
        call.complete(raiser(error))


def _tell(call: Call[Profile], kind: str, seconds: float, gc: bool, cancelled: Callable[[], bool]) -> None:
    call.complete(lambda: profiling.take(kind, seconds, gc, cancelled))


def _merged(kind: str, parts: Sequence[tuple[Who, Profile]], missing: Mapping[Who, str]) -> Taken:
    once: dict[str, tuple[Who, Profile]] = {}
    comments = []
    for who, profile in parts:
        first, _ = once.setdefault(profile.process, (who, profile))
        if first != who:
            comments.append(f"{' '.join(who)} is in the same process as {' '.join(first)}, and counted there")
    comments += [f"{' '.join(who)} is missing: {reason}" for who, reason in missing.items()]
    labelled = [({"machine": machine, "process": process}, profile) for (machine, process), profile in once.values()]
    if not labelled:
        ((machine, _), reason), *_ = missing.items()
        raise Unreachable(machine, f"there is nothing to make a profile of: {reason}", sent=True)
    return Taken(pprof.merge(labelled, comments), [who for who, _ in once.values()], missing)
