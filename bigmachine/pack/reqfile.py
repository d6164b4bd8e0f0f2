"""Requirements files (``pip install -r``): flattened, with what concerns the index."""

from __future__ import annotations

import os
import re
import shlex
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import PackError
from .asked import Asked, Line, parse_requirement

WITH_VALUE = {
    "-i": "--index-url",
    "--pypi-url": "--index-url",
    "--index-url": "--index-url",
    "--extra-index-url": "--extra-index-url",
    "-f": "--find-links",
    "--find-links": "--find-links",
    "--trusted-host": "--trusted-host",
    "-r": "-r",
    "--requirement": "-r",
    "-c": "-c",
    "--constraint": "-c",
    "-e": "-e",
    "--editable": "-e",
    "--no-binary": "--no-binary",
    "--only-binary": "",
}
"""Options that a line may consist of, each with one spelling of it; ``""``: it is so anyway, as there are only wheels."""

WITHOUT_VALUE = {
    "--no-index": "--no-index",
    "--pre": "--pre",
    "--require-hashes": "--require-hashes",
    "--prefer-binary": "",
}

COMMENT = re.compile(r"(^|\s+)#.*$")
VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")
HASH = re.compile(r"\s--hash[=\s]\s*(\S+)")
HASH_VALUE = re.compile(r"(md5|sha1|sha224|sha256|sha384|sha512):[0-9a-fA-F]+")


def read_files(paths: Sequence[Path]) -> Asked:
    """What several files ask for together. The lines of constraints files (``-c``) are in `constraints`.

    Raises `PackError` with file and line: what cannot be read or parsed, what is no wheel, what includes itself.
    """
    reading = _Reading()
    for path in paths:
        reading.read(path, (), constraints=False)
    return Asked(
        lines=tuple(reading.lines),
        origin=", ".join(path.name for path in paths),
        constraints=tuple(dict.fromkeys(reading.constraints)),
        options=tuple(reading.options),
    )


@dataclass
class _Reading:
    lines: list[Line] = field(default_factory=list)
    constraints: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)

    def read(self, path: Path, chain: tuple[str, ...], constraints: bool) -> None:
        real = os.path.realpath(path)
        if real in chain:
            raise PackError(f"{path} includes itself, by -r or -c: take one of the lines out")
        for number, text in _logical_lines(_content(path)):
            where = f"{path}:{number}"
            if text.startswith("-"):
                for option, value in _split_options(text, where):
                    self._option(option, value, where, path, (*chain, real), constraints)
                continue
            hashes = HASH.findall(" " + text)
            requirement = parse_requirement(_without_hashes(text, hashes, where), where)
            line = Line(requirement, where, tuple(f"--hash={value}" for value in hashes))
            if constraints:
                self.constraints.append(line.text)
            else:
                self.lines.append(line)

    def _option(
        self, option: str, value: str, where: str, path: Path, chain: tuple[str, ...], constraints: bool
    ) -> None:
        if option in ("-r", "-c"):
            if "://" in value:
                raise PackError(f"{where}: {option} of an address: {value}: download it, and name the file")
            self.read(path.parent / value, chain, constraints or option == "-c")
        elif option == "-e":
            raise PackError(
                f"{where}: wheels only, and this is editable: {value}; build a wheel of it (pip wheel), or --add its package"
            )
        elif option == "--no-binary":
            raise PackError(f"{where}: wheels only, and this forbids them: --no-binary {value}; take the line out")
        elif option == "--find-links" and "://" not in value and (path.parent / value).exists():
            self._add(option, Path(os.path.abspath(path.parent / value)).as_uri())
        elif option:
            self._add(*([option, value] if value else [option]))

    def _add(self, *words: str) -> None:
        for at in range(len(self.options) - len(words) + 1):
            if self.options[at : at + len(words)] == list(words):
                return
        self.options += words


def _content(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise PackError(f"{path} is not UTF-8: save it as UTF-8") from None
    except OSError as error:
        raise PackError(f"cannot read the requirements file {path}: {error.strerror or error}") from error


def _logical_lines(content: str) -> Iterator[tuple[int, str]]:
    """Lines as pip reads them: continued ones joined, comments and empty ones left out, variables replaced."""
    joined, begun = "", 0
    for number, text in enumerate([*content.splitlines(), ""], 1):
        begun = begun or number
        comment = COMMENT.match(text) is not None
        if text.endswith("\\") and not comment:
            joined += text[:-1]
            continue
        # A comment within a continued line ends it, and takes nothing with it.
        line = COMMENT.sub("", joined + (" " + text if comment else text)).strip()
        if line:
            yield begun, VARIABLE.sub(lambda match: os.environ.get(match[1]) or match[0], line)
        joined, begun = "", 0


def _without_hashes(text: str, hashes: Sequence[str], where: str) -> str:
    for value in hashes:
        if not HASH_VALUE.fullmatch(value):
            raise PackError(f"{where}: invalid hash: {value}; it must look like sha256:<hex>")
    rest = HASH.sub("", " " + text).strip()
    if unknown := re.search(r"\s(--?[a-z]\S*)", rest):
        raise PackError(f"{where}: unknown option: {unknown[1]}; of options to a requirement there is --hash")
    return rest


def _split_options(text: str, where: str) -> Iterator[tuple[str, str]]:
    """The options of a line, each in its one spelling, with its value. Raises `PackError`."""
    try:
        words = deque(shlex.split(text))
    except ValueError as error:
        raise PackError(f"{where}: {text}: {error}") from None
    while words:
        word = words.popleft()
        name, equals, value = word.partition("=")
        if not name.startswith("--") and len(word) > 2:  # -rother.txt
            name, equals, value = word[:2], "=", word[2:].removeprefix("=")
        if name in WITHOUT_VALUE and not equals:
            yield WITHOUT_VALUE[name], ""
            continue
        if name not in WITH_VALUE:
            known = ", ".join(option for option in {**WITH_VALUE, **WITHOUT_VALUE} if option.startswith("--"))
            raise PackError(f"{where}: unknown option: {word}; there are {known}")
        if not equals and words:
            value = words.popleft()
        if not value:
            raise PackError(f"{where}: an option without a value: {name}")
        yield WITH_VALUE[name], value
