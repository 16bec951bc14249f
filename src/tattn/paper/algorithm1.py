"""Algorithm 1 of the paper: dLoss/dX for X = X1 (X2 ⊘ X3)ᵀ in almost linear time, within a certified error.

With q = A1 X1, a = A2 X2, b = A3 X3, u = A4 Y1, v = A5 Y2, the loss ½ ‖o − E‖² of the attention o of q to all pairs of
rows of a and b, and p = f ∘ (w − r), w = c (u ⊘ v)ᵀ, c = o − E, r = Σ c ∘ o,

    dLoss/dX = scale · A1ᵀ p (A2 ⊗ A3).

The algorithm writes p̃ as P1 (P2 ⊘ P3)ᵀ with few columns and takes A_μ inside: T_μ = A_μᵀ P_μ, and the gradient is
scale · T1 (T2 ⊘ T3)ᵀ. Its steps, in order, are the functions below; rows pass in blocks, so that of all this only the
T_μ exist for the whole problem: O(n r d²) time and O(r d²) memory for rank r. Symbols as in docs/notation.md; a factor U
is kept as Uᵀ, (..., r, rows), and T_μ as T_μᵀ, (..., r (dv + 1), d_μ).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import exp, inf, prod
from typing import NamedTuple

from ..approximation.exponential import Polynomial
from ..arrays import broadcast_leading, channel_pairs, in_parts, with_leading
from ..backends import Array, Backend
from ..backends.base import block_rows
from ..backends.operations import CHAIN
from ..bounds.rounding import UNIT, chains, computed_in
from ..engines.features import add, channels, weights, with_ones, zero_sum
from ..features.basis import FEW_CHAINS, read, row_products
from ..features.monomials import Expansion, features, rank
from ..features.scaling import channel_units


class Algorithm1Call(NamedTuple):
    """What the computation depends on besides arrays; hashable. With `upstream`, the target is c itself and not E."""

    coefficients: tuple[float, ...]
    scale: float
    upstream: bool

    @property
    def degree(self) -> int:
        """Degree g of P."""
        return len(self.coefficients) - 1


def key_factor(k: Array, unit: Array, degree: int, backend: Backend) -> Array:
    """Lemma F.1: the rows of U2 = Φ(a), or U3 = Φ(b), as (..., r, rows)."""
    return features(channels(k, unit, k.dtype, backend), degree, backend)


def query_factor(q: Array, unit: Array, w: Array, ones: Array, degree: int, backend: Backend) -> Array:
    """Lemma F.1: the rows of U1 = diag(1/l) Φ(q) diag(w), so that U1 (U2 ⊘ U3)ᵀ is the softmax with P in place of exp.

    `ones` (..., r, 1) is the sum of the rows of U2 ⊘ U3, a product of two sums (Lemma 4.5), and l = Φ(q) diag(w) ones.
    """
    weighted = features(channels(q, unit, q.dtype, backend), degree, backend) * w
    return weighted / read(weighted, backend.xp.matrix_transpose(ones), backend)


def output(u1: Array, pairs: Array, backend: Backend) -> Array:
    """Lemma F.2: õ = U1 ((U2ᵀ u) ∘ (U3ᵀ v)), (..., rows, dv), by Lemma 4.5; then c̃ = õ − E. `pairs` is the product."""
    xp = backend.xp
    return xp.matrix_transpose(read(u1, xp.matrix_transpose(pairs), backend))


def query_columns(c: Array, o: Array, backend: Backend) -> Array:
    """Lemmas F.3 and F.7: [c̃, −r̃], (..., rows, dv + 1), with r̃ = Σ_e c̃ ∘ õ.

    Beside [u, 1] and [v, 1] for the keys: w̃ = c̃ (u ⊘ v)ᵀ, and −r̃ stands with the ones.
    """
    xp = backend.xp
    r = xp.sum(c * o, axis=-1, keepdims=True)
    return xp.concat([with_leading(c, r.shape[:-2], backend), -r], axis=-1)


def projected(factor: Array, columns: Array, a: Array, backend: Backend) -> Array:
    """Lemmas F.5 and F.7: T_μᵀ = (U ⊖ z)ᵀ A for blocks of rows, (..., r k, d), never forming P_μ = U ⊖ z.

    By Fact 4.4, f̃ ∘ (w̃ − r̃) = (U1 ⊖ [c̃, −r̃]) ((U2 ⊖ [u, 1]) ⊘ (U3 ⊖ [v, 1]))ᵀ: the paper's stacked P_μ with their columns
    in another order. (U ⊖ z)ᵀ A = Uᵀ (z ⊖ A) up to the shape, and z ⊖ A is small.
    """
    product = row_products(factor, channel_pairs(columns, a, backend), backend)
    return backend.xp.reshape(product, (*product.shape[:-2], -1, a.shape[-1]))


def assembled(t1: Array, t2: Array, t3: Array, backend: Backend) -> Array:
    """Theorem F.8: T1 (T2 ⊘ T3)ᵀ, (..., d1, d2 d3), by the tensor trick (Facts C.11, C.12, C.20), from T_μᵀ (..., K, d_μ)."""
    xp = backend.xp
    leading, (d1, d2, d3) = broadcast_leading(t1, t2, t3), (t.shape[-1] for t in (t1, t2, t3))

    def body(carry: Sum, t1: Array, t2: Array, t3: Array) -> tuple[Sum, tuple[()]]:
        return add(carry, row_products(xp.matrix_transpose(t1), channel_pairs(t2, t3, backend), backend)), ()

    start = zero_sum((*leading, d1, d2 * d3), t1.dtype, t1, backend)
    (total, _), _ = backend.scan_rows(body, start, (t1, t2, t3), _block(d1 + d2 * d3, t1.dtype, leading, backend))
    return total


def factors(call: Algorithm1Call, backend: Backend, arrays: Sequence[Array]) -> tuple[Array, Array, Array]:
    """(T1ᵀ, T2ᵀ, T3ᵀ), each (..., r (dv + 1), d_μ), scale included: the gradient is T1 (T2 ⊘ T3)ᵀ."""
    q, a, b, u, v, a1, a2, a3, target = arrays
    units = channel_units(q, [a, b], [None, None], call.scale, backend)
    t2, s2 = _key_side(a, u, a2, units[1], call.degree, backend)
    t3, s3 = _key_side(b, v, a3, units[2], call.degree, backend)
    t1 = _query_side(call, (q, a1, target), units[0], s2 * s3, backend)
    return t1 * call.scale, t2, t3


def gradient(call: Algorithm1Call, backend: Backend, arrays: Sequence[Array]) -> tuple[Array]:
    """dLoss/dX, (..., d1, d2 d3), a few problems at a time."""
    columns = rank(arrays[0].shape[-1], call.degree) * (arrays[3].shape[-1] + 1)
    limit = max(1, int(backend.workspace // (columns * sum(a.shape[-1] for a in arrays[5:8]))))
    return in_parts(partial(_gradient, call, backend), limit, (None,), backend, arrays)


def _gradient(call: Algorithm1Call, backend: Backend, arrays: Sequence[Array]) -> tuple[Array]:
    return (assembled(*factors(call, backend, arrays), backend),)


def rounding(polynomial: Polynomial, lowest_mean: float, *, rank: int, value_dim: int, dtype: str) -> float:
    """ρ: rounding of the sums, relative to the normaliser, by the model of `tattn.bounds.rounding`.

    Three sums over rows and one over the r (dv + 1) columns of the T_μ; a term of degree t carries 4 t roundings of
    monomials and 20 of its other factors.
    """
    least = (1 - polynomial.delta) * exp(max(-polynomial.bound, lowest_mean))
    if least <= 0:
        return inf
    lost = chains(3, CHAIN + rank * (value_dim + 1) / CHAIN + value_dim)
    sizes = (abs(c) * polynomial.bound**t * (4 * t + 20 + lost) for t, c in enumerate(polynomial.coefficients))
    return UNIT[computed_in(dtype)] * sum(sizes) / least


Sum = tuple[Array, Array]


def _key_side(k: Array, v: Array, a: Array, unit: Array, degree: int, backend: Backend) -> tuple[Array, Array]:
    """T_μᵀ (..., r (dv + 1), d_μ) and the summary Uᵀ [v, 1] (..., r, dv + 1) of a view, both over its number of rows."""
    r, columns, width = rank(k.shape[-1], degree), v.shape[-1] + 1, a.shape[-1]
    leading = broadcast_leading(k, v, a)

    def body(carry: tuple[Sum, Sum], k: Array, v: Array, a: Array) -> tuple[tuple[Sum, Sum], tuple[()]]:
        factor = key_factor(k, unit, degree, backend)
        z = with_ones(v, None, v.dtype, backend)
        return (
            add(carry[0], projected(factor, z, a, backend)),
            add(carry[1], row_products(factor, z, backend)),
        ), ()

    start = (
        zero_sum((*leading, r * columns, width), k.dtype, k, backend),
        zero_sum((*broadcast_leading(k, v), r, columns), k.dtype, k, backend),
    )
    block = _block(r + columns * width, k.dtype, leading, backend)
    ((t, _), (s, _)), _ = backend.scan_rows(body, start, (k, v, a), block)
    return t * (1 / k.shape[-2]), s * (1 / k.shape[-2])


def _query_side(
    call: Algorithm1Call, rows: tuple[Array, Array, Array], unit: Array, pairs: Array, backend: Backend
) -> Array:
    """T1ᵀ (..., r (dv + 1), d1), for the rows of q, a1 and the target.

    `pairs` (..., r, dv + 1) is the product of the summaries of [u, 1] and [v, 1]. Those
    are means, not sums: U1 is larger by n2 n3, and T2 and T3, means too, make up for it.
    """
    q, a1, _ = rows
    w = weights(Expansion(call.coefficients), q, backend)
    r, columns, width = w.shape[-2], pairs.shape[-1], a1.shape[-1]
    leading = broadcast_leading(*rows, pairs)

    def body(carry: Sum, q: Array, a1: Array, target: Array) -> tuple[Sum, tuple[()]]:
        u1 = query_factor(q, unit, w, pairs[..., -1:], call.degree, backend)
        o = output(u1, pairs[..., :-1], backend)
        c = target if call.upstream else o - target
        return add(carry, projected(u1, query_columns(c, o, backend), a1, backend)), ()

    start = zero_sum((*leading, r * columns, width), q.dtype, q, backend)
    block = _block(2 * r + columns * width, q.dtype, leading, backend)
    (t, _), _ = backend.scan_rows(body, start, rows, block)
    return t


def _block(numbers: int, dtype: object, leading: tuple[int, ...], backend: Backend) -> int:
    """Rows in a block of `numbers` temporary numbers a row."""
    itemsize = backend.itemsize(dtype)
    return int(block_rows(numbers * itemsize * prod(leading), backend.workspace, FEW_CHAINS * CHAIN))
