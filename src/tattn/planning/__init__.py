"""Plans: which method computes a call, at what degree, with what error, at what cost, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, isqrt, prod
from typing import Any

from ..approximation.exponential import MAX_DEGREE
from ..approximation.pruning import HIGHER
from ..backends import Array
from ..bounds.rounding import lowrank_errors, lowrank_rounding
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
from ..plans import USUAL_VALUE_DIM, Plan, Shape, plan_of, si, spread
from .sampling import Estimate, estimate
from .selection import affordable_degrees, beyond, check_rank, choose, largest_rank

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
    method: str = "auto",
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
    method : {"auto", "polynomial", "exact"}
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
    inputs = checked_inputs(query, keys, values, key_masks, causal, window)
    number = checked_options(scale, inputs.dim, tol, method, inputs.views, inputs.dtype)
    gradients = true_or_false("gradients", gradients)
    if _is_banded(series, bands, moment):
        return _asked_banded(_shape_of(inputs), number, method, bound, degree, bands, moment)
    return plan_inputs(
        inputs, scale=number, tol=tol, method=method, degree=degree, bound=bound, series=series,
        gradients=gradients,
    )  # fmt: skip


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
    method: str = "auto",
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
    number = checked_options(scale, dim, tol, method, order - 1, dtype)
    value_dim = dim if value_dim is None else whole("value_dim", value_dim, 1)
    shape = Shape(order - 1, dim, value_dim, dtype, lengths, 1, checked_order(causal, window, lengths))
    if bandwidth is not None and workers is None:
        raise ValueError(f"bandwidth should come with workers, got {positive('bandwidth', bandwidth)} alone")
    if _is_banded(series, bands, moment):
        made = _asked_banded(shape, number, method, bound, degree, bands, moment)
    else:
        promised = positive("bound", bound)
        made = choose(shape, number, tol, method, degree, series, "promise", promised, -promised)
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


def plan_inputs(
    inputs: Inputs,
    *,
    scale: float,
    tol: float,
    method: str,
    degree: int | None = None,
    bound: float | str | None = None,
    series: str = "minimax",
    gradients: bool | None = True,
) -> Plan:
    """`plan` for arrays that were checked; any series but "banded", and None in `gradients` for no pruned basis."""
    shape = _shape_of(inputs)
    if degree is not None:
        # Before any value is read.
        check_rank(shape, whole("degree", degree, 1, MAX_DEGREE))
    if isinstance(bound, str) and bound != "estimated":
        raise TypeError(f"bound should be a number or 'estimated', got the str {bound!r}")
    if bound is not None and not isinstance(bound, str):
        promised = positive("bound", bound)
        return choose(shape, scale, tol, method, degree, series, "promise", promised, -promised)
    if inputs.traced:
        if (method == "exact" or inputs.order.window is not None) and bound is None:
            return choose(shape, scale, tol, method, degree, series, "promise", inf, -inf)
        raise PlanError("the arrays are traced and their range cannot be read: give a bound of your own, bound=...")
    found = measured(inputs, scale)
    checked_finite(found.largest, inputs.views)
    if bound is not None:
        if method == "exact":
            raise ValueError("bound='estimated' samples scores for a polynomial and has no use with method 'exact'")
        if series != "minimax":
            raise ValueError(f"series has no use with bound='estimated', which fits its own polynomial; got {series!r}")
        if inputs.order.causal:
            raise ValueError(
                "bound='estimated' samples all pairs and has no use with causal=True: give a bound, or none"
            )
        return _estimated(inputs, shape, scale, tol, method, degree, found, gradients)
    return plan_found(
        shape, found, scale=scale, tol=tol, method=method, degree=degree, series=series, gradients=gradients
    )


def plan_found(
    shape: Shape,
    found: Ranges,
    *,
    scale: float,
    tol: float,
    method: str,
    degree: int | None = None,
    series: str = "minimax",
    gradients: bool | None = True,
) -> Plan:
    """A certified plan for the ranges that were found on data."""
    # The mean is allowed a margin, so that the plan holds for the same rows in another order or library. It is that over
    # all pairs, and says nothing of some of them.
    lowest_mean = -inf if shape.order.causal else found.lowest_mean - 0.02 * found.bound
    sizes = () if gradients is None else found.sizes
    return choose(shape, scale, tol, method, degree, series, "data", found.bound, lowest_mean, sizes, gradients is True)


def exact_plan(inputs: Inputs, scale: float) -> Plan:
    """A plan for the exact method that says nothing of its error, for which nothing but that all is finite is looked at."""
    call = RangeCall(scale, inputs.views)
    checked_finite(largest_entries(call, inputs.backend, inputs.backend.values_of(inputs.arrays)), inputs.views)
    return choose(_shape_of(inputs), scale, inf, "exact", None, "minimax", "promise", inf, -inf)


def measured(inputs: Inputs, scale: float) -> Ranges:
    """Range of the scores and largest entries of eager arrays."""
    return ranges(RangeCall(scale, inputs.views), inputs.backend, inputs.backend.values_of(inputs.arrays))


def banded_candidates(inputs: Inputs, scale: float) -> list[Plan]:
    """Banded plans to try, the cheapest first."""
    if inputs.order.causal:
        return []
    shape = _shape_of(inputs)
    shortest = min(shape.lengths)
    bands = 8 if shortest < 1 << 14 else 12
    if shortest < 2 * bands or not bands_fit(bands, shape.views + 1):
        return []
    tried = [(2, 2), (3, 2), (4, 2), (4, 4), (5, 4)]
    return [_banded(shape, scale, g, bands, t) for g, t in tried if rank_of(shape.dim, g) <= _BANDED_RANK]


def _is_banded(series: Any, bands: Any, moment: Any) -> bool:
    """Whether the series is "banded"; ValueError for what belongs to it and to no other."""
    if checked_series(series) == "banded":
        return True
    for name, value in (("bands", bands), ("moment", moment)):
        if value is not None:
            raise ValueError(f"{name} should come with series 'banded', got it with series {series!r}")
    return False


def _asked_banded(
    shape: Shape,
    scale: float,
    method: str,
    bound: Any,
    degree: int | None,
    bands: int | None,
    moment: int | None,
) -> Plan:
    """A banded plan, with what it does not go together with refused."""
    if bound is not None:
        raise ValueError(f"bound has no use with series 'banded', which finds its own ranges; got {described(bound)}")
    if shape.order.causal:
        raise ValueError(
            "series 'banded' sorts rows by norm and has no use where their order counts, got it with causal=True"
        )
    if method == "exact":
        raise ValueError("series 'banded' belongs to the polynomial method, got it with method 'exact'")
    degree, bands, moment = (
        usual if given is None else given for given, usual in ((degree, 2), (bands, 8), (moment, 2))
    )
    return _banded(shape, scale, degree, bands, moment)


def bands_fit(bands: int, order: int) -> bool:
    """Whether a plan accepts so many norm bands of every view."""
    return order <= _MAX_BANDED_ORDER and bands**order <= _MAX_TUPLES


def _banded(shape: Shape, scale: float, degree: int, bands: int, moment: int) -> Plan:
    """A plan whose error comes with the answer."""
    order = shape.views + 1
    if order > _MAX_BANDED_ORDER:
        raise ValueError(f"order should be at most {_MAX_BANDED_ORDER} with series 'banded', got {order}")
    degree, bands, moment = whole("degree", degree, 1, MAX_DEGREE), whole("bands", bands, 1), whole("moment", moment, 2)
    if not bands_fit(bands, order):
        most = max(b for b in range(1, isqrt(_MAX_TUPLES) + 1) if bands_fit(b, order))
        raise ValueError(
            f"bands should be at most {most:,} for order {order}, got {shown(bands)}: each tuple of bands has a polynomial "
            "of its own"
        )
    if bands > min(shape.lengths):
        raise ValueError(f"bands should be at most the rows of every view, {min(shape.lengths)}, got {bands}")
    if moment % 2:
        raise ValueError(f"moment should be even, got {moment}")
    if moment > degree:
        raise ValueError(f"moment should be at most the degree {degree}, got {moment}: moments are sums of monomials")
    check_rank(shape, degree)
    rank = rank_of(shape.dim, degree)
    return plan_of(
        shape, scale, "polynomial", "banded", "answer", inf, -inf, inf, inf, "banded was asked for", (), rank,
        bands=(degree, bands, moment),
    )  # fmt: skip


def _shape_of(inputs: Inputs) -> Shape:
    return Shape(
        inputs.views, inputs.dim, inputs.value_dim, inputs.dtype, inputs.lengths, prod(inputs.leading), inputs.order
    )


def _estimated(
    inputs: Inputs,
    shape: Shape,
    scale: float,
    tol: float,
    method: str,
    degree: int | None,
    found: Ranges,
    gradients: bool | None,
) -> Plan:
    """A plan from sampled scores; never certified."""

    def rank_with(sampled: Estimate) -> int:
        return sampled.pruned.rank if sampled.pruned else rank_of(shape.dim, len(sampled.coefficients) - 1)

    def rounding_of(sampled: Estimate) -> tuple[float, float]:
        rho, rho_prime = lowrank_rounding(
            sampled.coefficients, sampled.bound, found.lowest_mean, delta=0.0, dim=shape.dim, rank=rank_with(sampled),
            views=shape.views, value_dim=max(shape.value_dim, USUAL_VALUE_DIM), dtype=shape.dtype,
        )  # fmt: skip
        return lowrank_errors(0.0, 0.0, rho, rho_prime)

    def exact(reason: str) -> Plan:
        made = choose(shape, scale, tol, "exact", None, "minimax", "data", found.bound, found.lowest_mean)
        return replace(made, reason=reason)

    affordable = affordable_degrees(shape.dim, _MOST_ESTIMATED)
    if degree is None and not affordable:
        if method == "polynomial":
            raise PlanError(
                f"degree 1 at dim {shape.dim} has rank {rank_of(shape.dim, 1):,}, {beyond(shape.dim)}. Use method='exact' "
                f"({si(shape.exact_cost()[0])}flop)"
            )
        return exact("no degree has a rank that a plan accepts")
    if degree is not None:
        sampled = estimate(inputs, scale, tol, [degree])
    else:
        higher = range(affordable[-1] + 1, affordable[-1] + HIGHER + 1)
        sampled = estimate(
            inputs,
            scale,
            tol,
            affordable,
            higher,
            0 if gradients is None else largest_rank(shape.dim),
            gradients is True,
            lambda found: rounding_of(found)[0],
        )
    rank = rank_with(sampled)
    if sampled.error < inf:
        rounding, grad_rounding = rounding_of(sampled)
        sampled = sampled._replace(error=sampled.error + rounding, grad_error=sampled.grad_error + grad_rounding)
    asked = f"degree {degree} was asked for" if degree is not None else f"estimated to meet tol={tol:g}"
    plan = plan_of(
        shape, scale, "polynomial", "fitted", "estimate", sampled.bound, found.lowest_mean, sampled.error,
        sampled.grad_error, asked, sampled.coefficients, rank, sampled.pruned.grading if sampled.pruned else (),
    )  # fmt: skip
    if degree is None and sampled.error > tol:
        if method == "polynomial":
            raise PlanError(
                f"the polynomial method is estimated not to meet tol={tol:g}: sampled scores reach {sampled.bound:.4g}, and "
                f"degree {plan.degree}, rank {rank:,}, gives {sampled.error:.2g}. Use method='exact' "
                f"({si(plan.flops_exact)}flop), a larger tol or degree=..."
            )
        return exact(f"no polynomial is estimated to meet tol={tol:g}")
    if method == "auto" and degree is None and plan.flops_exact <= plan.flops_polynomial:
        return exact("exact takes fewer operations than the polynomial that was estimated to do")
    return plan
