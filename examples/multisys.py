"""Two clusters at once in one program: count primes on the machines of both, and compare them in a table.

    python examples/multisys.py -nmach 2 -limit 400000

The first cluster's machines come from the system that the flags choose (``-bigm.system``, by default ``local``: processes on
this host, two service processes each); the second's are of the system ``test``, which runs machines in this very process. The
two have nothing in common: each session has its own certificates, and its machines refuse the other's.

The numbers below the limit are cut into intervals, and dealt out to all machines in turn. The table tells what each made of its
share, as this program saw it: the mean time of a call includes the wait for a free process on that machine.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys

import bigmachine
from bigmachine import State, driver

METHOD = "Primes.count"

INTERVALS_A_MACHINE = 8
"""Enough that a machine's two processes stay busy to the end."""


class Primes:
    """The service: counts primes by trial division. There are faster ways; this is for keeping processors busy."""

    @bigmachine.parallel
    def count(self, start: int, stop: int) -> int:
        """How many of the numbers `start`, …, `stop` - 1 are prime."""
        return sum(1 for number in range(start, stop) if is_prime(number))


def is_prime(number: int) -> bool:
    """By trial division, with odd numbers up to the square root."""
    if number < 3 or number % 2 == 0:
        return number == 2
    return all(number % odd for odd in range(3, math.isqrt(number) + 1, 2))


def cut(limit: int, parts: int) -> list[tuple[int, int]]:
    """The numbers 0, …, `limit` - 1 as `parts` intervals (start, stop), about equally long."""
    ends = [limit * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(ends))


def count_primes(machines: list[bigmachine.Machine], limit: int) -> int:
    """How many primes there are below `limit`, according to all of `machines`."""
    calls = [
        machines[turn % len(machines)].submit(METHOD, start, stop)
        for turn, (start, stop) in enumerate(cut(limit, INTERVALS_A_MACHINE * len(machines)))
    ]
    return sum(call.result() for call in calls)


def table(clusters: dict[str, bigmachine.Session]) -> str:
    """What the calls to each machine came to. Times in milliseconds."""
    line = "{:40} {:8} {:>8} {:>6} {:>7} {:>9} {:>9}".format
    lines = [line("machine", "system", "maxprocs", "calls", "errors", "mean ms", "max ms")]
    for system, session in clusters.items():
        for machine in session.machines():
            stats = machine.call_stats()[METHOD]
            mean, slowest = f"{1000 * stats.seconds / stats.count:.1f}", f"{1000 * stats.max_seconds:.1f}"
            lines.append(line(machine.addr, system, machine.maxprocs, stats.count, stats.errors, mean, slowest))
    return "\n".join(lines)


def main() -> None:
    """The driver; on a machine, the first `driver.start` does not return."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-limit", type=int, default=400_000, help="count the primes below this number")
    parser.add_argument("-nmach", type=int, default=2, help="how many machines to use in each cluster")
    driver.add_flags(parser)
    args = parser.parse_args()
    system = vars(args)["bigm.system"] or "local"
    options = {} if vars(args)["bigm.maxprocs"] else {"maxprocs": 2}
    with driver.start(system, **options) as first, driver.start("test", maxprocs=1) as second:
        services = {"Primes": Primes()}
        machines = [*first.start(args.nmach, services), *second.start(args.nmach, services)]
        for machine in machines:
            machine.wait(State.RUNNING)
        print(f"{len(machines)} machines of two clusters are ready", file=sys.stderr)
        total = count_primes(machines, args.limit)
        print(table({system: first, f"test{' (2)' if system == 'test' else ''}": second}))
    print(f"primes={total} limit={args.limit}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")  # The sessions are closed: nothing is left running.
