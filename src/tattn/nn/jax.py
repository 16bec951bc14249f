"""The layer as functions of a dict of parameters, for JAX and its transformations.

Parameters have the names, shapes and layout of the torch layer's ``state_dict``, so each can load those of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..attention import tensor_attention
from ..backends.jax import BACKEND
from ..checks import checked_dtype, checked_flags, checked_kind
from .checks import check_offsets, checked_layer_call, checked_parameters
from .config import AttentionConfig, plan_of_call, plans_of
from .heads import Learned, attend

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
        ``out_proj.weight``, a ``bias`` beside each, and ``bound_logit`` (num_heads,) for a learned bound. Weights have
        variance 1/fan-in.

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
            start = {"bound_logit": LOGIT, "frequencies": config.frequencies() if config.positions else 0}
            params[name] = jnp.broadcast_to(jnp.asarray(start.get(name, 0), dtype), shape)
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
    _checked_config(config)
    checked_flags(return_error=return_error)
    check_offsets(offsets, config)
    checked_parameters(params, config.parameter_shapes(), BACKEND)
    given = x, contexts, key_masks, key_weights
    contexts, counted = checked_layer_call(given, config, params["q_proj.weight"], BACKEND)

    def project(name: str, rows: jax.Array) -> jax.Array:
        projected = rows @ params[f"{name}.weight"].T
        return projected + params[f"{name}.bias"] if config.bias else projected

    score_factor = jax.nn.sigmoid(params["bound_logit"]) if config.learn_bound else None

    def attention(query: Any, keys: Any, values: Any, counted: Any) -> Any:
        options: dict[str, Any] = {"tol": config.tol, "method": config.method}
        plans = plans_of(config, _computed_in(query.dtype))
        if plans:
            options = {"plan": plans[plan_of_call(plans, [query.shape[-2], *(k.shape[-2] for k in keys)])]}
        options |= counted.options()
        options |= {"causal": config.causal, "window": config.window, "return_error": return_error}
        options |= {"channels": config.channels, "offsets": offsets}
        return tensor_attention(query, keys, values, **options)

    # Whatever the caller has set: one bias serves all rows, and one head many.
    with jax.numpy_rank_promotion("allow"):
        query = project("q_proj", x)
        keys = [project(f"k_projs.{i}", c) for i, c in enumerate(contexts)]
        values = [project(f"v_projs.{i}", c) for i, c in enumerate(contexts)]
        rows = query, keys, values, counted
        learned = Learned(score_factor, params.get("frequencies"))
        out, error = attend(config, attention, rows, learned, jax.lax.stop_gradient, return_error)
        out = project("out_proj", out)
    return (out, error) if return_error else out


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
