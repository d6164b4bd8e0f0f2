"""The system ``ec2``: machines are instances in AWS, one each.

    python program.py -bigm.system=ec2 -bigm.ec2type=m7i.large -nmach 5

What can be set, and where: `settings`; ``bigmachine doctor ec2`` says whether it will work, and costs nothing. Nothing has to
be prepared in the account, and there is no image of ours: instances run a public one whose Python is the driver's, and are
told at their first boot (`userdata`) to run our agent, which receives the program and becomes the machine.

Nothing stays that costs money. An instance's root disk goes with it; an instance ends with its machine, and that with the
session. A driver that is killed, or cut off, is missed: then machines end when their leases lapse, and an instance that is
powered off is terminated. Whatever that does not catch is found by its tags: `bigmachine ps`, `bigmachine gc`.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError
from ...info import Step, python_version
from ...pack.archive import read_contents
from ...settings import load
from ...system import Launched, Order
from ..remote import RemoteHostError, Trust
from ..remote.deliver import Delivery
from ..remote.source import agent_text
from . import naming
from .api import Api, Ec2Error
from .booting import HERE, UNWANTED, Machine, Site, report
from .images import Image, find_image
from .instances import ALIVE, ours
from .launching import Attempt, Placed, Wanted, attempts, data_space, launch, markets, place, volumes
from .network import Network, find_network
from .prices import Prices, session_cost
from .settings import SECTION, Settings
from .types import InstanceType, architecture, instance_types
from .upkeep import Upkeep, say
from .userdata import AGENT_SETTINGS, UserData, user_data
from .watch import Watch, describe

IDLE = 600.0
"""Seconds after which an agent ends itself, and its instance, that no driver talks to."""

CLOSE_WITHIN = 30.0
"""Seconds for launches that are under way when all is to end. What comes later ends when nobody contacts its agent."""

QUIET = 3.0
"""Seconds after which whoever waits for that is told."""

UNANSWERED = {
    "ReadTimeoutError",
    "ConnectionClosedError",
    "HTTPClientError",
    "ResponseParserError",
    "ResponseStreamingError",
    "InternalError",
    "Server.InternalError",
    "ServiceUnavailable",
    "Unavailable",
}
"""Errors of a launch after which nobody knows whether it was made."""


@dataclass(frozen=True)
class Prepared:
    """What is looked up once for all launches."""

    types: Sequence[InstanceType]
    image: Image
    network: Network
    owner: str


class Ec2Launcher:
    """The options are `settings.Settings`, under their flags' names; see there."""

    name = "ec2"

    def __init__(
        self,
        ec2type: str | Sequence[str] | None = None,
        ec2ondemand: bool | None = None,
        ec2spotonly: bool | None = None,
        ec2maxprice: str | float | None = None,
        ec2region: str | None = None,
        ec2profile: str | None = None,
        ec2ami: str | None = None,
        ec2user: str | None = None,
        ec2diskspace: int | None = None,
        ec2dataspace: int | None = None,
        ec2subnets: str | Sequence[str] | None = None,
        ec2securitygroups: str | Sequence[str] | None = None,
        ec2publicip: bool | None = None,
        ec2instanceprofile: str | None = None,
        ec2keypair: str | None = None,
        ec2tags: str | Mapping[str, str] | None = None,
        ec2cloudconfig: str | Sequence[str] | None = None,
        ec2units: str | Sequence[str] | None = None,
        port: int | None = None,
        maxprocs: int | None = None,
    ) -> None:
        given = {option: value for option, value in locals().items() if option != "self"}
        self.settings = load(Settings, SECTION, given)
        self._extra = [_read(path) for path in self.settings.cloudconfig], [_read(path) for path in self.settings.units]
        self._api = Api(self.settings)
        self._prices = Prices(self._api)
        self._trust = Trust()
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._placing = 0
        self._closed = False
        self._lost_session = ""  # The session's name, once the answer to a launch was lost.
        self._machines: dict[str, Machine] = {}
        self._types: list[InstanceType] | None = None
        self._ready: Future[Prepared] | None = None
        self._watch = Watch(lambda ids: describe(self._api, ids))
        self._upkeep = Upkeep(lambda: self._api)
        self.sent = 0
        """Bytes of programs that have left the driver."""

    # -- Launcher: before machines ---------------------------------------------------------------------------------------

    @property
    def ships(self) -> tuple[str, ...]:
        """See `system.Launcher`. Raises `UsageError`, `Ec2Error`: the architecture is that of the types, which AWS knows."""
        return (f"linux/{architecture(self._instance_types())}",)

    def _instance_types(self) -> list[InstanceType]:
        if self._types is None:
            self._types = instance_types(self._api, self.settings.types)
        return self._types

    def prepare(self) -> None:
        """See `system.Launcher`: look up what every launch needs."""
        with self._lock:
            failed = self._ready is not None and self._ready.done() and self._ready.exception() is not None
            if self._ready is not None and not failed:
                return
            ready: Future[Prepared] = Future()
            self._ready = ready

        def run() -> None:
            try:
                ready.set_result(self._look_up())
            except BaseException as error:  # Raised again to whoever launches.
                ready.set_exception(error)

        threading.Thread(target=run, name="bigmachine-ec2-prepare", daemon=True).start()

    def _look_up(self) -> Prepared:
        types = self._instance_types()
        image = find_image(self._api, self.settings, python_version(), architecture(types))
        owner = naming.owner(self._api)
        tags = {**self.settings.tags, naming.OWNER: owner}
        return Prepared(types, image, find_network(self._api, self.settings, tags), owner)

    # -- Launcher: launching ---------------------------------------------------------------------------------------------

    def launch(self, orders: Sequence[Order]) -> list[Future[Launched]]:
        """See `system.Launcher`."""
        file = orders[0].program.file
        if file is None:
            raise UsageError("machines of this system need the program as a packed file: see `bigmachine pack`")
        launch_id = f"l-{secrets.token_hex(4)}"
        delivery = Delivery(file, len(orders), platforms=self.ships)
        site = Site(self.settings, self._trust, self._watch, self._upkeep)
        machines = [Machine(order, delivery, launch_id, site) for order in orders]
        with self._lock:
            if self._closed:  # The session ended while this was on its way here: nobody would stop them.
                raise RemoteHostError(HERE, UNWANTED)
            self._machines.update((machine.order.id, machine) for machine in machines)
            self._placing += 1
        self.prepare()
        arguments = machines, delivery, launch_id, file
        threading.Thread(target=self._place, args=arguments, name="bigmachine-ec2-launch", daemon=True).start()
        threading.Thread(target=report, args=(machines,), name="bigmachine-ec2-report", daemon=True).start()
        return [machine.launched for machine in machines]

    def _place(self, machines: Sequence[Machine], delivery: Delivery, launch_id: str, file: Path) -> None:
        """Get an instance for each of `machines`, and boot each on a thread of its own."""
        threads: list[threading.Thread] = []
        waiting = list(machines)

        def got(placed: Sequence[Placed]) -> None:
            threads.extend(self._assign(placed, waiting))

        def attempt(what: Attempt, missing: int) -> tuple[Sequence[Placed], Sequence[Ec2Error]]:
            count = sum(machine.wanted for machine in waiting)
            if not count:  # All that are left were ended meanwhile.
                raise RemoteHostError(HERE, UNWANTED)
            try:
                return launch(self._api, wanted, what, min(count, missing))
            except Ec2Error as error:
                if error.code in UNANSWERED:
                    self._lost_session = machines[0].order.credentials.identity.session
                raise

        try:
            assert self._ready is not None
            prepared = self._ready.result()
            wanted = self._wanted(machines[0].order, launch_id, file, prepared)
            planned = attempts(markets(self.settings, prepared.types), prepared.types, prepared.network.subnets)
            refused = place(len(machines), planned, attempt, got)
            if refused:
                say(f"{refused[0].attempt}: {refused[0].message.rstrip('. ')} ({refused[0].code}); went on to others")
            raise RemoteHostError(HERE, UNWANTED)  # For those that were ended before there was one for them.
        except BaseException as error:  # Whatever it is, it is the reason why these have no instance.
            for machine in waiting:
                machine.refuse(error)
        finally:
            with self._changed:
                self._placing -= 1
                self._changed.notify_all()
        for thread in threads:
            thread.join()
        with self._lock:
            self.sent += delivery.sent
        delivery.close()

    def _wanted(self, order: Order, launch_id: str, file: Path, prepared: Prepared) -> Wanted:
        """What is asked of AWS; `order` is any of the launch's."""
        settings = self.settings
        program = order.program
        contents = read_contents(file)
        args = program.argv[len(program.argv) - program.own_args :]
        label = naming.instance_name(naming.login(), contents.name, contents.digest, args)
        tags = naming.tags(label, order.credentials.identity.session, prepared.owner, time.time(), settings.tags)
        agent = {**AGENT_SETTINGS, "port": settings.port, "idle": IDLE}
        data = UserData(
            agent=agent_text(self._trust.agent(launch_id), agent),
            dataspace=data_space(prepared.types, settings.dataspace),
            volumes=volumes(prepared.types, settings.dataspace),
            cloudconfig=self._extra[0],
            units=self._extra[1],
        )
        return Wanted(settings, prepared.types, prepared.image, prepared.network, user_data(data), tags)

    def _assign(self, placed: Sequence[Placed], waiting: list[Machine]) -> list[threading.Thread]:
        """Give instances to those that wait for one, and begin to boot them; those too many are ended, whatever happens."""
        threads = []
        extra = [instance.id for instance in placed]
        try:
            for instance in placed:
                machine = next((machine for machine in waiting if machine.assign(instance)), None)
                if machine is not None:
                    thread = threading.Thread(target=machine.boot, name=f"bigmachine-ec2-{machine.order.id}", daemon=True)
                    thread.start()
                    threads.append(thread)
                    waiting.remove(machine)
                    extra.remove(instance.id)
        finally:  # When the interpreter ends there are no more threads, but it waits for this (`close`).
            if extra:
                self._upkeep.end(extra)
        if threads:
            self._upkeep.renew(self._live)
        return threads

    # -- Launcher: life and end ------------------------------------------------------------------------------------------

    def stop(self, id: str, grace: float) -> None:
        """See `system.Launcher`. AWS has accepted it when this returns; the instance is gone some seconds later."""
        self._stop([id])

    def _stop(self, ids: Sequence[str]) -> None:
        machines = [self._machines[id] for id in ids if id in self._machines]
        instances = [instance for machine in machines if (instance := machine.stop()) is not None]
        if instances:
            self._watch.remove(instances)
            self._upkeep.end(instances)

    def ended(self, id: str) -> str | None:
        """See `system.Launcher`."""
        machine = self._machines.get(id)
        if machine is None:
            return None
        if not machine.reason:
            self._watch.ask()
        return machine.reason or None

    def on_end(self, id: str, callback: Callable[[str], None]) -> None:
        """See `system.Launcher`."""
        if (machine := self._machines.get(id)) is not None:
            machine.on_end(callback)

    def console(self, id: str) -> str:
        """See `system.Launcher`: the tail of the instance's serial console."""
        machine = self._machines.get(id)
        return machine.console() if machine is not None else ""

    def timeline(self, id: str) -> list[Step]:
        """See `system.Launcher`."""
        machine = self._machines.get(id)
        return machine.timeline() if machine is not None else []

    def summary(self) -> str:
        """See `system.Launcher`."""
        with self._lock:
            placed = [(each.placed, each) for each in self._machines.values() if each.placed is not None]
        now = time.time()
        rows = [(where.type, where.market, where.zone, (each.ended_at or now) - each.placed_at) for where, each in placed]
        return session_cost(self._api, rows)

    def detail(self, id: str) -> dict[str, str]:
        """See `system.Launcher`: the instance, its type, market and zone."""
        machine = self._machines.get(id)
        placed = machine.placed if machine is not None else None
        if placed is None:
            return {}
        return {"instance": placed.id, "type": placed.type, "market": placed.market, "zone": placed.zone}

    def hourly(self, id: str) -> float | None:
        """See `system.Launcher`."""
        machine = self._machines.get(id)
        placed = machine.placed if machine is not None else None
        return None if placed is None else self._prices.of(placed.type, placed.market, placed.zone)

    def _live(self) -> list[str]:
        """The instances of machines that are wanted."""
        with self._lock:
            return [each.placed.id for each in self._machines.values() if each.placed is not None and each.wanted]

    def close(self) -> None:
        """See `system.Launcher`."""
        with self._lock:
            self._closed = True
        self._stop(list(self._machines))
        with self._changed:  # Instances that AWS is about to give are ended as soon as they are known.
            if not self._changed.wait_for(lambda: not self._placing, QUIET):
                say(f"waiting up to {CLOSE_WITHIN:g} s for a launch that AWS has not answered yet, to end what it brings")
                self._changed.wait_for(lambda: not self._placing, CLOSE_WITHIN)
        self._end_unknown()
        self._upkeep.close()
        self._watch.close()

    def _end_unknown(self) -> None:
        """End instances that a launch may have made whose answer was lost: nobody but AWS knows them."""
        if not self._lost_session:
            return
        try:
            found = [each.id for each in ours(self._api) if each.session == self._lost_session and each.state in ALIVE]
        except Ec2Error as error:
            say(f"there may be instances whose launch AWS did not confirm, which end by themselves: {error}")
            return
        with self._lock:
            known = {each.placed.id for each in self._machines.values() if each.placed is not None}
        if unknown := [id for id in found if id not in known]:
            self._upkeep.end(unknown)


def _read(path: str) -> tuple[str, str]:
    """The name and the content of a file. Raises `UsageError`."""
    try:
        return Path(path).name, Path(path).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the file cannot be read: {path}: {error}") from error
