"""What samples tell about a call: the range of its scores, a polynomial fitted to them, the error on some rows.

Nothing here is a bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import inf, isfinite
from typing import Any, NamedTuple

import numpy as np

from . import banded, exact
from .backends import Array, Backend
from .backends.numpy import BACKEND as numpy_backend
from .bands import BandedCall
from .certificate import ERROR
from .checks import Inputs, PlanError, checked_finite, checked_inputs, checked_options, checked_output, whole
from .exponential import minimax
from .ranges import RangeCall, ranges

_QUERIES, _PAIRS = 64, 1 << 18
# No polynomial that can be computed follows exp over a wider range.
_HOPELESS = 60.0


class Estimate(NamedTuple):
    """What was seen on sampled rows."""

    coefficients: tuple[float, ...]
    bound: float
    error: float
    grad_error: float


def estimate(inputs: Inputs, scale: float, tol: float, degrees: Sequence[int]) -> Estimate:
    """The least degree whose fitted polynomial keeps sampled rows within `tol`; the best degree if none does.

    Scores of sampled query rows with sampled rows of every view; the error is Σ |P/ΣP − softmax| of a row, which
    bounds the output's for any values, the largest seen over the rows.
    """
    scores, present = _sampled_scores(inputs, scale)
    seen = np.abs(scores[present])
    # A tenth above the largest score seen, for those that were not.
    bound = 1.1 * float(seen.max()) if seen.size and seen.max() > 0 else 1e-3
    if bound > _HOPELESS:
        return Estimate((1.0, 1.0), bound, inf, inf)
    best: Estimate | None = None
    for degree in degrees:
        fits = [_fitted(scores, present, degree, bound, held) for held in (0.0, 1e-2, 1.0)]
        for coefficients in (*fits, minimax(degree, bound).coefficients):
            error, grad_error = _row_errors(scores, present, coefficients)
            if best is None or error < best.error:
                best = Estimate(tuple(coefficients), bound, error, grad_error)
        assert best is not None
        if best.error <= tol:
            return best
    assert best is not None
    return best


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
        Those of the call that gave `out`.
    out : array (..., n, dv)
        The answer to check.
    rows : int
        How many query rows to recompute in each problem, drawn without repetition.
    seed : int

    Returns
    -------
    largest, mean : float
        Error over the recomputed rows and all channels, relative to Π_μ max_j |values_μ[j, e]| as `tol` is. Where that
        product is 0, so must the output be.

    Notes
    -----
    Streamed: O(rows · Π n_μ (d + dv)) time for each leading index, constant memory.

    Examples
    --------
    >>> import numpy as np, tattn
    >>> query, *keys = np.random.default_rng(0).uniform(-1, 1, (3, 200, 4))
    >>> largest, mean = tattn.measure_error(query, keys, keys, tattn.tensor_attention(query, keys, keys))
    >>> largest < 1e-3
    True
    """
    if values is None:
        raise TypeError("values should be a list or tuple of arrays, one for each view, got None")
    inputs = checked_inputs(query, keys, values, key_masks, causal, window)
    number = checked_options(scale, inputs.dim, 1.0, "exact")
    rows, seed = whole("rows", rows, 1), whole("seed", seed, 0)
    expected = (*inputs.leading, inputs.lengths[0], inputs.value_dim)
    checked_output("out", out, expected, query, inputs, "query")
    if inputs.traced or inputs.backend.is_traced([out]):
        raise PlanError("the call is traced, and rows can only be compared where values can be read")
    backend, xp = inputs.backend, inputs.backend.xp
    query, out, *rest = backend.values_of((query, out, *inputs.arrays[1:]))
    values = rest[inputs.views : 2 * inputs.views]
    chosen = np.random.default_rng(seed).permutation(inputs.lengths[0])[:rows]
    chosen = np.sort(chosen)
    index = _index(chosen, query, backend)
    arrays = (xp.take(query, index, axis=-2), *rest)
    if inputs.order.causal:
        arrays = _each_with_its_keys(inputs, arrays, chosen)
    dtype = backend.compute_dtype(query.dtype)
    truth, _, _ = backend.run(exact.forward, exact.ExactCall(number, inputs.views), arrays)
    if inputs.order.causal:
        truth = truth[..., 0, :]
    size: Array = 1.0
    for v, mask in zip(values, rest[2 * inputs.views :], strict=True):
        v = backend.cast(v, dtype)
        largest = xp.max(xp.abs(v if mask is None else xp.where(mask, v, 0.0)), axis=-2, keepdims=True)
        size = size * largest
    difference = xp.abs(backend.cast(xp.take(out, index, axis=-2), dtype) - truth)
    relative = difference / xp.where(size > 0, size, 1.0)
    largest, mean = float(xp.max(relative)), float(xp.mean(relative))
    if not isfinite(mean):
        # Which argument is to blame is worth a look only now.
        checked_finite(ranges(RangeCall(number, inputs.views), backend, (query, *rest)).largest, inputs.views)
    return largest, mean


def _each_with_its_keys(inputs: Inputs, arrays: Sequence[Array | None], chosen: np.ndarray) -> tuple[Any, ...]:
    """Query rows (..., rows, 1, d), each a problem with masks (..., rows, n_μ, 1) of the keys that the row of this number sees."""
    backend, m = inputs.backend, inputs.views
    apart: list[Any] = [arrays[0][..., None, :]]  # type: ignore[index]
    apart += [a[..., None, :, :] for a in arrays[1 : 1 + 2 * m]]  # type: ignore[index]
    for view, (length, mask) in enumerate(zip(inputs.lengths[1:], arrays[1 + 2 * m :], strict=True)):
        behind = (chosen + length - inputs.lengths[0])[:, None] - np.arange(length)
        window = length if inputs.order.window is None else inputs.order.window[view]
        seen = _index((behind >= 0) & (behind < window), arrays[0], backend)[..., None] > 0
        apart.append(seen if mask is None else seen & mask[..., None, :, :])
    return tuple(apart)


def sampled_errors(inputs: Inputs, calls: Sequence[BandedCall]) -> Iterator[np.ndarray]:
    """Bounds of some rows, (problems, rows) for each call, as if sampled rows were all there are."""
    m = inputs.views
    rng = np.random.default_rng(0)
    total = int(np.prod(inputs.leading, dtype=np.int64))
    problems = rng.permutation(total)[:4]
    arrays: list[Any] = []
    rows = []
    for n in inputs.lengths:
        # A sixteenth of all rows at most, unless there are few.
        size = max(256, min(2048, n * total // (16 * len(problems))))
        rows.append(np.sort(rng.permutation(n)[:size]))
    for i, array in enumerate(inputs.arrays):
        if array is None:
            arrays.append(None)
            continue
        taken = _rows_of(array, rows[0 if i == 0 else 1 + (i - 1) % m], problems, inputs=inputs, backend=inputs.backend)
        arrays.append(taken > 0 if i > 2 * m else taken if inputs.dtype == "float64" else taken.astype(np.float32))
    for call in calls:
        yield numpy_backend.run(banded.forward, call, arrays)[2][..., ERROR]


def _sampled_scores(inputs: Inputs, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores (queries, pairs) in float64 and which of the pairs are not masked."""
    backend: Backend = inputs.backend
    m = inputs.views
    rng = np.random.default_rng(0)
    leading = int(np.prod(inputs.leading, dtype=np.int64))
    problems = rng.permutation(leading)[:8]
    queries, side = max(1, _QUERIES // len(problems)), max(4, round(_PAIRS ** (1 / m) / 4))
    rows = [np.sort(rng.permutation(n)[: (queries if i == 0 else side)]) for i, n in enumerate(inputs.lengths)]
    take = partial(_rows_of, inputs=inputs, backend=backend)
    q = take(inputs.arrays[0], rows[0], problems)
    total, present = q[:, :, None, :] * scale, None
    for i in range(m):
        k = take(inputs.arrays[1 + i], rows[1 + i], problems)
        mask = inputs.arrays[1 + 2 * m + i]
        seen = np.ones((len(problems), k.shape[-2]), bool)
        if mask is not None:
            seen = take(mask, rows[1 + i], problems)[..., 0] > 0
        present = seen if present is None else (present[:, :, None] & seen[:, None, :]).reshape(len(problems), -1)
        if i < m - 1:
            total = (total[:, :, :, None, :] * k[:, None, None]).reshape(*total.shape[:2], -1, q.shape[-1])
        else:
            total = np.einsum("pijc,pkc->pijk", total, k).reshape(*total.shape[:2], -1)
    assert present is not None
    flat = np.broadcast_to(present[:, None, :], total.shape)
    return total.reshape(-1, total.shape[-1]), flat.reshape(-1, total.shape[-1])


def _rows_of(array: Any, rows: np.ndarray, problems: np.ndarray, *, inputs: Inputs, backend: Backend) -> np.ndarray:
    """Some rows of an array in some problems, as NumPy float64: (problems, rows, k)."""
    taken = backend.xp.take(array, _index(rows, array, backend), axis=-2)
    moved = backend.to_numpy(taken)
    wide = np.broadcast_to(moved, (*inputs.leading, *moved.shape[-2:]))
    chosen = np.stack([wide[np.unravel_index(p, inputs.leading)] for p in problems]) if inputs.leading else wide[None]
    return np.asarray(chosen, dtype=np.float64)


def _index(rows: np.ndarray, like: Any, backend: Backend) -> Array:
    """Row numbers as an array on the device of `like`."""
    return backend.indices(rows, like)


def _fitted(scores: np.ndarray, present: np.ndarray, degree: int, bound: float, held: float) -> tuple[float, ...]:
    """Least squares fit of exp to the scores seen; `held` weighs points over the whole range, seen or not."""
    x = scores[present]
    x = x[:: max(1, x.size // 20_000)]
    points = np.concatenate([x, np.linspace(-bound, bound, 64)])
    weights = np.concatenate([np.ones(x.size), np.full(64, held)])
    basis = np.polynomial.chebyshev.chebvander(points / bound, degree)
    solution = np.linalg.lstsq(basis * weights[:, None], np.exp(points) * weights, rcond=None)[0]
    coefficients = np.polynomial.chebyshev.cheb2poly(solution)
    coefficients = np.concatenate([coefficients, np.zeros(degree + 1 - coefficients.size)]) / bound ** np.arange(
        degree + 1
    )
    return tuple(float(c) for c in coefficients)


def _row_errors(scores: np.ndarray, present: np.ndarray, coefficients: Sequence[float]) -> tuple[float, float]:
    """Largest Σ |P/ΣP − softmax| over the rows, and the same for the gradient, in the units of Plan."""
    some = present.any(axis=-1)
    if not some.any():
        return 0.0, 0.0
    x, seen = scores[some], present[some]
    soft = np.where(seen, np.exp(x - x.max(axis=-1, keepdims=True)), 0.0)
    soft /= soft.sum(axis=-1, keepdims=True)
    c = np.asarray(coefficients)
    value = np.where(seen, np.polynomial.polynomial.polyval(x, c), 0.0)
    slope = np.where(seen, np.polynomial.polynomial.polyval(x, np.polynomial.polynomial.polyder(c)), 0.0)
    total = value.sum(axis=-1, keepdims=True)
    if not (total > 0).all():
        return inf, inf
    error = np.abs(value / total - soft).sum(axis=-1)
    tilt = np.abs(slope / total - soft).sum(axis=-1)
    return float(error.max()), float((2 * tilt + error).max())
