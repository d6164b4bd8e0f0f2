"""One connection to one host: through other hosts where need be, to the host that it must be, as the user.

Every way in which that can fail is one line that says what to do. The host's key is verified whatever the configuration says
of StrictHostKeyChecking: a key that nobody has accepted is an error. paramiko's exceptions end here.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import shlex
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from paramiko import (
    Agent,
    AgentKey,
    AuthenticationException,
    BadAuthenticationType,
    PasswordRequiredException,
    PKey,
    SSHException,
    Transport,
)
from paramiko.ssh_exception import IncompatiblePeer

from ..remote import RemoteHostError
from .config import Target
from .known import DEFAULT_PORT, HostKey, Known, known

CONNECT_WITHIN = 20.0
"""Seconds until a connection stands; through another host, for both of them."""

STALE_AFTER = 30.0
"""Seconds between signs of life: routers forget connections that are silent for minutes."""

LOG = "bigmachine.ssh"
# Else paramiko's remarks go to standard error; what fails is raised.
logging.getLogger(LOG).addHandler(logging.NullHandler())


class _Key(NamedTuple):
    """A key to offer: `label` is what the user knows it by."""

    key: PKey
    label: str


class _Link(Transport):  # type: ignore[misc]  # paramiko carries no type information.
    """A connection that may go through another one, which ends with it."""

    def __init__(self, sock: Any, through: Transport | None) -> None:
        super().__init__(sock)
        self._through = through

    def close(self) -> None:
        super().close()
        if self._through is not None:
            self._through.close()


def connect(target: Target, within: float = CONNECT_WITHIN) -> Transport:
    """An authenticated connection to `target`. Raises `RemoteHostError`."""
    deadline = time.monotonic() + within
    with contextlib.ExitStack() as stack:
        last: Transport | None = None
        for each in (*target.jumps, target):
            link = _dial(each, last, deadline)
            stack.callback(link.close)
            last = _Link(link, last)
            stack.callback(last.close)
            _negotiate(each, last, deadline)
            _authenticate(each, last, deadline)
        assert last is not None
        last.set_keepalive(int(STALE_AFTER))
        stack.pop_all()
    return last


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.01)


# -- The way there -------------------------------------------------------------------------------------------------------


def _dial(target: Target, through: Transport | None, deadline: float) -> Any:
    """A socket to the host's sshd, or a channel of the host `through`."""
    place = f"{target.host}:{target.port}"
    if through is not None:
        try:
            there, timeout = (target.host, target.port), _left(deadline)
            return through.open_channel("direct-tcpip", there, ("127.0.0.1", 0), timeout=timeout)
        except (SSHException, EOFError) as error:
            reason = f"the host before it (ProxyJump) cannot connect to {place}: {error}; is it there?"
            raise RemoteHostError(target.name, reason) from error
    try:
        return socket.create_connection((target.host, target.port), _left(deadline))
    except socket.gaierror as error:
        reason = f"no such host name: {target.host}; check it, or give {target.name} a HostName in ~/.ssh/config"
        raise RemoteHostError(target.name, reason) from error
    except TimeoutError as error:
        reason = f"no answer from {place} in time: is it up, and does a firewall let us through? `{_command(target)}` must work"
        raise RemoteHostError(target.name, reason) from error
    except ConnectionRefusedError as error:
        reason = f"nothing listens at {place}: start sshd there, or give the right port: {target.name}:PORT"
        raise RemoteHostError(target.name, reason) from error
    except OSError as error:
        reason = f"cannot connect to {place}: {error.strerror or error}; `{_command(target)}` must work"
        raise RemoteHostError(target.name, reason) from error


def _command(target: Target) -> str:
    """What to try by hand."""
    port = [] if target.port == DEFAULT_PORT else ["-p", str(target.port)]
    return shlex.join(["ssh", *port, f"{target.user}@{target.name}"])


def _negotiate(target: Target, transport: Transport, deadline: float) -> None:
    """Encrypt, and make sure that it is the right host."""
    transport.daemon = True
    transport.set_log_channel(LOG)
    transport.banner_timeout = transport.handshake_timeout = _left(deadline)
    ours = known(_texts(target.known), target.place)
    _prefer(transport, ours.keys)
    try:
        transport.start_client(timeout=_left(deadline))
        if not transport.initial_kex_done:
            raise SSHException("it says nothing more")
    except IncompatiblePeer as error:
        raise RemoteHostError(target.name, f"no common ground with its sshd: {error}; update it") from error
    except (SSHException, EOFError, OSError) as error:
        reason = f"no sshd at {target.host}:{target.port}: {error or 'it hangs up'}; `{_command(target)}` must work"
        raise RemoteHostError(target.name, reason) from error
    shown = transport.get_remote_server_key()
    if (problem := _distrust(target, HostKey(shown.get_name(), shown.asbytes()), ours)) is not None:
        raise RemoteHostError(target.name, problem)


def _texts(files: Sequence[Path]) -> Iterator[str]:
    for file in files:
        with contextlib.suppress(OSError):  # Most have one of them.
            yield file.read_text("utf-8", errors="replace")


def _prefer(transport: Transport, keys: Sequence[HostKey]) -> None:
    """Ask for a key of a kind that is known: hosts have several."""
    signed = {"ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256")}
    kinds = [kind for key in keys for kind in signed.get(key.kind, (key.kind,))]
    options = transport.get_security_options()
    first = [kind for kind in dict.fromkeys(kinds) if kind in options.key_types]
    options.key_types = (*first, *(kind for kind in options.key_types if kind not in first))


def _distrust(target: Target, shown: HostKey, ours: Known) -> str | None:
    """What is wrong with the key that the host has shown. Pure."""
    file = target.known[0] if target.known else "~/.ssh/known_hosts"
    port = "" if target.port == DEFAULT_PORT else f" -p {target.port}"
    if shown in ours.revoked:
        return f"its key is revoked: {shown}; find out why before you connect ({file})"
    if shown in ours.keys:
        return None
    if ours.keys:
        return (
            f"its key has changed: known is {ours.keys[0]}, shown was {shown}; if the host was set up anew, "
            f"`ssh-keygen -R {shlex.quote(target.place)} -f {file}`, else somebody may be in between"
        )
    return (
        f"its key is unknown: {shown}; if it is the host's own, accept it: `{_command(target)}`, "
        f"or `ssh-keyscan{port} {target.host} >> {file}`"
    )


# -- Who we are ----------------------------------------------------------------------------------------------------------


def _authenticate(target: Target, transport: Transport, deadline: float) -> None:
    tried: list[str] = []
    unusable: list[str] = []
    with contextlib.ExitStack() as stack:
        for key, label in _keys(target, _held(stack), unusable):
            transport.auth_timeout = _left(deadline)
            tried.append(label)
            try:
                if more := transport.auth_publickey(target.user, key):
                    raise BadAuthenticationType("", more)
                return
            except BadAuthenticationType as error:
                methods = ", ".join(error.allowed_types)
                reason = f"it wants {target.user} to log in by {methods}: allow him a key alone, there is nobody to ask"
                raise RemoteHostError(target.name, reason) from error
            except AuthenticationException:
                if not transport.is_active():
                    break  # It has had enough, or the time is up.
            except (SSHException, EOFError, OSError) as error:
                if not transport.is_active():
                    break
                unusable.append(f"{label}: {error}")
    raise RemoteHostError(target.name, _refused(target, tried, unusable, transport.is_active()))


def _refused(target: Target, tried: Sequence[str], unusable: Sequence[str], active: bool) -> str:
    why = f" ({'; '.join(unusable)})" if unusable else ""
    if not tried:
        return f"there is no key to log in with as {target.user}{why}: name one (IdentityFile), or give it to ssh-agent"
    many = "" if active else ", then it hung up: name the right one (IdentityFile) with IdentitiesOnly yes, or"
    return (
        f"it does not let {target.user} in with {', '.join(tried)}{why}{many or ';'} add the key there: "
        f"`{_command(target).replace('ssh', 'ssh-copy-id', 1)}`, or give the right user: USER@{target.name}"
    )


def _held(stack: contextlib.ExitStack) -> dict[bytes, AgentKey]:
    """The keys of ssh-agent, by their public halves; usable while the stack is open."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:  # Where nobody answers paramiko forgets to close its own.
            probe.connect(os.environ.get("SSH_AUTH_SOCK", ""))
        agent = Agent()
    except (SSHException, OSError):
        return {}
    stack.callback(agent.close)
    return {key.asbytes(): key for key in agent.get_keys()}


def _keys(target: Target, held: dict[bytes, AgentKey], unusable: list[str]) -> Iterator[_Key]:
    """The keys to offer, the most promising first; those that cannot be used are entered in `unusable`.

    First the ones that were named, by the agent where it has them, then the rest of the agent's: servers take few tries.
    """
    for file in target.identities:
        public = _public(file)
        if public in held:
            yield _Key(held.pop(public), f"{file} (ssh-agent)")
            continue
        try:
            yield _Key(PKey.from_path(file), str(file))
        except FileNotFoundError:
            continue  # As a default it need not be there; where it was named, it shows by its absence.
        except (PasswordRequiredException, TypeError):  # The latter out of cryptography.
            unusable.append(f"{file} has a passphrase: `ssh-add {file}`")
        except (SSHException, ValueError, OSError) as error:
            unusable.append(f"{file} cannot be used: {error}")
    if not target.only:
        for key in held.values():
            yield _Key(key, f"{key.comment or key.get_name()} (ssh-agent)")


def _public(file: Path) -> bytes:
    """The public half of the key in `file`, where that is beside it; empty where it is not."""
    try:
        fields = (file if file.suffix == ".pub" else file.with_name(f"{file.name}.pub")).read_text("utf-8").split()
        return base64.b64decode(fields[1])
    except (OSError, ValueError, IndexError):
        return b""
