"""Delivery: what decides, with made-up hosts; and real agents to which a packed program is delivered."""

from __future__ import annotations

import dataclasses
import random
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from agents import AgentLauncher, AgentProcess, pack_bare
from rpc_pair import SOON, until

from bigmachine import State
from bigmachine.authority import Authority
from bigmachine.cache import Cache
from bigmachine.credentials import Role, client_context
from bigmachine.errors import BootError, PackError
from bigmachine.launch import packed_file
from bigmachine.machine import Machine, Network
from bigmachine.pack.archive import read_contents
from bigmachine.rpc.codec import Codec
from bigmachine.rpc.reactor import reactor
from bigmachine.system import Launcher, Order, Program
from bigmachine.systems.remote import AgentUnreachable, RemoteHostError, Trust, client, deliver
from bigmachine.systems.remote.client import AgentClient, Peer
from bigmachine.systems.remote.deliver import Delivery, Move, Site, needed, next_move
from bigmachine.testing import conformance
from bigmachine.testing.conformance import Cluster, Conformance

TRUST = Trust()
AUTHORITY = Authority("s-test")


# -- What decides --------------------------------------------------------------------------------------------------------


def state(have: Mapping[str, str], **fields: Any) -> deliver.State:
    """Sites with what each has (a letter a part), each with a store of its own."""
    return deliver.State(
        sites={name: Site(name, f"{name}'s") for name in have},
        have={f"{name}'s": set(parts) for name, parts in have.items()},
        **fields,
    )


def move(state: deliver.State, name: str, want: str = "abc") -> tuple[str, str | None] | None:
    """What part `name` gets next, and from whom."""
    found = next_move(state, state.sites[name], want)
    if found is None:
        return None
    assert found.store == state.sites[name].store
    return found.digest, found.source


def test_the_driver_sends_what_nobody_has_and_to_each_something_else() -> None:
    hosts = state({"A": "", "B": "", "C": ""})
    for name, part in ("Aa", "Bb", "Cc"):
        assert move(hosts, name) == (part, None)
        hosts.moves.append(Move(part, f"{name}'s", None))
    assert move(hosts, "A") is None


def test_a_part_that_somebody_has_is_fetched_from_there() -> None:
    hosts = state({"A": "b", "B": ""})
    assert move(hosts, "B") == ("b", "A")
    assert move(hosts, "A") == ("a", None)


def test_the_least_busy_source_is_asked() -> None:
    hosts = state({"A": "abc", "B": "abc", "C": "", "D": ""})
    assert move(hosts, "C") == ("a", "A")
    hosts.moves.append(Move("a", "C's", "A"))
    assert move(hosts, "D") == ("a", "B")


def test_busy_sources_are_waited_for() -> None:
    hosts = state({"A": "abc", **{str(n): "" for n in range(deliver.SERVES + 1)}})
    for n in range(deliver.SERVES):
        hosts.moves.append(Move("a", f"{n}'s", "A"))
    assert move(hosts, str(deliver.SERVES), "a") is None
    hosts.moves.pop()
    assert move(hosts, str(deliver.SERVES), "a") == ("a", "A")


def test_what_stands_still_is_not_waited_for() -> None:
    hosts = state({"A": "", "B": ""}, moves=[Move("a", "A's", None)])
    assert move(hosts, "B", "a") is None
    hosts.moves[0].stalled = True
    assert move(hosts, "B", "a") == ("a", None)


@pytest.mark.parametrize(
    "change", ["A cannot be reached", "B cannot reach anybody", "A is a machine", "it failed before"]
)
def test_where_nothing_can_be_fetched_the_driver_sends(change: str) -> None:
    hosts = state({"A": "a", "B": ""})
    if change == "A cannot be reached":
        hosts.sites["A"].reachable = False
    elif change == "B cannot reach anybody":
        hosts.sites["B"].reachable = False
    elif change == "A is a machine":
        hosts.sites["A"].serving = False
    else:
        hosts.broken.add(("B's", "A"))
    assert move(hosts, "B", "a") == ("a", None)


def test_agents_with_one_cache_share_the_work() -> None:
    hosts = deliver.State({"A": Site("A", "s"), "B": Site("B", "s")}, {"s": set()})
    assert move(hosts, "A", "ab") == ("a", None)
    hosts.moves.append(Move("a", "s", None))
    assert move(hosts, "B", "ab") == ("b", None)
    hosts.moves.append(Move("b", "s", None))
    assert move(hosts, "A", "ab") is None
    hosts.have["s"].update("ab")
    assert move(hosts, "B", "ab") is None


def test_who_alone_has_what_others_need_waits() -> None:
    hosts = state({"A": "abc", "B": "ab"})
    assert needed(hosts, hosts.sites["A"], "abc")
    assert not needed(hosts, hosts.sites["B"], "abc")
    hosts.have["B's"].add("c")
    assert not needed(hosts, hosts.sites["A"], "abc")


def test_who_alone_has_everything_waits_for_those_who_are_yet_to_come() -> None:
    hosts = state({"A": "abc"}, coming=1)
    assert needed(hosts, hosts.sites["A"], "abc")
    hosts.coming = 0
    assert not needed(hosts, hosts.sites["A"], "abc")
    hosts = state({"A": "abc", "B": "abc"}, coming=1)
    assert not needed(hosts, hosts.sites["A"], "abc")
    hosts.sites["A"].serving = False
    assert needed(hosts, hosts.sites["B"], "abc"), "one of them stays"


def test_who_was_sent_nothing_waits_for_nobody_who_is_yet_to_come() -> None:
    hosts = state({"A": "abc"}, coming=1)
    hosts.sites["A"].cold = False
    assert not needed(hosts, hosts.sites["A"], "abc")
    hosts = state({"A": "abc", "B": ""}, coming=1)
    hosts.sites["A"].cold = False
    assert needed(hosts, hosts.sites["A"], "abc"), "for those who are there it does"


def test_who_cannot_give_does_not_wait() -> None:
    hosts = state({"A": "abc", "B": ""}, coming=1)
    hosts.sites["A"].reachable = False
    assert not needed(hosts, hosts.sites["A"], "abc")
    hosts = state({"A": "abc", "B": ""})
    hosts.sites["B"].reachable = False
    assert not needed(hosts, hosts.sites["A"], "abc")
    hosts = state({"A": "abc", "B": ""}, broken={("B's", "A")})
    assert not needed(hosts, hosts.sites["A"], "abc")


def test_agents_with_one_cache_do_not_both_wait() -> None:
    hosts = deliver.State({"A": Site("A", "s"), "B": Site("B", "s")}, {"s": set("abc")}, coming=1)
    assert not needed(hosts, hosts.sites["A"], "abc")
    hosts.sites["A"].serving = False
    assert needed(hosts, hosts.sites["B"], "abc")


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_everybody_gets_everything(seed: int) -> None:
    """Moves end in any order, some fail, hosts come late: the driver sends each part once unless something failed."""
    chance = random.Random(seed)
    want = "abcdef"
    hosts = state({"A": "", "B": "ab"}, coming=3)
    late = ["C", "D", "E"]
    sent: Counter[str] = Counter()
    failures = 0
    for _ in range(1000):
        for site in hosts.sites.values():
            while (found := next_move(hosts, site, want)) is not None:
                hosts.moves.append(found)
        if not hosts.moves and not late:
            break
        if late and chance.random() < 0.2:
            name = late.pop()
            hosts.sites[name] = Site(name, f"{name}'s", reachable=chance.random() < 0.8)
            hosts.have[f"{name}'s"] = set()
        elif hosts.moves:
            done = hosts.moves.pop(chance.randrange(len(hosts.moves)))
            if done.source is None:
                sent[done.digest] += 1
            elif chance.random() < 0.2:
                failures += 1
                hosts.broken.add((done.store, done.source))
                continue
            hosts.have[done.store].add(done.digest)
    assert all(parts == set(want) for parts in hosts.have.values())
    alone = sum(not site.reachable for site in hosts.sites.values())
    assert max(sent.values()) <= 1 + alone + failures


# -- Doing it ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The packed toolkit."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "packed"
    folder.mkdir(exist_ok=True)
    return pack_bare(folder)


@pytest.fixture
def packed(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The packed toolkit, as the program of the tests' sessions."""
    program = dataclasses.replace(conformance.bare_program(), digest=read_contents(file).digest, file=file)
    monkeypatch.setattr(conformance, "bare_program", lambda: program)
    return file


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def parts_of(file: Path) -> list[str]:
    (manifest,) = read_contents(file).platforms
    return [part.digest for part in manifest.worker()]


def bytes_of(file: Path) -> int:
    (manifest,) = read_contents(file).platforms
    return sum(part.packed for part in manifest.worker())


def order(file: Path, id: str) -> Order:
    program = Program(("python",), digest=read_contents(file).digest, file=file)
    return Order(id, AUTHORITY.issue(Role.MACHINE, id), program, 5.0)


@pytest.mark.slow
class TestConformance(Conformance):
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def hosts(cls, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        program = dataclasses.replace(conformance.bare_program(), digest=read_contents(file).digest, file=file)
        cls.file, cls.folder = file, tmp_path_factory.mktemp("hosts")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(conformance, "bare_program", lambda: program)
            yield

    def launcher(self) -> Launcher:
        return AgentLauncher([self.folder / "1", self.folder / "2"], self.file, cache=Cache(self.folder / "cache"))


@pytest.mark.slow
def test_eight_hosts_are_sent_each_part_once(packed: Path, tmp_path: Path, cache: Cache) -> None:
    launcher = AgentLauncher([tmp_path / f"host{n}" for n in range(8)], packed, cache=cache)
    cluster = Cluster(launcher)
    with cluster.session:
        machines = cluster.start(8)
        for machine in machines:
            machine.wait(State.RUNNING, 40.0)
        (delivery,) = launcher.deliveries
        assert set(delivery.parts_sent) == set(parts_of(packed))
        assert max(delivery.parts_sent.values()) <= 2
        assert delivery.sent <= 1.5 * bytes_of(packed)
        assert [machine.call("Probe.echo", 1) for machine in machines] == [1] * 8


@pytest.mark.slow
def test_two_machines_of_one_host_are_sent_everything_once(packed: Path, tmp_path: Path, cache: Cache) -> None:
    launcher = AgentLauncher([tmp_path / "host"], packed, cache=cache)
    cluster = Cluster(launcher)
    with cluster.session:
        for machine in cluster.start(2):
            machine.wait(State.RUNNING, 40.0)
        (delivery,) = launcher.deliveries
        assert delivery.sent == bytes_of(packed)
        assert set(delivery.parts_sent.values()) == {1}


def test_a_host_that_has_all_but_one_part_is_sent_that(file: Path, tmp_path: Path, cache: Cache) -> None:
    with AgentProcess(TRUST, tmp_path / "host") as agent:
        delivery = Delivery(file, 1, cache)
        delivery.deliver(order(file, "m-1"), agent.client(), host="localhost")
        delivery.close()
    (manifest,) = read_contents(file).platforms
    part = manifest.worker()[1]
    shutil.rmtree(tmp_path / "host" / "parts" / part.digest)
    with AgentProcess(TRUST, tmp_path / "host") as agent:
        delivery = Delivery(file, 1, cache)
        launched = delivery.deliver(order(file, "m-1"), agent.client(), host="localhost", maxprocs=3)
        assert (launched.host, launched.port, launched.maxprocs) == ("localhost", agent.port, 3)
        assert delivery.sent == part.packed
        assert delivery.parts_sent == {part.digest: 1}
        delivery.close()
        delivery.close()


def deliver_all(delivery: Delivery, file: Path, agents: Sequence[AgentProcess], **options: Any) -> list[BaseException]:
    """To all at once; what went wrong."""
    failures: list[BaseException] = []

    def run(agent: AgentProcess) -> None:
        try:
            delivery.deliver(order(file, agent.id), agent.client(), host="127.0.0.1", **options)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(agent,)) for agent in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40.0)
        assert not thread.is_alive()
    return failures


def test_hosts_that_cannot_reach_each_other(
    file: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver sends to all, and nobody waits for what will not come."""
    tried: list[str] = []

    def fetch(self: AgentClient, digest: str, size: int, peers: Sequence[Peer], timeout: float = 0.0) -> None:
        tried.append(digest)
        raise RemoteHostError(self.host, "no peer gave it")

    monkeypatch.setattr(AgentClient, "fetch", fetch)
    with AgentProcess(TRUST, tmp_path / "1", "m-1") as first, AgentProcess(TRUST, tmp_path / "2", "m-2") as second:
        delivery = Delivery(file, 2, cache)
        assert deliver_all(delivery, file, [first, second]) == []
        assert set(delivery.parts_sent) == set(parts_of(file))
        assert delivery.sent <= 2 * bytes_of(file)
        delivery.close()
    assert len(tried) <= 2 * deliver.STREAMS


def test_hosts_behind_tunnels_are_sent_everything(file: Path, tmp_path: Path, cache: Cache) -> None:
    with AgentProcess(TRUST, tmp_path / "1", "m-1") as first, AgentProcess(TRUST, tmp_path / "2", "m-2") as second:
        delivery = Delivery(file, 2, cache)
        assert deliver_all(delivery, file, [first, second], peer_host=None) == []
        assert set(delivery.parts_sent.values()) == {2}
        assert delivery.sent == 2 * bytes_of(file)
        delivery.close()


def test_the_first_host_waits_for_the_second(file: Path, tmp_path: Path, cache: Cache) -> None:
    """It has everything, and nobody else does; so what comes later is not sent by the driver."""
    with AgentProcess(TRUST, tmp_path / "1", "m-1") as first, AgentProcess(TRUST, tmp_path / "2", "m-2") as second:
        delivery = Delivery(file, 2, cache)
        thread = threading.Thread(target=deliver_all, args=(delivery, file, [first]))
        thread.start()
        until(lambda: len(delivery.parts_sent) == len(parts_of(file)))
        assert deliver_all(delivery, file, [second]) == []
        thread.join(SOON)
        assert not thread.is_alive()
        assert set(delivery.parts_sent.values()) == {1}
        assert delivery.sent == bytes_of(file)
        delivery.close()


def test_a_host_that_never_comes_is_not_waited_for(file: Path, tmp_path: Path, cache: Cache) -> None:
    with AgentProcess(TRUST, tmp_path / "1", "m-1") as agent:
        delivery = Delivery(file, 2, cache)
        thread = threading.Thread(target=deliver_all, args=(delivery, file, [agent]))
        thread.start()
        until(lambda: len(delivery.parts_sent) == len(parts_of(file)))
        delivery.lost()
        thread.join(SOON)
        assert not thread.is_alive()
        delivery.close()


def test_nor_one_that_dies(file: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigmachine.systems.remote.client.RETRY_WITHIN", 0.2)
    with AgentProcess(TRUST, tmp_path / "1", "m-1") as first, AgentProcess(TRUST, tmp_path / "2", "m-2") as second:
        second.process.kill()
        second.wait()
        delivery = Delivery(file, 2, cache)
        (failure,) = deliver_all(delivery, file, [first, second])
        assert isinstance(failure, AgentUnreachable)
        assert set(delivery.parts_sent.values()) == {1}
        delivery.close()


def test_it_does_not_wait_for_ever(file: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliver, "HOLD", 0.2)
    with AgentProcess(TRUST, tmp_path / "1", "m-1") as agent:
        delivery = Delivery(file, 2, cache)
        assert deliver_all(delivery, file, [agent]) == []
        delivery.close()


def test_an_agent_that_waits_long_stays(file: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than agents do without a driver: while others are sent to, or something large is compressed."""
    path = deliver._Compressed.path

    def slow(self: Any, part: Any) -> Path:
        time.sleep(1.5)
        return path(self, part)

    monkeypatch.setattr(deliver, "STAY", 0.2)
    monkeypatch.setattr(deliver._Compressed, "path", slow)
    with AgentProcess(TRUST, tmp_path / "1", "m-1", idle=0.8) as agent:
        delivery = Delivery(file, 1, cache)
        assert deliver_all(delivery, file, [agent]) == []
        delivery.close()


def test_a_machine_that_is_not_wanted_any_more(file: Path, tmp_path: Path, cache: Cache) -> None:
    with AgentProcess(TRUST, tmp_path / "1", "m-1") as agent:
        delivery = Delivery(file, 2, cache)
        failures: list[BaseException] = []
        thread = threading.Thread(target=lambda: failures.extend(deliver_all(delivery, file, [agent])))
        thread.start()
        until(lambda: len(delivery.parts_sent) == len(parts_of(file)))
        delivery.cancel("m-1")
        thread.join(SOON)
        assert [str(failure).partition(": ")[2] for failure in failures] == ["its machine was stopped"]
        (failure,) = deliver_all(delivery, file, [agent])
        assert str(failure).endswith(": its machine was stopped")
        delivery.close()


def test_a_platform_for_which_it_was_not_packed(
    file: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = AgentClient.info
    monkeypatch.setattr(
        AgentClient, "info", lambda *args, **options: dataclasses.replace(info(*args, **options), platform="plan9/vax")
    )
    with AgentProcess(TRUST, tmp_path / "1", "m-1") as agent:
        with pytest.raises(PackError, match="not for plan9/vax: pack it with --platform plan9/vax"):
            Delivery(file, 1, cache).deliver(order(file, "m-1"), agent.client(), host="localhost")
        assert agent.wait() == 0


def test_it_need_not_be_packed_for_all_that_hosts_may_be(file: Path, cache: Cache) -> None:
    program = Program(("python",), digest=read_contents(file).digest, file=file)
    (ours,) = (each.platform for each in read_contents(file).platforms)
    assert packed_file(program, ("plan9/vax", ours)) is program
    Delivery(file, 1, cache, platforms=["plan9/vax", ours]).close()
    with pytest.raises(PackError, match="not for plan9/vax: pack it with --platform plan9/vax"):
        packed_file(program, ("plan9/vax", "plan9/alpha"))


def test_parts_are_compressed_once(file: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    delivery = Delivery(file, 1, cache, platforms=[read_contents(file).platforms[0].platform])
    names = {f"z-{digest}" for digest in parts_of(file)}
    until(lambda: names == {path.name for path in cache.root.glob("images/*")})
    delivery.close()

    def never(*_: object) -> None:
        raise AssertionError("it was compressed again")

    monkeypatch.setattr(deliver, "write_part", never)
    with AgentProcess(TRUST, tmp_path / "1", "m-1") as agent:
        delivery = Delivery(file, 1, cache)
        assert deliver_all(delivery, file, [agent]) == []
        assert delivery.sent == bytes_of(file)
        delivery.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut before it is asked", "cut before it answers", "never answered"])
def test_an_answer_that_is_lost_costs_no_machine(
    file: Path, tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    request, readable = client._Connection.request, client._readable
    asked: list[str] = []

    def breaking(connection: client._Connection, method: str, path: str, *args: Any, **options: Any) -> None:
        cut = path == "/exec" and how != "never answered" and not asked
        if not cut or how == "cut before it answers":
            request(connection, method, path, *args, **options)
        if cut:
            asked.append(path)
            raise ConnectionResetError("the network has cut it")

    monkeypatch.setattr(client._Connection, "request", breaking)
    if how == "never answered":
        monkeypatch.setattr(client, "LOOK", 0.2)
        monkeypatch.setattr(client, "_readable", lambda sock, within: not within and readable(sock, within))
    with AgentProcess(TRUST, tmp_path / "1", "m-1") as agent:
        launched = deliver.deliver(order(file, "m-1"), agent.client(), file, host="localhost")
        driver = AUTHORITY.issue(Role.DRIVER, "driver")
        network = Network(lambda: client_context(driver), Codec(), reactor())
        machine = Machine.dialled(launched.address, network)
        assert machine.supervisor.call("Supervisor.ping", (), {}, SOON) == "m-1"
        machine.supervisor.call("Supervisor.shutdown", (0.0,), {}, SOON)
        machine.disconnect()
        assert agent.wait() == 0


def test_an_agent_that_dies_instead_of_executing(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with AgentProcess(TRUST, tmp_path / "1", "m-1") as agent:
        execute = AgentClient.execute

        def dying(self: AgentClient, request: Mapping[str, Any]) -> int:
            agent.kill()
            agent.wait()
            return execute(self, request)

        monkeypatch.setattr(AgentClient, "execute", dying)
        with pytest.raises(AgentUnreachable, match=r"is unreachable: it has ended, and no machine took its place$"):
            deliver.deliver(order(file, "m-1"), agent.client(), file, host="localhost")


def test_a_cache_that_cannot_be_written_to(file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with AgentProcess(TRUST, tmp_path / "1", "m-1") as agent:
        delivery = Delivery(file, 1, Cache(tmp_path / "file" / "cache"))
        assert deliver_all(delivery, file, [agent]) == []
        delivery.close()


@pytest.mark.slow
def test_a_host_without_the_right_python(packed: Path, tmp_path: Path, cache: Cache) -> None:
    """The error says which it has, and the agent has ended."""
    launcher = AgentLauncher([tmp_path / "host"], packed, cache=cache)
    with pytest.MonkeyPatch.context() as patch:
        contents = read_contents(packed)
        (manifest,) = contents.platforms
        other = dataclasses.replace(contents, python="3.4", platforms=(dataclasses.replace(manifest, python="3.4"),))
        patch.setattr(deliver, "read_contents", lambda _: other)
        cluster = Cluster(launcher)
        with cluster.session:
            (machine,) = cluster.start()
            with pytest.raises(BootError, match=r"'launch' .*no Python 3.4 on .*; there are ") as caught:
                machine.wait(State.RUNNING, 20.0)
            assert sys.executable in str(caught.value)
            (agent,) = launcher.agents.values()
            assert agent.process.wait(SOON) == 0
