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
from functools import partial
from math import inf, log, prod
from typing import Any, NamedTuple

import numpy as np

from ..arrays import are_weights, broadcast_leading, clean, present, sum_to_leading, unweighed, weighed, with_leading
from ..backends import Array, Backend
from ..backends.base import LARGEST_WORKSPACE, block_rows
from ..backends.operations import CHAIN, Rows
from ..backends.threads import MOST_THREADS
from ..features.balance import balanced_values, with_powers
from ..features.basis import FEW_CHAINS, FEW_COLUMNS, Basis
from ..features.complex_channels import Turn, as_factors, complex_weights, product
from ..features.monomials import Expansion, Grading, Monomials, degrees, multinomials, rank, run_table
from ..features.scaling import shared_units
from ..operands import Attended, Gradients, Operands, Upstream, View
from ..problem import Cost, Problem

# Blocks of rows that are worth a thread.
FEWEST_BLOCKS = 4
_FEW_ROWS = 8 * CHAIN
# Multiplications of a compiled loop that are worth a thread.
_FEWEST = 1 << 22


class Pass(NamedTuple):
    """A pass over rows: what it computes of rows in units, so many of them together, and how many are worth a thread."""

    compute: Callable[..., Any]
    together: int
    fewest: int


def forward(operands: Operands, expansion: Expansion) -> Attended:
    """Output, lse, and the normaliser over the number of pairs (..., n, 1) with the summary of every view (..., r, dv + 1)."""
    backend, q = operands.backend, operands.query
    units = shared_units(operands)
    summaries = _summaries(operands, expansion, units)
    turn = turn_of(operands, expansion)
    factors = as_factors(summaries, turn, backend)
    combined = product(weights(expansion, q, backend, turn), factors, turn, backend)
    out, normaliser = read_out(q, units[0], combined, expansion.monomials, backend)
    return Attended(out, log_normaliser(normaliser, operands.keys, backend), (normaliser, *summaries))


def log_normaliser(normaliser: Array, keys: Sequence[Array], backend: Backend) -> Array:
    """Log of the sum of exp, from the normaliser over the number of pairs: −inf where that is 0, NaN where it lost its sign."""
    xp = backend.xp
    pairs = float(sum(log(k.shape[-2]) for k in keys))
    some = normaliser > 0
    lse = xp.where(some, xp.log(xp.where(some, normaliser, 1.0)) + pairs, xp.nan)
    return xp.where(normaliser == 0, -xp.inf, lse)


def backward(operands: Operands, expansion: Expansion, attended: Attended, upstream: Upstream) -> Gradients:
    """Gradients of query, keys and values, each in its own shape, in the dtype of the computation.

    The exact derivative of `forward`, for gradients of the output and of the log of the normaliser; summaries are made again
    if they were not kept. With ĝ = [g, −r] / l, r = Σ g o − g_lse and C = w · A ∘ B: G = Φ(q)ᵀ ĝ, dq pulls ĝ Cᵀ back through
    Φ, du = Φ(a) (w · G ∘ B), da pulls [u, 1] (w · G ∘ B)ᵀ back, and so for the other views.
    """
    backend, q = operands.backend, operands.query
    monomials = expansion.monomials
    normaliser, *known = attended.kept
    operands, known, powers = balanced_values(operands, known)
    units, turn = shared_units(operands), turn_of(operands, expansion)
    w = weights(expansion, q, backend, turn)
    summaries = known or _summaries(operands, expansion, units)
    columns = (attended.out, normaliser, *upstream)
    factors = as_factors(summaries, turn, backend)
    combined = product(w, factors, turn, backend)
    of_query, dq = query_adjoint(q, units[0], combined, columns, monomials, backend)
    (upstream_factor,) = as_factors([of_query], turn, backend)
    of_views: list[Sequence[Array]] = []
    for number, view in enumerate(operands.views):
        if not operands.wants(number):
            count = 3 if operands.weights else 2
            of_views.append([backend.xp.zeros_like(x, dtype=operands.dtype) for x in view[:count]])
            continue
        others = [s for other, s in enumerate(factors) if other != number]
        own = product(w, [upstream_factor, *others], turn, backend) * (1 / view.keys.shape[-2])
        of_views.append(key_adjoint(view, units[number + 1], own, monomials, backend))
    found = Gradients.of_views(dq, of_views)
    return found._replace(values=with_powers(found.values, powers, backend))


def summary(view: View, unit: Array, monomials: Monomials, backend: Backend) -> Array:
    """Φ(k)ᵀ [v, 1] of a view, (..., r, dv + 1)."""
    operands = (*view, unit, *monomials)
    kernel = None if are_weights(view.mask, backend) else backend.kernel("moments", *operands)
    if kernel is not None:
        result: Array = kernel(*operands)
        return result
    basis = Basis.of(
        view.keys.shape[-1], monomials.degree, view.values.shape[-1] + 1, monomials.grading, backend.compiles
    )
    return summed_rows(lambda rows: rows * unit, view, basis, backend)[0]


def summed_rows(in_units: Callable[[Array], Array], view: View, basis: Basis, backend: Backend) -> Sum:
    """Φ(k)ᵀ [v, 1] of a view whose keys are taken `in_units`, (..., r, dv + 1), as a compensated sum."""
    dtype = backend.compute_dtype(view.keys.dtype)

    def prepare(k: Array, v: Array, mask: Array | None) -> tuple[Array, Array]:
        return in_units(backend.cast(clean(k, mask, backend), dtype)), with_ones(v, mask, dtype, backend)

    def products(phi: Array, z: Array) -> tuple[Array]:
        return (basis.row_sums(phi, z, backend),)

    shapes = [(basis.size, view.values.shape[-1] + 1)]
    whole = rows_of(view.keys, Monomials(basis.degree, basis.grading), shapes[0][1], view.leading)
    found = compiled_pass("sum_rows", whole, (view.keys, view.values), backend)
    if found is None:
        return summed_products(prepare, products, shapes, view, basis, backend)[0]

    def body(carry: Sum | None, *rows: Any) -> tuple[Sum, tuple[()]]:
        return added(carry, found.compute(*prepare(*rows)), backend), ()

    start = None
    if view.keys.shape[-2] > found.together:
        start = zero_sum((*view.leading, *shapes[0]), dtype, view.keys, backend)
    return joined(backend.share_rows(body, start, view, found.together, found.fewest)[0])


def summed_products(
    prepare: Callable[[Array, Array, Array | None], tuple[Array, Array]],
    products: Callable[[Array, Array], tuple[Array, ...]],
    shapes: Sequence[tuple[int, int]],
    view: View,
    basis: Basis,
    backend: Backend,
) -> list[Sum]:
    """Sums over all rows of ``products(Φ(x), z)`` with ``x, z = prepare(k, v, mask)``, compensated, of these shapes."""
    dtype, leading = backend.compute_dtype(view.keys.dtype), view.leading
    block, together = blocks_of(basis, basis.width(sum(columns for _, columns in shapes)), dtype, leading, backend)

    features = basis.features(backend)

    def of_block(sums: tuple[Array, ...] | None, x: Array, z: Array) -> tuple[tuple[Array, ...], tuple[()]]:
        found = products(features(backend.xp.matrix_transpose(x)), z)
        return found if sums is None else tuple(s + f for s, f in zip(sums, found, strict=True)), ()

    def body(carry: tuple[Sum, ...], k: Array, v: Array, mask: Array | None) -> tuple[tuple[Sum, ...], tuple[()]]:
        sums, _ = backend.scan_rows(of_block, None, prepare(k, v, mask), block)
        return tuple(add(c, s) for c, s in zip(carry, sums, strict=True)), ()

    start = tuple(zero_sum((*leading, *shape), dtype, view.keys, backend) for shape in shapes)
    carries, _ = backend.share_rows(body, start, view, together, FEWEST_BLOCKS * block)
    return [joined(sums) for sums in zip(*carries, strict=True)]


def read_out(q: Array, unit: Array, combined: Array, monomials: Monomials, backend: Backend) -> tuple[Array, Array]:
    """Φ(q) C for C (..., r, dv + 1): the output (..., n, dv), and the normaliser (..., n, 1)."""
    dtype, leading = backend.compute_dtype(q.dtype), broadcast_leading(q, combined)
    read, together, fewest = _reading(q, combined, monomials, backend)

    def body(_: None, rows: Array) -> tuple[None, tuple[Array, Array]]:
        return None, divided(read(backend.cast(rows, dtype) * unit), leading, backend)

    _, (out, normaliser) = backend.share_rows(body, None, (q,), together, fewest)
    return out, normaliser


def _reading(q: Array, combined: Array, monomials: Monomials, backend: Backend) -> Pass:
    """Rows in units → Φ(x) C, (..., rows, dv + 1)."""
    xp = backend.xp
    dtype, leading = backend.compute_dtype(q.dtype), broadcast_leading(q, combined)
    found = compiled_pass("read_rows", rows_of(q, monomials, combined.shape[-1], leading), (q, combined), backend)
    if found is not None:
        return found._replace(compute=lambda x: found.compute(x, combined))
    basis = Basis.of(q.shape[-1], monomials.degree, combined.shape[-1], monomials.grading, backend.compiles)
    reader = basis.reader(combined, backend)
    block, together = blocks_of(basis, basis.width(combined.shape[-1]), dtype, leading, backend, basis.lean)

    features = basis.features(backend)

    def of_block(_: None, x: Array) -> tuple[None, tuple[Array]]:
        return None, (xp.matrix_transpose(basis.read(features(xp.matrix_transpose(x)), reader, backend)),)

    def read(x: Array) -> Array:
        return backend.scan_rows(of_block, None, (x,), block)[1][0]

    return Pass(read, together, FEWEST_BLOCKS * block)


def divided(numerator: Array, leading: tuple[int, ...], backend: Backend) -> tuple[Array, Array]:
    """Output (..., rows, dv) and normaliser (..., rows, 1) from numerators (..., rows, dv + 1)."""
    xp = backend.xp
    normaliser = numerator[..., -1:]
    # Numerators of small values are finite where it overflows, and their quotients would be 0.
    normaliser = xp.where(normaliser == xp.inf, xp.nan, normaliser)
    # Where every pair is masked the normaliser is exactly 0; a negative one means that P was used beyond its
    # range, and NaN says so.
    inverse = 1 / xp.where(normaliser == 0, xp.inf, xp.where(normaliser < 0, xp.nan, normaliser))
    return with_leading(numerator[..., :-1] * inverse, leading, backend), with_leading(normaliser, leading, backend)


def query_adjoint(
    q: Array, unit: Array, combined: Array, columns: Sequence[Array], monomials: Monomials, backend: Backend
) -> tuple[Array, Array]:
    """G (..., r, dv + 1) and dq, from C and the columns (o, l, g, g_lse)."""
    dtype, leading = backend.compute_dtype(q.dtype), broadcast_leading(q, combined)
    pull, together, fewest = _pulling_queries(q, combined, monomials, backend)

    def body(carry: Sum | None, rows: Array, *blocks: Array) -> tuple[Sum, tuple[Array]]:
        o, l, g, g_lse = (backend.cast(b, dtype) for b in blocks)
        sums, dq = pull(backend.cast(rows, dtype) * unit, scaled_gradient(o, l, g, g_lse, backend))
        return added(carry, sums, backend), (sum_to_leading(dq * unit, q.shape[:-2], backend),)

    start = None if q.shape[-2] <= together else zero_sum((*leading, *combined.shape[-2:]), dtype, q, backend)
    carries, (dq,) = backend.share_rows(body, start, (q, *columns), together, fewest)
    return joined(carries)[0], dq


def _pulling_queries(q: Array, combined: Array, monomials: Monomials, backend: Backend) -> Pass:
    """Rows in units and ĝ (..., rows, dv + 1) → Φ(x)ᵀ ĝ, and the gradient of ĝ · Φ(x) C by x."""
    xp = backend.xp
    dtype, leading = backend.compute_dtype(q.dtype), broadcast_leading(q, combined)
    found = compiled_pass("sum_and_pull", rows_of(q, monomials, combined.shape[-1], leading), (q, combined), backend)
    if found is not None:
        return found._replace(compute=lambda x, g_hat: found.compute(x, g_hat, combined))
    basis = Basis.of(q.shape[-1], monomials.degree, combined.shape[-1], monomials.grading, backend.compiles)
    block, together = blocks_of(basis, basis.pulled(combined.shape[-1], backend), dtype, leading, backend)

    features, pull_back = basis.features(backend), basis.puller(combined, backend)

    def of_block(sums: Array | None, x: Array, g_hat: Array) -> tuple[Array, tuple[Array]]:
        phi = features(xp.matrix_transpose(x))
        found = basis.row_sums(phi, g_hat, backend)
        return found if sums is None else sums + found, (pull_back(phi, g_hat),)

    def pull(x: Array, g_hat: Array) -> tuple[Array, Array]:
        sums, (dq,) = backend.scan_rows(of_block, None, (x, g_hat), block)
        return sums, dq

    return Pass(pull, together, FEWEST_BLOCKS * block)


def key_adjoint(view: View, unit: Array, own: Array, monomials: Monomials, backend: Backend) -> tuple[Array, ...]:
    """(dk, dv), and those of weights if there are, of a view whose summary has the gradient `own` (..., r, dv + 1)."""
    xp = backend.xp
    dtype = backend.compute_dtype(view.keys.dtype)
    # All that follows is linear in this matrix: what the view broadcasts over is summed up first.
    own = sum_to_leading(own, view.leading, backend)
    pull, together, fewest = _pulling_keys(view, own, monomials, backend)

    def body(_: None, k: Array, v: Array, mask: Array | None) -> tuple[None, tuple[Array, ...]]:
        x = backend.cast(k, dtype) * unit
        if mask is not None:
            # What masked rows hold does not matter, but a 0 would take longer.
            x = xp.where(present(mask, backend), x, 1.0)
        dz, dk = pull(x, with_ones(v, mask, dtype, backend))
        grads = clean(dk * unit, mask, backend), *unweighed(dz, v, mask, backend)
        return None, tuple(sum_to_leading(g, a.shape[:-2], backend) for g, a in zip(grads, (k, v, mask), strict=False))

    return backend.share_rows(body, None, view, together, fewest)[1]


def _pulling_keys(view: View, own: Array, monomials: Monomials, backend: Backend) -> Pass:
    """Rows in units and [v, 1] → columns of Φ(x) M, for the values and, where there are some, weights; and the gradient by x."""
    xp = backend.xp
    degree, grading = monomials
    dtype, leading = backend.compute_dtype(view.keys.dtype), view.leading
    columns = view.values.shape[-1] + 1
    read = columns if are_weights(view.mask, backend) else columns - 1
    rows = rows_of(view.keys, monomials, columns, leading)._replace(read=read)
    found = compiled_pass("read_and_pull", rows, (view.keys, view.values, own), backend)
    if found is not None:
        return found._replace(compute=lambda x, z: found.compute(x, z, own))
    # With derivatives, these give the values' share of the highest degree as well.
    lean = degree >= 2 and (columns <= FEW_COLUMNS or not backend.writable) and not grading and not backend.compiles
    basis = Basis(view.keys.shape[-1], degree, lean, grading)
    block, together = blocks_of(basis, basis.pulled(columns, backend), dtype, leading, backend, basis.lean)

    features, pull_back = basis.features(backend), basis.puller_and_reader(own, read, backend)

    def of_block(_: None, x: Array, z: Array) -> tuple[None, tuple[Array, Array]]:
        return None, pull_back(features(xp.matrix_transpose(x)), z)

    def pull(x: Array, z: Array) -> tuple[Array, Array]:
        dk, dz = backend.scan_rows(of_block, None, (x, z), block)[1]
        return dz, dk

    return Pass(pull, together, FEWEST_BLOCKS * block)


def rows_of(x: Array, monomials: Monomials, columns: int, leading: tuple[int, ...]) -> Rows:
    """What a kernel multiplies of rows (..., n, d)."""
    which = x.shape[-1], *monomials
    return Rows(rank(*which), columns, run_table(*which), prod(leading))


def compiled_pass(operation: str, rows: Rows, arrays: Sequence[Array], backend: Backend) -> Pass | None:
    """A pass over these arrays, the rows first, by a kernel, where there is one."""
    rows = rows._replace(in_all=backend.rows_in_all)
    kernel = backend.kernel(operation, rows, *arrays)
    if kernel is None:
        return None
    # A block has as many rows as the bounds count chains, and what is made for it stays below the workspace.
    row = (arrays[0].shape[-1] + 2 * rows.columns) * rows.problems * backend.itemsize(arrays[0].dtype)
    together = max(1, min(FEW_CHAINS, backend.workspace // max(1, row * CHAIN))) * CHAIN
    multiplications = rows.problems * rows.rank * rows.columns
    # Of many short problems the kernel gives each thread some, in whole tiles.
    fewest = 4 * CHAIN if rows.problems >= MOST_THREADS else CHAIN
    return Pass(partial(kernel, rows), together, max(fewest, _FEWEST // max(1, multiplications)))


def compiled(operands: Operands, expansion: Expansion) -> bool:
    """Whether compiled loops pass over the rows of the query."""
    q, columns = operands.query, operands.values[0].shape[-1] + 1
    return (
        compiled_pass("sum_rows", rows_of(q, expansion.monomials, columns, operands.leading), (q,), operands.backend)
        is not None
    )


def sums_compiled(view: View, monomials: Monomials, backend: Backend) -> bool:
    """Whether compiled loops sum up the rows of a view."""
    rows = rows_of(view.keys, monomials, view.values.shape[-1] + 1, view.leading)
    return compiled_pass("sum_rows", rows, (view.keys, view.values), backend) is not None


def scaled_gradient(o: Array, l: Array, g: Array, g_lse: Array, backend: Backend) -> Array:
    """ĝ = [g, −r] / l with r = Σ g o − g_lse, and 0 where l is: (..., rows, dv + 1)."""
    xp = backend.xp
    r = xp.sum(g * o, axis=-1, keepdims=True) - g_lse
    inverse = 1 / xp.where(l == 0, xp.inf, l)
    return side_by_side(g, -r, backend, inverse)


def as_float(rank: float) -> float:
    """A rank that may be beyond all floats, as those are that nobody can afford."""
    return float(rank) if rank < 1 << 1000 else inf


def cost(problem: Problem, rank: float) -> Cost:
    """Operations and bytes of a polynomial of this rank, for all rows."""
    columns, itemsize, batch, rank = problem.value_dim + 1, problem.itemsize, problem.batch, as_float(rank)
    flops = problem.rows * rank * (2.0 * columns + 1)
    one = bytes_of_sums(problem, rank)
    together = max(1, min(batch, 8 * LARGEST_WORKSPACE // one))
    features = float(itemsize * (rank + columns) * together)
    block = min(max(LARGEST_WORKSPACE, 1024 * features), 4 * LARGEST_WORKSPACE, max(problem.lengths) * 2 * features)
    # What a row needs besides is made for some thousand rows at once; then there is the normaliser, and its logarithm.
    beside = itemsize * (problem.dim + 3.0 * columns) * together * min(4096, *problem.lengths)
    normaliser = 2.0 * itemsize * problem.lengths[0] * batch
    return Cost(flops, max(one, min(one * batch, 8 * LARGEST_WORKSPACE)) + normaliser + block + beside)


def bytes_of_sums(problem: Problem, rank: float) -> float:
    """Bytes of the summaries of one problem with what rounding took, their product and its copies."""
    return problem.itemsize * rank * (problem.value_dim + 1) * (2 * problem.views + 6)


def at_a_time(operands: Operands, expansion: Expansion) -> int:
    """How many problems to compute at a time."""
    dim, columns = operands.query.shape[-1], operands.values[0].shape[-1] + 1
    return problems(expansion, len(operands.views), dim, columns, operands.backend)


def problems(expansion: Expansion, views: int, dim: int, columns: int, backend: Backend) -> int:
    """How many problems have summaries and derivatives that take eight workspaces at most."""
    degree, grading = expansion.degree, expansion.grading
    r = rank(dim, degree, grading)
    numbers = r * columns * (views + 3) + (r if grading else rank(dim, degree - 1)) * dim * columns
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


def added(carry: Sum | None, term: Array, backend: Backend) -> Sum:
    """`add`, and to nothing the term itself: of many short sequences sums are as large as what they are sums of."""
    return (term, backend.xp.zeros_like(term)) if carry is None else add(carry, term)


def joined(sums: Sequence[Sum]) -> Sum:
    """Compensated sums as one."""
    carry, *others = sums
    for total, lost in others:
        carry = add(add(carry, total), -lost)
    return carry


def turn_of(operands: Operands, expansion: Expansion) -> Turn | None:
    """What turns the monomials of complex channels; None for real ones."""
    return Turn(operands.query.shape[-1], expansion.degree, expansion.grading) if operands.paired else None


def weights(expansion: Expansion, like: Array, backend: Backend, turn: Turn | None = None) -> Array:
    """The weights w_α = c_|α| · |α|! / α! as a column (r, 1), or those of complex monomials."""
    dtype = backend.compute_dtype(like.dtype)
    if turn is not None:
        which = expansion.coefficients, turn.dim, turn.degree, turn.grading
        return backend.table(complex_weights, *which, like=like, dtype=dtype)
    # By plain tuples, which torch.compile takes for constants.
    return backend.table(
        weight_table, expansion.coefficients, like.shape[-1], expansion.grading, like=like, dtype=dtype
    )


def weight_table(coefficients: tuple[float, ...], dim: int, grading: Grading) -> np.ndarray:
    """The table of `weights`."""
    which = dim, len(coefficients) - 1, grading
    of_degree = np.asarray(coefficients)[degrees(*which)]
    table: np.ndarray = (of_degree * multinomials(*which))[:, None]
    return table


def _summaries(operands: Operands, expansion: Expansion, units: Sequence[Array]) -> list[Array]:
    """Φ(k)ᵀ [v, 1] / n_μ for every view, (..., r, dv + 1)."""
    return [
        summary(view, unit, expansion.monomials, operands.backend) * (1 / view.keys.shape[-2])
        for unit, view in zip(units[1:], operands.views, strict=True)
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
    """[v, 1], or [w v, w] for weights w, and 0 in masked rows: (..., rows, dv + 1)."""
    xp = backend.xp
    v = weighed(backend.cast(v, dtype), mask, backend)
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
