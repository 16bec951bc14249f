"""What is done with arrays of many leading dimensions: they broadcast, are masked, gathered, and taken in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod

import numpy as np

from .backends import Array, Backend


def broadcast_leading(*arrays: Array | None) -> tuple[int, ...]:
    """The leading dimensions (all but the last two) that the arrays have together."""
    first, *others = [tuple(a.shape[:-2]) for a in arrays if a is not None]
    # Mostly there is one shape, and NumPy takes some 6 µs.
    return first if all(s == first for s in others) else np.broadcast_shapes(first, *others)


def sum_to_leading(array: Array, leading: tuple[int, ...], backend: Backend) -> Array:
    """Sum over the leading dimensions that a view with `leading` was broadcast along."""
    return _to_leading(backend.xp.sum, array, leading, backend)


def max_to_leading(array: Array, leading: tuple[int, ...], backend: Backend) -> Array:
    """The largest over the leading dimensions that a view with `leading` was broadcast along."""
    return _to_leading(backend.xp.max, array, leading, backend)


def _to_leading(reduction: Callable[..., Array], array: Array, leading: tuple[int, ...], backend: Backend) -> Array:
    """A sum or maximum that leaves these leading dimensions."""
    if tuple(array.shape[:-2]) == tuple(leading):
        return array
    extra = array.ndim - 2 - len(leading)
    axes = (*range(extra), *(extra + i for i, size in enumerate(leading) if size != array.shape[extra + i]))
    if not axes:
        return array
    return backend.xp.reshape(reduction(array, axis=axes, keepdims=True), (*leading, *array.shape[-2:]))


def are_weights(mask: Array | None, backend: Backend) -> bool:
    """Whether a mask says of every row what it weighs, and not only whether it is there."""
    return mask is not None and backend.dtype_name(mask.dtype) != "bool"


def present(mask: Array, backend: Backend) -> Array:
    """Which rows a mask (..., n, 1) leaves in: those that weigh anything."""
    # What is no number is there, so that it shows.
    return mask != 0 if are_weights(mask, backend) else mask


def clean(rows: Array, mask: Array | None, backend: Backend) -> Array:
    """Rows (..., n, k) with those that the mask (..., n, 1) leaves out set to 0, whatever they held."""
    return rows if mask is None else backend.cleared(rows, present(mask, backend))


def weighed(rows: Array, mask: Array | None, backend: Backend) -> Array:
    """Rows (..., n, k) times their weights, 0 where masked."""
    rows = clean(rows, mask, backend)
    return rows * backend.cast(mask, rows.dtype) if are_weights(mask, backend) else rows


def unweighed(gradient: Array, rows: Array, mask: Array | None, backend: Backend) -> tuple[Array, ...]:
    """Gradients of values v (..., n, k), and of their weights w (..., n, 1) if they have some.

    From those of [v, 1], or of [w v, w], (..., n, k + 1), or of what is in front of the ones alone where rows have no weights.
    """
    of_values = gradient[..., : rows.shape[-1]]
    if not are_weights(mask, backend):
        return (clean(of_values, mask, backend),)
    rows = backend.cast(clean(rows, mask, backend), gradient.dtype)
    of_weights = backend.xp.sum(of_values * rows, axis=-1, keepdims=True) + gradient[..., rows.shape[-1] :]
    return weighed(of_values, mask, backend), clean(of_weights, mask, backend)


def prod_of(arrays: Sequence[Array]) -> Array:
    """Hadamard product of arrays that broadcast."""
    result = arrays[0]
    for a in arrays[1:]:
        result = result * a
    return result


def times_power(x: Array, power: Array, backend: Backend) -> Array:
    """The array times 2^p for whole numbers p, in two steps: a power may leave the range where the product does not."""
    xp = backend.xp
    half = xp.floor(power * 0.5)
    for part in (half, power - half):
        x = x * backend.power_of_two(part)
    return x


def sizes_of(x: Array, paired: bool, backend: Backend) -> Array:
    """|x| of every channel, (..., n, d), or of every complex one, (..., n, d / 2), to a few units in the last place."""
    xp = backend.xp
    if not paired:
        return xp.abs(x)
    half = x.shape[-1] // 2
    re, im = xp.abs(x[..., :half]), xp.abs(x[..., half:])
    larger, smaller = xp.maximum(re, im), xp.minimum(re, im)
    # No square leaves the range of the dtype.
    ratio = smaller / xp.where(larger > 0, larger, 1.0)
    return larger * xp.sqrt(1 + ratio * ratio)


def for_parts(x: Array, paired: bool, backend: Backend) -> Array:
    """What complex channels have, (..., d / 2), for real parts and for imaginary parts, (..., d); of real ones, that."""
    return backend.xp.concat([x, x], axis=-1) if paired else x


def alike(x: Array, backend: Backend) -> Array:
    """The larger of what the real and the imaginary part of a channel have, for both, (..., d)."""
    half = x.shape[-1] // 2
    return for_parts(backend.xp.maximum(x[..., :half], x[..., half:]), True, backend)


def sum_of(arrays: Sequence[Array]) -> Array:
    """Sum of arrays that broadcast."""
    result = arrays[0]
    for a in arrays[1:]:
        result = result + a
    return result


def row_pairs(s: Array, k: Array, backend: Backend) -> Array:
    """All products of a row of s with a row of k: (..., rows, d) and (..., count, d) → (..., rows · count, d)."""
    product = s[..., :, None, :] * k[..., None, :, :]
    return backend.xp.reshape(product, (*product.shape[:-3], -1, product.shape[-1]))


def channel_pairs(z: Array, a: Array, backend: Backend) -> Array:
    """Z ⊖ A, all products of a channel of z with one of A in the same row: (..., rows, k) and (..., rows, d) → (..., rows, k d)."""
    product = z[..., :, None] * a[..., None, :]
    return backend.xp.reshape(product, (*product.shape[:-2], -1))


def with_leading(array: Array, leading: tuple[int, ...], backend: Backend) -> Array:
    """The array with these leading dimensions; as it is, and writeable, if it has them."""
    shape = (*leading, *array.shape[-2:])
    return array if tuple(array.shape) == shape else backend.xp.broadcast_to(array, shape)


def shared_leading(tops: Sequence[Array], backend: Backend) -> list[Array]:
    """Maxima (..., 1, d) of several views, taken over the leading axes along which some view is broadcast."""
    xp = backend.xp
    ndim = max(t.ndim for t in tops)
    tops = [t if t.ndim == ndim else xp.reshape(t, (*(1,) * (ndim - t.ndim), *t.shape)) for t in tops]
    for axis in range(ndim - 2):
        if len({t.shape[axis] for t in tops}) > 1:
            tops = [xp.max(t, axis=axis, keepdims=True) for t in tops]
    return list(tops)


def over_rows(reduction: Callable[..., Array], x: Array, backend: Backend) -> Array:
    """A sum or maximum over the rows of x, (..., n, k) → (..., 1, k), many rows side by side: k alone is too few for SIMD."""
    xp = backend.xp
    *leading, n, k = x.shape
    fold = 64
    if n < 2 * fold:
        return reduction(x, axis=-2, keepdims=True)
    cut = n // fold * fold
    wide = reduction(xp.reshape(x[..., :cut, :], (*leading, cut // fold, fold * k)), axis=-2)
    folded = xp.reshape(wide, (*leading, fold, k))
    if cut < n:
        folded = xp.concat([folded, x[..., cut:, :]], axis=-2)
    return reduction(folded, axis=-2, keepdims=True)


def gather_rows(x: Array, index: Array, backend: Backend) -> Array:
    """Rows of x (..., n, k) by number, index (..., m, 1) → (..., m, k)."""
    xp = backend.xp
    if index.ndim == 2:
        # One order for all problems.
        return xp.take(x, index[:, 0], axis=-2)
    # Whole rows move, several times as fast as entries.
    *leading, n, k = x.shape
    rows = xp.take(xp.reshape(x, (-1, k)), xp.reshape(index + _starts(leading, n, index, backend), (-1,)), axis=0)
    return xp.reshape(rows, (*broadcast_leading(x, index), index.shape[-2], k))


def rows_together(x: Array, backend: Backend) -> Array:
    """Rows (..., n, k), copied if they do not stand one after another in memory: to be gathered from more than once."""
    return backend.xp.reshape(backend.xp.reshape(x, (-1, x.shape[-1])), x.shape) if x.ndim > 2 else x


def inverse_order(order: Array, backend: Backend) -> Array:
    """Where each row went, (..., n, 1), from where each sorted row came from."""
    return backend.xp.argsort(order, axis=-2)


def return_rows(pieces: Iterable[Sequence[Array]], order: Array, backend: Backend) -> tuple[Array, ...]:
    """Rows in an order, piece by piece ((..., ·, k), …), back where they came from, order (..., n, 1): (..., n, k) each."""
    xp = backend.xp
    if not backend.writable:
        back = inverse_order(order, backend)
        return tuple(gather_rows(xp.concat(list(p), axis=-2), back, backend) for p in zip(*pieces, strict=True))
    n, start = order.shape[-2], 0
    wholes: list[Array] = []
    for piece in pieces:
        stop = start + piece[0].shape[-2]
        places = order[..., start:stop, :]
        if not wholes:
            device = backend.device(order)
            wholes = [xp.empty((prod(p.shape[:-2]) * n, p.shape[-1]), dtype=p.dtype, device=device) for p in piece]
        for whole, part in zip(wholes, piece, strict=True):
            where = places + _starts(part.shape[:-2], n, order, backend) if part.ndim > 2 else places
            backend.write_rows(whole, xp.reshape(where, (-1,)), xp.reshape(part, (-1, part.shape[-1])))
        leading = [part.shape[:-2] for part in piece]
        start = stop
    return tuple(xp.reshape(w, (*outer, n, w.shape[-1])) for w, outer in zip(wholes, leading, strict=True))


def _starts(leading: Sequence[int], n: int, index: Array, backend: Backend) -> Array:
    """Number of the first row of each problem, (..., 1, 1), where those of all stand one after another."""
    count = backend.xp.arange(prod(leading), dtype=index.dtype, device=backend.device(index))
    return backend.xp.reshape(count * n, (*leading, 1, 1))


def swap_outer(array: Array, backend: Backend) -> Array:
    """(..., i, j, k) → (..., j, i, k)."""
    n = array.ndim
    return backend.xp.permute_dims(array, (*range(n - 3), n - 2, n - 3, n - 1))


def in_parts(
    function: Callable[..., tuple[Array, ...]],
    limit: int,
    targets: Sequence[Array | None],
    backend: Backend,
    arrays: Sequence[Array | None],
) -> tuple[Array, ...]:
    """``function(arrays)`` for at most `limit` problems at a time, cut along leading dimensions.

    Result i has the leading dimensions of ``targets[i]``, or all of them where that is None; along one that it lacks,
    parts are summed, as gradients are. Where there are parts, results that have no target are dropped.
    """
    leading = broadcast_leading(*arrays)
    axis = next((i for i, size in enumerate(leading) if size > 1), None)
    if axis is None or prod(leading) <= limit or not backend.parts:
        return function(arrays)
    from_right = len(leading) - axis + 2

    def has_axis(a: Array | None) -> bool:
        return a is not None and a.ndim >= from_right and a.shape[-from_right] > 1

    step = max(1, limit // prod(leading[axis + 1 :]))
    results: list[list[Array]] = []
    for start in range(0, leading[axis], step):
        cut = (Ellipsis, slice(start, min(start + step, leading[axis])), *(slice(None),) * (from_right - 1))
        part = [a[cut] if a is not None and has_axis(a) else a for a in arrays]
        part_targets = [t[cut] if t is not None and has_axis(t) else t for t in targets]
        results.append(list(in_parts(function, limit, part_targets, backend, part)))
    return tuple(
        backend.xp.concat(list(parts), axis=-from_right) if t is None or has_axis(t) else sum_of(parts)
        for t, parts in zip(targets, zip(*results, strict=True), strict=False)
    )
