"""The command line: what it asks the packing modules for, what it prints, and how it ends. What packing does is faked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest

from bigmachine.cache import Cache
from bigmachine.cli import arguments, cache, exits, info, main, text
from bigmachine.cli.terminal import progress
from bigmachine.errors import BigmachineError, CacheError, PackError, ResolveError
from bigmachine.info import VERSION
from bigmachine.pack import build
from bigmachine.pack.archive import Contents
from bigmachine.pack.build import BUILDERS, Request, Result
from bigmachine.pack.image import Manifest, Part
from bigmachine.pack.platforms import NAMES
from bigmachine.pack.progress import Progress, Silent

DIGEST = "0123456789abcdef" * 4


def a_part(name: str, version: str = "1.0", kind: str = "distribution", size: int = 2048, worker: bool = True) -> Part:
    return Part(name, version, kind, DIGEST, size, size // 2, worker, f"{name}.whl" if kind == "distribution" else "")


CONTENTS = Contents(
    name="app",
    entry="app.py",
    python="3.12",
    version="0.1.0",
    builder="pex",
    digest=DIGEST,
    origin="requirements.txt",
    requirements=("numpy==2.4.6", "rich>=13"),
    platforms=(
        Manifest("darwin/arm64", "3.12", (a_part("code", "", "code", 512), a_part("numpy", "2.4.6", size=30 << 20))),
        Manifest("linux/amd64", "3.12", (a_part("code", "", "code", 512), a_part("rich", "13.0", worker=False))),
    ),
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMACHINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Request]]:
    """Replaces packing; returns the requests that it gets. It raises `error` where one is given."""

    def replace(error: BaseException | None = None, reused: str = "dependencies") -> list[Request]:
        requests: list[Request] = []

        def fake(request: Request, cache: object, shown: Progress) -> Result:
            requests.append(request)
            shown.step("resolving for linux/amd64")
            shown.note("app.py imports oddments, which is not installed")
            if error is not None:
                raise error
            return Result(
                Path("app.pex"), 3 << 19, CONTENTS, 0.84, ("app.py imports oddments, which is not installed",), reused
            )

        monkeypatch.setattr(build, "pack", fake)
        return requests

    return replace


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Standard output and standard error."""
    captured = capsys.readouterr()
    return captured.out, captured.err


# -- pack ----------------------------------------------------------------------------------------------------------------


def test_pack_says_what_it_made(packing: Callable[..., list[Request]], capsys: pytest.CaptureFixture[str]) -> None:
    packing()
    assert main(["pack", "app.py"]) == exits.DONE
    out, err = said(capsys)
    assert out == (
        "app.pex: 1.5 MiB for darwin/arm64, linux/amd64, Python 3.12, in 0.8 s, "
        "dependencies from the cache, digest 0123456789ab\n"
    )
    # The note comes twice, from the progress and with the result, and is said once.
    assert err == "resolving for linux/amd64\nnote: app.py imports oddments, which is not installed\n"


def test_pack_hands_on_what_was_asked_for(packing: Callable[..., list[Request]]) -> None:
    requests = packing()
    options = "--platform darwin/arm64 --platform linux/amd64 --platform darwin/arm64 --python 3.13 --builder pex"
    files = "-o out.pex -r a.txt -r b.txt --project here --add data --add more --refresh --quiet"
    assert main(["pack", "app.py", *options.split(), *files.split()]) == exits.DONE
    assert requests == [
        Request(
            target=Path("app.py"),
            platforms=("darwin/arm64", "linux/amd64", "darwin/arm64"),
            python="3.13",
            builder="pex",
            output=Path("out.pex"),
            requirements=(Path("a.txt"), Path("b.txt")),
            project=Path("here"),
            add=(Path("data"), Path("more")),
            refresh=True,
        )
    ]


def test_where_no_platform_is_named_packing_chooses(packing: Callable[..., list[Request]]) -> None:
    requests = packing()
    assert main(["pack", "app.py"]) == exits.DONE
    assert requests == [Request(target=Path("app.py"))]


def test_pack_as_json(packing: Callable[..., list[Request]], capsys: pytest.CaptureFixture[str]) -> None:
    packing(reused="")
    assert main(["pack", "app.py", "--json"]) == exits.DONE
    out, err = said(capsys)
    assert err == ""
    assert json.loads(out) == {
        "file": "app.pex",
        "size": 3 << 19,
        "digest": DIGEST,
        "name": "app",
        "entry": "app.py",
        "python": "3.12",
        "builder": "pex",
        "origin": "requirements.txt",
        "requirements": ["numpy==2.4.6", "rich>=13"],
        "platforms": ["darwin/arm64", "linux/amd64"],
        "seconds": 0.84,
        "reused": "",
        "notes": ["app.py imports oddments, which is not installed"],
    }


def test_quiet_says_nothing(packing: Callable[..., list[Request]], capsys: pytest.CaptureFixture[str]) -> None:
    packing()
    assert main(["pack", "app.py", "--quiet"]) == exits.DONE
    assert said(capsys) == ("", "")


# -- How it ends ---------------------------------------------------------------------------------------------------------

STEPS = "resolving for linux/amd64\nnote: app.py imports oddments, which is not installed\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PackError("no such file: app.py"), exits.FAILED, "no such file: app.py"),
        (ResolveError("no such distribution: numpyy"), exits.UNRESOLVED, "no such distribution: numpyy"),
        (CacheError("the cache is in use"), exits.FAILED, "the cache is in use"),
        (PermissionError(13, "Permission denied", "/out/app.pex"), exits.FAILED, "permission denied: /out/app.pex"),
        (OSError("odd"), exits.FAILED, "odd"),
        (OSError(), exits.FAILED, "OSError"),
        (KeyboardInterrupt(), exits.INTERRUPTED, "interrupted"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    packing: Callable[..., list[Request]],
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    packing(error)
    assert main(["pack", "app.py"]) == code
    assert said(capsys) == ("", f"{STEPS}bigmachine: {line}\n")


def test_details_come_after_the_line(packing: Callable[..., list[Request]], capsys: pytest.CaptureFixture[str]) -> None:
    packing(ResolveError("numpy has no wheel", "its wheels are:\nnumpy-2-none-any.whl\n"))
    assert main(["pack", "app.py"]) == exits.UNRESOLVED
    expected = "bigmachine: numpy has no wheel\n  its wheels are:\n  numpy-2-none-any.whl\n"
    assert said(capsys) == ("", STEPS + expected)
    assert main(["pack", "app.py", "--json"]) == exits.UNRESOLVED
    assert said(capsys) == ("", expected)
    assert main(["pack", "app.py", "--quiet"]) == exits.UNRESOLVED
    assert said(capsys) == ("", "bigmachine: numpy has no wheel\n")


def test_what_nobody_expected_is_not_hidden(packing: Callable[..., list[Request]]) -> None:
    packing(ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["pack", "app.py"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: COMMAND; see `bigmachine --help`"),
        ("pakc", "invalid choice: 'pakc' (choose from"),
        ("pack", "the following arguments are required: TARGET; see `bigmachine pack --help`"),
        ("pack app.py --plat linux/amd64", "unrecognized arguments: --plat linux/amd64"),
        ("pack app.py --platform linux/amd46", "no such platform: linux/amd46; did you mean linux/amd64?"),
        ("pack app.py --platform linux/amd64 --python 3.7", "no such Python for linux/amd64: 3.7; there are 3.11"),
        ("pack app.py --python 3.7", "3.7; there are 3.11"),
        ("pack app.py --builder zip", "no such builder: zip; there are pex, shiv"),
        ("cache", "the following arguments are required: ACTION; see `bigmachine cache --help`"),
        ("completion fish", "invalid choice: 'fish'"),
        ("config -bigm.moon=1", "unrecognized arguments: -bigm.moon=1"),
        ("pack app.py -bigm.port=1", "unrecognized arguments: -bigm.port=1"),
        ("doctor", "the following arguments are required: SYSTEM; see `bigmachine doctor --help`"),
        ("doctor moon", "invalid choice: 'moon'"),
        ("doctor ec2 -n 0", "argument -n: not a number of machines: '0'"),
        ("ps -bigm.hosts=ada", "unrecognized arguments: -bigm.hosts=ada"),
        ("gc --dry", "unrecognized arguments: --dry"),
    ],
)
def test_wrong_command_lines(
    packing: Callable[..., list[Request]], capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    requests = packing()
    assert main(line.split()) == exits.WRONG
    out, err = said(capsys)
    assert out == ""
    assert err.startswith("bigmachine: ")
    assert err.count("\n") == 1
    assert message in err
    assert requests == []


def test_a_command_may_print_something_and_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: Namespace) -> str:
        raise errors.pop()

    monkeypatch.setattr(cache, "run", run)
    errors: list[Exception] = [exits.Ended("one\ntwo"), exits.Ended("", 7), BigmachineError("no credentials")]
    assert [main(["cache", "info"]) for _ in range(3)] == [exits.FAILED, 7, exits.FAILED]
    assert said(capsys) == ("one\ntwo\n", "bigmachine: no credentials\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("doctor ec2", {"system": "ec2", "program": None, "n": 1, "json": False, "flags": {}}),
        ("doctor ec2 app.py -n 8 -bigm.ec2ondemand", {"program": Path("app.py"), "n": 8, "flags": {"ec2ondemand": True}}),
        ("ps --all-regions --json", {"all_regions": True, "json": True, "flags": {}}),
        ("gc --dry-run --bigm.ec2region eu-west-1", {"dry_run": True, "flags": {"ec2region": "eu-west-1"}}),
    ],
)
def test_commands_about_machines(line: str, expected: dict[str, object]) -> None:
    words = line.split()
    parsed = vars(arguments.make_parser(words).parse_args(words))
    assert parsed.items() >= {"command": words[0], "quiet": False, **expected}.items()


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == exits.DONE
    assert said(capsys) == (f"bigmachine {VERSION}\n", "")
    assert main(["--help"]) == exits.DONE
    out, _ = said(capsys)
    for code, meaning in exits.MEANINGS.items():
        assert f"  {code:<7}{meaning}\n" in out
    assert main(["pack", "--help"]) == exits.DONE
    words = " ".join(said(capsys)[0].split())
    # The parser does without the modules that know the names.
    assert all(name in words for name in (*NAMES, *BUILDERS))


# -- info ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 3 KiB that is said to hold `CONTENTS`."""
    monkeypatch.setattr(info, "read_contents", lambda path: CONTENTS)
    monkeypatch.setattr(info, "verify", lambda path: None)
    path = tmp_path / "app.pex"
    path.write_bytes(bytes(3072))
    return path


def test_info_shows_what_each_platform_gets(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(packed)]) == exits.DONE
    out, err = said(capsys)
    assert err == ""
    assert (
        out
        == f"""\
{packed}: 3.0 KiB
  program:       app
  runs:          app.py
  Python:        3.12
  digest:        {DIGEST}
  made by:       pex, bigmachine 0.1.0
  requirements:  requirements.txt
    numpy==2.4.6
    rich>=13

darwin/arm64, Python 3.12
  part            version      size   sent as  worker
  (its own code)              512 B     256 B  yes
  numpy           2.4.6    30.0 MiB  15.0 MiB  yes
  a worker gets:  2 parts  30.0 MiB  15.0 MiB sent
  in all:         2 parts  30.0 MiB  15.0 MiB sent

linux/amd64, Python 3.12
  part            version     size  sent as  worker
  (its own code)             512 B    256 B  yes
  rich            13.0     2.0 KiB  1.0 KiB
  a worker gets:   1 part    512 B    256 B sent
  in all:         2 parts  2.5 KiB  1.2 KiB sent
"""
    )


def test_info_as_json(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json", str(packed)]) == exits.DONE
    told = json.loads(said(capsys)[0])
    assert (told["file"], told["size"], told["bigmachine"], told["digest"]) == (str(packed), 3072, "0.1.0", DIGEST)
    linux = told["platforms"][1]
    assert linux["total"] == {"parts": 2, "size": 2560, "packed": 1280}
    assert linux["worker"] == {"parts": 1, "size": 512, "packed": 256}
    assert linux["parts"][1] == {
        "name": "rich",
        "version": "13.0",
        "kind": "distribution",
        "digest": DIGEST,
        "size": 2048,
        "packed": 1024,
        "worker": False,
    }


def test_info_refuses_what_is_not_whole(
    packed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verify(path: Path) -> None:
        raise PackError(f"{path} is damaged")

    monkeypatch.setattr(info, "verify", verify)
    assert main(["info", str(packed)]) == exits.FAILED
    assert said(capsys) == ("", f"bigmachine: {packed} is damaged\n")


def test_info_of_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "none.pex")]) == exits.FAILED
    assert said(capsys) == ("", f"bigmachine: no such file: {tmp_path / 'none.pex'}\n")


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024 * 1024 - 1, "1.0 MiB"),
        (20 << 20, "20.0 MiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_sizes(count: int, shown: str) -> None:
    assert text.size(count) == shown


# -- cache ---------------------------------------------------------------------------------------------------------------


def test_cache_info_and_clear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "cache"
    Cache(root).put("wheels", "abc", lambda folder: (folder / "x.whl").write_bytes(bytes(2048)))
    assert main(["cache", "info"]) == exits.DONE
    first, *kinds = said(capsys)[0].splitlines()
    assert first == f"{root}: 2.0 KiB; another directory: $BIGMACHINE_CACHE"
    assert any(kind.split()[:5] == ["wheels", "1", "entry", "2.0", "KiB"] for kind in kinds)
    assert main(["cache", "info", "--json"]) == exits.DONE
    told = json.loads(said(capsys)[0])
    assert (told["path"], told["bytes"]) == (str(root), 2048)
    assert [(kind["entries"], kind["bytes"]) for kind in told["kinds"] if kind["kind"] == "wheels"] == [(1, 2048)]
    assert main(["cache", "clear"]) == exits.DONE
    assert said(capsys) == (f"removed 2.0 KiB from {root}\n", "")
    assert not (root / "wheels").exists()
    assert main(["cache", "clear"]) == exits.DONE


def test_a_cache_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("BIGMACHINE_CACHE", str(tmp_path / "file"))
    assert main(["cache", "clear"]) == exits.DONE  # Nothing is there.
    assert main(["cache", "info"]) == exits.DONE
    assert "0 entries" in said(capsys)[0]


# -- completion ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", arguments.SHELLS)
def test_shells_can_parse_the_completion(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == exits.DONE
    code, err = said(capsys)
    assert err == ""
    assert all(word in code for word in ("--platform", "linux/amd64", "shiv", "3.14", "clear", "-bigm.ec2publicip"))
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    found = subprocess.run([shell, "-n"], input=code, text=True, capture_output=True, timeout=20)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pack --platform lin", "linux/amd64 linux/arm64"),
        ("config --system l", "local"),
        ("config -bigm.ec2p", "-bigm.ec2profile -bigm.ec2publicip"),
        ("ps -bigm.ec2publicip f", "false"),
        ("gc -bigm.ec2ondemand --dry", "--dry-run"),
        ("doctor e", "ec2"),
        ("profile th", "threads"),
        ("top --sort c", "cpu"),
        ("logs --f", "--follow"),
    ],
)
def test_bash_completes(words: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    main(["completion", "bash"])
    script = tmp_path / "completion.bash"
    script.write_text(said(capsys)[0], "utf-8")
    ask = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_bigmachine; echo "${COMPREPLY[*]}"'
    command = ["bash", "--norc", "-c", ask, str(script), "bigmachine", *words.split()]
    found = subprocess.run(command, text=True, capture_output=True, check=True, timeout=20)
    assert found.stdout.split() == expected.split()


# -- As a process --------------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "bigmachine"]


def test_as_a_process() -> None:
    done = subprocess.run([*COMMAND, "--version"], text=True, capture_output=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"bigmachine {VERSION}\n", "")
    wrong = subprocess.run([*COMMAND, "pack"], text=True, capture_output=True, timeout=20)
    assert (wrong.returncode, wrong.stdout) == (2, "")


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, exits.INTERRUPTED, "interrupted"),
        (signal.SIGTERM, 128 + signal.SIGTERM, "ended by SIGTERM"),
        (signal.SIGHUP, 128 + signal.SIGHUP, "ended by SIGHUP"),
    ],
)
def test_a_signal_ends_it_with_one_line(tmp_path: Path, number: int, code: int, line: str) -> None:
    # The table of contents is a pipe that nobody writes to: it waits there, whatever has been imported by then.
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        "from bigmachine.cli import info, main\n"
        "def wait(path):\n"
        "    print('waiting', flush=True)\n"
        "    return open(path).read()\n"
        "info.verify = wait\n"
        "sys.exit(main(['info', sys.argv[1]]))\n"
    )
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, str(program), str(tmp_path / "pipe")]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "waiting\n"
            process.send_signal(number)
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, err) == (code, f"bigmachine: {line}\n")


@pytest.mark.parametrize("command", [["--help"], ["cache", "info"], ["completion", "bash"]])
def test_a_reader_that_leaves_is_no_error(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Without its buffer argparse notices by itself, and says nothing, not even with an exit code.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([*COMMAND, *command], stdout=write, stderr=subprocess.PIPE, text=True, timeout=20)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (exits.UNREAD, "")


def test_a_full_disk_is_an_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "cache", "info"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (exits.FAILED, "bigmachine: no space left on device\n")


def test_starting_loads_no_more_than_the_command_needs() -> None:
    # Each of these takes longer to load than all that `--version` needs.
    heavy = ("rich", "shtab", "packaging", "platformdirs", "json", "subprocess", "bigmachine.pack", "bigmachine.driver")
    program = "import sys; from bigmachine.cli import main; main(['--version']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=True, timeout=20)
    assert not set(heavy) & set(done.stdout.split())


def test_nothing_is_shown_where_it_is_not_asked_for() -> None:
    with progress(silent=True) as shown:
        assert isinstance(shown, Silent)
