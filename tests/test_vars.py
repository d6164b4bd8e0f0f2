"""Variables of one process."""

from __future__ import annotations

import copy
import decimal
import json
import os
import pickle
import signal
import threading
from collections.abc import Callable

import numpy as np
import pytest

import bigmachine
from bigmachine import vars
from bigmachine.errors import UsageError
from bigmachine.rpc.jsonform import to_json
from bigmachine.rpc.stats import Stats
from bigmachine.vars import ERRORS, Registry, Sample, rpc_samples


@pytest.fixture
def registry() -> Registry:
    return Registry()


def values(registry: Registry) -> dict[str, float]:
    return {sample.name: sample.value for sample in registry.snapshot()}


# -- Variables -----------------------------------------------------------------------------------------------------------


def test_what_there_is(registry: Registry) -> None:
    registry.counter("jobs_total", "jobs done", kind="image", shard=3).add(2)
    queue = registry.gauge("queue_length")
    queue.set(7)
    queue.add(-2)
    queue.add()
    registry.publish("held_bytes", lambda: 2.5, "bytes in the cache")
    assert registry.snapshot() == [
        Sample("jobs_total", "counter", "jobs done", {"kind": "image", "shard": "3"}, 2),
        Sample("queue_length", "gauge", "", {}, 6),
        Sample("held_bytes", "gauge", "bytes in the cache", {}, 2.5),
    ]


def test_the_module_has_one_registry() -> None:
    assert bigmachine.vars is vars
    mine = vars.counter("test_vars_module_total", "in this test")
    mine.add(3)
    assert vars.counter("test_vars_module_total") is mine
    assert Sample("test_vars_module_total", "counter", "in this test", {}, 3) in vars.snapshot()
    vars.gauge("test_vars_gauge").set(1)
    vars.publish("test_vars_published", lambda: 2)
    assert {"test_vars_gauge", "test_vars_published"} <= {sample.name for sample in vars.snapshot()}


def test_the_same_name_and_labels_are_the_same_variable(registry: Registry) -> None:
    first = registry.counter("a_total", x="1", y="2")
    assert registry.counter("a_total", "said later", y=2, x=1) is first
    assert registry.counter("a_total", "said last", x="1") is not first
    assert registry.gauge("b", name="n", function="f") is registry.gauge("b", function="f", name="n")
    assert [sample.help for sample in registry.snapshot()] == ["said later", "said later", ""]


def test_a_function_that_is_published_again_takes_the_place_of_the_first(registry: Registry) -> None:
    registry.publish("size", lambda: 1)
    registry.publish("size", lambda: 2)
    assert values(registry) == {"size": 2}


@pytest.mark.parametrize("n", [-1, -0.001, float("-inf"), float("nan")])
def test_a_counter_never_goes_down(registry: Registry, n: float) -> None:
    counter = registry.counter("a_total")
    counter.add(1)
    with pytest.raises(UsageError, match=r"counter a_total: cannot add .* use a gauge"):
        counter.add(n)
    assert counter.read() == 1


@pytest.mark.parametrize("value", ["1", b"1", None, [1]])
def test_what_is_no_number_is_refused_at_once(registry: Registry, value: object) -> None:
    with pytest.raises(TypeError):
        registry.gauge("b").set(value)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        registry.gauge("b").add(value)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        registry.counter("a_total").add(value)  # type: ignore[arg-type]
    assert values(registry) == {"b": 0, "a_total": 0}


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("", {}),
        ("9lives", {}),
        ("jobs-done", {}),
        ("jobs done", {}),
        ("größe", {}),
        ("jobs\n", {}),
        ("_total", {}),
        ("bigmachine_rpc_calls_total", {}),
        ("bigmachine_vars_mine", {}),
        ("a", {"": 1}),
        ("a", {"b:c": 1}),
        ("a", {"b-c": 1}),
        ("a", {"__b": 1}),
        ("a", {"machine": 1}),
        ("a", {"process": 1}),
    ],
)
def test_names_that_prometheus_would_not_take(registry: Registry, name: str, labels: dict[str, object]) -> None:
    declare: Callable[[], object]
    for declare in (
        lambda: registry.counter(name, **labels),
        lambda: registry.gauge(name, **labels),
        lambda: registry.publish(name, lambda: 1, **labels),
    ):
        with pytest.raises(UsageError):
            declare()
    assert registry.snapshot() == []


def test_names_that_it_takes(registry: Registry) -> None:
    for name in ("a", "_", "job:rate5m", "A_1", "bigmachine_mine"):
        registry.gauge(name, _="x", kind_2="y")
    assert len(registry.snapshot()) == 5


def test_a_name_has_one_kind(registry: Registry) -> None:
    registry.counter("a")
    registry.gauge("b")
    registry.publish("c", lambda: 1)
    for wrong, text in (
        (lambda: registry.gauge("a", x="1"), "variable a: there is a counter a already"),
        (lambda: registry.counter("a_total"), "variable a_total: there is a counter a already"),
        (lambda: registry.gauge("a_total"), "variable a_total: there is a counter a already"),
        (lambda: registry.publish("a", lambda: 1), "variable a: there is a counter a already"),
        (lambda: registry.counter("b", x="1"), "variable b: there is a gauge b already"),
        (lambda: registry.counter("b_total"), "variable b_total: there is a gauge b already"),
        (
            lambda: registry.publish("b", lambda: 1),
            "variable b: it is a gauge already, and cannot be a published function",
        ),
        (lambda: registry.gauge("c"), "variable c: it is a published function already, and cannot be a gauge"),
        (lambda: registry.publish("d", 1), "variable d: publish needs a function, not 1"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match=f"^{text}"):
            wrong()
    assert [sample.name for sample in registry.snapshot()] == ["a", "b", "c"]
    registry.gauge("d_total")
    registry.gauge("d")
    registry.gauge("c", x="1")


# -- Snapshots -----------------------------------------------------------------------------------------------------------


def test_a_function_that_raises_is_left_out_and_counted(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    registry.publish("broken", lambda: 1 / 0, part="x")
    registry.publish("text", lambda: "12")  # type: ignore[arg-type,return-value]
    registry.publish("huge", lambda: 10**400)
    registry.publish("fine", lambda: 1)
    for count in (1, 2):
        samples = {(sample.name, *sample.labels.values()): sample for sample in registry.snapshot()}
        assert samples.keys() == {("fine",), (ERRORS, "broken"), (ERRORS, "text"), (ERRORS, "huge")}
        assert all(
            sample.value == count and sample.kind == "counter" for who, sample in samples.items() if who != ("fine",)
        )
    said = capsys.readouterr().err.splitlines()
    assert (
        said[0] == "bigmachine: variable broken is left out, as reading it raised ZeroDivisionError: division by zero"
    )
    assert len(said) == 3


def test_a_function_may_use_variables_itself(registry: Registry) -> None:
    def size() -> float:
        registry.counter("readings_total").add()
        return registry.gauge(f"new_{len(registry.snapshot.__name__)}").read()

    registry.publish("size", size)
    registry.snapshot()
    assert values(registry)["readings_total"] >= 1


def test_values_are_plain(registry: Registry) -> None:
    """Who unpickles them may have nothing but the standard library."""
    registry.counter("a_total").add(np.float64(1.5))
    registry.gauge("b").set(np.int64(3))
    registry.publish("c", lambda: decimal.Decimal("0.5"))  # type: ignore[arg-type,return-value]
    registry.publish("d", lambda: True)
    registry.counter("e_total").add(2**70)
    samples = registry.snapshot()
    assert [(type(sample.value), sample.value) for sample in samples] == [
        (float, 1.5), (float, 3.0), (float, 0.5), (int, 1), (int, 2**70)
    ]  # fmt: skip
    assert pickle.loads(pickle.dumps(samples)) == samples


def test_figures_of_calls() -> None:
    stats = Stats()
    stats.record("A.b", 1.0, 10, 1000, False)
    stats.record("A.b", 3.0, 5, 2000, True)
    samples = rpc_samples("server", stats.snapshot())
    assert {sample.name: sample.value for sample in samples} == {
        "bigmachine_rpc_calls_total": 2,
        "bigmachine_rpc_errors_total": 1,
        "bigmachine_rpc_seconds_total": 4.0,
        "bigmachine_rpc_seconds_max": 3.0,
        "bigmachine_rpc_sent_bytes_total": 15,
        "bigmachine_rpc_sent_bytes_max": 10,
        "bigmachine_rpc_received_bytes_total": 3000,
        "bigmachine_rpc_received_bytes_max": 2000,
    }
    assert all(sample.labels == {"end": "server", "method": "A.b"} for sample in samples)
    assert all((sample.kind == "counter") == sample.name.endswith("_total") for sample in samples)


def test_a_variable_that_is_pickled_is_the_one_of_that_name() -> None:
    one = vars.counter("test_vars_pickled_total", "help", name="x", kind=1)
    two = vars.gauge("test_vars_pickled_too")
    one.add()
    assert pickle.loads(pickle.dumps(one)) is copy.deepcopy(one) is one
    assert pickle.loads(pickle.dumps(two)) is two
    elsewhere = pickle.dumps(Registry().counter("test_vars_elsewhere_total", a="b"))
    assert pickle.loads(elsewhere) is vars.counter("test_vars_elsewhere_total", a="b")


def test_samples_have_a_json_form() -> None:
    """For `curl`."""
    sample = Sample("a_total", "counter", "some", {"b": "c"}, 1)
    expected = {"name": "a_total", "kind": "counter", "help": "some", "labels": {"b": "c"}, "value": 1}
    assert json.loads(to_json([sample], "it")) == [expected]


# -- Threads, signals, forks ---------------------------------------------------------------------------------------------


def test_threads(registry: Registry) -> None:
    counter, gauge, barrier = registry.counter("a_total"), registry.gauge("b"), threading.Barrier(9)
    reading = threading.Event()

    def work() -> None:
        barrier.wait(10)
        for i in range(2000):
            counter.add()
            gauge.add(-1)
            registry.counter("c_total", shard=i % 50).add()

    def read() -> None:
        barrier.wait(10)
        seen = 0.0
        while not reading.is_set():
            registry.snapshot()
            now = counter.read()
            assert now >= seen
            seen = now

    threads = [threading.Thread(target=work) for _ in range(8)]
    reader = threading.Thread(target=read)
    for thread in (*threads, reader):
        thread.start()
    for thread in threads:
        thread.join()
    reading.set()
    reader.join()
    assert (counter.read(), gauge.read()) == (16000, -16000)
    assert [sample.value for sample in registry.snapshot() if sample.name == "c_total"] == [320] * 50


def test_a_gauge_that_is_set_forgets_what_was_added(registry: Registry) -> None:
    gauge = registry.gauge("b")
    adder = threading.Thread(target=gauge.add, args=(5,))
    adder.start()
    adder.join()
    gauge.add(2)
    assert gauge.read() == 7
    gauge.set(1)
    assert gauge.read() == 1


def test_a_signal_handler_may_add(registry: Registry) -> None:
    counter = registry.counter("a_total")
    before = signal.signal(signal.SIGUSR1, lambda *_: registry.counter("a_total").add())
    try:
        for _ in range(100):
            counter.add()
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert counter.read() == 200


def test_the_origin_is_another_in_a_fork(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    before = registry.origin
    assert before == registry.origin != Registry().origin
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert registry.origin != before
