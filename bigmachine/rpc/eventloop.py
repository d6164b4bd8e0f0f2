"""The event loop on which a process runs its `async def` methods: a thread of its own, started by the first of them.

Imported when that happens, not before: `asyncio` costs 15 ms and 5 MB that a machine without such methods does not pay.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

from .methods import CallContext, current_call


class EventLoop:
    """One thread that runs an asyncio loop for the life of the process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="bigmachine-asyncio", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def start(
        self,
        make: Callable[[], Coroutine[Any, Any, Any]],
        context: CallContext,
        done: Callable[[Any, BaseException | None], None],
    ) -> Callable[[], None]:
        """Run the coroutine that `make` returns, within `context`'s deadline; then `done(result, error)`, on the loop's
        thread. Returns a function that cancels it, from any thread."""
        state: list[asyncio.Task[Any]] = []
        cancelled = threading.Event()

        async def run() -> None:
            current_call.set(context)
            try:
                async with asyncio.timeout(context.remaining):
                    result = await make()
            except BaseException as error:  # The method's own, whatever it is: it goes to the caller.
                done(None, error)
            else:
                done(result, None)

        def begin() -> None:
            if not cancelled.is_set():
                state.append(self._loop.create_task(run()))

        def cancel() -> None:
            cancelled.set()
            self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in state])

        self._loop.call_soon_threadsafe(begin)
        return cancel

    def iterate(self, generator: AsyncIterator[Any], context: CallContext) -> Iterator[Any]:
        """The items of an async generator, for a thread outside the loop. Closing this closes the generator."""

        async def step() -> Any:
            current_call.set(context)
            return await anext(generator, _END)

        try:
            while (item := asyncio.run_coroutine_threadsafe(step(), self._loop).result()) is not _END:
                yield item
        finally:
            aclose = getattr(generator, "aclose", None)
            if aclose is not None:
                asyncio.run_coroutine_threadsafe(aclose(), self._loop).result()


_END = object()
