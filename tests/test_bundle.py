"""Reports: what is in them, that no secret is, and when they are written."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import bigmachine
from bigmachine import State
from bigmachine.authority import Authority
from bigmachine.credentials import Role
from bigmachine.errors import MachineStopped, UsageError
from bigmachine.inside import bundle, evidence
from bigmachine.inside.redact import REDACTED
from bigmachine.session import Session
from bigmachine.systems.local import LocalLauncher
from bigmachine.testing import TestSystem
from bigmachine.testing.conformance import SOON
from bigmachine.testing.services import Probe

ALWAYS = {
    "README.txt",
    "boot.txt",
    "events.jsonl",
    "logs/driver.log",
    "metrics.txt",
    "profiles/heap.pb.gz",
    "profiles/threads.pb.gz",
    "profiles/threads.txt",
    "status.json",
    "status.txt",
    "vars.json",
    "versions.json",
}


def report(b: Session, why: str = "") -> dict[str, bytes]:
    """What is in it, profiles unpacked, by name."""
    file = io.BytesIO()
    names = bundle.write(b, file, why)
    with zipfile.ZipFile(file) as archive:
        assert archive.namelist() == names
        assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o600}
        return unpacked(archive)


def unpacked(archive: zipfile.ZipFile) -> dict[str, bytes]:
    read = {name: archive.read(name) for name in archive.namelist()}
    return {name: gzip.decompress(data) if name.endswith(".gz") else data for name, data in read.items()}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests in which the heap does not matter: to count all objects of pytest takes a second."""
    found = evidence.Evidence({"profiles/heap.pb.gz": gzip.compress(b"a heap")})
    monkeypatch.setattr(evidence, "_heap", lambda session, redaction, gone: found)


def missing(members: dict[str, bytes]) -> str:
    return members["README.txt"].decode().partition("\nMissing:\n")[2]


# -- What is in it -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_report() -> None:
    with bigmachine.start(TestSystem()) as b:
        one, two = b.start(2, {"Probe": Probe()})
        assert one.call("Probe.echo", 5) == 5
        two.wait(State.RUNNING, SOON)
        members = report(b, "it was asked for")
        assert set(members) == ALWAYS | {f"logs/{one.id}.log", f"logs/{two.id}.log"}
        readme = members["README.txt"].decode()
        assert f"session {b.name}, system test" in readme
        assert "as it was asked for" in readme
        assert missing(members) == "  nothing\n"
        for name in ALWAYS - {"README.txt", "logs/driver.log"}:
            assert members[name], name
        assert f"{one.addr}: RUNNING\n" in members["boot.txt"].decode()
        assert re.search(r"step setup: \d+\.\d{3} s", members["boot.txt"].decode())
        assert "Probe.echo" in members["status.txt"].decode()
        assert len(json.loads(members["status.json"])["machines"]) == 2
        figures = json.loads(members["vars.json"])["sum"]
        assert figures['bigmachine_rpc_calls_total{end="server",method="Probe.echo"}'] == 1
        assert b"bigmachine_vars_up{" in members["metrics.txt"]
        events = [json.loads(line) for line in members["events.jsonl"].splitlines()]
        assert [event["number"] for event in events] == list(range(1, len(events) + 1))
        assert events[0]["kind"] == "session.started"
        versions = json.loads(members["versions.json"])
        assert versions["bigmachine"] == bigmachine.info.VERSION
        assert "h2" in versions["dependencies"]
        assert set(versions["machines"]) == {one.id, two.id}
        assert b"[objects] " in members["profiles/heap.pb.gz"]


@pytest.mark.usefixtures("quick")
def test_who_is_missing() -> None:
    system = TestSystem()
    with bigmachine.start(system) as b:
        one, two = b.start(2, {"Probe": Probe()})
        for machine in (one, two):
            machine.wait(State.RUNNING, SOON)
        system.crash(two, "service process 0 (pid 1) was killed by SIGSEGV")
        two.wait(State.STOPPED, SOON)
        members = report(b)
        assert missing(members) == f"  {two.addr}: STOPPED, and could not be asked\n"
        assert "was killed by SIGSEGV" in members["boot.txt"].decode()
        assert set(members) >= ALWAYS


@pytest.mark.slow
def test_who_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that hangs is missing, as anything is of which nothing is heard; the others are there."""
    monkeypatch.setattr(evidence, "ANSWER", 3.0)
    with bigmachine.start(LocalLauncher()) as b:
        one, two = b.start(2, {"Probe": Probe()})
        for machine in (one, two):
            machine.wait(State.RUNNING, 20.0)
        (pid,) = two.call("Supervisor.pids").values()
        os.kill(pid, signal.SIGSTOP)
        try:
            members = report(b)
        finally:
            os.kill(pid, signal.SIGCONT)
        for what in ("threads", "heap", "variables"):
            assert f"  {what} of {two.addr} 0: no answer within 3 s\n" in missing(members)
        assert one.addr not in missing(members)
        assert one.addr.encode() in members["profiles/threads.txt"]
        assert set(members) >= ALWAYS


@pytest.mark.usefixtures("quick")
def test_nothing_holds_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(session: object) -> evidence.Evidence:
        release.wait(60.0)
        return evidence.Evidence({"late.txt": ""})

    def fail(session: object) -> evidence.Evidence:
        raise ValueError("not today\nfor a reason")

    release = threading.Event()
    monkeypatch.setattr(evidence, "WITHIN", 0.3)
    monkeypatch.setattr(evidence, "_variables", hang)
    monkeypatch.setattr(evidence, "_status", fail)
    with bigmachine.start(TestSystem()) as b:
        members = report(b)
        release.set()
    assert "  status: not today\n" in missing(members)
    assert "  variables: no answer within 0.3 s\n" in missing(members)
    assert "boot.txt" in members
    assert "late.txt" not in members


@pytest.mark.usefixtures("quick")
def test_where_there_can_be_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the interpreter ends, from Python 3.12 on."""

    class Refused(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(evidence, "threading", types.SimpleNamespace(Thread=Refused, Event=threading.Event))
    with bigmachine.start(TestSystem()) as b:
        assert set(report(b)) >= ALWAYS


@pytest.mark.usefixtures("quick")
def test_logs_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "LOG", 100)
    with bigmachine.start(TestSystem(), logdir=str(tmp_path)) as b:
        (machine,) = b.start(1, {"Probe": Probe()})
        machine.wait(State.RUNNING, SOON)
        with (tmp_path / f"{machine.id}.log").open("a") as file:
            file.writelines(f"line {number:03}\n" for number in range(100))
        said = report(b)[f"logs/{machine.id}.log"].decode().splitlines()
    assert said[0].endswith(" bytes before")
    assert said[1:] == [f"line {number:03}" for number in range(89, 100)]


@pytest.mark.usefixtures("quick")
def test_captures_are_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "unhealthy-m-1-20260101T000000Z"
    folder.mkdir()
    (folder / "heap.pb.gz").write_bytes(gzip.compress(b"a profile"))
    (folder / "status.txt").write_text("full\npassword=hunter2\n")
    with bigmachine.start(TestSystem()) as b:
        files = [str(file) for file in folder.iterdir()]
        b.captures.append({"machine": "m-1", "time": 0.0, "reason": "full", "files": [*files, str(folder / "gone")]})
        members = report(b)
    assert members[f"captures/{folder.name}/heap.pb.gz"] == b"a profile"
    assert members[f"captures/{folder.name}/status.txt"].decode() == f"full\npassword={REDACTED}\n"


# -- Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_a_file_is_private_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.zip"
    with bigmachine.start(TestSystem()) as b:
        names = bundle.write(b, file)
        assert list(tmp_path.iterdir()) == [file]
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        with zipfile.ZipFile(file) as archive:
            assert archive.testzip() is None
            assert archive.namelist() == names
        before = file.read_bytes()

        def full(found: object, out: io.BytesIO) -> list[str]:
            out.write(b"half of it")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(evidence, "pack", full)
        with pytest.raises(OSError, match="No space left"):
            bundle.write(b, file)
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_bytes() == before


@pytest.mark.parametrize("where", ["file", "file/below"])
def test_a_directory_that_cannot_be(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write reports to .*; give -bigm.bundle a directory that can be"):
        bigmachine.start(TestSystem(), bundle=str(tmp_path / where))


# -- Failures ------------------------------------------------------------------------------------------------------------


def reports(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@pytest.mark.usefixtures("quick")
def test_where_the_program_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        hidden = "a-local-of-the-program"
        with bigmachine.start(TestSystem(), bundle=str(tmp_path)) as b:
            (machine,) = b.start(1, {"Probe": Probe()})
            machine.call("Probe.nothing_like_it", hidden)

    with pytest.raises(bigmachine.errors.UnknownMethod):
        run()
    (file,) = reports(tmp_path)
    assert f"bigmachine: a report of the failure is in {file}\n" in capsys.readouterr().err
    with zipfile.ZipFile(file) as archive:
        members = unpacked(archive)
    assert "the program failed: UnknownMethod" in members["README.txt"].decode()
    assert missing(members) == "  nothing\n"  # The machines were still there.
    error = members["error.txt"].decode()
    assert "Traceback" in error
    assert "has no method 'nothing_like_it'" in error
    assert not any(b"a-local-of-the-program" in data for data in members.values())


@pytest.mark.usefixtures("quick")
def test_a_program_that_goes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with bigmachine.start(TestSystem(), bundle="reports") as b:
        monkeypatch.chdir(tmp_path / "there")
        b.fail(KeyError())
    assert len(reports(tmp_path / "here/reports")) == 1


def test_where_it_does_not(tmp_path: Path) -> None:
    with bigmachine.start(TestSystem(), bundle=str(tmp_path)) as b:
        (machine,) = b.start(1, {"Probe": Probe()})
        assert machine.call("Probe.echo", 1) == 1
    assert reports(tmp_path) == []


@pytest.mark.usefixtures("quick")
def test_a_disk_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(found: object, out: object) -> list[str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evidence, "pack", full)
    with pytest.raises(KeyError), bigmachine.start(TestSystem(), bundle=str(tmp_path)):
        raise KeyError("the program's own")
    assert "bigmachine: cannot write a report to " in capsys.readouterr().err
    assert reports(tmp_path) == []


PROGRAM = """
import os, sys, time
from bigmachine import driver

class Leaky:
    def __init__(self, secret):
        self.attribute = secret

    def leak(self, argument, pem):
        print("secret:", argument, flush=True)
        print("my environment:", dict(os.environ), flush=True)
        print("as it is:", os.environ["SITE_PASSWORD"], os.environ["FLEET_TOKEN"], flush=True)
        print(pem, flush=True)
        print("aws", os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"], flush=True)
        print("Authorization: Bearer planted-bearer-1", flush=True)

    def fail(self, argument):
        raise ValueError(f"cannot log in with password={argument}")

b = driver.start()
(machine,) = b.start(1, {"Leaky": Leaky("planted-attribute")}, environ={"FLEET_TOKEN": "planted-fleet"})
machine.wait()
print("PRINTED", sys.argv)
credentials = b.credentials()
machine.call("Leaky.leak", sys.argv[-1], credentials.key.decode())
deadline = time.monotonic() + 60
while not any("planted-bearer" in line.text for line in b.logs.last(100)) and time.monotonic() < deadline:
    time.sleep(0.01)
machine.call("Leaky.fail", sys.argv[-1])
"""


@pytest.fixture(scope="module")
def leaked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, bytes], str]]:
    """What is in the report of a program that says all that it should not; and its standard error."""
    folder = tmp_path_factory.mktemp("leaky")
    (folder / "leaky.py").write_text(PROGRAM)
    planted = {
        "SITE_PASSWORD": "planted-environment",
        "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7PLANTED",
        "AWS_SECRET_ACCESS_KEY": "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",
        "DATABASE_URL": "postgres://me:planted-database@db/x",
    }
    flags = ["-bigm.bundle=reports", "-bigm.logdir=logs", "-bigm.http=off"]
    command = [sys.executable, "leaky.py", *flags, "--password", "planted-option", "planted-positional"]
    environ = {**os.environ, **planted}
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=100)
    (file,) = reports(folder / "reports")
    with zipfile.ZipFile(file) as archive:
        yield unpacked(archive), done.stderr


@pytest.mark.slow
def test_no_secret_is_in_it(leaked: tuple[dict[str, bytes], str]) -> None:
    members, said = leaked
    assert "planted-environment" in said  # The machine has said it, and the user's own terminal shows it.
    assert "BEGIN PRIVATE KEY" in said
    (log,) = (data for name, data in members.items() if name.startswith("logs/m-"))
    assert log.decode().count(REDACTED) > 10
    assert b"ValueError: cannot log in with password=" in members["error.txt"]
    body = re.findall(r"^\S+ ([A-Za-z0-9+/=]{20,})$", said, re.MULTILINE)
    assert body
    for name, data in members.items():
        text = data.decode("utf-8", "replace")
        for secret in ("planted-", "PLANTED", "wJalrXUtnFEMI", "BEGIN PRIVATE", *body):
            assert secret not in text, (name, secret)


@pytest.mark.slow
def test_a_program_without_a_with_statement(leaked: tuple[dict[str, bytes], str]) -> None:
    """Its machines are still there when the exception that nobody catches is known."""
    members, said = leaked
    assert missing(members) == "  nothing\n"
    assert set(members) >= ALWAYS | {"error.txt"}
    assert said.index("ValueError: cannot log in") < said.index("bigmachine: a report of the failure is in")


@pytest.mark.usefixtures("quick")
def test_a_machine_that_does_not_boot(tmp_path: Path) -> None:
    class Bad:
        def setup(self, b: Session) -> None:
            raise LookupError("nothing to be found")

    def run() -> None:
        with bigmachine.start(TestSystem(), bundle=str(tmp_path)) as b:
            (machine,) = b.start(1, {"Bad": Bad()})
            machine.wait(State.RUNNING, SOON)

    with pytest.raises((LookupError, MachineStopped)):
        run()
    (file,) = reports(tmp_path)
    with zipfile.ZipFile(file) as archive:
        members = unpacked(archive)
    assert b"nothing to be found" in members["boot.txt"]
    assert b"nothing to be found" in members["error.txt"]


@pytest.mark.usefixtures("quick")
def test_keys_of_the_session_are_nowhere() -> None:
    """As PEM is taken out wherever it stands; here it stands in an event, and in a line of the log."""
    key = Authority("s-1").issue(Role.DRIVER, "d-1").key.decode()
    with bigmachine.start(TestSystem()) as b:
        b.events.emit("call.failed", "m-1", error=f"bad key {key}")
        for line in key.splitlines():
            b.say(f"the key: {line}")
        members = report(b)
    for line in key.splitlines()[1:-1]:
        for name, data in members.items():
            assert line.encode() not in data, name
