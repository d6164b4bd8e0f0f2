"""What pip is configured to here: its files, variables, and the options of requirements files, as one set of settings."""

from __future__ import annotations

import configparser
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import PackError


def pip_settings(options: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """What pip is configured to for downloading, by its options' names (``index-url``): its files, then its environment
    variables, then `options`, as a requirements file says them."""
    found: dict[str, str] = {}
    for path in _config_files(environ):
        parser = configparser.RawConfigParser()
        try:
            parser.read(path, "utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise PackError(f"cannot read pip's configuration {path}: {str(error).splitlines()[0]}") from None
        for section in ("global", "download"):
            if parser.has_section(section):
                found |= {name.replace("_", "-"): value.strip() for name, value in parser.items(section)}
    for name, value in environ.items():
        if name.startswith("PIP_") and name not in ("PIP_CONFIG_FILE", "PIP_VERSION", "PIP_HELP"):
            found[name.removeprefix("PIP_").lower().replace("_", "-")] = value
    words = iter(options)
    for word in words:
        option, equals, value = word.removeprefix("--").partition("=")
        if option in ("no-index", "pre", "prefer-binary"):
            found[option] = "1"
            continue
        value = value if equals else next(words, "")
        if option == "index-url":
            found |= {"index-url": value, "extra-index-url": ""}
        else:
            found[option] = f"{found.get(option, '')} {value}".strip()
    return {name: " ".join(value.split()) for name, value in sorted(found.items())}


def _config_files(environ: Mapping[str, str]) -> list[Path]:
    """pip's, the strongest last. This interpreter's own is not seen by the pip that pex runs."""
    named = environ.get("PIP_CONFIG_FILE", "")
    if named == os.devnull:
        return []
    home = Path(environ.get("HOME") or Path.home())
    folders = [Path(folder) for folder in (environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")]
    user = Path(environ.get("XDG_CONFIG_HOME") or home / ".config")
    if sys.platform == "darwin":
        folders = [Path("/Library/Application Support")]
        if (home / "Library/Application Support/pip").is_dir():
            user = home / "Library/Application Support"
    paths = [*(folder / "pip/pip.conf" for folder in folders), Path("/etc/pip.conf")]
    if not (named and Path(named).exists()):
        paths += [home / ".pip/pip.conf", user / "pip/pip.conf"]
    return [*paths, Path(sys.prefix, "pip.conf"), *([Path(named)] if named else [])]
