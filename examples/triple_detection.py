"""Is there a pair j, k with x_i + x_j + x_k ≡ 0 mod M? Attention to pairs learns it, attention to single rows does not.

Match3 of Sanford, Hsu and Telgarsky ("Representational strengths and limitations of transformers", 2023), label by label for
every position of a sequence. `python -m examples.triple_detection` trains, measures and writes tables, plots and a page into
docs/examples; with --quick it takes a minute, learns nothing, and writes into build/examples.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tattn
from evidence.plots import panels, style
from evidence.tables import Table, column, distinct, markdown, seconds, short, where
from tattn.approximation.exponential import minimax

from . import shared

NAME = "triple_detection"
MODULUS, LENGTH = 97, 12
HIDDEN = 128


class Task(NamedTuple):
    """Sequences of `rows` numbers below `modulus`, of which `kinds` are different draws."""

    rows: int = LENGTH
    kinds: int = LENGTH
    modulus: int = MODULUS

    def batch(self, size: int, device_rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Numbers (size, rows), and for each whether a pair of numbers completes it to 0 mod M."""
        kinds = torch.randint(0, self.modulus, (size, self.kinds), generator=device_rng)
        which = torch.arange(self.kinds).expand(size, -1)
        if self.rows > self.kinds:
            more = torch.randint(0, self.kinds, (size, self.rows - self.kinds), generator=device_rng)
            which = torch.cat([which, more], 1)
        sums = kinds[:, :, None, None] + kinds[:, None, :, None] + kinds[:, None, None, :]
        found = (sums % self.modulus == 0).flatten(2).any(-1).float()
        return kinds.gather(1, which), found.gather(1, which)


class Products(nn.Module):
    """Products of two linear forms, and their sum: what reads an answer off attention and the number itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(width, HIDDEN), nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) → (..., 1)."""
        return self.out(self.left(x) * self.right(x))


class Ordinary(nn.Module):
    """`nn.MultiheadAttention`, on as many channels as its heads have together."""

    def __init__(self, embed_dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.lift, self.lower = nn.Linear(embed_dim, heads * head_dim), nn.Linear(heads * head_dim, embed_dim)
        self.attention = nn.MultiheadAttention(heads * head_dim, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n, embed_dim) → the same."""
        y = self.lift(x)
        return self.lower(self.attention(y, y, y, need_weights=False)[0])


class Mlp(nn.Sequential):
    """The usual way to read attention, which has to make products of sums by itself."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, 1))


def phases(numbers: Tensor, modulus: int, count: int) -> Tensor:
    """Cosines and sines of 2π f x / M, (..., 2 · count): phases add up where numbers do.

    f is 1, 2, 4, …, 32 for M = 97 and six of them, the same in proportion for other M; all up to `count` for more.
    """
    f = torch.arange(1.0, count + 1) if count > 6 else torch.round((modulus / 3) ** (torch.arange(count) / (count - 1)))
    angles = numbers[..., None] * (2 * math.pi / modulus * f)
    return torch.cat([angles.cos(), angles.sin()], -1)


class Net(nn.Module):
    """Phases of every number, one layer of attention, and a read-out of both."""

    def __init__(
        self, attention: Callable[[int], nn.Module], read: Callable[[int], nn.Module] = Products, count: int = 6
    ) -> None:
        super().__init__()
        self.count = count
        self.attention, self.read = attention(2 * count), read(4 * count)

    def forward(self, numbers: Tensor, modulus: int) -> Tensor:
        """One logit for each number."""
        x = phases(numbers, modulus, self.count)
        return self.read(torch.cat([x, self.attention(x)], -1))[..., 0]


def tensor_attention(heads: int, head_dim: int, **options: Any) -> Callable[[int], nn.Module]:
    """A layer that makes tensor attention of these heads for a width."""
    return lambda width: tattn.nn.TensorAttention(width, heads, head_dim=head_dim, value_dim=head_dim, **options)


# The same number of parameters: order 3 has six projections of 64 channels, order 2 four of 96.
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "pairs, degree 4": tensor_attention(4, 16, bound=3.0, degree=4),
    "single rows": tensor_attention(6, 16, order=2, bound=6.0, method="exact"),
    "nn.MultiheadAttention": lambda width: Ordinary(width, 6, 16),
}
# heads, channels, bound, degree; the exact softmax where the degree is None.
TRADES = [
    (4, 16, 6.0, None), (4, 16, 3.0, None), (4, 16, 3.0, 4), (4, 16, 3.0, 2),
    (8, 8, 3.0, 4), (16, 8, 3.0, 4),
]  # fmt: skip
# What is trained and evaluated at length, and changed, one thing at a time, to see what matters.
BASE = (4, 16, 3.0, 4)
CHANGES: dict[str, dict[str, Any]] = {
    "an MLP reads in place of products": {"read": Mlp},
    "a rate of 0.002": {"rate": 2e-3},
    "both, and all 48 frequencies": {"read": Mlp, "rate": 2e-3, "count": 48},
}


def train(
    net: Net, task: Task, steps: int, size: int, rate: float, seed: int, every: int, watch: Callable[..., Iterable[int]]
) -> Table:
    """Adam with warm-up and a cosine; accuracy on fresh sequences every so many steps."""
    rng = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(net.parameters(), rate, betas=(0.9, 0.98))
    warm = max(1, min(100, steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda t: min(1, (t + 1) / warm) * 0.5 * (1 + math.cos(math.pi * t / steps))
    )
    rows = []
    start = time.perf_counter()
    for step in watch(range(1, steps + 1)):
        numbers, wanted = task.batch(size, rng)
        loss = nn.functional.binary_cross_entropy_with_logits(net(numbers, task.modulus), wanted)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % every == 0 or step == steps:
            spent = time.perf_counter() - start
            rows.append({"step": step, "loss": loss.item(), **accuracy(net, task, 1000), "seconds": spent})
    return rows


def accuracy(net: Net, task: Task, sequences: int, at_once: int = 250) -> dict[str, float]:
    """Share of fresh numbers told right, and what always saying the more frequent answer gets."""
    rng = torch.Generator().manual_seed(10**6)
    right = positive = total = 0.0
    with torch.no_grad():
        for start in range(0, sequences, at_once):
            numbers, wanted = task.batch(min(at_once, sequences - start), rng)
            right += float(((net(numbers, task.modulus) > 0) == (wanted > 0)).sum())
            positive += float(wanted.sum())
            total += wanted.numel()
    return {"right": right / total, "majority": max(positive, total - positive) / total}


def parameters(net: nn.Module) -> int:
    """How many numbers are learned."""
    return sum(p.numel() for p in net.parameters())


def made(attention: Callable[[int], nn.Module], seed: int, **options: Any) -> Net:
    """A net with weights drawn from a seed."""
    torch.manual_seed(seed)
    return Net(attention, **options)


def curves(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """Accuracy during training, for every model and seed."""
    rows = []
    for name, attention in MODELS.items():
        for seed in range(given.seed, given.seed + given.seeds):
            net = made(attention, seed)
            found = train(
                net, Task(), given.steps, given.batch, given.rate, seed, max(1, given.steps // 15),
                lambda r, name=name, seed=seed: watch(r, f"{name}, seed {seed}"),
            )  # fmt: skip
            about = {"model": name, "seed": seed, "attention": parameters(net.attention), "parameters": parameters(net)}
            rows += [{**about, **row} for row in found]
    return rows


def trades(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """What heads, channels, bound and degree do, one seed each."""
    rows = []
    steps = given.steps * 2 // 5
    for heads, dim, bound, degree in TRADES[1:3] if given.quick else TRADES:
        options = {"method": "exact"} if degree is None else {"degree": degree}
        net = made(tensor_attention(heads, dim, bound=bound, **options), given.seed)
        words = f"{heads} heads of {dim}, bound {bound:g}, {'exact' if degree is None else f'degree {degree}'}"
        last = train(
            net, Task(), steps, given.batch, given.rate, given.seed, steps,
            lambda r, words=words: watch(r, words),
        )[-1]  # fmt: skip
        plan = net.attention.plan
        # The work that a row of a long sequence takes, for all heads, with its gradient.
        flops = 3 * heads * plan.flops_polynomial / plan.lengths[0] if degree else float("nan")
        delta = minimax(degree, plan.bound).delta if degree else 0.0
        rows.append({
            "heads": heads, "dim": dim, "bound": bound, "degree": degree or 0, "rank": plan.rank, "delta": delta,
            "flops": flops, "right": last["right"], "steps": steps,
        })  # fmt: skip
    return rows


def changes(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """What happens if one thing is done otherwise."""
    heads, dim, bound, degree = BASE
    steps = given.steps * 2 // 5
    rows = []
    for name, changed in list(CHANGES.items())[: 2 if given.quick else None]:
        changed = dict(changed)
        rate = changed.pop("rate", given.rate)
        net = made(tensor_attention(heads, dim, bound=bound, degree=degree), given.seed, **changed)
        last = train(
            net, Task(), steps, given.batch, rate, given.seed, steps, lambda r, name=name: watch(r, name)
        )[-1]  # fmt: skip
        rows.append({"change": name, "parameters": parameters(net), "right": last["right"], "steps": steps})
    return rows


def lengths(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """A layer trained on 12 rows, at more: evaluated, and trained on."""
    heads, dim, bound, degree = BASE
    net = made(tensor_attention(heads, dim, bound=bound, degree=degree), given.seed)
    steps = given.steps * 2 // 5
    train(net, Task(), steps, given.batch, given.rate, given.seed, steps, lambda r: watch(r, "12 rows, first"))
    begun = {name: p.clone() for name, p in net.state_dict().items()}
    # More rows of the same twelve numbers; and more numbers, with M such that as many have a pair.
    tasks = {
        "more rows": [(Task(n), s) for n, s in ((12, 500), (48, 200), (192, 100), (1024, 24), (16384, 6))],
        "more numbers": [
            (Task(n, n, _prime_near(MODULUS * n * n // 144)), s) for n, s in ((16, 400), (24, 200), (48, 60))
        ],
    }
    rows = []
    for kind, several in tasks.items():
        for task, sequences in several[: 2 if given.quick else None]:
            net.load_state_dict(begun)
            start = time.perf_counter()
            before = accuracy(net, task, sequences, max(1, 4096 // task.rows))
            spent = (time.perf_counter() - start) / sequences
            plan = net.attention.plan_for(task.rows)
            row = {
                "kind": kind, "rows": task.rows, "numbers": task.kinds, "modulus": task.modulus,
                "flops": heads * plan.flops_polynomial, "flops_exact": heads * plan.flops_exact,
                "majority": before["majority"], "sequences": sequences, "before": before["right"], "seconds": spent,
                "after": float("nan"), "steps": 0,
            }  # fmt: skip
            steps = 0 if task.rows in (12, 16384) else max(1, given.steps // (20 if kind == "more numbers" else 30))
            if steps:
                size = max(2, min(given.batch, 1536 // task.rows))
                train(
                    net, task, steps, size, given.rate / 5, given.seed, steps,
                    lambda r, task=task: watch(r, f"{task.rows} rows of {task.kinds} numbers"),
                )  # fmt: skip
                row |= {"after": accuracy(net, task, sequences, max(1, 4096 // task.rows))["right"], "steps": steps}
            rows.append(row)
    return rows


def _prime_near(number: int) -> int:
    """The first prime from here on."""
    while any(number % i == 0 for i in range(2, math.isqrt(number) + 1)):
        number += 1
    return number


PARTS: dict[str, shared.Part] = {"curves": curves, "trades": trades, "changes": changes, "lengths": lengths}


def plot(rows: Table) -> Any:
    """Accuracy against steps, a line for every seed."""
    figure, ((axis,),) = panels(1, height=4.0)
    figure.set_size_inches(7, 4)
    for i, (name,) in enumerate(distinct(rows, "model")):
        for j, (seed,) in enumerate(distinct(where(rows, model=name), "seed")):
            mine = where(rows, model=name, seed=seed)
            axis.plot(
                column(mine, "step"), [100 * r for r in column(mine, "right")], **style(i, label=None if j else name)
            )
    axis.axhline(
        100 * rows[-1]["majority"], color="#000000", linestyle=":", linewidth=1, label="the more frequent answer"
    )
    axis.set(xlabel="Adam steps", ylabel="% right, fresh sequences", ylim=(50, 101))
    axis.legend(fontsize="small")
    return figure


def page(tables: dict[str, Table]) -> str:
    """What the tables say."""
    rows = tables["curves"]
    last = {name: [where(rows, model=name, seed=s)[-1] for (s,) in distinct(where(rows, model=name), "seed")]
            for (name,) in distinct(rows, "model")}  # fmt: skip
    of_models = [
        [
            name,
            f"{ends[0]['attention']:,}",
            f"{ends[0]['parameters']:,}",
            ", ".join(f"{100 * e['right']:.1f} %" for e in ends),
            seconds(sum(e["seconds"] for e in ends) / len(ends)),
        ]
        for name, ends in last.items()
    ]
    of_trades = [
        [
            f"{r['heads']} × {r['dim']}",
            f"{r['bound']:g}",
            f"{r['degree']}" if r["degree"] else "exact",
            f"{r['rank']:,}" if r["degree"] else "–",
            f"{r['delta']:.1e}" if r["degree"] else "0",
            f"{r['flops'] / 1e6:.2g} M" if r["degree"] else "grows as n²",
            f"{100 * r['right']:.1f} %",
        ]
        for r in tables["trades"]
    ]
    of_changes = [[r["change"], f"{r['parameters']:,}", f"{100 * r['right']:.1f} %"] for r in tables["changes"]]
    of_lengths = [
        [
            r["kind"],
            f"{r['rows']:,}",
            f"{r['numbers']:,}",
            f"{r['modulus']:,}",
            f"{r['flops_exact']:.0e} / " + (f"{r['flops']:.0e}" if r["flops"] < r["flops_exact"] else "of scores"),
            seconds(r["seconds"]),
            f"{100 * r['majority']:.1f} %",
            f"{100 * r['before']:.1f} %",
            f"{100 * r['after']:.1f} % ({r['steps']} steps)" if r["steps"] else "–",
        ]
        for r in tables["lengths"]
    ]
    steps = max(column(rows, "step"))
    return f"""\
# Triple detection

A sequence of {LENGTH} numbers below M = {
        MODULUS
    }. For every number x_i: are there j and k with x_i + x_j + x_k ≡ 0 mod M? This
is Match3 of Sanford, Hsu and Telgarsky (2023), who show that one head that attends to pairs can tell, and that ordinary
attention needs a width that grows with the length. Whether training finds it is another question; here it does, with
a polynomial of degree 4 in place of exp.

Inputs are cos and sin of 2π f x / M for six f. One layer of attention; its output and the input are read by {
        HIDDEN
    } products of
two linear forms. {steps:,} Adam steps on fresh sequences; all models see the same ones.

![Accuracy during training](triple_detection.png)

{
        markdown(
            of_models,
            [
                "attention",
                "its parameters",
                "all parameters",
                "right at the end, seed by seed",
                "time of a run, machine shared",
            ],
        )
    }

*Pairs* is `tattn.nn.TensorAttention(12, 4, head_dim=16, value_dim=16, bound=3.0, degree=4)`, *single rows* the same layer of order
2 with more heads, so that parameters are as many, twice the bound and exact softmax. `nn.MultiheadAttention` gets the
channels of those heads and several times the parameters. It makes no difference: with attention to single rows the pair
has to be found after the sum over rows, which has lost it. The more
frequent answer is right for {100 * rows[-1]["majority"]:.1f} %.

## Heads, bound, degree, rank

One seed each, {
        tables["trades"][0][
            "steps"
        ]:,} steps. δ is the largest relative error of the polynomial as exp on [−bound, bound]; operations are those of
all heads for one row of a long sequence, with the gradient.

{markdown(of_trades, ["heads × channels", "bound", "degree", "rank", "δ", "operations a row", "right"])}

{_of_trades_words(tables["trades"])}

## What matters beside attention

{BASE[0]} heads of {BASE[1]}, bound {BASE[2]:g}, degree {BASE[3]}, {
        tables["changes"][0]["steps"]:,} steps as in the table above, with
one thing changed:

{markdown(of_changes, ["change", "parameters", "right"])}

The rate matters most: rows of queries and keys are normalised, so that a small one turns them slowly. The answer is a
product of the number's own phase with a sum over pairs; a read-out that multiplies learns it sooner than an MLP, which has to build
products first. With neither, and more frequencies than a head has channels for, training stands still at two thirds, where
attention to single rows ends, too.

## Longer sequences

The layer of {BASE[0]} heads of {BASE[1]}, trained on {
        LENGTH
    } rows, then evaluated on more, and trained further from there with a
fifth of the rate. *More rows* draws them from twelve numbers, so that every pair comes many times; *more numbers* draws
all afresh, with M as large as keeps the share of positive answers. Operations are those of a forward call of all heads for
one sequence; *of scores*: there the polynomial of every score is computed, in about as many as exact.

{
        markdown(
            of_lengths,
            [
                "sequence",
                "rows",
                "numbers",
                "M",
                "operations exact / polynomial",
                "a sequence takes",
                "more frequent answer",
                "right before",
                "after more training",
            ],
        )
    }

What a bounded head computes is a mean over all pairs, and so it is the same at 16,384 rows as at twelve if the shares of the
numbers are. Training on there keeps what was learned; with the few sequences of a step it adds nothing. What a bounded head
cannot do is pick one pair among ever more: with n numbers a single pair is 2/n² of the crowd, and no score lifts it by more
than e^(2 · bound). Accuracy falls as n grows, and training on does not bring all of it back.
"""


def _of_trades_words(rows: Table) -> str:
    """The best and the cheapest of them."""
    polynomial = [r for r in rows if r["degree"]]
    best = max(polynomial, key=lambda r: r["right"])
    enough = [r for r in polynomial if r["right"] >= 0.95]
    text = f"Best of the polynomials: {best['heads']} heads of {best['dim']}, degree {best['degree']}, {100 * best['right']:.1f} %."
    if enough:
        least = min(enough, key=lambda r: r["flops"])
        text += (
            f" Cheapest with 95 %: {least['heads']} heads of {least['dim']}, bound {least['bound']:g}, degree {least['degree']}, "
            f"rank {least['rank']:,}: {short(best['flops'] / least['flops'])} times fewer operations."
        )
    return text


def main() -> None:
    """Measure, and write what was found."""
    parser = shared.options(__doc__, steps=2500, quick_steps=10, batch=128, rate=1e-2)
    parser.add_argument("--seeds", type=int, help="3; 1 if quick")
    given = parser.parse_args()
    given.seeds = given.seeds or (1 if given.quick else 3)
    shared.run(NAME, given, PARTS, plot, page)


if __name__ == "__main__":
    main()
