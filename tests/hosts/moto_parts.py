"""What takes the place of parts of moto: its process is the cloud's own, so that classes are changed for good."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from moto.core.responses import ActionResult
from moto.core.types import Base64EncodedString
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models import EC2Backend
from moto.ec2.models.amis import Ami, AmiBackend
from moto.ec2.models.instances import Instance, InstanceBackend
from moto.ec2.models.security_groups import SecurityGroupBackend
from moto.ec2.responses.fleets import Fleets
from moto.ec2.responses.general import General
from moto.ec2.responses.instances import InstanceResponse
from moto.ec2.responses.spot_instances import SpotInstances
from moto.ec2.utils import parse_user_data
from moto.ssm.models import Parameter, ParameterDict

from .parameters import from_template
from .wares import IMAGES, SPOT_SHARE, Image, on_demand

if TYPE_CHECKING:
    from .amazon import Amazon

USER_INITIATED = ("Client.UserInitiatedShutdown", "Client.UserInitiatedShutdown: User initiated shutdown")

CONSOLE = 65536
"""Bytes of a console's output that AWS keeps: the last."""


def install(amazon: Amazon) -> None:
    """Make moto ask `amazon`."""
    _install_launches(amazon)
    _install_instances(amazon)
    _install_networks(amazon)
    _install_images()


def _install_launches(amazon: Amazon) -> None:
    def run_instances(self: InstanceResponse) -> ActionResult:
        backend, asked = self.ec2_backend, dict(self.params)
        given = from_template(backend, asked["LaunchTemplate"]) if "LaunchTemplate" in asked else {}
        given |= asked
        if isinstance(asked.get("UserData"), str):
            given["UserData"] = parse_user_data(asked["UserData"])
        low, high = int(given.get("MinCount", 1)), int(given.get("MaxCount", 1))
        token = given.get("ClientToken")
        return ActionResult(amazon.once(token, asked, lambda: amazon.launch(backend, given, low, high)))

    def create_fleet(self: Fleets) -> ActionResult:
        given = dict(self.params)
        if given.get("Type") != "instant":
            raise EC2ClientError("InvalidParameterValue", "this cloud has fleets of type instant alone")
        return ActionResult(amazon.once(given.get("ClientToken"), given, lambda: amazon.fleet(self.ec2_backend, given)))

    _replace(InstanceResponse, run_instances)
    _replace(Fleets, create_fleet)


def _install_instances(amazon: Amazon) -> None:
    cloud = amazon.cloud
    reservations = InstanceBackend.get_reservations_by_instance_ids

    def terminate(self: Any) -> Any:
        before = copy.copy(self._state)
        cloud.end(self, *USER_INITIATED)
        return before

    def get_reservations_by_instance_ids(self: Any, ids: list[str], filters: Any = None) -> Any:
        found = reservations(self, ids, filters)
        amazon.hide(ids, [instance for each in found for instance in each.instances])
        return found

    def get_console_output(self: General) -> ActionResult:
        instance = self.ec2_backend.get_instance(self._get_param("InstanceId"))
        said = Base64EncodedString.from_raw_string(cloud.console(instance.id)[-CONSOLE:])
        return ActionResult({"InstanceId": instance.id, "Timestamp": datetime.now(UTC), "Output": said})

    def describe_spot_price_history(self: SpotInstances) -> ActionResult:
        types = self._get_param("InstanceTypes", [])
        filters: dict[str, Any] = self._filters_from_querystring()
        if zone := self._get_param("AvailabilityZone"):
            filters["availability-zone"] = [zone]
        filters = {name: values for name, values in filters.items() if name != "product-description"}
        rows = [
            {
                "AvailabilityZone": row["Location"],
                "InstanceType": row["InstanceType"],
                "ProductDescription": "Linux/UNIX",
                "SpotPrice": f"{SPOT_SHARE * on_demand(row['InstanceType']):.6f}",
                "Timestamp": datetime.now(UTC),
            }
            for row in self.ec2_backend.describe_spot_price_history(types, filters)
        ]
        return ActionResult({"SpotPriceHistory": rows})

    Instance.forget = Instance.terminate  # type: ignore[attr-defined]
    _replace(Instance, terminate)
    _replace(InstanceBackend, get_reservations_by_instance_ids)
    _replace(General, get_console_output)
    _replace(SpotInstances, describe_spot_price_history)


def _install_networks(amazon: Amazon) -> None:
    def then_guard(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(self: Any, *given: Any, **named: Any) -> Any:
            result = change(self, *given, **named)
            amazon.cloud.guard()
            return result

        return changed

    make = EC2Backend.__init__

    def __init__(self: Any, region_name: str, account_id: str) -> None:
        """A default VPC is connected with the internet, and its default group lets in its own."""
        make(self, region_name, account_id)
        gateway = self.create_internet_gateway()
        self.attach_internet_gateway(gateway.id, self.default_vpc.id)
        for table in self.describe_route_tables(filters={"vpc-id": self.default_vpc.id}):
            self.create_route(table.id, "0.0.0.0/0", gateway_id=gateway.id)
        group = self.get_default_security_group().id
        self.authorize_security_group_ingress(group, "-1", None, None, [], source_groups=[{"GroupId": group}])

    _replace(EC2Backend, __init__)
    for name in ("authorize_security_group_ingress", "revoke_security_group_ingress"):
        setattr(SecurityGroupBackend, name, then_guard(getattr(SecurityGroupBackend, name)))


def _install_images() -> None:
    load_amis, load_parameters = AmiBackend._load_amis, ParameterDict._check_loading_status

    def _load_amis(self: Any) -> None:
        load_amis(self)
        for image in IMAGES:
            self.amis[image.id] = Ami(
                self,
                image.id,
                name=image.parameter.strip("/").replace("/", "-"),
                owner_id=image.owner,
                public=True,
                virtualization_type="hvm",
                architecture={"amd64": "x86_64", "arm64": "arm64"}[image.arch],
                root_device_type="ebs",
                root_device_name=image.device,
            )

    def _check_loading_status(self: Any, key: str) -> None:
        load_parameters(self, key)
        for image in IMAGES:
            if str(key or "").startswith("/aws/service/") and not dict.__contains__(self, image.parameter):
                dict.__setitem__(self, image.parameter, [_parameter(self.account_id, image)])

    _replace(AmiBackend, _load_amis)
    _replace(ParameterDict, _check_loading_status)


def _parameter(account: str, image: Image) -> Any:
    unused = dict.fromkeys(("description", "allowed_pattern", "keyid"))
    kind = {"parameter_type": "String", "data_type": "aws:ec2:image", "version": 1, "last_modified_date": time.time()}
    make: Any = Parameter  # It has no constructor of its own for a parameter that is AWS's.
    return make(account_id=account, name=image.parameter, value=image.id, **kind, **unused)


def _replace(kind: type, method: Callable[..., Any]) -> None:
    setattr(kind, method.__name__, method)
