"""What to compute for a call: the method of its plan, or the cheapest one that meets `tol`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, prod
from typing import Any, NamedTuple

import numpy as np

from ..approximation.pruning import sums_of, weights_of
from ..arrays import in_parts, sum_to_leading, unpack
from ..backends import Array, Backend
from ..bounds.rounding import exact_errors
from ..bounds.score_range import Ranges
from ..checks import Inputs, PlanError, checked_finite, warn_caller
from ..engines import causal_features as lowrank_causal
from ..engines import causal_tuples as exact_causal
from ..engines import features as lowrank
from ..engines import scorewise
from ..engines import tuples as exact
from ..methods import banded
from ..methods import recomputed as hybrid
from ..methods.bands import BandedCall
from ..methods.certificate import ERROR
from ..methods.gradient_bounds import StatedCall, banded_bounds, stated_bounds
from ..plans import Plan
from . import banded_candidates, measured, plan_inputs
from .sampling import sampled_errors

# Rows that "auto" recomputes exactly before it takes the exact method for all.
MOST_RECOMPUTED = 0.05
# What bands take besides their operations, as operations that take as long: to sort, gather and certify a row, some 0.3 µs, and a
# call with its trial on samples, some 30 ms on one thread.
_BANDS_ROW, _BANDS_CALL = 1e4, 1e9
# Operations that one would want to hear of before: days on a processor, a quarter of an hour on an accelerator.
_LONG = 1e16


class Work(NamedTuple):
    """What to compute, and its result where finding out has computed it already."""

    forward: Callable[..., tuple[Array, ...]]
    backward: Callable[..., tuple[Array, ...]]
    call: Any
    arrays: tuple[Array | None, ...]
    plan: Plan
    result: tuple[Array, ...] | None = None


def chosen_work(inputs: Inputs, scale: float, tol: float, method: str, certify: bool) -> Work:
    """The cheapest way that meets `tol`, for values that can be read."""
    work = _cheapest(inputs, scale, tol, method, certify)
    plan = work.plan
    flops = plan.flops_exact * (1.0 if plan.method == "exact" else plan.recomputed)
    if method == "auto" and flops > _LONG:
        warn_caller(
            f"tol={tol:g} takes {flops:.2g} exact operations: {plan.reason}. A larger tol, or a plan with series='banded' and "
            "return_error=True, which bounds the rows as they come, takes none"
        )
    return work


def _cheapest(inputs: Inputs, scale: float, tol: float, method: str, certify: bool) -> Work:
    """`chosen_work` without a word about what it costs."""
    refused: PlanError | None = None
    plan: Plan | None = None
    try:
        # Data call for another pruned basis each time, and so for another program.
        pruning = None if inputs.backend.compiles else True
        plan = plan_inputs(inputs, scale=scale, tol=tol, method=method, gradients=pruning)
    except PlanError as cannot:
        refused = cannot
    if method == "exact" and plan:
        return work_of(inputs, plan)
    candidate = _banded_candidate(inputs, scale, tol, plan)
    if candidate is None:
        if plan is None:
            raise refused  # type: ignore[misc]
        return work_of(inputs, plan)
    backend = inputs.backend
    work = work_of(inputs, candidate, certify=True)
    values = backend.values_of(inputs.arrays)
    found = backend.run(work.forward, work.call, values)
    if backend.records(inputs.arrays):
        work = work._replace(call=work.call._replace(certify=certify))
    row_errors: np.ndarray = backend.to_numpy(found[2][..., ERROR])
    over: np.ndarray = ~(row_errors <= tol)
    share = float(over.mean())
    name = f"degree {candidate.degree} in {candidate.bands} norm bands"
    if share == 0:
        reason = f"{name} is certified to {row_errors.max():.2g} by the bound returned with the answer"
        return work._replace(plan=replace(candidate, reason=reason), result=found)
    most = int(over.sum(axis=-1).max())
    # A polynomial that was certified beforehand may cost less than the rows that would have to be recomputed.
    recomputed = most / inputs.lengths[0]
    cheaper = plan is None or _banded_work(candidate, inputs) + recomputed * plan.flops_exact < _flops(plan)
    if method == "auto" and recomputed <= MOST_RECOMPUTED and cheaper:
        reason = f"{name} meets tol={tol:g} on all but {share:.2%} of the rows, which are recomputed exactly"
        return _hybrid_work(inputs, work, replace(candidate, reason=reason), row_errors, most, values, found)
    if plan is None:
        quantiles = ", ".join(
            f"{q:.0%}: {np.quantile(row_errors, q, method='higher'):.2g}" for q in (0.5, 0.9, 0.99, 1.0)
        )
        raise PlanError(
            f"{refused}; and {name} leaves {share:.2%} of the rows above tol (bounds of the rows by share: {quantiles})"
        )
    return work_of(inputs, replace(plan, reason=f"{plan.reason}; {name} would leave {share:.1%} of the rows above tol"))


def _flops(plan: Plan) -> float:
    return plan.flops_exact if plan.method == "exact" else plan.flops_polynomial


def _banded_work(candidate: Plan, inputs: Inputs) -> float:
    """Operations of a banded plan, with those that would take as long as what it does besides."""
    return candidate.flops_polynomial + _BANDS_CALL + _BANDS_ROW * sum(inputs.lengths) * prod(inputs.leading)


def _banded_candidate(inputs: Inputs, scale: float, tol: float, instead_of: Plan | None) -> Plan | None:
    """The banded plan that is cheapest with the rows it leaves, on samples; None if none is worth a trial."""
    least = _flops(instead_of) if instead_of else inf
    best = None
    candidates = [c for c in banded_candidates(inputs, scale) if _banded_work(c, inputs) <= least / 2]
    errors = sampled_errors(inputs, [_banded_call(c, certify=True) for c in candidates])
    for candidate, found in zip(candidates, errors, strict=False):
        over = float((~(found <= tol)).mean())
        cost = _banded_work(candidate, inputs) + over * candidate.flops_exact
        if instead_of is None:
            # What is refused otherwise is tried at any cost, the tightest first.
            cost = over
        elif over > MOST_RECOMPUTED:
            continue
        if cost < least:
            best, least = candidate, cost
        if over == 0:
            break  # what follows costs more
    return best


def _hybrid_work(
    inputs: Inputs,
    work: Work,
    plan: Plan,
    row_errors: np.ndarray,
    most: int,
    values: tuple[Array | None, ...],
    found: tuple[Array, ...],
) -> Work:
    """The banded polynomial with the `most` worst rows of every problem recomputed."""
    backend = inputs.backend
    errors = exact_errors(
        measured(inputs, plan.scale).bound, dim=inputs.dim, views=inputs.views, value_dim=inputs.value_dim,
        lengths=sum(inputs.lengths), dtype=inputs.dtype,
    )  # fmt: skip
    # The worst rows of every problem, as many as the problem with most of them needs.
    chosen = np.argsort(-row_errors, axis=-1, kind="stable")[..., :most]
    place = most + np.broadcast_to(np.arange(row_errors.shape[-1]), row_errors.shape).copy()
    np.put_along_axis(place, chosen, np.broadcast_to(np.arange(most), chosen.shape), axis=-1)
    index = tuple(backend.indices(x[..., None], inputs.arrays[0]) for x in (chosen, place))
    call = hybrid.HybridCall(work.call, exact.ExactCall(plan.scale, inputs.views), *errors)
    return Work(
        _hybrid_forward,
        _hybrid_backward,
        call,
        (*inputs.arrays, *index),
        replace(plan, recomputed=most / inputs.lengths[0]),
        backend.run(_hybrid_forward, call, (*values, *index, *found[:3])),
    )


def check_kind(plan: Any, inputs: Inputs, scale: float, method: str) -> None:
    """PlanError if the plan was made for another kind of call."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan should be a tattn.Plan, got {type(plan).__name__}")
    asked = {
        "dim": inputs.dim, "order": inputs.views + 1, "dtype": inputs.dtype, "scale": scale,
        "causal": inputs.order.causal, "window": inputs.order.window,
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
    if plan.source == "data":
        if found.bound > plan.bound:
            raise PlanError(
                f"plan serves scores up to {plan.bound:.4g}, the data's may reach {found.bound:.4g}: "
                "make a plan for this data, or one with a larger bound"
            )
        for weight, serves, given in zip(
            weights_of(plan.grading), plan.sizes, sums_of(plan.grading, found.sizes), strict=True
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


def work_of(inputs: Inputs, plan: Plan, certify: bool = False) -> Work:
    """Forward, backward and what they depend on, for a plan."""
    views = inputs.views
    if plan.method == "exact" and plan.causal:
        call = exact_causal.CausalCall(plan.scale, views, plan.window)
        return Work(_exact_causal_forward, _exact_causal_backward, call, inputs.arrays, plan)
    if plan.method == "exact":
        return Work(_exact_forward, _exact_backward, exact.ExactCall(plan.scale, views), inputs.arrays, plan)
    if plan.series == "banded":
        return Work(_banded_forward, _banded_backward, _banded_call(plan, certify), inputs.arrays, plan)
    low = lowrank.LowRankCall(plan.coefficients, plan.scale, views, plan.grading)
    if plan.causal:
        return Work(_lowrank_causal_forward, _lowrank_causal_backward, low, inputs.arrays, plan)
    if plan.by_scores(inputs.lengths, inputs.value_dim):
        return Work(_scorewise_forward, _scorewise_backward, low, inputs.arrays, plan)
    return Work(_lowrank_forward, _lowrank_backward, low, inputs.arrays, plan)


def _banded_call(plan: Plan, certify: bool) -> BandedCall:
    return BandedCall(plan.degree, plan.moment, plan.bands, plan.scale, plan.order - 1, certify)


def gradient_bounds(
    work: Work, inputs: Inputs, out: Array, rest: Array, grad_out: Array, grad_lse: Array
) -> tuple[Array, ...]:
    """Bounds of the errors of all gradients, in their shapes."""
    backend, plan = inputs.backend, work.plan
    arrays = backend.values_of(work.arrays)
    out, rest, grad_out, grad_lse = backend.values_of((out, rest, grad_out, grad_lse))
    if plan.series != "banded":
        stated = (plan.error, plan.grad_error) if plan.certified else (inf, inf)
        call = StatedCall(plan.scale, stated, inputs.views)
        return backend.run(stated_bounds, call, (*arrays, grad_out, grad_lse))  # type: ignore[no-any-return]
    recomputes = isinstance(work.call, hybrid.HybridCall)
    banded_call = work.call.banded if recomputes else work.call
    call = banded_call._replace(certify=True)
    call = work.call._replace(banded=call) if recomputes else call
    if not banded_call.certify:
        rest = backend.run(work.forward, call, arrays)[2]
    bounds = _hybrid_bounds if recomputes else _banded_bounds
    return backend.run(bounds, call, (*arrays, out, rest, grad_out, grad_lse))  # type: ignore[no-any-return]


def _forward(module: Any, call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    limit = module.leading_limit(call, backend, arrays)
    results = in_parts(module.forward, limit, (None, None, None), call, backend, arrays)
    # What the adjoint can do without is kept where it is smaller than what the adjoint gets anyway.
    kept, inputs = (sum(prod(a.shape) for a in x if a is not None) for x in (results[3:], arrays))
    return results if kept <= inputs else results[:3]


def _backward(module: Any, call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    q, keys, values, *_ = unpack(call.views, arrays)
    limit = module.leading_limit(call, backend, arrays)
    targets = (q, *keys, *values)
    grads = in_parts(module.backward, limit, targets, call, backend, arrays)
    # A mask may have leading dimensions that its rows lack; and narrow dtypes only now that all sums are over.
    return tuple(
        backend.cast(sum_to_leading(g, t.shape[:-2], backend), q.dtype) for g, t in zip(grads, targets, strict=True)
    )


def _bounds(function: Any, module: Any, call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    q, keys, values, *_ = unpack(call.views, arrays)
    limit = module.leading_limit(call, backend, arrays)
    return in_parts(function, limit, (q, *keys, *values), call, backend, arrays)


# Named functions, since backends cache what they compile by function.
def _exact_forward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _forward(exact, call, backend, arrays)


def _exact_backward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _backward(exact, call, backend, arrays)


def _exact_causal_forward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _forward(exact_causal, call, backend, arrays)


def _exact_causal_backward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _backward(exact_causal, call, backend, arrays)


def _lowrank_forward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _forward(lowrank, call, backend, arrays)


def _lowrank_backward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _backward(lowrank, call, backend, arrays)


def _scorewise_forward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _forward(scorewise, call, backend, arrays)


def _scorewise_backward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _backward(scorewise, call, backend, arrays)


def _lowrank_causal_forward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _forward(lowrank_causal, call, backend, arrays)


def _lowrank_causal_backward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _backward(lowrank_causal, call, backend, arrays)


def _banded_forward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _forward(banded, call, backend, arrays)


def _banded_backward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _backward(banded, call, backend, arrays)


def _banded_bounds(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _bounds(banded_bounds, banded, call, backend, arrays)


def _hybrid_bounds(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _bounds(hybrid.gradient_bounds, hybrid, call, backend, arrays)


def _hybrid_forward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _forward(hybrid, call, backend, arrays)


def _hybrid_backward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _backward(hybrid, call, backend, arrays)
