"""What can be set for machines that are reached by SSH. `bigmachine.settings` tells where."""

from __future__ import annotations

from dataclasses import dataclass

from ...settings import Section, setting

SECTION = "ssh"

DEFAULT = "~/.ssh/config"
"""ssh's own configuration; it need not be there."""


@dataclass(frozen=True, kw_only=True)
class Settings(Section):
    """The settings of `SshLauncher`; what each means stands with its flag, in `driver.FLAGS`. Raises `UsageError` on values
    that cannot be."""

    hosts: tuple[str, ...] = setting((), flag="hosts", such=("ada", "grace:2222"))
    config: str = setting(DEFAULT, path=True)
    tunnel: bool = setting(False)
    platforms: tuple[str, ...] = setting(("linux/amd64",))
    port: int = setting(0, flag="port")
    maxprocs: int = setting(0, flag="maxprocs")

    def __post_init__(self) -> None:
        if not self.platforms:
            raise self.wrong("platforms", "no platforms: such as linux/amd64,linux/arm64")
        if not 0 <= self.port <= 65535:
            raise self.wrong("port", f"not a port: {self.port}")
        if self.maxprocs < 0:
            raise self.wrong("maxprocs", f"maxprocs must be at least 1, or 0 for a host's cores: {self.maxprocs}")
