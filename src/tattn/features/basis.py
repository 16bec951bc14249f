"""Products with the monomials of a block of rows: sums over rows, sums over monomials, and their adjoint.

Sums run in chains of `CHAIN` terms. Where there are few columns, products with all monomials are slow twice over: they are
skinny, and most of what they read are the monomials of the highest degree g, which had to be made first. Those need not be
made. Each is a channel times a monomial of degree g − 1, so that with x_0 = 1

    Φ_gᵀ z    is picked from   Φ_{g−1}ᵀ [x_0 z, x_1 z, …, x_d z],
    M_gᵀ Φ_g         =         Σ_c x_c (M^[c]ᵀ Φ_{g−1}),

wide products with a fraction of the features. The adjoint has Σ_c x_c ∂f/∂x_c = g f for what is homogeneous of degree g
(Euler), and ∂f/∂x_c needs no monomials of degree g.

A pruned basis (`monomials`) holds all that it has. Where nothing is written in place, channels that count alike have the same
monomials in their derivative, which stand in front: one wide product for each weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ..arrays import broadcast_leading, sum_of, swap_outer
from ..backends import Array, Backend
from ..backends.operations import CHAIN
from ..backends.tables import memoized
from .monomials import (
    Features,
    Grading,
    Monomials,
    exponents,
    gathered,
    lower,
    pull_back,
    raised,
    raised_factors,
    rank,
    runs,
)

# Chains that are added one after the other, at most: `rounding` counts so many additions.
FEW_CHAINS = 32
# With more, products with all monomials are wide enough by themselves; measured on processors with NumPy and torch.
FEW_COLUMNS = 12
# Products with entries of this size stay far from the smallest numbers.
_LEAST = {"float32": 2.0**-40, "float64": 2.0**-80}


class Implied(NamedTuple):
    """The monomials of channels (..., d, rows) that each product makes for itself.

    A compiler then makes them while it multiplies. What several products share it would store, in passes that take longer.
    """

    channels: Array


class Basis(NamedTuple):
    """The monomials of degree at most g in d channels; `lean` ones are held up to degree g − 1, and the others implied.

    Or those that a grading leaves, never lean.
    """

    dim: int
    degree: int
    lean: bool
    grading: Grading = ()

    @classmethod
    def of(cls, dim: int, degree: int, columns: int, grading: Grading = (), compiled: bool = False) -> Basis:
        """For products with so many columns; a `compiled` program makes monomials while it multiplies with them."""
        lean = degree >= 2 and columns <= FEW_COLUMNS and not grading and not compiled
        return cls(dim, degree, lean, grading)

    @property
    def size(self) -> int:
        """How many monomials there are, r."""
        return rank(self.dim, self.degree, self.grading)

    @property
    def held(self) -> int:
        """How many monomials a row has in memory."""
        return rank(self.dim, self.degree - self.lean) if self.lean else self.size

    @property
    def lower(self) -> int:
        """How many monomials have a degree below g."""
        return rank(self.dim, self.degree - 1)

    def width(self, columns: int) -> int:
        """Columns of the products that stand for products with so many columns."""
        return columns * (self.dim + 1) if self.lean else columns

    def pulled(self, columns: int, backend: Backend) -> int:
        """Numbers a row has in memory beside its monomials, where `puller` is for so many columns."""
        return (
            self.size + columns
            if self.in_place(backend) or self._by_channels(columns, backend)
            else columns * (self.dim + 1)
        )

    def in_place(self, backend: Backend) -> bool:
        """Whether `puller` works in place (`InPlace`), without wide products. It then reads the channels of each block first."""
        return backend.writable and backend.reads and not self.lean

    def _by_channels(self, columns: int, backend: Backend) -> bool:
        """Whether `puller` goes channel by channel, in a compiled program whose product would be too wide."""
        return backend.compiles and columns > FEW_COLUMNS and not self.lean and not self.grading

    def level(self, degree: int) -> slice:
        """Where the monomials of one degree stand."""
        return slice(rank(self.dim, degree - 1) if degree else 0, rank(self.dim, degree))

    def _part(self, phi: Any, degree: int | None, backend: Backend) -> Array:
        """Those of one degree, or all, (..., ·, rows)."""
        return self._cut(phi, slice(0, self.size) if degree is None else self.level(degree), backend)

    def _cut(self, phi: Any, part: slice, backend: Backend) -> Array:
        """Some of the monomials, (..., ·, rows)."""
        if isinstance(phi, Implied):
            return gathered(phi.channels, part, Monomials(self.degree, self.grading), backend)
        return phi if part == slice(0, phi.shape[-2]) else phi[..., part, :]

    def _is_held(self, degree: int | None) -> bool:
        """Whether the monomials of one degree, or of all, are all in memory."""
        return not self.lean or (degree is not None and degree < self.degree)

    def features(self, backend: Backend) -> Callable[[Array], Any]:
        """What makes the monomials that are held: (..., d, rows) → (..., held, rows), which the next call may overwrite.

        In a compiled program they are `Implied`.
        """
        if backend.compiles and not self.lean:
            return Implied
        return Features(self.degree - self.lean, backend, self.grading)

    def row_sums(self, phi: Array, z: Array, backend: Backend, degree: int | None = None) -> Array:
        """Φ z, of all monomials or of those of one degree: (..., held, rows) and (..., rows, k) → (..., r, k)."""
        xp = backend.xp
        if self._is_held(degree):
            return row_products(self._part(phi, degree, backend), z, backend)
        k = z.shape[-1]
        pairs = phi[..., : self.dim + 1, None, :] * backend.transposed(z)[..., None, :, :]
        pairs = xp.reshape(pairs, (*pairs.shape[:-3], (self.dim + 1) * k, pairs.shape[-1]))
        top = self.level(self.degree - 1)
        wide = row_products(phi[..., top, :], xp.matrix_transpose(pairs), backend)
        picked = [
            wide[..., source - top.start :, (channel + 1) * k : (channel + 2) * k]
            for channel, _, _, source in runs(self.dim, self.degree)[-1]
        ]
        if degree is None:
            picked = [row_products(phi[..., : top.start, :], z, backend), wide[..., :k], *picked]
        return xp.concat(picked, axis=-2)

    def reader(self, matrix: Array, backend: Backend, degree: int | None = None) -> tuple[Array | None, Array]:
        """What `read` takes for M (..., r, k), of all monomials or of those of one degree."""
        xp = backend.xp
        turned = xp.matrix_transpose(matrix)
        if self._is_held(degree):
            return None, turned
        top = self.level(self.degree - 1)
        start = self.lower if degree is None else 0
        levels = [turned[..., top]] if degree is None else []
        for _, first, stop, source in runs(self.dim, self.degree)[-1]:
            cut = slice(start + first - self.lower, start + stop - self.lower)
            nothing = xp.zeros_like(turned[..., : source - top.start])
            levels.append(xp.concat([nothing, turned[..., cut]], axis=-1))
        return (turned[..., : top.start] if degree is None else None), xp.concat(levels, axis=-2)

    def read(
        self, phi: Array, reader: tuple[Array | None, Array], backend: Backend, degree: int | None = None
    ) -> Array:
        """Mᵀ Φ, of all monomials or of those of one degree: (..., held, rows) → (..., k, rows)."""
        rest, matrix = reader
        if self._is_held(degree):
            return read(self._part(phi, degree, backend), matrix, backend)
        top = self.level(self.degree - 1)
        product = read(phi[..., top, :], matrix, backend)
        found = _over_channels(product, phi[..., int(degree is not None) : self.dim + 1, :], backend)
        return found if rest is None else found + read(phi[..., : top.start, :], rest, backend)

    def derivative(self, matrix: Array, backend: Backend) -> Any:
        """M (..., r, k) → (..., d · k, r'): for each channel c, (β_c + 1) M[β + e_c] over |β| ≤ g − 1, transposed.

        Of a pruned basis one such array for each weight, of the channels that have it.
        """
        turned = backend.xp.matrix_transpose(matrix)
        if self.grading:
            return tuple(self._raised(turned, channels, backend) for channels in self._alike())
        return self._raised(turned, range(self.dim), backend)

    def _raised(self, turned: Array, channels: Sequence[int], backend: Backend) -> Array:
        """`derivative` for channels whose derivatives have as many monomials, from Mᵀ."""
        xp = backend.xp
        index = backend.table(raised, self.dim, self.degree, self.grading, like=turned)
        factors = backend.table(raised_factors, self.dim, self.degree, self.grading, like=turned, dtype=turned.dtype)
        ends = [0]
        for c in range(self.dim):
            ends.append(ends[-1] + lower(self.dim, self.degree, self.grading, c))

        def of_channel(c: int) -> Array:
            cut = slice(ends[c], ends[c + 1])
            return xp.take(turned, index[cut], axis=-1) * factors[cut]

        if backend.compiles and not self.grading:
            raising = backend.entries(turned, index, axis=-1) * factors
            raising = xp.reshape(raising, (*turned.shape[:-1], self.dim, -1))
            return xp.reshape(swap_outer(raising, backend), (*turned.shape[:-2], -1, raising.shape[-1]))
        if not backend.writable:
            return xp.concat([of_channel(c) for c in channels], axis=-2)
        # As large as all summaries together for many value channels: not to be held twice.
        k, length = turned.shape[-2], ends[channels[0] + 1] - ends[channels[0]]
        shape = (*turned.shape[:-2], len(channels) * k, length)
        whole = xp.empty(shape, dtype=turned.dtype, device=backend.device(turned))
        for i, c in enumerate(channels):
            whole[..., i * k : (i + 1) * k, :] = of_channel(c)
        return whole

    def _alike(self) -> tuple[tuple[int, ...], ...]:
        """The channels of a pruned basis by weight; those that are left out are in none."""
        return _alike(self.grading, self.degree)

    def _by_weights(self, phi: Array, derivative: Sequence[Array], z: Array, backend: Backend) -> Array:
        """`puller` of a pruned basis, a wide product for each weight."""
        xp = backend.xp
        found = [
            _weighted(read(self._cut(phi, slice(0, part.shape[-1]), backend), part, backend), z, backend)
            for part in derivative
        ]
        order = [c for channels in self._alike() for c in channels]
        if len(order) < self.dim:
            shape = (*found[0].shape[:-1], self.dim - len(order))
            found.append(xp.zeros(shape, dtype=z.dtype, device=backend.device(z)))
        whole = xp.concat(found, axis=-1)
        if order == list(range(self.dim)):
            return whole
        return xp.take(whole, backend.table(_places, self.grading, self.degree, like=whole), axis=-1)

    def _pulled_by_channels(self, matrix: Array, backend: Backend, phi: Array, z: Array) -> Array:
        """`puller`: with y = M z, ∂/∂x_c is Σ_β (β_c + 1) y[β + e_c] x^β, a sum over the monomials of lower degree."""
        xp = backend.xp
        index = backend.table(raised, self.dim, self.degree, like=z)
        factors = backend.table(raised_factors, self.dim, self.degree, like=z, dtype=z.dtype)
        slopes = backend.apart(matrix @ xp.matrix_transpose(z))
        phi = self._cut(phi, slice(0, self.lower), backend)
        chains, length = _equal_chains(self.lower)
        found = []
        for c in range(self.dim):
            own = slice(c * self.lower, (c + 1) * self.lower)
            terms = backend.entries(slopes, index[own], axis=-2) * factors[own][:, None] * phi
            terms = _ended(terms, chains * length, -2, backend)
            terms = xp.reshape(terms, (*terms.shape[:-2], chains, length, terms.shape[-1]))
            # One sum over both axes would be one chain.
            found.append(sum_of([xp.sum(terms[..., i, :, :], axis=-2) for i in range(chains)]))
        return xp.stack(found, axis=-1)

    def puller(self, matrix: Array, backend: Backend) -> Callable[[Array, Array], Array]:
        """Σ_e z_e ∂(Mᵀ Φ)_e / ∂x for M (..., r, k): Φ (..., held, rows) and z (..., rows, k) → (..., rows, d)."""
        if self.in_place(backend):
            return InPlace(self, matrix, backend)
        if self._by_channels(matrix.shape[-1], backend):
            return partial(self._pulled_by_channels, matrix, backend)
        derivative = self.derivative(matrix, backend)
        if self.grading:
            return lambda phi, z: self._by_weights(phi, derivative, z, backend)
        return lambda phi, z: _weighted(
            read(self._cut(phi, slice(0, self.lower), backend), derivative, backend), z, backend
        )

    def puller_and_reader(
        self, matrix: Array, columns: int, backend: Backend
    ) -> Callable[[Array, Array], tuple[Array, Array]]:
        """As `puller`, and besides so many columns of Mᵀ Φ: (..., rows, d) and (..., rows, columns)."""
        xp = backend.xp
        values = xp.matrix_transpose(matrix[..., :columns])
        if not self.lean:
            pull_back = self.puller(matrix, backend)
            return lambda phi, z: (
                pull_back(phi, z),
                xp.matrix_transpose(read(self._part(phi, None, backend), values, backend)),
            )
        derivative = xp.concat([self.derivative(matrix, backend), values[..., : self.lower]], axis=-2)
        count, wide = values.shape[-2], self.dim * matrix.shape[-1]
        top = self.level(self.degree - 1)

        def both(phi: Array, z: Array) -> tuple[Array, Array]:
            high = read(phi[..., top, :], derivative[..., top], backend)
            of_top = _over_channels(high[..., :wide, :], phi[..., 1 : self.dim + 1, :], backend)[..., :count, :]
            whole = _plus_product(high, derivative[..., : top.start], phi[..., : top.start, :], backend)
            found = whole[..., wide:, :] + of_top * (1 / self.degree)
            return _weighted(whole[..., :wide, :], z, backend), xp.matrix_transpose(found)

        return both


@memoized
def _alike(grading: Grading, degree: int) -> tuple[tuple[int, ...], ...]:
    """The channels of each weight up to W, ascending."""
    kept = sorted({cost for cost in grading if cost <= degree * min(grading)})
    return tuple(tuple(c for c, own in enumerate(grading) if own == cost) for cost in kept)


@memoized
def _channels_of(grading: Grading, degree: int) -> np.ndarray:
    """Where x_c itself stands, (d,); where 1 stands for a channel that is left out, which has no derivative."""
    alone = {
        run.channel: run.start for level in runs(len(grading), degree, grading) for run in level if run.source == 0
    }
    return np.asarray([alone.get(c, 0) for c in range(len(grading))])


@memoized
def _places(grading: Grading, degree: int) -> np.ndarray:
    """Where each channel is in the order of `_alike`, those that are left out behind, (d,)."""
    order = [c for channels in _alike(grading, degree) for c in channels]
    return np.argsort([*order, *(c for c in range(len(grading)) if c not in order)])


def _over_channels(product: Array, channels: Array, backend: Backend) -> Array:
    """Σ_c x_c y_ce: (..., c · k, rows) and (..., c, rows) → (..., k, rows)."""
    xp = backend.xp
    count, rows = channels.shape[-2:]
    split = xp.reshape(product, (*product.shape[:-2], count, product.shape[-2] // count, rows))
    return xp.sum(split * channels[..., :, None, :], axis=-3)


def pulled_by(phi: Array, derivative: Array, z: Array, backend: Backend) -> Array:
    """Σ_e z_e of a derivative (..., d · k, r') times the first r' of the monomials (..., r, rows): (..., rows, d)."""
    return _weighted(read(phi[..., : derivative.shape[-1], :], derivative, backend), z, backend)


def _weighted(product: Array, z: Array, backend: Backend) -> Array:
    """Σ_e z_e y_ce: (..., d · k, rows) and (..., rows, k) → (..., rows, d)."""
    xp = backend.xp
    k = z.shape[-1]
    split = xp.reshape(product, (*product.shape[:-2], product.shape[-2] // k, k, product.shape[-1]))
    if backend.compiles and k <= FEW_COLUMNS:
        # One pass, where a compiled sum over so few takes four times as long.
        own = xp.matrix_transpose(z)[..., None, :, :]
        return xp.matrix_transpose(sum_of([split[..., e, :] * own[..., e, :] for e in range(k)]))
    return xp.matrix_transpose(xp.sum(split * backend.transposed(z)[..., None, :, :], axis=-2))


def row_products(phi: Array, z: Array, backend: Backend) -> Array:
    """Φ z: (..., r, rows) and (..., rows, k) → (..., r, k)."""
    xp = backend.xp
    *leading, r, rows = phi.shape
    chains = rows // CHAIN
    if rows <= CHAIN:
        return phi @ z
    if backend.compiles:
        return _in_equal_chains(phi, z, backend)
    if backend.writable and r > CHAIN and chains <= FEW_CHAINS:
        return _chained(phi, z, backend)
    cut = chains * CHAIN
    split = swap_outer(xp.reshape(phi[..., :cut], (*leading, r, chains, CHAIN)), backend)
    parts = split @ xp.reshape(z[..., :cut, :], (*z.shape[:-2], chains, CHAIN, z.shape[-1]))
    total = _total(parts, backend)
    return total if cut == rows else total + phi[..., cut:] @ z[..., cut:, :]


def _total(parts: Array, backend: Backend) -> Array:
    """Sum over the parts (..., parts, i, k); of many in two steps, at most FEW_CHAINS² / 4 of them with FEW_CHAINS additions."""
    xp = backend.xp
    count = parts.shape[-3]
    if count <= FEW_CHAINS:
        return xp.sum(parts, axis=-3)
    group = FEW_CHAINS // 2
    cut = count // group * group
    grouped = xp.reshape(parts[..., :cut, :, :], (*parts.shape[:-3], cut // group, group, *parts.shape[-2:]))
    total = xp.sum(xp.sum(grouped, axis=-3), axis=-3)
    return total if cut == count else total + xp.sum(parts[..., cut:, :, :], axis=-3)


def read(phi: Array, turned: Array, backend: Backend) -> Array:
    """Mᵀ Φ: (..., r, rows) and Mᵀ (..., k, r) → (..., k, rows)."""
    xp = backend.xp
    *leading, r, rows = phi.shape
    chains = r // CHAIN
    if backend.compiles:
        return _read_compiled(phi, turned, backend)
    if r <= CHAIN:
        return turned @ phi
    if backend.writable:
        return _chained(turned, phi, backend)
    cut = chains * CHAIN
    k = turned.shape[-2]
    split = xp.reshape(turned[..., :cut], (*turned.shape[:-2], k, chains, CHAIN))
    parts = swap_outer(split, backend) @ xp.reshape(phi[..., :cut, :], (*leading, chains, CHAIN, rows))
    total = xp.sum(parts, axis=-3)
    return total if cut == r else total + turned[..., cut:] @ phi[..., cut:, :]


def _in_equal_chains(phi: Array, z: Array, backend: Backend) -> Array:
    """`row_products` as one product: chains of as many rows, with zeros behind the last, since compilers copy what they cut."""
    count, length = _equal_chains(z.shape[-2])
    phi, z = (_ended(x, count * length, axis, backend) for x, axis in ((phi, -1), (z, -2)))
    split = swap_outer(backend.xp.reshape(phi, (*phi.shape[:-1], count, length)), backend)
    return _total(split @ backend.xp.reshape(z, (*z.shape[:-2], count, length, z.shape[-1])), backend)


def _read_compiled(phi: Array, turned: Array, backend: Backend) -> Array:
    """`read` in chains that are alike."""
    xp = backend.xp
    count, length = _equal_chains(phi.shape[-2])
    matrix, phi = (_ended(x, count * length, -2, backend) for x in (xp.matrix_transpose(turned), phi))
    matrix, phi = (xp.reshape(x, (*x.shape[:-2], count, length, x.shape[-1])) for x in (matrix, phi))
    # A compiler would join the product with what turns its factor or its result, each number by itself: six times as long.
    return backend.apart(xp.sum(xp.matrix_transpose(backend.apart(matrix)) @ phi, axis=-3))


def _equal_chains(terms: int) -> tuple[int, int]:
    """How many chains, and their length."""
    count = -(-terms // CHAIN)
    return count, -(-terms // count)


def _ended(x: Array, length: int, axis: int, backend: Backend) -> Array:
    """So many entries along an axis, which is counted from the last, zeros behind those of x."""
    shape = list(x.shape)
    shape[axis] = length - shape[axis]
    if not shape[axis]:
        return x
    return backend.xp.concat([x, backend.xp.zeros(shape, dtype=x.dtype, device=backend.device(x))], axis=axis)


def _plus_product(total: Array, left: Array, right: Array, backend: Backend) -> Array:
    """Total + left @ right; where arrays are writable the total is lost."""
    if not backend.writable:
        return total + read(right, left, backend)
    for start in range(0, left.shape[-1], CHAIN):
        part = slice(start, start + CHAIN)
        backend.product_into(total, left[..., part], right[..., part, :], True)
    return total


def _chained(left: Array, right: Array, backend: Backend) -> Array:
    """Left @ right, (..., i, j) and (..., j, k), added up chain by chain."""
    shape = (*broadcast_leading(left, right), left.shape[-2], right.shape[-1])
    total = backend.xp.empty(shape, dtype=left.dtype, device=backend.device(left))
    backend.product_into(total, left[..., :CHAIN], right[..., :CHAIN, :])
    return _plus_product(total, left[..., CHAIN:], right[..., CHAIN:, :], backend)


class InPlace:
    """Σ_e z_e ∂(Mᵀ Φ)_e / ∂x for M (..., r, k) and blocks of rows: Φ (..., r, rows), z (..., rows, k) → (..., rows, d).

    x_c ∂/∂x_c multiplies a monomial by its exponent: with E (r, d) the exponents, and no channel 0,

        x ∘ dx = Eᵀ (Φ ∘ (M z)).

    One product as skinny as the others, one pass over the features and a product with d columns, written where those of the
    block before were. Blocks with a channel that is 0, or nearly, go backwards through the recursion that makes monomials.
    """

    def __init__(self, basis: Basis, matrix: Array, backend: Backend) -> None:
        self._basis, self._matrix, self._backend = basis, matrix, backend
        table = backend.table(exponents, basis.dim, basis.degree, basis.grading, like=matrix, dtype=matrix.dtype)
        self._exponents = backend.xp.matrix_transpose(table)
        self._places = backend.table(_channels_of, basis.grading, basis.degree, like=matrix) if basis.grading else None
        self._memory = backend.memory()

    def __call__(self, phi: Array, z: Array) -> Array:
        """Of one block."""
        backend = self._backend
        xp = backend.xp
        slopes = backend.product(self._matrix, xp.matrix_transpose(z), self._memory, "slopes")
        dim, degree, grading = self._basis.dim, self._basis.degree, self._basis.grading
        x = phi[..., 1 : dim + 1, :] if self._places is None else xp.take(phi, self._places, axis=-2)
        if not self._divides(x):
            return xp.matrix_transpose(pull_back(x, phi, slopes, degree, backend, grading))
        slopes = backend.times(phi, slopes)
        return xp.matrix_transpose(read(slopes, self._exponents, backend) / x)

    def _divides(self, x: Array) -> bool:
        """Whether quotients by all channels keep their digits."""
        least = _LEAST[self._backend.dtype_name(x.dtype)]
        return 0 not in x.shape and float(self._backend.xp.min(self._backend.xp.abs(x))) >= least
