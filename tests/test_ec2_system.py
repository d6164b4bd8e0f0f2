"""The launcher of `ec2` without instances: what it asks of AWS, and what becomes of orders when something is in their way."""

from __future__ import annotations

import datetime
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from amazon import Scripted

from bigmachine.authority import Authority
from bigmachine.credentials import Role
from bigmachine.errors import UsageError
from bigmachine.launch import SYSTEMS, bare_program, find_system, make_launcher
from bigmachine.pack.itself import TOOLKIT, pack_itself
from bigmachine.system import Order, Program
from bigmachine.systems.ec2 import Ec2Launcher, booting, naming, system, upkeep
from bigmachine.systems.ec2.api import Ec2Error
from bigmachine.systems.ec2.arrival import Found
from bigmachine.systems.ec2.launching import NoCapacity
from bigmachine.systems.remote import RemoteHostError
from bigmachine.testing.conformance import eventually

SOON = 10.0

TYPE = {
    "InstanceType": "m7i.large",
    "ProcessorInfo": {"SupportedArchitectures": ["x86_64"]},
    "VCpuInfo": {"DefaultVCpus": 2},
    "MemoryInfo": {"SizeInMiB": 8192},
    "SupportedUsageClasses": ["on-demand", "spot"],
}


class Aws(Scripted):
    """An EC2 whose instances get addresses at which nobody is. `states` are theirs, by id."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.refuse: Callable[[str, dict[str, Any]], None] = lambda operation, parameters: None
        self.happened: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        self._ids = itertools.count(1)
        group = {"GroupId": "sg-1", "IpPermissions": [{"IpProtocol": "-1", "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}]}
        subnet = {"SubnetId": "subnet-1", "AvailabilityZone": "us-east-1a", "VpcId": "vpc-1"}
        super().__init__(
            {
                "DescribeInstanceTypes": lambda **_: {"InstanceTypes": [TYPE]},
                "GetParameter": lambda **_: {"Parameter": {"Value": "ami-1"}},
                "GetCallerIdentity": lambda **_: {"Arn": "arn:aws:iam::1:user/ada"},
                "DescribeSubnets": lambda **_: {"Subnets": [subnet]},
                "DescribeSecurityGroups": lambda **_: {"SecurityGroups": [group]},
                "AuthorizeSecurityGroupIngress": lambda **_: {},
                "RunInstances": self._run,
                "DescribeInstances": self._describe,
                "TerminateInstances": self._terminate,
                "CreateTags": lambda **_: {},
                "GetConsoleOutput": lambda **_: {"Output": "[  OK  ] Started it.\n\nhello\nbigmachine agent: OSError: no\n"},
                "DescribeSpotPriceHistory": lambda **_: {"SpotPriceHistory": []},
            }
        )

    def call(self, service: str, operation: str, *, region: str = "", **parameters: Any) -> dict[str, Any]:
        self.refuse(operation, parameters)
        answer = super().call(service, operation, **parameters)
        self.happened.put((operation, parameters))
        return answer

    def _run(self, MaxCount: int, **_: Any) -> dict[str, Any]:
        ids = [f"i-{next(self._ids)}" for _ in range(MaxCount)]
        self.states.update(dict.fromkeys(ids, "running"))
        return {"Instances": [{"InstanceId": id} for id in ids]}

    def _describe(self, Filters: Any) -> dict[str, Any]:
        found = [self._entry(id, self.states[id]) for id in Filters[0]["Values"] if id in self.states]
        return {"Reservations": [{"Instances": found}]}

    def _entry(self, id: str, state: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"InstanceId": id, "State": {"Name": state}, "Placement": {"AvailabilityZone": "us-east-1a"}}
        if state == "running":
            return {**entry, "PublicIpAddress": "203.0.113.1", "PrivateIpAddress": "10.0.0.1"}
        return {**entry, "StateReason": {"Code": "Client.VolumeLimitExceeded", "Message": "Volume limit exceeded"}}

    def _terminate(self, InstanceIds: list[str]) -> dict[str, Any]:
        self.states.update(dict.fromkeys(InstanceIds, "terminated"))
        return {}

    def wait_for(self, wanted: str) -> dict[str, Any]:
        """The parameters of the next call of that operation."""
        while True:
            operation, parameters = self.happened.get(timeout=SOON)
            if operation == wanted:
                return parameters


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bare toolkit, packed; for this platform, as nothing is delivered."""
    return pack_itself(TOOLKIT, ["linux/amd64"])[0]


@pytest.fixture
def aws() -> Aws:
    return Aws()


@pytest.fixture
def launcher(aws: Aws, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ec2Launcher]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(booting, "reach", lambda *_: nobody(launcher))
    launcher = Ec2Launcher()
    launcher._api = aws  # type: ignore[assignment]
    launcher._types = None
    yield launcher
    hold.set()
    launcher.close()
    hold.clear()


hold = threading.Event()
"""Set: whoever knocks gives up."""


def nobody(launcher: Ec2Launcher) -> Found:
    """An agent that cannot be reached, until the test says so."""
    hold.wait(SOON)
    return Found.SILENT


def orders(file: Path, n: int = 1) -> list[Order]:
    authority = Authority("s-test")
    program = replace(bare_program(), file=file)
    ids = [f"m-{number:06x}" for number in range(n)]
    return [Order(id, authority.issue(Role.MACHINE, id), program, 120.0) for id in ids]


def placed(launcher: Ec2Launcher, n: int) -> None:
    """Returns when `n` machines have got their instances."""
    eventually(lambda: sum(each.placed is not None for each in launcher._machines.values()) == n, "instances", SOON)


def test_it_is_a_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_system("ec2") is Ec2Launcher
    assert "ec2" in SYSTEMS
    launcher = make_launcher("ec2", {"ec2type": "c7g.large,c6g.large", "port": 8443, "image": True}, set())
    assert isinstance(launcher, Ec2Launcher)
    assert (launcher.settings.types, launcher.settings.port) == (("c7g.large", "c6g.large"), 8443)
    with pytest.raises(UsageError, match="has no option 'ec2tpye'"):
        make_launcher("ec2", {"ec2tpye": "m7i.large"}, {"ec2tpye"})


def test_files_of_the_user_s_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the file cannot be read: .*missing\.yaml"):
        Ec2Launcher(ec2cloudconfig=str(tmp_path / "missing.yaml"))


def test_what_it_ships(launcher: Ec2Launcher, aws: Aws, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BIGMACHINE_CACHE", str(tmp_path / "cache"))
    assert launcher.ships == ("linux/amd64",)
    assert launcher.ships == ("linux/amd64",)
    assert len(aws.made("DescribeInstanceTypes")) == 1


def test_without_a_packed_file(launcher: Ec2Launcher) -> None:
    order = orders(Path("x"))[0]
    with pytest.raises(UsageError, match="bigmachine pack"):
        launcher.launch([replace(order, program=Program(("python",)))])


def test_all_is_looked_up_once(launcher: Ec2Launcher, aws: Aws, file: Path) -> None:
    launcher.prepare()
    launcher.launch(orders(file))
    aws.wait_for("RunInstances")
    launcher.launch(orders(file))
    aws.wait_for("RunInstances")
    for operation in ("GetParameter", "DescribeSubnets", "GetCallerIdentity"):
        assert len(aws.made(operation)) == 1


def test_a_look_up_that_failed_is_made_again(launcher: Ec2Launcher, aws: Aws, file: Path) -> None:
    def refuse(operation: str, parameters: dict[str, Any]) -> None:
        if operation == "GetParameter":
            raise Ec2Error("ssm:GetParameter", "AccessDeniedException", "no")

    aws.refuse = refuse
    (future,) = launcher.launch(orders(file))
    with pytest.raises(Ec2Error, match="allow ssm:GetParameter"):
        future.result(SOON)
    aws.refuse = lambda operation, parameters: None
    launcher.launch(orders(file))
    aws.wait_for("RunInstances")


def test_the_call_that_makes_them(launcher: Ec2Launcher, aws: Aws, file: Path) -> None:
    launcher.launch(orders(file, 3))
    request = aws.wait_for("RunInstances")
    assert (request["MaxCount"], request["ImageId"]) == (3, "ami-1")
    tags = {tag["Key"]: tag["Value"] for tag in request["TagSpecifications"][0]["Tags"]}
    assert tags["bigmachine:session"] == "s-test"
    assert tags["bigmachine:owner"] == "arn:aws:iam::1:user/ada"
    assert " bigmachine " in tags["Name"]
    assert request["UserData"].startswith(b"\x1f\x8b")
    assert len(request["UserData"]) <= 16384


def test_an_agent_that_cannot_be_reached(launcher: Ec2Launcher, aws: Aws, file: Path) -> None:
    (future,) = launcher.launch(orders(file))
    hold.set()
    with pytest.raises(RemoteHostError) as caught:
        future.result(SOON)
    assert str(caught.value).startswith("i-1 (spot m7i.large in us-east-1a): nobody answered at 203.0.113.1 port 443")
    assert str(caught.value).endswith("; its agent said: OSError: no")
    assert aws.wait_for("TerminateInstances")["InstanceIds"] == ["i-1"]
    assert launcher.console("m-000000") == "hello\nbigmachine agent: OSError: no"
    assert launcher.ended("m-000000") == str(caught.value)
    assert [step.name for step in launcher.timeline("m-000000")] == ["api", "pending", "agent"]


def test_an_instance_that_does_not_start(launcher: Ec2Launcher, aws: Aws, file: Path) -> None:
    """The failure is the launch's; who was told of ends is told after that."""
    aws.answers["RunInstances"] = lambda **_: aws.states.update({"i-9": "terminated"}) or {"Instances": [{"InstanceId": "i-9"}]}
    (future,) = launcher.launch(orders(file))
    told: queue.Queue[tuple[bool, str]] = queue.Queue()
    launcher.on_end("m-000000", lambda reason: told.put((future.done(), reason)))
    with pytest.raises(RemoteHostError, match=r"i-9 is terminated: Client\.VolumeLimitExceeded: Volume limit exceeded"):
        future.result(SOON)
    done, reason = told.get(timeout=SOON)
    assert done
    assert "Client.VolumeLimitExceeded" in reason
    assert told.empty()


def test_some_have_no_instance(launcher: Ec2Launcher, aws: Aws, file: Path) -> None:
    def run(MaxCount: int, **parameters: Any) -> dict[str, Any]:
        if len(aws.made("RunInstances")) > 1:
            raise Ec2Error("ec2:RunInstances", "InsufficientInstanceCapacity", "no")
        aws.states["i-1"] = "running"
        return {"Instances": [{"InstanceId": "i-1"}]}

    aws.answers["RunInstances"] = run
    futures = launcher.launch(orders(file, 3))
    for future in futures[1:]:
        with pytest.raises(NoCapacity, match="2 of 3 instances not to be had"):
            future.result(SOON)
    assert not futures[0].done()
    assert launcher.ended("m-000000") is None
    assert "2 of 3" in (launcher.ended("m-000001") or "")


def test_who_is_stopped_before_there_is_an_instance_gets_none(launcher: Ec2Launcher, aws: Aws, file: Path) -> None:
    """An instance that comes nevertheless is given to the next, or ended."""
    begun, go = threading.Event(), threading.Event()

    def refuse(operation: str, parameters: dict[str, Any]) -> None:
        if operation == "RunInstances":
            begun.set()
            assert go.wait(SOON)

    aws.refuse = refuse
    futures = launcher.launch(orders(file, 2))
    assert begun.wait(SOON)
    launcher.stop("m-000000", 0.0)
    go.set()
    assert aws.wait_for("TerminateInstances")["InstanceIds"] == ["i-2"]
    with pytest.raises(RemoteHostError, match="ended while it started"):
        futures[0].result(SOON)
    assert not futures[1].done()
    launcher.stop("m-000001", 0.0)
    assert aws.wait_for("TerminateInstances")["InstanceIds"] == ["i-1"]


def test_the_end_waits_for_instances_that_are_about_to_come(launcher: Ec2Launcher, aws: Aws, file: Path) -> None:
    """And no other zone is tried for machines that nobody wants."""
    begun, go = threading.Event(), threading.Event()

    def run(**_: Any) -> dict[str, Any]:
        begun.set()
        assert go.wait(SOON)
        return {"Instances": [{"InstanceId": "i-1"}]}

    aws.answers["RunInstances"] = run
    futures = launcher.launch(orders(file, 2))
    assert begun.wait(SOON)
    closing = threading.Thread(target=launcher.close)
    closing.start()
    eventually(lambda: launcher.ended("m-000001"), "the end of the machines", SOON)
    go.set()
    closing.join(SOON)
    assert not closing.is_alive()
    assert aws.made("TerminateInstances") == [{"InstanceIds": ["i-1"]}]
    assert len(aws.made("RunInstances")) == 1
    for future in futures:
        with pytest.raises(RemoteHostError, match="ended while it started"):
            future.result(SOON)


def test_ends_are_asked_for_together_and_once(launcher: Ec2Launcher, aws: Aws, file: Path) -> None:
    launcher.launch(orders(file, 5))
    placed(launcher, 5)
    threads = [threading.Thread(target=launcher.stop, args=(f"m-{n:06x}", 0.0)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    asked = [id for request in aws.made("TerminateInstances") for id in request["InstanceIds"]]
    assert sorted(asked) == [f"i-{n}" for n in range(1, 6)]
    assert len(aws.made("TerminateInstances")) < 5
    launcher.stop("m-000000", 0.0)
    launcher.stop("m-unknown", 0.0)
    launcher.close()
    assert len([id for request in aws.made("TerminateInstances") for id in request["InstanceIds"]]) == 5
    assert launcher.ended("m-000000") == "it was ended"
    assert launcher.ended("m-unknown") is None


def test_one_that_aws_does_not_know_does_not_keep_the_others(
    launcher: Ec2Launcher, aws: Aws, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(operation: str, parameters: dict[str, Any]) -> None:
        if operation == "TerminateInstances" and "i-unknown" in parameters["InstanceIds"]:
            raise Ec2Error("ec2:TerminateInstances", "InvalidInstanceID.NotFound", "no")

    aws.refuse = refuse
    monkeypatch.setattr(upkeep, "PAUSES", (0.0,))
    launcher._upkeep.end(["i-1", "i-unknown", "i-2"])
    assert [request["InstanceIds"] for request in aws.made("TerminateInstances")] == [["i-1"], ["i-2"]]


def test_nor_does_one_that_may_not_be_ended(launcher: Ec2Launcher, aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(operation: str, parameters: dict[str, Any]) -> None:
        if operation == "TerminateInstances" and "i-unknown" in parameters["InstanceIds"]:
            raise Ec2Error("ec2:TerminateInstances", "InvalidInstanceID.NotFound", "no")
        if operation == "TerminateInstances" and "i-1" in parameters["InstanceIds"]:
            raise Ec2Error("ec2:TerminateInstances", "OperationNotPermitted", "it is protected")

    aws.refuse = refuse
    monkeypatch.setattr(upkeep, "PAUSES", (0.0,))
    launcher._upkeep.end(["i-1", "i-unknown", "i-2"])
    assert aws.made("TerminateInstances") == [{"InstanceIds": ["i-2"]}]


def test_an_end_that_is_refused_is_said(launcher: Ec2Launcher, aws: Aws, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(operation: str, parameters: dict[str, Any]) -> None:
        raise Ec2Error("ec2:TerminateInstances", "UnauthorizedOperation", "You may not")

    aws.refuse = refuse
    launcher._upkeep.end(["i-1"])
    assert "could not be terminated: i-1: ec2:TerminateInstances: You may not" in capsys.readouterr().err


def test_an_end_that_failed_is_tried_again_in_the_end(launcher: Ec2Launcher, aws: Aws, file: Path) -> None:
    launcher.launch(orders(file, 2))
    placed(launcher, 2)

    def refuse(operation: str, parameters: dict[str, Any]) -> None:
        if operation == "TerminateInstances":
            raise Ec2Error("ec2:TerminateInstances", "EndpointConnectionError", "no network")

    aws.refuse = refuse
    launcher.stop("m-000000", 0.0)
    launcher.stop("m-000001", 0.0)
    aws.refuse = lambda *_: None
    launcher.close()
    assert aws.made("TerminateInstances") == [{"InstanceIds": ["i-1", "i-2"]}]


def test_a_start_that_takes_long_says_what_it_waits_for(
    launcher: Ec2Launcher, aws: Aws, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(booting, "PATIENCE", 0.2)
    monkeypatch.setattr(system, "report", lambda machines: booting.report(machines, said.put))
    futures = launcher.launch(orders(file, 2))
    while "at step 'agent'" not in (text := said.get(timeout=SOON)):
        pass
    assert "2 of 2 not started yet: waiting for i-1 (spot m7i.large in us-east-1a), at step 'agent', and 1 more" in text
    hold.set()
    for future in futures:
        with pytest.raises(RemoteHostError):
            future.result(SOON)


def test_nothing_is_launched_after_the_end(launcher: Ec2Launcher, aws: Aws, file: Path) -> None:
    """The session ended while orders were on their way: their machines are not known yet to be stopped."""
    launcher.close()
    with pytest.raises(RemoteHostError, match="ended while it started"):
        launcher.launch(orders(file, 2))
    assert aws.made("RunInstances") == []


def test_instances_that_come_when_there_are_no_more_threads_are_ended(
    launcher: Ec2Launcher, aws: Aws, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.12 starts none in `atexit`, when a program without ``with`` ends its session."""
    begun, go = threading.Event(), threading.Event()

    def run(**_: Any) -> dict[str, Any]:
        begun.set()
        assert go.wait(SOON)
        return {"Instances": [{"InstanceId": "i-1"}, {"InstanceId": "i-2"}]}

    aws.answers["RunInstances"] = run
    futures = launcher.launch(orders(file, 2))
    assert begun.wait(SOON)
    launcher.stop("m-000000", 0.0)

    def none(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", none)
    go.set()
    launcher.close()
    ended = {id for request in aws.made("TerminateInstances") for id in request["InstanceIds"]}
    assert ended == {"i-1", "i-2"}
    for future in futures:
        assert future.exception(SOON) is not None


def test_instances_of_a_launch_whose_answer_was_lost_are_ended(launcher: Ec2Launcher, aws: Aws, file: Path) -> None:
    def run(TagSpecifications: Any, **_: Any) -> dict[str, Any]:
        tags = TagSpecifications[0]["Tags"]
        others = [{**tag, "Value": "s-other"} if tag["Key"] == naming.SESSION else tag for tag in tags]
        entry = {"LaunchTime": datetime.datetime.now(datetime.UTC), "State": {"Name": "running"}}
        made = [{**entry, "InstanceId": "i-1", "Tags": tags}, {**entry, "InstanceId": "i-2", "Tags": others}]
        aws.answers["DescribeInstances"] = lambda **_: {"Reservations": [{"Instances": made}]}
        raise Ec2Error("ec2:RunInstances", "ReadTimeoutError", "no answer")

    aws.answers["RunInstances"] = run
    (future,) = launcher.launch(orders(file))
    with pytest.raises(Ec2Error, match="no answer"):
        future.result(SOON)
    launcher.close()
    assert aws.made("TerminateInstances") == [{"InstanceIds": ["i-1"]}]


def test_tags_are_renewed_and_a_refusal_is_said_once(
    launcher: Ec2Launcher, aws: Aws, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(naming, "RENEW", 0.001)
    launcher.launch(orders(file, 2))
    renewed = aws.wait_for("CreateTags")
    while len(renewed["Resources"]) < 2:  # The first may have been renewed while the second came.
        renewed = aws.wait_for("CreateTags")
    assert renewed["Resources"] == ["i-1", "i-2"]
    assert [tag["Key"] for tag in renewed["Tags"]] == ["bigmachine:expires"]
    tried: queue.Queue[str] = queue.Queue()

    def refuse(operation: str, parameters: dict[str, Any]) -> None:
        if operation == "CreateTags":
            tried.put(operation)
            raise Ec2Error("ec2:CreateTags", "UnauthorizedOperation", "You may not")

    aws.refuse = refuse
    for _ in range(3):
        tried.get(timeout=SOON)
    assert capsys.readouterr().err.count("allow ec2:CreateTags") == 1


def test_what_it_has_cost(launcher: Ec2Launcher, aws: Aws, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher.summary() == ""
    launcher.launch(orders(file, 2))
    placed(launcher, 2)
    launcher.close()
    rows: list[Any] = []
    monkeypatch.setattr(system, "session_cost", lambda api, given: rows.extend(given) or "much")
    assert launcher.summary() == "much"
    assert [row[:3] for row in rows] == [("m7i.large", "spot", "us-east-1a")] * 2
    assert all(0 <= row[3] < SOON for row in rows)


def test_what_there_is_to_see_of_a_machine(
    launcher: Ec2Launcher, aws: Aws, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (order,) = orders(file, 1)
    assert (launcher.detail(order.id), launcher.hourly(order.id)) == ({}, None)
    launcher.launch([order])
    placed(launcher, 1)
    monkeypatch.setattr(launcher._prices, "of", lambda *kind: 0.05 if kind == ("m7i.large", "spot", "us-east-1a") else None)
    there = launcher.detail(order.id)
    assert there.pop("instance").startswith("i-")
    assert there == {"type": "m7i.large", "market": "spot", "zone": "us-east-1a"}
    assert launcher.hourly(order.id) == 0.05
