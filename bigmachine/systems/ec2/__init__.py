"""The system ``ec2``: machines are instances in AWS. See `system`."""

from .system import Ec2Launcher

__all__ = ["Ec2Launcher"]
