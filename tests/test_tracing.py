"""Calls as OpenTelemetry's spans: one trace from the driver's call through whatever the services call."""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from rpc_pair import Pair, until
from test_rpc import Foreign

import bigmachine
from bigmachine import Machine, Session, State, Stream, parallel
from bigmachine.errors import BadArguments, CallTimeout, MachineStopped, NotPicklable, RemoteError
from bigmachine.rpc.methods import CallContext
from bigmachine.rpc.tracing import OPENTELEMETRY, TRACE
from bigmachine.testing import TestSystem

SOON = 20.0

SPANS: dict[str, str] = {
    "plain": "call",
    "plain_on_a_stream": "call",
    "plain_submitted": "submit",
    "gated": "call",
    "gated_submitted": "submit",
    "coroutine": "call",
    "coroutine_on_a_stream": "call",
    "coroutine_submitted": "submit",
    "items": "stream",
    "aitems": "stream",
}


released = threading.Event()
"""Ends `Traced.wait`, which runs in this process."""


class Untellable(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


class Traced:
    """Its methods have spans of their own, ``inside``, and say what trace they run in."""

    def setup(self, b: Session) -> None:
        self._session = b

    def _inside(self) -> str:
        from opentelemetry import trace

        with trace.get_tracer("test").start_as_current_span("inside") as span:
            return f"{span.get_span_context().trace_id:032x}"

    def plain(self, padding: object = None) -> str:
        return self._inside()

    @parallel
    def gated(self, padding: object = None) -> str:
        return self._inside()

    async def coroutine(self, padding: object = None) -> str:
        await asyncio.sleep(0)
        return self._inside()

    def items(self, n: int) -> Iterator[str]:
        for _ in range(n):
            yield self._inside()

    async def aitems(self, n: int) -> AsyncIterator[str]:
        for _ in range(n):
            await asyncio.sleep(0)
            yield self._inside()

    def relay(self, address: str, method: str) -> Any:
        return self._session.dial(address).call(method)

    async def arelay(self, address: str, method: str) -> Any:
        return await self._session.dial(address).submit(method)

    def keywords(self, **keywords: Any) -> dict[str, Any]:
        return keywords

    def fail(self) -> None:
        raise ValueError("no such thing\nand more")

    def fail_without_a_text(self) -> None:
        raise Untellable

    async def afail(self) -> None:
        raise ValueError("no such thing")

    def fail_later(self) -> Iterator[int]:
        yield 1
        raise ValueError("no such thing")

    def wait(self) -> None:
        released.wait(SOON)

    def read(self, file: Any) -> int:
        return len(file.read())


class Exported:
    """What has been exported, as dicts."""

    def __init__(self, exporter: Any) -> None:
        self._exporter = exporter

    def spans(self, count: int | None = None) -> list[Any]:
        """All that have ended, in that order; waits until there are `count`."""
        if count is not None:
            until(lambda: len(self._exporter.get_finished_spans()) >= count, f"there are not {count} spans")
        return list(self._exporter.get_finished_spans())

    def one(self, name: str, kind: str) -> Any:
        (span,) = [span for span in self.spans() if (span.name, span.kind.name) == (name, kind)]
        return span


@pytest.fixture(scope="module")
def opentelemetry() -> Iterator[Any]:
    """Loaded, with a provider, for this module's tests alone: every call of this process has spans from then on."""
    trace = importlib.import_module("opentelemetry.trace")
    sdk = importlib.import_module("opentelemetry.sdk.trace")
    trace.set_tracer_provider(sdk.TracerProvider(shutdown_on_exit=False))
    sys.modules.pop(OPENTELEMETRY, None)
    yield trace
    sys.modules.pop(OPENTELEMETRY, None)


@pytest.fixture
def exported(opentelemetry: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Exported]:
    monkeypatch.setitem(sys.modules, OPENTELEMETRY, opentelemetry)
    export = importlib.import_module("opentelemetry.sdk.trace.export")
    memory = importlib.import_module("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter = memory.InMemorySpanExporter()
    processor = export.SimpleSpanProcessor(exporter)
    provider = opentelemetry.get_tracer_provider()
    provider.add_span_processor(processor)
    yield Exported(exporter)
    processors = provider._active_span_processor
    processors._span_processors = tuple(each for each in processors._span_processors if each is not processor)


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    with bigmachine.start(TestSystem(maxprocs=2)) as b:
        machines = b.start(2, {"T": Traced()})
        for machine in machines:
            machine.wait(State.RUNNING, SOON)
        released.clear()
        yield machines
        released.set()


def call(machine: Machine, how: str) -> str:
    """Call the method that `how` is about, in that way; the trace in which it ran."""
    name, _, way = how.partition("_")
    args = ("x" * 100_000,) if way == "on_a_stream" else ()
    match SPANS[how]:
        case "submit":
            return str(machine.submit(f"T.{name}").result(SOON))
        case "stream":
            return "".join(set(machine.stream(f"T.{name}", 3)))
        case _:
            return str(machine.call(f"T.{name}", *args, timeout=SOON))


# -- One trace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", SPANS)
def test_the_users_spans_in_a_method_belong_to_the_callers_trace(
    exported: Exported, opentelemetry: Any, machines: list[Machine], how: str
) -> None:
    machine = machines[0]
    with opentelemetry.get_tracer("test").start_as_current_span("root") as root:
        ran_in = call(machine, how)
    inside = 3 if SPANS[how] == "stream" else 1
    exported.spans(3 + inside)
    method = f"T.{how.partition('_')[0]}"
    client, server = exported.one(method, "CLIENT"), exported.one(method, "SERVER")
    assert client.parent.span_id == root.get_span_context().span_id
    assert server.parent.span_id == client.context.span_id
    assert server.parent.is_remote
    own = [span for span in exported.spans() if span.name == "inside"]
    assert [span.parent.span_id for span in own] == [server.context.span_id] * inside
    assert ran_in == f"{root.get_span_context().trace_id:032x}"
    assert client.start_time <= server.start_time <= own[0].start_time <= own[-1].end_time <= server.end_time
    if SPANS[how] != "stream":
        assert server.end_time <= client.end_time


@pytest.mark.parametrize("relay", ["relay", "arelay"])
def test_one_trace_goes_through_the_calls_that_services_make(
    exported: Exported, machines: list[Machine], relay: str
) -> None:
    first, second = machines
    first.call(f"T.{relay}", second.addr, "T.plain")
    chain = [exported.one("inside", "INTERNAL")]
    while chain[-1].parent is not None:
        chain.append(next(s for s in exported.spans(5) if s.context.span_id == chain[-1].parent.span_id))
    assert [(span.name, span.kind.name) for span in chain[1:]] == [
        ("T.plain", "SERVER"),
        ("T.plain", "CLIENT"),
        (f"T.{relay}", "SERVER"),
        (f"T.{relay}", "CLIENT"),
    ]
    assert len({span.context.trace_id for span in chain}) == 1


def test_what_spans_say(exported: Exported, machines: list[Machine]) -> None:
    machine = machines[0]
    machine.call("T.plain")
    client, server = exported.one("T.plain", "CLIENT"), exported.one("T.plain", "SERVER")
    what = {"rpc.system": "bigmachine", "rpc.service": "T", "rpc.method": "plain"}
    port = int(machine.addr.split(":")[2].split("/")[0])
    assert dict(client.attributes) == {
        **what,
        "bigmachine.machine": machine.id,
        "server.address": "localhost",
        "server.port": port,
    }
    assert {**server.attributes, "bigmachine.caller": ""} == {**what, "bigmachine.caller": ""}
    assert server.attributes["bigmachine.caller"].startswith("driver s-")
    assert client.status.is_unset
    assert server.status.is_unset
    assert client.instrumentation_scope.name == "bigmachine"


def test_a_call_that_waits_for_its_machine_has_a_span_from_the_beginning(exported: Exported) -> None:
    with bigmachine.start(TestSystem()) as b:
        (machine,) = b.start(1, {"T": Traced()})
        machine.submit("T.plain").result(SOON)
    assert exported.one("T.plain", "SERVER").parent.span_id == exported.one("T.plain", "CLIENT").context.span_id


def test_baggage_travels_too(exported: Exported, machines: list[Machine], monkeypatch: pytest.MonkeyPatch) -> None:
    baggage = importlib.import_module("opentelemetry.baggage")
    contexts = importlib.import_module("opentelemetry.context")
    monkeypatch.setattr(Traced, "_inside", lambda self: str(baggage.get_baggage("user")), raising=True)
    token = contexts.attach(baggage.set_baggage("user", "ada"))
    try:
        assert machines[0].call("T.plain") == "ada"
    finally:
        contexts.detach(token)
    assert machines[0].call("T.plain") == "None"


def test_a_call_leaves_nothing_behind_on_its_thread(exported: Exported, machines: list[Machine]) -> None:
    """Two calls, neither in a span, are two traces, though the same thread has served them."""
    traces = {machines[0].call("T.plain") for _ in range(5)}
    assert len(traces) == 5
    assert len({tuple(machines[0].stream("T.items", 1)) for _ in range(3)}) == 3


def test_a_method_does_not_see_what_carries_the_trace(exported: Exported, machines: list[Machine]) -> None:
    assert machines[0].call("T.keywords", a=1) == {"a": 1}
    assert machines[0].call("T.keywords") == {}


def test_a_stream_argument_is_sent_with_a_trace(exported: Exported, machines: list[Machine]) -> None:
    assert machines[0].call("T.read", Stream(iter([b"abc", b"def"])), timeout=SOON) == 6
    exported.spans(2)
    assert exported.one("T.read", "SERVER").parent.span_id == exported.one("T.read", "CLIENT").context.span_id


def test_the_toolkits_own_calls_are_no_spans(exported: Exported, machines: list[Machine]) -> None:
    machine = machines[0]
    machine.info()
    machine.call("Supervisor.ping")
    machine.call("Process.stats")
    machine.served_stats()
    assert exported.spans() == []


# -- Failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["T.fail", "T.afail"])
def test_what_a_method_raises_is_the_error_of_both_spans(
    exported: Exported, machines: list[Machine], method: str
) -> None:
    with pytest.raises(ValueError, match="no such thing"):
        machines[0].call(method)
    exported.spans(2)
    for kind in "CLIENT", "SERVER":
        span = exported.one(method, kind)
        assert not span.status.is_ok
        assert span.status.description.startswith("ValueError: no such thing")
        (event,) = span.events
        assert event.attributes["exception.type"] == "ValueError"


def test_an_exception_without_a_text_arrives_as_itself(exported: Exported, machines: list[Machine]) -> None:
    for way in machines[0].call, lambda method: machines[0].submit(method).result(SOON):
        with pytest.raises(Untellable):
            way("T.fail_without_a_text")
    assert {span.status.description for span in exported.spans(4)} == {"Untellable"}


def test_a_generator_that_raises(exported: Exported, machines: list[Machine]) -> None:
    with pytest.raises(ValueError, match="no such thing"):
        list(machines[0].stream("T.fail_later"))
    exported.spans(2)
    for kind in "CLIENT", "SERVER":
        assert exported.one("T.fail_later", kind).status.description == "ValueError: no such thing"


def test_a_stream_that_is_closed_early_is_no_error(exported: Exported, machines: list[Machine]) -> None:
    with machines[0].stream("T.items", 1_000_000) as items:
        next(items)
    until(lambda: {"CLIENT", "SERVER"} <= {s.kind.name for s in exported.spans() if s.name == "T.items"})
    assert exported.one("T.items", "CLIENT").status.is_unset
    assert exported.one("T.items", "SERVER").status.is_unset


def test_a_stream_that_is_forgotten_ends_its_span(exported: Exported, machines: list[Machine]) -> None:
    items = machines[0].stream("T.aitems", 1_000_000)
    next(items)
    del items
    until(lambda: {"CLIENT", "SERVER"} <= {s.kind.name for s in exported.spans() if s.name == "T.aitems"})


@pytest.mark.parametrize("way", ["call", "submit"])
def test_a_call_that_takes_too_long(exported: Exported, machines: list[Machine], way: str) -> None:
    ways = {
        "call": machines[0].call,
        "submit": lambda *args, **options: machines[0].submit(*args, **options).result(SOON),
    }
    with pytest.raises(CallTimeout):
        ways[way]("T.wait", timeout=0.01)
    until(lambda: [s for s in exported.spans() if s.kind.name == "CLIENT"])
    assert exported.one("T.wait", "CLIENT").status.description.startswith("CallTimeout: ")


def test_a_call_that_is_cancelled(exported: Exported, machines: list[Machine]) -> None:
    pending = machines[0].submit("T.wait")
    assert pending.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        pending.result()
    assert exported.one("T.wait", "CLIENT").status.description == "CancelledError"


@pytest.mark.parametrize("way", ["call", "submit", "stream"])
def test_a_call_that_is_never_sent(exported: Exported, machines: list[Machine], way: str) -> None:
    ways = {
        "call": machines[0].call,
        "submit": lambda method: machines[0].submit(method).result(SOON),
        "stream": lambda method: list(machines[0].stream(method)),
    }
    machines[0].cancel()
    with pytest.raises(MachineStopped):
        ways[way]("T.plain")
    assert exported.one("T.plain", "CLIENT").status.description.startswith("MachineStopped: ")


def test_arguments_that_do_not_pickle(exported: Exported, machines: list[Machine]) -> None:
    for way in machines[0].call, machines[0].submit:
        with pytest.raises(NotPicklable):
            way("T.plain", threading.Lock())
    assert [span.status.description.split(":")[0] for span in exported.spans()] == ["NotPicklable"] * 2


def test_arguments_that_do_not_fit(exported: Exported, machines: list[Machine]) -> None:
    """That it was the caller's mistake is told apart by the frames of the traceback: a span adds none."""
    for method in "T.plain", "T.coroutine", "T.gated":
        with pytest.raises(BadArguments, match="too many positional arguments"):
            machines[0].call(method, 1, 2, 3)
    with pytest.raises(BadArguments, match="too many positional arguments"):
        list(machines[0].stream("T.items", 1, 2))


# -- The wire ----------------------------------------------------------------------------------------------------------


class Plain:
    def add(self, a: int, b: int = 0) -> int:
        return a + b

    def count(self, n: int) -> Iterator[int]:
        yield from range(n)


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(Plain())
    yield pair
    pair.close()


PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_json_calls_bring_the_trace_in_headers(exported: Exported, pair: Pair) -> None:
    foreign = Foreign(pair)
    try:
        assert foreign.json("add", [1, 2], traceparent=PARENT, tracestate="x=y") == ("200", 3)
        assert foreign.json("add", {"a": 1}, traceparent=PARENT) == ("200", 1)
        head, body, _ = foreign.request(
            "/bigrpc/T.count", b"[2]", {"content-type": "application/json", "traceparent": PARENT}
        )
        assert (head[":status"], body) == ("200", b"0\n1\n")
        assert foreign.json("add", [1, 2]) == ("200", 3)
    finally:
        foreign.sock.close()
    *traced, untraced = exported.spans(4)
    for span in traced:
        assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
        assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    assert traced[0].context.trace_state.get("x") == "y"
    assert untraced.parent is None


@pytest.mark.parametrize("carrier", [None, 5, {}, [1], {"traceparent": 7}, {"traceparent": "nonsense"}, {1: 2}])
def test_what_is_no_carrier_begins_a_new_trace(exported: Exported, pair: Pair, carrier: object) -> None:
    assert pair.call("add", 1, b=2, **{TRACE: carrier}) == 3
    (span,) = exported.spans(1)
    assert span.parent is None


def test_where_it_is_not_loaded_nothing_is_sent(
    opentelemetry: Any, monkeypatch: pytest.MonkeyPatch, machines: list[Machine]
) -> None:
    monkeypatch.delitem(sys.modules, OPENTELEMETRY, raising=False)
    machine = machines[0]
    machine.submit("T.keywords").result(SOON)
    machine.call("T.keywords")
    list(machine.stream("T.items", 0))
    stats = machine.call_stats()
    assert stats["T.keywords"].max_sent == len(pickle.dumps(((), {}), 5))
    assert stats["T.items"].max_sent == len(pickle.dumps(((0,), {}), 5))


def test_whoever_has_not_loaded_it_serves_those_who_have(
    opentelemetry: Any, monkeypatch: pytest.MonkeyPatch, pair: Pair
) -> None:
    monkeypatch.delitem(sys.modules, OPENTELEMETRY, raising=False)
    assert pair.call("add", 1, b=2, **{TRACE: {"traceparent": PARENT}}) == 3
    assert list(pair.stream("count", 2, **{TRACE: {"traceparent": PARENT}})) == [0, 1]
    foreign = Foreign(pair)
    try:
        assert foreign.json("add", [1, 2], traceparent=PARENT) == ("200", 3)
    finally:
        foreign.sock.close()


def test_serving_leaves_the_thread_as_it_was(exported: Exported, opentelemetry: Any) -> None:
    """And what it was is no part of the call's trace."""
    from bigmachine.rpc import spans

    with opentelemetry.get_tracer("test").start_as_current_span("other") as other:
        for carrier in {}, {"traceparent": PARENT}:
            serving = spans.serving(CallContext("T.plain", "driver s-1"), carrier)
            assert serving is not None
            with serving:
                assert opentelemetry.get_current_span() is not other
            assert opentelemetry.get_current_span() is other
    first, second, _ = exported.spans()
    assert first.parent is None
    assert f"{second.parent.span_id:016x}" == PARENT.split("-")[2]


def test_without_a_provider_there_are_no_spans_but_the_context_is_handed_on(
    exported: Exported, opentelemetry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bigmachine.rpc import spans

    proxy = opentelemetry.ProxyTracerProvider()
    monkeypatch.setattr(opentelemetry, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(opentelemetry, "get_tracer_provider", lambda: proxy)
    assert spans.calling("T.plain", dict) is None
    context = CallContext("T.plain", "driver s-1")
    assert spans.serving(context, None) is None
    serving = spans.serving(context, {"traceparent": PARENT})
    assert serving is not None
    with serving:
        calling = spans.calling("T.plain", dict)
        assert calling is not None
        assert calling.carrier["traceparent"] == PARENT
        calling.end(ValueError("why"))
    assert exported.spans() == []


# -- Processes ---------------------------------------------------------------------------------------------------------

PROGRAM = '''
import os, sys
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter
import bigmachine
from bigmachine import driver, parallel

class File:
    """Opened by whichever process exports."""
    def write(self, text):
        with open(os.path.join(sys.argv[1], f"{os.getpid()}.jsonl"), "a") as file:
            file.write(text)
    def flush(self):
        pass

provider = TracerProvider(resource=Resource({}))
exporter = ConsoleSpanExporter(out=File(), formatter=lambda span: span.to_json(indent=None) + "\\n")
provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=3_600_000))
trace.set_tracer_provider(provider)

class A:
    def setup(self, b):
        self.b = b
    def relay(self, address):
        machine = self.b.dial(address)
        return machine.call("B.leaf"), machine.submit("B.crowd").result(), list(machine.stream("B.items"))

class B:
    def leaf(self):
        with trace.get_tracer("test").start_as_current_span("inside"):
            return os.getpid()
    @parallel
    def crowd(self):
        return os.getpid()
    def items(self):
        yield os.getpid()

if __name__ == "__main__":
    with driver.start(http="off", maxprocs=2) as b:
        a, c = b.start(2, {"A": A(), "B": B()})
        c.wait()
        with trace.get_tracer("test").start_as_current_span("root"):
            print(a.call("A.relay", c.addr))
'''


@pytest.mark.slow
def test_processes_export_their_spans_when_they_end(tmp_path: Path) -> None:
    """Nothing but the end makes these exporters export. Each machine has two processes; those that have spans write a file."""
    program, folder = tmp_path / "program.py", tmp_path / "spans"
    program.write_text(PROGRAM)
    folder.mkdir()
    ran = subprocess.run([sys.executable, program, folder], capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr
    by_file = [[json.loads(line) for line in file.read_text().splitlines()] for file in folder.iterdir()]
    spans = [span for each in by_file for span in each]
    assert len({span["context"]["trace_id"] for span in spans}) == 1
    names = sorted((span["name"], span["kind"].removeprefix("SpanKind.")) for span in spans)
    assert names == [
        ("A.relay", "CLIENT"),
        ("A.relay", "SERVER"),
        ("B.crowd", "CLIENT"),
        ("B.crowd", "SERVER"),
        ("B.items", "CLIENT"),
        ("B.items", "SERVER"),
        ("B.leaf", "CLIENT"),
        ("B.leaf", "SERVER"),
        ("inside", "INTERNAL"),
        ("root", "INTERNAL"),
    ]
    known = {span["context"]["span_id"] for span in spans}
    assert [span["name"] for span in spans if span["parent_id"] not in known] == ["root"]
    assert len(by_file) in (3, 4)  # The driver, A, and B's processes: the parallel call may have gone to either.


@pytest.mark.slow
def test_a_driver_without_it_loads_none_of_it(tmp_path: Path) -> None:
    """Nor do its machines: 50 ms each, and it need not be installed."""
    program = tmp_path / "program.py"
    program.write_text(
        """
import sys
from bigmachine import driver

class S:
    def loaded(self):
        return sorted(name for name in sys.modules if "opentelemetry" in name or name == "bigmachine.rpc.spans")

if __name__ == "__main__":
    with driver.start(http="off") as b:
        (m,) = b.start(1, {"S": S()})
        print(m.call("S.loaded"), S().loaded())
"""
    )
    ran = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=100, check=False)
    assert (ran.returncode, ran.stdout) == (0, "[] []\n"), ran.stderr


def test_remote_errors_keep_their_shape(exported: Exported, machines: list[Machine]) -> None:
    """The traceback at the caller begins with the method's own code, spans or not."""
    with pytest.raises(ValueError, match="no such thing") as raised:
        machines[0].call("T.afail")
    text = str(raised.value.__cause__)
    assert "afail" in text
    assert "in awaited" not in text
    assert not isinstance(raised.value, RemoteError)
