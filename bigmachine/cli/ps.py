"""``bigmachine ps``: which machines there are, of all sessions that use this account.

With ``--json``: ``machines``, a list of ``id``, ``session``, ``owner``, ``name``, ``type``, ``market`` (``"spot"`` or
``"on-demand"``), ``region``, ``zone``, ``state``, ``launched`` (seconds as of 1970), ``age`` (seconds), ``hourly`` and ``cost``
(USD, of the instance alone; null where nobody says), ``abandoned`` (why `bigmachine gc` would end it; null where it would not);
``regions`` (those that were looked at), ``closed`` (by region, why it could not be), and ``cost`` (the sum of what is known).
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..settings import load
from ..systems.ec2.api import Api
from ..systems.ec2.instances import Calls, InRegion, OurInstance, abandoned, in_regions, ours, regions
from ..systems.ec2.prices import SPOT, cost, dollars, duration, hourly_prices
from ..systems.ec2.settings import SECTION, Settings
from .terminal import progress
from .text import number, table

TITLES = ("session", "instance", "type", "market", "zone", "state", "age", "cost so far", "name")

PATIENCE = 20.0
"""Seconds for prices: here somebody has asked for them."""


@dataclass(frozen=True)
class Row:
    """A machine, in which region, and what it costs an hour; None where nobody says."""

    instance: OurInstance
    region: str
    hourly: float | None

    def cost(self, now: float) -> float | None:
        return None if self.hourly is None else cost(self.hourly, now - self.instance.launched)


def run(arguments: Namespace) -> str:
    """Look, in the region of the settings or in all. Raises `Ec2Error`, `UsageError`."""
    settings = load(Settings, SECTION, arguments.flags)
    home = Api(settings)
    with progress(silent=arguments.json or not sys.stderr.isatty()) as shown:
        names = regions(home) if arguments.all_regions else [home.region]
        shown.step(f"looking in {number(len(names), 'region')}")
        found, closed = in_regions(names, lambda name: look(InRegion(home, name)))
    if not found and closed:
        raise next(iter(closed.values()))
    rows = [row for each in found.values() for row in each]
    notes = {name: str(error) for name, error in closed.items()}
    now = time.time()
    if arguments.json:
        return json.dumps(as_json(rows, list(found), notes, now), indent=1)
    return "\n".join(describe(rows, list(found), notes, now))


def look(api: Calls) -> list[Row]:
    """The machines in the region of `api`. Raises `Ec2Error`."""
    found = ours(api)
    prices = hourly_prices(api, {(each.type, each.market, each.zone) for each in found}, PATIENCE)
    return [Row(each, api.region, prices[each.type, each.market, each.zone]) for each in found]


def describe(rows: Iterable[Row], looked: list[str], closed: Mapping[str, str], now: float) -> Iterator[str]:
    """A table, and what there is to say about it."""
    rows = list(rows)
    where = looked[0] if len(looked) == 1 else number(len(looked), "region")
    if not rows:
        yield f"no machines in {where}"
    else:
        yield from table([TITLES, *(_line(row, now) for row in rows)], right=frozenset({6, 7}), indent="")
        known = [each for row in rows if (each := row.cost(now)) is not None]
        sessions = number(len({row.instance.session for row in rows}), "session")
        yield f"{number(len(rows), 'machine')} of {sessions} in {where}: {_sum(known, len(rows))}"
        left = sum(1 for row in rows if abandoned(row.instance, now))
        if left:
            yield f"{number(left, 'machine')} of sessions that are gone: `bigmachine gc` ends {'it' if left == 1 else 'them'}"
    for name, reason in closed.items():
        yield f"{name} could not be looked at: {reason}"


def as_json(rows: Iterable[Row], looked: list[str], closed: Mapping[str, str], now: float) -> dict[str, object]:
    """As the module's docstring says."""
    rows = list(rows)
    return {
        "machines": [_entry(row, now) for row in rows],
        "regions": looked,
        "closed": dict(closed),
        "cost": round(sum(row.cost(now) or 0.0 for row in rows), 6),
    }


def _line(row: Row, now: float) -> tuple[str, ...]:
    each = row.instance
    so_far = row.cost(now)
    return (
        each.session,
        each.id,
        each.type,
        "spot" if each.market == SPOT else "on demand",
        each.zone,
        each.state,
        duration(now - each.launched),
        "?" if so_far is None else dollars(so_far),
        each.name,
    )


def _sum(known: list[float], count: int) -> str:
    if not known:
        return "nobody says what they cost"
    without = f", without {count - len(known)} whose price nobody says" if len(known) < count else ""
    return f"about {dollars(sum(known))} so far{without}, disks and traffic apart"


def _entry(row: Row, now: float) -> dict[str, object]:
    each = row.instance
    so_far = row.cost(now)
    return {
        "id": each.id,
        "session": each.session,
        "owner": each.owner,
        "name": each.name,
        "type": each.type,
        "market": each.market,
        "region": row.region,
        "zone": each.zone,
        "state": each.state,
        "launched": round(each.launched, 3),
        "age": round(now - each.launched, 3),
        "hourly": row.hourly,
        "cost": None if so_far is None else round(so_far, 6),
        "abandoned": abandoned(each, now),
    }
