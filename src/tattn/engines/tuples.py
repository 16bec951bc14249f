"""Tensor attention by its definition, streamed: n³ time for two views, linear memory, for any finite input.

With the scores x_i,j,k = scale · Σ_c q_ic a_jc b_kc, f their softmax over all pairs (j, k) and o_i = Σ f u_j ∘ v_k:
this is ordinary attention of the rows q_i over n² keys a_j ∘ b_k and values u_j ∘ v_k. Those of a block of pairs are
made when it is their turn, for any number of views, with the scores of a block of query rows.

Adjoint, for a gradient g of o and r_i = Σ_e g_ie o_ie (less the gradient of lse): with y = u_j ∘ v_k, w = g · y and
p = f ∘ (w − r), dq_i = Σ p a_j ∘ b_k, and the pairs get dkeys = pᵀ q and dvalues = fᵀ g, from which da, db, du and dv
follow by the product rule. Symbols as in docs/notation.md.

Values have a column of ones, so that one product gives sums and normaliser, and with −r beside g another gives w − r. Where scores
are known to be small, weights are eˣ and the normaliser divides g; otherwise a running maximum is subtracted.

With `Limits` row i of the query sees the rows j ≤ i + offset of a view, and with a window none of them but the last so many.
`causal_tuples` cuts a call into some of those.

With the coefficients of a polynomial P the weights are P(x), as `scorewise` takes them: then values and ones are over the number of
rows, so that sums over pairs are means, chains are those of `features`, and blocks are added with compensation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from operator import add, mul, sub
from typing import Any, NamedTuple

from ..arrays import (
    broadcast_leading,
    clean,
    present,
    prod_of,
    sizes_of,
    sum_to_leading,
    unweighed,
    weighed,
    with_leading,
)
from ..backends import Array, Backend
from ..backends.base import LARGEST_WORKSPACE
from ..backends.operations import CHAIN, OF_TUPLES, Tuples
from ..backends.tables import memoized
from ..backends.threads import Memory
from ..bounds.rounding import EXACT_CHAIN
from ..features.balance import balanced_values, least_sum, with_powers
from ..features.basis import FEW_CHAINS, row_products
from ..features.complex_channels import conjugating, multiply
from ..features.scaling import shared_units
from ..operands import Gradients, Operands, Upstream
from ..problem import Cost, Problem

# Scores of at most this size need no maximum subtracted if neither entries nor products of values are larger than this, nor
# their largest smaller than its reciprocal: sums of weights and values then stay in the range of float32.
_REACH, _LARGE = 16.0, 2.0**24
# Blocks of scores for which tuples are made together.
_TOGETHER = 8
# Chains that take fewer operations one after the other than as one product of several matrices.
_FEW = 4
# The unit of rows that are computed with as they are.
_NO_UNIT = None
# Time of a score in short blocks, which is compared with both ends of a window, over that of others: 1.1 in long windows to 3.
_IN_WINDOWS = 2
# A place after all others.
_NEVER = 1 << 30


class Limits(NamedTuple):
    """Row i of the query sees the rows j ≤ i + offset of each view, and none of them but the last `window`; None for all."""

    offsets: tuple[int, ...] | None = None
    window: tuple[int, ...] | None = None


ALL = Limits()


class Rows(NamedTuple):
    """Rows of a view: keys (..., n, d), values and a one (..., n, dv + 1), 0 where masked.

    A query row at a place sees a row if that is `first` or later, and before `last` (..., n, 1); None for all.
    """

    keys: Array
    values: Array
    first: Array | None
    last: Array | None


class Pairs(NamedTuple):
    """The same for tuples of rows, one of each view so far: columns (..., d, tuples), (..., dv + 1, tuples), (..., 1, tuples)."""

    keys: Array
    values: Array
    first: Array | None
    last: Array | None
    firsts: tuple[Array, ...] = ()  # `first` of each row of a tuple, where keys decay


class Pass(NamedTuple):
    """What all blocks of a call share: leading dimensions, rows of the query, tuples and rows of each view in a block, units.

    `bounded`: scores are known to be small; `fewest`: rows of the query that are worth a thread; `memory`: that of the scores;
    `paired`: channels are complex; `columns`: those of values and ones that need gradients, of ones only where there are weights.
    `attend`, `pull`: compiled code for the tuples of some blocks, if any (`backends.operations`).
    `decays`: log λ of every view (..., 1, 1), if a key t rows before counts λ^t. `coefficients`: those of P, () for exp.
    """

    backend: Backend
    leading: tuple[int, ...]
    blocks: tuple[int, ...]
    units: Sequence[Any]
    bounded: bool
    fewest: int
    memory: Memory | None
    paired: bool
    columns: int
    decays: tuple[Array, ...] = ()
    coefficients: tuple[float, ...] = ()
    attend: Callable[..., State] | None = None
    pull: Callable[..., Any] | None = None


class QueryRows(NamedTuple):
    """A block of query rows for the adjoint: s (..., rows, d) and h = [g, −r] (..., rows, dv + 1).

    Their weights are eˣ less the `shift`, and they stand at the places `at`, (..., rows, 1) each; None for none.
    """

    s: Array
    h: Array
    shift: Array | None
    at: Array | None


# [Σ e^{x − top} v, Σ e^{x − top}] (..., dv + 1, rows), and the largest score (..., 1, rows), or None where none is
# subtracted; with P what the sums of blocks have lost.
State = tuple[Array, Array | None]


def forward(operands: Operands, limits: Limits = ALL) -> tuple[Array, Array]:
    """Output (..., n, dv) and lse (..., n, 1)."""
    operands, _, _ = balanced_values(operands)
    backend = operands.backend
    xp = backend.xp
    at, views, run = prepared(operands, limits)
    masked = [
        (view, block)
        for view, block, mask in zip(views, run.blocks[2:], operands.masks, strict=True)
        if mask is not None
    ]
    # Beside weights that are all so small, what vanishes of other sums may count.
    least = least_sum(operands.dtype, backend) if operands.weights else 0.0

    def body(_: None, rows: Array, at: Array | None) -> tuple[None, tuple[Array, Array]]:
        s = backend.transposed(backend.cast(rows, views[0].keys.dtype) * run.units[0])
        places = None if at is None else xp.matrix_transpose(at)
        total, top = attend(run, s, places, None, views)
        sums, normaliser = total[..., :-1, :], total[..., -1:, :]
        if run.bounded and not masked:
            out, lse = backend.transposed(sums / normaliser), xp.matrix_transpose(xp.log(normaliser))
            return None, (with_leading(out, run.leading, backend), with_leading(lse, run.leading, backend))
        # No normaliser is left where all pairs are masked, and where scores are too large for the dtype, or weights too small.
        nothing: Array = xp.nan
        if masked:
            found = [_sees_some(run, at, view, block) for view, block in masked]
            alive = xp.matrix_transpose(prod_of(found))
            nothing = xp.where(alive > 0, xp.full_like(alive, xp.nan), 0.0)
        some = normaliser > least
        safe = xp.where(some, normaliser, 1.0)
        out = backend.transposed(xp.where(some, sums / safe, nothing))
        lse = xp.log(safe) if top is None else top + xp.log(safe)
        lse = xp.matrix_transpose(xp.where(some, lse, nothing - xp.inf))
        return None, (with_leading(out, run.leading, backend), with_leading(lse, run.leading, backend))

    _, (out, lse) = backend.share_rows(body, None, (operands.query, at), run.blocks[0], run.fewest)
    return out, lse


def backward(operands: Operands, out: Array, lse: Array, upstream: Upstream, limits: Limits = ALL) -> Gradients:
    """Gradients of query, keys and values, each in its own shape, in the dtype of the computation."""
    operands, _, powers = balanced_values(operands)
    backend, q = operands.backend, operands.query
    xp = backend.xp
    columns = (out, lse, *upstream)
    at, views, run = prepared(operands, limits)
    dtype = views[0].keys.dtype
    # Rows of a causal call may have been left out by a normaliser of 0.
    all_see = limits.offsets is None and all(mask is None for mask in operands.masks)

    def body(carry: Any, rows: Array, at: Array | None, *columns: Array) -> tuple[Any, tuple[Array]]:
        o, lse, g, g_lse = (backend.cast(c, dtype) for c in columns)
        s = backend.cast(rows, dtype) * run.units[0]
        h = xp.concat([g, g_lse - xp.sum(g * o, axis=-1, keepdims=True)], axis=-1)
        # Where all is masked lse is −inf: the weights are 0, whatever the row.
        blind = None if run.bounded and all_see else lse == -xp.inf
        shift = None
        if blind is None:
            h = h * xp.exp(-lse)
        elif run.bounded:
            h = h * xp.where(blind, 0.0, xp.exp(-xp.where(blind, 0.0, lse)))
        else:
            s, shift = xp.where(blind, 0.0, s), xp.where(blind, xp.inf, lse)
        (ds, *ages), _, grads = adjoint(run, QueryRows(s, h, shift, at), None, views)
        return plus(run, carry, grads), (sum_to_leading(ds * run.units[0], rows.shape[:-2], backend), *ages)

    start = None if q.shape[-2] <= run.blocks[0] else zero_gradients(run, views)
    carries, (dq, *ages) = backend.share_rows(body, start, (q, at, *columns), run.blocks[0], run.fewest)
    found = Gradients.of_views(dq, of_views(run, carries, operands))
    if ages:
        found = found._replace(decays=_of_decays(operands, ages))
    return found._replace(values=with_powers(found.values, powers, backend))


def of_views(run: Pass, carries: Sequence[Any], operands: Operands) -> list[list[Array]]:
    """Gradients of keys, values and, if there are, weights of every view, from the sums of all threads."""
    backend = run.backend
    grads, *others = carries
    for more in others:
        grads = plus(run, grads, _sum(run, more))
    found = []
    for (dk, dz), unit, view in zip(_sum(run, grads), run.units[1:], operands.views, strict=True):
        if run.coefficients:
            dz = dz * (1 / view.keys.shape[-2])
        own = clean(_in_units(dk, unit), view.mask, backend), *unweighed(dz, view.values, view.mask, backend)
        found.append([sum_to_leading(g, x.shape[:-2], backend) for g, x in zip(own, view, strict=False)])
    return found


def _of_decays(operands: Operands, ages: Sequence[Array]) -> tuple[Array, ...]:
    """Gradients of λ (..., 1, 1) from Σ p t of every row (..., n, 1); 0 where λ is 0, as of weights."""
    backend = operands.backend
    xp = backend.xp
    found = []
    for decay, of_rows in zip(operands.decays, ages, strict=True):
        total = sum_to_leading(xp.sum(of_rows, axis=-2, keepdims=True), decay.shape[:-2], backend)
        found.append(xp.where(decay == 0, 0.0, total / xp.where(decay == 0, 1.0, decay)))
    return tuple(found)


def scaled_keys(
    keys: Sequence[Array], units: Sequence[Any], masks: Sequence[Array | None], backend: Backend
) -> list[Array]:
    """Keys times their channel units, so that products of rows neither overflow nor vanish; masked rows 0."""
    dtype = backend.compute_dtype(keys[0].dtype)
    cleaned = (backend.cast(clean(k, m, backend), dtype) for k, m in zip(keys, masks, strict=True))
    return [_in_units(k, unit) for k, unit in zip(cleaned, units, strict=True)]


def _in_units(rows: Array, unit: Any) -> Array:
    """Rows (..., n, d) times factors of channels; without a factor as they are."""
    return rows if unit is _NO_UNIT else rows * unit


def cost(problem: Problem) -> Cost:
    """Operations and bytes; an exponential counts as 16."""
    flops = _scores(problem) * problem.batch * (2.0 * problem.dim + 2.0 * problem.value_dim + 16)
    # The normaliser of every row and its logarithm, and a block.
    return Cost(flops, 2.0 * problem.itemsize * problem.lengths[0] * problem.batch + LARGEST_WORKSPACE)


def _scores(problem: Problem) -> float:
    """Scores of a problem, as many as take its time: those in the future are not counted, and those of runs in windows are."""
    n, *lengths = problem.lengths
    if not problem.order.causal:
        return prod([float(length) for length in problem.lengths])
    windows = [min(pair) for pair in zip(problem.order.window or lengths, lengths, strict=True)]
    if windows == lengths:
        return _seen_on_average(n, tuple(lengths)) * n
    rows, before = runs_in_windows(n, windows)
    return _IN_WINDOWS * float(n) * prod([float((b + 1) * rows) for b in before])


def runs_in_windows(n: int, windows: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Rows of a run of query rows, and runs of keys of every view before its own: short beside the windows, but not so short that
    a long window is held many times.
    """
    rows = min(n, max(16, -(-min(windows) // 4), -(-max(windows) // 16)))
    return rows, tuple(-(-(w - 1) // rows) for w in windows)


@memoized
def _seen_on_average(n: int, lengths: tuple[int, ...]) -> float:
    """Tuples that a query row out of n sees: the mean over the middles of 64 parts."""
    rows = [(part + 0.5) / 64 * n for part in range(64)]
    return float(sum(prod(k - n + i for k in lengths) for i in rows)) / 64


def at_a_time(operands: Operands) -> int:
    """How many problems to compute at a time, so that blocks keep a side of 32 rows, or all that there are."""
    return max(1, int(operands.backend.cache // (4 * prod([min(32, n) for n in operands.lengths]))))


def block_sizes(
    leading: tuple[int, ...],
    lengths: Sequence[int],
    dtype: object,
    backend: Backend,
    chain: int = EXACT_CHAIN,
    apart: bool = False,
) -> tuple[int, ...]:
    """Rows of the query in a block, tuples in a block, and rows of each view that tuples are made of: powers of two, or all.

    The scores of a block stay in the cache; what is made of some rows of the views serves several blocks. No sum has more than
    `FEW_CHAINS` chains. `apart`: a block has as many rows of the query as if there were no other problems, and what is made of rows
    of the views is not stored.
    """
    itemsize = backend.itemsize(dtype)
    scores = max(1, int(backend.cache // (itemsize * prod(leading))))
    query, *views = lengths
    rows = min(query, _power((scores * prod(leading) if apart else scores) ** 0.5), 2 * CHAIN if apart else chain)
    tuples = min(_power(max(1, scores / rows)), FEW_CHAINS * chain)
    room = FEW_CHAINS * chain if apart else tuples * (_TOGETHER if backend.parts else 1)
    sizes = [0] * len(views)
    for taken, i in enumerate(sorted(range(len(views)), key=lambda i: views[i])):
        sizes[i] = min(views[i], _power(room ** (1 / (len(views) - taken))), FEW_CHAINS * chain)
        room = max(1, room // sizes[i])
    return rows, tuples, *sizes


def _power(number: float) -> int:
    """The largest power of two that is not above the number, which is at least 1."""
    return 1 << max(0, int(number * (1 + 1e-9)).bit_length() - 1)


def _call(operands: Operands, columns: int, bounded: bool = False) -> Tuples:
    scores = prod(operands.leading) * prod(operands.lengths)
    return Tuples(operands.lengths[0], scores, columns, bounded, operands.paired)


def compiled(operands: Operands) -> bool:
    """Whether compiled loops pass over the tuples, where every row sees all."""
    call = _call(operands, operands.values[0].shape[-1])
    rows = operands.query, *operands.keys
    return not operands.decays and operands.backend.kernel("attend_tuples", call, *rows) is not None


def prepared(
    operands: Operands, limits: Limits, coefficients: tuple[float, ...] = ()
) -> tuple[Array | None, list[Rows], Pass]:
    """Places of query rows (n, 1), the views, and what blocks share, for weights eˣ or P(x)."""
    backend, q, keys, masks = operands.backend, operands.query, operands.keys, operands.masks
    xp = backend.xp
    dtype, device, leading = operands.dtype, backend.device(q), operands.leading
    bounded = bool(coefficients) or (backend.reads and not operands.decays and small(operands))
    units: list[Any] = [operands.scale, *(_NO_UNIT for _ in keys)]
    if coefficients or not bounded:
        units = shared_units(operands)
    if operands.paired:
        # Re(q k) is the product of the conjugate of q with k, as real rows.
        units[0] = units[0] * backend.table(conjugating, q.shape[-1], like=q, dtype=dtype)
    scaled = scaled_keys(keys, units[1:], masks, backend)
    columns = operands.values[0].shape[-1] + bool(operands.weights)
    plain = limits.offsets is None and not coefficients and not operands.decays
    call = _call(operands, columns, bounded)
    kernels = [backend.kernel(name, call, q, *keys) if plain else None for name in OF_TUPLES]
    blocks = block_sizes(
        leading, operands.lengths, dtype, backend, CHAIN if coefficients else EXACT_CHAIN, kernels[0] is not None
    )
    fewest = max(blocks[0], backend.shared_scores // max(1, prod(leading) * prod(operands.lengths[1:])))
    # Of a factor of 0 a row sees nothing but its own key.
    logs = tuple(xp.log(xp.where(decay > 0, decay, 1.0)) for decay in operands.decays)
    # Short calls lose time by keeping the scores of the only block.
    single = bool(coefficients) and operands.lengths[0] <= blocks[0] and prod(operands.lengths[1:]) <= blocks[1]
    memory = None if single else backend.memory()
    run = Pass(
        backend, leading, blocks, units, bounded, fewest, memory, operands.paired, columns, logs, coefficients,
        *(None if kernel is None else partial(kernel, call) for kernel in kernels),
    )  # fmt: skip

    def places(x: Array, offset: int) -> Array:
        return (xp.arange(x.shape[-2], dtype=xp.int32, device=device) - offset)[:, None]

    limited = limits.offsets is not None or any(m is not None for m in masks)
    views = []
    for i, (k, v, mask) in enumerate(zip(scaled, operands.values, masks, strict=True)):
        v = weighed(backend.cast(v, dtype), mask, backend)
        one = xp.ones((*v.shape[:-1], 1), dtype=dtype, device=device)
        first = last = None
        if limited:
            first = (
                places(k, limits.offsets[i])
                if limits.offsets
                else xp.zeros((k.shape[-2], 1), dtype=xp.int32, device=device)
            )
            if limits.window:
                last = first + (limits.window[i] or _NEVER)
            if operands.decays:
                alone = operands.decays[i] == 0
                last = xp.where(alone, first + 1, _NEVER if last is None else last)
        if mask is not None:
            one = xp.broadcast_to(backend.cast(mask, dtype), (*broadcast_leading(v, mask), *one.shape[-2:]))
            first = xp.where(present(mask, backend), first, _NEVER)
        sides = xp.concat([v, one], axis=-1)
        if coefficients:
            sides = sides * (1 / k.shape[-2])
        views.append(Rows(_by_columns(k, backend), _by_columns(sides, backend), first, last))
    return places(q, 0) if limits.offsets else None, views, run


def _by_columns(x: Array, backend: Backend) -> Array:
    """The same rows, column after column in memory."""
    return backend.xp.matrix_transpose(backend.transposed(x))


def small(operands: Operands) -> bool:
    """Whether no score is large, by Hölder's inequality, and neither entries nor products of values are far from one."""
    backend, q, scale = operands.backend, operands.query, operands.scale
    xp = backend.xp
    masked = zip((*operands.keys, *operands.values), (*operands.masks, *operands.masks), strict=True)
    rows = [q, *(clean(x, m, backend) for x, m in masked)]
    views = len(operands.views) + 1
    rows = [sizes_of(x, operands.paired and i < views, backend) for i, x in enumerate(rows)]
    sizes = [float(xp.max(x)) for x in rows]
    if not all(1 / _LARGE <= x <= _LARGE for x in (scale, *sizes[:views], prod(sizes[views:]))):
        return False
    if scale * rows[0].shape[-1] * prod(sizes[:views]) <= _REACH:
        return True
    dtype = backend.compute_dtype(q.dtype)
    norms = [float(xp.max(xp.sum(prod_of([backend.cast(x, dtype)] * views), axis=-1))) for x in rows[:views]]
    return scale**views * prod(norms) <= _REACH**views


def _joined(run: Pass, pairs: Pairs | None, rows: Rows) -> Pairs:
    """Each tuple with each row of one more view; of the first view, None."""
    backend, xp = run.backend, run.backend.xp
    keys, values, first, last = (None if x is None else xp.matrix_transpose(x) for x in rows)
    if pairs is None:
        return Pairs(keys, values, first, last, (first,) if run.decays else ())

    def each(join: Callable[[Array, Array], Array], left: Array | None, right: Array | None) -> Array | None:
        if left is None or right is None:
            return None
        both = join(left[..., :, None], right[..., None, :])
        return xp.reshape(both, (*both.shape[:-2], -1))

    def complex_product(left: Array, right: Array) -> Array:
        return multiply(left, right, backend, axis=-3)

    return Pairs(
        each(complex_product if run.paired else mul, pairs.keys, keys),
        each(mul, pairs.values, values),
        each(xp.maximum, pairs.first, first),
        each(xp.minimum, pairs.last, last),
        _each_of(run, pairs, first) if run.decays else (),
    )


def _each_of(run: Pass, pairs: Pairs, first: Array) -> tuple[Array, ...]:
    """`firsts` of each tuple with each row of one more view, which has this `first` (..., 1, n)."""
    xp, every = run.backend.xp, (*pairs.firsts, first)
    shape = (*broadcast_leading(*every), 1, pairs.firsts[0].shape[-1], first.shape[-1])
    apart = (*(place[..., :, None] for place in pairs.firsts), first[..., None, :])
    found = [xp.broadcast_to(place, shape) for place in apart]
    return tuple(xp.reshape(place, (*shape[:-2], shape[-2] * shape[-1])) for place in found)


def _ages(run: Pass, at: Array, pairs: Pairs, by_rows: bool) -> list[Array]:
    """How many rows before a query row the rows of every tuple stand, 0 where behind: (..., rows, tuples) or the other way."""
    backend = run.backend
    places = pairs.firsts if by_rows else [backend.xp.matrix_transpose(x) for x in pairs.firsts]
    found = [at - place for place in places]
    return [backend.cast(backend.xp.where(t > 0, t, backend.xp.zeros_like(t)), pairs.keys.dtype) for t in found]


def _seen(at: Array | None, first: Array | None, last: Array | None) -> Array | None:
    """Which tuples are seen from the places `at`, where the arrays broadcast; None for all."""
    if first is None:
        return None
    seen = first <= (0 if at is None else at)
    return seen if last is None or at is None else seen & (last > at)


def _sides(run: Pass, pairs: Pairs | None, rows: Rows) -> list[tuple[Array, Array, Array | None] | None]:
    """Tuples of rows so far, None for none, and rows of the last view, as compiled code takes them."""
    found: list[tuple[Array, Array, Array | None] | None] = []
    for side in (pairs, _joined(run, None, rows)):
        # Where scores are small, 0 stands for those that are hidden.
        found.append(
            None if side is None else (side.keys, side.values, None if run.bounded else _seen(None, side.first, None))
        )
    return found


def _sees_some(run: Pass, at: Array | None, view: Rows, block: int) -> Array:
    """1 where a query row (n, 1) sees some row of a view, else 0: (..., n, 1), or alike for all rows (..., 1, 1)."""
    backend, xp = run.backend, run.backend.xp
    first = view.first
    dtype = view.keys.dtype

    def body(found: Array, *places: Array | None) -> tuple[Array, tuple[()]]:
        seen = _seen(at, *(None if p is None else xp.matrix_transpose(p) for p in places))
        return xp.maximum(found, xp.max(backend.cast(seen, dtype), axis=-1, keepdims=True)), ()

    shape = (*broadcast_leading(first, view.last), 1 if at is None else at.shape[-2], 1)
    found: Array = xp.zeros(shape, dtype=dtype, device=backend.device(first))
    found, _ = backend.scan_rows(body, found, (first, view.last), block)
    return found


def attend(run: Pass, s: Array, at: Array | None, pairs: Pairs | None, views: Sequence[Rows]) -> State:
    """The sums of rows s (..., d, rows) at the places `at` (1, rows) over all tuples of `pairs` and of rows of the views.

    The largest score is −inf and the sums are 0 where nothing is seen.
    """
    backend, xp = run.backend, run.backend.xp
    if pairs is not None and not views:
        state: State | None = None
        for cut in _cuts(run, pairs):
            state = _merge(run, state, _sums(run, s, at, cut))
        return state  # type: ignore[return-value]

    def body(state: State | None, *rows: Any) -> tuple[State, tuple[()]]:
        if run.attend is not None and len(views) == 1:
            part = run.attend(s, *_sides(run, pairs, Rows(*rows)))
        else:
            part = attend(run, s, at, _joined(run, pairs, Rows(*rows)), views[1:])
        return _merge(run, state, part), ()

    block = run.blocks[-len(views)]
    start: State | None = None
    if views[0].keys.shape[-2] > block:
        shape, device = (*run.leading, views[0].values.shape[-1], s.shape[-1]), backend.device(s)
        top = None if run.bounded else xp.full((*run.leading, 1, s.shape[-1]), -xp.inf, dtype=s.dtype, device=device)
        zero = xp.zeros(shape, dtype=s.dtype, device=device)
        start = zero, zero if run.coefficients else top
    result: State
    result, _ = backend.scan_rows(body, start, views[0], block)
    return result


def _sums(run: Pass, s: Array, at: Array | None, pairs: Pairs) -> State:
    """`attend` for one block."""
    backend, xp = run.backend, run.backend.xp
    x = backend.product(xp.matrix_transpose(pairs.keys), s, run.memory, "scores")
    seen = _seen(at, *(None if p is None else xp.matrix_transpose(p) for p in pairs[2:4]))
    for log, age in zip(run.decays, _ages(run, at, pairs, False) if run.decays else (), strict=True):
        x = x + age * log
    if run.bounded:
        weights = polynomial(run.coefficients, x, backend) if run.coefficients else backend.exp_less(x, None)
        # Masked values are 0, and so is what stands for their one.
        if at is not None and seen is not None:
            weights = xp.where(seen, weights, 0.0)
        return _in_chains(run, pairs.values, weights), None
    if seen is not None:
        x = xp.where(seen, x, -xp.inf)
    top = xp.max(x, axis=-2, keepdims=True)
    weights = backend.exp_less(x, xp.where(top == -xp.inf, 0.0, top))
    return _in_chains(run, pairs.values, weights), top


def polynomial(coefficients: Sequence[float], x: Array, backend: Backend) -> Array:
    """Σ_t c_t x^t by Horner's rule."""
    *lower, last = coefficients
    result = backend.xp.full_like(x, last)
    for c in reversed(lower):
        result = backend.times(x, result) + c
    return result


def _merge(run: Pass, state: State | None, part: State) -> State:
    """Two running softmax sums as one, at the larger of their tops; None is none."""
    if state is None:
        return part
    xp = run.backend.xp
    (total, top), (total_2, top_2) = state, part
    if run.coefficients:
        found: State = plus(run, state, total_2)
        return found
    if top is None or top_2 is None:
        return total + total_2, None
    best = xp.maximum(top, top_2)
    finite = xp.where(best == -xp.inf, 0.0, best)
    return total * xp.exp(top - finite) + total_2 * xp.exp(top_2 - finite), best


def adjoint(run: Pass, rows: QueryRows, pairs: Pairs | None, views: Sequence[Rows]) -> Any:
    """((ds, …), (dkeys, dvalues) of the tuples, ((dk, dv) of every view)) for a block of query rows.

    Behind ds (..., rows, d) stands Σ p t (..., rows, 1) of every view, t the rows from a key to a query row, if keys decay.
    dkeys (..., d, tuples) and dvalues (..., columns, tuples), if there are tuples.
    """
    backend, xp, columns = run.backend, run.backend.xp, run.columns
    s, h = rows.s, rows.h
    if pairs is not None and not views:
        by_columns = backend.transposed(s), backend.transposed(h[..., :columns])
        ds: Any = None
        of_pairs = []
        for cut in _cuts(run, pairs):
            part, *parts = _block_adjoint(run, rows, by_columns, cut)
            ds = plus(run, ds, part)
            of_pairs.append(parts)
        return _sum(run, ds), tuple(_together(parts, backend) for parts in zip(*of_pairs, strict=True)), ()

    def body(carry: Any, *view: Any) -> tuple[Any, tuple[Array, Array]]:
        k, v, *_ = view
        through: tuple[Array, ...] = ()
        turned = xp.matrix_transpose
        if run.pull is not None and len(views) == 1:
            shift = None if rows.shift is None else xp.matrix_transpose(rows.shift)
            of_query = backend.transposed(s), backend.transposed(h), shift
            of_rows, left, (dkeys, dvalues) = run.pull(*of_query, *_sides(run, pairs, Rows(*view)))
            ds, inner, through = (backend.transposed(of_rows),), (), left or ()
            turned = backend.transposed
        else:
            ds, (dkeys, dvalues), inner = adjoint(run, rows, _joined(run, pairs, Rows(*view)), views[1:])
        if pairs is not None and not through:
            split = _split_complex if run.paired else _split
            dkeys_in, dkeys = split(run, dkeys, pairs.keys, k)
            dvalues_in, dvalues = _split(run, dvalues, pairs.values[..., :columns, :], v[..., :columns])
            through = dkeys_in, dvalues_in
        dk, dv = (sum_to_leading(turned(x), y.shape[:-2], backend) for x, y in ((dkeys, k), (dvalues, v)))
        return plus(run, carry, (ds, through, inner)), (dk, dv)

    block = run.blocks[-len(views)]
    start = None
    if views[0].keys.shape[-2] > block:
        tuples = 0 if pairs is None else pairs.keys.shape[-1]
        shapes = [s.shape[-2:], *([(s.shape[-1], tuples), (columns, tuples)] if tuples else [])]
        zeros = [xp.zeros((*run.leading, *x), dtype=s.dtype, device=backend.device(s)) for x in shapes]
        ages = [xp.zeros_like(zeros[0][..., :1]) for _ in run.decays]
        start = _start(run, ((zeros[0], *ages), tuple(zeros[1:]), _zeros(run, views[1:])))
    carry, own = backend.scan_rows(body, start, views[0], block)
    ds, through, inner = _sum(run, carry)
    return ds, through, (own, *inner)


def _block_adjoint(run: Pass, rows: QueryRows, columns: tuple[Array, Array], pairs: Pairs) -> tuple[Any, Array, Array]:
    """ds, dkeys and dvalues of `adjoint` for one block, with s and h by `columns`, (..., d, rows) and (..., columns, rows).

    Behind ds stands Σ p t of every view if keys decay.
    """
    backend, xp = run.backend, run.backend.xp
    s, h, shift, at = rows
    x = backend.product(s, pairs.keys, run.memory, "scores")
    ages = _ages(run, at, pairs, True) if run.decays else []
    for log, age in zip(run.decays, ages, strict=True):
        x = x + age * log
    if run.coefficients:
        f = polynomial(run.coefficients, x, backend)
        slope = polynomial([t * c for t, c in enumerate(run.coefficients)][1:], x, backend)
    else:
        f = slope = backend.exp_less(x, shift)
    seen = _seen(at, *pairs[2:4])
    if seen is not None and not (run.bounded and at is None):
        f = slope = xp.where(seen, f, 0.0)
    dvalues = columns[1] @ f
    p = backend.times(slope, backend.product(h, pairs.values, run.memory, "slopes"))
    of_ages = [xp.sum(p * age, axis=-1, keepdims=True) for age in ages]
    return (_in_chains(run, p, xp.matrix_transpose(pairs.keys)), *of_ages), columns[0] @ p, dvalues


def _cuts(run: Pass, pairs: Pairs) -> list[Pairs]:
    """The tuples of each block."""
    size, count = run.blocks[1], pairs.keys.shape[-1]
    if count <= size:
        return [pairs]
    cuts = [(..., slice(start, min(start + size, count))) for start in range(0, count, size)]
    found = [Pairs(*(None if x is None else x[cut] for x in pairs[:4])) for cut in cuts]  # type: ignore[arg-type]
    return [own._replace(firsts=tuple(x[cut] for x in pairs.firsts)) for own, cut in zip(found, cuts, strict=True)]


def _together(parts: Sequence[Array], backend: Backend) -> Array:
    """Columns of all parts."""
    return parts[0] if len(parts) == 1 else backend.xp.concat(list(parts), axis=-1)


def _in_chains(run: Pass, left: Array, right: Array) -> Array:
    """Matrix product in chains of at most `EXACT_CHAIN` terms, or `CHAIN` with P."""
    terms = right.shape[-2]
    chain = CHAIN if run.coefficients else EXACT_CHAIN
    if run.coefficients and terms > _FEW * CHAIN:
        return row_products(left, right, run.backend)
    total = left[..., :chain] @ right[..., :chain, :] if terms > chain else left @ right
    for start in range(chain, terms, chain):
        stop = min(start + chain, terms)
        total = total + left[..., start:stop] @ right[..., start:stop, :]
    return total


def _split(run: Pass, d_pairs: Array, pairs: Array, rows: Array) -> tuple[Array, Array]:
    """Gradient of products (..., c, tuples · n) as those of tuples (..., c, tuples) and rows (..., c, n), for rows (..., n, c)."""
    xp = run.backend.xp
    d_pairs = xp.reshape(d_pairs, (*d_pairs.shape[:-1], pairs.shape[-1], rows.shape[-2]))
    through = _in_chains(run, xp.matrix_transpose(rows)[..., None, :], xp.matrix_transpose(d_pairs))[..., 0, :]
    return through, _in_chains(run, pairs[..., None, :], d_pairs)[..., 0, :]


def _split_complex(run: Pass, d_pairs: Array, pairs: Array, rows: Array) -> tuple[Array, Array]:
    """`_split` of complex products: with G the gradient, those of tuples and rows are Σ k̄ G and Σ p̄ G."""
    xp = run.backend.xp
    half = d_pairs.shape[-2] // 2
    # Re k̄ G = Re k Re G + Im k Im G, and Im k̄ G is the same of −i G.
    turned = xp.concat([d_pairs[..., half:, :], -d_pairs[..., :half, :]], axis=-2)
    parts = zip(*(_split(run, g, pairs, rows) for g in (d_pairs, turned)), strict=True)
    through, own = (xp.concat([x[..., :half, :] + x[..., half:, :] for x in of_parts], axis=-2) for of_parts in parts)
    return through, own


def zero_gradients(run: Pass, views: Sequence[Rows]) -> Any:
    """An empty sum of the gradients of every view."""
    return _start(run, _zeros(run, views))


def _zeros(run: Pass, views: Sequence[Rows]) -> tuple[tuple[Array, Array], ...]:
    """Zeros for the gradients of every view."""
    backend, xp = run.backend, run.backend.xp
    return tuple(
        (xp.zeros(k.shape, dtype=k.dtype, device=backend.device(k)), xp.zeros_like(v[..., : run.columns]))
        for k, v, *_ in views
    )


def _start(run: Pass, zeros: Any) -> Any:
    """An empty sum of nested tuples of arrays."""
    return (zeros, zeros) if run.coefficients else zeros


def plus(run: Pass, carry: Any, terms: Any) -> Any:
    """A sum of nested tuples of arrays with one more term; None is an empty one.

    With P it is Kahan's compensated sum, with what it has lost so far.
    """
    if not run.coefficients:
        return terms if carry is None else _each(add, carry, terms)
    if carry is None:
        return terms, None
    total, lost = carry
    if lost is not None:
        terms = _each(sub, terms, lost)
    new = _each(add, total, terms)
    return new, _each(sub, _each(sub, new, total), terms)


def _sum(run: Pass, carry: Any) -> Any:
    """What a sum has come to."""
    return carry[0] if run.coefficients else carry


def _each(operation: Callable[[Array, Array], Array], left: Any, right: Any) -> Any:
    """An operation on the arrays of two nested tuples."""
    if isinstance(right, tuple):
        return tuple(_each(operation, x, y) for x, y in zip(left, right, strict=True))
    return operation(left, right)
