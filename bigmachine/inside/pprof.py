"""pprof's format, which ``go tool pprof`` and most viewers of profiles read: a gzipped protobuf message, ``profile.proto``.

The writer is our own: the message has six kinds of parts, with numbers and texts in them, and a library for that would be
one more thing to install. Field numbers are those of
https://github.com/google/pprof/blob/main/proto/profile.proto.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from ..profiling.values import Labels, Place, Profile, Sample, Stack

MAX_COMMENTS = 40
"""``go tool pprof`` shows them all, above anything else."""


def merge(parts: Sequence[tuple[Mapping[str, str], Profile]], comments: Iterable[str] = ()) -> Profile:
    """One profile of several of the same kind; each sample has its part's labels besides its own. Comments of a part begin
    with its labels. `parts` must not be empty."""
    first = parts[0][1]
    places: dict[Place, int] = {}
    values: dict[tuple[Stack, Labels], tuple[int, ...]] = {}
    said = list(comments)
    for labels, profile in parts:
        numbers = [places.setdefault(place, len(places)) for place in profile.places]
        for sample in profile.samples:
            stack = tuple(numbers[index] for index in sample.stack)
            key = stack, tuple(sorted({**labels, **dict(sample.labels)}.items()))
            before = values.get(key)
            values[key] = sample.values if before is None else tuple(map(sum, zip(before, sample.values, strict=True)))
        who = " ".join(labels.values())
        said += [f"{who}: {comment}" if who else comment for comment in profile.comments]
    if len(said) > MAX_COMMENTS:
        said[MAX_COMMENTS - 1 :] = [f"and {len(said) - MAX_COMMENTS + 1} more"]
    return Profile(
        first.kind,
        first.types,
        first.default,
        list(places),
        [Sample(stack, numbers, labels) for (stack, labels), numbers in values.items()],
        min(profile.started for _, profile in parts),
        max(profile.seconds for _, profile in parts),
        first.period,
        tuple(said),
        first.process,
    )


# -- The message ---------------------------------------------------------------------------------------------------------


def encode(profile: Profile) -> bytes:
    """A gzipped ``perftools.profiles.Profile``. The same bytes for the same profile."""
    texts = _Texts()
    units = dict(profile.types)
    out = bytearray()
    for name, unit in profile.types:
        out += _message(1, _pair(texts, name, unit))
    functions: dict[tuple[str, str, int], int] = {}
    for sample in profile.samples:
        body = _packed(1, (index + 1 for index in sample.stack)) + _packed(2, sample.values)
        for key, value in sample.labels:
            body += _message(3, _pair(texts, key, value))
        out += _message(2, body)
    # One mapping, of which all names are known: pprof then looks for no binary.
    out += _message(3, _integer(1, 1) + b"".join(_integer(field, 1) for field in (7, 8, 9)))
    for number, place in enumerate(profile.places, 1):
        function = functions.setdefault((place.function, place.file, place.first), len(functions) + 1)
        line = _message(4, _integer(1, function) + _integer(2, place.line))
        out += _message(4, _integer(1, number) + _integer(2, 1) + line)
    for (name, file, first), number in functions.items():
        named = texts.number(name)
        body = _integer(1, number) + _integer(2, named) + _integer(3, named)
        out += _message(5, body + _integer(4, texts.number(file)) + _integer(5, first))
    out += _integer(9, round(profile.started * 1e6) * 1000) + _integer(10, round(profile.seconds * 1e9))
    if profile.period:
        out += _message(11, _pair(texts, profile.default, units[profile.default])) + _integer(12, profile.period)
    out += _packed(13, [texts.number(comment) for comment in profile.comments])
    out += _integer(14, texts.number(profile.default))
    for text in texts.numbers:
        out += _message(6, text.encode("utf-8", "replace"))
    return gzip.compress(bytes(out), 6, mtime=0)


class _Texts:
    """The table of texts, which all others refer to by number; number 0 is the empty one."""

    def __init__(self) -> None:
        self.numbers = {"": 0}

    def number(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def _varint(number: int) -> bytes:
    out = bytearray()
    number &= (1 << 64) - 1  # Negative ones are sent as of 64 bits.
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _integer(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number) if number else b""


def _message(field: int, body: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def _packed(field: int, numbers: Iterable[int]) -> bytes:
    body = b"".join(map(_varint, numbers))
    return _message(field, body) if body else b""


def _pair(texts: _Texts, key: str, value: str) -> bytes:
    """Fields 1 and 2: of a type its name and unit, of a label its key and text."""
    return _integer(1, texts.number(key)) + _integer(2, texts.number(value))


# -- Text ----------------------------------------------------------------------------------------------------------------


def text(profile: Profile) -> str:
    """For people, as Go's ``debug=1``: each stack with its values and labels, what counts most first."""
    names = [name for name, _ in profile.types]
    default = names.index(profile.default)
    when = datetime.fromtimestamp(profile.started, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    lines = [f"{profile.kind}: {when}, {profile.seconds:.1f} s", *(f"# {comment}" for comment in profile.comments)]
    totals = (f"{profile.total(name)} {_named(name, unit)}" for name, unit in profile.types)
    lines += [f"total: {', '.join(totals)}", ""]
    for sample in sorted(profile.samples, key=lambda sample: sample.values[default], reverse=True):
        values = ", ".join(
            f"{value} {_named(name, unit)}" for (name, unit), value in zip(profile.types, sample.values, strict=True) if value
        )
        labels = " ".join(f"{key}={value}" for key, value in sample.labels)
        lines.append(f"{values or 0} @ {labels}".rstrip(" @"))
        for index in sample.stack:
            place = profile.places[index]
            where = f"  {place.file}:{place.line}" if place.file else ""
            lines.append(f"#\t{place.function}{where}")
        lines.append("")
    return "\n".join(lines)


def _named(name: str, unit: str) -> str:
    return name if unit == "count" else f"{unit} {name}"
