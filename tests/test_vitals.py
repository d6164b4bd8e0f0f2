"""Vitals are read from this host: checked for sense, not for values."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bigmachine.supervisor.vitals import disk_info, load_info, mem_info


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
