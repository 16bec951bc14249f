"""Summaries of pieces against the call that sees everything, on every library."""

from __future__ import annotations

import json
import operator
import pickle
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from functools import reduce
from math import log, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import Call, draw
from numpy.polynomial.polynomial import polyval
from reference import changed, dense, value_sizes
from watching import calls_of

import tattn
from tattn.state.sums import sum_rows

PLANS = {m: tattn.plan_for(n=9, dim=3, order=m + 1, bound=1.0, degree=4, dtype="float64") for m in (1, 2, 3)}
SINGLE = tattn.plan_for(n=9, dim=3, bound=1.0, degree=4)

CASES = [
    pytest.param({"views": m, "masked": several, "broadcast": several}, id=f"{m} views{' masked broadcast' * several}")
    for m, several in ((1, False), (2, False), (3, True))
]


def drawn(case: dict[str, Any]) -> Call:
    """A call whose views have 6, 6 and 4 rows: few lengths of pieces, and few programs to compile."""
    call = draw(**case)
    masks = call.masks and [None if m is None else m[..., :6] for m in call.masks]
    return call._replace(
        keys=[k[..., :6, :] for k in call.keys], values=[v[..., :6, :] for v in call.values], masks=masks
    )


def pieces(
    call: Call, rng: np.random.Generator
) -> list[tuple[list[np.ndarray | None], list[np.ndarray | None], list[np.ndarray | None]]]:
    """Every view cut at random into pieces of two, four and what remains, which are put side by side in random order."""
    masks = call.masks or [None] * len(call.keys)
    columns = []
    for k, v, mask in zip(call.keys, call.values, masks, strict=True):
        cuts, start = [], 0
        while start < k.shape[-2]:
            stop = start + 2 * int(rng.integers(1, 3))
            rows = slice(start, stop)
            cuts.append((k[..., rows, :], v[..., rows, :], None if mask is None else mask[..., rows]))
            start = stop
        columns.append([cuts[i] for i in rng.permutation(len(cuts))])
    length = max(map(len, columns))
    rounds = [[c[i] if i < len(c) else (None, None, None) for c in columns] for i in range(length)]
    return [tuple(map(list, zip(*one, strict=True))) for one in rounds]  # type: ignore[misc]


def summary_of(library: Any, call: Call, plan: tattn.Plan, **options: Any) -> tattn.Summary:
    keys, values = library.arrays(call.keys, call.values)
    masks = None if call.masks is None else library.arrays(call.masks)
    return tattn.summarize(keys, values, plan, key_masks=masks, **options)


def arrays_of(library: Any, summary: tattn.Summary) -> list[np.ndarray]:
    """Sums and rests, by value."""
    return [library.numpy(a).copy() for a in (*summary.sums, *summary.rests)]


def value_of(library: Any, summary: tattn.Summary) -> list[np.ndarray]:
    """Sums with their rests."""
    return [
        np.float64(library.numpy(s)) + np.float64(library.numpy(r))
        for s, r in zip(summary.sums, summary.rests, strict=True)
    ]


def close(library: Any, got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(library.numpy(got), library.numpy(expected), rtol=tolerance, atol=tolerance)


def same_summary(library: Any, a: tattn.Summary, b: tattn.Summary) -> None:
    for x, y in zip(arrays_of(library, a), arrays_of(library, b), strict=True):
        assert np.array_equal(x, y)


# What a summary is.


@pytest.mark.parametrize("case", CASES)
@pytest.mark.grid
def test_any_pieces_in_any_order_are_the_whole_call(library: Any, case: dict[str, Any]) -> None:
    call, plan = drawn(case), PLANS[case["views"]]
    rng = np.random.default_rng(5)
    query = library.array(call.query)
    masks = None if call.masks is None else library.arrays(call.masks)
    expected = tattn.tensor_attention(
        query, *library.arrays(call.keys, call.values), plan=plan, key_masks=masks, return_lse=True
    )
    given = [library.arrays(*piece) for piece in pieces(call, rng)]
    parts = [tattn.summarize(keys, values, plan, key_masks=key_masks) for keys, values, key_masks in given]
    updated = parts[0]
    for keys, values, key_masks in given[1:]:
        updated = updated.update(keys, values, key_masks)
    for summary in (reduce(operator.add, parts), updated):
        got = summary.attend(query, return_lse=True)
        for a, b in zip(got, expected, strict=True):
            assert library.is_array(a)
            assert (tuple(a.shape), a.dtype, library.device(a)) == (tuple(b.shape), b.dtype, library.device(b))
            close(library, a, b, 1e-13)
        close(library, summary.attend(query), got[0], 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_device_and_library_are_kept(library: Any, dtype: str) -> None:
    call, plan = draw(2), changed(SINGLE, dtype=dtype)
    query, keys, values = library.arrays(
        call.query.astype(dtype), [k.astype(dtype) for k in call.keys], [v.astype(dtype) for v in call.values]
    )
    summary = tattn.summarize(keys, values, plan)
    summary = summary + summary
    out, lse = summary.attend(query, return_lse=True)
    for a in (*summary.sums, *summary.rests, *summary.counts, out, lse):
        assert library.is_array(a)
        assert (a.dtype, library.device(a)) == (query.dtype, library.device(query))
    assert [float(n) for n in summary.counts] == [14, 12]
    truth = dense(call.query, call.keys, call.values)
    # What the plan promises.
    assert (np.abs(library.numpy(out) - truth.out) <= plan.error * value_sizes(call.values)).all()


def test_narrow_dtypes_sum_in_float32() -> None:
    call = draw(2)
    query, *rest = [a.astype(np.float16) for a in (call.query, *call.keys, *call.values)]
    plan = changed(SINGLE, dtype="float16")
    summary, to_rows = tattn.summarize_vjp(rest[:2], rest[2:], plan)
    assert summary.sums[0].dtype == np.float32
    (out, lse), to_summary = summary.attend_vjp(query, return_lse=True)
    assert (out.dtype, lse.dtype) == (np.float16, np.float32)
    dquery, dsums = to_summary(out)
    dkeys, dvalues = to_rows(dsums)
    assert {a.dtype for a in (dquery, *dkeys, *dvalues)} == {np.dtype(np.float16)}
    expected = tattn.tensor_attention(query, rest[:2], rest[2:], plan=plan)
    np.testing.assert_allclose(out, expected, atol=2e-3)


def test_addition_is_commutative_to_the_bit_and_associative_to_the_rest(library: Any) -> None:
    rng = np.random.default_rng(6)
    keys = rng.uniform(-1, 1, (3, 2, 5, 3)).astype("f4")
    values = (rng.normal(size=(3, 2, 5, 2)) * [[[[1.0]]], [[[1e6]]], [[[1e-6]]]]).astype("f4")
    a, b, c = (tattn.summarize(*library.arrays(list(k), list(v)), SINGLE) for k, v in zip(keys, values, strict=True))
    same_summary(library, a + b, b + a)
    left, right = value_of(library, (a + b) + c), value_of(library, a + (b + c))
    for x, y in zip(left, right, strict=True):
        # Twice the digits of float32, of the largest numbers that were added.
        assert np.abs(x - y).max() <= 2.0**-46 * 1e7
    # Nothing added changes nothing.
    empty = tattn.summarize(*library.arrays([keys[0, 0, :0]] * 2, [values[0, 0, :0]] * 2), SINGLE)
    same_summary(library, a + empty, a)


def test_views_are_added_to_on_their_own(library: Any) -> None:
    call = draw(2)
    query, keys, values = library.arrays(call.query, call.keys, call.values)
    plan = PLANS[2]
    first = tattn.summarize([keys[0][:3, :], None], [values[0][:3, :], None], plan)
    both = first.update([None, keys[1]], [None, values[1]])
    assert [float(n) for n in both.counts] == [3, 6]
    close(
        library,
        both.attend(query),
        tattn.tensor_attention(query, [keys[0][:3, :], keys[1]], [values[0][:3, :], values[1]], plan=plan),
    )
    whole = both.update([keys[0][3:, :], None], [values[0][3:, :], None])
    close(library, whole.attend(query), tattn.tensor_attention(query, keys, values, plan=plan))
    # The view that got nothing is the very same array.
    assert whole.sums[1] is both.sums[1]
    same_summary(library, both.update([None, None], [None, None]), both)


def test_nothing_changes_a_summary(library: Any) -> None:
    call = draw(2, masked=True)
    query, keys, values = library.arrays(call.query, call.keys, call.values)
    masks = library.arrays(call.masks)
    summary = tattn.summarize(keys, values, PLANS[2], key_masks=masks)
    before = arrays_of(library, summary)
    summary.update(keys, values, masks)
    summary + summary
    out, pullback = summary.attend_vjp(query)
    pullback(out)
    state = tattn.DecodingState(PLANS[2], summary)
    state.step(query[:1, :], [k[:1, :] for k in keys], [v[:1, :] for v in values])
    for a, b in zip(arrays_of(library, summary), before, strict=True):
        assert np.array_equal(a, b)
    for name in ("plan", "sums", "rests"):
        with pytest.raises(FrozenInstanceError):
            setattr(summary, name, None)
    for a, b in zip((*keys, *values), (*call.keys, *call.values), strict=True):
        assert np.array_equal(library.numpy(a), b)


def test_masked_rows_do_not_matter_whatever_they_hold(library: Any) -> None:
    call = draw(2, masked=True)
    keys, values = [k.copy() for k in call.keys], [v.copy() for v in call.values]
    for x in (keys[0], values[0]):
        x[~call.masks[0]] = nan
    expected = summary_of(library, call, PLANS[2])
    same_summary(library, summary_of(library, call._replace(keys=keys, values=values), PLANS[2]), expected)
    assert float(expected.counts[0]) == call.masks[0].sum()


# Nothing there.


@pytest.mark.parametrize("empty", [(0,), (1,), (0, 1)], ids=str)
def test_views_without_rows_give_zeros(library: Any, empty: tuple[int, ...]) -> None:
    call = draw(2)
    for i in empty:
        call.keys[i], call.values[i] = call.keys[i][:0], call.values[i][:0]
    query, keys, values, grad = library.arrays(call.query, call.keys, call.values, call.grad_out)
    summary, to_rows = tattn.summarize_vjp(keys, values, PLANS[2])
    (out, lse), to_summary = summary.attend_vjp(query, return_lse=True)
    assert (library.numpy(out) == 0).all()
    assert (library.numpy(lse) == -np.inf).all()
    dquery, dsums = to_summary(grad)
    dkeys, dvalues = to_rows(dsums)
    for got, given in zip((dquery, *dkeys, *dvalues), (query, *keys, *values), strict=True):
        assert tuple(got.shape) == tuple(given.shape)
        assert (library.numpy(got) == 0).all()
    # Rows that come later are all that counts.
    full = draw(2)
    rest = [[x if i in empty else None for i, x in enumerate(library.arrays(xs))] for xs in (full.keys, full.values)]
    expected = tattn.tensor_attention(query, *library.arrays(full.keys, full.values), plan=PLANS[2])
    close(library, summary.update(*rest).attend(query), expected)


def test_a_query_may_have_no_rows(library: Any) -> None:
    summary = summary_of(library, draw(2), PLANS[2])
    (out, lse), pullback = summary.attend_vjp(library.array(np.zeros((0, 3))), return_lse=True)
    assert (tuple(out.shape), tuple(lse.shape)) == ((0, 5), (0,))
    dquery, dsums = pullback(out, lse)
    assert tuple(dquery.shape) == (0, 3)
    assert all((library.numpy(g) == 0).all() for g in dsums)


# Ranges.


def test_counts_beyond_the_dtype_of_their_product(library: Any) -> None:
    """A summary doubled 44 times: in float32 the product of three counts would be beyond 10^38."""
    call = draw(3)
    plan = changed(PLANS[3], dtype="float32")
    query, keys, values = library.arrays(
        call.query.astype("f4"), [k.astype("f4") for k in call.keys], [v.astype("f4") for v in call.values]
    )
    once = many = tattn.summarize(keys, values, plan)
    for _ in range(44):
        many = many + many
    expected, got = once.attend(query, return_lse=True), many.attend(query, return_lse=True)
    close(library, got[0], expected[0], 1e-6)
    np.testing.assert_allclose(library.numpy(got[1]), library.numpy(expected[1]) + 132 * log(2), rtol=1e-6)
    grad = library.array(call.grad_out.astype("f4"))
    for a, b in zip(many.attend_vjp(query)[1](grad)[1], once.attend_vjp(query)[1](grad)[1], strict=True):
        np.testing.assert_allclose(library.numpy(a) * 2.0**44, library.numpy(b), rtol=1e-4, atol=1e-5)


def test_the_scale_says_how_large_rows_are(library: Any) -> None:
    """Keys and queries a thousand times larger, in float32 at degree 8, by the scale alone."""
    call, size = draw(2), 1e3
    plan = tattn.plan_for(n=9, dim=3, bound=1.0, degree=8, scale=size**-3 / 3)
    query, keys, values = library.arrays(
        (size * call.query).astype("f4"), [(size * k).astype("f4") for k in call.keys],
        [v.astype("f4") for v in call.values],
    )  # fmt: skip
    out = tattn.summarize(keys, values, plan).attend(query)
    np.testing.assert_allclose(library.numpy(out), dense(call.query, call.keys, call.values).out, atol=1e-5)


@pytest.mark.parametrize("where", ["query", "keys"])
def test_entries_beyond_their_powers_give_nan(library: Any, where: str) -> None:
    """What would lose digits without a word is NaN, what is just below it is right."""
    call = draw(2, size=0.5)
    plan = tattn.plan_for(n=9, dim=3, bound=1.0, degree=8)
    # The scale is 1/3: a half for keys, the power of two next to its cubic root, and 4/3 for the query.
    limit = 2.0 ** (103 / 16) / {"query": 4 / 3, "keys": 1 / 2}[where]
    for factor, fits in ((0.7, True), (1.5, False)):
        query, keys = call.query.astype("f4"), [k.astype("f4") for k in call.keys]
        target = query if where == "query" else keys[0]
        other = keys[1]
        # One channel large here, and small there.
        target[0, 0] = factor * limit
        other[:, 0] *= np.float32(1e-3)
        out = tattn.summarize(*library.arrays(keys, [v.astype("f4") for v in call.values]), plan).attend(
            library.array(query)
        )
        finite = np.isfinite(library.numpy(out))
        assert finite.all() if fits else not finite[0].any()
        if fits:
            truth = dense(query, keys, call.values)
            np.testing.assert_allclose(library.numpy(out), truth.out, atol=2e-5)


def test_scores_beyond_the_bound_are_not_silent() -> None:
    plan = tattn.plan_for(n=4, dim=2, bound=0.5, degree=3, dtype="float64")
    summary = tattn.summarize([np.full((4, 2), 3.0)] * 2, [np.ones((4, 2))] * 2, plan)
    out, lse = summary.attend(np.full((3, 2), -6.0), return_lse=True)
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


# Gradients.


def parts_of(call: Call, at: Sequence[int]) -> list[tuple[list[Any], list[Any], list[Any]]]:
    """Two shards: each view's rows before and from `at`."""
    masks = call.masks or [None] * len(call.keys)
    result = []
    for side in (0, 1):
        cuts = [slice(None, i) if side == 0 else slice(i, None) for i in at]
        result.append(
            (
                [k[..., c, :] for k, c in zip(call.keys, cuts, strict=True)],
                [v[..., c, :] for v, c in zip(call.values, cuts, strict=True)],
                [None if m is None else m[..., c] for m, c in zip(masks, cuts, strict=True)],
            )
        )
    return result


def joined(first: Sequence[Any], second: Sequence[Any], library: Any) -> list[np.ndarray]:
    return [np.concatenate([library.numpy(a), library.numpy(b)], axis=-2) for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.grid
def test_gradients_of_two_workers_are_those_of_one(library: Any, case: dict[str, Any]) -> None:
    """Each pulls the gradient of the sum back to its own rows; a shard of one view is empty."""
    call, plan = drawn(case), PLANS[case["views"]]
    query, grad_out, grad_lse = library.arrays(call.query, call.grad_out, call.grad_lse)
    shards = [library.arrays(*part) for part in parts_of(call, (4, 0, 2)[: case["views"]])]
    (one, back_one), (two, back_two) = (
        tattn.summarize_vjp(keys, values, plan, key_masks=masks) for keys, values, masks in shards
    )
    (out, _), pullback = (one + two).attend_vjp(query, return_lse=True)
    dquery, dsums = pullback(grad_out, grad_lse)
    (keys_one, values_one), (keys_two, values_two) = back_one(dsums), back_two(dsums)
    masks = None if call.masks is None else library.arrays(call.masks)
    expected_out, expected = tattn.tensor_attention_vjp(
        query, *library.arrays(call.keys, call.values), plan=plan, key_masks=masks
    )
    dquery_whole, dkeys, dvalues = expected(grad_out, grad_lse)
    close(library, out, expected_out)
    close(library, dquery, dquery_whole)
    for got, whole in (
        (joined(keys_one, keys_two, library), dkeys),
        (joined(values_one, values_two, library), dvalues),
    ):
        for a, b in zip(got, whole, strict=True):
            np.testing.assert_allclose(a, library.numpy(b), rtol=1e-12, atol=1e-12)
    for a, b in zip((*keys_one, *values_one), (*shards[0][0], *shards[0][1]), strict=True):
        assert (tuple(a.shape), a.dtype, library.device(a)) == (tuple(b.shape), b.dtype, library.device(b))
    # lse has no part in what follows.
    close(library, (one + two).attend_vjp(query)[1](grad_out)[0], expected(grad_out)[0])


def heads(library: Any) -> list[Any]:
    """Query, keys, values and gradient, with leading dimensions that the views lack and one that a view lacks altogether."""
    call, rng = draw(2), np.random.default_rng(12)
    (a, b), (u, v) = call.keys, call.values
    return library.arrays(  # type: ignore[no-any-return]
        rng.uniform(-1, 1, (2, 3, 4, 3)), [a, np.stack([b, 0.5 * b, -b])], [u, v[None]], rng.normal(size=(2, 3, 4, 5))
    )


def test_one_summary_for_many_queries(library: Any) -> None:
    query, keys, values, grad = heads(library)
    summary, to_rows = tattn.summarize_vjp(keys, values, PLANS[2])
    assert [tuple(s.shape) for s in summary.sums] == [(35, 6), (3, 35, 6)]
    out, to_summary = summary.attend_vjp(query)
    dquery, dsums = to_summary(grad)
    dkeys, dvalues = to_rows(dsums)
    expected_out, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=PLANS[2])
    expected = pullback(grad)
    close(library, out, expected_out)
    for got, whole in zip((dquery, *dkeys, *dvalues), (expected[0], *expected[1], *expected[2]), strict=True):
        assert tuple(got.shape) == tuple(whole.shape)
        close(library, got, whole)


def test_gradients_of_views_that_are_none(library: Any) -> None:
    call = draw(2)
    keys, values = library.arrays(call.keys, call.values)
    summary, pullback = tattn.summarize_vjp([None, keys[1]], [None, values[1]], PLANS[2])
    dkeys, dvalues = pullback([library.array(np.ones(s.shape)) for s in summary.sums])
    assert dkeys[0] is None
    assert dvalues[0] is None
    assert tuple(dkeys[1].shape) == (6, 3)


@pytest.mark.thorough("jax")
def test_the_librarys_own_gradients(library: Any) -> None:
    """Autograd of torch and JAX through summarize, +, update and attend; elsewhere the pullbacks, in finite differences."""
    call, plan = drawn({"views": 2, "masked": True}), PLANS[2]
    shards = [library.arrays(*part) for part in parts_of(call, (4, 2))]
    query, grad_out, grad_lse = library.arrays(call.query, call.grad_out, call.grad_lse)
    masks = library.arrays(call.masks)

    def loss(arrays: Sequence[Any]) -> Any:
        q, a, b, u, v = arrays
        one = tattn.summarize([a[:4, :], b[:2, :]], [u[:4, :], v[:2, :]], plan, key_masks=shards[0][2])
        # Both ways to add: one view by +, the other by update.
        two = tattn.summarize([a[4:, :], None], [u[4:, :], None], plan, key_masks=[shards[1][2][0], None])
        both = (one + two).update([None, b[2:, :]], [None, v[2:, :]])
        out, lse = both.attend(q, return_lse=True)
        return (out * grad_out).sum() + (lse * grad_lse).sum()

    arrays = [query, *library.arrays([*call.keys, *call.values])]
    _, pullback = tattn.tensor_attention_vjp(query, arrays[1:3], arrays[3:], plan=plan, key_masks=masks)
    dquery, dkeys, dvalues = pullback(grad_out, grad_lse)
    expected = [dquery, *dkeys, *dvalues]
    if library.name.startswith("torch"):
        leaves = [a.clone().requires_grad_() for a in arrays]
        loss(leaves).backward()
        got = [a.grad for a in leaves]
    elif library.name.startswith("jax"):
        import jax

        got = jax.grad(loss)(arrays)
    else:
        (one, back_one), (two, back_two) = (
            tattn.summarize_vjp(keys, values, plan, key_masks=masks) for keys, values, masks in shards
        )
        dquery, dsums = (one + two).attend_vjp(query)[1](grad_out, grad_lse)
        halves = back_one(dsums), back_two(dsums)
        got = [dquery, *(library.array(a) for i in (0, 1) for a in joined(halves[0][i], halves[1][i], library))]
    for a, b in zip(got, expected, strict=True):
        close(library, a, b)


def test_a_summary_is_a_leaf_for_gradients(library: Any) -> None:
    """The reader's half: the gradient of the sums, as autograd and the pullback give it and as differences confirm."""
    call, plan = draw(2), PLANS[2]
    summary = summary_of(library, call, plan)
    query, grad = library.arrays(call.query, call.grad_out)
    _, dsums = summary.attend_vjp(query)[1](grad)
    if library.name.startswith("torch"):
        leaf = tattn.Summary(plan, tuple(s.clone().requires_grad_() for s in summary.sums), summary.rests)
        (leaf.attend(query) * grad).sum().backward()
        got: Any = [s.grad for s in leaf.sums]
    elif library.name.startswith("jax"):
        import jax

        whole = jax.grad(lambda s: (s.attend(query) * grad).sum())(summary)
        assert isinstance(whole, tattn.Summary)
        assert all((np.asarray(r) == 0).all() for r in whole.rests)
        got = whole.sums
    else:
        got = dsums
    for a, b in zip(got, dsums, strict=True):
        close(library, a, b)
    rng = np.random.default_rng(8)
    for i, gradient in enumerate(dsums):
        direction = 1e-6 * rng.normal(size=gradient.shape)
        ahead, behind = (
            tattn.Summary(
                plan,
                tuple(
                    library.array(library.numpy(s) + sign * direction * (j == i)) for j, s in enumerate(summary.sums)
                ),
                summary.rests,
            )
            for sign in (1, -1)
        )
        change = ((library.numpy(ahead.attend(query)) - library.numpy(behind.attend(query))) * call.grad_out).sum()
        np.testing.assert_allclose(change / 2, (library.numpy(gradient) * direction).sum(), rtol=1e-6, atol=1e-14)


def test_many_problems_are_taken_in_parts(library: Any) -> None:
    query, keys, values, grad = heads(library)

    def everything() -> list[np.ndarray]:
        summary, to_rows = tattn.summarize_vjp(keys, values, PLANS[2])
        out, to_summary = summary.attend_vjp(query)
        dquery, dsums = to_summary(grad)
        dkeys, dvalues = to_rows(dsums)
        return [library.numpy(a) for a in (*summary.sums, out, dquery, *dsums, *dkeys, *dvalues)]

    together = everything()
    # Of which no two problems have room.
    with library.backend.using(workspace=1):
        apart = everything()
    for a, b in zip(apart, together, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


# Long streams.


@pytest.mark.thorough("strict", "torch", "jax")
def test_ten_thousand_chunks_do_not_drift(library: Any) -> None:
    """float32, a chunk at a time, against float64 at once; plain float32 sums are off by a hundred times as much."""
    rng = np.random.default_rng(9)
    chunks, rows = 10_000, 3
    keys = rng.uniform(0, 1, (chunks, rows, 2)).astype("f4")
    values = rng.uniform(0, 1, (chunks, rows, 1)).astype("f4")
    plan = tattn.plan_for(n=9, dim=2, order=2, bound=1.0, degree=2)
    moved_keys, moved_values = library.arrays(list(keys), list(values))
    summary = tattn.summarize([moved_keys[0]], [moved_values[0]], plan)
    for k, v in zip(moved_keys[1:], moved_values[1:], strict=True):
        summary = summary.update([k], [v])
    # Independent of the library: the sums of all chunks side by side, added one after another.
    naive = np.cumsum(tattn.summarize([keys], [values], plan).sums[0], axis=0)[-1]
    truth = tattn.summarize(
        [keys.reshape(-1, 2).astype("f8")], [values.reshape(-1, 1).astype("f8")], changed(plan, dtype="float64")
    ).sums[0]
    # A chunk's own sums are off by a unit or two, at random.
    drift = np.abs(value_of(library, summary)[0] / truth - 1).max()
    naive_drift = np.abs(naive / truth - 1).max()
    print(f"drift after {chunks} chunks: {drift:.2e}, of plain sums {naive_drift:.2e}")
    assert float(summary.counts[0]) == chunks * rows
    assert drift <= 2.0**-26
    assert naive_drift > 50 * drift


def test_a_file_passes_in_blocks(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a memmap, many times what is held at any time; progress is told after every piece."""
    rng = np.random.default_rng(10)
    n = 400_000
    rows = rng.uniform(-1, 1, (n, 4)).astype("f4")
    rows.tofile(tmp_path / "rows")
    plan = tattn.plan_for(n=n, dim=4, bound=1.0, degree=3)
    expected = tattn.summarize([rows, rows[:1000]], [rows, rows[:1000]], plan)
    file = np.memmap(tmp_path / "rows", np.float32, "r", shape=(n, 4))
    seen: list[tuple[int, int]] = []
    tracemalloc.start()
    summary = tattn.summarize([file, file[:1000]], [file, file[:1000]], plan, progress=lambda *x: seen.append(x))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < rows.nbytes
    assert seen == [(262_144, 401_000), (400_000, 401_000), (401_000, 401_000)]
    for a, b in zip(summary.sums, expected.sums, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-3)
    assert type(summary.sums[0]) is np.ndarray


def test_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    call = draw(2)
    summary = tattn.summarize(call.keys, call.values, PLANS[2], progress=True)
    assert "13.0/13.0" in capsys.readouterr().err
    whole = tattn.summarize(call.keys, call.values, PLANS[2])
    np.testing.assert_allclose(summary.attend(call.query), whole.attend(call.query), atol=1e-13)
    silent = tattn.summarize(call.keys, call.values, PLANS[2], progress=False)
    assert np.array_equal(silent.sums[0], whole.sums[0])
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with pytest.raises(ImportError, match="progress=True shows a bar by tqdm, which is not installed"):
        tattn.summarize(call.keys, call.values, PLANS[2], progress=True)


# Files.


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_file_keeps_everything(library: Any, dtype: str, tmp_path: Any) -> None:
    call, plan = draw(2), changed(PLANS[2], dtype=dtype)
    query, keys, values = library.arrays(
        call.query.astype(dtype), [k.astype(dtype) for k in call.keys], [v.astype(dtype) for v in call.values]
    )
    summary = tattn.summarize(keys, values, plan)
    summary = summary + tattn.summarize(keys, [0.3 * v for v in values], plan)
    assert any((library.numpy(r) != 0).any() for r in summary.rests)
    path = tmp_path / "summary"
    summary.save(path)
    summary.save(path)  # over the first
    assert [p.name for p in tmp_path.iterdir()] == ["summary"]
    plain = tattn.Summary.load(path)
    again = tattn.Summary.load(path, like=query)
    assert plain.plan == again.plan == plan
    for a, b, c in zip(
        arrays_of(library, summary), (*plain.sums, *plain.rests), arrays_of(library, again), strict=True
    ):
        assert type(b) is np.ndarray
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)
        assert np.array_equal(a, c)
    for a in (*again.sums, *again.rests):
        assert library.is_array(a)
        assert (a.dtype, library.device(a)) == (query.dtype, library.device(query))
    close(library, (again + summary).attend(query), summary.attend(query), 1e-6)


def test_files_that_are_not_ours(tmp_path: Any) -> None:
    path = tmp_path / "file.npz"
    tattn.summarize([np.ones((2, 3))], [np.ones((2, 1))], PLANS[1]).save(path)
    whole = path.read_bytes()
    with np.load(path) as file:
        good = dict(file)
    about = json.loads(str(good["about"]))

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=rf"^path should be a file that Summary.save wrote, .*file.npz.*{match}"):
            tattn.Summary.load(path)

    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused("is not or is damaged")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    path.write_bytes(bytes(flipped))
    refused("damaged")
    path.write_bytes(pickle.dumps({"a": 1}))
    refused("is not or is damaged")
    with path.open("wb") as file:
        np.save(file, np.ones(3))
    refused("is not or is damaged")

    def written(**changes: Any) -> None:
        np.savez(path, **{**good, **changes})

    np.savez(path, x=np.ones(3))
    refused("is not or is damaged")
    written(about=np.array(json.dumps({**about, "format": "other"})))
    refused("is not or is damaged")
    written(about=np.array(json.dumps({**about, "version": 2})))
    refused("is of version 2, this is version 1")
    written(about=np.array([{"an": "object"}], dtype=object))
    refused("is not or is damaged")
    plan = {k: v for k, v in about["plan"].items() if k != "scale"}
    written(about=np.array(json.dumps({**about, "plan": plan})))
    refused("is not or is damaged")
    written(sums_0=good["sums_0"][1:])
    refused(r"is damaged: sums\[0\] should have shape")
    written(rests_0=good["rests_0"].astype("f4"))
    refused(r"is damaged: rests\[0\] should have the plan's dtype")
    with pytest.raises(FileNotFoundError):
        tattn.Summary.load(tmp_path / "nothing")
    with pytest.raises(TypeError, match=r"^like should be an array .*, got list"):
        tattn.Summary.load(path, like=[1.0])


def test_a_failed_save_leaves_the_file_that_was_there(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.npz"
    summary = tattn.summarize([np.ones((2, 3))], [np.ones((2, 1))], PLANS[1])
    summary.save(path)
    before = path.read_bytes()

    def full(file: Any, **_: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        summary.save(path)
    assert path.read_bytes() == before


# Arguments that do not fit.

K, V = np.random.default_rng(0).uniform(-1, 1, (2, 2, 6, 3))
KEYS, VALUES = list(K), list(V)
MASK = np.ones(6, bool)


def refuse(error: type, match: str, function: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(error, match=match) as caught:
        function(*arguments, **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changed", "shown"),
    [
        ("degree", tattn.plan_for(n=9, dim=3, bound=1.0, degree=3, dtype="float64"), "4 and 3"),
        ("bound", tattn.plan_for(n=9, dim=3, bound=1.5, degree=4, dtype="float64"), "1.0 and 1.5"),
        ("series", tattn.plan_for(n=9, dim=3, bound=1.0, degree=4, dtype="float64", series="taylor"), "minimax and taylor"),
        ("scale", changed(PLANS[2], scale=0.5), "0.333.* and 0.5"),
        ("order", changed(PLANS[2], order=4, lengths=(9,) * 4), "3 and 4"),
        ("dtype", changed(PLANS[2], dtype="float32"), "float64 and float32"),
        ("coefficients", changed(PLANS[2], coefficients=(1.0, 1.0, 0.5, 0.1, 0.1)), "0.1, 0.1"),
    ],
    ids=str,
)  # fmt: skip
def test_plans_that_differ_do_not_add_up(name: str, changed: tattn.Plan, shown: str) -> None:
    summary = tattn.summarize(KEYS, VALUES, PLANS[2])
    message = rf"^summaries add up if their plans agree, got {name} .*{shown}"
    other = replace(summary, plan=changed)
    refuse(tattn.PlanError, message, lambda: summary + other)
    refuse(
        tattn.PlanError, message, tattn.DecodingState(PLANS[2], other).step, K[0, :1], [K[0, :1]] * 2, [V[0, :1]] * 2
    )


def test_plans_made_for_other_shapes_add_up() -> None:
    summary = tattn.summarize(KEYS, VALUES, PLANS[2])
    other = tattn.summarize(KEYS, VALUES, tattn.plan_for(n=10**6, dim=3, bound=1.0, degree=4, dtype="float64"))
    assert other.plan != summary.plan
    assert float((summary + other).counts[0]) == 12


@pytest.mark.parametrize("function", [tattn.summarize, tattn.summarize_vjp])
def test_plans_that_no_stream_can_keep(function: Any) -> None:
    exact = tattn.plan_for(n=9, dim=3, bound=1.0, dtype="float64", method="exact")
    banded = tattn.plan_for(n=9, dim=3, dtype="float64", series="banded", degree=4)
    refuse(
        tattn.PlanError,
        "^plan should be of the polynomial method to summarize, got method 'exact'",
        function,
        KEYS,
        VALUES,
        exact,
    )
    refuse(tattn.PlanError, "^plan should have one polynomial .*, got series 'banded'", function, KEYS, VALUES, banded)
    refuse(TypeError, r"^plan should be a tattn.Plan, got NoneType", function, KEYS, VALUES, None)
    refuse(
        tattn.PlanError, "got method 'exact'", tattn.DecodingState(exact).step, K[0, :1], [K[0, :1]] * 2, [V[0, :1]] * 2
    )


ROWS = [
    ("array", TypeError, r"^keys should be a list or tuple of arrays", {"keys": K}),
    ("one", ValueError, r"^keys should have one entry for each of the plan's 2 views, got 1", {"keys": KEYS[:1]}),
    ("three", ValueError, r"^values should have one entry for each of the plan's 2 views, got 3", {"values": [*VALUES, V[0]]}),
    ("list", TypeError, r"^keys\[1\] should be an array .*, got list", {"keys": [K[0], K[1].tolist()]}),
    ("None", ValueError, r"^values\[0\] should be None, as keys\[0\] is, got ndarray", {"keys": [None, K[1]]}),
    ("no values", TypeError, r"^values\[0\] should be an array .*, got NoneType", {"values": [None, V[1]]}),
    ("mask of None", ValueError, r"^key_masks\[0\] should be None, as keys\[0\] is, got ndarray",
     {"keys": [None, K[1]], "values": [None, V[1]], "key_masks": [MASK, None]}),
    ("dtype", TypeError, r"^keys\[0\] should have the plan's dtype float64, got float32", {"keys": [K[0].astype("f4"), K[1]]}),
    ("values' dtype", TypeError, r"^values\[1\] should have the plan's dtype float64, got int64",
     {"values": [V[0], V[1].astype(int)]}),
    ("dim", ValueError, r"^keys\[1\] should have the plan's dim 3 for its last, got shape \(6, 2\)", {"keys": [K[0], K[1, :, :2]]}),
    ("dv", ValueError, r"^values\[1\] should have the last dimension of .*, 3, got shape \(6, 2\)",
     {"values": [V[0], V[1, :, :2]]}),
    ("rows", ValueError, r"^values\[0\] should have as many rows as keys\[0\], 6, got shape \(5, 3\)",
     {"values": [V[0, :5], V[1]]}),
    ("rank 1", ValueError, r"^keys\[0\] should have at least two dimensions .*, got shape \(3,\)", {"keys": [K[0, 0], K[1]]}),
    ("no channels", ValueError, r"^values\[0\] should have no dimension of length 0 but for its rows, got shape \(6, 0\)",
     {"values": [V[0, :, :0], V[1]]}),
    ("leading", ValueError, r"^keys\[1\] should have leading dimensions that broadcast with \(2,\).*, got \(3,\)",
     {"keys": [np.stack([K[0]] * 2), np.stack([K[1]] * 3)]}),
    ("masks", ValueError, r"^key_masks should have one entry for each of the 2 views of the plan, got 1", {"key_masks": [MASK]}),
    ("mask", ValueError, r"^key_masks\[0\] should have shape \(..., 6\)", {"key_masks": [MASK[:5], None]}),
    ("mask dtype", TypeError, r"^key_masks\[1\] should be boolean", {"key_masks": [None, np.ones(6)]}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "match", "changes"), [pytest.param(*r[1:], id=r[0]) for r in ROWS])
def test_rows_that_do_not_fit(error: type, match: str, changes: dict[str, Any]) -> None:
    rows = {"keys": KEYS, "values": VALUES, **changes}
    summary = tattn.summarize(KEYS, VALUES, PLANS[2])
    with calls_of(sum_rows) as calls:
        refuse(error, match, tattn.summarize, plan=PLANS[2], **rows)
        refuse(error, match, tattn.summarize_vjp, plan=PLANS[2], **rows)
        refuse(error, match, summary.update, **rows)
    assert not calls


@pytest.mark.libraries("torch")
def test_rows_that_do_not_fit_the_summary() -> None:
    torch = pytest.importorskip("torch")
    summary = tattn.summarize(KEYS, VALUES, PLANS[2])
    refuse(ValueError, r"^values\[0\] should have the last dimension of the summary, 3, got shape \(6, 2\)",
           summary.update, KEYS, [v[:, :2] for v in VALUES])  # fmt: skip
    tensors = [torch.tensor(k) for k in KEYS]
    refuse(TypeError, r"^keys\[0\] should be an array of NumPy, like the summary, got one of torch",
           summary.update, tensors, tensors)  # fmt: skip
    refuse(
        ValueError,
        "^keys should hold at least one array, got None alone",
        tattn.summarize,
        [None] * 2,
        [None] * 2,
        PLANS[2],
    )
    refuse(
        TypeError,
        "^progress should be True or callable, got str",
        tattn.summarize,
        KEYS,
        VALUES,
        PLANS[2],
        progress="bar",
    )
    other = tattn.summarize(tensors, tensors, PLANS[2])
    refuse(TypeError, r"^sums\[0\] of the summary added should be an array of NumPy, like those of the first, got one of torch",
           lambda: summary + other)  # fmt: skip
    narrow = tattn.summarize(KEYS, [v[:, :2] for v in VALUES], PLANS[2])
    refuse(
        ValueError,
        r"^sums\[0\] of the summary added should be for values of dv 3, as the first, got 2",
        lambda: summary + narrow,
    )
    many = [tattn.summarize([np.stack([k] * n) for k in KEYS], VALUES, PLANS[2]) for n in (2, 3)]
    refuse(
        ValueError,
        r"^sums\[0\] of the summary added should have leading dimensions that broadcast with \(2,\)",
        lambda: many[0] + many[1],
    )
    with pytest.raises(TypeError, match="unsupported operand"):
        summary + 1


def test_queries_and_gradients_that_do_not_fit() -> None:
    summary, to_rows = tattn.summarize_vjp(KEYS, VALUES, PLANS[2])
    for function in (summary.attend, summary.attend_vjp):
        refuse(TypeError, "^query should be an array .*, got list", function, K[0].tolist())
        refuse(TypeError, "^query should have the plan's dtype float64, got float32", function, K[0].astype("f4"))
        refuse(
            ValueError, r"^query should have the plan's dim 3 for its last, got shape \(6, 2\)", function, K[0, :, :2]
        )
        refuse(ValueError, r"^query should have at least two dimensions", function, K[0, 0])
    many = tattn.summarize([np.stack([k] * 2) for k in KEYS], VALUES, PLANS[2])
    refuse(
        ValueError, r"^query should have leading dimensions that broadcast with \(2,\)", many.attend, np.ones((3, 6, 3))
    )
    _, pullback = summary.attend_vjp(K[0])
    refuse(
        ValueError, r"^grad_out should have the shape of the output, \(6, 3\), got \(6, 2\)", pullback, np.ones((6, 2))
    )
    refuse(TypeError, r"^grad_out should have the output's dtype float64, got float32", pullback, np.ones((6, 3), "f4"))
    refuse(
        ValueError,
        r"^grad_lse should have the shape of the output, \(6,\), got \(6, 1\)",
        pullback,
        np.ones((6, 3)),
        np.ones((6, 1)),
    )
    refuse(
        ValueError,
        r"^dsums\[1\] should have the shape \(35, 4\), got \(35, 3\)",
        to_rows,
        [np.ones((35, 4)), np.ones((35, 3))],
    )
    refuse(
        ValueError, r"^dsums should have one entry for each of the plan's 2 views, got 1", to_rows, [np.ones((35, 4))]
    )


def test_summaries_put_together_wrongly() -> None:
    summary = tattn.summarize(KEYS, VALUES, PLANS[2])
    for changes, match in (
        ({"sums": summary.sums[:1]}, r"^sums should have one entry for each of the plan's 2 views, got 1"),
        (
            {"sums": tuple(s[1:] for s in summary.sums)},
            r"^sums\[0\] should have shape \(\.\.\., 35, dv \+ 1\).*, got \(34, 4\)",
        ),
        ({"rests": summary.rests[:1]}, r"^rests should have one entry for each of the plan's 2 views, got 1"),
        (
            {"rests": tuple(s[:, :2] for s in summary.rests)},
            r"^rests\[0\] should have the shape \(35, 4\), got \(35, 2\)",
        ),
    ):
        broken = replace(summary, **changes)
        refuse(ValueError, match, broken.attend, K[0])
        refuse(ValueError, match, broken.update, KEYS, VALUES)
        refuse(ValueError, match, lambda broken=broken: broken + summary)
        refuse(ValueError, match, lambda broken=broken: summary + broken)


# Decoding.


def causal(call: Call, plan: tattn.Plan) -> tuple[np.ndarray, np.ndarray]:
    """Row i attends to all tuples of rows up to i, densely."""
    rows = [
        dense(
            call.query[..., i : i + 1, :], [k[..., : i + 1, :] for k in call.keys], [v[..., : i + 1, :] for v in call.values],
            masks=None if call.masks is None else [None if m is None else m[..., : i + 1] for m in call.masks],
            function=lambda x: polyval(x, plan.coefficients),
        )
        for i in range(call.query.shape[-2])
    ]  # fmt: skip
    return np.concatenate([r.out for r in rows], axis=-2), np.concatenate([r.lse for r in rows], axis=-1)


def tokens(call: Call, library: Any) -> list[tuple[Any, ...]]:
    n = call.query.shape[-2]
    masks = call.masks or [None] * len(call.keys)
    return [
        tuple(
            library.arrays(
                call.query[..., i : i + 1, :],
                [k[..., i : i + 1, :] for k in call.keys],
                [v[..., i : i + 1, :] for v in call.values],
                [None if m is None else m[..., i : i + 1] for m in masks],
            )
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("views", [1, 2, 3])
def test_decoding_is_causal_attention(library: Any, views: int) -> None:
    """A batch of streams of different lengths, a token at a time; one of a prompt's rows seen by all."""
    rng = np.random.default_rng(11)
    n = 8
    call = Call(
        rng.uniform(-1, 1, (2, n, 3)),
        [rng.uniform(-1, 1, (2, n, 3)) for _ in range(views)],
        [rng.normal(size=(2, n, 2)) for _ in range(views)],
        [np.array([[True] * n, [True] * 5 + [False] * (n - 5)])] * views,
        np.zeros(()), np.zeros(()),
    )  # fmt: skip
    plan = PLANS[views]
    expected, expected_lse = causal(call, plan)
    state = tattn.DecodingState(plan)
    outs = []
    for query, keys, values, masks in tokens(call, library):
        (out, lse), after = state.step(query, keys, values, key_masks=masks, return_lse=True)
        if state.summary is not None:
            assert [s.shape for s in after.summary.sums] == [s.shape for s in state.summary.sums]
            close(library, state.step(query, keys, values, key_masks=masks)[0], out, 0)
        outs.append((library.numpy(out), library.numpy(lse)))
        state = after
    np.testing.assert_allclose(np.concatenate([o for o, _ in outs], axis=-2), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.concatenate([x for _, x in outs], axis=-1), expected_lse, rtol=1e-12, atol=1e-12)
    # Half as a prompt, the rest token by token: the same last row.
    half = [[x[..., :4, :] for x in library.arrays(xs)] for xs in (call.keys, call.values)]
    masks = [m[..., :4] for m in library.arrays(call.masks)]
    state = tattn.DecodingState(plan, tattn.summarize(*half, plan, key_masks=masks))
    for query, keys, values, masks in tokens(call, library)[4:]:
        out, state = state.step(query, keys, values, key_masks=masks)
    np.testing.assert_allclose(library.numpy(out), expected[..., -1:, :], rtol=1e-12, atol=1e-12)


def test_tokens_that_do_not_fit() -> None:
    state = tattn.DecodingState(PLANS[2])
    one = [K[0, :1], K[1, :1]]
    refuse(
        ValueError, r"^keys\[0\] should have as many rows as query, 6, got shape \(1, 3\)", state.step, K[0], one, one
    )
    refuse(
        ValueError,
        r"^keys\[1\] should have at least two dimensions .*, got shape \(3,\)",
        state.step,
        K[0, :1],
        [K[0, :1], K[0, 0]],
        one,
    )
    refuse(TypeError, r"^query should be an array .*, got list", state.step, [1.0], one, one)


# Examples.


def example(name: str, *arguments: str) -> str:
    """What it prints, in a process of its own: it may limit its memory."""
    program = Path(__file__).parents[2] / "examples" / name
    done = subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_file_passes_under_a_limit_of_address_space() -> None:
    """A file of 458 MiB in 400; what is read at a time and kept is less than half of that."""
    if sys.platform != "linux":
        pytest.skip("limits of address space are Linux's")
    printed = example("streaming.py", "--rows", "3000000", "--limit", "400")
    assert "the files cannot be read at once: MemoryError" in printed
    error = float(re.search(r"error (\S+) against exact", printed)[1])  # type: ignore[index]
    assert error <= float(re.search(r"certified (\S+);", printed)[1])  # type: ignore[index]


def test_decoding_is_attention_to_prefixes() -> None:
    printed = example("decoding.py", "--tokens", "300")
    assert float(printed.rpartition(" by ")[2]) <= 1e-12
