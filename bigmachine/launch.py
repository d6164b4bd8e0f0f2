"""How a session comes about: which system, which program, whose authority. The driver's alone."""

from __future__ import annotations

import importlib
import inspect
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from .credentials import Role, client_context
from .errors import UsageError
from .fleet import Fleet
from .inside.looking import look_inside
from .inside.settings import SECTION, Settings
from .logs import Logs
from .machine import Network
from .program import packed, packed_program
from .rpc.codec import Codec
from .rpc.reactor import reactor
from .rpc.streams import Stream
from .session import Session
from .settings import fields, load
from .system import ENTRY_POINTS, Launcher, Program

SYSTEMS = {
    "local": "bigmachine.systems.local:LocalLauncher",
    "ec2": "bigmachine.systems.ec2:Ec2Launcher",
    "ssh": "bigmachine.systems.ssh:SshLauncher",
    "test": "bigmachine.systems.inprocess:TestLauncher",
}
"""Our own, by name; only the one that is used is imported."""

BARE = "import sys; sys.path[:] = sys.argv[1:]; sys.argv[1:] = []; from bigmachine.worker import bare; bare()"


def find_system(name: str) -> Callable[..., Launcher]:
    """The launcher class of system `name`: ours, or one that a package registers. Raises `UsageError`."""
    if name in SYSTEMS:
        module, _, attribute = SYSTEMS[name].partition(":")
        ours: Callable[..., Launcher] = getattr(importlib.import_module(module), attribute)
        return ours
    from importlib.metadata import entry_points  # 25 ms, for systems that are not ours.

    registered = entry_points(group=ENTRY_POINTS)
    for entry in registered:
        if entry.name == name:
            try:
                launcher: Callable[..., Launcher] = entry.load()
            except Exception as error:  # Somebody else's module: whatever it raises, say whose.
                raise UsageError(f"system {name!r} ({entry.value}) cannot be loaded: {error}") from error
            return launcher
    known = sorted({*SYSTEMS, *(entry.name for entry in registered)})
    raise UsageError(f"unknown system: {name!r}; there are {', '.join(known)}")


def make_launcher(system: str | Launcher, options: Mapping[str, Any], required: set[str]) -> Launcher:
    """A launcher with those `options` that it takes. Raises `UsageError` where it does not take one of `required`."""
    if not isinstance(system, str):
        if required:
            raise UsageError(f"options {sorted(required)} belong to the launcher itself")
        return system
    factory = find_system(system)
    known = inspect.signature(factory).parameters
    unknown = sorted(name for name in required if name not in known)
    if unknown:
        raise UsageError(f"system {system!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return factory(**{name: value for name, value in options.items() if name in known})


def open_session(
    system: str | Launcher,
    options: Mapping[str, Any],
    required: set[str],
    program: Program,
    main_names: frozenset[str],
) -> Session:
    """A driver's session, with an authority of its own that lives only in this process."""
    own = {each.flag for each in fields(Settings, SECTION)}
    settings = load(Settings, SECTION, {name: value for name, value in options.items() if name in own})
    launcher = make_launcher(system, {name: options[name] for name in options.keys() - own}, required - own)
    logs = Logs(directory=Path(settings.logdir) if settings.logdir else None)  # Before anything has begun: it may raise.
    try:
        if ships := tuple(getattr(launcher, "ships", ())):
            program = packed_file(program, ships)
    except BaseException:  # Whatever it is, Ctrl-C, too: there will be no session to close them.
        logs.close()
        launcher.close()
        raise
    launcher.prepare()
    from .authority import Authority  # cryptography, 50 ms: while what `prepare` has begun goes on.

    name = f"s-{secrets.token_hex(4)}"
    authority = Authority(name)
    credentials = authority.issue(Role.DRIVER, name)
    network = Network(lambda: client_context(credentials), Codec(main_names, Stream), reactor())
    session = Session(network, fleet=Fleet(launcher, authority, program, network, name=name, logs=logs))
    try:
        look_inside(session, settings)
    except BaseException:  # Nobody else has it.
        session.shutdown()
        raise
    return session


class Command(NamedTuple):
    """``sys.orig_argv`` without the interpreter: what `kind` of program it is (``"c"`` code, ``"m"`` a module, ``"file"``
    a script, a directory or an archive), the interpreter's options with that program, and the program's own arguments.

    `kind` is empty where there is nothing to execute again: an interactive interpreter, a program on standard input.
    """

    kind: str = ""
    words: tuple[str, ...] = ()
    own: tuple[str, ...] = ()


def split_command(argv: Sequence[str]) -> Command:
    """Reads the interpreter's options as it does itself (``python --help``): letters may share one dash."""
    at = 1
    while at < len(argv):
        word = argv[at]
        if word == "-":
            break
        if word == "--" or not word.startswith("-"):
            end = at + (2 if word == "--" else 1)
            return Command("file", tuple(argv[1:end]), tuple(argv[end:])) if end <= len(argv) else Command()
        letter, glued = ("-", "") if word.startswith("--") else _option_with_value(word[1:])
        end = at + (1 if glued else 2)
        if letter in ("c", "m"):
            return Command(letter, tuple(argv[1:end]), tuple(argv[end:]))
        at = end if letter in ("W", "X") or word == "--check-hash-based-pycs" else at + 1
    return Command()


def _option_with_value(letters: str) -> tuple[str, str]:
    """The first letter that takes a value, and what of the value stands in the same word; empty where there is none."""
    for index, letter in enumerate(letters):
        if letter in "cmWX":
            return letter, letters[index + 1 :]
    return "", ""


def own_program() -> Program | None:
    """How to execute this very program again: the packed one that it is, or the same interpreter, options, script and
    arguments. None where that cannot be: an interactive interpreter, a notebook, a program on standard input."""
    if (running := packed()) is not None:
        return packed_program(running)
    kind, words, own = split_command(sys.orig_argv)
    file = getattr(sys.modules["__main__"], "__file__", None)
    if not kind or (kind == "file" and file is None) or "ipykernel" in sys.modules:
        return None
    if kind == "file":  # Whoever has changed the directory meanwhile still has the same program.
        words = (*words[:-1], os.path.abspath(words[-1]) if os.path.exists(words[-1]) else str(file))
    return Program((sys.executable, *words, *own), cwd=os.getcwd(), own_args=len(own), digest="")


def packed_file(program: Program, platforms: Sequence[str]) -> Program:
    """`program` with its packed file, which is made where there is none: of the bare toolkit, where `program` is that.
    Raises `PackError`, `UsageError`."""
    if program.file is not None:
        from .pack.archive import read_contents  # Only for systems whose machines have nothing yet.

        contents = read_contents(program.file)
        if not {each.platform for each in contents.platforms}.intersection(platforms):
            contents.manifest(platforms[0])  # Raises: as each host will that turns out to be of another platform.
        return program
    if packed() is not None:
        raise UsageError("a packed program cannot pack: start the session with driver.start()")
    from .pack.itself import TOOLKIT, pack_itself  # Which a packed program does not have all of.

    file, digest = pack_itself(TOOLKIT if BARE in program.argv else _main_target(), platforms)
    return replace(program, file=file, digest=digest)


def _main_target() -> Path:
    """What to pack for this very program: its script, or the directory whose ``__main__.py`` it is. Raises `UsageError`."""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if split_command(sys.orig_argv).kind not in ("file", "m") or file is None:
        raise UsageError("machines of this system need the program, and it is not in a file: put it into one")
    if Path(file).name == "__main__.py":
        return Path(file).parent
    if main.__spec__ is not None and "." in main.__spec__.name:
        raise UsageError(
            f"a module of a package cannot pack itself: {main.__spec__.name}; run a script, or the package's __main__"
        )
    return Path(file)


def bare_program() -> Program:
    """The toolkit without a program, with this process's module search path."""
    paths = [os.path.abspath(path) for path in sys.path]
    return Program((sys.executable, "-c", BARE, *paths), cwd=os.getcwd(), digest="")
