"""What can be set for looking into a session. `bigmachine.settings` tells where; each is a flag of `driver.FLAGS`, too."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import Section, setting

SECTION = "session"

HTTP = "localhost:3333"

OFF = "off"

ANY = ("", "0.0.0.0", "::")
"""Hosts to bind to that mean all addresses: then the page has the name of this host."""

PREFIX = "/debug/bigmachine"
"""Where the page is, on the driver's own server."""


@dataclass(frozen=True, kw_only=True)
class Settings(Section):
    """See `inside.looking` for what each does; empty texts stand for "no"."""

    http: str = setting(HTTP, flag="http")
    logdir: str = setting("", such="logs", flag="logdir", path=True)
    events: str = setting("", such="events.jsonl", flag="events", path=True)
    bundle: str = setting("", such="reports", flag="bundle", path=True)
