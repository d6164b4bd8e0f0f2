"""What a session has besides its machines: what is called when it fails and ends, its settings, and what it says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import bigmachine
from bigmachine import errors
from bigmachine.session import Session, is_failure
from bigmachine.state import State
from bigmachine.testing import TestSystem


class Echo:
    def echo(self, what: object) -> object:
        return what


def test_the_end_goes_backwards_and_once() -> None:
    ended: list[str] = []
    with bigmachine.start(TestSystem()) as b:
        (machine,) = b.start(1, {"Echo": Echo()})
        machine.wait()
        b.at_end(lambda: ended.append(f"first, {machine.state}"))
        b.at_end(lambda: ended.append(f"second, {machine.state}"))
        assert not ended
    b.shutdown()
    assert ended == ["second, STOPPED", "first, STOPPED"]


def test_an_end_that_is_interrupted_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while machines end: at the program's exit the session is shut down once more."""
    ended: list[str] = []

    def interrupted(owned: object) -> None:
        raise KeyboardInterrupt

    b = bigmachine.start(TestSystem())
    (machine,) = b.start(1, {"Echo": Echo()})
    machine.wait()
    b.at_end(lambda: ended.append(str(machine.state)))
    with monkeypatch.context() as patch:
        patch.setattr("bigmachine.session._end_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            b.shutdown()
    assert not ended
    b.shutdown()
    assert ended == ["STOPPED"]
    assert b.events.last(1)[0].kind == "session.ended"
    b.shutdown()
    assert len(ended) == 1


def test_what_fails_at_the_end_does_not_keep_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[str] = []
    with bigmachine.start(TestSystem()) as b:
        b.at_end(lambda: ended.append("first"))
        b.at_end(lambda: 1 / 0)
    assert ended == ["first"]
    assert "bigmachine: ZeroDivisionError at the end: division by zero" in capsys.readouterr().err


def test_a_failure_is_told_while_the_machines_are_there() -> None:
    told: list[tuple[BaseException, State]] = []
    error = ValueError("it went wrong\nfor a reason")

    def run() -> Session:
        with bigmachine.start(TestSystem()) as b:
            (machine,) = b.start(1, {"Echo": Echo()})
            machine.wait()
            b.at_failure(lambda error: told.append((error, machine.state)))
            sessions.append(b)
            raise error

    sessions: list[Session] = []
    with pytest.raises(ValueError, match="it went wrong"):
        run()
    assert told == [(error, State.RUNNING)]
    (session,) = sessions
    assert session.failed is error
    last = session.events.last(1)[0]
    assert (last.kind, last.fields["error"]) == ("session.ended", "ValueError: it went wrong")
    session.fail(KeyError("later"))
    assert len(told) == 1


def test_who_looks_into_a_failure_may_fail(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        with bigmachine.start(TestSystem()) as b:
            b.at_failure(lambda error: 1 / 0)
            raise ValueError("the program's own")

    with pytest.raises(ValueError, match="the program's own"):
        run()
    assert "ZeroDivisionError while the failure was looked into" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (ValueError(), True),
        (KeyboardInterrupt(), True),
        (SystemExit("cannot go on"), True),
        (SystemExit(2), True),
        (SystemExit(0), False),
        (SystemExit(), False),
        (SystemExit(143), False),
        (SystemExit(129), False),
    ],
    ids=repr,
)
def test_what_is_a_failure(error: BaseException, failed: bool) -> None:
    assert is_failure(error) is failed


def test_what_it_says_of_itself() -> None:
    with bigmachine.start(TestSystem()) as b:
        assert b.system == "test"
        assert b.name.startswith("s-")
        first = b.events.since(0)[0]
        assert (first.number, first.kind, first.machine) == (1, "session.started", "")
        assert first.fields["session"] == b.name
        (machine,) = b.start(1, {"Echo": Echo()})
        machine.wait()
        assert [process for process, _ in machine.processes] == ["supervisor", "0"]
        assert list(machine.entered) == [State.UNSTARTED, State.STARTING, State.RUNNING]
        assert sorted(machine.entered.values()) == list(machine.entered.values())
        assert b.fleet.detail(machine.id) == {}
        assert b.fleet.hourly(machine.id) is None
    assert machine.processes == ()
    assert list(machine.entered)[-1] is State.STOPPED


def test_a_service_s_session_has_none_of_it() -> None:
    class Asker:
        def setup(self, b: Session) -> None:
            self.session = b

        def ask(self, name: str) -> str:
            try:
                getattr(self.session, name)
            except errors.UsageError as error:
                return str(error)
            return "nothing was raised"

    with bigmachine.start(TestSystem()) as b:
        (machine,) = b.start(1, {"Asker": Asker()})
        for name in ("name", "system", "events", "logs", "fleet"):
            assert machine.call("Asker.ask", name) == "only the driver's session knows that; this one is a service's"


def test_options_of_the_session_go_beside_those_of_the_system(tmp_path: Path) -> None:
    with bigmachine.start("test", maxprocs=2, http="off", logdir=str(tmp_path / "logs")) as b:
        (machine,) = b.start(1, {"Echo": Echo()})
        assert machine.call("Echo.echo", 5) == 5
    assert (tmp_path / "logs").is_dir()
    with pytest.raises(errors.UsageError, match="no option 'moon'"):
        bigmachine.start("test", moon=1)


PROGRAM = """
import sys
from bigmachine import driver

class Echo:
    def echo(self, what):
        return what

b = driver.start()
b.at_failure(lambda error: print("failed:", type(error).__name__, len(b.machines()), flush=True))
(machine,) = b.start(1, {"Echo": Echo()})
print(machine.call("Echo.echo", "hello"), flush=True)
ENDING
"""


@pytest.mark.slow
def test_a_mistake_at_a_prompt_is_not_why_the_program_ends() -> None:
    """`sys.last_value` stays there, whatever the user has done since."""
    code = "import bigmachine; b = bigmachine.start('test'); b.at_failure(print)"
    command = [sys.executable, "-i", "-c", code]
    ran = subprocess.run(
        command, input="1 / 0\nb.at_end(lambda: print('ended', b.failed))\n", capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.splitlines() == ["ended None"], ran.stderr
    assert "ZeroDivisionError" in ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "lines"),
    [("1 / 0", ["hello", "failed: ZeroDivisionError 1"]), ("sys.exit(0)", ["hello"]), ("", ["hello"])],
    ids=["fails", "leaves", "ends"],
)
def test_a_program_without_with(ending: str, lines: list[str], tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(PROGRAM.replace("ENDING", ending))
    environ = {**os.environ, "PYTHONPATH": str(Path(bigmachine.__file__).parents[1]), "BIGMACHINE_SESSION_HTTP": "off"}
    ran = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=environ, timeout=60, check=False)
    assert ran.stdout.splitlines() == lines, ran.stderr
