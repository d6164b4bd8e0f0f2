"""What a driver's session has so that somebody can look into it: the debug server, a file of events, a report of a failure.

Machines run without any of it. `look_inside` puts it together, in this order; the session ends it in the opposite one:

1. events go to a file (``-bigm.events``), and what has begun is the first of them;
2. what a machine's supervisor says of its memory is acted upon (`unhealthy`);
3. a report is written when the program fails (``-bigm.bundle``);
4. the debug server listens (``-bigm.http``).
"""

from __future__ import annotations

from pathlib import Path

from ..info import VERSION, python_version
from ..settings import DEFAULT
from . import bundle, eventfile, server, unhealthy
from .cluster import Cluster
from .settings import OFF, Settings

TEST = "test"
"""The system of unit tests, whose sessions last for milliseconds: a server for each would only be noise."""


def look_inside(session: Cluster, settings: Settings) -> None:
    """Begin, as `settings` say. Raises `UsageError` where one of them cannot be, before anything runs."""
    fleet, logs = session.fleet, session.logs
    session.at_end(logs.close)
    if settings.events:
        session.at_end(eventfile.begin(session, settings.events))
    program = fleet.program
    session.events.emit(
        "session.started",
        session=session.name,
        system=session.system,
        program=program.name,
        digest=program.digest or "",
        version=VERSION,
        python=python_version(),
    )
    places = [Path(each) for each in (settings.logdir, settings.bundle) if each]
    session.at_end(unhealthy.watch(session, places[0] if places else None))
    if settings.bundle:
        reports = bundle.Reports(session, Path(settings.bundle))
        session.at_failure(reports.at_failure)
    http = OFF if session.system == TEST and settings.origin("http") == DEFAULT else settings.http
    serving = server.start(session, http)
    if serving is not None:
        session.at_end(serving.close)
