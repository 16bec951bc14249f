"""NumPy: products written straight into the buffer that keeps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import copy_context
from functools import cache
from typing import Any

import array_api_compat.numpy as xp
import numpy as np
from threadpoolctl import ThreadpoolController

from .base import Array, Backend, run_threads


class NumpyBackend(Backend):
    name = "NumPy"
    writable = True
    reads = True
    # Calls cost little, but threads wait for each other between them.
    workspace = 4 << 20

    def is_supported(self, array: Array) -> str | None:
        if isinstance(array, np.matrix):
            return "np.matrix, whose products are not those of arrays"
        if isinstance(array, np.ma.MaskedArray):
            return "a masked array; pass the mask as key_masks"
        if not isinstance(array, np.ndarray):
            return "a NumPy scalar"
        return None

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

    def exp_less(self, x: Array, shift: Array | None) -> Array:
        if shift is not None:
            np.subtract(x, shift, out=x)
        return np.exp(x, out=x)

    def times(self, weights: Array, x: Array) -> Array:
        return np.multiply(x, weights, out=x)

    def threads(self) -> int:
        return min((int(library.num_threads) for library in _blas().lib_controllers), default=1)

    def in_threads(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        def alone(task: Callable[[], Any]) -> Callable[[], Any]:
            # A thread has settings for errors, and with OpenMP a number of threads, of its own.
            context = copy_context()

            def work() -> Any:
                with _blas().limit(limits=1):
                    return context.run(task)

            return work

        with _blas().limit(limits=1):
            return run_threads([alone(task) for task in tasks])

    def write_rows(self, target: Array, places: Array, rows: Array) -> None:
        # A row that is one element is written twice as fast.
        row = np.dtype((np.void, rows.itemsize * rows.shape[1]))
        target.view(row)[places] = np.ascontiguousarray(rows).view(row)


@cache
def _blas() -> ThreadpoolController:
    """The libraries that matrix products run in."""
    return ThreadpoolController().select(user_api="blas")


BACKEND = NumpyBackend(xp)
