"""Training a layer whose sequence is spread over processes.

    torchrun --nproc-per-node 2 examples/sequence_parallel.py [--causal]

Each process holds some rows of one long sequence. The layer's weights are the same on all, by DistributedDataParallel; attention
sees the keys of all processes, for which summaries are summed and nothing else; with --causal, those up to its own row, for
which a process gets the sums of the processes before it. Process 0 trains alone on all rows, to compare.
"""

from __future__ import annotations

import argparse
import gc
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tattn

ROWS, WIDTH, HEAD_DIM, STEPS = 600, 16, 4, 20


class Layer(nn.Module):
    """One head of order 3. Rows are scaled to the ℓ3 ball, so that no score exceeds the bound that the plan promises."""

    def __init__(self, attend: Any, causal: bool) -> None:
        super().__init__()
        self.attend = attend
        self.plan = tattn.plan_for(
            n=ROWS, dim=HEAD_DIM, bound=2.0, scale=2.0, tol=0.05, method="polynomial", causal=causal
        )
        self.project, self.out = nn.Linear(WIDTH, 5 * HEAD_DIM), nn.Linear(HEAD_DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, width) → (rows, width)."""
        q, a, b, u, v = self.project(x).chunk(5, dim=-1)
        q, a, b = (z / (z.abs() ** 3).sum(-1, keepdim=True).pow(1 / 3).clamp(min=1e-6) for z in (q, a, b))
        return x + self.out(self.attend(q, [a, b], [u, v], plan=self.plan, causal=self.plan.causal))


def train(layer: Any, x: Tensor, target: Tensor, share: float) -> list[float]:
    """Losses of some steps: sums over these rows, over the number of all rows."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for _ in range(STEPS):
        loss = ((layer(x) - target) ** 2).sum() / (ROWS * WIDTH)
        optimizer.zero_grad()
        # Gradients are averaged over processes, each of which has the part of its own rows.
        (loss * share).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    """Train together, and alone, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--causal", action="store_true", help="a row sees the rows up to its own")
    causal = parser.parse_args().causal
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH)
    target = torch.tanh(x.roll(1, dims=0) * x.roll(7, dims=1))
    mine = slice(rank * ROWS // size, (rank + 1) * ROWS // size)

    torch.manual_seed(1)
    layer = DistributedDataParallel(Layer(tattn.distributed.tensor_attention, causal))
    losses = torch.tensor(train(layer, x[mine], target[mine], share=size))
    dist.all_reduce(losses)
    sent = layer.module.plan.rank * (HEAD_DIM + 1) * 2 * 8
    # It holds on to the group, whose threads should end before the interpreter does.
    del layer
    gc.collect()
    if rank == 0:
        torch.manual_seed(1)
        alone = torch.tensor(train(Layer(tattn.tensor_attention, causal), x, target, share=1))
        print(f"{size} processes of {ROWS // size} rows; {sent:,} bytes of summaries, however many the rows")
        print(f"loss {losses[0]:.4f} → {losses[-1]:.4f}, alone {alone[0]:.4f} → {alone[-1]:.4f}")
        assert losses[-1] < losses[0]
        torch.testing.assert_close(losses, alone, rtol=1e-4, atol=0)
        print("the same")
    # No process leaves while another is still at work.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
