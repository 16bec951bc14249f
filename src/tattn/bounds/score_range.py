"""How large the scores can be, from one linear look at the rows and without looking at a score.

Every bound holds for Σ_c |scale · q_ic a_jc b_kc| as well, which is what rounding is measured by:

* entries: scale · d · max|q| · max|a| · max|b|, the bound of the paper;
* channels: scale · Σ_c max|q_c| · max|a_c| · max|b_c|, never larger;
* Hölder: scale · max_i ‖q_i‖_p · max_j ‖a_j‖_p′ · max_k ‖b_k‖_p″ with 1/p + 1/p′ + 1/p″ = 1, after a rescaling of
  the channels that leaves the scores as they are.

Of complex channels |q_c| is the modulus, and bounds and norms are of moduli.

The smallest is taken. The mean score of a query row is a product of means and costs as little; by Jensen's
inequality it bounds the row's normaliser from below, far better than −R does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from math import ceil, inf, isfinite, isnan, log2
from typing import Any, NamedTuple

import numpy as np

from ..arrays import (
    broadcast_leading,
    clean,
    max_to_leading,
    over_rows,
    prod_of,
    shared_leading,
    sizes_of,
    sum_of,
    weighed,
)
from ..backends import Array, Backend
from ..backends.numpy import BACKEND as numpy_backend
from ..checks import LARGEST_POWER
from ..features.complex_channels import conjugate, multiply
from ..features.scaling import channel_tops, over_blocks
from ..operands import COMPLEX, REAL, Operands

# log2 of scores that no polynomial serves, by far.
_FAR = 10.0


class Ranges(NamedTuple):
    """What a look at the rows tells; floats only."""

    bound: float  # largest |score| possible
    lowest_mean: float  # smallest mean score of a query row
    entries: float  # the paper's bound, for comparison
    largest: tuple[float, ...]  # largest entry of query, keys and values, NaN or inf where one is not finite
    sizes: tuple[float, ...] = ()  # scale · max|q_c| · Π_μ max|keys_μ,c| of every channel
    highest: float = inf  # degree up to which powers of entries do not overflow


# ("sum" or "max", arrays) → their sums or largest values over all that hold rows of the same views.
Together = Callable[[str, Sequence[Array]], Sequence[Array]]


def _alone(_: str, arrays: Sequence[Array]) -> Sequence[Array]:
    return arrays


class RangeCall(NamedTuple):
    """What the look depends on besides arrays; hashable."""

    scale: float
    views: int
    together: Together = _alone
    channels: str = REAL


def ranges(call: RangeCall, backend: Backend, arrays: Sequence[Array | None]) -> Ranges:
    """Look at (query, *keys, *values, *masks); a value may be None."""
    count = call.views + 1
    mean, *found = (x.astype(float) for x in backend.read(backend.run(_survey, call, arrays)))
    tops, sums, units = found[: -2 * count], found[-2 * count : -count], found[-count:]
    largest = [float(top.max()) for top in tops]
    if len(tops) == count:
        largest += [0.0] * call.views
    dtype = backend.dtype_name(arrays[0].dtype)  # type: ignore[union-attr]
    power = LARGEST_POWER[dtype]
    least, unit, most = (1e-4, 2.0**-24, 3.4e38) if dtype != "float64" else (1e-11, 2.0**-53, 1.7e308)
    # What is no number is no bound.
    with np.errstate(all="ignore"):
        scale = np.log(call.scale)
        sizes = _product([scale, *(np.log(top) for top in tops[:count])])
        entries = float(_product([scale, *(np.log(x) for x in largest[:count])])) * sizes.shape[-1]
        bounds = [entries, sizes.sum(axis=-1).max()]
        sizes = sizes.reshape(-1, sizes.shape[-1]).max(axis=0)
        by_exponent = [_log_norms(*x, call.views) for x in zip(sums, units, strict=True)]
        for ps in exponents(call.views):
            reach = _product([scale, *(n[p] for n, p in zip(by_exponent, ps, strict=True))])
            bounds += [*reach.reshape(-1, reach.shape[-1]).max(axis=0)]
        # Means, and products of them, lose what is below the smallest number, times the entries of the other views.
        smallest = 2.0 ** -(power + 1) * (1.0 if backend.flushes else 2 * unit)
        lost = prod_of([np.maximum(top, 1.0) for top in tops[:count]]).sum(axis=-1).max()
        lowest = (float(mean) - 4 * count * smallest * float(lost)) * call.scale
        highest = _highest_degree(tops[:count], arrays[:count], call.scale, power)
    # Sums over channels round; means over many rows round more, and are wanted to a percent only.
    slack = max(least, 2 * (sizes.size + 16) * unit)
    bound = min((float(x) for x in bounds if not isnan(x)), default=inf)
    # Scores that the dtype does not hold have none.
    held = bound <= most and all(map(isfinite, largest))
    bound = bound * (1 + slack) if held else inf
    # A mean that is not finite says nothing.
    lowest = min(lowest, bound) - 0.01 * bound if isfinite(lowest) else -inf
    lowest = max(-bound, lowest) if held else -inf
    return Ranges(bound, lowest, entries, tuple(largest), tuple((sizes * (1 + slack)).tolist()), highest)


def _highest_degree(tops: Sequence[np.ndarray], views: Sequence[Any], scale: float, largest: int) -> float:
    """The degree up to which no power of an entry overflows in units of channels, which are at most 2^`largest`.

    `tops`: the largest |entry| (..., 1, d) of every channel of query and keys.
    """
    if min(top.min() for top in tops) > 2.0 ** (_FAR - largest):
        return inf
    alike = [max_to_leading(t, tuple(x.shape[:-2]), numpy_backend) for t, x in zip(tops, views, strict=True)]
    logs = np.log2(np.concatenate(shared_leading(alike, numpy_backend), axis=-2))
    even = (logs.sum(axis=-2, keepdims=True) + log2(scale)) / len(tops)
    # What a view of denormal numbers is short of, the others take.
    short = np.where(logs > -inf, np.maximum(even - logs - largest, 0.0), 0.0).sum(axis=-2, keepdims=True)
    reached = np.where(short > 0, even + short, -inf).max()
    return float(0.8 * largest // reached) if reached > 0 else inf


def united(found: Sequence[Ranges]) -> Ranges:
    """What looks at several calls tell about all of them."""
    bound, lowest_mean, entries, largest, sizes, highest = zip(*found, strict=True)
    # NaN stays NaN.
    top = np.max(largest, axis=0), np.max(sizes, axis=0)
    return Ranges(
        float(np.max(bound)), float(np.min(lowest_mean)), float(np.max(entries)), tuple(map(float, top[0])),
        tuple(map(float, top[1])), min(highest),
    )  # fmt: skip


def _product(logs: Iterable[np.ndarray]) -> np.ndarray:
    """The product of numbers whose logarithms these are: no factor on the way overflows or vanishes."""
    result: np.ndarray = np.exp(sum(logs))
    return result


def _log_norms(sums: np.ndarray, largest: np.ndarray, views: int) -> dict[float, np.ndarray]:
    """What `_largest_norms` found, (..., exponents, units) and (..., units, 1), as logarithms by exponent: (..., units)."""
    top = largest[..., 0]
    found = {p: np.log(sums[..., i, :]) / p + top for i, p in enumerate(_wanted(views))}
    return found | {inf: top}


def rounded_up(size: float) -> float:
    """To the next power of 2^(1/16), so that polynomials, and what is compiled with them, are found again."""
    if not isfinite(size) or size <= 0:
        return size
    return float(2.0 ** (ceil(16 * log2(size) + 1e-9) / 16))


def largest_entries(call: RangeCall, backend: Backend, arrays: Sequence[Array | None]) -> list[float]:
    """The largest |entry| of (query, *keys, *values)."""
    return [float(x) for x in backend.read(backend.run(_entries, call, arrays))]


def _entries(call: RangeCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """`largest_entries` as scalars."""
    xp = backend.xp
    operands, _ = Operands.of(backend, arrays, call.views, call.scale)
    rows = zip((*operands.keys, *operands.values), (*operands.masks, *operands.masks), strict=True)
    return tuple(xp.max(xp.abs(x)) for x in (operands.query, *(clean(x, mask, backend) for x, mask in rows)))


def exponents(views: int) -> list[tuple[float, ...]]:
    """Hölder exponents to try, one for the query and one for each view: reciprocals add up to one."""
    count = views + 1
    tried: list[tuple[float, ...]] = [(float(count),) * count]
    for one in range(count):
        tried.append(tuple(1.0 if i == one else inf for i in range(count)))
        if count == 3:
            tried.append(tuple(2.0 if i == one else 4.0 for i in range(count)))
        for other in range(one + 1, count):
            if count > 2:
                tried.append(tuple(2.0 if i in (one, other) else inf for i in range(count)))
    return tried


def _wanted(views: int) -> list[int]:
    """Every finite p that some Hölder bound asks of any view."""
    return sorted({int(p) for ps in exponents(views) for p in ps if p < inf})


def _survey(call: RangeCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """The lowest mean score over scale; largest entries (..., 1, d) of all rows; `_largest_norms` of query and keys, sums first."""
    operands, _ = Operands.of(backend, arrays, call.views, call.scale)
    q, dtype, paired = operands.query, operands.dtype, call.channels == COMPLEX
    views = [(q, None), *((k, mask) for k, _, mask in operands.views)]
    found = [_channel_sums(x, mask, dtype, paired, backend) for x, mask in views]
    of_values = [channel_tops(v, mask, backend) for _, v, mask in operands.views if v is not None]
    tops = call.together("max", [*(s[0] for s in found), *of_values])
    sums = call.together("sum", [a for s in found for a in s[1:]])
    stats = [_channel_stats((tops[i], *sums[3 * i : 3 * i + 3]), backend) for i in range(len(views))]
    # The mean over pairs of a trilinear score is the score of the means.
    means = [mean for _, mean in stats[1:]]
    of_keys = prod_of(means)
    if paired:
        of_keys = conjugate(reduce(lambda x, y: multiply(x, y, backend), means), backend)
    mean = _lowest_product(q, of_keys, dtype, backend)
    units = _log_units([sizes for sizes, _ in stats], backend)
    norms = [
        _largest_norms((x, mask, paired), top, unit, call.views, backend)
        for (x, mask), top, unit in zip(views, tops, units, strict=False)
    ]
    lowered, *sums = call.together("max", [-mean, *(s for s, _ in norms)])
    return -lowered, *tops, *sums, *(largest for _, largest in norms)


def _channel_sums(
    x: Array, mask: Array | None, dtype: Any, paired: bool, backend: Backend
) -> tuple[Array, Array, Array, Array]:
    """Largest |entry|, sum of squares and sum of every channel (..., 1, d), and number of rows (..., 1, 1), all by weight.

    Of `paired` channels moduli take the place of entries, (..., 1, d / 2).
    """
    xp = backend.xp
    device = backend.device(x)

    def body(carry: Any, rows: Array, mask: Array | None) -> tuple[Any, tuple[()]]:
        top, squares, total, count = carry
        rows = backend.cast(clean(rows, mask, backend), dtype)
        if mask is not None:
            count = count + xp.sum(backend.cast(mask, dtype), axis=-2, keepdims=True)
        sizes = sizes_of(rows, paired, backend)
        return (
            xp.maximum(top, over_rows(xp.max, sizes, backend)),
            squares + over_rows(xp.sum, weighed(sizes * sizes, mask, backend), backend),
            total + over_rows(xp.sum, weighed(rows, mask, backend), backend),
            count,
        ), ()

    zero = xp.zeros((*broadcast_leading(x, mask), 1, x.shape[-1]), dtype=dtype, device=device)
    empty = zero[..., : x.shape[-1] // 2] if paired else zero
    outer, start = (x.shape[:-2], float(x.shape[-2])) if mask is None else (mask.shape[:-2], 0.0)
    count = xp.full((*outer, 1, 1), start, dtype=dtype, device=device)
    return over_blocks(body, (empty, empty, zero, count), (x, mask), backend)  # type: ignore[no-any-return]


def _channel_stats(found: Sequence[Array], backend: Backend) -> tuple[Array, Array]:
    """Largest |entry| and root mean square of every channel, (..., 2, d), and its mean (..., 1, d), from `_channel_sums`."""
    xp = backend.xp
    top, squares, total, count = found
    some = xp.where(count > 0, count, 1.0)
    # Squares leave the dtype's range before the entries do; the largest entry then stands in.
    spread = xp.sqrt(squares / some)
    spread = xp.where((spread > 0) & xp.isfinite(spread), spread, top)
    return xp.concat([top, spread], axis=-2), total / some


def _lowest_product(q: Array, means: Array, dtype: Any, backend: Backend) -> Array:
    """Σ_c q_ic · means_c, (..., n, d) and (..., 1, d): the smallest of all rows."""
    xp = backend.xp

    def body(carry: Array, rows: Array) -> tuple[Array, tuple[()]]:
        return xp.minimum(carry, xp.min(means @ xp.matrix_transpose(backend.cast(rows, dtype)))), ()

    start = xp.min(means) * 0.0 + xp.inf
    start = xp.where(xp.isnan(start), xp.inf, start)
    return over_blocks(body, start, (q,), backend)


def balancing_units(sizes: Sequence[Array], backend: Backend) -> list[Array]:
    """Factors for the channels of every view (..., 1, d) that give the views the same sizes.

    Their product over the views is one; a channel that is 0 in some view adds nothing to any score, and its factors are 0.
    """
    return [backend.xp.exp(log) for log in _log_units(sizes, backend)]


def _log_units(sizes: Sequence[Array], backend: Backend) -> list[Array]:
    """Logarithms of `balancing_units`."""
    xp = backend.xp
    # Factors must not depend on an axis that some view lacks.
    sizes = shared_leading(sizes, backend)
    logs = [xp.log(xp.where(s > 0, s, 1.0)) for s in sizes]
    empty = prod_of([backend.cast(s > 0, s.dtype) for s in sizes]) == 0
    target = sum_of(logs) * (1 / len(logs))
    powers = [target - x for x in logs]
    # The last factor makes the product one to rounding; the product itself could overflow.
    powers[-1] = -sum_of(powers[:-1])
    return [xp.where(empty, -xp.inf, p) for p in powers]


def _largest_norms(
    rows: tuple[Array, Array | None, bool], top: Array, units: Array, views: int, backend: Backend
) -> tuple[Array, Array]:
    """The largest ℓ_p norm of a row, for each of `_wanted`, in each of some units whose logarithms are (..., units, d).

    `rows`: a view, its mask, and whether channels are complex; `top`: the largest |entry| of every channel (..., 1, d).

    The largest sums of p-th powers (..., exponents, units), in parts of
    the largest entry, whose logarithm is (..., units, 1): so no power overflows, and what vanishes adds nothing to a sum that
    is at least 1. Sums are products with powers of the units.
    """
    xp, dtype, (x, mask, paired) = backend.xp, units.dtype, rows
    whole = xp.where(top > 0, top, 1.0)
    # The reciprocal of a large number, and the unit of one, may vanish: some libraries take the smallest numbers for 0.
    near = xp.where(whole > 1, xp.full_like(whole, 2.0**-64), 2.0**64)
    factor = 1 / (whole * near)
    logs = xp.where(top > 0, units + xp.log(whole), -xp.inf)
    largest = xp.max(logs, axis=-1, keepdims=True)
    weights = xp.exp(logs - xp.where(largest > -xp.inf, largest, 0.0))
    wanted = _wanted(views)
    powers = [weights**p for p in wanted]

    def body(carry: Any, rows: Array, mask: Array | None) -> tuple[Any, tuple[()]]:
        part = sizes_of(backend.cast(clean(rows, mask, backend), dtype), paired, backend) * near * factor
        power = part = xp.matrix_transpose(part)
        at, new = 1, []
        for p, of_units, old in zip(wanted, powers, carry, strict=True):
            while at < p:
                power, at = (power * power, 2 * at) if 2 * at <= p else (power * part, at + 1)
            new.append(xp.maximum(old, xp.max(of_units @ power, axis=-1)))
        return tuple(new), ()

    zero = xp.zeros((*broadcast_leading(x, mask, weights), units.shape[-2]), dtype=dtype, device=backend.device(x))
    return xp.stack(list(over_blocks(body, (zero,) * len(wanted), (x, mask), backend)), axis=-2), largest
