"""Rows to monomials of their channels, and the tables that tell which monomial is which.

All monomials x^α = x_1^α_1 … x_d^α_d with |α| ≤ g of the d channels of a row, in the order of their degree
and, within a degree t, in the order of `itertools.combinations_with_replacement`: by smallest channel first.
In that order the monomials of degree t that begin with channel c are x_c times a contiguous run of the
monomials of degree t − 1, the last ones. So a feature costs one multiplication, in d products a degree.

Arrays are channel-major, (..., d, rows) → (..., r, rows): every product then runs along contiguous rows.
"""

from __future__ import annotations

from math import comb
from typing import NamedTuple

import numpy as np

from .backends import Array, Backend
from .backends.base import memoized


def rank(dim: int, degree: int) -> int:
    """Number of monomials of degree at most `degree` in `dim` channels: C(dim + degree, degree)."""
    return comb(dim + degree, degree)


class Run(NamedTuple):
    """The monomials start … stop are channel `channel` times the monomials source … source + stop − start."""

    channel: int
    start: int
    stop: int
    source: int


@memoized
def runs(dim: int, degree: int) -> tuple[tuple[Run, ...], ...]:
    """One tuple of runs for each degree 1 … `degree`."""
    plan = []
    start = 1
    for t in range(1, degree + 1):
        end_of_source = start
        level = []
        for channel in range(dim):
            # Of degree t − 1, those in the channels from this one on come last.
            length = comb(dim - channel + t - 2, t - 1)
            level.append(Run(channel, start, start + length, end_of_source - length))
            start += length
        plan.append(tuple(level))
    return tuple(plan)


class Features:
    """All monomials of the channels of one block of rows after another, (..., d, rows) → (..., r, rows).

    Where arrays are writable, those of a block are written over those of the block before: fresh memory costs more than they do.
    """

    def __init__(self, degree: int, backend: Backend) -> None:
        self._degree, self._backend = degree, backend
        self._whole: Array = None
        self._steps: list[tuple[Array, Array, Array]] = []

    def __call__(self, x: Array) -> Array:
        """Of one block; the next call may write over it."""
        if not self._backend.writable:
            return self._joined(x)
        dim, degree = x.shape[-2], self._degree
        shape = (*x.shape[:-2], rank(dim, degree), x.shape[-1])
        if self._whole is None or tuple(self._whole.shape) != shape:
            whole = self._backend.xp.empty(shape, dtype=x.dtype, device=self._backend.device(x))
            whole[..., :1, :] = 1.0
            # Contiguous, whatever the layout of x.
            factors = [whole[..., 1 + channel : 2 + channel, :] for channel in range(dim if degree else 0)]
            self._whole, self._steps = whole, [
                (whole[..., start:stop, :], factors[channel], whole[..., source : source + stop - start, :])
                for level in runs(dim, degree)[1:]
                for channel, start, stop, source in level
            ]  # fmt: skip
        if degree:
            self._whole[..., 1 : dim + 1, :] = x
        for target, factor, source in self._steps:
            self._backend.multiply_into(target, factor, source)
        return self._whole

    def _joined(self, x: Array) -> Array:
        """Level by level, nothing written in place."""
        xp = self._backend.xp
        *leading, dim, rows = x.shape
        one = xp.ones((*leading, 1, rows), dtype=x.dtype, device=self._backend.device(x))
        levels = [one] if self._degree == 0 else [one, x]
        for level in runs(dim, self._degree)[1:]:
            # A source lies in the level before; its position there counts from that level's start.
            before = levels[-1]
            end, length = level[0].start, before.shape[-2]
            levels.append(
                xp.concat(
                    [
                        x[..., channel : channel + 1, :] * before[..., source - end + length :, :]
                        for channel, start, stop, source in level
                    ],
                    axis=-2,
                )
            )
        return xp.concat(levels, axis=-2)


def features(x: Array, degree: int, backend: Backend) -> Array:
    """All monomials of the channels: (..., d, rows) → (..., r, rows)."""
    return Features(degree, backend)(x)


@memoized
def exponents(dim: int, degree: int) -> np.ndarray:
    """The multi-indices α in order, (r, d)."""
    table = np.zeros((rank(dim, degree), dim), dtype=np.int16)
    for level in runs(dim, degree):
        for channel, start, stop, source in level:
            table[start:stop] = table[source : source + stop - start]
            table[start:stop, channel] += 1
    table.setflags(write=False)
    return table


@memoized
def degrees(dim: int, degree: int) -> np.ndarray:
    """|α| of every monomial, (r,)."""
    return np.repeat(np.arange(degree + 1), [comb(dim + t - 1, t) for t in range(degree + 1)])


@memoized
def multinomials(dim: int, degree: int) -> np.ndarray:
    """|α|! / (α_1! … α_d!) of every monomial, (r,) float64."""
    table = np.ones(rank(dim, degree))
    alpha = exponents(dim, degree)
    for t, level in enumerate(runs(dim, degree), start=1):
        for channel, start, stop, source in level:
            table[start:stop] = table[source : source + stop - start] * t / alpha[start:stop, channel]
    return table


@memoized
def raised(dim: int, degree: int) -> np.ndarray:
    """Where x_c · x^β stands, for every channel c and every |β| ≤ degree − 1, degree ≥ 1: (d · r',), channel by channel.

    With `raised_factors` it carries the derivative: ∂/∂x_c Σ_α M_α x^α = Σ_β (β_c + 1) M[β + e_c] x^β.
    """
    alpha = exponents(dim, degree).astype(np.int64)
    lower = alpha[: rank(dim, degree - 1)]
    # A random linear form tells multi-indices apart; the check below makes sure that it did.
    form = np.random.default_rng(0).integers(1, 1 << 40, dim)
    keys = alpha @ form
    order = np.argsort(keys)
    index = order[np.searchsorted(keys[order], (lower @ form)[None, :] + form[:, None])]
    for channel, row in enumerate(index):
        lifted = lower.copy()
        lifted[:, channel] += 1
        if not np.array_equal(alpha[row], lifted):
            raise AssertionError("two multi-indices share a key")
    return np.asarray(index.reshape(-1))


@memoized
def raised_factors(dim: int, degree: int) -> np.ndarray:
    """β_c + 1 in the order of `raised`, (d · r',) float64."""
    return (exponents(dim, degree - 1).T + 1.0).reshape(-1)


def pull_back(x: Array, phi: Array, y: Array, degree: int, backend: Backend) -> Array:
    """Σ_α y_α ∂x^α/∂x backwards through the recursion: (..., d, rows), `features` of it, (..., r, rows) → (..., d, rows).

    Two multiplications and two additions a monomial.
    """
    xp = backend.xp
    dim = x.shape[-2]
    levels = runs(dim, degree)
    gradient = y[..., levels[-1][0].start :, :]
    sums: list[Array | None] = [None] * dim
    for t in range(degree, 0, -1):
        start = levels[t - 1][0].start
        before = levels[t - 2][0].start if t > 1 else 0
        # The sources of later channels are ends of those of earlier ones, so what goes back to them adds up from the last.
        back: Array = None
        for channel, first, stop, source in reversed(levels[t - 1]):
            part = gradient[..., first - start : stop - start, :]
            found = xp.sum(part * phi[..., source : source + stop - first, :], axis=-2)
            sums[channel] = found if sums[channel] is None else sums[channel] + found
            if t > 1:
                part = part * x[..., channel : channel + 1, :]
                if back is not None:
                    fresh = part.shape[-2] - back.shape[-2]
                    part = xp.concat([part[..., :fresh, :], part[..., fresh:, :] + back], axis=-2)
                back = part
        if t > 1:
            gradient = y[..., before:start, :] + back
    return xp.stack(sums, axis=-2)
