"""EC2's API as moto serves it, nearer to AWS: launches, errors, images, prices, quotas and permissions.

moto answers, but for the `moto_parts` that ask here. All ways to launch (RunInstances, with a template or without, CreateFleet
of type instant) end in `Amazon.launch`, with the parameters that RunInstances has. It knows where there is room (`room`),
fails when it is to (`fail`), gives the same answer to the same client token, and refuses what AWS refuses.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models.instance_types import INSTANCE_TYPES
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from . import moto_parts
from .parameters import arguments, check_profile, choices, from_template, zone
from .wares import IMAGES, SPOT_SHARE, on_demand, price_list

if TYPE_CHECKING:
    from .cloud import Cloud

USER_DATA_LIMIT = 16384
"""Bytes, before they are encoded."""


@dataclass
class Fault:
    """The next `left` launches of this kind fail, or, with a `room`, the launches that need more than that."""

    code: str
    left: int
    market: str
    type: str
    zone: str

    def meets(self, market: str, type: str, zone: str) -> bool:
        return self.market in ("", market) and self.type in ("", type) and self.zone in ("", zone)


class Amazon:
    """What moto does for `cloud` once this is made; there can be one in a process."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        self._faults: list[Fault] = []
        self._rooms: list[Fault] = []
        self._lent: dict[str, Path] = {}
        self._answers: dict[str, tuple[str, Any]] = {}
        self._denied: set[str] = set()
        self._refusals: dict[str, list[str]] = {}
        self._quotas: dict[str, float] = {}
        self._eventual = 0.0
        self._calls: list[str] = []
        moto_parts.install(self)

    # -- For tests ---------------------------------------------------------------------------------------------------

    def fail(self, code: str, n: int = 1, market: str | None = None, type: str = "", zone: str = "") -> None:
        """The next `n` launches of this market, type and zone fail with `code`; 0: none any more."""
        self._faults = [fault for fault in self._faults if fault.code != code]
        if n:
            self._faults.append(Fault(code, n, market or "", type, zone))

    def room(self, n: int, market: str | None = None, type: str = "", zone: str = "") -> None:
        """There is room for `n` more instances of this market, type and zone; less than 0: for all."""
        of = (market or "", type, zone)
        self._rooms = [room for room in self._rooms if (room.market, room.type, room.zone) != of]
        if n >= 0:
            self._rooms.append(Fault("InsufficientInstanceCapacity", n, *of))

    def image(self, image: str, python: str) -> None:
        """Start `image`, an id or a part of a parameter's name, from the root with that Python."""
        root = self.cloud.roots[python]
        found = [known.id for known in IMAGES if image in (known.id, known.parameter) or image in known.parameter]
        for id in found or [image]:
            self._lent[id] = root

    def refuse(self, action: str, code: str, n: int = 1) -> None:
        """The next `n` calls of an action, ec2:DescribeInstances, are refused with this code."""
        self._refusals[action] = [code] * n

    def deny(self, action: str, denied: bool = True) -> None:
        """Whether the caller lacks the permission to call this: ec2:RunInstances."""
        (self._denied.add if denied else self._denied.discard)(action)

    def quota(self, code: str, value: float) -> None:
        self._quotas[code] = value

    def eventual(self, seconds: float) -> None:
        """Deny for so long that instances are there that have just been launched."""
        self._eventual = seconds

    def calls(self) -> list[str]:
        """What has been called, in order: ec2:RunInstances."""
        return list(self._calls)

    # -- Launches ----------------------------------------------------------------------------------------------------

    def launch(self, backend: Any, given: Mapping[str, Any], low: int, high: int) -> Any:
        """moto's reservation of `low` to `high` instances, by RunInstances' parameters."""
        market = "spot" if given.get("InstanceMarketOptions") else "on-demand"
        type, image = given.get("InstanceType", "m1.small"), given.get("ImageId", "")
        root = self._check(backend, given, market)
        place = zone(backend, given)
        for fault in self._faults:
            if fault.left > 0 and fault.meets(market, type, place):
                fault.left -= 1
                raise EC2ClientError(fault.code, f"{fault.code} for {type} in {place}, as the test asked for")
        rooms = [room for room in self._rooms if room.meets(market, type, place)]
        count = min([high, *(room.left for room in rooms)])
        if count < low or not count:
            code = "InsufficientInstanceCapacity"
            raise EC2ClientError(code, f"We currently do not have sufficient {type} capacity in {place}.")
        for room in rooms:
            room.left -= count
        reservation = backend.run_instances(image, count, given.get("UserData"), [], **arguments(backend, given))
        for instance in reservation.instances:
            instance.security_groups = list(instance.nics[0].group_set)
            self.cloud.launch(instance, root, spot=market == "spot")
            if profile := given.get("IamInstanceProfile"):
                backend.associate_iam_instance_profile(instance.id, profile.get("Name"), profile.get("Arn"))
        return reservation

    def _check(self, backend: Any, given: Mapping[str, Any], market: str) -> Path:
        image, type = given.get("ImageId", ""), given.get("InstanceType", "m1.small")
        if given.get("UserData") and len(base64.b64decode(str(given["UserData"]))) > USER_DATA_LIMIT:
            raise EC2ClientError("InvalidParameterValue", f"User data is limited to {USER_DATA_LIMIT} bytes")
        if market == "spot" and given.get("InstanceInitiatedShutdownBehavior"):
            message = "The instanceInitiatedShutdownBehavior parameter is not supported for spot instances"
            raise EC2ClientError("InvalidParameterCombination", message)
        if profile := given.get("IamInstanceProfile"):
            check_profile(backend, profile)
        for option in given.get("TagSpecifications") or ():
            for tag in option.get("Tags", ()):
                if len(tag["Key"]) > 127 or len(tag.get("Value", "")) > 255 or tag["Key"].startswith("aws:"):
                    raise EC2ClientError("InvalidParameterValue", f"Tag {tag['Key']!r} is not valid")
        amis = backend.describe_images(ami_ids=[image])  # Raises where there is none.
        if type not in INSTANCE_TYPES:
            raise EC2ClientError("InvalidParameterValue", f"Invalid value '{type}' for InstanceType.")
        offered = ((given.get("InstanceMarketOptions") or {}).get("SpotOptions") or {}).get("MaxPrice")
        if offered and float(offered) < SPOT_SHARE * on_demand(type):
            raise EC2ClientError("SpotMaxPriceTooLow", f"Your Spot request price of {offered} is lower than the minimum")
        arches = INSTANCE_TYPES[type]["ProcessorInfo"]["SupportedArchitectures"]
        if amis[0].architecture not in arches:
            message = f"The architecture {arches} of the specified instance type does not match that of {image}"
            raise EC2ClientError("InvalidParameterValue", message)
        pythons = {known.id: known.python for known in IMAGES if known.arch == "amd64"}
        root = self._lent.get(image) or self.cloud.roots.get(pythons.get(image, ""))
        if root is None:
            raise EC2ClientError("Unsupported", f"this cloud has no file system for {image}: see FakeEc2.image")
        return root

    def once(self, token: str | None, parameters: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """What `make` returns, or what it did when it was called with this token."""
        asked = repr(sorted((name, repr(value)) for name, value in parameters.items() if name != "ClientToken"))
        with self.cloud.lock:
            if token in self._answers:
                before, answer = self._answers[token]
                if before != asked:
                    code = "IdempotentParameterMismatch"
                    raise EC2ClientError(code, "The client token has been used with different parameters")
                return answer
            answer = make()
            if token:
                self._answers[token] = asked, answer
            return answer

    def fleet(self, backend: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        """CreateFleet of type instant: each override in turn, until there are enough instances."""
        target = given["TargetCapacitySpecification"]
        spot = target.get("DefaultTargetCapacityType", "on-demand") == "spot"
        wanted = int(target["TotalTargetCapacity"])
        instances: list[dict[str, Any]] = []
        errors: list[dict[str, Any]] = []
        for template, override in choices(given):
            if wanted <= 0:
                break
            parameters = from_template(backend, template, override, spot=spot)
            parameters["TagSpecifications"] = [
                *parameters.get("TagSpecifications", ()),
                *(each for each in given.get("TagSpecifications", ()) if each["ResourceType"] == "instance"),
            ]
            choice = {
                "Lifecycle": "spot" if spot else "on-demand",
                "LaunchTemplateAndOverrides": {"LaunchTemplateSpecification": template, "Overrides": override},
            }
            try:
                started = self.launch(backend, parameters, 1, wanted).instances
            except EC2ClientError as error:
                errors.append({**choice, "ErrorCode": error.code, "ErrorMessage": error.message})
                continue
            wanted -= len(started)
            ids = [instance.id for instance in started]
            instances.append({**choice, "InstanceIds": ids, "InstanceType": parameters["InstanceType"]})
        made = hashlib.sha256(repr((time.time(), instances)).encode()).hexdigest()[:32]
        return {"FleetId": f"fleet-{made}", "Instances": instances, "Errors": errors}

    def hide(self, ids: Iterable[str], instances: Iterable[Any]) -> None:
        """Deny that those of `ids` are there that are too new."""
        now = datetime.now(UTC)
        for instance in instances:
            launched = instance.launch_time.replace(tzinfo=UTC)
            if instance.id in ids and (now - launched).total_seconds() < self._eventual:
                raise EC2ClientError("InvalidInstanceID.NotFound", f"The instance ID '{instance.id}' does not exist")

    # -- Serving -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def serve(self, verbs: Mapping[str, Callable[..., Any]]) -> Iterator[str]:
        """moto's server, with `verbs` under /_cloud; gives its address."""
        self._verbs = verbs
        self._moto = DomainDispatcherApplication(create_backend_app)
        server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=MotoRequestHandler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.port}"
        finally:
            server.shutdown()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        status, kind, text = self._own(environ["PATH_INFO"], environ.get("HTTP_X_AMZ_TARGET", ""), environ, body)
        if not status:
            answer: Iterable[bytes] = self._moto(environ, start)
            return answer
        start(status, [("Content-Type", kind), ("Content-Length", str(len(text)))])
        return [text]

    def _own(self, path: str, target: str, environ: Mapping[str, Any], body: bytes) -> tuple[str, str, bytes]:
        """An answer that moto has not: status line, type and text; all empty where moto is to answer."""
        if path.startswith("/_cloud/"):
            try:
                result = self._verbs[path.removeprefix("/_cloud/")](**json.loads(body or b"{}"))
            except Exception as error:
                return "500 Error", "text/plain", f"{type(error).__name__}: {error}".encode()
            return "200 OK", "application/json", json.dumps(result).encode()
        service, action = _called(environ, target, body)
        self._calls.append(f"{service}:{action}")
        if f"{service}:{action}" in self._denied:
            message = f"You are not authorized to perform this operation: {service}:{action}"
            return _refusal(service, "UnauthorizedOperation" if service == "ec2" else "AccessDeniedException", message, 403)
        if codes := self._refusals.get(f"{service}:{action}"):
            return _refusal(service, codes.pop(), f"{action} is refused, as the test asked for", 503)
        if service == "ec2" and b"DryRun=true" in body:
            return _refusal(service, "DryRunOperation", "Request would have succeeded, but DryRun flag is set.", 412)
        if service == "pricing":
            return "200 OK", "application/x-amz-json-1.1", json.dumps(price_list(json.loads(body or b"{}"))).encode()
        if service == "servicequotas":
            return self._quota(json.loads(body or b"{}"))
        return "", "", b""

    def _quota(self, asked: Mapping[str, Any]) -> tuple[str, str, bytes]:
        code = asked.get("QuotaCode", "")
        value = self._quotas.get(code, 256.0)
        quota = {"ServiceCode": asked.get("ServiceCode", "ec2"), "QuotaCode": code, "Value": value, "Unit": "None"}
        return "200 OK", "application/x-amz-json-1.1", json.dumps({"Quota": quota}).encode()


def _called(environ: Mapping[str, Any], target: str, body: bytes) -> tuple[str, str]:
    scope = re.search(r"Credential=[^/]*/\d+/[^/]*/([^/]+)/", environ.get("HTTP_AUTHORIZATION", ""))
    service = scope[1].lower() if scope else ""
    if target:
        return service, target.partition(".")[2]
    return service, urllib.parse.parse_qs(body.decode(errors="replace")).get("Action", [""])[0]


def _refusal(service: str, code: str, message: str, status: int) -> tuple[str, str, bytes]:
    line = f"{status} Refused"
    if service != "ec2":
        return line, "application/x-amz-json-1.1", json.dumps({"__type": code, "message": message}).encode()
    error = f"<Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors>"
    return line, "text/xml", f"<Response>{error}<RequestID>0</RequestID></Response>".encode()
