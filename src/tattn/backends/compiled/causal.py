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

ROWS = 32
# The loops below are written for four rows.
FEW = 4
WIDTH = 128
FAST = {"reassoc", "contract"}
# Bytes: whole vectors are read faster where they do not cross a line of the cache.
_LINE = 64


@compiled()
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
    """Monomials of rows (rows, d) times w (R,) into a slot of (R / WIDTH, slots, ROWS * WIDTH); phi (R,) is room for a row."""
    for i in range(x.shape[0]):
        phi[0] = 1
        for run in range(runs.shape[0]):
            channel, start, stop, source = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
            _scale(x[i, channel], phi[source : source + stop - start], phi[start:stop])
        for block in range(blocks.shape[0]):
            low, target = block * WIDTH, blocks[block, slot]
            _copy(w[low : low + WIDTH], phi[low : low + WIDTH], target[i * WIDTH : (i + 1) * WIDTH])


@compiled(FAST)
def _pull_run(factor: Any, slopes: Any, phi: Any, back: Any) -> Any:
    found = back.dtype.type(0)
    for a in range(slopes.shape[0]):
        found += slopes[a] * phi[a]
        back[a] += factor * slopes[a]
    return found


@compiled(FAST)
def _pull_features(x: Any, runs: Any, w: Any, phi: Any, slopes: Any, slot: int, blocks: Any, dx: Any) -> None:
    """Gradients of rows (rows, d) from w times those of their monomials in a slot of blocks."""
    for i in range(x.shape[0]):
        phi[0] = 1
        for run in range(runs.shape[0]):
            channel, start, stop, source = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
            _scale(x[i, channel], phi[source : source + stop - start], phi[start:stop])
        for block in range(blocks.shape[0]):
            low, given = block * WIDTH, blocks[block, slot]
            _copy(w[low : low + WIDTH], given[i * WIDTH : (i + 1) * WIDTH], slopes[low : low + WIDTH])
        dx[i] = 0
        for run in range(runs.shape[0] - 1, -1, -1):
            channel, start, stop, source = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
            end = source + stop - start
            dx[i, channel] += _pull_run(x[i, channel], slopes[start:stop], phi[source:end], slopes[source:end])


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
def _join_all(sums: Any, lost: Any) -> None:
    blocks, columns, views, _ = sums.shape
    for block in range(blocks):
        for e in range(columns):
            for v in range(views):
                _join(sums[block, e, v], lost[block, e, v])


@compiled()
def _pack(given: Any, packed: Any) -> None:
    """Sums (m, c, r) into the first `WIDTH` of each (blocks, c, m, ·)."""
    views, columns, r = given.shape
    for v in range(views):
        for e in range(columns):
            for a in range(r):
                packed[a // WIDTH, e, v, a % WIDTH] = given[v, e, a]


@compiled()
def _unpack(packed: Any, given: Any) -> None:
    """The reverse of `_pack`."""
    views, columns, r = given.shape
    for v in range(views):
        for e in range(columns):
            for a in range(r):
                given[v, e, a] = packed[a // WIDTH, e, v, a % WIDTH]


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
def read(q: Any, k: Any, z: Any, w: Any, runs: Any, total: Any, lost: Any, out: Any) -> None:
    """Numerators (P, n, c) of rows that see the sums and all rows up to their own; sums (P, m, c, r) then hold all rows."""
    problems, views, n, columns = z.shape
    blocks = w.shape[0] // WIDTH
    phi, ones = _room(w.shape[0], w), _room(w.shape[0], w)
    ones[:] = 1
    monomials = _room(blocks * (1 + views) * ROWS * WIDTH, w).reshape((blocks, 1 + views, ROWS * WIDTH))
    sums = _room(blocks * columns * views * 2 * WIDTH, w).reshape((blocks, columns, views, 2 * WIDTH))
    rests = _room(blocks * columns * views * WIDTH, w).reshape((blocks, columns, views, WIDTH))
    product = _room(FEW * WIDTH, w)
    shares, found = np.zeros((views, columns, ROWS), w.dtype), np.zeros((columns, ROWS), w.dtype)
    for p in range(problems):
        _pack(total[p], sums)
        _pack(lost[p], rests)
        for begin in range(0, n, ROWS):
            rows = min(ROWS, n - begin)
            _features(q[p, begin : begin + rows], runs, w, phi, 0, monomials)
            for v in range(views):
                _features(k[p, v, begin : begin + rows], runs, ones, phi, 1 + v, monomials)
                _turn(z[p, v], begin, rows, shares[v])
            for block in range(blocks):
                for i in range(0, rows, FEW):
                    here = slice(i * WIDTH, (i + FEW) * WIDTH)
                    of_query = monomials[block, 0][here]
                    for e in range(columns):
                        x = of_query
                        for v in range(views - 1):
                            of_keys = monomials[block, 1 + v][here]
                            _multiply(sums[block, e, v], of_keys, _four(shares[v, e], i), x, product)
                            x = product
                        of_keys = monomials[block, views][here]
                        last = views - 1
                        four = _contract(sums[block, e, last], of_keys, _four(shares[last, e], i), x)
                        found[e, i] += four[0]
                        found[e, i + 1] += four[1]
                        found[e, i + 2] += four[2]
                        found[e, i + 3] += four[3]
            _turn_back(found, begin, rows, out[p])
            _join_all(sums, rests)
        _unpack(sums, total[p])
        _unpack(rests, lost[p])


@compiled(FAST)
def _add(s: Any, f: Any, z: Any, before: Any) -> None:
    """The monomials f of four rows join the part of the sums s; `before` gets the sums without them."""
    for a in range(WIDTH):
        t0, t1, t2, t3 = z[0] * f[a], z[1] * f[WIDTH + a], z[2] * f[2 * WIDTH + a], z[3] * f[3 * WIDTH + a]
        part = s[WIDTH + a]
        before[a] = s[a] + part
        s[WIDTH + a] = part + ((t0 + t1) + (t2 + t3))


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


@compiled()
def pull(
    q: Any, k: Any, z: Any, g: Any, w: Any, runs: Any, total: Any, behind: Any, missed: Any, dq: Any, dk: Any, dz: Any
) -> None:
    """Gradients of q, k and z from those of the numerators, g (P, n, c); `total` are the sums before these rows.

    `behind` (P, m, c, r) are the sums of the gradients behind these rows, with what rounding took, `missed`; then also of them.
    """
    problems, views, n, columns = z.shape
    blocks = w.shape[0] // WIDTH
    chunks = (n + ROWS - 1) // ROWS
    phi, slopes, ones = _room(w.shape[0], w), _room(w.shape[0], w), _room(w.shape[0], w)
    ones[:] = 1
    monomials = _room(blocks * (1 + views) * ROWS * WIDTH, w).reshape((blocks, 1 + views, ROWS * WIDTH))
    of_monomials = _room(blocks * (1 + views) * ROWS * WIDTH, w).reshape((blocks, 1 + views, ROWS * WIDTH))
    size = blocks * columns * views
    sums = _room(size * 2 * WIDTH, w).reshape((blocks, columns, views, 2 * WIDTH))
    after = _room(size * 2 * WIDTH, w).reshape((blocks, columns, views, 2 * WIDTH))
    rests = _room(size * WIDTH, w).reshape((blocks, columns, views, WIDTH))
    starts = _room(chunks * size * WIDTH, w).reshape((chunks, blocks, columns, views, WIDTH))
    befores = _room(ROWS // FEW * columns * views * WIDTH, w).reshape((ROWS // FEW, columns, views, WIDTH))
    running = _room(views * FEW * WIDTH, w).reshape((views, FEW * WIDTH))
    product = _room(FEW * WIDTH, w)
    shares, of_shares = np.zeros((views, columns, ROWS), w.dtype), np.zeros((views, columns, ROWS), w.dtype)
    given = np.zeros((columns, ROWS), w.dtype)
    for p in range(problems):
        sums[:] = 0
        rests[:] = 0
        _pack(total[p], sums)
        for chunk in range(chunks):
            starts[chunk] = sums[:, :, :, :WIDTH]
            if chunk == chunks - 1:
                break
            begin = chunk * ROWS
            for v in range(views):
                _features(k[p, v, begin : begin + ROWS], runs, ones, phi, 1 + v, monomials)
                _turn(z[p, v], begin, ROWS, shares[v])
                for block in range(blocks):
                    for i in range(0, ROWS, FEW):
                        of_keys = monomials[block, 1 + v][i * WIDTH : (i + FEW) * WIDTH]
                        for e in range(columns):
                            _add(sums[block, e, v], of_keys, _four(shares[v, e], i), product[:WIDTH])
            _join_all(sums, rests)
        _pack(behind[p], after)
        _pack(missed[p], rests)
        for chunk in range(chunks - 1, -1, -1):
            begin = chunk * ROWS
            rows = min(ROWS, n - begin)
            _turn(g[p], begin, rows, given)
            _features(q[p, begin : begin + rows], runs, w, phi, 0, monomials)
            for v in range(views):
                _features(k[p, v, begin : begin + rows], runs, ones, phi, 1 + v, monomials)
                _turn(z[p, v], begin, rows, shares[v])
            of_monomials[:] = 0
            for block in range(blocks):
                here = sums[block]
                for e in range(columns):
                    for v in range(views):
                        here[e, v, :WIDTH] = starts[chunk, block, e, v]
                        here[e, v, WIDTH:] = 0
                for i in range(0, rows, FEW):
                    few = slice(i * WIDTH, (i + FEW) * WIDTH)
                    for v in range(views):
                        of_keys = monomials[block, 1 + v][few]
                        for e in range(columns):
                            _add(here[e, v], of_keys, _four(shares[v, e], i), befores[i // FEW, e, v])
                for i in range((rows - 1) // FEW * FEW, -1, -FEW):
                    few = slice(i * WIDTH, (i + FEW) * WIDTH)
                    of_query = monomials[block, 0][few]
                    for e in range(columns):
                        slope = _four(given[e], i)
                        for v in range(views):
                            of_keys = monomials[block, 1 + v][few]
                            _run(befores[i // FEW, e, v], of_keys, _four(shares[v, e], i), running[v])
                        for v in range(views):
                            others = product
                            if views == 2:
                                others = running[1 - v]
                            else:
                                _others(v, running, product)
                            if v == 0:
                                _slope(slope, others, running[0], of_monomials[block, 0][few])
                            four = _behind(
                                after[block, e, v], slope, of_query, others, monomials[block, 1 + v][few],
                                _four(shares[v, e], i), of_monomials[block, 1 + v][few],
                            )  # fmt: skip
                            of_shares[v, e, i] += four[0]
                            of_shares[v, e, i + 1] += four[1]
                            of_shares[v, e, i + 2] += four[2]
                            of_shares[v, e, i + 3] += four[3]
            _join_all(after, rests)
            _pull_features(
                q[p, begin : begin + rows], runs, w, phi, slopes, 0, of_monomials, dq[p, begin : begin + rows]
            )
            for v in range(views):
                own = slice(begin, begin + rows)
                _pull_features(k[p, v, own], runs, ones, phi, slopes, 1 + v, of_monomials, dk[p, v, own])
                _turn_back(of_shares[v], begin, rows, dz[p, v])
        _unpack(after, behind[p])
        _unpack(rests, missed[p])
