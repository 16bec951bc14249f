"""A causal layer one row at a time in JAX: the numbers of the layer itself, under its transformations."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from test_serving import CASES, EMBED, HEADS

from tattn.nn import AttentionConfig

jax = pytest.importorskip("jax")
pytestmark = pytest.mark.libraries("jax")


@pytest.fixture(autouse=True)
def wide() -> None:
    jax.config.update("jax_enable_x64", True)


def config_of(**options: Any) -> AttentionConfig:
    return AttentionConfig(EMBED, HEADS, **{"causal": True, "degree": 2, **options})


def case_of(case: str) -> AttentionConfig:
    degree = None if CASES[case].get("method", "polynomial") != "polynomial" else 2
    return config_of(**{"degree": degree, **CASES[case]})


def layer_of(config: AttentionConfig, dtype: Any = "float64") -> tuple[Any, Any, Any]:
    """`apply`, `prefill` and `step` of one layer."""
    from tattn.nn.jax import apply, init, prefill, step

    params = init(jax.random.key(0), config, dtype=dtype)
    return tuple(partial(of, params, config=config) for of in (apply, prefill, step))


def rows_of(*shape: int) -> Any:
    return jax.random.normal(jax.random.key(1), (*shape, EMBED), "float64")


def same(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


# JAX compiles each for seconds, and torch runs all: these do for the usual tests.
USUAL = ("decay", "auto")
WAITING = [pytest.param(case, marks=[] if case in USUAL else pytest.mark.thorough) for case in CASES]


@pytest.mark.parametrize("case", WAITING)
@pytest.mark.parametrize("batch", [(), pytest.param((2, 3), marks=pytest.mark.thorough)])
def test_prefill_and_steps_are_the_causal_layer(case: str, batch: tuple[int, ...]) -> None:
    config = case_of(case)
    apply, prefill, step = layer_of(config)
    x = rows_of(*batch, 7)
    expected = apply(x)
    if case == "auto":
        # At these lengths the layer takes the exact method, and the state is that of the polynomial.
        whole = config_of(bound=1.0, degree=config.plan(dtype="float64").degree)
        expected = layer_of(whole)[0](x)
        _, state = prefill(x[..., :2, :])
    else:
        out, state = prefill(x[..., :2, :])
        same(out, expected[..., :2, :])
    shapes = [a.shape for a in jax.tree.leaves(state)]
    out, state = step(x[..., 2:3, :], state)
    same(out, expected[..., 2:3, :])
    out, state = step(x[..., 3:, :], state)
    same(out, expected[..., 3:, :])
    assert int(state.length) == 7
    # All but a growing cache of keys and values stay as they are.
    assert ([a.shape for a in jax.tree.leaves(state)] == shapes) == (case != "exact")


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["rotary", "default", "window"])
def test_scans_from_the_first_row(case: str) -> None:
    """Compiled once, forward and backward."""
    from tattn.nn.jax import init, prefill, step

    config = case_of(case)
    apply = layer_of(config)[0]
    params = init(jax.random.key(0), config, dtype="float64")
    x = rows_of(6)

    def token(params: Any, state: Any, row: Any) -> Any:
        out, state = step(params, row[None], state, config=config)
        return state, out[0]

    @jax.jit
    def stream(params: Any, x: Any) -> Any:
        first, state = prefill(params, x[:1], config=config)
        _, outs = jax.lax.scan(partial(token, params), state, x[1:])
        return jax.numpy.concatenate([first, outs])

    same(stream(params, x), apply(x))
    grad = jax.grad(lambda x: jax.numpy.sin(stream(params, x)).sum())(x)
    same(grad, jax.grad(lambda x: jax.numpy.sin(apply(x)).sum())(x))


@pytest.mark.thorough
def test_streams_that_are_mapped() -> None:
    apply, prefill, step = layer_of(config_of(positions="rotary", head_dim=4))
    x = rows_of(3, 4)
    _, states = jax.vmap(prefill)(x[:, :3])
    same(jax.vmap(step)(x[:, 3:], states)[0], apply(x)[:, 3:])


@pytest.mark.grid
@pytest.mark.parametrize("case", ["default", "exact", "window"])
@pytest.mark.parametrize("weighted", [True, False])
def test_streams_that_end_and_padding(case: str, weighted: bool) -> None:
    """A prompt without weights may have rows with weights after it."""
    apply, prefill, step = layer_of(case_of(case))
    x = rows_of(2, 6)
    masks = np.ones((2, 6), bool)
    masks[0, :2] = masks[1, 4:] = False
    weights = np.ones((2, 6))
    weights[:, 3:] = np.random.default_rng(0).uniform(0.5, 2, (2, 3))

    def counted(some: slice, weighted: bool = weighted) -> dict[str, Any]:
        found = {"key_masks": jax.numpy.asarray(masks[:, some])}
        return found | ({"key_weights": jax.numpy.asarray(weights[:, some])} if weighted else {})

    expected = apply(x, **counted(slice(0, 6)))
    out, state = prefill(x[:, :3], **counted(slice(0, 3), weighted=False))
    same(out, expected[:, :3])
    for some in (slice(3, 5), slice(5, 6)):
        out, state = step(x[:, some], state, **counted(some))
        same(out, expected[:, some])


def test_steps_from_nothing_and_in_float32() -> None:
    apply, _, step = layer_of(config_of(), "float32")
    x = rows_of(2, 3).astype("float32")
    state, outs = None, []
    for i in range(3):
        out, state = step(x[:, i : i + 1], state)
        outs.append(out)
    np.testing.assert_allclose(jax.numpy.concatenate(outs, axis=1), apply(x), rtol=1e-4, atol=1e-5)


def test_states_that_do_not_fit() -> None:
    _, prefill, step = layer_of(config_of())
    x = rows_of(2, 2)
    _, state = prefill(x)
    with pytest.raises(ValueError, match=r"^state should be of the same config, got one of another"):
        step(x, layer_of(config_of(bound=1.0))[1](x)[1])
    with pytest.raises(ValueError, match=r"^state should be of the batch of x, \(1,\), got \(2,\)"):
        step(x[:1], state)
    with pytest.raises(TypeError, match=r"^state should be what prefill or step returned, got ArrayImpl"):
        step(x, x)
    with pytest.raises(TypeError, match=r"^state should have the layer's dtype float32, got float64"):
        layer_of(config_of(), "float32")[2](x.astype("float32"), state)
    for options, message in (
        ({"causal": False}, "need causal=True in the constructor"),
        ({"bound": None, "degree": None}, "need a bound, or method='exact'"),
        ({"context_dims": (8, 5)}, "need contexts of embed_dim"),
    ):
        config = config_of(**options)
        for call in layer_of(config)[1:]:
            with pytest.raises(ValueError, match=f"^prefill and step {message}"):
                call(x)
