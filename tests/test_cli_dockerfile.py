"""The Dockerfile can be carried out by packaging/try-dockerfile, whose reading of it is tested here; that itself needs root."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "packaging" / "try-dockerfile"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_reads_instructions(script: dict[str, Any]) -> None:
    text = '# A comment\nFROM x AS y\nCOPY --from=y a b/\nRUN one \\\n    && two\nENTRYPOINT ["c", "d e"]\n'
    found = list(script["instructions"](text))
    assert [(line.name, line.text, line.flags) for line in found] == [
        ("FROM", "x AS y", {}),
        ("COPY", "a b/", {"from": "y"}),
        ("RUN", "one  && two", {}),
        ("ENTRYPOINT", '["c", "d e"]', {}),
    ]
    assert found[-1].words == ["c", "d e"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("bigmachine/cli/pack.py", False),
        ("bigmachine/pack/platforms_data/linux-amd64-3.12.json", False),
        ("pyproject.toml", False),
        ("bigmachine/cli/__pycache__/pack.cpython-312.pyc", True),
        ("bigmachine/old.pyc", True),
        (".git/HEAD", True),
        ("tests/test_cli.py", True),
        ("examples/pyproject.toml", True),
    ],
)
def test_the_context_is_the_package_alone(script: dict[str, Any], path: str, expected: bool) -> None:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert script["ignored"](path, patterns) is expected


def test_the_dockerfile_copies_what_the_build_needs(script: dict[str, Any]) -> None:
    found = list(script["instructions"]((ROOT / "Dockerfile").read_text("utf-8")))
    copied = [word for line in found if line.name == "COPY" and not line.flags for word in line.words[:-1]]
    assert copied == ["pyproject.toml", "README.md", "LICENSE", "bigmachine"]
    assert all((ROOT / name).exists() for name in copied)
