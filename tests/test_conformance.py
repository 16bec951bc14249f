"""All libraries side by side: the same call gives the same numbers, output, lse and every gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import CASES, draw, run
from conftest import CPU, LIBRARIES, make_library
from reference import through_features

import tattn

others = pytest.mark.parametrize(
    "other",
    [
        pytest.param(n, marks=[pytest.mark.libraries(n), *([] if n in CPU else [pytest.mark.gpu])])
        for n in LIBRARIES[1:]
    ],
)


@pytest.mark.grid
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("case", CASES)
@others
def test_every_library_agrees_with_numpy(other: str, case: dict[str, Any], method: str, dtype: str) -> None:
    call = draw(**case)
    call = call._replace(
        query=call.query.astype(dtype),
        keys=[k.astype(dtype) for k in call.keys],
        values=[v.astype(dtype) for v in call.values],
        grad_out=call.grad_out.astype(dtype),
        grad_lse=call.grad_lse.astype(dtype),
    )
    plan = tattn.plan_for(n=9, dim=3, order=case["views"] + 1, bound=1.0, tol=1e-2, dtype=dtype, method=method)
    plan = through_features(plan)
    expected, _ = run(make_library("numpy"), call, plan=plan)
    got, _ = run(make_library(other), call, plan=plan)
    tolerance = 1e-12 if dtype == "float64" else 2e-5
    for a, b in zip(
        (got.out, got.lse, got.dquery, *got.dkeys, *got.dvalues),
        (expected.out, expected.lse, expected.dquery, *expected.dkeys, *expected.dvalues),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@others
def test_every_library_makes_the_same_plan(other: str) -> None:
    call = draw(2, masked=True, broadcast=True)
    plans = []
    for name in ("numpy", other):
        library = make_library(name)
        query, keys, values = library.arrays(call.query, call.keys, call.values)
        plans.append(tattn.plan(query, keys, values, key_masks=library.arrays(call.masks)))
    a, b = plans
    assert (a.method, a.degree, a.rank, a.lengths) == (b.method, b.degree, b.rank, b.lengths)
    np.testing.assert_allclose([a.bound, a.error, a.lowest_mean], [b.bound, b.error, b.lowest_mean], rtol=1e-9)


@pytest.mark.parametrize("learn_bound", [pytest.param(False, marks=pytest.mark.thorough), True])
def test_layers_agree_and_load_each_other(learn_bound: bool) -> None:
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    from tattn.nn import AttentionConfig, TensorAttention
    from tattn.nn.jax import apply

    jax.config.update("jax_enable_x64", True)
    options: dict[str, Any] = {"head_dim": 3, "num_key_heads": 2, "degree": 2, "learn_bound": learn_bound}
    layer = TensorAttention(8, 4, **options, context_dims=(5, 6), dtype=torch.float64)
    config = AttentionConfig(8, 4, **options, context_dims=[5, 6])
    assert layer.config == config
    rng = np.random.default_rng(0)
    x, a, b = (rng.normal(size=(2, n, w)) for n, w in ((4, 8), (5, 5), (6, 6)))
    params = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    params = {name: jax.numpy.asarray(p) for name, p in params.items()}

    def loss(params: Any) -> Any:
        return jax.numpy.sin(
            apply(params, jax.numpy.asarray(x), [jax.numpy.asarray(c) for c in (a, b)], config=config)
        ).sum()

    layer(torch.tensor(x), [torch.tensor(a), torch.tensor(b)]).sin().sum().backward()
    grads = jax.grad(loss)(params)
    for name, p in layer.named_parameters():
        np.testing.assert_allclose(grads[name], p.grad.numpy(), rtol=1e-10, atol=1e-12)
