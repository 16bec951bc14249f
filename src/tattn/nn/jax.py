"""The layer as functions of a dict of parameters, for JAX and its transformations.

Parameters have the names, shapes and layout of the torch layer's ``state_dict``, so each can load those of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..attention import tensor_attention
from ..backends.jax import BACKEND
from ..checks import checked_dtype, checked_flags, checked_kind
from ..plans import Plan
from ..state.decoding import DecodingState
from ..state.summary import summarize
from .checks import check_offsets, check_served, checked_layer_call, checked_parameters
from .config import AttentionConfig, plan_of_call, plans_of
from .heads import Counted, Learned, attend
from .jax_state import ServingState, check_state, extended, kept, last

Params = dict[str, jax.Array]
# A learned bound starts at the logistic function of this, 88 % of the bound: close to it, and with a slope left.
LOGIT = 2.0


def init(key: jax.Array, config: AttentionConfig, *, dtype: Any = None) -> Params:
    """Draw the parameters of a layer: a dict of arrays.

    Parameters
    ----------
    key : jax.Array
        From ``jax.random.key``.
    config : AttentionConfig
    dtype : dtype, optional
        JAX's default floating dtype if not given.

    Returns
    -------
    dict of arrays
        ``q_proj.weight`` (num_heads · head_dim, embed_dim), ``k_projs.0.weight``, ``v_projs.0.weight``, …,
        ``out_proj.weight``, a ``bias`` beside each, and for what is learned ``bound_logit`` (num_heads,), ``frequencies`` and
        ``decay_logit``. Weights have variance 1/fan-in.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, by name.
    PlanError
        If no polynomial serves this bound and head dimension; the message says what would do.

    Examples
    --------
    >>> import jax
    >>> from tattn.nn import AttentionConfig
    >>> from tattn.nn.jax import apply, init
    >>> config = AttentionConfig(32, 8, bound=1.0)
    >>> params = init(jax.random.key(0), config)
    >>> apply(params, jax.numpy.ones((2, 50, 32)), config=config).shape
    (2, 50, 32)
    """
    _checked_config(config)
    _checked_key(key)
    dtype = jnp.zeros(0).dtype if dtype is None else _checked_dtype(dtype)
    plans_of(config, _computed_in(dtype))
    params: Params = {}
    shapes = config.parameter_shapes()
    for (name, shape), k in zip(shapes.items(), jax.random.split(key, len(shapes)), strict=True):
        if name.endswith("weight"):
            params[name] = jax.random.uniform(k, shape, dtype, -1, 1) * sqrt(3 / shape[1])
        else:
            params[name] = jnp.broadcast_to(jnp.asarray(_start(name, config), dtype), shape)
    return params


def apply(
    params: Params,
    x: jax.Array,
    contexts: Sequence[jax.Array] | None = None,
    *,
    config: AttentionConfig,
    key_masks: jax.Array | Sequence[jax.Array | None] | None = None,
    key_weights: jax.Array | Sequence[jax.Array | None] | None = None,
    offsets: Any = None,
    return_error: bool = False,
) -> Any:
    """Attend from every row of `x` to all pairs (triples, …) of rows of the contexts, under every transformation.

    Parameters
    ----------
    params : dict of arrays
        As from `init`.
    x : array (..., n, embed_dim)
    contexts : sequence of order − 1 arrays (..., n_μ, context_dims[μ]), optional
        `x` itself in every view if not given. The batch broadcasts with that of `x`.
    config : AttentionConfig
    key_masks : boolean array (..., n), or sequence of order − 1 of them (..., n_μ) or None, optional
        True where to attend. A single mask is for every view, and for self-attention only.
    key_weights : array (..., n), or sequence of order − 1 of them (..., n_μ) or None, optional
        As in `tattn.tensor_attention`, in any floating dtype; a single one as with masks.
    offsets : integer array (documents + 1,), or sequence of `order` of them, optional
        For documents that stand one after another in the rows, as in `tattn.tensor_attention`. Under ``jit`` they are no argument
        of the function that is compiled, but known when it is.
    return_error : bool
        Also return a certified bound of each head's error in each row (..., num_heads, n), measured like
        ``config.tol``.

    Returns
    -------
    array (..., n, embed_dim), or a pair with the errors

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, by name.
    """
    checked_flags(return_error=return_error)
    given = _checked_call(params, (x, contexts, key_masks, key_weights), config)
    check_offsets(offsets, config, x, given[1])
    attention = partial(_attention, config, {"return_error": return_error, "offsets": offsets})
    out, error = _attend(params, given, config, attention, return_error)
    return (out, error) if return_error else out


def prefill(
    params: Params,
    x: jax.Array,
    *,
    config: AttentionConfig,
    key_masks: jax.Array | Sequence[jax.Array | None] | None = None,
    key_weights: jax.Array | Sequence[jax.Array | None] | None = None,
) -> tuple[jax.Array, ServingState]:
    """The output of a causal layer for rows to begin with, such as a prompt, and the state to go on from.

    Parameters
    ----------
    params : dict of arrays
        As from `init`.
    x : array (..., n, embed_dim)
    config : AttentionConfig
        With ``causal=True``.
    key_masks, key_weights
        As in `apply`: False for the padding of shorter prompts. Weights of all rows of a stream are in one unit.

    Returns
    -------
    out : array (..., n, embed_dim)
        As from `apply`.
    state : ServingState

    Raises
    ------
    TypeError, ValueError
        As from `apply`; also for a layer that is not causal, attends to other contexts, or is planned from data.

    Examples
    --------
    >>> import jax
    >>> from tattn.nn import AttentionConfig
    >>> from tattn.nn.jax import apply, init, prefill, step
    >>> config = AttentionConfig(16, 2, bound=1.0, degree=2, causal=True)
    >>> params, x = init(jax.random.key(0), config), jax.random.normal(jax.random.key(1), (20, 16))
    >>> first, state = prefill(params, x[:10], config=config)
    >>> def token(state, row):
    ...     out, state = step(params, row[None], state, config=config)
    ...     return state, out[0]
    >>> state, rest = jax.lax.scan(token, state, x[10:])
    >>> outs = jax.numpy.concatenate([first, rest])
    >>> bool(jax.numpy.allclose(outs, apply(params, x, config=config), atol=1e-5))
    True
    """
    given = _checked_served(params, (x, None, key_masks, key_weights), config)
    begun: list[ServingState] = []

    def attention(query: Any, keys: Any, values: Any, counted: Counted) -> Any:
        plan = _served_plan(config, query.dtype)
        state = ServingState(config, jnp.asarray(x.shape[-2], jnp.int32))
        if plan is None:
            begun.append(replace(state, rows=last(config, kept(keys, values, counted, x.shape[:-2]))))
        else:
            begun.append(
                replace(state, decoding=DecodingState(plan, summarize(keys, values, plan, **counted.options())))
            )
        return _attention(config, {}, query, keys, values, counted)

    return _attend(params, given, config, attention)[0], begun[0]


def step(
    params: Params,
    x: jax.Array,
    state: ServingState | None = None,
    *,
    config: AttentionConfig,
    key_masks: jax.Array | Sequence[jax.Array | None] | None = None,
    key_weights: jax.Array | Sequence[jax.Array | None] | None = None,
) -> tuple[jax.Array, ServingState]:
    """The output of a causal layer for the rows that follow, and the new state; `state` itself does not change.

    Parameters
    ----------
    params : dict of arrays
        Those that the state was made with.
    x : array (..., n, embed_dim)
        One row or several, such as drafted tokens or the next part of a prompt. The batch of the state.
    state : ServingState, optional
        From `prefill` or `step`; the rows are the first if not given.
    config : AttentionConfig
    key_masks, key_weights
        As in `prefill`, for these rows: False for streams that have ended.

    Returns
    -------
    out : array (..., n, embed_dim)
    state : ServingState

    Raises
    ------
    TypeError, ValueError
        As from `prefill`; also for a state of another config, dtype or batch.
    """
    if state is None:
        return prefill(params, x, config=config, key_masks=key_masks, key_weights=key_weights)
    given = _checked_served(params, (x, None, key_masks, key_weights), config)
    computed = BACKEND.compute_dtype(params["q_proj.weight"].dtype)
    check_state(state, config, x, computed)
    after: list[ServingState] = []

    def attention(query: Any, keys: Any, values: Any, counted: Counted) -> Any:
        if state.decoding is None:
            out, rows = extended(config, state.rows, (query, keys, values, counted), x.shape[:-2])
            new = replace(state, rows=rows)
        else:
            out, decoding = state.decoding.step(query, keys, values, **counted.options())
            new = replace(state, decoding=decoding)
        after.append(replace(new, length=state.length + x.shape[-2]))
        return out

    return _attend(params, given, config, attention, before=state.length)[0], after[0]


def _start(name: str, config: AttentionConfig) -> Any:
    """What a parameter that is not drawn begins with."""
    if name == "frequencies":
        return config.frequencies()
    if name == "decay_logit":
        factors = config.factors()
        return np.log(factors / (1 - factors))
    return LOGIT if name == "bound_logit" else 0


def _checked_call(params: Any, given: tuple[Any, Any, Any, Any], config: Any) -> tuple[jax.Array, Any, Counted]:
    """x, contexts and what counts of their rows, of (x, contexts, key_masks, key_weights), once all fits."""
    _checked_config(config)
    checked_parameters(params, config.parameter_shapes(), BACKEND)
    return given[0], *checked_layer_call(given, config, params["q_proj.weight"], BACKEND)


def _checked_served(params: Any, given: tuple[Any, Any, Any, Any], config: Any) -> tuple[jax.Array, Any, Counted]:
    """The same for a layer that goes on row by row."""
    _checked_config(config)
    check_served(config)
    return _checked_call(params, given, config)


def _attend(
    params: Params,
    given: tuple[jax.Array, Sequence[jax.Array], Counted],
    config: AttentionConfig,
    attention: Any,
    return_error: bool = False,
    before: Any = 0,
) -> tuple[jax.Array, jax.Array | None]:
    """Output, and the errors if asked for, of heads that `attention` computes from projected rows; `before` those so far."""
    x, contexts, counted = given

    def project(name: str, rows: jax.Array) -> jax.Array:
        projected = rows @ params[f"{name}.weight"].T
        return projected + params[f"{name}.bias"] if config.bias else projected

    score_factor = jax.nn.sigmoid(params["bound_logit"]) if config.learn_bound else None
    # Whatever the caller has set: one bias serves all rows, and one head many.
    with jax.numpy_rank_promotion("allow"):
        query = project("q_proj", x)
        keys = [project(f"k_projs.{i}", c) for i, c in enumerate(contexts)]
        values = [project(f"v_projs.{i}", c) for i, c in enumerate(contexts)]
        rows = query, keys, values, counted
        learned = Learned(score_factor, params.get("frequencies"), before, params.get("decay_logit"))
        out, error = attend(config, attention, rows, learned, jax.lax.stop_gradient, return_error)
        return project("out_proj", out), error


def _attention(config: AttentionConfig, more: Any, query: Any, keys: Any, values: Any, counted: Counted) -> Any:
    """All heads, each a leading dimension; `more` arguments than those of the config."""
    options: dict[str, Any] = {"tol": config.tol, "method": config.method}
    plans = plans_of(config, _computed_in(query.dtype))
    if plans:
        options = {"plan": plans[plan_of_call(plans, [query.shape[-2], *(k.shape[-2] for k in keys)])]}
    options |= counted.options()
    options |= {"causal": config.causal, "window": config.window, "channels": config.channels}
    return tensor_attention(query, keys, values, **options, **more)


def _served_plan(config: AttentionConfig, dtype: Any) -> Plan | None:
    """The plan of the state's sums; None for keys and values as they are."""
    # A sum does not forget rows again.
    return None if config.method == "exact" or config.window else plans_of(config, _computed_in(dtype))[0]


def _computed_in(dtype: Any) -> str:
    return "float64" if dtype == jnp.float64 else "float32"


def _checked_config(config: Any) -> None:
    checked_kind("config", config, AttentionConfig, "a tattn.nn.AttentionConfig")


def _checked_key(key: Any) -> None:
    """TypeError unless `jax.random` takes it for one key."""
    try:
        alone = jnp.shape(jax.random.key_data(key))[:-1] == ()
    except (TypeError, ValueError):
        alone = False
    if not alone:
        raise TypeError(f"key should be one key of jax.random.key, got {type(key).__name__}")


def _checked_dtype(dtype: Any) -> Any:
    try:
        # An array is a dtype for NumPy: its own.
        found = None if isinstance(dtype, (jax.Array, np.ndarray, np.generic)) else jnp.dtype(dtype)
    except (TypeError, ValueError):
        found = None
    checked_dtype(dtype if found is None else found.name)
    return found
