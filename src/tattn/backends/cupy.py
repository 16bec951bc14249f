"""CuPy: NumPy's ways on a CUDA device, with blocks large enough to fill it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from typing import Any

import array_api_compat.cupy as xp
import cupy
import numpy as np

# The only place that knows what CUPY_TF32 has set.
from cupy._core import _routines_linalg as products

from .base import Array, Backend


class CupyBackend(Backend):
    name = "CuPy"
    writable = True
    workspace = 256 << 20
    cache = 128 << 20
    most_rows = 1 << 15

    def on_device_of(self, array: Array) -> AbstractContextManager[Any]:
        # Whatever is created lands on the current device. Of its own for each use: it remembers where it was entered from.
        device: AbstractContextManager[Any] = cupy.cuda.Device(array.device.id)
        return device

    def run(self, function: Callable[..., Any], call: Any, arrays: Sequence[Array | None]) -> Any:
        with self.on_device_of(next(a for a in arrays if a is not None)), _full_products():
            return function(call, self, tuple(arrays))

    def multiply_into(self, target: Array, left: Array, right: Array) -> None:
        cupy.multiply(left, right, out=target)

    def product_into(self, target: Array, left: Array, right: Array, further: bool = False) -> None:
        if further:
            target += left @ right
        else:
            cupy.matmul(left, right, out=target)

    def devices(self) -> list[str]:
        runtime = cupy.cuda.runtime
        return [
            f"cuda:{i} ({runtime.getDeviceProperties(i)['name'].decode()})" for i in range(runtime.getDeviceCount())
        ]

    def to_numpy(self, array: Array) -> np.ndarray:
        with self.on_device_of(array):
            host: np.ndarray = cupy.asnumpy(array)
        return host

    def integers(self, array: Array) -> np.ndarray:
        with self.on_device_of(array):
            host: np.ndarray = cupy.asnumpy(array)
        return host.astype(np.int64)

    def uploaded(self, numbers: np.ndarray, like: Array, dtype: Any) -> Array:
        table = super().uploaded(numbers, like, dtype)
        with self.on_device_of(like):
            # Other streams do not wait for the copy.
            cupy.cuda.get_current_stream().synchronize()
        return table

    def captures(self, like: Array) -> bool:
        with self.on_device_of(like):
            return not cupy.cuda.runtime.is_hip and bool(cupy.cuda.get_current_stream().is_capturing())

    def finish(self, arrays: Sequence[Array]) -> None:
        for number in {a.device.id for a in arrays}:
            cupy.cuda.Device(number).synchronize()


class _Products:
    """What float32 products computed in before the calls that are running changed it, and how many these are."""

    lock = Lock()
    running = 0
    before = products.COMPUTE_TYPE_DEFAULT


@contextmanager
def _full_products() -> Iterator[None]:
    """Full float32 products, which the bounds assume, whatever the caller's setting; calls that overlap restore it once."""
    narrow = products.COMPUTE_TYPE_TF32, products.COMPUTE_TYPE_BF16, products.COMPUTE_TYPE_FP16
    with _Products.lock:
        if _Products.running == 0:
            _Products.before = products.get_compute_type(np.float32)
        changed = _Products.before in narrow
        if changed and _Products.running == 0:
            products.set_compute_type(np.float32, products.COMPUTE_TYPE_DEFAULT)
        _Products.running += 1
    try:
        yield
    finally:
        with _Products.lock:
            _Products.running -= 1
            if changed and _Products.running == 0:
                products.set_compute_type(np.float32, _Products.before)


BACKEND = CupyBackend(xp)
