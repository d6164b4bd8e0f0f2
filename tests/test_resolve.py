"""Resolving, offline: from tiny wheels in a folder, or with a script in the resolver's place. No package index is asked."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import sys
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bigmachine.cache import Cache
from bigmachine.errors import PackError, ResolveError
from bigmachine.info import python_version
from bigmachine.pack import index as index_module
from bigmachine.pack import resolver as resolver_module
from bigmachine.pack.explain import explain
from bigmachine.pack.index import Index
from bigmachine.pack.pipconfig import pip_settings
from bigmachine.pack.platforms import load
from bigmachine.pack.progress import Silent
from bigmachine.pack.requirements import Wanted
from bigmachine.pack.resolve import resolve
from bigmachine.pack.wheels import Wheel, read_wheel

LINUX = load("linux/amd64", python_version())
MAC = load("darwin/arm64", python_version())
MANYLINUX = "py3-none-manylinux_2_17_x86_64"


def make(
    folder: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any", python: str = ">=3.8"
) -> Wheel:
    """A wheel with nothing in it."""
    path = folder / f"{name}-{version}-{tag}.whl"
    stem = f"{name}-{version}.dist-info"
    head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", f"Requires-Python: {python}"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", f"# {folder.name}")
        archive.writestr(f"{stem}/METADATA", "\n".join([*head, *(f"Requires-Dist: {line}" for line in requires), ""]))
        archive.writestr(f"{stem}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{stem}/RECORD", "")
    return read_wheel(path)


def wanted(
    *lines: str, constraints: Sequence[str] = (), options: Sequence[str] = (), lock: Path | None = None
) -> Wanted:
    return Wanted(lines, tuple(constraints), tuple(options), lock, (), {}, "requirements.txt", None)


class Steps(Silent):
    def __init__(self) -> None:
        self.steps: list[str] = []
        self.notes: list[str] = []

    def step(self, text: str) -> None:
        self.steps.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


def versions(wheels: Sequence[Wheel]) -> dict[str, str]:
    return {wheel.name: wheel.version for wheel in wheels}


@contextlib.contextmanager
def pip_sees(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("PIP_", "PEX_"))]:
            patch.delenv(name)
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(folder))
        yield patch


# -- The resolver itself -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of wheels, which is all that pip sees."""
    folder = tmp_path_factory.mktemp("shop")
    make(folder, "aa", "1.0", "bb")
    make(folder, "bb", "1.0")
    make(folder, "bb", "2.0", tag=MANYLINUX)
    make(folder, "cc", "1.0", "bb<2", "ours")
    make(folder, "native", "1.0", tag="py3-none-win_amd64")
    make(folder, "ours", "1.0")  # Not ours: an index's, of the same name and version.
    with pip_sees(folder):
        yield folder


@pytest.fixture(scope="module")
def pex_cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """One cache for all runs of pex, which sets itself up in there. For Python 3.11 it has a pip within; for later ones it
    fetches one from an index, and no test here has a network: what its reports look like is tested further below."""
    if sys.version_info >= (3, 12):
        pytest.skip("pex has no pip of its own for this Python")
    return Cache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    return make(tmp_path_factory.mktemp("ours"), "ours", "1.0", "cc>=1", 'colour; sys_platform == "win32"')


@pytest.fixture(scope="module")
def resolved(shop: Path, ours: Wheel, pex_cache: Cache) -> dict[str, tuple[Wheel, ...]]:
    return resolve(wanted("aa"), [LINUX, MAC], [ours], pex_cache, Steps())


@pytest.mark.slow
def test_all_platforms_get_what_is_required_directly_or_by_ours(resolved: dict[str, tuple[Wheel, ...]]) -> None:
    expected = {"aa": "1.0", "bb": "1.0", "cc": "1.0", "ours": "1.0"}
    assert {name: versions(wheels) for name, wheels in resolved.items()} == {LINUX.name: expected, MAC.name: expected}


@pytest.mark.slow
def test_no_index_serves_what_is_ours(resolved: dict[str, tuple[Wheel, ...]], ours: Wheel) -> None:
    assert [wheel for wheel in resolved[LINUX.name] if wheel.name == "ours"] == [ours]


@pytest.mark.slow
def test_what_was_resolved_once_needs_no_resolver(
    resolved: dict[str, tuple[Wheel, ...]], ours: Wheel, pex_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver_module, "_command", lambda: pytest.fail("the resolver is run"))
    steps = Steps()
    assert resolve(wanted("aa"), [LINUX, MAC], [ours], pex_cache, steps) == resolved
    assert not steps.steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("misspelt", "there is no distribution called misspelt: in /.* there is none; is it misspelt"),
        ("native==1.0", "native==1.0 has no wheel for linux/amd64 and Python .*: there are wheels for win_amd64 only"),
        ("bb>=2", "the requirements conflict: you ask for bb>=2, and cc 1.0 needs bb<2"),
    ],
)
def test_pips_reports_are_understood(line: str, message: str, shop: Path, ours: Wheel, pex_cache: Cache) -> None:
    with pytest.raises(ResolveError, match=message) as caught:
        resolve(wanted(line), [LINUX], [ours], pex_cache, Steps())
    assert "\n" not in caught.value.reason
    assert "ERROR: " in caught.value.details


@pytest.mark.slow
def test_a_lock_decides(shop: Path, ours: Wheel, pex_cache: Cache, tmp_path: Path) -> None:
    lock = tmp_path / "pylock.toml"
    entries = []
    for filename in ("bb-1.0-py3-none-any.whl", "cc-1.0-py3-none-any.whl"):
        name, path = filename.split("-")[0], shop / filename
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        entries += [
            "[[packages]]",
            f'name = "{name}"',
            'version = "1.0"',
            "[[packages.wheels]]",
            f'url = "{path.as_uri()}"',
        ]
        entries += [f'hashes = {{sha256 = "{digest}"}}']
    lock.write_text("\n".join(['lock-version = "1.0"', 'created-by = "a test"', *entries, ""]))
    found = resolve(wanted(lock=lock), [LINUX], [ours], pex_cache, Steps())
    assert versions(found[LINUX.name]) == {"bb": "1.0", "cc": "1.0", "ours": "1.0"}


# -- With a script in the resolver's place -------------------------------------------------------------------------------

SCRIPT = """
import json, os, pathlib, shutil, sys
plan = json.loads(pathlib.Path(sys.argv[1]).read_text())
value = lambda option: pathlib.Path(sys.argv[sys.argv.index(option) + 1])
system = json.loads(value("--complete-platform").read_text())["marker_environment"]["sys_platform"]
bound = value("--constraints").read_text().split()
with open(plan["log"], "a") as log:
    log.write(json.dumps([system, bound, dict(os.environ)]) + "\\n")
if plan.get("fail") in (system, *bound):
    sys.exit("pid 7 -> pip\\npip: ERROR: something else went wrong\\npip: and more")
value("--dest-dir").mkdir()
for path in plan[system]:
    name = pathlib.Path(path).name.split("-")[0]
    pinned = [line.split("==")[1] for line in bound if line.startswith(name + "==")]
    shutil.copy(path if not pinned else path.replace("-2.0-", f"-{pinned[0]}-"), value("--dest-dir"))
"""


class Fake:
    """Wheels by platform that the "resolver" finds; what is bound by a constraint, in that version."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.cache = Cache(folder / "cache")
        self.patch = patch
        self._log = folder / "log"
        patch.setattr(resolver_module, "_command", lambda: [sys.executable, "-S", "-c", SCRIPT, str(folder / "plan.json")])

    def finds(self, linux: Sequence[Wheel], mac: Sequence[Wheel], fail: str = "") -> None:
        plan: dict[str, Any] = {
            name: [str(wheel.path) for wheel in wheels] for name, wheels in [("linux", linux), ("darwin", mac)]
        }
        (self.folder / "plan.json").write_text(json.dumps({**plan, "fail": fail, "log": str(self._log)}))

    def runs(self) -> list[tuple[str, list[str], dict[str, str]]]:
        return [tuple(json.loads(line)) for line in self._log.read_text().splitlines()] if self._log.exists() else []

    def resolve(self, asked: Wanted, *local: Wheel, refresh: bool = False) -> dict[str, tuple[Wheel, ...]]:
        return resolve(asked, [LINUX, MAC], local, self.cache, Silent(), refresh)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Fake]:
    with pip_sees(tmp_path) as patch:
        yield Fake(tmp_path, patch)


def test_platforms_agree_on_the_older_version(fake: Fake) -> None:
    old, new = make(fake.folder, "aa", "1.0"), make(fake.folder, "aa", "2.0")
    fake.finds([new], [old])
    found = fake.resolve(wanted("aa"))
    assert [versions(wheels) for wheels in found.values()] == [{"aa": "1.0"}, {"aa": "1.0"}]
    assert sorted((system, bound) for system, bound, _ in fake.runs()) == [
        ("darwin", []),
        ("linux", []),
        ("linux", ["aa==1.0"]),
    ]


def test_platforms_that_cannot_agree_are_named(fake: Fake) -> None:
    fake.finds([make(fake.folder, "aa", "2.0", tag=MANYLINUX)], [make(fake.folder, "aa", "1.0")], fail="aa==1.0")
    with pytest.raises(
        ResolveError, match=r"aa has no version for all platforms: 2.0 for linux/amd64, 1.0 for darwin/arm64"
    ):
        fake.resolve(wanted("aa"))


def test_builds_of_one_version_may_differ(fake: Fake) -> None:
    fake.finds([make(fake.folder, "aa", "1.0+cpu")], [make(fake.folder, "aa", "1.0")])
    assert [versions(wheels)["aa"] for wheels in fake.resolve(wanted("aa")).values()] == ["1.0+cpu", "1.0"]


def test_another_failure_says_what_pip_said(fake: Fake) -> None:
    fake.finds([], [], fail="darwin")
    with pytest.raises(ResolveError) as caught:
        fake.resolve(wanted("aa"))
    assert caught.value.reason == "cannot resolve for darwin/arm64: something else went wrong"
    assert caught.value.details == "ERROR: something else went wrong\nand more"


def test_is_not_run_where_nothing_is_required(fake: Fake) -> None:
    ours = make(fake.folder, "ours", "1.0")
    assert fake.resolve(wanted("ours"), ours) == {LINUX.name: (ours,), MAC.name: (ours,)}
    assert not fake.runs()


def test_another_version_of_ours_is_refused(fake: Fake) -> None:
    aa = make(fake.folder, "aa", "1.0", "ours>=2", 'ours>=3; sys_platform == "win32"')
    fake.finds([aa], [aa])
    with pytest.raises(ResolveError, match=r"aa 1.0 needs ours>=2, and what is installed here is ours 1.0"):
        fake.resolve(wanted("aa"), make(fake.folder, "ours", "1.0"))
    with pytest.raises(ResolveError, match=r"you ask for ours<1, and what is installed here is ours 1.0"):
        fake.resolve(wanted("ours<1"), make(fake.folder, "ours", "1.0"))


def test_hashes_are_checked(fake: Fake) -> None:
    aa = make(fake.folder, "aa", "1.0")
    fake.finds([aa], [aa])
    sha512 = hashlib.sha512(aa.path.read_bytes()).hexdigest()
    fake.resolve(wanted(f"aa==1.0 --hash=sha256:{'0' * 64} --hash=sha256:{aa.sha256}"))
    fake.resolve(wanted(f"aa==1.0 --hash=sha512:{sha512}"))
    with pytest.raises(
        ResolveError, match=f"none of the hashes that are allowed for aa: its own is sha256:{aa.sha256}"
    ):
        fake.resolve(wanted(f"aa==1.0 --hash=sha256:{'0' * 64}"))


def test_refreshing_replaces_what_was_resolved(fake: Fake) -> None:
    old, new = make(fake.folder, "aa", "1.0"), make(fake.folder, "aa", "2.0")
    fake.finds([old], [old])
    fake.resolve(wanted("aa"))
    fake.finds([new], [new])
    assert versions(fake.resolve(wanted("aa"))[LINUX.name]) == {"aa": "1.0"}
    assert versions(fake.resolve(wanted("aa"), refresh=True)[LINUX.name]) == {"aa": "2.0"}
    assert versions(fake.resolve(wanted("aa"))[LINUX.name]) == {"aa": "2.0"}


def test_resolves_again_where_a_wheel_is_gone(fake: Fake) -> None:
    aa = make(fake.folder, "aa", "1.0")
    fake.finds([aa], [aa])
    gone = fake.resolve(wanted("aa"))[LINUX.name][0].path
    gone.unlink()
    gone.parent.rmdir()
    assert fake.resolve(wanted("aa"))[LINUX.name][0].path.exists()


def test_whatever_decides_is_in_the_key(fake: Fake) -> None:
    aa = make(fake.folder, "aa", "1.0")
    fake.finds([aa], [aa])
    fake.resolve(wanted("aa"))
    for asked in (wanted("aa>=1"), wanted("aa", constraints=["aa==1.0"]), wanted("aa", options=["--pre"])):
        before = len(fake.runs())
        fake.resolve(asked)
        assert len(fake.runs()) == before + 2
    fake.patch.setenv("PIP_EXTRA_INDEX_URL", "file:///elsewhere")
    before = len(fake.runs())
    fake.resolve(wanted("aa"))
    assert len(fake.runs()) == before + 2


def test_the_resolver_sees_pips_settings_and_no_others(fake: Fake) -> None:
    aa = make(fake.folder, "aa", "1.0")
    fake.finds([aa], [aa])
    fake.patch.setenv("PEX_PYTHON", "/nowhere")
    fake.patch.setenv("PYTHONPATH", "/nowhere")
    fake.resolve(wanted("aa", options=["--pre"]))
    _, _, environment = fake.runs()[0]
    assert environment["PIP_FIND_LINKS"] == str(fake.folder)
    assert (environment["PIP_PRE"], environment["PIP_CONFIG_FILE"]) == ("1", os.devnull)
    assert not {"PEX_PYTHON", "PYTHONPATH"} & environment.keys()


def test_an_interrupt_ends_the_resolvers(fake: Fake) -> None:
    started: list[resolver_module._Process] = []

    def interrupted(process: resolver_module._Process, seconds: float) -> None:
        started.append(process)
        raise KeyboardInterrupt

    fake.patch.setattr(resolver_module, "_command", lambda: [sys.executable, "-S", "-c", "import signal; signal.pause()"])
    with pytest.MonkeyPatch.context() as patch:
        wait = resolver_module._Process.wait
        patch.setattr(
            resolver_module._Process,
            "wait",
            lambda self, seconds: interrupted(self, seconds) if not started else wait(self, seconds),
        )
        with pytest.raises(KeyboardInterrupt):
            fake.resolve(wanted("aa"))
    assert not started[0].running()
    assert not list((fake.cache.root / "unfinished").iterdir())


def test_a_file_that_is_required_counts_by_its_content(fake: Fake) -> None:
    aa = make(fake.folder, "aa", "1.0")
    fake.finds([aa], [aa])
    line = f"aa @ {aa.path.as_uri()}"
    fake.resolve(wanted(line))
    fake.resolve(wanted(line))
    make(fake.folder, "aa", "1.0", "bb")
    fake.resolve(wanted(line))
    assert len(fake.runs()) == 4
    aa.path.unlink()
    with pytest.raises(ResolveError, match=r"no such file: .*aa-1\.0-py3-none-any\.whl"):
        fake.resolve(wanted(line))


def test_what_is_no_requirement_is_named(fake: Fake) -> None:
    with pytest.raises(ResolveError, match="not a requirement: what is this: "):
        fake.resolve(wanted("what is this"))


# -- Reports -------------------------------------------------------------------------------------------------------------


class Stock(Index):
    """An index with these files; None for one that does not answer."""

    def __init__(self, *filenames: str, silent: bool = False) -> None:
        super().__init__({"index-url": "https://user:secret@index.test/simple"})
        self._entries = [
            {"filename": filename, "requires-python": python}
            for filename, _, python in (entry.partition(" ") for entry in filenames)
        ]
        self._nobody = silent

    def files(self, name: str) -> list[index_module.File]:
        if self._nobody:
            raise OSError("index.test: 503 Service Unavailable")
        return [file for entry in self._entries if (file := index_module._from_json(entry)) and file.name == name]


def missing(requirement: str, index: Index, asked: Wanted | None = None, by: str = "") -> str:
    report = "ERROR: Could not find a version that satisfies the requirement {}{}\nERROR: No matching distribution found for {}"
    report = report.format(requirement, by, requirement)
    error = explain(report, LINUX, asked or wanted(requirement), {}, index)
    assert error.details == report
    return error.reason.replace(f"Python {python_version()}", "Python X")


def test_a_version_that_is_not_there() -> None:
    few = Stock("aa-1.0.tar.gz", "aa-1.1-py3-none-any.whl")
    assert missing("aa==3", few) == "no version of aa matches ==3: there are 1.0, 1.1"
    many = Stock(
        *(f"aa-{version}-py3-none-any.whl" for version in ("1.0", "1.1", "1.2", "3.0rc1", "4.0", "4.1", "4.2"))
    )
    assert missing("aa==3", many) == "no version of aa matches ==3: the nearest are 1.1, 1.2, 4.0, 4.1"
    assert missing("aa>=9", many, by=" (from bb)") == (
        "no version of aa matches >=9 (which bb needs): the nearest are 1.2, 4.0, 4.1, 4.2"
    )


def test_no_wheel_but_in_another_version() -> None:
    index = Stock(
        "aa-1.0-py3-none-any.whl", "aa-2.0-py3-none-win32.whl", "aa-3.0-py3-none-any.whl", "aa-1.5rc1-py3-none-any.whl"
    )
    assert (
        missing("aa==2.0", index)
        == "aa==2.0 has no wheel for linux/amd64 and Python X: the nearest version with one is 1.0"
    )


def test_no_wheel_for_this_python() -> None:
    index = Stock("aa-1.0-py3-none-any.whl >=3.6", "aa-2.0-py3-none-any.whl >=3.99")
    assert missing("aa>=2", index) == (
        "aa>=2 has no wheel for linux/amd64 and Python X (it needs Python >=3.99): the nearest version with one is 1.0"
    )
    index = Stock(f"aa-2.0-cp36-cp36m-{LINUX.tags[0].split('-')[2]}.whl")
    assert missing("aa", index) == "aa has no wheel for linux/amd64 and Python X: there are wheels for cp36-cp36m only"


def test_no_wheel_at_all() -> None:
    assert missing("aa==1.0", Stock("aa-1.0.tar.gz")) == (
        "aa==1.0 has no wheel for linux/amd64 and Python X: there is only its source; make a wheel (pip wheel aa), "
        "and name its folder in PIP_FIND_LINKS"
    )


def test_a_constraint_counts() -> None:
    index = Stock("aa-1.0-py3-none-any.whl")
    assert missing("aa", index, wanted("aa", constraints=["aa==2.0"])) == "no version of aa matches ==2.0: there is 1.0"


def test_an_index_that_gives_no_hint() -> None:
    assert missing("aa", Stock(silent=True)) == (
        "there is no distribution of aa for linux/amd64 (what there is, nobody says: index.test: 503 Service Unavailable)"
    )


def test_a_name_that_is_nowhere_is_not_shown_with_passwords() -> None:
    assert missing("aa", Stock()) == "there is no distribution called aa: in index.test there is none; is it misspelt?"


CONFLICT = """ERROR: Cannot install bb==1.0, bb==1.1 and cc<2 because these package versions have conflicting dependencies.

The conflict is caused by:
    {}

To fix this you could try to:
1. loosen the range of package versions you've specified"""


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["The user requested cc<2", "bb 1.1 depends on cc<4 and >=3", "The user requested cc<2", "bb 1.0 depends on cc>=2"],
         "you ask for cc<2, and bb 1.1 needs cc<4,>=3"),
        (["The user requested cc>=2", "The user requested cc<2"], "ours 1.0 needs cc>=2, and you ask for cc<2"),
        (["The user requested dd", "The user requested (constraint) dd==3.0"],
         "you ask for dd, and dd==3.0 is a constraint (requirements.txt)"),
        (["bb 1.1 depends on dd>=4", "bb 1.0 depends on dd>=4"],
         "bb 1.1 needs dd>=4, and dd==3.0 is a constraint (requirements.txt)"),
    ],
)  # fmt: skip
def test_conflicts_are_condensed(lines: list[str], message: str, tmp_path: Path) -> None:
    ours = make(tmp_path, "ours", "1.0", "cc>=2")
    report = CONFLICT.format("\n    ".join(lines))
    error = explain(report, LINUX, wanted("cc<2", constraints=["dd==3.0"]), {"ours": ours}, Stock())
    assert error.reason == f"the requirements conflict: {message}"


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("There was 1 error:\n1. aa 1.0 from https://index.test/aa-1.0-py3-none-win32.whl\nERROR: it is not a supported wheel",
         "aa 1.0 has no wheel for linux/amd64 and Python X: the lock has aa-1.0-py3-none-win32.whl"),
        ("There was 1 error:\n1. aa 1.0 from https://index.test/aa-1.0.tar.gz\nExpected sha256 hash of 0",
         "cannot get aa 1.0 for linux/amd64: Expected sha256 hash of 0"),
        ("ERROR: Exception:\nTraceback:\nFile x\nOSError: the disk is full",
         "cannot resolve for linux/amd64: OSError: the disk is full"),
        ("", "cannot resolve for linux/amd64: it did not say why"),
        ("Failed to bootstrap Pip 26.1.\nERROR: No matching distribution found for pip==26.1",
         "the resolver needs pip==26.1 for Python X itself, and found none in index.test"),
    ],
)  # fmt: skip
def test_other_reports(report: str, message: str) -> None:
    error = explain(report, LINUX, wanted("aa"), {}, Stock())
    assert error.reason.replace(f"Python {python_version()}", "Python X") == message


# -- Indexes -------------------------------------------------------------------------------------------------------------


class _Answers(http.server.BaseHTTPRequestHandler):
    pages: dict[str, tuple[str, str]]

    def do_GET(self) -> None:
        kind, text = self.pages.get(self.path, ("", ""))
        self.send_response(200 if kind else 404)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
    pages: dict[str, tuple[str, str]] = {}
    handler = type("Handler", (_Answers,), {"pages": pages})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", pages
        running.shutdown()
        thread.join()


def found(index: Index, name: str) -> list[tuple[str, str | None, bool]]:
    return [(str(file.version), file.python, file.yanked) for file in index.files(name)]


def test_asks_an_index_in_either_form(server: tuple[str, dict[str, tuple[str, str]]]) -> None:
    url, pages = server
    answer = {
        "files": [{"filename": "aa-1.0.tar.gz", "requires-python": ">=3.9", "yanked": "broken"}, {"filename": "x"}]
    }
    pages["/json/aa/"] = "application/vnd.pypi.simple.v1+json", json.dumps(answer)
    pages["/html/aa/"] = (
        "text/html",
        '<a href="../aa-2.0-py3-none-any.whl#sha256=0" data-requires-python="&gt;=3.8">aa</a><a>',
    )
    index = Index({"index-url": f"{url}/json", "extra-index-url": f"{url}/html/ {url}/empty"})
    assert found(index, "aa") == [("1.0", ">=3.9", True), ("2.0", ">=3.8", False)]
    assert found(index, "bb") == []


def test_an_answer_that_is_no_index_is_no_answer(server: tuple[str, dict[str, tuple[str, str]]]) -> None:
    url, pages = server
    pages["/aa/"] = "application/json", "[]"
    with pytest.raises(OSError, match="not what an index answers"):
        Index({"index-url": url}).files("aa")


def test_looks_into_folders_and_files(tmp_path: Path) -> None:
    make(tmp_path, "aa", "1.0")
    (tmp_path / "simple" / "aa").mkdir(parents=True)
    (tmp_path / "simple" / "aa" / "index.html").write_text('<a href="aa-2.0.zip">aa</a>')
    index = Index({"index-url": (tmp_path / "simple").as_uri(), "find-links": str(tmp_path)})
    assert found(index, "aa") == [("2.0", None, False), ("1.0", None, False)]


def test_an_unreachable_index_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(
        ResolveError, match=r"no package index can be reached: 127.0.0.1:9 \(.*refused\); what was packed once"
    ):
        Index({"index-url": "http://127.0.0.1:9/simple"}).reach(Silent())


def test_where_an_index_is_unreachable_the_rest_is_used(tmp_path: Path) -> None:
    steps = Steps()
    index = Index(
        {"index-url": "http://127.0.0.1:9/simple", "extra-index-url": "file:///one", "find-links": str(tmp_path)}
    )
    index.reach(steps)
    assert steps.notes == [
        f"no package index can be reached: 127.0.0.1:9 (Connection refused); looking in /one and {tmp_path} only"
    ]
    assert (index.settings["index-url"], index.settings["extra-index-url"]) == ("file:///one", "")
    assert "no package index can be reached" in missing("aa", index)


def test_an_index_that_answers_anything_is_reached(server: tuple[str, dict[str, tuple[str, str]]]) -> None:
    url, _ = server
    Index({"index-url": "http://127.0.0.1:9/simple", "extra-index-url": url}).reach(Silent())


def test_pips_settings_are_read_as_pip_reads_them(tmp_path: Path) -> None:
    user, named = tmp_path / "pip" / "pip.conf", tmp_path / "named.conf"
    user.parent.mkdir()
    user.write_text(
        "[global]\nindex-url = https://user\nextra_index_url =\n  https://one\n  https://two\n[install]\npre = 1\n"
    )
    named.write_text("[global]\nindex-url = https://named\n[download]\nretries = 3\n")
    environ = {
        "HOME": str(tmp_path / "home"),
        "XDG_CONFIG_HOME": str(tmp_path),
        "XDG_CONFIG_DIRS": str(tmp_path / "none"),
    }
    settings = pip_settings([], environ)
    if sys.platform != "darwin":
        assert (settings["index-url"], settings["extra-index-url"]) == ("https://user", "https://one https://two")
        assert "pre" not in settings
    settings = pip_settings([], {**environ, "PIP_CONFIG_FILE": str(named), "PIP_INDEX_URL": "https://variable"})
    assert (settings["index-url"], settings["retries"]) == ("https://variable", "3")
    nothing = {"PIP_CONFIG_FILE": os.devnull}
    assert pip_settings([], nothing) == {}
    options = ["--extra-index-url", "https://more", "--find-links=/folder", "--no-index"]
    assert pip_settings(options, {**nothing, "PIP_EXTRA_INDEX_URL": "https://one"}) == {
        "extra-index-url": "https://one https://more",
        "find-links": "/folder",
        "no-index": "1",
    }
    # As for pip, an index that is named in a requirements file takes the place of those that are configured.
    assert pip_settings(["--index-url", "https://new"], {**nothing, "PIP_EXTRA_INDEX_URL": "https://one"}) == {
        "extra-index-url": "",
        "index-url": "https://new",
    }


def test_a_broken_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text("index-url = x\n")
    with pytest.raises(PackError, match=r"cannot read pip's configuration .*pip.conf: "):
        pip_settings([], {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "HOME": str(tmp_path)})
