"""What this process runs: a packed program, or one that is not.

A packed file, when it is executed, installs its distributions (that is the builder's part: pex, shiv) and calls `main` here.
`main` unpacks the user's code into the cache, once for each file, and executes it as ``__main__``, exactly as ``python
app.py`` would. Machines execute the same code from the same directory, without going through the file again: `worker_main`
is their way in, here and on other hosts.

A file is compared with its own digest when it is first seen, and again when its size or times change: a damaged copy is an
error at start, not a strange one later.
"""

from __future__ import annotations

import atexit
import builtins
import importlib.machinery
import importlib.util
import json
import os
import site
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import CacheError, PackError, explain, explainers
from .system import Program

if TYPE_CHECKING:
    from .cache import Cache

RUN = "import sys; sys.path.append(sys.argv[1]); from bigmachine.program import worker_main; worker_main()"
"""Executed by machines, with `OPTIONS`; the arguments are the directories of the distributions and of the code, then the
program's own."""

OPTIONS = ("-s", "-S", "-P")
"""Of the interpreter, on machines: nothing but the program's own distributions, whatever the host has installed."""

ENVIRON = {"PYTHONPATH": "", "PYTHONHOME": ""}
"""For the same purpose. The other variables of the interpreter's have their effect, as `Session.start` can set them."""

PACKAGE = str(Path(__file__).parents[1])
"""Where this package is: in a packed program, the directory of all its distributions."""


@dataclass(frozen=True)
class Packed:
    """The packed program that this process runs. `folder` holds ``code/`` and ``program.json``; `file` is the packed
    file, None on a machine; `arguments` are the program's own, as they were given."""

    folder: Path
    file: Path | None
    name: str
    entry: str
    digest: str
    arguments: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path, file: Path | None, arguments: Sequence[str]) -> Packed:
        """From a directory that `archive.unpack_code` made."""
        contents: dict[str, Any] = json.loads((folder / "program.json").read_bytes())
        return cls(folder, file, contents["name"], contents["entry"], contents["digest"], tuple(arguments))


_running: Packed | None = None


def packed() -> Packed | None:
    """What this process runs, where that is a packed program."""
    return _running


def digest() -> str:
    """Of the packed program; empty where it is not packed."""
    return _running.digest if _running is not None else ""


def packed_program(program: Packed, package: str = PACKAGE) -> Program:
    """How machines on this host execute `program`, with distributions from the directory `package`."""
    argv = (sys.executable, *OPTIONS, "-c", RUN, package, str(program.folder), *program.arguments)
    own_args = len(program.arguments)
    return Program(argv, ENVIRON, os.getcwd(), own_args, program.digest, program.file)


# -- Ways in -------------------------------------------------------------------------------------------------------------


def pex_main() -> NoReturn:
    """What a file packed by pex calls. It executes something that it has installed, and says where it began."""
    main(os.environ.pop("PEX", ""))


def main(file_name: str = "") -> NoReturn:
    """What a packed file calls: run the user's program as the driver. By default the file is what is executed."""
    from .pack.prelude import Damaged  # Not on machines.

    file = Path(file_name or sys.argv[0]).absolute()
    try:
        program = Packed.read(_unpacked(file), file, sys.argv[1:])
    except (PackError, CacheError, Damaged, OSError) as error:
        sys.exit(f"bigmachine: {error}")
    sys.argv[0] = str(file)
    _execute(program)


def worker_main() -> NoReturn:
    """What a machine calls: run the user's program up to `driver.start`."""
    package, folder = sys.argv[1:3]
    sys.path.remove(package)
    site.addsitedir(package)  # Not `append`: distributions may have .pth files.
    site.setquit()  # What `-S` leaves out, and programs may use.
    site.setcopyright()
    site.sethelper()
    program = Packed.read(Path(folder), None, sys.argv[3:])
    sys.argv[:3] = [str(program.folder / "code" / program.entry)]
    _execute(program)


# -- The code ------------------------------------------------------------------------------------------------------------


def _unpacked(file: Path) -> Path:
    """The directory with the code of the packed `file`. Kept in use, in the cache, for the life of this process."""
    from .cache import Cache  # As above.
    from .pack.prelude import seal

    key = seal(str(file))
    status = file.stat()
    stamp = f"{status.st_dev}-{status.st_ino}-{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"
    try:
        cache = Cache()
        cache.hold()
        return _in_cache(cache, file, key, stamp)
    except CacheError:  # A home that cannot be written to, or none: a directory of our own, for this once.
        return _in_cache(Cache(_temporary() / "cache"), file, key, stamp)


def _in_cache(cache: Cache, file: Path, key: str, stamp: str) -> Path:
    folder = cache.get("programs", key)
    whole = folder is not None and _is_whole(folder)
    if folder is not None and whole and (folder / "seen" / stamp).exists():
        return folder
    from .pack.archive import unpack_code  # And what reads archives: only the first time.
    from .pack.prelude import check_whole

    check_whole(str(file))
    if folder is not None and not whole:
        _remove(folder)
    folder = cache.put("programs", key, lambda empty: unpack_code(file, empty))
    try:
        (folder / "seen").mkdir(exist_ok=True)
        (folder / "seen" / stamp).touch()
    except OSError as error:
        raise CacheError(f"cannot write the cache {cache.root}: {error.strerror}") from error
    return folder


def _is_whole(folder: Path) -> bool:
    """Cleaners of caches remove single files, those that were not read for long."""
    try:
        return (folder / "code" / Packed.read(folder, None, ()).entry).is_file()
    except (OSError, ValueError, KeyError):
        return False


def _remove(folder: Path) -> None:
    import shutil  # With zlib, bz2 and lzma: not on machines.

    shutil.rmtree(folder, ignore_errors=True)


def _temporary() -> Path:
    import tempfile  # As above.

    folder = Path(tempfile.mkdtemp(prefix="bigmachine-"))
    owner = os.getpid()
    atexit.register(lambda: _remove(folder) if os.getpid() == owner else None)
    return folder


def _execute(program: Packed) -> NoReturn:
    """Run the code as ``__main__``, as the interpreter itself would have."""
    global _running
    _running = program
    code = program.folder / "code"
    sys.path.insert(0, str(code))
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    compiled = _load(main, code, program.entry)
    sys.modules["__main__"] = main
    sys.excepthook = _report
    explainers.append(missing_module)
    exec(compiled, main.__dict__)
    sys.exit(0)


def _load(main: ModuleType, code: Path, entry: str) -> CodeType:
    """The compiled program, from the bytecode cache where it is there; and the names that `main` begins with."""
    package = entry.removesuffix("__main__.py").rstrip("/").replace("/", ".") if entry.endswith("/__main__.py") else ""
    if package and (code / entry).with_name("__init__.py").exists():
        spec = importlib.util.find_spec(f"{package}.__main__")
        assert spec is not None
        main.__spec__, main.__package__ = spec, package
    else:
        path = str(code / entry)  # Which may have any suffix, or none.
        loader = importlib.machinery.SourceFileLoader("__main__", path)
        spec = importlib.util.spec_from_file_location("__main__", path, loader=loader)
    assert spec is not None
    assert isinstance(spec.loader, importlib.machinery.SourceFileLoader)
    main.__loader__ = spec.loader
    main.__file__ = spec.origin
    compiled = spec.loader.get_code(spec.name)
    assert compiled is not None
    return compiled


def _report(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    """`sys.excepthook`: without the builder's and our own frames, and with a word on what may not have been packed."""
    explain(error)
    users = traceback
    while users is not None and users.tb_frame.f_code is not _execute.__code__:
        users = users.tb_next
    shown = users.tb_next if users is not None else traceback
    sys.__excepthook__(kind, error.with_traceback(shown), shown)


def missing_module(error: BaseException) -> str:
    """What to do about a module that a packed program lacks; empty for other errors, and programs that are not packed."""
    if _running is None or not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    top = error.name.partition(".")[0]
    if (
        top in sys.stdlib_module_names
        or top in sys.modules
        or importlib.machinery.PathFinder.find_spec(top) is not None
    ):
        return ""  # It is here, and has not what was asked of it.
    return f"{top} was not packed into {_running.name}: `bigmachine pack … --add {top}.py` (or its directory), or require it"
