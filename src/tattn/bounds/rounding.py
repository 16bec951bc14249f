"""What rounding adds to the error of a plan: floats only.

Relative to the normaliser, a sum of N terms carries the roundings of its terms, (m + 1)(t + 2) for a product of
degree t, and those of the additions. Additions run in chains of `CHAIN`; their roundings are taken as independent,
so a chain of k contributes at most λ √k units in the last place, λ = 4 (Higham and Mary, "A new approach to
probabilistic rounding error analysis", 2019; λ = 4 leaves a chance of 7e-4 for a single chain at its worst case, and
results mix many). Equal terms are not independent: a chain of them loses up to k/4 units, and views that are alike lose
them alike, so that theirs add up. The larger of the two counts. Everything else is counted at its worst. This is a model of
the arithmetic and not a theorem about it; the tests hold it against corners, constant rows, equal views and cancelling scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import comb, exp, inf, prod, sqrt
from typing import NamedTuple

from ..backends.operations import CHAIN
from ..features.basis import FEW_CHAINS
from ..problem import Problem

UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}
LAMBDA = 4.0
# Channels of the values that bounds are stated for at least: a plan serves calls with fewer, and with more up to here.
USUAL_VALUE_DIM = 128
# Units that a chain of equal terms loses for each: half of one, of the sum so far, in the half of the chain that is added last.
ALIKE = 0.25
# Terms in a chain of additions of the exact method, at most.
EXACT_CHAIN = 1024


# Units that a product of two complex numbers loses, in parts of their moduli: 2 in each part, √2 times that where parts are added.
COMPLEX_PRODUCT = 3


def computed_in(dtype: str) -> str:
    """The dtype that a call with inputs of `dtype` computes in."""
    return "float64" if dtype == "float64" else "float32"


def chains(views: int, others: float, chunk: int = 0, chain: int = CHAIN) -> float:
    """Units that sums over the rows of so many views lose, and so many `others` additions; with prefixes in chunks, if any.

    `chain`: terms that are added one after the other, at most.
    """
    # A chain, and what adds up chains in a block. Prefixes: two chains in a chunk, one over the chunks of a block and a few single
    # additions; where terms are equal, those of a prefix and those of rows that all see lose as much as the worse of the two.
    apart = chain + FEW_CHAINS + (chain + 3 * chunk if chunk else 0)
    alike = chain + max(FEW_CHAINS, 3 * chunk)
    return sqrt(max(LAMBDA**2 * apart * views, (ALIKE * alike * views) ** 2) + LAMBDA**2 * others)


def chain(terms: float) -> float:
    """Units that a sum of so many terms loses, one added after the other."""
    return max(LAMBDA * sqrt(terms), ALIKE * terms)


class Sums(NamedTuple):
    """What sums over features run over: channels, monomials, views, and channels of the values, at least `USUAL_VALUE_DIM`.

    `chunk`: rows of a chunk where there are prefixes, else 0; `chain`: terms that are added one after the other, at most; `paired`:
    channels are complex.
    """

    dim: int
    rank: int
    views: int
    value_dim: int
    chunk: int = 0
    chain: int = CHAIN
    paired: bool = False

    @classmethod
    def of(cls, problem: Problem, rank: int, chunk: int = 0) -> Sums:
        """Those of a plan."""
        value_dim = max(problem.value_dim, USUAL_VALUE_DIM)
        return cls(problem.dim, rank, problem.views, value_dim, chunk, problem.chain, problem.paired)


def polynomial_rounding(
    coefficients: Sequence[float], bound: float, least: float, sums: Sums, dtype: str
) -> tuple[float, float]:
    """(ρ, ρ′): rounding of the sums with P and with P′, relative to the normaliser, whose mean over pairs is at `least` this.

    The monomials of degree t add up to at most |c_t| R^t for a pair in absolute value, whatever cancels.
    """
    if least <= 0:
        return inf, inf
    plain, steep = _of_features(coefficients, bound, sums)
    unit = UNIT[computed_in(dtype)]
    return unit * plain / least, unit * steep / least


def least_normaliser(delta: float, bound: float, lowest_mean: float) -> float:
    """What the mean of P over the pairs of a row is at least: (1 − δ) exp of the mean score (Jensen)."""
    return (1 - delta) * exp(max(-bound, lowest_mean))


# Every short call asks.
@lru_cache(maxsize=256)
def scores_round_less(
    coefficients: tuple[float, ...], bound: float, *, dim: int, rank: int, value_dim: int, lengths: tuple[int, ...]
) -> bool:
    """Whether P of scores, for rows (n, n_1, …), rounds no more than `polynomial_rounding` allows for any number of rows."""
    views = len(lengths) - 1
    # A power of a score has the score's roundings t times, Horner's rule two a degree. Outputs are sums over all pairs,
    # gradients of keys over query rows and then over tuples of the other views, in chains and what adds them up.
    score = views + 4 + min(dim, LAMBDA * sqrt(dim))
    pairs = prod([float(length) for length in lengths[1:]])
    terms = _in_chains(pairs)
    longest = max(terms, min(CHAIN, lengths[0]) + _in_chains(pairs / min(lengths[1:])))
    head = 2 * views + 5
    plain, steep = _of_sums(
        coefficients,
        bound,
        lambda t: t * score + head + chain(terms),
        lambda t: (t - 1) * score + head + chain(longest) + chain(value_dim + 1) + 2,
    )
    allowed, allowed_steep = _of_features(coefficients, bound, Sums(dim, rank, views, value_dim))
    return plain <= allowed and steep <= allowed_steep


def _in_chains(terms: float) -> float:
    """Terms that are added one after the other in a sum of so many, at most: a chain, and what adds up chains."""
    return min(CHAIN, terms) + terms / CHAIN


def _of_features(coefficients: Sequence[float], bound: float, sums: Sums) -> tuple[float, float]:
    """`_of_sums` over features."""
    dim, rank, views, value_dim, chunk, longest, paired = sums
    # In the read-out a chain, what adds up chains, and channels; for prefixes one over the rows of a chunk.
    lost = chains(views, longest + rank / CHAIN + dim + chunk, chunk, longest) + 4

    def count(t: int, others: float = 0.0) -> float:
        found = (views + 1) * (t + 2) + lost + others
        return complex_units(found, t, dim, views, chunk > 0) if paired else found

    slope = LAMBDA * sqrt((value_dim + 1) * max(1, chunk)) + 4
    return _of_sums(coefficients, bound, count, lambda t: count(t, slope))


def complex_units(units: float, t: int, dim: int, views: int, prefixes: bool = False) -> float:
    """Units that a term of degree t loses with complex channels, `dim` parts of them, where as many real ones lose so many.

    Complex monomials are sums over the real ones of a block, whose moduli add up to (|x| + |y|)^t ≤ 2^(t/2) |z|^t. Sums of one view
    at a time are off by parts of that while the other views are right, so the factor comes once. Products of `prefixes` are
    sums of real ones (`Forms`), which add up to more: by Hölder's inequality to 2^(k−1)/k Σ_l |cos(φ + π l / k)|^k for k factors.
    """
    size: float = min(2.0**t, (2 * t / dim + 1) ** (dim / 2))
    turned = min(size, LAMBDA * sqrt(size)) + 2 + COMPLEX_PRODUCT
    growth: float = 2.0 ** (t / 2)
    if prefixes and views > 1:
        # The sum is C(k, k/2) k / 2^k for even k, and at most so much for odd ones.
        growth *= comb(views + 1, (views + 1) // 2) / (2.0 if views % 2 else sqrt(3))
    return (units + (views + 1) * turned) * growth


def _of_sums(
    coefficients: Sequence[float], bound: float, count: Callable[[int], float], steep_count: Callable[[int], float]
) -> tuple[float, float]:
    """Units in the last place in the sums with P and with P′, for so many roundings in a term of degree t."""
    plain = sum(abs(c) * bound**t * count(t) for t, c in enumerate(coefficients))
    steep = sum(t * abs(c) * bound ** (t - 1) * steep_count(t) for t, c in enumerate(coefficients) if t)
    return plain, steep


def polynomial_errors(
    delta: float, delta_prime: float, rho: float, rho_prime: float, dropped: tuple[float, float] = (0.0, 0.0)
) -> tuple[float, float]:
    """(error, grad_error) of the polynomial method from its relative errors; infinite where P could lose its sign.

    `dropped`: what the monomials that a pruned basis lacks add up to in P and in its derivatives, relative to the normaliser.
    """
    theta, theta_prime = dropped
    lost = rho + theta
    d, d_prime = delta + lost, delta_prime + rho_prime + theta_prime
    if not d < 1:
        return inf, inf
    error = delta / sqrt(1 - delta**2) + 2 * lost / (1 - d)
    # P may be negative for a pair where it lacks monomials: |w − r| is no longer below 2 W.
    return error, 2 * (d + d_prime) / ((1 - d) * (1 - theta)) + error


def of_score(views: int, dim: int, paired: bool = False) -> float:
    """Units that a score loses, in parts of the sum of |terms|."""
    return views * (COMPLEX_PRODUCT if paired else 1) + 2 + min(dim, LAMBDA * sqrt(dim))


def exact_errors(
    bound: float, *, score: float, views: int, value_dim: int, lengths: int, dtype: str
) -> tuple[float, float]:
    """(error, grad_error) of the exact method: rounding alone, in scores of size `bound` and in sums over `lengths` rows.

    `score`: what `of_score` says.
    """
    unit = UNIT[computed_in(dtype)]
    scores = score * bound
    # Chains of at most `EXACT_CHAIN` tuples or query rows in a block, whose terms may be equal; sums of blocks are added, one for
    # every 16 rows of a view or more, and some within those. The normaliser is one more channel, and the sum of w − r one of
    # dv + 1 terms.
    added = lengths / 16
    sums = max(LAMBDA * sqrt(EXACT_CHAIN * views + added), ALIKE * EXACT_CHAIN + LAMBDA * sqrt(added))
    rho = unit * (scores + views + 6 + sums)
    rho_prime = rho + unit * LAMBDA * sqrt(value_dim + 1)
    return polynomial_errors(0.0, 0.0, rho, rho_prime)
