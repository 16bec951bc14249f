"""Summaries as plain sums that add up in any order: of rows, of each other, their read-out and its adjoint.

The polynomial method (`features`) knows of a view nothing but its summary A = Φ(a)ᵀ [u, 1], a sum over rows:

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
`causal_features` with these units.

Arrays only; symbols as in `engines.features`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import log, log2, prod
from typing import Any, NamedTuple

import numpy as np

from ..arrays import are_weights, in_parts, sum_of, sum_to_leading
from ..backends import Array, Backend
from ..backends.operations import CHAIN, HOSTED, Hosted, Token
from ..backends.tables import memoized
from ..engines import causal_features
from ..engines.features import (
    key_adjoint,
    log_normaliser,
    problems,
    query_adjoint,
    read_out,
    summed_rows,
    sums_compiled,
    weight_table,
    weights,
)
from ..engines.spoiled import sees_some
from ..features.balance import least_sum
from ..features.basis import Basis
from ..features.complex_channels import Turn, as_factors, product
from ..features.monomials import Expansion, rank, run_table
from ..features.pairs import Pairs, pair_weights
from ..operands import COMPLEX, EVERY_ROW, REAL, Attended, Operands, Upstream, View


class SumCall(NamedTuple):
    """What sums depend on besides arrays: the polynomial and its monomials, the factor of the scores, and views; hashable.

    Of rows that follow: whether keys decay, and chunks that are summed up without compensation, at most.
    """

    expansion: Expansion
    scale: float
    views: int
    chain: int = CHAIN
    channels: str = REAL
    decays: bool = False
    chunks: int = CHAIN

    def turn(self, dim: int) -> Turn | None:
        """What turns the monomials of complex channels; None for real ones."""
        return Turn(dim, self.expansion.degree, self.expansion.grading) if self.channels == COMPLEX else None


# Multiplications of further rows with their sums that take longer than a call of the loops.
_HOSTED = 1 << 18
# log2 of eps over the smallest normal number.
_RANGE = {"float32": 103, "float64": 970}


def units(call: SumCall) -> tuple[float, float]:
    """The factors of a query's channels and of those of keys; over all views their product is the scale."""
    of_keys = 2.0 ** round(log2(call.scale) / (call.views + 1))
    return call.scale / of_keys**call.views, of_keys


def largest(call: SumCall, dtype: str) -> float:
    """The largest |entry|, times its unit, that is computed with: m of them to the power g times what underflows is below eps."""
    return float(2.0 ** (_RANGE[dtype] / (call.views * call.expansion.degree)))


@memoized
def token_of(call: SumCall, dim: int, columns: int, dtype: str) -> Token:
    """What kernels compute a token with."""
    expansion = call.expansion
    runs = run_table(dim, expansion.degree, expansion.grading)
    facts = runs, *units(call), largest(call, dtype)
    turn = call.turn(dim)
    if turn is not None:
        w = pair_weights(expansion.coefficients, dim, expansion.grading)[:, 0].astype(dtype)
        return Token(w, *facts, Pairs(turn).runs)
    return Token(np.repeat(weight_table(expansion.coefficients, dim, expansion.grading), columns).astype(dtype), *facts)


def sum_rows(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    """Φ(k)ᵀ [v, 1] (..., r, dv + 1) of one view, nothing (..., 1, 1), and the rest of the sums (..., r, dv + 1)."""
    return in_parts(partial(_sum_rows, call, backend), _limit(call, backend, arrays), (None,) * 3, backend, arrays)


def sum_rows_backward(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Gradients of keys, values and weights, if any, of one view for one of its sums: linear in these, hence no rounding's rest."""
    k, v, mask, *_ = arrays
    targets = (k, v, mask) if are_weights(mask, backend) else (k, v)
    limit = _limit(call, backend, arrays)
    grads = in_parts(partial(_sum_rows_backward, call, backend), limit, targets, backend, arrays)
    return tuple(backend.cast(g, x.dtype) for g, x in zip(grads, targets, strict=True))  # type: ignore[union-attr]


def read(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    """Output (..., n, dv), lse (..., n, 1) and the normaliser over a power of two (..., n, 1), from query and sums."""
    return in_parts(partial(_read, call, backend), _limit(call, backend, arrays), (None,) * 3, backend, arrays)


def read_backward(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Gradients of query and of every view's sums, each in its own shape: the exact derivative of `read`."""
    inputs = arrays[: 1 + call.views]
    grads = in_parts(partial(_read_backward, call, backend), _limit(call, backend, arrays), inputs, backend, arrays)
    return tuple(backend.cast(g, x.dtype) for g, x in zip(grads, inputs, strict=True))  # type: ignore[union-attr]


def read_causal(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    """`read` of rows that come after those of the sums, aligned at the end: each sees these, and keys up to its own row.

    From query, keys, values, sums, masks or weights (..., n_μ, 1) and, if keys decay, factors (..., 1, 1); no fewer keys than
    queries.
    """
    operands, _ = _continued(call, backend, arrays)
    if not operands.query.shape[-2]:
        return read(call, backend, (operands.query, *operands.extra))
    limit = causal_features.at_a_time(operands, call.expansion)
    return in_parts(partial(_read_causal, call, backend), limit, (None,) * 3, backend, arrays)


def read_next(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    """`read_causal`, NaN where a row sees too little of what the call has for arithmetic.

    Sums may say by a weight below 0 that they are of rows that have come to weigh nothing, which are no masked ones.
    """
    found = read_causal(call, backend, arrays)
    operands, _ = _continued(call, backend, arrays)
    xp = backend.xp
    # As in calls with weights: what underflows would be taken for rows that are masked.
    seen = sees_some(operands, [s[..., :1, -1:] != 0 for s in operands.extra])
    vanishing = (found[2] < least_sum(found[2].dtype, backend)) & seen
    out, lse, normaliser = (xp.where(vanishing, xp.nan, x) for x in found)
    return out, lse, normaliser


def read_causal_backward(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Gradients of query, keys, values, sums and, if there are, weights and factors, each in its own shape.

    The exact derivative of `read_causal`.
    """
    operands, columns = _continued(call, backend, arrays)
    query, sums, others = operands.query, operands.extra, (*operands.keys, *operands.values)
    weights = (*operands.weights, *operands.decays)
    if not query.shape[-2]:
        dq, *d_sums = read_backward(call, backend, (query, *sums, *columns))
        return dq, *map(backend.xp.zeros_like, others), *d_sums, *map(backend.xp.zeros_like, weights)
    inputs = (query, *others, *sums, *weights)
    limit = causal_features.at_a_time(operands, call.expansion)
    found = in_parts(partial(_read_causal_backward, call, backend), limit, inputs, backend, arrays)
    grads = [
        backend.cast(sum_to_leading(g, x.shape[:-2], backend), x.dtype) for g, x in zip(found, inputs, strict=True)
    ]
    return tuple(grads)


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


def _sum_rows(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    k, v, mask = arrays
    basis = Basis.of(k.shape[-1], call.expansion.degree, v.shape[-1] + 1, call.expansion.grading)  # type: ignore[union-attr]
    _, unit = units(call)
    total, lost = summed_rows(lambda rows: _in_range(call, rows * unit, backend), View(k, v, mask), basis, backend)
    return total, backend.xp.zeros((*total.shape[:-2], 1, 1), dtype=total.dtype, device=backend.device(k)), -lost


def _sum_rows_backward(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    k, v, mask, _, _, g, _ = arrays
    return key_adjoint(View(k, v, mask), units(call)[1], g, call.expansion.monomials, backend)


def _read(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    q, *sums = arrays
    unit, _ = units(call)
    powers = _powers(sums, backend)
    turn = call.turn(q.shape[-1])  # type: ignore[union-attr]
    factors = as_factors(_scaled(sums, powers, backend), turn, backend)
    combined = product(weights(call.expansion, q, backend, turn), factors, turn, backend)
    wide = backend.cast(q, backend.compute_dtype(q.dtype))  # type: ignore[union-attr]
    wide = _in_range(call, wide * unit, backend)
    out, normaliser = read_out(wide, 1.0, combined, call.expansion.monomials, backend)
    return out, log_normaliser(normaliser, (), backend) + sum_of(powers) * log(2.0), normaliser


def _read_backward(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    q, *sums = arrays[: 1 + call.views]
    columns = arrays[1 + call.views :]
    powers = _powers(sums, backend)
    turn = call.turn(q.shape[-1])  # type: ignore[union-attr]
    scaled = as_factors(_scaled(sums, powers, backend), turn, backend)
    w = weights(call.expansion, q, backend, turn)
    unit, combined = units(call)[0], product(w, scaled, turn, backend)
    upstream, dq = query_adjoint(q, unit, combined, columns, call.expansion.monomials, backend)
    (upstream,) = as_factors([upstream], turn, backend)
    d_sums = []
    for view, (own, power) in enumerate(zip(sums, powers, strict=True)):
        others = [s for other, s in enumerate(scaled) if other != view]
        d_own = _times_power(product(w, [upstream, *others], turn, backend), -power, backend)
        d_sums.append(sum_to_leading(d_own, own.shape[:-2], backend))  # type: ignore[union-attr]
    return dq, *d_sums


def _read_causal(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    operands, _ = _continued(call, backend, arrays)
    start, powers = _start(call, operands)
    dtype = operands.dtype
    q, *keys = (
        _in_range(call, backend.cast(x, dtype) * unit, backend)
        for x, unit in zip((operands.query, *operands.keys), start.units, strict=True)
    )
    start = start._replace(units=(1.0,) * (1 + call.views))
    views = tuple(view._replace(keys=k) for view, k in zip(operands.views, keys, strict=True))
    out, normaliser = causal_features.read_rows(operands._replace(query=q, views=views), call.expansion, start)
    return out, log_normaliser(normaliser, (), backend) + sum_of(powers) * log(2.0), normaliser


def _read_causal_backward(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    operands, (out, normaliser, *upstream) = _continued(call, backend, arrays)
    start, _ = _start(call, operands)
    attended = Attended(out, None, (normaliser,))
    grads, d_sums = causal_features.backward(operands, call.expansion, attended, Upstream(*upstream), start)
    return grads.query, *grads.keys, *grads.values, *d_sums, *grads.weights, *grads.decays


def _continued(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Operands, tuple[Array, ...]]:
    """Operands with the sums besides, which come before the masks as all that has gradients does; and what follows."""
    m = call.views
    rows, sums, behind = arrays[: 1 + 2 * m], arrays[1 + 2 * m : 1 + 3 * m], arrays[1 + 3 * m :]
    of_rows = m * (1 + call.decays)
    flat = (*rows, *behind[:of_rows], *sums, *behind[of_rows:])
    order = EVERY_ROW._replace(decays=call.decays)
    found, columns = Operands.of(backend.within(call.chain), flat, m, call.scale, order, extra=m)
    return found._replace(channels=call.channels), columns


def _start(call: SumCall, operands: Operands) -> tuple[causal_features.Start, list[Array]]:
    """The sums as what further rows start from, and log2 of what sums of every view are divided by, (..., 1, 1)."""
    backend, sums = operands.backend, operands.extra
    of_query, of_keys = units(call)
    more: Sequence[Any] = [k.shape[-2] for k in operands.keys]
    if operands.weights:
        more = [backend.xp.sum(w, axis=-2, keepdims=True) for w in backend.values_of(operands.weights)]
    powers = _powers(backend.values_of(sums), backend, more)
    shares = [_times_power(backend.xp.ones_like(p), -p, backend) for p in powers]
    return causal_features.Start((of_query, *[of_keys] * call.views), shares, sums, call.chunks), powers


def _powers(sums: Sequence[Array], backend: Backend, more: Sequence[Any] | None = None) -> list[Array]:
    """log2 of the number of rows of every view, `more` to come, to the nearest whole number, (..., 1, 1); 0 for none."""
    xp = backend.xp
    counts = [s[..., :1, -1:] + n for s, n in zip(sums, more or [0] * len(sums), strict=True)]
    return [xp.round(xp.log2(xp.where(n > 0, n, 1.0))) for n in counts]


def _scaled(sums: Sequence[Array], powers: Sequence[Array], backend: Backend) -> list[Array]:
    """Sums divided by powers of two. This is exact, and no result depends on the powers."""
    return [_times_power(s, -p, backend) for s, p in zip(sums, powers, strict=True)]


def _times_power(x: Array, power: Array, backend: Backend) -> Array:
    return x * backend.power_of_two(power)


def _in_range(call: SumCall, x: Array, backend: Backend) -> Array:
    """The entries in their units, NaN for those that arithmetic would not hold the powers of."""
    xp = backend.xp
    return xp.where(xp.abs(x) <= largest(call, backend.dtype_name(x.dtype)), x, xp.nan)


def _limit(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> int:
    """How many problems to take side by side; `arrays` begin with rows (..., n, d) and what has dv or dv + 1 columns."""
    return problems(call.expansion, call.views, arrays[0].shape[-1], arrays[1].shape[-1] + 1, backend)  # type: ignore[union-attr]


def _sums_hosted(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> bool:
    k, v, mask = arrays
    return 0 not in k.shape and sums_compiled(View(k, v, mask), call.expansion.monomials, backend)  # type: ignore[union-attr]


def _shapes_of_sums(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> list[tuple[Any, None]]:
    k, v, mask = arrays
    leading = View(k, v, mask).leading
    of_sums = *leading, rank(k.shape[-1], *call.expansion.monomials), v.shape[-1] + 1  # type: ignore[union-attr]
    return [(of_sums, None), ((*leading, 1, 1), None), (of_sums, None)]


def _next_hosted(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> bool:
    operands, _ = _continued(call, backend, arrays)
    if 0 in operands.query.shape or not causal_features.compiled(operands):
        return False
    return bool(prod(operands.leading) * operands.query.shape[-2] * prod(operands.extra[0].shape[-2:]) >= _HOSTED)


def _shapes_of_next(call: SumCall, backend: Backend, arrays: Sequence[Array | None]) -> list[tuple[Any, None]]:
    operands, _ = _continued(call, backend, arrays)
    rows = *operands.leading, operands.query.shape[-2]
    return [((*rows, columns), None) for columns in (operands.values[0].shape[-1], 1, 1)]


HOSTED[sum_rows], HOSTED[read_next] = Hosted(_sums_hosted, _shapes_of_sums), Hosted(_next_hosted, _shapes_of_next)
