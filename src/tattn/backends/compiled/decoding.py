"""A few tokens of a stream, compiled: what `state.decoding` computes of their key rows and their queries, one after another.

For each of P streams: rows (P, n, d) and values (P, n, dv) of n tokens, sums and rests (P, r, c) with c = dv + 1. Sums are added as
`state.sums.add_up` adds, without reordering; a read-out has `CHAIN` terms in any order, and then one for each of these.

Complex channels are read out of sums of complex monomials, (P, c, 2 h) for h of these, real parts first, which are kept beside.

Where keys decay, all sums are multiplied by a factor of their stream before a token joins them; it is 1 where they do not.
"""

from __future__ import annotations

from math import inf, ldexp, log, log2, nan
from typing import Any

import numpy as np

from .jit import compiled

CHAIN = 128
FAST = {"reassoc", "contract"}


@compiled()
def _monomials(x: Any, unit: Any, most: Any, runs: Any, phi: Any) -> None:
    """All monomials (r,) of a row (d,) in units, NaN for entries that arithmetic would not hold the powers of."""
    phi[0] = 1
    for i in range(runs.shape[0]):
        channel, start, stop, source = runs[i, 0], runs[i, 1], runs[i, 2], runs[i, 3]
        factor = x[channel] * unit
        if not abs(factor) <= most:
            factor = x.dtype.type(nan)
        _scale(factor, phi[source : source + stop - start], phi[start:stop])


@compiled()
def _complex_monomials(x: Any, unit: Any, most: Any, runs: Any, phi: Any) -> None:
    """Real and imaginary parts (2 h,) of the complex monomials of a row, otherwise as `_monomials`."""
    dim, half = x.shape[0] // 2, phi.shape[0] // 2
    phi[0], phi[half] = 1, 0
    for i in range(runs.shape[0]):
        channel, start, stop, source = runs[i, 0], runs[i, 1], runs[i, 2], runs[i, 3]
        re, im = x[channel % dim] * unit, x[dim + channel % dim] * unit
        if not (abs(re) <= most and abs(im) <= most):
            re = im = x.dtype.type(nan)
        if channel >= dim:
            im = -im
        end = source + stop - start
        _turn(
            re, im, phi[source:end], phi[half + source : half + end], phi[start:stop], phi[half + start : half + stop]
        )


@compiled(FAST)
def _turn(re: Any, im: Any, x: Any, y: Any, new_x: Any, new_y: Any) -> None:
    for a in range(x.shape[0]):
        new_x[a] = re * x[a] - im * y[a]
        new_y[a] = re * y[a] + im * x[a]


@compiled()
def _scale(factor: Any, source: Any, target: Any) -> None:
    for a in range(target.shape[0]):
        target[a] = factor * source[a]


@compiled()
def _add(term: Any, sums: Any, rests: Any, new_sums: Any, new_rests: Any) -> None:
    """Sums and rests with one more term, exactly but for a rounding of twice the digits."""
    for i in range(term.shape[0]):
        plain = sums[i] + term[i]
        part = plain - sums[i]
        rest = ((sums[i] - (plain - part)) + (term[i] - part)) + rests[i]
        total = plain + rest
        new_sums[i] = total
        new_rests[i] = rest - (total - plain)


@compiled()
def _multiply(factor: Any, x: Any, product: Any) -> None:
    for i in range(x.shape[0]):
        product[i] *= factor * x[i]


@compiled()
def _factor(factors: Any, p: Any) -> Any:
    """That of a stream, in the dtype of all (P,); NaN for what is no factor."""
    return factors[p] if 0 <= factors[p] <= 1 else factors.dtype.type(nan)


@compiled()
def _fade(factor: Any, sums: Any, rests: Any, new_sums: Any, new_rests: Any) -> None:
    """Sums and rests times a factor."""
    if factor > 0.5:
        # Close to 1 what is taken away is what is rounded: many tokens would lose a unit each otherwise. The difference is exact.
        less = factor - sums.dtype.type(1)
        for i in range(sums.shape[0]):
            term = sums[i] * less
            plain = sums[i] + term
            part = plain - sums[i]
            rest = ((sums[i] - (plain - part)) + (term - part)) + rests[i] * factor
            total = plain + rest
            new_sums[i] = total
            new_rests[i] = rest - (total - plain)
    else:
        _scale(factor, sums, new_sums)
        _scale(factor, rests, new_rests)


@compiled()
def take_in(
    k: Any, v: Any, factors: Any, unit: Any, most: Any, runs: Any, phi: Any, room: Any, sums: Any, rests: Any, new_sums: Any,
    new_rests: Any, combined: Any, powers: Any,
) -> None:  # fmt: skip
    """The sums of a view with more rows. Those after each row multiply `combined` (P, n, r c), over powers of two whose logarithms
    join `powers` (P, n).

    Unless that is None. Sums fade by `factors` (P,) with every row. `room` is (3, r c).
    """
    n, columns = v.shape[1], v.shape[2] + 1
    term = room[0]
    for p in range(k.shape[0]):
        before, lost = sums[p], rests[p]
        for t in range(n):
            _monomials(k[p, t], unit, most, runs, phi)
            for a in range(phi.shape[0]):
                for e in range(columns - 1):
                    term[a * columns + e] = phi[a] * v[p, t, e]
                term[a * columns + columns - 1] = phi[a]
            # Never from an array into itself: that would be compiled for one number at a time.
            new, rest = new_sums[p], new_rests[p]
            if factors[p] != 1:
                _fade(_factor(factors, p), before, lost, room[1], room[2])
                before, lost = room[1], room[2]
            elif (n - t) % 2 == 0:
                new, rest = room[1], room[2]
            _add(term, before, lost, new, rest)
            before, lost = new, rest
            if combined is not None:
                power = _power(new[columns - 1])
                powers[p, t] += power
                _multiply(new.dtype.type(ldexp(1.0, -power)), new, combined[p, t])


@compiled()
def _power(count: Any) -> int:
    """The logarithm of the power of two next to a number of rows."""
    return round(log2(count)) if count > 0 and count < inf else 0


@compiled(FAST)
def _add_product(factor: Any, phi: Any, decay: Any, sums: Any, new: Any) -> None:
    for a in range(phi.shape[0]):
        new[a] = decay * sums[a] + factor * phi[a]


@compiled(FAST)
def _complex_multiply(factor: Any, x: Any, product: Any) -> None:
    half = x.shape[0] // 2
    x_re, x_im, re, im = x[:half], x[half:], product[:half], product[half:]
    for a in range(half):
        y, z = factor * x_re[a], factor * x_im[a]
        re[a], im[a] = re[a] * y - im[a] * z, re[a] * z + im[a] * y


@compiled()
def take_in_complex(
    k: Any, v: Any, factors: Any, unit: Any, most: Any, runs: Any, phi: Any, room: Any, sums: Any, new_sums: Any, combined: Any,
    powers: Any,
) -> None:  # fmt: skip
    """The sums (P, c, 2 h) of complex monomials of a view with more rows, and their products in `combined`, as in `take_in`.

    `room` is (c, 2 h).
    """
    n, last = v.shape[1], v.shape[2]
    for p in range(k.shape[0]):
        before = sums[p]
        for t in range(n):
            new = room if (n - t) % 2 == 0 else new_sums[p]
            _complex_monomials(k[p, t], unit, most, runs, phi)
            for e in range(last + 1):
                value = v[p, t, e] if e < last else v.dtype.type(1)
                _add_product(value, phi, _factor(factors, p), before[e], new[e])
            before = new
            # The first monomial of the last column counts rows.
            power = _power(new[last, 0])
            powers[p, t] += power
            for e in range(last + 1):
                _complex_multiply(new.dtype.type(ldexp(1.0, -power)), new[e], combined[p, t, e])


@compiled(FAST)
def _contract(phi: Any, combined: Any, found: Any) -> None:
    columns = found.shape[0]
    for a in range(phi.shape[0]):
        for e in range(columns):
            found[e] += phi[a] * combined[a * columns + e]


@compiled()
def read(
    q: Any,
    unit: Any,
    most: Any,
    runs: Any,
    phi: Any,
    combined: Any,
    powers: Any,
    part: Any,
    found: Any,
    out: Any,
    lse: Any,
) -> None:
    """Output (P, n, dv) and log-sum-exp (P, n) of queries, with room (c,) for parts of sums and sums."""
    columns = found.shape[0]
    for p in range(q.shape[0]):
        for t in range(q.shape[1]):
            _monomials(q[p, t], unit, most, runs, phi)
            found[:] = 0
            for low in range(0, phi.shape[0], CHAIN):
                high = min(low + CHAIN, phi.shape[0])
                part[:] = 0
                _contract(phi[low:high], combined[p, t, low * columns : high * columns], part)
                for e in range(columns):
                    found[e] += part[e]
            _divide(found, powers[p, t], out[p, t], lse[p, t : t + 1])


@compiled(leaf=False)
def step(
    q: Any, keys: Any, values: Any, factors: Any, of_query: Any, of_keys: Any, most: Any, w: Any, runs: Any, sums: Any, rests: Any,
    new: Any, out: Any, lse: Any,
) -> None:  # fmt: skip
    """Output and log-sum-exp as in `read`, and `new` (m, 2, P, r c), sums and rests of m views with the tokens.

    Of keys, values, `factors` (P,), sums and rests (P, r c) there are two each, of which the second count if there are two views.
    """
    problems, n = q.shape[0], q.shape[1]
    size, columns = w.shape[0], out.shape[2] + 1
    combined, powers = np.empty((problems, n, size), q.dtype), np.zeros((problems, n))
    combined[:] = w
    of_rows, of_most = q.dtype.type(of_keys), q.dtype.type(most)
    phi, room, both = np.empty(size // columns, q.dtype), np.empty((3, size), q.dtype), np.empty((2, columns), q.dtype)
    for i in range(new.shape[0]):
        rows = keys[i], values[i], factors[i], of_rows, of_most, runs
        take_in(*rows, phi, room, sums[i], rests[i], new[i, 0], new[i, 1], combined, powers)
    read(q, q.dtype.type(of_query), of_most, runs, phi, combined, powers, both[0], both[1], out, lse)


@compiled(FAST)
def _contract_column(phi: Any, combined: Any) -> Any:
    found = phi.dtype.type(0)
    for a in range(phi.shape[0]):
        found += phi[a] * combined[a]
    return found


@compiled()
def read_complex(
    q: Any,
    unit: Any,
    most: Any,
    runs: Any,
    w: Any,
    phi: Any,
    combined: Any,
    powers: Any,
    found: Any,
    out: Any,
    lse: Any,
) -> None:
    """`read` of complex monomials, with their weights (2 h,)."""
    for p in range(q.shape[0]):
        for t in range(q.shape[1]):
            _complex_monomials(q[p, t], unit, most, runs, phi)
            for a in range(phi.shape[0]):
                phi[a] *= w[a]
            found[:] = 0
            for e in range(found.shape[0]):
                for low in range(0, phi.shape[0], CHAIN):
                    found[e] += _contract_column(phi[low : low + CHAIN], combined[p, t, e, low : low + CHAIN])
            _divide(found, powers[p, t], out[p, t], lse[p, t : t + 1])


@compiled()
def _divide(found: Any, power: Any, out: Any, lse: Any) -> None:
    """Output (dv,) and log-sum-exp (1,) from numerators (c,)."""
    columns = found.shape[0]
    normaliser = found[columns - 1]
    # Where every row is masked it is exactly 0; a negative one, or ∞, means scores beyond the plan's bound.
    inverse = 1 / normaliser if 0 < normaliser < inf else (0.0 if normaliser == 0 else nan)
    for e in range(columns - 1):
        out[e] = found[e] * found.dtype.type(inverse)
    lse[0] = log(normaliser) + power * log(2.0) if 0 < normaliser < inf else (-inf if normaliser == 0 else nan)
