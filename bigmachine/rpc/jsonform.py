"""The JSON form of calls: for `curl`, and for whoever else has no pickle."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from .invoke import NotRun


def json_arguments(name: str, raw: bytearray) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """An array is the positional arguments, an object the keyword arguments, nothing none, any other value the only one."""
    if not raw.strip():
        return (), {}
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise NotRun(name, f"the body is not JSON: {error}") from None
    if isinstance(value, list):
        return tuple(value), {}
    if isinstance(value, dict):
        return (), value
    return (value,), {}


def _plain(value: Any) -> Any:
    """The JSON form of what has none: of the figures that bigmachine's own services return."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"Object of type {type(value).__qualname__} is not JSON serializable")


def to_json(value: Any, what: str) -> bytes:
    """Raises TypeError, which names `what`."""
    try:
        return json.dumps(value, allow_nan=False, default=_plain).encode()
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what} has no JSON form: {error}; call it with pickle") from None


def json_failure(error: BaseException) -> bytes:
    """The body of an answer with status 590."""
    return json.dumps({"error": {"type": type(error).__qualname__, "message": _text(error)}}).encode()


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as problem:  # The user's class takes part.
        return f"(str() of it raised {type(problem).__name__})"
