"""Choose a method by numbers alone: the polynomial of least degree that meets `tol`, or the exact method if that is cheaper.

Where the numbers come from is `planning`; the words that explain a choice are here.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf, isfinite
from typing import NamedTuple

from ..approximation.exponential import MAX_DEGREE, smallest
from ..approximation.exponential import Polynomial as Approximation
from ..approximation.pruning import HIGHER, Pruned, smallest_pruned, worthwhile
from ..bounds.rounding import polynomial_errors
from ..bounds.score_range import rounded_up
from ..checks import PlanError, shown, warn_caller, whole
from ..features.monomials import rank as rank_of
from ..methods import METHODS, Exact, Method, Polynomial
from ..methods.polynomial import cost_of
from ..operands import Order
from ..plans import Plan, si
from ..problem import Cost, Guarantee, Problem, ScoreRange
from .settings import settings

# What `method=` may be: the cheapest method that meets `tol`, or one by name.
NAMES = ("auto", *METHODS)
# Scores of which nothing is known.
ANY = ScoreRange(inf, -inf, "promise")
# Exponents of all monomials in all channels, which are a table.
_MAX_EXPONENTS = 1 << 28
# Operations that take longer than to look for a pruned basis.
_WORTH_PRUNING = 2e8
MOST_DEGREE = 40


class Wish(NamedTuple):
    """What a caller asks of a plan. `gradients`: whether those of a pruned basis are held to `tol`, None for no pruned basis.

    `method`: one of `NAMES`, or a method as a value; `max_flops`: operations that a forward call may take, None for any number.
    """

    tol: float
    method: str | Method = "auto"
    degree: int | None = None
    series: str = "minimax"
    gradients: bool | None = True
    max_flops: float | None = None

    @property
    def fixed(self) -> Method | None:
        """The method that was asked for, where that leaves no choice: any but "auto" and "polynomial"."""
        if not isinstance(self.method, str):
            return self.method
        return None if self.method in ("auto", "polynomial") else METHODS[self.method]()


class Unread(NamedTuple):
    """What a plan needs that is for calls of any length, of a method that needs no range of the scores: numbers and words alone.

    A compiler knows these of a call whose lengths and values it does not know. Others as in `Problem`, `Order` and `Wish`.
    """

    shapes: tuple[int, int, int, str]
    scale: float
    causal: bool
    window: tuple[int, ...] | None
    chain: int
    channels: str
    method: str

    def plan(self) -> Plan:
        """It states no error."""
        shapes = *self.shapes, (1,) * (1 + self.shapes[0]), 1
        problem = Problem(*shapes, self.scale, Order(self.causal, self.window), self.chain, self.channels)
        return choose(problem, ANY, Wish(inf, self.method))


def choose(problem: Problem, scores: ScoreRange, wish: Wish) -> Plan:
    """The plan for scores of this range."""
    fixed = wish.fixed
    if wish.degree is not None:
        wish = wish._replace(degree=whole("degree", wish.degree, 1, MAX_DEGREE))
        if fixed:
            raise ValueError(f"degree belongs to the polynomial method, got it with method {fixed.name!r}")
        check_rank(problem, wish.degree)  # type: ignore[arg-type]
    if fixed and wish.series != "minimax":
        raise ValueError(f"series belongs to the polynomial method, got {wish.series!r} with method {fixed.name!r}")
    # What a plan for data serves, so that plans are found again.
    served = scores._replace(bound=rounded_up(scores.bound)) if scores.source == "data" else scores
    if fixed:
        return plan_with(fixed, problem, served, f"{fixed.name} was asked for")
    if not isfinite(scores.bound) and may_be_unknown(problem.order, wish):
        return _exact(
            problem,
            served,
            "the range of the scores is not known, and the method in windows need not be the polynomial",
        )
    if wish.degree is not None:
        return _of_degree(problem, served, wish.series, wish.degree)

    best, needed = _candidate(problem, served, wish)
    why_not = _why_not(problem, scores.bound, wish.tol, needed)
    if wish.method == "polynomial":
        if best is None:
            raise PlanError(
                f"the polynomial method cannot meet tol={wish.tol:g}: {why_not}. Use method='exact' "
                f"({si(Exact().cost(problem).flops)}flop), a larger tol, a smaller scale or inputs of smaller norm, "
                "degree=... to take what error a degree gives, or bound='estimated'"
            )
        return plan_with(best, problem, served, "polynomial was asked for")
    if best is None:
        rank = 0 if needed is None else rank_of(problem.dim, needed)
        plan = _exact(problem, served, f"no polynomial meets tol={wish.tol:g}: {why_not}", rank)
        if plan.error > wish.tol:
            warn_caller(
                f"tol={wish.tol:g} cannot be met in {problem.dtype}: rounding of scores up to {served.bound:.4g} leaves an "
                f"error of up to {plan.error:.2g} with the exact method, which is used"
            )
            return replace(plan, reason=f"{plan.reason}; the exact method's own rounding is above tol, too")
        return plan
    ratio = Exact().cost(problem).flops / best.cost(problem).flops
    if ratio <= 1:
        reason = f"exact takes {1 / ratio:.3g} times fewer operations than degree {best.degree}"
        return _exact(problem, served, reason, best.rank(problem.dim))
    kind = f"degree {best.degree}, pruned," if best.grading else f"degree {best.degree}"
    reason = f"{kind} meets tol={wish.tol:g} with {ratio:.3g} times fewer operations than exact"
    return plan_with(best, problem, served, reason)


def may_be_unknown(order: Order, wish: Wish) -> bool:
    """Whether the range of the scores need not be known: the method was asked for, or there are windows and may be any method."""
    return wish.fixed is not None or (order.window is not None and wish.method == "auto" and wish.degree is None)


def plan_with(
    method: Method, problem: Problem, scores: ScoreRange, reason: str, guarantee: Guarantee | None = None
) -> Plan:
    """A plan for this method, with what it promises unless that is known better."""
    polynomial = isinstance(method, Polynomial)
    return Plan(
        problem=problem,
        algorithm=method,
        scores=scores._replace(sizes=()),
        guarantee=method.guarantee(problem, scores) if guarantee is None else guarantee,
        exact=Exact().cost(problem),
        polynomial=Cost.unknown() if isinstance(method, Exact) else method.cost(problem),
        reason=reason,
        sizes=method.sums(scores) if polynomial and scores.sizes else (),  # type: ignore[attr-defined]
    )


def _exact(problem: Problem, scores: ScoreRange, reason: str, rank: int = 0) -> Plan:
    """The exact method; `rank` is that of the polynomial it was compared with, if any."""
    plan = plan_with(Exact(), problem, scores, reason)
    return replace(plan, polynomial=cost_of(problem, rank)) if rank else plan


def _of_degree(problem: Problem, scores: ScoreRange, series: str, degree: int) -> Plan:
    """The polynomial of a degree that was asked for, whatever its error."""
    found = Polynomial.of_series(series, degree, scores.bound) if isfinite(scores.bound) else None
    if found is None or not any(found.coefficients):
        raise PlanError(f"scores may reach {scores.bound:.4g}, where no polynomial of degree {degree} approximates exp")
    return plan_with(found, problem, scores, f"degree {degree} was asked for")


def _candidate(problem: Problem, scores: ScoreRange, wish: Wish) -> tuple[Polynomial | None, int | None]:
    """The smallest polynomial that is certified to meet `tol`, and the degree it takes before any rounding; None without one."""
    if not isfinite(scores.bound):
        return None, None
    found = _smallest(problem, scores, wish)
    needed = found.degree if found else _needed_degree(scores.bound, wish)
    pruned = _pruned(problem, scores, wish, needed) if needed and scores.sizes and wish.gradients is not None else None
    return pruned or found, needed


def _pruned(problem: Problem, scores: ScoreRange, wish: Wish, needed: int) -> Polynomial | None:
    """The smallest pruned basis that meets `tol` and is worth its shorter runs; None for the whole one, or for little work.

    If gradients are asked for, their error may be as large as that of the whole basis would be at an error of just `tol`: with no
    such limit, channels that add little to the scores would have no gradients, and training could not wake them.
    """
    whole = rank_of(problem.dim, needed)
    worth = _WORTH_PRUNING if wish.method == "auto" else 0.0
    work = min(Exact().cost(problem).flops, cost_of(problem, whole).flops)
    if not all(map(isfinite, scores.sizes)) or work < worth:
        return None
    error, grad_error, _ = Polynomial.of_series(wish.series, needed, scores.bound).guarantee(problem, scores)
    if not error > 0 or not isfinite(error):
        return None
    allowed = max(grad_error, grad_error / error * wish.tol) if wish.gradients else inf

    def of(pruned: Pruned) -> Polynomial:
        return Polynomial.of_series(wish.series, pruned.degree, scores.bound, pruned.grading)

    def accept(pruned: Pruned) -> bool:
        found, found_grad, _ = of(pruned).guarantee(problem, scores)
        return found <= wish.tol and found_grad <= allowed

    below = min(largest_rank(problem.dim) + 1, worthwhile(whole, problem.value_dim))
    sizes = scores.sizes * 2 if problem.paired else scores.sizes
    best = smallest_pruned(sizes, range(needed, needed + HIGHER + 1), below, accept)
    return of(best) if best else None


def _smallest(problem: Problem, scores: ScoreRange, wish: Wish) -> Polynomial | None:
    """The polynomial of least degree that meets `tol` at a rank that can be afforded."""
    affordable = max(affordable_degrees(problem.dim, MOST_DEGREE), default=0)

    def accept(found: Approximation) -> bool:
        if found.degree < 1:
            return False
        return Polynomial.of(wish.series, found).guarantee(problem, scores).error <= wish.tol

    if not affordable:
        return None
    best = smallest(scores.bound, accept, series=wish.series, max_degree=affordable)  # type: ignore[arg-type]
    return None if best is None else Polynomial.of(wish.series, best)


def _needed_degree(bound: float, wish: Wish) -> int | None:
    """The least degree whose polynomial would meet `tol` in exact arithmetic, whatever its rank."""

    def accept(found: Approximation) -> bool:
        return found.degree >= 1 and polynomial_errors(found.delta, 0.0, 0.0, 0.0)[0] <= wish.tol

    best = smallest(bound, accept, series=wish.series, max_degree=MOST_DEGREE)  # type: ignore[arg-type]
    return None if best is None else best.degree


def _why_not(problem: Problem, bound: float, tol: float, needed: int | None) -> str:
    """What stands against the polynomial method, in words."""
    where = f"scores may reach {bound:.4g}"
    if needed is None:
        most = shown(rank_of(problem.dim, MOST_DEGREE), ",")
        return f"{where}, which takes a degree above {MOST_DEGREE} and a rank above {most}"
    rank = rank_of(problem.dim, needed)
    take = f"{where}, which takes degree {needed} and rank {shown(rank, ',')} at dim {problem.dim}"
    if rank > largest_rank(problem.dim):
        return f"{take}, {beyond(problem.dim)}"
    return f"{take}, where rounding in {problem.dtype} exceeds tol"


def largest_rank(dim: int) -> int:
    """The largest rank that a plan accepts for so many channels."""
    return min(settings().max_rank, _MAX_EXPONENTS // dim)


def affordable_degrees(dim: int, most: int) -> list[int]:
    """The degrees from 1 to `most` whose ranks a plan accepts."""
    return [g for g in range(1, most + 1) if rank_of(dim, g) <= largest_rank(dim)]


def why_overflows(degree: int, highest: float) -> str | None:
    """What stands against a degree for data whose powers overflow above the `highest`, in words; None if nothing does."""
    if degree <= highest:
        return None
    return (
        f"degree {degree} is above {highest:.0f}: powers of entries would overflow, because a channel is denormal in one view "
        "and large in another"
    )


def check_rank(problem: Problem, degree: int) -> None:
    """Refuse a degree whose rank no plan accepts."""
    rank = rank_of(problem.dim, degree)
    if rank > largest_rank(problem.dim):
        raise ValueError(
            f"degree {degree} at dim {problem.dim} has rank {shown(rank, ',')} and would take "
            f"{si(cost_of(problem, rank).bytes)}B of memory, {beyond(problem.dim)}"
        )


def beyond(dim: int) -> str:
    """What a rank is beyond, in words."""
    largest = largest_rank(dim)
    return f"beyond the largest rank of {largest:,}" + (
        f" for {dim:,} channels" if largest < settings().max_rank else ""
    )
