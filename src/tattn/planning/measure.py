"""The error of an answer, measured on some of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite

import numpy as np

from ..arrays import are_weights, clean
from ..backends import Array
from ..bounds.score_range import RangeCall, ranges
from ..checks import (
    PlanError,
    check_values,
    checked_entries,
    checked_finite,
    checked_inputs,
    checked_options,
    checked_output,
    whole,
    with_channels,
)
from ..methods import Call, Exact, forward
from ..operands import EVERY_ROW, REAL, Operands, View
from ..weights import with_weights


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
    key_weights: Sequence[Array | None] | None = None,
    causal: bool = False,
    window: Sequence[int] | None = None,
    channels: str = REAL,
) -> tuple[float, float]:
    """Recompute some query rows exactly and compare.

    Parameters
    ----------
    query, keys, values, scale, key_masks, key_weights, causal, window, channels
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
    inputs = with_channels(checked_inputs(query, keys, values, key_masks, (causal, window)), channels)
    if key_weights is not None:
        inputs, _ = with_weights(inputs, key_weights)
    number = checked_options(scale, inputs.dim, 1.0, inputs.views, inputs.dtype)
    rows, seed = whole("rows", rows, 1), whole("seed", seed, 0, inf)
    expected = (*inputs.leading, inputs.lengths[0], inputs.value_dim)
    checked_output("out", out, expected, query, inputs.backend, "the query")
    if inputs.traced or inputs.backend.is_traced([out]):
        raise PlanError("the call is traced, and rows can only be compared where values can be read")
    backend = inputs.backend
    operands, (out,) = inputs.operands(number).with_arrays(backend.values_of((*inputs.arrays, out)))
    chosen = np.random.default_rng(seed).permutation(inputs.lengths[0])[:rows]
    with backend.on_device_of(operands.query):
        relative = _relative_errors(operands, out, np.sort(chosen))
        xp = backend.xp
        top = xp.max(xp.abs(backend.cast(out, relative.dtype)))
        largest, mean, entry = map(float, backend.read([xp.max(relative), xp.mean(relative), top]))
    if not isfinite(mean):
        # Which argument is to blame is worth a look only now.
        call = RangeCall(number, inputs.views, channels=inputs.channels)
        checked_finite(ranges(call, backend, operands.flat()).largest, inputs.views)
    checked_entries({"out": entry})
    return largest, mean


def _relative_errors(operands: Operands, out: Array, chosen: np.ndarray) -> Array:
    """How far the chosen rows of an output are from those computed exactly, in parts of `tol`'s measure: (..., rows, dv)."""
    backend, xp, dtype = operands.backend, operands.backend.xp, operands.dtype
    index = backend.indices(chosen, operands.query)
    some = operands._replace(query=xp.take(operands.query, index, axis=-2))
    if operands.order.causal:
        some = _each_with_its_keys(some, operands.lengths[0], chosen)
    call = Call(Exact(), len(some.views), some.scale, channels=some.channels)
    truth, *_ = backend.run(forward, call, some.flat())
    if operands.order.causal:
        truth = truth[..., 0, :]
    size: Array = 1.0
    for _, v, mask in operands.views:
        v = backend.cast(v, dtype)
        size = size * xp.max(xp.abs(clean(v, mask, backend)), axis=-2, keepdims=True)
    difference = xp.abs(backend.cast(xp.take(out, index, axis=-2), dtype) - truth)
    return difference / xp.where(size > 0, size, 1.0)


def _each_with_its_keys(some: Operands, n: int, chosen: np.ndarray) -> Operands:
    """Query rows (..., rows, 1, d), each a problem of its own, with masks (..., rows, n_μ, 1) of the keys that it sees."""
    backend, views = some.backend, []
    for number, (k, v, mask) in enumerate(some.views):
        length = k.shape[-2]
        behind = (chosen + length - n)[:, None] - np.arange(length)
        window = length if some.order.window is None else some.order.window[number]
        seen = backend.indices((behind >= 0) & (behind < window), some.query)[..., None] > 0
        apart = seen
        if mask is not None:
            of_all = mask[..., None, :, :]
            apart = backend.xp.where(seen, of_all, 0.0) if are_weights(mask, backend) else seen & of_all
        views.append(View(k[..., None, :, :], v[..., None, :, :], apart))
    return some._replace(query=some.query[..., None, :], views=tuple(views), order=EVERY_ROW)
