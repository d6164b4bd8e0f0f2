"""How a death is explained: statuses and evidence in, words out."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path

import pytest

from bigmachine.supervisor.death import (
    Death,
    KernelLog,
    OomEvidence,
    OomWatch,
    counter_files,
    decide,
    killed_pid,
    oom_kills,
    signal_name,
)

NOTHING = OomEvidence()


def exited(code: int) -> int:
    return code << 8


MEMORY_EVENTS = "low 0\nhigh 0\nmax 122\noom 3\noom_kill 2\noom_group_kill 0\n"
OOM_CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"

KMSG_GLOBAL = (
    "3,1234,5678901,-;Out of memory: Killed process 4711 (python) total-vm:8391132kB, anon-rss:7340032kB, "
    "file-rss:0kB, shmem-rss:0kB, UID:1000 pgtables:15000kB oom_score_adj:100\n"
)
KMSG_CGROUP = "3,99,1,-;Memory cgroup out of memory: Killed process 815 (app.pex) total-vm:1kB\n SUBSYSTEM=memory\n"
KMSG_OLD = "3,99,1,-;Killed process 33, UID 0, (python) total-vm:1kB, anon-rss:1kB, file-rss:0kB\n"
KMSG_OTHER = "6,1300,5700000,-;eth0: link becomes ready\n"
KMSG_FORGED = "12,1301,5700001,-;Out of memory: Killed process 1 (init)\n"


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (signal.SIGSEGV, "was killed by SIGSEGV (segmentation fault)"),
        (signal.SIGSEGV | 0x80, "was killed by SIGSEGV (segmentation fault)"),  # With a core dump.
        (signal.SIGKILL, "was killed by SIGKILL"),
        (signal.SIGTERM, "was killed by SIGTERM"),
        (signal.SIGABRT, "was killed by SIGABRT (aborted)"),
        (exited(0), "exited with code 0"),
        (exited(3), "exited with code 3"),
        (None, "ended, and its exit status is not known"),
    ],
)
def test_in_words(status: int | None, words: str) -> None:
    assert decide(0, 4711, status, NOTHING).summary() == f"service process 0 (pid 4711) {words}"


def test_signal_without_a_name() -> None:
    assert signal_name(41) == "signal 41"


def test_last_output_follows_the_first_line() -> None:
    death = decide(2, 5, exited(1), NOTHING, last_output="one\ntwo\n\n")
    assert death.describe() == "service process 2 (pid 5) exited with code 1; its last output:\none\ntwo"
    assert decide(2, 5, exited(1), NOTHING, last_output=" \n").describe() == death.summary()


def test_pickles() -> None:
    death = decide(1, 2, signal.SIGKILL, OomEvidence(0, 1), "bye", 1.5)
    assert pickle.loads(pickle.dumps(death)) == death
    assert death == Death(process=1, pid=2, code=None, signal=9, oom=True, last_output="bye", when=1.5)


@pytest.mark.parametrize(
    ("status", "evidence", "oom"),
    [
        (signal.SIGKILL, OomEvidence(2, 3), True),
        (signal.SIGKILL, OomEvidence(2, 2), False),
        (signal.SIGKILL, OomEvidence(None, 3), False),
        (signal.SIGKILL, OomEvidence(2, None), False),
        (signal.SIGKILL, OomEvidence(killed=frozenset({7})), True),
        (signal.SIGKILL, OomEvidence(killed=frozenset({8})), False),
        (signal.SIGKILL, OomEvidence(2, 2, frozenset({7})), True),
        (signal.SIGTERM, OomEvidence(2, 3, frozenset({7})), False),
        (exited(137), OomEvidence(2, 3, frozenset({7})), False),
    ],
)
def test_out_of_memory_is_decided_by_the_evidence(status: int, evidence: OomEvidence, oom: bool) -> None:
    death = decide(0, 7, status, evidence)
    assert death.oom is oom
    assert ("for lack of memory" in death.describe()) is oom


@pytest.mark.parametrize(
    ("text", "count"), [(MEMORY_EVENTS, 2), (OOM_CONTROL, 7), ("oom_kill_disable 0\nunder_oom 0\n", None), ("", None)]
)
def test_counter(text: str, count: int | None) -> None:
    assert oom_kills(text) == count


@pytest.mark.parametrize(
    ("cgroups", "files"),
    [
        ("0::/user.slice/x.scope\n", ["user.slice/x.scope/memory.events", "memory.events"]),
        ("0::/\n", ["memory.events"]),
        ("0::/../../other\n", ["memory.events"]),
        (
            "9:name=systemd:/\n4:cpu,memory:/docker/ab:c\n1:cpuset:/\n",
            ["memory/docker/ab:c/memory.oom_control", "memory/memory.oom_control"],
        ),
        ("4:memory:/\n0::/\n", ["memory/memory.oom_control", "memory.events"]),
        ("", []),
    ],
)
def test_where_the_counter_is(cgroups: str, files: list[str]) -> None:
    assert counter_files(cgroups) == files


@pytest.mark.parametrize(
    ("record", "pid"),
    [(KMSG_GLOBAL, 4711), (KMSG_CGROUP, 815), (KMSG_OLD, 33), (KMSG_OTHER, None), (KMSG_FORGED, None), ("", None)],
)
def test_kernel_log_record(record: str, pid: int | None) -> None:
    assert killed_pid(record) == pid


def test_kernel_log_from_its_end_on(tmp_path: Path) -> None:
    path = tmp_path / "kmsg"
    path.write_text(KMSG_CGROUP)  # Before our time.
    log = KernelLog(str(path))
    assert log.killed() == frozenset()
    with path.open("a") as file:
        file.write(KMSG_GLOBAL)
    assert log.killed() == {4711}
    assert log.killed() == {4711}  # What was read once is remembered.
    log.close()
    log.close()


def test_kernel_log_that_may_not_be_read(tmp_path: Path) -> None:
    log = KernelLog(str(tmp_path / "missing"))
    assert not log.readable
    assert log.killed() == frozenset()


def test_watch_compares_the_counter(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "cgroup").write_text("0::/job\n")
    (tmp_path / "job").mkdir()
    events = tmp_path / "job" / "memory.events"
    events.write_text(MEMORY_EVENTS)
    watch = OomWatch(str(tmp_path), str(tmp_path), KernelLog(str(tmp_path / "missing")))
    watch.started(7)
    events.write_text(MEMORY_EVENTS.replace("oom_kill 2", "oom_kill 3"))
    assert watch.evidence(7) == OomEvidence(2, 3)
    watch.close()


def test_watch_without_any_witness(tmp_path: Path) -> None:
    watch = OomWatch(str(tmp_path), str(tmp_path), KernelLog(str(tmp_path / "missing")))
    watch.started(7)
    assert watch.evidence(7) == NOTHING
    watch.close()


def test_watch_on_this_host() -> None:
    watch = OomWatch()
    watch.started(os.getpid())
    assert not watch.evidence(os.getpid()).against(os.getpid())
    watch.close()
