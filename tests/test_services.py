"""Services: what of an object can be called, by whom, and how (`services`, no processes)."""

from __future__ import annotations

import queue
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from rpc_pair import SOON

from bigmachine import parallel
from bigmachine.credentials import Identity, Role
from bigmachine.errors import Forbidden, NotReady, UnknownMethod, UsageError
from bigmachine.rpc.methods import Kind
from bigmachine.services import Services, check_services, parallel_methods, public_methods

DRIVER = Identity(Role.DRIVER, "d", "s")
MACHINE = Identity(Role.MACHINE, "m-1", "s")
AGENT = Identity(Role.AGENT, "a-1", "s")


class Base:
    def inherited(self) -> str:
        return "inherited"


class Example(Base):
    constant = 3

    def __init__(self) -> None:
        self.attribute = "value"
        self.function = lambda: "an attribute that can be called"
        self.calls: list[Any] = []

    def setup(self, b: object) -> None:
        self.calls.append(b)

    def drain(self) -> None: ...

    def plain(self) -> str:
        return "plain"

    def _private(self) -> None: ...

    def __call__(self) -> None: ...

    @staticmethod
    def static() -> str:
        return "static"

    @classmethod
    def of_class(cls) -> str:
        return cls.__name__

    @property
    def evaluated(self) -> str:
        raise AssertionError("a property was evaluated")

    async def coroutine(self) -> None: ...

    def generator(self) -> Iterator[int]:
        yield 1

    async def async_generator(self) -> AsyncIterator[int]:
        yield 1

    @parallel
    def compute(self) -> None: ...


def served(services: dict[str, object] | None = None) -> Services:
    handler = Services({"Supervisor": Base()}, frozenset({"Supervisor.inherited"}))
    handler.install({"E": Example()} if services is None else services, "the session")
    return handler


def test_public_methods() -> None:
    names = set(public_methods(Example()))
    methods = {"plain", "static", "of_class", "coroutine", "generator", "async_generator", "compute", "inherited"}
    assert names == methods | {"function"}
    assert set(public_methods(Example)) >= methods


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("plain", Kind.PLAIN),
        ("static", Kind.PLAIN),
        ("inherited", Kind.PLAIN),
        ("coroutine", Kind.ASYNC),
        ("generator", Kind.GENERATOR),
        ("async_generator", Kind.ASYNC_GENERATOR),
    ],
)
def test_how_a_method_runs_follows_from_how_it_is_written(method: str, kind: Kind) -> None:
    found = served().find(f"E.{method}", DRIVER)
    assert (found.name, found.kind, found.gate) == (f"E.{method}", kind, None)


def test_parallel_methods_share_one_gate() -> None:
    handler = served({"A": Example(), "B": Example()})
    gates = {id(handler.find(name, DRIVER).gate) for name in ("A.compute", "B.compute")}
    assert len(gates) == 1
    assert handler.find("A.compute", DRIVER).gate is not None
    assert parallel_methods({"A": Example(), "B": Base()}) == {"A.compute"}
    with pytest.raises(TypeError, match="async def"):
        parallel(Example.coroutine)


def test_setup_is_called_once_with_the_session() -> None:
    example = Example()
    served({"E": example})
    assert example.calls == ["the session"]


def test_a_setup_that_raises_is_named() -> None:
    class Broken:
        def setup(self, b: object) -> None:
            raise LookupError("no model")

    with pytest.raises(LookupError, match="no model") as caught:
        served({"E": Example(), "Broken": Broken()})
    assert caught.value.__notes__ == ["raised by the setup of service 'Broken'"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("F.plain", "no service 'F' on this machine; it has E"),
        ("E.nope", "service 'E' has no method 'nope'; it has async_generator, compute, coroutine"),
        ("E.setup", "no method 'setup'"),
        ("E._private", "no method '_private'"),
        ("E.evaluated", "no method 'evaluated'"),
        ("E.plain.__class__", "no method"),
        ("E", "<Service>.<method>"),
        ("E.", "<Service>.<method>"),
        ("", "<Service>.<method>"),
    ],
)
def test_unknown_names_say_which_exist(name: str, text: str) -> None:
    with pytest.raises(UnknownMethod) as caught:
        served().find(name, DRIVER)
    assert text in str(caught.value)


def test_before_the_services_are_there() -> None:
    handler = Services({"Process": Base()})
    assert handler.find("Process.inherited", MACHINE)
    with pytest.raises(NotReady, match="not set up yet"):
        handler.find("E.plain", DRIVER)
    with pytest.raises(UnknownMethod):
        handler.find("Process.nope", DRIVER)


def test_who_may_call_what() -> None:
    handler = served()
    for caller in (DRIVER, MACHINE):
        assert handler.find("E.plain", caller)
    assert handler.find("Supervisor.inherited", DRIVER)
    with pytest.raises(Forbidden, match="only the session's driver"):
        handler.find("Supervisor.inherited", MACHINE)
    for caller in (AGENT, None, "driver d"):
        for name in ("E.plain", "E.nope", "Supervisor.inherited"):
            with pytest.raises(Forbidden):
                handler.find(name, caller)


@pytest.mark.parametrize(
    ("services", "text"),
    [
        ({"Supervisor": Base()}, "bigmachine's own"),
        ({"Process": Base()}, "bigmachine's own"),
        ({"a.b": Base()}, "identifier"),
        ({"": Base()}, "identifier"),
        ({1: Base()}, "identifier"),
        ({"E": Example}, "is a class; give an object of it"),
    ],
)
def test_services_that_cannot_be(services: dict[Any, object], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        check_services(services)


class LateSetup:
    async def setup(self, b: object) -> None: ...


class LateDrain:
    async def drain(self, deadline: float | None) -> None: ...


@pytest.mark.parametrize(("service", "method"), [(LateSetup(), "setup"), (LateDrain(), "drain")])
def test_what_is_asynchronous_and_must_not_be_is_refused(service: object, method: str) -> None:
    with pytest.raises(UsageError, match=f"the {method} of service 'Late' is `async def`"):
        check_services({"Late": service})


class Drained:
    """Puts what it is told into a queue, and then waits, as one that has much to hand on would."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[tuple[float | None, str]] = queue.SimpleQueue()
        self.over = threading.Event()

    def drain(self, deadline: float | None) -> None:
        self.told.put((deadline, threading.current_thread().name))
        self.over.wait(SOON)

    def plain(self) -> None: ...


def test_services_that_can_are_drained_at_the_same_time() -> None:
    first, second = Drained(), Drained()
    handler = served({"First": first, "Base": Base(), "Second": second})
    handler.drain(1234.5)
    assert first.told.get(timeout=SOON) == (1234.5, "bigmachine-drain-First")
    assert second.told.get(timeout=SOON) == (1234.5, "bigmachine-drain-Second")
    handler.drain(None)
    assert first.told.get(timeout=SOON)[0] is None
    assert handler.find("First.plain", DRIVER)
    with pytest.raises(UnknownMethod, match="no method 'drain'"):
        handler.find("First.drain", DRIVER)
    for service in (first, second):
        service.over.set()


def test_services_are_drained_when_they_are_set_up() -> None:
    service = Drained()
    service.over.set()
    handler = Services({})
    handler.drain(1.0)
    assert service.told.empty()
    handler.install({"Late": service}, None)
    assert service.told.get(timeout=SOON)[0] == 1.0
    assert service.told.empty()


def test_what_a_drain_raises_is_output(capsys: pytest.CaptureFixture[str]) -> None:
    class Hasty:
        def drain(self, deadline: float | None) -> None:
            raise LookupError("nowhere to hand it on to")

    served({"Hasty": Hasty()}).drain(1.0)
    for thread in threading.enumerate():
        if thread.name == "bigmachine-drain-Hasty":
            thread.join(SOON)
    said = capsys.readouterr().err
    assert said.startswith("bigmachine: the drain of service 'Hasty' failed:\nTraceback")
    assert said.endswith("LookupError: nowhere to hand it on to\n")
