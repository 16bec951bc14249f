"""Attention with a plan as one operator of torch, which compilers and ``torch.export`` take as it is.

A compiler that traced it would unroll every block of rows. As an operator it runs eagerly, in blocks and in place, at any
length. The plan travels as text, so that an exported program holds it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends.torch import BACKEND
from ..checks import checked_inputs
from ..methods import backward, forward, told_error
from ..methods.certificate import COLUMNS, ERROR
from ..planning.choice import Work, stated_call, work_of
from ..plans import Plan
from ..stored import plan_of_facts


def planned_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    plan: Plan,
    text: str,
    key_masks: Sequence[Tensor | None] | None,
    return_error: bool,
) -> Any:
    """`tattn.tensor_attention` with a plan that reads no values and its text; no second derivatives, no functorch."""
    given = [None] * len(keys) if key_masks is None else list(key_masks)
    none = query.new_empty(0, dtype=torch.bool)
    masks = [none if mask is None else mask for mask in given]
    out, rest = _forward(query, list(keys), list(values), masks, text, return_error)
    return (out, rest[..., _error_column(plan)].detach()) if return_error else out


def traced_whole(plan: Plan) -> bool:
    """Whether a compiler traces the call and no transformation of torch.func does, which operators do not serve."""
    # `torch.jit.trace` would keep, for all lengths, the number of bands that goes with these.
    recorded = torch.compiler.is_compiling() or (torch._C._is_tracing() and plan.series != "banded")
    return recorded and not _transformed()


def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# Asked when the call is traced.
_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _error_column(plan: Plan) -> int:
    """Where the errors of rows stand in what the operator returns besides the output: in the certificate, or behind one column."""
    return ERROR if plan.series == "banded" else 1


@lru_cache(maxsize=256)
def plan_of_text(text: str) -> Plan:
    """What `plan_text` wrote."""
    return plan_of_facts(json.loads(text))


def _work(query: Tensor, keys: Any, values: Any, masks: Any, text: str, certify: bool) -> Work:
    plan = plan_of_text(text)
    given = [None if mask.shape == (0,) else mask for mask in masks]
    inputs = checked_inputs(query, list(keys), list(values), given, (plan.causal, plan.window))
    return work_of(inputs, plan, certify)


# A mask of shape (0,) is none: `torch.jit.trace` takes no lists that may hold None.
_ARRAYS = "Tensor query, Tensor[] keys, Tensor[] values, Tensor[] masks"


@torch.library.custom_op(
    "tattn::attention", mutates_args=(), schema=f"({_ARRAYS}, str plan, bool certify) -> (Tensor, Tensor)"
)
def _forward(query: Any, keys: Any, values: Any, masks: Any, plan: Any, certify: Any) -> Any:
    """Output (..., n, dv), and what the adjoint needs (..., n, 1), or with the errors of rows, or the certificate."""
    work = _work(query, keys, values, masks, plan, certify)
    out, _, rest = BACKEND.run(forward, work.call, work.arrays)[:3]
    if certify and work.plan.series != "banded":
        (told,) = BACKEND.run(told_error, stated_call(work), work.arrays)
        rest = torch.cat([rest, told.expand(rest.shape)], dim=-1)
    return out.contiguous(), rest.contiguous()


@_forward.register_fake
def _(query: Any, keys: Any, values: Any, masks: Any, plan: Any, certify: Any) -> Any:
    leading = [a.shape[:-2] for a in (query, *keys, *values)] + [m.shape[:-1] for m in masks]
    shape = (*np.broadcast_shapes(*leading), query.shape[-2])
    columns = (COLUMNS if plan_of_text(plan).series == "banded" else 2) if certify else 1
    return query.new_empty((*shape, values[0].shape[-1])), query.new_empty((*shape, columns))


@torch.library.custom_op(
    "tattn::attention_backward",
    mutates_args=(),
    schema=f"({_ARRAYS}, str plan, bool certify, Tensor out, Tensor rest, Tensor grad) -> Tensor[]",
)
def _backward(
    query: Any, keys: Any, values: Any, masks: Any, plan: Any, certify: Any, out: Any, rest: Any, grad: Any
) -> Any:
    """Gradients of query, keys and values."""
    work = _work(query, keys, values, masks, plan, certify)
    if work.plan.series != "banded":
        rest = rest[..., :1]
    residuals = (out, rest, grad, torch.zeros_like(rest[..., :1]))
    return [g.contiguous() for g in BACKEND.run(backward, work.call, (*work.arrays, *residuals))]


@_backward.register_fake
def _(query: Any, keys: Any, values: Any, masks: Any, plan: Any, certify: Any, out: Any, rest: Any, grad: Any) -> Any:
    return [a.new_empty(a.shape) for a in (query, *keys, *values)]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    query, keys, values, masks, ctx.plan, ctx.certify = inputs
    ctx.views = len(keys)
    ctx.save_for_backward(query, *keys, *values, *masks, *output)


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> Any:
    query, *rest = ctx.saved_tensors
    keys, values, masks = (rest[i * ctx.views : (i + 1) * ctx.views] for i in range(3))
    grads = _backward(query, keys, values, masks, ctx.plan, ctx.certify, *rest[-2:], grad)
    return grads[0], grads[1 : ctx.views + 1], grads[ctx.views + 1 :], [None] * ctx.views, None, None


_forward.register_autograd(_gradient, setup_context=_setup)
