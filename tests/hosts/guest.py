"""An instance: a container with systemd as its first process and Debian's own cloud-init, fed by a metadata service.

A process holds its namespaces: of network, mounts, processes, and of time, as its kernel has just started. In those runs
systemd-nspawn, as the first process, so that all ends with that one: a container of nspawn's alone outlives the nspawn that
is killed. The file system is an overlay: on top what the instance writes, in memory; then what differs from a real instance
(`overlay_files`); then a root of `roots`.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import namespaces
from .metadata import ADDRESS

INIT = r"""
set -e
echo unshared
read -r go
for group in $CGROUPS; do mkdir -p "$group"; echo 0 > "$group/cgroup.procs"; done
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o "mode=755,size=$SIZE" tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay overlay -o "lowerdir=$LOWER,upperdir=/mnt/upper,workdir=/mnt/work" /mnt/root
echo "$MACHINE_ID" > /mnt/root/etc/machine-id
mkdir -p /run/systemd
mount -t tmpfs tmpfs /run/systemd
mkdir /run/systemd/nspawn
exec systemd-nspawn --quiet --boot --directory=/mnt/root --machine="$NAME" --register=no --keep-unit \
    --network-namespace-path=/proc/self/ns/net --resolv-conf=off --timezone=off --link-journal=no --console=read-only \
    < /dev/null >&2
"""
"""Runs in its namespaces; the network's interface is there when it is told to go. Unless told not to, systemd-nspawn would
register with a systemd that need not be here; so it needs a control group of its own."""

CONFIG = f"""\
# There is no sign of EC2's in a container: say where its metadata are. The network is there.
datasource_list: [Ec2]
datasource: {{Ec2: {{strict_id: false, max_wait: 20, timeout: 5, metadata_urls: ["http://{ADDRESS}"]}}}}
network: {{config: disabled}}
ssh_genkeytypes: [ed25519]
locale: false
"""

MASKED = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "e2scrub_all.timer",
    "fstrim.timer",
    "networking.service",
    "systemd-firstboot.service",
)
"""Units that ask questions, or cost each start time that tests are not about."""

OWN = re.compile(r"/sbin/init|(/usr)?/lib/systemd/|\(sd|/usr/bin/dbus-daemon|\S*agetty|sshd:|/usr/sbin/sshd|.*cloud-init")
"""Processes that are there anyway."""

CGROUPS = ("/sys/fs/cgroup/systemd", "/sys/fs/cgroup/unified", "/sys/fs/cgroup")
"""Where hierarchies may be that systemd wants a group in: hybrid, or unified."""


class Guest:
    """One container. `on_end` is called once, on a thread, when it has ended by itself."""

    def __init__(self, name: str, group: str, folder: Path) -> None:
        self.name = name
        self._groups = [f"{top}/{group}/{name}" for top in cgroups()]
        self._console = folder / f"{name}.console"
        self._console.touch()
        self._open = contextlib.ExitStack()
        self._process: subprocess.Popen[str] | None = None

    def begin(self, lower: Sequence[Path], size: str) -> int:
        """Make its namespaces; returns the id of the process that holds them."""
        environ = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "NAME": self.name,
            "CGROUPS": " ".join(self._groups),
            "LOWER": ":".join(map(str, lower)),
            "SIZE": size,
            "MACHINE_ID": secrets.token_hex(16),
        }
        up = int(time.clock_gettime(time.CLOCK_BOOTTIME))
        since = ["--time", f"--boottime=-{up}", f"--monotonic=-{int(time.monotonic())}"]
        command = ["unshare", *since, "--net", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "sh", "-c", INIT]
        self._process = self._open.enter_context(namespaces.process(command, environ, self._console))
        namespaces.ip(f"addr add {ADDRESS}/32 dev lo", self._process.pid)
        return self._process.pid

    def boot(self, on_end: Callable[[], None]) -> None:
        """Start systemd there."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()

        def watch() -> None:
            process.wait()
            on_end()

        threading.Thread(target=watch, name=f"{self.name}, end", daemon=True).start()

    def kill(self) -> None:
        """Cut its power. What it was connected with hears nothing if its cable has been pulled before."""
        self._open.close()
        for group in self._groups:
            remove_cgroup(Path(group))

    def console(self) -> str:
        return self._console.read_text(errors="replace")

    @property
    def first(self) -> int:
        """The id here of the guest's process 1; 0 while there is none."""
        nspawn = namespaces.first_child(self._process.pid) if self._process is not None else 0
        child = namespaces.first_child(nspawn) if nspawn else 0
        # Before it, there is a child of nspawn's own, which makes it.
        return child if child and namespaces.namespace(child) != namespaces.namespace(nspawn) else 0


def overlay_files(folder: Path) -> Path:
    """Write what a root lacks to be an instance here."""
    config = folder / "etc/cloud/cloud.cfg.d/90_here.cfg"
    units = folder / "etc/systemd/system"
    config.parent.mkdir(parents=True)
    units.mkdir(parents=True)
    config.write_text(CONFIG)
    (folder / "etc/hostname").touch()
    (folder / "etc/resolv.conf").touch()  # No names are resolved, at once: else each look-up takes its time to fail.
    for unit in MASKED:
        (units / unit).symlink_to("/dev/null")
    return folder


def cgroups() -> list[str]:
    """The hierarchies of this host that containers need a group in."""
    there = [top for top in CGROUPS if os.access(f"{top}/cgroup.procs", os.W_OK)]
    return there[:2] if "/sys/fs/cgroup" not in there else ["/sys/fs/cgroup"]


def remove_cgroup(group: Path) -> None:
    """Remove a control group with those below it, as far as they are empty."""
    for below, folders, _ in os.walk(group, topdown=False):
        for name in folders:
            with contextlib.suppress(OSError):
                os.rmdir(Path(below, name))
    with contextlib.suppress(OSError):
        group.rmdir()
