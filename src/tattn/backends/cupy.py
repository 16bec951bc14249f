"""CuPy: NumPy's ways on a CUDA device, with blocks large enough to fill it."""

from __future__ import annotations

import array_api_compat.cupy as xp
import cupy
import numpy as np

from .base import Array, Backend


class CupyBackend(Backend):
    name = "CuPy"
    writable = True
    workspace = 256 << 20
    cache = 128 << 20
    most_rows = 1 << 15

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
        host: np.ndarray = cupy.asnumpy(array)
        return host


BACKEND = CupyBackend(xp)
