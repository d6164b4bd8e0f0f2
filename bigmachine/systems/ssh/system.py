"""The system ``ssh``: machines are hosts that you name.

    python program.py -bigm.system=ssh -bigm.hosts=ada,grace:2222,me@h3 -nmach 3

There must be an sshd that lets you in with a key, and a Python: any from 3.9 on to begin with, and the driver's minor version
to run the program. Nothing is installed, nobody need be root. Machines are spread over the hosts in turn; several share one
where there are more machines than hosts.

RPC goes to a port of the host's own, directly. With `sshtunnel` all of it goes through the SSH connection: for hosts of which
nothing but sshd can be reached. Machines cannot call each other then: the address of each is one of the driver's host.

No process of ours is left on a host when its machine has ended: a machine ends with the session, and by itself when its
lease lapses, because the driver was killed or the network parted. The connection may be lost; the lease decides.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from ...errors import PackError, UsageError
from ...info import Step
from ...settings import load
from ...system import Launched, Order
from ..remote import RemoteHostError, Trust
from ..remote.client import AgentClient
from ..remote.deliver import Delivery
from ..remote.source import agent_source
from .config import Config, Target, host_names
from .connections import Connections
from .remote import RemoteProcess
from .settings import SECTION, Settings
from .tunnel import Tunnel

DIRECT_WITHIN = 10.0
"""Seconds for a connection to an agent that listens: a firewall that drops packets says nothing."""

IDLE = 300.0
"""Seconds after which an agent ends itself that no driver talks to."""

AT_ONCE = 16
"""Hosts that are connected to before anybody needs them."""


class _Machine:
    """One machine, from its order on. `spot` is its number on its host."""

    def __init__(self, order: Order, delivery: Delivery, connections: Connections, spot: int) -> None:
        self.order = order
        self.delivery = delivery
        self.connections = connections
        self.spot = spot
        self.process = RemoteProcess(order.id, connections)
        self.tunnel: Tunnel | None = None
        self.launched: Future[Launched] = Future()
        self.settled = threading.Event()
        self.stopping = False
        self._marks: list[tuple[str, float]] = []

    @property
    def target(self) -> Target:
        return self.connections.target

    def mark(self, step: str = "") -> None:
        """A step begins, or none; the one before has ended."""
        self._marks.append((step, time.time()))

    def steps(self) -> list[Step]:
        """How far it has got: ``ssh`` (a connection, and a session), ``agent``, and the delivery's."""
        marks = list(self._marks)
        steps = [Step(name, began, ended - began) for (name, began), (_, ended) in itertools.pairwise(marks)]
        return steps + self.delivery.steps(self.order.id)

    def check(self) -> None:
        """Raises `RemoteHostError` where nobody wants the machine any more."""
        if self.stopping:
            raise RemoteHostError(self.target.name, f"machine {self.order.id} was ended while it started")


class SshLauncher:
    """What is not given is taken from the environment and from files, see `settings`. `hosts`: names, ``user@host:port``, or
    ``@file``. `sshconfig`: ssh's own configuration, which is followed for HostName, User, Port, IdentityFile, ProxyJump and
    files of known hosts. `sshtunnel`: see the module. `port`: of the first machine on each host, the next ones count up (0:
    any free port). `maxprocs`: service processes a machine (0: the host's cores). `sshplatforms`: what hosts may be."""

    name = "ssh"

    def __init__(
        self,
        hosts: str | Sequence[str] | None = None,
        sshconfig: str | None = None,
        sshtunnel: bool | None = None,
        port: int | None = None,
        maxprocs: int | None = None,
        sshplatforms: str | Sequence[str] | None = None,
    ) -> None:
        given = {"hosts": hosts or None, "sshconfig": sshconfig, "sshtunnel": sshtunnel, "sshplatforms": sshplatforms}
        settings = load(Settings, SECTION, given | {"port": port, "maxprocs": maxprocs})
        self.ships = settings.platforms
        config = Config(settings.config)
        targets = dict.fromkeys(config.target(name) for name in host_names(settings.hosts))
        self._hosts = [Connections(target) for target in targets]
        self._tunnelled = settings.tunnel
        self._port = settings.port
        self._maxprocs = settings.maxprocs
        self._trust = Trust()
        self._lock = threading.Lock()
        self._machines: dict[str, _Machine] = {}
        self._count = 0
        self.sent = 0
        """Bytes of programs that have left the driver."""

    # -- Launcher ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """See `system.Launcher`: connect, while the driver goes on."""
        for connections in self._hosts[:AT_ONCE]:
            connections.begin()

    def launch(self, orders: Sequence[Order]) -> list[Future[Launched]]:
        """See `system.Launcher`."""
        file = orders[0].program.file
        if file is None:
            raise UsageError("machines of this system need the program as a packed file: see `bigmachine pack`")
        delivery = Delivery(file, len(orders), platforms=self.ships)
        machines = [self._place(order, delivery) for order in orders]
        left = threading.Semaphore(0)

        def run(machine: _Machine) -> None:
            self._launch(machine)
            left.release()

        def clean() -> None:
            for _ in machines:
                left.acquire()
            with self._lock:
                self.sent += delivery.sent
            delivery.close()

        for machine in machines:
            name = f"bigmachine-ssh-{machine.order.id}"
            threading.Thread(target=run, args=(machine,), name=name, daemon=True).start()
        threading.Thread(target=clean, name="bigmachine-ssh-delivery", daemon=True).start()
        return [machine.launched for machine in machines]

    def _place(self, order: Order, delivery: Delivery) -> _Machine:
        with self._lock:
            round, index = divmod(self._count, len(self._hosts))
            self._count += 1
            machine = self._machines[order.id] = _Machine(order, delivery, self._hosts[index], round)
        return machine

    def _launch(self, machine: _Machine) -> None:
        delivering = False
        try:
            client, host = self._start_agent(machine)
            delivering = True
            with contextlib.closing(client):
                launched = machine.delivery.deliver(
                    machine.order,
                    client,
                    host=host,
                    maxprocs=self._maxprocs,
                    peer_host=None if self._tunnelled else "",
                )
            machine.check()
        except BaseException as error:  # Whatever it is, it is this machine's failure alone.
            if isinstance(error, RemoteHostError):  # Under the name by which the user knows the host.
                error = RemoteHostError(machine.target.name, error.reason)
            elif isinstance(error, PackError):
                error = RemoteHostError(machine.target.name, str(error))
            if not delivering:
                machine.delivery.lost()
            self._end(machine)
            machine.settled.set()
            machine.launched.set_exception(error)
        else:
            machine.settled.set()
            machine.launched.set_result(launched)

    def _start_agent(self, machine: _Machine) -> tuple[AgentClient, str]:
        """An agent that can be reached, and the name of its host by which others find it."""
        machine.mark("ssh")
        try:
            return self._started_agent(machine)
        finally:
            machine.mark()

    def _started_agent(self, machine: _Machine) -> tuple[AgentClient, str]:
        id, target = machine.order.id, machine.target
        machine.check()
        port = self._port + machine.spot if self._port else 0
        settings = {"port": port, "bind": "127.0.0.1" if self._tunnelled else "0.0.0.0", "idle": IDLE}
        try:
            machine.process.start(agent_source(self._trust.agent(id), settings), lambda: machine.mark("agent"))
        except RemoteHostError as error:
            if not port or f" port {port} " not in error.reason:
                raise
            raise RemoteHostError(target.name, f"{error.reason}; -bigm.port chooses another") from error
        machine.check()
        if self._tunnelled:
            there = machine.process.port
            machine.connections.forward(there).close()  # Where that fails it says why; a tunnel can only hang up.
            machine.tunnel = Tunnel(lambda: machine.connections.forward(there), id)
            return AgentClient("localhost", machine.tunnel.port, id, self._trust.context), "localhost"
        _reach(target, machine.process.port)
        return AgentClient(target.host, machine.process.port, id, self._trust.context), target.host

    def _end(self, machine: _Machine, grace: float = 0.0) -> None:
        machine.process.close_after(grace)
        if machine.tunnel is not None:
            machine.tunnel.close()

    def stop(self, id: str, grace: float) -> None:
        """See `system.Launcher`."""
        with self._lock:
            machine = self._machines.get(id)
            if machine is None or machine.stopping:
                return
            machine.stopping = True
        if not machine.settled.is_set():  # It is being started: what there is of it ends, and nothing more begins.
            machine.delivery.cancel(id)
            self._end(machine)
            return
        self._end(machine, grace)

    def ended(self, id: str) -> str | None:
        """See `system.Launcher`."""
        machine = self._machines.get(id)
        return machine.process.reason if machine is not None and machine.process.ended.is_set() else None

    def on_end(self, id: str, callback: Callable[[str], None]) -> None:
        """See `system.Launcher`: for as long as the connection stands, its sshd reports the end of a machine."""
        machine = self._machines.get(id)
        if machine is not None:
            machine.process.on_end(callback)

    def timeline(self, id: str) -> Sequence[Step]:
        """See `system.Launcher`."""
        machine = self._machines.get(id)
        return machine.steps() if machine is not None else []

    def detail(self, id: str) -> Mapping[str, str]:
        """See `system.Launcher`: the host, as the user calls it."""
        machine = self._machines.get(id)
        return {"host": machine.target.name} if machine is not None else {}

    def console(self, id: str) -> str:
        """See `system.Launcher`: what the agent, then the supervisor, has said on its standard error."""
        machine = self._machines.get(id)
        return "\n".join(machine.process.said) if machine is not None else ""

    def close(self) -> None:
        """See `system.Launcher`."""
        for id in list(self._machines):
            self.stop(id, 0.0)
        for connections in self._hosts:
            connections.close()


def _reach(target: Target, port: int) -> None:
    """Raises `RemoteHostError` where the port cannot be reached from here."""
    try:
        socket.create_connection((target.host, port), DIRECT_WITHIN).close()
    except OSError as error:
        reason = (
            f"ssh gets through to it, but its port {port} cannot be reached from here: {error.strerror or error}; "
            "open it (-bigm.port chooses which), or send everything through ssh: -bigm.sshtunnel"
        )
        raise RemoteHostError(target.name, reason) from error
