"""What it costs to be looked at: calls while fifty browsers poll the status, a start with the debug server and without.

``python benchmarks/bench_inside.py`` prints a Markdown table. Environment: SMOKE=1 makes it short and meaningless.

Every two things that are compared are measured in turns, and their ratio is taken within a turn: a shared machine drifts. The
browsers are one process of their own, with a connection each, that takes answers compressed, as browsers do.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from harness import SMOKE, Rated, pump

CLIENTS = 50
EVERY = 2.0
SETTLED = 1.0 if SMOKE else 6.0
"""Seconds after which all browsers have asked, and have been told when to come back."""

TURNS = 2 if SMOKE else 12
SECONDS = 0.5 if SMOKE else 5.0
"""Of half a turn: a round of all browsers."""

MACHINES = 2 if SMOKE else 200

START = """
import sys, time
sys.path.insert(0, {folder!r})
import bigmachine, bigmachine.launch, bigmachine.authority, bigmachine.systems.local
began = time.process_time()
with bigmachine.start("local", http={http!r}) as b:
    print(time.process_time() - began)
"""


class Echo:
    def echo(self, x: int) -> int:
        return x


# -- The browsers --------------------------------------------------------------------------------------------------------


async def _browse(port: int) -> None:
    """All of them: they poll after a line on standard input, stop after the next, and so on until its end."""
    polling = asyncio.Event()

    async def one(number: int) -> None:
        reader = writer = None
        while True:
            await polling.wait()
            await asyncio.sleep(EVERY * number / CLIENTS)
            while polling.is_set():
                try:
                    if writer is None or reader is None:
                        reader, writer = await asyncio.open_connection("localhost", port)
                    poll = await _ask(reader, writer)
                except (ConnectionError, asyncio.IncompleteReadError):  # The server closes connections that are idle.
                    reader = writer = None
                    continue
                await asyncio.sleep(poll)

    clients = [asyncio.create_task(one(number)) for number in range(CLIENTS)]
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        (polling.clear if polling.is_set() else polling.set)()
        if failed := [client.exception() for client in clients if client.done()]:
            raise SystemExit(f"a browser has failed: {failed[0]!r}")
    os._exit(0)


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
    """Seconds after which the document says to come back, as the page does."""
    writer.write(b"GET /debug/bigmachine/status.json HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: gzip\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"not a status: {head[:100]!r}")
    (length,) = (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    body = await reader.readexactly(int(length.split()[1]))
    return float(json.loads(gzip.decompress(body))["poll"])


class Browsers:
    """All of them, in a process of their own; they poll within ``with``."""

    def __init__(self, port: int) -> None:
        command = [sys.executable, __file__, "browse", str(port)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)

    def _tell(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def __enter__(self) -> None:
        self._tell()
        time.sleep(SETTLED)  # All of them have asked, and been told when to come back.

    def __exit__(self, *_: object) -> None:
        self._tell()
        time.sleep(EVERY)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        if self._process.wait():
            raise SystemExit("the browsers have failed")


# -- What is measured ----------------------------------------------------------------------------------------------------


class Half(NamedTuple):
    """Of a turn: calls a second, and the driver's own processor seconds a call."""

    rate: float
    cost: float


def _looked_at() -> list[str]:
    import bigmachine
    from bigmachine.inside import monitor

    monitor.LINGER = 0.5  # So that in the other half of a turn nobody looks.
    with bigmachine.start("local", http="localhost:0") as b:
        (machine,) = b.start(1, {"Echo": Echo()})
        machine.wait()
        browsers = Browsers(int(b.logs.last(1, "")[0].text.rpartition(":")[2].partition("/")[0]))

        def one_by_one(seconds: float) -> Rated:
            calls, began = 0, time.perf_counter()
            while time.perf_counter() - began < seconds:
                machine.call("Echo.echo", calls)
                calls += 1
            return calls, time.perf_counter() - began

        def many(seconds: float) -> Rated:
            return pump(lambda x: machine.submit("Echo.echo", x), lambda call: call.result(), seconds)

        def half(way: Callable[[float], Rated]) -> Half:
            used = time.process_time()
            calls, seconds = way(SECONDS)
            return Half(calls / seconds, (time.process_time() - used) / calls)

        rows = []
        for name, way in (("one caller", one_by_one), ("64 in flight", many)):
            way(SECONDS)
            turns: list[tuple[Half, Half]] = []
            for turn in range(TURNS):
                halves = {}
                for looked_at in (False, True) if turn % 2 else (True, False):
                    with browsers if looked_at else contextlib.nullcontext():
                        halves[looked_at] = half(way)
                turns.append((halves[False], halves[True]))
            rows.append(_row(name, turns))
        browsers.close()
    return rows


def _row(name: str, turns: Sequence[tuple[Half, Half]]) -> str:
    alone, there = (statistics.median(half.rate for half in column) for column in zip(*turns, strict=True))
    return (
        f"| null calls, {name}: alone {alone:.0f}/s, {CLIENTS} browsers {there:.0f}/s |"
        f" {_spread([100 * (1 - there.rate / alone.rate) for alone, there in turns])} slower;"
        f" {_spread([100 * (there.cost / alone.cost - 1) for alone, there in turns])} more processor time a call | ≤ 5 % |"
    )


def _spread(percents: list[float]) -> str:
    """The median, and what half of them lie between."""
    low, middle, high = statistics.quantiles(percents, n=4)
    return f"{middle:.1f} % ({low:.1f} to {high:.1f})"


def _start() -> list[str]:
    folder = str(Path(__file__).parent.parent)

    def seconds(http: str) -> float:
        code = START.format(folder=folder, http=http)
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return float(ran.stdout)

    pairs = [(seconds("off"), seconds("localhost:0")) for _ in range(TURNS)]
    more = sorted(1e3 * (on - off) for off, on in pairs)
    off, on = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
    return [
        f"| processor time of `start`: {off:.1f} ms without the debug server, {on:.1f} ms with it |"
        f" {statistics.median(more):.1f} ms more | |"
    ]


def _documents() -> list[str]:
    """Of many machines, in this process: what is done elsewhere, on real ones, is done only once here."""
    import bigmachine
    from bigmachine.inside import monitor
    from bigmachine.supervisor.service import SupervisorService
    from bigmachine.supervisor.vitals import Gauge
    from bigmachine.testing import TestSystem
    from bigmachine.worker import ProcessService

    vitals = Gauge().read({"supervisor": os.getpid(), "0": os.getpid()})
    SupervisorService.vitals = lambda service: vitals  # type: ignore[method-assign]
    ProcessService.doing = lambda service, limit=100: []  # type: ignore[method-assign]
    with bigmachine.start(TestSystem()) as b:
        for machine in b.start(MACHINES, {"Echo": Echo()}):
            machine.call("Echo.echo", 1)
        watching = monitor.Monitor(b)
        watching.snapshot(fresh=True)
        made = []
        for _ in range(TURNS):
            began = time.process_time()
            last = watching.snapshot(fresh=True)
            made.append(time.process_time() - began)
        began = time.thread_time()
        watching._make(ask=False)
        own = time.thread_time() - began
    return [
        f"| status of {MACHINES} machines: {len(last.body) / 1e3:.0f} kB, compressed {len(last.gzipped) / 1e3:.0f} kB |"
        f" {1e3 * statistics.median(made):.0f} ms of a processor to ask all, both ends; {1e3 * own:.0f} ms to make it | |"
    ]


if __name__ == "__main__":
    if sys.argv[1:2] == ["browse"]:
        asyncio.run(_browse(int(sys.argv[2])))
    else:
        print("| | measured | target |\n|---|---|---|")
        for phase in (_start, _documents, _looked_at):
            print("\n".join(phase()), flush=True)
