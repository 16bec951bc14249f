"""The banded polynomial for most query rows, and the definition for those that it bounds too loosely.

Query rows are independent, so the output of the chosen rows is exact, and a gradient is the sum of that of the other
rows through the polynomial and that of the chosen rows through softmax. Arrays carry two more: the chosen rows
(..., k, 1), and for each row (..., n, 1) its place in the chosen ones followed by all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from . import banded, exact
from .arrays import broadcast_leading, gather_rows, sum_to_leading, unpack
from .backends import Array, Backend


class HybridCall(NamedTuple):
    """What the computation depends on besides arrays; hashable."""

    banded: banded.BandedCall
    exact: exact.ExactCall
    exact_error: float
    exact_grad_error: float

    @property
    def views(self) -> int:
        """Number of views m."""
        return self.exact.views


def forward(call: HybridCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    """Output (..., n, dv), lse (..., n, 1), and (..., n, 4): normaliser, error, grad_error, lse of the chosen rows."""
    xp = backend.xp
    q, keys, values, masks, (chosen, place) = unpack(call.views, arrays)
    plain = (q, *keys, *values, *masks)
    out, lse, rest = banded.forward(call.banded, backend, plain)
    out_chosen, lse_chosen, _ = exact.forward(call.exact, backend, (gather_rows(q, chosen, backend), *plain[1:]))
    one = xp.ones_like(lse_chosen)
    rest_chosen = xp.concat([one, call.exact_error * one, call.exact_grad_error * one], axis=-1)
    out, lse, rest = (
        _placed(a, b, place, backend) for a, b in ((out_chosen, out), (lse_chosen, lse), (rest_chosen, rest))
    )
    return out, lse, xp.concat([rest, lse], axis=-1)


def backward(call: HybridCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Gradients of query, keys and values, each in its own shape and dtype."""
    xp = backend.xp
    q, keys, values, masks, (chosen, place, out, rest, grad_out, grad_lse) = unpack(call.views, arrays)
    plain = (q, *keys, *values, *masks)
    others = backend.cast(place >= chosen.shape[-2], grad_out.dtype)
    through_banded = banded.backward(
        call.banded,
        backend,
        (*plain, out, rest[..., :3], xp.where(others > 0, grad_out, 0.0), xp.where(others > 0, grad_lse, 0.0)),
    )
    columns = (gather_rows(x, chosen, backend) for x in (out, rest[..., 3:], grad_out, grad_lse))
    dq_chosen, *through_exact = exact.backward(
        call.exact, backend, (gather_rows(q, chosen, backend), *plain[1:], *columns)
    )
    leading = broadcast_leading(q, chosen)
    spread = _placed(
        dq_chosen, xp.zeros((*leading, *q.shape[-2:]), dtype=q.dtype, device=backend.device(q)), place, backend
    )
    dq = through_banded[0] + sum_to_leading(spread, q.shape[:-2], backend)
    return dq, *(a + b for a, b in zip(through_banded[1:], through_exact, strict=True))


def leading_limit(call: HybridCall, backend: Backend, arrays: Sequence[Array | None]) -> int:
    """How many problems to compute side by side."""
    return banded.leading_limit(call.banded, backend, arrays)


def _placed(chosen: Array, every: Array, place: Array, backend: Backend) -> Array:
    """Rows of `every` (..., n, k), with the chosen ones in their places."""
    return gather_rows(backend.xp.concat([chosen, every], axis=-2), place, backend)
