"""Channels in pairs, a complex number each: products of rows, their sizes, and monomials of complex numbers.

Rows are (re_1 … re_h, im_1 … im_h), d = 2 h numbers, and the score is scale · Σ_c Re(q_c a_c b_c). Of the channels themselves
that takes complex products, and one conjugate. For a polynomial of the score, Re z = (z + z̄) / 2 gives

    P(Re Σ_c y_c) = Σ_α w_α 2^(−|α|) Π_views z^α,      α over multi-indices of z_1 … z_h, z̄_1 … z̄_h.

The terms of α and of its conjugate are conjugate to each other: one of the two is kept with twice the weight, and its real part. So
the monomials of a row are as many real numbers as those of d real channels. They are also linear in those: z^a z̄^b is a sum
of x^i y^j, i + j = a + b. Sums over rows are linear, too. So rows, sums and read-outs go through the real monomials of their
numbers, and only what is multiplied with other views' is `turned` to the complex ones and back, O(r) numbers in place of O(n r).

A block is what a degree in each of the z_c has: Π_c (t_c + 1) monomials of either kind. Blocks whose degrees are the same up to the
order of the channels have one matrix, the Kronecker product of those of single channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import comb, cos, factorial, pi, prod, sin
from typing import NamedTuple

import numpy as np

from ..arrays import sum_of
from ..backends import Array, Backend
from ..backends.tables import memoized
from .balance import balanced_factors, prod_in_range
from .monomials import Grading, exponents, rank

# Monomials and columns up to which all blocks are one matrix.
_SMALL, _FEW = 512, 16


def conjugate(x: Array, backend: Backend, axis: int = -1, real: int = 0) -> Array:
    """Complex numbers along an axis, (real ones, real parts, imaginary parts), with imaginary parts of the other sign."""
    half = (x.shape[axis] - real) // 2
    return backend.xp.concat([_part(x, axis, 0, real + half), -_part(x, axis, real + half, None)], axis=axis)


def multiply(x: Array, y: Array, backend: Backend, axis: int = -1, real: int = 0) -> Array:
    """Products of complex numbers along an axis, laid out as in `conjugate`, of arrays that broadcast otherwise."""
    half = (x.shape[axis] - real) // 2
    cuts = ((0, real), (real, real + half), (real + half, None))
    (own, a, b), (other, c, d) = ([_part(z, axis, *cut) for cut in cuts] for z in (x, y))
    parts = [a * c - b * d, a * d + b * c]
    return backend.xp.concat([own * other, *parts] if real else parts, axis=axis)


@memoized
def conjugating(dim: int) -> np.ndarray:
    """1 for real parts and −1 for imaginary parts, (1, d)."""
    return np.repeat([[1.0, -1.0]], dim // 2, axis=1)


def _part(x: Array, axis: int, start: int, stop: int | None) -> Array:
    """Some of what stands along an axis, which is counted from the last."""
    return x[(Ellipsis, slice(start, stop), *(slice(None),) * (-axis - 1))]


class Turn(NamedTuple):
    """From real monomials to complex ones and back: of all degrees, or of one `level` alone."""

    dim: int
    degree: int
    grading: Grading = ()
    level: int | None = None

    @property
    def real(self) -> int:
        """How many monomials are their own conjugates: these come first, then real parts, then imaginary parts."""
        return sum(block.number * block.rows[0] for block in self._blocks())

    def turned(self, x: Array, backend: Backend) -> Array:
        """What is linear in the real monomials as the same of the complex ones: (..., r, k)."""
        xp = backend.xp
        if self._whole(x):
            return backend.table(_whole, self.dim, self.degree, self.grading, self.level, like=x, dtype=x.dtype) @ x
        order = backend.table(_order, self.dim, self.degree, self.grading, self.level, like=x)
        x = xp.take(x, order, axis=-2)
        kept: tuple[list[Array], ...] = ([], [], [])
        for block in self._blocks():
            matrix = backend.table(_matrix, block.powers, like=x, dtype=x.dtype)
            part = x[..., block.start : block.start + block.size * block.number, :]
            part = matrix @ xp.reshape(part, (*part.shape[:-2], block.size, block.number * part.shape[-1]))
            at = 0
            for rows, of_kind in zip(block.rows, kept, strict=True):
                if rows:
                    found = part[..., at : at + rows, :]
                    of_kind.append(xp.reshape(found, (*found.shape[:-2], rows * block.number, x.shape[-1])))
                at += rows
        return xp.concat([rows for of_kind in kept for rows in of_kind], axis=-2)

    def turned_back(self, x: Array, backend: Backend) -> Array:
        """The adjoint of `turned`: (..., r, k)."""
        xp = backend.xp
        if self._whole(x):
            return (
                backend.table(_whole_transposed, self.dim, self.degree, self.grading, self.level, like=x, dtype=x.dtype)
                @ x
            )
        columns, real = x.shape[-1], self.real
        at = [0, real, (x.shape[-2] + real) // 2]
        parts = []
        for block in self._blocks():
            rows = []
            for place, count in enumerate(block.rows):
                if count:
                    cut = x[..., at[place] : at[place] + count * block.number, :]
                    rows.append(xp.reshape(cut, (*cut.shape[:-2], count, block.number * columns)))
                    at[place] += count * block.number
            matrix = backend.table(_transposed, block.powers, like=x, dtype=x.dtype)
            part = matrix @ (rows[0] if len(rows) == 1 else xp.concat(rows, axis=-2))
            parts.append(xp.reshape(part, (*part.shape[:-2], block.size * block.number, columns)))
        places = backend.table(_places, self.dim, self.degree, self.grading, self.level, like=x)
        return xp.take(xp.concat(parts, axis=-2), places, axis=-2)

    def _blocks(self) -> tuple[_Block, ...]:
        # One by one, as compilers take them for constants.
        return _blocks(self.dim, self.degree, self.grading, self.level)

    def _whole(self, x: Array) -> bool:
        """Whether one product with all blocks is quicker than one for each kind of them."""
        return bool(x.shape[-2] <= _SMALL and x.shape[-1] <= _FEW)

    def product(self, weights: Array, factors: Sequence[Array], backend: Backend) -> Array:
        """What is read out of Π_views Σ z^α for sums (..., r, k) of complex monomials, by real monomials: (..., r, k)."""
        found = self.multiplied(balanced_factors(factors, backend), backend)
        return self.turned_back(weights * conjugate(found, backend, -2, self.real), backend)

    def multiplied(self, factors: Sequence[Array], backend: Backend) -> Array:
        """Products of complex monomials (..., r, k)."""
        return reduce(lambda x, y: multiply(x, y, backend, -2, self.real), factors)


class Forms(NamedTuple):
    """Complex monomials as real numbers whose products over the query and all views, weighted, are real parts of products.

    Of k complex numbers, with angles θ_l = π l / k,

        Re Π_j z_j = 2^(k−1) / k · Σ_{l < k} (−1)^l Π_j Re(z_j e^{i θ_l}),

    since a product of cosines is a mean of cosines of sums with all signs, of which the sum over l leaves those of one sign. So
    where products are many, as they are of prefixes, real ones serve: k for every pair of numbers.
    """

    turn: Turn
    factors: int

    @property
    def size(self) -> int:
        """How many numbers a row has."""
        real = self.turn.real
        return real + (rank(self.turn.dim, self.turn.degree, self.turn.grading) - real) // 2 * self.factors

    def turned(self, x: Array, backend: Backend) -> Array:
        """What is linear in the real monomials (..., r, k) as the same of these numbers."""
        y, real = self.turn.turned(x, backend), self.turn.real
        half = (y.shape[-2] + real) // 2
        re, im = y[..., real:half, :], y[..., half:, :]
        forms = [re * c - im * s for c, s in self._angles()]
        return backend.xp.concat([y[..., :real, :], *forms], axis=-2)

    def turned_back(self, x: Array, backend: Backend) -> Array:
        """The adjoint of `turned`."""
        real = self.turn.real
        width = (x.shape[-2] - real) // self.factors
        forms = [x[..., real + width * number : real + width * (number + 1), :] for number in range(self.factors)]
        re = sum_of([form * c for form, (c, _) in zip(forms, self._angles(), strict=True)])
        im = sum_of([form * -s for form, (_, s) in zip(forms, self._angles(), strict=True)])
        return self.turn.turned_back(backend.xp.concat([x[..., :real, :], re, im], axis=-2), backend)

    def _angles(self) -> list[tuple[float, float]]:
        return [(cos(pi * number / self.factors), sin(pi * number / self.factors)) for number in range(self.factors)]


@memoized
def form_weights(coefficients: tuple[float, ...], dim: int, grading: Grading, count: int) -> np.ndarray:
    """The weights of `complex_weights` for the numbers of `Forms` of so many factors, (size, 1)."""
    degree = len(coefficients) - 1
    weights, real = complex_weights(coefficients, dim, degree, grading), Turn(dim, degree, grading).real
    pairs = weights[real : (len(weights) + real) // 2] * (2.0 ** (count - 1) / count)
    return np.concatenate([weights[:real], *(pairs * (-1) ** number for number in range(count))])


def as_factors(sums: Sequence[Array], turn: Turn | None, backend: Backend) -> Sequence[Array]:
    """Sums (..., r, k) as `product` takes them."""
    return sums if turn is None else [turn.turned(x, backend) for x in sums]


def product(weights: Array, factors: Sequence[Array], turn: Turn | None, backend: Backend) -> Array:
    """W · A ∘ B ∘ … for sums (..., r, k) of real channels' monomials, or what stands for it where channels are complex."""
    if turn is None:
        return weights * prod_in_range(factors, backend)
    return turn.product(weights, factors, backend)


class _Block(NamedTuple):
    """Blocks of the same degrees t_1 ≥ t_2 ≥ …: how many, where the first begins, and what each holds."""

    powers: tuple[int, ...]
    number: int
    start: int
    # Monomials of a block; those that are their own conjugates, |z_1|^t_1 |z_2|^t_2 … or none, and parts of the others.
    size: int
    rows: tuple[int, int, int]


@memoized
def _blocks(dim: int, degree: int, grading: Grading, level: int | None) -> tuple[_Block, ...]:
    """The blocks in order."""
    return layout(dim, degree, grading, level)[1]


def layout(dim: int, degree: int, grading: Grading, level: int | None) -> tuple[np.ndarray, tuple[_Block, ...]]:
    """Where each real monomial stands, block by block and of alike blocks place by place, and the blocks."""
    alpha = exponents(dim, degree, grading).astype(np.int64)
    if level is not None:
        alpha = alpha[rank(dim, level - 1) if level else 0 : rank(dim, level)]
    half = dim // 2
    of_im = alpha[:, half:]
    powers = alpha[:, :half] + of_im
    # The channels of a monomial by falling powers, and what of those is of the imaginary part.
    channels = np.argsort(-powers, axis=1, kind="stable")[:, : max(1, degree)]
    falling, own = (np.take_along_axis(x, channels, axis=1) for x in (powers, of_im))
    strides = np.cumprod(np.concatenate([np.ones_like(falling[:, :1]), falling[:, :0:-1] + 1], axis=1), axis=1)[:, ::-1]
    place = (own * strides).sum(axis=1)
    # A block is told by its powers, as multi-indices are in `raised`.
    _, block = np.unique(powers @ np.random.default_rng(0).integers(1, 1 << 40, half), return_inverse=True)
    kinds, kind = np.unique(falling, axis=0, return_inverse=True)
    order = np.lexsort((block.reshape(-1), place, kind.reshape(-1)))
    found, start = [], 0
    for of_kind, number in zip(kinds.tolist(), np.bincount(kind.reshape(-1)).tolist(), strict=True):
        own_powers = tuple(t for t in of_kind if t)
        size, real = prod(t + 1 for t in own_powers), int(all(t % 2 == 0 for t in own_powers))
        found.append(_Block(own_powers, number // size, start, size, (real, (size - real) // 2, (size - real) // 2)))
        start += number
    return order, tuple(found)


@memoized
def _whole(dim: int, degree: int, grading: Grading, level: int | None) -> np.ndarray:
    """Complex monomials from real ones, (r, r)."""
    order, blocks = layout(dim, degree, grading, level)
    # Of each kind of rows, block by block as in `turned`.
    kinds: tuple[list[np.ndarray], ...] = ([], [], [])
    for block in blocks:
        columns = order[block.start : block.start + block.size * block.number].reshape(block.size, block.number)
        whole = np.zeros((block.size, block.number, len(order)))
        for number in range(block.number):
            whole[:, number, columns[:, number]] = _matrix(block.powers)
        ends = np.cumsum((0, *block.rows))
        for of_kind, start, stop in zip(kinds, ends[:-1], ends[1:], strict=True):
            of_kind.append(whole[start:stop].reshape(-1, len(order)))
    return np.concatenate([rows for of_kind in kinds for rows in of_kind])


def _whole_transposed(dim: int, degree: int, grading: Grading, level: int | None) -> np.ndarray:
    """The adjoint's."""
    return np.ascontiguousarray(_whole(dim, degree, grading, level).T)


@memoized
def _order(dim: int, degree: int, grading: Grading, level: int | None) -> np.ndarray:
    """The table of `turned`: where its rows come from."""
    return layout(dim, degree, grading, level)[0]


@memoized
def _places(dim: int, degree: int, grading: Grading, level: int | None) -> np.ndarray:
    """The table of `turned_back`: where its rows come from."""
    return np.argsort(layout(dim, degree, grading, level)[0])


@memoized
def complex_powers(powers: tuple[int, ...]) -> np.ndarray:
    """(a_1, a_2, …) of z_1^a_1 z̄_1^(t_1 − a_1) … for all that a block keeps: its own conjugate first, if there is one."""
    shape = tuple(t + 1 for t in powers)
    every = np.asarray(powers, dtype=np.int64) - np.indices(shape).reshape(len(powers), prod(shape)).T
    # The sign of the first of the differences that is not 0.
    sign = np.sign(2 * every - np.asarray(powers, dtype=np.int64)) @ 3 ** np.arange(len(powers), dtype=np.int64)[::-1]
    return np.concatenate([every[sign == 0], every[sign > 0]])


@memoized
def _matrix(powers: tuple[int, ...]) -> np.ndarray:
    """Complex monomials of a block from its real ones: (size, size)."""

    def of_channel(a: int, t: int) -> np.ndarray:
        # (x + i y)^a (x − i y)^(t − a) by powers of y.
        plus, minus = ([comb(n, j) * sign**j for j in range(n + 1)] for n, sign in ((a, 1j), (t - a, -1j)))
        return np.asarray(np.convolve(plus, minus))

    rows = []
    for of_row in complex_powers(powers).tolist():
        row = np.ones(1, dtype=np.complex128)
        for a, t in zip(of_row, powers, strict=True):
            row = np.kron(row, of_channel(a, t))
        rows.append(row)
    whole = np.stack(rows)
    own = int(all(t % 2 == 0 for t in powers))
    return np.concatenate([whole.real, whole.imag[own:]])


def _transposed(powers: tuple[int, ...]) -> np.ndarray:
    """The table of `turned_back`."""
    return np.ascontiguousarray(_matrix(powers).T)


@memoized
def complex_weights(
    coefficients: tuple[float, ...], dim: int, degree: int, grading: Grading = (), level: int | None = None
) -> np.ndarray:
    """C_|α| 2^(−|α|) |α|! / α! of every complex monomial, twice that of those with a conjugate, (r, 1)."""
    reals, others = [np.zeros(0)], [np.zeros(0)]
    for block in _blocks(dim, degree, grading, level):
        t = sum(block.powers)
        of_rows = []
        for row in complex_powers(block.powers).tolist():
            parts = prod(factorial(a) * factorial(p - a) for a, p in zip(row, block.powers, strict=True))
            of_rows.append(coefficients[t] * (factorial(t) // parts) / 2.0**t)
        reals.append(np.repeat(of_rows[: block.rows[0]], block.number))
        others.append(np.repeat(of_rows[block.rows[0] :], block.number) * 2)
    of_others = np.concatenate(others)
    return np.concatenate([*reals, of_others, of_others])[:, None]
