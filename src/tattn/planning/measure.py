"""The error of an answer, measured on some of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite
from typing import Any

import numpy as np

from ..backends import Array
from ..bounds.score_range import RangeCall, ranges
from ..checks import (
    Inputs,
    PlanError,
    check_values,
    checked_entries,
    checked_finite,
    checked_inputs,
    checked_options,
    checked_output,
    whole,
)
from ..methods import Call, Exact, forward


def measure_error(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    out: Array,
    *,
    rows: int = 16,
    seed: int = 0,
    scale: float | None = None,
    key_masks: Sequence[Array | None] | None = None,
    causal: bool = False,
    window: Sequence[int] | None = None,
) -> tuple[float, float]:
    """Recompute some query rows exactly and compare.

    Parameters
    ----------
    query, keys, values, scale, key_masks, causal, window
        The same as in the call that returned `out`.
    out : array (..., n, dv)
        The output to check.
    rows : int
        How many query rows to recompute in each problem of the batch, drawn without repetition.
    seed : int

    Returns
    -------
    largest, mean : float
        Error over the recomputed rows and all channels, relative to Π_μ max_j |values_μ[j, e]| like `tol`. Where this
        product is 0, the output must be 0.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, by name; NaN and infinities among them.
    PlanError
        If the call is traced, because values are read.

    Notes
    -----
    In blocks: O(rows · Π n_μ (d + dv)) time for each problem of the batch, constant memory.

    Examples
    --------
    >>> import numpy as np, tattn
    >>> query, *keys = np.random.default_rng(0).uniform(-1, 1, (3, 200, 4))
    >>> largest, mean = tattn.measure_error(query, keys, keys, tattn.tensor_attention(query, keys, keys))
    >>> largest < 1e-3
    True
    """
    check_values(values)
    inputs = checked_inputs(query, keys, values, key_masks, (causal, window))
    number = checked_options(scale, inputs.dim, 1.0, "exact", inputs.views, inputs.dtype)
    rows, seed = whole("rows", rows, 1), whole("seed", seed, 0, inf)
    expected = (*inputs.leading, inputs.lengths[0], inputs.value_dim)
    checked_output("out", out, expected, query, inputs.backend, "the query")
    if inputs.traced or inputs.backend.is_traced([out]):
        raise PlanError("the call is traced, and rows can only be compared where values can be read")
    backend = inputs.backend
    query, out, *rest = backend.values_of((query, out, *inputs.arrays[1:]))
    chosen = np.random.default_rng(seed).permutation(inputs.lengths[0])[:rows]
    with backend.on_device_of(query):
        relative = _relative_errors(inputs, number, (query, *rest), out, np.sort(chosen))
        xp = backend.xp
        top = xp.max(xp.abs(backend.cast(out, relative.dtype)))
        largest, mean, entry = map(float, backend.read([xp.max(relative), xp.mean(relative), top]))
    if not isfinite(mean):
        # Which argument is to blame is worth a look only now.
        checked_finite(ranges(RangeCall(number, inputs.views), backend, (query, *rest)).largest, inputs.views)
    checked_entries({"out": entry})
    return largest, mean


def _relative_errors(inputs: Inputs, scale: float, arrays: tuple[Array, ...], out: Array, chosen: np.ndarray) -> Array:
    """How far the chosen rows of an output are from those computed exactly, in parts of `tol`'s measure: (..., rows, dv)."""
    backend, xp = inputs.backend, inputs.backend.xp
    query, *rest = arrays
    values = rest[inputs.views : 2 * inputs.views]
    index = backend.indices(chosen, query)
    arrays = (xp.take(query, index, axis=-2), *rest)
    if inputs.order.causal:
        arrays = _each_with_its_keys(inputs, arrays, chosen)
    dtype = backend.compute_dtype(query.dtype)
    truth, *_ = backend.run(forward, Call(Exact(), inputs.views, scale), arrays)
    if inputs.order.causal:
        truth = truth[..., 0, :]
    size: Array = 1.0
    for v, mask in zip(values, rest[2 * inputs.views :], strict=True):
        v = backend.cast(v, dtype)
        largest = xp.max(xp.abs(v if mask is None else xp.where(mask, v, 0.0)), axis=-2, keepdims=True)
        size = size * largest
    difference = xp.abs(backend.cast(xp.take(out, index, axis=-2), dtype) - truth)
    return difference / xp.where(size > 0, size, 1.0)


def _each_with_its_keys(inputs: Inputs, arrays: Sequence[Array | None], chosen: np.ndarray) -> tuple[Any, ...]:
    """Query rows (..., rows, 1, d), each a problem with masks (..., rows, n_μ, 1) of the keys that the row of this number sees."""
    backend, m = inputs.backend, inputs.views
    apart: list[Any] = [arrays[0][..., None, :]]  # type: ignore[index]
    apart += [a[..., None, :, :] for a in arrays[1 : 1 + 2 * m]]  # type: ignore[index]
    for view, (length, mask) in enumerate(zip(inputs.lengths[1:], arrays[1 + 2 * m :], strict=True)):
        behind = (chosen + length - inputs.lengths[0])[:, None] - np.arange(length)
        window = length if inputs.order.window is None else inputs.order.window[view]
        seen = backend.indices((behind >= 0) & (behind < window), arrays[0])[..., None] > 0
        apart.append(seen if mask is None else seen & mask[..., None, :, :])
    return tuple(apart)
