"""AWS for tests that need no hosts: moto's server in this process, and an `Api` that knows what moto does not.

moto has neither prices nor the quotas of EC2 nor Debian's images; `Cloud` answers for them, and denies what it is told to.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from moto.server import ThreadedMotoServer

from bigmachine.systems.ec2.api import Api, Ec2Error
from bigmachine.systems.ec2.settings import Settings

REGION = "us-east-1"

ENVIRON = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": REGION,
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """Its address, which is in the environment while the block lasts."""
    logging.getLogger("werkzeug").disabled = True
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        address = f"http://{host}:{port}"
        stale = [name for name in os.environ if name.startswith(("AWS_", "BIGMACHINE_EC2_"))]
        with mock.patch.dict(os.environ):
            for name in stale:
                del os.environ[name]
            os.environ.update(ENVIRON, AWS_ENDPOINT_URL=address)
            yield address
    finally:
        server.stop()


def reset(address: str) -> None:
    """Nothing is there any more but what a new account has."""
    urllib.request.urlopen(urllib.request.Request(f"{address}/moto-api/reset", method="POST")).read()


@functools.cache
def _clients(address: str) -> dict[Any, Any]:
    """Of all clouds in the server at `address`: AWS's models take longer to load than all else."""
    return {}


class Cloud(Api):
    """What moto does, and besides: `prices` on demand by type, the price of all `spot` instances, `quotas` by code, any
    parameter of AWS's store. `denied` are operations (``"ec2:RunInstances"``) that the identity may not call, `errors` what
    others say. All calls are in `calls`."""

    def __init__(self, settings: Settings | None = None, region: str = REGION) -> None:
        super().__init__(settings or Settings(), region, sleep=lambda seconds: None)
        self._clients = _clients(os.environ["AWS_ENDPOINT_URL"])
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.prices: dict[str, float] = {"m7i.large": 0.1}
        self.spot = 0.04
        self.spot_role = True
        self.quotas: dict[str, float] = {}
        self.denied: set[str] = set()
        self.errors: dict[str, Ec2Error] = {}

    def call(self, service: str, operation: str, *, region: str = "", **parameters: Any) -> dict[str, Any]:
        name = f"{service}:{operation}"
        self.calls.append((name, parameters))
        if name in self.denied:
            raise Ec2Error(name, "UnauthorizedOperation", "You are not authorized to perform this operation.", REGION)
        if name in self.errors:
            raise self.errors[name]
        if operation == "DescribeSpotPriceHistory":  # moto has one for everything, and takes seconds to say so.
            zone = parameters.get("AvailabilityZone", f"{REGION}a")
            return {"SpotPriceHistory": [{"AvailabilityZone": zone, "SpotPrice": str(self.spot)}]}
        if service == "pricing":
            assert region == "us-east-1"
            return {"PriceList": list(self._listed(parameters))}
        if service == "service-quotas":
            return {"Quota": {"Value": self.quotas.get(parameters["QuotaCode"], 64.0)}}
        if operation == "GetRole" and self.spot_role:
            return {"Role": {"RoleName": parameters["RoleName"]}}
        if service == "ssm":
            return {"Parameter": {"Value": "ami-12c6146b"}}  # One of moto's.
        return super().call(service, operation, region=region, **parameters)

    def made(self, name: str) -> list[dict[str, Any]]:
        """The parameters of the calls of an operation."""
        return [parameters for called, parameters in self.calls if called == name]

    def _listed(self, parameters: Mapping[str, Any]) -> Iterator[str]:
        wanted = {each["Field"]: each["Value"] for each in parameters.get("Filters", ())}
        price = self.prices.get(wanted.get("instanceType", ""))
        if price is not None:
            dimension = {"unit": "Hrs", "pricePerUnit": {"USD": f"{price:.10f}"}}
            yield json.dumps({"terms": {"OnDemand": {"T": {"priceDimensions": {"D": dimension}}}}})
