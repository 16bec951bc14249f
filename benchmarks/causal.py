"""What causal attention costs beside attention to all rows, and decoding token by token beside the causal call.

    python -m benchmarks.causal cost [--library numpy|torch] [--quick]
    python -m benchmarks.causal channels [--library numpy|torch] [--quick]
    python -m benchmarks.causal windows [--library numpy|torch] [--quick]
    python -m benchmarks.causal decay [--library numpy|torch] [--quick]
    python -m benchmarks.causal decay-in-windows [--library numpy|torch] [--quick]
    python -m benchmarks.causal decoding [--tokens 100000] [--quick]

float32, one thread. Processor time, the best of runs that take turns.
"""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import tattn

from .turns import seconds

# Views, channels, degree, channels of the values, rows.
SHAPES = (
    (1, 8, 4, 8, 16384),
    (2, 8, 4, 8, 8192),
    (2, 8, 4, 64, 8192),
    (2, 16, 3, 16, 4096),
    (2, 8, 7, 8, 1024),
    (3, 8, 3, 8, 768),
)


def move_to(library: str) -> Callable[[np.ndarray], Any]:
    """From NumPy's arrays to those of a library, which takes one thread."""
    if library == "numpy":
        return np.asarray
    import torch

    torch.set_num_threads(1)
    return torch.tensor


def cost(library: str, quick: bool) -> None:
    """Causal over all rows, forward and with the gradient, by kernels and by array operations, and the error of a few rows."""
    move = move_to(library)
    print(
        "| views | d | degree | rank | dv | rows | causal, s | over all rows | without kernels | with its gradient, s "
        "| over all rows | without kernels | error | stated |"
    )
    print("|" + "---|" * 14)
    tattn.warm_up()
    for views, dim, degree, value_dim, n in SHAPES[:2] if quick else SHAPES:
        rng = np.random.default_rng(0)
        query, *keys = (move(2 * rng.random((n, dim), dtype=np.float32) - 1) for _ in range(views + 1))
        values = [move(2 * rng.random((n, value_dim), dtype=np.float32) - 1) for _ in range(views)]
        made: dict[str, Any] = {"n": n, "dim": dim, "order": views + 1, "bound": 1.0, "degree": degree}
        plans = [tattn.plan_for(**made, value_dim=value_dim, causal=causal) for causal in (False, True)]

        def forward(plan: tattn.Plan) -> Any:
            return tattn.tensor_attention(query, keys, values, plan=plan, causal=plan.causal)  # noqa: B023

        def both(plan: tattn.Plan) -> Any:
            out, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan, causal=plan.causal)  # noqa: B023
            return pullback(out)

        taken = []
        for function in (forward, both):
            all_rows, prefixes = (partial(function, plan) for plan in plans)
            taken += seconds([all_rows, prefixes, partial(without_kernels, prefixes)], 3)
        plain, causal, arrays, plain_both, causal_both, arrays_both = taken
        error, _ = tattn.measure_error(query, keys, values, forward(plans[1]), causal=True, rows=4)
        print(
            f"| {views} | {dim} | {degree} | {plans[1].rank} | {value_dim} | {n} "
            f"| {causal:.3f} | {causal / plain:.2f} | {arrays / plain:.1f} "
            f"| {causal_both:.3f} | {causal_both / plain_both:.2f} | {arrays_both / plain_both:.1f} "
            f"| {error:.1e} | {plans[1].error:.1e} |",
            flush=True,
        )


def channels(library: str, quick: bool) -> None:
    """Causal calls with complex channels over such with as many real ones: forward, with the gradient, and a token."""
    move = move_to(library)
    print(
        "| views | d | degree | rank | dv | rows | complex, s | over real | with its gradient, s | over real "
        "| a token, µs | over real |"
    )
    print("|" + "---|" * 12)
    tattn.warm_up(channels=("real", "complex"))
    shapes = tuple(shape for shape in SHAPES if shape[0] > 1)
    for views, dim, degree, value_dim, n in shapes[:1] if quick else shapes:
        rng = np.random.default_rng(0)
        query, *keys = (move(2 * rng.random((n, dim), dtype=np.float32) - 1) for _ in range(views + 1))
        values = [move(2 * rng.random((n, value_dim), dtype=np.float32) - 1) for _ in range(views)]
        made: dict[str, Any] = {"n": n, "dim": dim, "order": views + 1, "bound": 1.0, "degree": degree}
        plans = [tattn.plan_for(**made, causal=True, channels=kind) for kind in ("real", "complex")]

        def forward(plan: tattn.Plan) -> Any:
            return tattn.tensor_attention(query, keys, values, plan=plan, causal=True)  # noqa: B023

        def both(plan: tattn.Plan) -> Any:
            out, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan, causal=True)  # noqa: B023
            return pullback(out)

        def tokens(plan: tattn.Plan) -> Any:
            state = tattn.DecodingState(plan)
            for i in range(256):
                at = slice(i, i + 1)
                out, state = state.step(query[at], [k[at] for k in keys], [v[at] for v in values])  # noqa: B023
            return out

        taken = []
        for function in (forward, both, tokens):
            taken += seconds([partial(function, plan) for plan in plans], 5)
        real, of_complex = taken[::2], taken[1::2]
        ratios = [c / r for c, r in zip(of_complex, real, strict=True)]
        print(
            f"| {views} | {dim} | {degree} | {plans[1].rank} | {value_dim} | {n} | {of_complex[0]:.3f} | {ratios[0]:.2f} "
            f"| {of_complex[1]:.3f} | {ratios[1]:.2f} | {1e6 * of_complex[2] / 256:.0f} | {ratios[2]:.2f} |",
            flush=True,
        )


def windows(library: str, quick: bool) -> None:
    """Windows of the same length for two views by the polynomial method, over causal calls and beside exact windows.

    The exact method computes the last few rows only, and its time is that of so many times as many.
    """
    move = move_to(library)
    n, dim = (8192 if quick else 65536), 8
    rng = np.random.default_rng(0)
    query, *keys = (move(2 * rng.random((n, dim), dtype=np.float32) - 1) for _ in range(3))
    values = [move(2 * rng.random((n, dim), dtype=np.float32) - 1) for _ in range(2)]
    tattn.warm_up()
    sizes = (64, 512) if quick else (64, 512, 4096, 32768)
    made: dict[str, Any] = {"dim": dim, "bound": 1.0}
    plans = [tattn.plan_for(n=n, **made, degree=4, causal=True)]
    plans += [tattn.plan_for(n=n, **made, degree=4, window=(w, w)) for w in sizes]

    def forward(plan: tattn.Plan) -> Any:
        return tattn.tensor_attention(query, keys, values, plan=plan, causal=True, window=plan.window)

    def both(plan: tattn.Plan) -> Any:
        out, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan, causal=True, window=plan.window)
        return pullback(out)

    def exact(plan: tattn.Plan, rows: int) -> Any:
        last = tattn.plan_for(n=(rows, n, n), **made, method="exact", window=plan.window)
        return tattn.tensor_attention(query[n - rows :], keys, values, plan=last, window=plan.window)

    some_rows = [max(1, min(n, (1 << 29) // w**2)) for w in sizes]
    taken = []
    for function in (forward, both):
        calls = [partial(function, plan) for plan in plans]
        found = seconds([*calls, *(partial(without_kernels, call) for call in calls)], 3)
        taken += [found[: len(plans)], found[len(plans) :]]
    of_forward, arrays, of_both, arrays_both = taken
    of_exact = seconds([partial(exact, *of) for of in zip(plans[1:], some_rows, strict=True)], 2)
    print(
        "| window | polynomial, s | over causal | without kernels | with its gradient, s | over causal "
        "| without kernels | exact, s | over polynomial | error | stated |"
    )
    print("|" + "---|" * 11)
    for i, (w, plan, rows) in enumerate(zip(sizes, plans[1:], some_rows, strict=True)):
        windowed, windowed_both, slow = of_forward[i + 1], of_both[i + 1], of_exact[i] * n / rows
        error = np.abs(np.asarray(forward(plan))[n - rows :] - np.asarray(exact(plan, rows))).max()
        print(
            f"| {w:,} | {windowed:.2f} | {windowed / of_forward[0]:.1f} | {arrays[i + 1] / arrays[0]:.1f} "
            f"| {windowed_both:.2f} | {windowed_both / of_both[0]:.1f} | {arrays_both[i + 1] / arrays_both[0]:.1f} "
            f"| {slow:.3g} | {slow / windowed:.3g} | {error:.1e} | {plan.error:.1e} |",
            flush=True,
        )


def decay(library: str, quick: bool) -> None:
    """Causal calls where keys decay, by the same factor in both views, over such where they do not."""
    move, n = move_to(library), 8192 if quick else 65_536
    print("| factor of a row | forward, s | over none | with its gradient, s | over none |\n|" + "---|" * 5)
    tattn.warm_up()
    rng = np.random.default_rng(0)
    query, *keys = (move(2 * rng.random((n, 8), dtype=np.float32) - 1) for _ in range(3))
    values = [move(2 * rng.random((n, 8), dtype=np.float32) - 1) for _ in range(2)]
    plan = tattn.plan_for(n=n, dim=8, bound=1.0, degree=4, causal=True)

    def forward(factor: Any) -> Any:
        return tattn.tensor_attention(query, keys, values, plan=plan, causal=True, decay=factor)

    def both(factor: Any) -> Any:
        out, pullback = tattn.tensor_attention_vjp(query, keys, values, plan=plan, causal=True, decay=factor)
        return pullback(out)

    # The steepest slopes of ALiBi are 1/2 and 1/4 with eight heads.
    numbers = (None, 0.999, 0.99, 0.9, float(np.exp(-0.25)), float(np.exp(-0.5)), 0.3, 0.1)
    factors = [None if x is None else [move(np.asarray(x, np.float32))] * 2 for x in numbers]
    of_forward, of_both = (seconds([partial(function, x) for x in factors], 5) for function in (forward, both))
    for number, one, two in zip(numbers, of_forward, of_both, strict=True):
        name = "none" if number is None else f"{number:.3g}"
        print(f"| {name} | {one:.3f} | {one / of_forward[0]:.2f} | {two:.3f} | {two / of_both[0]:.2f} |", flush=True)


def decay_in_windows(library: str, quick: bool) -> None:
    """Windows where keys decay, by the same factor in both views, over such where they do not; and by the exact method.

    The exact method computes the last rows only, and its time is that of so many times as many.
    """
    move, n, rows = move_to(library), 1024 if quick else 4096, 256
    tattn.warm_up()
    rng = np.random.default_rng(0)
    query, *keys = (move(2 * rng.random((n, 8), dtype=np.float32) - 1) for _ in range(3))
    values = [move(2 * rng.random((n, 8), dtype=np.float32) - 1) for _ in range(2)]
    print(
        "| window | factor | forward, s | over none | with its gradient, s | over none | without kernels | exact, s |"
    )
    print("|" + "---|" * 8)
    factors: tuple[float | None, ...] = (None, 0.999, 0.9, 0.6, 0.3)
    for window in (256, 1024)[: 1 if quick else 2]:
        made: dict[str, Any] = {"dim": 8, "bound": 1.0, "window": (window, window)}
        plan = tattn.plan_for(n=n, degree=4, **made)
        last = tattn.plan_for(n=(rows, n, n), method="exact", **made)

        def forward(factor: Any, start: int = 0, plan: tattn.Plan = plan) -> Any:
            of_rows, decay = query[start:], None if factor is None else [factor] * 2
            return tattn.tensor_attention(of_rows, keys, values, plan=plan, window=plan.window, decay=decay)

        def both(factor: Any, plan: tattn.Plan = plan) -> Any:
            decay = None if factor is None else [factor] * 2
            found = tattn.tensor_attention_vjp(query, keys, values, plan=plan, window=plan.window, decay=decay)
            return found[1](found[0])

        calls: list[Callable[[], Any]] = [partial(forward, x) for x in factors]
        of_forward = seconds([*calls, *(partial(without_kernels, call) for call in calls)], 5)
        found = [of_forward[: len(calls)], seconds([partial(both, x) for x in factors], 5)]
        arrays = of_forward[len(calls) :]
        exact = seconds([partial(forward, x, n - rows, last) for x in factors[:2]], 2)
        for i, (factor, one, two, slow) in enumerate(zip(factors, *found, arrays, strict=True)):
            print(
                f"| {window:,} | {'none' if factor is None else factor} | {one:.3f} | {one / found[0][0]:.2f} "
                f"| {two:.3f} | {two / found[1][0]:.2f} | {slow:.3f} | {exact[min(i, 1)] * n / rows:.3g} |",
                flush=True,
            )


def without_kernels(function: Callable[[], Any]) -> Any:
    """What a call computes by array operations."""
    os.environ["TATTN_KERNELS"] = "0"
    try:
        return function()
    finally:
        del os.environ["TATTN_KERNELS"]


def decoding(tokens: int, quick: bool) -> None:
    """A token at a time: time and memory by the number of tokens before, and the difference from one causal call; beside it the
    time where a call takes many, and the time with decay over that without.
    """
    tokens = 2000 if quick else tokens
    tattn.warm_up()
    rng = np.random.default_rng(0)
    query, *keys = 2 * rng.random((3, tokens, 8), dtype=np.float32) - 1
    values = list(2 * rng.random((2, tokens, 8), dtype=np.float32) - 1)
    plan = tattn.plan_for(n=tokens, dim=8, bound=1.0, degree=4, causal=True)
    together = tattn.tensor_attention(query, keys, values, plan=plan, causal=True)
    state, worst, part = tattn.DecodingState(plan), 0.0, tokens // 10
    of_calls = [count for count in (1, 16, 256, 4096) if count < part]
    print(
        "| tokens | μs a token, one in a call "
        + "".join(f"| {count:,} in a call " for count in of_calls[1:])
        + "| with decay, one in a call, over none | peak memory, MiB | largest difference from the causal call |"
    )
    print("|" + "---|" * (5 + len(of_calls[1:])))

    def rows(at: slice) -> Any:
        return query[at], [k[at] for k in keys], [v[at] for v in values]

    def in_calls(state: tattn.DecodingState, start: int, count: int, decay: Any = None) -> tuple[float, Any]:
        # Seconds a token, and outputs; a few calls are too short to be timed.
        many, outs = max(count, min(part - 1, 256) // count * count), []
        begun = time.process_time()
        for i in range(start, start + many, count):
            out, state = state.step(*rows(slice(i, i + count)), decay=decay)
            outs.append(out)
        return (time.process_time() - begun) / many, np.concatenate(outs)

    for start in range(0, tokens, part):
        # One token, which is checked, before those that are timed: the same from the same state, the best of turns.
        _, state = state.step(*rows(slice(start, start + 1)))
        calls = [(count, None) for count in of_calls] + [(1, [0.99, 0.999])]
        best = [float("inf")] * len(calls)
        for _ in range(7):
            for place, (count, decay) in enumerate(calls):
                seconds_each, out = in_calls(state, start + 1, count, decay)
                best[place] = min(best[place], seconds_each)
                if decay is None:
                    worst = max(worst, float(np.abs(out - together[start + 1 : start + 1 + len(out)]).max()))
        one, *many, faded = best
        begun = time.process_time()
        for i in range(start + 1, min(start + part, tokens)):
            out, state = state.step(*rows(slice(i, i + 1)))
            worst = max(worst, float(np.abs(out - together[i]).max()))
        taken = (time.process_time() - begun) / (part - 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        times = " | ".join(f"{1e6 * x:.1f}" for x in many)
        print(
            f"| {min(start + part, tokens):,} | {1e6 * taken:.0f} | {times} | {faded / one:.2f} | {peak:.0f} | {worst:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("cost", "channels", "windows", "decay", "decay-in-windows", "decoding"))
    parser.add_argument("--library", choices=("numpy", "torch"), default="numpy")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.part == "cost":
        cost(options.library, options.quick)
    elif options.part == "channels":
        channels(options.library, options.quick)
    elif options.part == "windows":
        windows(options.library, options.quick)
    elif options.part == "decay":
        decay(options.library, options.quick)
    elif options.part == "decay-in-windows":
        decay_in_windows(options.library, options.quick)
    else:
        decoding(options.tokens, options.quick)
