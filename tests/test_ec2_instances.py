"""Which machines are ours, and which of them nobody needs: against moto, with marks of drivers that run and that do not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from moto_cloud import Cloud, moto_server, reset

from bigmachine.systems.ec2 import drivers, instances, naming
from bigmachine.systems.ec2.api import Ec2Error
from bigmachine.systems.ec2.drivers import Driver, is_running, parse, this_driver
from bigmachine.systems.ec2.instances import SKEW, OurInstance, OurTemplate, abandoned
from bigmachine.systems.ec2.prices import ON_DEMAND, SPOT

NOW = 1_800_000_000.0


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with moto_server() as address:
        yield address


@pytest.fixture
def cloud(moto: str) -> Cloud:
    reset(moto)
    return Cloud()


def an_instance(**values: Any) -> OurInstance:
    given = {
        "id": "i-1",
        "type": "m7i.large",
        "market": SPOT,
        "zone": "us-east-1a",
        "launched": NOW - 3600,
        "state": "running",
        "session": "s-1",
        "owner": "ada",
        "name": "ada bigmachine bigpi.py",
        "expires": NOW + 2400,
        "driver": "ada:1:2@elsewhere",
        **values,
    }
    return OurInstance(**given)


def run_instance(cloud: Cloud, **tags: str) -> str:
    """Start one with `tags`, `_` for `:` in their names."""
    pairs = [{"Key": key.replace("_", ":"), "Value": value} for key, value in tags.items()]
    answer = cloud.call(
        "ec2",
        "RunInstances",
        ImageId="ami-12c6146b",
        InstanceType="m7i.large",
        MinCount=1,
        MaxCount=1,
        TagSpecifications=[{"ResourceType": "instance", "Tags": pairs}] if pairs else [],
    )
    return str(answer["Instances"][0]["InstanceId"])


# -- Marks of drivers ----------------------------------------------------------------------------------------------------


def test_this_process_runs() -> None:
    mark = this_driver()
    driver = parse(mark)
    assert driver is not None
    assert driver.pid == os.getpid()
    assert driver.table == drivers.process_table()
    assert is_running(mark) is True
    assert naming.value(mark) == mark, "a tag may have every character of it"


def test_a_process_that_has_ended_does_not_run() -> None:
    command = "from bigmachine.systems.ec2.drivers import this_driver; print(this_driver())"
    mark = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout.strip()
    assert parse(mark) is not None
    assert is_running(mark) is False


def test_a_process_that_only_waits_to_be_reaped_does_not_run() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        start = drivers._start(child.pid)
        mark = f"here:{child.pid}:{start}@{drivers.process_table()}"
        assert is_running(mark) is True
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # It is a zombie from here on.
        assert is_running(mark) is False
    finally:
        child.kill()
        child.communicate()


def test_another_process_with_the_same_id_is_another() -> None:
    assert is_running(f"here:{os.getpid()}:1@{drivers.process_table()}") is False
    assert is_running(naming.value(f"here:{os.getpid()}:?@{drivers.process_table()}")) is None


@pytest.mark.parametrize(
    "mark",
    [
        "",
        "nonsense",
        "ada:x:1@t",
        "ada:{pid}:1@another",  # A host, a container or a boot of which we see no processes.
        "ada:{pid}:1",
        "ada:{pid}:?@{table}",
        "ada:-1:1@{table}",
    ],
)
def test_of_others_nobody_can_know(mark: str) -> None:
    assert is_running(mark.format(pid=os.getpid(), table=drivers.process_table())) is None


def test_nobody_can_know_where_the_process_table_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = this_driver()
    monkeypatch.setattr(drivers, "process_table", lambda: "")
    assert is_running(mark) is None
    assert is_running(this_driver()) is None


def test_nobody_can_know_of_a_process_that_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """As /proc with hidepid does."""
    mark = this_driver()
    monkeypatch.setattr(drivers, "_start", lambda pid: None)
    assert is_running(mark) is None


def test_a_host_may_have_any_name() -> None:
    assert parse("a:b:17:99@t") == Driver("a:b", 17, "99", "t")


# -- Which are abandoned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expires", "running", "reason"),
    [
        (NOW + 2400, None, None),
        (NOW - 1, None, None),  # Perhaps: clocks differ.
        (NOW - SKEW - 3600, None, "its session is gone: nobody has renewed its time, which ran out 1 h 10 min ago"),
        (NOW + 2400, False, "its driver, process 1 on this host, has ended"),
        (NOW + 2400, True, None),
        (NOW - 86400, True, None),  # The driver that is there knows better than a tag that could not be renewed.
        (None, None, None),  # Somebody has removed the tag: nobody knows.
        (None, False, "its driver, process 1 on this host, has ended"),
    ],
)
def test_abandoned(expires: float | None, running: bool | None, reason: str | None) -> None:
    asked = []

    def ask(mark: str) -> bool | None:
        asked.append(mark)
        return running

    assert abandoned(an_instance(expires=expires), NOW, ask) == reason
    assert asked == ["ada:1:2@elsewhere"]


def test_what_is_being_ended_is_not_abandoned() -> None:
    assert abandoned(an_instance(state="shutting-down", expires=0.0), NOW) is None
    assert abandoned(an_instance(state="stopped", expires=0.0), NOW)


def test_a_launch_template_is_abandoned_like_an_instance() -> None:
    template = OurTemplate("lt-1", "bigmachine-1", "s-1", "ada", NOW - 2 * SKEW, "")
    assert abandoned(template, NOW) is not None
    assert abandoned(template, NOW, lambda mark: True) is None


# -- Against moto --------------------------------------------------------------------------------------------------------


def test_ours_are_those_with_the_tag(cloud: Cloud) -> None:
    run_instance(cloud)
    run_instance(cloud, Name="another's", team="physics")
    mark = this_driver()
    tags = naming.tags("ada bigmachine bigpi.py", "s-1", "arn:aws:iam::1:user/ada", NOW, {})
    id = run_instance(cloud, **{key.replace(":", "_"): value for key, value in tags.items()})
    (found,) = instances.ours(cloud)
    assert found.id == id
    assert (found.type, found.market, found.zone[:-1], found.state) == ("m7i.large", ON_DEMAND, "us-east-1", "running")
    assert (found.session, found.owner, found.name) == ("s-1", "arn:aws:iam::1:user/ada", "ada bigmachine bigpi.py")
    assert found.driver == mark
    assert found.expires == NOW + naming.LIFE
    assert abs(found.launched - time.time()) < 600
    cloud.call("ec2", "TerminateInstances", InstanceIds=[id])
    assert instances.ours(cloud) == []


def test_what_was_launched_as_spot_is(cloud: Cloud) -> None:
    request = {"ImageId": "ami-12c6146b", "InstanceType": "m7i.large", "MinCount": 1, "MaxCount": 1}
    tags = [{"ResourceType": "instance", "Tags": [{"Key": "bigmachine:session", "Value": "s-1"}]}]
    options = {"MarketType": "spot", "SpotOptions": {"SpotInstanceType": "one-time"}}
    cloud.call("ec2", "RunInstances", **request, TagSpecifications=tags, InstanceMarketOptions=options)
    (found,) = instances.ours(cloud)
    assert found.market == SPOT
    assert found.expires is None
    assert found.driver == ""


def test_what_is_renewed_in_between_is_not_ended(cloud: Cloud) -> None:
    old = "2020-01-01T00:00:00Z"
    renewed = run_instance(cloud, bigmachine_session="s-1", bigmachine_expires=old)
    gone = run_instance(cloud, bigmachine_session="s-2", bigmachine_expires=old)
    found = instances.ours(cloud)
    assert {each.id for each in found if abandoned(each, NOW)} == {renewed, gone}
    mark = [{"Key": "bigmachine:expires", "Value": naming.stamp(NOW + 60)}]
    cloud.call("ec2", "CreateTags", Resources=[renewed], Tags=mark)
    assert [each.id for each in instances.still_abandoned(cloud, found, NOW)] == [gone]


def test_one_that_cannot_be_ended_spoils_it_for_no_other(cloud: Cloud) -> None:
    ids = [run_instance(cloud, bigmachine_session="s-1") for _ in range(3)]
    found = instances.ours(cloud)
    cloud.call("ec2", "ModifyInstanceAttribute", InstanceId=ids[1], DisableApiTermination={"Value": True})
    gone = an_instance(id="i-0123456789abcdef0")
    failed = instances.end(cloud, [*found, gone])
    assert list(failed) == [ids[1]]
    assert "ec2:TerminateInstances" in failed[ids[1]]
    assert [each.id for each in instances.ours(cloud)] == [ids[1]]


def test_launch_templates_are_found_and_deleted(cloud: Cloud) -> None:
    def make(name: str, *tags: dict[str, str]) -> None:
        specification = [{"ResourceType": "launch-template", "Tags": list(tags)}] if tags else []
        data = {"InstanceType": "m7i.large"}
        cloud.call(
            "ec2",
            "CreateLaunchTemplate",
            LaunchTemplateName=name,
            LaunchTemplateData=data,
            TagSpecifications=specification,
        )

    make("another's")
    make("bigmachine-1", {"Key": "bigmachine:session", "Value": "s-1"}, {"Key": "bigmachine:expires", "Value": "never"})
    (found,) = instances.our_templates(cloud)
    assert (found.name, found.session, found.expires) == ("bigmachine-1", "s-1", None)
    assert instances.delete(cloud, [found]) == {}
    assert instances.delete(cloud, [found]) == {}, "somebody else may have been faster"
    assert instances.our_templates(cloud) == []


def test_regions_that_are_closed_are_said(cloud: Cloud) -> None:
    names = instances.regions(cloud)
    assert "us-east-1" in names
    assert "ap-east-1" not in names, "the account has not enabled it"
    refused = Ec2Error("ec2:DescribeInstances", "UnauthorizedOperation", "no", "eu-west-1")

    def look(name: str) -> int:
        if name == "eu-west-1":
            raise refused
        return len(instances.ours(instances.InRegion(cloud, name)))

    run_instance(cloud, bigmachine_session="s-1")
    found, closed = instances.in_regions(["us-east-1", "eu-west-1", "us-west-2"], look)
    assert found == {"us-east-1": 1, "us-west-2": 0}
    assert closed == {"eu-west-1": refused}
