"""What norm bands cost beside a single polynomial, and what they do for a million rows with heavy tails.

    python -m benchmarks.bands cost [--out FOLDER] [--quick]
    python -m benchmarks.bands tails [--out FOLDER] [--quick]

NumPy, float32, one thread. Processor time, the best of runs that take turns.
"""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import tattn
from evidence.apart import reset_peak, resident_bytes

from .turns import seconds

DIM, DEGREE, BANDS = 8, 4, 8


def cost(quick: bool) -> str:
    """Forward and gradient in eight bands over the same with one polynomial for all."""
    lines = [
        f"Forward + gradient, d = dv = {DIM}, degree {DEGREE}, {BANDS} bands, over the polynomial for the whole range.",
        "*Promised*: the caller promises the range of the scores, 1. *Found*: one polynomial whose range is found in the data",
        "first, as a certified answer needs without a promise; bands find theirs on the way.",
        "",
        "| rows | one, promised, s | one, found / promised | bands / promised | bands with the certificate / promised |"
        " the same / found | largest bound of bands | stated error, promised | found |",
        "|" + "---|" * 9,
    ]
    for n, repeats in ((1 << 12, 2),) if quick else ((1 << 16, 9), (1_000_000, 4)):
        rng = np.random.default_rng(0)
        q, a, b, u, v, g = (2 * rng.random((n, DIM), dtype=np.float32) - 1 for _ in range(6))
        one = tattn.plan_for(n=n, dim=DIM, bound=1.0, degree=DEGREE)
        banded = tattn.plan_for(n=n, dim=DIM, series="banded", degree=DEGREE, bands=BANDS)

        def run(plan: tattn.Plan | None, certify: bool = False) -> None:
            plan = plan or tattn.plan(q, [a, b], [u, v], degree=DEGREE)  # noqa: B023
            _, pullback = tattn.tensor_attention_vjp(q, [a, b], [u, v], plan=plan, return_error=certify)  # noqa: B023
            pullback(g)  # noqa: B023

        plain, found, bands, certified = seconds(
            [lambda: run(one), lambda: run(None), lambda: run(banded), lambda: run(banded, certify=True)],  # noqa: B023
            repeats,
        )
        planned = tattn.plan(q, [a, b], [u, v], degree=DEGREE)
        error = tattn.tensor_attention(q, [a, b], [u, v], plan=banded, return_error=True)[1]
        lines.append(
            f"| {n:,} | {plain:.3g} | {found / plain:.2f} | {bands / plain:.2f} | {certified / plain:.2f} |"
            f" {certified / found:.2f} | {error.max():.1e} | {one.error:.1e} | {planned.error:.1e} |"
        )
    return "\n".join(lines) + "\n"


def tails(quick: bool) -> str:
    """Rows whose norms have heavy tails, in the query alone and in all views."""
    lines = [
        f"d = dv = {DIM}, degree {DEGREE}, 12 bands, moment 4. Gaussian rows times a factor for every row; the scale",
        "gives scores a standard deviation of 0.25. *Largest*: the largest factor of the query over the median one.",
        "*Memory*: the most held beyond inputs and outputs. *Difference*: the largest to degree 6 on 16,384 rows, over both",
        "bounds.",
        "",
        "| rows | factors of query; keys | largest | bound, median row | rows to 1e-2 | rows to 1e-3 | left for exact at 1e-3"
        " | forward, s | + gradient, s | memory, bytes a row | difference |",
        "|" + "---|" * 11,
    ]
    factors: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
        "1": lambda rng, n: np.ones(n),
        "log-normal, σ = 0.25": lambda rng, n: np.exp(0.25 * rng.standard_normal(n)),
        "log-normal, σ = 0.5": lambda rng, n: np.exp(0.5 * rng.standard_normal(n)),
        "Student, 5 degrees": lambda rng, n: np.abs(rng.standard_t(5, n)) + 0.5,
    }
    cases = [
        ("1", "1"),
        ("log-normal, σ = 0.5", "1"),
        ("Student, 5 degrees", "1"),
        ("log-normal, σ = 0.25", "log-normal, σ = 0.25"),
        ("log-normal, σ = 0.5", "log-normal, σ = 0.5"),
    ]
    for n in (1 << 12,) if quick else (1 << 16, 1_000_000):
        for names in cases:
            rng = np.random.default_rng(0)
            size = [factors[name](rng, n) for name in (names[0], names[1], names[1])]
            q, a, b = ((rng.standard_normal((n, DIM)) * f[:, None]).astype(np.float32) for f in size)
            u, v, g = (rng.standard_normal((n, DIM)).astype(np.float32) for _ in range(3))
            scale = 0.25 / float(np.prod([np.sqrt((x**2).mean()) for x in (q, a, b)]) * np.sqrt(DIM))
            plan = tattn.plan(q, [a, b], [u, v], series="banded", degree=DEGREE, bands=12, moment=4, scale=scale)
            reset_peak()
            before = resident_bytes("VmRSS")
            start = time.process_time()
            (out, error), pullback = tattn.tensor_attention_vjp(q, [a, b], [u, v], plan=plan, return_error=True)
            forward = time.process_time() - start
            gradients = pullback(g)
            both = time.process_time() - start
            kept = sum(x.nbytes for x in (out, error, gradients[0], *gradients[1], *gradients[2]))
            memory = max(0, resident_bytes("VmHWM") - before - kept)
            del gradients, pullback
            # A tighter answer for comparison; the exact method would take n² scores for every row.
            some = slice(0, 1 << 14)
            finer = tattn.plan(q[some], [a, b], [u, v], series="banded", degree=6, bands=12, moment=4, scale=scale)
            other, other_error = tattn.tensor_attention(q[some], [a, b], [u, v], plan=finer, return_error=True)
            gap = (np.abs(out[some] - other) / (np.abs(u).max(0) * np.abs(v).max(0))).max(-1)
            allowed = error[some] + other_error
            known = np.isfinite(allowed)
            over = int((~(error <= 1e-3)).sum())
            cells = [
                f"{n:,}", "; ".join(names), f"{size[0].max() / np.median(size[0]):.3g}", f"{np.median(error):.1e}",
                f"{(error <= 1e-2).mean():.2%}", f"{1 - over / n:.2%}", f"{over:,}", f"{forward:.3g}", f"{both:.3g}",
                f"{memory / n:.0f}", f"{(gap[known] / allowed[known]).max(initial=0.0):.2g}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "tails"))
    parser.add_argument("--out", help="folder for the table, as WHAT.md")
    parser.add_argument("--quick", action="store_true", help="few rows")
    given = parser.parse_args()
    table = {"cost": cost, "tails": tails}[given.what](given.quick)
    print(table)
    if given.out:
        Path(given.out, f"{given.what}.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
