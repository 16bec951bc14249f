"""Dask arrays: the right answer lazily, in few tasks, from files, and with a worker killed on the way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tattn

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
from tattn.distributed.dask import tensor_attention, tensor_attention_vjp  # noqa: E402

PLANS = {m: tattn.plan_for(n=9, dim=3, order=m + 1, bound=1.0, degree=4, dtype="float64") for m in (1, 2, 3)}
CASES = [
    {"views": 1},
    {"views": 2},
    {"views": 2, "dtype": "float32"},
    {"views": 2, "masked": True},
    {"views": 2, "heads": True},
    {"views": 3, "masked": True, "heads": True},
    {"views": 2, "channels": "complex"},
]


@pytest.fixture(autouse=True)
def _alone() -> Any:
    with dask.config.set(scheduler="synchronous"):
        yield


def draw(case: dict[str, Any]) -> tuple[Any, Any, Any, Any, Any, Any]:
    """(query, keys, values, masks, grad_out, grad_lse) in NumPy."""
    rng = np.random.default_rng(3)
    views, dtype = case["views"], case.get("dtype", "float64")
    heads = (2,) if case.get("heads") else ()
    lengths, dim = [9, 13, 4][:views], 4 if case.get("channels") else 3
    query = rng.uniform(-1, 1, (*heads, 11, dim)).astype(dtype)
    # One head of keys in the first view serves all.
    keys = [rng.uniform(-1, 1, (*(heads if i else ()), n, dim)).astype(dtype) for i, n in enumerate(lengths)]
    values = [rng.normal(size=(*(heads if i else ()), n, 2)).astype(dtype) for i, n in enumerate(lengths)]
    masks = [rng.random(n) < 0.7 for n in lengths] if case.get("masked") else None
    if masks:
        masks[-1] = None
    return (
        query,
        keys,
        values,
        masks,
        rng.normal(size=(*heads, 11, 2)).astype(dtype),
        rng.normal(size=(*heads, 11)).astype(dtype),
    )


def cut(array: Any, rows: Any, axis: int = 2) -> Any:
    """In blocks of these rows."""
    if array is None:
        return None
    chunks = list(array.shape)
    chunks[array.ndim - axis] = rows
    return da.from_array(array, chunks=tuple(chunks))


def blocks(case: dict[str, Any]) -> tuple[Any, Any, Any, Any, Any, Any]:
    """The same as dask arrays: uneven blocks, one of them empty, and values and masks in other blocks than their keys."""
    query, keys, values, masks, grad_out, grad_lse = draw(case)
    of_keys = [(4, 0, 5), (5, 5, 3), 4][: len(keys)]
    return (
        cut(query, (6, 5)),
        [cut(k, c) for k, c in zip(keys, of_keys, strict=True)],
        [cut(v, 3) for v in values],
        None if masks is None else [cut(m, 5, 1) for m in masks],
        cut(grad_out, 4),
        cut(grad_lse, 4, 1),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_those_of_the_whole(case: dict[str, Any]) -> None:
    asked = {"dtype": case.get("dtype", "float64"), "channels": case.get("channels", "real")}
    dim = 4 if case.get("channels") else 3
    plan = tattn.plan_for(n=9, dim=dim, order=case["views"] + 1, bound=1.0, degree=4, **asked)
    query, keys, values, masks, grad_out, grad_lse = draw(case)
    (out, lse), pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan, key_masks=masks, return_lse=True)
    expected = pullback(grad_out, grad_lse)
    q, k, v, m, g, g_lse = blocks(case)
    (got, got_lse), lazily = tensor_attention_vjp(q, k, v, plan=plan, key_masks=m, return_lse=True, split_every=2)
    dquery, dkeys, dvalues = lazily(g, g_lse)
    rows = query.shape[:-2]
    for lazy, like, chunks in (
        (got, out, (*((n,) for n in rows), (6, 5), (2,))),
        (got_lse, lse, (*((n,) for n in rows), (6, 5))),
        (dquery, expected[0], q.chunks),
        *zip(dkeys, expected[1], (x.chunks for x in k), strict=True),
        *((d, e, (*x.chunks[:-1], (2,))) for d, e, x in zip(dvalues, expected[2], k, strict=True)),
    ):
        assert isinstance(lazy, da.Array)
        assert (lazy.chunks, lazy.dtype, lazy.shape) == (chunks, like.dtype, like.shape)
        assert type(lazy._meta) is np.ndarray
    tolerance = 1e-12 if query.dtype == np.float64 else 2e-5
    found = dask.compute(got, got_lse, dquery, *dkeys, *dvalues)
    for a, b in zip(found, (out, lse, expected[0], *expected[1], *expected[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    # Without lse, alone, and with no gradient of lse.
    alone = tensor_attention(q, k, v, plan=plan, key_masks=m)
    np.testing.assert_allclose(alone.compute(), out, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lazily(g)[0].compute(), pullback(grad_out)[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "case", [{"views": 2}, {"views": 1, "dtype": "float32"}, {"views": 3, "masked": True, "heads": True}], ids=str
)
def test_weights_are_those_of_the_whole(case: dict[str, Any]) -> None:
    """Far from one, of two blocks or more, and none in the first of three views."""
    query, keys, values, masks, grad_out, grad_lse = draw(case)
    rng, views = np.random.default_rng(4), case["views"]
    plan = tattn.plan_for(n=9, dim=3, order=views + 1, bound=1.0, degree=4, dtype=str(query.dtype))
    weights: list[Any] = [
        (rng.uniform(0, 1, k.shape[:-1]) ** 4 * 10.0 ** (-25 * (1 + i))).astype(k.dtype) for i, k in enumerate(keys)
    ]
    weights[0] = None if views == 3 else weights[0]
    options = {"plan": plan, "return_lse": True}
    (out, lse), pullback = tattn.tensor_attention_vjp(
        query, keys, values, key_masks=masks, key_weights=weights, **options
    )
    expected = pullback(grad_out, grad_lse)
    q, k, v, m, g, g_lse = blocks(case)
    w = [cut(x, 4, 1) for x in weights]
    (got, got_lse), lazily = tensor_attention_vjp(q, k, v, key_masks=m, key_weights=w, split_every=2, **options)
    dquery, dkeys, dvalues, dweights = lazily(g, g_lse)
    assert [x is None for x in dweights] == [x is None for x in weights]
    tolerance = 1e-12 if query.dtype == np.float64 else 2e-5
    found = dask.compute(got, got_lse, dquery, *dkeys, *dvalues)
    for a, b in zip(found, (out, lse, expected[0], *expected[1], *expected[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    for a, b, own, like in zip(dweights, expected[3], weights, w, strict=True):
        if own is not None:
            assert (a.shape, a.dtype, a.chunks[:-1]) == (like.shape, like.dtype, like.chunks[:-1])
            np.testing.assert_allclose(a.compute() * own.max(), b * own.max(), rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match=r"^key_weights\[0\] should have"):
        tensor_attention(q, k, v, plan=plan, key_weights=[cut(np.ones(3, query.dtype), 3, 1)] + [None] * (views - 1))
    with pytest.raises(TypeError, match=r"^key_weights\[0\] should be a Dask array, got ndarray"):
        tensor_attention(q, k, v, plan=plan, key_weights=[np.ones(9, query.dtype)] + [None] * (views - 1))


def test_a_bound_makes_the_plan() -> None:
    query, keys, values, *_ = draw({"views": 2})
    q, k, v, *_ = blocks({"views": 2})
    plan = tattn.plan(query, keys, values, bound=1.0, tol=1e-4, method="polynomial")
    expected = tattn.tensor_attention(query, keys, values, plan=plan)
    np.testing.assert_allclose(tensor_attention(q, k, v, bound=1.0, tol=1e-4).compute(), expected, atol=1e-12)


def tasks(*collections: Any) -> int:
    return len(dict(dask.optimize(*collections)[0].__dask_graph__())) if len(collections) == 1 else len(
        set().union(*(dict(c.__dask_graph__()) for c in dask.optimize(*collections)))
    )  # fmt: skip


def test_tasks_are_tens() -> None:
    """Ten blocks a view: their number is what counts, not channels, degree or rows."""
    counted = set()
    for rows, degree in ((100, 2), (100, 6), (5000, 4)):
        q, a, b = (da.zeros((rows, 4), chunks=(rows // 10, 4), dtype="f4") for _ in range(3))
        plan = tattn.plan_for(n=rows, dim=4, bound=1.0, degree=degree)
        out, pullback = tensor_attention_vjp(q, [a, b], [a, b], plan=plan)
        dquery, dkeys, dvalues = pullback(out)
        counted.add((tasks(out), tasks(out, dquery, *dkeys, *dvalues)))
    assert len(counted) == 1, counted
    forward, everything = counted.pop()
    print(f"tasks for ten blocks: {forward} forward, {everything} with gradients")
    assert forward <= 70
    assert everything <= 250


def test_nothing_is_computed_before_it_is_asked_for() -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("computed")

    q = da.map_blocks(refuse, da.zeros((4, 3), chunks=(2, 3)), dtype="f8", meta=np.empty((0, 0)))
    out, pullback = tensor_attention_vjp(q, [q, q], [q, q], plan=PLANS[2])
    dquery, _, _ = pullback(out)
    with pytest.raises(AssertionError, match="computed"):
        dquery.compute()


def test_files_larger_than_a_block(tmp_path: Path) -> None:
    """From memmap and Zarr, into Zarr."""
    zarr = pytest.importorskip("zarr")
    rng = np.random.default_rng(1)
    rows = rng.uniform(-1, 1, (4000, 3))
    rows.tofile(tmp_path / "rows")
    file = np.memmap(tmp_path / "rows", np.float64, "r", shape=rows.shape)
    from_file = da.from_array(file, chunks=(500, 3))
    da.to_zarr(da.from_array(rows, chunks=(800, 3)), str(tmp_path / "rows.zarr"))
    from_zarr = da.from_zarr(str(tmp_path / "rows.zarr"))
    out = tensor_attention(from_zarr, [from_file, from_zarr], [from_file, from_zarr], plan=PLANS[2])
    da.to_zarr(out, str(tmp_path / "out.zarr"))
    expected = tattn.tensor_attention(rows, [rows, rows], [rows, rows], plan=PLANS[2])
    np.testing.assert_allclose(zarr.open(str(tmp_path / "out.zarr"))[:], expected, atol=1e-12)


def test_a_killed_worker_changes_nothing() -> None:
    """Separate processes, one of them killed when some blocks are done."""
    program = Path(__file__).parent / "programs" / "killed_worker.py"
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed a worker" in done.stdout
    assert "the answer is right" in done.stdout


# Arguments that do not fit.

Q = da.zeros((6, 3), chunks=(2, 3))
N = np.zeros((6, 3))
COLUMNS = Q.rechunk((6, 1))
FEW = tattn.plan_for(n=3, dim=3, bound=1.0, dtype="float64")
NARROW = tattn.plan_for(n=3, dim=2, bound=1.0, dtype="float64", degree=3)
MEASURED = tattn.plan(N + 0.1, [N + 0.1] * 2, degree=3)


@pytest.mark.parametrize(
    ("error", "match", "changed"),
    [
        (TypeError, r"^query should be a Dask array, got ndarray", {"query": N}),
        (TypeError, r"^keys\[1\] should be a Dask array, got list", {"keys": [Q, [1.0]]}),
        (TypeError, r"^keys should be a list or tuple of arrays.*; a single view goes in a tuple", {"keys": Q}),
        (TypeError, r"^values should be a list or tuple of arrays, .* got NoneType", {"values": None}),
        (TypeError, r"^values\[0\] should have the query's dtype float64, got float32", {"values": [Q.astype("f4"), Q]}),
        (TypeError, r"^query should be a Dask array of NumPy blocks", {"query": da.from_array(np.ma.zeros((6, 3)), asarray=False)}),
        (ValueError, r"^keys\[0\] should be in blocks of rows alone, got 3 blocks along dimension 1", {"keys": [COLUMNS, Q]}),
        (ValueError, r"^values\[1\] should have as many rows as keys\[1\], 6", {"values": [Q, Q[:4]]}),
        (ValueError, r"^key_masks\[0\] should have shape \(..., 6\)", {"key_masks": [da.ones(5, dtype=bool), None]}),
        (ValueError, r"^query should have blocks of known sizes, .*compute_chunk_sizes", {"query": Q[Q[:, 0] > 0]}),
        (ValueError, r"^split_every should be at least 2, got 1", {"split_every": 1}),
        (ValueError, r"^bound cannot be combined with a plan", {"bound": 1.0}),
        (tattn.PlanError, r"^a call on Dask arrays reads no values, so it needs a plan", {"plan": None}),
        (tattn.PlanError, r"^plan should be of the polynomial method", {"plan": FEW}),
        (tattn.PlanError, r"^plan was made for dim 2, the call has dim 3", {"plan": NARROW}),
        (tattn.PlanError, r"^plan rests on the range of other data.*bound=", {"plan": MEASURED}),
    ],
)  # fmt: skip
def test_refused(error: type, match: str, changed: dict[str, Any]) -> None:
    given: dict[str, Any] = {"query": Q, "keys": [Q, Q], "values": [Q, Q], "plan": PLANS[2], **changed}
    with pytest.raises(error, match=match) as caught:
        tensor_attention(given.pop("query"), given.pop("keys"), given.pop("values"), **given)
    assert type(caught.value) is error


def test_refused_upstream() -> None:
    _, pullback = tensor_attention_vjp(Q, [Q, Q], [Q, Q], plan=PLANS[2])
    with pytest.raises(ValueError, match=r"^grad_out should have the shape of the output, \(6, 3\), got \(5, 3\)"):
        pullback(Q[:5])
    with pytest.raises(TypeError, match=r"^grad_lse should be a Dask array, got ndarray"):
        pullback(Q, np.zeros(6))


@pytest.mark.parametrize("function", [tattn.tensor_attention, tattn.tensor_attention_vjp])
def test_other_functions_say_where_dask_arrays_go(function: Any) -> None:
    message = r"^query should be an array, got a Dask array: tattn.distributed.dask has the functions for these"
    with pytest.raises(TypeError, match=message):
        function(Q, [Q, Q], [Q, Q])
    with pytest.raises(TypeError, match=r"^keys\[0\] should be an array, got a Dask array"):
        tattn.summarize([Q, Q], [Q, Q], PLANS[2])


def test_the_example() -> None:
    pytest.importorskip("zarr")
    program = Path(__file__).parents[2] / "examples" / "dask_attention.py"
    command = [sys.executable, str(program), "--rows", "60000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same as in one process" in done.stdout


def test_a_summary_is_not_loaded_into_dask(tmp_path: Path) -> None:
    query, keys, values, *_ = draw({"views": 2})
    tattn.summarize(keys, values, PLANS[2]).save(tmp_path / "file.npz")
    with pytest.raises(TypeError, match=r"^like should be an array, got a Dask array"):
        tattn.Summary.load(tmp_path / "file.npz", like=da.from_array(query))
