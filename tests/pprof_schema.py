"""Reads pprof's format as its schema says (profile.proto): for tests, with nothing of the writer's."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass, field


def fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message: of the wire types, 0 (varint) and 2 (length and bytes) are used."""
    at = 0

    def varint() -> int:
        nonlocal at
        number = shift = 0
        while True:
            byte = data[at]
            at += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return number

    while at < len(data):
        key = varint()
        assert key & 7 in (0, 2), f"wire type {key & 7}"
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = varint()
            yield key >> 3, data[at : at + size]
            assert at + size <= len(data)
            at += size


def numbers(values: list[int | bytes]) -> list[int]:
    """Of a repeated field, packed or not; signed, of 64 bits."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        number = shift = 0
        for byte in value:
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                found.append(number)
                number = shift = 0
        assert shift == 0
    return [number - (1 << 64) if number >= 1 << 63 else number for number in found]


class Message:
    """Fields by number."""

    def __init__(self, data: int | bytes) -> None:
        assert isinstance(data, bytes)
        self._fields: dict[int, list[int | bytes]] = {}
        for number, value in fields(data):
            self._fields.setdefault(number, []).append(value)

    def all(self, number: int) -> list[int | bytes]:
        return self._fields.get(number, [])

    def messages(self, number: int) -> list[Message]:
        return [Message(value) for value in self.all(number)]

    def ints(self, number: int) -> list[int]:
        return numbers(self.all(number))

    def int(self, number: int) -> int:
        found = self.ints(number)
        assert len(found) <= 1
        return found[0] if found else 0


@dataclass
class Read:
    """What was in a file. `samples`: stack of (function, file, line, first line), innermost first, values by type, labels."""

    types: list[tuple[str, str]]
    samples: list[tuple[list[tuple[str, str, int, int]], dict[str, int], dict[str, str]]]
    comments: list[str]
    default: str
    nanos: int
    duration: int
    period: int
    period_type: tuple[str, str] | None
    mappings: list[int] = field(default_factory=list)

    def total(self, name: str) -> int:
        return sum(values[name] for _, values, _ in self.samples)


def read(data: bytes) -> Read:
    whole = Message(gzip.decompress(data))
    texts = [value.decode() for value in whole.all(6) if isinstance(value, bytes)]
    assert texts[0] == "", "the first text must be empty"
    types = [(texts[each.int(1)], texts[each.int(2)]) for each in whole.messages(1)]
    functions = {each.int(1): each for each in whole.messages(5)}
    mappings = [each.int(1) for each in whole.messages(3)]
    places = {}
    for location in whole.messages(4):
        assert location.int(2) in mappings
        (line,) = location.messages(4)
        function = functions[line.int(1)]
        places[location.int(1)] = (texts[function.int(2)], texts[function.int(4)], line.int(2), function.int(5))
    assert 0 not in places
    assert 0 not in functions
    samples = []
    for sample in whole.messages(2):
        values = sample.ints(2)
        assert len(values) == len(types)
        labels = {texts[label.int(1)]: texts[label.int(2)] for label in sample.messages(3)}
        named = {name: value for (name, _), value in zip(types, values, strict=True)}
        samples.append(([places[number] for number in sample.ints(1)], named, labels))
    period = [(texts[each.int(1)], texts[each.int(2)]) for each in whole.messages(11)]
    return Read(
        types,
        samples,
        [texts[number] for number in whole.ints(13)],
        texts[whole.int(14)],
        whole.int(9),
        whole.int(10),
        whole.int(12),
        period[0] if period else None,
        mappings,
    )
