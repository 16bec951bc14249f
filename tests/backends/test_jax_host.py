"""Calls of JAX that compiled loops compute: where they do, and that transformations of them are those of array operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import tattn
from tattn.backends import compiled

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")
pytest.importorskip("numba")

pytestmark = pytest.mark.libraries("jax")

N, DIM = 40, 2
# What a call may have besides.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": (24, 24)},
    "masks": {"key_masks": [np.arange(N) % 5 != 0, None]},
    "weights": {"key_weights": [np.linspace(0.1, 2, N), None]},
    "decay": {"decay": [np.asarray(0.9), np.asarray(0.8)]},
    "lse": {"return_lse": True},
    "error": {"return_error": True},
    "documents": {"offsets": np.asarray([0, 7, 7, 30, 40])},
    "errors of documents": {"offsets": np.asarray([0, 15, 40]), "return_error": True, "return_lse": True},
}
ARRAYS = ("key_masks", "key_weights", "decay")


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compiled.SWITCH, raising=False)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What a function returns by array operations."""

    def found(of: Callable[..., Any], *arrays: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setenv(compiled.SWITCH, "0")
            assert not uses_loops(of, *arrays)
            return of(*arrays)

    return found


@pytest.fixture
def arrays() -> Iterator[list[Any]]:
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield [jnp.asarray(x) for x in np.random.default_rng(0).uniform(-1, 1, (5, N, DIM))]
    jax.config.update("jax_enable_x64", before)


def uses_loops(of: Callable[..., Any], *arrays: Any) -> bool:
    """Whether a program has calls of them."""
    return "tattn_loops[" in str(jax.make_jaxpr(of)(*arrays))


def attention(**options: Any) -> Callable[..., Any]:
    window = options.get("window")
    plan = tattn.plan_for(n=N, dim=DIM, bound=1.0, degree=3, dtype="float64", causal=True, window=window)
    given = {k: [x if x is None else jnp.asarray(x) for x in v] if k in ARRAYS else v for k, v in options.items()}
    return lambda q, a, b, u, v: tattn.tensor_attention(q, [a, b], [u, v], plan=plan, causal=True, **given)


def total(of: Callable[..., Any]) -> Callable[..., Any]:
    """A number that all outputs change."""
    return lambda *arrays: sum(jnp.sin(x).sum() for x in jax.tree.leaves(of(*arrays)))


def gradients(of: Callable[..., Any]) -> Callable[..., Any]:
    return jax.grad(total(of), tuple(range(5)))


def same(found: Any, expected: Any) -> None:
    found, expected = (jax.tree.leaves(x) for x in (found, expected))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", list(OPTIONS))
def test_outputs_and_gradients_are_those_of_array_operations(name, arrays, without):
    of = attention(**OPTIONS[name])
    both = jax.jit(lambda *x: (of(*x), gradients(of)(*x)))
    assert uses_loops(both, *arrays)
    same(both(*arrays), without(jax.jit(lambda *x: (of(*x), gradients(of)(*x))), *arrays))
    same(of(*arrays), both(*arrays)[0])


@pytest.mark.parametrize("axes", [(0, 0, 0, 0, 0), (0, None, 1, None, 2), (None, 0, None, None, None)])
def test_maps_over_any_axis(axes, arrays, without):
    of = attention()
    some = [a if x is None else jnp.stack([a, -0.5 * a, 0.2 * a], axis=x) for a, x in zip(arrays, axes, strict=True)]
    mapped = jax.vmap(gradients(of), in_axes=axes)
    assert uses_loops(mapped, *some)
    same(mapped(*some), without(jax.vmap(gradients(attention()), in_axes=axes), *some))
    # Gradients of what is not mapped add up; maps of maps, and of arrays with dimensions of their own.
    same(gradients(jax.vmap(of, in_axes=axes))(*some), without(gradients(jax.vmap(attention(), in_axes=axes)), *some))
    heads = [jnp.stack([a, 0.3 * a]) for a in some]

    twice = jax.vmap(jax.vmap(gradients(of), in_axes=axes))
    same(jax.tree.map(lambda g: g[1], twice(*heads)), mapped(*(h[1] for h in heads)))


@pytest.mark.thorough
def test_maps_over_documents(arrays):
    of = attention(**OPTIONS["documents"])
    some = [jnp.stack([a, -0.5 * a]) for a in arrays]
    mapped = jax.vmap(gradients(of))(*some)
    same(jax.tree.map(lambda g: g[1], mapped), gradients(of)(*(x[1] for x in some)))


def test_maps_over_no_problems(arrays):
    of, (first, *others) = attention(return_lse=True), arrays
    found = jax.vmap(lambda q: (of(q, *others), gradients(of)(q, *others)))(first[None][:0])
    assert [x.shape for x in jax.tree.leaves(found)] == [(0, N, DIM), (0, N), *[(0, N, DIM)] * 5]


def test_second_derivatives(arrays, without):
    of, direction = attention(return_lse=True), [0.3 + jnp.cos(a) for a in arrays]

    def along(*x):
        return jax.jvp(gradients(of), x, tuple(direction))

    same(jax.jit(along)(*arrays), without(jax.jit(lambda *x: along(*x)), *arrays))


def test_loops_branches_and_checkpoints_of_a_program(arrays):
    of = attention()

    def deep(q, a, b, u, v):
        def layer(x, _):
            return x + jax.lax.cond(x.sum() > 1e9, lambda y: y, lambda y: jax.checkpoint(of)(y, a, b, u, v), x), None

        return jax.lax.scan(layer, q, None, length=3)[0]

    def unrolled(q, a, b, u, v):
        for _ in range(3):
            q = q + of(q, a, b, u, v)
        return q

    same(jax.jit(gradients(deep))(*arrays), gradients(unrolled)(*arrays))


def test_what_is_exported_needs_no_python(arrays):
    export = pytest.importorskip("jax.export")
    of = gradients(attention())
    assert uses_loops(of, *arrays)
    exported = export.export(jax.jit(of))(*arrays)
    assert "callback" not in exported.mlir_module()
    same(exported.call(*arrays), of(*arrays))


def test_narrow_numbers_are_computed_in_float32(arrays):
    def planned(dtype):
        plan = tattn.plan_for(n=N, dim=DIM, bound=1.0, degree=3, dtype=dtype, causal=True)
        return lambda q, a, b, u, v: tattn.tensor_attention(q, [a, b], [u, v], plan=plan, causal=True)

    of, wider = planned("bfloat16"), planned("float32")
    narrow = [a.astype(jnp.bfloat16) for a in arrays]
    found = jax.jit(lambda *x: (of(*x), gradients(of)(*x)))(*narrow)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    wide = [a.astype(jnp.float32) for a in narrow]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves((wider(*wide), gradients(wider)(*wide))), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", ["polynomial", "exact"])
def test_long_calls_over_all_rows(method, arrays, without):
    """Shorter ones are left to array operations."""
    degree = 4 if method == "polynomial" else None
    plan = tattn.plan_for(n=128, dim=4, bound=1.0, degree=degree, method=method, dtype="float64")
    rng = np.random.default_rng(1)

    def of(*x):
        return tattn.tensor_attention(x[0], x[1:3], x[3:], plan=plan, return_lse=True)

    heads = 2 if method == "exact" else 40
    for n, expected in ((4, False), (128, True)):
        given = [jnp.asarray(x) for x in rng.uniform(-1, 1, (5, heads, n, 4))]
        assert uses_loops(of, *given) == expected
    same(of(*given), without(jax.jit(lambda *x: of(*x)), *given))
    same(gradients(of)(*given), without(jax.jit(lambda *x: gradients(of)(*x)), *given))


@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_gradients_of_documents_map_over_upstream_ones_alone(causal, monkeypatch):
    """Loops compute the output, of documents as they stand, and array operations its gradients, of padded groups."""
    monkeypatch.setattr(compiled, "_MANY", 1)
    rng, offsets, n = np.random.default_rng(0), np.asarray([0, 90, 190]), 190
    arrays = [jnp.asarray(x, jnp.float32) for x in rng.uniform(-1, 1, (3, n, DIM))]
    upstream = jnp.asarray(rng.normal(size=(2, n, DIM)), jnp.float32)
    plan = tattn.plan_for(n=n, dim=DIM, bound=1.0, degree=2, order=2, causal=causal)

    def packed(q: Any, a: Any, u: Any) -> Any:
        return tattn.tensor_attention(q, [a], [u], plan=plan, offsets=offsets, causal=causal)

    assert uses_loops(packed, *arrays)
    _, pullback = jax.vjp(packed, *arrays)
    for found, *expected in zip(jax.jit(jax.vmap(pullback))(upstream), *map(pullback, upstream), strict=True):
        np.testing.assert_allclose(found, np.stack(expected), rtol=1e-4, atol=1e-5 * float(jnp.abs(found).max()))


def test_plans_price_calls_by_what_computes_them(arrays, without):
    rows = [jnp.asarray(x) for x in np.random.default_rng(0).uniform(-1, 1, (5, 300, 4))]

    def price(*x):
        return tattn.plan(x[0], x[1:3], x[3:], method="polynomial", causal=True).flops_polynomial

    whole = tattn.plan(rows[0], rows[1:3], rows[3:], method="polynomial").flops_polynomial
    assert price(*rows) == 1.5 * whole


@pytest.mark.parametrize("name", ["decay", *(pytest.param(x, marks=pytest.mark.thorough) for x in ("lse", "masks"))])
def test_states_take_many_rows(name, arrays, without):
    """Those of a prompt, and those that follow it."""
    n, plan = 1100, tattn.plan_for(n=1100, dim=5, bound=1.0, degree=4, dtype="float64", causal=True)
    rows = [jnp.asarray(x) for x in np.random.default_rng(0).uniform(-1, 1, (5, n, 5))]
    seen = jnp.arange(n) % 5 != 0
    prompt, following = {
        "lse": ({}, {"return_lse": True}),
        "masks": ({"key_masks": [seen, None]}, {"key_masks": [None, seen]}),
        "decay": ({"decay": [0.9, 0.99]}, {"decay": [0.9, 0.99]}),
    }[name]

    def begun(_, a, b, u, v):
        return tattn.summarize([a, b], [u, v], plan, **prompt)

    def gone_on(summary, q, a, b, u, v):
        out, state = tattn.DecodingState(plan, summary).step(q, [b, a], [v, u], **following)
        return out, state.summary.sums

    def of(*rows):
        return gone_on(begun(*rows), *rows)

    def mapped(q, a, b, u, v):
        return jax.vmap(of, in_axes=(0, None, None, 1, None))(
            jnp.stack([q, -q]), a, b, jnp.stack([u, 2 * u], axis=1), v
        )

    assert uses_loops(begun, *rows) and uses_loops(partial(gone_on, begun(*rows)), *rows)
    for form in (of, mapped) if name == "decay" else (of,):
        same(jax.jit(form)(*rows), without(jax.jit(lambda *x, form=form: form(*x)), *rows))
