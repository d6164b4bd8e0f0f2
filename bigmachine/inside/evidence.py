"""What is in a report (`bundle`).

=========================  ============================================================================================
``README.txt``             what is what; why it was written; which machines have stopped, and who has not answered
``error.txt``              the exception by which the program has ended, with its traceback, where it has
``status.txt`` ``.json``   machines, calls by method: what the page shows
``boot.txt``               the steps of each machine's boot
``logs/ID.log``            what each machine has said, its end where that is long; ``driver.log``: bigmachine's own lines
``events.jsonl``           what has happened
``vars.json``              the variables of all processes; ``metrics.txt``: the same for Prometheus
``profiles/``              ``threads.txt``, ``threads.pb.gz``: what every thread does; ``heap.pb.gz``: objects by type
``captures/``              what was saved of machines when their memory ran short (`unhealthy`)
``versions.json``          the program's name and digest; versions of bigmachine, Python, platform, dependencies; machines
=========================  ============================================================================================

What has to be asked is asked of all machines at the same time.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from ..info import VERSION, Info, platform_name
from ..logs import Line
from ..machine import Machine
from ..rpc.calls import Call
from ..state import State
from . import eventfile, monitor, text, variables
from .cluster import Cluster
from .profiles import take
from .redact import Redaction, secrets
from .unhealthy import HEAP

WITHIN = 15.0
"""Seconds for all that has to be asked: somebody waits for the program to end."""

ANSWER = 10.0
"""Seconds of these that a process has for an answer: what has been heard is still to be put together."""

LOG = 4 << 20
"""Bytes of a machine's log at most: its end, as the beginning of what went wrong is seldom farther away."""

LOGS = 32 << 20
"""Bytes of all of them: they are looked through for secrets, at some 10 MB/s."""

CAPTURES = 32 << 20
"""Bytes of what was saved of unhealthy machines; it takes 100 KB each."""

Members = dict[str, str | bytes]
"""By name; texts have no secrets any more."""


@dataclass
class Evidence:
    """`members` of the report, and who or what is `missing` in it, with the reason."""

    members: Members = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def gather(session: Cluster, why: str = "") -> Evidence:
    """All there is to know about `session`, within `WITHIN` seconds."""
    redaction = Redaction(secrets({**os.environ, **session.fleet.environ}, sys.argv[1:]))
    asked = [
        _Asked("status", lambda gone: _status(session)),
        _Asked("variables", lambda gone: _variables(session)),
        _Asked("threads", lambda gone: _threads(session, redaction, gone)),
        _Asked("heap", lambda gone: _heap(session, redaction, gone)),
        _Asked("versions", lambda gone: _versions(session)),
    ]
    deadline = time.monotonic() + WITHIN
    found = Evidence()
    if session.failed is not None:
        found.members["error.txt"] = "".join(traceback.format_exception(session.failed))
    for each in asked:
        each.into(found, deadline)
    # Only now: what machines have said last may still have been on its way.
    found.members["boot.txt"] = "\n".join(map(_boot, session.machines()))
    found.members["events.jsonl"] = "".join(
        eventfile.as_line(event, session.name) + "\n" for event in session.events.since(0, sys.maxsize)
    )
    found.members.update(_logs(session))
    found.members.update(_captures(session))
    found.missing += [
        f"{machine.addr}: {machine.state}, and could not be asked"
        for machine in session.machines()
        if machine.state is not State.RUNNING
    ]
    found.members = {name: _without_secrets(redaction, name, data) for name, data in found.members.items()}
    found.members = {"README.txt": redaction.text(_readme(session, why, found)), **found.members}
    return found


def pack(evidence: Evidence, file: BinaryIO) -> list[str]:
    """Write the zip. Returns the names of what is in it. Raises OSError."""
    now = time.localtime()[:6]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in evidence.members.items():
            entry = zipfile.ZipInfo(name, now)
            entry.compress_type = zipfile.ZIP_STORED if name.endswith(".gz") else zipfile.ZIP_DEFLATED
            entry.external_attr = 0o600 << 16
            archive.writestr(entry, data)
    return list(evidence.members)


class _Asked:
    """A question to all machines, on a thread of its own; `act` is given what tells it that nobody waits any more."""

    def __init__(self, what: str, act: Callable[[threading.Event], Evidence]) -> None:
        self._what = what
        self._act = act
        self._gone = threading.Event()
        self._found = Evidence(missing=[f"{what}: no answer within {WITHIN:g} s"])
        self._thread = threading.Thread(target=self._run, name=f"bigmachine-report-{what}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # From Python 3.12 on, where the interpreter ends.
            self._run()

    def _run(self) -> None:
        try:
            self._found = self._act(self._gone)
        except Exception as error:  # One thing that cannot be had is no reason to do without the others.
            self._found = Evidence(missing=[f"{self._what}: {error}".splitlines()[0]])

    def into(self, evidence: Evidence, deadline: float) -> None:
        """Add what was found, by `deadline`."""
        if self._thread.ident is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        self._gone.set()
        found = self._found
        evidence.members.update(found.members)
        evidence.missing += found.missing


# -- What has to be asked ------------------------------------------------------------------------------------------------


def _status(session: Cluster) -> Evidence:
    document = monitor.of(session).snapshot(fresh=True).value
    return Evidence({"status.txt": text.status(document), "status.json": _json(document)})


def _variables(session: Cluster) -> Evidence:
    collected = variables.collect(session, ANSWER)
    missing = [f"variables of {' '.join(who)}: {reason}" for who, reason in collected.missing.items()]
    members: Members = {
        "vars.json": _json(variables.as_json(collected)),
        "metrics.txt": variables.as_prometheus(collected),
    }
    return Evidence(members, missing)


def _threads(session: Cluster, redaction: Redaction, gone: threading.Event) -> Evidence:
    taken = take(session, "threads", gone=gone, slack=ANSWER)
    taken = type(taken)(redaction.profile(taken.profile), taken.processes, taken.missing)
    missing = [f"threads of {' '.join(who)}: {reason}" for who, reason in taken.missing.items()]
    return Evidence({"profiles/threads.txt": taken.text(), "profiles/threads.pb.gz": taken.pprof()}, missing)


def _heap(session: Cluster, redaction: Redaction, gone: threading.Event) -> Evidence:
    taken = take(session, HEAP, gone=gone, slack=ANSWER)
    taken = type(taken)(redaction.profile(taken.profile), taken.processes, taken.missing)
    missing = [f"heap of {' '.join(who)}: {reason}" for who, reason in taken.missing.items()]
    return Evidence({"profiles/heap.pb.gz": taken.pprof()}, missing)


def _versions(session: Cluster) -> Evidence:
    asked: dict[str, Call[Info]] = {}
    for machine in session.machines():
        if machine.state is State.RUNNING:
            asked[machine.id] = machine.submit("Supervisor.info", timeout=ANSWER)
    found = Evidence()
    machines: dict[str, Any] = {}
    for id, call in asked.items():
        try:
            info = call.result(ANSWER)
        except Exception as error:  # As above.
            found.missing.append(f"versions of {id}: {error}".splitlines()[0])
        else:
            machines[id] = {
                name: getattr(info, name) for name in ("version", "python", "platform", "digest", "maxprocs")
            }
    program = session.fleet.program
    document = {
        "bigmachine": VERSION,
        "python": sys.version,
        "platform": f"{platform_name()} {os.uname().release}",
        "system": session.system,
        "session": session.name,
        "program": {"name": program.name, "digest": program.digest or ""},
        "dependencies": dict(sorted(_distributions())),
        "machines": machines,
    }
    found.members["versions.json"] = _json(document)
    return found


def _distributions() -> Iterator[tuple[str, str]]:
    for each in metadata.distributions():
        name, version = each.metadata["Name"], each.metadata["Version"]
        if name:  # A directory that is left of one that was removed has none.
            yield name, version or ""


# -- What is here --------------------------------------------------------------------------------------------------------


def _boot(machine: Machine) -> str:
    lines = [f"{machine.addr}: {machine.state}"]
    lines += [f"  {_stamp(when)} {state}" for state, when in machine.entered.items()]
    lines += [f"  {_stamp(step.began)} step {step.name}: {step.seconds:.3f} s" for step in machine.timeline]
    if machine.step:
        lines.append(f"  step {machine.step} is under way")
    if machine.error is not None:
        lines += [f"  {line}" for line in str(machine.error).splitlines()]
    return "\n".join(lines) + "\n"


def _logs(session: Cluster) -> Members:
    """Of each machine the end of its file, where there is one, else the lines that are kept."""
    found: Members = {}
    ids = ["", *(machine.id for machine in session.machines() if machine.owned)]
    most = min(LOG, LOGS // len(ids))
    folder = session.logs.directory
    for id in ids:
        name = f"{id or 'driver'}.log"
        said = _end(folder / name, most) if folder is not None else ""
        if not said:
            said = "".join(map(_log_line, session.logs.last(sys.maxsize, id)))[-most:]
        found[f"logs/{name}"] = said
    return found


def _log_line(line: Line) -> str:
    return f"{_stamp(line.time)} {line.process} {line.stream} {line.text}\n"


def _end(file: Path, most: int) -> str:
    """The last `most` bytes of `file`, from the beginning of a line on; nothing where it cannot be read."""
    try:
        with file.open("rb") as opened:
            left_out = max(0, opened.seek(0, os.SEEK_END) - most)
            opened.seek(left_out)
            if left_out:
                opened.readline()
            said = opened.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return f"… {left_out} bytes before\n{said}" if left_out else said


def _captures(session: Cluster) -> Members:
    """The newest first, as long as there is room."""
    found: Members = {}
    left = CAPTURES
    for capture in reversed(session.captures):
        for name in capture["files"]:
            file = Path(name)
            try:
                left -= file.stat().st_size
                if left >= 0:
                    data = file.read_bytes()
                    found[f"captures/{file.parent.name}/{file.name}"] = (
                        data if file.suffix == ".gz" else data.decode("utf-8", "replace")
                    )
            except OSError:
                continue  # The user has removed it.
    return found


def _readme(session: Cluster, why: str, evidence: Evidence) -> str:
    program = session.fleet.program.name or "a program"
    head = f"A report of {program} on bigmachine: session {session.name}, system {session.system}.\n"
    when = f"Written at {_stamp(time.time())}{f', as {why}' if why else ''}.\n"
    rows = [line for line in (__doc__ or "").splitlines() if line.startswith("``")]
    missing = "".join(f"  {each}\n" for each in evidence.missing) or "  nothing\n"
    what = "\n".join(line.replace("``", "") for line in rows)
    secret = (
        "What looked like a secret is [redacted]. Look through it nevertheless before you give it to somebody else."
    )
    return f"{head}{when}\n{what}\n\n{secret}\nProfiles: go tool pprof -http=: FILE\n\nMissing:\n{missing}"


def _without_secrets(redaction: Redaction, name: str, data: str | bytes) -> str | bytes:
    if isinstance(data, bytes):
        return data  # Profiles, whose texts were looked through before.
    if name.endswith(".json"):
        return _json(redaction.value(json.loads(data)))
    if name.endswith(".jsonl"):
        lines = (json.dumps(redaction.value(json.loads(line))) for line in data.splitlines())
        return "".join(f"{line}\n" for line in lines)
    return redaction.text(data)


def _json(document: Mapping[str, Any] | Any) -> str:
    return json.dumps(document, indent=1, default=str) + "\n"


def _stamp(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when)) + f".{int(when % 1 * 1000):03}Z"
