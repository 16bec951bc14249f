"""What the processes of a group have to agree on before they add anything up, and sums over them that say what went wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import PlanError
from ..plans import Plan
from ..state.checks import AGREEING

Group = Any

# What each process says of its call, in this order: a mapping of these names.
_OF_CALL = (
    "pass",
    "number of views",
    "dim",
    "dtype",
    "dv",
    "causal",
    "plan or none",
    "leading dimensions",
    "key weights",
    "decay",
    "need of gradients",
    "tol",
)


def checked_group(group: Any) -> Group:
    """The group, the default one for None; ValueError if there is none, or none with this process."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "group should be a group of torch.distributed, and none is there: call torch.distributed.init_process_group, "
            "in a program that torchrun starts"
        )
    if group is None:
        return dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group should be a ProcessGroup of torch.distributed, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError("group should have this process for a member")
    return group


def sums_may_kill(group: Group) -> bool:
    """Whether a sum of what is not of one size on all processes ends them, which no handler can prevent: that of gloo does."""
    # What NCCL sums, it sums behind our back: to look would be to wait for the device.
    return dist.get_backend(group) != "nccl"


def all_reduce(tensor: Tensor, kind: str, group: Group) -> Tensor:
    """The tensor, in place, with the sums ("sum") or largest values ("max") over all processes."""
    operation = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[kind]
    with _accompanied(group):
        dist.all_reduce(tensor, operation, group=group)
    return tensor


def scan(tensor: Tensor, side: str, group: Group) -> Tensor:
    """Sums of a flat tensor over the processes "before" this one or "behind" it, 0 over none.

    Each process adds up its share of the numbers for all of them, so that as much travels as for a sum over all.
    """
    size = dist.get_world_size(group)
    share = -(-tensor.numel() // size)
    sent = tensor.new_zeros(size, share)
    sent.view(-1)[: tensor.numel()] = tensor
    # Row p is what process p has of this one's share.
    own = exchanged(sent, group)
    ordered = own if side == "before" else own.flip(0)
    sums = torch.cat([torch.zeros_like(own[:1]), ordered[:-1].cumsum(0)])
    found = exchanged(sums if side == "before" else sums.flip(0), group)
    return found.view(-1)[: tensor.numel()]


def exchanged(tensor: Tensor, group: Group) -> Tensor:
    """Row p (processes, k) to process p, and from it the row for this one."""
    found = torch.empty_like(tensor)
    with _accompanied(group):
        dist.all_to_all_single(found, tensor.contiguous(), group=group)
    return found


@contextmanager
def _accompanied(group: Group) -> Iterator[None]:
    """RuntimeError that says whom a sum failed for."""
    try:
        yield
    except RuntimeError as found:
        raise RuntimeError(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)} is left alone in a sum over its group: another rank "
            f"has ended, or did not come within the group's time-out; the group is of no further use ({found})"
        ) from found


def facts(plan: Plan | None, of_call: Mapping[str, Any]) -> dict[str, Any]:
    """What a process says of its call, by the names above, and of its plan."""
    return {name: of_call[name] for name in _OF_CALL} | {
        f"{name} of the plan": None if plan is None else getattr(plan, name) for name in AGREEING
    }


def agree_on_backward(group: Group) -> None:
    """ValueError on every process if they are not all in a backward pass, where a sum would end them."""
    if sums_may_kill(group):
        agree(facts(None, dict.fromkeys(_OF_CALL) | {"pass": "backward"}), group)


def agree(said: Mapping[str, Any] | None, group: Group) -> None:
    """ValueError or PlanError on every process of the group if they differ in a fact, or if one has none to say.

    One maximum of some thirty numbers and their negatives: where the two do not meet, processes differ.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    names = [*_OF_CALL, *(f"{name} of the plan" for name in AGREEING)]
    numbers = [0.0] * len(names) if said is None else [_number(said[name]) for name in names]
    refused = float(0 if said is not None else 1 + rank)
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    told = torch.tensor([refused, *numbers, *(-x for x in numbers)], dtype=torch.float64, device=device)
    first, *found = all_reduce(told, "max", group).tolist()
    if said is None:
        return  # its own error says more
    if first:
        raise ValueError(f"rank {int(first) - 1} of {size} refused its arguments, and all ranks stop with it")
    for name, most, least in zip(names, found[: len(names)], found[len(names) :], strict=True):
        if most != -least:
            between = f", {-least:g} to {most:g} over all" if isinstance(said[name], Real) else ""
            error = PlanError if "plan" in name else ValueError
            raise error(f"all ranks should have the same {name}, got {said[name]} on rank {rank} of {size}{between}")


def _number(fact: Any) -> float:
    """A number that two facts share only if they are the same; for what is no number, but for one in 2^52."""
    if isinstance(fact, Real):
        return float(fact)
    return float(int.from_bytes(sha256(repr(fact).encode()).digest()[:8], "big") >> 12)
