"""What a basis pruned by weighted degree saves on heads of a trained encoder.

    python benchmarks/pruning.py [--out FOLDER] [--quick]

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
from tattn.backends.numpy import BACKEND
from tattn.checks import checked_inputs
from tattn.demo.encoder import heads
from tattn.monomials import features, multinomials, rank
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
    start = time.perf_counter()
    out, pullback = tattn.tensor_attention_vjp(q, [k, k], [v, v], plan=plan)
    forward = time.perf_counter() - start
    pullback(v)
    both = time.perf_counter() - start
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
    """The table."""
    lines = [
        f"{len(energies)} heads on {tokens:,} tokens, d = 32, float32. *Heads*: those that a plan of degree up to 4 with all",
        "monomials serves, those that a pruned one serves, and those where it is smaller. Ranks, errors and times: medians over",
        "the heads where a pruned basis is smaller and both serve; error: largest of eight rows, beside what the plan says. Time:",
        "that with all monomials over that of the pruned basis, forward / with the gradient.",
        "",
        "| tol | plan | heads: all, pruned, smaller | degree, rank, all | degree, rank, pruned | error, all | error, pruned "
        "| time, all / pruned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    whole = "all monomials"
    for tol in TOLERANCES:
        part = [r for r in rows if r["tol"] == tol]
        for name in list(KINDS)[1:]:
            smaller = [r for r in part if name in r and r[name][0].grading]
            pairs = [(r[whole], r[name]) for r in smaller if whole in r]
            cells = [
                f"{tol:g}",
                name,
                f"{sum(whole in r for r in part)}, {sum(name in r for r in part)}, {len(smaller)}",
            ]
            if pairs:
                for i in (0, 1):
                    degree, size = (np.median([getattr(p[i][0], f) for p in pairs]) for f in ("degree", "rank"))
                    cells.append(f"{degree:g}, {size:,.0f}")
                for i in (0, 1):
                    true, said = np.median([p[i][1] for p in pairs]), np.median([p[i][0].error for p in pairs])
                    cells.append(f"{true:.1e} ({said:.1e})")
                cells.append(" / ".join(f"{np.median([a[i] / b[i] for a, b in pairs]):.2g}" for i in (2, 3)))
            else:
                cells += [""] * 5
            lines.append("| " + " | ".join(cells) + " |")
    ratios = [
        (r[whole][0].rank / r[name][0].rank, r[whole][i] / r[name][i])
        for r in rows for name in list(KINDS)[1:] for i in (2, 3) if whole in r and name in r and r[name][0].grading
    ]  # fmt: skip
    broken = [r[n][1] / r["tol"] for r in rows for n in list(KINDS)[1:] if n in r]
    third, tenth = (np.array([e[i] for e in energies]) for i in (0, 1))
    lines += [
        "",
        f"Over all of these, {np.median([b / a for a, b in ratios]):.2g} of what the ratio of ranks says is seen in time. The",
        f"largest error of sampled rows over `tol` is {max(broken):.2g}." if broken else "",
        "",
        "Of the energy of degree 3, Σ E[(w_α q^α a^α b^α)²] for independent rows, a third of the monomials has",
        f"{third.min():.0%} to {third.max():.0%} (median {np.median(third):.1%}) and a tenth",
        f"{tenth.min():.0%} to {tenth.max():.0%} (median {np.median(tenth):.1%}).",
        "",
    ]
    return "\n".join(lines)


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
            rows += of_head(q, k, v)
            print(f"layer {layer}, head {head} done", flush=True)
    table = summary(rows, energies, tokens)
    print(table)
    if given.out:
        Path(given.out, "summary.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
