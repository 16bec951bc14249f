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

from collections.abc import Sequence
from math import log, prod
from typing import NamedTuple

import numpy as np

from .arrays import broadcast_leading, clean, sum_to_leading, swap_outer, unpack
from .backends import Array, Backend
from .backends.base import block_rows, memoized
from .monomials import degrees, features, multinomials, raised, raised_factors, rank

CHAIN = 128


class LowRankCall(NamedTuple):
    """What the computation depends on besides arrays. `coefficients` are those of P; hashable."""

    coefficients: tuple[float, ...]
    scale: float
    views: int

    @property
    def degree(self) -> int:
        """Degree g of P."""
        return len(self.coefficients) - 1


def forward(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    """Output (..., n, dv), log of the normaliser (..., n, 1), and the normaliser over the number of pairs (..., n, 1)."""
    q, keys, values, masks, _ = unpack(call.views, arrays)
    xp = backend.xp
    dim, value_dim = q.shape[-1], values[0].shape[-1]
    dtype = backend.compute_dtype(q.dtype)
    units = channel_units(q, keys, masks, call.scale, backend)
    weighted = _weights(call, dim, q, dtype, backend) * prod_of(_summaries(call, units, keys, values, masks, backend))
    leading = broadcast_leading(q, *keys, *values, *masks)
    transposed = xp.matrix_transpose(weighted)

    def body(_: None, block: Array) -> tuple[None, tuple[Array, Array]]:
        numerator = _read(
            features(_channels(block, units[0], dtype, backend), call.degree, backend), transposed, backend
        )
        normaliser = numerator[..., value_dim:, :]
        # Where every pair is masked the normaliser is exactly 0; a negative one means that P was used beyond its
        # range, and NaN says so.
        inverse = xp.where(normaliser > 0, 1 / xp.where(normaliser == 0, 1.0, normaliser), xp.nan)
        inverse = xp.where(normaliser == 0, 0.0, inverse)
        out = xp.matrix_transpose(numerator[..., :value_dim, :] * inverse)
        return None, (
            xp.broadcast_to(out, (*leading, *out.shape[-2:])),
            xp.broadcast_to(xp.matrix_transpose(normaliser), (*leading, out.shape[-2], 1)),
        )

    block = _block(call, dim, value_dim, dtype, leading, backend)
    _, (out, normaliser) = backend.scan_rows(body, None, (q,), block)
    pairs = float(sum(log(k.shape[-2]) for k in keys))
    positive = xp.where(normaliser > 0, normaliser, 1.0)
    lse = xp.where(normaliser > 0, xp.log(positive) + pairs, xp.nan)
    lse = xp.where(normaliser == 0, -xp.inf, lse)
    return out, lse, normaliser


def backward(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Gradients of query, keys and values, each in its own shape and dtype.

    The exact derivative of `forward`, for gradients of the output and of the log of the normaliser. With
    ĝ = [g, −r] / l, r = Σ g o − g_lse and C = w · A ∘ B: G = Φ(q)ᵀ ĝ, dq pulls ĝ Cᵀ back through Φ, du = Φ(a) (w · G ∘ B),
    da pulls [u, 1] (w · G ∘ B)ᵀ back, and so for the other views.
    """
    q, keys, values, masks, (out, normaliser, grad_out, grad_lse) = unpack(call.views, arrays)
    xp = backend.xp
    dim, value_dim = q.shape[-1], values[0].shape[-1]
    dtype = backend.compute_dtype(q.dtype)
    units = channel_units(q, keys, masks, call.scale, backend)
    weights = _weights(call, dim, q, dtype, backend)
    summaries = _summaries(call, units, keys, values, masks, backend)
    leading = broadcast_leading(q, *keys, *values, *masks)
    block = _block(call, dim, value_dim * (1 + dim), dtype, leading, backend)
    lower = rank(dim, call.degree - 1)

    combined = weights * prod_of(summaries)
    wide = _derivative(combined, call.degree, q, backend)

    def query_body(carry: Sum, block: Array, *blocks: Array) -> tuple[Sum, tuple[Array]]:
        o, l, g, g_lse = (backend.cast(b, dtype) for b in blocks)
        r = xp.sum(g * o, axis=-1, keepdims=True) - g_lse
        inverse = xp.where(l == 0, 0.0, 1 / xp.where(l == 0, 1.0, l))
        g_hat = xp.concat([g, -r], axis=-1) * inverse
        phi = features(_channels(block, units[0], dtype, backend), call.degree, backend)
        dq = _pull_back(phi[..., :lower, :], wide, g_hat, backend) * units[0]
        dq = sum_to_leading(dq, q.shape[:-2], backend)
        return _add(carry, _summary(phi, g_hat, backend)), (backend.cast(dq, q.dtype),)

    columns = (out, normaliser, grad_out, grad_lse)
    start = _zero_sum((*leading, len_rank(call, dim), value_dim + 1), dtype, q, backend)
    (upstream, _), (dq,) = backend.scan_rows(query_body, start, (q, *columns), block)

    d_keys, d_values = [], []
    for view, (k, v, mask) in enumerate(zip(keys, values, masks, strict=True)):
        others = [s for other, s in enumerate(summaries) if other != view]
        # Everything below is linear in this matrix: what the view broadcasts over is summed up first.
        own = sum_to_leading(
            weights * prod_of([upstream, *others]) * (1 / k.shape[-2]), broadcast_leading(k, v, mask), backend
        )
        own_wide = _derivative(own, call.degree, q, backend)
        value_columns = xp.matrix_transpose(own[..., :value_dim])

        def key_body(
            _: None,
            k: Array,
            v: Array,
            mask: Array | None,
            unit: Array = units[view + 1],
            own_wide: Array = own_wide,
            value_columns: Array = value_columns,
        ) -> tuple[None, tuple[Array, Array]]:
            k_leading, v_leading = k.shape[:-2], v.shape[:-2]
            z = _with_ones(v, mask, dtype, backend)
            phi = features(_channels(clean(k, mask, backend), unit, dtype, backend), call.degree, backend)
            dk = _pull_back(phi[..., :lower, :], own_wide, z, backend) * unit
            dv = xp.matrix_transpose(_read(phi, value_columns, backend))
            if mask is not None:
                dv = xp.where(mask, dv, 0.0)
            dk, dv = sum_to_leading(dk, k_leading, backend), sum_to_leading(dv, v_leading, backend)
            return None, (backend.cast(dk, k.dtype), backend.cast(dv, v.dtype))

        _, (dk, dv) = backend.scan_rows(key_body, None, (k, v, mask), block)
        d_keys.append(dk)
        d_values.append(dv)
    return dq, *d_keys, *d_values


def leading_limit(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> int:
    """How many problems to compute side by side, so that their summaries and derivatives fit in the workspace."""
    dim, columns = arrays[0].shape[-1], arrays[1 + call.views].shape[-1] + 1  # type: ignore[union-attr]
    numbers = len_rank(call, dim) * columns * (call.views + 3) + rank(dim, call.degree - 1) * dim * columns
    return max(1, int(backend.workspace // numbers))


def channel_units(
    q: Array, keys: Sequence[Array], masks: Sequence[Array | None], scale: float, backend: Backend
) -> list[Array]:
    """Factors (d,) for query and keys whose product over the views is `scale` in every channel.

    They give all views the same largest entry in each channel, so that monomials neither overflow nor vanish.
    Powers of two, but for `scale` itself: multiplying by them rounds nothing. Scores, and with them every result,
    do not depend on the factors, hence they count as constants in the adjoint.
    """
    xp = backend.xp
    dtype = backend.compute_dtype(q.dtype)
    logs, zeros = [], []
    for view, x in enumerate((q, *keys)):
        x = clean(x, masks[view - 1], backend) if view else x
        top = backend.cast(xp.max(xp.abs(x), axis=tuple(range(x.ndim - 1))), dtype)
        top = top * scale if view == 0 else top
        zero = top == 0
        logs.append(xp.where(zero, 0.0, xp.log2(xp.where(zero, 1.0, top))))
        zeros.append(backend.cast(zero, dtype))
    count = sum_of(zeros)
    total = sum_of(logs)
    # A channel that is 0 in some view takes the product that the others would need to reach size one.
    target = xp.where(count > 0, 0.0, total * (1 / len(logs)))
    vacant = total / xp.where(count > 0, count, 1.0)
    powers = [xp.round(xp.where(z > 0, vacant, target - x)) for x, z in zip(logs, zeros, strict=True)]
    powers[0] = -sum_of(powers[1:])
    units = [xp.pow(xp.full_like(p, 2.0), p) for p in powers]
    units[0] = units[0] * scale
    return units


def prod_of(arrays: Sequence[Array]) -> Array:
    """Hadamard product of arrays that broadcast."""
    result = arrays[0]
    for a in arrays[1:]:
        result = result * a
    return result


def sum_of(arrays: Sequence[Array]) -> Array:
    """Sum of arrays that broadcast."""
    result = arrays[0]
    for a in arrays[1:]:
        result = result + a
    return result


Sum = tuple[Array, Array]


def _zero_sum(shape: tuple[int, ...], dtype: object, like: Array, backend: Backend) -> Sum:
    """An empty compensated sum."""
    zero = backend.xp.zeros(shape, dtype=dtype, device=backend.device(like))
    return zero, zero


def _add(carry: Sum, term: Array) -> Sum:
    """One step of Kahan's compensated sum."""
    total, lost = carry
    term = term - lost
    new = total + term
    return new, (new - total) - term


def len_rank(call: LowRankCall, dim: int) -> int:
    """The number of monomials r."""
    return rank(dim, call.degree)


@memoized
def _weight_table(coefficients: tuple[float, ...], dim: int) -> np.ndarray:
    """w_α = c_|α| · |α|! / α!, (r, 1)."""
    degree = len(coefficients) - 1
    table: np.ndarray = np.asarray(coefficients)[degrees(dim, degree)] * multinomials(dim, degree)
    return table[:, None]


def _weights(call: LowRankCall, dim: int, like: Array, dtype: object, backend: Backend) -> Array:
    """The weights w as a column (r, 1)."""
    return backend.table(_weight_table, call.coefficients, dim, like=like, dtype=dtype)


def _summaries(
    call: LowRankCall,
    units: Sequence[Array],
    keys: Sequence[Array],
    values: Sequence[Array],
    masks: Sequence[Array | None],
    backend: Backend,
) -> list[Array]:
    """Φ(k)ᵀ [v, 1] / n_μ for every view, (..., r, dv + 1)."""
    results = []
    for unit, k, v, mask in zip(units[1:], keys, values, masks, strict=True):
        dim, value_dim = k.shape[-1], v.shape[-1]
        dtype = backend.compute_dtype(k.dtype)
        leading = broadcast_leading(k, v, mask)

        def body(
            carry: Sum, k: Array, v: Array, mask: Array | None, unit: Array = unit, dtype: object = dtype
        ) -> tuple[Sum, tuple[()]]:
            phi = features(_channels(clean(k, mask, backend), unit, dtype, backend), call.degree, backend)
            return _add(carry, _summary(phi, _with_ones(v, mask, dtype, backend), backend)), ()

        start = _zero_sum((*leading, len_rank(call, dim), value_dim + 1), dtype, k, backend)
        block = _block(call, dim, value_dim, dtype, leading, backend)
        (total, _), _ = backend.scan_rows(body, start, (k, v, mask), block)
        results.append(total * (1 / k.shape[-2]))
    return results


def _block(call: LowRankCall, dim: int, columns: int, dtype: object, leading: tuple[int, ...], backend: Backend) -> int:
    """Rows in a block: features and columns of one block fit in the workspace."""
    itemsize = 8 if backend.dtype_name(dtype) == "float64" else 4
    return block_rows((len_rank(call, dim) + columns) * itemsize * prod(leading), backend.workspace, 32 * CHAIN)


def _channels(x: Array, unit: Array, dtype: object, backend: Backend) -> Array:
    """Rows (..., rows, d) times the units, channel-major (..., d, rows)."""
    return backend.xp.matrix_transpose(backend.cast(x, dtype) * unit)


def _with_ones(v: Array, mask: Array | None, dtype: object, backend: Backend) -> Array:
    """[v, 1], and 0 in masked rows: (..., rows, dv + 1)."""
    xp = backend.xp
    v = backend.cast(clean(v, mask, backend), dtype)
    shape = (*v.shape[:-1], 1)
    device = backend.device(v)
    one = (
        xp.ones(shape, dtype=dtype, device=device)
        if mask is None
        else xp.broadcast_to(backend.cast(mask, dtype), shape)
    )
    return xp.concat([v, one], axis=-1)


def _summary(phi: Array, z: Array, backend: Backend) -> Array:
    """Φᵀ z: (..., r, rows) and (..., rows, k) → (..., r, k)."""
    xp = backend.xp
    *leading, r, rows = phi.shape
    chains = rows // CHAIN
    if chains < 2:
        return phi @ z
    cut = chains * CHAIN
    split = swap_outer(xp.reshape(phi[..., :cut], (*leading, r, chains, CHAIN)), backend)
    parts = split @ xp.reshape(z[..., :cut, :], (*z.shape[:-2], chains, CHAIN, z.shape[-1]))
    total = xp.sum(parts, axis=-3)
    return total if cut == rows else total + phi[..., cut:] @ z[..., cut:, :]


def _read(phi: Array, transposed: Array, backend: Backend) -> Array:
    """Mᵀ Φ: (..., r, rows) and Mᵀ (..., k, r) → (..., k, rows)."""
    xp = backend.xp
    *leading, r, rows = phi.shape
    chains = r // CHAIN
    if chains < 2:
        return transposed @ phi
    cut = chains * CHAIN
    k = transposed.shape[-2]
    split = xp.reshape(transposed[..., :cut], (*transposed.shape[:-2], k, chains, CHAIN))
    parts = swap_outer(split, backend) @ xp.reshape(phi[..., :cut, :], (*leading, chains, CHAIN, rows))
    total = xp.sum(parts, axis=-3)
    return total if cut == r else total + transposed[..., cut:] @ phi[..., cut:, :]


def _derivative(matrix: Array, degree: int, like: Array, backend: Backend) -> Array:
    """M (..., r, k) → (..., d · k, r'): for each channel c, (β_c + 1) M[β + e_c] over |β| ≤ degree − 1, transposed."""
    xp = backend.xp
    dim, k = like.shape[-1], matrix.shape[-1]
    lower = rank(dim, degree - 1)
    taken = xp.take(xp.matrix_transpose(matrix), backend.table(raised, dim, degree, like=like), axis=-1)
    taken = taken * backend.table(raised_factors, dim, degree, like=like, dtype=matrix.dtype)
    split = xp.reshape(taken, (*matrix.shape[:-2], k, dim, lower))
    return xp.reshape(swap_outer(split, backend), (*matrix.shape[:-2], dim * k, lower))


def _pull_back(phi: Array, wide: Array, z: Array, backend: Backend) -> Array:
    """Σ_e z_e ∂/∂x (Mᵀ Φ(x))_e as one wide product: (..., r', rows), (..., d · k, r'), (..., rows, k) → (..., rows, d)."""
    xp = backend.xp
    k = z.shape[-1]
    product = _read(phi, wide, backend)
    dim, rows = product.shape[-2] // k, product.shape[-1]
    split = xp.reshape(product, (*product.shape[:-2], dim, k, rows))
    summed = xp.sum(split * xp.matrix_transpose(z)[..., None, :, :], axis=-2)
    return xp.matrix_transpose(summed)
