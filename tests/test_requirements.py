"""Which distributions a program needs, and who says so.

What is installed is made here: ``*.dist-info`` directories in a temporary directory on the search path.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from bigmachine.errors import PackError
from bigmachine.info import VERSION
from bigmachine.pack.installed import Installed
from bigmachine.pack.requirements import HERE, Wanted, find_requirements
from bigmachine.pack.source import find_source

MAIN = "\nprint(1)\n"


class Site:
    """A directory on the search path in which distributions are installed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(
        self,
        name: str,
        version: str = "1.0",
        requires: tuple[str, ...] = (),
        files: tuple[str, ...] = (),
        direct_url: dict[str, Any] | None = None,
        top_level: str | None = None,
        pth: Path | None = None,
        provides: tuple[str, ...] = (),
    ) -> None:
        info = self.path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        head += [f"Requires-Dist: {line}" for line in requires] + [f"Provides-Extra: {extra}" for extra in provides]
        (info / "METADATA").write_text("\n".join([*head, "", "A README", "Name: another"]))
        if pth is not None:
            (self.path / f"_{name}.pth").write_text(f"{pth}\n")
            files = (*files, f"_{name}.pth")
        (info / "RECORD").write_text("".join(f"{file},sha256=x,1\n" for file in files))
        for file in files:
            (self.path / file).parent.mkdir(parents=True, exist_ok=True)
            (self.path / file).touch()
        if direct_url is not None:
            (info / "direct_url.json").write_text(json.dumps(direct_url))
        if top_level is not None:
            (info / "top_level.txt").write_text(top_level)

    def editable(self, name: str, project: Path, **options: Any) -> None:
        self.install(name, direct_url={"url": project.as_uri(), "dir_info": {"editable": True}}, **options)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    path = tmp_path / "site"
    path.mkdir()
    # Only this: what else is installed where the tests run must make no difference.
    monkeypatch.setattr(sys, "path", [str(path)])
    return Site(path)


def wanted(folder: Path, code: str, files: dict[str, str] | None = None, **options: Any) -> Wanted:
    """What ``app.py`` with this code needs; `files` lie beside it. Paths among the options are relative to there."""
    (folder / "app").mkdir(exist_ok=True)
    for name, content in {"app.py": code + MAIN, **(files or {})}.items():
        (folder / "app" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "app" / name).write_text(content)
    if "r" in options:
        options["files"] = [folder / "app" / name for name in options.pop("r")]
    if "project" in options:
        options["project"] = folder / "app" / options["project"]
    script = folder / "app/app.py"
    return find_requirements(script, find_source(script), **options)


def refused(folder: Path, code: str, files: dict[str, str] | None = None, **options: Any) -> str:
    with pytest.raises(PackError) as caught:
        wanted(folder, code, files, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(f"{folder / 'app'}/", "").replace(str(folder), "~")


def block(*lines: str) -> str:
    return "\n".join(["# /// script", *(f"# {line}".rstrip() for line in lines), "# ///", ""])


# -- What is installed here ----------------------------------------------------------------------------------------------


def test_nothing_but_the_standard_library(tmp_path: Path, site: Site) -> None:
    got = wanted(tmp_path, "import os, json")
    assert got == Wanted((), (), (), None, (), {}, HERE, None)


def test_imports_are_pinned_to_what_is_installed(tmp_path: Path, site: Site) -> None:
    site.install("NumPy", "2.4.1", files=("numpy/__init__.py", "numpy/core/x.so"))
    site.install("PyYAML", "6.0", files=("yaml/__init__.py", "_yaml/__init__.py"))
    site.install("typing.extensions", "4.1", files=("typing_extensions.py",))
    site.install("fast", "3", files=("fastmod.cpython-311-x86_64-linux-gnu.so",))
    site.install(
        "unused", files=("unused.py", "numpy.libs/x.so", "yaml-stubs/__init__.py", "numpy_more/x.py", "numpy.pth")
    )
    got = wanted(tmp_path, "import numpy.linalg, yaml, typing_extensions, fastmod")
    assert got.lines == ("fast==3", "numpy==2.4.1", "pyyaml==6.0", "typing-extensions==4.1")
    assert got.roots == ("fast", "numpy", "pyyaml", "typing-extensions")
    assert got.constraints == got.lines
    assert (got.origin, got.lock, got.options, got.editable) == (HERE, None, (), {})


def test_the_whole_closure_is_constrained(tmp_path: Path, site: Site) -> None:
    site.install("a", "1", requires=("b[x]>=1", "gone", "c; sys_platform == 'nowhere'"), files=("a.py",))
    site.install(
        "b", "2", requires=("d", "e; extra == 'x'", "f; extra == 'y'", "this is !no requirement"), provides=("x", "y")
    )
    for name in "cdf":
        site.install(name, "3")
    site.install("e", "4", requires=("A",))
    got = wanted(tmp_path, "import a")
    assert got.lines == ("a==1",)
    assert got.constraints == ("a==1", "b==2", "d==3", "e==4")
    assert got.roots == ("a",)


def test_our_own_requirements_are_constrained_too(tmp_path: Path, site: Site) -> None:
    site.install("bigmachine", VERSION, requires=("h2>=4", "pex>=2", "mypy; extra == 'dev'"))
    for name in ("h2", "pex", "mypy"):
        site.install(name, "7", files=(f"{name}/__init__.py",))
    assert wanted(tmp_path, "").constraints == ("h2<=7",)
    assert wanted(tmp_path, "", installed=True).constraints == ("h2==7",)
    assert wanted(tmp_path, "import h2").constraints == ("h2==7",)


def test_all_distributions_of_a_namespace(tmp_path: Path, site: Site) -> None:
    site.install("google-cloud-storage", files=("google/cloud/storage/__init__.py",))
    site.install("protobuf", files=("google/protobuf/__init__.py",))
    site.install("typed", files=("google/py.typed",))
    assert wanted(tmp_path, "from google.cloud import storage").roots == ("google-cloud-storage", "protobuf")


def test_top_level_names_that_a_distribution_declares(tmp_path: Path, site: Site) -> None:
    site.install("declared", top_level="one\ntwo\n")
    assert wanted(tmp_path, "import two").lines == ("declared==1.0",)


def test_metadata_that_is_no_wheels(tmp_path: Path, site: Site) -> None:
    info = site.path / "Old_One-1.5.egg-info"
    info.mkdir()
    (info / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: Old.One\nVersion: 1.5\n")
    (info / "SOURCES.txt").write_text("old/__init__.py\n")
    (info / "installed-files.txt").write_text("../old/__init__.py\n")
    (site.path / "old").mkdir()
    (site.path / "old/__init__.py").touch()
    (info / "requires.txt").write_text("base\n")
    site.install("base", "2")
    got = wanted(tmp_path, "import old")
    assert (got.lines, got.constraints) == (("old-one==1.5",), ("base==2", "old-one==1.5"))


def test_of_two_with_one_name_the_first_on_the_path_counts(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.install("a", "1", files=("a.py",))
    other = Site(tmp_path / "other")
    other.install("a", "2", files=("a.py", "old.py"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(other.path)])
    assert wanted(tmp_path, "import a").lines == ("a==1",)
    assert "imports old, which is" in refused(tmp_path, "import old")


def test_what_an_interrupted_installation_has_left(tmp_path: Path, site: Site) -> None:
    (site.path / "broken-1.dist-info").mkdir()
    site.install("a", files=("a.py",))
    assert wanted(tmp_path, "import a").lines == ("a==1.0",)


def test_an_import_that_is_nowhere(tmp_path: Path, site: Site) -> None:
    text = refused(tmp_path, "import os\n\nimport foo")
    assert (
        text == "app.py:3 imports foo, which is neither installed here nor beside the script: install it, or --add it"
    )
    (site.path / "loose.py").touch()
    text = refused(tmp_path, "import loose")
    assert text == "app.py:1 imports loose, which is ~/site/loose.py and belongs to no installed distribution: --add it"


def test_an_optional_import_may_be_nowhere(tmp_path: Path, site: Site) -> None:
    site.install("bar", files=("bar.py",))
    code = (
        "try:\n    import foo\nexcept ImportError:\n    foo = None\ntry:\n    import bar\nexcept ImportError:\n    pass"
    )
    assert wanted(tmp_path, code).lines == ("bar==1.0",)


def test_with_explicit_requirements_nobody_can_know(tmp_path: Path, site: Site) -> None:
    assert wanted(tmp_path, block('dependencies = ["x"]') + "import foo").lines == ("x",)
    assert wanted(tmp_path, "import foo", {"r.txt": "x"}, r=["r.txt"]).lines == ("x",)


def test_a_directory_as_program(tmp_path: Path, site: Site) -> None:
    (tmp_path / "prog").mkdir()
    (tmp_path / "prog/__main__.py").write_text(block('dependencies = ["x"]') + MAIN)
    assert find_requirements(tmp_path / "prog", find_source(tmp_path / "prog")).lines == ("x",)


# -- PEP 723 -------------------------------------------------------------------------------------------------------------


def test_a_block(tmp_path: Path, site: Site) -> None:
    site.install("numpy", files=("numpy/__init__.py",))
    code = '"""Doc."""\n' + block(
        'requires-python = ">=3.11"',
        "dependencies = [",
        "  'NumPy>=2,<3',",
        "",
        """  "rich[jupyter] ; sys_platform == 'linux'", # why""",
        "]",
        "[tool.x]",
        "dependencies = 3",
    )
    got = wanted(tmp_path, code + "import numpy")
    assert got.lines == ("NumPy<3,>=2", 'rich[jupyter]; sys_platform == "linux"')
    assert got.roots == ("numpy", "rich[jupyter]")
    assert (got.constraints, got.origin, got.python) == ((), "the script's own block (PEP 723)", ">=3.11")


def test_an_empty_block_needs_nothing(tmp_path: Path, site: Site) -> None:
    got = wanted(tmp_path, block("# nothing") + "import foo")
    assert (got.lines, got.python, got.origin) == ((), None, "the script's own block (PEP 723)")


@pytest.mark.parametrize(
    "text",
    [
        '# /// script\n# dependencies = ["x"]\n',  # Without an end.
        '# /// other\n# dependencies = ["x"]\n# ///\n',
        '# /// script\n#dependencies = ["x"]\n# ///\n',
        ' # /// script\n # dependencies = ["x"]\n # ///\n',
        '# /// script \n# dependencies = ["x"]\n# ///\n',
    ],
)
def test_what_is_no_block_by_the_reference(text: str, tmp_path: Path, site: Site) -> None:
    assert wanted(tmp_path, text).origin == HERE


def test_a_block_goes_to_the_last_end(tmp_path: Path, site: Site) -> None:
    # The reference expression is greedy: an end within is content.
    text = refused(tmp_path, '# /// script\n# dependencies = ["x"]\n# ///\n# more\n# ///\n')
    assert text.startswith("app.py:3: the block (PEP 723) is no TOML: ")


def test_line_ends_of_another_system(tmp_path: Path, site: Site) -> None:
    (tmp_path / "app").mkdir()
    script = tmp_path / "app/app.py"
    script.write_bytes((block('dependencies = ["x"]') + MAIN).replace("\n", "\r\n").encode())
    assert find_requirements(script, find_source(script)).lines == ("x",)


BAD_BLOCKS = {
    "dependencies = [": "app.py:3: the block (PEP 723) is no TOML: ",
    "x = 1\nx = 2": "app.py:4: the block (PEP 723) is no TOML: Cannot overwrite a value",
    "x = 1\ndependencies = 'numpy'": "app.py:4: dependencies must be an array of strings, not: 'numpy'",
    "dependencies = [1]": "app.py:3: dependencies must be an array of strings, not: [1]",
    "requires-python = 3.11": "app.py:3: requires-python must be a string, not: 3.11",
    "requires-python = 'three'": "app.py:3: requires-python is no version specifier: three",
    "dependencies = [\n 'ok',\n 'numpy=>1',\n]": "app.py:5: invalid requirement: numpy=>1: ",
    "dependencies = ['a @ git+https://x.invalid/a']": "app.py:3: wheels only, and this is a repository: a @ git+https://",
    "dependencies = ['a @ file:///a.whl']": "app.py:3: wheels only, and this is a local path: ",
    "dependencies = ['./a']": "app.py:3: wheels only, and this is a local path: ./a; build a wheel of it (pip wheel), and",
    "dependencies = ['a @ https://x.invalid/a.tar.gz']": "app.py:3: wheels only, and this is a source archive: ",
}


@pytest.mark.parametrize(("content", "message"), BAD_BLOCKS.items())
def test_a_bad_block(content: str, message: str, tmp_path: Path, site: Site) -> None:
    assert refused(tmp_path, "#!/x\n" + block(*content.split("\n"))).startswith(message)


def test_two_blocks(tmp_path: Path, site: Site) -> None:
    text = refused(tmp_path, block("x = 1") + "\n" + block("y = 1"))
    assert text == "app.py:5: a second block (PEP 723), after the one in line 1: keep one"


# -- Who decides ---------------------------------------------------------------------------------------------------------


def test_who_decides(tmp_path: Path, site: Site) -> None:
    site.install("a", files=("a.py",))
    files = {"r.txt": "fromfile", "pyproject.toml": "[project]\ndependencies = ['fromproject']"}
    inline = block('dependencies = ["fromblock"]')
    assert wanted(tmp_path, inline + "import a", files).lines == ("fromblock",)
    assert wanted(tmp_path, "import a", files, r=["r.txt"]).lines == ("fromfile",)
    assert wanted(tmp_path, "import a", files, project=".").lines == ("fromproject",)
    assert wanted(tmp_path, "import a", files).lines == ("a==1.0",)
    for option in ({"r": ["r.txt"]}, {"project": "."}):
        text = refused(tmp_path, inline, files, **option)
        assert text.startswith("app.py says itself what it needs, in a block (PEP 723): leave -")
        assert text.endswith(" out, or remove the block")
    assert "give one of them" in refused(tmp_path, "import a", files, r=["r.txt"], project=".")


# -- Requirements files --------------------------------------------------------------------------------------------------


def test_a_requirements_file(tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INDEX", "https://a.invalid/simple")
    monkeypatch.delenv("UNSET", raising=False)
    main = r"""# A comment \
        numpy >= 2 # why
        rich[x]==13.0; python_version >= "3.8"
        -r deep/more.txt
        pinned==1.0 \
            --hash=sha256:abc \
            --hash sha256:def
        direct @ https://x.invalid/direct-1-py3-none-any.whl#sha256=abc
        -c limits.txt
        -i ${INDEX}
        --extra-index-url=https://${UNSET}.invalid --pre
        --trusted-host a.invalid
        --only-binary :all:
        --prefer-binary
        --require-hashes
        numpy>=2
    """
    files = {
        "r.txt": "\n".join(line.strip() for line in main.splitlines()),
        "deep/more.txt": "\ufeff--find-links wheels\n--find-links https://b.invalid\nmore\n-c ../limits.txt\n",
        "deep/wheels/x": "",
        "limits.txt": "numpy<3\nrich==13.0 --hash=sha256:abc\n--no-index\n-r limits2.txt",
        "limits2.txt": "more!=2",
    }
    got = wanted(tmp_path, "import foo", files, r=["r.txt"])
    assert got.lines == (
        "numpy>=2",
        'rich[x]==13.0; python_version >= "3.8"',
        "more",
        "pinned==1.0 --hash=sha256:abc --hash=sha256:def",
        "direct @ https://x.invalid/direct-1-py3-none-any.whl#sha256=abc",
    )
    assert got.constraints == ("numpy<3", "rich==13.0 --hash=sha256:abc", "more!=2")
    wheels = (tmp_path / "app/deep/wheels").as_uri()
    assert got.options == (
        *("--find-links", wheels, "--find-links", "https://b.invalid", "--no-index"),
        *("--index-url", "https://a.invalid/simple", "--extra-index-url", "https://${UNSET}.invalid", "--pre"),
        *("--trusted-host", "a.invalid", "--require-hashes"),
    )
    assert got.roots == ("numpy", "rich[x]", "more", "pinned", "direct")
    assert got.origin == "r.txt"
    assert got.python is None


def test_several_files_one_twice(tmp_path: Path, site: Site) -> None:
    files = {"a.txt": "-r c.txt\na", "b.txt": "--requirement=c.txt\n-rc.txt\nb", "c.txt": "c"}
    got = wanted(tmp_path, "", files, r=["a.txt", "b.txt"])
    assert got.lines == ("c", "a", "b")
    assert got.origin == "a.txt, b.txt"


BAD_FILES = {
    "\nnumpy=>1": "r.txt:2: invalid requirement: numpy=>1: ",
    "a\n\\\nb b": "r.txt:2: invalid requirement: b b: ",
    "-e .": "r.txt:1: wheels only, and this is editable: .; build a wheel of it (pip wheel), or --add its package",
    "--editable=git+https://x.invalid": "r.txt:1: wheels only, and this is editable: ",
    "./local": "r.txt:1: wheels only, and this is a local path: ./local; build a wheel",
    "/tmp/a-1-py3-none-any.whl": "r.txt:1: wheels only, and this is a local path: ",
    "a-1-py3-none-any.whl": "r.txt:1: wheels only, and this is a local path: ",
    "file:///a.tar.gz": "r.txt:1: wheels only, and this is a local path: ",
    "git+https://x.invalid/a#egg=a": "r.txt:1: wheels only, and this is a repository: ",
    "a @ git+ssh://x.invalid/a": "r.txt:1: wheels only, and this is a repository: ",
    "a @ file:///a": "r.txt:1: wheels only, and this is a local path: ",
    "a @ https://x.invalid/a.zip": "r.txt:1: wheels only, and this is a source archive: ",
    "--no-binary :all:": "r.txt:1: wheels only, and this forbids them: --no-binary :all:; take the line out",
    "--frobnicate": "r.txt:1: unknown option: --frobnicate; there are --",
    "-i": "r.txt:1: an option without a value: -i",
    "-i 'x": "r.txt:1: -i 'x: No closing quotation",
    "a --hash=sha256": "r.txt:1: invalid hash: sha256; it must look like sha256:<hex>",
    "a --global-option=x": "r.txt:1: unknown option: --global-option=x; of options to a requirement there is --hash",
    "-r gone.txt": "cannot read the requirements file gone.txt: No such file or directory",
    "-r https://x.invalid/r.txt": "r.txt:1: -r of an address: https://x.invalid/r.txt: download it, and name the file",
    "-r r.txt": "r.txt includes itself, by -r or -c: take one of the lines out",
    "-c r2.txt": "r.txt includes itself",
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.items())
def test_a_bad_requirements_file(content: str, message: str, tmp_path: Path, site: Site) -> None:
    assert refused(tmp_path, "", {"r.txt": content, "r2.txt": "-r r.txt"}, r=["r.txt"]).startswith(message)


def test_a_requirements_file_that_cannot_be_read(tmp_path: Path, site: Site) -> None:
    assert refused(tmp_path, "", r=["gone"]) == "cannot read the requirements file gone: No such file or directory"
    (tmp_path / "app/bad").write_bytes(b"\xff")
    assert refused(tmp_path, "", r=["bad"]) == "bad is not UTF-8: save it as UTF-8"


# -- Projects ------------------------------------------------------------------------------------------------------------

PROJECT = "[project]\nname = 'p'\nrequires-python = '>=3.10'\ndependencies = ['numpy>=2', 'rich']\n"
LOCK = 'lock-version = "1.0"\nrequires-python = ">=3.11"\n' + "".join(
    f"[[packages]]\nname = '{name}'\nversion = '{version}'\n"
    for name, version in {"NumPy": "2.4.1", "rich": "13", "mdurl": "1"}.items()
)


@pytest.mark.parametrize("given", [".", "pyproject.toml"])
def test_a_project(given: str, tmp_path: Path, site: Site) -> None:
    got = wanted(tmp_path, "import foo", {"pyproject.toml": PROJECT}, project=given)
    assert (got.lines, got.roots) == (("numpy>=2", "rich"), ("numpy", "rich"))
    assert (got.constraints, got.options, got.lock) == ((), (), None)
    assert (got.origin, got.python) == ("pyproject.toml", ">=3.10")


@pytest.mark.parametrize("given", [".", "pylock.toml"])
def test_a_lock_wins(given: str, tmp_path: Path, site: Site) -> None:
    got = wanted(tmp_path, "import foo", {"pyproject.toml": PROJECT, "pylock.toml": LOCK}, project=given)
    assert (got.lines, got.lock, got.roots) == ((), tmp_path / "app/pylock.toml", ("numpy", "rich", "mdurl"))
    assert (got.origin, got.python) == ("pylock.toml", ">=3.11")


def test_a_lock_alone(tmp_path: Path, site: Site) -> None:
    got = wanted(tmp_path, "", {"pylock.dev.toml": LOCK}, project="pylock.dev.toml")
    assert (got.roots, got.origin) == (("numpy", "rich", "mdurl"), "pylock.dev.toml")
    files = {"pylock.toml": LOCK, "pyproject.toml": "[project]\ndynamic = ['dependencies']"}
    assert wanted(tmp_path, "", files, project=".").roots == ("numpy", "rich", "mdurl")


def test_a_project_without_dependencies(tmp_path: Path, site: Site) -> None:
    assert wanted(tmp_path, "", {"pyproject.toml": "[project]\nname = 'p'"}, project=".").lines == ()


BAD_PROJECTS = {
    (
        "pyproject.toml",
        "[project]\ndynamic = ['version', 'dependencies']",
    ): "pyproject.toml: the dependencies are dynamic: ",
    ("pyproject.toml", "[tool.poetry]\n"): "pyproject.toml has no [project] table: give the requirements with -r FILE",
    ("pyproject.toml", "[project"): "pyproject.toml is no TOML: ",
    (
        "pyproject.toml",
        "[project]\ndependencies = 'x'",
    ): "pyproject.toml: dependencies must be an array of strings, not: 'x'",
    ("pyproject.toml", "[project]\ndependencies = ['x=>1']"): "pyproject.toml: invalid requirement: x=>1: ",
    ("pyproject.toml", "[project]\nrequires-python = 3"): "pyproject.toml: requires-python must be a string, not: 3",
    ("pylock.toml", "lock-version = '2.0'"): "pylock.toml: lock-version is not 1.x: '2.0'; ",
    ("pylock.toml", "packages = []"): "pylock.toml: lock-version is not 1.x: None; ",
    ("pylock.toml", "lock-version = '1.0'\npackages = [1]"): "pylock.toml: packages is no array of tables with names: ",
    ("pylock.toml", "lock-version = '1.0'\npackages = 1"): "pylock.toml: packages is no array of tables with names: ",
    ("other.toml", ""): "--project: neither pylock.toml nor pyproject.toml in ",
}


@pytest.mark.parametrize(("file", "message"), BAD_PROJECTS.items())
def test_a_bad_project(file: tuple[str, str], message: str, tmp_path: Path, site: Site) -> None:
    assert refused(tmp_path, "", dict([file]), project=".").startswith(message)


def test_what_is_no_project(tmp_path: Path, site: Site) -> None:
    assert refused(tmp_path, "", project="gone") == "--project: no such file or directory: gone"
    assert refused(tmp_path, "", {"x.toml": ""}, project="x.toml").startswith("--project: neither a directory, nor")


# -- bigmachine itself ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ["bigmachine", "BigMachine>=0.0.1", f"bigmachine[dev]=={VERSION}", "bigmachine @ git9"]
)
def test_bigmachine_is_taken_out(line: str, tmp_path: Path, site: Site) -> None:
    line = line.replace("git9", "https://x.invalid/bigmachine-9-py3-none-any.whl")
    for options in (
        {"code": block(f"dependencies = ['x', '{line}']")},
        {"code": "", "r": ["r.txt"]},
        {"code": "", "project": "."},
    ):
        files = {"r.txt": f"x\n{line}", "pyproject.toml": f"[project]\ndependencies = ['x', '{line}']"}
        got = wanted(tmp_path, files=files, **options)
        assert (got.lines, got.roots) == (("x",), ("x",))


def test_another_bigmachine_is_refused(tmp_path: Path, site: Site) -> None:
    text = refused(tmp_path, block("dependencies = [", "'bigmachine>=99']"))
    assert text.startswith(f"app.py:3: the program asks for bigmachine>=99, and this is bigmachine {VERSION}: ")
    assert "r.txt:1: the program asks for bigmachine==99" in refused(
        tmp_path, "", {"r.txt": "bigmachine==99"}, r=["r.txt"]
    )
    elsewhere = "bigmachine>=99; sys_platform == 'nowhere'"
    assert wanted(tmp_path, "", {"r.txt": elsewhere}, r=["r.txt"]).lines == ()
    lock = LOCK + "[[packages]]\nname = 'bigmachine'\nversion = '99'\n"
    assert "the lock has bigmachine 99, and this is" in refused(tmp_path, "", {"pylock.toml": lock}, project=".")
    site.install("a", requires=("bigmachine>=99",), files=("a.py",))
    assert wanted(tmp_path, "import a").lines == ("a==1.0",)  # Not the program's own wish: it runs so here.


# -- installed=True ------------------------------------------------------------------------------------------------------


def test_a_running_program_gets_what_is_installed(tmp_path: Path, site: Site) -> None:
    site.install("bigmachine", VERSION, requires=("h2",))
    site.install("h2", "4")
    site.install("numpy", "2.4.1", requires=("blas",))
    site.install("blas", "3.0rc1")
    site.install("other", "1")
    files = {"r.txt": "numpy>=2\nblas>=3.0rc1\nnowhere; sys_platform == 'nowhere'", "pylock.toml": LOCK}
    pins = ("blas==3.0rc1", "h2==4", "numpy==2.4.1")
    got = wanted(tmp_path, block("dependencies = ['numpy>=2', 'bigmachine']"), installed=True)
    assert (got.lines, got.constraints) == (("numpy>=2",), pins)
    got = wanted(tmp_path, "", files, r=["r.txt"], installed=True)
    assert got.lines == ("numpy>=2", "blas>=3.0rc1", 'nowhere; sys_platform == "nowhere"')
    assert got.constraints == pins
    got = wanted(tmp_path, "", files, project=".", installed=True)
    assert (got.lines, got.lock, got.constraints) == ((), tmp_path / "app/pylock.toml", pins)
    assert wanted(tmp_path, "", installed=True).constraints == ("h2==4",)


def test_a_running_program_whose_requirements_are_not_met(tmp_path: Path, site: Site) -> None:
    site.install("numpy", "2.4.1")
    site.install("rich", "12")
    text = refused(tmp_path, block("dependencies = ['numpy>=3', 'rich<13', 'gone']"), installed=True)
    assert text == (
        "the script's own block (PEP 723) asks for numpy>=3, and 2.4.1 is installed here; "
        "for gone, which is not installed here: install it, or run a packed program"
    )
    assert refused(tmp_path, "", {"r.txt": "gone"}, r=["r.txt"], installed=True).startswith(
        "r.txt asks for gone, which"
    )
    text = refused(tmp_path, "", {"pylock.toml": LOCK}, project=".", installed=True)
    assert "asks for rich==13, and 12 is installed here: install it" in text
    assert "numpy" not in text


# -- Editable installs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a package below ``src``."""
    (tmp_path / "my project/src/mylib/sub").mkdir(parents=True)
    (tmp_path / "my project/src/mylib/__init__.py").touch()
    (tmp_path / "my project/src/single.py").touch()
    return tmp_path / "my project"


REQUIRES = ("numpy>=2", "tiny", "extra-one; extra == 'x'", "other; sys_platform == 'nowhere'", "bigmachine")


def editable(site: Site, project: Path) -> None:
    site.editable("My-Lib", project, requires=REQUIRES, pth=project / "src", provides=("x",))
    site.install("numpy", "2.4.1", requires=("blas",))
    site.install("blas", "3")
    site.install("extra-one", "1")


def test_an_editable_install_that_is_imported(tmp_path: Path, site: Site, project: Path) -> None:
    editable(site, project)
    got = wanted(tmp_path, "import mylib.sub")
    assert got.editable == {"mylib": project / "src/mylib", "single": project / "src/single.py"}
    assert got.lines == ("numpy==2.4.1", "tiny")  # Pinned where it is installed.
    assert got.constraints == ("blas==3", "numpy==2.4.1")
    assert got.roots == ("my-lib", "numpy", "tiny")


def test_an_editable_install_that_is_required(tmp_path: Path, site: Site, project: Path) -> None:
    editable(site, project)
    got = wanted(tmp_path, "", {"r.txt": "my_lib[x]>=1"}, r=["r.txt"])
    assert set(got.editable) == {"mylib", "single"}
    assert got.lines == ("numpy>=2", "tiny", "extra-one")
    assert got.constraints == ()
    assert wanted(tmp_path, "", {"r.txt": "my_lib>=2"}, r=["r.txt"]).editable == {}  # Another version, then.
    got = wanted(tmp_path, block("dependencies = ['my-lib']"), installed=True)
    assert (got.lines, got.constraints) == (("numpy==2.4.1", "tiny"), ("blas==3", "numpy==2.4.1"))


def test_an_editable_install_that_is_imported_beside_explicit_requirements(
    tmp_path: Path, site: Site, project: Path
) -> None:
    editable(site, project)
    got = wanted(tmp_path, block("dependencies = ['x']") + "import mylib")
    assert (got.lines, set(got.editable)) == (("x", "numpy>=2", "tiny"), {"mylib", "single"})


def test_an_editable_install_that_another_requires(tmp_path: Path, site: Site, project: Path) -> None:
    site.editable("base", project, pth=project / "src", requires=("app-lib",))
    (tmp_path / "second/applib").mkdir(parents=True)
    (tmp_path / "second/applib/__init__.py").touch()
    site.editable("app-lib", tmp_path / "second", pth=tmp_path / "second", requires=("base",))
    got = wanted(tmp_path, "import applib")
    assert (set(got.editable), got.lines, got.roots) == ({"mylib", "single", "applib"}, (), ("app-lib", "base"))


def test_beside_a_projects_own_files_not_all_is_its_code(tmp_path: Path, site: Site, project: Path) -> None:
    for name in ("flat/__init__.py", "tests/__init__.py", "setup.py", "tool.py"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).touch()
    site.editable("Flat", project, pth=project)
    assert wanted(tmp_path, "import flat").editable == {"flat": project / "flat"}
    assert set(wanted(tmp_path, "import flat, tool").editable) == {"flat", "tool"}


def test_an_editable_install_behind_a_finder(
    tmp_path: Path, site: Site, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As setuptools does it: no path entry, but a finder; the names are declared.
    site.editable("My-Lib", project, top_level="mylib\nsingle\n", files=("__editable___my_lib_finder.py",))
    monkeypatch.setattr(sys, "path", [*sys.path, str(project / "src")])
    sys.modules.pop("mylib", None)
    got = wanted(tmp_path, "import mylib")
    assert got.editable == {"mylib": project / "src/mylib", "single": project / "src/single.py"}
    assert "mylib" not in sys.modules


def test_an_editable_install_whose_code_is_gone(tmp_path: Path, site: Site) -> None:
    site.editable("gone", tmp_path / "nowhere", top_level="gone9")
    text = refused(tmp_path, "import gone9")
    assert text == "gone is installed in editable form from ~/nowhere, and its code is not found: install it anew"


def test_our_own_editable_install_is_nobodys_code(tmp_path: Path, site: Site, project: Path) -> None:
    site.editable("bigmachine", project, pth=project / "src")
    assert "neither installed here" in refused(tmp_path, "import mylib")
    assert wanted(tmp_path, "", {"r.txt": "bigmachine"}, r=["r.txt"]).editable == {}


@pytest.mark.parametrize(
    "direct_url",
    [{"url": "file:///x/y", "dir_info": {}}, {"url": "file:///x.whl", "archive_info": {}}, {"dir_info": []}],
)
def test_other_local_installs_are_pinned_like_any(direct_url: dict[str, Any], tmp_path: Path, site: Site) -> None:
    site.install("a", "3", files=("a.py",), direct_url=direct_url)
    got = wanted(tmp_path, "import a")
    assert (got.lines, got.editable) == (("a==3",), {})


@pytest.mark.parametrize("how", ["directory", "repository"])
def test_what_no_index_has_is_refused(how: str, tmp_path: Path, site: Site) -> None:
    url = {"directory": tmp_path.as_uri(), "repository": "https://me:secret@host/a.git"}[how]
    info = {"directory": {"dir_info": {}}, "repository": {"vcs_info": {"vcs": "git"}}}[how]
    site.install("a", "3", files=("a.py",), direct_url={"url": url, **info})
    text = refused(tmp_path, "import a")
    shown = {"directory": "file://~", "repository": "https://host/a.git"}[how]
    assert text.startswith(f"app.py:1 imports a, of a 3, which was installed from {shown}: no index has that")
    assert "\n" not in text


# -- Beside the true environment -----------------------------------------------------------------------------------------


def test_it_finds_what_the_standard_library_finds() -> None:
    theirs = importlib.metadata.packages_distributions()
    modules = [
        name for name in theirs if name.isidentifier() and name != "__pycache__" and theirs[name] != ["bigmachine"]
    ]
    ours = Installed().providers(modules)
    for module in modules:
        expected = {name.lower().replace("_", "-").replace(".", "-") for name in theirs[module]} - {"bigmachine"}
        assert expected <= set(ours[module]), module


def test_the_closure_of_something_real() -> None:
    closure = Installed().closure([Requirement("h2")])
    assert closure == {name: importlib.metadata.version(name) for name in ("h2", "hpack", "hyperframe")}


def test_a_small_program_takes_no_time() -> None:
    script = Path(__file__).parent.parent / "examples/bigpi.py"
    find_requirements(script, find_source(script))  # What is imported on the way is imported.
    times = []
    for _ in range(10):  # The best of them: others may keep this host busy.
        begun = time.perf_counter()
        assert find_requirements(script, find_source(script)).lines == ()
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.1
