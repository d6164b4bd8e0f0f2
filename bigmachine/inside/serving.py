"""The thread that serves the debug page: uvicorn, on sockets that are there already; imported when a client connects."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Sequence

import uvicorn

from . import guard, routes
from .cluster import Cluster

GRACE = 1
"""Seconds (whole ones, says uvicorn) for answers that are under way at the end: `routes` ends them at once, and this is for
clients that do not read. Less than `server.END_WITHIN`."""


class Serving:
    """One server: `run` on a thread of its own, `close` on another."""

    def __init__(self, session: Cluster, host: str, sockets: Sequence[socket.socket]) -> None:
        self._sockets = list(sockets)
        self._debug = routes.Debug(session)
        app = guard.Host(routes.standing(self._debug), host)
        # What is the program's own is left as it is: `log_config` would set loggers up, and `access_log=False` take away the
        # handlers of a server that the program itself has.
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            proxy_headers=False,
            server_header=False,
            workers=1,
            timeout_graceful_shutdown=GRACE,
        )
        self._server = uvicorn.Server(config)

    def run(self) -> None:
        """Serve until `close`."""
        loggers = [logging.getLogger(name) for name in ("uvicorn.error", "uvicorn.access")]
        quiet = _Quiet()
        for logger in loggers:
            logger.addFilter(quiet)
        try:
            asyncio.run(self._serve())
        finally:
            for logger in loggers:
                logger.removeFilter(quiet)

    def close(self) -> None:
        """Returns at once."""
        self._debug.close()
        self._server.should_exit = True  # It looks ten times a second.

    async def _serve(self) -> None:
        await self._server.serve(self._sockets)
        for connection in list(self._server.server_state.connections):  # Whoever has not read to the end.
            connection.transport.abort()
        await asyncio.sleep(0)


class _Quiet(logging.Filter):
    """What uvicorn says on this thread of starting, stopping, and requests, is nobody's news: errors with a traceback are."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        return record.thread != self._thread or record.exc_info is not None
