"""For tests of programs that use bigmachine, and of systems that others write for it.

A program's own unit tests use the system ``test``, whose machines are tasks of the test's process: they start in some
milliseconds, yet calls go over mutual TLS and HTTP/2, and what is sent is pickled, as on real machines.

    import bigmachine
    from bigmachine.testing import TestSystem

    def test_a_machine_that_dies_loses_no_work():
        system = TestSystem()
        with bigmachine.start(system) as b:
            machines = b.start(2, {"Words": Words()})
            for machine in machines:
                machine.wait(timeout=10)
            system.kill(machines[0])                     # As a power cut would; `crash` as a segmentation fault would.
            assert count_words(b, "a b a") == {"a": 2, "b": 1}

A system of your own must pass `bigmachine.testing.conformance`, which needs pytest; this module does not.
"""

from __future__ import annotations

from ..systems.inprocess import TestLauncher as TestSystem

__all__ = ["TestSystem"]
