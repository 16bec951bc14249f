"""Which polynomial, or none, for scores of a known range: the smallest that is certified to do, if it takes less than exactly.

The choice for a shape by numbers alone, with the words that explain it; where the numbers come from is `planning`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, inf, isfinite, log2

from ..approximation.exponential import MAX_DEGREE, Polynomial, smallest
from ..approximation.exponential import minimax as minimax_polynomial
from ..approximation.exponential import taylor as taylor_polynomial
from ..approximation.pruning import HIGHER, Pruned, dropped, smallest_pruned, sums_of, worthwhile
from ..bounds.rounding import exact_errors, least_normaliser, lowrank_errors, lowrank_rounding
from ..checks import PlanError, shown, warn_caller, whole
from ..engines.spans import span_of
from ..features.monomials import rank as rank_of
from ..plans import USUAL_VALUE_DIM, Plan, Shape, plan_of, si

MAX_RANK = 1 << 18
# Exponents of all monomials in all channels, which are a table.
_MAX_EXPONENTS = 1 << 28
# Operations that take longer than to look for a pruned basis.
_WORTH_PRUNING = 2e8
_MAX_DEGREE = 40


def choose(
    shape: Shape,
    scale: float,
    tol: float,
    method: str,
    degree: int | None,
    series: str,
    source: str,
    bound: float,
    lowest_mean: float,
    sizes: tuple[float, ...] = (),
    gradients: bool = True,
) -> Plan:
    """The plan for scores within `bound` whose row means are at least `lowest_mean`; `sizes` of the channels if known."""
    if degree is not None:
        degree = whole("degree", degree, 1, MAX_DEGREE)
        if method == "exact":
            raise ValueError("degree belongs to the polynomial method, got it with method 'exact'")
        check_rank(shape, degree)
    rounded = _round_up(bound) if source == "data" else bound
    if method == "exact" and series != "minimax":
        raise ValueError(f"series belongs to the polynomial method, got {series!r} with method 'exact'")
    windows = shape.order.window is not None
    if windows and (method == "polynomial" or degree is not None):
        raise ValueError("window belongs to the exact method, got it with method='polynomial' or a degree")
    if windows:
        method = "exact"

    def plan_with(polynomial: Polynomial, reason: str, pruned: Pruned | None = None) -> Plan:
        error, grad_error = _polynomial_errors(shape, polynomial, lowest_mean, pruned, sizes)
        grading, sums = (pruned.grading, _rounded_sums(pruned, sizes)) if pruned else ((), ())
        rank = pruned.rank if pruned else rank_of(shape.dim, polynomial.degree)
        return plan_of(
            shape, scale, "polynomial", series, source, rounded, lowest_mean, error, grad_error, reason,
            polynomial.coefficients, rank, grading, sums,
        )  # fmt: skip

    def exact_plan(reason: str, rank: int) -> Plan:
        error, grad_error = exact_errors(
            rounded, dim=shape.dim, views=shape.views, value_dim=shape.value_dim, lengths=sum(shape.lengths),
            dtype=shape.dtype,
        )  # fmt: skip
        return plan_of(
            shape, scale, "exact", None, source, rounded, lowest_mean, error, grad_error, reason, (), rank
        )  # fmt: skip

    if degree is not None:
        fitted = _series(series, degree, rounded) if isfinite(rounded) else None
        if fitted is None or not any(fitted.coefficients):
            raise PlanError(f"scores may reach {rounded:.4g}, where no polynomial of degree {degree} resembles exp")
        return plan_with(fitted, f"degree {degree} was asked for")
    if method == "exact":
        return exact_plan("windows are exact" if windows else "exact was asked for", 0)

    best = _smallest(shape, rounded, lowest_mean, tol, series) if isfinite(rounded) else None
    needed = best.degree if best else _needed_degree(rounded, tol, series)
    worth = _WORTH_PRUNING if method == "auto" else 0.0
    pruned = (
        _pruned(shape, rounded, lowest_mean, tol, series, needed, sizes, gradients, worth) if needed and sizes else None
    )
    if pruned:
        best = _series(series, pruned.degree, rounded)
    problem = _why_not(shape, bound, tol, needed)
    if method == "polynomial":
        if best is None:
            raise PlanError(
                f"the polynomial method cannot meet tol={tol:g}: {problem}. Use method='exact' "
                f"({si(shape.exact_cost()[0])}flop), a larger tol, a smaller scale or inputs of smaller norm, "
                "degree=... to take what error a degree gives, or bound='estimated'"
            )
        return plan_with(best, "polynomial was asked for", pruned)
    if best is None:
        rank = 0 if needed is None else rank_of(shape.dim, needed)
        plan = exact_plan(f"no polynomial meets tol={tol:g}: {problem}", rank)
        if plan.error > tol:
            warn_caller(
                f"tol={tol:g} cannot be met in {shape.dtype}: rounding of scores up to {rounded:.4g} leaves an error of "
                f"up to {plan.error:.2g} with the exact method, which is taken"
            )
            return replace(plan, reason=f"{plan.reason}; the exact method's own rounding is above tol, too")
        return plan
    rank = pruned.rank if pruned else rank_of(shape.dim, best.degree)
    ratio = shape.exact_cost()[0] / shape.polynomial_cost(rank)[0]
    if ratio <= 1:
        return exact_plan(f"exact takes {1 / ratio:.3g} times fewer operations than degree {best.degree}", rank)
    kind = f"degree {best.degree}, pruned," if pruned else f"degree {best.degree}"
    return plan_with(best, f"{kind} meets tol={tol:g} with {ratio:.3g} times fewer operations than exact", pruned)


def _series(series: str, degree: int, bound: float) -> Polynomial:
    return minimax_polynomial(degree, bound) if series == "minimax" else taylor_polynomial(degree, bound)


def _polynomial_errors(
    shape: Shape,
    polynomial: Polynomial,
    lowest_mean: float,
    pruned: Pruned | None = None,
    sizes: Sequence[float] = (),
) -> tuple[float, float]:
    """(error, grad_error) of a polynomial for this shape, or of what a pruned basis keeps of it for channels of these sizes."""
    if not polynomial.delta < 1:
        return inf, inf
    theta = 0.0, 0.0
    if pruned:
        least = least_normaliser(polynomial.delta, polynomial.bound, lowest_mean)
        lost = dropped(polynomial.coefficients, pruned.grading, _rounded_sums(pruned, sizes))
        theta = (lost[0] / least, lost[1] / least) if least > 0 else (inf, inf)
    rho, rho_prime = lowrank_rounding(
        polynomial.coefficients,
        polynomial.bound,
        lowest_mean,
        delta=polynomial.delta,
        dim=shape.dim,
        rank=pruned.rank if pruned else rank_of(shape.dim, polynomial.degree),
        views=shape.views,
        value_dim=max(shape.value_dim, USUAL_VALUE_DIM),
        dtype=shape.dtype,
        span=span_of(shape.views) if shape.order.causal else 0,
    )
    return lowrank_errors(polynomial.delta, polynomial.delta_prime, rho, rho_prime, theta)


def _pruned(
    shape: Shape,
    bound: float,
    lowest_mean: float,
    tol: float,
    series: str,
    needed: int,
    sizes: Sequence[float],
    gradients: bool,
    worth: float,
) -> Pruned | None:
    """The smallest pruned basis that meets `tol` and is worth its shorter runs; None for the whole one, or for little work.

    Its gradients are held to what those of the whole basis would be if its error were just `tol`, unless none are asked for:
    channels that add little to the scores would have none, and training could not wake them.
    """
    whole = rank_of(shape.dim, needed)
    if not all(map(isfinite, sizes)) or min(shape.exact_cost()[0], shape.polynomial_cost(whole)[0]) < worth:
        return None
    error, grad_error = _polynomial_errors(shape, _series(series, needed, bound), lowest_mean)
    if not error > 0 or not isfinite(error):
        return None
    allowed = max(grad_error, grad_error / error * tol) if gradients else inf

    def accept(pruned: Pruned) -> bool:
        polynomial = _series(series, pruned.degree, bound)
        found, found_grad = _polynomial_errors(shape, polynomial, lowest_mean, pruned, sizes)
        return found <= tol and found_grad <= allowed

    below = min(largest_rank(shape.dim) + 1, worthwhile(whole, shape.value_dim))
    return smallest_pruned(sizes, range(needed, needed + HIGHER + 1), below, accept)


def _rounded_sums(pruned: Pruned, sizes: Sequence[float]) -> tuple[float, ...]:
    """What the channels of each weight add up to, rounded up so that plans are found again."""
    return tuple(map(_round_up, sums_of(pruned.grading, sizes)))


def _smallest(shape: Shape, bound: float, lowest_mean: float, tol: float, series: str) -> Polynomial | None:
    """The polynomial of least degree that meets `tol` at a rank that can be afforded."""
    affordable = max(affordable_degrees(shape.dim, _MAX_DEGREE), default=0)

    def accept(polynomial: Polynomial) -> bool:
        return polynomial.degree >= 1 and _polynomial_errors(shape, polynomial, lowest_mean)[0] <= tol

    return smallest(bound, accept, series=series, max_degree=affordable) if affordable else None  # type: ignore[arg-type]


def _needed_degree(bound: float, tol: float, series: str) -> int | None:
    """The least degree whose polynomial would meet `tol` in exact arithmetic, whatever its rank."""
    if not isfinite(bound):
        return None

    def accept(polynomial: Polynomial) -> bool:
        return polynomial.degree >= 1 and lowrank_errors(polynomial.delta, 0.0, 0.0, 0.0)[0] <= tol

    found = smallest(bound, accept, series=series, max_degree=_MAX_DEGREE)  # type: ignore[arg-type]
    return None if found is None else found.degree


def _why_not(shape: Shape, bound: float, tol: float, needed: int | None) -> str:
    """What stands against the polynomial method, in words."""
    where = f"scores may reach {bound:.4g}"
    if needed is None:
        return f"{where}, which takes a degree above {_MAX_DEGREE} and a rank above {shown(rank_of(shape.dim, _MAX_DEGREE), ',')}"
    rank = rank_of(shape.dim, needed)
    take = f"{where}, which takes degree {needed} and rank {shown(rank, ',')} at dim {shape.dim}"
    if rank > largest_rank(shape.dim):
        return f"{take}, {beyond(shape.dim)}"
    return f"{take}, where rounding in {shape.dtype} exceeds tol"


def largest_rank(dim: int) -> int:
    """The largest rank that a plan accepts for so many channels."""
    return min(MAX_RANK, _MAX_EXPONENTS // dim)


def affordable_degrees(dim: int, most: int) -> list[int]:
    """The degrees from 1 to `most` whose ranks a plan accepts."""
    return [g for g in range(1, most + 1) if rank_of(dim, g) <= largest_rank(dim)]


def check_rank(shape: Shape, degree: int) -> None:
    """Refuse a degree whose rank no plan accepts."""
    rank = rank_of(shape.dim, degree)
    if rank > largest_rank(shape.dim):
        memory = shape.polynomial_cost(rank)[1]
        raise ValueError(
            f"degree {degree} at dim {shape.dim} has rank {shown(rank, ',')} and would take {si(memory)}B of memory, "
            f"{beyond(shape.dim)}"
        )


def beyond(dim: int) -> str:
    """What a rank is beyond, in words."""
    largest = largest_rank(dim)
    return f"beyond the largest rank of {largest:,}" + (f" for {dim:,} channels" if largest < MAX_RANK else "")


def _round_up(bound: float) -> float:
    """To the next power of 2^(1/16), so that polynomials, and what is compiled with them, are found again."""
    if not isfinite(bound) or bound <= 0:
        return bound
    return float(2.0 ** (ceil(16 * log2(bound) + 1e-9) / 16))
