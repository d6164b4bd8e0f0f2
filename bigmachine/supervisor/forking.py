"""What happens on both sides of a fork that makes a service process.

Two ways lead there. The supervisor forks and executes the program (`launch`), or process 0, which has done all the
imports, forks replicas of itself on the supervisor's order (`fork_replicas`). Such a replica is forked twice, so that
it becomes an orphan, which the kernel hands to the supervisor (a "child subreaper"): the supervisor is the parent of
every service process, learns of its death and its exit status, and every one of them dies with it.

Replicas by fork, and dying with the supervisor, are Linux's alone. Elsewhere a service process must end itself when its
control socket does.

This module is imported before process 0 is started, so it imports nothing that takes time.
"""

from __future__ import annotations

import ctypes  # 2 ms; needed between fork and exec, for the death signal.
import errno
import os
import sys
import time
import warnings

TYPE_CHECKING = False  # As mypy knows it; importing typing takes 5 ms.
if TYPE_CHECKING:
    from .control import ControlSocket, Message

CONTROL = "BIGMACHINE_CONTROL"
"""As in `control`, which is imported later."""

PROCESS = "BIGMACHINE_PROCESS"
"""The environment variable with a service process's number: 0 for the one that holds the services, else a replica."""

FDS_PER_REPLICA = 3
"""Control socket, stdout, stderr."""

LINUX = sys.platform == "linux"

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SIGKILL = 9
_ADOPTION = 10.0
"""Seconds within which the kernel must have given an orphan to the supervisor. It takes microseconds."""

_OOM_ADJUSTMENT = 100
"""Of 1000: when memory runs out the kernel should choose a service process, so that the supervisor can explain it."""


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")


def become_subreaper() -> bool:
    """Let this process inherit its orphaned descendants, instead of init. False where the system has no such thing."""
    if not LINUX:
        return False
    try:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    except OSError:
        return False  # A sandbox's kernel.
    return True


def die_with(supervisor: int) -> None:
    """Have this process killed when its parent, the supervisor, dies; end it at once where that has happened.

    The signal is sent when the parent *thread* ends, the one that forked; an adopted process counts as forked by the
    adopter's main thread. It is sent at every change of parent as well, so an orphan calls this after its adoption.
    """
    if LINUX:
        _prctl(_PR_SET_PDEATHSIG, _SIGKILL)
        if os.getppid() != supervisor:
            os._exit(1)


# -- Executing the program, by the supervisor --------------------------------------------------------------------------


class Program:
    """What a service process executes. `environ` is the whole environment, `cwd` the directory it starts in."""

    __slots__ = ("argv", "cwd", "environ")

    def __init__(self, argv: list[str], environ: dict[str, str], cwd: str) -> None:
        self.argv = argv
        self.environ = environ
        self.cwd = cwd

    def __repr__(self) -> str:
        return f"Program({self.argv!r}, {len(self.environ)} variables, {self.cwd!r})"


def environment(program: Program, process: int, control: int) -> dict[str, str]:
    """The environment of service process number `process`, whose control socket is descriptor `control`."""
    return {
        **program.environ,
        CONTROL: str(control),
        PROCESS: str(process),
        "PYTHONUNBUFFERED": "1",  # What it printed just before it crashed must have left it.
        "PYTHONFAULTHANDLER": "1",
    }


def exec_error(number: int, program: Program, in_directory: bool, exists: bool) -> OSError:
    """Why `program` could not be executed, as text that names what is missing; of OSError's subclass for `number`."""
    text = os.strerror(number)
    if in_directory:
        return OSError(number, f"cannot start {program.argv[0]} in its directory: {text}", program.cwd)
    if number == errno.ENOENT and exists:
        text = "the interpreter named in its first line does not exist"
    return OSError(number, f"cannot execute the program: {text}", program.argv[0])


def open_standard_streams() -> None:
    """Descriptors 0 to 2 must be taken, or a pipe of ours may get their number and be overwritten in the child."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def launch(program: Program, number: int, far: list[int], supervisor: int) -> int:
    """Fork and execute; `far` are the process's control socket, stdout and stderr. Returns when it is executing."""
    environ = environment(program, number, far[0])
    read, write = os.pipe()
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of a fork among threads. The child runs nothing but `_become`, which takes no lock.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
    except OSError:
        _close([read, write])
        raise
    if pid == 0:
        _become(program, environ, far, write, supervisor)
    os.close(write)
    with open(read, "rb") as pipe:
        report = pipe.read()
    if not report:
        return pid
    os.waitpid(pid, 0)
    stage, _, code = report.decode().partition(":")
    raise exec_error(int(code), program, stage == "chdir", os.path.exists(program.argv[0]))


def _become(program: Program, environ: dict[str, str], far: list[int], report: int, supervisor: int) -> None:
    """The child, from fork to exec: never returns. Says ``stage:errno`` on `report`, which closes itself at exec."""
    stage = "prepare"
    try:
        control, stdout, stderr = far
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        os.set_inheritable(control, True)
        close_others(control, report)
        die_with(supervisor)
        _offer_to_oom_killer()
        stage = "chdir"
        os.chdir(program.cwd)
        stage = "exec"
        os.execvpe(program.argv[0], program.argv, environ)
    except OSError as error:
        os.write(report, f"{stage}:{error.errno or errno.EIO}".encode())
    except BaseException:
        os.write(report, f"{stage}:{errno.EINVAL}".encode())
    finally:
        os._exit(127)


def close_others(*keep: int) -> None:
    """Close all but the standard streams and `keep`, say, the pipe with this machine's key; it need not be close-on-exec."""
    low = 3
    for fd in sorted(keep):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def _offer_to_oom_killer() -> None:
    if not LINUX:
        return
    try:
        fd = os.open("/proc/self/oom_score_adj", os.O_RDWR)  # Not `open`, which may import a codec.
        try:
            os.pwrite(fd, b"%d" % min(1000, int(os.pread(fd, 16, 0)) + _OOM_ADJUSTMENT), 0)
        finally:
            os.close(fd)
    except OSError:
        pass


# -- Forking replicas, by process 0 ------------------------------------------------------------------------------------


def single_threaded() -> bool:
    """May this process be forked? Counts the threads that the system knows, as libraries start some behind Python."""
    return LINUX and len(os.listdir("/proc/self/task")) == 1


def ready_message(process: int, digest: str = "") -> Message:
    """What a service process says to the supervisor when it has reached ``driver.start()``; `digest` is its program's."""
    ready = {"type": "ready", "process": process, "pid": os.getpid(), "single_threaded": single_threaded()}
    return {**ready, "digest": digest}


def fork_replicas(process: int, control: ControlSocket, message: Message, fds: list[int]) -> tuple[int, ControlSocket]:
    """Obey the supervisor's ``fork``, in process 0. Returns in every process: its number and its control socket.

    In process 0 these are the ones passed in, and the supervisor has been told of each replica, or why there is none.
    """
    for number, replica in enumerate(message["processes"]):
        start = number * FDS_PER_REPLICA
        own, others = fds[start : start + FDS_PER_REPLICA], fds[start + FDS_PER_REPLICA :]
        answer: Message = {"type": "forked", "process": replica}
        try:
            pid = _fork_orphan()
        except OSError as error:
            answer["error"] = f"process {process} could not fork replica {replica}: {error}"
        else:
            if pid == 0:
                control.abandon()
                _close(others)
                return replica, _become_replica(replica, message["supervisor"], own, control)
            answer["pid"] = pid
        control.send(answer)
        _close(own)
    return process, control


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _fork_orphan() -> int:
    """Fork a grandchild whose parent ends at once. Returns its pid; 0 in the grandchild. Raises `OSError`."""
    if not single_threaded():
        raise OSError("it has threads, and a lock that one of them holds would stay locked in the replica")
    _flush()
    read, write = os.pipe()
    try:
        child = os.fork()
    except OSError:
        _close([read, write])
        raise
    if child == 0:
        os.close(read)
        _fork_again(write)  # Only the grandchild comes back.
        os.close(write)
        return 0
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
        report = pipe.read()
    os.waitpid(child, 0)
    if not report.isdecimal():
        raise OSError(report or "the process between them was killed")
    return int(report)


def _fork_again(write: int) -> None:
    """The child between: fork, report the grandchild's pid, end. Returns in the grandchild only."""
    grandchild = -1
    try:
        grandchild = os.fork()
        if grandchild:
            os.write(write, str(grandchild).encode())
    except BaseException as error:
        os.write(write, f"{type(error).__name__}: {error}".encode())
    finally:
        if grandchild:
            os._exit(0)


def _flush() -> None:
    """Write what is buffered, Python's and C's: each replica would write it again."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    ctypes.CDLL(None).fflush(None)


def _become_replica(replica: int, supervisor: int, fds: list[int], inherited: ControlSocket) -> ControlSocket:
    """In the grandchild: its own group, output, parent and random numbers. Ends the process where that cannot be."""
    try:
        os.setpgid(0, 0)
        socket, stdout, stderr = fds
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        _close([stdout, stderr])
        _await_adoption(supervisor)
        die_with(supervisor)
        os.environ[PROCESS] = str(replica)
        _reseed()
        return inherited.from_fd(socket)
    except BaseException as error:
        os.write(2, f"bigmachine: replica {replica} could not start: {type(error).__name__}: {error}\n".encode())
        os._exit(1)


def _await_adoption(supervisor: int) -> None:
    """Wait until the process between has ended, and with it the change of parent."""
    between = os.getppid()
    deadline = time.monotonic() + _ADOPTION
    while (parent := os.getppid()) != supervisor:
        if parent != between or time.monotonic() > deadline:
            raise OSError(f"its parent is process {parent}, not the supervisor {supervisor}")
        time.sleep(0.0002)


def _reseed() -> None:
    """NumPy's global generator would yield the same numbers in every replica; `random` reseeds itself after a fork."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
