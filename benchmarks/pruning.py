"""What a basis pruned by weighted degree saves on heads of a trained encoder.

    python -m benchmarks.pruning [--out FOLDER] [--quick]

Layers 0, 3 and 5, the text "reference", d = 32; plans with bound="estimated". Errors are those of eight query rows against the
exact method in float64, relative as `tol` is; times are of one thread if OMP_NUM_THREADS=1 says so, forward and with the gradient.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import tattn
from evidence.demo.encoder import heads
from evidence.tables import markdown
from tattn.backends.numpy import BACKEND
from tattn.checks import checked_inputs
from tattn.features.monomials import features, multinomials, rank
from tattn.planning import plan_inputs

LAYERS = (0, 3, 5)
TOLERANCES = (3e-2, 1e-2, 3e-3)
SAMPLED = 8
# What plans may leave out: nothing, what gradients do not need either, what the output does not need.
KINDS = {"all monomials": None, "pruned": True, "pruned, gradients=False": False}


def energy(q: np.ndarray, k: np.ndarray) -> tuple[float, float]:
    """Share of Σ E[(w_α q^α a^α b^α)²] over |α| = 3 that a third and a tenth of the monomials have, rows being independent."""
    part = slice(rank(q.shape[1], 2), rank(q.shape[1], 3))
    squares = [(features(np.ascontiguousarray(x.T, np.float64), 3, BACKEND)[part] ** 2).mean(axis=1) for x in (q, k, k)]
    found = np.sort(multinomials(q.shape[1], 3)[part] ** 2 * np.prod(squares, axis=0))[::-1]
    total = np.cumsum(found) / found.sum()
    return float(total[len(total) // 3 - 1]), float(total[len(total) // 10 - 1])


def measured(q: np.ndarray, k: np.ndarray, v: np.ndarray, plan: tattn.Plan) -> tuple[float, float, float]:
    """Largest error over some rows, and seconds of a forward call and of one with its gradient."""
    # Tables of a basis are made once.
    few, few_keys, few_values = q[:64], [k[:64]] * 2, [v[:64]] * 2
    tattn.tensor_attention_vjp(few, few_keys, few_values, plan=plan)[1](few)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        out, pullback = tattn.tensor_attention_vjp(q, [k, k], [v, v], plan=plan)
        forward = time.perf_counter() - start
        pullback(v)
        times.append((forward, time.perf_counter() - start))
    forward, both = (min(column) for column in zip(*times, strict=True))
    rows = np.random.default_rng(0).permutation(len(q))[:SAMPLED]
    wide = [x.astype(np.float64) for x in (q[rows], k, v)]
    truth = tattn.tensor_attention(wide[0], [wide[1]] * 2, [wide[2]] * 2, method="exact")
    return float((np.abs(out[rows] - truth) / np.abs(v).max(axis=0) ** 2).max()), forward, both


def of_head(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> list[dict[str, Any]]:
    """A row for every tolerance that all monomials meet, or a pruned basis."""
    inputs = checked_inputs(q, [k, k], [v, v], None)
    rows = []
    for tol in TOLERANCES:
        row: dict[str, Any] = {"tol": tol}
        for name, gradients in KINDS.items():
            try:
                plan = plan_inputs(
                    inputs, scale=1 / q.shape[1], tol=tol, method="polynomial", bound="estimated", gradients=gradients
                )
            except tattn.PlanError:
                continue
            row[name] = (plan, *measured(q, k, v, plan))
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]], energies: list[tuple[float, float]], tokens: int) -> str:
    """The tables."""
    whole = "all monomials"
    kinds = list(KINDS)[1:]
    counts, found = [], []
    for tol in TOLERANCES:
        part = [r for r in rows if r["tol"] == tol]
        for name in kinds:
            smaller = [r for r in part if name in r and r[name][0].grading]
            served = [sum(kind in r for r in part) for kind in (whole, name)]
            counts.append([f"{tol:g}", name, *map(str, served), str(len(smaller))])
            for r in smaller:
                if whole in r:
                    found.append([f"{tol:g}", name, r["head"], *_beside(r[whole], r[name])])
    over = [r[name][1] / r["tol"] for r in rows for name in kinds if name in r]
    third, tenth = (np.array([e[i] for e in energies]) for i in (0, 1))
    counted = markdown(counts, ["tol", "plan", "all monomials serve", "pruned serve", "smaller"])
    heads = ["tol", "plan", "layer, head", "degree, rank, all", "degree, rank, pruned", "error, all", "error, pruned"]
    compared = markdown(found, [*heads, "time, all / pruned"])
    return f"""\
{len(energies)} heads on {tokens:,} tokens, d = 32, float32, estimated plans: how many heads a plan of degree up to 4 with all
monomials serves, how many a pruned one, and on how many it is smaller.

{counted}

The heads on which it is smaller, where both serve. Error: the largest of {SAMPLED} rows, and what the plan says. Time: that with
all monomials over that with those that are kept, forward / with the gradient, the shortest of three calls each.

{compared}

The largest error of sampled rows over `tol` is {max(over, default=0.0):.2g}. Of the energy of degree 3,
Σ E[(w_α q^α a^α b^α)²] for independent rows, a third of the monomials has {third.min():.0%} to {third.max():.0%}
(median {np.median(third):.1%}) and a tenth {tenth.min():.0%} to {tenth.max():.0%} (median {np.median(tenth):.1%}).

Certified plans, for 2,048 uniform rows of sixteen channels of which two make the scores and fourteen are a thousand times
smaller, at `tol=1e-2`:

{_certified()}
"""


def _beside(all_of_them: Any, pruned: Any) -> list[str]:
    """Degree and rank, errors, and ratios of times, of two measured plans."""
    both = all_of_them, pruned
    return [
        *(f"{plan.degree}, {plan.rank:,}" for plan, *_ in both),
        *(f"{true:.1e} ({plan.error:.1e})" for plan, true, *_ in both),
        " / ".join(f"{all_of_them[i] / pruned[i]:.2g}" for i in (2, 3)),
    ]


def _certified() -> str:
    """What certified plans take of channels that are small in truth, and their errors."""
    rng = np.random.default_rng(0)
    sizes = np.where(np.arange(16) < 2, 1.0, 1e-3).astype(np.float32)
    q, a, b = (rng.uniform(-1, 1, (2048, 16)).astype(np.float32) * sizes for _ in range(3))
    u, v = rng.uniform(-1, 1, (2, 2048, 16)).astype(np.float32)
    inputs = checked_inputs(q, [a, b], [u, v], None)
    lines = []
    for name, gradients in KINDS.items():
        plan = plan_inputs(inputs, scale=0.5, tol=1e-2, method="polynomial", gradients=gradients)
        out = tattn.tensor_attention(q, [a, b], [u, v], plan=plan, scale=0.5)
        true, _ = tattn.measure_error(q, [a, b], [u, v], out, rows=SAMPLED, scale=0.5)
        lines.append([name, f"{plan.degree}, {plan.rank:,}", f"{plan.error:.1e}", f"{true:.1e}"])
    return markdown(lines, ["plan", "degree, rank", "certified", "error"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder for the table, as summary.md")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and heads")
    given = parser.parse_args()
    tokens, step = (512, 6) if given.quick else (2048, 3)
    layers = heads(tokens, "reference", layers=LAYERS)
    rows, energies = [], []
    for layer in LAYERS:
        for head in range(0, 12, step):
            q, k, v = (np.ascontiguousarray(x[head]) for x in layers[layer])
            energies.append(energy(q[:512], k[:512]))
            rows += [{**row, "head": f"{layer}, {head}"} for row in of_head(q, k, v)]
            print(f"layer {layer}, head {head} done", flush=True)
    table = summary(rows, energies, tokens)
    print(table)
    if given.out:
        Path(given.out, "summary.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
