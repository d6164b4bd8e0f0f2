from __future__ import annotations

import hashlib
import io
import json
import random
import stat
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import pytest

from bigmachine.bootstrap.parts import unpack
from bigmachine.cache import Cache
from bigmachine.errors import CacheError, PackError
from bigmachine.pack.closure import worker_names
from bigmachine.pack.image import Manifest, Part, missing
from bigmachine.pack.measure import code_part, wheel_part
from bigmachine.pack.platforms import load
from bigmachine.pack.tars import write_code_tar, write_wheel_tar
from bigmachine.pack.wheels import Wheel

LINUX = load("linux/amd64", "3.12")
DARWIN = load("darwin/arm64", "3.12")

INFO = "x-1.dist-info"
FILES = {
    "x/__init__.py": b"import x.y\n",
    "x/large.bin": bytes(range(256)) * 3000,
    f"{INFO}/METADATA": b"Metadata-Version: 2.1\nName: x\nVersion: 1\n",
    f"{INFO}/RECORD": b"",
}

Entry = tuple[str, bytes, int]
"""A wheel's file, its content and the upper half of its attributes."""


def make_wheel(path: Path, entries: Sequence[Entry], date: int = 1980, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content, mode in entries:
            info = zipfile.ZipInfo(name, (date, 1, 1, 0, 0, 0))
            info.external_attr = mode << 16
            info.compress_type = compression
            archive.writestr(info, content)
    return path


def wheel_of(tmp_path: Path, *more: Entry) -> Path:
    return make_wheel(
        tmp_path / "x-1-py3-none-any.whl", [*((name, data, 0o100644) for name, data in FILES.items()), *more]
    )


def tar_of_wheel(path: Path | IO[bytes]) -> bytes:
    out = io.BytesIO()
    write_wheel_tar(path, out)
    return out.getvalue()


def modes_and_contents(data: bytes) -> dict[str, tuple[int, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = {}
        for info in tar.getmembers():
            assert (info.isreg(), info.mtime, info.uid, info.gid, info.uname, info.gname) == (True, 0, 0, 0, "", "")
            file = tar.extractfile(info)
            assert file is not None
            found[info.name] = (info.mode, file.read())
        assert list(found) == sorted(found)
        return found


def contents(data: bytes) -> dict[str, bytes]:
    return {name: content for name, (_, content) in modes_and_contents(data).items()}


# -- A wheel's tar -------------------------------------------------------------------------------------------------------


def test_a_wheel_is_its_tree(tmp_path: Path) -> None:
    path = wheel_of(tmp_path, ("x/", b"", 0o40755), ("x/π.txt", b"pi", 0), ("x/" + "long" * 60, b"l", 0))
    assert contents(tar_of_wheel(path)) == {**FILES, "x/π.txt": b"pi", "x/" + "long" * 60: b"l"}


def test_the_directories_of_data(tmp_path: Path) -> None:
    path = wheel_of(
        tmp_path,
        ("x-1.data/purelib/x/pure.py", b"1", 0),
        ("x-1.data/platlib/x/native.so", b"2", 0),
        ("x-1.data/data/share/x.conf", b"3", 0),
        ("x-1.data/scripts/x-run", b"#!python\n", 0),
        ("x-1.data/headers/x.h", b"4", 0),
        ("other.data/x.txt", b"5", 0),
    )
    found = modes_and_contents(tar_of_wheel(path))
    assert {name: data for name, (_, data) in found.items() if name not in FILES} == {
        "x/pure.py": b"1",
        "x/native.so": b"2",
        "share/x.conf": b"3",
        "bin/x-run": b"#!python\n",
        "other.data/x.txt": b"5",
    }
    assert [name for name, (mode, _) in found.items() if mode != 0o644] == ["bin/x-run"]


def test_executable_files_stay_so(tmp_path: Path) -> None:
    modes = {
        "plain": 0o100644,
        "run": 0o100755,
        "group": 0o100711,
        "bare": 0o755,
        "dos": 0,
        "link": stat.S_IFLNK | 0o777,
    }
    path = wheel_of(tmp_path, *((f"x/{name}", b"", mode) for name, mode in modes.items()))
    found = modes_and_contents(tar_of_wheel(path))
    assert {name for name, (mode, _) in found.items() if mode == 0o755} == {"x/run", "x/group", "x/bare"}
    assert {mode for mode, _ in found.values()} == {0o755, 0o644}


def test_the_tar_depends_on_the_content_alone(tmp_path: Path) -> None:
    entries = [(name, data, 0o100644) for name, data in FILES.items()]
    one = tar_of_wheel(make_wheel(tmp_path / "one.whl", entries))
    two = tar_of_wheel(make_wheel(tmp_path / "two.whl", entries[::-1], date=2020, compression=zipfile.ZIP_STORED))
    assert one == two
    changed = [(name, data + b"x", mode) for name, data, mode in entries]
    assert tar_of_wheel(make_wheel(tmp_path / "three.whl", changed)) != one


def test_a_file_object_will_do(tmp_path: Path) -> None:
    path = wheel_of(tmp_path)
    with path.open("rb") as file:
        assert tar_of_wheel(file) == tar_of_wheel(path)
    with pytest.raises(PackError, match=r"^a damaged wheel: a wheel: "):
        tar_of_wheel(io.BytesIO(b"nonsense"))


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/x",
        "x/../../y",
        "x//y",
        "./x",
        "x/.",
        "x-1.data/purelib/../../y",
        "x-1.data/scripts/",
        "x-1.data/data//etc/x",
    ],
)
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    path = wheel_of(tmp_path, (name, b"1", 0))
    if name.endswith("/"):
        assert contents(tar_of_wheel(path)) == FILES
        return
    with pytest.raises(PackError, match=r"^x-1-py3-none-any.whl has a file that would lie outside of its tree: '"):
        tar_of_wheel(path)


def test_a_directory_of_data_that_there_is_not(tmp_path: Path) -> None:
    path = wheel_of(tmp_path, ("x-1.data/secret/x", b"1", 0))
    with pytest.raises(PackError, match=r"has a file that belongs nowhere: x-1.data/secret/x"):
        tar_of_wheel(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["x/__init__.py", "x-1.data/purelib/x/__init__.py"])
def test_two_files_for_one_place(tmp_path: Path, name: str) -> None:
    path = wheel_of(tmp_path, (name, b"1", 0))
    with pytest.raises(PackError, match=r"has two files for one place: x/__init__.py"):
        tar_of_wheel(path)


def test_a_damaged_wheel(tmp_path: Path) -> None:
    path = wheel_of(tmp_path)
    whole = path.read_bytes()
    offset = whole.index(b"x/large.bin") + 200
    damaged = [
        b"nonsense",
        whole[:-30],
        whole[:offset] + bytes(20) + whole[offset + 20 :],
        whole.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"),  # Encrypted.
    ]
    assert whole not in damaged
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(PackError, match=r"^a damaged wheel: x-1-py3-none-any.whl: .*; remove it"):
            tar_of_wheel(path)


def test_a_wheel_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tar_of_wheel(tmp_path / "none.whl")


def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    path = wheel_of(tmp_path, ("x/zeros", bytes(16 << 20), 0))

    class Sink(io.RawIOBase):
        def write(self, data: Any) -> int:
            return len(data)

    out: Any = Sink()
    tracemalloc.start()
    try:
        write_wheel_tar(path, out)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


# -- Parts ---------------------------------------------------------------------------------------------------------------


def wheel_at(path: Path) -> Wheel:
    data = path.read_bytes()
    return Wheel("x", "1", path.name, hashlib.sha256(data).hexdigest(), path, len(data), ())


def test_a_part_is_measured(tmp_path: Path) -> None:
    path = wheel_of(tmp_path, ("x/noise", random.Random(1).randbytes(100_000), 0))
    part = wheel_part(wheel_at(path), Cache(tmp_path / "cache"), worker=True)
    tar = tar_of_wheel(path)
    digest = hashlib.sha256(tar).hexdigest()
    assert part == Part("x", "1", "distribution", digest, len(tar), len(zlib.compress(tar, 6)), True, path.name)
    unpack(io.BytesIO(tar), tmp_path / "unpacked", part.digest, part.size)
    assert (tmp_path / "unpacked" / "x" / "large.bin").read_bytes() == FILES["x/large.bin"]


def test_a_wheel_is_read_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    wheel = wheel_at(wheel_of(tmp_path))
    first = wheel_part(wheel, cache, worker=True)
    wheel.path.unlink()
    # What is kept is of the content: not who needs it, nor what the file is called.
    again = replace(wheel, filename="x-1-1-py3-none-any.whl")
    assert wheel_part(again, cache, worker=False) == replace(first, worker=False, file=again.filename)
    with pytest.raises(FileNotFoundError):
        wheel_part(replace(wheel, sha256="0" * 64), cache, worker=True)
    assert len(list((cache.root / "parts").iterdir())) == 1


@pytest.mark.parametrize("text", ["", "[1", "{}", "7", "[1, 2]"])
def test_a_damaged_cache(tmp_path: Path, text: str) -> None:
    cache = Cache(tmp_path / "cache")
    wheel = wheel_at(wheel_of(tmp_path))
    wheel_part(wheel, cache, worker=True)
    (found,) = cache.root.glob("parts/*/part.json")
    found.write_text(text)
    with pytest.raises(CacheError, match=r"^the cache is damaged: .*; bigmachine cache clear"):
        wheel_part(wheel, cache, worker=True)


def test_the_part_of_the_code(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_bytes(b"#!/bin/sh\n")
    (tmp_path / "run.sh").chmod(0o700)
    (tmp_path / "app.py").write_bytes(b"1")
    (tmp_path / "app.py").chmod(0o600)
    files = {"pkg/run.sh": tmp_path / "run.sh", "app.py": tmp_path / "app.py"}
    out = io.BytesIO()
    write_code_tar(files, out)
    assert modes_and_contents(out.getvalue()) == {"app.py": (0o644, b"1"), "pkg/run.sh": (0o755, b"#!/bin/sh\n")}
    part = code_part(files)
    assert (part.kind, part.version, part.file, part.worker) == ("code", "", "", True)
    assert (part.digest, part.size) == (hashlib.sha256(out.getvalue()).hexdigest(), len(out.getvalue()))
    # The same from bytes, as a packed file has them.
    assert code_part({"app.py": b"1", "pkg/run.sh": (b"#!/bin/sh\n", True)}) == part
    assert code_part({"app.py": b"1", "pkg/run.sh": (b"#!/bin/sh\n", False)}) != part
    assert code_part(files, "bigpi") == replace(part, name="bigpi")


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "", "a\0b", "./x"])
def test_code_that_leads_elsewhere(name: str) -> None:
    with pytest.raises(PackError, match=r"^the program has a file that would lie outside of its tree: "):
        code_part({name: b"1"})


def test_code_whose_name_is_not_text() -> None:
    with pytest.raises(PackError, match=r"^the program has a file whose name is not UTF-8: 'a\\udcff'; rename it$"):
        code_part({"a\udcff": b"1"})


# -- The manifest ----------------------------------------------------------------------------------------------------------


def part(name: str, worker: bool = True, digest: str = "") -> Part:
    return Part(name, "1", "distribution", digest or name, 10, 5, worker, f"{name}-1-py3-none-any.whl")


def test_a_manifest_as_json() -> None:
    manifest = Manifest("linux/amd64", "3.12", (part("h2"), part("boto3", worker=False)))
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert manifest.worker() == (part("h2"),)


@pytest.mark.parametrize("value", [{}, {"platform": "a", "python": "3"}, {"platform": "", "python": "", "parts": [{}]}])
def test_what_is_no_manifest(value: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError)):
        Manifest.from_json(value)


def test_what_is_missing() -> None:
    want = [part("c"), part("a"), part("b"), part("a2", digest="a")]
    assert missing([], want) == want[:3]
    assert missing({"a", "other"}, want) == [want[0], want[2]]
    assert missing({"a", "b", "c"}, iter(want)) == []
    assert missing({"a": 1}, []) == []


# -- What a worker needs ---------------------------------------------------------------------------------------------------


def wheels(**requires: Sequence[str]) -> list[Wheel]:
    return [
        Wheel(name.replace("_", "-"), "1", f"{name}-1-py3-none-any.whl", "", Path(), 0, tuple(lines))
        for name, lines in requires.items()
    ]


TOOLKIT = wheels(
    bigmachine=[
        "h2>=4.1",
        "cloudpickle>=3.0",
        "psutil>=5.9",
        "cryptography>=42",
        "platformdirs",
        "boto3>=1; extra == 'ec2'",
    ],
    h2=["hyperframe<7,>=6.1", "hpack<5,>=4.1"],
    hpack=[],
    hyperframe=[],
    cloudpickle=[],
    psutil=["pytest; extra == 'test'"],
    cryptography=["cffi>=1.14; platform_python_implementation != 'PyPy'", "bcrypt>=3.1.5; extra == 'ssh'"],
    cffi=["pycparser; implementation_name != 'PyPy'"],
    pycparser=[],
    platformdirs=[],
    boto3=["botocore<2,>=1"],
    botocore=["python-dateutil", "urllib3"],
    python_dateutil=["six>=1.5"],
    six=[],
    urllib3=[],
    pytest=[],
)

LEAST = frozenset({"bigmachine", "h2", "hpack", "hyperframe", "cloudpickle", "psutil"})


@pytest.mark.parametrize(
    ("roots", "more"),
    [
        ([], set()),
        (["bigmachine"], set()),
        (["bigmachine[ec2]"], set()),
        (["h2"], set()),
        (["cryptography"], {"cryptography", "cffi", "pycparser"}),
        (["Cryptography >= 42"], {"cryptography", "cffi", "pycparser"}),
        (["boto3"], {"boto3", "botocore", "python-dateutil", "six", "urllib3"}),
        (["python_dateutil"], {"python-dateutil", "six"}),
        (["psutil[test]"], {"pytest"}),
        (["unheard-of"], set()),
    ],
)
def test_the_closure(roots: list[str], more: set[str]) -> None:
    assert worker_names(TOOLKIT, roots, LINUX) == LEAST | more
    assert worker_names(TOOLKIT[::-1], roots, LINUX) == LEAST | more


def test_what_builds_on_bigmachine_does_not_ask_for_the_driver() -> None:
    assert worker_names([*TOOLKIT, *wheels(tool=["bigmachine[ec2]", "six"])], ["tool"], LINUX) == LEAST | {
        "tool",
        "six",
    }


def test_extras_are_followed() -> None:
    known = wheels(
        app=["Mid[Fast_Lane,all]>=1"],
        mid=["plain", "fast; extra == 'fast-lane'", "slow; extra == 'slow'", "mid[slow]; extra == 'all'"],
        plain=["app"],
        fast=["mid"],
        slow=[],
        other=[],
    )
    assert worker_names(known, ["app"], LINUX) == {"app", "mid", "plain", "fast", "slow"}
    assert worker_names(known, ["mid"], LINUX) == {"app", "mid", "plain", "fast", "slow"}
    assert worker_names(known, ["mid[slow]"], LINUX) >= {"mid", "slow"}
    assert worker_names([wheel for wheel in known if wheel.name != "app"], ["mid"], LINUX) == {"mid", "plain"}


def test_markers_are_those_of_the_platform() -> None:
    lines = ["mac; sys_platform == 'darwin'", "arm; platform_machine == 'arm64'", "old; python_version < '3.12'", "all"]
    known = wheels(app=lines, mac=[], arm=[], old=[], all=[])
    assert worker_names(known, ["app"], DARWIN) == {"app", "mac", "arm", "all"}
    assert worker_names(known, ["app"], LINUX) == {"app", "all"}
    assert worker_names(known, ["app; sys_platform == 'darwin'"], LINUX) == set()


def test_a_requirement_that_cannot_be_read() -> None:
    with pytest.raises(PackError, match=r"^app-1-py3-none-any.whl has a requirement that cannot be read: six >< 1$"):
        worker_names(wheels(app=["six >< 1"]), ["app"], LINUX)
    with pytest.raises(PackError, match=r"^the program has a requirement that cannot be read: -r x.txt$"):
        worker_names([], ["-r x.txt"], LINUX)
