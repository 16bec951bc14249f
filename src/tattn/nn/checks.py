"""Errors of layers: what a caller gives them, raised before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..backends import Array, Backend, backend_of
from ..checks import (
    FLOATS,
    check_device,
    check_library,
    check_mask,
    check_row_entries,
    check_shape,
    checked_array,
    checked_leading,
    checked_sequence,
)
from .config import AttentionConfig
from .heads import Counted

# What people bring from `torch.nn.MultiheadAttention`, and what to write instead.
BROUGHT_TO_LAYERS = {
    "dropout": "put nn.Dropout on the output, since weights of attention are never formed",
    "batch_first": "leave it out, rows are always (..., n, embed_dim)",
    "kdim": "write context_dims=(…), the channels of the context of each view",
    "vdim": "write context_dims=(…); keys and values of a view come from one context",
    "add_bias_kv": "leave it out, or add a row to the contexts",
    "add_zero_attn": "leave it out, or add a row of zeros to the contexts",
}
BROUGHT_TO_CALLS = {
    "attn_mask": "write causal=True in the constructor for a causal mask and key_masks=… for padding; there are no other masks",
    "key_padding_mask": "write key_masks=tattn.nn.from_key_padding_mask(key_padding_mask), True where to attend",
    "attention_mask": "write key_masks=tattn.nn.from_attention_mask(attention_mask), True where to attend",
    "is_causal": "write causal=True in the constructor",
    "need_weights": "leave it out, the call returns the output alone, since weights of attention are never formed",
    "average_attn_weights": "leave it out, weights of attention are never formed",
    "query": "write layer(x), or layer(x, contexts)",
    "key": "write layer(x, contexts) with one context for each view, such as layer(x, (memory, memory))",
    "value": "write layer(x, contexts); keys and values of a view come from one context",
}


def refuse_brought(call: str, further: Sequence[Any], named: Mapping[str, Any], hints: Mapping[str, str]) -> None:
    """TypeError for arguments that a call does not have, which says what to write for those of other layers."""
    if further:
        raise TypeError(
            f"{call} takes x and contexts, got {2 + len(further)} positional arguments: write layer(x) for layer(x, x, x), and "
            "layer(x, (context, context)) to attend from x to pairs of rows of a context"
        )
    for name in named:
        hint = f": {hints[name]}" if name in hints else ""
        raise TypeError(f"{call} has no argument {name!r}{hint}")


def checked_layer_call(
    given: tuple[Any, Any, Any, Any],
    config: AttentionConfig,
    like: Array,
    backend: Backend,
    dtypes: Sequence[str] = FLOATS,
) -> tuple[tuple[Array, ...], Counted]:
    """Contexts of a layer's call on (x, contexts, key_masks, key_weights), and masks and weights, one for each view.

    Library and device are those of the weights, `like`; `dtypes` are those that go with them.
    """
    x, contexts, *of_rows = given
    embed_dim, context_dims = config.embed_dim, config.context_dims
    views = len(context_dims)
    named = [("x", x, embed_dim)]
    if contexts is not None:
        several = checked_sequence("contexts", contexts)
        if len(several) != views:
            raise ValueError(f"contexts should be {views}, one for each view, got {len(several)}")
        named += [(f"contexts[{i}]", c, width) for i, (c, width) in enumerate(zip(several, context_dims, strict=True))]
    elif set(context_dims) != {embed_dim}:
        raise ValueError(f"contexts should be given, with {', '.join(map(str, context_dims))} channels, got None")
    for name, a, width in named:
        check_library(name, a, backend, like="the weights")
        dtype = backend.dtype_name(a.dtype)
        if dtype not in FLOATS:
            raise TypeError(f"{name} should have a dtype of {', '.join(FLOATS)}, got {dtype}")
        if dtype not in dtypes:
            raise TypeError(f"{name} should have the weights' dtype {backend.dtype_name(like.dtype)}, got {dtype}")
        check_device(name, a, like, backend, like="the weights")
        # A batch may be empty.
        if a.ndim < 2 or 0 in tuple(a.shape[-2:]):
            check_shape(name, a)
        if a.shape[-1] != width:
            raise ValueError(f"{name} should have {width} channels, got shape {tuple(a.shape)}")
    attended = (x,) * views if contexts is None else tuple(contexts)
    leading = [(name, a) for name, a, _ in named]
    found: list[tuple[Any, ...] | None] = []
    for what, check, rows in zip(("key_masks", "key_weights"), (check_mask, _check_weights), of_rows, strict=True):
        if rows is None:
            found.append(None)
            continue
        alone = not isinstance(rows, (list, tuple)) and backend_of(rows) is not None
        if alone and contexts is not None:
            raise TypeError(f"{what} should be a list or tuple of arrays, one for each context, got a single one")
        each = (rows,) * views if alone else checked_sequence(what, rows)
        if len(each) != views:
            raise ValueError(f"{what} should have one entry for each of the {views} views, got {len(each)}")
        for i, (array, a) in enumerate(zip(each, attended, strict=True)):
            if array is not None:
                name = what if alone else f"{what}[{i}]"
                check(name, array, "x" if contexts is None else f"contexts[{i}]", a, like, backend)
                leading.append((name, array[..., None]))
        found.append(each)
    checked_leading(leading)
    return attended, Counted(*found)


def _check_weights(name: str, weights: Any, of: str, rows: Any, like: Array, backend: Backend) -> None:
    """`check_mask` for weights, of any floating dtype."""
    check_library(name, weights, backend, like="the weights of the layer")
    dtype = backend.dtype_name(weights.dtype)
    if dtype not in FLOATS:
        raise TypeError(f"{name} should have a dtype of {', '.join(FLOATS)}, got {dtype}")
    check_row_entries(name, weights, of, rows)
    check_device(name, weights, like, backend, like="the layer")


def check_offsets(offsets: Any, config: AttentionConfig, x: Array, contexts: Sequence[Array]) -> None:
    """ValueError for offsets where scores depend on positions, which count the rows of all documents, and documents begin at
    other positions in `x` and the contexts.
    """
    if offsets is None or not config.positions:
        return
    for i, context in enumerate(contexts):
        if context.shape[-2] != x.shape[-2]:
            raise ValueError(
                f"offsets should be None where the layer has positions={config.positions!r} and contexts[{i}] has "
                f"{context.shape[-2]} rows, x {x.shape[-2]}: positions count the rows of all documents, so call the layer for "
                "each document"
            )
    if isinstance(offsets, (list, tuple)):
        raise ValueError(
            f"offsets should be one array, for x and all contexts, where the layer has positions={config.positions!r}, got "
            f"{len(offsets)} arrays: documents may begin at other positions in each"
        )


def check_served(config: AttentionConfig) -> None:
    """ValueError unless a layer goes on row by row: what rows leave behind does not depend on those that follow."""
    if not config.causal:
        raise ValueError("prefill and step need causal=True in the constructor, got a layer that sees all rows")
    if set(config.context_dims) != {config.embed_dim}:
        raise ValueError(f"prefill and step need contexts of embed_dim, got context_dims={config.context_dims}")
    if config.method != "exact" and config.bound is None:
        raise ValueError("prefill and step need a bound, or method='exact', got bound=None")


def checked_parameters(params: Any, shapes: Mapping[str, tuple[int, ...]], backend: Backend) -> None:
    """A dict of floating arrays of a library with just these names and shapes."""
    if not isinstance(params, dict):
        raise TypeError(f"params should be a dict of arrays, got {type(params).__name__}")
    for name, shape in shapes.items():
        if name not in params:
            raise ValueError(f"params should have {name!r}, got {', '.join(map(repr, params))}")
        found = checked_array(f"params[{name!r}]", params[name])
        if found is not backend:
            raise TypeError(f"params[{name!r}] should be an array of {backend.name}, got one of {found.name}")
        dtype = backend.dtype_name(params[name].dtype)
        if dtype not in FLOATS:
            raise TypeError(f"params[{name!r}] should have a dtype of {', '.join(FLOATS)}, got {dtype}")
        if tuple(params[name].shape) != shape:
            raise ValueError(f"params[{name!r}] should have shape {shape}, got {tuple(params[name].shape)}")
    for name in params:
        if name not in shapes:
            raise ValueError(f"params should have nothing but {', '.join(map(repr, shapes))}, got {name!r}")
