"""A transformer block around tensor attention, and a small training run: `python examples/transformer_block.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tattn


class Block(nn.Module):
    """Pre-norm, residual: tensor attention, then an MLP.

    Parameters
    ----------
    embed_dim, num_heads : int
    expand : int
        Width of the MLP over `embed_dim`.
    dropout : float
        Of both branches' outputs; attention weights are never formed, so they cannot be dropped.
    **options
        Of `tattn.nn.TensorAttention`.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, *, expand: int = 4, dropout: float = 0.0, **options: Any
    ) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.attention = tattn.nn.TensorAttention(embed_dim, num_heads, **options)
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, expand * embed_dim), nn.GELU(), nn.Linear(expand * embed_dim, embed_dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, contexts: Any = None, *, key_masks: Any = None) -> Tensor:
        """Shapes (..., n, embed_dim) → the same; `contexts` and `key_masks` as in `tattn.nn.TensorAttention`."""
        x = x + self.dropout(self.attention(self.norm_attention(x), contexts, key_masks=key_masks))
        return x + self.dropout(self.mlp(self.norm_mlp(x)))


def batch(size: int) -> tuple[Tensor, Tensor]:
    """Sequences of 20 rows, and the product of two channels' means: a sum over all pairs of rows."""
    x = torch.randn(size, 20, 16) + torch.randn(size, 1, 16)
    mean = x.mean(1, keepdim=True)
    return x, (mean[..., :1] * mean[..., 1:2]).expand(-1, 20, -1)


def main(steps: int = 200) -> None:
    """Two blocks learn a function of all pairs of rows."""
    torch.manual_seed(0)
    net = nn.Sequential(*(Block(16, 4, bound=1.0, tol=1e-2) for _ in range(2)), nn.LayerNorm(16), nn.Linear(16, 1))
    print(net[0].attention)
    optimiser = torch.optim.AdamW(net.parameters(), lr=3e-3)
    unseen, wanted = batch(500)
    for step in range(steps + 1):
        if step % 20 == 0:
            with torch.no_grad():
                share = nn.functional.mse_loss(net(unseen), wanted) / wanted.var()
            print(f"step {step}: squared error over variance {share:.3f}")
        x, target = batch(32)
        loss = nn.functional.mse_loss(net(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        print("the same weights at 5,000 rows:", tuple(net(torch.randn(1, 5000, 16)).shape))


if __name__ == "__main__":
    main()
