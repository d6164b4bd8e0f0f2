from __future__ import annotations

import ast
import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import pytest

from bigmachine.bootstrap import parts
from bigmachine.bootstrap.parts import PartError, install, unpack

Change = Callable[[tarfile.TarInfo], None]


def entry(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar_of(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for info, content in entries:
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def unpack_bytes(data: bytes, folder: Path, limit: int | None = None) -> None:
    unpack(io.BytesIO(data), folder, sha256(data), limit)


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_tree(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


class Trickle:
    """A stream that yields what it likes: like a socket's, and not one byte at a time."""

    def __init__(self, data: bytes, at_end: Callable[[], object] = lambda: None) -> None:
        self.data = io.BytesIO(data)
        self.turn = 0
        self.at_end = at_end

    def read(self, size: int) -> bytes:
        self.turn += 1
        found = self.data.read(min(size, 1 + self.turn % 700))
        if not found:
            self.at_end()
        return found


SAMPLE = tar_of(
    entry("a.py", b"print(1)\n"),
    entry("bin/run", b"#!/bin/sh\n", mode=0o755),
    entry("empty", b""),
    entry("pkg/__init__.py", bytes(range(256)) * 5000),
    entry("pkg/data", b"x" * 512),
)


# -- What is unpacked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
def test_files_are_as_in_the_tar(tmp_path: Path, form: int) -> None:
    files = {
        "a.py": b"1",
        "pkg/b": b"x" * 1_000_000,
        "pkg/sub/empty": b"",
        "d" * 90 + "/" + "n" * 100: b"2",
        "e": b"y" * 512,
    }
    data = tar_of(entry("pkg", type=tarfile.DIRTYPE), *(entry(*item) for item in files.items()), form=form)
    unpack_bytes(data, tmp_path / "deep" / "part", len(data))
    assert tree(tmp_path / "deep" / "part") == files
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["part"]


def test_long_names_and_other_alphabets(tmp_path: Path) -> None:
    files = {"/".join(["ü" * 40] * 5): b"long", "π/データ.txt": b"text", "a b\nc": b"blanks"}
    unpack_bytes(tar_of(*(entry(*item) for item in files.items())), tmp_path / "part")
    assert tree(tmp_path / "part") == files


def test_modes_are_two(tmp_path: Path) -> None:
    data = tar_of(entry("plain", mode=0o600), entry("run", mode=0o711), entry("suid", mode=0o4755))
    umask = os.umask(0o022)
    try:
        unpack_bytes(data, tmp_path / "part")
    finally:
        os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o7777 for path in (tmp_path / "part").iterdir()}
    assert modes == {"plain": 0o644, "run": 0o755, "suid": 0o755}


def test_an_empty_part(tmp_path: Path) -> None:
    unpack_bytes(tar_of(), tmp_path / "part")
    assert list((tmp_path / "part").iterdir()) == []


def test_a_stream_of_short_reads(tmp_path: Path) -> None:
    stream: Any = Trickle(SAMPLE)
    unpack(stream, tmp_path / "part", sha256(SAMPLE))
    assert len(tree(tmp_path / "part")) == 5


def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    size = 24 << 20
    path = tmp_path / "large.tar"
    with path.open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar, open("/dev/zero", "rb") as zeros:
        info, _ = entry("large")
        info.size = size
        tar.addfile(info, zeros)
    digest = sha256(path.read_bytes())
    tracemalloc.start()
    try:
        with path.open("rb") as stream:
            unpack(stream, tmp_path / "part", digest)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert (tmp_path / "part" / "large").stat().st_size == size


# -- What is refused, and leaves nothing -----------------------------------------------------------------------------------


def refused(tmp_path: Path, data: bytes | IO[bytes], reason: str, digest: str = "", limit: int | None = None) -> None:
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    with pytest.raises(PartError) as caught:
        unpack(stream, tmp_path / "part", digest or sha256(data if isinstance(data, bytes) else b""), limit)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_digest(tmp_path: Path) -> None:
    refused(tmp_path, SAMPLE, f"have the digest {sha256(SAMPLE)}; fetch it again", digest="0" * 64)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 600, 2000, 500_000])
def test_truncation(tmp_path: Path, size: int) -> None:
    refused(tmp_path, SAMPLE[:size], f"cut short, after {size} bytes", digest=sha256(SAMPLE))
    refused(tmp_path, SAMPLE[:size], f"cut short, after {size} bytes")


def test_truncation_in_the_padding(tmp_path: Path) -> None:
    refused(tmp_path, SAMPLE[:-1], "have the digest", digest=sha256(SAMPLE))


def test_bytes_after_the_end(tmp_path: Path) -> None:
    refused(tmp_path, SAMPLE + b"x", "bytes follow its end")


@pytest.mark.parametrize("offset", [0, 100, 124, 148, 156, 257, 1024])
def test_a_damaged_header(tmp_path: Path, offset: int) -> None:
    data = bytearray(SAMPLE)
    data[offset] ^= 0x55
    refused(tmp_path, bytes(data), "damaged")


@pytest.mark.parametrize(
    "name", ["/etc/x", "../x", "a/../../x", "a/..", "..", ".", "./a", "a//b", "a/./b", "a\0b", "", "/", "//x"]
)
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    safe = entry("safe", b"1")
    reason = "it has a file called" if name else ""
    refused(tmp_path, tar_of(safe, entry("x", b"2", pax_headers={"path": name})) if name else tar_of(entry("")), reason)
    if name and "\0" not in name and not name.endswith("/"):
        refused(tmp_path, tar_of(safe, entry(name, b"2"), form=tarfile.USTAR_FORMAT), reason)


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, b"S"],
)
def test_what_is_no_file(tmp_path: Path, kind: bytes) -> None:
    data = tar_of(entry("safe", b"1"), entry("bad", type=kind, linkname="/etc/passwd"))
    refused(tmp_path, data, "'bad' is neither a file nor a directory")


def test_a_global_header_is_refused(tmp_path: Path) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", pax_headers={"path": "elsewhere"}) as tar:
        tar.addfile(entry("a")[0])
    refused(tmp_path, out.getvalue(), "it has a file called '././@PaxHeader'")


def test_a_gnu_tar_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, tar_of(entry("a"), form=tarfile.GNU_FORMAT), "no POSIX tar")


def test_a_name_that_is_twice_in_it(tmp_path: Path) -> None:
    refused(tmp_path, tar_of(entry("a/b", b"1"), entry("a/b", b"2")), "'b' is in it twice")


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a")])
def test_a_file_where_a_directory_is(tmp_path: Path, names: tuple[str, str]) -> None:
    refused(tmp_path, tar_of(*(entry(name, b"1") for name in names)), "")


def test_very_long_names(tmp_path: Path) -> None:
    refused(tmp_path, tar_of(entry("a" * 300)), "File name too long")
    refused(tmp_path, tar_of(entry("/".join(["a" * 100] * 11))), "a name of 1110 bytes")
    refused(tmp_path, tar_of(entry("a", pax_headers={"path": "x" * 20_000})), "an extended header has 20012 bytes")


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    data = bytearray(tar_of(entry("a?")))
    data[1] = 0xFF
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + sum(data[156:512]) + 8 * 32)
    refused(tmp_path, bytes(data), "not UTF-8")


@pytest.mark.parametrize(
    "record", [b"9 path", b"99 path=a\n", b"0 path=a\n", b"x path=a\n", b"\n", b"8 path=a", b"-9 path=a\n"]
)
def test_a_damaged_extended_header(tmp_path: Path, record: bytes) -> None:
    info, _ = entry("x", record, type=tarfile.XHDTYPE)
    data = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + tar_of(entry("a"))
    refused(tmp_path, data, "")


@pytest.mark.parametrize("size", ["-1", "1e3", "٣", "", "9" * 17])
def test_a_size_that_is_none(tmp_path: Path, size: str) -> None:
    refused(tmp_path, tar_of(entry("a", b"1", pax_headers={"size": size})), "damaged")


def test_more_than_was_announced(tmp_path: Path) -> None:
    data = tar_of(entry("bomb", bytes(3 << 20)))
    refused(tmp_path, data, "longer than the 100000 bytes", limit=100_000)
    refused(tmp_path, data, "longer than", limit=len(data) - 1)
    unpack_bytes(data, tmp_path / "part", len(data))


def test_a_stream_that_fails(tmp_path: Path) -> None:
    def fail() -> None:
        raise ConnectionResetError(errno.ECONNRESET, "reset by peer")

    stream: Any = Trickle(SAMPLE[:5000], fail)
    refused(tmp_path, stream, "the stream failed after 5000 bytes")


def test_what_the_stream_raises_otherwise_passes_and_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    stream: Any = Trickle(SAMPLE[:5000], fail)
    with pytest.raises(KeyboardInterrupt):
        unpack(stream, tmp_path / "part", sha256(SAMPLE))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_really = os.open

    def open_full(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        return (
            open_really("/dev/full", os.O_WRONLY)
            if flags & os.O_EXCL
            else open_really(path, flags, mode, dir_fd=dir_fd)
        )

    monkeypatch.setattr(os, "open", open_full)
    refused(tmp_path, SAMPLE, f"no space left for {tmp_path}/part: free some")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PartError, match=r"^cannot make .*file/part: Not a directory"):
        unpack_bytes(SAMPLE, tmp_path / "file" / "part")
    with pytest.raises(PartError, match=r"^cannot make .*file: "):
        unpack_bytes(SAMPLE, tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# -- Several at once -----------------------------------------------------------------------------------------------------


def test_a_part_that_is_there_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    stream = io.BytesIO(SAMPLE)
    unpack(stream, tmp_path / "part", sha256(SAMPLE))
    assert stream.tell() == 0


def test_the_first_of_two_wins(tmp_path: Path) -> None:
    stream: Any = Trickle(SAMPLE, lambda: unpack_bytes(SAMPLE, tmp_path / "part"))
    unpack(stream, tmp_path / "part", sha256(SAMPLE))
    assert len(tree(tmp_path / "part")) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("parts", sys.argv[1])
parts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parts)

class Stream:
    def read(self, size):
        print("reading", flush=True)
        self.read = sys.stdin.buffer.read
        return self.read(size)

parts.unpack(Stream(), sys.argv[2] + "/part", sys.argv[3])
parts.install([sys.argv[2] + "/part"], sys.argv[2] + "/site")
assert not [name for name in sys.modules if name.startswith("bigmachine")]
"""


def run(python: str, folder: Path) -> subprocess.Popen[bytes]:
    command = [python, "-I", "-S", "-W", "error", "-c", SCRIPT, parts.__file__, str(folder), sha256(SAMPLE)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_two_processes_at_once(tmp_path: Path) -> None:
    with run(sys.executable, tmp_path) as one, run(sys.executable, tmp_path) as two:
        for process in (one, two):
            assert process.stdout is not None
            assert process.stdout.readline() == b"reading\n"  # So neither finds the part of the other.
        for process in (one, two):
            process.communicate(SAMPLE, 30)
        assert (one.returncode, two.returncode) == (0, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part", "site"]
    assert len(tree(tmp_path / "site")) == 5


# -- One tree ------------------------------------------------------------------------------------------------------------


def test_install_links_and_the_first_wins(tmp_path: Path) -> None:
    one = make_tree(tmp_path / "one", {"a.py": b"1", "pkg/b.py": b"1", "pkg/sub/c.py": b"1"})
    two = make_tree(tmp_path / "two", {"a.py": b"2", "pkg/d.py": b"2", "top": b"2"})
    install([one, two], tmp_path / "site")
    expected = {"a.py": b"1", "pkg/b.py": b"1", "pkg/sub/c.py": b"1", "pkg/d.py": b"2", "top": b"2"}
    assert tree(tmp_path / "site") == expected
    assert (tmp_path / "site" / "a.py").samefile(one / "a.py")
    assert tree(two)["a.py"] == b"2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "site", "two"]


def test_install_copies_where_it_cannot_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: str, target: str) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    one = make_tree(tmp_path / "one", {"bin/run": b"1"})
    (one / "bin" / "run").chmod(0o755)
    two = make_tree(tmp_path / "two", {"bin/run": b"2", "b": b"2"})
    install([one, two], tmp_path / "site")
    assert tree(tmp_path / "site") == {"bin/run": b"1", "b": b"2"}
    assert os.access(tmp_path / "site" / "bin" / "run", os.X_OK)
    assert not (tmp_path / "site" / "b").samefile(two / "b")


@pytest.mark.parametrize("order", [("one", "two"), ("two", "one")])
def test_install_refuses_a_file_where_a_directory_is(tmp_path: Path, order: tuple[str, str]) -> None:
    make_tree(tmp_path / "one", {"a": b"1"})
    make_tree(tmp_path / "two", {"a/b": b"2"})
    with pytest.raises(PartError, match=r"^cannot make .*site: .*unfinished"):
        install([tmp_path / name for name in order], tmp_path / "site")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_install_misses_a_part(tmp_path: Path) -> None:
    with pytest.raises(PartError, match=r"No such file or directory: .*none"):
        install([tmp_path / "none"], tmp_path / "site")
    assert list(tmp_path.iterdir()) == []


def test_install_leaves_a_site_that_is_there(tmp_path: Path) -> None:
    site = make_tree(tmp_path / "site", {"a": b"0"})
    install([make_tree(tmp_path / "one", {"a": b"1", "b": b"1"})], site)
    assert tree(site) == {"a": b"0"}


# -- An island -----------------------------------------------------------------------------------------------------------


def test_it_imports_the_standard_library_alone() -> None:
    """Or each other: they are put into one text, the agent."""
    island = {path.stem: path for path in Path(parts.__file__).parent.glob("*.py")}
    for path in island.values():
        for node in ast.walk(ast.parse(path.read_text("utf-8"), feature_version=(3, 9))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                if isinstance(node, ast.ImportFrom) and node.level:
                    assert node.level == 1, f"{path}:{node.lineno}"
                    assert node.module in island, f"{path}:{node.lineno}"
                    continue
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert all(name and name.partition(".")[0] in sys.stdlib_module_names for name in names), names


def older_python() -> str | None:
    """A Python 3.9, on the path or where pyenv keeps them."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    candidates = [*(str(path) for path in sorted(pyenv.glob("3.9*/bin/python"))), shutil.which("python3.9")]
    for candidate in filter(None, candidates):
        # pyenv's own python3.9 is there without being one, where that version is not chosen.
        if subprocess.run([candidate, "-c", ""], capture_output=True, timeout=30, check=False).returncode == 0:
            return candidate
    return None


def test_it_runs_on_python_3_9(tmp_path: Path) -> None:
    python = older_python()
    if python is None:
        pytest.skip("no Python 3.9 here")
    with run(python, tmp_path) as process:
        process.communicate(SAMPLE, 30)
    assert process.returncode == 0
    assert len(tree(tmp_path / "site")) == 5
