"""How wrong a computed dLoss/dX can be: sizes measured on the data in linear time, and the bound made of them.

docs/errors.md, section "Algorithm 1", has the derivation. The polynomial enters by δ alone, since no derivative of it
is used; ρ is the rounding of sums, relative to the normaliser.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf, log2, sqrt
from typing import NamedTuple

from ..arrays import broadcast_leading, sum_of
from ..backends import Array, Backend
from ..bounds.rounding import LAMBDA
from ..features.balance import log2_add, log2_of, log2_range, log2_sum
from ..features.scaling import channel_units

# Sizes are sums over many rows, rounded, of at most so many at a time; and products of small errors are left out.
_SLACK = 1.01
_BLOCK = 1024
_MOST_ROUNDING = 0.05


class SizesCall(NamedTuple):
    """What the sizes depend on besides arrays; hashable. `unit` is half a unit in the last place, relative."""

    scale: float
    upstream: bool
    unit: float


class Sizes(NamedTuple):
    """The largest over all problems; with U_e = max|u_e| max|v_e| and |·| over rows i weighted by s α Σ_i |A1|."""

    slope: float  # of W_i = Σ_e |c_ie| U_e
    residual: float  # of Σ_e U_e², how far c̃ may move; 0 with an upstream gradient
    values: float  # rounding of u and v
    scores: float  # rounding of q, a and b, as it moves a score


def sizes(call: SizesCall, backend: Backend, arrays: Sequence[Array]) -> Sizes:
    """Sizes of a problem, from (q, a, b, u, v, A1, …, A5, X1, X2, X3, Y1, Y2, target)."""
    *logs, scores = (float(x) for x in backend.read(backend.run(_measured, call, arrays)))
    # Python's powers of two raise where they overflow.
    slope, residual, values = (0.0 if x == -inf else 2.0 ** max(x, -1022.0) if x < 1024 else inf for x in logs)
    return Sizes(slope, residual, values, scores)


def gradient_error(sizes: Sizes, delta: float, rho: float) -> float:
    """Bound of ‖g̃ − dLoss/dX‖_∞ for a polynomial of relative error δ (0 for exp itself) and rounding ρ."""
    moved = (1 + delta) * exp(min(sizes.scores, 1.0)) - 1
    if not (moved < 1 and rho <= _MOST_ROUNDING):
        return inf
    eta, rounded = moved / (1 - moved), rho / (1 - rho)
    slope, residual = 2 * eta + 8 * rounded, eta + 4 * rounded
    return _SLACK * (slope * sizes.slope + residual * sizes.residual + sizes.values)


def _measured(call: SizesCall, backend: Backend, arrays: Sequence[Array]) -> tuple[Array, ...]:
    """The numbers of `Sizes`, all but the last as logarithms to base 2, as scalars."""
    xp = backend.xp
    q, a, b, u, v, *inputs, target = arrays
    made = [
        _made(left, right, product, call.unit, backend)
        for left, right, product in zip(inputs[:5], inputs[5:], (q, a, b, u, v), strict=True)
    ]
    units = channel_units(q, [a, b], [None, None], call.scale, backend)
    scores = xp.sum(_product_error([(top * x, err * x) for (top, err), x in zip(made, units, strict=False)]), axis=-1)

    (top_u, err_u), (top_v, err_v) = ([log2_of(x, backend) for x in pair] for pair in made[3:])
    largest = top_u + top_v  # U_e, (..., 1, dv)
    rounding = log2_add(err_u + top_v, err_v + top_u, backend)

    def body(carry: tuple[Array, ...], a1: Array, target: Array) -> tuple[tuple[Array, ...], tuple[()]]:
        c, a1 = (log2_of(xp.abs(x), backend) for x in (target, a1))
        if call.upstream:
            columns = (c + largest, xp.full_like(c + largest, -inf), c + rounding)
        else:
            moved = log2_add(c, largest, backend)
            columns = (moved + largest, largest + largest, log2_add(moved, largest, backend) + rounding)
        sums = (log2_sum(a1 + log2_sum(x, -1, backend), -2, backend) for x in columns)
        return tuple(log2_add(old, new, backend) for old, new in zip(carry, sums, strict=True)), ()

    leading = broadcast_leading(inputs[0], target, largest, rounding)
    shape = (*leading, 1, inputs[0].shape[-1])
    start = xp.full(shape, -inf, dtype=q.dtype, device=backend.device(q))
    found, _ = backend.scan_rows(body, (start,) * 3, (inputs[0], target), _BLOCK)
    tops = [log2_of(xp.max(xp.abs(x), axis=(-2, -1), keepdims=True), backend) for x in (*inputs[:3], target)]
    least, _, end = log2_range(q.dtype, backend)
    # What is lost of one factor, or of a product of some, times the others.
    factors = (*tops, *(xp.max(x, axis=-1, keepdims=True) for x in (top_u, top_v, largest)))
    lost = least + sum_of([xp.where(x > 0, x, 0.0) for x in factors]) + max(0.0, log2(call.scale))
    logs = []
    for x in found:
        size = x + tops[1] + tops[2] + log2(call.scale)
        size = xp.where(size == -inf, size, xp.maximum(size, lost))
        logs.append(xp.max(xp.where(size < end, size, inf)))
    return *logs, xp.max(scores)


def _made(left: Array, right: Array, product: Array, unit: float, backend: Backend) -> tuple[Array, Array]:
    """For a computed A X: per column, the largest |entry| that the true one can have, and its largest error (..., 1, k)."""
    xp = backend.xp
    terms = left.shape[-1]
    size = xp.max(xp.abs(left) @ xp.abs(right), axis=-2, keepdims=True)
    error = size * (unit * min(terms, LAMBDA * sqrt(terms)))
    # Of numbers that are none of them 0 so much may vanish.
    some = (xp.max(xp.abs(left), axis=(-2, -1), keepdims=True) > 0) & (
        xp.max(xp.abs(right), axis=-2, keepdims=True) > 0
    )
    error = xp.where(some, error + terms * float(xp.finfo(error.dtype).smallest_normal), error)
    return xp.max(xp.abs(product), axis=-2, keepdims=True) + error, error


def _product_error(made: Sequence[tuple[Array, Array]]) -> Array:
    """How far a product of one entry of each can be off, from (largest, error) of each."""
    total = made[0][0] * 0.0
    for i, (_, error) in enumerate(made):
        for j, (top, _) in enumerate(made):
            if j != i:
                error = error * top
        total = total + error
    return total
