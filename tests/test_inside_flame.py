"""A profile as JSON for the page: nothing of it is lost on the way, and no browser is given more than it can draw."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from bigmachine.inside import flame
from bigmachine.inside.profiles import Taken
from bigmachine.profiling.values import Place, Profile, Sample

PLACES = [
    Place("main", "app.py", 9, 7),
    Place("work", "app.py", 21, 20),
    Place("work", "app.py", 23, 20),
    Place("sum", "lib.py", 3, 1),
]
ONE = (("machine", "https://localhost:1/m-1/"), ("process", "0"))
TWO = (("machine", "https://localhost:2/m-2/"), ("process", "0"))


def taken(samples: list[Sample], **missing: str) -> Taken:
    types = (("cpu", "nanoseconds"), ("wall", "nanoseconds"))
    profile = Profile("profile", types, "cpu", PLACES, samples, 100.0, 2.0, comments=("said",), process="p")
    return Taken(profile, [("https://localhost:1/m-1/", "0")], {(who, "1"): why for who, why in missing.items()})


def stacks(value: dict[str, Any]) -> dict[tuple[tuple[str, ...], str], tuple[int, ...]]:
    """What the page makes of it: values by the names from the outermost inwards, and machine."""
    nodes, found = value["nodes"], {}
    for node, labels, *values in value["samples"]:
        names: list[str] = []
        while node >= 0:
            names.insert(0, value["functions"][nodes["function"][node]][0])
            node = nodes["parent"][node]
        found[tuple(names), value["labels"][labels]["machine"]] = tuple(values)
    return found


def test_stacks_values_and_labels_arrive() -> None:
    value = flame.as_json(
        taken([Sample((3, 1, 0), (5, 6), ONE), Sample((3, 1, 0), (7, 8), TWO), Sample((0,), (1, 1), ONE)])
    )

    json.dumps(value)
    assert stacks(value) == {
        (("main", "work", "sum"), "https://localhost:1/m-1/"): (5, 6),
        (("main", "work", "sum"), "https://localhost:2/m-2/"): (7, 8),
        (("main",), "https://localhost:1/m-1/"): (1, 1),
    }
    assert len(value["nodes"]["parent"]) == 3, "machines that do the same share its stack"
    assert value["functions"][2] == ["sum", "lib.py", 1]
    assert (value["kind"], value["default"], value["seconds"], value["comments"]) == ("profile", "cpu", 2.0, ["said"])


def test_lines_of_a_function_are_one_frame_with_the_line_that_counts_most() -> None:
    value = flame.as_json(taken([Sample((1, 0), (2, 0), ONE), Sample((2, 0), (5, 0), ONE)]))

    assert [value["functions"][each][0] for each in value["nodes"]["function"]] == ["main", "work"]
    assert value["nodes"]["line"] == [9, 23]


def test_who_is_missing_is_said() -> None:
    value = flame.as_json(taken([], gone="it was killed"))

    assert value["processes"] == [["https://localhost:1/m-1/", "0"]]
    assert value["missing"] == [["gone", "1", "it was killed"]]
    assert value["samples"] == []


def test_the_small_ones_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flame, "MAX_SAMPLES", 1)
    samples = [
        Sample((0,), (1, 2), ONE),
        Sample((1, 0), (9, 9), ONE),
        Sample((3,), (4, 8), ONE),
        Sample((3,), (2, 2), TWO),
    ]

    value = flame.as_json(taken(samples))

    small = flame.SMALL[0]
    assert stacks(value) == {
        (("main", "work"), "https://localhost:1/m-1/"): (9, 9),
        ((small,), "https://localhost:1/m-1/"): (5, 10),
        ((small,), "https://localhost:2/m-2/"): (2, 2),
    }
    assert f"the smallest 3 stacks are shown as {small}" in value["comments"]


def test_the_same_profile_is_there_for_pprof() -> None:
    each = taken([Sample((3, 1, 0), (5, 6), ONE)])

    assert base64.b64decode(flame.as_json(each)["pprof"]) == each.pprof()
