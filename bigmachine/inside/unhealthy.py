"""Machines that run out of memory: what fills it is saved while there is somebody to ask, before the kernel kills the process.

A machine's supervisor says when its memory is nearly full (`supervisor.pressure`). Then three things are asked of its service
processes at the same time, and each is written as soon as it is there, as the next may be too late:

- ``heap.pb.gz``: all Python objects by type, for ``go tool pprof``. Not who has allocated them: to trace that takes memory.
- ``threads.txt``: what every thread does, with the call that it is in.
- ``vars.json``: the machine's variables, figures of its calls among them.

Rule 1. At most one capture of a machine a minute, two at a time, and fifty in a session: looking takes memory, too, and disk.
Rule 2. A machine that does not answer within 20 s is left with what there is.
Rule 3. Files are private: names of functions and texts of variables are in them. They stay when the session ends.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..machine import Machine
from ..state import State
from .cluster import Cluster

EVERY = 60.0
"""Seconds between two captures of a machine: how often its supervisor says that it is still unhealthy."""

AT_ONCE = 2
"""Captures at the same time: where many machines share a host, they run short together."""

MOST = 50
"""Captures of a session: of a hundred kilobytes each, more would tell nothing new."""

WITHIN = 20.0
"""Seconds for a capture: the kernel is usually faster, and who has not answered by then has no memory to answer with."""

HEAP = "objects"
"""The kind of profile: the objects that there are; nothing is traced for it."""

LARGEST = 3
"""Kinds of objects that are named in the log."""


def watch(session: Cluster, folder: Path | None) -> Callable[[], object]:
    """Save what there is to be saved, in `folder`, or in a directory of temporary files. Returns what ends that."""
    captures = Captures(session, folder)
    session.fleet.unhealthy = captures.on
    return captures.close


class Captures:
    """Those of one session; see the module."""

    def __init__(self, session: Cluster, folder: Path | None) -> None:
        self._session = session
        self._folder = folder.absolute() if folder is not None else None  # The program may change its directory.
        self._lock = threading.Lock()
        self._waiting: deque[Machine] = deque()
        self._last: dict[str, float] = {}  # When a capture was begun, by machine's id.
        self._threads: set[threading.Thread] = set()
        self._closed = threading.Event()

    def on(self, machine: Machine, event: Sequence[Any]) -> None:
        """What the machine's supervisor says of its memory. Returns at once."""
        kind, percent, used, total, text = event
        if kind == "healthy":
            machine.unhealthy = ""
            self._session.say(f"machine {machine.addr} has memory again: {text}")
            return
        machine.unhealthy = text
        self._session.events.emit("machine.unhealthy", machine.id, percent=percent, used=used, total=total, text=text)
        self._session.say(f"machine {machine.addr} is unhealthy: {text}")
        with self._lock:
            if self._is_due(machine, time.monotonic()):
                self._waiting.append(machine)
                self._start()

    def close(self) -> None:
        """The session has ended, and there is nobody to ask: captures under way end with what they have. Idempotent."""
        self._closed.set()
        with self._lock:
            self._waiting.clear()
            threads = list(self._threads)
        for thread in threads:
            thread.join(2.0)

    def _is_due(self, machine: Machine, now: float) -> bool:
        """With the lock held. Whether a capture of `machine` is to be made, which counts as begun then."""
        last = self._last.get(machine.id)
        # A second less: the supervisor's reminder may come a little early by our clock.
        recently = last is not None and now - last < EVERY - 1.0
        running = machine.state is State.RUNNING  # Before, there are no services to ask.
        if self._closed.is_set() or recently or not running or len(self._session.captures) >= MOST:
            return False
        self._last[machine.id] = now
        return True

    def _start(self) -> None:
        """With the lock held."""
        if len(self._threads) < AT_ONCE:
            thread = threading.Thread(target=self._run, name="bigmachine-capture", daemon=True)
            self._threads.add(thread)
            try:
                thread.start()
            except RuntimeError:  # The interpreter ends.
                self._threads.discard(thread)
                self._waiting.clear()

    def _run(self) -> None:
        while True:
            with self._lock:
                machine = self._waiting.popleft() if self._waiting else None
                if machine is None:
                    self._threads.discard(threading.current_thread())
                    return
            if machine.unhealthy and machine.state is State.RUNNING:  # It may have waited for long.
                try:
                    self._capture(machine, machine.unhealthy)
                except Exception as error:  # A full disk, most likely. The next one may succeed.
                    self._session.say(f"cannot save what fills machine {machine.addr}: {error}")

    # -- One capture -------------------------------------------------------------------------------------------------

    def _capture(self, machine: Machine, reason: str) -> None:
        began = time.time()
        folder = self._make_folder(machine, began)
        machine.saved = str(folder)
        largest: list[str] = []
        asked = [
            _Asked("heap", lambda gone: largest.extend(self._save_heap(machine, folder, gone))),
            _Asked("threads", lambda gone: self._save_threads(machine, folder, gone)),
            _Asked("variables", lambda gone: self._save_variables(machine, folder)),
        ]
        _write(folder / "status.txt", _status(machine, reason, began))
        deadline = time.monotonic() + WITHIN
        problems = [problem for each in asked if (problem := each.result(deadline, self._closed))]
        if problems:
            _write(folder / "missing.txt", "".join(f"{problem}\n" for problem in problems))
        files = sorted(str(file) for file in folder.iterdir() if not file.name.startswith("."))
        said = f": {', '.join(largest)}" if largest else ""
        if problems:
            said += f" (missing: {'; '.join(problem.splitlines()[0] for problem in problems)})"
        self._session.events.emit("capture.saved", machine.id, files=files, reason=reason)
        self._session.captures.append({"machine": machine.id, "time": began, "reason": reason, "files": files})
        self._session.say(f"what fills machine {machine.addr} is saved in {folder}{said}")

    def _make_folder(self, machine: Machine, now: float) -> Path:
        """A new one. Raises OSError."""
        from tempfile import mkdtemp  # 5 ms, for machines that are not well.

        base = self._folder
        if base is None:  # Made by us alone, as others may write there, too.
            base = self._folder = Path(mkdtemp(prefix=f"bigmachine-{self._session.name}-"))
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
        folder = base / f"unhealthy-{machine.id}-{stamp}"
        folder.mkdir(mode=0o700, parents=True)
        return folder

    def _save_heap(self, machine: Machine, folder: Path, gone: threading.Event) -> list[str]:
        """Returns what there is most of."""
        from .profiles import take  # As the others: for machines that are not well.

        taken = take(self._session, HEAP, machine=machine, gone=gone, slack=WITHIN)
        _write(folder / "heap.pb.gz", taken.pprof())
        sizes: dict[str, int] = {}
        index = [name for name, _ in taken.profile.types].index("inuse_space")
        for sample in taken.profile.samples:
            if sample.stack:
                name = taken.profile.places[sample.stack[0]].function.removeprefix("[objects] ")
                sizes[name] = sizes.get(name, 0) + sample.values[index]
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:LARGEST]
        return [f"{size / (1 << 20):.1f} MiB {name}" for name, size in largest]

    def _save_threads(self, machine: Machine, folder: Path, gone: threading.Event) -> None:
        from .profiles import take

        _write(folder / "threads.txt", take(self._session, "threads", machine=machine, gone=gone, slack=WITHIN).text())

    def _save_variables(self, machine: Machine, folder: Path) -> None:
        from .variables import as_json, collect

        found = as_json(collect(_Only(machine), WITHIN))
        document = {
            "variables": found["machines"].get(machine.addr, {}),
            "missing": found["missing"].get(machine.addr, {}),
        }
        _write(folder / "vars.json", json.dumps(document, indent=1))


class _Only:
    """A session, as far as variables are concerned, with one machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def machines(self) -> list[Machine]:
        return [self._machine]


class _Asked:
    """A question that is being asked, on a thread of its own; `act` is given what tells it that nobody waits any more."""

    def __init__(self, what: str, act: Callable[[threading.Event], object]) -> None:
        self._what = what
        self._act = act
        self._gone = threading.Event()
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name=f"bigmachine-capture-{what}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._act(self._gone)
        except Exception as error:  # The machine may have ended meanwhile: whatever else there is, is saved.
            self._problem = f"{self._what}: {error}"

    def result(self, deadline: float, closed: threading.Event) -> str:
        """What was in the way; empty where nothing was. Waits until `deadline`, and until `closed` is set."""
        while self._thread.is_alive() and time.monotonic() < deadline and not closed.is_set():
            self._thread.join(0.1)
        if not self._thread.is_alive():
            return self._problem
        self._gone.set()
        return f"{self._what}: no answer"


def _status(machine: Machine, reason: str, now: float) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    entered = machine.entered.get(State.RUNNING, now)
    return f"{machine.addr}\n{when}, {now - entered:.0f} s after it was running\n{reason}\n"


def _write(path: Path, data: str | bytes) -> None:
    """Whole or not at all, as the driver may end meanwhile; readable by the user alone."""
    part = path.with_name(f".{path.name}")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
    part.replace(path)
