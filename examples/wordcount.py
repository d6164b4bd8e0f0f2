"""Count words on several machines: mappers that read streamed text call reducers on each other's machines.

    python examples/wordcount.py -nmach 3                 # generated text
    python examples/wordcount.py -nmach 3 war.txt peace.txt

Every machine has two services, a `Mapper` and a `Reducer`. The driver streams a share of the text to each mapper. The mapper
counts the words of its share, and hands the counts over to the reducers on all machines: each word belongs to one of them,
by its hash. When all text is read, the driver fetches what the reducers have, which they stream back, and compares it with what
counting in one process gives.

Nothing holds the whole text: not the driver, which reads files as it sends them, and not a machine, which counts a line at a
time. A mapper that falls behind slows down the sending of its share, and no other's.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import bigmachine
from bigmachine import State, driver

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")

DISTINCT = 5_000
"""Words that a mapper holds counts of before it hands them over: the bound on its memory."""

BATCH = 1_000
"""Words in one item of a reducer's answer: an item costs about as much as a call."""


def words(lines: Iterable[bytes]) -> Iterator[str]:
    """The words of UTF-8 text, in lower case. Bytes that are no UTF-8 separate words."""
    for line in lines:
        yield from WORD.findall(line.decode("utf-8", "replace").lower())


# -- On the machines -------------------------------------------------------------------------------------------------


class Reducer:
    """Adds up the counts of the words that belong to this machine."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def setup(self, b: bigmachine.Session) -> None:
        """Called on the machine. A lock cannot be sent there: it is made there."""
        self._lock = threading.Lock()

    def add(self, counts: dict[str, int]) -> None:
        """Add `counts`. Mappers call this at the same time."""
        with self._lock:
            self._counts.update(counts)

    def results(self) -> Iterator[list[tuple[str, int]]]:
        """(word, count) pairs, the most frequent first, in batches."""
        pairs = self._counts.most_common()
        for start in range(0, len(pairs), BATCH):
            yield pairs[start : start + BATCH]


class Mapper:
    """Counts the words of one share of the text."""

    def setup(self, b: bigmachine.Session) -> None:
        """Called on the machine, with the session by which it reaches others."""
        self._b = b

    def map(self, text: BinaryIO, addresses: list[str]) -> int:
        """Count `text` (the caller passes a `bigmachine.Stream`), and hand the counts over to the reducers at `addresses`.
        Returns how many words there were."""
        reducers = [self._b.dial(address) for address in addresses]
        total = 0
        counts: Counter[str] = Counter()
        for word in words(text):
            counts[word] += 1
            total += 1
            if len(counts) >= DISTINCT:
                hand_over(counts, reducers)
                counts.clear()
        hand_over(counts, reducers)
        return total


def hand_over(counts: Counter[str], reducers: list[bigmachine.Machine]) -> None:
    """Give each of `reducers` the counts of its words; returns when they have them."""
    shares: list[dict[str, int]] = [{} for _ in reducers]
    for word, count in counts.items():
        # Not `hash`, which differs from process to process.
        shares[zlib.crc32(word.encode()) % len(reducers)][word] = count
    calls = [reducer.submit("Reducer.add", share) for reducer, share in zip(reducers, shares, strict=True) if share]
    for call in calls:
        call.result()


# -- In the driver ---------------------------------------------------------------------------------------------------


class Share(Protocol):
    """A part of the text. Ends at the end of a line, so that no word is cut in two."""

    def lines(self) -> Iterator[bytes]:
        """The text, from its beginning, each time this is called."""


@dataclass(frozen=True)
class FilePart:
    """The lines of the file `path` that begin at the byte offsets `start`, …, `stop` - 1."""

    path: Path
    start: int
    stop: int

    def lines(self) -> Iterator[bytes]:
        """See `Share`."""
        with self.path.open("rb") as file:
            if self.start:
                file.seek(self.start - 1)
                file.readline()  # The end of a line that began before.
            while file.tell() < self.stop and (line := file.readline()):
                yield line


@dataclass(frozen=True)
class Generated:
    """`count` random words; as in real text, some are far more frequent than others."""

    seed: int
    count: int

    def lines(self) -> Iterator[bytes]:
        """See `Share`."""
        rng = random.Random(self.seed)
        vocabulary = [f"{first}{middle}{last}" for first in SYLLABLES for middle in SYLLABLES for last in SYLLABLES]
        random.Random(0).shuffle(vocabulary)  # The same words are frequent in every share.
        for start in range(0, self.count, WORDS_A_LINE):
            size = min(WORDS_A_LINE, self.count - start)
            # Zipf's law: the word of rank r is 1/r times as frequent as the first.
            chosen = [vocabulary[int(len(vocabulary) ** rng.random()) - 1] for _ in range(size)]
            yield " ".join(chosen).encode() + b"\n"


SYLLABLES = [first + last for first in "bdgklmnprst" for last in ("a", "e", "i", "o", "u", "ar", "en", "is")][:24]

WORDS_A_LINE = 12


def shares(paths: list[Path], count: int, parts: int) -> list[list[Share]]:
    """The text as `parts` shares, each a list: a part of every file, or generated words, `count` in all."""
    if not paths:
        return [[Generated(part, count * (part + 1) // parts - count * part // parts)] for part in range(parts)]
    sizes = [(path, path.stat().st_size) for path in paths]
    return [
        [FilePart(path, size * part // parts, size * (part + 1) // parts) for path, size in sizes]
        for part in range(parts)
    ]


def lines(share: list[Share]) -> Iterator[bytes]:
    """All lines of a share. A file's last line may lack its end: the next file's first is no part of it."""
    for part in share:
        for line in part.lines():
            yield line if line.endswith(b"\n") else line + b"\n"


def chunks(source: Iterator[bytes], size: int = 64 * 1024) -> Iterator[bytes]:
    """`source` in pieces of at least `size` bytes, as each piece that is sent costs some microseconds."""
    pending: list[bytes] = []
    length = 0
    for piece in source:
        pending.append(piece)
        length += len(piece)
        if length >= size:
            yield b"".join(pending)
            pending.clear()
            length = 0
    yield b"".join(pending)


def count_on(machines: list[bigmachine.Machine], text: list[list[Share]], pool: ThreadPoolExecutor) -> Counter[str]:
    """Count `text`, a share on each of `machines`."""
    addresses = [machine.addr for machine in machines]

    def send(machine: bigmachine.Machine, share: list[Share]) -> int:
        total: int = machine.call("Mapper.map", bigmachine.Stream(chunks(lines(share))), addresses)
        return total

    # A stream is sent by the thread that makes the call; so that all are sent at once, each has a thread.
    totals = pool.map(send, machines, text)
    for machine, total in zip(machines, totals, strict=True):
        print(f"{machine.addr} has read {total} words", file=sys.stderr)
    counts: Counter[str] = Counter()
    for machine in machines:
        for batch in machine.stream("Reducer.results"):
            counts.update(dict(batch))
    return counts


def main() -> None:
    """The driver; on a machine, `driver.start` does not return."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="text in UTF-8 (default: generated words)")
    parser.add_argument("-n", type=int, default=400_000, help="how many words to generate")
    parser.add_argument("-nmach", type=int, default=3, help="how many machines to use")
    parser.add_argument("-top", type=int, default=10, help="how many of the most frequent words to print")
    driver.add_flags(parser)
    args = parser.parse_args()
    # The session is closed before the pool waits for its threads: where the program is interrupted, their calls fail then.
    with ThreadPoolExecutor(args.nmach) as pool, driver.start() as b:
        machines = b.start(args.nmach, {"Mapper": Mapper(), "Reducer": Reducer()})
        text = shares(args.files, args.n, args.nmach)
        for machine in machines:
            machine.wait(State.RUNNING)
        print(f"{len(machines)} machines are ready", file=sys.stderr)
        counts = count_on(machines, text, pool)
    for word, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[: args.top]:
        print(f"{count:9} {word}")
    print(f"words={counts.total()} distinct={len(counts)} machines={args.nmach}")
    expected = Counter(word for share in text for word in words(lines(share)))
    if counts != expected:
        sys.exit(f"counting in one process gives another result: words={expected.total()} distinct={len(expected)}")
    print("counting in one process gives the same")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")  # The session is closed: nothing is left running.
