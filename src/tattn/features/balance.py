"""Products over many views that stay in the range of the dtype on the way, where they do in the end.

Values of one view may be as small as those of another are large. Products of two are results, or gradients, themselves; of more
the first may vanish, or overflow, and not come back. So the factors are brought to one size, channel by channel, by powers of two
whose product is one: nothing is rounded, and nothing has to be multiplied back. Bounds are products of sizes alone: these are
multiplied as logarithms.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log, log2
from typing import Any

from ..arrays import max_to_leading, prod_of, shared_leading, sum_of, times_power
from ..backends import Array, Backend
from ..checks import LARGEST_POWER
from ..operands import Operands
from .scaling import channel_tops

# Factors of which some are multiplied before the others.
MANY = 3
# Below what log2 of any number is.
_LEAST = -1100.0
# Values whose product over all views is at most so many powers of two from 1 are multiplied as they are.
_NEAR_ONE = 48
# log2 of the numbers in a sum whose losses below the range of the dtype are to be no more than its rounding.
ADDED = 16


def prod_in_range(factors: Sequence[Array], backend: Backend, axes: int = 1) -> Array:
    """Hadamard product of arrays (..., r, k) that broadcast, as large as their columns over the last `axes` before k allow."""
    return prod_of(balanced_factors(factors, backend, axes))


def balanced_factors(factors: Sequence[Array], backend: Backend, axes: int = 1) -> Sequence[Array]:
    """Arrays (..., r, k) with the same product, whose columns are alike in size."""
    xp = backend.xp
    if len(factors) < MANY:
        return factors
    over = tuple(range(-1 - axes, -1))
    sizes = [xp.max(xp.abs(x), axis=over, keepdims=True) for x in backend.values_of(factors)]
    if _near_one(sizes, backend):
        return factors
    powers = _powers(sizes, backend)
    return [times_power(x, p, backend) for x, p in zip(factors, powers, strict=True)]


def balanced_values(operands: Operands, sums: Sequence[Array] = ()) -> tuple[Operands, list[Array], list[Array]]:
    """The operands with values alike in size, and `sums` (..., r, dv + 1) that its values are added to.

    And log2 of what the values of each view were multiplied by, (..., 1, dv), and so their gradients are to be. None are for few
    views, nor where all values can be read and are near one.
    """
    backend, values = operands.backend, operands.values
    xp = backend.xp
    if len(values) < MANY:
        return operands, list(sums), []
    dtype = operands.dtype
    plain: Sequence[Array] = backend.values_of((*values, *sums))
    tops = [channel_tops(v, mask, backend) for v, mask in zip(plain, operands.masks, strict=False)]
    for i, total in enumerate(plain[len(values) :]):
        tops[i] = xp.maximum(tops[i], xp.max(xp.abs(total[..., :-1]), axis=-2, keepdims=True))
    tops = [max_to_leading(top, tuple(v.shape[:-2]), backend) for top, v in zip(tops, values, strict=True)]
    if _near_one(tops, backend):
        return operands, list(sums), []
    powers = [
        xp.reshape(p, p.shape[p.ndim - v.ndim :])
        for p, v in zip(_powers(shared_leading(tops, backend), backend), values, strict=True)
    ]
    views = tuple(
        view._replace(values=times_power(backend.cast(view.values, dtype), power, backend))
        for view, power in zip(operands.views, powers, strict=True)
    )
    scaled = [times_power(s, with_one(p, backend), backend) for s, p in zip(sums, powers, strict=False)]
    return operands._replace(views=views), scaled, powers


def with_powers(gradients: Sequence[Array], powers: Sequence[Array], backend: Backend) -> tuple[Array, ...]:
    """Gradients of what was multiplied by powers of two, as those of what it was before."""
    if not powers:
        return tuple(gradients)
    return tuple(times_power(g, p, backend) for g, p in zip(gradients, powers, strict=True))


def with_one(power: Array, backend: Backend) -> Array:
    """Of values and the ones beside them, (..., 1, dv + 1): ones stay as they are."""
    return backend.xp.concat([power, backend.xp.zeros_like(power[..., :1])], axis=-1)


def _near_one(sizes: Sequence[Array], backend: Backend) -> bool:
    """Whether sizes may be read, and no product of any of them leaves the range of the dtype by far: most calls need no more."""
    xp = backend.xp
    if not backend.reads or any(0 in size.shape for size in sizes):
        return False
    limit = 2.0 ** (_NEAR_ONE // len(sizes))
    return all(float(xp.max(s)) <= limit and float(xp.min(xp.where(s > 0, s, 1.0))) >= 1 / limit for s in sizes)


def _powers(sizes: Sequence[Array], backend: Backend) -> list[Array]:
    """Whole numbers that add up to 0 over some arrays of sizes: those times 2 to their power are alike, to a few factors of two."""
    xp = backend.xp
    logs = []
    for size in sizes:
        log = xp.log2(xp.where((size > 0) & xp.isfinite(size), size, 1.0))
        logs.append(xp.round(xp.where(log > _LEAST, log, _LEAST)))
    mean = xp.round(sum_of(logs) * (1 / len(logs)))
    powers = [mean - log for log in logs[:-1]]
    return [*powers, -sum_of(powers)]


def log2_of(x: Array, backend: Backend) -> Array:
    """Logarithms of sizes, −∞ of 0."""
    xp = backend.xp
    return xp.where(x == 0, -inf, xp.log2(xp.where(x == 0, 1.0, x)))


def log2_sum(logs: Array, axis: int, backend: Backend) -> Array:
    """log2 Σ 2^x along an axis, which stays."""
    xp = backend.xp
    top = xp.max(logs, axis=axis, keepdims=True)
    safe = xp.where(xp.isfinite(top), top, 0.0)
    return safe + log2_of(xp.sum(xp.exp((logs - safe) * log(2.0)), axis=axis, keepdims=True), backend)


def log2_add(x: Array, y: Array, backend: Backend) -> Array:
    """log2 of 2^x + 2^y."""
    xp = backend.xp
    top = xp.maximum(x, y)
    safe = xp.where(xp.isfinite(top), top, 0.0)
    return safe + log2_of(xp.exp((x - safe) * log(2.0)) + xp.exp((y - safe) * log(2.0)), backend)


def log2_range(dtype: Any, backend: Backend) -> tuple[float, float, float]:
    """Sizes above the first power of two and below the second are computed with all digits; the third is the end of the range.

    Sums of 2^`ADDED` numbers, each off by the smallest normal number, are then right to half a unit in the last place.
    """
    info = backend.xp.finfo(dtype)
    smallest = log2(float(info.smallest_normal))
    least = smallest + ADDED - log2(float(info.eps) / 2)
    return least, -least, 1 - smallest


def least_sum(dtype: Any, backend: Backend) -> float:
    """What a sum has to be for that what vanishes of its terms does not count."""
    return float(2.0 ** log2_range(dtype, backend)[0])


def exp2_bound(logs: Array, dtype: Any, backend: Backend) -> Array:
    """Bounds from logarithms: 0 is 0, no other is below the smallest normal number, and what is none is infinite."""
    xp = backend.xp
    end = log2_range(dtype, backend)[2]
    # A logarithm is rounded, which may move the bound by so much.
    raised = xp.where(logs > 1 - end, logs + 2.0**-9, 1 - end)
    known = xp.where(raised < end, xp.exp(xp.where(raised < end, raised, 0.0) * log(2.0)), inf)
    return xp.where(xp.isnan(logs), inf, xp.where(logs == -inf, 0.0, known))


def over_largest(weights: Array, backend: Backend) -> tuple[Array, Array]:
    """Weights (..., n, 1) over a power of two of the largest of them, NaN where that leaves too little; and log2 of the power."""
    power = _power(weights, backend)
    divided = times_power(weights, -power, backend)
    normal = 2.0 ** -(LARGEST_POWER[backend.dtype_name(weights.dtype)] + 1)
    return backend.xp.where((weights > 0) & (divided < normal), backend.xp.nan, divided), power


def _power(weights: Array, backend: Backend) -> Array:
    """The whole number p with the largest weight in (2^(p − 1), 2^p], 0 for none; (..., 1, 1)."""
    xp = backend.xp
    (plain,) = backend.values_of((weights,))
    top = xp.max(plain, axis=-2, keepdims=True)
    usual = (top > 0) & xp.isfinite(top)
    return xp.where(usual, xp.ceil(xp.log2(xp.where(usual, top, 1.0))), 0.0)


def raised(lse: Array, powers: Sequence[Array]) -> Array:
    """The lse of weights from that of what `over_largest` left of them."""
    return lse + sum_of(powers) * log(2.0)
