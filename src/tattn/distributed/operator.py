"""Sequence-parallel attention as one operator of torch, which compilers take as it is: sums over ranks included.

A compiler that traced it would unroll every block of rows. The plan travels as text, the group by its name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from ..arrays import times_power
from ..backends.torch import BACKEND
from ..checks import PlanError, checked_masks, checked_of_rows
from ..features.balance import over_largest, raised
from ..plans import Plan, plan_text
from ..state import sums as summaries
from ..state.summary import call_of, row_gradients, summarize
from ..stored import plan_of_text
from ..weights import as_given, joined
from .agreement import agree_on_backward, all_reduce, checked_group, scan
from .promise import Asked
from .shards import agreed, columns, over_all, packed, split, widened


def compiled_attention(
    given: tuple[Tensor, Any, Any, Any, Any], asked: Asked, group: Any, check: bool
) -> tuple[Tensor, Tensor]:
    """Output and lse (..., n) of a call that is being traced, for query, keys, values, masks and weights."""
    (query, keys, values, key_masks, key_weights), plan = given, asked.plan
    if plan is None or plan.source == "data":
        raise PlanError(
            "the call is traced and its values cannot be read, so it needs a plan with a bound that you promise, "
            "plan=tattn.plan_for(..., bound=...)"
        )
    masks = list(checked_masks(key_masks, keys, "keys"))
    weights = list(checked_of_rows("key_weights", key_weights, keys, "keys"))
    # Gradients of a list are of all of it.
    some = any(w is not None for w in weights)
    weights = [k.new_ones(k.shape[-2]) if w is None else w for k, w in zip(keys, weights, strict=True)] if some else []
    recording = torch.is_grad_enabled() and any(x.requires_grad for x in (*keys, *values, *weights))
    factor = plan.scale if asked.scale is None else asked.scale
    out, lse, *_ = _forward(
        query,
        list(keys),
        list(values),
        masks,
        weights,
        _text(plan),
        _name(group),
        factor,
        recording,
        check,
        asked.causal,
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

_ARRAYS = "Tensor query, Tensor[] keys, Tensor[] values, Tensor?[] masks, Tensor[] weights, str plan, str group"


@torch.library.custom_op(
    "tattn::sharded_attention",
    mutates_args=(),
    schema=f"({_ARRAYS}, float scale, bool recording, bool check, bool causal) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    query: Any, keys: Any, values: Any, masks: Any, weights: Any, plan: Any, group: Any, scale: Any, recording: Any,
    check: Any, causal: Any,
) -> Any:  # fmt: skip
    """Output (..., n, dv), lse and normaliser (..., n, 1); the sums that the rank reads in one row, and the powers of weights."""
    resolved = _resolve_process_group(group)
    given = (query, list(keys), list(values), list(masks), list(weights) or None)
    made = agreed(given, Asked(scale, 1e-3, plan_of_text(plan), causal=causal), resolved, check, recording)
    divided, powers = over_all(keys, columns(masks), list(weights) or [None] * len(keys), resolved)
    local = summarize(keys, values, made, key_masks=masks, key_weights=divided if powers else None)
    flat = packed(local.sums, local.rests)
    if causal:
        flat = scan(flat, "before", resolved)
        of_rows = _of_rows(keys, masks, weights, powers)
        arrays = (query, *keys, *values, *split(flat, local.sums), *of_rows)
        out, lse, normaliser = BACKEND.run(
            summaries.read_next if powers else summaries.read_causal, call_of(made), arrays
        )
    else:
        flat = all_reduce(flat, "sum", resolved)
        out, lse, normaliser = BACKEND.run(summaries.read, call_of(made), (query, *split(flat, local.sums)))
    lse = raised(lse, powers) if powers else lse
    flat_powers = packed(powers) if powers else flat.new_empty(0)
    # In the dtype of the computation: the adjoint needs all digits.
    return out.contiguous(), lse.contiguous(), normaliser.clone(), flat.contiguous(), flat_powers


def _of_rows(keys: Any, masks: Any, weights: Any, powers: Any) -> list[Tensor | None]:
    """Masks (..., n_μ, 1), or weights in their place: over 2 to the powers (..., 1, 1)."""
    of_masks = columns(masks)
    if not powers:
        return of_masks
    found: list[Tensor | None] = []
    for w, mask, k, power in zip(weights, of_masks, keys, powers, strict=True):
        rows = joined(w[..., None], mask, k, BACKEND)
        # The largest of all ranks is in the place of this power, which is all that it is asked for.
        found.append(over_largest(torch.cat([rows, BACKEND.power_of_two(power)], dim=-2), BACKEND)[0][..., :-1, :])
    return found


@_forward.register_fake
def _(query: Any, keys: Any, values: Any, masks: Any, *others: Any) -> Any:
    weights, plan, *_ = others
    made = plan_of_text(plan)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    sums = [s.shape for s in _sums_like(keys, values, masks, weights, made)]
    shape = (*np.broadcast_shapes(query.shape[:-2], *(s[:-2] for s in sums)), query.shape[-2])
    column = query.new_empty((*shape, 1), dtype=dtype)
    flat = query.new_empty((sum(s.numel() for s in sums),), dtype=torch.float64)
    out = query.new_empty((*shape, values[0].shape[-1]), dtype=dtype)
    powers = query.new_empty((sum(p.numel() for p in _powers_like(masks, weights)),), dtype=torch.float64)
    return out, column, torch.empty_like(column), flat, powers


def _powers_like(masks: Any, weights: Any) -> list[Tensor]:
    """Empty tensors in the shapes of the powers of weights, on no device."""
    leading = [
        np.broadcast_shapes(w.shape[:-1], *([] if mask is None else [mask.shape[:-1]]))
        for w, mask in zip(weights, masks, strict=False)
    ]
    return [torch.empty((*shape, 1, 1), dtype=torch.float64, device="meta") for shape in leading]


def _sums_like(keys: Any, values: Any, masks: Any, weights: Any, plan: Plan) -> list[Tensor]:
    """Empty tensors in the shapes of a rank's sums, on no device."""
    dtype = torch.float64 if keys[0].dtype == torch.float64 else torch.float32
    shapes = []
    for k, v, *rows in zip(keys, values, masks, weights or [None] * len(keys), strict=True):
        own = [a.shape[:-2] for a in (k, v)] + [x.shape[:-1] for x in rows if x is not None]
        shapes.append((*np.broadcast_shapes(*own), plan.rank, v.shape[-1] + 1))
    return [torch.empty(s, dtype=dtype, device="meta") for s in shapes]


@torch.library.custom_op(
    "tattn::sharded_attention_backward",
    mutates_args=(),
    schema=f"({_ARRAYS}, Tensor out, Tensor normaliser, Tensor flat, Tensor powers, Tensor grad, Tensor grad_lse, "
    "bool recording, bool causal) -> Tensor[]",
)
def _backward(
    query: Any, keys: Any, values: Any, masks: Any, weights: Any, plan: Any, group: Any, out: Any, normaliser: Any,
    flat: Any, powers: Any, grad: Any, grad_lse: Any, recording: Any, causal: Any,
) -> Any:  # fmt: skip
    """Gradients of query, keys, values and weights."""
    made, inputs = plan_of_text(plan), (*keys, *values, *weights)
    sums = split(flat, _sums_like(keys, values, masks, weights, made))
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    powers = [p.to(dtype) for p in split(powers, _powers_like(masks, weights))]
    of_masks, residuals = _of_rows(keys, masks, weights, powers), (out, normaliser, grad, grad_lse)
    if causal:
        keys, values = widened(keys), widened(values)
        arrays = (query, *keys, *values, *sums, *of_masks, *residuals)
        dquery, *grads = BACKEND.run(summaries.read_causal_backward, call_of(made), arrays)
        m = len(keys)
        own, dsums = [*grads[: 2 * m], *grads[3 * m :]], grads[2 * m : 3 * m]
    else:
        dquery, *dsums = BACKEND.run(summaries.read_backward, call_of(made), (query, *sums, *residuals))
    if not recording:
        # No rank sums.
        return [dquery.contiguous(), *(torch.zeros_like(x, dtype=query.dtype) for x in inputs)]
    resolved, flat = _resolve_process_group(group), packed(dsums)
    agree_on_backward(resolved)
    dsums = split(scan(flat, "behind", resolved) if causal else all_reduce(flat, "sum", resolved), dsums)
    rows = [row_gradients(rows, g, made, BACKEND) for *rows, g in zip(keys, values, of_masks, dsums, strict=True)]
    found = [g for of_views in zip(*rows, strict=True) for g in of_views]
    if causal:
        found = [g + more for g, more in zip(found, own, strict=True)]
    of_weights = [
        as_given(times_power(g, -power, BACKEND), w[..., None], BACKEND)
        for g, power, w in zip(found[2 * len(keys) :], powers, weights, strict=True)
    ]
    found = [g.to(query.dtype) for g in (*found[: 2 * len(keys)], *of_weights)]
    return [g.contiguous() for g in (dquery, *found)]


@_backward.register_fake
def _(query: Any, keys: Any, values: Any, masks: Any, weights: Any, *_: Any) -> Any:
    return [a.new_empty(a.shape) for a in (query, *keys, *values, *weights)]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    query, keys, values, masks, weights, ctx.plan, ctx.group, _, ctx.recording, _, ctx.causal = inputs
    ctx.views = len(keys)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(query, *keys, *values, *masks, *weights, output[0], *output[2:])


def _gradient(ctx: Any, grad: Tensor, grad_lse: Tensor, *_: Any) -> Any:
    query, *rest = ctx.saved_tensors
    rest, kept = rest[:-4], rest[-4:]
    keys, values, masks, weights = (rest[i * ctx.views : (i + 1) * ctx.views] for i in range(4))
    grads = _backward(
        query, keys, values, masks, weights, ctx.plan, ctx.group, *kept, grad, grad_lse.contiguous(),
        ctx.recording, ctx.causal,
    )  # fmt: skip
    # What torch expects for a list is a list where all of it are tensors, and one None otherwise.
    of_masks = None if any(mask is None for mask in masks) else [None] * ctx.views
    views = ctx.views
    of_views = [grads[1 + i * views : 1 + (i + 1) * views] for i in range(3)]
    return grads[0], *of_views[:2], of_masks, of_views[2], *[None] * 6


_forward.register_autograd(_gradient, setup_context=_setup)
