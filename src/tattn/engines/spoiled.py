"""Rows that hold no numbers, kept from the query rows that do not see them, where query row i sees some rows of each view.

NaN and infinities spoil whatever they are multiplied with, by 0 as well, and products leave rows out by zeros. So rows that hold
some are 0 while a call is computed, and what depends on them is NaN in the end:

* the output of a query row that holds some, or sees a row that does; of values, in their channel alone;
* the gradient of such a query row, and those of all keys and values that it sees.

Aligned at the end: of n_μ rows, row i of n queries sees those j ≤ i + n_μ − n, and with windows the last so many of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, NamedTuple

from ..arrays import broadcast_leading, max_to_leading, unpack, with_leading
from ..backends import Array, Backend

Compute = Callable[[Sequence[Array | None]], tuple[Array, ...]]


class Sight(NamedTuple):
    """Number of views, windows if there are any, and what entries of query and keys have to be below to count as numbers."""

    views: int
    window: tuple[int, ...] | None
    limits: Sequence[Any]


def forward_apart(
    compute: Compute, sight: Sight, backend: Backend, arrays: Sequence[Array | None]
) -> tuple[Array, ...]:
    """What `compute` finds, output (..., n, dv) and columns (..., n, 1), NaN in the rows that depend on rows without numbers."""
    if backend.reads:
        # Most calls have none, and where there are any it shows.
        found = compute(arrays)
        if _all_finite(found[:1], backend):
            return found
    rows = _Rows.of(sight, backend, arrays)
    out, *columns = compute(rows.cleaned)
    n = out.shape[-2]
    lost, of_channel = rows.query, rows.query
    for view, (keys, values) in enumerate(zip(rows.keys, rows.values, strict=True)):
        seen = _seen(sight, view, n, keys, backend)
        lost, of_channel = lost | _any_of(keys, *seen, backend), of_channel | _any_of(values, *seen, backend)
    return _nan_where(lost | of_channel, out, backend), *(_nan_where(lost, x, backend) for x in columns)


def backward_apart(
    compute: Compute, sight: Sight, nothing: float, backend: Backend, arrays: Sequence[Array | None]
) -> tuple[Array, ...]:
    """Gradients of query, keys and values, and of what all query rows see, NaN where they depend on rows without numbers.

    Columns are (out, l, gradient of out, gradient of lse); `nothing` is l of a row that no gradient comes from.
    """
    if backend.reads:
        found = compute(arrays)
        if _all_finite(found, backend):
            return found
    xp = backend.xp
    rows = _Rows.of(sight, backend, arrays)
    columns = unpack(sight.views, arrays)[-1]
    # l may be −inf, of a row that sees nothing.
    bounded = [(x if i == 1 else xp.abs(x)) < xp.inf for i, x in enumerate(columns)]
    lost = rows.query
    for x in bounded:
        lost = lost | xp.logical_not(xp.all(x, axis=-1, keepdims=True))
    fills = (0.0, nothing, 0.0, 0.0)
    columns = tuple(xp.where(lost, xp.full_like(x, fill), x) for x, fill in zip(columns, fills, strict=True))
    dq, *grads = compute((*rows.cleaned, *columns))
    of_rows = []
    for i, g in enumerate(grads[: 2 * sight.views]):
        seeing = _seeing(sight, i % sight.views, lost.shape[-2], g, backend)
        of_rows.append(_nan_where(_any_of(lost, *seeing, backend), g, backend))
    some = xp.any(lost, axis=-2, keepdims=True)
    others = (_nan_where(some, g, backend) for g in grads[2 * sight.views :])
    return _nan_where(lost, dq, backend), *of_rows, *others


class _Rows(NamedTuple):
    """Which rows of query and keys hold no numbers (..., n, 1), which entries of values are none, and arrays without them."""

    query: Array
    keys: list[Array]
    values: list[Array]
    cleaned: tuple[Array | None, ...]

    @classmethod
    def of(cls, sight: Sight, backend: Backend, arrays: Sequence[Array | None]) -> _Rows:
        xp = backend.xp
        q, keys, values, masks, _ = unpack(sight.views, arrays)
        dtype = backend.compute_dtype(q.dtype)
        bad = [
            xp.logical_not(xp.all(xp.abs(backend.cast(x, dtype)) < limit, axis=-1, keepdims=True))
            for x, limit in zip((q, *keys), sight.limits, strict=True)
        ]
        bad += [xp.logical_not(xp.isfinite(v)) for v in values]
        cleaned = (xp.where(b, xp.zeros_like(x), x) for b, x in zip(bad, (q, *keys, *values), strict=True))
        # What masked rows hold does not matter.
        present = [b if mask is None else b & mask for b, mask in zip(bad[1:], (*masks, *masks), strict=True)]
        return cls(bad[0], present[: sight.views], present[sight.views :], (*cleaned, *masks))


def _seen(sight: Sight, view: int, n: int, rows: Array, backend: Backend) -> tuple[Array, Array]:
    """The first row of a view that each of n query rows sees, and the one after its last, (n,) each."""
    length = rows.shape[-2]
    last = _numbers(n, length - n + 1, rows, backend)
    return _clipped(last - (sight.window[view] if sight.window else length), length, backend), last


def _seeing(sight: Sight, view: int, n: int, rows: Array, backend: Backend) -> tuple[Array, Array]:
    """The first of n query rows that sees each row of a view, and the one after the last, (n_μ,) each."""
    length = rows.shape[-2]
    first = _numbers(length, n - length, rows, backend)
    last = first + (sight.window[view] if sight.window else length)
    return _clipped(first, n, backend), _clipped(last, n, backend)


def _numbers(count: int, start: int, like: Array, backend: Backend) -> Array:
    """As many whole numbers from `start` on."""
    return backend.xp.arange(count, dtype=backend.xp.int32, device=backend.device(like)) + start


def _clipped(index: Array, most: int, backend: Backend) -> Array:
    """Numbers from 0 to `most`."""
    xp = backend.xp
    index = xp.where(index < 0, xp.zeros_like(index), index)
    return xp.where(index > most, xp.full_like(index, most), index)


def _any_of(bad: Array, first: Array, last: Array, backend: Backend) -> Array:
    """Whether there is a bad one among the rows (..., n, k) from a `first` to before a `last` (m,): (..., m, k)."""
    xp = backend.xp
    count = xp.cumulative_sum(xp.astype(bad, xp.int32), axis=-2, dtype=xp.int32, include_initial=True)
    return xp.take(count, last, axis=-2) > xp.take(count, first, axis=-2)


def _nan_where(bad: Array, x: Array, backend: Backend) -> Array:
    """NaN where any of the problems that share a row of x is bad."""
    xp = backend.xp
    bad = with_leading(bad, broadcast_leading(bad, x), backend)
    bad = max_to_leading(backend.cast(bad, x.dtype), tuple(x.shape[:-2]), backend)
    return xp.where(bad > 0, xp.nan, x)


def _all_finite(arrays: Sequence[Array], backend: Backend) -> bool:
    """Whether sums of all numbers, and so the numbers, are finite."""
    return all(isfinite(float(backend.xp.sum(x))) for x in arrays)
