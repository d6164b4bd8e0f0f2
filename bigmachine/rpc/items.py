"""The caller's end of a stream of items."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from ..errors import CallTimeout, Unreachable
from .calls import Pending
from .codec import Codec
from .reactor import Reactor
from .streams import Body, Inbox, Items
from .transport import Closed, Transport


class Exchange:
    """One call on a stream of its own. `pending` is completed at its end; with `items` its body goes to `inbox` instead."""

    def __init__(self, pending: Pending, *, items: bool = False) -> None:
        self.pending = pending
        self.stream = 0
        self.status = 0
        self.body: Body | None = None
        self.failure = bytearray()
        self.inbox: Inbox | None = None
        self.items = items


class _Connection(Protocol):
    """What an iterator needs of the connection that its items come on."""

    address: str
    codec: Codec
    reactor: Reactor
    transport: Transport

    @property
    def closed(self) -> Closed | None: ...

    def abandon(self, exchange: Exchange) -> None: ...


class ItemStream(Iterator[Any]):
    """Iterates over what a generator method yields, as it comes. The method runs ahead by at most the stream's window.

    ``close()`` (or the end of a ``with`` block) closes the generator there. ``timeout`` of the call bounds the whole.
    """

    def __init__(self, connection: _Connection, exchange: Exchange, timeout: float) -> None:
        self._connection = connection
        self._exchange = exchange
        self._items = Items()
        self._ready: list[Body] = []
        self._deadline = time.monotonic() + timeout if timeout else None
        self._timeout = timeout
        self._over = False
        self.on_end: Callable[[BaseException | None], None] | None = None
        """Called once: with what ended the iteration too early, or None."""

    def __iter__(self) -> ItemStream:
        return self

    def __next__(self) -> Any:
        """The next item. Raises what the method raised, `CallTimeout`, `Unreachable`."""
        try:
            return self._next()
        except StopIteration:
            self._tell(None)
            raise
        except Exception as error:  # Ctrl-C leaves the stream as it is.
            self._tell(error)
            raise

    def _tell(self, error: BaseException | None) -> None:
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end(error)

    def _next(self) -> Any:
        exchange = self._exchange
        assert exchange.inbox is not None
        while not self._ready and not self._over:
            self._wait()
            try:
                chunk = exchange.inbox.take()
            except BaseException:  # Whatever the method raised: it is the last thing that comes.
                self._over = True
                raise
            if chunk is None:
                self._over = True
                if self._items.partial:
                    raise Unreachable(self._connection.address, "the items were cut short", sent=True)
            else:
                self._ready.extend(self._items.feed(chunk))
        if not self._ready:
            raise StopIteration
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise self._too_late()
        body = self._ready.pop(0)
        return self._connection.codec.decode(body.pickle, body.buffers)

    def _wait(self) -> None:
        """Until the inbox has something; reads the connection on this thread where nobody does."""
        exchange = self._exchange
        assert exchange.inbox is not None
        pending = exchange.pending
        while not exchange.inbox.ready():
            pending.done = False
            if exchange.inbox.ready():
                return
            if not self._connection.transport.wait(pending, self._deadline):
                raise self._too_late()
            if self._connection.closed is not None:
                exchange.inbox.wait(1.0)  # `on_closed` is on its way to it.

    def _too_late(self) -> CallTimeout:
        self._give_up()
        return CallTimeout(self._exchange.pending.method, self._connection.address, self._timeout)

    def close(self) -> None:
        """Close the generator on the far side; further iteration ends. Idempotent."""
        self._give_up()
        self._tell(None)

    def _give_up(self) -> None:
        self._over = True
        self._ready.clear()
        self._connection.abandon(self._exchange)

    def __enter__(self) -> ItemStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._over:  # Not here: this may be the garbage collector, on a thread that holds the transport's lock.
            connection, exchange, on_end = self._connection, self._exchange, self.on_end

            def abandon() -> None:
                connection.abandon(exchange)
                if on_end is not None:
                    on_end(None)

            connection.reactor.execute(abandon)
