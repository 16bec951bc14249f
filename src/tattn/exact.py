"""Tensor attention by its definition, streamed: n³ time for two views, linear memory, for any finite input.

With the scores x_i,j,k = scale · Σ_c q_ic a_jc b_kc, f their softmax over all pairs (j, k) and o_i = Σ f u_j ∘ v_k:
for fixed j this is ordinary attention of the rows s_ij = q_i ∘ a_j over the keys b and values v, so a view is taken
off by multiplying its rows into the query, until one is left. Scores exist for one block of rows at a time.

Adjoint, for a gradient g of o and r_i = Σ_e g_ie o_ie (less the gradient of lse): with h_ij = g_i ∘ u_j,
w = h · v and p = f ∘ (w − r), the last view takes db = pᵀ s and dv = fᵀ h and hands ds = p b, dh = f v back,
from which dq, da and du follow by the product rule. Symbols as in docs/notation.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from .arrays import broadcast_leading, clean, prod_of, row_pairs, sum_to_leading, unpack, with_leading
from .backends import Array, Backend
from .channels import channel_units


class ExactCall(NamedTuple):
    """What the computation depends on besides arrays; hashable."""

    scale: float
    views: int


def forward(call: ExactCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    """Output (..., n, dv), lse (..., n, 1), and lse again as what the adjoint needs."""
    q, keys, values, masks, _ = unpack(call.views, arrays)
    dtype = backend.compute_dtype(q.dtype)
    leading = broadcast_leading(q, *keys, *values, *masks)
    xp = backend.xp
    units = channel_units(q, keys, masks, call.scale, backend)
    keys = scaled_keys(keys, units[1:], masks, backend)
    blocks = blocks_of(leading, [a.shape[-2] for a in (q, *keys)], q.shape[-1] + values[0].shape[-1], dtype, backend)
    # No normaliser is left where all pairs are masked, and where scores are too large for the dtype.
    nothing: Array = xp.nan
    if any(m is not None for m in masks):
        alive = [backend.cast(xp.any(m, axis=-2, keepdims=True), dtype) for m in masks if m is not None]
        nothing = xp.where(prod_of(alive) == 0, xp.zeros_like(alive[0]), xp.nan)

    def body(_: None, rows: Array) -> tuple[None, tuple[Array, Array]]:
        scaled = backend.cast(rows, dtype) * units[0]
        total, normaliser, top = _attend(scaled, keys, values, masks, blocks[1:], backend)
        some = normaliser > 0
        out = xp.where(some, total / xp.where(some, normaliser, 1.0), nothing)
        lse = xp.where(some, top + xp.log(xp.where(some, normaliser, 1.0)), nothing - xp.inf)
        return None, (with_leading(out, leading, backend), with_leading(lse, leading, backend))

    _, (out, lse) = backend.scan_rows(body, None, (q,), blocks[0])
    return out, lse, lse


def backward(call: ExactCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Gradients of query, keys and values, each in its own shape, in the dtype of the computation."""
    q, keys, values, masks, columns = unpack(call.views, arrays)
    xp = backend.xp
    dtype = backend.compute_dtype(q.dtype)
    leading = broadcast_leading(q, *keys, *values, *masks)
    units = channel_units(q, keys, masks, call.scale, backend)
    keys = scaled_keys(keys, units[1:], masks, backend)
    blocks = blocks_of(leading, [a.shape[-2] for a in (q, *keys)], q.shape[-1] + values[0].shape[-1], dtype, backend)

    def body(carry: Any, rows: Array, *columns: Array) -> tuple[Any, tuple[Array]]:
        o, lse, g, g_lse = (backend.cast(c, dtype) for c in columns)
        r = xp.sum(g * o, axis=-1, keepdims=True) - g_lse
        ds, _, grads = _attend_adjoint(
            backend.cast(rows, dtype) * units[0], g, lse, r, keys, values, masks, blocks[1:], backend
        )
        return _plus(carry, grads), (sum_to_leading(ds * units[0], rows.shape[:-2], backend),)

    device = backend.device(q)
    start = tuple((xp.zeros(k.shape, dtype=dtype, device=device), xp.zeros(v.shape, dtype=dtype, device=device))
                  for k, v in zip(keys, values, strict=True))  # fmt: skip
    grads, (dq,) = backend.scan_rows(body, start, (q, *columns), blocks[0])
    d_keys = [
        sum_to_leading(dk * unit, shape, backend)
        for (dk, _), unit, shape in zip(grads, units[1:], (k.shape[:-2] for k in keys), strict=True)
    ]
    return dq, *d_keys, *(dv for _, dv in grads)


def scaled_keys(
    keys: Sequence[Array], units: Sequence[Array], masks: Sequence[Array | None], backend: Backend
) -> list[Array]:
    """Keys times their channel units, so that products of rows neither overflow nor vanish; masked rows 0."""
    dtype = backend.compute_dtype(keys[0].dtype)
    return [backend.cast(clean(k, m, backend), dtype) * unit for k, unit, m in zip(keys, units, masks, strict=True)]


def leading_limit(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> int:
    """How many problems to compute side by side, so that blocks keep a side of 32 rows, or all that there are."""
    scores = prod([min(32, a.shape[-2]) for a in arrays[: call.views + 1]])  # type: ignore[union-attr]
    return max(1, int(backend.workspace // (8 * scores)))


def blocks_of(
    leading: tuple[int, ...], lengths: Sequence[int], width: int, dtype: object, backend: Backend, most: int = 1024
) -> tuple[int, ...]:
    """Rows of the query and of each view in a block, so that scores, and products of rows with `width` channels, fit.

    Short ones leave room to others; none has more than `most`.
    """
    itemsize = 8 if backend.dtype_name(dtype) == "float64" else 4
    numbers = max(1.0, backend.workspace / (2 * itemsize * prod(leading)))
    room = numbers
    sizes = [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for taken, i in enumerate(order):
        sizes[i] = max(1, min(lengths[i], most, round(room ** (1 / (len(order) - taken)))))
        room = max(1.0, room / sizes[i])
    while max(sizes[:-1]) > 1 and prod(sizes[:-1]) * (sizes[-1] + width) > 4 * numbers:
        largest = max(range(len(sizes) - 1), key=lambda i: sizes[i])
        sizes[largest] //= 2
    return tuple(sizes)


State = tuple[Array, Array, Array]


def _attend(
    s: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    masks: Sequence[Array | None],
    blocks: tuple[int, ...],
    backend: Backend,
) -> State:
    """Σ e^{x − top} v (..., rows, dv), Σ e^{x − top} (..., rows, 1) and the largest score `top` of the rows s (..., rows, d).

    `top` is 0 and the sums are 0 where everything is masked.
    """
    xp = backend.xp
    rows = s.shape[-2]
    dtype = s.dtype

    def last_view(state: State, k: Array, v: Array, mask: Array | None) -> tuple[State, tuple[()]]:
        k, v = backend.cast(clean(k, mask, backend), dtype), backend.cast(clean(v, mask, backend), dtype)
        x = s @ xp.matrix_transpose(k)
        if mask is not None:
            x = xp.where(xp.matrix_transpose(mask), x, -xp.inf)
        top = xp.max(x, axis=-1, keepdims=True)
        finite = xp.where(top == -xp.inf, 0.0, top)
        weights = xp.exp(x - finite)
        return _merge(state, (weights @ v, xp.sum(weights, axis=-1, keepdims=True), top), backend), ()

    def other_view(state: State, k: Array, v: Array, mask: Array | None) -> tuple[State, tuple[()]]:
        count = k.shape[-2]
        k, v = backend.cast(clean(k, mask, backend), dtype), backend.cast(clean(v, mask, backend), dtype)
        product = row_pairs(s, k, backend)
        total, normaliser, top = (
            xp.reshape(part, (*part.shape[:-2], rows, count, part.shape[-1]))
            for part in _attend(product, keys[1:], values[1:], masks[1:], blocks[1:], backend)
        )
        if mask is not None:
            top = xp.where(mask[..., None, :, :], top, -xp.inf)
        best = xp.max(top, axis=-2, keepdims=True)
        weights = xp.exp(top - xp.where(best == -xp.inf, 0.0, best))
        part = (
            xp.sum(total * weights * v[..., None, :, :], axis=-2),
            xp.sum(normaliser * weights, axis=-2),
            best[..., 0, :],
        )
        return _merge(state, part, backend), ()

    leading = broadcast_leading(s, *keys, *values, *masks)
    device = backend.device(s)
    zero = xp.zeros((*leading, rows, values[0].shape[-1]), dtype=dtype, device=device)
    state = (zero, zero[..., :1], xp.full((*leading, rows, 1), -xp.inf, dtype=dtype, device=device))
    body = last_view if len(keys) == 1 else other_view
    result: State
    result, _ = backend.scan_rows(body, state, (keys[0], values[0], masks[0]), blocks[0])
    return result


def _merge(state: State, part: State, backend: Backend) -> State:
    """Two running softmax sums as one, at the larger of their tops."""
    xp = backend.xp
    total, normaliser, top = state
    total_2, normaliser_2, top_2 = part
    best = xp.maximum(top, top_2)
    finite = xp.where(best == -xp.inf, 0.0, best)
    old, new = xp.exp(top - finite), xp.exp(top_2 - finite)
    return total * old + total_2 * new, normaliser * old + normaliser_2 * new, best


def _attend_adjoint(
    s: Array,
    h: Array,
    lse: Array,
    r: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    masks: Sequence[Array | None],
    blocks: tuple[int, ...],
    backend: Backend,
) -> tuple[Array, Array, tuple[tuple[Array, Array], ...]]:
    """(ds, dh, ((dk, dv) of every view)) for rows s (..., rows, d), h (..., rows, dv) and their lse and r (..., rows, 1)."""
    xp = backend.xp
    dtype = s.dtype
    rows = s.shape[-2]

    def last_view(carry: Any, k: Array, v: Array, mask: Array | None) -> tuple[Any, tuple[Array, Array]]:
        ds, dh = carry
        k_leading, v_leading = k.shape[:-2], v.shape[:-2]
        k, v = backend.cast(clean(k, mask, backend), dtype), backend.cast(clean(v, mask, backend), dtype)
        x = s @ xp.matrix_transpose(k)
        # Where all is masked lse is −inf and so is x: the weights are 0, not NaN.
        f = xp.exp(x - xp.where(lse == -xp.inf, 0.0, lse))
        if mask is not None:
            f = xp.where(xp.matrix_transpose(mask), f, 0.0)
        f = xp.where(lse == -xp.inf, 0.0, f)
        p = f * (h @ xp.matrix_transpose(v) - r)
        dk, dv = xp.matrix_transpose(p) @ s, xp.matrix_transpose(f) @ h
        dk, dv = sum_to_leading(dk, k_leading, backend), sum_to_leading(dv, v_leading, backend)
        return (ds + p @ k, dh + f @ v), (dk, dv)

    def other_view(carry: Any, k: Array, v: Array, mask: Array | None) -> tuple[Any, tuple[Array, Array]]:
        ds, dh, grads = carry
        count = k.shape[-2]
        k_leading, v_leading = k.shape[:-2], v.shape[:-2]
        k, v = backend.cast(clean(k, mask, backend), dtype), backend.cast(clean(v, mask, backend), dtype)
        repeated = _repeat(lse, count, backend)
        if mask is not None:
            # A masked row of this view is a row without an answer: its lse is −inf by the convention above.
            column = xp.broadcast_to(mask[..., None, :, :], (*broadcast_leading(lse, mask), rows, count, 1))
            column = xp.reshape(column, (*column.shape[:-3], rows * count, 1))
            repeated = xp.where(column, repeated, -xp.inf)
        ds_pair, dh_pair, inner = _attend_adjoint(
            row_pairs(s, k, backend), row_pairs(h, v, backend), repeated, _repeat(r, count, backend),
            keys[1:], values[1:], masks[1:], blocks[1:], backend,
        )  # fmt: skip
        ds_pair = xp.reshape(ds_pair, (*ds_pair.shape[:-2], rows, count, ds_pair.shape[-1]))
        dh_pair = xp.reshape(dh_pair, (*dh_pair.shape[:-2], rows, count, dh_pair.shape[-1]))
        dk = sum_to_leading(xp.sum(ds_pair * s[..., :, None, :], axis=-3), k_leading, backend)
        dv = sum_to_leading(xp.sum(dh_pair * h[..., :, None, :], axis=-3), v_leading, backend)
        ds = ds + xp.sum(ds_pair * k[..., None, :, :], axis=-2)
        dh = dh + xp.sum(dh_pair * v[..., None, :, :], axis=-2)
        return (ds, dh, _plus(grads, inner)), (dk, dv)

    device = backend.device(s)
    leading = broadcast_leading(s, h, *keys, *values, *masks)
    zeros = (
        xp.zeros((*leading, *s.shape[-2:]), dtype=dtype, device=device),
        xp.zeros((*leading, *h.shape[-2:]), dtype=dtype, device=device),
    )
    view = (keys[0], values[0], masks[0])
    if len(keys) == 1:
        (ds, dh), own = backend.scan_rows(last_view, zeros, view, blocks[0])
        return ds, dh, (own,)
    start = tuple((xp.zeros(k.shape, dtype=dtype, device=device), xp.zeros(v.shape, dtype=dtype, device=device))
                  for k, v in zip(keys[1:], values[1:], strict=True))  # fmt: skip
    (ds, dh, grads), own = backend.scan_rows(other_view, (*zeros, start), view, blocks[0])
    return ds, dh, (own, *grads)


def _plus(left: Any, right: Any) -> Any:
    """Sum of two sequences of pairs of arrays."""
    return tuple((a + c, b + d) for (a, b), (c, d) in zip(left, right, strict=True))


def _repeat(column: Array, count: int, backend: Backend) -> Array:
    """Every row `count` times: (..., rows, 1) → (..., rows · count, 1)."""
    return backend.xp.repeat(column, count, axis=-2)
