"""The beginning of a packed file, executed by a shell with Pythons of our making."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bigmachine.pack.header import make_header, with_size
from bigmachine.pack.prelude import SEAL, Damaged, begin, check_whole, seal

SHELLS = [shell for shell in ("sh", "bash", "dash", "zsh", "ksh", "busybox") if shutil.which(shell)]


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """A search path with what a header needs, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in (*SHELLS, "wc"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    return folder


def make_python(search: Path, name: str, minor: str) -> None:
    """It says its version, or with what it was executed."""
    script = f'#!/bin/sh\nif [ "$1" = -E ]; then echo {minor}; else echo "{name}" "$@"; fi\n'
    (search / name).write_text(script)
    (search / name).chmod(0o755)


def make_file(folder: Path, warm: str = "", tail: bytes = b"\0PK\3\4 not for the shell: $(exit 3)\n") -> Path:
    header = make_header("tool", "0.1.0", "3.11", warm)
    file = folder / "a tool"
    file.write_bytes(with_size(header, len(header) + len(tail)) + tail)
    file.chmod(0o755)
    return file


def run(shell: str, search: Path, file: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = ["busybox", "sh"] if shell == "busybox" else [shell]
    return subprocess.run(
        [*command, str(file), *arguments],
        env={"PATH": str(search), **environ},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("shell", SHELLS)
class TestHeader:
    def test_takes_the_python_of_that_version(self, shell: str, search: Path, tmp_path: Path) -> None:
        make_python(search, "python3", "3.12")
        make_python(search, "python3.11", "3.11")
        file = make_file(tmp_path)
        assert run(shell, search, file, "a b", "c").stdout == f"python3.11 -I {file} a b c\n"

    def test_takes_one_without_a_version_in_its_name(self, shell: str, search: Path, tmp_path: Path) -> None:
        make_python(search, "python", "3.11")
        assert run(shell, search, make_file(tmp_path)).stdout.startswith("python -I ")

    def test_passes_over_one_that_does_not_work(self, shell: str, search: Path, tmp_path: Path) -> None:
        """As the shims of version managers."""
        (search / "python3.11").write_text("#!/bin/sh\necho not installed >&2\nexit 127\n")
        (search / "python3.11").chmod(0o755)
        make_python(search, "python3", "3.11")
        done = run(shell, search, make_file(tmp_path))
        assert done.stdout.startswith("python3 -I ")
        assert not done.stderr

    def test_takes_the_one_that_the_user_names(self, shell: str, search: Path, tmp_path: Path) -> None:
        make_python(search, "python3.11", "3.11")
        make_python(search, "mine", "3.11")
        assert run(shell, search, make_file(tmp_path), PEX_PYTHON="mine").stdout.startswith("mine -I ")

    def test_says_which_there_are(self, shell: str, search: Path, tmp_path: Path) -> None:
        make_python(search, "python3", "3.9")
        file = make_file(tmp_path)
        done = run(shell, search, file)
        assert done.returncode == 1
        assert done.stderr == (
            f"bigmachine: {file} needs Python 3.11, and there is 3.9 ({search}/python3): "
            "install it, or pack again with --python\n"
        )

    def test_says_that_there_is_none(self, shell: str, search: Path, tmp_path: Path) -> None:
        assert "and there is none:" in run(shell, search, make_file(tmp_path)).stderr

    def test_a_file_without_its_end(self, shell: str, search: Path, tmp_path: Path) -> None:
        make_python(search, "python3.11", "3.11")
        file = make_file(tmp_path)
        whole = file.stat().st_size
        os.truncate(file, whole - 5)
        done = run(shell, search, file)
        assert done.returncode == 1
        assert done.stderr == (
            f"bigmachine: {file} is damaged: it has {whole - 5} of {whole} bytes; copy or pack it again\n"
        )

    def test_the_warm_way_comes_first(self, shell: str, search: Path, tmp_path: Path) -> None:
        assert run(shell, search, make_file(tmp_path, "echo warm; exit 0\n")).stdout == "warm\n"


def test_the_size_does_not_change_the_header() -> None:
    header = make_header("tool", "0.1.0", "3.11", "")
    assert len({len(with_size(header, size)) for size in (0, 9, 10, 123456789, 10**14)}) == 1


def sealed(folder: Path, content: bytes = b"content") -> Path:
    file = folder / "file"
    file.write_bytes(content + SEAL + hashlib.sha256(content).hexdigest().encode())
    return file


def test_the_seal(tmp_path: Path) -> None:
    file = sealed(tmp_path)
    assert len(seal(str(file))) == 64
    check_whole(str(file))
    begin(str(file), f"{sys.version_info.major}.{sys.version_info.minor}")


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 500])
def test_no_seal(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(Damaged, match="its end is missing"):
        seal(str(tmp_path / "file"))


@pytest.mark.parametrize("at", [0, 3, 6])
def test_a_changed_byte(tmp_path: Path, at: int) -> None:
    file = sealed(tmp_path)
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(Damaged, match="not what was packed"):
        check_whole(str(file))
    with pytest.raises(SystemExit, match=r"^bigmachine: .*not what was packed"):
        begin(str(file), f"{sys.version_info.major}.{sys.version_info.minor}")


def test_another_python(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^bigmachine: file needs Python 3.2, and this is 3\.") as caught:
        begin(str(sealed(tmp_path)), "3.2")
    assert "\n" not in str(caught.value)
