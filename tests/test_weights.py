"""Weights of keys: factors of the definition, and rows that count several times."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, product
from typing import Any

import numpy as np
import pytest
from cases import COMPLEX, LENGTHS, METHODS, Call, draw, methods, refuse
from reference import Dense, dense, through_features, value_sizes

import tattn

GRADIENTS = ("dquery", "dkeys", "dvalues", "dweights")
Weights = list[np.ndarray]


def drawn_weights(views: int, *leading: int, seed: int = 1) -> Weights:
    """Weights of the keys of `draw`, some of them 0."""
    rng = np.random.default_rng(seed)
    found = []
    for n in LENGTHS[1 : views + 1]:
        w = rng.uniform(0, 3, (*leading, n)) * (rng.random((*leading, n)) < 0.8)
        w[..., 0] = 1.5
        found.append(w)
    return found


def defined(call: Call, weights: Weights, **options: Any) -> tuple[Dense, Weights]:
    """The definition with logarithms of weights as one more channel for each view, and the gradients of weights."""
    m, scale = len(call.keys), 1 / call.query.shape[-1]
    ones = [np.ones((*k.shape[:-1], m)) for k in call.keys]
    masks = []
    for i, w in enumerate(weights):
        shape = np.broadcast_shapes(ones[i].shape[:-1], w.shape)
        ones[i] = np.broadcast_to(ones[i], (*shape, m)).copy()
        ones[i][..., i] = np.log(np.where(w > 0, w, 1)) / scale
        masks.append(w > 0)
    keys = [
        np.concatenate([np.broadcast_to(k, (*o.shape[:-1], k.shape[-1])), o], -1)
        for k, o in zip(call.keys, ones, strict=True)
    ]
    query = np.concatenate([call.query, np.ones((*call.query.shape[:-1], m))], -1)
    found = dense(
        query, keys, call.values, scale=scale, masks=masks, grad_out=call.grad_out, grad_lse=call.grad_lse, **options
    )
    d = call.query.shape[-1]
    of_weights = [
        g[..., d + i] / scale / np.where(w > 0, w, 1) for i, (g, w) in enumerate(zip(found.dkeys, weights, strict=True))
    ]
    of_keys = [folded(g[..., :d], k.shape) for g, k in zip(found.dkeys, call.keys, strict=True)]
    found = found._replace(dquery=found.dquery[..., :d], dkeys=of_keys)
    return found, [folded(g, w.shape) for g, w in zip(of_weights, weights, strict=True)]


def folded(gradient: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Summed over what was broadcast."""
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    return gradient.sum(axis=tuple(i for i, n in enumerate(shape) if n != gradient.shape[i]), keepdims=True)


def computed(library: Any, call: Call, weights: Any, **options: Any) -> tuple[Dense, Weights]:
    """What a library computes, in NumPy."""
    query, keys, values, grad_out, grad_lse = library.arrays(
        call.query, call.keys, call.values, call.grad_out, call.grad_lse
    )
    given = library.arrays(weights)
    (out, lse), pullback = tattn.tensor_attention_vjp(
        query, keys, values, key_weights=given, return_lse=True, **options
    )
    dquery, dkeys, dvalues, dweights = pullback(grad_out, grad_lse)
    for got, like in zip((dquery, *dkeys, *dvalues, *dweights), (query, *keys, *values, *given), strict=True):
        assert (tuple(got.shape), got.dtype, library.device(got)) == (
            tuple(like.shape),
            like.dtype,
            library.device(like),
        )
    read = library.numpy
    found = Dense(read(out), read(lse), read(dquery), [*map(read, dkeys)], [*map(read, dvalues)])
    return found, [*map(read, dweights)]


def assert_same(got: tuple[Dense, Weights], expected: tuple[Dense, Weights], tolerance: float) -> None:
    """Output, lse and all gradients."""
    (a, a_weights), (b, b_weights) = got, expected
    for name, x, y in [
        ("out", a.out, b.out), ("lse", a.lse, b.lse), ("dquery", a.dquery, b.dquery),
        *(("dkeys", *pair) for pair in zip(a.dkeys, b.dkeys, strict=True)),
        *(("dvalues", *pair) for pair in zip(a.dvalues, b.dvalues, strict=True)),
        *(("dweights", *pair) for pair in zip(a_weights, b_weights, strict=True)),
    ]:  # fmt: skip
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.grid("jax")
@pytest.mark.parametrize("broadcast", [False, True])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_they_are_factors_of_the_definition(library: Any, views: int, broadcast: bool) -> None:
    call = draw(views, broadcast=broadcast)
    weights = drawn_weights(views, *((2, 1) if broadcast else ()))
    assert_same(computed(library, call, weights, method="exact"), defined(call, weights), 1e-12)


def seen(views: int, window: bool) -> tuple[Call, Weights, dict[str, Any]]:
    """A causal call, with windows or without."""
    call = draw(views)
    call = call._replace(query=call.query[:4], grad_out=call.grad_out[:4], grad_lse=call.grad_lse[:4])
    return call, drawn_weights(views), {"window": (3, 2, 2)[:views]} if window else {"causal": True}


@pytest.mark.grid("jax")
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("views", [1, 2, 3])
def test_causal_calls_and_windows(library: Any, views: int, window: bool) -> None:
    call, weights, order = seen(views, window)
    for w in weights:
        # No row is left with nothing.
        w[-3:] = 0.7
    assert_same(computed(library, call, weights, method="exact", **order), defined(call, weights, **order), 1e-12)


@pytest.mark.grid("jax")
@pytest.mark.parametrize("views", [1, 2, 3])
def test_causal_polynomials(library: Any, views: int) -> None:
    call, weights, order = seen(views, False)
    plan = tattn.plan_for(
        n=4, dim=3, order=views + 1, bound=1.0, degree=12, dtype="float64", method="polynomial", **order
    )
    assert_same(computed(library, call, weights, plan=plan, **order), defined(call, weights, **order), 1e-9)


@pytest.mark.grid("jax")
@methods
@pytest.mark.parametrize("views", [1, 2, 3])
def test_whole_weights_are_repetitions(library: Any, method: str, views: int) -> None:
    way, call = METHODS[method], draw(views)
    counts = [np.random.default_rng(i).integers(0, 4, n) for i, n in enumerate(LENGTHS[1 : views + 1])]
    for c in counts:
        c[0] = 2
    plan = way.plan(n=LENGTHS[: views + 1], dim=3, order=views + 1)
    got, _ = computed(library, call, [c.astype(float) for c in counts], plan=plan)
    repeated = [[np.repeat(x, c, axis=0) for x, c in zip(xs, counts, strict=True)] for xs in (call.keys, call.values)]
    (out, lse), pullback = tattn.tensor_attention_vjp(call.query, *repeated, plan=plan, return_lse=True)
    grads = pullback(call.grad_out, call.grad_lse)

    def summed(gradients: Any) -> list[np.ndarray]:
        cuts = [np.cumsum(c)[:-1] for c in counts]
        return [np.stack([part.sum(0) for part in np.split(g, cut)]) for g, cut in zip(gradients, cuts, strict=True)]

    # Bands depend on the number of rows.
    tolerance = 1e-12 if way.of_scores else 2e-3
    assert_same((got, []), (Dense(out, lse, grads[0], summed(grads[1]), summed(grads[2])), []), tolerance)


@methods
@pytest.mark.parametrize("views", [1, 2, 3])
def test_slopes(method: str, views: int) -> None:
    """Differences of the output along a direction of all weights; a weight of 0 has no slope."""
    call, weights = draw(views), drawn_weights(views)
    plan = METHODS[method].plan(n=LENGTHS[: views + 1], dim=3, order=views + 1)
    rng = np.random.default_rng(0)
    direction = [rng.normal(size=w.shape) * (w > 0) for w in weights]

    def value(step: float) -> float:
        moved = [w + step * t for w, t in zip(weights, direction, strict=True)]
        out, lse = tattn.tensor_attention(
            call.query, call.keys, call.values, key_weights=moved, plan=plan, return_lse=True
        )
        return float((out * call.grad_out).sum() + (lse * call.grad_lse).sum())

    _, pullback = tattn.tensor_attention_vjp(call.query, call.keys, call.values, key_weights=weights, plan=plan)
    dweights = pullback(call.grad_out, call.grad_lse)[3]
    slope = sum((g * t).sum() for g, t in zip(dweights, direction, strict=True))
    np.testing.assert_allclose(slope, (value(1e-5) - value(-1e-5)) / 2e-5, rtol=1e-6, atol=1e-8)
    assert all((g[w == 0] == 0).all() for g, w in zip(dweights, weights, strict=True))


@pytest.mark.parametrize("order", [{}, {"causal": True}])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ones_change_no_bit(dtype: str, order: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    query, a, b, u, v = rng.uniform(-1, 1, (5, 2, 200, 4)).astype(dtype)
    for how in ({"method": "exact"}, {"method": "polynomial", "tol": 1e-2}, {}):
        asked = {"return_lse": True, "return_error": True, **order, **how}
        one = np.ones((2, 200), dtype)
        for weights in (one, [one, None], [one[0], one]):
            got, expected = (
                tattn.tensor_attention(query, [a, b], [u, v], **asked, **w) for w in ({"key_weights": weights}, {})
            )
            for x, y in zip(got, expected, strict=True):
                np.testing.assert_array_equal(x, y)


@methods
def test_a_weight_of_zero_is_a_mask(method: str) -> None:
    """Whatever such a row holds; and where all weigh nothing, output, gradients and lse are those of masks."""
    call, weights = draw(2), drawn_weights(2)
    plan = METHODS[method].plan(n=LENGTHS[:3], dim=3, order=3)
    masks = [w > 0 for w in weights]
    broken = [np.where((w > 0)[:, None], x, np.nan) for w, x in zip(weights, call.keys, strict=True)]
    given = {"key_weights": weights, "plan": plan}
    expected = tattn.tensor_attention(call.query, call.keys, call.values, key_masks=masks, **given)
    np.testing.assert_array_equal(tattn.tensor_attention(call.query, broken, call.values, **given), expected)
    nothing = [np.zeros_like(weights[0]), None]
    (out, lse), pullback = tattn.tensor_attention_vjp(
        call.query, call.keys, call.values, key_weights=nothing, plan=plan, return_lse=True
    )
    assert (out == 0).all()
    assert (lse == -np.inf).all()
    for g in (pullback(call.grad_out)[0], *pullback(call.grad_out)[1], pullback(call.grad_out)[3][0]):
        assert (g == 0).all()


@methods
def test_softmax_does_not_see_their_unit(method: str) -> None:
    call, weights = draw(2), drawn_weights(2)
    plan = METHODS[method].plan(n=LENGTHS[:3], dim=3, order=3)
    for unit in (2.0**-900, 2.0**40, 1e200):
        given = {"plan": plan, "return_lse": True}
        (out, lse), (of_unit, lse_of_unit) = (
            tattn.tensor_attention(call.query, call.keys, call.values, key_weights=[w * u, weights[1]], **given)
            for w, u in ((weights[0], 1.0), (weights[0], unit))
        )
        np.testing.assert_allclose(of_unit, out, rtol=1e-14, atol=1e-14)
        np.testing.assert_allclose(lse_of_unit, lse + np.log(unit), rtol=1e-14)


def test_one_array_serves_all_views(library: Any) -> None:
    rng = np.random.default_rng(0)
    query, a, b, g = rng.uniform(-1, 1, (4, 6, 3))
    w = rng.uniform(0, 2, 6)
    q, ks, one, grad = library.arrays(query, [a, b], w, g)
    out, pullback = tattn.tensor_attention_vjp(q, ks, ks, key_weights=one, method="exact")
    out2, pullback2 = tattn.tensor_attention_vjp(q, ks, ks, key_weights=[one, one], method="exact")
    read = library.numpy
    np.testing.assert_array_equal(read(out), read(out2))
    both = pullback2(grad)[3]
    np.testing.assert_allclose(read(pullback(grad)[3]), read(both[0]) + read(both[1]), rtol=1e-13)
    assert tattn.tensor_attention_vjp(q, ks, ks, key_weights=[one, None], method="exact")[1](grad)[3][1] is None
    none, pullback = tattn.tensor_attention_vjp(q, ks, ks, key_weights=[None, None], method="exact")
    np.testing.assert_allclose(read(none), read(tattn.tensor_attention(q, ks, ks, method="exact")), rtol=1e-13)
    assert pullback(grad)[3] == (None, None)


def test_masks_besides() -> None:
    call, weights = draw(2), drawn_weights(2)
    masks = [np.arange(7) > 2, None]
    hidden = [weights[0] * masks[0], weights[1]]
    for how in ({"method": "exact"}, {"method": "polynomial", "tol": 1e-3}):
        given = call.query, call.keys, call.values
        out, pullback = tattn.tensor_attention_vjp(*given, key_weights=weights, key_masks=masks, **how)
        expected, pullback2 = tattn.tensor_attention_vjp(*given, key_weights=hidden, **how)
        np.testing.assert_array_equal(out, expected)
        for x, y in zip(pullback(call.grad_out)[3], pullback2(call.grad_out)[3], strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("method", list(COMPLEX))
def test_complex_channels(method: str) -> None:
    call = draw(2, dim=4)
    counts = [np.arange(n) % 3 for n in LENGTHS[1:3]]
    plan = COMPLEX[method].plan(n=LENGTHS[:3], dim=4, order=3)
    weights = [c.astype(float) for c in counts]
    out = tattn.tensor_attention(call.query, call.keys, call.values, key_weights=weights, plan=plan)
    repeated = [[np.repeat(x, c, axis=0) for x, c in zip(xs, counts, strict=True)] for xs in (call.keys, call.values)]
    expected = tattn.tensor_attention(call.query, *repeated, plan=plan)
    np.testing.assert_allclose(out, expected, atol=1e-13 if COMPLEX[method].of_scores else 2e-3)


@pytest.mark.grid("jax")
@pytest.mark.parametrize("views", [1, 2])
def test_causal_calls_of_complex_channels(library: Any, views: int) -> None:
    """The polynomial beside the exact method, with gradients."""
    call = draw(views, dim=4)
    call = call._replace(query=call.query[:4], grad_out=call.grad_out[:4], grad_lse=call.grad_lse[:4])
    shape: dict[str, Any] = {"n": 4, "dim": 4, "order": views + 1, "channels": "complex", "causal": True}
    plan = tattn.plan_for(**shape, bound=1.0, degree=10, dtype="float64", method="polynomial")
    got, expected = (
        computed(library, call, drawn_weights(views), causal=True, channels="complex", **how)
        for how in ({"plan": plan}, {"method": "exact"})
    )
    assert_same(got, expected, 1e-8)


def test_no_draw_exceeds_its_bound(draws: Callable[[int], range]) -> None:
    """Of weights over many magnitudes, in all methods, of output and gradients."""
    for seed in draws(60):
        rng = np.random.default_rng(seed)
        views, dtype, causal = int(rng.integers(1, 4)), ("float32", "float64")[seed % 2], bool(rng.integers(2))
        n, span = int(rng.integers(20, 50)) if views < 3 else 12, (0, 3, 8, 12)[rng.integers(3 + (dtype == "float64"))]
        query, *keys = (rng.normal(size=(views + 1, n, 4)) * 10 ** rng.uniform(-1, 0.5)).astype(dtype)
        values = [(rng.normal(size=(n, 3)) * 10.0 ** rng.integers(-5, 5)).astype(dtype) for _ in range(views)]
        weights = [(10.0 ** rng.uniform(-span, 0, n) * (rng.random(n) < 0.9)).astype(dtype) for _ in range(views)]
        for w in weights:
            w[0] = 1.0
        grad = rng.normal(size=(n, 3)).astype(dtype)
        call = Call(query, keys, values, None, grad, np.zeros(n))
        truth, slopes = defined(call, weights, precision=np.longdouble, causal=causal)
        banded = tattn.plan_for(n=n, dim=4, order=views + 1, series="banded", bands=4, dtype=dtype)
        ways: list[dict[str, Any]] = [{"method": "exact"}, {}, {"method": "polynomial", "tol": 0.3}]
        for how in ways if causal else [*ways, {"plan": banded}]:
            try:
                (out, error), pullback = tattn.tensor_attention_vjp(
                    query, keys, values, key_weights=weights, causal=causal, return_error=True, **how
                )
            except tattn.PlanError:
                continue
            sizes = value_sizes(values, [w > 0 for w in weights])
            assert (np.abs(out - truth.out) / sizes <= error[:, None]).all(), (seed, how)
            got, bounds = (flat(x) for x in pullback(grad, return_error=True))
            true = flat((truth.dquery, truth.dkeys, truth.dvalues, slopes))
            for x, y, bound in zip(got, true, bounds, strict=True):
                assert (np.abs(x - y) <= bound).all(), (seed, how)
            finite = [np.isfinite(bound).all() for bound in bounds]
            assert all(finite[: 2 * views + 1]) == all(finite) or "plan" in how


def flat(gradients: Any) -> list[np.ndarray]:
    """Of query, keys, values and weights, one after another."""
    query, *others = gradients
    return [query, *chain.from_iterable(others)]


@pytest.mark.parametrize("how", [{"method": "exact"}, {"method": "polynomial", "tol": 0.1}])
@pytest.mark.parametrize("exponent", [10, 25, 60])
def test_rows_whose_weights_vanish_are_no_numbers(how: dict[str, Any], exponent: int) -> None:
    """The first rows see weights far below the largest: right, or NaN, but never taken for masked ones."""
    rng = np.random.default_rng(0)
    query, a, b = rng.uniform(-1, 1, (3, 40, 4)).astype(np.float32)
    weights = (2.0 ** np.linspace(-exponent, 0, 40)).astype(np.float32)
    out = tattn.tensor_attention(query, [a, b], [a, b], key_weights=weights, causal=True, **how)
    call = Call(query, [a, b], [a, b], None, np.zeros((40, 4)), np.zeros(40))
    truth = defined(call, [weights, weights], causal=True)[0].out
    right = np.abs(out - truth).max(axis=-1) < 0.1
    assert (right | np.isnan(out).all(axis=-1)).all()
    assert right[-10:].all()
    assert right.all() == (exponent < 60)


def test_errors_and_tolerances_count_them() -> None:
    """`plan`, `measure_error`, `best_tol` and estimates with weights, where half of the rows weigh nothing."""
    rng = np.random.default_rng(0)
    query, a, b, u, v = rng.uniform(-1, 1, (5, 300, 4))
    a[150:] *= 50
    weights = [np.arange(300) < 150, np.ones(300)]
    given = {"key_weights": [w.astype(float) for w in weights]}
    some = tattn.plan(query, [a[:150], b], [u[:150], v])
    made = tattn.plan(query, [a, b], [u, v], **given)
    assert (made.method, made.degree, made.bound) == (some.method, some.degree, some.bound)
    counts = np.arange(300) % 4
    lowest = [
        tattn.plan(query + 1, [rows, rows], **options).lowest_mean
        for rows, options in ((b, {"key_weights": counts.astype(float)}), (np.repeat(b, counts, axis=0), {}))
    ]
    assert lowest[0] == pytest.approx(lowest[1], abs=1e-9)
    assert tattn.best_tol(query, [a, b], max_rank=500, **given) == tattn.best_tol(query, [a[:150], b], max_rank=500)
    estimated = tattn.plan(query, [a, b], bound="estimated", **given)
    assert estimated.bound < 2
    out = tattn.tensor_attention(query, [a, b], [u, v], plan=made, **given)
    assert tattn.measure_error(query, [a, b], [u, v], out, **given)[0] <= made.error
    for causal in (False, True):
        ones = {"key_weights": [rng.uniform(0, 1, 300), None], "causal": causal}
        out = tattn.tensor_attention(query, [b, b], [u, v], **ones, method="exact")
        assert tattn.measure_error(query, [b, b], [u, v], out, **ones)[0] < 1e-13


WRONG: list[tuple[str, type, str, Any]] = [
    ("negative", ValueError, r"key_weights\[0\] should hold finite numbers of at least 0, got -1 ", np.array([1, -1.0, 1, 1])),
    ("NaN", ValueError, r"key_weights\[0\] should hold finite numbers of at least 0, got NaN ", np.array([1, np.nan, 1, 1])),
    ("infinite", ValueError, r"key_weights\[0\] should .*, got infinity ", np.array([1, np.inf, 1, 1])),
    ("whole", TypeError, r"key_weights\[0\] should have a dtype of .*, got int64", np.ones(4, np.int64)),
    ("boolean", TypeError, r"key_weights\[0\] should have a dtype of .*, got bool", np.ones(4, bool)),
    ("complex", TypeError, r"key_weights\[0\] should have a dtype of .*, got complex128", np.ones(4, complex)),
    ("narrow", TypeError, r"key_weights\[0\] should have keys\[0\]'s dtype float64, got float32", np.ones(4, np.float32)),
    ("short", ValueError, r"key_weights\[0\] should have shape \(..., 4\), .* got shape \(3,\)", np.ones(3)),
    ("stacked", ValueError, r"key_weights should be a list or tuple of weights, or one array", np.ones((2, 4))),
    ("too few", ValueError, r"key_weights should have one entry for each of the 2 keys, got 1", [np.ones(4)]),
    ("too many dimensions", ValueError, r"leading dimensions that broadcast", [np.ones((3, 4)), np.ones((2, 4))]),
    ("no arrays", TypeError, "key_weights should be a list or tuple", 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "weights"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
@pytest.mark.parametrize("how", [{"method": "exact"}, {"method": "polynomial", "tol": 0.1}, {}], ids=str)
def test_refused_by_name(how: dict[str, Any], error: type, message: str, weights: Any) -> None:
    rows = np.random.default_rng(0).uniform(-1, 1, (4, 4))
    refuse(tattn.tensor_attention, error, message, rows, [rows] * 2, [rows] * 2, key_weights=weights, **how)


def test_weights_that_are_too_far_apart_are_refused() -> None:
    """In one problem: what would be 0 beside the largest is not taken for masked."""
    rows = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4))
    weights = np.array([[1e-308, 0.0, 1, 1], [1e-300, 1e-300, 0, 2e-300]])
    tattn.tensor_attention(rows[1], [rows[1]], [rows[1]], key_weights=weights[1])
    message = r"key_weights\[0\] should be 0 or at least 2\*\*-1021 of the largest .*, got 1e-308 of it"
    for method in ("exact", "polynomial", "auto"):
        call = rows, [rows], [rows]
        refuse(tattn.tensor_attention, ValueError, message, *call, key_weights=weights, method=method, tol=0.1)


@methods
def test_no_weights_are_no_numbers_where_none_are_read(method: str) -> None:
    """With a plan of a promised bound."""
    call = draw(2)
    plan = METHODS[method].plan(n=LENGTHS[:3], dim=3, order=3)
    for wrong in (-1.0, np.nan, np.inf, 1e-310):
        weights = drawn_weights(2)
        for some in (slice(2, 3), slice(None)):
            # Alone they are denormal numbers in proportion, which is no matter.
            if wrong == 1e-310 and some == slice(None):
                continue
            weights[0][some] = wrong
            out = tattn.tensor_attention(call.query, call.keys, call.values, key_weights=weights, plan=plan)
            assert np.isnan(out).all()


@pytest.mark.libraries("torch")
@pytest.mark.grid
@methods
def test_torch_differentiates_them(method: str) -> None:
    """By its own gradients, once more, under `torch.func`, and compiled in one graph."""
    torch = pytest.importorskip("torch")
    call, weights = draw(2), drawn_weights(2)
    plan = METHODS[method].plan(n=LENGTHS[:3], dim=3, order=3)
    moved = [torch.tensor(np.maximum(w, 0.1), requires_grad=True) for w in weights]
    query, a, b, u, v = (torch.tensor(x) for x in (call.query, *call.keys, *call.values))

    def of(*weights: Any) -> Any:
        return tattn.tensor_attention(query, [a, b], [u, v], key_weights=weights, plan=plan, return_lse=True)

    assert torch.autograd.gradcheck(of, moved)
    if method == "exact":
        assert torch.autograd.gradgradcheck(lambda *w: of(*w)[0], moved, atol=1e-4)

    def loss(*weights: Any) -> Any:
        out, lse = of(*weights)
        return out.sin().sum() + lse.sum()

    expected = torch.autograd.grad(loss(*moved), moved)
    for got in (torch.func.grad(loss, (0, 1))(*moved), torch.autograd.grad(compiled(loss)(*moved), moved)):
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y)
    pulled = tattn.tensor_attention_vjp(query, [a, b], [u, v], key_weights=moved, plan=plan)[1](
        torch.ones_like(u[:1] + query[:, :1])
    )
    for x, y in zip(pulled[3], torch.autograd.grad(of(*moved)[0].sum(), moved), strict=True):
        torch.testing.assert_close(x, y)


def compiled(function: Any) -> Any:
    """In one graph, as calls without weights are."""
    import torch

    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.libraries("jax")
@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_jax_differentiates_them(library: Any, method: str) -> None:
    """Under `jit` and `grad`."""
    jax = pytest.importorskip("jax")
    call, weights = draw(2), drawn_weights(2)
    plan = METHODS[method].plan(n=LENGTHS[:3], dim=3, order=3)
    expected = tattn.tensor_attention_vjp(call.query, call.keys, call.values, key_weights=weights, plan=plan)[1](
        call.grad_out
    )[3]
    query, keys, values, weights, grad = library.arrays(call.query, call.keys, call.values, weights, call.grad_out)

    @jax.jit
    @jax.grad
    def slopes(weights: Any) -> Any:
        return (tattn.tensor_attention(query, keys, values, key_weights=weights, plan=plan) * grad).sum()

    for x, y in zip(slopes(weights), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.libraries("torch")
def test_narrow_dtypes(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    rows, weights = np.random.default_rng(0).uniform(-1, 1, (3, 8, 4)), np.random.default_rng(1).uniform(0, 2, 8)
    query, a, b = (torch.tensor(x).to(getattr(torch, dtype)) for x in rows)
    w = torch.tensor(weights).to(query.dtype).requires_grad_()
    wide = [x.float() for x in (query, a, b)]
    out = tattn.tensor_attention(query, [a, b], [a, b], key_weights=w, method="exact")
    expected = tattn.tensor_attention(wide[0], wide[1:], wide[1:], key_weights=w.detach().float(), method="exact")
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)
    (slope,) = torch.autograd.grad(out.sum(), w)
    assert (slope.dtype, slope.shape) == (w.dtype, w.shape)


@pytest.mark.libraries("jax")
def test_narrow_dtypes_of_jax() -> None:
    """Its gradients have to have the dtype of what they are of: weights in the place of masks are wider than they came."""
    jax = pytest.importorskip("jax")
    rows = jax.numpy.asarray(np.random.default_rng(0).uniform(-1, 1, (8, 4)), "float16")

    plan = tattn.plan_for(n=8, dim=4, order=2, method="exact", bound=1.0, dtype="float16")

    def of(w: Any) -> Any:
        return tattn.tensor_attention(rows, [rows], [rows], key_weights=w, plan=plan).sum()

    w = jax.numpy.linspace(0.5, 2, 8, dtype="float16")
    slope = jax.grad(of)(w)
    assert (slope.dtype, slope.shape) == (w.dtype, w.shape)
    assert (np.asarray(slope) != 0).any()


def test_an_empty_batch() -> None:
    rows = np.zeros((0, 5, 3))
    for weights, order in product((np.ones((0, 5)), [np.ones(5), None]), ({}, {"causal": True})):
        assert tattn.tensor_attention(rows, [rows] * 2, [rows] * 2, key_weights=weights, **order).shape == (0, 5, 3)


@pytest.mark.thorough("jax")
def test_summaries_and_decoding(library: Any) -> None:
    """In pieces and one token at a time, as in one call; with the gradients of summaries."""
    rng = np.random.default_rng(0)
    query, a, b, u, v, g = rng.uniform(-1, 1, (6, 9, 3))
    weights = drawn_weights(2)
    weights = [np.concatenate([w, [0.5] * (9 - len(w))]) for w in weights]
    plan = tattn.plan_for(n=9, dim=3, bound=1.0, degree=5, dtype="float64", method="polynomial")
    expected, pullback = tattn.tensor_attention_vjp(
        query, [a, b], [u, v], key_weights=weights, plan=through_features(plan), return_lse=True
    )
    truth = pullback(g)
    q, ks, vs, ws, grad = library.arrays(query, [a, b], [u, v], weights, g)
    read = library.numpy
    first = tattn.summarize([k[:4, ...] for k in ks], [x[:4, ...] for x in vs], plan, key_weights=[w[:4] for w in ws])
    both = first.update([k[4:, ...] for k in ks], [x[4:, ...] for x in vs], key_weights=[w[4:] for w in ws])
    for got, want in zip(both.attend(q, return_lse=True), expected, strict=True):
        np.testing.assert_allclose(read(got), want, rtol=1e-12)
    np.testing.assert_allclose([float(x) for x in both.counts], [w.sum() for w in weights])
    whole, to_rows = tattn.summarize_vjp(ks, vs, plan, key_weights=ws)
    _, to_summary = whole.attend_vjp(q)
    for got, want in zip(to_rows(to_summary(grad)[1]), truth[1:], strict=True):
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(read(x), y, rtol=1e-11, atol=1e-13)
    causal = tattn.plan_for(n=9, dim=3, bound=1.0, degree=5, dtype="float64", method="polynomial", causal=True)
    rows = tattn.tensor_attention(query, [a, b], [u, v], key_weights=weights, plan=causal, causal=True)
    state = tattn.DecodingState(causal)
    for i in range(3):
        token = slice(i, i + 1)
        given = q[token, ...], [k[token, ...] for k in ks], [x[token, ...] for x in vs]
        out, state = state.step(*given, key_weights=[w[token] for w in ws])
        np.testing.assert_allclose(read(out), rows[token], rtol=1e-12)


@pytest.mark.libraries("torch")
def test_torch_differentiates_summaries() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    plan = tattn.plan_for(n=5, dim=3, bound=1.0, degree=3, dtype="float64", method="polynomial")
    query, a, u = (torch.tensor(x) for x in rng.uniform(-1, 1, (3, 5, 3)))
    mask = torch.tensor([True, False, True, True, True])

    def of(w: Any) -> Any:
        return tattn.summarize([a, a], [u, u], plan, key_masks=[mask, None], key_weights=[w, None]).attend(query)

    weights = torch.tensor(rng.uniform(0.5, 2, 5), requires_grad=True)
    assert torch.autograd.gradcheck(of, (weights,))


@pytest.mark.parametrize(("error", "message", "weights"), [w[1:] for w in WRONG[3:]], ids=[w[0] for w in WRONG[3:]])
def test_summaries_refuse_by_name(error: type, message: str, weights: Any) -> None:
    rows = np.zeros((4, 4))
    plan = tattn.plan_for(n=4, dim=4, bound=1.0, dtype="float64", method="polynomial")
    message = message.replace("2 keys", "2 views of the plan")
    refuse(tattn.summarize, error, message, [rows, rows], [rows, rows], plan, key_weights=weights)


@pytest.mark.libraries("torch")
@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(x, marks=pytest.mark.thorough) for x in ({"method": "exact"}, {"bound": None, "degree": 2}))],
    ids=str,
)
def test_layers(options: dict[str, Any]) -> None:
    """A row of weight 2 is a row twice; weights of 1 change nothing; and they have gradients, compiled as well."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = tattn.nn.TensorAttention(8, 2, dtype=torch.float64, **options)
    x = torch.randn(2, 12, 8, dtype=torch.float64)
    ones = torch.ones(2, 12, dtype=torch.float64)
    assert torch.equal(layer(x, key_weights=ones), layer(x))
    twice = torch.cat([x, x[:, :3]], dim=1)
    weights = torch.where(torch.arange(12) < 3, 2.0, ones).requires_grad_()
    out, expected = layer(x, (x, x), key_weights=[weights, None]), layer(x, (twice, x))
    torch.testing.assert_close(out, expected, **({"atol": 1e-2, "rtol": 0} if "degree" in options else {}))
    (slope,) = torch.autograd.grad(out.sum(), weights)
    assert slope.abs().min() > 0
    whole = compiled(lambda w: layer(x, (x, x), key_weights=[w, None]))
    torch.testing.assert_close(torch.autograd.grad(whole(weights).sum(), weights)[0], slope)


@pytest.mark.libraries("torch")
@pytest.mark.parametrize("options", [{}, {"method": "exact"}, {"method": "exact", "window": (3, 4)}], ids=str)
def test_serving(options: dict[str, Any]) -> None:
    """Row by row as all at once, weights from the start or from some row on; and from what was saved."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = tattn.nn.TensorAttention(8, 2, dtype=torch.float64, causal=True, **options)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :2] = False
    late = torch.tensor([1.0, 1, 1, 1, 0.5, 2, 3], dtype=torch.float64)
    for weights in (torch.rand(2, 7, dtype=torch.float64), late.expand(2, 7)):
        expected = layer(x, key_masks=mask, key_weights=weights)
        first = {} if weights.stride(0) == 0 else {"key_weights": weights[:, :4]}
        out, state = layer.prefill(x[:, :4], key_masks=mask[:, :4], **first)
        rows = [out]
        for i in range(4, 7):
            state = layer.restored(state.state_dict())
            out, state = layer.step(x[:, i : i + 1], state, key_weights=weights[:, i : i + 1])
            rows.append(out)
        torch.testing.assert_close(torch.cat(rows, dim=1), expected)


@pytest.mark.libraries("jax")
def test_layers_of_jax() -> None:
    jax = pytest.importorskip("jax")
    from tattn.nn.jax import apply, init

    config = tattn.nn.AttentionConfig(8, 2)
    params = init(jax.random.key(0), config)
    x = jax.random.normal(jax.random.key(1), (5, 8))
    weights = jax.numpy.asarray([2.0, 1, 1, 1, 0])

    def of(weights: Any) -> Any:
        return apply(params, x, (x, x), config=config, key_weights=[weights, None])

    twice = jax.numpy.concatenate([x[:4], x[:1]])
    np.testing.assert_allclose(of(weights), apply(params, x, (twice, x), config=config), atol=1e-5)
    slope = jax.jit(jax.grad(lambda w: of(w).sum()))(weights)
    assert (np.asarray(slope) != 0).tolist() == [True] * 4 + [False]


def test_gradients_of_small_weights_that_overflow_have_no_bound() -> None:
    """The gradient of a weight of 1e-32 is 1e32 times that of its logarithm."""
    rng = np.random.default_rng(0)
    query, *rows = rng.uniform(-1, 1, (5, 6, 2)).astype(np.float32)
    weights = [np.full(6, 1e-32, np.float32)] * 2
    overflowed = 0
    for size in (1e6, 1e7, 1e8, 1e9):
        _, pullback = tattn.tensor_attention_vjp(query, rows[:2], rows[2:], key_weights=weights, method="exact")
        grads, bounds = pullback(np.full((6, 2), size, np.float32), return_error=True)
        for grad, bound in zip(grads[3], bounds[3], strict=True):
            lost = ~np.isfinite(grad)
            assert (bound[lost] == np.inf).all()
            overflowed += lost.sum()
    assert overflowed
