"""``bigmachine info``: what a packed file is, and what each platform gets of it.

With ``--json``: ``file``, ``size`` (bytes), ``name``, ``entry``, ``python``, ``bigmachine`` (its version), ``builder``,
``digest``, ``origin`` (where its requirements were found), ``requirements``, and ``platforms``, a list of:

- ``platform``, ``python``,
- ``total`` and ``worker``: ``parts`` (how many), ``size`` and ``packed`` (bytes, unpacked and as sent),
- ``parts``, a list of ``name``, ``version``, ``kind`` (``"code"``, the user's own, or ``"distribution"``), ``digest``,
  ``size``, ``packed``, and ``worker``: whether a worker gets it.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..pack.archive import Contents, read_contents, verify
from ..pack.image import Manifest, Part
from .text import number, size, table


def run(arguments: Namespace) -> str:
    """About the file that `arguments` name, as text or as JSON. Raises `PackError` where it is not whole."""
    path: Path = arguments.file
    verify(path)
    contents = read_contents(path)
    taken = path.stat().st_size
    if arguments.json:
        return json.dumps(as_json(path, taken, contents), indent=1)
    return "\n".join(describe(path, taken, contents))


def describe(path: Path, taken: int, contents: Contents) -> Iterator[str]:
    """Lines: the program, then a table for each platform. `taken` is the file's size."""
    yield f"{path}: {size(taken)}"
    facts = [
        ("program", contents.name),
        ("runs", contents.entry),
        ("Python", contents.python),
        ("digest", contents.digest),
        ("made by", f"{contents.builder}, bigmachine {contents.version}"),
        ("requirements", contents.origin),
    ]
    yield from table([(f"{name}:", value) for name, value in facts])
    for line in contents.requirements:
        yield f"    {line}"
    for manifest in contents.platforms:
        yield ""
        yield from _describe_platform(manifest)


def as_json(path: Path, taken: int, contents: Contents) -> dict[str, object]:
    """As the module's docstring says."""
    return {
        "file": str(path),
        "size": taken,
        "name": contents.name,
        "entry": contents.entry,
        "python": contents.python,
        "bigmachine": contents.version,
        "builder": contents.builder,
        "digest": contents.digest,
        "origin": contents.origin,
        "requirements": list(contents.requirements),
        "platforms": [
            {
                "platform": manifest.platform,
                "python": manifest.python,
                "total": _sums(manifest.parts),
                "worker": _sums(manifest.worker()),
                "parts": [_part(part) for part in manifest.parts],
            }
            for manifest in contents.platforms
        ],
    }


def _describe_platform(manifest: Manifest) -> Iterator[str]:
    yield f"{manifest.platform}, Python {manifest.python}"
    rows = [("part", "version", "size", "sent as", "worker")]
    for part in manifest.parts:
        name = "(its own code)" if part.kind == "code" else part.name
        rows.append((name, part.version, size(part.size), size(part.packed), "yes" if part.worker else ""))
    yield from table(rows, right=frozenset({2, 3}))
    sums = [_total("a worker gets", manifest.worker()), _total("in all", manifest.parts)]
    yield from table(sums, right=frozenset({1, 2, 3}))


def _total(title: str, parts: Iterable[Part]) -> tuple[str, str, str, str]:
    sums = _sums(parts)
    return f"{title}:", number(sums["parts"], "part"), size(sums["size"]), f"{size(sums['packed'])} sent"


def _sums(parts: Iterable[Part]) -> dict[str, int]:
    parts = list(parts)
    return {"parts": len(parts), "size": sum(part.size for part in parts), "packed": sum(part.packed for part in parts)}


def _part(part: Part) -> dict[str, object]:
    return {
        "name": part.name,
        "version": part.version,
        "kind": part.kind,
        "digest": part.digest,
        "size": part.size,
        "packed": part.packed,
        "worker": part.worker,
    }
