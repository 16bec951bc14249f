"""Tensor attention of any order: check, plan, compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from . import exact, lowrank
from .arrays import in_parts, unpack
from .backends import Array, Backend
from .checks import Inputs, PlanError, checked_finite, checked_inputs, checked_options, checked_output
from .planning import Plan, measured, plan_inputs

Pullback = Callable[..., tuple[Array, tuple[Array, ...], tuple[Array, ...]]]


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
        "auto" takes the cheaper of the two others that meets `tol` under a certified bound.
    plan : Plan, optional
        What `tattn.plan` returned. Needed where values cannot be read: under ``jax.jit``, ``jax.grad``, ``torch.func``
        and ``torch.compile``, and then with a bound of the caller's own.
    key_masks : sequence of m boolean arrays (..., n_μ) or None, optional
        True where to attend. Where every pair is masked the output and its gradients are 0 and lse is −inf.
    return_lse : bool
        Also return log Σ exp of the scores, (..., n).

    Returns
    -------
    array (..., n, dv), or a pair with lse (..., n)
        In the dtype of the query; lse in the dtype of the computation. Differentiable by our own adjoint in torch and
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
    inputs, used = _prepare(query, keys, values, scale, tol, method, plan, key_masks)
    forward, backward, call = _methods(used, inputs.views)
    out, lse = inputs.backend.differentiable(forward, backward, call, inputs.arrays)
    out = inputs.backend.cast(out, query.dtype)
    return (out, lse[..., 0]) if return_lse else out


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
) -> tuple[Any, Pullback]:
    """Tensor attention and the function that takes a gradient of its output back to its inputs, for any library.

    Parameters
    ----------
    query, keys, values, scale, tol, method, plan, key_masks, return_lse
        As in `tensor_attention`.

    Returns
    -------
    out : as from `tensor_attention`
    pullback : callable
        ``pullback(grad_out) -> (dquery, dkeys, dvalues)``, with ``dkeys`` and ``dvalues`` tuples, each array in the
        shape and dtype of what it is the gradient of; ``pullback(grad_out, grad_lse)`` adds a gradient of lse. It is the exact
        derivative of the computed output, and within ``plan.grad_error`` of the true gradient. Where the inputs need
        gradients in torch, it is itself differentiable.

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
    inputs, used = _prepare(query, keys, values, scale, tol, method, plan, key_masks)
    forward, backward, call = _methods(used, inputs.views)
    backend = inputs.backend
    computed, lse, normaliser = backend.run(forward, call, inputs.arrays)
    out = backend.cast(computed, query.dtype)

    def pullback(grad_out: Array, grad_lse: Array | None = None) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
        checked_output("grad_out", grad_out, tuple(out.shape), out, inputs, "output")
        if grad_lse is None:
            grad_lse = backend.xp.zeros_like(lse)
        else:
            shape = tuple(lse.shape[:-1])
            grad_lse = checked_output("grad_lse", grad_lse, shape, lse, inputs, "output")[..., None]
        grads = backend.run(backward, call, (*inputs.arrays, computed, normaliser, grad_out, grad_lse))
        m = inputs.views
        return grads[0], tuple(grads[1 : m + 1]), tuple(grads[m + 1 :])

    return ((out, lse[..., 0]) if return_lse else out), pullback


def _prepare(
    query: Array, keys: Any, values: Any, scale: Any, tol: Any, method: Any, plan: Any, key_masks: Any
) -> tuple[Inputs, Plan]:
    """Inputs and the plan to use for them."""
    if values is None:
        raise TypeError("values should be a list or tuple of arrays, one for each view, got None")
    inputs = checked_inputs(query, keys, values, key_masks)
    if plan is not None and scale is None and isinstance(plan, Plan):
        scale = plan.scale
    number = checked_options(scale, inputs.dim, tol, method)
    if plan is None:
        if inputs.traced and method != "exact":
            raise PlanError(
                "the call is traced and its values cannot be read, so it needs a plan made beforehand with a bound of "
                "your own: plan=tattn.plan_for(..., bound=...), or tattn.plan(query, keys, bound=...)"
            )
        return inputs, plan_inputs(inputs, scale=number, tol=tol, method=method)
    _check_plan(plan, inputs, number, method)
    return inputs, plan


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
    if plan.source == "promise":
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
    if plan.source == "data" and plan.method == "polynomial":
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


class _Methods(NamedTuple):
    forward: Callable[..., tuple[Array, Array, Array]]
    backward: Callable[..., tuple[Array, ...]]
    call: Any


def _methods(plan: Plan, views: int) -> _Methods:
    """Forward, backward and what they depend on, for a plan."""
    if plan.method == "exact":
        return _Methods(_exact_forward, _exact_backward, exact.ExactCall(plan.scale, views))
    return _Methods(_lowrank_forward, _lowrank_backward, lowrank.LowRankCall(plan.coefficients, plan.scale, views))


def _forward(module: Any, call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    limit = module.leading_limit(call, backend, arrays)
    return in_parts(module.forward, limit, (None, None, None), call, backend, arrays)


def _backward(module: Any, call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    q, keys, values, *_ = unpack(call.views, arrays)
    limit = module.leading_limit(call, backend, arrays)
    return in_parts(module.backward, limit, (q, *keys, *values), call, backend, arrays)


# Named functions, since backends cache what they compile by function.
def _exact_forward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _forward(exact, call, backend, arrays)


def _exact_backward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _backward(exact, call, backend, arrays)


def _lowrank_forward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _forward(lowrank, call, backend, arrays)


def _lowrank_backward(call: Any, backend: Backend, arrays: Sequence[Array | None]) -> Any:
    return _backward(lowrank, call, backend, arrays)
