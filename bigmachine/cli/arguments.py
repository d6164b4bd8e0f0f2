"""What may stand on the command line. Only argparse, no module of the commands' own: it is needed for each of them.

So the names of platforms, Pythons and builders are not known here; `pack` checks them, and `completion` adds them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from ..info import VERSION
from .exits import MEANINGS, WRONG

SHELLS = ("bash", "zsh", "tcsh")

_ABOUT = "Pack a program that uses bigmachine into one file, which runs as driver and as worker."

_PACK = """\
Make one executable file of a program, with the distributions that it needs, for each platform.

What it needs stands in the script's own block (PEP 723), or in what -r or --project name; otherwise the
installed distributions are taken that it imports from, in the versions that are installed here."""

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


def make_parser() -> argparse.ArgumentParser:
    """The parser. Its result has ``command`` (and for ``cache`` ``action``), ``quiet``, and the command's own arguments."""
    parser = _Parser(
        prog="bigmachine",
        description=_ABOUT,
        epilog="exit codes:\n" + "\n".join(f"  {code:<5}{meaning}" for code, meaning in MEANINGS.items()),
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
    completion = _add(commands, "completion", "code by which a shell completes commands", _COMPLETION)
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or tcsh")
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


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object, and no progress")
