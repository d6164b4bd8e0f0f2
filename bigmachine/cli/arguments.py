"""What may stand on the command line. Only argparse, no module of the commands' own: it is needed for each of them.

So the names of platforms, Pythons and builders are not known here; `pack` checks them, and `completion` adds them.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from ..info import VERSION
from .exits import MEANINGS, WRONG

SHELLS = ("bash", "zsh", "tcsh")

DRIVER = "localhost:3333"
"""Where a driver is looked for. As in `inside.settings`, of which nothing is needed here."""

SORTS = ("start", "cpu", "memory", "load")
"""Of the machines in ``top``: the column that decides, the largest first."""

WITH_FLAGS = ("config", "doctor", "ps", "gc")
"""Commands that take the flags of a program, too."""

ATTACHED = ("status", "top", "logs", "profile", "bundle")
"""Commands that look into a driver that runs."""

_ABOUT = "Pack programs that use bigmachine, look into them while they run, and look after their machines."

_PACK = """\
Make one executable file of a program, with the distributions that it needs, for each platform.

What it needs stands in the script's own block (PEP 723), or in what -r or --project name; otherwise the
installed distributions are taken that it imports from, in the versions that are installed here."""

_CONFIG = """\
Print every setting and where its value comes from: a flag, the environment, bigmachine.toml or pyproject.toml in
this directory, your own bigmachine.toml, or the default. What is printed may stand in a bigmachine.toml."""

_DOCTOR = """\
Find out whether machines of a system could be started, without starting or changing any: credentials, permissions,
quotas, images, networks, and the wheels of the program. What is wrong is printed with what to do about it."""

_PS = """\
List the machines of all sessions that run in AWS under these credentials: whose they are, how old, what they cost."""

_GC = """\
End the machines whose session is gone: those whose time has run out, and those whose driver ran on this host and does
not any more. Launch templates that were left over are deleted, too."""

_DRIVER = """

ADDRESS is what the driver has printed when it started (`status at http://localhost:3334/debug/bigmachine/`), or
host:port. Default: localhost:3333."""

_STATUS = f"""\
Print what each machine is, does and needs, and the calls of each method.{_DRIVER}"""

_TOP = f"""\
Show what the machines do, as it goes on. Keys: c, m, l sort by processor, memory, load; o by start; / filters, j and k (or the
arrows) scroll, p pauses, q leaves. Where standard output is no terminal, it is printed once.{_DRIVER}"""

_LOGS = f"""\
Print what the machines have said.{_DRIVER}"""

_PROFILE = f"""\
Take a profile of the driver and of the service processes of all machines, in one, and write it to a file for `go tool pprof`.
KIND is profile (processor time over some seconds), heap, objects (memory by type) or threads.{_DRIVER}"""

_BUNDLE = f"""\
Write all there is to know about a run into one zip file: status, logs, variables, profiles, versions. No secrets.{_DRIVER}"""

_COMPLETION = """\
Print the code by which a shell completes bigmachine's commands, options and file names. To install it:

  bash  bigmachine completion bash > ~/.local/share/bash-completion/completions/bigmachine
  zsh   bigmachine completion zsh > ~/.zfunc/_bigmachine
        and in ~/.zshrc, above compinit: fpath+=~/.zfunc
  tcsh  bigmachine completion tcsh > ~/.bigmachine.csh
        and in ~/.tcshrc: source ~/.bigmachine.csh"""


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong. `last` is an argument that may be left out, and may come after options: argparse by
    itself takes it for left out as soon as an option follows the arguments before it (before 3.13)."""

    last = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """See `argparse.ArgumentParser`."""
        found, rest = super().parse_known_args(args, namespace)
        left_out = self.last and getattr(found, self.last) == self.get_default(self.last)
        if left_out and rest and not rest[0].startswith("-"):
            setattr(found, self.last, rest.pop(0))
        return found, rest

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG, f"bigmachine: {message}; see `{self.prog} --help`\n")


def make_parser(words: Collection[str] = WITH_FLAGS) -> argparse.ArgumentParser:
    """The parser. Its result has ``command`` (and for ``cache`` ``action``), ``quiet``, and the command's own arguments; for
    `WITH_FLAGS` ``flags``, those that are given by name. Of these commands only those in `words` get their flags."""
    parser = _Parser(
        prog="bigmachine",
        description=_ABOUT,
        epilog="exit codes:\n" + "\n".join(f"  {code:<7}{meaning}" for code, meaning in MEANINGS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bigmachine {VERSION}")
    parser.set_defaults(quiet=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    _add_pack(_add(commands, "pack", "make one file of a program", _PACK))
    info = _add(commands, "info", "what is in a packed file")
    info.add_argument("file", metavar="FILE", type=Path, help="the packed file")
    _add_json(info)
    cache = _add(commands, "cache", "what packing has kept, and where")
    actions = cache.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")
    _add_json(_add(actions, "info", "where it is, what is in it, how large it is"))
    _add(actions, "clear", "remove all of it; refused while somebody uses it")
    config = _add(commands, "config", "what is set, and where", _CONFIG)
    config.add_argument("--system", metavar="NAME", help="of one system only: local, ssh or ec2")
    _add_json(config, "print one JSON object")
    elsewhere = _add_elsewhere(commands)
    _add_attached(commands)
    completion = _add(commands, "completion", "code by which a shell completes commands", _COMPLETION)
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or tcsh")
    for command in (config, *elsewhere):
        command.set_defaults(flags={})
        if command.prog.split()[-1] in words:
            _add_flags(command, "" if command is config else "ec2")
    return parser


def _add(commands: argparse._SubParsersAction[_Parser], name: str, about: str, more: str = "") -> _Parser:
    return commands.add_parser(
        name,
        help=about,
        description=more or f"{about[0].upper()}{about[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_pack(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", metavar="TARGET", type=Path, help="a script, or a directory with a __main__.py")
    add(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="the file to write (default: the program's name in this directory)",
    )
    add(
        "--platform",
        metavar="NAME",
        action="append",
        default=[],
        help="where it shall run: linux/amd64, linux/arm64, darwin/arm64, darwin/amd64; may be given several times "
        "(default: this platform and linux/amd64; with --builder shiv, this platform)",
    )
    add("--python", metavar="VERSION", default="", help="the Python that runs it, such as 3.12 (default: this one)")
    add("--builder", metavar="NAME", default="pex", help="what makes the file: pex or shiv (default: pex)")
    add(
        "-r",
        "--requirements",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="a requirements file of what it needs; may be given several times",
    )
    add(
        "--project", metavar="DIR", type=Path, help="the project whose pylock.toml or pyproject.toml says what it needs"
    )
    add(
        "--add",
        metavar="PATH",
        type=Path,
        action="append",
        default=[],
        help="a module, package or data file of your own that is not found by itself; may be given several times",
    )
    add("--refresh", action="store_true", help="ask the package index again, though the cache knows an answer")
    add("-q", "--quiet", action="store_true", help="print nothing but errors, and those without details")
    _add_json(parser)


def _add_elsewhere(commands: argparse._SubParsersAction[_Parser]) -> tuple[_Parser, ...]:
    """The commands about machines in a cloud."""
    doctor = _add(commands, "doctor", "whether machines could be started, and what to do if not", _DOCTOR)
    doctor.add_argument("system", metavar="SYSTEM", choices=("ec2",), help="ec2")
    doctor.add_argument(
        "program", metavar="PROGRAM", nargs="?", type=Path, help="a script or a packed file (default: bigmachine alone)"
    )
    doctor.add_argument("-n", metavar="N", type=_count, default=1, help="so many machines (default: 1)")
    ps = _add(commands, "ps", "which machines there are, and what they cost", _PS)
    gc = _add(commands, "gc", "end machines whose session is gone", _GC)
    gc.add_argument("--dry-run", action="store_true", help="only say what would be ended")
    for parser in (ps, gc):
        parser.add_argument("--all-regions", action="store_true", help="in all regions of the account")
    for parser in (doctor, ps, gc):
        _add_json(parser)
    return doctor, ps, gc


def _add_attached(commands: argparse._SubParsersAction[_Parser]) -> None:
    """`ATTACHED`. What stands in a KIND, a machine or in seconds the driver itself checks."""
    status = _add(commands, "status", "how the machines of a running driver are", _STATUS)
    top = _add(commands, "top", "the same, live", _TOP)
    logs = _add(commands, "logs", "what its machines have said", _LOGS)
    profile = _add(commands, "profile", "a profile of all its processes", _PROFILE)
    bundle = _add(commands, "bundle", "all about a run in one file", _BUNDLE)
    top.add_argument("--once", action="store_true", help="print it once, even on a terminal")
    top.add_argument("--filter", metavar="WORDS", default="", help="only machines that have these words")
    top.add_argument("--sort", metavar="BY", choices=SORTS, default="start", help=", ".join(SORTS))
    logs.add_argument("-n", metavar="N", type=_lines, default=100, help="so many lines at most (default: 100)")
    logs.add_argument("-f", "--follow", action="store_true", help="go on as there are more, until the session ends")
    profile.add_argument("kind", metavar="KIND", help="profile, heap, objects or threads")
    profile.add_argument("--seconds", metavar="S", help="how long to look, for profile (default: 30)")
    profile.add_argument("--gc", action="store_true", help="collect garbage before, for heap")
    profile.add_argument("--text", action="store_true", help="print it as text for people")
    for parser in (logs, profile):
        parser.add_argument("--machine", metavar="M", help="of one only: a machine's id or address, or driver")
    for parser in (profile, bundle):
        parser.add_argument(
            "-o", "--output", metavar="FILE", type=Path, help="the file to write (default: a new one in this directory)"
        )
    for parser in (status, top, logs, profile, bundle):
        parser.add_argument("address", metavar="ADDRESS", nargs="?", default=DRIVER, help=f"of the driver ({DRIVER})")
        parser.last = "address"
        _add_json(parser)


def _count(text: str) -> int:
    return _number(text, "machines")


def _lines(text: str) -> int:
    return _number(text, "lines")


def _number(text: str, what: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"not a number of {what}: {text!r}")
    return int(text)


def _add_flags(parser: argparse.ArgumentParser, system: str) -> None:
    """The flags of programs; all of them, or those of `system`."""
    from ..driver import FLAGS, PREFIX  # Some milliseconds with what argparse makes of them.

    group = parser.add_argument_group("flags, as of a program")
    for name, (kind, text) in FLAGS.items():
        if not name.startswith(system) and f"{system}:" not in text:
            continue
        spelled = f"-{PREFIX}{name}", f"--{PREFIX}{name}"
        add = functools.partial(group.add_argument, dest=name, action=_Flag, default=argparse.SUPPRESS)
        if kind is bool:
            add(*spelled, nargs=0, const=True, help=text)
            for value in ("true", "false"):  # As `driver.add_flags` does.
                add(*(f"{each}={value}" for each in spelled), nargs=0, const=value == "true", help=argparse.SUPPRESS)
        else:
            add(*spelled, type=kind, help=text, metavar="X")


class _Flag(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        value = self.const if self.nargs == 0 else values
        namespace.flags = {**namespace.flags, self.dest: value}


def _add_json(parser: argparse.ArgumentParser, about: str = "print one JSON object, and no progress") -> None:
    parser.add_argument("--json", action="store_true", help=about)
