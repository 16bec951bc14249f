"""Documents of several rows each, where they stand."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from ...operations import Spans
from ..loading import loaded
from .problems import together, writable


def size_documents(spans: Spans, x: np.ndarray) -> np.ndarray:
    """The operation `size_documents` for NumPy arrays."""
    leading, (documents, sides), dim = x.shape[:-2], spans.begins.shape, x.shape[-1]
    tops = np.empty((prod(leading), documents, sides, dim), x.dtype)
    loaded()[0].rows.size(together(x, leading), spans.begins, spans.lengths, tops)
    return tops.reshape(*leading, documents, sides, dim)


def read_documents(spans: Spans, x: np.ndarray, z: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The operation `read_documents` for NumPy arrays."""
    leading, given = _of_documents(spans, x, z, units)
    # Rows of no document are 0.
    out = np.zeros((prod(leading), x.shape[-2] - z.shape[-2], z.shape[-1]), x.dtype)
    loaded()[0].rows.read(*given, out)
    return out.reshape(*leading, *out.shape[1:])


def pull_documents(
    spans: Spans, x: np.ndarray, z: np.ndarray, upstream: np.ndarray, units: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The operation `pull_documents` for NumPy arrays."""
    leading, (own, columns, *given) = _of_documents(spans, x, z, units)
    wanted = np.asarray(spans.wanted or [True] * (spans.begins.shape[1] - 1))
    dx, dz = np.zeros_like(own), np.zeros((*columns.shape[:-1], spans.read), x.dtype)
    loaded()[0].rows.pull(own, columns, together(upstream, leading), *given, wanted, dx, dz)
    return dx.reshape(*leading, *dx.shape[1:]), dz.reshape(*leading, *dz.shape[1:])


def _of_documents(spans: Spans, x: np.ndarray, z: np.ndarray, units: np.ndarray) -> tuple[tuple[int, ...], list[Any]]:
    """The leading shape, and what loops over documents take: rows and columns (P, N, ·), units (P, documents, m + 1, d)."""
    leading = np.broadcast_shapes(x.shape[:-2], z.shape[:-2], units.shape[:-3])
    w = np.zeros(-(-len(spans.w) // (few := loaded()[0].rows.FEW)) * few, x.dtype)
    w[: len(spans.w)] = spans.w
    shape = *spans.begins.shape, x.shape[-1]
    of_all = np.broadcast_to(units, (*leading, *shape)).reshape(prod(leading), *shape)
    rows = together(x, leading), together(z, leading)
    return leading, [*rows, w, spans.runs, spans.begins, spans.lengths, spans.counts, writable(of_all)]
