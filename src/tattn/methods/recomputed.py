"""The banded polynomial for most query rows, and the definition for those that it bounds too loosely.

Query rows are independent, so the output of the chosen rows is exact, and a gradient is the sum of that of the other
rows through the polynomial and that of the chosen rows through softmax. Arrays carry two more: the chosen rows
(..., k, 1), and for each row (..., n, 1) its place in the chosen ones followed by all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..arrays import broadcast_leading, gather_rows, sum_to_leading, unpack
from ..backends import Array, Backend
from ..engines import tuples as exact
from . import banded
from .bands import BandedCall
from .certificate import ERROR
from .gradient_bounds import StatedCall, banded_bounds, stated_bounds


class HybridCall(NamedTuple):
    """What the computation depends on besides arrays; hashable."""

    banded: BandedCall
    exact: exact.ExactCall
    exact_error: float
    exact_grad_error: float

    @property
    def views(self) -> int:
        """Number of views m."""
        return self.exact.views


def forward(call: HybridCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    """Output (..., n, dv), lse (..., n, 1), and (..., n, ·): the columns of `banded`, and lse once more.

    Takes the result of `banded.forward` after the chosen rows, where that is known already.
    """
    xp = backend.xp
    q, keys, values, masks, (chosen, place, *known) = unpack(call.views, arrays)
    plain = (q, *keys, *values, *masks)
    out, lse, rest = known or banded.forward(call.banded, backend, plain)[:3]
    out_chosen, lse_chosen, _ = exact.forward(call.exact, backend, (gather_rows(q, chosen, backend), *plain[1:]))
    one = xp.ones_like(lse_chosen)
    columns = [one] * rest.shape[-1]
    if len(columns) > 1:
        columns[ERROR] = call.exact_error * one
    rest_chosen = xp.concat(columns, axis=-1)
    out, lse, rest = (
        _placed(a, b, place, backend) for a, b in ((out_chosen, out), (lse_chosen, lse), (rest_chosen, rest))
    )
    return out, lse, xp.concat([rest, lse], axis=-1)


def backward(call: HybridCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Gradients of query, keys and values, each in its own shape, in the dtype of the computation."""
    q, keys, values, masks, (chosen, place, *columns) = unpack(call.views, arrays)
    plain = (q, *keys, *values, *masks)
    through_banded = banded.backward(call.banded, backend, (*plain, *_others(chosen, place, columns, backend)))
    out, rest, grad_out, grad_lse = columns
    own = (gather_rows(x, chosen, backend) for x in (out, rest[..., -1:], grad_out, grad_lse))
    dq_chosen, *through_exact = exact.backward(call.exact, backend, (gather_rows(q, chosen, backend), *plain[1:], *own))
    return _added(q, dq_chosen, through_banded, through_exact, chosen, place, backend)


def gradient_bounds(call: HybridCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Bounds of the errors of the gradients; takes what `backward` takes, certified."""
    q, keys, values, masks, (chosen, place, *columns) = unpack(call.views, arrays)
    plain = (q, *keys, *values, *masks)
    through_banded = banded_bounds(call.banded, backend, (*plain, *_others(chosen, place, columns, backend)))
    own = (gather_rows(x, chosen, backend) for x in columns[2:])
    stated = StatedCall(call.exact.scale, (call.exact_error, call.exact_grad_error), call.views)
    dq_chosen, *through_exact = stated_bounds(stated, backend, (gather_rows(q, chosen, backend), *plain[1:], *own))
    return _added(q, dq_chosen, through_banded, through_exact, chosen, place, backend)


def _others(chosen: Array, place: Array, columns: Sequence[Array], backend: Backend) -> tuple[Array, ...]:
    """What the banded adjoint takes: no gradient comes from the chosen rows."""
    out, rest, *gradients = columns
    keep = place >= chosen.shape[-2]
    return out, rest[..., :-1], *(backend.xp.where(keep, g, 0.0) for g in gradients)


def _added(
    q: Array,
    dq_chosen: Array,
    through_banded: Sequence[Array],
    through_exact: Sequence[Array],
    chosen: Array,
    place: Array,
    backend: Backend,
) -> tuple[Array, ...]:
    """Sums of what comes through both ways; the query's chosen rows (..., k, d) in their places."""
    leading = broadcast_leading(q, chosen)
    zeros = backend.xp.zeros((*leading, *q.shape[-2:]), dtype=dq_chosen.dtype, device=backend.device(q))
    dq = through_banded[0] + sum_to_leading(_placed(dq_chosen, zeros, place, backend), q.shape[:-2], backend)
    return dq, *(a + b for a, b in zip(through_banded[1:], through_exact, strict=True))


def leading_limit(call: HybridCall, backend: Backend, arrays: Sequence[Array | None]) -> int:
    """How many problems to compute side by side."""
    return banded.leading_limit(call.banded, backend, arrays)


def _placed(chosen: Array, every: Array, place: Array, backend: Backend) -> Array:
    """Rows of `every` (..., n, k), with the chosen ones in their places."""
    return gather_rows(backend.xp.concat([chosen, every], axis=-2), place, backend)
