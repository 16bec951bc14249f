"""Plans: which method computes a call, at what degree, with what error, at what cost, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, isqrt
from typing import Any

from ..approximation.exponential import MAX_DEGREE
from ..approximation.pruning import HIGHER
from ..backends import Array
from ..bounds.rounding import Sums, least_normaliser, polynomial_errors, polynomial_rounding
from ..bounds.score_range import RangeCall, Ranges, largest_entries, ranges
from ..checks import (
    MAX_ORDER,
    Inputs,
    PlanError,
    checked_dtype,
    checked_finite,
    checked_inputs,
    checked_lengths,
    checked_options,
    checked_order,
    checked_series,
    described,
    positive,
    shown,
    true_or_false,
    whole,
)
from ..features.monomials import rank as rank_of
from ..methods import Banded, Exact, Polynomial
from ..plans import Plan, si, spread
from ..problem import Guarantee, Problem, ScoreRange
from .sampling import Estimate, Pruning, estimate
from .selection import Wish, affordable_degrees, beyond, check_rank, choose, largest_rank, plan_with, why_overflows

# Methods that can be asked for as values.
_VALUES = (Exact, Polynomial, Banded)
# Scores of which nothing is known.
_ANY = ScoreRange(inf, -inf, "promise")

# The largest rank that is tried in bands before it is known whether that will do.
_BANDED_RANK = 1 << 13
# Tuples of norm bands, each with a polynomial of its own.
_MAX_TUPLES = 1 << 26
# Views of a banded call, each a dimension of one array beside those of the call.
_MAX_BANDED_ORDER = 32
# Fits to samples gain nothing beyond.
_MOST_ESTIMATED = 12


def plan(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array] | None = None,
    *,
    scale: float | None = None,
    tol: float = 1e-3,
    method: str | Exact | Polynomial | Banded = "auto",
    degree: int | None = None,
    bound: float | str | None = None,
    series: str = "minimax",
    bands: int | None = None,
    moment: int | None = None,
    key_masks: Sequence[Array | None] | None = None,
    causal: bool = False,
    window: Sequence[int] | None = None,
    gradients: bool = True,
) -> Plan:
    """Choose a method for arrays like these, and say what it costs and how wrong it can be.

    Parameters
    ----------
    query, keys, values, scale, tol, key_masks, causal, window
        As in `tensor_attention`, which takes the plan with the same `causal` and `window`. Only shapes are read of
        `values`, and finiteness.
    method : {"auto", "polynomial", "exact"}, or a tattn.Exact, tattn.Polynomial or tattn.Banded
        A value says all that `degree`, `bound`, `series`, `bands` and `moment` would, and none of them goes with it.
    degree : int, optional
        Forces the polynomial method at this degree, whatever error that gives.
    bound : float or "estimated", optional
        By default R is bounded on the data: certified, in linear time. A number is the caller's own promise that
        no scale · Σ_c |q_ic a_jc b_kc|, and so no |score|, exceeds it: no value is read, now or when the plan is used.
        "estimated" samples scores, fits the
        polynomial to them and measures the error on sampled rows: ``certified=False``; check the answer with
        `measure_error`.
    series : {"minimax", "taylor", "banded"}
        Taylor is there for comparison with the paper. "banded" reads no value and needs no `bound`: ranges are found on
        the device, band by band, and the certified error comes with the answer (``return_error=True``). `degree` is 2
        if not given.
    bands, moment : int, optional
        Of "banded" alone: norm bands of every view, at most its rows, 8 if not given; even order t of the moments, at most
        `degree`, 2 if not given.
    gradients : bool
        Where channels add very different amounts to the scores fewer monomials will do (`Plan.grading`), unless a degree or a
        number for `bound` is given. By default their gradients are held to what those of all monomials would be if their error
        were just `tol`. False lets go of that, where nobody asks for gradients: channels that add little may then have none.

    Returns
    -------
    Plan

    Raises
    ------
    PlanError
        If ``method="polynomial"`` cannot meet `tol`; the message gives the range found, degree and rank it would
        take and what to do.
    TypeError, ValueError
        For arguments that do not fit, by name.

    Examples
    --------
    >>> import numpy as np, tattn
    >>> query, *keys = np.random.default_rng(0).uniform(-1, 1, (3, 5000, 4))
    >>> plan = tattn.plan(query, keys)
    >>> plan.method, plan.error < 1e-3
    ('polynomial', True)
    """
    inputs = checked_inputs(query, keys, values, key_masks, (causal, window))
    if isinstance(method, _VALUES):
        number = checked_options(scale, inputs.dim, tol, "auto", inputs.views, inputs.dtype)
        asked = {"degree": degree, "bound": bound, "series": series, "bands": bands, "moment": moment}
        return _of_method(method, inputs.problem(number), **asked)
    number = checked_options(scale, inputs.dim, tol, method, inputs.views, inputs.dtype)
    banded = _is_banded(series, bands, moment)
    wish = Wish(tol, method, degree, series, true_or_false("gradients", gradients))
    if banded:
        return _asked_banded(inputs.problem(number), wish, bound, bands, moment)
    return plan_inputs(inputs, number, wish, bound)


def plan_for(
    *,
    n: int | Sequence[int],
    dim: int,
    bound: float | None = None,
    order: int = 3,
    tol: float = 1e-3,
    dtype: str = "float32",
    scale: float | None = None,
    value_dim: int | None = None,
    method: str | Exact | Polynomial | Banded = "auto",
    degree: int | None = None,
    series: str = "minimax",
    bands: int | None = None,
    moment: int | None = None,
    causal: bool = False,
    window: Sequence[int] | None = None,
    workers: int | None = None,
    bandwidth: float | None = None,
    flops: float | None = None,
) -> Plan:
    """Plan from numbers alone, for a call that does not exist yet.

    Parameters
    ----------
    n : int or sequence of int
        Rows of query and of every view, or (n, n_1, …, n_m).
    dim : int
        Channels of query and keys.
    bound : float
        The caller's promise that no scale · Σ_c |q_ic a_jc b_kc|, and so no |score|, exceeds it; required, but not to be given
        with ``series="banded"``.
    order : int
        Views and one for the query, at least 2.
    dtype : {"float64", "float32", "float16", "bfloat16"}
    value_dim : int, optional
        Channels of the values; `dim` if not given.
    tol, scale, method, degree, series, bands, moment, causal, window
        As in `plan`.
    workers : int, optional
        Processes or machines that have a share of the rows each, as in `tattn.distributed`: the plan says what each sends.
    bandwidth : float, optional
        Bytes a second that a worker sends.
    flops : float, optional
        Operations a second that a worker reaches in such products. With `bandwidth` the plan estimates its time.

    Raises
    ------
    PlanError
        If ``method="polynomial"`` cannot meet `tol`; for `workers` or `flops` where the plan is exact or banded, which have no
        summaries that add up.
    TypeError, ValueError
        For arguments that do not fit, by name.

    Examples
    --------
    >>> import tattn
    >>> plan = tattn.plan_for(n=1_000_000, dim=8, bound=1.0, tol=1e-3)
    >>> plan.method, plan.rank < 2000
    ('polynomial', True)
    >>> spread = tattn.plan_for(n=10**9, dim=8, bound=1.0, workers=1024, bandwidth=50e9, flops=10e12)
    >>> spread.bytes_sent < 1e6, spread.seconds < 1
    (True, True)
    """
    order, dim = whole("order", order, 2, MAX_ORDER), whole("dim", dim, 1)
    lengths = checked_lengths(n, order)
    dtype = checked_dtype(dtype)
    by_name = "auto" if isinstance(method, _VALUES) else method
    number = checked_options(scale, dim, tol, by_name, order - 1, dtype)
    value_dim = dim if value_dim is None else whole("value_dim", value_dim, 1)
    seen = checked_order(causal, window, lengths)
    problem = Problem(order - 1, dim, value_dim, dtype, lengths, 1, number, seen)
    if bandwidth is not None and workers is None:
        raise ValueError(f"bandwidth should come with workers, got {positive('bandwidth', bandwidth)} alone")
    if isinstance(method, _VALUES):
        made = _of_method(method, problem, degree=degree, bound=bound, series=series, bands=bands, moment=moment)
    elif _is_banded(series, bands, moment):
        made = _asked_banded(problem, Wish(tol, method, degree, series), bound, bands, moment)
    else:
        made = choose(problem, _promised(bound), Wish(tol, method, degree, series))
    if workers is None and flops is None:
        return made
    count = 1 if workers is None else whole("workers", workers, 1)
    rates = [
        None if rate is None else positive(name, rate) for name, rate in (("bandwidth", bandwidth), ("flops", flops))
    ]
    if made.method != "polynomial" or made.series == "banded":
        kind = made.series or made.method
        raise PlanError(f"a plan for workers or flops should be polynomial and not banded, got {kind}: {made.reason}")
    return spread(made, count, *rates)


def plan_inputs(inputs: Inputs, scale: float, wish: Wish, bound: float | str | None = None) -> Plan:
    """`plan` for arrays that were checked; any series but "banded"."""
    problem = inputs.problem(scale)
    if wish.degree is not None:
        # Before any value is read.
        check_rank(problem, whole("degree", wish.degree, 1, MAX_DEGREE))
    if isinstance(bound, str) and bound != "estimated":
        raise TypeError(f"bound should be a number or 'estimated', got the str {bound!r}")
    if bound is not None and not isinstance(bound, str):
        return choose(problem, _promised(bound), wish)
    if inputs.traced:
        if (wish.method == "exact" or inputs.order.window is not None) and bound is None:
            return choose(problem, _ANY, wish)
        raise PlanError("the arrays are traced and their range cannot be read: give a bound of your own, bound=...")
    found = measured(inputs, scale)
    checked_finite(found.largest, inputs.views)
    if bound is not None:
        if wish.method == "exact":
            raise ValueError("bound='estimated' samples scores for a polynomial and has no use with method 'exact'")
        if wish.series != "minimax":
            raise ValueError(
                f"series has no use with bound='estimated', which fits its own polynomial; got {wish.series!r}"
            )
        if inputs.order.causal:
            raise ValueError(
                "bound='estimated' samples all pairs and has no use with causal=True: give a bound, or none"
            )
        return _estimated(inputs, problem, found, wish)
    return plan_found(problem, found, wish)


def plan_found(problem: Problem, found: Ranges, wish: Wish) -> Plan:
    """A certified plan for the ranges that were found on data."""
    # The mean is allowed a margin, so that the plan holds for the same rows in another order or library. It is that over
    # all pairs, and says nothing of some of them.
    lowest_mean = -inf if problem.order.causal else found.lowest_mean - 0.02 * found.bound
    scores = ScoreRange(found.bound, lowest_mean, "data", found.sizes)
    made = choose(problem, scores, wish)
    overflows = why_overflows(made.degree, found.highest)
    if overflows is None:
        return made
    if wish.method == "polynomial" or wish.degree is not None:
        raise PlanError(f"{overflows}: use method='exact'")
    return replace(choose(problem, scores, Wish(wish.tol, "exact")), reason=overflows)


def exact_plan(inputs: Inputs, scale: float) -> Plan:
    """A plan for the exact method that says nothing of its error, for which nothing but that all is finite is looked at."""
    call = RangeCall(scale, inputs.views)
    checked_finite(largest_entries(call, inputs.backend, inputs.backend.values_of(inputs.arrays)), inputs.views)
    return choose(inputs.problem(scale), _ANY, Wish(inf, "exact"))


def measured(inputs: Inputs, scale: float) -> Ranges:
    """Range of the scores and largest entries of eager arrays."""
    return ranges(RangeCall(scale, inputs.views), inputs.backend, inputs.backend.values_of(inputs.arrays))


def _promised(bound: Any) -> ScoreRange:
    promised = positive("bound", bound)
    return ScoreRange(promised, -promised, "promise")


def banded_candidates(problem: Problem) -> list[Plan]:
    """Banded plans to try, the cheapest first."""
    shortest = min(problem.lengths)
    bands = 8 if shortest < 1 << 14 else 12
    if problem.order.causal or shortest < 2 * bands or not bands_fit(bands, problem.views + 1):
        return []
    tried = [(2, 2), (3, 2), (4, 2), (4, 4), (5, 4)]
    return [_banded(problem, Banded(g, bands, t)) for g, t in tried if rank_of(problem.dim, g) <= _BANDED_RANK]


def _of_method(method: Exact | Polynomial | Banded, problem: Problem, **without_use: Any) -> Plan:
    """A plan for a method that was given as a value, which has what other options would say."""
    for name, value in without_use.items():
        if value not in (None, "minimax"):
            raise ValueError(f"{name} has no use with a method that is a value, got {name}={described(value)}")
    reason = f"{type(method).__name__} was asked for"
    if isinstance(method, Banded):
        return replace(_banded(problem, method), reason=reason)
    if isinstance(method, Exact):
        return plan_with(method, problem, _ANY, reason)
    if problem.order.window is not None:
        raise ValueError("window belongs to the exact method, got it with a Polynomial")
    check_rank(problem, method.degree)
    return plan_with(method, problem, _promised(method.bound), reason)


def _is_banded(series: Any, bands: Any, moment: Any) -> bool:
    """Whether the series is "banded"; ValueError for what belongs to it and to no other."""
    if checked_series(series) == "banded":
        return True
    for name, value in (("bands", bands), ("moment", moment)):
        if value is not None:
            raise ValueError(f"{name} should come with series 'banded', got it with series {series!r}")
    return False


def _asked_banded(problem: Problem, wish: Wish, bound: Any, bands: int | None, moment: int | None) -> Plan:
    """A banded plan, with what it does not go together with refused."""
    if bound is not None:
        raise ValueError(f"bound has no use with series 'banded', which finds its own ranges; got {described(bound)}")
    if wish.method == "exact":
        raise ValueError("series 'banded' belongs to the polynomial method, got it with method 'exact'")
    degree, bands, moment = (
        usual if given is None else given for given, usual in ((wish.degree, 2), (bands, 8), (moment, 2))
    )
    return _banded(problem, Banded(degree, bands, moment))


def bands_fit(bands: int, order: int) -> bool:
    """Whether a plan accepts so many norm bands of every view."""
    return order <= _MAX_BANDED_ORDER and bands**order <= _MAX_TUPLES


def _banded(problem: Problem, method: Banded) -> Plan:
    """A plan whose error comes with the answer."""
    if problem.order.causal:
        raise ValueError(
            "series 'banded' sorts rows by norm and has no use where their order counts, got it with causal=True"
        )
    order = problem.views + 1
    if order > _MAX_BANDED_ORDER:
        raise ValueError(f"order should be at most {_MAX_BANDED_ORDER} with series 'banded', got {order}")
    degree = whole("degree", method.degree, 1, MAX_DEGREE)
    bands, moment = whole("bands", method.bands, 1), whole("moment", method.moment, 2)
    if not bands_fit(bands, order):
        most = max(b for b in range(1, isqrt(_MAX_TUPLES) + 1) if bands_fit(b, order))
        raise ValueError(
            f"bands should be at most {most:,} for order {order}, got {shown(bands)}: each tuple of bands has a polynomial "
            "of its own"
        )
    if bands > min(problem.lengths):
        raise ValueError(f"bands should be at most the rows of every view, {min(problem.lengths)}, got {bands}")
    if moment % 2:
        raise ValueError(f"moment should be even, got {moment}")
    if moment > degree:
        raise ValueError(f"moment should be at most the degree {degree}, got {moment}: moments are sums of monomials")
    check_rank(problem, degree)
    scores = ScoreRange(inf, -inf, "answer")
    return plan_with(Banded(degree, bands, moment), problem, scores, "banded was asked for")


def _estimated(inputs: Inputs, problem: Problem, found: Ranges, wish: Wish) -> Plan:
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
