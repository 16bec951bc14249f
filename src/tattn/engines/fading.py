"""Powers of the factors by which keys count less, the further before a query row they stand.

A key that stands t rows before has the weight λ^t in its view, and 0^0 = 1.
"""

from __future__ import annotations

from ..arrays import sum_to_leading
from ..backends import Array, Backend
from ..operands import View
from .features import Sum, add


def powers(decay: Array, rows: Array, backend: Backend) -> Array:
    """λ^t for whole numbers t ≥ 0 of the dtype of λ, where both broadcast."""
    xp = backend.xp
    # 0^0 is not for libraries to say.
    return xp.where(rows == 0, xp.ones_like(rows), decay ** xp.where(rows == 0, xp.ones_like(rows), rows))


def slopes(decay: Array, rows: Array, backend: Backend) -> Array:
    """Derivatives t λ^(t − 1) of `powers`."""
    return rows * powers(decay, backend.xp.where(rows > 1, rows - 1, 0.0), backend)


def seen(rows: Array, decay: Array | None, backend: Backend) -> Array:
    """λ^t where a table has t rows from what is seen to what sees it, and 0 where it has −1; 1 in place of λ if that is None."""
    found = backend.cast(rows >= 0, rows.dtype)
    return found if decay is None else found * powers(decay, backend.xp.where(rows > 0, rows, 0.0), backend)


def seen_slopes(rows: Array, decay: Array, backend: Backend) -> Array:
    """Derivatives of `seen`."""
    return slopes(decay, backend.xp.where(rows > 0, rows, 0.0), backend)


def later(x: Array, decay: Array | None, rows: int, backend: Backend) -> Array:
    """The product x λ^rows; x as it is if λ is None."""
    return x if decay is None else x * powers(decay, backend.xp.full_like(decay, float(rows)), backend)


def later_slope(x: Array, gradient: Array, decay: Array, rows: int, backend: Backend) -> Array:
    """What `later` of x (..., i, j) gives to λ (..., 1, 1), from the gradient of its result."""
    slope = slopes(decay, backend.xp.full_like(decay, float(rows)), backend)
    return slope * of_factor(x * gradient, decay, backend)


def of_factor(x: Array, decay: Array, backend: Backend, axes: int = 2) -> Array:
    """The sum of x over its last axes, and over all leading dimensions that λ (..., 1, 1) lacks."""
    total = backend.xp.sum(x, axis=tuple(range(-axes, 0)))
    return sum_to_leading(total[..., None, None], decay.shape[:-2], backend)


def numbers(count: int, like: Array, backend: Backend, start: int = 0) -> Array:
    """Whole numbers from `start` on, (count,), of the dtype and on the device of an array."""
    return backend.xp.arange(start, start + count, dtype=like.dtype, device=backend.device(like))


def faded(carry: Sum, decay: Array, rows: int, backend: Backend) -> Sum:
    """A compensated sum times λ^rows, for λ (..., 1, 1)."""
    xp = backend.xp
    total, lost = carry
    factor = powers(decay, xp.full_like(decay, float(rows)), backend)
    # Close to 1 what is taken away is what is rounded: many blocks would lose a unit each otherwise.
    near = factor > 0.5
    less = xp.expm1(rows * xp.log(xp.where(near, decay, 1.0)))
    slow = add((total, lost * factor), total * less)
    return xp.where(near, slow[0], total * factor), xp.where(near, slow[1], lost * factor)


def at_its_end(view: View, decay: Array, backend: Backend) -> tuple[View, Array]:
    """A view whose rows (..., n, ·) weigh what they do for its last one, and how many rows before it they stand, (n, 1)."""
    xp = backend.xp
    before = xp.flip(numbers(view.keys.shape[-2], decay, backend), axis=0)[:, None]
    return view._replace(mask=view.mask * powers(decay, before, backend)), before
