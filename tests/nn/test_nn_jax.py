"""The layer's functions under JAX's transformations."""

from __future__ import annotations

import doctest
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from test_nn import CASES, EMBED, config_of, inputs_of

jax = pytest.importorskip("jax")

pytestmark = pytest.mark.libraries("jax")


@pytest.fixture(autouse=True)
def wide() -> None:
    jax.config.update("jax_enable_x64", True)


@pytest.mark.thorough
def test_transformations_change_nothing() -> None:
    from tattn.nn.jax import apply, init

    config = config_of(**CASES["shared keys"], learn_bound=True, degree=2)
    params = init(jax.random.key(0), config)
    assert {n: p.shape for n, p in params.items()} == config.parameter_shapes()
    x = jax.numpy.asarray(inputs_of(config, leading=(3,))[0])

    def loss(params: Any, x: Any) -> Any:
        return jax.numpy.sin(apply(params, x, config=config)).sum()

    expected, grads = apply(params, x, config=config), jax.grad(loss, (0, 1))(params, x)
    close = {"rtol": 1e-10, "atol": 1e-12}
    np.testing.assert_allclose(jax.jit(apply, static_argnames="config")(params, x, config=config), expected, **close)
    mapped = jax.vmap(lambda x: apply(params, x, config=config))(x)
    np.testing.assert_allclose(mapped, expected, **close)
    got = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1)))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), got, grads)
    each = jax.vmap(jax.grad(loss), (None, 0))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.sum(0), b, **close), each, grads[0])


def test_ranks_need_not_be_promoted_by_the_caller() -> None:
    from tattn.nn.jax import apply, init

    config = config_of(degree=2, learn_bound=True)
    params = init(jax.random.key(0), config)
    x = jax.numpy.asarray(inputs_of(config)[0])
    expected = apply(params, x, config=config)
    with jax.numpy_rank_promotion("raise"):
        np.testing.assert_array_equal(apply(params, x, config=config), expected)


@pytest.mark.thorough
@pytest.mark.parametrize("changes", [{"causal": True}, {"positions": "rotary", "head_dim": 4}, {}])
def test_documents_in_one_call(changes: dict[str, Any]) -> None:
    """Each as if it were alone, with its gradient, also under ``jit``."""
    from tattn.nn.jax import apply, init

    config = config_of(degree=2, **changes)
    params = init(jax.random.key(0), config)
    x = jax.numpy.asarray(inputs_of(config)[0])
    bounds = (0, 3, 4, 7)

    def together(x: Any) -> Any:
        return apply(params, x, config=config, offsets=jax.numpy.asarray(np.array(bounds, "int32")))

    def apart(x: Any) -> Any:
        outs = [apply(params, x[..., a:b, :], config=config) for a, b in pairwise(bounds)]
        return jax.numpy.concatenate(outs, axis=-2)

    expected = apart(x)
    close = {"rtol": 1e-10, "atol": 1e-12}
    np.testing.assert_allclose(together(x), expected, **close)
    grads = [jax.grad(lambda x, of=of: jax.numpy.sin(of(x)).sum())(x) for of in (together, apart)]
    np.testing.assert_allclose(*grads, **close)


def test_scan_over_layers() -> None:
    from tattn.nn.jax import apply, init

    config = config_of(degree=2)
    x = jax.numpy.asarray(inputs_of(config)[0])
    depth = [init(key, config) for key in jax.random.split(jax.random.key(1), 3)]
    stacked = jax.tree.map(lambda *p: jax.numpy.stack(p), *depth)

    def through(stacked: Any, x: Any) -> Any:
        return jax.lax.scan(lambda h, p: (h + apply(p, h, config=config), None), x, stacked)[0]

    expected = x
    for params in depth:
        expected = expected + apply(params, expected, config=config)
    np.testing.assert_allclose(through(stacked, x), expected, rtol=1e-10, atol=1e-12)
    grads = jax.jit(jax.grad(lambda s: through(s, x).sum()))(stacked)
    assert all(bool(jax.numpy.isfinite(g).all()) for g in grads.values())


@pytest.mark.parametrize(
    "change,error,message",
    [
        (lambda p: list(p), TypeError, "^params should be a dict of arrays, got list"),
        (lambda p: {n: a for n, a in p.items() if n != "out_proj.bias"}, ValueError, "^params should have 'out_proj.bias'"),
        (lambda p: {**p, "more": p["q_proj.bias"]}, ValueError, "^params should have nothing but .*, got 'more'"),
        (lambda p: {**p, "q_proj.weight": [1.0]}, TypeError, r"^params\['q_proj.weight'\] should be an array.*, got list"),
        (lambda p: {**p, "q_proj.weight": p["q_proj.bias"]}, ValueError, r"^params\['q_proj.weight'\] should have shape"),
    ],
)  # fmt: skip
def test_parameters_that_do_not_fit(change: Any, error: type, message: str) -> None:
    from tattn.nn.jax import apply, init

    config = config_of()
    params = init(jax.random.key(0), config)
    with pytest.raises(error, match=message):
        apply(change(params), jax.numpy.ones((3, EMBED)), config=config)


def test_examples_in_docstrings() -> None:
    import tattn.nn.jax

    ran = doctest.testmod(tattn.nn.jax)
    assert ran.failed == 0 and ran.attempted > 3
