"""Causal attention and windows: against the dense definition with its full mask, on every library, by both methods."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial.polynomial import polyder, polyval
from reference import Dense, dense, value_sizes
from watching import calls_of

import tattn

Arrays = tuple[np.ndarray, list[np.ndarray], list[np.ndarray], list[np.ndarray | None] | None, np.ndarray, np.ndarray]


def draw(
    n: int,
    views: int,
    *,
    more: tuple[int, ...] = (0, 3, 5),
    masked: bool = False,
    broadcast: bool = False,
    leading: tuple[tuple[int, ...], ...] = ((),) * 4,
) -> Arrays:
    """Query, keys, values, masks and gradients of output and lse; view μ has `more[μ]` rows more than the query."""
    rng = np.random.default_rng(0)
    of_query, of_keys, of_values, of_masks = ((2, 3), (2, 1), (3,), (2, 1)) if broadcast else leading
    query = rng.uniform(-1, 1, (*of_query, n, 3))
    keys = [rng.uniform(-1, 1, (*of_keys, n + extra, 3)) for extra in more[:views]]
    values = [rng.normal(size=(*of_values, n + extra, 2)) for extra in more[:views]]
    masks: list[np.ndarray | None] | None = None
    if masked:
        # The first rows see nothing at all.
        masks = [rng.random((*of_masks, k.shape[-2])) < 0.6 for k in keys]
        masks[0][..., : max(1, n // 3)] = False
        if views > 1:
            masks[1] = None
    return query, keys, values, masks, rng.normal(size=(*of_query, n, 2)), rng.normal(size=(*of_query, n))


def run(library: Any, call: Arrays, **options: Any) -> Dense:
    """Output, lse and all gradients, in NumPy."""
    query, keys, values, masks, grad_out, grad_lse, decay = library.arrays(*call, options.pop("decay", None))
    options |= {"key_masks": masks, "decay": decay, "return_lse": True}
    (out, lse), pullback = tattn.tensor_attention_vjp(query, keys, values, **options)
    dquery, dkeys, dvalues, *ddecay = pullback(grad_out, grad_lse)
    for got, of in zip((out, lse, dquery, *dkeys, *dvalues), (query, query, query, *keys, *values), strict=True):
        assert library.is_array(got)
        assert got.dtype == of.dtype
        assert library.device(got) == library.device(of)
    read = library.numpy
    return Dense(read(out), read(lse), read(dquery), *([*map(read, of)] for of in (dkeys, dvalues, *ddecay)))


def expected(call: Arrays, **options: Any) -> Dense:
    query, keys, values, masks, grad_out, grad_lse = call
    return dense(query, keys, values, masks=masks, grad_out=grad_out, grad_lse=grad_lse, causal=True, **options)


def assert_close(got: Dense, truth: Dense, tolerance: float) -> None:
    for name, a, b in zip(Dense._fields, got, truth, strict=True):
        for x, y in zip(*(v if isinstance(v, (list, tuple)) else [v] for v in (a, b)), strict=True):
            assert x.shape == y.shape
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=name)


CASES = [
    pytest.param(
        n, views, masked, broadcast, id=f"{n} rows {views} views{' masked' * masked}{' broadcast' * broadcast}"
    )
    for n, views, masked, broadcast in (
        (1, 2, False, False),
        (5, 1, True, True),
        (9, 2, True, False),
        (9, 3, True, True),
        (33, 1, False, False),
        (33, 2, True, True),
    )
]


@pytest.mark.parametrize(("n", "views", "masked", "broadcast"), CASES)
@pytest.mark.grid
def test_exact_is_the_definition(library: Any, n: int, views: int, masked: bool, broadcast: bool) -> None:
    call = draw(n, views, masked=masked, broadcast=broadcast)
    assert_close(run(library, call, method="exact", causal=True), expected(call), 1e-12)


def polynomial_of(plan: tattn.Plan) -> dict[str, Any]:
    """What stands for exp, and its derivative."""
    p = plan.coefficients
    return {"function": lambda x: polyval(x, p), "derivative": lambda x: polyval(x, polyder(p))}


@pytest.mark.grid
@pytest.mark.parametrize(("n", "views", "masked", "broadcast"), CASES)
def test_polynomial_is_the_definition_with_its_polynomial(
    library: Any, n: int, views: int, masked: bool, broadcast: bool
) -> None:
    call = draw(n, views, masked=masked, broadcast=broadcast)
    lengths = [n, *(k.shape[-2] for k in call[1])]
    plan = tattn.plan_for(n=lengths, dim=3, order=views + 1, bound=1.0, degree=4, dtype="float64", causal=True)
    assert_close(run(library, call, plan=plan, causal=True), expected(call, **polynomial_of(plan)), 1e-12)


@pytest.mark.thorough("strict")
@pytest.mark.grid("numpy", "torch", "jax")
@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize(
    "leading", [((4,), (), (), ()), ((4,), (1,), (), ()), ((2, 2), (2, 1), (1, 1), ()), ((), (3,), (), ())]
)
@pytest.mark.parametrize("masked", [False, True])
def test_views_that_problems_share(
    library: Any, leading: tuple[tuple[int, ...], ...], views: int, masked: bool
) -> None:
    """More rows than a chunk has: gradients of what is shared count each problem once."""
    call = draw(40, views, masked=masked, leading=leading)
    if leading[0] == ():
        call = (*call[:4], *(np.broadcast_to(g, (3, *g.shape)).copy() for g in call[4:]))
    plan = tattn.plan_for(n=40, dim=3, order=views + 1, bound=1.0, degree=3, dtype="float64", causal=True)
    assert_close(run(library, call, plan=plan, causal=True), expected(call, **polynomial_of(plan)), 1e-11)


@pytest.mark.grid
@pytest.mark.parametrize(("n", "views", "masked", "broadcast"), CASES)
def test_windows_are_the_definition(library: Any, n: int, views: int, masked: bool, broadcast: bool) -> None:
    call = draw(n, views, masked=masked, broadcast=broadcast)
    window = (3, 7, 2)[:views]
    assert_close(run(library, call, window=window, method="exact"), expected(call, window=window), 1e-12)


@pytest.mark.parametrize("window", [None, (40, 25), (1000, 1)])
@pytest.mark.grid
def test_exact_in_several_runs(library: Any, window: tuple[int, ...] | None) -> None:
    """More rows than a run has, and keys before the first row."""
    call = draw(70, 2, more=(0, 21), masked=True)
    assert_close(run(library, call, method="exact", causal=True, window=window), expected(call, window=window), 1e-12)


@pytest.mark.thorough("jax")
def test_polynomial_in_several_blocks(library: Any) -> None:
    """Of so many monomials that blocks are short, and segments of several blocks."""
    rng = np.random.default_rng(1)
    query, *keys = (rng.uniform(-1, 1, (n, 8)) for n in (150, 150, 171))
    values = [rng.normal(size=(len(k), 2)) for k in keys]
    call = (query, keys, values, None, rng.normal(size=(150, 2)), rng.normal(size=150))
    plan = tattn.plan_for(n=(150, 150, 171), dim=8, bound=1.0, degree=5, dtype="float64", causal=True)
    assert_close(run(library, call, plan=plan, causal=True), expected(call, **polynomial_of(plan)), 1e-11)


def causal_plan(views: int, n: int, method: str, **options: Any) -> tattn.Plan:
    return tattn.plan_for(
        n=n, dim=3, order=views + 1, bound=1.0, dtype="float64", tol=1e-2, method=method, causal=True, **options
    )


methods = pytest.mark.parametrize("method", ["exact", "polynomial"])


@methods
@given(n=st.integers(1, 70), views=st.integers(1, 3), data=st.data())
def test_what_comes_later_does_not_matter(method: str, n: int, views: int, data: st.DataObject) -> None:
    n = min(n, 20) if views == 3 and method == "exact" else n
    query, keys, values, *_ = draw(n, views, more=(0,) * views)
    plan = causal_plan(views, n, method)
    row = data.draw(st.integers(0, n - 1))
    changed = [[np.concatenate([x[: row + 1], -3 * x[row + 1 :] + 1]) for x in xs] for xs in ([query], keys, values)]
    before = tattn.tensor_attention(query, keys, values, plan=plan, causal=True, return_lse=True)
    after = tattn.tensor_attention(*changed[0], *changed[1:], plan=plan, causal=True, return_lse=True)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(a[: row + 1], b[: row + 1], rtol=1e-12, atol=1e-13)


@methods
@given(n=st.integers(1, 70), views=st.integers(1, 3), more=st.integers(0, 5))
def test_the_last_row_sees_all(method: str, n: int, views: int, more: int) -> None:
    n = min(n, 20) if views == 3 and method == "exact" else n
    query, keys, values, *_ = draw(n, views, more=(more, 0, more)[:views])
    plans = [causal_plan(views, n, method), tattn.plan_for(
        n=n, dim=3, order=views + 1, bound=1.0, dtype="float64", tol=1e-2, method=method
    )]  # fmt: skip
    causal, plain = (
        tattn.tensor_attention(query, keys, values, plan=p, causal=p.causal, return_lse=True)
        for p in (plans[0], plans[1])
    )
    for a, b in zip(causal, plain, strict=True):
        np.testing.assert_allclose(a[-1], b[-1], rtol=1e-11, atol=1e-12)


@methods
@given(n=st.integers(1, 40), views=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_the_pullback_is_the_transpose(method: str, n: int, views: int, seed: int) -> None:
    """⟨g, J t⟩ = ⟨Jᵀ g, t⟩, J t by finite differences."""
    n = min(n, 12) if views == 3 and method == "exact" else n
    query, keys, values, _, grad_out, grad_lse = draw(n, views)
    arrays = [query, *keys, *values]
    rng = np.random.default_rng(seed)
    tangents = [rng.normal(size=a.shape) for a in arrays]
    options = {"plan": causal_plan(views, n, method), "causal": True, "return_lse": True}
    dquery, dkeys, dvalues = tattn.tensor_attention_vjp(query, keys, values, **options)[1](grad_out, grad_lse)

    def moved(step: float) -> float:
        a = [x + step * t for x, t in zip(arrays, tangents, strict=True)]
        out, lse = tattn.tensor_attention(a[0], a[1 : views + 1], a[views + 1 :], **options)
        return float((grad_out * out).sum() + (grad_lse * lse).sum())

    right = sum((a * t).sum() for a, t in zip((dquery, *dkeys, *dvalues), tangents, strict=True))
    np.testing.assert_allclose((moved(1e-5) - moved(-1e-5)) / 2e-5, right, rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 2**32), views=st.integers(1, 3), dtype=st.sampled_from(["float32", "float64"]))
def test_no_error_exceeds_the_plan(seed: int, views: int, dtype: str) -> None:
    """Plans that read the data, and promises; the first rows of long keys are few, and their mean scores what they are."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 24))
    size = rng.choice([0.3, 0.7, 1.1])
    # Keys that agree with one another, so that the scores of single rows are far from the mean of all.
    drift = np.linspace(-1, 1, n + 4)[:, None]
    query = (size * np.sign(rng.normal(size=(n, 3)))).astype(dtype)
    keys = [(drift[: n + i] * size + rng.uniform(-0.1, 0.1, (n + i, 3))).astype(dtype) for i in range(views)]
    values = [rng.normal(size=(len(k), 2)).astype(dtype) for k in keys]
    grad = rng.normal(size=(n, 2)).astype(dtype)
    found = tattn.plan(query, keys, method="exact", causal=True).bound
    truth = dense(query, keys, values, grad_out=grad, causal=True, precision=np.longdouble)
    for options in ({"degree": int(rng.integers(2, 9))}, {"bound": found, "degree": 6}, {"method": "exact"}):
        plan = tattn.plan(query, keys, values, causal=True, **options)
        out, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan, causal=True)
        assert (np.abs(out - truth.out) <= plan.error * value_sizes(values)).all()
        (dquery, dkeys, dvalues), bounds = pullback(grad, return_error=True)
        pairs = zip((dquery, *dkeys, *dvalues), (truth.dquery, *truth.dkeys, *truth.dvalues),
                    (bounds[0], *bounds[1], *bounds[2]), strict=True)  # fmt: skip
        for got, exact, bound in pairs:
            assert (np.abs(got - exact) <= bound).all()


@methods
def test_float32_and_narrower(method: str) -> None:
    query, keys, values, *_ = draw(33, 2)
    truth = dense(query, keys, values, causal=True).out
    for dtype, tolerance in ((np.float32, 1e-5), (np.float16, 2e-2)):
        arrays = [query.astype(dtype), [k.astype(dtype) for k in keys], [v.astype(dtype) for v in values]]
        out = tattn.tensor_attention(*arrays, method=method, tol=1e-4, causal=True)
        assert out.dtype == dtype
        np.testing.assert_allclose(out, truth, atol=tolerance + 1e-4 * np.abs(truth).max())


@methods
def test_problems_one_after_another(method: str) -> None:
    from tattn.backends.numpy import BACKEND

    call = draw(9, 2, masked=True, broadcast=True)
    plan = tattn.plan_for(n=(9, 9, 12), dim=3, bound=1.0, degree=4, dtype="float64", causal=True)
    options = {"plan": plan, "causal": True} if method == "polynomial" else {"window": (3, 7)}
    (out, pullback) = tattn.tensor_attention_vjp(*call[:3], key_masks=call[3], **options)
    together = pullback(out)
    # Of which no two problems have room.
    with BACKEND.using(workspace=1, cache=1):
        (apart, pullback) = tattn.tensor_attention_vjp(*call[:3], key_masks=call[3], **options)
        alone = pullback(out)
    np.testing.assert_allclose(apart, out, rtol=1e-13, atol=1e-13)
    for a, b in zip(alone[1], together[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.grid
@pytest.mark.parametrize("start", [0, 4, 33])
@pytest.mark.parametrize(("views", "masked", "broadcast"), [(1, True, False), (2, False, True), (3, True, True)])
def test_rows_go_on_from_a_summary(library: Any, views: int, masked: bool, broadcast: bool, start: int) -> None:
    """The rows from `start` on read what is before as a summary: their part of the whole call, with all gradients."""
    from tattn.backends import backend_of
    from tattn.state import sums as summaries
    from tattn.state.summary import call_of, row_gradients

    call = draw(33, views, masked=masked, broadcast=broadcast)
    for of_query in call[4:]:
        of_query[..., :start, *[slice(None)] * (of_query is call[4])] = 0.0
    plan = tattn.plan_for(
        n=(33, *(k.shape[-2] for k in call[1])),
        dim=3,
        order=views + 1,
        bound=1.0,
        degree=4,
        dtype="float64",
        causal=True,
    )
    whole = run(library, call, plan=plan, causal=True)
    query, keys, values, masks, grad_out, grad_lse = library.arrays(*call)
    backend = backend_of(query)
    columns = [None if m is None else m[..., None] for m in masks or [None] * views]

    def cut(rows: Any, before: bool) -> Any:
        at = rows.shape[-2] - 33 + start
        return rows[..., :at, :] if before else rows[..., at:, :]

    before = [[None if x is None else cut(x, True) for x in xs] for xs in (keys, values, columns)]
    summary = tattn.summarize(*before[:2], plan, key_masks=[None if m is None else m[..., 0] for m in before[2]])
    after = [None if x is None else cut(x, False) for x in (query, *keys, *values, *columns)]
    arrays = (*after[: 1 + 2 * views], *summary.sums, *after[1 + 2 * views :])
    out, lse, normaliser = backend.run(summaries.read_causal, call_of(plan), arrays)
    upstream = (cut(grad_out, False), grad_lse[..., start:, None])
    grads = backend.run(summaries.read_causal_backward, call_of(plan), (*arrays, out, normaliser, *upstream))
    for got, like in zip(grads, arrays, strict=False):
        assert (got.shape, got.dtype) == (like.shape, like.dtype)
    # Both parts of the gradients of keys and values.
    firsts = [
        row_gradients(rows, g, plan, backend)
        for *rows, g in zip(*before, grads[1 + 2 * views :], strict=True)
    ]  # fmt: skip
    found = [grads[0], *(backend.xp.concat([firsts[i % views][i // views], g], axis=-2)
                         for i, g in enumerate(grads[1 : 1 + 2 * views]))]  # fmt: skip
    read = library.numpy
    for name, got, truth in (
        ("out", out, whole.out[..., start:, :]),
        ("lse", lse[..., 0], whole.lse[..., start:]),
        ("dquery", found[0], whole.dquery[..., start:, :]),
        *(("dkeys, dvalues", g, t) for g, t in zip(found[1:], (*whole.dkeys, *whole.dvalues), strict=True)),
    ):
        np.testing.assert_allclose(read(got), truth, rtol=1e-11, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("array", [0, 1])
def test_entries_beyond_arithmetic_are_not_numbers(array: int) -> None:
    """Nor what sees them: the row of a query; of a key its row and those after it, and none before."""
    from tattn.backends import backend_of
    from tattn.state import sums as summaries
    from tattn.state.summary import call_of

    query, keys, values, *_ = draw(40, 2, more=(0, 0))
    arrays = [x.astype(np.float32) for x in (query, *keys, *values)]
    arrays[array][33, 1] = 1e5
    plan = tattn.plan_for(n=40, dim=3, bound=1.0, degree=4, causal=True)
    none = tattn.summarize([k[:0] for k in arrays[1:3]], [v[:0] for v in arrays[3:]], plan)
    masks = (None, np.ones((40, 1), bool))
    out, *_ = backend_of(query).run(summaries.read_causal, call_of(plan), (*arrays, *none.sums, *masks))
    lost = np.isnan(out).all(axis=-1)
    assert lost[33]
    assert lost[34:].all() == bool(array)
    assert np.isfinite(out[:33]).all()
    assert np.isfinite(out[34:]).all() == (not array)


def test_decoding_agrees_with_the_causal_call(library: Any) -> None:
    """A batch of two streams, the second of which ends early; first a prompt, then a token at a time."""
    rng = np.random.default_rng(5)
    n, prompt, views = 6, 3, 2
    query, *keys = rng.uniform(-1, 1, (views + 1, 2, n, 3))
    values = list(rng.normal(size=(views, 2, n, 2)))
    masks = [np.array([[True] * n, [True] * 5 + [False]])] * views
    plan = causal_plan(views, n, "polynomial")
    query, keys, values, masks = library.arrays(query, keys, values, masks)
    out, lse = tattn.tensor_attention(query, keys, values, plan=plan, key_masks=masks, causal=True, return_lse=True)
    cut = [[x[..., :prompt, :] for x in xs] for xs in (keys, values)]
    state = tattn.DecodingState(plan, tattn.summarize(*cut, plan, key_masks=[m[..., :prompt] for m in masks]))
    for i in range(prompt, n):
        at = slice(i, i + 1)
        (token, of_token), state = state.step(
            query[..., at, :], [k[..., at, :] for k in keys], [v[..., at, :] for v in values],
            key_masks=[m[..., at] for m in masks], return_lse=True,
        )  # fmt: skip
        np.testing.assert_allclose(library.numpy(token), library.numpy(out[..., at, :]), rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose(library.numpy(of_token), library.numpy(lse[..., at]), rtol=1e-11, atol=1e-12)


def test_plans_say_what_they_are_for() -> None:
    query, keys, values, *_ = draw(9, 2, more=(0, 0))
    plan, plain = (tattn.plan(query, keys, values, method="exact", causal=c) for c in (True, False))
    assert "up to its own row" in str(plan)
    # Σ_i (i + 1)² scores in place of n³, or a few more.
    assert plan.flops_exact / plain.flops_exact == pytest.approx(1 / 3, rel=0.05)
    windowed = tattn.plan_for(n=10**6, dim=3, bound=1.0, window=(100, 50), method="exact")
    assert windowed.method == "exact"
    # Runs of 16 rows, each with the 7 and 4 before it, and twice the time of other scores.
    assert windowed.flops_exact == pytest.approx(2 * 10**6 * 128 * 80 * (2 * 3 + 2 * 3 + 16), rel=1e-2)
    assert "windows of (100, 50)" in str(windowed)
    long = tattn.plan_for(n=10**6, dim=3, bound=1.0, causal=True)
    assert long.method == "polynomial"
    for p, options in ((plan, {}), (plain, {"causal": True}), (plan, {"window": (3, 3)})):
        with pytest.raises(tattn.PlanError, match=r"plan was made for (causal|window)"):
            tattn.tensor_attention(query, keys, values, plan=p, **options)


def test_measured_errors() -> None:
    query, keys, values, masks, *_ = draw(40, 2, masked=True)
    masks[0][:3] = True
    for options in ({"causal": True}, {"window": (7, 5)}):
        out = tattn.tensor_attention(query, keys, values, key_masks=masks, method="exact", **options)
        largest, _ = tattn.measure_error(query, keys, values, out, key_masks=masks, **options)
        assert largest < 1e-14
        out[20:] += 1
        assert tattn.measure_error(query, keys, values, out, key_masks=masks, **options)[0] > 0.1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"causal": 1}, TypeError, "causal should be True or False, got int"),
        ({"window": 3}, TypeError, "window should be a list or tuple of 2 whole numbers, one for each view, got int"),
        ({"window": (3,)}, ValueError, "window should have one number for each of the 2 views, got 1"),
        ({"window": (3, 0)}, ValueError, r"window\[1\] should be at least 1, got 0"),
        ({"window": (3, 2.0)}, TypeError, r"window\[1\] should be a whole number, got float"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], message: str) -> None:
    query, keys, values, *_ = draw(9, 2)
    with pytest.raises(error, match=message):
        tattn.tensor_attention(query, keys, values, **options)
    if "method" not in options:
        with pytest.raises(error, match=message):
            tattn.plan_for(n=9, dim=3, bound=1.0, **options)


def test_what_does_not_go_with_an_order() -> None:
    query, keys, values, *_ = draw(9, 2)
    message = r"keys\[1\] should have at least as many rows as query, 9, where attention is causal: .* the first 1 rows"
    with pytest.raises(ValueError, match=message):
        tattn.tensor_attention(query, [keys[0], keys[1][:8]], [values[0], values[1][:8]], causal=True)
    with pytest.raises(ValueError, match="series 'banded' sorts rows by norm"):
        tattn.plan(query, keys, values, series="banded", causal=True)
    with pytest.raises(ValueError, match="bound='estimated' samples all pairs"):
        tattn.plan(query, keys, values, bound="estimated", causal=True)
    with pytest.raises(ValueError, match="causal needs a bound, or no degree"):
        tattn.nn.AttentionConfig(16, 4, bound=None, degree=2, causal=True)


def test_the_adjoint_keeps_few_summaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some 40 blocks of the array form, as many as there are segments, and then as many as there are blocks in one."""
    from tattn.engines import causal_features

    monkeypatch.setenv("TATTN_KERNELS", "0")
    rng = np.random.default_rng(0)
    query, *keys = rng.uniform(-1, 1, (3, 5120, 8))
    plan = tattn.plan_for(n=5120, dim=8, bound=1.0, degree=5, dtype="float64", causal=True)
    out, pullback = tattn.tensor_attention_vjp(query, keys, [k[:, :2] for k in keys], plan=plan, causal=True)
    with calls_of(causal_features._starts) as calls:
        pullback(out)
    kept = [call.result[0].shape[-2] for call in calls]
    segments, *inner = kept
    assert len(inner) == segments
    assert segments * inner[0] >= 40
    assert max(kept) <= 8


def test_a_plan_from_data_does_not_rely_on_the_mean_of_all_pairs() -> None:
    """Scores of all pairs are 0 in the mean; those of the first rows are not."""
    query = np.ones((64, 2), np.float32)
    keys = [np.where(np.arange(64) < 32, -1.0, 1.0).astype(np.float32)[:, None] * np.ones((1, 2), np.float32), query]
    causal, promised, plain = (
        tattn.plan(query, keys, scale=1.0, degree=8, **options)
        for options in ({"causal": True}, {"causal": True, "bound": 2.0**1.0625}, {})
    )
    assert causal.bound == promised.bound
    assert causal.error == promised.error > 3 * plain.error


@pytest.mark.parametrize("views", [1, 2])
def test_memory_is_that_of_copies_and_blocks(views: int) -> None:
    """100,000 rows, forward and gradient: copies of the inputs and outputs, in the adjoint, and √n summaries."""
    script = f"""
import resource, numpy as np, tattn
def peak(): return 1024 * next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
def now(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
n, m = 100_000, {views}
rng = np.random.default_rng(0)
q, *ks = rng.random((m + 1, n, 4), dtype=np.float32)
vs = list(rng.random((m, n, 4), dtype=np.float32))
plan = tattn.plan_for(n=n, dim=4, order=m + 1, bound=1.0, degree=4, causal=True)
# What is compiled, or read from disk, stays.
few = q[:9], [k[:9] for k in ks], [v[:9] for v in vs]
tattn.tensor_attention_vjp(*few, plan=plan, causal=True)[1](vs[0][:9])
before = now()
out = tattn.tensor_attention(q, ks, vs, plan=plan, causal=True)
print((peak() - before - out.nbytes - 8 * n) / 2**20)
out, pullback = tattn.tensor_attention_vjp(q, ks, vs, plan=plan, causal=True)
grads = pullback(out)
print((peak() - before) / 2**20, sum(x.nbytes for x in (q, *ks, *vs, out)) / 2**20)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    forward, both, arrays = map(float, done.stdout.split())
    assert forward < 24
    assert both < 6 * arrays + 24
