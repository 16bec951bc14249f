"""The smallest tolerance that can be certified."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from math import inf

from ..backends import Array
from ..checks import PlanError, checked_finite, checked_inputs, checked_options, whole, with_channels
from ..operands import REAL
from ..plans import si
from ..weights import with_weights
from . import measured, plan_found
from .limits import checked_most
from .selection import MOST_DEGREE, Wish, affordable_degrees
from .settings import MAX_RANK


def best_tol(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array] | None = None,
    *,
    max_rank: int = MAX_RANK,
    max_flops: float | None = None,
    scale: float | None = None,
    key_masks: Sequence[Array | None] | None = None,
    key_weights: Sequence[Array | None] | None = None,
    causal: bool = False,
    channels: str = REAL,
) -> float:
    """The smallest `tol` that the polynomial method is certified to meet for these arrays, at a rank or a cost.

    Parameters
    ----------
    query, keys, values, scale, key_masks, key_weights, causal, channels
        As in `plan`.
    max_rank : int
        Largest rank, the number of monomials: time and memory are proportional to it.
    max_flops : float, optional
        Most operations of a forward call, as `Plan.flops_polynomial` counts them.

    Returns
    -------
    float
        The error of the best polynomial with all monomials of its degree, rounding in the dtype included. With
        ``tol=best_tol(...)`` and ``method="polynomial"`` a plan is found; with anything smaller, the degree is higher, or
        there is none.

    Raises
    ------
    PlanError
        If no degree has such a rank or cost, or none has an error below infinity; if the arrays are traced.
    TypeError, ValueError
        For arguments that do not fit, by name.

    Notes
    -----
    Reads the arrays once, O((n + Σ n_μ) d). Scores that are bounded row by row may allow less with ``series="banded"``.

    Examples
    --------
    >>> import numpy as np, tattn
    >>> query, *keys = np.random.default_rng(0).uniform(-1, 1, (3, 5000, 8))
    >>> tol = tattn.best_tol(query, keys, max_rank=1000)
    >>> tattn.plan(query, keys, tol=tol, method="polynomial").rank
    495
    """
    inputs = with_channels(checked_inputs(query, keys, values, key_masks, (causal, None)), channels)
    if key_weights is not None:
        inputs, _ = with_weights(inputs, key_weights)
    number = checked_options(scale, inputs.dim, 1.0, inputs.views, inputs.dtype)
    most_rank, most = whole("max_rank", max_rank, 1), checked_most(max_flops)
    if inputs.traced:
        raise PlanError(
            "the arrays are traced and their range cannot be read: call best_tol outside, on arrays like these"
        )
    problem, found = inputs.problem(number), measured(inputs, number)
    checked_finite(found.largest, inputs.views)
    plans = []
    for degree in affordable_degrees(inputs.dim, MOST_DEGREE):
        # What overflows, or is nowhere near exp, is no plan.
        with suppress(PlanError):
            plans.append(plan_found(problem, found, Wish(inf, "polynomial", degree)))
    affordable = [p for p in plans if p.rank <= most_rank and (most is None or p.flops_polynomial <= most)]
    best = min((p.error for p in affordable), default=inf)
    if best < inf:
        return best
    if plans and not affordable:
        asked = f"max_rank={most_rank:,}" + ("" if most is None else f" and max_flops={most:.3g}")
        raise PlanError(
            f"{asked} allow no degree: degree 1 has rank {plans[0].rank:,} and takes {si(plans[0].flops_polynomial)}flop"
        )
    raise PlanError(
        f"scores may reach {found.bound:.4g}, where no polynomial of a rank that is allowed is certified. A smaller scale, inputs "
        "of smaller norm, or series='banded' with return_error=True serve such data"
    )
