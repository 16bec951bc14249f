"""Channels of all views brought to one size, which leaves scores as they are and arithmetic in range."""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp, log2, prod
from typing import Any

from ..arrays import broadcast_leading, clean, max_to_leading, over_rows, shared_leading, sum_of
from ..backends import Array, Backend

# Rows that are looked at together, at least.
_FEWEST = 128


def channel_units(
    q: Array, keys: Sequence[Array], masks: Sequence[Array | None], scale: float, backend: Backend
) -> list[Array]:
    """`units_of` the largest entries of query and keys."""
    tops = [channel_tops(x, m, backend) for x, m in zip((q, *keys), (None, *masks), strict=True)]
    return units_of(tops, (q, *keys), scale, backend)


def units_of(tops: Sequence[Array], views: Sequence[Array], scale: float, backend: Backend) -> list[Array]:
    """Factors (..., 1, d) for query and keys whose product over the views is `scale` in every channel.

    They give all views the same largest entry in each channel, so that monomials neither overflow nor vanish.
    Powers of two, but for `scale` itself: multiplying by them rounds nothing. Scores, and with them every result,
    do not depend on the factors, hence they count as constants in the adjoint.
    """
    xp = backend.xp
    # A mask may have leading dimensions that its rows lack.
    tops = [max_to_leading(t, tuple(x.shape[:-2]), backend) for t, x in zip(tops, views, strict=True)]
    tops = shared_leading(tops, backend)
    logs, zeros = [], []
    for view, top in enumerate(tops):
        zero = top == 0
        found = xp.log2(xp.where(zero, 1.0, top)) + (log2(scale) if view == 0 else 0.0)
        logs.append(xp.where(zero, 0.0, found))
        zeros.append(backend.cast(zero, top.dtype))
    count = sum_of(zeros)
    total = sum_of(logs)
    # A channel that is 0 in some view takes the product that the others would need to reach size one.
    target = xp.where(count > 0, 0.0, total * (1 / len(logs)))
    vacant = total / xp.where(count > 0, count, 1.0)
    powers = [xp.round(xp.where(z > 0, vacant, target - x)) for x, z in zip(logs, zeros, strict=True)]
    powers[0] = -sum_of(powers[1:])
    # A power of two and the scale may each leave the dtype's range where their product does not.
    fraction, exponent = frexp(scale)
    powers[0] = powers[0] + exponent
    units = [xp.pow(xp.full_like(p, 2.0), p) for p in powers]
    units[0] = units[0] * fraction
    # A view has no more leading dimensions for it: those that it lacks are of length one.
    return [xp.reshape(u, u.shape[u.ndim - x.ndim :]) for u, x in zip(units, views, strict=True)]


def over_blocks(body: Any, start: Any, rows: Sequence[Array | None], backend: Backend) -> Any:
    """The state after all blocks of the rows (..., n, d), which stay in the cache; a shard may have none."""
    x: Array = rows[0]
    if x.shape[-2] == 0:
        return start
    row = backend.itemsize(x.dtype) * x.shape[-1] * prod(broadcast_leading(*rows))
    return backend.scan_rows(body, start, rows, int(max(_FEWEST, backend.cache // row)))[0]


def channel_tops(x: Array, mask: Array | None, backend: Backend) -> Array:
    """The largest |entry| of every channel over all rows, masked ones as 0: (..., 1, d)."""
    xp = backend.xp
    dtype = backend.compute_dtype(x.dtype)

    def body(top: Array, rows: Array, mask: Array | None) -> tuple[Array, tuple[()]]:
        rows = backend.cast(clean(rows, mask, backend), dtype)
        return xp.maximum(top, over_rows(xp.max, xp.abs(rows), backend)), ()

    zero = xp.zeros((*broadcast_leading(x, mask), 1, x.shape[-1]), dtype=dtype, device=backend.device(x))
    return over_blocks(body, zero, (x, mask), backend)


def channel_sizes(x: Array, mask: Array | None, backend: Backend) -> tuple[Array, Array]:
    """The largest |entry| of every channel, and its root mean square over all rows, masked ones as 0: (..., 1, d) each."""
    xp = backend.xp
    dtype = backend.compute_dtype(x.dtype)

    def body(carry: tuple[Array, Array], rows: Array, mask: Array | None) -> tuple[tuple[Array, Array], tuple[()]]:
        top, squares = carry
        rows = backend.cast(clean(rows, mask, backend), dtype)
        return (
            xp.maximum(top, over_rows(xp.max, xp.abs(rows), backend)),
            squares + over_rows(xp.sum, rows * rows, backend),
        ), ()

    zero = xp.zeros((*broadcast_leading(x, mask), 1, x.shape[-1]), dtype=dtype, device=backend.device(x))
    top, squares = over_blocks(body, (zero, zero), (x, mask), backend)
    spread = xp.sqrt(squares * (1 / x.shape[-2]))
    # Squares leave the dtype's range before the entries do; the largest entry then stands in.
    return top, xp.where((spread > 0) & xp.isfinite(spread), spread, top)
