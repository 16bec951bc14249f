"""Tensor attention of any order: check, plan, compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .backends import Array, Backend
from .backends.progress import Progress, reporter, telling
from .batch import filled_batch
from .checks import (
    Inputs,
    PlanError,
    check_values,
    checked_flags,
    checked_gradients,
    checked_inputs,
    checked_method,
    checked_options,
    unread_offsets,
    with_channels,
    with_documents,
)
from .decay import Decays, with_decay
from .methods import backward, forward, told_error
from .operands import REAL, Gradients
from .planning import exact_plan, plan_inputs
from .planning.choice import Work, check_plan, chosen_work, for_lengths, gradient_bounds, stated_call, work_of
from .planning.limits import check_flops, checked_most
from .planning.program import ATTENTION, PACKED
from .planning.selection import NAMES, Unread, Wish, may_be_unknown
from .plans import Plan
from .weights import Weights, with_weights

Pullback = Callable[..., Any]


class _Asked(NamedTuple):
    """The options of a call as the caller gave them: what it is to meet, and what to return beside the output."""

    tol: Any
    method: Any
    plan: Any
    max_flops: Any
    lse: Any
    error: Any
    returns_plan: Any


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
    key_weights: Sequence[Array | None] | None = None,
    causal: bool = False,
    decay: Sequence[Array | float | None] | None = None,
    window: Sequence[int] | None = None,
    offsets: Array | Sequence[Array] | None = None,
    channels: str | None = None,
    max_flops: float | None = None,
    return_lse: bool = False,
    return_error: bool = False,
    return_plan: bool = False,
    progress: bool | Progress | None = None,
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
        Lengths may differ. The batch, the dimensions before the last two, broadcasts as in matmul: one head of keys can
        serve many heads of queries.
    values : sequence of m arrays (..., n_μ, dv)
    scale : float, optional
        Factor of the scores; 1/d if not given. At most 2^(125 (m + 1) − 1) and at least its reciprocal; in float64 with
        1021 in place of 125.
    tol : float
        Largest error allowed in output channel e, relative to the product over μ of max_j |values_μ[j, e]|.
        Ignored if `plan` is given.
    method : {"auto", "polynomial", "exact"}
        "auto" takes the cheapest of these that meets `tol` with a certified bound: a polynomial certified beforehand;
        the banded polynomial, certified by the bound that comes with its answer; the banded polynomial with a few rows
        (at most 5 %) recomputed exactly; the exact method. "polynomial" takes one of the first two, or raises.
    plan : Plan, optional
        What `tattn.plan` returned. Needed where values cannot be read: under ``jax.jit``, ``jax.grad``, ``torch.func``
        and ``torch.compile``. It then needs a bound that you promise, or norm bands.
    key_masks : boolean array (..., n_μ), or sequence of m of them or None, optional
        True where to attend. One array serves all views. Where every pair is masked the output and its gradients are 0
        and lse is −inf.
    key_weights : array (..., n_μ), or sequence of m of them or None, optional
        A key of weight w ≥ 0 counts as w equal keys would: a pair has the weight exp(score) · w_j · w_k. None is a
        weight of 1, and a key of weight 0 is masked: its gradients are 0. In the dtype of the query; one array serves
        all views. The rank stays as it is, and so do the errors. A bias b_j of the scores is a weight of exp(b_j −
        max b), and lse then lacks max b. A row is NaN if the weights that it sees are too small for the dtype beside
        the largest of their views: if their products are below 1e-25 of that in float32, or 1e-280 in float64.
    causal : bool
        Query row i sees the pairs (j, k) with j ≤ i and k ≤ i. The last rows are aligned: with n queries and n_μ ≥ n
        keys, row i sees the keys j ≤ i + n_μ − n.
    decay : sequence of m arrays (...), numbers or None, optional
        With `causal` or `window`. A key of view μ that stands t rows before the last that a row sees has the weight λ^t besides,
        for the factor λ = decay[μ] from 0 to 1, one for each problem of the batch; 0^0 is 1, and None is a factor of 1.
        ALiBi with a slope s is exp(−s). The rank stays as it is, and so do the errors. The gradient of a factor 0 is 0 with
        the exact method. A row is NaN where all that it sees weighs too little, as with `key_weights`.
    window : sequence of m ints, optional
        Only the last ``window[μ]`` of these keys: i + n_μ − n − window[μ] < j ≤ i + n_μ − n. Implies `causal`. The
        time of the polynomial method does not depend on the windows, nor much on `decay`.
    offsets : integer array (documents + 1,), or sequence of m + 1 of them, optional
        For documents that stand one after another in the rows: 0, the rows of the first document, of the first two, …, n. A row
        attends within its document, in causal calls and windows, too. One array is for query and all views; otherwise one
        for the query and one for each view, of equally many documents. Documents may be empty. They are read on the host.
    channels : {"real", "complex"}, optional
        "complex": the d numbers of a row of query and keys are d/2 complex ones, real parts first and imaginary parts behind, and
        the score is scale · Σ_c Re(q_ic a_jc b_kc). Bounds, errors and gradients are those of the d numbers; the rank is that of as
        many real channels. `tattn.rotary` turns such rows. The plan's if not given, or "real" without a plan.
    max_flops : float, optional
        Most operations that the forward pass may take (`Plan.flops_exact`, `Plan.flops_polynomial`). Without it, a
        method that was chosen and takes more than half a minute on this machine is warned of.
    return_lse : bool
        Also return log Σ exp of the scores, (..., n).
    return_error : bool
        Also return a certified bound of the error of each query row (..., n), relative to Π_μ max_j |values_μ[j, e]|
        like `tol`, rounding included. It is infinite where nothing can be promised. With a banded plan each row has its
        own bound; otherwise it is ``plan.error``, or infinity if the plan is not certified. It is infinite in rows of the
        output that are not finite. It has no gradient. The error of lse, besides its own rounding, is at most
        −log(1 − error). With a banded plan it is at most −log(1 − error/2) if the values of every view have a channel of
        ones; otherwise there is no bound for it.
    return_plan : bool
        Also return the plan that was used: the method, the reason, and the share of rows recomputed.
    progress : callable or True, optional
        Called as ``progress(done, total)`` with numbers of rows, for every pass over them; True shows a bar by tqdm. The
        pullback of `tensor_attention_vjp` tells as well. A program that a library compiles as a whole (JAX) tells
        nothing.

    Returns
    -------
    array (..., n, dv), or a tuple with lse, error and plan, as asked for, in this order
        In the dtype of the query; lse and error in the dtype of the computation. Differentiable by our own adjoint in
        torch and JAX. A row is NaN if its normaliser lost its sign; this needs scores beyond a promised bound.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, by name, before anything is computed. Also for NaN and infinities, unless the
        bound of the plan was promised.
    PlanError
        If "polynomial" cannot meet `tol`, if `plan` does not fit the call or the range of its scores, or if more than
        `max_flops` would be needed.

    Notes
    -----
    Polynomial method: O((n + Σ n_μ) r dv) time for rank r. Exact method: O(n Π n_μ (d + dv)) time,
    O(n Π window[μ] (d + dv)) with windows. Memory beyond inputs and outputs: a few numbers a row, blocks of rows of a
    fixed size, and with the polynomial method summaries, O(r dv). Theorem 4.2 and Lemma F.1 of arXiv 2405.16411.

    Examples
    --------
    >>> import numpy as np, tattn
    >>> rng = np.random.default_rng(0)
    >>> query, *keys = rng.uniform(-1, 1, (3, 1000, 4))
    >>> values = list(rng.normal(size=(2, 1000, 4)))
    >>> tattn.tensor_attention(query, keys, values).shape
    (1000, 4)
    """
    asked = _Asked(tol, method, plan, max_flops, return_lse, return_error, return_plan)
    given = query, keys, values, key_masks, key_weights
    filled = filled_batch(given)
    sees = causal, window, offsets, decay
    inputs, weights, _ = _checked(filled.given if filled else given, sees, channels, asked)
    asked = _of_any_length(inputs, scale, asked)
    with telling(reporter(progress)):
        work = _chosen(inputs, scale, asked)
        result = _computed(work, inputs, weights, asked)
        if filled is not None:
            result = filled.emptied(result)
        return _returned(result, inputs, work, asked)[0]


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
    key_weights: Sequence[Array | None] | None = None,
    causal: bool = False,
    decay: Sequence[Array | float | None] | None = None,
    window: Sequence[int] | None = None,
    offsets: Array | Sequence[Array] | None = None,
    channels: str | None = None,
    max_flops: float | None = None,
    return_lse: bool = False,
    return_error: bool = False,
    return_plan: bool = False,
    progress: bool | Progress | None = None,
) -> tuple[Any, Pullback]:
    """Tensor attention, and a function from the gradient of its output to those of its inputs, for any library.

    Parameters
    ----------
    query, keys, values, scale, tol, method, plan, key_masks, key_weights, causal, decay, window, offsets, channels, \
    max_flops, return_lse, return_error, return_plan, progress
        As in `tensor_attention`.

    Returns
    -------
    out : as from `tensor_attention`
    pullback : callable
        ``pullback(grad_out) -> (dquery, dkeys, dvalues)``, with ``dkeys`` and ``dvalues`` tuples. Each array has the
        shape and dtype of its input. With `key_weights` their gradients follow, in the structure in which they were
        given, and with `decay` those of its arrays, with None for numbers. ``pullback(grad_out, grad_lse)`` adds a
        gradient of lse. The result is the exact derivative of the computed output. ``pullback(..., return_error=True)``
        returns the gradients and, in the same structure, a certified bound for the error of every entry. With a banded
        plan the bounds come from the certificates of the rows, and are infinite for weights; otherwise from
        ``plan.error`` and ``plan.grad_error``. They are infinite if the plan is not certified. Where the inputs need
        gradients in torch, the pullback is itself differentiable. It needs the output: change `out` in place only after
        calling it.

    Raises
    ------
    TypeError, ValueError, PlanError
        As from `tensor_attention`. From the pullback for a gradient without the library, dtype, device and shape of its
        output, by name.

    Notes
    -----
    The pullback takes twice the time of the forward pass, and memory of the same order: Lemma 4.5 and Fact 4.4 applied
    to the adjoint, O((n + Σ n_μ) r dv), or the adjoint of softmax in blocks.

    Examples
    --------
    >>> import numpy as np, tattn
    >>> query, *keys = np.random.default_rng(0).uniform(-1, 1, (3, 500, 4))
    >>> out, pullback = tattn.tensor_attention_vjp(query, keys, keys)
    >>> dquery, dkeys, dvalues = pullback(np.ones_like(out))
    >>> dquery.shape, len(dkeys), len(dvalues)
    ((500, 4), 2, 2)
    """
    asked = _Asked(tol, method, plan, max_flops, return_lse, return_error, return_plan)
    given = query, keys, values, key_masks, key_weights
    inputs, weights, decays = _checked(given, (causal, window, offsets, decay), channels, asked)
    report, backend = reporter(progress), inputs.backend
    with telling(report):
        work = _chosen(inputs, scale, asked)
        result = _computed(work, inputs, weights)
    computed, lse, *kept = result
    returned, out = _returned(result, inputs, work, asked)

    def pullback(grad_out: Array, grad_lse: Array | None = None, *, return_error: bool = False) -> Any:
        checked_flags(return_error=return_error)
        upstream = checked_gradients(grad_out, grad_lse, out, lse, backend)
        residuals = backend.residuals(forward, work.call, work.arrays, (computed, *kept))
        with telling(report):
            flat = backend.run(backward, work.call, (*work.arrays, *residuals, *upstream))
        grads = structured(flat)
        if not return_error:
            return grads
        known = work
        if _unplanned(inputs, asked):
            known = work._replace(plan=plan_inputs(inputs, work.plan.scale, Wish(tol, method)))
        bounds = structured(gradient_bounds(known, inputs, computed, kept[0], upstream))
        return grads, tuple(_where_finite(g, bound, backend) for g, bound in zip(grads, bounds, strict=True))

    def structured(flat: Sequence[Array]) -> tuple[Any, ...]:
        found = Gradients.of(flat, inputs.views)
        grads = list(found[:3])
        if weights and key_weights is not None:
            grads.append(weights.gradients(found.weights, backend))
        if decays:
            grads.append(decays.gradients(found.decays, backend))
        return tuple(grads)

    return returned, pullback


def _where_finite(gradient: Any, bound: Any, backend: Backend) -> Any:
    """The bounds of gradients, or of a tuple of them, infinite where a gradient overflowed or is NaN; None for none."""
    if isinstance(gradient, tuple):
        return tuple(_where_finite(*pair, backend) for pair in zip(gradient, bound, strict=True))
    if gradient is None:
        return None
    (value,) = backend.values_of((gradient,))
    with backend.on_device_of(value):
        return backend.xp.where(backend.xp.isfinite(value), bound, backend.xp.inf)


def _checked(
    given: tuple[Any, Any, Any, Any, Any], sees: tuple[Any, Any, Any, Any], channels: Any, asked: _Asked
) -> tuple[Inputs, Weights | None, Decays | None]:
    """The arrays of a call (query, keys, values, masks, weights), what a row `sees` (causal, window, offsets, decay), what its
    channels are, and what it asked to be returned.
    """
    checked_flags(return_lse=asked.lse, return_error=asked.error, return_plan=asked.returns_plan)
    check_values(given[2])
    query, keys, values, masks, key_weights = given
    inputs = with_documents(checked_inputs(query, keys, values, masks, sees[:2]), sees[2])
    if channels is None:
        channels = asked.plan.channels if isinstance(asked.plan, Plan) else REAL
    promised = isinstance(asked.plan, Plan) and asked.plan.source in ("promise", "answer")
    inputs = with_channels(inputs, channels)
    if key_weights is None and sees[3] is None:
        return inputs, None, None
    inputs, weights = with_weights(inputs, key_weights, reading=not promised)
    if sees[3] is None:
        return inputs, weights, None
    inputs, decays = with_decay(inputs, sees[3], reading=not promised)
    return inputs, weights, decays


def _of_any_length(inputs: Inputs, scale: Any, asked: _Asked) -> _Asked:
    """With a plan for all lengths, where a compiler takes calls with plans as one operator and the method needs no range of the
    scores.
    """
    if asked.plan is not None or not inputs.traced or not inputs.backend.takes_whole():
        return asked
    if asked.max_flops is not None or asked.returns_plan:
        # These are about this length.
        return asked
    checked_method(asked.method, NAMES)
    number = checked_options(scale, inputs.dim, asked.tol, inputs.views, inputs.dtype)
    if not may_be_unknown(inputs.order, Wish(asked.tol, asked.method)):
        return asked
    shapes = inputs.views, inputs.dim, inputs.value_dim, inputs.dtype
    causal, window, _ = inputs.order
    unread = Unread(shapes, number, causal, window, inputs.backend.chain, inputs.channels, asked.method)
    return asked._replace(plan=unread)


def _chosen(inputs: Inputs, scale: Any, asked: _Asked) -> Work:
    """What to compute for them."""
    tol, method, plan = asked[:3]
    certify = bool(asked.error)
    plan = plan.plan() if isinstance(plan, Unread) else plan
    if isinstance(plan, Plan) and scale is None:
        scale = plan.scale
    checked_method(method, NAMES)
    number = checked_options(scale, inputs.dim, tol, inputs.views, inputs.dtype)
    most = checked_most(asked.max_flops)
    wish = Wish(tol, method, max_flops=most)
    if plan is not None:
        check_plan(plan, inputs, number, method)
        if most is not None:
            check_flops(plan, most, plan.algorithm.cost(inputs.problem(number)).flops)
        return work_of(inputs, for_lengths(plan, inputs), certify)
    if inputs.traced and not may_be_unknown(inputs.order, wish):
        raise PlanError(
            "the call is traced and its values cannot be read, so it needs a plan made beforehand: with a bound that you promise, "
            "plan=tattn.plan_for(..., bound=...), or one that finds its bound on the way, tattn.plan_for(..., series='banded')"
        )
    if inputs.traced:
        made = plan_inputs(inputs, number, wish)
        check_flops(made, most)
        return work_of(inputs, made, certify)
    if _unplanned(inputs, asked) and not certify and not asked.returns_plan:
        made = exact_plan(inputs, number)
        check_flops(made, most)
        return work_of(inputs, made)
    return chosen_work(inputs, number, wish, certify)


def _unplanned(inputs: Inputs, asked: _Asked) -> bool:
    """True if the exact method was requested: a plan is needed only to report an error bound."""
    return asked.method == "exact" and asked.plan is None and not inputs.traced


def _computed(work: Work, inputs: Inputs, weights: Weights | None, asked: _Asked | None = None) -> tuple[Array, ...]:
    """Output, log-sum-exp and what the adjoint needs besides; computed once more where gradients are recorded.

    A compiler may take a call with a plan as one operator, if it is said what was `asked`.
    """
    out, lse, *kept = _of_divided(work, inputs, asked)
    return out, (lse if weights is None else weights.of_all(lse, inputs.backend)), *kept


def _of_divided(work: Work, inputs: Inputs, asked: _Asked | None) -> tuple[Array, ...]:
    """`_computed` for weights as they stand in the place of masks."""
    if inputs.traced and asked is not None and asked.plan is not None and inputs.documents is None:
        # torch takes no tuples with names for constants.
        plan = tuple(asked.plan) if isinstance(asked.plan, Unread) else asked.plan
        described = plan, asked.error, inputs.order.decays
        program, arrays = (PACKED if inputs.offsets else ATTENTION), (*work.arrays, *inputs.offsets)
        whole = inputs.backend.whole(program, described, arrays)
        if whole is not None:
            return *whole[:2], *inputs.backend.values_of(whole[2:])
    if inputs.offsets:
        raise unread_offsets()
    if work.result is None or inputs.backend.records(work.arrays):
        return inputs.backend.differentiable(forward, backward, work.call, work.arrays)
    return work.result


def _returned(result: tuple[Array, ...], inputs: Inputs, work: Work, asked: _Asked) -> tuple[Any, Array]:
    """What the caller asked for, and the output."""
    backend, plan, query = inputs.backend, work.plan, inputs.arrays[0]
    computed, lse, kept, *_ = result
    with backend.on_device_of(query):
        out = backend.cast(computed, query.dtype)  # type: ignore[union-attr]
        returned = [out]
        if asked.lse:
            returned.append(lse[..., 0])
        if asked.error:
            errors = work.call.method.row_errors(kept)
            if errors is None and kept.shape[-1] > 1:
                # An operator has told it already.
                errors = kept[..., 1]
            if errors is None:
                plain: Any = backend.values_of((lse, *inputs.arrays))
                (told,) = backend.run(told_error, stated_call(work), plain[1:])
                errors = backend.xp.broadcast_to(told, tuple(plain[0].shape))[..., 0]
            numbers = backend.xp.all(backend.xp.isfinite(*backend.values_of((computed,))), axis=-1)
            returned.append(backend.xp.where(numbers, errors, backend.xp.inf))
    if asked.returns_plan:
        returned.append(plan)
    return (tuple(returned) if len(returned) > 1 else out), out
