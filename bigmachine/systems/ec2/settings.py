"""What can be set for machines on EC2. `bigmachine.settings` tells where; ``bigmachine config --system ec2`` shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from ...settings import Section, setting

SECTION = "ec2"

TYPE = "m7i.large"
"""One type, so that the default needs no more than RunInstances, and all machines of a session are alike. x86, as that is what
programs are packed for unless somebody says otherwise; not burstable, as those are slow once their credit is used up; two
vCPUs, the smallest of its family."""

DISK = 50
"""GiB: the image's own system, the parts of the program twice, as they were sent and unpacked (numerical distributions have
gigabytes), and temporary files. A larger one is billed and not faster, as gp3's throughput does not depend on its size;
for data there is `dataspace`."""

MIN_DISK, MAX_DISK = 8, 16384
"""GiB: that of the images themselves; gp3's limit."""

MAX_DATA = 4 * MAX_DISK
"""GiB: as many volumes as are striped at most (`launching.STRIPES`)."""

RESERVED = ("aws:", "bigmachine:")
"""Tags that are not the user's to give: AWS refuses the ones, `bigmachine gc` lives on the others."""

MAX_TAGS = 40
"""AWS has 50 for a resource; ours are among them."""


@dataclass(frozen=True, kw_only=True)
class Settings(Section):
    """The settings of `Ec2Launcher`; what each means stands with its flag, in `driver.FLAGS`. Raises `UsageError` on values
    that cannot be."""

    types: tuple[str, ...] = setting((TYPE,), key="type", single=True)
    ondemand: bool = setting(False)
    spotonly: bool = setting(False)
    maxprice: str = setting("", such="0.05", number=True)
    region: str = setting("", such="eu-central-1")
    profile: str = setting("", such="research")
    ami: str = setting("", such="ami-0123456789abcdef0")
    user: str = setting("", such="admin")
    diskspace: int = setting(DISK)
    dataspace: int = setting(0, such=500)
    subnets: tuple[str, ...] = setting((), such=("subnet-0123456789abcdef0",))
    securitygroups: tuple[str, ...] = setting((), such=("sg-0123456789abcdef0",))
    publicip: bool = setting(True)
    instanceprofile: str = setting("", such="reader")
    keypair: str = setting("", such="me")
    tags: Mapping[str, str] = setting({}, such={"team": "physics"})
    cloudconfig: tuple[str, ...] = setting((), such=("extra.yaml",), path=True)
    units: tuple[str, ...] = setting((), such=("my.service",), path=True)
    port: int = setting(443, flag="port")
    maxprocs: int = setting(0, flag="maxprocs")

    def __post_init__(self) -> None:
        if not self.types:
            raise self.wrong("types", f"type names no instance type; it is such as {TYPE}")
        for name in self.types:
            if not re.fullmatch(r"[a-z][a-z0-9-]*\.[a-z0-9-]+", name):
                raise self.wrong("types", f"not an instance type: {name!r}; it is such as {TYPE}")
        if self.ondemand and self.spotonly:
            raise self.wrong("spotonly", f"spotonly contradicts ondemand ({self.origin('ondemand')}): leave out one")
        if self.maxprice and not _is_price(self.maxprice):
            raise self.wrong("maxprice", f"maxprice is USD an hour, such as 0.05, not {self.maxprice!r}")
        self._check_numbers()
        self._check_ids()
        self._check_tags()

    def _check_numbers(self) -> None:
        if not MIN_DISK <= self.diskspace <= MAX_DISK:
            raise self.wrong("diskspace", f"diskspace is {MIN_DISK} to {MAX_DISK} GiB, not {self.diskspace}")
        if not 0 <= self.dataspace <= MAX_DATA:
            raise self.wrong("dataspace", f"dataspace is 0 to {MAX_DATA} GiB, not {self.dataspace}")
        if not 1 <= self.port <= 65535:
            raise self.wrong("port", f"not a port that a security group can open: {self.port}; it is 1 to 65535")
        if self.maxprocs < 0:
            raise self.wrong("maxprocs", f"maxprocs must be at least 1, or 0 for a machine's vCPUs: {self.maxprocs}")

    def _check_ids(self) -> None:
        ids = [("ami", "ami", self.ami)] if self.ami else []
        ids += [("subnets", "subnet", id) for id in self.subnets]
        ids += [("securitygroups", "sg", id) for id in self.securitygroups]
        for field, prefix, id in ids:
            if not re.fullmatch(rf"{prefix}-[0-9a-z-]+", id):
                raise self.wrong(field, f"{field}: not an id: {id!r}; it is such as {prefix}-0123456789abcdef0")
        if self.user and not self.ami:
            raise self.wrong("user", "user is the login name of the image that ami names, and there is no ami")

    def _check_tags(self) -> None:
        if len(self.tags) > MAX_TAGS:
            raise self.wrong("tags", f"tags: {len(self.tags)}, more than {MAX_TAGS}")
        for key, value in self.tags.items():
            if key == "Name" or key.lower().startswith(RESERVED):
                raise self.wrong("tags", f"tags: {key!r} is not for you to give: choose another name")
            if not 1 <= len(key) <= 128 or len(value) > 256:
                raise self.wrong("tags", f"tags: names have 1 to 128 characters, values up to 256: {key!r}")


def _is_price(text: str) -> bool:
    try:
        price = Decimal(text)
    except InvalidOperation:
        return False
    return price.is_finite() and price > 0
