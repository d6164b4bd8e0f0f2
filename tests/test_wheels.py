"""Wheels: read, kept, and made from sources, deterministically."""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import bigmachine
from bigmachine.cache import Cache
from bigmachine.errors import PackError
from bigmachine.info import VERSION
from bigmachine.pack import wheels
from bigmachine.pack.wheels import PACKER, WORKER, module_wheel, read_wheel, shipped_wheel, store_wheel


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def tiny(
    folder: Path, filename: str = "Some_Thing-1.0-py3-none-any.whl", metadata: str = "Requires-Dist: six>=1\n"
) -> Path:
    path = folder / filename
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_thing.py", "")
        archive.writestr(f"{'-'.join(filename.split('-')[:2])}.dist-info/METADATA", f"Name: Some.Thing\n{metadata}")
    return path


def names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def check_record(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        record = next(name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
        rows = list(csv.reader(archive.read(record).decode().splitlines()))
        assert sorted(row[0] for row in rows) == sorted(archive.namelist())
        for name, digest, size in rows:
            if name == record:
                assert (digest, size) == ("", "")
                continue
            content = archive.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert (digest, size) == (f"sha256={expected}", str(len(content)))


# -- Reading and keeping -------------------------------------------------------------------------------------------------


def test_reads_what_a_wheel_says(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    wheel = read_wheel(path)
    assert (wheel.name, wheel.version, wheel.requires) == ("some-thing", "1.0", ("six>=1",))
    assert (wheel.sha256, wheel.size) == (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
    assert (wheel.filename, wheel.path) == (path.name, path)


def test_takes_a_digest_that_is_known(tmp_path: Path) -> None:
    assert read_wheel(tiny(tmp_path), "0" * 64).sha256 == "0" * 64


def test_refuses_what_is_no_wheel(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"not a wheel: .*thing.zip"):
        read_wheel(tiny(tmp_path, "thing.zip"))


def test_refuses_a_damaged_wheel(tmp_path: Path) -> None:
    path = tiny(tmp_path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(PackError, match=r"a damaged wheel: .*remove it"):
        read_wheel(path)


def test_refuses_a_wheel_without_metadata(tmp_path: Path) -> None:
    path = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing.py", "")
    with pytest.raises(PackError, match=r"no METADATA in it"):
        read_wheel(path)


def test_refuses_a_wheel_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"cannot read the wheel .*No such file"):
        read_wheel(tmp_path / "thing-1.0-py3-none-any.whl")


def test_keeps_a_wheel_by_its_content(tmp_path: Path, cache: Cache) -> None:
    path = tiny(tmp_path)
    kept = store_wheel(path, cache)
    assert kept.path == cache.path("wheels", kept.sha256) / path.name
    path.write_bytes(b"built again, in place")
    assert read_wheel(kept.path) == kept
    assert wheels.stored_wheel(kept.sha256, kept.filename, cache) == kept.path
    assert wheels.stored_wheel("0" * 64, kept.filename, cache) is None


# -- bigmachine itself ---------------------------------------------------------------------------------------------------


def test_ships_the_package_that_is_imported(cache: Cache) -> None:
    wheel = shipped_wheel(cache)
    assert (wheel.name, wheel.version) == ("bigmachine", VERSION)
    root = Path(bigmachine.__file__).parent
    sources = {path.relative_to(root.parent).as_posix() for path in root.rglob("*.py")}
    inside = set(names(wheel.path))
    assert sources <= inside
    assert not [name for name in inside if "__pycache__" in name or name.endswith(".pyc")]
    check_record(wheel.path)


def test_shipped_wheel_requires_what_a_worker_needs_and_nothing_of_the_packer(cache: Cache) -> None:
    required = {Requirement(line).name for line in shipped_wheel(cache).requires}
    assert set(WORKER) <= required
    assert "cryptography" in required
    assert not required & {*PACKER, "pytest", "numpy"}


def test_extras_and_the_packers_requirements_are_left_out() -> None:
    lines = [
        "h2>=4.1",
        "pex>=2",
        "Rich",
        'numpy; extra == "dev"',
        "shtab",
        'x; python_version < "3.12" and extra == "y"',
    ]
    assert wheels.shipped_requirements([*lines, 'tomli; python_version < "3.11"']) == [
        "h2>=4.1",
        'tomli; python_version < "3.11"',
    ]


def test_the_same_sources_are_the_same_bytes(tmp_path: Path, cache: Cache) -> None:
    other = shipped_wheel(Cache(tmp_path / "other"))
    wheel = shipped_wheel(cache)
    assert wheel.path.read_bytes() == other.path.read_bytes()
    assert shipped_wheel(cache) == wheel


# -- Editable installs ---------------------------------------------------------------------------------------------------


def package(tmp_path: Path, source: str = "x = 1\n") -> Path:
    folder = tmp_path / "src" / "my_tools"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text(source)
    (folder / "data" / "a,b.txt").write_text("data")
    (folder / "__pycache__").mkdir(exist_ok=True)
    (folder / "__pycache__" / "__init__.cpython-311.pyc").write_bytes(b"")
    return folder


def test_a_package_directory_becomes_a_wheel(tmp_path: Path, cache: Cache) -> None:
    wheel = module_wheel("my_tools", package(tmp_path), cache)
    assert (wheel.name, wheel.requires) == ("my-tools", ())
    assert wheel.filename == f"my_tools-{wheel.version}-py3-none-any.whl"
    assert {name for name in names(wheel.path) if ".dist-info" not in name} == {
        "my_tools/__init__.py",
        "my_tools/data/a,b.txt",
    }
    check_record(wheel.path)


def test_an_edited_package_becomes_another_wheel(tmp_path: Path, cache: Cache) -> None:
    before = module_wheel("my_tools", package(tmp_path), cache)
    assert module_wheel("my_tools", package(tmp_path), cache) == before
    after = module_wheel("my_tools", package(tmp_path, "x = 2\n"), cache)
    assert after.version != before.version
    assert after.sha256 != before.sha256


def test_neither_times_nor_modes_count(tmp_path: Path, cache: Cache) -> None:
    folder = package(tmp_path)
    before = module_wheel("my_tools", folder, cache)
    os.utime(folder / "__init__.py", (1, 1))
    (folder / "__init__.py").chmod(0o700)
    assert module_wheel("my_tools", folder, Cache(tmp_path / "other")).sha256 == before.sha256


def test_a_module_file_becomes_a_wheel(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "single.py").write_text("x = 1\n")
    assert "single.py" in names(module_wheel("single", tmp_path / "single.py", cache).path)


def test_a_package_with_compiled_modules_is_refused(tmp_path: Path, cache: Cache) -> None:
    folder = package(tmp_path)
    (folder / "fast.cpython-311-x86_64-linux-gnu.so").write_bytes(b"")
    with pytest.raises(PackError, match=r"has compiled modules: my_tools/fast\..*; build wheels of it"):
        module_wheel("my_tools", folder, cache)


def test_a_compiled_module_is_refused(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "fast.so").write_bytes(b"")
    with pytest.raises(PackError, match=r"compiled modules: fast.so"):
        module_wheel("fast", tmp_path / "fast.so", cache)


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path, cache: Cache) -> None:
    with pytest.raises(PackError, match=r"cannot read .*gone.py: No such file"):
        module_wheel("gone", tmp_path / "gone.py", cache)
