"""Estimate π with the Monte Carlo method, on several machines.

    python examples/bigpi.py -n 20000000 -nmach 5

Points are drawn at random from the unit square; the share of them that falls into the circle within is π/4. Every call
draws its own random sequence.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys

import bigmachine
from bigmachine import State, driver

log = logging.getLogger("bigpi")


class CirclePI:
    """The service: counts points within the circle."""

    @bigmachine.parallel
    def sample(self, n: int) -> int:
        """Draw `n` points; how many of them lie within the circle of diameter 1."""
        draw = random.Random().random  # Seeded by the operating system: no two calls see the same points.
        inside = 0
        for i in range(n):
            if i % 10_000_000 == 0:
                log.info("%d/%d", i, n)
            x = draw() - 0.5
            y = draw() - 0.5
            if x * x + y * y < 0.25:
                inside += 1
        return inside


def estimate(machines: list[bigmachine.Machine], samples: int) -> float:
    """Share `samples` among all processors of all machines; π, as they see it."""
    cores = sum(machine.maxprocs for machine in machines)
    log.info("distributing work among %d cores", cores)
    share, rest = divmod(samples, cores)
    calls: list[bigmachine.Call[int]] = []
    for machine in machines:
        for _ in range(machine.maxprocs):
            calls.append(machine.submit("PI.sample", share + (1 if len(calls) < rest else 0)))
    total = sum(call.result() for call in calls)
    log.info("total=%d nsamples=%d", total, samples)
    return 4 * total / samples


def main() -> None:
    """The driver; on a machine, `driver.start` does not return."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=1_000_000_000, help="how many points to draw")
    parser.add_argument("-nmach", type=int, default=5, help="how many machines to use")
    driver.add_flags(parser)
    args = parser.parse_args()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%Y/%m/%d %H:%M:%S")
    with driver.start() as b:
        machines = b.start(args.nmach, {"PI": CirclePI()})
        log.info("waiting for machines to come online")
        for machine in machines:
            machine.wait(State.RUNNING)
            log.info("machine %s %s", machine.addr, machine.state)
        log.info("all machines are ready")
        print(f"π = {estimate(machines, args.n)}")


if __name__ == "__main__":
    main()
