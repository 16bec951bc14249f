"""torch's gradients of every kind: right, or refused."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from cases import CALLS, arguments, heavy_tailed
from reference import changed, through_features
from watching import calls_of

import tattn
from tattn.features.monomials import rank

torch = pytest.importorskip("torch")
torch_backend = pytest.importorskip("tattn.backends.torch")
pytestmark = [
    pytest.mark.libraries("torch"),
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad"),
]

PLANS = {
    "polynomial": through_features(tattn.plan_for(n=6, dim=3, bound=1.5, degree=5, dtype="float64")),
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


@pytest.mark.grid("torch")
def test_first_and_second_derivatives(plan: tattn.Plan, tensors: list[Any]) -> None:
    both = attend(plan, return_lse=True)
    assert torch.autograd.gradcheck(both, tensors)
    assert torch.autograd.gradgradcheck(both, tensors)


@pytest.mark.grid("torch")
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


# Every method, with a plan and without.
CALLED: dict[str, dict[str, Any]] = {name: {"plan": plan, "causal": plan.causal} for name, plan in PLANS.items()} | {
    "banded": {"plan": tattn.plan_for(n=6, dim=3, degree=2, bands=3, series="banded", dtype="float64")},
    "window": {"window": (3, 2), "method": "exact"},
    "unplanned": {},
    "unplanned exact": {"method": "exact"},
    "unplanned causal": {"method": "exact", "causal": True},
}


@pytest.fixture(params=list(CALLED))
def called(request: pytest.FixtureRequest) -> Callable[..., Any]:
    options = CALLED[request.param]
    return lambda q, a, b, u, v: tattn.tensor_attention(q, [a, b], [u, v], **options)


def slopes(function: Callable[..., Any], tensors: list[Any]) -> list[Any]:
    """Gradients by `backward`, which checkpoints that run backwards in themselves allow."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    function(*leaves).sin().sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(called: Callable[..., Any], tensors: list[Any], reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    def once(*arrays: Any) -> Any:
        return checkpoint(called, *arrays, use_reentrant=reentrant)

    def twice(*arrays: Any) -> Any:
        return checkpoint(lambda *inner: once(*inner).sin(), *arrays, use_reentrant=reentrant)

    same(slopes(once, tensors), slopes(called, tensors))
    same(slopes(twice, tensors), slopes(lambda *arrays: called(*arrays).sin(), tensors))


def test_second_derivatives_of_checkpoints(called: Callable[..., Any], tensors: list[Any]) -> None:
    from torch.utils.checkpoint import checkpoint

    found = []
    for of in (called, lambda *arrays: checkpoint(called, *arrays, use_reentrant=False)):
        first = torch.autograd.grad(of(*tensors).sin().sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum(g.cos().sum() for g in first), tensors))
    same(*found)


def test_what_is_saved_may_be_kept_elsewhere(called: Callable[..., Any], tensors: list[Any]) -> None:
    """In copies that know of no graph."""
    graph = torch.autograd.graph

    def kept(hooks: Any) -> Callable[..., Any]:
        def of(*arrays: Any) -> Any:
            with hooks:
                return called(*arrays)

        return of

    expected = slopes(called, tensors)
    same(slopes(kept(graph.save_on_cpu()), tensors), expected)
    copies = graph.saved_tensors_hooks(
        lambda t: t.detach().cpu().numpy(), lambda a: torch.tensor(a).to(tensors[0].device)
    )
    same(slopes(kept(copies), tensors), expected)


@pytest.mark.usefixtures("bands_at_any_length")
def test_checkpoints_of_rows_that_are_recomputed() -> None:
    from torch.utils.checkpoint import checkpoint

    call = heavy_tailed()

    def attended(*arrays: Any) -> Any:
        out, plan = tattn.tensor_attention(arrays[0], arrays[1:3], arrays[3:], return_plan=True)
        assert plan.recomputed > 0
        return out

    of = [torch.tensor(a) for a in (call.query, *call.keys, *call.values)]
    same(slopes(lambda *arrays: checkpoint(attended, *arrays, use_reentrant=False), of), slopes(attended, of))


@pytest.mark.parametrize(
    "called",
    ["unplanned causal", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("window", "unplanned exact"))],
    indirect=True,
)
def test_compile_without_a_plan(called: Callable[..., Any], tensors: list[Any]) -> None:
    """In two graphs for all lengths."""
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = torch.compile(called, fullgraph=True, backend="aot_eager")
    for repeated in (1, 2, 3):
        given = [torch.cat([x.detach()] * repeated, dim=-2).requires_grad_() for x in tensors]
        found = [[x, *torch.autograd.grad(x.sin().sum(), given)] for x in (of(*given) for of in (compiled, called))]
        for x, y in zip(*found, strict=True):
            same(x, y)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= graphs + 2


@pytest.mark.thorough
def test_compile_of_what_is_asked_of_a_plan_without_one(tensors: list[Any]) -> None:
    """The plan, and how many operations it may take, are those of the length at hand."""
    torch._dynamo.reset()
    q, a, b, u, v = tensors

    def called(q: Any, **options: Any) -> Any:
        return tattn.tensor_attention(q, [a, b], [u, v], method="exact", causal=True, **options)

    compiled = torch.compile(called, fullgraph=True, backend="eager")
    same(compiled(q, max_flops=1e9), called(q))


@pytest.mark.parametrize(
    "called,outside",
    [
        ("polynomial", True),
        *((name, False) for name in ("polynomial", "exact", "causal polynomial", "banded", "window")),
    ],
    indirect=["called"],
)
@pytest.mark.thorough
def test_compiled_checkpoints(called: Callable[..., Any], tensors: list[Any], outside: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    torch._dynamo.reset()
    if outside:
        inner = torch.compile(called, backend="aot_eager")
        of = lambda *arrays: checkpoint(inner, *arrays, use_reentrant=False)  # noqa: E731
    else:
        of = torch.compile(lambda *arrays: checkpoint(called, *arrays, use_reentrant=False), backend="aot_eager")
    same(slopes(of, tensors), slopes(called, tensors))


@pytest.mark.grid("torch")
def test_recorders_of_operations(called: Callable[..., Any], tensors: list[Any]) -> None:
    """What records operations without a compiler holds for other values."""
    from torch.fx.experimental.proxy_tensor import make_fx

    plain = [t.detach() for t in tensors]
    others = [0.5 * t.flip(0) for t in plain]
    try:
        recorded = make_fx(called)(*plain)
    except tattn.PlanError as refused:
        assert "traced and its values cannot be read" in str(refused)
        with (
            pytest.raises(tattn.PlanError, match="traced and its values cannot be read"),
            torch._subclasses.FakeTensorMode(),
        ):
            called(*(torch.empty(t.shape, dtype=t.dtype) for t in plain))
        return
    same(recorded(*others), called(*others))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.grid("torch")
def test_compile(plan: tattn.Plan, tensors: list[Any], compiler: str) -> None:
    of = loss(plan)
    torch._dynamo.reset()
    compiled = torch.compile(of, fullgraph=True, backend=compiler)
    for a, b in zip(
        torch.autograd.grad(compiled(*tensors), tensors), torch.autograd.grad(of(*tensors), tensors), strict=True
    ):
        same(a, b)


@pytest.mark.thorough
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


@pytest.fixture
def precision() -> Iterator[Callable[[], dict[tuple[str, str], str]]]:
    """What tells how every setting of torch's float32 precision was written; as at the start again afterwards."""
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    settings = [(library, kind) for library in ("cuda", "mkldnn") for kind in ("all", "matmul")]

    def written() -> dict[tuple[str, str], str]:
        found = {("generic", "all"): read("generic", "all")}
        for library, kind in settings:
            # What changes with the more general one has its value from there.
            above = ("generic" if kind == "all" else library, "all")
            seen = []
            for value in ("tf32", "ieee"):
                write(*above, value)
                seen.append(read(library, kind))
            write(*above, found[above])
            found[library, kind] = "none" if seen[0] != seen[1] else seen[0]
        return found

    before, old = written(), torch.get_float32_matmul_precision()
    yield written
    torch.set_float32_matmul_precision(old)
    for setting, value in before.items():
        write(*setting, value)


def products(function: Callable[[], Any], at_first: Callable[[], None] | None = None) -> set[str]:
    """The precisions that products of a call run with; `at_first` is called before the first of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    read = torch._C._get_fp32_precision_getter
    seen: list[str] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(operation).partition(".")[2].startswith(("mm", "bmm", "addmm", "baddbmm")):
                if at_first is not None and not seen:
                    at_first()
                seen.extend(read(library, "matmul") for library in ("cuda", "mkldnn"))
            return operation(*args, **(kwargs or {}))

    with Watching():
        function()
    assert seen
    return set(seen)


# How a caller may have set precision: of which library, of what, and to what, one after another.
WRITTEN: list[list[tuple[str, ...]]] = [
    [("generic", "all", "tf32")],
    [("generic", "all", "bf16")],
    [("cuda", "matmul", "tf32")],
    [("cuda", "all", "tf32")],
    [("mkldnn", "matmul", "tf32")],
    [("mkldnn", "matmul", "bf16")],
    [("mkldnn", "all", "bf16")],
    [("generic", "all", "tf32"), ("cuda", "all", "tf32"), ("mkldnn", "matmul", "tf32")],
    [("generic", "all", "tf32"), ("cuda", "matmul", "ieee"), ("mkldnn", "all", "bf16")],
    [("generic", "all", "ieee"), ("cuda", "matmul", "tf32")],
    [("generic", "all", "ieee")],
    [("high",)],
    [("medium",)],
    [("high",), ("generic", "all", "bf16")],
    [("medium",), ("mkldnn", "matmul", "none"), ("generic", "all", "tf32")],
    [("allow_tf32",)],
]
by_kind = pytest.mark.skipif(
    not hasattr(torch._C, "_get_fp32_precision_getter"), reason="torch before 2.9 has one setting of precision"
)


def written_as(settings: list[tuple[str, ...]]) -> None:
    for setting in settings:
        if setting == ("allow_tf32",):
            torch.backends.cuda.matmul.allow_tf32 = True
        elif len(setting) == 1:
            torch.set_float32_matmul_precision(setting[0])
        else:
            torch._C._set_fp32_precision_setter(*setting)


@by_kind
@pytest.mark.parametrize("settings", WRITTEN, ids=str)
def test_products_are_full_whatever_the_settings(
    precision: Callable[[], Any], tensors: list[Any], settings: list[tuple[str, ...]]
) -> None:
    single = [t.detach().float().requires_grad_() for t in tensors]
    expected = slopes(lambda *arrays: attend_float32(list(arrays)), single)
    written_as(settings)
    before = precision()
    found: list[Any] = []
    assert products(lambda: found.extend(slopes(lambda *arrays: attend_float32(list(arrays)), single))) <= {
        "ieee",
        "none",
    }
    assert precision() == before
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if len(settings[0]) == 1 and len(settings) == 1:
        assert torch.get_float32_matmul_precision() == settings[0][0].replace("allow_tf32", "high")


@by_kind
@pytest.mark.parametrize("settings", [WRITTEN[i] for i in (0, 2, 5, 10, 12)], ids=str)
@pytest.mark.grid("torch")
def test_compiled_calls_want_full_products(
    precision: Callable[[], Any], tensors: list[Any], settings: list[tuple[str, ...]]
) -> None:
    single = [t.detach().float() for t in tensors]
    written_as(settings)
    narrow = {torch._C._get_fp32_precision_getter(library, "matmul") for library in ("cuda", "mkldnn")} & {
        "tf32",
        "bf16",
    }
    torch._dynamo.reset()
    compiled = torch.compile(attend_float32, fullgraph=True, backend="aot_eager")
    if narrow:
        with pytest.raises(Exception, match=r"set_float32_matmul_precision.*matmul '(tf32|bf16)'"):
            compiled(single)
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(compiled(single), attend_float32(single))


@by_kind
def test_calls_that_overlap_restore_precision_once(precision: Callable[[], Any], tensors: list[Any]) -> None:
    single = [t.detach().float() for t in tensors]
    torch._C._set_fp32_precision_setter("generic", "all", "tf32")
    before = precision()
    seen: list[set[str]] = []
    here = threading.Barrier(2)

    def call(first: bool) -> None:
        def wait() -> None:
            here.wait(10)
            if not first:
                # The other has ended, and this one goes on.
                here.wait(10)

        seen.append(products(lambda: attend_float32(single), wait))
        if first:
            here.wait(10)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(call, (True, False)))
    assert seen == [{"ieee"}, {"ieee"}]
    assert precision() == before


@by_kind
def test_precision_that_is_set_meanwhile_stays(precision: Callable[[], Any], tensors: list[Any]) -> None:
    single = [t.detach().float() for t in tensors]
    torch._C._set_fp32_precision_setter("mkldnn", "matmul", "bf16")

    def meanwhile() -> None:
        torch._C._set_fp32_precision_setter("mkldnn", "matmul", "tf32")
        # A call that begins now is full nevertheless, and leaves what it found.
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(products, lambda: attend_float32(single)).result() <= {"ieee", "none"}

    products(lambda: attend_float32(single), meanwhile)
    assert precision()["mkldnn", "matmul"] == "tf32"


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


SINGLE = through_features(tattn.plan_for(n=6, dim=3, bound=1.5, degree=5, dtype="float32"))


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


@pytest.mark.thorough
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
@pytest.mark.grid("torch")
def test_tables_are_copied_to_a_device_once(name: str, transformation: str) -> None:
    """As where a CUDA graph is captured, which no copy can be a part of."""
    torch_backend.BACKEND.tables.clear()
    n = 700
    plan = through_features(tattn.plan_for(n=n, dim=3, tol=1e-2, **_FAR[name]))
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
@pytest.mark.grid("torch")
def test_kept_tables_serve_every_kind_of_call(name: str) -> None:
    """Made under one transformation, mode or device context, used under another."""
    from torch._subclasses import FakeTensorMode

    plan = through_features(tattn.plan_for(n=9, dim=3, tol=1e-2, dtype="float64", **_FAR[name]))
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
        torch_backend.BACKEND.tables.clear()
        ways[first](*arrays)
        for way in ("gradient", "grad"):
            torch.testing.assert_close(ways[way](*arrays), expected[way], rtol=0, atol=1e-12)


def test_modules_are_no_arrays() -> None:
    with pytest.raises(TypeError, match=r"query should be an array .*, got Linear"):
        tattn.tensor_attention(torch.nn.Linear(2, 2), [torch.ones(3, 2)], [torch.ones(3, 2)])


def test_compile_score_by_score() -> None:
    torch._dynamo.reset()
    plan = tattn.plan_for(n=5, dim=8, bound=1.0, degree=4, dtype="float64")
    assert plan.by_scores((5, 5, 5), 8)

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


@pytest.mark.parametrize("default", [False, True])
def test_arrays_are_made_where_those_of_the_call_are(
    called: Callable[..., Any], tensors: list[Any], default: bool
) -> None:
    """Whatever device new tensors go to by default."""
    tensors = [t.cpu() for t in tensors]
    expected = slopes(called, tensors)
    grad = torch.ones(4, 2, dtype=torch.float64)
    if default:
        torch.set_default_device("meta")
        try:
            found = slopes(called, tensors)
            bounds = tattn.tensor_attention_vjp(tensors[0], tensors[1:3], tensors[3:])[1](grad, return_error=True)[1]
        finally:
            torch.set_default_device(None)
    else:
        with torch.device("meta"):
            found = slopes(called, tensors)
            bounds = tattn.tensor_attention_vjp(tensors[0], tensors[1:3], tensors[3:])[1](grad, return_error=True)[1]
    same(found, expected)
    assert bounds[0].device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(called: Callable[..., Any], tensors: list[Any], dtype: Any) -> None:
    expected = slopes(called, tensors)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        same(slopes(called, tensors), expected)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_by_name(layout: Any) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)
    masks = torch.nested.nested_tensor([torch.ones(2).bool(), torch.ones(4).bool()], layout=layout)
    q = torch.ones(2, 4, 3)
    plan = tattn.plan_for(n=4, dim=3, bound=1.0)
    for name, call in {
        "query": lambda: tattn.tensor_attention(nested, [nested] * 2, [nested] * 2),
        r"keys\[1\]": lambda: tattn.tensor_attention(q, [q, nested], [q, q], plan=plan),
        r"values\[0\]": lambda: tattn.tensor_attention(q, [q, q], [nested, q], method="exact"),
        r"key_masks\[0\]": lambda: tattn.tensor_attention(q, [q, q], [q, q], key_masks=[masks, None]),
    }.items():
        with pytest.raises(TypeError, match=f"^{name} should be an array, got a nested tensor: pad"):
            call()
    with pytest.raises(TypeError, match=r"^keys should be a list or tuple of arrays.*a single view goes in a tuple"):
        tattn.tensor_attention(q, nested, [q, q])


def test_what_torch_has_besides_tensors_is_refused() -> None:
    q = torch.ones(4, 3)
    for other in (torch.Size([4, 3]), torch.float32, torch.nn.Linear(3, 3)):
        with pytest.raises(TypeError, match=rf"^keys\[0\] should be an array .*, got {type(other).__name__}"):
            tattn.tensor_attention(q, [other, q], [q, q])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_is_refused_for_functions(called: Callable[..., Any], tensors: list[Any]) -> None:
    """It would keep lengths, blocks of rows and what was read as constants."""
    plain = [t.detach() for t in tensors]
    for recorded in (called, lambda q, a, b, u, v: tattn.plan(q, [a, b]).degree * q):
        with pytest.raises(
            TypeError, match=r"^query should have a shape of whole numbers, got one that torch.jit.trace"
        ):
            torch.jit.trace(recorded, plain)


FUNCTION_PLANS: dict[str, Any] = {
    "polynomial": tattn.plan_for(n=60, dim=3, bound=1.0, degree=3),
    "exact": tattn.plan_for(n=60, dim=3, bound=1.0, method="exact"),
    "causal": tattn.plan_for(n=60, dim=3, bound=1.0, degree=3, causal=True),
    "window": tattn.plan_for(n=60, dim=3, bound=1.0, method="exact", window=(4, 5)),
    "banded": tattn.plan_for(n=60, dim=3, degree=2, series="banded", bands=2),
}


@pytest.mark.parametrize("name", list(FUNCTION_PLANS))
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.grid("torch")
def test_compiled_calls_take_every_length_in_two_graphs(name: str, dynamic: bool | None) -> None:
    plan = FUNCTION_PLANS[name]

    def call(q: Any, a: Any, u: Any, mask: Any) -> Any:
        return tattn.tensor_attention(
            q, [a, a], [u, u], plan=plan, causal=plan.causal, window=plan.window, key_masks=[mask, None],
            return_lse=True, return_error=True,
        )  # fmt: skip

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (30, 41, 52, 63, 74, 85, 96, 107, 118, 700):
        q, a, u = (torch.randn(2, n, 3, generator=torch.Generator().manual_seed(n)).clamp(-1, 1) for _ in range(3))
        mask = torch.arange(n) < n - 2
        results = []
        for of in (compiled, call):
            x = [t.clone().requires_grad_() for t in (q, a, u)]
            out, lse, error = of(*x, mask)
            assert not error.requires_grad
            results.append((out, lse, error, *torch.autograd.grad(out.sin().sum() + lse.sum(), x)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("sides", [3, pytest.param(1, marks=pytest.mark.thorough)])
@pytest.mark.parametrize(
    "name", ["causal", *(pytest.param(name, marks=pytest.mark.thorough) for name in FUNCTION_PLANS if name != "causal")]
)
def test_compiled_packed_calls_take_all_offsets_in_two_graphs(name: str, sides: int) -> None:
    """As many documents as there are, of query and views alike or of each their own, with masks and weights of keys."""
    plan = FUNCTION_PLANS[name]

    def call(q: Any, a: Any, u: Any, mask: Any, weights: Any, *offsets: Any) -> Any:
        return tattn.tensor_attention(
            q, [a, a], [u, u], plan=plan, causal=plan.causal, window=plan.window, key_masks=[mask, None],
            key_weights=None if name == "causal" else [None, weights],
            offsets=offsets[0] if len(offsets) == 1 else list(offsets), return_lse=True, return_error=True,
        )  # fmt: skip

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for lengths in ([12, 18], [20, 11, 9], [5, 9, 30, 21], [7, 31, 6, 40, 8, 3]):
        n, rng = sum(lengths), torch.Generator().manual_seed(sum(lengths))
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        q, a, u = (torch.randn(2, n, 3, generator=rng).clamp(-1, 1) for _ in range(3))
        mask, weights = torch.arange(n) % 5 > 0, torch.rand(n, generator=rng)
        results = []
        for of in (compiled, call):
            x = [t.clone().requires_grad_() for t in (q, a, u)]
            out, lse, error = of(*x, mask, weights, *(offsets.clone() for _ in range(sides)))
            assert not error.requires_grad
            results.append((out, lse, error, *torch.autograd.grad(out.sin().sum() + lse.sum(), x)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_compiled_packed_calls_read_offsets_when_they_run() -> None:
    """They say what does not fit then, and at once where no program will read them."""
    x, offsets = torch.rand(9, 3), torch.tensor([0, 4, 9])

    def compiled(plan: Any, pulled: bool = False, **options: Any) -> Any:
        def call(q: Any, o: Any) -> Any:
            def of(q: Any) -> Any:
                return tattn.tensor_attention(q, [x], [x], plan=plan, offsets=o, **options).sum()

            return torch.func.grad(of)(q) if pulled else of(q)

        return torch.compile(call, fullgraph=True, backend="aot_eager")

    plan = tattn.plan_for(n=9, dim=3, bound=1.0, degree=3, order=2)
    attend = compiled(plan)
    torch.testing.assert_close(
        attend(x, offsets), tattn.tensor_attention(x, [x], [x], plan=plan, offsets=offsets).sum()
    )
    with pytest.raises(ValueError, match="offsets should go from 0 to 9, the rows of query, got 0 to 8"):
        attend(x, offsets - torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="offsets should not descend, got 4 before 3"):
        compiled(plan)(x, torch.tensor([0, 4, 3, 9]))
    # The exact method needs no plan, unless something is asked of that.
    exact = compiled(None, method="exact")
    for n in (9, 12):
        given = torch.rand(n, 3)
        x = torch.rand(n, 3)
        places = torch.tensor([0, 4, n])
        expected = tattn.tensor_attention(given, [x], [x], method="exact", offsets=places).sum()
        torch.testing.assert_close(exact(given, places), expected)
    x = torch.rand(9, 3)
    for refused in (compiled(plan, pulled=True), compiled(None, method="exact", max_flops=1e9)):
        with pytest.raises(Exception, match="offsets should be numbers that are known when the call is made"):
            refused(x, offsets)
    with pytest.raises(Exception, match="offsets should hold whole numbers, got dtype float32"):
        attend(x, offsets.float())


@pytest.mark.parametrize("name", ["polynomial", "causal", "banded"])
def test_exported_calls_take_every_length_and_hold_their_plan(name: str) -> None:
    import io

    plan = FUNCTION_PLANS[name]

    class Attention(torch.nn.Module):
        def forward(self, q: Any, a: Any, u: Any) -> Any:
            return tattn.tensor_attention(q, [a, a], [u, u], plan=plan, causal=plan.causal)

    length = torch.export.Dim("n", min=4, max=10_000)
    drawn = [torch.rand(2, 20, 3) for _ in range(3)]
    exported = torch.export.export(Attention(), tuple(drawn), dynamic_shapes=[{1: length}] * 3)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (7, 500):
        given = [torch.rand(2, n, 3) for _ in range(3)]
        torch.testing.assert_close(loaded(*given), Attention()(*given))


def test_the_operator_keeps_to_its_contract() -> None:
    from tattn.backends.torch import _whole
    from tattn.planning.program import ATTENTION, written

    rng = np.random.default_rng(0)
    q, a, b, u, v = (torch.tensor(rng.uniform(-0.5, 0.5, (2, n, 3)), requires_grad=True) for n in (5, 4, 6, 4, 6))
    mask, none = torch.tensor([[True], [False], [True], [True]]), torch.ones(0, dtype=torch.bool)
    plans = [
        tattn.plan_for(n=6, dim=3, bound=1.0, degree=3, dtype="float64"),
        tattn.plan_for(n=6, dim=3, bound=1.0, method="exact", dtype="float64"),
        tattn.plan_for(n=6, dim=3, degree=2, series="banded", bands=3, dtype="float64"),
    ]
    for plan in plans:
        for certify in (False, True):
            torch.library.opcheck(_whole, ([q, a, b, u, v, mask, none], ATTENTION, written(plan, certify)))


def test_a_method_of_ones_own_is_traced_as_before() -> None:
    """No text tells of it, and another method would be another function."""
    from dataclasses import dataclass, replace

    from tattn.methods import Exact
    from tattn.planning.program import written

    @dataclass(frozen=True)
    class Half(Exact):
        def forward(self, operands: Any, certify: bool = False) -> Any:
            return super().forward(operands._replace(scale=operands.scale / 2), certify)

    plan = tattn.plan_for(n=6, dim=3, bound=1.0, method="exact", dtype="float64")
    assert written(plan, False) and not written(replace(plan, algorithm=Half()), False)


def test_gradients_that_nobody_asks_for_cost_nothing() -> None:
    """Where keys and values of a view need no gradient, the pass over their rows is left out."""
    from tattn.engines import features

    plan = PLANS["polynomial"]
    drawn = [torch.tensor(a) for a in np.random.default_rng(0).uniform(-1, 1, (5, 6, 3))]

    def gradients(asked: tuple[int, ...]) -> tuple[Any, ...]:
        tensors = [t.clone().requires_grad_(i in asked) for i, t in enumerate(drawn)]
        out = tattn.tensor_attention(tensors[0], tensors[1:3], tensors[3:], plan=plan)
        return torch.autograd.grad(out.sin().sum(), [tensors[i] for i in asked])

    every = gradients((0, 1, 2, 3, 4))
    for asked, count in (((0,), 0), ((0, 1), 1), ((1, 3), 1), ((4,), 1), ((0, 2, 3), 2), ((0, 1, 2, 3, 4), 2)):
        with calls_of(features.key_adjoint) as passes:
            found = gradients(asked)
        for i, got in zip(asked, found, strict=True):
            same(got, every[i])
        assert len(passes) == count


def test_batched_gradients(plan: tattn.Plan, tensors: list[Any]) -> None:
    """What ``is_grads_batched`` and ``jacobian(vectorize=True)`` put in: several gradients in one."""
    out, lse = attend(plan, return_lse=True)(*tensors)
    upstream = [torch.randn(3, *t.shape, dtype=t.dtype, device=t.device) for t in (out, lse)]
    batched = torch.autograd.grad((out, lse), tensors, upstream, is_grads_batched=True, retain_graph=True)
    alone = torch.autograd.grad(out, tensors, upstream[0], is_grads_batched=True, retain_graph=True)
    for k in range(3):
        of_both = torch.autograd.grad((out, lse), tensors, [g[k] for g in upstream], retain_graph=True)
        of_out = torch.autograd.grad(out, tensors, upstream[0][k], retain_graph=True)
        for found, expected in ((batched, of_both), (alone, of_out)):
            for a, b in zip(found, expected, strict=True):
                same(a[k], b)
    plain = tuple(t.detach() for t in tensors)
    jacobians = [torch.autograd.functional.jacobian(attend(plan), plain, vectorize=v) for v in (True, False)]
    for a, b in zip(*jacobians, strict=True):
        same(a, b)


def test_outputs_without_gradients_get_no_zeros() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if "zeros" in function.__name__:
                made.append(found.numel())
            return found

    made: list[int] = []
    inputs = [torch.rand(3000, 4, requires_grad=True) for _ in range(5)]
    out, lse = tattn.tensor_attention(inputs[0], inputs[1:3], inputs[3:], method="polynomial", return_lse=True)
    with Watch():
        own = [torch.autograd.grad(x.sum(), inputs, retain_graph=True, allow_unused=True) for x in (out, lse)]
        both = torch.autograd.grad(out.sum() + lse.sum(), inputs)
    assert max(made) < 3000
    for x, y, z in zip(*own, both, strict=True):
        torch.testing.assert_close(x + y, z)
