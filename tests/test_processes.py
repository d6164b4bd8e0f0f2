"""Service processes, with real ones: how they start, die, multiply, and are gone.

The supervisor's side runs in a script of its own: pytest must neither become a subreaper nor fork among threads. A
script tells what it saw as JSON, one object a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bigmachine.supervisor.forking import Program, environment, exec_error
from bigmachine.supervisor.processes import below, parse_stat

ROOT = Path(__file__).parent.parent
DEADLINE = 20.0

linux = pytest.mark.skipif(sys.platform != "linux", reason="replicas by fork and death signals are Linux's")

SUPERVISOR = """
import os, sys
from bigmachine.supervisor.processes import Processes, Program
processes = Processes(Program([sys.executable, "-W", "error", sys.argv[1]], dict(os.environ), os.getcwd()))
processes.start()
import json, queue, signal, subprocess, threading, time
from bigmachine.rpc.reactor import reactor
from bigmachine.supervisor import processes as module
from bigmachine.supervisor.output import OutputCapture

messages, deaths = queue.Queue(), queue.Queue()
output = OutputCapture(reactor())

def attach():
    processes.attach(reactor(), output, lambda *message: messages.put(message), deaths.put)

def message():
    return messages.get(timeout=15)

def ready(number=0):
    sender, found, fds = message()
    assert (sender, found["type"], found["process"]) == (number, "ready", number), (sender, found)
    return found

def death():
    return deaths.get(timeout=15)

def say(**facts):
    print(json.dumps(facts), flush=True)

def eventually(condition):
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.002)

def written(process):
    '''All that a process wrote until its end, after `output.close`.'''
    while (outputs := output.read(0)):
        everything.extend(outputs)
    return b"".join(o.data for o in everything if o.process == process).decode()

everything = []
"""

PROGRAM = """
import os, signal, sys, threading, time
from bigmachine.supervisor.control import ControlSocket
from bigmachine.supervisor.forking import fork_replicas, ready_message

def start():
    '''What driver.start() does on a machine, without services.'''
    control = ControlSocket.from_environment()
    number = int(os.environ["BIGMACHINE_PROCESS"])
    control.send(ready_message(number))
    while (found := control.receive()) is not None:
        order, fds = found
        if order["type"] == "fork":
            was = number
            number, control = fork_replicas(number, control, order, fds)
            if number != was:
                control.send(ready_message(number))
        else:
            return number, control, order, fds
    sys.exit("the supervisor is gone")
"""


class Script:
    """A supervisor's script, started."""

    def __init__(self, directory: Path, program: str, supervisor: str) -> None:
        (directory / "program.py").write_text(PROGRAM + textwrap.dedent(program))
        (directory / "supervisor.py").write_text(SUPERVISOR + textwrap.dedent(supervisor))
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "supervisor.py", "program.py"],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate(timeout=DEADLINE)[1]
        return dict(json.loads(line))

    def facts(self) -> dict[str, Any]:
        """All that it says until it ends, in one dictionary."""
        stdout, stderr = self.process.communicate(timeout=DEADLINE)
        assert self.process.returncode == 0, stderr
        assert stderr == ""
        return {key: value for line in stdout.splitlines() for key, value in json.loads(line).items()}

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)

    def end(self) -> None:
        self.kill()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[[str, str], Script]]:
    with contextlib.ExitStack() as stack:

        def make(program: str, supervisor: str) -> Script:
            made = Script(tmp_path, program, supervisor)
            stack.callback(made.end)
            return made

        yield make


Make = Callable[[str, str], Script]


def lives(pid: int) -> bool:
    """False also for a zombie: whoever adopted it may be slow to reap."""
    try:
        found = parse_stat(Path(f"/proc/{pid}/stat").read_text())
    except OSError:
        return False
    return found is not None and not found[2]


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.005)


# -- Pure --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("4711 (python) S 1 4711 4700 0 -1 4194560", (1, 4711, False)),
        ("12 (evil ) Z 9) (x) Z 3 4 5", (3, 4, True)),
        ("12 (gone) X 3 4 5", (3, 4, True)),
        ("", None),
    ],
)
def test_stat(text: str, parsed: tuple[int, int, bool] | None) -> None:
    assert parse_stat(text) == parsed


def test_descendants_in_a_table() -> None:
    table = {1: (0, 1, False), 2: (1, 2, False), 3: (2, 2, True), 4: (3, 4, False), 5: (1, 5, False), 6: (99, 6, False)}
    assert [(found.pid, found.group, found.zombie) for found in below(2, table)] == [(3, 2, True), (4, 4, False)]
    assert [found.pid for found in below(1, table)] == [2, 5, 3, 4]
    assert below(6, table) == []


def test_environment_keeps_the_users_but_for_ours() -> None:
    program = Program(["app"], {"HOME": "/h", "PYTHONUNBUFFERED": "", "BIGMACHINE_PROCESS": "9"}, "/")
    assert environment(program, 2, 7) == {
        "HOME": "/h",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "BIGMACHINE_CONTROL": "7",
        "BIGMACHINE_PROCESS": "2",
    }


def test_exec_error_names_what_is_missing() -> None:
    program = Program(["/no/app"], {}, "/no/dir")
    missing = exec_error(2, program, in_directory=False, exists=False)
    assert isinstance(missing, FileNotFoundError)
    assert str(missing) == "[Errno 2] cannot execute the program: No such file or directory: '/no/app'"
    interpreter = exec_error(2, program, in_directory=False, exists=True)
    assert "the interpreter named in its first line does not exist: '/no/app'" in str(interpreter)
    directory = exec_error(2, program, in_directory=True, exists=False)
    assert str(directory) == "[Errno 2] cannot start /no/app in its directory: No such file or directory: '/no/dir'"


# -- Starting ----------------------------------------------------------------------------------------------------------


def test_importing_it_is_light() -> None:
    code = """
        import sys, bigmachine, bigmachine.supervisor
        before = set(sys.modules)
        import bigmachine.supervisor.processes
        heavy = {"socket", "json", "signal", "dataclasses", "typing", "re", "enum", "ssl", "h2", "psutil", "asyncio"}
        print(sorted(heavy & (set(sys.modules) - before)))
    """
    outcome = subprocess.run(
        [sys.executable, "-S", "-c", textwrap.dedent(code)],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert outcome.stdout == "[]\n"


def test_process_0_has_what_it_needs_and_nothing_else(script: Make) -> None:
    facts = script(
        """
        fds = sorted(int(name) for name in os.listdir("/dev/fd"))
        mine = int(os.environ["BIGMACHINE_CONTROL"])
        control = ControlSocket.from_environment()
        control.send({
            "type": "facts", "stdin": sys.stdin.read(), "leader": os.getpgrp() == os.getpid(),
            "open": [fd for fd in fds if fd > 2 and fd != mine], "unbuffered": os.environ["PYTHONUNBUFFERED"],
            "left": "BIGMACHINE_CONTROL" in os.environ, "process": os.environ["BIGMACHINE_PROCESS"],
        })
        """,
        """
        attach()
        say(**message()[1])
        death()
        processes.stop()
        """,
    ).facts()
    assert len(facts.pop("open")) <= 1  # The descriptor with which the directory itself was read.
    assert facts == {
        "type": "facts",
        "stdin": "",
        "leader": True,
        "unbuffered": "1",
        "left": False,
        "process": "0",
    }


def test_inherited_descriptors_end_at_the_supervisor(tmp_path: Path) -> None:
    """A local machine gets its key over an inherited pipe."""
    (tmp_path / "p.py").write_text("import os\ntry:\n os.fstat(50)\nexcept OSError: os._exit(7)\n")
    (tmp_path / "s.py").write_text(
        "import os, sys\nos.dup2(0, 50)\n" + SUPERVISOR + "attach(); say(code=death().code); processes.stop()"
    )
    outcome = subprocess.run(
        [sys.executable, "s.py", "p.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (outcome.stdout, outcome.stderr) == ('{"code": 7}\n', "")


def test_program_that_cannot_be_executed(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("#!/no/such/python\n")
    bad.chmod(bad.stat().st_mode | stat.S_IXUSR)
    code = """
        import os, sys
        from bigmachine.supervisor.processes import Processes, Program
        for path, cwd in [("/no/such/app", "."), (sys.argv[1], "."), (sys.executable, "/no/dir"), ("/etc", ".")]:
            try:
                Processes(Program([path], {}, cwd)).start()
            except OSError as error:
                print(type(error).__name__, error)
        try:
            print(os.waitpid(-1, os.WNOHANG))
        except ChildProcessError:
            print("no child is left", len(os.listdir("/dev/fd")))
    """
    outcome = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(bad)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert outcome.stderr == ""
    lines = outcome.stdout.splitlines()
    assert (
        lines[0] == "FileNotFoundError [Errno 2] cannot execute the program: No such file or directory: '/no/such/app'"
    )
    assert lines[1] == (
        "FileNotFoundError [Errno 2] cannot execute the program: "
        f"the interpreter named in its first line does not exist: '{bad}'"
    )
    assert lines[2].endswith(f"cannot start {sys.executable} in its directory: No such file or directory: '/no/dir'")
    assert lines[3] == "PermissionError [Errno 13] cannot execute the program: Permission denied: '/etc'"
    assert lines[4] == "no child is left 4"


def test_messages_with_descriptors_both_ways(script: Make) -> None:
    facts = script(
        """
        number, control, order, fds = start()
        read, write = os.pipe()
        os.write(write, os.read(fds[0], 100).upper())
        control.send({"type": "answer", "to": order["type"]}, [read])
        control.receive()
        """,
        """
        attach()
        ready()
        read, write = os.pipe()
        os.write(write, b"payload")
        processes.send(0, {"type": "connection"}, [read])
        sender, answer, fds = message()
        say(sender=sender, answer=answer, payload=os.read(fds[0], 100).decode(), survivors=processes.stop(0))
        """,
    ).facts()
    assert facts == {
        "sender": 0,
        "answer": {"type": "answer", "to": "connection"},
        "payload": "PAYLOAD",
        "survivors": [],
    }


# -- Dying -------------------------------------------------------------------------------------------------------------

DEATHS = [
    ("import ctypes; ctypes.string_at(0)", "was killed by SIGSEGV (segmentation fault)", "Segmentation fault"),
    ("os._exit(3)", "exited with code 3", ""),
    ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL", ""),
    ("raise RuntimeError('out of luck')", "exited with code 1", "RuntimeError: out of luck"),
]


@pytest.mark.parametrize(("statement", "how", "last"), DEATHS)
def test_death_is_explained_with_the_last_output(script: Make, statement: str, how: str, last: str) -> None:
    facts = script(
        f"sys.stdout.write('its last words'); {statement}",
        """
        attach()
        found = death()
        say(summary=found.summary(), output=found.last_output, when=found.when, pids=processes.pids(), pid=found.pid)
        output.close()
        say(written=written(0), deaths=len(processes.deaths), survivors=processes.stop())
        """,
    ).facts()
    assert facts["summary"] == f"service process 0 (pid {facts['pid']}) {how}"
    for text in (facts["output"], facts["written"]):
        assert "its last words" in text
        assert last in text
    assert 0 < facts["when"] < DEADLINE
    assert (facts["pids"], facts["deaths"], facts["survivors"]) == ({}, 1, [])


def test_death_before_anybody_listens(script: Make) -> None:
    facts = script(
        "print('too early'); os._exit(4)",
        """
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        attach()
        found = death()
        say(code=found.code, output=found.last_output)
        processes.stop()
        """,
    ).facts()
    assert facts == {"code": 4, "output": "too early\n"}


def test_death_is_noticed_without_pidfds(script: Make) -> None:
    facts = script(
        "start(); os._exit(5)",
        """
        os.__dict__.pop("pidfd_open", None)
        attach()
        ready()
        processes.send(0, {"type": "end"})
        say(code=death().code, survivors=processes.stop())
        """,
    ).facts()
    assert facts == {"code": 5, "survivors": []}


def test_what_is_no_control_message_is_a_failure(script: Make) -> None:
    facts = script(
        "control = ControlSocket.from_environment(); os.write(control.fileno(), b'\\xff' * 9); time.sleep(60)",
        """
        attach()
        say(failed=message()[1])
        processes.stop(0)
        """,
    ).facts()
    assert facts["failed"]["type"] == "failed"
    assert "announced 4294967295" in facts["failed"]["error"]


@linux
@pytest.mark.parametrize("stuck", ["ctypes.PyDLL(None).sleep(60)", "time.sleep(60)"])
def test_service_processes_die_with_the_supervisor(script: Make, stuck: str) -> None:
    """Process 0 (in a C call that holds the interpreter lock, too), a forked replica and an executed one."""
    supervisor = script(
        f"""
        import ctypes
        number, control, order, fds = start()
        control.send({{"type": "stuck"}})
        {stuck}
        """,
        """
        attach()
        ready()
        processes.fork_replicas(2)
        ready(1)
        processes.exec_replicas([2])
        ready(2)
        for number in range(3):
            processes.send(number, {"type": "go"})
        assert {message()[1]["type"] for _ in range(3)} == {"stuck"}
        say(pids=list(processes.pids().values()))
        time.sleep(60)
        """,
    )
    pids = supervisor.line()["pids"]
    assert len(pids) == 3
    assert all(lives(pid) for pid in pids)
    supervisor.kill()
    eventually(lambda: not any(lives(pid) for pid in pids))


# -- Replicas ----------------------------------------------------------------------------------------------------------

REPLICAS = """
    attach()
    single_threaded = ready()["single_threaded"]
    ORDER
    found = [message() for _ in range(2)]
    assert {f[1]["type"] for f in found} == {"ready"}, found
    say(single_threaded=single_threaded, ready=sorted(f[0] for f in found))
    pids = processes.pids()
    say(pids=pids, told={str(f[1]["process"]): f[1]["pid"] for f in found})
    for number in range(3):
        processes.send(number, {"type": "end"})
    ends = sorted((death() for _ in range(3)), key=lambda end: end.process)
    say(codes=[end.code for end in ends], ends=[end.last_output for end in ends], me=os.getpid())
    output.close()
    say(written=[written(number) for number in range(3)], survivors=processes.stop())
"""

MEMBER = """
    print("imported", end=" "); sys.stdout.flush()
    THREADS
    number, *_ = start()
    print("I am", number, os.environ["BIGMACHINE_PROCESS"], os.getppid(), os.getpgrp() == os.getpid(), end="")
    sys.stderr.write("!")
    os._exit(10 + number)
"""

THREAD = "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"


def check_replicas(facts: dict[str, Any], imports: list[str]) -> None:
    assert facts["ready"] == [1, 2]
    assert {number: facts["pids"][number] for number in ("1", "2")} == facts["told"]
    assert len(set(facts["pids"].values())) == 3
    assert facts["codes"] == [10, 11, 12]
    for number in range(3):
        said = f"{imports[number]}I am {number} {number} {facts['me']} True"
        assert sorted(facts["written"][number]) == sorted(said + "!")
        assert said in facts["ends"][number].replace("!", "")
    assert facts["survivors"] == []


@linux
def test_replicas_by_fork(script: Make) -> None:
    order = "processes.start_replicas(3, single_threaded)"
    facts = script(MEMBER.replace("THREADS", "pass"), REPLICAS.replace("ORDER", order)).facts()
    assert facts["single_threaded"] is True
    check_replicas(facts, ["imported ", "", ""])


def test_replicas_by_execution(script: Make) -> None:
    order = "processes.start_replicas(3, single_threaded)"
    facts = script(MEMBER.replace("THREADS", THREAD), REPLICAS.replace("ORDER", order)).facts()
    assert facts["single_threaded"] is False
    check_replicas(facts, ["imported "] * 3)


@linux
def test_replicas_that_cannot_be_forked_are_executed(script: Make) -> None:
    order = "processes.fork_replicas(3)"
    facts = script(MEMBER.replace("THREADS", THREAD), REPLICAS.replace("ORDER", order)).facts()
    check_replicas(facts, ["imported "] * 3)


@linux
def test_many_replicas_by_fork(script: Make) -> None:
    """More than one control message can order."""
    facts = script(
        "start(); time.sleep(60)",
        """
        attach()
        ready()
        processes.fork_replicas(40)
        numbers = sorted(message()[0] for _ in range(39))
        say(numbers=numbers, pids=len(processes.pids()), survivors=processes.stop(1), deaths=len(processes.deaths))
        """,
    ).facts()
    assert facts == {"numbers": list(range(1, 40)), "pids": 40, "survivors": [], "deaths": 40}


@linux
def test_replicas_have_random_numbers_of_their_own(script: Make) -> None:
    facts = script(
        """
        import numpy, random
        number, control, *_ = start()
        control.send({"type": "drawn", "numbers": [random.random(), float(numpy.random.random())]})
        control.receive()
        """,
        """
        attach()
        ready()
        processes.fork_replicas(3)
        ready_ones = [message() for _ in range(2)]
        for number in range(3):
            processes.send(number, {"type": "go"})
        say(drawn=[message()[1]["numbers"] for _ in range(3)])
        processes.stop(0)
        """,
    ).facts()
    assert len({first for first, _ in facts["drawn"]}) == 3
    assert len({second for _, second in facts["drawn"]}) == 3


@linux
def test_process_0_dies_while_it_should_fork(script: Make) -> None:
    facts = script(
        """
        control = ControlSocket.from_environment()
        control.send(ready_message(0))
        control.receive()
        os._exit(6)
        """,
        """
        attach()
        ready()
        processes.fork_replicas(3)
        say(code=death().code, forking=len(processes._forking), survivors=processes.stop())
        """,
    ).facts()
    assert facts == {"code": 6, "forking": 0, "survivors": []}


def test_replica_that_cannot_be_executed(script: Make) -> None:
    facts = script(
        "start()",
        """
        attach()
        ready()
        processes._program.argv = ["/no/such/app"]
        try:
            processes.exec_replicas([1, 2])
        except FileNotFoundError as error:
            say(error=str(error), pids=list(processes.pids()))
        processes.stop(0)
        """,
    ).facts()
    assert "cannot execute the program" in facts["error"]
    assert facts["pids"] == [0]


# -- Stopping ----------------------------------------------------------------------------------------------------------


def test_stop_lets_a_service_say_goodbye(script: Make) -> None:
    facts = script(
        """
        def goodbye(*_):
            print("goodbye")
            os._exit(9)
        signal.signal(signal.SIGTERM, goodbye)
        start()
        """,
        """
        attach()
        ready()
        say(survivors=processes.stop(10), code=death().code)
        output.close()
        say(written=written(0))
        """,
    ).facts()
    assert facts == {"survivors": [], "code": 9, "written": "goodbye\n"}


def test_stop_kills_who_ignores_it(script: Make) -> None:
    facts = script(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); start()",
        """
        attach()
        ready()
        say(survivors=processes.stop(0.05), signal=death().signal)
        try:
            processes.send(0, {"type": "anything"})
        except BrokenPipeError as error:
            say(error=error.strerror)
        """,
    ).facts()
    assert facts == {"survivors": [], "signal": signal.SIGKILL, "error": "service process 0 is not running"}


def test_stop_before_anybody_listens(script: Make) -> None:
    facts = script("start()", "say(survivors=processes.stop(), deaths=[d.signal for d in processes.deaths])").facts()
    assert facts == {"survivors": [], "deaths": [signal.SIGTERM]}


DAEMONS = """
    import subprocess
    def daemon(code):
        '''A grandchild in a session of its own, whose parent is gone.'''
        read, write = os.pipe()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.write(write, str(os.getpid()).encode())
                os.close(write)
                exec(code)
            os._exit(0)
        os.close(write)
        os.wait()
        return int(os.read(read, 100))
"""


@linux
def test_stop_finds_detached_grandchildren(script: Make) -> None:
    facts = script(
        DAEMONS
        + """
    pids = [daemon("time.sleep(60)"), daemon("os.fork(); time.sleep(60)")]
    pids.append(subprocess.Popen(["sleep", "60"]).pid)
    pids.append(subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 60; sleep 60"], start_new_session=True).pid)
    number, control, *_ = start()
    control.send({"type": "pids", "pids": pids})
    control.receive()
    """,
        """
        attach()
        ready()
        processes.send(0, {"type": "go"})
        say(pids=message()[1]["pids"])
        say(survivors=processes.stop(10), left=len(module.descendants(os.getpid())))
        """,
    ).facts()
    assert len(facts["pids"]) == 4
    assert facts["survivors"] == []
    assert facts["left"] == 0
    assert not any(lives(pid) for pid in facts["pids"])


@linux
def test_zombies_of_daemons_are_reaped_and_nobody_elses(script: Make) -> None:
    facts = script(
        DAEMONS
        + """
    number, control, *_ = start()
    control.send({"type": "pids", "pids": [daemon("os._exit(1)") for _ in range(20)]})
    control.receive()
    """,
        """
        module.SWEEP = 0.005
        attach()
        ready()
        mine = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
        processes.send(0, {"type": "go"})
        pids = message()[1]["pids"]
        os.waitid(os.P_PID, mine.pid, os.WEXITED | os.WNOWAIT)
        processes._reap()
        say(mine=mine.wait())
        eventually(lambda: not {found.pid for found in module.descendants(os.getpid())} & set(pids))
        say(daemons=len(pids), alive=list(processes.pids()))
        processes.stop(0)
        """,
    ).facts()
    assert facts == {"mine": 7, "daemons": 20, "alive": [0]}


@linux
def test_death_is_noticed_behind_a_zombie_that_is_not_ours(script: Make) -> None:
    facts = script(
        "start(); os._exit(8)",
        """
        attach()
        ready()
        mine = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
        os.waitid(os.P_PID, mine.pid, os.WEXITED | os.WNOWAIT)
        processes.send(0, {"type": "end"})
        say(code=death().code, mine=mine.wait())
        processes.stop(0)
        """,
    ).facts()
    assert facts == {"code": 8, "mine": 7}
