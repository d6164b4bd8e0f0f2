"""How AWS is called, and what its refusals tell the user."""

from __future__ import annotations

import contextlib
import http.server
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import boto3
import pytest
from botocore.exceptions import NoCredentialsError
from moto_cloud import REGION, moto_server

from bigmachine.systems.ec2.api import REMEDIES, Api, Bucket, Ec2Error, remedy


@dataclass(frozen=True)
class Where:
    region: str = ""
    profile: str = ""


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with moto_server():
        yield


def test_calls_by_the_names_of_the_api() -> None:
    api = Api(Where())
    assert api.region == REGION
    zones = api.call("ec2", "DescribeAvailabilityZones")["AvailabilityZones"]
    assert {zone["RegionName"] for zone in zones} == {REGION}
    assert "Arn" in api.call("sts", "GetCallerIdentity")


def test_another_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    assert Api(Where()).region == "us-west-2"
    zones = Api(Where("eu-west-1")).call("ec2", "DescribeAvailabilityZones")["AvailabilityZones"]
    assert {zone["RegionName"] for zone in zones} == {"eu-west-1"}
    zones = Api(Where("eu-west-1"), "eu-west-2").call("ec2", "DescribeAvailabilityZones", region=REGION)["AvailabilityZones"]
    assert {zone["RegionName"] for zone in zones} == {REGION}


def test_pages() -> None:
    api = Api(Where())
    filters = [{"Name": "processor-info.supported-architecture", "Values": ["arm64"]}]
    types = list(api.pages("ec2", "DescribeInstanceTypes", "InstanceTypes", Filters=filters, MaxResults=20))
    assert len(types) == len({entry["InstanceType"] for entry in types}) > 20


def test_a_refusal_says_what_to_do() -> None:
    with pytest.raises(Ec2Error) as caught:
        Api(Where()).call("ec2", "DescribeImages", ImageIds=["ami-0000000000000000f"])
    error = caught.value
    assert (error.operation, error.code) == ("ec2:DescribeImages", "InvalidAMIID.NotFound")
    assert str(error).startswith(f"ec2:DescribeImages in {REGION}: ")
    assert "\n" not in str(error)
    assert str(error).endswith(REMEDIES["InvalidAMIID.NotFound"])
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_no_region(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    with pytest.raises(Ec2Error, match=r"no region is configured \(NoRegionError\); choose one: -bigm.ec2region=us-east-1"):
        Api(Where()).call("ec2", "DescribeSubnets")


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(Ec2Error) as caught:
        Api(Where()).call("ec2", "DescribeSubnets")
    assert caught.value.code == NoCredentialsError.__name__
    assert "run `aws configure`" in str(caught.value)


def test_no_such_profile() -> None:
    with pytest.raises(Ec2Error, match=r"\(ProfileNotFound\); `aws configure list-profiles`"):
        Api(Where(profile="nobody")).call("ec2", "DescribeSubnets")


def test_nothing_is_loaded_before_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boto3.session, "Session", lambda **_: pytest.fail("a session"))
    Api(Where(profile="nobody"))


def test_what_may_not_be_done_says_by_which_permission() -> None:
    assert remedy("ec2:RunInstances", "UnauthorizedOperation").startswith("allow ec2:RunInstances: ")
    assert remedy("service-quotas:GetServiceQuota", "AccessDeniedException").startswith("allow servicequotas:GetServiceQuota: ")
    assert remedy("ec2:RunInstances", "NobodyKnows") == ""
    assert str(Ec2Error("ec2:RunInstances", "NobodyKnows", "What?.")) == "ec2:RunInstances: What? (NobodyKnows)"


def test_a_burst_is_free_and_the_rate_holds_from_there_on() -> None:
    bucket = Bucket(rate=2.0, burst=3.0)
    assert [bucket.take(10.0) for _ in range(5)] == [0.0, 0.0, 0.0, 0.5, 1.0]
    assert bucket.take(12.0) == 0.0
    assert [bucket.take(100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]


def test_the_limiter_waits() -> None:
    slept: list[float] = []
    api = Api(Where(), sleep=slept.append, clock=lambda: 0.0)
    for _ in range(22):
        api.call("sts", "GetCallerIdentity")
    assert slept == [0.2, 0.4]


class Server:
    """Answers calls with one error after the other, then as an EC2 without instances does."""

    def __init__(self, *errors: tuple[int, str]) -> None:
        left = list(errors)
        self.calls = 0
        self.page = ""
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                server.calls += 1
                self.rfile.read(int(self.headers["Content-Length"]))
                status, code = left.pop(0) if left else (200, "")
                body = f"<Response><Errors><Error><Code>{code}</Code><Message>no</Message></Error></Errors></Response>"
                body = server.page or body
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@contextlib.contextmanager
def answering(monkeypatch: pytest.MonkeyPatch, *errors: tuple[int, str]) -> Iterator[Server]:
    server = Server(*errors)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.http.server_port}")
    try:
        yield server
    finally:
        server.http.shutdown()
        thread.join()
        server.http.server_close()


LAUNCH = {"MinCount": 1, "MaxCount": 1, "ImageId": "ami-1"}


def test_a_zone_without_capacity_is_not_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """AWS says so with a status that means: an error of mine, try again."""
    with answering(monkeypatch, *[(500, "InsufficientInstanceCapacity")] * 9) as server:
        with pytest.raises(Ec2Error) as caught:
            Api(Where()).call("ec2", "RunInstances", **LAUNCH)
        assert caught.value.code == "InsufficientInstanceCapacity"
        assert server.calls <= 2


def test_who_is_asked_to_slow_down_does(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    with answering(monkeypatch, *[(503, "RequestLimitExceeded")] * 4) as server:
        Api(Where(), sleep=slept.append).call("ec2", "RunInstances", **LAUNCH)
        assert server.calls == 5
    assert slept == [1.0, 2.0]  # botocore itself tries twice each time.


def test_somebody_else_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The login page of a network: what it says is of no interest."""
    with answering(monkeypatch) as server:
        server.page = "<!doctype html><title>Welcome</title><p>log in"
        with pytest.raises(Ec2Error) as caught:
            Api(Where()).call("ec2", "DescribeInstances")
    assert caught.value.code == "ResponseParserError"
    assert "what answered is not AWS's API (ResponseParserError); does a proxy" in str(caught.value)
