"""Channels of all views brought to one size, which leaves scores as they are and arithmetic in range."""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp, isfinite, log, log2, prod
from typing import Any

from ..arrays import (
    alike,
    broadcast_leading,
    clean,
    for_parts,
    max_to_leading,
    over_rows,
    prod_of,
    shared_leading,
    sizes_of,
    sum_of,
)
from ..backends import Array, Backend
from ..checks import LARGEST_POWER
from ..operands import Operands, View

# Rows that are looked at together, at least.
_FEWEST = 128
# log2 of scores that no polynomial serves, by far: a row that gives such scores is beyond what was promised.
MOST_SCORE = 10.0
# |log2| of entries and of a scale that no unit leaves the range of any dtype for.
_USUAL = 40
# Pieces that a view is cut into for the usual size of its entries, at most.
_PIECES = 32


def channel_units(
    q: Array, keys: Sequence[Array], masks: Sequence[Array | None], scale: float, backend: Backend
) -> list[Array]:
    """`shared_units` of query and keys."""
    views = tuple(View(k, k, m) for k, m in zip(keys, masks, strict=True))
    return shared_units(Operands(backend, q, views, scale))


def shared_units(operands: Operands, causal: bool = False) -> list[Array]:
    """`units_of` the largest entries of query and keys, but for rows that are not finite or beyond what was promised.

    `causal`: such a row of the keys has no say either, since not all query rows see it. Complex channels have one unit.
    """
    backend, q, keys, masks, scale = operands[0], operands.query, operands.keys, operands.masks, operands.scale
    xp = backend.xp
    rows, present = (q, *keys), (None, *masks)

    def paired(top: Array) -> Array:
        return alike(top, backend) if operands.paired else top

    def found(finite: bool) -> list[Array]:
        return [paired(channel_tops(x, m, backend, finite)) for x, m in zip(rows, present, strict=True)]

    units = _read_units(found(False), rows, scale, backend) if backend.reads else None
    if units is not None:
        return units
    tops = found(True)
    if causal:
        reach = sum_of([xp.log2(top) for top in tops]) + log2(scale)
        usual = [paired(_usual_tops(x, m, top, backend)) for x, m, top in zip(rows[1:], masks, tops[1:], strict=True)]
        tops[1:] = [xp.where(reach > MOST_SCORE, u, top) for u, top in zip(usual, tops[1:], strict=True)]
    return units_of(_limited_tops(tops, rows, scale, backend), rows, scale, backend)


def units_of_each(tops: Sequence[Array], scale: float, backend: Backend) -> list[Array]:
    """`shared_units` from the largest entries (..., 1, d) of query and keys, which can be read, in the same leading dimensions.

    They may be NaN where query rows are not finite, and where keys are not: then every query row sees such a key.
    """
    units = _read_units(tops, tops, scale, backend)
    return units_of(_limited_tops(tops, tops, scale, backend), tops, scale, backend) if units is None else units


def _read_units(tops: Sequence[Array], views: Sequence[Array], scale: float, backend: Backend) -> list[Array] | None:
    """`units_of` where all is finite and nothing beyond what was promised; else None."""
    # Few calls need a second look, and fewer a third.
    units = _usual_units(tops, views, scale, backend)
    if units is None and float(backend.xp.max(prod_of(tops))) * scale <= 2.0**MOST_SCORE:
        return units_of(tops, views, scale, backend)
    return units


def _usual_units(tops: Sequence[Array], views: Sequence[Array], scale: float, backend: Backend) -> list[Array] | None:
    """`units_of`, in a third of the operations, where no channel is empty, extreme or beyond what was promised; else None."""
    xp = backend.xp
    fraction, exponent = frexp(scale)
    if abs(exponent) > _USUAL:
        return None
    logs = xp.round(xp.log2(_stacked(tops, views, backend)))
    score = xp.sum(logs, axis=-2, keepdims=True) + exponent
    # Each of them is rounded by a half at most.
    most = MOST_SCORE - len(tops) / 2
    if not float(xp.max(xp.concat([xp.abs(logs), score + (_USUAL - most)], axis=-2))) <= _USUAL:
        return None
    powers = xp.round(score * (1 / len(tops)) - logs)
    left = exponent - xp.sum(powers, axis=-2, keepdims=True)
    powers = xp.concat([powers[..., :1, :] + left, powers[..., 1:, :]], axis=-2)
    return _of_views(backend.power_of_two(powers), views, fraction, backend)


def _stacked(tops: Sequence[Array], views: Sequence[Array], backend: Backend) -> Array:
    """The largest entries of all views, one row each: (..., m + 1, d)."""
    # A mask may have leading dimensions that its rows lack.
    tops = [max_to_leading(t, tuple(x.shape[:-2]), backend) for t, x in zip(tops, views, strict=True)]
    stacked: Array = backend.xp.concat(shared_leading(tops, backend), axis=-2)
    return stacked


def _of_views(units: Array, views: Sequence[Array], fraction: float, backend: Backend) -> list[Array]:
    """The rows of units as factors of the views, the query's times a fraction."""
    found = []
    for view, x in enumerate(views):
        unit = units[..., view : view + 1, :]
        # A view has no more leading dimensions for it: those that it lacks are of length one.
        found.append(backend.xp.reshape(unit, unit.shape[unit.ndim - x.ndim :]) if unit.ndim > x.ndim else unit)
    # A power of two and the scale may each leave the dtype's range where their product does not.
    found[0] = found[0] * fraction
    return found


def finite_sizes(
    rows: Sequence[Array], masks: Sequence[Array | None], backend: Backend, paired: bool = False
) -> list[tuple[Array, Array]]:
    """`channel_sizes` of several views, but for rows that are not finite."""
    if backend.reads:
        found = [channel_sizes(x, m, backend, paired=paired) for x, m in zip(rows, masks, strict=True)]
        if isfinite(float(backend.xp.max(sum_of([top for top, _ in found])))):
            return found
    return [channel_sizes(x, m, backend, True, paired) for x, m in zip(rows, masks, strict=True)]


def _limited_tops(tops: Sequence[Array], views: Sequence[Array], scale: float, backend: Backend) -> list[Array]:
    """The same, and of the query what gives scores that some polynomial serves: rows beyond must not make the others vanish."""
    xp = backend.xp
    alike = [max_to_leading(t, tuple(x.shape[:-2]), backend) for t, x in zip(tops, views, strict=True)]
    power = MOST_SCORE - log2(scale) - sum_of([xp.log2(top) for top in shared_leading(alike, backend)[1:]])
    most = xp.exp(power * log(2.0))
    return [xp.where(tops[0] < most, tops[0], most), *tops[1:]]


def _usual_tops(x: Array, mask: Array | None, top: Array, backend: Backend) -> Array:
    """The median over pieces of a view of the largest |entry| of every channel; `top` where that is 0: (..., 1, d)."""
    xp = backend.xp
    *_, n, d = x.shape
    pieces = min(n, _PIECES)
    rows = n // pieces
    size = xp.abs(_counted(x, mask, top.dtype, True, backend))[..., : pieces * rows, :]
    largest = xp.max(xp.reshape(size, (*size.shape[:-2], pieces, rows, d)), axis=-2)
    median = xp.sort(largest, axis=-2)[..., (pieces - 1) // 2, :][..., None, :]
    return xp.where(median > 0, median, top)


def units_of(tops: Sequence[Array], views: Sequence[Array], scale: float, backend: Backend) -> list[Array]:
    """Factors (..., 1, d) for query and keys whose product over the views is `scale` in every channel.

    They give all views the same largest entry in each channel, so that monomials neither overflow nor vanish; where a
    factor would leave the range of normal numbers, the other views take what is left of it.
    Powers of two, but for `scale` itself: multiplying by them rounds nothing. Scores, and with them every result,
    do not depend on the factors, hence they count as constants in the adjoint.
    """
    xp = backend.xp
    top = _stacked(tops, views, backend)
    two = xp.full_like(top[..., :1, :], 2.0)
    most = two * (LARGEST_POWER[backend.dtype_name(top.dtype)] / 2)
    least = -most

    def limited(powers: Array) -> Array:
        return xp.minimum(xp.maximum(powers, least), most)

    zero = top == 0
    fraction, exponent = frexp(scale)
    logs = limited(xp.round(xp.log2(xp.where(zero, 1.0, top))))
    total = xp.sum(logs, axis=-2, keepdims=True) + exponent
    count = xp.sum(backend.cast(zero, top.dtype), axis=-2, keepdims=True)
    # A channel that is 0 in some view takes the product that the others would need to reach size one.
    vacant = total / xp.where(count > 0, count, 1.0)
    target = xp.where(count > 0, 0.0, total * (1 / len(tops)))
    powers = limited(xp.round(xp.where(zero, vacant, target - logs)))
    left = exponent - xp.sum(powers, axis=-2, keepdims=True)
    # Only a gradient that overflows misses what a view of zeros cannot take, and large entries times zero would be NaN.
    left = xp.where((count > 0) & (left > 0), 0.0, left)
    chosen = []
    for view in range(len(views)):
        wanted = powers[..., view : view + 1, :]
        power = limited(wanted + left)
        left = left - (power - wanted)
        chosen.append(power)
    return _of_views(backend.power_of_two(xp.concat(chosen, axis=-2)), views, fraction, backend)


def over_blocks(body: Any, start: Any, rows: Sequence[Array | None], backend: Backend) -> Any:
    """The state after all blocks of the rows (..., n, d), which stay in the cache; a shard may have none."""
    x: Array = rows[0]
    if x.shape[-2] == 0:
        return start
    # Programs make no copies of rows that they reduce, and a loop would be one program more.
    if backend.compiles:
        return body(start, *rows)[0]
    row = backend.itemsize(x.dtype) * x.shape[-1] * prod(broadcast_leading(*rows))
    return backend.scan_rows(body, start, rows, int(max(_FEWEST, backend.cache // row)))[0]


def _counted(x: Array, mask: Array | None, dtype: object, finite: bool, backend: Backend) -> Array:
    """Rows (..., n, d), masked ones as 0, and those that are not `finite` if so asked."""
    xp = backend.xp
    x = backend.cast(clean(x, mask, backend), dtype)
    return xp.where(xp.all(xp.isfinite(x), axis=-1, keepdims=True), x, 0.0) if finite else x


def channel_tops(x: Array, mask: Array | None, backend: Backend, finite: bool = False, paired: bool = False) -> Array:
    """The largest |entry| of every channel over all rows, masked ones as 0, or over the `finite` ones: (..., 1, d).

    The largest modulus of complex channels, if they are `paired`, for either part.
    """
    xp = backend.xp
    dtype = backend.compute_dtype(x.dtype)

    def body(top: Array | None, rows: Array, mask: Array | None) -> tuple[Array, tuple[()]]:
        rows = sizes_of(_counted(rows, mask, dtype, finite, backend), paired, backend)
        largest = over_rows(xp.max, rows, backend)
        return (largest if top is None else xp.maximum(top, largest)), ()

    # So many are one block.
    if 0 < x.shape[-2] <= _FEWEST:
        return for_parts(body(None, x, mask)[0], paired, backend)
    shape = (*broadcast_leading(x, mask), 1, x.shape[-1] // (1 + paired))
    start = xp.zeros(shape, dtype=dtype, device=backend.device(x))
    return for_parts(over_blocks(body, start, (x, mask), backend), paired, backend)


def channel_sizes(
    x: Array, mask: Array | None, backend: Backend, finite: bool = False, paired: bool = False
) -> tuple[Array, Array]:
    """The largest |entry| of every channel, and its root mean square over all rows, masked ones as 0: (..., 1, d) each.

    Over the `finite` rows alone, the others as 0, or over all. Of complex channels, if they are `paired`, those of moduli.
    """
    xp = backend.xp
    dtype = backend.compute_dtype(x.dtype)

    def body(carry: tuple[Array, Array], rows: Array, mask: Array | None) -> tuple[tuple[Array, Array], tuple[()]]:
        top, squares = carry
        rows = sizes_of(_counted(rows, mask, dtype, finite, backend), paired, backend)
        return (
            xp.maximum(top, over_rows(xp.max, rows, backend)),
            squares + over_rows(xp.sum, rows * rows, backend),
        ), ()

    shape = (*broadcast_leading(x, mask), 1, x.shape[-1] // (1 + paired))
    zero = xp.zeros(shape, dtype=dtype, device=backend.device(x))
    found = over_blocks(body, (zero, zero), (x, mask), backend)
    top, squares = (for_parts(size, paired, backend) for size in found)
    spread = xp.sqrt(squares * (1 / x.shape[-2]))
    # Squares leave the dtype's range before the entries do; the largest entry then stands in.
    return top, xp.where((spread > 0) & xp.isfinite(spread), spread, top)
