"""The stacks of every thread and of every asyncio task, at one moment."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from types import AsyncGeneratorType, FrameType
from typing import Any

from .calls import current_frames, labels_of
from .values import MAX_DEPTH, TOO_DEEP, Labels, Places, Profile, Sample, Stack

TYPES = (("threads", "count"), ("tasks", "count"))


def take() -> Profile:
    """One sample a stack, with the labels ``thread`` or ``task`` (its name), ``service``, ``method`` (of the call it runs)."""
    places = Places()
    started = time.time()
    found: Counter[tuple[Stack, Labels, bool]] = Counter()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in current_frames().items():
        stack, frames = places.of_stack(frame)
        name = names.get(ident, f"not Python's own, {ident}")
        found[stack, (*labels_of(frames), ("thread", name)), False] += 1
    for task in _tasks():
        coroutine = list(suspended(task.get_coro()))
        coroutine.reverse()
        kept = coroutine[:MAX_DEPTH]
        stack = tuple(places.of_frame(frame) for frame in kept)
        if len(kept) < len(coroutine):
            stack += (places.number(TOO_DEEP),)
        found[stack, (*labels_of(coroutine), ("task", task.get_name())), True] += 1
    samples = [
        Sample(stack, (0, count) if is_task else (count, 0), tuple(sorted(labels)))
        for (stack, labels, is_task), count in found.items()
    ]
    return Profile("threads", TYPES, "threads", places.places, samples, started)


def _tasks() -> Iterator[Any]:
    """Those that have not ended, of all loops. Which loops there are only the garbage collector knows."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is None:
        return
    # By type: `isinstance` asks the object, which may be a proxy that does something then.
    loops = [each for each in gc.get_objects() if issubclass(type(each), asyncio.AbstractEventLoop)]
    for loop in loops:
        if not loop.is_closed():
            yield from sorted(asyncio.all_tasks(loop), key=lambda task: str(task.get_name()))


def suspended(coroutine: Any) -> Iterator[FrameType]:
    """The frames of a coroutine and of what it awaits, the outermost first. One that is running shows in its thread's stack
    as well, with what it has called."""
    while coroutine is not None:
        for prefix, awaited in (("cr", "cr_await"), ("gi", "gi_yieldfrom"), ("ag", "ag_await")):
            if hasattr(coroutine, f"{prefix}_frame"):
                frame = getattr(coroutine, f"{prefix}_frame")
                if frame is not None:
                    yield frame
                coroutine = getattr(coroutine, awaited)
                break
        else:
            # What waits for the next item of an async generator has that among what it refers to, and nowhere else.
            coroutine = next((each for each in gc.get_referents(coroutine) if type(each) is AsyncGeneratorType), None)
