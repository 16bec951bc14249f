"""JAX's transformations of a planned call: right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import CALLS, arguments
from reference import score_by_score, through_features

import tattn
from tattn.backends.compiled import SWITCH

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")
check_grads = pytest.importorskip("jax.test_util").check_grads

pytestmark = pytest.mark.libraries("jax")

PLANS = {
    "polynomial": through_features(tattn.plan_for(n=6, dim=3, bound=1.5, degree=5, dtype="float64")),
    "exact": tattn.plan_for(n=6, dim=3, bound=1.5, method="exact", dtype="float64"),
    "causal polynomial": tattn.plan_for(n=6, dim=3, bound=1.5, degree=5, dtype="float64", causal=True),
    "causal exact": tattn.plan_for(n=6, dim=3, bound=1.5, method="exact", dtype="float64", causal=True),
}


@pytest.fixture(params=list(PLANS))
def plan(request: pytest.FixtureRequest) -> tattn.Plan:
    return PLANS[request.param]


@pytest.fixture
def arrays() -> list[Any]:
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.uniform(-1, 1, s)) for s in [(4, 3), (5, 3), (6, 3), (5, 2), (6, 2)]]


def loss(plan: tattn.Plan) -> Callable[..., Any]:
    def of(q: Any, a: Any, b: Any, u: Any, v: Any) -> Any:
        out, lse = tattn.tensor_attention(q, [a, b], [u, v], plan=plan, causal=plan.causal, return_lse=True)
        return jnp.sin(out).sum() + jnp.cos(lse).sum()

    return of


def same(a: Any, b: Any) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)


def test_gradients(plan: tattn.Plan, arrays: list[Any]) -> None:
    of = loss(plan)
    gradients = jax.grad(of, tuple(range(5)))(*arrays)
    rng = np.random.default_rng(1)
    for i, g in enumerate(gradients):
        direction = rng.normal(size=g.shape)
        ahead, behind = ([a + (s * 1e-5 * direction if j == i else 0) for j, a in enumerate(arrays)] for s in (1, -1))
        np.testing.assert_allclose((of(*ahead) - of(*behind)) / 2e-5, (g * direction).sum(), rtol=1e-7, atol=1e-8)
    for a, b in zip(jax.jit(jax.grad(of, tuple(range(5))))(*arrays), gradients, strict=True):
        same(a, b)
    for a, b in zip(jax.grad(jax.checkpoint(of), tuple(range(5)))(*arrays), gradients, strict=True):
        same(a, b)


@pytest.mark.grid
def test_vmap(plan: tattn.Plan, arrays: list[Any]) -> None:
    of = loss(plan)
    stacked = [jnp.stack([a, 0.7 * a, -0.2 * a]) for a in arrays]
    mapped = jax.vmap(jax.grad(of, tuple(range(5))))(*stacked)
    for i in range(3):
        for a, b in zip(mapped, jax.grad(of, tuple(range(5)))(*(s[i] for s in stacked)), strict=True):
            same(a[i], b)


@pytest.mark.grid
def test_second_derivatives(plan: tattn.Plan, arrays: list[Any]) -> None:
    of = loss(plan)

    def first(q: Any) -> Any:
        return of(q, *arrays[1:])

    second = jax.jacrev(jax.grad(first))(arrays[0])
    step = 1e-5
    for i, c in ((0, 1), (3, 2)):
        ahead, behind = (jax.grad(first)(arrays[0].at[i, c].add(s * step)) for s in (1, -1))
        np.testing.assert_allclose((ahead - behind) / (2 * step), second[:, :, i, c], rtol=1e-6, atol=1e-8)


def test_masks_take_no_gradient(plan: tattn.Plan, arrays: list[Any]) -> None:
    q, a, b, u, v = arrays
    mask = jnp.asarray([True, False, True, True, False])

    def of(mask: Any, a: Any) -> Any:
        return tattn.tensor_attention(q, [a, b], [u, v], plan=plan, causal=plan.causal, key_masks=[mask, None]).sum()

    gradient = jax.jit(jax.grad(of, 1))(mask, a)
    assert (np.asarray(gradient)[[1, 4]] == 0).all()
    assert (np.asarray(gradient)[[0, 2]] != 0).any()


def test_forward_mode_is_refused(plan: tattn.Plan, arrays: list[Any]) -> None:
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss(plan), arrays, arrays)


def test_traced_calls_say_what_they_need(arrays: list[Any]) -> None:
    q, a, b, u, v = arrays
    with pytest.raises(tattn.PlanError, match="traced and its values cannot be read, so it needs a plan"):
        jax.jit(lambda q: tattn.tensor_attention(q, [a, b], [u, v]))(q)
    planned = tattn.plan(q, [a, b], method="polynomial", tol=1e-2)
    with pytest.raises(tattn.PlanError, match="a promise of your own"):
        jax.grad(lambda q: tattn.tensor_attention(q, [a, b], [u, v], plan=planned).sum())(q)


@pytest.mark.grid
def test_hessians(plan: tattn.Plan, arrays: list[Any]) -> None:
    """Forward over reverse: the adjoint has a forward mode."""

    def of(q: Any) -> Any:
        return loss(plan)(q, *arrays[1:])

    same(jax.hessian(of)(arrays[0]), jax.jacrev(jax.grad(of))(arrays[0]))


@pytest.mark.grid
def test_ranks_need_not_be_promoted_by_the_caller(plan: tattn.Plan, arrays: list[Any]) -> None:
    q, a, b, u, v = arrays
    mask = jnp.asarray([True, False, True, True, True])
    with jax.numpy_rank_promotion("raise"):
        of = jax.grad(lambda q: tattn.tensor_attention(q, [a, b], [u, v], plan=plan, causal=plan.causal).sum())
        assert jax.vmap(of)(jnp.stack([q, q])).shape == (2, 4, 3)
        options: dict[str, Any] = {"plan": plan, "causal": plan.causal, "key_masks": [mask, None]}
        _, pullback = tattn.tensor_attention_vjp(jnp.stack([q, q]), [a, b], [u, v], return_error=True, **options)
        pullback(jnp.ones((2, 4, 2)), return_error=True)


def test_programs_are_bounded() -> None:
    """One for each function, plan and shape; those that are let go of give back what they held."""
    import gc
    import weakref

    from tattn.backends import jax as backend

    most = backend._compiled.cache_parameters()["maxsize"]
    assert most <= 256
    x = jnp.ones((3, 2))
    shapes = ((x.shape, x.dtype),)

    def times(call: Any, _: Any, arrays: Any) -> Any:
        return arrays[0] * call

    def program(n: int) -> Any:
        return weakref.ref(backend._compiled(times, n, False, shapes))

    for n in (3, 4):
        backend.BACKEND.run(times, n, (x,))
    compiled = [program(3), program(4)]
    # Not compiled, since they are not called.
    others = [program(-n) for n in range(most - 1)]
    gc.collect()
    assert [p() is None for p in compiled] == [True, False]
    assert all(p() is not None for p in others)


def test_programs_rest_on_the_attributes_of_the_backend() -> None:
    from tattn.backends.jax import BACKEND

    def workspace(call: Any, backend: Any, arrays: Any) -> Any:
        return arrays[0] * backend.workspace

    x = jnp.ones((3, 2))
    for size in (BACKEND.workspace, 7):
        with BACKEND.using(workspace=size):
            assert (BACKEND.run(workspace, None, (x,)) == size).all()


def test_settings_go_by_where_arrays_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from tattn.backends import jax as backend

    x = jnp.ones((3, 2))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert backend.BACKEND.for_arrays([None, x]) is backend.BACKEND
    chosen = []
    jax.jit(lambda x: chosen.append(backend.BACKEND.for_arrays([x])) or x)(x)
    with jax.default_device(jax.devices("cpu")[0]):
        jax.jit(lambda x: chosen.append(backend.BACKEND.for_arrays([x])) or 2 * x)(x)
    assert chosen == [backend._ON_GPU, backend.BACKEND]


@pytest.mark.parametrize("decay", [None, (0.98, 0.9)], ids=str)
def test_blocks_of_causal_rows_are_whole_chunks(decay: Any) -> None:
    """Blocks of one length leave no rest, but each would count the rows that fill its last chunk."""
    from tattn.backends.jax import BACKEND
    from tattn.backends.numpy import BACKEND as NUMPY

    jax.config.update("jax_enable_x64", True)
    # The longest equal blocks of 256 rows at most are no whole chunks, and the longest of whole chunks.
    for n in (350, 480):
        rows = np.random.default_rng(0).uniform(-1, 1, (5, n, 2))
        plan = tattn.plan_for(n=n, dim=2, bound=1.0, degree=2, dtype="float64", causal=True)
        options: dict[str, Any] = {"plan": plan, "causal": True, "decay": decay, "return_lse": True}
        expected = tattn.tensor_attention(rows[0], list(rows[1:3]), list(rows[3:]), **options)
        arrays = [jnp.asarray(x) for x in rows]
        with NUMPY.using(kernels=()), BACKEND.using(workspace=36 << 10):
            found = tattn.tensor_attention(arrays[0], arrays[1:3], arrays[3:], **options)
        for got, like in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, like, rtol=1e-11, atol=1e-12)


def test_float64_where_it_is_switched_off() -> None:
    """JAX would go on in float32, whatever the plan says."""
    jax.config.update("jax_enable_x64", True)
    rows = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (9, 3)))
    plan = PLANS["causal polynomial"]

    def attend(x: Any) -> Any:
        return tattn.tensor_attention(x, [x, x], [x, x], plan=plan, causal=True)

    jax.config.update("jax_enable_x64", False)
    try:
        for call in (attend, jax.jit(attend)):
            with pytest.raises(
                TypeError, match="query should be an array, got one of float64 while jax_enable_x64 is off"
            ):
                call(rows)
    finally:
        jax.config.update("jax_enable_x64", True)
    assert attend(rows).dtype == jnp.float64


def test_bfloat16() -> None:
    rng = np.random.default_rng(3)
    wide = [rng.uniform(-1, 1, (32, 4)) for _ in range(5)]
    narrow = [jnp.asarray(a, jnp.bfloat16) for a in wide]
    for method in ("exact", "polynomial"):
        out = tattn.tensor_attention(narrow[0], narrow[1:3], narrow[3:], method=method)
        assert out.dtype == jnp.bfloat16
        exact = [np.asarray(a, np.float64) for a in narrow]
        truth = tattn.tensor_attention(exact[0], exact[1:3], exact[3:], method="exact")
        assert np.abs(np.asarray(out, np.float64) - truth).max() <= 2**-7 * np.abs(truth).max() + 1e-3


def test_summaries_are_containers(arrays: list[Any]) -> None:
    """Through jit, vmap and grad, in and out."""
    q, a, b, u, v = arrays
    plan = PLANS["polynomial"]

    @jax.jit
    def summarized(a: Any, b: Any) -> tattn.Summary:
        return tattn.summarize([a, b], [u, v], plan)

    summary = summarized(a, b)
    expected = tattn.tensor_attention(q, [a, b], [u, v], plan=plan)
    same(jax.jit(lambda s: (s + s).attend(q))(summary), expected)
    both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), summary)
    assert isinstance(both, tattn.Summary)
    for out in jax.vmap(lambda s: s.attend(q))(both):
        same(out, expected)
    gradient = jax.jit(jax.grad(lambda a, b: jnp.sin(summarized(a, b).attend(q)).sum()))(a, b)
    same(gradient, jax.grad(lambda a: jnp.sin(tattn.tensor_attention(q, [a, b], [u, v], plan=plan)).sum())(a))


def test_decoding_in_a_scan(arrays: list[Any]) -> None:
    q, a, b, u, v = (x[:4, None, :] for x in arrays)
    plan = PLANS["polynomial"]
    start = tattn.DecodingState(plan, tattn.summarize([a[0, :0], b[0, :0]], [u[0, :0], v[0, :0]], plan))

    def token(state: tattn.DecodingState, rows: Any) -> tuple[tattn.DecodingState, Any]:
        q, a, b, u, v = rows
        out, state = state.step(q, [a, b], [u, v])
        return state, out

    _, outs = jax.lax.scan(token, start, (q, a, b, u, v))
    state = tattn.DecodingState(plan)
    for i in range(4):
        out, state = state.step(q[i], [a[i], b[i]], [u[i], v[i]])
        same(outs[i], out)


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.grid
def test_products_differentiate_as_they_are(call: str) -> None:
    jax.config.update("jax_enable_x64", True)
    of = CALLS[call][0]
    given = [jnp.asarray(a) for a in arguments(call)]
    expected = of(*given)
    same(jax.jit(of)(*given), expected)
    check_grads(jax.jit(of), given, order=2, modes=["fwd", "rev"], rtol=1e-6, atol=1e-6)
    mapped = jax.vmap(of)(*(jnp.stack([a, 2 * a]) for a in given))
    same(mapped[0], expected)
    same(mapped[1], of(*(2 * a for a in given)))


def test_transformations_score_by_score() -> None:
    jax.config.update("jax_enable_x64", True)
    plan = score_by_score(tattn.plan_for(n=5, dim=3, bound=1.0, degree=5, dtype="float64"))
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 5, 3)))

    def loss(x: Any) -> Any:
        return jnp.sin(tattn.tensor_attention(x, [x, x], [x, x], plan=plan)).sum()

    both = jax.jit(jax.vmap(jax.grad(loss)))(x)
    for got, given in zip(both, x, strict=True):
        np.testing.assert_allclose(got, jax.grad(loss)(given), rtol=1e-12, atol=1e-14)
        step = 1e-6 * jnp.cos(jnp.arange(15.0).reshape(5, 3))
        slope = (loss(given + step) - loss(given - step)) / 2
        np.testing.assert_allclose((got * step).sum(), slope, rtol=1e-6)


def test_rows_are_cut_into_blocks_without_a_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loop stands in a program once; a prime number of rows leaves a rest, which takes the same operations again."""
    monkeypatch.setenv(SWITCH, "0")

    def products(n: int) -> int:
        plan = tattn.plan_for(n=n, dim=8, value_dim=8, bound=1.0, degree=4, method="polynomial")
        arrays = [jax.ShapeDtypeStruct((n, 8), jnp.float32)] * 5
        gradient = jax.grad(
            lambda q, a, b, u, v: tattn.tensor_attention(q, [a, b], [u, v], plan=plan).sum(), tuple(range(5))
        )
        return jax.jit(gradient).lower(*arrays).as_text().count("stablehlo.dot_general")

    once = products(1 << 16)
    assert once == products(50_000) == products(3 * 1024)
    assert products(10_007) == 2 * once
