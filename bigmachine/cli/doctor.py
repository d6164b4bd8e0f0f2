"""``bigmachine doctor``: whether machines of a system could be started, and what to do where not. It changes nothing.

It ends with 1 where a check has failed. With ``--json``: ``system``, ``ok`` (no check has failed), and ``checks``, a list of
``name``, ``ok`` (null: machines can probably be had, but there is something to be said), ``found``, and ``fix`` (what to do, or
``""``).
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence

from ..settings import load
from ..systems.ec2.api import Api
from ..systems.ec2.doctor import Check, checks
from ..systems.ec2.settings import SECTION, Settings
from .exits import Ended
from .terminal import progress
from .text import number

MARKS = {True: "ok", None: "note", False: "FAILED"}


def run(arguments: Namespace) -> str:
    """Examine the system. Raises `UsageError`, `PackError` for a packed file that is damaged, `Ended` with what is wrong."""
    settings = load(Settings, SECTION, arguments.flags)
    with progress(silent=arguments.json or not sys.stderr.isatty()) as shown:
        examined = checks(Api(settings), settings, program=arguments.program, count=arguments.n, progress=shown)
        found = list(examined)
    if arguments.json:
        output = json.dumps(as_json(arguments.system, found), indent=1)
    else:
        output = "\n".join(describe(found))
    if any(check.ok is False for check in found):
        raise Ended(output)
    return output


def describe(found: Sequence[Check]) -> Iterator[str]:
    """A line for each check, one more for what to do, and the verdict."""
    names = max(len(check.name) for check in found)
    marks = max(map(len, MARKS.values()))
    for check in found:
        yield f"{MARKS[check.ok].ljust(marks)}  {check.name.ljust(names)}  {check.found}"
        if check.fix:
            yield f"{' ' * (marks + names + 4)}→ {check.fix}"
    failed = sum(1 for check in found if check.ok is False)
    if failed:
        yield f"{failed} of {len(found)} checks failed: machines could not be started"
    else:
        yield f"{number(len(found), 'check')}: machines can be started"


def as_json(system: str, found: Sequence[Check]) -> dict[str, object]:
    """As the module's docstring says."""
    return {
        "system": system,
        "ok": all(check.ok is not False for check in found),
        "checks": [
            {"name": check.name, "ok": check.ok, "found": check.found, "fix": check.fix} for check in found
        ],
    }
