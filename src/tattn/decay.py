"""Keys that count less, the further before a query row they stand: by a factor λ for every row, in causal calls.

A key of view μ that stands t rows before the last that a query row sees has the weight λ_μ^t, and 0^0 = 1. With λ = exp(−slope)
that is a bias −slope · t of the scores. Masks become weights, which have the leading dimensions of λ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .arrays import are_weights, sum_to_leading
from .backends import Array, Backend, backend_of
from .checks import Inputs, check_floating, check_library, checked_broadcast
from .engines.fading import at_its_end, faded
from .operands import View
from .weights import joined


class Decays(NamedTuple):
    """The factors of a call as they were given: an array (...), a number or None for each view."""

    given: tuple[Any, ...]

    def gradients(self, found: Sequence[Array], backend: Backend) -> tuple[Array | None, ...]:
        """Gradients of what was given, from those of factors (..., 1, 1); None for numbers and None."""
        some = [i for i, x in enumerate(self.given) if backend_of(x) is not None]
        arrays = [x for i in some for x in (found[i], self.given[i])]
        grads = iter(backend.run(_as_given, None, arrays) if some else ())
        return tuple(next(grads) if i in some else None for i in range(len(self.given)))


def with_decay(inputs: Inputs, decay: Any, reading: bool = True) -> tuple[Inputs, Decays]:
    """The inputs of a causal call, which have weights, with factors behind; TypeError or ValueError names what does not fit.

    `reading`: whether their values may be read; those that are none are NaN otherwise.
    """
    backend, m = inputs.backend, inputs.views
    check_rows_before(inputs.order.causal)
    query: Any = inputs.arrays[0]
    columns, leading = _checked_factors(decay, m, query, inputs.leading, backend)
    traced = inputs.traced or backend.is_traced(columns)
    if reading and not traced:
        values: Sequence[Array] = backend.values_of(columns)
        for i, x in enumerate(values):
            if 0 not in x.shape:
                for found in backend.read([backend.xp.min(x), backend.xp.max(x)]):
                    check_factor(f"decay[{i}]", float(found))
    masks = inputs.arrays[2 * m + 1 :]
    both = backend.run(_factors, m, (query, *columns, *masks))
    arrays = (*inputs.arrays[: 2 * m + 1], *both[m:], *both[:m])
    order = inputs.order._replace(decays=True)
    return inputs._replace(arrays=arrays, leading=leading, traced=traced, order=order), Decays(tuple(decay))


def factors_of(decay: Any, views: int, like: Array, leading: tuple[int, ...], backend: Backend) -> tuple[Array, ...]:
    """Factors (..., 1, 1) of every view for rows like these, whose values are not read: NaN where they are none.

    TypeError or ValueError names what does not fit, also beside the `leading` dimensions of the rows.
    """
    columns, _ = _checked_factors(decay, views, like, leading, backend)
    found: tuple[Array, ...] = backend.run(_columns, None, (like, *columns))
    return found


def at_the_end(view: View, decay: Array, backend: Backend) -> View:
    """A view with weights in the place of its mask, if it has one: what its rows weigh for the last of them."""
    return view._replace(mask=backend.run(_at_the_end, None, (*view, decay))[0])


def passed(rows: int, sums: Sequence[Array], decay: Array, backend: Backend) -> tuple[Array, Array]:
    """Sums of rows and their rests (..., r, k) as they are after so many further rows."""
    found: tuple[Array, Array] = backend.run(_passed, rows, (*sums, decay))
    return found


def _checked_factors(
    decay: Any, views: int, like: Array, leading: tuple[int, ...], backend: Backend
) -> tuple[list[Array], tuple[int, ...]]:
    """The factor of each view as an array (...), and the leading dimensions with these."""
    if not isinstance(decay, (list, tuple)):
        raise TypeError(
            f"decay should be a list or tuple of {views} factors, one for each view, got {type(decay).__name__}"
        )
    if len(decay) != views:
        raise ValueError(f"decay should have one factor for each of the {views} views, got {len(decay)}")
    dtype = backend.compute_dtype(like.dtype)
    named: list[tuple[str, Any]] = [("the arrays before", leading)]
    columns = []
    for i, x in enumerate(decay):
        name = f"decay[{i}]"
        if is_number(x):
            number = 1.0 if x is None else float(x)
            check_factor(name, number)
            with backend.on_device_of(like):
                columns.append(backend.xp.full((), number, dtype=dtype, device=backend.device(like)))
            continue
        check_library(name, x, backend)
        check_floating(name, x, like, backend)
        named.append((name, tuple(x.shape)))
        columns.append(x)
    return columns, checked_broadcast(named)


def check_rows_before(causal: bool) -> None:
    """ValueError for factors of a call that is not causal."""
    if not causal:
        raise ValueError("decay should come with causal=True, since it counts the rows before a row, got causal=False")


def is_number(factor: Any) -> bool:
    """Whether it is one factor for all problems, or None, and no array."""
    numbers = (int, float, np.integer, np.floating)
    return factor is None or (isinstance(factor, numbers) and not isinstance(factor, bool))


def check_factor(name: str, number: float) -> None:
    """ValueError unless it is from 0 to 1."""
    if not 0 <= number <= 1:
        raise ValueError(f"{name} should be from 0 to 1, a factor for each row, got {number:g}")


def _factors(views: int, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Factors (..., 1, 1) of each view in the dtype of the computation, NaN where they are none; and weights (..., n_μ, 1)."""
    query, *rest = arrays
    factors, masks = _columns(None, backend, (query, *rest[:views])), []
    for x, mask in zip(factors, rest[views:], strict=True):
        leading = np.broadcast_shapes(tuple(x.shape[:-2]), tuple(mask.shape[:-2]))  # type: ignore[union-attr]
        masks.append(backend.xp.broadcast_to(mask, (*leading, *mask.shape[-2:])))  # type: ignore[union-attr]
    return (*factors, *masks)


def _columns(_: None, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array, ...]:
    """Factors (..., 1, 1) in the dtype of the computation for the first of the arrays, NaN where they are none."""
    xp = backend.xp
    like, *given = arrays
    found = [backend.cast(x, backend.compute_dtype(like.dtype)) for x in given]  # type: ignore[union-attr]
    return tuple(xp.where((x >= 0) & (x <= 1), x, xp.nan)[..., None, None] for x in found)


def _at_the_end(_: None, backend: Backend, arrays: Sequence[Array | None]) -> tuple[Array]:
    """Weights (..., n, 1) of keys, values, mask or weights, and a factor (..., 1, 1)."""
    keys, values, mask, decay = arrays
    weights = joined(None, mask, keys, backend) if not are_weights(mask, backend) else mask
    view, _ = at_its_end(View(keys, values, weights), decay, backend)
    return (view.mask,)


def _passed(rows: int, backend: Backend, arrays: Sequence[Array]) -> tuple[Array, Array]:
    """Sums and rests times λ^rows; rests are constants."""
    total, rest, decay = arrays
    total, lost = faded((total, -rest), decay, rows, backend)
    (plain,) = backend.values_of((-lost,))
    return total, plain


def _as_given(_: None, backend: Backend, arrays: Sequence[Array]) -> tuple[Array, ...]:
    """Gradients in the shapes and dtypes of what was given, from those of factors, in turn."""
    return tuple(
        backend.cast(sum_to_leading(g, tuple(x.shape), backend), x.dtype)[..., 0, 0]
        for g, x in zip(arrays[::2], arrays[1::2], strict=True)
    )
