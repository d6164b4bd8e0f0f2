"""Exceptions across the wire: their types, their texts, their limits."""

from __future__ import annotations

import asyncio
import copyreg
import itertools
import json
import pickle
import sys
import threading
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest

import bigmachine.rpc
from bigmachine.errors import BootError, MachineStopped, NotPicklable, RemoteError, RemoteTraceback
from bigmachine.rpc import failures
from bigmachine.rpc.codec import Codec
from bigmachine.rpc.failures import decode_failure, encode_failure, reduce_failure

METHOD, ADDRESS = "PI.sample", "10.0.0.7:3333"
NOTE = "raised on 10.0.0.7:3333 by PI.sample"

CODEC = Codec()


def decode(data: bytes, method: str = METHOD, address: str = ADDRESS, codec: Codec = CODEC) -> BaseException:
    return decode_failure(data, method=method, address=address, codec=codec)


def raised(error: BaseException) -> BaseException:
    """`error`, with a traceback that starts in this file."""
    try:
        raise error
    except BaseException as caught:
        return caught


def travel(error: BaseException, method: str = METHOD, address: str = ADDRESS) -> BaseException:
    """Raise it, send it, and return what the caller gets."""
    return decode(encode_failure(raised(error), CODEC), method, address)


def remote_text(error: BaseException) -> str:
    assert isinstance(error.__cause__, RemoteTraceback)
    return error.__cause__.text


class OddInit(Exception):
    """`__init__` takes other arguments than it hands on: plain pickle cannot rebuild it."""

    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"code {code}: {reason}")
        self.code = code


class DoublingInit(Exception):
    """Plain pickle rebuilds this one, with another message."""

    def __init__(self, name: str) -> None:
        super().__init__(f"no such thing: {name}")


class RefusingNew(Exception):
    def __new__(cls, *, name: str) -> RefusingNew:
        return super().__new__(cls)

    def __init__(self, *, name: str) -> None:
        super().__init__(f"name {name}")


class Exiting(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, (3,)


class NoException(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()


class Three(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, ((1, 2, 3),)


class Unprintable(Exception):
    def __str__(self) -> NoReturn:
        raise ValueError("never")


class WithState(Exception):
    def __setstate__(self, state: Any) -> None:
        self.restored = state["x"]


class Registered(Exception):
    pass


@dataclass(frozen=True)
class Frozen(Exception):
    code: int


@dataclass
class Keyword(Exception):
    code: int


class Refusing(Exception):
    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise TypeError("sealed")


# -- The type, and what the exception carries --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        KeyError("k"),
        ZeroDivisionError(),
        FileNotFoundError(2, "No such file", "/x"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
        ImportError("m", name="n"),
        json.JSONDecodeError("Expecting value", "{", 1),
        NotPicklable("argument 1 of A.b", "it is a lock"),
        MachineStopped("10.0.0.9:1", "killed", True),
        TimeoutError("late"),
    ],
)
def test_an_exception_keeps_its_type_its_text_and_its_fields(error: BaseException) -> None:
    back = travel(error)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.args == error.args
    assert {**vars(back), "__notes__": 0} == {**vars(error), "__notes__": 0}


def test_attributes_travel() -> None:
    error = ValueError("no")
    error.data = {"x": [1, 2]}  # type: ignore[attr-defined]
    assert travel(error).data == {"x": [1, 2]}  # type: ignore[attr-defined]


def test_it_says_where_it_was_raised() -> None:
    back = travel(ValueError("no"))
    assert back.__notes__ == [NOTE]
    assert back.__suppress_context__
    printed = "".join(traceback.format_exception(back))
    assert (
        printed.index("in raised\n    raise error") < printed.index("direct cause") < printed.rindex("ValueError: no")
    )
    assert printed.rstrip().endswith(NOTE)


def test_notes_travel_once_and_in_order() -> None:
    error = ValueError("no")
    error.add_note("first")
    error.add_note("second")
    assert travel(error).__notes__ == ["first", "second", NOTE]


def test_notes_that_are_no_notes_are_left_out() -> None:
    error = ValueError("no")
    error.__notes__ = "nonsense"  # type: ignore[assignment]
    assert isinstance(travel(error), RemoteError)
    error.__notes__ = ["good", 7]  # type: ignore[list-item]
    assert travel(error).__notes__ == ["good", "7", NOTE]


@pytest.mark.parametrize(
    ("error", "fields"),
    [
        (OddInit(5, reason="full"), {"code": 5}),
        (DoublingInit("x"), {}),
        (Frozen(7), {"code": 7}),
        (Keyword(code=8), {"code": 8}),
    ],
)
def test_an_exception_with_an_odd_init_keeps_its_type_too(error: Exception, fields: dict[str, object]) -> None:
    back = travel(error)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == {**fields, "__notes__": [NOTE]}
    assert remote_text(back)


def test_a_class_that_restores_itself_does() -> None:
    error = WithState("no")
    error.x = 4  # type: ignore[attr-defined]
    back = travel(error)
    assert type(back) is WithState
    assert back.restored == 4


def test_a_registered_reduction_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(copyreg.dispatch_table, Registered, lambda error: (Registered, ("rebuilt",)))
    assert str(travel(Registered("original"))) == "rebuilt"


def test_a_class_by_value_keeps_its_type() -> None:
    class Local(Exception):
        pass

    assert type(travel(Local("no"))) is Local


def test_a_class_of_main_is_the_callers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    mains = []
    for _ in range(2):
        main = types.ModuleType("__main__")
        exec("class Mine(Exception): pass", vars(main))
        mains.append(main)
    codec = Codec(frozenset({"Mine"}))
    monkeypatch.setitem(sys.modules, "__main__", mains[0])
    data = encode_failure(raised(mains[0].Mine("no")), codec)
    monkeypatch.setitem(sys.modules, "__main__", mains[1])
    assert type(decode(data, codec=codec)) is mains[1].Mine


# -- RemoteError -----------------------------------------------------------------------------------------------------


def unpicklable() -> Exception:
    error = ValueError("has a lock")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "type_name", "message"),
    [
        (unpicklable(), "ValueError", "has a lock"),
        (RefusingNew(name="x"), "test_failures.RefusingNew", "name x"),
        (Exiting("no"), "test_failures.Exiting", "no"),
        (NoException("no"), "test_failures.NoException", "no"),
        (Three("no"), "test_failures.Three", "no"),
        (SystemExit(3), "SystemExit", "3"),
        (KeyboardInterrupt(), "KeyboardInterrupt", ""),
        (GeneratorExit(), "GeneratorExit", ""),
        (asyncio.CancelledError("gone"), "asyncio.exceptions.CancelledError", "gone"),
        (StopIteration(4), "StopIteration", "4"),
        (StopAsyncIteration(), "StopAsyncIteration", ""),
        (BaseExceptionGroup("g", [SystemExit(1)]), "BaseExceptionGroup", "g (1 sub-exception)"),
    ],
)
def test_what_cannot_be_raised_here_becomes_a_remote_error(error: BaseException, type_name: str, message: str) -> None:
    error.add_note("a note")
    back = travel(error)
    assert type(back) is RemoteError
    assert (back.method, back.message) == (METHOD, message)
    assert back.type_name.rpartition("tests.")[2] == type_name
    assert "in raised" in back.traceback
    assert remote_text(back) == back.traceback
    assert back.__notes__ == ["a note", NOTE]


def test_a_class_that_does_not_exist_here_becomes_a_remote_error(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("elsewhere")
    exec("class Theirs(Exception): pass", vars(module))
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    data = encode_failure(raised(module.Theirs("no")), CODEC)
    monkeypatch.delitem(sys.modules, "elsewhere")
    back = decode(data)
    assert str(back) == "PI.sample raised elsewhere.Theirs: no"


def test_an_exception_that_cannot_be_printed() -> None:
    back = travel(Unprintable())
    assert type(back) is Unprintable
    assert "Unprintable" in remote_text(back)


def test_an_exception_that_refuses_attributes() -> None:
    assert type(travel(Refusing("no"))) is Refusing


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        pickle.dumps(ValueError("no")),
        pickle.dumps((1, "ValueError")),
        pickle.dumps((99, "ValueError", "no", "", [], b"")),
        pickle.dumps((1, "ValueError", b"no", "", [], b"")),
        pickle.dumps((1, "ValueError", "no", "", [print], b"")),
        b"\x80\x05\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        encode_failure(ValueError("no"), CODEC)[:-9],
    ],
)
def test_garbage_is_a_remote_error(data: bytes) -> None:
    back = decode(data)
    assert type(back) is RemoteError
    assert f"{len(data)} bytes that are no failure" in str(back)
    assert back.__notes__ == [NOTE]
    assert isinstance(back.__cause__, RemoteTraceback)


@pytest.mark.parametrize(
    "inner", [b"garbage", pickle.dumps(7), pickle.dumps((1, 2)), pickle.dumps((dict, (), {})), pickle.dumps(ValueError)]
)
def test_a_damaged_exception_is_a_remote_error_with_its_texts(inner: bytes) -> None:
    back = decode(pickle.dumps((1, "ValueError", "no", "the text", ["n"], inner)))
    assert str(back) == "PI.sample raised ValueError: no"
    assert remote_text(back) == "the text"
    assert back.__notes__ == ["n", NOTE]


def test_random_damage_never_raises() -> None:
    data = encode_failure(raised(ValueError("no")), CODEC)
    for position in range(0, len(data), 7):
        for value in (0, 255):
            damaged = data[:position] + bytes([value]) + data[position + 1 :]
            assert isinstance(decode(damaged), Exception)


# -- Tracebacks ------------------------------------------------------------------------------------------------------


def compiled(path: str, source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(compile(source, path, "exec"), namespace)
    return namespace


def failing(frames: list[str]) -> BaseException:
    """An exception that went through functions in files of these names, the outermost first."""

    def innermost() -> NoReturn:
        raise ValueError("no")

    call: Callable[[], Any] = (
        innermost if frames[-1] == "test" else compiled(frames[-1], "def f(): raise ValueError")["f"]
    )
    for path in reversed(frames[:-1]):
        namespace = compiled(path, "def f(): return g()")
        namespace["g"] = call
        call = namespace["f"]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    error = caught.value
    assert error.__traceback__ is not None
    return error.with_traceback(error.__traceback__.tb_next)  # Without this function's own frame.


OURS = bigmachine.rpc.__path__[0]


def files_shown(frames: list[str]) -> list[str]:
    back = decode(encode_failure(failing(frames), CODEC))
    lines = [line.strip() for line in remote_text(back).splitlines() if line.strip().startswith("File ")]
    return [line.split('"')[1] for line in lines]


def test_frames_of_ours_above_the_users_are_left_out() -> None:
    server, client, user = f"{OURS}/server.py", f"{OURS}/client.py", "/home/ann/app.py"
    assert files_shown([server, server, user, "test"]) == [user, __file__]
    assert files_shown([server, user, client]) == [user, client]
    assert files_shown([user]) == [user]


def test_where_all_frames_are_ours_all_are_shown() -> None:
    server = f"{OURS}/server.py"
    assert files_shown([server, server]) == [server, server]


def test_a_package_of_a_similar_name_is_not_ours() -> None:
    similar = OURS.removesuffix("/rpc") + "_extras/x.py"
    assert files_shown([f"{OURS}/server.py", similar]) == [similar]


def test_causes_and_contexts_are_in_the_text() -> None:
    def method() -> None:
        try:
            try:
                raise KeyError("first")
            except KeyError:
                raise ValueError("second")  # noqa: B904
        except ValueError as error:
            raise OSError("third") from error

    with pytest.raises(OSError, match="third") as caught:
        method()
    text = remote_text(decode(encode_failure(caught.value, CODEC)))
    order = ["KeyError: 'first'", "During handling", "ValueError: second", "direct cause", "OSError: third"]
    positions = [text.index(part) for part in order]
    assert positions == sorted(positions)


def test_an_exception_that_was_never_raised_has_a_text_too() -> None:
    assert remote_text(decode(encode_failure(ValueError("no"), CODEC))) == "ValueError: no"


def test_over_two_machines_both_tracebacks_and_both_notes_remain() -> None:
    def inner() -> NoReturn:
        raise OddInit(5, reason="full")

    with pytest.raises(OddInit) as first:
        inner()
    at_a = decode(encode_failure(first.value, CODEC), "B.load", "b:1")

    def outer() -> NoReturn:
        raise at_a

    with pytest.raises(OddInit) as second:
        outer()
    back = decode(encode_failure(second.value, CODEC), "A.run", "a:1")
    assert type(back) is OddInit
    assert str(back) == "code 5: full"
    assert back.__notes__ == ["raised on b:1 by B.load", "raised on a:1 by A.run"]
    text = remote_text(back)
    positions = [text.index(part) for part in ("in inner", "direct cause", "in outer", "raised on b:1")]
    assert positions == sorted(positions)


def test_a_remote_error_over_two_machines_stays_the_first() -> None:
    at_a = travel(unpicklable(), "B.load", "b:1")
    back = travel(at_a, "A.run", "a:1")
    assert type(back) is RemoteError
    assert (back.method, back.type_name, back.message) == ("B.load", "ValueError", "has a lock")
    assert back.__notes__ == ["raised on b:1 by B.load", "raised on a:1 by A.run"]


# -- Groups ----------------------------------------------------------------------------------------------------------


def test_groups_travel_with_what_they_hold() -> None:
    one, two = raised(ValueError("one")), raised(TypeError("two"))
    one.add_note("of one")
    group = ExceptionGroup("several", [one, ExceptionGroup("inner", [two])])  # type: ignore[type-var]
    back = travel(group)
    assert type(back) is ExceptionGroup
    assert back.message == "several"
    values, others = back.split(ValueError)
    assert values is not None
    assert others is not None
    assert values.exceptions[0].__notes__ == ["of one"]
    assert str(others.exceptions[0].exceptions[0]) == "two"
    text = remote_text(back)
    assert "ValueError: one" in text
    assert "TypeError: two" in text
    assert "in raised" in text


def test_a_group_that_holds_what_does_not_pickle_becomes_a_remote_error() -> None:
    back = travel(ExceptionGroup("several", [unpicklable()]))
    assert type(back) is RemoteError
    assert "ValueError: has a lock" in back.traceback


# -- Limits ----------------------------------------------------------------------------------------------------------


def test_texts_are_cut_in_the_middle() -> None:
    back = travel(unpicklable_with("<" + "ä" * 100_000 + ">"))
    assert type(back) is RemoteError
    assert len(back.message.encode()) <= failures.MAX_MESSAGE
    assert back.message.startswith("<ä")
    assert back.message.endswith("ä>")
    assert "[... of 200002 bytes the middle is left out ...]" in back.message
    assert failures.MAX_TRACEBACK - 100 < len(back.traceback.encode()) <= failures.MAX_TRACEBACK


def unpicklable_with(text: str) -> Exception:
    error = ValueError(text)
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    for i in range(100):
        error.add_note(f"note {i} " + "x" * 100_000)
    return error


def test_notes_are_limited_in_number_and_length() -> None:
    back = travel(unpicklable_with("no"))
    assert [note.split(" x")[0] for note in back.__notes__] == [*(f"note {i}" for i in range(failures.MAX_NOTES)), NOTE]
    assert max(len(note) for note in back.__notes__) <= failures.MAX_MESSAGE


def test_an_exception_with_much_data_becomes_a_remote_error() -> None:
    assert type(travel(ValueError("x" * (failures.MAX_EXCEPTION - 1000)))) is ValueError
    assert type(travel(ValueError("x" * (failures.MAX_EXCEPTION + 1000)))) is RemoteError


def test_a_recursion_is_told_in_few_lines() -> None:
    def again(n: int) -> int:
        return again(n + 1) + 1

    with pytest.raises(RecursionError) as caught:
        again(0)
    data = encode_failure(caught.value, CODEC)
    assert len(data) < 20_000
    assert type(decode(data)) is RecursionError


def test_odd_text_passes() -> None:
    assert str(travel(ValueError("\udcff π \0"))) == "\udcff π \0"


def test_a_text_of_the_users_own_class_does_not_bring_the_class_along() -> None:
    class Text(str):
        pass

    class Texting(Exception):
        def __str__(self) -> str:
            return Text("t")

    assert str(travel(Texting())) == "t"


def test_an_exception_whose_text_changes_keeps_its_type() -> None:
    class Ticking(Exception):
        ticks = itertools.count()

        def __str__(self) -> str:
            return str(next(self.ticks))

    assert type(travel(Ticking())) is Ticking


@pytest.mark.parametrize("limit", [1024, 4096, 16 << 10, 64 << 10])
def test_a_failure_can_be_reduced(limit: int) -> None:
    small = encode_failure(raised(ValueError("no")), CODEC)
    assert reduce_failure(small, len(small)) == small
    for message, length in itertools.product(["short", "π" * 50_000], [0, 300_000]):
        error = ValueError(message)
        error.data = bytes(length)  # type: ignore[attr-defined]
        error.add_note("of the user")
        data = reduce_failure(encode_failure(raised(error), CODEC), limit)
        assert len(data) <= limit
        back = decode(data)
        assert type(back) is (ValueError if message == "short" and not length else RemoteError)
        assert back.__notes__[-1] == NOTE
        assert remote_text(back)


def test_a_machine_that_never_started_says_so_once() -> None:
    """The reason of its end is a `BootError`, whose text has the machine already."""
    failed = BootError("m-1", "launch", 1.0, "no room")
    assert str(MachineStopped("m-1", str(failed))) == "machine m-1 failed at boot step 'launch' after 1.0 s: no room"
    assert str(MachineStopped("m-1", "it was shut down")) == "machine m-1 stopped: it was shut down"
