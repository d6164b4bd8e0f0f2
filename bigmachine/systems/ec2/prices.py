"""What machines cost: by the hour, and what a session has cost so far. For people to read, not to be billed by.

Spot prices are of the moment and the zone (DescribeSpotPriceHistory); on-demand prices come from AWS's price list, which is
served in one region for all of them, and are kept for a day. Only the instances are counted: neither disks nor traffic.
Whoever cannot be asked (no permission, no network, a partition of AWS without a price list) makes a price unknown, which is
said; nothing fails because of it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ...cache import Cache
from ...errors import CacheError
from .api import Ec2Error

SPOT = "spot"
ON_DEMAND = "on-demand"
"""The two markets."""

HOME = "us-east-1"
"""Where the price list is served."""

LEAST = 60.0
"""Seconds that AWS bills at least for a Linux instance; from there on it is by the second."""

PATIENCE = 5.0
"""Seconds that `session_cost` looks for prices: it is asked when a program ends, and nobody waits longer for a line."""

FRESH = 1800.0
"""Seconds for which `Prices` takes a price to hold."""

_KIND = "ec2"
"""Of the cache's entries."""

Row = tuple[str, str, str, float]
"""An instance: type, market, zone, and the seconds it ran."""


class Calls(Protocol):
    """The part of `api.Api` that is used here."""

    @property
    def region(self) -> str: ...
    def call(self, service: str, operation: str, *, region: str = "", **parameters: Any) -> dict[str, Any]: ...


def hourly(api: Calls, type: str, market: str, zone: str, *, cache: Cache | None = None) -> float | None:
    """USD an hour for an instance of `type` in `zone` now; None where nobody says."""
    try:
        if market == SPOT:
            return _spot(api, type, zone)
        return _on_demand(api, type, cache or Cache())
    except (Ec2Error, CacheError):
        return None


def hourly_prices(api: Calls, kinds: Iterable[tuple[str, str, str]], patience: float = PATIENCE) -> dict[Any, float | None]:
    """`hourly` of several (type, market, zone), at the same time, and after `patience` seconds without those that are not known
    by then."""
    found: dict[Any, float | None] = dict.fromkeys(kinds)

    def look(kind: tuple[str, str, str]) -> None:
        price = hourly(api, *kind)
        if price is not None:
            found[kind] = price

    threads = []
    until = time.monotonic() + patience
    for kind in list(found):
        # Daemons, as a pool's threads would be waited for when the interpreter ends.
        thread = threading.Thread(target=look, args=(kind,), name="bigmachine-price", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # In Python 3.12, `atexit` is too late for threads.
            if time.monotonic() < until:
                look(kind)
        else:
            threads.append(thread)
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return dict(found)


class Prices:
    """`hourly` for those who cannot wait: what is known by now, looked up on a thread when first asked for, and again after
    `FRESH` seconds, as spot prices change."""

    def __init__(self, api: Calls) -> None:
        self._api = api
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str, str], float | None] = {}
        self._asked: dict[tuple[str, str, str], float] = {}

    def of(self, type: str, market: str, zone: str) -> float | None:
        """USD an hour; None where nobody says, or has said yet."""
        kind = type, market, zone
        now = time.monotonic()
        with self._lock:
            known = self._known.get(kind)
            if now - self._asked.get(kind, -math.inf) < FRESH:
                return known
            self._asked[kind] = now
        try:
            threading.Thread(target=self._look, args=(kind,), name="bigmachine-price", daemon=True).start()
        except RuntimeError:
            pass  # The interpreter ends: what was known by then stands.
        return known

    def _look(self, kind: tuple[str, str, str]) -> None:
        price = hourly(self._api, *kind)
        with self._lock:
            self._known[kind] = price if price is not None else self._known.get(kind)


def session_cost(api: Calls, rows: Iterable[Row]) -> str:
    """A line about what `rows` have cost, such as "5 machines (4 m7i.large spot, 1 on demand) ran for 1 h 12 min in all: about
    0.13 USD"; empty where there was none."""
    rows = list(rows)
    if not rows:
        return ""
    return cost_line(rows, hourly_prices(api, {(type, market, zone) for type, market, zone, _ in rows}))


def cost_line(rows: Iterable[Row], prices: Mapping[Any, float | None]) -> str:
    """The same with `prices` by (type, market, zone). Pure."""
    rows = list(rows)
    known = unknown = 0.0
    for type, market, zone, seconds in rows:
        price = prices.get((type, market, zone))
        if price is None:
            unknown += 1
        else:
            known += cost(price, seconds)
    kinds = Counter((type, market) for type, market, _, _ in rows)
    what = ", ".join(f"{n} {type} {market.replace('-', ' ')}" for (type, market), n in sorted(kinds.items()))
    ran = duration(sum(seconds for *_, seconds in rows))
    if unknown == len(rows):
        much = "nobody says what that costs"
    elif unknown:
        much = f"about {dollars(known)}, without {unknown:.0f} of them whose price nobody says"
    else:
        much = f"about {dollars(known)}"
    count = f"{len(rows)} machine{'s' if len(rows) > 1 else ''}"
    return f"{count} ({what}) ran for {ran}{' in all' if len(rows) > 1 else ''}: {much}, disks and traffic apart"


def cost(price: float, seconds: float) -> float:
    """USD for an instance of `price` an hour that has run for `seconds`."""
    return price * max(LEAST, seconds) / 3600


def dollars(amount: float) -> str:
    """``0.13 USD``; two digits that count where it is less than a cent."""
    if amount < 0.01:
        return f"{amount:.2g} USD" if amount >= 0.0001 else "less than 0.0001 USD"
    return f"{amount:.2f} USD"


def duration(seconds: float) -> str:
    """``42 s``, ``12 min``, ``3 h 20 min``, ``2 d 5 h``."""
    if seconds < 99.5:
        return f"{max(0.0, seconds):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h" if hours % 24 else f"{hours // 24} d"


def _spot(api: Calls, type: str, zone: str) -> float | None:
    # From a time that is now, the history is the price that holds: the last one before it.
    answer = api.call(
        "ec2",
        "DescribeSpotPriceHistory",
        InstanceTypes=[type],
        ProductDescriptions=["Linux/UNIX"],
        AvailabilityZone=zone,
        StartTime=datetime.datetime.now(datetime.UTC),
    )
    there = [entry for entry in answer.get("SpotPriceHistory", ()) if entry.get("AvailabilityZone") == zone]
    return max((_number(entry.get("SpotPrice")) for entry in there), default=0.0) or None


def _on_demand(api: Calls, type: str, cache: Cache) -> float | None:
    day = datetime.datetime.now(datetime.UTC).date().isoformat()
    key = hashlib.sha256(json.dumps(["price", api.region, type, day]).encode()).hexdigest()

    def fill(folder: Path) -> None:
        (folder / "price.json").write_text(json.dumps(_listed(api, type)), "utf-8")

    try:
        price = json.loads((cache.put(_KIND, key, fill) / "price.json").read_text("utf-8"))
    except (CacheError, OSError, ValueError):
        price = _listed(api, type)  # Without a cache, or with a damaged one: it is only slower.
    return price if isinstance(price, float) and price > 0 else None


def _listed(api: Calls, type: str) -> float | None:
    """Of the price list. Raises `Ec2Error`."""
    wanted = {
        "instanceType": type,
        "regionCode": api.region,
        "operatingSystem": "Linux",
        "tenancy": "Shared",
        "preInstalledSw": "NA",
        "capacitystatus": "Used",
        "marketoption": "OnDemand",
    }
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
    answer = api.call("pricing", "GetProducts", region=HOME, ServiceCode="AmazonEC2", Filters=filters)
    for text in answer.get("PriceList", ()):
        product = json.loads(text) if isinstance(text, str) else text
        for term in product.get("terms", {}).get("OnDemand", {}).values():
            for dimension in term.get("priceDimensions", {}).values():
                price = _number(dimension.get("pricePerUnit", {}).get("USD"))
                if dimension.get("unit") == "Hrs" and price > 0:
                    return price
    return None


def _number(text: object) -> float:
    try:
        return float(str(text))
    except ValueError:
        return 0.0
