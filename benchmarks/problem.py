"""Calls of any length whose answer is known: rows drawn from a few distinct ones, so that a small problem tells all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from tattn.evidence.apart import stored
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
    expected : output and gradients of `arrays`, float64, of the distinct rows
    places : for each of `expected`, which distinct row stands in a row, (n,)
    """

    arrays: tuple[np.ndarray, ...]
    grad: np.ndarray
    expected: tuple[np.ndarray, ...]
    places: tuple[np.ndarray, ...]

    @property
    def views(self) -> int:
        """How many keys."""
        return len(self.arrays) // 2

    def errors(self, result: list[np.ndarray], plan: Plan | None, checked: bool = True) -> dict[str, float]:
        """How far a result (output, or output and gradients) is from the definition; raises where it is too far.

        By a polynomial plan that is beyond its bounds, otherwise beyond rounding.
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
        allowed = 1e-5 if plan is None or plan.method == "exact" else plan.error
        if checked and not found["error"] <= allowed:
            raise AssertionError(f"error {found['error']:.2e} where {allowed:.2e} is promised")
        if len(result) == 1:
            return found
        relative = [o.max() / np.abs(e).max() for o, e in zip(off[1:], self.expected[1:], strict=True)]
        found["gradient_error"] = float(max(relative))
        if plan is None or plan.method == "exact":
            worst, allowed = found["gradient_error"], 1e-4
        else:
            unit = np.prod([np.abs(k).max(axis=0) for k in keys], axis=0) / query.shape[1]
            weight = (np.abs(self.grad) * size).sum(axis=1, keepdims=True)
            worst, allowed = float((off[1] / (unit * weight)).max()), plan.grad_error
        if checked and not worst <= allowed:
            raise AssertionError(f"error of the gradient {worst:.2e} where {allowed:.2e} is promised")
        return found


def draw(n: int, dim: int, value_dim: int, views: int = 2) -> Problem:
    """Query and keys with entries from ±0.7 to ±1, so that scores spread over much of ±1; values and gradient within ±1."""
    distinct = min(n, _DISTINCT)
    if n % distinct:
        raise ValueError(f"n should be a multiple of {distinct}, got {n}")
    query, keys, values, grad, expected = _distinct(distinct, dim, value_dim, views)
    rng = np.random.default_rng(0)
    rows, *places = (rng.permutation(np.arange(n) % distinct) for _ in range(views + 1))
    spread = (query[rows], *(x[p] for x, p in zip((*keys, *values), places * 2, strict=True)))
    return Problem(spread, grad[rows], expected, (rows, rows, *places, *places))


@cache
def _distinct(
    n: int, dim: int, value_dim: int, views: int
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray], np.ndarray, tuple[np.ndarray, ...]]:
    """Query, keys, values and gradient of the distinct rows, (n, d) or (n, dv), and what is expected for them."""
    rng = np.random.default_rng(0)
    points = rng.choice((-1.0, 1.0), (views + 1, n, dim)) * rng.uniform(0.7, 1, (views + 1, n, dim))
    query, *keys = points.astype(np.float32)
    *values, grad = rng.uniform(-1, 1, (views + 1, n, value_dim)).astype(np.float32)
    # A second view of one row of ones makes a single view of two.
    ones = [[np.ones_like(x[:1])] if views == 1 else [] for x in (query, grad)]
    wide = [x.astype(np.float64) for x in (query, *keys, *ones[0], *values, *ones[1], grad)]
    out, d_query, *rest = stored(*wide)
    return query, keys, values, grad, (out, d_query, *rest[:views], *rest[2 : 2 + views])
