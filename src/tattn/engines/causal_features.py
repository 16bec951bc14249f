"""The polynomial method where query row i sees only the keys up to its own row: prefixes in place of sums over all rows.

Aligned at the end: of n_μ keys, row i of n queries sees j ≤ i + n_μ − n. The pairs that it sees are all pairs of two prefixes, so
with S_μ(i) the summary of the rows up to i of view μ

    N_i = Σ_α w_α Φ(q_i)_α Π_μ S_μ(i)_α,      o_i = N_i[:-1] / N_i[-1].

Rows pass in blocks, which take S_μ from one to the next; `chunks` has what a block computes, in chunks of `b` rows. A call may
start from the sums of rows that came before, in units of the caller's: `Start`.

Adjoint, for ĝ as in `features`, X_μ with all views but μ, and G_μ(j) = Σ_{i ≥ j} ĝ_i ∘ X_μ(i), the same sums over the rows behind:

    dũ_j = Φ(a_j) G_μ(j),   da_j pulls G_μ(j) ũ_j back,   dq_i pulls w Σ_e ĝ_ie Π_μ S_μ(i)_e back.

Blocks are taken from the last one; what came before each is summed up twice: once for segments of √(number of blocks) blocks,
once for the blocks of a segment. Nothing is ever subtracted from a sum. O((n + Σ n_μ) r dv) time, with a factor of m b for
the rows of a chunk; memory O(b r dv), in the adjoint O(r dv √n) and copies of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from math import isqrt, prod
from typing import Any, NamedTuple

from ..arrays import clean, sum_to_leading, unweighed
from ..backends import Array, Backend
from ..backends.operations import CHAIN, Prefix, at_once, of_channels
from ..features.balance import balanced_values, least_sum, with_one, with_powers
from ..features.basis import Basis
from ..features.complex_channels import Forms, Turn, conjugating, form_weights
from ..features.monomials import Expansion, rank, run_table
from ..features.pairs import Pairs, pair_weights
from ..features.scaling import shared_units
from ..operands import Attended, Gradients, Operands, Upstream, View
from ..problem import Cost, Problem
from . import features, window_blocks, windows
from .chunks import Chunks, Setting, adjoint, chunk_of, numerator, windows_of
from .fading import at_its_end, faded, numbers, powers, slopes
from .features import (
    Sum,
    add,
    block_of,
    channels,
    divided,
    key_adjoint,
    log_normaliser,
    scaled_gradient,
    summary,
    weights,
    with_ones,
    zero_sum,
)
from .pieces import backwards, in_pieces, in_rows, padded
from .spoiled import Columns, backward_apart, forward_apart, sees_some
from .window_sums import MOST_BLOCKS, MOST_CHUNKS

# log2 of monomials whose products with values are numbers.
_LARGEST = {"float32": 96, "float64": 900}
# Rows of a block that a kernel takes, at most.
_KERNEL_ROWS = 1 << 13
_FEW_BLOCKS = 64
# Time of compiled loops over that of products with all rows.
_COMPILED = 1.5
# And of those for windows over the others.
_WINDOWED = 3


class Start(NamedTuple):
    """Rows before a call's own, which all of its query rows see: their sums (..., r, dv + 1) of every view, in `units`.

    Units and shares are then not for the call to choose: sums are multiplied by shares, which stand for 1/n_μ. `chunks`: those of
    a block, at most, whose sums are added up without compensation.
    """

    units: Sequence[Any]
    shares: Sequence[Any]
    sums: Sequence[Array]
    chunks: int = CHAIN


def forward(operands: Operands, expansion: Expansion) -> Attended:
    """Output, lse, and the normaliser over the number of all pairs (..., n, 1)."""
    out, normaliser = read_rows(operands, expansion)
    return Attended(out, log_normaliser(normaliser, operands.keys, operands.backend), (normaliser,))


def read_rows(operands: Operands, expansion: Expansion, start: Start | None = None) -> tuple[Array, Array]:
    """Output (..., n, dv), and the normaliser times all shares (..., n, 1)."""
    operands, start, _ = _balanced(operands, start)
    setting, block = _setting("read", operands, expansion, start)
    compute = partial(_read_rows, setting, block, start)
    if setting.windows:
        compute = partial(windows.read_rows, setting, block)
    out, normaliser = forward_apart(compute, operands, _limits(setting))
    if not operands.weights or start:
        return out, normaliser
    # The first rows may see weights that are far below the largest: too far for arithmetic, which takes them for masked rows.
    xp = setting.backend.xp
    vanishing = (normaliser < least_sum(setting.w.dtype, setting.backend)) & sees_some(operands)
    return xp.where(vanishing, xp.nan, out), xp.where(vanishing, xp.nan, normaliser)


def _read_rows(setting: Setting, block: int, start: Start | None, operands: Operands) -> tuple[Array, Array]:
    """`read_rows` of rows that hold numbers."""
    backend = setting.backend
    sums, views = _split(setting, operands, start)
    if setting.kernel is not None:
        return _read_by(setting, sums, (operands.query, *views))

    def body(carry: tuple[Sum, ...], *rows: Array | None) -> tuple[tuple[Sum, ...], tuple[Array, Array]]:
        # The last block may be short of whole chunks.
        here = rows[0].shape[-2]  # type: ignore[union-attr]
        whole = -(-here // setting.chunk) * setting.chunk
        q, *views = (padded(x, whole, backend) for x in rows)
        chunks = Chunks.of(setting, q, views, [total for total, _ in carry])
        if setting.decays:
            carry = tuple(faded(c, decay, whole, backend) for c, decay in zip(carry, setting.decays, strict=True))
        carry = tuple(add(c, s) for c, s in zip(carry, chunks.sums, strict=True))
        found = backend.xp.matrix_transpose(numerator(setting, chunks)[..., :here])
        return carry, divided(found, setting.leading, backend)

    _, (out, normaliser) = backend.scan_rows(body, sums, (operands.query, *views), block, setting.chunk)
    return out, normaliser


def _kernel(operation: str, operands: Operands) -> Callable[..., Any] | None:
    """What takes the place of the loops over chunks to `read` or `pull`, if anything does for these arrays."""
    operation = f"{'window' if is_windowed(operands) else 'prefix'}_{operation}"
    operation = of_channels(operation, operands.paired, len(operands.keys))
    return operands.backend.kernel(operation, operands.query, *operands.keys, *operands.values)


def compiled(operands: Operands) -> bool:
    """Whether compiled loops take the place of those over chunks, as far as that does not depend on windows and decays."""
    return _kernel("read", operands) is not None


def _read_by(setting: Setting, sums: tuple[Sum, ...], rows: Sequence[Array | None]) -> tuple[Array, Array]:
    """`_read_rows` by a kernel, from sums and the rows of query and views."""
    backend, kernel = setting.backend, setting.kernel
    columns = sum(x.shape[-1] + 1 for x in rows if x is not None)
    row = columns * prod(setting.leading) * backend.itemsize(setting.w.dtype)

    def body(carry: tuple[Sum, ...], *rows: Array | None) -> tuple[tuple[Sum, ...], tuple[Array, Array]]:
        carry, found = kernel(_prefix(setting, rows), carry)  # type: ignore[misc]
        return carry, divided(found, setting.leading, backend)

    block = max(64, min(backend.workspace // (2 * row), _KERNEL_ROWS))
    _, (out, normaliser) = backend.scan_rows(body, sums, rows, block)
    return out, normaliser


def _prefix(setting: Setting, rows: Sequence[Array | None]) -> Prefix:
    """The rows of query and views as kernels take them."""
    backend, dtype, m = setting.backend, setting.w.dtype, len(rows) // 3
    q, keys, values, masks = rows[0], rows[1 : m + 1], rows[m + 1 : 2 * m + 1], rows[2 * m + 1 :]
    of_all = [
        backend.cast(clean(x, mask, backend), dtype) * unit
        for x, mask, unit in zip((q, *keys), (None, *masks), setting.units, strict=True)
    ]
    shares = [
        with_ones(v, mask, dtype, backend) * share for v, mask, share in zip(values, masks, setting.shares, strict=True)
    ]
    if isinstance(setting.forms, Pairs):
        table, half = setting.forms.runs, setting.forms.half
    else:
        table, half = run_table(q.shape[-1], setting.degree, setting.grading), None  # type: ignore[union-attr]
    return Prefix(setting.w[:, 0], table, of_all[0], of_all[1:], shares, half, setting.decays)


def backward(
    operands: Operands, expansion: Expansion, attended: Attended, upstream: Upstream, start: Start | None = None
) -> tuple[Gradients, tuple[Array, ...]]:
    """Gradients of query, keys and values, and of the sums of `start` if there are, each in its shape, as they are computed."""
    operands, start, powers = _balanced(operands, start)
    setting, block = _setting("pull", operands, expansion, start)
    columns = (attended.out, *attended.kept, *upstream)
    compute = partial(_backward, setting, block, start)
    if setting.windows:
        compute = partial(windows.backward, setting, block)
    found, behind = backward_apart(compute, operands, columns, 0.0, _limits(setting))
    found = found._replace(values=with_powers(found.values, powers, setting.backend))
    of_sums = [with_one(p, setting.backend) for p in powers] if behind else []
    return found, with_powers(behind, of_sums, setting.backend)


def _backward(
    setting: Setting, block: int, start: Start | None, operands: Operands, columns: Columns
) -> tuple[Gradients, tuple[Array, ...]]:
    """`backward` of rows that hold numbers."""
    backend, q = setting.backend, operands.query
    xp = backend.xp
    n, m = q.shape[-2], len(operands.views)
    sums, views = _split(setting, operands, start)
    kernel, dtype = setting.kernel, setting.w.dtype
    shapes = [tuple(s.shape) for s, _ in sums]
    of_block = adjoint
    carried = shapes
    if kernel is not None:
        of_block = _adjoint_by
        carried = [(*setting.leading, *shape[-2:]) for shape in shapes]
        block = rows_to_pull(n, sum(prod(shape[-2:]) for shape in shapes), dtype, backend)
    blocks = -(-n // block)
    segments = -(-blocks // (isqrt(blocks - 1) + 1))
    if kernel is not None and blocks <= _FEW_BLOCKS:
        # Sums before a few long blocks are few numbers, and then no rows are summed up twice.
        segments = blocks
    inner = -(-blocks // segments)
    rows = [padded(x, segments * inner * block, backend) for x in (q, *columns, *views)]
    folded = [in_pieces(x, segments, backend) for x in rows]

    def states(given: Sequence[Array]) -> list[Array]:
        return [xp.reshape(s, shape) for s, shape in zip(given, shapes, strict=True)]

    def of_segment(carry: tuple[Sum, ...], *given: Array) -> tuple[tuple[Sum, ...], tuple[Array, ...]]:
        starts = tuple((s, xp.zeros_like(s)) for s in states(given[:m]))
        whole = [in_rows(x, inner * block, like, backend) for x, like in zip(given[m:], rows, strict=True)]
        pieces = [in_pieces(x, inner, backend) for x in whole]
        starts_of_blocks = _starts(setting, starts, pieces[-3 * m :], rows[-3 * m :], block, inner)

        def body(carry: tuple[Sum, ...], *given: Array) -> tuple[tuple[Sum, ...], tuple[Array, ...]]:
            cut = [in_rows(x, block, like, backend) for x, like in zip(given[m:], rows, strict=True)]
            carry, grads = of_block(setting, carry, states(given[:m]), cut, m)
            return carry, tuple(in_pieces(g, 1, backend) for g in grads)

        carry, grads = backend.scan_rows(body, carry, [backwards(x, backend) for x in (*starts_of_blocks, *pieces)], 1)
        return carry, tuple(in_pieces(backwards(g, backend), 1, backend) for g in grads)

    starts = _starts(setting, sums, folded[-3 * m :], rows[-3 * m :], inner * block, segments)
    of_decays = [tuple(x.shape) for x in setting.decays]
    carry: tuple[Sum, ...] = tuple(zero_sum(x, dtype, q, backend) for x in (*carried, *of_decays))
    carry, grads = backend.scan_rows(of_segment, carry, [backwards(x, backend) for x in (*starts, *folded)], 1)
    found = [
        xp.reshape(backwards(g, backend), (*g.shape[:-2], -1, like.shape[-1]))[..., :n, :]
        for g, like in zip(grads, operands.targets, strict=False)
    ]
    found += [slope for slope, _ in carry[m:]]
    behind = [sum_to_leading(g, shape[:-2], backend) for (g, _), shape in zip(carry, shapes, strict=False)]
    return _with_sums(setting, operands, found, behind, start)


def rows_to_pull(n: int, size: int, dtype: Any, backend: Backend) -> int:
    """Rows of a block of the adjoint by a kernel, which keeps sums of so many numbers for every 64 of them."""
    most = max(64, min(int(2 * backend.workspace // (size * backend.itemsize(dtype))) * 64, _KERNEL_ROWS))
    # Blocks of one length, so that few rows stand behind the last.
    return -(-n // -(-n // most))


def _adjoint_by(
    setting: Setting, carry: tuple[Sum, ...], starts: Sequence[Array], rows: Sequence[Any], m: int
) -> tuple[tuple[Sum, ...], list[Array]]:
    """`chunks.adjoint` by a kernel, with sums of the gradients for every problem apart."""
    backend, dtype = setting.backend, setting.w.dtype
    q, o, l, g, g_lse, *views = rows
    o, l, g, g_lse = (backend.cast(x, dtype) for x in (o, l, g, g_lse))
    g_hat = scaled_gradient(o, l, g, g_lse, backend)
    block = _prefix(setting, (q, *views))
    after, (dq, d_keys, d_shares, slopes) = setting.kernel(block, starts, carry[:m], g_hat)  # type: ignore[misc]
    of_decays = (
        add(total, sum_to_leading(slope, decay.shape[:-2], backend))
        for total, slope, decay in zip(carry[m:], slopes, setting.decays, strict=True)
    )

    def of_channels(gradient: Array, unit: Any, mask: Array | None, like: Array) -> Array:
        return sum_to_leading(clean(gradient * unit, mask, backend), like.shape[:-2], backend)

    keys, values, masks = views[:m], views[m : 2 * m], views[2 * m :]
    of_views = []
    for dk, dz, unit, share, *view in zip(
        d_keys, d_shares, setting.units[1:], setting.shares, keys, values, masks, strict=True
    ):
        k, v, mask = view
        of_rows = unweighed(dz * share, v, mask, backend)
        own = [sum_to_leading(g, x.shape[:-2], backend) for g, x in zip(of_rows, view[1:], strict=False)]
        of_views.append((of_channels(dk, unit, mask, k), *own))
    return (*after, *of_decays), [
        of_channels(dq, setting.units[0], None, q),
        *chain.from_iterable(zip(*of_views, strict=True)),
    ]


def _balanced(operands: Operands, start: Start | None) -> tuple[Operands, Start | None, list[Array]]:
    """`balanced_values` of a call and of what it starts from."""
    found, sums, powers = balanced_values(operands, start.sums if start else ())
    return found, start._replace(sums=sums) if start else None, powers


def _with_sums(
    setting: Setting, operands: Operands, found: Sequence[Array], sums: Sequence[Array], start: Start | None
) -> tuple[Gradients, tuple[Array, ...]]:
    """All gradients from those of the rows one after another, and of the sums (..., dv + 1, r) that every query row sees."""
    xp = setting.backend.xp
    behind = tuple(
        setting.turned_back(xp.matrix_transpose(g) * share) for g, share in zip(sums, setting.shares, strict=True)
    )
    return _with_heads(setting, behind, Gradients.of(found, len(behind)), operands.views), behind if start else ()


def cost(problem: Problem, rank: float) -> Cost:
    """Operations and bytes of a polynomial of this rank, where rows see those before them."""
    flops, memory = features.cost(problem, rank)
    rank = features.as_float(rank)
    if problem.compiled:
        # Four multiply-adds where all rows take three, and some more for the sums; windows are read from two sums each.
        factor = _COMPILED
        seen = windows_of(problem.order.window, problem.lengths[1:], 1)
        if seen:
            # Copies of the rows, and sums between segments where windows are not of one length.
            factor *= _WINDOWED
            copies = problem.rows * problem.itemsize * (problem.dim + problem.value_dim + 1.0)
            segments = max(problem.lengths) / min(w.whole for w in seen) if len(set(seen)) > 1 else 0
            memory += 2 * copies + min(4 * copies, features.bytes_of_sums(problem, rank) * segments)
        return Cost(factor * flops, memory + (16 << 20))
    # Every row multiplies with the rows of its chunk, for every channel of the values where there are several views.
    chunk, several, columns = chunk_of(problem.views), problem.views > 1, problem.value_dim + 1
    one = features.bytes_of_sums(problem, rank)
    if windows_of(problem.order.window, problem.lengths[1:], chunk):
        # Of two chunks; and what is before them is summed up from several parts, of copies of the rows.
        shortest = min((w for w in problem.order.window or () if w > MOST_CHUNKS * chunk), default=max(problem.lengths))
        chunk, flops = 2 * chunk, 2 * flops
        memory += problem.rows * problem.itemsize * (problem.dim + columns)
        memory += one * (max(problem.lengths) / shortest + MOST_BLOCKS) / 4
    inside = 2.0 * chunk * (problem.views * columns if several else 1)
    flops += problem.lengths[0] * problem.batch * rank * (inside + 2.0 * several * problem.views * columns)
    return Cost(flops, memory + max(min(chunk * one, 32 << 20), 2 * one) + (8 << 20))


def at_a_time(operands: Operands, expansion: Expansion) -> int:
    """How many problems to compute at a time."""
    m = len(operands.views)
    if m == 1:
        return features.at_a_time(operands, expansion)
    dim, columns = operands.query.shape[-1], operands.values[0].shape[-1] + 1
    numbers = rank(dim, expansion.degree, expansion.grading) * columns * chunk_of(m) * (m + 2)
    return max(1, int(operands.backend.workspace // numbers))


def _setting(operation: str, operands: Operands, expansion: Expansion, start: Start | None) -> tuple[Setting, int]:
    """What blocks share, and the rows of a block: some chunks, whose prefixes fit in the workspace."""
    backend, q, keys, values = operands.backend, operands.query, operands.keys, operands.values
    degree, grading, m = expansion.degree, expansion.grading, len(keys)
    units = list(start.units if start else shared_units(operands, causal=True))
    windowed = is_windowed(operands)
    kernel = _kernel(operation, operands)
    most = _KERNEL_ROWS
    if kernel is not None and operands.decays:
        most = at_once(operands.steepest, backend.dtype_name(operands.dtype), windowed)
        kernel = kernel if most else None
    forms: Forms | Pairs | None = None
    w = weights(expansion, q, backend)
    if operands.paired and m == 1:
        # The real part of one product is that of real channels, with the conjugate of the query.
        units[0] = units[0] * backend.table(conjugating, q.shape[-1], like=q, dtype=w.dtype)
    elif operands.paired and kernel is not None:
        forms = Pairs(Turn(q.shape[-1], degree, grading))
        which = expansion.coefficients, q.shape[-1], grading
        w = backend.table(pair_weights, *which, like=q, dtype=w.dtype)
    elif operands.paired:
        forms = Forms(Turn(q.shape[-1], degree, grading), m + 1)
        w = backend.table(form_weights, expansion.coefficients, q.shape[-1], grading, m + 1, like=q, dtype=w.dtype)
    leading = operands.leading
    itemsize = backend.itemsize(w.dtype)
    shares = start.shares if start else [1 / k.shape[-2] for k in keys]
    if windowed and kernel is not None:
        seen = windows_of(operands.order.window, operands.lengths[1:], 1)
        # Sums over short blocks are many small ones.
        whole = backend.among(max(backend.rows_in_all, q.shape[-2] * prod(leading)))
        setting = Setting(degree, grading, w, units, shares, 1, 1, leading, whole, forms, kernel, operands.decays, seen)
        count = w.shape[0] * sum(v.shape[-1] + 1 for v in values)
        block = min(most, rows_to_pull(q.shape[-2], count, w.dtype, backend))
        if window_blocks.fits(setting, block, operands):
            return setting, block
        kernel = None
    row, columns = w.shape[0] * itemsize * prod(leading), values[0].shape[-1] + 1
    # What a row of a tile takes, and of a block.
    in_tile = row * (1 if m == 1 else columns)
    chunk = chunk_of(m)
    while chunk > 2 and chunk * in_tile > 8 * backend.workspace:
        chunk //= 2
    n = q.shape[-2]
    chunk = min(chunk, 1 << (n - 1).bit_length())
    tile = max(1, backend.workspace // (2 * in_tile * chunk))
    # With windows two or three times as many rows of keys.
    in_block = row * (2 * (m + 1) + 2 * m * columns // chunk) * (1 + windowed)
    most = MOST_CHUNKS if windowed else start.chunks if start else CHAIN
    chunks = max(1, min(2 * backend.workspace // (in_block * chunk), most, -(-n // chunk)))
    seen = windows_of(operands.order.window, operands.lengths[1:], chunk)
    return Setting(
        degree, grading, w, units, shares, chunk, tile, leading, backend, forms, kernel, operands.decays, seen
    ), chunk * chunks


def is_windowed(operands: Operands) -> bool:
    """Whether some row does not see all rows of a view before it."""
    return bool(windows_of(operands.order.window, operands.lengths[1:], 1))


def _limits(setting: Setting) -> list[Any]:
    """How large an entry of query and keys may be for its monomials to be numbers."""
    most = 2.0 ** (_LARGEST[setting.backend.dtype_name(setting.w.dtype)] / setting.degree)
    # Units of a conjugate are negative.
    return [most / abs(unit) for unit in setting.units]


def _split(setting: Setting, operands: Operands, start: Start | None) -> tuple[tuple[Sum, ...], list[Array | None]]:
    """Summaries (..., dv + 1, r) of the rows that every query row sees, and the other rows: keys, values and masks."""
    backend, q = setting.backend, operands.query
    xp = backend.xp
    n, r = q.shape[-2], setting.w.shape[0]
    sums: list[Sum] = []
    views_of = zip(operands.views, setting.units[1:], setting.shares, strict=True)
    for number, (view, unit, share) in enumerate(views_of):
        shape = (*view.leading, view.values.shape[-1] + 1, r)
        total, lost = zero_sum(shape, setting.w.dtype, q, backend)
        if start:
            total = xp.matrix_transpose(setting.turned(start.sums[number])) * share
        head = view.keys.shape[-2] - n
        if head:
            seen = view.rows(0, head)
            if setting.decays:
                seen, _ = at_its_end(seen, setting.decays[number], backend)
            first = summary(seen, unit, setting.monomials, backend)
            total, lost = add((total, lost), xp.matrix_transpose(setting.turned(first)) * share)
        sums.append((total, lost))
    rows = (*operands.keys, *operands.values, *operands.masks)
    return tuple(sums), [None if x is None else x[..., x.shape[-2] - n :, :] for x in rows]


def _with_heads(setting: Setting, behind: Sequence[Array], found: Gradients, views: Sequence[View]) -> Gradients:
    """The gradients with those of the rows that every query row sees, in front."""
    backend = setting.backend
    n = found.query.shape[-2]
    xp = backend.xp
    of_views, of_decays = [], list(found.decays)
    for i, (view, g) in enumerate(zip(views, behind, strict=True)):
        own = [grads[i] for grads in found[1:4] if grads]
        head = view.keys.shape[-2] - n
        if head:
            rows = view.rows(0, head)
            if setting.decays:
                decay, weights = setting.decays[i], rows.mask
                rows, before = at_its_end(rows, decay, backend)
            parts = key_adjoint(rows, setting.units[i + 1], g, setting.monomials, backend)
            if setting.decays:
                slope = xp.sum(parts[-1] * weights * slopes(decay, before, backend), axis=-2, keepdims=True)
                of_decays[i] = of_decays[i] + sum_to_leading(slope, decay.shape[:-2], backend)
                parts = (*parts[:-1], parts[-1] * powers(decay, before, backend))
            own = [xp.concat(both, axis=-2) for both in zip(parts, own, strict=True)]
        of_views.append(own)
    return Gradients.of_views(found.query, of_views)._replace(decays=tuple(of_decays))


def _starts(
    setting: Setting,
    sums: tuple[Sum, ...],
    folded: Sequence[Array | None],
    like: Sequence[Array | None],
    rows: int,
    count: int,
) -> tuple[Array, ...]:
    """What each of so many pieces of `rows` rows begins with, (..., count, (dv + 1) r) for every view, from pieces one below
    another.
    """
    backend, m = setting.backend, len(sums)
    xp = backend.xp
    r = setting.w.shape[0]
    if count == 1:
        return tuple(in_pieces(total, 1, backend) for total, _ in sums)
    # Nothing begins after the last.
    folded = [None if x is None else x[..., : count - 1, :] for x in folded]

    def body(carry: tuple[Sum, ...], *given: Array) -> tuple[tuple[Sum, ...], tuple[Array, ...]]:
        pieces = [in_rows(x, rows, shape, backend) for x, shape in zip(given, like, strict=True)]
        after = tuple(_with_rows(setting, view, total, *pieces[view::m]) for view, total in enumerate(carry))
        return after, tuple(xp.reshape(total, (*total.shape[:-2], 1, total.shape[-2] * r)) for total, _ in carry)

    after, starts = backend.scan_rows(body, sums, folded, 1)
    return tuple(
        xp.concat([found, in_pieces(total, 1, backend)], axis=-2)
        for found, (total, _) in zip(starts, after, strict=True)
    )


def _with_rows(setting: Setting, view: int, total: Sum, keys: Array, values: Array, masks: Array | None) -> Sum:
    """The summary of a view with more rows."""
    backend, dtype, unit = setting.backend, setting.w.dtype, setting.units[view + 1]
    columns = values.shape[-1] + 1
    basis = Basis.of(keys.shape[-1], setting.degree, columns, setting.grading, backend.compiles)
    monomials = basis.features(backend)
    whole = features.rows_of(keys, setting.monomials, columns, setting.leading)
    loops = features.compiled_pass("sum_rows", whole, (keys, values), backend) if setting.forms is None else None

    def body(carry: Sum, k: Array, v: Array, mask: Array | None) -> tuple[Sum, tuple[()]]:
        x = channels(clean(k, mask, backend), unit, dtype, backend)
        z = with_ones(v, mask, dtype, backend) * setting.shares[view]
        if setting.decays:
            here, decay = z.shape[-2], setting.decays[view]
            carry = faded(carry, decay, here, backend)
            z = z * powers(decay, backend.xp.flip(numbers(here, decay, backend), axis=0)[:, None], backend)
        found = loops.compute(backend.xp.matrix_transpose(x), z) if loops else basis.row_sums(monomials(x), z, backend)
        return add(carry, backend.xp.matrix_transpose(setting.turned(found))), ()

    block = loops.together if loops else block_of(basis, columns, dtype, setting.leading, backend)
    result: Sum
    result, _ = backend.scan_rows(body, total, (keys, values, masks), block)
    return result
