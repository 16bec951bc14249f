"""How large the scores can be, from one linear look at the rows and without looking at a score.

Every bound holds for Σ_c |scale · q_ic a_jc b_kc| as well, which is what rounding is measured by:

* entries: scale · d · max|q| · max|a| · max|b|, the bound of the paper;
* channels: scale · Σ_c max|q_c| · max|a_c| · max|b_c|, never larger;
* Hölder: scale · max_i ‖q_i‖_p · max_j ‖a_j‖_p′ · max_k ‖b_k‖_p″ with 1/p + 1/p′ + 1/p″ = 1, after a rescaling of
  the channels that leaves the scores as they are.

The smallest is taken. The mean score of a query row is a product of means and costs as little; by Jensen's
inequality it bounds the row's normaliser from below, far better than −R does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, isfinite, isnan, log
from typing import Any, NamedTuple

from .arrays import clean, over_rows, prod_of, shared_leading, sum_of, unpack
from .backends import Array, Backend

BLOCK = 8192


class Ranges(NamedTuple):
    """What a look at the rows tells; floats only."""

    bound: float  # largest |score| possible
    lowest_mean: float  # smallest mean score of a query row
    entries: float  # the paper's bound, for comparison
    largest: tuple[float, ...]  # largest entry of query, keys and values, NaN or inf where one is not finite
    sizes: tuple[float, ...] = ()  # scale · max|q_c| · Π_μ max|keys_μ,c| of every channel


# ("sum" or "max", arrays) → their sums or largest values over all that hold rows of the same views.
Together = Callable[[str, Sequence[Array]], Sequence[Array]]


def _alone(_: str, arrays: Sequence[Array]) -> Sequence[Array]:
    return arrays


class RangeCall(NamedTuple):
    """What the look depends on besides arrays; hashable."""

    scale: float
    views: int
    together: Together = _alone


def ranges(call: RangeCall, backend: Backend, arrays: Sequence[Array | None]) -> Ranges:
    """Look at (query, *keys, *values, *masks); a value may be None."""
    of_channels, *scalars = backend.run(_survey, call, arrays)
    found = [float(x) for x in scalars]
    channel, mean, entries, *rest = found
    holder, largest = rest[: len(rest) - 2 * call.views - 1], rest[len(rest) - 2 * call.views - 1 :]
    bound = min((x for x in (channel, *holder, entries) if not isnan(x)), default=inf)
    bound = bound if all(map(isfinite, largest)) else inf
    # Sums over channels round; means over many rows round more, and are wanted to a percent only.
    slack = 1e-4 if backend.dtype_name(backend.compute_dtype(arrays[0].dtype)) != "float64" else 1e-11  # type: ignore[union-attr]
    bound *= 1 + slack
    lowest = max(-bound, min(mean, bound) - 0.01 * bound) if isfinite(bound) else -inf
    sizes = tuple(float(x) * (1 + slack) for x in backend.to_numpy(of_channels))
    return Ranges(bound, lowest, entries, tuple(largest), sizes)


def largest_entries(call: RangeCall, backend: Backend, arrays: Sequence[Array | None]) -> list[float]:
    """The largest |entry| of (query, *keys, *values)."""
    return [float(x) for x in backend.run(_entries, call, arrays)]


def _entries(call: RangeCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """`largest_entries` as scalars."""
    xp = backend.xp
    q, keys, values, masks, _ = unpack(call.views, arrays)
    rows = zip((*keys, *values), (*masks, *masks), strict=True)
    return tuple(xp.max(xp.abs(x)) for x in (q, *(clean(x, mask, backend) for x, mask in rows)))


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


def _wanted(views: int) -> list[float]:
    """Every p that some Hölder bound asks of any view."""
    return sorted({p for ps in exponents(views) for p in ps})


def _survey(call: RangeCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Sizes of the channels (d,), and scalars: channel bound, lowest mean score, entry bound, Hölder bounds, largest entries."""
    q, keys, values, masks, _ = unpack(call.views, arrays)
    xp = backend.xp
    dtype = backend.compute_dtype(q.dtype)
    views = [(q, None), *zip(keys, masks, strict=True)]
    found = [_channel_sums(x, mask, dtype, backend) for x, mask in views]
    of_values = [
        None if v is None else _channel_sums(v, m, dtype, backend)[0] for v, m in zip(values, masks, strict=True)
    ]
    tops = call.together("max", [s[0] for s in found] + [t for t in of_values if t is not None])
    sums = call.together("sum", [a for s in found for a in s[1:]])
    stats = [_channel_stats((tops[i], *sums[3 * i : 3 * i + 3]), backend) for i in range(len(views))]
    rest = iter(tops[len(views) :])
    largest = [xp.max(top) for top, _, _ in stats]
    largest += [largest[0] * 0.0 if t is None else xp.max(next(rest)) for t in of_values]
    dim = q.shape[-1]
    entries = _product(largest[: call.views + 1], call.scale * dim, backend)
    sizes = _product([top for top, _, _ in stats], call.scale, backend)
    channel = xp.max(xp.sum(sizes, axis=-1))
    # The mean over pairs of a trilinear score is the score of the means.
    means = prod_of([mean for _, _, mean in stats[1:]])
    mean = xp.min(_row_means(q, means, dtype, backend)) * call.scale
    norms: list[Array] = []
    for profile in (0, 1):
        units = balancing_units([s[profile] for s in stats], backend)
        for (x, mask), unit in zip(views, units, strict=True):
            norms += _largest_norms(x, mask, unit, call.views, dtype, backend)
    lowered, *norms = call.together("max", [-mean, *norms])
    # Two profiles, every view, every exponent.
    wanted, bounds = _wanted(call.views), []
    by_exponent = [
        dict(zip(wanted, norms[i : i + len(wanted)], strict=True)) for i in range(0, len(norms), len(wanted))
    ]
    for of_views in (by_exponent[: len(views)], by_exponent[len(views) :]):
        for ps in exponents(call.views):
            bounds.append(xp.max(_product([n[p] for n, p in zip(of_views, ps, strict=True)], call.scale, backend)))
    sizes = over_rows(xp.max, xp.reshape(sizes, (-1, dim)), backend)[0, :]
    return sizes, channel, -lowered, entries, *bounds, *largest


def _product(sizes: Sequence[Array], scale: float, backend: Backend) -> Array:
    """Scale · Π sizes, all at least 0, by logarithms: no factor on the way overflows or vanishes."""
    xp = backend.xp
    nothing = prod_of([backend.cast(s > 0, s.dtype) for s in sizes]) == 0
    total = sum_of([xp.log(xp.where(s > 0, s, 1.0)) for s in sizes]) + log(scale)
    return xp.where(nothing, 0.0, xp.exp(total))


def _channel_sums(x: Array, mask: Array | None, dtype: Any, backend: Backend) -> tuple[Array, Array, Array, Array]:
    """Largest |entry|, sum of squares and sum of every channel (..., 1, d), and number of rows (..., 1, 1)."""
    xp = backend.xp
    device = backend.device(x)

    def body(carry: Any, rows: Array, mask: Array | None) -> tuple[Any, tuple[()]]:
        top, squares, total, count = carry
        rows = backend.cast(clean(rows, mask, backend), dtype)
        top = xp.maximum(top, over_rows(xp.max, xp.abs(rows), backend))
        present = (
            xp.ones((*rows.shape[:-1], 1), dtype=dtype, device=device) if mask is None else backend.cast(mask, dtype)
        )
        return (
            top,
            squares + over_rows(xp.sum, rows * rows, backend),
            total + over_rows(xp.sum, rows, backend),
            count + xp.sum(present, axis=-2, keepdims=True),
        ), ()

    leading = clean(x[..., :1, :], None if mask is None else mask[..., :1, :], backend).shape[:-2]
    zero = xp.zeros((*leading, 1, x.shape[-1]), dtype=dtype, device=device)
    counts = xp.zeros((*(leading if mask is None else mask.shape[:-2]), 1, 1), dtype=dtype, device=device)
    return _over_blocks(body, (zero, zero, zero, counts), (x, mask), backend)  # type: ignore[no-any-return]


def _channel_stats(found: Sequence[Array], backend: Backend) -> tuple[Array, Array, Array]:
    """Largest |entry|, root mean square and mean of every channel, (..., 1, d), from `_channel_sums`."""
    xp = backend.xp
    top, squares, total, count = found
    some = xp.where(count > 0, count, 1.0)
    # Squares leave the dtype's range before the entries do; the largest entry then stands in.
    spread = xp.sqrt(squares / some)
    spread = xp.where((spread > 0) & xp.isfinite(spread), spread, top)
    return top, spread, total / some


def _over_blocks(body: Any, start: Any, rows: Sequence[Array | None], backend: Backend) -> Any:
    """The state after all blocks of rows; a shard may have none."""
    return start if rows[0].shape[-2] == 0 else backend.scan_rows(body, start, rows, BLOCK)[0]  # type: ignore[union-attr]


def _row_means(q: Array, means: Array, dtype: Any, backend: Backend) -> Array:
    """Σ_c q_ic · means_c, the smallest over blocks of rows."""
    xp = backend.xp

    def body(carry: Array, rows: Array) -> tuple[Array, tuple[()]]:
        return xp.minimum(carry, xp.min(xp.sum(backend.cast(rows, dtype) * means, axis=-1))), ()

    start = xp.min(means) * 0.0 + xp.inf
    start = xp.where(xp.isnan(start), xp.inf, start)
    return _over_blocks(body, start, (q,), backend)


def balancing_units(sizes: Sequence[Array], backend: Backend) -> list[Array]:
    """Factors (..., 1, d) for the channels of every view, of product one, that give the views the same sizes."""
    xp = backend.xp
    # Factors must not depend on an axis that some view lacks.
    sizes = shared_leading(sizes, backend)
    logs = [xp.log(xp.where(s > 0, s, 1.0)) for s in sizes]
    empty = prod_of([backend.cast(s > 0, s.dtype) for s in sizes]) == 0
    target = sum_of(logs) * (1 / len(logs))
    powers = [xp.where(empty, 0.0, target - x) for x in logs]
    # The last factor makes the product one to rounding; the product itself could overflow.
    powers[-1] = -sum_of(powers[:-1])
    return [xp.exp(p) for p in powers]


def _largest_norms(
    x: Array, mask: Array | None, unit: Array, views: int, dtype: Any, backend: Backend
) -> tuple[Array, ...]:
    """The largest ℓ_p norm of a row, for each of `_wanted`: (...)."""
    xp = backend.xp
    wanted = _wanted(views)

    def body(carry: Any, rows: Array, mask: Array | None) -> tuple[Any, tuple[()]]:
        size = xp.abs(backend.cast(clean(rows, mask, backend), dtype) * unit)
        # Powers of entries relative to the largest neither overflow nor vanish.
        top = xp.max(size, axis=-1, keepdims=True)
        relative = size / xp.where(top > 0, top, 1.0)
        powers = {1.0: relative, 2.0: relative * relative}
        new = []
        for p, old in zip(wanted, carry, strict=True):
            if p == inf:
                norm = top[..., 0]
            else:
                if p not in powers:
                    powers[p] = (
                        powers[2.0] * powers[2.0]
                        if p == 4.0
                        else powers[p - 1] * relative
                        if p - 1 in powers
                        else relative**p
                    )
                norm = top[..., 0] * xp.sum(powers[p], axis=-1) ** (1 / p)
            new.append(xp.maximum(old, xp.max(norm, axis=-1)))
        return tuple(new), ()

    leading = (clean(x[..., :1, :], None if mask is None else mask[..., :1, :], backend) * unit).shape[:-2]
    zero = xp.zeros(leading, dtype=dtype, device=backend.device(x))
    return _over_blocks(body, (zero,) * len(wanted), (x, mask), backend)  # type: ignore[no-any-return]
