"""What package indexes have: asked through their simple API, to say what there would be instead of what there is not."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import urllib.error
import urllib.request
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import Version

from ..errors import ResolveError
from .lines import path_of
from .platforms import Platform
from .progress import Progress

PATIENCE = 5.0
"""Seconds that an index may take to say anything at all, before anything is resolved."""

PAGE_LIMIT = 64 << 20
"""Bytes of an index's page, which lists all files of a project. An endless one must not fill the memory."""

CACHED = "what was packed once can be packed without a network, from the cache, while its requirements stay the same"


@dataclass(frozen=True)
class File:
    """A file of a project on an index. `tags` is empty for a source distribution; `python` is its requires-python."""

    name: str
    version: Version
    tags: frozenset[str]
    python: str | None
    yanked: bool

    def fits(self, platform: Platform, any_python: bool = False) -> bool:
        """A wheel that can be installed there; `any_python`: but for what it says of Python versions."""
        if self.tags.isdisjoint(platform.tags):
            return False
        try:
            specifier = SpecifierSet(self.python or "")
        except InvalidSpecifier:
            return True
        return any_python or specifier.contains(platform.environment()["python_full_version"], prereleases=True)


class Index:
    """The package indexes and folders that pip would look at. Raises OSError where none of them answers."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        self.settings = dict(settings)
        self._silent = ""
        flag = settings.get("no-index", "").lower()
        self._bases = [] if flag in ("1", "true", "yes", "on", "y", "t") else self._index_urls()
        self._links = settings.get("find-links", "").split()

    def _index_urls(self) -> list[str]:
        return [self.settings.get("index-url") or _default_index(), *self.settings.get("extra-index-url", "").split()]

    def reach(self, progress: Progress) -> None:
        """Raises `ResolveError` where no index answers, and there is nothing else to look at. Where there is, leaves the
        indexes out: pip would try each of them again for each distribution."""
        remote = [url for url in [*self._bases, *self._links] if _is_remote(url)]
        with ThreadPoolExecutor(len(remote) or 1) as pool:
            refusals = list(pool.map(self._refusal, remote))
        if not remote or not all(refusals):
            return
        self._silent = f"no package index can be reached: {', '.join(refusals)}"
        self._bases = [url for url in self._bases if not _is_remote(url)]
        self._links = [url for url in self._links if not _is_remote(url)]
        if not self._bases and not self._links:
            raise ResolveError(f"{self._silent}; {CACHED}")
        progress.note(f"{self._silent}; looking {self.where()} only")
        chosen = {"index-url": self._bases[0]} if self._bases else {"no-index": "1"}
        rest = {"extra-index-url": " ".join(self._bases[1:]), "find-links": " ".join(self._links)}
        self.settings = {**self.settings, **chosen, **rest}

    def _refusal(self, url: str) -> str:
        """Who does not answer, and why; empty where somebody does, whatever it is."""
        try:
            self._fetch(f"{url.rstrip('/')}/pip/", "HEAD")
        except _Silence as silence:
            return str(silence)
        except OSError:
            pass
        return ""

    def where(self) -> str:
        """For messages: "in index.example and /some/folder"; without passwords."""
        return "in " + (" and ".join(map(_shown, [*self._bases, *self._links])) or "no index at all")

    def unreached(self) -> str:
        """For messages: that there are more indexes than those that answered."""
        return f"; {self._silent}" if self._silent else ""

    def files(self, name: str) -> list[File]:
        """All files of a project. Raises OSError where an answer is missing that may have been the one."""
        found: list[File] = []
        for base in self._bases:
            found += self._page(f"{base.rstrip('/')}/{name}/")
        for link in self._links:
            folder = path_of(link)
            if _is_remote(link) or folder.is_file():
                found += self._page(link)
            elif folder.is_dir():
                found += [file for path in folder.iterdir() if (file := _file(path.name))]
        return [file for file in found if file.name == name]

    def _page(self, url: str) -> list[File]:
        if not _is_remote(url):
            path = path_of(url)
            path = path / "index.html" if path.is_dir() else path
            return _from_html(path.read_text("utf-8", "replace")) if path.is_file() else []
        kind, content = self._fetch(url)
        if "json" in kind:
            try:
                return [file for entry in json.loads(content)["files"] if (file := _from_json(entry))]
            except (ValueError, LookupError, TypeError) as error:
                raise OSError(f"{_shown(url)}: not what an index answers: {error!r}") from None
        return _from_html(content.decode("utf-8", "replace"))

    def _fetch(self, url: str, method: str = "GET") -> tuple[str, bytes]:
        """The type and the content of a page; nothing where there is none. Raises OSError, `_Silence` where nobody is."""
        plain, authorization = _without_login(url)
        headers = {"Accept": "application/vnd.pypi.simple.v1+json, text/html;q=0.2", **authorization}
        proxy = self.settings.get("proxy")
        handlers: list[Any] = [urllib.request.ProxyHandler({"http": proxy, "https": proxy})] if proxy else []
        handlers.append(
            urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=self.settings.get("cert")))
        )
        request = urllib.request.Request(plain, headers=headers, method=method)
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=PATIENCE) as answer:
                return str(answer.headers.get("Content-Type", "")), bytes(answer.read(PAGE_LIMIT))
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return "", b""
            raise OSError(f"{_shown(url)}: {error.code} {error.reason}") from None
        except (urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):
                raise OSError(
                    f"{_shown(url)}: {reason}"
                ) from None  # Somebody answered; pip has certificates of its own.
            raise _Silence(f"{_shown(url)} ({getattr(reason, 'strerror', None) or reason})") from None
        except http.client.HTTPException as error:
            raise OSError(f"{_shown(url)}: {error!r}") from None


class _Silence(OSError):
    """Nobody answers there."""


class _Links(HTMLParser):
    """The files that a page of links names (PEP 503)."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[File] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "a" and (link := values.get("href")):
            name = unquote(urlsplit(link).path.rpartition("/")[2])
            if file := _file(name, values.get("data-requires-python"), "data-yanked" in values):
                self.files.append(file)


def _from_html(text: str) -> list[File]:
    links = _Links()
    links.feed(text)
    return links.files


def _from_json(entry: Mapping[str, Any]) -> File | None:
    """An entry of a PEP 691 answer."""
    return _file(entry.get("filename", ""), entry.get("requires-python"), bool(entry.get("yanked")))


def _file(filename: str, python: str | None = None, yanked: bool = False) -> File | None:
    """None where the name is of no distribution: an index may have anything."""
    try:
        if filename.endswith(".whl"):
            name, version, _, tags = parse_wheel_filename(filename)
            return File(name, version, frozenset(map(str, tags)), python, yanked)
        name, version = parse_sdist_filename(filename)
        return File(name, version, frozenset(), python, yanked)
    except (InvalidWheelFilename, InvalidSdistFilename):
        return None


def _default_index() -> str:
    """What pip asks where nothing is configured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # Of its own loader, which later Pythons find wanting.
        from pex.resolve.package_repository import PYPI  # Much of pex: only who resolves, and has no index of his own.

    return str(PYPI)


def _is_remote(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _shown(url: str) -> str:
    """An index for a message: its host, or its folder."""
    return urlsplit(url).netloc.rpartition("@")[2] if _is_remote(url) else str(path_of(url))


def _without_login(url: str) -> tuple[str, dict[str, str]]:
    """The address without user and password, and the header that says them."""
    parts = urlsplit(url)
    login, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    token = base64.b64encode(unquote(login).encode()).decode()
    return urlunsplit(parts._replace(netloc=host)), {"Authorization": f"Basic {token}"}
