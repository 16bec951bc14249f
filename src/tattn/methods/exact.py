"""The exact method: softmax by its definition, streamed over all tuples of keys that a row sees."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from ..bounds.rounding import exact_errors, of_score
from ..engines import causal_tuples, tuples
from ..operands import Attended, Gradients, Operands, Upstream
from ..problem import Cost, Guarantee, Problem, ScoreRange
from .gradient_bounds import OneError


@dataclass(frozen=True)
class Exact(OneError):
    """Attention by its definition: n Π n_μ scores, linear memory, no error but rounding."""

    name: ClassVar[str] = "exact"
    extra: ClassVar[int] = 0

    def forward(self, operands: Operands, certify: bool = False) -> Attended:
        """Output, and lse, which is what the adjoint needs."""
        forward = causal_tuples.forward if operands.order.causal else tuples.forward
        out, lse = forward(operands)
        return Attended(out, lse, (lse,))

    def backward(self, operands: Operands, attended: Attended, upstream: Upstream) -> Gradients:
        """The exact derivative, in the dtype of the computation."""
        backward = causal_tuples.backward if operands.order.causal else tuples.backward
        return backward(operands, attended.out, attended.kept[0], upstream)

    def guarantee(self, problem: Problem, scores: ScoreRange) -> Guarantee:
        """Rounding alone."""
        errors = exact_errors(
            scores.bound, score=of_score(problem.views, problem.dim, problem.paired), views=problem.views,
            value_dim=problem.value_dim, lengths=sum(problem.lengths), dtype=problem.dtype,
        )  # fmt: skip
        return Guarantee(*errors, isfinite(errors[0]))

    def cost(self, problem: Problem) -> Cost:
        """N Π n_μ scores, of those that a row sees."""
        return tuples.cost(problem)

    def at_a_time(self, operands: Operands) -> int:
        """How many problems to compute at a time."""
        return tuples.at_a_time(operands)

    def compiled(self, operands: Operands) -> bool:
        """Whether compiled loops compute most of it."""
        return not operands.order.causal and tuples.compiled(operands)
