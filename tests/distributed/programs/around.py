"""Run by torchrun: DistributedDataParallel, FSDP and torch.compile around a layer whose rows are spread over the ranks."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from leaving import leave
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tattn
from tattn.distributed import tensor_attention

PLANS = [tattn.plan_for(n=9, dim=3, bound=1.0, degree=4, causal=causal) for causal in (False, True)]


class Layer(nn.Module):
    """One head of dimension 3 on 5 channels; alone it sees the rows it is given, in a group those of all ranks."""

    def __init__(self, sharded: bool, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        torch.manual_seed(0)
        self.project, self.out, self.sharded = nn.Linear(5, 15), nn.Linear(3, 2), sharded

    def forward(self, x: Tensor) -> Tensor:
        q, a, b, u, v = self.project(x).tanh().chunk(5, dim=-1)
        attend = tensor_attention if self.sharded else tattn.tensor_attention
        return self.out(attend(q, [a, b], [u, v], plan=PLANS[self.causal], causal=self.causal))


def check(causal: bool) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    x, target = torch.randn(17, 5), torch.randn(17, 2)
    alone = Layer(False, causal)
    loss = ((alone(x) - target) ** 2).mean()
    loss.backward()
    expected = {name: p.grad for name, p in alone.named_parameters()}

    mine = slice(5 * rank, 5 * (rank + 1) if rank < size - 1 else 17)
    whole = DistributedDataParallel(Layer(True, causal))
    compiled = DistributedDataParallel(Layer(True, causal))
    compiled.compile(backend="aot_eager")
    sharded = Layer(True, causal)
    fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (size,)))
    order = "causal " * causal
    for name, model in ((f"{order}DDP", whole), (f"compiled {order}DDP", compiled), (f"{order}FSDP", sharded)):
        for _ in range(2):
            model.zero_grad()
            # Gradients are averaged, and the loss is a mean over the rows of all.
            own = ((model(x[mine]) - target[mine]) ** 2).sum() * size / target.numel()
            own.backward()
        total = own.detach() / size
        dist.all_reduce(total)
        torch.testing.assert_close(total, loss.detach())
        for key, p in model.named_parameters():
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            torch.testing.assert_close(
                grad, expected[key.removeprefix("module.")], rtol=1e-4, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
            )
        print(f"rank {rank}: gradients through {name} are those of one process", flush=True)


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for causal in (False, True):
        check(causal)
    leave()


if __name__ == "__main__":
    main()
