"""The rows of every view sorted by norm into bands, and a polynomial for every tuple of bands.

Rows are sorted by their Hölder norm, after channels have been rescaled so that all views have the same root mean
square in each. A tuple of bands (I, J, K) has the range R_IJK = scale · m_I m_J m_K, m the largest norm of a band, and the
polynomial of that range, P_IJK(x) = Σ_t c_t x^t with |e^x − P| ≤ κ x^t, from a table. Bands are slices of fixed size, and
nothing depends on values read by the host.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import comb, isfinite, log
from typing import NamedTuple

import numpy as np

from ..approximation.exponential import DEFAULT_GRID, crowded_table
from ..arrays import clean, gather_rows, max_to_leading, prod_of, rows_together, sizes_of, sum_of
from ..backends import Array, Backend
from ..backends.tables import memoized
from ..bounds.score_range import balancing_units
from ..features.balance import balanced_factors
from ..features.complex_channels import Turn, complex_weights, conjugate, multiply
from ..features.monomials import multinomials
from ..features.scaling import finite_sizes, units_of
from ..operands import Operands, View

# Beyond the last range of the grid no polynomial is certified; its κ stands for that and keeps arithmetic finite.
NO_BOUND = 1e30
# Rows of a block of which something is kept for every row.
BLOCK = 8192


class Banding(NamedTuple):
    """Degree of the polynomials, order of the moments and number of bands, for scores of so many views.

    `paired`: channels are complex, and norms are of moduli.
    """

    degree: int
    moment: int
    bands: int
    scale: float
    views: int
    paired: bool = False


class Sorting(NamedTuple):
    """How the rows of a view are sorted, and their sizes: all arrays, of which the adjoint needs no second look at the rows."""

    order: Array  # (..., n, 1): where each sorted row came from
    unit: Array  # (..., 1, d): factors of the channels for monomials
    tops: Array  # (..., 1, d): the largest |entry| of every channel
    spread: Array  # (..., 1, d): its root mean square over all rows, masked ones counted as 0
    norms: Array  # (..., bands, 1): the largest of each band; their product over the views bounds scores


class Sorted(NamedTuple):
    """One view and how it is sorted: the query has no values."""

    rows: Array  # (..., n, d)
    values: Array | None
    mask: Array | None
    by: Sorting

    def band(self, start: int, stop: int, backend: Backend) -> View:
        """Rows, values and mask of a band; the first has the rows of the largest norms."""
        given = (self.rows, self.values, self.mask)
        return View(*(None if x is None else self.in_band(x, start, stop, backend) for x in given))

    def in_band(self, x: Array, start: int, stop: int, backend: Backend) -> Array:
        """Of what has one row for each of the view's, (..., n, k), those of a band."""
        return gather_rows(x, self.by.order[..., start:stop, :], backend)


@memoized
def edges(n: int, bands: int) -> tuple[tuple[int, int], ...]:
    """(start, stop) of every band of n sorted rows: few in the first, where norms are largest and fall fastest."""
    # By cubes, or so that the first band has some four rows: tails grow with the rows.
    power = max(3.0, log(n / 4) / log(bands)) if bands > 1 and n > 4 else 3.0
    ends = [max(i, round(n * (i / bands) ** power)) for i in range(bands + 1)]
    return tuple(itertools.pairwise(ends))


def sortings(call: Banding, rows: Sequence[Array], masks: Sequence[Array | None], backend: Backend) -> list[Sorting]:
    """How norms sort query and keys."""
    xp = backend.xp
    sizes = finite_sizes(rows, masks, backend, call.paired)
    units = units_of([top for top, _ in sizes], rows, call.scale, backend)
    # In units no channel is far from the others' size, and what balances them is a small factor.
    spreads = [
        max_to_leading(spread * unit, tuple(x.shape[:-2]), backend)
        for (_, spread), unit, x in zip(sizes, units, rows, strict=True)
    ]
    balances = balancing_units(spreads, backend)
    found = []
    for x, mask, unit, balance, (top, spread) in zip(rows, masks, units, balances, sizes, strict=True):
        balance = xp.reshape(balance, balance.shape[balance.ndim - x.ndim :])
        norm = _norms((x, mask), unit * balance, call, backend)
        cut = edges(x.shape[-2], call.bands)
        order = _by_size(norm, call.bands, backend)
        falling = gather_rows(norm, order, backend)
        tops = [xp.max(falling[..., start:stop, :], axis=-2, keepdims=True) for start, stop in cut]
        found.append(Sorting(order, unit, top, spread, xp.concat(tops, axis=-2)))
    return found


def _by_size(norm: Array, bands: int, backend: Backend) -> Array:
    """Numbers of the rows, band by band, the largest norms first: (..., n, 1) → (..., n, 1).

    Within a band rows keep the order in which they came: memory is then read forwards.
    """
    xp = backend.xp
    norm = norm[..., 0]
    falling = xp.sort(norm, axis=-1, descending=True, stable=False)
    # How many bands begin with a norm as large: to sort such small numbers is quick. Rows as large as the first of a
    # band may leave their place before it to smaller ones; no band's largest is above that of a sort.
    small = xp.uint8 if bands < 256 else xp.int32
    starts = [start for start, _ in edges(norm.shape[-1], bands)]
    number = sum_of([xp.astype(norm <= falling[..., start : start + 1], small) for start in starts])
    return xp.argsort(number, axis=-1, stable=True)[..., None]


def sorted_views(call: Banding, operands: Operands, known: Sequence[Array] = ()) -> list[Sorted]:
    """Query, and keys with their values; `known`: the arrays of all sortings, if they are."""
    backend, rows, masks = operands.backend, (operands.query, *operands.keys), (None, *operands.masks)
    width = len(Sorting._fields)
    found = [Sorting(*known[i : i + width]) for i in range(0, len(known), width)]
    found = found or sortings(call, rows, masks, backend)
    given = (rows, (None, *operands.values), masks)
    together = ([None if x is None else rows_together(x, backend) for x in arrays] for arrays in given)
    return [Sorted(*view) for view in zip(*together, found, strict=True)]


def _norms(view: tuple[Array, Array | None], unit: Array, call: Banding, backend: Backend) -> Array:
    """An upper bound, but for rounding, of the Hölder norm of every row, 0 if it is not finite: (..., n, d) → (..., n, 1)."""
    xp, (x, mask), p = backend.xp, view, call.views + 1
    dtype, dim = backend.compute_dtype(x.dtype), x.shape[-1] // (1 + call.paired)
    ones = xp.ones((dim, 1), dtype=dtype, device=backend.device(x))
    # What powers lose by underflow.
    lost = dim * float(xp.finfo(dtype).smallest_normal)

    def norms(finite: bool) -> Array:
        def body(_: None, rows: Array, mask: Array | None) -> tuple[None, tuple[Array]]:
            rows = backend.cast(clean(rows, mask, backend), dtype)
            # A product sums a few numbers faster than a sum does.
            norm = (prod_of([sizes_of(rows * unit, call.paired, backend)] * p) @ ones + lost) ** (1 / p)
            if finite:
                # Such a row is NaN in the answer, whatever its band, and no other row is to share its range.
                norm = xp.where(xp.all(xp.isfinite(rows), axis=-1, keepdims=True), norm, 0.0)
            return None, (norm,)

        return backend.scan_rows(body, None, (x, mask), BLOCK)[1][0]

    norm = norms(not backend.reads)
    return norms(True) if backend.reads and not isfinite(float(xp.max(norm))) else norm


class Series(NamedTuple):
    """Coefficients, κ and the like for all tuples of bands: (..., bands of the query, of view 1, …, of view m, ·)."""

    banding: Banding
    table: Array  # (..., B, …, B, g + 4): c_0 … c_g, κ, κ′² R^(t−2), K^t
    ranges: Array  # (..., B, …, B)
    dim: int

    @classmethod
    def of(cls, call: Banding, views: Sequence[Sorted], like: Array, backend: Backend) -> Series:
        """The polynomials for the norms of the views' bands."""
        xp = backend.xp
        dtype = backend.compute_dtype(like.dtype)
        count = call.views + 1
        factors = []
        for axis, view in enumerate(views):
            norms = view.by.norms[..., 0]
            shape = (*norms.shape[:-1], *(call.bands if i == axis else 1 for i in range(count)))
            factors.append(xp.reshape(norms, shape))
        # Norms round; a range is raised by more than they can be off, and then to the next one of the grid.
        slack = 2.0 * count * (like.shape[-1] + 16) * float(xp.finfo(dtype).eps)
        reach = prod_of(factors) * (1 + slack)
        steps = xp.log2(xp.where(reach > 0, reach, DEFAULT_GRID[0])) * 8 - 8 * np.log2(DEFAULT_GRID[0]).item()
        # Not by `clip`, which reads values in some libraries.
        index = xp.ceil(steps + 1e-3)
        index = xp.where(index > 0, index, 0.0)
        index = xp.where(reach <= DEFAULT_GRID[-1], index, float(len(DEFAULT_GRID)))
        flat = xp.reshape(backend.whole_numbers(index), (-1,))
        table = backend.table(_grid_table, call.degree, call.moment, like=like, dtype=dtype)
        chosen = xp.reshape(xp.take(table, flat, axis=0), (*index.shape, call.degree + 4))
        return cls(call, chosen, reach, like.shape[-1])

    def of_band(self, target: int, band: int, array: Array) -> Array:
        """One band of the view `target` of (..., B, …, B, k): (..., B, …, B, k) with one B less."""
        after = self.banding.views - target
        return array[(Ellipsis, band, *(slice(None),) * after, slice(None))]

    def contract(self, target: int, band: int, tensors: Sequence[Array], backend: Backend) -> Array:
        """Coefficients w ∘ Σ c T_1 ∘ T_2 ∘ … over all bands of the other views, for one band of the view `target`: (..., r, k).

        `tensors`: (..., B, r, k) of every other view, in the order of the views, `turned`.
        """
        xp = backend.xp
        degree = self.banding.degree
        coefficients = self.of_band(target, band, self.table)
        tensors = balanced_factors(tensors, backend, axes=2)
        parts = []
        start = 0
        for t, size in enumerate(level_sizes(self.dim, degree)):
            part = [x[..., start : start + size, :] for x in tensors]
            parts.append(self.of_level(t, coefficients[..., t], part, backend))
            start += size
        return xp.concat(parts, axis=-2)

    def turned(self, tensors: Sequence[Array], backend: Backend) -> Sequence[Array]:
        """Sums (..., r, k) of all monomials as they are multiplied: of complex ones degree by degree, if channels are complex."""
        if not self.banding.paired:
            return tensors
        return [self._turned(x, backend) for x in tensors]

    def _turned(self, x: Array, backend: Backend) -> Array:
        levels, start = [], 0
        for t, size in enumerate(level_sizes(self.dim, self.banding.degree)):
            levels.append(self.turn(t).turned(x[..., start : start + size, :], backend))
            start += size
        return backend.xp.concat(levels, axis=-2)

    def turn(self, t: int) -> Turn:
        """What turns the monomials of degree t."""
        return Turn(self.dim, t, level=t)

    def of_level(self, t: int, coefficients: Array, tensors: Sequence[Array], backend: Backend) -> Array:
        """The monomials of degree t of what `contract` gives, from those of the tensors, `turned`."""
        like = tensors[0]
        if not self.banding.paired:
            found = multiply_out(coefficients, tensors, backend)
            weights = backend.table(multinomials, self.dim, t, like=like, dtype=like.dtype)
            return found * weights[-found.shape[-2] :][:, None]
        turn = self.turn(t)
        found = conjugate(multiply_out(coefficients, tensors, backend, turn), backend, -2, turn.real)
        which = (1.0,) * (t + 1), self.dim, t, (), t
        weights = backend.table(complex_weights, *which, like=like, dtype=like.dtype)
        return turn.turned_back(found * weights, backend)


def multiply_out(coefficients: Array, tensors: Sequence[Array], backend: Backend, turn: Turn | None = None) -> Array:
    """Σ_JK… c_JK… T_J ∘ T_K ∘ …: (..., B, …, B) and (..., B, r, k) each → (..., r, k). Of complex numbers if they are `turn`-ed."""
    xp = backend.xp
    bands, rows, columns = tensors[0].shape[-3:]
    flat = [xp.reshape(t, (*t.shape[:-2], rows * columns)) for t in tensors]
    outer = len(tensors) - 1
    lead = coefficients.shape[: coefficients.ndim - len(tensors)]
    result = xp.reshape(coefficients, (*lead, bands**outer, bands)) @ flat[-1]
    for t in reversed(flat[:-1]):
        result = xp.reshape(result, (*result.shape[:-2], result.shape[-2] // bands, bands, rows * columns))
        t = t[..., None, :, :]
        products = result * t if turn is None else multiply(result, t, backend, real=turn.real * columns)
        result = xp.sum(products, axis=-2)
    return xp.reshape(result, (*result.shape[:-2], rows, columns))


def level_sizes(dim: int, degree: int) -> tuple[int, ...]:
    """Number of monomials of each degree."""
    return tuple(comb(dim + t - 1, t) for t in range(degree + 1))


@memoized
def _grid_table(degree: int, moment: int) -> np.ndarray:
    """Rows (c_0 … c_g, κ, κ′² R^(t−2), K^t) for the ranges R of the grid, and one more for all that is beyond.

    K bounds |e^x − 1| / |x|.
    """
    bound = np.asarray(DEFAULT_GRID)
    rows = np.asarray(crowded_table(degree, moment))
    steep = rows[:, -1:] ** 2 * bound[:, None] ** (moment - 2)
    growth = (np.expm1(bound)[:, None] / bound[:, None]) ** moment
    # The bounds are rounded up; the coefficients are those of the polynomial.
    bounds = np.hstack([rows[:, -2:-1], steep, growth]) * (1 + 1e-12)
    rows = np.hstack([rows[:, :-2], bounds])
    # What float32 cannot hold counts as beyond the grid.
    rows[(rows[:, -3:] >= NO_BOUND).any(axis=1), -3:] = NO_BOUND
    beyond = rows[-1].copy()
    beyond[-3:] = NO_BOUND
    return np.vstack([rows, beyond])
