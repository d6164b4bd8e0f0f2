"""Prices and costs: of an API that is faked, as moto has no price list and one price for all spot instances."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigmachine.cache import Cache
from bigmachine.systems.ec2 import prices
from bigmachine.systems.ec2.api import Ec2Error
from bigmachine.systems.ec2.prices import ON_DEMAND, SPOT


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGMACHINE_CACHE", str(tmp_path / "cache"))


class FakeApi:
    """Answers by operation: an answer, or an error that is raised."""

    region = "eu-central-1"

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[tuple[str, str, str, dict[str, Any]]] = []

    def call(self, service: str, operation: str, *, region: str = "", **parameters: Any) -> dict[str, Any]:
        self.calls.append((service, operation, region, parameters))
        answer = self.answers[operation]
        if isinstance(answer, Exception):
            raise answer
        return answer


def a_list(*products: dict[str, str]) -> dict[str, Any]:
    """A price list: each product has prices by unit."""
    return {
        "PriceList": [
            json.dumps(
                {
                    "terms": {
                        "OnDemand": {
                            "A.B": {
                                "priceDimensions": {
                                    unit: {"unit": unit, "pricePerUnit": {"USD": usd}} for unit, usd in product.items()
                                }
                            }
                        }
                    }
                }
            )
            for product in products
        ]
    }


def an_entry(zone: str, price: str) -> dict[str, str]:
    return {"AvailabilityZone": zone, "SpotPrice": price, "InstanceType": "m7i.large"}


DENIED = Ec2Error("pricing:GetProducts", "AccessDeniedException", "no", "us-east-1")


# -- By the hour ---------------------------------------------------------------------------------------------------------


def test_the_spot_price_is_that_of_the_zone() -> None:
    api = FakeApi(
        DescribeSpotPriceHistory={
            "SpotPriceHistory": [an_entry("eu-central-1b", "0.07"), an_entry("eu-central-1a", "0.04")]
        }
    )
    assert prices.hourly(api, "m7i.large", SPOT, "eu-central-1a") == 0.04
    ((service, _, _, parameters),) = api.calls
    assert service == "ec2"
    assert parameters["AvailabilityZone"] == "eu-central-1a"
    assert parameters["ProductDescriptions"] == ["Linux/UNIX"]
    assert parameters["StartTime"].tzinfo is not None


def test_the_price_on_demand_is_in_the_list_of_one_region_and_asked_for_once_a_day() -> None:
    # A product without a price, such as a reservation's, comes first.
    api = FakeApi(GetProducts=a_list({"Hrs": "0.0000000000"}, {"Quantity": "7", "Hrs": "0.1209000000"}))
    for _ in range(2):
        assert prices.hourly(api, "m7i.large", ON_DEMAND, "eu-central-1a") == 0.1209
    ((service, _, region, parameters),) = api.calls
    assert (service, region) == ("pricing", "us-east-1")
    wanted = {each["Field"]: each["Value"] for each in parameters["Filters"]}
    assert wanted["regionCode"] == "eu-central-1"
    assert wanted["instanceType"] == "m7i.large"


def test_a_cache_that_cannot_be_used_makes_it_only_slower(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    api = FakeApi(GetProducts=a_list({"Hrs": "0.5"}))
    assert prices.hourly(api, "m7i.large", ON_DEMAND, "a", cache=Cache(tmp_path / "file" / "below")) == 0.5


@pytest.mark.parametrize("answer", [DENIED, {"PriceList": []}, a_list({"Hrs": "nonsense"})])
def test_nobody_says_what_it_costs(answer: Any) -> None:
    assert prices.hourly(FakeApi(GetProducts=answer), "m7i.large", ON_DEMAND, "a") is None


@pytest.mark.parametrize("answer", [DENIED, {"SpotPriceHistory": []}, {"SpotPriceHistory": [an_entry("b", "0.1")]}])
def test_nobody_says_what_spot_costs(answer: Any) -> None:
    assert prices.hourly(FakeApi(DescribeSpotPriceHistory=answer), "m7i.large", SPOT, "a") is None


def test_prices_that_take_too_long_are_not_waited_for() -> None:
    asked, go_on = threading.Event(), threading.Event()

    class Slow(FakeApi):
        def call(self, service: str, operation: str, *, region: str = "", **parameters: Any) -> dict[str, Any]:
            if operation == "DescribeSpotPriceHistory":
                asked.set()
                go_on.wait(30)
                return {"SpotPriceHistory": [an_entry("a", "0.04")]}
            return super().call(service, operation, region=region, **parameters)

    api = Slow(GetProducts=a_list({"Hrs": "0.5"}))
    try:
        one, two = ("m7i.large", SPOT, "a"), ("m7i.large", ON_DEMAND, "a")
        found = prices.hourly_prices(api, [one], patience=0.01)
        assert found == {one: None}
        assert asked.wait(10)
        assert prices.hourly_prices(api, [two]) == {two: 0.5}
    finally:
        go_on.set()


def test_prices_when_there_are_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 starts none in `atexit`, when a program without ``with`` ends its session."""

    def none(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", none)
    kind = ("m7i.large", ON_DEMAND, "a")
    assert prices.hourly_prices(FakeApi(GetProducts=a_list({"Hrs": "0.5"})), [kind]) == {kind: 0.5}


# -- What a session has cost ---------------------------------------------------------------------------------------------


def test_what_a_session_has_cost() -> None:
    api = FakeApi(DescribeSpotPriceHistory={"SpotPriceHistory": [an_entry("a", "0.04")]}, GetProducts=a_list({"Hrs": "0.1"}))
    rows = [("m7i.large", SPOT, "a", 3600.0), ("m7i.large", SPOT, "a", 1800.0), ("m7i.large", ON_DEMAND, "a", 1800.0)]
    assert prices.session_cost(api, rows) == (
        "3 machines (1 m7i.large on demand, 2 m7i.large spot) ran for 2 h in all: about 0.11 USD, disks and traffic apart"
    )
    # Each price is asked for once.
    assert sorted(operation for _, operation, _, _ in api.calls) == ["DescribeSpotPriceHistory", "GetProducts"]


def test_one_machine_costs_a_minute_at_least() -> None:
    line = prices.cost_line([("t", SPOT, "a", 2.0)], {("t", SPOT, "a"): 6.0})
    assert line == "1 machine (1 t spot) ran for 2 s: about 0.10 USD, disks and traffic apart"


def test_what_is_not_known_is_said() -> None:
    rows = [("t", SPOT, "a", 3600.0), ("u", SPOT, "a", 3600.0)]
    assert "about 1.00 USD, without 1 of them whose price nobody says" in prices.cost_line(rows, {("t", SPOT, "a"): 1.0})
    assert "ran for 2 h in all: nobody says what that costs" in prices.cost_line(rows, {})


def test_nothing_ran() -> None:
    assert prices.session_cost(FakeApi(), []) == ""


@pytest.mark.parametrize(
    ("amount", "text"),
    [(12.345, "12.35 USD"), (0.01, "0.01 USD"), (0.0042, "0.0042 USD"), (0.00001, "less than 0.0001 USD")],
)
def test_dollars(amount: float, text: str) -> None:
    assert prices.dollars(amount) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3.0, "0 s"),
        (42.4, "42 s"),
        (99.6, "2 min"),
        (3599.0, "1 h"),
        (3600 * 3 + 60 * 20, "3 h 20 min"),
        (3600 * 48, "2 d"),
        (3600 * 53, "2 d 5 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert prices.duration(seconds) == text


def test_prices_for_those_who_cannot_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answer: float | None = 0.036
    told, go = threading.Semaphore(0), threading.Event()

    def look(api: object, type: str, market: str, zone: str) -> float | None:
        assert go.wait(10)
        asked.append(type)
        told.release()
        return answer

    monkeypatch.setattr(prices, "hourly", look)
    known = prices.Prices(FakeApi())
    of = ("m7i.large", SPOT, "eu-central-1a")
    assert known.of(*of) is None
    assert known.of(*of) is None  # It is being looked up, once.
    go.set()
    assert told.acquire(timeout=10)
    eventually(lambda: known.of(*of) == 0.036)
    assert asked == ["m7i.large"]
    monkeypatch.setattr(prices, "FRESH", 0.0)
    answer = None  # Nobody says any more: what was known holds.
    assert known.of(*of) == 0.036
    assert told.acquire(timeout=10)
    assert known.of(*of) == 0.036
    assert told.acquire(timeout=10)


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
