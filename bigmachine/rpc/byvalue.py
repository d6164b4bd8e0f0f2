"""Pickling by value: what `codec` falls back on for code that has no name on the far side.

A module of its own so that cloudpickle is imported by the first value that needs it, and by nobody else.
"""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Callable
from typing import IO, Any

import cloudpickle


class ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle, except that what the far side has in its own `__main__` (`main_names`) goes by reference.

    `mark` gives the persistent id of a stream, None for other objects. This pickler fails on streams.
    """

    def __init__(
        self,
        file: IO[bytes],
        buffer_callback: Callable[[pickle.PickleBuffer], bool] | None,
        main_names: frozenset[str],
        mark: Callable[[object], object],
    ) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffer_callback)
        self._main_names = main_names
        self.mark = mark

    def reducer_override(self, obj: Any) -> Any:
        if issubclass(type(obj), (type, types.FunctionType)) and self._is_shared(obj):
            return NotImplemented
        if self.mark(obj) is not None:
            raise pickle.PicklingError("a stream, which this pickler is not for")
        return super().reducer_override(obj)

    def _is_shared(self, obj: Any) -> bool:
        """Whether `obj` is what its name means in `__main__` here, and the name exists in the far side's."""
        if obj.__module__ != "__main__" or obj.__qualname__.partition(".")[0] not in self._main_names:
            return False
        found: Any = sys.modules["__main__"]
        for name in obj.__qualname__.split("."):
            found = getattr(found, name, None)
        return found is obj


class ByValueStreamsPickler(ByValuePickler):
    """The same with streams."""

    def persistent_id(self, obj: Any) -> Any:
        return self.mark(obj)
