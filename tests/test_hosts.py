"""The hosts that other tests are about: that a network does to packets what it says, and that the EC2 here is like AWS's."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import ec2, guest, namespaces, network, roots, vpc
from hosts.ec2 import FakeEc2
from hosts.network import Network, SshHost

TESTS = Path(__file__).parent

WITHIN = 30.0
"""Seconds for a boot; it takes two and a half where there is nothing else to do."""

DEBIAN_12 = "/aws/service/debian/release/12/latest/{}"

USER_DATA = """\
#cloud-config
write_files:
- path: /opt/serve.py
  content: |
    import http.server
    http.server.test(http.server.SimpleHTTPRequestHandler, port=443, bind="0.0.0.0")
- path: /etc/systemd/system/serve.service
  content: |
    [Service]
    ExecStart=/usr/bin/python3 /opt/serve.py
runcmd:
- [systemctl, start, serve.service]
"""

needs_hosts = pytest.mark.skipif(bool(network.unavailable()), reason=network.unavailable())
needs_cloud = pytest.mark.skipif(bool(ec2.unavailable("3.11")), reason=ec2.unavailable("3.11"))


# -- Networks of SSH hosts -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ada() -> Iterator[SshHost]:
    with Network() as network:
        yield network.host("ada")


def arrives(host: SshHost) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host.address, host.port), 0.3):
        return True
    return False


@needs_hosts
def test_an_interface_of_a_network_that_is_gone_is_in_nobodys_way() -> None:
    """The kernel clears a namespace away some time after its last process has ended: until then the name is taken."""
    name = f"bigmt{os.getpid()}"
    namespaces.ip(f"link add {name} type veth peer name {name}x")
    with namespaces.switch() as pid, namespaces.wire(name, pid, "uplink"):
        namespaces.ip("link set uplink up", pid)
    assert not Path(f"/sys/class/net/{name}").exists()


@needs_hosts
def test_networks_come_and_go_in_two_processes() -> None:
    program = "from hosts.network import Network\nfor _ in range(6):\n    with Network() as n: pass"
    both = [subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(TESTS)}) for _ in "ab"]
    assert [process.wait(WITHIN) for process in both] == [0, 0]


@needs_hosts
def test_a_partition_ends(ada: SshHost) -> None:
    with ada.partition():
        assert not arrives(ada)
    assert arrives(ada)


@needs_hosts
def test_packets_get_lost(ada: SshHost) -> None:
    with ada.loss(100):
        assert not arrives(ada)
    with ada.loss(0):
        assert arrives(ada)


@needs_hosts
@pytest.mark.parametrize("whose", ["host", "network"])
def test_a_line_is_narrow(ada: SshHost, whose: str) -> None:
    with ada.limit(16) if whose == "host" else ada.network.limit(16):
        assert seconds(lambda command: ada.run("bash", "-c", command), ada.network.gateway) > NARROW


NARROW = 0.4
"""Seconds that a megabyte takes at least at 16 Mbit/s: half a second, less what may go at once."""


def seconds(run: Callable[[str], object], address: str) -> float:
    """How long it takes until a megabyte is here that a shell elsewhere sends to this address of ours."""
    received: list[int] = []
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]

        def receive() -> None:
            with server.accept()[0] as connection:
                while part := connection.recv(1 << 16):
                    received.append(len(part))

        thread = threading.Thread(target=receive)
        thread.start()
        began = time.monotonic()
        run(f"head -c 1000000 /dev/zero > /dev/tcp/{address}/{port}")
        thread.join(WITHIN)
    assert sum(received) == 1_000_000
    return time.monotonic() - began


# -- Roots -----------------------------------------------------------------------------------------------------------


def test_a_root_is_made_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    stub = tmp_path / "mmdebstrap"
    stub.write_text(f'#!/bin/sh\necho "$@" >> {made}\nfor target; do :; done\nmkdir "$target" && touch "$target/etc"\n')
    stub.chmod(0o755)
    monkeypatch.setattr(roots, "COMMAND", str(stub))
    monkeypatch.setenv("BIGMACHINE_TEST_ROOTS", str(tmp_path / "roots"))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(roots.root("bookworm"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN)
    assert len(set(found)) == 1
    assert (found[0] / "etc").exists()
    assert len(made.read_text().splitlines()) == 1


def test_a_root_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "mmdebstrap"
    stub.write_text("#!/bin/sh\necho no such mirror >&2\nexit 1\n")
    stub.chmod(0o755)
    monkeypatch.setattr(roots, "COMMAND", str(stub))
    monkeypatch.setenv("BIGMACHINE_TEST_ROOTS", str(tmp_path / "roots"))
    with pytest.raises(RuntimeError, match="bookworm: no such mirror"):
        roots.root("bookworm")


# -- A cloud's network -----------------------------------------------------------------------------------------------


def test_the_router_lets_in_what_groups_allow_and_faults_come_first() -> None:
    open_port = vpc.Opening("tcp", (443, 443), ("0.0.0.0/0",))
    port = vpc.Port(7, "10.214.1.7", "10.215.1.7", [open_port], unplugged=True)
    inner = vpc.Port(8, "10.214.1.8", "", [vpc.Opening("-1", None, ("10.214.1.7/32",))], closed={22})
    assert vpc.rules([port, inner], {80}, 1.5).splitlines() == [
        "*nat",
        "-A PREROUTING -d 10.215.1.7 -j DNAT --to-destination 10.214.1.7",
        "-A POSTROUTING -s 10.214.1.7 -m conntrack --ctorigdst 10.215.1.7/24 -j SNAT --to-source 10.215.1.7",
        "COMMIT",
        "*filter",
        ":FORWARD DROP [0:0]",
        "-A FORWARD -i p7 -j DROP",
        "-A FORWARD -o p7 -j DROP",
        "-A FORWARD -p tcp --syn --dport 80 -j DROP",
        "-A FORWARD -m statistic --mode random --probability 0.0150 -j DROP",
        "-A FORWARD -o p8 -p tcp --syn --dport 22 -j DROP",
        "-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
        "-A FORWARD -o uplink -j ACCEPT",
        "-A FORWARD -o p7 -s 0.0.0.0/0 -p tcp --dport 443:443 -j ACCEPT",
        "-A FORWARD -o p8 -s 10.214.1.7/32 -j ACCEPT",
        "COMMIT",
    ]


# -- The API, with instances in the books only -----------------------------------------------------------------------


class Caller:
    """What tests say to a cloud's API."""

    def __init__(self, cloud: FakeEc2) -> None:
        import boto3

        self.cloud = cloud
        self.session = boto3.Session("AKIDEXAMPLE000000000", "none", region_name=ec2.REGION)
        self.ec2 = self.client("ec2")
        self.image = self.parameter(DEBIAN_12.format("amd64"))

    def client(self, service: str) -> Any:
        from botocore.config import Config

        config = Config(retries={"total_max_attempts": 1}, proxies={})
        return self.session.client(service, endpoint_url=self.cloud.endpoint, config=config)

    def parameter(self, name: str) -> str:
        value: str = self.client("ssm").get_parameter(Name=name)["Parameter"]["Value"]
        return value

    def run(self, n: int = 1, low: int = 1, **options: Any) -> list[str]:
        given = {"ImageId": self.image, "InstanceType": "m7i.large", "MinCount": low, "MaxCount": n, **options}
        return [each["InstanceId"] for each in self.ec2.run_instances(**given)["Instances"]]

    def refusal(self, operation: str, **options: Any) -> str:
        from botocore.exceptions import ClientError

        with pytest.raises(ClientError) as caught:
            self.run(**options) if operation == "run_instances" else getattr(self.ec2, operation)(**options)
        code: str = caught.value.response["Error"]["Code"]
        return code

    def describe(self, id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ec2.describe_instances(InstanceIds=[id])["Reservations"][0]["Instances"][0]
        return found


@pytest.fixture(scope="module")
def books() -> Iterator[Caller]:
    pytest.importorskip("moto.server")
    with FakeEc2(("3.11", "3.13"), boot=False) as cloud:
        yield Caller(cloud)


SPOT = {"InstanceMarketOptions": {"MarketType": "spot"}}


def test_a_call_that_is_repeated_launches_once(books: Caller) -> None:
    token = "of this test"
    assert books.run(2, ClientToken=token) == books.run(2, ClientToken=token)
    assert books.refusal("run_instances", ClientToken=token, n=3) == "IdempotentParameterMismatch"


def test_a_launch_takes_as_much_room_as_there_is(books: Caller) -> None:
    books.cloud.room(3, zone="us-east-1b")
    placed = {"Placement": {"AvailabilityZone": "us-east-1b"}}
    assert len(books.run(2, **placed)) == 2
    assert books.refusal("run_instances", n=4, low=2, **placed) == "InsufficientInstanceCapacity"
    assert len(books.run(4, **placed)) == 1
    assert books.refusal("run_instances", **placed) == "InsufficientInstanceCapacity"
    assert len(books.run(4, Placement={"AvailabilityZone": "us-east-1c"})) == 4
    books.cloud.room(-1, zone="us-east-1b")
    assert len(books.run(4, **placed)) == 4


def test_a_launch_fails_as_it_was_told(books: Caller) -> None:
    books.cloud.fail("SpotMaxPriceTooLow", 2, market="spot")
    assert len(books.run()) == 1
    assert [books.refusal("run_instances", **SPOT) for _ in range(2)] == ["SpotMaxPriceTooLow"] * 2
    assert books.describe(books.run(**SPOT)[0])["InstanceLifecycle"] == "spot"


def test_what_aws_refuses_is_refused(books: Caller) -> None:
    refusal = books.refusal
    stop = {"InstanceInitiatedShutdownBehavior": "terminate"}
    assert refusal("run_instances", **stop, **SPOT) == "InvalidParameterCombination"
    assert books.run(**stop)
    assert books.run(UserData="x" * 16384)
    assert refusal("run_instances", UserData="x" * 16385) == "InvalidParameterValue"
    assert refusal("run_instances", ImageId="ami-00000000000000000") == "InvalidAMIID.NotFound"
    assert refusal("run_instances", InstanceType="m7i.tiny") == "InvalidParameterValue"
    assert refusal("run_instances", IamInstanceProfile={"Name": "nobody"}) == "InvalidParameterValue"
    cheap = {"MarketType": "spot", "SpotOptions": {"MaxPrice": "0.0001"}}
    assert refusal("run_instances", InstanceMarketOptions=cheap) == "SpotMaxPriceTooLow"
    assert refusal("run_instances", ImageId=books.parameter(DEBIAN_12.format("arm64"))) == "InvalidParameterValue"


def test_a_dry_run_says_whether_it_would_be_allowed(books: Caller) -> None:
    assert books.refusal("run_instances", DryRun=True) == "DryRunOperation"
    books.cloud.deny("ec2:RunInstances")
    assert books.refusal("run_instances", DryRun=True) == "UnauthorizedOperation"
    assert books.refusal("run_instances") == "UnauthorizedOperation"
    books.cloud.deny("ec2:RunInstances", denied=False)
    assert books.run()


def test_a_call_may_be_refused_for_a_while(books: Caller) -> None:
    books.cloud.refuse("ec2:DescribeInstances", "RequestLimitExceeded", 2)
    assert [books.refusal("describe_instances") for _ in range(2)] == ["RequestLimitExceeded"] * 2
    assert books.ec2.describe_instances()


def test_a_default_network_is_there(books: Caller) -> None:
    (table,) = books.ec2.describe_route_tables()["RouteTables"]
    assert [route["GatewayId"][:4] for route in table["Routes"] if route["DestinationCidrBlock"] == "0.0.0.0/0"] == ["igw-"]
    (group,) = books.ec2.describe_security_groups(GroupNames=["default"])["SecurityGroups"]
    assert books.describe(books.run()[0])["SecurityGroups"] == [{"GroupId": group["GroupId"], "GroupName": "default"}]
    assert group["IpPermissions"][0]["UserIdGroupPairs"][0]["GroupId"] == group["GroupId"]


@pytest.mark.parametrize("market", ["spot", "on-demand"])
def test_a_fleet_returns_instances_and_errors_together(books: Caller, market: Any) -> None:
    data = {"ImageId": books.image, "InstanceType": "m7i.large", "UserData": "aGVsbG8="}
    data |= {"TagSpecifications": [{"ResourceType": "instance", "Tags": [{"Key": "Name", "Value": "ada"}]}]}
    name = f"template-{market}"
    template = books.ec2.create_launch_template(LaunchTemplateName=name, LaunchTemplateData=data)["LaunchTemplate"]
    books.cloud.fail("InsufficientInstanceCapacity", market=market, type="c7i.large")
    books.cloud.room(2, type="m7i.large")
    overrides = [{"InstanceType": type, "Priority": float(n)} for n, type in enumerate(("c7i.large", "m7i.large", "r7i.large"))]
    fleet = books.ec2.create_fleet(
        Type="instant",
        LaunchTemplateConfigs=[
            {
                "LaunchTemplateSpecification": {"LaunchTemplateId": template["LaunchTemplateId"], "Version": "$Latest"},
                "Overrides": overrides,
            }
        ],
        TargetCapacitySpecification={"TotalTargetCapacity": 3, "DefaultTargetCapacityType": market},
    )
    books.cloud.room(-1, type="m7i.large")
    books.ec2.delete_launch_template(LaunchTemplateId=template["LaunchTemplateId"])
    assert [(each["InstanceType"], len(each["InstanceIds"]), each["Lifecycle"]) for each in fleet["Instances"]] == [
        ("m7i.large", 2, market),
        ("r7i.large", 1, market),
    ]
    assert [each["ErrorCode"] for each in fleet["Errors"]] == ["InsufficientInstanceCapacity"]
    assert fleet["Errors"][0]["LaunchTemplateAndOverrides"]["Overrides"]["InstanceType"] == "c7i.large"
    one = books.describe(fleet["Instances"][1]["InstanceIds"][0])
    assert {tag["Key"]: tag["Value"] for tag in one["Tags"]}["Name"] == "ada"


def test_an_instance_may_not_be_found_at_first(books: Caller) -> None:
    books.cloud.eventual(3600)
    (id,) = books.run()
    assert books.refusal("describe_instances", InstanceIds=[id]) == "InvalidInstanceID.NotFound"
    books.cloud.eventual(0)
    assert books.describe(id)["InstanceId"] == id


def test_what_is_terminated_says_by_whom(books: Caller) -> None:
    (id,) = books.run()
    books.ec2.terminate_instances(InstanceIds=[id])
    books.ec2.terminate_instances(InstanceIds=[id])
    books.cloud.wait(id, "terminated", WITHIN)
    assert books.describe(id)["StateReason"]["Code"] == "Client.UserInitiatedShutdown"


def test_images_are_those_of_public_parameters(books: Caller) -> None:
    ids = [books.parameter(DEBIAN_12.format(arch)) for arch in ("amd64", "arm64")]
    images = {each["ImageId"]: each for each in books.ec2.describe_images(ImageIds=ids)["Images"]}
    assert [images[id]["Architecture"] for id in ids] == ["x86_64", "arm64"]
    assert images[ids[0]]["RootDeviceName"] == "/dev/xvda"
    ubuntu = books.parameter("/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id")
    assert books.refusal("run_instances", ImageId=ubuntu) == "Unsupported"
    books.cloud.image("ubuntu/server/24.04", "3.13")
    assert books.run(ImageId=ubuntu)


def test_prices_and_quotas_are_answered(books: Caller) -> None:
    spot = books.ec2.describe_spot_price_history(InstanceTypes=["m7i.large"], AvailabilityZone="us-east-1a")
    assert {row["SpotPrice"] for row in spot["SpotPriceHistory"]} == {"0.035000"}
    match = [{"Type": "TERM_MATCH", "Field": "instanceType", "Value": "m7i.large"}]
    (product,) = books.client("pricing").get_products(ServiceCode="AmazonEC2", Filters=match)["PriceList"]
    assert '"USD": "0.1000000000"' in product
    books.cloud.quota("L-34B43A08", 4)
    quota = books.client("service-quotas").get_service_quota(ServiceCode="ec2", QuotaCode="L-34B43A08")["Quota"]
    assert quota["Value"] == 4.0
    assert books.cloud.calls()[-1] == "servicequotas:GetServiceQuota"


# -- Instances -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lender() -> Iterator[Caller]:
    with FakeEc2(("3.11",)) as cloud:
        yield Caller(cloud)


@pytest.fixture(scope="module")
def group(lender: Caller) -> str:
    """A security group that lets anyone in at port 443."""
    made: str = lender.ec2.create_security_group(GroupName="serve", Description="serve")["GroupId"]
    allow(lender, made)
    return made


def allow(lender: Caller, group: str, *, allowed: bool = True) -> None:
    change = lender.ec2.authorize_security_group_ingress if allowed else lender.ec2.revoke_security_group_ingress
    anyone = {"IpProtocol": "tcp", "FromPort": 443, "ToPort": 443, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
    change(GroupId=group, IpPermissions=[anyone])


@pytest.fixture(scope="module")
def served(lender: Caller, group: str) -> list[str]:
    """Two instances, one of them on the spot, whose user-data serves at port 443."""
    common = {"UserData": USER_DATA, "SecurityGroupIds": [group], "MetadataOptions": {"HttpTokens": "required"}}
    ids = lender.run(InstanceInitiatedShutdownBehavior="terminate", **common) + lender.run(**SPOT, **common)
    for id in ids:
        assert namespaces.eventually(lambda id=id: answers(lender, id), WITHIN), lender.cloud.console(id)[-2000:]
    return ids


def answers(lender: Caller, id: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((lender.cloud.about(id).public, 443), 0.5):
        return True
    return False


def metadata(lender: Caller, id: str, path: str) -> str:
    curl = 'curl -sf -m5 -X PUT -H "X-aws-ec2-metadata-token-ttl-seconds: 60" http://169.254.169.254/latest/api/token'
    get = f'curl -sf -m5 -H "X-aws-ec2-metadata-token: $({curl})" http://169.254.169.254/latest/{path}'
    return lender.cloud.run(id, "sh", "-c", get, check=False)


@needs_cloud
@pytest.mark.slow
class TestInstances:
    """In this order: the last ones end what the first ones have started."""

    def test_boots_by_its_user_data(self, lender: Caller, served: list[str]) -> None:
        about = lender.describe(served[0])
        assert about["State"]["Name"] == "running"
        assert about["PublicIpAddress"] == lender.cloud.about(served[0]).public != about["PrivateIpAddress"]
        assert [*lender.cloud.processes(served[0]).values()] == ["/usr/bin/python3 /opt/serve.py"]
        assert float(lender.cloud.run(served[0], "cat", "/proc/uptime").split()[0]) < 2 * WITHIN
        assert "Cloud-init" in lender.ec2.get_console_output(InstanceId=served[0])["Output"]
        assert lender.cloud.received(served[0]) > 0

    def test_tells_itself_with_a_token_only(self, lender: Caller, served: list[str]) -> None:
        assert metadata(lender, served[0], "meta-data/instance-id") == served[0]
        assert metadata(lender, served[0], "user-data") == USER_DATA
        assert metadata(lender, served[0], "meta-data/spot/instance-action") == ""
        bare = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "http://169.254.169.254/latest/meta-data/"]
        assert lender.cloud.run(served[0], *bare) == "401"

    def test_reaches_the_other_where_its_group_lets_it(self, lender: Caller, served: list[str], group: str) -> None:
        url = f"https://{lender.cloud.about(served[1]).private}:443/".replace("https", "http")
        assert lender.cloud.run(served[0], "curl", "-sf", "-m5", "-o", "/dev/null", "-w", "%{http_code}", url) == "200"
        allow(lender, group, allowed=False)
        assert not answers(lender, served[0])
        allow(lender, group)
        assert answers(lender, served[0])

    def test_can_be_cut_off(self, lender: Caller, served: list[str]) -> None:
        lender.cloud.unplug(served[0])
        assert not answers(lender, served[0])
        assert answers(lender, served[1])
        lender.cloud.plug(served[0])
        assert answers(lender, served[0])
        lender.cloud.drop_port(443, served[1])
        assert answers(lender, served[0])
        assert not answers(lender, served[1])
        lender.cloud.drop_port(443, served[1], dropped=False)
        lender.cloud.drop_port(443)
        assert not answers(lender, served[0])
        lender.cloud.drop_port(443, dropped=False)
        assert answers(lender, served[1])

    def test_shares_a_narrow_line(self, lender: Caller, served: list[str]) -> None:
        ours = lender.cloud.about(served[0]).public.rpartition(".")[0] + ".1"
        with lender.cloud.limit(16):
            assert seconds(lambda command: lender.cloud.run(served[0], "bash", "-c", command), ours) > NARROW

    def test_is_taken_away_after_a_notice(self, lender: Caller, served: list[str]) -> None:
        spot = served[1]
        lender.cloud.rebalance(spot)
        assert "noticeTime" in metadata(lender, spot, "meta-data/events/recommendations/rebalance")
        lender.cloud.interrupt(spot, 1)
        assert '"action": "terminate"' in metadata(lender, spot, "meta-data/spot/instance-action")
        lender.cloud.wait(spot, "terminated", WITHIN)
        assert lender.describe(spot)["StateReason"]["Code"] == "Server.SpotInstanceTermination"

    def test_ends_for_good_when_it_powers_off(self, lender: Caller, served: list[str]) -> None:
        lender.cloud.run(served[0], "systemctl", "poweroff", check=False)
        lender.cloud.wait(served[0], "terminated", WITHIN)
        assert lender.describe(served[0])["StateReason"]["Code"] == "Client.InstanceInitiatedShutdown"
        with pytest.raises(RuntimeError, match="is terminated: nothing runs there"):
            lender.cloud.run(served[0], "true")

    def test_loses_its_power_without_a_word(self, lender: Caller, group: str) -> None:
        (id,) = lender.run(UserData=USER_DATA, SecurityGroupIds=[group])
        assert namespaces.eventually(lambda: answers(lender, id), WITHIN)
        with socket.create_connection((lender.cloud.about(id).public, 443)) as connection:
            connection.settimeout(0.5)
            lender.cloud.kill(id)
            lender.cloud.wait(id, "terminated", WITHIN)
            with pytest.raises(TimeoutError):
                connection.recv(1)
        assert "Traceback" not in lender.cloud.log()


@needs_cloud
@pytest.mark.slow
def test_nothing_is_left_of_a_cloud_whose_process_is_killed() -> None:
    program = """
import sys
from test_hosts import Caller, FakeEc2
with FakeEc2(("3.11",)) as cloud:
    (id,) = Caller(cloud).run()
    while not cloud.about(id).first: pass
    print(id, cloud.about(id).first, flush=True)
    sys.stdin.read()
"""
    environ = {**os.environ, "PYTHONPATH": str(TESTS)}
    with subprocess.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1, text=True, env=environ) as process:
        assert process.stdout is not None
        id, first = process.stdout.readline().split()
        groups = [group for top in guest.cgroups() for group in Path(top).glob(f"bigmachine-cloud-*/{id}")]
        assert groups
        process.kill()
    assert namespaces.eventually(lambda: not Path(f"/proc/{first}").exists(), WITHIN)
    left = [each for group in groups for each in group.rglob("cgroup.procs")]
    assert namespaces.eventually(lambda: not any(each.read_text() for each in left), WITHIN)
    with FakeEc2(("3.11",)):
        assert not any(group.exists() for group in groups)
