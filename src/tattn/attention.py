"""Tensor attention of any order: check, plan, compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from typing import Any, NamedTuple

import numpy as np

from . import banded, exact, hybrid, lowrank
from .arrays import in_parts, unpack
from .backends import Array, Backend
from .bands import BandedCall
from .certificate import ERROR
from .checks import Inputs, PlanError, checked_finite, checked_inputs, checked_options, checked_output
from .gradient_bounds import StatedCall, banded_bounds, stated_bounds
from .planning import Plan, banded_candidate, measured, plan_inputs
from .rounding import exact_errors

Pullback = Callable[..., tuple[Array, tuple[Array, ...], tuple[Array, ...]]]

# Rows that "auto" recomputes exactly before it takes the exact method for all.
_MOST_RECOMPUTED = 0.05


def tensor_attention(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    *,
    scale: float | None = None,
    tol: float = 1e-3,
    method: str = "auto",
    plan: Plan | None = None,
    key_masks: Sequence[Array | None] | None = None,
    return_lse: bool = False,
    return_error: bool = False,
    return_plan: bool = False,
) -> Any:
    r"""Attention of queries to all pairs (triples, …) of keys, exactly or within a certified error in linear time.

    With two views, keys a and b, values u and v,

    .. math::

        o_{ie} = \sum_{jk} f_{ijk}\, u_{je} v_{ke}, \qquad
        f_i = \mathrm{softmax}_{jk}\Big(\mathrm{scale} \sum_c q_{ic} a_{jc} b_{kc}\Big).

    One view is ordinary attention; any number works.

    Parameters
    ----------
    query : array (..., n, d)
        float64, float32, float16 or bfloat16, of any supported library; the other arrays are of the same library,
        dtype and device. The two narrow types compute in float32.
    keys : sequence of m arrays (..., n_μ, d)
        Lengths may differ. Leading dimensions broadcast as in matmul, so one head of keys can serve many of queries.
    values : sequence of m arrays (..., n_μ, dv)
    scale : float, optional
        Factor of the scores; 1/d if not given.
    tol : float
        Largest error allowed in output channel e, relative to the product over μ of max_j |values_μ[j, e]|.
        Ignored if `plan` is given.
    method : {"auto", "polynomial", "exact"}
        "auto" takes the cheapest that meets `tol` under a certified bound: a polynomial certified beforehand; the banded
        polynomial, certified by the bound that comes with its answer; the same with a few rows (at most 5 %) recomputed
        exactly; exact. "polynomial" takes one of the first two, or raises.
    plan : Plan, optional
        What `tattn.plan` returned. Needed where values cannot be read: under ``jax.jit``, ``jax.grad``, ``torch.func``
        and ``torch.compile``, and then with a bound of the caller's own.
    key_masks : sequence of m boolean arrays (..., n_μ) or None, optional
        True where to attend. Where every pair is masked the output and its gradients are 0 and lse is −inf.
    return_lse : bool
        Also return log Σ exp of the scores, (..., n).
    return_error : bool
        Also return a certified bound of the error of each query row (..., n), relative to Π_μ max_j |values_μ[j, e]| as
        `tol` is, rounding included; infinite where nothing can be promised. With a banded plan it is that of the row;
        otherwise ``plan.error``, or infinity if the plan is not certified. It carries no gradient.
    return_plan : bool
        Also return the plan that was used: which method, why, and the share of rows recomputed.

    Returns
    -------
    array (..., n, dv), or a tuple with lse, error and plan, as asked for, in this order
        In the dtype of the query; lse and error in the dtype of the computation. Differentiable by our own adjoint in torch and
        JAX. NaN in a row whose normaliser lost its sign, which takes scores beyond a bound that the caller promised.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, by name, before anything is computed. NaN and infinities among them unless the
        plan's bound is the caller's own.
    PlanError
        If "polynomial" cannot meet `tol`, or `plan` does not fit the call or the range of its scores.

    Notes
    -----
    Polynomial method: O((n + Σ n_μ) r dv) time for rank r, O(r dv) memory beyond inputs and outputs. Exact method:
    O(n Π n_μ (d + dv)) time in constant memory. Theorem 4.2 and Lemma F.1 of arXiv 2405.16411.

    Examples
    --------
    >>> import numpy as np, tattn
    >>> rng = np.random.default_rng(0)
    >>> query, *keys = rng.uniform(-1, 1, (3, 1000, 4))
    >>> values = list(rng.normal(size=(2, 1000, 4)))
    >>> tattn.tensor_attention(query, keys, values).shape
    (1000, 4)
    """
    inputs, work = _prepare(query, keys, values, scale, tol, method, plan, key_masks, return_error)
    if work.result is None or inputs.backend.records(work.arrays):
        result = inputs.backend.differentiable(work.forward, work.backward, work.call, work.arrays)
    else:
        result = work.result
    return _returned(result, inputs, work.plan, query, return_lse, return_error, return_plan)[0]


def tensor_attention_vjp(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    *,
    scale: float | None = None,
    tol: float = 1e-3,
    method: str = "auto",
    plan: Plan | None = None,
    key_masks: Sequence[Array | None] | None = None,
    return_lse: bool = False,
    return_error: bool = False,
    return_plan: bool = False,
) -> tuple[Any, Pullback]:
    """Tensor attention and the function that takes a gradient of its output back to its inputs, for any library.

    Parameters
    ----------
    query, keys, values, scale, tol, method, plan, key_masks, return_lse, return_error, return_plan
        As in `tensor_attention`.

    Returns
    -------
    out : as from `tensor_attention`
    pullback : callable
        ``pullback(grad_out) -> (dquery, dkeys, dvalues)``, with ``dkeys`` and ``dvalues`` tuples, each array in the
        shape and dtype of what it is the gradient of; ``pullback(grad_out, grad_lse)`` adds a gradient of lse. It is the exact
        derivative of the computed output. ``pullback(..., return_error=True)`` returns the gradients and, in the same
        structure, a certified bound for every entry of how far each is from the true gradient. With a banded plan the
        bounds come from the certificates of the rows; otherwise from ``plan.error`` and ``plan.grad_error``, and they are
        infinite if the plan is not certified. Where the inputs need gradients in torch, the pullback is itself
        differentiable. It needs the output again: change `out` in place only after.

    Notes
    -----
    Twice the forward's cost and order of memory: Lemma 4.5 and Fact 4.4 applied to the adjoint, O((n + Σ n_μ) r dv), or the
    softmax's adjoint streamed.

    Examples
    --------
    >>> import numpy as np, tattn
    >>> query, *keys = np.random.default_rng(0).uniform(-1, 1, (3, 500, 4))
    >>> out, pullback = tattn.tensor_attention_vjp(query, keys, keys)
    >>> dquery, dkeys, dvalues = pullback(np.ones_like(out))
    >>> dquery.shape, len(dkeys), len(dvalues)
    ((500, 4), 2, 2)
    """
    inputs, work = _prepare(query, keys, values, scale, tol, method, plan, key_masks, return_error)
    backend = inputs.backend
    # In torch, inputs that need gradients save themselves and not every block's features.
    result = work.result or backend.differentiable(work.forward, work.backward, work.call, work.arrays)
    computed, lse, rest = result
    returned, out = _returned(result, inputs, work.plan, query, return_lse, return_error, return_plan)

    def pullback(grad_out: Array, grad_lse: Array | None = None, *, return_error: bool = False) -> Any:
        checked_output("grad_out", grad_out, tuple(out.shape), out, inputs, "output")
        if grad_lse is None:
            grad_lse = backend.xp.zeros_like(lse)
        else:
            shape = tuple(lse.shape[:-1])
            grad_lse = checked_output("grad_lse", grad_lse, shape, lse, inputs, "output")[..., None]
        residuals = backend.residuals(work.forward, work.call, work.arrays, computed, rest)
        grads = _grouped(backend.run(work.backward, work.call, (*work.arrays, *residuals, grad_out, grad_lse)), inputs)
        if not return_error:
            return grads
        return grads, _grouped(_gradient_bounds(work, inputs, computed, rest, grad_out, grad_lse), inputs)

    return returned, pullback


class _Work(NamedTuple):
    """What to compute, and its result where finding out has computed it already."""

    forward: Callable[..., tuple[Array, Array, Array]]
    backward: Callable[..., tuple[Array, ...]]
    call: Any
    arrays: tuple[Array | None, ...]
    plan: Plan
    result: tuple[Array, Array, Array] | None = None


def _returned(
    result: tuple[Array, Array, Array],
    inputs: Inputs,
    plan: Plan,
    query: Array,
    return_lse: bool,
    return_error: bool,
    return_plan: bool,
) -> tuple[Any, Array]:
    """What the caller asked for, and the output."""
    computed, lse, rest = result
    out = inputs.backend.cast(computed, query.dtype)
    asked = [out]
    if return_lse:
        asked.append(lse[..., 0])
    if return_error:
        if plan.series == "banded":
            asked.append(rest[..., ERROR])
        else:
            like: Array = inputs.backend.values_of((lse,))[0]
            asked.append(inputs.backend.xp.full_like(like[..., 0], plan.error if plan.certified else inf))
    if return_plan:
        asked.append(plan)
    return (tuple(asked) if len(asked) > 1 else out), out


def _grouped(gradients: Sequence[Array], inputs: Inputs) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """(dquery, dkeys, dvalues)."""
    m = inputs.views
    return gradients[0], tuple(gradients[1 : m + 1]), tuple(gradients[m + 1 :])


def _gradient_bounds(
    work: _Work, inputs: Inputs, out: Array, rest: Array, grad_out: Array, grad_lse: Array
) -> tuple[Array, ...]:
    """Bounds of the errors of all gradients, in their shapes."""
    backend, plan = inputs.backend, work.plan
    arrays = backend.values_of(work.arrays)
    out, rest, grad_out, grad_lse = backend.values_of((out, rest, grad_out, grad_lse))
    if plan.series != "banded":
        stated = (plan.error, plan.grad_error) if plan.certified else (inf, inf)
        call = StatedCall(plan.scale, stated, inputs.views)
        return backend.run(_stated_bounds, call, (*arrays, grad_out))  # type: ignore[no-any-return]
    hybrid_call = isinstance(work.call, hybrid.HybridCall)
    banded_call = work.call.banded if hybrid_call else work.call
    call = banded_call._replace(certify=True)
    call = work.call._replace(banded=call) if hybrid_call else call
    if not banded_call.certify:
        rest = backend.run(work.forward, call, arrays)[2]
    bounds = _hybrid_bounds if hybrid_call else _banded_bounds
    return backend.run(bounds, call, (*arrays, out, rest, grad_out, grad_lse))  # type: ignore[no-any-return]


def _prepare(
    query: Array, keys: Any, values: Any, scale: Any, tol: Any, method: Any, plan: Any, key_masks: Any, certify: bool
) -> tuple[Inputs, _Work]:
    """Inputs, checked, and what to compute for them."""
    if values is None:
        raise TypeError("values should be a list or tuple of arrays, one for each view, got None")
    inputs = checked_inputs(query, keys, values, key_masks)
    if plan is not None and scale is None and isinstance(plan, Plan):
        scale = plan.scale
    number = checked_options(scale, inputs.dim, tol, method)
    if plan is not None:
        _check_plan(plan, inputs, number, method)
        return inputs, _work(inputs, plan, certify)
    if inputs.traced and method != "exact":
        raise PlanError(
            "the call is traced and its values cannot be read, so it needs a plan made beforehand: with a bound of your own, "
            "plan=tattn.plan_for(..., bound=...), or one that finds its bound on the way, tattn.plan_for(..., series='banded')"
        )
    if inputs.traced:
        return inputs, _work(inputs, plan_inputs(inputs, scale=number, tol=tol, method=method), certify)
    return inputs, _chosen(inputs, number, tol, method, certify)


def _chosen(inputs: Inputs, scale: float, tol: float, method: str, certify: bool) -> _Work:
    """The cheapest way that meets `tol`, for values that can be read."""
    refused: PlanError | None = None
    try:
        plan = plan_inputs(inputs, scale=scale, tol=tol, method=method)
    except PlanError as cannot:
        refused = cannot
    else:
        if method == "exact" or plan.method == "polynomial":
            return _work(inputs, plan)
    candidate = banded_candidate(inputs, scale, None if refused else plan)
    if candidate is None:
        if refused:
            raise refused
        return _work(inputs, plan)
    work = _work(inputs, candidate, certify=True)
    values = inputs.backend.values_of(inputs.arrays)
    found = inputs.backend.run(work.forward, work.call, values)
    work = work._replace(call=work.call._replace(certify=certify))
    row_errors: np.ndarray = inputs.backend.to_numpy(found[2][..., ERROR])
    over: np.ndarray = ~(row_errors <= tol)
    share = float(over.mean())
    name = f"degree {candidate.degree} in {candidate.bands} norm bands"
    if share == 0:
        reason = f"{name} is certified to {row_errors.max():.2g} by the bound returned with the answer"
        return work._replace(plan=replace(candidate, reason=reason), result=found)
    if refused:
        quantiles = ", ".join(
            f"{q:.0%}: {np.quantile(row_errors, q, method='higher'):.2g}" for q in (0.5, 0.9, 0.99, 1.0)
        )
        raise PlanError(
            f"{refused}; and {name} leaves {share:.2%} of the rows above tol (bounds of the rows by share: {quantiles})"
        )
    most = int(over.sum(axis=-1).max())
    if most > _MOST_RECOMPUTED * inputs.lengths[0]:
        return _work(
            inputs, replace(plan, reason=f"{plan.reason}; {name} would leave {share:.1%} of the rows above tol")
        )
    bounds = measured(inputs, scale)
    errors = exact_errors(
        bounds.bound, dim=inputs.dim, views=inputs.views, value_dim=inputs.value_dim, lengths=sum(inputs.lengths),
        dtype=inputs.dtype,
    )  # fmt: skip
    # The worst rows of every problem, as many as the problem with most of them needs.
    chosen = np.argsort(-row_errors, axis=-1, kind="stable")[..., :most]
    place = most + np.broadcast_to(np.arange(row_errors.shape[-1]), row_errors.shape).copy()
    np.put_along_axis(place, chosen, np.broadcast_to(np.arange(most), chosen.shape), axis=-1)
    backend = inputs.backend
    index = tuple(backend.indices(x[..., None], inputs.arrays[0]) for x in (chosen, place))
    reason = f"{name} meets tol={tol:g} on all but {share:.2%} of the rows, which are recomputed exactly"
    call = hybrid.HybridCall(work.call, exact.ExactCall(scale, inputs.views), *errors)
    return _Work(
        _hybrid_forward,
        _hybrid_backward,
        call,
        (*inputs.arrays, *index),
        replace(candidate, reason=reason, recomputed=most / inputs.lengths[0]),
        backend.run(_hybrid_forward, call, (*values, *index, *found)),
    )


def _check_plan(plan: Any, inputs: Inputs, scale: float, method: str) -> None:
    """PlanError if the plan was made for another kind of call, or for smaller scores."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan should be a tattn.Plan, got {type(plan).__name__}")
    asked = {"dim": inputs.dim, "order": inputs.views + 1, "dtype": inputs.dtype, "scale": scale}
    for name, value in asked.items():
        if getattr(plan, name) != value:
            raise PlanError(f"plan was made for {name} {getattr(plan, name)}, the call has {name} {value}")
    if method not in ("auto", plan.method):
        raise PlanError(f"plan has method {plan.method!r}, the call asks for method {method!r}")
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
    found = measured(inputs, scale)
    checked_finite(found.largest, inputs.views)
    if plan.source == "data":
        if found.bound > plan.bound:
            raise PlanError(
                f"plan serves scores up to {plan.bound:.4g}, the data's may reach {found.bound:.4g}: "
                "make a plan for this data, or one with a larger bound"
            )
        if found.lowest_mean < plan.lowest_mean:
            raise PlanError(
                f"plan's rounding counts on mean scores of at least {plan.lowest_mean:.4g}, the data's reach down to "
                f"{found.lowest_mean:.4g}: make a plan for this data"
            )


def _work(inputs: Inputs, plan: Plan, certify: bool = False) -> _Work:
    """Forward, backward and what they depend on, for a plan."""
    views = inputs.views
    if plan.method == "exact":
        return _Work(_exact_forward, _exact_backward, exact.ExactCall(plan.scale, views), inputs.arrays, plan)
    if plan.series == "banded":
        call = BandedCall(plan.degree, plan.moment, plan.bands, plan.scale, views, certify)
        return _Work(_banded_forward, _banded_backward, call, inputs.arrays, plan)
    low = lowrank.LowRankCall(plan.coefficients, plan.scale, views)
    return _Work(_lowrank_forward, _lowrank_backward, low, inputs.arrays, plan)


def _forward(module: Any, call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    limit = module.leading_limit(call, backend, arrays)
    return in_parts(module.forward, limit, (None, None, None), call, backend, arrays)


def _backward(module: Any, call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    q, keys, values, *_ = unpack(call.views, arrays)
    limit = module.leading_limit(call, backend, arrays)
    grads = in_parts(module.backward, limit, (q, *keys, *values), call, backend, arrays)
    # Narrow dtypes only now: sums over problems that share a view are over.
    return tuple(backend.cast(g, q.dtype) for g in grads)


# Named functions, since backends cache what they compile by function.
def _exact_forward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _forward(exact, call, backend, arrays)


def _exact_backward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _backward(exact, call, backend, arrays)


def _lowrank_forward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _forward(lowrank, call, backend, arrays)


def _lowrank_backward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _backward(lowrank, call, backend, arrays)


def _banded_forward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _forward(banded, call, backend, arrays)


def _banded_backward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _backward(banded, call, backend, arrays)


def _banded_bounds(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    q, keys, values, *_ = unpack(call.views, arrays)
    limit = banded.leading_limit(call, backend, arrays)
    return in_parts(banded_bounds, limit, (q, *keys, *values), call, backend, arrays)


def _hybrid_bounds(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    q, keys, values, *_ = unpack(call.views, arrays)
    limit = hybrid.leading_limit(call, backend, arrays)
    return in_parts(hybrid.gradient_bounds, limit, (q, *keys, *values), call, backend, arrays)


def _stated_bounds(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return stated_bounds(call, backend, arrays)


def _hybrid_forward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _forward(hybrid, call, backend, arrays)


def _hybrid_backward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _backward(hybrid, call, backend, arrays)
