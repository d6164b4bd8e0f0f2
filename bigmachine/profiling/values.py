"""What a profile is: a plain value, which pickles. Nothing in here measures anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import NamedTuple

from ..vars import origin

MAX_DEPTH = 200
"""Frames of a stack that are kept, the innermost: beyond that it is a recursion, and pprof's graphs cannot show it anyway."""

Stack = tuple[int, ...]
"""Indices into a profile's places, the innermost frame first."""

Labels = tuple[tuple[str, str], ...]
"""Sorted by key."""


class Place(NamedTuple):
    """A line of a function; `first` is that of its ``def``, 0 where it is not known, as is `line`."""

    function: str
    file: str = ""
    line: int = 0
    first: int = 0


TOO_DEEP = Place("[deeper]")
"""Stands for the outer frames of a stack that was cut."""


class Sample(NamedTuple):
    """`values` are as many as the profile's `types`."""

    stack: Stack
    values: tuple[int, ...]
    labels: Labels = ()


@dataclass
class Profile:
    """``types`` are names and units of each sample's values, ``default`` the name of that which is looked at first.
    ``period`` is how often was sampled, in units of that type, 0 where all is counted; ``started`` is as of `time.time`,
    ``seconds`` how long it took. ``comments`` say what must be known to read it. ``process`` tells processes apart: two
    profiles with the same are of the same one.
    """

    kind: str
    types: tuple[tuple[str, str], ...]
    default: str
    places: Sequence[Place]
    samples: Sequence[Sample]
    started: float
    seconds: float = 0.0
    period: int = 0
    comments: tuple[str, ...] = ()
    process: str = field(default_factory=origin)

    def total(self, name: str) -> int:
        """The sum of the values of type `name` over all samples."""
        index = [name for name, _ in self.types].index(name)
        return sum(sample.values[index] for sample in self.samples)


class Places:
    """Numbers the places where frames stand. Cheap for one that was seen before: two look-ups, and no line is computed."""

    def __init__(self) -> None:
        self.places: list[Place] = []
        self._numbers: dict[Place, int] = {}
        self._instructions: dict[tuple[int, int], int] = {}
        self._codes: dict[int, CodeType] = {}  # Kept, so that no other code gets the same id. Its own hash is slow.

    def number(self, place: Place) -> int:
        number = self._numbers.get(place)
        if number is None:
            number = self._numbers[place] = len(self.places)
            self.places.append(place)
        return number

    def of_frame(self, frame: FrameType) -> int:
        code = frame.f_code
        key = (id(code), frame.f_lasti)
        number = self._instructions.get(key)
        if number is None:
            self._codes[id(code)] = code
            line = frame.f_lineno or code.co_firstlineno
            place = Place(code.co_qualname, code.co_filename, line, code.co_firstlineno)
            number = self._instructions[key] = self.number(place)
        return number

    def of_stack(self, frame: FrameType | None) -> tuple[Stack, tuple[FrameType, ...]]:
        """The stack that ends in `frame`, and its frames, the innermost first; cut where it is too deep."""
        frames: list[FrameType] = []
        numbers: list[int] = []
        while frame is not None:
            if len(frames) == MAX_DEPTH:
                numbers.append(self.number(TOO_DEEP))
                break
            frames.append(frame)
            numbers.append(self.of_frame(frame))
            frame = frame.f_back
        return tuple(numbers), tuple(frames)
