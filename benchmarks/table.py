"""``table.py rep-1.jsonl rep-2.jsonl …`` → Markdown: our targets, then every peer.

Each file is one repetition. A ratio is taken within a repetition, and the median of those is shown: the machine may drift by a
factor of two between repetitions, and does so for both. Noisy runs are left out where at least two quiet ones remain.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from typing import NamedTuple

from harness import NOISY

OURS = "bigmachine"
FLOOR = "raw-mtls"
Values = dict[int, float]  # By repetition.


class Target(NamedTuple):
    """`limit` is at most, or at least where `more` is better; of the ratio to `reference` where there is one."""

    what: str
    metric: str
    unit: str
    limit: float
    reference: str | None = None
    more: bool = False
    scale: float = 1

    def met(self, value: float) -> bool:
        return value >= self.limit if self.more else value <= self.limit


TARGETS = [
    Target("one caller, p50, a processor each", "latency_2cpu_p50", "µs", 1.4, FLOOR),
    Target("one caller, p50, one processor", "latency_1cpu_p50", "µs", 3, FLOOR),
    Target("64 in flight", "throughput", "calls/s", 0.45, FLOOR, more=True),
    Target("64 in flight", "throughput", "calls/s", 25_000, more=True),
    Target("64 MiB array sent", "bulk_send", "MB/s", 0.85, "raw-mtls-oob", more=True),
    Target("64 MiB array returned", "bulk_recv", "MB/s", 0.85, "raw-mtls-oob", more=True),
    Target("64 MiB array sent", "bulk_send", "MB/s", 0.7, "raw-mtls-oob-thp", more=True),
    Target("64 MiB array returned", "bulk_recv", "MB/s", 0.7, "raw-mtls-oob-thp", more=True),
    Target("start 1 machine", "start_1", "s", 0.4),
    Target("start 5 machines", "start_5", "s", 0.8),
    Target("start 20 machines", "start_20", "s", 2.5),
    Target("pi on 2 workers: start's share", "pi_start", "s", 0.5),
    Target("memory of an idle machine (PSS)", "pss_worker", "MiB", 45),
    Target("import bigmachine", "import_time", "ms", 60, scale=1000),
    Target("calls/s to one of 100 machines ÷ one of 2", "many_ratio", "", 0.8, more=True),
]

COLUMNS = [
    ("import_time", "import ms", 1000.0),
    ("start_1", "start 1 ms", 1000.0),
    ("start_5", "start 5 ms", 1000.0),
    ("start_20", "start 20 ms", 1000.0),
    ("latency_p50", "p50 µs", 1.0),
    ("latency_p99", "p99 µs", 1.0),
    ("latency_2cpu_p50", "p50 µs, 2 cpus", 1.0),
    ("latency_1cpu_p50", "p50 µs, 1 cpu", 1.0),
    ("throughput", "calls/s", 1.0),
    ("bulk_send", "send MB/s", 1.0),
    ("bulk_recv", "recv MB/s", 1.0),
    ("pss_worker", "pss MiB", 1.0),
    ("rss_worker", "rss MiB", 1.0),
    ("pi_wall", "pi s", 1.0),
]


def read(paths: list[str]) -> tuple[dict[tuple[str, str], Values], list[str]]:
    """(peer, metric) → values, and the errors as text."""
    runs: dict[tuple[str, str], dict[int, tuple[float, float]]] = defaultdict(dict)
    errors = []
    for repetition, path in enumerate(paths):
        with open(path) as file:
            for line in file:
                if not line.startswith("{"):
                    continue
                entry = json.loads(line)
                if entry["metric"] == "error" or entry.get("error"):
                    errors.append(f"{entry['peer']} {entry.get('phase', '')}: {entry.get('error') or entry['value']}")
                elif entry.get("runs") and entry["metric"] != "throughput_probe":
                    noise = max([each or 0 for each in entry.get("noise") or []], default=0)
                    runs[entry["peer"], entry["metric"]][repetition] = (statistics.median(entry["runs"]), noise)
    values = {}
    for key, measured in runs.items():
        quiet = {repetition: value for repetition, (value, noise) in measured.items() if noise <= NOISY}
        values[key] = quiet if len(quiet) >= 2 else {repetition: value for repetition, (value, _) in measured.items()}
    _derive(values)
    return values, errors


def _derive(values: dict[tuple[str, str], Values]) -> None:
    """The other peers' harness says how long pi took in all and how long it computed."""
    for peer, metric in list(values):
        if metric == "pi_wall" and (peer, "pi_start") not in values:
            compute = values.get((peer, "pi_compute"), {})
            share = {i: wall - compute[i] for i, wall in values[peer, metric].items() if i in compute}
            if share:
                values[peer, "pi_start"] = share


def ratio(ours: Values | None, theirs: Values | None) -> float | None:
    both = [ours[i] / theirs[i] for i in ours if i in theirs] if ours and theirs else []
    return statistics.median(both) if both else None


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |")


def head(*cells: str) -> None:
    row(*cells)
    print("|" + "---|" * len(cells))


def targets(values: dict[tuple[str, str], Values]) -> None:
    head("what", "unit", OURS, "reference", "ratio", "target", "met")
    for target in TARGETS:
        ours = values.get((OURS, target.metric))
        theirs = values.get((target.reference or "", target.metric))
        against = ratio(ours, theirs)
        judged = against if target.reference else statistics.median(ours.values()) * target.scale if ours else None
        row(
            target.what,
            target.unit,
            number(statistics.median(ours.values()) * target.scale) if ours else "–",
            f"{target.reference} {number(statistics.median(theirs.values()))}" if theirs else target.reference or "",
            f"{against:.2f}" if against else "",
            f"{'≥' if target.more else '≤'} {target.limit:,g}{f' × {target.reference}' if target.reference else ''}",
            "–" if judged is None else "yes" if target.met(judged) else "**no**",
        )


def peers(values: dict[tuple[str, str], Values]) -> None:
    names = list(dict.fromkeys(peer for peer, _ in values))
    columns = [column for column in COLUMNS if any((peer, column[0]) in values for peer in names)]
    head("peer", *(title for _, title, _ in columns))
    for peer in sorted(names, key=lambda name: (name != OURS, not name.startswith("raw-"))):
        cells = []
        for metric, _, scale in columns:
            measured = values.get((peer, metric))
            if not measured:
                cells.append("–")
                continue
            against = ratio(measured, values.get((FLOOR, metric))) if peer != FLOOR else None
            text = number(statistics.median(measured.values()) * scale)
            cells.append(f"{text} ({against:.2f}×)" if against else text)
        row(peer, *cells)


def main() -> None:
    values, errors = read(sys.argv[1:])
    targets(values)
    print(f"\nMedians of {len(sys.argv) - 1} repetitions; in brackets the ratio to {FLOOR} in the same repetition.\n")
    peers(values)
    for error in errors:
        print(f"\nfailed: {error}")


if __name__ == "__main__":
    main()
