"""Variables: figures that a process publishes about itself, for whoever looks at the cluster.

    from bigmachine import vars

    JOBS = vars.counter("jobs_total", "jobs done", kind="image")
    JOBS.add()
    vars.gauge("queue_length").set(7)
    vars.publish("cached_bytes", lambda: cache.size, "bytes in the cache")

Names are Prometheus's: ASCII letters, digits, underscores and colons for variables, the same without colons for labels; the
labels ``machine`` and ``process`` are added when variables are collected. A variable is its name with its labels: asked for
again, it is the same object. All variables of a name are of one kind. Label values are made strings.

Each process has variables of its own. What is defined above `driver.start()` exists in all of them; and a counter or gauge that
is pickled, as a part of a service, say, is on the far side the one of that name there. They are collected from a machine's
service processes, not from further ones that those make (`multiprocessing`). Names that begin with
``bigmachine_rpc_`` and ``bigmachine_vars_`` are bigmachine's own.

Safe to use from any thread, signal handler and finalizer, and across forks: there are no locks here.
"""

from __future__ import annotations

import os
import sys
from _thread import get_ident
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import UsageError

V = TypeVar("V", "Counter", "Gauge", "_Published")

Labels = tuple[tuple[str, str], ...]
"""Sorted."""

COUNTER, GAUGE = "counter", "gauge"

OWN = ("bigmachine_rpc_", "bigmachine_vars_")
"""Beginnings of names that nobody else may use: these samples are made here, and no process is to have one twice."""

ADDED = frozenset({"machine", "process"})

ERRORS = "bigmachine_vars_errors_total"


@dataclass(frozen=True)
class Sample:
    """The value that a variable had. `kind` is ``"counter"`` or ``"gauge"``."""

    name: str
    kind: str
    help: str
    labels: Mapping[str, str]
    value: float


class _Sum:
    """A number that many threads add to, without a lock: each has a cell of its own, under its thread's id.

    That is cheaper than a lock (0.17 against 0.28 µs), and nothing can be held while the process forks, or while a signal
    handler or finalizer adds as well. A thread's id is used again only after its end, so there are never more cells than
    there were threads at the same time.
    """

    __slots__ = ("_state", "labels", "name")

    def __init__(self, name: str, labels: Labels) -> None:
        self.name = name
        self.labels = labels
        self._state: tuple[float, dict[int, float]] = (0, {})

    def _add(self, n: float) -> None:
        cells, thread = self._state[1], get_ident()
        try:
            cells[thread] += n
        except KeyError:
            cells[thread] = n + 0  # Raises TypeError where it is no number, as above.

    def read(self) -> float:
        """The value now."""
        start, cells = self._state
        return start + sum(cells.copy().values())  # A copy is made in one go: others may begin to add.

    def __reduce__(self) -> tuple[Any, ...]:
        """Not a copy, which nobody would collect."""
        return _declared, (type(self), self.name, self.labels, _registry.help(self.name))


class Counter(_Sum):
    """A number that only grows: of things done, bytes sent, seconds spent."""

    __slots__ = ()

    def add(self, n: float = 1) -> None:
        """Raises `UsageError` where `n` is negative, or no number."""
        if not n >= 0:
            raise UsageError(f"counter {self.name}: cannot add {n!r}, as counters never go down; use a gauge")
        self._add(n)


class Gauge(_Sum):
    """A number that goes up and down: things that wait, bytes held."""

    __slots__ = ()

    def set(self, value: float) -> None:
        """What is added at the same moment counts as added before, or after."""
        self._state = (value + 0, {})  # Raises TypeError here, not when somebody collects, where it is no number.

    def add(self, n: float = 1) -> None:
        """`n` may be negative."""
        self._add(n)


class _Published:
    """A variable whose value a function knows."""

    __slots__ = ("name", "read")

    def __init__(self, name: str, labels: Labels) -> None:
        self.name = name
        self.read: Callable[[], float] = float


class Registry:
    """The variables of a process. There is one, whose methods are this module's functions; tests make their own.

    Threads meet in single operations of dicts, `setdefault` and `copy`, which are atomic.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[str, str]] = {}  # By all names it takes up: the name here, and the kind.
        self._help: dict[str, str] = {}
        self._variables: dict[tuple[str, Labels], Counter | Gauge | _Published] = {}
        self._failed: dict[str, Counter] = {}
        self._token = os.urandom(8).hex()

    @property
    def origin(self) -> str:
        """Whose variables these are: another string in every process, a fork's included."""
        return f"{os.getpid()}-{self._token}"

    def counter(self, name: str, /, help: str = "", **labels: object) -> Counter:
        """The counter of this name and these labels. Raises `UsageError` for a name that cannot be used, or is no counter's.

        By convention its name ends in ``_total``; Prometheus is given it with that ending in any case.
        """
        return self._get(Counter, COUNTER, name, help, labels)

    def gauge(self, name: str, /, help: str = "", **labels: object) -> Gauge:
        """The gauge of this name and these labels. Raises `UsageError` for a name that cannot be used, or is no gauge's.

        Gauges of several processes add up, but for those whose names end as `inside.variables` says (``_max``, ``_ratio``, …).
        """
        return self._get(Gauge, GAUGE, name, help, labels)

    def publish(self, name: str, function: Callable[[], float], /, help: str = "", **labels: object) -> None:
        """A gauge whose value is what `function` returns whenever somebody looks; it should be quick. Published again, the
        new function takes the place of the old one. Where it raises, the variable is left out, and the failure counted in
        ``bigmachine_vars_errors_total``. Raises `UsageError` for a name that cannot be used, or is another kind's."""
        if not callable(function):
            raise UsageError(
                f"variable {name}: publish needs a function, not {function!r}; for a value there is gauge().set()"
            )
        self._get(_Published, GAUGE, name, help, labels).read = function

    def _get(self, cls: type[V], kind: str, name: str, help: str, labels: Mapping[str, object]) -> V:
        _check(name, labels)
        names = exposed_name(name, kind), family_name(name, kind)
        for each in names:
            other, other_kind = self._kinds.get(each, (name, kind))
            if (other, other_kind) != (name, kind):
                raise UsageError(
                    f"variable {name}: there is a {other_kind} {other} already; choose another name for this {kind}"
                )
        self._kinds.update(dict.fromkeys(names, (name, kind)))
        key = name, tuple(sorted((label, str(value)) for label, value in labels.items()))
        variable = self._variables.get(key) or self._variables.setdefault(key, cls(*key))
        if not isinstance(variable, cls):
            raise UsageError(
                f"variable {name}: it is a {_KINDS[type(variable)]} already, and cannot be a {_KINDS[cls]}"
            )
        if help:
            self._help.setdefault(name, help)
        return variable

    def help(self, name: str) -> str:
        """What the variables of that name are; empty where nobody has said."""
        return self._help.get(name, "")

    def snapshot(self) -> list[Sample]:
        """What every variable is now; published functions are called, on this thread."""
        samples = []
        for (name, labels), variable in self._variables.copy().items():
            kind = COUNTER if isinstance(variable, Counter) else GAUGE
            try:
                value = _number(variable.read())
            except Exception as error:  # The user's function: whatever it raises, the others are to be seen.
                self._count_failure(name, error)
            else:
                samples.append(Sample(name, kind, self.help(name), dict(labels), value))
        for name, failures in self._failed.copy().items():
            samples.append(
                Sample(ERRORS, COUNTER, "readings of variables that failed", {"name": name}, failures.read())
            )
        return samples

    def _count_failure(self, name: str, error: Exception) -> None:
        failures = self._failed.setdefault(name, Counter(name, ()))
        failures.add()
        if failures.read() == 1:  # Once: whoever collects does so every few seconds.
            sys.stderr.write(
                f"bigmachine: variable {name} is left out, as reading it raised {type(error).__name__}: {error}\n"
            )


_KINDS = {Counter: "counter", Gauge: "gauge", _Published: "published function"}


def exposed_name(name: str, kind: str) -> str:
    """What Prometheus is given as the name: that of a counter ends in ``_total``."""
    return name if kind != COUNTER or name.endswith("_total") else f"{name}_total"


def family_name(name: str, kind: str) -> str:
    """What OpenMetrics has as the name, and knows counters and gauges by: that of a counter does not end so."""
    return name.removesuffix("_total") if kind == COUNTER else name


def _check(name: str, labels: Mapping[str, object]) -> None:
    """Raises `UsageError` for what Prometheus would not take."""
    if not _is_name(name.replace(":", "_")) or name == "_total":
        raise UsageError(f"not a variable's name: {name!r}; use letters, digits and underscores, such as jobs_total")
    if name.startswith(OWN):
        raise UsageError(f"variable {name}: names that begin so are bigmachine's own; choose another")
    for label in labels:
        if not _is_name(label) or label.startswith("__"):
            raise UsageError(f"variable {name}: not a label's name: {label!r}; use letters, digits and underscores")
        if label in ADDED:
            raise UsageError(
                f"variable {name}: the label {label!r} is added when variables are collected; choose another"
            )


def _is_name(text: str) -> bool:
    return text.isascii() and text.isidentifier()


def _number(value: Any) -> float:
    """A plain int or float: NumPy's numbers, say, would have to be imported by whoever unpickles them."""
    if isinstance(value, int):
        float(value)  # Raises OverflowError for what is too large for Prometheus.
        return int(value)
    if isinstance(value, str | bytes | bytearray):  # `float` would parse them.
        raise TypeError(f"not a number: {value!r}")
    return float(value)


_FIGURES = (
    ("calls_total", COUNTER, "count", "calls that have ended"),
    ("errors_total", COUNTER, "errors", "calls that have failed"),
    ("seconds_total", COUNTER, "seconds", "client: from sending to the reply; server: of running"),
    ("seconds_max", GAUGE, "max_seconds", "the longest of a single call"),
    ("sent_bytes_total", COUNTER, "sent", "arguments (client) or results (server), as encoded"),
    ("sent_bytes_max", GAUGE, "max_sent", "the most of a single call"),
    ("received_bytes_total", COUNTER, "received", "results (client) or arguments (server), as encoded"),
    ("received_bytes_max", GAUGE, "max_received", "the most of a single call"),
)


def rpc_samples(end: str, methods: Mapping[str, Any]) -> list[Sample]:
    """What `rpc.stats` knows (`MethodStats` by method) of the calls at one end, ``"client"`` or ``"server"``, as samples."""
    return [
        Sample(f"bigmachine_rpc_{name}", kind, help, {"end": end, "method": method}, getattr(figures, figure))
        for method, figures in methods.items()
        for name, kind, figure, help in _FIGURES
    ]


_registry = Registry()
counter = _registry.counter
gauge = _registry.gauge
publish = _registry.publish
snapshot = _registry.snapshot


def origin() -> str:
    """A name of this process that no other has: see `Registry.origin`."""
    return _registry.origin


def _declared(cls: type[_Sum], name: str, labels: Labels, help: str) -> _Sum:
    """See `_Sum.__reduce__`."""
    declare = counter if cls is Counter else gauge
    return declare(name, help=help, **dict(labels))
