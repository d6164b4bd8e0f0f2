"""``bigmachine cache``: what packing has kept (``info``), and away with it (``clear``).

``info --json``: ``path``, ``bytes``, and ``kinds``: a list of ``kind``, ``what`` (words), ``entries`` (how many) and ``bytes``.
"""

from __future__ import annotations

import json
from argparse import Namespace

from ..cache import KINDS, VARIABLE, Cache
from .text import number, size, table


def run(arguments: Namespace) -> str:
    """Do the action that `arguments` name. Raises `CacheError`."""
    cache = Cache()
    if arguments.action == "clear":
        return f"removed {size(cache.clear())} from {cache.root}"
    return json.dumps(as_json(cache), indent=1) if arguments.json else describe(cache)


def describe(cache: Cache) -> str:
    """A table of what there is."""
    usage = cache.usage()
    total = sum(kind.bytes for kind in usage)
    rows = [(kind.kind, number(kind.entries, "entry"), size(kind.bytes), KINDS[kind.kind]) for kind in usage]
    lines = table(rows, right=frozenset({1, 2}))
    return "\n".join([f"{cache.root}: {size(total)}; another directory: ${VARIABLE}", *lines])


def as_json(cache: Cache) -> dict[str, object]:
    """As the module's docstring says."""
    usage = cache.usage()
    return {
        "path": str(cache.root),
        "bytes": sum(kind.bytes for kind in usage),
        "kinds": [
            {"kind": kind.kind, "what": KINDS[kind.kind], "entries": kind.entries, "bytes": kind.bytes}
            for kind in usage
        ],
    }
