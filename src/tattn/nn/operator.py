"""Attention with a plan as one operator of torch, which compilers, ``torch.export`` and ``torch.jit.trace`` take as it is.

A compiler that traced it would unroll every block of rows. As an operator it runs eagerly, in blocks and in place, at any
length. The plan travels as text, so that an exported program holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.torch import operator, transformed
from ..planning.program import ATTENTION, error_column
from ..plans import Plan


def planned_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    plan: Plan,
    text: str,
    key_masks: Sequence[Tensor | None] | None,
) -> Any:
    """`tattn.tensor_attention` with a plan that reads no values and its text: output, and errors of rows (..., n) if certified.

    No second derivatives, no functorch.
    """
    masks = [None if mask is None else mask[..., None] for mask in key_masks or [None] * len(keys)]
    out, _, kept = operator(ATTENTION, text, (query, *keys, *values, *masks))
    column = error_column(plan)
    return out, kept[..., column].detach() if kept.shape[-1] > 1 else None


def traced_whole(plan: Plan) -> bool:
    """Whether a compiler traces the call and no transformation of torch.func does, which operators do not serve."""
    # `torch.jit.trace` would keep, for all lengths, the number of bands that goes with these.
    recorded = torch.compiler.is_compiling() or (torch._C._is_tracing() and plan.series != "banded")
    return recorded and not transformed()
