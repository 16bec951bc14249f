"""Sums over features of rows that hold some channels several times, or ones: through the monomials that are different.

Rows of `tattn.scores` are such rows. Monomials x^α of channels that are equal, or one, are equal to monomials y^ι(α) of the
channels y that are left, each of which stands for many. In units u that differ from copy to copy by ρ_c (u_c for ones, and else
u_c over the unit of the channel's like in y; −1 times that for −y), Φ(x)_α = ρ^α Φ(y)_ι(α), so that

    A_α = ρ^α (Φ(y)ᵀ [u, 1])_ι(α),      Φ(x) M = Φ(y) M′ with M′_δ = Σ_{ι(α) = δ} ρ^α M_α,

and every pass over rows has the fewer monomials. So have the slopes, of each channel of x by itself, with u_c = 1 for ones here:

    ∂/∂x_c Φ(x) M = u_c/ρ_c Σ_δ Φ(y)_δ Σ_{ι(β) = δ} (β_c + 1) ρ^(β + e_c) M_(β + e_c).

ρ is made of powers of two and the scale, and M′ of sums in short chains. All else is as in `features`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, log2
from typing import NamedTuple

import numpy as np

from ..arrays import broadcast_leading, clean, present, sum_to_leading, unweighed
from ..backends import Array, Backend
from ..backends.operations import CHAIN
from ..backends.tables import memoized
from ..features.balance import balanced_values, with_powers
from ..features.basis import Basis, pulled_by, read
from ..features.complex_channels import product
from ..features.monomials import Expansion, Grading, Monomials, exponents, features, lower, raised, raised_factors, rank
from ..features.scaling import shared_units
from ..operands import Attended, Gradients, Operands, Upstream, View
from .features import (
    FEWEST_BLOCKS,
    Sum,
    added,
    blocks_of,
    joined,
    log_normaliser,
    read_out,
    scaled_gradient,
    summary,
    weights,
    with_ones,
    zero_sum,
)

# How many times as many products with numbers of a row there have to be, at least: all those that are left are slower.
_TIMES = 3
# Rows that are compared at once.
_ROWS = 4096
# log2 of products of units that stay far from the ends of any dtype.
_FAR = 60


class Kinds(NamedTuple):
    """Of the channels of an array: of which kind each is, −1 for ones; a channel of each kind; and 1 or −1 times which it is."""

    own: tuple[int, ...]
    first: tuple[int, ...]
    signs: tuple[int, ...]

    @property
    def likes(self) -> tuple[int, ...]:
        """For each channel the first of its kind, and itself for ones."""
        return tuple(c if kind < 0 else self.first[kind] for c, kind in enumerate(self.own))


def parts_of(operands: Operands, expansion: Expansion, slopes: bool = False) -> list[Part] | None:
    """Query and keys by their different channels; None where it does not save enough, for `slopes` too, or digits would be lost."""
    backend, arrays = operands.backend, (operands.query, *operands.keys)
    which = operands.query.shape[-1], *expansion.monomials
    whole, rows = rank(*which), [x.shape[-2] for x in arrays]
    # What is recorded is differentiated channel by channel, however alike their numbers are.
    if not (backend.writable and backend.reads) or operands.paired or expansion.degree < 2:
        return None
    if sum(rows) * whole < backend.distinct:
        return None
    kinds = [_guessed(x, backend) for x in arrays]
    ranks = [rank(len(k.first), expansion.degree) for k in kinds]
    products = [float(r) for r in ranks]
    if slopes:
        # Of a sum, a read-out, and the slopes of every channel; where channels are different, of two and as many as one.
        lower = [rank(len(k.first), expansion.degree - 1) for k in kinds]
        products = [(2 * r + which[0] * own) / 3 for r, own in zip(ranks, lower, strict=True)]
    few = _TIMES * sum(n * p for n, p in zip(rows, products, strict=True)) <= sum(rows) * whole
    if not (few and all(_rounds_less(which, k, r) for k, r in zip(kinds, ranks, strict=True))):
        return None
    if not all(_are(k, x, backend) for k, x in zip(kinds, arrays, strict=True)):
        return None
    units = shared_units(operands)
    parts = [Part.of(x, unit, k, expansion, backend) for x, unit, k in zip(arrays, units, kinds, strict=True)]
    return parts if all(isfinite(x) and x < _FAR for part in parts for x in part.reach()) else None


def _rounds_less(which: tuple[int, int, Grading], kinds: Kinds, few: int) -> bool:
    """Whether sums over so `few` monomials, and before them over the copies of each, are no longer than what bounds count."""
    if not kinds.first:
        return False
    copies = max(table.shape[-1] for table in _groups(*which, kinds.own)[0])
    dim, whole = which[0], rank(*which)
    added = min(few, CHAIN) + few / CHAIN + len(kinds.first) + log2(copies)
    return bool(added <= CHAIN + whole / CHAIN + dim)


def forward(operands: Operands, expansion: Expansion, parts: Sequence[Part]) -> Attended:
    """As `features.forward`."""
    backend, q = operands.backend, operands.query
    of_query, *of_keys = parts
    summaries = _summaries(operands, of_keys)
    combined = product(weights(expansion, q, backend), summaries, None, backend)
    out, normaliser = read_out(of_query.rows, of_query.unit, of_query.joined(combined), of_query.monomials, backend)
    return Attended(out, log_normaliser(normaliser, operands.keys, backend), (normaliser, *summaries))


def backward(
    operands: Operands, expansion: Expansion, parts: Sequence[Part], attended: Attended, upstream: Upstream
) -> Gradients:
    """As `features.backward`."""
    backend, q = operands.backend, operands.query
    normaliser, *kept = attended.kept
    operands, kept, powers = balanced_values(operands, kept)
    of_query, *of_keys = parts
    summaries = kept or _summaries(operands, of_keys)
    w = weights(expansion, q, backend)
    columns = (attended.out, normaliser, *upstream)
    sums, dq = _query_adjoint(q, of_query, product(w, summaries, None, backend), columns)
    of_views: list[Sequence[Array]] = []
    for number, (part, view) in enumerate(zip(of_keys, operands.views, strict=True)):
        if not operands.wants(number):
            count = 3 if operands.weights else 2
            of_views.append([backend.xp.zeros_like(x, dtype=operands.dtype) for x in view[:count]])
            continue
        others = [s for other, s in enumerate(summaries) if other != number]
        own = product(w, [of_query.spread(sums), *others], None, backend) * (1 / view.keys.shape[-2])
        of_views.append(_key_adjoint(view, part, own))
    found = Gradients.of_views(dq, of_views)
    return found._replace(values=with_powers(found.values, powers, backend))


def _summaries(operands: Operands, parts: Sequence[Part]) -> list[Array]:
    """Φ(k)ᵀ [v, 1] / n_μ for every view, (..., r, dv + 1)."""
    return [
        part.spread(summary(View(part.rows, *view[1:]), part.unit, part.monomials, operands.backend))
        * (1 / view.keys.shape[-2])
        for part, view in zip(parts, operands.views, strict=True)
    ]


class Part(NamedTuple):
    """An array by the different ones of its channels.

    `rows` (..., n, d') and their `unit` (..., 1, d'); of all channels what their slopes are multiplied by, (..., 1, d), and of all
    monomials ρ^α, (..., r, 1).
    """

    rows: Array
    unit: Array
    slope: Array
    shares: Array
    which: tuple[int, int, Grading, tuple[int, ...]]
    backend: Backend

    @classmethod
    def of(cls, x: Array, unit: Array, kinds: Kinds, expansion: Expansion, backend: Backend) -> Part:
        """Of an array (..., n, d) with units (..., 1, d)."""
        xp = backend.xp
        first, likes = (backend.table(np.asarray, indices, like=x) for indices in (kinds.first, kinds.likes))
        ones = backend.table(_ones, kinds.own, like=x) > 0
        alike = xp.take(unit, likes, axis=-1) * backend.table(np.asarray, kinds.signs, like=x, dtype=unit.dtype)
        ratio = xp.where(ones, unit, unit / alike)
        monomials = expansion.monomials
        shares = features(xp.matrix_transpose(ratio), monomials.degree, backend, monomials.grading)
        slope = xp.where(ones, xp.ones_like(unit), alike)
        which = (x.shape[-1], *monomials, kinds.own)
        return cls(xp.take(x, first, axis=-1), xp.take(unit, first, axis=-1), slope, shares, which, backend)

    def reach(self) -> list[float]:
        """How far ρ^α may be from 1, as log2."""
        sizes = self.backend.xp.abs(self.shares)
        ends = self.backend.read([self.backend.xp.max(sizes), self.backend.xp.min(sizes)])
        return [abs(log2(float(x))) if x > 0 else inf for x in ends]

    @property
    def monomials(self) -> Monomials:
        """Those of the different channels."""
        return Monomials(self.which[1])

    def spread(self, sums: Array) -> Array:
        """A (..., r, k) of all monomials, from sums of the different ones (..., r', k)."""
        places = self.backend.table(_places, *self.which, like=sums)
        return self.backend.xp.take(sums, places, axis=-2) * self.shares

    def joined(self, matrix: Array) -> Array:
        """M′ (..., r', k) for M (..., r, k)."""
        return self._summed(matrix * self.shares, self.which[1])

    def derivative(self, matrix: Array) -> Array:
        """Of every channel c the sums over (β_c + 1) M[β + e_c], transposed: (..., d · k, r″), for M (..., r, k)."""
        backend, (dim, degree, grading, _) = self.backend, self.which
        xp = backend.xp
        matrix = matrix * self.shares
        index = backend.table(raised, dim, degree, grading, like=matrix)
        factors = backend.table(raised_factors, dim, degree, grading, like=matrix, dtype=matrix.dtype)
        found, start = [], 0
        for c in range(dim):
            stop = start + lower(dim, degree, grading, c)
            slopes = xp.take(matrix, index[start:stop], axis=-2) * factors[start:stop, None]
            found.append(xp.matrix_transpose(self._summed(slopes, degree - 1, stop - start)))
            start = stop
        return xp.concat(found, axis=-2)

    def _summed(self, terms: Array, degree: int, count: int | None = None) -> Array:
        """Sums (..., r', k) of terms (..., r, k) whose monomials, the first `count` of all, are the same one up to this degree."""
        xp, backend = self.backend.xp, self.backend
        which = (*self.which, degree, count)
        none = xp.zeros((*terms.shape[:-2], 1, terms.shape[-1]), dtype=terms.dtype, device=backend.device(terms))
        terms = xp.concat([terms, none], axis=-2)
        parts = []
        for i, (size, copies) in enumerate(table.shape for table in _groups(*which)[0]):
            index = backend.table(_group, *which, i, like=terms)
            part = xp.take(terms, index, axis=-2)
            part = xp.reshape(part, (*terms.shape[:-2], size, copies, terms.shape[-1]))
            while part.shape[-2] > 1:
                half = part.shape[-2] // 2
                part = part[..., :half, :] + part[..., half:, :]
            parts.append(part[..., 0, :])
        return xp.take(xp.concat(parts, axis=-2), backend.table(_order, *which, like=terms), axis=-2)


def _query_adjoint(q: Array, part: Part, combined: Array, columns: Sequence[Array]) -> tuple[Array, Array]:
    """Φ(y)ᵀ ĝ (..., r', dv + 1) and dq, from C (..., r, dv + 1) and the columns (o, l, g, g_lse)."""
    backend = part.backend
    dtype, leading = backend.compute_dtype(q.dtype), broadcast_leading(q, combined)
    k = combined.shape[-1]
    basis = Basis(part.rows.shape[-1], part.which[1], False)
    block, together = blocks_of(basis, k * (q.shape[-1] + 1), dtype, leading, backend)
    monomials, derivative = basis.features(backend), part.derivative(combined)

    def of_block(sums: Array | None, x: Array, g_hat: Array) -> tuple[Array, tuple[Array]]:
        phi = monomials(backend.xp.matrix_transpose(x))
        found = basis.row_sums(phi, g_hat, backend)
        return found if sums is None else sums + found, (pulled_by(phi, derivative, g_hat, backend),)

    def body(carry: Sum | None, rows: Array, *blocks: Array) -> tuple[Sum, tuple[Array]]:
        o, l, g, g_lse = (backend.cast(b, dtype) for b in blocks)
        x, g_hat = backend.cast(rows, dtype) * part.unit, scaled_gradient(o, l, g, g_lse, backend)
        sums, (dq,) = backend.scan_rows(of_block, None, (x, g_hat), block)
        return added(carry, sums, backend), (sum_to_leading(dq * part.slope, q.shape[:-2], backend),)

    start = None if q.shape[-2] <= together else zero_sum((*leading, basis.size, k), dtype, q, backend)
    carries, (dq,) = backend.share_rows(body, start, (part.rows, *columns), together, FEWEST_BLOCKS * block)
    return joined(carries)[0], dq


def _key_adjoint(view: View, part: Part, own: Array) -> tuple[Array, ...]:
    """(dk, dv), and those of weights if there are, of a view whose summary has the gradient `own` (..., r, dv + 1)."""
    backend, (k, v, mask) = part.backend, view
    xp = backend.xp
    dtype = backend.compute_dtype(k.dtype)
    own = sum_to_leading(own, view.leading, backend)
    basis = Basis(part.rows.shape[-1], part.which[1], False)
    block, together = blocks_of(basis, own.shape[-1] * (k.shape[-1] + 1), dtype, view.leading, backend)
    monomials, derivative = basis.features(backend), part.derivative(own)
    values = xp.matrix_transpose(part.joined(own))

    def of_block(_: None, x: Array, z: Array) -> tuple[None, tuple[Array, Array]]:
        phi = monomials(xp.matrix_transpose(x))
        return None, (pulled_by(phi, derivative, z, backend), xp.matrix_transpose(read(phi, values, backend)))

    def body(_: None, rows: Array, v: Array, mask: Array | None) -> tuple[None, tuple[Array, ...]]:
        x = backend.cast(rows, dtype) * part.unit
        if mask is not None:
            x = xp.where(present(mask, backend), x, 1.0)
        dk, dz = backend.scan_rows(of_block, None, (x, with_ones(v, mask, dtype, backend)), block)[1]
        grads = clean(dk * part.slope, mask, backend), *unweighed(dz, v, mask, backend)
        return None, tuple(sum_to_leading(g, a.shape[:-2], backend) for g, a in zip(grads, (k, v, mask), strict=False))

    return backend.share_rows(body, None, (part.rows, v, mask), together, FEWEST_BLOCKS * block)[1]


def _guessed(x: Array, backend: Backend) -> Kinds:
    """What a few rows of an array (..., n, d) say of its channels."""
    n, dim = x.shape[-2:]
    (some,) = backend.read([x[..., :: max(1, n // 2), :]])
    some = np.reshape(some, (-1, dim))
    kinds: dict[bytes, int] = {}
    own: list[int] = []
    first: list[int] = []
    signs: list[int] = []
    for c in range(dim):
        column = some[:, c]
        if np.all(column == 1):
            own.append(-1)
            signs.append(1)
            continue
        # 0 has no sign here.
        kind = kinds.setdefault((abs(column) + 0.0 * column).tobytes(), len(first))
        if kind == len(first):
            first.append(c)
        own.append(kind)
        signs.append(1 if np.array_equal(column, some[:, first[kind]]) else -1)
    return Kinds(tuple(own), tuple(first), tuple(signs))


def _are(kinds: Kinds, x: Array, backend: Backend) -> bool:
    """Whether all rows are so."""
    xp = backend.xp
    likes, ones = backend.table(np.asarray, kinds.likes, like=x), backend.table(_ones, kinds.own, like=x) > 0
    signs = backend.table(np.asarray, kinds.signs, like=x, dtype=x.dtype)
    for start in range(0, x.shape[-2], _ROWS):
        rows = x[..., start : start + _ROWS, :]
        same = xp.where(ones, rows == 1, rows == xp.take(rows, likes, axis=-1) * signs)
        if not bool(xp.all(same)):
            return False
    return True


def _ones(own: tuple[int, ...]) -> np.ndarray:
    """1 where a channel is one, (d,)."""
    return np.asarray([kind < 0 for kind in own], dtype=np.int64)


@memoized
def _places(dim: int, degree: int, grading: Grading, own: tuple[int, ...]) -> np.ndarray:
    """ι(α): where the monomial of the different channels stands that each of all monomials is equal to, (r,)."""
    count = max(own) + 1
    onto = np.zeros((dim, count), dtype=np.int64)
    for c, kind in enumerate(own):
        if kind >= 0:
            onto[c, kind] = 1
    # A random linear form tells multi-indices apart; the check below makes sure that it did.
    form = np.random.default_rng(0).integers(1, 1 << 40, count)
    few, whole = exponents(count, degree).astype(np.int64), exponents(dim, degree, grading).astype(np.int64) @ onto
    order = np.argsort(few @ form)
    found = order[np.searchsorted((few @ form)[order], whole @ form)]
    if not np.array_equal(few[found], whole):
        raise AssertionError("two multi-indices share a key")
    return found


@memoized
def _groups(
    dim: int, degree: int, grading: Grading, own: tuple[int, ...], most: int | None = None, count: int | None = None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Of each monomial of the different channels up to the degree `most`, the places of its copies among the first `count`.

    In tables of as many copies, a power of two, (monomials, copies), filled with `count`; and where each monomial stands in them.
    """
    targets = _places(dim, degree, grading, own)[:count]
    size = rank(max(own) + 1, degree if most is None else most)
    copies = np.bincount(targets, minlength=size)
    sources = np.argsort(targets, kind="stable")
    ends = np.cumsum(copies)
    width = np.maximum(1, 2 ** np.ceil(np.log2(np.maximum(copies, 1))).astype(np.int64))
    tables, members = [], []
    for w in np.unique(width):
        (chosen,) = np.nonzero(width == w)
        table = np.full((len(chosen), int(w)), len(targets), dtype=np.int64)
        for row, target in enumerate(chosen):
            table[row, : copies[target]] = sources[ends[target] - copies[target] : ends[target]]
        tables.append(table)
        members.append(chosen)
    return tables, np.argsort(np.concatenate(members))


def _group(*which: object) -> np.ndarray:
    """One of the tables of `_groups`, as one row of places."""
    *known, i = which
    return np.reshape(_groups(*known)[0][i], (-1,))  # type: ignore[arg-type, call-overload]


def _order(*which: object) -> np.ndarray:
    """Where each monomial stands in the tables of `_groups`."""
    return _groups(*which)[1]  # type: ignore[arg-type]
