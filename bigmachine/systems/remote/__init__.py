"""What systems have in common whose machines are hosts with nothing but Python: the driver's side of the agent.

A launcher starts agents (`source`), however that is done where its hosts are, and gives each to a `deliver.Delivery`: the parts
of the program that the host lacks are sent, and the agent becomes the machine.
"""

from __future__ import annotations

import secrets
from functools import cached_property
from ssl import SSLContext

from ...authority import Authority
from ...credentials import Credentials, Role, client_context
from ...errors import BigmachineError, Unreachable


class RemoteHostError(BigmachineError):
    """``host`` could not be made a machine: ``reason``, in its agent's words. It would be the same again."""

    def __init__(self, host: str, reason: str) -> None:
        super().__init__(host, reason)
        self.host = host
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.host}: {self.reason}"


class AgentUnreachable(Unreachable):
    """The agent at ``address`` did not answer, or the connection to it broke, again and again."""

    def __str__(self) -> str:
        return f"the agent at {self.address} is unreachable: {self.reason}"


class Trust:
    """A launcher's own authority, for bootstraps alone: an agent trusts this driver, and nobody else of its session."""

    def __init__(self) -> None:
        self._authority = Authority(f"b-{secrets.token_hex(4)}")

    def agent(self, launch_id: str) -> Credentials:
        """What the agent of that launch proves itself with. Raises `BadIdentity`."""
        return self._authority.issue(Role.AGENT, launch_id)

    @cached_property
    def context(self) -> SSLContext:
        """The driver's, for `client.AgentClient`."""
        return client_context(self._authority.issue(Role.DRIVER, self._authority.session))
