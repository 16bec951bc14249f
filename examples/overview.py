"""What attention over pairs can do, and what it cannot: the measured figures of all examples on one page.

`python -m examples.overview` reads the tables in docs/examples and writes docs/examples/overview.md.
"""

from __future__ import annotations

from pathlib import Path

from evidence.tables import Table, column, distinct, load, markdown, seconds, short, where

from . import noisy_triples, triple_detection

FOLDER = Path("docs/examples")
TABLES = (
    "triple_detection-curves", "triple_detection-lengths", "three_modalities-curves", "drop_in-losses", "drop_in-lengths",
    "noisy_triples-accuracies", "noisy_triples-times", "sphere_triplets-sums", "sphere_triplets-triangles",
)  # fmt: skip


def page(tables: dict[str, Table]) -> str:
    """What the tables say together."""
    heads = ["example", "statistic", "rows", "by pairs", "by single rows", "time of pairs", "exact"]
    lines = [_triples(tables), _noisy(tables), _modalities(tables), _text(tables), _sums(tables)]
    numbers = where(tables["triple_detection-lengths"], kind="more numbers")
    falls = ", ".join(f"{100 * r['before']:.0f} % of {r['numbers']} numbers" for r in numbers)
    return f"""\
# What attention over pairs can do, and what it cannot

<!-- Made by `python -m examples.overview` from the tables beside it. Changes made by hand are lost. -->

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
* **Sums with a stated error.** Without learning it is a fast sum over pairs for each of n points, to the tolerance asked for
  ([triangles](sphere_triplets.md)).

## What it cannot

* **One pair among many.** With n numbers a single pair is 2 / n² of the crowd. Trained on {triple_detection.LENGTH} numbers,
  the layer is right for {falls}.
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


def main() -> None:
    """Write the page."""
    tables = {name: load(FOLDER / f"{name}.csv") for name in TABLES}
    (FOLDER / "overview.md").write_text(page(tables), encoding="utf-8")


if __name__ == "__main__":
    main()
