"""Rows to monomials of their channels, and the tables that tell which monomial is which.

All monomials x^α = x_1^α_1 … x_d^α_d with |α| ≤ g of the d channels of a row, in the order of their degree
and, within a degree t, in the order of `itertools.combinations_with_replacement`: by smallest channel first.
In that order the monomials of degree t that begin with channel c are x_c times a contiguous run of the
monomials of degree t − 1, the last ones. So a feature costs one multiplication, in d products a degree.

A pruned basis has a grading: channel c counts for ω_c ≥ 1, a whole number, and kept are the monomials of weighted degree
Σ_c ω_c α_c ≤ W = g min_c ω_c, so that |α| ≤ g; a channel with ω_c > W is left out. In the order of their weighted degree,
and within one by smallest channel first, those of weighted degree w that begin with channel c are x_c times the last ones
of weighted degree w − ω_c: runs again. What is kept when x_c multiplies it, weighted degrees up to W − ω_c, stands in
front. All ω_c = 1 is the whole basis; () stands for it.

Arrays are channel-major, (..., d, rows) → (..., r, rows): every product then runs along contiguous rows.
"""

from __future__ import annotations

from itertools import accumulate
from math import comb
from typing import NamedTuple

import numpy as np

from ..arrays import prod_of
from ..backends import Array, Backend
from ..backends.tables import memoized

Grading = tuple[int, ...]


class Monomials(NamedTuple):
    """Which monomials: all of degree at most `degree`, or those of them that a `grading` leaves."""

    degree: int
    grading: Grading = ()


class Expansion(NamedTuple):
    """A polynomial of the score as a sum over monomials: c_0 … c_g, and the grading of those that are kept, () for all."""

    coefficients: tuple[float, ...]
    grading: Grading = ()

    @property
    def degree(self) -> int:
        """Degree g."""
        return len(self.coefficients) - 1

    @property
    def monomials(self) -> Monomials:
        """Those that are kept."""
        return Monomials(self.degree, self.grading)


def rank(dim: int, degree: int, grading: Grading = ()) -> int:
    """Number of monomials of degree at most `degree` in `dim` channels, C(dim + degree, degree), or those of a pruned basis."""
    return starts(grading, degree)[-1] if grading else comb(dim + degree, degree)


class Run(NamedTuple):
    """The monomials start … stop are channel `channel` times the monomials source … source + stop − start."""

    channel: int
    start: int
    stop: int
    source: int


@memoized
def runs(dim: int, degree: int, grading: Grading = ()) -> tuple[tuple[Run, ...], ...]:
    """One tuple of runs for each (weighted) degree 1 … `degree`, or W; some of the weighted degrees may have none."""
    costs = grading or (1,) * dim
    counts, first = _counts(costs, degree), starts(costs, degree)
    levels = []
    for w in range(1, len(first) - 1):
        start = first[w]
        level = []
        for channel, cost in enumerate(costs):
            # Of the monomials before, those in the channels from this one on come last in their level.
            length = counts[channel][w - cost] if cost <= w else 0
            if length:
                end_of_source = first[w - cost + 1]
                level.append(Run(channel, start, start + length, end_of_source - length))
                start += length
        levels.append(tuple(level))
    return tuple(levels)


@memoized
def run_table(dim: int, degree: int, grading: Grading = ()) -> np.ndarray:
    """All runs of monomials, one after another, (count, 4)."""
    table = np.asarray([run for level in runs(dim, degree, grading) for run in level], dtype=np.int64)
    return table.reshape(-1, 4)


@memoized
def starts(grading: Grading, degree: int) -> tuple[int, ...]:
    """Where the monomials of each weighted degree 0 … W begin, and their number."""
    return (0, *accumulate(_counts(grading, degree)[0]))


@memoized
def _counts(grading: Grading, degree: int) -> tuple[tuple[int, ...], ...]:
    """For each channel, how many monomials of it and those behind have each weighted degree 0 … W."""
    most = degree * min(grading)
    counts = [(1,) + (0,) * most]
    for cost in reversed(grading):
        own = list(counts[-1])
        for w in range(cost, most + 1):
            own[w] += own[w - cost]
        counts.append(tuple(own))
    return tuple(reversed(counts[1:]))


@memoized
def _from_sources(dim: int, degree: int, grading: Grading) -> tuple[tuple[tuple[int, Run], ...], ...]:
    """For each (weighted) degree, the runs whose sources lie in it, with their own."""
    first = starts(grading or (1,) * dim, degree)
    found: list[list[tuple[int, Run]]] = [[] for _ in first[:-1]]
    for w, level in enumerate(runs(dim, degree, grading), start=1):
        for run in level:
            found[w - (grading[run.channel] if grading else 1)].append((w, run))
    return tuple(tuple(sorted(of_level, key=lambda pair: pair[1].channel)) for of_level in found)


class Features:
    """All monomials of the channels of one block of rows after another, (..., d, rows) → (..., r, rows).

    Where arrays are writable, those of a block are written over those of the same thread's block before: fresh memory costs more
    than they do.
    """

    def __init__(self, degree: int, backend: Backend, grading: Grading = ()) -> None:
        self._degree, self._backend, self._grading = degree, backend, grading
        self._memory = backend.memory()

    def __call__(self, x: Array) -> Array:
        """Of one block; the next call may write over it."""
        if self._backend.compiles:
            return gathered(x, slice(None), Monomials(self._degree, self._grading), self._backend)
        if self._memory is None:
            return self._joined(x)
        dim, degree, grading = x.shape[-2], self._degree, self._grading
        shape = (*x.shape[:-2], rank(dim, degree, grading), x.shape[-1])
        held = vars(self._memory)
        if not held or tuple(held["whole"].shape) != shape:
            xp, device = self._backend.xp, self._backend.device(x)
            whole = xp.empty(shape, dtype=x.dtype, device=device)
            whole[..., :1, :] = 1.0
            # Contiguous, whatever the layout of x; the whole basis has the channels for itself.
            own = whole[..., 1 : dim + 1, :] if not grading else xp.empty(x.shape, dtype=x.dtype, device=device)
            factors = [own[..., channel : 1 + channel, :] for channel in range(dim if degree else 0)]
            steps = [
                (whole[..., start:stop, :], factors[channel], whole[..., source : source + stop - start, :])
                for level in runs(dim, degree, grading)[0 if grading else 1 :]
                for channel, start, stop, source in level
            ]
            held.update(whole=whole, x=own, steps=steps)
        if degree:
            held["x"][...] = x
        for target, factor, source in held["steps"]:
            self._backend.multiply_into(target, factor, source)
        return held["whole"]

    def _joined(self, x: Array) -> Array:
        """Level by level, nothing written in place."""
        xp = self._backend.xp
        *leading, dim, rows = x.shape
        degree, grading = self._degree, self._grading
        first = starts(grading or (1,) * dim, degree)
        found = [xp.ones((*leading, 1, rows), dtype=x.dtype, device=self._backend.device(x))]
        for w, level in enumerate(runs(dim, degree, grading), start=1):
            if w == 1 and not grading:
                found.append(x)
                continue
            parts = []
            for channel, start, stop, source in level:
                # A source lies in the level of what the channel is multiplied with, and its position there counts from its start.
                before = w - (grading[channel] if grading else 1)
                cut = slice(source - first[before], source - first[before] + stop - start)
                parts.append(x[..., channel : channel + 1, :] * found[before][..., cut, :])
            found.append(xp.concat(parts, axis=-2) if parts else found[0][..., :0, :])
        return xp.concat([level for level in found if level.shape[-2]], axis=-2)


def gathered(x: Array, part: slice, monomials: Monomials, backend: Backend) -> Array:
    """A part of all monomials, each a product of channels: a compiler makes them in one pass, without copies between levels."""
    *leading, dim, rows = x.shape
    one = backend.xp.ones((*leading, 1, rows), dtype=x.dtype, device=backend.device(x))
    x = backend.xp.concat([one, x], axis=-2)
    factors = backend.table(channels_of, dim, *monomials, like=x)[:, part]
    return prod_of([backend.entries(x, factors[i], axis=-2) for i in range(factors.shape[0])])


def features(x: Array, degree: int, backend: Backend, grading: Grading = ()) -> Array:
    """All monomials of the channels: (..., d, rows) → (..., r, rows)."""
    return Features(degree, backend, grading)(x)


@memoized
def exponents(dim: int, degree: int, grading: Grading = ()) -> np.ndarray:
    """The multi-indices α in order, (r, d)."""
    table = np.zeros((rank(dim, degree, grading), dim), dtype=np.int16)
    for level in runs(dim, degree, grading):
        for channel, start, stop, source in level:
            table[start:stop] = table[source : source + stop - start]
            table[start:stop, channel] += 1
    table.setflags(write=False)
    return table


@memoized
def channels_of(dim: int, degree: int, grading: Grading = ()) -> np.ndarray:
    """The channels that each monomial is a product of, counted from 1, with zeros behind: (max(1, degree), r)."""
    table = np.zeros((max(1, degree), rank(dim, degree, grading)), dtype=np.int64)
    for level in runs(dim, degree, grading):
        for channel, start, stop, source in level:
            table[0, start:stop] = channel + 1
            table[1:, start:stop] = table[:-1, source : source + stop - start]
    table.setflags(write=False)
    return table


@memoized
def degrees(dim: int, degree: int, grading: Grading = ()) -> np.ndarray:
    """|α| of every monomial, (r,)."""
    if grading:
        return np.asarray(exponents(dim, degree, grading).sum(axis=1, dtype=np.int64))
    return np.repeat(np.arange(degree + 1), [comb(dim + t - 1, t) for t in range(degree + 1)])


@memoized
def multinomials(dim: int, degree: int, grading: Grading = ()) -> np.ndarray:
    """|α|! / (α_1! … α_d!) of every monomial, (r,) float64."""
    table = np.ones(rank(dim, degree, grading))
    alpha, plain = exponents(dim, degree, grading), degrees(dim, degree, grading)
    for level in runs(dim, degree, grading):
        for channel, start, stop, source in level:
            table[start:stop] = table[source : source + stop - start] * plain[start:stop] / alpha[start:stop, channel]
    return table


def lower(dim: int, degree: int, grading: Grading, channel: int) -> int:
    """How many monomials are still kept when multiplied by the channel: the first ones."""
    if not grading:
        return rank(dim, degree - 1)
    return starts(grading, degree)[max(0, degree * min(grading) - grading[channel] + 1)]


@memoized
def raised(dim: int, degree: int, grading: Grading = ()) -> np.ndarray:
    """Where x_c · x^β stands, for every channel c and every β that is kept then, degree ≥ 1: (Σ_c r_c,), channel by channel.

    With `raised_factors` it carries the derivative: ∂/∂x_c Σ_α M_α x^α = Σ_β (β_c + 1) M[β + e_c] x^β.
    """
    alpha = exponents(dim, degree, grading).astype(np.int64)
    # A random linear form tells multi-indices apart; the check below makes sure that it did.
    form = np.random.default_rng(0).integers(1, 1 << 40, dim)
    keys = alpha @ form
    order = np.argsort(keys)
    rows = []
    for channel in range(dim):
        lifted = alpha[: lower(dim, degree, grading, channel)].copy()
        lifted[:, channel] += 1
        row = order[np.searchsorted(keys[order], lifted @ form)]
        if not np.array_equal(alpha[row], lifted):
            raise AssertionError("two multi-indices share a key")
        rows.append(row)
    return np.concatenate(rows)


@memoized
def raised_factors(dim: int, degree: int, grading: Grading = ()) -> np.ndarray:
    """β_c + 1 in the order of `raised`, (Σ_c r_c,) float64."""
    alpha = exponents(dim, degree, grading)
    return np.concatenate([alpha[: lower(dim, degree, grading, c), c] + 1.0 for c in range(dim)])


def pull_back(x: Array, phi: Array, y: Array, degree: int, backend: Backend, grading: Grading = ()) -> Array:
    """Σ_α y_α ∂x^α/∂x backwards through the recursion: (..., d, rows), `features` of it, (..., r, rows) → (..., d, rows).

    Two multiplications and two additions a monomial.
    """
    xp = backend.xp
    dim = x.shape[-2]
    first = starts(grading or (1,) * dim, degree)
    gradients: list[Array] = [None] * (len(first) - 1)
    sums: list[Array | None] = [None] * dim
    for level in range(len(first) - 2, -1, -1):
        # Sources of later channels are ends of those of earlier ones, so what goes back to them adds up from the last.
        back: Array = None
        for w, (channel, start, stop, source) in reversed(_from_sources(dim, degree, grading)[level]):
            part = gradients[w][..., start - first[w] : stop - first[w], :]
            found = xp.sum(part * phi[..., source : source + stop - start, :], axis=-2)
            sums[channel] = found if sums[channel] is None else sums[channel] + found
            if level:
                part = part * x[..., channel : channel + 1, :]
                if back is not None:
                    fresh = part.shape[-2] - back.shape[-2]
                    part = xp.concat([part[..., :fresh, :], part[..., fresh:, :] + back], axis=-2)
                back = part
        own = y[..., first[level] : first[level + 1], :]
        if back is not None and back.shape[-2] < own.shape[-2]:
            shape = (*back.shape[:-2], own.shape[-2] - back.shape[-2], back.shape[-1])
            nothing = xp.zeros(shape, dtype=back.dtype, device=backend.device(back))
            back = xp.concat([nothing, back], axis=-2)
        gradients[level] = own if back is None else own + back
    some = next(s for s in sums if s is not None)
    return xp.stack([xp.zeros_like(some) if s is None else s for s in sums], axis=-2)
