"""The block in which a script says itself what it needs (PEP 723: inline script metadata)."""

from __future__ import annotations

import re
import tomllib

from ..errors import PackError
from .asked import Asked, Line, parse_list, parse_requirement, parse_specifier

BLOCK = re.compile(r"(?m)^# /// (?P<type>[a-zA-Z0-9-]+)$\s(?P<content>(^#(| .*)$\s)+)^# ///$")
"""The PEP's reference expression, unchanged."""

ORIGIN = "the script's own block (PEP 723)"


def read_block(text: str, shown: str) -> Asked | None:
    """The script's requirements; None without a block. `shown` is the script's name in errors.

    Raises `PackError` with the line: two blocks, no TOML, values of a wrong type, an invalid requirement.
    """
    text = text.replace("\r\n", "\n")
    found = [match for match in BLOCK.finditer(text) if match["type"] == "script"]
    if not found:
        return None
    lines = [text.count("\n", 0, match.start()) + 1 for match in found]
    if len(found) > 1:
        raise PackError(f"{shown}:{lines[1]}: a second block (PEP 723), after the one in line {lines[0]}: keep one")
    content = [line[2:] if line.startswith("# ") else line[1:] for line in found[0]["content"].splitlines()]
    first = lines[0] + 1
    try:
        table = tomllib.loads("\n".join(content) + "\n")
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"\(at line (\d+)", str(error))
        number = int(at[1]) if at else len(content)
        reason = re.sub(r" \(at .*\)$", "", str(error))
        raise PackError(f"{shown}:{first + number - 1}: the block (PEP 723) is no TOML: {reason}") from None

    def where(pattern: str) -> str:
        return f"{shown}:{next((i for i, line in enumerate(content, first) if re.search(pattern, line)), lines[0])}"

    requirements = parse_list(table.get("dependencies", []), "dependencies", where(r"^\s*[\"']?dependencies\b"))
    python = table.get("requires-python", "")
    version = where(r"^\s*[\"']?requires-python\b")
    if not isinstance(python, str):
        raise PackError(f"{version}: requires-python must be a string, not: {python!r}")
    parsed = [(item, where(f"[\"']{re.escape(item)}[\"']")) for item in requirements]
    return Asked(
        lines=tuple(Line(parse_requirement(item, place), place) for item, place in parsed),
        origin=ORIGIN,
        python=parse_specifier(python, version),
    )
