"""The methods of computing attention: frozen values behind one protocol."""

from __future__ import annotations

from .banded import Banded
from .exact import Exact
from .method import Call, Method, backward, forward, gradient_bounds, told_error
from .packed import Packed
from .polynomial import Polynomial
from .recomputed import Recomputed

__all__ = [
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
