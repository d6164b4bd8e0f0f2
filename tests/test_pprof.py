"""pprof's format: what is written is read again by the published schema, and by ``go tool pprof`` where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from pprof_schema import read

from bigmachine.inside.pprof import MAX_COMMENTS, encode, merge, text
from bigmachine.profiling.values import Place, Profile, Sample

TYPES = (("samples", "count"), ("cpu", "nanoseconds"), ("wall", "nanoseconds"))
LEAF, MIDDLE, ROOT = Place("Work.leaf", "/a/work.py", 12, 10), Place("π<listcomp>", "/a/π.py", 300, 299), Place("[other]")


def profile(*samples: Sample, places: tuple[Place, ...] = (LEAF, MIDDLE, ROOT), **fields: object) -> Profile:
    given = {"started": 1_700_000_000.25, "seconds": 2.5, "period": 10_000_000, "comments": ("a comment",), **fields}
    return Profile("profile", TYPES, "cpu", places, samples, **given)  # type: ignore[arg-type]


ONE = profile(
    Sample((0, 1, 2), (3, 10**18, 5), (("method", "leaf"), ("service", "Work"))),
    Sample((2,), (1, 0, -7)),
    Sample((), (1, 1, 1)),
)


def test_what_is_written_is_read_as_the_schema_says() -> None:
    found = read(encode(ONE))
    assert found.types == list(TYPES)
    assert found.default == "cpu"
    assert found.samples == [
        ([LEAF, MIDDLE, ROOT], {"samples": 3, "cpu": 10**18, "wall": 5}, {"method": "leaf", "service": "Work"}),
        ([ROOT], {"samples": 1, "cpu": 0, "wall": -7}, {}),
        ([], {"samples": 1, "cpu": 1, "wall": 1}, {}),
    ]
    assert found.comments == ["a comment"]
    assert (found.nanos, found.duration) == (1_700_000_000_250_000_000, 2_500_000_000)
    assert (found.period, found.period_type) == (10_000_000, ("cpu", "nanoseconds"))


def test_what_is_counted_has_no_period() -> None:
    found = read(encode(profile(period=0, comments=())))
    assert (found.period, found.period_type, found.samples, found.comments) == (0, None, [], [])


def test_the_same_profile_gives_the_same_bytes() -> None:
    assert encode(ONE) == encode(ONE)


def test_merging_adds_what_is_equal_and_keeps_apart_what_is_not() -> None:
    stack = Sample((0, 1), (1, 2, 3), (("method", "leaf"),))
    here = profile(stack, stack, started=20.0, seconds=1.0)
    there = profile(Sample((1, 0), (10, 20, 30)), places=(MIDDLE, LEAF), started=10.0, seconds=3.0, comments=("it is there",))
    merged = merge([({"machine": "a"}, here), ({"machine": "b"}, there), ({"machine": "b"}, there)], ["c is missing"])
    found = read(encode(merged))
    assert found.samples == [
        ([LEAF, MIDDLE], {"samples": 2, "cpu": 4, "wall": 6}, {"machine": "a", "method": "leaf"}),
        ([LEAF, MIDDLE], {"samples": 20, "cpu": 40, "wall": 60}, {"machine": "b"}),
    ]
    assert found.comments == ["c is missing", "a: a comment", "b: it is there", "b: it is there"]
    assert (merged.started, merged.seconds) == (10.0, 3.0)
    assert merged.total("cpu") == 44


def test_a_sample_s_own_label_wins() -> None:
    merged = merge([({"process": "0"}, profile(Sample((0,), (1, 1, 1), (("process", "own"),))))])
    assert merged.samples[0].labels == (("process", "own"),)


def test_comments_of_many_processes_are_few() -> None:
    merged = merge([({"machine": str(number)}, ONE) for number in range(100)], ["m is missing"])
    assert len(merged.comments) == MAX_COMMENTS
    assert merged.comments[0] == "m is missing"
    assert merged.comments[-1] == "and 62 more"


def test_text() -> None:
    lines = text(ONE).splitlines()
    assert lines[0] == "profile: 2023-11-14 22:13:20 UTC, 2.5 s"
    assert lines[1] == "# a comment"
    assert lines[4] == "3 samples, 1000000000000000000 nanoseconds cpu, 5 nanoseconds wall @ method=leaf service=Work"
    assert lines[5:8] == ["#\tWork.leaf  /a/work.py:12", "#\tπ<listcomp>  /a/π.py:300", "#\t[other]"]
    assert "total: 0 samples" in text(profile())


@pytest.mark.skipif(shutil.which("go") is None, reason="there is no go: apt-get install golang-go")
def test_go_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "profile.pb.gz"
    file.write_bytes(encode(profile(Sample((0, 1, 2), (3, 2_000_000_000, 5), (("machine", "m-1"),)))))
    command = ["go", "tool", "pprof", "-top", "-tagfocus=machine=m-1", str(file)]
    environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environ)
    assert done.returncode == 0, done.stderr
    assert "Type: cpu" in done.stdout
    assert "2s   100%   100%         2s   100%  Work.leaf" in done.stdout
