"""A network of hosts that this process can reach, made of Linux namespaces: real kernels' TCP, real sshds, nothing simulated.

    with Network() as network:
        ada = network.host("ada")
        subprocess.run(["ssh", "-F", str(network.config(tmp_path / "config")), "ada", "uname"])

A host has a network, mount, process, host name and IPC namespace of its own. Its file system is this one's, as seen through
an overlay: what it writes is in memory, and homes, temporary directories and this checkout are not there. tini is its first
process and runs sshd, for root and for an ordinary user, `USER`. A network is one more namespace, with a bridge in it, that
a pair of virtual interfaces connects with this process's.

Everything hangs on a few processes, which die with this one however it ends; interfaces and mounts go with them.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from . import namespaces

CHECKOUT = Path(__file__).parents[2]

NEEDED = ("ip", "iptables", "nsenter", "pkill", "setpriv", "ssh", "ssh-keygen", "tini", "unshare", "/usr/sbin/sshd")
"""Commands; of the packages `PACKAGES`."""

PACKAGES = "openssh-server openssh-client iproute2 iptables procps tini util-linux"

USER, UID = "ada", 4242
"""Who is nobody in particular on each host, and on no Debian in use."""

HIDDEN = ("/root", "/home", "/tmp", "/var/tmp", str(CHECKOUT))
"""Directories that are empty on hosts."""

OWN = ("tini ", "sshd: ", "/usr/sbin/sshd ")
"""How the command lines of processes begin that each host has."""

INIT = r"""
set -e
echo unshared
read -r go
ip link set lo up
ip addr add "$ADDRESS" dev eth0
ip link set eth0 up
ip route add default via "$GATEWAY"
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
mount -t overlay overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work /mnt/root
cd /mnt/root
mkdir -p proc sys dev run tmp mnt opt
for hidden in $HIDDEN; do mkdir -p ".$hidden"; mount -t tmpfs -o "mode=755,size=$SIZE" tmpfs ".$hidden"; done
chmod 1777 tmp var/tmp
for python in $PYTHONS; do
    mkdir -p ".$python"
    mount --bind "$python" ".$python"
    ln -s "$python" "opt/${python##*/}"
done
for gone in $GONE; do rm -f ".$gone"; done
cp -a "$FILES/." .
chown -R root:root etc/ssh root
chown -R "$UID_:$UID_" "home/$LOGIN"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
for n in null zero full random urandom tty; do touch dev/$n; mount --bind /dev/$n dev/$n; done
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=755 tmpfs run
mkdir -p run/sshd run/lock
hostname "$NAME"
pivot_root . mnt
umount -l /mnt
cd /
echo up
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin tini -s -- /usr/sbin/sshd -D -e
"""

SSHD = """\
Port {port}
HostKey /etc/ssh/host_key
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
AllowAgentForwarding no
"""

READY_WITHIN = 20.0
"""Seconds until a host's sshd must answer; it takes a quarter of one where there is nothing else to do."""


@functools.cache
def unavailable() -> str:
    """Why there can be no such hosts here; empty where there can."""
    return namespaces.unavailable(NEEDED, PACKAGES)


class Network:
    """A network with as many hosts as are asked for. Use it as a context manager, from the main thread: its processes end
    with the thread that has started them."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()
        self.hosts: dict[str, SshHost] = {}
        self._count = 1

    def __enter__(self) -> Network:
        with contextlib.ExitStack() as stack:
            number = stack.enter_context(namespaces.claim("hosts"))
            self.subnet = ipaddress.ip_network(f"10.213.{number}.0/24")
            self.gateway = str(self.subnet[1])
            self._interface = f"bigm{number}"
            self.files = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bigmachine-hosts-")))
            self.identity = self.files / "id_ed25519"
            make_key(self.identity)
            self.switch_pid = stack.enter_context(namespaces.switch())
            stack.callback(self._close_hosts)
            stack.enter_context(namespaces.wire(self._interface, self.switch_pid, "uplink"))
            namespaces.ip(f"addr add {self.gateway}/24 dev {self._interface}\nlink set {self._interface} up")
            self.ip("link add switch type bridge\nlink set switch up\nlink set uplink master switch up")
            self._open = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open.close()

    def _close_hosts(self) -> None:
        for host in list(self.hosts.values()):
            host.close()

    def ip(self, lines: str) -> None:
        """Commands of ``ip -batch`` where the switch is."""
        namespaces.ip(lines, self.switch_pid)

    def host(
        self,
        name: str,
        *,
        port: int = 22,
        gone: Sequence[str] = (),
        pythons: Sequence[str] | None = None,
        size: str = "50%",
    ) -> SshHost:
        """A new host. Files `gone` are not there; the Pythons with the prefixes `pythons` are, in /opt too; by default the one
        that runs this, where it would not be there anyway. Homes have `size`."""
        self._count += 1  # No address twice: neighbours remember whose it was.
        host = SshHost(self, name, str(self.subnet[self._count]), port)
        host.start(gone, own_python() if pythons is None else pythons, size)
        self.hosts[name] = host
        return host

    def sent(self) -> int:
        """Bytes that this process has sent to all hosts, with all headers; what hosts send each other is not among them."""
        return int(Path(f"/sys/class/net/{self._interface}/statistics/tx_bytes").read_text())

    @contextlib.contextmanager
    def limit(self, mbit: float) -> Iterator[None]:
        """This process and all hosts share a line of `mbit` Mbit/s each way; hosts among each other do not."""
        with namespaces.limited(mbit, (self._interface, None), ("uplink", self.switch_pid)):
            yield

    def config(self, file: Path, user: str = USER, **options: str) -> Path:
        """Write a configuration of ssh's by which all hosts are reached by name; `options` hold for each."""
        known = file.with_name("known_hosts")
        known.write_text("".join(host.known_hosts for host in self.hosts.values()))
        given = {"User": user, "IdentityFile": str(self.identity), "UserKnownHostsFile": str(known), **options}
        file.write_text("".join(host.section(given) for host in self.hosts.values()))
        return file


class SshHost:
    """One host. `address` is its IP address."""

    def __init__(self, network: Network, name: str, address: str, port: int) -> None:
        self.network = network
        self.name = name
        self.address = address
        self.port = port
        self._open = contextlib.ExitStack()
        self._link = f"p{address.rpartition('.')[2]}"
        self._files = network.files / name

    def start(self, gone: Sequence[str], pythons: Sequence[str], size: str) -> None:
        self._write_files()
        environ = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "NAME": self.name,
            "ADDRESS": f"{self.address}/24",
            "GATEWAY": self.network.gateway,
            "FILES": str(self._files),
            "HIDDEN": " ".join(path for path in HIDDEN if not any(path.startswith(f"{other}/") for other in HIDDEN)),
            "GONE": " ".join(gone),
            "PYTHONS": " ".join(pythons),
            "SIZE": size,
            "LOGIN": USER,
            "UID_": str(UID),
        }
        command = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "sh", "-c"]
        with contextlib.ExitStack() as stack:
            process = stack.enter_context(namespaces.process([*command, INIT], environ, self._files / "console"))
            self.pid = process.pid
            self.network.ip(f"link add {self._link} type veth peer name eth0 netns {self.pid}")
            self.plug()
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.stdout is not None
            # Whoever asks the network for it before that waits a second longer.
            if process.stdout.readline() != "up\n":
                raise RuntimeError(f"host {self.name} did not come up: {self.console()}")
            self._await(process)
            self._open = stack.pop_all()

    def _write_files(self) -> None:
        ssh, passwd, shadow = self._files / "etc/ssh", self._files / "etc/passwd", self._files / "etc/shadow"
        ssh.mkdir(parents=True)
        make_key(ssh / "host_key")
        (ssh / "sshd_config").write_text(SSHD.format(port=self.port))
        # No password, yet not locked: sshd lets nobody in who is.
        passwd.write_text(f"{Path('/etc/passwd').read_text()}{USER}:x:{UID}:{UID}::/home/{USER}:/bin/sh\n")
        shadow.write_text(f"{Path('/etc/shadow').read_text()}{USER}:*:19000:0:99999:7:::\n")
        shadow.chmod(0o640)
        for home in ("root", f"home/{USER}"):
            keys = self._files / home / ".ssh/authorized_keys"
            keys.parent.mkdir(parents=True, mode=0o700)
            shutil.copy(self.network.identity.with_suffix(".pub"), keys)

    def _await(self, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + READY_WITHIN
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with socket.create_connection((self.address, self.port), 0.1) as probe:
                    if probe.recv(4) == b"SSH-":
                        return
            except OSError:
                time.sleep(0.01)  # Nothing tells when sshd listens.
        raise RuntimeError(f"host {self.name} did not come up: {self.console()}")

    def close(self) -> None:
        """The power is cut."""
        self._open.close()
        self.network.hosts.pop(self.name, None)

    # -- What one can know about it ----------------------------------------------------------------------------------

    @property
    def known_hosts(self) -> str:
        """A line of the file of that name."""
        place = self.address if self.port == 22 else f"[{self.address}]:{self.port}"
        return f"{place} {(self._files / 'etc/ssh/host_key.pub').read_text()}"

    def section(self, options: Mapping[str, str]) -> str:
        """Of ssh's configuration."""
        lines = {"HostName": self.address, "Port": str(self.port), **options}
        return f"Host {self.name}\n" + "".join(f"    {key} {value}\n" for key, value in lines.items())

    def console(self) -> str:
        """What its sshd said."""
        return (self._files / "console").read_text(errors="replace")

    def processes(self) -> dict[int, str]:
        """Those that somebody has brought there, by process id here; with their command lines, without sshd's."""
        there = namespaces.processes(namespaces.first_child(self.pid))
        return {pid: command for pid, command in there.items() if not command.startswith(OWN)}

    def received(self) -> int:
        """Bytes that it has received, with all headers."""
        shown = self.run("ip", "-json", "-stats", "link", "show", "dev", "eth0")
        count: int = json.loads(shown)[0]["stats64"]["rx"]["bytes"]
        return count

    def run(self, *command: str) -> str:
        """Run a command there, as root; returns its output."""
        return namespaces.run(namespaces.first_child(self.pid), *command).stdout

    def configure(self, *lines: str) -> None:
        """Put lines before what sshd's configuration says."""
        file = "/etc/ssh/sshd_config"
        self.run("sh", "-c", f'printf "%s\\n" "$@" "$(cat {file})" > {file}.new && mv {file}.new {file}', "sh", *lines)
        said = len(self.console())
        self.run("pkill", "-HUP", "--oldest", "--exact", "sshd")
        deadline = time.monotonic() + READY_WITHIN
        while "Server listening" not in self.console()[said:] and time.monotonic() < deadline:
            time.sleep(0.01)  # It says so when it has read it.

    # -- What may happen to it ---------------------------------------------------------------------------------------

    def plug(self) -> None:
        """Connect its cable."""
        self.network.ip(f"link set {self._link} master switch up")

    def unplug(self) -> None:
        """Pull its cable out of the switch: no interface goes down, no packet arrives."""
        self.network.ip(f"link set {self._link} nomaster")

    @contextlib.contextmanager
    def partition(self) -> Iterator[None]:
        """For the block, its cable is out of the switch."""
        self.unplug()
        try:
            yield
        finally:
            self.plug()

    @contextlib.contextmanager
    def only_ssh(self) -> Iterator[None]:
        """A firewall drops what does not go to sshd."""
        with self._firewall("INPUT", "-i", "eth0", "-p", "tcp", "--syn", "!", "--dport", str(self.port), "-j", "DROP"):
            yield

    @contextlib.contextmanager
    def loss(self, percent: float) -> Iterator[None]:
        """So many of the packets to it get lost, by chance, and so many of those from it."""
        chance = ["-m", "statistic", "--mode", "random", "--probability", str(percent / 100), "-j", "DROP"]
        with self._firewall("INPUT", "-i", "eth0", *chance), self._firewall("OUTPUT", "-o", "eth0", *chance):
            yield

    @contextlib.contextmanager
    def _firewall(self, *rule: str) -> Iterator[None]:
        self.run("iptables", "-I", *rule)
        try:
            yield
        finally:
            self.run("iptables", "-D", *rule)

    @contextlib.contextmanager
    def limit(self, mbit: float) -> Iterator[None]:
        """All that it sends and receives goes at `mbit` Mbit/s at most, each way."""
        with namespaces.limited(mbit, (self._link, self.network.switch_pid), ("eth0", self.pid)):
            yield


def own_python() -> list[str]:
    """The prefix of the Python that runs this, unless hosts have one of its minor version anyway."""
    hidden = any(f"{sys.base_prefix}/".startswith(f"{path}/") for path in HIDDEN)
    system = Path(f"/usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}")
    return [sys.base_prefix] if hidden and not system.exists() else []


def make_key(file: Path, *options: str) -> None:
    """A new pair of keys: `file`, and with ``.pub``."""
    kind = [] if "-t" in options else ["-t", "ed25519"]
    subprocess.run(["ssh-keygen", "-q", *kind, "-N", "", "-C", "test", "-f", file, *options], check=True)
