"""What is known of instances, and what becomes of that."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from amazon import Scripted

from bigmachine.systems.ec2.api import Ec2Error
from bigmachine.systems.ec2.batches import Batch
from bigmachine.systems.ec2.watch import AT_ONCE, EVERY, NEW, Seen, Watch, describe, judge, parse, pause

SOON = 5.0

RUNNING = Seen("i-1", "running", public="1.2.3.4", private="10.0.0.1", zone="us-east-1a")
GONE = Seen("i-1", "terminated", "Client.UserInitiatedShutdown: User initiated shutdown")


def test_what_aws_says_of_an_instance() -> None:
    entry: dict[str, Any] = {"InstanceId": "i-1", "State": {"Name": "pending"}}
    assert parse(entry) == Seen("i-1", "pending")
    assert parse(entry).alive
    entry |= {"PublicIpAddress": "1.2.3.4", "PrivateIpAddress": "10.0.0.1", "Placement": {"AvailabilityZone": "us-east-1a"}}
    assert parse({**entry, "State": {"Name": "running"}, "StateTransitionReason": ""}) == RUNNING
    reason = {"Code": "Server.SpotInstanceTermination", "Message": "Server.SpotInstanceTermination: Instance was terminated"}
    ended = parse({**entry, "State": {"Name": "shutting-down"}, "StateReason": reason})
    assert not ended.alive
    assert ended.end == "its instance i-1 is shutting-down: Server.SpotInstanceTermination: Instance was terminated"
    assert parse({**entry, "StateReason": {"Code": "A", "Message": "because"}}).reason == "A: because"
    assert parse({**entry, "StateTransitionReason": "User initiated"}).reason == "User initiated"


def test_many_are_described_in_few_calls() -> None:
    def answer(Filters: Any) -> dict[str, Any]:
        (filter,) = Filters
        assert filter["Name"] == "instance-id"
        known = [{"InstanceId": id, "State": {"Name": "running"}} for id in filter["Values"] if id != "i-7"]
        return {"Reservations": [{"Instances": known}]}

    api = Scripted({"DescribeInstances": answer})
    ids = [f"i-{n}" for n in range(2 * AT_ONCE + 1)]
    assert describe(api, ids).keys() == set(ids) - {"i-7"}
    assert len(api.calls) == 3


def test_when_to_look() -> None:
    assert pause(waiting=False, asked=False, since=3.0) == EVERY - 3.0
    assert pause(waiting=True, asked=False, since=0.25) == 0.75
    assert pause(waiting=False, asked=True, since=0.25) == 0.75
    assert pause(waiting=False, asked=True, since=3.0) == 0.0


def test_an_absence_says_nothing_of_a_new_instance() -> None:
    watched = {"i-1": 100.0}
    assert judge(watched, {"i-1": RUNNING}, 100.0) == {"i-1": RUNNING}
    assert judge(watched, {}, 100.0 + NEW) == {}
    (ended,) = judge(watched, {}, 100.1 + NEW).values()
    assert not ended.alive
    assert judge({}, {"i-1": RUNNING}, 0.0) == {}


class Aws:
    """Answers each look with the next of what it was told to."""

    def __init__(self) -> None:
        self.answers: queue.Queue[Mapping[str, Seen] | Ec2Error] = queue.Queue()
        self.asked: queue.Queue[Sequence[str]] = queue.Queue()

    def look(self, ids: Sequence[str]) -> Mapping[str, Seen]:
        self.asked.put(ids)
        answer = self.answers.get(timeout=SOON)
        if isinstance(answer, Ec2Error):
            raise answer
        return answer


@pytest.fixture
def aws() -> Aws:
    return Aws()


@pytest.fixture
def watch(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    monkeypatch.setattr("bigmachine.systems.ec2.watch.PENDING", 0.0)
    watch = Watch(aws.look)
    yield watch
    watch.close()
    aws.answers.put({})


def test_an_end_is_told_once(aws: Aws, watch: Watch) -> None:
    ends: queue.Queue[Seen] = queue.Queue()
    watch.add("i-1", ends.put)
    aws.answers.put({"i-1": RUNNING})
    assert aws.asked.get(timeout=SOON) == ["i-1"]
    watch.ask()
    aws.answers.put({"i-1": GONE})
    assert ends.get(timeout=SOON) == GONE
    assert watch.seen("i-1") == GONE
    watch.add("i-2", ends.put)
    watch.ask()
    aws.answers.put({"i-1": GONE})
    while aws.asked.get(timeout=SOON) != ["i-2"]:
        pass
    assert ends.empty()


def test_waiting_for_an_address(aws: Aws, watch: Watch) -> None:
    watch.add("i-1", lambda _: None)
    for answer in ({}, {"i-1": Seen("i-1", "pending")}, {"i-1": RUNNING}):
        aws.answers.put(answer)
    assert watch.wait("i-1", lambda seen: seen is not None and bool(seen.public), SOON) == RUNNING
    assert watch.wait("i-1", lambda seen: False, 0.0) == RUNNING


def test_a_slow_answer_says_nothing_of_those_that_came_meanwhile() -> None:
    """AWS was not asked for the second, and asked for the first when it was young."""
    now, ended = [100.0], []
    looks = [threading.Event() for _ in range(3)]
    count = iter(range(3))

    def look(ids: Sequence[str]) -> Mapping[str, Seen]:
        number = next(count, 2)
        if number == 0:
            watch.add("i-2", ended.append)
            now[0] += 10 * NEW
        looks[number].set()
        return {"i-1": RUNNING, "i-2": Seen("i-2", "running")} if number else {}

    watch = Watch(look, clock=lambda: now[0])
    watch.add("i-1", ended.append)
    assert looks[1].wait(SOON)
    watch.close()
    assert ended == []


def test_that_aws_cannot_be_asked_says_nothing(aws: Aws, watch: Watch) -> None:
    trouble = Ec2Error("ec2:DescribeInstances", "RequestLimitExceeded", "slow down")
    watch.add("i-1", lambda _: pytest.fail("an end"))
    for answer in ({"i-1": RUNNING}, trouble):
        aws.answers.put(answer)
    assert watch.wait("i-1", lambda seen: watch.trouble is trouble, SOON) == RUNNING
    aws.answers.put({"i-1": RUNNING})
    assert watch.wait("i-1", lambda seen: watch.trouble is None, SOON) == RUNNING


def test_those_of_no_interest_are_not_asked_for(aws: Aws, watch: Watch) -> None:
    watch.add("i-1", lambda _: pytest.fail("an end"))
    aws.answers.put({})
    assert aws.asked.get(timeout=SOON) == ["i-1"]
    watch.remove(["i-1"])
    watch.ask()
    watch.add("i-2", lambda _: None)
    watch.ask()
    assert aws.asked.get(timeout=SOON) == ["i-2"]


def test_who_waits_is_woken_at_the_end(aws: Aws, watch: Watch) -> None:
    watch.add("i-1", lambda _: None)
    found: queue.Queue[Seen | None] = queue.Queue()
    waiting = threading.Thread(target=lambda: found.put(watch.wait("i-1", lambda _: False, 60.0)))
    waiting.start()
    aws.asked.get(timeout=SOON)
    watch.close()
    assert found.get(timeout=SOON) is None
    waiting.join()


# -- Batches -------------------------------------------------------------------------------------------------------------


def test_calls_at_the_same_moment_are_one() -> None:
    acted: list[Sequence[str]] = []
    batch = Batch(acted.append, collect=0.1)
    threads = [threading.Thread(target=batch.add, args=([f"i-{n}", "i-0"],)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(id for ids in acted for id in set(ids) - {"i-0"}) == [f"i-{n}" for n in range(1, 8)]
    assert len(acted) < 8


def test_a_failure_is_everybody_s_and_the_next_round_is_another() -> None:
    acted: list[Sequence[str]] = []

    def act(ids: Sequence[str]) -> None:
        acted.append(ids)
        if len(acted) == 1:
            raise Ec2Error("ec2:TerminateInstances", "InternalError", "no")

    batch = Batch(act, collect=0.0)
    with pytest.raises(Ec2Error):
        batch.add(["i-1"])
    batch.add(["i-1"])
    assert acted == [["i-1"], ["i-1"]]


def test_who_is_interrupted_takes_no_other_with_him() -> None:
    """Ctrl-C in the main thread, in a call that it makes for others, too."""
    begun, go = threading.Event(), threading.Event()
    acted: list[Sequence[str]] = []

    def act(ids: Sequence[str]) -> None:
        if not begun.is_set():
            begun.set()
            go.wait(SOON)
            raise KeyboardInterrupt
        acted.append(ids)

    batch = Batch(act, collect=0.2)

    def first() -> None:
        with pytest.raises(KeyboardInterrupt):
            batch.add(["i-1"])

    threads = [threading.Thread(target=first), threading.Thread(target=batch.add, args=(["i-2"],))]
    for thread in threads:
        thread.start()
    assert begun.wait(SOON)
    go.set()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()
    assert any("i-2" in ids for ids in acted)


def test_who_is_interrupted_while_collecting_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    acted: list[Sequence[str]] = []
    batch = Batch(acted.append, collect=0.0)

    class Interrupted:
        def wait(self, _: float) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("bigmachine.systems.ec2.batches.threading.Event", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            batch.add(["i-1"])
    later = threading.Thread(target=batch.add, args=(["i-2"],), daemon=True)
    later.start()
    later.join(SOON)
    assert not later.is_alive()
    assert acted == [["i-2"]]
