"""``bigmachine gc``: end machines whose session is gone, and delete the launch templates that such sessions have left.

Which those are is decided in `bigmachine.systems.ec2.instances`. It ends with 1 where one could not be ended, or a region
not be looked at; those that are closed to this identity do not count, as it has started nothing there.

With ``--json``: ``dry_run``; ``ended`` (with ``--dry-run``: what would be), a list of ``id``, ``kind`` (``"machine"`` or
``"launch template"``), ``region``, ``session``, ``owner``, ``name``, ``reason``, and ``error`` (why it could not be ended, or
null); ``kept`` (machines that may be in use), ``regions`` (those that were looked at), and ``closed`` (by region, why it could
not be).
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..settings import load
from ..systems.ec2.api import DENIED, Api, Ec2Error
from ..systems.ec2.instances import (
    Calls,
    InRegion,
    OurInstance,
    Ours,
    abandoned,
    delete,
    end,
    in_regions,
    our_templates,
    ours,
    regions,
    still_abandoned,
)
from ..systems.ec2.settings import SECTION, Settings
from .exits import Ended
from .terminal import progress
from .text import number


@dataclass(frozen=True)
class Left:
    """Something that nobody needs any more, why, and why it is there still, where that was tried in vain."""

    what: Ours
    region: str
    reason: str
    error: str = ""

    @property
    def kind(self) -> str:
        return "machine" if isinstance(self.what, OurInstance) else "launch template"


@dataclass(frozen=True)
class Swept:
    """What was found in a region: what is `left`, how many machines were `kept`; and a `note`, or none."""

    left: tuple[Left, ...]
    kept: int
    note: str = ""


def run(arguments: Namespace) -> str:
    """Sweep the region of the settings, or all. Raises `Ec2Error`, `UsageError`; `Ended` where something is still there."""
    settings = load(Settings, SECTION, arguments.flags)
    home = Api(settings)
    with progress(silent=arguments.json or not sys.stderr.isatty()) as shown:
        names = regions(home) if arguments.all_regions else [home.region]
        shown.step(f"looking in {number(len(names), 'region')}")
        found, closed = in_regions(names, lambda name: sweep(InRegion(home, name), arguments.dry_run))
    if not found and closed:
        raise next(iter(closed.values()))
    notes = {name: str(error) for name, error in closed.items()}
    if arguments.json:
        output = json.dumps(as_json(found, notes, arguments.dry_run), indent=1)
    else:
        output = "\n".join(describe(found, notes, arguments.dry_run))
    failed = any(error.code not in DENIED for error in closed.values())
    if failed or any(left.error for swept in found.values() for left in swept.left):
        raise Ended(output)
    return output


def sweep(api: Calls, dry_run: bool) -> Swept:
    """Find what is abandoned in the region of `api`, and end it, unless `dry_run`. Raises `Ec2Error`."""
    now = time.time()
    machines = ours(api)
    gone = {each.id: reason for each in machines if (reason := abandoned(each, now))}
    try:
        templates = [(each, reason) for each in our_templates(api) if (reason := abandoned(each, now))]
        note = ""
    except Ec2Error as error:  # Machines cost money, templates do not: an identity that may not see them ends those.
        templates, note = [], f"launch templates could not be looked at: {error}"
    failed: dict[str, str] = {}
    doomed = [each for each in machines if each.id in gone]
    if doomed and not dry_run:
        doomed = still_abandoned(api, doomed, time.time())
        failed |= end(api, doomed)
    if templates and not dry_run:
        failed |= delete(api, [each for each, _ in templates])
    left = [Left(each, api.region, gone[each.id], failed.get(each.id, "")) for each in doomed]
    left += [Left(each, api.region, reason, failed.get(each.id, "")) for each, reason in templates]
    return Swept(tuple(left), len(machines) - len(doomed), note)


def describe(found: Mapping[str, Swept], closed: Mapping[str, str], dry_run: bool) -> Iterator[str]:
    """A line for each thing, and one about all."""
    for swept in found.values():
        for left in swept.left:
            yield _line(left, dry_run)
    where = next(iter(found)) if len(found) == 1 else number(len(found), "region")
    yield f"{where}: {_counts(found.values(), dry_run)}"
    for name, swept in found.items():
        if swept.note:
            yield f"{name}: {swept.note}"
    for name, reason in closed.items():
        yield f"{name} could not be looked at: {reason}"


def as_json(found: Mapping[str, Swept], closed: Mapping[str, str], dry_run: bool) -> dict[str, object]:
    """As the module's docstring says."""
    return {
        "dry_run": dry_run,
        "ended": [_entry(left) for swept in found.values() for left in swept.left],
        "kept": sum(swept.kept for swept in found.values()),
        "regions": list(found),
        "closed": dict(closed),
    }


def _line(left: Left, dry_run: bool) -> str:
    what = left.what
    facts = [what.type, what.zone] if isinstance(what, OurInstance) else [left.region]
    facts += [f"session {what.session}"] if what.session else []
    facts += [what.name] if what.name else []
    verb = "terminate" if left.kind == "machine" else "delete"
    if left.error:
        begin = f"could not {verb}"
    elif dry_run:
        begin = f"would {verb}"
    else:
        begin = f"{verb}d"
    line = f"{begin} {left.kind} {what.id} ({', '.join(facts)}): {left.reason}"
    return f"{line}; {left.error}" if left.error else line


def _counts(found: Iterable[Swept], dry_run: bool) -> str:
    found = list(found)
    left = [each for swept in found for each in swept.left if not each.error]
    machines = sum(1 for each in left if each.kind == "machine")
    templates = len(left) - machines
    counted = [number(machines, "machine")] if machines else []
    counted += [number(templates, "launch template")] if templates else []
    kept = sum(swept.kept for swept in found)
    ended = " and ".join(counted) or "nothing"
    verb = "would be ended" if dry_run else "ended"
    return f"{ended} {verb}; {number(kept, 'machine')} that may be in use left alone"


def _entry(left: Left) -> dict[str, object]:
    what = left.what
    return {
        "id": what.id,
        "kind": left.kind,
        "region": left.region,
        "session": what.session,
        "owner": what.owner,
        "name": what.name,
        "reason": left.reason,
        "error": left.error or None,
    }
