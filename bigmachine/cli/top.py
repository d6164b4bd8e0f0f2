"""``bigmachine top``: what the machines of a running driver do, live on a terminal (`screen`); elsewhere printed once.

With ``--json``: the document that `bigmachine.inside.status` describes.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace

from .attach import Driver
from .terminal import is_live
from .view import View, printed


def run(arguments: Namespace) -> str:
    """Show what the driver says that `arguments` name, until the user leaves. Raises `Gone` when the driver does."""
    driver = Driver.at(arguments.address)
    document = driver.json("status.json")
    view = View(arguments.sort, arguments.filter)
    if arguments.json:
        return json.dumps(document, indent=1)
    if arguments.once or not is_live(sys.stdout, os.environ):
        return "\n".join(printed(document, view))
    from .screen import watch  # rich, and what it takes to read keys: only for terminals.

    watch(driver, document, view)
    return ""
