"""User-data: what it looks like (golden files), that cloud-init takes it, and what its scripts do.

`python tests/test_userdata.py` writes the golden files anew: read the difference.
"""

from __future__ import annotations

import email
import email.message
import gzip
import json
import os
import random
import re
import shutil
import string
import subprocess
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import boto3
import pytest
from hosts import ec2, namespaces, roots

from bigmachine.errors import UsageError
from bigmachine.systems.ec2.userdata import (
    AGENT_SETTINGS,
    DATA_SCRIPT,
    DEADMAN,
    MAX_USER_DATA,
    UserData,
    cloud_config,
    user_data,
)
from bigmachine.systems.remote import Trust
from bigmachine.systems.remote.source import agent_text

GOLDEN = Path(__file__).parent / "golden"

AGENT = "import sys\n\n\ndef main():\n    sys.exit('an agent')\n\n\nmain()\n"

UNIT = "[Unit]\nDescription=of the user's own, in more than ASCII: ½\n[Service]\nExecStart=/usr/bin/true\n"

MORE = "#cloud-config\npackages: [tree]\nbootcmd:\n- echo after\n"

CASES = {
    "plain.yaml": UserData(AGENT),
    "everything.yaml": UserData(
        AGENT, "ebs", 3, units=[("own.service", UNIT), ("own.timer", UNIT)], nofile=4096, first_contact=60
    ),
}

EXTRA = UserData(AGENT, cloudconfig=[("more.yaml", MORE), ("ümlaut.sh", "#!/bin/sh\necho ümlaut\n")])


debian = pytest.mark.parametrize(
    "python",
    [
        # Asked at once, as roots may have to be made, which takes longer than a test may.
        pytest.param(python, marks=pytest.mark.skipif(bool(ec2.unavailable(python)), reason=ec2.unavailable(python)))
        for python in roots.SUITES
    ],
)
"""By the minor version of its Python."""


@pytest.mark.parametrize("name", CASES)
def test_golden_files(name: str) -> None:
    assert cloud_config(CASES[name]) == (GOLDEN / name).read_text("utf-8")
    assert gzip.decompress(user_data(CASES[name])).decode() == cloud_config(CASES[name])


def test_the_same_is_the_same() -> None:
    assert user_data(EXTRA) == user_data(EXTRA)


@debian
def test_cloud_init_takes_it(python: str) -> None:
    where = roots.root(roots.SUITES[python])
    # A file system in memory, as nobody writes to a root.
    script = 'mount -t tmpfs tmpfs "$0/tmp" && cat >"$0/tmp/c" && exec chroot "$0" cloud-init schema --config-file /tmp/c'
    for case in CASES.values():
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, where], input=cloud_config(case).encode(), capture_output=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert b"Valid" in done.stdout


def parts(data: UserData) -> list[email.message.Message]:
    found = email.message_from_bytes(gzip.decompress(user_data(data))).get_payload()
    assert isinstance(found, list)
    return found


def test_further_parts_come_before_ours() -> None:
    """Whoever is last cannot be replaced."""
    more, script, ours = parts(EXTRA)
    assert ours.get_content_type() == more.get_content_type() == "text/cloud-config"
    assert script.get_content_type() == "text/x-shellscript"
    assert ours.get_payload() == cloud_config(EXTRA)
    assert more.get_payload() == MORE
    assert script.get_payload(decode=True).decode() == "#!/bin/sh\necho ümlaut\n"


@debian
@pytest.mark.parametrize("how", ["", 'merge_how: "dict(replace)+list(replace)"\n'], ids=["as we say", "as they say"])
def test_cloud_init_merges_as_we_think(python: str, how: str) -> None:
    """By the code that it does it with."""
    code = textwrap.dedent("""\
        import json, sys
        from cloudinit.handlers.cloud_config import CloudConfigPartHandler
        handler = CloudConfigPartHandler.__new__(CloudConfigPartHandler)
        handler.cloud_buf = {}
        for text, merge in json.loads(sys.argv[1]):
            handler._merge_part(text, {"Merge-Type": merge})
        print(json.dumps(handler.cloud_buf))
    """)
    more, _, ours = [str(part["Merge-Type"]) for part in parts(EXTRA)]
    given = [
        ("bootcmd: [first]\nlimits: {a: 1}\nname: first", more),
        (f"{how}bootcmd: [second]\nlimits: {{b: 2}}\nname: second\nmore: [1]", more),
        ("bootcmd: [ours]", ours),
    ]
    command = ["chroot", str(roots.root(roots.SUITES[python])), "python3", "-B", "-c", code, json.dumps(given)]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert said["bootcmd"][0] == "ours"
    assert said["more"] == [1]
    if not how:
        assert said == {"bootcmd": ["ours", "first", "second"], "limits": {"a": 1, "b": 2}, "name": "first", "more": [1]}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"cloudconfig": [("a.yaml", "packages: [tree]\n")]}, r"a\.yaml: .* must be #cloud-config, not 'packages: \[tree\]'"),
        ({"units": [("a.txt", UNIT)]}, r"a\.txt: not the name of a systemd unit"),
        ({"units": [("../a.service", UNIT)]}, "not the name of a systemd unit"),
        ({"units": [("a.service", "ExecStart=/bin/true\n")]}, "begins with"),
    ],
)
def test_what_is_refused(given: Mapping[str, list[tuple[str, str]]], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        user_data(UserData(AGENT, **given))


def test_a_part_that_looks_like_the_end_of_a_file_is_content() -> None:
    units = [("a.service", "[Unit]\nEND\n[Service]\nEND_\n")]
    ran = _run_bootcmd(UserData(AGENT, units=units))
    assert (ran / "run/systemd/system/a.service").read_text() == units[0][1]


def test_the_real_agent_leaves_room_for_the_users_own() -> None:
    settings = {"port": 443, "idle": 600.0, **AGENT_SETTINGS}
    agent = agent_text(Trust().agent("l-0123456789abcdef"), settings)
    assert len(user_data(UserData(agent, "nvme", 4))) < MAX_USER_DATA - 1500


def test_what_is_too_long_says_what_to_leave_out() -> None:
    noise = "".join(random.Random(1).choices(string.ascii_letters, k=21000))
    unit = ("big.service", f"{UNIT}# {noise}\n")
    with pytest.raises(UsageError) as caught:
        user_data(UserData(AGENT, units=[unit], cloudconfig=[("small.yaml", MORE)]))
    assert re.fullmatch(
        r"user-data has 1[67],\d{3} bytes, compressed, EC2 takes 16,384; "
        r"leave out, or shorten, of cloudconfig and units: big.service \(1\d,\d{3}\), small.yaml \(\d\d\)",
        str(caught.value),
    )


# -- What the scripts do -------------------------------------------------------------------------------------------------


def _local(text: str, root: Path) -> str:
    """A script as if `root` were the root directory."""
    for folder in ("/run/", "/etc/", "/sys/block", "/mnt/", "/proc/"):
        text = text.replace(folder, f"{root}{folder}")
    return text


def _fakes(root: Path, **commands: str) -> dict[str, str]:
    """An environment in which these commands are scripts; each says what it was called with in the file ``calls``."""
    folder = root / "bin"
    folder.mkdir()
    for name, script in commands.items():
        path = folder / name.replace("_", ".")
        path.write_text(f'#!/bin/sh\necho "{path.name} $*" >>{root}/calls\n{script}\n')
        path.chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:/usr/bin:/bin"}


_made: list[Path] = []


@pytest.fixture(autouse=True)
def _root(tmp_path: Path) -> None:
    _made[:] = [tmp_path]
    for folder in ("run/systemd/system", "etc/systemd/system", "proc/sys/kernel", "sys/block", "mnt"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/uptime").write_text("100.50 7.00\n")


def _calls() -> list[str]:
    return (_made[0] / "calls").read_text().splitlines()


def _run_bootcmd(data: UserData, systemctl: str = "", shell: str = "sh") -> Path:
    """As cloud-init does it: one script."""
    (root,) = _made
    script = textwrap.dedent(cloud_config(data).partition("- |\n")[2])
    environ = _fakes(root, systemctl=systemctl)
    done = subprocess.run([shell, "-c", _local(script, root)], env=environ, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return root


@pytest.mark.parametrize("shell", ["dash", "bash"])
def test_everything_is_written_and_started(shell: str) -> None:
    """Debian's sh is dash, Amazon's bash."""
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    agent = AGENT + "print('$HOME `id` \\\\ $((1))')\n"
    root = _run_bootcmd(UserData(agent, "nvme", units=[("own.service", UNIT)]), "[ $2 != stop ] || exit 5", shell)
    assert (root / "run/bigmachine/begun").read_text() == "100.50\n"
    assert (root / "run/bigmachine/agent.py").read_text() == agent
    assert (root / "run/bigmachine/agent.py").stat().st_mode & 0o777 == 0o600
    assert (root / "run/bigmachine").stat().st_mode & 0o777 == 0o700
    assert (root / "run/bigmachine/deadman").read_text() == _local(DEADMAN, root)
    assert (root / "run/bigmachine/data").read_text() == _local(DATA_SCRIPT, root)
    assert (root / "run/systemd/system/own.service").read_text() == UNIT
    assert (root / "proc/sys/kernel/panic").read_text() == "10\n"
    assert "ConditionPathExists=!" in (root / "etc/systemd/system/sysinit.target.wants/bigmachine-once.service").read_text()
    started = [call.split()[-1] for call in _calls()]
    assert started[:3] == ["bigmachine-deadman.service", "bigmachine.service", "own.service"]
    assert all("--no-block" in call for call in _calls())


def test_a_unit_that_systemd_does_not_find_is_looked_for_again() -> None:
    (root,) = _made
    _run_bootcmd(UserData(AGENT), f"[ $1 = daemon-reload ] && touch {root}/reloaded; [ -e {root}/reloaded ]")
    start = "systemctl --no-block start bigmachine-deadman.service"
    assert _calls()[:3] == [start, "systemctl daemon-reload", start]


def _dead(said: str, *, first: int = 900, loops: int) -> None:
    """What the dead man's switch does: each of its pauses takes 100 s, and the file `until` says `said`."""
    (root,) = _made
    uptime = root / "proc/uptime"
    pause = f"read up rest <{uptime}; echo $((${{up%.*}} + 100)).25 7.00 >{uptime}.new; mv {uptime}.new {uptime}"
    environ = _fakes(root, sleep=f"{pause}; [ $(grep -c sleep {root}/calls) -lt 50 ] || kill $PPID", systemctl="")
    folder = root / "run/bigmachine"
    folder.mkdir()
    if said:
        (folder / "until").write_text(said)
    subprocess.run(["sh", "-c", _local(DEADMAN, root), "deadman", str(first)], env=environ, stdout=subprocess.PIPE)
    calls = _calls()
    last = ["sleep 20", "systemctl poweroff --force", "systemctl poweroff --force --force"]  # The second in the background.
    assert sorted(call for call in calls if call != "sleep 5") == ([] if loops == 50 else last)
    assert calls.count("sleep 5") == loops


@pytest.mark.parametrize(
    ("said", "loops"),
    [
        ("", 9),  # 900 s from 100.5 on.
        ("2000           \n", 19),
        ("150\n", 1),
        ("9000\n", 50),
        ("soon\n", 9),
        ("-1\n", 9),
        ("\n", 9),
    ],
    ids=["nobody comes", "a driver was there", "it has passed", "far away", "nonsense", "negative", "being written"],
)
def test_the_dead_mans_switch(said: str, loops: int) -> None:
    _dead(said, loops=loops)


# -- The data space ------------------------------------------------------------------------------------------------------

NVME = "Amazon EC2 NVMe Instance Storage        "
EBS = "Amazon Elastic Block Store              "


def _disk(name: str, model: str, *, partition: bool = False, held: bool = False) -> None:
    folder = _made[0] / "sys/block" / name
    (folder / "device").mkdir(parents=True)
    (folder / "holders").mkdir()
    if model:
        (folder / "device/model").write_text(f"{model}\n")
    if partition:
        (folder / f"{name}p1").mkdir()
    if held:
        (folder / "holders/dm-0").mkdir()


def _data(kind: str, want: int = 1, *, dmsetup: bool = True, **commands: str) -> subprocess.CompletedProcess[str]:
    (root,) = _made
    fakes = {
        "blkid": "exit 2",
        "blockdev": "echo 1000500",
        "mkfs_ext4": "",
        "modprobe": "exit 1",
        "mount": f"mkdir {root}/mnt/data/lost+found",
        "sleep": "",
        **commands,
    }
    if dmsetup:
        fakes["dmsetup"] = ""
    environ = _fakes(root, **fakes)
    # Nothing but these and what a script cannot do without, so that no disk of this host comes to harm.
    for tool in ("sh", "mkdir", "rmdir", "chmod", "seq"):
        (root / "bin" / tool).symlink_to(str(shutil.which(tool)))
    environ["PATH"] = str(root / "bin")
    script = _local(DATA_SCRIPT, root)
    return subprocess.run(["sh", "-c", script, "data", kind, str(want)], env=environ, capture_output=True, text=True)


def _disks() -> None:
    _disk("nvme0n1", EBS, partition=True)  # The root.
    _disk("nvme1n1", NVME)
    _disk("nvme2n1", EBS)
    _disk("nvme3n1", NVME)
    _disk("nvme4n1", EBS, held=True)
    _disk("loop0", "")


def test_the_data_space_is_striped() -> None:
    _disks()
    done = _data("nvme", 2, blockdev="case $2 in /dev/nvme3n1) echo 1000500;; *) echo 2000000;; esac")
    assert (done.returncode, done.stderr) == (0, "")
    table = "0 2000896 striped 2 512 /dev/nvme1n1 0 /dev/nvme3n1 0"  # The smaller one's whole stripes, twice.
    assert f"dmsetup create bigmachine --table {table}" in _calls()
    assert [call.split()[-1] for call in _calls() if call.startswith("mkfs")] == ["/dev/mapper/bigmachine"]
    data = _made[0] / "mnt/data"
    assert f"mount -o noatime /dev/mapper/bigmachine {data}" in _calls()
    assert data.stat().st_mode & 0o7777 == 0o1777
    assert list(data.iterdir()) == []


@pytest.mark.parametrize(("kind", "device"), [("ebs", "/dev/nvme2n1"), ("nvme", "/dev/nvme1n1")])
def test_one_volume_or_no_device_mapper(kind: str, device: str) -> None:
    _disks()
    done = _data(kind, dmsetup=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [call.split()[-1] for call in _calls() if call.startswith("mkfs")] == [device]
    assert ("no dmsetup on this image" in done.stdout) == (kind == "nvme")


@pytest.mark.parametrize("code", [0, 4, 8])
def test_what_may_have_content_is_left_alone(code: int) -> None:
    _disks()
    done = _data("nvme", blkid=f"exit {code}")
    assert done.returncode == 1
    assert "no data space: 1 blank nvme volumes wanted, 0 found" in done.stdout
    assert not [call for call in _calls() if call.startswith("mkfs")]


def test_volumes_that_come_late_are_waited_for() -> None:
    (root,) = _made
    _disk("nvme1n1", NVME)
    late = root / "sys/block/nvme2n1"
    done = _data("nvme", 2, sleep=f"mkdir -p {late}/device {late}/holders; echo '{NVME}' >{late}/device/model")
    assert (done.returncode, done.stderr) == (0, "")
    assert _calls().count("sleep 0.5") == 1
    assert any(call.startswith("dmsetup create") for call in _calls())


# -- On real systems -----------------------------------------------------------------------------------------------------

ENDS = {
    "the agent ends": "kill -9 $(systemctl show -P MainPID bigmachine)",
    "the switch ends": "kill -9 $(systemctl show -P MainPID bigmachine-deadman)",
    "nobody says that it is used": "echo 1 >/run/bigmachine/until",
    "it is powered off": "systemctl poweroff",
    "it is rebooted": "systemctl reboot",
    "it boots again": "rm /run/bigmachine/begun; systemctl daemon-reload; systemctl start sysinit.target",
}
"""What ends an instance, and how it comes about."""


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[ec2.FakeEc2, list[str]]]:
    """Instances, as many as there are ends, on which the agent runs."""
    if reason := ec2.unavailable("3.11"):
        pytest.skip(reason)
    agent = agent_text(Trust().agent("l-1"), {"port": 443, **AGENT_SETTINGS})
    with ec2.FakeEc2(("3.11",)) as cloud, pytest.MonkeyPatch.context() as patch:
        for name, value in cloud.environ().items():
            patch.setenv(name, value)
        found = boto3.client("ssm").get_parameter(Name="/aws/service/debian/release/12/latest/amd64")
        made = boto3.client("ec2").run_instances(
            ImageId=found["Parameter"]["Value"],
            InstanceType="m7i.large",
            MinCount=len(ENDS),
            MaxCount=len(ENDS),
            UserData=user_data(UserData(agent, units=[("own.service", UNIT.replace("true", "touch /run/own"))])),
            InstanceInitiatedShutdownBehavior="terminate",
        )
        ids = [instance["InstanceId"] for instance in made["Instances"]]
        for id in ids:
            assert namespaces.eventually(lambda id=id: '{"port": 443' in cloud.console(id), 40.0), cloud.console(id)
        yield cloud, ids


@pytest.mark.slow
def test_what_a_host_becomes(machines: tuple[ec2.FakeEc2, list[str]]) -> None:
    cloud, (id, *_) = machines
    # Which wants what forbids a second boot: it is still the first.
    cloud.run(id, "sh", "-ec", "systemctl daemon-reload; systemctl start sysinit.target")
    assert cloud.run(id, "sh", "-c", "systemctl is-active bigmachine bigmachine-deadman").split() == ["active"] * 2
    assert cloud.run(id, "ls", "/run/bigmachine").split() == ["begun", "deadman"]
    assert namespaces.eventually(lambda: cloud.run(id, "cat", "/run/cloud-init/result.json", check=False), 20.0)
    assert json.loads(cloud.run(id, "cat", "/run/cloud-init/result.json"))["v1"]["errors"] == []
    assert cloud.run(id, "ls", "/run/own").strip() == "/run/own"
    timers = cloud.run(id, "systemctl", "list-timers", "--no-legend")
    assert "apt-daily" not in timers


@pytest.mark.slow
@pytest.mark.parametrize(("number", "how"), list(enumerate(ENDS.values())), ids=list(ENDS))
def test_whatever_ends_ends_the_host(machines: tuple[ec2.FakeEc2, list[str]], number: int, how: str) -> None:
    cloud, ids = machines
    cloud.run(ids[number], "sh", "-c", how, check=False)  # It may be gone before it has said so.
    cloud.wait(ids[number], "terminated", 15.0)
    if "until" in how:
        assert "bigmachine: nobody has said that this host is used: power off" in cloud.console(ids[number])


if __name__ == "__main__":
    for name, case in CASES.items():
        (GOLDEN / name).write_text(cloud_config(case), "utf-8")
