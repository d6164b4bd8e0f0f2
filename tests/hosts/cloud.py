"""The process of a fake EC2: moto's API server, the instances that its calls make, and control of both for tests.

    python -m hosts.cloud '{"roots": {"3.11": "/…"}, "size": "1g", "inside": false, "boot": true}'

prints the address that it serves, and does until its standard input ends. `amazon` says how the API differs from moto's;
here is what becomes of an instance: pending until its container runs, shutting-down until that is gone; or in the books only,
where nothing is to boot. A thread that starts a container must outlive it (`namespaces`): all are started by those of one
pool.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from . import metadata, namespaces
from .guest import Guest, cgroups, overlay_files, remove_cgroup
from .vpc import CLOUDS, Opening, Port, Vpc

GROUP = "bigmachine-cloud-{}"
"""The control group of all instances of a cloud, by its number, and its folder in `RUN`."""

RUN = Path("/run")

STARTERS = 4
"""Threads that start and end containers. Two processors are busy with what happens in fewer."""


@dataclass
class Running:
    """An instance that has a container, or had: of one that is gone the console is left."""

    instance: Any
    guest: Guest | None
    port: Port
    service: metadata.Metadata | None = None
    interruption: str = ""
    rebalance: str = ""
    gone: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class Cloud:
    """Instances' lives. Methods may be called on any thread."""

    def __init__(self, roots: Mapping[str, str], size: str, inside: bool, boot: bool) -> None:
        self.lock = threading.RLock()
        self.roots = {python: Path(root) for python, root in roots.items()}
        self.vpc = Vpc()
        self.running: dict[str, Running] = {}
        self._size = size
        self._inside = inside
        self._boots = boot
        self._pool = ThreadPoolExecutor(STARTERS, "instances")
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Cloud:
        with contextlib.ExitStack() as stack:
            if self._boots:
                self._connect(stack)
            stack.callback(self._end_all)
            self._open = stack.pop_all()
        return self

    def _connect(self, stack: contextlib.ExitStack) -> None:
        """Make what containers need."""
        sweep()
        self.vpc.start(inside=self._inside)
        stack.callback(self.vpc.close)
        self._group = GROUP.format(self.vpc.number)
        stack.callback(remove, self._group)
        remove(self._group)
        self._folder = RUN / self._group
        self._files = overlay_files(self._folder / "files")

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _end_all(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for running in self.running.values():
            self._release(running)

    # -- Lives -------------------------------------------------------------------------------------------------------

    def launch(self, instance: Any, root: Path, *, spot: bool) -> None:
        """Give moto's new `instance` addresses and, before long, a container."""
        nic = instance.nics[0]
        if self._boots:
            guest, port = Guest(instance.id, self._group, self._folder), self.vpc.reserve(public=bool(nic.public_ip))
        else:
            guest, port = None, Port(0, nic.private_ip_address, nic.public_ip or "")
        nic.private_ip_address = port.private
        nic.private_ip_addresses = [{"Primary": True, "PrivateIpAddress": port.private}]
        nic.public_ip = port.public or None
        running = Running(instance, guest, port)
        with self.lock:
            instance._state.name, instance._state.code = "pending", 0
            if spot:
                instance.lifecycle = "spot"
            self.running[instance.id] = running
        self._pool.submit(self._boot, running, root)

    def _boot(self, running: Running, root: Path) -> None:
        instance = running.instance
        try:
            with running.lock:
                if running.gone:
                    return
                if running.guest is not None:
                    self._start(running, running.guest, root)
            with self.lock:
                if instance._state.name == "pending":
                    instance._state.name, instance._state.code = "running", 16
        except Exception as error:
            print(f"{instance.id} did not start: {error!r}", file=sys.stderr, flush=True)
            self.end(instance, "Server.InternalError", f"Server.InternalError: {error}")

    def _start(self, running: Running, guest: Guest, root: Path) -> None:
        instance = running.instance
        pid = guest.begin([self._files, root], self._size)
        self.vpc.attach(running.port, pid)
        self.guard()
        data = b"" if instance.user_data is None else base64.b64decode(str(instance.user_data))
        required = instance.metadata_options.http_tokens == "required"
        running.service = metadata.Metadata(lambda: self._tree(running), lambda: data, token_required=required)
        running.service.start(pid)
        guest.boot(lambda: self._ended(running))

    def _tree(self, running: Running) -> metadata.Tree:
        with self.lock:
            return metadata.tree(running.instance, interruption=running.interruption, rebalance=running.rebalance)

    def _ended(self, running: Running) -> None:
        if running.gone:
            return
        code = "Client.InstanceInitiatedShutdown"
        stop = running.instance.instance_initiated_shutdown_behavior == "stop" and running.instance.lifecycle != "spot"
        self.end(running.instance, code, f"{code}: Instance initiated shutdown", stop=stop)

    def end(self, instance: Any, code: str, message: str, *, stop: bool = False) -> None:
        """End an instance, at once, for this reason; once."""
        states = ((64, "stopping"), (80, "stopped")) if stop else ((32, "shutting-down"), (48, "terminated"))
        running = self.running[instance.id]
        with self.lock:
            if instance._state.name in ("shutting-down", "terminated") or (stop and instance._state.name == "stopped"):
                return
            instance._state.code, instance._state.name = states[0]
            instance.state_reason.code, instance.state_reason.message = code, message

        def finish() -> None:
            self._release(running)
            with self.lock:
                if not stop:
                    instance.forget()
                instance._state.code, instance._state.name = states[1]
                instance.state_reason.code, instance.state_reason.message = code, message

        self._pool.submit(finish)

    def _release(self, running: Running) -> None:
        with running.lock:
            if running.gone:
                return
            running.gone = True
            if running.guest is not None:
                running.guest.kill()
                self.vpc.detach(running.port)
            if running.service is not None:
                running.service.close()

    def guard(self) -> None:
        """Let in what the instances' security groups say now."""
        with self.lock:
            members: dict[str, list[str]] = {}
            there = [running for running in self.running.values() if running.guest is not None and not running.gone]
            for running in there:
                for group in running.instance.nics[0].group_set:
                    members.setdefault(group.id, []).append(f"{running.port.private}/32")
            for running in there:
                rules = [rule for group in running.instance.nics[0].group_set for rule in group.ingress_rules]
                self.vpc.guard(running.port, [opening(rule, members) for rule in rules])

    # -- For tests ---------------------------------------------------------------------------------------------------

    def instances(self) -> dict[str, dict[str, Any]]:
        with self.lock:
            return {
                id: {
                    "state": running.instance._state.name,
                    "private": running.port.private,
                    "public": running.port.public,
                    "market": "spot" if running.instance.lifecycle == "spot" else "on-demand",
                    "first": 0 if running.gone or running.guest is None else running.guest.first,
                }
                for id, running in self.running.items()
            }

    def console(self, id: str) -> str:
        guest = self.running[id].guest
        return "" if guest is None else guest.console()

    def kill(self, id: str) -> None:
        """A power cut: EC2 finds out and calls the instance terminated."""
        running = self.running[id]
        if running.guest is not None:
            self.vpc.unplug(running.port)
        self.end(running.instance, "Server.InternalError", "Server.InternalError: Internal error on launch or hardware")

    def unplug(self, id: str, unplugged: bool = True) -> None:
        self.vpc.unplug(self.running[id].port, unplugged)

    def lose(self, percent: float) -> None:
        self.vpc.lose(percent)

    def drop_port(self, number: int, id: str = "", dropped: bool = True) -> None:
        port = self.running[id].port if id else None
        closed = self.vpc.closed if port is None else port.closed
        self.vpc.shut(closed | {number} if dropped else closed - {number}, port)

    def limit(self, mbit: float) -> None:
        self.vpc.limit(mbit)

    def received(self, id: str) -> int:
        return self.vpc.received(self.running[id].port)

    def interrupt(self, id: str, seconds: float) -> None:
        """Announce that a spot instance is taken away, and do so in this many seconds."""
        running = self.running[id]
        running.interruption = f"{datetime.now(UTC) + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%SZ}"
        code = "Server.SpotInstanceTermination"
        timer = threading.Timer(seconds, self.end, (running.instance, code, f"{code}: Spot instance termination"))
        timer.daemon = True
        timer.start()

    def rebalance(self, id: str) -> None:
        self.running[id].rebalance = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def remove(group: str) -> None:
    """Remove what is left of the cloud with this group."""
    for top in cgroups():
        remove_cgroup(Path(top, group))
    shutil.rmtree(RUN / group, ignore_errors=True)


def sweep() -> None:
    """Remove what is left of clouds whose processes were killed."""
    tops = [RUN, *map(Path, cgroups())]
    for left in {left.name for top in tops for left in top.glob(GROUP.format("*"))}:
        with contextlib.suppress(RuntimeError), namespaces.claim(CLOUDS, [int(left.rpartition("-")[2])]):
            remove(left)


def opening(rule: Any, members: Mapping[str, list[str]]) -> Opening:
    """What moto's `rule` of a security group lets in; `members` are the addresses of each group's instances."""
    sources = [rule.ip_range["CidrIp"]] if rule.ip_range.get("CidrIp") else []
    if rule.source_group:
        sources += members.get(rule.source_group["GroupId"], [])
    ports = None if rule.from_port is None or rule.from_port < 0 else (rule.from_port, rule.to_port)
    return Opening(rule.ip_protocol, ports, tuple(sources))


def main() -> None:
    # moto reads its settings when it is imported.
    os.environ |= {"MOTO_ENABLE_AMI_VALIDATION": "1", "MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION": "1"}
    os.environ |= {"MOTO_ENABLE_KEYPAIR_VALIDATION": ""}
    from .amazon import Amazon

    with Cloud(**json.loads(sys.argv[1])) as cloud:
        amazon = Amazon(cloud)
        verbs: dict[str, Callable[..., Any]] = {name: getattr(cloud, name) for name in CLOUD} | {
            name: getattr(amazon, name) for name in AMAZON
        }
        with amazon.serve(verbs) as address:
            print(address, flush=True)
            sys.stdin.read()


CLOUD = ("instances", "console", "kill", "unplug", "drop_port", "lose", "limit", "received", "interrupt", "rebalance")
AMAZON = ("fail", "room", "image", "deny", "refuse", "quota", "eventual", "calls")
"""What tests may ask for, of each."""

if __name__ == "__main__":
    main()
