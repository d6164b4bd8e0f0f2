"""The codec: what goes by reference, by value, beside the pickle; and what errors say."""

from __future__ import annotations

import collections
import enum
import functools
import math
import mmap
import pickle
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import pytest

import bigmachine.rpc
from bigmachine.errors import NotPicklable
from bigmachine.rpc.codec import MAX_BUFFERS, OUT_OF_BAND, RAW, Codec, Encoded

METHOD = "PI.sample"
BIG = OUT_OF_BAND // 8
"""Float64s in the smallest array that leaves the pickle."""


class Stream:
    """Refuses plain pickle, as the codec asks for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a stream is no value")


class SubStream(Stream):
    pass


class PlainStream:
    """Plain pickle would take it: no obstacle must hide from the codec that it is a stream."""


@dataclass
class Point:
    x: int
    y: object = None


@dataclass
class Holder:
    name: str
    array: np.ndarray[Any, Any]
    more: dict[str, Any] = field(default_factory=dict)


class Color(enum.Enum):
    RED = 1


def double(x: int) -> int:
    return 2 * x


def received(encoded: Encoded) -> list[bytearray]:
    return [bytearray(buffer) for buffer in encoded.buffers]


def there_and_back(codec: Codec, *args: Any, **kwargs: Any) -> Any:
    encoded = codec.encode_call(METHOD, args, kwargs)
    return codec.decode(encoded.pickle, received(encoded), encoded.streams)


def by_value(encoded: Encoded) -> bool:
    return b"cloudpickle" in encoded.pickle


@pytest.fixture
def codec() -> Codec:
    return Codec(stream_type=Stream)


@pytest.fixture
def no_cloudpickle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail whatever goes by value."""
    monkeypatch.setitem(sys.modules, "bigmachine.rpc.byvalue", None)
    monkeypatch.delattr(bigmachine.rpc, "byvalue", raising=False)


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], types.ModuleType]:
    """Become the program of that source: there is a new `__main__` after each call."""

    def run(source: str) -> types.ModuleType:
        module = types.ModuleType("__main__")
        monkeypatch.setitem(sys.modules, "__main__", module)
        exec(source, vars(module))
        return module

    return run


# -- Plain values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -(2**70), 1.5, "π", "", b"x", bytearray(b"y"), (1, "a"), [1, [2]], {"a": {1, 2}}, 1j, math.pi],
)
@pytest.mark.usefixtures("no_cloudpickle")
def test_plain_values_pass(codec: Codec, value: object) -> None:
    assert there_and_back(codec, value, key=value) == ((value,), {"key": value})
    encoded = codec.encode(value, "it")
    assert codec.decode(encoded.pickle) == value
    assert encoded.buffers == encoded.streams == []
    assert encoded.nbytes == len(encoded.pickle)


def test_a_pickle_is_of_protocol_5_and_may_arrive_in_any_kind_of_memory(codec: Codec) -> None:
    data = codec.encode_call(METHOD, (1,), {}).pickle
    assert data[:2] == b"\x80\x05"
    with mmap.mmap(-1, len(data)) as mapped:
        mapped[:] = data
        for kind in (data, bytearray(data), memoryview(data), mapped):
            assert codec.decode(kind) == ((1,), {})


@pytest.mark.parametrize(
    "value",
    [Point(1, 2), Color.RED, double, Point, functools.partial(double, 3), collections.Counter("aab"), [1].append, len],
)
@pytest.mark.usefixtures("no_cloudpickle")
def test_what_can_be_imported_goes_by_reference(codec: Codec, value: object) -> None:
    ((back,), _) = there_and_back(codec, value)
    assert type(back) is type(value)
    if isinstance(value, (type, types.FunctionType, enum.Enum)):
        assert back is value


def test_one_object_passed_twice_stays_one(codec: Codec) -> None:
    shared: list[int] = []
    (a, b), kwargs = there_and_back(codec, shared, shared, c=shared)
    assert a is b is kwargs["c"]


def test_cycles(codec: Codec) -> None:
    ring: list[object] = []
    ring.append(ring)
    ((back,), _) = there_and_back(codec, ring)
    assert back[0] is back


# -- By value --------------------------------------------------------------------------------------------------------


def test_lambdas_go_by_value(codec: Codec) -> None:
    n = 5
    (), kwargs = there_and_back(codec, f=lambda x: x + n)
    assert kwargs["f"](1) == 6


def test_a_local_class_goes_with_its_methods_its_state_and_the_globals_they_use(codec: Codec) -> None:
    class Local:
        factor = 10

        def __init__(self, n: int) -> None:
            self.n = n

        def compute(self) -> int:
            return double(self.n) * self.factor

    ((one, two), _) = there_and_back(codec, Local(3), Local(4))
    assert type(one) is type(two)
    assert (one.compute(), two.compute()) == (60, 80)


def test_an_instance_of_a_class_by_value_comes_back_as_one_of_the_same_class(codec: Codec) -> None:
    class Local:
        pass

    ((there,), _) = there_and_back(codec, Local())
    ((here,), _) = there_and_back(codec, there)
    assert type(here) is Local


def test_modules_memoryviews_and_what_else_only_cloudpickle_knows(codec: Codec) -> None:
    ((module, view), _) = there_and_back(codec, math, memoryview(b"abc"))
    assert module is math
    assert view == b"abc"


def test_a_method_that_took_a_lambda_takes_everything_else_too(codec: Codec) -> None:
    array = np.arange(BIG, dtype=float)
    for args in ((lambda: 1,), (1,), (array,), (Point(1, 2),), (Stream("s"),), (lambda: 2, Stream("t"))):
        encoded = codec.encode_call(METHOD, args, {})
        back, _ = codec.decode(encoded.pickle, received(encoded), encoded.streams)
        assert len(back) == len(args)
        assert len(encoded.streams) == sum(isinstance(arg, Stream) for arg in args)
        assert len(encoded.buffers) == sum(arg is array for arg in args)


def test_methods_are_remembered_up_to_a_limit(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigmachine.rpc.codec.MAX_REMEMBERED", 2)
    for i in range(5):
        codec.encode_call(f"M.{i}", (lambda: 1,), {})
    assert list(codec._rungs) == ["M.0", "M.1"]


# -- __main__ --------------------------------------------------------------------------------------------------------

PROGRAM = """
import dataclasses

@dataclasses.dataclass
class Shared:
    x: int
    class Inner:
        pass

def helper(x):
    return x + 1
"""

LATER = """
@dataclasses.dataclass
class Later:
    x: int
    def more(self):
        return helper(self.x)

def make():
    class Local:
        pass
    return Local
"""

MAIN_NAMES = frozenset({"Shared", "helper", "make", "dataclasses"})

RunMain = Callable[[str], types.ModuleType]


@pytest.mark.usefixtures("no_cloudpickle")
def test_names_of_main_that_the_far_side_has_go_by_reference(run_main: RunMain) -> None:
    codec = Codec(MAIN_NAMES, Stream)
    main = run_main(PROGRAM + LATER)
    values = (main.Shared(1), main.Shared, main.Shared.Inner, main.helper, [main.Shared(2)])
    encoded = codec.encode_call(METHOD, values, {})
    far = run_main(PROGRAM)
    (one, cls, inner, helper, (two,)), _ = codec.decode(encoded.pickle)
    assert (cls, inner, helper) == (far.Shared, far.Shared.Inner, far.helper)
    assert [one, two] == [far.Shared(1), far.Shared(2)]


def test_what_main_defined_later_goes_by_value(run_main: RunMain) -> None:
    codec = Codec(MAIN_NAMES)
    main = run_main(PROGRAM + LATER)
    encoded = codec.encode_call(METHOD, (main.Later(1), main.Shared(2)), {})
    assert by_value(encoded)
    far = run_main(PROGRAM)
    (later, shared), _ = codec.decode(encoded.pickle)
    assert later.more() == 2
    assert type(shared) is far.Shared


def test_a_function_by_value_refers_to_the_names_that_the_far_side_has(run_main: RunMain) -> None:
    codec = Codec(MAIN_NAMES)
    main = run_main(PROGRAM + "limit = 7\ncell = lambda x: (helper, x < limit)\n")
    encoded = codec.encode_call(METHOD, (main.cell,), {})
    far = run_main(PROGRAM)
    ((cell,), _) = codec.decode(encoded.pickle)
    assert cell(3) == (far.helper, True)


def test_a_local_class_goes_by_value_though_its_function_is_known(run_main: RunMain) -> None:
    codec = Codec(MAIN_NAMES)
    main = run_main(PROGRAM + LATER)
    encoded = codec.encode_call(METHOD, (main.make(),), {})
    assert by_value(encoded)


def test_a_name_that_means_something_else_by_now_goes_by_value(run_main: RunMain) -> None:
    codec = Codec(MAIN_NAMES)
    main = run_main(PROGRAM)
    old = main.helper
    exec("def helper(x): return -x", vars(main))
    encoded = codec.encode_call(METHOD, (old,), {})
    run_main("")
    ((back,), _) = codec.decode(encoded.pickle)
    assert back(1) == 2


def test_in_a_notebook_everything_of_main_goes_by_value(run_main: RunMain) -> None:
    codec = Codec()
    main = run_main(PROGRAM + LATER)
    encoded = codec.encode(main.Later(1), "service 'Later'")
    run_main("")
    assert codec.decode(encoded.pickle).more() == 2


def test_a_value_that_mentions_main_is_not_mistaken(codec: Codec) -> None:
    texts = ["__main__", b"\x8c\x08__main__\x94", "if __name__ == '__main__':"]
    assert there_and_back(codec, *texts) == (tuple(texts), {})


def test_a_name_that_the_program_defines_too_late_is_explained(run_main: RunMain) -> None:
    codec = Codec(frozenset({"Shared", "Late"}))
    main = run_main(PROGRAM + "class Late: pass\n")
    encoded = codec.encode_call(METHOD, (main.Shared(1), "Late", main.Shared(2), main.Late()), {})
    run_main(PROGRAM)
    with pytest.raises(pickle.UnpicklingError) as caught:
        codec.decode(encoded.pickle)
    assert str(caught.value) == "'Late' is not defined in the program when it reaches driver.start(): define it above"
    assert isinstance(caught.value.__cause__, AttributeError)


def test_a_missing_module_is_explained(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("elsewhere")
    exec("class Thing: pass", vars(module))
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    encoded = codec.encode_call(METHOD, (Point(1), Point(2), module.Thing), {})
    del module.Thing
    with pytest.raises(pickle.UnpicklingError, match=r"^module 'elsewhere' has no 'Thing' on this machine$"):
        codec.decode(encoded.pickle)
    monkeypatch.delitem(sys.modules, "elsewhere")
    with pytest.raises(pickle.UnpicklingError, match=r"^no module named 'elsewhere' on this machine$"):
        codec.decode(encoded.pickle)


class _Raises:
    def __setstate__(self, state: object) -> NoReturn:
        raise AttributeError("of the user's own")


def test_other_exceptions_of_unpickling_are_left_as_they_are(codec: Codec) -> None:
    value = _Raises()
    value.x = 1  # type: ignore[attr-defined]
    encoded = codec.encode(value, "it")
    with pytest.raises(AttributeError, match="of the user's own"):
        codec.decode(encoded.pickle)
    with pytest.raises(pickle.UnpicklingError):
        codec.decode(b"no pickle")


# -- Buffers ---------------------------------------------------------------------------------------------------------


def test_an_array_is_not_copied_into_the_pickle(codec: Codec) -> None:
    array = np.arange(1 << 17, dtype=float)
    encoded = codec.encode_call(METHOD, (array,), {})
    (buffer,) = encoded.buffers
    assert np.shares_memory(np.frombuffer(buffer), array)
    assert (buffer.format, buffer.ndim, buffer.contiguous, len(buffer)) == ("B", 1, True, array.nbytes)
    assert len(encoded.pickle) < 300
    assert encoded.nbytes == len(encoded.pickle) + array.nbytes


def test_a_received_array_is_a_view_of_the_buffer_and_writable_where_that_is(codec: Codec) -> None:
    array = np.arange(BIG, dtype=float)
    encoded = codec.encode_call(METHOD, (array,), {})
    memory = bytearray(encoded.buffers[0])
    with mmap.mmap(-1, len(memory)) as mapped:
        mapped[:] = memory
        for buffer in (memory, memoryview(memory), mapped):
            ((back,), _) = codec.decode(encoded.pickle, [buffer])
            assert np.shares_memory(back, np.frombuffer(buffer))
            back[0] = 7
            assert bytes(buffer[:8]) == np.float64(7).tobytes()
            del back
    ((frozen,), _) = codec.decode(encoded.pickle, [bytes(memory)])
    assert not frozen.flags.writeable


def test_a_read_only_array_stays_read_only(codec: Codec) -> None:
    array = np.arange(BIG, dtype=float)
    array.flags.writeable = False
    ((back,), _) = there_and_back(codec, array)
    assert not back.flags.writeable


@pytest.mark.parametrize("n", [0, 1, BIG - 1])
def test_small_arrays_stay_in_the_pickle_and_are_writable(codec: Codec, n: int) -> None:
    encoded = codec.encode_call(METHOD, (np.ones(n),), {})
    assert encoded.buffers == []
    ((back,), _) = codec.decode(encoded.pickle)
    back += 1
    assert back.tolist() == [2.0] * n


def test_fortran_order_is_kept_without_a_copy(codec: Codec) -> None:
    array = np.asfortranarray(np.arange(BIG * 4, dtype=float).reshape(BIG, 4))
    encoded = codec.encode_call(METHOD, (array,), {})
    assert np.shares_memory(np.frombuffer(encoded.buffers[0]), array)
    ((back,), _) = codec.decode(encoded.pickle, received(encoded))
    assert back.flags.f_contiguous
    assert np.array_equal(back, array)


@pytest.mark.parametrize(
    "view",
    [lambda a: a[::2], lambda a: a[:, ::3], lambda a: a[::-1], lambda a: a[:, 1], lambda a: a.transpose()[1:]],
)
def test_strided_arrays_pass(codec: Codec, view: Callable[[Any], Any]) -> None:
    array = view(np.arange(BIG * 8, dtype=float).reshape(BIG, 8))
    assert not array.flags.contiguous
    ((back,), _) = there_and_back(codec, array)
    assert np.array_equal(back, array)


@pytest.mark.parametrize(
    "array", [np.array(3.5), np.array(["a", None]), np.zeros(BIG, "M8[s]"), np.zeros(BIG, "i4,f8")]
)
def test_arrays_of_other_kinds_pass(codec: Codec, array: np.ndarray[Any, Any]) -> None:
    ((back,), _) = there_and_back(codec, array)
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)


def test_arrays_inside_of_dataclasses_and_dicts(codec: Codec) -> None:
    array, other = np.arange(BIG, dtype=float), np.ones((BIG, 2))
    holder = Holder("h", array, {"other": other, "again": array})
    encoded = codec.encode_call(METHOD, (), {"holder": holder})
    assert len(encoded.buffers) == 2
    _, kwargs = codec.decode(encoded.pickle, received(encoded))
    back = kwargs["holder"]
    assert np.array_equal(back.array, array)
    assert np.array_equal(back.more["other"], other)
    assert back.more["again"] is back.array


def test_arrays_beside_what_goes_by_value(codec: Codec) -> None:
    array = np.arange(BIG, dtype=float)
    encoded = codec.encode_call(METHOD, (lambda: array, array), {})
    assert np.shares_memory(np.frombuffer(encoded.buffers[0]), array)
    ((f, back), _) = codec.decode(encoded.pickle, received(encoded))
    assert f() is back


def test_more_buffers_than_can_be_counted_stay_in_the_pickle(codec: Codec) -> None:
    arrays = [np.full(BIG, float(i)) for i in range(MAX_BUFFERS + 5)]
    encoded = codec.encode(arrays, "it")
    assert len(encoded.buffers) == MAX_BUFFERS
    back = codec.decode(encoded.pickle, received(encoded))
    assert [array[0] for array in back] == list(range(MAX_BUFFERS + 5))


def test_a_missing_buffer_is_an_error(codec: Codec) -> None:
    encoded = codec.encode(np.ones(BIG), "it")
    with pytest.raises(pickle.UnpicklingError, match="buffer"):
        codec.decode(encoded.pickle)


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_large_bytes_are_not_copied_into_the_pickle(codec: Codec, kind: Callable[[bytes], Any]) -> None:
    data = kind(b"x" * RAW)
    for encoded in (codec.encode_call(METHOD, (data, 1), {"again": data}), codec.encode(data, "the reply")):
        (buffer,) = encoded.buffers
        assert np.shares_memory(np.frombuffer(buffer, "u1"), np.frombuffer(data, "u1"))
        assert len(encoded.pickle) < 300
    assert codec.decode(encoded.pickle, received(encoded)) == data
    (first, one), kwargs = there_and_back(codec, data, 1, again=data)
    assert type(first) is type(data)
    assert (first, one) == (data, 1)
    assert kwargs["again"] is first


def test_bytes_that_are_smaller_or_deeper_stay_in_the_pickle(codec: Codec) -> None:
    for value in (b"x" * (RAW - 1), [b"x" * RAW]):
        encoded = codec.encode_call(METHOD, (value,), {})
        assert encoded.buffers == []
        assert codec.decode(encoded.pickle) == ((value,), {})


def test_in_band_leaves_nothing_beside_the_pickle(codec: Codec) -> None:
    array = np.arange(BIG, dtype=float)
    f, back = codec.decode(codec.encode_in_band((lambda: 1, array), "it"))
    assert f() == 1
    assert np.array_equal(back, array)
    with pytest.raises(NotPicklable, match="lock"):
        codec.encode_in_band([threading.Lock()], "it")


# -- Streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_cloudpickle")
def test_streams_leave_an_index(codec: Codec) -> None:
    one, two = Stream("one"), SubStream("two")
    encoded = codec.encode_call(METHOD, ("a", one, {"deep": [two]}), {"again": one})
    assert encoded.streams == [one, two]
    args, kwargs = codec.decode(encoded.pickle, streams=["ONE", "TWO"])
    assert args == ("a", "ONE", {"deep": ["TWO"]})
    assert kwargs == {"again": "ONE"}


def test_streams_beside_what_goes_by_value_and_arrays(codec: Codec) -> None:
    stream, array = Stream("s"), np.ones(BIG)
    encoded = codec.encode_call(METHOD, (lambda: 1, stream, array), {})
    (f, back, ones), _ = codec.decode(encoded.pickle, received(encoded), streams=("S",))
    assert (f(), back, ones.sum()) == (1, "S", BIG)


def test_a_stream_type_that_plain_pickle_would_take_is_recognised_all_the_same() -> None:
    codec = Codec(stream_type=PlainStream)
    stream = PlainStream()
    assert codec.encode_call(METHOD, (1,), {}).streams == []
    assert codec.encode_call(METHOD, ([stream],), {}).streams == [stream]
    assert codec.encode_call("Other.method", (lambda: 1, stream), {}).streams == [stream]


def test_a_reply_holds_no_stream(codec: Codec) -> None:
    for encode in (codec.encode, codec.encode_in_band):
        with pytest.raises(NotPicklable, match="cannot pickle the reply: a byte stream can only be an argument"):
            encode({"s": Stream("s")}, "the reply")


def test_a_stream_that_did_not_come_is_an_error(codec: Codec) -> None:
    encoded = codec.encode_call(METHOD, (Stream("one"), Stream("two")), {})
    with pytest.raises(pickle.UnpicklingError, match="refers to a byte stream, but none came with it"):
        codec.decode(encoded.pickle)
    with pytest.raises(pickle.UnpicklingError, match=r"refers to \('stream', 1\), but 1 streams came with it"):
        codec.decode(encoded.pickle, streams=["ONE"])


# -- What does not pickle --------------------------------------------------------------------------------------------


def refusal(codec: Codec, *args: Any, **kwargs: Any) -> NotPicklable:
    with pytest.raises(NotPicklable) as caught:
        codec.encode_call(METHOD, args, kwargs)
    assert "cannot pickle '_thread.lock' object" in caught.value.reason
    assert isinstance(caught.value.__cause__, TypeError)
    return caught.value


def test_the_argument_that_does_not_pickle_is_named(codec: Codec) -> None:
    lock = threading.Lock()
    assert refusal(codec, 1, lock, lock).what == "argument 2 of PI.sample"
    assert refusal(codec, 1, n=2, guard=lock).what == "argument 'guard' of PI.sample"
    error = refusal(codec, lock)
    assert str(error) == "cannot pickle argument 1 of PI.sample: cannot pickle '_thread.lock' object"


def test_the_place_within_the_argument_is_named(codec: Codec) -> None:
    lock = threading.Lock()
    value = [1, {"a": (Point(1), Point(2, y=lock))}]
    assert refusal(codec, value).reason.endswith("(at [1]['a'][1].y)")


def test_the_place_is_not_guessed_where_a_class_pickles_in_its_own_way(codec: Codec) -> None:
    class Own:
        def __init__(self) -> None:
            self.left_out = threading.Lock()

        def __getstate__(self) -> NoReturn:
            raise ValueError("not today")

    with pytest.raises(NotPicklable) as caught:
        codec.encode_call(METHOD, ([Own()],), {})
    assert caught.value.reason == "ValueError: not today (at [0])"


def test_a_value_that_holds_itself_and_a_lock(codec: Codec) -> None:
    ring: list[object] = []
    ring.extend((ring, threading.Lock()))
    assert refusal(codec, ring).reason.endswith("(at [1])")


def test_a_large_argument_beside_one_that_does_not_pickle(codec: Codec) -> None:
    assert refusal(codec, b"x" * RAW, threading.Lock()).what == "argument 2 of PI.sample"


def test_a_failed_call_leaves_the_next_one_as_it_was(codec: Codec) -> None:
    refusal(codec, threading.Lock())
    assert codec._rungs == {}
    assert there_and_back(codec, 1) == ((1,), {})


def test_a_reply_that_does_not_pickle_is_named(codec: Codec) -> None:
    with pytest.raises(NotPicklable) as caught:
        codec.encode({"guard": threading.Lock()}, "the reply of PI.sample")
    assert caught.value.what == "the reply of PI.sample"
    assert caught.value.reason == "cannot pickle '_thread.lock' object (at ['guard'])"


def test_too_deep_a_value_is_an_error_and_no_crash(codec: Codec) -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(NotPicklable, match=r"argument 1 of PI\.sample: .*recursion"):
        codec.encode_call(METHOD, (value,), {})
    while value:
        value = value.pop()
