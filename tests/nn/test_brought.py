"""The first minute: what a layer chooses and says, and what people bring from other layers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from conftest import Library

import tattn
from tattn.nn import AttentionConfig, from_attention_mask, from_key_padding_mask

EMBED, HEADS = 8, 2


def test_a_layer_chooses_what_pays() -> None:
    config = AttentionConfig(512, 8)
    assert (config.head_dim, config.value_dim, config.degree) == (8, 64, 4)
    assert config.plan().rank == 495
    # Fewer channels where heads have fewer, and those of the caller.
    assert (AttentionConfig(16, 4).head_dim, AttentionConfig(16, 4).value_dim) == (4, 4)
    given = AttentionConfig(512, 8, head_dim=12)
    assert (given.head_dim, given.value_dim) == (12, 64)
    uneven = AttentionConfig(6, 4, head_dim=3)
    assert (uneven.head_dim, uneven.value_dim) == (3, 3)
    # The same polynomial in both dtypes.
    assert config.plan(dtype="float64").coefficients == config.plan().coefficients


def test_a_tolerance_or_a_degree_takes_the_place_of_the_usual_degree() -> None:
    assert AttentionConfig(64, 8, tol=1e-3).plan().degree == 7
    assert AttentionConfig(64, 8, degree=3).plan().degree == 3
    for options in ({"method": "auto", "bound": 1.0}, {"method": "exact"}, {"bound": None}):
        config = AttentionConfig(64, 8, **options)  # type: ignore[arg-type]
        assert (config.degree, config.tol) == (None, 1e-3)


def test_a_plan_says_what_a_row_costs() -> None:
    config = AttentionConfig(64, 8)
    plan = config.plan()
    # 3 rows of 495 monomials and 9 columns, against keys and values of 8 channels.
    rows = round(3 * 495 * (2 * 9 + 1) / (2 * (8 + 8)))
    assert config.ordinary_rows(plan) == rows == 882
    assert "a row takes as many operations as in ordinary attention to 882 rows" in str(plan)
    assert config.ordinary_rows(config.plan(100)) == rows
    exact = AttentionConfig(64, 8, method="exact")
    assert exact.ordinary_rows(exact.plan()) is None and "ordinary" not in str(exact.plan())


def test_windows_of_a_layer() -> None:
    for method in ("exact", "polynomial", "auto"):
        config = AttentionConfig(64, 8, window=5, method=method)
        assert config.causal and config.window == (5, 5)
        assert config.plan().window == (5, 5) and config.plan().method == (
            "exact" if method == "exact" else "polynomial"
        )
    for error, message, options in (
        (ValueError, r"^window\[1\] should be at least 1, got 0", {"window": (4, 0), "method": "exact"}),
        (ValueError, "^window should have 2 entries for order 3, got 1", {"window": (4,), "method": "exact"}),
        (TypeError, "^window should be a whole number, got float", {"window": 4.0, "method": "exact"}),
    ):
        with pytest.raises(error, match=message):
            AttentionConfig(64, 8, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("window", "chosen"), [(5, (1, 1)), (4096, (1, 0)), (None, (1, 0))])
def test_the_method_is_the_cheaper_one_for_a_window(window: int | None, chosen: tuple[int, int]) -> None:
    """Of a polynomial and the exact method, for a few rows and for many."""
    from tattn.nn.config import plan_of_call, plans_of

    plans = plans_of(AttentionConfig(64, 8, method="auto", bound=1.0, tol=1e-2, causal=True, window=window), "float32")
    assert [plan.method for plan in plans] == ["polynomial", "exact"]
    assert tuple(plan_of_call(plans, (n,) * 3) for n in (10, 10**7)) == chosen


@pytest.mark.libraries("torch")
def test_a_window_is_that_of_the_function() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    options: dict[str, Any] = {"method": "exact", "bound": 1.0, "dtype": torch.float64}
    windowed = tattn.nn.TensorAttention(EMBED, HEADS, window=3, **options)
    causal = tattn.nn.TensorAttention(EMBED, HEADS, causal=True, **options)
    causal.load_state_dict(windowed.state_dict())
    x = torch.randn(2, 9, EMBED, dtype=torch.float64)
    out = windowed(x)
    for i in range(9):
        torch.testing.assert_close(out[:, i], causal(x[:, max(0, i - 2) : i + 1])[:, -1], rtol=1e-10, atol=1e-12)


@pytest.mark.libraries("torch")
def test_help_explains_every_parameter() -> None:
    pytest.importorskip("torch")

    def parameters(of: Any) -> str:
        return re.split(r"\n\s*\n\s*(?:Attributes|Raises)\n", of.__doc__.partition("Parameters\n")[2])[0]

    assert parameters(tattn.nn.TensorAttention).startswith(parameters(AttentionConfig))
    for name in AttentionConfig.__dataclass_fields__:
        assert name == "_" or f"\n    {name} : " in tattn.nn.TensorAttention.__doc__


CONSTRUCTOR = {
    "dropout": "put nn.Dropout on the output",
    "batch_first": "leave it out, rows are always",
    "kdim": r"write context_dims=\(…\)",
    "vdim": r"write context_dims=\(…\)",
    "add_bias_kv": "leave it out",
    "add_zero_attn": "leave it out",
}
CALL = {
    "attn_mask": "write causal=True in the constructor for a causal mask and key_masks",
    "key_padding_mask": r"write key_masks=tattn.nn.from_key_padding_mask\(key_padding_mask\)",
    "attention_mask": r"write key_masks=tattn.nn.from_attention_mask\(attention_mask\)",
    "is_causal": "write causal=True in the constructor",
    "need_weights": "leave it out, the call returns the output alone",
    "average_attn_weights": "leave it out",
    "key": "with one context for each view",
}


@pytest.mark.libraries("torch")
def test_what_people_bring_is_refused_with_what_to_write() -> None:
    torch = pytest.importorskip("torch")
    for name, message in CONSTRUCTOR.items():
        with pytest.raises(TypeError, match=f"^TensorAttention has no argument '{name}': {message}"):
            tattn.nn.TensorAttention(EMBED, HEADS, **{name: True})
    layer, x = tattn.nn.TensorAttention(EMBED, HEADS), torch.ones(1, 4, EMBED)
    for name, message in CALL.items():
        with pytest.raises(TypeError, match=rf"^layer\(x, contexts\) has no argument '{name}': .*{message}"):
            layer(x, **{name: None})
    with pytest.raises(TypeError, match=r"got 3 positional arguments: write layer\(x\) for layer\(x, x, x\)"):
        layer(x, x, x)
    with pytest.raises(TypeError, match=r"^TensorAttention has no argument 'heads'$"):
        tattn.nn.TensorAttention(EMBED, HEADS, heads=3)


def test_masks_of_others(library: Library) -> None:
    kept = np.array([[True, True, False], [True, False, False]])
    for given in (kept.astype("int64"), kept.astype("int32"), kept):
        np.testing.assert_array_equal(library.numpy(from_attention_mask(library.array(given))), kept)
    np.testing.assert_array_equal(library.numpy(from_key_padding_mask(library.array(~kept))), kept)
    with pytest.raises(ValueError, match=r"^mask should hold 1 = attend and 0 = not, got other numbers"):
        from_attention_mask(library.array(np.array([1, 2, 0])))
    with pytest.raises(TypeError, match=r"^mask should hold whole numbers, .*got dtype float"):
        from_attention_mask(library.array(np.zeros(3)))
    with pytest.raises(TypeError, match=r"^mask should be boolean, True = leave out, got dtype int"):
        from_key_padding_mask(library.array(np.array([1, 0])))
    with pytest.raises(TypeError, match=r"^mask should be an array"):
        from_attention_mask([1, 0])


@pytest.mark.libraries("torch")
def test_wrapped_projections() -> None:
    """Whatever stands in the place of a projection is called; no weight of it is read but for its dtype and device."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer, x = tattn.nn.TensorAttention(EMBED, HEADS), torch.randn(2, 5, EMBED)

    class LowRank(torch.nn.Module):
        """A linear map, and one of low rank that is learned beside it."""

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner.requires_grad_(False)
            self.down, self.up = torch.nn.Linear(EMBED, 2, bias=False), torch.nn.Linear(2, EMBED, bias=False)

        def forward(self, x: Any) -> Any:
            return self.inner(x) + self.up(self.down(x))

    plain = layer(x)
    layer.q_proj = LowRank(layer.q_proj)
    assert not torch.equal(layer(x), plain)
    layer(x).square().sum().backward()
    assert layer.q_proj.up.weight.grad is not None and layer.plan.rank == 70
    torch.nn.init.zeros_(layer.q_proj.up.weight)
    torch.testing.assert_close(layer(x), plain)
    layer.q_proj = torch.nn.Identity()
    with pytest.raises(TypeError, match=r"^q_proj should be a module with weights, got Identity"):
        layer(x)


@pytest.mark.libraries("torch")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch.ao")
def test_quantized_projections() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer, x = tattn.nn.TensorAttention(EMBED, HEADS).eval(), torch.randn(2, 5, EMBED)
    quantized = torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, dtype=torch.qint8)
    assert type(quantized.q_proj) is not torch.nn.Linear and quantized.plan == layer.plan
    expected = layer(x)
    assert (quantized(x) - expected).abs().max() < 0.1 * expected.abs().max()
