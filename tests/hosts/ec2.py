"""EC2 on this host: moto's API, and instances that are real systems, booted by systemd and configured by cloud-init.

    with FakeEc2() as cloud:
        for name, value in cloud.environ().items():
            monkeypatch.setenv(name, value)
        …
        cloud.kill(next(iter(cloud.instances())))

An instance's file system is one of Debian's (`roots`), by its image; there is one for the Pythons of `roots.SUITES`. Its
network is that of `vpc`: this process reaches its public address, as its security groups allow, and with `inside` its
private one too. All of it is in a process of its own, which ends, with everything, when this one does (`cloud`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from . import guest, namespaces, roots

TESTS = Path(__file__).parents[1]

NEEDED = ("iptables-restore", roots.COMMAND, "nsenter", "setpriv", "systemd-nspawn", "tc", "unshare")
"""Commands; of the packages `PACKAGES`."""

PACKAGES = "arch-test iproute2 iptables mmdebstrap systemd-container util-linux"

OURS = f"{sys.version_info[0]}.{sys.version_info[1]}"
"""The minor version of the Python that runs this."""

REGION = "us-east-1"

Market = Literal["spot", "on-demand"]


@functools.cache
def unavailable(*pythons: str) -> str:
    """Why there can be no such cloud here with images of these Pythons, or of the one that runs this; empty where there can.

    Makes the roots if need be, so ask while tests are collected: then nobody is waiting with a time limit."""
    if reason := namespaces.unavailable(NEEDED, PACKAGES):
        return reason
    if importlib.util.find_spec("moto") is None:
        return "a cloud needs moto[ec2,server,ssm]"
    if not guest.cgroups():
        return "instances need control groups that can be written to"
    for python in pythons or (OURS,):
        if python not in roots.SUITES:
            return f"instances are of Debian's, whose Pythons are {', '.join(roots.SUITES)}: none is {python}"
        try:
            roots.root(roots.SUITES[python])
        except RuntimeError as error:
            return str(error)
    return ""


@dataclass(frozen=True)
class Instance:
    """What there is to know of one. `first` is the id here of its process 1; 0 while it has none."""

    state: str
    private: str
    public: str
    market: Market
    first: int


class FakeEc2:
    """One cloud. Use it as a context manager, from the main thread. Instances have disks of `size`, in memory.
    Without `boot` they are in the API's books only: running at once, reached by nobody, and anyone may make them anywhere."""

    def __init__(self, pythons: Sequence[str] = (OURS,), *, size: str = "50%", inside: bool = False, boot: bool = True) -> None:
        self._pythons = pythons
        self._options = {"size": size, "inside": inside, "boot": boot}
        self._open = contextlib.ExitStack()

    def __enter__(self) -> FakeEc2:
        with contextlib.ExitStack() as stack:
            there = {python: self._root(python) for python in self._pythons if python in roots.SUITES}
            self._log = stack.enter_context(tempfile.TemporaryFile())
            command = [sys.executable, "-m", f"{__package__}.cloud", json.dumps({"roots": there, **self._options})]
            stack.enter_context(self._server(command))
            self._open = stack.pop_all()
        return self

    def _root(self, python: str) -> str:
        return str(roots.root(roots.SUITES[python])) if self._options["boot"] else os.devnull

    @contextlib.contextmanager
    def _server(self, command: Sequence[str]) -> Iterator[None]:
        environ = {**os.environ, "PYTHONPATH": str(TESTS)}
        process = subprocess.Popen(
            [*namespaces.DIES_WITH_US, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environ,
            text=True,
            start_new_session=True,
        )
        with process:
            assert process.stdout is not None
            self.endpoint = process.stdout.readline().strip()
            if not self.endpoint:
                raise RuntimeError(f"no cloud: exit {process.wait()}: {self.log()}")
            try:
                yield
            finally:
                assert process.stdin is not None
                process.stdin.close()  # It clears up and ends.
                try:
                    process.wait(30)
                finally:
                    process.kill()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()

    def environ(self) -> dict[str, str]:
        """The environment in which boto3 talks to it, and to nobody else."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE000000000",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
        }

    def _ask(self, verb: str, **given: Any) -> Any:
        request = urllib.request.Request(f"{self.endpoint}/_cloud/{verb}", json.dumps(given).encode(), method="POST")
        # No proxy: it is here.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=30) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{verb}: {error.read().decode(errors='replace')}") from None

    def log(self) -> str:
        """What the cloud's process said: its requests, and what went wrong."""
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")

    # -- Instances ---------------------------------------------------------------------------------------------------

    def about(self, id: str) -> Instance:
        return self._all()[id]

    def _all(self) -> dict[str, Instance]:
        return {id: Instance(**row) for id, row in self._ask("instances").items()}

    def instances(self, *states: str) -> dict[str, str]:
        """States by id, in the order of launch; of those in one of `states`, if any are given."""
        return {id: row.state for id, row in self._all().items() if not states or row.state in states}

    def live(self) -> list[str]:
        """The ids of those that cost money."""
        return list(self.instances("pending", "running", "stopping", "stopped"))

    def wait(self, id: str, state: str, within: float) -> None:
        """Wait until an instance is in a state; nothing tells of that."""
        if not namespaces.eventually(lambda: self.instances()[id] == state, within):
            raise TimeoutError(f"{id} is {self.instances()[id]}, not {state}, after {within} s: {self.console(id)[-2000:]}")

    def console(self, id: str) -> str:
        """All that it has said there."""
        said: str = self._ask("console", id=id)
        return said

    def run(self, id: str, *command: str, check: bool = True) -> str:
        """Run a command there, as root; returns its output."""
        return namespaces.run(self._first(id), *command, check=check).stdout

    def processes(self, id: str) -> dict[int, str]:
        """Those that are there for somebody's user-data, by process id here; with their command lines."""
        there = namespaces.processes(self._first(id))
        return {pid: command for pid, command in there.items() if not guest.OWN.match(command)}

    def received(self, id: str) -> int:
        """Bytes that it has received, with all headers."""
        count: int = self._ask("received", id=id)
        return count

    def _first(self, id: str) -> int:
        about = self.about(id)
        if not about.first:
            raise RuntimeError(f"{id} is {about.state}: nothing runs there")
        return about.first

    # -- What may happen ---------------------------------------------------------------------------------------------

    def kill(self, id: str) -> None:
        """Cut its power: nobody whom it was connected with hears a thing, EC2 finds out."""
        self._ask("kill", id=id)

    def unplug(self, id: str) -> None:
        """Lose all packets to it and from it."""
        self._ask("unplug", id=id)

    def plug(self, id: str) -> None:
        self._ask("unplug", id=id, unplugged=False)

    def drop_port(self, number: int, id: str = "", *, dropped: bool = True) -> None:
        """Lose what is to connect to this TCP port: of one instance, or of all, those to come as well."""
        self._ask("drop_port", number=number, id=id, dropped=dropped)

    @contextlib.contextmanager
    def loss(self, percent: float) -> Iterator[None]:
        """So many of all packets to and from instances get lost, each way."""
        self._ask("lose", percent=percent)
        try:
            yield
        finally:
            self._ask("lose", percent=0)

    @contextlib.contextmanager
    def partition(self, id: str) -> Iterator[None]:
        """It is unplugged while the block lasts."""
        self.unplug(id)
        try:
            yield
        finally:
            self.plug(id)

    @contextlib.contextmanager
    def limit(self, mbit: float) -> Iterator[None]:
        """This process and all instances share a line of `mbit` Mbit/s each way; instances among each other do not."""
        self._ask("limit", mbit=mbit)
        try:
            yield
        finally:
            self._ask("limit", mbit=0)

    def interrupt(self, id: str, seconds: float = 120) -> None:
        """Announce to a spot instance that it is taken away, and do so in this many seconds."""
        self._ask("interrupt", id=id, seconds=seconds)

    def rebalance(self, id: str) -> None:
        """Recommend to a spot instance to be replaced."""
        self._ask("rebalance", id=id)

    # -- What the API says -------------------------------------------------------------------------------------------

    def fail(self, code: str, n: int = 1, *, market: Market | None = None, type: str = "", zone: str = "") -> None:
        """The next `n` launches of this market, type and zone fail with `code`; 0: none any more."""
        self._ask("fail", code=code, n=n, market=market, type=type, zone=zone)

    def room(self, n: int, *, market: Market | None = None, type: str = "", zone: str = "") -> None:
        """There is room for `n` more instances of this market, type and zone; less than 0: for all."""
        self._ask("room", n=n, market=market, type=type, zone=zone)

    def image(self, image: str, python: str) -> None:
        """Start `image`, an id or a part of its parameter's name, from the root with that Python, which must be one of this
        cloud's `pythons`."""
        self._ask("image", image=image, python=python)

    def refuse(self, action: str, code: str, n: int = 1) -> None:
        """The next `n` calls of an action are refused with this code: ``ec2:DescribeInstances``, ``RequestLimitExceeded``."""
        self._ask("refuse", action=action, code=code, n=n)

    def deny(self, action: str, *, denied: bool = True) -> None:
        """Whether the caller lacks the permission for this: ``ec2:RunInstances``."""
        self._ask("deny", action=action, denied=denied)

    def quota(self, code: str, value: float) -> None:
        """What service-quotas says: L-1216C47A are virtual processors on demand, L-34B43A08 on the spot."""
        self._ask("quota", code=code, value=value)

    def eventual(self, seconds: float) -> None:
        """For so long after its launch, an instance is not found when it is asked for by its id."""
        self._ask("eventual", seconds=seconds)

    def calls(self) -> list[str]:
        """What has been called so far: ``ec2:RunInstances``."""
        called: list[str] = self._ask("calls")
        return called
