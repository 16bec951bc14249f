"""Run by torchrun on four ranks: one comes late, one ends, one ends between forward and backward; the others say so in time."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

import torch
import torch.distributed as dist

import tattn
from tattn.distributed import tensor_attention

PLANS = [tattn.plan_for(n=9, dim=3, bound=1.0, degree=4, causal=causal) for causal in (False, True)]
TIME_OUT = 2.5


def call(group: Any, **options: Any) -> torch.Tensor:
    q = torch.rand(4, 3, requires_grad=True)
    plan = PLANS[options.get("causal", False)]
    return tensor_attention(q, [q, q], [q, q], plan=plan, group=group, **options)


def left_alone(function: Any, at_most: float) -> None:
    start = monotonic()
    try:
        function()
    except RuntimeError as found:
        assert f"rank {dist.get_rank()} of" in str(found) and "is left alone in a sum over its group" in str(found), (
            found
        )
    else:
        raise AssertionError("a sum without all ranks went through")
    assert monotonic() - start < at_most, monotonic() - start


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()

    def group_of(ranks: int, seconds: float) -> Any:
        return dist.new_group(list(range(ranks)), timeout=timedelta(seconds=seconds))

    # A sum that failed leaves its group unusable.
    late, everyone, three = [group_of(4, TIME_OUT) for _ in range(3)], group_of(4, TIME_OUT), group_of(3, 4 * TIME_OUT)
    ways: tuple[dict[str, bool], ...] = ({}, {"check": False}, {"check": False, "causal": True})
    for group, options in zip(late, ways, strict=True):
        call(group, **options)
        if rank == 3:
            # Late for this group, and in time for the next, where the others wait already.
            sleep(1.5 * TIME_OUT)
        else:
            left_alone(lambda group=group, options=options: call(group, **options), 2 * TIME_OUT)
    dist.barrier()
    call(everyone)
    if rank == 3:
        print("rank 3 ends", flush=True)
        os._exit(0)
    # Who talks to it hears at once that it ended, the others when the time is out.
    left_alone(lambda: call(everyone), 2 * TIME_OUT)
    out = call(three)
    if rank == 2:
        print("rank 2 ends", flush=True)
        os._exit(0)
    left_alone(lambda: out.sum().backward(), 8 * TIME_OUT)
    print(f"rank {rank} was told of all absences", flush=True)
    sys.stdout.flush()
    os._exit(0)  # without the group's parting


if __name__ == "__main__":
    main()
