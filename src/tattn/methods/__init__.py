"""The methods of computing attention: frozen values behind one protocol."""

from __future__ import annotations

from .banded import Banded
from .exact import Exact
from .method import Call, Method, backward, forward, gradient_bounds, told_error
from .packed import Packed
from .polynomial import Polynomial
from .recomputed import Recomputed

# The names that `method=` takes besides "auto". Norm bands are a series of the polynomial method.
METHODS: dict[str, type[Method]] = {
    "polynomial": Polynomial,
    "exact": Exact,
}

__all__ = [
    "METHODS",
    "Banded",
    "Call",
    "Exact",
    "Method",
    "Packed",
    "Polynomial",
    "Recomputed",
    "backward",
    "forward",
    "gradient_bounds",
    "told_error",
]
