"""What is read before anybody connects: hosts, ssh's configuration, files of known hosts."""

from __future__ import annotations

import base64
import getpass
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from bigmachine import settings
from bigmachine.errors import UsageError
from bigmachine.settings import load
from bigmachine.systems.ssh import SshLauncher, remote
from bigmachine.systems.ssh.config import Config, host_names
from bigmachine.systems.ssh.known import HostKey, known, place
from bigmachine.systems.ssh.settings import Settings

ONE, TWO = base64.b64encode(b"one").decode(), base64.b64encode(b"two").decode()
ED_ONE, RSA_TWO = HostKey("ssh-ed25519", b"one"), HostKey("ssh-rsa", b"two")


@pytest.fixture(autouse=True)
def nothing_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "user_file", lambda: tmp_path / "none.toml")


# -- Hosts ---------------------------------------------------------------------------------------------------------------


def hosts(given: str | list[str] | None, folder: Path) -> list[str]:
    return host_names(load(Settings, "ssh", {"hosts": given}, environ={}, folder=folder).hosts)


def test_hosts_of_a_flag_a_file_or_the_configuration(tmp_path: Path) -> None:
    assert hosts("ada, grace:2222,me@h3,", tmp_path) == ["ada", "grace:2222", "me@h3"]
    assert hosts(["ada", "grace"], tmp_path) == ["ada", "grace"]
    (tmp_path / "hosts").write_text("# ours\nada\n\ngrace:2222  # the fast one\n")
    assert hosts(f"@{tmp_path / 'hosts'}", tmp_path) == ["ada", "grace:2222"]
    (tmp_path / "bigmachine.toml").write_text("[ssh]\nhosts = ['h1', 'h2']\n")
    assert hosts(None, tmp_path) == ["h1", "h2"]
    assert hosts("ada", tmp_path) == ["ada"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "no hosts"),
        ("[ec2]\n", "no hosts"),
        ("[ssh]\nhosts = 'ada'\n", "hosts is a list"),
        ("[ssh\n", "cannot be read"),
        ("ssh = 3\n", r"ssh is a section, \[ssh\]"),
    ],
)
def test_no_hosts(tmp_path: Path, text: str | None, reason: str) -> None:
    if text is not None:
        (tmp_path / "bigmachine.toml").write_text(text)
    with pytest.raises(UsageError, match=reason):
        hosts(None, tmp_path)


def test_a_file_of_hosts_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the file with the hosts cannot be read: /nowhere"):
        hosts("@/nowhere", tmp_path)
    (tmp_path / "empty").write_text("# none yet\n")
    with pytest.raises(UsageError, match="no hosts"):
        hosts(f"@{tmp_path / 'empty'}", tmp_path)


# -- ssh's configuration -------------------------------------------------------------------------------------------------


def config(tmp_path: Path, text: str) -> Config:
    (tmp_path / "config").write_text(text)
    return Config(str(tmp_path / "config"))


def test_without_a_word_of_configuration(tmp_path: Path) -> None:
    target = config(tmp_path, "").target("ada.example")
    assert (target.name, target.host, target.port) == ("ada.example", "ada.example", 22)
    assert target.user == getpass.getuser()
    assert [path.name for path in target.identities] == ["id_rsa", "id_ecdsa", "id_ed25519"]
    assert target.known[0] == Path("~/.ssh/known_hosts").expanduser()
    assert Path("/etc/ssh/ssh_known_hosts") in target.known
    assert target.place == "ada.example"
    assert not target.jumps


def test_what_is_configured(tmp_path: Path) -> None:
    text = f"""
Host ada
    HostName %h.example
    User countess
    Port 2222
    IdentityFile {tmp_path}/%h-key
    IdentityFile {tmp_path}/other
    IdentitiesOnly yes
    UserKnownHostsFile {tmp_path}/known
    GlobalKnownHostsFile none
Host *
    HostKeyAlias all-the-same
    User nobody
"""
    target = config(tmp_path, text).target("ada")
    assert (target.host, target.port, target.user) == ("ada.example", 2222, "countess")
    assert target.identities == (tmp_path / "ada.example-key", tmp_path / "other")
    assert target.only
    assert target.known == (tmp_path / "known",)
    assert target.place == "all-the-same"
    given = config(tmp_path, text).target("me@ada:22")
    assert (given.host, given.port, given.user) == ("ada.example", 22, "me")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("ada", ("ada", 22)),
        ("ada:2222", ("ada", 2222)),
        ("10.0.0.1:2222", ("10.0.0.1", 2222)),
        ("[::1]:2222", ("::1", 2222)),
        ("me@[fe80::1%eth0]", ("fe80::1%eth0", 22)),
    ],
)
def test_specifications(tmp_path: Path, spec: str, expected: tuple[str, int]) -> None:
    target = config(tmp_path, "").target(spec)
    assert (target.host, target.port) == expected


@pytest.mark.parametrize("spec", ["", "a b", "::1", "ada:", "ada:0", "ada:65536", "ada:ssh", "@ada", "me@"])
def test_specifications_that_are_none(tmp_path: Path, spec: str) -> None:
    with pytest.raises(UsageError, match="not a host"):
        config(tmp_path, "").target(spec)


def test_jumps(tmp_path: Path) -> None:
    text = """
Host inner
    ProxyJump me@middle:2222,other
Host middle
    ProxyJump outer
    HostName middle.example
Host other
    ProxyJump ignored
Host none
    ProxyJump none
"""
    target = config(tmp_path, text).target("inner")
    assert [(jump.name, jump.host, jump.port) for jump in target.jumps] == [
        ("outer", "outer", 22),
        ("middle", "middle.example", 2222),
        ("other", "other", 22),
    ]
    assert target.jumps[1].user == "me"
    assert not any(jump.jumps for jump in target.jumps)
    assert config(tmp_path, text).target("none").jumps == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Host a\n ProxyJump b\nHost b\n ProxyJump a\n", "leads in a circle: a → b → a"),
        ("Host a\n ProxyCommand nc %h %p\n", "a has a ProxyCommand, which bigmachine does not use"),
        ("Host a\n Port many\n", "the ssh configuration of a cannot be used"),
        ("Host a\n !!\n", "the ssh configuration cannot be read"),
        ("Include config\n", "includes itself"),
    ],
)
def test_configurations_that_cannot_be_used(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        config(tmp_path, text).target("a")


def test_no_such_configuration(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such ssh configuration"):
        Config(str(tmp_path / "nothing"))


def test_includes(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/1.conf").write_text(
        "Host ada\n    HostName one.example\nHost grace\n    HostName two.example\n"
    )
    (tmp_path / "conf.d/2.conf").write_text("User everywhere\n")
    text = "Include conf.d/*.conf\nInclude nothing/*\nPort 2222\nHost ada\n    User countess\n"
    ada = config(tmp_path, text).target("ada")
    assert (ada.host, ada.port, ada.user) == ("one.example", 2222, "everywhere")
    assert config(tmp_path, text).target("grace").host == "two.example"
    assert config(tmp_path, text).target("other").port == 2222


# -- Known hosts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "name", "expected"),
    [
        (f"ada ssh-ed25519 {ONE}", "ada", True),
        (f"ada ssh-ed25519 {ONE} a comment", "ADA", True),
        (f"ada,10.0.0.1 ssh-ed25519 {ONE}", "10.0.0.1", True),
        (f"ada ssh-ed25519 {ONE}", "ada.example", False),
        (f"*.example ssh-ed25519 {ONE}", "ada.example", True),
        (f"*.example,!ada.* ssh-ed25519 {ONE}", "ada.example", False),
        (f"[ada]:2222 ssh-ed25519 {ONE}", place("ada", 2222), True),
        (f"[ada]:2222 ssh-ed25519 {ONE}", place("ada", 22), False),
        (f"ada ssh-ed25519 {ONE}", place("ada", 2222), False),
        (f"@cert-authority ada ssh-ed25519 {ONE}", "ada", False),
        ("# ada", "ada", False),
        ("ada ssh-ed25519 not-base64!", "ada", False),
        ("|1|no|hash| ssh-ed25519 " + ONE, "ada", False),
    ],
)
def test_known_hosts(line: str, name: str, expected: bool) -> None:
    assert known([line], name).keys == ((ED_ONE,) if expected else ())


def test_several_keys_in_several_files_and_one_that_is_revoked() -> None:
    first = f"ada ssh-ed25519 {ONE}\nada ssh-rsa {TWO}\n"
    found = known([first, f"ada ssh-ed25519 {ONE}\n@revoked * ssh-rsa {TWO}\n"], "ada")
    assert found.keys == (ED_ONE, RSA_TWO)
    assert found.revoked == (RSA_TWO,)
    assert known([], "ada").keys == ()


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="there is no ssh-keygen to compare with")
def test_hashes_and_fingerprints_are_those_of_ssh(tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    file = tmp_path / "known"
    file.write_text(f"[ada]:2222 {(tmp_path / 'key.pub').read_text()}")
    shown = subprocess.run(
        ["ssh-keygen", "-lf", tmp_path / "key.pub"], check=True, capture_output=True, text=True
    ).stdout
    subprocess.run(["ssh-keygen", "-H", "-f", file], check=True, capture_output=True)
    assert "ada" not in file.read_text().split()[0]
    (key,) = known([file.read_text()], "[ada]:2222").keys
    assert str(key) == f"ssh-ed25519 {shown.split()[1]}"
    assert known([file.read_text()], "ada").keys == ()


# -- The launcher --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"maxprocs": -1}, "maxprocs must be"),
        ({"port": 65536}, "not a port"),
        ({"sshplatforms": ","}, "no platforms"),
        ({"sshconfig": "/nowhere"}, "no such ssh configuration"),
        ({"hosts": "a b"}, "not a host"),
    ],
)
def test_options_that_cannot_be(options: dict[str, object], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        SshLauncher(**{"hosts": "ada", **options})  # type: ignore[arg-type]


def test_a_launcher_leaves_alone_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("")
    launcher = SshLauncher("ada,grace", str(tmp_path / "config"), sshplatforms="linux/amd64, linux/arm64")
    assert launcher.ships == ("linux/amd64", "linux/arm64")
    launcher.stop("m-unknown", 1.0)
    launcher.on_end("m-unknown", print)
    assert launcher.ended("m-unknown") is None
    assert launcher.console("m-unknown") == ""
    launcher.close()
    launcher.close()


class NoChannel:
    """Of a connection at which nothing happens."""

    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_a_machine_is_killed_when_there_are_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 starts none in `atexit`, when a program without ``with`` ends its session."""

    def none(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    channel = NoChannel()
    monkeypatch.setattr(threading.Thread, "start", none)
    with remote._closed_after(channel, 1.0):  # type: ignore[arg-type]
        assert channel.closed == 0
