"""Tensor attention through a polynomial in place of exp: summaries, read-out and adjoint.

With P(x) = Σ_t c_t x^t and x_i,j,k = Σ_c q_ic a_jc b_kc, multilinearity gives (Lemma F.1)

    P(x_i,j,k) = Σ_α w_α q_i^α a_j^α b_k^α,      w_α = c_|α| · |α|! / (α_1! … α_d!),

and so (Lemma 4.5) the softmax with P in place of exp, over all pairs (j, k), needs one sum over the rows of
each view, its summary, and one read-out for each query row:

    A = Φ(a)ᵀ [u, 1],   B = Φ(b)ᵀ [v, 1],   N = Φ(q) (w · A ∘ B),   o = N[:, :-1] / N[:, -1].

Any number m of views works alike. Rows pass in blocks and Φ exists for one block at a time: O(n r dv) time and
O(r dv) memory. Symbols: q query (..., n, d); a, b keys (..., n_μ, d); u, v values (..., n_μ, dv); g the gradient
of o; Φ the monomials; r their number; w the weights. docs/notation.md has the full list.

Floating-point sums run over at most `CHAIN` terms before they are added up further, and blocks are added with
compensation, so that rounding does not grow with the number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, prod
from typing import NamedTuple

import numpy as np

from ..arrays import broadcast_leading, clean, sum_to_leading, unpack, with_leading
from ..backends import Array, Backend
from ..backends.base import block_rows
from ..features.balance import prod_in_range
from ..features.basis import CHAIN, FEW_CHAINS, FEW_COLUMNS, Basis
from ..features.monomials import Grading, degrees, multinomials, rank
from ..features.scaling import channel_units

# Blocks of rows that are worth a thread.
FEWEST_BLOCKS = 4
_FEW_ROWS = 8 * CHAIN


class LowRankCall(NamedTuple):
    """What the computation depends on besides arrays. `coefficients` are those of P; hashable.

    With a `grading`, P keeps only the monomials that are left by it (`monomials`).
    """

    coefficients: tuple[float, ...]
    scale: float
    views: int
    grading: Grading = ()

    @property
    def degree(self) -> int:
        """Degree g of P."""
        return len(self.coefficients) - 1


def forward(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Output (..., n, dv), log of the normaliser (..., n, 1), and the normaliser over the number of pairs (..., n, 1).

    And the summary of every view, (..., r, dv + 1), which the adjoint takes if it is given them.
    """
    q, keys, values, masks, _ = unpack(call.views, arrays)
    units = channel_units(q, keys, masks, call.scale, backend)
    summaries = _summaries(call, units, keys, values, masks, backend)
    combined = weights(call, q, backend) * prod_in_range(summaries, backend)
    leading = broadcast_leading(q, *keys, *values, *masks)
    out, normaliser = read_out(q, units[0], combined, leading, call.degree, backend, call.grading)
    return out, log_normaliser(normaliser, keys, backend), normaliser, *summaries


def log_normaliser(normaliser: Array, keys: Sequence[Array], backend: Backend) -> Array:
    """Log of the sum of exp, from the normaliser over the number of pairs: −inf where that is 0, NaN where it lost its sign."""
    xp = backend.xp
    pairs = float(sum(log(k.shape[-2]) for k in keys))
    positive = xp.where(normaliser > 0, normaliser, 1.0)
    lse = xp.where(normaliser > 0, xp.log(positive) + pairs, xp.nan)
    return xp.where(normaliser == 0, -xp.inf, lse)


def backward(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Gradients of query, keys and values, each in its own shape, in the dtype of the computation.

    The exact derivative of `forward`, for gradients of the output and of the log of the normaliser. With
    ĝ = [g, −r] / l, r = Σ g o − g_lse and C = w · A ∘ B: G = Φ(q)ᵀ ĝ, dq pulls ĝ Cᵀ back through Φ, du = Φ(a) (w · G ∘ B),
    da pulls [u, 1] (w · G ∘ B)ᵀ back, and so for the other views.
    """
    q, keys, values, masks, (out, normaliser, *known, grad_out, grad_lse) = unpack(call.views, arrays)
    units = channel_units(q, keys, masks, call.scale, backend)
    w = weights(call, q, backend)
    summaries = known or _summaries(call, units, keys, values, masks, backend)
    columns = (out, normaliser, grad_out, grad_lse)
    leading = broadcast_leading(q, *keys, *values, *masks)
    combined = w * prod_in_range(summaries, backend)
    upstream, dq = query_adjoint(q, units[0], combined, columns, leading, call.degree, backend, call.grading)
    d_keys, d_values = [], []
    for view, (k, v, mask) in enumerate(zip(keys, values, masks, strict=True)):
        others = [s for other, s in enumerate(summaries) if other != view]
        own = w * prod_in_range([upstream, *others], backend) * (1 / k.shape[-2])
        dk, dv = key_adjoint(k, v, mask, units[view + 1], own, call.degree, backend, call.grading)
        d_keys.append(dk)
        d_values.append(dv)
    return dq, *d_keys, *d_values


def summary(
    k: Array, v: Array, mask: Array | None, unit: Array, degree: int, backend: Backend, grading: Grading = ()
) -> Array:
    """Φ(k)ᵀ [v, 1], (..., r, dv + 1)."""
    basis = Basis.of(k.shape[-1], degree, v.shape[-1] + 1, grading)
    return summed_rows(lambda rows: rows * unit, k, v, mask, basis, backend)[0]


def summed_rows(
    in_units: Callable[[Array], Array], k: Array, v: Array, mask: Array | None, basis: Basis, backend: Backend
) -> Sum:
    """Φ(k)ᵀ [v, 1] of keys `in_units`, (..., r, dv + 1), as a compensated sum."""
    dtype = backend.compute_dtype(k.dtype)

    def prepare(v: Array, mask: Array | None) -> Array:
        return with_ones(v, mask, dtype, backend)

    def products(phi: Array, z: Array) -> tuple[Array]:
        return (basis.row_sums(phi, z, backend),)

    shapes = [(basis.size, v.shape[-1] + 1)]
    return summed_products(prepare, products, shapes, k, v, mask, in_units, basis, backend)[0]


def summed_products(
    prepare: Callable[[Array, Array | None], Array],
    products: Callable[[Array, Array], tuple[Array, ...]],
    shapes: Sequence[tuple[int, int]],
    k: Array,
    v: Array,
    mask: Array | None,
    in_units: Callable[[Array], Array],
    basis: Basis,
    backend: Backend,
) -> list[Sum]:
    """Sums over all rows of ``products(Φ(k), prepare(v, mask))`` of keys `in_units`, compensated, of these shapes."""
    dtype = backend.compute_dtype(k.dtype)
    leading = broadcast_leading(k, v, mask)
    block, together = blocks_of(basis, basis.width(sum(columns for _, columns in shapes)), dtype, leading, backend)

    features = basis.features(backend)

    def of_block(sums: tuple[Array, ...] | None, x: Array, z: Array) -> tuple[tuple[Array, ...], tuple[()]]:
        found = products(features(backend.xp.matrix_transpose(x)), z)
        return found if sums is None else tuple(s + f for s, f in zip(sums, found, strict=True)), ()

    def body(carry: tuple[Sum, ...], k: Array, v: Array, mask: Array | None) -> tuple[tuple[Sum, ...], tuple[()]]:
        x = in_units(backend.cast(clean(k, mask, backend), dtype))
        sums, _ = backend.scan_rows(of_block, None, (x, prepare(v, mask)), block)
        return tuple(add(c, s) for c, s in zip(carry, sums, strict=True)), ()

    start = tuple(zero_sum((*leading, *shape), dtype, k, backend) for shape in shapes)
    carries, _ = backend.share_rows(body, start, (k, v, mask), together, FEWEST_BLOCKS * block)
    return [joined(sums) for sums in zip(*carries, strict=True)]


def read_out(
    q: Array,
    unit: Array,
    combined: Array,
    leading: tuple[int, ...],
    degree: int,
    backend: Backend,
    grading: Grading = (),
) -> tuple[Array, Array]:
    """Φ(q) C for C (..., r, dv + 1): the output (..., n, dv), and the normaliser (..., n, 1)."""
    xp = backend.xp
    dtype = backend.compute_dtype(q.dtype)
    basis = Basis.of(q.shape[-1], degree, combined.shape[-1], grading)
    reader = basis.reader(combined, backend)
    block, together = blocks_of(basis, basis.width(combined.shape[-1]), dtype, leading, backend, basis.lean)

    features = basis.features(backend)

    def of_block(_: None, x: Array) -> tuple[None, tuple[Array]]:
        return None, (xp.matrix_transpose(basis.read(features(xp.matrix_transpose(x)), reader, backend)),)

    def body(_: None, rows: Array) -> tuple[None, tuple[Array, Array]]:
        _, (numerator,) = backend.scan_rows(of_block, None, (backend.cast(rows, dtype) * unit,), block)
        return None, divided(numerator, leading, backend)

    _, (out, normaliser) = backend.share_rows(body, None, (q,), together, FEWEST_BLOCKS * block)
    return out, normaliser


def divided(numerator: Array, leading: tuple[int, ...], backend: Backend) -> tuple[Array, Array]:
    """Output (..., rows, dv) and normaliser (..., rows, 1) from numerators (..., rows, dv + 1)."""
    xp = backend.xp
    normaliser = numerator[..., -1:]
    # Where every pair is masked the normaliser is exactly 0; a negative one means that P was used beyond its
    # range, and NaN says so.
    inverse = xp.where(normaliser > 0, 1 / xp.where(normaliser == 0, 1.0, normaliser), xp.nan)
    inverse = xp.where(normaliser == 0, 0.0, inverse)
    return with_leading(numerator[..., :-1] * inverse, leading, backend), with_leading(normaliser, leading, backend)


def query_adjoint(
    q: Array,
    unit: Array,
    combined: Array,
    columns: Sequence[Array],
    leading: tuple[int, ...],
    degree: int,
    backend: Backend,
    grading: Grading = (),
) -> tuple[Array, Array]:
    """G (..., r, dv + 1) and dq, from C and the columns (o, l, g, g_lse)."""
    xp = backend.xp
    dtype = backend.compute_dtype(q.dtype)
    basis = Basis.of(q.shape[-1], degree, combined.shape[-1], grading)
    block, together = blocks_of(basis, basis.pulled(combined.shape[-1], backend), dtype, leading, backend)

    features, pull_back = basis.features(backend), basis.puller(combined, backend)

    def of_block(sums: Array | None, x: Array, g_hat: Array) -> tuple[Array, tuple[Array]]:
        phi = features(xp.matrix_transpose(x))
        found = basis.row_sums(phi, g_hat, backend)
        return found if sums is None else sums + found, (pull_back(phi, g_hat),)

    def body(carry: Sum, rows: Array, *blocks: Array) -> tuple[Sum, tuple[Array]]:
        o, l, g, g_lse = (backend.cast(b, dtype) for b in blocks)
        g_hat = scaled_gradient(o, l, g, g_lse, backend)
        x = backend.cast(rows, dtype) * unit
        sums, (dq,) = backend.scan_rows(of_block, None, (x, g_hat), block)
        return add(carry, sums), (sum_to_leading(dq * unit, q.shape[:-2], backend),)

    start = zero_sum((*leading, *combined.shape[-2:]), dtype, q, backend)
    carries, (dq,) = backend.share_rows(body, start, (q, *columns), together, FEWEST_BLOCKS * block)
    return joined(carries)[0], dq


def key_adjoint(
    k: Array,
    v: Array,
    mask: Array | None,
    unit: Array,
    own: Array,
    degree: int,
    backend: Backend,
    grading: Grading = (),
) -> tuple[Array, Array]:
    """(dk, dv) of a view whose summary has the gradient `own` (..., r, dv + 1)."""
    xp = backend.xp
    dtype = backend.compute_dtype(k.dtype)
    columns = v.shape[-1] + 1
    leading = broadcast_leading(k, v, mask)
    # All that follows is linear in this matrix: what the view broadcasts over is summed up first.
    own = sum_to_leading(own, leading, backend)
    # With derivatives, these give the values' share of the highest degree as well.
    lean = degree >= 2 and (columns <= FEW_COLUMNS or not backend.writable) and not grading
    basis = Basis(k.shape[-1], degree, lean, grading)
    block, together = blocks_of(basis, basis.pulled(columns, backend), dtype, leading, backend, basis.lean)

    features, pull_back = basis.features(backend), basis.puller_and_reader(own, backend)

    def of_block(_: None, x: Array, z: Array) -> tuple[None, tuple[Array, Array]]:
        return None, pull_back(features(xp.matrix_transpose(x)), z)

    def body(_: None, k: Array, v: Array, mask: Array | None) -> tuple[None, tuple[Array, Array]]:
        x = backend.cast(k, dtype) * unit
        if mask is not None:
            # What masked rows hold does not matter, but a 0 would take longer.
            x = xp.where(mask, x, 1.0)
        _, (dk, dv) = backend.scan_rows(of_block, None, (x, with_ones(v, mask, dtype, backend)), block)
        dk, dv = clean(dk * unit, mask, backend), clean(dv, mask, backend)
        return None, (sum_to_leading(dk, k.shape[:-2], backend), sum_to_leading(dv, v.shape[:-2], backend))

    _, (dk, dv) = backend.share_rows(body, None, (k, v, mask), together, FEWEST_BLOCKS * block)
    return dk, dv


def scaled_gradient(o: Array, l: Array, g: Array, g_lse: Array, backend: Backend) -> Array:
    """ĝ = [g, −r] / l with r = Σ g o − g_lse, and 0 where l is: (..., rows, dv + 1)."""
    xp = backend.xp
    r = xp.sum(g * o, axis=-1, keepdims=True) - g_lse
    inverse = xp.where(l == 0, 0.0, 1 / xp.where(l == 0, 1.0, l))
    return side_by_side(g, -r, backend, inverse)


def leading_limit(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> int:
    """How many problems to compute side by side."""
    return problems(call, arrays[0].shape[-1], arrays[1 + call.views].shape[-1] + 1, backend)  # type: ignore[union-attr]


def problems(call: LowRankCall, dim: int, columns: int, backend: Backend) -> int:
    """How many of them have summaries and derivatives that take eight workspaces at most."""
    r = rank(dim, call.degree, call.grading)
    numbers = r * columns * (call.views + 3) + (r if call.grading else rank(dim, call.degree - 1)) * dim * columns
    return max(1, int(backend.workspace // numbers))


Sum = tuple[Array, Array]


def zero_sum(shape: tuple[int, ...], dtype: object, like: Array, backend: Backend) -> Sum:
    """An empty compensated sum."""
    zero = backend.xp.zeros(shape, dtype=dtype, device=backend.device(like))
    return zero, zero


def add(carry: Sum, term: Array) -> Sum:
    """One step of Kahan's compensated sum."""
    total, lost = carry
    term = term - lost
    new = total + term
    return new, (new - total) - term


def joined(sums: Sequence[Sum]) -> Sum:
    """Compensated sums as one."""
    carry, *others = sums
    for total, lost in others:
        carry = add(add(carry, total), -lost)
    return carry


def weights(call: LowRankCall, like: Array, backend: Backend) -> Array:
    """The weights w_α = c_|α| · |α|! / α! as a column (r, 1)."""
    dtype = backend.compute_dtype(like.dtype)
    return backend.table(_weights, call.coefficients, like.shape[-1], call.grading, like=like, dtype=dtype)


def _weights(coefficients: tuple[float, ...], dim: int, grading: Grading) -> np.ndarray:
    """The table of `weights`."""
    degree = len(coefficients) - 1
    of_degree = np.asarray(coefficients)[degrees(dim, degree, grading)]
    table: np.ndarray = (of_degree * multinomials(dim, degree, grading))[:, None]
    return table


def _summaries(
    call: LowRankCall,
    units: Sequence[Array],
    keys: Sequence[Array],
    values: Sequence[Array],
    masks: Sequence[Array | None],
    backend: Backend,
) -> list[Array]:
    """Φ(k)ᵀ [v, 1] / n_μ for every view, (..., r, dv + 1)."""
    return [
        summary(k, v, mask, unit, call.degree, backend, call.grading) * (1 / k.shape[-2])
        for unit, k, v, mask in zip(units[1:], keys, values, masks, strict=True)
    ]


def block_of(basis: Basis, columns: int, dtype: object, leading: tuple[int, ...], backend: Backend) -> int:
    """Rows in a block: features and columns of one block fit in the workspace, or in four of them where these rows were few."""
    itemsize = backend.itemsize(dtype)
    row = (basis.held + columns) * itemsize * prod(leading)
    # The bounds count so many additions, in two steps; before them stand the sums of all chains.
    at_most = min(backend.most_rows, FEW_CHAINS**2 // 4 * CHAIN)
    if at_most > FEW_CHAINS * CHAIN:
        row += row * columns // CHAIN
    room = backend.workspace
    if backend.reads:
        # Chains over many monomials of few rows are many small products.
        room = max(room, min(4 * room, _FEW_ROWS * row))
    return int(block_rows(row, room, at_most))


def blocks_of(
    basis: Basis, columns: int, dtype: object, leading: tuple[int, ...], backend: Backend, together: bool = True
) -> tuple[int, int]:
    """Rows whose features are there at once, and rows that are made ready for them, which may be `together` with more."""
    block = block_of(basis, columns, dtype, leading, backend)
    # A loop in a loop is one too many where loops are compiled.
    return block, block * max(1, min(FEW_CHAINS * CHAIN // block, 32)) if together and backend.writable else block


def channels(x: Array, unit: Array, dtype: object, backend: Backend) -> Array:
    """Rows (..., rows, d) times the units, channel-major (..., d, rows)."""
    return backend.xp.matrix_transpose(backend.cast(x, dtype) * unit)


def with_ones(v: Array, mask: Array | None, dtype: object, backend: Backend) -> Array:
    """[v, 1], and 0 in masked rows: (..., rows, dv + 1)."""
    xp = backend.xp
    v = backend.cast(clean(v, mask, backend), dtype)
    shape = (*v.shape[:-1], 1)
    if mask is not None:
        return side_by_side(v, xp.broadcast_to(backend.cast(mask, dtype), shape), backend)
    return side_by_side(v, xp.ones(shape, dtype=dtype, device=backend.device(v)), backend)


def side_by_side(left: Array, right: Array, backend: Backend, factor: Array | None = None) -> Array:
    """Columns (..., rows, k) and (..., rows, k'), times a factor (..., rows, 1): (..., rows, k + k')."""
    if not backend.writable:
        joined = backend.xp.concat([left, right], axis=-1)
        return joined if factor is None else joined * factor
    # Faster than joining such narrow rows.
    k = left.shape[-1]
    leading = broadcast_leading(left, right, factor)
    shape = (*leading, left.shape[-2], k + right.shape[-1])
    whole = backend.xp.empty(shape, dtype=left.dtype, device=backend.device(left))
    for target, part in ((whole[..., :k], left), (whole[..., k:], right)):
        if factor is None:
            target[...] = part
        else:
            backend.multiply_into(target, part, factor)
    return whole
