"""Real hosts on this one: network namespaces with a file system of their own and a real sshd. See `network`."""

from __future__ import annotations

import os

NOT_ASKED = "" if os.environ.get("BIGMACHINE_HOSTS") else "machines elsewhere, some minutes: BIGMACHINE_HOSTS=1"
"""Why tests of machines on other hosts, and of the agent that starts them, are left out."""
