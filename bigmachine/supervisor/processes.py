"""The service processes of a machine: starting them, noticing their death, and leaving none of them behind.

Theory of operation
-------------------
The supervisor calls `start` as the very first thing it does: process 0 then imports the user's program while the
supervisor imports its own modules. Hence this module must be cheap to import (no socket, json, signal, dataclasses:
together 30 ms), and what it needs after that is imported in `attach`, which connects it with the reactor.

Rule 1. A service process leads a process group of its own, and dies with the supervisor (Linux: parent-death signal, so
even while a C extension holds the interpreter lock). Its pipes, control socket and environment are its own.
Rule 2. The supervisor is a child subreaper: whatever a service starts remains its descendant, in whatever session. So
`stop` can find and kill all, and there is proof that nothing is left: a subreaper without children has no descendants.
Rule 3. Reaped are service processes, and children that were adopted. A child in the supervisor's own process group was
started by the supervisor itself (``subprocess``), and is its starter's to wait for.
Rule 4. The thread that forks a service process lives as long as that process may: the kernel takes the end of that
*thread* for the death of the parent. So `start` belongs on the main thread; `exec_replicas` forks on one that stays.

Where there is no subreaper (macOS), processes that a service detaches into sessions of their own are found only as long
as their parents live: `stop` looks for them before it kills.
"""

from __future__ import annotations

import _socket  # The C half of socket, for one call: socket itself takes 7 ms (enumerations), and is imported later.
import errno
import os
import threading
import time

from . import forking
from .forking import Program

TYPE_CHECKING = False  # As mypy knows it; importing typing takes 5 ms.
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ..rpc.reactor import Reactor, Watch
    from .control import ControlSocket, Message
    from .death import Death, OomWatch
    from .output import OutputCapture

SIGKILL = 9
SIGTERM = 15

SWEEP = 1.0
"""Seconds between two looks for adopted children that have ended. Their zombies cost a process number each, no more."""

GRACE = 5.0
"""Seconds that services have between SIGTERM and SIGKILL, unless `stop` is told otherwise."""

KILL_LIMIT = 5.0
"""Seconds within which killed processes must be gone. Who is stuck in the kernel (a dead NFS server) takes longer."""

BATCH = 32
"""Replicas ordered with one control message (see `control.MAX_FDS`)."""


class Relative:
    """A descendant of the supervisor."""

    __slots__ = ("group", "pid", "zombie")

    def __init__(self, pid: int, group: int, zombie: bool) -> None:
        self.pid = pid
        self.group = group
        self.zombie = zombie


def parse_stat(text: str) -> tuple[int, int, bool] | None:
    """Parent, process group and "is a zombie" from ``/proc/<pid>/stat``. The name in parentheses may hold anything."""
    fields = text[text.rfind(")") + 2 :].split()
    if len(fields) < 3:
        return None
    return int(fields[1]), int(fields[2]), fields[0] in ("Z", "X")


def below(root: int, table: dict[int, tuple[int, int, bool]]) -> list[Relative]:
    """The descendants of `root`, parents before children, in a table of pid → parent, group, zombie."""
    children: dict[int, list[int]] = {}
    for pid, (parent, _, _) in table.items():
        children.setdefault(parent, []).append(pid)
    found: list[Relative] = []
    generation = children.get(root, [])
    while generation:
        found += [Relative(pid, table[pid][1], table[pid][2]) for pid in generation]
        generation = [child for pid in generation for child in children.get(pid, [])]
    return found


def descendants(root: int) -> list[Relative]:
    """The descendants of process `root` now: a snapshot, which may miss who changes parents while it is taken."""
    return below(root, _proc_table() if forking.LINUX else _psutil_table())


def _proc_table() -> dict[int, tuple[int, int, bool]]:
    """All processes. (``/proc/<pid>/task/<tid>/children`` would be quicker, but not every kernel has it.)"""
    table = {}
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                entry = parse_stat(file.read())
        except OSError:
            continue  # It has ended in the meantime.
        if entry is not None:
            table[int(name)] = entry
    return table


def _psutil_table() -> dict[int, tuple[int, int, bool]]:
    import psutil

    table = {}
    for process in psutil.process_iter():
        try:
            parent, zombie = process.ppid(), process.status() == psutil.STATUS_ZOMBIE
            table[process.pid] = (parent, os.getpgid(process.pid), zombie)
        except (psutil.Error, OSError):
            continue
    return table


class _Ends:
    """The descriptors of one service process: `near` are the supervisor's, `far` the process's own."""

    __slots__ = ("far", "near")

    def __init__(self) -> None:
        near, far = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
        self.near: list[int] = [near.detach()]
        self.far: list[int] = [far.detach()]
        for _ in ("stdout", "stderr"):
            read, write = os.pipe()
            self.near.append(read)
            self.far.append(write)

    def close(self, fds: list[int]) -> None:
        """Close one side's descriptors, once."""
        while fds:
            os.close(fds.pop())


class _Process:
    """A service process as the supervisor knows it. `pid` is 0 until it has been forked."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pid = 0
        self.ends = _Ends()
        self.started = time.monotonic()
        self.dead = False
        self.control: ControlSocket | None = None
        self.control_watch: Watch | None = None
        self.death_watch: Watch | None = None
        self.pidfd = -1
        self.waiter = False  # A thread waits for it, and nobody else may.
        self.turn = threading.Lock()  # Its messages are handled one after the other.

    def forget_pidfd(self) -> None:
        """Under the lock of `Processes`."""
        if self.death_watch is not None:
            self.death_watch.close()
            self.death_watch = None
            os.close(self.pidfd)


class Processes:
    """All service processes of this machine. Every method may be called from any thread, but for `start`."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._supervisor = os.getpid()
        self._subreaper = False
        self._changed = threading.Condition()
        self._processes: dict[int, _Process] = {}
        self._forking: dict[int, _Process] = {}  # Process 0 was asked for them.
        self._launching = 0  # Being executed, pid not known yet.
        self._deaths: list[Death] = []
        self._stopping = False
        self._closed = threading.Event()
        self._reactor: Reactor | None = None
        self._output: OutputCapture | None = None
        self._on_message: Callable[[int, Message, list[int]], None] | None = None
        self._on_exit: Callable[[Death], None] | None = None
        self._oom: OomWatch | None = None

    # -- Starting ----------------------------------------------------------------------------------------------------

    def start(self) -> int:
        """Execute the program as process 0; returns its pid. On the main thread, before there is any other.

        Raises `OSError`, with the reason and the name in its text, where the program cannot be executed.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("Processes.start belongs on the main thread: process 0 dies with the one that forks it")
        forking.open_standard_streams()
        pid = self._execute(0)
        self._subreaper = forking.become_subreaper()  # It cannot have grandchildren yet: it is still starting Python.
        import signal

        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # Inherited as ignored, it would lose us every exit status.
        return pid

    def attach(
        self,
        reactor: Reactor,
        output: OutputCapture,
        on_message: Callable[[int, Message, list[int]], None],
        on_exit: Callable[[Death], None],
    ) -> None:
        """Begin to listen, from the reactor's threads, also to what has happened since `start`.

        `on_message(process, message, fds)`: a control message, one at a time of each process; the descriptors are the
        receiver's. Beside what the processes send, ``{"type": "failed", "process": n, "error": text}`` tells of a
        replica that could not be started, or of a process that sends what is no message. `on_exit(death)`: once for
        each service process, whether it was stopped or died; its output up to the end has been read.
        """
        from .death import OomWatch

        self._oom = OomWatch()
        with self._changed:
            self._reactor = reactor
            self._output = output
            self._on_message = on_message
            self._on_exit = on_exit
            known = list(self._processes.values())
        for process in known:
            self._listen(process)
        reactor.call_later(SWEEP, self._sweep)

    def start_replicas(self, maxprocs: int, single_threaded: bool) -> None:
        """Start replicas 1 … `maxprocs` - 1 in the way that process 0's ``ready`` message allows."""
        if self._subreaper and single_threaded:
            self.fork_replicas(maxprocs)
        else:
            self.exec_replicas(range(1, maxprocs))

    def fork_replicas(self, maxprocs: int) -> None:
        """Order process 0 to fork replicas 1 … `maxprocs` - 1; each reports ``ready`` for itself. Does not wait.

        A replica that process 0 cannot fork is executed afresh. Raises `OSError` where process 0 is gone.
        """
        for first in range(1, maxprocs, BATCH):
            self._order([_Process(number) for number in range(first, min(first + BATCH, maxprocs))])

    def _order(self, batch: list[_Process]) -> None:
        numbers = [process.number for process in batch]
        fds = [fd for process in batch for fd in process.ends.far]
        with self._changed:
            self._forking.update({process.number: process for process in batch})
        try:
            self.send(0, {"type": "fork", "processes": numbers, "supervisor": self._supervisor}, fds)
        except OSError:
            with self._changed:
                self._abandon_forks(numbers)
            raise
        finally:
            for process in batch:
                process.ends.close(process.ends.far)

    def exec_replicas(self, numbers: Iterable[int]) -> None:
        """Execute the program once more for each of `numbers`. Raises `OSError` as `start` does."""
        todo = list(numbers)
        errors: list[BaseException] = []
        done = threading.Event()

        def launch() -> None:
            try:
                for number in todo:
                    self._execute(number)
            except BaseException as error:
                errors.append(error)
            done.set()
            self._closed.wait()  # Rule 4.

        threading.Thread(target=launch, name="bigmachine-launcher", daemon=True).start()
        done.wait()
        if errors:
            raise errors[0]

    def _execute(self, number: int) -> int:
        with self._changed:
            if self._stopping:
                raise OSError(errno.ECANCELED, "the machine is stopping")
            self._launching += 1
        try:
            process = _Process(number)
            try:
                process.pid = forking.launch(self._program, number, process.ends.far, self._supervisor)
            except BaseException:
                process.ends.close(process.ends.near)
                raise
            finally:
                process.ends.close(process.ends.far)
            with self._changed:
                self._processes[number] = process
                attached = self._reactor is not None
        finally:
            with self._changed:
                self._launching -= 1
                self._changed.notify_all()
        if attached:
            self._listen(process)
        return process.pid

    # -- Listening ---------------------------------------------------------------------------------------------------

    def _listen(self, process: _Process) -> None:
        from .control import ControlSocket

        reactor, output, oom = self._reactor, self._output, self._oom
        assert reactor is not None
        assert output is not None
        assert oom is not None
        oom.started(process.pid)
        control, stdout, stderr = process.ends.near
        process.ends.near.clear()
        output.add(process.number, "stdout", stdout)
        output.add(process.number, "stderr", stderr)
        with process.turn:  # The poller may report a hang-up before it is asked to.
            process.control = ControlSocket.from_fd(control)
            process.control_watch = reactor.watch(control, lambda events: self._on_control(process))
            process.control_watch.arm()
        self._watch_death(process, reactor)

    def _watch_death(self, process: _Process, reactor: Reactor) -> None:
        try:
            process.pidfd = os.pidfd_open(process.pid)
        except (AttributeError, OSError):  # Not Linux, before 5.3, or a sandbox that doesn't know it.
            process.waiter = True
            name = f"bigmachine-wait-{process.number}"
            threading.Thread(target=self._wait_for, args=(process,), name=name, daemon=True).start()
            return
        with self._changed:
            process.death_watch = reactor.watch(process.pidfd, lambda events: self._look_after(process))
            process.death_watch.arm()

    def _on_control(self, process: _Process) -> None:
        with process.turn:
            control, watch = process.control, process.control_watch
            assert control is not None
            assert watch is not None
            try:
                for message, fds in control.receive_ready():
                    self._receive(process, message, fds)
            except Exception as error:
                self._fail(process.number, f"service process {process.number}: {type(error).__name__}: {error}")
                return
            if not control.eof:
                watch.arm()

    def _receive(self, process: _Process, message: Message, fds: list[int]) -> None:
        if message.get("type") == "forked" and process.number == 0:
            self._on_forked(message)
        elif self._on_message is not None:
            self._on_message(process.number, message, fds)

    def _on_forked(self, message: Message) -> None:
        number, pid = message["process"], message.get("pid")
        with self._changed:
            process = self._forking.pop(number, None)
            if process is not None and pid is not None:
                process.pid = pid
                self._processes[number] = process
        if process is None:
            return
        if pid is not None:
            self._listen(process)
            return
        process.ends.close(process.ends.near)
        try:
            self.exec_replicas([number])
        except OSError as error:
            self._fail(number, f"{message['error']}; {error}")

    def _fail(self, number: int, error: str) -> None:
        if self._on_message is not None and not self._stopping:
            self._on_message(number, {"type": "failed", "process": number, "error": error}, [])

    # -- Talking -----------------------------------------------------------------------------------------------------

    def send(self, number: int, message: Message, fds: Sequence[int] = ()) -> None:
        """Send process `number` a control message; the caller keeps its copies of `fds`.

        Raises `OSError` where the process is gone, or does not read (`TimeoutError`).
        """
        process = self._processes.get(number)
        if process is None or process.control is None or process.dead:
            raise BrokenPipeError(errno.EPIPE, f"service process {number} is not running")
        process.control.send(message, fds)

    def pids(self) -> dict[int, int]:
        """The pids of the service processes that are alive, by number."""
        with self._changed:
            return {number: process.pid for number, process in self._processes.items() if not process.dead}

    @property
    def deaths(self) -> list[Death]:
        """How service processes ended, in that order."""
        with self._changed:
            return list(self._deaths)

    # -- Dying -------------------------------------------------------------------------------------------------------

    def _sweep(self) -> None:
        if self._reactor is not None and not self._closed.is_set():
            self._reap()
            self._reactor.call_later(SWEEP, self._sweep)

    def _reap(self) -> None:
        """Reap every child that has ended and is ours to reap (rule 3)."""
        for process in list(self._processes.values()):
            self._look_after(process)
        if hasattr(os, "waitid"):
            with self._changed:
                while self._reap_adopted():
                    pass

    def _look_after(self, process: _Process) -> None:
        """Bury a process if it has died."""
        status: int | None
        with self._changed:
            if process.dead or process.waiter:
                return
            try:
                pid, status = os.waitpid(process.pid, os.WNOHANG)
            except ChildProcessError:
                pid, status = process.pid, None  # Somebody waited for any child.
            if not pid:
                return
            self._mark_dead(process)
        self._bury(process, status)

    def _wait_for(self, process: _Process) -> None:
        """The thread that waits for a process where the reactor cannot."""
        status: int | None
        try:
            _, status = os.waitpid(process.pid, 0)
        except ChildProcessError:
            status = None
        with self._changed:
            self._mark_dead(process)
        self._bury(process, status)

    def _mark_dead(self, process: _Process) -> None:
        """Under the lock."""
        process.dead = True
        process.forget_pidfd()
        if process.number == 0:
            self._abandon_forks(list(self._forking))
        self._changed.notify_all()

    def _abandon_forks(self, numbers: list[int]) -> None:
        """Under the lock. Replicas that process 0 will not tell us of: `stop` finds those that it has forked."""
        for number in numbers:
            process = self._forking.pop(number, None)
            if process is not None:
                process.ends.close(process.ends.near)

    def _reap_adopted(self) -> bool:
        """Under the lock. Reap one adopted child that has ended; False where none is in sight.

        Looks at whatever ended child the kernel shows first, so one that is not ours to reap hides others for a while.
        """
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or self._forking or self._launching:
                return False  # Perhaps a service process of which we have not been told yet.
            known = {process.pid for process in self._processes.values() if not process.dead}
            if ended.si_pid in known or os.getpgid(ended.si_pid) == os.getpgrp():
                return False
            os.waitpid(ended.si_pid, os.WNOHANG)
        except (ChildProcessError, ProcessLookupError):
            return False
        return True

    def _bury(self, process: _Process, status: int | None) -> None:
        """Tell how it died. On whatever thread has noticed it, without the lock."""
        from .death import OomEvidence, decide

        lived = time.monotonic() - process.started
        evidence = OomEvidence()
        killed = status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == SIGKILL
        if killed and self._oom is not None and not self._stopping:
            evidence = self._oom.evidence(process.pid)
        last = "" if self._output is None else self._output.last_output(process.number)
        death = decide(process.number, process.pid, status, evidence, last, lived)
        with self._changed:
            self._deaths.append(death)
            self._changed.notify_all()
        if self._on_exit is not None:
            self._on_exit(death)

    # -- Stopping ----------------------------------------------------------------------------------------------------

    def stop(self, grace: float = GRACE) -> list[int]:
        """End the service processes and all other descendants of this process; returns when they are gone.

        Their deaths have been recorded then (`deaths`), though a last `on_exit` may still be running on another thread;
        `stop` may be called in an `on_exit` or `on_message`.

        SIGTERM to the service processes' groups; SIGKILL to all descendants when the groups are empty, or `grace`
        seconds are over. The result is normally empty: the pids that are still there `KILL_LIMIT` seconds after that.
        """
        with self._changed:
            self._stopping = True
            self._changed.wait_for(lambda: not self._launching, KILL_LIMIT)
        relatives = descendants(self._supervisor)
        self._terminate(relatives)
        self._await_groups(time.monotonic() + grace)
        if not self._subreaper:
            self._kill(relatives)  # Some may have lost the parents by which they could be found again.
        survivors = self._kill_all(time.monotonic() + KILL_LIMIT)
        with self._changed:  # Other threads may still be reading a process's last output.
            self._changed.wait_for(lambda: len(self._deaths) == self._dead(), KILL_LIMIT)
        self._close()
        return survivors

    def _dead(self) -> int:
        return sum(process.dead for process in self._processes.values())

    def _groups(self) -> set[int]:
        with self._changed:
            return {process.pid for process in self._processes.values()}

    def _terminate(self, relatives: list[Relative]) -> None:
        """SIGTERM to the groups that have members among our relatives: the number of an empty one may be anybody's."""
        for group in self._groups() & {relative.group for relative in relatives}:
            try:
                os.killpg(group, SIGTERM)
            except OSError:
                pass  # Gone in the meantime, or not ours to signal (a set-user-id program).

    def _await_groups(self, deadline: float) -> None:
        pause = 0.001
        while True:
            self._reap()
            left = deadline - time.monotonic()
            if left <= 0 or not any(_exists(group) for group in self._groups()):
                return
            with self._changed:
                self._changed.wait(min(pause, left))
            pause = min(2 * pause, 0.02)

    def _kill_all(self, deadline: float) -> list[int]:
        """Kill until nothing is left. Without the proof of rule 2, that is twice nothing: who is just changing parents
        may be missing in one snapshot."""
        pause = 0.001
        empty = 0
        while True:
            self._reap()
            if self._subreaper and _childless():
                return []
            living = [relative for relative in descendants(self._supervisor) if not relative.zombie]
            empty = 0 if living else empty + 1
            if empty == 2:
                return []
            if living and time.monotonic() > deadline:
                return [relative.pid for relative in living]
            self._kill(living)
            time.sleep(pause)
            pause = min(2 * pause, 0.02)

    def _kill(self, relatives: list[Relative]) -> None:
        for relative in relatives:
            try:
                os.kill(relative.pid, SIGKILL)
            except OSError:
                pass

    def _close(self) -> None:
        self._closed.set()
        with self._changed:
            self._abandon_forks(list(self._forking))
            processes = list(self._processes.values())
            for process in processes:
                process.forget_pidfd()
                process.ends.close(process.ends.near)
        for process in processes:
            if process.control_watch is not None:
                process.control_watch.close()
            if process.control is not None:
                process.control.close()
        if self._oom is not None:
            self._oom.close()


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _childless() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return True
    return False
