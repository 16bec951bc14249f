"""NumPy: products written straight into the buffer that keeps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import copy_context
from functools import lru_cache, partial
from threading import Event
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from . import compiled
from .base import Array, Backend, name_of
from .threads import libraries, run_threads, take_threads

# NumPy makes the name of a dtype anew whenever it is asked, and a call asks many times.
_name_of = lru_cache(maxsize=64)(name_of)


class NumpyBackend(Backend):
    name = "NumPy"
    writable = True
    reads = True
    # Calls cost little, but threads wait for each other between them.
    workspace = 4 << 20
    # How many threads products used before a call that is running limited them.
    _limited = 0

    def is_array(self, array: Any) -> bool:
        # Not all that inherits the operators of its arrays.
        return isinstance(array, (np.ndarray, np.generic))

    def why_refused(self, array: Array) -> str | None:
        if isinstance(array, np.matrix):
            return "np.matrix, whose products are not those of arrays"
        if isinstance(array, np.ma.MaskedArray):
            return "a masked array; pass the mask as key_masks"
        if not isinstance(array, np.ndarray):
            return "a NumPy scalar"
        if not array.dtype.isnative:
            return f"one in another byte order than this machine's, {array.dtype.str!r}: use array.astype({array.dtype.name!r})"
        return None

    def dtype_name(self, dtype: Any) -> str:
        return _name_of(dtype)

    def uploaded(self, numbers: np.ndarray, like: Array, dtype: Any) -> Array:
        table: np.ndarray = super().uploaded(numbers, like, dtype)
        # Shared among all calls.
        table.setflags(write=False)
        return table

    def read(self, arrays: Sequence[Array]) -> list[np.ndarray]:
        return list(arrays)

    def power_of_two(self, power: Array) -> Array:
        return np.ldexp(1.0 + (power - power), power.astype(np.int32))

    def run(self, function: Callable[..., Any], call: Any, arrays: Sequence[Array | None]) -> Any:
        # What overflows becomes inf or NaN and is dealt with as that, as in the other libraries.
        with np.errstate(all="ignore"):
            return function(call, self, tuple(arrays))

    def multiply_into(self, target: Array, left: Array, right: Array) -> None:
        np.multiply(left, right, out=target)

    def product_into(self, target: Array, left: Array, right: Array, further: bool = False) -> None:
        if further:
            np.add(target, left @ right, out=target)
        else:
            np.matmul(left, right, out=target)

    def transposed(self, x: Array) -> Array:
        # A quarter of the time for short rows.
        return np.ascontiguousarray(np.swapaxes(x, -1, -2))

    def exp_less(self, x: Array, shift: Array | None) -> Array:
        if shift is not None:
            np.subtract(x, shift, out=x)
        return np.exp(x, out=x)

    def times(self, weights: Array, x: Array) -> Array:
        return np.multiply(x, weights, out=x)

    def threads(self) -> int:
        blas = () if self._limited else libraries("blas").lib_controllers
        return self._limited or min((library.num_threads or 1 for library in blas), default=1)

    def in_threads(self, tasks: Sequence[Callable[[], Any]], stop: Event) -> list[Any]:
        # A context holds the settings for errors, and may be entered once at a time.
        contexts = [copy_context() for _ in tasks]
        tasks = [partial(context.run, task) for context, task in zip(contexts, tasks, strict=True)]

        def alone(task: Callable[[], Any]) -> Any:
            take_threads("blas")
            return task()

        self._limited = self.threads()
        try:
            with libraries("blas").limit(limits=1):
                return run_threads(tasks, stop, alone)
        finally:
            self._limited = 0

    def cleared(self, rows: Array, there: Array) -> Array:
        if rows.shape[:-1] != there.shape[:-1]:
            return super().cleared(rows, there)
        # Whole rows at once, in a third of the time.
        found = np.array(rows)
        found[~there[..., 0]] = 0
        return found

    def write_rows(self, target: Array, places: Array, rows: Array) -> None:
        # A row that is one element is written twice as fast.
        row = np.dtype((np.void, rows.itemsize * rows.shape[1]))
        target.view(row)[places] = np.ascontiguousarray(rows).view(row)


BACKEND = NumpyBackend(xp)
BACKEND.kernels = compiled.kernels_for(BACKEND, lambda *arrays: True)
