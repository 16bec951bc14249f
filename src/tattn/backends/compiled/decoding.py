"""One token of a stream, compiled: what `state.decoding` computes of its key rows and its query.

For each of P streams: rows (P, d) and values (P, dv), sums and rests (P, r, c) with c = dv + 1. Sums are added as
`state.sums.add_up` adds, without reordering; a read-out has `CHAIN` terms in any order, and then one for each of these.

Complex channels are read out of sums of complex monomials, (P, c, 2 h) for h of these, real parts first, which are kept beside.
"""

from __future__ import annotations

from math import inf, ldexp, log, log2, nan
from typing import Any

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
def take_in(
    k: Any, v: Any, unit: Any, most: Any, runs: Any, phi: Any, term: Any, sums: Any, rests: Any, new_sums: Any,
    new_rests: Any, combined: Any, powers: Any,
) -> None:  # fmt: skip
    """The sums of a view with a row more. They multiply `combined` (P, r c), over powers of two whose logarithms join `powers`.

    Unless that is None.
    """
    columns = v.shape[1] + 1
    for p in range(k.shape[0]):
        _monomials(k[p], unit, most, runs, phi)
        for a in range(phi.shape[0]):
            for e in range(columns - 1):
                term[a * columns + e] = phi[a] * v[p, e]
            term[a * columns + columns - 1] = phi[a]
        _add(term, sums[p], rests[p], new_sums[p], new_rests[p])
        if combined is not None:
            power = _power(new_sums[p, columns - 1])
            powers[p] += power
            _multiply(new_sums.dtype.type(ldexp(1.0, -power)), new_sums[p], combined[p])


@compiled()
def _power(count: Any) -> int:
    """The logarithm of the power of two next to a number of rows."""
    return round(log2(count)) if count > 0 and count < inf else 0


@compiled(FAST)
def _add_product(factor: Any, phi: Any, sums: Any, new: Any) -> None:
    for a in range(phi.shape[0]):
        new[a] = sums[a] + factor * phi[a]


@compiled(FAST)
def _complex_multiply(factor: Any, x: Any, product: Any) -> None:
    half = x.shape[0] // 2
    x_re, x_im, re, im = x[:half], x[half:], product[:half], product[half:]
    for a in range(half):
        y, z = factor * x_re[a], factor * x_im[a]
        re[a], im[a] = re[a] * y - im[a] * z, re[a] * z + im[a] * y


@compiled()
def take_in_complex(
    k: Any, v: Any, unit: Any, most: Any, runs: Any, phi: Any, sums: Any, new: Any, combined: Any, powers: Any
) -> None:
    """The sums (P, c, 2 h) of complex monomials of a view with a row more, and their products in `combined`, as in `take_in`."""
    last = v.shape[1]
    for p in range(k.shape[0]):
        _complex_monomials(k[p], unit, most, runs, phi)
        for e in range(last + 1):
            _add_product(v[p, e] if e < last else v.dtype.type(1), phi, sums[p, e], new[p, e])
        # The first monomial of the last column counts rows.
        power = _power(new[p, last, 0])
        powers[p] += power
        for e in range(last + 1):
            _complex_multiply(new.dtype.type(ldexp(1.0, -power)), new[p, e], combined[p, e])


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
    """Output (P, dv) and log-sum-exp (P, 1) of queries, with room (c,) for parts of sums and sums."""
    columns = found.shape[0]
    for p in range(q.shape[0]):
        _monomials(q[p], unit, most, runs, phi)
        found[:] = 0
        for low in range(0, phi.shape[0], CHAIN):
            high = min(low + CHAIN, phi.shape[0])
            part[:] = 0
            _contract(phi[low:high], combined[p, low * columns : high * columns], part)
            for e in range(columns):
                found[e] += part[e]
        _divide(found, powers[p], out[p], lse[p])


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
        _complex_monomials(q[p], unit, most, runs, phi)
        for a in range(phi.shape[0]):
            phi[a] *= w[a]
        found[:] = 0
        for e in range(found.shape[0]):
            for low in range(0, phi.shape[0], CHAIN):
                found[e] += _contract_column(phi[low : low + CHAIN], combined[p, e, low : low + CHAIN])
        _divide(found, powers[p], out[p], lse[p])


@compiled()
def _divide(found: Any, power: Any, out: Any, lse: Any) -> None:
    """Output (dv,) and log-sum-exp (1,) from numerators (c,)."""
    columns = found.shape[0]
    normaliser = found[columns - 1]
    # Where every row is masked it is exactly 0; a negative one means scores beyond the plan's bound.
    inverse = 1 / normaliser if normaliser > 0 else (0.0 if normaliser == 0 else nan)
    for e in range(columns - 1):
        out[e] = found[e] * found.dtype.type(inverse)
    lse[0] = log(normaliser) + power * log(2.0) if normaliser > 0 else (-inf if normaliser == 0 else nan)
