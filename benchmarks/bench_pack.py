"""What packing costs, and what it makes: a Markdown table of medians and their targets (see README.md).

Every command is a process of its own, started as a user starts it. The cold runs ask the index; the others must not need it.
Two kinds of warm: distributions resolved and in the cache, but to be built into a file anew; and everything but the user's
own code as it was. REPS repetitions (5); SMOKE=1: one.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parent.parent / "examples" / "bigpi.py"
REPETITIONS = 1 if os.environ.get("SMOKE") else int(os.environ.get("REPS", "5"))
THREE = ("darwin/arm64", "linux/amd64", "linux/arm64")
NUMPY = '# /// script\n# dependencies = ["bigmachine", "numpy"]\n# ///\n'

START = """\
import sys, time
from bigmachine import State, driver

class Nothing:
    def ping(self):
        return 1

begun = time.perf_counter()
with driver.start() as b:
    for machine in b.start({n}, {{"N": Nothing()}}):
        machine.wait(State.RUNNING)
        machine.call("N.ping")
    print(time.perf_counter() - begun)
"""
"""Prints the seconds until each of n machines has answered a call."""

Row = tuple[str, str, str]


def timed(command: Sequence[str | Path], environ: Mapping[str, str]) -> float:
    """Seconds of a command that must succeed."""
    begun = time.perf_counter()
    done = subprocess.run([str(word) for word in command], env=environ, capture_output=True, text=True, check=False)
    elapsed = time.perf_counter() - begun
    if done.returncode:
        sys.exit(f"{command}: {done.stderr}")
    return elapsed


def median(measure: Callable[[], float]) -> tuple[float, str]:
    """Of the repetitions; and as text, with the least and the most."""
    runs = sorted(measure() for _ in range(REPETITIONS))
    return statistics.median(runs), f"{statistics.median(runs):.2f} s ({runs[0]:.2f} to {runs[-1]:.2f})"


class Bench:
    """One directory for all of it, with caches of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self.environ = {
            **kept,
            "BIGMACHINE_CACHE": str(self.cache),
            "PEX_ROOT": str(folder / "pex"),
            "SHIV_ROOT": str(folder / "shiv"),
        }
        self.edits = 0

    def write(self, name: str, text: str) -> Path:
        script = self.folder / f"{name}.py"
        script.write_text(text)
        return script

    def pack(self, script: Path, *options: str) -> float:
        output = self.folder / f"{script.stem}.pex"
        command = [sys.executable, "-m", "bigmachine", "pack", script, "-o", output, "--quiet", *options]
        return timed(command, self.environ)

    def rebuilt(self, script: Path, *options: str) -> float:
        shutil.rmtree(self.cache / "bases", ignore_errors=True)
        return self.pack(script, *options)

    def edited(self, script: Path, *options: str) -> float:
        self.edits += 1
        with script.open("a") as file:
            file.write(f"# Edit {self.edits}.\n")
        return self.pack(script, *options)

    def contents(self, name: str) -> Mapping[str, Any]:
        command = [sys.executable, "-m", "bigmachine", "info", "--json", str(self.folder / f"{name}.pex")]
        value: Mapping[str, Any] = json.loads(
            subprocess.run(command, env=self.environ, capture_output=True, check=True).stdout
        )
        return value


def times(bench: Bench) -> list[Row]:
    bigpi = bench.write("bigpi", EXAMPLE.read_text())
    three = [f"--platform={name}" for name in THREE]
    rows = [("bigpi, nothing in the cache (asks the index)", f"{bench.pack(bigpi):.1f} s", "")]
    rows.append(("bigpi, from a warm cache", median(lambda: bench.rebuilt(bigpi))[1], "≤ 3 s"))
    rows.append(("bigpi again, after an edit", median(lambda: bench.edited(bigpi))[1], "≤ 1 s"))
    numpy = bench.write("three", NUMPY + EXAMPLE.read_text() + "import numpy\n")
    rows.append(("with numpy, three platforms, nothing in the cache", f"{bench.pack(numpy, *three):.1f} s", ""))
    rows.append(
        ("with numpy, three platforms, from a warm cache", median(lambda: bench.rebuilt(numpy, *three))[1], "≤ 8 s")
    )
    rows.append(("with numpy, three platforms, after an edit", median(lambda: bench.edited(numpy, *three))[1], ""))
    for builder, suffix in (("pex", "pex"), ("shiv", "pyz")):
        file = bench.folder / f"bigpi.{suffix}"
        timed(
            [sys.executable, "-m", "bigmachine", "pack", bigpi, "--builder", builder, "-o", file, "--quiet"],
            bench.environ,
        )
        rows.append((f"{builder}: first `--help`", f"{timed([file, '--help'], bench.environ):.1f} s", ""))
        rows.append(
            (f"{builder}: `--help`", median(lambda file=file: timed([file, "--help"], bench.environ))[1], "≤ 0.5 s")
        )
    return rows


def starts(bench: Bench, n: int) -> list[Row]:
    """Packed and not, in turns."""
    script = bench.write(f"start{n}", START.format(n=n))
    bench.pack(script)
    commands = {"source": [sys.executable, script], "packed": [script.with_suffix(".pex")]}
    found: dict[str, list[float]] = {name: [] for name in commands}
    for repetition in range(REPETITIONS + 1):
        for name, command in commands.items():
            done = subprocess.run(command, env=bench.environ, capture_output=True, text=True, check=True)
            if repetition:  # The first one unpacks, and caches bytecode.
                found[name].append(float(done.stdout))
    source, packed = (statistics.median(found[name]) for name in ("source", "packed"))
    ratio = statistics.median(b / a for a, b in zip(found["source"], found["packed"], strict=True))
    return [
        (
            f"start of {n} local machines, packed",
            f"{packed:.2f} s; from source {source:.2f} s; {ratio:.2f} ×",
            "≤ 1.2 ×",
        )
    ]


def sizes(bench: Bench) -> list[Row]:
    before = worker_parts(bench.contents("bigpi"))
    bench.edited(bench.folder / "bigpi.py")
    after = worker_parts(bench.contents("bigpi"))
    sent = sum(size for digest, size in after.items() if digest not in before)
    return [
        ("what a linux/amd64 worker gets of bigpi", f"{sum(before.values()) / 1e6:.2f} MB", "≤ 2 MB"),
        ("what is sent of it again after an edit", f"{sent / 1e3:.1f} kB", "≤ 20 kB"),
    ]


def worker_parts(contents: Mapping[str, Any]) -> dict[str, int]:
    """Digest → bytes that are sent."""
    (platform,) = (each for each in contents["platforms"] if each["platform"] == "linux/amd64")
    return {part["digest"]: part["packed"] for part in platform["parts"] if part["worker"]}


def main() -> None:
    """Measure, and print."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        rows = [*times(bench), *starts(bench, 1), *starts(bench, 5), *sizes(bench)]
    print("| | measured | target |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
