"""An answer that needs three sources at once: an image, a text and a series, joined by one layer of attention to pairs.

Real data that Python packages bring along: images of handwritten digits (scikit-learn), English prose and source code (Python
itself), the yearly number of sunspots since 1700 (statsmodels). Each source gives one bit: is the digit odd, is the text code, did
the sun grow more active? The text says which of the other two is asked for: the digit's if it is code, the sun's if it is prose.

`python -m examples.three_modalities` trains a layer of tensor cross-attention, and one of ordinary attention on all rows put one
after another, and writes tables, a plot and a page into docs/examples; with --quick, which learns nothing, into build/examples.
"""

from __future__ import annotations

import argparse
import argparse as some_code
import inspect
import json as more_code
import textwrap as last_code
import time
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tattn
from evidence.plots import panels, style
from evidence.tables import Table, column, distinct, markdown, seconds, where

from . import shared

NAME = "three_modalities"
WIDTH, HEADS = 32, 4
CHARACTERS, YEARS = 32, 24
SOURCES = ("image", "text", "series")


class Sources(NamedTuple):
    """Images (count, 8, 8) and their bits; prose and code, as numbers; sunspots of successive years, scaled."""

    images: Tensor
    odd: Tensor
    prose: Tensor
    code: Tensor
    spots: Tensor

    def batch(self, size: int, rng: torch.Generator) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """Rows of the three sources, (size, 8, 8), (size, 32) and (size, 24, 1), drawn apart, and the three bits (size, 3)."""

        def pieces(source: Tensor, length: int) -> Tensor:
            return source[torch.randint(0, len(source) - length, (size, 1), generator=rng) + torch.arange(length)]

        which = torch.randint(0, len(self.images), (size,), generator=rng)
        is_code = torch.rand(size, generator=rng) < 0.5
        prose, code = (pieces(text, CHARACTERS) for text in (self.prose, self.code))
        years = pieces(self.spots, YEARS)
        rises = years[:, -4:].mean(1) > years[:, -8:-4].mean(1)
        bits = torch.stack([self.odd[which], is_code, rises], 1)
        text = torch.where(is_code[:, None], code, prose)
        return (self.images[which], text, years[..., None]), bits


def wanted(bits: Tensor) -> Tensor:
    """The answer (...) to bits (..., 3): the text's says whether the image's or the series' counts."""
    return torch.where(bits[..., 1], bits[..., 0], bits[..., 2])


def sources() -> tuple[Sources, Sources, int]:
    """What is learned from, and what is judged by, without overlap; and how many characters there are."""
    # Here, so that the page can be made without them.
    from sklearn.datasets import load_digits
    from statsmodels.datasets import sunspots

    digits = load_digits()
    images, odd = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target % 2 == 1)
    prose = "\n".join(topics[name] for name in sorted(topics))
    code = "\n".join(inspect.getsource(module) for module in (some_code, more_code, last_code))
    alphabet = {c: i for i, c in enumerate(sorted(set(prose + code)))}
    texts = [torch.tensor([alphabet[c] for c in text]) for text in (prose, code)]
    spots = torch.tensor(sunspots.load_pandas().data["SUNACTIVITY"].to_numpy(), dtype=torch.float32) / 60 - 1

    def cut(first: bool) -> Sources:
        parts = [
            x[: int(share * len(x))] if first else x[int(share * len(x)) :]
            for x, share in ((images, 0.8), (odd, 0.8), (texts[0], 0.8), (texts[1], 0.8), (spots, 0.7))
        ]
        return Sources(*parts)

    return cut(True), cut(False), len(alphabet)


class Rows(nn.Module):
    """Rows of every source on one width, each through a small network of its own."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(8, WIDTH), nn.Embedding(characters, WIDTH), nn.Linear(1, WIDTH)])
        self.places = nn.ParameterList(0.1 * torch.randn(n, WIDTH) for n in (8, CHARACTERS, YEARS))
        self.second = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in SOURCES
        )

    def forward(self, given: tuple[Tensor, ...]) -> list[Tensor]:
        """Three arrays (..., rows, WIDTH)."""
        rows = [first(x) + place for first, x, place in zip(self.first, given, self.places, strict=True)]
        return [x + second(x) for x, second in zip(rows, self.second, strict=True)]


class Pairs(nn.Module):
    """From every row of the image to all pairs (character, year)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = tattn.nn.TensorAttention(WIDTH, HEADS, bound=2.0, degree=4)

    def forward(self, image: Tensor, text: Tensor, series: Tensor) -> Tensor:
        """(..., rows of the image, WIDTH)."""
        return self.attention(image, (text, series))


class Concatenated(nn.Module):
    """From every row of the image to all rows, which know where they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Parameter(0.1 * torch.randn(len(SOURCES), WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, *rows: Tensor) -> Tensor:
        """(..., rows of the image, WIDTH)."""
        together = torch.cat([x + kind for x, kind in zip(rows, self.kinds, strict=True)], 1)
        return self.attention(rows[0], together, together, need_weights=False)[0]


class Net(nn.Module):
    """Rows, one layer of attention, its mean and that of the image, and an MLP for one logit."""

    def __init__(self, characters: int, attention: nn.Module, hidden: int) -> None:
        super().__init__()
        self.rows, self.attention = Rows(characters), attention
        self.read = nn.Sequential(
            nn.LayerNorm(2 * WIDTH), nn.Linear(2 * WIDTH, hidden), nn.GELU(), nn.Linear(hidden, 1)
        )

    def forward(self, given: tuple[Tensor, ...]) -> Tensor:
        """Logits (...)."""
        rows = self.rows(given)
        return self.read(torch.cat([self.attention(*rows).mean(-2), rows[0].mean(-2)], -1))[..., 0]


# The MLP of the second is wider, so that parameters are about as many.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "pairs (text, series)": (Pairs, 64),
    "all rows, one after another": (Concatenated, 96),
}


def answers(net: Net, judge: Sources, shuffled: int | None = None) -> float:
    """Share of right answers; with the rows of one source exchanged between examples, if asked for."""
    given, bits = judge.batch(1000, torch.Generator().manual_seed(10**6))
    if shuffled is not None:
        given = tuple(x.roll(1, 0) if i == shuffled else x for i, x in enumerate(given))
    with torch.no_grad():
        return float(((net(given) > 0) == (wanted(bits))).float().mean())


def curves(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """Share of right answers on unseen data during training, for both and all seeds."""
    learn, judge, characters = sources()
    rows = []
    for name, (attention, hidden) in MODELS.items():
        for seed in range(given.seed, given.seed + (1 if given.quick else 3)):
            torch.manual_seed(seed)
            net = Net(characters, attention(), hidden)
            optimiser = torch.optim.AdamW(net.parameters(), given.rate, weight_decay=0.05)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, given.rate, given.steps, pct_start=0.1)
            rng = torch.Generator().manual_seed(seed)
            start = time.process_time()
            for step in watch(range(1, given.steps + 1), f"{name}, seed {seed}"):
                rows_of, bits = learn.batch(given.batch, rng)
                loss = nn.functional.binary_cross_entropy_with_logits(net(rows_of), wanted(bits).float())
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                if step % max(1, given.steps // 10) == 0 or step == given.steps:
                    rows.append({
                        "attention": name, "seed": seed, "step": step, "loss": loss.item(), "right": answers(net, judge),
                        **{f"without {s}": answers(net, judge, i) for i, s in enumerate(SOURCES)},
                        "seconds": time.process_time() - start, "parameters": sum(p.numel() for p in net.parameters()),
                    })  # fmt: skip
    return rows


PARTS: dict[str, shared.Part] = {"curves": curves}


def plot(rows: Table) -> Any:
    """Right answers against steps, a line for every seed."""
    figure, ((axis,),) = panels(1, height=4.0)
    figure.set_size_inches(7, 4)
    for i, (name,) in enumerate(distinct(rows, "attention")):
        for j, (seed,) in enumerate(distinct(where(rows, attention=name), "seed")):
            mine = where(rows, attention=name, seed=seed)
            right = [100 * r for r in column(mine, "right")]
            axis.plot(column(mine, "step"), right, **style(i, label=None if j else name))
    axis.axhline(75, color="#000000", linestyle=":", linewidth=1)
    axis.set(xlabel="steps", ylabel="% right, unseen data", ylim=(45, 101))
    axis.legend(fontsize="small")
    return figure


def page(tables: dict[str, Table]) -> str:
    """What the table says."""
    rows = tables["curves"]
    lines = []
    for (name,) in distinct(rows, "attention"):
        ends = [where(rows, attention=name, seed=s)[-1] for (s,) in distinct(where(rows, attention=name), "seed")]
        lines.append(
            [name, f"{ends[0]['parameters']:,}", ", ".join(f"{100 * e['right']:.1f} %" for e in ends)]
            + [f"{100 * sum(e[f'without {s}'] for e in ends) / len(ends):.0f} %" for s in SOURCES]
            + [seconds(sum(e["seconds"] for e in ends) / len(ends))]
        )
    heads = [
        "attention",
        "parameters",
        "right, seed by seed",
        *(f"{s} exchanged" for s in SOURCES),
        "processor time of a run",
    ]
    return f"""\
# Three modalities

An image, a text and a series, of 8, {CHARACTERS} and {YEARS} rows. Each tells one bit. The text's says which of the other two is
the answer: the image's if it is code, the series' if it is prose. Without any one of them 75 % can be right at most. The
sources are real, and come with packages; nothing is downloaded when it runs:

{markdown(_SOURCES, ["source", "rows", "from", "licence", "bit"])}

Which image stands beside which text and years is drawn at random: none of the sources is aligned with another by itself.
Images, text and years that are judged by are apart from those that are learned from.

![Right answers during training](three_modalities.png)

*Pairs* is one layer `tattn.nn.TensorAttention({WIDTH}, {HEADS}, bound=2.0, degree=4)` from the rows of the image to all pairs of a
character and a year. Beside it, `nn.MultiheadAttention` from the rows of the image to all rows of the three put one
after another. Everything else is the same, but for an MLP that is wider there. *Exchanged*: the rows of one source are those
of another example.

{markdown(lines, heads)}

{_words(rows)}
"""


_SOURCES = [
    [
        "image", "8 rows of 8 pixels", "handwritten digits of the UCI repository, in scikit-learn",
        "CC BY 4.0, package BSD-3", "the digit is odd",
    ],
    [
        "text", f"{CHARACTERS} characters", "Python's reference (`pydoc_data.topics`), and its modules argparse, json and textwrap",
        "PSF", "it is code",
    ],
    [
        "series", f"{YEARS} years", "sunspots 1700–2008, in statsmodels", "public domain, package BSD-3",
        "more in the last four years than in the four before",
    ],
]  # fmt: skip


def _words(rows: Table) -> str:
    """How far apart they are, beside how far seeds are."""
    of_models = []
    for (name,) in distinct(rows, "attention"):
        mine = where(rows, attention=name)
        of_models.append([100 * where(mine, seed=seed)[-1]["right"] for (seed,) in distinct(mine, "seed")])
    pairs, ordinary = (sum(ends) / len(ends) for ends in of_models)
    spread = max(max(ends) - min(ends) for ends in of_models)
    text = f"In the mean of the seeds pairs are right for {pairs:.1f} %, rows one after another for {ordinary:.1f} %."
    if pairs > ordinary + spread:
        return f"{text} A product of values is what a choice is made of, and a sum of rows leaves all of it to the MLP."
    return (
        f"{text} Seeds differ by up to {spread:.0f} %, so there is little between them: with three bits an MLP after the sum can\n"
        "make the choice. It is among many rows that pairs are needed ([triple detection](triple_detection.md))."
    )


def main() -> None:
    """Measure, and write what was found."""
    given = shared.options(__doc__, steps=400, quick_steps=5, batch=64, rate=3e-3).parse_args()
    shared.run(NAME, given, PARTS, plot, page)


if __name__ == "__main__":
    main()
