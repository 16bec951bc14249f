"""How wrong a computed dLoss/dX can be: sizes measured on the data in linear time, and the bound made of them.

docs/errors.md, section "Algorithm 1", has the derivation. The polynomial enters by δ alone, since no derivative of it
is used; ρ is the rounding of sums, relative to the normaliser.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, inf, sqrt
from typing import NamedTuple

from ..arrays import broadcast_leading
from ..backends import Array, Backend
from ..bounds.rounding import LAMBDA
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
    return Sizes(*(float(x) for x in backend.run(_measured, call, arrays)))


def gradient_error(sizes: Sizes, delta: float, rho: float) -> float:
    """Bound of ‖g̃ − dLoss/dX‖_∞ for a polynomial of relative error δ (0 for exp itself) and rounding ρ."""
    moved = (1 + delta) * exp(min(sizes.scores, 1.0)) - 1
    if not (moved < 1 and rho <= _MOST_ROUNDING):
        return inf
    eta, rounded = moved / (1 - moved), rho / (1 - rho)
    slope, residual = 2 * eta + 8 * rounded, eta + 4 * rounded
    return _SLACK * (slope * sizes.slope + residual * sizes.residual + sizes.values)


def _measured(call: SizesCall, backend: Backend, arrays: Sequence[Array]) -> tuple[Array, ...]:
    """The numbers of `Sizes`, as scalars."""
    xp = backend.xp
    q, a, b, u, v, *inputs, target = arrays
    made = [
        _made(left, right, product, call.unit, backend)
        for left, right, product in zip(inputs[:5], inputs[5:], (q, a, b, u, v), strict=True)
    ]
    units = channel_units(q, [a, b], [None, None], call.scale, backend)
    scores = _product_error([(top * unit, err * unit) for (top, err), unit in zip(made, units, strict=False)])
    scores = xp.sum(scores, axis=-1)

    largest = made[3][0] * made[4][0]  # U_e, (..., 1, dv)
    rounding = _product_error(made[3:])

    def body(carry: tuple[Array, ...], a1: Array, target: Array) -> tuple[tuple[Array, ...], tuple[()]]:
        c, a1 = xp.abs(target), xp.abs(a1)
        if call.upstream:
            columns = (c * largest, largest * 0.0, c * rounding)
        else:
            columns = ((c + largest) * largest, largest * largest, (c + 2 * largest) * rounding)
        sums = (xp.sum(a1 * xp.sum(x, axis=-1, keepdims=True), axis=-2, keepdims=True) for x in columns)
        return tuple(old + new for old, new in zip(carry, sums, strict=True)), ()

    leading = broadcast_leading(inputs[0], target, largest, rounding)
    zero = xp.zeros((*leading, 1, inputs[0].shape[-1]), dtype=q.dtype, device=backend.device(q))
    found, _ = backend.scan_rows(body, (zero,) * 3, (inputs[0], target), _BLOCK)
    a2, a3 = (xp.max(xp.abs(x), axis=(-2, -1), keepdims=True) for x in inputs[1:3])
    return *(xp.max(x * a2 * a3) * call.scale for x in found), xp.max(scores)


def _made(left: Array, right: Array, product: Array, unit: float, backend: Backend) -> tuple[Array, Array]:
    """For a computed A X: per column, the largest |entry| that the true one can have, and its largest error (..., 1, k)."""
    xp = backend.xp
    terms = left.shape[-1]
    size = xp.max(xp.abs(left) @ xp.abs(right), axis=-2, keepdims=True)
    error = size * (unit * min(terms, LAMBDA * sqrt(terms)))
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
