"""Loops over the rows of causal attention in windows, compiled: blocks of rows of `engines.windows`, forward and adjoint.

Symbols as in `causal`. A block of n rows is a problem of its own. Of each view it has its own rows, of which row i sees those up to
i, and as many others, of which row i sees those from i on: k (P, 2 m, n, d) and z (P, 2 m, n, c) have the first of every view and
then the second. With T the sums of what all rows of the block see,

    S_i = T + the products z Φ(k) of its own rows up to i,      E_i = those of the others from i on,

row i reads the product of S_i + E_i over the views. The sums E behind every `ROWS` rows are added up from the last row to the first
and kept, and those behind every `FEW` rows made from them again. So both sums have chains as `causal` has them, and nothing is
subtracted.

Adjoint: with h_i the gradients of S_i + E_i, the others get the sums of h up to their row, and the block's own rows those from
their row on. The second is the first with rows in reverse order, and the two kinds of rows exchanged: so `pull` is about the
others alone.
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
    _ahead,
    _begin,
    _four,
    _get_in,
    _join_views,
    _make,
    _others,
    _pack,
    _pull_made,
    _room,
    _slope,
    _start,
    _turn,
    _turn_back,
    _unpack,
)
from .jit import compiled


@compiled(FAST, inline=True)
def _totals(s: Any, e: Any, f: Any, z: Any, g: Any, y: Any, x: Any, found: Any) -> None:
    """x_i ∘ (S_i + E_i) of four rows, whose monomials f join the part of the sums s; e is behind these rows, of monomials g."""
    for a in range(WIDTH):
        four, part = (f[a], f[WIDTH + a], f[2 * WIDTH + a], f[3 * WIDTH + a]), s[WIDTH + a]
        back = g[3 * WIDTH + a], g[2 * WIDTH + a], g[WIDTH + a], g[a]
        s0, s1, s2, s3 = _ahead(z, four, s[a] + part)
        e3, e2, e1, e0 = _ahead((y[3], y[2], y[1], y[0]), back, e[a])
        found[a] = x[a] * (s0 + e0)
        found[WIDTH + a] = x[WIDTH + a] * (s1 + e1)
        found[2 * WIDTH + a] = x[2 * WIDTH + a] * (s2 + e2)
        found[3 * WIDTH + a] = x[3 * WIDTH + a] * (s3 + e3)
        s[WIDTH + a] = _ahead(z, four, part)[3]


@compiled(FAST, inline=True)
def _contract(s: Any, e: Any, f: Any, z: Any, g: Any, y: Any, x: Any) -> Any:
    """The sum of what `_totals` finds over monomials."""
    n0 = n1 = n2 = n3 = s.dtype.type(0)
    for a in range(WIDTH):
        four, part = (f[a], f[WIDTH + a], f[2 * WIDTH + a], f[3 * WIDTH + a]), s[WIDTH + a]
        back = g[3 * WIDTH + a], g[2 * WIDTH + a], g[WIDTH + a], g[a]
        s0, s1, s2, s3 = _ahead(z, four, s[a] + part)
        e3, e2, e1, e0 = _ahead((y[3], y[2], y[1], y[0]), back, e[a])
        n0 += x[a] * (s0 + e0)
        n1 += x[WIDTH + a] * (s1 + e1)
        n2 += x[2 * WIDTH + a] * (s2 + e2)
        n3 += x[3 * WIDTH + a] * (s3 + e3)
        s[WIDTH + a] = _ahead(z, four, part)[3]
    return n0, n1, n2, n3


@compiled(inline=True)
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


@compiled(FAST, inline=True)
def _running_totals(s: Any, e: Any, f: Any, z: Any, g: Any, y: Any, found: Any) -> None:
    """S_i + E_i of four rows, as in `_totals`."""
    for a in range(WIDTH):
        four, part = (f[a], f[WIDTH + a], f[2 * WIDTH + a], f[3 * WIDTH + a]), s[WIDTH + a]
        back = g[3 * WIDTH + a], g[2 * WIDTH + a], g[WIDTH + a], g[a]
        s0, s1, s2, s3 = _ahead(z, four, s[a] + part)
        e3, e2, e1, e0 = _ahead((y[3], y[2], y[1], y[0]), back, e[a])
        found[a] = s0 + e0
        found[WIDTH + a] = s1 + e1
        found[2 * WIDTH + a] = s2 + e2
        found[3 * WIDTH + a] = s3 + e3
        s[WIDTH + a] = _ahead(z, four, part)[3]


@compiled(FAST, inline=True)
def _up_to(s: Any, g: Any, q: Any, others: Any, f: Any, z: Any, slopes: Any) -> Any:
    """With G_i the sums of g q ∘ others over the rows up to i, of which s has those before four rows: slopes get z G, and back
    comes Σ f ∘ G.
    """
    n0 = n1 = n2 = n3 = s.dtype.type(0)
    for a in range(WIDTH):
        h = g[0] * q[a], g[1] * q[WIDTH + a], g[2] * q[2 * WIDTH + a], g[3] * q[3 * WIDTH + a]
        four = others[a], others[WIDTH + a], others[2 * WIDTH + a], others[3 * WIDTH + a]
        part = s[WIDTH + a]
        s0, s1, s2, s3 = _ahead(h, four, s[a] + part)
        slopes[a] += z[0] * s0
        slopes[WIDTH + a] += z[1] * s1
        slopes[2 * WIDTH + a] += z[2] * s2
        slopes[3 * WIDTH + a] += z[3] * s3
        n0 += f[a] * s0
        n1 += f[WIDTH + a] * s1
        n2 += f[2 * WIDTH + a] * s2
        n3 += f[3 * WIDTH + a] * s3
        s[WIDTH + a] = _ahead(h, four, part)[3]
    return n0, n1, n2, n3


@compiled()
def _pull_few(
    sums: Any, behind: Any, of_sums: Any, f: Any, slope: Any, shares: Any, e: int, i: int, slopes: Any, of_shares: Any,
    totals: Any, product: Any, of_query: Any,
) -> None:  # fmt: skip
    """Gradients of four rows through column e: slopes of the monomials of the query, if asked for, and of the others.

    `of_sums` (m 2 WIDTH,) are the sums of the gradients before these rows.
    """
    views, few = shares.shape[0] // 2, FEW * WIDTH
    for v in range(views):
        own, other = (1 + v) * SLOT, (1 + views + v) * SLOT
        of_view, of_others = sums[2 * v * WIDTH : 2 * (v + 1) * WIDTH], behind[v * WIDTH : (v + 1) * WIDTH]
        z, y = _four(shares[v, e], i), _four(shares[views + v, e], i)
        _running_totals(of_view, of_others, f[own : own + few], z, f[other : other + few], y, totals[v])
    for v in range(views):
        other = (1 + views + v) * SLOT
        if views == 2:
            x = totals[1 - v]
        else:
            _others(v, None, totals, product)
            x = product
        if v == 0 and of_query:
            _slope(slope, x, totals[0], slopes[:few])
        y, before = _four(shares[views + v, e], i), of_sums[2 * v * WIDTH : 2 * (v + 1) * WIDTH]
        own = slopes[(1 + v) * SLOT : (1 + v) * SLOT + few]
        _get_in(of_shares[v, e], i, _up_to(before, slope, f[:few], x, f[other : other + few], y, own))


@compiled(leaf=False)
def pull(
    q: Any, k: Any, z: Any, g: Any, w: Any, runs: Any, total: Any, dq: Any, dk: Any, dz: Any, of_total: Any
) -> None:
    """Gradients of the other rows, dk and dz (P, m, n, ·), from those of the numerators, g (P, n, c); otherwise as `read`.

    dq (P, n, d) is that of q, or (0, …), and so is `of_total` that of `total`.
    """
    problems, both, n, columns = z.shape
    dim, views, blocks, chunks = q.shape[2], both // 2, w.shape[0] // WIDTH, (n + ROWS - 1) // ROWS
    phi, ones, product = _room(w.shape[0], w), _room(w.shape[0], w), _room(FEW * WIDTH, w)
    ones[:] = 1
    monomials = _room(blocks * (1 + both) * SLOT, w).reshape((blocks, (1 + both) * SLOT))
    slopes = _room(blocks * (1 + views) * SLOT, w).reshape((blocks, (1 + views) * SLOT))
    sums = _room(blocks * columns * views * 2 * WIDTH, w).reshape((blocks, columns, views * 2 * WIDTH))
    of_sums = _room(blocks * columns * views * 2 * WIDTH, w).reshape((blocks, columns, views * 2 * WIDTH))
    rests = _room(blocks * columns * views * WIDTH, w).reshape((blocks, columns, views * WIDTH))
    of_rests = _room(blocks * columns * views * WIDTH, w).reshape((blocks, columns, views * WIDTH))
    afters = _room(chunks * blocks * columns * views * WIDTH, w).reshape((chunks, blocks, columns, views * WIDTH))
    behind = _room(ROWS // FEW * COLUMNS * views * WIDTH, w).reshape((ROWS // FEW, COLUMNS, views * WIDTH))
    running = _room(COLUMNS * views * 2 * WIDTH, w).reshape((COLUMNS, views * 2 * WIDTH))
    totals = _room(views * FEW * WIDTH, w).reshape((views, FEW * WIDTH))
    turned, of_turned = _room(w.shape[0] * ROWS, w).reshape((-1, ROWS)), _room(w.shape[0] * ROWS, w).reshape((-1, ROWS))
    x, dx, found = np.zeros((dim, ROWS), w.dtype), np.zeros((dim, ROWS), w.dtype), np.zeros((2, ROWS), w.dtype)
    shares, of_shares = np.zeros((both, columns, ROWS), w.dtype), np.zeros((views, columns, ROWS), w.dtype)
    given, of_query = np.zeros((columns, ROWS), w.dtype), dq.shape[0] > 0
    for p in range(problems):
        _sum_behind(k[p, views:], z[p, views:], runs, ones, phi, monomials, sums, rests, shares[views:], afters)
        sums[:] = 0
        rests[:] = 0
        of_sums[:] = 0
        of_rests[:] = 0
        if total.shape[0]:
            _pack(total[p], None, 2 * WIDTH, sums)
        own_dq = dq[p if of_query else 0 :]
        _pull(
            q[p], k[p], z[p], g[p], w, runs, ones, phi, monomials, slopes, sums, rests, of_sums, of_rests, afters, running,
            behind, totals, product, turned, of_turned, x, dx, found, shares, of_shares, given, of_query,
            own_dq, dk[p], dz[p],
        )  # fmt: skip
        if of_total.shape[0]:
            _unpack(of_sums, None, 2 * WIDTH, of_total[p])


@compiled()
def _pull(
    q: Any, k: Any, z: Any, g: Any, w: Any, runs: Any, ones: Any, phi: Any, monomials: Any, slopes: Any, sums: Any,
    rests: Any, of_sums: Any, of_rests: Any, afters: Any, running: Any, behind: Any, totals: Any, product: Any, turned: Any,
    of_turned: Any, x: Any, dx: Any, found: Any, shares: Any, of_shares: Any, given: Any, of_query: Any, dq: Any, dk: Any,
    dz: Any,
) -> None:  # fmt: skip
    """`pull` for one problem, with room for all that it needs; dq begins with its own."""
    both, n, columns = z.shape
    views = both // 2
    for chunk in range(afters.shape[0]):
        begin = chunk * ROWS
        rows = min(ROWS, n - begin)
        _make(q[begin : begin + rows], runs, None, w, phi, 0, monomials)
        _turn(g, begin, rows, given)
        for v in range(both):
            _make(k[v, begin : begin + rows], runs, None, ones, phi, 1 + v, monomials)
            _turn(z[v], begin, rows, shares[v])
        slopes[:] = 0
        for block in range(w.shape[0] // WIDTH):
            of_block = monomials[block]
            for left in range(0, columns, COLUMNS):
                right = min(left + COLUMNS, columns)
                kept = afters[chunk, block]
                _begin_behind(kept, left, right, of_block[views * SLOT :], shares[views:], rows, running, behind)
                for i in range(0, rows, FEW):
                    f, of_f = of_block[i * WIDTH :], slopes[block, i * WIDTH :]
                    for e in range(left, right):
                        _pull_few(
                            sums[block, e], behind[i // FEW, e - left], of_sums[block, e], f, _four(given[e], i), shares, e, i,
                            of_f, of_shares, totals, product, of_query,
                        )  # fmt: skip
                for e in range(left, right):
                    _join_views(sums[block, e], rests[block, e])
                    _join_views(of_sums[block, e], of_rests[block, e])
        if of_query:
            _turn(q, begin, rows, x)
            _pull_made(x, runs, None, w, turned, of_turned, 0, slopes, dx, found)
            _turn_back(dx, begin, rows, dq[0])
        for v in range(views):
            _turn(k[views + v], begin, rows, x)
            _pull_made(x, runs, None, ones, turned, of_turned, 1 + v, slopes, dx, found)
            _turn_back(dx, begin, rows, dk[v])
            _turn_back(of_shares[v], begin, rows, dz[v])
