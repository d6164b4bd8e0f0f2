"""What is done to instances while they live, and to end them: for many in one call, and in spite of what AWS knows late."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ...errors import BigmachineError
from . import naming
from .api import Ec2Error
from .batches import Batch
from .network import pairs

AT_ONCE = 500
"""Instances of one call that changes them; AWS takes 1000."""

PAUSES = (1.0, 2.0, 5.0)
"""Seconds between tries to end an instance that AWS does not know yet: it was launched a moment ago."""

TAIL = 30
"""Lines of an instance's console that are shown."""

WELL = re.compile(r"^\s*(\S*\[\S*  OK  |Start(ing|ed) )")
"""The lines of systemd's on a console that say nothing to somebody who looks for a failure: most of them."""


class Calls(Protocol):
    """The part of `api.Api` that is used here."""

    def call(self, service: str, operation: str, **parameters: Any) -> dict[str, Any]: ...


class Upkeep:
    """See the module. `api` gives the API; `close` ends what goes on in the background. `end` may still be called then."""

    def __init__(self, api: Callable[[], Calls]) -> None:
        self._api = api
        self._terminations = Batch(self._terminate)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._owed: set[str] = set()  # What was to be terminated, and is not yet.
        self._renewing: threading.Thread | None = None

    def owe(self, ids: Sequence[str]) -> None:
        """These are to be terminated, at the latest by `close`: whoever is about to do so may be a thread that dies before."""
        with self._lock:
            self._owed.update(ids)

    def end(self, ids: Sequence[str]) -> None:
        """Terminate instances; returns when AWS has accepted it. Where it does not, that is said: they end by themselves."""
        self.owe(ids)
        try:
            self._terminations.add(ids)
            with self._lock:
                self._owed.difference_update(ids)
        except BigmachineError as error:
            say(f"could not be terminated: {', '.join(ids)}: {error}; they end by themselves when nobody renews their leases")

    def _terminate(self, ids: Sequence[str]) -> None:
        for start in range(0, len(ids), AT_ONCE):
            some = list(ids[start : start + AT_ONCE])
            try:
                self._api().call("ec2", "TerminateInstances", InstanceIds=some)
            except Ec2Error as error:
                if error.code != "InvalidInstanceID.NotFound":
                    raise
                failures = []
                for id in some:  # One that AWS does not know, or not yet, must not keep the others.
                    try:
                        self._terminate_one(id)
                    except Ec2Error as failure:
                        failures.append(failure)
                if failures:
                    raise failures[0] from None

    def _terminate_one(self, id: str) -> None:
        for pause in (*PAUSES, None):
            try:
                self._api().call("ec2", "TerminateInstances", InstanceIds=[id])
                return
            except Ec2Error as error:
                if error.code != "InvalidInstanceID.NotFound":
                    raise
            if pause is not None:
                time.sleep(pause)

    def console(self, id: str) -> str:
        """The tail of what an instance has said on its serial console; empty where nobody knows."""
        try:
            answer = self._api().call("ec2", "GetConsoleOutput", InstanceId=id, Latest=True)
        except Ec2Error:
            try:  # Of older types there is only what was kept some minutes ago.
                answer = self._api().call("ec2", "GetConsoleOutput", InstanceId=id)
            except Ec2Error:
                return ""
        lines = [line.rstrip() for line in str(answer.get("Output", "")).splitlines()]
        return "\n".join([line for line in lines if line and not WELL.search(line)][-TAIL:])

    def renew(self, wanted: Callable[[], Sequence[str]]) -> None:
        """Let the tags of the `wanted` instances say, from now on and until `close`, that they are wanted. Idempotent."""
        with self._lock:
            if self._renewing is None:
                name = "bigmachine-ec2-renew"
                self._renewing = threading.Thread(target=self._renew, args=(wanted,), name=name, daemon=True)
                self._renewing.start()

    def _renew(self, wanted: Callable[[], Sequence[str]]) -> None:
        said = False
        while not self._closed.wait(naming.RENEW):
            ids = wanted()
            expires = pairs({naming.EXPIRES: naming.stamp(time.time() + naming.LIFE)})
            for start in range(0, len(ids), AT_ONCE):
                try:
                    self._api().call("ec2", "CreateTags", Resources=list(ids[start : start + AT_ONCE]), Tags=expires)
                except Ec2Error as error:
                    if not said:
                        say(f"{error}; `bigmachine gc` may take instances of this session for abandoned: {ids[0]}, …")
                    said = True

    def close(self) -> None:
        """Renew no more; and what could not be terminated (there was no network, or the user's Ctrl-C), try again."""
        self._closed.set()
        with self._lock:
            owed = sorted(self._owed)
        if owed:
            self.end(owed)


def say(text: str) -> None:
    """A line for the user."""
    try:
        sys.stderr.write(f"bigmachine: ec2: {text}\n")
    except (OSError, ValueError):
        pass  # Nobody reads it.
