"""Whether machines could be started: all that a launch needs, looked at one by one, and what to do where something is missing.

Nothing is spent, started or changed: what would change something is asked for as a dry run (`permissions`). What is looked at
is found as a launch finds it, by the same functions, and the dry run is of the very request that a launch would make.

A check that others depend on ends the examination when it fails: without credentials there is nothing more to be found.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache import Cache
from ...errors import BigmachineError, PackError
from ...info import python_version
from ...pack.archive import read_contents
from ...pack.build import Request, pack
from ...pack.image import Manifest
from ...pack.itself import TOOLKIT
from ...pack.progress import Progress, Silent
from ..remote import Trust
from ..remote.source import agent_text
from .api import Ec2Error, remedy
from .images import Image, find_image
from .instances import Calls
from .launching import Attempt, Wanted, data_space, markets, run_instances
from .naming import tags
from .network import Network, Subnet, closed, find_group, find_subnets
from .permissions import LOOKS, Outcome, changes, dry_run, look
from .prices import ON_DEMAND, SPOT
from .quotas import CODES, Quota, find_quota, kind_of
from .settings import Settings
from .types import InstanceType, architecture, instance_types
from .userdata import AGENT_SETTINGS, MAX_USER_DATA, UserData, user_data

EVERYBODY = "0.0.0.0/0"

SPOT_ROLE = "AWSServiceRoleForEC2Spot"
"""By which AWS's spot service acts in an account."""

LINE = 300
"""Characters of what AWS has said that are shown: proxies answer with whole pages."""


@dataclass(frozen=True)
class Check:
    """What was `found` out about `name`. `ok` is None where machines can be had, or probably can, but there is something to be
    said. `fix` is what to do, one line; empty where there is nothing."""

    name: str
    ok: bool | None
    found: str
    fix: str = ""


@dataclass
class _Examination:
    """Whom it is about, and what later checks need of earlier ones; None and empty where that could not be found."""

    api: Calls
    settings: Settings
    program: Path | None
    count: int
    cache: Cache
    python: str
    types: Sequence[InstanceType] = ()
    arch: str = ""
    image: Image | None = None
    subnets: Sequence[Subnet] = ()
    groups: tuple[str, ...] = ()
    missing: str | None = None
    """Of our own security group; see `permissions.changes`."""
    user_data: bytes = b""


def checks(
    api: Calls,
    settings: Settings,
    *,
    program: Path | None = None,
    count: int = 1,
    progress: Progress | None = None,
    cache: Cache | None = None,
) -> Iterator[Check]:
    """Examine what `count` machines need, for `program` (a script or a packed file) or for bigmachine alone. `progress` is told
    what is being looked at. Raises `PackError` where `program` is damaged."""
    progress = progress or Silent()
    it = _Examination(api, settings, program, count, cache or Cache(), python_of(program))
    for name, examine in _STEPS.items():
        progress.step(f"looking at the {name}")
        try:
            for check in examine(it):
                yield check
                if check.ok is False and name in _FIRST:
                    return
        except (BigmachineError, OSError, UnicodeDecodeError) as error:
            yield _failed(name, error)
            if name in _FIRST:
                return


def python_of(program: Path | None) -> str:
    """The version that driver and machines will run: a packed program's own, or this one's. Raises `PackError`."""
    if program is not None and zipfile.is_zipfile(program):
        return read_contents(program).python
    return python_version()


def _failed(name: str, error: Exception) -> Check:
    """What an error says, apart from what to do about it."""
    if isinstance(error, Ec2Error):
        message = error.message.rstrip(". ")
        message = message if len(message) <= LINE else message[:LINE] + "…"
        fix = remedy(error.operation, error.code) or "try again; if it stays so, AWS's documentation explains the code"
        return Check(name, False, f"{error.operation}: {message} ({error.code})", fix)
    if isinstance(error, PackError):
        return Check(name, False, error.reason, "`bigmachine pack PROGRAM --platform PLATFORM` tells more")
    found, _, fix = str(error).partition(": -bigm.")
    return Check(name, False, found, f"-bigm.{fix}" if fix else "`bigmachine config --system ec2` shows where it is set")


def _region(it: _Examination) -> Iterator[Check]:
    origin = it.settings.origin("region") if it.settings.region else "AWS's own configuration"
    yield Check("region", True, f"{it.api.region} ({origin})")


def _credentials(it: _Examination) -> Iterator[Check]:
    answer = it.api.call("sts", "GetCallerIdentity")
    profile = f", profile {it.settings.profile}" if it.settings.profile else ""
    yield Check("credentials", True, f"{answer['Arn']} in account {answer['Account']}{profile}")


def _looks(it: _Examination) -> Iterator[Check]:
    yield from _permissions("permissions to look", [look(it.api, wish) for wish in LOOKS])


def _permissions(name: str, outcomes: Sequence[Outcome]) -> Iterator[Check]:
    """One check about all; one more for each problem of another kind."""
    needed = dict.fromkeys(each.wish.name for each in outcomes if not each.allowed and not each.wish.why)
    wanted = {each.wish.name: each.wish.why for each in outcomes if not each.allowed and each.wish.why}
    allow = "give the identity a policy that allows "
    if needed:
        yield Check(name, False, f"denied: {', '.join(needed)}", allow + ", ".join([*needed, *wanted]))
    elif wanted:
        reasons = ", ".join(f"{wish} (for {why})" for wish, why in wanted.items())
        yield Check(name, None, f"those that are needed; denied: {reasons}", allow + ", ".join(wanted))
    else:
        yield Check(name, True, ", ".join(dict.fromkeys(each.wish.name for each in outcomes if each.allowed)))
    for each in outcomes:
        if each.problem is not None:
            problem = _failed(each.wish.operation, each.problem)
            yield problem if not each.wish.why else Check(problem.name, None, problem.found, problem.fix)


def _types(it: _Examination) -> Iterator[Check]:
    types = instance_types(it.api, it.settings.types, cache=it.cache)
    it.arch = architecture(types)
    it.types = types
    said = [f"{each.name}: {each.vcpus} vCPUs, {each.memory / 2**30:g} GiB" for each in types]
    where = f"{'; '.join(said)}; {it.arch}"
    spotless = [each.name for each in types if not each.spot]
    if spotless and it.settings.spotonly:
        fix = "choose other types, -bigm.ec2type, or leave out -bigm.ec2spotonly"
        yield Check("instance types", False, f"{where}; no spot instances of {', '.join(spotless)}", fix)
    elif spotless and not it.settings.ondemand:
        yield Check("instance types", None, f"{where}; on demand only: {', '.join(spotless)}")
    else:
        yield Check("instance types", True, where)


def _image(it: _Examination) -> Iterator[Check]:
    if not it.arch:
        return
    image = it.image = find_image(it.api, it.settings, it.python, it.arch)
    if it.settings.ami:  # What is in it, its first boot tells.
        told = f"{image.id} ({image.flavour}), which must have Python {it.python}"
    else:
        told = f"{image.id}: {image.flavour} with Python {it.python}, {it.arch}"
    yield Check("image", True, told)


def _subnets(it: _Examination) -> Iterator[Check]:
    subnets = it.subnets = find_subnets(it.api, it.settings)
    free = sum(each.free for each in subnets)
    where = ", ".join(f"{each.free} in {each.zone}" for each in subnets)
    if free < it.count:
        fix = "name subnets that have more, -bigm.ec2subnets, or end what uses their addresses"
        yield Check("subnets", False, f"{free} free addresses for {_machines(it.count)}: {where}", fix)
    else:
        yield Check("subnets", True, f"{free} free addresses: {where}")
    offered = _zones(it.api, [each.name for each in it.types])
    lacking = sorted({each.zone for each in subnets} - offered)
    if it.types and len(lacking) == len({each.zone for each in subnets}):
        names = ", ".join(each.name for each in it.types)
        there = f"those of {', '.join(sorted(offered))}" if offered else "another region, -bigm.ec2region"
        fix = f"choose other types, -bigm.ec2type, or {there}"
        yield Check("zones", False, f"no subnet's zone offers {names}", fix)
    elif it.types and lacking:
        yield Check("zones", None, f"none of the types is offered in {', '.join(lacking)}; the others have them")


def _zones(api: Calls, types: Sequence[str]) -> set[str]:
    """Zones that offer one of them at least."""
    if not types:
        return set()
    filters = [{"Name": "instance-type", "Values": list(types)}]
    parameters = {"LocationType": "availability-zone", "Filters": filters}
    return {
        each["Location"]
        for each in api.pages("ec2", "DescribeInstanceTypeOfferings", "InstanceTypeOfferings", **parameters)
    }


def _route(it: _Examination) -> Iterator[Check]:
    """That answers of a machine with a public address find their way out."""
    if not it.subnets or not it.settings.publicip:
        return
    vpc = it.subnets[0].vpc
    filters = [{"Name": "vpc-id", "Values": [vpc]}]
    try:
        tables = list(it.api.pages("ec2", "DescribeRouteTables", "RouteTables", Filters=filters))
    except Ec2Error as error:  # Nothing but this needs it.
        problem = _failed("route", error)
        yield Check("route", None, problem.found, problem.fix)
        return
    shut = [each.id for each in it.subnets if not _leads_out(tables, each.id)]
    if not shut:
        yield Check("route", True, f"{vpc}: to the internet, by an internet gateway")
        return
    fix = (
        f"attach an internet gateway to {vpc}, with a route for {EVERYBODY}; or name other subnets, -bigm.ec2subnets; or run "
        "the driver in the VPC, with -bigm.ec2publicip=false"
    )
    # A launch tries one subnet after the other, and AWS does not mind that nobody can reach what is in there.
    where = vpc if len(shut) == len(it.subnets) else ", ".join(shut)
    yield Check("route", False, f"no route to the internet from {where}", fix)


def _leads_out(tables: Sequence[dict[str, Any]], subnet: str) -> bool:
    """Whether the subnet's route table, or the main one where it has none, has a route to an internet gateway. Pure."""
    main = own = None
    for table in tables:
        for association in table.get("Associations", ()):
            if association.get("SubnetId") == subnet:
                own = table
            elif association.get("Main"):
                main = table
    return any(
        route.get("DestinationCidrBlock") == EVERYBODY
        and str(route.get("GatewayId", "")).startswith("igw-")
        and route.get("State", "active") == "active"
        for route in (own or main or {}).get("Routes", ())
    )


def _group(it: _Examination) -> Iterator[Check]:
    if it.settings.securitygroups:
        it.groups = it.settings.securitygroups
        yield _given_groups(it.api, it.settings)
        return
    if not it.subnets:
        return
    vpc = it.subnets[0].vpc
    group = find_group(it.api, vpc)
    if group is None:
        it.missing = "group"
        told = f"none of ours in {vpc} yet: the first launch makes it, with port {it.settings.port} open"
        yield Check("security group", True, told)
        return
    it.groups = (group["GroupId"],)
    if closed(group.get("IpPermissions", ()), it.settings.port):
        it.missing = "port"
        told = f"{group['GroupId']}: port {it.settings.port} is not open to all: the next launch opens it"
    else:
        it.missing = ""
        told = f"{group['GroupId']}: port {it.settings.port} is open, and guarded by mutual TLS"
    yield Check("security group", True, told)


def _given_groups(api: Calls, settings: Settings) -> Check:
    wanted = list(settings.securitygroups)
    groups = list(api.pages("ec2", "DescribeSecurityGroups", "SecurityGroups", GroupIds=wanted))
    rules = [rule for group in groups for rule in group.get("IpPermissions", ())]
    names = ", ".join(wanted)
    port = settings.port
    if not closed(rules, port):
        return Check("security group", True, f"{names}: port {port} is open to all")
    sources = [source for rule in rules if _covers(rule, port) for source in _sources(rule)]
    if sources:
        told = f"{names}: port {port} is open to {', '.join(sources)}"
        return Check("security group", True, f"{told}; this host and the machines must be among them")
    cidr = f"--protocol tcp --port {port} --cidr {EVERYBODY}"
    fix = f"aws ec2 authorize-security-group-ingress --region {api.region} --group-id {wanted[0]} {cidr}"
    return Check("security group", False, f"{names}: port {port} is open to nobody", fix)


def _covers(rule: dict[str, Any], port: int) -> bool:
    if rule.get("IpProtocol") == "-1":
        return True
    return rule.get("IpProtocol") in ("tcp", "6") and rule.get("FromPort", 0) <= port <= rule.get("ToPort", 65535)


def _sources(rule: dict[str, Any]) -> Iterator[str]:
    for key, name in (("IpRanges", "CidrIp"), ("Ipv6Ranges", "CidrIpv6"), ("UserIdGroupPairs", "GroupId")):
        yield from (each[name] for each in rule.get(key, ()) if name in each)
    yield from (each["PrefixListId"] for each in rule.get("PrefixListIds", ()))


def _user_data(it: _Examination) -> Iterator[Check]:
    agent = agent_text(Trust().agent("l-doctor"), {**AGENT_SETTINGS, "port": it.settings.port, "idle": 600.0})
    space = data_space(it.types, it.settings.dataspace) if it.types else ""
    data = UserData(agent, space, cloudconfig=_texts(it.settings.cloudconfig), units=_texts(it.settings.units))
    it.user_data = user_data(data)
    yield Check("user-data", True, f"{len(it.user_data):,} of {MAX_USER_DATA:,} bytes")


def _texts(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Names and contents. Raises OSError, UnicodeDecodeError."""
    return [(Path(path).name, Path(path).expanduser().read_text("utf-8")) for path in paths]


def _changes(it: _Examination) -> Iterator[Check]:
    runs: list[dict[str, Any]] = []
    if it.image is not None and it.types and it.subnets:
        network = Network(tuple(it.subnets), it.groups)
        marks = tags("bigmachine doctor", "s-doctor", "bigmachine doctor", 0.0, it.settings.tags)
        wanted = Wanted(it.settings, it.types, it.image, network, it.user_data, marks)
        for market in markets(it.settings, it.types):
            type = next((each.name for each in it.types if each.spot or market != SPOT), it.types[0].name)
            attempt = Attempt(market, (type,), (it.subnets[0],))
            runs.append(run_instances(wanted, attempt, 1, "bigmachine-doctor"))
    wishes = changes(runs, len(it.settings.types) > 1, it.missing)
    yield from _permissions("permissions to launch", [dry_run(it.api, wish) for wish in wishes])
    if it.types and SPOT in markets(it.settings, it.types):
        yield from _spot_role(it.api)


def _spot_role(api: Calls) -> Iterator[Check]:
    """An account gets it with its first spot request, if whoever makes that may make roles; a dry run does not tell."""
    try:
        api.call("iam", "GetRole", RoleName=SPOT_ROLE)
    except Ec2Error as error:
        if "NoSuchEntity" in error.code:
            told = f"{SPOT_ROLE} is missing: the account's first spot request makes it, if the identity may make roles"
            yield Check("spot role", None, told, "aws iam create-service-linked-role --aws-service-name spot.amazonaws.com")


def _quotas(it: _Examination) -> Iterator[Check]:
    enough: dict[str, bool | None] = {}
    told: list[Check] = []
    for market in markets(it.settings, it.types) if it.types else ():
        check = _quota(it.api, it.types, market, it.count)
        enough[market] = check.ok
        told.append(check)
    for check, market in zip(told, enough, strict=True):
        # Where both markets are used, one that has room makes up for the other.
        others = [ok for other, ok in enough.items() if other != market]
        if check.ok is False and any(others):
            check = Check(check.name, None, f"{check.found}; the other market makes up for it", check.fix)
        yield check


def _quota(api: Calls, types: Sequence[InstanceType], market: str, count: int) -> Check:
    name = f"quota, {market.replace('-', ' ')}"
    quotas: dict[str, Quota] = {}
    fitting = [each for each in types if kind_of(each.name) and (each.spot or market == ON_DEMAND)]
    fitting = [each for each in fitting if (market, kind_of(each.name)) in CODES]
    if not fitting:
        names = ", ".join(each.name for each in types)
        return Check(name, None, f"not known for {names}", "see Service Quotas, Amazon EC2, in the AWS console")
    for kind in {kind_of(each.name) for each in fitting}:
        try:
            quotas[kind] = find_quota(api, market, kind)
        except Ec2Error as error:
            problem = _failed(name, error)
            return Check(name, None, problem.found, problem.fix)
    rooms = {each: quotas[kind_of(each.name)].room(each.vcpus) for each in fitting}
    best = max(rooms, key=lambda each: rooms[each])
    quota = quotas[kind_of(best.name)]
    room = f"room for {_machines(rooms[best])} of {best.name}"
    told = f"{quota.used} of {quota.limit} vCPUs ({quota.kind} types) are in use: {room}"
    if rooms[best] >= count:
        return Check(name, True, told)
    wanted = quota.used + count * best.vcpus
    ask = f"aws service-quotas request-service-quota-increase --region {api.region} --service-code ec2"
    fix = f"{ask} --quota-code {quota.code} --desired-value {wanted}"
    return Check(name, False, f"{told}, not for {count}", fix)


def _program(it: _Examination) -> Iterator[Check]:
    if not it.arch:
        return
    platform = f"linux/{it.arch}"
    if it.program is not None and zipfile.is_zipfile(it.program):
        manifest = read_contents(it.program).manifest(platform)
    else:
        with it.cache.use(), it.cache.scratch() as scratch:
            request = Request(it.program or TOOLKIT, (platform,), output=scratch / "program.pex", installed=True)
            manifest = pack(request, it.cache, Silent()).contents.manifest(platform)
    yield Check("program", True, _parts(manifest, it.program))


def _parts(manifest: Manifest, program: Path | None) -> str:
    parts = manifest.worker()
    name = program.name if program else "bigmachine alone"
    size = sum(each.packed for each in parts) / 2**20
    return f"{name}: wheels for {manifest.platform} and Python {manifest.python}; a machine is sent {size:.1f} MiB"


def _machines(count: int) -> str:
    return f"{count} machine{'' if count == 1 else 's'}"


_STEPS: Mapping[str, Callable[[_Examination], Iterator[Check]]] = {
    "region": _region,
    "credentials": _credentials,
    "permissions to look": _looks,
    "instance types": _types,
    "image": _image,
    "subnets": _subnets,
    "route": _route,
    "security group": _group,
    "user-data": _user_data,
    "permissions to launch": _changes,
    "quotas": _quotas,
    "program": _program,
}
"""In the order in which they need each other."""

_FIRST = ("region", "credentials")
"""Without which nobody can be asked."""
