"""``bigmachine config``: what is set for machines of each system, and where.

The output is TOML, with the origins as comments: it may stand in a ``bigmachine.toml``. ``--json``: for each system an
object, by key, of ``value``, ``origin`` (``"default"``, ``"flag -bigm.ec2type"``, ``"environment BIGMACHINE_EC2_TYPE"``,
``"[ec2] in FILE"``), ``flag`` and ``variable``, by which it can be set, and ``about`` (words).
"""

from __future__ import annotations

import importlib
import json
from argparse import Namespace
from collections.abc import Mapping

from ..driver import FLAGS, PREFIX
from ..errors import UsageError
from ..settings import Section, fields, load

SECTIONS = {
    "session": "bigmachine.inside.settings",
    "local": "bigmachine.systems.local",
    "ssh": "bigmachine.systems.ssh.settings",
    "ec2": "bigmachine.systems.ec2.settings",
}
"""By system (and ``session``, for what all have): the module with its ``Settings``; only those that are shown are imported."""


def run(arguments: Namespace) -> str:
    """The settings of the system that `arguments` name, or of all. Raises `UsageError` where one cannot be."""
    system = arguments.system or arguments.flags.get("system")
    if system is not None and system not in SECTIONS:
        raise UsageError(f"no such system, or without settings: {system!r}; there are {', '.join(SECTIONS)}")
    chosen = {name: _settings(name, arguments.flags) for name in ([system] if system is not None else SECTIONS)}
    if arguments.json:
        return json.dumps({system: as_json(system, settings) for system, settings in chosen.items()}, indent=1)
    return "\n\n".join(f"[{system}]\n{settings}" for system, settings in chosen.items())


def _settings(system: str, flags: Mapping[str, object]) -> Section:
    kind: type[Section] = importlib.import_module(SECTIONS[system]).Settings
    own = {each.flag for each in fields(kind, system)}
    return load(kind, system, {name: value for name, value in flags.items() if name in own})


def as_json(system: str, settings: Section) -> dict[str, object]:
    """As the module's docstring says."""
    return {
        each.key: {
            "value": getattr(settings, each.field),
            "origin": settings.origin(each.field),
            "flag": f"-{PREFIX}{each.flag}",
            "variable": each.variable,
            "about": FLAGS[each.flag][1],
        }
        for each in fields(settings, system)
    }
