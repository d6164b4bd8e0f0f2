"""Which builders there are."""

from __future__ import annotations

from ...errors import PackError
from . import Builder
from .pex import Pex
from .shiv import Shiv

BUILDERS: dict[str, type[Builder]] = {"pex": Pex, "shiv": Shiv}


def find_builder(name: str) -> Builder:
    """Raises `PackError` where there is none of this name."""
    if name not in BUILDERS:
        raise PackError(f"no such builder: {name}; there are {', '.join(BUILDERS)}")
    return BUILDERS[name]()
