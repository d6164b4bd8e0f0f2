"""``bigmachine pack``: make one file of a program.

With ``--json``: ``file``, ``size`` (bytes), ``digest`` (the program's, which driver and workers compare), ``name``, ``entry``,
``python``, ``builder``, ``origin`` (where its requirements were found), ``requirements``, ``platforms`` (names), ``seconds``,
``reused`` (what came from the cache: ``"dependencies"``, or ``""``) and ``notes`` (lines for the user).
"""

from __future__ import annotations

import json
from argparse import Namespace

from ..cache import Cache
from ..errors import PackError, UsageError
from ..info import python_version
from ..pack import build, platforms
from .terminal import progress
from .text import size


def run(arguments: Namespace) -> str:
    """Pack what `arguments` name. Returns one line about the result, or its JSON; "" with ``--quiet``."""
    request = make_request(arguments)
    with progress(silent=arguments.quiet or arguments.json) as shown:
        result = build.pack(request, Cache(), shown)
        for note in result.notes:
            shown.note(note)
    if arguments.json:
        return json.dumps(as_json(result), indent=1)
    return "" if arguments.quiet else summary(result)


def make_request(arguments: Namespace) -> build.Request:
    """What is asked for. Raises `UsageError` for names that do not exist."""
    if arguments.builder not in build.BUILDERS:
        raise UsageError(f"no such builder: {arguments.builder}; there are {', '.join(build.BUILDERS)}")
    for name in arguments.platform or [
        platforms.NAMES[0]
    ]:  # Where none is named, the Python is looked at all the same.
        try:
            platforms.load(name, arguments.python or python_version())
        except PackError as error:
            raise UsageError(error.reason) from None
    return build.Request(
        target=arguments.target,
        platforms=tuple(arguments.platform),
        python=arguments.python,
        builder=arguments.builder,
        output=arguments.output,
        requirements=tuple(arguments.requirements),
        project=arguments.project,
        add=tuple(arguments.add),
        refresh=arguments.refresh,
    )


def summary(result: build.Result) -> str:
    """``bigpi.pex: 1.4 MiB for linux/amd64, Python 3.11, in 0.8 s, dependencies from the cache, digest 0123456789ab``"""
    contents = result.contents
    names = ", ".join(manifest.platform for manifest in contents.platforms)
    return (
        f"{result.path}: {size(result.size)} for {names}, Python {contents.python}, in {result.seconds:.1f} s, "
        f"{result.reused or 'nothing'} from the cache, digest {contents.digest[:12]}"
    )


def as_json(result: build.Result) -> dict[str, object]:
    """As the module's docstring says."""
    contents = result.contents
    return {
        "file": str(result.path),
        "size": result.size,
        "digest": contents.digest,
        "name": contents.name,
        "entry": contents.entry,
        "python": contents.python,
        "builder": contents.builder,
        "origin": contents.origin,
        "requirements": list(contents.requirements),
        "platforms": [manifest.platform for manifest in contents.platforms],
        "seconds": round(result.seconds, 3),
        "reused": result.reused,
        "notes": list(result.notes),
    }
