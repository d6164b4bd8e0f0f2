"""What RunInstances, launch templates and fleets are given, as each other and as moto's backend want it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moto.core.exceptions import ServiceException
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.utils import convert_tag_spec, filter_iam_instance_profiles


def choices(given: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Templates and overrides of a fleet, in the order in which they are tried."""
    for config in given["LaunchTemplateConfigs"]:
        overrides: Sequence[dict[str, Any]] = config.get("Overrides") or [{}]
        for override in sorted(overrides, key=lambda each: float(each.get("Priority", 0))):
            yield config["LaunchTemplateSpecification"], override


def from_template(
    backend: Any, template: Mapping[str, Any], override: Mapping[str, Any] | None = None, *, spot: bool = False
) -> dict[str, Any]:
    """The parameters that a launch template has, with an override of a fleet's."""
    override = override or {}
    data = copy.deepcopy(dict(backend._get_template_from_args(template).data))
    data = {name: value for name, value in data.items() if value is not None}
    subnet = override.get("SubnetId")
    if subnet and data.get("NetworkInterfaces"):
        data["NetworkInterfaces"][0]["SubnetId"] = subnet
    elif subnet:
        data["SubnetId"] = subnet
    if "AvailabilityZone" in override:
        data["Placement"] = {"AvailabilityZone": override["AvailabilityZone"]}
    data |= {name: override[name] for name in ("InstanceType", "ImageId") if name in override}
    if spot:
        data["InstanceMarketOptions"] = {"MarketType": "spot"}
    return data


def zone(backend: Any, given: Mapping[str, Any]) -> str:
    subnets = [nic.get("SubnetId") for nic in given.get("NetworkInterfaces") or ()]
    for subnet in [given.get("SubnetId"), *subnets]:
        if subnet:
            zone: str = backend.get_subnet(subnet).availability_zone
            return zone
    return (given.get("Placement") or {}).get("AvailabilityZone") or f"{backend.region_name}a"


def arguments(backend: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """moto's names of RunInstances' parameters."""
    nics = copy.deepcopy(list(given.get("NetworkInterfaces") or ()))
    groups = [backend.get_security_group_by_name_or_id(name).id for name in given.get("SecurityGroups") or ()]
    groups += given.get("SecurityGroupIds") or ()
    if not groups and not any(nic.get("Groups") for nic in nics):
        groups = [backend.get_default_security_group().id]
    arguments = {
        "instance_type": given.get("InstanceType", "m1.small"),
        "is_instance_type_default": "InstanceType" not in given,
        "placement": (given.get("Placement") or {}).get("AvailabilityZone"),
        "region_name": backend.region_name,
        "subnet_id": given.get("SubnetId"),
        "key_name": given.get("KeyName"),
        "security_group_ids": groups,
        "nics": nics,
        "associate_public_ip": None,
        "tags": convert_tag_spec(list(given.get("TagSpecifications") or ())),
        "instance_initiated_shutdown_behavior": given.get("InstanceInitiatedShutdownBehavior"),
        "metadata_options": given.get("MetadataOptions") or {},
        "client_token": given.get("ClientToken", ""),
    }
    if given.get("BlockDeviceMappings"):
        arguments["block_device_mappings"] = [_volume(each) for each in given["BlockDeviceMappings"]]
    return arguments


def check_profile(backend: Any, profile: Mapping[str, str]) -> None:
    name, arn = profile.get("Name"), profile.get("Arn")
    try:
        filter_iam_instance_profiles(backend.account_id, backend.partition, arn, name)
    except ServiceException:
        which = f"Value ({name or arn}) for parameter iamInstanceProfile.{'name' if name else 'arn'} is invalid."
        raise EC2ClientError("InvalidParameterValue", f"{which} Invalid IAM Instance Profile") from None


def _volume(mapping: Mapping[str, Any]) -> dict[str, Any]:
    ebs = {"VolumeSize": 8, "DeleteOnTermination": False, **mapping.get("Ebs", {})}
    return {"DeviceName": mapping["DeviceName"], "Ebs": ebs, "NoDevice": mapping.get("NoDevice")}
