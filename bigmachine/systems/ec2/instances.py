"""The machines of all sessions, as AWS knows them: which there are, and which of them nobody needs any more.

Rule 1. What is ours says so by its tags (`naming`), and nothing without them is ever touched.
Rule 2. Something is abandoned when its driver ran in this host's process table and does not any more, or when its mark has
expired: a session renews it long before. A driver that is seen running keeps its machines, whatever the mark says.
Rule 3. What is to be ended is looked at once more just before (`still_abandoned`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, TypeVar

from .api import Ec2Error
from .drivers import is_running, parse
from .naming import DRIVER, EXPIRES, OWNER, SESSION
from .prices import ON_DEMAND, SPOT, duration

ALIVE = ("pending", "running", "stopping", "stopped")
"""The states of instances that are there, and of which at least the disks are billed."""

SKEW = 600.0
"""Seconds after a mark's time at which it has certainly expired: AWS refuses what is signed by a clock that is five minutes
off, so two clients' clocks differ by no more than twice that."""

BATCH = 100
"""Instances in one TerminateInstances: AWS's own advice for calls with many resources; it takes 1000."""

REGIONS_AT_ONCE = 16
"""There are some 30 that an account can have."""

T = TypeVar("T")


class Calls(Protocol):
    """The part of `api.Api` that is used here."""

    @property
    def region(self) -> str: ...
    def call(self, service: str, operation: str, *, region: str = "", **parameters: Any) -> dict[str, Any]: ...
    def pages(self, service: str, operation: str, key: str, **parameters: Any) -> Iterator[Any]: ...


@dataclass(frozen=True)
class OurInstance:
    """An instance of a session's. `launched` and `expires` are seconds as of `time.time`; `market` is as in `prices`."""

    id: str
    type: str
    market: str
    zone: str
    launched: float
    state: str
    session: str
    owner: str
    name: str
    expires: float | None
    driver: str


@dataclass(frozen=True)
class OurTemplate:
    """A launch template, which a launch of several types makes and deletes at once."""

    id: str
    name: str
    session: str
    owner: str
    expires: float | None
    driver: str


Ours = OurInstance | OurTemplate


def ours(api: Calls, ids: Sequence[str] = ()) -> list[OurInstance]:
    """All that are not terminated, oldest first; only those among `ids` where there are such. Raises `Ec2Error`."""
    filters = [{"Name": "tag-key", "Values": [SESSION]}]
    filters.append({"Name": "instance-state-name", "Values": [*ALIVE, "shutting-down"]})
    if ids:  # As a filter: one that is gone is an error otherwise.
        filters.append({"Name": "instance-id", "Values": list(ids)})
    pages = api.pages("ec2", "DescribeInstances", "Reservations", Filters=filters)
    found = [_instance(each) for reservation in pages for each in reservation.get("Instances", ())]
    return sorted(found, key=lambda each: (each.launched, each.session, each.id))


def our_templates(api: Calls) -> list[OurTemplate]:
    """Launch templates that are left. Raises `Ec2Error`."""
    filters = [{"Name": "tag-key", "Values": [SESSION]}]
    found = []
    for each in api.pages("ec2", "DescribeLaunchTemplates", "LaunchTemplates", Filters=filters):
        tags = _tags(each)
        found.append(
            OurTemplate(
                each["LaunchTemplateId"],
                each.get("LaunchTemplateName", ""),
                tags.get(SESSION, ""),
                tags.get(OWNER, ""),
                _time(tags.get(EXPIRES, "")),
                tags.get(DRIVER, ""),
            )
        )
    return sorted(found, key=lambda each: each.name)


def abandoned(each: Ours, now: float, running: Callable[[str], bool | None] = is_running) -> str | None:
    """Why nobody needs it any more; None where somebody may. `running` is asked about its driver's mark."""
    if isinstance(each, OurInstance) and each.state not in ALIVE:
        return None  # It is being ended already.
    alive = running(each.driver)
    if alive:
        return None
    if alive is False:
        driver = parse(each.driver)
        return f"its driver, process {driver.pid if driver else '?'} on this host, has ended"
    if each.expires is not None and each.expires + SKEW < now:
        return f"its session is gone: nobody has renewed its time, which ran out {duration(now - each.expires)} ago"
    return None


def still_abandoned(
    api: Calls,
    instances: Iterable[OurInstance],
    now: float,
    running: Callable[[str], bool | None] = is_running,
) -> list[OurInstance]:
    """Those that are there and abandoned when they are looked at again. Raises `Ec2Error`."""
    ids = [each.id for each in instances]
    found: list[OurInstance] = []
    for start in range(0, len(ids), BATCH):
        found += ours(api, ids[start : start + BATCH])
    return [each for each in found if abandoned(each, now, running)]


def end(api: Calls, instances: Iterable[OurInstance]) -> dict[str, str]:
    """Terminate them. Returns, by id, why one could not be."""
    ids = [each.id for each in instances]
    failed: dict[str, str] = {}
    for start in range(0, len(ids), BATCH):
        batch = ids[start : start + BATCH]
        try:
            api.call("ec2", "TerminateInstances", InstanceIds=batch)
        except Ec2Error:  # One of them spoils it for all: each by itself.
            for id in batch:
                try:
                    api.call("ec2", "TerminateInstances", InstanceIds=[id])
                except Ec2Error as error:
                    if error.code != "InvalidInstanceID.NotFound":
                        failed[id] = str(error)
    return failed


def delete(api: Calls, templates: Iterable[OurTemplate]) -> dict[str, str]:
    """Delete them. Returns, by id, why one could not be."""
    failed: dict[str, str] = {}
    for template in templates:
        try:
            api.call("ec2", "DeleteLaunchTemplate", LaunchTemplateId=template.id)
        except Ec2Error as error:
            if "NotFound" not in error.code:
                failed[template.id] = str(error)
    return failed


def regions(api: Calls) -> list[str]:
    """Those that the account has enabled. Raises `Ec2Error`."""
    answer = api.call("ec2", "DescribeRegions")
    return sorted(
        each["RegionName"] for each in answer.get("Regions", ()) if each.get("OptInStatus") != "not-opted-in"
    )


class InRegion:
    """`api`, in another region than its own: a client for each is cheap, a session of botocore's is not."""

    def __init__(self, api: Calls, region: str) -> None:
        self._api = api
        self.region = region

    def call(self, service: str, operation: str, *, region: str = "", **parameters: Any) -> dict[str, Any]:
        return self._api.call(service, operation, region=region or self.region, **parameters)

    def pages(self, service: str, operation: str, key: str, **parameters: Any) -> Iterator[Any]:
        return self._api.pages(service, operation, key, region=self.region, **parameters)


def in_regions(names: Iterable[str], look: Callable[[str], T]) -> tuple[dict[str, T], dict[str, Ec2Error]]:
    """What `look` returns for each region, in their order; and the `Ec2Error` where it raised one: accounts may close some."""
    found: dict[str, T] = {}
    closed: dict[str, Ec2Error] = {}
    with ThreadPoolExecutor(REGIONS_AT_ONCE, "bigmachine-region") as pool:
        for name, future in [(name, pool.submit(look, name)) for name in names]:
            try:
                found[name] = future.result()
            except Ec2Error as error:
                closed[name] = error
    return found, closed


def _instance(each: Mapping[str, Any]) -> OurInstance:
    tags = _tags(each)
    launched: datetime = each["LaunchTime"]
    return OurInstance(
        id=each["InstanceId"],
        type=each.get("InstanceType", ""),
        market=SPOT if each.get("InstanceLifecycle") == "spot" else ON_DEMAND,
        zone=each.get("Placement", {}).get("AvailabilityZone", ""),
        launched=launched.timestamp(),
        state=each["State"]["Name"],
        session=tags.get(SESSION, ""),
        owner=tags.get(OWNER, ""),
        name=tags.get("Name", ""),
        expires=_time(tags.get(EXPIRES, "")),
        driver=tags.get(DRIVER, ""),
    )


def _tags(each: Mapping[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in each.get("Tags", ())}


def _time(text: str) -> float | None:
    """ISO 8601; UTC where it does not say otherwise."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
