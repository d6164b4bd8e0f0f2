"""What must end well, though everything goes wrong: on real processes, each test with a deadline.

Drivers are programs of their own, as users write them: scripts that are executed here, and again by their machines. All
that a test starts carries its mark in the environment; whatever is left is found by that, and by nothing else.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bigmachine import State
from bigmachine.errors import BootError, MachineStopped, RemoteError
from bigmachine.machine import Machine
from bigmachine.session import Session
from bigmachine.system import Program
from bigmachine.systems.local import LocalLauncher
from bigmachine.testing.conformance import SOON, Cluster, eventually

MARK = "BIGMACHINE_TEST_MARK"

GONE_WITHIN = 15.0
"""Seconds after the driver's death within which nothing of its machines may be left."""

HEADER = """
import bigmachine, ctypes, os, sys, time
from bigmachine import State, driver

class Trouble:
    def setup(self, b): print("service is set up", flush=True)
    def pid(self): return os.getpid()
    def say(self, text): print(text)
    def hold(self, seconds): ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    def wait(self): print("waiting"); time.sleep(60)
    def flood(self, lines, width):
        for i in range(lines): print(f"line {i} of {os.getpid()} " + "x" * width)
    def last_words(self, lines):
        for i in range(lines): print(f"last {i}")
        print("without an end of line", end="", flush=True)
        os._exit(0)
    def unfinished(self): print("an unfinished line", end="")
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

    def __init__(self, directory: Path, body: str, *args: str, warnings: str = "error") -> None:
        self.mark = secrets.token_hex(8)
        script = directory / f"driver_{self.mark}.py"
        script.write_text(HEADER + textwrap.dedent(body))
        self.process = subprocess.Popen(
            [sys.executable, "-W", warnings, str(script), *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, MARK: self.mark, "PYTHONFAULTHANDLER": "1", "BIGMACHINE_SESSION_HTTP": "off"},
            start_new_session=True,
            text=True,
        )
        self.output: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._changed = threading.Condition()
        self._ended = 0
        self._readers = [threading.Thread(target=self._read, args=(name,), daemon=True) for name in self.output]
        for reader in self._readers:
            reader.start()

    def _read(self, name: str) -> None:
        with getattr(self.process, name) as stream:
            for line in stream:
                with self._changed:
                    self.output[name].append(line.rstrip("\n"))
                    self._changed.notify_all()
        with self._changed:
            self._ended += 1
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
            self._changed.wait_for(lambda: find() is not None or self._ended == len(self.output), within)
        line = find()
        if line is None:
            pytest.fail(f"no {text!r} within {within:g} s; {self.transcript()}")
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

    def start(body: str, *args: str, warnings: str = "error") -> Driver:
        drivers.append(Driver(tmp_path, body, *args, warnings=warnings))
        return drivers[-1]

    yield start
    for each in drivers:
        each.clean()


# -- The driver's end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forked", [False, True], ids=["holding the GIL", "forked"])
def test_a_driver_that_is_killed_leaves_nothing(run: Callable[..., Driver], forked: bool) -> None:
    program = run(
        """
        with driver.start(maxprocs=2) as b:
            idle, busy = machines = b.start(2, {"T": Trouble()})
            for m in machines: m.wait(State.RUNNING)
            if sys.argv[1] == "False":
                busy.submit("T.hold", 60)
                time.sleep(0.2)  # It begins to hold it; were it late, the test would only be easier.
            elif not os.fork():
                os.environ.clear()
                os.write(1, b"fork %d\\n" % os.getpid())
                time.sleep(30)
                os._exit(0)
            print("ready", flush=True)
            time.sleep(60)
        """,
        str(forked),
        warnings="ignore" if forked else "error",  # From 3.12 on Python warns of forks among threads.
    )
    program.await_line("ready")
    fork = int(program.await_line("fork").split()[1]) if forked else 0
    assert len(marked(program.mark)) >= 5
    program.process.kill()
    program.process.wait(SOON)
    try:
        eventually(lambda: {process.pid for process in marked(program.mark)} <= {fork}, "the end of all", GONE_WITHIN)
    finally:
        if fork:
            os.kill(fork, signal.SIGKILL)  # It is not one of ours, but was the driver's own.


@pytest.mark.parametrize("how", ["interrupt", "exception", "SIGTERM", "SIGHUP"])
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
            calls[0].result()
        """,
        how,
    )
    program.await_line("ready")
    if how == "interrupt":
        os.killpg(program.process.pid, signal.SIGINT)  # As a terminal does.
    elif how != "exception":
        program.process.send_signal(signal.Signals[how])
    code = program.end()
    codes = {"interrupt": -signal.SIGINT, "exception": 1, "SIGTERM": 143, "SIGHUP": 129}
    assert code == codes[how], program.transcript()
    assert not marked(program.mark)
    for i in range(500):
        assert sum(f": line {i} of " in line for line in program.stderr) == 2
    addressed = re.compile(r"https://localhost:\d+/m-[0-9a-f]{6}/: (line \d+ of \d+ x{10}|service is set up|waiting)")
    ours = [line for line in program.stderr if line.startswith("https://")]
    assert all(addressed.fullmatch(line) for line in ours), program.transcript()
    last = program.stderr[-1]
    assert ("KeyboardInterrupt" in last, "the driver's own" in last) == (how == "interrupt", how == "exception")


def test_signals_that_are_the_programs_own(run: Callable[..., Driver]) -> None:
    """A handler of the program's stays, and a fork dies of a signal as any process does."""
    program = run(
        """
        import signal
        signal.signal(signal.SIGHUP, lambda *_: print("heard", flush=True))
        with driver.start() as b:
            reader, writer = os.pipe()
            child = os.fork()
            if not child:
                os.write(writer, b"!")
                while True:
                    time.sleep(30)
            os.read(reader, 1)
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(child, signal.SIGTERM)
            print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        """,
        warnings="ignore",  # From 3.12 on Python warns of forks among threads.
    )
    program.await_line("heard")
    program.await_line(f"child -{int(signal.SIGTERM)}")
    assert program.end() == 0, program.transcript()


def test_a_session_that_is_not_shut_down_ends_with_the_program(run: Callable[..., Driver]) -> None:
    program = run(
        """
        b = driver.start()
        m, = b.start(1, {"T": Trouble()})
        m.call("T.say", "hello from afar")
        m.call("T.unfinished")
        print(m.state)
        """
    )
    assert program.end() == 0, program.transcript()
    assert program.stdout == ["RUNNING"]
    assert any(line.endswith(": hello from afar") for line in program.stderr), program.transcript()
    assert program.stderr[-1].endswith(": an unfinished line"), program.transcript()
    assert not [line for line in program.stderr if not line.startswith("https://")], program.transcript()
    assert not marked(program.mark)


def test_sessions_one_after_the_other_and_at_once(run: Callable[..., Driver]) -> None:
    program = run(
        """
        print("argv", sys.argv[1:], os.environ.get("COLOUR"))
        b, c = driver.start(), driver.start("local")
        (m,), (n,) = (
            b.start(1, {"T": Trouble()}),
            c.start(1, {"T": Trouble()}, args=["c", "d e"], environ={"COLOUR": "blue = green"}),
        )
        print(m.call("T.pid") != n.call("T.pid"), m.maxprocs)
        b.shutdown()
        print(n.call("T.pid") > 0)
        with driver.start() as d:
            print(d.start(1, {"T": Trouble()})[0].call("T.pid") > 0)
        c.shutdown()
        """,
        "a",
        "--bigm.maxprocs",
        "2",
        "b",
    )
    assert program.end() == 0, program.transcript()
    assert program.stdout == ["argv ['a', '--bigm.maxprocs', '2', 'b'] None", "True 2", "True", "True"]
    said = {line.partition("/: ")[2] for line in program.stderr if "argv" in line}
    assert said == {"argv ['a', '--bigm.maxprocs', '2', 'b'] None", "argv ['c', 'd e'] blue = green"}
    assert not marked(program.mark)


def test_a_fork_of_the_driver_that_ends_ends_no_machine(run: Callable[..., Driver]) -> None:
    program = run(
        """
        b = driver.start()
        with driver.start() as c:
            (m,), (n,) = b.start(1, {"T": Trouble()}), c.start(1, {"T": Trouble()})
            m.wait(); n.wait()
            fork = os.fork()
            if not fork:  # What the end of `with` and `atexit` do, and no more: this is a fork among threads.
                b.shutdown(), c.shutdown()
                os._exit(7)
            print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), m.call("T.pid") > 0, n.call("T.pid") > 0)
        """,
        warnings="ignore",
    )
    assert program.end() == 0, program.transcript()
    assert program.stdout == ["7 True True"]
    assert not marked(program.mark)


# -- The services' end ---------------------------------------------------------------------------------------------------


def trouble() -> Any:
    """A service that gets into trouble. Of a local class, so that it travels by value and machines need no pytest."""

    class Trouble:
        def setup(self, b: Session) -> None:
            self.session = b

        def pid(self) -> int:
            return os.getpid()

        def say(self, text: str) -> None:
            print(text)

        def wait(self) -> None:
            time.sleep(60)

        def segfault(self) -> None:
            print("about to go")
            ctypes.string_at(0)

        def exit(self, code: int) -> None:
            print("about to go")
            os._exit(code)

        def kill(self, number: int) -> None:
            print("about to go")
            os.kill(os.getpid(), number)
            time.sleep(60)

        def terminate(self) -> None:
            """As the kernel may: the signal goes to a thread that is not the main one."""
            print("about to go")
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            time.sleep(60)

        def terminate_child(self) -> int:
            ours, theirs = multiprocessing.Pipe()

            def child() -> None:
                theirs.send("here")
                time.sleep(60)

            process = multiprocessing.get_context("fork").Process(target=child)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # From 3.12 on, of forks among threads.
                process.start()
            ours.recv()
            process.terminate()
            process.join(10)
            return process.exitcode or 0

        def hold(self, seconds: float) -> float:
            """Keep the interpreter lock in C code."""
            ctypes.PyDLL(None).usleep(int(seconds * 1e6))
            return seconds

        def backtrack(self) -> None:
            """The same in a regular expression, for some seconds."""
            re.match(r"(a|a)*b", "a" * 26)

        def nothing(self, value: Any = None) -> Any:
            return value

        def nap(self, value: Any, seconds: float) -> Any:
            time.sleep(seconds)
            return value

        def relay(self, address: str, method: str, *args: Any) -> Any:
            return self.session.dial(address).call(method, *args)

        def fill(self, size: int) -> Any:
            return bytearray(size)

        def daemonise(self) -> int:
            """A grandchild in a session of its own, whose parent ends."""
            code = (
                "import os, time; os.setsid(); os.fork() and os._exit(0); "
                "print(os.getpid(), flush=True); os.dup2(2, 1); time.sleep(60)"
            )
            command = [sys.executable, "-c", code]
            return int(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=10).stdout)

    return Trouble()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(LocalLauncher(maxprocs=2))
    with cluster.session:
        yield cluster


@pytest.fixture(scope="module")
def bystander() -> Iterator[tuple[Cluster, Machine]]:
    """A cluster that several tests use, each for a machine of its own, and a machine that survives them all."""
    cluster = Cluster(LocalLauncher(maxprocs=2))
    with cluster.session:
        yield cluster, start(cluster)[0]
    assert_gone(cluster)


def start(cluster: Cluster, n: int = 1) -> list[Machine]:
    """Machines of a service ``T`` that gets into trouble, running."""
    machines = cluster.start(n, {"T": trouble()}, environ={MARK: cluster.authority.session})
    for machine in machines:
        machine.wait(State.RUNNING, 20.0)
    return machines


def assert_gone(cluster: Cluster) -> None:
    """None of the cluster's processes is left."""
    mark = cluster.authority.session
    eventually(lambda: not marked(mark), f"the end of {marked(mark)}")


@pytest.mark.parametrize(
    ("method", "args", "cause"),
    [
        ("T.segfault", (), r"service process 0 \(pid \d+\) was killed by SIGSEGV \(segmentation fault\)"),
        ("T.exit", (3,), r"service process 0 \(pid \d+\) exited with code 3"),
        ("T.terminate", (), r"service process 0 \(pid \d+\) exited with code 0"),
        ("T.kill", (signal.SIGKILL,), r"service process 0 \(pid \d+\) was killed by SIGKILL"),
    ],
    ids=["segmentation fault", "exit", "SIGTERM", "SIGKILL"],
)
def test_the_death_of_a_service_process_is_explained_at_once(
    bystander: tuple[Cluster, Machine], method: str, args: tuple[int, ...], cause: str
) -> None:
    cluster, other = bystander
    (machine,) = start(cluster)
    pending = [machine.submit("T.wait") for _ in range(3)]
    started = time.monotonic()
    fatal = machine.submit(method, *args)
    errors = [call.exception(SOON) for call in [fatal, *pending]]
    assert time.monotonic() - started < 1.0
    for error in errors:
        assert isinstance(error, MachineStopped)
        assert re.search(cause, str(error)), error
        assert "about to go" in str(error)
        assert machine.addr in str(error)
    if method == "T.segfault":
        assert "in segfault" in str(errors[0])  # By faulthandler.
    assert machine.state is State.STOPPED
    assert re.search(cause, str(machine.error))
    with pytest.raises(MachineStopped, match=cause):
        machine.call("T.nothing")
    assert other.call("T.nothing", 1) == 1


def test_a_signal_for_what_a_service_has_forked_is_not_the_services(bystander: tuple[Cluster, Machine]) -> None:
    assert bystander[1].call("T.terminate_child", timeout=SOON) == -signal.SIGTERM
    assert bystander[1].call("T.nothing", 1) == 1


def test_a_service_process_that_is_killed_while_nobody_calls(bystander: tuple[Cluster, Machine]) -> None:
    (machine,) = start(bystander[0])
    os.kill(machine.call("T.pid"), signal.SIGKILL)
    machine.wait(State.STOPPED, 1.0)
    assert "was killed by SIGKILL" in str(machine.error)
    with pytest.raises(MachineStopped, match="was killed by SIGKILL"):
        machine.wait(State.RUNNING)


def test_another_machine_is_told_how_the_one_that_it_called_died(bystander: tuple[Cluster, Machine]) -> None:
    cluster, asking = bystander
    (machine,) = start(cluster)
    assert asking.call("T.relay", machine.addr, "T.nothing", 7) == 7
    with pytest.raises(MachineStopped, match="exited with code 3"):
        asking.call("T.relay", machine.addr, "T.exit", 3)


def test_a_supervisor_that_is_killed_takes_all_with_it(bystander: tuple[Cluster, Machine]) -> None:
    cluster, other = bystander
    before = {process.pid for process in marked(cluster.authority.session)}
    (machine,) = start(cluster)
    pending = machine.submit("T.wait")
    os.kill(machine.info().pid, signal.SIGKILL)
    machine.wait(State.STOPPED, 2.0)
    assert re.search(r"its supervisor \(pid \d+\) was killed by signal 9", str(machine.error))
    with pytest.raises(MachineStopped):
        pending.result(1.0)
    assert other.call("T.nothing", 1) == 1
    eventually(lambda: {process.pid for process in marked(cluster.authority.session)} <= before, "the end of all")


def test_nothing_is_left_of_what_services_start(cluster: Cluster) -> None:
    ended, dead = start(cluster, 2)
    grandchildren = {machine.call("T.daemonise", timeout=SOON) for machine in (ended, dead)}
    assert grandchildren <= {process.pid for process in marked(cluster.authority.session)}
    with pytest.raises(MachineStopped):
        dead.call("T.exit", 3)
    dead.shutdown()
    ended.shutdown()
    assert not marked(cluster.authority.session)


# -- The program's end, before it serves ---------------------------------------------------------------------------------


PROGRAMS = {
    "raises": (
        "def load():\n    raise RuntimeError('no licence')\nload()",
        "exited with code 1",
        "in load\n    raise RuntimeError('no licence')\nRuntimeError: no licence",
    ),
    "import": ("import no_such", "exited with code 1", "ModuleNotFoundError: No module named 'no_such'"),
    "syntax": ("a syntax error", "exited with code 1", "SyntaxError"),
    "ends": ("print('nothing to do')", "exited with code 0", "nothing to do"),
    "exits": ("import sys; sys.exit('bye bye')", "exited with code 1", "bye bye"),
    "aborts": ("import os; print('x', flush=True); os.abort()", "was killed by SIGABRT", "x"),
    "no interpreter": ("", "cannot execute the program: No such file or directory: '/no/such/python'", ""),
    "no directory": ("", "No such file or directory: '/no/such/directory'", ""),
}
"""Programs that never reach `driver.start()`: the source, how the process ends, what it says."""


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Machine]]:
    """A machine for each of these programs, all started at once."""
    directory = tmp_path_factory.mktemp("programs")
    cluster = Cluster(LocalLauncher())
    assert cluster.session._fleet is not None
    machines = {}
    with cluster.session:
        for name, (source, _, _) in PROGRAMS.items():
            script = directory / f"{name}.py"
            script.write_text(source)
            cluster.session._fleet.program = Program(
                ("/no/such/python" if name == "no interpreter" else sys.executable, str(script)),
                cwd="/no/such/directory" if name == "no directory" else str(directory),
            )
            (machines[name],) = cluster.start(1, {"T": trouble()}, environ={MARK: cluster.authority.session})
        yield machines
    assert_gone(cluster)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_ends_before_driver_start(broken: dict[str, Machine], name: str) -> None:
    _, reason, output = PROGRAMS[name]
    with pytest.raises(BootError) as caught:
        broken[name].wait(State.RUNNING, 20.0)
    error = caught.value
    assert reason in str(error)
    assert output in error.output
    assert output in str(error)
    if not name.startswith("no "):
        assert error.step == "exec"
        assert reason in error.reason
    assert error.elapsed < SOON
    with pytest.raises(MachineStopped, match="failed at boot step"):
        broken[name].call("T.nothing")


def test_a_program_that_only_fails_on_machines_says_so_at_the_driver(run: Callable[..., Driver]) -> None:
    program = run(
        """
        if "BIGMACHINE_CONTROL" in os.environ: raise ValueError("not on a machine")
        with driver.start() as b:
            m, = b.start(1, {"T": Trouble()})
            m.wait(State.RUNNING)
        """
    )
    assert program.end(10.0) == 1
    assert program.stderr[-1] == "ValueError: not on a machine"
    assert any("BootError: machine https://localhost:" in line and "'exec'" in line for line in program.stderr)
    assert not marked(program.mark)


def bad_setup(how: str) -> Any:
    class Bad:
        def setup(self, b: Session) -> None:
            print("setting up")
            if how == "raises":
                raise LookupError("no model")
            if how == "exits":
                sys.exit("cannot go on")
            if how == "dies":
                os._exit(9)
            print("hanging")
            time.sleep(60)

    return Bad()


def test_setups_that_go_wrong(cluster: Cluster) -> None:
    mark = {MARK: cluster.authority.session}
    ways = ("raises", "exits", "dies", "hangs")
    raises, exits, dies, hangs = (cluster.start(1, {"Bad": bad_setup(how)}, environ=mark)[0] for how in ways)
    with pytest.raises(LookupError, match="no model"):
        raises.wait(State.RUNNING, SOON)
    with pytest.raises(RemoteError, match="SystemExit: cannot go on"):
        exits.wait(State.RUNNING, SOON)
    with pytest.raises(BootError, match=r"boot step 'setup' .* exited with code 9(.|\n)*setting up"):
        dies.wait(State.RUNNING, SOON)
    eventually(lambda: f"{hangs.addr}: hanging" in cluster.output.getvalue(), "the last setup")
    assert hangs.state is State.STARTING
    started = time.monotonic()
    cluster.session.shutdown()
    assert time.monotonic() - started < SOON
    assert not marked(cluster.authority.session)


# -- Ports ---------------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cluster = Cluster(LocalLauncher(port=port))
        with cluster.session:
            (machine,) = cluster.start()
            with pytest.raises(BootError, match=f"port {port} is taken") as caught:
                machine.wait(State.RUNNING, SOON)
            assert caught.value.step == "launch"


# -- Leases --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def leased() -> Iterator[tuple[Machine, Machine, Machine]]:
    """Machines with a lease of a second: in one the interpreter lock is held, one is not kept alive, one is suspended."""
    cluster = Cluster(LocalLauncher(), lease=1.0)
    with cluster.session:
        busy, silent, suspended = start(cluster, 3)
        eventually(lambda: silent.keepalive_reply_times, "a keepalive")
        busy.pending = busy.submit("T.hold", 2.5)  # type: ignore[attr-defined]
        cluster.session._owned[1]._keepalive.stop()
        suspended.pending = suspended.submit("T.wait")  # type: ignore[attr-defined]
        supervisor = psutil.Process(suspended.info().pid)
        supervisor.suspend()
        try:
            yield busy, silent, suspended
        finally:
            if supervisor.is_running():
                supervisor.resume()
    assert_gone(cluster)


def test_a_service_that_holds_the_interpreter_lock_keeps_its_machine(leased: tuple[Machine, ...]) -> None:
    machine = leased[0]
    assert machine.pending.result(10.0) == 2.5  # type: ignore[attr-defined]
    assert machine.state is State.RUNNING
    assert max(machine.keepalive_reply_times) < 1.0
    assert machine.call("T.nothing", 5) == 5


def test_a_machine_whose_driver_is_silent_ends_itself(leased: tuple[Machine, ...]) -> None:
    machine = leased[1]
    machine.wait(State.STOPPED, 8.0)
    assert "no keepalive from the driver for" in str(machine.error)


def test_a_supervisor_that_does_not_answer_is_given_up(leased: tuple[Machine, ...]) -> None:
    machine = leased[2]
    machine.wait(State.STOPPED, 8.0)
    assert "no keepalive reply" in str(machine.error)
    with pytest.raises(MachineStopped, match="no keepalive reply"):
        machine.pending.result(1.0)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("BIGMACHINE_SLOW"), reason="takes 60 s: BIGMACHINE_SLOW=1"
)
def test_a_service_that_holds_the_interpreter_lock_for_a_minute() -> None:
    cluster = Cluster(LocalLauncher(), lease=10.0)
    with cluster.session:
        (machine,) = start(cluster)
        assert machine.call("T.hold", 60) == 60
        assert machine.state is State.RUNNING


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("BIGMACHINE_SLOW"), reason="takes some seconds: BIGMACHINE_SLOW=1")
def test_a_service_that_holds_the_interpreter_lock_by_backtracking() -> None:
    cluster = Cluster(LocalLauncher(), lease=1.0)
    with cluster.session:
        (machine,) = start(cluster)
        started = time.monotonic()
        machine.call("T.backtrack")
        assert time.monotonic() - started > 2.0
        assert machine.state is State.RUNNING


# -- Load ----------------------------------------------------------------------------------------------------------------


def test_ten_thousand_calls_at_once(bystander: tuple[Cluster, Machine]) -> None:
    machine = bystander[1]
    before = psutil.Process().memory_info().rss
    calls = [machine.submit("T.nothing", i) for i in range(10_000)]
    assert [call.result(30.0) for call in calls] == list(range(10_000))
    assert psutil.Process().memory_info().rss - before < 200 << 20


def test_many_calls_that_take_long(bystander: tuple[Cluster, Machine]) -> None:
    """They run at the same time, on threads that are started as they are needed."""
    calls = [bystander[1].submit("T.nap", i, 0.05) for i in range(100)]
    assert [call.result(30.0) for call in calls] == list(range(100))


def test_a_reply_of_a_gibibyte(bystander: tuple[Cluster, Machine]) -> None:
    available = psutil.virtual_memory().available
    if available < 6 << 30:
        pytest.skip(f"needs 6 GiB of memory; {available / (1 << 30):.1f} GiB are available")
    machine = bystander[1]
    reply = machine.call("T.fill", 1 << 30, timeout=40.0)
    assert len(reply) == 1 << 30
    assert reply[0] == reply[-1] == 0
    assert machine.call("T.nothing", 1) == 1


# -- Output --------------------------------------------------------------------------------------------------------------


def test_lines_of_several_processes_stay_whole(run: Callable[..., Driver]) -> None:
    program = run(
        """
        class Noisy(Trouble):
            @bigmachine.parallel
            def noise(self, lines): self.flood(lines, 300)

        with driver.start(maxprocs=2) as b:
            machines = b.start(2, {"T": Noisy()})
            calls = [m.submit("T.noise", 500) for m in machines for _ in range(3)]
            for call in calls: call.result()
        """
    )
    assert program.end() == 0, program.transcript()
    whole = re.compile(r"https://localhost:\d+/m-[0-9a-f]{6}/: line \d+ of \d+ x{300}")
    lines = [line for line in program.stderr if "service is set up" not in line]
    assert [line for line in lines if not whole.fullmatch(line)] == []
    assert len(lines) == 3000


def test_all_output_arrives(run: Callable[..., Driver]) -> None:
    """50 MB, which neither the machine nor the driver may keep; then 10,000 lines right before a process's end."""
    program = run(
        """
        import psutil

        with driver.start() as b:
            m, = b.start(1, {"T": Trouble()})
            m.wait()
            supervisor = m.info().pid
            m.call("T.flood", 25_000, 2000)
            print(max(psutil.Process(pid).memory_info().rss for pid in (os.getpid(), supervisor)) < 120 << 20)
            try: m.call("T.last_words", 10_000)
            except bigmachine.errors.MachineStopped as error: print("exited with code 0" in str(error))
        """
    )
    assert program.end(30.0) == 0, program.transcript()[:2000]
    assert program.stdout == ["True", "True"]
    said = [line.partition("/: ")[2] for line in program.stderr]
    assert sum(line.startswith("line ") for line in said) == 25_000
    assert [line for line in said if line.startswith("last ")] == [f"last {i}" for i in range(10_000)]
    assert said[-1] == "without an end of line"
