"""Machines on hosts that you reach by SSH. The module `system` says how it works."""

from __future__ import annotations

from .system import SshLauncher

__all__ = ["SshLauncher"]
