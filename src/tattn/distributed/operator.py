"""Sequence-parallel attention as one operator of torch, which compilers take as it is: sums over ranks included.

A compiler that traced it would unroll every block of rows. The plan travels as text, the group by its name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from ..backends.torch import BACKEND
from ..checks import PlanError, checked_masks
from ..plans import Plan, plan_text
from ..state import sums as summaries
from ..state.summary import call_of, row_gradients, summarize
from ..stored import plan_of_text
from .agreement import agree_on_backward, all_reduce, checked_group, scan
from .promise import Asked
from .shards import agreed, columns, packed, split, widened


def compiled_attention(
    given: tuple[Tensor, Any, Any, Any], asked: Asked, group: Any, check: bool
) -> tuple[Tensor, Tensor]:
    """Output and lse (..., n) of a call that is being traced, for query, keys, values and masks."""
    (query, keys, values, key_masks), plan = given, asked.plan
    if plan is None or plan.source == "data":
        raise PlanError(
            "the call is traced and its values cannot be read, so it needs a plan with a bound that you promise, "
            "plan=tattn.plan_for(..., bound=...)"
        )
    masks = list(checked_masks(key_masks, keys, "keys"))
    recording = torch.is_grad_enabled() and any(x.requires_grad for x in (*keys, *values))
    factor = plan.scale if asked.scale is None else asked.scale
    out, lse, _, _ = _forward(
        query, list(keys), list(values), masks, _text(plan), _name(group), factor, recording, check, asked.causal
    )
    return out.to(query.dtype), lse[..., 0]


def _name(group: Any) -> str:
    """What torch finds the group by."""
    # Under a compiler the group is a stand-in of which no more than the name can be asked.
    name: str = group.group_name if group is not None else checked_group(None).group_name
    return name


def _text(plan: Plan) -> str:
    return plan_text(plan)


# Asked when the call is traced.
_name._dynamo_marked_constant = True  # type: ignore[attr-defined]
_text._dynamo_marked_constant = True  # type: ignore[attr-defined]

_ARRAYS = "Tensor query, Tensor[] keys, Tensor[] values, Tensor?[] masks, str plan, str group"


@torch.library.custom_op(
    "tattn::sharded_attention",
    mutates_args=(),
    schema=f"({_ARRAYS}, float scale, bool recording, bool check, bool causal) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    query: Any, keys: Any, values: Any, masks: Any, plan: Any, group: Any, scale: Any, recording: Any, check: Any,
    causal: Any,
) -> Any:  # fmt: skip
    """Output (..., n, dv), lse and normaliser (..., n, 1), and the sums that the rank reads in one row."""
    resolved = _resolve_process_group(group)
    given = (query, list(keys), list(values), list(masks))
    made = agreed(given, Asked(scale, 1e-3, plan_of_text(plan), causal=causal), resolved, check, recording)
    local = summarize(keys, values, made, key_masks=masks)
    flat = packed(local.sums, local.rests)
    if causal:
        flat = scan(flat, "before", resolved)
        arrays = (query, *keys, *values, *split(flat, local.sums), *columns(masks))
        out, lse, normaliser = BACKEND.run(summaries.read_causal, call_of(made), arrays)
    else:
        flat = all_reduce(flat, "sum", resolved)
        out, lse, normaliser = BACKEND.run(summaries.read, call_of(made), (query, *split(flat, local.sums)))
    # In the dtype of the computation: the adjoint needs all digits.
    return out.contiguous(), lse.contiguous(), normaliser.clone(), flat.contiguous()


@_forward.register_fake
def _(query: Any, keys: Any, values: Any, masks: Any, plan: Any, *_: Any) -> Any:
    made = plan_of_text(plan)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    sums = [s.shape for s in _sums_like(keys, values, masks, made)]
    shape = (*np.broadcast_shapes(query.shape[:-2], *(s[:-2] for s in sums)), query.shape[-2])
    column = query.new_empty((*shape, 1), dtype=dtype)
    flat = query.new_empty((sum(s.numel() for s in sums),), dtype=torch.float64)
    out = query.new_empty((*shape, values[0].shape[-1]), dtype=dtype)
    return out, column, torch.empty_like(column), flat


def _sums_like(keys: Any, values: Any, masks: Any, plan: Plan) -> list[Tensor]:
    """Empty tensors in the shapes of a rank's sums, on no device."""
    dtype = torch.float64 if keys[0].dtype == torch.float64 else torch.float32
    shapes = []
    for k, v, mask in zip(keys, values, masks, strict=True):
        own = [a.shape[:-2] for a in (k, v)] + ([] if mask is None else [mask.shape[:-1]])
        shapes.append((*np.broadcast_shapes(*own), plan.rank, v.shape[-1] + 1))
    return [torch.empty(s, dtype=dtype, device="meta") for s in shapes]


@torch.library.custom_op(
    "tattn::sharded_attention_backward",
    mutates_args=(),
    schema=f"({_ARRAYS}, Tensor out, Tensor normaliser, Tensor flat, Tensor grad, Tensor grad_lse, bool recording, bool causal) -> "
    "Tensor[]",
)
def _backward(
    query: Any, keys: Any, values: Any, masks: Any, plan: Any, group: Any, out: Any, normaliser: Any, flat: Any,
    grad: Any, grad_lse: Any, recording: Any, causal: Any,
) -> Any:  # fmt: skip
    """Gradients of query, keys and values."""
    made = plan_of_text(plan)
    sums = split(flat, _sums_like(keys, values, masks, made))
    of_masks, residuals = columns(masks), (out, normaliser, grad, grad_lse)
    if causal:
        keys, values = widened(keys), widened(values)
        arrays = (query, *keys, *values, *sums, *of_masks, *residuals)
        dquery, *grads = BACKEND.run(summaries.read_causal_backward, call_of(made), arrays)
        own, dsums = grads[: 2 * len(keys)], grads[2 * len(keys) :]
    else:
        dquery, *dsums = BACKEND.run(summaries.read_backward, call_of(made), (query, *sums, *residuals))
    if not recording:
        # No rank sums.
        return [dquery.contiguous(), *(torch.zeros_like(x, dtype=query.dtype) for x in (*keys, *values))]
    resolved, flat = _resolve_process_group(group), packed(dsums)
    agree_on_backward(resolved)
    dsums = split(scan(flat, "behind", resolved) if causal else all_reduce(flat, "sum", resolved), dsums)
    pairs = [row_gradients(rows, g, made, BACKEND) for *rows, g in zip(keys, values, of_masks, dsums, strict=True)]
    dkeys, dvalues = zip(*pairs, strict=True)
    found = [*dkeys, *dvalues]
    if causal:
        found = [(g + more).to(query.dtype) for g, more in zip(found, own, strict=True)]
    return [g.contiguous() for g in (dquery, *found)]


@_backward.register_fake
def _(query: Any, keys: Any, values: Any, *_: Any) -> Any:
    return [a.new_empty(a.shape) for a in (query, *keys, *values)]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    query, keys, values, masks, ctx.plan, ctx.group, _, ctx.recording, _, ctx.causal = inputs
    ctx.views = len(keys)
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.save_for_backward(query, *keys, *values, *masks, output[0], output[2], output[3])


def _gradient(ctx: Any, grad: Tensor, grad_lse: Tensor, _: Any, __: Any) -> Any:
    query, *rest = ctx.saved_tensors
    keys, values, masks = (rest[i * ctx.views : (i + 1) * ctx.views] for i in range(3))
    grads = _backward(
        query, keys, values, masks, ctx.plan, ctx.group, *rest[-3:], grad, grad_lse.contiguous(),
        ctx.recording, ctx.causal,
    )  # fmt: skip
    # What torch expects for a list is a list where all of it are tensors, and one None otherwise.
    of_masks = None if any(mask is None for mask in masks) else [None] * ctx.views
    views = ctx.views
    return grads[0], grads[1 : views + 1], grads[views + 1 :], of_masks, *[None] * 6


_forward.register_autograd(_gradient, setup_context=_setup)
