"""Practicality of the assumption: entries and scores of a trained encoder's heads, and the degrees that serve them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from math import log
from typing import Any

import numpy as np

from tattn.checks import checked_inputs
from tattn.features.monomials import rank
from tattn.planning import measured, plan
from tattn.planning.settings import MAX_RANK

from .border import needed
from .demo import encoder
from .plots import panels, style
from .tables import Row, Table, column, distinct, listed, markdown, short, where

_TOLS = (1e-1, 1e-2, 1e-3)
_DEGREES = (1, 2, 3, 4)
_TEXTS = ("reference", "library")


def check() -> None:
    """Raise with what to install if the encoder's packages are missing."""
    try:
        encoder.heads(1, layers=[0])
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"the part 'heads' needs the encoder: {error}") from error


def measure(quick: bool, watch: Callable[..., Iterable[Any]]) -> dict[str, Table]:
    """Ranges and the degrees that serve every head."""
    tokens, layers, step = (512, [0], 3) if quick else (4096, range(6), 1)
    found = {(text, layer): x for text in _TEXTS for layer, x in encoder.heads(tokens, text, layers=layers).items()}
    rows = []
    for (text, layer), head in watch([(key, head) for key in found for head in range(0, 12, step)]):
        arrays = found[text, layer]
        rows.append({"text": text, "layer": layer, "head": head, "tokens": tokens}
                    | _head(arrays.queries[head], arrays.keys[head], arrays.values[head]))  # fmt: skip
    return {"heads": rows, "heads-served": served(rows)}


def _head(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> Row:
    """One head read as q, keys (k, k) and values (v, v), scale 1/d."""
    dim = q.shape[1]
    rng = np.random.default_rng(0)
    queries, keys = (x[rng.permutation(len(x))[:size]] for x, size in ((q, 64), (k, 256)))
    scores = np.concatenate([(row * keys) @ keys.T / dim for row in queries])
    ranges = measured(checked_inputs(q, [k, k], [v, v], None), 1 / dim)
    row = {
        "dim": dim,
        "entry_query": float(np.abs(q).max()),
        "entry_key": float(np.abs(k).max()),
        "score_deviation": float(scores.std()),
        "score_sampled": float(np.abs(scores).max()),
        "range_certified": ranges.bound,
        "range_entries": ranges.entries,
    }
    for tol in _TOLS:
        row[f"degree_certified_{tol:g}"] = needed(tol, ranges.bound)
    for degree in _DEGREES:
        row[f"error_degree_{degree}"] = plan(q, [k, k], [v, v], bound="estimated", degree=degree).error
    return row


def served(rows: Table) -> Table:
    """For every error and degree, the share of heads that it serves, by estimate and certified beforehand."""
    found = []
    for (text,) in distinct(rows, "text"):
        mine = where(rows, text=text)
        for tol in _TOLS:
            for degree in count(1):
                certified = float(np.mean([row[f"degree_certified_{tol:g}"] <= degree for row in mine]))
                estimated: float | str = ""
                if degree in _DEGREES:
                    estimated = float(np.mean([row[f"error_degree_{degree}"] <= tol for row in mine]))
                found.append(
                    {"text": text, "tol": tol, "degree": degree, "estimated": estimated, "certified": certified}
                )
                if degree >= _DEGREES[-1] and (certified == 1 or degree >= 150):
                    break
    return found


def plots(tables: dict[str, Table]) -> dict[str, Any]:
    """Ranges of all heads, and the share that each degree serves."""
    rows, shares = tables["heads"], tables["heads-served"]
    texts = [t for (t,) in distinct(rows, "text")]
    figure, ((ranges, estimated, certified),) = panels(3, height=4.0)
    kinds = (
        ("score_deviation", "deviation of the scores"),
        ("score_sampled", "largest sampled |score|"),
        ("range_certified", "certified range"),
        ("range_entries", "by entries, the paper's B³"),
    )
    mine = sorted(where(rows, text=texts[0]), key=lambda row: row["score_sampled"])
    for i, (name, label) in enumerate(kinds):
        ranges.semilogy(range(len(mine)), column(mine, name), **style(i, linestyle="", label=label))
    ranges.set(xlabel="heads, by largest score", ylabel="score", title=f"ranges, text '{texts[0]}'")
    ranges.legend(fontsize="x-small")
    for i, tol in enumerate(_TOLS):
        for text, dashes in zip(texts, ("-", "--"), strict=False):
            line = where(shares, text=text, tol=tol)
            look = style(i, linestyle=dashes, label=f"error {tol:g}, {text}")
            known = [row for row in line if row["estimated"] != ""]
            estimated.plot(column(known, "degree"), [100 * x for x in column(known, "estimated")], **look)
            certified.plot(
                column(line, "degree"), [100 * x for x in column(line, "certified")], **{**look, "marker": ""}
            )
    estimated.set(
        xlabel="degree", xticks=_DEGREES, ylabel="% of heads", title="served, estimated on samples", ylim=(-4, 104)
    )
    certified.set(
        xlabel="degree", xscale="log", ylabel="% of heads", title="served, certified beforehand", ylim=(-4, 104)
    )
    estimated.legend(fontsize="x-small")
    return {"heads": figure}


def words(tables: dict[str, Table]) -> str:
    """What the tables say."""
    rows, shares = tables["heads"], tables["heads-served"]
    texts = [t for (t,) in distinct(rows, "text")]
    tokens, dim = rows[0]["tokens"], rows[0]["dim"]
    per_text = len(rows) // len(texts)
    lines = []
    for name, title in (
        ("entry_query", "B of the query: largest entry"),
        ("entry_key", "B of the keys: largest entry"),
        ("range_entries", "range by entries, the paper's B³"),
        ("range_certified", "range certified by the library"),
        ("score_sampled", "largest score, sampled"),
        ("score_deviation", "standard deviation of the scores"),
    ):
        values = [column(where(rows, text=text), name) for text in texts]
        lines.append([title, *(f"{short(min(x))} / {short(float(np.median(x)))} / {short(max(x))}" for x in values)])
    estimated = [
        [
            f"{tol:g}",
            *(
                " / ".join(
                    f"{100 * where(shares, text=text, tol=tol, degree=g)[0]['estimated']:.0f} %" for text in texts
                )
                for g in _DEGREES
            ),
            " / ".join(_reach(where(shares, text=text, tol=tol), 0.5) for text in texts),
            " / ".join(_reach(where(shares, text=text, tol=tol), 1.0) for text in texts),
        ]
        for tol in _TOLS
    ]
    paid = max(row["certified"] for row in shares if row["degree"] in _DEGREES)
    within = float(np.mean([max(row["entry_query"], row["entry_key"]) <= log(tokens) ** (1 / 3) for row in rows]))
    heads_title = [*(f"degree {g}, estimated" for g in _DEGREES), "half of the heads, certified", "all, certified"]
    third = log(tokens) ** (1 / 3)
    return f"""\
{per_text} heads of the trained sentence encoder all-MiniLM-L6-v2 (that of `python -m evidence demo`), each for
{listed(texts)}, two texts that come with Python, {tokens:,} tokens each: query q, keys (k, k), values (v, v), d = {dim},
scale 1/d. The heads were trained for ordinary attention; as tensor attention they stand in for heads that nobody has
trained yet, with entries of real size.

Least / median / largest over the heads:

{markdown(lines, ["", *texts])}

The theorem's B is far from met as it stands: (ln n)^(1/3) is {third:.2f} here, and {100 * within:.0f} % of the heads
have all entries within it. Scores are much smaller than B³, since large entries do not meet.

![Ranges of the heads and the share that each degree serves](heads.png)

Share of the heads that a degree serves, {" / ".join(texts)}. "Estimated": the error of all sampled rows is within the
tolerance, with a polynomial fitted to sampled scores; this is no bound. "Certified": the least degree with which any
polynomial is certified beforehand, on the certified range, for half of the heads and for all:

{markdown(estimated, ["error", *heads_title])}

Of all heads {100 * paid:.0f} % have a certificate made beforehand with a degree up to {_DEGREES[-1]}, at the most generous
error; and rank C({dim} + g, g) is {rank(dim, _DEGREES[-1]):,} there, {rank(dim, _DEGREES[-1] + 1):,} for one degree more, where the
library stops at {MAX_RANK:,}. So for raw heads the worst case and the usual case are far apart. The certificate that comes with
the answer ([error bounds](../errors.md)) is made for them; it is no part of this table.

Tables: [all heads](heads.csv), [shares](heads-served.csv)."""


def _reach(rows: Table, share: float) -> str:
    """The least degree that serves a share, certified."""
    return next((str(row["degree"]) for row in rows if row["certified"] >= share), f"> {rows[-1]['degree']}")
