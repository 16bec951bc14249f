"""What `python -m evidence demo --full` adds: estimated plans and norm bands of several degrees, and all gradients."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from tattn.attention import tensor_attention, tensor_attention_vjp
from tattn.planning import plan

from ..plots import legend_below, panels, save_plot, style
from ..tables import duration
from . import PREFIX, Step, sampled

DEGREES = (1, 2, 3)
BANDED = (2, 3)
SAMPLED = 2
STEPS = 1 + len(DEGREES) + len(BANDED)
GRADIENTS = ("dquery", "dkeys[0]", "dkeys[1]", "dvalues[0]", "dvalues[1]")


def details(q: np.ndarray, k: np.ndarray, v: np.ndarray, step: Step) -> dict[str, Any]:
    """Everything else about one head; q, k, v (tokens, 32).

    The exact method serves as truth: on all rows of a prefix for the output and all five gradients, and on sampled rows of
    the whole for the output and the query's gradient, which are the ones a row has to itself.
    """
    step("sampled rows exactly, with their gradient")
    keys, values = [k, k], [v, v]
    certified = plan(q, keys, values)
    row: dict[str, Any] = {
        "certified_range": certified.bound,
        "auto": {"method": certified.method, "reason": certified.reason},
        "degrees": [],
        "banded": [],
    }
    grad = np.random.default_rng(0).standard_normal(v.shape).astype(v.dtype)
    prefix = (q[:PREFIX], [k[:PREFIX]] * 2, [v[:PREFIX]] * 2, grad[:PREFIX])
    truth = _vjp(*prefix, method="exact")
    chosen = sampled(len(q))[:SAMPLED]
    rows_truth = _vjp(q[chosen], keys, values, grad[chosen], method="exact")
    whole_size = float(np.abs(v).max(0).max()) ** 2
    for degree in DEGREES:
        step(f"degree {degree}, estimated")
        planned = plan(q, keys, values, bound="estimated", degree=degree)
        start = time.perf_counter()
        whole = _vjp(q, keys, values, grad, plan=planned)
        seconds = time.perf_counter() - start
        rows = (whole[0][chosen], whole[1][chosen])
        local = _vjp(*prefix, plan=planned)
        size = float(np.prod([np.abs(v[:PREFIX]).max(0)] * 2, axis=0).max())
        row["sampled_range"] = planned.bound
        row["degrees"].append(
            {
                "degree": degree,
                "rank": planned.rank,
                "seconds": seconds,
                "estimated_error": planned.error,
                "prefix_error": float(np.abs(local[0] - truth[0]).max()) / size,
                "prefix_gradients": {
                    n: _relative(a, b) for n, a, b in zip(GRADIENTS, local[1:], truth[1:], strict=True)
                },
                "sampled_error": float(np.abs(rows[0] - rows_truth[0]).max()) / whole_size,
                "sampled_dquery": _relative(rows[1], rows_truth[1]),
                "plan": str(planned),
            }
        )
    for degree in BANDED:
        step(f"degree {degree} in norm bands")
        banded = plan(q, keys, values, series="banded", degree=degree)
        start = time.perf_counter()
        out, error = tensor_attention(q, keys, values, plan=banded, return_error=True)
        row["banded"].append(
            {
                "degree": degree,
                "seconds": time.perf_counter() - start,
                "median_bound": float(np.median(error)),
                "rows_to_1e-1": float((error <= 1e-1).mean()),
                "rows_to_3e-2": float((error <= 3e-2).mean()),
                "sampled_bound": float(error[chosen].max()),
                "sampled_error": float(np.abs(out[chosen] - rows_truth[0]).max()) / whole_size,
            }
        )
    return row


def _vjp(
    q: np.ndarray, keys: list[np.ndarray], values: list[np.ndarray], grad: np.ndarray, **options: Any
) -> list[np.ndarray]:
    """Output and the five gradients."""
    out, pullback = tensor_attention_vjp(q, keys, values, **options)
    dquery, dkeys, dvalues = pullback(grad)
    return [out, dquery, *dkeys, *dvalues]


def _relative(got: np.ndarray, truth: np.ndarray) -> float:
    """Norm of the difference over the norm of the truth."""
    return float(np.linalg.norm(got - truth) / np.linalg.norm(truth))


def table(row: dict[str, Any]) -> str:
    """The details of one head, for a person."""
    lines = [
        f"  certified range of the scores ±{row['certified_range']:.3g}; auto: {row['auto']['method']} ({row['auto']['reason']})",
        "  Errors. Output: the largest, over max|v|²; gradients: norm of the difference over the norm. 'prefix': all rows of the",
        f"  first {PREFIX} tokens; 'rows': {SAMPLED} rows of the whole. 'time': attention and gradient.",
        f"  {'degree':>6} {'rank':>6} {'time':>8} {'output':>8} {'output':>8} {'dquery':>8}"
        + "".join(f" {n:>10}" for n in GRADIENTS),
        f"  {'':>6} {'':>6} {'':>8} {'prefix':>8} {'rows':>8} {'rows':>8}" + f" {'prefix':>10}" * 5,
    ]
    for d in row["degrees"]:
        lines.append(
            f"  {d['degree']:>6} {d['rank']:>6} {duration(d['seconds']):>8} {d['prefix_error']:>8.1e} {d['sampled_error']:>8.1e} "
            f"{d['sampled_dquery']:>8.1e}" + "".join(f" {d['prefix_gradients'][n]:>10.1e}" for n in GRADIENTS)
        )
    for b in row["banded"]:
        lines.append(
            f"  degree {b['degree']} in norm bands, forward {duration(b['seconds'])}: certified to {b['median_bound']:.1e} at "
            f"the median row, {b['rows_to_1e-1']:.0%} of rows to 1e-1, {b['rows_to_3e-2']:.0%} to 3e-2; "
            f"sampled rows {b['sampled_error']:.1e}, certified {b['sampled_bound']:.1e}"
        )
    return "\n".join([*lines, ""])


def save_plot_of_degrees(results: list[dict[str, Any]], path: Path) -> None:
    """Error of output and of the query's gradient against degree, a line for each head."""
    figure, axes = panels(2, height=4.2)
    for i, row in enumerate(results):
        degrees = row["full"]["degrees"]
        look = style(i, label=f"layer {row['head'][0]}, head {row['head'][1]} (scores ±{row['scores']:.2g})")
        for axis, error in zip(axes.flat, ("sampled_error", "sampled_dquery"), strict=True):
            axis.semilogy(DEGREES, [d[error] for d in degrees], **look)
    axes[0, 0].set(title="output", xlabel="degree", ylabel="largest error / max|v|²", xticks=DEGREES)
    axes[0, 1].set(title="gradient of the query", xlabel="degree", ylabel="relative error (norms)", xticks=DEGREES)
    legend_below(figure, axes[0, 0], 3)
    save_plot(figure, path, dpi=150)
