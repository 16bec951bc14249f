"""The training problem in dense NumPy: loss and gradient for X as one matrix (d1, d2 d3), for two views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

NAMES = ("a1", "a2", "a3", "a4", "a5", "e", "x1", "x2", "x3", "y1", "y2")


class Steps(NamedTuple):
    """What Algorithm 1 approximates on the way; f, w and p are (..., n, n2, n3)."""

    f: np.ndarray
    output: np.ndarray
    c: np.ndarray
    w: np.ndarray
    r: np.ndarray
    p: np.ndarray
    gradient: np.ndarray


def core(m: dict[str, np.ndarray]) -> np.ndarray:
    """X1 (X2 ⊘ X3)ᵀ, (..., d1, d2 d3)."""
    x = np.einsum("...lc,...xc,...yc->...lxy", m["x1"], m["x2"], m["x3"])
    return x.reshape(*x.shape[:-2], -1)


def steps(
    matrices: dict[str, np.ndarray],
    *,
    upstream: np.ndarray | None = None,
    x: np.ndarray | None = None,
    function: Callable[[np.ndarray], np.ndarray] = np.exp,
    precision: Any = np.float64,
) -> Steps:
    """All of a problem by its definition; `x` in place of X1 (X2 ⊘ X3)ᵀ, `function` in place of exp."""
    m = {name: np.asarray(value, precision) for name, value in matrices.items()}
    scale = precision(1) / m["x1"].shape[-1]
    widths = m["a2"].shape[-1], m["a3"].shape[-1]
    x = core(m) if x is None else x
    tensor = x.reshape(*x.shape[:-1], *widths)
    q = np.einsum("...il,...lxy->...ixy", m["a1"], tensor)
    scores = scale * np.einsum("...ixy,...jx,...ky->...ijk", q, m["a2"], m["a3"], optimize=True)
    weights = function(scores)
    f = weights / weights.sum(axis=(-1, -2), keepdims=True)
    u, v = m["a4"] @ m["y1"], m["a5"] @ m["y2"]
    out = np.einsum("...ijk,...je,...ke->...ie", f, u, v, optimize=True)
    c = out - m["e"] if upstream is None else np.asarray(upstream, precision) + 0 * out
    w = np.einsum("...ie,...je,...ke->...ijk", c, u, v)
    r = (c * out).sum(-1)
    p = f * (w - r[..., None, None])
    gradient = scale * np.einsum("...ijk,...il,...jx,...ky->...lxy", p, m["a1"], m["a2"], m["a3"], optimize=True)
    return Steps(f, out, c, w, r, p, gradient.reshape(*gradient.shape[:-2], -1))


def dense_loss(matrices: dict[str, np.ndarray], x: np.ndarray | None = None) -> np.ndarray:
    """½ ‖output − E‖², (...)."""
    return 0.5 * (steps(matrices, x=x).c ** 2).sum((-1, -2))


def derivative(function: Callable[[np.ndarray], np.ndarray], at: np.ndarray, step: float = 1e-3) -> np.ndarray:
    """The gradient of a sum of `function` by central differences of sixth order."""
    result = np.zeros(at.shape)
    for index in np.ndindex(at.shape):
        for weight, distance in ((45, 1), (-9, 2), (1, 3)):
            for sign in (1, -1):
                moved = at.copy()
                moved[index] += sign * distance * step
                result[index] += sign * weight * np.sum(function(moved)) / (60 * step)
    return result
