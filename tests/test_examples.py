"""The examples and the README's programs, run as a user runs them: real programs, on real machines of this host.

In the README a Python block is either a file, named in its first line (``# counter.py``), or an excerpt, announced by a comment
in front (``<!-- examples/bigpi.py -->``). The text block that follows a file is what it prints; ``…`` stands for anything.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

import bigmachine
import bigmachine.rpc
from bigmachine.address import parse_address
from bigmachine.testing import TestSystem

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
README = (ROOT / "README.md").read_text(encoding="utf-8")

PATIENCE = 40.0
"""Seconds for one program, which takes one or two on a quiet host."""

ADDRESS = r"https://localhost:\d+/m-[0-9a-f]+/"
STAMP = r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d"


MARK = "BIGMACHINE_TEST_MARK"
"""In the environment of a program, and so of all processes of its machines."""

GONE_WITHIN = 5.0
"""Seconds after the program's end in which the last of them, which only have to end, must have ended."""


@dataclass(frozen=True)
class Ran:
    """How a program ended."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Started:
    """A program that runs."""

    process: subprocess.Popen[str]
    mark: str

    def finish(self, before: str = "") -> Ran:
        """Wait for its end, which must leave nothing behind. `before` is what has been read of its standard error."""
        with self.process as process:
            try:
                stdout, stderr = process.communicate(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                stdout, stderr = process.communicate()
                pytest.fail(f"not ended after {PATIENCE:g} s; it wrote:\n{stdout}\n{before}{stderr}")
        deadline = time.monotonic() + GONE_WITHIN
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert left == []
        return Ran(process.returncode, stdout, before + stderr)

    def processes(self) -> list[psutil.Process]:
        """What lives of the program and its machines."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def _owns(self, process: psutil.Process) -> bool:
        try:
            mark: str | None = process.environ().get(MARK)
            return mark == self.mark and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            return False  # Gone, or somebody else's.


def start(arguments: Sequence[str | Path], directory: Path) -> Started:
    """Start a Python program in `directory`, with every warning an error."""
    mark = secrets.token_hex(8)
    process = subprocess.Popen(
        [sys.executable, "-W", "error", *map(str, arguments)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    return Started(process, mark)


def run(arguments: Sequence[str | Path], directory: Path) -> Ran:
    """Run to the end, which must be a good one."""
    ran = start(arguments, directory).finish()
    assert ran.code == 0, f"ended with code {ran.code}:\n{ran.stdout}\n{ran.stderr}"
    return ran


# -- The examples ----------------------------------------------------------------------------------------------------


def test_bigpi(tmp_path: Path) -> None:
    ran = run([EXAMPLES / "bigpi.py", "-n", "200001", "-nmach", "2"], tmp_path)
    assert re.fullmatch(r"π = 3\.[01]\d+\n", ran.stdout)
    # Machines write when they are ready to; the driver's own lines are in order.
    driver = [line for line in ran.stderr.splitlines() if not line.startswith("https://")]
    shape = [
        "waiting for machines to come online",
        f"machine {ADDRESS} RUNNING",
        f"machine {ADDRESS} RUNNING",
        "all machines are ready",
        "distributing work among 2 cores",
        r"total=\d+ nsamples=200001",
    ]
    assert re.fullmatch(r"bigmachine: status at http://localhost:\d+/debug/bigmachine/", driver.pop(0))
    assert len(driver) == len(shape), ran.stderr
    for line, expected in zip(driver, shape, strict=True):
        assert re.fullmatch(f"{STAMP} {expected}", line)
    machines = sorted(line for line in ran.stderr.splitlines() if line.startswith("https://"))
    assert sorted(line.rpartition(" ")[2] for line in machines) == ["0/100000", "0/100001"]
    assert all(re.fullmatch(f"{ADDRESS}: {STAMP} 0/10000[01]", line) for line in machines)


@pytest.mark.parametrize("flags", [(), ("-bigm.system=test", "--bigm.maxprocs", "1")], ids=["local", "test"])
def test_multisys(tmp_path: Path, flags: tuple[str, ...]) -> None:
    ran = run([EXAMPLES / "multisys.py", "-limit", "20000", "-nmach", "2", *flags], tmp_path)
    heading, *rows, total = ran.stdout.splitlines()
    assert total == "primes=2262 limit=20000"
    assert heading.split() == ["machine", "system", "maxprocs", "calls", "errors", "mean", "ms", "max", "ms"]
    system = "test" if "-bigm.system=test" in flags else "local"
    maxprocs = "1" if "--bigm.maxprocs" in flags else "2"
    for row, (name, processes) in zip(rows, 2 * [(system, maxprocs)] + 2 * [("test", "1")], strict=True):
        assert re.fullmatch(rf"{ADDRESS} +{name}( \(2\))? +{processes} +8 +0 +\d+\.\d +\d+\.\d", row)


def test_wordcount(tmp_path: Path) -> None:
    # More distinct words than a mapper holds, so that it hands over while it reads.
    ran = run([EXAMPLES / "wordcount.py", "-n", "40000", "-nmach", "3", "-top", "2"], tmp_path)
    first, second, total, verdict = ran.stdout.splitlines()
    assert int(first.split()[0]) > int(second.split()[0]) > 0
    assert re.fullmatch(r"words=40000 distinct=\d{4,} machines=3", total)
    assert verdict == "counting in one process gives the same"
    assert len(re.findall(f"^{ADDRESS} has read 1333[34] words$", ran.stderr, re.MULTILINE)) == 3


def test_wordcount_of_files(tmp_path: Path) -> None:
    # Line ends of one file within those of another's shares, no end of the last line, an empty file, no ASCII, no UTF-8.
    (tmp_path / "a").write_text("One two\ntwo three THREE three", encoding="utf-8")
    (tmp_path / "b").write_text("")
    (tmp_path / "c").write_bytes("ünö\n\n\n\n\n".encode() + b"\xff\xfe two-three\n" + b"four " * 4)
    text = "One two\ntwo three THREE three\nünö two-three four four four four"
    expected = Counter(re.findall(r"\w+", text.lower()))
    ran = run([EXAMPLES / "wordcount.py", "-nmach", "2", "-bigm.system", "test", "a", "b", "c"], tmp_path)
    *rows, total, verdict = ran.stdout.splitlines()
    assert {word: int(count) for count, word in (row.split() for row in rows)} == expected
    assert total == f"words={expected.total()} distinct={len(expected)} machines=2"
    assert verdict == "counting in one process gives the same"


@pytest.mark.parametrize(
    ("name", "arguments", "ready"),
    [
        ("bigpi.py", ("-n", "10000000000", "-nmach", "2"), "distributing work"),
        ("multisys.py", ("-limit", "100000000"), "are ready"),
        ("wordcount.py", ("-n", "1000000000", "-nmach", "2"), "are ready"),
    ],
)
def test_an_example_that_is_interrupted_ends_at_once(
    tmp_path: Path, name: str, arguments: tuple[str, ...], ready: str
) -> None:
    program = start([EXAMPLES / name, *arguments], tmp_path)
    process = program.process
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    assert process.stderr is not None
    before = ""
    while ready not in before:
        line = process.stderr.readline()
        assert line, f"it ended before it said {ready!r}:\n{before}"
        before += line
    watchdog.cancel()
    time.sleep(0.3)  # In the middle of its work.
    if name == "bigpi.py":
        assert len(program.processes()) > 2  # That they are found, as long as they live.
    process.send_signal(signal.SIGINT)
    begun = time.monotonic()
    ran = program.finish(before)
    assert time.monotonic() - begun < 10.0
    assert ran.code != 0
    assert "Exception ignored" not in ran.stderr


# -- The README ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A Python block of the README. `excerpt_of` is a file of the repository, `name` that of a program; one is empty."""

    code: str
    excerpt_of: str
    name: str
    output: str | None


def blocks(text: str) -> list[Block]:
    """The Python blocks of a README."""
    found = []
    for match in re.finditer(r"(?:<!-- (\S+) -->\n)?```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        following = re.match(
            r"\n*(?:    \$ [^\n]*\n\n)?```text\n(.*?)^```$", text[match.end() :], re.MULTILINE | re.DOTALL
        )
        named = re.match(r"# (\w+\.py)\n", match[2])
        name = named[1] if named else ""
        found.append(Block(match[2], match[1] or "", name, following[1] if following else None))
    return found


BLOCKS = blocks(README)
PROGRAMS = {block.name: block for block in BLOCKS if block.name}
EXCERPTS = [block for block in BLOCKS if block.excerpt_of]


def test_every_python_block_is_a_program_or_an_excerpt() -> None:
    assert BLOCKS
    assert [block.code for block in BLOCKS if bool(block.name) == bool(block.excerpt_of)] == []
    assert len(BLOCKS) == README.count("```python")


@pytest.mark.parametrize("block", EXCERPTS, ids=lambda block: block.code.strip().splitlines()[0].strip())
def test_excerpts_are_true(block: Block) -> None:
    source = (ROOT / block.excerpt_of).read_text(encoding="utf-8")
    assert block.code in source, "the README quotes what the file does not say (any more)"


@pytest.mark.parametrize("name", [name for name in PROGRAMS if not name.startswith("test_")])
def test_programs_print_what_is_said(tmp_path: Path, name: str) -> None:
    output = PROGRAMS[name].output
    assert output is not None, "the README does not say what it prints"
    program = tmp_path / name
    program.write_text(PROGRAMS[name].code, encoding="utf-8")
    ran = run([program], tmp_path)
    expected = re.escape(output).replace("…", ".*")
    assert re.fullmatch(expected, ran.stdout), f"{ran.stdout}\n{ran.stderr}"


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name.startswith("test_")])
def test_tests_pass(tmp_path: Path, name: str) -> None:
    for block in PROGRAMS.values():
        (tmp_path / block.name).write_text(block.code, encoding="utf-8")
    ran = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", name], tmp_path)
    tests = PROGRAMS[name].code.count("\ndef test_")
    assert re.search(rf"^{tests} passed", ran.stdout, re.MULTILINE), ran.stdout


def test_the_readme_names_what_there_is() -> None:
    paths = re.findall(r"`((?:examples|benchmarks|bigmachine)/[\w./]+)`", README)
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


# -- The wire's specification ----------------------------------------------------------------------------------------


class PI:
    def sample(self, n: int) -> int:
        return n // 2


def _speaks_http2() -> bool:
    try:
        return "HTTP2" in subprocess.run(["curl", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False


@pytest.mark.skipif(not _speaks_http2(), reason="there is no curl that speaks HTTP/2")
def test_the_curl_line_of_the_specification(tmp_path: Path) -> None:
    """As it stands there, but for the machine's id and port."""
    found = re.search(r"^    (curl .*?)\\\n(.*)$", bigmachine.rpc.__doc__ or "", re.MULTILINE)
    assert found is not None
    with bigmachine.start(TestSystem()) as b:
        (machine,) = b.start(1, {"PI": PI()})
        machine.wait(timeout=PATIENCE)
        b.credentials().write(tmp_path)
        _, port, id = parse_address(machine.addr)
        command = "".join(found.groups()).replace("localhost:42409", f"localhost:{port}").replace("m-7f3a9c", id)
        assert str(port) in command
        assert id in command
        ran = subprocess.run(
            [*shlex.split(command), "--silent", "--show-error", "--max-time", "20"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    assert (ran.stdout, ran.stderr) == ("500000", "")
