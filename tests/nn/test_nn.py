"""Layers: the numbers of the definition, bounded whatever the weights, under every transformation of their library."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Library
from hypothesis import given
from hypothesis import strategies as st
from reference import as_complex, dense, value_sizes

import tattn
from tattn.backends import backend_of
from tattn.nn import AttentionConfig
from tattn.nn.config import plan_of_call, plans_of
from tattn.nn.heads import Counted, Learned, attend, unit_rows

EMBED, HEADS = 6, 2
SMALL = {"head_dim": 3, "bound": 1.0, "tol": 1e-2}
CASES: dict[str, dict[str, Any]] = {
    "self": {},
    "no bias": {"bias": False},
    "order 2": {"order": 2},
    "order 4": {"order": 4, "head_dim": 2},
    "contexts": {"context_dims": (4, 5)},
    "shared keys": {"num_heads": 4, "num_key_heads": 2, "value_dim": 2},
    "learned": {"learn_bound": True, "bound": 1.5},
    "causal": {"causal": True},
    "contexts, shared and learned": {
        "context_dims": (4, 5), "num_heads": 4, "num_key_heads": 1, "value_dim": 5, "learn_bound": True,
    },
    "rotary": {"positions": "rotary", "head_dim": 4},
    "rotary, causal, shared and learned": {
        "positions": "rotary", "head_dim": 4, "num_heads": 4, "num_key_heads": 2, "value_dim": 2, "causal": True,
        "learn_frequencies": True, "base": 20.0,
    },
    "decay": {"causal": True, "decay": "alibi"},
    "decay, rotary, shared and learned": {
        "positions": "rotary", "head_dim": 4, "num_heads": 4, "num_key_heads": 2, "value_dim": 2, "causal": True,
        "decay": (0.5, (0.9, 0.7)), "learn_decay": True,
    },
    "rotary, order 2 and contexts": {"positions": "rotary", "head_dim": 4, "order": 2, "context_dims": (5,)},
}  # fmt: skip


def config_of(**changes: Any) -> AttentionConfig:
    return AttentionConfig(**{"embed_dim": EMBED, "num_heads": HEADS, **SMALL, **changes})


class Layer:
    """A layer with given weights in torch or JAX, called with NumPy arrays."""

    def __init__(self, library: Library, config: AttentionConfig, params: dict[str, np.ndarray]) -> None:
        self.library, self.config = library, config
        self.params = {name: library.array(p) for name, p in params.items()}
        if library.name.startswith("torch"):
            import torch

            dtype = getattr(torch, str(params["q_proj.weight"].dtype))
            fields = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "_"}
            self.module = tattn.nn.TensorAttention(**fields, dtype=dtype, device=self.params["q_proj.weight"].device)
            self.module.load_state_dict(self.params)
            self.apply = lambda p, *a, **k: torch.func.functional_call(self.module, p, a, k)
        else:
            from tattn.nn.jax import apply

            self.apply = lambda p, *a, **k: apply(p, *a, config=config, **k)

    def __call__(self, x: Any, contexts: Any = None, key_masks: Any = None, **options: Any) -> Any:
        def moved(given: Any) -> Any:
            return None if given is None else self.library.arrays(given)

        out = self.apply(self.params, moved(x), moved(contexts), key_masks=moved(key_masks), **options)
        return tuple(map(self.library.numpy, out)) if isinstance(out, tuple) else self.library.numpy(out)

    def gradients(self, x: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Of Σ sin(out), for the parameters and x."""
        if self.library.name.startswith("torch"):
            import torch

            def loss(params: Any, x: Any) -> Any:
                return self.apply(params, x).sin().sum()

            grads = torch.func.grad(loss, (0, 1))(self.params, self.library.array(x))
        else:
            import jax

            grads = jax.grad(lambda p, x: jax.numpy.sin(self.apply(p, x)).sum(), (0, 1))(self.params, x)
        return {name: self.library.numpy(g) for name, g in grads[0].items()}, self.library.numpy(grads[1])


@pytest.fixture(scope="session")
def layered(library: Library) -> Library:
    if library.name.partition("-")[0] not in ("torch", "jax"):
        pytest.skip(f"there is no layer for {library.name}")
    return library


def weights_of(config: AttentionConfig, seed: int = 0, size: float = 1.0, dtype: str = "float64") -> Any:
    rng = np.random.default_rng(seed)
    return {n: (size * rng.normal(size=s)).astype(dtype) for n, s in config.parameter_shapes().items()}


def inputs_of(config: AttentionConfig, seed: int = 1, leading: Sequence[int] = (2,)) -> tuple[np.ndarray, Any]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(*leading, 7, config.embed_dim))
    if set(config.context_dims) == {config.embed_dim}:
        return x, None
    return x, [rng.normal(size=(*leading, 5 + 3 * i, w)) for i, w in enumerate(config.context_dims)]


def heads_of(
    config: AttentionConfig, params: dict[str, np.ndarray], x: np.ndarray, contexts: Any
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Query, keys and values as (..., H, n, ·), normalised by the textbook."""
    views = [x] * config.views if contexts is None else contexts

    def project(name: str, rows: np.ndarray, heads: int) -> np.ndarray:
        out = rows @ params[f"{name}.weight"].T + (params[f"{name}.bias"] if config.bias else 0)
        out = np.swapaxes(out.reshape(*out.shape[:-1], heads, -1), -2, -3)
        return np.repeat(out, config.num_heads // heads, axis=-3)

    def unit(rows: np.ndarray) -> np.ndarray:
        if config.bound is None:
            return rows
        p = config.order
        sizes = np.abs(as_complex(rows) if config.positions else rows)
        return rows / ((sizes**p).sum(-1, keepdims=True) + config.eps**p) ** (1 / p)

    def turned(rows: np.ndarray, frequencies: np.ndarray, first: int = 0) -> np.ndarray:
        angles = (np.arange(rows.shape[-2]) + first)[:, None] * frequencies[:, None, :]
        found = as_complex(rows) * np.exp(1j * angles)
        return np.concatenate([found.real, found.imag], axis=-1)

    query = unit(project("q_proj", x, config.num_heads))
    if config.learn_bound:
        query = query / (1 + np.exp(-params["bound_logit"]))[:, None, None]
    keys = [unit(project(f"k_projs.{i}", c, config.num_key_heads)) for i, c in enumerate(views)]
    values = [project(f"v_projs.{i}", c, config.num_key_heads) for i, c in enumerate(views)]
    if config.positions:
        turns = params.get("frequencies", config.frequencies())
        for i, own in enumerate(np.repeat(turns, config.num_heads // config.num_key_heads, axis=1)):
            first = keys[i].shape[-2] - x.shape[-2] if config.causal else 0
            query, keys[i] = turned(query, own, first), turned(keys[i], -own)
    return query, keys, values


def reference(
    config: AttentionConfig,
    params: dict[str, np.ndarray],
    x: np.ndarray,
    contexts: Any,
    masks: Any = None,
    error: Any = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """The layer by its definition, and what errors of the heads, relative to their values, come to in its output."""
    query, keys, values = heads_of(config, params, x, contexts)
    given = None if masks is None else [None if m is None else m[..., None, :] for m in masks]
    order: dict[str, Any] = {"causal": config.causal, "channels": config.channels}
    if config.decay is not None:
        factors = 1 / (1 + np.exp(-params["decay_logit"])) if config.learn_decay else config.factors()
        order["decay"] = np.repeat(factors, config.num_heads // config.num_key_heads, axis=1)
    out = dense(query, keys, values, scale=config.scale, masks=given, **order).out
    allowed = np.broadcast_to(error * value_sizes(values, given), out.shape)

    def joined(heads: np.ndarray) -> np.ndarray:
        rows = np.swapaxes(heads, -2, -3)
        return rows.reshape(*rows.shape[:-2], -1)

    w = params["out_proj.weight"]
    bias = params["out_proj.bias"] if config.bias else 0
    return joined(out) @ w.T + bias, joined(allowed) @ np.abs(w).T


@pytest.mark.parametrize("case", CASES)
@pytest.mark.libraries("torch", "jax")
@pytest.mark.grid
def test_the_numbers_of_the_definition(layered: Library, case: str) -> None:
    for method in ("polynomial", "exact") if layered.name == "torch" or case == "self" else ("polynomial",):
        config = config_of(**CASES[case], method=method)
        params = weights_of(config)
        x, contexts = inputs_of(config)
        plan = config.plan(dtype="float64")
        out = Layer(layered, config, params)(x, contexts)
        expected, allowed = reference(config, params, x, contexts, error=plan.error)
        assert plan.method == method and plan.error <= config.tol
        assert (np.abs(out - expected) <= allowed + 1e-12 * np.abs(expected).max()).all()
        if method == "exact":
            np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", ["self", "contexts", "shared keys"])
@pytest.mark.libraries("torch", "jax")
@pytest.mark.grid("jax")
def test_masks_say_where_to_attend(layered: Library, case: str) -> None:
    config = config_of(**CASES[case], method="exact")
    params, (x, contexts) = weights_of(config), inputs_of(config)
    layer = Layer(layered, config, params)
    rng = np.random.default_rng(2)
    views = [x] * 2 if contexts is None else contexts
    masks: list[Any] = [rng.random(v.shape[:-1]) < 0.7 for v in views]
    for m in masks:
        m[..., 0] = True
    for some in (masks, [masks[0], None]):
        expected, _ = reference(config, params, x, contexts, some)
        np.testing.assert_allclose(layer(x, contexts, some), expected, rtol=1e-9, atol=1e-11)
    if contexts is None:
        np.testing.assert_array_equal(layer(x, None, masks[0]), layer(x, None, [masks[0], masks[0]]))
    masks[1] = np.zeros_like(masks[1])
    nothing = layer(x, contexts, masks)
    np.testing.assert_array_equal(nothing, np.broadcast_to(params["out_proj.bias"], nothing.shape))


@given(
    seed=st.integers(0, 2**32),
    exponents=st.lists(st.floats(-30, 30), min_size=5, max_size=5),
    order=st.integers(2, 5),
    dim=st.integers(1, 33),
    dtype=st.sampled_from(["float32", "float64"]),
)
@pytest.mark.libraries("torch", "jax")
def test_no_score_exceeds_the_bound(
    layered: Library, seed: int, exponents: list[float], order: int, dim: int, dtype: str
) -> None:
    rng = np.random.default_rng(seed)
    kinds = {
        "normal": rng.normal(size=(40, dim)),
        "heavy": np.exp(rng.normal(size=(40, dim), scale=3)),
        "equal": np.ones((40, dim)) * rng.choice([-1, 1], (40, 1)),
        "one": np.eye(dim)[rng.integers(0, dim, 40)],
        "zero": np.zeros((40, dim)),
    }
    config = AttentionConfig(8, 1, head_dim=dim, order=order, bound=2.0)
    units = {}
    for (kind, rows), exponent in zip(kinds.items(), exponents, strict=True):
        array = layered.array((rows * 10.0**exponent).astype(dtype))
        unit = unit_rows(array, config, backend_of(array), lambda a: a)
        units[kind] = np.abs(layered.numpy(unit).astype(np.float64))
        assert np.isfinite(units[kind]).all()
    # Views that are aligned reach the bound; so they show a norm that is too large or too small.
    for (kind, unit), exponent in zip(units.items(), exponents, strict=True):
        scores = config.scale * (unit**order).sum(-1)
        assert scores.max() <= config.promise < 1.0001 * config.bound
        if kind != "zero" and exponent > 3:
            assert scores.max() > 0.999 * config.bound
    assert config.scale * np.prod(list(units.values())[:order], axis=0).sum(-1).max() <= config.promise


@pytest.mark.parametrize("size", [1e-20, 1e6, 1e12])
@pytest.mark.libraries("torch", "jax")
def test_weights_of_any_size_keep_the_error(layered: Library, size: float) -> None:
    config = config_of(bound=2.0, tol=1e-3, learn_bound=True)
    params = weights_of(config)
    for name in params:
        if name.startswith(("q_proj", "k_projs", "bound")):
            params[name] = params[name] * size
    x, contexts = inputs_of(config)
    with np.errstate(over="ignore"):
        expected, allowed = reference(config, params, x, contexts, error=config.plan(dtype="float64").error)
    assert (np.abs(Layer(layered, config, params)(x) - expected) <= allowed).all()


@pytest.mark.libraries("torch", "jax")
def test_gradients_at_rows_of_zeros_are_finite(layered: Library) -> None:
    config = config_of()
    params = weights_of(config)
    for name in params:
        if name.endswith("bias"):
            params[name] = np.zeros_like(params[name])
    x, _ = inputs_of(config)
    x[:, :3] = 0
    for zeros in (x, np.zeros_like(x)):
        grads, dx = Layer(layered, config, params).gradients(zeros)
        for g in (*grads.values(), dx):
            assert np.isfinite(g).all()
            assert np.abs(g).max() < 1e6 / config.eps


@pytest.mark.parametrize("case", ["learned", "decay, rotary, shared and learned"])
@pytest.mark.libraries("torch", "jax")
@pytest.mark.grid("jax")
def test_gradients_are_those_of_finite_differences(layered: Library, case: str) -> None:
    config = config_of(**CASES[case])
    params = weights_of(config)
    x, _ = inputs_of(config)
    layer = Layer(layered, config, params)
    grads, dx = layer.gradients(x)
    rng = np.random.default_rng(3)
    original = dict(layer.params)
    for name, g in grads.items():
        along = rng.normal(size=g.shape)
        values = []
        for step in (1e-5, -1e-5):
            layer.params = {**original, name: layered.array(params[name] + step * along)}
            values.append(np.sin(layer(x)).sum())
        np.testing.assert_allclose((values[0] - values[1]) / 2e-5, (g * along).sum(), rtol=1e-6, atol=1e-8)
    layer.params = original
    along = rng.normal(size=dx.shape)
    ahead, behind = (np.sin(layer(x + s * along)).sum() for s in (1e-5, -1e-5))
    np.testing.assert_allclose((ahead - behind) / 2e-5, (dx * along).sum(), rtol=1e-6, atol=1e-8)


@pytest.mark.libraries("torch", "jax")
@pytest.mark.thorough("jax")
def test_leading_dimensions(layered: Library) -> None:
    config = config_of(**CASES["contexts"], degree=2)
    layer = Layer(layered, config, weights_of(config))
    x, contexts = inputs_of(config, leading=(3, 2))
    out = layer(x, contexts)
    np.testing.assert_allclose(out[1, 0], layer(x[1, 0], [c[1, 0] for c in contexts]), rtol=1e-12, atol=1e-13)
    shared = layer(x, [contexts[0][0, 0], contexts[1]])
    np.testing.assert_allclose(shared[0, 0], out[0, 0], rtol=1e-12, atol=1e-13)


@pytest.mark.libraries("torch", "jax")
def test_auto_takes_exact_for_few_rows_alone(layered: Library) -> None:
    config = config_of(method="auto", degree=None)
    plans = plans_of(config, "float64")
    assert [p.method for p in plans] == ["polynomial", "exact"]
    assert plan_of_call(plans, (4, 4, 4)) == 1
    assert plan_of_call(plans, (4096, 4096, 4096)) == 0
    for n in (2, 20, 60, 400):
        counted = tattn.plan_for(
            n=n, dim=3, bound=config.promise, scale=1.0, tol=config.tol, dtype="float64", method="auto"
        )
        assert plans[plan_of_call(plans, (n, n, n))].method == counted.method
    params, x = weights_of(config), inputs_of(config)[0][:, :3]
    np.testing.assert_allclose(
        Layer(layered, config, params)(x), reference(config, params, x, None)[0], rtol=1e-9, atol=1e-11
    )


@pytest.mark.libraries("torch", "jax")
@pytest.mark.thorough("jax")
def test_errors_come_with_the_answer(layered: Library) -> None:
    config = config_of()
    out, error = Layer(layered, config, weights_of(config))(inputs_of(config)[0], return_error=True)
    assert out.shape == (2, 7, EMBED) and error.shape == (2, HEADS, 7)
    assert (error == config.plan(dtype="float64").error).all()
    # No normalisation: a degree without a bound.
    config = config_of(bound=None, degree=2, num_heads=4, num_key_heads=2)
    params = weights_of(config, size=0.4)
    x, _ = inputs_of(config)
    out, error = Layer(layered, config, params)(x, return_error=True)
    assert error.shape == (2, 4, 7) and np.isfinite(error).all() and (error > 1e-6).any()
    expected, allowed = reference(config, params, x, None, error=error[..., None])
    assert (np.abs(out - expected) <= allowed + 1e-12).all()


@pytest.mark.libraries("torch", "jax")
def test_without_a_bound_the_data_decide(layered: Library) -> None:
    config = config_of(bound=None)
    assert config.plan() is None
    params, (x, _) = weights_of(config, size=0.4), inputs_of(config)
    layer = Layer(layered, config, params)
    expected, allowed = reference(config, params, x, None, error=config.tol)
    assert (np.abs(layer(x) - expected) <= allowed).all()
    with pytest.raises(tattn.PlanError, match="traced"):
        if layered.name.startswith("torch"):
            import torch

            torch.func.vmap(lambda x: layer.apply(layer.params, x))(layered.array(x))
        else:
            import jax

            jax.jit(lambda x: layer.apply(layer.params, x))(x)


@pytest.mark.libraries("torch", "jax")
def test_narrow_dtypes_attend_in_float32(layered: Library) -> None:
    config = config_of(bound=2.0, tol=1e-3)
    params, (x, _) = weights_of(config), inputs_of(config)
    expected, _ = reference(config, params, x, None)
    size = np.abs(expected).max()
    layer = Layer(layered, config, params)
    for name, unit in (("float32", 1e-3), ("float16", 2e-2), ("bfloat16", 1e-1)):
        if layered.name.startswith("torch"):
            import torch

            dtype = getattr(torch, name)
            cast = {n: p.to(dtype) for n, p in layer.params.items()}
            out = layer.apply(cast, layered.array(x).to(dtype))
            assert out.dtype == dtype
            out = out.double().numpy()
        else:
            import jax.numpy as jnp

            cast = {n: p.astype(name) for n, p in layer.params.items()}
            out = layer.apply(cast, jnp.asarray(x, name))
            assert out.dtype == name
            out = np.asarray(out, np.float64)
        assert np.abs(out - expected).max() <= unit * size


CALLS: list[tuple[type, str, Any]] = [
    (TypeError, r"^x should be an array \(", lambda x: ((x.tolist(),), {})),
    (ValueError, "^x should have 6 channels, got shape", lambda x: ((x[..., :5],), {})),
    (ValueError, "^x should have at least two dimensions", lambda x: ((x[0, 0],), {})),
    (ValueError, "^x should have no dimension of length 0", lambda x: ((x[:, :0],), {})),
    (TypeError, "^x should have a dtype of .*, got int64", lambda x: (((x > 0) * 1,), {})),
    (TypeError, "^contexts should be a list or tuple of arrays, .*a single view goes in", lambda x: ((x, x), {})),
    (ValueError, "^contexts should be 2, one for each view, got 1", lambda x: ((x, [x]), {})),
    (ValueError, r"^contexts\[1\] should have 6 channels", lambda x: ((x, [x, x[..., :4]]), {})),
    (ValueError, r"^contexts\[0\] should have leading dimensions", lambda x: ((x, [x[:1].repeat(3, 1, 1), x]), {})),
    (ValueError, "^key_masks should have one entry for each of the 2 views", lambda x: ((x,), {"key_masks": [None]})),
    (TypeError, r"^key_masks\[1\] should be boolean", lambda x: ((x,), {"key_masks": [None, x[..., 0]]})),
    (ValueError, r"^key_masks should have shape \(\.\.\., 7\)", lambda x: ((x,), {"key_masks": x[..., :3, 0] > 0})),
    (TypeError, "^key_masks should be a list or tuple", lambda x: ((x, [x, x]), {"key_masks": x[..., 0] > 0})),
]  # fmt: skip


@pytest.mark.parametrize("error,message,of", CALLS, ids=[m[1:30] for _, m, _ in CALLS])
@pytest.mark.libraries("torch", "jax")
def test_calls_that_do_not_fit(layered: Library, error: type, message: str, of: Any) -> None:
    if "leading" in message and layered.name.startswith("jax"):
        pytest.skip("the array is made by torch's repeat")
    config = config_of()
    layer = Layer(layered, config, weights_of(config))
    args, options = of(layered.array(inputs_of(config)[0]))
    with pytest.raises(error, match=message) as caught:
        layer.apply(layer.params, *args, **options)
    assert type(caught.value) is error


@pytest.mark.libraries("torch", "jax")
def test_another_library_and_missing_contexts_are_refused(layered: Library) -> None:
    config = config_of(**CASES["contexts"])
    layer = Layer(layered, config, weights_of(config))
    x, contexts = inputs_of(config)
    with pytest.raises(ValueError, match=r"^contexts should be given, with 4, 5 channels, got None"):
        layer(x)
    with pytest.raises(TypeError, match=r"^contexts\[0\] should be an array of .*, like the weights, got one of NumPy"):
        layer.apply(layer.params, layered.array(x), contexts)


CONFIGS: list[tuple[type, str, dict[str, Any]]] = [
    (TypeError, "^embed_dim should be a whole number, got float", {"embed_dim": 8.0}),
    (ValueError, "^num_heads should be at least 1, got 0", {"num_heads": 0}),
    (ValueError, "^embed_dim should be a multiple of num_heads 4", {"num_heads": 4, "head_dim": None}),
    (ValueError, "^num_key_heads should divide num_heads 2, got 3", {"num_key_heads": 3}),
    (ValueError, "^order should be at least 2, got 1", {"order": 1}),
    (TypeError, "^context_dims should be a list or tuple", {"context_dims": 4}),
    (ValueError, "^context_dims should have 2 entries for order 3, got 1", {"context_dims": (4,)}),
    (TypeError, r"^context_dims\[1\] should be a whole number, got str", {"context_dims": (4, "5")}),
    (ValueError, "^bound should be finite and above 0, got 0", {"bound": 0}),
    (ValueError, "^bound should be finite and above 0, got -1", {"bound": -1.0}),
    (TypeError, "^bound should be a number, got str", {"bound": "2"}),
    (ValueError, "^tol should be finite and above 0", {"tol": 0}),
    (ValueError, "^eps should be finite and above 0", {"eps": 0.0}),
    (TypeError, "^bias should be True or False, got int", {"bias": 1}),
    (TypeError, "^learn_bound should be True or False, got NoneType", {"learn_bound": None}),
    (ValueError, "^learn_bound needs a bound to stay within", {"learn_bound": True, "bound": None}),
    (ValueError, "^method should be one of 'auto', 'polynomial', 'exact', got 'fast'", {"method": "fast"}),
    (ValueError, "^degree should be at least 1, got 0", {"degree": 0}),
    (ValueError, "^degree belongs to method 'polynomial'", {"degree": 3, "method": "exact"}),
    (ValueError, "^degree should be at least 2 with bound=None", {"degree": 1, "bound": None}),
    (ValueError, "^max_rank should be at most 262,144", {"max_rank": 1 << 20}),
    (ValueError, "^decay needs causal=True", {"decay": "alibi"}),
    (ValueError, "^decay should be 'alibi', or numbers from 0 to 1, got 'fast'", {"decay": "fast", "causal": True}),
    (ValueError, "^decay should be from 0 to 1, a factor for each row, got 1.5", {"decay": 1.5, "causal": True}),
    (TypeError, "^decay should be a number from 0 to 1, got", {"decay": True, "causal": True}),
    (ValueError, "^decay should have 2 entries for order 3, got 1", {"decay": (0.5,), "causal": True}),
    (ValueError, r"^decay\[1\] should have one factor for each of the 2", {"decay": (0.5, (0.5,)), "causal": True}),
    (ValueError, r"^decay\[1\]\[0\] should be from 0 to 1", {"decay": (0.5, (-1, 0.5)), "causal": True}),
    (ValueError, "^learn_decay needs decay to begin with factors between 0 and 1", {"learn_decay": True}),
    (ValueError, "^learn_decay needs decay", {"learn_decay": True, "decay": (0.5, 1), "causal": True}),
]


@pytest.mark.parametrize("error,message,changes", CONFIGS, ids=[next(iter(c)) + m[-12:] for _, m, c in CONFIGS])
def test_configurations_that_do_not_fit(error: type, message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=message) as caught:
        config_of(**changes)
    assert type(caught.value) is error


REFUSED = [
    # What float32 cannot serve.
    (
        {"bound": 3.0, "head_dim": 8, "tol": 1e-3},
        "head_dim=8, bound=3 and tol=0.001 in float32 .* degree 8 and rank 12,870",
    ),
    # A rank that no summary should have, by way of tol and of the degree.
    ({"bound": 1.0, "head_dim": 48, "tol": 1e-3}, "rank [0-9,]+ at dim 48, beyond the largest rank"),
    ({"bound": 1.0, "head_dim": 24, "tol": 1e-2}, "degree 4 has rank 20,475, above max_rank=8,192; .* MiB"),
    ({"bound": 2.0, "head_dim": 32, "degree": 5}, "degree 5 at dim 32 has rank 435,897"),
    ({"bound": 6.0, "head_dim": 8, "degree": 4}, "may lose its sign within the bound"),
    ({"bound": 4.0, "head_dim": 8, "method": "auto"}, "bound=4 and tol=0.01 in float32"),
]


@pytest.mark.parametrize("changes,message", REFUSED)
def test_a_plan_that_cannot_be_says_what_could(changes: dict[str, Any], message: str) -> None:
    small = config_of(**changes, max_rank=8192)
    with pytest.raises(tattn.PlanError, match=message) as caught:
        small.plan()
    text = str(caught.value)
    assert "Alternatives: " in text and text.endswith("or method='exact'") and "\n" not in text
    # What is advised holds.
    for advice in text.partition("Alternatives: ")[2].split("), "):
        name, _, value = advice.partition(" ")[0].partition("=")
        if name in ("head_dim", "bound", "degree"):
            number = float(value) if name == "bound" else int(value)
            method = "polynomial" if "with method='polynomial'" in advice else small.method
            assert replace(small, method=method, **{name: number}).plan().error < np.inf


@pytest.mark.parametrize(
    "rows,error,message",
    [
        (0, ValueError, "^n should be at least 1, got 0"),
        ((4, 5), ValueError, "^n should be a number or 3 of them"),
        (1.5, TypeError, "^n should be a whole number"),
    ],
)
def test_a_plan_for_lengths_that_are_none(rows: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        AttentionConfig(64, 8).plan(rows)
    assert type(caught.value) is error


def test_the_plan_is_that_of_the_bound() -> None:
    config = AttentionConfig(64, 8, tol=1e-3)
    plan = config.plan()
    assert (plan.dim, plan.order, plan.scale, plan.source, plan.certified) == (8, 3, 2.0, "promise", True)
    assert config.bound < plan.bound == config.promise < 1.0001 * config.bound
    assert plan.error <= 1e-3 and plan.rank <= config.max_rank
    assert config.plan(1000).flops_exact < plan.flops_exact == config.plan(16384).flops_exact
    assert config.plan((10, 20, 30)).lengths == (10, 20, 30)
    assert config.plan(dtype="float64").rank < plan.rank
    assert hash(config) == hash(AttentionConfig(64, 8, tol=1e-3)) and config == pickle.loads(pickle.dumps(config))


def test_layers_of_many_views() -> None:
    for order, most in ((3, 8), (12, 4), (27, 1)):
        plans = plans_of(AttentionConfig(8, 2, order=order, bound=None, degree=2), "float32")
        assert [plan.bands for plan in plans] == list(range(1, most + 1))
    with pytest.raises(ValueError, match=r"^order should be at most 32 with series 'banded', got 40$"):
        AttentionConfig(8, 2, order=40, bound=None, degree=2).plan()
    with pytest.raises(ValueError, match=r"^order should be at most 64, got 1000000000$"):
        AttentionConfig(8, 2, order=10**9)
    with pytest.raises(ValueError, match=r"^embed_dim should be at most 9,.* got about 10\^400$"):
        AttentionConfig(10**400, 1)
    with pytest.raises(
        tattn.PlanError, match=r"cannot be built: degree should be at most 100, got 2000\. Alternatives"
    ):
        AttentionConfig(1, 1, degree=2000).plan()


def test_the_table_in_the_guide() -> None:
    text = (Path(__file__).parents[2] / "docs" / "layers.md").read_text(encoding="utf-8")
    rows = text.partition("| bound | tol |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(rows) == 8
    for bound, tol, degree, *ranks in ([cell.strip() for cell in row.split("|")[1:-1]] for row in rows):
        for dim, rank in zip((4, 8, 16, 32), ranks, strict=True):
            config = AttentionConfig(dim, 1, head_dim=dim, bound=float(bound), tol=float(tol), max_rank=1 << 18)
            if rank == "–":
                with pytest.raises(tattn.PlanError):
                    config.plan()
            else:
                plan = config.plan()
                assert (plan.degree, plan.rank) == (int(degree), int(rank.replace(",", "")))
                assert plan.rank == comb(dim + plan.degree, plan.degree)


@pytest.mark.libraries("torch", "jax")
def test_drawn_weights_keep_variance(layered: Library) -> None:
    config = AttentionConfig(64, 8, learn_bound=True)
    if layered.name.startswith("torch"):
        import torch

        torch.manual_seed(0)
        drawn = dict(tattn.nn.TensorAttention(64, 8, learn_bound=True).state_dict())
    else:
        import jax

        from tattn.nn.jax import init

        drawn = init(jax.random.key(0), config)
    for name, p in drawn.items():
        array = np.asarray(layered.numpy(p))
        if name.endswith("weight"):
            assert abs(array.var() * array.shape[1] - 1) < 0.1
        else:
            assert (array == (2 if name == "bound_logit" else 0)).all()


def test_factors_by_which_rows_count_less() -> None:
    config = config_of(num_heads=8, num_key_heads=4, causal=True, decay="alibi")
    assert np.allclose(-np.log(config.factors()), [[0.25, 1 / 16, 1 / 64, 1 / 256]] * 2)
    config = config_of(causal=True, decay=(0.5, (0.25, 1)))
    assert config.factors().tolist() == [[0.5, 0.5], [0.25, 1.0]]
    # A config made of the values of another is the same.
    assert replace(config, bound=0.5).decay == config.decay == (0.5, (0.25, 1.0))
    assert hash(config) != hash(config_of(causal=True, decay=[0.5, [0.25, 0.5]]))


@pytest.mark.libraries("torch", "jax")
def test_rows_count_less_by_view_and_head(layered: Library) -> None:
    config = config_of(**CASES["decay, rotary, shared and learned"])
    params, (x, _) = weights_of(config), inputs_of(config, leading=())
    plan = config.plan(dtype="float64")
    expected, allowed = reference(config, params, x, None, error=plan.error)
    out = Layer(layered, config, params)(x)
    assert (np.abs(out - expected) <= allowed + 1e-12 * np.abs(expected).max()).all()
    params["decay_logit"] = params["decay_logit"][::-1, ::-1]
    assert (np.abs(reference(config, params, x, None)[0] - expected) > allowed).any()


@pytest.mark.libraries("torch", "jax")
def test_positions_count_by_their_differences(layered: Library) -> None:
    """Rows in front of a sequence, which a mask leaves out, move its positions and nothing else."""
    config = config_of(positions="rotary", head_dim=4, method="exact")
    params, rng = weights_of(config), np.random.default_rng(3)
    x, front = rng.normal(size=(7, EMBED)), rng.normal(size=(5, EMBED))
    layer = Layer(layered, config, params)
    moved = layer(np.concatenate([front, x]), None, np.arange(12) >= 5)[5:]
    np.testing.assert_allclose(moved, layer(x), rtol=1e-11, atol=1e-12)
    # And they do count: rows in another order are another sequence.
    assert np.abs(layer(x[::-1])[::-1] - layer(x)).max() > 1e-3


@given(
    seed=st.integers(0, 2**32), exponents=st.lists(st.floats(-30, 30), min_size=4, max_size=4), order=st.integers(2, 5)
)
@pytest.mark.libraries("torch", "jax")
def test_no_score_of_turned_rows_exceeds_the_bound(
    layered: Library, seed: int, exponents: list[float], order: int
) -> None:
    """By the moduli of the very rows that the layer makes in float32, far from the first position as well."""
    rng = np.random.default_rng(seed)
    config = AttentionConfig(6, 1, head_dim=6, order=order, bound=2.0, positions="rotary", causal=True)
    seen: list[Any] = []

    def attention(query: Any, keys: Any, values: Any, masks: Any) -> Any:
        seen.extend([query, *keys])
        return values[0]

    same_rows = rng.normal(size=(5, 6)) * rng.choice([1, 1e-3, 0], (5, 6))
    rows = [layered.array((same_rows * 10.0**e).astype(np.float32)) for e in exponents]
    views = [rows[1 + i % 3] for i in range(order - 1)]
    attend(config, attention, (rows[0], views, views, Counted()), Learned(before=10**6), lambda a: a, False)
    moduli = [np.abs(as_complex(layered.numpy(r).astype(np.float64)))[0, 0] for r in seen]
    assert (config.scale * np.prod(moduli, axis=0).sum(-1) <= config.promise).all()
    # Rows that are alike in all views reach the bound, so that a norm that is too large shows, too.
    if min(exponents[:3]) > 4:
        assert (config.scale * (moduli[0] ** order).sum(-1)).max() > 0.999 * config.bound
