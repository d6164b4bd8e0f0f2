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

WITH_FLAGS = ("config", "doctor", "ps", "gc")
"""Commands that take the flags of a program, too."""

_ABOUT = "Pack programs that use bigmachine, and look after the machines that they run on."

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

_COMPLETION = """\
Print the code by which a shell completes bigmachine's commands, options and file names. To install it:

  bash  bigmachine completion bash > ~/.local/share/bash-completion/completions/bigmachine
  zsh   bigmachine completion zsh > ~/.zfunc/_bigmachine
        and in ~/.zshrc, above compinit: fpath+=~/.zfunc
  tcsh  bigmachine completion tcsh > ~/.bigmachine.csh
        and in ~/.tcshrc: source ~/.bigmachine.csh"""


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

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


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"not a number of machines: {text!r}")
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
