"""Passes over all rows."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from ...operations import Rows
from ..loading import loaded
from .problems import Spread, Work, together


def sum_rows(rows: Rows, x: np.ndarray, z: np.ndarray, spread: Spread) -> np.ndarray:
    """The operation `sum_rows` for NumPy arrays."""
    return over_rows(rows._replace(read=0), (x, z, None), spread)[0]


def read_rows(rows: Rows, x: np.ndarray, matrix: np.ndarray, spread: Spread) -> np.ndarray:
    """The operation `read_rows` for NumPy arrays."""
    return over_rows(rows._replace(read=rows.columns), (x, None, matrix), spread)[1]


def sum_and_pull(
    rows: Rows, x: np.ndarray, z: np.ndarray, matrix: np.ndarray, spread: Spread
) -> tuple[np.ndarray, np.ndarray]:
    """The operation `sum_and_pull` for NumPy arrays."""
    sums, _, gradient = over_rows(rows._replace(read=0), (x, z, matrix), spread)
    return sums, gradient


def read_and_pull(
    rows: Rows, x: np.ndarray, z: np.ndarray, matrix: np.ndarray, spread: Spread
) -> tuple[np.ndarray, np.ndarray]:
    """The operation `read_and_pull` for NumPy arrays."""
    _, found, gradient = over_rows(rows, (x, z, matrix), spread)
    return found, gradient


ROW_OPERATIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (sum_rows, read_rows, sum_and_pull, read_and_pull)
}


def over_rows(
    rows: Rows, arrays: tuple[np.ndarray, np.ndarray | None, np.ndarray | None], spread: Spread
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of (x, z, M): Φ(x)ᵀ z, unless columns are read, these of Φ(x) M, and the gradient where there are both z and M."""
    loops, (x, z, matrix) = loaded()[0].rows, arrays
    *_, n, dim = x.shape
    leading = np.broadcast_shapes(*(a.shape[:-2] for a in (x, z, matrix) if a is not None))
    problems, dtype = prod(leading), x.dtype
    whole = -(-rows.columns // loops.COLUMNS) * loops.COLUMNS, -(-rows.rank // loops.FEW) * loops.FEW
    summed, pulled = z is not None and not rows.read, z is not None and matrix is not None
    m = np.zeros((problems, *whole) if matrix is not None else (problems, 0, 0), dtype)
    if matrix is not None:
        m[:, : rows.columns, : rows.rank] = np.swapaxes(together(matrix, leading), -1, -2)
    given = np.empty((problems, n, 0), dtype) if z is None else together(z, leading)
    sums = np.zeros((problems, *whole) if summed else (problems, 0, 0), dtype)
    out, gradient = np.empty((problems, n, rows.read), dtype), np.empty((problems, n, dim if pulled else 0), dtype)
    own = together(x, leading)

    def compute(p: slice, _: slice) -> None:
        loops.compute(own[p], given[p], m[p], rows.runs, sums[p], out[p], gradient[p])

    spread(compute, Work(problems, 1, 0, float(n * prod(whole))))
    sums = np.swapaxes(sums[:, : rows.columns, : rows.rank], -1, -2)
    found, read, pulled_back = (a.reshape(*leading, *a.shape[1:]) for a in (sums, out, gradient))
    return found, read, pulled_back
