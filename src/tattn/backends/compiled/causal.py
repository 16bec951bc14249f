"""Loops over the rows of causal attention, compiled: a block of rows of `engines.causal_features`, forward and adjoint.

Symbols, for each of P problems: q (n, d) and k (m, n, d) in units, z = [v, 1] times shares (m, n, c), g = ĝ (n, c); weights w (R,)
with zeros behind, and `runs` (count, 4) of `features.monomials.Run`. Sums, and what rounding took from them, are (m, c, r).
All arrays are contiguous, and of one dtype.

The rows of a problem are one or more documents, which see nothing of each other: `begins` and `counts` (D,) say where each stands,
and q, k and z are those given times `units` (P, D, m + 1, d) and `parts` (D, m) of the documents. Sums before and behind the rows
are (P, m, c, r), or (0, m, c, r) if there are none: then each document begins with zeros.

Channels are complex where `half` is the number of complex monomials, and not None: numba compiles either kind when it is asked
for. Then `runs` are those of `features.complex_channels.Pairs`, and the monomials are that many real parts and as many imaginary
ones. A product of monomials Φ(q), w times conjugate, and sums S, T is their complex one, of which the real part counts:

    n = Re Φ(q) Re S T + Im Φ(q) Im S T.

Monomials are taken `WIDTH` at a time and rows `FEW` at a time. With S the sums before these,

    S_i = S + the products z Φ(k) of these rows up to i,

one after the other. What is added to the sums is added up apart for `ROWS` rows, and then joins them with Kahan's compensation;
until then each row adds what is there to S for itself. So a chain has at most ROWS + 1 terms. A read-out has `WIDTH` terms in any
order, and then one for every `WIDTH` monomials. Nothing is ever subtracted.

Where keys decay, by λ (m,) from row to row, sums T are those that row c = step / 2 of the next `step` rows takes of what is before
these, and z of row j of them is multiplied by λ^(c − j), and what row i reads by λ^(i − c):

    S_i = λ^(i − c) (T + the products λ^(c − j) z Φ(k) of these rows up to i).

Behind them T is multiplied by λ^step, with compensation. Steps are as short as it takes for all these powers to stay far from the
ends of the dtype. The gradient of log λ is the sum over pairs (i, j) of what they give times i − j: of every step, for rows counted
in it, a_i = g_i n_i, b_j = z_j dz_j and the sums T' behind it,

    Σ i a_i − Σ j b_j + step ⟨dT', T'⟩.

Behind the last row l of all are sums as this has them. There Σ a_i + ⟨dT', T'⟩ = Σ b_j + ⟨dT, T⟩ gives

    Σ (i − l) a_i − Σ (j − l) b_j + l ⟨dT, T⟩.

A compiler vectorizes loops of constant length over few arrays, whose parts are at constant places: so arrays are cut to one
dimension, with `WIDTH` from one part to the next. It may reorder sums and fuse products with additions (`FAST`), but not where
sums are compensated. Real monomials of two views, the usual case, are taken in vectors (`lanes`): such loops go from column to
column with what all columns share in registers, and are bounded by what they read and write, which this is least of.
"""

from __future__ import annotations

from math import expm1, log
from typing import Any

import numpy as np

# The loops below are written for four rows at a time.
from ..operations import FEW, ROWS
from .jit import compiled, fused
from .lanes import add_totals, lanes, load, plus, spread, store, times

WIDTH = 128
# Complex monomials in as many numbers.
HALF = WIDTH // 2
# Rows that are turned to columns at once.
STEP = 16
# Rows whose complex monomials are made side by side.
LANES = 32
# Columns of the values whose sums are gone over for one few rows after another: they stay in the first cache.
COLUMNS = 16
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
def _multiply_lanes(factor: Any, source: Any, target: Any) -> None:
    """Complex numbers (2 LANES,), real parts and imaginary ones, times each of (count, 2 LANES)."""
    for low in range(0, source.shape[0], 2 * LANES):
        s, t = source[low : low + 2 * LANES], target[low : low + 2 * LANES]
        for i in range(LANES):
            t[i] = factor[i] * s[i] - factor[LANES + i] * s[LANES + i]
            t[LANES + i] = factor[i] * s[LANES + i] + factor[LANES + i] * s[i]


@compiled(FAST)
def _copy_lanes(w: Any, given: Any, rows: int, target: Any) -> None:
    """Weights (WIDTH,) times real and imaginary parts of complex monomials of `LANES` rows, (HALF, 2 LANES) → (rows, WIDTH)."""
    for low in range(0, HALF, 16):
        of_re, of_im = w[low : low + 16], w[HALF + low : HALF + low + 16]
        for i in range(rows):
            source = given[2 * LANES * low + i : 2 * LANES * (low + 16)]
            re = target[i * WIDTH + low : i * WIDTH + low + 16]
            im = target[i * WIDTH + HALF + low : i * WIDTH + HALF + low + 16]
            for a in range(16):
                re[a] = of_re[a] * source[2 * LANES * a]
                im[a] = of_im[a] * source[2 * LANES * a + LANES]


@compiled(FAST)
def _complex_features(x: Any, runs: Any, w: Any, phi: Any, slot: int, blocks: Any) -> None:
    """`_features` of complex rows, whose channels and monomials phi has room for, ((d + R / 2) 2 LANES,)."""
    dim, half = x.shape[1], x.shape[1] // 2
    channels, monomials = phi[: dim * 2 * LANES], phi[dim * 2 * LANES :]
    for begin in range(0, x.shape[0], LANES):
        rows = min(LANES, x.shape[0] - begin)
        for c in range(half):
            # A channel, and its conjugate.
            own, other = c * 2 * LANES, (half + c) * 2 * LANES
            for i in range(rows):
                re, im = x[begin + i, c], x[begin + i, half + c]
                channels[own + i], channels[own + LANES + i] = re, im
                channels[other + i], channels[other + LANES + i] = re, -im
        monomials[:LANES] = 1
        for run in range(runs.shape[0]):
            channel, start, stop, source = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
            _multiply_lanes(
                channels[channel * 2 * LANES : (channel + 1) * 2 * LANES],
                monomials[source * 2 * LANES : (source + stop - start) * 2 * LANES],
                monomials[start * 2 * LANES : stop * 2 * LANES],
            )
        to = slot * SLOT + begin * WIDTH
        for block in range(blocks.shape[0]):
            given = monomials[block * HALF * 2 * LANES : (block + 1) * HALF * 2 * LANES]
            of_block = w[block * WIDTH : (block + 1) * WIDTH]
            _copy_lanes(of_block, given, rows, blocks[block, to : to + rows * WIDTH])


@compiled()
def _make(x: Any, runs: Any, half: Any, w: Any, phi: Any, slot: int, blocks: Any) -> None:
    """The features of either kind."""
    if half is None:
        _features(x, runs, w, phi, slot, blocks)
    else:
        _complex_features(x, runs, w, phi, slot, blocks)


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
def _turn_block(w: Any, given: Any, begin: int, end: int, turned: Any) -> None:
    """Some monomials of `ROWS` rows times w (WIDTH,), (ROWS, WIDTH) → (end − begin, ROWS), by small squares."""
    for low in range(begin, end, 16):
        for i in range(ROWS):
            part = given[i * WIDTH + low : i * WIDTH + low + 16]
            target = turned[(low - begin) * ROWS + i : (low - begin + 16) * ROWS]
            for a in range(16):
                target[a * ROWS] = w[low + a] * part[a]


@compiled(FAST)
def _pull_features(
    x: Any, runs: Any, w: Any, phi: Any, slopes: Any, slot: int, blocks: Any, dx: Any, found: Any
) -> None:
    """Gradients of rows (d, ROWS) from w times those of their monomials, in a slot of blocks.

    Room (R, ROWS) for monomials and slopes, and zeros `found` (2, ROWS).
    """
    sums = found[0]
    phi[0] = 1
    for run in range(runs.shape[0]):
        channel, start, stop, source = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
        for j in range(stop - start):
            _scale_rows(x[channel], phi[source + j], phi[start + j])
    flat = slopes.reshape(slopes.size)
    for block in range(blocks.shape[0]):
        low, given = block * WIDTH, blocks[block]
        of_block = flat[low * ROWS : (low + WIDTH) * ROWS]
        _turn_block(w[low : low + WIDTH], given[slot * SLOT : (slot + 1) * SLOT], 0, WIDTH, of_block)
    dx[:] = 0
    for run in range(runs.shape[0] - 1, -1, -1):
        channel, start, stop, source = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
        for j in range(stop - start):
            _pull_rows(x[channel], slopes[start + j], phi[source + j], slopes[source + j], sums)
            if (j + 1) % CHAIN == 0 or j + 1 == stop - start:
                for i in range(ROWS):
                    dx[channel, i] += sums[i]
                    sums[i] = 0


@compiled(FAST)
def _complex_scale_rows(re: Any, im: Any, sign: Any, source: Any, other: Any, target: Any, last: Any) -> None:
    """Complex numbers (ROWS,), or their conjugates if the sign is −1, times others."""
    for i in range(ROWS):
        y = sign * im[i]
        target[i] = re[i] * source[i] - y * other[i]
        last[i] = re[i] * other[i] + y * source[i]


@compiled(FAST)
def _complex_pull_rows(
    re: Any, im: Any, sign: Any, slope: Any, other: Any, phi: Any, psi: Any, back: Any, last: Any, found: Any
) -> None:
    """The adjoint of `_complex_scale_rows`, for real and imaginary parts each."""
    for i in range(ROWS):
        y = sign * im[i]
        found[i] += slope[i] * phi[i] + other[i] * psi[i]
        found[ROWS + i] += sign * (other[i] * phi[i] - slope[i] * psi[i])
        back[i] += re[i] * slope[i] + y * other[i]
        last[i] += re[i] * other[i] - y * slope[i]


@compiled(FAST)
def _complex_pull_features(
    x: Any, runs: Any, w: Any, phi: Any, slopes: Any, slot: int, blocks: Any, dx: Any, found: Any
) -> None:
    """`_pull_features` of complex rows: all real parts of monomials and slopes, and then all imaginary ones."""
    dim, count = x.shape[0] // 2, w.shape[0] // 2
    phi[0] = 1
    phi[count] = 0
    for run in range(runs.shape[0]):
        channel, start, stop, source = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
        c, sign = channel % dim, x.dtype.type(1 if channel < dim else -1)
        for j in range(stop - start):
            _complex_scale_rows(
                x[c], x[dim + c], sign, phi[source + j], phi[count + source + j], phi[start + j], phi[count + start + j]
            )
    flat = slopes.reshape(slopes.size)
    for block in range(blocks.shape[0]):
        low, given = block * HALF, blocks[block, slot * SLOT : (slot + 1) * SLOT]
        of_block = w[block * WIDTH : (block + 1) * WIDTH]
        _turn_block(of_block, given, 0, HALF, flat[low * ROWS : (low + HALF) * ROWS])
        _turn_block(of_block, given, HALF, WIDTH, flat[(count + low) * ROWS : (count + low + HALF) * ROWS])
    dx[:] = 0
    both = found.reshape(found.size)
    for run in range(runs.shape[0] - 1, -1, -1):
        channel, start, stop, source = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
        c, sign = channel % dim, x.dtype.type(1 if channel < dim else -1)
        for j in range(stop - start):
            at, of = start + j, source + j
            _complex_pull_rows(
                x[c], x[dim + c], sign, slopes[at], slopes[count + at], phi[of], phi[count + of], slopes[of],
                slopes[count + of], both,
            )  # fmt: skip
            if (j + 1) % (CHAIN // 2) == 0 or j + 1 == stop - start:
                for i in range(ROWS):
                    dx[c, i] += found[0, i]
                    dx[dim + c, i] += found[1, i]
                    found[0, i] = 0
                    found[1, i] = 0


@compiled()
def _pull_made(
    x: Any, runs: Any, half: Any, w: Any, phi: Any, slopes: Any, slot: int, blocks: Any, dx: Any, found: Any
) -> None:
    """The adjoint of `_make`."""
    if half is None:
        _pull_features(x, runs, w, phi, slopes, slot, blocks, dx, found)
    else:
        _complex_pull_features(x, runs, w, phi, slopes, slot, blocks, dx, found)


@compiled(inline=True)
def _ahead(z: Any, f: Any, s: Any) -> Any:
    """Sums s with the products z f of four rows, up to each of these."""
    s0 = fused(z[0], f[0], s)
    s1 = fused(z[1], f[1], s0)
    s2 = fused(z[2], f[2], s1)
    return s0, s1, s2, fused(z[3], f[3], s2)


@compiled(FAST, inline=True)
def _multiply(s: Any, f: Any, z: Any, x: Any, y: Any) -> None:
    """y_i = x_i ∘ S_i for four rows, whose monomials f join the part of the sums s (2 WIDTH,): totals and parts."""
    for a in range(WIDTH):
        four, part = (f[a], f[WIDTH + a], f[2 * WIDTH + a], f[3 * WIDTH + a]), s[WIDTH + a]
        s0, s1, s2, s3 = _ahead(z, four, s[a] + part)
        y[a] = x[a] * s0
        y[WIDTH + a] = x[WIDTH + a] * s1
        y[2 * WIDTH + a] = x[2 * WIDTH + a] * s2
        y[3 * WIDTH + a] = x[3 * WIDTH + a] * s3
        s[WIDTH + a] = _ahead(z, four, part)[3]


@compiled(FAST, inline=True)
def _complex_multiply(s: Any, f: Any, z: Any, x: Any, y: Any) -> None:
    """`_multiply` of complex numbers, of x by the conjugates of sums; parts of these row by row, as in `_complex_contract_two`."""
    for a in range(HALF):
        b = HALF + a
        t, u = s[WIDTH + a], s[WIDTH + b]
        t, u = t + z[0] * f[a], u + z[0] * f[b]
        re, im, x_re, x_im = s[a] + t, s[b] + u, x[a], x[b]
        y[a], y[b] = x_re * re + x_im * im, x_im * re - x_re * im
        t, u = t + z[1] * f[WIDTH + a], u + z[1] * f[WIDTH + b]
        re, im, x_re, x_im = s[a] + t, s[b] + u, x[WIDTH + a], x[WIDTH + b]
        y[WIDTH + a], y[WIDTH + b] = x_re * re + x_im * im, x_im * re - x_re * im
        t, u = t + z[2] * f[2 * WIDTH + a], u + z[2] * f[2 * WIDTH + b]
        re, im, x_re, x_im = s[a] + t, s[b] + u, x[2 * WIDTH + a], x[2 * WIDTH + b]
        y[2 * WIDTH + a], y[2 * WIDTH + b] = x_re * re + x_im * im, x_im * re - x_re * im
        t, u = t + z[3] * f[3 * WIDTH + a], u + z[3] * f[3 * WIDTH + b]
        re, im, x_re, x_im = s[a] + t, s[b] + u, x[3 * WIDTH + a], x[3 * WIDTH + b]
        y[3 * WIDTH + a], y[3 * WIDTH + b] = x_re * re + x_im * im, x_im * re - x_re * im
        s[WIDTH + a], s[WIDTH + b] = t, u


@compiled(FAST, inline=True)
def _contract(s: Any, f: Any, z: Any, x: Any) -> Any:
    """Σ x_i ∘ S_i over monomials for four rows, otherwise as `_multiply`."""
    n0 = n1 = n2 = n3 = s.dtype.type(0)
    for a in range(WIDTH):
        four, part = (f[a], f[WIDTH + a], f[2 * WIDTH + a], f[3 * WIDTH + a]), s[WIDTH + a]
        s0, s1, s2, s3 = _ahead(z, four, s[a] + part)
        n0 += x[a] * s0
        n1 += x[WIDTH + a] * s1
        n2 += x[2 * WIDTH + a] * s2
        n3 += x[3 * WIDTH + a] * s3
        s[WIDTH + a] = _ahead(z, four, part)[3]
    return n0, n1, n2, n3


@compiled(inline=True)
def _contract_two(s0: Any, s1: Any, f: Any, shares: Any, e: int, i: int, found: Any) -> None:
    """`_multiply` and `_contract` in one, of two views, for columns e and e + 1 or, where the sums s1 of this are None, one.

    f has all three slots. What is read of a part of all monomials joins `found` (columns, ROWS).
    """
    of_y, of_z = shares[0, e], shares[1, e]
    y0, y1, y2, y3 = spread(of_y[i]), spread(of_y[i + 1]), spread(of_y[i + 2]), spread(of_y[i + 3])
    z0, z1, z2, z3 = spread(of_z[i]), spread(of_z[i + 1]), spread(of_z[i + 2]), spread(of_z[i + 3])
    n0 = n1 = n2 = n3 = spread(s0.dtype.type(0))
    if s1 is not None:
        of_b, of_c = shares[0, e + 1], shares[1, e + 1]
        b0, b1, b2, b3 = spread(of_b[i]), spread(of_b[i + 1]), spread(of_b[i + 2]), spread(of_b[i + 3])
        c0, c1, c2, c3 = spread(of_c[i]), spread(of_c[i + 1]), spread(of_c[i + 2]), spread(of_c[i + 3])
        m0 = m1 = m2 = m3 = n0
    for a in range(0, WIDTH, lanes(f)):
        total, t, other, u = load(s0, a), load(s0, WIDTH + a), load(s0, 2 * WIDTH + a), load(s0, 3 * WIDTH + a)
        if s1 is not None:
            first, p, last, q = load(s1, a), load(s1, WIDTH + a), load(s1, 2 * WIDTH + a), load(s1, 3 * WIDTH + a)
        x, j, k = load(f, a), load(f, SLOT + a), load(f, 2 * SLOT + a)
        t, u = fused(y0, j, t), fused(z0, k, u)
        n0 = fused(times(plus(total, t), plus(other, u)), x, n0)
        if s1 is not None:
            p, q = fused(b0, j, p), fused(c0, k, q)
            m0 = fused(times(plus(first, p), plus(last, q)), x, m0)
        x, j, k = load(f, WIDTH + a), load(f, SLOT + WIDTH + a), load(f, 2 * SLOT + WIDTH + a)
        t, u = fused(y1, j, t), fused(z1, k, u)
        n1 = fused(times(plus(total, t), plus(other, u)), x, n1)
        if s1 is not None:
            p, q = fused(b1, j, p), fused(c1, k, q)
            m1 = fused(times(plus(first, p), plus(last, q)), x, m1)
        x, j, k = load(f, 2 * WIDTH + a), load(f, SLOT + 2 * WIDTH + a), load(f, 2 * SLOT + 2 * WIDTH + a)
        t, u = fused(y2, j, t), fused(z2, k, u)
        n2 = fused(times(plus(total, t), plus(other, u)), x, n2)
        if s1 is not None:
            p, q = fused(b2, j, p), fused(c2, k, q)
            m2 = fused(times(plus(first, p), plus(last, q)), x, m2)
        x, j, k = load(f, 3 * WIDTH + a), load(f, SLOT + 3 * WIDTH + a), load(f, 2 * SLOT + 3 * WIDTH + a)
        t, u = fused(y3, j, t), fused(z3, k, u)
        n3 = fused(times(plus(total, t), plus(other, u)), x, n3)
        if s1 is not None:
            p, q = fused(b3, j, p), fused(c3, k, q)
            m3 = fused(times(plus(first, p), plus(last, q)), x, m3)
        store(s0, WIDTH + a, t)
        store(s0, 3 * WIDTH + a, u)
        if s1 is not None:
            store(s1, WIDTH + a, p)
            store(s1, 3 * WIDTH + a, q)
    add_totals(found[e], i, n0, n1, n2, n3)
    if s1 is not None:
        add_totals(found[e + 1], i, m0, m1, m2, m3)


@compiled(FAST, inline=True)
def _complex_contract_two(s: Any, f: Any, y: Any, z: Any) -> Any:
    """`_contract_two` of complex numbers, with the parts of the sums row by row: that takes one addition less."""
    n0 = n1 = n2 = n3 = s.dtype.type(0)
    for a in range(HALF):
        b = HALF + a
        t, u, v, w = s[WIDTH + a], s[WIDTH + b], s[3 * WIDTH + a], s[3 * WIDTH + b]
        t, u = t + y[0] * f[SLOT + a], u + y[0] * f[SLOT + b]
        v, w = v + z[0] * f[2 * SLOT + a], w + z[0] * f[2 * SLOT + b]
        # The sums of both views, p + i q and r + i o.
        p, q, r, o = s[a] + t, s[b] + u, s[2 * WIDTH + a] + v, s[2 * WIDTH + b] + w
        n0 += f[a] * (p * r - q * o) + f[b] * (p * o + q * r)
        t, u = t + y[1] * f[SLOT + WIDTH + a], u + y[1] * f[SLOT + WIDTH + b]
        v, w = v + z[1] * f[2 * SLOT + WIDTH + a], w + z[1] * f[2 * SLOT + WIDTH + b]
        p, q, r, o = s[a] + t, s[b] + u, s[2 * WIDTH + a] + v, s[2 * WIDTH + b] + w
        n1 += f[WIDTH + a] * (p * r - q * o) + f[WIDTH + b] * (p * o + q * r)
        t, u = t + y[2] * f[SLOT + 2 * WIDTH + a], u + y[2] * f[SLOT + 2 * WIDTH + b]
        v, w = v + z[2] * f[2 * SLOT + 2 * WIDTH + a], w + z[2] * f[2 * SLOT + 2 * WIDTH + b]
        p, q, r, o = s[a] + t, s[b] + u, s[2 * WIDTH + a] + v, s[2 * WIDTH + b] + w
        n2 += f[2 * WIDTH + a] * (p * r - q * o) + f[2 * WIDTH + b] * (p * o + q * r)
        t, u = t + y[3] * f[SLOT + 3 * WIDTH + a], u + y[3] * f[SLOT + 3 * WIDTH + b]
        v, w = v + z[3] * f[2 * SLOT + 3 * WIDTH + a], w + z[3] * f[2 * SLOT + 3 * WIDTH + b]
        p, q, r, o = s[a] + t, s[b] + u, s[2 * WIDTH + a] + v, s[2 * WIDTH + b] + w
        n3 += f[3 * WIDTH + a] * (p * r - q * o) + f[3 * WIDTH + b] * (p * o + q * r)
        s[WIDTH + a], s[WIDTH + b], s[3 * WIDTH + a], s[3 * WIDTH + b] = t, u, v, w
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
def _powers(decays: Any, step: int, parts: Any, grown: Any, shrunk: Any) -> None:
    """Parts (m,) times λ^(c − j) of every view (m, ROWS), and the product of all λ^(i − c) (ROWS,), for rows counted anew after
    each step.
    """
    shrunk[:] = 1
    for v in range(decays.shape[0]):
        grown[v] = parts[v]
        for i in range(ROWS if decays[v] != 1 else 0):
            apart = i % step - step // 2
            grown[v, i] *= decays[v] ** -apart
            shrunk[i] *= decays[v] ** apart


@compiled(FAST)
def _in_units(x: Any, begin: int, rows: int, unit: Any, own: Any) -> None:
    """Rows of (n, d) from one on, times a unit (d,), into own (…, d), and zeros behind: what stood there may be no numbers."""
    for i in range(rows):
        for e in range(own.shape[1]):
            own[i, e] = x[begin + i, e] * unit[e]
    own[rows:] = 0


@compiled(FAST)
def _times_unit(x: Any, unit: Any) -> None:
    """Channels (d, ROWS) times a unit (d,)."""
    for e in range(x.shape[0]):
        for i in range(ROWS):
            x[e, i] *= unit[e]


@compiled()
def _set_fade(decays: Any, rows: int, fade: Any) -> None:
    """λ^rows, and what it is more than 1, of every view (2, m)."""
    for v in range(decays.shape[0]):
        fade[0, v] = decays[v] ** rows
        fade[1, v] = expm1(rows * log(decays[v]))


@compiled()
def _fade(s: Any, lost: Any, factor: Any, less: Any) -> None:
    """Sums (WIDTH,), and what rounding took, times a factor."""
    if factor > 0.5:
        # What is taken away is what is rounded: sums would lose a unit with every chunk otherwise.
        for a in range(WIDTH):
            total = s[a]
            term = total * less - lost[a] * factor
            new = total + term
            lost[a] = (new - total) - term
            s[a] = new
    else:
        for a in range(WIDTH):
            s[a] *= factor
            lost[a] *= factor


@compiled()
def _fade_views(sums: Any, lost: Any, fade: Any) -> None:
    """The sums (m 2 WIDTH,) of all views, with what was lost, (m WIDTH,), times λ to some power."""
    for v in range(fade.shape[1]):
        if fade[0, v] != 1:
            low = v * WIDTH
            _fade(sums[2 * low : 2 * low + WIDTH], lost[low : low + WIDTH], fade[0, v], fade[1, v])


@compiled()
def _fade_running(sums: Any, fade: Any) -> None:
    """The same for sums and parts (m 2 WIDTH,) that do not outlive a chunk: parts join the sums, without compensation."""
    for v in range(fade.shape[1]):
        if fade[0, v] != 1:
            own = sums[2 * v * WIDTH : 2 * (v + 1) * WIDTH]
            for a in range(WIDTH):
                own[a] = (own[a] + own[WIDTH + a]) * fade[0, v]
                own[WIDTH + a] = 0


@compiled()
def _fade_all(sums: Any, lost: Any, fade: Any) -> None:
    """`_fade_views` of all columns and blocks."""
    for block in range(sums.shape[0]):
        for e in range(sums.shape[1]):
            _fade_views(sums[block, e], lost[block, e], fade)


@compiled(FAST)
def _times_rows(powers: Any, x: Any) -> None:
    """Columns (c, ROWS) times numbers of the rows."""
    for e in range(x.shape[0]):
        for i in range(ROWS):
            x[e, i] *= powers[i]


@compiled(FAST)
def _dot(x: Any, y: Any) -> Any:
    found = 0.0
    for a in range(x.shape[0]):
        found += x[a] * y[a]
    return found


@compiled()
def _of_decays(
    monomials: Any, slopes: Any, shares: Any, of_shares: Any, rows: int, step: int, tail: int, found: Any
) -> None:
    """What the rows of a chunk add to the gradients of log λ (m,), if these are asked for.

    From `tail` on they count from the last of all rows, and from the first of their step before it.
    """
    of_rows = 0.0
    for i in range(rows if found.shape[0] else 0):
        place = i - (rows - 1) if i >= tail else i % step
        low = i * WIDTH
        for block in range(monomials.shape[0]):
            of_rows += place * _dot(monomials[block, low : low + WIDTH], slopes[block, low : low + WIDTH])
        for v in range(found.shape[0]):
            for e in range(shares.shape[1]):
                found[v] -= place * shares[v, e, i] * of_shares[v, e, i]
    for v in range(found.shape[0]):
        found[v] += of_rows


@compiled()
def _of_sums(apart: int, after: Any, before: Any, found: Any) -> None:
    """What sums (m WIDTH,) add, that many rows from those before them, from these and their gradients (m 2 WIDTH,)."""
    for v in range(found.shape[0]):
        low = v * WIDTH
        found[v] += apart * _dot(after[2 * low : 2 * low + WIDTH], before[low : low + WIDTH])


@compiled()
def _place(a: int, half: Any) -> Any:
    """Of a monomial, the block and where it is in this."""
    if half is None:
        return a // WIDTH, a % WIDTH
    return a % half // HALF, a // half * HALF + a % half % HALF


@compiled(leaf=False)
def spread_out(w: Any, half: Any, padded: Any) -> None:
    """Weights (r,) of all monomials into zeros for whole blocks of them."""
    for a in range(w.shape[0]):
        block, at = _place(a, half)
        padded[block * WIDTH + at] = w[a]


@compiled()
def _move(given: Any, half: Any, low: int, packed: Any, back: bool) -> None:
    """Sums (r,) into `WIDTH` entries of every row (blocks, ·), from `low` on, or back from there."""
    r = given.shape[0]
    if half is None:
        for block in range(packed.shape[0]):
            begin = block * WIDTH
            count = min(WIDTH, r - begin)
            own, of_block = given[begin : begin + count], packed[block, low : low + count]
            for a in range(count):
                if back:
                    own[a] = of_block[a]
                else:
                    of_block[a] = own[a]
        return
    for a in range(r):
        block, at = _place(a, half)
        if back:
            given[a] = packed[block, low + at]
        else:
            packed[block, low + at] = given[a]


@compiled()
def _pack(given: Any, half: Any, step: int, packed: Any) -> None:
    """Sums (m, c, r) into (blocks, c, m step), the first `WIDTH` of each step."""
    for v in range(given.shape[0]):
        for e in range(given.shape[1]):
            _move(given[v, e], half, v * step, packed[:, e], False)


@compiled()
def _unpack(packed: Any, half: Any, step: int, given: Any) -> None:
    """The reverse of `_pack`."""
    for v in range(given.shape[0]):
        for e in range(given.shape[1]):
            _move(given[v, e], half, v * step, packed[:, e], True)


@compiled()
def _turn_some(x: Any, columns: int, low: int, turned: Any) -> None:
    """`STEP` rows (STEP columns,) as columns (c, ROWS), from row `low` of these on."""
    for e in range(columns):
        own, to = x[e:], turned[e, low : low + STEP]
        for i in range(STEP):
            to[i] = own[i * columns]


@compiled()
def _turn(x: Any, begin: int, rows: int, turned: Any) -> None:
    """Rows of (n, c) as (c, ROWS), with zeros behind."""
    columns, flat, whole = x.shape[1], x.reshape(x.size), rows // STEP * STEP
    for low in range(0, whole, STEP):
        _turn_some(flat[(begin + low) * columns :], columns, low, turned)
    for e in range(columns if whole < ROWS else 0):
        for i in range(whole, ROWS):
            turned[e, i] = x[begin + i, e] if i < rows else 0


@compiled()
def _turn_some_back(turned: Any, columns: int, low: int, x: Any) -> None:
    """The reverse of `_turn_some`."""
    for e in range(columns):
        own, of = x[e:], turned[e, low : low + STEP]
        for i in range(STEP):
            own[i * columns] = of[i]


@compiled()
def _turn_back(turned: Any, begin: int, rows: int, x: Any) -> None:
    """The reverse of `_turn`, and zeros in place of what was there."""
    columns, flat, whole = x.shape[1], x.reshape(x.size), rows // STEP * STEP
    for low in range(0, whole, STEP):
        _turn_some_back(turned, columns, low, flat[(begin + low) * columns :])
    for e in range(columns):
        for i in range(whole, rows):
            x[begin + i, e] = turned[e, i]
        turned[e] = 0


@compiled(inline=True)
def _four(x: Any, i: int) -> Any:
    return x[i], x[i + 1], x[i + 2], x[i + 3]


@compiled(inline=True)
def _get_in(x: Any, i: int, four: Any) -> None:
    x[i] += four[0]
    x[i + 1] += four[1]
    x[i + 2] += four[2]
    x[i + 3] += four[3]


@compiled(inline=True)
def _read_few(sums: Any, f: Any, half: Any, shares: Any, e: int, i: int, product: Any) -> Any:
    """Numerators of four rows in column e from the sums (m 2 WIDTH,) of it, and a part of all monomials, f.

    Not those of two views and real monomials, which `_contract_two` takes.
    """
    views = shares.shape[0]
    if half is not None and views == 2:
        return _complex_contract_two(sums, f, _four(shares[0, e], i), _four(shares[1, e], i))
    x = f[: FEW * WIDTH]
    for v in range(views - 1):
        of_keys = f[(1 + v) * SLOT : (1 + v) * SLOT + FEW * WIDTH]
        of_view = sums[2 * v * WIDTH : 2 * (v + 1) * WIDTH]
        if half is None:
            _multiply(of_view, of_keys, _four(shares[v, e], i), x, product)
        else:
            _complex_multiply(of_view, of_keys, _four(shares[v, e], i), x, product)
        x = product
    last = views - 1
    of_keys = f[views * SLOT : views * SLOT + FEW * WIDTH]
    return _contract(sums[2 * last * WIDTH :], of_keys, _four(shares[last, e], i), x)


@compiled()
def _room_for(dim: int, r: int, half: Any) -> int:
    """Of how many numbers `_make` needs room."""
    return r if half is None else (2 * dim + r) * LANES


@compiled(leaf=False)
def read(
    q: Any, k: Any, z: Any, w: Any, runs: Any, half: Any, decays: Any, steps: Any, begins: Any, counts: Any, parts: Any,
    units: Any, total: Any, lost: Any, out: Any,
) -> None:  # fmt: skip
    """Numerators (P, n, c) of rows that see the sums and all rows up to their own; sums (P, m, c, r) then hold all rows.

    λ (P, m), and rows of a step (P,).
    """
    problems, views, _, columns = z.shape
    blocks, kept = w.shape[0] // WIDTH, total.shape[0] > 0
    phi, ones, product = _room(_room_for(q.shape[2], w.shape[0], half), w), _room(w.shape[0], w), _room(FEW * WIDTH, w)
    ones[:] = 1
    monomials = _room(blocks * (1 + views) * SLOT, w).reshape((blocks, (1 + views) * SLOT))
    sums = _room(blocks * columns * views * 2 * WIDTH, w).reshape((blocks, columns, views * 2 * WIDTH))
    rests = _room(blocks * columns * views * WIDTH, w).reshape((blocks, columns, views * WIDTH))
    shares, found = np.zeros((views, columns, ROWS), w.dtype), np.zeros((columns, ROWS), w.dtype)
    grown, shrunk, fade = np.ones((views, ROWS), w.dtype), np.ones(ROWS, w.dtype), np.ones((2, views), w.dtype)
    scaled = np.empty((ROWS, q.shape[2]), w.dtype)
    for p in range(problems):
        for j in range(begins.shape[0]):
            _powers(decays[p], steps[p], parts[j], grown, shrunk)
            if kept:
                _pack(total[p], half, 2 * WIDTH, sums)
                _pack(lost[p], half, WIDTH, rests)
                _set_fade(decays[p], 1 + steps[p] // 2, fade)
                _fade_all(sums, rests, fade)
            else:
                sums[:] = 0
                rests[:] = 0
            _read(
                q[p], k[p], z[p], w, runs, half, decays[p], steps[p], grown, shrunk, fade, ones, phi, monomials, sums, rests,
                shares, found, product, scaled, units[p, j], begins[j], counts[j], out[p],
            )  # fmt: skip
            if kept:
                _unpack(sums, half, 2 * WIDTH, total[p])
                _unpack(rests, half, WIDTH, lost[p])


@compiled()
def _read(
    q: Any, k: Any, z: Any, w: Any, runs: Any, half: Any, decays: Any, step: int, grown: Any, shrunk: Any, fade: Any,
    ones: Any, phi: Any, monomials: Any, sums: Any, rests: Any, shares: Any, found: Any, product: Any, scaled: Any, units: Any,
    first: int, n: int, out: Any,
) -> None:  # fmt: skip
    """`read` for the n rows of one document from the first on, with room for all that it needs."""
    views, _, columns = z.shape
    for low in range(0, n, step):
        begin, rows = first + low, min(step, n - low)
        # The sums are returned as they are at the last row.
        _set_fade(decays, step if low + step < n else rows - 1 - step // 2, fade)
        whole = scaled[: (rows + FEW - 1) // FEW * FEW]
        _in_units(q, begin, rows, units[0], whole)
        _make(whole, runs, half, w, phi, 0, monomials)
        for v in range(views):
            _in_units(k[v], begin, rows, units[1 + v], whole)
            _make(whole, runs, half, ones, phi, 1 + v, monomials)
            _turn(z[v], begin, rows, shares[v])
            _times_rows(grown[v], shares[v])
        for block in range(w.shape[0] // WIDTH):
            for left in range(0, columns, COLUMNS):
                for i in range(0, rows, FEW):
                    f = monomials[block, i * WIDTH :]
                    right = min(left + COLUMNS, columns)
                    if half is None and views == 2:
                        for e in range(left, right - 1, 2):
                            _contract_two(sums[block, e], sums[block, e + 1], f, shares, e, i, found)
                        if (right - left) % 2:
                            _contract_two(sums[block, right - 1], None, f, shares, right - 1, i, found)
                    else:
                        for e in range(left, right):
                            _get_in(found[e], i, _read_few(sums[block, e], f, half, shares, e, i, product))
                for e in range(left, min(left + COLUMNS, columns)):
                    _join_views(sums[block, e], rests[block, e])
                    _fade_views(sums[block, e], rests[block, e], fade)
        _times_rows(shrunk, found)
        _turn_back(found, begin, rows, out)


@compiled(inline=True)
def _add(s: Any, f: Any, z: Any, before: Any) -> None:
    """The monomials f of four rows join the part of the sums s; `before` gets the sums without them."""
    z0, z1, z2, z3 = spread(z[0]), spread(z[1]), spread(z[2]), spread(z[3])
    for a in range(0, WIDTH, lanes(s)):
        part = load(s, WIDTH + a)
        store(before, a, plus(load(s, a), part))
        part = fused(z1, load(f, WIDTH + a), fused(z0, load(f, a), part))
        store(s, WIDTH + a, fused(z3, load(f, 3 * WIDTH + a), fused(z2, load(f, 2 * WIDTH + a), part)))


@compiled(inline=True)
def _add_few(sums: Any, f: Any, shares: Any, e: int, i: int, before: Any) -> None:
    """`_add` for all views, in column e of which are the sums (m 2 WIDTH,); `before` is (m WIDTH,)."""
    for v in range(shares.shape[0]):
        own, low = (1 + v) * SLOT, v * WIDTH
        few = f[own : own + FEW * WIDTH]
        _add(sums[2 * low : 2 * (low + WIDTH)], few, _four(shares[v, e], i), before[low : low + WIDTH])


@compiled(FAST, inline=True)
def _run(before: Any, f: Any, z: Any, y: Any) -> None:
    """The sums S_i of four rows, from those before them."""
    for a in range(WIDTH):
        four = f[a], f[WIDTH + a], f[2 * WIDTH + a], f[3 * WIDTH + a]
        y[a], y[WIDTH + a], y[2 * WIDTH + a], y[3 * WIDTH + a] = _ahead(z, four, before[a])


@compiled(FAST)
def _times(x: Any, y: Any) -> None:
    """Four rows x get x ∘ y."""
    for a in range(FEW * WIDTH):
        x[a] *= y[a]


@compiled(FAST)
def _complex_times(x: Any, y: Any) -> None:
    """`_times` of complex numbers."""
    for low in range(0, FEW * WIDTH, WIDTH):
        own, other = x[low : low + WIDTH], y[low : low + WIDTH]
        for a in range(HALF):
            re, im = own[a], own[HALF + a]
            own[a] = re * other[a] - im * other[HALF + a]
            own[HALF + a] = re * other[HALF + a] + im * other[a]


@compiled(FAST)
def _complex_slope(g: Any, x: Any, y: Any, slopes: Any) -> None:
    """`_slope` of complex numbers."""
    for i in range(FEW):
        low = i * WIDTH
        own, other, target = x[low : low + WIDTH], y[low : low + WIDTH], slopes[low : low + WIDTH]
        for a in range(HALF):
            target[a] += g[i] * (own[a] * other[a] - own[HALF + a] * other[HALF + a])
            target[HALF + a] += g[i] * (own[a] * other[HALF + a] + own[HALF + a] * other[a])


@compiled(FAST, inline=True)
def _slope(g: Any, x: Any, y: Any, slopes: Any) -> None:
    """Slopes of four rows get g x ∘ y."""
    for a in range(WIDTH):
        slopes[a] += g[0] * (x[a] * y[a])
        slopes[WIDTH + a] += g[1] * (x[WIDTH + a] * y[WIDTH + a])
        slopes[2 * WIDTH + a] += g[2] * (x[2 * WIDTH + a] * y[2 * WIDTH + a])
        slopes[3 * WIDTH + a] += g[3] * (x[3 * WIDTH + a] * y[3 * WIDTH + a])


@compiled(FAST, inline=True)
def _behind(s: Any, g: Any, q: Any, others: Any, f: Any, z: Any, slopes: Any) -> Any:
    """With G_i the sums of g q ∘ others over the rows from i on, of which s has those behind four rows: slopes get z G, and back
    comes Σ f ∘ G.
    """
    n0 = n1 = n2 = n3 = s.dtype.type(0)
    for a in range(WIDTH):
        # From the last row to the first.
        h = g[3] * q[3 * WIDTH + a], g[2] * q[2 * WIDTH + a], g[1] * q[WIDTH + a], g[0] * q[a]
        four = others[3 * WIDTH + a], others[2 * WIDTH + a], others[WIDTH + a], others[a]
        part = s[WIDTH + a]
        s3, s2, s1, s0 = _ahead(h, four, s[a] + part)
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


@compiled(FAST, inline=True)
def _complex_behind(s: Any, g: Any, q: Any, others: Any, f: Any, z: Any, slopes: Any) -> Any:
    """`_behind` of complex numbers, with q times the conjugates of others."""
    n0 = n1 = n2 = n3 = s.dtype.type(0)
    for a in range(HALF):
        b = HALF + a
        t, u = s[WIDTH + a], s[WIDTH + b]
        c, d, o_re, o_im = (
            g[3] * q[3 * WIDTH + a],
            g[3] * q[3 * WIDTH + b],
            others[3 * WIDTH + a],
            others[3 * WIDTH + b],
        )
        t, u = t + c * o_re + d * o_im, u + d * o_re - c * o_im
        re, im = s[a] + t, s[b] + u
        slopes[3 * WIDTH + a] += z[3] * re
        slopes[3 * WIDTH + b] += z[3] * im
        n3 += f[3 * WIDTH + a] * re + f[3 * WIDTH + b] * im
        c, d, o_re, o_im = (
            g[2] * q[2 * WIDTH + a],
            g[2] * q[2 * WIDTH + b],
            others[2 * WIDTH + a],
            others[2 * WIDTH + b],
        )
        t, u = t + c * o_re + d * o_im, u + d * o_re - c * o_im
        re, im = s[a] + t, s[b] + u
        slopes[2 * WIDTH + a] += z[2] * re
        slopes[2 * WIDTH + b] += z[2] * im
        n2 += f[2 * WIDTH + a] * re + f[2 * WIDTH + b] * im
        c, d, o_re, o_im = g[1] * q[WIDTH + a], g[1] * q[WIDTH + b], others[WIDTH + a], others[WIDTH + b]
        t, u = t + c * o_re + d * o_im, u + d * o_re - c * o_im
        re, im = s[a] + t, s[b] + u
        slopes[WIDTH + a] += z[1] * re
        slopes[WIDTH + b] += z[1] * im
        n1 += f[WIDTH + a] * re + f[WIDTH + b] * im
        c, d, o_re, o_im = g[0] * q[a], g[0] * q[b], others[a], others[b]
        t, u = t + c * o_re + d * o_im, u + d * o_re - c * o_im
        re, im = s[a] + t, s[b] + u
        slopes[a] += z[0] * re
        slopes[b] += z[0] * im
        n0 += f[a] * re + f[b] * im
        s[WIDTH + a], s[WIDTH + b] = t, u
    return n0, n1, n2, n3


@compiled()
def _others(own: int, half: Any, running: Any, product: Any) -> None:
    """The product (FEW * WIDTH,) of the running sums of all views but one (m, FEW * WIDTH)."""
    product[:] = 1
    if half is not None:
        for low in range(0, FEW * WIDTH, WIDTH):
            product[low + HALF : low + WIDTH] = 0
    for v in range(running.shape[0]):
        if v != own:
            if half is None:
                _times(product, running[v])
            else:
                _complex_times(product, running[v])


@compiled(inline=True)
def _behind_two(before: Any, after: Any, numbers: Any, f: Any, ahead: Any, slopes: Any, products: Any) -> None:
    """`_run`, `_slope` and `_behind` in one, for two of four rows, two views and some columns.

    f and slopes, which have all three slots, begin with these two rows. They are the last two where `ahead` is f of all four, and
    else, where it is None, the first. `numbers` (columns, 3 FEW) are gradients of numerators and shares of both views. Products
    (columns * 2 FEW * lanes,) of monomials and gradients of sums are to be added up, of four rows for each view.
    """
    width, row = lanes(f), 0 if ahead is None else 2
    for a in range(0, WIDTH, width):
        x0, x1 = load(f, a), load(f, WIDTH + a)
        j0, j1 = load(f, SLOT + a), load(f, SLOT + WIDTH + a)
        k0, k1 = load(f, 2 * SLOT + a), load(f, 2 * SLOT + WIDTH + a)
        of_x0, of_x1 = load(slopes, a), load(slopes, WIDTH + a)
        of_j0, of_j1 = load(slopes, SLOT + a), load(slopes, SLOT + WIDTH + a)
        of_k0, of_k1 = load(slopes, 2 * SLOT + a), load(slopes, 2 * SLOT + WIDTH + a)
        for e in range(before.shape[0]):
            b, s, number, at = before[e], after[e], numbers[e], (2 * FEW * e + row) * width
            s0, v0 = load(b, a), load(b, WIDTH + a)
            if ahead is not None:
                s0 = fused(spread(number[FEW]), load(ahead, SLOT + a), s0)
                s0 = fused(spread(number[FEW + 1]), load(ahead, SLOT + WIDTH + a), s0)
                v0 = fused(spread(number[2 * FEW]), load(ahead, 2 * SLOT + a), v0)
                v0 = fused(spread(number[2 * FEW + 1]), load(ahead, 2 * SLOT + WIDTH + a), v0)
            g0, g1 = spread(number[row]), spread(number[row + 1])
            y0, y1 = spread(number[FEW + row]), spread(number[FEW + row + 1])
            z0, z1 = spread(number[2 * FEW + row]), spread(number[2 * FEW + row + 1])
            s0, v0 = fused(y0, j0, s0), fused(z0, k0, v0)
            s1, v1 = fused(y1, j1, s0), fused(z1, k1, v0)
            of_x0, of_x1 = fused(g0, times(s0, v0), of_x0), fused(g1, times(s1, v1), of_x1)
            # From the last row to the first.
            h0, h1 = times(g0, x0), times(g1, x1)
            t1, u1 = fused(h1, v1, load(s, WIDTH + a)), fused(h1, s1, load(s, 3 * WIDTH + a))
            t0, u0 = fused(h0, v0, t1), fused(h0, s0, u1)
            store(s, WIDTH + a, t0)
            store(s, 3 * WIDTH + a, u0)
            total, other = load(s, a), load(s, 2 * WIDTH + a)
            t0, t1, u0, u1 = plus(total, t0), plus(total, t1), plus(other, u0), plus(other, u1)
            of_j0, of_j1 = fused(y0, t0, of_j0), fused(y1, t1, of_j1)
            of_k0, of_k1 = fused(z0, u0, of_k0), fused(z1, u1, of_k1)
            last = at + FEW * width
            store(products, at, fused(j0, t0, load(products, at)))
            store(products, at + width, fused(j1, t1, load(products, at + width)))
            store(products, last, fused(k0, u0, load(products, last)))
            store(products, last + width, fused(k1, u1, load(products, last + width)))
        store(slopes, a, of_x0)
        store(slopes, WIDTH + a, of_x1)
        store(slopes, SLOT + a, of_j0)
        store(slopes, SLOT + WIDTH + a, of_j1)
        store(slopes, 2 * SLOT + a, of_k0)
        store(slopes, 2 * SLOT + WIDTH + a, of_k1)


@compiled()
def _pull_two(
    before: Any, after: Any, f: Any, given: Any, shares: Any, e: int, i: int, slopes: Any, of_shares: Any, numbers: Any,
    products: Any,
) -> None:  # fmt: skip
    """Gradients of four rows through columns from e on, of real monomials of two views, with room for numbers and products.

    `before` (columns, 2 WIDTH) and `after` (columns, 4 WIDTH) are those of `_pull_few`.
    """
    width, columns = lanes(f), after.shape[0]
    for c in range(columns):
        for row in range(FEW):
            numbers[c, row] = given[e + c, i + row]
            numbers[c, FEW + row] = shares[0, e + c, i + row]
            numbers[c, 2 * FEW + row] = shares[1, e + c, i + row]
    products[:] = 0
    _behind_two(before[:columns], after, numbers, f[2 * WIDTH :], f, slopes[2 * WIDTH :], products)
    _behind_two(before[:columns], after, numbers, f, None, slopes, products)
    for c in range(columns):
        for view in range(2):
            own = products[(2 * c + view) * FEW * width :]
            four = load(own, 0), load(own, width), load(own, 2 * width), load(own, 3 * width)
            add_totals(of_shares[view, e + c], i, four[0], four[1], four[2], four[3])


@compiled(FAST, inline=True)
def _complex_behind_two(before: Any, s: Any, f: Any, g: Any, y: Any, z: Any, slopes: Any) -> Any:
    """`_behind_two` of complex numbers."""
    n0 = n1 = n2 = n3 = m0 = m1 = m2 = m3 = s.dtype.type(0)
    for a in range(HALF):
        b = HALF + a
        # The sums of both views, p + i q and r + i o.
        p0, q0 = before[a] + y[0] * f[SLOT + a], before[b] + y[0] * f[SLOT + b]
        r0, o0 = before[WIDTH + a] + z[0] * f[2 * SLOT + a], before[WIDTH + b] + z[0] * f[2 * SLOT + b]
        p1, q1 = p0 + y[1] * f[SLOT + WIDTH + a], q0 + y[1] * f[SLOT + WIDTH + b]
        r1, o1 = r0 + z[1] * f[2 * SLOT + WIDTH + a], o0 + z[1] * f[2 * SLOT + WIDTH + b]
        p2, q2 = p1 + y[2] * f[SLOT + 2 * WIDTH + a], q1 + y[2] * f[SLOT + 2 * WIDTH + b]
        r2, o2 = r1 + z[2] * f[2 * SLOT + 2 * WIDTH + a], o1 + z[2] * f[2 * SLOT + 2 * WIDTH + b]
        p3, q3 = p2 + y[3] * f[SLOT + 3 * WIDTH + a], q2 + y[3] * f[SLOT + 3 * WIDTH + b]
        r3, o3 = r2 + z[3] * f[2 * SLOT + 3 * WIDTH + a], o2 + z[3] * f[2 * SLOT + 3 * WIDTH + b]
        slopes[a] += g[0] * (p0 * r0 - q0 * o0)
        slopes[b] += g[0] * (p0 * o0 + q0 * r0)
        slopes[WIDTH + a] += g[1] * (p1 * r1 - q1 * o1)
        slopes[WIDTH + b] += g[1] * (p1 * o1 + q1 * r1)
        slopes[2 * WIDTH + a] += g[2] * (p2 * r2 - q2 * o2)
        slopes[2 * WIDTH + b] += g[2] * (p2 * o2 + q2 * r2)
        slopes[3 * WIDTH + a] += g[3] * (p3 * r3 - q3 * o3)
        slopes[3 * WIDTH + b] += g[3] * (p3 * o3 + q3 * r3)
        # Gradients of the sums of the first view, t + i u, and of the second, v + i w; and these over the rows behind.
        t, u, v, w = s[WIDTH + a], s[WIDTH + b], s[3 * WIDTH + a], s[3 * WIDTH + b]
        c, d = g[3] * f[3 * WIDTH + a], g[3] * f[3 * WIDTH + b]
        t, u = t + c * r3 + d * o3, u + d * r3 - c * o3
        v, w = v + c * p3 + d * q3, w + d * p3 - c * q3
        re, im = s[a] + t, s[b] + u
        slopes[SLOT + 3 * WIDTH + a] += y[3] * re
        slopes[SLOT + 3 * WIDTH + b] += y[3] * im
        n3 += f[SLOT + 3 * WIDTH + a] * re + f[SLOT + 3 * WIDTH + b] * im
        re, im = s[2 * WIDTH + a] + v, s[2 * WIDTH + b] + w
        slopes[2 * SLOT + 3 * WIDTH + a] += z[3] * re
        slopes[2 * SLOT + 3 * WIDTH + b] += z[3] * im
        m3 += f[2 * SLOT + 3 * WIDTH + a] * re + f[2 * SLOT + 3 * WIDTH + b] * im
        c, d = g[2] * f[2 * WIDTH + a], g[2] * f[2 * WIDTH + b]
        t, u = t + c * r2 + d * o2, u + d * r2 - c * o2
        v, w = v + c * p2 + d * q2, w + d * p2 - c * q2
        re, im = s[a] + t, s[b] + u
        slopes[SLOT + 2 * WIDTH + a] += y[2] * re
        slopes[SLOT + 2 * WIDTH + b] += y[2] * im
        n2 += f[SLOT + 2 * WIDTH + a] * re + f[SLOT + 2 * WIDTH + b] * im
        re, im = s[2 * WIDTH + a] + v, s[2 * WIDTH + b] + w
        slopes[2 * SLOT + 2 * WIDTH + a] += z[2] * re
        slopes[2 * SLOT + 2 * WIDTH + b] += z[2] * im
        m2 += f[2 * SLOT + 2 * WIDTH + a] * re + f[2 * SLOT + 2 * WIDTH + b] * im
        c, d = g[1] * f[WIDTH + a], g[1] * f[WIDTH + b]
        t, u = t + c * r1 + d * o1, u + d * r1 - c * o1
        v, w = v + c * p1 + d * q1, w + d * p1 - c * q1
        re, im = s[a] + t, s[b] + u
        slopes[SLOT + WIDTH + a] += y[1] * re
        slopes[SLOT + WIDTH + b] += y[1] * im
        n1 += f[SLOT + WIDTH + a] * re + f[SLOT + WIDTH + b] * im
        re, im = s[2 * WIDTH + a] + v, s[2 * WIDTH + b] + w
        slopes[2 * SLOT + WIDTH + a] += z[1] * re
        slopes[2 * SLOT + WIDTH + b] += z[1] * im
        m1 += f[2 * SLOT + WIDTH + a] * re + f[2 * SLOT + WIDTH + b] * im
        c, d = g[0] * f[a], g[0] * f[b]
        t, u = t + c * r0 + d * o0, u + d * r0 - c * o0
        v, w = v + c * p0 + d * q0, w + d * p0 - c * q0
        re, im = s[a] + t, s[b] + u
        slopes[SLOT + a] += y[0] * re
        slopes[SLOT + b] += y[0] * im
        n0 += f[SLOT + a] * re + f[SLOT + b] * im
        re, im = s[2 * WIDTH + a] + v, s[2 * WIDTH + b] + w
        slopes[2 * SLOT + a] += z[0] * re
        slopes[2 * SLOT + b] += z[0] * im
        m0 += f[2 * SLOT + a] * re + f[2 * SLOT + b] * im
        s[WIDTH + a], s[WIDTH + b], s[3 * WIDTH + a], s[3 * WIDTH + b] = t, u, v, w
    return (n0, n1, n2, n3), (m0, m1, m2, m3)


@compiled(inline=True)
def _pull_few(
    before: Any, after: Any, f: Any, half: Any, slope: Any, shares: Any, e: int, i: int, slopes: Any, of_shares: Any,
    running: Any, product: Any,
) -> None:  # fmt: skip
    """Gradients of four rows through column e: slopes of their monomials f, and of their shares.

    `before` (m WIDTH,) are the sums before these rows, `after` (m 2 WIDTH,) those of the gradients behind them.
    """
    views = shares.shape[0]
    if views == 2:
        # Of complex numbers: `_pull_two` is for real ones.
        both = _complex_behind_two(before, after, f, slope, _four(shares[0, e], i), _four(shares[1, e], i), slopes)
        _get_in(of_shares[0, e], i, both[0])
        _get_in(of_shares[1, e], i, both[1])
        return
    few = FEW * WIDTH
    for v in range(views):
        own = (1 + v) * SLOT
        _run(before[v * WIDTH : (v + 1) * WIDTH], f[own : own + few], _four(shares[v, e], i), running[v])
    for v in range(views):
        own = (1 + v) * SLOT
        _others(v, half, running, product)
        z, of_keys, of_slopes = _four(shares[v, e], i), f[own : own + few], slopes[own : own + few]
        behind = after[2 * v * WIDTH : 2 * (v + 1) * WIDTH]
        if half is None:
            if v == 0:
                _slope(slope, product, running[0], slopes[:few])
            four = _behind(behind, slope, f[:few], product, of_keys, z, of_slopes)
        else:
            if v == 0:
                _complex_slope(slope, product, running[0], slopes[:few])
            four = _complex_behind(behind, slope, f[:few], product, of_keys, z, of_slopes)
        _get_in(of_shares[v, e], i, four)


@compiled(leaf=False)
def pull(
    q: Any, k: Any, z: Any, g: Any, w: Any, runs: Any, half: Any, decays: Any, steps: Any, begins: Any,
    counts: Any, parts: Any, units: Any, total: Any, behind: Any, missed: Any, dq: Any, dk: Any, dz: Any, of_decays: Any,
) -> None:  # fmt: skip
    """Gradients of q, k and z from those of the numerators, g (P, n, c); `total` are the sums before these rows.

    `behind` (P, m, c, r) are the sums of the gradients behind these rows, with what rounding took, `missed`; then also of them.
    `of_decays` gets the gradients of log λ (P, m), or is (P, 0).
    """
    problems, views, _, columns = z.shape
    dim, blocks, kept, chunks = q.shape[2], w.shape[0] // WIDTH, total.shape[0] > 0, 0
    for j in range(counts.shape[0]):
        chunks = max(chunks, (counts[j] + ROWS - 1) // ROWS)
    phi, ones, product = _room(_room_for(dim, w.shape[0], half), w), _room(w.shape[0], w), _room(FEW * WIDTH, w)
    ones[:] = 1
    monomials = _room(blocks * (1 + views) * SLOT, w).reshape((blocks, (1 + views) * SLOT))
    slopes = _room(blocks * (1 + views) * SLOT, w).reshape((blocks, (1 + views) * SLOT))
    sums = _room(blocks * columns * views * 2 * WIDTH, w).reshape((blocks, columns, views * 2 * WIDTH))
    after = _room(blocks * columns * views * 2 * WIDTH, w).reshape((blocks, columns, views * 2 * WIDTH))
    rests = _room(blocks * columns * views * WIDTH, w).reshape((blocks, columns, views * WIDTH))
    starts = _room(chunks * blocks * columns * views * WIDTH, w).reshape((chunks, blocks, columns, views * WIDTH))
    befores = _room(ROWS // FEW * COLUMNS * views * WIDTH, w).reshape((ROWS // FEW, COLUMNS, views * WIDTH))
    running = _room(COLUMNS * views * 2 * WIDTH, w).reshape((COLUMNS, views * 2 * WIDTH))
    products, numbers = _room(COLUMNS * views * FEW * lanes(w), w), np.zeros((COLUMNS, 3 * FEW), w.dtype)
    of_views = _room(views * FEW * WIDTH, w).reshape((views, FEW * WIDTH))
    turned, of_turned = _room(w.shape[0] * ROWS, w).reshape((-1, ROWS)), _room(w.shape[0] * ROWS, w).reshape((-1, ROWS))
    x, dx, found = np.zeros((dim, ROWS), w.dtype), np.zeros((dim, ROWS), w.dtype), np.zeros((2, ROWS), w.dtype)
    shares, of_shares = np.zeros((views, columns, ROWS), w.dtype), np.zeros((views, columns, ROWS), w.dtype)
    given, scaled = np.zeros((columns, ROWS), w.dtype), np.empty((ROWS, dim), w.dtype)
    grown, shrunk, fade = np.ones((views, ROWS), w.dtype), np.ones(ROWS, w.dtype), np.ones((2, views), w.dtype)
    for p in range(problems):
        for j in range(begins.shape[0]):
            first, n = begins[j], counts[j]
            some = starts[: (n + ROWS - 1) // ROWS]
            sums[:] = 0
            rests[:] = 0
            _powers(decays[p], steps[p], parts[j], grown, shrunk)
            if kept:
                _pack(total[p], half, 2 * WIDTH, sums)
                _set_fade(decays[p], 1 + steps[p] // 2, fade)
                _fade_all(sums, rests, fade)
            _set_fade(decays[p], steps[p], fade)
            _sum_up(
                k[p], z[p], runs, half, steps[p], grown, fade, ones, phi, monomials, sums, rests, shares, some, scaled, units[p, j],
                first,
            )  # fmt: skip
            rests[:] = 0
            if kept:
                _pack(behind[p], half, 2 * WIDTH, after)
                _pack(missed[p], half, WIDTH, rests)
            else:
                after[:] = 0
            _pull(
                q[p], k[p], z[p], g[p], w, runs, half, decays[p], steps[p], grown, shrunk, fade, ones, phi, monomials, slopes,
                after, rests, some, running, befores, of_views, product, products, numbers, turned, of_turned, x, dx, found,
                shares, of_shares, given, scaled, units[p, j], first, n, dq[p], dk[p], dz[p], of_decays[p],
            )  # fmt: skip
            if kept:
                _unpack(after, half, 2 * WIDTH, behind[p])
                _unpack(rests, half, WIDTH, missed[p])


@compiled(FAST, inline=True)
def _add_eight(part: Any, f: Any, z: Any) -> None:
    """The monomials f of eight rows join the part of a sum."""
    for a in range(WIDTH):
        t0, t1, t2, t3 = z[0] * f[a], z[1] * f[WIDTH + a], z[2] * f[2 * WIDTH + a], z[3] * f[3 * WIDTH + a]
        t4, t5, t6 = z[4] * f[4 * WIDTH + a], z[5] * f[5 * WIDTH + a], z[6] * f[6 * WIDTH + a]
        part[a] += ((t0 + t1) + (t2 + t3)) + ((t4 + t5) + (t6 + z[7] * f[7 * WIDTH + a]))


@compiled()
def _sum_up(
    k: Any, z: Any, runs: Any, half: Any, step: int, grown: Any, fade: Any, ones: Any, phi: Any, monomials: Any, sums: Any,
    rests: Any, shares: Any, starts: Any, scaled: Any, units: Any, begin: int,
) -> None:  # fmt: skip
    """The sums before every chunk of `ROWS` rows into `starts`, for one document, which begins there."""
    views, _, columns = z.shape
    for chunk in range(starts.shape[0]):
        last = chunk == starts.shape[0] - 1
        for v in range(0 if last else views):
            _in_units(k[v], begin, ROWS, units[1 + v], scaled)
            _make(scaled, runs, half, ones, phi, 1 + v, monomials)
            _turn(z[v], begin, ROWS, shares[v])
            _times_rows(grown[v], shares[v])
        for block in range(sums.shape[0]):
            for left in range(0, columns, COLUMNS):
                right = min(left + COLUMNS, columns)
                for e in range(left, right):
                    for low in range(0, views * WIDTH, WIDTH):
                        _start(sums[block, e, 2 * low : 2 * low + WIDTH], starts[chunk, block, e, low : low + WIDTH])
                if last:
                    continue
                for first in range(0, ROWS, step):
                    for v in range(views):
                        part, own = (2 * v + 1) * WIDTH, (1 + v) * SLOT
                        for i in range(first, first + step, 8):
                            f = monomials[block, own + i * WIDTH : own + (i + 8) * WIDTH]
                            for e in range(left, right):
                                eight = _four(shares[v, e], i) + _four(shares[v, e], i + 4)
                                _add_eight(sums[block, e, part : part + WIDTH], f, eight)
                    for e in range(left, right):
                        _join_views(sums[block, e], rests[block, e])
                        _fade_views(sums[block, e], rests[block, e], fade)
        begin += ROWS


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
    q: Any, k: Any, z: Any, g: Any, w: Any, runs: Any, half: Any, decays: Any, step: int, grown: Any, shrunk: Any,
    fade: Any, ones: Any, phi: Any, monomials: Any, slopes: Any, after: Any, rests: Any, starts: Any, running: Any,
    befores: Any, of_views: Any, product: Any, products: Any, numbers: Any, turned: Any, of_turned: Any, x: Any, dx: Any,
    found: Any, shares: Any, of_shares: Any, given: Any, scaled: Any, units: Any, first: int, n: int, dq: Any, dk: Any,
    dz: Any, of_decays: Any,
) -> None:  # fmt: skip
    """`pull` for one document, chunk by chunk from the last, with room for all that it needs."""
    views, _, columns = z.shape
    for chunk in range(starts.shape[0] - 1, -1, -1):
        begin, rows = first + chunk * ROWS, min(ROWS, n - chunk * ROWS)
        # The gradients behind are of sums as the last row of all has them, or as the next chunk does.
        last = chunk == starts.shape[0] - 1
        tail = (rows - 1) // step * step if last else rows
        _set_fade(decays, rows - 1 - tail - step // 2 if last else step, fade)
        _fade_all(after, rests, fade)
        _set_fade(decays, step, fade)
        _turn(g, begin, rows, given)
        _times_rows(shrunk, given)
        whole = scaled[: (rows + FEW - 1) // FEW * FEW]
        _in_units(q, begin, rows, units[0], whole)
        _make(whole, runs, half, w, phi, 0, monomials)
        for v in range(views):
            _in_units(k[v], begin, rows, units[1 + v], whole)
            _make(whole, runs, half, ones, phi, 1 + v, monomials)
            _turn(z[v], begin, rows, shares[v])
            _times_rows(grown[v], shares[v])
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
                        if i and i % step == 0:
                            _fade_running(running[e - left], fade)
                        _add_few(running[e - left], f, shares, e, i, befores[i // FEW, e - left])
                for i in range((rows - 1) // FEW * FEW, -1, -FEW):
                    f, of_f = monomials[block, i * WIDTH :], slopes[block, i * WIDTH :]
                    before = befores[i // FEW]
                    if half is None and views == 2:
                        _pull_two(
                            before,
                            after[block, left:right],
                            f,
                            given,
                            shares,
                            left,
                            i,
                            of_f,
                            of_shares,
                            numbers,
                            products,
                        )
                    for e in range(left, right):
                        if half is not None or views != 2:
                            _pull_few(
                                before[e - left], after[block, e], f, half, _four(given[e], i), shares, e, i, of_f, of_shares,
                                of_views, product,
                            )  # fmt: skip
                        if i % step == 0:
                            _join_views(after[block, e], rests[block, e])
                            apart = (step if i or chunk else 1) + (rows - 1 - tail if i == tail else 0)
                            _of_sums(apart, after[block, e], before[e - left], of_decays)
                            if i:
                                _fade_views(after[block, e], rests[block, e], fade)
        _of_decays(monomials, slopes, shares, of_shares, rows, step, tail, of_decays)
        _turn(q, begin, rows, x)
        _times_unit(x, units[0])
        _pull_made(x, runs, half, w, turned, of_turned, 0, slopes, dx, found)
        _times_unit(dx, units[0])
        _turn_back(dx, begin, rows, dq)
        for v in range(views):
            _turn(k[v], begin, rows, x)
            _times_unit(x, units[1 + v])
            _pull_made(x, runs, half, ones, turned, of_turned, 1 + v, slopes, dx, found)
            _times_unit(dx, units[1 + v])
            _turn_back(dx, begin, rows, dk[v])
            _times_rows(grown[v], of_shares[v])
            _turn_back(of_shares[v], begin, rows, dz[v])
    _set_fade(decays, 1 + step // 2, fade)
    _fade_all(after, rests, fade)
