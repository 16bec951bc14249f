"""Rows cut into pieces of equal length, each of which loops hand on as one row."""

from __future__ import annotations

from ..backends import Array, Backend


def padded(x: Array | None, rows: int, backend: Backend) -> Array | None:
    """With rows of zeros behind, which none but they themselves see."""
    if x is None or x.shape[-2] == rows:
        return x
    *leading, n, k = x.shape
    pad = backend.xp.zeros((*leading, rows - n, k), dtype=x.dtype, device=backend.device(x))
    return backend.xp.concat([x, pad], axis=-2)


def in_pieces(x: Array | None, pieces: int, backend: Backend) -> Array | None:
    """(..., rows, k) → (..., pieces, rows / pieces · k): each piece as one row, which loops hand on whole."""
    if x is None:
        return None
    *leading, rows, k = x.shape
    return backend.xp.reshape(x, (*leading, pieces, rows // pieces * k))


def in_rows(x: Array | None, rows: int, like: Array | None, backend: Backend) -> Array | None:
    """All pieces as `rows` rows with the channels of `like`."""
    if x is None or like is None:
        return None
    return backend.xp.reshape(x, (*x.shape[:-2], rows, like.shape[-1]))


def backwards(x: Array | None, backend: Backend) -> Array | None:
    """Pieces from the last to the first."""
    return None if x is None else backend.xp.flip(x, axis=-2)
