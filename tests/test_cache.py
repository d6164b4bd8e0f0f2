"""The cache on disk: whole entries, several processes, and file systems that refuse."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path

import pytest

from bigmachine import cache as cache_module
from bigmachine.cache import STALE, VARIABLE, Cache, default_root
from bigmachine.errors import CacheError


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def write(text: str):  # type: ignore[no-untyped-def]
    return lambda folder: (folder / "file").write_text(text)


def test_an_entry_is_made_once(cache: Cache) -> None:
    assert cache.get("wheels", "k") is None
    folder = cache.put("wheels", "k", write("one"))
    assert folder == cache.path("wheels", "k") == cache.get("wheels", "k")
    assert cache.put("wheels", "k", write("two")) == folder
    assert (folder / "file").read_text() == "one"


def test_what_fails_leaves_nothing(cache: Cache) -> None:
    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise KeyError("x")

    with pytest.raises(KeyError):
        cache.put("wheels", "k", fail)
    assert cache.get("wheels", "k") is None
    assert not list((cache.root / "unfinished").iterdir())


def test_the_faster_one_wins(cache: Cache) -> None:
    def slow(folder: Path) -> None:
        (folder / "file").write_text("slow")
        cache.put("wheels", "k", write("fast"))

    assert (cache.put("wheels", "k", slow) / "file").read_text() == "fast"
    assert not list((cache.root / "unfinished").iterdir())


def test_usage_and_clear(cache: Cache) -> None:
    cache.put("wheels", "a", write("123"))
    cache.put("wheels", "b", write("4567"))
    cache.put("bases", "c", write("89"))
    found = {usage.kind: (usage.entries, usage.bytes) for usage in cache.usage()}
    assert found["wheels"] == (2, 7)
    assert found["bases"] == (1, 2)
    assert found["parts"] == (0, 0)
    assert cache.clear() == 9
    assert cache.get("wheels", "a") is None
    assert cache.clear() == 0


def test_nothing_is_created_by_looking(cache: Cache) -> None:
    assert cache.usage()
    assert cache.clear() == 0
    assert cache.get("wheels", "a") is None
    assert not cache.root.exists()


def test_what_is_in_use_is_not_cleared(cache: Cache) -> None:
    with cache.use(), cache.use():  # As a program that packs itself does.
        cache.put("wheels", "a", write("123"))
        with pytest.raises(CacheError, match="is in use"):
            cache.clear()
    assert cache.clear() == 3


def test_whoever_comes_while_it_is_cleared_waits(cache: Cache) -> None:
    fd = cache._lock(cache_module.fcntl.LOCK_EX)
    try:
        entered = threading.Event()

        def use() -> None:
            with cache.use():
                entered.set()

        thread = threading.Thread(target=use)
        thread.start()
        assert not entered.wait(0.2)
    finally:
        os.close(fd)
    thread.join(10)
    assert entered.is_set()


def test_what_the_dead_have_left_is_swept(cache: Cache) -> None:
    cache.put("wheels", "a", write(""))
    for name, age in (("old", STALE + 60), ("new", 0)):
        folder = cache.root / "unfinished" / name
        folder.mkdir(parents=True)
        then = time.time() - age
        os.utime(folder, (then, then))
    with cache.use():
        assert [folder.name for folder in (cache.root / "unfinished").iterdir()] == ["new"]


def test_what_nobody_used_for_long_is_swept(cache: Cache) -> None:
    for kind in ("programs", "wheels"):
        for name in ("old", "new", "used"):
            folder = cache.put(kind, name, write(""))
            if name != "new":
                os.utime(folder, (0, 0))
        cache.get(kind, "used")
    with cache.use():
        assert {folder.name for folder in (cache.root / "programs").iterdir()} == {"new", "used"}
        assert {folder.name for folder in (cache.root / "wheels").iterdir()} == {"new", "old", "used"}


def test_a_directory_of_somebody_elses(tmp_path: Path) -> None:
    photo = tmp_path / "images" / "photo.jpg"
    photo.parent.mkdir()
    photo.write_text("")
    cache = Cache(tmp_path)
    for act in (cache.clear, cache.hold, lambda: cache.put("images", "a", write(""))):
        with pytest.raises(CacheError, match="not a cache of bigmachine's, and not empty"):
            act()
    assert photo.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_file_system_without_locks(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(cache_module.fcntl, "flock", flock)
    with cache.use():
        cache.put("wheels", "a", write("123"))
    assert cache.clear() == 3


def test_a_file_system_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file" / "cache")
    with pytest.raises(CacheError, match=rf"cannot write the cache {cache.root}: .*{VARIABLE}"):
        cache.put("wheels", "a", write(""))
    with pytest.raises(CacheError, match="cannot use the cache"), cache.use():
        pass


def test_a_full_disk_is_the_fillers_error(cache: Cache) -> None:
    def fill(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    with pytest.raises(OSError, match="No space left"):
        cache.put("wheels", "a", fill)
    assert not list((cache.root / "unfinished").iterdir())


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "there"))
    assert default_root() == tmp_path / "there"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_root().name == "bigmachine"
