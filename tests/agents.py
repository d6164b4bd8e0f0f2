"""Agents as local processes, with cache directories of their own: hosts, as far as the driver can tell."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rpc_pair import SOON
from test_packed import once
from wheelhouse import make_wheelhouse, offline

from bigmachine.cache import Cache
from bigmachine.credentials import Credentials
from bigmachine.info import platform_name
from bigmachine.pack.build import Request, pack
from bigmachine.pack.progress import Silent
from bigmachine.pack.tars import write_code_tar
from bigmachine.system import Launched, Order
from bigmachine.systems.remote import Trust
from bigmachine.systems.remote.client import AgentClient
from bigmachine.systems.remote.deliver import Delivery
from bigmachine.systems.remote.source import LOADER, agent_source, agent_text


class AgentProcess:
    """An agent that listens on the loopback interface; a context manager that kills what is left of its session.

    `settings` are the agent's; `limits` is called in the process before Python is executed; `constants` are others than the
    modules' own. Without a `cache` it chooses one itself.
    """

    def __init__(
        self,
        trust: Trust,
        cache: Path | None,
        id: str = "m-1",
        *,
        python: str = sys.executable,
        limits: Callable[[], None] | None = None,
        environ: Mapping[str, str] | None = None,
        constants: Mapping[str, float] | None = None,
        **settings: Any,
    ) -> None:
        self.trust = trust
        self.id = id
        self.cache = cache or Path()
        self.clients: list[AgentClient] = []
        self.process = subprocess.Popen(
            [python, "-c", LOADER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=limits,
            env=None if environ is None else {**os.environ, **environ},
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.said = b""
        settings = {"bind": "127.0.0.1", "cache": str(cache or ""), **settings}
        self.process.stdin.write(_source(trust.agent(id), settings, constants or {}))
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(SOON)
            self.close()
            raise AssertionError(f"the agent did not start: {self.said.decode()}")
        said = json.loads(line)
        assert said["pid"] == self.process.pid
        self.port: int = said["port"]

    def client(self, **options: Any) -> AgentClient:
        client = AgentClient("127.0.0.1", self.port, self.id, self.trust.context, **options)
        self.clients.append(client)
        return client

    def stderr(self) -> str:
        """What it has said by now; all, where it has ended."""
        stream = self.process.stderr
        assert stream is not None
        if not stream.closed:
            while select.select([stream], [], [], 0)[0] and (data := os.read(stream.fileno(), 65536)):
                self.said += data
        return self.said.decode()

    def wait(self) -> int:
        return self.process.wait(SOON)

    def work(self) -> list[Path]:
        """What agents on this cache have under way, apart from their locks."""
        return [path for path in (self.cache / "work").glob("*/*") if path.name not in ("lock", "id")]

    def kill(self) -> None:
        """Its process group; service processes die with their supervisor."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """The session's processes are killed; a supervisor's services die with it."""
        for client in self.clients:
            client.close()
        self.kill()
        self.process.wait(SOON)
        self.stderr()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()

    def __enter__(self) -> AgentProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _source(credentials: Credentials, settings: Mapping[str, Any], constants: Mapping[str, float]) -> bytes:
    if not constants:
        return agent_source(credentials, settings)
    text = agent_text(credentials, settings)
    for name, value in constants.items():
        text, count = re.subn(f"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
        assert count == 1, name
    return f"exec({text!r})\n".encode()


class AgentLauncher:
    """`system.Launcher`: hosts are agents on this one, each with the next of the cache directories `hosts` (which go round).

    `file` is delivered, whatever the program's own. `deliveries` are the launches'.
    """

    name = "agents"

    def __init__(
        self,
        hosts: Sequence[Path],
        file: Path | None = None,
        maxprocs: int = 2,
        cache: Cache | None = None,
        **settings: Any,
    ) -> None:
        self._cache = cache
        self.ships = (platform_name(),) if file is None else ()
        self._hosts = hosts
        self._file = file
        self._maxprocs = maxprocs
        self._settings = settings
        self._trust = Trust()
        self._lock = threading.Lock()
        self._gone = threading.Condition(self._lock)
        self._stopped: set[str] = set()
        self._launches: dict[str, tuple[threading.Thread, Delivery]] = {}
        self._count = 0
        self.agents: dict[str, AgentProcess] = {}
        self._ended: dict[str, str] = {}
        self._callbacks: dict[str, list[Callable[[str], None]]] = {}
        self.deliveries: list[Delivery] = []

    def prepare(self) -> None:
        """Nothing to be done."""

    def launch(self, orders: Sequence[Order]) -> list[Future[Launched]]:
        file = self._file or orders[0].program.file
        assert file is not None
        delivery = Delivery(file, len(orders), self._cache)
        self.deliveries.append(delivery)
        futures: list[Future[Launched]] = []
        for order in orders:
            future: Future[Launched] = Future()
            futures.append(future)
            thread = threading.Thread(target=self._launch, args=(order, delivery, future), daemon=True)
            self._launches[order.id] = (thread, delivery)
            thread.start()
        return futures

    def _launch(self, order: Order, delivery: Delivery, future: Future[Launched]) -> None:
        try:
            with self._lock:
                cache = self._hosts[self._count % len(self._hosts)]
                self._count += 1
            agent = AgentProcess(self._trust, cache, order.id, **self._settings)
            client = agent.client()
            with self._lock:
                self.agents[order.id] = agent
                stopped = order.id in self._stopped
            threading.Thread(target=self._watch, args=(agent,), daemon=True).start()
            if stopped:
                agent.kill()
            future.set_result(
                delivery.deliver(order, client, host="localhost", maxprocs=self._maxprocs, peer_host="127.0.0.1")
            )
        except Exception as error:
            future.set_exception(error)

    def _watch(self, agent: AgentProcess) -> None:
        assert agent.process.stderr is not None
        for line in agent.process.stderr:
            agent.said += line
        code = agent.process.wait()
        with self._lock:
            reason = self._ended[agent.id] = f"its process ended with code {code}"
            callbacks = self._callbacks.pop(agent.id, [])
            self._gone.notify_all()
        for callback in callbacks:
            callback(reason)

    def stop(self, id: str, grace: float) -> None:
        with self._lock:
            if id not in self._launches:
                return
            thread, delivery = self._launches[id]
            self._stopped.add(id)
            agent = self.agents.get(id)
        delivery.cancel(id)
        if agent is not None:
            agent.process.terminate()
            with self._lock:
                ended = self._gone.wait_for(lambda: id in self._ended, grace)
            if not ended:
                agent.kill()
        thread.join(SOON)
        with self._lock:
            self._gone.wait_for(lambda: id in self._ended or id not in self.agents, SOON)

    def ended(self, id: str) -> str | None:
        return self._ended.get(id)

    def on_end(self, id: str, callback: Callable[[str], None]) -> None:
        with self._lock:
            if id not in self._ended:
                self._callbacks.setdefault(id, []).append(callback)
                return
        callback(self._ended[id])

    def console(self, id: str) -> str:
        agent = self.agents.get(id)
        return agent.said.decode() if agent is not None else ""

    def close(self) -> None:
        for agent in self.agents.values():
            agent.close()
        for delivery in self.deliveries:
            delivery.close()


class MadePart(NamedTuple):
    """A part, and its compressed form in a file."""

    digest: str
    size: int
    path: Path
    packed: int


def make_part(folder: Path, files: Mapping[str, bytes]) -> MadePart:
    """A part of these files."""
    tar = io.BytesIO()
    write_code_tar(files, tar)
    data = tar.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    folder.mkdir(exist_ok=True)
    path = folder / digest
    path.write_bytes(zlib.compress(data, 6))
    return MadePart(digest, len(data), path, path.stat().st_size)


def pack_bare(folder: Path) -> Path:
    """The toolkit without a program, packed, in a directory that all processes of a test run share; made by the first."""
    wheels, file = folder / "wheels", folder / "bare" / "bare.pex"
    with once(wheels) as mine:
        if mine:
            make_wheelhouse(wheels)
    with once(file.parent) as mine, pytest.MonkeyPatch.context() as patch:
        if mine:
            for name, value in {**offline(wheels), "PEX_ROOT": str(folder / "pex")}.items():
                patch.setenv(name, value)
            file.parent.mkdir(exist_ok=True)
            script = file.with_name("bare.py")
            script.write_text("from bigmachine.worker import bare\n\nbare()\n")
            request = Request(script, platforms=(platform_name(),), output=file)
            pack(request, Cache(folder / "cache"), Silent())
    return file
