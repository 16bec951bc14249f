"""The polynomial method score by score, for sequences so short that their scores are fewer than their features.

What `features` computes, the softmax with P in place of exp, up to rounding and in Π n_μ time: `tuples` with the weights P(x), and
P′(x) in the adjoint, divided and differentiated as `features` does.
"""

from __future__ import annotations

from typing import Any

from ..arrays import sum_to_leading
from ..backends import Array
from ..features.balance import balanced_values, with_powers
from ..operands import Attended, Gradients, Operands, Upstream
from . import tuples
from .features import divided, log_normaliser, scaled_gradient

# Blocks of the cache that a part of a batch may take: short calls lose more time by being many.
_BLOCKS = 4


def forward(operands: Operands, coefficients: tuple[float, ...]) -> Attended:
    """Output, lse, and the normaliser over the number of pairs (..., n, 1)."""
    operands, _, _ = balanced_values(operands)
    backend = operands.backend
    _, views, run = tuples.prepared(operands, tuples.ALL, coefficients)

    def body(_: None, rows: Array) -> tuple[None, tuple[Array, Array]]:
        s = backend.transposed(backend.cast(rows, operands.dtype) * run.units[0])
        numerator, _ = tuples.attend(run, s, None, None, views)
        return None, divided(backend.transposed(numerator), run.leading, backend)

    _, (out, normaliser) = backend.share_rows(body, None, (operands.query,), run.blocks[0], run.fewest)
    return Attended(out, log_normaliser(normaliser, operands.keys, backend), (normaliser,))


def backward(operands: Operands, coefficients: tuple[float, ...], attended: Attended, upstream: Upstream) -> Gradients:
    """Gradients of query, keys and values, each in its own shape, in the dtype of the computation."""
    operands, _, powers = balanced_values(operands)
    backend, q = operands.backend, operands.query
    columns = (attended.out, *attended.kept, *upstream)
    _, views, run = tuples.prepared(operands, tuples.ALL, coefficients)

    def body(carry: Any, rows: Array, *columns: Array) -> tuple[Any, tuple[Array]]:
        o, l, g, g_lse = (backend.cast(c, operands.dtype) for c in columns)
        s = backend.cast(rows, operands.dtype) * run.units[0]
        of_rows = tuples.QueryRows(s, scaled_gradient(o, l, g, g_lse, backend), None, None)
        (ds,), _, grads = tuples.adjoint(run, of_rows, None, views)
        return tuples.plus(run, carry, grads), (sum_to_leading(ds * run.units[0], rows.shape[:-2], backend),)

    start = None if q.shape[-2] <= run.blocks[0] else tuples.zero_gradients(run, views)
    carries, (dq,) = backend.share_rows(body, start, (q, *columns), run.blocks[0], run.fewest)
    found = Gradients.of_views(dq, tuples.of_views(run, carries, operands))
    return found._replace(values=with_powers(found.values, powers, backend))


def at_a_time(operands: Operands) -> int:
    """How many problems to compute at a time."""
    return _BLOCKS * tuples.at_a_time(operands)
