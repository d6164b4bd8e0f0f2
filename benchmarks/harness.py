"""The phases of a measurement, and the loop that runs each in a process of its own.

``bench_X.py`` runs every variant × phase once and prints one JSON line a metric: peer, metric, value, unit, runs (one), noise
(the share of the processors that others used just before or after: more than 0.1 is a noisy run).
``bench_X.py --variant V --phase P`` is one such process.

Environment: PHASES and VARIANTS (comma-separated) narrow it, SMOKE=1 makes it short and meaningless, BENCH_LOCK is the file
whose lock keeps two measurements apart.

Light to import, as workers re-execute the program that imports it: modules that only some phases need are imported there.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

SMOKE = bool(os.environ.get("SMOKE"))
BULK = 4 << 20 if SMOKE else 64 << 20
PI_SAMPLES = 2_000_000 if SMOKE else 20_000_000
LATENCY_CALLS = 50 if SMOKE else 2000
WARM_CALLS = 3 if SMOKE else 200
THROUGHPUT_SECONDS = 0.3 if SMOKE else 5.0
BULK_REPETITIONS = 1 if SMOKE else 5
IN_FLIGHT = 64
MANY = (2, 6) if SMOKE else (2, 100)
TIMEOUT = 180
QUIET_SECONDS = 0 if SMOKE else 8
NOISY = 0.1

Metric = tuple[str, float, str]
Rated = tuple[int, float]


class Peer:
    """What is measured. Worker 0 is the one that is called; `start(n)` returns when each of n has answered a call."""

    def imports(self) -> None: ...
    def start(self, n: int) -> None: ...
    def stop(self) -> None: ...
    def call(self, x: int) -> int: ...  # type: ignore[empty-body]
    def send(self, array: Any) -> int: ...  # type: ignore[empty-body]
    def recv(self, size: int) -> Any: ...
    def pi(self, samples: int) -> int: ...  # type: ignore[empty-body]
    def worker_pids(self) -> Iterable[int]: ...  # type: ignore[empty-body]

    def grow(self, n: int) -> None:
        """Start n more workers."""

    def ways(self) -> dict[str, Callable[[float], Rated]]:
        """Ways to keep `IN_FLIGHT` calls in flight for so many seconds; each returns (calls, seconds). The best counts."""
        return {}

    phases: Sequence[str] = ()


def pump(submit: Callable[[int], Any], result: Callable[[Any], Any], seconds: float) -> Rated:
    """One thread, a window of calls that are answered in order."""
    window = deque(submit(1) for _ in range(IN_FLIGHT))
    calls, begin = 0, time.perf_counter()
    while calls % 16 or time.perf_counter() - begin < seconds:
        result(window.popleft())
        calls += 1
        window.append(submit(1))
    elapsed = time.perf_counter() - begin
    for pending in window:
        result(pending)
    return calls, elapsed


def pump_threads(call: Callable[[int], Any], seconds: float) -> Rated:
    """A thread a call in flight."""
    from concurrent.futures import ThreadPoolExecutor

    begin = time.perf_counter()

    def repeat(_: int) -> int:
        calls = 0
        while time.perf_counter() - begin < seconds:
            call(1)
            calls += 1
        return calls

    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        calls = sum(pool.map(repeat, range(IN_FLIGHT)))
    return calls, time.perf_counter() - begin


def pump_tasks(submit: Callable[[int], Any], seconds: float) -> Rated:
    """A task a call in flight, on one event loop."""
    import asyncio

    async def repeat(end: float) -> int:
        calls = 0
        while time.perf_counter() < end:
            await submit(1)
            calls += 1
        return calls

    async def all_of_them() -> Rated:
        begin = time.perf_counter()
        counts = await asyncio.gather(*(repeat(begin + seconds) for _ in range(IN_FLIGHT)))
        return sum(counts), time.perf_counter() - begin

    return asyncio.run(all_of_them())


# -- Phases --------------------------------------------------------------------------------------------------------------


def _latencies(peer: Peer) -> list[float]:
    """Microseconds a null call, sorted, after a warm-up."""
    for i in range(WARM_CALLS):
        peer.call(i)
    taken = []
    for i in range(LATENCY_CALLS):
        begin = time.perf_counter_ns()
        answer = peer.call(i)
        taken.append((time.perf_counter_ns() - begin) / 1e3)
        assert answer == i + 1, answer
    return sorted(taken)


def _pin(pids: Iterable[int], cpu: int) -> None:
    for pid in pids:
        for thread in os.listdir(f"/proc/{pid}/task"):
            try:
                os.sched_setaffinity(int(thread), {cpu})
            except ProcessLookupError:
                pass


def latency(peer: Peer) -> Iterator[Metric]:
    peer.start(1)
    taken = _latencies(peer)
    yield "latency_p50", taken[len(taken) // 2], "us"
    yield "latency_p99", taken[len(taken) * 99 // 100], "us"


def latency1cpu(peer: Peer) -> Iterator[Metric]:
    """Everything on one processor: what a call costs, without wake-ups across processors."""
    os.sched_setaffinity(0, {0})
    peer.start(1)
    taken = _latencies(peer)
    yield "latency_1cpu_p50", taken[len(taken) // 2], "us"


def latency2cpu(peer: Peer) -> Iterator[Metric]:
    """Driver and worker on a processor each: without the luck of placement."""
    peer.start(1)
    peer.call(1)
    _pin([os.getpid()], 0)
    _pin(peer.worker_pids(), 1)
    taken = _latencies(peer)
    yield "latency_2cpu_p50", taken[len(taken) // 2], "us"
    yield "latency_2cpu_p99", taken[len(taken) * 99 // 100], "us"


def _best_way(peer: Peer) -> tuple[str, Callable[[float], Rated]]:
    probed = {}
    for name, way in peer.ways().items():
        way(THROUGHPUT_SECONDS / 20)
        calls, seconds = way(THROUGHPUT_SECONDS / 5)
        probed[name] = calls / seconds
        print(f"throughput by {name}: {probed[name]:.0f} calls/s", file=sys.stderr)
    best = max(probed, key=lambda name: probed[name])
    return best, peer.ways()[best]


def throughput(peer: Peer) -> Iterator[Metric]:
    peer.start(1)
    _, way = _best_way(peer)
    calls, seconds = way(THROUGHPUT_SECONDS)
    yield "throughput", calls / seconds, "calls/s"


def many(peer: Peer) -> Iterator[Metric]:
    """Calls to one worker while there are few, and while there are many."""
    few, lots = MANY
    peer.start(few)
    _, way = _best_way(peer)
    calls, seconds = way(THROUGHPUT_SECONDS)
    before = calls / seconds
    peer.grow(lots - few)
    time.sleep(0 if SMOKE else 2)  # Let those that have just started fall asleep.
    way(THROUGHPUT_SECONDS / 10)
    calls, seconds = way(THROUGHPUT_SECONDS)
    after = calls / seconds
    yield f"many_{few}", before, "calls/s"
    yield f"many_{lots}", after, "calls/s"
    yield "many_ratio", after / before, "ratio"


def bulk(peer: Peer) -> Iterator[Metric]:
    import statistics

    import numpy as np

    peer.start(1)
    array = np.random.default_rng(0).integers(0, 256, BULK, dtype=np.uint8)

    def send() -> None:
        assert peer.send(array) == int(array[:10].sum())

    def recv() -> None:
        got = peer.recv(BULK)
        assert len(got) == BULK
        assert got.dtype == np.uint8

    for name, transfer in (("bulk_send", send), ("bulk_recv", recv)):
        transfer()
        taken = []
        for _ in range(BULK_REPETITIONS):
            begin = time.perf_counter()
            transfer()
            taken.append(time.perf_counter() - begin)
        yield name, BULK / 1e6 / statistics.median(taken), "MB/s"


def rss(peer: Peer) -> Iterator[Metric]:
    """Memory of one idle worker, all its processes together. PSS divides pages among those that share them."""
    import psutil

    peer.start(1)
    peer.call(1)
    time.sleep(1)
    memory = []
    for pid in sorted(set(peer.worker_pids())):
        process = psutil.Process(pid)
        memory.append(process.memory_full_info())
        print(f"{pid} pss {memory[-1].pss / 2**20:.1f} MiB: {' '.join(process.cmdline())[:100]}", file=sys.stderr)
    for kind in ("rss", "uss", "pss"):
        yield f"{kind}_worker", sum(getattr(each, kind) for each in memory) / 2**20, "MiB"
    yield "rss_driver", psutil.Process().memory_info().rss / 2**20, "MiB"


def pi(peer: Peer) -> Iterator[Metric]:
    begin = time.perf_counter()
    peer.start(2)
    started = time.perf_counter()
    inside = peer.pi(PI_SAMPLES)
    end = time.perf_counter()
    assert abs(4 * inside / PI_SAMPLES - 3.14159) < 0.01, inside
    yield "pi_wall", end - begin, "s"
    yield "pi_compute", end - started, "s"
    yield "pi_start", started - begin, "s"


def _start(n: int) -> Callable[[Peer], Iterator[Metric]]:
    def phase(peer: Peer) -> Iterator[Metric]:
        begin = time.perf_counter()
        peer.start(n)
        yield f"start_{n}", time.perf_counter() - begin, "s"

    return phase


PHASES: dict[str, Callable[[Peer], Iterator[Metric]]] = {
    "start1": _start(1),
    "start5": _start(5),
    "start20": _start(20),
    "latency": latency,
    "latency1cpu": latency1cpu,
    "latency2cpu": latency2cpu,
    "throughput": throughput,
    "many": many,
    "bulk": bulk,
    "rss": rss,
    "pi": pi,
}


def run_phase(variant: str, peer: Peer, phase: str) -> None:
    import json

    def emit(metric: str, value: float, unit: str) -> None:
        print(json.dumps({"peer": variant, "metric": metric, "value": value, "unit": unit}), flush=True)

    begin = time.perf_counter()
    peer.imports()
    if phase == "import":
        emit("import_time", time.perf_counter() - begin, "s")
        return
    try:
        for metric in PHASES[phase](peer):
            emit(*metric)
    finally:
        begin = time.perf_counter()
        peer.stop()
    if phase.startswith("start"):
        emit(f"stop_{phase.removeprefix('start')}", time.perf_counter() - begin, "s")


# -- The loop over processes -----------------------------------------------------------------------------------------------


def busy(seconds: float) -> float:
    """The share of all processors that was in use during the next so many seconds; 0 where the system does not say."""

    def read() -> tuple[int, int]:
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
        return sum(ticks), ticks[3] + ticks[4]

    if not os.path.exists("/proc/stat"):
        return 0.0
    total, idle = read()
    time.sleep(seconds)
    total_after, idle_after = read()
    return 1 - (idle_after - idle) / max(1, total_after - total)


def wait_for_quiet() -> float:
    """Until others leave the processors alone, for `QUIET_SECONDS` at most; how busy these are then."""
    end = time.monotonic() + QUIET_SECONDS
    share = busy(0.2)
    while share > NOISY and time.monotonic() < end:
        share = busy(0.5)
    return share


def measure(script: str, variant: str, phase: str) -> None:
    """Run one phase when the machine is quiet, twice at most, and print what it printed with the noise around it."""
    import json
    import subprocess

    command = [sys.executable, script, "--variant", variant, "--phase", phase]
    output, noise = "", 1.0
    for _ in range(2):
        before = wait_for_quiet()
        try:
            output = subprocess.run(command, stdout=subprocess.PIPE, timeout=TIMEOUT, text=True, check=True).stdout
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            failure = {"peer": variant, "metric": "error", "phase": phase, "value": str(error)}
            print(json.dumps(failure), flush=True)
            return
        noise = round(max(before, busy(0.3)), 3)
        if noise <= NOISY or SMOKE:
            break
    for line in output.splitlines():
        if line.startswith('{"peer"'):
            metric = json.loads(line)
            print(json.dumps({**metric, "runs": [metric["value"]], "noise": [noise]}), flush=True)


def main(variants: dict[str, type[Peer]]) -> None:
    arguments = sys.argv[1:]
    if arguments:
        variant, phase = arguments[arguments.index("--variant") + 1], arguments[arguments.index("--phase") + 1]
        run_phase(variant, variants[variant](), phase)
        return
    import fcntl
    import tempfile

    def selected(name: str, variable: str) -> bool:
        return name in os.environ.get(variable, name).split(",")

    lock = os.environ.get("BENCH_LOCK", os.path.join(tempfile.gettempdir(), "bench.lock"))
    for variant, kind in variants.items():
        for phase in kind.phases:
            if selected(variant, "VARIANTS") and selected(phase, "PHASES"):
                with open(lock, "a") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    measure(sys.argv[0], variant, phase)
