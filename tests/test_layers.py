"""The shape of the package, read from its sources: which module may import which, where imports stand, how long functions are.

A failure here says what to do. The checks are functions of sources, and the last tests feed them what they must find.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from bigmachine.pack.imports import syntax

ROOT = Path(__file__).parent.parent

LAYERS: list[set[str]] = [
    {"errors", "state", "info", "retry", "address", "settings", "vars", "events", "logs"},
    {"rpc", "credentials", "authority", "cache", "bootstrap"},
    {"pack"},
    {"services", "system", "profiling"},
    {"program"},
    {"machine"},
    {"boot", "keepalive"},
    {"fleet"},
    {"inside", "progress"},
    {"session"},
    {"supervisor", "worker", "toolkit"},
    {"systems"},
    {"launch"},
    {"driver", "testing"},
    {"bigmachine"},  # Its own __init__: the public names, for users. No module of ours imports them from there.
    {"cli", "__main__"},
]
"""Names directly under bigmachine/. Each imports from its own layer and from those above it in this list."""

NARROWER: dict[str, set[str]] = {
    # The wire knows nothing of machines: it could be a package of its own.
    "rpc": {"errors", "info", "retry"},
    # The supervisor never runs user code, and does not know the driver's side of a machine.
    # Of `system` it knows `Host`: where to listen, how to exit.
    "supervisor": {"errors", "info", "rpc", "credentials", "services", "system", "vars"},
    # It is sent to hosts that have nothing else of ours.
    "bootstrap": set(),
    "pack": {"errors", "info", "cache", "bootstrap"},
}
"""Parts that may import less than their layer allows (and themselves)."""

_ASYNCIO = "asyncio: for those who use it; a worker starts without"
_TRACES = "OpenTelemetry: for processes that have loaded it"
_VITALS = "psutil, 20 ms and 1.6 MB: for machines that are asked"
_DEATH = "dataclasses and re, 20 ms: no part of what comes before the first service process starts"

_FORK = "driver and worker are the same program: each imports its own half, 60 and 150 ms"

_FILE = "a packed file is taken apart by its driver alone, and mostly not even there: machines run the same module"
_SHIPS = "only for machines that have nothing of the program yet"
_MISS = "http and much of pex: not for what was resolved before"
_FLAGS = "driver, and what argparse makes of its flags, 6 ms: for the commands that have them"
_INSIDE = "for those who look inside"
_UNHEALTHY = "for machines that run out of memory"
_PROMETHEUS = "60 ms, as it has an HTTP server: only for those who want that format"
_SETTINGS = "for those who have such a file, or a mistake in it"

IMPORTS_INSIDE_FUNCTIONS: dict[tuple[str, str, str], str] = {
    ("bigmachine.driver", "start", "bigmachine.supervisor.control"): _FORK,
    ("bigmachine.driver", "start", "bigmachine.worker"): _FORK,
    ("bigmachine.driver", "start", "bigmachine.launch"): _FORK,
    ("bigmachine.driver", "start_bare", "bigmachine.launch"): _FORK,
    ("bigmachine.launch", "open_session", "bigmachine.authority"): "cryptography, 50 ms: while the nursery starts",
    ("bigmachine.launch", "find_system", "importlib.metadata"): "25 ms: only for systems that are not ours",
    ("bigmachine.rpc.codec", "_names", "pickletools"): "2 ms: only to explain an error",
    ("bigmachine.supervisor.main", "main", "bigmachine.supervisor.local"): "the program is executed before anything else",
    ("bigmachine.rpc.calls", "__await__", "asyncio"): _ASYNCIO,
    ("bigmachine.rpc.tracing", "calling", "bigmachine.rpc.spans"): _TRACES,
    ("bigmachine.rpc.tracing", "serving", "bigmachine.rpc.spans"): _TRACES,
    ("bigmachine.rpc.server", "event_loop", "bigmachine.rpc.eventloop"): _ASYNCIO,
    ("bigmachine.rpc.codec", "_dump", "bigmachine.rpc.byvalue"): "cloudpickle, 26 ms: most programs never need it",
    (
        "bigmachine.supervisor.processes",
        "_psutil_table",
        "psutil",
    ): "20 ms: only at a stop, and where there is no /proc",
    ("bigmachine.supervisor.processes", "start", "signal"): "5 ms of enumerations: process 0 is on its way by then",
    ("bigmachine.supervisor.processes", "attach", "bigmachine.supervisor.death"): _DEATH,
    ("bigmachine.supervisor.processes", "_bury", "bigmachine.supervisor.death"): _DEATH,
    ("bigmachine.supervisor.processes", "_listen", "bigmachine.supervisor.control"): "socket and json, 15 ms: as death",
    ("bigmachine.supervisor.service", "mem_info", "bigmachine.supervisor.vitals"): _VITALS,
    ("bigmachine.supervisor.service", "disk_info", "bigmachine.supervisor.vitals"): _VITALS,
    ("bigmachine.supervisor.service", "load_info", "bigmachine.supervisor.vitals"): _VITALS,
    ("bigmachine.supervisor.service", "vitals", "bigmachine.supervisor.vitals"): _VITALS,
    ("bigmachine.worker", "vars", "bigmachine.vars"): _INSIDE,
    ("bigmachine.supervisor.service", "vars", "bigmachine.vars"): _INSIDE,
    ("bigmachine.session", "variables", "bigmachine.inside.variables"): _INSIDE,
    ("bigmachine.worker", "profile", "bigmachine.profiling"): _INSIDE,
    ("bigmachine.worker", "doing", "bigmachine.profiling.doing"): _INSIDE,
    ("bigmachine.session", "profile", "bigmachine.inside.profiles"): _INSIDE,
    ("bigmachine.session", "progress", "bigmachine.progress"): "tqdm, for those who want a bar",
    ("bigmachine.inside.server", "_run", "bigmachine.inside.serving"): "starlette and uvicorn, 0.3 s: for those who connect",
    ("bigmachine.session", "handle_debug", "bigmachine.inside.routes"): _INSIDE,
    ("bigmachine.inside.bundle", "write", "bigmachine.inside.evidence"): "zipfile, and whatever looks inside: for a report",
    ("bigmachine.inside.bundle", "__init__", "bigmachine.inside.evidence"): "where failures are reported, and before they are",
    ("bigmachine.inside.unhealthy", "_make_folder", "tempfile"): _UNHEALTHY,
    ("bigmachine.inside.unhealthy", "_save_heap", "bigmachine.inside.profiles"): _UNHEALTHY,
    ("bigmachine.inside.unhealthy", "_save_threads", "bigmachine.inside.profiles"): _UNHEALTHY,
    ("bigmachine.inside.unhealthy", "_save_variables", "bigmachine.inside.variables"): _UNHEALTHY,
    ("bigmachine.inside.variables", "as_prometheus", "prometheus_client"): _PROMETHEUS,
    ("bigmachine.inside.variables", "_families", "prometheus_client.core"): _PROMETHEUS,
    ("bigmachine.cache", "default_root", "platformdirs"): "not needed where a variable names the cache",
    ("bigmachine.settings", "user_file", "platformdirs"): "5 ms: not for workers, which do not have it",
    ("bigmachine.settings", "read", "tomllib"): _SETTINGS,
    ("bigmachine.settings", "_nearest", "difflib"): _SETTINGS,
    ("bigmachine.driver", "_unknown", "difflib"): "for a flag that does not exist",
    ("bigmachine.program", "main", "bigmachine.pack.prelude"): _FILE,
    ("bigmachine.program", "_unpacked", "bigmachine.pack.prelude"): _FILE,
    ("bigmachine.program", "_in_cache", "bigmachine.pack.archive"): _FILE,
    ("bigmachine.program", "_in_cache", "bigmachine.pack.prelude"): _FILE,
    ("bigmachine.program", "_unpacked", "bigmachine.cache"): _FILE,
    ("bigmachine.program", "_remove", "shutil"): _FILE,
    ("bigmachine.program", "_temporary", "tempfile"): _FILE,
    ("bigmachine.launch", "packed_file", "bigmachine.pack.archive"): _SHIPS,
    ("bigmachine.launch", "packed_file", "bigmachine.pack.itself"): _SHIPS,
    ("bigmachine.systems.local", "_with_image", "bigmachine.cache"): _SHIPS,
    ("bigmachine.systems.local", "_with_image", "bigmachine.pack.onhost"): _SHIPS,
    ("bigmachine.pack.resolve", "resolve", "bigmachine.pack.index"): _MISS,
    ("bigmachine.pack.resolve", "resolve", "bigmachine.pack.resolver"): _MISS,
    ("bigmachine.pack.index", "_default_index", "pex.resolve.package_repository"): _MISS,
    ("bigmachine.cli.arguments", "_add_flags", "bigmachine.driver"): _FLAGS,
    ("bigmachine.cli.terminal", "progress", "bigmachine.cli.live"): "rich, 50 ms: only for terminals",
    ("bigmachine.cli.top", "run", "bigmachine.cli.screen"): "rich again",
    ("bigmachine.progress", "__init__", "tqdm.auto"): "50 ms, as it has asyncio: not where no bar can be drawn",
}
"""(module, function, what it imports) → the reason. "It is slow" is one, where the process mostly does without."""

LONG_FUNCTIONS: dict[tuple[str, str], str] = {}
"""(module, function) → the reason why it is longer than `MAX_LINES`."""

MAX_LINES = 70

DRIVER_ONLY: dict[str, tuple[str, ...]] = {
    "boto3": ("bigmachine.systems.ec2",),
    "botocore": ("bigmachine.systems.ec2",),
    "cryptography": ("bigmachine.authority",),
    "paramiko": ("bigmachine.systems.ssh",),
    "platformdirs": ("bigmachine.cache", "bigmachine.settings"),
    "packaging": ("bigmachine.pack",),
    "prometheus_client": ("bigmachine.inside",),
    "rich": ("bigmachine.cli",),
    "tqdm": ("bigmachine.progress",),
    "shtab": ("bigmachine.cli",),
    "starlette": ("bigmachine.inside",),
    "uvicorn": ("bigmachine.inside",),
}
"""Distributions that workers do not have, and the modules, or packages, that may import each."""

LOADED_BY_WORKERS = ("bigmachine", "bigmachine.driver", "bigmachine.program", "bigmachine.worker", "bigmachine.supervisor")
"""What a worker imports (with all below the last): `DRIVER_ONLY` must not be reached from here at import time."""


@dataclass(frozen=True)
class Import:
    """`target` is what is imported, a module where it is ours; `function` is the innermost one that it stands in."""

    target: str
    line: int
    function: str | None


@dataclass(frozen=True)
class Module:
    """`name` is dotted; a package's is its own name, without ``.__init__``."""

    name: str
    tree: ast.Module
    is_package: bool
    siblings: frozenset[str]
    """The names of all modules, its own among them."""

    @property
    def part(self) -> str:
        return part_of(self.name)

    @cached_property
    def imports(self) -> list[Import]:
        return list(self._imports(self.tree, None))

    def _imports(self, node: ast.AST, function: str | None) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, function)
            elif isinstance(child, ast.ImportFrom):
                base = self._base(child)
                for alias in child.names:
                    whole = f"{base}.{alias.name}"
                    yield Import(whole if whole in self.siblings else base, child.lineno, function)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from self._imports(child, child.name)
            else:
                yield from self._imports(child, function)

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parents = self.name.split(".")
        parents = parents[: len(parents) - node.level + self.is_package]
        return ".".join([*parents, *([node.module] if node.module else [])])

    @property
    def ours(self) -> Iterator[Import]:
        return (entry for entry in self.imports if entry.target.split(".")[0] == "bigmachine")


def part_of(module: str) -> str:
    names = module.split(".")
    return names[1] if len(names) > 1 else names[0]


def modules(sources: Mapping[str, str]) -> dict[str, Module]:
    """From paths (``bigmachine/rpc/__init__.py``) and sources to modules by name."""
    names = {path: path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in sources}
    known = frozenset(names.values())
    return {
        names[path]: Module(names[path], syntax(source, path), path.endswith("__init__.py"), known)
        for path, source in sources.items()
    }


@pytest.fixture(scope="module")
def package() -> dict[str, Module]:
    paths = sorted((ROOT / "bigmachine").rglob("*.py"))
    return modules({path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in paths})


def check(problems: Iterator[str]) -> None:
    found = list(problems)
    assert not found, "\n" + "\n".join(found)


# -- The checks ----------------------------------------------------------------------------------------------------------


def unlisted(package: dict[str, Module]) -> Iterator[str]:
    listed = set().union(*LAYERS)
    for part in sorted({module.part for module in package.values()} - listed):
        yield f"bigmachine/{part} is in no layer: put {part!r} into LAYERS in tests/test_layers.py, as high up as it can stand"


def upward(package: dict[str, Module]) -> Iterator[str]:
    rank = {part: i for i, layer in enumerate(LAYERS) for part in layer}
    for module in package.values():
        for entry in module.ours:
            part = part_of(entry.target)
            if part == module.part:
                continue
            where = f"{module.name}:{entry.line} imports {entry.target}"
            if rank.get(part, 0) > rank.get(module.part, len(LAYERS)):
                yield f"{where}, which is in a later layer (LAYERS); let {module.name} say what it needs as a Protocol"
            elif module.part in NARROWER and part not in NARROWER[module.part]:
                yield f"{where}; {module.part} may import only {sorted(NARROWER[module.part])} (NARROWER)"


def cycles(package: dict[str, Module]) -> Iterator[str]:
    graph = {module.name: {entry.target for entry in module.ours} - {module.name} for module in package.values()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield f"modules import each other: {' ← '.join(error.args[1])}"


def late_imports(package: dict[str, Module], allowed: Mapping[tuple[str, str, str], str]) -> Iterator[str]:
    found = {
        (module.name, entry.function, entry.target): entry.line
        for module in package.values()
        for entry in module.imports
        if entry.function is not None
    }
    for (module, function, target), line in found.items():
        if (module, function, target) not in allowed:
            yield (
                f"{module}:{line} imports {target} inside {function}(): move it to the top of the file, "
                f"or give the reason in IMPORTS_INSIDE_FUNCTIONS"
            )
    for entry in allowed.keys() - found.keys():
        yield f"IMPORTS_INSIDE_FUNCTIONS lists {entry}, which is no more"


def driver_only(package: dict[str, Module]) -> Iterator[str]:
    for module in package.values():
        for entry in module.imports:
            owners = DRIVER_ONLY.get(entry.target.split(".")[0], ())
            if owners and not f"{module.name}.".startswith(tuple(f"{owner}." for owner in owners)):
                only = " and ".join(owners)
                yield f"{module.name}:{entry.line} imports {entry.target}: only {only} may, workers do not have it"
    importers = {
        module.name
        for module in package.values()
        for entry in module.imports
        if entry.function is None and entry.target.split(".")[0] in DRIVER_ONLY
    }
    seen: set[str] = set()
    waiting: list[tuple[str, ...]] = [
        (name,) for name in package if name in LOADED_BY_WORKERS or name.startswith(LOADED_BY_WORKERS[-1] + ".")
    ]
    while waiting:
        path = waiting.pop()
        if path[-1] in importers:
            yield f"a worker would import {' → '.join(path)}, which needs what workers do not have: import it where it is used"
        elif path[-1] not in seen:
            seen.add(path[-1])
            targets = {entry.target for entry in package[path[-1]].ours if entry.function is None}
            # Importing a module runs the packages that it lies in.
            targets |= {target.rpartition(".")[0] for target in targets} - {""}
            waiting += [(*path, target) for target in sorted(targets & package.keys())]


def long_functions(package: dict[str, Module], allowed: Mapping[tuple[str, str], str]) -> Iterator[str]:
    found = {}
    for module in package.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_LINES:
                    found[module.name, node.name] = lines
    for (name, function), lines in found.items():
        if (name, function) not in allowed:
            yield f"{name}.{function} has {lines} lines, more than {MAX_LINES}: what in it could decide without acting?"
    for entry in allowed.keys() - found.keys():
        yield f"LONG_FUNCTIONS lists {entry}, which is no more"


# -- The package ---------------------------------------------------------------------------------------------------------


def test_every_module_is_in_a_layer(package: dict[str, Module]) -> None:
    check(unlisted(package))


def test_imports_point_down(package: dict[str, Module]) -> None:
    check(upward(package))


def test_no_modules_import_each_other(package: dict[str, Module]) -> None:
    check(cycles(package))


def test_imports_stand_at_the_top(package: dict[str, Module]) -> None:
    check(late_imports(package, IMPORTS_INSIDE_FUNCTIONS))


def test_workers_do_without_what_only_the_driver_has(package: dict[str, Module]) -> None:
    check(driver_only(package))


def test_functions_are_short(package: dict[str, Module]) -> None:
    check(long_functions(package, LONG_FUNCTIONS))


def test_the_packaging_folder_is_no_package() -> None:
    assert not (ROOT / "packaging" / "__init__.py").exists(), "it would shadow PyPI's packaging"


# -- The checks find what they are for -----------------------------------------------------------------------------------


def parse(**sources: str) -> dict[str, Module]:
    """``rpc__client="import x"`` is ``bigmachine/rpc/client.py``."""
    paths = {f"bigmachine/{name.replace('__', '/')}.py": source for name, source in sources.items()}
    return modules({"bigmachine/__init__.py": "", "bigmachine/rpc/__init__.py": "", **paths})


def test_finds_a_module_in_no_layer() -> None:
    (problem,) = unlisted(parse(helpers=""))
    assert "put 'helpers' into LAYERS in tests/test_layers.py" in problem


@pytest.mark.parametrize(
    "source",
    [
        "from .session import Session",
        "from . import session",
        "from bigmachine.session import Session",
        "import bigmachine.session",
        "def f():\n    from .session import Session",
        "import typing\nif typing.TYPE_CHECKING:\n    from .session import Session",
        "from . import start",
    ],
)
def test_finds_an_import_that_points_up(source: str) -> None:
    (problem,) = upward(parse(machine=source, session=""))
    assert problem.startswith("bigmachine.machine:")


@pytest.mark.parametrize("source", ["from ..credentials import x", "from .. import state", "from ..state import State"])
def test_finds_an_import_that_is_not_for_this_part(source: str) -> None:
    (problem,) = upward(parse(rpc__client=source, credentials="", state=""))
    assert "rpc may import only" in problem


def test_lets_pass_what_points_down_or_stays() -> None:
    sources = {"rpc__client": "from . import codec\nfrom ..errors import E\nimport ssl", "rpc__codec": "", "errors": ""}
    package = parse(**sources, session="from .rpc.client import C\nfrom .errors import E")
    check(upward(package))
    check(cycles(package))
    check(unlisted(package))


def test_finds_a_cycle() -> None:
    (problem,) = cycles(parse(rpc__client="from .codec import x", rpc__codec="from . import client"))
    assert "bigmachine.rpc.client" in problem
    assert "bigmachine.rpc.codec" in problem


def test_finds_an_import_inside_a_function_and_a_permission_that_nobody_needs() -> None:
    package = parse(session="def start():\n    if True:\n        import ssl")
    (problem,) = late_imports(package, {})
    assert problem.startswith("bigmachine.session:3 imports ssl inside start()")
    check(late_imports(package, {("bigmachine.session", "start", "ssl"): "a reason"}))
    assert len(list(late_imports(parse(), {("bigmachine.session", "start", "ssl"): "a reason"}))) == 1


def test_finds_what_workers_do_not_have() -> None:
    package = parse(authority="from cryptography import x509", services="import cryptography.x509")
    (problem,) = driver_only(package)
    assert problem.startswith("bigmachine.services:1")


def test_finds_the_way_by_which_a_worker_would_load_it() -> None:
    sources = {"authority": "import cryptography", "session": "from .authority import Authority"}
    (problem,) = driver_only(parse(**sources, worker="from . import session"))
    assert "bigmachine.worker → bigmachine.session → bigmachine.authority" in problem
    check(driver_only(parse(**sources, worker="def f():\n    from . import session")))


def test_finds_a_long_function() -> None:
    head, line = "def f():\n", "    pass\n"
    package = parse(session=head + MAX_LINES * line, machine=head + (MAX_LINES - 1) * line)
    (problem,) = long_functions(package, {})
    assert problem.startswith("bigmachine.session.f has 71 lines")
