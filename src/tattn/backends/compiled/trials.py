"""What every operation computes of a row of ones: whether its loops can be compiled, and are right."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from ..operations import OF_DOCUMENTS, OF_ROWS, OF_TUPLES, OF_WINDOWS, Documents, Prefix, Rows, Spans, Token, Tuples
from .loading import failed, told
from .operations.causal import prefix_pull, prefix_read
from .operations.documents import pull_documents, read_documents, size_documents
from .operations.problems import alone
from .operations.rows import ROW_OPERATIONS
from .operations.tokens import complex_step, step
from .operations.tuples import attend_tuples, pull_tuples
from .operations.windows import window_pull, window_read


@cache
def fails(operation: str, dtype: str) -> bool:
    """Whether an operation cannot be compiled, or computes something else than it should, for a row of ones."""
    try:
        ones = np.ones((1, 1, 1), dtype)
        block = Prefix(np.ones(1, dtype), np.empty((0, 4), np.int64), ones, [ones], [ones])
        zero = [(np.zeros_like(ones), np.zeros_like(ones))]
        if operation.startswith("complex"):
            found = _of_complex_numbers(operation, dtype)
        elif operation in OF_ROWS:
            found = _of_one_row(operation, ones)
        elif operation in OF_DOCUMENTS:
            found = _of_one_document(operation, ones)
        elif operation in OF_WINDOWS:
            found = _of_windows(operation, block)
        elif operation in OF_TUPLES:
            found = _of_two_tuples(operation, ones)
        elif operation == "step":
            sums = [np.zeros((1, 1, 2), dtype)]
            found = step(Token(np.ones(2, dtype), block.runs, 1.0, 1.0, 1.0), ones, [ones], [ones], sums, sums)[0]
        else:
            found = _of_prefix(operation, block, zero)
            found = found[1] if "read" in operation else found[1][2][0]
        if found != 1:
            raise ArithmeticError(f"{operation} of ones should be 1, got {found}")
    except Exception as error:
        failed[operation, dtype] = told(error)
        return True
    return False


def _of_complex_numbers(operation: str, dtype: str) -> Any:
    """What an operation computes of Re q a b = 1 for q = a = i, b = −1, or of its derivative by Im a, which is 1 as well."""
    q, b = (np.asarray([[x]], dtype) for x in ((0, 1), (-1, 0)))
    ones, runs = np.ones((1, 1, 1), dtype), np.asarray([[0, 1, 2, 0]], np.int64)
    w = np.asarray([0, 1, 0, -1], dtype)
    if operation == "complex_step":
        token = Token(w, np.asarray([[0, 1, 2, 0], [1, 2, 3, 0]], np.int64), 1.0, 1.0, 1.0, runs)
        real, turned = [np.zeros((1, 3, 2), dtype)] * 2, [np.zeros((1, 2, 4), dtype)] * 2
        out, lse, *_ = complex_step(token, q, [q, b], [ones, ones], real, real, (), turned)
        return out + lse
    block = Prefix(w, runs, q, [q, b], [ones, ones], 2)
    zeros = [np.zeros((1, 1, 4), dtype)] * 2
    found = _of_prefix(operation, block, [(x, x) for x in zeros])
    if "read" in operation:
        return found[1]
    of_a = found[1][1][0]
    return of_a[..., 1] - of_a[..., 0]


def _of_prefix(operation: str, block: Prefix, sums: Sequence[Any]) -> Any:
    """What an operation returns of a block with one row, for upstream 1; one document of it where that is asked for."""
    if operation.endswith("documents"):
        one, sides = np.ones((1, len(block.keys)), np.int64), 1 + len(block.keys)
        units = np.ones((1, 1, sides, block.q.shape[-1]), block.q.dtype)
        block, sums = block._replace(documents=Documents(np.zeros(1, np.int64), one[:, 0], one, units)), ()
    if "read" in operation:
        return prefix_read(block, sums, alone)
    return prefix_pull(block, [total for total, _ in sums], sums, np.ones_like(block.shares[0]), alone)


def _of_windows(operation: str, block: Prefix) -> Any:
    """What an operation computes of a window with one row, 1, and nothing else."""
    nothing = [np.zeros_like(block.q)]
    block = block._replace(keys=[*block.keys, *nothing], shares=[*block.shares, *nothing])
    if operation == "window_read":
        return window_read(block, [], alone)
    return window_pull(block, [], block.q, alone)[2][0]


def _of_one_row(operation: str, ones: np.ndarray) -> Any:
    """What an operation computes of 1 and x = 1: their mean, or their sum, 2, less its derivative, 1."""
    rows, both = Rows(2, 1, np.asarray([[0, 1, 2, 0]], np.int64), read=1), np.repeat(ones, 2, axis=-2)
    given = {"sum_rows": (ones,), "read_rows": (both / 2,)}.get(operation, (ones, both))
    found = ROW_OPERATIONS[operation](rows, ones, *given, alone)
    return np.sum(found[0]) - np.sum(found[1]) if isinstance(found, tuple) else np.mean(found)


def _of_one_document(operation: str, ones: np.ndarray) -> Any:
    """What an operation computes of one row of query, keys and values 1, and weights 1/2 of 1 and x."""
    one, w, runs = np.ones((1, 2), int), np.full(2, 0.5, ones.dtype), np.asarray([[0, 1, 2, 0]])
    spans = Spans(np.asarray([[0, 1]]), one, one, w, runs, 1, 1)
    x, units = np.concatenate([ones, ones], axis=-2), np.ones((1, 1, 2, 1), ones.dtype)
    if operation == "size_documents":
        return np.mean(size_documents(spans, x))
    if operation == "read_documents":
        return read_documents(spans, x, ones, units)
    dx, dz = pull_documents(spans, x, ones, ones, units)
    return np.sum(dx) * np.sum(dz)


def _of_two_tuples(operation: str, ones: np.ndarray) -> Any:
    """What an operation computes of scores 1 and 2: e^−1 and 1 of the first tuple and the second, less e^−1."""
    tuples, keys, both = Tuples(1, 2, 1, False), np.concatenate([ones, 2 * ones], axis=-1), np.repeat(ones, 2, axis=-1)
    if operation == "attend_tuples":
        total, top = attend_tuples(tuples, ones, None, (keys, both, None))
        return np.round(total - np.exp(-1) + top - 2, 5)
    ds, _, (dk, dv) = pull_tuples(tuples, ones, ones, 2 * ones, None, (keys, both, None))
    return np.round((ds - 2 + np.sum(dk + dv, axis=-1) - 2) / 3 - np.exp(-1) + 1, 5)
