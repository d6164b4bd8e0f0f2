"""The variables of all processes, collected: as JSON, summed, and in Prometheus's text format.

What several processes say of the same variable (its name and labels) adds up, but for gauges of which a sum would mean
nothing. Those tell by how their name ends:

- ``_max`` and ``_timestamp_seconds``: the largest;
- ``_min``: the smallest;
- ``_ratio`` and ``_percent``: the mean.

The machines of the system `test` are the driver's own process: what the program publishes there is shown, and counted,
once, as the driver's.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol, cast

from ..errors import UsageError
from ..machine import Machine, merge_stats
from ..rpc.calling import raiser
from ..rpc.calls import Call
from ..rpc.client import Client
from ..rpc.stats import MethodStats
from ..vars import COUNTER, GAUGE, Sample, exposed_name, origin, rpc_samples, snapshot

if TYPE_CHECKING:
    from prometheus_client.core import Metric

DRIVER = "driver"
"""Stands for the machine, and for the process, where the driver's own variables are meant."""

SUPERVISOR = "supervisor"

TIMEOUT = 5.0
"""Seconds in which a process must have answered: it takes milliseconds, but for one whose code keeps the interpreter lock."""

MAX_TIMEOUT = 3600.0
"""Who waits longer has forgotten it."""

ASKERS = 64
"""Threads that ask at the same time. One is busy for 0.1 ms, or, where a connection has to be made that nobody takes, until the
deadline."""


class Cluster(Protocol):
    """A `session.Session`."""

    def machines(self) -> list[Machine]: ...


@dataclass(frozen=True)
class Collected:
    """What was there to be seen.

    `samples` are by machine and process: ``("https://localhost:42409/m-7f3a9c/", "0")``, …, ``"supervisor"`` among a
    machine's processes, and ``("driver", "driver")``. `missing` are those that did not answer, with the reason.
    """

    samples: Mapping[tuple[str, str], Sequence[Sample]]
    missing: Mapping[tuple[str, str], str]


# -- Collecting ----------------------------------------------------------------------------------------------------------


def collect(cluster: Cluster, timeout: float = TIMEOUT) -> Collected:
    """Ask every process of all running machines, at the same time; returns when all have answered, after `timeout` seconds
    at the latest. Raises `UsageError` for a timeout that is none."""
    if not isinstance(timeout, int | float) or not 0 < timeout <= MAX_TIMEOUT:
        raise UsageError(f"not a timeout: {timeout!r}; give seconds, more than 0 and at most {MAX_TIMEOUT:g}")
    deadline = time.monotonic() + timeout
    machines = cluster.machines()
    own: Call[list[Sample]] = Call()
    asked = {(DRIVER, DRIVER): own}
    # A daemon: what the program has published may never return.
    threading.Thread(target=_tell, args=(own, machines), name="bigmachine-variables-own", daemon=True).start()
    askers = ThreadPoolExecutor(ASKERS, "bigmachine-variables")
    for machine in machines:
        for process, client in machine.processes:
            call: Call[list[Sample]] = Call()
            asked[machine.addr, process] = call
            askers.submit(_ask, client, process, call, deadline)
    samples: dict[tuple[str, str], Sequence[Sample]] = {}
    missing: dict[tuple[str, str], str] = {}
    for who, call in asked.items():
        try:
            samples[who] = call.result(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            missing[who] = f"no answer within {timeout:g} s"
            call.cancel()
        except Exception as error:  # It stopped meanwhile, or whatever else: the others are to be seen.
            missing[who] = (str(error) or type(error).__name__).splitlines()[0]  # The last output may follow.
    askers.shutdown(wait=False, cancel_futures=True)
    return Collected(samples, missing)


def _ask(client: Client, process: str, call: Call[list[Sample]], deadline: float) -> None:
    """Send the question; does not wait for the answer, but perhaps for a connection."""
    left = deadline - time.monotonic()
    if left <= 0 or call.done():
        return
    method, args = ("Supervisor.vars", ()) if process == SUPERVISOR else ("Process.vars", (origin(),))
    try:
        client.submit(call, method, client.codec.encode_call(method, args, {}), left)
    except Exception as error:  # Nobody else would hear of it.
        call.complete(raiser(error))


def _tell(call: Call[list[Sample]], machines: Iterable[Machine]) -> None:
    """Of this process: what it has published, and the calls that it made to `machines`."""
    made: dict[str, MethodStats] = {}
    for machine in machines:
        merge_stats(made, machine.call_stats())
    call.complete(lambda: snapshot() + rpc_samples("client", made))


# -- JSON ----------------------------------------------------------------------------------------------------------------


def as_json(collected: Collected) -> dict[str, Any]:
    """What `json` can write::

        {"sum": {"jobs_total{kind=\"image\"}": 12, …},               # of all processes
         "machines": {"https://localhost:42409/m-7f3a9c/": {…}, "driver": {…}},  # of each machine's processes
         "missing": {"https://localhost:42410/m-51c2d0/": {"0": "no answer within 5 s"}}}

    JSON has no numbers that are not finite: these are strings, as in Prometheus: ``"NaN"``, ``"+Inf"``, ``"-Inf"``.
    """
    by_machine: dict[str, list[Sample]] = {}
    for (machine, _), samples in collected.samples.items():
        by_machine.setdefault(machine, []).extend(samples)
    missing: dict[str, dict[str, str]] = {}
    for (machine, process), reason in collected.missing.items():
        missing.setdefault(machine, {})[process] = reason
    everything = [sample for samples in by_machine.values() for sample in samples]
    return {
        "sum": _combined(everything),
        "machines": {machine: _combined(samples) for machine, samples in by_machine.items()},
        "missing": missing,
    }


def _combined(samples: Iterable[Sample]) -> dict[str, float | str]:
    values: dict[str, list[float]] = {}
    rules: dict[str, Callable[[list[float]], float]] = {}
    for sample in samples:
        name = series(sample)
        values.setdefault(name, []).append(sample.value)
        rules.setdefault(name, _rule(sample))
    return {name: _finite(rules[name](values[name])) for name in sorted(values)}


def series(sample: Sample) -> str:
    """As Prometheus writes it: ``jobs_total{kind="image"}``."""
    labels = ",".join(f'{label}="{_escaped(value)}"' for label, value in sorted(sample.labels.items()))
    return f"{sample.name}{{{labels}}}" if labels else sample.name


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


_RULES: Sequence[tuple[tuple[str, ...], Callable[[list[float]], float]]] = (
    (("_max", "_timestamp_seconds"), max),
    (("_min",), min),
    (("_ratio", "_percent"), statistics.fmean),
)
"""Of gauges that do not add; see the module."""


def _rule(sample: Sample) -> Callable[[list[float]], float]:
    if sample.kind == GAUGE:
        for endings, rule in _RULES:
            if sample.name.endswith(endings):
                return rule
    return sum


def _finite(value: float) -> float | str:
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else "+Inf" if value > 0 else "-Inf"


# -- Prometheus ----------------------------------------------------------------------------------------------------------


def as_prometheus(collected: Collected) -> str:
    """The text format, with the labels ``machine`` and ``process``; nothing is summed, as Prometheus does that better.

    ``bigmachine_vars_up`` is 1 for every process that has answered, 0 for the others. A name that is a counter in one
    process and a gauge in another is written as untyped.
    """
    from prometheus_client import generate_latest  # 60 ms, with an HTTP server.

    return generate_latest(cast("Any", SimpleNamespace(collect=lambda: _families(collected)))).decode()


def _families(collected: Collected) -> list[Metric]:
    """One for each name, in the order of names."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, UntypedMetricFamily  # As above.

    by_name: dict[str, list[Sample]] = {}
    for (machine, process), samples in _with_up(collected):
        where = {"machine": machine, "process": process}
        for sample in samples:
            placed = Sample(sample.name, sample.kind, sample.help, {**sample.labels, **where}, sample.value)
            by_name.setdefault(exposed_name(sample.name, sample.kind), []).append(placed)
    families: list[Metric] = []
    for name in sorted(by_name):
        samples = by_name[name]
        kinds = {sample.kind for sample in samples}
        family = (
            UntypedMetricFamily if len(kinds) > 1 else CounterMetricFamily if kinds == {COUNTER} else GaugeMetricFamily
        )
        # All of a family have the same labels there; an empty one is as good as none to Prometheus.
        labels = sorted({label for sample in samples for label in sample.labels})
        metric = family(name, next((sample.help for sample in samples if sample.help), ""), labels=labels)
        for sample in samples:
            metric.add_metric([sample.labels.get(label, "") for label in labels], sample.value)
        families.append(metric)
    return families


def _with_up(collected: Collected) -> Iterator[tuple[tuple[str, str], Sequence[Sample]]]:
    for who, samples in collected.samples.items():
        yield who, [*samples, _up(1)]
    for who in collected.missing:
        yield who, [_up(0)]


def _up(value: int) -> Sample:
    return Sample("bigmachine_vars_up", GAUGE, "whether the process has told its variables", {}, value)
