"""From projected rows to the output of all heads: normalise, attend, put side by side.

Shapes: query (..., n, H · d); keys (..., n_μ, K · d) and values (..., n_μ, K · dv) for K key heads, each of which H/K
query heads share; the output is (..., n, H · dv). In between a head is a leading dimension: (..., K, H/K, n, d) for the
query and (..., K, 1, n_μ, d) for a view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..arrays import swap_outer
from ..backends import Array, Backend, backend_of
from ..backends.tables import memoized
from ..positions import turn
from .config import AttentionConfig


class Learned(NamedTuple):
    """Factors (H,) of the scores, frequencies (m, K, d / 2) and logits (m, K) of what rows count less by, None for those of the
    config; and rows before these.
    """

    score_factor: Array | None = None
    frequencies: Array | None = None
    before: Any = 0
    decay_logit: Array | None = None


class Counted(NamedTuple):
    """What counts of the rows of every view: masks and weights (..., n_μ), or None for a view; None for all.

    `decays` are factors (K, 1) of each view by which rows count less, or None.
    """

    masks: Sequence[Array | None] | None = None
    weights: Sequence[Array | None] | None = None
    decays: Sequence[Array] | None = None

    def each(self, change: Callable[[Array], Array]) -> Counted:
        """With every mask and all weights changed."""
        masks, weights = (
            None if of is None else [None if x is None else change(x) for x in of] for of in (self.masks, self.weights)
        )
        return Counted(masks, weights, self.decays)

    def of_view(self, view: int) -> tuple[Array | None, Array | None]:
        """Mask and weights of one."""
        masks, weights = (None if of is None else of[view] for of in (self.masks, self.weights))
        return masks, weights

    def options(self) -> dict[str, Any]:
        """As `tattn.tensor_attention` takes them, and as `tattn.DecodingState` does."""
        return {"key_masks": self.masks, "key_weights": self.weights, "decay": self.decays}


def attend(
    config: AttentionConfig,
    attention: Callable[..., Any],
    rows: tuple[Array, Sequence[Array], Sequence[Array], Counted],
    learned: Learned,
    constant: Callable[[Array], Array],
    return_error: bool,
) -> tuple[Array, Array | None]:
    """Output (..., n, H · dv) in the query's dtype, and the errors (..., H, n) if asked for.

    ``attention(query, keys, values, counted)`` computes the heads of such `rows`. `constant` takes an array out of
    differentiation.
    """
    query, keys, values, counted = rows
    backend = backend_of(query)
    assert backend is not None
    dtype = query.dtype
    key_heads, shared = config.num_key_heads, config.num_heads // config.num_key_heads

    def split(rows: Array, heads: int) -> Array:
        # Rows that a narrow dtype rounds would be longer than one: normalise, and attend, in float32.
        rows = backend.cast(rows, backend.compute_dtype(dtype))
        return swap_outer(backend.xp.reshape(rows, (*rows.shape[:-1], heads, rows.shape[-1] // heads)), backend)

    def normalised(rows: Array) -> Array:
        return rows if config.bound is None else unit_rows(rows, config, backend, constant)

    def grouped(heads: Array, shared: int) -> Array:
        return backend.xp.reshape(heads, (*heads.shape[:-3], key_heads, shared, *heads.shape[-2:]))

    q = normalised(split(query, config.num_heads))
    if learned.score_factor is not None:
        q = q * backend.cast(learned.score_factor, q.dtype)[:, None, None]
    q = grouped(q, shared)
    ks = [grouped(normalised(split(k, key_heads)), 1) for k in keys]
    if config.positions:
        q, ks = _turned(q, ks, config, learned, backend)
    vs = [grouped(split(v, key_heads), 1) for v in values]
    counted = counted.each(lambda x: x[..., None, None, :])
    if counted.weights is not None:
        wide = [None if w is None else backend.cast(w, q.dtype) for w in counted.weights]
        counted = counted._replace(weights=wide)
    if config.decay is not None:
        counted = counted._replace(decays=_decays(q, config, learned.decay_logit, backend))
    out, error = attention(q, ks, vs, counted) if return_error else (attention(q, ks, vs, counted), None)
    out = swap_outer(_joined(out, config, backend), backend)
    out = backend.xp.reshape(out, (*out.shape[:-2], config.num_heads * config.value_dim))
    if error is not None:
        error = _joined(error[..., None], config, backend)[..., 0]
    return backend.cast(out, dtype), error


def _decays(q: Array, config: AttentionConfig, logit: Array | None, backend: Backend) -> list[Array]:
    """The factors (K, 1) of every view, in the dtype of the query rows."""
    if logit is None:
        factors = backend.table(_factors, config, like=q, dtype=q.dtype)
    else:
        # Those near 1 take more digits than a narrow dtype has.
        logit, xp = backend.cast(logit, q.dtype), backend.xp
        factors = xp.exp(-xp.logaddexp(xp.zeros_like(logit), -logit))
    return [factors[view][:, None] for view in range(config.views)]


def _turned(
    q: Array, ks: Sequence[Array], config: AttentionConfig, learned: Learned, backend: Backend
) -> tuple[Array, list[Array]]:
    """Query and keys turned by their positions: the query by the frequencies of every view, one after another."""
    xp, n = backend.xp, q.shape[-2]
    frequencies = learned.frequencies
    if frequencies is None:
        frequencies = backend.table(_frequencies, config, backend.dtype_name(q.dtype), like=q, dtype=q.dtype)
    frequencies = backend.cast(frequencies, q.dtype)

    def places(count: int, like: Array) -> Array:
        return xp.arange(count, dtype=like.dtype, device=backend.device(like)) + learned.before

    turned = []
    for view, k in enumerate(ks):
        own, rows = frequencies[view][:, None, :], k.shape[-2]
        of_keys = places(rows, k)
        q = turn(q, of_keys[rows - n :] if config.causal else places(n, q), own, backend)
        turned.append(turn(k, of_keys, -own, backend))
    return q, turned


@memoized
def _factors(config: AttentionConfig) -> np.ndarray:
    """Those of a config."""
    return config.factors()


@memoized
def _frequencies(config: AttentionConfig, dtype: str) -> np.ndarray:
    """Those of a config, in the dtype that they are used in."""
    return config.frequencies().astype(dtype)


def unit_rows(x: Array, config: AttentionConfig, backend: Backend, constant: Callable[[Array], Array]) -> Array:
    """Rows (..., n, d) of any finite size, each over (Σ_c |x_c|^p + eps^p)^(1/p) with p = order; |x_c| of complex channels."""
    xp, order, eps = backend.xp, config.order, config.eps
    top = xp.max(xp.abs(x), axis=-1, keepdims=True)
    # Powers of entries of size one neither overflow nor vanish. The result does not depend on the divisor, hence it counts
    # as a constant in the gradient.
    top = constant(xp.where(top > eps, top, eps))
    y = x / top
    powers = _moduli_power(y, order, backend) if config.positions else _power(y, xp.abs(y), order)
    total = xp.sum(powers, axis=-1, keepdims=True)
    small = eps / top
    return y / xp.pow(total + _power(small, small, order), 1 / order)


def _power(y: Array, size: Array, exponent: int) -> Array:
    """|y|^exponent as products, whose derivatives are right at 0."""
    result = y * y
    for _ in range(exponent // 2 - 1):
        result = result * (y * y)
    return result * size if exponent % 2 else result


def _moduli_power(y: Array, exponent: int, backend: Backend) -> Array:
    """|z|^exponent of complex channels, real parts before imaginary ones, as products, whose derivatives are right at 0."""
    xp, half = backend.xp, y.shape[-1] // 2
    square = y[..., :half] * y[..., :half] + y[..., half:] * y[..., half:]
    result = square
    for _ in range(exponent // 2 - 1):
        result = result * square
    return result * xp.sqrt(xp.where(square > 0, square, 1.0)) if exponent % 2 else result


def _joined(array: Array, config: AttentionConfig, backend: Backend) -> Array:
    """(..., K, H/K, n, k) → (..., H, n, k)."""
    return backend.xp.reshape(array, (*array.shape[:-4], config.num_heads, *array.shape[-2:]))
