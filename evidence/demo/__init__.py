"""The heads of a trained sentence encoder, read as tensor attention: query q, keys (k, k), values (v, v)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tattn.attention import tensor_attention, tensor_attention_vjp
from tattn.planning import plan
from tattn.plans import strict_json
from tattn.terminal import writable_file

from ..plots import drawing, save_plot

# Two ordinary heads of the first, middle and last layer, and the one whose scores reach furthest.
HEADS = ((0, 0), (0, 11), (2, 3), (3, 5), (5, 0), (0, 5))
DEGREES = (1, 2, 3)
BANDED = (2, 3)
PREFIX, SAMPLED = 192, 2
GRADIENTS = ("dquery", "dkeys[0]", "dkeys[1]", "dvalues[0]", "dvalues[1]")


def run(*, tokens: int = 8192, text: str = "reference", plot: str = "tattn-demo.png", as_json: bool = False) -> None:
    """Plan, compute and check every head; print a table or JSON; save a plot of error against degree.

    Parameters
    ----------
    tokens : int
        Rows of every head.
    text : {"reference", "library"}
    plot : str
        File for the plot, by matplotlib.
    as_json : bool
        Print one JSON object and no progress.

    Notes
    -----
    The exact method serves as truth: on all rows of a prefix for the output and all five gradients, and on sampled
    rows of the whole for the output and the query's gradient, which are the ones a row has to itself.
    """
    from .encoder import heads

    # What is missing is said before minutes are spent.
    formats = drawing().figure().canvas.get_supported_filetypes()
    if Path(plot).suffix[1:].lower() not in {"", *formats}:
        raise ValueError(f"plot should end in one of {', '.join(formats)}, got {str(plot)!r}")
    writable_file("plot", plot)
    if tokens < 2 * PREFIX:
        raise ValueError(f"tokens should be at least {2 * PREFIX}, got {tokens}")
    steps = len(HEADS) * (len(DEGREES) + len(BANDED) + 1)
    with progress(tokens, "encoder", as_json) as advance:
        layers = heads(tokens, text, layers=sorted({layer for layer, _ in HEADS}), progress=advance)
    results = []
    with progress(steps, "heads", as_json) as advance:
        done = 0

        def step() -> None:
            nonlocal done
            done += 1
            advance(done, steps)

        for layer, head in HEADS:
            found = layers[layer]
            results.append(_head(found.queries[head], found.keys[head], found.values[head], step))
            results[-1]["head"] = [layer, head]
    _save_plot(results, Path(plot))
    if as_json:
        print(strict_json({"tokens": tokens, "text": text, "plot": str(plot), "heads": results}))
    else:
        print(_table(results, tokens, text))
        print(f"\nError against degree: {plot}")


def _head(q: np.ndarray, k: np.ndarray, v: np.ndarray, step: Callable[[], None]) -> dict[str, Any]:
    """Everything about one head; q, k, v (tokens, 32)."""
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
    chosen = np.sort(np.random.default_rng(1).permutation(len(q))[:SAMPLED])
    start = time.perf_counter()
    rows_truth = _vjp(q[chosen], keys, values, grad[chosen], method="exact")
    # The exact method's time for all rows, from that of the sampled ones.
    row["exact_seconds"] = (time.perf_counter() - start) * len(q) / SAMPLED
    whole_size = float(np.abs(v).max(0).max()) ** 2
    step()
    for degree in DEGREES:
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
        step()
    for degree in BANDED:
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
        step()
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


def _table(results: list[dict[str, Any]], tokens: int, text: str) -> str:
    """The results for a person."""
    lines = [
        f"Heads of all-MiniLM-L6-v2 on {tokens:,} tokens of the text {text!r}: query q, keys (k, k), values (v, v), float32.",
        "",
        "Errors against the exact method. Output: the largest, relative to max|v|². Gradients: norm of the difference over",
        f"the norm. 'prefix': all rows of the first {PREFIX} tokens; 'rows': {SAMPLED} sampled rows of the whole.",
        "'time': forward + gradient of the whole.",
    ]
    for row in results:
        layer, head = row["head"]
        lines += [
            "",
            f"layer {layer}, head {head}: scores within ±{row['sampled_range']:.2f} by samples, "
            f"±{row['certified_range']:.3g} certified",
            f"  auto: {row['auto']['method']} ({row['auto']['reason']}), which would take {_time(row['exact_seconds'])}",
            f"  {'degree':>6} {'rank':>6} {'time':>8} {'output':>8} {'output':>8} {'dquery':>8}"
            + "".join(f" {n:>10}" for n in GRADIENTS),
            f"  {'':>6} {'':>6} {'':>8} {'prefix':>8} {'rows':>8} {'rows':>8}" + f" {'prefix':>10}" * 5,
        ]
        for d in row["degrees"]:
            lines.append(
                f"  {d['degree']:>6} {d['rank']:>6} {_time(d['seconds']):>8} {d['prefix_error']:>8.1e} {d['sampled_error']:>8.1e} "
                f"{d['sampled_dquery']:>8.1e}" + "".join(f" {d['prefix_gradients'][n]:>10.1e}" for n in GRADIENTS)
            )
        for b in row["banded"]:
            lines.append(
                f"  degree {b['degree']} in norm bands, forward {_time(b['seconds'])}: certified to {b['median_bound']:.1e} at "
                f"the median row, {b['rows_to_1e-1']:.0%} of rows to 1e-1, {b['rows_to_3e-2']:.0%} to 3e-2; "
                f"sampled rows {b['sampled_error']:.1e}, certified {b['sampled_bound']:.1e}"
            )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"


def _save_plot(results: list[dict[str, Any]], path: Path) -> None:
    """Error of output and of the query's gradient against degree, a line for each head."""
    figure, axes = drawing().subplots(1, 3, figsize=(13, 4), layout="constrained")
    for row in results:
        degrees = [d["degree"] for d in row["degrees"]]
        label = f"layer {row['head'][0]}, head {row['head'][1]} (scores ±{row['sampled_range']:.1f})"
        axes[0].semilogy(degrees, [d["sampled_error"] for d in row["degrees"]], "o-", label=label)
        axes[1].semilogy(degrees, [d["sampled_dquery"] for d in row["degrees"]], "o-")
    axes[0].set(title="output", xlabel="degree", ylabel="largest error / max|v|²", xticks=DEGREES)
    axes[1].set(title="gradient of the query", xlabel="degree", ylabel="relative error (norms)", xticks=DEGREES)
    places = np.arange(len(results))
    for shift, i in ((-0.15, 0), (0.15, 1)):
        found = [row["banded"][i] for row in results]
        axes[2].semilogy(places + shift, [b["sampled_bound"] for b in found], "_", color=f"C{i}", ms=14)
        axes[2].semilogy(
            places + shift, [b["sampled_error"] for b in found], "o", color=f"C{i}", ms=4, label=f"degree {BANDED[i]}"
        )
    axes[2].set(title="in norm bands: certified (—) and true (•)", xticks=places, ylabel="sampled rows, / max|v|²")
    axes[2].set_xticklabels([f"{layer}, {head}" for layer, head in (row["head"] for row in results)])
    axes[2].set_xlabel("layer, head")
    axes[2].legend(fontsize="small", frameon=False)
    for a in axes:
        a.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    save_plot(figure, path, dpi=150)


@contextmanager
def progress(total: int, name: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that moves a progress bar."""
    if quiet:
        yield lambda done, total: None
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo needs tqdm: pip install --group demo") from error
    with tqdm(total=total, desc=name) as bar:

        def advance(done: int, total: int) -> None:
            bar.update(done - bar.n)

        yield advance
