"""Calls of any length whose answer is known: rows drawn from a few distinct ones, so that a small problem tells all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.polynomial.polynomial import polyder, polyval

from evidence.apart import stored
from tattn.plans import Plan

# Distinct rows; shorter calls have as many as rows.
_DISTINCT = 64


@dataclass(frozen=True)
class Problem:
    """Inputs in float32, and what the definition gives for them in float64.

    Each distinct row comes equally often, a row of a view with its value, a query row with its gradient. Then every
    output and gradient of a row is that of the distinct row in the problem of the distinct rows alone.

    Attributes
    ----------
    arrays : query, keys, values; each (n, d) or (n, dv)
    grad : gradient of the output, (n, dv)
    wide : query, keys, values and gradient of the distinct rows, float64; a single view has one of ones beside it
    expected : output and gradients of `arrays`, float64, of the distinct rows
    places : for each of `expected`, which distinct row stands in a row, (n,)
    """

    arrays: tuple[np.ndarray, ...]
    grad: np.ndarray
    wide: tuple[np.ndarray, ...]
    expected: tuple[np.ndarray, ...]
    places: tuple[np.ndarray, ...]

    @property
    def views(self) -> int:
        """How many keys."""
        return len(self.arrays) // 2

    def errors(
        self, result: list[np.ndarray], plan: Plan | None, checked: bool = True, rounding: float = 1e-5
    ) -> dict[str, float]:
        """How far a result (output, or output and gradients) is from the definition; raises where it is too far.

        A polynomial's is too far from exp beyond its plan's bounds, and from the definition with P in place of exp beyond
        rounding, as that of an exact one from the definition: `rounding` is allowed in outputs, ten times that in gradients.
        `error` is relative to Π max|values| as `tol` is, `error_of_spread` to how far outputs of two rows are apart at most,
        `gradient_error` of each gradient to its largest entry, the largest of all.
        """
        query, *rest = self.arrays
        keys, values = rest[: self.views], rest[self.views :]
        out = self.expected[0]
        off = [np.abs(r - e[p]) for r, e, p in zip(result, self.expected, self.places, strict=False)]
        size = np.prod([np.abs(v).max(axis=0) for v in values], axis=0)
        found = {
            "error": float((off[0] / size).max()),
            "error_of_spread": float(off[0].max() / np.ptp(out, axis=0).max()),
        }
        if len(result) > 1:
            found["gradient_error"] = _relative(off[1:], self.expected[1:])
        if not checked:
            return found
        if plan is None or plan.method == "exact":
            computed = self.expected
        else:
            _within("error", found["error"], plan.error)
            if len(result) > 1:
                unit = np.prod([np.abs(k).max(axis=0) for k in keys], axis=0) / query.shape[1]
                weight = (np.abs(self.grad) * size).sum(axis=1, keepdims=True)
                _within("error of the query's gradient", float((off[1] / (unit * weight)).max()), plan.grad_error)
            computed = _with_polynomial(self.wide, self.views, plan.coefficients)
        rounded = [np.abs(r - e[p]) for r, e, p in zip(result, computed, self.places, strict=False)]
        _within("rounding", float((rounded[0] / size).max()), rounding)
        if len(result) > 1:
            _within("rounding of a gradient", _relative(rounded[1:], computed[1:]), 10 * rounding)
        return found


def _relative(off: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """The largest difference of an array to what is expected, over the largest entry of that; the largest of all."""
    return float(max(o.max() / np.abs(e).max() for o, e in zip(off, expected, strict=True)))


def _within(name: str, found: float, allowed: float) -> None:
    if not found <= allowed:
        raise AssertionError(f"{name} {found:.2e} where {allowed:.2e} is promised")


def draw(n: int, dim: int, value_dim: int, views: int = 2) -> Problem:
    """Query and keys with entries from ±0.7 to ±1, so that scores spread over much of ±1; values and gradient within ±1."""
    distinct = min(n, _DISTINCT)
    if n % distinct:
        raise ValueError(f"n should be a multiple of {distinct}, got {n}")
    query, keys, values, grad, wide, expected = _distinct(distinct, dim, value_dim, views)
    rng = np.random.default_rng(0)
    rows, *places = (rng.permutation(np.arange(n) % distinct) for _ in range(views + 1))
    spread = (query[rows], *(x[p] for x, p in zip((*keys, *values), places * 2, strict=True)))
    return Problem(spread, grad[rows], wide, expected, (rows, rows, *places, *places))


@cache
def _distinct(n: int, dim: int, value_dim: int, views: int) -> tuple[Any, ...]:
    """Query, keys, values and gradient of the distinct rows, (n, d) or (n, dv), all as `wide`, and what is expected for them."""
    rng = np.random.default_rng(0)
    points = rng.choice((-1.0, 1.0), (views + 1, n, dim)) * rng.uniform(0.7, 1, (views + 1, n, dim))
    query, *keys = points.astype(np.float32)
    *values, grad = rng.uniform(-1, 1, (views + 1, n, value_dim)).astype(np.float32)
    # A second view of one row of ones makes a single view of two.
    ones = [[np.ones_like(x[:1])] if views == 1 else [] for x in (query, grad)]
    wide = tuple(x.astype(np.float64) for x in (query, *keys, *ones[0], *values, *ones[1], grad))
    return query, keys, values, grad, wide, _of_views(stored(*wide), views)


def _of_views(found: Sequence[np.ndarray], views: int) -> tuple[np.ndarray, ...]:
    """Output and gradients of two views as those of one or two."""
    out, d_query, *rest = found
    return out, d_query, *rest[:views], *rest[2 : 2 + views]


def _with_polynomial(wide: Sequence[np.ndarray], views: int, coefficients: Sequence[float]) -> tuple[np.ndarray, ...]:
    """Output and gradients by the definition with P in place of exp, all scores stored."""
    q, a, b, u, v, g = wide
    scale = 1 / q.shape[1]
    scores = np.einsum("ic,jc,kc->ijk", q, a, b, optimize=True) * scale
    weights, slopes = polyval(scores, coefficients), polyval(scores, polyder(coefficients))
    total = weights.sum(axis=(1, 2), keepdims=True)
    f = weights / total
    out = np.einsum("ijk,je,ke->ie", f, u, v, optimize=True)
    w = np.einsum("ie,je,ke->ijk", g, u, v, optimize=True) - (g * out).sum(axis=1)[:, None, None]
    p = slopes / total * w * scale
    found = [
        np.einsum(formula, *arrays, optimize=True)
        for formula, *arrays in (
            ("ijk,jc,kc->ic", p, a, b),
            ("ijk,ic,kc->jc", p, q, b),
            ("ijk,ic,jc->kc", p, q, a),
            ("ijk,ie,ke->je", f, g, v),
            ("ijk,ie,je->ke", f, g, u),
        )
    ]
    return _of_views((out, *found), views)
