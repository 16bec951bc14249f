"""Empty batches: the arrays of a call with one problem of zeros where there was none, and results without it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

from .backends import Array, Backend, backend_of


class Filled(NamedTuple):
    """Query, keys, values, masks and weights with no empty dimension in the batch, and which were, counted from its last."""

    given: tuple[Any, Any, Any, Any, Any]
    empty: tuple[int, ...]

    def emptied(self, results: Sequence[Array]) -> tuple[Array, ...]:
        """Results (..., n, k) of the call without the problems that were put in."""
        return tuple(self._without(x) for x in results)

    def _without(self, array: Array) -> Array:
        for place in self.empty:
            axis = array.ndim - 3 - place
            if axis >= 0:
                array = array[(*(slice(None),) * axis, slice(0, 0), ...)]
        return array


def filled_batch(given: tuple[Any, Any, Any, Any, Any]) -> Filled | None:
    """The arrays (..., n, d), masks and weights (..., n), of an empty batch with a batch of one.

    None for others, and what are no arrays.
    """
    query, keys, values, masks, weights = given
    several = [x for x in (keys, values, masks, weights) if isinstance(x, (list, tuple))]
    if not any(0 in _shape(x) for x in (query, *chain.from_iterable(several))):
        return None
    empty: set[int] = set()

    def fill(array: Any, own: int) -> Any:
        found = _empty(array, own)
        empty.update(found)
        backend = backend_of(array)
        if backend is not None:
            for place in found:
                array = _one_more(array, array.ndim - own - 1 - place, backend)
        return array

    def each(arrays: Any, own: int) -> Any:
        if isinstance(arrays, (list, tuple)):
            return [fill(a, own) for a in arrays]
        # One for all views.
        return fill(arrays, own) if backend_of(arrays) is not None else arrays

    filled = (fill(query, 2), each(keys, 2), each(values, 2), each(masks, 1), each(weights, 1))
    return Filled(filled, tuple(empty)) if empty else None


def _shape(array: Any) -> tuple[Any, ...]:
    """The shape of an array; () of what has none, or will not tell."""
    try:
        shape = getattr(array, "shape", ())
    except RuntimeError:
        return ()
    return tuple(shape) if isinstance(shape, tuple) else ()


def _empty(array: Any, own: int) -> list[int]:
    """Empty dimensions before the last `own`, counted from the last of them."""
    shape = _shape(array)
    batch = shape[: max(0, len(shape) - own)]
    return [place for place, length in enumerate(reversed(batch)) if length == 0]


def _one_more(array: Array, axis: int, backend: Backend) -> Array:
    """The array with one entry of zeros along an axis of length 0; its gradient is the empty one."""
    xp = backend.xp
    with backend.on_device_of(array):
        shape = (*array.shape[:axis], 1, *array.shape[axis + 1 :])
        zeros = xp.zeros(shape, dtype=array.dtype, device=backend.device(array))
        return xp.concat([array, zeros], axis=axis)
