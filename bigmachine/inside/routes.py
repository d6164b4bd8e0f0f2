"""What there is to see of a session, by path below a prefix: ``/debug/bigmachine`` on the driver's own server (`server`).

======================  ==========================================================================================
``/``                   the page, which updates itself; its files are below ``/static/``
``/status``             the same as text
``/status.json``        the same as JSON (`status`)
``/machines/ID.json``   one machine: its entry there, and its ``methods``
``/logs``               what machines have said, as text; ``machine``, ``n`` (how many of the last lines), ``follow=1``
``/logs.json``          the same: ``lines``, ``number`` (the last one's), ``lost`` (how many were not kept), ``behind`` (whether
                        there are more), ``under_way`` (lines that have no end yet); ``n`` as above, or ``after`` a number,
                        ``limit``; ``machine``, ``text``
``/events.json``        what has happened: ``events``, ``number``; ``after``, ``limit``
``/vars``               the variables of all processes, summed and by machine, as JSON
``/metrics``            the same for Prometheus
``/pprof/``             which profiles there are
``/pprof/KIND``         a profile of all processes in one: ``profile`` (``seconds``), ``heap`` (``gc=1``), ``threads``, and Go's
                        names ``allocs``, ``goroutine``; ``machine`` (its id, its address, or "driver"), ``debug=1`` for text.
                        ``X-Bigmachine-Missing`` says how many processes have not answered
``/flame.json``         a profile (``kind``, and as above) as the page draws it
``/bundle``             a report of everything, in one zip
======================  ==========================================================================================

Errors are one line of text that says what to do. A machine is named by its id or its address.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.resources
import io
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import profiling
from ..errors import BigmachineError, UsageError
from ..logs import Line
from ..rpc.stats import MethodStats
from . import bundle, flame, monitor, text, variables
from .cluster import Cluster
from .guard import Reading
from .profiles import Cancelled, Taken, take
from .settings import PREFIX
from .status import Figures, as_event, is_ours, method_entry

T = TypeVar("T")

PAGE = "index.html"

KINDS = {
    "css": "text/css",
    "html": "text/html",
    "js": "text/javascript",
    "json": "application/json",
    "png": "image/png",
    "svg": "image/svg+xml",
}
"""What the page's files are; the system's own table may say something else."""

ALIASES = {"goroutine": "threads", "allocs": "heap"}
"""What Go's tools ask for, and what of ours comes closest."""

MAX_PROFILES = 8
"""That are taken at once, and collections of variables, and reports: each keeps a thread, and asks all machines."""

LINES = 1000
"""Lines of an answer, unless it says how many."""

MAX_LINES = 100_000

FOLLOW_EVERY = 0.25
"""Seconds between two looks for new lines, for who follows them."""


class Refusal(Exception):
    """The request cannot be answered: `status`, and a line that says what to do."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Debug:
    """The pages of one session: an ASGI application, `app`, for any prefix."""

    def __init__(self, session: Cluster) -> None:
        self._session = session
        self._monitor = monitor.of(session)
        self._ending = False
        self._lock = threading.Lock()
        self._under_way: set[Callable[[], object]] = set()
        routes = [
            Route("/", self._page),
            Route("/static/{path:path}", self._static),
            Route("/status", self._status_text),
            Route("/status.json", self._status),
            Route("/machines/{id}.json", self._machine),
            Route("/logs", self._logs),
            Route("/logs.json", self._logs_json),
            Route("/events.json", self._events),
            Route("/vars", self._vars),
            Route("/metrics", self.metrics),
            Route("/pprof", _add_slash),
            Route("/pprof/", self._profiles),
            Route("/pprof/{kind}", self._profile),
            Route("/flame.json", self._flame),
            Route("/bundle", self._bundle),
        ]
        router = Router(routes, redirect_slashes=False, default=_nothing_there)
        self.app: ASGIApp = Reading(_Answering(router))
        session.at_end(self.close)

    def close(self) -> None:
        """The session has ended: whoever follows it is told so, and nothing new is begun. Idempotent."""
        with self._lock:
            self._ending = True
            cancels = list(self._under_way)
        for cancel in cancels:
            cancel()

    # -- Status ------------------------------------------------------------------------------------------------------

    async def _snapshot(self) -> monitor.Snapshot:
        current = self._monitor.current()
        return current if current is not None else await off_loop(self._monitor.snapshot)

    async def _status(self, request: Request) -> Response:
        snapshot = await self._snapshot()
        headers = {"ETag": snapshot.tag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
        if snapshot.tag in [each.strip() for each in request.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
            return Response(snapshot.gzipped, headers=headers, media_type="application/json")
        return Response(snapshot.body, headers=headers, media_type="application/json")

    async def _status_text(self, request: Request) -> Response:
        return PlainTextResponse(text.status((await self._snapshot()).value))

    async def _machine(self, request: Request) -> Response:
        id = self._machine_id(request.path_params["id"])
        snapshot = await self._snapshot()
        entry = next((each for each in snapshot.value["machines"] if each["id"] == id), None)
        if entry is None:
            raise Refusal(404, f"machine {id} has just been ordered: try again in {monitor.INTERVAL:g} s")
        return _json({"now": snapshot.value["now"], **entry, "methods": self._methods_of(id)})

    def _methods_of(self, id: str) -> list[dict[str, Any]]:
        """Of one machine: totals, without rates."""
        seen = self._monitor.seen(id)
        served: dict[str, MethodStats] = {}
        for by_name in list(seen.stats.values()) if seen is not None else ():
            for name, stats in by_name.items():
                served.setdefault(name, MethodStats()).add(stats)
        (machine,) = (each for each in self._session.machines() if each.id == id)
        called = {name: stats for name, stats in machine.call_stats().items() if not is_ours(name)}
        names = sorted(served.keys() | called.keys())
        return [method_entry(name, Figures(served.get(name), None, called.get(name), None)) for name in names]

    def _machine_id(self, named: str) -> str:
        """Raises `Refusal`."""
        machines = self._session.machines()
        for machine in machines:
            if named in (machine.id, machine.addr):
                return machine.id
        raise Refusal(404, f"no such machine: {named!r}; there are {_list([each.id for each in machines])}")

    # -- Logs and events ---------------------------------------------------------------------------------------------

    async def _logs(self, request: Request) -> Response:
        machine = self._asked_machine(request)
        n = number(request, "n", LINES, MAX_LINES)
        lines = self._session.logs.last(n, machine)
        if not flag(request, "follow") or request.method == "HEAD":
            return PlainTextResponse("".join(map(self._shown, lines)))
        after = lines[-1].number if lines else self._session.logs.number if n == 0 else 0
        return StreamingResponse(
            self._following(request, lines, after, machine), media_type="text/plain; charset=utf-8"
        )

    async def _following(
        self, request: Request, lines: list[Line], after: int, machine: str | None
    ) -> AsyncIterator[str]:
        """Ends with the session, when all has been said."""
        logs = self._session.logs
        while not await request.is_disconnected():  # Not every server tells who sends.
            if lines:
                yield "".join(map(self._shown, lines))
                after = lines[-1].number
            ending = self._ending or logs.closed
            lines, lost = logs.since(after, machine, LINES)
            if lost and lines:
                yield f"… {lost} lines are not kept any more\n"
            if lines:
                continue
            if ending:
                return
            await asyncio.sleep(FOLLOW_EVERY)

    def _shown(self, line: Line) -> str:
        """As on the driver's standard error."""
        if not line.machine:
            return f"{line.text}\n"
        address = next((each.addr for each in self._session.machines() if each.id == line.machine), line.machine)
        return f"{address}: {line.text}\n"

    async def _logs_json(self, request: Request) -> Response:
        logs = self._session.logs
        machine = self._asked_machine(request)
        wanted = request.query_params.get("text", "")
        limit = number(request, "limit", LINES, MAX_LINES)
        after = number(request, "after", -1, None)
        if after < 0:
            lines, lost = logs.last(number(request, "n", limit, MAX_LINES), machine), 0
            lines = [line for line in lines if wanted in line.text]
        else:
            lines, lost = logs.since(after, machine, limit, wanted)
        answer = {
            "lines": [line._asdict() for line in lines],
            "number": logs.number,
            "lost": lost,
            "behind": after >= 0 and len(lines) == limit,
            "under_way": [line._asdict() for line in logs.under_way(machine)],
        }
        return _json(answer)

    def _asked_machine(self, request: Request) -> str | None:
        """The machine's id; "" for the session's own lines, None for all."""
        named = request.query_params.get("machine")
        return named and (named if named == "" else "" if named == variables.DRIVER else self._machine_id(named))

    async def _events(self, request: Request) -> Response:
        after, limit = number(request, "after", 0, None), number(request, "limit", LINES, MAX_LINES)
        events = self._session.events.since(after, limit)
        last = self._session.events.last(1)
        return _json({"events": [as_event(each) for each in events], "number": last[0].number if last else 0})

    # -- Variables ---------------------------------------------------------------------------------------------------

    async def _vars(self, request: Request) -> Response:
        collected = await self._limited(request, lambda: variables.as_json(variables.collect(self._session)))
        return _json(collected, indent=1)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        said = await self._limited(request, lambda: variables.as_prometheus(variables.collect(self._session)))
        return Response(said, media_type="text/plain; version=0.0.4; charset=utf-8")

    # -- Profiles ----------------------------------------------------------------------------------------------------

    async def _profiles(self, request: Request) -> Response:
        names = {**profiling.KINDS, **{name: f"as {kind}" for name, kind in ALIASES.items()}}
        rows = "".join(
            f'<li><a href="{name}?debug=1">{name}</a> ({what}; <a href="{name}">for go tool pprof</a>)</li>\n'
            for name, what in names.items()
        )
        head = '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>profiles</title></head><body>\n'
        return Response(
            f"{head}<p>Profiles of all processes in one. Parameters: seconds, gc=1, machine, debug=1.</p>\n<ul>\n{rows}</ul>\n"
            '<p><a href="../">status</a></p>\n</body></html>\n',
            media_type="text/html",
        )

    async def _profile(self, request: Request) -> Response:
        taken = await self._taken(request, request.path_params["kind"])
        headers = {"X-Bigmachine-Missing": str(len(taken.missing))}
        if number(request, "debug", 0, None):
            return PlainTextResponse(await off_loop(taken.text), headers=headers)
        name = f"{request.path_params['kind']}.pb.gz"
        headers["Content-Disposition"] = f'attachment; filename="{name}"'
        return Response(await off_loop(taken.pprof), headers=headers, media_type="application/octet-stream")

    async def _flame(self, request: Request) -> Response:
        taken = await self._taken(request, request.query_params.get("kind", "profile"))
        body = await off_loop(lambda: json.dumps(flame.as_json(taken), separators=(",", ":")).encode())
        return Response(body, headers={"X-Bigmachine-Missing": str(len(taken.missing))}, media_type="application/json")

    async def _taken(self, request: Request, named: str) -> Taken:
        kind = ALIASES.get(named, named)
        if kind not in profiling.KINDS:
            raise Refusal(404, f"no such profile: {named!r}; there are {', '.join([*profiling.KINDS, *ALIASES])}")
        seconds = profiling.checked(kind, request.query_params.get("seconds", "30"))
        gc = flag(request, "gc")
        machine = request.query_params.get("machine") or None
        if machine is not None and machine != variables.DRIVER:
            machine = self._machine_id(machine)
        gone = threading.Event()
        return await self._limited(request, lambda: take(self._session, kind, seconds, gc, machine, gone), gone)

    async def _bundle(self, request: Request) -> Response:
        def made() -> bytes:
            file = io.BytesIO()
            bundle.write(self._session, file, "asked for")
            return file.getvalue()

        name = f"bigmachine-{self._session.name}.zip"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(await self._limited(request, made), headers=headers, media_type="application/zip")

    async def _limited(self, request: Request, act: Callable[[], T], gone: threading.Event | None = None) -> T:
        """What `act` returns, on a thread; there are at most `MAX_PROFILES`. `gone` is set when nobody waits for it any more:
        the client has gone away, or the session has ended. The thread counts until it has ended, whoever waits."""
        cancelled = asyncio.Event()
        loop = asyncio.get_running_loop()

        def cancel() -> None:
            if gone is not None:
                gone.set()
            with contextlib.suppress(RuntimeError):  # The program's own loop has ended in the midst of it.
                loop.call_soon_threadsafe(cancelled.set)

        def acted() -> T:
            try:
                return act()
            finally:
                with self._lock:
                    self._under_way.discard(cancel)

        with self._lock:
            if self._ending:
                raise Refusal(503, "the session has ended: there is nobody to ask any more")
            if len(self._under_way) >= MAX_PROFILES:
                raise Refusal(
                    503, f"{MAX_PROFILES} others are being answered, each by all machines: try again when one has ended"
                )
            self._under_way.add(cancel)
        waits = [asyncio.ensure_future(each) for each in (off_loop(acted), _departure(request), cancelled.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if waits[0].done():
                return waits[0].result()  # type: ignore[return-value]
            raise Refusal(503, "the session has ended: there is nobody to ask any more")
        finally:
            if waits[0].done():  # Also where there can be no thread.
                with self._lock:
                    self._under_way.discard(cancel)
            if gone is not None:
                gone.set()
            for wait in waits:
                wait.cancel()

    # -- The page ----------------------------------------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        return self._file(PAGE)

    async def _static(self, request: Request) -> Response:
        return self._file(request.path_params["path"])

    def _file(self, name: str) -> Response:
        body = page_file(name)
        if body is None:
            raise Refusal(404, f"no such file: {name[:100]!r}; the page is at {PREFIX}/")
        kind = KINDS.get(name.rpartition(".")[2], "application/octet-stream")
        return Response(body, headers={"Cache-Control": "no-cache"}, media_type=kind)


@functools.cache
def _page_files() -> Mapping[str, bytes]:
    """All of them, 100 kB: the package may lie in a zip, and what a URL names is never made into a path."""
    folder = importlib.resources.files(__package__).joinpath("page")
    return {
        each.name: each.read_bytes()
        for each in folder.iterdir()
        if each.is_file() and not each.name.endswith((".py", ".pyc"))
    }


def page_file(name: str) -> bytes | None:
    """A file of the page; None where there is none of that name."""
    return _page_files().get(name)


# -- Answering -----------------------------------------------------------------------------------------------------------


class _Answering:
    """Turns errors into answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if begun:
                raise
            await _answer(error)(scope, receive, send)


def _answer(error: Exception) -> Response:
    line = " ".join(str(error).split("\n")[:1]) or type(error).__name__
    match error:
        case Refusal():
            return PlainTextResponse(f"{line}\n", error.status, {"Retry-After": "2"} if error.status == 503 else None)
        case UsageError():
            return PlainTextResponse(f"{line}\n", 400)
        case BigmachineError() | Cancelled():
            return PlainTextResponse(f"{line}\n", 503)
    return PlainTextResponse(f"{type(error).__name__}: {line}\n", 500)


async def off_loop(act: Callable[[], T]) -> T:
    """What `act` returns, on a thread of its own: the loop is the server's, or the program's, and so is its pool of threads."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = act()
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            pass  # The loop has ended, and so has whoever waited.

    threading.Thread(target=run, name="bigmachine-answer", daemon=True).start()
    return await future


async def _departure(request: Request) -> None:
    """Until the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(value: Any, indent: int | None = None) -> Response:
    separators = None if indent else (",", ":")
    return Response(json.dumps(value, indent=indent, separators=separators, default=str), media_type="application/json")


def flag(request: Request, name: str) -> bool:
    """As Go has it: a number, and all but 0 is true. Raises `Refusal`."""
    value = request.query_params.get(name, "0")
    if value in ("true", "false"):
        return value == "true"
    return number(request, name, 0, None) != 0


def number(request: Request, name: str, default: int, most: int | None) -> int:
    """A query parameter that counts something. Raises `Refusal`."""
    value = request.query_params.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdigit() and len(value) < 19):
        raise Refusal(400, f"{name} must be a whole number, 0 or more: {value[:50]!r}")
    return int(value) if most is None else min(int(value), most)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(names[:10]) or "none") + more


async def _add_slash(request: Request) -> Response:
    """So that what is relative in a page leads to the same place under any prefix."""
    last = request.scope["path"].rsplit("/", 1)[-1]
    query = request.scope["query_string"].decode("latin-1")
    return RedirectResponse(f"{last}/" + (f"?{query}" if query else ""), 307)


async def _nothing_there(scope: Scope, receive: Receive, send: Send) -> None:
    root = scope.get("root_path", "")
    if scope["path"] != root:
        raise Refusal(404, f"there is nothing at {scope['path'][:100]}; the page is at {root}/")
    await (await _add_slash(Request(scope)))(scope, receive, send)


# -- Where it stands -----------------------------------------------------------------------------------------------------


def standing(debug: Debug) -> ASGIApp:
    """The driver's own server: the pages under `PREFIX`, and what is expected at the root."""

    async def root(request: Request) -> Response:
        return RedirectResponse(f"{PREFIX[1:]}/", 307)

    async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
        raise Refusal(404, f"there is nothing at {scope['path'][:100]}; the page is at {PREFIX}/")

    others = Router([Route("/", root), Route("/metrics", debug.metrics)], redirect_slashes=False, default=nothing)
    return _Under(debug.app, Reading(_Answering(others)), PREFIX)


def mount(session: Cluster, app: Any, prefix: str) -> Any:
    """See `Session.handle_debug`. Raises `UsageError` for a prefix that is none."""
    if not isinstance(prefix, str) or not prefix.startswith("/") or prefix.endswith("/") or set(prefix) & set("?#{} "):
        raise UsageError(f"not a prefix for the debug page: {prefix!r}; give a path such as {PREFIX!r}")
    debug = Debug(session)
    if callable(getattr(app, "mount", None)):
        app.mount(prefix, debug.app)
        return app
    if app is not None and not callable(app):
        raise UsageError(f"not an ASGI application: {app!r}")
    return _Under(debug.app, _nothing_else if app is None else app, prefix)


class _Under:
    """An ASGI application: what lies under `prefix` goes to `app`, all else to `others`, lifespan and websockets too."""

    def __init__(self, app: ASGIApp, others: Any, prefix: str) -> None:
        self._app = app
        self._others = others
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            root = scope.get("root_path", "")
            path = scope["path"].removeprefix(root) if root else scope["path"]
            if path == self._prefix or path.startswith(f"{self._prefix}/"):
                await self._app({**scope, "root_path": root + self._prefix}, receive, send)
                return
        await self._others(scope, receive, send)


async def _nothing_else(scope: Scope, receive: Receive, send: Send) -> None:
    """The other application, where there is none."""
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    if scope["type"] == "http":
        await PlainTextResponse("there is nothing here but the debug page\n", 404)(scope, receive, send)
        return
    await send({"type": "websocket.close", "code": 1003})
