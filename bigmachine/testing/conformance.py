"""What every system must do, as tests: ours pass them, and so should one of your own. Needs pytest.

    from bigmachine.testing.conformance import Conformance

    class TestSlurm(Conformance):
        def launcher(self):
            return SlurmLauncher(partition="test", maxprocs=2)

One session with two machines serves all tests that leave them as they are; the others start their own. Machines run the
bare toolkit: it must be installed there, or be shipped by the system.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import io
import os
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from ..address import format_address, parse_address
from ..authority import Authority
from ..credentials import Credentials, Role, client_context, server_name
from ..errors import (
    BadArguments,
    BigmachineError,
    CallTimeout,
    Forbidden,
    MachineStopped,
    NotPicklable,
    RemoteTraceback,
    UnknownMethod,
    Unreachable,
    UsageError,
)
from ..fleet import Fleet
from ..inside import monitor, profiles, variables
from ..launch import bare_program, packed_file
from ..logs import Logs
from ..machine import Machine, Network
from ..rpc.client import Client
from ..rpc.codec import Codec
from ..rpc.reactor import reactor
from ..rpc.streams import Stream
from ..session import Session
from ..state import State
from ..supervisor.service import OWNER_ONLY
from ..system import Launcher, Program
from .services import BadSetup, Bomb, Meeting, Probe, Trouble

SOON = 5.0
"""Seconds for what takes milliseconds: for computers that have much else to do."""


@functools.cache
def _toolkit(ships: tuple[str, ...]) -> Program:
    """What machines run that have nothing; it is packed once."""
    return packed_file(bare_program(), ships)


class Cluster:
    """A session whose authority the tests know. `output` is what its machines have said."""

    def __init__(self, launcher: Launcher, **options: Any) -> None:
        name = f"s-{secrets.token_hex(4)}"
        self.launcher = launcher
        self.output = io.StringIO()
        self.authority = Authority(name)
        driver = self.authority.issue(Role.DRIVER, name)
        network = Network(lambda: client_context(driver), Codec(stream_type=Stream), reactor())
        ships = tuple(getattr(launcher, "ships", ()))
        program = _toolkit(ships) if ships else bare_program()
        logs = options.pop("logs", None) or Logs(stream=self.output)
        fleet = Fleet(launcher, self.authority, program, network, logs=logs, **options)
        self.session = Session(network, fleet=fleet)

    def start(self, n: int = 1, services: Mapping[str, object] | None = None, **options: Any) -> list[Machine]:
        """Machines on their way, with services that the tests know unless `services` are given."""
        default = {"Probe": Probe("hello"), "Meeting": Meeting()}
        return self.session.start(n, default if services is None else services, **options)


def client_as(credentials: Credentials, machine: Machine, process: int | None = None) -> Client:
    """A client of `machine`'s supervisor, or of one of its processes, by which somebody else calls."""
    host, port, id = parse_address(machine.addr)
    context = client_context(credentials)
    return Client(host, port, server_name(id, process), context, Codec(), reactor(), address=machine.addr)


def eventually(condition: Callable[[], object], what: str, within: float = SOON) -> None:
    """Returns as soon as `condition()` is true; fails the test where it is not in time."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within:g} s: {what}")
        time.sleep(0.005)


class Conformance:
    """Subclass this, give `launcher`, and let pytest run it."""

    start_within = 30.0
    """Seconds in which a machine must be running: minutes, for a cloud."""

    isolated = True
    """Machines are processes of their own, with an environment of their own."""

    def launcher(self) -> Launcher:
        """A new launcher; with two or more service processes a machine, where the system has them."""
        raise NotImplementedError("a conformance test must say which launcher it tests")

    @pytest.fixture(scope="class")
    @classmethod
    def cluster(cls) -> Iterator[Cluster]:
        """Two machines that are running, for tests that leave them so."""
        cluster = Cluster(cls().launcher())
        with cluster.session:
            for machine in cluster.start(2):
                machine.wait(State.RUNNING, cls.start_within)
            yield cluster

    @pytest.fixture
    def machines(self, cluster: Cluster) -> list[Machine]:
        return cluster.session.machines()[:2]

    @pytest.fixture
    def machine(self, machines: list[Machine]) -> Machine:
        return machines[0]

    @contextlib.contextmanager
    def another(self, **options: Any) -> Iterator[Cluster]:
        """A cluster of one test's own."""
        cluster = Cluster(self.launcher(), **options)
        with cluster.session:
            yield cluster

    def one(self, cluster: Cluster, **options: Any) -> Machine:
        """A machine that is running."""
        (machine,) = cluster.start(1, **options)
        machine.wait(State.RUNNING, self.start_within)
        return machine

    # -- What a machine is -------------------------------------------------------------------------------------------

    def test_machines_differ_and_say_what_they_are(self, cluster: Cluster, machines: list[Machine]) -> None:
        first, second = machines
        assert first.id != second.id
        assert first.addr != second.addr
        for machine in machines:
            assert (machine.state, machine.error, machine.owned) == (State.RUNNING, None, True)
            assert parse_address(machine.addr)[2] == machine.id
            assert machine.hostname in machine.addr
            assert machine.maxprocs >= 1
            info = machine.info()
            assert (info.id, info.maxprocs) == (machine.id, machine.maxprocs)
            assert machine.call("Probe.address") == machine.addr
            assert cluster.launcher.ended(machine.id) is None

    def test_vitals_are_plausible(self, machine: Machine) -> None:
        memory, disk, load = machine.mem_info(), machine.disk_info(), machine.load_info()
        assert memory.total > 64 << 20
        assert 0 < memory.available <= memory.total
        assert 1 << 20 < memory.processes < memory.total
        assert 0 <= memory.used_percent <= 100
        assert 0 < disk.free <= disk.total
        assert 0 <= disk.used_percent <= 100
        assert load.load1 >= 0

    def test_it_can_be_looked_into(self, cluster: Cluster, machines: list[Machine]) -> None:
        """What the debug page has of a machine does not depend on where it comes from."""
        machines[1].call("Probe.hello", "you")
        document = monitor.of(cluster.session).snapshot(fresh=True).value
        assert document["session"]["system"] == cluster.launcher.name
        shown = {each["id"]: each for each in document["machines"]}
        for machine in machines:
            entry = shown[machine.id]
            assert (entry["state"], entry["missing"], entry["error"]) == ("RUNNING", None, None)
            assert 0 <= entry["vitals"]["memory"]["percent"] <= 100
            assert {"supervisor", "0"} <= {each["process"] for each in entry["processes"]}
            assert {"connect", "setup"} <= {step["name"] for step in entry["boot"] if not step["failed"]}
        served = {each["method"]: each["served"] for each in document["methods"]}
        assert served["Probe.hello"]["count"] >= 1
        assert served["Probe.hello"]["p50"] > 0

    def test_profiles_and_variables_are_of_all_machines(self, cluster: Cluster, machines: list[Machine]) -> None:
        taken = profiles.take(cluster.session, "threads", machine=machines[1])
        assert not taken.missing
        assert (machines[1].addr, "0") in taken.processes or not self.isolated
        collected = variables.collect(cluster.session)
        assert not collected.missing
        assert {(machine.addr, "0") for machine in machines} <= collected.samples.keys()

    def test_keepalive_replies_are_timed(self, machine: Machine) -> None:
        eventually(lambda: machine.keepalive_reply_times, "a keepalive reply")
        assert all(0 < seconds < SOON for seconds in machine.keepalive_reply_times)
        assert machine.next_keepalive is not None
        assert machine.next_keepalive > time.monotonic()

    def test_a_machine_is_found_by_its_name_too(self, cluster: Cluster, machines: list[Machine]) -> None:
        """Where another machine has got the address, a call ends there."""
        host, port, _ = parse_address(machines[0].addr)
        with pytest.raises(Unreachable):
            cluster.session.dial(format_address(host, port, machines[1].id)).call("Probe.echo", timeout=SOON)

    # -- Calls -------------------------------------------------------------------------------------------------------

    def test_calls(self, machines: list[Machine]) -> None:
        for machine in machines:
            assert machine.call("Probe.hello", "there", mark="?") == "hello there?"
        calls = [machine.submit("Probe.echo", i) for i in range(50) for machine in machines]
        assert [call.result(SOON) for call in calls] == [i for i in range(50) for _ in machines]
        assert machines[0].service("Probe", Probe).hello("you") == "hello you!"
        assert machines[0].retry_call("Probe.echo", 1, timeout=SOON) == 1

    def test_calls_can_be_awaited(self, machine: Machine) -> None:
        async def ask() -> list[Any]:
            return await asyncio.gather(*(machine.submit("Probe.echo", i) for i in range(10)))

        assert asyncio.run(ask()) == list(range(10))

    @pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
    def test_arguments_and_results_of_any_size(self, machine: Machine, size: int) -> None:
        value = os.urandom(size)
        assert machine.call("Probe.echo", value) == value
        assert machine.submit("Probe.echo", [value, "text"]).result(SOON) == [value, "text"]

    def test_the_caller_is_known(self, machines: list[Machine]) -> None:
        first, second = machines
        assert first.call("Probe.caller").startswith("driver s-")
        assert first.call("Probe.relay", second.addr, "Probe.caller") == f"machine {first.id}"

    def test_statistics_count_on_both_ends(self, machine: Machine) -> None:
        before = machine.call_stats().get("Probe.pid"), machine.served_stats().get("Probe.pid")
        machine.call("Probe.pid")
        for was, now in zip(before, (machine.call_stats(), machine.served_stats()), strict=True):
            assert now["Probe.pid"].count == (was.count if was else 0) + 1

    # -- Errors ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("how", ["call", "submit"])
    def test_an_exception_keeps_its_type_and_says_where_it_comes_from(self, machine: Machine, how: str) -> None:
        ask = machine.call if how == "call" else lambda *args: machine.submit(*args).result(SOON)
        with pytest.raises(Trouble, match="bad luck") as caught:
            ask("Probe.fail", "bad luck", 13)
        assert caught.value.code == 13
        assert isinstance(caught.value.__cause__, RemoteTraceback)
        assert "in fail" in str(caught.value.__cause__)
        assert any(machine.addr in note for note in caught.value.__notes__)

    def test_an_exception_of_another_machine_passes_through(self, machines: list[Machine]) -> None:
        first, second = machines
        with pytest.raises(Trouble) as caught:
            first.call("Probe.relay", second.addr, "Probe.fail", "far away", 5)
        assert any(second.addr in note for note in caught.value.__notes__)
        assert any(first.addr in note for note in caught.value.__notes__)

    def test_an_unknown_name_says_which_exist(self, machine: Machine) -> None:
        with pytest.raises(UnknownMethod, match="no service 'Nope' on this machine; it has Meeting, Probe"):
            machine.call("Nope.echo")
        with pytest.raises(UnknownMethod, match=r"service 'Probe' has no method 'nope'; it has .*echo, .*hello"):
            machine.call("Probe.nope")
        with pytest.raises(UnknownMethod, match=r"<Service>\.<method>"):
            machine.call("Probe")
        with pytest.raises(UnknownMethod):
            machine.call("Probe._session")
        with pytest.raises(UnknownMethod):
            machine.call("Probe.setup")
        with pytest.raises(BadArguments, match="hello"):
            machine.call("Probe.hello", 1, 2, 3)

    def test_what_cannot_be_pickled_is_named(self, machine: Machine) -> None:
        with pytest.raises(NotPicklable, match=r"argument 2 of Probe\.relay"):
            machine.call("Probe.relay", 1, threading.Lock())
        with pytest.raises(NotPicklable, match=r"the reply of Probe\.unpicklable"):
            machine.call("Probe.unpicklable")

    def test_refused_services(self, cluster: Cluster) -> None:
        for services in ({"Supervisor": Probe()}, {"a b": Probe()}, {"Probe": Probe}):
            with pytest.raises(UsageError):
                cluster.session.start(1, services)
        with pytest.raises(NotPicklable, match="service 'Probe'"):
            cluster.session.start(1, {"Probe": threading.Lock()})
        with pytest.raises(UsageError):
            cluster.session.start(0, {"Probe": Probe()})

    # -- Streams -----------------------------------------------------------------------------------------------------

    def test_generators_stream(self, machine: Machine) -> None:
        assert list(machine.stream("Probe.count", 1000)) == list(range(1000))
        assert list(machine.stream("Probe.acount", 20)) == list(range(20))
        blocks = [len(block) for block in machine.stream("Probe.blocks", 20, 100_000)]
        assert blocks == [100_000] * 20

    def test_an_exception_ends_a_stream(self, machine: Machine) -> None:
        items = machine.stream("Probe.count", 3, fail=True)
        assert [next(items), next(items), next(items)] == [0, 1, 2]
        with pytest.raises(Trouble, match="after the last item"):
            next(items)

    @pytest.mark.parametrize("method", ["Probe.count", "Probe.acount"])
    def test_closing_a_stream_closes_the_generator(self, machine: Machine, method: str) -> None:
        list(machine.stream(method, 1))
        assert machine.call("Probe.closed", timeout=SOON)
        with machine.stream(method, 10_000_000) as items:
            assert next(items) == 0
        assert machine.call("Probe.closed", timeout=SOON)

    def test_an_argument_streams(self, machine: Machine) -> None:
        data = os.urandom(3_000_000)
        digest = len(data), hashlib.sha256(data).hexdigest()
        assert machine.call("Probe.digest", Stream(io.BytesIO(data))) == digest
        pieces = (data[i : i + 100_000] for i in range(0, len(data), 100_000))
        assert machine.submit("Probe.digest", Stream(pieces)).result(SOON) == digest

    # -- Time --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("method", ["Probe.nap", "Probe.anap"])
    def test_a_timeout_cancels_the_call_there(self, machine: Machine, method: str) -> None:
        with pytest.raises(CallTimeout) as caught:
            machine.call(method, timeout=0.2)
        assert isinstance(caught.value, TimeoutError)
        assert machine.call("Probe.napping", timeout=SOON)
        assert machine.call("Probe.cancelled", timeout=SOON)
        call = machine.submit(method, timeout=0.2)
        started = time.monotonic()
        with pytest.raises(CallTimeout):
            call.result(SOON)
        assert time.monotonic() - started < SOON / 2
        assert machine.call("Probe.napping", timeout=SOON)
        assert machine.call("Probe.cancelled", timeout=SOON)
        machine.call("Probe.wake")
        machine.call("Probe.wake")

    @pytest.mark.parametrize("method", ["Probe.nap", "Probe.anap"])
    def test_cancelling_a_call_cancels_it_there(self, machine: Machine, method: str) -> None:
        call = machine.submit(method)
        assert machine.call("Probe.napping", timeout=SOON)
        assert call.cancel()
        assert call.cancelled()
        with pytest.raises(CancelledError):
            call.result()
        assert machine.call("Probe.cancelled", timeout=SOON)
        machine.call("Probe.wake")

    def test_cancelling_a_call_that_somebody_waits_for(self, machine: Machine) -> None:
        call = machine.submit("Probe.nap")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(call.exception)
            assert machine.call("Probe.napping", timeout=SOON)
            assert call.cancel()
            with pytest.raises(CancelledError):
                waiting.result(SOON)
        assert machine.call("Probe.cancelled", timeout=SOON)
        machine.call("Probe.wake")

    # -- Services ----------------------------------------------------------------------------------------------------

    def test_setup_runs_once_in_every_process(self, machines: list[Machine]) -> None:
        assert all(machine.call("Probe.setups")[1] == 1 for machine in machines)
        for machine in machines:
            calls = [machine.submit("Probe.where") for _ in range(20 * machine.maxprocs)]
            replicas = {call.result(SOON) for call in calls}
            assert {setups for _, setups in replicas} == {1}
            assert len(replicas) <= machine.maxprocs

    def test_services_of_local_classes(self, cluster: Cluster) -> None:
        factor = 3

        class Local:
            def times(self, n: int) -> int:
                return factor * n

        machine = self.one(cluster, services={"Local": Local()})
        try:
            assert machine.call("Local.times", 14) == 42
            assert machine.call("Local.times", 2) == 6
        finally:
            machine.cancel()

    def test_a_function_travels_as_an_argument(self, machine: Machine) -> None:
        base = 40
        function = machine.call("Probe.echo", lambda n: base + n)
        assert function(2) == 42

    def test_a_failing_setup_fails_the_machine_at_once(self, cluster: Cluster) -> None:
        started = time.monotonic()
        (machine,) = cluster.start(1, {"Model": BadSetup()})
        with pytest.raises(Trouble, match="no such model") as caught:
            machine.wait(State.RUNNING, self.start_within)
        assert time.monotonic() - started < self.start_within
        assert caught.value.code == 7
        assert any("'Model'" in note for note in caught.value.__notes__)
        assert machine.state is State.STOPPED
        with pytest.raises(MachineStopped, match="no such model"):
            machine.call("Model.anything")

    def test_environ(self, cluster: Cluster) -> None:
        if not self.isolated:
            pytest.skip("machines of this system share the environment of the test's process")
        machine = self.one(cluster, environ={"BIGM_CONFORMANCE": "a = b"})
        try:
            assert machine.call("Probe.environ", "BIGM_CONFORMANCE") == "a = b"
            assert machine.call("Probe.pid") != os.getpid()
        finally:
            machine.cancel()
        assert cluster.session.machines()[0].call("Probe.environ", "BIGM_CONFORMANCE") is None

    def test_machines_call_each_other_in_a_cycle(self, machines: list[Machine]) -> None:
        addresses = [machine.addr for machine in machines]
        assert machines[0].call("Probe.bounce", addresses, 30, timeout=30.0) == 30

    def test_dialling(self, cluster: Cluster, machines: list[Machine]) -> None:
        first, second = machines
        assert cluster.session.dial(first.addr) is first
        assert first.call("Probe.relay", second.addr, "Probe.hello", "you") == "hello you!"
        assert first.call("Probe.relay", second.addr, "Probe.where")[1] == 1
        with pytest.raises(UsageError, match="not a machine's address"):
            cluster.session.dial("nowhere")
        with Cluster(self.launcher()).session as foreigner, pytest.raises(Unreachable):
            foreigner.dial(first.addr).call("Probe.echo", timeout=SOON)

    # -- Parallel ----------------------------------------------------------------------------------------------------

    def test_parallel_methods_run_in_every_process(self, machine: Machine) -> None:
        n = machine.maxprocs
        if n == 1:
            pytest.skip("machines of this system have one service process")
        calls = [machine.submit("Probe.meet", n, timeout=SOON) for _ in range(n)]
        assert len({call.result(SOON) for call in calls}) == n

    def test_parallel_methods_run_one_at_a_time_in_each_process(self, machines: list[Machine]) -> None:
        calls = [machine.submit("Probe.crowd") for machine in machines for _ in range(6 * machine.maxprocs)]
        assert {call.result(SOON) for call in calls} == {1}

    # -- Life and death ----------------------------------------------------------------------------------------------

    def test_states_and_calls_before_running(self) -> None:
        seen: list[State] = []
        with self.another() as cluster:
            (machine,) = cluster.start()
            machine.on_state(lambda machine: seen.append(machine.state))
            early = [machine.submit("Probe.echo", i) for i in range(3)]
            given_up = machine.submit("Probe.echo", 3)
            given_up.cancel()
            assert machine.call("Probe.echo", "first", timeout=self.start_within) == "first"
            assert [call.result(SOON) for call in early] == [0, 1, 2]
            machine.wait(State.STARTING, 0)
        assert seen == sorted(seen)
        assert seen[-2:] == [State.RUNNING, State.STOPPED]
        machine.wait(State.STOPPED, 0)

    def test_stopped_machines(self) -> None:
        with self.another() as cluster:
            first, second, third = cluster.start(3)
            for machine in (first, second, third):
                machine.wait(State.RUNNING, self.start_within)
            waiting = [machine.submit("Probe.block") for machine in (first, second)]
            assert third.call("Probe.relay", first.addr, "Supervisor.ping") == first.id
            started = time.monotonic()
            first.shutdown()
            assert time.monotonic() - started < 4.0  # A neighbour's open connection does not keep the machine.
            second.cancel()
            for machine, call in zip((first, second), waiting, strict=True):
                with pytest.raises(MachineStopped, match=machine.id):
                    call.result(SOON)
                started = time.monotonic()
                for ask in (machine.call, machine.stream, lambda method, of=machine: of.submit(method).result(SOON)):
                    with pytest.raises(MachineStopped, match=machine.id):
                        ask("Probe.echo")
                with pytest.raises(MachineStopped):
                    machine.wait(State.RUNNING)
                assert time.monotonic() - started < 1.0
                assert machine.state is State.STOPPED
                assert cluster.launcher.ended(machine.id) is not None
            assert first.error is None
            assert isinstance(second.error, MachineStopped)
            assert third.call("Probe.echo", 3) == 3

    def test_shutdown_can_be_repeated_and_ends_the_session(self) -> None:
        with self.another() as cluster:
            machine = self.one(cluster)
            machine.shutdown()
            machine.shutdown()
            machine.cancel()
            cluster.session.shutdown()
            cluster.session.shutdown()
            with pytest.raises(UsageError, match="shut down"):
                cluster.start()
        assert cluster.session.machines() == [machine]

    def test_shutdown_while_machines_start(self) -> None:
        """Whatever the machines are about to do, they are gone when `shutdown` returns."""
        for pause in (0.0, 0.005, 0.05, 0.3):
            with self.another() as cluster:
                machines = cluster.start(2)
                machines[0].cancel()
                time.sleep(pause)  # No event is waited for: the moment is meant to be any.
            for machine in machines:
                assert machine.state is State.STOPPED
                with pytest.raises(BigmachineError):
                    machine.call("Probe.echo")
                self.assert_gone(cluster, machine)

    def test_nothing_is_left(self) -> None:
        us = psutil.Process()
        before = {process.pid for process in us.children(recursive=True)}
        with self.another() as cluster:
            machines = cluster.start(2)
            assert [machine.call("Probe.echo", 1, timeout=self.start_within) for machine in machines] == [1, 1]
            machines[0].call("Probe.relay", machines[1].addr, "Probe.echo", 2)
            abandoned = machines[0].submit("Probe.block"), machines[1].stream("Probe.count", 10_000_000)
        for machine in machines:
            self.assert_gone(cluster, machine)
        with pytest.raises(MachineStopped):
            abandoned[0].result(SOON)
        eventually(
            lambda: {process.pid for process in us.children(recursive=True)} <= before, "the end of all processes"
        )

    def assert_gone(self, cluster: Cluster, machine: Machine) -> None:
        """No thread, no connection, no listener of the machine's."""
        threads = [thread.name for thread in threading.enumerate() if machine.id in thread.name]
        eventually(
            lambda: not any(machine.id in thread.name for thread in threading.enumerate()), f"the end of {threads}"
        )
        if machine.addr == machine.id:
            return  # It was never launched.
        assert cluster.launcher.ended(machine.id) is not None
        port = parse_address(machine.addr)[1]

        def sockets() -> list[Any]:
            found = psutil.Process().net_connections("tcp")
            ends = [(entry.laddr, entry.raddr or entry.laddr, entry.status) for entry in found]
            return [end for end in ends if port in (end[0].port, end[1].port) and end[2] != psutil.CONN_TIME_WAIT]

        eventually(lambda: not sockets(), f"the end of all sockets of {machine.addr}")
        with pytest.raises(Unreachable):
            client_as(cluster.authority.issue(Role.DRIVER, "d"), machine).call("Supervisor.ping", (), {}, SOON)

    def test_several_sessions_at_once(self, machine: Machine) -> None:
        with self.another() as cluster:
            other = self.one(cluster)
            assert other.call("Probe.pid") == other.call("Probe.pid")
            assert [each.call("Probe.address") for each in (machine, other)] == [machine.addr, other.addr]
        assert machine.call("Probe.echo", 1) == 1

    # -- Trust -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("process", [None, 0])
    def test_another_sessions_certificate_is_refused(
        self, machine: Machine, process: int | None, tmp_path: Path
    ) -> None:
        method = "Supervisor.ping" if process is None else "Probe.echo"
        credentials = Authority("s-other").issue(Role.DRIVER, "s-other")
        stranger = Client(
            *parse_address(machine.addr)[:2],
            server_name(machine.id, process),
            _trusting(credentials),
            Codec(),
            reactor(),
            address=machine.addr,
        )
        with pytest.raises(Unreachable):
            stranger.call(method, (Bomb(str(tmp_path / "unpickled")),), {}, SOON)
        assert not (tmp_path / "unpickled").exists()
        assert machine.call("Probe.echo", 1) == 1

    @pytest.mark.parametrize("process", [None, 0])
    def test_a_client_without_a_certificate_is_refused(
        self, machine: Machine, process: int | None, tmp_path: Path
    ) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        host, port, id = parse_address(machine.addr)
        nobody = Client(host, port, server_name(id, process), context, Codec(), reactor(), address=machine.addr)
        with pytest.raises(Unreachable):
            nobody.call("Probe.echo", (Bomb(str(tmp_path / "unpickled")),), {}, SOON)
        assert not (tmp_path / "unpickled").exists()
        assert machine.call("Probe.echo", 1) == 1

    @pytest.mark.parametrize(
        "data",
        [b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 100, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b""],
        ids=["HTTP/1.1", "garbage", "half a hello", "nothing"],
    )
    def test_whoever_knocks_disturbs_nobody(self, cluster: Cluster, machine: Machine, data: bytes) -> None:
        host, port, _ = parse_address(machine.addr)
        visitors = [socket.create_connection((host, port), SOON) for _ in range(20)]
        try:
            for visitor in visitors:
                with contextlib.suppress(ConnectionError):
                    visitor.sendall(data)
            assert machine.call("Probe.echo", 1, timeout=SOON) == 1
            assert machine.info().id == machine.id
            if data[:1] not in (b"", b"\x16"):
                for visitor in visitors:
                    with contextlib.suppress(ConnectionError):
                        assert visitor.recv(1) == b""
                told = f"{machine.addr}: bigmachine: closed a connection from"
                eventually(lambda: told in cluster.output.getvalue(), "what the machine says of it")
        finally:
            for visitor in visitors:
                visitor.close()

    def test_a_machine_may_not_do_what_is_the_owners(self, cluster: Cluster, machine: Machine, tmp_path: Path) -> None:
        neighbour = client_as(cluster.authority.issue(Role.MACHINE, "m-neighbour"), machine)
        try:
            assert neighbour.call("Supervisor.ping", (), {}, SOON) == machine.id
            for method in sorted(OWNER_ONLY):
                with pytest.raises(Forbidden, match="only the session's driver"):
                    neighbour.call(method, (Bomb(str(tmp_path / "unpickled")),), {}, SOON)
        finally:
            neighbour.close()
        assert not (tmp_path / "unpickled").exists()
        assert machine.call("Probe.echo", 1) == 1


def _trusting(credentials: Credentials) -> ssl.SSLContext:
    """A client's context that takes any server: it is the server's refusal that is tested."""
    context = client_context(credentials)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
