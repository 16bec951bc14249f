"""Summaries as plain sums that add up in any order: of rows, of each other, their read-out and its adjoint.

The polynomial method (`lowrank`) knows of a view nothing but its summary A = Φ(a)ᵀ [u, 1], a sum over rows:

    N = Φ(q) (w · A ∘ B),   o = N[:, :-1] / N[:, -1],   lse = log N[:, -1].

For sums of different rows to add up, three things differ from a call that sees all of them:

* Units. Channels are multiplied by factors that no data decide: a power of two near scale^(1/(m + 1)) for keys, and for
  the query what is left of the scale. They suit rows of like size in all views. An entry beyond `largest` becomes NaN: up to
  there nothing overflows that a normaliser is made of, and what underflows is below half a unit in its last place.
* Sums are plain, not means. The monomial of degree 0 sums the ones: A[0, -1] is the number of rows, which is where lse
  and the powers of two that keep products of summaries in range come from.
* Each number is kept as a sum and the rest that rounding took from it, twice the digits in all. Only sums are read out;
  the rests keep long streams from drifting.

Query rows that come after the rows of some sums, and see of the views' further rows those up to their own, start from the sums:
`lowrank_causal` with these units.

Arrays only; symbols as in `lowrank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, log2
from typing import Any

from ..arrays import broadcast_leading, in_parts, sum_of, sum_to_leading
from ..backends import Array, Backend
from ..engines import causal_features as lowrank_causal
from ..engines.features import (
    LowRankCall,
    key_adjoint,
    log_normaliser,
    problems,
    query_adjoint,
    read_out,
    summed_rows,
    weights,
)
from ..features.balance import prod_in_range
from ..features.basis import Basis

# log2 of eps over the smallest normal number.
_RANGE = {"float32": 103, "float64": 970}


def units(call: LowRankCall) -> tuple[float, float]:
    """The factors of a query's channels and of those of keys; over all views their product is the scale."""
    of_keys = 2.0 ** round(log2(call.scale) / (call.views + 1))
    return call.scale / of_keys**call.views, of_keys


def largest(call: LowRankCall, dtype: str) -> float:
    """The largest |entry|, times its unit, that is computed with: m of them to the power g times what underflows is below eps."""
    return float(2.0 ** (_RANGE[dtype] / (call.views * call.degree)))


def sum_rows(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    """Φ(k)ᵀ [v, 1] (..., r, dv + 1) of one view, nothing (..., 1, 1), and the rest of the sums (..., r, dv + 1)."""
    return in_parts(_sum_rows, _limit(call, backend, arrays), (None, None, None), call, backend, arrays)


def sum_rows_backward(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Gradients of keys and values of one view, for one of its sums: linear in the sums, hence no rounding's rest in it."""
    k, v, *_ = arrays
    grads = in_parts(_sum_rows_backward, _limit(call, backend, arrays), (k, v), call, backend, arrays)
    return tuple(backend.cast(g, k.dtype) for g in grads)  # type: ignore[union-attr]


def read(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    """Output (..., n, dv), lse (..., n, 1) and the normaliser over a power of two (..., n, 1), from query and sums."""
    return in_parts(_read, _limit(call, backend, arrays), (None, None, None), call, backend, arrays)


def read_backward(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Gradients of query and of every view's sums, each in its own shape: the exact derivative of `read`."""
    inputs = arrays[: 1 + call.views]
    grads = in_parts(_read_backward, _limit(call, backend, arrays), inputs, call, backend, arrays)
    return tuple(backend.cast(g, x.dtype) for g, x in zip(grads, inputs, strict=True))  # type: ignore[union-attr]


def read_causal(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    """`read` of rows that come after those of the sums, aligned at the end: each sees these, and keys up to its own row.

    From query, keys, values, sums and masks (..., n_μ, 1); no fewer keys than queries.
    """
    query, _, _, sums, _, _ = _continued(call, arrays)
    if not query.shape[-2]:
        return read(call, backend, (query, *sums))
    limit = lowrank_causal.leading_limit(call, backend, arrays)
    return in_parts(_read_causal, limit, (None, None, None), call, backend, arrays)


def read_causal_backward(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Gradients of query, keys, values and sums, each in its own shape: the exact derivative of `read_causal`."""
    query, keys, values, sums, _, columns = _continued(call, arrays)
    if not query.shape[-2]:
        dq, *d_sums = read_backward(call, backend, (query, *sums, *columns))
        return dq, *(backend.xp.zeros_like(x) for x in (*keys, *values)), *d_sums
    inputs = (query, *keys, *values, *sums)
    limit = lowrank_causal.leading_limit(call, backend, arrays)
    grads = in_parts(_read_causal_backward, limit, inputs, call, backend, arrays)
    return tuple(
        backend.cast(sum_to_leading(g, x.shape[:-2], backend), x.dtype) for g, x in zip(grads, inputs, strict=True)
    )


def add_up(_: None, backend: Backend, arrays: Sequence[Array]) -> tuple[Array, Array]:
    """Sum and rest of a + rest_a + b + rest_b, the same for either order (Knuth's exact sum); the rest is a constant."""
    a, rest_a, b, rest_b = arrays
    plain = a + b
    values: Sequence[Array] = backend.values_of((a, b, rest_a, rest_b, plain))
    a, b, rest_a, rest_b, before = values
    part = before - a
    rest = ((a - (before - part)) + (b - part)) + (rest_a + rest_b)
    total = plain + rest
    after: Array = backend.values_of((total,))[0]
    return total, rest - (after - before)


def _sum_rows(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    k, v, mask = arrays
    basis = Basis.of(k.shape[-1], call.degree, v.shape[-1] + 1, call.grading)  # type: ignore[union-attr]
    _, unit = units(call)
    total, lost = summed_rows(lambda rows: _in_range(call, rows * unit, backend), k, v, mask, basis, backend)
    return total, backend.xp.zeros((*total.shape[:-2], 1, 1), dtype=total.dtype, device=backend.device(k)), -lost


def _sum_rows_backward(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    k, v, mask, _, _, g, _ = arrays
    return key_adjoint(k, v, mask, units(call)[1], g, call.degree, backend, call.grading)


def _read(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    q, *sums = arrays
    unit, _ = units(call)
    powers = _powers(sums, backend)
    combined = weights(call, q, backend) * prod_in_range(_scaled(sums, powers, backend), backend)
    wide = backend.cast(q, backend.compute_dtype(q.dtype))  # type: ignore[union-attr]
    wide = _in_range(call, wide * unit, backend)
    leading = broadcast_leading(*arrays)
    out, normaliser = read_out(wide, 1.0, combined, leading, call.degree, backend, call.grading)
    return out, log_normaliser(normaliser, (), backend) + sum_of(powers) * log(2.0), normaliser


def _read_backward(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    q, *sums = arrays[: 1 + call.views]
    columns = arrays[1 + call.views :]
    powers = _powers(sums, backend)
    scaled = _scaled(sums, powers, backend)
    w = weights(call, q, backend)
    leading = broadcast_leading(q, *sums)
    unit, combined = units(call)[0], w * prod_in_range(scaled, backend)
    upstream, dq = query_adjoint(q, unit, combined, columns, leading, call.degree, backend, call.grading)
    d_sums = []
    for view, (own, power) in enumerate(zip(sums, powers, strict=True)):
        others = [s for other, s in enumerate(scaled) if other != view]
        d_own = _times_power(w * prod_in_range([upstream, *others], backend), -power, backend)
        d_sums.append(sum_to_leading(d_own, own.shape[:-2], backend))  # type: ignore[union-attr]
    return dq, *d_sums


def _read_causal(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    q, keys, values, sums, masks, _ = _continued(call, arrays)
    start, powers = _start(call, keys, sums, backend)
    dtype = backend.compute_dtype(q.dtype)
    q, *keys = (
        _in_range(call, backend.cast(x, dtype) * unit, backend) for x, unit in zip((q, *keys), start.units, strict=True)
    )
    start = start._replace(units=(1.0,) * (1 + call.views))
    out, normaliser = lowrank_causal.read_rows(call, backend, (q, *keys, *values, *masks), start)
    return out, log_normaliser(normaliser, (), backend) + sum_of(powers) * log(2.0), normaliser


def _read_causal_backward(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    q, keys, values, sums, masks, columns = _continued(call, arrays)
    start, _ = _start(call, keys, sums, backend)
    return lowrank_causal.backward(call, backend, (q, *keys, *values, *masks, *columns), start)


def _continued(call: LowRankCall, arrays: Sequence[Array | None]) -> tuple[Any, Any, Any, Any, Any, Any]:
    """Query, keys, values, sums, masks, and what follows."""
    m, rest = call.views, arrays[1:]
    return arrays[0], rest[:m], rest[m : 2 * m], rest[2 * m : 3 * m], rest[3 * m : 4 * m], rest[4 * m :]


def _start(
    call: LowRankCall, keys: Sequence[Array], sums: Sequence[Array], backend: Backend
) -> tuple[lowrank_causal.Start, list[Array]]:
    """The sums as what further rows start from, and log2 of what sums of every view are divided by, (..., 1, 1)."""
    of_query, of_keys = units(call)
    powers = _powers(sums, backend, [k.shape[-2] for k in keys])
    shares = [_times_power(backend.xp.ones_like(p), -p, backend) for p in powers]
    return lowrank_causal.Start((of_query, *[of_keys] * call.views), shares, sums), powers


def _powers(sums: Sequence[Array], backend: Backend, more: Sequence[int] | None = None) -> list[Array]:
    """log2 of the number of rows of every view, `more` to come, to the nearest whole number, (..., 1, 1); 0 for none."""
    xp = backend.xp
    counts = [s[..., :1, -1:] + n for s, n in zip(sums, more or [0] * len(sums), strict=True)]
    return [xp.round(xp.log2(xp.where(n > 0, n, 1.0))) for n in counts]


def _scaled(sums: Sequence[Array], powers: Sequence[Array], backend: Backend) -> list[Array]:
    """Sums over powers of two, which round nothing and of which no result depends."""
    return [_times_power(s, -p, backend) for s, p in zip(sums, powers, strict=True)]


def _times_power(x: Array, power: Array, backend: Backend) -> Array:
    return x * backend.power_of_two(power)


def _in_range(call: LowRankCall, x: Array, backend: Backend) -> Array:
    """The entries in their units, NaN for those that arithmetic would not hold the powers of."""
    xp = backend.xp
    return xp.where(xp.abs(x) <= largest(call, backend.dtype_name(x.dtype)), x, xp.nan)


def _limit(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> int:
    """How many problems to take side by side; `arrays` begin with rows (..., n, d) and what has dv or dv + 1 columns."""
    return problems(call, arrays[0].shape[-1], arrays[1].shape[-1] + 1, backend)  # type: ignore[union-attr]
