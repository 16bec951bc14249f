"""Bounds of the five (or 2 m + 1) gradients, entry by entry; docs/errors.md has the proofs.

Each takes the certificate that came with the answer and the gradient that is pulled back, and gives arrays of the shapes of
the gradients. Query rows are bounded one by one from their own certificate. A row of a key or value view sums over
query rows i and rows k of the other views, weighted by what row i contributes: the same moments Σ h_i x^t, read out at
that row from summaries of the query with h as its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log2
from typing import NamedTuple

from ..arrays import (
    broadcast_leading,
    clean,
    for_parts,
    gather_rows,
    over_rows,
    prod_of,
    return_rows,
    sizes_of,
    sum_of,
    sum_to_leading,
    weighed,
)
from ..backends import Array, Backend
from ..engines.features import block_of, channels, summed_products
from ..features.balance import ADDED, MANY, exp2_bound, log2_of, log2_range, log2_sum
from ..features.basis import Basis
from ..features.scaling import channel_sizes, channel_tops, shared_units
from ..operands import Attended, Gradients, Operands, Upstream, View
from .bands import BLOCK, Banding, Series, Sorted, edges, sorted_views
from .certificate import (
    ERROR,
    GROWTH,
    NORMALISER,
    ROUNDING,
    SPREAD,
    STEEP,
    block_t,
    in_range,
    moment_columns,
    roundings,
    shares,
)

# Means of squares over many rows round; by far less than this.
_SLACK = 1 + 1e-3


def stated_bounds(operands: Operands, upstream: Upstream, stated: tuple[float, float]) -> Gradients:
    """From (error, grad_error) that hold for every row alike.

    Sizes are multiplied as logarithms, and a product is at least what arithmetic loses where its factors vanish.
    """
    backend, scale, views = operands.backend, operands.scale, len(operands.views)
    xp = backend.xp
    q, keys, values, masks = operands.query, operands.keys, operands.values, operands.masks
    dtype, leading = operands.dtype, operands.leading
    rows = zip((q, *keys, *values), (None, *masks, *masks), strict=True)
    tops = [
        log2_of(channel_tops(x, mask, backend, paired=operands.paired and place <= views), backend)
        for place, (x, mask) in enumerate(rows)
    ]
    score_tops, value_tops = tops[: 1 + views], tops[1 + views :]
    size, of_lse = (log2_of(xp.abs(backend.cast(g, dtype)), backend) for g in upstream)
    least, most, end = log2_range(dtype, backend)

    def above(logs: Array) -> Array:
        """By how much a factor can raise what is lost of others."""
        return xp.where(logs > 0, logs, 0.0)

    def raised(product: Array, others: Array) -> Array:
        """A product of sizes, or what is lost of some of its factors times the others; nothing is lost of 0."""
        found = xp.where(product < end, xp.maximum(product, least + others), inf)
        return xp.where(product == -inf, product, found)

    whole, growth = sum_of(value_tops), sum_of([above(top) for top in value_tops])
    # |w − r| is at most twice the first term and once the second.
    both = [raised(size + whole, above(size) + growth), raised(of_lse, above(of_lse))]
    weight = log2_sum(xp.concat(both, axis=-1), -1, backend)
    total, total_out = (log2_sum(x, -2, backend) for x in (weight, size))

    error, steep = (log2(x) if x > 0 else -inf for x in stated)
    units = shared_units(operands)
    score = sum_of(score_tops) + log2(scale)
    lost = above(score) + xp.max(above(total_out) + growth, axis=-1, keepdims=True) + above(total)
    tiny = float(xp.finfo(dtype).smallest_normal)
    bounds, sizes = [], [total, total_out, whole]
    some_scores, some = ([xp.where(top > -inf, top, 0.0) for top in tops] for tops in (score_tops, value_tops))
    for view, unit in enumerate(units):
        others = sum_of([*score_tops[:view], *score_tops[view + 1 :]]) + log2(scale)
        # The last step multiplies by the unit, or by the scale; a unit that the dtype does not hold spoils all.
        usable = (unit >= tiny) & xp.isfinite(unit)
        last = xp.where(usable, log2_of(unit, backend), inf)
        last = xp.maximum(last, xp.full_like(last, log2(scale)))
        bounds.append(steep + raised((total if view else weight) + others, last + lost))
        sizes.append(xp.where(usable, xp.full_like(unit, least), inf))
        # What rows of the view are multiplied by, zeros of the others left out.
        others = sum_of([*some_scores[:view], *some_scores[view + 1 :]]) + log2(scale)
        sizes.append(most + others - (end - 1))
    for view, top in enumerate(some):
        others = sum_of([xp.zeros_like(whole), *value_tops[:view], *value_tops[view + 1 :]])
        lost = above(total_out) + growth
        if views >= MANY:
            # Values are balanced, and the last step multiplies by what balances them.
            lost = lost + above(sum_of(some) * (1 / views) - top)
        bounds.append(error + raised(total_out + others, lost))
        sizes.append(total_out + others)
    sizes += [most + over for over in _past_end(value_tops, operands)]
    inside = prod_of([backend.cast(xp.max(x, axis=(-2, -1), keepdims=True) < most, dtype) for x in sizes]) > 0
    results = []
    for bound, like, mask in zip(bounds, (q, *keys, *values), (None, *masks, *masks), strict=True):
        found = xp.where(inside, exp2_bound(bound, dtype, backend), inf)
        if like is not q:
            found = _rows_alike(found, mask, like, backend)
        results.append(sum_to_leading(xp.broadcast_to(found, (*leading, *like.shape[-2:])), like.shape[:-2], backend))
    # Those of logarithms of weights are sums of f (w − r): f̃ of the output takes the place of f, and r̃ that of r.
    lost = xp.max(above(total_out) + growth, axis=-1, keepdims=True) + above(total)
    both_errors = stated[1] + 3 * stated[0]
    bound = (log2(both_errors) if both_errors > 0 else -inf) + raised(total, lost)
    for w in operands.weights:
        found = xp.where(inside, exp2_bound(bound - log2_of(w, backend), dtype, backend), inf)
        found = xp.broadcast_to(clean(found, w, backend), (*leading, *w.shape[-2:]))
        results.append(sum_to_leading(found, w.shape[:-2], backend))
    # Nothing is promised of how fast keys decay.
    results += [xp.full_like(decay, inf) for decay in operands.decays]
    return Gradients.of(results, views)


def told_error(operands: Operands, error: float) -> Array:
    """The error of the output, or infinity where the largest values multiply to what arithmetic loses: (..., 1, 1)."""
    backend = operands.backend
    xp = backend.xp
    tops = [log2_of(channel_tops(v, mask, backend), backend) for _, v, mask in operands.views]
    size = sum_of(tops)
    least, most, _ = log2_range(size.dtype, backend)
    # Zeros in one view make no product zero that overflows before they come.
    others = sum_of([xp.where(top == -inf, 0.0, top) for top in tops])
    known = ((size == -inf) | (size > least)) & (others < most)
    # What sums of smaller values lose is more than what rounding takes of them anyway.
    fewest = least - ADDED
    for top in tops:
        known = known & ((top == -inf) | (top > fewest))
    for over in _past_end(tops, operands):
        known = known & (over < 0)
    told = xp.full_like(size[..., :1], error)
    return xp.where(xp.all(known, axis=-1, keepdims=True), told, inf)


class OneError:
    """What methods share whose error is stated once, for all rows alike."""

    def gradient_bounds(
        self, operands: Operands, attended: Attended, upstream: Upstream, stated: tuple[float, float]
    ) -> Gradients:
        """From what is stated."""
        return stated_bounds(operands, upstream, stated)

    def row_errors(self, kept: Array) -> None:
        """None: no row has an error of its own."""
        return


def _past_end(tops: Sequence[Array], operands: Operands) -> list[Array]:
    """By how much sums over all rows of values may leave the range: logarithms (..., 1, dv), below 0 where they do not."""
    end = log2_range(tops[0].dtype, operands.backend)[2]
    return [top + log2(max(1, v.shape[-2])) - (end - 1) for top, (_, v, _) in zip(tops, operands.views, strict=True)]


def _rows_alike(bound: Array, mask: Array | None, like: Array, backend: Backend) -> Array:
    """One bound (..., 1, k) for all rows of a view that are not masked: (..., n, k)."""
    shape = (*bound.shape[:-2], like.shape[-2], bound.shape[-1])
    return clean(backend.xp.broadcast_to(bound, shape), mask, backend)


def banded_bounds(call: Banding, operands: Operands, attended: Attended, upstream: Upstream) -> Gradients:
    """From the certificate of every row."""
    backend = operands.backend
    xp = backend.xp
    query, *views = sorted_views(call, operands)
    series = Series.of(call, [query, *views], operands.query, backend)
    sizes = [channel_sizes(v, mask, backend) for _, v, mask in operands.views]
    value_tops = [top for top, _ in sizes]
    rms = [
        _rms_products(call, own, top, v, backend) for own, top, v in zip(operands.views, value_tops, views, strict=True)
    ]
    per_row = (attended.out, attended.kept[0], *upstream)
    of_query = _query_bound(call, views, value_tops, rms, per_row, backend)
    weights = _weights(value_tops, per_row, backend)
    top = over_rows(xp.max, xp.abs(backend.cast(upstream.out, weights.dtype)), backend)
    known = _Known(series, query, views, sizes, rms, weights, top)
    of_views = [_view_bounds(known, number, backend) for number in range(call.views)]
    safe = in_range([query.by.tops, *(v.by.tops for v in views), *value_tops, top], call.scale, backend)
    bounds = [of_query, *(b[0] for b in of_views), *(b[1] for b in of_views)]
    found = [
        sum_to_leading(xp.where(safe, b, xp.inf), like.shape[:-2], backend)
        for b, like in zip(bounds, operands.targets, strict=False)
    ]
    # What those of weights would take is not summed up.
    unknown = [xp.where(w > 0, xp.full_like(w, inf), 0.0) for w in operands.weights]
    return Gradients.of([*found, *unknown], call.views)


def _rms_products(call: Banding, own: View, value_top: Array, view: Sorted, backend: Backend) -> Array:
    """Root mean squares of u_je a_jc over the rows of a view, (..., dv, d)."""
    xp = backend.xp
    k, v, _ = own
    dtype, n = backend.compute_dtype(k.dtype), k.shape[-2]
    tops = (view.by.tops, value_top)
    inverses = [xp.where(t > 0, 1 / xp.where(t > 0, t, 1.0), 0.0) for t in tops]

    def body(total: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, tuple[()]]:
        a, u = (backend.cast(clean(x, mask, backend), dtype) for x in (k, v))
        a = for_parts(sizes_of(a, call.paired, backend), call.paired, backend)
        a, u = (x * i for x, i in zip((a, u), inverses, strict=True))
        return total + xp.matrix_transpose(u * u) @ (a * a), ()

    start = xp.zeros((*own.leading, v.shape[-1], k.shape[-1]), dtype=dtype, device=backend.device(k))
    total, _ = backend.scan_rows(body, start, own, BLOCK)
    return xp.sqrt(total * (_SLACK / n)) * xp.matrix_transpose(value_top) * view.by.tops


def _query_bound(
    call: Banding,
    views: Sequence[Sorted],
    value_tops: Sequence[Array],
    rms: Sequence[Array],
    per_row: Sequence[Array],
    backend: Backend,
) -> Array:
    """(..., n, d): every row from its own certificate."""
    xp = backend.xp
    both, alone = prod_of(rms), prod_of([v.by.spread for v in views]) * _SLACK
    key_top = prod_of([v.by.tops for v in views])

    def body(_: None, *blocks: Array) -> tuple[None, tuple[Array]]:
        size, l, error, d, steep, rounding, growth, shift, weight, idle = _of_rows(value_tops, blocks, backend)
        inside = (d < 1) & (l > 0)
        least = xp.where(inside, l * (1 - d), 1.0)
        near = (1 + growth) / least
        bound = (steep + d * near) * (size @ both + shift * alone) + rounding * (weight + shift) * key_top
        drift = near * alone
        bound = bound + weight * error * xp.where(drift < key_top, drift, key_top)
        return None, (_promised(call.scale * bound, inside, (l == 0) | idle, backend),)

    _, (bound,) = backend.scan_rows(body, None, per_row, BLOCK)
    return bound


def _of_rows(value_tops: Sequence[Array], blocks: Sequence[Array], backend: Backend) -> tuple[Array, ...]:
    """|g|, l̃, error, d, e′, ρ′, F, |r̃| and W of a block of rows, (..., rows, ·), and whether they have no gradient."""
    xp = backend.xp
    out, rest, grad_out, grad_lse = blocks
    g = backend.cast(grad_out, rest.dtype)
    column = [rest[..., i : i + 1] for i in (NORMALISER, ERROR, SPREAD, STEEP, ROUNDING, GROWTH)]
    shift = xp.abs(xp.sum(g * out, axis=-1, keepdims=True) - backend.cast(grad_lse, rest.dtype))
    idle = (xp.max(xp.abs(g), axis=-1, keepdims=True) == 0) & (backend.cast(grad_lse, rest.dtype) == 0)
    weight = xp.sum(xp.abs(g) * prod_of(value_tops), axis=-1, keepdims=True)
    # What vanishes of a row's gradient is lost of its products with the largest values.
    lost = float(2.0 ** log2_range(weight.dtype, backend)[0])
    tops = prod_of([xp.where(t > 1, t, 1.0) for t in value_tops])
    weight = xp.where(idle, 0.0, weight + lost * xp.max(tops, axis=-1, keepdims=True))
    return xp.abs(g), *column, shift, weight, idle


def _weights(value_tops: Sequence[Array], per_row: Sequence[Array], backend: Backend) -> Array:
    """What a query row contributes to the rows of the views, (..., n, 4): ĝ/l̃, ĝ d/l, |r̃|/l̃ and (|r̃| d + |r̃ − r|)/l.

    ĝ_i = max_e |g_ie| over the largest of all rows.
    """
    xp = backend.xp
    top = over_rows(xp.max, xp.abs(backend.cast(per_row[2], per_row[1].dtype)), backend)
    inverse = xp.where(top > 0, 1 / xp.where(top > 0, top, 1.0), 0.0)

    def body(_: None, *blocks: Array) -> tuple[None, tuple[Array]]:
        size, l, error, d, _, _, _, shift, weight, idle = _of_rows(value_tops, blocks, backend)
        inside = (d < 1) & (l > 0)
        safe, least = xp.where(inside, l, 1.0), xp.where(inside, l * (1 - d), 1.0)
        largest = xp.max(size * inverse, axis=-1, keepdims=True)
        found = [largest / safe, largest * d / least, shift / safe, (shift * d + weight * error) / least]
        return None, (_promised(xp.concat(found, axis=-1), inside, (l == 0) | idle, backend),)

    _, (weights,) = backend.scan_rows(body, None, per_row, BLOCK)
    return weights


def _promised(bound: Array, known: Array, nothing: Array, backend: Backend) -> Array:
    """0 where there is nothing to bound, the bound where it is known, infinity elsewhere."""
    xp = backend.xp
    tiny = float(xp.finfo(bound.dtype).smallest_normal)
    bound = xp.where(bound < tiny, tiny, bound)
    return xp.where(nothing, 0.0, xp.where(known & xp.isfinite(bound), bound, xp.inf))


# The moments that bound a view: kind of coefficient, and which weight of the query's rows.
_SUMS = ((0, 0), (1, 0), (1, 2), (2, 1), (2, 3))


class _Known(NamedTuple):
    """What the bounds of all views take.

    Sizes of values (..., 1, dv) and of their products with keys, weights of the query's rows, the largest gradient by channel.
    """

    series: Series
    query: Sorted
    views: Sequence[Sorted]
    sizes: Sequence[tuple[Array, Array]]
    rms: Sequence[Array]
    weights: Array
    grad_top: Array


def _view_bounds(known: _Known, number: int, backend: Backend) -> tuple[Array, Array]:
    """(..., n_μ, d) for the keys of a view and (..., n_μ, dv) for its values."""
    xp = backend.xp
    series, query, views, sizes, rms, weights, grad_top = known
    call = series.banding
    view, t, dtype = views[number], call.moment, weights.dtype
    others = [i for i in range(call.views) if i != number]
    n, dim = view.rows.shape[-2:]
    value_dim = grad_top.shape[-1]
    basis = Basis.of(dim, t, len(_SUMS))
    falling = gather_rows(weights, query.by.order, backend)
    of_query = _moments(call, query, falling, backend)
    of_others = [_moments(call, views[i], None, backend) * (1 / views[i].rows.shape[-2]) for i in others]
    bands = edges(falling.shape[-2], call.bands)
    share = xp.stack([xp.sum(falling[..., a:b, :], axis=-2) for a, b in bands], axis=-2)[..., None, :]
    other_shares = [shares(call, views[i], backend) for i in others]
    # √Σ h_i and √Σ h_i q_ic² for every weight: sums of |q_ic| go against moments by Cauchy and Schwarz.
    mass = xp.sqrt(xp.matrix_transpose(over_rows(xp.sum, weights, backend)))
    moved = xp.sqrt(_weighted_squares(call, query, weights, backend))
    one = xp.ones_like(grad_top[..., :1])
    value_top, value_rms, key_top, key_rms = (
        (
            prod_of([one, *x])
            for x in zip(*((*sizes[i], views[i].by.tops, views[i].by.spread) for i in others), strict=True)
        )
        if others
        else (one,) * 4
    )
    both = prod_of([xp.matrix_transpose(grad_top) * xp.ones_like(rms[number]), *(rms[i] for i in others)])

    def growth(moment: Array, weight: int) -> Array:
        root = mass[..., weight : weight + 1, :]
        return root + moment ** (1 / t) * root ** (1 - 2 / t)

    def of_rows(band: int, start: int, stop: int) -> tuple[Array, ...]:
        groups = [(kind, [of_query[..., w : w + 1], *of_others]) for kind, w in _SUMS]
        reader = basis.reader(moment_columns(series, number + 1, band, groups, backend), backend, degree=t)
        lost = [
            roundings(series, number + 1, band, [share[..., w : w + 1], *other_shares], value_dim, backend)
            for w in range(4)
        ]
        added = xp.concat([lost[w][kind] for kind, w in _SUMS], axis=-1)
        features = basis.features(backend)

        def body(_: None, k: Array, v: Array, mask: Array | None) -> tuple[None, tuple[Array, ...]]:
            phi = features(channels(clean(k, mask, backend), view.by.unit, dtype, backend))
            sums = xp.matrix_transpose(basis.read(phi, reader, backend, degree=t)) + added
            sums = xp.where(sums <= 0, 0.0, sums)
            plain, slope, slope_alone, grown, grown_alone = (sums[..., i : i + 1] for i in range(len(_SUMS)))
            size = xp.abs(backend.cast(clean(v, mask, backend), dtype))
            near = growth(grown, 1)
            of_values = grad_top * (plain * value_top + near * mass[..., 1:2, :] * value_rms)
            beside = xp.sqrt(slope) * moved[..., 0:1, :] + near * moved[..., 1:2, :]
            alone = xp.sqrt(slope_alone) * moved[..., 2:3, :] + growth(grown_alone, 3) * moved[..., 3:4, :]
            largest = xp.sum(size * grad_top * value_top, axis=-1, keepdims=True)
            rounded = lost[0].steep * largest + lost[2].steep
            of_keys = beside * (size @ both) + alone * key_rms + rounded * query.by.tops * key_top
            bounds = (of_keys * (call.scale * _SLACK / n), of_values * (_SLACK / n))
            return None, tuple(clean(xp.where(xp.isfinite(b), b, xp.inf), mask, backend) for b in bounds)

        leading = broadcast_leading(weights, *(v.rows for v in views))
        block = block_of(basis, 4 * (dim + value_dim), dtype, leading, backend)
        return backend.scan_rows(body, None, view.band(start, stop, backend), block)[1]

    pieces = (of_rows(band, *cut) for band, cut in enumerate(edges(n, call.bands)))
    of_keys, of_values = return_rows(pieces, view.by.order, backend)
    return of_keys, of_values


def _moments(call: Banding, view: Sorted, z: Array | None, backend: Backend) -> Array:
    """Φ_t(x)ᵀ z of every band, (..., B, r_t, k), for z (..., n, k) in the order of the bands; a column of ones if not given."""
    xp = backend.xp
    n, dim = view.rows.shape[-2:]
    part, dtype = block_t(call, dim), backend.compute_dtype(view.rows.dtype)
    if z is None:
        z = xp.ones((n, 1), dtype=dtype, device=backend.device(view.rows))
    # A row counts as often as it weighs.
    basis = Basis.of(dim, call.moment, z.shape[-1])
    shape = (part.stop - part.start, z.shape[-1])

    def prepare(x: Array, z: Array, mask: Array | None) -> tuple[Array, Array]:
        return backend.cast(clean(x, mask, backend), dtype) * view.by.unit, weighed(z, mask, backend)

    def products(phi: Array, z: Array) -> tuple[Array]:
        return (basis.row_sums(phi, z, backend, degree=call.moment),)

    sums = []
    for start, stop in edges(n, call.bands):
        rows = view.band(start, stop, backend)._replace(values=z[..., start:stop, :])
        ((total, _),) = summed_products(prepare, products, [shape], rows, basis, backend)
        sums.append(total)
    return xp.stack(sums, axis=-3)


def _weighted_squares(call: Banding, query: Sorted, weights: Array, backend: Backend) -> Array:
    """Σ_i h_i q_ic² for weights (..., n, k): (..., k, d)."""
    xp = backend.xp
    inverse = xp.where(query.by.tops > 0, 1 / xp.where(query.by.tops > 0, query.by.tops, 1.0), 0.0)

    def body(total: Array, q: Array, h: Array) -> tuple[Array, tuple[()]]:
        size = sizes_of(backend.cast(q, h.dtype), call.paired, backend)
        relative = for_parts(size, call.paired, backend) * inverse
        return total + xp.matrix_transpose(h) @ (relative * relative), ()

    shape = (*broadcast_leading(query.rows, weights), weights.shape[-1], query.rows.shape[-1])
    start = xp.zeros(shape, dtype=weights.dtype, device=backend.device(weights))
    total, _ = backend.scan_rows(body, start, (query.rows, weights), BLOCK)
    return total * query.by.tops * query.by.tops * _SLACK
