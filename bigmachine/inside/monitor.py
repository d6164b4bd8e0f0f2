"""What machines say about themselves, asked for while somebody looks, and once for all who look.

While somebody has looked within the last `LINGER` seconds, a thread asks all running machines every `INTERVAL` seconds, at the
same time, and makes one document of it (`status`), as bytes: fifty browsers get the same ones. Nobody looks: nothing runs.
Many machines are asked less often, and many who look are told to come back later (`pace`): looking must not slow the program.

A machine that does not answer holds up the first document only, and for `WAIT` seconds at most. Later ones say for how long it
has not answered, and show what it said last; it is not asked again before it has answered or `GIVE_UP` seconds have passed.
"""

from __future__ import annotations

import gzip
import json
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..info import Vitals
from ..machine import Machine, merge_stats
from ..rpc.calling import raiser
from ..rpc.calls import Call
from ..rpc.client import Client
from ..rpc.reactor import report_bug
from ..rpc.stats import MethodStats
from ..state import State
from .cluster import Cluster
from .status import Figures, Seen, document, first_line, is_ours

INTERVAL = 2.0
"""Seconds between two documents at least: what changes faster cannot be read anyway."""

MACHINES = 40
"""Machines that are asked a second, at most: each time costs about 2 ms of processor, shared by driver and machine."""

POLLS = 10
"""Answers a second to all who look, at most, as far as they do as the document says: one takes about 1 ms of the driver."""

LINGER = 30.0
"""Seconds for which machines are asked after somebody has looked: histories go on while a page is loaded again."""

WAIT = 1.0
"""Seconds that a document waits for answers, which take milliseconds."""

GIVE_UP = 10.0
"""Seconds after which a question is taken for lost, and asked again."""

ASKERS = 64
"""Threads that ask at the same time. One is busy for 0.1 ms, or, where a connection has to be made that nobody takes, until the
question is given up."""

SUPERVISOR = "supervisor"
VITALS, STATS, DOING = "Supervisor.vitals", "Process.stats", "Process.doing"


@dataclass(frozen=True)
class Snapshot:
    """A document, as a value and as bytes. `tag` is different for different ones."""

    made: float
    value: dict[str, Any]
    body: bytes
    gzipped: bytes
    tag: str


@dataclass
class _Question:
    call: Call[Any]
    asked: float


class Monitor:
    """Asks the machines of one session; see the module. `of` gives the one that a session has."""

    def __init__(self, session: Cluster) -> None:
        self._session = weakref.ref(session)  # Its thread is not to keep a session that nobody else has.
        self._lock = threading.Condition()
        self._latest: Snapshot | None = None
        self._begun = 0  # The number of the document that is being made, or was made last.
        self._looked = 0.0
        self._looks: deque[float] = deque(maxlen=1000)
        self._interval = self._poll = INTERVAL
        self._hurry = False
        self._thread: threading.Thread | None = None
        self._closed: float | None = None
        self._nonce = secrets.token_hex(4)
        self._asker = _Asker()
        session.at_end(self.close)

    def current(self) -> Snapshot | None:
        """The newest document, unless it is out of date. Never waits."""
        with self._lock:
            self._looked = time.monotonic()
            self._looks.append(self._looked)
            latest = self._latest
            if latest is None or self._closed is not None:
                return latest
            return latest if self._looked - latest.made < self._interval + WAIT and self._thread is not None else None

    def snapshot(self, fresh: bool = False) -> Snapshot:
        """The newest document; one that is begun now, where it is out of date or is to be `fresh`. Waits for `WAIT` seconds and
        what it takes to make one."""
        with self._lock:
            latest = self.current()
            if latest is not None and not fresh:
                return latest
            under_way = self._thread is not None and not self._done(self._begun)
            wanted = self._begun if under_way and not fresh else self._begun + 1
            self._hurry = self._hurry or wanted > self._begun
            if self._closed is None and self._start():
                self._lock.notify_all()
                self._lock.wait_for(lambda: self._done(wanted) or self._thread is None, 3 * WAIT)
                if self._latest is not None:
                    return self._latest
        return self._make(ask=False)  # The session, or the interpreter, has ended.

    def seen(self, machine: str) -> Seen | None:
        """What machine `machine` (an id) has said so far."""
        return self._asker.seen.get(machine)

    def close(self) -> None:
        """The session has ended: the last document is as it was then. Idempotent."""
        with self._lock:
            if self._closed is not None:
                return
            self._closed = time.time()
            thread, used = self._thread, self._latest is not None
            self._lock.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(WAIT)
        if used:
            self._make(ask=False)
        self._asker.close()

    def _done(self, wanted: int) -> bool:
        return self._latest is not None and self._latest.value["tick"] >= wanted

    # -- Its thread --------------------------------------------------------------------------------------------------

    def _start(self) -> bool:
        """With the lock held. False where there can be no thread any more."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="bigmachine-status", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
        return True

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._hurry or self._closed is not None, max(0.0, due - time.monotonic()))
                unwatched = time.monotonic() - self._looked > LINGER
                if self._closed is not None or (unwatched and not self._hurry) or self._session() is None:
                    self._end()
                    break
                self._hurry = False
                self._begun += 1
            due = time.monotonic() + self._interval
            try:
                self._make(ask=True)
            except Exception:  # Who looks next begins anew.
                report_bug("the status of the session")
                with self._lock:
                    self._end()
                    self._lock.notify_all()
                break

    def _end(self) -> None:
        """With the lock held: the next thread has an asker that rests."""
        self._asker.rest()
        self._thread = None

    def _make(self, ask: bool) -> Snapshot:
        session = self._session()
        assert session is not None  # Whoever looks has it.
        if ask:
            self._asker.ask(session.machines())
        machines = session.machines()
        methods = self._asker.methods(machines)
        with self._lock:
            lookers = sum(1 for each in self._looks if each > time.monotonic() - self._poll)
        running = sum(1 for each in machines if each.state is State.RUNNING)
        self._interval, self._poll = pace(running, lookers)
        value = document(
            session,
            self._asker.seen,
            methods,
            tick=self._begun,
            interval=self._interval,
            poll=self._poll,
            ended=self._closed,
        )
        body = json.dumps(value, separators=(",", ":"), default=str).encode()
        tag = f'"{self._nonce}-{self._begun}{"-end" if self._closed is not None else ""}"'
        snapshot = Snapshot(time.monotonic(), value, body, gzip.compress(body, 1, mtime=0), tag)
        with self._lock:
            self._latest = snapshot
            self._lock.notify_all()
        return snapshot


def pace(machines: int, lookers: int) -> tuple[float, float]:
    """Seconds between two documents about so many machines, and after which so many who look should come back."""
    interval = max(INTERVAL, machines / MACHINES)
    return interval, max(interval, lookers / POLLS)


_monitors: weakref.WeakKeyDictionary[Cluster, Monitor] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def of(session: Cluster) -> Monitor:
    """The monitor of `session`: one, whoever looks, and wherever its pages are mounted."""
    with _making:
        monitor = _monitors.get(session)
        if monitor is None:
            monitor = _monitors[session] = Monitor(session)
        return monitor


# -- Asking --------------------------------------------------------------------------------------------------------------


class _Asker:
    """Asks machines, and remembers what they say: `seen`, by their ids. Used by one thread at a time."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}
        self._open: dict[str, dict[tuple[str, str], _Question]] = {}  # By machine; by process and method.
        self._pool: ThreadPoolExecutor | None = None
        self._before: dict[str, tuple[float, float, dict[str, float]]] = {}  # When; calls; processors' seconds.
        self._totals: tuple[float, dict[str, int], dict[str, int]] | None = None

    def ask(self, machines: list[Machine]) -> None:
        """Ask all that run. Returns when all that were asked now have answered, after `WAIT` seconds at the latest."""
        now = time.monotonic()
        if self._totals is not None and now - self._totals[0] > LINGER:  # Nobody has looked meanwhile.
            self._totals = None
            self._before.clear()
            for seen in self.seen.values():
                for points in (seen.memory, seen.cpu, seen.load, seen.calls):
                    points.clear()
        running = [machine for machine in machines if machine.state is State.RUNNING]
        asked = [question for machine in running for question in self._questions(machine, now)]
        for question in asked:
            left = max(0.0, now + WAIT - time.monotonic())
            try:
                question.call.exception(left)
            except Exception:  # It was cancelled, or takes longer: `_read` finds out.
                pass
        for machine in running:
            self._read(machine, time.monotonic())

    def rest(self) -> None:
        """Nobody looks any more."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Wait for nothing any more."""
        self.rest()
        for questions in list(self._open.values()):
            for question in list(questions.values()):
                question.call.cancel()
        self._open.clear()

    def _questions(self, machine: Machine, now: float) -> Iterator[_Question]:
        pool = self._pool = self._pool or ThreadPoolExecutor(ASKERS, "bigmachine-status")
        questions = self._open.setdefault(machine.id, {})
        for process, client in machine.processes:
            for method in (VITALS,) if process == SUPERVISOR else (STATS, DOING):
                before = questions.get((process, method))
                if before is not None and not before.call.done() and now - before.asked < GIVE_UP:
                    continue
                if before is not None:
                    before.call.cancel()
                question = _Question(Call(), now)
                try:
                    pool.submit(_ask, client, method, question.call)
                except RuntimeError:  # The interpreter, or the session, is ending: what was said last stands.
                    questions.pop((process, method), None)
                    return
                questions[process, method] = question
                yield question

    def _read(self, machine: Machine, now: float) -> None:
        """Take what machine has answered."""
        seen = self.seen.setdefault(machine.id, Seen())
        silent: dict[str, str] = {}
        questions = self._open.setdefault(machine.id, {})
        for (process, method), question in list(questions.items()):
            if not question.call.done():
                silent.setdefault(process, f"no answer for {now - question.asked:.0f} s")
                continue
            del questions[process, method]
            try:
                answer = question.call.result(0)
            except Exception as error:
                if method != DOING:
                    silent[process] = first_line(error)
                continue
            if method == VITALS:
                seen.vitals = answer
            elif method == STATS:
                seen.stats[process] = {name: stats for name, stats in answer.items() if not is_ours(name)}
            else:
                seen.doing[process] = answer
        for process in silent:
            seen.doing.pop(process, None)
        seen.missing = ", ".join(f"process {process}: {why}" for process, why in silent.items())
        if SUPERVISOR in silent:
            seen.missing = silent[SUPERVISOR]
        self._compare(machine.id, seen, now, answered=SUPERVISOR not in silent)

    def _compare(self, id: str, seen: Seen, now: float, *, answered: bool) -> None:
        """What has happened since the last time: rates and histories."""
        calls = float(sum(stats.count for by_name in seen.stats.values() for stats in by_name.values()))
        used = {each.process: each.cpu for each in seen.vitals.processes} if seen.vitals is not None else {}
        before = self._before.get(id)
        self._before[id] = now, calls, used
        rate = None
        if before is not None:
            passed = max(1e-3, now - before[0])
            rate = max(0.0, (calls - before[1]) / passed)
            seen.percents = {
                process: 100.0 * max(0.0, seconds - before[2][process]) / passed
                for process, seconds in used.items()
                if process in before[2]
            }
        vitals: Vitals | None = seen.vitals if answered else None
        seen.memory.append(None if vitals is None else vitals.memory.used_percent)
        seen.cpu.append(None if vitals is None or vitals.cpu is None else round(vitals.cpu, 1))
        seen.load.append(None if vitals is None else round(vitals.load.load1, 2))
        seen.calls.append(None if rate is None else round(rate, 1))

    def methods(self, machines: list[Machine]) -> dict[str, Figures]:
        """Figures of all methods but ours: of the calls that machines have served, as far as they have said, and of those that
        this process has made."""
        served: dict[str, MethodStats] = {}
        called: dict[str, MethodStats] = {}
        for seen in list(self.seen.values()):
            for by_name in list(seen.stats.values()):
                merge_stats(served, by_name)
        for machine in machines:
            merge_stats(called, {name: stats for name, stats in machine.call_stats().items() if not is_ours(name)})
        now = time.monotonic()
        before, self._totals = self._totals, (now, _counts(served), _counts(called))
        return {
            name: Figures(
                served.get(name),
                None if before is None else _rate(served, before[1], name, now - before[0]),
                called.get(name),
                None if before is None else _rate(called, before[2], name, now - before[0]),
            )
            for name in served.keys() | called.keys()
        }


def _counts(methods: Mapping[str, MethodStats]) -> dict[str, int]:
    return {name: stats.count for name, stats in methods.items()}


def _rate(methods: Mapping[str, MethodStats], before: Mapping[str, int], name: str, passed: float) -> float | None:
    if name not in methods or passed <= 0:
        return None
    return max(0.0, (methods[name].count - before.get(name, 0)) / passed)


def _ask(client: Client, method: str, call: Call[Any]) -> None:
    """Send the question; does not wait for the answer, but perhaps for a connection."""
    if call.done():
        return
    try:
        client.submit(call, method, client.codec.encode_call(method, (), {}), GIVE_UP)
    except Exception as error:  # Nobody else would hear of it.
        call.complete(raiser(error))
