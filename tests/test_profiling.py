"""Profiles of this process: each tells what it is for, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import math
import pickle
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bigmachine import profiling
from bigmachine.errors import UsageError
from bigmachine.profiling import cpu, heap, objects, threads
from bigmachine.profiling.values import MAX_DEPTH, TOO_DEEP, Places, Profile, Sample
from bigmachine.testing.conformance import eventually


def never() -> bool:
    return False


def functions(profile: Profile, sample: Sample) -> list[str]:
    return [profile.places[index].function for index in sample.stack]


def of(profile: Profile, name: str) -> dict[str, int]:
    """The sums of all samples with a function of that name on the stack, by type."""
    found = [sample.values for sample in profile.samples if name in functions(profile, sample)]
    return {type_: sum(values[index] for values in found) for index, (type_, _) in enumerate(profile.types)}


@contextmanager
def running(*works: Callable[[threading.Event], object]) -> Iterator[None]:
    """Each on a thread, until the end of the block."""
    done = threading.Event()
    workers = [threading.Thread(target=work, args=(done,)) for work in works]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        done.set()
        for worker in workers:
            worker.join()


def spin(done: threading.Event) -> None:
    while not done.is_set():
        sum(range(100))


def hash_natively(done: threading.Event) -> None:
    block = bytes(1 << 22)
    while not done.is_set():
        hashlib.sha256(block)


def wait(done: threading.Event) -> None:
    done.wait()


# -- What is asked for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, -1, 1e9, "abc", "", None, math.nan, math.inf, [], 10**400])
def test_seconds_that_are_none(seconds: object) -> None:
    with pytest.raises(UsageError, match="seconds of a profile must be a number above 0, at most 3600: "):
        profiling.checked("profile", seconds)


@pytest.mark.parametrize("kind", ["cpu", "", None, []])
def test_a_kind_that_there_is_not(kind: object) -> None:
    with pytest.raises(UsageError, match=r"no such profile: .*; there are profile, heap, objects, threads"):
        profiling.checked(kind, 1)


def test_seconds_may_be_a_text() -> None:
    assert profiling.checked("heap", "2.5") == 2.5


# -- Processor time ------------------------------------------------------------------------------------------------------


def test_tells_running_from_waiting() -> None:
    with running(spin, wait):
        profile = profiling.take("profile", 0.4, False, never)
    spun, waited = of(profile, "spin"), of(profile, "wait")
    assert spun["cpu"] > 10 * waited["cpu"]
    assert 0 < spun["cpu"] <= spun["wall"]
    assert waited["wall"] == pytest.approx(spun["wall"], rel=0.6)
    assert waited["wall"] <= profile.seconds * 1e9
    assert profile.default == "cpu"
    assert pickle.loads(pickle.dumps(profile)) == profile


def test_native_time_is_its_caller_s() -> None:
    with running(hash_natively):
        profile = profiling.take("profile", 0.3, False, never)
    (sample, *_) = sorted(profile.samples, key=lambda sample: -sample.values[1])
    place = profile.places[sample.stack[0]]
    assert (place.function, place.file) == ("hash_natively", __file__)
    assert place.first < place.line


def test_nothing_is_left_behind() -> None:
    interval = sys.getswitchinterval()
    with running(wait):
        for _ in range(3):  # The next begins before the sampler of the last one has ended.
            profiling.take("profile", 0.05, False, never)
    eventually(lambda: all(each.name != "bigmachine-sampler" for each in threading.enumerate()), "the sampler ends")
    assert sys.getswitchinterval() == interval


def test_profiles_at_once_share_a_sampler() -> None:
    found: list[Profile] = []
    both = [threading.Thread(target=lambda: found.append(cpu.take(0.4, never))) for _ in range(2)]
    with running(spin):
        for each in both:
            each.start()
        samplers: list[int] = []
        while any(each.is_alive() for each in both):
            samplers.append(sum(each.name == "bigmachine-sampler" for each in threading.enumerate()))
            time.sleep(0.01)
        assert max(samplers) == 1
        for each in both:
            each.join()
    one, two = (of(profile, "spin")["wall"] for profile in found)
    assert one == pytest.approx(two, rel=0.6)
    assert all(not of(profile, "take")["wall"] for profile in found), "who waits for a profile is not in it"


def test_a_cancelled_profile_ends() -> None:
    begun = time.monotonic()
    cpu.take(60.0, lambda: time.monotonic() > begun + 0.1)
    assert time.monotonic() - begun < 5.0


def test_threads_that_come_and_go() -> None:
    def brood(done: threading.Event) -> None:
        while not done.is_set():
            brief = threading.Thread(target=sum, args=(range(1000),))
            brief.start()
            brief.join()

    with running(brood, brood):
        profile = cpu.take(0.3, never)
    assert of(profile, "test_threads_that_come_and_go.<locals>.brood")["wall"] > 0


def test_without_clocks_those_who_wait_are_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_has_clocks", lambda: False)
    with running(spin, wait):
        profile = cpu.take(0.3, never)
    assert of(profile, "wait")["cpu"] == 0 < of(profile, "spin")["cpu"]
    assert "threads have no clocks here" in profile.comments[-1]


def test_too_many_stacks_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "MAX_STACKS", 0)
    with running(spin, wait):
        profile = cpu.take(0.1, never)
    assert {tuple(functions(profile, sample)) for sample in profile.samples} <= {
        ("[too many different stacks]",),
        ("[threads that are not Python's]",),
    }
    assert profile.total("wall") > 0


def test_a_fork_has_a_sampler_of_its_own() -> None:
    interval = sys.getswitchinterval()
    forked = cpu._sampler
    forked.enter()
    try:
        with forked._lock:
            cpu._after_fork()
            assert sys.getswitchinterval() == interval
            assert cpu.take(0.03, never).seconds > 0
    finally:
        forked.leave()


def test_a_stack_that_is_too_deep_is_cut() -> None:
    def sink(n: int) -> tuple[int, ...]:
        return sink(n - 1) if n else places.of_stack(sys._getframe())[0]

    places = Places()
    stack = sink(MAX_DEPTH + 50)
    assert len(stack) == MAX_DEPTH + 1
    assert places.places[stack[-1]] == TOO_DEEP


class Kept:
    pass


@pytest.mark.parametrize("kind", sorted(profiling.KINDS))
def test_what_functions_hold_is_not_kept_alive(tracing: heap.Tracing, kind: str) -> None:
    """Neither by the profile nor by garbage that it leaves."""
    held: list[weakref.ref[Kept]] = []
    ready = threading.Event()

    def work(done: threading.Event) -> None:
        kept = Kept()
        held.append(weakref.ref(kept))
        ready.set()
        while not done.is_set():
            sum(range(100))

    def ask() -> None:
        kept = Kept()
        held.append(weakref.ref(kept))
        profiling.take(kind, 0.1, False, never)

    gc.disable()
    try:
        with running(work):
            assert ready.wait(5.0)
            ask()
        eventually(lambda: all(each.name != "bigmachine-sampler" for each in threading.enumerate()), "the sampler ends")
        assert [each() for each in held] == [None, None]
    finally:
        gc.enable()


# -- Heap ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tracing(monkeypatch: pytest.MonkeyPatch) -> Iterator[heap.Tracing]:
    tracing = heap.Tracing()
    monkeypatch.setattr(heap, "_tracing", tracing)
    monkeypatch.setattr(heap, "DEPTH", 8)  # Below a test are many frames of pytest.
    monkeypatch.setattr(objects, "SECONDS", 0.1)  # pytest has many objects, too.
    yield tracing
    tracing.stop()


@pytest.mark.slow
def test_heap_says_who_allocated(tracing: heap.Tracing, monkeypatch: pytest.MonkeyPatch) -> None:
    def hoard() -> list[bytes]:
        return [bytes(10_000) for _ in range(100)]

    monkeypatch.setattr(objects, "SECONDS", 60.0)
    first = heap.take(False)
    kept = hoard()
    second = heap.take(False)
    name = "test_heap_says_who_allocated.<locals>.hoard"
    assert "tracing begins with this profile" in first.comments[0]
    assert of(first, name)["inuse_space"] == 0
    assert of(first, "[objects] dict")["inuse_space"] > 0
    assert any(comment.startswith("[objects] are all Python objects by type") for comment in first.comments)
    assert of(second, "[objects] dict")["inuse_space"] == 0
    assert "traced for " in second.comments[0]
    assert 1_000_000 <= of(second, name)["inuse_space"] < 1_100_000
    assert 100 <= of(second, name)["inuse_objects"] < 110
    (sample, *_) = sorted(second.samples, key=lambda sample: -sample.values[1])
    assert functions(second, sample)[0] == name, "the innermost first"
    assert "test_heap_says_who_allocated" in functions(second, sample)
    kept.clear()
    assert of(heap.take(False), name)["inuse_space"] < 10_000


def test_heap_without_garbage(tracing: heap.Tracing) -> None:
    heap.take(False)
    gc.disable()
    try:
        ring: list[object] = [bytes(1_000_000)]
        ring.append(ring)
        del ring
        name = "test_heap_without_garbage"
        assert of(heap.take(False), name)["inuse_space"] > 1_000_000
        assert of(heap.take(True), name)["inuse_space"] < 1_000_000
    finally:
        gc.enable()


def test_tracing_ends_when_nobody_asks(tracing: heap.Tracing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "KEEP", 0.05)
    heap.take(False)
    eventually(lambda: not tracemalloc.is_tracing(), "the tracing ends")
    assert "tracing begins" in tracing.ask()


def test_a_program_s_own_tracing_is_left_alone(tracing: heap.Tracing) -> None:
    tracemalloc.start()
    try:
        assert "the program traces its memory itself" in heap.take(False).comments[0]
        tracing.stop()
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()


# -- All objects ---------------------------------------------------------------------------------------------------------


class Hoarded:
    def __init__(self, held: object) -> None:
        self.held = held


class Modest(type):
    __module__ = property(lambda cls: 1 / 0)  # type: ignore[assignment]


class Vain(metaclass=Modest):
    def __sizeof__(self) -> int:
        raise AssertionError("it is not to be asked")


HERE = f"[objects] {__name__}."


@pytest.fixture
def enough_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "SECONDS", 60.0)
    monkeypatch.setattr(objects, "MAX_TYPES", 100_000)  # pytest has many.


@pytest.mark.usefixtures("enough_time")
def test_objects_by_type() -> None:
    before = profiling.take("objects", 1, True, never)
    kept = [Hoarded(bytes(100 + number % 2)) for number in range(20_000)]
    kept.append(Hoarded([float(number) + 0.5 for number in range(5 * objects.MANY)]))
    kept.append(Hoarded({number: (complex(number), complex(number)) for number in range(1000)}))
    after = profiling.take("objects", 1, True, never)

    def grown(name: str, type_: str = "inuse_objects") -> int:
        return of(after, f"[objects] {name}")[type_] - of(before, f"[objects] {name}")[type_]

    assert of(after, f"{HERE}Hoarded")["inuse_objects"] == len(kept)
    assert grown("bytes") == pytest.approx(20_000, abs=200)
    assert grown("bytes", "inuse_space") == pytest.approx(20_000 * sys.getsizeof(bytes(100)), rel=0.02)
    assert grown("float") == pytest.approx(5 * objects.MANY, abs=500)
    assert grown("complex") == pytest.approx(2000, abs=20)
    assert pickle.loads(pickle.dumps(after)) == after


@pytest.mark.usefixtures("enough_time")
@pytest.mark.parametrize("beside", [0, 5])
def test_a_large_object_counts_once_whoever_holds_it(monkeypatch: pytest.MonkeyPatch, beside: int) -> None:
    monkeypatch.setattr(objects, "MANY", 3)  # With more beside it only some are looked at, but not of the large ones.
    large = bytearray(30_000_000)
    kept = [Hoarded([large, *(object() for _ in range(beside))]) for _ in range(3)]
    found = of(objects.take(False), "[objects] bytearray")["inuse_space"]
    del kept
    assert 30_000_000 <= found < 45_000_000


@pytest.mark.usefixtures("enough_time")
def test_types_that_have_their_own_ideas() -> None:
    kept = [Vain() for _ in range(7)]
    assert of(objects.take(False), f"{HERE}Vain")["inuse_objects"] == len(kept)


def test_objects_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "SECONDS", 0.0)
    profile = objects.take(False)
    assert any(comment.startswith("there was time for 0 of ") for comment in profile.comments)


def test_too_many_types_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "SECONDS", 0.2)
    monkeypatch.setattr(objects, "MAX_TYPES", 2)
    profile = objects.take(False)
    names = [functions(profile, sample)[0] for sample in profile.samples]
    assert len(names) == 3
    assert names[2].endswith(" other types")


@pytest.mark.usefixtures("enough_time")
@pytest.mark.skipif(not objects.LOCALS, reason="local variables of other threads cannot be read safely before Python 3.13")
def test_variables_of_running_functions_count() -> None:
    def hold(done: threading.Event) -> None:
        large = bytearray(40_000_000)
        ready.set()
        done.wait()
        del large

    ready = threading.Event()
    with running(hold):
        assert ready.wait(5.0)
        assert of(objects.take(False), "[objects] bytearray")["inuse_space"] >= 40_000_000


# -- Threads and tasks ---------------------------------------------------------------------------------------------------


def test_threads_and_tasks() -> None:
    ready = threading.Event()

    async def inner(future: asyncio.Future[None]) -> None:
        ready.set()
        await future

    async def outer(future: asyncio.Future[None]) -> None:
        await inner(future)

    def loop(done: threading.Event) -> None:
        async def main() -> None:
            future = asyncio.get_running_loop().create_future()
            task = asyncio.create_task(outer(future), name="a task")
            await asyncio.to_thread(done.wait)
            future.set_result(None)
            await task

        threading.current_thread().name = "a loop"
        asyncio.run(main())

    with running(loop):
        assert ready.wait(5.0)
        profile = threads.take()
    by_label = {sample.labels: sample for sample in profile.samples}
    task = by_label[("task", "a task"),]
    name = "test_threads_and_tasks.<locals>."
    assert functions(profile, task) == [f"{name}inner", f"{name}outer"]
    assert task.values == (0, 1)
    thread = by_label[("thread", "a loop"),]
    assert thread.values == (1, 0)
    assert f"{name}loop" in functions(profile, thread)
    assert "test_threads_and_tasks" in functions(profile, by_label[("thread", threading.current_thread().name),])
