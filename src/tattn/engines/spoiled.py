"""Rows that hold no numbers, kept from the query rows that do not see them, where query row i sees some rows of each view.

NaN and infinities spoil whatever they are multiplied with, by 0 as well, and products leave rows out by zeros. So rows that hold
some are 0 while a call is computed, and what depends on them is NaN in the end:

* the output of a query row that holds some, or sees a row that does; of values, in their channel alone;
* the gradient of such a query row, and those of the keys that it sees, and of their values unless that depends on values of the
  same view alone.

Aligned at the end: of n_μ rows, row i of n queries sees those j ≤ i + n_μ − n, and with windows the last so many of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, NamedTuple

from ..arrays import broadcast_leading, max_to_leading, present, with_leading
from ..backends import Array, Backend
from ..operands import Gradients, Operands, View

# Output, normaliser or lse of every row, and the gradients of output and lse.
Columns = tuple[Array, ...]
Read = Callable[[Operands], tuple[Array, Array]]
Pull = Callable[[Operands, Columns], tuple[Gradients, tuple[Array, ...]]]


def forward_apart(compute: Read, operands: Operands, limits: Sequence[Any]) -> tuple[Array, Array]:
    """What `compute` finds, output (..., n, dv) and a column (..., n, 1), NaN in the rows that depend on rows without numbers.

    `limits`: what entries of query and keys have to be below to count as numbers.
    """
    backend = operands.backend
    if backend.reads:
        # Most calls have none, and where there are any it shows.
        found = compute(operands)
        if _all_finite(found[:1], backend):
            return found
    rows = _Rows.of(operands, limits)
    out, column = compute(rows.cleaned)
    n = out.shape[-2]
    lost, of_channel = rows.query, rows.query
    for number, (keys, values) in enumerate(zip(rows.keys, rows.values, strict=True)):
        seen = _seen(operands, number, n, keys)
        lost, of_channel = lost | _any_of(keys, *seen, backend), of_channel | _any_of(values, *seen, backend)
    return _nan_where(lost | of_channel, out, backend), _nan_where(lost, column, backend)


def backward_apart(
    compute: Pull, operands: Operands, columns: Columns, nothing: float, limits: Sequence[Any]
) -> tuple[Gradients, tuple[Array, ...]]:
    """Gradients of the operands, and of what all query rows see, NaN where they depend on rows without numbers.

    Columns are (out, l, gradient of out, gradient of lse); `nothing` is l of a row that no gradient comes from.
    """
    backend = operands.backend
    if backend.reads:
        found, behind = compute(operands, columns)
        if _all_finite((*found.flat(), *behind), backend):
            return found, behind
    xp = backend.xp
    rows = _Rows.of(operands, limits)
    out, l, g, g_lse = columns
    # A row without scores gives no gradient to anything; l may be −inf, of a row that sees nothing.
    blind = rows.query | xp.logical_not(l < xp.inf)
    unknown = blind | xp.logical_not(xp.isfinite(g))
    lost = xp.any(unknown, axis=-1, keepdims=True) | xp.logical_not(xp.isfinite(g_lse))
    lost = lost | xp.logical_not(xp.all(xp.isfinite(out), axis=-1, keepdims=True))
    fills = ((lost, out, 0.0), (blind, l, nothing), (unknown, g, 0.0), (lost, g_lse, 0.0))
    columns = tuple(xp.where(bad, xp.full_like(x, fill), x) for bad, x, fill in fills)
    found, behind = compute(rows.cleaned, columns)
    n = out.shape[-2]
    seen = [_any_of(v, *_seen(operands, i, n, v), backend) for i, v in enumerate(rows.values)]

    def nan_where_seen(number: int, spoiling: Array, gradient: Array) -> Array:
        seen = _any_of(spoiling, *_seeing(operands, number, n, gradient), backend)
        mask = operands.masks[number]
        return _nan_where(seen if mask is None else seen & present(mask, backend), gradient, backend)

    d_keys, d_weights = (
        tuple(nan_where_seen(i, lost, g) for i, g in enumerate(grads)) for grads in (found.keys, found.weights)
    )
    d_values = []
    for i, dv in enumerate(found.values):
        # What multiplies a value is the gradient and the values of the other views.
        spoiling = unknown
        for other in (*seen[:i], *seen[i + 1 :]):
            spoiling = spoiling | other
        d_values.append(nan_where_seen(i, spoiling, dv))
    some = xp.any(lost, axis=-2, keepdims=True)
    d_decays = tuple(_nan_where(some, g, backend) for g in found.decays)
    grads = Gradients(_nan_where(lost, found.query, backend), d_keys, tuple(d_values), d_weights, d_decays)
    return grads, tuple(_nan_where(some, x, backend) for x in behind)


def sees_some(operands: Operands, before: Sequence[Array] = ()) -> Array:
    """Which query rows see a row of every view that is not masked, (..., n, 1).

    `before`: whether there are such rows before the first ones of each view, (..., 1, 1).
    """
    backend, n, found = operands.backend, operands.query.shape[-2], True
    for number, mask in enumerate(operands.masks):
        if mask is not None:
            there = present(mask, backend)
            seen = _any_of(there, *_seen(operands, number, n, there), backend)
            if before:
                seen = seen | before[number]
            if operands.decays:
                # A factor of 0 leaves a row its own key.
                seen = backend.xp.where(operands.decays[number] == 0, there[..., there.shape[-2] - n :, :], seen)
            found = seen & found
    return found


class _Rows(NamedTuple):
    """Which rows of query and keys hold no numbers (..., n, 1), which entries of values are none, and operands without them."""

    query: Array
    keys: list[Array]
    values: list[Array]
    cleaned: Operands

    @classmethod
    def of(cls, operands: Operands, limits: Sequence[Any]) -> _Rows:
        backend, dtype = operands.backend, operands.dtype
        xp = backend.xp

        def unlike_numbers(x: Array, limit: Any) -> Array:
            return xp.logical_not(xp.all(xp.abs(backend.cast(x, dtype)) < limit, axis=-1, keepdims=True))

        def cleaned(bad: Array, x: Array) -> Array:
            return xp.where(bad, xp.zeros_like(x), x)

        def there(bad: Array, mask: Array | None) -> Array:
            # What masked rows hold does not matter.
            return bad if mask is None else bad & present(mask, backend)

        query = unlike_numbers(operands.query, limits[0])
        keys, values, views = [], [], []
        for (k, v, mask), limit in zip(operands.views, limits[1:], strict=True):
            bad_keys, bad_values = unlike_numbers(k, limit), xp.logical_not(xp.isfinite(v))
            keys.append(there(bad_keys, mask))
            values.append(there(bad_values, mask))
            views.append(View(cleaned(bad_keys, k), cleaned(bad_values, v), mask))
        whole = operands._replace(query=cleaned(query, operands.query), views=tuple(views))
        return cls(query, keys, values, whole)


def _seen(operands: Operands, number: int, n: int, rows: Array) -> tuple[Array, Array]:
    """The first row of a view that each of n query rows sees, and the one after its last, (n,) each."""
    backend, length, window = operands.backend, rows.shape[-2], operands.order.window
    last = _numbers(n, length - n + 1, rows, backend)
    return _clipped(last - (window[number] if window else length), length, backend), last


def _seeing(operands: Operands, number: int, n: int, rows: Array) -> tuple[Array, Array]:
    """The first of n query rows that sees each row of a view, and the one after the last, (n_μ,) each."""
    backend, length, window = operands.backend, rows.shape[-2], operands.order.window
    first = _numbers(length, n - length, rows, backend)
    last = first + (window[number] if window else length)
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
    count = backend.sums_of_rows_before(xp.astype(bad, xp.int32))
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
