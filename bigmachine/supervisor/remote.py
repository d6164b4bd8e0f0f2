"""What `bootstrap.agent` becomes: the command `MAIN` with the arguments ``<machine id> <program> [argument…]``.

As in `main`, the program is executed first, and what the supervisor needs itself is imported after that: so this module must
be cheap to import, and `elsewhere`, which goes on, is imported by `MAIN`.
"""

from __future__ import annotations

import os
import sys

from .forking import Program
from .processes import Processes

MAIN = (
    "import sys; sys.path.append(sys.argv.pop(1)); from bigmachine.supervisor.remote import begin; begun = begin(); "
    "from bigmachine.supervisor.elsewhere import serve_remote; serve_remote(begun)"
)
"""What the agent executes; its first argument is where this package is."""


def begin() -> Processes | str:
    """Execute the program. The processes, or why there are none."""
    _, *argv = sys.argv[1:]
    # The agent left us its listener, and locks on the cache's entries that we run from: ours, not the services'.
    for name in os.listdir("/dev/fd"):
        try:
            os.set_inheritable(int(name), int(name) < 3)
        except OSError:
            pass  # The one by which they were listed.
    processes = Processes(Program(argv, dict(os.environ), os.getcwd()))
    try:
        processes.start()
    except OSError as error:
        return f"bigmachine: {error}"
    return processes
