"""Taking secrets out of texts that are about to be given to somebody else.

Nothing in here can know what is a secret; this is the last of several precautions, the first being that reports have no
environment, no arguments and nothing of variables but what `bigmachine.vars` publishes. What is taken out, wherever it stands:

1. PEM blocks (keys, certificates), in one line or over many, with something in front of each line, begun or ended elsewhere;
2. keys of AWS, tokens of well-known forms, and whatever looks as random as these: forty characters or more;
3. values that are called a password, secret, token, key or credential, in text, JSON, Python, headers and URLs;
4. the values of variables and options of this process that have such names.

Digests in hexadecimal stay, and so do names, paths and figures, as a rule: a report from which all is taken is of no use.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..profiling.values import Profile

REDACTED = "[redacted]"

SHORTEST = 6
"""Characters of a known value: shorter ones are parts of too many words."""

LONGEST_BLOCK = 200
"""Lines of a PEM block at most: who has seen no end by then has lost it."""

SHORT = 200
"""Characters up to which a text is remembered: events and variables have the same ones again and again."""

MAX_SEEN = 10_000

RANDOM = 4.35
"""Bits a character, from which on a text of mixed letters and digits is taken for random: paths and names stay below, random
texts of that length in base64 are above in 999 of 1000 cases."""

_SECRET = r"pass(?:word|wd|phrase)|pwd|secret|api[_-]?key|access[_-]?key|private[_-]?key|session[_-]?key|credentials?"

_NAME = re.compile(rf"{_SECRET}|token|_key\b|\bauth\b|_auth\b", re.IGNORECASE)

_NOT = frozenset({"PWD", "OLDPWD"})
"""Variables that have such names, and are no secrets: where the program runs."""

_IS = r"""[\w.-]{0,60}(?:\\*["'])?[ \t]*[:=][ \t]*"""

_VALUE = r"""(?:(?P<quote>\\{0,8}["']).{0,2000}?(?P=quote)|[^\s,;&"'\\)}\]]+)"""

_AGAIN = rf"\g<1>{REDACTED}"

_PATTERNS: Sequence[tuple[Sequence[str], re.Pattern[str], str]] = tuple(
    (words, re.compile(pattern, re.IGNORECASE), instead)
    for words, pattern, instead in (
        # Headers, up to the end of the line, or of the text that quotes them.
        (["authorization"], r"""\b((?:proxy-)?authorization["']?[ \t]*[:=][ \t]*["']?)[^\r\n"']+""", _AGAIN),
        (["cookie"], r"""\b(cookie["']?[ \t]*:[ \t]*["']?)[^\r\n"']+""", _AGAIN),
        (["bearer"], r"\b(bearer[ \t]+)(?=\S{0,200}\d)[\w.~+/=-]{8,}", _AGAIN),
        (["pass", "pwd", "secret", "key", "credential"], rf"((?:{_SECRET}){_IS}){_VALUE}", _AGAIN),
        (["_key"], rf"(\b(?-i:[A-Z0-9_]+_KEY)[ \t]*=[ \t]*){_VALUE}", _AGAIN),  # Not in lower case: too much is a key.
        (["token"], rf"(token{_IS})(?!\d+(?:\.\d+)?\b){_VALUE}", _AGAIN),  # Programs count tokens, too.
        # Options of command lines, in a shell's way and as lists in Python and JSON.
        (
            ["pass", "pwd", "secret", "key", "credential", "token"],
            rf"""((?<![\w-])--[\w-]{{0,60}}(?:{_SECRET}|token)(?:["'],)?[ \t]+)(?!-){_VALUE}""",
            _AGAIN,
        ),
        (["://"], r"(://[^\s/:@]{0,200}:)[^\s/@]{1,500}(?=@)", _AGAIN),
        (["x-amz-"], r"(X-Amz-(?:Signature|Credential|Security-Token)=)[^&\s\"']+", _AGAIN),
        (["akia", "asia", "abia", "acca"], r"\b(?-i:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}\b", REDACTED),
        (
            ["gh", "glpat-", "xox", "sk-", "hf_", "pypi-", "aiza"],
            r"\b(?:gh[pousr]_|github_pat_|glpat-|xox[abeprs]-|sk-|hf_|pypi-|AIza)[\w-]{16,}",
            REDACTED,
        ),
        (["eyj"], r"\beyJ[\w-]{8,2000}\.[\w-]{8,}(?:\.[\w-]*)?", REDACTED),
    )
)
"""Words of which one must be there, in lower case: looking for these is quick. None goes beyond a line, and none takes time
that grows faster than its line: lines may be long."""

_PIECE = 1 << 16
"""Characters that are looked at in one go, about: one line with a secret's name is not to make megabytes slow."""

_RANDOM = re.compile(r"(?<![A-Za-z0-9+/])[A-Za-z0-9+/]{40,}={0,2}")

_BLOCK = re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|$)")
_LAST = re.compile(r"[A-Za-z0-9+/=]+\s*$")
_BODY = re.compile(r"(?:^|\s)[A-Za-z0-9+/=]{16,}\s*$")


class Redaction:
    """`known` are texts that are secret, wherever they stand."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        values = sorted({value for value in known if len(value) >= SHORTEST}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, values))) if values else None
        self._seen: dict[str, str] = {}

    def text(self, text: str) -> str:
        """`text`, without."""
        if len(text) > SHORT:
            return self._without(text)
        found = self._seen.get(text)
        if found is None:
            found = self._without(text)
            if len(self._seen) < MAX_SEEN:
                self._seen[text] = found
        return found

    def _without(self, text: str) -> str:
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        if "-----BEGIN " in text or "-----END " in text:
            text = _without_pem(text)
        return "".join(map(_without_patterns, _pieces(text)))

    def value(self, value: Any, name: str = "") -> Any:
        """What JSON could write, without; `name` is what it is called."""
        if isinstance(value, str):
            return REDACTED if value and _NAME.search(name) else self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.value(item, str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item, name) for item in value]
        return value

    def profile(self, profile: Profile) -> Profile:
        """Its names: it has no values of the program's."""
        return replace(
            profile,
            places=[
                place._replace(function=self.text(place.function), file=self.text(place.file))
                for place in profile.places
            ],
            samples=[
                sample._replace(labels=tuple((key, self.text(label)) for key, label in sample.labels))
                for sample in profile.samples
            ],
            comments=tuple(map(self.text, profile.comments)),
        )


def secrets(variables: Mapping[str, str], arguments: Sequence[str] = ()) -> set[str]:
    """Values that have the name of a secret: of environment variables, and of options (``--token=x``, ``--token x``)."""
    found = {value for name, value in variables.items() if _NAME.search(name) and name not in _NOT}
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("-") and _NAME.search(name):
            found.update([value] if equals else arguments[index + 1 : index + 2])
    return found


def _pieces(text: str) -> Iterator[str]:
    """`text`, cut at ends of lines."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE) + 1 or len(text)
        yield text[start:end]
        start = end


def _without_patterns(text: str) -> str:
    lower = text.lower()
    for words, pattern, instead in _PATTERNS:
        if any(word in lower for word in words):
            text = pattern.sub(instead, text)
    return _RANDOM.sub(_if_random, text)


def _if_random(match: re.Match[str]) -> str:
    text = match[0]
    mixed = re.search("[a-z]", text) and re.search("[A-Z]", text) and re.search("[0-9]", text)
    if not mixed:
        return text
    counts = Counter(text).values()
    bits = -sum(count / len(text) * math.log2(count / len(text)) for count in counts)
    return REDACTED if bits >= RANDOM else text


def _without_pem(text: str) -> str:
    """Line by line, as lines of a log have something in front, and others may stand between them."""
    out: list[str] = []
    left = 0  # Lines that may still belong to a block that has begun.
    for line in text.split("\n"):
        if "-----BEGIN " in line:
            left = 0 if "-----END " in line else LONGEST_BLOCK
            line = _BLOCK.sub(REDACTED, line)
        elif "-----END " in line:
            if not left:
                _redact_body_before(out)
            left = 0
        elif left:
            left -= 1
            line = _LAST.sub(REDACTED, line)
        out.append(line)
    return "\n".join(out)


def _redact_body_before(lines: list[str]) -> None:
    """The beginning of the block was cut off: what could belong to it."""
    for index in range(len(lines) - 1, max(-1, len(lines) - LONGEST_BLOCK), -1):
        short = index == len(lines) - 1  # The last line of a block may have a few characters only.
        if not (_LAST if short else _BODY).search(lines[index]):
            break
        lines[index] = _LAST.sub(REDACTED, lines[index])
