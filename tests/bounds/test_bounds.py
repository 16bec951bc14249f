"""No error ever exceeds what the plan states: random and adversarial draws, output and all gradients.

The references are dense softmax, in long double where float64 is under test;
the errors are measured in the units of `tattn.Plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import KINDS, Sample, ratios, sample
from reference import Dense, dense, sizes_of, through_features, value_sizes

import tattn

DRAWS = 300


def errors_over_bounds(plan: tattn.Plan, drawn: Sample, scale: float, dtype: str) -> list[float]:
    """`ratios` of a call, its reference in a wider dtype."""
    out, pullback = tattn.tensor_attention_vjp(drawn.query, drawn.keys, drawn.values, plan=plan)
    dquery, dkeys, dvalues = pullback(drawn.grad)
    got = Dense(out, out, dquery, list(dkeys), list(dvalues))
    precision = np.float64 if dtype == "float32" else np.longdouble
    given = {"scale": scale, "grad_out": drawn.grad, "precision": precision, "channels": plan.channels}
    truth = dense(drawn.query, drawn.keys, drawn.values, **given)
    return ratios(plan, drawn, got, truth)


@pytest.mark.parametrize("channels", ["real", "complex"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_no_error_exceeds_the_plan(
    kind: str, dtype: str, channels: str, draws: Callable[[int], range], capsys: pytest.CaptureFixture[str]
) -> None:
    worst: list[list[float]] = []
    for seed in draws(DRAWS if channels == "real" else DRAWS // 2):
        rng = np.random.default_rng(seed)
        views, bound = int(rng.integers(1, 4)), float(rng.choice([0.1, 0.5, 1.0, 2.0, 3.0]))
        drawn, scale = sample(kind, seed, views, bound, dtype, channels)
        options = [{"degree": int(rng.integers(1, 9))}, {"method": "exact"}]
        for option in options:
            promise = {} if seed % 2 else {"bound": bound * (1 + 1e-6)}
            given = {"scale": scale, "channels": channels, **promise, **option}
            plan = through_features(tattn.plan(drawn.query, drawn.keys, drawn.values, **given))
            if not np.isfinite(plan.error):
                continue
            found = errors_over_bounds(plan, drawn, scale, dtype)
            assert max(found) <= 1, (seed, option, found, str(plan))
            worst.append(found[:2])
    output, gradient = np.array(worst).T
    with capsys.disabled():
        print(
            f"\n  {kind}, {dtype}, {channels}, {len(worst)} draws: bound/error at the median "
            f"{1 / np.median(output[output > 0]):.3g} for the output, {1 / np.median(gradient[gradient > 0]):.3g} for the "
            f"query's gradient; at least {1 / output.max():.3g} and {1 / gradient.max():.3g}"
        )


@pytest.mark.parametrize("kind", ["uniform", "heavy", "corners", "aligned", "two-sided"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("channels", ["real", "complex"])
def test_no_error_exceeds_a_pruned_plan(
    kind: str, dtype: str, channels: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Channels of very unequal sizes, so that plans leave monomials out; where all entries are alike, these add up."""
    worst: list[list[float]] = []
    for seed in range(DRAWS // 6):
        rng = np.random.default_rng([seed, len(kind)])
        views, dim, light = int(rng.integers(1, 4)), int(rng.integers(8, 15)), float(rng.choice([1e-3, 1e-2, 5e-2]))
        sizes = np.where(np.arange(dim) < rng.integers(1, 3), 1.0, light * rng.uniform(0.3, 1, dim))
        if channels == "complex":
            dim = 2 * (dim // 2)
            sizes = np.tile(sizes[: dim // 2], 2)
        lengths = rng.integers(2, 9, views + 1)
        arrays = [
            (KINDS[kind](rng, (int(n), dim), i) * sizes ** (1 / (views + 1))).astype(dtype)
            for i, n in enumerate(lengths)
        ]
        values = [rng.choice([-1.0, 1.0], (int(n), 12)).astype(dtype) for n in lengths[1:]]
        drawn = Sample(arrays[0], arrays[1:], values, rng.normal(size=(int(lengths[0]), 12)).astype(dtype))
        tops = np.prod([sizes_of(a.astype(float), channels).max(0) for a in arrays], 0)
        scale = float(rng.choice([0.3, 1.0, 1.5]) / tops.sum()) * (1 + (channels == "complex"))
        asked = {"scale": scale, "tol": float(rng.choice([3e-2, 1e-2, 2e-3])), "gradients": bool(rng.integers(2))}
        try:
            given = {"method": "polynomial", "channels": channels, **asked}
            plan = tattn.plan(drawn.query, drawn.keys, drawn.values, **given)
        except tattn.PlanError:
            continue
        if not plan.grading:
            continue
        found = errors_over_bounds(plan, drawn, scale, dtype)
        assert max(found) <= 1, (seed, found, str(plan))
        worst.append(found[:2])
    assert len(worst) > 5
    with capsys.disabled():
        print(
            f"\n  {kind}, {dtype}, {channels}, {len(worst)} pruned draws: error/bound at most {np.max(worst, axis=0)}"
        )


@pytest.mark.parametrize("value", [1 / 3, 0.1, 0.7, 0.3])
@pytest.mark.parametrize("bound", [0.5, 1.0, 2.0])
def test_float32_sums_of_one_number_stay_within_the_rounding_model(value: float, bound: float) -> None:
    """Thousands of equal rows round the same way at every step, which the model's independent roundings do not cover."""
    n, dim = 4096, 2
    query = np.full((8, dim), -value, np.float32)
    keys = [np.full((n, dim), value, np.float32)] * 2
    values = list(np.random.default_rng(0).choice(np.float32([value, 1]), (2, n, 3)))
    scale = bound / (dim * float(np.float32(value)) ** 3)
    plan = tattn.plan_for(n=n, dim=dim, bound=bound * (1 + 1e-6), degree=8, dtype="float32", scale=scale)
    assert plan.error < 0.01
    out = tattn.tensor_attention(query, keys, values, plan=plan)
    # All scores are equal, so softmax is uniform.
    exact = values[0].astype(float).mean(0) * values[1].astype(float).mean(0)
    assert (np.abs(out - exact) <= plan.error * value_sizes(values)[0]).all()


@pytest.mark.parametrize("views", [1, 3, 8, 16, 24])
@pytest.mark.parametrize(("n", "key", "score"), [(128, 0.5, 1e-3), (128, 0.99, 1.0), (4096, 0.99, -0.5)])
def test_views_that_are_alike_stay_within_the_rounding_model(views: int, n: int, key: float, score: float) -> None:
    """Equal views round alike, so that what their sums lose adds up over the views."""
    rng = np.random.default_rng(views)
    query, keys = np.full((16, 1), score, np.float32), [np.full((n, 1), key, np.float32)] * views
    bound = abs(score) * float(np.float32(key)) ** views
    for promise in ({"bound": bound * 1.01}, {}):
        channels = np.append(np.float32(1.97527), rng.uniform(1, 2, 31).astype(np.float32))
        values = [np.broadcast_to(channels, (n, 32)).copy()] * views
        plan = tattn.plan(query, keys, values, scale=1.0, degree=4, **promise)
        out, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan)
        _, _, dvalues = pullback(np.ones_like(out))
        exact = channels.astype(float)
        # The scores of all tuples are equal.
        assert (np.abs(out / exact**views - 1) <= plan.error).all()
        assert (np.abs(dvalues[0] * n / (16 * exact ** (views - 1)) - 1) <= plan.error).all()


def test_exact_sums_of_one_number_stay_within_the_rounding_model() -> None:
    n = 4096
    query, keys = np.full((64, 1), 1e-3, np.float32), [np.full((n, 1), 0.5, np.float32)]
    for seed in range(8):
        channels = np.random.default_rng(seed).uniform(1, 2, 8).astype(np.float32)
        values = [np.broadcast_to(channels, (n, 8)).copy()]
        plan = tattn.plan(query, keys, values, scale=1.0, method="exact")
        out = tattn.tensor_attention(query, keys, values, plan=plan)
        assert (np.abs(out / channels.astype(float) - 1) <= plan.error).all()


@pytest.mark.parametrize("method", ["exact", "polynomial", "auto"])
@pytest.mark.parametrize(
    ("keys", "values", "grads", "scale"),
    [(1e8, 1e-6, 1e-9, 1e-24), (1e-8, 1e-9, 1e-9, 1e24), (1.0, 1e-14, 1e-6, 1.0), (1e5, 1e12, 1e12, 1e-15)],
)
@pytest.mark.grid
def test_gradient_bounds_hold_where_products_of_sizes_vanish(
    library: Any, method: str, keys: float, values: float, grads: float, scale: float
) -> None:
    rng = np.random.default_rng(0)
    q, a, b = np.float32(keys * rng.uniform(-1, 1, (3, 6, 2)))
    u, v = np.float32(values * rng.uniform(-1, 1, (2, 6, 2)))
    g = np.float32(grads * rng.normal(size=(6, 2)))
    query, key_views, value_views, grad = library.arrays(q, [a, b], [u, v], g)
    options = {"scale": scale, "method": method}
    _, pullback = tattn.tensor_attention_vjp(query, key_views, value_views, **options)
    gradients, bounds = pullback(grad, return_error=True)
    truth = dense(q, [a, b], [u, v], scale=scale, grad_out=g)
    found, allowed = ([x[0], *x[1], *x[2]] for x in (gradients, bounds))
    for got, bound, exact in zip(found, allowed, [truth.dquery, *truth.dkeys, *truth.dvalues], strict=True):
        stated = library.numpy(bound).astype(float)
        assert (stated > 0).all()
        assert (np.abs(library.numpy(got) - exact) <= stated).all()
    # Nothing is lost of nothing.
    _, bounds = pullback(library.array(0 * g), return_error=True)
    assert all((library.numpy(x) == 0).all() for x in (bounds[0], *bounds[1], *bounds[2]))


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_nothing_is_promised_where_values_multiply_to_what_a_dtype_does_not_hold(
    library: Any, method: str, views: int
) -> None:
    rng = np.random.default_rng(1)
    query, *keys = np.float32(rng.uniform(-1, 1, (1 + views, 6, 2)))
    for size, known in ((1.0, True), (1e-36, False), (0.0, True)):
        values = list(np.float32(size ** (1 / views) * rng.uniform(0.5, 1, (views, 6, 2))))
        plan = tattn.plan_for(n=6, dim=2, bound=2.0, order=views + 1, method=method)
        _, error = tattn.tensor_attention(*library.arrays(query, keys, values), plan=plan, return_error=True)
        assert error.shape == (6,)
        assert (library.numpy(error) == (np.float32(plan.error) if known else np.inf)).all()


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_nothing_is_promised_of_values_with_few_digits(library: Any, method: str) -> None:
    """Though the product of the largest has all; nor of zeros beside values that overflow without them."""
    rng = np.random.default_rng(1)
    query, *keys = np.float32(rng.uniform(-1, 1, (4, 6, 2)))
    plan = tattn.plan_for(n=6, dim=2, bound=2.0, order=4, method=method)
    for sizes in ((1e-36, 1e20, 1e10), (1e30, 1e30, 0.0)):
        values = [np.full((6, 2), size, np.float32) for size in sizes]
        _, error = tattn.tensor_attention(*library.arrays(query, keys, values), plan=plan, return_error=True)
        assert (library.numpy(error) == np.inf).all()


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_nothing_is_promised_where_a_sum_of_values_may_overflow(library: Any, method: str) -> None:
    """Though products of the largest do not."""
    rng = np.random.default_rng(1)
    query, *keys = np.float32(rng.uniform(-1, 1, (3, 6, 2)))
    values = [np.full((6, 2), size, np.float32) for size in (1e38, 1e-38)]
    plan = tattn.plan_for(n=6, dim=2, bound=2.0, method=method)
    _, error = tattn.tensor_attention(*library.arrays(query, keys, values), plan=plan, return_error=True)
    assert (library.numpy(error) == np.inf).all()
    _, pullback = tattn.tensor_attention_vjp(*library.arrays(query, keys, values), plan=plan)
    _, bounds = pullback(library.array(np.ones((6, 2), np.float32)), return_error=True)
    assert all((library.numpy(bound) == np.inf).all() for bound in (bounds[0], *bounds[1], *bounds[2]))
