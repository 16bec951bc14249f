"""What tensor attention must satisfy whatever the numbers, by every method."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import COMPLEX, METHODS
from hypothesis import given
from hypothesis import strategies as st
from reference import score_by_score, through_features, value_sizes

import tattn

WAYS = {**METHODS, **{f"complex {name}": way for name, way in COMPLEX.items()}}
methods = pytest.mark.parametrize("method", list(WAYS))
Arrays = tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]


@st.composite
def calls(draw: st.DrawFn) -> Arrays:
    """(query, keys, values) of any order up to 4, of any small shape, scores up to 1."""
    views, dim, value_dim = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    lengths = [draw(st.integers(1, 9)) for _ in range(views + 1)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    arrays = [rng.uniform(-1, 1, (n, dim)) for n in lengths]
    return arrays[0], arrays[1:], [rng.normal(size=(n, value_dim)) for n in lengths[1:]]


def plan_of(method: str, q: np.ndarray, keys: Any, bound: float = 1.0) -> tattn.Plan:
    lengths = [len(x) for x in (q, *keys)]
    return WAYS[method].plan(n=lengths, dim=q.shape[-1], order=len(lengths), bound=bound)


def channels(method: str, *rows: np.ndarray) -> list[np.ndarray]:
    """The rows, or complex ones made of them row by row: moduli as large or little larger, and those of ones are one."""
    if not method.startswith("complex"):
        return list(rows)
    return [np.concatenate([x, (x - x[:, ::-1]) / 4], axis=-1) for x in rows]


def attend(q: np.ndarray, keys: Any, values: Any, method: str, **options: Any) -> np.ndarray:
    q, *keys = channels(method, q, *keys)
    return tattn.tensor_attention(q, keys, values, plan=plan_of(method, q, keys), **options)


of_scores = pytest.mark.parametrize("method", [name for name, way in WAYS.items() if way.of_scores])


def close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


@methods
@given(call=calls())
def test_values_of_one_give_one(method: str, call: Arrays) -> None:
    q, keys, values = call
    close(attend(q, keys, [np.ones_like(v) for v in values], method), np.ones((len(q), values[0].shape[1])))


@methods
@given(call=calls(), seed=st.integers(0, 2**32))
def test_linear_in_each_value(method: str, call: Arrays, seed: int) -> None:
    q, keys, values = call
    other = np.random.default_rng(seed).normal(size=values[0].shape)
    mixed = attend(q, keys, [2 * values[0] - 3 * other, *values[1:]], method)
    close(mixed, 2 * attend(q, keys, values, method) - 3 * attend(q, keys, [other, *values[1:]], method))


@methods
@given(call=calls(), data=st.data())
def test_views_may_be_swapped(method: str, call: Arrays, data: st.DataObject) -> None:
    q, keys, values = call
    order = data.draw(st.permutations(range(len(keys))))
    close(attend(q, [keys[i] for i in order], [values[i] for i in order], method), attend(q, keys, values, method))


@methods
@given(call=calls(), seed=st.integers(0, 2**32))
def test_rows_may_be_permuted(method: str, call: Arrays, seed: int) -> None:
    """A key and its value together: nothing changes; query rows: the output follows."""
    q, keys, values = call
    rng = np.random.default_rng(seed)
    expected = attend(q, keys, values, method)
    rows, queries = rng.permutation(len(keys[0])), rng.permutation(len(q))
    got = attend(q[queries], [keys[0][rows], *keys[1:]], [values[0][rows], *values[1:]], method)
    close(got, expected[queries])


@methods
@given(call=calls())
def test_scale_moves_between_query_and_keys(method: str, call: Arrays) -> None:
    q, keys, values = call
    expected = attend(q, keys, values, method)
    close(attend(3 * q, [keys[0] / 3, *keys[1:]], values, method), expected)


@of_scores
@given(call=calls())
def test_a_view_of_ones_leaves_the_rest(method: str, call: Arrays) -> None:
    """Order 2 with one view of ones more is ordinary attention still."""
    q, keys, values = call
    ones = [np.ones((5, q.shape[1])), np.ones((5, values[0].shape[1]))]
    close(attend(q, [*keys, ones[0]], [*values, ones[1]], method), attend(q, keys, values, method))


@of_scores
@given(call=calls(), data=st.data())
def test_masked_rows_are_absent_rows(method: str, call: Arrays, data: st.DataObject) -> None:
    q, keys, values = call
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(keys[0]), max_size=len(keys[0]))))
    keep[0] = True
    masks = [keep, *(None for _ in keys[1:])]
    got = attend(q, keys, values, method, key_masks=masks)
    close(got, attend(q, [keys[0][keep], *keys[1:]], [values[0][keep], *values[1:]], method))


@given(call=calls(), degree=st.integers(1, 8))
def test_methods_differ_by_the_bound_at_most(call: Arrays, degree: int) -> None:
    q, keys, values = call
    plan = tattn.plan(q, keys, values, degree=degree)
    exact = attend(q, keys, values, "exact")
    for way in (through_features(plan), score_by_score(plan)):
        difference = np.abs(exact - tattn.tensor_attention(q, keys, values, plan=way))
        assert (difference <= (plan.error + 1e-12) * value_sizes(values)).all()


@methods
@given(call=calls(), seed=st.integers(0, 2**32))
def test_the_pullback_is_the_transpose(method: str, call: Arrays, seed: int) -> None:
    """⟨g, J t⟩ = ⟨Jᵀ g, t⟩, J t by finite differences."""
    q, keys, values = call
    rng = np.random.default_rng(seed)
    q, *keys = channels(method, q, *keys)
    plan = plan_of(method, q, keys, 1.1)
    arrays = [q, *keys, *values]
    tangents = [rng.normal(size=a.shape) for a in arrays]
    out, pullback = tattn.tensor_attention_vjp(q, keys, values, plan=plan)
    g = rng.normal(size=out.shape)
    dq, dk, dv = pullback(g)
    m, h = len(keys), 1e-5

    def moved(step: float) -> np.ndarray:
        a = [x + step * t for x, t in zip(arrays, tangents, strict=True)]
        return tattn.tensor_attention(a[0], a[1 : m + 1], a[m + 1 :], plan=plan)

    left = (g * (moved(h) - moved(-h)) / (2 * h)).sum()
    right = sum((a * t).sum() for a, t in zip((dq, *dk, *dv), tangents, strict=True))
    np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-7)
