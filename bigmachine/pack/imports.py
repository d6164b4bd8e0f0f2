"""What a Python file imports, and whether running it does anything: read from its syntax; nothing is executed."""

from __future__ import annotations

import ast
import io
import time
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import PackError

MISSING = frozenset({"ImportError", "ModuleNotFoundError", "Exception", "BaseException"})
"""Whoever catches one of these goes on without the module."""

PURE = frozenset({"getLogger", "compile", "TypeVar", "ParamSpec", "NewType", "namedtuple", "Path", "frozenset"})
"""What is called so makes a constant: `log = logging.getLogger("app")` alone is no program."""

SHOWN = 80
"""Characters of an offending line in an error: one line of a terminal."""


@dataclass(frozen=True)
class Import:
    """One import: as in `ast.ImportFrom`, with `names` empty for ``import module``.

    `optional`: the program expects that the module may be missing. `computed`: a module whose name is known at run time only.
    """

    module: str
    level: int
    names: tuple[str, ...]
    line: int
    optional: bool
    computed: bool = False


@dataclass(frozen=True)
class Parsed:
    """A file's syntax; `deep` where it may call an import function."""

    tree: ast.Module
    deep: bool


def parse(path: Path, shown: str, whole: bool = True) -> Parsed:
    """Read a file, called `shown` in errors. `whole`: with what only a compiler finds (``return`` outside of a function).

    Raises `PackError` with the line where it is no Python.
    """
    text = read_text(path, shown)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of invalid escapes and the like: its author hears them when it runs.
            tree = syntax(text, shown)
            if whole:
                compile(text, shown, "exec", dont_inherit=True)  # Faster than from the tree.
    except SyntaxError as error:
        line = error.lineno or 1
        lines = text.splitlines()
        content = (error.text or (lines[line - 1] if line <= len(lines) else "")).strip()
        raise PackError(f"{shown}:{line}: {error.msg}: `{content[:SHOWN]}`") from None
    except (RecursionError, MemoryError):
        raise PackError(f"{shown}: nested too deeply for Python to read") from None
    return Parsed(tree, "import_module" in text or "__import__" in text)


def syntax(text: str, name: str = "<unknown>") -> ast.Module:
    """`ast.parse`. Python 3.11 raises SystemError where, in the midst of it, garbage is collected and a finalizer parses, too
    (a traceback that is printed does, for one): then it is tried again."""
    for pause in (0.0, 0.01, 0.1, 0.5):
        try:
            return ast.parse(text, name)
        except SystemError:
            time.sleep(pause)
    return ast.parse(text, name)


def read_text(path: Path, shown: str) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PackError(f"cannot read {shown}: {error.strerror or error}") from error
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise PackError(f"{shown}:{line}: null bytes: this is no Python source")
    head = data.splitlines()[:2]
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
    except SyntaxError as error:
        line = next((i for i, content in enumerate(head, 1) if b"coding" in content), 0)
        if line:
            cookie = head[line - 1].decode("ascii", "replace").strip()
            raise PackError(f"{shown}:{line}: {error.msg or 'unknown encoding'}: `{cookie[:SHOWN]}`") from None
        encoding = "utf-8"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{data[error.start]:02x}"
        raise PackError(f"{shown}:{line}: not {encoding}: {byte}: save the file as UTF-8") from None
    except LookupError as error:  # A codec that makes bytes of bytes.
        raise PackError(f"{shown}:1: {error}") from None


def find_imports(parsed: Parsed) -> Iterator[Import]:
    """In the order of the source, wherever they stand; without those for type checkers only."""
    stack: list[tuple[ast.AST, bool]] = [(parsed.tree, False)]
    while stack:  # No recursion: a long chain of operators is as deep as it is long.
        node, optional = stack.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, 0, (), node.lineno, optional)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield Import(node.module or "", node.level, names, node.lineno, optional)
        else:
            if isinstance(node, ast.Call):
                yield from _called(node, optional)
            stack += reversed([*_children(node, optional, parsed.deep)])


def _called(call: ast.Call, optional: bool) -> Iterator[Import]:
    """The import that ``importlib.import_module(…)`` or ``__import__(…)`` is."""
    function = _last_name(call.func)
    if function not in ("import_module", "__import__") or not call.args:
        return
    name = call.args[0]
    if not (isinstance(name, ast.Constant) and isinstance(name.value, str)):
        yield Import("", 0, (), call.lineno, optional, computed=True)
        return
    module = name.value.lstrip(".")
    level = len(name.value) - len(module)
    anchor = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "package")]
    if level and anchor and isinstance(anchor[0], ast.Constant) and isinstance(anchor[0].value, str):
        parents = anchor[0].value.split(".")
        yield Import(".".join([*parents[: len(parents) - level + 1], module]), 0, (), call.lineno, optional)
    else:
        yield Import(module, level, (), call.lineno, optional)


def _children(node: ast.AST, optional: bool, deep: bool) -> Iterator[tuple[ast.AST, bool]]:
    """The nodes below, each with whether an import there is optional. Expressions only if `deep`."""
    if isinstance(node, ast.If):
        yield from _branches(node, optional, deep)
    elif isinstance(node, ast.Try | ast.TryStar):
        guarded = optional or any(_catches(handler.type) for handler in node.handlers)
        yield from ((child, guarded) for child in (*node.body, *node.handlers, *node.orelse))
        yield from ((child, optional) for child in node.finalbody)
    elif isinstance(node, ast.With) and any(_suppresses(item.context_expr) for item in node.items):
        yield from ((child, True) for child in node.body)
    elif deep:
        yield from ((child, optional) for child in ast.iter_child_nodes(node))
    else:
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            part = getattr(node, field, None)
            if isinstance(part, list):
                yield from ((child, optional) for child in part)


def _branches(node: ast.If, optional: bool, deep: bool) -> Iterator[tuple[ast.AST, bool]]:
    test, negated = node.test, False
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test, negated = test.operand, True
    typing = _last_name(test) == "TYPE_CHECKING"
    # What one version or operating system imports need not exist on another.
    either = optional or any(_last_name(part) in ("version_info", "platform", "name") for part in _attributes(test))
    if deep:
        yield test, optional
    if not typing or negated:
        yield from ((child, either) for child in node.body)
    if not typing or not negated:
        yield from ((child, either) for child in node.orelse)


def _attributes(test: ast.expr) -> Iterator[ast.Attribute]:
    """``sys.version_info`` and the like, within a condition."""
    for node in ast.walk(test):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("sys", "os"):
            yield node


def _catches(kind: ast.expr | None) -> bool:
    if isinstance(kind, ast.Tuple):
        return any(_catches(one) for one in kind.elts)
    return kind is None or _last_name(kind) in MISSING


def _suppresses(context: ast.expr) -> bool:
    return isinstance(context, ast.Call) and _last_name(context.func) == "suppress" and any(map(_catches, context.args))


def _last_name(node: ast.expr) -> str:
    """``c`` of ``a.b.c``."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


# -- Whether it does anything --------------------------------------------------------------------------------------------


def does_something(tree: ast.Module) -> bool:
    """Whether running the file does more than import and define."""
    return not _define(tree.body)


def only_imports(tree: ast.Module) -> bool:
    """Whether there is nothing but imports (and a docstring): what they import may be what runs."""
    kinds = [
        type(node) for node in tree.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
    return bool(kinds) and all(kind in (ast.Import, ast.ImportFrom) for kind in kinds)


def _define(body: Iterable[ast.stmt]) -> bool:
    return all(_defines(node) for node in body)


def _defines(node: ast.stmt) -> bool:
    if isinstance(node, ast.If):
        main = any(isinstance(part, ast.Name) and part.id == "__name__" for part in ast.walk(node.test))
        return not main and not _calls(node.test) and _define([*node.body, *node.orelse])
    if isinstance(node, ast.Try):
        handlers = [child for handler in node.handlers for child in handler.body]
        return _define([*node.body, *handlers, *node.orelse, *node.finalbody])
    if isinstance(node, ast.Expr | ast.Assign | ast.AnnAssign | ast.AugAssign):
        return node.value is None or not _calls(node.value)
    if type(node).__name__ == "TypeAlias":  # Since Python 3.12.
        return True
    return isinstance(
        node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Pass
    )


def _calls(value: ast.expr) -> bool:
    active = ast.Call | ast.Await | ast.Yield | ast.YieldFrom | ast.NamedExpr
    for node in ast.walk(value):
        if isinstance(node, active) and not (isinstance(node, ast.Call) and _last_name(node.func) in PURE):
            return True
    return False
