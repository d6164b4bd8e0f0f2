"""What an instance is told at its first boot: user-data, for cloud-init. Pure; what comes out is held by golden files.

Theory of operation
-------------------
All is done by `bootcmd`, the first thing that cloud-init does with a cloud-config, by units without the usual dependencies,
while the boot goes on. (From the start of process 1 to the agent's, in containers: 1.0 s with Debian 12, 0.9 s with 13; with
`runcmd` 2.1 and 1.2 s. A boothook would be 0.15 s earlier, but cloud-init keeps those on disk as programs.) In this order:

1. A dead man's switch: a loop that powers the host off when the uptime that stands in `UNTIL` has passed. The agent writes it
   there whenever a driver talks to it, then the supervisor at each keepalive. It is counted in seconds since the start, so that
   nobody's setting of a clock matters. The kernel spares the loop when memory runs out, and its end is the host's, too.
2. What ends a reboot: a unit that the *next* boot finds, and which powers off. A kernel that panics reboots after ten seconds.
3. The data space, where there is one: volumes without content are striped by the device mapper, which most images have (mdadm
   and LVM few), and get a file system without a journal: the data do not outlive the host.
4. The agent, by the image's own Python, as root: the host is the program's alone. Its end, however it comes, is the host's. It
   becomes the supervisor, by exec. Its text is read by the interpreter from a file in memory, which is removed then.
5. Units of the user's own, as they are.
6. Nothing updates itself here.

The agent's text holds the private key of a certificate that is good for being bootstrapped by this launch's driver, and for
nothing else. cloud-init keeps user-data, readable by root alone, and the metadata service repeats it to every process of the
instance: to those whom the driver sends there. It is in no argument, environment or log.
"""

from __future__ import annotations

import gzip
import quopri
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError

MAX_USER_DATA = 16384
"""Bytes that EC2 takes, before base64."""

FOLDER = "/run/bigmachine"
UNTIL = f"{FOLDER}/until"
BEGUN = f"{FOLDER}/begun"
"""The uptime at which cloud-init came to us."""

DATA = "/mnt/data"

AGENT_SETTINGS: Mapping[str, Any] = {
    "deadman": UNTIL,
    "ages": {"cloud-init": BEGUN},
    "notices": "http://169.254.169.254",
}
"""What `bootstrap.agent.main` has to know of this."""

UNIT_NAME = re.compile(r"[A-Za-z0-9:_.\\-]+(@[A-Za-z0-9:_.\\-]*)?\.(service|socket|mount|swap|target|path|timer|slice)")

KINDS = {
    "#cloud-config-archive": "cloud-config-archive",
    "#cloud-config": "cloud-config",
    "#cloud-boothook": "cloud-boothook",
    "#include": "x-include-url",
    "## template: jinja": "jinja2",
    "#!": "x-shellscript",
}
"""How cloud-init tells the kinds of parts from each other: what they begin with, and the MIME type's second half."""

BOUNDARY = "=-=-bigmachine-=-="

MERGE = "list(append)+dict(no_replace,recurse_list)+str()"
"""How a part is merged with those before it, unless it says how itself: lists grow, what was said first counts."""

MERGE_OURS = "list(prepend)+dict(no_replace,recurse_list)+str()"
"""Ours is the last, so that no other can replace it, and its commands come first."""


@dataclass(frozen=True)
class UserData:
    """What goes into one. `agent` is `systems.remote.source.agent_text`; `dataspace` is ``""`` (none), ``"nvme"`` (the
    instance's own disks) or ``"ebs"`` (blank volumes), of which there are `volumes` (0: at least one); `cloudconfig` are
    further parts and `units` systemd units, each (name, content); `nofile` is how many files a process may open;
    `first_contact` how many seconds a driver has before the host ends."""

    agent: str
    dataspace: str = ""
    volumes: int = 0
    cloudconfig: Sequence[tuple[str, str]] = ()
    units: Sequence[tuple[str, str]] = ()
    nofile: int = 1 << 20  # The kernel's own limit (fs.nr_open), unless somebody raises it.
    first_contact: int = 900  # The agent waits 600 s for a driver; this is for hosts that do not get as far as that.


# -- Scripts and units ---------------------------------------------------------------------------------------------------

DEADMAN = f"""\
read -r up rest </proc/uptime
until=$((${{up%.*}} + $1))
while read -r up rest </proc/uptime; [ "${{up%.*}}" -lt "$until" ]; do
  sleep 5
  [ -r {UNTIL} ] && read -r said rest <{UNTIL} && case $said in
    ''|*[!0-9]*) ;;
    *) until=$said ;;
  esac
done
echo 'bigmachine: nobody has said that this host is used: power off'
systemctl poweroff --force &
sleep 20
systemctl poweroff --force --force
"""
"""Its argument: the seconds of the first period."""

DEADMAN_UNIT = f"""\
[Unit]
Description=bigmachine dead man's switch
DefaultDependencies=no
IgnoreOnIsolate=yes
SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
ExecStart=/bin/sh {FOLDER}/deadman {{seconds}}
StandardOutput=journal+console
OOMScoreAdjust=-1000
"""

ONCE_UNIT = f"""\
[Unit]
Description=bigmachine: no second boot
DefaultDependencies=no
ConditionPathExists=!{BEGUN}
[Service]
Type=oneshot
ExecStart=/usr/bin/systemctl poweroff --force --force
"""

DATA_SCRIPT = f"""\
set -eu
kind=$1 want=$2
disks() {{
  for path in /sys/block/*; do
    name=${{path##*/}} model=
    [ -r "$path/device/model" ] && read -r model <"$path/device/model"
    case $kind:$name:$model in
      nvme:nvme*:*'Instance Storage'*|ebs:nvme*:*'Elastic Block Store'*|ebs:xvd*) ;;
      *) continue ;;
    esac
    for used in "$path"/"$name"* "$path"/holders/*; do
      [ ! -e "$used" ] || continue 2
    done
    rc=0
    blkid -p /dev/"$name" >/dev/null 2>&1 || rc=$?
    [ $rc != 2 ] || echo /dev/"$name"
  done
}}
tries=60
until set -- $(disks); [ $# -ge "$want" ]; do
  tries=$((tries - 1))
  if [ $tries = 0 ]; then
    echo "bigmachine: no data space: $want blank $kind volumes wanted, $# found"
    exit 1
  fi
  sleep 0.5
done
device=$1
if [ $# -gt 1 ] && ! command -v dmsetup >/dev/null; then
  echo "bigmachine: no dmsetup on this image: the data space is one volume of $#"
elif [ $# -gt 1 ]; then
  size= stripes=
  for disk; do
    sectors=$(blockdev --getsz "$disk")
    [ -n "$size" ] && [ "$size" -le "$sectors" ] || size=$sectors
    stripes="$stripes $disk 0"
  done
  modprobe dm_mod || :
  dmsetup create bigmachine --table "0 $((size / 512 * 512 * $#)) striped $# 512$stripes"
  device=/dev/mapper/bigmachine
fi
mkfs.ext4 -q -F -m 0 -O ^has_journal -E nodiscard,lazy_itable_init=1 "$device"
mkdir -p {DATA}
mount -o noatime "$device" {DATA}
rmdir {DATA}/lost+found
chmod 1777 {DATA}
"""
"""Its arguments: the kind, and how many."""

DATA_UNIT = f"""\
[Unit]
Description=bigmachine data space
DefaultDependencies=no
FailureAction=poweroff-force
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh {FOLDER}/data {{kind}} {{volumes}}
StandardOutput=journal+console
"""

AGENT_UNIT = f"""\
[Unit]
Description=bigmachine
DefaultDependencies=no
Conflicts=shutdown.target
After=systemd-tmpfiles-setup.service
Before=shutdown.target
{{after}}SuccessAction=poweroff-force
FailureAction=poweroff-force
[Service]
Type=exec
ExecStart=/usr/bin/python3 -I -
ExecStartPost=/bin/rm {FOLDER}/agent.py
StandardInput=file:{FOLDER}/agent.py
StandardOutput=journal+console
WorkingDirectory=/root
Environment=HOME=/root LANG=C.UTF-8{{environ}}
LimitNOFILE={{nofile}}
TasksMax=infinity
OOMScoreAdjust=-100
OOMPolicy=continue
KillMode=mixed
TimeoutStopSec=10
"""
"""A service process is offered to the kernel 100 points before its supervisor: as everybody else, that is, and it is bigger. If
one is taken the supervisor says so: by default systemd would end them all. And when the host goes down it is the supervisor
that ends them: else it would have to tell of deaths. systemd-tmpfiles-setup, which is done long before the network as a rule,
empties /tmp: that must not happen to a program that runs."""

UPDATES = "apt-daily.timer apt-daily-upgrade.timer unattended-upgrades.service dnf-automatic.timer dnf-makecache.timer"

SYSTEM = "/run/systemd/system"


def _script(data: UserData) -> Iterator[str]:
    """The lines of `bootcmd`. There is no ``set -e``: whatever fails, what comes after it is tried, and the switch is there."""
    units = ["bigmachine-deadman.service"]
    yield f"mkdir -p -m 700 {FOLDER}"
    yield f"read -r up rest </proc/uptime; echo $up >{BEGUN}"
    yield from _file(f"{FOLDER}/deadman", DEADMAN)
    yield from _file(f"{SYSTEM}/{units[0]}", DEADMAN_UNIT.format(seconds=data.first_contact))
    yield _start(units[0])
    yield from _file("/etc/systemd/system/bigmachine-once.service", ONCE_UNIT)
    yield "mkdir -p /etc/systemd/system/sysinit.target.wants"
    yield "ln -sf ../bigmachine-once.service /etc/systemd/system/sysinit.target.wants/"
    yield "2>/dev/null echo 10 >/proc/sys/kernel/panic"
    after = environ = ""
    if data.dataspace:
        yield from _file(f"{FOLDER}/data", DATA_SCRIPT)
        unit = DATA_UNIT.format(kind=data.dataspace, volumes=max(1, data.volumes))
        yield from _file(f"{SYSTEM}/bigmachine-data.service", unit)
        after = "Requires=bigmachine-data.service\nAfter=bigmachine-data.service\n"
        environ = f" TMPDIR={DATA}"
    yield from _file(f"{FOLDER}/agent.py", data.agent)
    agent = AGENT_UNIT.format(after=after, environ=environ, nofile=data.nofile)
    yield from _file(f"{SYSTEM}/bigmachine.service", agent)
    yield _start("bigmachine.service")
    for name, content in data.units:
        yield from _file(f"{SYSTEM}/{name}", content)
    if data.units:
        yield _start(" ".join(name for name, _ in data.units))
    yield f"systemctl --no-block stop {UPDATES} 2>/dev/null || :"


def _start(units: str) -> str:
    """systemd finds a unit that it has never heard of; only where it does not, all are read again, which takes longer."""
    start = f"systemctl --no-block start {units}"
    return f"{start} || {{ systemctl daemon-reload; {start}; }}"


def _file(path: str, content: str) -> Iterator[str]:
    """A file, readable by root alone. The shell passes it on in memory."""
    end = "END"
    while end in content.split("\n"):
        end += "_"
    yield f"(umask 077; cat >{path}) <<'{end}'"
    yield from content.rstrip("\n").split("\n")
    yield end


# -- The whole -----------------------------------------------------------------------------------------------------------


def cloud_config(data: UserData) -> str:
    """The cloud-config of `data`, without the further parts. Raises `UsageError`."""
    for name, content in data.units:
        if not UNIT_NAME.fullmatch(name):
            raise UsageError(f"{name}: not the name of a systemd unit, such as example.service")
        if "[" not in content:
            raise UsageError(f"{name}: no section in it; a systemd unit begins with [Unit]")
    if data.dataspace not in ("", "nvme", "ebs"):
        raise ValueError(f"no such data space: {data.dataspace!r}")
    # Escapes are the same to Python, and some layers between here and there take ASCII only.
    agent = data.agent.encode("ascii", "backslashreplace").decode()
    script = _script(UserData(**{**vars(data), "agent": agent}))
    return "#cloud-config\nbootcmd:\n- |\n" + "".join(f"  {line}\n" if line else "\n" for line in script)


def user_data(data: UserData) -> bytes:
    """What an instance is launched with, before base64. Raises `UsageError` where it is too long, or cloud-init would not know
    what it is."""
    text = cloud_config(data)
    if data.cloudconfig:
        text = _multipart(text, data.cloudconfig)
    packed = gzip.compress(text.encode(), 9, mtime=0)
    if len(packed) > MAX_USER_DATA:
        raise UsageError(_too_long(data, len(packed)))
    return packed


def _multipart(ours: str, others: Sequence[tuple[str, str]]) -> str:
    parts = [f'MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary="{BOUNDARY}"\n']
    for name, content in (*others, ("bigmachine", ours)):
        header = f'Content-Type: text/{_kind(name, content)}; charset="utf-8"\n'
        header += f"Merge-Type: {MERGE_OURS if content is ours else MERGE}\n"
        if content.isascii():
            parts.append(f"{header}\n{content}")
        else:
            encoded = quopri.encodestring(content.encode()).decode()  # It is to be compressed, which base64 would spoil.
            parts.append(f"{header}Content-Transfer-Encoding: quoted-printable\n\n{encoded}")
    return f"\n--{BOUNDARY}\n".join(parts) + f"\n--{BOUNDARY}--\n"


def _kind(name: str, content: str) -> str:
    if BOUNDARY in content:
        raise UsageError(f"{name}: is bigmachine's own user-data; give what is to be added to it")
    for beginning, kind in KINDS.items():
        if content.startswith(beginning):
            return kind
    first = content.partition("\n")[0][:60]
    raise UsageError(f"{name}: cloud-init would not know what it is: its first line must be #cloud-config, not {first!r}")


def _too_long(data: UserData, size: int) -> str:
    extra = sorted((*data.cloudconfig, *data.units), key=lambda part: -len(gzip.compress(part[1].encode())))
    listed = ", ".join(f"{name} ({len(gzip.compress(content.encode())):,})" for name, content in extra)
    advice = f"leave out, or shorten, of cloudconfig and units: {listed}" if extra else "and none of it is yours: a bug"
    return f"user-data has {size:,} bytes, compressed, EC2 takes {MAX_USER_DATA:,}; {advice}"
