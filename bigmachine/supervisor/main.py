"""The command that a machine is: ``main <machine id> <program> [argument…]``, with who it is on standard input.

It first executes the program, and only then imports what it needs itself: both start at the same time. The standard
input holds one line of JSON (credentials, address, listening descriptor, lease), and stays open as long as the driver lives.
"""

from __future__ import annotations

import os
import sys

from .forking import Program
from .processes import Processes


def main() -> None:
    """Be a machine; ends the process."""
    machine, *argv = sys.argv[1:]
    processes = Processes(Program(argv, dict(os.environ), os.getcwd()))
    try:
        processes.start()
    except OSError as error:
        raise SystemExit(f"bigmachine: {error}") from None
    from .local import serve_local  # See the module: nothing that takes time comes before `start`.

    serve_local(machine, processes)
