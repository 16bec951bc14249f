"""What is made once and kept: tables on devices, and results of functions of few arguments."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from threading import Lock
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
# Results and tables that are kept.
REMEMBERED = 256
# Bytes of the tables that are kept on devices.
_TABLE_BYTES = 256 << 20


class Tables:
    """Tables on devices, the last that were made: so many of them, of so many bytes together, or one that is larger."""

    def __init__(self, most: int = REMEMBERED, most_bytes: int = _TABLE_BYTES) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._lock = Lock()
        self._held: dict[Any, tuple[Any, int]] = {}
        self._pinned: dict[Any, list[Any]] = {}
        self._bytes = 0

    def find(self, key: Any) -> Any | None:
        """The table of a key, if it is held."""
        found = self._held.get(key)
        return None if found is None else found[0]

    def add(self, key: Any, table: Any, size: int) -> list[Any]:
        """Hold a table of so many bytes; those that are let go of for it."""
        dropped = []
        with self._lock:
            # Another thread may have made the same one.
            replaced = self._held.pop(key, None)
            self._held[key] = table, size
            self._bytes += size - (replaced[1] if replaced else 0)
            while len(self._held) > 1 and (len(self._held) > self._most or self._bytes > self._most_bytes):
                oldest, freed = self._held.pop(next(iter(self._held)))
                self._bytes -= freed
                dropped.append(oldest)
        return dropped if replaced is None else [*dropped, replaced[0]]

    def clear(self) -> None:
        """Let go of all that are not pinned."""
        with self._lock:
            self._held.clear()
            self._bytes = 0

    def pin(self, key: Any, table: Any) -> None:
        """Never give the memory of this table back: a captured graph does not say when it is gone."""
        with self._lock:
            pinned = self._pinned.setdefault(key, [])
            if not any(table is other for other in pinned):
                pinned.append(table)


def memoized(function: F, most: int = REMEMBERED) -> F:
    """Compute once for each tuple of hashable arguments; compilers that trace Python take the result as it is.

    At `most` the last so many results are kept: bases that are pruned for the data at hand are many.
    """
    results: dict[Any, Any] = {}

    @wraps(function)
    def look_up(*args: Any) -> Any:
        found = results.get(args, results)
        if found is results:
            found = function(*args)
            if len(results) >= most:
                # Another thread may do the same: one result more or less does not matter.
                with suppress(KeyError, RuntimeError, StopIteration):
                    results.pop(next(iter(results)))
            results[args] = found
        return found

    # What torch.compiler.assume_constant_result sets; torch must not be imported for it.
    look_up._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return look_up  # type: ignore[return-value]
