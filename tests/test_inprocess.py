"""The system `test`: it conforms, it is fast, and machines die in it at will."""

from __future__ import annotations

from bigmachine.system import Launcher
from bigmachine.testing import TestSystem
from bigmachine.testing.conformance import Conformance


class TestConformance(Conformance):
    isolated = False

    def launcher(self) -> Launcher:
        return TestSystem(maxprocs=2)
