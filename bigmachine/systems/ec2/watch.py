"""What AWS says about our instances: one thread asks for all of them, in as few calls as can be.

Rule 1. Every `EVERY` seconds; every `PENDING` while somebody waits for a change, or when somebody has asked.
Rule 2. Instances are asked for by a filter: one that AWS does not know yet is only absent from the answer then, where a list of
ids would make the whole call fail. For `NEW` seconds after its launch an absence says nothing; later it is an end (AWS shows
those that are terminated for an hour).
Rule 3. That AWS cannot be asked says nothing about an instance.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .api import Ec2Error

EVERY = 10.0
PENDING = 1.0
"""Seconds between two looks; and at least between any two."""

NEW = 60.0
"""Seconds after its launch in which an instance may not be known everywhere in AWS."""

AT_ONCE = 200
"""Instances of one call: AWS takes that many values of a filter."""

RUNNING = "running"
PENDING_STATE = "pending"
"""The states of an instance that lives; the others are ``shutting-down``, ``terminated``, ``stopping``, ``stopped``."""


@dataclass(frozen=True)
class Seen:
    """An instance, as AWS last described it. `reason` says why it is in its state, where AWS knows; addresses are
    empty where there are none."""

    id: str
    state: str
    reason: str = ""
    public: str = ""
    private: str = ""
    zone: str = ""

    @property
    def alive(self) -> bool:
        """Whether it may do anything yet."""
        return self.state in (RUNNING, PENDING_STATE)

    @property
    def end(self) -> str:
        """For people, when it is not."""
        reason = f": {self.reason}" if self.reason else ""
        return f"its instance {self.id} is {self.state}{reason}"


class Pages(Protocol):
    """The part of `api.Api` that is used here."""

    def pages(self, service: str, operation: str, key: str, **parameters: Any) -> Iterator[Any]: ...


def describe(api: Pages, ids: Sequence[str]) -> dict[str, Seen]:
    """Those of `ids` that AWS knows. Raises `Ec2Error`."""
    found: dict[str, Seen] = {}
    for start in range(0, len(ids), AT_ONCE):
        filters = [{"Name": "instance-id", "Values": list(ids[start : start + AT_ONCE])}]
        for reservation in api.pages("ec2", "DescribeInstances", "Reservations", Filters=filters):
            for entry in reservation.get("Instances", ()):
                seen = parse(entry)
                found[seen.id] = seen
    return found


def parse(entry: Mapping[str, Any]) -> Seen:
    """From DescribeInstances."""
    told = entry.get("StateReason") or {}
    code, message = told.get("Code", ""), told.get("Message", "")
    reason = message if code in message else f"{code}: {message}".strip(": ")
    return Seen(
        id=entry["InstanceId"],
        state=entry["State"]["Name"],
        reason=reason or entry.get("StateTransitionReason", ""),
        public=entry.get("PublicIpAddress") or "",
        private=entry.get("PrivateIpAddress") or "",
        zone=entry.get("Placement", {}).get("AvailabilityZone", ""),
    )


def pause(waiting: bool, asked: bool, since: float) -> float:
    """Seconds until the next look, `since` seconds after the last. Pure."""
    return max(0.0, (PENDING if waiting or asked else EVERY) - since)


def judge(watched: Mapping[str, float], found: Mapping[str, Seen], now: float) -> dict[str, Seen]:
    """What is known of the `watched` (id → when it was launched) after a look that `found` those. Pure."""
    news: dict[str, Seen] = {}
    for id, launched in watched.items():
        if id in found:
            news[id] = found[id]
        elif now - launched > NEW:
            news[id] = Seen(id, "terminated", "AWS does not know it any more")
    return news


class Watch:
    """See the module. `look` describes instances: `describe`, with an API."""

    def __init__(
        self, look: Callable[[Sequence[str]], Mapping[str, Seen]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._look = look
        self._clock = clock
        self._changed = threading.Condition()
        self._watched: dict[str, float] = {}
        self._seen: dict[str, Seen] = {}
        self._ends: dict[str, Callable[[Seen], None]] = {}
        self._waiting = 0
        self._asked = False
        self._last = -EVERY
        self._closed = False
        self._thread: threading.Thread | None = None
        self.trouble: Ec2Error | None = None
        """Why AWS could not be asked, the last time."""

    def add(self, id: str, on_end: Callable[[Seen], None]) -> None:
        """Watch an instance that has just been launched; `on_end` is called once, when it is not alive any more."""
        with self._changed:
            self._watched[id] = self._clock()
            self._ends[id] = on_end
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="bigmachine-ec2-watch", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def remove(self, ids: Iterable[str]) -> None:
        """These are of no interest any more."""
        with self._changed:
            for id in ids:
                self._watched.pop(id, None)
                self._ends.pop(id, None)
            self._changed.notify_all()

    def seen(self, id: str) -> Seen | None:
        """As it was last described."""
        with self._changed:
            return self._seen.get(id)

    def ask(self) -> None:
        """Look soon."""
        with self._changed:
            self._asked = True
            self._changed.notify_all()

    def wait(self, id: str, enough: Callable[[Seen | None], bool], timeout: float) -> Seen | None:
        """Until `enough` is true of what is known of the instance, or for `timeout` seconds; returns what is known then."""
        deadline = self._clock() + timeout
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
            try:
                while not enough(self._seen.get(id)) and not self._closed and (left := deadline - self._clock()) > 0:
                    self._changed.wait(left)
                return self._seen.get(id)
            finally:
                self._waiting -= 1

    def wake(self) -> None:
        """Let those who wait look again whether they have to."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """Look no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while (ids := self._next()) is not None:
            try:
                found = self._look(ids)
                self.trouble = None
            except Ec2Error as error:
                found, self.trouble = {}, error
            self._learn(ids, found)

    def _next(self) -> list[str] | None:
        """Whom to ask for, when it is time to; None at the end."""
        with self._changed:
            while not self._closed:
                since = self._clock() - self._last
                left = pause(self._waiting > 0, self._asked, since) if self._watched else None
                if left == 0:
                    self._asked = False
                    self._last = self._clock()
                    return list(self._watched)
                self._changed.wait(left)
            return None

    def _learn(self, asked: Sequence[str], found: Mapping[str, Seen]) -> None:
        ended: list[tuple[Callable[[Seen], None], Seen]] = []
        with self._changed:
            # Those that were asked for, as of then: the answer, which may have taken a minute, is silent about younger ones.
            known = asked if self.trouble is None else ()
            watched = {id: self._watched[id] for id in known if id in self._watched}
            for id, seen in judge(watched, found, self._last).items():
                self._seen[id] = seen
                if not seen.alive:
                    self._watched.pop(id, None)
                    if (callback := self._ends.pop(id, None)) is not None:
                        ended.append((callback, seen))
            self._changed.notify_all()
        for callback, seen in ended:
            callback(seen)
