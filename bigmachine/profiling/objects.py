"""What the process's memory is full of: all Python objects by type, however long ago they were made.

`tracemalloc` knows who allocated what, but only since it began. The garbage collector knows all containers; what it does not
track (numbers, texts, bytes, NumPy's arrays) is found in them. There may be ten million of those, so no list of them is
kept: of a small one each holder counts its share, one divided by the number of references to it. Large ones count once.

The size is what an object says itself (`sys.getsizeof`): of an array with its data, of a list without what is in it.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from itertools import filterfalse
from types import FrameType, FunctionType
from typing import Any

from .calls import current_frames
from .values import Place, Places, Profile, Sample

TYPES = (("inuse_objects", "count"), ("inuse_space", "bytes"))
"""Names as in Go's heap profiles."""

SECONDS = 2.0
"""How long it may take, on the interpreter's lock: enough for one or two million objects."""

LARGE = 4096
"""Bytes of an object that is worth remembering, so that it counts once and whole."""

MAX_TYPES = 500
"""Those that take most; the others are one sample."""

STEP = 16
"""The containers are looked at in so many turns, old and new ones in each: if the time is over, the rest is much the same."""

MANY = 10_000
"""Small things in a container of which all are looked at; of more, every second, third, … stands for the others."""

OWN_REFERENCES = 3
"""To an object while its references are counted: of the list that it was found in, of the variable, of the argument."""

LOCALS = sys.version_info >= (3, 13)
"""Whether variables of running functions can be read without being kept alive by that until the function ends."""

Figures = dict[type, list[float]]
"""By type how many, and how many bytes."""


def take(collect: bool) -> Profile:
    """What there is now; with `collect` without what only the garbage collector would find."""
    if collect:
        gc.collect()
    places = Places()
    started = time.time()
    samples, comments = census(places)
    return Profile("objects", TYPES, "inuse_space", places.places, samples, started, comments=comments)


def census(places: Places) -> tuple[list[Sample], tuple[str, ...]]:
    """One sample a type, its place ``[objects] module.Type``; and what must be known to read them."""
    begun = time.perf_counter()
    found, seen, total = _count(begun + SECONDS)
    took = time.perf_counter() - begun
    largest = sorted(found.items(), key=lambda item: -item[1][1])
    named = [(f"[objects] {_name(cls)}", figures) for cls, figures in largest[:MAX_TYPES]]
    if rest := [figures for _, figures in largest[MAX_TYPES:]]:
        named.append((f"[objects] {len(rest)} other types", [sum(each) for each in zip(*rest, strict=True)]))
    samples = [Sample((places.number(Place(name)),), (round(count), round(size))) for name, (count, size) in named]
    held = sum(sample.values[1] for sample in samples)
    comments = [f"[objects] are all Python objects by type, {held} bytes; counted in {took:.1f} s"]
    if seen < total:
        comments.append(f"there was time for {seen} of {total} containers and what is in them: the figures are of those")
    if not LOCALS:
        comments.append("what only variables of running functions hold is not among the [objects]")
    return samples, tuple(comments)


def _count(deadline: float) -> tuple[Figures, int, int]:
    """The figures, and how many containers of how many they are of."""
    tally = _Tally()
    everything = gc.get_objects()
    everything.append(_variables() if LOCALS else [])
    seen = 0
    for turn in range(STEP):
        for each in everything[turn::STEP]:
            if not seen % 256 and time.perf_counter() > deadline:
                return tally.figures, seen, len(everything)
            seen += 1
            tally.add(each)
    return tally.figures, seen, len(everything)


def _variables() -> list[Any]:
    """What those of all running functions hold."""
    found: list[Any] = []
    for top in current_frames().values():
        frame: FrameType | None = top
        while frame is not None:
            if frame.f_code.co_filename != __file__:
                found += frame.f_locals.values()
            frame = frame.f_back
    return found


class _Tally:
    """The figures, and which large objects are in them."""

    def __init__(self) -> None:
        self.figures: Figures = {}
        self._sizes: dict[type, Callable[[Any], int]] = {}
        self._large: set[int] = set()

    def add(self, each: Any) -> None:
        """Count a container, and what it refers to that the garbage collector does not track."""
        cls = type(each)
        figures = self.figures.get(cls) or self._new(cls)
        figures[0] += 1.0
        figures[1] += self._sizes[cls](each)
        self._add_contents(each, 1.0)

    def _add_contents(self, holder: Any, share: float) -> None:
        found = list(filterfalse(gc.is_tracked, gc.get_referents(holder)))
        step = len(found) // MANY + 1
        if step > 1:
            for each in found:
                if self._size(each) >= LARGE:
                    self._add_large(each)
            found = found[::step]
        known, sizes = self.figures, self._sizes
        for each in found:
            cls = type(each)
            figures = known.get(cls) or self._new(cls)
            size = sizes[cls](each)
            if size >= LARGE:
                self._add_large(each)
                continue
            references = sys.getrefcount(each) - OWN_REFERENCES
            part = share * step / references if references > 1 else share * step
            figures[0] += part
            figures[1] += part * size
            if cls is tuple or cls is dict:  # The collector stops tracking those that hold nothing that it tracks.
                self._add_contents(each, part)

    def _add_large(self, each: Any) -> None:
        """Once, and whole."""
        if id(each) not in self._large:
            self._large.add(id(each))
            self.add(each)

    def _size(self, each: Any) -> int:
        cls = type(each)
        if cls not in self._sizes:
            self._new(cls)
        return self._sizes[cls](each)

    def _new(self, cls: type) -> list[float]:
        self._sizes[cls] = object.__sizeof__ if type(cls.__sizeof__) is FunctionType else _asked
        if cls in PLAIN:
            self._sizes[cls] = sys.getsizeof
        figures = self.figures[cls] = [0.0, 0.0]
        return figures


PLAIN = frozenset({int, float, str, bytes, tuple, dict, list, set, FunctionType})
"""Types whose size can be asked for without any doubt."""


def _asked(each: Any) -> int:
    try:
        return sys.getsizeof(each)
    except Exception:  # Of whoever wrote the type in C.
        return 0


def _name(cls: type) -> str:
    """The type's own attributes, past those of a metaclass."""
    module, name = _MODULE(cls), _QUALNAME(cls)
    return str(name) if module == "builtins" else f"{module}.{name}"


_MODULE = type.__dict__["__module__"].__get__
_QUALNAME = type.__dict__["__qualname__"].__get__
