"""The stacks of all threads, and which call of a service one belongs to.

The call path keeps no list of what runs on which thread: that would cost every call. A frame of its own, which stands below the
method's on the stack, has the call among its local variables.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from ..rpc.invoke import invoke
from ..rpc.methods import CallContext
from .values import Labels

RPC = invoke.__code__.co_filename.removesuffix("invoke.py")


def _its_own(variables: Any) -> Any:
    return variables["context"]


def _of_request(variables: Any) -> Any:
    return variables["request"].context


MARKS: dict[str, Callable[[Any], Any]] = {
    "invoke": _its_own,
    "ServerConnection._run": _its_own,
    "ServerConnection._run_gated": _its_own,
    "Requests._run_request": _of_request,
    "Requests._send_items": _of_request,
    "EventLoop.start.<locals>.run": _its_own,
    "EventLoop.iterate.<locals>.run": _its_own,
}
"""Functions of bigmachine.rpc in whose frames a call is decoded, run, answered, and how their variables name it."""


def current_frames() -> dict[int, FrameType]:
    """Where each thread stands, by its number; the one that asks, in what called the asking function.

    Not there itself, as then that frame would be among its own variables: garbage that only the collector finds, and that
    keeps alive until then whatever the functions on all these stacks held in variables.
    """
    frames = sys._current_frames()
    frames[threading.get_ident()] = sys._getframe(2)
    return frames


def call_of(frame: FrameType) -> CallContext | None:
    """The call that `frame` is there for, where it is one of bigmachine.rpc's own and says so."""
    code = frame.f_code
    mark = MARKS.get(code.co_qualname)
    if mark is None or not code.co_filename.startswith(RPC):
        return None
    try:
        context = mark(frame.f_locals)
    except (KeyError, AttributeError):
        return None  # The frame has only begun.
    return context if isinstance(context, CallContext) else None


def labels_of(frames: Iterable[FrameType]) -> Labels:
    """``service`` and ``method`` of the innermost call among `frames`, innermost first; empty where there is none."""
    for frame in frames:
        if frame.f_code.co_qualname in MARKS and (context := call_of(frame)) is not None:
            service, _, method = context.method.partition(".")
            return (("method", method), ("service", service))
    return ()
