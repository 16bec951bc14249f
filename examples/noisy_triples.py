"""Six hidden numbers, thousands of unreliable readings of them: does a pair of hidden numbers complete a query to 0 mod M?

Triple detection grown up: queries attend to pairs of readings, every second of which is of no hidden number at all, so that only
many readings together tell. `python -m examples.noisy_triples` trains at three lengths, measures and writes tables, a plot and a
page into docs/examples; with --quick it takes a minute, learns nothing, and writes into build/examples.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tattn
from evidence.apart import reset_peak, resident_bytes
from evidence.plots import panels, style
from evidence.tables import Table, column, distinct, markdown, seconds, where

from . import learning, shared

NAME = "noisy_triples"
MODULUS, HIDDEN, WRONG = 31, 6, 0.5
FREQUENCIES = (1, 2, 3, 4, 6, 10)
WIDTH = 2 * len(FREQUENCIES)
HEADS, HEAD_DIM, VALUE_DIM, BOUND, DEGREE = 4, 8, 16, 3.0, 3
TRAINED = (64, 512, 4096)
# Lengths at which every net is judged, and by how many fresh sequences, each of which asks MODULUS questions.
JUDGED = {16: 400, 64: 400, 512: 200, 4096: 48, 16384: 24}


class Task(NamedTuple):
    """`rows` readings of six hidden numbers."""

    rows: int

    def batch(self, size: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Readings (size, rows), and for every query 0 … M − 1 whether two hidden numbers complete it, (size, M)."""
        hidden = torch.randint(0, MODULUS, (size, HIDDEN), generator=rng)
        right = hidden.gather(1, torch.randint(0, HIDDEN, (size, self.rows), generator=rng))
        wrong = torch.randint(0, MODULUS, (size, self.rows), generator=rng)
        readings = torch.where(torch.rand(size, self.rows, generator=rng) < WRONG, wrong, right)
        sums = (hidden[:, :, None] + hidden[:, None, :]).flatten(1)
        return readings, torch.zeros(size, MODULUS).scatter_(1, -sums % MODULUS, 1.0)


def phases(numbers: Tensor) -> Tensor:
    """Cosines and sines of 2π f x / M for six f, (..., WIDTH)."""
    angles = numbers[..., None] * (2 * math.pi / MODULUS * torch.tensor(FREQUENCIES))
    return torch.cat([angles.cos(), angles.sin()], -1)


class Pairs(nn.Module):
    """From every query to all pairs of readings."""

    gain = (1 - WRONG) ** -2

    def __init__(self, **options: Any) -> None:
        super().__init__()
        options = {"degree": DEGREE, **options}
        self.layer = tattn.nn.TensorAttention(
            WIDTH, HEADS, head_dim=HEAD_DIM, value_dim=VALUE_DIM, bound=BOUND, **options
        )
        # A pair is asked about in no order, so both views share their keys.
        self.layer.k_projs[1] = self.layer.k_projs[0]

    def forward(self, queries: Tensor, readings: Tensor) -> Tensor:
        """(..., M, WIDTH)."""
        return self.layer(queries, (readings, readings))


class Ordinary(nn.Module):
    """From every query to all readings: `nn.MultiheadAttention` on so many channels."""

    gain = (1 - WRONG) ** -1

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.lift, self.lower = nn.Linear(WIDTH, heads * head_dim), nn.Linear(heads * head_dim, WIDTH)
        self.attention = nn.MultiheadAttention(heads * head_dim, heads, batch_first=True)

    def forward(self, queries: Tensor, readings: Tensor) -> Tensor:
        """(..., M, WIDTH)."""
        rows = self.lift(readings)
        return self.lower(self.attention(self.lift(queries), rows, rows, need_weights=False)[0])


class Net(nn.Module):
    """Phases, one layer of attention from the queries to the readings, and a read-out by products of two linear forms."""

    def __init__(self, attention: nn.Module, products: int = 128) -> None:
        super().__init__()
        self.attention = attention
        self.left, self.right = nn.Linear(2 * WIDTH, products), nn.Linear(2 * WIDTH, products)
        self.out = nn.Linear(products, 1)

    def forward(self, readings: Tensor) -> Tensor:
        """Numbers (size, rows) → a logit for every query, (size, M)."""
        queries = phases(torch.arange(MODULUS)).expand(len(readings), -1, -1)
        # The wrong half of the readings dilutes what attention says of the others; the factor undoes that.
        found = self.attention.gain * self.attention(queries, phases(readings))
        x = torch.cat([queries, found], -1)
        return self.out(self.left(x) * self.right(x))[..., 0]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "pairs": Pairs,
    "nn.MultiheadAttention, equal": lambda: Ordinary(2, 14),
    "nn.MultiheadAttention, ten times": lambda: Ordinary(6, 16),
    "pairs, exact": lambda: Pairs(degree=None, method="exact"),
}
# Of 0.003 and 0.01, what learned more of numbers without noise.
RATES = {"nn.MultiheadAttention, equal": 3e-3, "nn.MultiheadAttention, ten times": 3e-3}
BY_HAND, COUNTED = "pairs, set by hand", "all pairs, counted"
# Exact attention is trained up to this length only: its time grows as n².
EXACT_ROWS = 64
# Accuracy is looked at so many times during training.
LOOKS = 15
# Processor seconds of training, to compare what they buy at each length.
BUDGETS = (10, 30, 100)


def train(
    net: Net, task: Task, given: argparse.Namespace, rate: float, seed: int, watch: Callable[..., Iterable[int]]
) -> Iterator[tuple[int, float]]:
    """Adam with warm-up and a cosine; now and then the steps so far and their processor seconds, and at the end."""
    rng = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        readings, wanted = task.batch(given.batch, rng)
        return nn.functional.binary_cross_entropy_with_logits(net(readings), wanted)

    warm = max(1, min(30, given.steps // 10))
    return learning.train(net, loss, rate, given.steps, LOOKS, watch, warm)


def accuracy(answer: Callable[[Tensor], Tensor], task: Task, sequences: int) -> dict[str, float]:
    """Share of queries told right on fresh sequences, and what always saying the more frequent answer gets."""
    rng = torch.Generator().manual_seed(10**6)
    right = positive = total = 0.0
    with torch.no_grad():
        for start in range(0, sequences, 8):
            readings, wanted = task.batch(min(8, sequences - start), rng)
            right += float(((answer(readings) > 0) == (wanted > 0)).sum())
            positive += float(wanted.sum())
            total += wanted.numel()
    return {"right": right / total, "majority": max(positive, total - positive) / total}


def counted(readings: Tensor) -> Tensor:
    """The share of all pairs of readings that complete each query, (size, M)."""
    shares = nn.functional.one_hot(readings, MODULUS).double().mean(1)
    sums = torch.fft.irfft(torch.fft.rfft(shares) ** 2, MODULUS)
    return sums[:, -torch.arange(MODULUS) % MODULUS]


def best_cut(task: Task, sequences: int) -> float:
    """Where to cut the share of pairs, such that most of other sequences are told right."""
    readings, wanted = task.batch(sequences, torch.Generator().manual_seed(7))
    shares, order = counted(readings).flatten().sort()
    told = wanted.flatten()[order]
    wrong = told.cumsum(0) + (1 - told).sum() - (1 - told).cumsum(0)
    return float(shares[wrong.argmin()]) + 1e-9


def by_hand(sequences: int, rows: int) -> Net:
    """The net of pairs with projections set by hand; a logistic regression fits one weight for each of 16 phases, and the bias.

    Head h weights a pair by cos(f (q + x_j + x_k)) for two frequencies f, and its values are the phases f' (x_j + x_k) for
    four frequencies f'. Their product with the phase f' q of the query is large where pairs of large weight complete q.
    """
    net, many = Net(Pairs()), len(FREQUENCIES)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    layer = net.attention.layer
    q, a, u, v, out = (
        p.weight.data for p in (layer.q_proj, layer.k_projs[0], *layer.v_projs, layer.out_proj)
    )  # fmt: skip
    places = []
    for h, scored in enumerate(((0, 1), (2, 3), (4, 5), (0, 5))):
        for i, f in enumerate(scored):
            # Σ_φ cos(α + φ) cos(β + φ) cos(γ + φ) over three thirds of a turn is ¾ cos(α + β + γ).
            for m in range(3):
                turn = 2 * math.pi * m / 3
                for projection in (q, a):
                    projection[h * HEAD_DIM + 3 * i + m, f] = math.cos(turn)
                    projection[h * HEAD_DIM + 3 * i + m, many + f] = -math.sin(turn)
        for i in range(4):
            f, at = (h + i) % many, h * VALUE_DIM + 4 * i
            for j, (sine_of_u, sine_of_v) in enumerate(((0, 0), (1, 1), (0, 1), (1, 0))):
                u[at + j, f + many * sine_of_u] = v[at + j, f + many * sine_of_v] = 1
            places.append((f, at))
    # cos f'q · cos f'(x_j + x_k) − sin f'q · sin f'(x_j + x_k)
    for c in range(WIDTH):
        net.left.weight.data[c, c] = net.right.weight.data[c, WIDTH + c] = 1
        net.out.weight.data[0, c] = 1 if c < many else -1
    readings, wanted = Task(rows).batch(sequences, torch.Generator().manual_seed(5))
    columns = []
    with torch.no_grad():
        for f, at in places:
            out.zero_()
            _through(out, f, at, 1.0)
            columns.append(net(readings).flatten())
    x = torch.stack(columns, 1)
    scale = x.std(0)
    weights = _logistic(torch.cat([x / scale, torch.ones(len(x), 1)], 1), wanted.flatten())
    out.zero_()
    for (f, at), weight in zip(places, weights[:-1] / scale, strict=True):
        _through(out, f, at, float(weight))
    net.out.bias.data[:] = weights[-1]
    return net


def _through(out: Tensor, f: int, at: int, weight: float) -> None:
    """Let cosine and sine of f (x_j + x_k), four products from row `at` on, through the output projection."""
    out[f, at], out[f, at + 1] = weight, -weight
    out[len(FREQUENCIES) + f, at + 2] = out[len(FREQUENCIES) + f, at + 3] = weight


def _logistic(x: Tensor, wanted: Tensor) -> Tensor:
    """Weights of a logistic regression of 0 and 1 (m,) on (m, k)."""
    weights = torch.zeros(x.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = nn.functional.binary_cross_entropy_with_logits(x @ weights, wanted)
        value.backward()
        return value

    optimiser.step(loss)
    return weights.detach()


def parameters(net: nn.Module) -> int:
    """How many numbers are learned."""
    return sum(p.numel() for p in net.parameters())


def learned(name: str, n: int, seed: int, given: argparse.Namespace, watch: shared.Watch) -> Table:
    """One net trained at `n` rows: judged there during training, and at all lengths at its end."""
    torch.manual_seed(seed)
    net = Net(MODELS[name]())
    words = f"{name}, {n} rows, seed {seed}"
    rows = []
    for step, spent in train(net, Task(n), given, RATES.get(name, given.rate), seed, lambda r: watch(r, words)):
        for m, sequences in JUDGED.items() if step == given.steps else [(n, JUDGED[n])]:
            if not (given.quick and m > 512) and (m <= EXACT_ROWS or "exact" not in name):
                rows.append({
                    "model": name, "trained": n, "seed": seed, "rows": m, **accuracy(net, Task(m), sequences),
                    "parameters": parameters(net.attention), "batch": given.batch, "steps": step, "seconds": spent,
                })  # fmt: skip
    return rows


def runs(given: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Model, rows and seed of everything that is trained."""
    return [
        (name, n, seed)
        for name in MODELS
        for n in (TRAINED[:1] if given.quick or "exact" in name else TRAINED)
        for seed in range(given.seed, given.seed + given.seeds)
    ]


def accuracies(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """Every model, trained at every length with every seed; and what can be had at all."""
    return [row for run in runs(given) for row in learned(*run, given, watch)] + limits(given, watch)


def limits(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """The net of pairs set by hand, and what the share of all pairs tells, at every length."""
    net = by_hand(50 if given.quick else 300, 512)
    rows = []
    for m, sequences in watch(list(JUDGED.items())[: 3 if given.quick else None], "by hand"):
        cut = best_cut(Task(m), 10 * sequences)
        hand = accuracy(net, Task(m), sequences)
        count = accuracy(lambda readings, cut=cut: counted(readings) - cut, Task(m), 10 * sequences)
        for name, found in ((BY_HAND, hand), (COUNTED, count)):
            rows.append({
                "model": name, "trained": m, "seed": 0, "rows": m, **found, "parameters": 0, "batch": 0, "steps": 0, "seconds": 0.0,
            })  # fmt: skip
    return rows


def times(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """Processor seconds of a training step for one sequence, the smallest of several in turn; exact as far as it goes."""
    lengths = (64, 128, 256) if given.quick else (64, 256, 1024, 4096, 16384)
    rows = []
    for n in watch(lengths, "times"):
        names = [name for name in MODELS if n <= 256 or "exact" not in name]
        nets = {name: Net(MODELS[name]()) for name in names}
        spent: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(2 if given.quick else 4):
            for name, net in nets.items():
                readings, wanted = Task(n).batch(4, torch.Generator().manual_seed(0))
                start = time.process_time()
                nn.functional.binary_cross_entropy_with_logits(net(readings), wanted).backward()
                spent[name].append((time.process_time() - start) / 4)
        rows += [{"model": name, "rows": n, "seconds": min(found)} for name, found in spent.items()]
    return rows


def memory(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """MiB at the peak of a training step for one sequence, each in a process of its own; exact as far as it goes."""
    lengths = (64, 256) if given.quick else (64, 256, 1024, 4096, 16384)
    cases = [(name, n) for name in MODELS for n in lengths if n <= 1024 or "exact" not in name]
    rows = []
    for name, n in watch(cases, "memory"):
        command = [sys.executable, "-m", "examples.noisy_triples", "--measure", name, str(n)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append({"model": name, "rows": n, "MiB": json.loads(done.stdout)})
    return rows


def measured(name: str, n: int) -> float:
    """MiB that are resident at the peak of a step, beyond those before it."""
    net = Net(MODELS[name]())

    def step(rows: int) -> None:
        readings, wanted = Task(rows).batch(1, torch.Generator().manual_seed(0))
        nn.functional.binary_cross_entropy_with_logits(net(readings), wanted).backward()

    step(16)  # whatever is set up once
    reset_peak()
    before = resident_bytes("VmRSS")
    step(n)
    return (resident_bytes("VmHWM") - before) / 2**20


PARTS: dict[str, shared.Part] = {"accuracies": accuracies, "times": times, "memory": memory}


def ended(rows: Table) -> Table:
    """Without what nets did during training."""
    last = max(column(rows, "steps"))
    return [r for r in rows if r["steps"] in (0, last)]


def at_home(rows: Table, name: str) -> dict[int, list[float]]:
    """By length, the share told right at the length a model was trained at, seed by seed."""
    mine = [r for r in where(ended(rows), model=name) if r["rows"] == r["trained"]]
    return {n: column(where(mine, rows=n), "right") for (n,) in distinct(mine, "rows")}


def within(rows: Table, name: str, n: int, budget: float) -> Table:
    """Where each seed was after so many processor seconds; seeds that were not looked at by then are left out."""
    mine = [r for r in where(rows, model=name, trained=n, rows=n) if 0 < r["seconds"] <= budget]
    return [max(where(mine, seed=seed), key=lambda r: r["steps"]) for (seed,) in distinct(mine, "seed")]


def plot(rows: Table) -> Any:
    """Right answers by the number of readings, after training and after so many seconds of it; processor time of a step."""
    figure, ((of_right, of_budget, of_time),) = panels(3, height=4.0)
    budget = BUDGETS[1]
    for i, (name,) in enumerate(distinct(rows, "model")):
        home = at_home(rows, name)
        looks = style(i, label=name, linestyle="-" if name in MODELS else "--")
        of_right.plot(list(home), [100 * sum(r) / len(r) for r in home.values()], **looks)
        for n, found in home.items():
            of_right.plot([n] * len(found), [100 * r for r in found], **style(i, linestyle="", alpha=0.4))
        if name in MODELS:
            found = {n: column(within(rows, name, n, budget), "right") for n in home}
            found = {n: each for n, each in found.items() if each}
            of_budget.plot(list(found), [100 * sum(r) / len(r) for r in found.values()], **looks)
            spent = {n: [r["seconds"] / r["steps"] for r in where(ended(rows), model=name, trained=n)] for n in home}
            of_time.plot(list(home), [sum(each) / len(each) for each in spent.values()], **looks)
    majority = sum(column(rows, "majority")) / len(rows)
    for axis in (of_right, of_budget):
        axis.axhline(100 * majority, color="#000000", linestyle=":", linewidth=1)
        axis.set(xlabel="readings", ylim=(45, 101))
        axis.set_xscale("log", base=2)
    of_right.set_ylabel("% right, trained at this length")
    of_budget.set_ylabel(f"% right after {budget} s of training")
    of_time.set_xscale("log", base=2)
    of_time.set(yscale="log", xlabel="readings", ylabel="processor seconds of a step")
    of_budget.legend(*of_right.get_legend_handles_labels(), fontsize="x-small", loc="upper left")
    return figure


def page(tables: dict[str, Table]) -> str:
    """What the tables say."""
    rows, spent, held = tables["accuracies"], tables["times"], tables["memory"]
    first, lengths = where(rows, model="pairs")[0], sorted({r["rows"] for r in rows})
    counts, steps = [f"{m:,}" for m in lengths], max(column(rows, "steps"))
    right_twice = (1 - WRONG) ** 2
    share, chance = right_twice * 2 / HIDDEN**2, (1 - right_twice) / MODULUS
    few, many = (f"{share * MODULUS / 2 * n**0.5:.1f}" for n in (64, 4096))
    sizes = f"head_dim={HEAD_DIM}, value_dim={VALUE_DIM}, bound={BOUND:g}, degree={DEGREE}"
    return f"""\
# Triples from noisy observations

{HIDDEN} numbers below M = {MODULUS} are hidden. A sequence is of n readings. Each is one of the hidden numbers or, with
probability {WRONG:g}, any number at all. For every q below M: are there two hidden numbers x and y, or one taken twice, with
q + x + y ≡ 0 mod M? No reading tells whether it is right. [Triple detection](triple_detection.md) asks this of twelve numbers
without noise; here {MODULUS} queries attend to the pairs of up to {max(lengths):,} readings.

## Signal and noise, on paper

Of all pairs of readings {100 * right_twice:.0f} % are right twice. If a pair of hidden numbers completes q, 2 / {HIDDEN}² of these
do. The others meet q by chance, one in {MODULUS}. So {100 * share:.1f} % of all pairs carry the answer, on top of
{100 * chance:.1f} %, *however many readings there are*: a share like this a bounded head can weigh up, though it lifts a pair by
no more than e^(2 · bound).

Noise falls with n. Among n readings the share of a number is off by (M n)^(−½) or more, and the share of pairs that complete q
by 2 / (M √n) or more: the signal is at most {few} times that at 64 readings and {many} times at 4,096. Below a hundred readings
even a count of all pairs is unsure.

Ordinary attention gives each query {WIDTH} numbers, means over single readings. The answer is a sum of products over a histogram of
{MODULUS} numbers, which would have to pass through these.

*Set by hand* is the layer below with weights that nobody learned. A head weights pairs by the cosines of two frequencies of
q + x + y; its values are phases of x + y; a logistic regression fits {4 * HEADS} weights and a bias at 512 readings. *Counted*
takes the share of all pairs that complete q, and cuts it where that is best at each length.

## Learned

`tattn.nn.TensorAttention({WIDTH}, {HEADS}, {sizes})` attends from the phases
of the queries to pairs of readings. Both views share their keys, as a pair has no order. Products of two linear forms read its
output. {steps:,} Adam steps from scratch, {first["batch"]} fresh sequences each, at each length by itself. Beside it
`nn.MultiheadAttention` with as many and with ten times the parameters, and the same layer of pairs with exp in place of the
polynomial, as far as that goes.

![Right answers and time](noisy_triples.png)

% right at the length of training, mean of the seeds ± half the distance from the worst to the best; the more frequent
answer is right for {_mean(ended(rows), "majority"):.1f} %:

{markdown(_of_models(rows, lengths), ["attention", "its parameters", *counts])}

{_seeds(rows)}

{_words(rows)}

Trained at one length, judged at all, mean of the seeds:

{markdown(_of_transfer(rows, lengths), ["attention", "trained at", *counts])}

## What a budget buys

% right after so many processor seconds of training on a shared machine, mean of the seeds, and in brackets the steps that were
made by then, or for exact attention would be. The rate has not come down to nothing where the steps are fewer than {steps}. A
dash: not run, or not looked at by then.

{_of_budgets(rows, spent)}

## Time and memory

Processor time of a step, forward and gradient, for one sequence on one thread, the smallest of several. In brackets: what exact
attention to pairs would take, from its last measurement as n².

{_of_times(spent)}

{_runs(rows, spent)}

MiB at the peak of such a step, beyond what there was before it (resident set of a process of its own; a few MiB are those of the
allocator):

{_of_memory(held)}

Exact attention to pairs does not store its scores, so that its limit is time. Stored, the scores of all heads would take
{_stored(max(column(held, "rows"))):,.0f} GiB for one sequence of {max(column(held, "rows")):,} readings.
"""


def _mean(rows: Table, name: str) -> float:
    """Of a share, in %."""
    return 100 * sum(column(rows, name)) / len(rows)


def _of_models(rows: Table, lengths: list[int]) -> list[list[str]]:
    """Every model at the lengths it was trained at."""
    lines = []
    for (name,) in distinct(rows, "model"):
        home, size = at_home(rows, name), where(rows, model=name)[0]["parameters"]
        cells = [_spread(home[n]) if n in home else "–" for n in lengths]
        lines.append([name, f"{size:,}" if size else "–", *cells])
    return lines


def _spread(found: list[float]) -> str:
    """Mean in %, and how far seeds are apart."""
    mean = f"{100 * sum(found) / len(found):.1f}"
    return mean if len(found) == 1 else f"{mean} ± {50 * (max(found) - min(found)):.1f}"


def _seeds(rows: Table) -> str:
    """How many seeds were run, and where they were fewer."""
    lengths = {name: TRAINED[:1] if "exact" in name else TRAINED for name in MODELS}
    counts = [(name, n, len(at_home(rows, name).get(n, []))) for name in MODELS for n in lengths[name]]
    most = max(count for *_, count in counts)
    few = [f"of {name} at {n:,}, {count}" for name, n, count in counts if count < most]
    return f"{most} seeds each" + (f"; fewer were run {'; '.join(few)}." if few else ".")


def _of_budgets(rows: Table, spent: Table) -> str:
    """Accuracy and steps by model, budget and length."""
    lines, batch = [], max(column(rows, "batch"))
    for budget in BUDGETS:
        for name in MODELS:
            cells = []
            for n in TRAINED:
                found = within(rows, name, n, budget)
                if found:
                    steps = sum(column(found, "steps")) / len(found)
                    cells.append(f"{_mean(found, 'right'):.1f} ({steps:.0f})")
                else:
                    # Steps of exact attention that was not trained at this length, from its time.
                    cells.append(f"– ({budget / batch / exact_seconds(spent, n):.1f})" if "exact" in name else "–")
            lines.append([f"{budget} s", name, *cells])
    return markdown(lines, ["budget", "attention", *(f"{n:,}" for n in TRAINED)])


def _of_memory(held: Table) -> str:
    """MiB by model and length."""
    lengths, lines = sorted({r["rows"] for r in held}), []
    for (name,) in distinct(held, "model"):
        mine = {r["rows"]: r["MiB"] for r in where(held, model=name)}
        lines.append([name, *(f"{mine[n]:.1f}" if n in mine else "–" for n in lengths)])
    return markdown(lines, ["attention", *(f"{n:,}" for n in lengths)])


def _stored(n: int) -> float:
    """GiB of the scores of all heads from M queries to all pairs of `n` readings, in float32."""
    return 4.0 * HEADS * MODULUS * n**2 / 2**30


def _of_transfer(rows: Table, lengths: list[int]) -> list[list[str]]:
    """What was trained at one length, at all of them."""
    lines = []
    for name, n in distinct([r for r in rows if r["steps"] and "exact" not in r["model"]], "model", "trained"):
        mine = where(ended(rows), model=name, trained=n)
        lines.append([name, f"{n:,}", *(f"{_mean(where(mine, rows=m), 'right'):.1f}" for m in lengths)])
    return lines


def exact_seconds(spent: Table, n: int) -> float:
    """Seconds of exact attention to pairs for one sequence of `n` readings."""
    last = where(spent, model="pairs, exact")[-1]
    return float(last["seconds"]) * (n / last["rows"]) ** 2


def _of_times(spent: Table) -> str:
    """Seconds by model and length."""
    timed, lines = sorted({r["rows"] for r in spent}), []
    for (name,) in distinct(spent, "model"):
        mine = {r["rows"]: r["seconds"] for r in where(spent, model=name)}
        lines.append([name, *(seconds(mine[n]) if n in mine else f"({_long(exact_seconds(spent, n))})" for n in timed)])
    return markdown(lines, ["attention", *(f"{n:,}" for n in timed)])


def _runs(rows: Table, spent: Table) -> str:
    """How long the longest training took, and how long it would take exactly."""
    longest = max(where(ended(rows), model="pairs"), key=lambda r: r["trained"])
    run, sequences = longest["seconds"], longest["steps"] * longest["batch"]
    return (
        f"The {longest['steps']:,} steps of pairs at {longest['trained']:,} readings took {_long(run)} of processor time. "
        f"The same steps by all pairs\nwould take {_long(sequences * exact_seconds(spent, longest['trained']))}."
    )


def _long(number: float) -> str:
    """A time that may be days."""
    if number < 7200:
        return seconds(number)
    return f"{number / 3600:.1f} h" if number < 48 * 3600 else f"{number / 86400:.1f} days"


def _words(rows: Table) -> str:
    """How accuracy goes with length, by pairs and by single readings."""
    home = {n: 100 * sum(found) / len(found) for n, found in at_home(rows, "pairs").items()}
    low, high = min(home), max(home)
    ordinary = [100 * r for m in MODELS if "nn." in m for found in at_home(rows, m).values() for r in found]
    by_hand_too = 100 * where(rows, model=BY_HAND, rows=high)[0]["right"]
    return (
        f"Pairs go from {home[low]:.1f} % at {low:,} readings to {home[high]:.1f} % at {high:,}; set by hand, the same layer does "
        f"{by_hand_too:.1f} % there.\nOrdinary attention stays between {min(ordinary):.1f} and {max(ordinary):.1f} %."
    )


def main() -> None:
    """Measure, and write what was found."""
    parser = shared.options(__doc__, steps=300, quick_steps=5, batch=16, rate=3e-2)
    parser.add_argument("--seeds", type=int, help="3; 1 if quick")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "ROWS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measured(given.measure[0], int(given.measure[1]))))
        return
    given.seeds = given.seeds or (1 if given.quick else 3)
    shared.run(NAME, given, PARTS, plot, page)


if __name__ == "__main__":
    main()
