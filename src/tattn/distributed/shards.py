"""What every rank does with its own rows: check them, agree on a plan with the others, pack sums into one buffer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..arrays import present
from ..backends.torch import BACKEND
from ..bounds.score_range import RangeCall, Ranges, ranges
from ..checks import Inputs, check_values, checked_finite, checked_flags, checked_inputs, checked_of_rows, true_or_false
from ..decay import check_rows_before, factors_of, is_number
from ..engines.fading import powers
from ..features.balance import over_largest
from ..operands import View
from ..planning import plan_found
from ..planning.choice import check_ranges
from ..planning.selection import Wish
from ..plans import Plan
from ..problem import Problem
from ..state.summary import Summary
from ..weights import check_weights, joined
from .agreement import Group, agree, agree_on_backward, all_reduce, exchanged, facts, sums_may_kill
from .promise import Asked, promised_plan


def agreed(
    given: tuple[Any, ...],
    asked: Asked,
    group: Group,
    check: Any = True,
    recording: bool | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of all ranks, once they are known to agree and this rank's arrays to fit.

    `given`: (query, keys, values, masks), and weights and decay if the call takes them. `recording`: whether gradients are asked
    for, where the arrays do not tell; `flags`: further options, True or False.
    """
    refused: Exception | None = None
    said = None
    try:
        check = true_or_false("check", check)
        checked_flags(**(flags or {}))
        inputs = _checked(given[:4], asked.causal, group)
        weights, decay = _checked_weights(inputs, *given[4:5]), _checked_decay(inputs, *given[5:])
        plan, number = promised_plan(inputs, asked)
        views = inputs.views
        if recording is None:
            of_decay = [x for x in decay if isinstance(x, Tensor)]
            recording = BACKEND.records((*inputs.arrays[1 : 1 + 2 * views], *weights, *of_decay))
        said = facts(
            plan,
            {
                "pass": "forward",
                "number of views": views,
                "dim": inputs.dim,
                "dtype": inputs.dtype,
                "dv": inputs.value_dim,
                "causal": inputs.order.causal,
                "plan or none": None if plan is not None else (number, asked.degree),
                "leading dimensions": _leading(inputs, alone=plan is None or plan.source == "data"),
                "key weights": tuple(None if w is None else tuple(w.shape[:-1]) for w in weights),
                "decay": tuple(tuple(x.shape) if isinstance(x, Tensor) else x for x in decay),
                "need of gradients": recording,
                "tol": None if plan is not None else asked.tol,
            },
        )
    except (TypeError, ValueError) as own:
        refused = own
    if check is not False or sums_may_kill(group):
        agree(said, group)
    if refused is not None:
        raise refused
    if plan is None or plan.source == "data":
        if plan is not None:
            inputs = inputs._replace(channels=plan.channels)
        if any(w is not None for w in weights):
            m = inputs.views
            divided, _ = over_all(inputs.operands().keys, inputs.arrays[2 * m + 1 :], weights, group)
            masks = [m if w is None else w[..., None] for m, w in zip(inputs.arrays[2 * m + 1 :], divided, strict=True)]
            inputs = inputs._replace(arrays=(*inputs.arrays[: 2 * m + 1], *masks))
        found = _ranges(inputs, number, group)
        if plan is None:
            checked_finite(found.largest, inputs.views)
            plan = plan_found(_problem(inputs, number, group), found, Wish(asked.tol, "polynomial", asked.degree))
        else:
            check_ranges(plan, found, inputs.views)
    return plan


def _leading(inputs: Inputs, alone: bool) -> tuple[tuple[int, ...], ...]:
    """Leading dimensions of every view, of which sums depend; and of each array `alone`, of which ranges do."""
    of_views = tuple(view.leading for view in inputs.operands().views)
    rows = inputs.arrays[: 1 + 2 * inputs.views] if alone else ()
    return of_views + tuple(tuple(x.shape[:-2]) for x in rows)  # type: ignore[union-attr]


def _checked(given: tuple[Any, Any, Any, Any], causal: Any, group: Group) -> Inputs:
    """The arrays of this rank."""
    query, keys, values, masks = given
    if not isinstance(query, Tensor):
        raise TypeError(f"query should be a torch tensor, got {type(query).__name__}")
    check_values(values)
    inputs = checked_inputs(query, keys, values, masks, (causal, None), rowless=True)
    rank, (n, *lengths) = dist.get_rank(group), inputs.lengths
    for i, length in enumerate(lengths):
        if inputs.order.causal and rank and length != n:
            raise ValueError(
                f"keys[{i}] should have as many rows as query, {n}, on every rank but the first where attention is causal: "
                f"the last rows of all are aligned; got {length} on rank {rank}"
            )
    return inputs


def _checked_weights(inputs: Inputs, key_weights: Any = None) -> Sequence[Tensor | None]:
    """The weights (..., n_μ) of this rank's rows of every view, or None."""
    keys = inputs.arrays[1 : 1 + inputs.views]
    weights: Sequence[Tensor | None] = checked_of_rows("key_weights", key_weights, keys, "keys")
    for i, (k, w) in enumerate(zip(keys, weights, strict=True)):
        if w is None:
            continue
        check_weights(f"key_weights[{i}]", w, f"keys[{i}]", k, BACKEND)
    return weights


def _checked_decay(inputs: Inputs, decay: Any = None) -> tuple[Tensor | float, ...]:
    """The factor of each view, () of none."""
    if decay is None:
        return ()
    check_rows_before(inputs.order.causal)
    factors_of(decay, inputs.views, inputs.arrays[0], inputs.leading, BACKEND)
    return tuple(1.0 if x is None else float(x) if is_number(x) else x for x in decay)


def over_all(
    keys: Sequence[Tensor], masks: Sequence[Tensor | None], weights: Sequence[Tensor | None], group: Group
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Weights (..., n_μ) over powers of two of the largest of all ranks, with masks (..., n_μ, 1); log2 of these (..., 1, 1).

    Values are not read: those that are no weights are NaN.
    """
    some = [i for i, w in enumerate(weights) if w is not None]
    if not some:
        return [None] * len(weights), []
    rows = [joined(weights[i][..., None], masks[i], keys[i], BACKEND) for i in some]  # type: ignore[index]
    # A rank may have no rows; what is no number is none on its own rank.
    known = [torch.nan_to_num(w.detach(), nan=0.0, posinf=0.0) for w in rows]
    tops = [torch.cat([w, w.new_zeros((*w.shape[:-2], 1, 1))], dim=-2).amax(-2, keepdim=True) for w in known]
    flat = all_reduce(torch.cat([top.reshape(-1).double() for top in tops]), "max", group)
    found: list[Tensor | None] = [None] * len(weights)
    powers = []
    for i, w, top in zip(some, rows, split(flat, tops), strict=True):
        divided, power = over_largest(torch.cat([w, top], dim=-2), BACKEND)
        found[i] = divided[..., :-1, 0].to(keys[i].dtype)
        powers.append(power)
    return found, powers


def _ranges(inputs: Inputs, scale: float, group: Group) -> Ranges:
    """The ranges of the rows of all ranks, to the bit the same on each."""

    def together(kind: str, arrays: Sequence[Tensor]) -> list[Tensor]:
        flat = torch.cat([a.reshape(-1) for a in arrays]).double()
        if kind == "max":
            # A maximum with what is no number is one or the other: which are none on some rank travels beside.
            none = torch.isnan(flat)
            flat, none = all_reduce(torch.stack([torch.where(none, -inf, flat), none.double()]), kind, group)
            flat = torch.where(none > 0, torch.nan, flat)
        else:
            flat = all_reduce(flat, kind, group)
        parts = torch.split(flat, [a.numel() for a in arrays])
        return [p.reshape(a.shape).to(a.dtype) for p, a in zip(parts, arrays, strict=True)]

    # Masks are a rank's own affair, but what they leave is counted in arrays of one shape on all.
    operands = inputs.operands(scale)
    q, rows = operands.query, (*operands.keys, *operands.values)
    shapes = [(*view.leading, view.keys.shape[-2], 1) for view in operands.views]
    seen = [
        torch.ones(shape, dtype=torch.bool, device=q.device) if mask is None else mask.expand(shape)
        for mask, shape in zip(operands.masks, shapes, strict=True)
    ]
    call = RangeCall(scale, inputs.views, together, inputs.channels)
    found = ranges(call, inputs.backend, inputs.backend.values_of((q, *rows, *seen)))
    like = inputs.arrays[0]
    ends = torch.tensor([found.bound, -found.lowest_mean, *found.sizes], dtype=torch.float64, device=like.device)  # type: ignore[union-attr]
    bound, lowest, *sizes = all_reduce(ends, "max", group).tolist()
    return found._replace(bound=bound, lowest_mean=-lowest, sizes=tuple(sizes))


def _problem(inputs: Inputs, scale: float, group: Group) -> Problem:
    """The problem with the rows of all ranks."""
    like = inputs.arrays[0]
    lengths = torch.tensor(inputs.lengths, dtype=torch.float64, device=like.device)  # type: ignore[union-attr]
    total = tuple(max(1, int(n)) for n in all_reduce(lengths, "sum", group).tolist())
    return replace(inputs.problem(scale), lengths=total)


def packed(sums: Sequence[Tensor], rests: Sequence[Tensor] = ()) -> Tensor:
    """Sums, with their rests if there are, as one row of float64."""
    wide = [s.double() for s in sums]
    if rests:
        wide = [s + r.double() for s, r in zip(wide, rests, strict=True)]
    return torch.cat([s.reshape(-1) for s in wide])


def split(flat: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors, of shapes and dtypes as in `like`, that a row of float64 holds."""
    parts = torch.split(flat, [s.numel() for s in like])
    return tuple(p.reshape(s.shape).to(s.dtype) for p, s in zip(parts, like, strict=True))


def fading_before(
    local: Summary, rows: Sequence[View], decays: Sequence[Tensor], count: int, group: Group
) -> tuple[Tensor, ...]:
    """Sums over the ranks before, of rows that count less by factors (..., 1, 1) for every row behind them.

    From a rank's own sums, which are for the last of its `count` rows. Each rank adds up its share of the numbers, as in `scan`:
    from one rank to the next they are multiplied by λ to the power of that rank's rows.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    sums = local.sums
    # Rows that have come to weigh nothing are there all the same: what does not decay says so.
    there = [s.new_zeros((*s.shape[:-2], 1, 1)) + _some(view) for s, view in zip(sums, rows, strict=True)]
    own = torch.cat([packed(sums, local.rests), packed(there)])
    factors = packed([*(d.expand_as(s) for d, s in zip(decays, sums, strict=True)), *map(torch.ones_like, there)])
    share = -(-own.numel() // size)
    nothing = own.new_zeros(size * share - own.numel())
    factor = torch.cat([factors, nothing]).view(size, share)[rank]
    sent = torch.cat([torch.cat([own, nothing]).view(size, share), own.new_full((size, 1), float(count))], dim=1)
    shares, counts = _Exchanged.apply(group, sent).split([share, 1], dim=1)  # type: ignore[no-untyped-call]
    before = [own.new_zeros(share)]
    for of_rank, rows_of_rank in zip(shares[:-1], counts[:-1], strict=True):
        before.append(powers(factor, rows_of_rank.detach(), BACKEND) * before[-1] + of_rank)
    found = _Exchanged.apply(group, torch.stack(before)).reshape(-1)[: own.numel()]  # type: ignore[no-untyped-call]
    faded = split(found, [*sums, *there])
    return tuple(_marked(s, some > 0) for s, some in zip(faded, faded[len(sums) :], strict=False))


def _marked(sums: Tensor, there: Tensor) -> Tensor:
    """Sums (..., r, k) with a number below 0 for the weight of rows that are there, (..., 1, 1), and have come to weigh nothing."""
    weight, least = sums[..., :1, -1:], torch.finfo(sums.dtype).tiny
    less = torch.where(there & (weight < least), 2 * least, 0.0).to(sums.dtype)
    return sums - torch.nn.functional.pad(less, (sums.shape[-1] - 1, 0, 0, sums.shape[-2] - 1))


def _some(view: View) -> Any:
    """Whether a view has rows that are not masked, (..., 1, 1)."""
    if view.mask is None:
        return float(view.keys.shape[-2] > 0)
    return present(view.mask, BACKEND).any(-2, keepdim=True)


class _Exchanged(torch.autograd.Function):
    """`exchanged`, and of the gradients as well."""

    @staticmethod
    def forward(group: Group, tensor: Tensor) -> Tensor:
        return exchanged(tensor, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.group, _ = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        agree_on_backward(ctx.group)
        return None, _Exchanged.apply(ctx.group, grad)  # type: ignore[no-untyped-call]


def widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """In the dtype of the computation: what has gradients from two sides adds them up before they are rounded."""
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


def columns(masks: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks (..., n_μ, 1)."""
    return [None if mask is None else mask[..., None] for mask in masks]
