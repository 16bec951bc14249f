"""Tuples of keys, of the exact method."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from ...operations import Tuples
from ..loading import loops_over_tuples
from .problems import together


def attend_tuples(
    tuples: Tuples, s: np.ndarray, left: Sequence[Any] | None, right: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray | None]:
    """The operation `attend_tuples` for NumPy arrays."""
    (s,), sides, settings, leading = _of_sides(tuples, (s,), *_longer_behind(left, right))
    problems, _, n = s.shape
    total = np.empty((problems, right[1].shape[-2], n), s.dtype)
    top = np.empty((problems, 0 if tuples.bounded else 1, n), s.dtype)
    loops_over_tuples().attend(s, *sides, *settings, total, top)
    return total.reshape(*leading, *total.shape[1:]), None if tuples.bounded else top.reshape(*leading, 1, n)


def pull_tuples(
    tuples: Tuples,
    s: np.ndarray,
    h: np.ndarray,
    shift: np.ndarray | None,
    left: Sequence[Any] | None,
    right: Sequence[Any],
) -> tuple[Any, ...]:
    """The operation `pull_tuples` for NumPy arrays."""
    rows = (s, h) if shift is None else (s, h, shift)
    first, last = _longer_behind(left, right)
    (s, h, *less), sides, settings, leading = _of_sides(tuples, rows, first, last)
    (shift,) = less or [np.empty((len(s), 0, s.shape[-1]), s.dtype)]
    ds, of_sides = np.empty_like(s), []
    for keys, values in sides:
        of_values = np.zeros((len(s), tuples.columns, values.shape[-1]), s.dtype)
        of_sides.append((np.zeros_like(keys), of_values))
    loops_over_tuples().pull(s, h, shift, *sides, *settings, ds, *of_sides)
    found = [tuple(x.reshape(*leading, *x.shape[1:]) for x in own) for own in ((ds,), *of_sides)]
    of_left, of_right = found[1:] if last is right else found[:0:-1]
    return *found[0], None if left is None else of_left, of_right


def _longer_behind(left: Sequence[Any] | None, right: Sequence[Any]) -> tuple[Sequence[Any] | None, Sequence[Any]]:
    """Both sides, the longer one behind: loops run over that, and sums of its gradients have a term for each of the other."""
    return (right, left) if left is not None and left[0].shape[-1] > right[0].shape[-1] else (left, right)


def _of_sides(tuples: Tuples, rows: Sequence[np.ndarray], left: Sequence[Any] | None, right: Sequence[Any]) -> Any:
    """Rows (..., k, n) as (P, k, n); keys and values of both sides, the left a one if there is none; which are seen, (P, N) or
    (P, 0); settings of the loops; and leading dimensions.
    """
    loops, dtype = loops_over_tuples(), rows[0].dtype
    shapes = {x.shape[:-2] for x in (*rows, *(left or ()), *right) if x is not None}
    leading = np.broadcast_shapes(*shapes) if len(shapes) > 1 else shapes.pop()
    problems = prod(leading)
    of_sides, seen = [], []
    for side in (left, right):
        if side is None:
            of_sides.append(tuple(np.ones((problems, x.shape[-2], 1), dtype) for x in right[:2]))
        else:
            of_sides.append(tuple(together(x, leading) for x in side[:2]))
        hidden = None if side is None else side[2]
        seen.append(np.empty((problems, 0), np.bool_) if hidden is None else together(hidden, leading)[:, 0])
    half = rows[0].shape[-2] // 2 if tuples.paired and left is not None else 0
    lanes = loops.ONCE if rows[0].shape[-1] <= loops.LANES else loops.TWICE
    own = [together(x, leading) for x in rows]
    return own, of_sides, (tuple(seen), half, lanes, loops.exponents(dtype)), leading
