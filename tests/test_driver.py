"""The driver's command line: flags, which program is executed again, which system is meant."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import types
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import bigmachine
from bigmachine import driver, launch
from bigmachine.errors import UsageError
from bigmachine.launch import Command, find_system, make_launcher, own_program, split_command
from bigmachine.systems.inprocess import TestLauncher
from bigmachine.systems.local import LocalLauncher

# -- Flags ---------------------------------------------------------------------------------------------------------------

SPELLINGS = [
    ["-bigm.system=test", "-bigm.maxprocs=3"],
    ["--bigm.system=test", "--bigm.maxprocs=3"],
    ["-bigm.system", "test", "--bigm.maxprocs", "3"],
    ["--bigm.system", "test", "-bigm.maxprocs", "3"],
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_parsed", {})
    monkeypatch.setattr(driver, "_taken", {})


@pytest.mark.parametrize("words", SPELLINGS)
def test_take_flags(words: list[str]) -> None:
    assert driver.take_flags(["a", *words, "-b", "--", "-bigm.port=1"]) == (
        {"system": "test", "maxprocs": 3},
        ["a", "-b", "--", "-bigm.port=1"],
    )


@pytest.mark.parametrize("words", SPELLINGS)
def test_add_flags(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int)
    driver.add_flags(parser)
    args = parser.parse_args([*words, "-n", "7"])
    assert args.n == 7
    assert driver._parsed == {"system": "test", "maxprocs": 3}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-bigm.nope=1"], "unknown flag -bigm.nope; there are -bigm.system, "),
        (["-bigm.ec2types=a.b"], "unknown flag -bigm.ec2types; did you mean -bigm.ec2type?"),
        (["--bigm."], "unknown flag -bigm.;"),
        (["-bigm.maxprocs=many"], "not a valid int: 'many'"),
        (["-bigm.maxprocs"], "flag -bigm.maxprocs needs a value"),
        (["-bigm.system="], "flag -bigm.system needs a value"),
        (["-bigm.image=yes"], "flag -bigm.image takes no value"),
    ],
)
def test_flags_that_are_wrong(words: list[str], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        driver.take_flags(words)
    assert text in str(caught.value)


def test_a_flag_without_a_value() -> None:
    assert driver.take_flags(["-bigm.image", "yes", "--bigm.port", "1"]) == ({"image": True, "port": 1}, ["yes"])
    parser = argparse.ArgumentParser()
    parser.add_argument("word")
    driver.add_flags(parser)
    assert parser.parse_args(["--bigm.image", "yes"]).word == "yes"
    assert driver._parsed == {"image": True}


def test_a_parser_refuses_unknown_flags(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    driver.add_flags(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["-bigm.nope=1"])
    assert "-bigm.nope" in capsys.readouterr().err


def maxprocs(session: bigmachine.Session) -> tuple[str, int]:
    assert session._fleet is not None
    launcher: Any = session._fleet.launcher
    return launcher.name, launcher._maxprocs


def test_start_takes_its_flags_out_of_argv_and_remembers_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", "in", "-bigm.system=test", "--bigm.maxprocs", "2", "out"])
    with driver.start() as first, driver.start() as second, driver.start("local", maxprocs=4) as third:
        assert sys.argv == ["app.py", "in", "out"]
        assert maxprocs(first) == maxprocs(second) == ("test", 2)
        assert maxprocs(third) == ("local", 4)


def test_start_uses_what_the_programs_parser_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py", "--bigm.system", "test", "--bigm.maxprocs=3"])
    parser = argparse.ArgumentParser()
    driver.add_flags(parser)
    parser.parse_args()
    with driver.start() as b:
        assert maxprocs(b) == ("test", 3)
    assert sys.argv[1:] == ["--bigm.system", "test", "--bigm.maxprocs=3"]


def test_start_refuses_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["app.py"])
    with pytest.raises(UsageError, match="unknown system: 'moon'; there are ec2, local, ssh, test"):
        driver.start("moon")
    with pytest.raises(UsageError, match="system 'test' has no option 'colour'; it has maxprocs, names"):
        driver.start("test", colour="blue")
    with pytest.raises(UsageError, match="no such ssh configuration") as caught:
        driver.start("ssh", hosts="ada", sshconfig="nowhere")
    assert caught.value.__suppress_context__, "one line, not where it was found"
    assert len(caught.traceback) == 2
    monkeypatch.setattr(sys, "argv", ["app.py", "-bigm.maxprocs=0"])
    with pytest.raises(UsageError, match="maxprocs must be at least 1: 0"):
        driver.start()


# -- Systems -------------------------------------------------------------------------------------------------------------


def test_options_of_a_launcher() -> None:
    assert isinstance(make_launcher("local", {"maxprocs": 2, "other": 1}, set()), LocalLauncher)
    ready = TestLauncher()
    assert make_launcher(ready, {"maxprocs": 2}, set()) is ready
    with pytest.raises(UsageError, match="belong to the launcher itself"):
        make_launcher(ready, {"maxprocs": 2}, {"maxprocs"})
    with pytest.raises(UsageError, match="not a port: 70000"):
        make_launcher("local", {"port": 70000}, {"port"})


def test_a_system_that_a_package_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    good = EntryPoint("mine", "bigmachine.testing:TestSystem", "bigmachine.systems")
    bad = EntryPoint("broken", "no_such_module:Launcher", "bigmachine.systems")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: (good, bad))
    assert find_system("mine") is TestLauncher
    with pytest.raises(
        UsageError, match=r"system 'broken' \(no_such_module:Launcher\) cannot be loaded: No module named"
    ):
        find_system("broken")
    with pytest.raises(UsageError, match="there are broken, ec2, local, mine, ssh, test"):
        find_system("other")


# -- The program ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "kind", "words", "own"),
    [
        ("app.py", "file", "app.py", ""),
        ("app.py a -c -m b", "file", "app.py", "a -c -m b"),
        ("-u -B app.py a", "file", "-u -B app.py", "a"),
        ("-W error app.py a", "file", "-W error app.py", "a"),
        ("-Werror -X dev app.py", "file", "-Werror -X dev app.py", ""),
        ("-Xdev -uX importtime app.py x", "file", "-Xdev -uX importtime app.py", "x"),
        ("--check-hash-based-pycs never app.py", "file", "--check-hash-based-pycs never app.py", ""),
        ("-- app.py a", "file", "-- app.py", "a"),
        ("-c code a b", "c", "-c code", "a b"),
        ("-ccode a", "c", "-ccode", "a"),
        ("-Ic code a", "c", "-Ic code", "a"),
        ("-m package.module a", "m", "-m package.module", "a"),
        ("-mpackage a", "m", "-mpackage", "a"),
        ("-Im package -x", "m", "-Im package", "-x"),
        ("-W error -m pytest -m slow", "m", "-W error -m pytest", "-m slow"),
        ("", "", "", ""),
        ("-i", "", "", ""),
        ("- a", "", "", ""),
        ("-u -", "", "", ""),
        ("-W error", "", "", ""),
        ("--", "", "", ""),
    ],
)
def test_split_command(command: str, kind: str, words: str, own: str) -> None:
    expected = Command(kind, tuple(words.split()), tuple(own.split()))
    assert split_command(["/usr/bin/python3", *command.split()]) == expected


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    """A `__main__` of its own, in a directory of its own."""
    module = types.ModuleType("__main__")
    module.__file__ = str(tmp_path / "app.py")
    (tmp_path / "app.py").touch()
    monkeypatch.setitem(sys.modules, "__main__", module)
    monkeypatch.chdir(tmp_path)
    return module


def test_a_script_is_executed_again_by_its_absolute_path(
    main: types.ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "app.py", "a", "b c"])
    program = own_program()
    assert program.argv == (sys.executable, "-u", str(tmp_path / "app.py"), "a", "b c")
    assert (program.own_args, program.cwd) == (2, str(tmp_path))
    monkeypatch.chdir("/")
    assert own_program().argv[2] == str(tmp_path / "app.py")


@pytest.mark.parametrize("words", [["-m", "app"], ["-Im", "app"], ["-c", "code"], ["-ccode"]])
def test_modules_and_code_are_executed_again_as_they_are(
    main: types.ModuleType, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    if "-m" not in words[0] and "m" not in words[0]:
        del main.__file__
    monkeypatch.setattr(sys, "orig_argv", ["python", *words, "x"])
    assert own_program().argv == (sys.executable, *words, "x")
    assert own_program().own_args == 1


@pytest.mark.parametrize("case", ["interactive", "standard input", "notebook"])
def test_what_cannot_be_executed_again_is_replaced_by_the_bare_toolkit(
    main: types.ModuleType, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    words = {"interactive": [], "standard input": ["-"], "notebook": ["-m", "ipykernel_launcher"]}[case]
    monkeypatch.setattr(sys, "orig_argv", ["python", *words])
    if case == "notebook":
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    assert own_program() is None
    program = launch.bare_program()
    assert program.argv[1:3] == ("-c", launch.BARE)
    assert [os.path.isabs(path) for path in program.argv[3:]] == [True] * len(sys.path)
    assert program.own_args == 0


def test_public_names() -> None:
    for name in bigmachine.__all__:
        assert getattr(bigmachine, name) is not None
    with pytest.raises(AttributeError, match="nope"):
        _ = bigmachine.nope
    assert bigmachine.testing.TestSystem is TestLauncher


def run(*words: str, program: str = "") -> str:
    """What a driver, a process of its own, prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *words], input=program, capture_output=True, text=True, timeout=60, check=False
    )
    assert not done.returncode, done.stderr
    return done.stdout


LATER = """
from bigmachine import driver

class One:
    def who(self): return "one"

with driver.start() as b:
    (machine,) = b.start(1, {"One": One()})
    print(machine.call("One.who"))

class Two:
    def who(self, and_whom): return "two and " + and_whom()

def three(): return "three"

with driver.start() as b:
    (machine,) = b.start(1, {"Two": Two()})
    print(machine.call("Two.who", three))
"""


def test_what_is_defined_after_the_first_start_goes_by_value(tmp_path: Path) -> None:
    script = tmp_path / "later.py"
    script.write_text(LATER)
    assert run(str(script)) == "one\ntwo and three\n"


def test_a_program_on_standard_input() -> None:
    assert run("-", program=LATER) == "one\ntwo and three\n"
