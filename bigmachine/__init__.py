"""bigmachine: a Python program becomes a cluster.

A program (the *driver*) starts *machines*, installs *services* on them (ordinary stateful Python objects), and calls their
methods; services call each other. The program ships itself: what runs on a machine is the same program, executed again.

    import bigmachine
    from bigmachine import driver

    class Counter:
        def __init__(self): self.n = 0
        def add(self, k): self.n += k; return self.n

    with driver.start() as b:
        machines = b.start(5, {"Counter": Counter()})
        calls = [m.submit("Counter.add", 1) for m in machines]
        print(sum(call.result() for call in calls))

Where machines come from is a *system*, chosen by a flag: ``-bigm.system=local`` (the default), ``test``. What is called is
pickled between parties that have authenticated each other with the session's own certificates: a service can do on the
machine whatever the driver could, by design.

Names are loaded when they are first used: a machine's supervisor needs few of them, and starts fast.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # As type checkers know it: `typing` takes 10 ms, which a machine has a better use for at first.
if TYPE_CHECKING:
    from typing import Any

    from . import driver as driver
    from . import errors as errors
    from . import vars as vars
    from .driver import start_bare as start
    from .errors import BigmachineError as BigmachineError
    from .info import VERSION as __version__
    from .machine import Machine as Machine
    from .rpc.calls import Call as Call
    from .rpc.methods import CallContext as CallContext
    from .rpc.streams import Stream as Stream
    from .services import parallel as parallel
    from .session import Session as Session
    from .state import State as State

    def call_context() -> CallContext: ...


_WHERE = {
    "__version__": ("info", "VERSION"),
    "BigmachineError": ("errors", "BigmachineError"),
    "Call": ("rpc.calls", "Call"),
    "CallContext": ("rpc.methods", "CallContext"),
    "Machine": ("machine", "Machine"),
    "Session": ("session", "Session"),
    "State": ("state", "State"),
    "Stream": ("rpc.streams", "Stream"),
    "call_context": ("rpc.methods", "call_context"),
    "driver": ("driver", ""),
    "errors": ("errors", ""),
    "parallel": ("services", "parallel"),
    "start": ("driver", "start_bare"),
    "testing": ("testing", ""),
    "vars": ("vars", ""),
}

__all__ = [
    "BigmachineError",
    "Call",
    "CallContext",
    "Machine",
    "Session",
    "State",
    "Stream",
    "call_context",
    "driver",
    "errors",
    "parallel",
    "start",
    "vars",
]


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _WHERE[name]
    except KeyError:
        raise AttributeError(f"module 'bigmachine' has no attribute {name!r}") from None
    loaded = importlib.import_module(f".{module}", __name__)
    value = getattr(loaded, attribute) if attribute else loaded
    globals()[name] = value
    return value
