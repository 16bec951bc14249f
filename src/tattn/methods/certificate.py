"""Bounds that come with the answer of the banded polynomial; docs/errors.md has the proofs.

Everything follows from moments Σ x^t over tuples of bands, t even, which are exactly the degree-t block of what the read-out
computes: Φ_t(q_i) (w ∘ A_J ∘ B_K), A and B summaries of degree t alone. With their columns weighted by |u_je|,

    E_i[e] = Σ_JK κ_IJK Σ_jk x^t |u_je| |v_ke|  ≥  |Ñ − N|[i, e],        E_i = Σ_JK κ_IJK Σ_jk x^t  ≥  |l̃ − l|_i,

and so |õ − o| ≤ (E_i[e] + |o| E_i) / l̃_i, where |o| is at most |õ| and the error itself. Gradients take sums of |x|^(t−1) and
of |e^x − 1| by Cauchy and Schwarz from the same block, and root mean squares of products of channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2, sqrt
from typing import NamedTuple

from ..approximation.exponential import DEFAULT_GRID
from ..arrays import broadcast_leading, clean, gather_rows, prod_of, with_leading
from ..backends import Array, Backend
from ..backends.operations import CHAIN
from ..bounds.rounding import LAMBDA, UNIT, chains, complex_units
from ..engines.features import block_of, channels, divided, summed_products, with_ones
from ..features.basis import Basis
from ..features.monomials import rank
from .bands import Banding, Series, Sorted, edges, level_sizes, multiply_out

# Columns of what is kept for the adjoint.
NORMALISER, ERROR, SPREAD, STEEP, ROUNDING, GROWTH, COLUMNS = range(7)


def block_t(call: Banding, dim: int) -> slice:
    """Where the monomials of degree t stand."""
    sizes = level_sizes(dim, call.moment)
    return slice(sum(sizes[:-1]), sum(sizes))


def summaries(call: Banding, view: Sorted, backend: Backend) -> tuple[Array, Array]:
    """For every band Φ(k)ᵀ [v, 1] / n, (..., B, r, dv + 1), and Φ_t(k)ᵀ [|v|, 1] / n, (..., B, r_t, dv + 1)."""
    xp = backend.xp
    n, dim = view.rows.shape[-2:]
    value_dim = view.values.shape[-1]  # type: ignore[union-attr]
    dtype = backend.compute_dtype(view.rows.dtype)
    part = block_t(call, dim)
    basis = Basis.of(dim, call.degree, value_dim + 1)
    shapes = [(basis.size, value_dim + 1), (part.stop - part.start, value_dim)]

    def prepare(k: Array, v: Array, mask: Array | None) -> tuple[Array, Array]:
        return backend.cast(clean(k, mask, backend), dtype) * view.by.unit, with_ones(v, mask, dtype, backend)

    def products(phi: Array, z: Array) -> tuple[Array, Array]:
        sizes = basis.row_sums(phi, xp.abs(z[..., :-1]), backend, degree=call.moment)
        return basis.row_sums(phi, z, backend), sizes

    plain, sizes = [], []
    for start, stop in edges(n, call.bands):
        rows = view.band(start, stop, backend)
        (one, _), (size, _) = summed_products(prepare, products, shapes, rows, basis, backend)
        plain.append(one)
        sizes.append(xp.concat([size, one[..., part, -1:]], axis=-1))
    return xp.stack(plain, axis=-3) * (1 / n), xp.stack(sizes, axis=-3) * (1 / n)


def moment_columns(
    series: Series, target: int, band: int, groups: Sequence[tuple[int, Sequence[Array]]], backend: Backend
) -> Array:
    """Columns (..., r_t, k) that read out Σ coefficient x^t for a band of the view `target`.

    `groups`: (0, 1 or 2 for the coefficients κ, κ′² R^(t−2) or K^t; (..., B, r_t, k) of every other view).
    """
    xp = backend.xp
    call = series.banding
    coefficients = series.of_band(target, band, series.table)[..., call.degree + 1 :]
    found = []
    for kind, tensors in groups:
        if call.paired:
            tensors = [series.turn(call.moment).turned(x, backend) for x in tensors]
        found.append(series.of_level(call.moment, coefficients[..., kind], tensors, backend))
    return xp.concat(found, axis=-1)


def in_range(tops: Sequence[Array], scale: float, backend: Backend) -> Array:
    """Whether products of channels with these largest entries (..., 1, ·), and their squares, stay normal numbers: (..., 1, 1)."""
    xp = backend.xp
    total: Array = abs(log2(scale))
    for top in tops:
        some = xp.isfinite(top) & (top > 0)
        size = xp.max(xp.abs(xp.log2(xp.where(some, top, 1.0))), axis=-1, keepdims=True)
        total = total + xp.where(xp.all(xp.isfinite(top), axis=-1, keepdims=True), size, xp.inf)
    exponents = -log2(float(xp.finfo(total.dtype).smallest_normal))
    return total < exponents / 2


class Roundings(NamedTuple):
    """What rounding adds to the sums with P and κ, with P′, with κ′² R^(t−2) and with K^t: (..., 1, 1) each.

    `known`: whether all ranges are in the table; beyond it κ stands for no bound, but P may grow faster than κ x^t.
    """

    plain: Array
    steep: Array
    squares: Array
    growth: Array
    known: Array


def roundings(
    series: Series, target: int, band: int, shares: Sequence[Array], value_dim: int, backend: Backend
) -> Roundings:
    """The model of `rounding` for a band of the view `target`; `shares`: the weight (..., B, 1, 1) of every other view's bands."""
    xp = backend.xp
    call = series.banding
    table = xp.abs(series.of_band(target, band, series.table))
    reach = series.of_band(target, band, series.ranges[..., None])[..., 0]
    m, t0, g = call.views, call.moment, call.degree
    lost = chains(m, CHAIN + rank(series.dim, g) / CHAIN + series.dim) + 4 + 2 * call.bands

    def counted(t: int, others: float = 0.0) -> float:
        found = (m + 1) * (t + 2) + lost + others
        return complex_units(found, t, series.dim, m) if call.paired else found

    plain = steep = xp.zeros_like(reach)
    for t in range(g + 1):
        size = table[..., t] + (table[..., g + 1] if t == t0 else 0.0)
        plain = plain + size * reach**t * counted(t)
        if t:
            steep = steep + t * table[..., t] * reach ** (t - 1) * counted(t, LAMBDA * sqrt(value_dim + 1) + 4)
    count = counted(t0)
    unit = UNIT["float64" if backend.dtype_name(table.dtype) == "float64" else "float32"]
    sizes = (plain, steep, *(table[..., g + 1 + kind] * reach**t0 * count for kind in (1, 2)))
    largest = xp.max(reach, axis=tuple(range(reach.ndim - m, reach.ndim)))[..., None, None]
    plain, steep, squares, growth = (multiply_out(size, shares, backend) * unit for size in sizes)
    return Roundings(plain, steep, squares, growth, largest <= DEFAULT_GRID[-1])


def shares(call: Banding, view: Sorted, backend: Backend) -> Array:
    """Unmasked rows of each band, or their weights, over all rows, (..., B, 1, 1)."""
    xp = backend.xp
    n = view.rows.shape[-2]
    dtype = backend.compute_dtype(view.rows.dtype)
    present = xp.ones((n, 1), dtype=dtype, device=backend.device(view.rows))
    if view.mask is not None:
        present = gather_rows(backend.cast(view.mask, dtype), view.by.order, backend)
    parts = [xp.sum(present[..., a:b, :], axis=(-2, -1)) * (1 / n) for a, b in edges(n, call.bands)]
    return xp.stack(parts, axis=-1)[..., None, None]


class Reading(NamedTuple):
    """What a band of the query reads out: summaries (..., r, dv + 1), moments (..., r_t, dv + 3), and how both round."""

    combined: Array
    moments: Array
    rounding: Roundings


def read_out(
    call: Banding, q: Array, unit: Array, reading: Reading, value_tops: Sequence[Array], backend: Backend
) -> tuple[Array, Array]:
    """The output (..., n, dv) of a band of the query, and `COLUMNS` columns of its certificate."""
    xp = backend.xp
    combined, moments, rounding = reading
    dtype, leading = backend.compute_dtype(q.dtype), broadcast_leading(q, combined)
    t = call.moment
    basis = Basis.of(q.shape[-1], call.degree, combined.shape[-1])
    features = basis.features(backend)
    main, more = basis.reader(combined, backend), basis.reader(moments, backend, degree=t)
    inverses = [xp.matrix_transpose(xp.where(t > 0, 1 / xp.where(t > 0, t, 1.0), 0.0)) for t in value_tops]
    # Products of values that leave the range of the dtype lose what no bound knows of.
    safe = in_range(value_tops, 1.0, backend)

    def body(_: None, block: Array) -> tuple[None, tuple[Array, Array]]:
        phi = features(channels(block, unit, dtype, backend))
        numerator, sums = basis.read(phi, main, backend), basis.read(phi, more, backend, degree=t)
        out, normaliser = divided(xp.matrix_transpose(numerator), leading, backend)
        errors = _row_errors(t, numerator, sums, inverses, rounding, backend)
        errors = xp.where(safe & rounding.known, errors, xp.inf)
        return None, (
            out,
            xp.concat([normaliser, with_leading(xp.matrix_transpose(errors), leading, backend)], axis=-1),
        )

    block = block_of(basis, basis.width(combined.shape[-1] + moments.shape[-1]), dtype, leading, backend)
    _, (out, rest) = backend.scan_rows(body, None, (q,), block)
    return out, rest


def _row_errors(
    moment: int,
    numerator: Array,
    sums: Array,
    inverses: Sequence[Array],
    rounding: Roundings,
    backend: Backend,
) -> Array:
    """Error, d, e′, ρ′ and F of every row, (..., 5, rows), all sums being over pairs.

    From Ñ and l̃ (..., dv + 1, rows), from E[e] and (Σ κ x^t, Σ κ′² R^(t−2) x^t, Σ K^t x^t), (..., dv + 3, rows), and one over the
    largest values of every view (..., dv, 1).
    """
    xp = backend.xp
    normaliser, value_dim = numerator[..., -1:, :], numerator.shape[-2] - 1
    sizes = prod_of([xp.abs(numerator[..., :-1, :]), *inverses])
    weighted, sums = prod_of([sums[..., :value_dim, :], *inverses]), sums[..., value_dim:, :]

    def positive(x: Array) -> Array:
        return xp.where(x <= 0, 0.0, x)  # and NaN stays

    safe = xp.where(normaliser > 0, normaliser, 1.0)
    d = (positive(sums[..., 0:1, :]) + rounding.plain) / safe
    of_channel = (positive(weighted) + rounding.plain) / safe
    inside = d < 1
    own = xp.where(inside, (sizes / safe + of_channel) / xp.where(inside, 1 - d, 1.0), 1.0)
    error = xp.max(of_channel + d * xp.where(own < 1, own, 1.0), axis=-2, keepdims=True)
    steep = xp.sqrt(positive(sums[..., 1:2, :]) + rounding.squares) / safe
    growth = (positive(sums[..., 2:3, :]) + rounding.growth) ** (1 / moment)
    finite = xp.isfinite(xp.max(sizes, axis=-2, keepdims=True))
    results = []
    for e in (error, d, steep, rounding.steep / safe, growth):
        # Where all is masked the answer is 0 exactly; where the normaliser lost its sign nothing is promised.
        known = xp.where((normaliser > 0) & xp.isfinite(e) & finite, e, xp.inf)
        results.append(xp.where(normaliser == 0, 0.0, known))
    return xp.concat(results, axis=-2)
