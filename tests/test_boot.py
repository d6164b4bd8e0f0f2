"""What a boot refuses before anything of the user's is sent."""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from typing import Any, cast

import pytest

from bigmachine.boot import Boot, Services
from bigmachine.errors import ProgramMismatch
from bigmachine.info import VERSION, Info, python_version
from bigmachine.system import Launched

SAME = Info("m-1", "host", 1, 1, python_version(), "linux/amd64", VERSION)


def boot() -> Boot:
    fields: dict[str, Any] = {field.name: None for field in dataclasses.fields(Boot) if field.init}
    fields |= {"launched": cast("Future[Launched]", Future()), "services": Services(b"", frozenset())}
    return Boot(**{name: value for name, value in fields.items() if not name.startswith("_")})


def test_the_same_on_both_sides() -> None:
    boot()._check(SAME)


@pytest.mark.parametrize(
    ("field", "theirs", "what"), [("python", "3.9", "the Python version"), ("version", "0.0.1", "the version of bigmachine")]
)
def test_a_difference_is_refused_with_both_values(field: str, theirs: str, what: str) -> None:
    with pytest.raises(ProgramMismatch) as caught:
        boot()._check(dataclasses.replace(SAME, **{field: theirs}))
    assert (caught.value.what, caught.value.theirs) == (what, theirs)
    assert caught.value.ours in str(caught.value)
    assert theirs in str(caught.value)
