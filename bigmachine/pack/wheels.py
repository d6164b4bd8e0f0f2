"""Wheels: reading their metadata, keeping them in the cache, and making those that no index has.

Three kinds of code reach a packed program as wheels. What an index serves is kept by the sha256 of the file. bigmachine
itself, and packages under development that the program imports (editable installs), are made into wheels from their
sources where they lie. Those are deterministic to the byte: entries sorted, one timestamp, one mode, and not compressed,
as the output of a compressor depends on its version (who packs them compresses them anyway). In the cache they are found
by a digest of their sources, so that an edited checkout makes another wheel, and an unchanged one costs a reading.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.metadata
import io
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from email.parser import BytesHeaderParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from ..cache import Cache
from ..errors import PackError
from ..info import VERSION
from .tree import Tree

WORKER: tuple[str, ...] = ("h2", "cloudpickle", "psutil")
"""What of bigmachine's requirements a worker needs. Any other that is shipped is the driver's alone."""

PACKER: tuple[str, ...] = ("packaging", "pex", "rich", "shiv", "shtab")
"""What only packing and the command line need: never shipped."""

COMPILED = (".so", ".pyd", ".dylib")

CHUNK = 1 << 20
"""Bytes read at once from a file that is hashed."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on this disk. `name` is canonical, `requires` are its Requires-Dist lines as its METADATA has them."""

    name: str
    version: str
    filename: str
    sha256: str
    path: Path
    size: int
    requires: tuple[str, ...]


def read_wheel(path: Path, sha256: str | None = None) -> Wheel:
    """What the wheel says about itself. `sha256` is for callers who know it already: the file is read whole to find it.

    Raises `PackError` where the file is no wheel, or damaged.
    """
    try:
        name, version, _, _ = parse_wheel_filename(path.name)
        metadata = BytesHeaderParser().parsebytes(_metadata(path))
        return Wheel(
            name=name,
            version=str(version),
            filename=path.name,
            sha256=sha256 or file_digest(path),
            path=path,
            size=path.stat().st_size,
            requires=tuple(str(line) for line in metadata.get_all("Requires-Dist", [])),
        )
    except InvalidWheelFilename as error:
        raise PackError(f"not a wheel: {path}: {error}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, LookupError) as error:
        raise PackError(f"a damaged wheel: {path}: {error}; remove it, so that it is fetched again") from error
    except OSError as error:
        raise PackError(f"cannot read the wheel {path}: {error.strerror or error}") from error


def store_wheel(path: Path, cache: Cache) -> Wheel:
    """The same wheel in the cache, under the sha256 of its content; `path` may be removed afterwards."""
    wheel = read_wheel(path)
    folder = cache.put("wheels", wheel.sha256, lambda folder: _copy(path, folder / path.name))
    # A wheel that was kept under another name before is the same wheel.
    kept = folder / path.name
    return replace(wheel, path=kept if kept.exists() else next(folder.iterdir()))


def stored_wheel(sha256: str, filename: str, cache: Cache) -> Path | None:
    """Where a wheel is in the cache; None where it is not."""
    path = cache.path("wheels", sha256) / filename
    return path if path.is_file() else None


def shipped_wheel(cache: Cache) -> Wheel:
    """bigmachine as it is imported here, however it was installed, requiring what it needs to run anywhere.

    Raises `PackError` where Python finds the package but no metadata of it.
    """
    folder = Path(__file__).parent.parent
    try:
        lines = importlib.metadata.requires("bigmachine") or []
        python = importlib.metadata.metadata("bigmachine")["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        raise PackError(
            f"bigmachine is imported from {folder.parent}, but is not installed, so that nobody knows what it "
            f"requires: pip install -e {folder.parent}"
        ) from None
    return _make("bigmachine", VERSION, _tree(folder, "bigmachine/"), shipped_requirements(lines), python, cache)


def shipped_requirements(lines: Iterable[str]) -> list[str]:
    """Of bigmachine's requirements those that a packed program has: without extras, without `PACKER`."""
    parsed = [(line, Requirement(line)) for line in lines]
    return [
        line
        for line, requirement in parsed
        if canonicalize_name(requirement.name) not in PACKER and not re.search(r"\bextra\b", str(requirement.marker))
    ]


def module_wheel(name: str, path: Path, cache: Cache) -> Wheel:
    """The package directory or module file `path`, imported as `name`, as a wheel: pure Python, requiring nothing.

    Its version stands for its content (``0+src…``). Raises `PackError` where there are compiled modules in it: nobody
    knows for which platform.
    """
    files = _tree(path, name.replace(".", "/") + "/") if path.is_dir() else _file(path, name.replace(".", "/") + ".py")
    if compiled := [file for file in files if file.endswith(COMPILED)]:
        raise PackError(
            f"{name} is installed from its sources in {path} and has compiled modules: {compiled[0]}; "
            f"build wheels of it, and name them in a requirements file"
        )
    return _make(canonicalize_name(name), f"0+src{_digest(files)[:16]}", files, [], None, cache)


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _metadata(path: Path) -> bytes:
    """A wheel's METADATA. Raises what zipfile does; a `LookupError` where there is none."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.namelist():
            folder, _, rest = entry.partition("/")
            if rest == "METADATA" and folder.endswith(".dist-info"):
                return archive.read(entry)
    raise LookupError("no METADATA in it")


def _copy(source: Path, target: Path) -> None:
    # No hard link: whoever builds the same wheel again may write into the same file.
    shutil.copyfile(source, target)


def _tree(folder: Path, prefix: str) -> dict[str, bytes]:
    """The files below `folder`, without what is never packed, by their paths in the wheel."""
    tree = Tree()
    tree.add_directory(prefix.rstrip("/"), folder)
    return {name: _read(path) for name, path in tree.finish().items()}


def _file(path: Path, target: str) -> dict[str, bytes]:
    return {target if path.suffix == ".py" else path.name: _read(path)}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PackError(f"cannot read {path}: {error.strerror or error}") from error


def _digest(files: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256()
    for path, content in sorted(files.items()):
        digest.update(f"{len(path)}:{path}:{len(content)}:".encode())
        digest.update(content)
    return digest.hexdigest()


def _make(
    name: str, version: str, files: Mapping[str, bytes], requires: Iterable[str], python: str | None, cache: Cache
) -> Wheel:
    """The wheel that has `files`, from the cache or into it."""
    # A requirement may have a marker with either quote, but no line break: METADATA is lines.
    head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    head += [f"Requires-Python: {python}"] if python else []
    head += [f"Requires-Dist: {line}" for line in requires]
    stem = f"{name.replace('-', '_')}-{version}"
    tag = "py3-none-any"
    wheel = f"Wheel-Version: 1.0\nGenerator: bigmachine {VERSION}\nRoot-Is-Purelib: true\nTag: {tag}\n"
    entries = dict(files)
    entries[f"{stem}.dist-info/METADATA"] = ("\n".join(head) + "\n").encode()
    entries[f"{stem}.dist-info/WHEEL"] = wheel.encode()
    filename = f"{stem}-{tag}.whl"
    key = "made-" + _digest(entries)
    folder = cache.put("wheels", key, lambda folder: _write(folder / filename, entries, f"{stem}.dist-info/RECORD"))
    return read_wheel(folder / filename)


def _write(path: Path, entries: Mapping[str, bytes], record: str) -> None:
    """A wheel with these entries and its RECORD, the same bytes for the same entries anywhere."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    for name, content in sorted(entries.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.writerow([name, f"sha256={digest}", len(content)])
    rows.writerow([record, "", ""])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        # RECORD comes last, as the wheel format recommends for all of .dist-info.
        for name, content in [*sorted(entries.items()), (record, table.getvalue().encode())]:
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, wherever this runs: else the modes below mean nothing.
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, content)
