"""JAX's arrays on several devices, inside `jax.shard_map` and not, and programs for any batch."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tattn

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")

pytestmark = pytest.mark.libraries("jax")

N, DIM = 130, 2
ROWS = "polynomial, rows of the query"
# The method, and along which dimension the rows of each array are spread over devices.
SPREAD: dict[str, tuple[str, Any]] = {
    "polynomial, batch": ("polynomial", 0),
    ROWS: ("polynomial", 1),
    "exact, batch": ("exact", 0),
    "exact, rows of the query": ("exact", 1),
    "causal, batch": ("causal", 0),
}


def attention(method: str) -> Any:
    known = {"degree": None, "method": "exact"} if method == "exact" else {"degree": 2}
    causal = method == "causal"
    plan = tattn.plan_for(n=N, dim=DIM, bound=1.0, dtype="float64", causal=causal, **known)
    return lambda q, a, b, u, v: tattn.tensor_attention(q, [a, b], [u, v], plan=plan, causal=causal)


def drawn() -> list[Any]:
    jax.config.update("jax_enable_x64", True)
    return [jnp.asarray(x) for x in np.random.default_rng(0).uniform(-1, 1, (5, 2, N, DIM))]


def gradients(of: Any) -> Any:
    return jax.jit(jax.grad(lambda *x: jnp.sin(of(*x)).sum(), tuple(range(5))))


def check_spread(name: str) -> None:
    """Outputs and gradients in loops over blocks, by `jax.shard_map` with its checks and by `jax.jit` of arrays that are spread."""
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from tattn.backends.jax import BACKEND

    method, axis = SPREAD[name]
    of, given = attention(method), drawn()
    mesh = Mesh(np.array(jax.devices()).reshape(-1, 1), ("spread", "other"))
    spread = PartitionSpec(*(None,) * axis, "spread")
    specs = [spread] + [PartitionSpec() if axis else spread] * 4
    with BACKEND.using(workspace=1 << 14, cache=1 << 12, most_rows=32):
        expected, grads = of(*given), gradients(of)(*given)
        mapped = jax.shard_map(of, mesh=mesh, in_specs=tuple(specs), out_specs=spread)
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(given, specs, strict=True)]
        close = {"rtol": 1e-10, "atol": 1e-12}
        for found, arrays in ((mapped, given), (jax.jit(of), placed), (of, placed)):
            np.testing.assert_allclose(found(*arrays), expected, **close)
        if name == "polynomial, batch":
            read = [
                tattn.tensor_attention(q, [a, b], [u, v], tol=0.1)
                for q, a, b, u, v in ([x[:, :12] for x in of] for of in (placed, given))
            ]
            np.testing.assert_allclose(*read, **close)
        for found, arrays in ((mapped, given), (of, placed)):
            for own, right in zip(gradients(found)(*arrays), grads, strict=True):
                np.testing.assert_allclose(own, right, **close)


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no jax.shard_map")
@pytest.mark.thorough
@pytest.mark.parametrize("name", list(SPREAD))
def test_spread_over_one_device(name: str) -> None:
    """The types that JAX checks are those of several."""
    check_spread(name)


@pytest.mark.skipif(not hasattr(jax, "shard_map"), reason="this JAX has no jax.shard_map")
@pytest.mark.parametrize("name", [*(pytest.param(n, marks=pytest.mark.thorough) for n in SPREAD if n != ROWS), ROWS])
def test_spread_over_two_devices(name: str) -> None:
    script = f"import jax, test_jax_devices as t; assert jax.device_count() == 2; t.check_spread({name!r})"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = {
        **os.environ,
        "PYTHONPATH": path,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


def exported(of: Any, shape: str, count: int = 5) -> Any:
    export = pytest.importorskip("jax.export")
    kinds = [jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float64)] * count
    return export.export(jax.jit(of))(*kinds)


@pytest.mark.parametrize("method", ["polynomial", "exact", "causal"])
def test_programs_for_any_batch(method: str) -> None:
    of, given = attention(method), [x[:, :12] for x in drawn()]
    program = exported(jax.vmap(of), f"batch, 12, {DIM}")
    for count in (1, 2):
        some = [x[:count] for x in given]
        np.testing.assert_allclose(program.call(*some), of(*some), rtol=1e-12, atol=1e-14)


def test_layers_for_any_batch() -> None:
    from tattn.nn import AttentionConfig
    from tattn.nn.jax import apply, init

    drawn()
    config = AttentionConfig(6, 2, degree=2)
    layer = partial(apply, init(jax.random.key(0), config), config=config)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 6)))
    np.testing.assert_allclose(exported(jax.vmap(layer), "batch, 8, 6", 1).call(x), layer(x), rtol=1e-10, atol=1e-12)
    with pytest.raises(
        TypeError, match=r"^x should be an array, got one of symbolic shape \(2, n, 6\): .*export for known"
    ):
        exported(layer, "2, n, 6", 1)


@pytest.mark.parametrize("shape", ["batch, 12, 2", "2, n, 2"])
def test_symbolic_shapes_are_refused_by_name(shape: str) -> None:
    drawn()
    with pytest.raises(TypeError, match=r"^query should be an array, got one of symbolic shape .*jax\.jit\(jax\.vmap"):
        exported(attention("polynomial"), shape)
