"""Make this host fit for tests of machines elsewhere, and of the debug page: install Debian's packages for them, and make the
machines' file systems.

    PYTHONPATH=tests python -m hosts

Only root can, on Debian; elsewhere, and where something cannot be had, it says so, and tests that need it say so again when
they are left out. It is not a failure.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

from . import browser, ec2, namespaces, network, roots


def main() -> None:
    if network.unavailable() or namespaces.unavailable(ec2.NEEDED, ec2.PACKAGES):
        install([*network.PACKAGES.split(), *ec2.PACKAGES.split()])
    if browser.unavailable():  # By itself: not every Debian has this one, as a package.
        install(browser.PACKAGES.split())
    network.unavailable.cache_clear()
    if reason := network.unavailable():
        print(f"no hosts for tests: {reason}")
    if reason := browser.unavailable():
        print(f"no browser for tests: {reason}")
    with ThreadPoolExecutor() as pool:  # mmdebstrap mostly waits: for the mirror, and for the disk.
        reasons = {reason for reason in pool.map(ec2.unavailable, roots.SUITES) if reason}
    for reason in sorted(reasons):
        print(f"no cloud for tests: {reason}")


def install(packages: list[str]) -> None:
    """Install what is missing of these, if there is somebody to do it."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-qq"]
    for command in ([*apt, "update"], [*apt, "install", "--yes", "--no-install-recommends", *sorted(set(packages))]):
        done = subprocess.run(command, capture_output=True, text=True, env=environ)
        if done.returncode:
            print(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")
            return


if __name__ == "__main__":
    main()
