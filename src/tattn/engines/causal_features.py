"""The polynomial method where query row i sees only the keys up to its own row: prefixes in place of sums over all rows.

Aligned at the end: of n_μ keys, row i of n queries sees j ≤ i + n_μ − n. The pairs that it sees are all pairs of two prefixes, so
with S_μ(i) the summary of the rows up to i of view μ

    N_i = Σ_α w_α Φ(q_i)_α Π_μ S_μ(i)_α,      o_i = N_i[:-1] / N_i[-1].

Rows pass in blocks, which take S_μ from one to the next; `spans` has what a block computes, in spans of `b` rows. A call may start
from the sums of rows that came before, in units of the caller's: `Start`.

Adjoint, for ĝ as in `lowrank`, X_μ with all views but μ, and G_μ(j) = Σ_{i ≥ j} ĝ_i ∘ X_μ(i), the same sums over the rows behind:

    dũ_j = Φ(a_j) G_μ(j),   da_j pulls G_μ(j) ũ_j back,   dq_i pulls w Σ_e ĝ_ie Π_μ S_μ(i)_e back.

Blocks are taken from the last one; what came before each is summed up twice: once for segments of √(number of blocks) blocks,
once for the blocks of a segment. Nothing is ever subtracted from a sum. O((n + Σ n_μ) r dv) time, with a factor of m b for
the rows of a span; memory O(b r dv), in the adjoint O(r dv √n) and copies of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import isqrt, prod
from typing import Any, NamedTuple

from ..arrays import broadcast_leading, clean, unpack
from ..backends import Array, Backend
from ..features.balance import balanced_values, with_one, with_powers
from ..features.basis import CHAIN, Basis
from ..features.monomials import rank
from ..features.scaling import channel_units
from .features import (
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
from .features import leading_limit as limit_of_sums
from .spans import Setting, Spans, adjoint, numerator, span_of
from .spoiled import Sight, backward_apart, forward_apart

# log2 of monomials whose products with values are numbers.
_LARGEST = {"float32": 96, "float64": 900}


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
    arrays, start, _ = _balanced(call, arrays, backend, start)
    setting, block = _setting(call, arrays, backend, start)
    compute = partial(_read_rows, call, setting, block, start)
    out, normaliser = forward_apart(compute, _sight(call, setting), backend, arrays)
    return out, normaliser


def _read_rows(
    call: LowRankCall, setting: Setting, block: int, start: Start | None, arrays: Sequence[Array | None]
) -> tuple[Array, Array]:
    """`read_rows` of rows that hold numbers."""
    backend = setting.backend
    sums, views = _split(setting, arrays, call.views, start)

    def body(carry: tuple[Sum, ...], *rows: Array | None) -> tuple[tuple[Sum, ...], tuple[Array, Array]]:
        # The last block may be short of whole spans.
        here = rows[0].shape[-2]  # type: ignore[union-attr]
        whole = -(-here // setting.span) * setting.span
        q, *views = (_padded(x, whole, backend) for x in rows)
        spans = Spans.of(setting, q, views, [total for total, _ in carry])
        carry = tuple(add(c, s) for c, s in zip(carry, spans.sums, strict=True))
        found = backend.xp.matrix_transpose(numerator(setting, spans)[..., :here])
        return carry, divided(found, setting.leading, backend)

    _, (out, normaliser) = backend.scan_rows(body, sums, (arrays[0], *views), block)
    return out, normaliser


def backward(
    call: LowRankCall, backend: Backend, arrays: Sequence[Array | None], start: Start | None = None
) -> tuple[Array, ...]:
    """Gradients of query, keys and values, and of the sums of `start` if there are, each in its shape, as they are computed."""
    arrays, start, powers = _balanced(call, arrays, backend, start)
    setting, block = _setting(call, arrays, backend, start)
    compute = partial(_backward, call, setting, block, start, powers)
    return backward_apart(compute, _sight(call, setting), 0.0, backend, arrays)


def _backward(
    call: LowRankCall,
    setting: Setting,
    block: int,
    start: Start | None,
    powers: Sequence[Array],
    arrays: Sequence[Array | None],
) -> tuple[Array, ...]:
    """`backward` of rows that hold numbers."""
    backend = setting.backend
    q, keys, values, masks, columns = unpack(call.views, arrays)
    xp = backend.xp
    n, m = q.shape[-2], call.views
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
            carry, grads = adjoint(setting, carry, states(given[:m]), cut, m)
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
    dq, *both = _with_heads(setting, upstream, found, keys, values, masks)
    of_sums: Sequence[Array] = (
        () if start is None else with_powers(upstream, [with_one(p, backend) for p in powers], backend)
    )
    return dq, *both[:m], *with_powers(both[m:], powers, backend), *of_sums


def _balanced(
    call: LowRankCall, arrays: Sequence[Array | None], backend: Backend, start: Start | None
) -> tuple[list[Array | None], Start | None, list[Array]]:
    """`balanced_values` of a call and of what it starts from."""
    found, sums, powers = balanced_values(call.views, arrays, backend, start.sums if start else ())
    return found, start._replace(sums=sums) if start else None, powers


def leading_limit(call: LowRankCall, backend: Backend, arrays: Sequence[Array | None]) -> int:
    """How many problems to compute side by side."""
    if call.views == 1:
        return limit_of_sums(call, backend, arrays)
    dim, columns = arrays[0].shape[-1], arrays[1 + call.views].shape[-1] + 1  # type: ignore[union-attr]
    return max(
        1,
        int(
            backend.workspace
            // (rank(dim, call.degree, call.grading) * columns * span_of(call.views) * (call.views + 2))
        ),
    )


def _setting(
    call: LowRankCall, arrays: Sequence[Array | None], backend: Backend, start: Start | None
) -> tuple[Setting, int]:
    """What blocks share, and the rows of a block: some spans, whose prefixes fit in the workspace."""
    q, keys, values, masks, _ = unpack(call.views, arrays)
    units = start.units if start else channel_units(q, keys, masks, call.scale, backend, causal=True)
    w = weights(call, q, backend)
    leading = broadcast_leading(q, *keys, *values, *masks)
    itemsize = backend.itemsize(w.dtype)
    row, columns = rank(q.shape[-1], call.degree, call.grading) * itemsize * prod(leading), values[0].shape[-1] + 1
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
    return Setting(call.degree, call.grading, w, units, shares, span, tile, leading, backend), span * spans


def _sight(call: LowRankCall, setting: Setting) -> Sight:
    """What query rows see, and how large an entry may be for its monomials to be numbers."""
    most = 2.0 ** (_LARGEST[setting.backend.dtype_name(setting.w.dtype)] / call.degree)
    return Sight(call.views, None, [most / unit for unit in setting.units])


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
            first = summary(k[..., :head, :], v[..., :head, :], seen, unit, setting.degree, backend, setting.grading)
            total, lost = add((total, lost), xp.matrix_transpose(first) * share)
        sums.append((total, lost))
    rest = [None if x is None else x[..., x.shape[-2] - n :, :] for x in (*keys, *values, *masks)]
    return tuple(sums), rest


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
            parts = key_adjoint(
                k[..., :head, :], v[..., :head, :], seen, unit, g, setting.degree, backend, setting.grading
            )
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
    basis = Basis.of(keys.shape[-1], setting.degree, columns, setting.grading)
    features = basis.features(backend)

    def body(carry: Sum, k: Array, v: Array, mask: Array | None) -> tuple[Sum, tuple[()]]:
        phi = features(channels(clean(k, mask, backend), unit, dtype, backend))
        z = with_ones(v, mask, dtype, backend) * setting.shares[view]
        return add(carry, backend.xp.matrix_transpose(basis.row_sums(phi, z, backend))), ()

    block = block_of(basis, columns, dtype, setting.leading, backend)
    result: Sum
    result, _ = backend.scan_rows(body, total, (keys, values, masks), block)
    return result


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
