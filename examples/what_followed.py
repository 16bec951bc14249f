"""What followed this symbol before? One causal layer that attends to pairs of earlier rows, one just behind the other.

In every sequence each symbol has a favourite that follows it half of the time. To tell it, a row has to look for earlier rows with
its own symbol, and read the row behind each: two earlier rows, and how they stand to each other. That is an induction head. In
ordinary attention it takes two layers.
`python -m examples.what_followed` trains layers with and without rotary positions, and ordinary attention with them, and writes
tables, a plot and a page into docs/examples; with --quick it takes seconds, learns nothing, and writes into build/examples.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tattn
from evidence.tables import Table, column, markdown, where

from . import learning, shared
from .learning import ends, mean_right, of_models

NAME = "what_followed"
SYMBOLS, FAVOURITE = 3, 0.5
HEADS, HEAD_DIM, VALUE_DIM, BOUND = 4, 8, 12, 4.0
TRAINED = 24
# Lengths at which every net is judged, and by how many fresh sequences.
JUDGED = {24: 200, 48: 100, 96: 40}
LOOKS = 10


class Task(NamedTuple):
    """`rows` symbols, each followed by its favourite with probability FAVOURITE, and by any symbol otherwise."""

    rows: int

    def batch(self, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Symbols, and the favourite of each, (size, rows); favourites map the symbols one to one, afresh in every sequence."""
        favourite = torch.rand(size, SYMBOLS, generator=rng).argsort(1)
        any_symbol = torch.randint(0, SYMBOLS, (size, self.rows), generator=rng)
        follows = torch.rand(size, self.rows, generator=rng) < FAVOURITE
        symbols = [any_symbol[:, 0]]
        for i in range(1, self.rows):
            of_last = favourite.gather(1, symbols[-1][:, None])[:, 0]
            symbols.append(torch.where(follows[:, i], of_last, any_symbol[:, i]))
        x = torch.stack(symbols, 1)
        return x, favourite.gather(1, x)


class Pairs(nn.Module):
    """One causal layer from every row to all pairs of rows up to its own: its output is the logits."""

    def __init__(self, positions: str | None) -> None:
        super().__init__()
        self.layer = tattn.nn.TensorAttention(
            SYMBOLS, HEADS, head_dim=HEAD_DIM, value_dim=VALUE_DIM, bound=BOUND, causal=True, method="exact",
            positions=positions, learn_frequencies=positions is not None,
        )  # fmt: skip
        if positions is not None:
            # Opposite frequencies: the phase α (p_i − p_j) − α (p_i − p_k) = α (p_k − p_j) is how the two rows of a pair stand
            # to each other, wherever the query is.
            with torch.no_grad():
                alpha = math.pi * torch.rand(self.layer.frequencies.shape[1:])
                self.layer.frequencies.copy_(torch.stack([alpha, -alpha]))

    def forward(self, x: Tensor) -> Tensor:
        """Symbols (size, rows) → logits (size, rows, SYMBOLS)."""
        # A mean over pairs is a small number, and a logit is not.
        return 40 * self.layer(nn.functional.one_hot(x, SYMBOLS).float())


class Ordinary(nn.Module):
    """So many causal blocks of ordinary attention with RoPE and an MLP."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.out = nn.Linear(SYMBOLS, width), nn.Linear(width, SYMBOLS)
        self.inward = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.outward = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Symbols (size, rows) → logits (size, rows, SYMBOLS)."""
        at = torch.arange(x.shape[1])
        rows = self.first(nn.functional.one_hot(x, SYMBOLS).float())
        for inward, outward, mlp in zip(self.inward, self.outward, self.mlps, strict=True):
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in inward(rows).chunk(3, -1))
            frequencies = 100.0 ** -torch.linspace(0, 1, q.shape[-1] // 2)
            q, k = (tattn.rotary(part, at, frequencies) for part in (q, k))
            seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            rows = rows + outward(seen.transpose(1, 2).flatten(2))
            rows = rows + mlp(rows)
        return self.out(rows)


class Model(NamedTuple):
    """What is trained, by which rate, and for how many times the steps of pairs, so that none gets less time."""

    make: Callable[[], nn.Module]
    rate: float
    steps: int


MODELS = {
    "pairs, rotary": Model(lambda: Pairs("rotary"), 3e-2, 1),
    "pairs, no positions": Model(lambda: Pairs(None), 3e-2, 1),
    "ordinary, RoPE, one layer": Model(lambda: Ordinary(1, 16, 4), 1e-2, 3),
    "ordinary, RoPE, two layers": Model(lambda: Ordinary(2, 12, 2), 1e-2, 3),
    "ordinary, RoPE, two wide layers": Model(lambda: Ordinary(2, 32, 4), 3e-3, 3),
}
PAIRS, COUNTED, BEST = next(iter(MODELS)), "counted", "all maps, weighed"


def train(
    net: nn.Module, given: argparse.Namespace, rate: float, seed: int, watch: Callable[..., Iterable[int]]
) -> Iterator[tuple[int, float]]:
    """Adam with warm-up and a cosine; now and then the steps so far and their processor seconds, and at the end."""
    rng = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        x, wanted = Task(TRAINED).batch(given.batch, rng)
        return nn.functional.cross_entropy(net(x).flatten(0, 1), wanted.flatten())

    return learning.train(net, loss, rate, given.steps, LOOKS, watch)


def accuracy(answer: Callable[[Tensor], Tensor], task: Task, sequences: int) -> float:
    """Share of favourites told right in the second half of fresh sequences."""
    rng = torch.Generator().manual_seed(10**6)
    right, done = 0.0, 0
    with torch.no_grad():
        for size in [min(50, sequences - start) for start in range(0, sequences, 50)]:
            x, wanted = task.batch(size, rng)
            told = answer(x).argmax(-1) == wanted
            right += float(told[:, task.rows // 2 :].float().sum())
            done += told[:, task.rows // 2 :].numel()
    return right / done


def counted(x: Tensor) -> Tensor:
    """How often each symbol has followed the symbol of a row, so far, (size, rows, SYMBOLS)."""
    rows = nn.functional.one_hot(x, SYMBOLS).double()
    bigrams = (rows[:, :-1, :, None] * rows[:, 1:, None, :]).cumsum(1)
    so_far = nn.functional.pad(bigrams, (0, 0, 0, 0, 1, 0))
    return (so_far * rows[..., None]).sum(2)


def weighed(x: Tensor) -> Tensor:
    """How likely each symbol is the favourite of a row's by the rows so far, over all one-to-one maps, (size, rows, SYMBOLS)."""
    rows = nn.functional.one_hot(x, SYMBOLS).double()
    bigrams = (rows[:, :-1, :, None] * rows[:, 1:, None, :]).cumsum(1)
    so_far = nn.functional.pad(bigrams, (0, 0, 0, 0, 1, 0))
    maps = torch.stack([torch.eye(SYMBOLS).double()[list(p)] for p in itertools.permutations(range(SYMBOLS))])
    odds = math.log(1 + FAVOURITE * SYMBOLS / (1 - FAVOURITE))
    weights = torch.softmax(odds * torch.einsum("btac,mac->btm", so_far, maps), -1)
    return (torch.einsum("btm,mac->btac", weights, maps) * rows[..., None]).sum(2)


def learned(name: str, seed: int, given: argparse.Namespace, watch: shared.Watch) -> Table:
    """One net: judged on what it was trained on meanwhile, and at all lengths at its end."""
    torch.manual_seed(seed)
    model = MODELS[name]
    net, rows = model.make(), []
    mine = argparse.Namespace(steps=given.steps * model.steps, batch=given.batch)
    for step, spent in train(net, mine, model.rate, seed, lambda r: watch(r, f"{name}, seed {seed}")):
        for m, sequences in JUDGED.items() if step == mine.steps else [(TRAINED, JUDGED[TRAINED])]:
            if not (given.quick and m > TRAINED):
                rows.append({
                    "model": name, "seed": seed, "step": step, "seconds": spent, "rows": m,
                    "right": accuracy(net, Task(m), sequences), "parameters": sum(p.numel() for p in net.parameters()),
                    "steps": mine.steps, "batch": given.batch,
                })  # fmt: skip
    return rows


def curves(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """Every model with every seed; and what counting tells."""
    seeds = range(given.seed, given.seed + (1 if given.quick else 3))
    return [row for name in MODELS for seed in seeds for row in learned(name, seed, given, watch)] + limits(given)


def limits(given: argparse.Namespace) -> Table:
    """The most frequent follower so far, and the likeliest one, at every length."""
    return [
        {
            "model": name, "seed": 0, "step": 0, "seconds": 0.0, "rows": m, "parameters": 0, "steps": 0, "batch": 0,
            "right": accuracy(answer, Task(m), 4 * JUDGED[m]),
        }
        for name, answer in ((COUNTED, counted), (BEST, weighed)) for m in JUDGED if not (given.quick and m > TRAINED)
    ]  # fmt: skip


PARTS: dict[str, shared.Part] = {"curves": curves}


def plot(rows: Table) -> Any:
    """Right answers against processor time of training, a line for every seed; and at other lengths."""
    figure, by_time, by_rows = learning.plot(rows, MODELS, TRAINED, 1 / SYMBOLS)
    by_rows.set_xticks(list(JUDGED), [str(m) for m in JUDGED])
    by_time.set_ylabel(f"% right, {TRAINED} rows")
    by_rows.set_xlabel("rows, after training")
    by_rows.legend(fontsize="x-small", loc="lower left")
    return figure


def page(tables: dict[str, Table]) -> str:
    """What the table says."""
    rows = tables["curves"]
    lengths = sorted({r["rows"] for r in rows})
    first = where(rows, model=PAIRS)[0]
    lift = math.exp(2 * BOUND)
    shares = ", ".join(f"{100 * lift / (lift + SYMBOLS * m):.0f} % at {m}" for m in lengths)
    sizes = f"head_dim={HEAD_DIM}, value_dim={VALUE_DIM}, bound={BOUND:g}, causal=True"
    likely = 100 * (FAVOURITE + (1 - FAVOURITE) / SYMBOLS)
    maps = math.factorial(SYMBOLS)
    heads = ["attention", "parameters", "steps", "processor time", *(f"{m} rows" for m in lengths)]
    return f"""\
# What followed this symbol before

In every sequence each of {SYMBOLS} symbols has a favourite, another one in each sequence, that follows it with probability ½; any
symbol follows otherwise. Every row is asked for the favourite of its symbol. The answer is in the rows before: find the same
symbol, and look at the row *behind* it. So a row depends on two earlier ones, j and k, and on how these stand to each other:
k = j + 1.

Ordinary attention does this in two layers, an induction head: in the first every row reads the one before it, in the second it
looks for rows that have read its own symbol. Here a single layer attends to the pairs (j, k).

## Signal and noise, on paper

Row i sees i² pairs. One in {SYMBOLS} rows has its symbol, and each has one row behind it: i / {SYMBOLS} of the i² pairs matter,
a share of 1 / ({SYMBOLS} i) that *falls with the length*. A score of ±bound lifts them by e^(2 · bound), {lift:,.0f} for a bound of
{BOUND:g}. If it rises for these pairs alone, they have {shares} rows of the weight. No score
of four channels is that sharp. So this works for short sequences, or inside windows, and needs a larger bound for long ones: it
is not what bounded attention to many pairs is for. The polynomial of such a bound would need a high degree, hence `method="exact"`.

Positions come as phases. With frequencies α in the first view and −α in the second the phase of a channel is
α (p_i − p_j) − α (p_i − p_k) = α (p_k − p_j): the place of the query cancels. Symbols give the moduli and the rest of the phases.
Frequencies start at random between 0 and π and are learned.

Of what follows a symbol {likely:.0f} % is its favourite. *Counted* names the most frequent follower so far. *Weighed* uses too that
no two symbols share a favourite, and is the best answer there is: {maps} maps, by their likelihood.

## Learned

*Pairs* is `tattn.nn.TensorAttention({SYMBOLS}, {HEADS}, {sizes}, method="exact")`, with
`positions="rotary", learn_frequencies=True` or without; its output is the logits, without an MLP. *Ordinary* is
`scaled_dot_product_attention` with RoPE in blocks with an MLP: one block of width 16, two of width 12, or two of width 32; they get
three times the steps, as theirs are shorter. Adam on fresh sequences of {TRAINED} rows, {first["batch"]} at a step. Judged in the
second half of fresh sequences.

![Right answers during training, and by length](what_followed.png)

% right, mean of three seeds ± half the distance from the worst to the best; {100 / SYMBOLS:.0f} % by chance:

{markdown(of_models(rows, MODELS, TRAINED, lengths), heads)}

{_words(rows)}
"""


def _words(rows: Table) -> str:
    """What positions give, and what a second layer does."""
    rotary, without, one, two, wide, count, best = (
        mean_right(ends(rows, n), TRAINED) for n in (*MODELS, COUNTED, BEST)
    )
    longest = max(column(rows, "rows"))
    far, far_wide, far_count = (mean_right(ends(rows, name), longest) for name in (PAIRS, list(MODELS)[-1], COUNTED))
    if wide > rotary + 1:
        end = """\
That is more, in less time. So pairs gain a layer here, and neither accuracy nor time: an MLP and a second layer use further
what the first has counted."""
    else:
        end = "One layer of pairs takes their place here."
    return f"""\
At {TRAINED} rows pairs with positions are right for {rotary:.1f} %, counting is for {count:.1f} %. Without positions the same layer
cannot tell which row stands behind which: {without:.1f} %. One layer of ordinary attention is right for {one:.1f} %.

Two narrow layers of ordinary attention are right for {two:.1f} %, two wide ones for {wide:.1f} %, of {best:.1f} % that can be had.
{end}

At {longest} rows, where nothing was trained, pairs are right for {far:.1f} %, two wide layers for {far_wide:.1f} %, counting for
{far_count:.1f} %."""


def main() -> None:
    """Measure, and write what was found."""
    given = shared.options(__doc__, steps=300, quick_steps=5, batch=16, rate=3e-2).parse_args()
    shared.run(NAME, given, PARTS, plot, page)


if __name__ == "__main__":
    main()
