"""Attention to pairs in place of `nn.MultiheadAttention`, in a small encoder of characters that fills in what is masked.

The text is the reference that ships with Python (`pydoc_data.topics`). `python -m examples.drop_in` trains the same encoder with
both and measures loss, time and memory, also at lengths where n² and n³ hurt, and writes tables, plots and a page into
docs/examples; with --quick it takes a minute, learns nothing, and writes into build/examples.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

import tattn
from evidence.plots import panels, style
from evidence.tables import Table, column, distinct, markdown, seconds, where
from tattn.plans import si

from . import shared
from .transformer_block import Block

NAME = "drop_in"
EMBED, HEADS, LAYERS, ROWS = 64, 8, 2, 256
MASKED = 0.15


class Softmax(nn.Module):
    """`nn.MultiheadAttention` with the call of `tattn.nn.TensorAttention`."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)

    def forward(self, x: Tensor, contexts: None = None, *, key_masks: None = None) -> Tensor:
        """(..., n, embed_dim) → the same."""
        return self.attention(x, x, x, need_weights=False)[0]


ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    "nn.MultiheadAttention": lambda: Softmax(EMBED, HEADS),
    "pairs, bound 1, degree 2": lambda: tattn.nn.TensorAttention(EMBED, HEADS, bound=1.0, degree=2),
    "single rows, bound 1, degree 2": lambda: tattn.nn.TensorAttention(EMBED, HEADS, order=2, bound=1.0, degree=2),
}
# Each in a process of its own, for the memory that the operating system counts.
LAYERS_AT_LENGTH = {
    "nn.MultiheadAttention": ATTENTIONS["nn.MultiheadAttention"],
    "pairs, bound 1, degree 2": lambda: tattn.nn.TensorAttention(EMBED, HEADS, bound=1.0, degree=2),
    "pairs, bound 1, degree 4": lambda: tattn.nn.TensorAttention(EMBED, HEADS, bound=1.0, degree=4),
}


class Encoder(nn.Module):
    """Characters and their places, blocks, a guess for every place."""

    def __init__(self, characters: int, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(characters + 1, EMBED), nn.Embedding(ROWS, EMBED)
        self.blocks = nn.ModuleList(Block(EMBED, HEADS, degree=2) for _ in range(LAYERS))
        for block in self.blocks:
            block.attention = attention()
        self.norm, self.guess = nn.LayerNorm(EMBED), nn.Linear(EMBED, characters)

    def forward(self, text: Tensor) -> Tensor:
        """Numbers of characters (..., n) → logits (..., n, characters)."""
        x = self.characters(text) + self.places.weight[: text.shape[-1]]
        for block in self.blocks:
            x = block(x)
        return self.guess(self.norm(x))


def reference() -> tuple[Tensor, Tensor, int]:
    """Text to learn from and text to be judged by, as numbers, and how many characters there are."""
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(text))
    numbers = torch.tensor([alphabet.index(c) for c in text])
    cut = len(numbers) * 9 // 10
    return numbers[:cut], numbers[cut:], len(alphabet)


def loss_of(net: Encoder, text: Tensor, size: int, rng: torch.Generator, mask: int) -> Tensor:
    """Cross-entropy of the masked characters in pieces drawn from the text, in nats."""
    starts = torch.randint(0, len(text) - ROWS, (size, 1), generator=rng)
    piece = text[starts + torch.arange(ROWS)]
    hidden = torch.rand(piece.shape, generator=rng) < MASKED
    logits = net(piece.masked_fill(hidden, mask))
    return nn.functional.cross_entropy(logits[hidden], piece[hidden])


def losses(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """Loss on unseen text during training, and the time of a step."""
    seen, unseen, characters = reference()
    rows = []
    for name, attention in ATTENTIONS.items():
        torch.manual_seed(given.seed)
        net = Encoder(characters, attention)
        optimiser = torch.optim.AdamW(net.parameters(), given.rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, given.rate, given.steps, pct_start=0.1)
        rng = torch.Generator().manual_seed(given.seed)
        spent = 0.0
        for step in watch(range(1, given.steps + 1), name):
            start = time.process_time()
            loss = loss_of(net, seen, given.batch, rng, characters)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            spent += time.process_time() - start
            if step % max(1, given.steps // 12) == 0 or step == given.steps:
                with torch.no_grad():
                    judge = torch.Generator().manual_seed(10**6)
                    unseen_loss = loss_of(net, unseen, 64, judge, characters).item()
                rows.append({
                    "attention": name, "step": step, "loss": loss.item(), "unseen": unseen_loss, "seconds": spent / step,
                    "parameters": sum(p.numel() for p in net.parameters()), "batch": given.batch,
                })  # fmt: skip
    return rows


def at_length(name: str, n: int) -> dict[str, float]:
    """Forward and backward of one layer on one sequence: seconds of processor, and MiB beyond what there was before."""

    def now(field: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1])

    torch.manual_seed(0)
    layer, x = LAYERS_AT_LENGTH[name](), torch.randn(1, n, EMBED, requires_grad=True)
    layer(x[:, :600]).sum().backward()  # whatever is set up once
    x.grad = None
    before = now("VmRSS")
    start = time.process_time()
    layer(x).square().mean().backward()
    return {"seconds": time.process_time() - start, "MiB": max(0, now("VmHWM") - before) / 1024}


def lengths(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """One layer at growing lengths, beside what plans say of the exact method."""
    rows = []
    cases = [(name, n) for name in LAYERS_AT_LENGTH for n in ((1024, 2048) if given.quick else (1024, 4096, 16384))]
    for name, n in watch(cases, "lengths"):
        command = [sys.executable, "-m", "examples.drop_in", "--measure", name, str(n)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        layer = LAYERS_AT_LENGTH[name]()
        plan = layer.plan_for(n) if isinstance(layer, tattn.nn.TensorAttention) else None
        rows.append({
            "attention": name, "rows": n, **json.loads(done.stdout), "threads": torch.get_num_threads(),
            "rank": plan.rank if plan else 0, "error": plan.error if plan else 0.0,
            # The gradient takes twice the operations of the forward call.
            "flops": 3 * HEADS * plan.flops_polynomial if plan else 3 * HEADS * n * n * 4.0 * EMBED / HEADS,
            "flops_exact": 3 * HEADS * plan.flops_exact if plan else float("nan"),
        })  # fmt: skip
    return rows


PARTS: dict[str, shared.Part] = {"losses": losses, "lengths": lengths}


def plot(rows: Table) -> Any:
    """Loss against steps and against time."""
    figure, ((by_step, by_time),) = panels(2, height=4.0)
    for i, (name,) in enumerate(distinct(rows, "attention")):
        mine = where(rows, attention=name)
        by_step.plot(column(mine, "step"), column(mine, "unseen"), **style(i, label=name))
        by_time.plot([r["step"] * r["seconds"] for r in mine], column(mine, "unseen"), **style(i, label=name))
    by_step.set(xlabel="steps", ylabel="loss on unseen text (nats)")
    by_time.set(xlabel="processor seconds of training")
    by_step.legend(fontsize="small")
    return figure


def page(tables: dict[str, Table]) -> str:
    """What the tables say."""
    rows, long = tables["losses"], tables["lengths"]
    ends = [where(rows, attention=name)[-1] for (name,) in distinct(rows, "attention")]
    of_losses = [[r["attention"], f"{r['parameters']:,}", f"{r['unseen']:.3f}", seconds(r["seconds"])] for r in ends]
    of_lengths = [
        [
            r["attention"],
            f"{r['rows']:,}",
            f"{r['rank']:,}" if r["rank"] else "–",
            f"{r['error']:.1e}" if r["rank"] else "–",
            f"{si(r['flops'])}flop",
            seconds(r["seconds"]),
            f"{r['MiB']:.0f} MiB",
            f"{si(r['flops_exact'])}flop" if r["rank"] else "–",
        ]
        for r in long
    ]
    rate = max(r["flops"] / r["seconds"] for r in long if r["rank"])
    top = max((r for r in long if r["rank"]), key=lambda r: r["rows"])
    days = top["flops_exact"] / rate / 86400
    heads = ["attention", "rows", "rank", "error", "operations", "processor time", "peak memory", "exact would take"]
    return f"""\
# In place of `nn.MultiheadAttention`

An encoder of {LAYERS} blocks with {EMBED} channels and {HEADS} heads reads {ROWS} characters of the reference that ships with
Python (`pydoc_data.topics`, PSF licence) and fills in the {100 * MASKED:.0f} % that are masked. Only the attention changes:

```python
import torch
import tattn

x = torch.randn({ends[0]["batch"]}, {ROWS}, {EMBED})  # sequences, characters, channels
before = torch.nn.MultiheadAttention({EMBED}, {HEADS}, batch_first=True)
out, _ = before(x, x, x, need_weights=False)
after = tattn.nn.TensorAttention({EMBED}, {HEADS}, bound=1.0, degree=2)
out = after(x)
```

{max(column(rows, "step")):,} steps of AdamW, {ends[0]["batch"]} sequences each. The loss is the cross-entropy in
nats on the last tenth of the text. No model saw it, but for paragraphs that the reference repeats: some 8 % of its characters
stand in paragraphs of the first nine tenths, too. That is the same for all models.

![Loss on unseen text](drop_in.png)

{markdown(of_losses, ["attention", "parameters", "loss", "processor time of a step"])}

*Single rows* is the same layer of order 2: ordinary attention through the polynomial. {_words(ends)}
Steps are few: this shows that the layer can stand there and what it costs, not which attention reads text better.

## Length

One layer, one sequence, forward and backward in float32 on {top["threads"]} thread{"s" * (top["threads"] > 1)}. Memory is what the
operating system saw beyond the layer and its input; *exact* is what the plan counts for scores and softmax of all pairs.

{markdown(of_lengths, heads)}

At {top["rows"]:,} rows the exact method would take {days:,.0f} days at the best rate of this table, in little memory, too: it is
streamed.
"""


def _words(ends: Table) -> str:
    """Which loss is lower, and what it took."""
    ordinary, pairs = ends[0], ends[1]
    lower = "lower" if pairs["unseen"] < ordinary["unseen"] else "no lower"
    return (
        f"With pairs the loss is {lower} than with `nn.MultiheadAttention` ({pairs['unseen']:.3f} and {ordinary['unseen']:.3f}),\n"
        f"and a step takes {pairs['seconds'] / ordinary['seconds']:.1f} times as long at this length."
    )


def main() -> None:
    """Measure, and write what was found."""
    parser = shared.options(__doc__, steps=300, quick_steps=3, batch=8, rate=3e-3)
    parser.add_argument("--measure", nargs=2, metavar=("ATTENTION", "ROWS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(at_length(given.measure[0], int(given.measure[1]))))
    else:
        shared.run(NAME, given, PARTS, plot, page)


if __name__ == "__main__":
    main()
