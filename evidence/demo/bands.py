"""How far the bound that comes with the answer carries on every head of a trained encoder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from tattn.attention import tensor_attention_vjp
from tattn.planning import plan
from tattn.terminal import writable_folder

from ..plots import drawing, save_plot
from ..tables import save
from . import progress

TEXTS = ("reference", "library")
DEGREES = (2, 3)
LEVELS = (1e-1, 3e-2, 1e-2)
SAMPLED = 8
LAYERS, HEADS = 6, 12


def run(*, tokens: int = 2048, out: str = "docs/bands", texts: tuple[str, ...] = TEXTS, quiet: bool = False) -> None:
    """Certify all heads on the texts; write heads.csv, summary.md and two plots into the folder `out`.

    Parameters
    ----------
    tokens : int
        Rows of every head.
    out : str
        Folder, made if need be.
    texts : tuple of str
        Of "reference" and "library".
    quiet : bool
        No progress bar.

    Notes
    -----
    Truth is the exact method on sampled query rows. An upstream gradient that is 0 elsewhere makes the gradients of keys
    and values of those rows alone exact, too, so that all five are compared with their bounds.
    """
    from .encoder import heads

    drawing()
    if tokens < 64:
        raise ValueError(f"tokens should be at least 64, got {tokens}")
    folder = writable_folder("out", out)
    rows: list[dict[str, Any]] = []
    with progress(len(texts) * LAYERS * HEADS, "heads", quiet) as advance:
        for text in texts:
            layers = heads(tokens, text)
            for layer in range(LAYERS):
                for head in range(HEADS):
                    q, k, v = (x[head] for x in layers[layer])
                    found = _head(q, k, v)
                    rows += [{"text": text, "layer": layer, "head": head, **row} for row in found]
                    advance(len(rows) // len(DEGREES), len(texts) * LAYERS * HEADS)
    save(rows, folder / "heads.csv", digits=4)
    (folder / "summary.md").write_text(_summary(rows, tokens, texts), encoding="utf-8")
    _save_shares(rows, texts, folder / "shares.png")
    _save_tightness(rows, texts, folder / "tightness.png")


def _head(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> list[dict[str, Any]]:
    """A row of the table for every degree; q, k, v (tokens, 32)."""
    keys, values = [k, k], [v, v]
    n = len(q)
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.permutation(n)[:SAMPLED])
    grad = np.zeros_like(v)
    grad[chosen] = rng.standard_normal((SAMPLED, v.shape[1]))
    size = np.abs(v).max(0).astype(np.float64) ** 2
    wide, wide_keys, wide_values, wide_grad = (x.astype(np.float64) for x in (q[chosen], k, v, grad[chosen]))
    truth, pull = tensor_attention_vjp(wide, [wide_keys] * 2, [wide_values] * 2, method="exact")
    true_gradients = _flat(pull(wide_grad))
    # The time for all rows, from that of the sampled ones.
    start = time.perf_counter()
    tensor_attention_vjp(q[chosen], keys, values, method="exact")[1](grad[chosen])
    exact_seconds = (time.perf_counter() - start) * n / SAMPLED
    rows = []
    for degree in DEGREES:
        banded = plan(q, keys, values, series="banded", degree=degree)
        start = time.perf_counter()
        (out, error), pullback = tensor_attention_vjp(q, keys, values, plan=banded, return_error=True)
        gradients = _flat(pullback(grad))
        seconds = time.perf_counter() - start
        _, bounds = pullback(grad, return_error=True)
        true = (np.abs(out[chosen] - truth) / size).max(-1)
        off = [
            a - b for a, b in zip(gradients, [_spread(true_gradients[0], chosen, n), *true_gradients[1:]], strict=True)
        ]
        used = [_share(np.abs(a), b) for a, b in zip(off, _flat(bounds), strict=True)]
        rows.append(
            {
                "degree": degree,
                **{f"rows_to_{level:g}": float((error <= level).mean()) for level in LEVELS},
                "median_bound": float(np.median(error)),
                "p99_bound": float(np.quantile(error, 0.99, method="higher")),
                "sampled_bound": float(np.median(error[chosen])),
                "sampled_error": float(np.median(true[known]))
                if (known := np.isfinite(error[chosen])).any()
                else np.nan,
                "largest_share_of_bound": _share(true, error[chosen]),
                "largest_share_of_gradient_bounds": max(used),
                "seconds": seconds,
                "exact_seconds": exact_seconds,
            }
        )
    return rows


def _flat(gradients: Any) -> list[np.ndarray]:
    dquery, dkeys, dvalues = gradients
    return [dquery, *dkeys, *dvalues]


def _spread(rows: np.ndarray, chosen: np.ndarray, n: int) -> np.ndarray:
    """Rows in their places among n, the others 0."""
    whole = np.zeros((n, rows.shape[1]), rows.dtype)
    whole[chosen] = rows
    return whole


def _share(error: np.ndarray, bound: np.ndarray) -> float:
    """The largest error over its bound, where one is promised."""
    known = np.isfinite(bound) & (bound > 0)
    return float((error[known] / bound[known]).max(initial=0.0))


def _summary(rows: list[dict[str, Any]], tokens: int, texts: tuple[str, ...]) -> str:
    """What the table comes to, as Markdown."""
    lines = [
        f"Heads, of {LAYERS * HEADS}, on {tokens:,} tokens, eight bands, float32,",
        "whose bound is at most so large. *Median row*: for the median row. *99 % of rows*: for all but 1 % of",
        "the rows, which would have to be recomputed exactly.",
        "",
        "| text | degree | median row: "
        + " | ".join(f"{x:g}" for x in LEVELS)
        + " | 99 % of rows: "
        + " | ".join(f"{x:g}" for x in LEVELS)
        + " | all rows to 0.1, at most 5 % recomputed | bound / true error, median row | time, exact / banded |",
        "|---|---|" + "---|" * 9,
    ]
    for text in texts:
        for degree in DEGREES:
            part = [r for r in rows if r["text"] == text and r["degree"] == degree]
            median = [sum(r["median_bound"] <= level for r in part) for level in LEVELS]
            tail = [sum(r["p99_bound"] <= level for r in part) for level in LEVELS]
            few = sum(r["rows_to_0.1"] >= 0.95 for r in part)
            ratio = np.median(
                [r["sampled_bound"] / r["sampled_error"] for r in part if np.isfinite(r["sampled_bound"])]
            )
            speed = np.median([r["exact_seconds"] / r["seconds"] for r in part])
            cells = [text, degree, *median, *tail, few, f"{ratio:.3g}", f"{speed:.3g}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    worst = max(r["largest_share_of_bound"] for r in rows)
    steep = max(r["largest_share_of_gradient_bounds"] for r in rows)
    lines += [
        "",
        f"Largest error over its bound among all sampled rows of all heads: {worst:.2g} for the output, {steep:.2g} for the five",
        f"gradients. Time: forward and gradient, one thread; the exact method's is that of {SAMPLED} rows, scaled up.",
        "",
    ]
    return "\n".join(lines)


def _save_shares(rows: list[dict[str, Any]], texts: tuple[str, ...], path: Path) -> None:
    """Share of rows certified, a cell for every head."""
    figure, axes = drawing().subplots(
        len(texts) * len(DEGREES), len(LEVELS), figsize=(10, 2.6 * len(texts) * len(DEGREES)), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for line, (text, degree) in enumerate((t, d) for t in texts for d in DEGREES):
        part = [r for r in rows if r["text"] == text and r["degree"] == degree]
        for axis, level in zip(axes[line], LEVELS, strict=True):
            share = np.array([r[f"rows_to_{level:g}"] for r in part]).reshape(LAYERS, HEADS)
            image = axis.imshow(share, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            for (layer, head), x in np.ndenumerate(share):
                axis.text(
                    head, layer, f"{100 * x:.0f}", ha="center", va="center", fontsize=7, color="w" if x < 0.6 else "k"
                )
            axis.set(
                xticks=range(0, HEADS, 2), yticks=range(LAYERS), title=f"{text}, degree {degree}: rows to {level:g}"
            )
        axes[line][0].set_ylabel("layer")
    for axis in axes[-1]:
        axis.set_xlabel("head")
    figure.colorbar(image, ax=axes, label="share of rows certified (numbers: %)", shrink=0.5)
    save_plot(figure, path, dpi=110)


def _save_tightness(rows: list[dict[str, Any]], texts: tuple[str, ...], path: Path) -> None:
    """Certified beside true error at the median sampled row of every head."""
    figure, axes = drawing().subplots(1, len(texts), figsize=(5 * len(texts), 4.2), layout="constrained", squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        for degree, mark in zip(DEGREES, "os", strict=True):
            part = [r for r in rows if r["text"] == text and r["degree"] == degree]
            axis.loglog(
                [r["sampled_error"] for r in part], [r["sampled_bound"] for r in part], mark, ms=4,
                label=f"degree {degree}",
            )  # fmt: skip
        line = np.array([1e-7, 1.0])
        axis.loglog(line, line, "k-", lw=0.8, label="bound = error")
        axis.loglog(line, 10 * line, "k:", lw=0.8, label="bound = 10 × error")
        axis.set(title=text, xlabel="true error, median of sampled rows", ylabel="certified", ylim=(1e-6, 1e3))
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small", frameon=False)
    save_plot(figure, path, dpi=110)
