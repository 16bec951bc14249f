"""torch's gradients of every kind: right, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from reference import changed
from test_products import CALLS, arguments
from test_scorewise import BY_SCORES

import tattn
from tattn.features.monomials import rank
from tattn.methods import Polynomial

torch = pytest.importorskip("torch")
torch_backend = pytest.importorskip("tattn.backends.torch")
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")

PLANS = {
    "polynomial": tattn.plan_for(n=6, dim=3, bound=1.5, degree=5, dtype="float64"),
    "exact": tattn.plan_for(n=6, dim=3, bound=1.5, method="exact", dtype="float64"),
    "causal polynomial": tattn.plan_for(n=6, dim=3, bound=1.5, degree=5, dtype="float64", causal=True),
    "causal exact": tattn.plan_for(n=6, dim=3, bound=1.5, method="exact", dtype="float64", causal=True),
}
# A channel that is left out, and one that counts half as much again as the least.
_PRUNED = {"degree": 3, "coefficients": (1.0, 1.0, 0.5, 0.17), "grading": (3, 7, 2), "rank": rank(3, 3, (3, 7, 2))}
PLANS |= {
    name.replace("polynomial", "pruned"): changed(PLANS[name], **_PRUNED)
    for name in ("polynomial", "causal polynomial")
}


@pytest.fixture(params=list(PLANS))
def plan(request: pytest.FixtureRequest) -> tattn.Plan:
    return PLANS[request.param]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return str(request.param)


@pytest.fixture
def tensors(device: str) -> list[Any]:
    rng = np.random.default_rng(0)
    shapes = [(4, 3), (5, 3), (6, 3), (5, 2), (6, 2)]
    return [torch.tensor(rng.uniform(-1, 1, s), device=device, requires_grad=True) for s in shapes]


def attend(plan: tattn.Plan, **options: Any) -> Callable[..., Any]:
    return lambda q, a, b, u, v: tattn.tensor_attention(q, [a, b], [u, v], plan=plan, causal=plan.causal, **options)


def loss(plan: tattn.Plan) -> Callable[..., Any]:
    def of(*arrays: Any) -> Any:
        out, lse = attend(plan, return_lse=True)(*arrays)
        return out.sin().sum() + lse.cos().sum()

    return of


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_first_and_second_derivatives(plan: tattn.Plan, tensors: list[Any]) -> None:
    both = attend(plan, return_lse=True)
    assert torch.autograd.gradcheck(both, tensors)
    assert torch.autograd.gradgradcheck(both, tensors)


def test_with_masks_and_shared_keys(plan: tattn.Plan, tensors: list[Any]) -> None:
    q, a, b, u, v = tensors
    mask = torch.tensor([True, False, True, True, False], device=q.device)
    heads = torch.stack([q.detach(), 0.5 * q.detach()]).requires_grad_()

    def of(q: Any, *rest: Any) -> Any:
        return tattn.tensor_attention(q, rest[:2], rest[2:], plan=plan, causal=plan.causal, key_masks=[mask, None])

    assert torch.autograd.gradcheck(of, (heads, a, b, u, v))
    assert torch.autograd.gradgradcheck(of, (heads, a, b, u, v))


def test_functional_transformations(plan: tattn.Plan, tensors: list[Any]) -> None:
    of = loss(plan)
    plain = [t.detach() for t in tensors]
    every = tuple(range(5))
    gradients = torch.autograd.grad(of(*tensors), tensors)
    for a, b in zip(torch.func.grad(of, every)(*plain), gradients, strict=True):
        same(a, b)
    stacked = [torch.stack([t, 0.7 * t, -0.2 * t]) for t in plain]
    mapped = torch.func.vmap(torch.func.grad(of, every))(*stacked)
    for i in range(3):
        for a, b in zip(mapped, torch.func.grad(of, every)(*(s[i] for s in stacked)), strict=True):
            same(a[i], b)
    # One argument mapped, along another axis, over leading dimensions.
    values = torch.stack([plain[3], 2 * plain[3]], dim=1)
    got = torch.func.vmap(attend(plan), in_dims=(None, None, None, 1, None))(*plain[:3], values, plain[4])
    same(got[1], 2 * attend(plan)(*plain))


def test_hessians_agree(plan: tattn.Plan, tensors: list[Any]) -> None:
    of = loss(plan)
    plain = [t.detach() for t in tensors]

    def first(q: Any) -> Any:
        return of(q, *plain[1:])

    reverse = torch.func.jacrev(torch.func.jacrev(first))(plain[0])
    same(torch.func.hessian(first)(plain[0]), reverse)
    same(torch.autograd.functional.hessian(first, plain[0]), reverse)


def test_forward_mode(plan: tattn.Plan, tensors: list[Any]) -> None:
    of = loss(plan)
    plain = tuple(t.detach() for t in tensors)
    rng = np.random.default_rng(1)
    tangents = tuple(torch.tensor(rng.normal(size=t.shape), device=t.device) for t in plain)
    _, got = torch.func.jvp(of, plain, tangents)
    same(got, sum((g * t).sum() for g, t in zip(torch.func.grad(of, tuple(range(5)))(*plain), tangents, strict=True)))


def test_tangents_outside_of_torch_func(plan: tattn.Plan, tensors: list[Any]) -> None:
    forward_ad = torch.autograd.forward_ad
    of = loss(plan)
    slopes = torch.autograd.grad(of(*tensors), tensors)
    tangents = [torch.full_like(t, 0.3) for t in tensors]
    for recorded in (False, True):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(t if recorded else t.detach(), s) for t, s in zip(tensors, tangents, strict=True)
            ]
            got = forward_ad.unpack_dual(of(*duals)).tangent
        same(got, sum((g * t).sum() for g, t in zip(slopes, tangents, strict=True)))


@pytest.mark.parametrize("call", list(CALLS))
def test_forward_mode_over_mapped_products(call: str) -> None:
    """Batched tensors inside a forward mode have no tangents that could be looked at."""
    made = [torch.as_tensor(a) for a in arguments(call)]
    function, tangents = CALLS[call][0], [torch.ones_like(a) for a in made]
    mapped = torch.func.vmap(function)
    _, got = torch.func.jvp(mapped, tuple(a[None] for a in made), tuple(t[None] for t in tangents))
    _, expected = torch.func.jvp(function, tuple(made), tuple(tangents))
    same(got[0], expected)


@pytest.mark.usefixtures("bands_at_any_length")
def test_gradients_and_tangents_through_bands_that_auto_chose() -> None:
    """What found out that bands serve was computed without either."""
    rng = np.random.default_rng(3)
    query, a, b = (torch.tensor(x) for x in rng.normal(size=(3, 1000, 8)) * 0.4)
    u, v, tangent = (torch.tensor(x) for x in (*rng.normal(size=(2, 1000, 4)), rng.normal(size=(1000, 8))))
    query.requires_grad_()
    expected, plan = tattn.tensor_attention(query, [a, b], [u, v], return_plan=True)
    assert plan.series == "banded"
    (slope,) = torch.autograd.grad(expected.sum(), query)
    out, pullback = tattn.tensor_attention_vjp(query, [a, b], [u, v])
    same(torch.autograd.grad(out.sum(), query)[0], slope)
    same(pullback(torch.ones_like(out))[0], slope)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(query.detach(), tangent)
        for found in (
            tattn.tensor_attention(dual, [a, b], [u, v]),
            tattn.tensor_attention_vjp(dual, [a, b], [u, v])[0],
        ):
            got = torch.autograd.forward_ad.unpack_dual(found).tangent
            assert got is not None
            same(got.sum(), (slope * tangent).sum())


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(plan: tattn.Plan, tensors: list[Any], compiler: str) -> None:
    of = loss(plan)
    torch._dynamo.reset()
    compiled = torch.compile(of, fullgraph=True, backend=compiler)
    for a, b in zip(
        torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(of(*tensors), tensors), strict=True
    ):
        same(a, b)


def test_compile_over_many_blocks() -> None:
    rng = np.random.default_rng(2)
    arrays = [torch.tensor(rng.uniform(-1, 1, (9000, 3)), requires_grad=True) for _ in range(5)]
    of = loss(PLANS["polynomial"])
    torch._dynamo.reset()
    compiled = torch.compile(of, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(*arrays), arrays), torch.autograd.grad(of(*arrays), arrays), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_traced_calls_say_what_they_need(tensors: list[Any]) -> None:
    q, a, b, u, v = (t.detach() for t in tensors)
    with pytest.raises(tattn.PlanError, match="traced and its values cannot be read, so it needs a plan"):
        torch.func.vmap(lambda q: tattn.tensor_attention(q, [a, b], [u, v]))(q[None])
    planned = tattn.plan(q, [a, b], method="polynomial", tol=1e-2)
    with pytest.raises(tattn.PlanError, match=r"a promise of your own, tattn.plan\(query, keys, bound="):
        torch.func.vmap(lambda q: tattn.tensor_attention(q, [a, b], [u, v], plan=planned))(q[None])


def test_the_pullback_is_differentiable(plan: tattn.Plan, tensors: list[Any]) -> None:
    q, a, b, u, v = tensors

    def dquery(q: Any, g: Any) -> Any:
        _, pullback = tattn.tensor_attention_vjp(
            q, [a.detach(), b.detach()], [u.detach(), v.detach()], plan=plan, causal=plan.causal
        )
        return pullback(g)[0]

    grad = torch.ones(4, 2, dtype=torch.float64, device=q.device, requires_grad=True)
    assert torch.autograd.gradcheck(dquery, (q, grad))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_and_autocast(dtype: Any, device: str) -> None:
    """Within twice the error of rounding the exact answer; autocast changes nothing."""
    rng = np.random.default_rng(3)
    arrays = [
        torch.tensor(rng.uniform(-1, 1, (32, 4)), dtype=dtype, device=device, requires_grad=True) for _ in range(5)
    ]
    wide = [t.detach().double().requires_grad_() for t in arrays]
    for method in ("exact", "polynomial"):

        def of(ts: list[Any], method: str = method) -> Any:
            return tattn.tensor_attention(ts[0], ts[1:3], ts[3:], method=method)

        out, truth = of(arrays), of(wide)
        assert out.dtype == dtype
        unit = torch.finfo(dtype).eps
        assert (out.double() - truth).abs().max() <= unit * truth.abs().max() + 1e-3
        gradients = torch.autograd.grad(out.sum(), arrays)
        for g, t in zip(gradients, torch.autograd.grad(truth.sum(), wide), strict=True):
            assert g.dtype == dtype
            assert (g.double() - t).abs().max() <= 4 * unit * t.abs().max() + 1e-3
    single = [t.detach().float() for t in arrays]
    expected = tattn.tensor_attention(single[0], single[1:3], single[3:])
    with torch.autocast(device, dtype=torch.bfloat16):
        got = tattn.tensor_attention(single[0], single[1:3], single[3:])
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_float32_products_are_full_whatever_the_setting(tensors: list[Any]) -> None:
    single = [t.detach().float() for t in tensors]
    before = torch.get_float32_matmul_precision()
    expected = attend_float32(single)
    try:
        torch.set_float32_matmul_precision("medium")
        got = attend_float32(single)
        assert torch.get_float32_matmul_precision() == "medium"
        with pytest.raises(Exception, match="set_float32_matmul_precision"):
            torch._dynamo.reset()
            torch.compile(attend_float32, fullgraph=True, backend="aot_eager")(single)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got, expected)


SINGLE = tattn.plan_for(n=6, dim=3, bound=1.5, degree=5, dtype="float32")


def attend_float32(arrays: list[Any]) -> Any:
    return tattn.tensor_attention(arrays[0], arrays[1:3], arrays[3:], plan=SINGLE)


def test_a_parameter_trains() -> None:
    """Gradient descent through the polynomial method: the loss falls, and matches its own gradient."""
    rng = np.random.default_rng(4)
    query, *keys = [torch.tensor(rng.uniform(-1, 1, (64, 4))) for _ in range(3)]
    target = torch.tensor(rng.normal(size=(64, 2)))
    values = [torch.nn.Parameter(torch.tensor(rng.normal(size=(64, 2)))) for _ in range(2)]
    optimiser = torch.optim.SGD(values, lr=5.0)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = (tattn.tensor_attention(query, keys, values) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert all(math.isfinite(x) for x in losses)
    assert losses[-1] < losses[0]


def streamed(q: Any, a: Any, b: Any, u: Any, v: Any) -> Any:
    """Two halves of the rows, summarized apart, added up and read."""
    plan = PLANS["polynomial"]
    halves = [tattn.summarize([a[c], b[c]], [u[c], v[c]], plan) for c in (slice(None, 3), slice(3, None))]
    out, lse = (halves[0] + halves[1]).attend(q, return_lse=True)
    return out.sin().sum() + lse.cos().sum()


def test_summaries_differentiate_twice(tensors: list[Any]) -> None:
    assert torch.autograd.gradcheck(streamed, tensors)
    assert torch.autograd.gradgradcheck(streamed, tensors)
    plain = [t.detach() for t in tensors]
    same(streamed(*plain), loss(PLANS["polynomial"])(*plain))

    def from_sums(q: Any, *sums: Any) -> Any:
        summary = tattn.Summary(PLANS["polynomial"], sums, tuple(map(torch.zeros_like, sums)))
        return summary.attend(q, return_lse=True)

    summary = tattn.summarize(plain[1:3], plain[3:], PLANS["polynomial"])
    leaves = [s.clone().requires_grad_() for s in summary.sums]
    assert torch.autograd.gradcheck(from_sums, (tensors[0], *leaves))


def test_summaries_in_functional_transformations_and_compiled(tensors: list[Any]) -> None:
    every = tuple(range(5))
    expected = torch.autograd.grad(streamed(*tensors), tensors)
    plain = [t.detach() for t in tensors]
    for a, b in zip(torch.func.grad(streamed, every)(*plain), expected, strict=True):
        same(a, b)
    stacked = [torch.stack([t, 0.7 * t]) for t in plain]
    mapped = torch.func.vmap(torch.func.grad(streamed, every))(*stacked)
    for a, b in zip(mapped, expected, strict=True):
        same(a[0], b)
    tangents = tuple(torch.full_like(t, 0.3) for t in plain)
    _, got = torch.func.jvp(streamed, tuple(plain), tangents)
    same(got, sum((g * t).sum() for g, t in zip(expected, tangents, strict=True)))
    torch._dynamo.reset()
    compiled = torch.compile(streamed, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        same(a, b)


@pytest.mark.parametrize("call", list(CALLS))
def test_products_differentiate_as_they_are(call: str) -> None:
    of = CALLS[call][0]
    tensors = [torch.tensor(a, requires_grad=True) for a in arguments(call)]
    assert torch.autograd.gradcheck(of, tensors)
    assert torch.autograd.gradgradcheck(of, tensors)
    stacked = [torch.stack([a.detach(), 2 * a.detach()]) for a in tensors]
    mapped = torch.func.vmap(of)(*stacked)
    for i in range(2):
        same(mapped[i], of(*(s[i] for s in stacked)))


@pytest.mark.parametrize("call", list(CALLS))
def test_products_under_autocast_and_compile(call: str) -> None:
    of = CALLS[call][0]
    tensors = [torch.tensor(a, dtype=torch.float32) for a in arguments(call)]
    expected = of(*tensors)
    with torch.autocast("cpu"):
        torch.testing.assert_close(of(*tensors), expected, rtol=1e-6, atol=0)
    torch._dynamo.reset()
    compiled = torch.compile(of, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("series", ["minimax", "banded"])
def test_shapes_without_values(series: str) -> None:
    """On the meta device, forward and gradient."""
    query, *rest = (torch.empty(n, 3, device="meta", requires_grad=True) for n in (20, 19, 18, 19, 18))
    bound = {"bound": 1.0} if series == "minimax" else {}
    plan = tattn.plan_for(n=(20, 19, 18), dim=3, degree=2, series=series, **bound)
    out = tattn.tensor_attention(query, rest[:2], rest[2:], plan=plan)
    assert out.shape == (20, 3)
    gradients = torch.autograd.grad(out.sum(), [query, *rest])
    assert [g.shape for g in gradients] == [t.shape for t in (query, *rest)]


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts operations that take something from the host, or to it, where all else is on another device."""

    count = 0

    def __torch_dispatch__(self, function: Any, _: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        seen = torch.utils._pytree.tree_leaves((arguments, options, result))
        self.count += any(isinstance(x, torch.Tensor) and x.device.type == "cpu" for x in seen)
        return result


_FAR: dict[str, dict[str, Any]] = {
    "polynomial": {"method": "polynomial", "bound": 1.0},
    "norm bands": {"series": "banded"},
    "exact": {"method": "exact", "bound": 1.0},
    "causal": {"method": "polynomial", "bound": 1.0, "causal": True},
    "causal exact": {"method": "exact", "bound": 1.0, "causal": True},
}


@pytest.mark.parametrize("transformation", ["none", "grad", "vmap"])
@pytest.mark.parametrize("name", list(_FAR))
def test_tables_are_copied_to_a_device_once(name: str, transformation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a CUDA graph is captured, which no copy can be a part of."""
    monkeypatch.setattr(torch_backend._TABLES, "_held", {})
    n = 700
    plan = tattn.plan_for(n=n, dim=3, tol=1e-2, **_FAR[name])
    leading = (2,) if transformation == "vmap" else ()
    q, a, b, u, v = (torch.empty(*leading, n, 3, device="meta") for _ in range(5))

    def call(q: Any, a: Any, b: Any, u: Any, v: Any) -> Any:
        return tattn.tensor_attention(q, [a, b], [u, v], plan=plan, causal=plan.causal)

    of = {"none": call, "grad": torch.func.grad(lambda *x: call(*x).sum()), "vmap": torch.func.vmap(call)}
    counts = []
    for _ in range(2):
        with Copies() as copies:
            of[transformation](q, a, b, u, v)
            if transformation == "none":
                _, pullback = tattn.tensor_attention_vjp(q, [a, b], [u, v], plan=plan, causal=plan.causal)
                pullback(v, return_error=True)
        counts.append(copies.count)
    assert counts[0] > 0
    assert counts[1] == 0


@pytest.mark.parametrize("name", list(_FAR))
def test_kept_tables_serve_every_kind_of_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made under one transformation, mode or device context, used under another."""
    from torch._subclasses import FakeTensorMode

    plan = tattn.plan_for(n=9, dim=3, tol=1e-2, dtype="float64", **_FAR[name])
    arrays = list(torch.tensor(np.random.default_rng(0).uniform(-1, 1, (5, 9, 3))))

    def call(*x: Any) -> Any:
        return tattn.tensor_attention(x[0], list(x[1:3]), list(x[3:]), plan=plan, causal=plan.causal)

    def gradient(*x: Any) -> Any:
        x = tuple(a.clone().requires_grad_() for a in x)
        (first,) = torch.autograd.grad(call(*x).sin().sum(), x[0], create_graph=True)
        return torch.autograd.grad(first.sin().sum(), x[0])[0]

    def fake(*x: Any) -> Any:
        with FakeTensorMode() as mode:
            call(*map(mode.from_tensor, x))
        return call(*x)

    def inference(*x: Any) -> Any:
        with torch.inference_mode():
            return call(*x).clone()

    ways = {
        "plain": call,
        "gradient": gradient,
        "grad": torch.func.grad(lambda *x: call(*x).sin().sum()),
        "vmap": lambda *x: torch.func.vmap(call)(*(a[None] for a in x))[0],
        "fake": fake,
        "inference": inference,
    }
    expected = {way: of(*arrays) for way, of in ways.items()}
    for first in ways:
        monkeypatch.setattr(torch_backend._TABLES, "_held", {})
        ways[first](*arrays)
        for way in ("gradient", "grad"):
            torch.testing.assert_close(ways[way](*arrays), expected[way], rtol=0, atol=1e-12)


def test_modules_are_no_arrays() -> None:
    with pytest.raises(TypeError, match=r"query should be an array .*, got Linear"):
        tattn.tensor_attention(torch.nn.Linear(2, 2), [torch.ones(3, 2)], [torch.ones(3, 2)])


def test_compile_score_by_score(scorewise: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(Polynomial, "by_scores", BY_SCORES)
    plan = tattn.plan_for(n=5, dim=8, bound=1.0, degree=4, dtype="float64")

    def attend(q: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return tattn.tensor_attention(q, [a, b], [a + 1, b + 1], plan=plan)

    drawn = np.random.default_rng(0).uniform(-1, 1, (3, 2, 5, 8))
    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        given = [torch.tensor(x, requires_grad=True) for x in drawn]
        out = function(*given)
        out.sin().sum().backward()
        results.append((out.detach(), *(x.grad for x in given)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert scorewise
