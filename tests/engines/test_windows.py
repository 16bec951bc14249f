"""The polynomial method in windows: the definition, its errors, and that what a row does not see leaves no trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import make_library
from reference import dense, value_sizes
from test_causal import Arrays, assert_close, expected, polynomial_of, run

import tattn

# Rows, windows, how many keys come before the first row, and the workspace, which sets how rows are cut: blocks longer than a
# window, segments of one block and of more, and windows over several segments and a part of one.
CASES = [
    pytest.param(*case, id=f"{case[0]} rows, windows {case[1]}, {case[2]} before, workspace {case[3]}")
    for case in (
        (5, (3,), (0,), None),
        (70, (1, 1), (0, 9), None),
        (70, (64, 33), (0, 21), None),
        (36, (5, 20, 17), (2, 0, 5), 1 << 13),
        (100, (40, 90), (0, 21), 1 << 14),
        (90, (41, 300), (30, 0), 1 << 14),
        (90, (70, 37), (60, 0), 1 << 13),
        (150, (70,), (60,), 1 << 12),
        (100, (5, 80), (30, 0), 1 << 15),
        (30, (24, 19), (0, 40), 1),
        (100, (90, 70), (0, 21), 1 << 17),
    )
]


def drawn(n: int, before: tuple[int, ...], dim: int = 3, *, shared: bool = False) -> Arrays:
    """Query, keys, values, masks and gradients; with `shared` problems that share some of them, and masks."""
    rng = np.random.default_rng(3)
    of_query, of_keys, of_values, of_masks = ((2, 2), (2, 1), (2,), (2, 1)) if shared else ((),) * 4
    whole = np.broadcast_shapes(of_query, of_keys, of_values, of_masks)
    query = rng.uniform(-1, 1, (*of_query, n, dim))
    keys = [rng.uniform(-1, 1, (*of_keys, n + more, dim)) for more in before]
    values = [rng.normal(size=(*of_values, n + more, 2)) for more in before]
    masks: Any = [rng.random((*of_masks, k.shape[-2])) < 0.6 for k in keys] if shared else None
    if shared and len(keys) > 1:
        masks[-1] = None
    return query, keys, values, masks, rng.normal(size=(*whole, n, 2)), rng.normal(size=(*whole, n))


def plan_of(call: Arrays, window: tuple[int, ...], **options: Any) -> tattn.Plan:
    """A polynomial for such a call."""
    query, keys = call[:2]
    options = {"bound": 1.0, "degree": 3, "dtype": "float64", **options}
    lengths = [x.shape[-2] for x in (query, *keys)]
    return tattn.plan_for(n=lengths, dim=query.shape[-1], order=len(keys) + 1, value_dim=2, window=window, **options)


def in_workspace(library: Any, workspace: int | None) -> Any:
    """The backend with so much room for a while; None as it is."""
    backend = library.backend
    return backend.using(workspace=backend.workspace if workspace is None else workspace)


@pytest.mark.parametrize(("n", "window", "before", "workspace"), CASES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.grid
def test_the_definition_with_the_polynomial(
    library: Any, n: int, window: tuple[int, ...], before: tuple[int, ...], workspace: int | None, shared: bool
) -> None:
    call = drawn(n, before, shared=shared and len(window) < 3)
    plan = plan_of(call, window)
    with in_workspace(library, workspace):
        found = run(library, call, plan=plan, window=window)
    assert_close(found, expected(call, window=window, **polynomial_of(plan)), 1e-11)


# Factors of two problems and three views: none, all, far below what float32 can tell from 0, and between.
FACTORS = [np.asarray(x) for x in ((0.9, 0.7), (1.0, 1e-30), (0.999, 0.0))]


@pytest.mark.parametrize(("n", "window", "before", "workspace"), CASES)
@pytest.mark.parametrize("turned", [False, pytest.param(True, marks=pytest.mark.thorough)])
@pytest.mark.grid
def test_keys_that_decay(
    library: Any, n: int, window: tuple[int, ...], before: tuple[int, ...], workspace: int | None, turned: bool
) -> None:
    """By factors of their own for each view and problem, which share keys and values; of one problem if there are three views."""
    m = len(window)
    call = drawn(n, before, shared=m < 3)
    decay = [x[::-1] if turned else x for x in (FACTORS * 2)[turned : turned + m]]
    if m == 3:
        decay = [x[0] for x in decay]
    plan = plan_of(call, window)
    with in_workspace(library, workspace):
        found = run(library, call, plan=plan, window=window, decay=decay)
    assert_close(found, expected(call, window=window, decay=decay, **polynomial_of(plan)), 1e-11)


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.grid
def test_complex_channels(library: Any, views: int, decays: bool) -> None:
    window = (20, 33, 7)[:views]
    call = drawn(40, (0, 12, 3)[:views], 4)
    plan = plan_of(call, window, channels="complex")
    options: Any = {"decay": [np.asarray(0.9)] * views} if decays else {}
    with in_workspace(library, 1 << 14):
        found = run(library, call, plan=plan, window=window, **options)
    assert_close(found, expected(call, window=window, channels="complex", **options, **polynomial_of(plan)), 1e-11)


@pytest.mark.thorough("jax")
@pytest.mark.parametrize("decays", [False, True])
def test_exact_windows(library: Any, decays: bool) -> None:
    """With weights of keys: a polynomial as good as exp gives what the exact method does, gradients of weights as well."""
    query, keys, values, *_, grad_out, grad_lse = drawn(60, (0, 20))
    rng = np.random.default_rng(4)
    key_weights = [rng.uniform(0, 2, (80,))[-k.shape[-2] :] * (rng.random(k.shape[-2]) < 0.8) for k in keys]
    query, keys, values, key_weights, grad_out, grad_lse, factors = library.arrays(
        query, keys, values, key_weights, grad_out, grad_lse, [np.asarray(0.95), np.asarray(0.8)]
    )
    more: Any = {"decay": factors} if decays else {}
    window, found = (40, 25), []
    plan = plan_of((query, keys, None, None, None, None), window, degree=9, bound=0.5, scale=0.1)  # type: ignore[arg-type]
    for options in ({"plan": plan}, {"method": "exact", "scale": 0.1}):
        with in_workspace(library, 1 << 14 if "plan" in options else None):
            (out, lse), pullback = tattn.tensor_attention_vjp(
                query, keys, values, key_weights=key_weights, window=window, return_lse=True, **options, **more
            )
            dquery, *grads = pullback(grad_out, grad_lse)
        found.append([library.numpy(x) for x in (out, lse, dquery, *(g for of in grads for g in of))])
    assert len(found[0]) == 11 if decays else 9
    for got, wanted in zip(*found, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.thorough("jax")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("factor", [None, 0.9])
def test_errors_are_within_what_is_stated(library: Any, dtype: type, factor: float | None) -> None:
    call = drawn(90, (0, 21))
    window = (50, 33)
    query, keys, values, grad_out = library.arrays(*(cast(x, dtype) for x in (*call[:3], call[4])))
    decay = None if factor is None else [np.asarray(factor, dtype)] * 2
    truth = dense(
        *(cast(cast(x, dtype), np.float64) for x in call[:3]),
        window=window,
        decay=decay,
        grad_out=np.float64(dtype(call[4])),
    )
    plan = tattn.plan(query, keys, tol=1e-2, method="polynomial", window=window)
    (out, error), pullback = tattn.tensor_attention_vjp(
        query, keys, values, plan=plan, window=window, return_error=True, decay=decay and library.arrays(decay)
    )
    assert plan.certified and plan.error <= 1e-2
    assert library.numpy(error).max() <= plan.error
    assert (np.abs(library.numpy(out) - truth.out) <= plan.error * value_sizes(call[2])).all()
    grads, bounds = pullback(grad_out), pullback(grad_out, return_error=True)[1]
    for got, bound, wanted in zip(flat(grads), flat(bounds), (truth.dquery, *truth.dkeys, *truth.dvalues), strict=True):
        assert (np.abs(library.numpy(got) - wanted) <= library.numpy(bound)).all()


def cast(x: Any, dtype: type) -> Any:
    """Arrays of a structure in another dtype."""
    return [cast(a, dtype) for a in x] if isinstance(x, list) else x.astype(dtype)


def flat(grads: Any) -> list[Any]:
    """Query, keys and values one after another."""
    return [grads[0], *grads[1], *grads[2]]


def test_a_window_of_all_rows_is_a_causal_call(library: Any) -> None:
    """To the bit: it is computed as one."""
    query, keys, values, *_ = library.arrays(*drawn(40, (0, 7)))
    windowed, causal = (
        tattn.tensor_attention(
            query,
            keys,
            values,
            plan=tattn.plan_for(n=(40, 40, 47), dim=3, bound=1.0, degree=3, dtype="float64", **order),
            **order,
        )
        for order in ({"window": (40, 99)}, {"causal": True})
    )
    assert (library.numpy(windowed) == library.numpy(causal)).all()


def test_a_window_of_one_row(library: Any) -> None:
    query, keys, values, *_ = library.arrays(*drawn(40, (0, 7)))
    plan = plan_of((query, keys, None, None, None, None), (1, 1))  # type: ignore[arg-type]
    out = library.numpy(tattn.tensor_attention(query, keys, values, plan=plan, window=(1, 1)))
    u, v = map(library.numpy, values)
    np.testing.assert_allclose(out, u * v[7:], rtol=1e-13)


@pytest.mark.parametrize("window", [(30, 30), (200, 100), (64, 300)])
def test_what_left_the_window_leaves_no_trace(window: tuple[int, ...]) -> None:
    """Rows that weigh 2^30 times as much take no digit from those behind: a difference of sums would."""
    from tattn.backends.numpy import BACKEND

    query, keys, values, *_ = (cast(x, np.float32) if x is not None else x for x in drawn(700, (0, 0)))
    plan = plan_of((query, keys, None, None, None, None), window, dtype="float32")  # type: ignore[arg-type]
    weights = [np.where(np.arange(700) < 100, np.float32(2.0**30), np.float32(1.0)) for _ in keys]
    with BACKEND.using(workspace=1 << 14):
        light, heavy = (
            tattn.tensor_attention(query, keys, values, plan=plan, window=window, key_weights=w)
            for w in (None, weights)
        )
    behind = 99 + max(window)
    assert np.abs(heavy[behind:] - light[behind:]).max() < 1e-6 * np.abs(light).max()
    assert np.abs(heavy[:behind] - light[:behind]).max() > 1e-3


def test_the_cheaper_method_is_chosen() -> None:
    options: dict[str, Any] = {"n": 10**6, "dim": 8, "bound": 1.0}
    short, long, longer = (tattn.plan_for(**options, window=(w, w)) for w in (32, 4096, 32768))
    assert short.method == "exact" and "exact takes" in short.reason
    assert long.method == "polynomial" and "fewer operations than exact" in long.reason
    # Linear in the rows, whatever the window.
    assert long.flops_polynomial == longer.flops_polynomial
    causal = tattn.plan_for(**options, causal=True, degree=long.degree)
    assert 1 < long.flops_polynomial / causal.flops_polynomial < 4
    assert causal.error < long.error < 1.2 * causal.error
    assert tattn.plan_for(**options, window=(10**6, 10**6)).flops_polynomial == causal.flops_polynomial
    assert "windows of (4096, 4096)" in str(long)


def test_short_windows_by_compiled_loops_are_cheaper_than_exact() -> None:
    """Exact scores of short windows take longer than their number says: five times here."""
    pytest.importorskip("numba")
    query, *keys = np.random.default_rng(0).uniform(-1, 1, (3, 4096, 8)).astype(np.float32)
    values = [np.ones((4096, 8), np.float32)] * 2
    assert tattn.plan(query, keys, values, window=(32, 32)).method == "polynomial"
    assert tattn.plan(query, keys, values, window=(2, 2)).method == "exact"


def test_refusals() -> None:
    query, keys, values, *_ = drawn(40, (0, 0))
    plan = tattn.plan(query, keys, degree=3, window=(20, 20))
    with pytest.raises(tattn.PlanError, match=r"plan should have no window to summarize, got \(20, 20\)"):
        tattn.summarize(keys, values, plan)
    with pytest.raises(tattn.PlanError, match="a plan for workers should have no window"):
        tattn.plan_for(n=10**6, dim=3, bound=1.0, window=(4096, 4096), workers=2)


@pytest.mark.libraries("jax")
def test_traced_calls() -> None:
    """Without a range "auto" is exact; a plan with a promise takes the polynomial, in one program for all segments."""
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    query, keys, values, *_ = drawn(64, (0, 0))
    arrays = [jax.numpy.asarray(x) for x in (query, *keys, *values)]
    plan = plan_of((query, keys, None, None, None, None), (20, 9))  # type: ignore[arg-type]

    def attend(q: Any, a: Any, b: Any, u: Any, v: Any, **options: Any) -> Any:
        return tattn.tensor_attention(q, [a, b], [u, v], window=(20, 9), **options)

    exact = dense(query, keys, values, window=(20, 9)).out
    np.testing.assert_allclose(jax.jit(attend)(*arrays), exact, rtol=1e-12)
    with pytest.raises(tattn.PlanError, match="its values cannot be read"):
        jax.jit(lambda *arrays: attend(*arrays, method="polynomial"))(*arrays)
    with in_workspace(make_library("jax"), 1 << 12):
        text = jax.jit(lambda *arrays: attend(*arrays, plan=plan)).lower(*arrays).as_text()
        found = np.asarray(jax.jit(lambda *arrays: attend(*arrays, plan=plan))(*arrays))
    assert (np.abs(found - exact) <= plan.error * value_sizes(values)).all()
    assert text.count("while") < 12
