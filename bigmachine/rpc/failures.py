"""Exceptions across the wire.

A failure is a pickle of plain values alone, so that it can be read whatever the exception was:

    (VERSION, qualified type name, message, traceback text, notes, exception)

`exception` is itself a pickle, empty where the exception does not pickle: of the exception, or, where its class pickles
in the default way, of `(class, args, attributes)`. From these an exception keeps its type even if its `__init__` takes
other arguments than it hands to `Exception.__init__`, which plain pickle cannot rebuild.

The chain of causes travels in the traceback text, which becomes the `__cause__` of the exception at the caller. So one
that passes several machines shows each one's traceback, innermost first.
"""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import traceback
from types import TracebackType
from typing import Any, NamedTuple

from .. import errors
from .codec import Codec

VERSION = 1

MAX_TRACEBACK = 64 << 10
"""Bytes of traceback text: 500 frames, more than anybody reads. Its ends say most: where it began, where it ended."""

MAX_MESSAGE = 16 << 10
"""Bytes of the message, and of each note: one that quotes all its data would else be sent, and printed, in full."""

MAX_NOTES = 32
"""An exception gets one note a machine that it passes, and a few from users."""

MAX_EXCEPTION = 1 << 20
"""Bytes of the pickled exception: one that holds more holds data, and goes as a `RemoteError` with the texts alone."""

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep

_LOCAL = (StopIteration, StopAsyncIteration)
"""Signals to the frame that called: raised again elsewhere they would end somebody's loop, and no asyncio future takes
the first."""


class _Failure(NamedTuple):
    version: int
    type_name: str
    message: str
    traceback: str
    notes: list[str]
    exception: bytes


def encode_failure(error: BaseException, codec: Codec) -> bytes:
    """The failure that tells of `error`; never raises. Its traceback starts at the first frame that is not ours."""
    errors.explain(error)
    cls = type(error)
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    notes = getattr(error, "__notes__", None)
    return _pack(
        _Failure(
            VERSION,
            _clip(name, MAX_MESSAGE),
            _clip(_text(error), MAX_MESSAGE),
            _clip(_traceback(error), MAX_TRACEBACK),
            [_clip(_text(note), MAX_MESSAGE) for note in notes[:MAX_NOTES]] if isinstance(notes, list) else [],
            _pickled(error, codec),
        )
    )


def reduce_failure(data: bytes, limit: int) -> bytes:
    """The failure `data` in at most `limit` bytes (1 KiB or more), for where there is less room.

    The exception is kept if it fits into half of that; the texts lose their middles.
    """
    failure = _unpack(data)
    if len(failure.exception) > limit // 2:
        failure = failure._replace(exception=b"")
    share = limit
    while len(data) > limit and share:
        share //= 2
        data = _pack(
            failure._replace(
                type_name=_clip(failure.type_name, share // 4),
                message=_clip(failure.message, share // 4),
                traceback=_clip(failure.traceback, share),
                notes=[_clip(note, share // MAX_NOTES) for note in failure.notes],
            )
        )
    return data


def decode_failure(data: bytes, *, method: str, address: str, codec: Codec) -> BaseException:
    """The exception to raise for a failure that `method` at `address` answered with; never raises.

    It has the type that it had there, or is a `RemoteError` where that cannot be rebuilt here, or must not be raised
    here: what is no `Exception` (`SystemExit`, `KeyboardInterrupt`, a cancellation) is meant for the process where it
    was raised, and see `_LOCAL`. Its cause is a `RemoteTraceback`; a note tells where it was raised.
    """
    try:
        failure = _unpack(data)
    except Exception as why:
        text = f"what it raised cannot be told: {len(data)} bytes that are no failure ({_text(why)})"
        failure = _Failure(VERSION, "an exception", text, "", [], b"")
    note = f"raised on {address} by {method}"
    error = _rebuild(failure, codec)
    if error is not None:
        try:
            return _annotate(error, failure, note)
        except Exception:
            pass  # The user's class does not let itself be annotated.
    return _annotate(errors.RemoteError(method, failure.type_name, failure.message, failure.traceback), failure, note)


# -- Encoding --------------------------------------------------------------------------------------------------------


def _traceback(error: BaseException) -> str:
    start = error.__traceback__
    while start is not None and start.tb_frame.f_code.co_filename.startswith(_PACKAGE):
        start = start.tb_next
    try:
        return _format(error, start or error.__traceback__)  # All of it where all is ours: then that is of interest.
    except Exception as problem:  # The user's classes take part.
        return f"(no traceback: formatting it raised {type(problem).__name__})"


def _format(error: BaseException, start: TracebackType | None) -> str:
    return "".join(traceback.TracebackException(type(error), error, start, compact=True).format()).rstrip("\n")


def _pickled(error: BaseException, codec: Codec) -> bytes:
    try:
        value = (type(error), error.args, vars(error)) if _pickles_by_default(type(error)) else error
        data = codec.encode_in_band(value, "the exception")
    except Exception:  # It does not pickle, for whatever reason of its class: the text goes alone.
        return b""
    return data if len(data) <= MAX_EXCEPTION else b""


def _pickles_by_default(cls: type[BaseException]) -> bool:
    return (
        cls.__reduce__ is BaseException.__reduce__
        and cls.__reduce_ex__ is BaseException.__reduce_ex__
        and cls not in copyreg.dispatch_table
    )


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception as problem:
        return f"(str() of it raised {type(problem).__name__})"


def _clip(text: str, limit: int) -> str:
    """`text` in at most `limit` bytes of UTF-8, without its middle, and as a plain `str`."""
    text = "".join((text,))  # A subclass would be pickled with its class.
    data = text.encode("utf-8", "surrogatepass")
    if len(data) <= limit:
        return text
    mark = f"\n[... of {len(data)} bytes the middle is left out ...]\n"
    half = max(limit - len(mark), 0) // 2
    head, tail = data[:half].decode("utf-8", "ignore"), data[len(data) - half :].decode("utf-8", "ignore")
    return f"{head}{mark}{tail}"[:limit]


def _pack(failure: _Failure) -> bytes:
    return pickle.dumps(tuple(failure), 5)


# -- Decoding --------------------------------------------------------------------------------------------------------


class _PlainUnpickler(pickle.Unpickler):
    """Strings, bytes, numbers, tuples and lists: nothing that would have to be imported."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a failure cannot hold {module}.{name}")


def _unpack(data: bytes) -> _Failure:
    """Raises some `Exception` where `data` is no failure."""
    match _PlainUnpickler(io.BytesIO(data)).load():
        case (int(version), str(name), str(message), str(text), [*notes], bytes(exception)) if version == VERSION:
            return _Failure(version, name, message, text, [note for note in notes if isinstance(note, str)], exception)
    raise pickle.UnpicklingError("not of the form of a failure")


def _rebuild(failure: _Failure, codec: Codec) -> Exception | None:
    if not failure.exception:
        return None
    error: Any
    try:
        value = codec.decode(failure.exception)
        error = _construct(*value, message=failure.message) if type(value) is tuple else value
    except (Exception, SystemExit):  # Whatever the user's class does when it is made.
        return None
    fits = issubclass(type(error), Exception) and not isinstance(error, _LOCAL)
    return error if fits else None


def _construct(
    cls: type[BaseException], args: tuple[Any, ...], attributes: dict[str, Any], *, message: str
) -> BaseException | None:
    """As pickle would, by calling the class; without its `__init__` where that fails, or leads to another message."""
    made = None
    for make in (cls, lambda *args: cls.__new__(cls, *args)):
        try:
            error = make(*args)
            if cls.__setstate__ is BaseException.__setstate__:
                vars(error).update(attributes)  # Past `__setattr__`, which frozen dataclasses forbid.
            else:
                error.__setstate__(attributes)
        except Exception:  # The user's class takes part: try another way.
            continue
        if _clip(_text(error), MAX_MESSAGE) == message:
            return error
        made = made or error
    return made


def _annotate(error: Exception, failure: _Failure, note: str) -> Exception:
    notes = vars(error).setdefault("__notes__", [])  # Past `__setattr__`, as above.
    notes[:] = [text for text in notes if isinstance(text, str)]
    for text in (*failure.notes, note):
        errors.add_note(error, text)
    object.__setattr__(error, "__cause__", errors.RemoteTraceback(failure.traceback))
    return error
