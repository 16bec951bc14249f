"""Two hops over noisy facts: given thousands of statements f(x) = y and g(y) = z, many of them wrong, what is g(f(x))?

No statement says z of x: a statement about f has to be joined with one about g by the y that both name. One layer that attends to
pairs of statements can do that; with single statements it takes two layers, and they have to be found.
`python -m examples.two_hops` trains both on short sequences, judges them on long ones, and writes tables, a plot and a page into
docs/examples; with --quick it takes seconds, learns nothing, and writes into build/examples.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tattn
from evidence.tables import Table, column, distinct, markdown, seconds, where

from . import learning, shared
from .learning import ends, mean_right, of_models

NAME = "two_hops"
NAMES, WRONG = 6, 0.5
HEADS, HEAD_DIM, VALUE_DIM, BOUND, DEGREE = 4, 8, 12, 3.0, 3
# Statements about each of f and g: as many as are trained on, and lengths at which every net is judged, with fresh sequences.
TRAINED = 64
JUDGED = {16: 300, 64: 300, 256: 150, 1024: 60, 4096: 30, 16384: 12}
LOOKS = 20


class Task(NamedTuple):
    """`rows` statements about f, and as many about g; both map the names 0 … NAMES − 1 one to one, afresh in every sequence."""

    rows: int

    def batch(self, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Statements about f and about g (size, rows, 2), and g(f(x)) for every x, (size, NAMES)."""
        f, g = (torch.rand(size, NAMES, generator=rng).argsort(1) for _ in range(2))
        return self._statements(f, rng), self._statements(g, rng), g.gather(1, f)

    def _statements(self, function: Tensor, rng: torch.Generator) -> Tensor:
        """Arguments and what is said of them, (size, rows, 2)."""
        size = len(function)
        x, anything = (torch.randint(0, NAMES, (size, self.rows), generator=rng) for _ in range(2))
        wrong = torch.rand(size, self.rows, generator=rng) < WRONG
        return torch.stack([x, torch.where(wrong, anything, function.gather(1, x))], 2)


def rows_of(statements: Tensor) -> Tensor:
    """Both names of a statement, one-hot, (..., 2 NAMES)."""
    return nn.functional.one_hot(statements, NAMES).flatten(-2).float()


class Pairs(nn.Module):
    """From every x to all pairs (statement about f, statement about g): one layer, and nothing else."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        options = {"degree": DEGREE, **options}
        self.layer = tattn.nn.TensorAttention(
            NAMES, HEADS, head_dim=HEAD_DIM, value_dim=VALUE_DIM, bound=BOUND, context_dims=(2 * NAMES,) * 2, **options
        )

    def forward(self, f: Tensor, g: Tensor) -> Tensor:
        """Statements (size, rows, 2) → logits (size, NAMES, NAMES)."""
        # A mean over pairs is a small number, and a logit is not.
        return 160 * self.layer(torch.eye(NAMES).expand(len(f), -1, -1), (rows_of(f), rows_of(g)))


class Ordinary(nn.Module):
    """From every x to all statements, by so many blocks of `nn.MultiheadAttention` and an MLP."""

    def __init__(self, layers: int, width: int = 32) -> None:
        super().__init__()
        self.first, self.rows, self.out = nn.Linear(NAMES, width), nn.Linear(4 * NAMES, width), nn.Linear(width, NAMES)
        self.attentions = nn.ModuleList(nn.MultiheadAttention(width, HEADS, batch_first=True) for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )

    def forward(self, f: Tensor, g: Tensor) -> Tensor:
        """Statements (size, rows, 2) → logits (size, NAMES, NAMES)."""
        pad = 2 * NAMES
        of_f, of_g = nn.functional.pad(rows_of(f), (0, pad)), nn.functional.pad(rows_of(g), (pad, 0))
        statements = self.rows(torch.cat([of_f, of_g], 1))
        x = self.first(torch.eye(NAMES)).expand(len(f), -1, -1)
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            x = x + attention(x, statements, statements, need_weights=False)[0]
            x = x + mlp(x)
        return self.out(x)


class Model(NamedTuple):
    """What is trained, by which rate, and for how many times the steps of pairs, so that all take about as long."""

    make: Callable[[], nn.Module]
    rate: float
    steps: int


# Of the rates 0.001 (with a width of 64), 0.005 and 0.01 none brings the second off chance within 3,000 steps.
MODELS = {
    "pairs, one layer": Model(Pairs, 3e-2, 1),
    "nn.MultiheadAttention, one layer": Model(lambda: Ordinary(1), 5e-3, 3),
    "nn.MultiheadAttention, two layers": Model(lambda: Ordinary(2), 5e-3, 3),
}
PAIRS, COUNTED = next(iter(MODELS)), "all pairs, counted"


def train(
    net: nn.Module, given: argparse.Namespace, rate: float, seed: int, watch: Callable[..., Iterable[int]]
) -> Iterator[tuple[int, float]]:
    """Adam with warm-up and a cosine; now and then the steps so far and their processor seconds, and at the end."""
    rng = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        f, g, wanted = Task(TRAINED).batch(given.batch, rng)
        return nn.functional.cross_entropy(net(f, g).flatten(0, 1), wanted.flatten())

    return learning.train(net, loss, rate, given.steps, LOOKS, watch)


def accuracy(answer: Callable[[Tensor, Tensor], Tensor], task: Task, sequences: int) -> float:
    """Share of right answers on fresh sequences."""
    rng = torch.Generator().manual_seed(10**6)
    right, done = 0.0, 0
    with torch.no_grad():
        for size in [min(16, sequences - start) for start in range(0, sequences, 16)]:
            f, g, wanted = task.batch(size, rng)
            right += float((answer(f, g).argmax(-1) == wanted).float().sum())
            done += wanted.numel()
    return right / done


def counted(f: Tensor, g: Tensor) -> Tensor:
    """How many pairs of statements lead from x to z, (size, NAMES, NAMES): the product of two tables of counts."""
    one, two = (nn.functional.one_hot(s[..., 0] * NAMES + s[..., 1], NAMES**2).sum(1) for s in (f, g))
    return one.view(-1, NAMES, NAMES) @ two.view(-1, NAMES, NAMES)


def learned(name: str, seed: int, given: argparse.Namespace, watch: shared.Watch) -> Table:
    """One net: judged on what it was trained on meanwhile, and at all lengths at its end."""
    torch.manual_seed(seed)
    model = MODELS[name]
    net, rows = model.make(), []
    mine = argparse.Namespace(steps=given.steps * model.steps, batch=given.batch)
    for step, spent in train(net, mine, model.rate, seed, lambda r: watch(r, f"{name}, seed {seed}")):
        for m, sequences in JUDGED.items() if step == mine.steps else [(TRAINED, JUDGED[TRAINED])]:
            if not (given.quick and m > 256):
                rows.append({
                    "model": name, "seed": seed, "step": step, "seconds": spent, "rows": m,
                    "right": accuracy(net, Task(m), sequences), "parameters": sum(p.numel() for p in net.parameters()),
                    "steps": mine.steps, "batch": given.batch,
                })  # fmt: skip
    return rows


def curves(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """Every model with every seed; and what can be had at all."""
    seeds = range(given.seed, given.seed + (1 if given.quick else 3))
    rows = [row for name in MODELS for seed in seeds for row in learned(name, seed, given, watch)]
    return rows + limits(given)


def limits(given: argparse.Namespace) -> Table:
    """The most frequent z among all pairs of statements that lead from x, at every length."""
    lengths = [m for m in JUDGED if not (given.quick and m > 256)]
    return [
        {
            "model": COUNTED, "seed": 0, "step": 0, "seconds": 0.0, "rows": m, "parameters": 0, "steps": 0, "batch": 0,
            "right": accuracy(counted, Task(m), 4 * JUDGED[m]),
        }
        for m in lengths
    ]  # fmt: skip


def times(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """Processor seconds of a training step for one sequence, the smallest of several in turn; exact as far as it goes."""
    rows = []
    makers: dict[str, Callable[[], nn.Module]] = {name: model.make for name, model in MODELS.items()}
    makers["pairs, exact"] = lambda: Pairs(degree=None, method="exact")
    for n in watch((64, 256) if given.quick else (64, 1024, 4096, 16384), "times"):
        nets = {name: make() for name, make in makers.items() if n <= 1024 or "exact" not in name}
        spent: dict[str, list[float]] = {name: [] for name in nets}
        for _ in range(2 if given.quick else 4):
            for name, net in nets.items():
                f, g, wanted = Task(n).batch(2, torch.Generator().manual_seed(0))
                start = time.process_time()
                nn.functional.cross_entropy(net(f, g).flatten(0, 1), wanted.flatten()).backward()
                spent[name].append((time.process_time() - start) / 2)
        rows += [{"model": name, "rows": n, "seconds": min(found)} for name, found in spent.items()]
    return rows


PARTS: dict[str, shared.Part] = {"curves": curves, "times": times}


def plot(rows: Table) -> Any:
    """Right answers against processor time of training, a line for every seed; and against the number of statements."""
    figure, by_time, by_rows = learning.plot(rows, MODELS, TRAINED, 1 / NAMES)
    by_time.set_ylabel(f"% right, {TRAINED} statements of each")
    by_rows.set_xlabel("statements of each, after training")
    by_rows.legend(fontsize="x-small", loc="center right", bbox_to_anchor=(1, 0.4))
    return figure


def page(tables: dict[str, Table]) -> str:
    """What the tables say."""
    rows, spent = tables["curves"], tables["times"]
    lengths = [m for (m,) in distinct(rows, "rows")]
    lengths.sort()
    right, of_each = 1 - WRONG + WRONG / NAMES, TRAINED / NAMES
    weights = math.exp(2 * BOUND), 2 * (NAMES - 1) * math.exp(BOUND), (NAMES - 1) ** 2
    share, twice = 100 * weights[0] / sum(weights), 100 * right**2
    first = where(rows, model=PAIRS)[0]
    sizes = f"head_dim={HEAD_DIM}, value_dim={VALUE_DIM}, bound={BOUND:g}, degree={DEGREE}"
    heads = ["attention", "parameters", "steps", "processor time", *(f"{m:,}" for m in lengths)]
    return f"""\
# Two hops over noisy facts

In every sequence f and g map {NAMES} names one to one, afresh. The rows are n statements "f(x) = y" and n statements "g(y) = z".
What they say of their argument is right with probability ½ and any name at all otherwise. For every x: what is g(f(x))?
No row names both x and z. A statement about f has to be joined with one about g, by the name that both contain.

## Signal and noise, on paper

A pair of statements can be joined to answer for x if the first is about x (one in {NAMES}) and the second about what the first
says (one in {NAMES}): one pair in {NAMES**2}, *however many statements there are*. A head whose score counts these two conditions,
from −{BOUND:g} for none to {BOUND:g} for both, gives such pairs {share:.0f} % of its weight. Of these pairs {twice:.0f} % are right
twice and name the answer; all others name every z about as often.

Noise falls with n: of n statements about f, n / {NAMES} are about x. With {TRAINED} these are {of_each:.0f}, of which
{of_each * right:.0f} are right, and each wrong name comes once. *Counted* takes the z to which most pairs lead, and
does not use that f and g are one to one.

One layer of ordinary attention gives x a mean over single statements. It has the answer only if the whole table of g passes through
that mean. Two layers can do it: the first finds y, the second asks for z of y.

## Learned

*Pairs* is `tattn.nn.TensorAttention({NAMES}, {HEADS}, {sizes})` from the
{NAMES} names to all pairs of statements, and its output is the logits: no MLP, no second layer. Beside it one block and two of
`nn.MultiheadAttention` and an MLP, from the names to all statements. Adam on fresh sequences of {TRAINED} statements of each kind,
{first["batch"]} at a step; ordinary attention gets three times the steps, as its steps are shorter. Then every net is judged at all
lengths without further training.

![Right answers during training, and by length](two_hops.png)

% right after training at {TRAINED}, mean of three seeds ± half the distance from the worst to the best, and {100 / NAMES:.0f} % by
chance:

{markdown(of_models(rows, MODELS, TRAINED, lengths), heads)}

{_words(rows)}

## Time

Processor time of a step, forward and gradient, for one sequence on one thread, the smallest of several. In brackets: exact
attention to pairs from its last measurement, as n².

{_of_times(spent)}
"""


def _words(rows: Table) -> str:
    """What was learned, and by whom."""
    longest = max(column(rows, "rows"))
    pairs, one, two = (mean_right(ends(rows, name), TRAINED) for name in MODELS)
    far, count = (mean_right(ends(rows, name), longest) for name in (PAIRS, COUNTED))
    text = f"""\
Pairs are right for {pairs:.1f} % at {TRAINED} statements and, untrained there, for {far:.1f} % at {longest:,}, where counting is
for {count:.1f} %. One layer of ordinary attention is right for {one:.1f} %, two layers for {two:.1f} %."""
    if two < 200 / NAMES:
        return f"""\
{text} Two layers *can* join: what fails is to find
it. Nothing rewards the first for y before the second uses it, and the second has nothing to use before. The three rates that were
tried stand still at chance. More steps, or labels for y, may get them off."""
    return f"""\
{text} Two layers join, too, and a step of
theirs is shorter: pairs save a layer here, and no time."""


def _of_times(spent: Table) -> str:
    """Seconds by model and length."""
    lengths, lines = sorted({r["rows"] for r in spent}), []
    for (name,) in distinct(spent, "model"):
        mine = {r["rows"]: r["seconds"] for r in where(spent, model=name)}
        last = max(mine)
        lines.append(
            [name, *(seconds(mine[n]) if n in mine else f"({seconds(mine[last] * (n / last) ** 2)})" for n in lengths)]
        )
    return markdown(lines, ["attention", *(f"{n:,}" for n in lengths)])


def main() -> None:
    """Measure, and write what was found."""
    given = shared.options(__doc__, steps=1000, quick_steps=5, batch=16, rate=3e-2).parse_args()
    shared.run(NAME, given, PARTS, plot, page)


if __name__ == "__main__":
    main()
