"""What the user has set for a system, wherever he has written it, and where that is.

The settings of a system are one frozen dataclass, a `Section`; each of its fields is made by `setting`. `load` fills it. For
each field the first of these that says something decides, as a whole (lists are not joined):

1. what the launcher was given: a flag such as ``-bigm.ec2type``, or an option of `driver.start`,
2. the environment: ``BIGMACHINE_EC2_TYPE``, where it is not empty,
3. ``[ec2]`` in ``bigmachine.toml`` in the working directory,
4. ``[tool.bigmachine.ec2]`` in ``pyproject.toml`` in the working directory,
5. ``[ec2]`` in the user's own ``bigmachine.toml`` (`user_file`),
6. the default.

In texts (flags, environment) lists are separated by commas, tables are ``key=value,key=value``, and truth is ``true`` or
``false``; in files each is what TOML has for it. Whatever cannot be right is a `UsageError` that says where it stands: a key
that nobody knows, a value of another kind, a file that is no TOML. Files and variables are checked even where a flag
decides: else the mistake would show up on the day on which the flag is left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .errors import UsageError

FILE = "bigmachine.toml"
PROJECT = "pyproject.toml"

DEFAULT = "default"
"""The origin of what nobody has set."""

TRUTHS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
"""In flags and variables."""

D = TypeVar("D")
S = TypeVar("S", bound="Section")


class Setting(NamedTuple):
    """One field of a `Section`. `key` is its name in files, `flag` the flag and option without ``-bigm.``; its kind is that of
    `default`: bool, int, str, a tuple of texts, or a dict of texts. `such` is an example."""

    field: str
    key: str
    flag: str
    variable: str
    default: Any
    such: Any
    single: bool
    number: bool
    path: bool


def setting(
    default: D,
    *,
    such: D | None = None,
    key: str = "",
    flag: str = "",
    single: bool = False,
    number: bool = False,
    path: bool = False,
) -> D:
    """A field of a `Section`. `such` is an example of a value, for errors. By default `key` is the field's name, and `flag` the
    section's name and the key. `single`: in files a list may also be one text, as in flags. `number`: a text that may be
    written as a number. `path`: a file, or several, relative to the file that names them."""
    metadata: dict[str, Any] = {"default": default, "such": such, "key": key, "flag": flag}
    metadata |= {"single": single, "number": number, "path": path}
    if isinstance(default, dict):
        made: Any = field(default_factory=default.copy, hash=False, metadata=metadata)
    else:
        made = field(default=default, metadata=metadata)
    return made  # type: ignore[no-any-return]  # Typed as what the field holds, like `dataclasses.field` itself.


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the settings of all systems have. `str` of one is a section for a file, with the origin of each value."""

    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    """By field: ``"flag -bigm.ec2type"``, ``"environment BIGMACHINE_EC2_TYPE"``, ``"[ec2] in FILE"``, `DEFAULT`."""

    def origin(self, name: str) -> str:
        """Where the value of the field `name` comes from."""
        return self.origins.get(name, DEFAULT)

    def wrong(self, name: str, reason: str) -> UsageError:
        """To be raised: the value of the field `name` cannot be, as `reason` says."""
        return UsageError(f"{self.origin(name)}: {reason}")

    def __str__(self) -> str:
        rows = [(f"{each.key} = {toml(getattr(self, each.field))}", self.origin(each.field)) for each in fields(self)]
        width = max((len(line) for line, _ in rows if len(line) <= 40), default=0)
        return "\n".join(f"{line.ljust(width)}  # {origin}" for line, origin in rows)


def fields(section: Section | type[Section], name: str = "") -> list[Setting]:
    """The settings of a section; `name` is the section's, of which flags and variables are made."""
    found = []
    for each in dataclasses.fields(section):
        if "default" not in each.metadata:
            continue
        values = dict(each.metadata)
        key = values.pop("key") or each.name
        flag = values.pop("flag") or f"{name}{key}"
        variable = f"BIGMACHINE_{name}_{key}".upper()
        found.append(Setting(field=each.name, key=key, flag=flag, variable=variable, **values))
    return found


def user_file() -> Path:
    """The user's own file, whether it exists or not; on Linux ``~/.config/bigmachine/bigmachine.toml``."""
    from platformdirs import user_config_path  # Not on workers.

    return user_config_path("bigmachine", appauthor=False) / FILE


def load(
    kind: type[S],
    section: str,
    given: Mapping[str, object],
    *,
    environ: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> S:
    """The settings of `section`. `given` are flags and options by the flag's name, such as ``ec2type``; None stands for one
    that is not given. `environ` and `folder` are this process's. Raises `UsageError`."""
    known = fields(kind, section)
    environ = os.environ if environ is None else environ
    folder = _here() if folder is None else folder
    sources = [
        _given(known, given),
        _environment(known, section, environ),
        *(_file(known, file, path) for file, path in _files(section, folder)),
    ]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for each in known:
        for source in sources:
            if each.field in source:
                values[each.field], origins[each.field] = source[each.field]
                break
        else:
            origins[each.field] = DEFAULT
    return kind(**values, origins=origins)


# -- Where values come from ----------------------------------------------------------------------------------------------

_Found = dict[str, tuple[Any, str]]
"""Values and their origins, by field."""


def _given(known: Iterable[Setting], given: Mapping[str, object]) -> _Found:
    by_flag = {each.flag: each for each in known}
    found: _Found = {}
    for flag, value in given.items():
        if flag not in by_flag:
            raise UsageError(f"no such option: {_nearest(flag, by_flag)}")
        if value is not None:
            origin = f"flag -bigm.{flag}"
            convert: Callable[[Setting, Any, str], Any] = _from_text if isinstance(value, str) else _from_value
            each = by_flag[flag]
            found[each.field] = _relative(each, convert(each, value, f"{origin}: "), Path()), origin
    return found


def _environment(known: Iterable[Setting], section: str, environ: Mapping[str, str]) -> _Found:
    by_variable = {each.variable: each for each in known}
    found: _Found = {}
    for variable in sorted(name for name in environ if name.startswith(f"BIGMACHINE_{section.upper()}_")):
        if variable not in by_variable:
            raise UsageError(f"environment: unknown variable {_nearest(variable, by_variable)}")
        if text := environ[variable]:
            origin = f"environment {variable}"
            each = by_variable[variable]
            found[each.field] = _relative(each, _from_text(each, text, f"{origin}: "), Path()), origin
    return found


def _here() -> Path:
    try:
        return Path.cwd()
    except OSError:  # It has been removed.
        return Path()


def _files(section: str, folder: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Files, and where in each the section is."""
    yield folder / FILE, (section,)
    yield folder / PROJECT, ("tool", "bigmachine", section)
    yield user_file(), (section,)


def _file(known: Iterable[Setting], file: Path, path: tuple[str, ...]) -> _Found:
    by_key = {each.key: each for each in known}
    origin = f"[{'.'.join(path)}] in {file}"
    found: _Found = {}
    for key, value in _table(file, path).items():
        if key not in by_key:
            raise UsageError(f"{origin}: unknown key {_nearest(key, by_key)}")
        each = by_key[key]
        convert = _from_text if each.single and isinstance(value, str) else _from_value
        found[each.field] = _relative(each, convert(each, value, f"{origin}: {key} is "), file.parent), origin
    return found


def _table(file: Path, path: tuple[str, ...]) -> dict[str, Any]:
    """The section at `path`, empty where there is none."""
    table = read(file)
    section = f"[{'.'.join(path)}]"
    for depth, name in enumerate(path, 1):
        inner = table.get(name, {})
        if not isinstance(inner, dict):
            words = f"{'.'.join(path[:depth])} is a section, {section} with keys of its own"
            raise UsageError(f"{file}: {words}, not {_shown(inner)}")
        if depth == len(path):  # All that is ours is in sections: a key that was written above the first one has no effect.
            for key in (key for key, value in table.items() if not isinstance(value, dict)):
                raise UsageError(f"{file}: {key!r} stands in no section; put it below that of its system, such as {section}")
        table = inner
    return table


def read(file: Path) -> dict[str, Any]:
    """The file's content, nothing where there is none. Raises `UsageError` where it cannot be read."""
    try:
        text = file.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, PermissionError) and not os.access(file.parent, os.X_OK):
            return {}  # A directory that is closed to us: nobody has put the file there for us.
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8: {error}"
        raise UsageError(f"{file} cannot be read: {reason}") from error
    import tomllib  # 3 ms, for those who have such a file.

    try:
        return tomllib.loads(text, parse_float=_Float)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file} cannot be read, it is no TOML: {error}") from error


class _Float(str):
    """As it was written: prices are no binary fractions."""


def _relative(each: Setting, value: Any, folder: Path) -> Any:
    """The same, but for paths, which begin in `folder`."""
    if not each.path or not value:
        return value
    if isinstance(value, tuple):
        return tuple(str(folder / os.path.expanduser(path)) for path in value)
    return str(folder / os.path.expanduser(value))


def _nearest(name: str, known: Iterable[str]) -> str:
    import difflib  # Only for errors.

    names = sorted(known)
    close = difflib.get_close_matches(name, names, 1)
    return f"{name!r}; did you mean {close[0]!r}?" if close else f"{name!r}; there are {', '.join(names)}"


# -- Kinds of values -----------------------------------------------------------------------------------------------------


def _from_text(each: Setting, text: str, where: str) -> Any:
    """The value in a flag or a variable. Raises `UsageError`, which begins with `where`."""
    kind = type(each.default)
    made: Any = None
    if kind is bool:
        made = TRUTHS.get(text.strip().lower())
    elif kind is int:
        made = int(text) if re.fullmatch(r"\s*[+-]?\d{1,18}\s*", text, re.ASCII) else None
    elif kind is str:
        made = text
    elif kind is tuple:  # What begins with @ names a file, whatever characters its name has.
        made = (text,) if text.startswith("@") else tuple(word.strip() for word in text.split(",") if word.strip())
    elif kind is dict:
        pairs = [word.partition("=") for word in text.split(",") if word.strip()]
        if all(key.strip() and equals for key, equals, _ in pairs):
            made = {key.strip(): value.strip() for key, _, value in pairs}
    if made is None:
        raise UsageError(f"{where}{_WORDS[kind]}, such as {_as_text(_example(each))}, not {text!r}")
    return made


def _from_value(each: Setting, value: Any, where: str) -> Any:
    """The value in a file, or one that Python code has given. Raises `UsageError`, which begins with `where`."""
    kind = type(each.default)
    if each.number and isinstance(value, int | float | _Float) and not isinstance(value, bool):
        return str(value)
    if each.path:
        value = [_path(item) for item in value] if isinstance(value, list | tuple) else _path(value)
    if kind is tuple and isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    if kind is dict and isinstance(value, Mapping):
        if all(isinstance(item, str) for pair in value.items() for item in pair):
            return dict(value)
    elif type(value) is kind and kind is not tuple:  # Neither is True a number.
        return value
    raise UsageError(f"{where}{_WORDS[kind]}, such as {each.key} = {toml(_example(each))}, not {_shown(value)}")


def _path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


_WORDS: dict[type, str] = {
    bool: "true or false",
    int: "a whole number",
    str: "a text",
    tuple: "a list of texts",
    dict: "a table of texts",
}


def _example(each: Setting) -> Any:
    if isinstance(each.default, bool):
        return not each.default  # Nobody has to write down what is so anyway.
    return each.default if each.such is None else each.such


def _as_text(value: Any) -> str:
    """As in a flag."""
    if isinstance(value, dict):
        return ",".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shown(value: Any) -> str:
    try:
        return toml(value)
    except TypeError:
        return repr(value)


def toml(value: Any) -> str:
    """As in a file. Raises `TypeError` for what settings are not."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | _Float):
        return str(value)
    if isinstance(value, str):
        return _toml_text(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml(item) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(str(key))} = {toml(item)}" for key, item in value.items()) + "}"
    raise TypeError(f"not a setting: {value!r}")


def _toml_text(text: str) -> str:
    """A basic string: JSON's are such, but for one control character that TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[\w-]+", key, re.ASCII) else _toml_text(key)
