"""How a program gets to the hosts of a launch: each part leaves the driver once, as far as that can be, and hosts share it.

Theory of operation
-------------------
Every host's thread asks `next_move` what to do next, does it, and asks again, until its host has everything. All decisions
are functions of what is known (`State`); what is known changes when a move ends.

Rule 1. A part that another host has is fetched from there. One that nobody has is sent by the driver, to whoever asks first:
so different hosts get different parts at the same time, and then exchange them.
Rule 2. A part that is on its way from the driver to somebody is waited for, unless that has come to a standstill.
Rule 3. What one host could not fetch from another it does not try to fetch from there again: the driver sends then.
Rule 4. A host becomes a machine when it has everything, and stops serving parts by that. So the only one that has what others
still need, or may need that are yet to come, waits for them; not for longer than `HOLD`. Who had everything from the beginning
does not wait for those who are yet to come: most likely they have it, too, and else the first of them waits for the others.
Rule 5. Hosts are counted by their cache: of agents that share one, any may bring a part in.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ...address import format_address
from ...bootstrap.requests import ticket
from ...cache import Cache
from ...errors import BigmachineError, CacheError
from ...info import Step
from ...pack.archive import Contents, read_contents, write_part
from ...pack.image import Part
from ...program import ENVIRON, OPTIONS, RUN
from ...supervisor.remote import MAIN
from ...system import Launched, Order
from . import AgentUnreachable, RemoteHostError
from .client import AgentClient, AgentInfo, Peer

LEVEL = 6
"""Of zlib, for what is sent: the one that `Part.packed` is measured with."""

STREAMS = 3
"""Moves to one host at a time: small parts do not wait for each other's answers."""

STALLED = 5.0
"""Seconds without progress after which nobody waits for what the driver sends to somebody else."""

HOLD = 30.0
"""Seconds for which a host that has everything may be kept from becoming a machine, for the others' sake."""

STAY = 60.0
"""Seconds between two signs of life to an agent that waits: agents end of themselves after `IDLE` of their launchers."""

WORTH = 256 * 1024
"""Bytes that are rather sent again than waited for."""

SERVES = 4
"""Hosts that fetch from one host at a time."""


# -- What to do: pure ----------------------------------------------------------------------------------------------------


@dataclass
class Site:
    """One agent. `reachable` says whether other hosts can connect to it, and it to them; `serving` ends before it executes;
    `cold` is whether much was missing there when it came."""

    id: str
    store: str
    reachable: bool = True
    serving: bool = True
    cold: bool = True


@dataclass
class Move:
    """A part on its way to `store`: from the agent `source`, or from the driver (None)."""

    digest: str
    store: str
    source: str | None
    stalled: bool = False


@dataclass
class State:
    """What is known. `have` is by store; `broken` are (store, source) between which nothing could be fetched; `coming` is how
    many agents are still expected."""

    sites: dict[str, Site] = field(default_factory=dict)
    have: dict[str, set[str]] = field(default_factory=dict)
    moves: list[Move] = field(default_factory=list)
    broken: set[tuple[str, str]] = field(default_factory=set)
    coming: int = 0

    def lacks(self, store: str, want: Sequence[str]) -> list[str]:
        """What of `want` is not there, and not on its way."""
        moving = {move.digest for move in self.moves if move.store == store}
        return [digest for digest in want if digest not in self.have[store] and digest not in moving]

    def sources(self, site: Site, digest: str) -> list[Site]:
        """From whom it can fetch a part, the least busy first."""
        load = Counter(move.source for move in self.moves)
        found = [
            other
            for other in self.sites.values()
            if self.fetches(site, other) and digest in self.have[other.store] and load[other.id] < SERVES
        ]
        return sorted(found, key=lambda other: load[other.id])

    def fetches(self, site: Site, other: Site) -> bool:
        """Whether it can."""
        return (
            site.reachable
            and other.reachable
            and other.serving
            and other.store != site.store
            and (site.store, other.id) not in self.broken
        )


def next_move(state: State, site: Site, want: Sequence[str]) -> Move | None:
    """What is to be brought to `site` now; None where there is nothing, or nothing yet (see the module's rules)."""
    lacks = state.lacks(site.store, want)
    for digest in lacks:
        if sources := state.sources(site, digest):
            return Move(digest, site.store, sources[0].id)
    for digest in lacks:
        if not _awaited(state, site, digest):
            return Move(digest, site.store, None)
    return None


def _awaited(state: State, site: Site, digest: str) -> bool:
    """Whether somebody from whom `site` could fetch the part is being sent it, or has it and is busy."""
    arriving = {move.store for move in state.moves if move.digest == digest and not move.stalled}
    return any(
        state.fetches(site, other) and (other.store in arriving or digest in state.have[other.store])
        for other in state.sites.values()
    )


def needed(state: State, site: Site, want: Sequence[str]) -> bool:
    """Whether others lack, or may come to lack, what nobody but `site` can give them."""
    if not site.reachable:
        return False
    others = [other for other in state.sites.values() if other is not site and other.serving and other.reachable]
    elsewhere = set().union(*(state.have[other.store] for other in others))
    if site.cold and state.coming and not elsewhere.issuperset(want):
        return True
    lacking = [other for other in others if state.fetches(other, site)]
    return any(not elsewhere.union(state.have[other.store]).issuperset(want) for other in lacking)


# -- Doing it ------------------------------------------------------------------------------------------------------------


@dataclass
class _Host:
    """One agent, and what it is to get."""

    site: Site
    client: AgentClient
    info: AgentInfo
    peer: tuple[str, int]
    parts: dict[str, Part]
    failure: BaseException | None = None
    sent: float = 0.0
    """When the last bytes were sent to it, as of `time.time`."""


class Delivery:
    """The delivery of the packed program `file` to the hosts of one launch, `expected` in number. Their threads call `deliver`.

    `platforms` are those that the hosts may have: their parts, where it was packed for them, are compressed before the first
    host asks. `sent` is the number of bytes of parts that have left this process, `parts_sent` how often each part has, by
    digest. Raises `PackError`.
    """

    def __init__(
        self, file: Path, expected: int = 1, cache: Cache | None = None, platforms: Sequence[str] = ()
    ) -> None:
        self.sent = 0
        self.parts_sent: Counter[str] = Counter()
        self._file = file
        self._contents = read_contents(file)
        self._state = State(coming=expected)
        self._hosts: dict[str, _Host] = {}
        self._marks: dict[str, list[tuple[str, float]]] = {}
        self._cancelled: set[str] = set()
        self._changed = threading.Condition()
        self._stack = contextlib.ExitStack()
        self._compressed = _Compressed(file, self._open_cache(cache))
        packed = [each for each in self._contents.platforms if each.platform in platforms]
        parts = [part for each in packed for part in each.worker()]
        if parts:
            threading.Thread(
                target=self._compressed.warm, args=(parts,), name="bigmachine-compress", daemon=True
            ).start()

    def _open_cache(self, cache: Cache | None) -> Cache:
        try:
            cache = cache or Cache()
            self._stack.enter_context(cache.use())
        except CacheError:  # A home that cannot be written to: a directory of our own, for this once.
            cache = Cache(Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="bigmachine-"))))
        return cache

    def deliver(
        self,
        order: Order,
        client: AgentClient,
        *,
        host: str,
        port: int = 0,
        maxprocs: int = 0,
        peer_host: str | None = "",
        on_exit: Sequence[str] = (),
    ) -> Launched:
        """Make the host of `client` the machine of `order`; returns when it is one.

        `host` and `port` (0: the agent's) are where driver and machines reach it; `peer_host` where other hosts do (empty: as
        `host`; None: not at all). `maxprocs` 0: the host's cores. `on_exit` is executed there when the machine has ended.
        Raises `PackError` where the program was not packed for that platform, `RemoteHostError`, `AgentUnreachable`;
        the agent has been told to end then.
        """
        joined: _Host | None = None
        try:
            info = client.info(python=self._contents.python)
            parts = self._contents.manifest(info.platform).worker()
            joined = self._join(order.id, client, info, parts, peer_host if peer_host is None else peer_host or host)
            self._mark(order.id, "upload")
            with self._kept(joined):
                self._bring(joined)
                self._mark(order.id, "unpack", joined.sent)
                self._mark(order.id, "share")
                self._hold(joined)
            self._mark(order.id, "exec")
            launched = Launched(order.id, host, port or client.port, maxprocs or info.cpus)
            python = self._contents.manifest(info.platform).python
            request = _request(order, launched, self._contents, python, parts, on_exit)
            client.execute(request)
            return launched
        except AgentUnreachable:
            raise
        except BaseException:
            client.shutdown()
            raise
        finally:
            self._mark(order.id, "")
            self._leave(joined)

    def steps(self, id: str) -> list[Step]:
        """How far that order has got: ``upload``, ``unpack`` (what of it was left to do when the last bytes had been sent),
        ``share`` (while others still fetched from it), ``exec``. Steps that took no time are left out."""
        with self._changed:
            marks = list(self._marks.get(id, ()))
        steps = [Step(name, began, ended - began) for (name, began), (_, ended) in itertools.pairwise(marks)]
        return [step for step in steps if step.seconds > 0.001 or step.name == "exec"]

    def _mark(self, id: str, step: str, at: float | None = None) -> None:
        """A step begins, `at` (0: it does not); the one before has ended."""
        with self._changed:
            if at != 0:
                self._marks.setdefault(id, []).append((step, time.time() if at is None else at))

    def cancel(self, id: str) -> None:
        """The machine of that order is not wanted any more: its `deliver` ends with an error, begun or not. What is being
        sent to its agent fails when that is ended, which is the launcher's to do."""
        with self._changed:
            self._cancelled.add(id)
            if (host := self._hosts.get(id)) is not None:
                self._stop(host)

    def _stop(self, host: _Host) -> None:
        host.failure = host.failure or AgentUnreachable(host.client.address, "its machine was stopped")
        host.client.close()
        self._changed.notify_all()

    def lost(self) -> None:
        """One of the expected hosts will never come."""
        with self._changed:
            self._state.coming = max(0, self._state.coming - 1)
            self._changed.notify_all()

    def close(self) -> None:
        """Give the cache back."""
        self._compressed.closed = True
        self._stack.close()

    # -- A host's way ----------------------------------------------------------------------------------------------------

    def _join(
        self, id: str, client: AgentClient, info: AgentInfo, parts: Sequence[Part], peer_host: str | None
    ) -> _Host:
        lacks = sum(part.packed for part in parts if part.digest not in info.parts)
        site = Site(id, info.store, peer_host is not None, cold=lacks > WORTH)
        host = _Host(site, client, info, (peer_host or "", client.port), {part.digest: part for part in parts})
        with self._changed:
            self._state.coming = max(0, self._state.coming - 1)
            self._state.sites[id] = site
            self._state.have.setdefault(info.store, set()).update(info.parts)
            self._hosts[id] = host
            if id in self._cancelled:
                self._stop(host)
            self._changed.notify_all()
        return host

    def _leave(self, host: _Host | None) -> None:
        """It is a machine, or will never be one."""
        if host is None:
            self.lost()
            return
        with self._changed:
            host.site.serving = False
            self._state.sites.pop(host.site.id)
            self._changed.notify_all()

    @contextlib.contextmanager
    def _kept(self, host: _Host) -> Iterator[None]:
        """While the block lasts the agent hears of us: it may wait long for what others are being sent, or for what is being
        compressed, and would end."""
        over = threading.Event()

        def keep() -> None:
            while not over.wait(STAY):
                with contextlib.suppress(AgentUnreachable, RemoteHostError):  # Who sends to it will find out.
                    host.client.info(python=self._contents.python)

        threading.Thread(target=keep, name=f"bigmachine-keep-{host.site.id}", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _bring(self, host: _Host) -> None:
        """Returns when the host has everything."""
        with self._changed:
            lacks = len(self._state.lacks(host.site.store, list(host.parts)))
        helpers = [
            threading.Thread(target=self._pump, args=(host,), name=f"bigmachine-send-{host.site.id}", daemon=True)
            for _ in range(min(STREAMS, lacks) - 1)
        ]
        for helper in helpers:
            helper.start()
        self._pump(host)
        for helper in helpers:
            helper.join()
        if host.failure is not None:
            raise host.failure

    def _pump(self, host: _Host) -> None:
        want = list(host.parts)
        while True:
            with self._changed:
                move = None
                while host.failure is None and not self._state.have[host.site.store].issuperset(want):
                    move = next_move(self._state, host.site, want)
                    if move is not None:
                        self._state.moves.append(move)
                        break
                    self._changed.wait()
                if move is None:
                    return
            try:
                self._make(move, host)
            except Exception as error:  # Whatever it is: `_bring` raises it.
                with self._changed:
                    host.failure = host.failure or error
                    self._changed.notify_all()

    def _make(self, move: Move, host: _Host) -> None:
        done = False
        try:
            if move.source is None:
                self._send(move, host)
                done = True
            else:
                done = self._fetch(move, host)
        finally:
            with self._changed:
                self._state.moves.remove(move)
                if done:
                    self._state.have[move.store].add(move.digest)
                elif move.source is not None:
                    self._state.broken.add((move.store, move.source))
                self._changed.notify_all()

    def _send(self, move: Move, host: _Host) -> None:
        part = host.parts[move.digest]
        path = self._compressed.path(part)
        progress = _Progress(self, move)
        with progress.watched():
            host.client.put_part(part.digest, part.size, path, progress.count)
        with self._changed:
            host.sent = max(host.sent, progress.last)
            self.parts_sent[part.digest] += 1

    def count(self, sent: int) -> None:
        """Bytes have left."""
        with self._changed:
            self.sent += sent

    def stalled(self, move: Move, stalled: bool) -> None:
        """Whether nobody should wait for it."""
        with self._changed:
            if move.stalled != stalled:
                move.stalled = stalled
                self._changed.notify_all()

    def _fetch(self, move: Move, host: _Host) -> bool:
        assert move.source is not None
        source = self._hosts[move.source]
        name, port = source.peer
        peer = Peer(name, port, source.client.name, ticket(source.info.secret, move.digest))
        try:
            host.client.fetch(move.digest, host.parts[move.digest].size, [peer])
        except (RemoteHostError, AgentUnreachable):
            # Rule 3. Where it was this host's own fault, as with a full disk, the driver's try will show it.
            return False
        return True

    def _hold(self, host: _Host) -> None:
        """Rule 4. Returns when nobody fetches from it, nor will."""
        deadline = time.monotonic() + HOLD
        want = list(host.parts)
        with self._changed:
            while host.failure is None and needed(self._state, host.site, want):
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    break
            host.site.serving = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: not any(move.source == host.site.id for move in self._state.moves), HOLD)
            if host.failure is not None:
                raise host.failure


class _Progress:
    """Counts what is sent for a move, and notices when that stands still."""

    def __init__(self, delivery: Delivery, move: Move) -> None:
        self._delivery = delivery
        self._move = move
        self._last = time.monotonic()
        self.last = 0.0

    def count(self, sent: int) -> None:
        """Bytes were sent."""
        self._last = time.monotonic()
        self.last = time.time()
        self._delivery.count(sent)
        self._delivery.stalled(self._move, False)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """While the block lasts."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(STALLED / 5):
                if time.monotonic() - self._last > STALLED:
                    self._delivery.stalled(self._move, True)

        threading.Thread(target=watch, name="bigmachine-progress", daemon=True).start()
        try:
            yield
        finally:
            over.set()


class _Compressed:
    """The compressed form of parts: made once, and kept in the cache."""

    def __init__(self, file: Path, cache: Cache) -> None:
        self.closed = False
        self._file = file
        self._cache = cache
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}

    def path(self, part: Part) -> Path:
        """The file with its compressed form. Raises `PackError`, `CacheError`."""
        with self._lock:
            lock = self._locks.setdefault(part.digest, threading.Lock())
        with lock:
            return self._cache.put("images", f"z-{part.digest}", lambda folder: self._fill(part, folder)) / "z"

    def _fill(self, part: Part, folder: Path) -> None:
        with open(folder / "z", "wb") as file:
            compressing = _Compressing(file)
            write_part(self._file, part, compressing)  # type: ignore[arg-type] # It needs no more than `write`.
            compressing.finish()

    def warm(self, parts: Sequence[Part]) -> None:
        """Make those that are not there."""
        for part in parts:
            if self.closed:
                return
            try:
                self.path(part)
            except (BigmachineError, OSError):
                return  # Who needs it is told.


def _request(
    order: Order, launched: Launched, contents: Contents, python: str, parts: Sequence[Part], on_exit: Sequence[str]
) -> Mapping[str, Any]:
    """For the agent: see `bootstrap.agent._Plan`."""
    program = order.program
    (code,) = (part.digest for part in parts if part.kind == "code")
    return {
        "machine": order.id,
        "credentials": order.credentials.to_json(),
        "address": format_address(launched.host, launched.port, order.id),
        "lease": order.lease,
        "maxprocs": launched.maxprocs,
        "python": python,
        "parts": [part.digest for part in parts if part.kind != "code"],
        "code": code,
        "program": {"name": contents.name, "entry": contents.entry, "digest": contents.digest},
        "args": list(program.argv[len(program.argv) - program.own_args :]),
        "environ": {**ENVIRON, **program.environ},
        "cwd": program.cwd,
        "on_exit": list(on_exit),
        "supervisor": ["-I", "-S", "-c", MAIN],
        "worker": [*OPTIONS, "-c", RUN],
    }


class _Compressing:
    """A file to write to, whose compressed form goes into another."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._compressor = zlib.compressobj(LEVEL)

    def write(self, data: bytes) -> int:
        self._out.write(self._compressor.compress(data))
        return len(data)

    def finish(self) -> None:
        self._out.write(self._compressor.flush())


def deliver(order: Order, client: AgentClient, file: Path, *, host: str, maxprocs: int = 0) -> Launched:
    """`Delivery.deliver`, for one host."""
    delivery = Delivery(file)
    try:
        return delivery.deliver(order, client, host=host, maxprocs=maxprocs)
    finally:
        delivery.close()
