"""A private cloud's network: instances behind a router that translates their public addresses and guards their ports.

The router is a network namespace. An instance has one link to it, a private address in 10.214.n.0/24, and, if it is to, a
public one in 10.215.n.0/24, of which it knows nothing; this process reaches public addresses only (private ones as well,
`inside`). What a packet may do is a table of rules that is worked out from what is attached and put in place whole; faults
come first in it. A packet to an address that nobody has, or has any more, is answered by nobody, as in AWS.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from . import namespaces

CLOUDS = "clouds"
"""What the numbers of such networks are claimed for."""

FIRST, LAST = 10, 250
"""The last bytes of instances' addresses."""


@dataclass(frozen=True)
class Opening:
    """What a security group lets in: a protocol ("-1": all), ports, from whom."""

    protocol: str
    ports: tuple[int, int] | None = None
    sources: tuple[str, ...] = ()


@dataclass
class Port:
    """Where an instance is attached."""

    number: int
    private: str
    public: str
    openings: Sequence[Opening] = ()
    unplugged: bool = False
    closed: set[int] = field(default_factory=set)

    @property
    def link(self) -> str:
        """The router's end."""
        return f"p{self.number}"


class Vpc:
    """One such network."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._lock = threading.RLock()
        self._ports: list[Port] = []
        self._next = FIRST
        self.closed: set[int] = set()
        self._lost = 0.0

    def start(self, *, inside: bool) -> None:
        with contextlib.ExitStack() as stack:
            self.number = stack.enter_context(namespaces.claim(CLOUDS))
            self.link = f"bigmc{self.number}"
            self.gateway = f"10.214.{self.number}.1"
            here, there = f"10.215.{self.number}.1", f"10.215.{self.number}.2"
            self.router = stack.enter_context(namespaces.switch())
            stack.enter_context(namespaces.wire(self.link, self.router, "uplink"))
            namespaces.ip(
                f"addr add {here} peer {there} dev {self.link}\nlink set {self.link} up\n"
                f"route add 10.215.{self.number}.0/24 via {there} src {here}\n"
                + (f"route add 10.214.{self.number}.0/24 via {there} src {here}\n" if inside else "")
            )
            namespaces.ip(
                f"addr add {self.gateway} dev lo\nlink set lo up\n"
                f"addr add {there} peer {here} dev uplink\nlink set uplink up\n"
                f"route add blackhole 10.214.{self.number}.0/24\nroute add blackhole 10.215.{self.number}.0/24\n",
                self.router,
            )
            forward = ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]
            subprocess.run([*namespaces.inside(self.router), *forward], check=True)
            self._enforce()
            self._open = stack.pop_all()

    def close(self) -> None:
        self._open.close()

    # -- Instances ---------------------------------------------------------------------------------------------------

    def reserve(self, *, public: bool) -> Port:
        """Addresses, the ones that nobody has had for the longest time."""
        with self._lock:
            used = {port.number for port in self._ports}
            while self._next in used:
                self._advance()
            number = self._next
            self._advance()
            port = Port(number, f"10.214.{self.number}.{number}", f"10.215.{self.number}.{number}" if public else "")
            self._ports.append(port)
            return port

    def _advance(self) -> None:
        self._next = FIRST if self._next == LAST else self._next + 1

    def attach(self, port: Port, pid: int) -> None:
        """Connect the network namespace of process `pid`."""
        namespaces.ip(
            f"link add {port.link} type veth peer name eth0 netns {pid}\n"
            f"link set {port.link} up\nroute add {port.private} dev {port.link}",
            self.router,
        )
        namespaces.ip(
            f"link set lo up\naddr add {port.private} dev eth0\nlink set eth0 up\n"
            f"route add {self.gateway} dev eth0 scope link\nroute add default via {self.gateway}",
            pid,
        )
        self._enforce()

    def detach(self, port: Port) -> None:
        """Give its addresses back."""
        with self._lock:
            self._ports.remove(port)
            with contextlib.suppress(RuntimeError):  # It has gone with the instance's namespace.
                namespaces.ip(f"link del {port.link}", self.router)
            self._enforce()

    def guard(self, port: Port, openings: Sequence[Opening]) -> None:
        """Let in what these allow, from now on."""
        with self._lock:
            if openings != port.openings:
                port.openings = openings
                self._enforce()

    def received(self, port: Port) -> int:
        """Bytes that the instance has received, with all headers."""
        show = ["ip", "-json", "-stats", "link", "show", "dev", port.link]
        shown = subprocess.run([*namespaces.inside(self.router), *show], capture_output=True, text=True, check=True).stdout
        count: int = json.loads(shown)[0]["stats64"]["tx"]["bytes"]
        return count

    # -- Faults ------------------------------------------------------------------------------------------------------

    def unplug(self, port: Port, unplugged: bool = True) -> None:
        """No packet arrives there or leaves it, and nobody is told."""
        with self._lock:
            port.unplugged = unplugged
            self._enforce()

    def shut(self, ports: Iterable[int], port: Port | None = None) -> None:
        """Let nobody connect to these TCP ports, of one instance or of any; connections that are there last."""
        with self._lock:
            closed = self.closed if port is None else port.closed
            closed.clear()
            closed.update(ports)
            self._enforce()

    def lose(self, percent: float) -> None:
        """So many of all packets get lost."""
        with self._lock:
            self._lost = percent
            self._enforce()

    def limit(self, mbit: float) -> None:
        """All that goes in or out shares a line of `mbit` Mbit/s each way; 0: of any."""
        namespaces.rate(self.link, mbit)
        namespaces.rate("uplink", mbit, self.router)

    def _enforce(self) -> None:
        with self._lock:  # Until it is in place: an older table must not follow a newer one.
            table = rules(self._ports, self.closed, self._lost)
            command = [*namespaces.inside(self.router), "iptables-restore"]
            done = subprocess.run(command, input=table, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"iptables-restore: {done.stderr.strip()}: {table}")


def rules(ports: Sequence[Port], closed: Iterable[int] = (), lost: float = 0.0) -> str:
    """What iptables-restore is told."""
    nat = [f"-A PREROUTING -d {port.public} -j DNAT --to-destination {port.private}" for port in ports if port.public]
    # Whoever asks for a public address comes from one, as through AWS's gateway; also who asks for his own.
    nat += [
        f"-A POSTROUTING -s {port.private} -m conntrack --ctorigdst {port.public}/24 -j SNAT --to-source {port.public}"
        for port in ports
        if port.public
    ]
    faults = [f"-A FORWARD {side} {port.link} -j DROP" for port in ports if port.unplugged for side in ("-i", "-o")]
    faults += [f"-A FORWARD -p tcp --syn --dport {number} -j DROP" for number in sorted(closed)]
    if lost:
        faults.append(f"-A FORWARD -m statistic --mode random --probability {lost / 100:.4f} -j DROP")
    for port in ports:
        faults += [f"-A FORWARD -o {port.link} -p tcp --syn --dport {number} -j DROP" for number in sorted(port.closed)]
    usual = ["-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT", "-A FORWARD -o uplink -j ACCEPT"]
    usual += [f"-A FORWARD -o {port.link} {opening}" for port in ports for opening in _allow(port.openings)]
    lines = ["*nat", *nat, "COMMIT", "*filter", ":FORWARD DROP [0:0]", *faults, *usual, "COMMIT", ""]
    return "\n".join(lines)


def _allow(openings: Sequence[Opening]) -> Iterable[str]:
    for opening in openings:
        what = "" if opening.protocol == "-1" else f"-p {opening.protocol} "
        if opening.ports and opening.protocol in ("tcp", "udp"):
            what += "--dport {}:{} ".format(*opening.ports)
        for source in opening.sources:
            yield f"-s {source} {what}-j ACCEPT"
