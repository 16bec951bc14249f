"""Attention whose rows are spread over processes: `torch.distributed` groups here, Dask in `tattn.distributed.dask`.

Every process has some rows of the query and of each view, and makes its own summary. Summaries add up, so the processes
exchange only one sum, r (dv + 1) numbers for each view however many rows there are. In causal calls each process gets
the sum over the processes before it. torch is imported when a function is first used. docs/scaling.md is the guide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..backends import needed

if TYPE_CHECKING:
    from .torch import plan, tensor_attention

__all__ = ["plan", "tensor_attention"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        with needed("torch", f"tattn.distributed.{name}"):
            from . import torch

        return getattr(torch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
