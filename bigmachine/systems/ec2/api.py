"""The AWS API: one place that calls it, and one error that says what to do.

Operations, their parameters and their answers have the API's own names (``DescribeInstances``): AWS's reference is theirs.
Where credentials, region and endpoint come from is AWS's own configuration (environment, ``~/.aws``, instance profile), which
the settings ``profile`` and ``region`` override.

Rule 1. All calls are safe to make from any thread. Clients are made once; making one loads a model of megabytes.
Rule 2. We keep well below AWS's rates by ourselves (`Bucket`), as they are an account's, not a program's; botocore's adaptive
retries are for what others in the account do (but see `HASTY`).
Rule 3. botocore's exceptions do not leave this module.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, Protocol

import boto3
from botocore import xform_name
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from ...errors import BigmachineError
from ...info import VERSION

CONFIG = Config(
    retries={"mode": "adaptive", "total_max_attempts": 6},
    connect_timeout=10,
    read_timeout=60,  # RunInstances of a hundred takes some 10 s; a CreateFleet that looks for capacity, 30.
    max_pool_connections=32,
    user_agent_extra=f"bigmachine/{VERSION}",
)

HASTY = {"RunInstances", "CreateFleet"}
"""Operations whose failures are mostly for us to decide about: AWS answers that a zone has no capacity with status 500, which
botocore would try again with growing pauses, for half a minute in each zone."""

HASTY_CONFIG = CONFIG.merge(Config(retries={"mode": "standard", "total_max_attempts": 2}))

SLOW_DOWN = {"RequestLimitExceeded", "Throttling", "ThrottlingException"}
PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds before such an operation is tried again, where AWS asks us to slow down."""

RATES: Mapping[str, tuple[float, float]] = {"look": (5.0, 20.0), "change": (2.0, 10.0)}
"""Calls a second, and how many at once, for those that only look and for the others. AWS allows an account, in each region, 20
and 100 of the first, 5 and 50 of most of the second, and of RunInstances 2 and 5."""


class Where(Protocol):
    """The part of `settings.Settings` that says whose API, and where."""

    @property
    def region(self) -> str: ...
    @property
    def profile(self) -> str: ...


class Ec2Error(BigmachineError):
    """AWS refused `operation`: `code` is its own word for why, or botocore's where nothing got as far; `message` its text."""

    def __init__(self, operation: str, code: str, message: str, region: str = "") -> None:
        super().__init__(operation, code, message, region)
        self.operation = operation
        self.code = code
        self.message = message
        self.region = region

    def __str__(self) -> str:
        where = f" in {self.region}" if self.region else ""
        text = f"{self.operation}{where}: {self.message.rstrip('. ')} ({self.code})"
        return f"{text}; {way_out}" if (way_out := remedy(self.operation, self.code)) else text


_ASK = "give the identity that you use a policy that allows it (`bigmachine doctor ec2` shows all that are needed)"
_LOGIN = "log in again (`aws sso login`, `aws configure`), or choose another profile: -bigm.ec2profile"
_QUOTA = "ask for a higher quota (`bigmachine doctor ec2` says which), or for fewer or smaller machines"

REMEDIES: Mapping[str, str] = {
    "NoCredentialsError": "run `aws configure`, set AWS_PROFILE or AWS_ACCESS_KEY_ID, or use -bigm.ec2profile",
    "PartialCredentialsError": "both the key's id and the key are needed: run `aws configure`",
    "ProfileNotFound": "`aws configure list-profiles` shows those that there are; -bigm.ec2profile chooses",
    "NoRegionError": "choose one: -bigm.ec2region=us-east-1, AWS_REGION, or `aws configure`",
    "InvalidRegionError": "a region looks like us-east-1: -bigm.ec2region",
    "EndpointConnectionError": "is there a network, and does the region (-bigm.ec2region) exist?",
    "ConnectTimeoutError": "is there a network that lets HTTPS out?",
    "ResponseParserError": "does a proxy, or the login page of a network, answer in AWS's place?",
    "SSLError": "does a proxy answer in AWS's place? AWS_CA_BUNDLE names the certificates to trust",
    "SSOTokenLoadError": _LOGIN,
    "UnauthorizedSSOTokenError": _LOGIN,
    "TokenRetrievalError": _LOGIN,
    "CredentialRetrievalError": _LOGIN,
    "ExpiredToken": _LOGIN,
    "ExpiredTokenException": _LOGIN,
    "RequestExpired": f"is this host's clock right? Else {_LOGIN}",
    "AuthFailure": f"is the region enabled for the account, and this host's clock right? Else {_LOGIN}",
    "InvalidClientTokenId": _LOGIN,
    "UnrecognizedClientException": _LOGIN,
    "SignatureDoesNotMatch": f"is this host's clock right? Else {_LOGIN}",
    "OptInRequired": "enable EC2, and the region, for the account in the AWS console",
    "Blocked": "AWS has blocked the account: see the AWS console",
    "PendingVerification": "AWS verifies the account for this region, within hours: try again, or in another region",
    "RequestLimitExceeded": "others in the account call the API as well: try again",
    "VcpuLimitExceeded": _QUOTA,
    "InstanceLimitExceeded": _QUOTA,
    "MaxSpotInstanceCountExceeded": f"{_QUOTA}; on demand has a quota of its own: -bigm.ec2ondemand",
    "SpotMaxPriceTooLow": "offer more (-bigm.ec2maxprice; by default it is the on-demand price), or use -bigm.ec2ondemand",
    "InsufficientInstanceCapacity": "AWS has no more of these now: name several types (-bigm.ec2type=m7i.large,m6i.large)",
    "InsufficientFreeAddressesInSubnet": "use other subnets: -bigm.ec2subnets",
    "InvalidInstanceType": "`bigmachine doctor ec2` checks the types: -bigm.ec2type",
    "InvalidAMIID.NotFound": "images belong to one region: see -bigm.ec2ami and -bigm.ec2region",
    "InvalidAMIID.Malformed": "an image's id looks like ami-0123456789abcdef0: -bigm.ec2ami",
    "InvalidKeyPair.NotFound": "key pairs belong to one region: see -bigm.ec2keypair and -bigm.ec2region",
    "InvalidSubnetID.NotFound": "subnets belong to one region: see -bigm.ec2subnets and -bigm.ec2region",
    "InvalidGroup.NotFound": "groups belong to one network: see -bigm.ec2securitygroups and -bigm.ec2subnets",
    "InvalidGroupId.Malformed": "a group's id looks like sg-0123456789abcdef0: -bigm.ec2securitygroups",
    "VPCIdNotSpecified": "the region has no default VPC: name subnets (-bigm.ec2subnets), or `aws ec2 create-default-vpc`",
    "ParameterNotFound": "AWS publishes no such image there: name one, -bigm.ec2ami, or use another region",
}
"""What to do, by code."""

DENIED = {"UnauthorizedOperation", "AccessDenied", "AccessDeniedException", "NotAuthorized"}
"""The codes by which services say that the identity may not."""

_SERVICES = {"service-quotas": "servicequotas"}
"""Services whose permissions have another prefix than their own name."""


def remedy(operation: str, code: str) -> str:
    """What to do about it; empty where nobody knows. `operation` is with its service: ``ec2:RunInstances``."""
    if code in DENIED:
        service, _, name = operation.rpartition(":")
        return f"allow {_SERVICES.get(service, service or 'ec2')}:{name}: {_ASK}"
    return REMEDIES.get(code, "")


class Bucket:
    """How often something may be done: `rate` times a second, `burst` times at once. Pure: the caller has the clock."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._level = burst
        self._at = 0.0

    def take(self, now: float) -> float:
        """Take a turn; returns the seconds to wait for it."""
        self._level = min(self._burst, self._level + (now - self._at) * self._rate) - 1.0
        self._at = now
        return max(0.0, -self._level / self._rate)


class Api:
    """AWS, as `settings` reach it; in `region` where that is given. Nothing is loaded, and nobody asked, before the first call.

    `sleep` and `clock` are the limiter's, for tests.
    """

    def __init__(
        self,
        settings: Where,
        region: str = "",
        *,
        sleep: Callable[[float], object] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._profile = settings.profile
        self._wanted = region or settings.region
        self._sleep = sleep
        self._clock = clock
        self._lock = threading.Lock()
        self._clients: dict[tuple[str, str, bool], Any] = {}
        self._buckets: dict[tuple[str, str], Bucket] = {}

    @cached_property
    def _session(self) -> Any:
        _quiet()
        region = self._wanted or os.environ.get("AWS_REGION")  # As all of AWS's own tools have it, but for boto3.
        try:
            return boto3.session.Session(profile_name=self._profile or None, region_name=region or None)
        except BotoCoreError as error:
            raise _translated("aws", error, self._wanted) from error

    @cached_property
    def region(self) -> str:
        """The region's name. Raises `Ec2Error` where none is configured."""
        with self._lock:
            name: str | None = self._session.region_name
        if not name:
            raise Ec2Error("ec2", "NoRegionError", "no region is configured")
        return name

    def call(self, service: str, operation: str, *, region: str = "", **parameters: Any) -> dict[str, Any]:
        """The answer of ``service:operation``. `region` is for services that are elsewhere. Raises `Ec2Error`."""
        where = region or self.region
        client = self._client(service, where, operation in HASTY)
        method = getattr(client, xform_name(operation))
        pauses = iter(PAUSES if operation in HASTY else ())
        while True:
            self._wait(operation, where)
            try:
                answer: dict[str, Any] = method(**parameters)
                return answer
            except (ClientError, BotoCoreError, ResponseParserError) as error:
                translated = _translated(f"{service}:{operation}", error, where)
                if translated.code not in SLOW_DOWN or (pause := next(pauses, None)) is None:
                    raise translated from error
            self._sleep(pause)

    def pages(self, service: str, operation: str, key: str, **parameters: Any) -> Iterator[Any]:
        """The items of the list `key` in the answers, page after page. Raises `Ec2Error`."""
        while True:
            answer = self.call(service, operation, **parameters)
            yield from answer.get(key, ())
            token = answer.get("NextToken")
            if not token:
                return
            parameters["NextToken"] = token

    def _client(self, service: str, region: str, hasty: bool) -> Any:
        with self._lock:
            client = self._clients.get((service, region, hasty))
            if client is None:
                config = HASTY_CONFIG if hasty else CONFIG
                try:
                    client = self._session.client(service, region_name=region, config=config)
                except (BotoCoreError, ValueError) as error:
                    raise _translated(service, error, region) from error
                self._clients[service, region, hasty] = client
        return client

    def _wait(self, operation: str, region: str) -> None:
        kind = "look" if operation.startswith(("Describe", "Get", "List")) else "change"
        with self._lock:
            bucket = self._buckets.setdefault((kind, region), Bucket(*RATES[kind]))
            seconds = bucket.take(self._clock())
        if seconds:
            self._sleep(seconds)


def _quiet() -> None:
    """botocore tells every program that logs at level INFO where it has found credentials; unless somebody wants to know."""
    logger = logging.getLogger("botocore")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING)


def _translated(operation: str, error: Exception, region: str) -> Ec2Error:
    if isinstance(error, ClientError):
        told = error.response.get("Error", {})
        return Ec2Error(operation, str(told.get("Code", "Unknown")), _line(told.get("Message") or "no reason given"), region)
    if isinstance(error, ResponseParserError):  # Its own text has all that was answered, pages of HTML.
        return Ec2Error(operation, "ResponseParserError", "what answered is not AWS's API", region)
    return Ec2Error(operation, type(error).__name__, _line(str(error)), region)


def _line(text: Any) -> str:
    """AWS's texts may have several lines, and end in an encoded message of kilobytes that only its account can decode."""
    text = " ".join(str(text).split())
    return str(text.partition(" Encoded authorization failure message")[0])
