"""Values of one view as small as those of another are large: no product on the way leaves the range of the dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from reference import dense, score_by_score, through_features, value_sizes

import tattn
from tattn.backends import backend_of
from tattn.state import sums as summaries
from tattn.state.summary import call_of

SCALE = 0.47
# Sizes of the values of each view, and of the gradient, so that all results are in the range of float32.
SIZES = [((1e-25, 1e-25, 1e25), 1e25), ((1e25, 1e25, 1e-25), 1e-25), ((1e-30, 1e-30, 1e30, 1e30), 1.0)]
METHODS = ["exact", "promised", "window", "causal", "scores", "features", "banded", "causal features"]


def draw(sizes: tuple[float, ...], of_grad: float, n: int = 9) -> tuple[Any, ...]:
    """Query, keys, values and gradient, one channel of the values of size one."""
    rng = np.random.default_rng(len(sizes))
    query, *keys = rng.uniform(-1, 1, (1 + len(sizes), n, 2))
    values = [rng.uniform(0.5, 1, (n, 3)) * [size, size, 1.0] for size in sizes]
    grad = rng.normal(size=(n, 3)) * [of_grad, of_grad, 1.0]
    single = [np.asarray(x, np.float32) for x in (query, grad)]
    return single[0], *([np.asarray(x, np.float32) for x in y] for y in (keys, values)), single[1]


def options_of(method: str, views: int, n: int) -> dict[str, Any]:
    order = {"n": n, "dim": 2, "order": views + 1, "scale": SCALE}
    causal = {"causal": True} if method.startswith("causal") else {}
    if method == "window":
        return {"method": "exact", "scale": SCALE, "window": (4,) * views}
    if method in ("exact", "causal"):
        return {"method": "exact", "scale": SCALE, **causal}
    if method == "promised":
        return {"plan": tattn.plan_for(bound=1.0, method="exact", **order)}
    if method == "banded":
        return {"plan": tattn.plan_for(series="banded", degree=8, bands=2, **order)}
    plan = tattn.plan_for(bound=1.0, degree=8, **causal, **order)
    return {"plan": score_by_score(plan) if method == "scores" else through_features(plan), **causal}


def assert_near(got: Any, truth: Any, size: Any) -> None:
    assert np.isfinite(got).all()
    assert (np.abs(got - truth) <= 1e-4 * size).all(), np.max(np.abs(got - truth) / size)


@pytest.mark.grid
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("sizes", "of_grad"), SIZES)
def test_products_over_views_stay_in_range(
    library: Any,
    method: str,
    sizes: tuple[float, ...],
    of_grad: float,
) -> None:
    query, keys, values, grad = draw(sizes, of_grad)
    options = options_of(method, len(sizes), len(query))
    out, pullback = tattn.tensor_attention_vjp(*library.arrays(query, keys, values), **options)
    dquery, dkeys, dvalues = pullback(library.array(grad))
    order = {key: options[key] for key in ("causal", "window") if key in options}
    truth = dense(query, keys, values, scale=SCALE, grad_out=grad, **order)
    assert_near(library.numpy(out), truth.out, value_sizes(values))
    assert_near(library.numpy(dquery), truth.dquery, np.abs(truth.dquery).max())
    for got, gradient in zip(dkeys, truth.dkeys, strict=True):
        assert_near(library.numpy(got), gradient, np.abs(gradient).max())
    for got, gradient in zip(dvalues, truth.dvalues, strict=True):
        assert_near(library.numpy(got), gradient, np.abs(gradient).max(axis=0))


@pytest.mark.grid
@pytest.mark.parametrize(("sizes", "of_grad"), SIZES)
def test_sums_stay_in_range(library: Any, sizes: tuple[float, ...], of_grad: float) -> None:
    query, keys, values, grad = draw(sizes, of_grad)
    truth = dense(query, keys, values, scale=SCALE, grad_out=grad)
    plan = options_of("features", len(sizes), len(query))["plan"]
    summary, to_rows = tattn.summarize_vjp(*library.arrays(keys, values), plan)
    out, pullback = summary.attend_vjp(library.array(query))
    dquery, dsums = pullback(library.array(grad))
    _, dvalues = to_rows(dsums)
    assert_near(library.numpy(out), truth.out, value_sizes(values))
    assert_near(library.numpy(dquery), truth.dquery, np.abs(truth.dquery).max())
    for got, gradient in zip(dvalues, truth.dvalues, strict=True):
        assert_near(library.numpy(got), gradient, np.abs(gradient).max(axis=0))


@pytest.mark.grid
@pytest.mark.parametrize(("sizes", "of_grad"), SIZES)
def test_rows_after_sums_stay_in_range(library: Any, sizes: tuple[float, ...], of_grad: float) -> None:
    query, keys, values, grad = draw(sizes, of_grad)
    truth = dense(query, keys, values, scale=SCALE, grad_out=grad, causal=True)
    plan, cut, views = options_of("causal features", len(sizes), len(query))["plan"], 4, len(sizes)
    before = tattn.summarize(*library.arrays([k[:cut] for k in keys], [v[:cut] for v in values]), plan)
    call = call_of(plan)
    after = library.arrays(query[cut:], *(k[cut:] for k in keys), *(v[cut:] for v in values))
    arrays = (*after, *before.sums, *(None,) * views)
    backend = backend_of(after[0])
    out, _, normaliser = backend.run(summaries.read_causal, call, arrays)
    assert_near(library.numpy(out), truth.out[cut:], value_sizes(values))
    upstream = library.arrays(grad[cut:], np.zeros((len(query) - cut, 1), np.float32))
    grads = backend.run(summaries.read_causal_backward, call, (*arrays, out, normaliser, *upstream))
    truth = dense(query[cut:], keys, values, scale=SCALE, grad_out=grad[cut:], causal=True)
    for got, gradient in zip(grads[1 + views : 1 + 2 * views], truth.dvalues, strict=True):
        assert_near(library.numpy(got), gradient[cut:], np.abs(gradient).max(axis=0))
