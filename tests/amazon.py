"""A stand-in for `Api`, for what moto does not do as AWS does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from moto_cloud import REGION


@dataclass
class Scripted:
    """An `Api` whose answers are functions of the parameters, by operation; `calls` are those that were made."""

    answers: dict[str, Callable[..., Any]]
    region: str = REGION
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def call(self, service: str, operation: str, *, region: str = "", **parameters: Any) -> dict[str, Any]:
        self.calls.append((operation, parameters))
        answer: dict[str, Any] = self.answers[operation](**parameters)
        return answer

    def pages(self, service: str, operation: str, key: str, **parameters: Any) -> Iterator[Any]:
        yield from self.call(service, operation, **parameters).get(key, ())

    def made(self, operation: str) -> list[dict[str, Any]]:
        """The parameters of the calls of one operation."""
        return [parameters for name, parameters in self.calls if name == operation]
