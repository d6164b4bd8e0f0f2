"""What is written on what is made."""

from __future__ import annotations

import os
from typing import Any

import pytest
from amazon import Scripted

from bigmachine.systems.ec2 import naming
from bigmachine.systems.ec2.api import Ec2Error


def test_the_name_says_who_what_and_how() -> None:
    assert naming.instance_name("ada", "bigpi.py", "1a2b3c4d5e6f", ["-n", "100"]) == "ada bigmachine bigpi.py 1a2b3c4d -n 100"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("-f=a:b/c@d.e+f_g", "-f=a:b/c@d.e+f_g"),
        ("größe 5", "größe 5"),
        ("a\n\tb  c", "a b c"),
        ('{"q": [1]}', "__q_: _1__"),
        ("x" * 300, "x" * 252 + "..."),
        ("", ""),
    ],
)
def test_only_what_aws_takes(text: str, value: str) -> None:
    assert naming.value(text) == value


def test_all_tags() -> None:
    tags = naming.tags("a name", "s-1", "arn:aws:iam::1:user/ada", 0.0, {"team": "physics"})
    assert tags["Name"] == "a name"
    assert tags["team"] == "physics"
    assert (tags["bigmachine:session"], tags["bigmachine:owner"]) == ("s-1", "arn:aws:iam::1:user/ada")
    assert tags["bigmachine:driver"].split(":")[1] == str(os.getpid())
    assert tags["bigmachine:created"] == "1970-01-01T00:00:00Z"
    assert tags["bigmachine:expires"] == "1970-01-01T01:00:00Z"
    assert all(len(key) <= 128 and len(value) <= 256 for key, value in tags.items())


def test_two_renewals_may_fail() -> None:
    assert naming.LIFE >= 3 * naming.RENEW


def test_the_owner_is_whom_aws_knows_or_who_is_logged_in() -> None:
    api = Scripted({"GetCallerIdentity": lambda: {"Arn": "arn:aws:sts::1:assumed-role/r/ada@example.org"}})
    assert naming.owner(api) == "arn:aws:sts::1:assumed-role/r/ada@example.org"

    def refuse() -> dict[str, Any]:
        raise Ec2Error("sts:GetCallerIdentity", "AccessDenied", "no")

    assert naming.owner(Scripted({"GetCallerIdentity": refuse})) == naming.login()


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(naming.getpass, "getuser", nobody)
    assert naming.login() == f"uid-{os.getuid()}"
