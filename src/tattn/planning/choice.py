"""What to compute for a call: the method of its plan, or the cheapest one that meets `tol`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, prod
from typing import Any, NamedTuple

import numpy as np

from ..approximation.pruning import sums_of, weights_of
from ..backends import Array, Backend
from ..bounds.score_range import Ranges
from ..checks import Inputs, PlanError, checked_finite
from ..documents import Documents, rows_at_once
from ..methods import Banded, Call, Exact, Packed, Polynomial, Recomputed, forward
from ..methods import gradient_bounds as bounds_of_gradients
from ..operands import Upstream
from ..plans import Plan, at_most
from ..problem import ScoreRange
from . import measured, plan_inputs
from .banded import banded_candidates
from .limits import check_cost, flops_of
from .sampling import sampled_errors
from .selection import Wish, why_overflows
from .settings import settings

# Blocks of rows that documents are taken out of their places for at once, for compiled loops.
_BLOCKS = 4


class Work(NamedTuple):
    """What to compute, and its result where finding out has computed it already."""

    call: Call
    arrays: tuple[Array | None, ...]
    plan: Plan
    result: tuple[Array, ...] | None = None


def chosen_work(inputs: Inputs, scale: float, wish: Wish, certify: bool) -> Work:
    """The cheapest way that meets `tol`, for values that can be read."""
    work = _cheapest(inputs, scale, wish, certify)
    if work.result is None:
        check_cost(inputs, work.plan, wish)
    return work


def _cheapest(inputs: Inputs, scale: float, wish: Wish, certify: bool) -> Work:
    """`chosen_work` without a word about what it costs."""
    tol, method = wish.tol, wish.method
    refused: PlanError | None = None
    plan: Plan | None = None
    try:
        # Data call for another pruned basis each time, and so for another program.
        pruning = None if inputs.backend.compiles else True
        plan = plan_inputs(inputs, scale, wish._replace(gradients=pruning))
    except PlanError as cannot:
        refused = cannot
    if plan and (wish.fixed or inputs.documents):
        return work_of(inputs, plan, certify and inputs.documents is not None)
    candidate = None if inputs.documents else _banded_candidate(inputs, scale, wish, plan)
    if candidate is None:
        if plan is None:
            raise refused  # type: ignore[misc]
        return work_of(inputs, plan)
    backend = inputs.backend
    work = work_of(inputs, candidate, certify=True)
    values = backend.values_of(inputs.arrays)
    found = backend.run(forward, work.call, values)
    if backend.records(inputs.arrays):
        work = work._replace(call=work.call._replace(certify=certify))
    row_errors: np.ndarray = backend.to_numpy(work.call.method.row_errors(found[2]))
    over: np.ndarray = ~(row_errors <= tol)
    share = float(over.mean())
    name = f"degree {candidate.degree} in {candidate.bands} norm bands"
    if share == 0:
        reason = f"{name} is certified to {at_most(row_errors.max())} by the bound returned with the answer"
        return work._replace(plan=replace(candidate, reason=reason), result=found)
    most = int(over.sum(axis=-1).max())
    # A polynomial that was certified beforehand may cost less than the rows that would have to be recomputed.
    recomputed = most / inputs.lengths[0]
    cheaper = plan is None or _banded_work(candidate, inputs) + recomputed * plan.flops_exact < flops_of(plan)
    if method == "auto" and recomputed <= settings().most_recomputed and cheaper:
        reason = f"{name} meets tol={tol:g} on all but {share:.2%} of the rows, which are recomputed exactly"
        work = work._replace(plan=replace(candidate, reason=reason), result=found)
        check_cost(inputs, work.plan, wish, recomputed * candidate.flops_exact)
        return _hybrid_work(inputs, work, row_errors, most, values)
    if plan is None:
        quantiles = ", ".join(
            f"{q:.0%}: {np.quantile(row_errors, q, method='higher'):.2g}" for q in (0.5, 0.9, 0.99, 1.0)
        )
        raise PlanError(
            f"{refused}; and {name} leaves {share:.2%} of the rows above tol (bounds of the rows by share: {quantiles})"
        )
    return work_of(inputs, replace(plan, reason=f"{plan.reason}; {name} would leave {share:.1%} of the rows above tol"))


def _banded_work(candidate: Plan, inputs: Inputs) -> float:
    """Operations of a banded plan, with those that would take as long as what it does besides."""
    overhead = settings().bands_call + settings().bands_row * sum(inputs.lengths) * prod(inputs.leading)
    return candidate.flops_polynomial + overhead


def _banded_candidate(inputs: Inputs, scale: float, wish: Wish, instead_of: Plan | None) -> Plan | None:
    """The banded plan that is cheapest with the rows it leaves, on samples; None if none is worth a trial."""
    tol, least = wish.tol, flops_of(instead_of) if instead_of else inf
    best = None
    most = inf if wish.max_flops is None else wish.max_flops
    candidates = [
        c
        for c in banded_candidates(inputs.problem(scale))
        if _banded_work(c, inputs) <= least / 2 and c.flops_polynomial <= most
    ]
    errors = sampled_errors(inputs, [_call(inputs, c, certify=True) for c in candidates])
    for candidate, found in zip(candidates, errors, strict=False):
        over = float((~(found <= tol)).mean())
        cost = _banded_work(candidate, inputs) + over * candidate.flops_exact
        if instead_of is None:
            # What is refused otherwise is tried at any cost, the tightest first.
            cost = over
        elif over > settings().most_recomputed:
            continue
        if cost < least:
            best, least = candidate, cost
        if over == 0:
            break  # what follows costs more
    return best


def _hybrid_work(
    inputs: Inputs,
    work: Work,
    row_errors: np.ndarray,
    most: int,
    values: tuple[Array | None, ...],
) -> Work:
    """Banded work, which is done, with the `most` worst rows of every problem recomputed."""
    backend, plan = inputs.backend, work.plan
    assert work.result is not None
    bound = measured(inputs, plan.scale).bound
    errors = Exact().guarantee(plan.problem, ScoreRange(bound, -bound, "data"))
    # The worst rows of every problem, as many as the problem with most of them needs.
    chosen = np.argsort(-row_errors, axis=-1, kind="stable")[..., :most]
    place = most + np.broadcast_to(np.arange(row_errors.shape[-1]), row_errors.shape).copy()
    np.put_along_axis(place, chosen, np.broadcast_to(np.arange(most), chosen.shape), axis=-1)
    index = tuple(backend.indices(x[..., None], inputs.arrays[0]) for x in (chosen, place))
    inner = work.call.method
    assert isinstance(inner, Banded)
    method = Recomputed(inner, (errors.error, errors.grad_error), most / inputs.lengths[0])
    call = work.call._replace(method=method)
    return Work(
        call,
        (*inputs.arrays, *index),
        replace(plan, algorithm=method),
        backend.run(forward, call, (*values, *index, *work.result[:3])),
    )


def check_kind(plan: Any, inputs: Inputs, scale: float, method: str) -> None:
    """PlanError if the plan was made for another kind of call."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan should be a tattn.Plan, got {type(plan).__name__}")
    asked = {
        "dim": inputs.dim, "order": inputs.views + 1, "dtype": inputs.dtype, "scale": scale,
        "causal": inputs.order.causal, "window": inputs.order.window, "channels": inputs.channels,
    }  # fmt: skip
    for name, value in asked.items():
        if getattr(plan, name) != value:
            raise PlanError(f"plan was made for {name} {getattr(plan, name)}, the call has {name} {value}")
    if method not in ("auto", plan.method):
        raise PlanError(f"plan has method {plan.method!r}, the call asks for method {method!r}")


def check_plan(plan: Any, inputs: Inputs, scale: float, method: str) -> None:
    """PlanError if the plan was made for another kind of call, or for smaller scores."""
    check_kind(plan, inputs, scale, method)
    if plan.source in ("promise", "answer"):
        if plan.bands > min(inputs.lengths):
            raise PlanError(f"plan has {plan.bands} bands, more than the {min(inputs.lengths)} rows of a view")
        return
    if inputs.traced:
        if plan.method == "exact":
            return
        raise PlanError(
            f"plan rests on the range of other data, which a traced call cannot check: make it a promise of your own, "
            f"tattn.plan(query, keys, bound={plan.bound:.4g})"
        )
    check_ranges(plan, measured(inputs, scale), inputs.views)


def check_ranges(plan: Plan, found: Ranges, views: int) -> None:
    """PlanError if a plan made from data serves smaller scores than those of this data; ValueError for NaN in it."""
    checked_finite(found.largest, views)
    overflows = why_overflows(plan.degree, found.highest)
    if overflows is not None:
        raise PlanError(f"plan does not serve this data: {overflows}")
    if plan.source == "data":
        if found.bound > plan.bound:
            raise PlanError(
                f"plan serves scores up to {plan.bound:.4g}, the data's may reach {found.bound:.4g}: "
                "make a plan for this data, or one with a larger bound"
            )
        for weight, serves, given in zip(
            weights_of(plan.grading), plan.sizes, sums_of(plan.grading[: len(found.sizes)], found.sizes), strict=True
        ):
            if given > serves:
                raise PlanError(
                    f"plan leaves out monomials of channels that count {weight} and add up to {serves:.4g} of a score, the "
                    f"data's may add up to {given:.4g}: make a plan for this data"
                )
        if found.lowest_mean < plan.lowest_mean:
            raise PlanError(
                f"plan's rounding counts on mean scores of at least {plan.lowest_mean:.4g}, the data's reach down to "
                f"{found.lowest_mean:.4g}: make a plan for this data"
            )


def for_lengths(plan: Plan, inputs: Inputs) -> Plan:
    """The plan; of the exact method, whose sums round more the longer they are, with the errors of calls of these lengths.

    A traced call may be of any length, and keeps those of the plan.
    """
    if plan.method != "exact" or inputs.traced or sum(inputs.lengths) <= sum(plan.lengths):
        return plan
    problem = replace(plan.problem, lengths=inputs.lengths)
    return replace(plan, problem=problem, guarantee=plan.algorithm.guarantee(problem, plan.scores))


def work_of(inputs: Inputs, plan: Plan, certify: bool = False) -> Work:
    """What to compute for a plan."""
    call = _call(inputs, plan, certify)
    if inputs.documents is None:
        return Work(call, inputs.arrays, plan)
    return Work(*packed(call, plan, inputs.documents, inputs.backend, inputs.arrays), plan)


def packed(
    call: Call, plan: Plan, documents: Documents, backend: Backend, arrays: Sequence[Array | None]
) -> tuple[Call, tuple[Array | None, ...]]:
    """A call for every document, and its arrays."""
    # What is computed at a time are whole documents.
    operands = call.operands(backend, arrays)[0]
    like, numbers, blocks = operands.query, max(1, plan.rank), 1
    if isinstance(call.method, Polynomial) and call.method.compiled(operands):
        # Compiled loops hold no features.
        dims = like.shape[-1] + operands.values[0].shape[-1]
        numbers, blocks = (call.views + 1) * (dims + 1), _BLOCKS
    rows = rows_at_once(numbers, operands.leading, like.dtype, backend, blocks)
    layout, places = documents.laid_out(like, rows, backend, least=max(1, plan.bands))
    stated = (plan.error, plan.grad_error) if plan.certified else (inf, inf)
    return call._replace(method=Packed(call.method, layout, stated)), (*arrays, *places)


def stated_call(work: Work) -> Call:
    """The call with the errors that its plan states for every row, infinite where nothing is certified."""
    plan = work.plan
    return work.call._replace(stated=(plan.error, plan.grad_error)) if plan.certified else work.call


def _call(inputs: Inputs, plan: Plan, certify: bool) -> Call:
    method = plan.algorithm
    if isinstance(method, Recomputed):
        # The rows that were recomputed are those of another call.
        method = method.inner
    call = Call(method, inputs.views, plan.scale, inputs.order, certify, plan.problem.chain)
    return call._replace(channels=plan.channels)


def gradient_bounds(work: Work, inputs: Inputs, out: Array, kept: Array, upstream: Upstream) -> tuple[Array, ...]:
    """Bounds of the errors of all gradients, in their shapes."""
    backend, plan = inputs.backend, work.plan
    arrays = backend.values_of(work.arrays)
    out, kept, *grads = backend.values_of((out, kept, *upstream))
    call = stated_call(work)._replace(certify=True)
    if plan.series == "banded" and not work.call.certify:
        kept = backend.run(forward, call, arrays)[2]
    bounds: tuple[Array, ...] = backend.run(bounds_of_gradients, call, (*arrays, out, kept, *grads))
    return bounds
