"""Vitals are read from this host: checked for sense, not for values."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest

from bigmachine.supervisor import vitals
from bigmachine.supervisor.vitals import Gauge, disk_info, load_info, mem_info


def test_memory_of_host_and_processes() -> None:
    info = mem_info([os.getpid()])
    assert 0 < info.processes < info.total
    assert 0 < info.available <= info.total
    assert 0 <= info.used_percent <= 100


def test_memory_adds_processes_up() -> None:
    one = mem_info([os.getpid()]).processes
    two = mem_info([os.getpid(), os.getpid()]).processes
    assert two > 1.5 * one


def test_processes_that_are_gone_hold_nothing() -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    assert mem_info([gone.pid]).processes == 0


def test_disk_of_a_path(tmp_path: Path) -> None:
    info = disk_info(str(tmp_path))
    assert info.path == str(tmp_path)
    assert 0 < info.free <= info.total
    assert info.used <= info.total


def test_disk_of_temporary_files() -> None:
    assert os.path.isdir(disk_info().path)


def test_a_disk_that_is_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def gettempdir() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", gettempdir)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert disk_info().path == str(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    assert disk_info().total > 0


def test_load() -> None:
    load = load_info()
    assert min(load.load1, load.load5, load.load15) >= 0


def test_vitals_of_a_machine() -> None:
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    gauge = Gauge()
    first = gauge.read({"supervisor": os.getpid(), "0": gone.pid})
    assert first.cpu is None  # There is nothing to compare with.
    (own,) = first.processes
    assert (own.process, own.pid) == ("supervisor", os.getpid())
    assert own.rss > 0
    assert own.cpu > 0
    assert own.threads >= 1
    assert 0 < first.memory.processes < first.memory.total
    assert first.disk.path == disk_info().path


def test_how_busy_the_processors_were(monkeypatch: pytest.MonkeyPatch) -> None:
    Times = namedtuple("Times", "user nice system idle iowait irq softirq steal guest guest_nice")
    said = [
        Times(10, 0, 0, 90, 0, 0, 0, 0, 5, 0),
        Times(40, 0, 0, 150, 10, 0, 0, 0, 20, 0),
        Times(40, 0, 0, 150, 10, 0, 0, 0, 20, 0),
    ]
    monkeypatch.setattr(vitals.psutil, "cpu_times", lambda: said.pop(0))
    monkeypatch.setattr(vitals, "SOON", 0.0)
    gauge = Gauge()
    assert gauge.read({}).cpu is None
    assert gauge.read({}).cpu == pytest.approx(30.0)  # A guest's time is a part of the user's.
    assert gauge.read({}).cpu == pytest.approx(30.0)  # No time has passed.
    monkeypatch.setattr(vitals, "SOON", 60.0)
    assert gauge.read({}).cpu == pytest.approx(30.0)
    assert not said


def test_shared_pages_are_not_weighed_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weighed: list[int] = []

    def held_by(pid: int) -> int:
        weighed.append(pid)
        return 1000

    monkeypatch.setattr(vitals, "_held_by", held_by)
    monkeypatch.setattr(vitals, "WORTH", 1e9)
    gauge = Gauge()
    pids = {"supervisor": os.getpid(), "0": os.getpid()}  # As in the system `test`: one process, counted once.
    assert [gauge.read(pids).memory.processes for _ in range(3)] == [1000] * 3
    assert weighed == [os.getpid()]
    monkeypatch.setattr(vitals, "WORTH", 0.0)
    again = Gauge()
    for _ in range(3):
        again.read(pids)
    assert len(weighed) == 4
