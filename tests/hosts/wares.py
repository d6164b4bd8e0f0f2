"""What the cloud has on offer: images, and instances at a price. moto has no more than Amazon's own images, and no prices."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moto.ec2.models.instance_types import INSTANCE_TYPES

SPOT_SHARE = 0.35
"""Of the price on demand that the same instance costs on the spot."""

PRICE = 0.05
"""US dollars that a virtual processor costs on demand for an hour."""


@dataclass(frozen=True)
class Image:
    """A public image: the parameter that names it, whose it is, and the Python whose root it starts from; "": it cannot."""

    parameter: str
    arch: str
    owner: str
    device: str
    python: str = ""

    @property
    def id(self) -> str:
        return f"ami-{hashlib.sha256(self.parameter.encode()).hexdigest()[:17]}"


DEBIAN, CANONICAL = "136693071363", "099720109477"
PYTHONS = {"12": "3.11", "13": "3.13"}
IMAGES = tuple(
    Image(f"/aws/service/debian/release/{release}/latest/{arch}", arch, DEBIAN, "/dev/xvda", PYTHONS[release])
    for release in ("12", "13")
    for arch in ("amd64", "arm64")
) + tuple(
    Image(
        f"/aws/service/canonical/ubuntu/server/{release}/stable/current/{arch}/hvm/ebs-{disk}/ami-id",
        arch,
        CANONICAL,
        "/dev/sda1",
    )
    for release, disk in (("22.04", "gp2"), ("24.04", "gp3"), ("25.10", "gp3"), ("26.04", "gp3"))
    for arch in ("amd64", "arm64")
)
"""What AWS's public parameters name that moto has not. There are roots of Debian's alone; `Amazon.image` lends one of them."""


def price_list(asked: Mapping[str, Any]) -> dict[str, Any]:
    """GetProducts of the pricing API: the one product that the filters mean."""
    wanted = {each["Field"]: each["Value"] for each in asked.get("Filters", ())}
    type = wanted.get("instanceType", "m7i.large")
    if type not in INSTANCE_TYPES:
        return {"FormatVersion": "aws_v1", "PriceList": []}
    dollars = {"unit": "Hrs", "pricePerUnit": {"USD": f"{on_demand(type):.10f}"}}
    attributes = {"instanceType": type, "operatingSystem": "Linux", "tenancy": "Shared", **wanted}
    terms = {"OnDemand": {"offer": {"priceDimensions": {"rate": dollars}}}}
    product = {"product": {"productFamily": "Compute Instance", "attributes": attributes}, "terms": terms}
    return {"FormatVersion": "aws_v1", "PriceList": [json.dumps(product)]}


def on_demand(type: str) -> float:
    """US dollars an hour."""
    vcpus: int = INSTANCE_TYPES[type]["VCpuInfo"]["DefaultVCpus"]
    return PRICE * vcpus
