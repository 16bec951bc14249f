"""array-api-strict: the standard and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import array_api_strict
import numpy as np

from .base import Array, Backend


class StrictBackend(Backend):
    name = "array-api-strict"

    def run(self, function: Callable[..., Any], call: Any, arrays: Sequence[Array | None]) -> Any:
        # It computes by NumPy, and warns as NumPy does.
        with np.errstate(all="ignore"):
            return function(call, self, tuple(arrays))


BACKEND = StrictBackend(array_api_strict)
