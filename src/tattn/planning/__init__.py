"""Plans: which method computes a call, at what degree, with what error, at what cost, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any

from ..approximation.exponential import MAX_DEGREE
from ..backends import Array
from ..backends.tables import memoized
from ..bounds.score_range import RangeCall, Ranges, largest_entries, ranges, united
from ..checks import (
    MAX_ORDER,
    Inputs,
    PlanError,
    checked_channels,
    checked_dtype,
    checked_finite,
    checked_inputs,
    checked_lengths,
    checked_method,
    checked_options,
    checked_order,
    described,
    positive,
    true_or_false,
    whole,
    with_channels,
)
from ..documents import pieces, rows_at_once
from ..methods import Banded, Exact, Method, Polynomial
from ..operands import REAL
from ..plans import Plan, spread
from ..problem import Problem, ScoreRange
from ..weights import with_weights
from .banded import asked_banded, banded_plan, is_banded
from .estimated import estimated_plan
from .limits import check_cost, check_flops, checked_most
from .selection import ANY, NAMES, Wish, check_rank, choose, may_be_unknown, plan_with, why_overflows

# Methods that hold all that a plan needs, without the range of any scores.
_COMPLETE = (Exact, Polynomial, Banded)


def plan(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array] | None = None,
    *,
    scale: float | None = None,
    tol: float = 1e-3,
    method: str | Method = "auto",
    degree: int | None = None,
    bound: float | str | None = None,
    series: str = "minimax",
    bands: int | None = None,
    moment: int | None = None,
    key_masks: Sequence[Array | None] | None = None,
    key_weights: Sequence[Array | None] | None = None,
    causal: bool = False,
    window: Sequence[int] | None = None,
    gradients: bool = True,
    channels: str = REAL,
    max_flops: float | None = None,
) -> Plan:
    """Choose a method for arrays like these, with its cost and a bound on its error.

    Parameters
    ----------
    query, keys, values, scale, tol, key_masks, key_weights, causal, window, channels
        As in `tensor_attention`. The call that takes the plan needs the same `causal` and `window`. Of `values` only
        shapes are used, and they are checked for NaN and infinities.
    method : {"auto", "polynomial", "exact"}, or a tattn.Exact, tattn.Polynomial or tattn.Banded
        A value holds all that `degree`, `bound`, `series`, `bands` and `moment` would say, so none of them may come
        with it. A method of your own is a value as well, and takes a `bound`.
    degree : int, optional
        Forces the polynomial method at this degree, whatever error that gives.
    bound : float or "estimated", optional
        By default R is bounded on the data: certified, in linear time. A number is your promise that no scale · Σ_c
        |q_ic a_jc b_kc|, and so no |score|, exceeds it. No value is read then, now or when the plan is used.
        "estimated" samples scores, fits the polynomial to them and measures the error on sampled rows:
        ``certified=False``; check the answer with `measure_error`.
    series : {"minimax", "taylor", "banded"}
        "taylor" is for comparison with the paper. "banded" reads no value and needs no `bound`: it finds ranges on the
        device, band by band, and the certified error comes with the answer (``return_error=True``). `degree` is 2 if
        not given.
    bands, moment : int, optional
        Only for "banded". `bands`: norm bands of every view, at most its rows, 8 if not given. `moment`: even order t
        of the moments, at most `degree`, 2 if not given.
    gradients : bool
        Where channels add very different amounts to the scores, a plan may use fewer monomials (`Plan.grading`), unless
        a degree or a number for `bound` is given. By default `grad_error` stays what it would be with all monomials if
        their error were just `tol`. False drops this condition, for calls without gradients: channels that add little
        may then get no gradient.
    max_flops : float, optional
        Most operations that a forward call may take, as `flops_exact` and `flops_polynomial` count them. Without it, a
        method that was chosen and takes more than half a minute on this machine is warned of.

    Returns
    -------
    Plan

    Raises
    ------
    PlanError
        If ``method="polynomial"`` cannot meet `tol`. The message gives the range that was found, the degree and rank it
        would take, and what to do. If a call takes more than `max_flops`.
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
    inputs = with_channels(checked_inputs(query, keys, values, key_masks, (causal, window)), channels)
    if key_weights is not None:
        reading = (bound is None or isinstance(bound, str)) and not is_banded(series, bands, moment)
        inputs, _ = with_weights(inputs, key_weights, reading)
    method = _checked(method)
    number = checked_options(scale, inputs.dim, tol, inputs.views, inputs.dtype)
    if isinstance(method, _COMPLETE):
        asked = {"degree": degree, "bound": bound, "series": series, "bands": bands, "moment": moment}
        made = _of_method(method, inputs.problem(number), **asked)
        check_flops(made, checked_most(max_flops))
        return made
    banded = is_banded(series, bands, moment)
    wish = Wish(tol, method, degree, series, true_or_false("gradients", gradients), checked_most(max_flops))
    banded_of = (inputs.problem(number), wish, bound, bands, moment)
    made = asked_banded(*banded_of) if banded else plan_inputs(inputs, number, wish, bound)
    check_cost(inputs, made, wish)
    return made


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
    method: str | Method = "auto",
    degree: int | None = None,
    series: str = "minimax",
    bands: int | None = None,
    moment: int | None = None,
    causal: bool = False,
    window: Sequence[int] | None = None,
    channels: str = REAL,
    workers: int | None = None,
    bandwidth: float | None = None,
    flops: float | None = None,
    max_flops: float | None = None,
) -> Plan:
    """Make a plan from numbers alone, for a call that does not exist yet.

    Parameters
    ----------
    n : int or sequence of int
        Rows of query and of every view, or (n, n_1, …, n_m).
    dim : int
        Channels of query and keys; of complex ones their real and imaginary parts, an even number.
    bound : float
        Your promise that no scale · Σ_c |q_ic a_jc b_kc|, and so no |score|, exceeds it. Required, except with
        ``series="banded"``, which takes none.
    order : int
        Number of views plus one, at least 2.
    dtype : {"float64", "float32", "float16", "bfloat16"}
    value_dim : int, optional
        Channels of the values; `dim` if not given.
    tol, scale, method, degree, series, bands, moment, causal, window, channels, max_flops
        As in `plan`.
    workers : int, optional
        Processes or machines among which the rows are spread, as in `tattn.distributed`. The plan says what each sends.
    bandwidth : float, optional
        Bytes a second that a worker sends.
    flops : float, optional
        Operations a second that a worker reaches in such products. With `bandwidth` as well, the plan estimates the
        time.

    Raises
    ------
    PlanError
        If ``method="polynomial"`` cannot meet `tol`. If a call takes more than `max_flops`. With `workers` or `flops`,
        if the plan is exact or banded: these have no summaries that add up.
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
    method = _checked(method)
    number = checked_options(scale, dim, tol, order - 1, dtype)
    value_dim = dim if value_dim is None else whole("value_dim", value_dim, 1)
    seen = checked_order(causal, window, lengths)
    channels = checked_channels(channels, dim, "dim")
    problem = Problem(order - 1, dim, value_dim, dtype, lengths, 1, number, seen, channels=channels)
    if bandwidth is not None and workers is None:
        raise ValueError(f"bandwidth should come with workers, got {positive('bandwidth', bandwidth)} alone")
    if isinstance(method, _COMPLETE):
        made = _of_method(method, problem, degree=degree, bound=bound, series=series, bands=bands, moment=moment)
    elif is_banded(series, bands, moment):
        made = asked_banded(problem, Wish(tol, method, degree, series), bound, bands, moment)
    else:
        made = choose(problem, _promised(bound), Wish(tol, method, degree, series))
    check_flops(made, checked_most(max_flops))
    if workers is None and flops is None:
        return made
    count = 1 if workers is None else whole("workers", workers, 1)
    rates = [
        None if rate is None else positive(name, rate) for name, rate in (("bandwidth", bandwidth), ("flops", flops))
    ]
    if made.method != "polynomial" or made.series == "banded":
        kind = made.series or made.method
        raise PlanError(f"a plan for workers or flops should be polynomial and not banded, got {kind}: {made.reason}")
    if workers is not None and made.window is not None:
        raise PlanError(f"a plan for workers should have no window, which needs the keys themselves, got {made.window}")
    return spread(made, count, *rates)


def plan_inputs(inputs: Inputs, scale: float, wish: Wish, bound: float | str | None = None) -> Plan:
    """`plan` for arrays that were checked; any series but "banded"."""
    made = _planned(inputs, scale, wish, bound)
    if inputs.documents is None or made.method == "polynomial":
        return made
    # Costs are those of documents of equal length; what the exact method rounds grows with the longest.
    longest = replace(made.problem, lengths=inputs.documents.longest)
    return replace(made, guarantee=Exact().guarantee(longest, made.scores))


def _planned(inputs: Inputs, scale: float, wish: Wish, bound: float | str | None) -> Plan:
    """`plan_inputs`, with costs and errors of documents of equal length."""
    problem = inputs.problem(scale)
    if wish.degree is not None:
        # Before any value is read.
        check_rank(problem, whole("degree", wish.degree, 1, MAX_DEGREE))
    if isinstance(bound, str) and bound != "estimated":
        raise TypeError(f"bound should be a number or 'estimated', got the str {bound!r}")
    if bound is not None and not isinstance(bound, str):
        return choose(problem, _promised(bound), wish)
    if inputs.traced:
        if bound is None and may_be_unknown(inputs.order, wish):
            return choose(problem, ANY, wish)
        raise PlanError(
            "the arrays are traced and their range cannot be read: give a bound that you promise, bound=..."
        )
    found = measured(inputs, scale)
    checked_finite(found.largest, inputs.views)
    if bound is not None:
        if wish.fixed:
            raise ValueError(
                "bound='estimated' samples scores for a polynomial and cannot be combined with method "
                f"{wish.fixed.name!r}"
            )
        if wish.series != "minimax":
            raise ValueError(
                f"series cannot be combined with bound='estimated', which fits its own polynomial; got {wish.series!r}"
            )
        if inputs.order.causal:
            raise ValueError(
                "bound='estimated' samples all pairs and cannot be combined with causal=True: give a bound, or none"
            )
        return estimated_plan(inputs, problem, found, wish)
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
    """A plan for the exact method that states no error. It checks that all values are finite, and looks at nothing else."""
    call = RangeCall(scale, inputs.views, channels=inputs.channels)
    checked_finite(largest_entries(call, inputs.backend, inputs.backend.values_of(inputs.arrays)), inputs.views)
    return _exact_of(inputs.problem(scale))


@memoized
def _exact_of(problem: Problem) -> Plan:
    """The exact method's plan for scores of any size: the same for calls of the same shapes."""
    return choose(problem, ANY, Wish(inf, "exact"))


def measured(inputs: Inputs, scale: float) -> Ranges:
    """Range of the scores and largest entries of eager arrays."""
    call, backend = RangeCall(scale, inputs.views, channels=inputs.channels), inputs.backend
    values = backend.values_of(inputs.arrays)
    if inputs.documents is None:
        return ranges(call, backend, values)
    rows = rows_at_once(inputs.dim, inputs.leading, inputs.arrays[0].dtype, backend)  # type: ignore[union-attr]
    layout, places = inputs.documents.laid_out(values[0], rows, backend)
    return united([ranges(call, backend, piece.arrays(values)) for piece in pieces(layout, places, backend)])


def _checked(method: Any) -> Any:
    """A method as a value, or one of `NAMES`."""
    return method if isinstance(method, Method) else checked_method(method, NAMES)


def _promised(bound: Any) -> ScoreRange:
    if bound is None:
        raise TypeError(
            "bound should be a number, got NoneType: it is your promise of how large scores are. Without one, "
            "series='banded' finds ranges on the way, and tattn.plan reads them from arrays"
        )
    promised = positive("bound", bound)
    return ScoreRange(promised, -promised, "promise")


def _of_method(method: Exact | Polynomial | Banded, problem: Problem, **without_use: Any) -> Plan:
    """A plan for a method that was given as a value, which has what other options would say."""
    for name, value in without_use.items():
        if value not in (None, "minimax"):
            raise ValueError(f"{name} cannot be combined with a method that is a value, got {name}={described(value)}")
    reason = f"{type(method).__name__} was asked for"
    if isinstance(method, Banded):
        return replace(banded_plan(problem, method), reason=reason)
    if isinstance(method, Exact):
        return plan_with(method, problem, ANY, reason)
    check_rank(problem, method.degree)
    return plan_with(method, problem, _promised(method.bound), reason)
