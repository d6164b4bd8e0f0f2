"""The thread that runs `async def` methods: what its end does to those that are still there."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from rpc_pair import SOON

from bigmachine.rpc.eventloop import EventLoop
from bigmachine.rpc.methods import CallContext


def ends(loop: EventLoop, method: Any) -> tuple[Any, BaseException | None]:
    """What `done` is told of `method()`, once the loop's thread has ended."""
    said: list[tuple[Any, BaseException | None]] = []
    loop.start(method, CallContext("S.method", "driver"), lambda result, error: said.append((result, error)))
    loop._thread.join(SOON)
    assert not loop._thread.is_alive()
    (only,) = said
    return only


def test_a_task_that_ends_in_the_very_step_in_which_the_loop_stops() -> None:
    """Its callback is still to come: for the loop it is there, and gone once it looks."""
    unhandled: list[object] = []
    hook, threading.excepthook = threading.excepthook, unhandled.append
    try:

        async def stop() -> int:
            asyncio.get_running_loop().stop()
            return 7

        assert ends(EventLoop(), stop) == (7, None)
    finally:
        threading.excepthook = hook
    assert not unhandled


def test_a_task_that_waits_when_the_loop_stops_is_cancelled() -> None:
    async def wait() -> None:
        asyncio.get_running_loop().call_soon(asyncio.get_running_loop().stop)
        await asyncio.Event().wait()

    result, error = ends(EventLoop(), wait)
    assert result is None
    assert isinstance(error, asyncio.CancelledError)
