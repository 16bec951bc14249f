"""The torch layer under everything that torch does to a module."""

from __future__ import annotations

import copy
import doctest
import io
import pickle
import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_nn import CASES, EMBED, HEADS, SMALL, inputs_of, reference

import tattn

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.libraries("torch")


def module(dtype: Any = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    return tattn.nn.TensorAttention(**{"embed_dim": EMBED, "num_heads": HEADS, **SMALL, **changes}, dtype=dtype)


def drawn(*shape: int, seed: int = 0, **options: Any) -> Any:
    return torch.tensor(np.random.default_rng(seed).normal(size=shape), **{"dtype": torch.float32, **options})


@pytest.mark.parametrize("case", ["self", "order 2", "contexts, shared and learned"])
def test_first_and_second_derivatives(case: str) -> None:
    layer = module(torch.float64, **CASES[case])
    x, contexts = inputs_of(layer.config, leading=())
    tensors = [torch.tensor(a[:4], requires_grad=True) for a in (x, *(contexts or ()))]
    names = [n for n, _ in layer.named_parameters()]
    params = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def of(*given: Any) -> Any:
        x, *rest = given[len(names) :]
        arguments = (x, rest or None)
        return torch.func.functional_call(layer, dict(zip(names, given, strict=False)), arguments)

    assert torch.autograd.gradcheck(of, (*params, *tensors))
    assert torch.autograd.gradgradcheck(of, (*params, *tensors), fast_mode=True)


@pytest.mark.parametrize("compiler,case", [("aot_eager", c) for c in CASES] + [("inductor", "contexts")])
@pytest.mark.grid("torch")
def test_compile(compiler: str, case: str) -> None:
    torch._dynamo.reset()
    layer = module(torch.float64, **CASES[case])
    x, contexts = inputs_of(layer.config)
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, *(contexts or ()))]
    masks = [torch.ones(t.shape[:-1], dtype=torch.bool) for t in tensors[1:]] if contexts else None
    if masks:
        masks[0][:, -2:] = False
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    results = []
    for of in (compiled, layer):
        out = of(tensors[0], tensors[1:] or None, key_masks=masks)
        results.append([out, *torch.autograd.grad(out.sin().sum(), [*tensors, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_compile_with_lengths_that_vary() -> None:
    torch._dynamo.reset()
    layer = module()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for n in (30, 400, 9000):
        x = drawn(2, n, EMBED)
        torch.testing.assert_close(compiled(x), layer(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1


@pytest.mark.thorough
def test_compile_of_what_torch_func_transforms() -> None:
    torch._dynamo.reset()
    layer, x = module(degree=2), drawn(5, EMBED)
    of = torch.func.grad(lambda x: layer(x).sin().sum())
    torch.testing.assert_close(torch.compile(of, fullgraph=True, backend="aot_eager")(x), of(x))


def test_compile_without_a_bound() -> None:
    torch._dynamo.reset()
    layer, x = module(bound=None, degree=2), drawn(2, 40, EMBED, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for asked in (False, True):
        got, expected = (of(x, return_error=asked) for of in (compiled, layer))
        torch.testing.assert_close(got, expected)
        first = [torch.autograd.grad((o[0] if asked else o).sum(), x)[0] for o in (got, expected)]
        torch.testing.assert_close(*first)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="traced and its values cannot be read"):
        torch.compile(module(bound=None), fullgraph=True, backend="aot_eager")(x)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_compiled_layers_promise_what_plain_ones_do(method: str) -> None:
    """Nothing where values multiply to what the dtype does not hold, and gradients all the same."""
    torch._dynamo.reset()
    layer = module(method=method)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for size in (1.0, 1e-30):
        x = (drawn(2, 9, EMBED) * size).float().requires_grad_()
        single = layer.float()
        results = []
        for of in (compiled, single):
            out, error = of(x, return_error=True)
            results.append((out, error, torch.autograd.grad(out.sum(), x)[0]))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        assert not results[0][1].requires_grad
        assert (results[0][1] == torch.inf).all() == (size < 1)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    layer = module(**CASES["contexts"])
    x, contexts = inputs_of(layer.config)
    x, contexts = torch.tensor(x).float(), tuple(torch.tensor(c).float() for c in contexts)
    lengths = [torch.export.Dim(f"n{i}", min=4, max=10_000) for i in range(3)]
    shapes = {"x": {1: lengths[0]}, "contexts": tuple({1: n} for n in lengths[1:])}
    exported = torch.export.export(layer, (x, contexts), strict=strict, dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (1, 30):
        arguments = [a.repeat(1, n, 1).requires_grad_() for a in (x, *contexts)]
        got, expected = (of(arguments[0], tuple(arguments[1:])) for of in (loaded, layer))
        torch.testing.assert_close(got, expected)
        grads = [torch.autograd.grad(out.sin().sum(), arguments) for out in (got, expected)]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast() -> None:
    layer, x = module(bound=2.0, tol=1e-3), drawn(2, 9, EMBED, requires_grad=True)
    plain = layer(x)
    expected = torch.autograd.grad(plain.sin().sum(), x)[0]
    for of in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = of(x)
        assert out.dtype == torch.bfloat16
        assert (out.float() - plain).abs().max() <= 0.03 * plain.abs().max()
        got = torch.autograd.grad(out.float().sin().sum(), x)[0]
        assert (got - expected).abs().max() <= 0.1 * expected.abs().max()


def test_per_sample_gradients() -> None:
    layer, x = module(torch.float64, learn_bound=True), drawn(3, 5, EMBED, dtype=torch.float64)
    params = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(params: Any, x: Any) -> Any:
        return torch.func.functional_call(layer, params, (x,)).sin().sum()

    mapped = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
    for i in range(3):
        layer.zero_grad()
        layer(x[i]).sin().sum().backward()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(mapped[name][i], p.grad, rtol=1e-10, atol=1e-12)
    # Ensembles: weights mapped.
    stacked = {n: torch.stack([p, 0.5 * p]) for n, p in params.items()}
    both = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(stacked)
    torch.testing.assert_close(both[0], layer(x), rtol=1e-10, atol=1e-12)


def test_nothing_is_read_from_the_device() -> None:
    with torch._subclasses.FakeTensorMode():
        layer, x = module(), torch.empty(2, 50, EMBED, requires_grad=True)
        out = layer(x, key_masks=torch.empty(2, 50, dtype=torch.bool))
        assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def test_saved_copied_and_moved() -> None:
    layer, x = module(learn_bound=True), drawn(2, 9, EMBED)
    expected = layer(x)
    other = tattn.nn.TensorAttention(EMBED, HEADS, **SMALL, learn_bound=True)
    assert not torch.equal(other(x), expected)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert set(layer.state_dict()) == set(layer.config.parameter_shapes())
    empty = module(learn_bound=True, device="meta").to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), empty):
        assert torch.equal(same(x), expected)
    double = copy.deepcopy(layer).double()
    assert double.plan.dtype == "float64"
    torch.testing.assert_close(double(x.double()).float(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(double.float()(x), expected)
    with pytest.raises(RuntimeError, match="state_dict"):
        module().load_state_dict(layer.state_dict())


def test_what_float32_cannot_serve_is_said_in_time() -> None:
    options = {"bound": 4.0, "tol": 1e-3}
    for method in ("polynomial", "auto"):
        with pytest.raises(tattn.PlanError, match=r"in float32 cannot be built.*dtype float64"):
            module(**options, method=method)
        layer = module(torch.float64, **options, method=method)
    assert layer(drawn(4, EMBED, dtype=torch.float64)).shape == (4, EMBED)
    with pytest.raises(tattn.PlanError, match="in float32 cannot be built"):
        layer.float()(drawn(4, EMBED))


def test_a_learned_bound_stays_below() -> None:
    layer, x = module(learn_bound=True, bound=2.0, tol=1e-3), drawn(8, EMBED)
    for sign in (1, -1):
        layer.reset_parameters()
        optimiser = torch.optim.SGD([layer.bound_logit], lr=1e6)
        for _ in range(5):
            optimiser.zero_grad()
            (sign * layer(x).square().sum() + 1e3 * sign * layer.bound_logit.sum()).backward()
            optimiser.step()
        assert (-sign * layer.bound_logit).min() > 1e3
        share = torch.sigmoid(layer.bound_logit)
        assert ((share >= 0) & (share <= 1)).all()
        params = {n: p.detach().double().numpy() for n, p in layer.named_parameters()}
        with np.errstate(over="ignore"):
            expected, allowed = reference(layer.config, params, x.double().numpy(), None, error=layer.plan.error)
        assert (np.abs(layer(x).detach().numpy() - expected) <= allowed + 1e-5).all()


def test_it_says_what_it_is() -> None:
    text = repr(tattn.nn.TensorAttention(64, 8, learn_bound=True))
    assert "bound=2 (learned)" in text and "degree=4, rank=495, error=0.034" in text
    assert "cost of a row=ordinary attention to 882 rows" in text
    assert "decay='alibi' (learned)" in repr(module(causal=True, decay="alibi", learn_decay=True))
    assert "window=(3, 3)" in repr(module(method="exact", window=3))
    assert "planned from data in every call" in repr(module(bound=None))
    assert "degree=2, rank=10, error with the answer" in repr(module(bound=None, degree=2))
    layer = module()
    assert layer.plan == layer.config.plan() and layer.plan_for(100).lengths == (100, 100, 100)


def test_it_trains() -> None:
    """The loss falls for a target that a pair of rows decides."""
    layer, x = module(bound=2.0, degree=4, head_dim=4), drawn(16, 6, EMBED)
    target = (x.roll(1, 1) * x.roll(2, 1)).mean(1, keepdim=True).expand_as(x)
    optimiser = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0]


def test_examples_in_the_guide_and_the_docstrings() -> None:
    import tattn.nn.torch

    guide = Path(__file__).parents[2] / "docs" / "layers.md"
    for ran in (doctest.testfile(str(guide), module_relative=False), doctest.testmod(tattn.nn.torch)):
        assert ran.failed == 0 and ran.attempted > 4


def test_the_block_trains(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "examples" / "transformer_block.py"
    runpy.run_path(str(path))["main"](80)
    errors = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines() if "variance" in line]
    assert errors[0] > 0.9 and errors[-1] < 0.8


def test_derivatives_score_by_score() -> None:
    layer = module(torch.float64, degree=3)
    assert layer.plan_for(3).by_scores((3, 3, 3), 3)
    x = drawn(3, 3, EMBED, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[0, 2:] = False
    assert torch.autograd.gradcheck(lambda x: layer(x, key_masks=mask), x)
    assert torch.autograd.gradgradcheck(layer, x[:1, :3].detach().requires_grad_())
    params = dict(layer.named_parameters())

    def loss(params: Any, x: Any) -> Any:
        return torch.func.functional_call(layer, params, (x,)).sin().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x.detach())
    for i in range(3):
        layer.zero_grad()
        loss(params, x[i]).backward()
        for name, p in params.items():
            torch.testing.assert_close(each[name][i], p.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.thorough
def test_compile_score_by_score() -> None:
    layer = module(torch.float64, degree=3)
    assert layer.plan_for(3).by_scores((3, 3, 3), 3)
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x = drawn(2, 3, EMBED, dtype=torch.float64, requires_grad=True)
        out = function(x)
        out.sin().sum().backward()
        results.append((out.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


CHECKPOINTED: dict[str, dict[str, Any]] = {
    **{name: CASES[name] for name in ("self", "contexts, shared and learned", "causal")},
    "exact": {"method": "exact"},
    "banded": {"bound": None, "degree": 2},
    "planned in every call": {"bound": None},
}


@pytest.mark.parametrize("case", CHECKPOINTED)
def test_checkpoints(case: str) -> None:
    from torch.utils.checkpoint import checkpoint

    torch._dynamo.reset()
    layer = module(torch.float64, **CHECKPOINTED[case])
    x, contexts = inputs_of(layer.config)
    tensors = [torch.tensor(a) for a in (x, *(contexts or ()))]

    def attend(x: Any, *contexts: Any) -> Any:
        return layer(x, contexts or None)

    calls = [attend]
    calls += [lambda *given, kind=kind: checkpoint(attend, *given, use_reentrant=kind) for kind in (False, True)]
    if case != "planned in every call":
        calls.append(torch.compile(calls[1], backend="aot_eager", fullgraph=True))
    results = []
    for call in calls:
        layer.zero_grad()
        leaves = [t.clone().requires_grad_() for t in tensors]
        call(*leaves).sin().sum().backward()
        results.append([t.grad.clone() for t in (*leaves, *layer.parameters())])
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "case,changes",
    [
        *(case for case in CASES.items() if "decay" not in case[1]),
        ("exact", {"method": "exact"}),
        ("exact and causal", {"method": "exact", "causal": True}),
    ],
)
@pytest.mark.grid("torch")
def test_jit_trace(case: str, changes: dict[str, Any]) -> None:
    """What is recorded at one length holds at others, saved and loaded too, forward and gradient."""
    layer = module(torch.float64, **changes)
    x, contexts = (torch.tensor(a) for a in inputs_of(layer.config)[:1]), inputs_of(layer.config)[1]
    given = (*x, *([tuple(torch.tensor(c) for c in contexts)] if contexts else []))
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, given), file)
    file.seek(0)
    traced = torch.jit.load(file)
    for n, leading in ((1, 2), (40, 1), (300, 1)):
        longer = [drawn(leading, n, EMBED, dtype=torch.float64, requires_grad=True)]
        if contexts:
            longer.append(tuple(drawn(leading, n + 3, c.shape[-1], dtype=torch.float64) for c in contexts))
        results = []
        for of in (traced, layer):
            out = of(*longer)
            results.append((out, *torch.autograd.grad(out.sin().sum(), longer[0])))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_with_masks_and_what_it_refuses() -> None:
    layer, x = module().requires_grad_(False), drawn(2, 7, EMBED)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 4:] = False

    def attend(x: Any, mask: Any) -> Any:
        return layer(x, key_masks=(mask, None))

    traced = torch.jit.trace(attend, (x, mask))
    other = drawn(2, 9, EMBED, seed=1)
    for m in (torch.ones(2, 9, dtype=torch.bool), torch.arange(9).expand(2, 9) < 3):
        torch.testing.assert_close(traced(other, m), attend(other, m))
    for changes in ({"bound": None}, {"bound": None, "degree": 2}, {"causal": True, "decay": "alibi"}):
        with pytest.raises(
            TypeError, match=r"^query should have a shape of whole numbers, got one that torch.jit.trace"
        ):
            torch.jit.trace(module(**changes), x)


@pytest.mark.parametrize("case", ["self", "causal", "contexts"])
def test_dtypes_that_do_not_go_with_the_weights(case: str) -> None:
    x, contexts = inputs_of(module(**CASES[case]).config)
    x, contexts = torch.tensor(x).float(), [torch.tensor(c).float() for c in contexts or ()]
    for dtype, other in (
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float32),
    ):
        layer = module(dtype, **CASES[case])
        own, found = (str(d).rpartition(".")[2] for d in (dtype, other))
        message = rf" should have the weights' dtype {own}, got {found}$"
        with pytest.raises(TypeError, match="^x" + message):
            layer(x.to(other), [c.to(dtype) for c in contexts] or None)
        if contexts:
            with pytest.raises(TypeError, match=r"^contexts\[1\]" + message):
                layer(x.to(dtype), [contexts[0].to(dtype), contexts[1].to(other)])
    # Autocast brings narrow ones together, and float64 with none.
    layer = module(**CASES[case])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for other in (torch.bfloat16, torch.float16, torch.float32):
            assert layer(x.to(other), [c.to(other) for c in contexts] or None).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"^x should have the weights' dtype float32, got float64$"):
            layer(x.double(), contexts or None)
        wide = layer.double()
        assert wide(x.double(), [c.double() for c in contexts] or None).dtype == torch.float64
        with pytest.raises(TypeError, match=r"^x should have the weights' dtype float64, got float32$"):
            wide(x, contexts or None)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_by_name(layout: Any) -> None:
    layer, x = module(), drawn(2, 4, EMBED)
    nested = torch.nested.nested_tensor([x[0, :2], x[1]], layout=layout)
    mask = torch.nested.nested_tensor([torch.ones(2).bool(), torch.ones(4).bool()], layout=layout)
    for name, call in {
        "x": lambda: layer(nested),
        r"contexts\[0\]": lambda: layer(x, [nested, x]),
        "key_masks": lambda: layer(x, key_masks=mask),
        r"key_masks\[1\]": lambda: layer(x, key_masks=[None, mask]),
    }.items():
        with pytest.raises(TypeError, match=f"^{name} should be an array, got a nested tensor: pad"):
            call()


@pytest.mark.parametrize("n", [5, 300])
@pytest.mark.parametrize("case", ["self", "causal", "learned"])
def test_the_default_device_changes_nothing(case: str, n: int) -> None:
    layer, x = module(**CASES[case]), drawn(2, n, EMBED)
    mask = torch.ones(2, n, dtype=torch.bool)
    expected = layer(x, key_masks=mask)
    with torch.device("meta"):
        assert torch.equal(layer(x, key_masks=mask), expected)
    torch.set_default_device("meta")
    try:
        assert torch.equal(layer(x, key_masks=mask), expected)
    finally:
        torch.set_default_device(None)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.thorough
@pytest.mark.parametrize("learned", [False, True])
def test_positions_in_programs_for_any_length(learned):
    """What was traced, compiled or exported at one length turns the rows of another by their own positions."""
    layer = tattn.nn.TensorAttention(8, 2, positions="rotary", causal=True, learn_frequencies=learned)
    x, *others = (torch.randn(2, n, 8, generator=torch.Generator().manual_seed(n)) for n in (20, 9, 33))
    programs = [
        torch.jit.trace(layer, (x,)),
        torch.compile(layer, fullgraph=True, dynamic=True, backend="eager"),
        torch.export.export(layer, (x,), dynamic_shapes=({1: torch.export.Dim("n", min=2)},)).module(),
    ]
    for program in programs:
        for y in (x, *others):
            torch.testing.assert_close(program(y), layer(y), rtol=1e-5, atol=1e-6)


def test_learned_frequencies_get_gradients():
    layer = tattn.nn.TensorAttention(8, 2, positions="rotary", learn_frequencies=True, dtype=torch.float64)
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert layer.frequencies.shape == (2, 2, 2)

    def attend(frequencies):
        return torch.func.functional_call(layer, {"frequencies": frequencies}, (x,))

    assert torch.autograd.gradcheck(attend, (layer.frequencies.detach().clone().requires_grad_(),))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"positions": "rotary"},
        {"positions": "rotary", "causal": True},
        {"causal": True, "decay": "alibi", "learn_decay": True},
        {"bound": None, "degree": 2},
    ],
    ids=str,
)
def test_packed_documents(options: dict[str, Any]) -> None:
    """Each is what it is alone; positions need no start of their own, since scores depend on distances alone."""
    layer = tattn.nn.TensorAttention(8, 2, dtype=torch.float64, **options)
    offsets = torch.tensor([0, 4, 4, 9, 10, 14])
    x = torch.randn(2, 14, 8, dtype=torch.float64, requires_grad=True)
    out, errors = layer(x, offsets=offsets, return_error=True)
    documents = [slice(*pair) for pair in pairwise(offsets.tolist()) if pair[0] < pair[1]]
    alone = torch.cat([layer(x[:, rows]) for rows in documents], dim=1)
    if "degree" not in options:
        torch.testing.assert_close(out, alone, rtol=1e-9, atol=1e-9)
        grads = [
            torch.autograd.grad(y.square().sum(), (x, *layer.parameters()), retain_graph=True) for y in (out, alone)
        ]
        for got, expected in zip(*grads, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    assert errors.shape == (2, 2, 14) and errors.isfinite().all()


def test_packed_documents_and_contexts() -> None:
    layer = tattn.nn.TensorAttention(8, 2, dtype=torch.float64)
    x, a, b = (torch.randn(n, 8, dtype=torch.float64) for n in (9, 12, 7))
    offsets = [torch.tensor(o) for o in ([0, 4, 9], [0, 7, 12], [0, 1, 7])]
    first = layer(x[:4], (a[:7], b[:1]))
    torch.testing.assert_close(layer(x, (a, b), offsets=offsets)[:4], first, rtol=1e-9, atol=1e-9)
    turned = tattn.nn.TensorAttention(8, 2, positions="rotary")
    # What one message asks for, another does not refuse.
    for given in (offsets, offsets[0]):
        with pytest.raises(
            ValueError, match=r"^offsets should be None where .* contexts\[0\] has 12 rows, x 9: .* each doc"
        ):
            turned(x.float(), (a.float(), b.float()), offsets=given)
    with pytest.raises(ValueError, match=r"^offsets should be one array, .* positions='rotary', got 3 arrays"):
        turned(x.float(), offsets=offsets[:1] * 3)
    assert turned(x.float(), (x.float(),) * 2, offsets=offsets[0]).shape == (9, 8)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *(
            pytest.param(x, marks=pytest.mark.thorough)
            for x in ({"causal": True, "decay": "alibi"}, {"positions": "rotary"})
        ),
    ],
    ids=str,
)
def test_compiled_layers_take_packed_documents_in_two_graphs(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = tattn.nn.TensorAttention(8, 2, **changes)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for lengths in ([4, 9], [12, 3, 8], [5, 9, 3, 11], [1, 30, 2, 2, 2]):
        x, offsets = torch.randn(sum(lengths), 8), torch.tensor([0, *lengths]).cumsum(0)
        found = []
        for of in (compiled, layer):
            layer.zero_grad()
            of(x, offsets=offsets).square().sum().backward()
            found.append([of(x, offsets=offsets), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
        for got, expected in zip(*found, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
