"""Attention whose rows are spread over processes: `torch.distributed` groups here, Dask in `tattn.distributed.dask`.

Every process has some rows of the query and of each view, and makes a summary of its own. Summaries add up, so one sum over all
processes is all that has to travel, r (dv + 1) numbers for each view however many rows there are; where attention is causal, the
sums over the processes before each. torch is imported when a function is first asked for. docs/scaling.md is the guide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .torch import plan, tensor_attention

__all__ = ["plan", "tensor_attention"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import torch

        return getattr(torch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
