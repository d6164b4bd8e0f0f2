"""Services: ordinary objects, and what of them can be called from elsewhere.

Every public method (no leading underscore) of a service is callable, but for two, which bigmachine calls itself. ``setup(b)``
comes before any other; ``drain(deadline)`` when it becomes known that the machine will be taken away at `deadline` (seconds as
of `time.time`; None where nobody has said): time to hand on what would be lost. It is called on a thread of its own, in every
process that holds the service, while calls go on.

How a method runs follows from how it is written: `def` on a thread, `async def` on the process's event loop, a generator as a
stream of items. Methods may run at the same time as others of the same object, as in any threaded server.
"""

from __future__ import annotations

import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from .credentials import Identity, Role
from .errors import Forbidden, NotReady, UnknownMethod, UsageError, add_note
from .rpc.methods import Gate, Kind, Method

F = TypeVar("F", bound=Callable[..., Any])

RESERVED = frozenset({"Supervisor", "Process"})
"""Names of bigmachine's own services."""

LIFECYCLE = frozenset({"setup", "drain"})

_PARALLEL = "__bigmachine_parallel__"


def parallel(method: F) -> F:
    """Mark a method that may run in any of a machine's `maxprocs` service processes, one call at a time in each.

    For work that is bound by the processor. Each process holds its own replica of the service, set up separately: what a
    parallel method changes on `self` is seen in one of them only. Raises TypeError for `async def`.
    """
    if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
        raise TypeError(f"{method.__qualname__}: @parallel is for methods that compute, `async def` for those that wait")
    setattr(method, _PARALLEL, True)
    return method


def public_methods(service: object) -> dict[str, Callable[..., Any]]:
    """The methods of `service` that can be called remotely, by name. Nothing is evaluated: properties are left out."""
    methods = {}
    for name in dir(service):
        if name.startswith("_") or name in LIFECYCLE:
            continue
        if callable(inspect.getattr_static(service, name)) or isinstance(
            inspect.getattr_static(service, name), (staticmethod, classmethod)
        ):
            methods[name] = getattr(service, name)
    return methods


def parallel_methods(services: Mapping[str, object]) -> frozenset[str]:
    """``{"PI.sample", …}``: the methods marked `parallel`."""
    return frozenset(
        f"{name}.{method}"
        for name, service in services.items()
        for method, function in public_methods(service).items()
        if getattr(function, _PARALLEL, False)
    )


def check_services(services: Mapping[str, object]) -> None:
    """Raises `UsageError` for names that cannot be used, and for what would only fail on the machine."""
    for name, service in services.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise UsageError(f"a service's name must be an identifier: {name!r}")
        if name in RESERVED:
            raise UsageError(f"the service name {name!r} is bigmachine's own; choose another")
        if inspect.isclass(service):
            raise UsageError(f"service {name!r} is a class; give an object of it: {service.__name__}()")
        for method in sorted(LIFECYCLE):
            if inspect.iscoroutinefunction(getattr(service, method, None)):
                raise UsageError(f"the {method} of service {name!r} is `async def`; it runs on a thread: write `def`")


def method_kind(function: Callable[..., Any]) -> Kind:
    """How calls of `function` run."""
    if inspect.iscoroutinefunction(function):
        return Kind.ASYNC
    if inspect.isasyncgenfunction(function):
        return Kind.ASYNC_GENERATOR
    if inspect.isgeneratorfunction(function):
        return Kind.GENERATOR
    return Kind.PLAIN


class Services:
    """What one process serves: an `rpc.methods.Handler`. Authorises by role before anything is decoded.

    `builtin` are bigmachine's own services, present from the start; `owner_only` names methods of them that only the
    session's driver may call.
    """

    def __init__(self, builtin: Mapping[str, object], owner_only: frozenset[str] = frozenset()) -> None:
        self._lock = threading.Lock()
        self._owner_only = owner_only
        self._gate = Gate()
        self._methods: dict[str, Method] = {}
        self._names: dict[str, list[str]] = {}
        self._installed = False
        self._drains: list[float | None] = []
        self.services: dict[str, object] = {}
        for name, service in builtin.items():
            self._add(name, service)

    def _add(self, name: str, service: object) -> None:
        functions = public_methods(service)
        for method, function in functions.items():
            full = f"{name}.{method}"
            gate = self._gate if getattr(function, _PARALLEL, False) else None
            self._methods[full] = Method(full, method_kind(function), function, gate)
        self._names[name] = sorted(functions)

    def install(self, services: Mapping[str, object], session: object) -> None:
        """Set every service up, then serve them all. Raises what a `setup` raises, with a note that says whose it was."""
        for name, service in services.items():
            setup = getattr(service, "setup", None)
            if setup is not None:
                try:
                    setup(session)
                except Exception as error:
                    add_note(error, f"raised by the setup of service {name!r}")
                    raise
        with self._lock:
            self.services.update(services)
            for name, service in services.items():
                self._add(name, service)
            self._installed = True
            drains, self._drains = self._drains, []
        for deadline in drains:
            self.drain(deadline)

    def drain(self, deadline: float | None) -> None:
        """Begin to drain the services that can be, each on a thread; where they are still being set up, after that."""
        with self._lock:
            if not self._installed:
                self._drains.append(deadline)
                return
        for name, service in self.services.items():
            if callable(drain := getattr(service, "drain", None)):
                work = threading.Thread(target=_drain, args=(name, drain, deadline), name=f"bigmachine-drain-{name}")
                work.daemon = True
                work.start()

    def installed(self) -> None:
        """There is nothing to install: this process only has what is built in."""
        self._installed = True

    def find(self, name: str, caller: object) -> Method:
        """See `rpc.methods.Handler`."""
        method = self._methods.get(name)
        role = caller.role if isinstance(caller, Identity) else None
        if role is not Role.DRIVER:
            if role is not Role.MACHINE:
                raise Forbidden(name, f"{caller} may not make calls")
            if name in self._owner_only:
                raise Forbidden(name, f"only the session's driver may call it, not {caller}")
        if method is None:
            raise self._unknown(name)
        return method

    def _unknown(self, name: str) -> Exception:
        service, dot, method = name.partition(".")
        if not dot or not method:
            return UnknownMethod(name, "a method is named <Service>.<method>")
        if service in self._names:
            return UnknownMethod(name, f"service {service!r} has no method {method!r}; it has {_listed(self._names[service])}")
        if not self._installed:
            return NotReady(name, "the machine's services are not set up yet")
        known = [known for known in self._names if known not in RESERVED]
        return UnknownMethod(name, f"no service {service!r} on this machine; it has {_listed(known)}")


def _drain(name: str, drain: Callable[[float | None], object], deadline: float | None) -> None:
    """Nobody waits for what it returns or raises: that is output."""
    try:
        drain(deadline)
    except Exception:
        sys.stderr.write(f"bigmachine: the drain of service {name!r} failed:\n{traceback.format_exc()}")


def _listed(names: list[str]) -> str:
    return ", ".join(sorted(names)) or "none"
