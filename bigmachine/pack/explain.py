"""Why a resolver failed: its report, condensed to a line, and what there would be instead."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING
from urllib.parse import unquote

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from ..errors import ResolveError
from .index import File, Index
from .lines import requirement_of
from .platforms import Platform
from .wheels import Wheel

if TYPE_CHECKING:
    from .requirements import Wanted

LISTED = 4
"""How many versions, tags or reasons a message names."""


def explain(report: str, platform: Platform, wanted: Wanted, local: Mapping[str, Wheel], index: Index) -> ResolveError:
    """The resolver's `report` of a run that failed, in a line."""
    if match := re.search(r"^ERROR: No matching distribution found for (.+)$", report, re.MULTILINE):
        text = re.sub(r" \((?:from|constraint).*$", "", match[1])
        if "Failed to bootstrap Pip" in report:
            reason = f"the resolver needs {text} for Python {platform.python} itself, and found none {index.where()}"
        else:
            reason = _explain_missing(text, report, platform, wanted, index)
    elif conflict := _conflict(report, wanted, local):
        reason = f"the requirements conflict: {conflict}"
    else:
        reason = _otherwise(report, platform)
    # pip warns of folders without a project's page, whatever it finds elsewhere.
    return ResolveError(reason, "\n".join(line for line in report.splitlines() if not line.startswith("WARNING:")))


def _otherwise(report: str, platform: Platform) -> str:
    """What of a `report` of another kind tells most."""
    if match := re.search(r"^1\. (\S+) (\S+) from (\S+)\n(.+)$", report, re.MULTILINE):  # A lock's.
        name, version, url, why = match.groups()
        if "not a supported wheel" not in why:
            return f"cannot get {name} {version} for {platform.name}: {why}"
        filename = unquote(url.rpartition("/")[2])
        return (
            f"{name} {version} has no wheel for {platform.name} and Python {platform.python}: the lock has {filename}"
        )
    lines = [line for line in report.splitlines() if line] or ["it did not say why"]
    first = next((line for line in lines if line.startswith(("ERROR:", "error:"))), lines[0])
    # A traceback says last what it is about.
    said = lines[-1] if first == "ERROR: Exception:" else first.removeprefix("ERROR: ")
    return f"cannot resolve for {platform.name}: {said}"


def _conflict(report: str, wanted: Wanted, local: Mapping[str, Wheel]) -> str:
    """pip's explanation, which begins with "The conflict is caused by:"; empty where there is none.

    Of a distribution that was tried in many versions the first one's reason stands for all: the newest's.
    """
    _, _, rest = report.partition("The conflict is caused by:\n")
    reasons: dict[str, str] = {}
    names: set[str] = set()
    for line in rest.partition("\n\n")[0].splitlines():
        if match := re.match(r"The user requested (?:\(constraint\) )?(.+)$", line.strip()):
            names.add(canonicalize_name(requirement_of(match[1]).name))
            reasons.setdefault(match[1], _who_asks(match[1], wanted, local))
        elif match := re.match(r"(\S+) (\S+) depends on (.+)$", line.strip()):
            needed = re.sub(r" and |, ", ",", match[3])
            names.add(canonicalize_name(re.split(r"[^\w.-]", needed)[0]))
            reasons.setdefault(match[1], f"{match[1]} {match[2]} needs {needed}")
    # Some pips leave out constraints that decided, and name instead what is asked for in any version.
    for line in wanted.constraints:
        if canonicalize_name(requirement_of(line).name) in names:
            reasons.setdefault(line, _who_asks(line, wanted, local))
    decided = [
        reason for text, reason in reasons.items() if canonicalize_name(text) not in names or " needs " in reason
    ]
    return ", and ".join((decided if len(decided) > 1 else list(reasons.values()))[:LISTED])


def _who_asks(text: str, wanted: Wanted, local: Mapping[str, Wheel]) -> str:
    """Who asks for what pip calls the user's: it may be ours, or a constraint."""
    asked = requirement_of(text)
    for wheel in local.values():
        if any(_same(asked, requirement_of(line)) for line in wheel.requires):
            return f"{wheel.name} {wheel.version} needs {text}"
    if any(_same(asked, requirement_of(line)) for line in wanted.constraints):
        return f"{text} is a constraint ({wanted.origin})"
    return f"you ask for {text}"


def _same(one: Requirement, other: Requirement) -> bool:
    return canonicalize_name(one.name) == canonicalize_name(other.name) and one.specifier == other.specifier


def _explain_missing(text: str, report: str, platform: Platform, wanted: Wanted, index: Index) -> str:
    """Why nothing matches the requirement `text`, by what the indexes have."""
    requirement = requirement_of(text)
    name = canonicalize_name(requirement.name)
    by = re.search(rf"requirement {re.escape(text)} \(from ([^):]+)\)", report)
    suffix = f" (which {by[1]} needs)" if by and by[1] != "versions" else ""
    try:
        files = index.files(name)
    except OSError as error:
        return f"there is no distribution of {text}{suffix} for {platform.name} (what there is, nobody says: {error})"
    if not files:
        hint = index.unreached() or "; is it misspelt?"
        return f"there is no distribution called {requirement.name}{suffix}: {index.where()} there is none{hint}"
    limits = [line for line in wanted.constraints if canonicalize_name(requirement_of(line).name) == name]
    specifier = requirement.specifier
    for line in limits:
        specifier &= requirement_of(line).specifier
    shown = f"{requirement.name}{specifier}" if limits else text
    versions = sorted({file.version for file in files})
    matching = list(specifier.filter(versions))
    if not matching:
        near = _nearest_versions(versions, specifier)
        return f"no version of {requirement.name} matches {specifier or text}{suffix}: {near}{index.unreached()}"
    chosen = [file for file in files if file.version in matching]
    if any(file.fits(platform) for file in chosen):
        return f"no distribution of {shown}{suffix} for {platform.name} would do, though there is one: see the report below"
    instead = _what_instead(chosen, files, platform)
    return f"{shown} has no wheel for {platform.name} and Python {platform.python}{suffix}{instead}{index.unreached()}"


def _nearest_versions(versions: Sequence[Version], specifier: SpecifierSet) -> str:
    """Which there are, near to what was asked for: "the nearest are 4.3.0, 4.4.1"."""
    final = [version for version in versions if not version.is_prerelease] or list(versions)
    asked = sorted(
        Version(part.version) for part in specifier if part.operator not in ("===", "!=") and "*" not in part.version
    )
    below = [version for version in final if asked and version < asked[0]]
    above = [version for version in final if version not in below]
    near = [*below[-2:], *above[:2]] if below and above else final[-LISTED:] if not above else final[:LISTED]
    if len(final) <= LISTED:
        return f"there {'is' if len(final) == 1 else 'are'} {', '.join(map(str, final))}"
    return f"the nearest are {', '.join(map(str, near))}"


def _what_instead(chosen: Sequence[File], files: Sequence[File], platform: Platform) -> str:
    """Of versions without a wheel for `platform` (`chosen`): the nearest version with one, or the tags that there are."""
    newest = max(file.version for file in chosen)
    wheels = [file for file in chosen if file.tags]
    python = next((file.python for file in wheels if file.fits(platform, any_python=True) and file.python), None)
    reason = f" (it needs Python {python})" if python else ""
    fitting = sorted({file.version for file in files if file.fits(platform) and not file.yanked})
    fitting = [version for version in fitting if not version.is_prerelease] or fitting
    below = [version for version in fitting if version < newest]
    if fitting:
        return f"{reason}: the nearest version with one is {below[-1] if below else fitting[0]}"
    if not wheels:
        make = f"pip wheel {chosen[0].name}"
        return f": there is only its source; make a wheel ({make}), and name its folder in PIP_FIND_LINKS"
    if python:
        return f": it needs Python {python}"
    split = [tag.split("-", 2) for file in wheels if file.version == newest for tag in sorted(file.tags)]
    split = split or [tag.split("-", 2) for file in wheels for tag in sorted(file.tags)]
    here = {tag.split("-", 2)[2] for tag in platform.tags}
    pythons = [f"{python}-{abi}" for python, abi, where in split if where in here]
    names = list(dict.fromkeys(pythons or [where for _, _, where in split]))
    return f": there are wheels for {', '.join(names[:LISTED])}{' …' if len(names) > LISTED else ''} only"
