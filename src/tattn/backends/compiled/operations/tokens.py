"""Tokens of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from ...operations import Token
from ..loading import loaded
from .problems import writable


def step(
    token: Token,
    query: np.ndarray,
    keys: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    sums: Sequence[np.ndarray],
    rests: Sequence[np.ndarray],
    decays: Sequence[Any] = (),
) -> Any:
    """The operation `step` for NumPy arrays."""
    *leading, n, dim = query.shape
    problems, views, value_dim, dtype = prod(leading), len(keys), values[0].shape[-1], query.dtype
    new = np.empty((views, 2, problems, len(token.w)), dtype)
    out, lse = np.empty((problems, n, value_dim), dtype), np.empty((problems, n), dtype)

    def both(arrays: Sequence[np.ndarray], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        # Always two of each, so that one function is compiled for one view and for two.
        first, last = arrays[0], arrays[-1]
        first = writable(first).reshape(shape)
        return first, first if views == 1 else writable(last).reshape(shape)

    loaded()[0].decoding.step(
        writable(query).reshape(problems, n, dim),
        both(keys, (problems, n, dim)),
        both(values, (problems, n, value_dim)),
        both(_factors(decays, query, views), (problems,)),
        token.of_query, token.of_keys, token.largest, token.w, token.runs,
        both(sums, (problems, -1)),
        both(rests, (problems, -1)),
        new, out, lse,
    )  # fmt: skip
    shape = (views, 2, *sums[0].shape)
    found = new.reshape(shape)
    return out.reshape(*leading, n, value_dim), lse.reshape(*leading, n), found[:, 0], found[:, 1]


def complex_step(
    token: Token,
    query: np.ndarray,
    keys: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    sums: Sequence[np.ndarray],
    rests: Sequence[np.ndarray],
    decays: Sequence[Any],
    turned: Sequence[np.ndarray],
) -> Any:
    """The operation `complex_step` for NumPy arrays."""
    loops, n, dtype = loaded()[0].decoding, query.shape[-2], query.dtype
    problems, shape = prod(query.shape[:-2]), turned[0].shape[-2:]
    rows = _rows(keys, values, _factors(decays, query, len(keys)))
    powers = np.zeros((problems, n))
    found = _taken_in(token, rows, (sums, rests), powers)
    combined, phi, room = np.zeros((problems, n, *shape), dtype), np.empty(shape[1], dtype), np.empty(shape, dtype)
    combined[..., : shape[1] // 2] = 1
    unit, most = dtype.type(token.of_keys), dtype.type(token.largest)
    new = [np.empty(x.shape, dtype) for x in turned]
    for row, old, after in zip(rows, turned, new, strict=True):
        both = (x.reshape(problems, *shape) for x in (writable(old), after))
        loops.take_in_complex(*row, unit, most, token.pairs, phi, room, *both, combined, powers)
    columns = shape[0]
    out, lse, part = (
        np.empty((problems, n, columns - 1), dtype),
        np.empty((problems, n), dtype),
        np.empty(columns, dtype),
    )
    q = writable(query).reshape(problems, n, -1)
    facts = dtype.type(token.of_query), most, token.pairs, token.w
    loops.read_complex(q, *facts, phi, combined, powers, part, out, lse)
    leading = query.shape[:-2]
    return out.reshape(*leading, n, columns - 1), lse.reshape(*leading, n), *found, new


def _factors(decays: Sequence[Any], query: np.ndarray, views: int) -> list[np.ndarray]:
    """What the sums of every view are multiplied by with each token, (P,), 1 where keys do not decay."""
    leading = query.shape[:-2]
    if not decays:
        return [_ones(prod(leading), query.dtype)] * views
    found = np.empty((views, *leading), query.dtype)
    for view, given in enumerate(decays):
        found[view, ...] = given
    return list(found.reshape(views, -1))


@lru_cache(maxsize=64)
def _ones(count: int, dtype: np.dtype) -> np.ndarray:
    """Factors that change nothing."""
    return np.ones(count, dtype)


def _rows(
    keys: Sequence[np.ndarray], values: Sequence[np.ndarray], factors: Sequence[np.ndarray]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Keys (P, n, d), values (P, n, dv) and factors (P,) of every view."""
    n, problems = keys[0].shape[-2], len(factors[0])
    rows = ([writable(x).reshape(problems, n, -1) for x in each] for each in (keys, values))
    return list(zip(*rows, factors, strict=True))


def _taken_in(
    token: Token, rows: Sequence[Any], before: Sequence[Any], powers: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Sums and rests of real monomials with keys and values."""
    loops = loaded()[0].decoding
    found: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for row, total, rest in zip(rows, *before, strict=True):
        problems, (r, columns), dtype = len(powers), total.shape[-2:], total.dtype
        phi, room, new = (np.empty(shape, dtype) for shape in (r, (3, r * columns), (2, problems, r * columns)))
        given = writable(total).reshape(problems, -1), writable(rest).reshape(problems, -1)
        unit, most = dtype.type(token.of_keys), dtype.type(token.largest)
        loops.take_in(*row, unit, most, token.runs, phi, room, *given, new[0], new[1], None, powers)
        for of_kind, x in zip(found, new, strict=True):
            of_kind.append(x.reshape(total.shape))
    return found
