"""What attention over pairs can do, and what it cannot: the measured figures of all examples on one page and in one picture.

`python -m examples.overview` reads the tables in docs/examples and writes overview.md and overview.png there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from evidence.plots import COLOURS, MARKERS, panels, save_plot, style
from evidence.tables import Table, column, distinct, load, markdown, seconds, short, where

from . import language_model, learning, noisy_triples, triple_detection, two_hops, what_followed

FOLDER = Path("docs/examples")
TABLES = (
    "triple_detection-curves", "triple_detection-lengths", "three_modalities-curves", "drop_in-losses", "drop_in-lengths",
    "noisy_triples-accuracies", "noisy_triples-times", "two_hops-curves", "two_hops-times", "what_followed-curves",
    "language_model-curves", "sphere_triplets-sums", "sphere_triplets-triangles",
)  # fmt: skip


def page(tables: dict[str, Table]) -> str:
    """What the tables say together."""
    heads = ["example", "statistic", "rows", "by pairs", "by single rows", "time of pairs", "exact"]
    lines = [
        _triples(tables), _noisy(tables), _hops(tables), _followers(tables), _modalities(tables), _text(tables),
        _language(tables), _sums(tables),
    ]  # fmt: skip
    numbers = where(tables["triple_detection-lengths"], kind="more numbers")
    falls = ", ".join(f"{100 * r['before']:.0f} % of {r['numbers']} numbers" for r in numbers)
    return f"""\
# What attention over pairs can do, and what it cannot

<!-- Made by `python -m examples.overview` from the tables beside it. Changes made by hand are lost. -->

![Who is right how often, what it takes, and how exact it is](overview.png)

Left: right answers at the length of training, a mark for each seed and a large one for their mean; the bars are chance, and the
best answer that is known. Middle: processor time, with exact attention to pairs dotted where it is extrapolated. Right: the error
of the sums over triangles, stated and measured.

{markdown(lines, heads)}

*Rows* are those of a sequence that was trained on, or summed over. *Time* is a training step with its gradient for one sequence,
or the whole sum. *Exact* is the same by all pairs, measured or, in brackets, extrapolated from the largest measurement.

## What it can

* **Shares of all pairs.** A bounded head is a mean over all pairs, each weighted between e^−bound and e^bound. If the pairs that
  matter are a constant share of all, the signal is the same at every length, and noise falls as rows are added
  ([noisy triples](noisy_triples.md)).
* **What single rows hardly pass on.** A query that attends to single rows gets a few means. Where the answer is a sum of products
  over a histogram of many values, ordinary attention did not learn it, with equal or with several times the parameters
  ([triple detection](triple_detection.md), [noisy triples](noisy_triples.md)).
* **In one layer what single rows do in two.** A join of two rows by what both contain, or by how they stand to each other, is one
  score over pairs ([two hops](two_hops.md), [what followed](what_followed.md)). {_two_layers(tables)}
* **Sums with a stated error.** Without learning it is a fast sum over pairs for each of n points, to the tolerance asked for
  ([triangles](sphere_triplets.md)).

## What it cannot

* **One pair among many.** With n numbers a single pair is 2 / n² of the crowd. Trained on {triple_detection.LENGTH} numbers,
  the layer is right for {falls}.
* **Pick one pair in long sequences.** A pair of rows next to each other is one in n: it takes a large bound, exactly, over short
  sequences or windows ([what followed](what_followed.md)). The triangles at an edge of a graph with N nodes are fewer still, about
  N of N⁴ pairs of edges, so that there is no example of them here.
* **Gain where single rows do.** With three sources of one bit each, or a text of this size, pairs are within the spread of seeds
  or behind ([three modalities](three_modalities.md), [drop-in](drop_in.md)).
* **Beat what knows more.** On a sphere, harmonics take less time than attention to pairs, which is for scores that nobody has a
  transform for ([triangles](sphere_triplets.md)).
* **Be as cheap as single rows.** A step takes {_ratio(tables["noisy_triples-times"])} times as long as one of ordinary attention
  with about as many parameters, at {_range(tables["noisy_triples-times"])} rows ([noisy triples](noisy_triples.md)).
"""


def _seeds(rows: Table, **which: object) -> str:
    """The last accuracy of every seed."""
    mine = where(rows, **which)
    return ", ".join(f"{100 * where(mine, seed=s)[-1]['right']:.1f}" for (s,) in distinct(mine, "seed")) + " %"


def _triples(tables: dict[str, Table]) -> list[str]:
    rows = tables["triple_detection-curves"]
    pairs, *single = (name for (name,) in distinct(rows, "model"))
    sequences = where(tables["triple_detection-lengths"], kind="more rows")
    return [
        "[triple detection](triple_detection.md)", "is there a pair that completes a number to 0 mod M",
        f"{triple_detection.LENGTH}", _seeds(rows, model=pairs), _seeds(rows, model=single[-1]),
        f"{seconds(sequences[0]['seconds'])} (forward)", "the same: score by score",
    ]  # fmt: skip


def _noisy(tables: dict[str, Table]) -> list[str]:
    rows, spent = tables["noisy_triples-accuracies"], tables["noisy_triples-times"]
    n = max(r["trained"] for r in where(rows, model="pairs"))
    home = noisy_triples.at_home(rows, "pairs")[n]
    ordinary = [
        100 * r
        for m in noisy_triples.MODELS
        if "nn." in m
        for found in noisy_triples.at_home(rows, m).values()
        for r in found
    ]
    timed = {r["rows"]: r["seconds"] for r in where(spent, model="pairs")}
    at = min(timed, key=lambda m: abs(m - n))
    return [
        "[noisy triples](noisy_triples.md)", "the same, of hidden numbers that many unreliable readings tell",
        f"{n:,}", ", ".join(f"{100 * r:.1f}" for r in home) + " %", f"{min(ordinary):.1f} to {max(ordinary):.1f} %, as trained",
        f"{seconds(timed[at])} at {at:,}", f"({seconds(noisy_triples.exact_seconds(spent, at))})",
    ]  # fmt: skip


def _hops(tables: dict[str, Table]) -> list[str]:
    rows, spent = tables["two_hops-curves"], tables["two_hops-times"]
    timed = {r["rows"]: r["seconds"] for r in where(spent, model=two_hops.PAIRS)}
    exact = {r["rows"]: r["seconds"] for r in where(spent, model="pairs, exact")}
    n, last = max(timed), max(exact)
    pairs, one, two = (_of_seeds(learning.ends(rows, name), two_hops.TRAINED) for name in two_hops.MODELS)
    return [
        "[two hops](two_hops.md)", "g(f(x)) from noisy statements about f and about g", f"2 · {two_hops.TRAINED}",
        pairs, f"{one}; two layers {two}", f"{seconds(timed[n])} at {n:,}", f"({seconds(exact[last] * (n / last) ** 2)})",
    ]  # fmt: skip


def _followers(tables: dict[str, Table]) -> list[str]:
    rows = tables["what_followed-curves"]
    pairs, _, one, _, two = (_of_seeds(learning.ends(rows, n), what_followed.TRAINED) for n in what_followed.MODELS)
    first = where(learning.ends(rows, what_followed.PAIRS), rows=what_followed.TRAINED)[0]
    return [
        "[what followed](what_followed.md)", "what mostly stood behind this symbol before (causal, rotary)",
        f"{what_followed.TRAINED}", pairs, f"{one}; two layers {two}",
        f"{seconds(first['seconds'] / first['steps'] / first['batch'])} (exact)", "the same",
    ]  # fmt: skip


def _of_seeds(rows: Table, n: int) -> str:
    """What the finished nets do at `n` rows, seed by seed."""
    return ", ".join(f"{100 * r:.1f}" for r in column(where(rows, rows=n), "right")) + " %"


def _two_layers(tables: dict[str, Table]) -> str:
    """What two layers of ordinary attention make of that."""

    def mean(module: Any, name: str) -> float:
        return learning.mean_right(learning.ends(tables[f"{module.NAME}-curves"], name), module.TRAINED)

    of_hops, of_followers = (
        " and ".join(f"{mean(module, name):.0f}" for name in (module.PAIRS, list(module.MODELS)[-1]))
        for module in (two_hops, what_followed)
    )
    return f"""In the mean of
  the seeds such a layer and two of ordinary attention, trained in about the same time or less, are right for {of_hops} % of
  the first, for {of_followers} % of the second."""


def _modalities(tables: dict[str, Table]) -> list[str]:
    rows = tables["three_modalities-curves"]
    pairs, single = (name for (name,) in distinct(rows, "attention"))
    return [
        "[three modalities](three_modalities.md)", "one of three bits says which of the others counts", "64",
        _seeds(rows, attention=pairs), _seeds(rows, attention=single), "–", "–",
    ]  # fmt: skip


def _text(tables: dict[str, Table]) -> list[str]:
    rows, long = tables["drop_in-losses"], tables["drop_in-lengths"]
    ends = {name: where(rows, attention=name)[-1]["unseen"] for (name,) in distinct(rows, "attention")}
    single, pairs, *_ = ends
    top = max(where(long, attention=pairs), key=lambda r: r["rows"])
    return [
        "[drop-in](drop_in.md)", "masked characters of a text", "256", f"{ends[pairs]:.3f} nats", f"{ends[single]:.3f} nats",
        f"{seconds(top['seconds'])} at {top['rows']:,}", "–",
    ]  # fmt: skip


def _language(tables: dict[str, Table]) -> list[str]:
    rows, n = tables["language_model-curves"], language_model.TRAINED
    ends = {m: where(learning.ends(rows, m), rows=n) for m in (language_model.BOTH, language_model.ORDINARY)}
    pairs, single = (", ".join(f"{b:.2f}" for b in column(found, "bits")) + " bits" for found in ends.values())
    first = ends[language_model.BOTH][0]
    return [
        "[language model](language_model.md)", "next byte of a text, after few steps (causal, rotary)", f"{n:,}", pairs, single,
        f"{seconds(first['seconds'] / first['steps'] / first['batch'])} (whole net)", "–",
    ]  # fmt: skip


def _sums(tables: dict[str, Table]) -> list[str]:
    rows, every = tables["sphere_triplets-sums"], tables["sphere_triplets-triangles"][-1]
    last = rows[-1]
    hours = every["seconds"] * (last["points"] / every["points"]) ** 3 / 3600
    return [
        "[triangles](sphere_triplets.md)", "sum over triangles with a smooth kernel, not learned", f"{last['points']:,}",
        f"error {short(last['measured'])}, stated {short(last['stated'])}", "–", seconds(last["seconds"]), f"({hours:.1f} h)",
    ]  # fmt: skip


def _ratio(spent: Table) -> str:
    """How many times as long pairs take as ordinary attention."""
    ordinary = {r["rows"]: r["seconds"] for r in where(spent, model="nn.MultiheadAttention, equal")}
    ratios = [r["seconds"] / ordinary[r["rows"]] for r in where(spent, model="pairs")]
    return f"{min(ratios):.0f} to {max(ratios):.0f}"


def _range(spent: Table) -> str:
    lengths = column(where(spent, model="pairs"), "rows")
    return f"{min(lengths):,} to {max(lengths):,}"


class Shares(NamedTuple):
    """An example by its right answers, in %: chance, those of every seed by attention, and the best that is known."""

    name: str
    chance: float
    pairs: list[float]
    single: list[float]
    deeper: list[float]
    best: float | None


def _shares(tables: dict[str, Table]) -> list[Shares]:
    """All examples that answer questions."""
    found = []
    rows = tables["triple_detection-curves"]
    pairs, *_, wide = (name for (name,) in distinct(rows, "model"))
    ends = {m: [where(rows, model=m, seed=s)[-1]["right"] for (s,) in distinct(rows, "seed")] for m in (pairs, wide)}
    found.append(Shares("triple detection, n = 12", rows[0]["majority"], ends[pairs], [], ends[wide], None))
    rows = noisy_triples.ended(tables["noisy_triples-accuracies"])
    n = max(r["trained"] for r in where(rows, model="pairs"))
    equal, wide = (noisy_triples.at_home(rows, m).get(n, []) for m in noisy_triples.MODELS if "nn." in m)
    best = where(rows, model=noisy_triples.COUNTED, rows=n)[0]
    home = noisy_triples.at_home(rows, "pairs")[n]
    found.append(Shares(f"noisy triples, n = {n:,}", best["majority"], home, equal, wide, best["right"]))
    for module, part, which in ((two_hops, "two_hops", (0, 1, 2)), (what_followed, "what_followed", (0, 2, 4))):
        rows, n, models = tables[f"{part}-curves"], module.TRAINED, list(module.MODELS)
        three = [column(where(learning.ends(rows, models[i]), rows=n), "right") for i in which]
        best = max(r["right"] for r in where(rows, rows=n) if not r["steps"])
        chance = 1 / (two_hops.NAMES if part == "two_hops" else what_followed.SYMBOLS)
        found.append(Shares(f"{part.replace('_', ' ')}, n = {n}", chance, *three, best))
    rows = tables["three_modalities-curves"]
    two = [
        [where(rows, attention=m, seed=s)[-1]["right"] for (s,) in distinct(rows, "seed")]
        for (m,) in distinct(rows, "attention")
    ]
    found.append(Shares("three modalities, n = 64", 0.5, *two, [], None))
    return found


def plot(tables: dict[str, Table]) -> Any:
    """Right answers of all examples; times against rows; stated and measured errors."""
    figure, ((of_right, of_time, of_error),) = panels(3, height=4.4)
    _plot_right(of_right, _shares(tables))
    _plot_times(of_time, tables)
    rows = tables["sphere_triplets-sums"]
    for i, (tol,) in enumerate(distinct(rows, "tol")):
        mine = where(rows, tol=tol)
        for what, line in (("stated", "-"), ("measured", "--")):
            label = f"{what}, tol = {tol:g}"
            of_error.plot(column(mine, "points"), column(mine, what), **style(i, label=label, linestyle=line))
    of_error.set_xscale("log", base=2)
    of_error.set(
        yscale="log", xlabel="points", ylabel="error of the mean, of the largest value", title="sums over triangles"
    )
    of_error.set_ylim(1e-13, None)
    of_error.legend(fontsize="x-small", loc="lower left")
    return figure


def _plot_right(axis: Any, examples: list[Shares]) -> None:
    """A line for every example: chance, ordinary attention, pairs, and what can be had."""
    marks = (
        ("pairs", "pairs, one layer", 0),
        ("single", "single rows, one layer", 1),
        ("deeper", "single rows, wider or two layers", 2),
    )
    for y, example in enumerate(examples):
        for field, label, i in marks:
            right = [100 * r for r in getattr(example, field)]
            axis.plot(
                right, [y] * len(right), color=COLOURS[i], marker=MARKERS[i], linestyle="", markersize=4, alpha=0.4
            )
            if right:
                mean, name = sum(right) / len(right), None if y else label
                axis.plot([mean], [y], color=COLOURS[i], marker=MARKERS[i], linestyle="", markersize=8, label=name)
        for limit in (example.chance, example.best):
            if limit is not None:
                axis.plot([100 * limit] * 2, [y - 0.25, y + 0.25], color="#000000", linewidth=1.5)
    # The first example has no single rows of one narrow layer.
    axis.plot([], [], color=COLOURS[1], marker=MARKERS[1], linestyle="", markersize=8, label=marks[1][1])
    axis.set_yticks(range(len(examples)), [example.name.replace(", ", "\n") for example in examples], fontsize="small")
    axis.set(xlabel="% right", xlim=(0, 103), ylim=(len(examples) + 0.3, -0.6), title="who is right, by example")
    axis.legend(fontsize="x-small", loc="lower left")


def _plot_times(axis: Any, tables: dict[str, Table]) -> None:
    """Steps of training for one sequence, and whole sums; exact attention to pairs as it grows."""
    spent = tables["noisy_triples-times"]
    sums = where(tables["sphere_triplets-sums"], tol=1e-6)
    every = tables["sphere_triplets-triangles"][-1]
    lines = [
        ("noisy triples, pairs", where(spent, model="pairs"), "rows", 0),
        ("noisy triples, single rows", where(spent, model="nn.MultiheadAttention, equal"), "rows", 1),
        ("two hops, pairs", where(tables["two_hops-times"], model=two_hops.PAIRS), "rows", 2),
        ("triangles, tol = 1e-6", sums, "points", 3),
    ]
    for label, rows, name, i in lines:
        axis.plot(column(rows, name), column(rows, "seconds"), **style(i, label=label))
    lengths = column(where(spent, model="pairs"), "rows")
    exact = [noisy_triples.exact_seconds(spent, n) for n in lengths]
    axis.plot(lengths, exact, color=COLOURS[0], linestyle=":", label="noisy triples, pairs exactly")
    points = column(sums, "points")
    cubes = [every["seconds"] * (n / every["points"]) ** 3 for n in points]
    axis.plot(points, cubes, color=COLOURS[3], linestyle=":", label="triangles, one by one")
    axis.set_xscale("log", base=2)
    axis.set(yscale="log", xlabel="rows", ylabel="processor seconds", title="a step for one sequence, or a whole sum")
    axis.legend(fontsize="x-small", loc="upper left")


def main() -> None:
    """Write the page and its picture."""
    tables = {name: load(FOLDER / f"{name}.csv") for name in TABLES}
    save_plot(plot(tables), FOLDER / "overview.png")
    (FOLDER / "overview.md").write_text(page(tables), encoding="utf-8")


if __name__ == "__main__":
    main()
