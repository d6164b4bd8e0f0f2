"""Packed programs, executed: by both builders, on machines of this host and as an image; and what damages do to them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rpc_pair import SOON
from test_layers import DRIVER_ONLY
from wheelhouse import make_wheelhouse, offline

import bigmachine
from bigmachine.cache import Cache
from bigmachine.errors import BootError, CacheError, PackError, ProgramMismatch
from bigmachine.info import platform_name, python_version
from bigmachine.pack import build as build_module
from bigmachine.pack.archive import CODE, CONTENTS, read_contents, verify, write_part
from bigmachine.pack.build import Request, Result, pack
from bigmachine.pack.builders.command import run_tool
from bigmachine.pack.lines import without_login
from bigmachine.pack.progress import Silent
from bigmachine.system import Program

pytestmark = pytest.mark.slow

HERE = platform_name()
RUN_TIMEOUT = 45.0  # The first start of a packed file installs it; the host may be busy. Below pytest's own.

APP = '''\
"""Says what a machine sees."""

import argparse
import sys

import helper

import bigmachine
from bigmachine import State, driver


class Point:
    def __init__(self, x):
        self.x = x


class Service:
    def double(self, point):
        assert type(point) is Point, "by reference, or it is another class"
        return Point(2 * point.x)

    def modules(self):
        return sorted({name.partition(".")[0] for name in sys.modules})

    def can_import(self, name):
        import importlib.util

        return importlib.util.find_spec(name) is not None

    def where(self):
        return sys.argv, sys.path, __file__

    def needs(self, name):
        __import__(name)

    def data(self):
        return helper.data()

    def hash(self):
        return hash("x")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("method")
    parser.add_argument("argument", nargs="?")
    parser.add_argument("-nmach", type=int, default=1)
    driver.add_flags(parser)
    args = parser.parse_args()
    with driver.start() as b:
        for machine in b.start(args.nmach, {"S": Service()}, environ={"PYTHONHASHSEED": "7"}):
            machine.wait(State.RUNNING)
            given = () if args.argument is None else (args.argument,)
            if args.method == "double":
                result = machine.call("S.double", Point(21))
                assert type(result) is Point
                print(result.x)
            elif args.method == "info":
                print(repr(machine.supervisor.call("Supervisor.info", (), {}, 10).digest))
            elif args.method == "input":
                print("running", flush=True)
                input()
            else:
                print(repr(machine.call(f"S.{args.method}", *given)))


if __name__ == "__main__":
    main()
'''

HELPER = """\
from pathlib import Path


def data():
    from package import text

    return text()
"""

PACKAGE = """\
from importlib.resources import files


def text():
    return files(__name__).joinpath("data.txt").read_text()
"""


def write_app(folder: Path) -> Path:
    """The program in `folder`, with a module and a package beside it."""
    (folder / "package").mkdir(parents=True)
    (folder / "app.py").write_text(APP)
    (folder / "helper.py").write_text(HELPER)
    (folder / "package" / "__init__.py").write_text(PACKAGE)
    (folder / "package" / "data.txt").write_text("some data\n")
    return folder / "app.py"


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A directory that all processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "packed"
    folder.mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def once(folder: Path) -> Iterator[bool]:
    """Whether the block is to make `folder`: for one process, while the others wait for it."""
    done = folder.with_suffix(".done")
    with open(folder.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield not done.exists()
        done.touch()


@pytest.fixture(scope="module")
def environ(shared: Path) -> Iterator[Mapping[str, str]]:
    """Of everything that packs or is packed here: an index of what is installed, and caches of the tests' own. A module's
    fixture, as other tests must not see these variables; what takes time is shared."""
    folder = shared
    wheels = folder / "wheels"
    with once(wheels) as mine:
        if mine:
            make_wheelhouse(wheels)
    ours = {
        **offline(wheels),
        "BIGMACHINE_CACHE": str(folder / "cache"),
        "PEX_ROOT": str(folder / "pex"),
        "SHIV_ROOT": str(folder / "shiv"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ours.items():
            patch.setenv(name, value)
        patch.delenv("PYTHONPATH", raising=False)
        yield ours


@pytest.fixture(scope="module")
def app(environ: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, not packed."""
    return write_app(tmp_path_factory.mktemp("app"))


def pack_app(app: Path, output: Path, builder: str = "pex", **more: Any) -> Result:
    return pack(Request(app, platforms=(HERE,), builder=builder, output=output, **more), Cache(), Silent())


@pytest.fixture(scope="module")
def packed(app: Path, shared: Path) -> Mapping[str, Path]:
    """By builder: the packed program, where nothing of its sources is; it has been executed once."""
    folder = shared / "elsewhere"
    files = {"pex": folder / "app.pex", "shiv": folder / "app.pyz"}
    with once(folder) as mine:
        if mine:
            folder.mkdir(exist_ok=True)
            for name, file in files.items():
                run(pack_app(app, file, name).path, "--help")
    return files


def run(*command: str | Path, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=RUN_TIMEOUT, check=False, **options
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(params=["pex", "shiv"])
def file(request: pytest.FixtureRequest, packed: Mapping[str, Path]) -> Path:
    """The packed program, by each builder."""
    return packed[request.param]


# -- Running ---------------------------------------------------------------------------------------------------------


def test_the_builders_variables_of_others_mean_nothing(packed: Mapping[str, Path], tmp_path: Path) -> None:
    """pex leaves ``PEX`` to all that its programs execute."""
    for file in packed.values():
        environ = {**os.environ, "PEX": "/nowhere/other.pex"}
        assert run(file, "double", cwd=tmp_path, env=environ).stdout == "42\n"


def test_classes_of_main_travel_by_reference_both_ways(file: Path, tmp_path: Path) -> None:
    assert run(file, "double", cwd=tmp_path).stdout == "42\n"


def test_modules_and_data_beside_the_script_are_there(file: Path, tmp_path: Path) -> None:
    assert run(file, "data", cwd=tmp_path).stdout == "'some data\\n'\n"


def test_machines_run_what_was_packed_and_nothing_of_the_host(file: Path, tmp_path: Path) -> None:
    (tmp_path / "psutil.py").write_text("raise ImportError('of the host')")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    argv, path, main = eval(run(file, "where", "-nmach", "1", cwd=tmp_path, env=environ).stdout)
    assert argv[1:] == ["where", "-nmach", "1"]
    assert Path(main).name == "app.py"
    assert Path(path[0]) == Path(main).parent
    repository = str(Path(__file__).parent.parent)
    assert not [entry for entry in path if entry.startswith((repository, str(tmp_path)))], path


def test_workers_import_nothing_that_only_a_driver_needs(file: Path, tmp_path: Path) -> None:
    modules = eval(run(file, "modules", cwd=tmp_path).stdout)
    assert {"h2", "bigmachine", "helper"} <= set(modules)
    assert not {*DRIVER_ONLY, "cffi", "pex", "shiv"} & set(modules)


def test_its_driver_serves_the_debug_page(file: Path) -> None:
    command = [file, "input", "-bigm.http=localhost:0"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stderr is not None
        watchdog = threading.Timer(RUN_TIMEOUT, process.kill)
        watchdog.start()
        address = process.stderr.readline().rpartition(" ")[2].strip()
        found = {}
        for name in ("", "static/page.js", "static/page.css", "static/flame.js"):
            with urllib.request.urlopen(address + name, timeout=RUN_TIMEOUT) as answer:
                found[name] = answer.read()
        process.communicate("\n")
        watchdog.cancel()
    assert process.returncode == 0
    page = Path(bigmachine.__file__).parent / "inside" / "page"
    assert found == {name: (page / Path(name or "index.html").name).read_bytes() for name in found}


def test_variables_of_the_interpreter_have_their_effect_on_machines(file: Path, tmp_path: Path) -> None:
    expected = run(sys.executable, "-c", "print(hash('x'))", env={"PYTHONHASHSEED": "7"}).stdout
    assert run(file, "hash", cwd=tmp_path).stdout == expected
    assert run(file, "hash", "-bigm.image", cwd=tmp_path).stdout == expected


def test_the_name_in_its_usage_is_the_files(file: Path) -> None:
    assert run(file, "--help").stdout.startswith(f"usage: {file.name} ")


def test_it_runs_by_a_relative_path_and_through_a_link(packed: Mapping[str, Path], tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "tool").symlink_to(packed["pex"])
    assert run("./tool", "double", cwd=tmp_path / "bin").stdout == "42\n"
    search = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    assert run("tool", "double", cwd=tmp_path, env={**os.environ, "PATH": search}).stdout == "42\n"


def test_once_installed_it_starts_without_the_builder(packed: Mapping[str, Path]) -> None:
    """The way that the header knows is the one that pex takes: else every start would go through pex."""
    run(packed["pex"], "--help")
    lines = run("sh", "-x", packed["pex"], "--help").stderr.splitlines()
    assert "venvs" in lines[-1], lines


@pytest.mark.parametrize("name", ["script", "script.pyw", "script.sh"])
def test_a_script_may_have_any_name(environ: Mapping[str, str], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("print(__name__, __file__.rpartition('/')[2])\n")
    assert run(pack_app(tmp_path / name, tmp_path / "out.pex").path).stdout == f"__main__ {name}\n"


def test_variables_of_the_interpreter_do_not_hide_it(packed: Mapping[str, Path]) -> None:
    for file in packed.values():
        run(file, "--help", env={**os.environ, "PYTHONHOME": "/nowhere"})


def test_a_package_with_main_runs_as_with_m(environ: Mapping[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "tool"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "other.py").write_text("VALUE = 5\n")
    (folder / "__main__.py").write_text("from .other import VALUE\nprint(__name__, __package__, VALUE)\n")
    result = pack_app(folder, tmp_path / "tool.pex")
    assert run(result.path).stdout == "__main__ tool 5\n"


def test_an_uncaught_exception_shows_the_users_frames_alone(environ: Mapping[str, str], tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f():\n    raise KeyError('x')\n\n\nf()\n")
    done = run(pack_app(tmp_path / "bad.py", tmp_path / "bad.pex").path, check=False)
    assert done.returncode == 1
    assert "bigmachine" not in done.stderr.replace(os.environ["BIGMACHINE_CACHE"], "")
    assert done.stderr.endswith("KeyError: 'x'\n")


# -- The image -------------------------------------------------------------------------------------------------------


def test_an_image_has_no_more_than_a_worker_needs(file: Path, tmp_path: Path) -> None:
    for name in ("cryptography", "platformdirs", "packaging"):
        assert run(file, "can_import", name, "-bigm.image", cwd=tmp_path).stdout == "False\n"
    assert run(file, "can_import", "h2", "-bigm.image", cwd=tmp_path).stdout == "True\n"
    assert run(file, "double", "-bigm.image", "-nmach", "2", cwd=tmp_path).stdout == "42\n42\n"


def test_an_image_has_what_the_program_itself_requires(environ: Mapping[str, str], tmp_path: Path) -> None:
    script = write_app(tmp_path / "app")
    block = '# /// script\n# dependencies = ["cryptography", "bigmachine"]\n# ///\n'
    script.write_text(block + APP)
    file = pack_app(script, tmp_path / "app.pex").path
    assert run(file, "can_import", "cryptography", "-bigm.image").stdout == "True\n"
    assert run(file, "can_import", "platformdirs", "-bigm.image").stdout == "False\n"


def test_programs_that_differ_in_what_they_require_have_images_of_their_own(
    environ: Mapping[str, str], tmp_path: Path
) -> None:
    """cryptography is in both files: in one for the driver alone."""
    script = write_app(tmp_path / "app")
    found = []
    for name in ("h2", "cryptography"):
        (tmp_path / "r.txt").write_text(f"{name}\n")
        result = pack_app(script, tmp_path / f"{name}.pex", requirements=(tmp_path / "r.txt",))
        found.append((result.contents.digest, run(result.path, "can_import", "cryptography", "-bigm.image").stdout))
    assert [can for _, can in found] == ["False\n", "True\n"]
    assert found[0][0] != found[1][0]


def test_parts_have_the_digests_that_the_file_says(file: Path) -> None:
    contents = read_contents(file)
    (manifest,) = contents.platforms
    for part in manifest.parts:
        digest = Digest()
        write_part(file, part, digest)  # type: ignore[arg-type]
        assert (digest.size, digest.hash.hexdigest()) == (part.size, part.digest), part


class Digest:
    """A file that is only measured."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.size += len(data)
        return len(data)


def test_both_builders_make_the_same_program(packed: Mapping[str, Path]) -> None:
    pex, shiv = (read_contents(packed[name]) for name in ("pex", "shiv"))
    assert pex.digest == shiv.digest


def test_a_program_that_is_not_packed_packs_itself(app: Path, tmp_path: Path) -> None:
    command = (sys.executable, app, "can_import", "cryptography", "-bigm.image")
    first = run(*command, cwd=tmp_path)
    assert first.stdout == "False\n"
    assert f"bigmachine: packing {app.name}: " in first.stderr
    second = run(*command, cwd=tmp_path)
    assert "resolving" not in second.stderr
    assert "building" not in second.stderr
    assert run(sys.executable, app, "double", "-bigm.image", cwd=tmp_path).stdout == "42\n"


def test_without_a_program_the_toolkit_is_sent(environ: Mapping[str, str]) -> None:
    """As from a notebook: what it defines goes by value."""
    name = "cryptography"

    class Finder:
        def finds(self) -> bool:
            import importlib.util

            return importlib.util.find_spec(name) is not None

    with bigmachine.start(image=True) as b:
        (machine,) = b.start(1, {"F": Finder()})
        assert machine.call("F.finds", timeout=RUN_TIMEOUT) is False


@pytest.mark.parametrize("how", ["script", "directory", "module", "package"])
def test_whatever_is_executed_is_what_is_packed(environ: Mapping[str, str], tmp_path: Path, how: str) -> None:
    package = tmp_path / "tool"
    package.mkdir()
    script = write_app(tmp_path / "app")
    main = package / "__main__.py"
    main.write_text(APP.replace("import helper\n", ""))
    if how in ("module", "package"):
        (package / "__init__.py").write_text("")
    command = {"script": [script.name], "directory": ["../tool"], "module": ["-m", "app"], "package": ["-m", "tool"]}[
        how
    ]
    folder = tmp_path if how == "package" else script.parent
    assert run(sys.executable, *command, "double", "-bigm.image", cwd=folder).stdout == "42\n"


def test_a_program_that_is_in_no_file_cannot_be_an_image(environ: Mapping[str, str]) -> None:
    code = "from bigmachine import driver; driver.start(image=True)"
    done = run(sys.executable, "-c", code, check=False)
    assert "the program, and it is not in a file" in done.stderr


# -- The same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", ["pex", "shiv"])
def test_the_same_inputs_give_the_same_bytes(app: Path, tmp_path: Path, builder: str) -> None:
    other = write_app(tmp_path / "another directory")
    os.utime(other, (0, 0))
    first = pack_app(app, tmp_path / "1", builder)
    again = pack(
        Request(other, platforms=(HERE,), builder=builder, output=tmp_path / "2"), Cache(tmp_path / "cache"), Silent()
    )
    assert again.reused == ""
    assert first.path.read_bytes() == again.path.read_bytes()


def test_shiv_packs_for_one_platform(app: Path, tmp_path: Path) -> None:
    request = Request(app, platforms=("linux/amd64", "darwin/arm64"), builder="shiv", output=tmp_path / "app.pyz")
    with pytest.raises(PackError, match="shiv packs for one platform at a time: linux/amd64, darwin/arm64; choose one"):
        pack(request, Cache(), Silent())


def test_where_requirements_are_written_down_does_not_matter(environ: Mapping[str, str], tmp_path: Path) -> None:
    found = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        script = write_app(folder / "app")
        (folder / "r.txt").write_text("h2\n")
        found.append(pack_app(script, folder / "out.pex", requirements=(folder / "r.txt",)).path.read_bytes())
    assert found[0] == found[1]


def test_what_was_packed_is_not_packed_again(environ: Mapping[str, str], tmp_path: Path) -> None:
    script = write_app(tmp_path / "app")
    first = pack_app(script, script.parent / "out.pex", add=(script.parent,)).path.read_bytes()
    again = pack_app(script, script.parent / "out.pex", add=(script.parent,))
    assert again.path.read_bytes() == first
    assert "out.pex is a packed program: left out" in again.notes


def test_a_file_that_is_saved_while_it_is_packed(app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is what was measured."""
    script = write_app(tmp_path / "app")
    code_part = build_module.code_part

    def measure(code: Any) -> Any:
        script.write_text("print('saved meanwhile')\n")
        return code_part(code)

    monkeypatch.setattr(build_module, "code_part", measure)
    file = pack_app(script, tmp_path / "app.pex").path
    (manifest,) = read_contents(file).platforms
    digest = Digest()
    write_part(file, manifest.parts[0], digest)  # type: ignore[arg-type]
    assert digest.hash.hexdigest() == manifest.parts[0].digest
    assert run(file, "double").stdout == "42\n"


def test_modules_of_the_working_directory_do_not_get_in_the_way(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('hijacked')\n")
    monkeypatch.chdir(tmp_path)
    pack(Request(app, platforms=(HERE,), output=tmp_path / "app.pex"), Cache(tmp_path / "cache"), Silent())


def test_passwords_in_requirements_stay_here() -> None:
    assert without_login("h2 @ https://user:s3cret@host/h2.whl ; x") == "h2 @ https://host/h2.whl ; x"
    assert without_login("numpy>=2; python_version < '4'") == "numpy>=2; python_version < '4'"


def test_code_that_a_cleaner_of_caches_has_removed(packed: Mapping[str, Path]) -> None:
    run(packed["pex"], "--help")
    for script in Cache().root.glob("programs/*/code/app.py"):
        script.unlink()
    assert run(packed["pex"], "double").stdout == "42\n"


def test_an_interpreter_that_is_gone(packed: Mapping[str, Path], tmp_path: Path) -> None:
    """As after an upgrade: what was installed with it is left aside."""
    environ = {**os.environ, "PEX_ROOT": str(tmp_path / "pex")}
    run(packed["pex"], "--help", env=environ)
    (python,) = (tmp_path / "pex").glob("venvs/*/*/*/bin/python")
    python.unlink()
    assert run(packed["pex"], "--help", env=environ).stdout.startswith("usage: app.pex")


def test_another_byte_is_another_program(app: Path, tmp_path: Path) -> None:
    before = pack_app(app, tmp_path / "1").contents.digest
    other = write_app(tmp_path / "other")
    other.write_text(APP + "\n")
    assert pack_app(other, tmp_path / "2").contents.digest != before


def test_a_machine_that_runs_another_program_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from bigmachine import driver\ndriver.start()\n")
    program = Program((sys.executable, str(script)), cwd=str(tmp_path), digest="0123")
    with bigmachine.start(program=program) as b:
        (machine,) = b.start(1, {"list": []})
        with pytest.raises(BootError) as caught:
            machine.wait(bigmachine.State.RUNNING, SOON)
    assert isinstance(caught.value.__cause__, ProgramMismatch)
    assert "the program's digest differs: 0123 on the driver, none on the machine" in str(caught.value)


# -- Errors ----------------------------------------------------------------------------------------------------------


def test_a_worker_that_misses_a_module_says_what_to_add(file: Path) -> None:
    done = run(file, "needs", "left_behind", check=False)
    assert done.returncode
    assert "No module named 'left_behind'" in done.stderr
    assert "--add left_behind.py" in done.stderr


def test_what_is_there_and_lacks_something_is_not_to_be_added(packed: Mapping[str, Path]) -> None:
    for name in ("json.nothing", "h2.nothing", "winreg"):
        assert "--add" not in run(packed["pex"], "needs", name, check=False).stderr


def test_a_program_that_misses_a_module_at_its_start_says_what_to_add(
    environ: Mapping[str, str], tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text("import importlib\nimportlib.import_module('left_' + 'behind')\n")
    done = run(pack_app(tmp_path / "app.py", tmp_path / "app.pex").path, check=False)
    assert "--add left_behind.py" in done.stderr.splitlines()[-1]


def fake_pythons(folder: Path, minor: str) -> str:
    """A search path on which every Python is of version `minor`; and what a header needs."""
    folder.mkdir()
    for name in ("python3", "python"):
        (folder / name).write_text(f"#!/bin/sh\necho {minor}\n")
        (folder / name).chmod(0o755)
    for tool in ("sh", "wc", "cat"):
        (folder / tool).symlink_to(str(shutil.which(tool)))
    return str(folder)


def test_no_python_of_its_version(file: Path, tmp_path: Path) -> None:
    search = fake_pythons(tmp_path / "bin", "3.9")
    environ = {**os.environ, "PATH": search, "PEX_ROOT": str(tmp_path / "pex")}
    done = run(file, check=False, env=environ)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"needs Python {python_version()}, and there is 3.9 ({search}/python3), 3.9" in line


def test_another_python_by_name(file: Path) -> None:
    # Older ones take no archive with a comment for an archive.
    other = next((found for minor in range(8, 15) if (found := another_python(minor))), None)
    if other is None:
        pytest.skip("no other Python on this host")
    done = run(other, file, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"needs Python {python_version()}, and this is 3." in line


def another_python(minor: int) -> str | None:
    """An interpreter of that minor version that works."""
    roots = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [shutil.which(f"python3.{minor}"), *map(str, roots.glob(f"3.{minor}.*/bin/python"))]
    for path in found:
        if minor != sys.version_info.minor and path and run(path, "-c", "", check=False).returncode == 0:
            return path
    return None


@pytest.mark.parametrize("installed", [True, False])
def test_a_truncated_file(file: Path, tmp_path: Path, installed: bool) -> None:
    environ = dict(os.environ)
    if installed:
        run(file, "--help")
    else:
        environ |= {"PEX_ROOT": str(tmp_path / "pex"), "SHIV_ROOT": str(tmp_path / "shiv")}
    cut = tmp_path / file.name
    cut.write_bytes(file.read_bytes()[:-1000])
    cut.chmod(0o755)
    done = run(cut, "--help", check=False, env=environ)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"{cut} is damaged" in line
    assert "pack it again" in line
    with pytest.raises(PackError, match="is damaged"):
        read_contents(cut)


@pytest.mark.parametrize("installed", [True, False])
def test_a_file_that_was_tampered_with(file: Path, tmp_path: Path, installed: bool) -> None:
    environ = dict(os.environ)
    changed = tmp_path / file.name
    shutil.copy2(file, changed)
    if installed:
        run(changed, "--help")
    else:
        environ |= {name: str(tmp_path / name) for name in ("PEX_ROOT", "SHIV_ROOT", "BIGMACHINE_CACHE")}
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    done = run(changed, "--help", check=False, env=environ)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == f"bigmachine: {changed} is damaged: its content is not what was packed; copy or pack it again"
    with pytest.raises(PackError, match="its content is not what was packed"):
        verify(changed)


def test_files_that_are_no_packed_programs(tmp_path: Path, app: Path) -> None:
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("x", "y")
    for path, reason in (
        (tmp_path / "none", "no such file"),
        (tmp_path, "a directory"),
        (app, "is not a packed program"),
        (archive, "was not packed by bigmachine"),
    ):
        with pytest.raises(PackError, match=reason) as caught:
            read_contents(path)
        assert "\n" not in str(caught.value)


def test_a_file_that_may_not_be_written(app: Path, tmp_path: Path) -> None:
    for output, reason in (
        (tmp_path, "it is a directory"),
        (tmp_path / "none" / "app.pex", "there is no directory"),
        (app, "it is the program itself"),
    ):
        with pytest.raises(PackError, match=reason):
            pack_app(app, output)
    assert app.read_text() == APP


def test_a_disk_that_is_full(app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    pack_app(app, tmp_path / "app.pex")
    before = (tmp_path / "app.pex").read_bytes()
    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(
        PackError, match=r"^cannot write .*app.pex: No space left on device; choose another place with -o$"
    ):
        pack_app(app, tmp_path / "app.pex")
    assert [path.name for path in tmp_path.iterdir()] == ["app.pex"]
    assert (tmp_path / "app.pex").read_bytes() == before


def test_a_link_stays_a_link_and_a_pipe_a_pipe(app: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to("app-1.pex")
    pack_app(app, tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert read_contents(tmp_path / "app-1.pex").name == "app"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PackError, match="it is no regular file"):
        pack_app(app, tmp_path / "pipe")


def test_a_home_that_cannot_be_written_to(packed: Mapping[str, Path], tmp_path: Path) -> None:
    """The code is unpacked into a directory of its own then, which is gone afterwards."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environ = {**os.environ, "BIGMACHINE_CACHE": str(blocked / "cache"), "TMPDIR": str(temporary)}
    assert run(packed["pex"], "double", env=environ).stdout == "42\n"
    assert not list(temporary.glob("bigmachine-*"))


# -- Several at once -------------------------------------------------------------------------------------------------


def test_two_packers_at_once(app: Path, tmp_path: Path, environ: Mapping[str, str]) -> None:
    """In processes of their own, with one empty cache."""
    variables = {**os.environ, "BIGMACHINE_CACHE": str(tmp_path / "cache")}
    outputs = [tmp_path / "1.pex", tmp_path / "2.pex"]
    command = [sys.executable, "-m", "bigmachine", "pack", str(app), "--platform", HERE, "--quiet", "-o"]
    packers = [
        subprocess.Popen([*command, str(output)], env=variables, stderr=subprocess.PIPE, text=True)
        for output in outputs
    ]
    for packer in packers:
        _, errors = packer.communicate(timeout=RUN_TIMEOUT)
        assert packer.returncode == 0, errors
    first, second = (output.read_bytes() for output in outputs)
    assert first == second
    assert not list((tmp_path / "cache" / "unfinished").iterdir())


def test_a_packer_that_is_killed_leaves_nothing_that_hurts(app: Path, tmp_path: Path) -> None:
    variables = {**os.environ, "BIGMACHINE_CACHE": str(tmp_path / "cache")}
    output = tmp_path / "app.pex"
    command = [sys.executable, "-m", "bigmachine", "pack", str(app), "--platform", HERE, "-o", str(output)]
    with subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True) as packer:
        assert packer.stderr is not None
        for line in packer.stderr:
            if "building" in line:
                packer.send_signal(signal.SIGKILL)
                break
        packer.communicate(timeout=RUN_TIMEOUT)
    assert packer.returncode == -signal.SIGKILL
    assert not output.exists()
    assert run(*command, env=variables).returncode == 0
    assert run(output, "double", env=variables).stdout == "42\n"


def test_the_cache_of_a_running_program_is_not_cleared(packed: Mapping[str, Path], environ: Mapping[str, str]) -> None:
    cache = Cache()
    with subprocess.Popen(
        [packed["pex"], "input"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        watchdog = threading.Timer(RUN_TIMEOUT, process.kill)
        watchdog.start()
        assert process.stdout.readline() == "running\n"
        with pytest.raises(CacheError, match="is in use"):
            cache.clear()
        process.communicate("\n")
        watchdog.cancel()
    assert process.returncode == 0


def test_the_file_may_be_replaced_while_it_runs(app: Path, packed: Mapping[str, Path], tmp_path: Path) -> None:
    """Packing again writes another file under the name; machines that start later still get the program that runs."""
    file = tmp_path / "app.pex"
    shutil.copy2(packed["pex"], file)
    other = write_app(tmp_path / "other")
    other.write_text(APP.replace("2 * point.x", "3 * point.x"))
    with subprocess.Popen([file, "input"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        pack_app(other, file)
        process.communicate("\n", timeout=RUN_TIMEOUT)
    assert process.returncode == 0
    assert run(file, "double").stdout == "63\n"


# -- What is in the file ---------------------------------------------------------------------------------------------


def test_the_file_shows_the_users_code_to_any_zip_tool(packed: Mapping[str, Path]) -> None:
    with zipfile.ZipFile(packed["pex"]) as archive:
        names = archive.namelist()
        assert sorted(name.removeprefix(CODE) for name in names if name.startswith(CODE)) == [
            "app.py",
            "helper.py",
            "package/__init__.py",
            "package/data.txt",
        ]
        assert json.loads(archive.read(CONTENTS))["entry"] == "app.py"
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert stat.S_IMODE(packed["pex"].stat().st_mode) & 0o111


def test_the_command_line_tells_what_is_in_it(file: Path) -> None:
    told = json.loads(run(sys.executable, "-m", "bigmachine", "info", "--json", file).stdout)
    assert told["digest"] == read_contents(file).digest
    shown = run(sys.executable, "-m", "bigmachine", "info", file).stdout
    assert told["digest"] in shown
    assert f"{HERE}, Python {python_version()}" in shown


def test_damage_anywhere_is_one_line(packed: Mapping[str, Path], tmp_path: Path) -> None:
    data = packed["pex"].read_bytes()
    damaged = tmp_path / "app.pex"
    for at in range(1, len(data), len(data) // 40):
        damaged.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(PackError) as caught:
            verify(damaged)
        assert "\n" not in str(caught.value)
        with contextlib.suppress(PackError):  # And nothing else.
            read_contents(damaged)


def test_a_machine_says_which_program_it_runs(packed: Mapping[str, Path]) -> None:
    digest = read_contents(packed["pex"]).digest
    assert run(packed["pex"], "info").stdout == f"{digest!r}\n"


def test_an_edit_sends_one_small_part(app: Path, tmp_path: Path) -> None:
    from bigmachine.pack.image import missing

    (before,) = pack_app(app, tmp_path / "1").contents.platforms
    other = write_app(tmp_path / "other")
    other.write_text(APP + "# An edit.\n")
    (after,) = pack_app(other, tmp_path / "2").contents.platforms
    (part,) = missing({part.digest for part in before.worker()}, after.worker())
    assert part.kind == "code"
    assert part.packed < 20_000


def test_a_builders_temporary_files_are_where_somebody_clears_up(tmp_path: Path) -> None:
    """An interrupt kills it."""
    with pytest.raises(PackError, match=f"timeit failed: SystemExit: {tmp_path}\n"):
        run_tool("timeit", ["-n1", "import sys, tempfile", "sys.exit(tempfile.gettempdir())"], {}, tmp_path)
