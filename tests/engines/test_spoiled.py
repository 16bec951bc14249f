"""Rows that hold no numbers, or numbers beyond the promise, spoil what depends on them and nothing else, by every method."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cases import Call, run
from reference import score_by_score, through_features

import tattn

DIM, VALUE_DIM, BAD = 4, 3, 41
METHODS = [
    "polynomial",
    "by scores",
    "banded",
    "exact",
    "causal polynomial",
    "causal exact",
    "windows",
    "polynomial windows",
]
# Of query, keys and values.
LEADING = [((), (), ()), ((2,), (2,), (2,)), ((2,), (), ())]


def draw(method: str, leading: Any, views: int = 2, n: int = 150) -> Call:
    """Small scores; of causal calls the views have more rows than the query."""
    rng = np.random.default_rng(0)
    of_query, of_keys, of_values = leading
    lengths = [n + 7 * i * ("causal" in method or "windows" in method) for i in range(views)]

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    whole = np.broadcast_shapes(*leading)
    return Call(
        np.clip(normal(*of_query, n, DIM), -1, 1),
        [np.clip(normal(*of_keys, k, DIM), -1, 1) for k in lengths],
        [normal(*of_values, k, VALUE_DIM) for k in lengths],
        None,
        normal(*whole, n, VALUE_DIM),
        normal(*whole, n),
    )


def options(method: str, call: Call) -> dict[str, Any]:
    """A plan that is promised a bound, or finds its own on the way, and what else the call wants."""
    window = tuple(9 + 4 * i for i in range(len(call.keys)))
    how: dict[str, Any] = {
        "banded": {"series": "banded", "degree": 2, "bands": 4},
        "exact": {"bound": 1.0, "method": "exact"},
        "causal polynomial": {"bound": 1.0, "degree": 4, "causal": True},
        "causal exact": {"bound": 1.0, "method": "exact", "causal": True},
        "windows": {"bound": 1.0, "method": "exact", "window": window},
        "polynomial windows": {"bound": 1.0, "degree": 4, "window": window},
    }.get(method, {"bound": 1.0, "degree": 4})
    lengths = [call.query.shape[-2], *(k.shape[-2] for k in call.keys)]
    plan = tattn.plan_for(n=lengths, dim=DIM, order=len(lengths), value_dim=VALUE_DIM, **how)
    plan = score_by_score(plan) if method == "by scores" else through_features(plan)
    order = {name: how[name] for name in ("causal", "window") if name in how}
    return {"plan": plan, **order}


def sees(call: Call, view: int, order: dict[str, Any]) -> np.ndarray:
    """Which rows of a view each query row sees, (n, n_μ)."""
    n, length = call.query.shape[-2], call.keys[view].shape[-2]
    behind = np.arange(n)[:, None] + length - n - np.arange(length)
    if "window" in order:
        return (behind >= 0) & (behind < order["window"][view])
    return (behind >= 0) if order.get("causal") else np.ones((n, length), bool)


def changed(call: Call, name: str, view: int, entry: float | None) -> Call:
    """A row of the first problem with one entry replaced, or all by 0."""
    arrays = [call.query] if name == "query" else list(getattr(call, name))
    arrays[view] = arrays[view].copy()
    first = arrays[view][(0,) * (arrays[view].ndim - 2)]
    first[BAD, slice(None) if entry is None else 1] = 0.0 if entry is None else entry
    return call._replace(**{name: arrays[0] if name == "query" else arrays})


def close(got: np.ndarray, expected: np.ndarray, clean: np.ndarray) -> None:
    """The same numbers in the clean rows."""
    got, expected = got[clean], expected[clean]
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6 * max(1.0, np.abs(expected).max(initial=0.0)))


def problems(x: np.ndarray, whole: tuple[int, ...]) -> np.ndarray:
    """One array for each problem, (problems, rows, k)."""
    return np.broadcast_to(x, (*whole, *x.shape[len(x.shape) - 2 :])).reshape(-1, *x.shape[-2:])


def bad_entries(method: str, name: str) -> Iterator[float]:
    yield from (np.nan, np.inf, -np.inf)
    # A row that is large is in a band with others, which are then promised nothing.
    if method != "banded" and (name == "query" or (name == "keys" and "causal" in method)):
        yield from (1e20, -1e30)


@pytest.mark.grid("strict", "torch", "jax")
@pytest.mark.parametrize("leading", LEADING, ids=["one problem", "two", "shared keys"])
@pytest.mark.parametrize("method", METHODS)
def test_a_row_spoils_nothing_but_what_depends_on_it(library: Any, method: str, leading: Any) -> None:
    call = draw(method, leading)
    order = options(method, call)
    whole = np.broadcast_shapes(*(x.shape[:-2] for x in (call.query, *call.keys, *call.values)))
    shared = call.keys[0].ndim < call.query.ndim
    for name, view in (("query", 0), ("keys", 0), ("keys", 1), ("values", 0), ("values", 1)):
        expected, _ = run(library, changed(call, name, view, None), **order)
        for entry in bad_entries(method, name):
            got, _ = run(library, changed(call, name, view, entry), **order)
            lost = np.zeros((int(np.prod(whole)), call.query.shape[-2]), bool)
            own = slice(None) if shared and name != "query" else 0
            lost[own] = sees(call, view, order)[:, BAD] if name != "query" else np.arange(lost.shape[-1]) == BAD
            of_row = lost.reshape(*whole, -1)
            close(got.out, expected.out, ~of_row)
            close(got.lse, expected.lse, ~of_row)
            close(got.dquery, expected.dquery, ~of_row)
            if np.isnan(entry):
                # No number is made up where there is none.
                assert np.isnan(got.dquery[of_row]).any(axis=-1).all()
                assert np.isnan(got.out[of_row]).any(axis=-1).all()
            for i in range(2):
                spoiled = (lost[..., None] & sees(call, i, order)).any(axis=-2).reshape(*whole, -1)
                if shared:
                    spoiled = spoiled.any(axis=0)
                close(got.dkeys[i], expected.dkeys[i], ~spoiled)
                # A view's own values are no part of their gradient.
                own_values = np.full(spoiled.shape, name == "values" and view == i)
                close(got.dvalues[i], expected.dvalues[i], ~spoiled | own_values)
                if np.isnan(entry):
                    assert np.isnan(got.dkeys[i][spoiled]).any(axis=-1).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.grid
def test_masked_rows_may_hold_anything(library: Any, method: str) -> None:
    """To the last bit."""
    call = draw(method, LEADING[0])
    order = options(method, call)
    masks: list[np.ndarray | None] = [np.arange(k.shape[0]) % 5 != 1 for k in call.keys]
    results = []
    for entry in (0.0, np.nan, np.inf, -1e30):
        keys, values = ([x.copy() for x in xs] for xs in (call.keys, call.values))
        for x, mask in zip((*keys, *values), (*masks, *masks), strict=True):
            x[~mask] = entry
        results.append(run(library, call._replace(keys=keys, values=values, masks=masks), **order)[0])
    first, *others = results
    for other in others:
        for a, b in zip(first, other, strict=True):
            for x, y in zip(a if isinstance(a, list) else [a], b if isinstance(b, list) else [b], strict=True):
                assert np.isfinite(x).all()
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.grid("jax")
def test_masked_rows_have_no_gradient_though_it_leaves_the_range(library: Any, method: str) -> None:
    call = draw(method, LEADING[0])
    order = options(method, call)
    masks: list[np.ndarray | None] = [np.arange(k.shape[0]) % 5 != 1 for k in call.keys]
    huge = call._replace(
        values=[v * np.float32(1e30) for v in call.values], grad_out=call.grad_out * np.float32(1e30), masks=masks
    )
    got, _ = run(library, huge, **order)
    assert np.isnan(got.dkeys[0]).any() or np.isinf(got.dkeys[0]).any()
    for gradient, mask in zip((*got.dkeys, *got.dvalues), (*masks, *masks), strict=True):
        assert (gradient[~mask] == 0).all()


@pytest.mark.parametrize("method", ["polynomial", "causal polynomial"])
def test_garbage_in_most_rows_of_the_query(library: Any, method: str) -> None:
    """As padding holds it."""
    call = draw(method, LEADING[0])
    order = options(method, call)
    expected, _ = run(library, call, **order)
    query = call.query.copy()
    query[50:] = np.random.default_rng(1).choice(
        np.array([np.nan, np.inf, 1e20, -3e38, 1e-40], np.float32), query[50:].shape
    )
    got, _ = run(library, call._replace(query=query), **order)
    clean = np.arange(len(query)) < 50
    close(got.out, expected.out, clean)
    close(got.lse, expected.lse, clean)
    close(got.dquery, expected.dquery, clean)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.grid
def test_a_gradient_that_is_no_number(library: Any, method: str) -> None:
    """Goes to its row, and to what that sees."""
    call = draw(method, LEADING[0])
    order = options(method, call)
    upstream = [call.grad_out.copy(), call.grad_out.copy()]
    upstream[0][BAD], upstream[1][BAD, 1] = 0.0, np.nan
    expected, got = (run(library, call._replace(grad_out=g), **order)[0] for g in upstream)
    here = np.arange(len(call.query)) == BAD
    close(got.dquery, expected.dquery, ~here)
    assert np.isnan(got.dquery[here]).all()
    for i in range(2):
        spoiled = sees(call, i, order)[BAD]
        close(got.dkeys[i], expected.dkeys[i], ~spoiled)
        close(got.dvalues[i], expected.dvalues[i], ~spoiled)
        assert np.isnan(got.dkeys[i][spoiled]).all()


def test_streams_of_a_batch_keep_apart(library: Any) -> None:
    """Of two streams the first has a row that is none: its outputs before that stay, and those of the other do."""
    rng = np.random.default_rng(0)
    query, *arrays = np.clip(rng.normal(size=(5, 2, 6, DIM)), -1, 1)
    broken = [x.copy() for x in (query, *arrays)]
    broken[0][0, 2, 1], broken[1][0, 4, 1] = np.inf, np.nan
    plan = tattn.plan_for(n=6, dim=DIM, bound=1.0, degree=4, causal=True, dtype="float64")
    found = []
    for drawn in ((query, *arrays), broken):
        given = library.arrays(*drawn)
        state, outputs = tattn.DecodingState(plan), []
        for i in range(6):
            q, *rest = (x[:, i : i + 1, :] for x in given)
            out, state = state.step(q, rest[:2], rest[2:])
            outputs.append(library.numpy(out))
        found.append(np.concatenate(outputs, axis=-2))
    expected, got = found
    lost = np.array([[False, False, True, False, True, True], [False] * 6])
    close(got, expected, ~lost)
    assert np.isnan(got[lost]).all()


@pytest.mark.libraries("torch")
def test_torch_where_operations_are_recorded() -> None:
    """As under torch.func: nothing is read, and nothing written in place."""
    torch = pytest.importorskip("torch")
    for method in ("causal polynomial", "causal exact", "polynomial"):
        call = draw(method, LEADING[0], n=60)
        order = options(method, call)

        def loss(query: Any, call: Call = call, order: dict[str, Any] = order) -> Any:
            keys, values = ([torch.tensor(x) for x in xs] for xs in (call.keys, call.values))
            return tattn.tensor_attention(query, keys, values, **order)[:20].sum()

        rows = [changed(call, "query", 0, entry).query for entry in (None, np.nan)]
        expected, got = (torch.func.grad(loss)(torch.tensor(query)).numpy() for query in rows)
        close(got, expected, np.arange(60) != BAD)


@pytest.mark.parametrize("offsets", [None, np.asarray([0, 20, 40])], ids=["one", "documents"])
def test_sums_that_overflow_beside_small_values_are_no_numbers(offsets: np.ndarray | None) -> None:
    """Numerators are finite then, and their quotient by infinity would be 0."""
    query, key = (30 * np.random.default_rng(0).uniform(0.5, 1, (2, 40, 1))).astype(np.float32)
    value = np.full((40, 1), 1e-20, np.float32)
    plan = tattn.plan_for(n=40, dim=1, value_dim=1, bound=1.0, degree=24, order=2, causal=True, scale=1.0)
    with np.errstate(all="ignore"):
        (out, lse), pullback = tattn.tensor_attention_vjp(
            query, [key], [value], plan=plan, causal=True, offsets=offsets, return_lse=True
        )
        dquery, (dkey,), (dvalue,) = pullback(np.ones_like(out))
    for x in (out, lse, dquery, dkey, dvalue):
        assert np.isnan(x[15]).all()
