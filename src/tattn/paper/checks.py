"""Errors of products and of the training problem: matrices that do not fit, raised before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..backends import Backend
from ..checks import (
    check_floating,
    check_library,
    check_shape,
    checked_array,
    checked_factors,
    checked_leading,
    checked_length,
    factors,
    whole,
)

# Which lengths agree in the training problem: rows (-2) or columns (-1) of one matrix with those of another before it.
_AGREEING = (
    ("a4", -2, "a2", -2), ("a5", -2, "a3", -2), ("e", -2, "a1", -2),
    ("x1", -2, "a1", -1), ("x2", -2, "a2", -1), ("x3", -2, "a3", -1), ("y1", -2, "a4", -1), ("y2", -2, "a5", -1),
    ("x2", -1, "x1", -1), ("x3", -1, "x1", -1), ("y2", -1, "y1", -1), ("e", -1, "y1", -1),
)  # fmt: skip


_AXES = {-2: "rows", -1: "columns"}


def checked_problem(matrices: Mapping[str, Any]) -> Backend:
    """The backend of a training problem's matrices by name, a1 first; TypeError or ValueError names the matrix."""
    first = matrices["a1"]
    backend = checked_array("a1", first)
    for name, matrix in matrices.items():
        check_library(name, matrix, backend, like="a1")
        check_floating(name, matrix, first, backend, like="a1")
        check_shape(name, matrix)
    for name, axis, other, other_axis in _AGREEING:
        expected = matrices[other].shape[other_axis]
        if matrices[name].shape[axis] != expected:
            raise ValueError(
                f"{name} should have as many {_AXES[axis]} as {other} has {_AXES[other_axis]}, {expected}, "
                f"got shape {tuple(matrices[name].shape)}"
            )
    checked_leading(list(matrices.items()))
    return backend


def checked_upstream(upstream: Any, matrices: Mapping[str, Any], backend: Backend) -> None:
    """The gradient of a training problem's output: (..., n, dv), with leading dimensions that broadcast."""
    first, rows = matrices["a1"], tuple(matrices["e"].shape[-2:])
    check_library("upstream", upstream, backend, like="a1")
    check_floating("upstream", upstream, first, backend, like="a1")
    check_shape("upstream", upstream)
    if tuple(upstream.shape[-2:]) != rows:
        raise ValueError(f"upstream should have shape (..., {rows[0]}, {rows[1]}), got {tuple(upstream.shape)}")
    checked_leading([*matrices.items(), ("upstream", upstream)])


def checked_alike(matrices: Any, axis: int) -> Backend:
    """Backend of matrices with the same number of rows (axis −2) or columns (axis −1)."""
    named = factors("matrices", matrices)
    backend = checked_factors(named)
    for name, a, _ in named:
        checked_length(name, a, axis, matrices[0].shape[axis], "matrices[0]")
    return backend


def checked_pairs(left: Any, right: Any) -> Backend:
    """Backend of two lists of matrices: as many, the rows alike in each pair, the columns alike in each list."""
    named = factors("left", left), factors("right", right)
    if len(left) != len(right):
        raise ValueError(
            f"left and right should have the same number of arrays, got {len(left)} left and {len(right)} right"
        )
    backend = checked_factors([*named[0], *named[1]])
    for side in named:
        for name, a, _ in side:
            checked_length(name, a, -1, side[0][1].shape[-1], side[0][0])
    for (name, a, _), (other, b, _) in zip(*named, strict=True):
        checked_length(other, b, -2, a.shape[-2], name)
    return backend


def checked_shape(shape: Any) -> tuple[int, ...]:
    """A shape of at least one dimension, none of length 0."""
    if not isinstance(shape, (list, tuple)):
        raise TypeError(f"shape should be a list or tuple of whole numbers, got {type(shape).__name__}")
    if not shape:
        raise ValueError("shape should hold at least one whole number, got none")
    return tuple(whole(f"shape[{i}]", size, 1) for i, size in enumerate(shape))
