"""Why a service process died, in words.

A wait status says "signal 9" and no more. Whether the kernel sent it for lack of memory is a matter of evidence, and
there are two witnesses, either of which may be missing:

- the process's memory cgroup counts the processes killed in it: ``oom_kill`` in ``memory.events`` (version 2) or in
  ``memory.oom_control`` (version 1). It is compared with what it was when the process was started.
- the kernel's log names the process: "Killed process 4711". Reading it is forbidden to most users, and in a container
  it knows processes by numbers that are not ours.

What decides is pure and comes first; `OomWatch` gathers the evidence.
"""

from __future__ import annotations

import os
import re
import signal as signals
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Death:
    """How service process number `process` ended. Pickles: the driver's exceptions carry it.

    One of `code` and `signal` is None; both are where nobody knows (another part of the process took the status).
    `last_output` is the end of what it wrote, `when` how many seconds it had lived.
    """

    process: int
    pid: int
    code: int | None
    signal: int | None
    oom: bool
    last_output: str
    when: float

    def summary(self) -> str:
        """One line: ``service process 0 (pid 4711) was killed by SIGSEGV (segmentation fault)``."""
        return f"service process {self.process} (pid {self.pid}) {self._how()}"

    def describe(self) -> str:
        """The summary, and the last lines of the process's output under it."""
        if not self.last_output.strip():
            return self.summary()
        return f"{self.summary()}; its last output:\n{self.last_output.rstrip()}"

    def _how(self) -> str:
        if self.oom:
            return "was killed by the kernel for lack of memory (out-of-memory killer)"
        if self.signal is not None:
            return f"was killed by {signal_name(self.signal)}"
        if self.code is not None:
            return f"exited with code {self.code}"
        return "ended, and its exit status is not known"


def signal_name(number: int) -> str:
    """``SIGSEGV (segmentation fault)``; signals whose description says no more than their name go without it."""
    try:
        name = signals.Signals(number).name
    except ValueError:
        return f"signal {number}"
    meaning = (signals.strsignal(number) or "").lower()
    return f"{name} ({meaning})" if meaning and meaning not in ("killed", "terminated", "interrupt") else name


@dataclass(frozen=True)
class OomEvidence:
    """The cgroup's count of killed processes, `before` and `after`, and the pids `killed` according to its log."""

    before: int | None = None
    after: int | None = None
    killed: frozenset[int] = field(default_factory=frozenset)

    def against(self, pid: int) -> bool:
        """Does it say that the kernel killed `pid`, provided that `pid` died of SIGKILL?"""
        counted = self.before is not None and self.after is not None and self.after > self.before
        return counted or pid in self.killed


def decide(
    process: int, pid: int, status: int | None, evidence: OomEvidence, last_output: str = "", when: float = 0.0
) -> Death:
    """The death that wait status `status` (as of ``os.waitpid``) and the evidence tell of."""
    code = signal = None
    if status is not None:
        exit_code = os.waitstatus_to_exitcode(status)
        code, signal = (exit_code, None) if exit_code >= 0 else (None, -exit_code)
    oom = signal == signals.SIGKILL and evidence.against(pid)
    return Death(process, pid, code, signal, oom, last_output, when)


def oom_kills(text: str) -> int | None:
    """The counter ``oom_kill`` in the text of ``memory.events`` or ``memory.oom_control``; None where there is none."""
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None


def counter_files(cgroups: str) -> list[str]:
    """Where the counter may be, best first, below ``/sys/fs/cgroup``, for the text of ``/proc/<pid>/cgroup``.

    A container may see its cgroup's path as the host knows it, while its own cgroup is mounted as the root: the second
    place to look.
    """
    files = []
    for line in cgroups.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        path = path.strip("/")
        if ".." in path.split("/"):
            path = ""  # Outside of what this namespace may see.
        if "memory" in controllers.split(","):
            files += [os.path.join("memory", path, "memory.oom_control"), "memory/memory.oom_control"]
        elif hierarchy == "0" and not controllers:
            files += [os.path.join(path, "memory.events"), "memory.events"]
    return list(dict.fromkeys(files))


def killed_pid(record: str) -> int | None:
    """The process that a record of ``/dev/kmsg`` says was killed for lack of memory; None where it says no such thing.

    A record is ``<priority>,<sequence>,<microseconds>,<flags>;<text>``. Only the kernel's own count (facility 0).
    """
    head, _, text = record.partition(";")
    priority = head.partition(",")[0]
    if not priority.isdecimal() or int(priority) >> 3:
        return None
    found = re.search(r"\bKill(?:ed)? process (\d+)\b", text)
    return int(found[1]) if found else None


class KernelLog:
    """The kernel's log from now on, where it may be read."""

    RECORDS = 10_000
    """Records looked at in one go: a flood of them must not keep the supervisor from reporting a death."""

    def __init__(self, path: str = "/dev/kmsg") -> None:
        self._killed: set[int] = set()
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            self.close()

    @property
    def readable(self) -> bool:
        return self._fd >= 0

    def killed(self) -> frozenset[int]:
        """The processes that were killed for lack of memory since this log was opened."""
        for _ in range(self.RECORDS if self.readable else 0):
            try:
                record = os.read(self._fd, 8192)
            except BrokenPipeError:
                continue  # Records were overwritten before we read them; the next read goes on with the oldest left.
            except OSError:
                break
            if not record:
                break
            pid = killed_pid(record.decode(errors="replace"))
            if pid is not None:
                self._killed.add(pid)
        return frozenset(self._killed)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class OomWatch:
    """Gathers the evidence: `started` when a process is, `evidence` when it has died. Threads share one at will."""

    PATIENCE = 0.05
    """Seconds to wait for the kernel's log: it is written just after the signal has been sent."""

    def __init__(self, proc: str = "/proc", cgroups: str = "/sys/fs/cgroup", log: KernelLog | None = None) -> None:
        self._proc = proc
        self._cgroups = cgroups
        self._log = KernelLog() if log is None else log
        self._counters: dict[int, tuple[str, int]] = {}

    def started(self, pid: int) -> None:
        """Note the count of the cgroup of `pid`, which must be alive: a dead process's cgroup is not known."""
        for name in counter_files(_read(f"{self._proc}/{pid}/cgroup")):
            path = f"{self._cgroups}/{name}"
            count = oom_kills(_read(path))
            if count is not None:
                self._counters[pid] = (path, count)
                return

    def evidence(self, pid: int) -> OomEvidence:
        """What there is about `pid`, which was killed by SIGKILL. May wait for `PATIENCE`."""
        counter = self._counters.pop(pid, None)
        before, after = (None, None) if counter is None else (counter[1], oom_kills(_read(counter[0])))
        deadline = time.monotonic() + self.PATIENCE
        while True:
            found = OomEvidence(before, after, self._log.killed())
            if found.against(pid) or not self._log.readable or time.monotonic() >= deadline:
                return found
            time.sleep(0.005)

    def close(self) -> None:
        self._log.close()


def _read(path: str) -> str:
    """The text of a small file of the kernel's; nothing where there is no such file, or no such process any more."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
