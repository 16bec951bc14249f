"""Sequence-parallel attention for torch: every rank has some rows, and one sum of summaries joins them.

    S_μ = Σ_ranks Φ(keys_μ)ᵀ [values_μ, 1]         forward: one all-reduce of all views' sums in one buffer
    dS_μ = Σ_ranks (gradient of the rank's outputs)  backward: one all-reduce of as many numbers

Where attention is causal, rows follow one another from rank to rank. Rank p then starts from what comes before it, and what it
adds is seen behind it; its own rows see one another as in a causal call of their own:

    S_μ(before p) = Σ_{ranks < p} …       forward: one scan, of as many numbers
    dS_μ(of p) = Σ_{ranks > p} …          backward: one scan from the other end

Where keys decay, a sum is multiplied by λ to the power of a rank's rows on its way past that rank.

All else is `summarize` and `Summary.attend` on a rank's own rows, and their adjoints. The buffer is float64 whatever the dtype: it
takes sums and rests as one number, and p ranks then add at most p · 2^-53 of the sums' absolute values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arrays import are_weights
from ..backends.torch import BACKEND
from ..bounds.rounding import computed_in
from ..checks import checked_flags, checked_masks, checked_of_rows
from ..decay import factors_of, is_number
from ..features.balance import raised
from ..operands import View
from ..plans import Plan
from ..state import sums as summaries
from ..state.summary import Summary, call_of, read_following, summarize
from .agreement import Group, agree_on_backward, all_reduce, checked_group, scan
from .operator import compiled_attention
from .promise import Asked
from .shards import agreed, columns, fading_before, over_all, packed, split, widened


def tensor_attention(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    group: Group = None,
    scale: float | None = None,
    tol: float = 1e-3,
    plan: Plan | None = None,
    bound: float | None = None,
    key_masks: Sequence[Tensor | None] | None = None,
    key_weights: Sequence[Tensor | None] | None = None,
    causal: bool = False,
    decay: Sequence[Tensor | float | None] | None = None,
    return_lse: bool = False,
    return_plan: bool = False,
    check: bool = True,
) -> Any:
    """`tattn.tensor_attention` where every rank of a group has some rows of the query and of each view.

    All ranks call it, and each gets the output of its own queries, which attend to the keys of all ranks.

    Parameters
    ----------
    query : tensor (..., n, d)
        This rank's rows. Ranks may have different numbers of rows in the query and in each view, also none: (..., 0,
        d).
    keys : sequence of m tensors (..., n_μ, d)
        This rank's rows of every view. The batch is the same on all ranks.
    values : sequence of m tensors (..., n_μ, dv)
    group : torch.distributed.ProcessGroup, optional
        The default group if not given.
    scale, tol
        As in `tattn.tensor_attention`; the same on all ranks.
    plan : Plan, optional
        Polynomial and not banded, the same on all ranks except for its shapes and costs: from
        ``tattn.plan_for(..., bound=...)`` or `tattn.distributed.plan`. A plan made from data is checked on the rows of
        all ranks, which takes three more small sums.
    bound : float, optional
        Instead of a plan, your promise for the rows of all ranks, as in `tattn.plan`. With neither, a certified plan is
        made from the rows of all ranks.
    key_masks : boolean tensor (..., n_μ), or sequence of m of them or None, optional
        Of this rank's rows.
    key_weights : tensor (..., n_μ), or sequence of m of them or None, optional
        Of this rank's rows, as in `tattn.tensor_attention`, in one unit on all ranks, which take one more maximum over the group.
        Values are not read: what is no weight is NaN.
    causal : bool
        Rows follow one another in the order of the ranks, and a query row sees the rows up to its own, as in one call
        of `tattn.tensor_attention` with all rows. A rank has as many rows of every view as of the query. The first rank
        may have more: the last rows are aligned. The plan must be made with ``causal=True``. There are no windows.
    decay : sequence of m tensors (...), numbers or None, optional
        As in `tattn.tensor_attention`, the same on all ranks; rows count over all of them. Values of tensors are not read: what is
        no factor is NaN. The gradient of a factor is a part of it on each rank, and the sum over the ranks is the whole. Not under
        ``torch.compile``.
    return_lse, return_plan : bool
        As in `tattn.tensor_attention`.
    check : bool
        Whether ranks first exchange dims, dtype and plan, in one maximum of about sixty numbers, and wait for it.
        Without it only the summaries are summed; if ranks then differ, results are wrong, or ranks wait until the
        group's time-out. False is for NCCL, where waiting means waiting for the device. Over gloo the exchange always
        happens, before the backward pass as well, because its sums end the processes if sizes differ.

    Returns
    -------
    tensor (..., n, dv), or a tuple of it, lse (..., n) and the plan, as asked for
        Differentiable with respect to query, keys, values, weights and factors: the gradient on each rank is that of the sum of
        all ranks' losses, with respect to its own rows. All ranks have to run the backward pass, or none.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit, by name. The other ranks then raise a ValueError that names the rank. A
        ValueError on all ranks if they differ in dims, dtype, batch, `causal`, or whether keys and values need
        gradients.
    PlanError
        On all ranks: if plans differ (it names the difference), if scores exceed the bound of the plan, or if no plan
        meets `tol`.
    RuntimeError
        If another rank has ended, or did not arrive within the group's time-out.

    Notes
    -----
    O((n + Σ n_μ) r dv) time for a rank's own rows and O(r dv) memory. The group sums 8 m r (dv + 1) bytes for each problem of the
    batch forward and as many backward, and 8 · (number of facts) bytes with `check`. None of these grows with n. Causal calls
    take the time of `tattn.tensor_attention` plus that of the summaries, and O(r dv √n) memory in the adjoint. They scan the same
    buffer instead of summing it. A rank sends no more then: each adds a share of the numbers for all; with `decay` m (numbers in
    the batch) more. The parameters of a layer around the call get, on each rank, the part of their gradient from its rows.
    DistributedDataParallel and FSDP average these parts, so multiply a loss that is a sum over rows by the number of ranks. Under
    ``torch.compile`` the call is one operator. It needs a plan with a promised bound and has no second derivatives.
    """
    given, asked = (query, keys, values, key_masks), Asked(scale, tol, plan, bound, None, causal)
    if torch.compiler.is_compiling():
        if decay is not None:
            raise ValueError("decay of rows that are spread should be None under torch.compile, got factors")
        checked_flags(check=check, return_lse=return_lse, return_plan=return_plan)
        out, lse = compiled_attention((*given, key_weights), asked, group, check)
    else:
        group = checked_group(group)
        flags = {"return_lse": return_lse, "return_plan": return_plan}
        plan = agreed((*given, key_weights, decay), asked, group, check, flags=flags)
        used = plan
        if causal:
            keys, values = widened(keys), widened(values)
            used = replace(plan, problem=replace(plan.problem, dtype=computed_in(plan.dtype)))
        masks = columns(checked_masks(key_masks, keys, "keys"))
        weights: list[Tensor | None] | None = None
        powers: list[Tensor] = []
        if key_weights is not None:
            weights, powers = over_all(keys, masks, checked_of_rows("key_weights", key_weights, keys, "keys"), group)
            masks = [m if w is None else w[..., None] for m, w in zip(masks, weights, strict=True)]
        if decay is not None:
            decay = [x if is_number(x) else widened([x])[0] for x in decay]  # type: ignore[list-item]
        local = summarize(keys, values, used, key_masks=key_masks, key_weights=weights, decay=decay)
        rows = [View(*view) for view in zip(keys, values, masks, strict=True)]
        if causal:
            out, lse = _read_causal(plan, query, rows, local, decay, group)
            out = out.to(query.dtype)
        else:
            flat = packed(local.sums, local.rests)
            sums = split(_OverRanks.apply("all", group, flat), local.sums)  # type: ignore[no-untyped-call]
            rests = tuple(torch.zeros_like(s) for s in sums)
            out, lse = Summary(plan, sums, rests).attend(query, return_lse=True)
            lse = lse[..., None]
        lse = (raised(lse, powers) if powers else lse)[..., 0]
    result = [out, *([lse] if return_lse else []), *([plan] if return_plan else [])]
    return tuple(result) if len(result) > 1 else out


def _read_causal(
    plan: Plan, query: Tensor, rows: Sequence[View], local: Summary, decay: Any, group: Group
) -> tuple[Tensor, Tensor]:
    """Output (..., n, dv) in the dtype of the computation and lse (..., n, 1) of this rank's queries, from its rows and their
    summary.
    """
    call = call_of(plan)
    if decay is not None:
        leading = np.broadcast_shapes(*(s.shape[:-2] for s in local.sums))
        decays = factors_of(decay, len(rows), rows[0].keys, leading, BACKEND)
        return read_following(call, query, rows, fading_before(local, rows, decays, query.shape[-2], group), decays)
    flat = _OverRanks.apply("before", group, packed(local.sums, local.rests))  # type: ignore[no-untyped-call]
    sums = split(flat, local.sums)
    if any(are_weights(view.mask, BACKEND) for view in rows):
        return read_following(call, query, rows, sums)
    keys, values, masks = zip(*rows, strict=True)
    functions = summaries.read_causal, summaries.read_causal_backward
    out, lse, _ = BACKEND.differentiable(*functions, call, (query, *keys, *values, *sums, *masks))
    return out, lse


def plan(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    group: Group = None,
    scale: float | None = None,
    tol: float = 1e-3,
    degree: int | None = None,
    key_masks: Sequence[Tensor | None] | None = None,
    causal: bool = False,
) -> Plan:
    """A certified plan for the rows of all ranks, the same on each: that of `tattn.plan` for all rows together.

    Parameters
    ----------
    query, keys, values, group, scale, tol, key_masks, causal
        As in `tattn.distributed.tensor_attention`; all ranks call it.
    degree : int, optional
        As in `tattn.plan`.

    Returns
    -------
    Plan
        Polynomial. Its range was bounded on the rows of all ranks.

    Raises
    ------
    PlanError
        On all ranks, if no polynomial meets `tol`.
    TypeError, ValueError, RuntimeError
        As `tattn.distributed.tensor_attention`.

    Notes
    -----
    O(n + Σ n_μ) time, and five sums over the group of O(m d) numbers.
    """
    asked = Asked(scale, tol, degree=degree, causal=causal)
    return agreed((query, keys, values, key_masks), asked, checked_group(group))


class _OverRanks(torch.autograd.Function):
    """Sums over all ranks, those before or those behind: and of the gradients over all, those behind or those before."""

    @staticmethod
    def forward(ranks: str, group: Group, flat: Tensor) -> Tensor:
        return all_reduce(flat.clone(), "sum", group) if ranks == "all" else scan(flat, ranks, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.ranks, ctx.group, _ = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor]:
        agree_on_backward(ctx.group)
        ranks = {"all": "all", "before": "behind", "behind": "before"}[ctx.ranks]
        return None, None, _OverRanks.apply(ranks, ctx.group, grad)  # type: ignore[no-untyped-call]
