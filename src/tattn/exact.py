"""Tensor attention by its definition, streamed: n³ time for two views, linear memory, for any finite input.

With the scores x_i,j,k = scale · Σ_c q_ic a_jc b_kc, f their softmax over all pairs (j, k) and o_i = Σ f u_j ∘ v_k:
for fixed j this is ordinary attention of the rows s_ij = q_i ∘ a_j over the keys b and values v, so a view is taken
off by multiplying its rows into the query, until one is left. Scores exist for one block of rows at a time.

Adjoint, for a gradient g of o and r_i = Σ_e g_ie o_ie (less the gradient of lse): with h_ij = g_i ∘ u_j,
w = h · v and p = f ∘ (w − r), the last view takes db = pᵀ s and dv = fᵀ h and hands ds = p b, dh = f v back,
from which dq, da and du follow by the product rule. Symbols as in docs/notation.md.

With `offsets` row i of the query sees the rows j ≤ i + offset of a view, and with `window` none of them but the last so many.
`causal` cuts a call into some of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from .arrays import broadcast_leading, clean, prod_of, row_pairs, sum_to_leading, unpack, with_leading
from .backends import Array, Backend
from .channels import channel_units

# Rows of the last view in a block, where they do not leave room.
LAST = 256


class ExactCall(NamedTuple):
    """What the computation depends on besides arrays; hashable."""

    scale: float
    views: int
    offsets: tuple[int, ...] | None = None
    window: tuple[int, ...] | None = None


def forward(call: ExactCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    """Output (..., n, dv), lse (..., n, 1), and lse again as what the adjoint needs."""
    q, keys, values, masks, _ = unpack(call.views, arrays)
    dtype = backend.compute_dtype(q.dtype)
    leading = broadcast_leading(q, *keys, *values, *masks)
    xp = backend.xp
    units = channel_units(q, keys, masks, call.scale, backend)
    keys = scaled_keys(keys, units[1:], masks, backend)
    blocks = blocks_of(leading, [a.shape[-2] for a in (q, *keys)], q.shape[-1] + values[0].shape[-1], dtype, backend)
    at, views = _views(call, q, keys, values, masks, backend)

    def body(_: None, rows: Array, at: Array | None) -> tuple[None, tuple[Array, Array]]:
        scaled = backend.cast(rows, dtype) * units[0]
        total, normaliser, top = _attend(scaled, at, views, call.window, blocks[1:], backend)
        # No normaliser is left where all pairs are masked, and where scores are too large for the dtype.
        nothing: Array = xp.nan
        masked = [i for i, mask in enumerate(masks) if mask is not None]
        if masked:
            alive = prod_of([_sees_some(at, views[i], call.window, i, blocks[1 + i], dtype, backend) for i in masked])
            nothing = xp.where(alive > 0, xp.full_like(alive, xp.nan), 0.0)
        some = normaliser > 0
        out = xp.where(some, total / xp.where(some, normaliser, 1.0), nothing)
        lse = xp.where(some, top + xp.log(xp.where(some, normaliser, 1.0)), nothing - xp.inf)
        return None, (with_leading(out, leading, backend), with_leading(lse, leading, backend))

    _, (out, lse) = backend.scan_rows(body, None, (q, at), blocks[0])
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

    at, views = _views(call, q, keys, values, masks, backend)

    def body(carry: Any, rows: Array, at: Array | None, *columns: Array) -> tuple[Any, tuple[Array]]:
        o, lse, g, g_lse = (backend.cast(c, dtype) for c in columns)
        r = xp.sum(g * o, axis=-1, keepdims=True) - g_lse
        ds, _, grads = _attend_adjoint(
            backend.cast(rows, dtype) * units[0], at, g, lse, r, views, call.window, blocks[1:], backend
        )
        return _plus(carry, grads), (sum_to_leading(ds * units[0], rows.shape[:-2], backend),)

    device = backend.device(q)
    start = tuple((xp.zeros(k.shape, dtype=dtype, device=device), xp.zeros(v.shape, dtype=dtype, device=device))
                  for k, v in zip(keys, values, strict=True))  # fmt: skip
    grads, (dq,) = backend.scan_rows(body, start, (q, at, *columns), blocks[0])
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
    rows: list[Any] = [a.shape[-2] for a in arrays[: call.views + 1]]  # type: ignore[union-attr]
    scores = prod([min(32, n) for n in rows])
    return max(1, int(backend.workspace // (8 * scores)))


def blocks_of(
    leading: tuple[int, ...], lengths: Sequence[int], width: int, dtype: object, backend: Backend, most: int = 1024
) -> tuple[int, ...]:
    """Rows of the query and of each view in a block, so that scores, and products of rows with `width` channels, fit.

    Short ones leave room to others; none has more than `most`.
    """
    itemsize = 8 if backend.dtype_name(dtype) == "float64" else 4
    numbers = max(1.0, backend.workspace / (2 * itemsize * prod(leading)))
    sizes = [0] * len(lengths)
    # Softmax goes along the last view: passes over long rows are quicker than over short ones.
    last = max(1, min(lengths[-1], LAST, round(numbers**0.5)))
    room = max(1.0, numbers / last)
    order = sorted(range(len(lengths) - 1), key=lambda i: lengths[i])
    for taken, i in enumerate(order):
        sizes[i] = max(1, min(lengths[i], most, round(room ** (1 / (len(order) - taken)))))
        room = max(1.0, room / sizes[i])
    sizes[-1] = max(last, min(lengths[-1], most, round(room * last)))
    while max(sizes[:-1]) > 1 and prod(sizes[:-1]) * (sizes[-1] + width) > 4 * numbers:
        largest = max(range(len(sizes) - 1), key=lambda i: sizes[i])
        sizes[largest] //= 2
    return tuple(sizes)


# Keys, values, mask and places of a view: (..., n, d), (..., n, dv), (..., n, 1) or None, (n, 1) or None.
View = tuple[Array, Array, Array | None, Array | None]
State = tuple[Array, Array, Array]


def _views(
    call: ExactCall,
    q: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    masks: Sequence[Array | None],
    backend: Backend,
) -> tuple[Array | None, list[View]]:
    """The views with the places of their rows, and that of each query row (n, 1): it sees the rows at its place or before."""
    if call.offsets is None:
        return None, [(k, v, m, None) for k, v, m in zip(keys, values, masks, strict=True)]
    xp = backend.xp

    def places(x: Array, offset: int) -> Array:
        return (xp.arange(x.shape[-2], dtype=xp.int32, device=backend.device(q)) - offset)[:, None]

    return places(q, 0), [(k, v, m, places(k, o)) for k, v, m, o in zip(keys, values, masks, call.offsets, strict=True)]


def _seen(at: Array | None, mask: Array | None, place: Array | None, window: int, backend: Backend) -> Array | None:
    """Which rows of a view (masks and places (..., count, 1)) each row at `at` (rows, 1) sees, (..., rows, count); None for all."""
    xp = backend.xp
    present = None if mask is None else xp.matrix_transpose(mask)
    if at is None or place is None:
        return present
    place = xp.matrix_transpose(place)
    seen = place <= at
    if window:
        seen = seen & (place > at - window)
    return seen if present is None else seen & present


def _sees_some(
    at: Array | None,
    view: View,
    window: tuple[int, ...] | None,
    number: int,
    block: int,
    dtype: object,
    backend: Backend,
) -> Array:
    """1 where a row sees some row of a view that has a mask, else 0: (..., rows, 1), or alike for all rows (..., 1, 1)."""
    xp = backend.xp
    _, _, mask, place = view
    own = window[number] if window else 0

    def body(found: Array, mask: Array, place: Array | None) -> tuple[Array, tuple[()]]:
        seen = backend.cast(_seen(at, mask, place, own, backend), dtype)
        return xp.maximum(found, xp.max(seen, axis=-1, keepdims=True)), ()

    shape = (*mask.shape[:-2], 1 if at is None else at.shape[-2], 1)  # type: ignore[union-attr]
    found: Array
    found, _ = backend.scan_rows(body, xp.zeros(shape, dtype=dtype, device=backend.device(mask)), (mask, place), block)
    return found


def _attend(
    s: Array,
    at: Array | None,
    views: Sequence[View],
    window: tuple[int, ...] | None,
    blocks: tuple[int, ...],
    backend: Backend,
) -> State:
    """Σ e^{x − top} v (..., rows, dv), Σ e^{x − top} (..., rows, 1) and the largest score `top` of the rows s (..., rows, d).

    The rows are at the places `at` (rows, 1). `top` is −inf and the sums are 0 where nothing is seen.
    """
    xp = backend.xp
    rows = s.shape[-2]
    dtype = s.dtype
    own = window[-len(views)] if window else 0

    def last_view(state: State, k: Array, v: Array, mask: Any, place: Any) -> tuple[State, tuple[()]]:
        k, v = backend.cast(clean(k, mask, backend), dtype), backend.cast(clean(v, mask, backend), dtype)
        x = s @ xp.matrix_transpose(k)
        seen = _seen(at, mask, place, own, backend)
        if seen is not None:
            x = xp.where(seen, x, -xp.inf)
        top = xp.max(x, axis=-1, keepdims=True)
        finite = xp.where(top == -xp.inf, 0.0, top)
        weights = backend.exp_less(x, finite)
        return _merge(state, (weights @ v, xp.sum(weights, axis=-1, keepdims=True), top), backend), ()

    def other_view(state: State, k: Array, v: Array, mask: Any, place: Any) -> tuple[State, tuple[()]]:
        count = k.shape[-2]
        k, v = backend.cast(clean(k, mask, backend), dtype), backend.cast(clean(v, mask, backend), dtype)
        product = row_pairs(s, k, backend)
        total, normaliser, top = (
            xp.reshape(part, (*part.shape[:-2], rows, count, part.shape[-1]))
            for part in _attend(product, _repeat(at, count, backend), views[1:], window, blocks[1:], backend)
        )
        seen = _seen(at, mask, place, own, backend)
        if seen is not None:
            top = xp.where(seen[..., None], top, -xp.inf)
        best = xp.max(top, axis=-2, keepdims=True)
        weights = xp.exp(top - xp.where(best == -xp.inf, 0.0, best))
        part = (
            xp.sum(total * weights * v[..., None, :, :], axis=-2),
            xp.sum(normaliser * weights, axis=-2),
            best[..., 0, :],
        )
        return _merge(state, part, backend), ()

    leading = broadcast_leading(s, *(a for view in views for a in view[:3]))
    device = backend.device(s)
    zero = xp.zeros((*leading, rows, views[0][1].shape[-1]), dtype=dtype, device=device)
    state = (zero, zero[..., :1], xp.full((*leading, rows, 1), -xp.inf, dtype=dtype, device=device))
    body = last_view if len(views) == 1 else other_view
    result: State
    result, _ = backend.scan_rows(body, state, views[0], blocks[0])
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
    at: Array | None,
    h: Array,
    lse: Array,
    r: Array,
    views: Sequence[View],
    window: tuple[int, ...] | None,
    blocks: tuple[int, ...],
    backend: Backend,
) -> tuple[Array, Array, tuple[tuple[Array, Array], ...]]:
    """(ds, dh, ((dk, dv) of every view)) for rows s (..., rows, d), h (..., rows, dv) and their lse and r (..., rows, 1)."""
    xp = backend.xp
    dtype = s.dtype
    rows = s.shape[-2]
    own = window[-len(views)] if window else 0

    def last_view(carry: Any, k: Array, v: Array, mask: Any, place: Any) -> tuple[Any, tuple[Array, Array]]:
        ds, dh = carry
        k_leading, v_leading = k.shape[:-2], v.shape[:-2]
        k, v = backend.cast(clean(k, mask, backend), dtype), backend.cast(clean(v, mask, backend), dtype)
        f = backend.exp_less(s @ xp.matrix_transpose(k), shift)
        seen = _seen(at, mask, place, own, backend)
        if seen is not None:
            f = xp.where(seen, f, 0.0)
        p = backend.times_less(f, h @ xp.matrix_transpose(v), r)
        dk, dv = xp.matrix_transpose(p) @ s, xp.matrix_transpose(f) @ h
        dk, dv = sum_to_leading(dk, k_leading, backend), sum_to_leading(dv, v_leading, backend)
        return (ds + p @ k, dh + f @ v), (dk, dv)

    def other_view(carry: Any, k: Array, v: Array, mask: Any, place: Any) -> tuple[Any, tuple[Array, Array]]:
        ds, dh, grads = carry
        count = k.shape[-2]
        k_leading, v_leading = k.shape[:-2], v.shape[:-2]
        k, v = backend.cast(clean(k, mask, backend), dtype), backend.cast(clean(v, mask, backend), dtype)
        repeated = _repeat(lse, count, backend)
        seen = _seen(at, mask, place, own, backend)
        if seen is not None:
            # A row of this view that is not seen is a row without an answer: its lse is −inf by the convention above.
            column = xp.broadcast_to(seen[..., None], (*broadcast_leading(lse, seen), rows, count, 1))
            column = xp.reshape(column, (*column.shape[:-3], rows * count, 1))
            repeated = xp.where(column, repeated, -xp.inf)
        ds_pair, dh_pair, inner = _attend_adjoint(
            row_pairs(s, k, backend), _repeat(at, count, backend), row_pairs(h, v, backend), repeated,
            _repeat(r, count, backend), views[1:], window, blocks[1:], backend,
        )  # fmt: skip
        ds_pair = xp.reshape(ds_pair, (*ds_pair.shape[:-2], rows, count, ds_pair.shape[-1]))
        dh_pair = xp.reshape(dh_pair, (*dh_pair.shape[:-2], rows, count, dh_pair.shape[-1]))
        dk = sum_to_leading(xp.sum(ds_pair * s[..., :, None, :], axis=-3), k_leading, backend)
        dv = sum_to_leading(xp.sum(dh_pair * h[..., :, None, :], axis=-3), v_leading, backend)
        ds = ds + xp.sum(ds_pair * k[..., None, :, :], axis=-2)
        dh = dh + xp.sum(dh_pair * v[..., None, :, :], axis=-2)
        return (ds, dh, _plus(grads, inner)), (dk, dv)

    device = backend.device(s)
    leading = broadcast_leading(s, h, *(a for view in views for a in view[:3]))
    zeros = (
        xp.zeros((*leading, *s.shape[-2:]), dtype=dtype, device=device),
        xp.zeros((*leading, *h.shape[-2:]), dtype=dtype, device=device),
    )
    if len(views) == 1:
        # Where all is masked lse is −inf: the weights are 0, whatever the row.
        blind = lse == -xp.inf
        s, shift = xp.where(blind, 0.0, s), xp.where(blind, xp.inf, lse)
        (ds, dh), first = backend.scan_rows(last_view, zeros, views[0], blocks[0])
        return ds, dh, (first,)
    start = tuple((xp.zeros(k.shape, dtype=dtype, device=device), xp.zeros(v.shape, dtype=dtype, device=device))
                  for k, v, _, _ in views[1:])  # fmt: skip
    (ds, dh, grads), first = backend.scan_rows(other_view, (*zeros, start), views[0], blocks[0])
    return ds, dh, (first, *grads)


def _plus(left: Any, right: Any) -> Any:
    """Sum of two sequences of pairs of arrays."""
    return tuple((a + c, b + d) for (a, b), (c, d) in zip(left, right, strict=True))


def _repeat(column: Array | None, count: int, backend: Backend) -> Array | None:
    """Every row `count` times: (..., rows, 1) → (..., rows · count, 1)."""
    return None if column is None else backend.xp.repeat(column, count, axis=-2)
