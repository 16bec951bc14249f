"""Which method computes dLoss/dX within an absolute error, at what degree and cost: floats and shapes only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, isfinite, prod
from typing import NamedTuple

from ..approximation.exponential import Polynomial, minimax, smallest
from ..bounds.rounding import computed_in, exact_errors, of_score
from ..checks import Inputs, PlanError, shown
from ..features.monomials import rank as rank_of
from ..planning import plan_inputs
from ..planning.selection import Wish, affordable_degrees, beyond
from ..plans import Plan
from ..problem import Cost
from . import algorithm1
from .errors import Sizes, gradient_error

PRODUCTS = ("a1 @ x1", "a2 @ x2", "a3 @ x3", "a4 @ y1", "a5 @ y2")
_MAX_DEGREE = 40


class GradientChoice(NamedTuple):
    """What the method of a gradient is chosen by."""

    inputs: Inputs
    scale: float
    eps: float
    sizes: Sizes
    widths: tuple[int, ...]  # d1, d2, d3
    problems: int
    largest: Sequence[float]  # entry of each product

    def plan(self, method: str) -> tuple[float, Plan]:
        """(certified error, plan), or PlanError."""
        exact = plan_inputs(self.inputs, self.scale, Wish(1.0, "exact"))
        exact_error = self.exact_error(exact)
        degrees = affordable_degrees(exact.dim, _MAX_DEGREE)
        best = None
        if method != "exact" and degrees and isfinite(exact.bound):
            best = smallest(exact.bound, lambda p: self.error(p, exact) <= self.eps, max_degree=degrees[-1])
        if best is None and method == "polynomial":
            raise PlanError(self.why_not(exact, degrees))
        flops_exact, flops = self.exact_flops(), inf if best is None else self.flops(best.degree)
        if best is not None and (method == "polynomial" or flops < flops_exact or exact_error > self.eps):
            error, reason = self.error(best, exact), f"degree {best.degree} reaches eps={self.eps:g}"
            made = plan_inputs(self.inputs, self.scale, Wish(1.0, "polynomial", best.degree))
        elif exact_error <= self.eps:
            cheaper = "no affordable degree reaches eps" if best is None else "exact takes fewer operations"
            error, made, reason = exact_error, exact, "exact was asked for" if method == "exact" else cheaper
        else:
            reached = min([exact_error, *(self.reached(exact, degrees) if method == "auto" else ())])
            raise PlanError(
                f"eps={self.eps:g} cannot be reached in {exact.dtype}: rounding leaves an error of up to {reached:.2g}. "
                f"Use {'float64 or ' if exact.dtype == 'float32' else ''}a larger eps"
            )
        # Factors of one problem at a time, and a block.
        memory = 8.0 * made.rank * (made.value_dim + 1) * sum(self.widths) + made.bytes_exact
        return error, replace(
            made, reason=reason, problem=replace(made.problem, batch=self.problems),
            exact=made.exact._replace(flops=flops_exact), polynomial=Cost(flops, memory),
        )  # fmt: skip

    def error(self, polynomial: Polynomial, plan: Plan) -> float:
        """Certified error of the gradient by this polynomial."""
        if polynomial.degree < 1 or not polynomial.delta < 1:
            return inf
        rho = algorithm1.rounding(
            polynomial, plan.lowest_mean, rank=rank_of(plan.dim, polynomial.degree), value_dim=plan.value_dim,
            dtype=plan.dtype,
        )  # fmt: skip
        return gradient_error(self.sizes, polynomial.delta, rho)

    def exact_error(self, plan: Plan) -> float:
        """Certified error of the closed form: rounding alone, in three sums over rows."""
        relative, _ = exact_errors(
            plan.bound, score=of_score(3, plan.dim), views=3, value_dim=plan.value_dim, lengths=sum(plan.lengths),
            dtype=computed_in(plan.dtype),
        )  # fmt: skip
        return gradient_error(self.sizes, 0.0, relative / (2 + relative)) if isfinite(relative) else inf

    def reached(self, plan: Plan, degrees: Sequence[int]) -> list[float]:
        """Certified errors of all affordable degrees."""
        return [self.error(minimax(g, plan.bound), plan) for g in degrees] if isfinite(plan.bound) else []

    def flops(self, degree: int) -> float:
        """Operations of Algorithm 1."""
        rank, dv = rank_of(self.inputs.dim, degree), self.inputs.value_dim
        rows = sum(n * (2.0 * (dv + 1) * (d + 1) + 2) for n, d in zip(self.inputs.lengths, self.widths, strict=True))
        return self.problems * rank * (rows + (dv + 1) * 2.0 * prod(self.widths))

    def exact_flops(self) -> float:
        """Operations of the closed form, scores computed twice; an exponential counts as 16."""
        per_triple = 4.0 * self.inputs.dim + 4.0 * self.inputs.value_dim + 2.0 * self.widths[2] + 32
        return self.problems * prod(map(float, self.inputs.lengths)) * per_triple

    def why_not(self, plan: Plan, degrees: Sequence[int]) -> str:
        """What stands against Algorithm 1, and what the exact method costs."""
        most = max(range(5), key=lambda i: self.largest[i])
        needed, unrounded = None, self.sizes._replace(values=0.0, scores=0.0)
        if isfinite(plan.bound):
            needed = smallest(
                plan.bound, lambda p: p.degree >= 1 and gradient_error(unrounded, p.delta, 0.0) <= self.eps,
                max_degree=_MAX_DEGREE,
            )  # fmt: skip
        if needed is None:
            problem = f"where no degree up to {_MAX_DEGREE} suffices"
        elif needed.degree not in degrees:
            rank = rank_of(plan.dim, needed.degree)
            problem = f"which takes degree {needed.degree} and rank {shown(rank, ',')}, {beyond(plan.dim)}"
        else:
            reached = min(self.reached(plan, degrees))
            hint = "; float64 reaches further" if plan.dtype == "float32" else ""
            problem = f"where rounding in {plan.dtype} leaves an error of up to {reached:.2g}{hint}"
        return (
            f"Algorithm 1 cannot reach eps={self.eps:g}: entries of {PRODUCTS[most]} are up to B={self.largest[most]:.4g} and "
            f"scores may reach R={plan.bound:.4g}, {problem}. Use method='exact' ({self.exact_flops():.2g} operations) or a "
            "larger eps"
        )
