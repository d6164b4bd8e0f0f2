"""When a machine says that its memory runs short, and how it knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import bigmachine
from bigmachine.supervisor import pressure
from bigmachine.supervisor.pressure import GROUP, HOST, V1, V2, Meter, Pressure, Reading, folders, host, limited
from bigmachine.testing import TestSystem
from bigmachine.testing.conformance import eventually
from bigmachine.testing.services import Probe

MEMINFO = "MemTotal:       16000 kB\nMemFree:          100 kB\nMemAvailable:    4000 kB\nBuffers:          10 kB\n"
UNLIMITED = 9223372036854771712


def at(percent: float, whose: str = HOST) -> Reading:
    return Reading(round(percent * 10), 1000, whose)


# -- Deciding ------------------------------------------------------------------------------------------------------------


def said(course: Iterable[tuple[float, float]]) -> list[tuple[float, str]]:
    """When what was said of memory that was so full at those times."""
    watch = Pressure()
    found = [(now, watch.look(now, [at(percent)])) for now, percent in course]
    return [(now, event[0]) for now, event in found if event is not None]


@pytest.mark.parametrize(
    ("course", "events"),
    [
        ([(0, 10), (1, 94.9), (2, 10)], []),
        ([(0, 95)], [(0, "unhealthy")]),
        ([(0, 96), (1, 99), (59, 96)], [(0, "unhealthy")]),
        ([(0, 96), (60, 96), (61, 96), (120, 97)], [(0, "unhealthy"), (60, "unhealthy"), (120, "unhealthy")]),
        ([(0, 96), (1, 92), (2, 96), (3, 90)], [(0, "unhealthy")]),
        ([(0, 96), (1, 89.9), (2, 50)], [(0, "unhealthy"), (1, "healthy")]),
        ([(0, 96), (1, 80), (2, 96)], [(0, "unhealthy"), (1, "healthy"), (2, "unhealthy")]),
        ([(0, 96), (70, 93), (71, 96)], [(0, "unhealthy"), (71, "unhealthy")]),
    ],
    ids=["fine", "at once", "once", "again every minute", "between", "healthy", "each crossing", "reminded late"],
)
def test_when_it_is_said(course: list[tuple[float, float]], events: list[tuple[float, str]]) -> None:
    assert said(course) == events


def test_the_fullest_decides() -> None:
    event = Pressure().look(0.0, [at(20), at(97, GROUP), at(96)])
    assert event == (
        "unhealthy",
        97.0,
        970,
        1000,
        "97.0 % of the memory of its control group is in use: 0.00 of 0.00 GiB",
    )


def test_nobody_knows() -> None:
    watch = Pressure()
    assert watch.look(0.0, [at(96)]) is not None
    assert watch.look(100.0, []) is None  # Neither better nor worse.


# -- Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        (MEMINFO, Reading(12000 * 1024, 16000 * 1024, HOST)),
        ("MemTotal: 10 kB\nMemFree: 3 kB\n", None),
        ("MemTotal: 10 kB\nMemAvailable: 12 kB\n", Reading(0, 10240, HOST)),
        ("MemTotal: many kB\nMemAvailable:\n", None),
        ("", None),
    ],
    ids=["usual", "old kernel", "more than all", "garbage", "none"],
)
def test_host(text: str, reading: Reading | None) -> None:
    assert host(text) == reading


@pytest.mark.parametrize(
    ("cgroups", "found"),
    [
        ("0::/a/b\n", [("a/b", V2), ("a", V2), ("", V2)]),
        ("0::/\n", [("", V2)]),
        ("0::/../../other\n", [("", V2)]),
        ("4:cpu,memory:/docker/ab:c\n2:pids:/x\n", [("memory/docker/ab:c", V1), ("memory/docker", V1), ("memory", V1)]),
        ("9:name=systemd:/\n", []),
        ("garbage", []),
    ],
)
def test_where_limits_are(cgroups: str, found: object) -> None:
    assert folders(cgroups) == found


@pytest.mark.parametrize(
    ("limit", "usage", "found"),
    [
        ("1000\n", "500\n", (500, 1000)),
        ("max\n", "500\n", None),
        (f"{UNLIMITED}\n", "500\n", None),
        ("0", "0", None),
        ("", "", None),
        ("1000", "", None),
    ],
)
def test_limits(limit: str, usage: str, found: object) -> None:
    assert limited(limit, usage) == found


class Kernel:
    """Its file systems, as far as they are read."""

    def __init__(self, folder: Path, cgroups: str) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "meminfo").write_text(MEMINFO)
        (self.proc / "self/cgroup").write_text(cgroups)
        self.meter = Meter(str(self.proc), str(self.cgroups))

    def group(self, path: str, files: pressure.Files, limit: str, usage: int, stat: str = "") -> None:
        folder = self.cgroups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in ((files.limit, limit), (files.usage, str(usage)), (files.stat, stat)):
            (folder / name).write_text(f"{text}\n")

    def groups(self) -> list[tuple[int, int]]:
        first, *others = self.meter.read()
        assert first.whose == HOST
        assert all(reading.whose == GROUP for reading in others)
        return [(reading.used, reading.total) for reading in others]


def test_version_2_and_what_it_lies_in(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "0::/pod/app\n")
    kernel.group("pod/app", V2, "max", 500)
    kernel.group("pod", V2, "1000", 600)
    assert kernel.groups() == [(600, 1000)]
    kernel.group("pod/app", V2, "550", 500)  # It may be limited later.
    assert kernel.groups() == [(500, 550), (600, 1000)]


def test_cached_files_do_not_count(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "0::/\n")
    kernel.group("", V2, "1000", 990, "anon 100\nfile 890\ninactive_file 300\nactive_file 400\nslab_reclaimable 50")
    assert kernel.groups() == [(240, 1000)]
    kernel.group("", V2, "1000", 990, "anon 980\ninactive_file 10\nactive_file 0")
    assert kernel.groups() == [(980, 1000)]


def test_version_1(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "4:memory:/docker/abc\n0::/\n")
    kernel.group(
        "memory/docker/abc", V1, "1000", 990, "inactive_file 900\ntotal_inactive_file 100\ntotal_active_file 5"
    )
    kernel.group("memory", V1, str(UNLIMITED), 5000)
    assert kernel.groups() == [(885, 1000)]


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    kernel = Kernel(tmp_path, "4:memory:/docker/abc\n")
    kernel.group("memory", V1, "1000", 10)
    assert kernel.groups() == [(10, 1000)]


def test_no_kernel_that_says_anything(tmp_path: Path) -> None:
    assert Meter(str(tmp_path), str(tmp_path)).read() == []


def test_here() -> None:
    readings = Meter().read()
    assert all(reading.used >= 0 and reading.total > 0 for reading in readings)
    assert [reading.whose for reading in readings[:1]] == [HOST] * Path("/proc/meminfo").exists()


# -- A machine -----------------------------------------------------------------------------------------------------------


def test_a_machine_looks_and_tells_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    percent = 97.0
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(Meter, "read", lambda self: [at(percent)])
    with bigmachine.start(TestSystem()) as b:
        (machine,) = b.start(1, {"Probe": Probe()})
        eventually(lambda: machine.unhealthy, "that its memory runs short")
        assert machine.unhealthy.startswith("97.0 % of the memory of its host")
        percent = 50.0
        eventually(lambda: not machine.unhealthy, "that it is well again")


def test_a_look_that_fails_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no memory to look with: the lease must be looked at all the same, or nobody would end the machine."""
    planned: list[Callable[[], None]] = []

    class Planner:
        def call_later(self, delay: float, callback: Callable[[], None]) -> None:
            planned.append(callback)

    def read() -> list[Reading]:
        raise MemoryError

    system = TestSystem()
    with bigmachine.start(system) as b:
        (machine,) = b.start(1, {"Probe": Probe()})
        machine.wait()
        supervisor = system._of(machine).supervisor
        with monkeypatch.context() as patch:
            patch.setattr(supervisor, "_reactor", Planner())
            patch.setattr(supervisor._meter, "read", read)
            with pytest.raises(MemoryError):
                supervisor._check()
        assert planned == [supervisor._check]
        supervisor._check()
