"""Compiled code in place of array code: where it is used, that it computes the same, and that all works without."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise, product
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from cases import KINDS, ratios, sample
from reference import Dense, dense, through_features, value_sizes
from watching import Seen, calls_of, code_within

import tattn
from tattn.backends import compiled, kernels
from tattn.backends.compiled.loading import loaded, loops_over_tuples
from tattn.backends.compiled.operations.rows import over_rows
from tattn.backends.compiled.trials import fails
from tattn.backends.numpy import BACKEND
from tattn.backends.operations import (
    CHAIN,
    OF_DOCUMENTS,
    OF_PREFIXES,
    OF_ROWS,
    OF_TUPLES,
    OF_WINDOWS,
    Kernel,
    Tuples,
    rows_in_range,
    rows_together,
)
from tattn.engines import causal_features
from tattn.engines.features import rows_of
from tattn.engines.window_blocks import cut_of
from tattn.features.monomials import Monomials, features

SOURCE = Path(tattn.__file__).parents[1]
channels = pytest.mark.parametrize("channels", ["real", "complex"])


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment of the tests says."""
    monkeypatch.delenv(compiled.SWITCH, raising=False)


@pytest.fixture
def loops() -> Any:
    """The compiled loops, which only numba makes."""
    pytest.importorskip("numba")
    return loaded()[0].causal


def compile_for(*operations: str) -> None:
    """Compile these alone, before calls are watched: two processes that compile all at once do so twice."""
    assert not any(fails(operation, dtype) for dtype in ("float32", "float64") for operation in operations)


@pytest.fixture
def used(loops: Any) -> Iterator[Names]:
    """Tells of every time that a compiled loop runs."""
    compile_for("prefix_read", "prefix_pull")
    with calls_of(code_within(compiled.prefix_read, "read"), code_within(compiled.prefix_pull, "pull")) as seen:
        yield Names(seen)


class Names(Sequence[str]):
    """The names of the calls so far."""

    def __init__(self, seen: list[Seen]) -> None:
        self._seen = seen
        self.clear = seen.clear

    def __getitem__(self, index: Any) -> Any:
        return [call.name for call in self._seen][index]

    def __len__(self) -> int:
        return len(self._seen)

    def __eq__(self, other: object) -> bool:
        return list(self) == other


def noting(told: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, each call of which is noted."""

    def noted(*given: Any) -> Any:
        told.append(name)
        return function(*given)

    return noted


@pytest.fixture
def moments() -> Iterator[Callable[[int], list[str]]]:
    """Gives NumPy's backend a kernel for `moments` with chains of so many terms, which tells when it is used."""

    def offered(chain: int) -> list[str]:
        told: list[str] = []

        def function(k: Any, v: Any, mask: Any, unit: Any, degree: int, grading: Any) -> Any:
            phi = features(np.swapaxes(k * unit, -1, -2), degree, BACKEND, grading)
            return phi @ np.concatenate([v, np.ones_like(v[..., :1])], axis=-1)

        kernel = Kernel("moments", noting(told, "moments", function), lambda *given: given[2] is None, chain)
        stack.enter_context(BACKEND.using(kernels=(kernel,)))
        return told

    with ExitStack() as stack:
        yield offered


def call_of(n: int = 50) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    query, *rest = np.random.default_rng(0).uniform(-1, 1, (5, n, 3))
    return query, rest[:2], rest[2:]


@channels
def test_plans_price_causal_calls_by_what_computes_them(
    channels: str, loops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the exact method would be taken at lengths where the loops are faster."""
    query, *views = np.random.default_rng(0).uniform(-1, 1, (5, 300, 8)).astype(np.float32)
    given = (query, views[:2], views[2:])
    compiled_plan = tattn.plan(*given, causal=True, channels=channels)
    assert compiled_plan.method == "polynomial"
    whole = tattn.plan(*given, method="polynomial", channels=channels)
    assert compiled_plan.flops_polynomial == 1.5 * whole.flops_polynomial
    monkeypatch.setenv(compiled.SWITCH, "0")
    without = tattn.plan(*given, method="polynomial", causal=True, channels=channels)
    assert without.flops_polynomial > 5 * compiled_plan.flops_polynomial
    # One plan serves both: only its price differs.
    assert without.problem == compiled_plan.problem
    np.testing.assert_allclose(
        tattn.tensor_attention(*given, causal=True, plan=compiled_plan), tattn.tensor_attention(*given, causal=True, plan=without),
        atol=1e-5,
    )  # fmt: skip


def test_a_kernel_with_short_chains_is_used_under_every_plan(moments):
    query, keys, values = call_of()
    before = tattn.plan(query, keys, values, degree=4)
    expected = tattn.tensor_attention(query, keys, values, plan=before)
    told = moments(CHAIN)
    plan = tattn.plan(query, keys, values, degree=4)
    assert (plan.chain, plan.error) == (CHAIN, before.error)
    for serving in (before, plan):
        told.clear()
        np.testing.assert_allclose(tattn.tensor_attention(query, keys, values, plan=serving), expected, rtol=1e-12)
        assert told == ["moments"] * 2


def test_plans_count_with_the_chains_of_kernels_and_shut_out_longer_ones(moments):
    query, keys, values = call_of()
    before = tattn.plan(query, keys, values, degree=12)
    told = moments(4096)
    plan = tattn.plan(query, keys, values, degree=12)
    assert plan.chain == 4096
    assert plan.error > 1.5 * before.error
    tattn.tensor_attention(query, keys, values, plan=before)
    assert told == []
    tattn.tensor_attention(query, keys, values, plan=plan)
    assert told == ["moments"] * 2


def test_a_kernel_is_used_for_what_it_takes_alone(moments):
    query, keys, values = call_of()
    told = moments(CHAIN)
    masks = [np.arange(50) % 3 > 0, None]
    plan = tattn.plan(query, keys, values, degree=4)
    tattn.tensor_attention(query, keys, values, plan=plan, key_masks=masks)
    assert told == ["moments"]


LEADING = {
    "one": ((),) * 4,
    "heads": ((3,),) * 4,
    "shared": ((2, 3), (2, 1), (3,), (2, 1)),
}


def drawn(
    n: int, views: int, dtype: str, leading: str = "one", masked: bool = False, dim: int = 3, value_dim: int = 2
) -> dict[str, Any]:
    """Query, keys, values, masks, and gradients of output and lse."""
    rng = np.random.default_rng([n, views])
    of_query, of_keys, of_values, of_masks = LEADING[leading]
    more = (0, 3, 40, 0)[:views]
    masks = [rng.random((*of_masks, n + extra)) < 0.6 for extra in more]
    return {
        "query": rng.uniform(-1, 1, (*of_query, n, dim)).astype(dtype),
        "keys": [rng.uniform(-1, 1, (*of_keys, n + extra, dim)).astype(dtype) for extra in more],
        "values": [rng.normal(size=(*of_values, n + extra, value_dim)).astype(dtype) for extra in more],
        "key_masks": [masks[0], *[None] * (views - 1)] if masked else None,
        "grad_out": rng.normal(size=(*of_query, n, value_dim)).astype(dtype),
        "grad_lse": rng.normal(size=(*of_query, n)).astype(dtype),
    }


def computed(call: dict[str, Any], causal: bool = True, **options: Any) -> list[Any]:
    """Output, lse and all gradients of a call."""
    inputs = {name: x for name, x in call.items() if not name.startswith("grad")}
    (out, lse), pullback = tattn.tensor_attention_vjp(**inputs, causal=causal, return_lse=True, **options)
    dquery, *of_views = pullback(call["grad_out"], call["grad_lse"])
    return [out, lse, dquery, *(x for several in of_views for x in several)]


def plan_of(call: dict[str, Any], degree: int = 4, causal: bool = True, **options: Any) -> tattn.Plan:
    lengths = [x.shape[-2] for x in (call["query"], *call["keys"])]
    facts = {"dim": call["query"].shape[-1], "order": len(call["keys"]) + 1, "dtype": str(call["query"].dtype)}
    return tattn.plan_for(n=lengths, bound=1.0, degree=degree, causal=causal, **facts, **options)


def assert_the_same(call: dict[str, Any], plan: tattn.Plan, used: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels and without: a call's numbers, to rounding."""
    used.clear()
    causal = plan.causal
    got = computed(call, causal, plan=plan)
    assert set(used) == ({"read", "pull"} if causal else {"over_rows"})
    used.clear()
    monkeypatch.setenv(compiled.SWITCH, "0")
    expected = computed(call, causal, plan=plan)
    monkeypatch.delenv(compiled.SWITCH)
    assert used == []
    tolerance = 2e-4 if plan.dtype == "float32" else 1e-12
    # Terms of the gradient of a factor's logarithm are added up, and divided by the factor.
    factors = [float(np.min(x)) for x in call.get("decay", ())]
    least = [0.0] * (len(got) - len(factors)) + [1 / x for x in factors]
    for x, y, size in zip(got, expected, least, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        finite = np.isfinite(y)
        np.testing.assert_array_equal(x[~finite], y[~finite])
        largest = np.max(np.abs(y[finite]), initial=0.0)
        np.testing.assert_allclose(x[finite], y[finite], rtol=tolerance, atol=tolerance * max(largest, size))


@pytest.mark.grid("numpy")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("views", [1, 2, 3, 4])
@pytest.mark.parametrize("leading", list(LEADING))
@pytest.mark.parametrize("masked", [False, True])
def test_kernels_compute_what_the_array_form_does(dtype, views, leading, masked, used, monkeypatch):
    call = drawn(37, views, dtype, leading, masked)
    assert_the_same(call, plan_of(call), used, monkeypatch)


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 130, 300])
@pytest.mark.parametrize("views", [1, 2])
def test_rows_of_all_numbers(n, views, used, monkeypatch):
    """In one block, in several, and in several segments of these."""
    call = drawn(n, views, "float64", "shared", masked=n > 2)
    plan = plan_of(call)
    assert_the_same(call, plan, used, monkeypatch)
    with BACKEND.using(workspace=1 << 10):
        assert_the_same(call, plan, used, monkeypatch)


@pytest.mark.parametrize(("dim", "degree", "value_dim"), [(1, 1, 1), (2, 9, 5), (8, 4, 8), (5, 6, 1), (16, 2, 40)])
def test_monomials_of_all_numbers(dim, degree, value_dim, used, monkeypatch):
    call = drawn(45, 2, "float64", dim=dim, value_dim=value_dim)
    assert_the_same(call, plan_of(call, degree), used, monkeypatch)


DECAYS = {
    "one": ((), ()),
    "heads": ((3,), (3,)),
    "shared": ((3,), (2, 1)),
}


def with_decay(call: dict[str, Any], factor: float, leading: str = "one") -> dict[str, Any]:
    """The call with factors of all views up to this one, and some that are 1."""
    dtype, rng = call["query"].dtype, np.random.default_rng(7)
    shapes = [DECAYS[leading][i % 2] for i in range(len(call["keys"]))]
    decay = [np.asarray(factor ** rng.uniform(0.2, 1, shape), dtype) for shape in shapes]
    if leading != "one":
        decay[0][0] = 1
    return {**call, "decay": decay}


@pytest.mark.grid("numpy")
@channels
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("leading", list(LEADING))
def test_keys_that_decay(channels, dtype, views, leading, used, monkeypatch):
    call = with_decay(drawn(137, views, dtype, leading, True, dim=4), 0.6 if views < 3 else 0.9, leading)
    assert_the_same(call, plan_of(call, channels=channels), used, monkeypatch)


@pytest.mark.grid("numpy")
@pytest.mark.parametrize("n", [1, 2, 31, 64, 130, 300])
@pytest.mark.parametrize("factor", [0.999, 0.2, 0.03, 0.002])
def test_keys_that_decay_as_fast_as_may_be(n, factor, used, monkeypatch):
    """By steps of 64, 32, 16 and 8 rows: in one block, in several, and in several segments of these."""
    call = drawn(n, 2, "float64", "shared", masked=n > 2)
    call["decay"] = [np.asarray(factor), np.asarray([factor, 0.9, 1])]
    plan = plan_of(call)
    steps = [int(rows_together(x * x, "float64")) for x in (0.999, 0.2, 0.03, 0.002)]
    assert steps == [64, 32, 16, 8]
    assert_the_same(call, plan, used, monkeypatch)
    with BACKEND.using(workspace=1 << 10):
        assert_the_same(call, plan, used, monkeypatch)


@pytest.mark.parametrize("decaying", [False, True])
def test_what_a_block_of_causal_rows_begins_with_is_summed_up_by_loops(decaying, loops, monkeypatch):
    compile_for("prefix_read", "prefix_pull", "sum_rows")
    monkeypatch.setattr(causal_features, "_KERNEL_ROWS", 64)
    call = drawn(300, 2, "float64", "shared", True)
    call = with_decay(call, 0.9, "shared") if decaying else call
    every = compiled.kernels_for(BACKEND, lambda *arrays: True, pays=lambda *size: True)
    with BACKEND.using(kernels=every), calls_of(over_rows, code_within(compiled.prefix_pull, "pull")) as seen:
        got = computed(call, plan=plan_of(call))
    # Of each view for every block but the last, before this is pulled back.
    names = [x.name for x in seen]
    assert names.count("pull") == 5
    assert names[: names.index("pull")].count("over_rows") >= 8
    monkeypatch.setenv(compiled.SWITCH, "0")
    for x, y in zip(got, computed(call, plan=plan_of(call)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12 * np.max(np.abs(y[np.isfinite(y)])))


@pytest.mark.parametrize("order", [{"causal": True}, {"window": (20, 30)}], ids=str)
@pytest.mark.parametrize("factor", [1e-30, 0.0])
def test_keys_that_decay_faster_are_left_to_array_operations(factor, order, request):
    used = request.getfixturevalue("in_windows" if "window" in order else "used")
    call = drawn(70, 2, "float64", "heads")
    call["decay"] = [np.asarray([0.9, factor, 0.9]), 0.5]
    plan, rows = plan_of(call, **order), (call["query"], call["keys"], call["values"])
    got = tattn.tensor_attention(*rows, **order, decay=call["decay"], plan=plan)
    assert used == []
    truth = dense(*rows, **order, decay=call["decay"])
    assert np.abs(got - truth.out).max() <= plan.error * value_sizes(call["values"])[0].max()


def test_pruned_monomials(used, monkeypatch):
    call = drawn(45, 2, "float64", dim=6)
    for x in (call["query"], *call["keys"]):
        x[:, 2:] *= 0.1
    plan = tattn.plan(call["query"], call["keys"], call["values"], method="polynomial", causal=True, tol=3e-2, scale=0.3,
                      gradients=False)  # fmt: skip
    assert plan.grading
    assert_the_same(call, plan, used, monkeypatch)


@pytest.mark.grid("numpy")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("views", [1, 2, 3, 4])
@pytest.mark.parametrize("leading", list(LEADING))
@pytest.mark.parametrize("masked", [False, True])
def test_complex_channels(dtype, views, leading, masked, used, monkeypatch):
    call = drawn(37, views, dtype, leading, masked, dim=4)
    assert_the_same(call, plan_of(call, channels="complex"), used, monkeypatch)


@pytest.mark.parametrize(("dim", "degree", "value_dim"), [(2, 1, 1), (2, 9, 5), (8, 4, 8), (6, 6, 1), (16, 2, 40)])
def test_complex_monomials_of_all_numbers(dim, degree, value_dim, used, monkeypatch):
    call = drawn(45, 2, "float64", dim=dim, value_dim=value_dim)
    assert_the_same(call, plan_of(call, degree, channels="complex"), used, monkeypatch)


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 64, 130, 300])
@pytest.mark.parametrize("views", [2, 3])
def test_complex_rows_of_all_numbers(n, views, used, monkeypatch):
    """In one block, in several, and in several segments of these."""
    call = drawn(n, views, "float64", "shared", masked=n > 2, dim=2)
    plan = plan_of(call, channels="complex")
    assert_the_same(call, plan, used, monkeypatch)
    with BACKEND.using(workspace=1 << 10):
        assert_the_same(call, plan, used, monkeypatch)


def test_pruned_complex_monomials(used, monkeypatch):
    call = drawn(45, 2, "float64", dim=8)
    for x in (call["query"], *call["keys"]):
        x[:, 1:4] *= 0.1
        x[:, 5:] *= 0.1
    plan = tattn.plan(call["query"], call["keys"], call["values"], method="polynomial", causal=True, tol=3e-2, scale=0.3,
                      gradients=False, channels="complex")  # fmt: skip
    assert plan.grading
    assert len(set(plan.grading)) > 1
    assert_the_same(call, plan, used, monkeypatch)


@pytest.mark.parametrize("views", [2, 3])
def test_scores_of_turned_rows_do_not_depend_on_where_they_stand(views, used):
    """Rotary positions from 0 and from 10⁵ on, in float32 and float64."""
    for dtype, tolerance in (("float32", 3e-5), ("float64", 1e-10)):
        call = drawn(150, views, dtype, dim=8)
        frequencies = np.random.default_rng(0).uniform(0, 1, (views, 4)).astype(dtype)

        def turned(position: int, call: dict[str, Any] = call, frequencies: np.ndarray = frequencies) -> dict[str, Any]:
            query, keys = call["query"], []
            for k, f in zip(call["keys"], frequencies, strict=True):
                query = tattn.rotary(query, position + np.arange(150), f)
                keys.append(tattn.rotary(k, position + 150 - len(k) + np.arange(len(k)), -f))
            return {**call, "query": query, "keys": keys}

        plan = plan_of(call, channels="complex")
        used.clear()
        here, there = (computed(turned(position), plan=plan)[:2] for position in (0, 100_000))
        assert set(used) == {"read", "pull"}
        for x, y in zip(here, there, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


@pytest.fixture
def passes(loops: Any) -> Iterator[Names]:
    """Tells of every time that a loop over all rows runs, which calls of all sizes use."""
    compile_for(*OF_ROWS, *OF_DOCUMENTS)
    every = compiled.kernels_for(BACKEND, lambda *arrays: True, pays=lambda *size: True)
    watched = over_rows, compiled.read_documents, compiled.pull_documents
    with BACKEND.using(kernels=every), calls_of(*watched) as seen:
        yield Names(seen)


# Loops over documents that stand in the rows.
IN_PLACE = {"read_documents", "pull_documents"}


@pytest.mark.grid("numpy")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("leading", list(LEADING))
@pytest.mark.parametrize("masked", [False, True])
def test_passes_over_all_rows_compute_what_the_array_form_does(dtype, views, leading, masked, passes, monkeypatch):
    call = drawn(150, views, dtype, leading, masked)
    assert_the_same(call, plan_of(call, causal=False), passes, monkeypatch)


@pytest.mark.parametrize("n", [90, 127, 128, 129, 300])
def test_passes_over_rows_of_all_numbers(n, passes, monkeypatch):
    """In one block and in several, which leave a rest."""
    call = drawn(n, 2, "float64", masked=True)
    plan = plan_of(call, causal=False)
    assert_the_same(call, plan, passes, monkeypatch)
    computed(call, causal=False, plan=plan)
    whole = len(passes)
    with BACKEND.using(workspace=1 << 10):
        assert_the_same(call, plan, passes, monkeypatch)
        computed(call, causal=False, plan=plan)
    assert (len(passes) > whole) == (n + 3 > 128)


@pytest.mark.parametrize(
    ("dim", "degree", "value_dim"), [(1, 1, 1), (1, 30, 2), (2, 9, 5), (8, 4, 8), (5, 6, 1), (16, 2, 40)]
)
def test_passes_over_monomials_of_all_numbers(dim, degree, value_dim, passes, monkeypatch):
    call = drawn(260, 2, "float64", dim=dim, value_dim=value_dim)
    assert_the_same(call, plan_of(call, degree, causal=False), passes, monkeypatch)


def test_passes_over_pruned_and_complex_monomials(passes, monkeypatch):
    call = drawn(200, 2, "float64", dim=6)
    for x in (call["query"], *call["keys"]):
        x[:, 2:] *= 0.1
    given = call["query"], call["keys"], call["values"]
    plan = tattn.plan(*given, method="polynomial", tol=3e-2, scale=0.3, gradients=False)
    assert plan.grading
    assert_the_same(call, plan, passes, monkeypatch)
    assert_the_same(call, plan_of(call, causal=False, channels="complex"), passes, monkeypatch)


def test_passes_over_weighted_and_spoiled_rows(passes, monkeypatch):
    """Gradients of weights are read, too; what is no number spoils what it spoils in the array form."""
    call = drawn(200, 2, "float64", "heads")
    plan = plan_of(call, causal=False)
    weights = [np.random.default_rng(i).uniform(0, 2, k.shape[:-1]) for i, k in enumerate(call["keys"])]
    weights[0][:, 3] = 0

    def weighted() -> Any:
        inputs = {name: x for name, x in call.items() if name in ("query", "keys", "values")}
        out, pullback = tattn.tensor_attention_vjp(**inputs, key_weights=weights, plan=plan)
        dquery, *of_views = pullback(call["grad_out"])
        return [out, dquery, *(x for of_kind in of_views for x in of_kind)]

    found = weighted()
    assert set(passes) == {"over_rows"}
    monkeypatch.setenv(compiled.SWITCH, "0")
    for x, y in zip(found, weighted(), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-11 * np.abs(y).max())
    monkeypatch.delenv(compiled.SWITCH)
    for name, value in (("query", np.nan), ("query", np.inf), ("values", np.inf)):
        spoiled = {key: _each(np.copy, x) for key, x in call.items()}
        rows = spoiled[name] if name == "query" else spoiled[name][1]
        rows[1, 20, 1] = value
        assert_the_same(spoiled, plan, passes, monkeypatch)


def test_passes_are_spread_over_threads(passes):
    call = drawn(2300, 2, "float64", "heads", dim=8, value_dim=8)
    plan = plan_of(call, causal=False)
    expected = computed(call, causal=False, plan=plan)
    alone = len(passes)
    with BACKEND.using(threads=lambda: 2):
        shared = computed(call, causal=False, plan=plan)
    assert len(passes) > 2 * alone
    for x, y in zip(shared, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-13 * np.abs(y).max())


# Rows of documents: none, one, fewer than scores are cheaper for, and all about tiles of 128 and the steps of 16 in them.
DOCUMENTS = (0, 1, 5, 15, 16, 17, 64, 127, 128, 129, 145, 300, 0, 64, 9, 2)


def packed(dtype: str, leading: str, masked: bool, more: Sequence[int] = (0, 0)) -> tuple[dict[str, Any], list[Any]]:
    """A call of `DOCUMENTS`, which have so many more rows in every view; and offsets."""
    offsets = [np.concatenate([[0], np.cumsum([n + extra for n in DOCUMENTS])]) for extra in (0, *more)]
    call = drawn(int(offsets[-1][-1]), 2, dtype, leading, masked, dim=4)
    counts = [int(own[-1]) for own in offsets]
    call |= {name: call[name][..., : counts[0], :] for name in ("query", "grad_out")}
    call["grad_lse"] = call["grad_lse"][..., : counts[0]]
    for name in ("keys", "values"):
        call[name] = [x[..., :n, :] for x, n in zip(call[name], counts[1:], strict=True)]
    if masked:
        call["key_masks"] = [call["key_masks"][0][..., : counts[1]], None]
    return call, offsets


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("leading", "masked", "more"), [("one", False, (0, 0)), ("one", True, (1, 7)), ("heads", True, (0, 3))]
)
def test_passes_over_packed_documents_compute_what_the_array_form_does(
    dtype, leading, masked, more, passes, monkeypatch
):
    """Where they stand, and in groups, which are what weights of keys are left to."""
    call, own = packed(dtype, leading, masked, more)
    weights = [np.ones(k.shape[:-1], k.dtype) for k in call["keys"]]
    for given in (through_features(plan_of(call, 5, causal=False)), plan_of(call, 5, causal=False)):
        passes.clear()
        found = [computed(call, causal=False, plan=given, offsets=own)]
        assert set(passes) == IN_PLACE
        if not masked:
            passes.clear()
            weighed = {**call, "key_weights": weights}
            found.append(computed(weighed, causal=False, plan=given, offsets=own)[: len(found[0])])
            assert set(passes) == {"over_rows"}
        monkeypatch.setenv(compiled.SWITCH, "0")
        for each in found:
            assert_documents(each, call, own, given)
        monkeypatch.delenv(compiled.SWITCH)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_packed_documents_that_are_long_or_spoiled(views, passes, monkeypatch):
    """Those of more rows than sums go without compensation are shared out by rows, and so are documents of three views."""
    counts = [40, 4200, 64, 4097, 4096, 30, 70, 30]
    ends = np.cumsum([0, *counts])
    call = drawn(int(ends[-1]), views, "float64", dim=2)
    for name in ("keys", "values"):
        call[name] = [x[: ends[-1]] for x in call[name]]
    # A number that is none, rows far beyond what was promised, and channels that are 0 everywhere or beside large ones.
    call["query"][ends[2], 0] = np.nan
    call["values"][0][ends[3] + 5, 1] = np.inf
    call["keys"][0][ends[5] : ends[5] + 3] *= 1e30
    call["keys"][0][ends[6] : ends[7], 0] = 0
    call["query"][ends[7] :] *= 1e-30
    call["keys"][0][ends[7] :] *= 1e30
    plan = through_features(plan_of(call, 3, causal=False))
    passes.clear()
    found = computed(call, causal=False, plan=plan, offsets=ends)
    assert set(passes) == {"over_rows", *(IN_PLACE if views < 3 else ())}
    monkeypatch.setenv(compiled.SWITCH, "0")
    expected = computed(call, causal=False, plan=plan, offsets=ends)
    for x, y in zip(found, expected, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        for start, stop in pairwise(ends):
            got, wanted = x[start:stop], y[start:stop]
            finite = np.isfinite(wanted)
            np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
            largest = np.max(np.abs(wanted[finite]), initial=0.0)
            np.testing.assert_allclose(got[finite], wanted[finite], rtol=1e-9, atol=1e-11 * largest)


def test_packed_documents_at_the_end_may_be_without_keys(passes, monkeypatch):
    """They take nothing from the gradients of the document before, of which they are blocks apart."""
    call = drawn(290, 2, "float64")
    offsets = [np.asarray(own) for own in ([0, 200, 280], [0, 290, 290], [0, 210, 290])]
    call |= {name: call[name][:280] for name in ("query", "grad_out", "grad_lse")}
    call["keys"], call["values"] = [x[:290] for x in call["keys"]], [x[:290] for x in call["values"]]
    plan = through_features(plan_of(call, 4, causal=False))
    with BACKEND.using(workspace=1 << 12):
        found = computed(call, causal=False, plan=plan, offsets=offsets)
    assert len(passes) == 4
    assert set(passes) == IN_PLACE
    monkeypatch.setenv(compiled.SWITCH, "0")
    for x, y in zip(found, computed(call, causal=False, plan=plan, offsets=offsets), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-13)


def test_gradients_of_packed_documents_do_not_depend_on_whether_errors_are_told(passes):
    call, offsets = packed("float64", "one", True, (1, 7))
    plan = plan_of(call, 5, causal=False)
    given = {name: x for name, x in call.items() if not name.startswith("grad")}
    expected = computed(call, causal=False, plan=plan, offsets=offsets)
    assert set(passes) == IN_PLACE
    result, pullback = tattn.tensor_attention_vjp(
        **given, plan=plan, offsets=offsets, return_lse=True, return_error=True
    )
    dquery, *of_views = pullback(call["grad_out"], call["grad_lse"])
    found = [*result[:2], dquery, *(x for several in of_views for x in several)]
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-13)


def test_packed_documents_tell_how_far_they_are(passes):
    call, own = packed("float64", "one", False)
    told: list[tuple[int, int]] = []
    given = call["query"], call["keys"], call["values"]
    plan = through_features(plan_of(call, 5, causal=False))
    with BACKEND.using(workspace=1 << 12):
        tattn.tensor_attention(*given, plan=plan, offsets=own, progress=lambda *rows: told.append(rows))
    assert len(passes) > 1
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (len(call["query"]),) * 2


def assert_documents(found: list[Any], call: dict[str, Any], offsets: Sequence[Any], plan: tattn.Plan) -> None:
    """The numbers of a packed call are those of a call for every document."""
    tolerance = 2e-4 if plan.dtype == "float32" else 1e-11
    for number in range(len(DOCUMENTS)):
        cuts = [slice(own[number], own[number + 1]) for own in offsets]
        if cuts[0].start == cuts[0].stop:
            continue
        one = {name: call[name][..., cuts[0], :] for name in ("query", "grad_out")}
        one["grad_lse"] = call["grad_lse"][..., cuts[0]]
        for name in ("keys", "values"):
            one[name] = [x[..., cut, :] for x, cut in zip(call[name], cuts[1:], strict=True)]
        masks = call["key_masks"] or [None, None]
        one["key_masks"] = [m if m is None else m[..., cut] for m, cut in zip(masks, cuts[1:], strict=True)]
        sides = (cuts[0], cuts[0], cuts[0], *cuts[1:], *cuts[1:])
        for i, (x, y, cut) in enumerate(zip(found, computed(one, plan.causal, plan=plan), sides, strict=True)):
            got = x[..., cut] if i == 1 else x[..., cut, :]
            finite = np.isfinite(y)
            np.testing.assert_array_equal(got[~finite], y[~finite])
            np.testing.assert_allclose(
                got[finite], y[finite], rtol=tolerance, atol=tolerance * np.max(np.abs(y[finite]), initial=0.0)
            )


def test_threads_share_documents(passes):
    """Each document is one thread's: every number is what it is on one thread."""
    call, offsets = packed("float64", "one", False)
    call = {name: x if x is None else _each(lambda x: np.concatenate([x] * 12, axis=-1 - (x.ndim > 1)), x)
            for name, x in call.items()}  # fmt: skip
    own = np.concatenate([offsets[0], *(offsets[0][1:] + i * offsets[0][-1] for i in range(1, 12))])
    plan = through_features(plan_of(call, 6, causal=False))
    for weights, tasks in ((None, compiled.read_documents), ([np.ones(k.shape[:-1]) for k in call["keys"]],
                                                             code_within(over_rows, "compute"))):  # fmt: skip
        given = {**call, "key_weights": weights}
        with calls_of(tasks) as alone:
            expected = computed(given, causal=False, plan=plan, offsets=own)
        with BACKEND.using(threads=lambda: 2), calls_of(tasks) as shared:
            found = computed(given, causal=False, plan=plan, offsets=own)
        assert len(shared) > len(alone)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_array_equal(x, y)


def test_packed_documents_of_torch(loops):
    """Only gradients that are asked for are computed, and a second derivative needs no loops."""
    torch = pytest.importorskip("torch")

    compile_for(*OF_DOCUMENTS)
    rng, offsets = np.random.default_rng(0), torch.tensor([0, 300, 301, 700, 8600])
    arrays = [torch.tensor(rng.uniform(-1, 1, (8600, d)).astype(np.float32)) for d in (3, 3, 3, 2, 2)]
    plan = tattn.plan_for(n=8600, dim=3, value_dim=2, bound=1.0, degree=10, order=3, method="polynomial")

    def gradients(asked: Sequence[int], graph: bool = False) -> list[Any]:
        given = [x.clone().requires_grad_(i in asked) for i, x in enumerate(arrays)]
        out = tattn.tensor_attention(given[0], given[1:3], given[3:], plan=plan, offsets=offsets)
        wanted = [given[i] for i in asked]
        found = torch.autograd.grad((out**2).sum(), wanted, create_graph=graph)
        return [out.detach(), *found]

    with calls_of(compiled.read_documents, compiled.pull_documents) as seen:
        out, *every = gradients(range(5))
        for asked in ((0,), (2,), (3, 1)):
            for i, found in zip(asked, gradients(asked)[1:], strict=True):
                torch.testing.assert_close(found, every[i], rtol=0, atol=0)
    assert {call.name for call in seen} == IN_PLACE
    assert {call.given["spans"].wanted for call in seen if call.name == "pull_documents"} == {
        (True, True), (False, False), (False, True), (True, False),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(compiled.SWITCH, "0")
        for x, y in zip([out, *every], gradients(range(5)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))
    _, twice = gradients([4], graph=True)
    torch.testing.assert_close(twice.detach(), every[4], rtol=1e-4, atol=1e-5 * float(every[4].abs().max()))
    assert twice.grad_fn is not None


@pytest.fixture
def prefixes(loops: Any) -> Iterator[list[Seen]]:
    """The blocks of causal rows that loops compute."""
    compile_for("size_documents", *(kind + name for kind in ("", "complex_") for name in OF_PREFIXES))
    with calls_of(compiled.prefix_read, compiled.prefix_pull) as seen:
        yield seen


def where(seen: list[Seen]) -> dict[str, set[str]]:
    """Of both operations how documents were computed: where they stand, or in groups."""
    found: dict[str, set[str]] = {}
    for call in seen:
        way = "in groups" if call.given["block"].documents is None else "in place"
        found.setdefault(call.name, set()).add(way)
    seen.clear()
    return found


def everywhere(*ways: str) -> dict[str, set[str]]:
    return {name: set(ways) for name in ("prefix_read", "prefix_pull")}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("leading", "masked", "channels"),
    [("one", False, "real"), ("heads", True, "real"), ("shared", True, "real"), ("shared", True, "complex")],
)
def test_causal_documents_are_computed_where_they_stand(dtype, leading, masked, channels, prefixes, monkeypatch):
    """In one block and in several."""
    call, own = packed(dtype, leading, masked)
    plan = plan_of(call, 5, channels=channels)
    found = [computed(call, plan=plan, offsets=own)]
    assert where(prefixes) == everywhere("in place")
    with BACKEND.using(workspace=1 << 14):
        found.append(computed(call, plan=plan, offsets=own))
        assert len(prefixes) > 2
        assert where(prefixes) == everywhere("in place")
    monkeypatch.setenv(compiled.SWITCH, "0")
    for each in found:
        assert_documents(each, call, own, plan)
    assert where(prefixes) == {}


@pytest.mark.parametrize("channels", ["real", "complex"])
def test_causal_documents_of_one_view(channels, prefixes, monkeypatch):
    call, own = packed("float64", "heads", True)
    call |= {name: call[name][:1] for name in ("keys", "values", "key_masks")}
    plan = plan_of(call, 5, channels=channels)
    found = computed(call, plan=plan, offsets=own[:2])
    assert where(prefixes) == everywhere("in place")
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert_documents(found, call, own[:2], plan)


def test_causal_documents_of_pruned_monomials(prefixes, monkeypatch):
    call, own = packed("float64", "one", False)
    for x in (call["query"], *call["keys"]):
        x[:, 1:] *= 0.1
    given = call["query"], call["keys"], call["values"]
    plan = tattn.plan(*given, method="polynomial", causal=True, tol=3e-2, scale=1.0, gradients=False)
    assert plan.grading
    found = computed(call, plan=plan, offsets=own)
    assert where(prefixes) == everywhere("in place")
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert_documents(found, call, own, plan)


def test_causal_documents_that_are_left_to_groups(prefixes, monkeypatch):
    """Of views with rows in front, with weights of keys, and where errors of the rows are told."""
    call, own = packed("float64", "one", False, (0, 3))
    plan, ways = plan_of(call, 5), everywhere("in groups")
    found = computed(call, plan=plan, offsets=own)
    assert where(prefixes) == ways
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert_documents(found, call, own, plan)
    monkeypatch.delenv(compiled.SWITCH)
    call, own = packed("float64", "one", False)
    weights = [np.ones(k.shape[:-1]) for k in call["keys"]]
    expected = computed(call, plan=plan, offsets=own)
    assert where(prefixes) == everywhere("in place")
    found = computed({**call, "key_weights": weights}, plan=plan, offsets=own)[: len(expected)]
    assert where(prefixes) == ways
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-13)
    tattn.tensor_attention(
        call["query"], call["keys"], call["values"], causal=True, plan=plan, offsets=own, return_error=True
    )
    assert where(prefixes) == {"prefix_read": {"in groups"}}


@pytest.mark.parametrize("channels", ["real", "complex"])
def test_causal_documents_that_are_long_or_spoiled(channels, prefixes, monkeypatch):
    """These alone are computed in groups, and the rows that they do not spoil are what they are without them."""
    counts = [40, 4200, 64, 20, 70, 30, 90, 200]
    ends = np.cumsum([0, *counts])
    call = drawn(int(ends[-1]), 2, "float64", dim=2)
    for name in ("keys", "values"):
        call[name] = [x[: ends[-1]] for x in call[name]]
    plan = plan_of(call, 4, channels=channels)
    usual = computed(call, plan=plan, offsets=ends)
    assert where(prefixes) == everywhere("in place", "in groups")
    # A number that is none, rows far beyond what was promised, and channels that are 0 everywhere or beside large ones.
    call["query"][ends[2] + 20, 0] = np.nan
    call["values"][0][ends[3] + 5, 1] = np.inf
    call["grad_out"][ends[4] + 7, 0] = np.nan
    call["keys"][0][ends[5] + 9 : ends[5] + 12] *= 1e5
    call["keys"][0][ends[6] : ends[7], 0] = 0
    call["query"][ends[7] :] *= 1e-30
    call["keys"][0][ends[7] :] *= 1e30
    prefixes.clear()
    found = computed(call, plan=plan, offsets=ends)
    rows = {name: {seen.given["block"].q.shape[-2] for seen in prefixes
                   if seen.name == name and seen.given["block"].documents is None} for name in everywhere()}  # fmt: skip
    assert rows == {"prefix_read": {64, 20, 30, 4200}, "prefix_pull": {64, 20, 70, 30, 4200}}
    monkeypatch.setenv(compiled.SWITCH, "0")
    expected = computed(call, plan=plan, offsets=ends)
    for x, y, z in zip(found, expected, usual, strict=True):
        np.testing.assert_array_equal(np.isnan(x), np.isnan(y))
        for start, stop in pairwise(ends):
            got, wanted = x[start:stop], y[start:stop]
            finite = np.isfinite(wanted)
            largest = np.max(np.abs(wanted[finite]), initial=0.0)
            np.testing.assert_allclose(got[finite], wanted[finite], rtol=1e-9, atol=1e-11 * largest)
        np.testing.assert_allclose(x[: ends[2]], z[: ends[2]], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [2, 24])
def test_either_pass_over_documents_may_be_by_loops(causal, groups, passes, monkeypatch):
    """What the first keeps serves the other: sums are over as many rows as a group is padded to, wherever they are made."""
    call, own = packed("float64", "heads", True)
    plan = through_features(plan_of(call, 5, causal=causal))
    given = {name: x for name, x in call.items() if not name.startswith("grad")}
    found, loops = [], (compiled.prefix_read, compiled.prefix_pull, compiled.read_documents, compiled.pull_documents)
    with BACKEND.using(groups=groups), calls_of(*loops) as seen:
        for ways in product("01", repeat=2):
            seen.clear()
            monkeypatch.setenv(compiled.SWITCH, ways[0])
            _, pullback = tattn.tensor_attention_vjp(**given, causal=causal, plan=plan, offsets=own, return_lse=True)
            monkeypatch.setenv(compiled.SWITCH, ways[1])
            dquery, *of_views = pullback(call["grad_out"], call["grad_lse"])
            assert [loop.name for loop in seen] == [
                loops[i + 2 * (not causal)].__name__ for i in (0, 1) if ways[i] == "1"
            ]
            found.append([dquery, *(x for several in of_views for x in several)])
    expected, *others = found
    for each in others:
        for x, y in zip(each, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_error_of_causal_documents_exceeds_the_plan(dtype, prefixes):
    worst = 0.0
    for seed in range(6):
        rng, ends = np.random.default_rng(seed), np.cumsum([0, 70, 3, 64])
        query, *keys = rng.uniform(-1, 1, (3, ends[-1], 3)).astype(dtype)
        values = list(rng.normal(size=(2, ends[-1], 2)).astype(dtype))
        plan = tattn.plan(query, keys, values, causal=True, degree=1 + seed)
        out = tattn.tensor_attention(query, keys, values, causal=True, plan=plan, offsets=ends)
        for start, stop in pairwise(ends):
            own = query[start:stop], [k[start:stop] for k in keys], [v[start:stop] for v in values]
            sizes = value_sizes(own[2])
            share = np.abs(out[start:stop] - dense(*own, causal=True).out).max() / (plan.error * sizes.max())
            assert share <= 1, (seed, share)
            worst = max(worst, share)
    assert where(prefixes) == {"prefix_read": {"in place"}}
    assert worst > 0.01


def test_threads_share_causal_documents(prefixes):
    """Each document is one thread's: every number is what it is on one thread."""
    call, (ends, *_) = packed("float64", "one", False)
    call = {name: x if x is None else _each(lambda x: np.concatenate([x] * 12, axis=-1 - (x.ndim > 1)), x)
            for name, x in call.items()}  # fmt: skip
    own = np.concatenate([ends, *(ends[1:] + i * ends[-1] for i in range(1, 12))])
    plan = plan_of(call, 4)
    expected, alone = computed(call, plan=plan, offsets=own), len(prefixes)
    prefixes.clear()
    with BACKEND.using(threads=lambda: 2):
        found = computed(call, plan=plan, offsets=own)
    assert len(prefixes) > alone
    assert where(prefixes) == everywhere("in place")
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.libraries("torch")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_causal_documents_of_torch(dtype, prefixes, monkeypatch):
    import torch

    rng, offsets = np.random.default_rng(0), torch.tensor([0, 150, 151, 400])
    arrays = [torch.tensor(rng.uniform(-1, 1, (400, d)), dtype=getattr(torch, dtype)) for d in (3, 3, 3, 2, 2)]
    plan = tattn.plan_for(n=400, dim=3, value_dim=2, bound=1.0, degree=4, order=3, causal=True, dtype=dtype)

    def gradients() -> list[Any]:
        given = [x.clone().requires_grad_() for x in arrays]
        out = tattn.tensor_attention(given[0], given[1:3], given[3:], plan=plan, causal=True, offsets=offsets)
        return [out.detach(), *torch.autograd.grad((out**2).sum(), given)]

    found = gradients()
    assert where(prefixes) == everywhere("in place")
    monkeypatch.setenv(compiled.SWITCH, "0")
    expected = gradients()
    assert where(prefixes) == {}
    close = 1e-4 if dtype == "float32" else 2e-2
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=close, atol=0.1 * close * float(y.abs().max()))


def test_sums_of_long_documents_are_kept_for_the_gradient(passes):
    """Beside documents whose sums are larger than their rows, or that have none: these make no others forget theirs."""
    counts = [3, 40, 300, 310]
    call, offsets = drawn(sum(counts), 1, "float64", dim=3), np.concatenate([[0], np.cumsum(counts)])
    plan, upstream = plan_of(call, 5, causal=False), (call["grad_out"], call["grad_lse"])
    given, weights = (call["query"], call["keys"], call["values"]), [np.ones(sum(counts))]
    _, pullback = tattn.tensor_attention_vjp(*given, key_weights=weights, plan=plan, offsets=offsets, return_lse=True)
    forward = len(passes)
    pullback(*upstream)
    # Of query and of keys and values; none again for the sums.
    assert forward and len(passes) - forward == forward


def ratios_of_repeated(call: Any, plan: tattn.Plan, times: int, scale: float, options: dict[str, Any]) -> Any:
    """Errors of a call in parts of what the plan states, every key so many times; against the definition in a wider dtype."""
    keys, values = ([np.repeat(x, times, axis=0) for x in of_views] for of_views in (call.keys, call.values))
    out, pullback = tattn.tensor_attention_vjp(call.query, keys, values, **options)
    dquery, *of_views = pullback(call.grad)
    dkeys, dvalues = ([x.reshape(-1, times, x.shape[1]).sum(1) for x in of_kind] for of_kind in of_views)
    wide = np.float64 if call.query.dtype == np.float32 else np.longdouble
    truth = dense(call.query, call.keys, call.values, scale=scale, grad_out=call.grad, precision=wide)
    return ratios(plan, call, Dense(out, out, dquery, dkeys, dvalues), truth)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_error_of_passes_exceeds_the_plan(dtype, passes):
    """Output and gradients of all kinds of rows, as `tests/bounds` has them, every key forty times: that changes no sum."""
    worst = 0.0
    for seed in range(24):
        for kind in KINDS:
            views, bound = 1 + seed % 3, (0.1, 1.0, 2.0, 3.0)[seed % 4]
            call, scale = sample(kind, seed, views, bound, dtype)
            promise = {"bound": bound * (1 + 1e-6)} if seed % 2 else {}
            plan = through_features(
                tattn.plan(call.query, call.keys, call.values, scale=scale, degree=1 + seed % 8, **promise)
            )
            if not np.isfinite(plan.error):
                continue
            # Some as a packed call of one document.
            ends = [np.asarray([0, n]) for n in (len(call.query), *(40 * len(k) for k in call.keys))]
            for options in ({}, {"offsets": ends})[: 1 + (seed % 4 == 0)]:
                found = ratios_of_repeated(call, plan, 40, scale, {"plan": plan, **options})
                assert max(found) <= 1, (seed, kind, found, str(plan))
                worst = max(worst, *found)
    assert set(passes) == {"over_rows", *IN_PLACE}
    assert worst > 0.1


def test_sums_of_passes_over_long_sequences_do_not_drift(passes):
    """Equal rows, which round alike: tile after tile, and block after block."""
    n = 300_000
    query, key, value = (np.full((n, 1), x, np.float32) for x in (0.1, 0.3, 0.7))
    plan = tattn.plan_for(n=n, dim=1, bound=0.1, degree=4, order=3)
    out, pullback = tattn.tensor_attention_vjp(query, [key, key], [value, value], plan=plan)
    assert np.max(np.abs(out / float(np.float32(0.7)) ** 2 - 1)) <= plan.error < 2e-5
    _, _, dvalues = pullback(np.ones_like(out))
    assert np.max(np.abs(dvalues[0] / float(np.float32(0.7)) - 1)) <= plan.error
    assert set(passes) == {"over_rows"}


def test_passes_take_the_sizes_that_they_are_faster_for(loops):
    """Few monomials are not worth loading numba for, and many take memory; few rows are not worth turning many columns for."""

    def taken(
        *shape: int, dim: int = 8, degree: int = 4, dtype: str = "float32", columns: int = 9, in_all: int = 0
    ) -> bool:
        x = np.ones((*shape, dim), dtype)
        rows = rows_of(x, Monomials(degree), columns, shape[:-1])._replace(in_all=in_all)
        return BACKEND.kernel("sum_rows", rows, x, x) is not None

    assert taken(8192)
    assert taken(65536, dtype="float64")
    assert taken(64, 128)
    assert taken(256)
    assert not taken(128)
    assert taken(64, 130)
    assert taken(1024, 5)
    assert not taken(2, 65)
    assert taken(2, 65, in_all=512)
    assert taken(4096, dim=16)
    assert not taken(4096, dim=16, degree=5)
    assert taken(65536, degree=2)
    assert taken(8192, columns=65)
    assert not taken(65536, degree=2, columns=65)
    assert taken(64, 128, columns=65)
    assert not taken(256, 32, columns=65)


def test_code_for_passes_serves_arrays_of_all_layouts_and_flags(passes):
    """Each dtype has one version of it, and no memory that calls may not write to is written."""
    for leading, dtype in product(LEADING, ("float32", "float64")):
        call = drawn(150, 2, dtype, leading)
        plan = plan_of(call, causal=False)
        expected = computed(call, causal=False, plan=plan)
        turned = {
            name: _each(lambda x: np.swapaxes(np.ascontiguousarray(np.swapaxes(x, -1, -2)), -1, -2), x) if name != "grad_lse" else x
            for name, x in call.items()
        }  # fmt: skip
        for name, x in turned.items():
            if name != "key_masks":
                _each(lambda array: array.setflags(write=False), x)
        for x, y in zip(computed(turned, causal=False, plan=plan), expected, strict=True):
            np.testing.assert_array_equal(x, y)
    assert len(loaded()[0].rows.compute.signatures) == 2


@pytest.fixture
def scores(loops: Any) -> Iterator[Names]:
    """Tells of every time that a loop over tuples runs, which calls of all sizes use."""
    compile_for(*OF_TUPLES)
    every = compiled.kernels_for(BACKEND, lambda *arrays: True, tuples_pay=lambda call: True)
    with BACKEND.using(kernels=every), calls_of(compiled.attend_tuples, compiled.pull_tuples) as seen:
        yield Names(seen)


def assert_exact_alike(
    call: dict[str, Any], scores: Names, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[Any]:
    """The exact method with kernels and without: a call's numbers, to rounding."""
    scores.clear()
    if "plan" not in options:
        options["method"] = "exact"
    got = computed(call, causal=False, **options)
    assert set(scores) == {"attend_tuples", "pull_tuples"}
    scores.clear()
    monkeypatch.setenv(compiled.SWITCH, "0")
    expected = computed(call, causal=False, **options)
    monkeypatch.delenv(compiled.SWITCH)
    assert scores == []
    tolerance = 2e-5 if call["query"].dtype == np.float32 else 1e-13
    for x, y in zip(got, expected, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        finite = np.isfinite(y)
        np.testing.assert_array_equal(x[~finite], y[~finite])
        largest = np.max(np.abs(y[finite]), initial=0.0)
        np.testing.assert_allclose(x[finite], y[finite], rtol=tolerance, atol=tolerance * largest)
    return got


@pytest.mark.grid("numpy")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("leading", list(LEADING))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [0.3, 40.0])
def test_scores_of_tuples_are_what_array_operations_compute(dtype, views, leading, masked, scale, scores, monkeypatch):
    """Where they are known to be small, and where the largest is subtracted."""
    call = drawn(21 if views == 3 else 40, views, dtype, leading, masked)
    assert_exact_alike(call, scores, monkeypatch, scale=scale)


@pytest.mark.parametrize("n", [1, 15, 127, 128, 129, 256, 257, 300])
@pytest.mark.parametrize("scale", [0.3, 40.0])
def test_tuples_of_rows_of_all_numbers(n, scale, scores, monkeypatch):
    """In one block and in several; the last query rows and tuples of each leave room in their tiles."""
    call = drawn(n, 1, "float64", masked=n > 1)
    assert_exact_alike(call, scores, monkeypatch, scale=scale)
    with BACKEND.using(cache=1 << 12):
        assert_exact_alike(call, scores, monkeypatch, scale=scale)


@pytest.mark.parametrize(
    ("views", "dim", "value_dim"),
    [(1, 5, 2), (2, 1, 1), (2, 7, 6), (2, 8, 7), (2, 9, 8), (2, 17, 3), (2, 24, 40), (3, 6, 4)],
)
@pytest.mark.parametrize("channels", ["real", "complex"])
def test_tuples_of_channels_of_all_numbers(views, dim, value_dim, channels, scores, monkeypatch):
    dim += dim % 2 if channels == "complex" else 0
    call = drawn(40 if views < 3 else 15, views, "float64", dim=dim, value_dim=value_dim)
    assert_exact_alike(call, scores, monkeypatch, scale=0.2, channels=channels)


@pytest.mark.parametrize("lengths", [(1, 70), (70, 1), (5, 200), (200, 5)])
@pytest.mark.parametrize("channels", ["real", "complex"])
def test_tuples_of_views_of_very_different_lengths(lengths, channels, scores, monkeypatch):
    """In tiles of tuples of many rows of the one with few of the other, whichever comes first."""
    rng = np.random.default_rng(2)
    query, grad = rng.uniform(-1, 1, (2, 9, 4))
    keys, values = ([rng.uniform(-1, 1, (n, 4)) for n in lengths] for _ in range(2))
    masks = [np.arange(n) % 3 != 1 for n in lengths]
    call = {
        "query": query,
        "keys": keys,
        "values": values,
        "key_masks": masks,
        "grad_out": grad,
        "grad_lse": grad[:, 0],
    }
    for scale in (0.3, 40.0):
        assert_exact_alike(call, scores, monkeypatch, scale=scale, channels=channels)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_tuples_that_are_hidden_have_no_scores(dtype, scores, monkeypatch):
    """Beside a score of 0, which masked keys would have, those of all others vanish."""
    call = drawn(40, 2, dtype, masked=True)
    call["query"], call["keys"] = 1 + np.abs(call["query"]), [1 + np.abs(k) for k in call["keys"]]
    call["keys"][0] = -call["keys"][0]
    found = assert_exact_alike(call, scores, monkeypatch, scale=300.0)
    assert np.max(found[1]) < -800
    assert all(np.all(np.isfinite(x)) for x in found)


@pytest.mark.parametrize("scale", [0.3, 40.0])
def test_tuples_of_weighted_keys(scale, scores, monkeypatch):
    """Gradients of weights come with them, and a weight of 0 hides its key."""
    call = drawn(40, 2, "float64", "heads")
    weights = [np.random.default_rng(i).uniform(0, 2, k.shape[:-1]) for i, k in enumerate(call["keys"])]
    weights[0][:, 3] = 0

    def weighted() -> list[Any]:
        inputs = {name: x for name, x in call.items() if name in ("query", "keys", "values")}
        out, pullback = tattn.tensor_attention_vjp(**inputs, key_weights=weights, method="exact", scale=scale)
        dquery, *of_views = pullback(call["grad_out"])
        return [out, dquery, *(x for of_kind in of_views for x in of_kind)]

    found = weighted()
    assert set(scores) == {"attend_tuples", "pull_tuples"}
    monkeypatch.setenv(compiled.SWITCH, "0")
    for x, y in zip(found, weighted(), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12 * np.abs(y).max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exponentials_of_all_numbers(dtype, loops):
    """Two units of rounding at most; what vanishes is 0, what is too large infinite, and no number stays none."""
    code, (low, high) = loops_over_tuples(), (-86.5, 88.7) if dtype == "float32" else (-707.9, 709.7)
    x = np.random.default_rng(0).uniform(low, high, 40 * code.LANES).astype(dtype)
    x[:9] = [0.0, -0.0, 1e-30, -1e-30, low, high, 1.0, -1.0, 0.5]
    shift = np.zeros(code.LANES, dtype)
    with np.errstate(all="ignore"):
        truth = np.exp(x.astype(np.longdouble))
    numbers = code.exponents(dtype)
    code._weights(x, shift, True, code.ONCE, numbers)
    unit = 2.0**-24 if dtype == "float32" else 2.0**-53
    worst = np.max(np.abs(x / truth - 1)) / unit
    assert 0.5 < worst < 1.5
    small = np.random.default_rng(1).uniform(-16.5, 16.5, 40 * code.LANES).astype(dtype)
    truth = np.exp(small.astype(np.longdouble))
    code._weights(small, shift, False, code.ONCE, numbers)
    assert 0.5 < np.max(np.abs(small / truth - 1)) / unit < 1.5
    some = np.resize([np.nan, np.inf, -np.inf, 1e30, -1e30, low - 1, high + 1, 0.0], code.LANES).astype(dtype)
    code._weights(some, shift, True, code.ONCE, numbers)
    np.testing.assert_array_equal(some[:8], [np.nan, np.inf, 0.0, np.inf, 0.0, 0.0, np.inf, 1.0])


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_tuples_of_scores_of_all_sizes(size, scores, monkeypatch):
    call = drawn(40, 2, "float32")
    call["keys"] = [k * np.float32(size) for k in call["keys"]]
    call["query"] = call["query"] / np.float32(size)
    assert_exact_alike(call, scores, monkeypatch, scale=min(1.0, 1 / size))


def test_rows_without_numbers_spoil_tuples_as_array_operations_do(scores, monkeypatch):
    call = drawn(40, 2, "float64", "heads")
    plan = tattn.plan_for(n=[40, 40, 43], dim=3, bound=1.0, order=3, dtype="float64", method="exact")
    for name, value in (("query", np.nan), ("query", np.inf), ("keys", np.nan), ("values", np.inf)):
        spoiled = {key: _each(np.copy, x) for key, x in call.items()}
        rows = spoiled[name] if name == "query" else spoiled[name][1]
        rows[1, 20, 1] = value
        assert not np.all(np.isfinite(assert_exact_alike(spoiled, scores, monkeypatch, plan=plan)[0]))


def test_tuples_are_spread_over_threads(scores):
    call = drawn(600, 1, "float64", "heads", dim=8, value_dim=8)
    expected = computed(call, causal=False, method="exact")
    with BACKEND.using(threads=lambda: 2, shared_scores=1 << 10):
        shared = computed(call, causal=False, method="exact")
    assert set(scores) == {"attend_tuples", "pull_tuples"}
    for x, y in zip(shared, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-13 * np.abs(y).max())


def test_tuples_of_tensors_with_gradients(loops, monkeypatch):
    torch = pytest.importorskip("torch")
    call = drawn(128, 2, "float32", "heads", masked=True)
    given = [torch.tensor(x, requires_grad=True) for x in (call["query"], *call["keys"], *call["values"])]
    masks = [torch.tensor(call["key_masks"][0]), None]

    def numbers() -> list[np.ndarray]:
        out, lse = tattn.tensor_attention(
            given[0], given[1:3], given[3:], key_masks=masks, method="exact", scale=3.0, return_lse=True
        )
        gradients = torch.autograd.grad((out * torch.tensor(call["grad_out"])).sum() + lse.sum(), given)
        return [x.detach().numpy() for x in (out, lse, *gradients)]

    with calls_of(compiled.attend_tuples, compiled.pull_tuples) as seen:
        found = numbers()
        assert set(Names(seen)) == {"attend_tuples", "pull_tuples"}
    monkeypatch.setenv(compiled.SWITCH, "0")
    for x, y in zip(found, numbers(), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5 * np.abs(y).max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_error_of_tuples_exceeds_the_plan(dtype, scores):
    """Output and gradients of all kinds of rows, as `tests/bounds` has them, every key some times: that changes no sum."""
    worst = 0.0
    for seed in range(24):
        for kind in KINDS:
            views, bound = 1 + seed % 3, (0.1, 1.0, 3.0, 10.0)[seed % 4]
            call, scale = sample(kind, seed, views, bound, dtype)
            plan = tattn.plan(call.query, call.keys, call.values, scale=scale, method="exact")
            found = ratios_of_repeated(call, plan, (40, 8, 3)[views - 1], scale, {"scale": scale, "method": "exact"})
            assert max(found) <= 1, (seed, kind, found, str(plan))
            worst = max(worst, *found)
    assert set(scores) == {"attend_tuples", "pull_tuples"}
    assert worst > 0.001


def test_loops_take_tuples_where_they_are_faster(loops):
    """Few scores are not worth loading numba for; of few query rows a tile is not full."""
    rows = np.ones((4, 8), np.float32)

    def taken(n: int, scores: int) -> bool:
        return BACKEND.kernel("attend_tuples", Tuples(n, scores, 8, True), rows, rows) is not None

    assert taken(128, 128 * 64**2)
    assert not taken(128, 127 * 64**2)
    assert not taken(150, 1 << 30)
    assert taken(220, 1 << 30)


def test_causal_calls_and_keys_that_decay_are_left_to_array_operations(scores):
    call = drawn(20, 2, "float64")
    computed(call, causal=True, method="exact")
    computed(with_decay(call, 0.9), causal=True, method="exact")
    assert scores == []


@pytest.fixture
def in_windows(loops: Any) -> Iterator[Names]:
    """Tells of every time that compiled loops take rows in windows."""
    compile_for(*OF_WINDOWS)
    both = code_within(compiled.window_read, "read_windows"), code_within(compiled.window_pull, "pull_windows")
    with calls_of(*both) as seen:
        yield Names(seen)


def windows_are_the_same(
    call: dict[str, Any], window: tuple[int, ...], seen: Names, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    """With kernels, with room for few rows and for many, and without: the same numbers, to rounding."""
    plan = plan_of(call, window=window, **options)
    seen.clear()
    monkeypatch.setenv(compiled.SWITCH, "0")
    expected = computed(call, plan=plan, window=window)
    assert seen == []
    monkeypatch.delenv(compiled.SWITCH)
    tolerance = 2e-4 if plan.dtype == "float32" else 1e-12
    for workspace in (BACKEND.workspace, 1 << 14):
        seen.clear()
        with BACKEND.using(workspace=workspace):
            got = computed(call, plan=plan, window=window)
        assert set(seen) == {"read_windows", "pull_windows"}
        for x, y in zip(got, expected, strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            finite = np.isfinite(y)
            np.testing.assert_array_equal(x[~finite], y[~finite])
            largest = np.max(np.abs(y[finite]), initial=0.0)
            np.testing.assert_allclose(x[finite], y[finite], rtol=tolerance, atol=tolerance * max(largest, 1e-3))


@pytest.mark.grid("numpy")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("leading", list(LEADING))
@pytest.mark.parametrize("masked", [False, True])
def test_windows_are_what_array_operations_compute(dtype, views, leading, masked, in_windows, monkeypatch):
    call = drawn(90, views, dtype, leading, masked)
    windows_are_the_same(call, (20, 35, 70)[:views], in_windows, monkeypatch)


@pytest.mark.parametrize(
    ("n", "window"),
    [(2, (1, 1)), (4, (2, 2)), (70, (64, 64)), (65, (66, 64)), (200, (64, 150)), (300, (129, 64)), (300, (70, 303)),
     (400, (390, 31)), (700, (130, 260)), (700, (700, 40))],
)  # fmt: skip
def test_windows_of_all_lengths(n, window, in_windows, monkeypatch):
    """Of one block and of many, longer than the rows and shorter than a chunk; a view of which rows see all before them."""
    windows_are_the_same(drawn(n, 2, "float64", masked=n > 5), window, in_windows, monkeypatch, degree=2)


@pytest.mark.grid("numpy")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("leading", list(LEADING))
def test_windows_of_keys_that_decay(dtype, views, leading, in_windows, monkeypatch):
    call = with_decay(drawn(137, views, dtype, leading, True), 0.7 if views < 3 else 0.9, leading)
    windows_are_the_same(call, (20, 35, 70)[:views], in_windows, monkeypatch)


@pytest.mark.parametrize("window", [(130, 260), (64, 20)])
@pytest.mark.parametrize("factor", [0.999, 0.3, 0.003])
def test_windows_of_keys_that_decay_as_fast_as_may_be(window, factor, in_windows, monkeypatch):
    """In blocks as long as a window, and as short as 16 rows."""
    assert (rows_in_range(0.003**2, "float64"), rows_in_range(0.002**2, "float64")) == (16, 0)
    call = drawn(700 if factor < 0.1 else 300, 2, "float64", "shared", masked=True)
    call["decay"] = [np.asarray(factor), np.asarray([factor, 0.9, 1])]
    windows_are_the_same(call, window, in_windows, monkeypatch, degree=2)


@pytest.mark.parametrize("order", [{"causal": True}, {"window": (20, 30)}], ids=str)
@pytest.mark.parametrize("factor", [1e-30, 0.0])
def test_plans_price_calls_by_how_fast_keys_decay(order, factor, loops):
    """Array operations compute those whose keys decay too fast for compiled loops."""
    call = drawn(300, 2, "float32", "heads")
    given = call["query"], call["keys"], call["values"]
    options = {"method": "polynomial", "return_plan": True, **order}
    _, plain = tattn.tensor_attention(*given, **options)
    _, slow = tattn.tensor_attention(*given, decay=[0.9, np.full(3, 0.9, np.float32)], **options)
    _, fast = tattn.tensor_attention(*given, decay=[0.9, np.asarray([0.9, 1, factor], np.float32)], **options)
    assert slow == plain and slow.flops_polynomial == plain.flops_polynomial < fast.flops_polynomial / 4


def test_sums_over_many_blocks_are_made_at_once(in_windows, monkeypatch):
    """Windows of unequal length: while such sums are few numbers, and some at a time where they are more than a few workspaces."""
    call = drawn(4500, 2, "float64", dim=6)
    windows_are_the_same(call, (150, 64), in_windows, monkeypatch, degree=4)
    plan = plan_of(call, window=(150, 64), degree=4)
    blocks = []
    for workspace in (BACKEND.workspace, 1 << 14):
        with BACKEND.using(workspace=workspace), calls_of(cut_of) as calls:
            computed(call, plan=plan, window=(150, 64))
        blocks.append({seen.result.blocks for seen in calls if seen.name == "cut_of"})
    assert blocks == [{1}, {2}]


def test_windows_drawn_at_random(in_windows, monkeypatch):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        views, n = int(rng.integers(1, 4)), int(rng.integers(40, 200))
        window = tuple(int(w) for w in np.exp(rng.uniform(np.log(20), np.log(n), views)))
        call = drawn(
            n,
            views,
            "float64",
            str(rng.choice(list(LEADING))),
            bool(rng.integers(2)),
            value_dim=int(rng.integers(1, 25)),
        )
        windows_are_the_same(call, window, in_windows, monkeypatch, degree=int(rng.integers(1, 4)))


def test_plans_price_windows_by_what_computes_them(loops, monkeypatch):
    """Those of which compiled loops know, and copies of the rows."""
    call = drawn(300, 2, "float32", dim=8, value_dim=8)
    given = call["query"], call["keys"], call["values"]
    whole = tattn.plan(*given, method="polynomial")
    window, uneven, complex_window = (
        tattn.plan(*given, method="polynomial", window=w, channels=channels)
        for w, channels in (((64, 64), "real"), ((64, 90), "real"), ((64, 64), "complex"))
    )
    assert window.flops_polynomial == uneven.flops_polynomial == 4.5 * whole.flops_polynomial
    assert whole.bytes_polynomial < window.bytes_polynomial < uneven.bytes_polynomial
    assert complex_window.flops_polynomial > 2 * window.flops_polynomial
    monkeypatch.setenv(compiled.SWITCH, "0")
    without = tattn.plan(*given, method="polynomial", window=(64, 64))
    assert without.flops_polynomial > 5 * window.flops_polynomial
    assert without.problem == window.problem


def test_windows_are_spread_over_threads(in_windows):
    """Blocks are problems of their own, also of one head."""
    call = drawn(900, 2, "float64", masked=True, dim=8, value_dim=8)
    plan = plan_of(call, window=(64, 80))
    options = {"plan": plan, "window": plan.window}
    expected = computed(call, **options)
    alone = list(in_windows)
    in_windows.clear()
    with BACKEND.using(threads=lambda: 2):
        shared = computed(call, **options)
    for name in ("read_windows", "pull_windows"):
        assert list(in_windows).count(name) == 2 * alone.count(name) > 0
    for x, y in zip(shared, expected, strict=True):
        np.testing.assert_array_equal(x, y)


def test_windows_that_loops_leave_to_array_operations(in_windows, monkeypatch):
    """Complex channels of several views, a window of few rows beside a long one, and more sums between segments than inputs."""
    call = drawn(60, 2, "float64", dim=4)
    computed(call, plan=plan_of(call, window=(20, 33), channels="complex"), window=(20, 33))
    with BACKEND.using(workspace=1 << 10):
        computed(call, plan=plan_of(call, window=(17, 33)), window=(17, 33))
    computed(call, plan=plan_of(call, window=(2, 33)), window=(2, 33))
    assert in_windows == []
    windows_are_the_same(drawn(60, 1, "float64", dim=4), (20,), in_windows, monkeypatch, channels="complex")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("decays", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_no_error_of_windows_exceeds_the_plan(dtype, decays, in_windows, draws):
    """As for causal calls, by loops for windows of all lengths."""
    exact = np.float64 if dtype == "float32" else np.longdouble
    worst = 0.0
    for seed in draws(300 if dtype == "float32" else 100):
        rng = np.random.default_rng(seed)
        views, degree, bound = (
            int(rng.integers(1, 4)),
            int(rng.integers(2, 10)),
            float(rng.choice([0.1, 0.5, 1.0, 2.0])),
        )
        n, dim, value_dim = int(rng.integers(20, (300, 60, 32)[views - 1])), int(rng.integers(1, 5)), 3
        arrays = [entries(rng, (n + int(rng.integers(0, 4)) * (i > 0), dim)) for i in range(views + 1)]
        query, *keys = [(x * 10.0 ** rng.uniform(-6, 6)).astype(dtype) for x in arrays]
        tops = np.prod([np.abs(x.astype(float)).max(0) for x in (query, *keys)], 0)
        scale = bound / tops.sum()
        values = [(entries(rng, (len(k), value_dim)) * 10.0 ** rng.uniform(-4, 4)).astype(dtype) for k in keys]
        grad = rng.normal(size=(n, value_dim)).astype(dtype)
        # Shorter ones are left to array operations.
        window = tuple(int(w) for w in rng.integers(16, n, views))
        plan = tattn.plan_for(n=[n, *map(len, keys)], dim=dim, bound=bound * (1 + 1e-6), degree=degree, order=views + 1,
                              window=window, dtype=dtype, scale=scale)  # fmt: skip
        decay = [np.asarray(1 - 10 ** rng.uniform(-4, -0.4), dtype) for _ in range(views)] if decays else None
        out, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan, window=window, decay=decay)
        dquery, dkeys, dvalues = pullback(grad)[:3]
        options: Any = {"window": window, "decay": decay, "precision": exact}
        truth = dense(query, keys, values, scale=scale, grad_out=grad, **options)
        found = Dense(out, out, dquery, list(dkeys), list(dvalues))
        ratio = largest_ratio(plan, keys, values, grad, found, truth)
        assert ratio <= 1, (seed, ratio, str(plan))
        worst = max(worst, ratio)
    assert set(in_windows) == {"read_windows", "pull_windows"}
    assert worst > 0.1


@pytest.mark.parametrize("window", [(64, 64), (5_000, 64), (40_000, 50_000)])
def test_sums_of_windows_over_long_sequences_do_not_drift(window, in_windows):
    """Equal rows, which round alike, in blocks, in sums over these, and in the sums of the gradients."""
    n = 100_000
    query, key, value = (np.full((n, 1), x, np.float32) for x in (0.1, 0.3, 0.7))
    plan = tattn.plan_for(n=n, dim=1, bound=0.1, degree=4, window=window)
    (out, lse), pullback = tattn.tensor_attention_vjp(
        query, [key] * 2, [value] * 2, plan=plan, window=window, return_lse=True
    )
    exact = float(np.float32(0.7)) ** 2
    assert np.max(np.abs(out / exact - 1)) <= plan.error < 2e-5
    seen = [np.minimum(np.arange(1, n + 1.0), w) for w in window]
    score = float(np.float32(0.1)) * float(np.float32(0.3)) ** 2
    # lse is rounded when it is the logarithm, and when what was taken out of it is added.
    assert np.all(np.abs(np.exp(lse.astype(float) - score) / (seen[0] * seen[1]) - 1) < 2e-6 + 2 * np.spacing(lse))
    _, _, dvalues = pullback(np.ones_like(out), np.zeros_like(lse))
    for dv, rows, w in zip(dvalues, seen, window, strict=True):
        # Row j has 1 / (number of rows seen) of every row that sees it.
        before = np.concatenate([[0.0], np.cumsum(1 / rows)])
        wanted = (before[np.minimum(np.arange(n) + w, n)] - before[:n]) * exact / float(np.float32(0.7))
        assert np.max(np.abs(dv[:, 0] / wanted - 1)) <= plan.error
    assert set(in_windows) == {"read_windows", "pull_windows"}


def test_windows_in_float32_stay_with_those_in_float64(in_windows):
    """Over a long sequence, output and gradients."""
    rng = np.random.default_rng(0)
    n, window = 30_000, (700, 90)
    call = {
        "query": rng.uniform(-1, 1, (n, 4)), "keys": list(rng.uniform(-1, 1, (2, n, 4))), "key_masks": None,
        "values": list(rng.normal(size=(2, n, 2))), "grad_out": rng.normal(size=(n, 2)), "grad_lse": rng.normal(size=n),
    }  # fmt: skip
    found = []
    for dtype in ("float32", "float64"):
        # The same numbers in either.
        same = {
            name: [a.astype("float32").astype(dtype) for a in x] if isinstance(x, list)
            else None if x is None else x.astype("float32").astype(dtype)
            for name, x in call.items()
        }  # fmt: skip
        plan = plan_of(same, window=window)
        found.append(computed(same, plan=plan, window=window))
    assert set(in_windows) == {"read_windows", "pull_windows"}
    for x, y in zip(*found, strict=True):
        assert np.max(np.abs(x - y)) < 2e-6 * np.max(np.abs(y))


@pytest.mark.parametrize("layout", ["strided", "reversed", "transposed", "broadcast", "read-only"])
def test_inputs_of_all_layouts(layout, used):
    call = drawn(40, 2, "float32", "heads")
    plan = plan_of(call)

    def laid_out(x: np.ndarray) -> np.ndarray:
        if layout == "strided":
            wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype)
            wide[..., ::2] = x
            return wide[..., ::2]
        if layout == "reversed":
            return np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1]
        if layout == "transposed":
            return np.swapaxes(np.ascontiguousarray(np.swapaxes(x, -1, -2)), -1, -2)
        if layout == "broadcast":
            return np.broadcast_to(x[:1], x.shape)
        x = x.copy()
        x.setflags(write=False)
        return x

    if layout == "broadcast":
        call = {name: _each(lambda x: np.array(laid_out(x)), x) for name, x in call.items()}
    expected = computed(call, plan=plan)
    before = {name: _each(np.copy, x) for name, x in call.items()}
    used.clear()
    found = computed({name: _each(laid_out, x) for name, x in call.items()}, plan=plan)
    assert set(used) == {"read", "pull"}
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_array_equal(x, y)
    for name, x in call.items():
        _each(np.testing.assert_array_equal, x, before[name])


def _each(function: Callable[..., Any], *given: Any) -> Any:
    """The function of an array, or of each in a list; None stays."""
    if isinstance(given[0], list):
        return [_each(function, *x) for x in zip(*given, strict=True)]
    return None if given[0] is None else function(*given)


def test_rows_without_numbers_spoil_those_that_see_them(used):
    call = drawn(40, 2, "float64")
    plan = plan_of(call)
    clean = computed(call, plan=plan)[0]
    call["values"][0][20, 1] = np.inf
    call["keys"][1][33, 0] = np.nan
    out = computed(call, plan=plan)[0]
    np.testing.assert_array_equal(out[:20], clean[:20])
    assert np.isfinite(out[20:30, 0]).all()
    assert np.isnan(out[20:, 1]).all()
    assert np.isnan(out[30:]).all()


@pytest.mark.parametrize("factor", [None, 0.3])
def test_problems_are_spread_over_threads(factor, used):
    call = drawn(200, 2, "float64", "shared", dim=8, value_dim=8)
    if factor:
        call = with_decay(call, factor, "shared")
    plan = plan_of(call)
    expected = computed(call, plan=plan)
    alone = len(used)
    with BACKEND.using(threads=lambda: 2):
        shared = computed(call, plan=plan)
    assert len(used) == 3 * alone
    for x, y in zip(shared, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("leading", ["one", "heads"])
@pytest.mark.parametrize("factor", [None, 0.3])
def test_columns_of_long_heads_are_spread_over_threads(factor, leading, used):
    """Two threads share one head, whose rows wait for each other: the same numbers, but for gradients that columns add up to."""
    call = drawn(900, 2, "float64", leading, masked=True, dim=4, value_dim=50)
    if factor:
        call = with_decay(call, factor, leading)
    plan = plan_of(call)
    expected = computed(call, plan=plan)
    alone = len(used)
    heads = 3 if leading == "one" else 7
    with BACKEND.using(threads=lambda: heads - 1):
        shared = computed(call, plan=plan)
    assert len(used) > 2 * alone
    for i, (x, y) in enumerate(zip(shared, expected, strict=True)):
        exact = i not in (2, 3, 4, 7, 8)
        np.testing.assert_allclose(x, y, rtol=0, atol=0 if exact else 1e-13 * np.abs(y).max())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("decays", [False, True])
def test_no_error_exceeds_the_plan(dtype, decays, used, draws):
    """Rows of all kinds, sizes over decades: causal calls by kernels, outputs and gradients, against a wider dtype."""
    exact = np.float64 if dtype == "float32" else np.longdouble
    worst = 0.0
    for seed in draws(300 if dtype == "float32" else 100):
        rng = np.random.default_rng(seed)
        views, degree, bound = (
            int(rng.integers(1, 5)),
            int(rng.integers(2, 10)),
            float(rng.choice([0.1, 0.5, 1.0, 2.0])),
        )
        n, dim, value_dim = int(rng.integers(1, (150, 60, 24, 12)[views - 1])), int(rng.integers(1, 5)), 3
        arrays = [entries(rng, (n + int(rng.integers(0, 4)) * (i > 0), dim)) for i in range(views + 1)]
        query, *keys = [(x * 10.0 ** rng.uniform(-6, 6)).astype(dtype) for x in arrays]
        tops = np.prod([np.abs(x.astype(float)).max(0) for x in (query, *keys)], 0)
        scale = bound / tops.sum()
        values = [(entries(rng, (len(k), value_dim)) * 10.0 ** rng.uniform(-4, 4)).astype(dtype) for k in keys]
        grad = rng.normal(size=(n, value_dim)).astype(dtype)
        plan = tattn.plan_for(n=[n, *map(len, keys)], dim=dim, bound=bound * (1 + 1e-6), degree=degree, order=views + 1,
                              causal=True, dtype=dtype, scale=scale)  # fmt: skip
        decay = [np.asarray(1 - 10 ** rng.uniform(-4, -0.1), dtype) for _ in range(views)] if decays else None
        out, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan, causal=True, decay=decay)
        dquery, dkeys, dvalues = pullback(grad)[:3]
        truth = dense(query, keys, values, scale=scale, grad_out=grad, causal=True, decay=decay, precision=exact)
        found = Dense(out, out, dquery, list(dkeys), list(dvalues))
        ratio = largest_ratio(plan, keys, values, grad, found, truth)
        assert ratio <= 1, (seed, ratio, str(plan))
        worst = max(worst, ratio)
    assert set(used) == {"read", "pull"}
    # A draw that comes near to nothing would show nothing.
    assert worst > 0.1


def entries(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Numbers within ±1: uniform, signs, all alike, or of rows whose sizes differ by decades."""
    kind = rng.integers(4)
    x = rng.uniform(-1, 1, shape)
    if kind == 1:
        return np.where(x < 0, -1.0, 1.0)
    if kind == 2:
        return np.full(shape, rng.uniform(0.1, 1))
    return x * 10.0 ** rng.uniform(-3, 0, (shape[0], 1)) if kind == 3 else x


def largest_ratio(plan: tattn.Plan, keys: Any, values: Any, grad: np.ndarray, got: Dense, truth: Dense) -> float:
    """Largest error of output, dquery and dvalues over what the plan allows for it."""
    sizes = value_sizes(values)[0]
    g = np.abs(grad.astype(float))
    tops = np.prod([np.abs(k.astype(float)).max(0) for k in keys], 0)
    allowed = [plan.error * sizes, plan.grad_error * plan.scale * tops * (g * sizes).sum(-1)[:, None]]
    pairs = [(got.out, truth.out), (got.dquery, truth.dquery)]
    for i, (x, y) in enumerate(zip(got.dvalues, truth.dvalues, strict=True)):
        others = [np.abs(v.astype(float)).max(0) for j, v in enumerate(values) if j != i]
        allowed.append(plan.error * np.prod([np.ones(grad.shape[1]), *others], 0) * g.sum(0))
        pairs.append((x, y))
    return max(float(np.max(np.abs(x - y) / a)) for (x, y), a in zip(pairs, allowed, strict=True))


@pytest.mark.parametrize("views", [1, 2])
def test_sums_of_long_sequences_do_not_drift(views, used):
    """Equal rows, which round alike: chunk after chunk, block after block, and in the sums of the gradients as well."""
    n = 300_000
    query, key, value = (np.full((n, 1), x, np.float32) for x in (0.1, 0.3, 0.7))
    plan = tattn.plan_for(n=n, dim=1, bound=0.1, degree=4, order=views + 1, causal=True)
    out, pullback = tattn.tensor_attention_vjp(query, [key] * views, [value] * views, plan=plan, causal=True)
    exact = float(np.float32(0.7)) ** views
    assert np.max(np.abs(out / exact - 1)) <= plan.error < 2e-5
    _, _, dvalues = pullback(np.ones_like(out))
    # Row j has 1/(i + 1) of every row i behind it.
    behind = np.cumsum(1 / np.arange(n, 0, -1.0))[::-1] * exact / float(np.float32(0.7))
    assert np.max(np.abs(dvalues[0][:, 0] / behind - 1)) <= plan.error


@pytest.mark.parametrize("factor", [0.8, 0.99, 0.9999])
def test_sums_that_decay_do_not_drift(factor, used):
    """lse of equal rows tells the sum of all that a row weighs, and the gradient of a row the sum over those behind."""
    n = 300_000
    query, key, value = (np.full((n, 1), x, np.float32) for x in (0.1, 0.3, 0.7))
    decay = np.asarray(factor, np.float32)
    plan = tattn.plan_for(n=n, dim=1, bound=0.1, degree=4, order=2, causal=True)
    options = {"plan": plan, "causal": True, "decay": [decay], "return_lse": True}
    (out, lse), pullback = tattn.tensor_attention_vjp(query, [key], [value], **options)
    exact, number = float(np.float32(0.7)), float(decay)
    assert np.max(np.abs(out / exact - 1)) <= plan.error < 2e-5
    weighs = -np.expm1(np.arange(1, n + 1) * np.log(number)) / (1 - number)
    assert np.max(np.abs(np.exp(lse.astype(float) - 0.03) / weighs - 1)) < 3e-6
    _, _, dvalues, _ = pullback(np.ones_like(out), np.zeros_like(lse))
    behind = np.zeros(n)
    total = 0.0
    for j in range(n - 1, -1, -1):
        total = total * number + 1 / weighs[j]
        behind[j] = total
    assert np.max(np.abs(dvalues[0][:, 0] / behind - 1)) < 3e-6
    assert set(used) == {"read", "pull"}


def test_compiled_code_serves_arrays_of_all_layouts_and_flags(loops):
    """Each dtype and kind of channels has one version of it: others would be compiled while somebody waits."""
    for leading in LEADING:
        for dtype, channels in product(("float32", "float64"), ("real", "complex")):
            call = drawn(5, 2, dtype, leading, dim=2)
            plan = plan_of(call, channels=channels)
            computed(call, plan=plan)
            # Views of what broadcasts may not be written to.
            keys = [k[None] for k in call["keys"]]
            tattn.tensor_attention(call["query"], keys, call["values"], plan=plan, causal=True)
            # And windows, with sums that all rows of a block see and without.
            for window in ((2, 2), (2, 4)):
                computed(call, plan=plan_of(call, window=window), window=window)
    for loop in (loops.read, loops.pull):
        of_real = [types for types in loop.signatures if "none" in map(str, types)]
        assert len(of_real) <= 2
        assert len(loop.signatures) - len(of_real) <= 2
    of_windows = loaded()[0].windows
    assert len(of_windows.read.signatures) <= 2
    assert len(of_windows.pull.signatures) <= 2


def test_code_for_complex_channels_is_compiled_by_those_who_use_them(loops):
    """In a process of its own, which has used no others."""
    code = """
        import numpy as np
        import tattn
        from tattn.backends.compiled.loading import loaded

        rows = np.ones((5, 2), np.float32)
        loops = loaded()[0]
        for channels in ("real", "complex"):
            plan = tattn.plan_for(n=5, dim=2, bound=2.0, degree=3, causal=True, channels=channels)
            tattn.tensor_attention(rows, [rows, rows], [rows, rows], plan=plan, causal=True)
            print(len(loops.causal.read.signatures), len(loops.decoding.take_in_complex.signatures))
    """
    assert run(code) == ["1 0", "2 0"]


def test_kernels_are_switched_by_the_environment(used, monkeypatch):
    call = drawn(9, 1, "float64")
    found = kernels()
    assert found.on
    names = *OF_PREFIXES, "step"
    assert found.operations == (
        *OF_ROWS,
        *OF_DOCUMENTS,
        *OF_TUPLES,
        *names,
        *OF_WINDOWS,
        *(f"complex_{name}" for name in names),
    )
    assert str(found) == f"kernels: numba {found.version}: {', '.join(found.operations)}"
    monkeypatch.setenv("TATTN_KERNELS", "0")
    assert not kernels().on
    assert str(kernels()) == "kernels: none: turned off by TATTN_KERNELS=0"
    assert not tattn.warm_up()
    computed(call, plan=plan_of(call))
    assert used == []
    monkeypatch.setenv("TATTN_KERNELS", "1")
    computed(call, plan=plan_of(call))
    assert used == ["read", "pull"]


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ("raise ValueError('no\\n such instruction')", "ValueError: no such instruction"),
        ("return None", "ArithmeticError"),
    ],
)
def test_what_does_not_compile_or_computes_nonsense_is_left_out(broken, problem, tmp_path):
    """With a numba that leaves functions as they are, but for one, which fails or does nothing."""
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "core").mkdir()
    (tmp_path / "numba" / "core" / "__init__.py").write_text("class types:\n    Type = object\n\ncgutils = None\n")
    (tmp_path / "numba" / "extending.py").write_text(
        dedent("""
            class models:
                PrimitiveModel = object

            def intrinsic(function):
                return lambda x, y, z: x * y + z

            def register_model(kind):
                return lambda model: model
        """)
    )
    (tmp_path / "numba" / "__init__.py").write_text(
        dedent(f"""
            __version__ = "0.99.0"
            prange = range

            def njit(**options):
                def decorate(function):
                    def broken(*given):
                        {broken}

                    return broken if function.__name__ == "read" else function

                return decorate
        """)
    )
    code = """
        import numpy as np
        import tattn

        rows = np.random.default_rng(0).uniform(-1, 1, (9, 2))
        plan = tattn.plan_for(n=9, dim=2, bound=2.0, degree=3, order=2, causal=True, dtype="float64")
        print(tattn.tensor_attention(rows, [rows], [rows], plan=plan, causal=True).tolist())
        print(tattn.backends.kernels().problem)
        print(bool(tattn.warm_up()))
    """
    got, told, warm = run(code, tmp_path)
    expected, off, _ = run(code, TATTN_KERNELS="0")
    assert "TATTN_KERNELS" in off
    np.testing.assert_allclose(eval(got), eval(expected), rtol=1e-10)
    assert problem in told
    assert warm == "False"


def test_warm_up_takes_dtypes_and_channels():
    with pytest.raises(ValueError, match="dtypes should be 'float32' or 'float64', got 'int8'"):
        tattn.warm_up(("int8",))
    with pytest.raises(ValueError, match="channels should be 'real' or 'complex', got 'wide'"):
        tattn.warm_up(channels=("wide",))
    with pytest.raises(TypeError, match="channels should be a list or tuple of names, got str"):
        tattn.warm_up(channels="complex")


def test_without_a_folder_to_write_to_code_is_compiled_for_each_process(loops):
    """As numba has none for a function that is in no file."""
    import numba

    from tattn.backends.compiled import jit

    made: dict[str, Any] = {}
    exec("def double(x):\n    return 2 * x", made)
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(made["double"])
    double = jit.compiled()(made["double"])
    assert double(2.0) == 4.0
    assert double.signatures


def stream(state: tattn.DecodingState, call: dict[str, Any], **options: Any) -> tuple[list[Any], tattn.DecodingState]:
    """Outputs and lse of all tokens, one after another, and the last state."""
    found = []
    for i in range(call["query"].shape[-2]):
        at = (Ellipsis, slice(i, i + 1), slice(None))
        rows = call["query"][at], [k[at] for k in call["keys"]], [v[at] for v in call["values"]]
        (out, lse), state = state.step(*rows, return_lse=True, **options)
        found += [out, lse]
    return found, state


@pytest.fixture
def steps(loops: Any) -> Iterator[Names]:
    """Tells of every token that compiled code computes."""
    compile_for("step", "complex_step")
    with calls_of(compiled.step, compiled.complex_step) as seen:
        yield Names(seen)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("leading", ["one", "heads"])
@channels
def test_tokens_are_what_array_operations_compute(dtype, views, leading, channels, steps, monkeypatch):
    call = drawn(20, views, dtype, leading, dim=4, value_dim=5)
    plan = plan_of(call, channels=channels)
    found, state = stream(tattn.DecodingState(plan), call)
    # The first is checked, and tells what the others are like.
    assert len(steps) == (0 if views > 2 else 19)
    monkeypatch.setenv(compiled.SWITCH, "0")
    expected, other = stream(tattn.DecodingState(plan), call)
    assert len(steps) == (0 if views > 2 else 19)
    tolerance = 1e-5 if dtype == "float32" else 1e-13
    for x, y in zip([*found, *state.summary.sums], [*expected, *other.summary.sums], strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
    for x, y in zip(state.summary.rests, other.summary.rests, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("leading", ["one", "heads"])
@channels
def test_a_few_tokens_with_decay_are_what_single_ones_are(dtype, leading, channels, steps, monkeypatch):
    """To the last digit, however many there are; factors on either side of a half, 0, 1 and none."""
    n = 140
    call = drawn(n, 2, dtype, leading, dim=4, value_dim=5)
    call["keys"], call["values"] = ([x[..., -n:, :] for x in call[name]] for name in ("keys", "values"))
    plan = plan_of(call, channels=channels)
    heads = call["query"].shape[:-2]
    factors = np.random.default_rng(0).uniform(0.1, 1, heads).astype(dtype)
    for decay in (None, [0.99, None], [factors, 0.3], [np.float32(0.75), 0]):
        steps.clear()
        singles, state = stream(tattn.DecodingState(plan), call, decay=decay)
        assert len(steps) == n - 1
        whole = tattn.tensor_attention(
            call["query"], call["keys"], call["values"], plan=plan, causal=True, decay=decay, return_lse=True
        )
        tolerance = 2e-5 if dtype == "float32" else 1e-12
        for found, like, axis in zip((singles[::2], singles[1::2]), whole, (-2, -1), strict=True):
            np.testing.assert_allclose(np.concatenate(found, axis=axis), like, rtol=tolerance, atol=tolerance)
        # Sums of complex monomials are made anew at other places, or a call takes as many as that.
        exactly = {"rtol": 0, "atol": 0} if channels == "real" else {"rtol": tolerance, "atol": tolerance}
        steps.clear()
        after = tattn.DecodingState(plan)
        places = (0, 1, 2, 4, 9, 10, 42, 105, n)
        for start, stop in pairwise(places):
            rows = (
                call["query"][..., start:stop, :],
                *([x[..., start:stop, :] for x in call[of]] for of in ("keys", "values")),
            )
            (out, lse), after = after.step(*rows, decay=decay, return_lse=True)
            for found, like, axis in ((out, singles[::2], -2), (lse, singles[1::2], -1)):
                like = np.concatenate(like[start:stop], axis=axis)
                assert (found.shape, found.dtype) == (like.shape, like.dtype)
                np.testing.assert_allclose(found, like, **exactly)
        assert len(steps) == len(places) - 2
        for name in ("sums", "rests"):
            for x, y in zip(getattr(after.summary, name), getattr(state.summary, name), strict=True):
                np.testing.assert_array_equal(x, y)
        if decay is None:
            # Arrays that are not like those before are checked.
            rows = (
                call["query"][..., :3, :],
                [k[..., :3, :] for k in call["keys"]],
                [v[..., :3, :] for v in call["values"]],
            )
            for wrong, error, message in (
                ([1.5, 1], ValueError, r"^decay\[0\] should be from 0 to 1, a factor for each row, got 1.5"),
                ([0.5], ValueError, r"^decay should have one factor for each of the 2 views, got 1"),
                (0.5, TypeError, r"^decay should be a list or tuple of 2 factors"),
                ([True, 1], TypeError, r"^decay\[0\] should be"),
                ([np.ones(1, "float16"), 1], TypeError, r"^decay\[0\] should have"),
                ([np.ones((7, *heads), dtype), 1], None, ""),
            ):
                steps.clear()
                if error is None:
                    assert after.step(*rows, decay=wrong)[0].shape == (7, *rows[0].shape[:-1], 5)
                else:
                    with pytest.raises(error, match=message):
                        after.step(*rows, decay=wrong)
                assert steps == []
            out, after = after.step(*rows, decay=[np.full(heads, 1.5, dtype), 1])
            assert np.isnan(out).all()
            assert len(steps) == 1


@pytest.mark.parametrize("views", [1, 2])
def test_tokens_of_complex_channels_far_into_a_stream(views, steps):
    """Turned by positions from 10⁵ on, and sums of complex monomials made anew at times."""
    n = 2 * CHAIN + 44
    call = drawn(n, views, "float64", "heads", dim=4)
    frequencies = np.random.default_rng(0).uniform(0, 1, (views, 2))
    call["keys"] = [k[:, -n:] for k in call["keys"]]
    call["values"] = [v[:, -n:] for v in call["values"]]
    position = 100_000 + np.arange(n)
    for i, f in enumerate(frequencies):
        call["query"] = tattn.rotary(call["query"], position, f)
        call["keys"][i] = tattn.rotary(call["keys"][i], position, -f)
    plan = plan_of(call, channels="complex")
    whole = tattn.tensor_attention(call["query"], call["keys"], call["values"], plan=plan, causal=True)
    found, state = stream(tattn.DecodingState(plan), call)
    assert len(steps) == n - 1
    assert vars(state)["_turned"][1] == 43
    np.testing.assert_allclose(np.concatenate(found[::2], axis=-2), whole, rtol=1e-12, atol=1e-13)


@channels
def test_a_state_is_continued_in_several_ways_copied_and_pickled(channels, steps):
    call = drawn(8, 2, "float64", dim=2)
    _, state = stream(tattn.DecodingState(plan_of(call, channels=channels)), call)
    kept = [x.copy() for x in (*state.summary.sums, *state.summary.rests)]
    steps.clear()
    first, _ = stream(state, call)
    for again in (state, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        for x, y in zip(stream(again, call)[0], first, strict=True):
            np.testing.assert_array_equal(x, y)
    assert len(steps) == 4 * 8
    for x, y in zip((*state.summary.sums, *state.summary.rests), kept, strict=True):
        np.testing.assert_array_equal(x, y)


def test_tokens_that_differ_from_the_one_before_are_checked(steps):
    call = drawn(2, 2, "float64")
    _, state = stream(tattn.DecodingState(plan_of(call)), call)
    query, keys, values = call["query"][:1], [k[:1] for k in call["keys"]], [v[:1] for v in call["values"]]
    steps.clear()
    for wrong, error, message in (
        ((query.astype("float32"), keys, values), TypeError, "query should have"),
        ((query, keys[:1], values), ValueError, "keys should have one entry"),
        ((query, keys, [values[0], values[1][:, :1]]), ValueError, "values.1. should have"),
        ((query, keys, [values[0], None]), TypeError, "values.1. should be an array"),
        ((call["query"], keys, values), ValueError, "keys.0. should have as many rows as query, 2"),
    ):
        with pytest.raises(error, match=message):
            state.step(*wrong)
    masked = state.step(query, keys, values, key_masks=[np.zeros(1, bool)] * 2)[1]
    assert steps == []
    np.testing.assert_array_equal(masked.summary.sums[0], state.summary.sums[0])
    wide = state.step(np.stack([query] * 3), keys, values)[0]
    assert steps == []
    np.testing.assert_allclose(wide, np.stack([state.step(query, keys, values)[0]] * 3), rtol=1e-13)
    assert len(steps) == 1
    # Where the first call takes several, as many as that and one are like them.
    steps.clear()
    rows = call["query"], [k[-2:] for k in call["keys"]], [v[-2:] for v in call["values"]]
    _, many = tattn.DecodingState(plan_of(call)).step(*rows)
    assert steps == []
    many.step(query, keys, values)[1].step(*rows)
    assert len(steps) == 2


@channels
def test_entries_without_numbers_and_normalisers_that_lost_their_sign_give_nan(channels, steps, monkeypatch):
    call = drawn(4, 2, "float32", dim=2)
    plan = plan_of(call, degree=3, channels=channels)
    # Where monomials overflow, and where they do not yet; of either sign, or the normaliser loses its own.
    queries = [("query", x) for x in (np.nan, 1e30, 1e6, -1e6, -40.0)]
    for place, value in (*queries, ("keys", np.inf), ("keys", 1e6), ("values", np.inf)):
        spoiled = {name: _each(np.copy, x) for name, x in call.items()}
        rows = spoiled[place] if place == "query" else spoiled[place][1]
        rows[2] = value
        steps.clear()
        found, _ = stream(tattn.DecodingState(plan), spoiled)
        assert len(steps) == 3
        monkeypatch.setenv(compiled.SWITCH, "0")
        expected, _ = stream(tattn.DecodingState(plan), spoiled)
        monkeypatch.delenv(compiled.SWITCH)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


CALL = """
    import sys
    import numpy as np
    import tattn

    query = np.ones((5, 2))
    plan = tattn.plan_for(n=5, dim=2, bound=1.0, degree=3, order=2, causal=True, dtype="float64")
    print("numba" in sys.modules)
    tattn.tensor_attention(query, [query], [query])
    print("numba" in sys.modules)
    print(tattn.tensor_attention(query, [query], [query], plan=plan, causal=True).tolist() == query.tolist())
    print(tattn.backends.kernels().problem)
    from tattn.__main__ import main

    main(["info"])
"""


def run(code: str, *folders: Path, **environment: str) -> list[str]:
    """Lines that the code prints in a process of its own, with the folders first on its path."""
    paths = os.pathsep.join(map(str, (*folders, SOURCE)))
    command = [sys.executable, "-W", "error", "-c", dedent(code)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# Vectors as a processor with long ones has them, or with short ones.
VECTORS = """
    import llvmlite.binding as llvm
    import numba
    import numpy as np

    known, llvm.get_host_cpu_features = llvm.get_host_cpu_features, lambda: {{"avx512f": {long}}}
    from tattn.backends.compiled.lanes import BYTES, add_totals, lanes, load, plus, spread, store, times

    llvm.get_host_cpu_features = known
    assert BYTES == (64 if {long} else 32)
"""


@pytest.mark.parametrize("long", [False, True])
def test_vectors_of_both_lengths(long):
    code = """
    @numba.njit
    def compute(x, found):
        n = lanes(x)
        a, b, c, d = load(x, 1), load(x, 1 + n), load(x, 1 + 2 * n), load(x, 1 + 3 * n)
        add_totals(found, 3, a, b, times(c, spread(x[0])), plus(d, a))
        store(found, 8, d)

    for dtype in "float32", "float64":
        x, found = np.arange(2, 67, dtype=dtype), np.ones(30, dtype)
        compute(x, found)
        n = BYTES // x.itemsize
        a, b, c, d = x[1 : 1 + 4 * n].reshape(4, n)
        expected = np.ones_like(found)
        expected[3:7] += [a.sum(), b.sum(), 2 * c.sum(), d.sum() + a.sum()]
        expected[8 : 8 + n] = d
        print((found == expected).all())
    """
    assert run(dedent(VECTORS.format(long=long)) + dedent(code)) == ["True", "True"]


@pytest.mark.thorough
@pytest.mark.parametrize("long", [False, True])
def test_causal_calls_by_vectors_of_both_lengths(long, tmp_path):
    code = """
    import tattn

    rng = np.random.default_rng(0)
    for dtype in "float32", "float64":
        x = [rng.uniform(-1, 1, (70, 3)).astype(dtype) for _ in range(5)]
        out, pullback = tattn.tensor_attention_vjp(x[0], x[1:3], x[3:], method="polynomial", causal=True)
        query, keys, values = pullback(np.ones_like(out))
        print([float(np.sum(g * np.cos(g.size + np.arange(g.size).reshape(g.shape)))) for g in (out, query, *keys, *values)])
    print(tattn.backends.kernels().on)
    """
    code = dedent(VECTORS.format(long=long)) + dedent(code)
    (*found, on), (*expected, off) = (run(code, NUMBA_CACHE_DIR=str(tmp_path), TATTN_KERNELS=on) for on in "10")
    assert (on, off) == ("True", "False")
    for x, y, tolerance in zip(found, expected, (2e-4, 1e-12), strict=True):
        np.testing.assert_allclose(eval(x), eval(y), rtol=tolerance, atol=tolerance)


def test_a_token_whose_sums_overflow_has_no_output(loops):
    from tattn.backends.compiled import decoding

    out, lse = np.zeros(1, np.float32), np.zeros(1, np.float32)
    decoding._divide(np.array([1, np.inf], np.float32), np.float64(0), out, lse)
    assert np.isnan([out[0], lse[0]]).all()


def test_code_on_disk_is_of_all_files_of_loops(tmp_path):
    code = """
    from tattn.backends.compiled import jit

    def double(x):
        return 2 * x

    for changed in False, False, True:
        jit.SOURCES = (*jit.SOURCES, changed) if changed else jit.SOURCES
        kept = jit.compiled()(double)
        kept(1.0)
        print(sum(kept.stats.cache_hits.values()))
    """
    (tmp_path / "loops.py").write_text(dedent(code), encoding="utf-8")
    assert run("import loops", tmp_path, NUMBA_CACHE_DIR=str(tmp_path / "kept")) == ["0", "1", "0"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("raise OSError('libLLVM.so:\\n no such file')", "OSError: libLLVM.so: no such file"),
        ("raise ModuleNotFoundError('no numba', name='numba')", "numba is not installed"),
        *(
            pytest.param(*case, marks=pytest.mark.thorough)
            for case in (
                ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
                ("__version__ = '0.60.2'", "numba should be 0.61 or newer, got 0.60.2"),
                ("__version__ = '0.99.0'", "ModuleNotFoundError: No module named 'numba.core'"),
            )
        ),
    ],
)
def test_where_numba_cannot_be_used_the_array_form_computes_and_the_command_says_so(text, problem, tmp_path):
    (tmp_path / "numba.py").write_text(text + "\n", encoding="utf-8")
    unused, after, right, told, *info = run(CALL, tmp_path)
    assert (unused, after, right) == ("False", "False", "True")
    assert told.startswith(problem)
    assert info[-1] == f"kernels: none: {told}"


def test_numba_is_not_imported_where_address_space_is_short():
    """A library that it loads would try for ever to have its memory."""
    resource = pytest.importorskip("resource")
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, {resource.RLIM_INFINITY}))"
    call = dedent(CALL.partition("from tattn.__main__")[0])
    _, _, right, told, imported = run(f"{limit}\n{call}\nprint('numba' in sys.modules)")
    assert (right, imported) == ("True", "False")
    assert told == "numba should be allowed 2,048 MiB of address space, got a limit of 1,024 MiB"


def test_numba_is_imported_by_the_first_causal_call_alone(loops):
    unused, after, right, told, *info = run(CALL)
    assert (unused, after, right, told) == ("False", "False", "True", "")
    assert info[-1].startswith("kernels: numba ")


def test_numba_is_imported_by_the_first_long_call_over_all_rows(loops):
    code = """
        import sys
        import numpy as np
        import tattn

        for n in (900, 60_000):
            query = np.random.default_rng(0).uniform(-1, 1, (n, 4)).astype(np.float32)
            plan = tattn.plan_for(n=n, dim=4, bound=4.0, degree=4, order=2)
            tattn.tensor_attention(query, [query], [query], plan=plan)
            print("numba" in sys.modules)
    """
    assert run(code) == ["False", "True"]
    assert run(code, TATTN_KERNELS="0") == ["False", "False"]


def test_numba_is_not_imported_where_kernels_are_switched_off(loops):
    code = """
        import sys
        import numpy as np
        import tattn

        query = np.ones((5, 2), np.float32)
        plan = tattn.plan_for(n=5, dim=2, bound=1.0, degree=3, order=2, causal=True)
        tattn.tensor_attention(query, [query], [query], plan=plan, causal=True)
        print("numba" in sys.modules)
    """
    assert run(code, TATTN_KERNELS="0") == ["False"]


class TestTorch:
    """Tensors on the processor, with the same loops on the same memory."""

    @pytest.fixture
    def torch(self) -> Any:
        return pytest.importorskip("torch")

    def call(self, torch: Any, dtype: str = "float64") -> dict[str, Any]:
        return {name: _each(torch.from_numpy, x) for name, x in drawn(70, 2, dtype, "shared", masked=True).items()}

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_it_is_what_numpy_has(self, torch, dtype, used):
        arrays = drawn(70, 2, dtype, "shared", masked=True)
        found = computed({name: _each(torch.from_numpy, x) for name, x in arrays.items()}, plan=plan_of(arrays))
        assert set(used) == {"read", "pull"}
        for x, y in zip(found, computed(arrays, plan=plan_of(arrays)), strict=True):
            tolerance = 1e-5 if dtype == "float32" else 1e-13
            np.testing.assert_allclose(x.numpy(), y, rtol=tolerance, atol=tolerance * np.abs(y).max())

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_passes_over_all_rows_are_what_numpy_has(self, torch, dtype, passes):
        arrays = drawn(15_000, 2, dtype, dim=5, masked=True)
        arrays["keys"] = [k[:15_000] for k in arrays["keys"]]
        arrays["values"] = [v[:15_000] for v in arrays["values"]]
        plan, call = (
            plan_of(arrays, degree=5, causal=False),
            {name: _each(torch.from_numpy, x) for name, x in arrays.items()},
        )
        found = computed(call, causal=False, plan=plan)
        assert set(passes) == {"over_rows"}
        for x, y in zip(found, computed(arrays, causal=False, plan=plan), strict=True):
            tolerance = 1e-5 if dtype == "float32" else 1e-13
            np.testing.assert_allclose(x.numpy(), y, rtol=tolerance, atol=tolerance * np.abs(y).max())
        inputs = call["query"], *call["keys"], *call["values"]
        for x in inputs:
            x.requires_grad_()
        masks = call["key_masks"]
        outputs = tattn.tensor_attention(
            inputs[0], inputs[1:3], inputs[3:], key_masks=masks, plan=plan, return_lse=True
        )
        passes.clear()
        torch.autograd.backward(outputs, (call["grad_out"], call["grad_lse"]))
        assert set(passes) == {"over_rows"}
        for x, gradient in zip(inputs, found[2:], strict=True):
            torch.testing.assert_close(x.grad, gradient)

    def test_a_default_device_changes_nothing(self, torch, used):
        call, plan = self.call(torch), plan_of(drawn(70, 2, "float64", "shared", masked=True))
        expected = computed(call, plan=plan)
        used.clear()
        with torch.device("meta"):
            found = computed(call, plan=plan)
        assert set(used) == {"read", "pull"}
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))

    def test_autograd_and_gradients_of_gradients(self, torch, used):
        arrays = drawn(6, 2, "float64", masked=True)
        call = {name: _each(torch.from_numpy, x) for name, x in arrays.items()}
        plan = plan_of(arrays)
        inputs = call["query"], *call["keys"], *call["values"]
        for x in inputs:
            x.requires_grad_()

        def function(query: Any, *views: Any) -> Any:
            masks = call["key_masks"]
            return tattn.tensor_attention(query, views[:2], views[2:], key_masks=masks, plan=plan, causal=True)

        out = function(*inputs)
        assert used == ["read"]
        out.backward(call["grad_out"])
        assert used == ["read", "pull"]
        assert torch.autograd.gradgradcheck(function, inputs)

    def test_transformations_do_without(self, torch, used):
        arrays = drawn(6, 2, "float64", "heads")
        call = {name: _each(torch.from_numpy, x) for name, x in arrays.items()}
        plan = plan_of(arrays)

        def function(query: Any, keys: Any, values: Any) -> Any:
            return tattn.tensor_attention(query, keys, values, plan=plan, causal=True)

        from torch.utils.flop_counter import FlopCounterMode

        given = call["query"], call["keys"], call["values"]
        expected = function(*given)
        used.clear()
        with FlopCounterMode(display=False):
            found = [function(*given)]
        assert used == []
        # A compiler takes the call as one operator, which runs on plain tensors.
        found.append(torch.compile(function, fullgraph=True, backend="eager")(*given))
        assert used == ["read"]
        # Tangents go through the operations, the values that they belong to through the loops.
        found.append(torch.func.jvp(function, given, given)[0])
        assert used == ["read"] * 2
        # A mapped axis is one more leading axis of plain tensors.
        found.append(torch.vmap(function)(*given))
        assert used == ["read"] * 3
        for x in found:
            torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)

    def test_tokens_are_computed_where_no_gradient_is_asked_for(self, torch, steps):
        arrays = drawn(5, 2, "float64")
        call = {name: _each(torch.from_numpy, x) for name, x in arrays.items()}
        found, state = stream(tattn.DecodingState(plan_of(arrays)), call)
        assert len(steps) == 4
        for x, y in zip(found, stream(tattn.DecodingState(plan_of(arrays)), arrays)[0], strict=True):
            np.testing.assert_allclose(x.numpy(), y, rtol=1e-12, atol=1e-12)
        steps.clear()
        call["keys"][0].requires_grad_()
        out, _ = stream(state, call)
        assert steps == []
        out[-2].sum().backward()
        assert call["keys"][0].grad is not None

    def test_narrow_dtypes_and_inference_mode(self, torch, used):
        arrays = drawn(40, 2, "float32")
        with torch.inference_mode():
            query, *rest = (
                torch.from_numpy(x).bfloat16() for x in (arrays["query"], *arrays["keys"], *arrays["values"])
            )
            plan = tattn.plan_for(n=[40, 40, 43], dim=3, bound=1.0, degree=4, dtype="bfloat16", causal=True)
            out = tattn.tensor_attention(query, rest[:2], rest[2:], plan=plan, causal=True)
        assert used == ["read"]
        assert out.dtype == torch.bfloat16
        wide = [x.double().numpy() for x in (query, *rest)]
        expected = dense(wide[0], wide[1:3], wide[3:], causal=True).out
        np.testing.assert_allclose(out.float().numpy(), expected, atol=2e-2)
