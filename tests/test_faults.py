"""What must end well, though everything goes wrong: on real processes, each test with a deadline.

Drivers are programs of their own, as users write them: scripts that are executed here, and again by their machines. All
that a test starts carries its mark in the environment; whatever is left is found by that, and by nothing else.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bigmachine import State, driver
from bigmachine.errors import BootError, MachineStopped
from bigmachine.machine import Machine
from bigmachine.rpc.reactor import reactor
from bigmachine.session import Session
from bigmachine.system import Program
from bigmachine.systems.local import LocalLauncher
from bigmachine.testing.conformance import SOON, Cluster, eventually

MARK = "BIGMACHINE_TEST_MARK"

GONE_WITHIN = 15.0
"""Seconds after the driver's death within which nothing of its machines may be left."""

HEADER = """
import bigmachine, ctypes, os, signal, subprocess, sys, threading, time
from bigmachine import State, driver

class Trouble:
    def setup(self, b): print("service is set up", flush=True)
    def pid(self): return os.getpid()
    def say(self, text): print(text)
    def segfault(self): print("about to segfault"); ctypes.string_at(0)
    def exit(self, code): print("about to exit"); os._exit(code)
    def kill(self): print("about to be killed"); os.kill(os.getpid(), signal.SIGKILL)
    def hold(self, seconds): ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    def wait(self): print("waiting"); time.sleep(60)
    def daemonise(self):
        code = "import os, time; os.setsid(); os.fork() and os._exit(0); time.sleep(60)"
        subprocess.Popen([sys.executable, "-c", code]).wait()
    def flood(self, lines, width):
        for i in range(lines): print(f"line {i} of {os.getpid()} " + "x" * width)
    def last_words(self, lines):
        for i in range(lines): print(f"last {i}")
        sys.stdout.write("without an end of line")
        os._exit(0)
"""


def marked(mark: str) -> list[psutil.Process]:
    """The living processes with `mark` in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return [process for process in found if process.pid != os.getpid()]


class Driver:
    """A program of a user, running."""

    def __init__(self, directory: Path, body: str, *args: str, header: str = HEADER) -> None:
        self.mark = secrets.token_hex(8)
        script = directory / f"driver_{self.mark}.py"
        script.write_text(header + textwrap.dedent(body))
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", str(script), *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, MARK: self.mark, "PYTHONFAULTHANDLER": "1"},
            start_new_session=True,
            text=True,
        )
        self.output: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._changed = threading.Condition()
        self._readers = [threading.Thread(target=self._read, args=(name,), daemon=True) for name in self.output]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str) -> None:
        with getattr(self.process, name) as stream:
            for line in stream:
                with self._changed:
                    self.output[name].append(line.rstrip("\n"))
                    self._changed.notify_all()

    @property
    def stdout(self) -> list[str]:
        return self.output["stdout"]

    @property
    def stderr(self) -> list[str]:
        return self.output["stderr"]

    def await_line(self, text: str, name: str = "stdout", within: float = 20.0) -> str:
        """The first line that contains `text`."""

        def find() -> str | None:
            return next((line for line in self.output[name] if text in line), None)

        with self._changed:
            if not self._changed.wait_for(lambda: find() is not None, within):
                pytest.fail(f"no {text!r} within {within:g} s; {self.transcript()}")
        line = find()
        assert line is not None
        return line

    def end(self, within: float = 20.0) -> int:
        """Wait for its end, and that of its output; returns its exit code."""
        try:
            code = self.process.wait(within)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the driver does not end; {self.transcript()}")
        for reader in self._readers:
            reader.join(within)
            assert not reader.is_alive(), "somebody holds the driver's output open"
        return code

    def assert_gone(self, within: float = SOON) -> None:
        eventually(lambda: not marked(self.mark), f"the end of {marked(self.mark)}", within)

    def transcript(self) -> str:
        return "its output:\n" + "\n".join([*self.stdout, "-- stderr:", *self.stderr])

    def clean(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(5)
        for process in marked(self.mark):
            process.kill()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """Start a driver; whatever is left of it at the end of the test is killed."""
    drivers = []

    def start(body: str, *args: str, header: str = HEADER) -> Driver:
        drivers.append(Driver(tmp_path, body, *args, header=header))
        return drivers[-1]

    yield start
    for each in drivers:
        each.clean()


# -- The driver's end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("busy", ["idle", "holding the GIL", "in a fork of the driver"])
def test_a_driver_that_is_killed_leaves_nothing(run: Callable[..., Driver], busy: str) -> None:
    program = run(
        """
        with driver.start(maxprocs=2) as b:
            machines = b.start(2, {"T": Trouble()})
            for m in machines: m.wait(State.RUNNING)
            if sys.argv[1] == "holding the GIL":
                for m in machines: m.submit("T.hold", 60)
            elif sys.argv[1] == "in a fork of the driver":
                import multiprocessing
                multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,)).start()
            for m in machines: m.call("Supervisor.ping") if busy else None
            print("ready", flush=True)
            time.sleep(60)
        """.replace("for m in machines: m.call(\"Supervisor.ping\") if busy else None", "time.sleep(0.1)"),
        busy,
    )
    program.await_line("ready")
    assert len(marked(program.mark)) >= 5
    program.process.kill()
    program.process.wait(5)
    started = time.monotonic()

    def machines() -> list[psutil.Process]:
        return [process for process in marked(program.mark) if process.ppid() != 1 or "bigmachine" in process.cmdline()]

    if busy == "in a fork of the driver":  # The fork itself is nobody's but the driver's.
        eventually(lambda: len(marked(program.mark)) == 1, "the end of all machines", GONE_WITHIN)
    else:
        program.assert_gone(GONE_WITHIN)
    assert time.monotonic() - started < GONE_WITHIN


@pytest.mark.parametrize("how", ["interrupt", "exception", "exit"])
def test_a_driver_that_ends_leaves_nothing_and_prints_everything(run: Callable[..., Driver], how: str) -> None:
    program = run(
        """
        with driver.start() as b:
            machines = b.start(2, {"T": Trouble()})
            calls = [m.submit("T.flood", 500, 10) for m in machines]
            for call in calls: call.result()
            calls = [m.submit("T.wait") for m in machines]
            print("ready", flush=True)
            if sys.argv[1] == "exception": raise RuntimeError("the driver's own")
            if sys.argv[1] == "exit": sys.exit(5)
            calls[0].result()
        """,
        how,
    )
    program.await_line("ready")
    if how == "interrupt":
        os.killpg(program.process.pid, signal.SIGINT)  # As a terminal does.
    code = program.end()
    assert code == {"interrupt": -signal.SIGINT, "exception": 1, "exit": 5}[how], program.transcript()
    assert not marked(program.mark)
    for i in range(500):
        assert sum(f": line {i} of " in line for line in program.stderr) == 2
    addressed = re.compile(r"https://localhost:\d+/m-[0-9a-f]{6}/: (line \d+ of \d+ x{10}|service is set up|waiting)")
    ours = [line for line in program.stderr if line.startswith("https://")]
    assert all(addressed.fullmatch(line) for line in ours), program.transcript()
    last = program.stderr[-1]
    assert ("KeyboardInterrupt" in last, "the driver's own" in last) == (how == "interrupt", how == "exception")


def test_a_session_that_is_not_shut_down_ends_with_the_program(run: Callable[..., Driver]) -> None:
    program = run(
        """
        b = driver.start()
        m, = b.start(1, {"T": Trouble()})
        m.call("T.say", "hello from afar")
        print(m.state)
        """
    )
    assert program.end() == 0, program.transcript()
    assert program.stdout == ["RUNNING"]
    assert any(line.endswith(": hello from afar") for line in program.stderr), program.transcript()
    assert not [line for line in program.stderr if not line.startswith("https://")], program.transcript()
    assert not marked(program.mark)


def test_a_driver_may_start_sessions_again_and_again(run: Callable[..., Driver]) -> None:
    program = run(
        """
        b, c = driver.start(), driver.start("local")
        m, = b.start(1, {"T": Trouble()})
        n, = c.start(1, {"T": Trouble()}, args=["other", "arguments"], environ={"A": "1"})
        print(m.call("T.pid") != n.call("T.pid"))
        b.shutdown()
        print(n.call("T.pid") > 0)
        with driver.start() as d:
            m, = d.start(1, {"T": Trouble()})
            print(m.call("T.pid") > 0)
        c.shutdown()
        """,
        "-bigm.maxprocs=2",
    )
    assert program.end() == 0, program.transcript()
    assert program.stdout == ["True", "True", "True"]
    assert not marked(program.mark)


def test_arguments_and_environment_of_a_launch(run: Callable[..., Driver]) -> None:
    program = run(
        """
        print("argv", sys.argv[1:], os.environ.get("COLOUR"))
        with driver.start() as b:
            first, = b.start(1, {"T": Trouble()})
            first.wait()
            second, = b.start(1, {"T": Trouble()}, args=["c", "d e"], environ={"COLOUR": "blue = green"})
            second.wait()
        """,
        "a",
        "--bigm.maxprocs",
        "1",
        "b",
    )
    assert program.end() == 0, program.transcript()
    assert program.stdout == ["argv ['a', '--bigm.maxprocs', '1', 'b'] None"]
    said = [line.partition("/: ")[2] for line in program.stderr if "argv" in line]
    assert said == [program.stdout[0], "argv ['c', 'd e'] blue = green"]
