"""What it takes until a machine elsewhere runs: a Markdown table of medians, each step's share, and bytes (see README.md).

Hosts are those of `tests/hosts`: SSH hosts in network namespaces, instances of a fake EC2 with real systemd and cloud-init. So
it needs root on Debian, and leaves out with a reason what cannot be. Every launch is a driver of its own. Cold: a host
that has never been seen. Warm: the same host once more; in EC2 there is no such thing. REPS repetitions (5); SMOKE=1: one.

    python benchmarks/bench_boot.py [ssh] [ec2]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "bigpi.py"
REPETITIONS = 1 if os.environ.get("SMOKE") else int(os.environ.get("REPS", "5"))
COUNTS = (1, 8)

AGENT = "agent"
"""The step with the end of which an agent can be reached: what follows is the same everywhere."""

DRIVER = """

def boot(n):
    import json, time
    with driver.start() as b:
        launcher = b._fleet.launcher
        begun = time.perf_counter()
        machines = b.start(n, {"PI": CirclePI()})
        ran = []
        for machine in machines:
            machine.wait(State.RUNNING)
            ran.append(time.perf_counter() - begun)
        steps = [[(step.name, step.began, step.seconds) for step in machine.timeline] for machine in machines]
    print(json.dumps({"seconds": max(ran), "steps": steps, "sent": launcher.sent}))


if __name__ == "__main__":
    boot(int(sys.argv.pop(1)))
"""
"""Instead of bigpi's own `main`: prints how long n machines took."""

Row = tuple[str, str, str]


@dataclass
class Boot:
    """One launch: seconds until all ran, the steps of each machine (name, when it began, seconds), and bytes of parts sent."""

    seconds: float
    steps: list[list[tuple[str, float, float]]]
    sent: int

    def after_agent(self) -> float:
        """Seconds from when the last agent could be reached until all ran."""
        ends = [step[1] + step[2] for steps in self.steps for step in steps if step[0] == AGENT]
        return max(began + seconds for steps in self.steps for _, began, seconds in steps) - max(ends)

    def shares(self) -> dict[str, float]:
        """Seconds of each step, in the order in which they began first: the machines' mean."""
        found: dict[str, float] = {}
        for name, _, seconds in sorted((step for steps in self.steps for step in steps), key=lambda step: step[1]):
            found[name] = found.get(name, 0.0) + seconds / len(self.steps)
        return found


class Bench:
    """The program, packed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "boot.pex"
        script = folder / "boot.py"
        script.write_text(EXAMPLE.read_text().partition('\nif __name__ == "__main__"')[0] + DRIVER)
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self.environ = {**kept, "PEX_ROOT": str(folder / "pex"), "BIGMACHINE_CACHE": str(folder / "cache")}
        command = [sys.executable, "-m", "bigmachine", "pack", script, "-o", self.file, "--quiet", "--platform=linux/amd64"]
        subprocess.run(command, env=self.environ, check=True)

    def boot(self, n: int, flags: Sequence[str], environ: Mapping[str, str] | None = None) -> Boot:
        command = [str(self.file), str(n), *flags]
        done = subprocess.run(command, env={**self.environ, **(environ or {})}, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: {done.stderr}")
        return Boot(**json.loads(done.stdout))


def text(values: Sequence[float], unit: str = "s") -> str:
    """The median, with the least and the most."""
    few = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.2f} {unit}{few}"


def rows(what: str, boots: Sequence[Boot], target: str = "", after: str = "") -> Iterator[Row]:
    """What launches of one kind came to."""
    yield f"{what}: launch to RUNNING", text([boot.seconds for boot in boots]), target
    yield "– from agent-ready to RUNNING", text([boot.after_agent() for boot in boots]), after
    names = dict.fromkeys(name for boot in boots for name in boot.shares())
    shares = {name: statistics.median(boot.shares().get(name, 0.0) for boot in boots) for name in names}
    yield "– the steps", ", ".join(f"{name} {seconds:.2f}" for name, seconds in shares.items()), ""
    sent = statistics.median(boot.sent for boot in boots)
    yield "– bytes of the program that the driver sends", f"{sent / 1e3:,.0f} kB", ""


# -- SSH -----------------------------------------------------------------------------------------------------------------


def ssh(bench: Bench) -> Iterator[Row]:
    """Cold and warm, in turns."""
    from hosts.network import Network

    bench.environ.pop("SSH_AUTH_SOCK", None)
    for n in COUNTS:
        cold, warm, received = [], [], []
        for repetition in range(REPETITIONS):
            with Network() as network:
                hosts = [network.host(f"h{number}") for number in range(n)]
                config = network.config(bench.folder / f"config-{n}-{repetition}")
                flags = ["-bigm.system=ssh", f"-bigm.hosts={','.join(host.name for host in hosts)}"]
                flags += [f"-bigm.sshconfig={config}"]
                if not repetition and n == COUNTS[0]:
                    bench.boot(n, flags)  # It unpacks the program here, and compresses what is sent.
                    hosts[0].run("rm", "-rf", "/home/ada/.cache")
                counts = [sum(host.received() for host in hosts)]
                for boots in (cold, warm):
                    boots.append(bench.boot(n, flags))
                    counts.append(sum(host.received() for host in hosts))
                received.append((counts[1] - counts[0], counts[2] - counts[1]))
        many = "1 host" if n == 1 else f"{n} hosts at once"
        yield from rows(f"ssh, {many}, cold", cold, "≤ 3 s" if n == 1 else "", "≤ 2 s" if n == 1 else "")
        yield "– bytes that reach the hosts, all told", f"{statistics.median(a for a, _ in received) / 1e3:,.0f} kB", ""
        yield from rows(f"ssh, {many}, warm", warm, "", "≤ 1 s" if n == 1 else "")
        each = statistics.median(b for _, b in received) / n / 1e3
        yield "– bytes that reach a host, all told", f"{each:,.0f} kB", "< 50 kB"


def no_ssh() -> str:
    from hosts.network import unavailable

    return unavailable()


# -- EC2 -----------------------------------------------------------------------------------------------------------------


def ec2(bench: Bench) -> Iterator[Row]:
    """A cloud for all launches; an instance is always new."""
    from hosts.ec2 import FakeEc2

    with FakeEc2() as cloud:
        flags = ["-bigm.system=ec2", "-bigm.ec2type=m7i.large"]
        bench.boot(1, flags, cloud.environ())  # It unpacks the program here, compresses what is sent, and makes the group.
        for n in COUNTS:
            boots = [bench.boot(n, flags, cloud.environ()) for _ in range(REPETITIONS)]
            many = "1 instance" if n == 1 else f"{n} instances at once"
            yield from rows(f"ec2, {many}", boots, "", "≤ 2 s" if n == 1 else "")


def no_ec2() -> str:
    from hosts.ec2 import unavailable

    return unavailable()


PARTS: Mapping[str, tuple[Any, Any]] = {"ssh": (ssh, no_ssh), "ec2": (ec2, no_ec2)}


def main() -> None:
    """Measure, and print."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    chosen = sys.argv[1:] or list(PARTS)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        print("| | measured | target |\n|---|---|---|")
        for name in chosen:
            measure, missing = PARTS[name]
            if why := missing():
                print(f"| {name} | left out: {why} | |")
                continue
            for row in measure(bench):
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
