"""Which distributions a worker needs: a closure over what each requires, from a set that is declared (`wheels.WORKER`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ..errors import PackError
from .platforms import Platform
from .wheels import WORKER, Wheel


def worker_names(wheels: Sequence[Wheel], roots: Iterable[str], platform: Platform) -> frozenset[str]:
    """Which of the distributions a worker needs: bigmachine, what that needs there (`WORKER`), and what the user's program
    asks for itself (`roots`: names, or requirements such as ``uvicorn[standard]``), each with all that it requires.

    A requirement that is not among the wheels was not resolved, so its marker is false. Raises `PackError` where one cannot
    be read.
    """
    known = {wheel.name: wheel for wheel in wheels}
    environment = platform.environment()
    waiting = list(_wanted("the program", [*WORKER, "bigmachine", *roots], environment, ""))
    seen: set[tuple[str, str]] = set()
    while waiting:
        name, extra = waiting.pop()
        if name not in known or (name, extra) in seen:
            continue
        seen.add((name, extra))
        if name != "bigmachine":  # What it requires is the driver's, but for `WORKER`.
            waiting += _wanted(known[name].filename, known[name].requires, environment, extra)
    return frozenset(name for name, _ in seen)


def _wanted(whose: str, lines: Iterable[str], environment: Mapping[str, str], extra: str) -> Iterator[tuple[str, str]]:
    """Name and extra of each requirement that holds there: once without an extra, once with each that it names."""
    for line in lines:
        try:
            requirement = Requirement(line)
        except InvalidRequirement as error:
            raise PackError(f"{whose} has a requirement that cannot be read: {line}") from error
        if requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra}):
            for wanted in ("", *sorted(requirement.extras)):
                yield canonicalize_name(requirement.name), wanted
