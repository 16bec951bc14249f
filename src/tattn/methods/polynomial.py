"""The polynomial method: softmax with a polynomial in place of exp, in time linear in the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from ..backends import Array
from ..bounds.rounding import USUAL_VALUE_DIM, scores_round_less
from ..engines import causal_features, features, scorewise
from ..features.monomials import Expansion, Grading, rank
from ..operands import Attended, Gradients, Operands, Upstream
from .gradient_bounds import stated_bounds


@dataclass(frozen=True)
class Polynomial:
    """One polynomial c_0 + c_1 x + … for all scores, which lie within ±bound; of a pruned basis, with its grading.

    It is computed through features, or score by score where scores are fewer and round no more: by the shapes of a call alone.
    """

    coefficients: tuple[float, ...]
    bound: float
    grading: Grading = ()

    name: ClassVar[str] = "polynomial"
    extra: ClassVar[int] = 0

    @property
    def degree(self) -> int:
        """Degree g."""
        return len(self.coefficients) - 1

    @property
    def expansion(self) -> Expansion:
        """The polynomial as a sum over monomials."""
        return Expansion(self.coefficients, self.grading)

    def by_scores(self, lengths: Sequence[int], dim: int, value_dim: int) -> bool:
        """Whether rows (n, n_1, …) of all pairs, not causal, take fewer operations score by score, and round no more so."""
        if self.grading:
            return False
        r = rank(dim, self.degree)
        by_features = sum(lengths) * r * (2.0 * (value_dim + 1) + 1)
        by_scores = prod(lengths) * (2.0 * dim + 2.0 * value_dim + 4.0 * self.degree)
        return by_scores < by_features and scores_round_less(
            self.coefficients, self.bound, dim=dim, rank=r, value_dim=max(value_dim, USUAL_VALUE_DIM), lengths=lengths
        )

    def forward(self, operands: Operands, certify: bool = False) -> Attended:
        """Output, lse, and kept: the normaliser over the number of pairs (..., n, 1), and summaries if there are."""
        if operands.order.causal:
            return causal_features.forward(operands, self.expansion)
        if self._by_scores(operands):
            return scorewise.forward(operands, self.coefficients)
        return features.forward(operands, self.expansion)

    def backward(self, operands: Operands, attended: Attended, upstream: Upstream) -> Gradients:
        """The exact derivative of `forward`, in the dtype of the computation."""
        if operands.order.causal:
            return causal_features.backward(operands, self.expansion, attended, upstream)[0]
        if self._by_scores(operands):
            return scorewise.backward(operands, self.coefficients, attended, upstream)
        return features.backward(operands, self.expansion, attended, upstream)

    def gradient_bounds(
        self, operands: Operands, attended: Attended, upstream: Upstream, stated: tuple[float, float]
    ) -> Gradients:
        """From what is stated for all rows."""
        return stated_bounds(operands, upstream, stated)

    def row_errors(self, kept: Array) -> None:
        """None: one error is stated for all rows."""
        return

    def at_a_time(self, operands: Operands) -> int:
        """How many problems to compute at a time."""
        if operands.order.causal:
            return causal_features.at_a_time(operands, self.expansion)
        if self._by_scores(operands):
            return scorewise.at_a_time(operands)
        return features.at_a_time(operands, self.expansion)

    def _by_scores(self, operands: Operands) -> bool:
        return self.by_scores(operands.lengths, operands.query.shape[-1], operands.values[0].shape[-1])
