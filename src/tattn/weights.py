"""Weights of keys: a row of weight w counts as w equal rows would, and a row of weight 0 is masked.

Numerator and normaliser of softmax take the weight of every key as a factor, so a pair (j, k) has the score x + log w_j + log w_k.
Softmax does not see a factor that all weights of a view share. So they are divided by the power of two that brings the largest
into (1/2, 1], which rounds nothing; lse gets its logarithm back. From there on they stand in the place of masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import isfinite
from typing import Any, NamedTuple

from .arrays import clean, sum_of, sum_to_leading, times_power
from .backends import Array, Backend
from .checks import (
    LARGEST_POWER,
    Inputs,
    check_floating,
    check_library,
    check_not_empty,
    check_row_entries,
    checked_broadcast,
    checked_of_rows,
)
from .features.balance import over_largest, raised


class Weights(NamedTuple):
    """The weights of a call: as they were given, as arrays (..., n_μ, 1) or None, and log2 of what each view's were divided by."""

    given: Any
    columns: tuple[Array | None, ...]
    powers: tuple[Array, ...]

    def of_all(self, lse: Array, backend: Backend) -> Array:
        """The lse (..., n, 1) of a call from that with divided weights."""
        found: Array = backend.run(_raised, None, (lse, *self.powers))
        return found

    def gradients(self, of_divided: Sequence[Array], backend: Backend) -> Any:
        """Gradients of what was given, in its structure, from those of the divided weights (..., n_μ, 1)."""
        some = [i for i, column in enumerate(self.columns) if column is not None]
        arrays = [x[i] for x in (of_divided, self.powers, self.columns) for i in some]
        found = dict(zip(some, backend.run(_gradients, None, arrays) if some else (), strict=True))
        if isinstance(self.given, (list, tuple)):
            return tuple(found.get(i) for i in range(len(self.columns)))
        return sum_of(list(found.values()))


def with_weights(inputs: Inputs, key_weights: Any, reading: bool = True) -> tuple[Inputs, Weights]:
    """The inputs of a call with weights in the place of masks; TypeError or ValueError names what does not fit.

    `reading`: whether their values may be read; those that are none are NaN otherwise.
    """
    backend, m = inputs.backend, inputs.views
    query, keys, masks = inputs.arrays[0], inputs.arrays[1 : m + 1], inputs.arrays[2 * m + 1 :]
    columns = _checked_weights(key_weights, keys, backend)
    named = [("the arrays before", inputs.leading)]
    named += [(f"key_weights[{i}]", tuple(w.shape[:-2])) for i, w in enumerate(columns) if w is not None]
    leading = checked_broadcast(named)
    traced = inputs.traced or backend.is_traced([w for w in columns if w is not None])
    if reading and not traced and key_weights is not None:
        with backend.on_device_of(query):
            _check_entries(columns, backend)
    divided = backend.run(_divided, m, (*keys, *masks, *columns))
    arrays = (*inputs.arrays[: 2 * m + 1], *divided[:m])
    return inputs._replace(arrays=arrays, leading=leading, traced=traced), Weights(key_weights, columns, divided[m:])


def _checked_weights(key_weights: Any, keys: Sequence[Array], backend: Backend) -> tuple[Array | None, ...]:
    """The weights of each view, (..., n_μ, 1) or None."""
    columns: list[Array | None] = []
    for i, (k, w) in enumerate(zip(keys, checked_of_rows("key_weights", key_weights, keys, "keys"), strict=True)):
        if w is None:
            columns.append(None)
            continue
        check_weights(f"key_weights[{i}]", w, f"keys[{i}]", k, backend)
        check_not_empty(f"key_weights[{i}]", tuple(w.shape))
        columns.append(w[..., None])
    return tuple(columns)


def check_weights(name: str, weights: Any, key_name: str, key: Array, backend: Backend) -> None:
    """TypeError or ValueError unless the weights (..., n) are of the library, dtype and device of the key (..., n, d)."""
    check_library(name, weights, backend, key_name)
    check_floating(name, weights, key, backend, key_name)
    check_row_entries(name, weights, key_name, key)


def weights_of_view(_: None, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array]:
    """`joined` of keys, mask and weights."""
    keys, mask, weights = arrays
    return (joined(weights, mask, keys, backend),)


def joined(weights: Array | None, mask: Array | None, keys: Array, backend: Backend) -> Array:
    """Weights (..., n, 1) in the dtype of the computation, 0 where masked and NaN where they are no weights; of none ones."""
    xp, dtype = backend.xp, backend.compute_dtype(keys.dtype)
    if weights is None:
        weights = xp.ones((keys.shape[-2], 1), dtype=dtype, device=backend.device(keys))
    else:
        given = weights > 0
        weights = backend.cast(weights, dtype)
        # One that the dtype takes for 0 is not 0.
        known = (weights >= 0) & xp.isfinite(weights) & ((weights > 0) | xp.logical_not(given))
        weights = xp.where(known, weights, xp.nan)
    return clean(weights, mask, backend)


def _check_entries(columns: Sequence[Array | None], backend: Backend) -> None:
    """ValueError that names weights, which are read, with negative numbers, NaN or infinities among them, or too far apart."""
    xp = backend.xp
    some = [(i, w) for i, w in enumerate(columns) if w is not None and 0 not in w.shape]
    if not some:
        return
    given: Sequence[Array] = backend.values_of([w for _, w in some])
    plain = [backend.cast(w, backend.compute_dtype(w.dtype)) for w in given]
    found = iter(
        float(x) for x in backend.read([x for w in plain for x in (xp.min(w), xp.max(w), _least_share(w, backend))])
    )
    for (i, _), w, least, most, share in zip(some, plain, found, found, found, strict=False):
        if not (least >= 0 and isfinite(most)):
            wrong = "NaN" if least != least or most != most else "infinity" if not isfinite(most) else f"{least:g}"
            raise ValueError(f"key_weights[{i}] should hold finite numbers of at least 0, got {wrong} among them")
        reach = LARGEST_POWER[backend.dtype_name(w.dtype)]
        if share < 2.0**-reach:
            raise ValueError(
                f"key_weights[{i}] should be 0 or at least 2**-{reach} of the largest weight of a problem in "
                f"{backend.dtype_name(w.dtype)}, got {share:.2g} of it"
            )


def _least_share(weights: Array, backend: Backend) -> Array:
    """The smallest weight that is not 0 over the largest of its problem, in all problems: a number."""
    xp = backend.xp
    top = xp.max(weights, axis=-2, keepdims=True)
    least = xp.min(xp.where(weights > 0, weights, xp.inf), axis=-2, keepdims=True)
    return xp.min(least / xp.where(top > 0, top, 1.0))


def _divided(views: int, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Weights (..., n_μ, 1) of every view over powers of two, and log2 of these, from keys, masks and weights as they came."""
    keys, masks, columns = (arrays[i * views : (i + 1) * views] for i in range(3))
    whole = [joined(w, mask, k, backend) for k, mask, w in zip(keys, masks, columns, strict=True)]
    return (*chain.from_iterable(zip(*(over_largest(w, backend) for w in whole), strict=True)),)


def _raised(_: None, backend: Backend, arrays: Sequence[Array]) -> Array:
    """`Weights.of_all` of lse and powers."""
    lse, *powers = arrays
    return raised(lse, powers)


def _gradients(_: None, backend: Backend, arrays: Sequence[Array]) -> tuple[Array, ...]:
    """Gradients (..., n_μ) of weights as they came, from those of the divided ones, powers, and the weights."""
    count = len(arrays) // 3
    found = []
    for g, power, column in zip(*(arrays[i * count : (i + 1) * count] for i in range(3)), strict=True):
        found.append(as_given(times_power(g, -power, backend), column, backend))
    return tuple(found)


def as_given(gradient: Array, column: Array, backend: Backend) -> Array:
    """A gradient of weights (..., n, 1) in the shape (..., n) and dtype of those that came as this column."""
    gradient = sum_to_leading(gradient, tuple(column.shape[:-2]), backend)
    found: Array = backend.cast(gradient, column.dtype)[..., 0]
    return found
