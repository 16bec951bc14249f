"""The polynomial method where query row i sees only the keys up to its own row: prefixes in place of sums over all rows.

Aligned at the end: of n_μ keys, row i of n queries sees j ≤ i + n_μ − n. The pairs that it sees are all pairs of two prefixes, so
with S_μ(i) the summary of the rows up to i of view μ

    N_i = Σ_α w_α Φ(q_i)_α Π_μ S_μ(i)_α,      o_i = N_i[:-1] / N_i[-1].

Rows pass in blocks, and a block consists of spans of `b` rows. Within a span S_μ(i) = C_μ + (the span's rows up to i), with C_μ the
summary of all rows before it. One view need not be summed up for each row: for X(i) = w Φ(q_i) ∘ Π_{ν > 1} S_ν(i),

    N_ie = Σ_α X(i)_αe C_1αe + Σ_{j ≤ i in the span} ũ_je Σ_α X(i)_αe Φ(a_j)_α,

which are products of matrices. For one view X does not depend on e, and spans are longer.

A call may start from the sums of rows that came before, in units of the caller's: `Start`. They are C_μ of the first span.

Adjoint, for ĝ as in `lowrank`, X_μ with all views but μ, and G_μ(j) = Σ_{i ≥ j} ĝ_i ∘ X_μ(i), the same sums over the rows behind:

    dũ_j = Φ(a_j) G_μ(j),   da_j pulls G_μ(j) ũ_j back,   dq_i pulls w Σ_e ĝ_ie Π_μ S_μ(i)_e back.

Blocks are taken from the last one; what came before each is summed up twice: once for segments of √(number of blocks) blocks,
once for the blocks of a segment. Nothing is ever subtracted from a sum. O((n + Σ n_μ) r dv) time, with a factor of m b for
the rows of a span; memory O(b r dv), in the adjoint O(r dv √n) and copies of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt, prod
from typing import Any, NamedTuple

import numpy as np

from .arrays import broadcast_leading, clean, prod_of, sum_to_leading, swap_outer, unpack
from .backends import Array, Backend
from .backends.base import memoized
from .basis import CHAIN, Basis, read
from .channels import channel_units
from .lowrank import (
    LowRankCall,
    Sum,
    add,
    block_of,
    channels,
    divided,
    key_adjoint,
    log_normaliser,
    summary,
    weights,
    with_ones,
    zero_sum,
)
from .lowrank import leading_limit as limit_of_sums
from .monomials import features, pull_back, rank

# Rows of a span: for one view, and for more.
SPANS = 32, 16


class Setting(NamedTuple):
    """What the blocks of a call have in common: w (r, 1), units of query and keys, 1/n_μ; rows of a span, spans of a tile."""

    degree: int
    w: Array
    units: Sequence[Any]
    shares: Sequence[Any]
    span: int
    tile: int
    leading: tuple[int, ...]
    backend: Backend


class Start(NamedTuple):
    """Rows before a call's own, which all of its query rows see: their sums (..., r, dv + 1) of every view, in `units`.

    Units and shares are then not for the call to choose: sums are multiplied by shares, which stand for 1/n_μ.
    """

    units: Sequence[Any]
    shares: Sequence[Any]
    sums: Sequence[Array]


def forward(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, Array, Array]:
    """Output (..., n, dv), log of the normaliser (..., n, 1), and the normaliser over the number of all pairs (..., n, 1)."""
    out, normaliser = read_rows(call, backend, arrays)
    return out, log_normaliser(normaliser, unpack(call.views, arrays)[1], backend), normaliser


def read_rows(
    call: LowRankCall, backend: Backend, arrays: Sequence[Array | None], start: Start | None = None
) -> tuple[Array, Array]:
    """Output (..., n, dv), and the normaliser times all shares (..., n, 1)."""
    setting, block = _setting(call, arrays, backend, start)
    sums, views = _split(setting, arrays, call.views, start)

    def body(carry: tuple[Sum, ...], *rows: Array | None) -> tuple[tuple[Sum, ...], tuple[Array, Array]]:
        # The last block may be short of whole spans.
        here = rows[0].shape[-2]  # type: ignore[union-attr]
        whole = -(-here // setting.span) * setting.span
        q, *views = (_padded(x, whole, backend) for x in rows)
        spans = _Spans.of(setting, q, views, [total for total, _ in carry])
        carry = tuple(add(c, s) for c, s in zip(carry, spans.sums, strict=True))
        return carry, divided(_numerator(setting, spans)[..., :here], setting.leading, backend)

    _, (out, normaliser) = backend.scan_rows(body, sums, (arrays[0], *views), block)
    return out, normaliser


def backward(
    call: LowRankCall, backend: Backend, arrays: Sequence[Array | None], start: Start | None = None
) -> tuple[Array, ...]:
    """Gradients of query, keys and values, and of the sums of `start` if there are, each in its shape, as they are computed."""
    q, keys, values, masks, columns = unpack(call.views, arrays)
    xp = backend.xp
    n, m = q.shape[-2], call.views
    setting, block = _setting(call, arrays, backend, start)
    sums, views = _split(setting, arrays, m, start)
    blocks = -(-n // block)
    segments = -(-blocks // (isqrt(blocks - 1) + 1))
    inner = -(-blocks // segments)
    rows = [_padded(x, segments * inner * block, backend) for x in (q, *columns, *views)]
    folded = [_folded(x, segments, backend) for x in rows]
    dtype = setting.w.dtype
    shapes = [tuple(s.shape) for s, _ in sums]

    def states(given: Sequence[Array]) -> list[Array]:
        return [xp.reshape(s, shape) for s, shape in zip(given, shapes, strict=True)]

    def of_segment(carry: tuple[Sum, ...], *given: Array) -> tuple[tuple[Sum, ...], tuple[Array, ...]]:
        starts = tuple((s, xp.zeros_like(s)) for s in states(given[:m]))
        whole = [_unfolded(x, inner * block, like, backend) for x, like in zip(given[m:], rows, strict=True)]
        pieces = [_folded(x, inner, backend) for x in whole]
        starts_of_blocks = _starts(setting, starts, pieces[-3 * m :], rows[-3 * m :], block)

        def body(carry: tuple[Sum, ...], *given: Array) -> tuple[tuple[Sum, ...], tuple[Array, ...]]:
            cut = [_unfolded(x, block, like, backend) for x, like in zip(given[m:], rows, strict=True)]
            carry, grads = _block_adjoint(setting, carry, states(given[:m]), cut, m)
            return carry, tuple(_folded(g, 1, backend) for g in grads)

        carry, grads = backend.scan_rows(body, carry, [_flipped(x, backend) for x in (*starts_of_blocks, *pieces)], 1)
        return carry, tuple(_folded(_flipped(g, backend), 1, backend) for g in grads)

    starts = _starts(setting, sums, folded[-3 * m :], rows[-3 * m :], inner * block)
    carry: tuple[Sum, ...] = tuple(zero_sum(x, dtype, q, backend) for x in shapes)
    carry, grads = backend.scan_rows(of_segment, carry, [_flipped(x, backend) for x in (*starts, *folded)], 1)
    targets = (q, *keys, *values)
    found = [
        xp.reshape(_flipped(g, backend), (*g.shape[:-2], -1, like.shape[-1]))[..., :n, :]
        for g, like in zip(grads, targets, strict=True)
    ]
    # Of what every query row sees.
    upstream = [xp.matrix_transpose(g) * share for (g, _), share in zip(carry, setting.shares, strict=True)]
    return *_with_heads(setting, upstream, found, keys, values, masks), *(upstream if start else ())


def span_of(views: int) -> int:
    """Rows of a span, at most."""
    return SPANS[views > 1]


def leading_limit(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> int:
    """How many problems to compute side by side."""
    if call.views == 1:
        return limit_of_sums(call, backend, arrays)
    dim, columns = arrays[0].shape[-1], arrays[1 + call.views].shape[-1] + 1  # type: ignore[union-attr]
    return max(1, int(backend.workspace // (rank(dim, call.degree) * columns * span_of(call.views) * (call.views + 2))))


def _setting(
    call: LowRankCall, arrays: Sequence[Array | None], backend: Backend, start: Start | None
) -> tuple[Setting, int]:
    """What blocks share, and the rows of a block: some spans, whose prefixes fit in the workspace."""
    q, keys, values, masks, _ = unpack(call.views, arrays)
    units = start.units if start else channel_units(q, keys, masks, call.scale, backend)
    w = weights(call, q, backend)
    leading = broadcast_leading(q, *keys, *values, *masks)
    itemsize = 8 if backend.dtype_name(w.dtype) == "float64" else 4
    row, columns = rank(q.shape[-1], call.degree) * itemsize * prod(leading), values[0].shape[-1] + 1
    # What a row of a tile takes, and of a block.
    in_tile = row * (1 if call.views == 1 else columns)
    span = span_of(call.views)
    while span > 2 and span * in_tile > 8 * backend.workspace:
        span //= 2
    n = q.shape[-2]
    span = min(span, 1 << (n - 1).bit_length())
    tile = max(1, backend.workspace // (2 * in_tile * span))
    in_block = row * (2 * (call.views + 1) + 2 * call.views * columns // span)
    spans = max(1, min(2 * backend.workspace // (in_block * span), CHAIN, -(-n // span)))
    shares = start.shares if start else [1 / k.shape[-2] for k in keys]
    return Setting(call.degree, w, units, shares, span, tile, leading, backend), span * spans


def _split(
    setting: Setting, arrays: Sequence[Array | None], views: int, start: Start | None
) -> tuple[tuple[Sum, ...], list[Array | None]]:
    """Summaries (..., dv + 1, r) of the rows that every query row sees, and the other rows: keys, values and masks."""
    q, keys, values, masks, _ = unpack(views, arrays)
    backend = setting.backend
    xp = backend.xp
    n, r = q.shape[-2], setting.w.shape[0]
    sums: list[Sum] = []
    views_of = zip(keys, values, masks, setting.units[1:], setting.shares, strict=True)
    for view, (k, v, mask, unit, share) in enumerate(views_of):
        shape = (*broadcast_leading(k, v, mask), v.shape[-1] + 1, r)
        total, lost = zero_sum(shape, setting.w.dtype, q, backend)
        if start:
            total = xp.matrix_transpose(start.sums[view]) * share
        head = k.shape[-2] - n
        if head:
            seen = None if mask is None else mask[..., :head, :]
            first = summary(k[..., :head, :], v[..., :head, :], seen, unit, setting.degree, backend)
            total, lost = add((total, lost), xp.matrix_transpose(first) * share)
        sums.append((total, lost))
    rest = [None if x is None else x[..., x.shape[-2] - n :, :] for x in (*keys, *values, *masks)]
    return tuple(sums), rest


class _Spans(NamedTuple):
    """A block of rows in spans: monomials (..., M, b, r), values and ones (..., M, b, dv + 1), what each span begins with."""

    phi_q: Array
    phis: list[Array]  # of keys
    zs: list[Array]
    befores: list[Array]  # C_μ (..., M, dv + 1, r)
    sums: list[Array]  # of the block (..., dv + 1, r)
    flat: list[tuple[Array, Array]]  # channels (..., d, rows) and monomials (..., r, rows) of query and keys

    @classmethod
    def of(cls, setting: Setting, q: Array, rows: Sequence[Array | None], starts: Sequence[Array]) -> _Spans:
        """From the rows of a block, those of views one after another, and the summaries before the block."""
        backend, dtype = setting.backend, setting.w.dtype
        xp = backend.xp
        m = len(starts)
        flat = []
        for x, mask, unit in zip((q, *rows[:m]), (None, *rows[2 * m :]), setting.units, strict=True):
            x = channels(clean(x, mask, backend), unit, dtype, backend)
            flat.append((x, features(x, setting.degree, backend)))
        phi_q, *phis = (_in_spans(xp.matrix_transpose(phi), setting) for _, phi in flat)
        zs, befores, sums = [], [], []
        for v, mask, share, phi, start in zip(
            rows[m : 2 * m], rows[2 * m :], setting.shares, phis, starts, strict=True
        ):
            z = _in_spans(xp.matrix_transpose(with_ones(v, mask, dtype, backend)) * share, setting)
            of_spans = xp.matrix_transpose(z) @ phi
            running = _running(of_spans, backend)
            befores.append(start[..., None, :, :] + running[..., :-1, :, :])
            sums.append(running[..., -1, :, :])
            zs.append(z)
        return cls(phi_q, phis, zs, befores, sums, flat)

    def together(self, backend: Backend) -> list[Array]:
        """What `_tile` takes, spans as rows."""
        return [_together(x, backend) for x in (self.phi_q, *self.phis, *self.zs, *self.befores)]


def _prefix(setting: Setting, z: Array, phi: Array, before: Array) -> Array:
    """S_μ(i) of every row of some spans, (..., M, dv + 1, b, r)."""
    xp = setting.backend.xp
    # z_je for the rows j ≤ i, and 0 for others: (..., M, dv + 1, b, b), a product with the monomials of all rows.
    masked = xp.matrix_transpose(z)[..., None, :] * _triangle(setting, z)
    inside = xp.reshape(masked, (*masked.shape[:-3], -1, masked.shape[-1])) @ phi
    inside = xp.reshape(inside, (*inside.shape[:-2], z.shape[-1], z.shape[-2], phi.shape[-1]))
    if not setting.backend.writable:
        return inside + before[..., None, :]
    inside += before[..., None, :]
    return inside


def _numerator(setting: Setting, spans: _Spans) -> Array:
    """N of the rows of a block, (..., dv + 1, rows)."""
    backend = setting.backend
    xp = backend.xp
    m = len(spans.zs)
    *_, b, r = spans.phi_q.shape
    columns = spans.zs[0].shape[-1]

    def body(_: None, *given: Array) -> tuple[None, tuple[Array]]:
        phi_q, phis, zs, befores, _, _ = _tile(given, m, b, r, columns, backend)
        x = (phi_q * setting.w[:, 0])[..., None, :, :]
        for z, phi, before in zip(zs[1:], phis[1:], befores[1:], strict=True):
            x = _times(_prefix(setting, z, phi, before), x, backend)
        inside = _scores(setting, x, phis[0]) @ xp.matrix_transpose(zs[0])[..., None]
        found = _contracted(x, befores[0], setting) + inside[..., 0]
        return None, (_together(found, backend),)

    _, (found,) = backend.scan_rows(body, None, spans.together(backend), setting.tile)
    return _flat(xp.reshape(found, (*found.shape[:-1], columns, b)), setting)


def _times(x: Array, y: Array, backend: Backend) -> Array:
    """Product x ∘ y, in the place of x where that may be and y does not have more leading dimensions."""
    if not backend.writable or np.broadcast_shapes(x.shape, y.shape) != tuple(x.shape):
        return x * y
    x *= y
    return x


def _together(x: Array, backend: Backend) -> Array:
    """The numbers of each span as one row: (..., M, i, j) → (..., M, i j)."""
    return backend.xp.reshape(x, (*x.shape[:-2], -1))


def _tile(given: Sequence[Array], m: int, b: int, r: int, columns: int, backend: Backend) -> Any:
    """Φ(q), Φ(k) and z of every view, what their spans begin with, ĝ if given, and the sums behind: as `_Spans` has them."""

    def apart(x: Array, rows: int) -> Array:
        return backend.xp.reshape(x, (*x.shape[:-1], rows, x.shape[-1] // rows))

    phi_q, *rest = given
    phis, zs, befores = ([apart(x, b if i < 2 else columns) for x in rest[i * m : (i + 1) * m]] for i in range(3))
    g_hat = apart(rest[3 * m], columns) if len(rest) > 3 * m else None
    return apart(phi_q, b), phis, zs, befores, g_hat, rest[3 * m + 1 :]


def _scores(setting: Setting, x: Array, phi: Array) -> Array:
    """Σ_α X(i)_αe Φ(a_j)_α for j ≤ i in the same span: (..., M, e, b, r) and (..., M, b, r) → (..., M, e, b, b)."""
    xp = setting.backend.xp
    *leading, e, b, r = x.shape
    found = read(xp.matrix_transpose(phi), xp.reshape(x, (*leading, e * b, r)), setting.backend)
    return xp.reshape(found, (*found.shape[:-2], e, b, b)) * _triangle(setting, x)


def _contracted(x: Array, c: Array, setting: Setting) -> Array:
    """Σ_α X(i)_αe C_αe: (..., M, e, b, r) with e = dv + 1 or 1, and (..., M, dv + 1, r) → (..., M, dv + 1, b)."""
    backend = setting.backend
    transposed = backend.xp.matrix_transpose(x)
    if x.shape[-3] == 1:
        return read(transposed[..., 0, :, :], c, backend)
    return read(transposed, c[..., None, :], backend)[..., 0, :]


def _block_adjoint(
    setting: Setting, carry: tuple[Sum, ...], starts: Sequence[Array], rows: Sequence[Any], m: int
) -> tuple[tuple[Sum, ...], list[Array]]:
    """G_μ with the block's rows, and gradients (dq, dk…, dv…) of the block (q, o, l, g, g_lse, k…, v…, mask…)."""
    backend, dtype = setting.backend, setting.w.dtype
    xp = backend.xp
    q, o, l, g, g_lse, *views = rows
    spans = _Spans.of(setting, q, views, starts)
    o, l, g, g_lse = (backend.cast(x, dtype) for x in (o, l, g, g_lse))
    shift = xp.sum(g * o, axis=-1, keepdims=True) - g_lse
    inverse = xp.where(l == 0, 0.0, 1 / xp.where(l == 0, 1.0, l))
    g_hat = xp.matrix_transpose(_in_spans(xp.concat([g, -shift], axis=-1) * inverse, setting))
    *_, b, r = spans.phi_q.shape
    columns = g_hat.shape[-2]

    def body(carry: tuple[Sum, ...], *given: Array) -> tuple[tuple[Sum, ...], tuple[Array, ...]]:
        carry, found = _tile_adjoint(setting, carry, _tile(given, m, b, r, columns, backend))
        return carry, tuple(_together(x, backend) for x in found)

    folded = [_flipped(x, backend) for x in (*spans.together(backend), _together(g_hat, backend))]
    carry, found = backend.scan_rows(body, carry, folded, setting.tile)
    y_q, *of_views = (xp.flip(x, axis=-2) for x in found)
    y_q, *ys = (xp.reshape(y, (*y.shape[:-2], y.shape[-2] * b, r)) for y in (y_q, *of_views[:m]))
    dq = _pulled_back(setting, y_q, 0, spans, None, q)
    d_keys, d_values = [], []
    for view, (y, dz) in enumerate(zip(ys, of_views[m:], strict=True)):
        k, v, mask = (views[i] for i in (view, m + view, 2 * m + view))
        d_keys.append(_pulled_back(setting, y, view + 1, spans, mask, k))
        dz = xp.reshape(dz, (*dz.shape[:-2], dz.shape[-2] * b, columns))
        d_values.append(_of_rows(dz[..., :-1] * setting.shares[view], mask, v, backend))
    return carry, [dq, *d_keys, *d_values]


def _tile_adjoint(setting: Setting, carry: tuple[Sum, ...], tile: Any) -> tuple[tuple[Sum, ...], list[Array]]:
    """G_μ with the rows of some spans, from the last to the first, and gradients of their Φ(q), Φ(k) and z (..., M, b, ·)."""
    phi_q, phis, zs, befores, g_hat, _ = tile
    backend = setting.backend
    xp = backend.xp
    m = len(zs)
    triangle = _triangle(setting, g_hat)
    upper = xp.matrix_transpose(triangle)
    w = setting.w[:, 0]
    weighted = (phi_q * w)[..., None, :, :]
    if m == 1:
        pairs = (xp.matrix_transpose(g_hat) @ xp.matrix_transpose(zs[0])) * triangle
        y_q = xp.matrix_transpose(g_hat) @ befores[0] + pairs @ phis[0]
        xs = [weighted]
    else:
        prefixes = [_prefix(setting, *view) for view in zip(zs, phis, befores, strict=True)]
        both = swap_outer(prod_of(prefixes), backend)
        y_q = (xp.matrix_transpose(g_hat)[..., None, :] @ both)[..., 0, :]
        xs = [prod_of([*prefixes[:view], *prefixes[view + 1 :], weighted]) for view in range(m)] if m > 2 else [
            _times(prefixes[1 - view], weighted, backend) for view in range(m)
        ]  # fmt: skip
    after, ys, dzs = [], [], []
    for total, z, phi, x in zip(carry, zs, phis, xs, strict=True):
        if m == 1:
            of_spans = g_hat @ x[..., 0, :, :]
            pairs = (z @ g_hat) * upper
        else:
            of_spans = (g_hat[..., None, :] @ x)[..., 0, :]
            # ũ_je ĝ_ie for i ≥ j, (..., M, dv + 1, j, i) → (..., M, j, (dv + 1) i).
            pairs = swap_outer(xp.matrix_transpose(z)[..., None] * (g_hat[..., None, :] * upper), backend)
            pairs = _together(pairs, backend)
        inside = pairs @ xp.reshape(x, (*x.shape[:-3], -1, x.shape[-1]))
        of_spans = _to_view(of_spans, total[0].shape[:-2], backend)
        running = _running(of_spans, backend)
        behind = total[0][..., None, :, :] + running[..., :-1, :, :]
        after.append(add(total, running[..., -1, :, :]))
        dz = read(xp.matrix_transpose(phi), behind, backend)
        dz = dz + (xp.matrix_transpose(_scores(setting, x, phi)) @ g_hat[..., None])[..., 0]
        dzs.append(xp.matrix_transpose(dz))
        ys.append(z @ behind + inside)
    return tuple(after), [y_q * w, *ys, *dzs]


def _pulled_back(setting: Setting, y: Array, place: int, spans: _Spans, mask: Array | None, like: Array) -> Array:
    """Gradient of the rows `like` of a block from that of their monomials (..., rows, r)."""
    backend = setting.backend
    xp = backend.xp
    x, phi = spans.flat[place]
    # The rest is linear in y, so what rows are shared by is summed first.
    y = sum_to_leading(y, x.shape[:-2], backend)
    dx = xp.matrix_transpose(pull_back(x, phi, xp.matrix_transpose(y), setting.degree, backend))
    return _of_rows(dx * setting.units[place], mask, like, backend)


def _of_rows(gradient: Array, mask: Array | None, like: Array, backend: Backend) -> Array:
    """Gradient in the leading dimensions of its rows, 0 where they are masked."""
    return sum_to_leading(clean(gradient, mask, backend), like.shape[:-2], backend)


def _with_heads(
    setting: Setting,
    upstream: Sequence[Array],
    found: Sequence[Array],
    keys: Sequence[Array],
    values: Sequence[Array],
    masks: Sequence[Array | None],
) -> tuple[Array, ...]:
    """The gradients with those of the rows that every query row sees, in front."""
    backend = setting.backend
    xp = backend.xp
    dq, *grads = found
    m = len(keys)
    for view, (k, v, mask, g) in enumerate(zip(keys, values, masks, upstream, strict=True)):
        head = k.shape[-2] - dq.shape[-2]
        if head:
            seen = None if mask is None else mask[..., :head, :]
            unit = setting.units[view + 1]
            parts = key_adjoint(k[..., :head, :], v[..., :head, :], seen, unit, g, setting.degree, backend)
            for i, part in zip((view, m + view), parts, strict=True):
                grads[i] = xp.concat([part, grads[i]], axis=-2)
    return dq, *grads


def _starts(
    setting: Setting, sums: tuple[Sum, ...], folded: Sequence[Array | None], like: Sequence[Array | None], rows: int
) -> tuple[Array, ...]:
    """What each piece of so many rows begins with, (..., pieces, (dv + 1) r) for every view, from pieces one below another."""
    backend, m = setting.backend, len(sums)
    xp = backend.xp
    r = setting.w.shape[0]

    def body(carry: tuple[Sum, ...], *given: Array) -> tuple[tuple[Sum, ...], tuple[Array, ...]]:
        pieces = [_unfolded(x, rows, shape, backend) for x, shape in zip(given, like, strict=True)]
        after = tuple(_with_rows(setting, view, total, *pieces[view::m]) for view, total in enumerate(carry))
        return after, tuple(xp.reshape(total, (*total.shape[:-2], 1, total.shape[-2] * r)) for total, _ in carry)

    return backend.scan_rows(body, sums, folded, 1)[1]


def _with_rows(setting: Setting, view: int, total: Sum, keys: Array, values: Array, masks: Array | None) -> Sum:
    """The summary of a view with more rows."""
    backend, dtype, unit = setting.backend, setting.w.dtype, setting.units[view + 1]
    columns = values.shape[-1] + 1
    basis = Basis.of(keys.shape[-1], setting.degree, columns)

    def body(carry: Sum, k: Array, v: Array, mask: Array | None) -> tuple[Sum, tuple[()]]:
        phi = basis.features(channels(clean(k, mask, backend), unit, dtype, backend), backend)
        z = with_ones(v, mask, dtype, backend) * setting.shares[view]
        return add(carry, backend.xp.matrix_transpose(basis.row_sums(phi, z, backend))), ()

    block = block_of(basis, columns, dtype, setting.leading, backend)
    result: Sum
    result, _ = backend.scan_rows(body, total, (keys, values, masks), block)
    return result


def _triangle(setting: Setting, like: Array) -> Array:
    """1 for j ≤ i and 0 for others, (b, b)."""
    return setting.backend.table(_lower, setting.span, like=like, dtype=setting.w.dtype)


@memoized
def _lower(b: int) -> np.ndarray:
    """The table of `_triangle`."""
    return np.tril(np.ones((b, b)))


def _running(of_spans: Array, backend: Backend) -> Array:
    """Sums over the spans before each, and over all of them: (..., M, k, r) → (..., M + 1, k, r)."""
    xp = backend.xp
    *leading, spans, k, r = of_spans.shape
    before = backend.table(_before, spans, like=of_spans, dtype=of_spans.dtype)
    return xp.reshape(before @ xp.reshape(of_spans, (*leading, spans, k * r)), (*leading, spans + 1, k, r))


@memoized
def _before(spans: int) -> np.ndarray:
    """The table of `_running`."""
    return np.tril(np.ones((spans + 1, spans)), -1)


def _in_spans(x: Array, setting: Setting) -> Array:
    """(..., rows, k) → (..., M, b, k)."""
    *leading, rows, k = x.shape
    return setting.backend.xp.reshape(x, (*leading, rows // setting.span, setting.span, k))


def _flat(x: Array, setting: Setting) -> Array:
    """(..., M, k, b) → (..., k, rows)."""
    *leading, spans, k, b = x.shape
    return setting.backend.xp.reshape(swap_outer(x, setting.backend), (*leading, k, spans * b))


def _to_view(of_spans: Array, leading: tuple[int, ...], backend: Backend) -> Array:
    """Sum over the leading dimensions (before M) that a view lacks: (..., M, k, r)."""
    xp = backend.xp
    *_, spans, k, r = of_spans.shape
    flat = xp.reshape(of_spans, (*of_spans.shape[:-3], spans * k, r))
    return xp.reshape(sum_to_leading(flat, leading, backend), (*leading, spans, k, r))


def _padded(x: Array | None, rows: int, backend: Backend) -> Array | None:
    """With rows of zeros behind, which none but they themselves see."""
    if x is None or x.shape[-2] == rows:
        return x
    *leading, n, k = x.shape
    pad = backend.xp.zeros((*leading, rows - n, k), dtype=x.dtype, device=backend.device(x))
    return backend.xp.concat([x, pad], axis=-2)


def _folded(x: Array | None, pieces: int, backend: Backend) -> Array | None:
    """(..., rows, k) → (..., pieces, rows / pieces · k): each piece as one row, which loops hand on whole."""
    if x is None:
        return None
    *leading, rows, k = x.shape
    return backend.xp.reshape(x, (*leading, pieces, rows // pieces * k))


def _unfolded(x: Array | None, rows: int, like: Array | None, backend: Backend) -> Array | None:
    """All pieces as `rows` rows with the channels of `like`."""
    if x is None or like is None:
        return None
    return backend.xp.reshape(x, (*x.shape[:-2], rows, like.shape[-1]))


def _flipped(x: Array | None, backend: Backend) -> Array | None:
    return None if x is None else backend.xp.flip(x, axis=-2)
