"""Loops over the rows of causal attention in windows, compiled: blocks of rows of `engines.windows`.

Symbols as in `causal`. A block of n rows is a problem of its own. Of each view it has its own rows, of which row i sees those up to
i, and as many others, of which row i sees those from i on: k (P, 2 m, n, d) and z (P, 2 m, n, c) have the first of every view and
then the second. With T the sums of what all rows of the block see,

    S_i = T + the products z Φ(k) of its own rows up to i,      E_i = those of the others from i on,

row i reads the product of S_i + E_i over the views. The sums E behind every `ROWS` rows are added up from the last row to the first
and kept, and those behind every `FEW` rows made from them again. So both sums have chains as `causal` has them, and nothing is
subtracted.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..operations import FEW, ROWS
from .causal import (
    COLUMNS,
    FAST,
    SLOT,
    WIDTH,
    _add_eight,
    _add_few,
    _begin,
    _four,
    _get_in,
    _join_views,
    _make,
    _pack,
    _room,
    _start,
    _turn,
    _turn_back,
)
from .jit import compiled


@compiled(FAST)
def _totals(s: Any, e: Any, f: Any, z: Any, g: Any, y: Any, x: Any, found: Any) -> None:
    """x_i ∘ (S_i + E_i) of four rows, whose monomials f join the part of the sums s; e is behind these rows, of monomials g."""
    for a in range(WIDTH):
        part = s[WIDTH + a]
        t0, t1, t2, t3 = z[0] * f[a], z[1] * f[WIDTH + a], z[2] * f[2 * WIDTH + a], z[3] * f[3 * WIDTH + a]
        s0 = s[a] + part + t0
        s1 = s0 + t1
        s2 = s1 + t2
        s3 = s2 + t3
        e3 = e[a] + y[3] * g[3 * WIDTH + a]
        e2 = e3 + y[2] * g[2 * WIDTH + a]
        e1 = e2 + y[1] * g[WIDTH + a]
        e0 = e1 + y[0] * g[a]
        found[a] = x[a] * (s0 + e0)
        found[WIDTH + a] = x[WIDTH + a] * (s1 + e1)
        found[2 * WIDTH + a] = x[2 * WIDTH + a] * (s2 + e2)
        found[3 * WIDTH + a] = x[3 * WIDTH + a] * (s3 + e3)
        s[WIDTH + a] = part + ((t0 + t1) + (t2 + t3))


@compiled(FAST)
def _contract(s: Any, e: Any, f: Any, z: Any, g: Any, y: Any, x: Any) -> Any:
    """The sum of what `_totals` finds over monomials."""
    n0 = n1 = n2 = n3 = s.dtype.type(0)
    for a in range(WIDTH):
        part = s[WIDTH + a]
        t0, t1, t2, t3 = z[0] * f[a], z[1] * f[WIDTH + a], z[2] * f[2 * WIDTH + a], z[3] * f[3 * WIDTH + a]
        s0 = s[a] + part + t0
        s1 = s0 + t1
        s2 = s1 + t2
        s3 = s2 + t3
        e3 = e[a] + y[3] * g[3 * WIDTH + a]
        e2 = e3 + y[2] * g[2 * WIDTH + a]
        e1 = e2 + y[1] * g[WIDTH + a]
        e0 = e1 + y[0] * g[a]
        n0 += x[a] * (s0 + e0)
        n1 += x[WIDTH + a] * (s1 + e1)
        n2 += x[2 * WIDTH + a] * (s2 + e2)
        n3 += x[3 * WIDTH + a] * (s3 + e3)
        s[WIDTH + a] = part + ((t0 + t1) + (t2 + t3))
    return n0, n1, n2, n3


@compiled()
def _read_few(sums: Any, behind: Any, f: Any, shares: Any, e: int, i: int, product: Any) -> Any:
    """Numerators of four rows in column e, from the sums (m 2 WIDTH,) and those behind the rows (m WIDTH,)."""
    views, few = shares.shape[0] // 2, FEW * WIDTH
    x = f[:few]
    for v in range(views - 1):
        own, other = (1 + v) * SLOT, (1 + views + v) * SLOT
        of_view, of_others = sums[2 * v * WIDTH : 2 * (v + 1) * WIDTH], behind[v * WIDTH : (v + 1) * WIDTH]
        z, y = _four(shares[v, e], i), _four(shares[views + v, e], i)
        _totals(of_view, of_others, f[own : own + few], z, f[other : other + few], y, x, product)
        x = product
    v = views - 1
    own, other = (1 + v) * SLOT, (1 + views + v) * SLOT
    z, y = _four(shares[v, e], i), _four(shares[views + v, e], i)
    return _contract(sums[2 * v * WIDTH :], behind[v * WIDTH :], f[own : own + few], z, f[other : other + few], y, x)


@compiled()
def _begin_behind(kept: Any, left: int, right: int, f: Any, shares: Any, rows: int, running: Any, behind: Any) -> None:
    """The sums behind every four rows of a chunk into `behind`, from those behind the chunk, (c, m WIDTH)."""
    for e in range(left, right):
        for low in range(0, kept.shape[1], WIDTH):
            _begin(kept[e, low : low + WIDTH], running[e - left, 2 * low : 2 * (low + WIDTH)])
    for i in range((rows - 1) // FEW * FEW, -1, -FEW):
        for e in range(left, right):
            _add_few(running[e - left], f[i * WIDTH :], shares, e, i, behind[i // FEW, e - left])


@compiled()
def _sum_behind(
    k: Any, z: Any, runs: Any, ones: Any, phi: Any, monomials: Any, sums: Any, rests: Any, shares: Any, afters: Any
) -> None:
    """The sums of the rows behind every chunk of `ROWS` rows into `afters`, with room that is lost."""
    views, n, columns = z.shape
    sums[:] = 0
    rests[:] = 0
    for chunk in range(afters.shape[0] - 1, -1, -1):
        begin = chunk * ROWS
        rows = min(ROWS, n - begin)
        for v in range(views if chunk else 0):
            _make(k[v, begin : begin + rows], runs, None, ones, phi, 1 + v, monomials)
            _turn(z[v], begin, rows, shares[v])
        for block in range(sums.shape[0]):
            for left in range(0, columns, COLUMNS):
                right = min(left + COLUMNS, columns)
                for e in range(left, right):
                    for low in range(0, views * WIDTH, WIDTH):
                        _start(sums[block, e, 2 * low : 2 * low + WIDTH], afters[chunk, block, e, low : low + WIDTH])
                for i in range(0, rows if chunk else 0, 2 * FEW):
                    for v in range(views):
                        part, own = (2 * v + 1) * WIDTH, (1 + v) * SLOT + i * WIDTH
                        f = monomials[block, own : own + 2 * FEW * WIDTH]
                        for e in range(left, right):
                            eight = _four(shares[v, e], i) + _four(shares[v, e], i + FEW)
                            _add_eight(sums[block, e, part : part + WIDTH], f, eight)
                for e in range(left, right if chunk else left):
                    _join_views(sums[block, e], rests[block, e])


@compiled(leaf=False)
def read(q: Any, k: Any, z: Any, w: Any, runs: Any, total: Any, out: Any) -> None:
    """Numerators (P, n, c) of the rows of blocks; `total` (P, m, c, r) are the sums of what all rows of a block see, or (0, …)."""
    problems, both, n, columns = z.shape
    views, blocks, chunks = both // 2, w.shape[0] // WIDTH, (n + ROWS - 1) // ROWS
    phi, ones, product = _room(w.shape[0], w), _room(w.shape[0], w), _room(FEW * WIDTH, w)
    ones[:] = 1
    monomials = _room(blocks * (1 + both) * SLOT, w).reshape((blocks, (1 + both) * SLOT))
    sums = _room(blocks * columns * views * 2 * WIDTH, w).reshape((blocks, columns, views * 2 * WIDTH))
    rests = _room(blocks * columns * views * WIDTH, w).reshape((blocks, columns, views * WIDTH))
    afters = _room(chunks * blocks * columns * views * WIDTH, w).reshape((chunks, blocks, columns, views * WIDTH))
    behind = _room(ROWS // FEW * COLUMNS * views * WIDTH, w).reshape((ROWS // FEW, COLUMNS, views * WIDTH))
    running = _room(COLUMNS * views * 2 * WIDTH, w).reshape((COLUMNS, views * 2 * WIDTH))
    shares, found = np.zeros((both, columns, ROWS), w.dtype), np.zeros((columns, ROWS), w.dtype)
    for p in range(problems):
        _sum_behind(k[p, views:], z[p, views:], runs, ones, phi, monomials, sums, rests, shares[views:], afters)
        sums[:] = 0
        rests[:] = 0
        if total.shape[0]:
            _pack(total[p], None, 2 * WIDTH, sums)
        _read(
            q[p], k[p], z[p], w, runs, ones, phi, monomials, sums, rests, afters, running, behind, shares, found, product,
            out[p],
        )  # fmt: skip


@compiled()
def _read(
    q: Any, k: Any, z: Any, w: Any, runs: Any, ones: Any, phi: Any, monomials: Any, sums: Any, rests: Any, afters: Any,
    running: Any, behind: Any, shares: Any, found: Any, product: Any, out: Any,
) -> None:  # fmt: skip
    """`read` for one problem, with room for all that it needs."""
    both, n, columns = z.shape
    views = both // 2
    for chunk in range(afters.shape[0]):
        begin = chunk * ROWS
        rows = min(ROWS, n - begin)
        _make(q[begin : begin + rows], runs, None, w, phi, 0, monomials)
        for v in range(both):
            _make(k[v, begin : begin + rows], runs, None, ones, phi, 1 + v, monomials)
            _turn(z[v], begin, rows, shares[v])
        for block in range(w.shape[0] // WIDTH):
            of_block = monomials[block]
            for left in range(0, columns, COLUMNS):
                right = min(left + COLUMNS, columns)
                _begin_behind(
                    afters[chunk, block], left, right, of_block[views * SLOT :], shares[views:], rows, running, behind
                )
                for i in range(0, rows, FEW):
                    f = of_block[i * WIDTH :]
                    for e in range(left, right):
                        four = _read_few(sums[block, e], behind[i // FEW, e - left], f, shares, e, i, product)
                        _get_in(found[e], i, four)
                for e in range(left, right):
                    _join_views(sums[block, e], rests[block, e])
        _turn_back(found, begin, rows, out)
