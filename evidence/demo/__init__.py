"""The heads of a trained sentence encoder, read as tensor attention: query q, keys (k, k), values (v, v)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from tattn.attention import tensor_attention_vjp
from tattn.planning import plan
from tattn.plans import strict_json
from tattn.terminal import writable_file

from ..plots import COLOURS, drawing, save_plot
from ..tables import duration, listed

# Two ordinary heads of the first, middle and last layer, and the one whose scores reach furthest.
HEADS = ((0, 0), (0, 11), (2, 3), (3, 5), (5, 0), (0, 5))
DEGREE, LEVEL = 2, 3e-2
PREFIX, SAMPLED = 192, 4
# Lengths at which the exact method is timed: the longest takes some seconds.
EXACT = (128, 256, 512)

Step = Callable[[str], None]


def run(
    *,
    tokens: int = 8192,
    text: str = "reference",
    plot: str = "tattn-demo.png",
    full: bool = False,
    as_json: bool = False,
) -> None:
    """Compute, certify and check every head; print a line for each and three sentences, or JSON; save a picture.

    Parameters
    ----------
    tokens : int
        Rows of every head.
    text : {"reference", "library"}
    plot : str
        File for the picture, by matplotlib. With `full`, another one stands beside it.
    full : bool
        Estimated plans of degree 1 to 3, norm bands of degree 2 and 3, and errors of all gradients, too: much longer.
    as_json : bool
        Print one JSON object and no progress.

    Notes
    -----
    On one thread: where processors are busy, threads that wait for each other take longer than one alone. Times are those of
    the processor, so that other programs do not count.
    """
    # What is missing is said before minutes are spent.
    formats = drawing().figure().canvas.get_supported_filetypes()
    if Path(plot).suffix[1:].lower() not in {"", *formats}:
        raise ValueError(f"plot should end in one of {', '.join(formats)}, got {str(plot)!r}")
    writable_file("plot", plot)
    if tokens < 2 * PREFIX:
        raise ValueError(f"tokens should be at least {2 * PREFIX}, got {tokens}")
    with threadpool_limits(1):
        _run(tokens, text, Path(plot), full, as_json)


def _run(tokens: int, text: str, plot: Path, full: bool, as_json: bool) -> None:
    """`run` with arguments that were checked."""
    from . import full as details
    from .encoder import heads

    if not as_json:
        print(_opening(tokens, text), flush=True)
    with progress(tokens, "run the encoder", as_json) as advance:
        layers = heads(tokens, text, layers=sorted({layer for layer, _ in HEADS}), progress=advance)
    results: list[dict[str, Any]] = []
    lengths = _lengths(tokens)
    each = SAMPLED + 2 + full * details.STEPS
    with progress(len(HEADS) * each + len(EXACT) + len(lengths), "heads", as_json) as advance, _steps(advance) as step:
        for layer, head in HEADS:
            name = f"layer {layer}, head {head}"
            q, k, v = (x[head] for x in layers[layer])
            row = {"head": [layer, head], **_head(q, k, v, _named(step, name))}
            if full:
                row["full"] = details.details(q, k, v, _named(step, name))
            results.append(row)
            if not as_json:
                _say(_line(row))
                if full:
                    _say(details.table(row["full"]))
        layer, head = HEADS[0]
        q, k, v = (x[head] for x in layers[layer])
        times = _times(q, k, v, lengths, step)
    _save_plot(results, times, plot)
    if full:
        details.save_plot_of_degrees(results, plot.with_stem(plot.stem + "-degrees"))
    exact = times["exact"][-1]
    seconds = exact["seconds"] * (tokens / exact["n"]) ** 3
    if as_json:
        found = {"tokens": tokens, "text": text, "plot": str(plot), "exact_would_take": seconds}
        print(strict_json({**found, "heads": results, "times": times}))
    else:
        print("\n" + "\n".join(_sentences(results, tokens, seconds)) + f"\n\nPicture: {plot}")


def _opening(tokens: int, text: str) -> str:
    """What is computed, for a person."""
    return (
        f"Six attention heads of a trained encoder (all-MiniLM-L6-v2) on {tokens:,} tokens of English ({text}),\n"
        f"read as attention over all {tokens:,}² pairs of tokens: query q, keys (k, k), values (v, v), 32 channels.\n"
        f"Method: degree {DEGREE} in norm bands, float32. Times are of one thread of the processor; errors are fractions of\n"
        "the largest value, max|v|².\n"
        f"'certified': a bound that comes with the answer, at the median token. 'true': the largest error at {SAMPLED}\n"
        "tokens that were also computed by the definition. 'scores': how far they reach on a sample.\n"
    )


def _head(q: np.ndarray, k: np.ndarray, v: np.ndarray, step: Step) -> dict[str, Any]:
    """Time, bound and true error of one head; q, k, v (tokens, 32)."""
    keys, values = [k, k], [v, v]
    step("sample the scores")
    reach = plan(q, keys, values, bound="estimated", degree=1).bound
    step("attention and gradient")
    grad = np.random.default_rng(0).standard_normal(v.shape).astype(v.dtype)
    banded = plan(q, keys, values, series="banded", degree=DEGREE)
    start = time.process_time()
    (out, error), pullback = tensor_attention_vjp(q, keys, values, plan=banded, return_error=True)
    pullback(grad)
    seconds = time.process_time() - start
    chosen = sampled(len(q))
    truth = []
    for i in chosen:
        step("a token by the definition")
        truth.append(by_definition(q[i], k, v))
    exact = np.stack(truth)
    return {
        "scores": reach,
        "seconds": seconds,
        "median_bound": float(np.median(error)),
        "rows_to_level": float((error <= LEVEL).mean()),
        "sampled_bound": float(error[chosen].max()),
        "sampled_error": float(np.abs(out[chosen] - exact).max()) / float(np.abs(v).max()) ** 2,
    }


def sampled(n: int) -> np.ndarray:
    """The rows that are computed by the definition, too; (SAMPLED,)."""
    return np.sort(np.random.default_rng(1).permutation(n)[:SAMPLED])


def by_definition(query: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Σ_jk softmax_jk(Σ_c q_c k_jc k_kc / d) v_j ∘ v_k of one row, in float64; query (d), k and v (n, d)."""
    total, out = 0.0, np.zeros(v.shape[1])
    weighted = k * (query / len(query))
    for start in range(0, len(k), 1024):
        part = slice(start, start + 1024)
        # No maximum is subtracted: scores of these heads are far from where exp overflows.
        weights = np.exp(weighted[part] @ k.T)
        total += float(weights.sum(dtype=np.float64))
        out += (v[part] * (weights @ v)).sum(axis=0, dtype=np.float64)
    return out / total


def _lengths(tokens: int) -> list[int]:
    """Halves of the number of tokens, down to some hundred."""
    return [tokens >> i for i in reversed(range(5)) if tokens >> i >= 256]


def _times(q: np.ndarray, k: np.ndarray, v: np.ndarray, lengths: list[int], step: Step) -> dict[str, Any]:
    """Seconds of attention and gradient for the first n tokens of a head, by both methods."""
    found: dict[str, Any] = {"exact": [], "tattn": []}

    def seconds(n: int, **options: Any) -> float:
        start = time.process_time()
        _, pullback = tensor_attention_vjp(q[:n], [k[:n]] * 2, [v[:n]] * 2, **options)
        pullback(v[:n])
        return time.process_time() - start

    for n in lengths:
        step(f"time {n:,} tokens")
        banded = plan(q[:n], [k[:n]] * 2, [v[:n]] * 2, series="banded", degree=DEGREE)
        found["tattn"].append({"n": n, "seconds": min(seconds(n, plan=banded) for _ in range(2))})
    for n in EXACT:
        step(f"time {n:,} tokens exactly")
        found["exact"].append({"n": n, "seconds": seconds(n, method="exact")})
    return found


def _line(row: dict[str, Any]) -> str:
    """One head, for a person."""
    layer, head = row["head"]
    return (
        f"layer {layer}, head {head:>2}   scores ±{row['scores']:<4.2g}  certified {_short(row['median_bound']):>6}   "
        f"true {_short(row['sampled_error']):>7}   attention and gradient {duration(row['seconds'])}"
    )


def _sentences(results: list[dict[str, Any]], tokens: int, exact_seconds: float) -> list[str]:
    """Three sentences to repeat."""
    good = [row for row in results if row["median_bound"] <= LEVEL]
    rest = [row for row in results if row["median_bound"] > LEVEL]
    slowest = max(row["seconds"] for row in results)
    first = f"Of {len(results)} heads, {len(good)} are certified to {LEVEL:g} at the median token"
    first += f", with the gradient in at most {duration(slowest)} a head for {tokens:,} tokens."
    second = (
        f"Exact attention over all pairs would take about {duration(exact_seconds)} a head "
        f"({EXACT[-1]} tokens were measured; time grows as n³)."
    )
    if not rest:
        return [first, second, "No head is left out: scores stay within a few units."]
    names = listed([f"layer {row['head'][0]} head {row['head'][1]}" for row in rest])
    reach = listed([f"±{row['scores']:.0f}" for row in rest])
    third = f"Not certified: {names}. {'Its' if len(rest) == 1 else 'Their'} scores reach {reach}"
    third += f", those of the others ±{max(row['scores'] for row in good):.1f} at most." if good else "."
    return [first, second, third]


def _short(error: float) -> str:
    """One digit; a bound of 1 or more says nothing."""
    return f"{error:.1g}" if error < 1 else "no"


def _save_plot(results: list[dict[str, Any]], times: dict[str, Any], path: Path) -> None:
    """Time against tokens, and bound beside true error of every head: `tattn` blue, exact orange, what was asked for grey."""
    ours, exact = COLOURS[:2]
    figure, (left, right) = drawing().subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    left.loglog(*_line_of(times["tattn"]), "o-", color=ours, label="tattn, time")
    n, seconds = _line_of(times["exact"])
    left.loglog(n, seconds, "s-", color=exact, label="exact, measured")
    last = times["tattn"][-1]["n"]
    ahead = np.array([n[-1], last])
    left.loglog(ahead, seconds[-1] * (ahead / n[-1]) ** 3, "--", color=exact, label="exact, extrapolated as n³")
    units = {"10 ms": 1e-2, "1 s": 1.0, "1 min": 60.0, "1 h": 3600.0, "1 day": 86400.0}
    shown = {name: at for name, at in units.items() if at < 3 * seconds[-1] * (last / n[-1]) ** 3}
    left.set_yticks(list(shown.values()), list(shown))
    left.set_xticks([n[0], *(length for length in (512, 1024, 2048, 4096, 8192) if length <= last)])
    left.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    left.minorticks_off()
    left.set(title="Attention over all pairs, with its gradient: one head", xlabel="tokens", ylabel="time, one thread")
    ordered = sorted(results, key=lambda row: row["scores"])
    places = np.arange(len(ordered))
    bounds = np.array([row["median_bound"] for row in ordered])
    right.semilogy(places, bounds, "_", color=ours, ms=26, mew=3, label="tattn, certified at the median token")
    right.semilogy(places, [row["sampled_error"] for row in ordered], "o", color=ours, label="tattn, true error")
    for place in places[~np.isfinite(bounds)]:
        right.annotate("no bound", (place, 0.97), xycoords=("data", "axes fraction"), ha="center", va="top", color=ours)
    right.axhline(LEVEL, color="0.5", lw=1.2, ls=":", label=f"asked for: {LEVEL:g}")
    names = [f"{row['head'][0]}, {row['head'][1]}\n±{row['scores']:.2g}" for row in ordered]
    right.set_xticks(places, names)
    right.margins(x=0.12)
    right.set(
        title="How exact: a bound with every answer", xlabel="layer, head and how far its scores reach",
        ylabel="error, as a fraction of max|v|²",
    )  # fmt: skip
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save_plot(figure, path, dpi=150)


def _line_of(points: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Lengths and seconds."""
    return [p["n"] for p in points], [p["seconds"] for p in points]


def _say(text: str) -> None:
    """Print a line above the bar."""
    from tqdm import tqdm

    tqdm.write(text)


def _named(step: Step, name: str) -> Step:
    """Steps of one head."""
    return lambda what: step(f"{name}: {what}")


@contextmanager
def _steps(advance: Callable[..., None]) -> Iterator[Step]:
    """A function that names the step that begins, and counts the one before it as done."""
    begun = 0

    def step(name: str) -> None:
        nonlocal begun
        advance(begun, 0, name)
        begun += 1

    yield step
    advance(begun, 0)


@contextmanager
def progress(total: int, name: str, quiet: bool) -> Iterator[Callable[..., None]]:
    """A function (done, total, name of the step that begins) that moves a progress bar."""
    if quiet:
        yield lambda *_: None
        return
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the demo needs tqdm: pip install --group demo") from error
    with tqdm(total=total, desc=name, bar_format="{percentage:3.0f}% |{bar:20}| {elapsed} {desc}", leave=False) as bar:

        def advance(done: int, total: int, step: str = "") -> None:
            if step:
                bar.set_description_str(step, refresh=False)
            bar.update(done - bar.n)
            bar.refresh()

        yield advance
