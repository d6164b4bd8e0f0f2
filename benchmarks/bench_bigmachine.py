"""bigmachine on local machines. The workers re-execute this file, up to `driver.start()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness import PHASES, Peer, Rated, main, pump, pump_tasks, pump_threads
from work import Work


class Bigmachine(Peer):
    phases = ("import", *PHASES)
    session: Any = None

    def imports(self) -> None:
        import bigmachine
        from bigmachine import driver

        self.running = bigmachine.State.RUNNING
        self.driver = driver

    def start(self, n: int) -> None:
        self.session = self.driver.start()
        self.machines: list[Any] = []
        self.grow(n)

    def grow(self, n: int) -> None:
        new = self.session.start(n, {"Work": Work()})
        for machine in new:
            machine.wait(self.running)
        for call in [machine.submit("Work.inc", 1) for machine in new]:
            assert call.result() == 2
        self.machines += new
        self.first = self.machines[0]

    def stop(self) -> None:
        if self.session is not None:
            self.session.shutdown()

    def call(self, x: int) -> int:
        return self.first.call("Work.inc", x)  # type: ignore[no-any-return]

    def send(self, array: Any) -> int:
        return self.first.call("Work.take", array)  # type: ignore[no-any-return]

    def recv(self, size: int) -> Any:
        return self.first.call("Work.give", size)

    def pi(self, samples: int) -> int:
        calls = [machine.submit("Work.pi", samples // len(self.machines)) for machine in self.machines]
        return sum(call.result() for call in calls)

    def worker_pids(self) -> list[int]:
        """The supervisor, and all that it started: its service processes."""
        import psutil

        supervisor = psutil.Process(self.first.call("Supervisor.info").pid)
        pids = {supervisor.pid, self.first.call("Work.pid")}
        return sorted(pids | {process.pid for process in supervisor.children(recursive=True)})

    def ways(self) -> dict[str, Callable[[float], Rated]]:
        call, submit = self.first.call, self.first.submit
        return {
            "futures": lambda seconds: pump(lambda x: submit("Work.inc", x), lambda future: future.result(), seconds),
            "threads": lambda seconds: pump_threads(lambda x: call("Work.inc", x), seconds),
            "tasks": lambda seconds: pump_tasks(lambda x: submit("Work.inc", x), seconds),
        }


if __name__ == "__main__":
    main({"bigmachine": Bigmachine})
