"""``bigmachine status``: how the machines of a running driver are, as text.

With ``--json``: what the page gets, ``status.json``; `bigmachine.inside.status` has its keys.
"""

from __future__ import annotations

import json
from argparse import Namespace

from .attach import Driver


def run(arguments: Namespace) -> str:
    """What the driver says that `arguments` name. Raises `BigmachineError` where there is none."""
    driver = Driver.at(arguments.address)
    if arguments.json:
        return json.dumps(driver.json("status.json"), indent=1)
    return driver.text("status").rstrip("\n")
