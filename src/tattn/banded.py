"""The polynomial method in norm bands, with a bound of its error for every query row.

The rows of each view are sorted by their Hölder norm and cut into bands. A triple of bands (I, J, K) has its own range
R_IJK = scale · m_I m_J m_K, m the largest norm of a band, and so its own polynomial, P_IJK(x) = Σ_t c_t x^t with
|e^x − P| ≤ κ x^t on the range, t even: best where scores are small, and most are. Features are computed once, summaries
are kept for each band, and a query band I reads out C_I = Σ_JK w c_IJK ∘ A_J ∘ B_K, which costs nothing that grows
with the rows. One more column of C_I holds the moments: Σ_JK κ_IJK Σ_jk x^t is exactly its degree-t block

    E_i = Φ(q_i) · Σ_JK κ_IJK (w′ ∘ A_J1 ∘ B_K1)  ≥  |l̃_i − l_i|,        |õ − o|[i, e] ≤ 2 E_i / l̃_i · max|u_e| max|v_e|,

and a second one, with κ′² in the place of κ, bounds the gradients (docs/errors.md has the proofs). Bands, ranges and
coefficients are constants of the adjoint. Nothing depends on values read by the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import comb, sqrt
from typing import NamedTuple

import numpy as np

from .arrays import broadcast_leading, clean, gather_rows, prod_of, sum_to_leading, unpack
from .backends import Array, Backend
from .backends.base import memoized
from .channels import channel_units
from .exponential import DEFAULT_GRID, crowded_table
from .lowrank import (
    CHAIN,
    key_adjoint,
    log_normaliser,
    query_adjoint,
    read_out,
    summary,
)
from .monomials import multinomials, rank
from .ranges import balancing_units, channel_stats
from .rounding import LAMBDA, UNIT

# Beyond the last range of the grid no polynomial is certified; its κ stands for that and keeps arithmetic finite.
_NO_BOUND = 1e30


class BandedCall(NamedTuple):
    """What the computation depends on besides arrays; hashable."""

    degree: int
    moment: int
    bands: int
    scale: float
    views: int


class _View(NamedTuple):
    """One view, sorted: the query has no values."""

    rows: Array  # (..., n, d), by falling norm
    values: Array | None
    mask: Array | None
    order: Array  # (..., n, 1): where each sorted row came from
    norms: Array  # (..., bands): the largest of each band
    shares: Array  # (..., bands): unmasked rows of each band over all rows


def forward(call: BandedCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    """Output (..., n, dv), lse (..., n, 1), and (..., n, 3): normaliser over pairs, error, grad_error of each row."""
    q, keys, values, masks, _ = unpack(call.views, arrays)
    xp = backend.xp
    units, views, series, summaries = _banded(call, q, keys, values, masks, backend)
    leading = broadcast_leading(q, *keys, *values, *masks)
    value_dim = values[0].shape[-1]
    ones = [s[..., value_dim:] for s in summaries]
    outs, rests = [], []
    for band, (start, stop) in enumerate(edges(q.shape[-2], call.bands)):
        main = series.contract(call, 0, band, summaries, backend)
        moments = [series.moments(call, band, ones, kind, backend) for kind in ("kappa", "kappa_prime")]
        combined = xp.concat([main, *(xp.broadcast_to(m, (*main.shape[:-1], 1)) for m in moments)], axis=-1)
        out, more = read_out(
            views[0].rows[..., start:stop, :], units[0], combined, value_dim, leading, call.degree, backend
        )
        outs.append(out)
        rests.append(_with_errors(more, series.rounding(call, views, band, value_dim, backend), backend))
    out, rest = (xp.concat(parts, axis=-2) for parts in (outs, rests))
    back = _inverse(views[0].order, backend)
    out, rest = (gather_rows(x, back, backend) for x in (out, rest))
    return out, log_normaliser(rest[..., :1], keys, backend), rest


def backward(call: BandedCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Gradients of query, keys and values: the exact derivative of `forward` for fixed bands."""
    q, keys, values, masks, (out, rest, grad_out, grad_lse) = unpack(call.views, arrays)
    xp = backend.xp
    units, views, series, summaries = _banded(call, q, keys, values, masks, backend)
    leading = broadcast_leading(q, *keys, *values, *masks)
    columns = [gather_rows(x, views[0].order, backend) for x in (out, rest[..., :1], grad_out, grad_lse)]
    upstreams, dqs = [], []
    for band, (start, stop) in enumerate(edges(q.shape[-2], call.bands)):
        cut = (Ellipsis, slice(start, stop), slice(None))
        main = series.contract(call, 0, band, summaries, backend)
        upstream, dq = query_adjoint(
            views[0].rows[cut], units[0], main, [c[cut] for c in columns], leading, call.degree, backend
        )
        upstreams.append(upstream)
        dqs.append(dq)
    stacked = xp.stack(upstreams, axis=-3)
    d_keys, d_values = [], []
    for view in range(1, call.views + 1):
        tensors = [stacked, *summaries[: view - 1], *summaries[view:]]
        k: Array = views[view].rows
        v: Array = views[view].values
        pieces = []
        for band, (start, stop) in enumerate(edges(k.shape[-2], call.bands)):
            cut = (Ellipsis, slice(start, stop), slice(None))
            own = series.contract(call, view, band, tensors, backend) * (1 / k.shape[-2])
            mask = views[view].mask
            pieces.append(
                key_adjoint(k[cut], v[cut], None if mask is None else mask[cut], units[view], own, call.degree, backend)
            )
        back = _inverse(views[view].order, backend)
        dk, dv = (gather_rows(xp.concat(list(p), axis=-2), back, backend) for p in zip(*pieces, strict=True))
        d_keys.append(sum_to_leading(dk, keys[view - 1].shape[:-2], backend))
        d_values.append(sum_to_leading(dv, values[view - 1].shape[:-2], backend))
    dq = gather_rows(xp.concat(dqs, axis=-2), _inverse(views[0].order, backend), backend)
    return dq, *d_keys, *d_values


def leading_limit(call: BandedCall, backend: Backend, arrays: Sequence[Array | None]) -> int:
    """How many problems to compute side by side, so that their summaries fit in the workspace."""
    dim, columns = arrays[0].shape[-1], arrays[1 + call.views].shape[-1] + 1  # type: ignore[union-attr]
    numbers = rank(dim, call.degree) * columns * call.bands * (call.views + 3)
    return max(1, int(backend.workspace // numbers))


@memoized
def edges(n: int, bands: int) -> tuple[tuple[int, int], ...]:
    """(start, stop) of every band of n sorted rows: few in the first, where norms are largest and fall fastest."""
    ends = [max(i, round(n * (i / bands) ** 3)) for i in range(bands + 1)]
    return tuple(itertools.pairwise(ends))


class _Series(NamedTuple):
    """Coefficients, κ and κ′ for all tuples of bands: (..., bands of the query, of view 1, …, of view m, ·)."""

    table: Array  # (..., B, …, B, g + 3): c_0 … c_g, κ, κ′
    ranges: Array  # (..., B, …, B)
    dim: int

    @classmethod
    def of(cls, call: BandedCall, views: Sequence[_View], like: Array, backend: Backend) -> _Series:
        xp = backend.xp
        dtype = backend.compute_dtype(like.dtype)
        count = call.views + 1
        factors = []
        for axis, view in enumerate(views):
            shape = (*view.norms.shape[:-1], *(call.bands if i == axis else 1 for i in range(count)))
            factors.append(xp.reshape(view.norms, shape))
        # Norms round; a range is raised by more than they can be off, and then to the next one of the grid.
        reach = prod_of(factors) * (call.scale * (1 + 1e-5))
        steps = xp.log2(xp.where(reach > 0, reach, DEFAULT_GRID[0])) * 8 - 8 * np.log2(DEFAULT_GRID[0]).item()
        index = xp.clip(xp.ceil(steps + 1e-3), 0.0, float(len(DEFAULT_GRID)))
        flat = xp.reshape(backend.whole_numbers(index), (-1,))
        table = backend.table(_grid_table, call.degree, call.moment, like=like, dtype=dtype)
        chosen = xp.reshape(xp.take(table, flat, axis=0), (*index.shape, call.degree + 3))
        return cls(chosen, reach, like.shape[-1])

    def contract(self, call: BandedCall, target: int, band: int, tensors: Sequence[Array], backend: Backend) -> Array:
        """Coefficients w ∘ Σ c T_1 ∘ T_2 ∘ … over all bands of the other views, for one band of the view `target`: (..., r, k).

        `tensors`: (..., B, r, k) of every other view, in the order of the views.
        """
        xp = backend.xp
        coefficients = self._of_band(call, target, band, self.table)
        parts = []
        start = 0
        for t, size in enumerate(_level_sizes(self.dim, call.degree)):
            part = [x[..., start : start + size, :] for x in tensors]
            parts.append(_multiply_out(coefficients[..., t], part, backend))
            start += size
        weights = backend.table(multinomials, self.dim, call.degree, like=tensors[0], dtype=tensors[0].dtype)
        return xp.concat(parts, axis=-2) * weights[:, None]

    def moments(self, call: BandedCall, band: int, ones: Sequence[Array], kind: str, backend: Backend) -> Array:
        """The column (..., r, 1) that reads out Σ κ x^t ("kappa") or Σ κ′² x^(2t−2) ("kappa_prime")."""
        xp = backend.xp
        power = call.moment if kind == "kappa" else 2 * (call.moment - 1)
        sizes = _level_sizes(self.dim, call.degree)
        start = sum(sizes[:power])
        column = self._of_band(call, 0, band, self.table)[..., call.degree + (1 if kind == "kappa" else 2)]
        column = column if kind == "kappa" else column * column
        part = [x[..., start : start + sizes[power], :] for x in ones]
        block = _multiply_out(column, part, backend)
        weights = backend.table(multinomials, self.dim, call.degree, like=block, dtype=block.dtype)
        block = block * weights[start : start + sizes[power]][:, None]
        device = backend.device(block)

        def zeros(rows: int) -> Array:
            return xp.zeros((*block.shape[:-2], rows, 1), dtype=block.dtype, device=device)

        return xp.concat([zeros(start), block, zeros(sum(sizes[power + 1 :]))], axis=-2)

    def rounding(
        self, call: BandedCall, views: Sequence[_View], band: int, value_dim: int, backend: Backend
    ) -> tuple[Array, Array]:
        """What rounding adds to the normaliser and to the sums of the gradient, (..., 1, 1) each; the model of `rounding`."""
        xp = backend.xp
        table = xp.abs(self._of_band(call, 0, band, self.table))
        reach = self._of_band(call, 0, band, self.ranges[..., None])[..., 0]
        dim_rank = rank(self.dim, call.degree)
        m = call.views
        chains = LAMBDA * sqrt(CHAIN * (m + 1) + dim_rank / CHAIN + 32 * m) + 4 + 2 * call.bands
        plain = steep = xp.zeros_like(reach)
        for t in range(call.degree + 1):
            count = (m + 1) * (t + 2) + chains
            size = table[..., t] + (table[..., call.degree + 1] if t == call.moment else 0.0)
            plain = plain + size * reach**t * count
            if t:
                steep = steep + t * table[..., t] * reach ** (t - 1) * (count + LAMBDA * sqrt(value_dim + 1) + 2)
        unit = UNIT["float64" if backend.dtype_name(table.dtype) == "float64" else "float32"]
        shares = [view.shares[..., None] for view in views[1:]]
        sums = []
        for size in (plain, steep):
            total = _multiply_out(size, [xp.expand_dims(s, axis=-1) for s in shares], backend)
            sums.append(total * unit)
        return sums[0], sums[1]

    @staticmethod
    def _of_band(call: BandedCall, target: int, band: int, array: Array) -> Array:
        """One band of the view `target` of (..., B, …, B, k): (..., B, …, B, k) with one B less."""
        after = call.views - target
        return array[(Ellipsis, band, *(slice(None),) * after, slice(None))]


def _multiply_out(coefficients: Array, tensors: Sequence[Array], backend: Backend) -> Array:
    """Σ_JK… c_JK… T_J ∘ T_K ∘ …: (..., B, …, B) and (..., B, r, k) each → (..., r, k)."""
    xp = backend.xp
    bands, rows, columns = tensors[0].shape[-3:]
    flat = [xp.reshape(t, (*t.shape[:-2], rows * columns)) for t in tensors]
    outer = len(tensors) - 1
    lead = coefficients.shape[: coefficients.ndim - len(tensors)]
    result = xp.reshape(coefficients, (*lead, bands**outer, bands)) @ flat[-1]
    for t in reversed(flat[:-1]):
        result = xp.reshape(result, (*result.shape[:-2], result.shape[-2] // bands, bands, rows * columns))
        result = xp.sum(result * t[..., None, :, :], axis=-2)
    return xp.reshape(result, (*result.shape[:-2], rows, columns))


def _with_errors(more: Array, rounding: tuple[Array, Array], backend: Backend) -> Array:
    """(normaliser, error, grad_error) of each row from (normaliser, Σ κ x^t, Σ κ′² x^(2t−2)), all over pairs."""
    xp = backend.xp
    normaliser, moment, steep = more[..., :1], more[..., 1:2], more[..., 2:3]
    rho, rho_prime = rounding
    safe = xp.where(normaliser > 0, normaliser, 1.0)
    d = (xp.where(moment > 0, moment, 0.0) + rho) / safe
    d_prime = (xp.sqrt(xp.where(steep > 0, steep, 0.0)) + rho_prime) / safe
    error = 2 * d
    grad_error = (2 + 2 * d) * (d + d_prime) + 2 * d
    # Where all is masked the answer is 0 exactly; where the normaliser lost its sign or a range is beyond the grid,
    # nothing is promised.
    results = []
    for e in (error, grad_error):
        promised = (normaliser > 0) & xp.isfinite(e) & (d < _NO_BOUND / 1e15)
        results.append(xp.where(normaliser == 0, 0.0, xp.where(promised, e, xp.inf)))
    return xp.concat([normaliser, *results], axis=-1)


def _banded(
    call: BandedCall,
    q: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    masks: Sequence[Array | None],
    backend: Backend,
) -> tuple[list[Array], list[_View], _Series, list[Array]]:
    """What forward and adjoint start from: channel units, sorted views, polynomials, and summaries (..., B, r, dv + 1)."""
    units = channel_units(q, keys, masks, call.scale, backend)
    views = _views(call, q, keys, values, masks, backend)
    summaries = [_summaries(call, v, unit, backend) for v, unit in zip(views[1:], units[1:], strict=True)]
    return units, views, _Series.of(call, views, q, backend), summaries


def _views(
    call: BandedCall,
    q: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    masks: Sequence[Array | None],
    backend: Backend,
) -> list[_View]:
    """Query and keys with their values, sorted by norm."""
    xp = backend.xp
    dtype = backend.compute_dtype(q.dtype)
    given = [(q, None, None), *zip(keys, values, masks, strict=True)]
    stats = [channel_stats(x, mask, dtype, backend)[1] for x, _, mask in given]
    units = balancing_units(stats, backend)
    views = []
    for (x, v, mask), unit in zip(given, units, strict=True):
        unit = xp.reshape(unit, unit.shape[unit.ndim - x.ndim :])
        size = xp.abs(backend.cast(clean(x, mask, backend), dtype) * unit)
        norm = _holder_norm(size, call.views + 1, backend)
        order = xp.argsort(norm, axis=-1, descending=True)
        order = order[..., None]
        starts = [start for start, _ in edges(x.shape[-2], call.bands)]
        falling = gather_rows(norm[..., None], order, backend)[..., 0]
        norms = xp.stack([falling[..., s] for s in starts], axis=-1)
        rows = gather_rows(x, order, backend)
        value = None if v is None else gather_rows(v, order, backend)
        sorted_mask = None if mask is None else gather_rows(mask, order, backend)
        present = xp.ones_like(falling) if sorted_mask is None else backend.cast(sorted_mask[..., 0], dtype)
        shares = [
            xp.sum(present[..., start:stop], axis=-1) * (1 / x.shape[-2])
            for start, stop in edges(x.shape[-2], call.bands)
        ]
        views.append(_View(rows, value, sorted_mask, order, norms, xp.stack(shares, axis=-1)))
    return views


def _inverse(order: Array, backend: Backend) -> Array:
    """Where each row went, (..., n, 1), from where each sorted row came from."""
    return backend.xp.argsort(order[..., 0], axis=-1)[..., None]


def _holder_norm(size: Array, p: int, backend: Backend) -> Array:
    """ℓ_p norm of rows of absolute values: (..., n, d) → (..., n)."""
    xp = backend.xp
    top = xp.max(size, axis=-1, keepdims=True)
    relative = size / xp.where(top > 0, top, 1.0)
    power = relative * relative
    for _ in range(p - 2):
        power = power * relative
    return top[..., 0] * xp.sum(power, axis=-1) ** (1 / p)


def _summaries(call: BandedCall, view: _View, unit: Array, backend: Backend) -> Array:
    """Φ(k)ᵀ [v, 1] / n of every band, (..., B, r, dv + 1)."""
    n = view.rows.shape[-2]
    parts = [
        summary(
            view.rows[..., start:stop, :],
            view.values[..., start:stop, :],  # type: ignore[index]
            None if view.mask is None else view.mask[..., start:stop, :],
            unit,
            call.degree,
            backend,
        )
        for start, stop in edges(n, call.bands)
    ]
    return backend.xp.stack(parts, axis=-3) * (1 / n)


def _level_sizes(dim: int, degree: int) -> tuple[int, ...]:
    """Number of monomials of each degree."""
    return tuple(comb(dim + t - 1, t) for t in range(degree + 1))


@memoized
def _grid_table(degree: int, moment: int) -> np.ndarray:
    """Rows (c_0 … c_g, κ, κ′) for the ranges of the grid, and one more for all that is beyond."""
    rows = np.asarray(crowded_table(degree, moment))
    beyond = rows[-1].copy()
    beyond[-2:] = _NO_BOUND
    return np.vstack([rows, beyond])
