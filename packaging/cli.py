"""Make the packed command line, ``bigmachine.pex``: one file with which programs are packed where nothing is installed.

    python packaging/cli.py [--platform NAME]... [--python VERSION]... [-o dist/bigmachine.pex]

For all platforms and this Python, unless others are named. It is made with pex itself, not with ``bigmachine pack``, which
leaves out what only packing needs. It has pex's venv form, with a script for ``/bin/sh`` in front: the command line executes
pex and pip as modules of its own interpreter, which they are not in a plain zip archive; and it starts faster.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bigmachine.info import python_version
from bigmachine.pack.platforms import NAMES, load

CHECKOUT = Path(__file__).resolve().parent.parent


def make(output: Path, names: Sequence[str], pythons: Sequence[str]) -> None:
    """Write `output`. Raises CalledProcessError where pip or pex has failed, and has said why."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--wheel-dir", work, CHECKOUT], check=True)
        (wheel,) = work.glob("bigmachine-*.whl")
        options = ["--script", "bigmachine", "--venv", "prepend", "--sh-boot", "--no-build"]
        options += ["--resolver-version", "pip-2020-resolver", "--use-pip-config"]
        for name in names:
            for python in pythons:
                file = work / f"{name.replace('/', '-')}-{python}.json"
                file.write_text(load(name, python).complete(), "utf-8")
                options += ["--complete-platform", str(file)]
        output.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "pex", *options, "--output-file", output, wheel],
            check=True,
            stdout=subprocess.DEVNULL,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", action="append", metavar="NAME", choices=NAMES, help=", ".join(NAMES))
    parser.add_argument("--python", action="append", metavar="VERSION", help="such as 3.12 (default: this one)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", default=CHECKOUT / "dist" / "bigmachine.pex")
    options = parser.parse_args()
    try:
        make(options.output, options.platform or NAMES, options.python or [python_version()])
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    print(f"{os.path.relpath(options.output)}: {options.output.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
