"""Values to bytes and back: pickle protocol 5, large buffers beside it, streams left out of it.

Rule 1. What has a name that the far side can import goes by reference, as in plain pickle. The names of `__main__` that
the far side has too are those that existed when the program reached `driver.start()` (`main_names`): the far side runs
the same program up to there.

Rule 2. Everything else that is code goes by value, with cloudpickle: lambdas, closures, local classes, what `__main__`
defined later, notebook cells.

Rule 3. A buffer of `OUT_OF_BAND` bytes or more is not copied into the pickle but travels beside it, and so do `bytes`
and `bytearray` of `RAW` or more that are an argument or a reply themselves. `Encoded.buffers` are views of the caller's
own memory: send them before you give the control back to him. Decoded arrays are views of the received buffers, and
writable where those are.

Theory of operation
-------------------
Encoding climbs a ladder, from the fastest pickler to the most able: the plain C pickler; one that looks at each class
and function of `__main__`; that one, looking for streams as well; cloudpickle's, without and with streams. The plain
pickler cannot tell the names of `__main__` apart, so its result counts only if it holds none: a pickle that does holds
the module's name in one form (`_MAIN`), and searching for that is far cheaper than asking about each object in Python.
The rung that succeeded is remembered by method, so that one that takes a lambda, or an object of the program's own
class, does not fail its way up each time.
"""

from __future__ import annotations

import io
import pickle
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import NotPicklable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PROTOCOL = 5

OUT_OF_BAND = 4 << 10
"""Bytes from which a buffer leaves the pickle. Here that saves time from 1 KiB (measured), but each buffer is one more
piece to frame, to send and to receive into."""

RAW = 16 << 10
"""The same for `bytes` and `bytearray`. Pickle has no hook for them: taking them out costs about 4 µs (measured), as
much as copying and searching 8 KiB."""

MAX_BUFFERS = 255
"""Buffers that leave one pickle at most, the rest stays in it: the framing of items counts them in one byte."""

MAX_REMEMBERED = 10_000
"""Methods whose rung is remembered, at most: against callers that put something variable into the name."""

MAX_DEPTH = 10
"""Containers within containers that are searched for the part that does not pickle: each level pickles it once more."""

_NAMES, _NAMES_STREAMS, _BY_VALUE, _BY_VALUE_STREAMS = range(4)
"""The rungs above the plain pickler. Streams have rungs of their own, as looking for them means that Python is asked
about every object, integers included."""

_MAIN = b"\x8c\x08__main__\x94"
"""A short string, and that it is remembered: how the C pickler writes the name when it first needs it."""
_NAMED = (type, types.FunctionType)
_STREAM = "a byte stream can only be an argument of a call, or a part of one"


class Encoded(NamedTuple):
    """A value on its way out. `buffers` are flat views of bytes; `streams` are the stream objects met, by index."""

    pickle: bytes
    buffers: list[memoryview]
    streams: list[object]

    @property
    def nbytes(self) -> int:
        """What there is to send, streams left out."""
        return len(self.pickle) + sum(buffer.nbytes for buffer in self.buffers)


ATOMS = frozenset({int, float, bool, type(None)})
"""Types of values that need no look at what they may contain."""


def encode_simple(value: object) -> Encoded:
    """A value that is made of `ATOMS` alone."""
    return tuple.__new__(Encoded, (pickle.dumps(value, PROTOCOL), [], []))


class Codec:
    """Encodes and decodes values; one serves a whole process, its threads included.

    `main_names` are the top-level names of `__main__` that the far side has too. Instances of `stream_type` are not
    pickled: each leaves an index, and goes to `Encoded.streams`. That type should refuse to be pickled (define
    `__reduce_ex__` to raise): where it does not, no call can take the fastest path, lest a stream slip through.
    """

    def __init__(self, main_names: frozenset[str] = frozenset(), stream_type: type | None = None) -> None:
        self._main_names = main_names
        self._stream_type = stream_type
        self._plain = stream_type is None or _has_own_reduction(stream_type)
        self._rungs: dict[str, int] = {}

    def encode(self, value: object, what: str) -> Encoded:
        """Encode one value. Raises `NotPicklable(what, ...)`; `what` is text: "the reply of PI.sample".

        It cannot hold streams: nobody could say when a reply's would be read.
        """
        try:
            encoded = self._encode(_Raw(value) if _is_raw(value) else value, what)
        except Exception as error:
            raise NotPicklable(what, self._reason(value, error)) from error
        if encoded.streams:
            raise NotPicklable(what, _STREAM)
        return encoded

    def encode_call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Encoded:
        """Encode the pair `(args, kwargs)`. Raises `NotPicklable`, which names the argument, counted from 1."""
        try:
            simple = not kwargs
            for arg in chain(args, kwargs.values()) if kwargs else args:
                kind = type(arg)
                if kind not in ATOMS:
                    if kind in _RAW_TYPES and len(arg) >= RAW:
                        return self._encode(_lift(args, kwargs), method)
                    simple = False
            if simple:
                return encode_simple((args, kwargs))
            return self._encode((args, kwargs), method)
        except Exception as error:
            named: Iterator[tuple[object, object]] = chain(enumerate(args, 1), kwargs.items())
            for name, value in named:
                failure = self._failure(value)
                if failure is not None:
                    raise NotPicklable(f"argument {name!r} of {method}", self._reason(value, failure)) from failure
            raise NotPicklable(f"the arguments of {method}", _text(error)) from error

    def encode_in_band(self, value: object, what: str) -> bytes:
        """Encode one value as a single pickle, with nothing beside it. Raises `NotPicklable`, as `encode` does."""
        try:
            _, (pickled, _, streams) = self._climb(value, in_band=True)
        except Exception as error:
            raise NotPicklable(what, self._reason(value, error)) from error
        if streams:
            raise NotPicklable(what, _STREAM)
        return pickled

    def decode(self, data: ReadableBuffer, buffers: Iterable[Any] = (), streams: Sequence[object] = ()) -> Any:
        """The value. `buffers` and `streams` are what came beside the pickle, in their order.

        Raises `pickle.UnpicklingError` where the pickle is damaged, lacks a buffer or a stream, or names something that
        does not exist here (the text says what to do about it); else whatever the value's own code raises.
        """
        try:
            if streams:
                unpickler = _Unpickler(io.BytesIO(data), buffers=buffers)
                unpickler.streams = streams
                return unpickler.load()
            return pickle.loads(data, buffers=buffers)
        except (AttributeError, ImportError) as error:
            missing = _missing(data, error)
            if missing is None:
                raise
            raise pickle.UnpicklingError(missing) from error
        except pickle.UnpicklingError as error:
            if not streams and "persistent" in str(error):
                raise pickle.UnpicklingError("the pickle refers to a byte stream, but none came with it") from error
            raise

    def _encode(self, value: object, method: str) -> Encoded:
        if method not in self._rungs and self._plain:
            buffers: list[memoryview] = []
            try:
                data = pickle.dumps(value, PROTOCOL, buffer_callback=_collector(buffers))
            except Exception:  # Users' classes take part.
                pass  # The next rungs may succeed; the last one's exception is the one that is reported.
            else:
                if data.find(_MAIN) < 0:  # Half the time of `in`, on a small pickle.
                    # Past the constructor of NamedTuple, which is written in Python.
                    return tuple.__new__(Encoded, (data, buffers, []))
        rung, encoded = self._climb(value, self._rungs.get(method, _NAMES))
        if len(self._rungs) < MAX_REMEMBERED:
            self._rungs[method] = rung
        return encoded

    def _climb(self, value: object, rung: int = _NAMES, *, in_band: bool = False) -> tuple[int, Encoded]:
        """Encode from `rung` upwards; the rung that succeeded, too. Raises what the last one raised."""
        while rung < _BY_VALUE_STREAMS:
            try:
                return rung, self._dump(value, rung, in_band)
            except Exception:  # Users' classes take part; the last rung's exception is reported.
                rung += 1
        return rung, self._dump(value, rung, in_band)

    def _dump(self, value: object, rung: int, in_band: bool = False) -> Encoded:
        file = io.BytesIO()
        buffers: list[memoryview] = []
        callback = None if in_band else _collector(buffers)
        streams = _Streams(self._stream_type)
        pickler: pickle.Pickler
        if rung >= _BY_VALUE:
            # Not at the top: it imports cloudpickle, 26 ms that most programs never need to spend.
            from . import byvalue

            by_value = byvalue.ByValuePickler if rung == _BY_VALUE else byvalue.ByValueStreamsPickler
            pickler = by_value(file, callback, self._main_names, streams.mark)
        else:
            names = _NamesPickler if rung == _NAMES else _NamesStreamsPickler
            pickler = names(file, PROTOCOL, buffer_callback=callback)
            pickler.main_names = self._main_names
            pickler.mark = streams.mark
        pickler.dump(value)
        return Encoded(file.getvalue(), buffers, streams.found)

    def _failure(self, value: object) -> Exception | None:
        try:
            self._dump(value, _BY_VALUE_STREAMS)
        except Exception as error:
            return error
        return None

    def _reason(self, value: object, error: Exception) -> str:
        """The text of the exception, and where in `value` the part is that raised it."""
        path = ""
        above = [value]
        while len(above) < MAX_DEPTH:
            for step, child in _children(above[-1]):
                if any(child is other for other in above):
                    continue  # A cycle: it holds what fails, but is not the reason.
                failure = self._failure(child)
                if failure is not None:
                    path, error = path + step, failure
                    above.append(child)
                    break
            else:
                break
        return f"{_text(error)} (at {path})" if path else _text(error)


# -- Picklers --------------------------------------------------------------------------------------------------------


class _Streams:
    """The streams met in one value, each once."""

    __slots__ = ("found", "type")

    def __init__(self, stream_type: type | None) -> None:
        self.type = stream_type
        self.found: list[object] = []

    def mark(self, obj: object) -> tuple[str, int] | None:
        """The persistent id of a stream; None for everything else."""
        if self.type is None or not isinstance(obj, self.type):
            return None
        for index, other in enumerate(self.found):
            if other is obj:
                return "stream", index
        self.found.append(obj)
        return "stream", len(self.found) - 1


class _NamesPickler(pickle.Pickler):
    """By reference only: fails where a class or function of `__main__` is not known to the far side, and on streams."""

    # Set after construction: an `__init__` in Python would cost as much as pickling a small argument.
    main_names: frozenset[str]
    mark: Callable[[object], tuple[str, int] | None]

    def reducer_override(self, obj: Any) -> Any:
        # type(), not the class that the object claims to have: proxies claim that of what they stand for.
        if issubclass(type(obj), _NAMED):
            if obj.__module__ == "__main__" and obj.__qualname__.partition(".")[0] not in self.main_names:
                raise pickle.PicklingError(f"{obj.__qualname__} goes by value")
        elif self.mark(obj) is not None:
            raise pickle.PicklingError("a stream, which this pickler is not for")
        return NotImplemented


class _NamesStreamsPickler(_NamesPickler):
    def persistent_id(self, obj: Any) -> Any:
        return self.mark(obj)


class _Unpickler(pickle.Unpickler):
    streams: Sequence[object]

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("stream", int(index)) if 0 <= index < len(self.streams):
                return self.streams[index]
        raise pickle.UnpicklingError(f"the pickle refers to {pid!r}, but {len(self.streams)} streams came with it")


def _has_own_reduction(cls: type) -> bool:
    return any(getattr(cls, name) is not getattr(object, name) for name in _REDUCTION)


_REDUCTION = ("__reduce_ex__", "__reduce__", "__getstate__")


# -- Buffers ---------------------------------------------------------------------------------------------------------


def _collector(buffers: list[memoryview]) -> Callable[[pickle.PickleBuffer], bool]:
    """A buffer callback, which returns whether the buffer stays in the pickle. Pickle itself refuses those that are
    not contiguous, and NumPy never offers them: `raw` cannot fail."""

    def stays(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND or len(buffers) >= MAX_BUFFERS:
            return True
        buffers.append(view)
        return False

    return stays


def _is_raw(value: object) -> bool:
    return type(value) in _RAW_TYPES and len(value) >= RAW  # type: ignore[arg-type]


_RAW_TYPES = frozenset({bytes, bytearray})


class _Raw:
    """Stands for `bytes` or a `bytearray` in the pickle, and arrives as a copy of it."""

    __slots__ = ("data",)

    def __init__(self, data: Any) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self.data), (pickle.PickleBuffer(self.data),)


def _lift(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, with `_Raw` in place of large bytes: one for each object, however often it is passed."""
    raw = {id(arg): _Raw(arg) for arg in chain(args, kwargs.values()) if _is_raw(arg)}
    return tuple(raw.get(id(arg), arg) for arg in args), {name: raw.get(id(arg), arg) for name, arg in kwargs.items()}


# -- What went wrong -------------------------------------------------------------------------------------------------


def _text(error: Exception) -> str:
    if isinstance(error, (TypeError, pickle.PicklingError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _children(value: Any) -> Iterator[tuple[str, object]]:
    """The parts of a container, or of an object that pickles in the default way, each with the text that selects it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"[{repr(key)[:40]}]", item
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield f"[{index}]", item
    elif not isinstance(value, _NAMED) and not _has_own_reduction(type(value)):
        for name, item in getattr(value, "__dict__", {}).items():
            yield f".{name}", item


def _missing(data: ReadableBuffer, error: AttributeError | ImportError) -> str | None:
    """Which name of the pickle does not exist in this process; None where the exception has some other origin."""
    for module, qualname in _names(bytes(data)):
        if module not in sys.modules:
            if isinstance(error, ModuleNotFoundError):
                return f"no module named {error.name!r} on this machine"
            return f"module {module!r} cannot be imported on this machine: {error}"
        found: Any = sys.modules[module]
        for name in qualname.split("."):
            found = getattr(found, name, _NOTHING)
        if found is _NOTHING and module == "__main__":
            return f"{qualname!r} is not defined in the program when it reaches driver.start(): define it above"
        if found is _NOTHING:
            return f"module {module!r} has no {qualname!r} on this machine"
    return None


_NOTHING = object()


def _names(data: bytes) -> Iterator[tuple[str, str]]:
    """The (module, qualified name) pairs that a pickle imports, in its order."""
    import pickletools  # 2 ms, for an error message.

    memo: dict[Any, Any] = {}
    below = top = None  # Of the stack, as far as it matters: two strings, and then the opcode that pops them.
    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "MEMOIZE":
                memo[len(memo)] = top
            case "BINGET" | "LONG_BINGET":
                below, top = top, memo[argument]
            case "STACK_GLOBAL":
                yield str(below), str(top)
                below = top = None
            case "FRAME":
                pass
            case _:
                below, top = top, argument
