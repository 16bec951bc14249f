"""Loops over the rows of causal attention, compiled: a block of rows of `engines.causal_features`, forward and adjoint.

Symbols, for each of P problems: q (n, d) and k (m, n, d) in units, z = [v, 1] times shares (m, n, c), g = ĝ (n, c); weights w (R,)
with zeros behind, and `runs` (count, 4) of `features.monomials.Run`. Sums, and what rounding took from them, are (m, c, r).
All arrays are contiguous, and of one dtype.

Monomials are taken `WIDTH` at a time and rows `FEW` at a time. With S the sums before these,

    S_i = S + the products z Φ(k) of these rows up to i,

one after the other; what is added here does not outlive the few rows. What they add to the sums is added up apart for `ROWS`
rows, and then joins the sums with Kahan's compensation. So a chain has at most ROWS / FEW + FEW + 1 terms. A read-out has `WIDTH`
terms in any order, and then one for every `WIDTH` monomials. Nothing is ever subtracted.

A compiler vectorizes loops of constant length over few arrays, whose parts are at constant places: so arrays are cut to one
dimension, with `WIDTH` from one part to the next. It may reorder sums and fuse products with additions (`FAST`), but not where
sums are compensated.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .jit import compiled

ROWS = 64
# The loops below are written for four rows.
FEW = 4
WIDTH = 128
# Columns of the values whose sums are gone over for one few rows after another: they stay in the first cache.
COLUMNS = 17
# From the monomials of one slot, the query's or a view's, to the next: by no power of two, or they displace each other in caches.
SLOT = (ROWS + FEW) * WIDTH
# Terms that a gradient of a row is added up of before it is added up further.
CHAIN = 128
FAST = {"reassoc", "contract"}
# Bytes: whole vectors are read faster where they do not cross a line of the cache.
_LINE = 64


@compiled(leaf=False)
def _room(count: int, like: Any) -> Any:
    """Zeros (count,) of the dtype of an array, aligned."""
    raw = np.zeros(count + _LINE // like.itemsize, like.dtype)
    first = (-raw.ctypes.data % _LINE) // like.itemsize
    return raw[first : first + count]


@compiled(FAST)
def _scale(factor: Any, source: Any, target: Any) -> None:
    for a in range(target.shape[0]):
        target[a] = factor * source[a]


@compiled(FAST)
def _copy(w: Any, source: Any, target: Any) -> None:
    for a in range(WIDTH):
        target[a] = w[a] * source[a]


@compiled(FAST)
def _features(x: Any, runs: Any, w: Any, phi: Any, slot: int, blocks: Any) -> None:
    """Monomials of rows (rows, d) times w (R,) into a slot of blocks (R / WIDTH, slots * SLOT); phi (R,) is room for a row."""
    # Where every run is one channel times 1, the channels themselves are the monomials.
    linear = runs.shape[0] > 0 and runs[-1, 2] == 1 + x.shape[1] and runs[-1, 3] == 0
    for i in range(x.shape[0]):
        phi[0] = 1
        if linear:
            _scale(1, x[i], phi[1 : 1 + x.shape[1]])
        else:
            for run in range(runs.shape[0]):
                channel, start, stop, source = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
                _scale(x[i, channel], phi[source : source + stop - start], phi[start:stop])
        to = slot * SLOT + i * WIDTH
        for block in range(blocks.shape[0]):
            low, target = block * WIDTH, blocks[block]
            _copy(w[low : low + WIDTH], phi[low : low + WIDTH], target[to : to + WIDTH])


@compiled(FAST)
def _scale_rows(x: Any, source: Any, target: Any) -> None:
    for i in range(x.shape[0]):
        target[i] = x[i] * source[i]


@compiled(FAST)
def _pull_rows(x: Any, slopes: Any, phi: Any, back: Any, found: Any) -> None:
    for i in range(x.shape[0]):
        found[i] += slopes[i] * phi[i]
        back[i] += x[i] * slopes[i]


@compiled()
def _turn_block(w: Any, given: Any, turned: Any) -> None:
    """Monomials of `ROWS` rows times w, (ROWS * WIDTH,) → (WIDTH * ROWS,), by small squares."""
    for low in range(0, WIDTH, 16):
        for i in range(ROWS):
            part, target = given[i * WIDTH + low : i * WIDTH + low + 16], turned[low * ROWS + i : (low + 16) * ROWS]
            for a in range(16):
                target[a * ROWS] = w[low + a] * part[a]


@compiled(FAST)
def _pull_features(
    x: Any, runs: Any, w: Any, phi: Any, slopes: Any, slot: int, blocks: Any, dx: Any, found: Any
) -> None:
    """Gradients of rows (d, ROWS) from w times those of their monomials, in a slot of blocks.

    Room (R, ROWS) for monomials and slopes, and zeros `found` (ROWS,).
    """
    phi[0] = 1
    for run in range(runs.shape[0]):
        channel, start, stop, source = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
        for j in range(stop - start):
            _scale_rows(x[channel], phi[source + j], phi[start + j])
    flat = slopes.reshape(slopes.size)
    for block in range(blocks.shape[0]):
        low, given = block * WIDTH, blocks[block]
        of_block = flat[low * ROWS : (low + WIDTH) * ROWS]
        _turn_block(w[low : low + WIDTH], given[slot * SLOT : (slot + 1) * SLOT], of_block)
    dx[:] = 0
    for run in range(runs.shape[0] - 1, -1, -1):
        channel, start, stop, source = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
        for j in range(stop - start):
            _pull_rows(x[channel], slopes[start + j], phi[source + j], slopes[source + j], found)
            if (j + 1) % CHAIN == 0 or j + 1 == stop - start:
                for i in range(ROWS):
                    dx[channel, i] += found[i]
                    found[i] = 0


@compiled(FAST)
def _multiply(s: Any, f: Any, z: Any, x: Any, y: Any) -> None:
    """y_i = x_i ∘ S_i for four rows, whose monomials f join the part of the sums s (2 WIDTH,): totals and parts."""
    for a in range(WIDTH):
        t0, t1, t2, t3 = z[0] * f[a], z[1] * f[WIDTH + a], z[2] * f[2 * WIDTH + a], z[3] * f[3 * WIDTH + a]
        part = s[WIDTH + a]
        s0 = s[a] + part + t0
        s1 = s0 + t1
        s2 = s1 + t2
        s3 = s2 + t3
        y[a] = x[a] * s0
        y[WIDTH + a] = x[WIDTH + a] * s1
        y[2 * WIDTH + a] = x[2 * WIDTH + a] * s2
        y[3 * WIDTH + a] = x[3 * WIDTH + a] * s3
        s[WIDTH + a] = part + ((t0 + t1) + (t2 + t3))


@compiled(FAST)
def _contract(s: Any, f: Any, z: Any, x: Any) -> Any:
    """Σ x_i ∘ S_i over monomials for four rows, otherwise as `_multiply`."""
    n0 = n1 = n2 = n3 = s.dtype.type(0)
    for a in range(WIDTH):
        t0, t1, t2, t3 = z[0] * f[a], z[1] * f[WIDTH + a], z[2] * f[2 * WIDTH + a], z[3] * f[3 * WIDTH + a]
        part = s[WIDTH + a]
        s0 = s[a] + part + t0
        s1 = s0 + t1
        s2 = s1 + t2
        s3 = s2 + t3
        n0 += x[a] * s0
        n1 += x[WIDTH + a] * s1
        n2 += x[2 * WIDTH + a] * s2
        n3 += x[3 * WIDTH + a] * s3
        s[WIDTH + a] = part + ((t0 + t1) + (t2 + t3))
    return n0, n1, n2, n3


@compiled(FAST)
def _contract_two(s: Any, f: Any, y: Any, z: Any) -> Any:
    """`_multiply` and `_contract` in one for two views with shares y and z; f has all three slots."""
    n0 = n1 = n2 = n3 = s.dtype.type(0)
    for a in range(WIDTH):
        t0, t1 = y[0] * f[SLOT + a], y[1] * f[SLOT + WIDTH + a]
        t2, t3 = y[2] * f[SLOT + 2 * WIDTH + a], y[3] * f[SLOT + 3 * WIDTH + a]
        u0, u1 = z[0] * f[2 * SLOT + a], z[1] * f[2 * SLOT + WIDTH + a]
        u2, u3 = z[2] * f[2 * SLOT + 2 * WIDTH + a], z[3] * f[2 * SLOT + 3 * WIDTH + a]
        t_part, u_part = s[WIDTH + a], s[3 * WIDTH + a]
        s0, v0 = s[a] + t_part + t0, s[2 * WIDTH + a] + u_part + u0
        s1, v1 = s0 + t1, v0 + u1
        s2, v2 = s1 + t2, v1 + u2
        s3, v3 = s2 + t3, v2 + u3
        n0 += f[a] * s0 * v0
        n1 += f[WIDTH + a] * s1 * v1
        n2 += f[2 * WIDTH + a] * s2 * v2
        n3 += f[3 * WIDTH + a] * s3 * v3
        s[WIDTH + a] = t_part + ((t0 + t1) + (t2 + t3))
        s[3 * WIDTH + a] = u_part + ((u0 + u1) + (u2 + u3))
    return n0, n1, n2, n3


@compiled()
def _join(s: Any, lost: Any) -> None:
    """One step of Kahan's sum: parts, which are 0 then, into totals."""
    for a in range(WIDTH):
        term, total = s[WIDTH + a] - lost[a], s[a]
        new = total + term
        lost[a] = (new - total) - term
        s[a] = new
        s[WIDTH + a] = 0


@compiled()
def _join_views(sums: Any, lost: Any) -> None:
    """The same for the sums of all views (m 2 WIDTH,), with what was lost, (m WIDTH,)."""
    for low in range(0, lost.shape[0], WIDTH):
        _join(sums[2 * low : 2 * (low + WIDTH)], lost[low : low + WIDTH])


@compiled()
def _pack(given: Any, step: int, packed: Any) -> None:
    """Sums (m, c, r) into (blocks, c, m step), the first `WIDTH` of each step."""
    views, columns, r = given.shape
    for v in range(views):
        for e in range(columns):
            for a in range(r):
                packed[a // WIDTH, e, v * step + a % WIDTH] = given[v, e, a]


@compiled()
def _unpack(packed: Any, step: int, given: Any) -> None:
    """The reverse of `_pack`."""
    views, columns, r = given.shape
    for v in range(views):
        for e in range(columns):
            for a in range(r):
                given[v, e, a] = packed[a // WIDTH, e, v * step + a % WIDTH]


@compiled()
def _turn(x: Any, begin: int, rows: int, turned: Any) -> None:
    """Rows of (n, c) as (c, ROWS), with zeros behind."""
    for e in range(x.shape[1]):
        for i in range(ROWS):
            turned[e, i] = x[begin + i, e] if i < rows else 0


@compiled()
def _turn_back(turned: Any, begin: int, rows: int, x: Any) -> None:
    """The reverse of `_turn`, and zeros in place of what was there."""
    for e in range(x.shape[1]):
        for i in range(rows):
            x[begin + i, e] = turned[e, i]
        turned[e] = 0


@compiled()
def _four(x: Any, i: int) -> Any:
    return x[i], x[i + 1], x[i + 2], x[i + 3]


@compiled()
def _get_in(x: Any, i: int, four: Any) -> None:
    x[i] += four[0]
    x[i + 1] += four[1]
    x[i + 2] += four[2]
    x[i + 3] += four[3]


@compiled()
def _read_few(sums: Any, f: Any, shares: Any, e: int, i: int, product: Any) -> Any:
    """Numerators of four rows in column e from the sums (m 2 WIDTH,) of it, and a part of all monomials, f."""
    views = shares.shape[0]
    if views == 2:
        return _contract_two(sums, f, _four(shares[0, e], i), _four(shares[1, e], i))
    x = f[: FEW * WIDTH]
    for v in range(views - 1):
        of_keys = f[(1 + v) * SLOT : (1 + v) * SLOT + FEW * WIDTH]
        _multiply(sums[2 * v * WIDTH : 2 * (v + 1) * WIDTH], of_keys, _four(shares[v, e], i), x, product)
        x = product
    last = views - 1
    of_keys = f[views * SLOT : views * SLOT + FEW * WIDTH]
    return _contract(sums[2 * last * WIDTH :], of_keys, _four(shares[last, e], i), x)


@compiled(leaf=False)
def read(q: Any, k: Any, z: Any, w: Any, runs: Any, total: Any, lost: Any, out: Any) -> None:
    """Numerators (P, n, c) of rows that see the sums and all rows up to their own; sums (P, m, c, r) then hold all rows."""
    problems, views, _, columns = z.shape
    blocks = w.shape[0] // WIDTH
    phi, ones, product = _room(w.shape[0], w), _room(w.shape[0], w), _room(FEW * WIDTH, w)
    ones[:] = 1
    monomials = _room(blocks * (1 + views) * SLOT, w).reshape((blocks, (1 + views) * SLOT))
    sums = _room(blocks * columns * views * 2 * WIDTH, w).reshape((blocks, columns, views * 2 * WIDTH))
    rests = _room(blocks * columns * views * WIDTH, w).reshape((blocks, columns, views * WIDTH))
    shares, found = np.zeros((views, columns, ROWS), w.dtype), np.zeros((columns, ROWS), w.dtype)
    for p in range(problems):
        _pack(total[p], 2 * WIDTH, sums)
        _pack(lost[p], WIDTH, rests)
        _read(q[p], k[p], z[p], w, runs, ones, phi, monomials, sums, rests, shares, found, product, out[p])
        _unpack(sums, 2 * WIDTH, total[p])
        _unpack(rests, WIDTH, lost[p])


@compiled()
def _read(
    q: Any, k: Any, z: Any, w: Any, runs: Any, ones: Any, phi: Any, monomials: Any, sums: Any, rests: Any, shares: Any,
    found: Any, product: Any, out: Any,
) -> None:  # fmt: skip
    """`read` for one problem, with room for all that it needs."""
    views, n, columns = z.shape
    for begin in range(0, n, ROWS):
        rows = min(ROWS, n - begin)
        _features(q[begin : begin + rows], runs, w, phi, 0, monomials)
        for v in range(views):
            _features(k[v, begin : begin + rows], runs, ones, phi, 1 + v, monomials)
            _turn(z[v], begin, rows, shares[v])
        for block in range(w.shape[0] // WIDTH):
            for left in range(0, columns, COLUMNS):
                for i in range(0, rows, FEW):
                    f = monomials[block, i * WIDTH :]
                    for e in range(left, min(left + COLUMNS, columns)):
                        _get_in(found[e], i, _read_few(sums[block, e], f, shares, e, i, product))
                for e in range(left, min(left + COLUMNS, columns)):
                    _join_views(sums[block, e], rests[block, e])
        _turn_back(found, begin, rows, out)


@compiled(FAST)
def _add(s: Any, f: Any, z: Any, before: Any) -> None:
    """The monomials f of four rows join the part of the sums s; `before` gets the sums without them."""
    for a in range(WIDTH):
        t0, t1, t2, t3 = z[0] * f[a], z[1] * f[WIDTH + a], z[2] * f[2 * WIDTH + a], z[3] * f[3 * WIDTH + a]
        part = s[WIDTH + a]
        before[a] = s[a] + part
        s[WIDTH + a] = part + ((t0 + t1) + (t2 + t3))


@compiled()
def _add_few(sums: Any, f: Any, shares: Any, e: int, i: int, before: Any) -> None:
    """`_add` for all views, in column e of which are the sums (m 2 WIDTH,); `before` is (m WIDTH,)."""
    for v in range(shares.shape[0]):
        own, low = (1 + v) * SLOT, v * WIDTH
        few = f[own : own + FEW * WIDTH]
        _add(sums[2 * low : 2 * (low + WIDTH)], few, _four(shares[v, e], i), before[low : low + WIDTH])


@compiled(FAST)
def _run(before: Any, f: Any, z: Any, y: Any) -> None:
    """The sums S_i of four rows, from those before them."""
    for a in range(WIDTH):
        s0 = before[a] + z[0] * f[a]
        s1 = s0 + z[1] * f[WIDTH + a]
        s2 = s1 + z[2] * f[2 * WIDTH + a]
        y[a] = s0
        y[WIDTH + a] = s1
        y[2 * WIDTH + a] = s2
        y[3 * WIDTH + a] = s2 + z[3] * f[3 * WIDTH + a]


@compiled(FAST)
def _times(x: Any, y: Any) -> None:
    """Four rows x get x ∘ y."""
    for a in range(FEW * WIDTH):
        x[a] *= y[a]


@compiled(FAST)
def _slope(g: Any, x: Any, y: Any, slopes: Any) -> None:
    """Slopes of four rows get g x ∘ y."""
    for a in range(WIDTH):
        slopes[a] += g[0] * (x[a] * y[a])
        slopes[WIDTH + a] += g[1] * (x[WIDTH + a] * y[WIDTH + a])
        slopes[2 * WIDTH + a] += g[2] * (x[2 * WIDTH + a] * y[2 * WIDTH + a])
        slopes[3 * WIDTH + a] += g[3] * (x[3 * WIDTH + a] * y[3 * WIDTH + a])


@compiled(FAST)
def _behind(s: Any, g: Any, q: Any, others: Any, f: Any, z: Any, slopes: Any) -> Any:
    """With G_i the sums of g q ∘ others over the rows from i on, of which s has those behind four rows: slopes get z G, and back
    comes Σ f ∘ G.
    """
    n0 = n1 = n2 = n3 = s.dtype.type(0)
    for a in range(WIDTH):
        t0 = g[0] * q[a] * others[a]
        t1 = g[1] * q[WIDTH + a] * others[WIDTH + a]
        t2 = g[2] * q[2 * WIDTH + a] * others[2 * WIDTH + a]
        t3 = g[3] * q[3 * WIDTH + a] * others[3 * WIDTH + a]
        part = s[WIDTH + a]
        s3 = s[a] + part + t3
        s2 = s3 + t2
        s1 = s2 + t1
        s0 = s1 + t0
        slopes[a] += z[0] * s0
        slopes[WIDTH + a] += z[1] * s1
        slopes[2 * WIDTH + a] += z[2] * s2
        slopes[3 * WIDTH + a] += z[3] * s3
        n0 += f[a] * s0
        n1 += f[WIDTH + a] * s1
        n2 += f[2 * WIDTH + a] * s2
        n3 += f[3 * WIDTH + a] * s3
        s[WIDTH + a] = part + ((t0 + t1) + (t2 + t3))
    return n0, n1, n2, n3


@compiled()
def _others(own: int, running: Any, product: Any) -> None:
    """The product (FEW * WIDTH,) of the running sums of all views but one (m, FEW * WIDTH)."""
    product[:] = 1
    for v in range(running.shape[0]):
        if v != own:
            _times(product, running[v])


@compiled(FAST)
def _behind_two(before: Any, s: Any, f: Any, g: Any, y: Any, z: Any, slopes: Any) -> Any:
    """`_run`, `_slope` and `_behind` in one for two views with shares y and z; f and slopes have all three slots."""
    n0 = n1 = n2 = n3 = m0 = m1 = m2 = m3 = s.dtype.type(0)
    for a in range(WIDTH):
        j0, j1 = f[SLOT + a], f[SLOT + WIDTH + a]
        j2, j3 = f[SLOT + 2 * WIDTH + a], f[SLOT + 3 * WIDTH + a]
        k0, k1 = f[2 * SLOT + a], f[2 * SLOT + WIDTH + a]
        k2, k3 = f[2 * SLOT + 2 * WIDTH + a], f[2 * SLOT + 3 * WIDTH + a]
        s0, v0 = before[a] + y[0] * j0, before[WIDTH + a] + z[0] * k0
        s1, v1 = s0 + y[1] * j1, v0 + z[1] * k1
        s2, v2 = s1 + y[2] * j2, v1 + z[2] * k2
        s3, v3 = s2 + y[3] * j3, v2 + z[3] * k3
        slopes[a] += g[0] * (s0 * v0)
        slopes[WIDTH + a] += g[1] * (s1 * v1)
        slopes[2 * WIDTH + a] += g[2] * (s2 * v2)
        slopes[3 * WIDTH + a] += g[3] * (s3 * v3)
        q0, q1, q2, q3 = g[0] * f[a], g[1] * f[WIDTH + a], g[2] * f[2 * WIDTH + a], g[3] * f[3 * WIDTH + a]
        t0, t1, t2, t3 = q0 * v0, q1 * v1, q2 * v2, q3 * v3
        u0, u1, u2, u3 = q0 * s0, q1 * s1, q2 * s2, q3 * s3
        t_part, u_part = s[WIDTH + a], s[3 * WIDTH + a]
        s3, v3 = s[a] + t_part + t3, s[2 * WIDTH + a] + u_part + u3
        s2, v2 = s3 + t2, v3 + u2
        s1, v1 = s2 + t1, v2 + u1
        s0, v0 = s1 + t0, v1 + u0
        slopes[SLOT + a] += y[0] * s0
        slopes[SLOT + WIDTH + a] += y[1] * s1
        slopes[SLOT + 2 * WIDTH + a] += y[2] * s2
        slopes[SLOT + 3 * WIDTH + a] += y[3] * s3
        slopes[2 * SLOT + a] += z[0] * v0
        slopes[2 * SLOT + WIDTH + a] += z[1] * v1
        slopes[2 * SLOT + 2 * WIDTH + a] += z[2] * v2
        slopes[2 * SLOT + 3 * WIDTH + a] += z[3] * v3
        n0 += j0 * s0
        n1 += j1 * s1
        n2 += j2 * s2
        n3 += j3 * s3
        m0 += k0 * v0
        m1 += k1 * v1
        m2 += k2 * v2
        m3 += k3 * v3
        s[WIDTH + a] = t_part + ((t0 + t1) + (t2 + t3))
        s[3 * WIDTH + a] = u_part + ((u0 + u1) + (u2 + u3))
    return (n0, n1, n2, n3), (m0, m1, m2, m3)


@compiled()
def _pull_few(
    before: Any, after: Any, f: Any, slope: Any, shares: Any, e: int, i: int, slopes: Any, of_shares: Any, running: Any,
    product: Any,
) -> None:  # fmt: skip
    """Gradients of four rows through column e: slopes of their monomials f, and of their shares.

    `before` (m WIDTH,) are the sums before these rows, `after` (m 2 WIDTH,) those of the gradients behind them.
    """
    views = shares.shape[0]
    if views == 2:
        both = _behind_two(before, after, f, slope, _four(shares[0, e], i), _four(shares[1, e], i), slopes)
        _get_in(of_shares[0, e], i, both[0])
        _get_in(of_shares[1, e], i, both[1])
        return
    few = FEW * WIDTH
    for v in range(views):
        own = (1 + v) * SLOT
        _run(before[v * WIDTH : (v + 1) * WIDTH], f[own : own + few], _four(shares[v, e], i), running[v])
    for v in range(views):
        own = (1 + v) * SLOT
        _others(v, running, product)
        if v == 0:
            _slope(slope, product, running[0], slopes[:few])
        four = _behind(
            after[2 * v * WIDTH : 2 * (v + 1) * WIDTH], slope, f[:few], product, f[own : own + few],
            _four(shares[v, e], i), slopes[own : own + few],
        )  # fmt: skip
        _get_in(of_shares[v, e], i, four)


@compiled(leaf=False)
def pull(
    q: Any, k: Any, z: Any, g: Any, w: Any, runs: Any, total: Any, behind: Any, missed: Any, dq: Any, dk: Any, dz: Any
) -> None:
    """Gradients of q, k and z from those of the numerators, g (P, n, c); `total` are the sums before these rows.

    `behind` (P, m, c, r) are the sums of the gradients behind these rows, with what rounding took, `missed`; then also of them.
    """
    problems, views, n, columns = z.shape
    dim, blocks, chunks = q.shape[2], w.shape[0] // WIDTH, (n + ROWS - 1) // ROWS
    phi, ones, product = _room(w.shape[0], w), _room(w.shape[0], w), _room(FEW * WIDTH, w)
    ones[:] = 1
    monomials = _room(blocks * (1 + views) * SLOT, w).reshape((blocks, (1 + views) * SLOT))
    slopes = _room(blocks * (1 + views) * SLOT, w).reshape((blocks, (1 + views) * SLOT))
    sums = _room(blocks * columns * views * 2 * WIDTH, w).reshape((blocks, columns, views * 2 * WIDTH))
    after = _room(blocks * columns * views * 2 * WIDTH, w).reshape((blocks, columns, views * 2 * WIDTH))
    rests = _room(blocks * columns * views * WIDTH, w).reshape((blocks, columns, views * WIDTH))
    starts = _room(chunks * blocks * columns * views * WIDTH, w).reshape((chunks, blocks, columns, views * WIDTH))
    befores = _room(ROWS // FEW * COLUMNS * views * WIDTH, w).reshape((ROWS // FEW, COLUMNS, views * WIDTH))
    running = _room(COLUMNS * views * 2 * WIDTH, w).reshape((COLUMNS, views * 2 * WIDTH))
    of_views = _room(views * FEW * WIDTH, w).reshape((views, FEW * WIDTH))
    turned, of_turned = _room(w.shape[0] * ROWS, w).reshape((-1, ROWS)), _room(w.shape[0] * ROWS, w).reshape((-1, ROWS))
    x, dx, found = np.zeros((dim, ROWS), w.dtype), np.zeros((dim, ROWS), w.dtype), np.zeros(ROWS, w.dtype)
    shares, of_shares = np.zeros((views, columns, ROWS), w.dtype), np.zeros((views, columns, ROWS), w.dtype)
    given = np.zeros((columns, ROWS), w.dtype)
    for p in range(problems):
        sums[:] = 0
        rests[:] = 0
        _pack(total[p], 2 * WIDTH, sums)
        _sum_up(k[p], z[p], runs, ones, phi, monomials, sums, rests, shares, starts)
        rests[:] = 0
        _pack(behind[p], 2 * WIDTH, after)
        _pack(missed[p], WIDTH, rests)
        _pull(
            q[p], k[p], z[p], g[p], w, runs, ones, phi, monomials, slopes, after, rests, starts, running, befores, of_views,
            product, turned, of_turned, x, dx, found, shares, of_shares, given, dq[p], dk[p], dz[p],
        )  # fmt: skip
        _unpack(after, 2 * WIDTH, behind[p])
        _unpack(rests, WIDTH, missed[p])


@compiled(FAST)
def _add_eight(part: Any, f: Any, z: Any) -> None:
    """The monomials f of eight rows join the part of a sum."""
    for a in range(WIDTH):
        t0, t1, t2, t3 = z[0] * f[a], z[1] * f[WIDTH + a], z[2] * f[2 * WIDTH + a], z[3] * f[3 * WIDTH + a]
        t4, t5, t6 = z[4] * f[4 * WIDTH + a], z[5] * f[5 * WIDTH + a], z[6] * f[6 * WIDTH + a]
        part[a] += ((t0 + t1) + (t2 + t3)) + ((t4 + t5) + (t6 + z[7] * f[7 * WIDTH + a]))


@compiled()
def _sum_up(
    k: Any, z: Any, runs: Any, ones: Any, phi: Any, monomials: Any, sums: Any, rests: Any, shares: Any, starts: Any
) -> None:
    """The sums before every chunk of `ROWS` rows into `starts`, for one problem."""
    views, _, columns = z.shape
    for chunk in range(starts.shape[0]):
        last, begin = chunk == starts.shape[0] - 1, chunk * ROWS
        for v in range(0 if last else views):
            _features(k[v, begin : begin + ROWS], runs, ones, phi, 1 + v, monomials)
            _turn(z[v], begin, ROWS, shares[v])
        for block in range(sums.shape[0]):
            for left in range(0, columns, COLUMNS):
                right = min(left + COLUMNS, columns)
                for e in range(left, right):
                    for low in range(0, views * WIDTH, WIDTH):
                        _start(sums[block, e, 2 * low : 2 * low + WIDTH], starts[chunk, block, e, low : low + WIDTH])
                if last:
                    continue
                for v in range(views):
                    part, own = (2 * v + 1) * WIDTH, (1 + v) * SLOT
                    for i in range(0, ROWS, 8):
                        f = monomials[block, own + i * WIDTH : own + (i + 8) * WIDTH]
                        for e in range(left, right):
                            eight = _four(shares[v, e], i) + _four(shares[v, e], i + 4)
                            _add_eight(sums[block, e, part : part + WIDTH], f, eight)
                for e in range(left, right):
                    _join_views(sums[block, e], rests[block, e])


@compiled()
def _start(s: Any, kept: Any) -> None:
    for a in range(WIDTH):
        kept[a] = s[a]


@compiled()
def _begin(kept: Any, s: Any) -> None:
    for a in range(WIDTH):
        s[a] = kept[a]
        s[WIDTH + a] = 0


@compiled()
def _pull(
    q: Any, k: Any, z: Any, g: Any, w: Any, runs: Any, ones: Any, phi: Any, monomials: Any, slopes: Any, after: Any,
    rests: Any, starts: Any, running: Any, befores: Any, of_views: Any, product: Any, turned: Any, of_turned: Any, x: Any,
    dx: Any, found: Any, shares: Any, of_shares: Any, given: Any, dq: Any, dk: Any, dz: Any,
) -> None:  # fmt: skip
    """`pull` for one problem, chunk by chunk from the last, with room for all that it needs."""
    views, n, columns = z.shape
    for chunk in range(starts.shape[0] - 1, -1, -1):
        begin = chunk * ROWS
        rows = min(ROWS, n - begin)
        _turn(g, begin, rows, given)
        _features(q[begin : begin + rows], runs, w, phi, 0, monomials)
        for v in range(views):
            _features(k[v, begin : begin + rows], runs, ones, phi, 1 + v, monomials)
            _turn(z[v], begin, rows, shares[v])
        slopes[:] = 0
        for block in range(after.shape[0]):
            for left in range(0, columns, COLUMNS):
                right = min(left + COLUMNS, columns)
                for e in range(left, right):
                    for low in range(0, views * WIDTH, WIDTH):
                        kept = starts[chunk, block, e, low : low + WIDTH]
                        _begin(kept, running[e - left, 2 * low : 2 * (low + WIDTH)])
                for i in range(0, rows, FEW):
                    f = monomials[block, i * WIDTH :]
                    for e in range(left, right):
                        _add_few(running[e - left], f, shares, e, i, befores[i // FEW, e - left])
                for i in range((rows - 1) // FEW * FEW, -1, -FEW):
                    f, of_f = monomials[block, i * WIDTH :], slopes[block, i * WIDTH :]
                    for e in range(left, right):
                        _pull_few(
                            befores[i // FEW, e - left], after[block, e], f, _four(given[e], i), shares, e, i, of_f,
                            of_shares, of_views, product,
                        )  # fmt: skip
                for e in range(left, right):
                    _join_views(after[block, e], rests[block, e])
        _turn(q, begin, rows, x)
        _pull_features(x, runs, w, turned, of_turned, 0, slopes, dx, found)
        _turn_back(dx, begin, rows, dq)
        for v in range(views):
            _turn(k[v], begin, rows, x)
            _pull_features(x, runs, ones, turned, of_turned, 1 + v, slopes, dx, found)
            _turn_back(dx, begin, rows, dk[v])
            _turn_back(of_shares[v], begin, rows, dz[v])
