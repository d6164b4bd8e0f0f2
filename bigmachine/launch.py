"""How a session comes about: which system, which program, whose authority. The driver's alone."""

from __future__ import annotations

import inspect
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from .authority import Authority
from .credentials import Role, client_context
from .errors import UsageError
from .machine import Network
from .rpc.codec import Codec
from .rpc.reactor import reactor
from .rpc.streams import Stream
from .session import Fleet, Session
from .system import ENTRY_POINTS, Launcher, Program
from .systems.inprocess import TestLauncher
from .systems.local import LocalLauncher

SYSTEMS: dict[str, Callable[..., Launcher]] = {"local": LocalLauncher, "test": TestLauncher}

BARE = "import sys; sys.path[:] = sys.argv[1:]; sys.argv[1:] = []; from bigmachine.worker import bare; bare()"


def find_system(name: str) -> Callable[..., Launcher]:
    """The launcher class of system `name`: ours, or one that a package registers. Raises `UsageError`."""
    if name in SYSTEMS:
        return SYSTEMS[name]
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
    launcher = make_launcher(system, options, required)
    name = f"s-{secrets.token_hex(4)}"
    authority = Authority(name)
    context = client_context(authority.issue(Role.DRIVER, name))
    network = Network(context, Codec(main_names, Stream), reactor())
    return Session(network, fleet=Fleet(launcher, authority, program))


def split_command(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """``sys.orig_argv`` as (interpreter's options with the script, module or code; the program's own arguments).

    The first is empty where there is nothing to execute again: an interactive interpreter, or a program on its standard
    input.
    """
    at = 1
    while at < len(argv):
        word = argv[at]
        if word in ("-c", "-m"):
            return list(argv[1 : at + 2]), list(argv[at + 2 :])
        if word.startswith(("-c", "-m")) and not word.startswith("--"):
            return list(argv[1 : at + 1]), list(argv[at + 1 :])
        if word in ("-W", "-X", "--check-hash-based-pycs"):
            at += 2
        elif word == "-" or not word.startswith("-"):
            return ([], []) if word == "-" else (list(argv[1 : at + 1]), list(argv[at + 1 :]))
        else:
            at += 1
    return [], []


def own_program() -> Program:
    """How to execute this very program again: the same interpreter, options, script and arguments."""
    command, own = split_command(sys.orig_argv)
    file = getattr(sys.modules["__main__"], "__file__", None)
    if not command or (file is None and not command[-2:-1] == ["-c"]) or "ipykernel" in sys.modules:
        return bare_program()
    if file is not None and "-m" not in command:
        command[-1] = os.path.abspath(command[-1]) if os.path.exists(command[-1]) else file
    return Program((sys.executable, *command, *own), cwd=os.getcwd(), own_args=len(own))


def bare_program() -> Program:
    """The toolkit without a program, with this process's module search path."""
    paths = [os.path.abspath(path) for path in sys.path]
    return Program((sys.executable, "-c", BARE, *paths), cwd=os.getcwd())
