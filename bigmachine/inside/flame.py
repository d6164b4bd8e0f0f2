"""A profile as the page draws it: JSON that a browser turns into a flame graph without looking at a text twice.

Functions and labels are tables, stacks are one trie, from the outermost frame inwards, so that a profile of many machines,
which all do the same, is hardly larger than that of one::

    {"kind": "profile", "types": [["cpu", "nanoseconds"], …], "default": "cpu", "started": 1763830000.1, "seconds": 10.0,
     "comments": […], "processes": [["https://…/m-7f3a9c/", "0"], …], "missing": [[machine, process, reason], …],
     "functions": [["CirclePI.sample", "/home/ada/bigpi.py", 31], …],      # name, file, line of its def
     "nodes": {"parent": [-1, 0, …], "function": [0, 4, …], "line": [12, 57, …]},
     "labels": [{"machine": "https://…", "process": "0", "method": "sample", …}, …],
     "samples": [[node, labels, value, …], …],                              # as many values as types
     "pprof": "H4sI…"}                                                      # the same profile, for ``go tool pprof``; base64

A node is a function called by its parent: lines of one function are one node, whose ``line`` is that with most of the
default value.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from ..profiling.values import Labels, Sample
from .profiles import Taken

MAX_SAMPLES = 50_000
"""A browser draws a few thousand frames; of more samples than this, the small ones are gathered under `SMALL`."""

SMALL = ("[small ones]", "", 0)
"""Stands for the stacks that were gathered."""


def as_json(taken: Taken) -> dict[str, Any]:
    """What `json` can write; see the module."""
    profile = taken.profile
    value = [name for name, _ in profile.types].index(profile.default)
    kept, small = _largest(profile.samples, value)
    trie = _Trie()
    functions = [(place.function, place.file, place.first) for place in profile.places]
    samples: list[list[int]] = []
    for sample in kept:
        stack = [(functions[index], profile.places[index].line) for index in reversed(sample.stack)]
        samples.append([trie.node(stack, sample.values[value]), trie.labelled(sample.labels), *sample.values])
    for labels, values in small.items():
        samples.append([trie.node([(SMALL, 0)], values[value]), trie.labelled(labels), *values])
    comments = list(profile.comments)
    if small:
        comments.append(f"the smallest {len(profile.samples) - len(kept)} stacks are shown as {SMALL[0]}")
    return {
        "kind": profile.kind,
        "types": [list(each) for each in profile.types],
        "default": profile.default,
        "started": profile.started,
        "seconds": profile.seconds,
        "comments": comments,
        "processes": [list(who) for who in taken.processes],
        "missing": [[machine, process, reason] for (machine, process), reason in taken.missing.items()],
        **trie.as_json(),
        "samples": samples,
        "pprof": base64.b64encode(taken.pprof()).decode(),
    }


def _largest(samples: Sequence[Sample], value: int) -> tuple[Sequence[Sample], dict[Labels, tuple[int, ...]]]:
    """The samples to show one by one, and the sums of the others by their labels."""
    if len(samples) <= MAX_SAMPLES:
        return samples, {}
    ordered = sorted(samples, key=lambda sample: sample.values[value], reverse=True)
    small: dict[Labels, tuple[int, ...]] = {}
    for sample in ordered[MAX_SAMPLES:]:
        before = small.get(sample.labels, (0,) * len(sample.values))
        small[sample.labels] = tuple(map(sum, zip(before, sample.values, strict=True)))
    return ordered[:MAX_SAMPLES], small


Function = tuple[str, str, int]


class _Trie:
    """Numbers functions, sets of labels, and the nodes that stacks end in."""

    def __init__(self) -> None:
        self._functions: dict[Function, int] = {}
        self._labels: dict[Labels, int] = {}
        self._nodes: dict[tuple[int, int], int] = {}  # By parent (-1: none) and function.
        self._lines: list[dict[int, int]] = []  # Of each node, what its lines are worth.

    def node(self, stack: Sequence[tuple[Function, int]], value: int) -> int:
        """The node where `stack` ends, the outermost frame first; -1 of an empty one."""
        node = -1
        for function, line in stack:
            key = node, self._functions.setdefault(function, len(self._functions))
            node = self._nodes.setdefault(key, len(self._nodes))
            if node == len(self._lines):
                self._lines.append({})
            self._lines[node][line] = self._lines[node].get(line, 0) + value
        return node

    def labelled(self, labels: Labels) -> int:
        return self._labels.setdefault(labels, len(self._labels))

    def as_json(self) -> dict[str, Any]:
        return {
            "functions": [list(function) for function in self._functions],
            "nodes": {
                "parent": [parent for parent, _ in self._nodes],
                "function": [function for _, function in self._nodes],
                "line": [max(lines, key=lines.__getitem__) for lines in self._lines],
            },
            "labels": [dict(labels) for labels in self._labels],
        }
