"""A plan from sampled scores, which is never certified."""

from __future__ import annotations

from dataclasses import replace
from math import inf

from ..approximation.pruning import HIGHER
from ..bounds.rounding import Sums, least_normaliser, polynomial_errors, polynomial_rounding
from ..bounds.score_range import Ranges
from ..checks import Inputs, PlanError
from ..features.monomials import rank as rank_of
from ..methods import Exact, Polynomial
from ..plans import Plan, si
from ..problem import Guarantee, Problem, ScoreRange
from .sampling import Estimate, Pruning, estimate
from .selection import Wish, affordable_degrees, beyond, choose, largest_rank, plan_with

# Fits to samples gain nothing beyond.
_MOST_ESTIMATED = 12


def estimated_plan(inputs: Inputs, problem: Problem, found: Ranges, wish: Wish) -> Plan:
    """A plan from sampled scores; never certified."""
    tol, degree = wish.tol, wish.degree

    def rank_with(sampled: Estimate) -> int:
        return sampled.pruned.rank if sampled.pruned else rank_of(problem.dim, len(sampled.coefficients) - 1)

    def rounding_of(sampled: Estimate) -> tuple[float, float]:
        least = least_normaliser(0.0, sampled.bound, found.lowest_mean)
        sums = Sums.of(problem, rank_with(sampled))
        rho = polynomial_rounding(sampled.coefficients, sampled.bound, least, sums, problem.dtype)
        return polynomial_errors(0.0, 0.0, *rho)

    def exact(reason: str) -> Plan:
        scores = ScoreRange(found.bound, found.lowest_mean, "data")
        return replace(choose(problem, scores, Wish(tol, "exact")), reason=reason)

    affordable = affordable_degrees(problem.dim, _MOST_ESTIMATED)
    if degree is None and not affordable:
        if wish.method == "polynomial":
            raise PlanError(
                f"degree 1 at dim {problem.dim} has rank {rank_of(problem.dim, 1):,}, {beyond(problem.dim)}. "
                f"Use method='exact' ({si(Exact().cost(problem).flops)}flop)"
            )
        return exact("no degree has a rank that a plan accepts")
    if degree is not None:
        sampled = estimate(inputs, problem.scale, tol, [degree])
    else:
        higher = range(affordable[-1] + 1, affordable[-1] + HIGHER + 1)
        pruning = None
        if wish.gradients is not None:
            most = largest_rank(problem.dim)
            pruning = Pruning(higher, most, wish.gradients, lambda found: rounding_of(found)[0])
        sampled = estimate(inputs, problem.scale, tol, affordable, pruning)
    error, grad_error = sampled.error, sampled.grad_error
    if error < inf:
        rounding, grad_rounding = rounding_of(sampled)
        error, grad_error = error + rounding, grad_error + grad_rounding
    grading = sampled.pruned.grading if sampled.pruned else ()
    method = Polynomial("fitted", sampled.coefficients, sampled.bound, grading=grading)
    plan = plan_with(
        method,
        problem,
        ScoreRange(sampled.bound, found.lowest_mean, "estimate"),
        f"degree {degree} was asked for" if degree is not None else f"estimated to meet tol={tol:g}",
        Guarantee(error, grad_error, False),
    )
    if degree is None and error > tol:
        if wish.method == "polynomial":
            raise PlanError(
                f"the polynomial method is estimated not to meet tol={tol:g}: sampled scores reach {sampled.bound:.4g}, and "
                f"degree {plan.degree}, rank {plan.rank:,}, gives {error:.2g}. Use method='exact' "
                f"({si(plan.flops_exact)}flop), a larger tol or degree=..."
            )
        return exact(f"no polynomial is estimated to meet tol={tol:g}")
    if wish.method == "auto" and degree is None and plan.flops_exact <= plan.flops_polynomial:
        return exact("exact takes fewer operations than the polynomial that was estimated to do")
    return plan
