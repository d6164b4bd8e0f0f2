"""The event loop on which a process runs its `async def` methods: a thread of its own, started by the first of them.

Imported when that happens, not before: `asyncio` costs 15 ms and 2 MB (measured), which a machine without such
methods does not pay.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

from .methods import CallContext, current_call

GRACE = 0.25
"""Seconds after a call's deadline for which its caller may still cancel it himself, and so know why: this end's clock is for
one who cannot any more."""


class EventLoop:
    """One thread that runs an asyncio loop until `close`, or for the life of the process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[Any]] = set()  # asyncio itself holds tasks weakly.
        self._thread = threading.Thread(target=self._run, name="bigmachine-asyncio", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            while self._tasks:
                for task in self._tasks:
                    task.cancel()
                # A copy: tasks that have ended leave the set as soon as the loop runs, and `wait` refuses an empty one.
                self._loop.run_until_complete(asyncio.wait(set(self._tasks)))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    @property
    def thread(self) -> int | None:
        """The number of the loop's thread, as `threading.get_ident` has it."""
        return self._thread.ident

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        """Those of the calls that are under way."""
        return list(self._tasks)

    def close(self) -> None:
        """Cancel what runs; the thread ends when that has."""
        try:
            self._loop.call_soon_threadsafe(self._loop.stop)
        except RuntimeError:
            pass  # It is closed.

    def start(
        self,
        make: Callable[[], Coroutine[Any, Any, Any]],
        context: CallContext,
        done: Callable[[Any, BaseException | None], None],
    ) -> None:
        """Run the coroutine that `make` returns, until `context` is cancelled or its deadline has passed; then
        `done(result, error)`, on the loop's thread. In any case, and once."""

        async def run() -> tuple[Any, BaseException | None]:
            current_call.set(context)
            remaining = context.remaining
            try:
                async with asyncio.timeout(None if remaining is None else remaining + GRACE):
                    return await make(), None
            except BaseException as error:  # The method's own, whatever it is: it goes to the caller, not to the loop.
                return None, error

        try:
            self._spawn(run, context, done)
        except RuntimeError as error:
            done(None, error)

    def iterate(self, generator: AsyncIterator[Any], context: CallContext) -> Iterator[Any]:
        """The items of an async generator, for a thread outside the loop; each is computed when it is asked for. Closing
        this closes the generator, and cancelling `context` cancels what it waits for."""
        wanted = asyncio.Semaphore(0)
        items: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        async def run() -> tuple[Any, BaseException | None]:
            # One task for all of it: the generator may hold timeouts and task groups open.
            current_call.set(context)
            failure: BaseException | None = None
            try:
                await wanted.acquire()
                async for item in generator:
                    items.put((item, None))
                    await wanted.acquire()
            except BaseException as error:  # The generator's own, or our cancellation.
                failure = error
            try:
                aclose = getattr(generator, "aclose", None)
                if aclose is not None:
                    await aclose()
            except BaseException as error:  # A generator that does not let itself be closed quietly.
                failure = error
            return _END, failure

        cancel = self._spawn(run, context, lambda end, failure: items.put((_END, failure)))
        item = None
        try:
            while True:
                self._loop.call_soon_threadsafe(wanted.release)
                item, error = items.get()
                if error is not None:
                    raise error
                if item is _END:
                    return
                yield item
        finally:
            if item is not _END:
                cancel()
                _, error = items.get()
                if error is not None and not isinstance(error, asyncio.CancelledError):
                    raise error

    def _spawn(
        self,
        run: Callable[[], Coroutine[Any, Any, tuple[Any, BaseException | None]]],
        context: CallContext,
        done: Callable[[Any, BaseException | None], None],
    ) -> Callable[[], None]:
        """Run `run()` as a task, and `done` with what it returns. It is cancelled, once, with `context` or by calling what
        this returns. Raises RuntimeError where the loop is closed."""
        task: asyncio.Task[tuple[Any, BaseException | None]] | None = None
        cancelled = False

        def begin() -> None:
            nonlocal task
            task = self._loop.create_task(run())
            self._tasks.add(task)
            task.add_done_callback(ended)

        def ended(task: asyncio.Task[tuple[Any, BaseException | None]]) -> None:
            self._tasks.discard(task)
            # A task that is cancelled before its first step does not run at all.
            done(*((None, asyncio.CancelledError()) if task.cancelled() else task.result()))

        def end() -> None:
            nonlocal cancelled
            if not cancelled and task is not None:
                cancelled = True
                task.cancel()

        def cancel() -> None:
            try:
                self._loop.call_soon_threadsafe(end)
            except RuntimeError:
                pass  # The loop is closed, and has cancelled everything.

        self._loop.call_soon_threadsafe(begin)
        context._when_cancelled(cancel)
        return cancel


_END = object()
