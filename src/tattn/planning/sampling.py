"""What samples tell about a call: the range of its scores, a polynomial fitted to them, bounds of some rows.

Nothing here is a bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import inf, isfinite
from typing import Any, NamedTuple

import numpy as np

from ..approximation.exponential import minimax
from ..approximation.pruning import HIGHER, Pruned, Shells, smallest_pruned, weights_of, worthwhile
from ..arrays import are_weights
from ..backends import Array, Backend
from ..backends.numpy import BACKEND as numpy_backend
from ..checks import Inputs
from ..features.monomials import rank as rank_of
from ..methods import Call, forward
from ..operands import View

_QUERIES, _PAIRS = 64, 1 << 18
# How often a pruned basis that was chosen may turn out too small.
_TRIES = 6
# Of those, what a pruned basis is chosen by before it is measured on all.
_FEW_QUERIES, _FEW_PAIRS = 16, 1 << 10
# No polynomial that can be computed follows exp over a wider range.
_HOPELESS = 60.0


class Estimate(NamedTuple):
    """What was seen on sampled rows."""

    coefficients: tuple[float, ...]
    bound: float
    error: float
    grad_error: float
    pruned: Pruned | None = None


class Pruning(NamedTuple):
    """Which pruned bases to look at: of a rank up to `most`, also of the degrees in `higher`, with the `rounding` of each.

    `gradients`: whether their gradients have a limit too (`_pruned`).
    """

    higher: Sequence[int]
    most: float
    gradients: bool
    rounding: Callable[[Estimate], float]


def estimate(
    inputs: Inputs, scale: float, tol: float, degrees: Sequence[int], pruning: Pruning | None = None
) -> Estimate:
    """The least degree whose fitted polynomial keeps sampled rows within `tol`; the best degree if none does.

    Scores of sampled query rows with sampled rows of every view; the error is Σ |P/ΣP − softmax| of a row, which
    bounds the output's for any values, the largest seen over the rows. Where a pruned basis does as well with fewer monomials,
    and with the rounding that comes to its error, that.
    """
    sample = Sample.of(inputs, scale)
    best = _of_least_degree(sample, tol, degrees)
    if pruning is None:
        return best
    whole, below = best, pruning.most + 1
    if best.error <= tol:
        below = min(below, worthwhile(rank_of(inputs.dim, len(best.coefficients) - 1), inputs.value_dim))
    elif best.error < inf:
        whole = _of_least_degree(sample, tol, pruning.higher)
    found = _pruned(sample, whole, tol, below, pruning) if whole.error <= tol and below > 1 else None
    return found or best


def _of_least_degree(sample: Sample, tol: float, degrees: Sequence[int]) -> Estimate:
    """`estimate` with whole bases."""
    scores, present = sample.scores(), sample.present
    seen = np.abs(scores[present])
    if not seen.size:
        # Masks left nothing of the sample: nothing is known.
        return Estimate((1.0, 1.0), 1e-3, inf, inf)
    # A tenth above the largest score seen, for those that were not.
    bound = 1.1 * float(seen.max()) if seen.max() > 0 else 1e-3
    if bound > _HOPELESS:
        return Estimate((1.0, 1.0), bound, inf, inf)
    best: Estimate | None = None
    for degree in degrees:
        fits = [_fitted(scores, present, degree, bound, held) for held in (0.0, 1e-2, 1.0)]
        for coefficients in (*fits, minimax(degree, bound).coefficients):
            error, grad_error = _row_errors(scores, sample.weights, coefficients)
            if best is None or error < best.error:
                best = Estimate(tuple(coefficients), bound, error, grad_error)
        assert best is not None
        if best.error <= tol:
            return best
    assert best is not None
    return best


def sampled_errors(inputs: Inputs, calls: Sequence[Call]) -> Iterator[np.ndarray]:
    """Bounds of some rows, (problems, rows) for each call, as if sampled rows were all there are."""
    operands = inputs.operands()
    rng = np.random.default_rng(0)
    total = int(np.prod(inputs.leading, dtype=np.int64))
    problems = rng.permutation(total)[:4]
    rows = []
    for n in inputs.lengths:
        # A sixteenth of all rows at most, unless there are few.
        size = max(256, min(2048, n * total // (16 * len(problems))))
        rows.append(np.sort(rng.permutation(n)[:size]))

    def taken(array: Array | None, rows: np.ndarray) -> Any:
        if array is None:
            return None
        found = _rows_of(array, rows, problems, inputs=inputs, backend=inputs.backend)
        return found if inputs.dtype == "float64" else found.astype(np.float32)

    def seen(mask: Array | None, rows: np.ndarray) -> Any:
        return taken(mask, rows) if are_weights(mask, inputs.backend) or mask is None else taken(mask, rows) > 0

    views = tuple(
        View(taken(k, some), taken(v, some), seen(mask, some))
        for (k, v, mask), some in zip(operands.views, rows[1:], strict=True)
    )
    arrays = operands._replace(query=taken(operands.query, rows[0]), views=views).flat()
    for call in calls:
        kept: np.ndarray = numpy_backend.run(forward, call, arrays)[2]
        yield np.asarray(call.method.row_errors(kept))


class Sample(NamedTuple):
    """Sampled rows of some problems, the query's times the scale, and what pairs (queries, pairs) weigh, 0 if they are masked.

    In float64; complex channels as such.
    """

    query: np.ndarray  # (problems, queries, d)
    keys: tuple[np.ndarray, ...]  # (problems, rows, d) each
    weights: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """Which pairs are not masked."""
        return self.weights > 0

    @classmethod
    def of(cls, inputs: Inputs, scale: float) -> Sample:
        """Drawn from the arrays of a call."""
        operands, m = inputs.operands(), inputs.views
        rng = np.random.default_rng(0)
        leading = int(np.prod(inputs.leading, dtype=np.int64))
        problems = rng.permutation(leading)[:8]
        queries, side = max(1, _QUERIES // len(problems)), max(4, round(_PAIRS ** (1 / m) / 4))
        rows = [np.sort(rng.permutation(n)[: (queries if i == 0 else side)]) for i, n in enumerate(inputs.lengths)]
        take = partial(_rows_of, inputs=inputs, backend=inputs.backend)
        q: Any = take(operands.query, rows[0], problems) * scale
        keys: list[Any] = [take(v.keys, some, problems) for v, some in zip(operands.views, rows[1:], strict=True)]
        if operands.paired:
            half = inputs.dim // 2
            q, *keys = (x[..., :half] + 1j * x[..., half:] for x in (q, *keys))
        weights = np.ones((len(problems), 1))
        for k, mask, some in zip(keys, operands.masks, rows[1:], strict=True):
            own = np.ones(k.shape[:2]) if mask is None else take(mask, some, problems)[..., 0]
            weights = (weights[:, :, None] * own[:, None, :]).reshape(len(problems), -1)
        shape = (len(problems), q.shape[1], weights.shape[-1])
        return cls(q, tuple(keys), np.broadcast_to(weights[:, None, :], shape).reshape(-1, shape[-1]))

    def scores(self, channels: slice | list[int] = slice(None)) -> np.ndarray:
        """Scores (queries, pairs), or what some of the channels add to them."""
        total = self.query[:, :, None, channels]
        *first, last = (k[..., channels] for k in self.keys)
        for k in first:
            total = (total[:, :, :, None, :] * k[:, None, None]).reshape(*total.shape[:2], -1, k.shape[-1])
        found = np.einsum("pijc,pkc->pijk", total, last)
        return np.asarray(found.reshape(-1, found.shape[-2] * found.shape[-1]).real)

    def fewer(self) -> Sample:
        """A few of the queries and of the rows, to choose by."""
        weights = self.weights.reshape(*self.query.shape[:2], *(k.shape[1] for k in self.keys))
        steps = (
            slice(None),
            *(slice(None, None, -(-n // most)) for n, most in zip(weights.shape[1:], self._few(), strict=True)),
        )
        query, *keys = (x[:, step] for x, step in zip((self.query, *self.keys), steps[1:], strict=True))
        return Sample(query, tuple(keys), weights[steps].reshape(query.shape[0] * query.shape[1], -1))

    def _few(self) -> tuple[int, ...]:
        return (
            max(1, _FEW_QUERIES // len(self.query)),
            *[max(2, round(_FEW_PAIRS ** (1 / len(self.keys))))] * len(self.keys),
        )

    def sizes(self) -> list[float]:
        """Root mean square of what every channel adds to a score."""
        found = np.prod([np.sqrt((np.abs(x) ** 2).mean(axis=(0, 1))) for x in (self.query, *self.keys)], axis=0)
        # Real and imaginary parts of a channel count alike.
        return [float(s) for s in found] * (1 + np.iscomplexobj(self.query))


def _pruned(sample: Sample, whole: Estimate, tol: float, below: float, pruning: Pruning) -> Estimate | None:
    """The smallest pruned basis that keeps sampled rows within `tol`, fitted; None if there is none worth it.

    If gradients are asked for, their error may be as large as that of the whole basis would be at an error of just `tol`.
    """
    degree = len(whole.coefficients) - 1
    allowed = max(whole.grad_error, whole.grad_error / max(whole.error, 1e-300) * tol) if pruning.gradients else inf
    few = sample.fewer()

    def measured(pruned: Pruned, sample: Sample) -> Estimate:
        coefficients, error, grad_error = _of_kept(sample, pruned)
        return Estimate(coefficients, whole.bound, error, grad_error, pruned)

    def meets(found: Estimate, share: float, share_grad: float) -> bool:
        return found.error + pruning.rounding(found) <= share * tol and found.grad_error <= share_grad * allowed

    degrees, sizes = range(degree, degree + HIGHER + 1), sample.sizes()
    share = share_grad = 1.0
    for _ in range(_TRIES):
        shares = share, share_grad
        accept: Callable[[Pruned], bool] = partial(lambda shares, p: meets(measured(p, few), *shares), shares)
        chosen = smallest_pruned(sizes, degrees, below, accept)
        if chosen is None:
            return None
        found = measured(chosen, sample)
        if meets(found, 1.0, 1.0):
            return found
        # More rows show more: by about as much the choice has to be stricter.
        share *= min(1.0, max(0.5, 0.95 * tol / (found.error + pruning.rounding(found))))
        share_grad *= min(1.0, max(0.5, 0.95 * allowed / found.grad_error)) if isfinite(allowed) else 1.0
    return None


def _of_kept(sample: Sample, pruned: Pruned) -> tuple[tuple[float, ...], float, float]:
    """Coefficients fitted to exp on the scores of a sample, and (error, grad_error) of what a pruned basis keeps."""
    weights = weights_of(pruned.grading)
    of_channels = pruned.grading[: sample.query.shape[-1]]
    sums = [sample.scores([c for c, own in enumerate(of_channels) if own == k]) for k in weights]
    some = sample.present.any(axis=-1)
    coefficients = _fitted_to_kept([x[sample.present] for x in sums], pruned)
    error = grad_error = 0.0
    # Row by row: by plain and weighted degree there are many numbers to a score.
    for row in np.nonzero(some)[0]:
        present = sample.present[row]
        own, of_pairs = [x[row, present] for x in sums], sample.weights[row, present]
        shells = Shells(pruned.grading, pruned.degree, own)
        soft = of_pairs * np.exp(sum(own) - np.max(sum(own)))
        soft /= soft.sum()
        value = of_pairs * _combined(coefficients, shells.powers())
        total = value.sum()
        if not total > 0:
            return coefficients, inf, inf
        found = float(np.abs(value / total - soft).sum())
        slopes = [of_pairs * _combined(coefficients, shells.slopes(k)) for k in weights]
        tilts = [np.abs(slope / total - soft).sum() for slope in slopes]
        error, grad_error = max(error, found), max(grad_error, 2 * float(max(tilts)) + found)
    return coefficients, error, grad_error


def _fitted_to_kept(sums: Sequence[np.ndarray], pruned: Pruned) -> tuple[float, ...]:
    """Least squares fit of what is kept to exp, on sums of the channels of each weight (points,)."""
    step = max(1, sums[0].size // 20_000)
    points = [x[::step] for x in sums]
    powers = [np.ones(points[0].size) * x for x in Shells(pruned.grading, pruned.degree, points).powers()]
    # They differ by orders of magnitude.
    sizes = [float(np.sqrt((x * x).mean())) or 1.0 for x in powers]
    columns = np.stack([x / size for x, size in zip(powers, sizes, strict=True)], axis=1)
    solution = np.linalg.lstsq(columns, np.exp(sum(points)), rcond=None)[0]
    return tuple(float(c) / size for c, size in zip(solution, sizes, strict=True))


def _combined(coefficients: Sequence[float], powers: Sequence[Any]) -> Any:
    return sum(c * x for c, x in zip(coefficients, powers, strict=True))


def _rows_of(array: Any, rows: np.ndarray, problems: np.ndarray, *, inputs: Inputs, backend: Backend) -> np.ndarray:
    """Some rows of an array in some problems, as NumPy float64: (problems, rows, k)."""
    with backend.on_device_of(array):
        moved = backend.to_numpy(backend.xp.take(array, backend.indices(rows, array), axis=-2))
    wide = np.broadcast_to(moved, (*inputs.leading, *moved.shape[-2:]))
    chosen = np.stack([wide[np.unravel_index(p, inputs.leading)] for p in problems]) if inputs.leading else wide[None]
    return np.asarray(chosen, dtype=np.float64)


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


def _row_errors(scores: np.ndarray, weights: np.ndarray, coefficients: Sequence[float]) -> tuple[float, float]:
    """Largest Σ |P/ΣP − softmax| over the rows, and the same for the gradient, in the units of Plan; 0 weighs what is masked."""
    some = (weights > 0).any(axis=-1)
    if not some.any():
        return 0.0, 0.0
    x, weights = scores[some], weights[some]
    soft = weights * np.exp(x - x.max(axis=-1, keepdims=True))
    soft /= soft.sum(axis=-1, keepdims=True)
    c = np.asarray(coefficients)
    value = weights * np.polynomial.polynomial.polyval(x, c)
    slope = weights * np.polynomial.polynomial.polyval(x, np.polynomial.polynomial.polyder(c))
    total = value.sum(axis=-1, keepdims=True)
    if not (total > 0).all():
        return inf, inf
    error = np.abs(value / total - soft).sum(axis=-1)
    tilt = np.abs(slope / total - soft).sum(axis=-1)
    return float(error.max()), float((2 * tilt + error).max())
