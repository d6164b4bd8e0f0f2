"""``bigmachine completion``: code by which a shell completes commands, options, names and files.

The code holds all names itself: bigmachine is not started while somebody types.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import shtab

from ..pack.build import BUILDERS
from ..pack.platforms import NAMES, PYTHONS
from ..profiling import KINDS
from .arguments import make_parser
from .config import SECTIONS

CHOICES: dict[str, Sequence[str]] = {
    "platform": NAMES,
    "python": PYTHONS,
    "builder": tuple(BUILDERS),
    "system": tuple(SECTIONS),
    "ec2publicip": ("true", "false"),
    "kind": tuple(KINDS),
}
"""Arguments whose values `arguments` does not know."""

PATHS = {
    "target": shtab.FILE,
    "file": shtab.FILE,
    "output": shtab.FILE,
    "requirements": shtab.FILE,
    "add": shtab.FILE,
    "project": shtab.DIRECTORY,
    "program": shtab.FILE,
    "sshconfig": shtab.FILE,
    "ec2cloudconfig": shtab.FILE,
    "ec2units": shtab.FILE,
}
"""Arguments that are files and directories."""


def run(arguments: argparse.Namespace) -> str:
    """The code for the shell that `arguments` name."""
    parser = make_parser()
    for action in _actions(parser):
        if action.dest in CHOICES:
            action.choices = CHOICES[action.dest]
        if action.dest in PATHS:
            action.complete = PATHS[action.dest]  # type: ignore[attr-defined]  # Where shtab looks for it.
    return str(shtab.complete(parser, shell=arguments.shell)).rstrip()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Those of `parser` and of its commands. argparse has no public list of them; shtab itself reads this one."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
