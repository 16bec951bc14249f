"""Loops over the rows of causal attention, compiled by numba: docs of what they compute are in `engines.causal_features`.

Rows pass in chunks of `ROWS`. What a chunk adds to the sums is added up apart, in a chain of `ROWS` terms, and joins the sums
before it with Kahan's compensation; nothing is ever subtracted. Sums are (views, columns, monomials), so that inner loops
run along monomials, of which as many are taken at a time as stay in the first cache. Compilers may reorder a sum over those,
where `FAST` says so, and nothing else; compensation is compiled without.

Symbols: q and k rows in units, (n, d) and (views, n, d); z = [v, 1] shares, (views, n, columns); w weights of the monomials;
`runs` (count, 4): channel, start, stop and source of `features.monomials.Run`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

ROWS = 64
# Rows whose sums are all held at once in the adjoint.
HELD = 8
# Bytes of the sums that inner loops go over again and again.
_CACHED = 24 << 10
FAST = {"reassoc", "contract"}


@njit(nogil=True, cache=True, fastmath=FAST)
def _features(x: Any, runs: Any, phi: Any) -> None:
    """All monomials (r,) of a row (d,)."""
    phi[0] = 1
    for i in range(runs.shape[0]):
        factor, start, source = x[runs[i, 0]], runs[i, 1], runs[i, 3]
        for j in range(runs[i, 2] - start):
            phi[start + j] = factor * phi[source + j]


@njit(nogil=True, cache=True, fastmath=FAST)
def _pulled(x: Any, runs: Any, phi: Any, slopes: Any, dx: Any) -> None:
    """Gradient (d,) of a row from that of its monomials (r,), which is lost."""
    dx[:] = 0
    for i in range(runs.shape[0] - 1, -1, -1):
        channel, start, source = runs[i, 0], runs[i, 1], runs[i, 3]
        factor, total = x[channel], dx.dtype.type(0)
        for j in range(runs[i, 2] - start):
            slope = slopes[start + j]
            total += slope * phi[source + j]
            slopes[source + j] += factor * slope
        dx[channel] += total


@njit(nogil=True, cache=True)
def _join(total: Any, lost: Any, part: Any) -> None:
    """Kahan's sum of (columns, monomials), with one more term that is then 0."""
    for e in range(total.shape[0]):
        for a in range(total.shape[1]):
            term = part[e, a] - lost[e, a]
            new = total[e, a] + term
            lost[e, a] = (new - total[e, a]) - term
            total[e, a] = new
            part[e, a] = 0


@njit(nogil=True, cache=True)
def _width(views: int, columns: int, itemsize: int) -> int:
    """Monomials at a time: a multiple of 16."""
    return max(16, _CACHED // (2 * views * columns * itemsize) // 16 * 16)


@njit(nogil=True, cache=True, fastmath=FAST)
def add_rows(k: Any, z: Any, runs: Any, phi: Any, part: Any) -> None:
    """Σ z Φ(k) of at most `ROWS` rows, added to `part` (views, columns, r); their monomials into `phi` (views, rows, r)."""
    views, rows, columns = z.shape
    r = part.shape[2]
    for v in range(views):
        for i in range(rows):
            _features(k[v, i], runs, phi[v, i])
    width = _width(1, columns, part.itemsize)
    for v in range(views):
        for low in range(0, r, width):
            high = min(low + width, r)
            for i in range(rows):
                for e in range(columns):
                    factor = z[v, i, e]
                    for a in range(low, high):
                        part[v, e, a] += factor * phi[v, i, a]


@njit(nogil=True, cache=True, fastmath=FAST)
def read(q: Any, k: Any, z: Any, w: Any, runs: Any, total: Any, lost: Any, out: Any) -> None:
    """Numerators (n, columns) of rows that see the sums and all rows up to their own; the sums then hold all rows."""
    n = q.shape[0]
    views, _, columns = z.shape
    r = w.shape[0]
    phi_q, phi = np.empty((ROWS, r), q.dtype), np.empty((views, ROWS, r), q.dtype)
    part = np.zeros(total.shape, q.dtype)
    width = _width(views, columns, part.itemsize)
    product = np.empty(width, q.dtype)
    for begin in range(0, n, ROWS):
        rows = min(ROWS, n - begin)
        for i in range(rows):
            _features(q[begin + i], runs, phi_q[i])
            for a in range(r):
                phi_q[i, a] *= w[a]
            for v in range(views):
                _features(k[v, begin + i], runs, phi[v, i])
            out[begin + i] = 0
        for low in range(0, r, width):
            high = min(low + width, r)
            for i in range(rows):
                for e in range(columns):
                    found = out.dtype.type(0)
                    if views == 2:
                        z0, z1 = z[0, begin + i, e], z[1, begin + i, e]
                        for a in range(low, high):
                            s0 = part[0, e, a] + z0 * phi[0, i, a]
                            s1 = part[1, e, a] + z1 * phi[1, i, a]
                            part[0, e, a], part[1, e, a] = s0, s1
                            found += phi_q[i, a] * ((total[0, e, a] + s0) * (total[1, e, a] + s1))
                    else:
                        for a in range(low, high):
                            product[a - low] = phi_q[i, a]
                        for v in range(views):
                            factor = z[v, begin + i, e]
                            for a in range(low, high):
                                s = part[v, e, a] + factor * phi[v, i, a]
                                part[v, e, a] = s
                                product[a - low] *= total[v, e, a] + s
                        for a in range(high - low):
                            found += product[a]
                    out[begin + i, e] += found
        for v in range(views):
            _join(total[v], lost[v], part[v])


@njit(nogil=True, cache=True, fastmath=FAST)
def _pull_chunk(
    q: Any, k: Any, z: Any, g: Any, w: Any, runs: Any, total: Any, behind: Any, part: Any,
    phi_q: Any, phi: Any, slopes_q: Any, slopes: Any, dq: Any, dk: Any, dz: Any,
) -> None:  # fmt: skip
    """Gradients of the rows of a chunk: `total` are the sums before it, `behind` those of the gradients after it.

    What the chunk adds to the latter goes into `part`. `phi_q` and `phi` have its monomials; slopes are room for their gradients.
    """
    views, rows, columns = z.shape
    r = w.shape[0]
    width = _width(views, columns, part.itemsize)
    groups = (rows + HELD - 1) // HELD
    kept = np.empty((groups, views, columns, width), q.dtype)
    sums = np.empty((HELD, views, columns, width), q.dtype)
    running = np.empty((views, columns, width), q.dtype)
    others = np.empty(width, q.dtype)
    slopes_q[:] = 0
    slopes[:] = 0
    dz[:] = 0
    for low in range(0, r, width):
        count = min(low + width, r) - low
        running[:] = 0
        for i in range(rows):
            if i % HELD == 0:
                kept[i // HELD] = running
            for v in range(views):
                for e in range(columns):
                    factor = z[v, i, e]
                    for a in range(count):
                        running[v, e, a] += factor * phi[v, i, low + a]
        for group in range(groups - 1, -1, -1):
            first = group * HELD
            last = min(first + HELD, rows)
            running[:] = kept[group]
            for i in range(first, last):
                for v in range(views):
                    for e in range(columns):
                        factor = z[v, i, e]
                        for a in range(count):
                            s = running[v, e, a] + factor * phi[v, i, low + a]
                            running[v, e, a] = s
                            sums[i - first, v, e, a] = total[v, e, low + a] + s
            for i in range(last - 1, first - 1, -1):
                here = sums[i - first]
                for e in range(columns):
                    slope = g[i, e]
                    if views == 2:
                        z0, z1, dz0, dz1 = z[0, i, e], z[1, i, e], dz.dtype.type(0), dz.dtype.type(0)
                        for a in range(count):
                            s0, s1 = here[0, e, a], here[1, e, a]
                            slopes_q[i, low + a] += slope * (s0 * s1)
                            x = slope * phi_q[i, low + a]
                            g0 = part[0, e, low + a] + x * s1
                            g1 = part[1, e, low + a] + x * s0
                            part[0, e, low + a], part[1, e, low + a] = g0, g1
                            g0, g1 = behind[0, e, low + a] + g0, behind[1, e, low + a] + g1
                            slopes[0, i, low + a] += z0 * g0
                            slopes[1, i, low + a] += z1 * g1
                            dz0 += phi[0, i, low + a] * g0
                            dz1 += phi[1, i, low + a] * g1
                        dz[0, i, e] += dz0
                        dz[1, i, e] += dz1
                        continue
                    for a in range(count):
                        others[a] = slope
                    for v in range(views):
                        for a in range(count):
                            others[a] *= here[v, e, a]
                    for a in range(count):
                        slopes_q[i, low + a] += others[a]
                    for v in range(views):
                        for a in range(count):
                            others[a] = slope * phi_q[i, low + a]
                        for u in range(views):
                            if u != v:
                                for a in range(count):
                                    others[a] *= here[u, e, a]
                        factor, found = z[v, i, e], dz.dtype.type(0)
                        for a in range(count):
                            own = part[v, e, low + a] + others[a]
                            part[v, e, low + a] = own
                            own = behind[v, e, low + a] + own
                            slopes[v, i, low + a] += factor * own
                            found += phi[v, i, low + a] * own
                        dz[v, i, e] += found
    for i in range(rows):
        for a in range(r):
            slopes_q[i, a] *= w[a]
    for i in range(rows):
        # The monomials of the query are weighted no more where they are pulled back.
        _features(q[i], runs, phi_q[i])
        _pulled(q[i], runs, phi_q[i], slopes_q[i], dq[i])
        for v in range(views):
            _pulled(k[v, i], runs, phi[v, i], slopes[v, i], dk[v, i])


@njit(nogil=True, cache=True, fastmath=FAST)
def pull(
    q: Any, k: Any, z: Any, g: Any, w: Any, runs: Any, total: Any, lost: Any, behind: Any, missed: Any,
    dq: Any, dk: Any, dz: Any,
) -> None:  # fmt: skip
    """Gradients of q, k and z from those of the numerators, g (n, columns); `behind` gets those of the sums that all rows see.

    The sums before every √(n / ROWS)-th chunk are kept, and then those before every chunk between two of them.
    """
    n = q.shape[0]
    views, _, columns = z.shape
    r = w.shape[0]
    chunks = (n + ROWS - 1) // ROWS
    inner = max(1, int(np.ceil(np.sqrt(chunks))))
    segments = (chunks + inner - 1) // inner
    starts = np.empty((segments, 2, views, columns, r), q.dtype)
    between = np.empty((inner, views, columns, r), q.dtype)
    part = np.zeros((views, columns, r), q.dtype)
    phi_q, phi = np.empty((ROWS, r), q.dtype), np.empty((views, ROWS, r), q.dtype)
    slopes_q, slopes = np.empty((ROWS, r), q.dtype), np.empty((views, ROWS, r), q.dtype)
    for chunk in range(chunks):
        if chunk % inner == 0:
            starts[chunk // inner, 0], starts[chunk // inner, 1] = total, lost
        if chunk == chunks - 1:
            break
        begin = chunk * ROWS
        add_rows(k[:, begin : begin + ROWS], z[:, begin : begin + ROWS], runs, phi, part)
        for v in range(views):
            _join(total[v], lost[v], part[v])
    for segment in range(segments - 1, -1, -1):
        total[:], lost[:] = starts[segment, 0], starts[segment, 1]
        first = segment * inner
        last = min(first + inner, chunks)
        for chunk in range(first, last):
            between[chunk - first] = total
            if chunk < last - 1:
                begin = chunk * ROWS
                add_rows(k[:, begin : begin + ROWS], z[:, begin : begin + ROWS], runs, phi, part)
                for v in range(views):
                    _join(total[v], lost[v], part[v])
        for chunk in range(last - 1, first - 1, -1):
            begin, end = chunk * ROWS, min((chunk + 1) * ROWS, n)
            rows = end - begin
            for i in range(rows):
                _features(q[begin + i], runs, phi_q[i])
                for a in range(r):
                    phi_q[i, a] *= w[a]
                for v in range(views):
                    _features(k[v, begin + i], runs, phi[v, i])
            _pull_chunk(
                q[begin:end], k[:, begin:end], z[:, begin:end], g[begin:end], w, runs, between[chunk - first], behind,
                part, phi_q[:rows], phi[:, :rows], slopes_q[:rows], slopes[:, :rows], dq[begin:end], dk[:, begin:end],
                dz[:, begin:end],
            )  # fmt: skip
            for v in range(views):
                _join(behind[v], missed[v], part[v])
