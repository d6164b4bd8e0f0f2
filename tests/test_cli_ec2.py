"""``bigmachine doctor``, ``ps`` and ``gc``: what they print, what they end, and how they end themselves; against moto."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hosts.ec2 import FakeEc2
from moto_cloud import Cloud, moto_server, reset

from bigmachine.cli import doctor, exits, gc, main, ps
from bigmachine.systems.ec2 import instances, naming
from bigmachine.systems.ec2.api import Ec2Error
from bigmachine.systems.ec2.doctor import Check
from bigmachine.systems.ec2.drivers import this_driver
from bigmachine.systems.ec2.settings import Settings

Command = Callable[..., "subprocess.CompletedProcess[str]"]
"""What runs a command line of ours."""

ELSEWHERE = "grace:17:4711@0123456789ab"
"""A driver of which this host sees nothing."""


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMACHINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with moto_server() as address:
        yield address


@pytest.fixture
def cloud(moto: str, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    """What the commands use as AWS."""
    reset(moto)
    cloud = Cloud()

    def api(settings: Settings) -> Cloud:
        assert settings.region in ("", "us-east-1")
        return cloud

    for command in (doctor, ps, gc):
        monkeypatch.setattr(command, "Api", api)
    return cloud


@pytest.fixture(scope="module")
def ended() -> str:
    """The mark of a driver that ran on this host, and does not any more."""
    command = "from bigmachine.systems.ec2.drivers import this_driver; print(this_driver())"
    return subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout.strip()


def start(
    cloud: Cloud, session: str, driver: str = ELSEWHERE, expires: float = 3600.0, region: str = "", **more: Any
) -> str:
    """An instance of a session, whose mark expires so many seconds from now. Its id."""
    tags = naming.tags(f"ada bigmachine {session}.py", session, "arn:aws:iam::1:user/ada", time.time(), {})
    tags |= {naming.DRIVER: driver, naming.EXPIRES: naming.stamp(time.time() + expires)}
    answer = cloud.call(
        "ec2",
        "RunInstances",
        region=region,
        ImageId="ami-12c6146b",
        InstanceType="m7i.large",
        MinCount=1,
        MaxCount=1,
        TagSpecifications=naming.specifications(tags, ["instance"]),
        **more,
    )
    return str(answer["Instances"][0]["InstanceId"])


def leave_template(cloud: Cloud, session: str, driver: str = ELSEWHERE, expires: float = 3600.0) -> str:
    tags = {naming.SESSION: session, naming.DRIVER: driver, naming.EXPIRES: naming.stamp(time.time() + expires)}
    answer = cloud.call(
        "ec2",
        "CreateLaunchTemplate",
        LaunchTemplateName=f"bigmachine-{session}",
        LaunchTemplateData={"InstanceType": "m7i.large"},
        TagSpecifications=naming.specifications(tags, ["launch-template"]),
    )
    return str(answer["LaunchTemplate"]["LaunchTemplateId"])


def living(cloud: Cloud) -> set[str]:
    return {each.id for each in instances.ours(cloud)}


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of standard output; nothing is on the other."""
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out.splitlines()


SPOT = {"InstanceMarketOptions": {"MarketType": "spot"}}


# -- ps ------------------------------------------------------------------------------------------------------------------


def test_ps_where_there_is_nothing(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps"]) == exits.DONE
    assert said(capsys) == ["no machines in us-east-1"]


def test_ps_is_a_table(cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one = start(cloud, "s-1", expires=86400.0, **SPOT)
    two = start(cloud, "s-2", expires=86400.0)
    launched = instances.ours(cloud)[0].launched
    monkeypatch.setattr(time, "time", lambda: launched + 5400)
    assert main(["ps"]) == exits.DONE
    head, *rows, total = said(capsys)
    assert head.split() == ["session", "instance", "type", "market", "zone", "state", "age", *["cost", "so", "far", "name"]]
    by_id = {row.split()[1]: row for row in rows}
    assert set(by_id) == {one, two}
    assert "  spot  " in by_id[one]
    assert by_id[one].startswith("s-1")
    assert "running  1 h 30 min     0.06 USD  ada bigmachine s-1.py" in by_id[one]
    assert "  on demand  " in by_id[two]
    assert "0.15 USD" in by_id[two]
    assert total == "2 machines of 2 sessions in us-east-1: about 0.21 USD so far, disks and traffic apart"


def test_ps_says_what_is_left_over_and_what_has_no_price(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    cloud.prices.clear()
    start(cloud, "s-1", expires=-7200.0)
    start(cloud, "s-1", expires=-7200.0, **SPOT)
    assert main(["ps"]) == exits.DONE
    *_, total, left = said(capsys)
    assert total.endswith("so far, without 1 whose price nobody says, disks and traffic apart")
    assert left == "2 machines of sessions that are gone: `bigmachine gc` ends them"


def test_ps_as_json(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    id = start(cloud, "s-1", this_driver(), expires=-7200.0)
    assert main(["ps", "--json"]) == exits.DONE
    found = json.loads("\n".join(said(capsys)))
    (machine,) = found.pop("machines")
    assert found == {"regions": ["us-east-1"], "closed": {}, "cost": machine["cost"]}
    assert 0 <= machine.pop("age") < 600
    assert abs(machine.pop("launched") - time.time()) < 600
    assert machine.pop("cost") > 0
    assert machine == {
        "id": id,
        "session": "s-1",
        "owner": "arn:aws:iam::1:user/ada",
        "name": "ada bigmachine s-1.py",
        "type": "m7i.large",
        "market": "on-demand",
        "region": "us-east-1",
        "zone": machine["zone"],
        "state": "running",
        "hourly": 0.1,
        "abandoned": None,
    }


def test_ps_in_all_regions(cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"Regions": [{"RegionName": name} for name in ("us-east-1", "eu-west-1", "sa-east-1")]}
    call = Cloud.call

    def three(self: Cloud, service: str, operation: str, *, region: str = "", **parameters: Any) -> dict[str, Any]:
        if operation == "DescribeRegions":
            return answer
        if region == "sa-east-1":
            raise Ec2Error(f"{service}:{operation}", "UnauthorizedOperation", "an explicit deny in a policy", region)
        return call(self, service, operation, region=region, **parameters)

    monkeypatch.setattr(Cloud, "call", three)
    start(cloud, "s-1")
    far = start(cloud, "s-2", region="eu-west-1", **SPOT)
    assert main(["ps", "--all-regions"]) == exits.DONE
    lines = said(capsys)
    assert any(far in line and "eu-west-1" in line for line in lines)
    assert lines[-2].startswith("2 machines of 2 sessions in 2 regions: ")
    assert lines[-1].startswith("sa-east-1 could not be looked at: ec2:DescribeInstances in sa-east-1: an explicit deny")
    assert main(["ps", "--all-regions", "--json"]) == exits.DONE
    found = json.loads("\n".join(said(capsys)))
    assert [machine["region"] for machine in found["machines"]] == ["eu-west-1", "us-east-1"]
    assert list(found["closed"]) == ["sa-east-1"]


def test_ps_that_may_not_look(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    cloud.denied = {"ec2:DescribeInstances"}
    assert main(["ps"]) == exits.FAILED
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("bigmachine: ec2:DescribeInstances")
    assert "allow ec2:DescribeInstances" in captured.err


# -- gc ------------------------------------------------------------------------------------------------------------------


def test_gc_ends_what_is_abandoned_and_nothing_else(
    cloud: Cloud, ended: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {
        start(cloud, "s-living"),  # Somebody's, somewhere.
        start(cloud, "s-late", expires=-60.0),  # Clocks differ.
        start(cloud, "s-mine", this_driver()),
        start(cloud, "s-unrenewed", this_driver(), expires=-86400.0),  # It runs here, whatever the tag says.
    }
    expired = start(cloud, "s-expired", expires=-7200.0)
    orphan = start(cloud, "s-orphan", ended)
    template = leave_template(cloud, "s-expired", expires=-7200.0)
    leave_template(cloud, "s-living")
    lines = [
        f"terminate{{}} machine {expired} (m7i.large, us-east-1a, session s-expired, ada bigmachine s-expired.py): "
        "its session is gone: nobody has renewed its time, which ran out 2 h ago",
        f"terminate{{}} machine {orphan} (m7i.large, us-east-1a, session s-orphan, ada bigmachine s-orphan.py): "
        f"its driver, process {ended.split(':')[1]} on this host, has ended",
        f"delete{{}} launch template {template} (us-east-1, session s-expired, bigmachine-s-expired): "
        "its session is gone: nobody has renewed its time, which ran out 2 h ago",
    ]
    assert main(["gc", "--dry-run"]) == exits.DONE
    *would, total = said(capsys)
    assert would == [f"would {line.format('')}" for line in lines]
    assert total == (
        "us-east-1: 2 machines and 1 launch template would be ended; 4 machines that may be in use left alone"
    )
    assert living(cloud) == kept | {expired, orphan}
    assert cloud.made("ec2:TerminateInstances") == cloud.made("ec2:DeleteLaunchTemplate") == []

    assert main(["gc"]) == exits.DONE
    *did, total = said(capsys)
    assert did == [line.format("d") for line in lines]
    assert total == "us-east-1: 2 machines and 1 launch template ended; 4 machines that may be in use left alone"
    assert living(cloud) == kept
    assert [each.session for each in instances.our_templates(cloud)] == ["s-living"]

    assert main(["gc"]) == exits.DONE
    assert said(capsys) == ["us-east-1: nothing ended; 4 machines that may be in use left alone"]


def test_gc_leaves_what_is_renewed_while_it_looks(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    id = start(cloud, "s-1", expires=-7200.0)
    look = gc.our_templates

    def renew(api: Any) -> Sequence[Any]:
        mark = [{"Key": naming.EXPIRES, "Value": naming.stamp(time.time() + 3600)}]
        cloud.call("ec2", "CreateTags", Resources=[id], Tags=mark)
        return look(api)

    monkeypatch.setattr(gc, "our_templates", renew)
    assert main(["gc"]) == exits.DONE
    assert said(capsys) == ["us-east-1: nothing ended; 1 machine that may be in use left alone"]
    assert living(cloud) == {id}


def test_gc_says_what_it_could_not_end(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    id = start(cloud, "s-1", expires=-7200.0)
    cloud.denied = {"ec2:TerminateInstances", "ec2:DescribeLaunchTemplates"}
    assert main(["gc"]) == exits.FAILED
    could_not, total, note = said(capsys)
    assert could_not.startswith(f"could not terminate machine {id} (")
    assert "allow ec2:TerminateInstances" in could_not
    assert total == "us-east-1: nothing ended; 0 machines that may be in use left alone"
    assert note.startswith("us-east-1: launch templates could not be looked at: ec2:DescribeLaunchTemplates")
    assert main(["gc", "--json"]) == exits.FAILED
    found = json.loads("\n".join(said(capsys)))
    assert found["ended"][0]["error"].startswith("ec2:TerminateInstances")


@pytest.mark.parametrize(("code", "ends"), [("UnauthorizedOperation", exits.DONE), ("ConnectTimeoutError", exits.FAILED)])
def test_gc_in_all_regions(
    cloud: Cloud, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, code: str, ends: int
) -> None:
    call = Cloud.call

    def two(self: Cloud, service: str, operation: str, *, region: str = "", **parameters: Any) -> dict[str, Any]:
        if operation == "DescribeRegions":
            return {"Regions": [{"RegionName": "eu-west-1"}, {"RegionName": "sa-east-1"}]}
        if region == "sa-east-1":
            raise Ec2Error(f"{service}:{operation}", code, "no", region)
        return call(self, service, operation, region=region, **parameters)

    monkeypatch.setattr(Cloud, "call", two)
    far = start(cloud, "s-1", expires=-7200.0, region="eu-west-1")
    assert main(["gc", "--all-regions"]) == ends
    ended, total, closed = said(capsys)
    assert ended.startswith(f"terminated machine {far} (m7i.large, eu-west-1a, ")
    assert total == "eu-west-1: 1 machine ended; 0 machines that may be in use left alone"
    assert closed.startswith("sa-east-1 could not be looked at")


def test_gc_as_json(cloud: Cloud, ended: str, capsys: pytest.CaptureFixture[str]) -> None:
    id = start(cloud, "s-1", ended)
    start(cloud, "s-2")
    assert main(["gc", "--dry-run", "--json"]) == exits.DONE
    found = json.loads("\n".join(said(capsys)))
    assert found == {
        "dry_run": True,
        "ended": [
            {
                "id": id,
                "kind": "machine",
                "region": "us-east-1",
                "session": "s-1",
                "owner": "arn:aws:iam::1:user/ada",
                "name": "ada bigmachine s-1.py",
                "reason": f"its driver, process {ended.split(':')[1]} on this host, has ended",
                "error": None,
            }
        ],
        "kept": 1,
        "regions": ["us-east-1"],
        "closed": {},
    }


# -- doctor --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def examined(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """What the examination finds."""
    found = [Check("region", True, "us-east-1")]
    monkeypatch.setattr(doctor, "checks", lambda *_, **options: iter(found))
    return found


def test_doctor_says_what_it_has_found(examined: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    examined.append(Check("quota, spot", None, "not known", "look there"))
    assert main(["doctor", "ec2"]) == exits.DONE
    assert said(capsys) == [
        "ok      region       us-east-1",
        "note    quota, spot  not known",
        "                     → look there",
        "2 checks: machines can be started",
    ]


def test_doctor_ends_with_another_code_where_something_is_wrong(
    examined: list[Check], capsys: pytest.CaptureFixture[str]
) -> None:
    examined.append(Check("image", False, "there is none", "make one"))
    assert main(["doctor", "ec2"]) == exits.FAILED
    assert said(capsys) == [
        "ok      region  us-east-1",
        "FAILED  image   there is none",
        "                → make one",
        "1 of 2 checks failed: machines could not be started",
    ]
    assert main(["doctor", "ec2", "--json"]) == exits.FAILED
    assert json.loads("\n".join(said(capsys))) == {
        "system": "ec2",
        "ok": False,
        "checks": [
            {"name": "region", "ok": True, "found": "us-east-1", "fix": ""},
            {"name": "image", "ok": False, "found": "there is none", "fix": "make one"},
        ],
    }


def test_doctor_is_told_what_for(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def fake(api: Any, settings: Settings, **options: Any) -> Iterator[Check]:
        given.update(options, types=settings.types, ondemand=settings.ondemand)
        yield Check("region", True, "us-east-1")

    monkeypatch.setattr(doctor, "checks", fake)
    assert main(["doctor", "ec2", "app.py", "-n", "8", "-bigm.ec2type=c7i.large", "-bigm.ec2ondemand"]) == exits.DONE
    del given["progress"]
    assert given == {"program": Path("app.py"), "count": 8, "types": ("c7i.large",), "ondemand": True}


def test_settings_that_cannot_be_are_a_wrong_command_line(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["doctor", "ec2"], ["ps"], ["gc"]):
        assert main([*command, "-bigm.ec2type=large"]) == exits.WRONG
        assert "not an instance type" in capsys.readouterr().err


# -- As a user starts them: nothing of ours is faked --------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeEc2]:
    """A cloud whose instances are never reached."""
    with FakeEc2(boot=False) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def command(fake: FakeEc2) -> Command:
    # With the cache that there is: other tests pack the bare toolkit, too.
    stale = {name for name in os.environ if name.startswith(("AWS_", "BIGMACHINE_EC2_"))}
    environ = {name: value for name, value in os.environ.items() if name not in stale} | fake.environ()

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "bigmachine", *words]
        return subprocess.run(argv, capture_output=True, text=True, env=environ, timeout=45)

    return run


@pytest.mark.slow
def test_doctor_spends_nothing(fake: FakeEc2, command: Command) -> None:
    done = command("doctor", "ec2", "-n", "8", "--json")
    found = json.loads(done.stdout)
    assert found["ok"], done.stdout
    assert done.returncode == exits.DONE
    assert fake.instances() == {}


@pytest.mark.slow
def test_doctor_finds_what_is_wrong(fake: FakeEc2, command: Command) -> None:
    fake.deny("ec2:RunInstances")
    fake.quota("L-1216C47A", 4)
    try:
        done = command("doctor", "ec2", "-n", "8", "-bigm.ec2ondemand")
    finally:
        fake.deny("ec2:RunInstances", denied=False)
        fake.quota("L-1216C47A", 256)
    assert done.returncode == exits.FAILED
    assert "denied: ec2:RunInstances" in done.stdout
    assert "--quota-code L-1216C47A --desired-value 16" in done.stdout


DRIVER = """\
import time
from bigmachine.info import python_version
from bigmachine.systems.ec2.api import Api
from bigmachine.systems.ec2.images import find_image
from bigmachine.systems.ec2.naming import specifications, tags
from bigmachine.systems.ec2.settings import Settings

api = Api(Settings())
image = find_image(api, Settings(), python_version(), "amd64")
marks = tags("ada bigmachine app.py", "s-1", "ada", time.time(), {})
request = {"ImageId": image.id, "InstanceType": "m7i.large", "MinCount": 2, "MaxCount": 2}
api.call("ec2", "RunInstances", **request, TagSpecifications=specifications(marks, ["instance"]))
print("launched", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_gc_ends_the_machines_of_a_driver_that_was_killed(fake: FakeEc2, command: Command) -> None:
    environ = {**os.environ, **fake.environ()}
    with subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True, env=environ) as driver:
        try:
            assert driver.stdout is not None
            assert driver.stdout.readline() == "launched\n"
            machines = set(fake.instances())
            assert len(machines) == 2
            done = command("gc")
            assert done.returncode == exits.DONE, done.stderr
            assert done.stdout == "us-east-1: nothing ended; 2 machines that may be in use left alone\n"
            assert set(fake.instances("running")) == machines
        finally:
            driver.kill()
    done = command("gc")
    assert done.returncode == exits.DONE, done.stderr
    assert f"its driver, process {driver.pid} on this host, has ended" in done.stdout
    assert "us-east-1: 2 machines ended; 0 machines that may be in use left alone" in done.stdout
    assert set(fake.instances("terminated")) == machines
