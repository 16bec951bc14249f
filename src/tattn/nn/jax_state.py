"""What a causal layer keeps of the rows so far in JAX, as arrays of one shape where there is one, and how rows go on from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ..attention import tensor_attention
from ..checks import checked_kind
from ..state.decoding import DecodingState
from .config import AttentionConfig, of_step, plans_of
from .heads import Counted


@partial(jax.tree_util.register_dataclass, data_fields=("length", "decoding", "rows"), meta_fields=("config",))
@dataclass(frozen=True, eq=False)
class ServingState:
    """The rows that a causal layer has seen, as `prefill` and `step` return them: a pytree of arrays.

    With the polynomial method these are sums of a fixed size, rank · (value_dim + 1) numbers twice for each view and head of
    keys, however many rows there were; with a window the last `window` rows. Both have one shape from the first row on, as
    ``jax.lax.scan`` needs it. With the exact method and no window they are keys, values and masks, or weights, of all rows.

    Attributes
    ----------
    config : AttentionConfig
        Of the layer. A constant for transformations.
    length : whole number ()
        Rows so far, in an array.
    """

    config: AttentionConfig
    length: jax.Array
    decoding: DecodingState | None = field(default=None, repr=False)
    rows: tuple[jax.Array, ...] = field(default=(), repr=False)


def kept(keys: Any, values: Any, counted: Counted, batch: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Keys, values, and masks or weights (*batch, 1, 1, n) of rows that later ones see."""
    seen = []
    for view, k in enumerate(keys):
        mask, weights = counted.of_view(view)
        whole = jnp.ones((), bool) if mask is None else mask
        one = whole if weights is None else jnp.where(whole, weights, 0)
        seen.append(jnp.broadcast_to(one, (*batch, 1, 1, k.shape[-2])))
    return *keys, *values, *seen


def last(config: AttentionConfig, rows: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """What later rows see of these: all, or as many as the window, with rows that do not count before the first."""
    if config.window is None:
        return tuple(rows)
    views, found = config.views, []
    for i, a in enumerate(rows):
        window, axis = config.window[i % views], a.ndim - (2 if i < 2 * views else 1)
        missing = [(max(0, window - a.shape[axis]) if at == axis else 0, 0) for at in range(a.ndim)]
        a = jnp.pad(a, missing)
        found.append(jax.lax.slice_in_dim(a, a.shape[axis] - window, a.shape[axis], axis=axis))
    return tuple(found)


def extended(
    config: AttentionConfig, before: Sequence[jax.Array], rows: tuple[Any, Any, Any, Counted], batch: tuple[int, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The output of rows that follow others, which are kept as they are, and what later ones see of both."""
    query, keys, values, counted = rows
    views = config.views
    pairs = zip(before, kept(keys, values, counted, batch), strict=True)
    grown = [jnp.concatenate(pair, axis=-2 if i < 2 * views else -1) for i, pair in enumerate(pairs)]
    ks, vs, seen = (grown[i * views : (i + 1) * views] for i in range(3))
    # A mask beside weights is weights of 0 and 1.
    masks, weights = ([s if (s.dtype == bool) == kind else None for s in seen] for kind in (True, False))
    counted = Counted(masks, weights if any(w is not None for w in weights) else None, counted.decays)
    plans = () if config.method == "exact" else plans_of(config, "float64" if query.dtype == jnp.float64 else "float32")
    out = tensor_attention(
        query, ks, vs, **of_step(config, plans), causal=True, window=config.window, channels=config.channels,
        **counted.options(),
    )  # fmt: skip
    return out, last(config, grown)


def check_state(state: Any, config: AttentionConfig, x: jax.Array, dtype: Any) -> None:
    """TypeError or ValueError unless rows `x` may go on from a state."""
    checked_kind("state", state, ServingState, "what prefill or step returned")
    if state.config != config:
        raise ValueError("state should be of the same config, got one of another")
    summary = None if state.decoding is None else state.decoding.summary
    found = state.rows[0] if summary is None else summary.sums[0]
    if found.dtype != dtype:
        raise TypeError(f"state should have the layer's dtype {jnp.dtype(dtype).name}, got {found.dtype.name}")
    if found.shape[:-4] != x.shape[:-2]:
        raise ValueError(f"state should be of the batch of x, {x.shape[:-2]}, got {found.shape[:-4]}")
