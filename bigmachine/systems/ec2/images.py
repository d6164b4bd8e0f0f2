"""Which machine image: one whose own Python is of the driver's minor version, as pickles and bytecode depend on that.

Images change with every security update: their ids are looked up by the public parameters that their makers keep in AWS's
parameter store. No image of our own, and nothing to install while it boots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ...errors import UsageError
from .api import Ec2Error
from .types import ARCHITECTURES


class Calls(Protocol):
    """The part of `api.Api` that is used here."""

    @property
    def region(self) -> str: ...
    def call(self, service: str, operation: str, **parameters: Any) -> dict[str, Any]: ...


class Chosen(Protocol):
    """The part of `settings.Settings` that is used here."""

    @property
    def ami(self) -> str: ...
    @property
    def user(self) -> str: ...


@dataclass(frozen=True)
class Flavour:
    """A system whose ``python3`` is of minor version `python`. `parameter` is the public parameter with the id of its image,
    with ``{arch}`` in it; `user` the login name, `root_device` the image's name for its root disk. `reason` is why this one."""

    python: str
    name: str
    parameter: str
    user: str
    root_device: str
    reason: str


_DEBIAN = "/aws/service/debian/release/{}/latest/{{arch}}"
_UBUNTU = "/aws/service/canonical/ubuntu/server/{}/stable/current/{{arch}}/hvm/ebs-gp3/ami-id"
_SMALL = "small, boots quickly, and installs nothing by itself while it does"

IMAGES: tuple[Flavour, ...] = (
    Flavour("3.11", "Debian 12", _DEBIAN.format(12), "admin", "/dev/xvda", _SMALL),
    Flavour("3.12", "Ubuntu 24.04", _UBUNTU.format("24.04"), "ubuntu", "/dev/sda1", "no Debian has 3.12; supported until 2029"),
    Flavour("3.13", "Debian 13", _DEBIAN.format(13), "admin", "/dev/xvda", _SMALL),
    Flavour("3.14", "Ubuntu 26.04", _UBUNTU.format("26.04"), "ubuntu", "/dev/sda1", "no Debian has 3.14 yet"),
)
"""Amazon Linux 2023 is not among them: its own Python is 3.9, and others would have to be installed on every boot."""


@dataclass(frozen=True)
class Image:
    """An image: `id` is its ami's."""

    id: str
    flavour: str
    user: str
    root_device: str


def flavour_for(python: str) -> Flavour:
    """The row of the table. Raises `UsageError`, which shows the table."""
    for flavour in IMAGES:
        if flavour.python == python:
            return flavour
    rows = ", ".join(f"{flavour.python} ({flavour.name})" for flavour in IMAGES)
    raise UsageError(
        f"no image is known with Python {python}; there are such with {rows}: run the driver with one of these, "
        "or name an image that has it, -bigm.ec2ami"
    )


def find_image(api: Calls, settings: Chosen, python: str, arch: str) -> Image:
    """The image for that Python and architecture, or the one that the settings name. Raises `UsageError`, `Ec2Error`."""
    if settings.ami:
        return _given(api, settings, arch)
    flavour = flavour_for(python)
    name = flavour.parameter.format(arch=arch)
    try:
        answer = api.call("ssm", "GetParameter", Name=name)
    except Ec2Error as error:
        if error.code != "ParameterNotFound":
            raise
        reason = f"{flavour.name} (which has Python {python}) is not published for {arch} there: no parameter {name}"
        raise Ec2Error(error.operation, error.code, reason, error.region) from error
    return Image(answer["Parameter"]["Value"], flavour.name, flavour.user, flavour.root_device)


def _given(api: Calls, settings: Chosen, arch: str) -> Image:
    found = api.call("ec2", "DescribeImages", ImageIds=[settings.ami]).get("Images", [])
    if not found:
        raise UsageError(f"no image {settings.ami} in {api.region} that you may use: -bigm.ec2ami, -bigm.ec2region")
    image: Mapping[str, Any] = found[0]
    theirs = ARCHITECTURES.get(image.get("Architecture", ""), image.get("Architecture", ""))
    if theirs != arch:
        raise UsageError(f"the image {settings.ami} is for {theirs}, the instance type is {arch}: -bigm.ec2ami, -bigm.ec2type")
    if image.get("State", "available") != "available":
        raise UsageError(f"the image {settings.ami} is not available, but {image['State']}: -bigm.ec2ami")
    return Image(settings.ami, image.get("Name") or settings.ami, settings.user, image.get("RootDeviceName") or "/dev/xvda")
