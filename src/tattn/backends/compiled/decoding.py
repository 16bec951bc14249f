"""One token of a stream, compiled: what `state.decoding` computes of its key rows and its query.

For each of P streams: rows (P, d) and values (P, dv), sums and rests (P, r, c) with c = dv + 1. Sums are added as
`state.sums.add_up` adds, without reordering; a read-out has `CHAIN` terms in any order, and then one for each of these.
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
    """The sums of a view with a row more. They multiply `combined` (P, r c), over powers of two whose logarithms join `powers`."""
    columns = v.shape[1] + 1
    for p in range(k.shape[0]):
        _monomials(k[p], unit, most, runs, phi)
        for a in range(phi.shape[0]):
            for e in range(columns - 1):
                term[a * columns + e] = phi[a] * v[p, e]
            term[a * columns + columns - 1] = phi[a]
        _add(term, sums[p], rests[p], new_sums[p], new_rests[p])
        count = new_sums[p, columns - 1]
        power = round(log2(count)) if count > 0 and count < inf else 0
        powers[p] += power
        _multiply(new_sums.dtype.type(ldexp(1.0, -power)), new_sums[p], combined[p])


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
        normaliser = found[columns - 1]
        # Where every row is masked it is exactly 0; a negative one means scores beyond the plan's bound.
        inverse = 1 / normaliser if normaliser > 0 else (0.0 if normaliser == 0 else nan)
        for e in range(columns - 1):
            out[p, e] = found[e] * q.dtype.type(inverse)
        lse[p, 0] = log(normaliser) + powers[p] * log(2.0) if normaliser > 0 else (-inf if normaliser == 0 else nan)
