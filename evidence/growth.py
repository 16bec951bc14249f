"""Theorem 4.2: time and memory of output and gradient against n, exact beside polynomial."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import exp, inf, isfinite, log
from typing import Any

import numpy as np

from .apart import measured_apart
from .plots import legend_below, panels, style
from .tables import Row, Table, column, distinct, markdown, mebibytes, seconds, short, where

# (d, entries B, eps, largest n); eps is relative for the attention, absolute for dLoss/dX.
_ATTENTION = (
    (4, 1.0, 1e-3, 1 << 19),
    (8, 1.0, 1e-2, 1 << 17),
    (8, 1.0, 1e-3, 1 << 17),
    (8, 1.0, 1e-6, 1 << 15),
    (8, 1.25, 1e-3, 1 << 15),
    (16, 1.0, 1e-3, 1 << 15),
)
_GRADIENT = ((4, 1.0, 1e-2, 1 << 19), (4, 1.0, 1e-4, 1 << 17), (4, 1.25, 1e-2, 1 << 17), (8, 1.0, 1e-1, 1 << 17))
_QUICK = ((8, 1.0, 1e-3, 1 << 11),), ((4, 1.0, 1e-2, 1 << 11),)
# Exponents are fitted to the largest sizes.
_FITTED = 3
TASKS = {"attention": "output and gradient", "gradient": "dLoss/dX"}
METHODS = {"attention": "polynomial", "gradient": "Algorithm 1"}


def measure(quick: bool, watch: Callable[..., Iterable[Any]]) -> dict[str, Table]:
    """Times, memory and errors; exponents and crossings."""
    budget, most_exact, least = (0.1, 128, 32) if quick else (1.0, 512, 16)
    chosen = dict(zip(TASKS, _QUICK if quick else (_ATTENTION, _GRADIENT), strict=True))
    specifications = []
    for task, cases in chosen.items():
        # The time of the exact method depends on neither entries nor eps.
        for dim in dict.fromkeys(dim for dim, *_ in cases):
            specifications += [(task, "exact", n, dim, 1.0, 1e-3) for n in _sizes(least, most_exact)]
        specifications += [
            (task, "polynomial", n, dim, b, eps) for dim, b, eps, most in cases for n in _sizes(least, most)
        ]
    specifications += [("attention", "stored", n, 8, 1.0, 1e-3) for n in _sizes(least, most_exact // 2)]
    rows = []
    for task, method, n, dim, b, eps in watch(specifications):
        given = {"task": task, "method": method, "n": n, "dim": dim, "entries": b, "eps": eps}
        rows.append({**given, **measured_apart({**given, "budget": budget})})
    return {"growth": rows, "growth-exponents": exponents(rows)}


def _sizes(least: int, most: int) -> list[int]:
    """Doubling where methods meet, then fourfold."""
    powers = [least << i for i in range((most // least).bit_length())]
    return [n for n in powers if most <= 512 or n <= 128 or (n // 128).bit_length() % 2]


def exponents(rows: Table) -> Table:
    """For every case: the slope of log time over log n, and where the polynomial method overtakes the exact one."""
    found = []
    for task, method, dim, b, eps in distinct(rows, "task", "method", "dim", "entries", "eps"):
        mine = where(rows, task=task, method=method, dim=dim, entries=b, eps=eps)
        slope = fit(mine)[0]
        crossing: Row = {"crossing": "", "crossing_measured": ""}
        if method == "polynomial":
            at, seen = overtaking(where(rows, task=task, method="exact", dim=dim), mine)
            crossing = {"crossing": at, "crossing_measured": seen}
        last = mine[-1]
        found.append(
            {
                "task": task,
                "method": method,
                "dim": dim,
                "entries": b,
                "eps": eps,
                "degree_least": mine[0]["degree"],
                "degree_most": last["degree"],
                "rank": last["rank"],
                "least_n": mine[0]["n"],
                "from_n": mine[-_FITTED:][0]["n"],
                "to_n": last["n"],
                "exponent": slope,
                "seconds": last["seconds"],
                "exact_would_take": "",
                **crossing,
            }
        )
        if method == "polynomial":
            exact_slope, exact_offset = fit(where(rows, task=task, method="exact", dim=dim))
            found[-1]["exact_would_take"] = exp(exact_offset + exact_slope * log(last["n"]))
    return found


def fit(rows: Table) -> tuple[float, float]:
    """Slope and offset of log seconds over log n, for the largest sizes."""
    largest = rows[-_FITTED:]
    slope, offset = np.polyfit(np.log(column(largest, "n")), np.log(column(largest, "seconds")), 1)
    return float(slope), float(offset)


def overtaking(exact: Table, polynomial: Table) -> tuple[float, bool]:
    """The n from which on the polynomial method is faster, between sizes that both ran; or by the fits, and False.

    0, True where it was faster at every such size.
    """
    times = dict(zip(column(polynomial, "n"), column(polynomial, "seconds"), strict=True))
    both = [(row["n"], log(row["seconds"] / times[row["n"]])) for row in exact if row["n"] in times]
    behind = [i for i, (_, lead) in enumerate(both) if lead <= 0]
    if not behind:
        return 0.0, True
    last = behind[-1]
    if last + 1 < len(both):
        (n, lead), (m, next_lead) = both[last : last + 2]
        return float(exp(log(n) + log(m / n) * -lead / (next_lead - lead))), True
    (slope, offset), (own, own_offset) = fit(exact), fit(polynomial)
    if slope <= own:
        return inf, False
    # Not before the last size at which it was seen to be slower.
    power = (own_offset - offset) / (slope - own)
    return (max(both[-1][0], exp(power)) if power < 700 else inf), False


def plots(tables: dict[str, Table]) -> dict[str, Any]:
    """Time and memory against n."""
    rows = tables["growth"]
    dims = sorted({row["dim"] for row in where(rows, method="exact")})
    figures = {}
    for task in TASKS:
        figure, ((times, memory),) = panels(2, height=4.6)
        cases = distinct(where(rows, task=task), "method", "dim", "entries", "eps")
        number = 0
        for method, dim, b, eps in cases:
            mine = where(rows, task=task, method=method, dim=dim, entries=b, eps=eps)
            if method == "polynomial":
                look = style(number, label=f"{METHODS[task]}, d = {dim}, B = {b:g}, ε = {eps:g}")
                number += 1
            elif method == "exact":
                look = style(
                    6, marker="", linestyle=("-", "--", ":")[dims.index(dim)], label=f"exact, streamed, d = {dim}"
                )
            else:
                look = style(6, linestyle="-.", marker="x", label=f"exact, scores stored, d = {dim}")
            times.loglog(column(mine, "n"), column(mine, "seconds"), **look)
            memory.loglog(column(mine, "n"), [max(x, 1) / 2**20 for x in column(mine, "traced_bytes")], **look)
        times.set(xlabel="n", ylabel="seconds of the processor", title=f"time, {TASKS[task]}")
        memory.set(xlabel="n", ylabel="MiB beyond inputs and outputs", title="memory at the peak")
        legend_below(figure, times, 3)
        figures[f"growth-{task}"] = figure
    return figures


def words(tables: dict[str, Table]) -> str:
    """What the tables say."""
    rows, fits = tables["growth"], tables["growth-exponents"]
    polynomial = where(rows, method="polynomial")
    compared = [row for row in polynomial if row["error"] != ""]
    broken = [row for row in compared if row["error"] > row["certified"]]
    slopes = column(where(fits, method="polynomial"), "exponent")
    exact_slopes = column(where(fits, method="exact"), "exponent")
    *_, half, stored = where(rows, method="stored")
    stored_growth = stored["traced_bytes"] / half["traced_bytes"]
    streamed = max(where(rows, method="exact", task="attention"), key=lambda row: row["n"])
    attention_rows = where(polynomial, task="attention")
    wide = max(attention_rows, key=lambda row: row["n"])
    most = max(where(polynomial, task="gradient"), key=lambda row: row["n"])
    share = most["traced_bytes"] / (5 * 8 * most["n"] * most["dim"])
    traced = max(column(attention_rows, "traced_bytes"))
    resident = [row["resident_bytes"] for row in attention_rows if row["resident_bytes"] != ""]
    also = f" ({mebibytes(max(resident))} MiB by the growth of the resident set)" if resident else ""
    verdict = (
        f"No measured error exceeds its bound ({len(compared)} calls compared with the exact method)."
        if not broken
        else f"**{len(broken)} of {len(compared)} measured errors exceed their bound.**"
    )
    attention, gradient = (_table(where(fits, task=task), task) for task in TASKS)
    ours, theirs = (f"{min(x):.2f} to {max(x):.2f}" for x in (slopes, exact_slopes))
    return f"""\
Theorem 4.2: while entries are bounded by B, output and gradient within ε take n^(1 + o(1)) time. Entries are uniform
in [−B, B], so scores stay within B³; float64, dv = d. Times are those of the processor, one thread, best of a few;
every call plans for itself, and its error is certified on the data. For the attention ε is relative to max|u| max|v|,
and the gradients of all five inputs are computed. For dLoss/dX of the training problem (Definition 2.9), Algorithm 1
beside the closed form of Theorem 3.3, ε is absolute, as in the paper; so the degree grows with n, slowly. {verdict}

![Time and memory of output and gradient against n](growth-attention.png)

{attention}

![Time and memory of dLoss/dX against n](growth-gradient.png)

{gradient}

Time grows with exponents of {ours} by the polynomial and of {theirs} by the exact method: each is the slope of log time
over log n at the {_FITTED} largest sizes. Where the degree rises between them the slope contains it; what does not depend on
n pulls it down, in both methods. The crossing is that with
the streamed exact method, interpolated between sizes that both methods ran (≤
{min(column(rows, "n"))}: the polynomial was faster at every one) or, with ~, the point where the two fits meet. "exact"
in the last column but one extrapolates the exact method's fit to the largest n, in favour of the exact method where
its slope is below 3.

Memory beyond inputs and outputs: at most {mebibytes(traced)} MiB for attention by the polynomial{also}, up to
n = {wide["n"]:,}: blocks of rows, the summaries of r (dv + 1) numbers each, and two numbers a row that the gradient needs. The
exact method holds {mebibytes(streamed["traced_bytes"])} MiB at n = {streamed["n"]:,}, since here it streams, too: against it
the polynomial saves time, not memory. The definition with all scores stored takes {mebibytes(stored["traced_bytes"])} MiB
at n = {stored["n"]:,}, and {stored_growth:.1f} times as much as at half that size.
Algorithm 1 first makes A1 X1, A2 X2, A3 X3, A4 Y1 and A5 Y2 and keeps them, so what it holds grows with
n: {mebibytes(most["traced_bytes"])} MiB at n = {most["n"]:,}, {share:.2g} times what these five take.

Tables: [all measurements](growth.csv), [exponents and crossings](growth-exponents.csv)."""


def _table(fits: Table, task: str) -> str:
    """Exponents and crossings of a task."""
    lines, least = [], min(column(fits, "least_n"))
    for row in fits:
        polynomial = row["method"] == "polynomial"
        degrees = f"{row['degree_least']}–{row['degree_most']}"
        if row["degree_least"] == row["degree_most"]:
            degrees = str(row["degree_most"])
        crossing = "–"
        if polynomial:
            at = row["crossing"]
            crossing = f"{'' if row['crossing_measured'] else '~ '}{at:.0f}" if isfinite(at) else "never"
            crossing = f"≤ {least}" if at == 0 else crossing
        name = {"polynomial": METHODS[task], "exact": "exact, streamed", "stored": "exact, scores stored"}
        lines.append(
            [
                name[row["method"]],
                str(row["dim"]),
                f"{row['entries']:g}" if polynomial else "any",
                f"{row['eps']:g}" if polynomial else "–",
                degrees if polynomial else "–",
                f"{row['rank']:,}" if polynomial else "–",
                f"{row['exponent']:.2f}",
                f"{row['to_n']:,}",
                seconds(row["seconds"]),
                _long(row["exact_would_take"]) if polynomial else "–",
                crossing,
            ]
        )
    heads = ["method", "d", "B", "ε", "degree", "rank", "exponent", "largest n", "time there", "exact", "crossing n"]
    return markdown(lines, heads)


def _long(number: float) -> str:
    """Seconds that may be years."""
    for size, unit in ((365.25 * 86400, "years"), (86400, "days"), (3600, "h")):
        if number >= 2 * size:
            return f"{short(number / size)} {unit}"
    return seconds(number)
