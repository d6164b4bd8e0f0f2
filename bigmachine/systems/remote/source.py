"""The agent as it goes to a host: `bigmachine.bootstrap`'s modules as one text, with who it is.

What only readers and type checkers need is left out: docstrings, comments, annotations. The text is Python in one line of
ASCII, so that whoever starts an interpreter with it need not say where it ends.
"""

from __future__ import annotations

import ast
import base64
import functools
import importlib.resources
import zlib
from collections.abc import Mapping
from typing import Any

from ...credentials import Credentials
from ...pack.imports import syntax

LOADER = "import sys; exec(sys.stdin.buffer.readline())"
"""What a Python on the host executes (``python3 -c``), with `agent_source` on its standard input."""

MODULES = ("parts", "store", "arrival", "pythons", "requests", "agent")
"""Of `bigmachine.bootstrap`, in the order in which they come: later ones use names of earlier ones."""


def agent_source(credentials: Credentials, settings: Mapping[str, Any]) -> bytes:
    """What goes to the standard input of ``python3 -c LOADER``; ``python3 -``, and ``python3 FILE``, take it as well.

    `credentials` are of role agent, `settings` as `bootstrap.agent.main` documents them. It holds the private key: not for a
    command line, the environment, a log or a disk.
    """
    packed = zlib.compress(agent_text(credentials, settings).encode(), 9)
    return b"import base64,zlib;exec(zlib.decompress(base64.b85decode(%r)))\n" % base64.b85encode(packed).decode()


def agent_text(credentials: Credentials, settings: Mapping[str, Any]) -> str:
    """The same program, to be read, or to be compressed with what is around it."""
    return f"{_program()}\nmain({ {**settings, 'credentials': credentials.to_json()}!r})\n"


@functools.cache
def _program() -> str:
    body: dict[str, None] = {}  # In order; what several modules import, once.
    folder = importlib.resources.files(__name__.partition(".")[0]) / "bootstrap"
    for name in MODULES:
        module = syntax((folder / f"{name}.py").read_text("utf-8"), name)
        body.update((ast.unparse(statement), None) for statement in _Shorter().visit(module).body)
    return "\n".join(body)


class _Shorter(ast.NodeTransformer):
    """Without docstrings and annotations, and without what is imported for annotations alone, or from the module before."""

    def visit_Module(self, node: ast.Module) -> ast.Module:
        self.generic_visit(node)
        used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        node.body = [each for each in node.body if not _only_for_types(each, used)]
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.stmt | None:
        return None if isinstance(node.value, ast.Constant) else node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt | None:
        self.generic_visit(node)
        return None if node.value is None else ast.Assign([node.target], node.value, lineno=node.lineno)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.returns = None
        node.body = node.body or [ast.Pass()]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node


def _only_for_types(node: ast.stmt, used: set[str]) -> bool:
    if not isinstance(node, ast.ImportFrom):
        return False
    node.names = [name for name in node.names if name.name in used]
    return bool(node.level) or node.module == "__future__" or not node.names
