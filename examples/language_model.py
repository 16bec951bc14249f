"""A language model from scratch: bytes of English, a context of 2,048, causal blocks with rotary positions.

The same small net is trained with attention to pairs in both blocks, in the second only, and with ordinary attention. The text is
the reference that ships with Python (`pydoc_data.topics`).
`python -m examples.language_model` trains all three and writes a table, a plot and a page into docs/examples; with --quick
it takes a minute, learns nothing, and writes into build/examples.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn

import tattn
from evidence.plots import panels, style
from evidence.tables import Table, column, distinct, markdown, seconds, where

from . import learning, shared
from .learning import ends
from .transformer_block import Block

NAME = "language_model"
BYTES, EMBED, HEADS, TRAINED = 256, 64, 8, 2048
# Contexts at which the finished nets are judged.
JUDGED = (2048, 4096, 8192)
LOOKS = 3


class Ordinary(nn.Module):
    """Causal `scaled_dot_product_attention` with RoPE, with the call of `tattn.nn.TensorAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(EMBED, 3 * EMBED), nn.Linear(EMBED, EMBED)

    def forward(self, x: Tensor, contexts: None = None, *, key_masks: None = None) -> Tensor:
        """(..., n, EMBED) → the same."""
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for part in self.inward(x).chunk(3, -1))
        at, frequencies = torch.arange(x.shape[-2]), 10_000.0 ** -torch.linspace(0, 1, q.shape[-1] // 2)
        q, k = (tattn.rotary(part, at, frequencies) for part in (q, k))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.outward(seen.transpose(-3, -2).flatten(-2))


def pairs() -> Block:
    """A block with attention to pairs."""
    return Block(EMBED, HEADS, causal=True, positions="rotary")


def single() -> Block:
    """A block with ordinary attention; its MLP is wider by what a second view takes in projections."""
    block = Block(EMBED, HEADS, expand=5)
    block.attention = Ordinary()
    return block


MODELS: dict[str, tuple[Callable[[], Block], ...]] = {
    "pairs in both blocks": (pairs, pairs),
    "pairs in the second block": (single, pairs),
    "ordinary, RoPE": (single, single),
}
BOTH, SECOND, ORDINARY = MODELS
COUNTED = "pairs of bytes, counted"


class Net(nn.Module):
    """Bytes, blocks, a guess of the next byte at every place."""

    def __init__(self, blocks: tuple[Callable[[], Block], ...]) -> None:
        super().__init__()
        self.bytes, self.norm, self.guess = nn.Embedding(BYTES, EMBED), nn.LayerNorm(EMBED), nn.Linear(EMBED, BYTES)
        self.blocks = nn.Sequential(*(make() for make in blocks))

    def forward(self, text: Tensor) -> Tensor:
        """Bytes (..., n) → logits (..., n, BYTES)."""
        return self.guess(self.norm(self.blocks(self.bytes(text))))


def reference() -> tuple[Tensor, Tensor]:
    """Bytes to learn from, and those that follow, to be judged by; no paragraph comes twice.

    Chapters of the reference repeat what topics say: without this, a judge would ask for what was learned.
    """
    paragraphs = [p for name in sorted(topics) for p in topics[name].split("\n\n") if p.strip()]
    once = {" ".join(p.split()): p for p in reversed(paragraphs)}
    text = torch.tensor(list("\n\n".join(reversed(once.values())).encode()))
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def loss_of(net: Net, pieces: Tensor) -> Tensor:
    """Mean cross-entropy of every byte but the first, given those before it, in nats; pieces (size, rows + 1)."""
    return nn.functional.cross_entropy(net(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


def judged(net: Net, text: Tensor, rows: int) -> float:
    """Bits a byte in all of the text, cut into contexts of so many bytes; what is left over at its end is left out."""
    starts = range(0, len(text) - rows, rows)
    with torch.no_grad():
        return sum(loss_of(net, text[None, i : i + rows + 1]).item() for i in starts) / len(starts) / math.log(2)


def counted(seen: Tensor, unseen: Tensor) -> float:
    """Bits a byte of the next byte given the last, as often as they came in the text to learn from, and a tenth of a time more."""
    table = torch.zeros(BYTES, BYTES) + 0.1
    table.index_put_((seen[:-1], seen[1:]), torch.ones(len(seen) - 1), accumulate=True)
    return -(table / table.sum(1, keepdim=True)).log2()[unseen[:-1], unseen[1:]].mean().item()


def learned(name: str, seed: int, given: argparse.Namespace, watch: shared.Watch) -> Table:
    """One net: judged at the length of training meanwhile, and at all lengths at its end."""
    seen, unseen = reference()
    torch.manual_seed(seed)
    net = Net(MODELS[name])
    rng = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        starts = torch.randint(0, len(seen) - TRAINED, (given.batch, 1), generator=rng)
        return loss_of(net, seen[starts + torch.arange(TRAINED + 1)])

    def named(steps: Any) -> Any:
        return watch(steps, f"{name}, seed {seed}")

    rows = []
    for step, spent in learning.train(net, loss, given.rate, given.steps, LOOKS, named):
        far = step == given.steps and not given.quick
        rows += [
            {
                "model": name, "seed": seed, "step": step, "seconds": spent, "rows": n, "bits": judged(net, unseen, n),
                "parameters": sum(p.numel() for p in net.parameters()), "steps": given.steps, "batch": given.batch,
            }
            for n in (JUDGED if far else JUDGED[:1])
        ]  # fmt: skip
    return rows


def limits() -> Table:
    """What counting gives."""
    return [
        {
            "model": COUNTED, "seed": 0, "step": 0, "seconds": 0.0, "rows": TRAINED, "bits": counted(*reference()),
            "parameters": BYTES**2, "steps": 0, "batch": 0,
        }
    ]  # fmt: skip


def curves(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """All nets by all seeds, and what counting gives."""
    seeds = range(given.seed, given.seed + (1 if given.quick else 3))
    return [row for seed in seeds for name in MODELS for row in learned(name, seed, given, watch)] + limits()


PARTS: dict[str, shared.Part] = {"curves": curves}


def plot(rows: Table) -> Any:
    """Bits a byte against steps and against processor time, a line for every seed."""
    figure, ((by_step, by_time),) = panels(2, height=4.0)
    for i, name in enumerate(MODELS):
        for (seed,) in distinct(where(rows, model=name), "seed"):
            mine = where(rows, model=name, seed=seed, rows=TRAINED)
            label = None if seed else name
            by_step.plot(column(mine, "step"), column(mine, "bits"), **style(i, label=label))
            by_time.plot(column(mine, "seconds"), column(mine, "bits"), **style(i))
    for axis in (by_step, by_time):
        axis.axhline(where(rows, model=COUNTED)[0]["bits"], color="#000000", linestyle=":", linewidth=1)
        axis.set_ylabel("bits a byte of unseen text")
    by_step.set_xlabel("steps")
    by_time.set_xlabel("processor seconds of training")
    by_step.legend(fontsize="small")
    return figure


def mean_bits(rows: Table, name: str, n: int = TRAINED) -> float:
    """Of the finished nets, at a context of `n` bytes."""
    found = column(where(ends(rows, name), rows=n), "bits")
    return sum(found) / len(found)


def page(tables: dict[str, Table]) -> str:
    """What the table says."""
    rows = tables["curves"]
    lengths = sorted({r["rows"] for r in rows})
    lines, trained = [], where(rows, model=BOTH)[0]
    for name in MODELS:
        final = ends(rows, name)
        spent = column(where(final, rows=TRAINED), "seconds")
        of_step = sum(spent) / len(spent) / trained["steps"]
        cells = []
        for n in lengths:
            found = column(where(final, rows=n), "bits")
            cells.append(f"{mean_bits(rows, name, n):.3f} ± {(max(found) - min(found)) / 2:.3f}")
        lines.append([name, f"{final[0]['parameters']:,}", seconds(of_step), *cells])
    count = where(rows, model=COUNTED)[0]
    lines.append([COUNTED, f"{count['parameters']:,}", "–", f"{count['bits']:.3f}", *("–" for _ in lengths[1:])])
    seeds = len(distinct(where(rows, model=BOTH), "seed"))
    heads = ["blocks", "parameters", "processor time of a step", *(f"{n:,} bytes" for n in lengths)]
    return f"""\
# A language model from scratch

A small causal model reads {TRAINED:,} bytes of English and guesses the next at every place. It has two blocks with {EMBED} channels
and {HEADS} heads. Only the attention differs: pairs of earlier rows in both blocks, in the second block, or in none.

* *Pairs* is `tattn.nn.TensorAttention({EMBED}, {HEADS}, causal=True, positions="rotary")`, in linear time.
* *Ordinary* is `scaled_dot_product_attention` with RoPE. Its MLP is a quarter wider, which makes up for the projections of the
  second view.

The text is the reference that ships with Python (`pydoc_data.topics`, PSF licence). Its chapters repeat many paragraphs of its
topics: each is kept once. The last tenth is not trained on. Adam, at the same rate for all: the better of 3e-3 and 1e-2 for
ordinary attention in a short trial; {trained["steps"]:,} steps
(`--steps {trained["steps"]}`), {trained["batch"]} piece{"s" * (trained["batch"] > 1)}
of the text at a step.

![Bits a byte of unseen text, against steps and time](language_model.png)

Bits a byte of unseen text by length of context, mean of {seeds} seeds ± half the distance from the worst to the best; trained at
{TRAINED:,} bytes:

{markdown(lines, heads)}

*Counted* is how often each byte followed each in the text to learn from.

{_words(rows)}
"""


def _words(rows: Table) -> str:
    """Who is ahead, and at which cost."""
    both, second, ordinary = (mean_bits(rows, name) for name in MODELS)
    spread = max(
        max(found) - min(found) for found in (column(where(ends(rows, n), rows=TRAINED), "bits") for n in MODELS)
    )
    spent = {name: sum(column(where(ends(rows, name), rows=TRAINED), "seconds")) for name in MODELS}
    ratio = spent[BOTH] / spent[ORDINARY]

    def against(found: float) -> str:
        if abs(found - ordinary) <= spread:
            return "within the spread of seeds of ordinary attention"
        return f"{abs(found - ordinary):.2f} bits {'ahead of' if found < ordinary else 'behind'} ordinary attention"

    text = f"""\
Pairs in both blocks end {against(both)}, pairs in one block
{against(second)}. A step with pairs in both takes {ratio:.2f} times as long at {TRAINED:,} bytes."""
    count = where(rows, model=COUNTED)[0]["bits"]
    if min(both, second, ordinary) > count:
        return f"""\
{text}
No net is as good as counting, at {count:.2f} bits: training is too short for any of them to use more than the last byte. So this
shows that such a model trains at this length and what a step costs. It does not show which
attention reads text better."""
    gain = count - min(both, second, ordinary)
    if min(both, second) >= ordinary:
        return f"""\
{text}
So pairs gain nothing here: neither loss nor time, at this length. The best net is {gain:.2f} bits better than counting, so
{rows[0]["steps"]:,} steps are a short training; what a longer one or a larger text would show is open."""
    return text


def main() -> None:
    """Measure, and write what was found."""
    given = shared.options(__doc__, steps=300, quick_steps=3, batch=1, rate=1e-2).parse_args()
    shared.run(NAME, given, PARTS, plot, page)


if __name__ == "__main__":
    main()
