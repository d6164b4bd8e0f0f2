"""Which call of a service a stack belongs to.

The call path keeps no list of what runs on which thread: that would cost every call. A frame of its own, which stands below the
method's on the stack, has the call among its local variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from ..rpc.invoke import invoke
from .values import Labels

RPC = invoke.__code__.co_filename.removesuffix("invoke.py")


def _by_context(variables: Any) -> Any:
    return variables["context"].method


MARKS: dict[str, Callable[[Any], Any]] = {
    "invoke": lambda variables: variables["method"].name,
    "ServerConnection._run": lambda variables: variables["method"].name,
    "Requests._run_request": lambda variables: variables["request"].method.name,
    "Requests._send_items": lambda variables: variables["request"].method.name,
    "EventLoop.start.<locals>.run": _by_context,
    "EventLoop.iterate.<locals>.run": _by_context,
}
"""Functions of bigmachine.rpc in whose frames a call is decoded, run, answered, and how their variables name it."""


def labels_of(frames: Iterable[FrameType]) -> Labels:
    """``service`` and ``method`` of the innermost call among `frames`, innermost first; empty where there is none."""
    for frame in frames:
        code = frame.f_code
        mark = MARKS.get(code.co_qualname)
        if mark is not None and code.co_filename.startswith(RPC):
            try:
                service, _, method = str(mark(frame.f_locals)).partition(".")
            except (KeyError, AttributeError):
                continue  # The frame has only begun.
            return (("method", method), ("service", service))
    return ()
