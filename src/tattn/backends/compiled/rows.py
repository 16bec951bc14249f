"""Loops over all rows, compiled: what `engines.features` computes of a block of rows, which every sum runs over whole.

Symbols, for each of P problems: x (n, d) in units, z (n, c), Φ (n, r) the monomials of x, M (c, r). `runs` (count, 4) of
`features.monomials.Run`. All arrays are contiguous, and of one dtype.

Rows are taken `ROWS` at a time, or as many whole `STEP` as a problem has left, channel by channel, and their monomials stay in the
second cache until all that needs them is done. A product takes `FEW` monomials and `COLUMNS` columns at a time: so many numbers fit
in the registers of every processor. Monomials and columns are filled up with zeros, and rows with zeros, too.

A sum over rows has a chain of `ROWS` terms at most, and then one for each of these. A read-out has `WIDTH` terms in any order, and
then one for every `WIDTH` monomials; so has a gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..operations import CHAIN
from .causal import _room
from .jit import compiled

ROWS = CHAIN
# The loops below are written for four monomials and three columns.
FEW, COLUMNS = 4, 3
# Monomials that a read-out sums up before it adds further, a whole number of `FEW`.
WIDTH = CHAIN
FAST = {"reassoc", "contract"}
# Rows that are turned at a time; a tile has a whole number of them, which is what compilers have to know to be fast.
STEP = 16


@compiled()
def _turn_some(x: Any, columns: int, turned: Any) -> None:
    """`STEP` rows (STEP columns,) into their places of (columns, ROWS), of which `turned` begins with the first."""
    for e in range(columns):
        own, to = x[e:], turned[e * ROWS : e * ROWS + STEP]
        for i in range(STEP):
            to[i] = own[i * columns]


@compiled()
def _turn_some_back(turned: Any, columns: int, x: Any) -> None:
    """The reverse of `_turn_some`."""
    for e in range(columns):
        own, of = x[e:], turned[e * ROWS : e * ROWS + STEP]
        for i in range(STEP):
            own[i * columns] = of[i]


@compiled()
def _turn(x: Any, begin: int, there: int, turned: Any, steps: int) -> None:
    """Those rows of (n, c) that are there as (c, ROWS), with zeros behind them up to so many `steps`."""
    columns, flat, whole = x.shape[1], x.reshape(x.size), there // STEP * STEP
    for low in range(0, whole, STEP):
        _turn_some(flat[(begin + low) * columns :], columns, turned[low:])
    for e in range(columns if whole < STEP * steps else 0):
        for i in range(whole, STEP * steps):
            turned[e * ROWS + i] = x[begin + i, e] if i < there else 0


@compiled()
def _turn_back(turned: Any, begin: int, there: int, x: Any) -> None:
    """The reverse of `_turn`."""
    columns, flat, whole = x.shape[1], x.reshape(x.size), there // STEP * STEP
    for low in range(0, whole, STEP):
        _turn_some_back(turned[low:], columns, flat[(begin + low) * columns :])
    for e in range(columns):
        for i in range(whole, there):
            x[begin + i, e] = turned[e * ROWS + i]


@compiled(FAST)
def _scale(x: Any, source: Any, target: Any, steps: int) -> None:
    for i in range(STEP * steps):
        target[i] = x[i] * source[i]


@compiled()
def _features(x: Any, runs: Any, phi: Any, steps: int) -> None:
    """All monomials of rows (d ROWS,), (r ROWS,)."""
    for i in range(STEP * steps):
        phi[i] = 1
    for run in range(runs.shape[0]):
        channel, start, stop, source = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
        own = x[channel * ROWS : (channel + 1) * ROWS]
        for j in range(stop - start):
            of, to = (source + j) * ROWS, (start + j) * ROWS
            _scale(own, phi[of : of + ROWS], phi[to : to + ROWS], steps)


@compiled(FAST)
def _dot(f: Any, z: Any, steps: int) -> Any:
    """Sums over rows of the products of four monomials and three columns."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = f.dtype.type(0)
    for i in range(STEP * steps):
        x, y, w = z[i], z[ROWS + i], z[2 * ROWS + i]
        p = f[i]
        a0 += p * x
        b0 += p * y
        c0 += p * w
        p = f[ROWS + i]
        a1 += p * x
        b1 += p * y
        c1 += p * w
        p = f[2 * ROWS + i]
        a2 += p * x
        b2 += p * y
        c2 += p * w
        p = f[3 * ROWS + i]
        a3 += p * x
        b3 += p * y
        c3 += p * w
    return (a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3)


@compiled()
def _add_four(sums: Any, a: int, four: Any) -> None:
    sums[a] += four[0]
    sums[a + 1] += four[1]
    sums[a + 2] += four[2]
    sums[a + 3] += four[3]


@compiled()
def _sum(phi: Any, z: Any, sums: Any, steps: int) -> None:
    """Φᵀ z joins the sums (c, r)."""
    for a in range(0, sums.shape[1], FEW):
        f = phi[a * ROWS : (a + FEW) * ROWS]
        for e in range(0, sums.shape[0], COLUMNS):
            x, y, w = _dot(f, z[e * ROWS : (e + COLUMNS) * ROWS], steps)
            _add_four(sums[e], a, x)
            _add_four(sums[e + 1], a, y)
            _add_four(sums[e + 2], a, w)


@compiled(FAST)
def _combine(m: Any, e: int, a: int, f: Any, part: Any, steps: int) -> None:
    """Four monomials times their factors join three columns."""
    x0, x1, x2, x3 = m[e, a], m[e, a + 1], m[e, a + 2], m[e, a + 3]
    y0, y1, y2, y3 = m[e + 1, a], m[e + 1, a + 1], m[e + 1, a + 2], m[e + 1, a + 3]
    w0, w1, w2, w3 = m[e + 2, a], m[e + 2, a + 1], m[e + 2, a + 2], m[e + 2, a + 3]
    for i in range(STEP * steps):
        f0, f1, f2, f3 = f[i], f[ROWS + i], f[2 * ROWS + i], f[3 * ROWS + i]
        part[i] += (x0 * f0 + x1 * f1) + (x2 * f2 + x3 * f3)
        part[ROWS + i] += (y0 * f0 + y1 * f1) + (y2 * f2 + y3 * f3)
        part[2 * ROWS + i] += (w0 * f0 + w1 * f1) + (w2 * f2 + w3 * f3)


@compiled(FAST)
def _join(part: Any, found: Any, steps: int) -> None:
    """A part of sums joins them, and is 0 from then on."""
    for i in range(STEP * steps):
        found[i] += part[i]
        found[ROWS + i] += part[ROWS + i]
        found[2 * ROWS + i] += part[2 * ROWS + i]
        part[i] = 0
        part[ROWS + i] = 0
        part[2 * ROWS + i] = 0


@compiled()
def _read(phi: Any, m: Any, part: Any, found: Any, steps: int) -> None:
    """M Φ for the first columns of M, as many as `found` (c' ROWS,) has; `part` (COLUMNS ROWS,) is 0."""
    found[:] = 0
    for low in range(0, m.shape[1], WIDTH):
        high = min(low + WIDTH, m.shape[1])
        for e in range(0, found.shape[0] // ROWS, COLUMNS):
            for a in range(low, high, FEW):
                _combine(m, e, a, phi[a * ROWS : (a + FEW) * ROWS], part, steps)
            _join(part, found[e * ROWS : (e + COLUMNS) * ROWS], steps)


@compiled(FAST)
def _slope(m: Any, e: int, a: int, z: Any, slopes: Any, steps: int) -> None:
    """Three columns times their factors join the gradients of four monomials."""
    x0, x1, x2, x3 = m[e, a], m[e, a + 1], m[e, a + 2], m[e, a + 3]
    y0, y1, y2, y3 = m[e + 1, a], m[e + 1, a + 1], m[e + 1, a + 2], m[e + 1, a + 3]
    w0, w1, w2, w3 = m[e + 2, a], m[e + 2, a + 1], m[e + 2, a + 2], m[e + 2, a + 3]
    for i in range(STEP * steps):
        x, y, w = z[i], z[ROWS + i], z[2 * ROWS + i]
        slopes[i] += x0 * x + y0 * y + w0 * w
        slopes[ROWS + i] += x1 * x + y1 * y + w1 * w
        slopes[2 * ROWS + i] += x2 * x + y2 * y + w2 * w
        slopes[3 * ROWS + i] += x3 * x + y3 * y + w3 * w


@compiled(FAST)
def _nothing(slopes: Any, steps: int) -> None:
    for i in range(STEP * steps):
        slopes[i] = 0
        slopes[ROWS + i] = 0
        slopes[2 * ROWS + i] = 0
        slopes[3 * ROWS + i] = 0


@compiled()
def _slopes(m: Any, z: Any, slopes: Any, steps: int) -> None:
    """Gradients of all monomials, Mᵀ z, (r ROWS,)."""
    for a in range(0, m.shape[1], FEW):
        own = slopes[a * ROWS : (a + FEW) * ROWS]
        _nothing(own, steps)
        for e in range(0, m.shape[0], COLUMNS):
            _slope(m, e, a, z[e * ROWS : (e + COLUMNS) * ROWS], own, steps)


@compiled(FAST)
def _pull_four(x: Any, slopes: Any, phi: Any, back: Any, found: Any, steps: int) -> None:
    """Gradients of four products with a channel: they join those of its factors, and those of the channel."""
    for i in range(STEP * steps):
        s0, s1, s2, s3 = slopes[i], slopes[ROWS + i], slopes[2 * ROWS + i], slopes[3 * ROWS + i]
        found[i] += (s0 * phi[i] + s1 * phi[ROWS + i]) + (s2 * phi[2 * ROWS + i] + s3 * phi[3 * ROWS + i])
        back[i] += x[i] * s0
        back[ROWS + i] += x[i] * s1
        back[2 * ROWS + i] += x[i] * s2
        back[3 * ROWS + i] += x[i] * s3


@compiled(FAST)
def _pull_one(x: Any, slopes: Any, phi: Any, back: Any, found: Any, steps: int) -> None:
    for i in range(STEP * steps):
        found[i] += slopes[i] * phi[i]
        back[i] += x[i] * slopes[i]


@compiled(FAST)
def _end(part: Any, found: Any, steps: int) -> None:
    for i in range(STEP * steps):
        found[i] += part[i]
        part[i] = 0


@compiled()
def _pull(x: Any, runs: Any, phi: Any, slopes: Any, part: Any, dx: Any, steps: int) -> None:
    """Gradients of rows (d ROWS,) from those of their monomials, which are lost; `part` begins with `ROWS` zeros."""
    dx[:] = 0
    part = part[:ROWS]
    for run in range(runs.shape[0] - 1, -1, -1):
        channel, start, stop, source = runs[run, 0], runs[run, 1], runs[run, 2], runs[run, 3]
        own, found = x[channel * ROWS : (channel + 1) * ROWS], dx[channel * ROWS : (channel + 1) * ROWS]
        count = stop - start
        for low in range(0, count, WIDTH):
            j, high = low, min(low + WIDTH, count)
            while j < high:
                step = FEW if j + FEW <= high else 1
                at, of = (start + j) * ROWS, (source + j) * ROWS
                size = step * ROWS
                of_these = own, slopes[at : at + size], phi[of : of + size], slopes[of : of + size], part, steps
                if step == FEW:
                    _pull_four(*of_these)
                else:
                    _pull_one(*of_these)
                j += step
            _end(part, found, steps)


@compiled(FAST)
def _in_units(rows: Any, unit: Any, steps: int) -> None:
    """Every channel of rows (d ROWS,) times its factor (d,)."""
    for e in range(unit.shape[0]):
        own = rows[e * ROWS : (e + 1) * ROWS]
        for i in range(STEP * steps):
            own[i] *= unit[e]


@compiled(leaf=False)
def _rooms(dim: int, columns: int, r: int, like: Any) -> Any:
    """Room for what `_pass` holds: rows, columns, what it finds, a part of that, monomials and their gradients."""
    found = -(-max(columns, dim) // COLUMNS) * COLUMNS * ROWS
    return (
        _room(dim * ROWS, like), _room(columns * ROWS, like), _room(found, like), _room(COLUMNS * ROWS, like),
        _room(r * ROWS, like), _room(r * ROWS, like),
    )  # fmt: skip


@compiled()
def _pass(
    x: Any,
    z: Any,
    first: int,
    of_z: int,
    n: int,
    unit: Any,
    m: Any,
    runs: Any,
    sums: Any,
    out: Any,
    dx: Any,
    rooms: Any,
) -> None:
    """What `compute` does, of n rows of one problem times units (d,): from the `first` one on, of z and out from `of_z` on."""
    own, given, found, part, phi, slopes = rooms
    dim, of_out = x.shape[1], -(-out.shape[1] // COLUMNS) * COLUMNS
    for low in range(0, n, ROWS):
        there = min(ROWS, n - low)
        steps = -(-there // STEP)
        _turn(x, first + low, there, own, steps)
        _in_units(own, unit, steps)
        _features(own, runs, phi, steps)
        if sums.shape[1] or dx.shape[1]:
            _turn(z, of_z + low, there, given, steps)
        if sums.shape[1]:
            _sum(phi, given, sums, steps)
        if of_out:
            _read(phi, m, part, found[: of_out * ROWS], steps)
            _turn_back(found, of_z + low, there, out)
        if dx.shape[1]:
            _slopes(m, given, slopes, steps)
            _pull(own, runs, phi, slopes, part, found[: dim * ROWS], steps)
            _in_units(found, unit, steps)
            _turn_back(found, first + low, there, dx)


@compiled(leaf=False)
def compute(x: Any, z: Any, m: Any, runs: Any, sums: Any, out: Any, dx: Any) -> None:
    """Φᵀ z joins sums (P, c, r); the first columns of Φ Mᵀ go to out (P, n, c'); and Σ_e z_e ∂(Φ Mᵀ)_e/∂x to dx (P, n, d).

    What has no columns is not computed. r and c are filled up to whole `FEW` and `COLUMNS`, but for those of z and out.
    """
    problems, n, dim = x.shape
    rooms = _rooms(dim, max(m.shape[1], sums.shape[1]), max(m.shape[2], sums.shape[2]), x)
    unit = np.ones(dim, x.dtype)
    for p in range(problems):
        _pass(x[p], z[p], 0, 0, n, unit, m[p], runs, sums[p], out[p], dx[p], rooms)


@compiled()
def _size(x: Any, first: int, n: int, tops: Any, room: Any) -> None:
    """The largest |entry| of each channel (d,) of n rows, NaN where one is not finite; room (2, STEP d)."""
    dim, most, lost, flat = x.shape[1], room[0], room[1], x.reshape(x.size)
    for j in range(STEP * dim):
        most[j] = lost[j] = 0
    # The last rows may be fewer than a step.
    for low in range(first, first + n, STEP):
        rows = flat[low * dim : min(low + STEP, first + n) * dim]
        for j in range(rows.size):
            size = abs(rows[j])
            most[j] = size if size > most[j] else most[j]
            # 0, or NaN for what is not finite.
            lost[j] += rows[j] * 0
    for e in range(dim):
        tops[e] = none = x.dtype.type(0)
        for j in range(e, STEP * dim, dim):
            tops[e] = max(tops[e], most[j])
            none += lost[j]
        tops[e] += none


@compiled(leaf=False)
def size(x: Any, begins: Any, lengths: Any, tops: Any) -> None:
    """The largest |entry| of each channel (P, D, m + 1, d) in documents whose rows stand in (P, N, d), as in `read`."""
    room = np.empty((2, STEP * x.shape[2]), x.dtype)
    for p in range(x.shape[0]):
        for j in range(begins.shape[0]):
            for side in range(begins.shape[1]):
                _size(x[p], begins[j, side], lengths[j, side], tops[p, j, side], room)


@compiled(FAST)
def _times(target: Any, source: Any) -> None:
    for a in range(target.shape[0]):
        target[a] *= source[a]


@compiled(FAST)
def _times_number(target: Any, factor: Any) -> None:
    for a in range(target.shape[0]):
        target[a] *= factor


@compiled()
def _product(sums: Any, w: Any, less: int, found: Any) -> None:
    """What is found (c, r) times the weights and the sums (m, c, r) of all views, or of those but one."""
    for e in range(found.shape[0]):
        _times(found[e], w)
        for view in range(sums.shape[0]):
            if view != less:
                _times(found[e], sums[view, e])


@compiled()
def _sum_views(
    x: Any, z: Any, begins: Any, lengths: Any, units: Any, runs: Any, none: Any, shares: Any, sums: Any, rooms: Any
) -> None:
    """Φᵀ z of every view of one document (m, c, r), times its share (m,)."""
    of_query = x.shape[0] - z.shape[0]
    for view in range(sums.shape[0]):
        own, first = sums[view], begins[view + 1]
        own[:] = 0
        _pass(x, z, first, first - of_query, lengths[view + 1], units[view + 1], none, runs, own, none, none, rooms)
        for e in range(own.shape[0]):
            _times_number(own[e], shares[view])


@compiled(leaf=False)
def read(x: Any, z: Any, w: Any, runs: Any, begins: Any, lengths: Any, counts: Any, units: Any, out: Any) -> None:
    """Numerators (P, n, c) of documents, whose rows stand among those of query and all views, one after another (P, N, d).

    z (P, N − n, c) of the views; of every document where rows begin, how many there are, and what sums over them are divided by
    (D, m + 1), and units (P, D, m + 1, d). w (r,) is filled up to whole `FEW`.
    """
    (problems, _, dim), views, columns = x.shape, begins.shape[1] - 1, -(-z.shape[2] // COLUMNS) * COLUMNS
    rooms, none = _rooms(dim, columns, w.shape[0], x), np.empty((0, 0), x.dtype)
    sums, combined = np.empty((views, columns, w.shape[0]), x.dtype), np.empty((columns, w.shape[0]), x.dtype)
    shares = np.empty(views, x.dtype)
    for p in range(problems):
        for j in range(begins.shape[0]):
            shares[:] = 1 / counts[j, 1:]
            _sum_views(x[p], z[p], begins[j], lengths[j], units[p, j], runs, none, shares, sums, rooms)
            combined[:] = 1
            _product(sums, w, -1, combined)
            first = begins[j, 0]
            _pass(x[p], none, first, first, lengths[j, 0], units[p, j, 0], combined, runs, none, out[p], none, rooms)


@compiled(leaf=False)
def pull(
    x: Any,
    z: Any,
    g: Any,
    w: Any,
    runs: Any,
    begins: Any,
    lengths: Any,
    counts: Any,
    units: Any,
    wanted: Any,
    dx: Any,
    dz: Any,
) -> None:
    """From gradients (P, n, c) of what `read` finds those of all rows (P, N, d) and of the first columns of z, (P, N − n, c').

    Of views that are not wanted nothing is written.
    """
    (problems, _, dim), views, columns = x.shape, begins.shape[1] - 1, -(-z.shape[2] // COLUMNS) * COLUMNS
    rooms, none = _rooms(dim, columns, w.shape[0], x), np.empty((0, 0), x.dtype)
    sums = np.empty((views, columns, w.shape[0]), x.dtype)
    matrices, shares = np.empty((3, columns, w.shape[0]), x.dtype), np.empty(views, x.dtype)
    combined, of_query, own = matrices[0], matrices[1], matrices[2]
    for p in range(problems):
        for j in range(begins.shape[0]):
            shares[:] = 1 / counts[j, 1:]
            unit, n, first = units[p, j], lengths[j], begins[j, 0]
            _sum_views(x[p], z[p], begins[j], n, unit, runs, none, shares, sums, rooms)
            combined[:] = 1
            _product(sums, w, -1, combined)
            of_query[:] = 0
            _pass(x[p], g[p], first, first, n[0], unit[0], combined, runs, of_query, none, dx[p], rooms)
            for view in range(views):
                if wanted[view]:
                    own[:] = of_query * shares[view]
                    _product(sums, w, view, own)
                    first = begins[j, view + 1]
                    of_z = first - (x.shape[1] - z.shape[1])
                    _pass(x[p], z[p], first, of_z, n[view + 1], unit[view + 1], own, runs, none, dz[p], dx[p], rooms)
