"""Which calls run in this process now, for how long, and where they stand.

Read from the stacks, as the profiles are: calls keep no list of themselves, and cost nothing for being looked at.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from types import FrameType
from typing import Any, NamedTuple

from ..rpc.methods import CallContext
from ..rpc.server import Server
from .calls import RPC, call_of, current_frames
from .threads import suspended

OWN = ("Process.", "Supervisor.")
"""Of bigmachine itself: the question is one of them."""

LIBRARIES = (os.path.dirname(os.__file__) + os.sep, RPC, "<frozen ")
"""How paths of code begin that is not the program's."""


Stack = Sequence[FrameType]
"""The outermost frame first."""


class Doing(NamedTuple):
    """A call that runs: of `method`, since so many `seconds`. `where` is the line of the program's own code that it stands in,
    ``"bigpi.py:31 CirclePI.sample"``; `thread` the name of its thread, or of its asyncio task."""

    method: str
    seconds: float
    where: str
    thread: str


def doing(server: Server, limit: int) -> list[Doing]:
    """The calls that `server` has begun to run and not yet answered, the longest first; at most `limit`."""
    found: dict[int, Doing] = {}  # By call: one may have a task, and a thread that waits for it.
    for name, context, frames in _calls(server):
        if id(context) not in found and not context.method.startswith(OWN):
            seconds = max(0.0, time.perf_counter() - context.started)
            found[id(context)] = Doing(context.method, seconds, _where(frames), name)
    return sorted(found.values(), key=lambda call: -call.seconds)[:limit]


def _calls(server: Server) -> Iterator[tuple[str, CallContext, Stack]]:
    """Thread or task, call, and the call's frames. What knows best where a call stands comes first."""
    loop = server.running_loop
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    me = threading.get_ident()  # It runs the question, and its frames must not be among their own variables.
    stacks = {ident: _stack(frame) for ident, frame in current_frames().items() if ident != me}
    if loop is not None:
        # The task that runs just now, with what it has called, and the others.
        on_loop = [("bigmachine-asyncio", stacks.pop(loop.thread or 0, []))]
        for name, stack in on_loop + [(task.get_name(), list(suspended(task.get_coro()))) for task in loop.tasks]:
            for context, frames in _begun(stack):
                yield name, context, frames
    for ident, stack in stacks.items():
        for context, frames in _begun(stack):
            # A driver's process may have many machines in it.
            owner: Any = frames[0].f_locals.get("self")
            if getattr(owner, "_server", None) is server:
                yield names.get(ident, ""), context, frames


def _stack(frame: FrameType | None) -> Stack:
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    frames.reverse()
    return frames


def _begun(stack: Stack) -> Iterator[tuple[CallContext, Stack]]:
    """The call that a stack is there for, if any, with the frames from the outermost that is about it."""
    for depth, frame in enumerate(stack):
        context = call_of(frame)
        if context is not None:
            yield context, stack[depth:]
            return


def _where(frames: Stack) -> str:
    """Of the frames of a call: the innermost that is the program's own, else the method's. There is neither while the call is
    decoded or answered: then whatever is run for that."""
    method = [frame for frame in frames if not frame.f_code.co_filename.startswith((RPC, "<frozen "))][:1]
    own = [frame for frame in frames if _is_own(frame.f_code.co_filename)] or method or frames[-1:]
    code = own[-1].f_code
    return f"{PurePath(code.co_filename).name}:{own[-1].f_lineno or code.co_firstlineno} {code.co_qualname}"


def _is_own(file: str) -> bool:
    return not file.startswith(LIBRARIES) and "site-packages" not in file and "dist-packages" not in file
