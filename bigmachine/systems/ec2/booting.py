"""One machine: from its order to its end. What AWS and the agent say of it comes together here."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace

from ...info import Step, python_version
from ...system import Launched, Order
from ..remote import AgentUnreachable, RemoteHostError, Trust
from ..remote.client import AgentClient
from ..remote.deliver import Delivery
from .arrival import Found, agent_said, boot_steps, name, no_address, reach, unreachable
from .launching import Placed
from .settings import Settings
from .upkeep import Upkeep, say
from .watch import Seen, Watch

PENDING_WITHIN = 180.0
"""Seconds until an instance has an address: it takes 2 to 10; where AWS has to find a host for a large one, some more."""

AGENT_WITHIN = 240.0
"""Seconds from there until its agent answers: some 20 with the images of the table, more with what users add to their boot."""

ANSWER_WITHIN = 15.0
"""Seconds for an agent that has been connected to."""

NEWS = 3.0
"""Seconds that AWS is given to say that an instance has ended, when its agent has become unreachable."""

PATIENCE = 30.0
"""Seconds after which a user wants to know what a start waits for; and again after twice as many, and so on."""

UNWANTED = "the machine was ended while it started"

HERE = "ec2"
"""Stands for the instance's name in an error until that is known."""


@dataclass(frozen=True)
class Site:
    """What all machines of a launcher share."""

    settings: Settings
    trust: Trust
    watch: Watch
    upkeep: Upkeep


class Machine:
    """See the module. `launched` ends with the launch; `reason` is empty for as long as nothing has ended the machine."""

    def __init__(self, order: Order, delivery: Delivery, launch_id: str, site: Site) -> None:
        self.order = order
        self.launched: Future[Launched] = Future()
        self.placed: Placed | None = None
        self.placed_at = 0.0
        self.ended_at = 0.0
        self.reason = ""
        self._delivery = delivery
        self._launch_id = launch_id
        self._site = site
        self._lock = threading.Lock()
        self._stopping = False
        self._callbacks: list[Callable[[str], None]] = []
        self._console: str | None = None
        self._began = time.time()
        self._steps: list[Step] = []
        self._step, self._step_began = "api", self._began

    @property
    def wanted(self) -> bool:
        """Whether it is to go on."""
        return not self._stopping and not self.reason

    @property
    def doing(self) -> str:
        """What its start waits for; empty where that is over."""
        if self.launched.done():
            return ""
        placed = self.placed
        return "AWS to give an instance" if placed is None else f"{name(placed)}, at step {self._step!r}"

    # -- Birth -----------------------------------------------------------------------------------------------------------

    def assign(self, instance: Placed) -> bool:
        """It gets this instance. False where it needs none any more."""
        with self._lock:
            if not self.wanted:
                return False
            self.placed, self.placed_at = instance, time.time()
        self._site.watch.add(instance.id, lambda seen: self.end(seen.end))
        return True

    def refuse(self, error: BaseException) -> None:
        """It gets none."""
        self._delivery.lost()
        self.launched.set_exception(error)
        self.end(str(error))
        self._tell()

    def boot(self) -> None:
        """Wait for the agent of its instance, and make that the machine."""
        delivering = False
        try:
            seen, host = self._address()
            settings = self._site.settings
            client = AgentClient(host, settings.port, self._launch_id, self._site.trust.context)
            with contextlib.closing(client):
                self._await_agent(client)
                self._enter("upload")
                delivering = True
                launched = self._delivery.deliver(
                    self.order, client, host=host, maxprocs=settings.maxprocs, peer_host=seen.private
                )
            self._check()
        except BaseException as error:  # Whatever it is, it is this machine's failure alone.
            if not delivering:
                self._delivery.lost()
            self._failed(error)
        else:
            self.launched.set_result(launched)
            if self.reason:  # At the last moment.
                self._tell()

    def _enter(self, step: str) -> None:
        self._step, self._step_began = step, time.time()

    def _check(self) -> None:
        if not self.wanted:
            raise RemoteHostError(HERE, UNWANTED if self._stopping else self.reason)

    def _address(self) -> tuple[Seen, str]:
        """Where it is: as AWS describes it, and the address to connect to."""
        assert self.placed is not None
        self._enter("pending")
        public = self._site.settings.publicip
        watch = self._site.watch

        def enough(seen: Seen | None) -> bool:
            return not self.wanted or (seen is not None and bool(seen.public if public else seen.private))

        seen = watch.wait(self.placed.id, enough, PENDING_WITHIN)
        self._check()
        if seen is None or not enough(seen):
            raise RemoteHostError(HERE, no_address(seen, public, PENDING_WITHIN, str(watch.trouble or "")))
        if seen.zone and not self.placed.zone:
            self.placed = replace(self.placed, zone=seen.zone)
        return seen, seen.public if public else seen.private

    def _await_agent(self, client: AgentClient) -> None:
        """Returns when the agent answers."""
        self._enter("agent")
        deadline = time.monotonic() + AGENT_WITHIN
        while True:
            left = deadline - time.monotonic()
            found = reach(client.host, client.port, left, lambda: self.wanted)
            self._check()
            if found is not Found.OPEN:
                public = self._site.settings.publicip
                raise RemoteHostError(HERE, unreachable(found, client.host, client.port, public, AGENT_WITHIN))
            try:
                info = client.info(ANSWER_WITHIN, python_version())
            except AgentUnreachable:  # Somebody else may have had the address, a moment ago.
                if left <= 0:
                    raise
                time.sleep(0.2)
                continue
            self._steps = boot_steps(self._began, self.placed_at, time.time(), info.ages)
            return

    def _failed(self, error: BaseException) -> None:
        """It will not become a machine: say why, and end the instance."""
        assert self.placed is not None
        watch = self._site.watch
        if isinstance(error, AgentUnreachable) and self.wanted:
            watch.ask()
            watch.wait(self.placed.id, lambda _: not self.wanted, NEWS)
        if not self._stopping:
            self.console()  # Before the instance, and what it has said, is gone.
        if isinstance(error, RemoteHostError | AgentUnreachable):
            reason = self.reason or error.reason
            if reason.startswith("no Python"):
                reason += "; -bigm.ec2ami names an image that has it"
            if (said := agent_said(self._console or "")) and said not in reason:
                reason += f"; its agent said: {said}"
            error = RemoteHostError(name(self.placed), reason)
        if not self._steps:
            self._steps = self._until_now()
        self._site.upkeep.owe([self.placed.id])  # Before anybody knows: that may end the session, and the program.
        self.launched.set_exception(error)
        self.end(str(error))
        self._tell()
        if (instance := self.stop()) is not None:
            watch.remove([instance])
            self._site.upkeep.end([instance])

    def _until_now(self) -> list[Step]:
        """The steps up to one that has failed before the agent said how old things are."""
        now = time.time()
        steps = [Step("api", self._began, self.placed_at - self._began)]
        if self._step != "pending":
            steps.append(Step("pending", self.placed_at, self._step_began - self.placed_at))
        return [*steps, Step(self._step, self._step_began, now - self._step_began)]

    # -- Life and end ----------------------------------------------------------------------------------------------------

    def stop(self) -> str | None:
        """It is not wanted any more. Returns the instance that is to be ended for that, once."""
        with self._lock:
            if self._stopping:
                return None
            self._stopping = True
            instance = self.placed
        self.end("it was ended")
        return instance.id if instance is not None else None

    def end(self, reason: str) -> None:
        """It is gone, or will be."""
        with self._lock:
            if self.reason:
                return
            self.reason = reason
            self.ended_at = time.time()
        self._delivery.cancel(self.order.id)
        self._site.watch.wake()
        if self.launched.done():  # Else the launch fails of it, and can say more.
            self._tell()

    def on_end(self, callback: Callable[[str], None]) -> None:
        """See `system.Launcher`."""
        with self._lock:
            self._callbacks.append(callback)
        if self.reason and self.launched.done():
            self._tell()

    def _tell(self) -> None:
        with self._lock:
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self.reason)

    def console(self) -> str:
        """The tail of its instance's serial console; when it has failed, as it was then."""
        if self.placed is None:
            return ""
        if self._console is None:
            said = self._site.upkeep.console(self.placed.id)
            if self.launched.done():  # There may be more, the next time.
                return said
            self._console = said
        return self._console

    def timeline(self) -> list[Step]:
        """See `system.Launcher`."""
        return [*self._steps, *self._delivery.steps(self.order.id)]


def report(machines: Sequence[Machine], tell: Callable[[str], None] = say) -> None:
    """Tell what `machines` wait for, from time to time, until none does."""
    began, pause = time.monotonic(), PATIENCE
    while wait([each.launched for each in machines], pause).not_done:
        doing = [what for each in machines if (what := each.doing)]
        if doing:
            more = f", and {len(doing) - 1} more" if len(doing) > 1 else ""
            after = f"after {time.monotonic() - began:.0f} s"
            tell(f"{after}, {len(doing)} of {len(machines)} not started yet: waiting for {doing[0]}{more}")
        pause *= 2
