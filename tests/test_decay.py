"""Keys that decay: a key t rows before a row has the weight λ^t of its view."""

from __future__ import annotations

from itertools import pairwise
from math import exp
from typing import Any

import numpy as np
import pytest
from cases import refuse

import tattn
from tattn.backends.numpy import BACKEND

N, DIM = 45, 4


def drawn(views: int, extra: int = 0, n: int = N, seed: int = 0) -> tuple[Any, ...]:
    """Query, keys, values and gradients of output and lse, of two heads."""
    rng = np.random.default_rng(seed)
    query = rng.uniform(-1, 1, (2, n, DIM))
    keys = [rng.uniform(-1, 1, (2, n + extra, DIM)) for _ in range(views)]
    values = [rng.normal(size=(2, n + extra, 3)) for _ in range(views)]
    return query, keys, values, rng.normal(size=(2, n, 3)), rng.normal(size=(2, n))


def defined(query: Any, keys: Any, values: Any, decay: Any, window: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """The definition, with all weights as an array (..., n, n_1, …)."""
    n, m = query.shape[-2], len(keys)
    letters = "jkl"[:m]
    score = np.einsum("...ic," + ",".join(f"...{x}c" for x in letters) + f"->...i{letters}", query, *keys) / DIM
    weight = np.exp(score)
    for view, (k, factor) in enumerate(zip(keys, decay, strict=True)):
        t = np.arange(n)[:, None] + k.shape[-2] - n - np.arange(k.shape[-2])
        seen = (t >= 0) & (t < (window[view] if window else np.inf))
        own = np.where(seen, np.asarray(factor, float)[..., None, None] ** np.maximum(t, 0), 0)
        own = own.reshape(*own.shape[:-1], *(1,) * view, own.shape[-1], *(1,) * (m - 1 - view))
        weight = weight * own
    out = np.einsum(f"...i{letters}," + ",".join(f"...{x}e" for x in letters) + "->...ie", weight, *values)
    total = weight.sum(axis=tuple(range(-m, 0)))
    return out / total[..., None], np.log(total)


def factors(views: int) -> list[np.ndarray]:
    """One for each head and view."""
    return [np.asarray([0.9, 0.55]), np.asarray([0.7, 0.98]), np.asarray([0.5, 0.8])][:views]


def plan_of(views: int, extra: int, **order: Any) -> tattn.Plan:
    """A polynomial of small error."""
    degree, n = 12 if views == 1 else 9, (N, *(N + extra,) * views)
    return tattn.plan_for(n=n, dim=DIM, bound=1.0, degree=degree, order=views + 1, dtype="float64", **order)


def in_windows(views: int, extra: int) -> dict[str, Any]:
    """Of some chunks, of less than one, and of a bit more."""
    window = (37, 12, 17)[:views]
    return {"plan": plan_of(views, extra, window=window), "window": window}


METHODS = {
    "exact": lambda views, extra: {"method": "exact"},
    "polynomial": lambda views, extra: {"plan": plan_of(views, extra, causal=True)},
    "windows": in_windows,
}


@pytest.mark.grid("jax")
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("extra", [0, 7])
def test_it_is_the_definition(library: Any, method: str, views: int, extra: int) -> None:
    n = N if views < 3 else 20
    query, keys, values, *_ = drawn(views, extra, n)
    decay = factors(views)
    q, k, v, given = library.arrays(query, keys, values, decay)
    options = METHODS[method](views, extra)
    out, lse = tattn.tensor_attention(q, k, v, causal=True, decay=given, return_lse=True, **options)
    expected = defined(query, keys, values, decay, options.get("window"))
    error = 1e-13 if method == "exact" else options["plan"].error
    assert error < 1e-6
    largest = np.prod([np.abs(x).max(axis=-2, keepdims=True) for x in values], axis=0)
    assert (np.abs(library.numpy(out) - expected[0]) <= error * largest).all()
    assert np.abs(library.numpy(lse) - expected[1]).max() <= max(-np.log1p(-error), 1e-13)


@pytest.mark.grid("jax")
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("how", [*METHODS, "exact windows"])
@pytest.mark.parametrize("extra", [0, 7])
def test_slopes(library: Any, how: str, views: int, extra: int) -> None:
    """Of query, keys, values and factors, by central differences along one direction."""
    query, keys, values, grad_out, grad_lse = drawn(views, extra)
    decay = factors(views)
    options = METHODS[how](views, extra) if how in METHODS else {"method": "exact", "window": (12,) * views}
    arrays = [query, *keys, *values, *decay]
    rng = np.random.default_rng(5)
    direction = [rng.normal(size=x.shape) for x in arrays]

    def at(step: float) -> Any:
        moved = [x + step * d for x, d in zip(arrays, direction, strict=True)]
        q, *rest = moved
        return q, rest[:views], rest[views : 2 * views], rest[2 * views :]

    def value(step: float) -> float:
        q, k, v, factor = at(step)
        out, lse = tattn.tensor_attention(q, k, v, causal=True, decay=factor, return_lse=True, **options)
        return float((out * grad_out).sum() + (lse * grad_lse).sum())

    q, k, v, given, g, g_lse = library.arrays(query, keys, values, decay, grad_out, grad_lse)
    _, pullback = tattn.tensor_attention_vjp(q, k, v, causal=True, decay=given, **options)
    dquery, dkeys, dvalues, ddecay = pullback(g, g_lse)
    grads = [library.numpy(x) for x in (dquery, *dkeys, *dvalues, *ddecay)]
    assert [x.shape for x in grads] == [x.shape for x in arrays]
    slope = sum((x * d).sum() for x, d in zip(grads, direction, strict=True))
    step = 1e-5
    assert slope == pytest.approx((value(step) - value(-step)) / (2 * step), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("how", METHODS)
@pytest.mark.thorough("jax")
def test_documents_decay_each_by_itself(library: Any, how: str) -> None:
    query, keys, values, grad_out, grad_lse = drawn(2)
    ends = [0, 4, 4, 25, N]
    mask, factor = np.arange(N) % 7 != 2, np.asarray([0.9, 0.6])
    q, k, v, g, g_lse, mask, factor, offsets = library.arrays(
        query, keys, values, grad_out, grad_lse, mask, factor, np.asarray(ends)
    )

    def of(rows: slice, **more: Any) -> list[np.ndarray]:
        given = [[x[:, rows, :] for x in several] for several in (k, v)]
        options: Any = {"key_masks": [mask[rows], None], "return_lse": True, **METHODS[how](2, 0), **more}
        out, pullback = tattn.tensor_attention_vjp(q[:, rows, :], *given, causal=True, decay=[factor, 0.8], **options)
        dquery, dkeys, dvalues, ddecay = pullback(g[:, rows, :], g_lse[:, rows])
        assert ddecay[1] is None
        return [library.numpy(x) for x in (*out, dquery, *dkeys, *dvalues, ddecay[0])]

    packed = of(slice(0, N), offsets=offsets)
    parts = [of(slice(start, stop)) for start, stop in pairwise(ends) if stop > start]
    for i, (got, *each) in enumerate(zip(packed, *parts, strict=True)):
        expected = sum(each) if i == 7 else np.concatenate(each, axis=1)
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.grid("jax")
@pytest.mark.parametrize("how", METHODS)
def test_one_is_no_decay_and_none_neither(library: Any, how: str) -> None:
    query, keys, values, *_ = library.arrays(*drawn(2))
    options = METHODS[how](2, 0)
    plain = library.numpy(tattn.tensor_attention(query, keys, values, causal=True, **options))
    for decay in ([1.0, 1], [None, 1.0]):
        got = tattn.tensor_attention(query, keys, values, causal=True, decay=decay, **options)
        assert np.abs(library.numpy(got) - plain).max() < 1e-13


@pytest.mark.grid("jax")
@pytest.mark.parametrize("how", METHODS)
def test_zero_is_a_window_of_one(library: Any, how: str) -> None:
    query, keys, values, grad_out, _ = drawn(2)
    mask = np.ones(N, bool)
    mask[[0, 7, 8]] = False
    q, k, v, g, given, zero = library.arrays(query, keys, values, grad_out, mask, np.zeros(2))
    options: Any = {"causal": True, "decay": [zero, None], "key_masks": [given, None], "return_lse": True}
    options |= METHODS[how](2, 0)
    (out, lse), pullback = tattn.tensor_attention_vjp(q, k, v, **options)
    other = options["window"][1] if "window" in options else N
    expected = tattn.tensor_attention(
        query, keys, values, window=(1, other), key_masks=[mask, None], method="exact", return_lse=True
    )
    for got, like in zip((out, lse), expected, strict=True):
        assert np.array_equal(np.isneginf(library.numpy(got)), np.isneginf(like))
        finite = np.isfinite(like)
        assert np.abs(library.numpy(got)[finite] - like[finite]).max() < 1e-6
    assert all(np.isfinite(library.numpy(x)).all() for x in (pullback(g)[0], pullback(g)[3][0]))


@pytest.mark.parametrize("how", METHODS)
def test_short_calls_are_those_with_weights(how: str) -> None:
    query, keys, values, *_ = drawn(2)
    decay = [0.9, 0.8]
    weights = [np.broadcast_to(x ** -np.arange(float(N)), (2, N)) for x in decay]
    got = tattn.tensor_attention(query, keys, values, causal=True, decay=decay, **METHODS[how](2, 0))
    like = tattn.tensor_attention(query, keys, values, causal=True, key_weights=weights, **METHODS[how](2, 0))
    assert np.abs(got - like).max() < 1e-12


@pytest.mark.parametrize("order", [{"causal": True}, {"window": (1000, 300)}], ids=str)
@pytest.mark.parametrize("factor", [0.9, 0.999])
@pytest.mark.parametrize("n", [5000, pytest.param(100_000, marks=pytest.mark.thorough)])
def test_long_sums_in_float32(order: dict[str, Any], factor: float, n: int) -> None:
    rng = np.random.default_rng(0)
    query, *keys = rng.uniform(-1, 1, (3, n, 2)).astype(np.float32)
    values = [rng.uniform(-1, 1, (n, 2)).astype(np.float32) for _ in range(2)]
    decay = [float(np.float32(factor))] * 2
    plan = tattn.plan_for(n=n, dim=2, bound=1.0, degree=6, **order)
    got = tattn.tensor_attention(query, keys, values, **order, decay=decay, plan=plan)
    wide = tattn.plan_for(n=n, dim=2, bound=1.0, degree=12, **order, dtype="float64")
    arrays = query.astype(float), [k.astype(float) for k in keys], [v.astype(float) for v in values]
    truth = tattn.tensor_attention(*arrays, **order, decay=decay, plan=wide)
    assert np.abs(got - truth).max() <= plan.error + wide.error


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("order", [{"causal": True}, {"window": (20, 30)}], ids=str)
@pytest.mark.libraries("torch")
def test_narrow_dtypes_compute_in_float32(order: dict[str, Any], dtype: str) -> None:
    """In calls long enough to be asked whether compiled loops serve them."""
    import torch

    narrow = [
        torch.tensor(x[0]).to(getattr(torch, dtype)) for x in np.random.default_rng(0).uniform(-1, 1, (5, 1, 170, 4))
    ]
    wide = [x.float() for x in narrow]
    for decay in (0.9, 1e-3):
        got, like = (tattn.tensor_attention(x[0], x[1:3], x[3:], **order, decay=[decay, None]) for x in (narrow, wide))
        assert got.dtype == narrow[0].dtype
        torch.testing.assert_close(got.float(), like, rtol=1e-2, atol=4e-3)


@pytest.mark.parametrize("views", [1, 2])
def test_sizes_of_blocks_change_nothing(views: int) -> None:
    """Rows in one block, and in blocks and segments of blocks."""
    query, keys, values, grad_out, grad_lse = drawn(views, extra=30, n=700)
    plan = tattn.plan_for(
        n=(700, *(730,) * views), dim=DIM, bound=1.0, degree=4, order=views + 1, dtype="float64", causal=True
    )

    def of(factor: Any) -> list[np.ndarray]:
        options: Any = {"causal": True, "decay": factor, "plan": plan, "return_lse": True}
        (out, lse), pullback = tattn.tensor_attention_vjp(query, keys, values, **options)
        dquery, dkeys, dvalues, ddecay = pullback(grad_out, grad_lse)
        return [out, lse, dquery, *dkeys, *dvalues, *ddecay]

    for decay in (factors(views), [np.asarray([0.0, 1e-3])] * views, [np.asarray([1.0, 0.9999])] * views):
        whole = of(decay)
        with BACKEND.using(workspace=1 << 14):
            parts = of(decay)
        for got, like in zip(parts, whole, strict=True):
            np.testing.assert_allclose(got, like, rtol=1e-10, atol=1e-11 * np.abs(like).max())


@pytest.mark.parametrize("channels", ["real", "complex"])
@pytest.mark.grid("jax")
def test_summaries_and_tokens(library: Any, channels: str) -> None:
    """A prompt, more rows, and one row after another: the rows of the causal call."""
    query, keys, values, *_ = drawn(2)
    mask, weights = np.ones(N, bool), np.random.default_rng(1).uniform(0.5, 2, N)
    mask[[3, 39]], weights[40:] = False, 1
    q, k, v, factor, mask, weights = library.arrays(query, keys, values, np.asarray([0.9, 0.0]), mask, weights)
    plan = tattn.plan_for(n=N, dim=DIM, bound=1.0, degree=3, causal=True, dtype="float64", channels=channels)
    counted = {"key_masks": [mask, None], "key_weights": [None, weights]}
    decay = [factor, 0.97]
    expected = tattn.tensor_attention(q, k, v, causal=True, decay=decay, plan=plan, return_lse=True, **counted)

    def rows(start: int, stop: int) -> Any:
        of_rows = {name: [None if x is None else x[start:stop] for x in of] for name, of in counted.items()}
        # Kernels take tokens without any.
        return [[x[:, start:stop, :] for x in of] for of in (k, v)], of_rows if start < 40 else {}

    (ks, vs), of_rows = rows(0, 30)
    summary = tattn.summarize(ks, vs, plan, decay=decay, **of_rows)
    (ks, vs), of_rows = rows(30, 38)
    state = tattn.DecodingState(plan, summary.update(ks, vs, decay=decay, **of_rows))
    for i in range(38, N):
        (ks, vs), of_rows = rows(i, i + 1)
        found, state = state.step(q[:, i : i + 1, :], ks, vs, decay=decay, return_lse=True, **of_rows)
        for got, like in zip(found, expected, strict=True):
            # lse is −inf where a row sees its own key alone, which is masked.
            np.testing.assert_allclose(library.numpy(got)[:, 0], library.numpy(like)[:, i], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", ["real", "complex"])
@pytest.mark.parametrize("factor", [0.9, 0.9999])
@pytest.mark.parametrize("n", [1000, pytest.param(100_000, marks=pytest.mark.thorough)])
def test_long_streams_in_float32(channels: str, factor: float, n: int) -> None:
    rng = np.random.default_rng(0)
    query, *keys = rng.uniform(-1, 1, (3, n, 2)).astype(np.float32)
    values = [rng.uniform(-1, 1, (n, 2)).astype(np.float32) for _ in range(2)]
    decay = [float(np.float32(factor))] * 2
    options: Any = {"dim": 2, "bound": 1.0, "causal": True, "channels": channels}
    plan, wide = (tattn.plan_for(n=n, degree=6, dtype=dtype, **options) for dtype in ("float32", "float64"))
    arrays = query.astype(float), [k.astype(float) for k in keys], [v.astype(float) for v in values]
    truth = tattn.tensor_attention(*arrays, causal=True, decay=decay, plan=wide)
    state = tattn.DecodingState(plan)
    for i in range(n):
        token = slice(i, i + 1)
        out, state = state.step(query[token], [k[token] for k in keys], [v[token] for v in values], decay=decay)
        # Both have the polynomial's error: apart are units of float32.
        assert np.abs(out[0] - truth[i]).max() < 2e-6
    # The first number sums what rows weigh, and is right to a unit or two.
    weighs = (1 - decay[0] ** n) / (1 - decay[0])
    for total, rest in zip(state.summary.sums, state.summary.rests, strict=True):
        assert abs(float(total[0, -1]) / weighs - 1) < 2.0**-22
        assert abs((float(total[0, -1]) + float(rest[0, -1])) / weighs - 1) < 2.0**-23


def test_sums_with_factors_that_are_none() -> None:
    _, keys, values, *_ = drawn(2)
    plan = METHODS["polynomial"](2, 0)["plan"]
    refuse(tattn.summarize, ValueError, r"decay\[0\] should be from 0 to 1", keys, values, plan, decay=[2, 1])
    refuse(tattn.summarize, ValueError, "decay should have one factor for each of the 2", keys, values, plan, decay=[1])
    wrong = [np.full(3, 0.5), 1]
    refuse(tattn.summarize, ValueError, r"decay\[0\] should have leading dimensions", keys, values, plan, decay=wrong)
    # Arrays are not read.
    summary = tattn.summarize(keys, values, plan, decay=[np.asarray([0.5, 1.5]), 1])
    assert np.isfinite(summary.sums[0][0]).all() and np.isnan(summary.sums[0][1]).all()


@pytest.mark.parametrize("how", ["polynomial", "windows"])
def test_factors_that_are_none_are_not_read_with_a_promise(library: Any, how: str) -> None:
    """They are NaN, and so is what they weigh."""
    query, keys, values, given = library.arrays(*drawn(2)[:3], [np.asarray([0.5, 1.5]), np.asarray(0.9)])
    out = tattn.tensor_attention(query, keys, values, causal=True, decay=given, **METHODS[how](2, 0))
    assert np.isfinite(library.numpy(out)[0]).all() and np.isnan(library.numpy(out)[1]).all()


@pytest.mark.thorough
@pytest.mark.parametrize("how", METHODS)
@pytest.mark.libraries("torch")
def test_torch_compiles_it(library: Any, how: str) -> None:
    """As one graph, with the gradients of a call that is not compiled."""
    import torch

    query, keys, values, *_ = drawn(2)
    arrays = library.arrays([query, *keys, *values, np.asarray([-0.3, -0.1])])
    options = METHODS[how](2, 0)
    plan = options.get("plan") or tattn.plan_for(n=N, dim=DIM, bound=1.0, dtype="float64", causal=True, method="exact")

    def loss(query: Any, a: Any, b: Any, u: Any, v: Any, logs: Any) -> Any:
        decay = [torch.exp(logs), 0.9]
        order: Any = {"causal": True, "window": plan.window, "decay": decay}
        out, lse = tattn.tensor_attention(query, [a, b], [u, v], plan=plan, return_lse=True, **order)
        return out.square().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = []
    for of in (loss, compiled):
        own = [x.clone().requires_grad_() for x in arrays]
        value = of(*own)
        found.append((value, *torch.autograd.grad(value, own)))
    for got, like in zip(*found, strict=True):
        torch.testing.assert_close(got, like, rtol=1e-12, atol=1e-12)


@pytest.mark.libraries("torch")
def test_torch_differentiates_it(library: Any) -> None:
    import torch

    query, keys, values, grad_out, _ = (library.arrays(x) for x in drawn(2))
    logs = torch.full((2,), -0.3, dtype=torch.float64, requires_grad=True)
    out = tattn.tensor_attention(query, keys, values, causal=True, decay=[torch.exp(logs)] * 2, method="exact")
    (out * grad_out).sum().backward()
    factor = torch.full((2,), exp(-0.3), dtype=torch.float64)
    _, pullback = tattn.tensor_attention_vjp(query, keys, values, causal=True, decay=[factor] * 2, method="exact")
    expected = sum(pullback(grad_out)[3]) * factor
    assert torch.allclose(logs.grad, expected, rtol=1e-10)


@pytest.mark.libraries("torch")
def test_torch_differentiates_windows_twice(library: Any) -> None:
    import torch

    query, keys, values, *_ = library.arrays(*drawn(2, n=6))
    plan = tattn.plan_for(n=6, dim=DIM, bound=1.0, degree=2, dtype="float64", window=(4, 2))
    rest = [x[:1].clone().requires_grad_() for x in (query, *keys, *values)]
    factor = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)

    def of(query: Any, a: Any, b: Any, u: Any, v: Any, factor: Any) -> Any:
        options: Any = {"plan": plan, "window": plan.window, "return_lse": True}
        return tattn.tensor_attention(query, [a, b], [u, v], decay=[factor, 0.7], **options)

    assert torch.autograd.gradcheck(of, (*rest, factor), fast_mode=True)
    assert torch.autograd.gradgradcheck(of, (*rest, factor), fast_mode=True)


@pytest.mark.libraries("jax")
def test_jax_differentiates_it(library: Any) -> None:
    import jax

    query, keys, values, grad_out, _ = (library.arrays(x) for x in drawn(1))
    factor = library.arrays(np.asarray([0.9, 0.5]))

    def loss(x: Any) -> Any:
        return (tattn.tensor_attention(query, keys, values, causal=True, decay=[x], method="exact") * grad_out).sum()

    _, pullback = tattn.tensor_attention_vjp(query, keys, values, causal=True, decay=[factor], method="exact")
    assert np.allclose(jax.jit(jax.grad(loss))(factor), pullback(grad_out)[3][0], rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay": [0.5, 0.5]}, ValueError, "decay should come with causal=True"),
        ({"decay": 0.5, "causal": True}, TypeError, "decay should be a list or tuple of 2 factors"),
        ({"decay": [0.5], "causal": True}, ValueError, "decay should have one factor for each of the 2 views, got 1"),
        ({"decay": [0.5, 1.5], "causal": True}, ValueError, r"decay\[1\] should be from 0 to 1"),
        ({"decay": [float("nan"), 1], "causal": True}, ValueError, r"decay\[0\] should be from 0 to 1"),
        ({"decay": [np.asarray([0.5, -0.1]), 1], "causal": True}, ValueError, r"decay\[0\] should be from 0 to 1"),
        ({"decay": [np.full(3, 0.5), 1], "causal": True}, ValueError, r"decay\[0\] should have leading dimensions"),
        ({"decay": [np.full(2, 0.5, np.float32), 1], "causal": True}, TypeError, r"decay\[0\] should have"),
        ({"decay": ["fast", 1], "causal": True}, TypeError, r"decay\[0\] should be an array"),
    ],
)
def test_refused_by_name(options: Any, error: type, message: str) -> None:
    query, keys, values, *_ = drawn(2)
    refuse(tattn.tensor_attention, error, message, query, keys, values, **options)
