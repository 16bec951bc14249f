"""Complex monomials row by row: each is a channel or its conjugate times another, as loops over rows make them.

Of z^α and its conjugate one is kept (`complex_channels`); here it is whichever comes of a kept one of lower degree. In the order of
their (weighted) degree, and within one by smallest channel first, they come in runs, as real monomials do: the kept ones from
`start` to `stop` are one channel, or its conjugate, times those from `source` on. As real numbers a row has all real parts, and
then all imaginary ones, of which some are 0.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..backends import Array, Backend
from ..backends.tables import memoized
from .complex_channels import Turn, complex_powers, complex_weights, layout
from .monomials import Grading, exponents, rank


class Pairs(NamedTuple):
    """The real and imaginary parts of complex monomials in the order in which rows make them."""

    turn: Turn

    @property
    def half(self) -> int:
        """How many complex monomials there are."""
        return (rank(self.turn.dim, self.turn.degree, self.turn.grading) + self.turn.real) // 2

    @property
    def runs(self) -> np.ndarray:
        """(channel, start, stop, source), (count, 4): channel h + c is the conjugate of channel c."""
        return _recursion(self.turn.dim // 2, self.turn.degree, self.turn.grading).runs

    def turned(self, x: Array, backend: Backend) -> Array:
        """What is linear in the real monomials (..., r, k) as the same of these numbers."""
        xp, which = backend.xp, self._which()
        y = self.turn.turned(x, backend)
        y = xp.concat([y, xp.zeros_like(y[..., :1, :])], axis=-2)
        signs = backend.table(_signs, *which, like=x, dtype=x.dtype)
        return xp.take(y, backend.table(_order, *which, like=x), axis=-2) * signs

    def turned_back(self, x: Array, backend: Backend) -> Array:
        """The adjoint of `turned`."""
        which = self._which()
        signs = backend.table(_signs, *which, like=x, dtype=x.dtype)
        return self.turn.turned_back(
            backend.xp.take(x * signs, backend.table(_places, *which, like=x), axis=-2), backend
        )

    def _which(self) -> tuple[int, int, Grading]:
        return self.turn.dim, self.turn.degree, self.turn.grading


@memoized
def pair_weights(coefficients: tuple[float, ...], dim: int, grading: Grading) -> np.ndarray:
    """What a real part of a product counts for, and minus that for imaginary parts, (r, 1)."""
    degree = len(coefficients) - 1
    order = _order(dim, degree, grading)
    weights: np.ndarray = np.concatenate([complex_weights(coefficients, dim, degree, grading), np.zeros((1, 1))])[order]
    weights[len(order) // 2 :] *= -1
    return weights


class _Recursion(NamedTuple):
    """Kept monomials, as exponents of channels and their conjugates (count, 2 h), and their runs."""

    powers: np.ndarray
    runs: np.ndarray


@memoized
def _recursion(half: int, degree: int, grading: Grading) -> _Recursion:
    costs = grading[:half] or (1,) * half
    # Monomials are told by a linear form of their exponents, as in `raised`, and pairs by the lesser of two.
    form = _form(2 * half)
    found, runs = [np.zeros((1, 2 * half), np.int64)], []
    # For each weighted degree where its monomials begin, and those without the channels before each.
    starts = [[0] * (half + 1)]
    count = 1
    for w in range(1, degree * min(costs) + 1):
        level = []
        for c, cost in enumerate(costs):
            level.append(count)
            if cost > w:
                continue
            first, end = starts[w - cost][c], (starts[w - cost + 1] if cost > 1 else level)[0]
            sources = np.concatenate(found)[first:end]
            both = np.concatenate([sources, sources])
            both[: len(sources), c] += 1
            both[len(sources) :, half + c] += 1
            _, new = np.unique(_class_of(both, form), return_index=True)
            new.sort()
            found.append(both[new])
            # A run ends where a source or a product is left out, and with the sources.
            for run in np.split(new, np.flatnonzero((np.diff(new) != 1) | (new[1:] == len(sources))) + 1):
                if len(run):
                    conjugate, source = divmod(int(run[0]), max(1, len(sources)))
                    runs.append((c + half * conjugate, count, count + len(run), first + source))
                    count += len(run)
        starts.append([*level, count])
    return _Recursion(np.concatenate(found), np.asarray(runs, dtype=np.int64).reshape(-1, 4))


def _form(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 1 << 40, count)


def _class_of(powers: np.ndarray, form: np.ndarray) -> np.ndarray:
    """A number for each pair of conjugates, from exponents of channels and their conjugates."""
    half = len(form) // 2
    found: np.ndarray = np.minimum(powers @ form, np.roll(powers, half, axis=1) @ form)
    return found


class _Match(NamedTuple):
    """The numbers of a row, of those of `Turn` which and with what sign; and the reverse."""

    order: np.ndarray
    signs: np.ndarray
    places: np.ndarray


@memoized
def _match(dim: int, degree: int, grading: Grading) -> _Match:
    half, form = dim // 2, _form(dim)
    powers = _recursion(half, degree, grading).powers
    turned = _turned_powers(dim, degree, grading)
    real = Turn(dim, degree, grading).real
    ours, theirs = _class_of(powers, form), _class_of(turned, form)
    rows = np.argsort(theirs)[np.searchsorted(np.sort(theirs), ours)]
    same = (powers == turned[rows]).all(axis=1)
    if len(ours) != len(theirs) or not (same | (np.roll(powers, half, axis=1) == turned[rows]).all(axis=1)).all():
        raise AssertionError("two monomials share a number")
    size = 2 * len(theirs) - real
    # Of real ones the imaginary part is a row of zeros.
    of_im = np.where(rows < real, size, rows + len(theirs) - real)
    order = np.concatenate([rows, of_im])
    signs = np.concatenate([np.ones(len(rows)), np.where(same, 1.0, -1.0)])
    places = np.empty(size + 1, np.int64)
    places[order] = np.arange(len(order))
    return _Match(order, signs[:, None], places[:-1])


def _turned_powers(dim: int, degree: int, grading: Grading) -> np.ndarray:
    """Exponents (count, 2 h) of the complex monomials of `Turn`, those that are their own conjugates first."""
    alpha, half = exponents(dim, degree, grading).astype(np.int64), dim // 2
    order, blocks = layout(dim, degree, grading, None)
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for block in blocks:
        # The first monomials of blocks have none but real parts.
        powers = alpha[order[block.start : block.start + block.number], :half]
        channels = np.argsort(-powers, axis=1, kind="stable")[:, : len(block.powers)]
        for row, own in enumerate(complex_powers(block.powers)):
            here = np.zeros((block.number, dim), np.int64)
            np.put_along_axis(here, channels, own[None, :], axis=1)
            np.put_along_axis(here, half + channels, (np.asarray(block.powers, np.int64) - own)[None, :], axis=1)
            found[row >= block.rows[0]].append(here)
    return np.concatenate([rows for of_kind in found for rows in of_kind])


def _order(*which: Any) -> np.ndarray:
    """The table of `turned`: where its rows come from."""
    return _match(*which).order


def _signs(*which: Any) -> np.ndarray:
    return _match(*which).signs


def _places(*which: Any) -> np.ndarray:
    """The table of `turned_back`: where its rows come from."""
    return _match(*which).places
