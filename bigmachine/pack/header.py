"""The beginning of a packed file: a script for ``/bin/sh`` that finds the right Python and executes the file with it.

A shebang alone would say ``env: 'python3.11': No such file or directory``; this says which Python is wanted and which ones
there are, and notices a file whose end is missing. The shell reads no further than what it executes: the archive follows.
"""

from __future__ import annotations

import re

_BASE = 10**15
"""Added to the file's size, so that the number has as many digits whatever the size is, and no leading zeros (octal)."""

_PLACE = b"9999999999999999"
"""Where that number will stand."""

_HEADER = """\
#!/bin/sh
# {name}: packed by bigmachine {version} for Python {python}. `bigmachine info` tells what is in it.
set -eu
{warm}\
wanted=$(({place} - {base}))
size=$(($(wc -c < "$0")))
if [ "$size" -ne "$wanted" ]; then
    echo "bigmachine: $0 is damaged: it has $size of $wanted bytes; copy or pack it again" >&2
    exit 1
fi
found=""
for python in ${{PEX_PYTHON:+"$PEX_PYTHON"}} python{python} python3 python; do
    exe=$(command -v "$python") || continue
    minor=$("$exe" -E -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    if [ "$minor" = "{python}" ]; then
        exec "$exe" -I "$0" "$@"
    fi
    found="${{found:+$found, }}$minor ($exe)"
done
echo "bigmachine: $0 needs Python {python}, and there is ${{found:-none}}: install it, or pack again with --python" >&2
exit 1
"""


def make_header(name: str, version: str, python: str, warm: str) -> bytes:
    """For a file whose size is not known yet. `warm` is what the builder does where all is installed already: whole
    lines for the shell, or nothing."""
    place = _PLACE.decode()
    shown = re.sub(r"[^ -~]", "?", name)  # In a comment, which a line break would end.
    return _HEADER.format(name=shown, version=version, python=python, warm=warm, place=place, base=_BASE).encode()


def with_size(header: bytes, size: int) -> bytes:
    """The header of a file of `size` bytes, header and all."""
    head, place, tail = header.partition(_PLACE)
    assert place, header
    return b"%b%d%b" % (head, _BASE + size, tail)
