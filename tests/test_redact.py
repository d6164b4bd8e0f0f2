"""What is taken out of texts that are to be given away, and what is not."""

from __future__ import annotations

import base64
import json
import random

import pytest

from bigmachine.authority import Authority
from bigmachine.credentials import Role
from bigmachine.inside.redact import LONGEST_BLOCK, REDACTED, Redaction, secrets
from bigmachine.profiling.values import Place, Profile, Sample

PEM = Authority("s-1").issue(Role.DRIVER, "d-1").key.decode()


def without(text: str) -> str:
    return Redaction().text(text)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("password=hunter2", f"password={REDACTED}"),
        ("DB_PASSWORD: 'hun ter2', user: me", f"DB_PASSWORD: {REDACTED}, user: me"),
        ('{"passwd": "hun\'ter2", "n": 1}', f'{{"passwd": {REDACTED}, "n": 1}}'),
        (r"{\"secret\": \"hunter2\"}", rf"{{\"secret\": {REDACTED}}}"),
        ("my_api_key = hunter2)", f"my_api_key = {REDACTED})"),
        ("STRIPE_KEY=hunter2", f"STRIPE_KEY={REDACTED}"),
        ("token: hunter2", f"token: {REDACTED}"),
        ("AWS_SESSION_TOKEN=hunter2", f"AWS_SESSION_TOKEN={REDACTED}"),
        ("mysql --password hunter2 -h db", f"mysql --password {REDACTED} -h db"),
        ("['app', '--api-token', 'hunter2', '-v']", f"['app', '--api-token', {REDACTED}, '-v']"),
        ("Authorization: Basic aHVudGVyMg==", f"Authorization: {REDACTED}"),
        ('{"authorization": "Digest hunter2 x", "a": 1}', f'{{"authorization": "{REDACTED}", "a": 1}}'),
        ("Cookie: session=hunter2; other=hunter2", f"Cookie: {REDACTED}"),
        ("curl -H 'x: Bearer hunter2-hunter2'", f"curl -H 'x: Bearer {REDACTED}'"),
        ("postgres://me:hunter2@db:5432/x", f"postgres://me:{REDACTED}@db:5432/x"),
        ("https://s3/x?X-Amz-Signature=hunter2&y=1", f"https://s3/x?X-Amz-Signature={REDACTED}&y=1"),
        ("id AKIAIOSFODNN7EXAMPLE.", f"id {REDACTED}."),
        ("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", REDACTED),
        (f"pushing with ghp_{'a1' * 18}", f"pushing with {REDACTED}"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-def", REDACTED),
    ],
)
def test_secrets(text: str, left: str) -> None:
    assert without(text) == left
    assert (
        without(f"2026-11-22T10:00:00.000Z 0 stdout {text}\nnext") == f"2026-11-22T10:00:00.000Z 0 stdout {left}\nnext"
    )


@pytest.mark.parametrize(
    "text",
    [
        "b1946ac92492d2347c6235b4d2611184b1946ac92492d2347c6235b4d2611184",
        "/Users/Anna/Documents/Projects2026/simulation/results/whatever/Thing.py:17",
        "tokens: 512, tokens/s: 18.5, token=7",
        "machine https://localhost:40661/m-b9f4f7/ stopped: it was asked to",
        "https://example.org:8080/a@b",
        "gpg --no-password --batch, and -- password or not",
        "the bearer of bad news, and a basic assumption",
        "loss=0.25 keys: 4 key=value monkey=5 author: me",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "-----BEGINNING-----",
        "",
    ],
)
def test_what_is_none(text: str) -> None:
    assert without(text) == text


def test_whatever_looks_random() -> None:
    chance = random.Random(1)
    texts = [base64.b64encode(chance.randbytes(30)).decode() for _ in range(1000)]
    assert sum(without(f"key is {text}") == f"key is {REDACTED}" for text in texts) >= 990


# -- PEM -----------------------------------------------------------------------------------------------------------------


def body() -> list[str]:
    return PEM.strip().splitlines()[1:-1]


@pytest.mark.parametrize(
    "text",
    [
        PEM,
        json.dumps({"key": PEM}),
        repr(PEM.encode()),
        PEM.replace("\n", "\r\n"),
        "".join(f"2026-11-22T10:00:00.000Z 0 stdout {line}\n" for line in PEM.splitlines()),
        "\n".join(PEM.splitlines()[1:]),
        "".join(f"10:00 {line}\n" for line in PEM.splitlines()[1:]),
        "\n".join(PEM.splitlines()[:-1]),
        PEM.replace("\n", "\nanother process says this\n"),
        PEM + PEM,
    ],
    ids=[
        "alone",
        "json",
        "bytes",
        "crlf",
        "log",
        "begun before",
        "log begun before",
        "no end",
        "between others",
        "two",
    ],
)
def test_pem(text: str) -> None:
    left = without(f"before\n{text}\nafter it")
    for line in body():
        assert line not in left
        assert line[8:40] not in left
    assert left.startswith("before\n")
    assert left.splitlines()[-1].startswith("after ")


def test_a_block_without_an_end_ends() -> None:
    lines = [f"line {number} is fine" for number in range(LONGEST_BLOCK + 10)]
    left = without("\n".join(["-----BEGIN RSA PRIVATE KEY-----", *lines])).splitlines()
    assert left[-5:] == lines[-5:]


# -- What is known -------------------------------------------------------------------------------------------------------


def test_secrets_of_this_process() -> None:
    variables = {"DB_PASSWORD": "correct horse", "PWD": "/somewhere", "HOME": "/root", "API_TOKEN": "tok-en1"}
    arguments = ["--api-key", "key-value", "-x", "1", "--token=to-be-hidden", "--secret"]
    known = secrets(variables, arguments)
    assert known == {"correct horse", "tok-en1", "key-value", "to-be-hidden"}
    assert secrets({}) == set()
    redaction = Redaction(known)
    assert redaction.text("said: correct horse, tok-en1key-value") == f"said: {REDACTED}, {REDACTED}{REDACTED}"
    assert Redaction({"no", ""}).text("no news") == "no news"


def test_of_two_known_ones_the_longer() -> None:
    assert Redaction({"hunter", "hunter2"}).text("hunter2") == REDACTED


def test_values() -> None:
    document = {"password": "x", "deep": [{"note": "token=abc", "n": 1, "nothing": None}], "api_key": ["a", 2]}
    assert Redaction().value(document) == {
        "password": REDACTED,
        "deep": [{"note": f"token={REDACTED}", "n": 1, "nothing": None}],
        "api_key": [REDACTED, 2],
    }
    assert Redaction({"known-one"}).value({'jobs{kind="known-one"}': 3}) == {f'jobs{{kind="{REDACTED}"}}': 3}


def test_profiles() -> None:
    profile = Profile(
        "threads",
        (("threads", "count"),),
        "threads",
        [Place("run", "/home/known-one/app.py", 3)],
        [Sample((0,), (1,), (("thread", "known-one"),))],
        0.0,
        comments=("password=x",),
    )
    left = Redaction({"known-one"}).profile(profile)
    assert (left.places[0].file, left.samples[0].labels, left.comments) == (
        f"/home/{REDACTED}/app.py",
        (("thread", REDACTED),),
        (f"password={REDACTED}",),
    )


@pytest.mark.parametrize(
    "text",
    [
        *("a", "://", "password", "password='", 'passwd"', "bearer ", "token:", "token\\"),
        *("eyJ", "x-", "-----BEGIN ", "A1a/", "_KEY="),
    ],
)
def test_long_lines_take_no_time(text: str) -> None:
    """As they would where a pattern is tried from each place to the end."""
    without(text * (300_000 // len(text)))
