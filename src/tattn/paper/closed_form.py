"""The gradient of the training loss by its closed form (Theorem 3.3, E.7), streamed: n³ time, no n² pair keys.

With o and lse of the attention of q to all pairs of rows of a and b, c = o − E, r = Σ c ∘ o and, for every triple of
rows, f = exp(x − lse), w = Σ_e c u v and p = f (w − r),

    dLoss/dX = scale · A1ᵀ p (A2 ⊗ A3),

where row i of p (A2 ⊗ A3) is Σ_j A2_j ⊗ (Σ_k p_ijk A3_k). Scores exist for one block of rows of each view at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import NamedTuple

from ..arrays import broadcast_leading, in_parts, row_pairs
from ..backends import Array, Backend
from ..engines import tuples
from ..features.scaling import channel_units
from ..operands import Operands, View


class ClosedFormCall(NamedTuple):
    """What the computation depends on besides arrays; hashable. With `upstream`, the target is c itself and not E."""

    scale: float
    upstream: bool


def gradient(call: ClosedFormCall, backend: Backend, arrays: Sequence[Array]) -> tuple[Array]:
    """dLoss/dX, (..., d1, d2 d3), from (q, a, b, u, v, A1, A2, A3, target), a few problems at a time."""
    limit = tuples.at_a_time(_operands(call, backend, arrays))
    return in_parts(partial(_gradient, call, backend), limit, (None,), backend, arrays)


def _operands(call: ClosedFormCall, backend: Backend, arrays: Sequence[Array]) -> Operands:
    q, a, b, u, v, *_ = arrays
    return Operands(backend, q, (View(a, u), View(b, v)), call.scale)


def _gradient(call: ClosedFormCall, backend: Backend, arrays: Sequence[Array]) -> tuple[Array]:
    q, a, b, u, v, a1, a2, a3, target = arrays
    xp = backend.xp
    leading = broadcast_leading(*arrays)
    o, lse = tuples.forward(_operands(call, backend, arrays))
    c = target if call.upstream else o - target
    r = xp.sum(c * o, axis=-1, keepdims=True)
    units = channel_units(q, [a, b], [None, None], call.scale, backend)
    a, b = a * units[1], b * units[2]
    (d1, d2, d3), device = (x.shape[-1] for x in (a1, a2, a3)), backend.device(q)
    blocks = _blocks(leading, d2 * d3, d3 + q.shape[-1] + u.shape[-1], q.dtype, backend)

    def of_queries(total: Array, q: Array, c: Array, lse: Array, r: Array, a1: Array) -> tuple[Array, tuple[()]]:
        rows = q.shape[-2]
        s = q * units[0]

        def of_keys(total: Array, a: Array, u: Array, a2: Array) -> tuple[Array, tuple[()]]:
            # One row for every pair (i, j).
            s_pair, c_pair = row_pairs(s, a, backend), row_pairs(c, u, backend)
            lse_pair, r_pair = (xp.repeat(x, a.shape[-2], axis=-2) for x in (lse, r))

            def of_other_keys(total: Array, b: Array, v: Array, a3: Array) -> tuple[Array, tuple[()]]:
                f = xp.exp(s_pair @ xp.matrix_transpose(b) - lse_pair)
                p = f * (c_pair @ xp.matrix_transpose(v) - r_pair)
                return total + p @ a3, ()

            start = xp.zeros((*leading, rows * a.shape[-2], d3), dtype=q.dtype, device=device)
            inner, _ = backend.scan_rows(of_other_keys, start, (b, v, a3), blocks[2])
            inner = xp.reshape(inner, (*leading, rows, a.shape[-2], d3))
            return total + xp.matrix_transpose(a2)[..., None, :, :] @ inner, ()

        start = xp.zeros((*leading, rows, d2, d3), dtype=q.dtype, device=device)
        p_rows, _ = backend.scan_rows(of_keys, start, (a, u, a2), blocks[1])
        return total + xp.matrix_transpose(a1) @ xp.reshape(p_rows, (*leading, rows, d2 * d3)), ()

    start = xp.zeros((*leading, d1, d2 * d3), dtype=q.dtype, device=device)
    total, _ = backend.scan_rows(of_queries, start, (q, c, lse, r, a1), blocks[0])
    return (total * call.scale,)


def _blocks(leading: tuple[int, ...], wide: int, narrow: int, dtype: object, backend: Backend) -> tuple[int, int, int]:
    """Rows of q, a and b in a block: `wide` numbers for a row of q, `narrow` and a block of scores for a pair, fit."""
    itemsize = backend.itemsize(dtype)
    numbers = max(1, int(backend.workspace // (2 * itemsize * prod(leading))))
    queries = max(1, min(32, numbers // wide))
    others = max(16, min(512, numbers // (4 * queries)))
    return queries, max(1, numbers // (queries * (others + narrow))), others
