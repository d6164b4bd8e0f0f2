"""The variables of a session's processes: collected, summed, and as Prometheus reads them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import bigmachine
from bigmachine import State, vars
from bigmachine.errors import UsageError
from bigmachine.inside.variables import MAX_TIMEOUT, Collected, as_json, as_prometheus, collect, series
from bigmachine.machine import Machine
from bigmachine.rpc.calls import Call
from bigmachine.session import Session
from bigmachine.systems.local import LocalLauncher
from bigmachine.testing import TestSystem
from bigmachine.testing.conformance import SOON, eventually
from bigmachine.vars import Sample


def worker() -> Any:
    """A service. Its class travels by value: machines do not import this file."""

    sent = vars.counter("inside_sent_total", "declared by the driver, and sent")
    sent.add(100)

    class Worker:
        def __init__(self) -> None:
            self.sent = sent

        def setup(self, b: Session) -> None:
            from bigmachine import vars

            self.session = b
            self.jobs = vars.counter("inside_jobs_total", "jobs done", kind='a "b"\\')
            vars.publish("inside_queue", lambda: 3, "waiting")

        @bigmachine.parallel
        def work(self, n: int) -> None:
            self.jobs.add(n)
            self.sent.add()
            sent.add()

        def ask(self, addr: str) -> object:
            return self.session.dial(addr).call("Worker.nothing")

        def nothing(self) -> None: ...

        def refuse(self) -> str:
            try:
                self.session.variables()
            except Exception as error:
                return str(error)
            return ""

        def hold(self, fifo: str) -> None:
            """The interpreter lock, until the other end is closed."""
            import ctypes
            import os

            ctypes.PyDLL(None).read(os.open(fifo, os.O_RDONLY), ctypes.create_string_buffer(1), 1)

    return Worker()


def started(b: Session, n: int) -> list[Machine]:
    machines = b.start(n, {"Worker": worker()})
    for machine in machines:
        machine.wait(State.RUNNING, 20.0)
    return machines


def calls(end: str, method: str) -> str:
    return f'bigmachine_rpc_calls_total{{end="{end}",method="Worker.{method}"}}'


def parsed(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """By the name of the sample; each has been declared, once."""
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in families:
        assert family.type in ("counter", "gauge", "unknown")
        for sample in family.samples:
            # An empty label is the same as none.
            found.setdefault(sample.name, []).append(({k: v for k, v in sample.labels.items() if v}, sample.value))
    for samples in found.values():
        keys = [tuple(sorted(labels.items())) for labels, _ in samples]
        assert len(keys) == len(set(keys))
    return found


# -- Processes of their own ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local() -> Iterator[tuple[Session, list[Machine]]]:
    """Two machines with two service processes each, that have done some work."""
    with bigmachine.start(LocalLauncher(maxprocs=2)) as b:
        one, two = started(b, 2)
        for machine in (one, two):
            for call in [machine.submit("Worker.work", 5) for _ in range(10)]:
                call.result(SOON)
        one.call("Worker.ask", two.addr, timeout=SOON)
        yield b, [one, two]


JOBS = 'inside_jobs_total{kind="a \\"b\\"\\\\"}'


def test_sums_and_machines(local: tuple[Session, list[Machine]]) -> None:
    b, machines = local
    vars.counter("inside_jobs_total", kind='a "b"\\').add(
        1000 - vars.counter("inside_jobs_total", kind='a "b"\\').read()
    )
    found = b.variables()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["missing"] == {}
    assert found["machines"].keys() == {"driver", *(machine.addr for machine in machines)}
    by_machine = [found["machines"][machine.addr] for machine in machines]
    assert [figures[JOBS] for figures in by_machine] == [50, 50]
    assert found["sum"][JOBS] == 1100
    assert [figures["inside_sent_total"] for figures in by_machine] == [20, 20]
    assert [figures["inside_queue"] for figures in by_machine] == [6, 6]
    assert list(found["sum"]) == sorted(found["sum"])


def test_calls_at_both_ends(local: tuple[Session, list[Machine]]) -> None:
    b, (one, two) = local
    found = b.variables()["machines"]
    assert [found[machine.addr][calls("server", "work")] for machine in (one, two)] == [10, 10]
    assert found["driver"][calls("client", "work")] == 20
    assert found["driver"][calls("client", "ask")] == found[one.addr][calls("server", "ask")] == 1
    # From one machine to the other.
    assert found[one.addr][calls("client", "nothing")] == found[two.addr][calls("server", "nothing")] == 1
    longest = 'bigmachine_rpc_seconds_max{end="server",method="Worker.work"}'
    assert b.variables()["sum"][longest] == max(found[one.addr][longest], found[two.addr][longest])
    assert any(name.startswith("bigmachine_rpc_calls_total") and "Supervisor." in name for name in found[one.addr])


def test_what_prometheus_reads(local: tuple[Session, list[Machine]]) -> None:
    b, machines = local
    collected = collect(b)
    text = as_prometheus(collected)
    found = parsed(text)
    processes = {(machine.addr, process) for machine in machines for process in ("supervisor", "0", "1")}
    assert collected.samples.keys() == {("driver", "driver"), *processes}
    up = {(labels["machine"], labels["process"]): value for labels, value in found["bigmachine_vars_up"]}
    assert up == dict.fromkeys([("driver", "driver"), *processes], 1)
    jobs = [(labels, value) for labels, value in found["inside_jobs_total"] if labels["machine"] != "driver"]
    assert {(labels["machine"], labels["process"]) for labels, _ in jobs} == {
        who for who in processes if who[1] != "supervisor"
    }
    assert {labels["kind"] for labels, _ in jobs} == {'a "b"\\'}
    assert sum(value for _, value in jobs) == 100
    assert "# HELP inside_jobs_total jobs done\n# TYPE inside_jobs_total counter\n" in text


def test_a_process_that_does_not_answer_is_named(local: tuple[Session, list[Machine]], tmp_path: Path) -> None:
    b, (one, two) = local
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    holding = one.submit("Worker.hold", str(fifo))
    with open(fifo, "wb"):  # Opens when the other end is opened.
        time.sleep(0.1)
        found = b.variables(timeout=3.0)  # In which all others answer, whatever else there is to do.
    holding.result(SOON)
    assert found["missing"] == {one.addr: {"0": "no answer within 3 s"}}
    assert {one.addr, two.addr} <= found["machines"].keys()
    assert b.variables()["missing"] == {}


def test_a_service_does_not_collect(local: tuple[Session, list[Machine]]) -> None:
    _, (one, _) = local
    assert one.call("Worker.refuse") == (
        "variables are collected by the driver; a service publishes its own, with bigmachine.vars"
    )


def test_machines_import_nothing_for_it_that_they_do_without() -> None:
    code = "import sys, bigmachine.worker; print([name for name in sys.modules if name in %r])"
    unwanted = ("bigmachine.vars", "bigmachine.inside", "prometheus_client")
    assert subprocess.check_output([sys.executable, "-c", code % (unwanted,)], text=True) == "[]\n"


# -- The driver's own process --------------------------------------------------------------------------------------------


@pytest.fixture
def test() -> Iterator[tuple[TestSystem, Session]]:
    system = TestSystem(maxprocs=2)
    with bigmachine.start(system) as b:
        yield system, b


def test_what_machines_of_the_test_system_publish_is_counted_once(test: tuple[TestSystem, Session]) -> None:
    _, b = test
    before = vars.counter("inside_jobs_total", kind='a "b"\\').read()
    machines = started(b, 2)
    for machine in machines:
        machine.call("Worker.work", 5)
    found = b.variables()
    assert found["sum"][JOBS] == found["machines"]["driver"][JOBS] == before + 10
    assert found["sum"]["inside_queue"] == 3
    assert [found["machines"][machine.addr][calls("server", "work")] for machine in machines] == [1, 1]
    assert found["missing"] == {}
    parsed(as_prometheus(collect(b)))


def test_machines_that_are_gone(test: tuple[TestSystem, Session]) -> None:
    system, b = test
    one, two = started(b, 2)
    one.call("Worker.work", 1)
    system.kill(one)
    one.wait(State.STOPPED, SOON)
    found = b.variables()
    assert found["machines"].keys() == {"driver", two.addr}
    assert found["missing"] == {}
    assert found["sum"][calls("client", "work")] == 1, "what the driver has done does not go down"


def test_a_machine_that_dies_meanwhile_is_named(
    test: tuple[TestSystem, Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    system, b = test
    one, two = started(b, 2)
    reached, released = threading.Event(), threading.Event()

    def slow() -> list[Machine]:
        reached.set()
        released.wait(SOON)
        return []

    # The first machine's process is at its answer until the machine has died.
    monkeypatch.setattr(system._machines[one.id].workers._workers[0].session, "machines", slow)
    found: list[dict[str, Any]] = []
    collector = threading.Thread(target=lambda: found.append(b.variables()))
    collector.start()
    assert reached.wait(SOON)
    system.crash(one, "service process 0 was killed by SIGSEGV; its last output:\nthe last words")
    collector.join(SOON)
    released.set()
    assert found[0]["missing"][one.addr]["0"].endswith("was killed by SIGSEGV; its last output:")
    assert two.addr in found[0]["machines"]


def test_a_program_that_never_tells_is_named(test: tuple[TestSystem, Session]) -> None:
    _, b = test
    released = threading.Event()
    vars.publish("inside_stuck", lambda: released.wait(SOON))
    try:
        found = b.variables(timeout=0.1)
    finally:
        released.set()
        vars.publish("inside_stuck", lambda: 0)
    assert found["missing"] == {"driver": {"driver": "no answer within 0.1 s"}}
    assert found["sum"] == {}


def test_nobody_is_asked_who_does_not_run_yet() -> None:
    class Never(TestSystem):
        def launch(self, orders: Any) -> Any:
            return [Call() for _ in orders]

    with bigmachine.start(Never()) as b:
        (machine,) = b.start(1, {"Worker": worker()})
        eventually(lambda: machine.state is State.STARTING, "the start")
        found = b.variables()
    assert found["machines"].keys() == {"driver"}
    assert found["missing"] == {}


def test_a_machine_that_is_not_there_is_named(test: tuple[TestSystem, Session]) -> None:
    _, b = test
    b.dial("https://localhost:1/m-gone/")
    reasons = b.variables()["missing"]["https://localhost:1/m-gone/"]
    assert reasons.keys() == {"supervisor", "0"}
    assert all("Connection refused" in reason for reason in reasons.values())
    assert parsed(as_prometheus(collect(b)))["bigmachine_vars_up"][1:] == [
        ({"machine": "https://localhost:1/m-gone/", "process": process}, 0) for process in ("supervisor", "0")
    ]


@pytest.mark.parametrize("timeout", [0, -1, 1e9, "abc", None, math.nan, math.inf])
def test_timeouts_that_are_none(test: tuple[TestSystem, Session], timeout: Any) -> None:
    with pytest.raises(UsageError, match=f"more than 0 and at most {MAX_TIMEOUT:g}"):
        test[1].variables(timeout=timeout)


# -- Sums ----------------------------------------------------------------------------------------------------------------


def gathered(*samples: Sample) -> Collected:
    """Each of a process of its own."""
    return Collected({("m", str(i)): [sample] for i, sample in enumerate(samples)}, {})


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("jobs_total", "counter", 9),
        ("waiting", "gauge", 9),
        ("wait_max", "gauge", 6),
        ("backup_timestamp_seconds", "gauge", 6),
        ("wait_min", "gauge", 1),
        ("hit_ratio", "gauge", 3),
        ("used_percent", "gauge", 3),
        ("odd_max", "counter", 9),
    ],
)
def test_what_several_processes_say(name: str, kind: str, expected: float) -> None:
    found = as_json(gathered(*(Sample(name, kind, "", {"a": "b"}, value) for value in (2, 1, 6))))
    assert found["sum"] == found["machines"]["m"] == {f'{name}{{a="b"}}': expected}


def test_values_that_json_has_not() -> None:
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5, "e": 2**70}
    collected = gathered(*(Sample(name, "gauge", "", {}, value) for name, value in values.items()))
    assert as_json(collected)["sum"] == {"a": "NaN", "b": "+Inf", "c": "-Inf", "d": 0.5, "e": 2**70}
    assert {name: repr(found[0][1]) for name, found in parsed(as_prometheus(collected)).items() if name in values} == {
        name: repr(float(value)) for name, value in values.items()
    }


def test_series_are_written_as_prometheus_writes_them() -> None:
    sample = Sample("a_total", "counter", "of\nmany \\ lines", {"z": 'q"\\\n', "b": "π"}, 1)
    assert series(sample) == 'a_total{b="π",z="q\\"\\\\\\n"}'
    found = parsed(as_prometheus(gathered(sample)))
    assert found["a_total"] == [({"b": "π", "z": 'q"\\\n', "machine": "m", "process": "0"}, 1)]


def test_counters_end_as_prometheus_wants_it() -> None:
    collected = gathered(Sample("hits", "counter", "", {}, 1), Sample("hits", "counter", "hits so far", {"a": "b"}, 2))
    text = as_prometheus(collected)
    assert [value for _, value in parsed(text)["hits_total"]] == [1, 2]
    assert "# HELP hits_total hits so far\n" in text
    assert as_json(collected)["sum"] == {"hits": 1, 'hits{a="b"}': 2}


def test_a_name_that_is_of_another_kind_elsewhere() -> None:
    text = as_prometheus(gathered(Sample("hits", "counter", "", {}, 1), Sample("hits_total", "gauge", "", {}, 2)))
    assert "# TYPE hits_total untyped\n" in text
    assert [value for _, value in parsed(text)["hits_total"]] == [1, 2]
