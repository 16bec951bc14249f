"""Which monomials a pruned basis keeps, and what the others add up to: floats and tables only.

P(x) = Σ_t c_t x^t of a score x = Σ_c y_c, less the monomials of weighted degree above W, knows channels by their weights
alone. With x_k the sum of the y_c with ω_c = k it is

    Σ_t c_t t! Σ_n Π_k x_k^{n_k} / n_k!,      over Σ_k n_k = t and Σ_k k n_k ≤ W,

and its derivative by a y_c with ω_c = k the same with t c_t, t − 1 and W − k. So bounds and samples need no monomials.

Weights come from the sizes of the channels: ω_c = u (1 + β log(s_max / s_c)), rounded and at most a few u. A family is what
one u and one cap give; the larger β, the less is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import comb, factorial, log, log2
from typing import Any, NamedTuple

from ..features.basis import FEW_COLUMNS
from ..features.monomials import Grading

# What weights are made of: units u, steepness β, and the largest weight in units.
_UNITS = (1, 2, 3, 4)
_STEEPNESS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.4)
_CAPS = (2, 3, 6)
# Logarithms of sizes are told apart by quarters of octaves, up to so many octaves.
_OCTAVES = 12
# With more channels it takes longer to look for a pruned basis than it saves.
MOST_CHANNELS = 4096
# Channels that differ by less have no monomials to spare.
_UNEQUAL = 8.0
# A basis less than this share of another one's rank takes less time, too: runs are shorter, and with few columns the whole one
# need not make its highest monomials.
_WORTHWHILE, _WORTHWHILE_FEW = 0.75, 0.33
# Degrees above the whole basis' that a pruned one is tried at.
HIGHER = 2


def worthwhile(rank: int, value_dim: int) -> float:
    """The rank below which a pruned basis takes less time than a whole one of this rank."""
    return rank * (_WORTHWHILE if value_dim + 1 > FEW_COLUMNS else _WORTHWHILE_FEW)


class Pruned(NamedTuple):
    """A basis that is left by a grading, and its number of monomials."""

    rank: int
    degree: int
    grading: Grading


def weights_of(grading: Grading) -> tuple[int, ...]:
    """The distinct weights, ascending."""
    return tuple(sorted(set(grading)))


def sums_of(grading: Grading, sizes: Sequence[float]) -> tuple[float, ...]:
    """Σ sizes over the channels of each weight, ascending."""
    return tuple(sum(s for s, own in zip(sizes, grading, strict=True) if own == k) for k in weights_of(grading))


class Shells:
    """Σ over what is kept, by plain and by weighted degree, for sums x_k: floats, or arrays of one shape."""

    def __init__(self, grading: Grading, degree: int, sums: Sequence[Any]) -> None:
        self.degree, self.most = degree, degree * min(grading)
        found: dict[tuple[int, int], Any] = {(0, 0): 1.0}
        for weight, x in zip(weights_of(grading), sums, strict=True):
            if weight > self.most:
                break
            powers: list[Any] = [1.0]
            for n in range(1, min(degree, self.most // weight) + 1):
                powers.append(powers[-1] * x * (1 / n))
            wider: dict[tuple[int, int], Any] = {}
            for (t, w), value in found.items():
                for n in range(min(degree - t, (self.most - w) // weight) + 1):
                    key, term = (t + n, w + n * weight), value * powers[n]
                    wider[key] = wider[key] + term if key in wider else term
            found = wider
        self._found = found

    def powers(self) -> list[Any]:
        """What is kept of x^t, t = 0 … g."""
        return self._up_to(self.most)

    def slopes(self, weight: int) -> list[Any]:
        """What is kept of the derivative t x^(t−1) by a channel of this weight, t = 0 … g."""
        lower = self._up_to(self.most - weight)
        return [0.0, *(t * lower[t - 1] for t in range(1, self.degree + 1))]

    def _up_to(self, most: int) -> list[Any]:
        totals: list[Any] = [0.0] * (self.degree + 1)
        for (t, w), value in self._found.items():
            if w <= most:
                totals[t] = totals[t] + factorial(t) * value
        return totals


def dropped(coefficients: Sequence[float], grading: Grading, sums: Sequence[float]) -> tuple[float, float]:
    """(τ, τ′): what P and its derivatives by a channel's product lose at most where Σ |y_c| is at most so much for each weight."""
    degree, total = len(coefficients) - 1, sum(sums)
    shells = Shells(grading, degree, sums)
    # Differences round.
    slack = 64 * 2.0**-52

    def lost(all_of: Sequence[float], left: Sequence[float]) -> float:
        return sum(abs(c) * (max(0.0, a - b) + slack * a) for c, a, b in zip(coefficients, all_of, left, strict=True))

    slopes = [0.0, *(t * total ** (t - 1) for t in range(1, degree + 1))]
    return (
        lost([total**t for t in range(degree + 1)], shells.powers()),
        max(lost(slopes, shells.slopes(weight)) for weight in weights_of(grading)),
    )


def smallest_pruned(
    sizes: Sequence[float], degrees: Sequence[int], below: float, accept: Callable[[Pruned], bool]
) -> Pruned | None:
    """The smallest basis of a rank under `below` that is accepted, for channels of these sizes; None if there is none.

    What is accepted is taken to be so with more monomials of the same family, too.
    """
    if len(sizes) > MOST_CHANNELS:
        return None
    top, least = max(sizes), min(sizes)
    if not least * _UNEQUAL < top:
        return None
    profile = tuple(round(4 * min(_OCTAVES, log2(top) - log2(s))) if s > 0 else 4 * _OCTAVES for s in sizes)
    best: Pruned | None = None
    for degree in degrees:
        for family in _families(profile, degree):
            # Ranks fall along a family.
            tried = [p for p in family if p.rank < (below if best is None else best.rank)]
            first, last = 0, len(tried)
            while first < last:
                middle = first if first == 0 and last == len(tried) else (first + last) // 2
                if accept(tried[middle]):
                    best, first = tried[middle], middle + 1
                else:
                    last = middle
    return best


@lru_cache(maxsize=512)
def _families(profile: tuple[int, ...], degree: int) -> tuple[tuple[Pruned, ...], ...]:
    """Candidates for channels that are 2^(−profile / 4) of the largest, by family, the largest rank first."""
    found = []
    sizes = set(profile)
    for unit in _UNITS:
        for cap in _CAPS:
            # Channels are many, their sizes few.
            weights = (
                {p: min(cap * unit, round(unit * (1 + beta * log(2) / 4 * p))) for p in sizes} for beta in _STEEPNESS
            )
            gradings: Mapping[Grading, None] = dict.fromkeys(tuple(map(of.__getitem__, profile)) for of in weights)
            kept = [Pruned(graded_rank(g, degree), degree, g) for g in gradings if max(g) > unit]
            if kept and tuple(kept) not in found:
                found.append(tuple(kept))
    return tuple(found)


def graded_rank(grading: Grading, degree: int) -> int:
    """`monomials.rank`, for gradings of which most are never used: nothing is remembered."""
    most = degree * min(grading)
    counts = [1] + [0] * most
    for weight in weights_of(grading):
        alike = grading.count(weight)
        # Monomials of degree n in so many channels.
        own = [comb(alike + n - 1, n) for n in range(most // weight + 1)]
        counts = [sum(counts[w - n * weight] * own[n] for n in range(w // weight + 1)) for w in range(most + 1)]
    return sum(counts)
