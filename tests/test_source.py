"""What of a program is the user's own code, and what it imports from elsewhere."""

from __future__ import annotations

import ast
import builtins
import gc
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from bigmachine.errors import PackError
from bigmachine.pack import tree
from bigmachine.pack.imports import syntax
from bigmachine.pack.modules import compiled_in
from bigmachine.pack.source import Source, find_source

MAIN = 'if __name__ == "__main__":\n    pass\n'


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def found(root: Path, files: dict[str, str | bytes], **options: Any) -> Source:
    """The source of ``app.py``, one of `files`."""
    return find_source(write(root, {"app.py": MAIN, **files}) / "app.py", **options)


def refused(root: Path, files: dict[str, str | bytes], target: str = "app.py", **options: Any) -> str:
    write(root, files)
    with pytest.raises(PackError) as caught:
        find_source(root / target, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def names(source: Source) -> list[str]:
    return list(source.files)


# -- The entry -----------------------------------------------------------------------------------------------------------


def test_a_script_alone(tmp_path: Path) -> None:
    source = found(tmp_path, {"other.py": "x = 1", "data.bin": b"\0"})
    assert (source.name, source.entry) == ("app", "app.py")
    assert dict(source.files) == {"app.py": tmp_path / "app.py"}
    assert (source.imports, source.notes) == ({}, ())


def test_a_script_needs_no_suffix(tmp_path: Path) -> None:
    source = find_source(write(tmp_path, {"tool": "#!/usr/bin/env python\nprint(1)\n"}) / "tool")
    assert (source.name, source.entry) == ("tool", "tool")


def test_a_package_runs_as_python_m_runs_it(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "pkg/__init__.py": "",
        "pkg/__main__.py": "from . import part\nimport pkg.sub\nimport beside\nprint(1)",
        "pkg/part.py": "",
        "pkg/sub/__init__.py": "",
        "pkg/data/a.txt": "a",
        "beside.py": "",
        "unused.py": "",
    }
    source = find_source(write(tmp_path, files) / "pkg")
    assert (source.name, source.entry) == ("pkg", "pkg/__main__.py")
    assert set(source.files) == files.keys() - {"unused.py"}
    subprocess.run([sys.executable, "-m", "pkg"], cwd=tmp_path, check=True, capture_output=True)


def test_a_plain_directory_is_its_own_root(tmp_path: Path) -> None:
    write(
        tmp_path, {"prog/__main__.py": "import part\nprint(1)", "prog/part.py": "", "prog/unused.py": "", "part.py": ""}
    )
    source = find_source(tmp_path / "prog")
    assert (source.name, source.entry, names(source)) == ("prog", "__main__.py", ["__main__.py", "part.py"])


def test_the_current_directory_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path / "prog", {"__main__.py": "print(1)"}))
    assert find_source(Path(".")).name == "prog"


def test_a_linked_script_has_its_modules_where_it_lies_itself(tmp_path: Path) -> None:
    write(tmp_path, {"real/app.py": "import part\nprint(part)", "real/part.py": "", "bin/x": ""})
    (tmp_path / "bin/app").symlink_to("../real/app.py")
    assert names(find_source(tmp_path / "bin/app")) == ["app.py", "part.py"]
    subprocess.run([sys.executable, tmp_path / "bin/app"], check=True, capture_output=True)


def test_what_is_not_there(tmp_path: Path) -> None:
    assert refused(tmp_path, {}, "app.py") == f"no such file: {tmp_path / 'app.py'}"
    assert "without __main__.py: give the script" in refused(tmp_path, {"prog/x.py": ""}, "prog")


def test_what_is_no_program(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "neither a script nor a directory" in refused(tmp_path, {}, "pipe")
    assert "is a notebook" in refused(tmp_path, {"a.ipynb": "{}"}, "a.ipynb")
    assert "null bytes" in refused(tmp_path, {"elf": b"\x7fELF\0\0"}, "elf")


def test_a_packed_file(tmp_path: Path) -> None:
    with open(tmp_path / "app.pex", "wb") as file:
        file.write(b"#!/bin/sh\nexit 1\n")
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("__main__.py", "print(1)")
    assert refused(tmp_path, {}, "app.pex").endswith("app.pex is packed already: run it")


# -- Imports -------------------------------------------------------------------------------------------------------------

ANYWHERE = {
    "import": "import part",
    "as": "import part as p, os",
    "from": "from part import x",
    "star": "from part import *",
    "in a function": "def f():\n    import part",
    "in a method": "class A:\n    def f(self):\n        if self:\n            from part import x",
    "in a try": "try:\n    pass\nfinally:\n    import part",
    "in a handler": "try:\n    import foo\nexcept ImportError:\n    import part",
    "in an else": "for x in ():\n    pass\nelse:\n    import part",
    "in a match": "match 1:\n    case 1:\n        import part",
    "in a with": "with open('x') as f:\n    import part",
    "in async code": "async def f():\n    async with f():\n        import part",
    "not for type checkers": "from typing import TYPE_CHECKING\nif not TYPE_CHECKING:\n    import part",
    "else of type checkers": "import typing\nif typing.TYPE_CHECKING:\n    import foo\nelse:\n    import part",
    "import_module": "import importlib\nm = importlib.import_module('part')",
    "import_module by name": "from importlib import import_module\nprint(f(import_module('part').x))",
    "import_module in a lambda": "import importlib\nf = lambda: importlib.import_module('part')",
    "__import__": "m = __import__('part', globals())",
    "in a condition": "import importlib\nif importlib.import_module('part').x:\n    pass",
}


@pytest.mark.parametrize("code", ANYWHERE.values(), ids=ANYWHERE.keys())
def test_an_import_counts_wherever_it_stands(code: str, tmp_path: Path) -> None:
    source = found(tmp_path, {"app.py": f"{code}\n{MAIN}", "part.py": ""})
    assert "part.py" in source.files
    assert "part" not in source.imports


@pytest.mark.parametrize("test", ["TYPE_CHECKING", "typing.TYPE_CHECKING", "t.TYPE_CHECKING"])
def test_imports_for_type_checkers_do_not_count(test: str, tmp_path: Path) -> None:
    source = found(tmp_path, {"app.py": f"if {test}:\n    import part, numpy\n{MAIN}", "part.py": ""})
    assert (names(source), source.imports) == (["app.py"], {})


def test_imports_are_followed(tmp_path: Path) -> None:
    chain = {f"m{i}.py": f"import m{i + 1}, ext{i}" for i in range(5)}
    source = found(tmp_path, {"app.py": f"import m0\n{MAIN}", **chain, "m5.py": "import app, m0", "m6.py": ""})
    assert names(source) == ["app.py", *(f"m{i}.py" for i in range(6))]
    assert source.imports == {f"ext{i}": f"m{i}.py:1" for i in range(5)}


def test_a_package_is_taken_whole(tmp_path: Path) -> None:
    package: dict[str, str | bytes] = {
        "pkg/__init__.py": "",
        "pkg/a.py": "",
        "pkg/unused.py": "import beside",
        "pkg/sub/__init__.py": "from ..other import thing",
        "pkg/sub/deep/data.json": "{}",
        "pkg/other.py": "",
        "pkg/no-module.py": "from . import a",
    }
    source = found(tmp_path, {"app.py": f"from pkg.sub import x\n{MAIN}", **package, "beside.py": "", "else.txt": ""})
    assert set(source.files) == {"app.py", "beside.py", *package}


@pytest.mark.parametrize(
    "line",
    [
        "import ns.inner.mod",
        "from ns.inner import mod",
        "from ns.inner.mod import x",
        "from ns import pkg; import ns.inner.mod",
    ],
)
def test_of_a_namespace_only_what_is_imported_is_taken(line: str, tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"ns/inner/mod.py": "", "ns/inner/no.py": "", "ns/a.txt": ""}
    files |= {"ns/pkg/__init__.py": "", "ns/pkg/data.txt": ""}
    source = found(tmp_path, {"app.py": f"{line}\n{MAIN}", **files})
    whole = ["ns/pkg/__init__.py", "ns/pkg/data.txt"] if "pkg" in line else []
    assert names(source) == ["app.py", "ns/inner/mod.py", *whole]
    assert source.imports == {}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("from . import b", "pkg/b.py"),
        ("from .b import x", "pkg/b.py"),
        ("from .. import pkg2", ""),
        ("from .sub import c", "pkg/sub/c.py"),
        ("import importlib; importlib.import_module('.b', 'pkg')", "pkg/b.py"),
        ("import importlib; importlib.import_module('.b', package=__package__)", "pkg/b.py"),
    ],
)
def test_relative_imports(line: str, wanted: str, tmp_path: Path) -> None:
    # Their targets have imports that must succeed: only what is executed for certain has these.
    files: dict[str, str | bytes] = {"pkg/__init__.py": line, "pkg/b.py": "import foo", "pkg/sub/c.py": "import foo"}
    files["app.py"] = f"import pkg\n{MAIN}"
    if wanted:
        source = found(tmp_path, files)
        assert source.imports["foo"].split(":")[0] == wanted
        assert "foo" not in source.optional
    else:
        assert "pkg/__init__.py:1: relative import beyond the top of the program: .." in refused(tmp_path, files)


def test_a_relative_import_in_a_script(tmp_path: Path) -> None:
    text = refused(tmp_path, {"app.py": f"from .part import x\n{MAIN}", "part.py": ""})
    assert (
        text == "app.py:1: relative import beyond the top of the program: .part; pack the package's directory instead"
    )
    assert found(tmp_path, {"app.py": f"try:\n    from .part import x\nexcept ImportError: x = 0\n{MAIN}"}).notes == ()


def test_roots_come_after_the_scripts_directory(tmp_path: Path) -> None:
    write(tmp_path / "lib", {"part.py": "", "both.py": "import foo", "pkg/__init__.py": "", "pkg/a.py": ""})
    source = found(
        tmp_path / "app", {"app.py": f"import part, both, pkg.a\n{MAIN}", "both.py": ""}, roots=[tmp_path / "lib"]
    )
    assert names(source) == ["app.py", "both.py", "part.py", "pkg/__init__.py", "pkg/a.py"]
    assert source.files["both.py"] == tmp_path / "app/both.py"
    assert source.imports == {}


def test_a_namespace_lies_in_several_roots(tmp_path: Path) -> None:
    write(tmp_path / "lib", {"ns/b.py": ""})
    source = found(tmp_path / "app", {"app.py": f"import ns.a, ns.b\n{MAIN}", "ns/a.py": ""}, roots=[tmp_path / "lib"])
    assert names(source) == ["app.py", "ns/a.py", "ns/b.py"]


# What Python would import of each name, where there is a file of that name beside the script.
SHADOWED = {"colorsys": True, "packaging": True, "sys": False, "time": False, "os": False, "encodings": False}


@pytest.mark.parametrize(("name", "ours"), SHADOWED.items())
def test_a_local_module_wins_where_python_lets_it(name: str, ours: bool, tmp_path: Path) -> None:
    source = found(tmp_path, {"app.py": f"import {name}\nprint(getattr({name}, 'OURS', 0))", f"{name}.py": "OURS = 1"})
    assert (f"{name}.py" in source.files) == ours
    assert source.imports == {}
    output = subprocess.run([sys.executable, tmp_path / "app.py"], check=True, capture_output=True, text=True).stdout
    assert output.strip() == str(int(ours))


@pytest.mark.parametrize("line", ["import packaging", "import packaging.version", "from packaging import version"])
def test_a_directory_without_init_hides_nothing_that_is_installed(line: str, tmp_path: Path) -> None:
    source = found(tmp_path, {"app.py": f"{line}\n{MAIN}", "packaging/version.py": ""})
    assert (names(source), source.imports) == (["app.py"], {"packaging": "app.py:1"})
    assert found(tmp_path, {"app.py": f"import wave\n{MAIN}", "wave/x.py": ""}).imports == {}


def test_a_directory_that_happens_to_have_the_name(tmp_path: Path) -> None:
    source = found(
        tmp_path, {"app.py": f"import docker9\nfrom kafka9 import x\n{MAIN}", "docker9/a": "", "kafka9/b": ""}
    )
    assert (names(source), source.imports) == (["app.py"], {"docker9": "app.py:1", "kafka9": "app.py:2"})
    assert source.optional == {"docker9"}  # Python would succeed, with an empty namespace.


def test_what_is_compiled_in() -> None:
    assert all(map(compiled_in, ("sys", "builtins", "time", "os", "abc", "zipimport", "encodings", "__main__")))
    assert not any(map(compiled_in, ("json", "numpy", "app")))


def test_where_foreign_modules_are_imported(tmp_path: Path) -> None:
    code = f"import os, sys, __main__\nimport bigmachine\nfrom bigmachine import driver\nimport numpy.a\n\nimport numpy\n{MAIN}"
    source = found(tmp_path, {"app.py": code + "import part", "part.py": "\nimport numpy, yaml\nimport asyncio.queues"})
    assert source.imports == {"numpy": "app.py:4", "yaml": "part.py:2"}
    assert source.optional == frozenset()


def test_bigmachine_is_never_own_code(tmp_path: Path) -> None:
    source = found(tmp_path, {"app.py": f"import bigmachine\n{MAIN}", "bigmachine/__init__.py": ""})
    assert (names(source), source.imports) == (["app.py"], {})


def test_places_are_shown_relative_to_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert found(tmp_path / "src", {"app.py": f"import foo\n{MAIN}"}).imports == {"foo": "src/app.py:1"}


OPTIONAL = {
    "try:\n    import foo\nexcept ImportError:\n    foo = None": True,
    "try:\n    import foo\nexcept ModuleNotFoundError:\n    foo = None": True,
    "try:\n    import foo\nexcept (ValueError, ImportError) as e:\n    foo = None": True,
    "try:\n    import foo\nexcept Exception:\n    foo = None": True,
    "try:\n    import foo\nexcept:\n    foo = None": True,
    "try:\n    pass\nexcept ImportError:\n    import foo": True,
    "try:\n    pass\nexcept ImportError:\n    pass\nelse:\n    import foo": True,
    "try:\n    if 1:\n        from foo.bar import x\nexcept ImportError:\n    pass": True,
    "from contextlib import suppress\nwith suppress(ImportError):\n    import foo": True,
    "import sys\nif sys.version_info < (3, 11):\n    import foo": True,
    "import sys\nif sys.platform == 'win32':\n    import foo": True,
    "import os\nif os.name == 'nt':\n    import foo": True,
    "try:\n    import foo\nexcept ValueError:\n    pass": False,
    "try:\n    pass\nexcept ImportError:\n    pass\nfinally:\n    import foo": False,
    "try:\n    pass\nfinally:\n    import foo": False,
    "def f():\n    import foo": False,
    "with open('x'):\n    import foo": False,
    "if x:\n    import foo": False,
}


@pytest.mark.parametrize(("code", "optional"), OPTIONAL.items())
def test_which_imports_are_optional(code: str, optional: bool, tmp_path: Path) -> None:
    source = found(tmp_path, {"app.py": f"{code}\n{MAIN}"})
    assert list(source.imports) == ["foo"]
    assert source.optional == ({"foo"} if optional else set())


def test_one_import_that_must_succeed_is_enough(tmp_path: Path) -> None:
    code = f"try:\n    import foo\nexcept ImportError:\n    pass\nimport part\n{MAIN}"
    source = found(tmp_path, {"app.py": code, "part.py": "import foo"})
    assert (source.imports, source.optional) == ({"foo": "part.py:1"}, frozenset())


def test_what_only_unused_files_of_a_package_import_is_optional(tmp_path: Path) -> None:
    source = found(
        tmp_path,
        {"app.py": f"import pkg\n{MAIN}", "pkg/__init__.py": "import bar", "pkg/tests/test_a.py": "import foo"},
    )
    assert source.imports == {"bar": "pkg/__init__.py:1", "foo": "pkg/tests/test_a.py:1"}
    assert source.optional == {"foo"}


def test_notes_on_imports_that_lead_nowhere_or_anywhere(tmp_path: Path) -> None:
    code = f"import pkg.missing\nfrom pkg import attribute\nimport importlib\nimportlib.import_module(pkg.name)\n{MAIN}"
    source = found(tmp_path, {"app.py": code, "pkg/__init__.py": "from .gone import x"})
    assert source.notes == (
        "app.py:1 imports pkg.missing, which is not there",
        "app.py:4 imports a module whose name is known at run time only: --add it, if it is yours",
        "pkg/__init__.py:1 imports pkg.gone, which is not there",
    )


# -- Files ---------------------------------------------------------------------------------------------------------------

PACKAGE: dict[str, str | bytes] = {"app.py": f"import pkg\n{MAIN}", "pkg/__init__.py": ""}

NEVER = [
    *(".git/config", ".hg/x", ".svn/x", "__pycache__/a.cpython-311.pyc", "a.pyc", "a.pyo", ".mypy_cache/x"),
    *(".pytest_cache/x", ".ruff_cache/x", ".tox/x", ".nox/x", "node_modules/a/x.js", ".ipynb_checkpoints/x", ".eggs/x"),
    *(".DS_Store", "a.py~", ".a.py.swp", "#a.py#", ".#a.py", ".git"),
]


@pytest.mark.parametrize("name", NEVER)
def test_what_is_never_packed(name: str, tmp_path: Path) -> None:
    source = found(tmp_path, {**PACKAGE, f"pkg/{name}": "", f"pkg/data/{name}": "", "pkg/data/kept": ""})
    assert names(source) == ["app.py", "pkg/__init__.py", "pkg/data/kept"]


@pytest.mark.parametrize(
    ("marks", "packed"),
    [
        (["any/pyvenv.cfg"], False),
        ([".venv/bin/python"], False),
        (["venv/bin/python"], False),
        (["env/bin/python"], False),
        (["any/CACHEDIR.TAG"], False),
        (["env/bin/other"], True),
        (["venv/x"], True),
        (["any/bin/python"], True),
        ([".gitignore", "d.py"], True),
    ],
)
def test_environments_and_caches_are_known_by_their_content(marks: list[str], packed: bool, tmp_path: Path) -> None:
    source = found(tmp_path, {**PACKAGE, **{f"pkg/{mark}": "" for mark in marks}})
    assert names(source) == ["app.py", *sorted(["pkg/__init__.py", *(f"pkg/{mark}" for mark in marks if packed)])]


def test_an_environment_is_no_module(tmp_path: Path) -> None:
    source = found(tmp_path, {"app.py": f"import env.thing\n{MAIN}", "env/bin/python": "", "env/thing.py": ""})
    assert (names(source), list(source.imports)) == (["app.py"], ["env"])


def test_extension_modules_are_packed_with_a_note(tmp_path: Path) -> None:
    module = "fast.cpython-311-x86_64-linux-gnu.so"
    source = found(
        tmp_path, {"app.py": f"import fast\n{MAIN}", module: b"\x7fELF\0", "fast.py": "import foo", "faster.so": ""}
    )
    assert names(source) == ["app.py", module, "fast.py"]
    assert source.notes == (f"{module} is an extension module: it fits one platform only",)
    assert source.imports == {"foo": "fast.py:1"}
    source = found(tmp_path, {**PACKAGE, f"pkg/{module}": b""})
    assert f"pkg/{module} is an extension module: it fits one platform only" in source.notes


def test_a_package_with_a_compiled_init(tmp_path: Path) -> None:
    source = found(
        tmp_path, {"app.py": f"import pkg.a\n{MAIN}", "pkg/__init__.abi3.so": b"", "pkg/a.py": "", "pkg/b": ""}
    )
    assert names(source) == ["app.py", "pkg/__init__.abi3.so", "pkg/a.py", "pkg/b"]


def test_links_to_files_and_directories_are_followed(tmp_path: Path) -> None:
    write(tmp_path, {**PACKAGE, "else/model.bin": "m", "else/sub/x.py": ""})
    (tmp_path / "pkg/model").symlink_to(tmp_path / "else/model.bin")
    (tmp_path / "pkg/linked").symlink_to("../else")
    (tmp_path / "part.py").symlink_to("else/sub/x.py")
    source = found(tmp_path, {"app.py": f"import pkg, part\n{MAIN}"})
    linked = ["pkg/linked/model.bin", "pkg/linked/sub/x.py", "pkg/model"]
    assert names(source) == ["app.py", "part.py", "pkg/__init__.py", *linked]
    assert source.files["pkg/model"].read_text() == "m"
    assert source.notes == ()


def test_links_that_form_loops_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, {**PACKAGE, "pkg/a/x": "", "pkg/b/y": ""})
    (tmp_path / "pkg/self").symlink_to(".")
    (tmp_path / "pkg/a/up").symlink_to("../..")
    (tmp_path / "pkg/a/root").symlink_to("/")
    (tmp_path / "pkg/a/b").symlink_to("../b")
    (tmp_path / "pkg/b/a").symlink_to("../a")
    source = found(tmp_path, PACKAGE)
    assert names(source) == ["app.py", "pkg/__init__.py", "pkg/a/b/y", "pkg/a/x", "pkg/b/a/x", "pkg/b/y"]
    loops = ("pkg/a/b/a", "pkg/a/root", "pkg/a/up", "pkg/b/a/b", "pkg/b/a/root", "pkg/b/a/up", "pkg/self")
    assert source.notes == tuple(f"{name} is a symbolic link to a directory that holds it: left out" for name in loops)


def test_links_to_what_is_never_packed_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, {**PACKAGE, ".git/objects/x": "", "box/pyvenv.cfg": "", "box/lib/deep/x": ""})
    for name, target in {"g": "../.git", "o": "../.git/objects", "l": "../box/lib/deep"}.items():
        (tmp_path / "pkg" / name).symlink_to(target)
    source = found(tmp_path, PACKAGE)
    assert names(source) == ["app.py", "pkg/__init__.py"]
    assert source.notes == tuple(f"pkg/{name} is a symbolic link to what is never packed: left out" for name in "glo")


def test_broken_links_and_pipes_are_noted(tmp_path: Path) -> None:
    write(tmp_path, PACKAGE)
    (tmp_path / "pkg/broken").symlink_to("nowhere")
    (tmp_path / "pkg/round").symlink_to("round")
    os.mkfifo(tmp_path / "pkg/pipe")
    source = found(tmp_path, PACKAGE)
    assert names(source) == ["app.py", "pkg/__init__.py"]
    assert source.notes == (
        "pkg/broken is a broken symbolic link: left out",
        "pkg/pipe is neither file nor directory: left out",
        "pkg/round is a broken symbolic link: left out",
    )


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system takes no such names")
def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    write(tmp_path, PACKAGE)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/pkg/caf\xe9.txt")).write_text("")
    text = refused(tmp_path, {})
    assert r"a file name is not UTF-8: caf\xe9.txt in " in text
    text.encode()  # It can be printed.


@pytest.mark.parametrize("other", ["readme", "README"])
def test_names_that_clash(other: str, tmp_path: Path) -> None:
    write(tmp_path / "else", {other: "other"})
    text = refused(
        tmp_path / "app", {"app.py": MAIN, "README": "ours"}, add=[tmp_path / "app/README", tmp_path / "else" / other]
    )
    assert "clash" in text
    assert text.endswith("rename one")
    assert other in text


def test_names_that_macos_takes_for_one(tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    (tmp_path / "case/A").touch()
    if (tmp_path / "case/a").exists():
        pytest.skip("this file system cannot hold both")
    both = {**PACKAGE, "pkg/caf\u00e9": "", "pkg/cafe\u0301": ""}
    assert "on macOS they would be the same file" in refused(tmp_path / "1", both)
    assert "pkg/Data/x and pkg/data/X clash" in refused(tmp_path / "2", {**PACKAGE, "pkg/Data/x": "", "pkg/data/X": ""})
    assert len(found(tmp_path / "3", {**PACKAGE, "pkg/Data/x": "", "pkg/data/y": ""}).files) == 4


def test_a_file_clashes_with_a_directory(tmp_path: Path) -> None:
    write(tmp_path, {"else/data": "", "app/data/x": ""})
    text = refused(tmp_path / "app", {"app.py": MAIN}, add=[tmp_path / "else/data", tmp_path / "app/data"])
    assert text == "data and data/x clash: one is a file, and a directory in the other; rename one"


@pytest.mark.parametrize("name", ["pkg/data.bin", "pkg/__init__.py", "app.py", "pkg/unused.py"])
def test_a_file_that_cannot_be_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {**PACKAGE, "pkg/data.bin": "", "pkg/unused.py": ""})
    real, forbidden = builtins.open, tmp_path / name

    def refuse(path: Any, *args: Any, **options: Any) -> Any:  # Permissions do not stop root, who may run this.
        if path == forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(tree, "open", refuse, raising=False)

    def read(path: Path) -> bytes:
        with refuse(path, "rb") as file:
            content: bytes = file.read()
        return content

    monkeypatch.setattr(Path, "read_bytes", read)
    text = refused(tmp_path, {})
    assert text.startswith("cannot read ")
    assert text.endswith(f"{name}: Permission denied")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_directory_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, {**PACKAGE, "pkg/data/x": ""})
    (tmp_path / "pkg/data").chmod(0)
    try:
        assert "cannot read" in refused(tmp_path, {})
    finally:
        (tmp_path / "pkg/data").chmod(0o755)


def test_too_much_code(tmp_path: Path) -> None:
    assert tree.LIMIT == 50 * 2**20
    write(tmp_path, PACKAGE)
    for name, size in {"a": 30, "b": 5, "c": 15, "d": 1}.items():
        with open(tmp_path / "pkg" / name, "wb") as file:
            file.truncate(size * 2**20)  # A hole: takes no disk.
    text = refused(tmp_path, {})
    assert text.startswith("the program's own files take 51.0 MiB, more than 50 MiB: ")
    folder = tmp_path / "pkg"
    assert f"{folder / 'a'} (30.0 MiB), {folder / 'c'} (15.0 MiB), {folder / 'b'} (5.0 MiB); move data out" in text
    os.truncate(folder / "a", 29 * 2**20 - 1000)
    find_source(tmp_path / "app.py")


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MOST", 5)
    assert refused(tmp_path, {**PACKAGE, **{f"pkg/{i}": "" for i in range(5)}}).startswith("more than 5 files, ")


# -- --add ---------------------------------------------------------------------------------------------------------------


def test_added_paths_below_the_script_keep_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "app", {"data/a/x.bin": "", "data/b.bin": "", "other/c": "", "data/__pycache__/x": ""})
    monkeypatch.chdir(tmp_path / "app")
    source = found(tmp_path / "app", {}, add=[Path("data"), tmp_path / "app/other/../other/c"])
    assert names(source) == ["app.py", "data/a/x.bin", "data/b.bin", "other/c"]


def test_added_paths_from_elsewhere_come_to_the_top(tmp_path: Path) -> None:
    write(tmp_path, {"else/deep/data/x": "", "else/model.bin": "", "else/other": ""})
    source = found(tmp_path / "app", {}, add=[tmp_path / "else/deep/data", tmp_path / "else/model.bin"])
    assert names(source) == ["app.py", "data/x", "model.bin"]
    assert source.files["data/x"] == tmp_path / "else/deep/data/x"


def test_the_scripts_directory_itself_can_be_added(tmp_path: Path) -> None:
    source = found(tmp_path, {"a/b": "", "c.py": "import foo", ".git/x": ""}, add=[tmp_path])
    assert names(source) == ["a/b", "app.py", "c.py"]


@pytest.mark.parametrize("add", ["lib", "mod.py"])
def test_added_code_can_be_imported(add: str, tmp_path: Path) -> None:
    write(tmp_path, {"else/lib/__init__.py": "", "else/lib/a.py": "", "else/mod.py": "", "else/unrelated.py": ""})
    name = add.partition(".")[0]
    source = found(tmp_path / "app", {"app.py": f"import {name}, unrelated\n{MAIN}"}, add=[tmp_path / "else" / add])
    assert list(source.imports) == ["unrelated"]
    assert any(file.startswith(name) for file in source.files)


def test_added_code_is_read_for_imports(tmp_path: Path) -> None:
    write(
        tmp_path, {"else/lib/__init__.py": "import foo", "else/lib/a.py": "import bar, part", "else/m.py": "import baz"}
    )
    source = found(tmp_path / "app", {"part.py": ""}, add=[tmp_path / "else/lib", tmp_path / "else/m.py"])
    assert "part.py" in source.files
    assert source.imports == {"foo": "lib/__init__.py:1", "bar": "lib/a.py:1", "baz": "m.py:1"}
    assert source.optional == {"bar"}
    write(tmp_path, {"else/m.py": "def"})
    assert refused(tmp_path / "app", {}, add=[tmp_path / "else/m.py"]).startswith("m.py:1: ")


def test_what_cannot_be_added(tmp_path: Path) -> None:
    write(tmp_path, {"app.py": MAIN, ".git/x": "", "box/pyvenv.cfg": "", "a.pyc": ""})
    assert "--add: no such file or directory: " in refused(tmp_path, {}, add=[tmp_path / "gone"])
    for name in (".git", "box", "a.pyc"):
        assert "is never packed" in refused(tmp_path, {}, add=[tmp_path / name])


# -- Syntax --------------------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[bytes, str]] = {
    "syntax": (b"\n\nx = = 1\n", "3: invalid syntax: `x = = 1`"),
    "colon": (b"if x\n    pass\n", "1: expected ':': `if x`"),
    "bracket": (b"\nprint((1)\n", "2: '(' was never closed: `print((1)`"),
    "indent": (b"def f():\nx = 1\n", "2: expected an indented block after function definition on line 1: `x = 1`"),
    "compiler": (b"x = 1\nreturn x\n", "2: 'return' outside function: `return x`"),
    "encoding": (b"# ok\nx = '\xe9'\n", "2: not utf-8: byte 0xe9: save the file as UTF-8"),
    "late encoding": (b"#\n#\n#\nx = '\xe9'\n", "4: not utf-8: byte 0xe9: save the file as UTF-8"),
    "cookie": (b"#!/x\n# -*- coding: klingon -*-\n", "2: unknown encoding: klingon: `# -*- coding: klingon -*-`"),
    "ascii": (b"# coding: ascii\nx = '\xc3\xa9'\n", "2: not ascii: byte 0xc3: save the file as UTF-8"),
    "no text": (b"# coding: hex\nx\n", "1: "),
    "null": (b"x = 1\ny = '\0'\n", "2: null bytes: this is no Python source"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("name", ["app.py", "part.py", "pkg/__init__.py"])
def test_broken_code_is_refused_with_its_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {"app.py": f"import part, pkg\n{MAIN}", "part.py": "", "pkg/__init__.py": ""}
    text = refused(tmp_path, {**files, name: content})
    assert text.startswith(f"{name}:{message}")


def test_other_encodings_and_marks_are_read(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "app.py": b"\xef\xbb\xbfimport a\r\nprint(a)\r\n",
        "a.py": "# coding: latin-1\nimport foo\nx = 'é'".encode("latin-1"),
    }
    assert found(tmp_path, files).imports == {"foo": "a.py:2"}


def test_code_that_makes_python_warn_is_read_in_silence(tmp_path: Path) -> None:
    found(tmp_path, {"app.py": r"print('\d' is '\d')"})


def test_code_that_is_nested_too_deeply(tmp_path: Path) -> None:
    assert "app.py" in refused(tmp_path, {"app.py": "(" * 5000 + ")" * 5000})
    long = "import importlib\nx = " + " + ".join(["a"] * 800) + "\nprint(importlib.import_module('part'))"
    assert "part.py" in found(tmp_path, {"app.py": long, "part.py": ""}).files


def test_broken_code_that_nothing_imports_is_noted(tmp_path: Path) -> None:
    source = found(tmp_path, {**PACKAGE, "pkg/template.py": "import {{ name }}\n{% if %}"})
    assert "pkg/template.py" in source.files
    (note,) = source.notes
    assert note.startswith("pkg/template.py:")
    assert note.endswith("it is packed as it is, since nothing imports it")


# -- Does it do anything? ------------------------------------------------------------------------------------------------

DOES = {
    'if __name__ == "__main__":\n    pass': True,
    "def f(): ...\nif '__main__' == __name__:\n    f()": True,
    "print(1)": True,
    "def f(): ...\nf()": True,
    "with open('x'): pass": True,
    "for i in range(3): pass": True,
    "while False: pass": True,
    "def f(): ...\nx = f()": True,
    "def f(): ...\nx: int = f()": True,
    "import os\nif os.environ.get('x'):\n    pass": True,
    "def f(): ...\ntry:\n    f()\nexcept ValueError:\n    pass": True,
    "raise SystemExit": True,
    "def f(): ...\nassert f()": True,
    "": False,
    '"""Only a docstring."""': False,
    "import os\nimport sys\n\nX = 1\n\n\ndef main():\n    print(X)\n": False,
    "class A:\n    print(1)\n": False,
    "import typing\nif typing.TYPE_CHECKING:\n    import foo\ndef f(): ...": False,
    "try:\n    import foo\nexcept ImportError:\n    foo = None": False,
    "import logging, re\nlog = logging.getLogger(__name__)\nP = re.compile('x')\ndef f(): ...": False,
    "X: int\nY = {'a': [1, 2]}\nY['b'] = X = 3\nX += 1\nasync def f(): ...": False,
    "import sys\nif sys.version_info > (3, 12):\n    X = 1\nelse:\n    X = 2": False,
    "{'cells': [], 'nbformat': 4}": False,
    "import json": False,
}


@pytest.mark.parametrize(("code", "does"), DOES.items())
def test_a_script_that_would_do_nothing_is_refused(code: str, does: bool, tmp_path: Path) -> None:
    if does:
        found(tmp_path, {"app.py": code})
    else:
        text = refused(tmp_path, {"app.py": code})
        assert text.startswith("app.py has no __main__ code: ")
        assert text.endswith('add: if __name__ == "__main__": main()')


def test_what_only_imports_own_code_may_run_in_there(tmp_path: Path) -> None:
    assert names(found(tmp_path, {"app.py": '"""Doc."""\nimport part', "part.py": "print(1)"})) == ["app.py", "part.py"]
    assert "no __main__ code" in refused(tmp_path, {"pkg/__init__.py": "", "pkg/__main__.py": "def f(): ..."}, "pkg")


def test_parsing_while_garbage_that_parses_is_collected() -> None:
    """Python 3.11 fails of that, in whatever is parsed at the time."""

    class Garbage:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            ast.parse("f(1)[2]")

    text = "\n".join(f"a{n} = [f({n}) for f in g]" for n in range(1000))
    threshold = gc.get_threshold()
    gc.set_threshold(200)
    try:
        Garbage()
        assert len(syntax(text).body) == 1000
    finally:
        gc.set_threshold(*threshold)
