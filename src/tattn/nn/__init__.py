"""Tensor attention as a layer with bounded scores, so that its error is known when the layer is built.

`TensorAttention` is a torch module; torch is imported when it is first used. ``import tattn.nn.jax`` has the same layer
as functions of a dict of parameters. docs/layers.md is the guide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..backends import needed
from .config import AttentionConfig
from .masks import from_attention_mask, from_key_padding_mask

if TYPE_CHECKING:
    from .serving import ServingState
    from .torch import TensorAttention

__all__ = ["AttentionConfig", "ServingState", "TensorAttention", "from_attention_mask", "from_key_padding_mask"]


def __getattr__(name: str) -> Any:
    if name == "TensorAttention":
        with needed("torch", f"tattn.nn.{name}"):
            from .torch import TensorAttention

        return TensorAttention
    if name == "ServingState":
        with needed("torch", f"tattn.nn.{name}"):
            from .serving import ServingState

        return ServingState
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
