"""The polynomial method score by score, for sequences so short that their scores are fewer than their features.

What `features` computes, the softmax with P in place of exp, up to rounding and in Π n_μ time: with ũ = [u, 1], ṽ = [v, 1]
over the number of rows, and 0 in masked ones,

    N_i = Σ_jk P(x_ijk) ũ_j ∘ ṽ_k,      o = N[:, :-1] / N[:, -1].

A view is taken off by multiplying its rows into the query, until one is left. Adjoint, for a gradient h
of N: with h_ij = h_i ∘ ũ_j and s_ij = q_i ∘ a_j, the last view takes db = wᵀ s and dṽ = Pᵀ h, w = P′ ∘ (h ṽᵀ), and hands ds = w b,
dh = P ṽ back. Sums run over at most `CHAIN` rows, and blocks are added with compensation.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

from ..arrays import broadcast_leading, clean, row_pairs, sum_to_leading, unweighed
from ..backends import Array, Backend
from ..backends.operations import CHAIN
from ..features.balance import balanced_values, with_powers
from ..features.basis import row_products
from ..features.complex_channels import conjugate, conjugating, multiply
from ..features.scaling import shared_units
from ..operands import Attended, Gradients, Operands, Upstream
from .features import add, divided, log_normaliser, scaled_gradient, with_ones, zero_sum
from .tuples import scaled_keys

# Rows of the last view in a block, where they do not leave room.
LAST = 256

Side = tuple[Array, Array]


class _Pass(NamedTuple):
    """What all blocks of a call share: c_0 … c_g, and whether channels are complex."""

    coefficients: Sequence[float]
    paired: bool
    backend: Backend


def forward(operands: Operands, coefficients: Sequence[float]) -> Attended:
    """Output, lse, and the normaliser over the number of pairs (..., n, 1)."""
    operands, _, _ = balanced_values(operands)
    backend = operands.backend
    leading, unit, views, blocks = _prepared(operands)
    run = _Pass(coefficients, operands.paired, backend)

    def body(_: None, rows: Array) -> tuple[None, tuple[Array, Array]]:
        s = backend.cast(rows, unit[0].dtype) * unit[0]
        numerator = _numerator(run, s, views, blocks[1:])
        return None, divided(numerator, leading, backend)

    _, (out, normaliser) = backend.scan_rows(body, None, (operands.query,), blocks[0])
    return Attended(out, log_normaliser(normaliser, operands.keys, backend), (normaliser,))


def backward(operands: Operands, coefficients: Sequence[float], attended: Attended, upstream: Upstream) -> Gradients:
    """Gradients of query, keys and values, each in its own shape, in the dtype of the computation."""
    operands, _, powers = balanced_values(operands)
    backend, q = operands.backend, operands.query
    columns = (attended.out, *attended.kept, *upstream)
    _, unit, views, blocks = _prepared(operands)
    run = _Pass(coefficients, operands.paired, backend)

    def body(carry: Any, rows: Array, *columns: Array) -> tuple[Any, tuple[Array]]:
        dtype = unit[0].dtype
        o, l, g, g_lse = (backend.cast(c, dtype) for c in columns)
        h = scaled_gradient(o, l, g, g_lse, backend)
        ds, _, grads = _adjoint(run, backend.cast(rows, dtype) * unit[0], h, views, blocks[1:])
        return _plus(carry, grads), (sum_to_leading(ds * unit[0], rows.shape[:-2], backend),)

    start = None if q.shape[-2] <= blocks[0] else _zeros(views, backend)
    grads, (dq,) = backend.scan_rows(body, start, (q, *columns), blocks[0])
    of_views = []
    for ((dk, _), (dz, _)), u, (k, v, mask) in zip(grads, unit[1:], operands.views, strict=True):
        own = sum_to_leading(clean(dk * u, mask, backend), k.shape[:-2], backend)
        of_views.append((own, *unweighed(dz * (1 / k.shape[-2]), v, mask, backend)))
    found = Gradients.of_views(dq, of_views)
    return found._replace(values=with_powers(found.values, powers, backend))


def _prepared(operands: Operands) -> tuple[tuple[int, ...], list[Array], list[Side], tuple[int, ...]]:
    """Leading dimensions, channel units, (k · unit, [v, 1] / n_μ) of every view, and rows in a block."""
    backend, q, keys, masks = operands.backend, operands.query, operands.keys, operands.masks
    dtype, leading = operands.dtype, operands.leading
    units = shared_units(operands)
    if operands.paired:
        units[0] = units[0] * backend.table(conjugating, q.shape[-1], like=q, dtype=dtype)
    ones = [with_ones(v, mask, dtype, backend) * (1 / v.shape[-2]) for _, v, mask in operands.views]
    views = list(zip(scaled_keys(keys, units[1:], masks, backend), ones, strict=True))
    width = q.shape[-1] + ones[0].shape[-1]
    blocks = blocks_of(leading, operands.lengths, width, dtype, backend, most=CHAIN)
    return leading, units, views, blocks


def _numerator(run: _Pass, s: Array, views: Sequence[Side], blocks: tuple[int, ...]) -> Array:
    """Σ P(x) ũ ∘ … over all rows of the views, (..., rows, dv + 1), for rows s (..., rows, d)."""
    backend, xp = run.backend, run.backend.xp
    rows = s.shape[-2]

    def body(carry: Any, k: Array, z: Array) -> tuple[Any, tuple[()]]:
        if len(views) == 1:
            return _plus(carry, [[_polynomial(run.coefficients, s @ xp.matrix_transpose(k), backend) @ z]]), ()
        inner = _numerator(run, _key_pairs(run, s, k), views[1:], blocks[1:])
        inner = xp.reshape(inner, (*inner.shape[:-2], rows, k.shape[-2], inner.shape[-1]))
        return _plus(carry, [[xp.sum(inner * z[..., None, :, :], axis=-2)]]), ()

    start = None
    if views[0][0].shape[-2] > blocks[0]:
        leading = broadcast_leading(s, *(x for view in views for x in view))
        start = ((zero_sum((*leading, rows, views[0][1].shape[-1]), s.dtype, s, backend),),)
    (((total, _),),), _ = backend.scan_rows(body, start, views[0], blocks[0])
    return total


def _adjoint(
    run: _Pass, s: Array, h: Array, views: Sequence[Side], blocks: tuple[int, ...]
) -> tuple[Array, Array, list[tuple[Array, Array]]]:
    """(ds, dh, (dk, dṽ) of every view) for rows s (..., rows, d) and the gradient h (..., rows, dv + 1) of their numerator."""
    backend, coefficients = run.backend, run.coefficients
    xp = backend.xp
    rows = s.shape[-2]

    def last_view(carry: Any, k: Array, z: Array) -> tuple[Any, tuple[Array, Array]]:
        x = s @ xp.matrix_transpose(k)
        p = _polynomial(coefficients, x, backend)
        w = _polynomial([t * c for t, c in enumerate(coefficients)][1:], x, backend) * (h @ xp.matrix_transpose(z))
        own = tuple(row_products(xp.matrix_transpose(m), y, backend) for m, y in ((w, s), (p, h)))
        return _plus(carry, [(w @ k, p @ z)]), _own(own, k, z)

    def other_view(carry: Any, k: Array, z: Array) -> tuple[Any, tuple[Array, Array]]:
        ds, dh, inner = _adjoint(run, _key_pairs(run, s, k), row_pairs(h, z, backend), views[1:], blocks[1:])
        ds, dh = (xp.reshape(x, (*x.shape[:-2], rows, k.shape[-2], x.shape[-1])) for x in (ds, dh))
        own = xp.sum(_to_keys(run, ds, s), axis=-3), xp.sum(dh * h[..., :, None, :], axis=-3)
        through = xp.sum(_to_rows(run, ds, k), axis=-2), xp.sum(dh * z[..., None, :, :], axis=-2)
        return _plus(carry, [through, *inner]), _own(own, k, z)

    def _own(grads: Any, k: Array, z: Array) -> tuple[Array, Array]:
        dk, dz = (sum_to_leading(g, x.shape[:-2], backend) for g, x in zip(grads, (k, z), strict=True))
        return dk, dz

    start = None
    if views[0][0].shape[-2] > blocks[0]:
        leading = broadcast_leading(s, h, *(x for view in views for x in view))
        through = tuple(zero_sum((*leading, *x.shape[-2:]), x.dtype, x, backend) for x in (s, h))
        start = (through, *_zeros(views[1:], backend))
    body = last_view if len(views) == 1 else other_view
    ((ds, dh), *inner), own = backend.scan_rows(body, start, views[0], blocks[0])
    return ds[0], dh[0], [own, *((dk[0], dz[0]) for dk, dz in inner)]


def _key_pairs(run: _Pass, s: Array, k: Array) -> Array:
    """`row_pairs` of channels; of complex ones with the conjugates of k, since s is that of the query."""
    if not run.paired:
        return row_pairs(s, k, run.backend)
    found = multiply(s[..., :, None, :], conjugate(k, run.backend)[..., None, :, :], run.backend)
    return run.backend.xp.reshape(found, (*found.shape[:-3], -1, found.shape[-1]))


def _to_keys(run: _Pass, gradient: Array, s: Array) -> Array:
    """Gradients of `_key_pairs` (..., rows, count, d) as those of k, for every row of s."""
    s = s[..., :, None, :]
    return multiply(conjugate(gradient, run.backend), s, run.backend) if run.paired else gradient * s


def _to_rows(run: _Pass, gradient: Array, k: Array) -> Array:
    """Gradients of `_key_pairs` (..., rows, count, d) as those of s, for every row of k."""
    k = k[..., None, :, :]
    return multiply(gradient, k, run.backend) if run.paired else gradient * k


def _zeros(views: Sequence[Side], backend: Backend) -> tuple[Any, ...]:
    """An empty compensated sum for every array of the views."""
    return tuple(tuple(zero_sum(tuple(x.shape), x.dtype, x, backend) for x in view) for view in views)


def _plus(carry: Any, terms: Any) -> Any:
    """Compensated sums of tuples of arrays, with one more term each; None, where there is one block, holds none."""
    if carry is None:
        return tuple(tuple((t, None) for t in several) for several in terms)
    return tuple(
        tuple(add(c, t) for c, t in zip(sums, several, strict=True)) for sums, several in zip(carry, terms, strict=True)
    )


def _polynomial(coefficients: Sequence[float], x: Array, backend: Backend) -> Array:
    """Σ_t c_t x^t by Horner's rule."""
    result = backend.xp.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        result = result * x + c
    return result


def at_a_time(operands: Operands) -> int:
    """How many problems to compute at a time, so that blocks keep a side of 32 rows, or all that there are."""
    scores = prod([min(32, n) for n in operands.lengths])
    return max(1, int(operands.backend.workspace // (8 * scores)))


def blocks_of(
    leading: tuple[int, ...], lengths: Sequence[int], width: int, dtype: object, backend: Backend, most: int
) -> tuple[int, ...]:
    """Rows of the query and of each view in a block, so that scores, and products of rows with `width` channels, fit.

    Short ones leave room to others; none has more than `most`.
    """
    itemsize = backend.itemsize(dtype)
    numbers = max(1.0, backend.workspace / (2 * itemsize * prod(leading)))
    sizes = [0] * len(lengths)
    # Scores run along the last view: passes over long rows are quicker than over short ones.
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
