"""Which hosts, and how each is reached: what the user has written down for bigmachine and for ssh."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paramiko import ConfigParseError, SSHConfig

from ...errors import UsageError
from ...settings import FILE
from .known import DEFAULT_PORT, place
from .settings import DEFAULT

KEYS = ("id_rsa", "id_ecdsa", "id_ed25519")
"""In ``~/.ssh``: tried where no IdentityFile is given, as ssh does."""

KNOWN = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")
GLOBAL_KNOWN = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")

MAX_INCLUDES = 16
"""Files deep, as in ssh."""

_SPEC = re.compile(r"((?P<user>[^@\s]+)@)?(\[(?P<v6>[:.%\w]+)\]|(?P<host>[^@:\s\[\]]+))(:(?P<port>\d{1,5}))?")


@dataclass(frozen=True)
class Target:
    """One way to a host: `name` is what the user calls it, `host` where it is. `jumps` are the hosts to go through, first
    the one that is reached directly; `only` says that no other keys than `identities` are to be offered."""

    name: str
    host: str
    port: int
    user: str
    identities: tuple[Path, ...] = ()
    only: bool = False
    known: tuple[Path, ...] = ()
    alias: str = ""
    jumps: tuple[Target, ...] = ()

    @property
    def place(self) -> str:
        """By which its key is known."""
        return self.alias or place(self.host, self.port)


def host_names(hosts: Sequence[str]) -> list[str]:
    """The hosts of the setting `hosts`, or those in the file that it names (``@FILE``), one a line. Raises `UsageError`, where
    there are none, too."""
    if len(hosts) == 1 and hosts[0].startswith("@"):
        file = hosts[0][1:]
        try:
            lines = Path(file).expanduser().read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the file with the hosts cannot be read: {file}: {error}") from error
        hosts = [line.partition("#")[0] for line in lines]
    names = [name.strip() for name in hosts if name.strip()]
    if not names:
        raise UsageError(f"no hosts: -bigm.hosts=ada,grace:2222, or @FILE with one a line, or [ssh] hosts in {FILE}")
    return names


class Config:
    """What ssh's own configuration says; a file that is not there says nothing, unless the user has named it."""

    def __init__(self, file: str) -> None:
        path = Path(file).expanduser()
        self._parsed = SSHConfig()
        if not path.exists() and file != DEFAULT:
            raise UsageError(f"no such ssh configuration: {file}")
        try:
            self._parsed.parse(_lines(path, path.parent, 0))
        except (OSError, UnicodeDecodeError, ConfigParseError) as error:
            raise UsageError(f"the ssh configuration cannot be read: {file}: {error}") from error

    def target(self, spec: str) -> Target:
        """The way to ``[user@]host[:port]``. Raises `UsageError`."""
        return self._target(spec, ())

    def _target(self, spec: str, through: tuple[str, ...]) -> Target:
        match = _SPEC.fullmatch(spec)
        if match is None or not 0 < int(match["port"] or 1) < 65536:
            raise UsageError(f"not a host: {spec!r}; it is [user@]host[:port], with an IPv6 address in brackets")
        name = match["host"] or match["v6"]
        try:
            options: Mapping[str, Any] = self._parsed.lookup(name)
            port = int(match["port"] or options.get("port", DEFAULT_PORT))
        except Exception as error:  # The user's own `Match exec` runs in there, among others.
            raise UsageError(f"the ssh configuration of {name} cannot be used: {error}") from error
        if options.get("proxycommand") and "proxyjump" not in options:
            raise UsageError(f"{name} has a ProxyCommand, which bigmachine does not use: give it a ProxyJump")
        jumps = [jump for jump in options.get("proxyjump", "").split(",") if jump and jump.lower() != "none"]
        if name in through:
            raise UsageError(f"the ssh configuration leads in a circle: {' → '.join((*through, name))}")
        given = tuple(Path(path).expanduser() for path in options.get("identityfile", ()) if path.lower() != "none")
        return Target(
            name,
            options["hostname"],
            port,
            match["user"] or options.get("user") or getpass.getuser(),
            given or tuple(Path("~/.ssh").expanduser() / key for key in KEYS),
            options.get("identitiesonly", "no").lower() == "yes",
            tuple(_paths(options, "userknownhostsfile", KNOWN) + _paths(options, "globalknownhostsfile", GLOBAL_KNOWN)),
            options.get("hostkeyalias", ""),
            tuple(self._jumps(jumps, (*through, name))),
        )

    def _jumps(self, specs: Sequence[str], through: tuple[str, ...]) -> Iterator[Target]:
        """Each is reached through the one before it; only the first one's own ProxyJump counts, as in ssh."""
        for index, spec in enumerate(specs):
            target = self._target(spec, through)
            if index == 0:
                yield from target.jumps
            yield Target(**{**vars(target), "jumps": ()})


def _paths(options: Mapping[str, Any], key: str, default: Sequence[str]) -> list[Path]:
    words = options[key].split() if key in options else default
    return [Path(word.strip('"')).expanduser() for word in words if word.lower() != "none"]


def _lines(file: Path, folder: Path, depth: int) -> Iterator[str]:
    """The lines of a configuration with those that it includes, which paramiko leaves to us."""
    if not file.exists():
        return
    if depth > MAX_INCLUDES:
        raise UsageError(f"the ssh configuration includes itself: {file}")
    section = "Host *"
    for line in file.read_text("utf-8").splitlines():
        keyword, _, rest = line.strip().replace("=", " ", 1).partition(" ")
        if keyword.lower() in ("host", "match"):
            section = line
        if keyword.lower() != "include":
            yield line
            continue
        for pattern in rest.split():
            path = Path(pattern.strip('"')).expanduser()
            root = Path(path.anchor) if path.is_absolute() else folder
            for included in sorted(root.glob(str(path.relative_to(path.anchor)))):
                yield from _lines(included, folder, depth + 1)
                yield section  # What the file began ends with it.
