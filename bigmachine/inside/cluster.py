"""What those who look inside see of a session: the driver's `session.Session`, which is not imported here, as it imports us."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from ..events import Events
from ..fleet import Fleet
from ..logs import Logs
from ..machine import Machine


class Cluster(Protocol):
    """A driver's session."""

    failed: BaseException | None
    captures: list[dict[str, Any]]

    @property
    def fleet(self) -> Fleet: ...

    @property
    def name(self) -> str: ...

    @property
    def system(self) -> str: ...

    @property
    def events(self) -> Events: ...

    @property
    def logs(self) -> Logs: ...

    def machines(self) -> list[Machine]: ...

    def say(self, text: str) -> None: ...

    def at_end(self, callback: Callable[[], object]) -> None: ...

    def at_failure(self, callback: Callable[[BaseException], object]) -> None: ...
