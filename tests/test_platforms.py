from __future__ import annotations

import importlib.util
import json
import platform
import re
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
from packaging.markers import Marker
from packaging.tags import sys_tags
from packaging.version import Version

from bigmachine.errors import PackError
from bigmachine.pack import platforms
from bigmachine.pack.platforms import NAMES, PYTHONS, load, this_platform

GENERATOR = Path(__file__).parent.parent / "packaging" / "platforms.py"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("platforms_generator", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_data_files_are_what_the_generator_writes(generator: ModuleType, tmp_path: Path) -> None:
    generator.main(tmp_path)
    assert contents(tmp_path) == contents(Path(platforms.__file__).parent / "platforms_data"), (
        "python packaging/platforms.py"
    )


def test_the_generator_knows_the_same_platforms(generator: ModuleType) -> None:
    assert tuple(target.name for target in generator.TARGETS) == NAMES
    assert generator.PYTHONS == PYTHONS


@pytest.mark.parametrize(("name", "python"), list(product(NAMES, PYTHONS)))
def test_a_complete_platform(name: str, python: str) -> None:
    found = load(name, python)
    data = json.loads(found.complete())
    assert data.keys() == {"marker_environment", "compatible_tags"}
    assert data["compatible_tags"] == list(found.tags)
    assert len(set(found.tags)) == len(found.tags)
    assert all(re.fullmatch(r"(cp|py)3\d*-(cp3\d+|abi3|none)-\w+", tag) for tag in found.tags)
    assert found.tags[0].startswith(f"cp{python.replace('.', '')}-cp{python.replace('.', '')}-")
    assert found.tags[-1] == "py30-none-any"
    assert found.environment()["python_full_version"].startswith(python)
    assert found.complete() == load(name, python).complete()
    assert found == load(name, python)
    assert len({found, load(name, python)}) == 1


def test_the_markers_are_all_of_pep_508() -> None:
    markers = load("linux/arm64", "3.12").environment()
    assert Marker("platform_machine == 'aarch64' and sys_platform == 'linux'").evaluate(markers)
    assert Marker("python_full_version < '3.12.1' and platform_release >= '5.4'").evaluate(markers)
    assert not Marker("os_name == 'nt' or platform_system == 'Darwin' or python_version < '3.12'").evaluate(markers)
    names = "implementation_version platform_python_implementation platform_version implementation_name"
    assert all(markers[name] for name in names.split())
    assert load("darwin/amd64", "3.12").markers["platform_machine"] == "x86_64"
    assert load("darwin/arm64", "3.12").markers["platform_machine"] == "arm64"


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc",
    reason="compares with this interpreter's own tags: for linux/amd64 with glibc",
)
def test_the_tags_are_those_of_an_interpreter_on_that_glibc() -> None:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python not in PYTHONS:
        pytest.skip(f"there is no data for this Python, {python}")
    name, glibc = platform.libc_ver()
    if this_platform() != "linux/amd64" or name != "glibc" or Version(glibc) < Version("2.34"):
        pytest.skip(f"this is not linux/amd64 with glibc 2.34 or later: {this_platform()}, {name} {glibc}")

    def comparable(tag: str) -> bool:
        # Newer glibcs than ours; where a wheel of unknown glibc belongs (linux_x86_64), versions of `packaging` disagree.
        newer = re.search(r"-manylinux_2_(\d+)_", tag)
        return not tag.endswith("-linux_x86_64") and not (newer and int(newer[1]) > 34)

    ours = load("linux/amd64", python).tags
    theirs = [str(tag) for tag in sys_tags()]
    assert list(filter(comparable, ours)) == list(filter(comparable, theirs))
    assert set(ours) - set(theirs) == set()


@pytest.mark.parametrize(
    ("name", "filename", "accepted"),
    [
        ("linux/amd64", "h2-4.3.0-py3-none-any.whl", True),
        ("linux/amd64", "numpy-2.4.0-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl", True),
        ("linux/amd64", "cryptography-46.0.1-cp311-abi3-manylinux_2_34_x86_64.whl", True),
        ("linux/amd64", "x-1-cp311-cp311-manylinux_2_35_x86_64.whl", False),
        ("linux/amd64", "x-1-cp311-cp311-musllinux_1_2_x86_64.whl", False),
        ("linux/amd64", "x-1-cp312-cp312-manylinux_2_17_x86_64.whl", False),
        ("linux/amd64", "x-1-cp311-cp311-manylinux_2_17_aarch64.whl", False),
        ("linux/arm64", "x-1-cp36-abi3-manylinux2014_aarch64.whl", True),
        ("darwin/arm64", "scipy-1.17.0-cp311-cp311-macosx_14_0_arm64.whl", True),
        ("darwin/arm64", "x-1-cp311-cp311-macosx_15_0_arm64.whl", False),
        ("darwin/arm64", "x-1-cp311-cp311-macosx_10_9_x86_64.whl", False),
        ("darwin/arm64", "x-1-cp311-cp311-macosx_10_9_universal2.whl", True),
        ("darwin/amd64", "x-1-cp311-cp311-macosx_10_9_x86_64.whl", True),
        ("darwin/amd64", "x-1-cp311-cp311-macosx_11_0_arm64.whl", False),
        ("linux/amd64", "x-1-7-py2.py3-none-any.whl", True),
        ("linux/amd64", "x-1.tar.gz", False),
        ("linux/amd64", "nonsense.whl", False),
    ],
)
def test_which_wheels_are_accepted(name: str, filename: str, accepted: bool) -> None:
    assert load(name, "3.11").accepts(filename) is accepted


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("linux/x86_64", "did you mean linux/amd64?"),
        ("Linux/AMD64", "did you mean linux/amd64?"),
        ("linux-amd64", "did you mean linux/amd64?"),
        ("lunix/amd64", "did you mean linux/amd64?"),
        ("manylinux2014_x86_64", "did you mean linux/amd64?"),
        ("manylinux_2_28_aarch64", "did you mean linux/arm64?"),
        ("linux/aarch64", "did you mean linux/arm64?"),
        ("linux/arm", "did you mean linux/arm64?"),
        ("macos/arm64", "did you mean darwin/arm64?"),
        ("darwin/aarch64", "did you mean darwin/arm64?"),
        ("darwin/arm46", "did you mean darwin/arm64?"),
        ("macosx_14_0_arm64", "did you mean darwin/arm64?"),
        ("mac-m1", "did you mean darwin/arm64?"),
        ("osx/x64", "did you mean darwin/amd64?"),
        ("linux", "there are linux/amd64, linux/arm64"),
        ("arm64", "there are linux/arm64, darwin/arm64"),
        ("current", f"there are {', '.join(NAMES)}"),
        ("", f"there are {', '.join(NAMES)}"),
    ],
)
def test_a_misspelt_platform(name: str, end: str) -> None:
    with pytest.raises(PackError) as caught:
        load(name, "3.11")
    assert str(caught.value) == f"no such platform: {name}; {end}"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("win/amd64", "Windows"),
        ("win_amd64", "Windows"),
        ("Windows", "Windows"),
        ("musllinux_1_2_x86_64", "Linux without glibc"),
        ("freebsd/amd64", "that system"),
    ],
)
def test_a_platform_that_is_not_supported(name: str, what: str) -> None:
    with pytest.raises(PackError) as caught:
        load(name, "3.11")
    start = f"no such platform: {name}; {what} is not supported, only Linux with glibc and macOS are: "
    assert str(caught.value) == start + ", ".join(NAMES)


@pytest.mark.parametrize("python", ["3.10", "3.11.7", "2.7", ""])
def test_a_python_that_there_is_not(python: str) -> None:
    with pytest.raises(PackError) as caught:
        load("linux/amd64", python)
    assert str(caught.value) == f"no such Python for linux/amd64: {python}; there are 3.11, 3.12, 3.13, 3.14"


def test_this_platform_has_a_name() -> None:
    assert re.fullmatch(r"[a-z0-9]+/\w+", this_platform())
