"""Who may ask: a page of any site in the user's own browser can send requests to this host, too.

- Another site's page cannot read answers of ours, but for DNS rebinding: its own name is made to lead here, and so the browser
  takes us for that site. Such requests say its name in ``Host``, and are refused (`Host`).
- What another site's page loads from us without reading it (an image, a script) costs time only; browsers say so in
  ``Sec-Fetch-Site``, and it is refused. A link that the user follows to the page itself is not.
- Nothing here changes anything: only GET and HEAD are answered.
- What comes from machines (lines of logs, names) is no script: ``Content-Security-Policy`` lets only ours run.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..info import VERSION
from .settings import ANY

METHODS = ("GET", "HEAD")

HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Bigmachine": VERSION,  # By which the command line knows a driver.
}

UNCACHED = "no-store"
"""`Cache-Control` of what does not say otherwise: the figures of a moment."""


class Host:
    """Refuses requests to names that are not this server's. `host` is what it was told to bind to; where that means all
    addresses, it has the name of this host, and any address."""

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._any_address = host in ANY
        own = socket.gethostname() if self._any_address else host
        self._names = {"localhost", "127.0.0.1", "::1", own.lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            names = Headers(scope=scope).getlist("host")
            if len(names) != 1 or not self.is_ours(names[0]):
                shown = ", ".join(names)[:100] or "none"
                text = f"misdirected: this is not the host {shown}; the page is at localhost, or where it is bound to\n"
                await PlainTextResponse(text, 421, dict(HEADERS))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def is_ours(self, named: str) -> bool:
        """`named` is the value of the header, with or without a port."""
        name, colon, port = named.rpartition(":")
        if not colon or named.endswith("]"):
            name, port = named, "0"
        if not (port.isascii() and port.isdigit()):
            return False
        name = name.lower().removesuffix(".")
        if name.startswith("[") and name.endswith("]"):
            name = name[1:-1]
        elif ":" in name:
            return False
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._any_address


class Reading:
    """Lets those requests through that only read, and come from no other site; the answers get `HEADERS`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003, "reason": "there is no such thing here"})
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", UNCACHED)
            await send(message)

        refusal = _refusal(scope)
        await (refusal or self._app)(scope, receive, with_headers)


def _refusal(scope: Scope) -> PlainTextResponse | None:
    if scope["method"] not in METHODS:
        text = f"method {scope['method'][:20]} is not allowed: everything here is read with GET\n"
        return PlainTextResponse(text, 405, {"Allow": ", ".join(METHODS)})
    headers = Headers(scope=scope)
    followed = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    if headers.get("sec-fetch-site") == "cross-site" and not (followed and scope["path"].endswith("/")):
        return PlainTextResponse("refused: another site's page has asked for it; open the address itself\n", 403)
    return None
