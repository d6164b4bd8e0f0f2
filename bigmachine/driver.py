"""`driver.start()`: the line at which a program becomes a cluster.

In the process that the user started it returns a session. In a machine's service process, which is the same program
executed again, it never returns: that process serves from there on. What stands above it runs everywhere.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import os
import signal
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Any

from .errors import BigmachineError, UsageError

if TYPE_CHECKING:
    from .session import Session
    from .system import Launcher, Program

CONTROL = "BIGMACHINE_CONTROL"
"""As in `supervisor.control`, which only a worker imports."""

PREFIX = "bigm."

FLAGS: dict[str, tuple[type, str]] = {
    "system": (str, "where machines come from: local (default), ssh, ec2, test, or one that a package registers"),
    "http": (str, "where to serve the debug page: host:port (localhost:3333, or the next port that is free), or off"),
    "logdir": (str, "a directory that gets a file of each machine's output"),
    "events": (str, "a file that gets what happens, as JSON lines"),
    "bundle": (str, "a directory that gets a report, in one file, when the program fails"),
    "maxprocs": (int, "service processes of a machine that parallel methods may use (local: 1; ssh, ec2: the host's cores)"),
    "port": (int, "local, ssh: port of a host's first machine, the next ones count up (0: any free port); ec2: of each (443)"),
    "hosts": (str, "ssh: the hosts, such as ada,grace:2222,me@h3, or @FILE with one a line"),
    "sshconfig": (str, "ssh: ssh's configuration (~/.ssh/config)"),
    "sshtunnel": (bool, "ssh: send everything through the SSH connections, for hosts of which no other port can be reached"),
    "sshplatforms": (str, "ssh: what hosts may be (linux/amd64)"),
    "image": (bool, "local: machines run what other hosts would be sent, and nothing else that is installed here"),
    "ec2type": (str, "ec2: instance types of one architecture, such as m7i.large,m6i.large: any will do (m7i.large)"),
    "ec2ondemand": (bool, "ec2: on-demand instances only: nobody takes them away, and they cost more than spot ones"),
    "ec2spotonly": (bool, "ec2: spot instances only: fail rather than take on-demand ones where spot is short"),
    "ec2maxprice": (str, "ec2: the most to pay for a spot instance, in USD an hour (the on-demand price)"),
    "ec2region": (str, "ec2: the region (as AWS's own configuration says)"),
    "ec2profile": (str, "ec2: the profile of AWS's own configuration that has your credentials"),
    "ec2ami": (str, "ec2: the machine image (one that has the driver's version of Python)"),
    "ec2user": (str, "ec2: login name of the image that ec2ami names"),
    "ec2diskspace": (int, "ec2: GiB of the root disk (50)"),
    "ec2dataspace": (int, "ec2: GiB of data space on /mnt/data, for temporary files, too (0: none)"),
    "ec2subnets": (str, "ec2: the subnets' ids (those of the default VPC)"),
    "ec2securitygroups": (str, "ec2: the security groups' ids (one of our own, with one port open)"),
    "ec2publicip": (str, "ec2: false for machines without public addresses and a driver within the VPC (true)"),
    "ec2instanceprofile": (str, "ec2: instance profile, by name or ARN: what machines may do in AWS"),
    "ec2keypair": (str, "ec2: key pair, for your own ssh to the machines"),
    "ec2tags": (str, "ec2: more tags for instances and disks: team=physics,cost=12"),
    "ec2cloudconfig": (str, "ec2: files with more cloud-config"),
    "ec2units": (str, "ec2: files of systemd units that machines start"),
}
"""Every flag: its type and its help. One of type bool needs no value (and may have ``=true`` or ``=false``). A system takes
those that its launcher has a parameter for; the session itself takes http, logdir, events, bundle."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add bigmachine's flags to the program's own parser: ``-bigm.system local`` or ``--bigm.system=local``, ….

    `start` looks at what was parsed. Without this call `start` takes its flags out of ``sys.argv`` itself.
    """
    group = parser.add_argument_group("bigmachine")
    for name, (kind, text) in FLAGS.items():
        names = f"-{PREFIX}{name}", f"--{PREFIX}{name}"
        if kind is bool:
            # Options of their own, as argparse has none whose value may only follow an equals sign.
            for value in ("true", "false"):
                spelled = (f"{each}={value}" for each in names)
                group.add_argument(
                    *spelled,
                    nargs=0,
                    dest=PREFIX + name,
                    const=value == "true",
                    help=argparse.SUPPRESS,
                    action=_Remember,
                )
            group.add_argument(*names, nargs=0, const=True, default=None, help=text, action=_Remember)
        else:
            group.add_argument(*names, type=kind, default=None, help=text, action=_Remember, metavar="X")


class _Remember(argparse.Action):
    """Parsed like any option, and kept for `start`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        value = self.const if self.nargs == 0 else values
        setattr(namespace, self.dest, value)
        _parsed[self.dest.removeprefix(PREFIX)] = value


_parsed: dict[str, Any] = {}
_taken: dict[str, Any] = {}  # Out of ``sys.argv``, by the first `start`; the next ones mean the same flags.


def take_flags(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """bigmachine's flags in `argv`, and what is left of it. Raises `UsageError` on an unknown one or a bad value."""
    flags: dict[str, Any] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--":
            rest.extend((word, *words))
            break
        stripped = word[2:] if word.startswith("--") else word[1:] if word.startswith("-") else ""
        if not stripped.startswith(PREFIX):
            rest.append(word)
            continue
        name, equals, value = stripped.removeprefix(PREFIX).partition("=")
        if name not in FLAGS:
            raise UsageError(_unknown(name))
        if FLAGS[name][0] is bool:
            if equals and value not in ("true", "false"):
                raise UsageError(f"flag -{PREFIX}{name} takes no value, or =true or =false: {FLAGS[name][1]}")
            flags[name] = value != "false"
            continue
        if not equals:
            value = next(words, "")
        if not value:
            raise UsageError(f"flag -{PREFIX}{name} needs a value: {FLAGS[name][1]}")
        try:
            flags[name] = FLAGS[name][0](value)
        except ValueError:
            kind = FLAGS[name][0].__name__
            raise UsageError(f"flag -{PREFIX}{name}: not a valid {kind}: {value!r}") from None
    return flags, rest


def _unknown(name: str) -> str:
    import difflib  # For this alone.

    close = difflib.get_close_matches(name, FLAGS, 1)
    known = f"did you mean -{PREFIX}{close[0]}?" if close else f"there are {', '.join(f'-{PREFIX}{flag}' for flag in FLAGS)}"
    return f"unknown flag -{PREFIX}{name}; {known}"


def start(system: str | Launcher | None = None, **options: Any) -> Session:
    """Become a driver, and return its session; in a machine's service process, serve and never return.

    Where there is no program that could be executed again (a shell, a notebook) machines run the bare toolkit.
    `system` is a name or a launcher; by default what the flag ``-bigm.system`` says, else ``local``. `options` are the
    system's own (``maxprocs=4``), or the session's (``http="off"``, ``logdir``, ``events``, ``bundle``), and override flags.
    Raises `UsageError` on an unknown system or option.
    """
    main_names = _main_names()
    if CONTROL in os.environ:
        from .supervisor.control import ControlSocket  # Only workers need it, and they need nothing of what is below.
        from .worker import run

        control = ControlSocket.from_environment()
        if control is not None:
            run(control, main_names)
    flags, rest = take_flags(sys.argv[1:])
    if flags and not _parsed:
        sys.argv[1:] = rest
        _taken.update(flags)
    merged = {**flags, **_taken, **_parsed, **options}
    chosen = merged.pop("system", None)
    from .launch import (  # Ditto, for the driver: cryptography alone takes 60 ms.
        bare_program,
        open_session,
        own_program,
    )

    program = own_program()
    if program is None:  # What this process has defined is defined nowhere else: it goes by value.
        program, main_names = bare_program(), frozenset()
    try:
        session = open_session(system or chosen or "local", merged, set(options), program, main_names)
    except BigmachineError as error:
        # What the user can do about it stands in its text; where in bigmachine it was found is of no use to them.
        raise error.with_traceback(None) from None
    _end_at_exit(session)
    return session


def start_bare(system: str | Launcher = "local", *, program: Program | None = None, **options: Any) -> Session:
    """``bigmachine.start``: a session without a program that is executed again, for notebooks, shells and tests.

    Machines run the bare toolkit; services whose classes they cannot import travel by value. With `program`, machines
    execute that instead; it must reach `driver.start()`.
    """
    from .launch import bare_program, open_session  # As in `start`.

    session = open_session(system, options, set(options), program or bare_program(), frozenset())
    _end_at_exit(session)
    return session


@functools.cache
def _main_names() -> frozenset[str]:
    """The names of `__main__` under which a machine's `__main__` has the same classes and functions, as it runs up to the
    same line: the first `start` of the program. What is defined later goes by value."""
    main: Mapping[str, Any] = vars(sys.modules["__main__"])
    return frozenset(name for name, value in main.items() if isinstance(value, (type, FunctionType)))


def _end_at_exit(session: Session) -> None:
    """A program that does not use ``with`` leaves nothing behind either."""
    reference = weakref.ref(session)

    def end() -> None:
        session = reference()
        if session is not None:
            error: BaseException | None = getattr(sys, "last_value", None)  # By which the interpreter ends, if any.
            if error is not None and not _is_prompt():  # There it is some mistake of the user's, long ago.
                session.fail(error)
            session.shutdown()

    atexit.register(end)
    _fail_by_exceptions(session)
    _end_by_signals()


def _is_prompt() -> bool:
    """Whether somebody types what is executed: a shell, a notebook, ``python -i``."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


_watched: weakref.WeakSet[Session] = weakref.WeakSet()
"""Sessions that are told of the exception by which the program ends."""


def _fail_by_exceptions(session: Session) -> None:
    """An exception that nobody catches ends the program: sessions are told while there can be threads, that is, before
    `atexit`. Not at a prompt, where the program goes on."""
    if _is_prompt():
        return
    first = not _watched
    _watched.add(session)
    earlier = sys.excepthook
    if not first or getattr(earlier, "bigmachine", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        earlier(kind, error, trace)
        for session in list(_watched):
            session.fail(error)

    hook.bigmachine = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _end_by_signals() -> None:
    """SIGTERM and SIGHUP end a driver as Ctrl-C does, with exit code 128 + the signal's number: else nobody would tell machines
    elsewhere, which would go on until their leases lapse. Signals that the program handles, or ignores, are its own affair."""
    if threading.current_thread() is not threading.main_thread():
        return
    driver = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() != driver:  # A fork, which has inherited this: it ends as it would without us.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)
