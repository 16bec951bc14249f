"""Empty batches give empty results, in the shapes that a batch of problems has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import Library

import tattn

SHAPES = {
    "all": ((0,), (0,), (0,)),
    "heads": ((2, 0), (2, 0), (0,)),
    "streams": ((0, 2), (0, 1), (2,)),
    "shared keys": ((0,), (), ()),
    "shared query": ((), (0,), (1,)),
}


@pytest.mark.parametrize("case", list(SHAPES))
@pytest.mark.parametrize("options", [{}, {"method": "exact"}, {"causal": True}], ids=["auto", "exact", "causal"])
@pytest.mark.grid("jax")
def test_empty_batches(library: Library, case: str, options: dict[str, Any]) -> None:
    query, keys, values = SHAPES[case]
    arrays = [library.array(np.ones((*lead, 4, 3))) for lead in (query, keys, keys, values, values)]
    mask = library.array(np.ones((*keys, 4), dtype=bool))
    out, lse, error = tattn.tensor_attention(
        arrays[0], arrays[1:3], arrays[3:], key_masks=[mask, None], return_lse=True, return_error=True, **options
    )
    batch = np.broadcast_shapes(query, keys, values)
    assert tuple(out.shape) == (*batch, 4, 3)
    assert tuple(lse.shape) == tuple(error.shape) == (*batch, 4)
    assert library.numpy(out).dtype == np.float64


def test_empty_rows_are_refused_still(library: Library) -> None:
    rows, none = library.array(np.ones((0, 4, 3))), library.array(np.ones((0, 0, 3)))
    with pytest.raises(ValueError, match=r"^keys\[1\] should have no dimension of length 0"):
        tattn.tensor_attention(rows, [rows, none], [rows, none])


@pytest.mark.libraries("torch")
def test_empty_batches_of_a_layer_and_gradients() -> None:
    torch = pytest.importorskip("torch")
    for options in ({}, {"causal": True}, {"method": "exact"}):
        layer = tattn.nn.TensorAttention(8, 2, **options)
        x = torch.ones(0, 5, 8, requires_grad=True)
        out = layer(x, key_masks=torch.ones(0, 5, dtype=torch.bool))
        assert out.shape == (0, 5, 8)
        out.sum().backward()
        assert x.grad.shape == x.shape and all(not p.grad.any() for p in layer.parameters() if p.grad is not None)
    keys = torch.ones(4, 3, requires_grad=True)
    tattn.tensor_attention(torch.ones(0, 4, 3), [keys, keys], [keys, keys]).sum().backward()
    assert not keys.grad.any()


@pytest.mark.parametrize("name", ["key_masks", "key_weights"])
@pytest.mark.parametrize("options", [{}, {"method": "exact"}], ids=["auto", "exact"])
def test_what_makes_a_batch_of_gradients_empty_is_named(library: Library, name: str, options: dict[str, Any]) -> None:
    """Gradients of an empty batch are refused, whichever array makes it one."""
    rows = library.array(np.ones((4, 3)))
    empty = library.array(np.ones((0, 4), dtype=bool if name == "key_masks" else float))
    with pytest.raises(ValueError, match=rf"^{name}\[1\] should have no dimension of length 0, got shape \(0, 4\)"):
        tattn.tensor_attention_vjp(rows, [rows, rows], [rows, rows], **{name: [None, empty]}, **options)
