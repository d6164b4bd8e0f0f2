"""The system `local`: it conforms, and what is particular to processes on this host."""

from __future__ import annotations

from bigmachine.system import Launcher
from bigmachine.systems.local import LocalLauncher
from bigmachine.testing.conformance import Conformance


class TestConformance(Conformance):
    def launcher(self) -> Launcher:
        return LocalLauncher(maxprocs=2)
