"""Loops over tuples of keys, compiled: what `engines.tuples` computes of a block of scores, for the exact method.

Symbols, for each of P problems: s (d, n) query rows, k (d, N) keys and v (c, N) values and ones of tuples, h (c, n), weights
f = e^(kᵀ s − shift) (N, n). All arrays are contiguous, and of one dtype. A tuple is a pair of one on the left with one on the
right: number i of the pairs is made of i // N_right and i % N_right, when it is its turn, so that pairs take no memory.

Query rows are taken `LANES` or twice as many at a time, and tuples `TUPLES` at a time, so that their scores stay in the caches
until all that needs them is done. Loops run over query rows, which lie next to each other. A product takes four rows of its result
and eight terms at a time, or four and three where it sums over query rows.

Sums over tuples have a chain of `TUPLES` terms, and then one for each of these; sums over query rows one of as many as are taken,
and then one for each of these.
"""

from __future__ import annotations

from functools import cache
from math import factorial, log
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from .causal import _room
from .jit import compiled

# Query rows are taken in so many at a time, or twice as many; and tuples, which are filled up to a whole number of the last.
LANES, TUPLES, _WHOLE_TUPLES = 128, 64, 8
# Loops over a number of rows that is known when they are compiled take two thirds of the time. The length of a tuple is known.
ONCE, TWICE = (0,), (0, 0)
# The same for products: whether they begin sums or join them.
_NEW, _FURTHER = (), (0,)
FAST = {"reassoc", "contract"}

# e^x = 2^n e^r with n the whole number next to x / ln 2. The first part of ln 2 has few digits, so that n times it is exact.
_PER_LN_2 = 1 / log(2)
_LN_2 = {4: (0.693359375, -2.121944400546905827679e-4), 8: (6.93147180369123816490e-1, 1.90821492927058770002e-10)}
# Added to a number and subtracted it leaves the next whole one, which the last bits hold in between.
_WHOLE = {4: 1.5 * 2.0**23, 8: 1.5 * 2.0**52}
# Below the first e^x counts as 0, above the last as infinite. The first is at twice the smallest normal number, so that the least
# sum that `features.balance` takes for right is so to a unit in the last place, and not to half of one.
_RANGE = {4: (-86.6, 88.7228317), 8: (-708.0, 709.782712893384)}
# Terms of Taylor's sum.
_TERMS = {4: 8, 8: 14}
_TAYLOR = [1 / factorial(t) for t in range(14)]


@intrinsic  # type: ignore[untyped-decorator]
def _half_power(context: Any, shifted: Any) -> Any:
    """2^(n − 1) of n + `_WHOLE`, by its bits: the last ones hold n, which with an offset is an exponent in its place."""
    integer, digits, offset = (types.int32, 23, 126) if shifted == types.float32 else (types.int64, 52, 1022)

    def lower(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = context.get_value_type(integer)
        exponent = builder.add(builder.bitcast(arguments[0], whole), whole(offset))
        return builder.bitcast(builder.shl(exponent, whole(digits)), arguments[0].type)

    return shifted(shifted), lower


@cache
def exponents(dtype: Any) -> tuple[Any, ...]:
    """Numbers of a dtype that the loops take exponentials with, Taylor's coefficients from the seventh on."""
    size, number = np.dtype(dtype).itemsize, np.dtype(dtype).type
    return tuple(number(x) for x in (_PER_LN_2, _WHOLE[size], *_LN_2[size], *_RANGE[size], *_TAYLOR[: _TERMS[size]]))


@compiled({"contract"}, inline=True)
def _parts(x: Any, numbers: Any) -> Any:
    """e^r and 2^(n − 1) of x = r + n ln 2. Taylor's sum is off by a tenth of a unit of rounding."""
    shifted = x * numbers[0] + numbers[1]
    n = shifted - numbers[1]
    r = (x - n * numbers[2]) - n * numbers[3]
    p = numbers[len(numbers) - 1]
    for t in range(len(numbers) - 2, 7, -1):
        p = p * r + numbers[t]
    return (p * (r * r) + r) + numbers[6], _half_power(shifted)


@compiled({"contract"})
def _exponential(x: Any, shift: Any, lanes: Any, numbers: Any) -> None:
    """Replace x by e^(x − shift)."""
    rows, lowest, most = LANES * len(lanes), numbers[4], numbers[5]
    zero, two, infinite = x.dtype.type(0), x.dtype.type(2), x.dtype.type(np.inf)
    for i in range(rows):
        y = x[i] - shift[i]
        p, half = _parts(min(max(y, lowest), most), numbers)
        p = p * half * two
        p = infinite if y > most else p
        p = zero if y < lowest else p
        x[i] = p if y == y else y


@compiled({"contract"})
def _of_small(x: Any, lanes: Any, numbers: Any) -> None:
    """Replace x by e^x where nothing is large: half of the operations."""
    rows, two = LANES * len(lanes), x.dtype.type(2)
    for i in range(rows):
        p, half = _parts(x[i], numbers)
        x[i] = p * (half * two)


@compiled()
def _weights(x: Any, shift: Any, less: Any, lanes: Any, numbers: Any) -> None:
    """Replace x (tuples rows,) by e^(x − shift), one row after another; by e^x where nothing is large, unless it is `less`."""
    rows = LANES * len(lanes)
    for t in range(0, x.shape[0], rows):
        own = x[t : t + rows]
        if less:
            _exponential(own, shift, lanes, numbers)
        else:
            _of_small(own, lanes, numbers)


@compiled(FAST)
def _eight(m: Any, down: int, along: int, x: Any, lanes: Any, sums: Any, further: Any) -> None:
    """Eight rows of x times their factors join four sums, or are those; factors lie `down` apart for sums, `along` for rows."""
    rows = LANES * len(lanes)
    a0, a1, a2, a3 = m[0], m[down], m[2 * down], m[3 * down]
    m = m[along:]
    b0, b1, b2, b3 = m[0], m[down], m[2 * down], m[3 * down]
    m = m[along:]
    c0, c1, c2, c3 = m[0], m[down], m[2 * down], m[3 * down]
    m = m[along:]
    d0, d1, d2, d3 = m[0], m[down], m[2 * down], m[3 * down]
    m = m[along:]
    e0, e1, e2, e3 = m[0], m[down], m[2 * down], m[3 * down]
    m = m[along:]
    f0, f1, f2, f3 = m[0], m[down], m[2 * down], m[3 * down]
    m = m[along:]
    g0, g1, g2, g3 = m[0], m[down], m[2 * down], m[3 * down]
    m = m[along:]
    h0, h1, h2, h3 = m[0], m[down], m[2 * down], m[3 * down]
    for i in range(rows):
        a, b, c, d = x[i], x[rows + i], x[2 * rows + i], x[3 * rows + i]
        e, f, g, h = x[4 * rows + i], x[5 * rows + i], x[6 * rows + i], x[7 * rows + i]
        w0 = a0 * a + b0 * b + c0 * c + d0 * d + e0 * e + f0 * f + g0 * g + h0 * h
        w1 = a1 * a + b1 * b + c1 * c + d1 * d + e1 * e + f1 * f + g1 * g + h1 * h
        w2 = a2 * a + b2 * b + c2 * c + d2 * d + e2 * e + f2 * f + g2 * g + h2 * h
        w3 = a3 * a + b3 * b + c3 * c + d3 * d + e3 * e + f3 * f + g3 * g + h3 * h
        if len(further):
            sums[i] += w0
            sums[rows + i] += w1
            sums[2 * rows + i] += w2
            sums[3 * rows + i] += w3
        else:
            sums[i], sums[rows + i], sums[2 * rows + i], sums[3 * rows + i] = w0, w1, w2, w3


@compiled(FAST)
def _one(m: Any, down: int, x: Any, lanes: Any, sums: Any, further: Any) -> None:
    """One row of x times its factors joins four sums, or is those."""
    rows = LANES * len(lanes)
    a0, a1, a2, a3 = m[0], m[down], m[2 * down], m[3 * down]
    for i in range(rows):
        a = x[i]
        if len(further):
            sums[i] += a0 * a
            sums[rows + i] += a1 * a
            sums[2 * rows + i] += a2 * a
            sums[3 * rows + i] += a3 * a
        else:
            sums[i], sums[rows + i], sums[2 * rows + i], sums[3 * rows + i] = a0 * a, a1 * a, a2 * a, a3 * a


@compiled(FAST)
def _into_one(m: Any, x: Any, lanes: Any, sums: Any) -> None:
    """Eight rows of x times their factors, next to each other, join one sum."""
    rows = LANES * len(lanes)
    a, b, c, d, e, f, g, h = m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]
    for i in range(rows):
        low = a * x[i] + b * x[rows + i] + c * x[2 * rows + i] + d * x[3 * rows + i]
        high = e * x[4 * rows + i] + f * x[5 * rows + i] + g * x[6 * rows + i] + h * x[7 * rows + i]
        sums[i] += low + high


@compiled()
def _scores(m: Any, terms: int, x: Any, lanes: Any, found: Any) -> None:
    """mᵀ x for factors (terms, TUPLES): a row for each tuple, as many as `found` (tuples rows,) has."""
    rows = LANES * len(lanes)
    for t in range(0, found.shape[0] // rows, 4):
        own, done = found[t * rows : (t + 4) * rows], 1
        if terms < 8:
            _one(m[t:], 1, x, lanes, own, _NEW)
        else:
            _eight(m[t:], 1, TUPLES, x, lanes, own, _NEW)
            done = 8
        for j in range(done, terms - 7, 8):
            _eight(m[j * TUPLES + t :], 1, TUPLES, x[j * rows :], lanes, own, _FURTHER)
        for j in range(done + (terms - done) // 8 * 8, terms):
            _one(m[j * TUPLES + t :], 1, x[j * rows :], lanes, own, _FURTHER)


@compiled(FAST)
def _join(part: Any, found: Any) -> None:
    """A part of sums joins them, and is 0 from then on."""
    for i in range(part.shape[0]):
        found[i] += part[i]
        part[i] = 0


@compiled()
def _sums(m: Any, terms: int, x: Any, lanes: Any, part: Any, found: Any) -> None:
    """The product m x joins `found` (terms rows,), for factors (terms, TUPLES) and x (tuples rows,); `part` (4 rows,) is 0."""
    rows = LANES * len(lanes)
    tuples, whole = x.shape[0] // rows, terms // 4 * 4
    for e in range(0, whole, 4):
        for t in range(0, tuples, 8):
            _eight(m[e * TUPLES + t :], TUPLES, 1, x[t * rows :], lanes, part, _FURTHER)
        _join(part, found[e * rows : (e + 4) * rows])
    for e in range(whole, terms):
        for t in range(0, tuples, 8):
            _into_one(m[e * TUPLES + t :], x[t * rows :], lanes, part)
        _join(part[:rows], found[e * rows :])


@compiled(FAST)
def _dot(f: Any, z: Any, lanes: Any) -> Any:
    """Sums over query rows of the products of four tuples and three columns."""
    rows = LANES * len(lanes)
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = f.dtype.type(0)
    for i in range(rows):
        x, y, w = z[i], z[rows + i], z[2 * rows + i]
        p = f[i]
        a0 += p * x
        b0 += p * y
        c0 += p * w
        p = f[rows + i]
        a1 += p * x
        b1 += p * y
        c1 += p * w
        p = f[2 * rows + i]
        a2 += p * x
        b2 += p * y
        c2 += p * w
        p = f[3 * rows + i]
        a3 += p * x
        b3 += p * y
        c3 += p * w
    return (a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3)


@compiled()
def _put_four(found: Any, four: Any) -> None:
    found[0], found[1], found[2], found[3] = four


@compiled()
def _of_tuples(f: Any, z: Any, lanes: Any, columns: int, found: Any) -> None:
    """The product z fᵀ of z (columns rows,) and f (tuples rows,) in a tile (columns TUPLES,), and up to two rows more."""
    rows = LANES * len(lanes)
    for e in range(0, columns, 3):
        own = found[e * TUPLES :]
        for t in range(0, f.shape[0] // rows, 4):
            x, y, w = _dot(f[t * rows : (t + 4) * rows], z[e * rows : (e + 3) * rows], lanes)
            _put_four(own[t:], x)
            _put_four(own[TUPLES + t :], y)
            _put_four(own[2 * TUPLES + t :], w)


@compiled()
def _copy(x: Any, target: Any) -> None:
    for i in range(x.shape[0]):
        target[i] = x[i]


@compiled()
def _tile(x: Any, begin: int, count: int, size: int, tile: Any) -> None:
    """Columns of (c, n) as rows (c size,), with zeros behind."""
    for e in range(x.shape[0]):
        own = tile[e * size : (e + 1) * size]
        _copy(x[e, begin : begin + count], own)
        own[count:] = 0


@compiled()
def _tile_alike(x: Any, begin: int, count: int, size: int, tile: Any) -> None:
    """Columns of (c, n) as rows (c size,), with the last one behind: what is infinite stays where it is."""
    for e in range(x.shape[0]):
        own = tile[e * size : (e + 1) * size]
        _copy(x[e, begin : begin + count], own)
        own[count:] = own[count - 1]


@compiled(FAST)
def _times_one(left: Any, j: int, right: Any, k: int, stop: int, half: int, tile: Any) -> None:
    """Products of tuple j of the left (c, N) with those from k to `stop` of the right in columns of a tile, c rows of `TUPLES`.

    They are of `half` complex numbers, if that is not 0.
    """
    for e in range(half):
        re, im, x, y = left[e, j], left[half + e, j], right[e, k:stop], right[half + e, k:stop]
        own, other = tile[e * TUPLES :], tile[(half + e) * TUPLES :]
        for i in range(x.shape[0]):
            own[i], other[i] = re * x[i] - im * y[i], re * y[i] + im * x[i]
    for e in range(2 * half, left.shape[0]):
        factor, x, own = left[e, j], right[e, k:stop], tile[e * TUPLES :]
        for i in range(x.shape[0]):
            own[i] = factor * x[i]


@compiled()
def _pairs(left: Any, right: Any, half: int, begin: int, count: int, tile: Any) -> None:
    """So many pairs from `begin` in a tile (c TUPLES,)."""
    n, at = right.shape[1], 0
    while at < count:
        j, k = (begin + at) // n, (begin + at) % n
        stop = min(n, k + count - at)
        _times_one(left, j, right, k, stop, half, tile[at:])
        at += stop - k


@compiled()
def _fill(tile: Any, count: int, alike: Any) -> None:
    """Behind so many tuples of a tile zeros, or the last one, so that what is infinite stays where it is."""
    if count < TUPLES:
        for e in range(0, tile.shape[0], TUPLES):
            tile[e + count : e + TUPLES] = tile[e + count - 1] if alike else 0


@compiled(FAST)
def _from_one(g: Any, left: Any, j: int, right: Any, k: int, stop: int, half: int, of_left: Any, of_right: Any) -> None:
    """Gradients g of what `_times_one` makes, a tile, join those of both sides: of complex numbers b̄ g and ā g."""
    zero = right.dtype.type(0)
    for e in range(half):
        re, im, x, y = left[e, j], left[half + e, j], right[e, k:stop], right[half + e, k:stop]
        u, w, of_x, of_y = g[e * TUPLES :], g[(half + e) * TUPLES :], of_right[e, k:stop], of_right[half + e, k:stop]
        own, other = zero, zero
        for i in range(x.shape[0]):
            own += x[i] * u[i] + y[i] * w[i]
            other += x[i] * w[i] - y[i] * u[i]
            of_x[i] += re * u[i] + im * w[i]
            of_y[i] += re * w[i] - im * u[i]
        of_left[e, j] += own
        of_left[half + e, j] += other
    for e in range(2 * half, of_left.shape[0]):
        factor, x, u, of_x, own = left[e, j], right[e, k:stop], g[e * TUPLES :], of_right[e, k:stop], zero
        for i in range(x.shape[0]):
            own += x[i] * u[i]
            of_x[i] += factor * u[i]
        of_left[e, j] += own


@compiled()
def _of_pairs(g: Any, left: Any, right: Any, half: int, begin: int, count: int, of_left: Any, of_right: Any) -> None:
    """The gradients g of so many pairs from `begin`, a tile, join those of both sides, of as many channels as these have."""
    n, at = right.shape[1], 0
    while at < count:
        j, k = (begin + at) // n, (begin + at) % n
        stop = min(n, k + count - at)
        _from_one(g[at:], left, j, right, k, stop, half, of_left, of_right)
        at += stop - k


@compiled()
def _hide(left: Any, right: Any, n: int, begin: int, count: int, lanes: Any, x: Any) -> None:
    """Scores −∞ of pairs, n to one of the left, of which a side is not seen, and of those that are not there."""
    rows = LANES * len(lanes)
    for t in range(x.shape[0] // rows):
        j, k = (begin + t) // n, (begin + t) % n
        if t >= count or (left.shape[0] and not left[j]) or (right.shape[0] and not right[k]):
            x[t * rows : (t + 1) * rows] = -np.inf


@compiled()
def _raise(x: Any, lanes: Any, top: Any) -> None:
    rows = LANES * len(lanes)
    for i in range(rows):
        top[i] = max(top[i], x[i])


@compiled()
def _finite(x: Any, lanes: Any, found: Any) -> None:
    rows = LANES * len(lanes)
    for i in range(rows):
        found[i] = 0 if x[i] == -np.inf else x[i]


@compiled()
def _times(x: Any, lanes: Any, found: Any) -> None:
    rows = LANES * len(lanes)
    for i in range(rows):
        found[i] *= x[i]


@compiled()
def _to_top(x: Any, lanes: Any, top: Any, before: Any, shift: Any, found: Any, numbers: Any) -> None:
    """The largest scores with those of x, what to subtract, and `found` (c rows,), less the same."""
    rows = LANES * len(lanes)
    _copy(top, before)
    for t in range(0, x.shape[0], rows):
        _raise(x[t:], lanes, top)
    _finite(top, lanes, shift)
    _weights(before, shift, True, lanes, numbers)
    for e in range(0, found.shape[0], rows):
        _times(before, lanes, found[e:])


@compiled(leaf=False)
def attend(s: Any, left: Any, right: Any, seen: Any, half: int, lanes: Any, numbers: Any, total: Any, top: Any) -> None:
    """The product v f goes to total (P, c, n), with `top` (P, 1, n), the largest score, as the shift, or none if it has no rows.

    `left` and `right` are keys (P, d, N) and values (P, c, N), the keys `half` complex numbers if that is not 0. They are seen
    where those of `seen`, (P, N) for both, are not 0; all if they have none.
    """
    problems, dim, n = s.shape
    columns, tuples, rows = right[1].shape[1], left[0].shape[2] * right[0].shape[2], LANES * len(lanes)
    q, x = _room(dim * rows, s), _room(TUPLES * rows, s)
    keys, values = _room(dim * TUPLES, s), _room(columns * TUPLES, s)
    found, part = _room(columns * rows, s), _room(4 * rows, s)
    best, before, shift = _room(rows, s), _room(rows, s), _room(rows, s)
    for p in range(problems):
        for low in range(0, n, rows):
            count = min(rows, n - low)
            _tile_alike(s[p], low, count, rows, q)
            found[:] = 0
            best[:] = -np.inf
            for begin in range(0, tuples, TUPLES):
                there = min(TUPLES, tuples - begin)
                _pairs(left[0][p], right[0][p], half, begin, there, keys)
                _pairs(left[1][p], right[1][p], 0, begin, there, values)
                _fill(keys, there, True)
                _fill(values, there, False)
                own = x[: -(-there // _WHOLE_TUPLES) * _WHOLE_TUPLES * rows]
                _scores(keys, dim, q, lanes, own)
                if top.shape[1]:
                    _hide(seen[0][p], seen[1][p], right[0].shape[2], begin, there, lanes, own)
                    _to_top(own, lanes, best, before, shift, found, numbers)
                _weights(own, shift, top.shape[1] > 0, lanes, numbers)
                _sums(values, columns, own, lanes, part, found)
            for e in range(columns):
                _copy(found[e * rows : e * rows + count], total[p, e, low:])
            if top.shape[1]:
                _copy(best[:count], top[p, 0, low:])


@compiled(leaf=False)
def pull(
    s: Any, h: Any, shift: Any, left: Any, right: Any, seen: Any, half: int, lanes: Any, numbers: Any, ds: Any, of_left: Any,
    of_right: Any,
) -> None:  # fmt: skip
    """With slopes p = f ∘ vᵀ h, k p goes to ds (P, d, n), and gradients s pᵀ of keys and h fᵀ of values join those of both sides.

    `shift` (P, 1, n) may have no rows; others as in `attend`. Gradients of values are of as many columns as those of the left have.
    """
    problems, dim, n = s.shape
    columns, tuples, rows = right[1].shape[1], left[0].shape[2] * right[0].shape[2], LANES * len(lanes)
    pulled = of_left[1].shape[1]
    # Columns in threes: what is behind the last ones is multiplied, and not used.
    q, g = _room((dim + 2) * rows, s), _room((columns + 2) * rows, s)
    x, slopes, less = _room(TUPLES * rows, s), _room(TUPLES * rows, s), _room(rows, s)
    keys, values = _room(dim * TUPLES, s), _room(columns * TUPLES, s)
    found, part, of_pairs = _room(dim * rows, s), _room(4 * rows, s), _room((max(dim, pulled) + 2) * TUPLES, s)
    for p in range(problems):
        for low in range(0, n, rows):
            count = min(rows, n - low)
            _tile_alike(s[p], low, count, rows, q)
            _tile(h[p], low, count, rows, g)
            if shift.shape[1]:
                _tile_alike(shift[p], low, count, rows, less)
            found[:] = 0
            for begin in range(0, tuples, TUPLES):
                there = min(TUPLES, tuples - begin)
                _pairs(left[0][p], right[0][p], half, begin, there, keys)
                _pairs(left[1][p], right[1][p], 0, begin, there, values)
                _fill(keys, there, True)
                _fill(values, there, False)
                whole = -(-there // _WHOLE_TUPLES) * _WHOLE_TUPLES * rows
                own, of_own = x[:whole], slopes[:whole]
                _scores(keys, dim, q, lanes, own)
                if shift.shape[1]:
                    _hide(seen[0][p], seen[1][p], right[0].shape[2], begin, there, lanes, own)
                _weights(own, less, shift.shape[1] > 0, lanes, numbers)
                _of_tuples(own, g, lanes, pulled, of_pairs)
                _of_pairs(of_pairs, left[1][p], right[1][p], 0, begin, there, of_left[1][p], of_right[1][p])
                _scores(values, columns, g, lanes, of_own)
                for t in range(0, whole, rows):
                    _times(own[t:], lanes, of_own[t:])
                _of_tuples(of_own, q, lanes, dim, of_pairs)
                _of_pairs(of_pairs, left[0][p], right[0][p], half, begin, there, of_left[0][p], of_right[0][p])
                _sums(keys, dim, of_own, lanes, part, found)
            for e in range(dim):
                _copy(found[e * rows : e * rows + count], ds[p, e, low:])
