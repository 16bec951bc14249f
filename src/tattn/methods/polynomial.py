"""The polynomial method: softmax with a polynomial in place of exp, in time linear in the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, prod
from typing import ClassVar

from ..approximation.exponential import Polynomial as Approximation
from ..approximation.exponential import minimax, taylor
from ..approximation.pruning import dropped, sums_of
from ..bounds.rounding import (
    USUAL_VALUE_DIM,
    Sums,
    least_normaliser,
    polynomial_errors,
    polynomial_rounding,
    scores_round_less,
)
from ..bounds.score_range import rounded_up
from ..engines import causal_features, distinct, features, scorewise
from ..engines.chunks import chunk_of
from ..features.monomials import Expansion, Grading, rank
from ..operands import Attended, Gradients, Operands, Upstream
from ..problem import Cost, Guarantee, Problem, ScoreRange
from .gradient_bounds import OneError


@dataclass(frozen=True)
class Polynomial(OneError):
    """One polynomial P of all scores, which are within ±bound: c_0 + c_1 x + …; of a pruned basis, with its grading.

    It is computed through features, or score by score where scores are fewer and round no more. The shapes of a call
    alone decide.

    Parameters
    ----------
    series : {"minimax", "taylor", "fitted"}
        Where the coefficients come from; `of_series` makes the first two.
    coefficients : tuple of float
    bound : float
    delta, delta_prime : float
        |P / exp − 1| and |P′ / exp − 1| are at most this on [−bound, bound]; infinite if unknown.
    grading : tuple of int
        As in `Plan`.
    """

    series: str
    coefficients: tuple[float, ...]
    bound: float
    delta: float = inf
    delta_prime: float = inf
    grading: Grading = ()

    name: ClassVar[str] = "polynomial"
    extra: ClassVar[int] = 0

    @classmethod
    def of_series(cls, series: str, degree: int, bound: float, grading: Grading = ()) -> Polynomial:
        """The polynomial of this degree that is best on [−bound, bound], or Taylor's."""
        found = minimax(degree, bound) if series == "minimax" else taylor(degree, bound)
        return cls.of(series, found, grading)

    @classmethod
    def of(cls, series: str, found: Approximation, grading: Grading = ()) -> Polynomial:
        """An approximation of exp as a method."""
        return cls(series, found.coefficients, found.bound, found.delta, found.delta_prime, grading)

    @property
    def degree(self) -> int:
        """Degree g."""
        return len(self.coefficients) - 1

    @property
    def expansion(self) -> Expansion:
        """The polynomial as a sum over monomials."""
        return Expansion(self.coefficients, self.grading)

    def by_scores(self, lengths: Sequence[int], dim: int, value_dim: int) -> bool:
        """Whether rows (n, n_1, …) of all pairs, not causal, take fewer operations score by score, and round no more so.

        Then they do so with complex channels, too: these add more to the rounding of features than to that of scores.
        """
        if self.grading:
            return False
        r = rank(dim, self.degree)
        by_features = sum(lengths) * r * (2.0 * (value_dim + 1) + 1)
        by_scores = prod([float(length) for length in lengths]) * (2.0 * dim + 2.0 * value_dim + 4.0 * self.degree)
        return by_scores < by_features and scores_round_less(
            self.coefficients,
            self.bound,
            dim=dim,
            rank=r,
            value_dim=max(value_dim, USUAL_VALUE_DIM),
            lengths=tuple(lengths),
        )

    def forward(self, operands: Operands, certify: bool = False) -> Attended:
        """Output, lse, and kept: the normaliser over the number of pairs (..., n, 1), and summaries if there are."""
        if operands.order.causal:
            return causal_features.forward(operands, self.expansion)
        if self._by_scores(operands):
            return scorewise.forward(operands, self.coefficients)
        parts = distinct.parts_of(operands, self.expansion)
        if parts is not None:
            return distinct.forward(operands, self.expansion, parts)
        return features.forward(operands, self.expansion)

    def backward(self, operands: Operands, attended: Attended, upstream: Upstream) -> Gradients:
        """The exact derivative of `forward`, in the dtype of the computation."""
        if operands.order.causal:
            return causal_features.backward(operands, self.expansion, attended, upstream)[0]
        if self._by_scores(operands):
            return scorewise.backward(operands, self.coefficients, attended, upstream)
        parts = distinct.parts_of(operands, self.expansion, slopes=True)
        if parts is not None:
            return distinct.backward(operands, self.expansion, parts, attended, upstream)
        return features.backward(operands, self.expansion, attended, upstream)

    def guarantee(self, problem: Problem, scores: ScoreRange) -> Guarantee:
        """From its distance to exp, what a pruned basis lacks for channels of these sizes, and rounding."""
        error, grad_error = inf, inf
        if self.delta < 1:
            least = least_normaliser(self.delta, self.bound, scores.lowest_mean)
            # In a window, parts of two chunks are added up for a row, in place of one.
            chunk = chunk_of(problem.views) * (1 + (problem.order.window is not None)) if problem.order.causal else 0
            sums = Sums.of(problem, self.rank(problem.dim), chunk)
            rho = polynomial_rounding(self.coefficients, self.bound, least, sums, problem.dtype)
            error, grad_error = polynomial_errors(self.delta, self.delta_prime, *rho, self._dropped(scores, least))
        return Guarantee(error, grad_error, isfinite(error))

    def _dropped(self, scores: ScoreRange, least: float) -> tuple[float, float]:
        """What the monomials that a pruned basis lacks add up to in P and P′, relative to the normaliser, at `least` this."""
        if not self.grading:
            return 0.0, 0.0
        if not least > 0:
            return inf, inf
        lost, lost_prime = dropped(self.coefficients, self.grading, self.sums(scores))
        return lost / least, lost_prime / least

    def sums(self, scores: ScoreRange) -> tuple[float, ...]:
        """What the channels of each weight of a pruned basis add up to, rounded up so that plans are found again."""
        # One size for both parts of a complex channel.
        return tuple(map(rounded_up, sums_of(self.grading[: len(scores.sizes)], scores.sizes))) if self.grading else ()

    def rank(self, dim: int) -> int:
        """How many monomials of so many channels there are."""
        return rank(dim, self.degree, self.grading)

    def cost(self, problem: Problem) -> Cost:
        """Of products with all monomials."""
        return cost_of(problem, self.rank(problem.dim))

    def at_a_time(self, operands: Operands) -> int:
        """How many problems to compute at a time."""
        if operands.order.causal:
            return causal_features.at_a_time(operands, self.expansion)
        if self._by_scores(operands):
            return scorewise.at_a_time(operands)
        return features.at_a_time(operands, self.expansion)

    def compiled(self, operands: Operands) -> bool:
        """Whether compiled loops compute most of it."""
        if operands.order.causal:
            return causal_features.compiled(operands)
        return features.compiled(operands, self.expansion)

    def _by_scores(self, operands: Operands) -> bool:
        return self.by_scores(operands.lengths, operands.query.shape[-1], operands.values[0].shape[-1])


def cost_of(problem: Problem, rank: float) -> Cost:
    """What a polynomial of this rank costs."""
    if problem.order.causal:
        return causal_features.cost(problem, rank)
    return features.cost(problem, rank)
