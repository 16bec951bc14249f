"""A causal layer one row at a time: the numbers of the layer itself."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest

import tattn

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.libraries("torch")

EMBED, HEADS = 8, 4
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "order 2": {"order": 2},
    "shared and learned": {"num_key_heads": 2, "learn_bound": True, "value_dim": 3},
    "rotary": {"positions": "rotary", "num_key_heads": 2, "head_dim": 4},
    "rotary, exact": {"positions": "rotary", "method": "exact", "window": (3, 2)},
    "exact": {"method": "exact"},
    "window": {"method": "exact", "window": (3, 2)},
    "polynomial window": {"window": (3, 2)},
    "polynomial window, rotary": {"positions": "rotary", "window": (3, 4)},
    "window without a bound": {"method": "exact", "window": 3, "bound": None},
    "decay": {"decay": "alibi", "learn_decay": True, "num_key_heads": 2},
    "decay, rotary": {"decay": (0.9, (0.5, 0.0, 1, 0.99)), "positions": "rotary", "head_dim": 4},
    "decay, window": {"decay": 0.7, "method": "exact", "window": (3, 2)},
    "decay, polynomial window": {"decay": (0.9, (0.5, 0.0, 1, 0.99)), "window": (3, 2)},
    "auto": {"method": "auto", "bound": 1.0, "tol": 1e-2},
}


def layer_of(dtype: Any = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    return tattn.nn.TensorAttention(EMBED, HEADS, **{"causal": True, **options}, dtype=dtype)


def rows_of(*shape: int, dtype: Any = torch.float64) -> Any:
    return torch.randn(*shape, EMBED, dtype=dtype, generator=torch.Generator().manual_seed(1))


def same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_prefill_and_steps_are_the_causal_layer(case: str, batch: tuple[int, ...]) -> None:
    layer, x = layer_of(**CASES[case]), rows_of(*batch, 9)
    expected = layer(x)
    if case == "auto":
        # At these lengths the layer takes the exact method, and the state is that of the polynomial.
        expected = layer_of(bound=1.0, degree=layer.plan.degree)(x)
        _, state = layer.prefill(x[..., :4, :])
    else:
        out, state = layer.prefill(x[..., :4, :])
        same(out, expected[..., :4, :])
    size = state.nbytes
    for i in range(4, 7):
        out, state = layer.step(x[..., i : i + 1, :], state)
        same(out, expected[..., i : i + 1, :])
    out, state = layer.step(x[..., 7:, :], state)
    same(out, expected[..., 7:, :])
    assert (state.length, state.batch) == (9, batch)
    # All but a growing cache of keys and values stay as they are.
    assert (state.nbytes == size) == (case != "exact")


def test_gradients_of_factors_through_steps() -> None:
    layer, x = layer_of(**CASES["decay"]), rows_of(2, 6)
    layer(x).square().sum().backward()
    expected, layer.decay_logit.grad = layer.decay_logit.grad, None
    out, state = layer.prefill(x[:, :3])
    rest, _ = layer.step(x[:, 3:], state)
    torch.cat([out, rest], dim=1).square().sum().backward()
    assert (layer.decay_logit.grad != 0).all()
    same(layer.decay_logit.grad, expected)


def test_steps_from_nothing() -> None:
    layer, x = layer_of(), rows_of(2, 5)
    state, outs = None, []
    for i in range(5):
        out, state = layer.step(x[:, i : i + 1], state)
        outs.append(out)
    same(torch.cat(outs, dim=1), layer(x))


@pytest.mark.parametrize("case", ["default", "exact", "window", "decay", "decay, window"])
def test_streams_that_end_and_padding(case: str) -> None:
    layer, x = layer_of(**CASES[case]), rows_of(2, 6)
    masks = torch.ones(2, 6, dtype=torch.bool)
    masks[0, :2] = False
    masks[1, 4:] = False
    expected = layer(x, key_masks=masks)
    out, state = layer.prefill(x[:, :4], key_masks=masks[:, :4])
    same(out, expected[:, :4])
    for i in range(4, 6):
        out, state = layer.step(x[:, i : i + 1], state, key_masks=masks[:, i : i + 1])
        same(out, expected[:, i : i + 1])


@pytest.mark.parametrize("case", sorted(set(CASES) - {"auto"}))
def test_a_prompt_in_parts(case: str) -> None:
    """Also parts that are longer than a window, with padding and weights, and from nothing."""
    layer, x = layer_of(**CASES[case]), rows_of(2, 12)
    masks, weights = torch.ones(2, 12, dtype=torch.bool), torch.rand(2, 12, dtype=torch.float64) + 0.5
    masks[0, :2] = masks[1, 9:] = False
    expected = layer(x, key_masks=masks, key_weights=weights)
    state, start = None, 0
    for stop in (2, 3, 9, 12):
        rows = slice(start, stop)
        out, state = layer.step(x[:, rows], state, key_masks=masks[:, rows], key_weights=weights[:, rows])
        same(out, expected[:, rows])
        assert state.length == stop
        start = stop


@pytest.mark.parametrize("case", ["default", "exact", "window", "decay", "decay, window"])
def test_beams(case: str) -> None:
    layer, x = layer_of(**CASES[case]), rows_of(3, 6)
    _, state = layer.prefill(x[:, :5])
    index = torch.tensor([2, 2, 0, 1])
    chosen = state.reorder(index)
    assert chosen.batch == (4,)
    same(layer.step(x[index, 5:], chosen)[0], layer(x)[index, 5:])
    with pytest.raises(ValueError, match=r"^index should be whole numbers of shape \(k,\), got torch.float32"):
        state.reorder(torch.ones(2))
    with pytest.raises(ValueError, match=r"^reorder needs a batch"):
        layer.prefill(x[0])[1].reorder(index)


@pytest.mark.parametrize("case", ["default", "exact", "window", "decay", "decay, window"])
def test_saved_and_moved(case: str) -> None:
    layer, x = layer_of(**CASES[case]), rows_of(2, 6)
    _, state = layer.prefill(x[:, :5])
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    restored = layer.restored(torch.load(file))
    assert (restored.length, restored.batch) == (5, (2,))
    for some in (restored, state.to("cpu")):
        same(layer.step(x[:, 5:], some)[0], layer(x)[:, 5:])
    assert state.to("meta").tensors()[0].device.type == "meta"
    with pytest.raises(ValueError, match=r"^state should be on the device of x, cpu, got meta"):
        layer.step(x[:, 5:], state.to("meta"))
    # A layer that was saved as a whole steps, too.
    again = pickle.loads(pickle.dumps(layer))
    same(again.step(x[:, 5:], again.restored(state.state_dict()))[0], layer(x)[:, 5:])


def test_states_that_do_not_fit() -> None:
    layer, x = layer_of(), rows_of(2, 5)
    _, state = layer.prefill(x)
    row = x[:, :1]
    # Another of the same sizes, too: layers of one model have states of the same shape.
    for other in (layer_of(bound=1.0), layer_of(degree=3), layer_of()):
        with pytest.raises(ValueError, match=r"^state should be of this layer: .*, got one of another"):
            layer.step(row, other.prefill(x)[1])
    with pytest.raises(ValueError, match=r"^state should be of the batch of x, \(1,\), got \(2,\)"):
        layer.step(row[:1], state)
    with pytest.raises(TypeError, match=r"^state should be what prefill or step of this layer returned, got Tensor"):
        layer.step(row, x)
    saved = state.state_dict()
    with pytest.raises(ValueError, match=r"^saved should hold length and 4 tensors for this layer"):
        layer.restored({"length": saved["length"]})
    with pytest.raises(ValueError, match=r"^saved\[tensor_0\] should have shape .* for this layer"):
        layer_of(degree=3).restored(saved)
    layer.float()
    with pytest.raises(TypeError, match=r"^state should have the layer's dtype torch.float32, got torch.float64"):
        layer.step(row.float(), state)
    with pytest.raises(TypeError, match=r"^saved\[tensor_0\] should have the layer's dtype torch.float32"):
        layer.restored(saved)


def test_layers_without_a_state() -> None:
    x = rows_of(2, 5)
    for options, message in (
        ({"causal": False}, "need causal=True in the constructor"),
        ({"bound": None}, "need a bound, or method='exact'"),
        ({"context_dims": (8, 5)}, "need contexts of embed_dim"),
    ):
        for call in (layer_of(**options).prefill, layer_of(**options).step):
            with pytest.raises(ValueError, match=f"^prefill and step {message}"):
                call(x)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "changes",
    [
        {"order": 2},
        {},
        {"decay": "alibi"},
        {"positions": "rotary"},
        {"method": "exact"},
        {"method": "exact", "decay": "alibi", "positions": "rotary"},
        {"method": "exact", "bound": None},
    ],
    ids=str,
)
def test_compiled_steps_take_all_lengths_in_two_graphs(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = tattn.nn.TensorAttention(8, 2, causal=True, **changes)
    x = torch.randn(7, 8)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer.step, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected, (_, state) = layer(x), layer.prefill(x[:3])
        for i in range(3, 7):
            out, state = compiled(x[i : i + 1], state)
            torch.testing.assert_close(out, expected[i : i + 1], rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    # What it returns serves calls that are not compiled.
    assert state.length == 7
    assert layer.step(x[:1], state)[1].length == 8
