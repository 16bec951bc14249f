"""What the polynomial method is measured against: its own matrix products, and its own growth.

    python benchmarks/limit.py [--library numpy|torch] [--value-dim DV] [--quick] [--million]

One thread. Ratios are of one run; the error stands beside the time.
"""

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import tattn

DIM = 8
DEGREE = 4


def best(function: Callable[[], Any], repeats: int) -> float:
    """Shortest time of several runs, after one to warm up, in seconds."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def draw(n: int, value_dim: int = DIM) -> list[np.ndarray]:
    """query, two keys, two values and a gradient in float32, scores within ±1."""
    rng = np.random.default_rng(0)
    return [2 * rng.random((n, d), dtype=np.float32) - 1 for d in (*(DIM,) * 3, *(value_dim,) * 3)]


def passes(move: Callable[[np.ndarray], Any], n: int, value_dim: int = DIM) -> tuple[Callable[[], Any], tattn.Plan]:
    """Forward and gradient as one function, and the plan."""
    q, a, b, u, v, g = map(move, draw(n, value_dim))
    plan = tattn.plan_for(n=n, dim=DIM, bound=1.0, degree=DEGREE)

    def run() -> Any:
        out, pullback = tattn.tensor_attention_vjp(q, [a, b], [u, v], plan=plan)
        pullback(g)
        return out

    return run, plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=("numpy", "torch"), default="numpy")
    parser.add_argument("--value-dim", type=int, default=DIM, help="channels of the values (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="shorter sequences, fewer repeats")
    parser.add_argument("--million", action="store_true", help="a million rows, with the memory that they take")
    given = parser.parse_args()
    move: Callable[[np.ndarray], Any] = np.asarray
    if given.library == "torch":
        import torch

        torch.set_num_threads(1)
        move = torch.from_numpy

    if given.million:
        million(move)
        return
    repeats = 2 if given.quick else 5
    n = 1 << (14 if given.quick else 16)
    dv = given.value_dim
    run, plan = passes(move, n, dv)
    q, a, b, u, v, _ = map(move, draw(n, dv))
    error = tattn.measure_error(q, [a, b], [u, v], run(), rows=1)[0] if n <= 1 << 14 else check(move, plan, dv)
    features = move(np.random.default_rng(1).standard_normal((plan.rank, n)).astype(np.float32))
    columns = move(np.random.default_rng(2).standard_normal((n, dv + 1)).astype(np.float32))
    ours = best(run, repeats)
    bare = 9 * best(lambda: features @ columns, repeats)
    print(
        f"{given.library}, one thread, float32, n = {n:,}, d = {DIM}, dv = {dv}, degree {plan.degree}, rank {plan.rank}"
    )
    print(
        f"forward + gradient {ours:.3f} s; nine bare products (r × n)·(n × (dv + 1)) {bare:.3f} s; ratio {ours / bare:.2f}"
    )
    print(f"error {error:.1e}, stated {plan.error:.1e}")

    sizes = [1 << i for i in (range(12, 16) if given.quick else range(14, 19))]
    times = [best(passes(move, n, dv)[0], repeats) for n in sizes]
    exponent = np.polyfit(np.log(sizes), np.log(times), 1)[0]
    for n, seconds in zip(sizes, times, strict=True):
        print(f"  n = {n:>8,}: {seconds:.3f} s, {seconds / n * 1e6:.2f} µs a row")
    print(f"time grows as n^{exponent:.3f}")


def check(move: Callable[[np.ndarray], Any], plan: tattn.Plan, value_dim: int) -> float:
    """Error against the exact method on 512 rows, as stated errors are measured."""
    q, a, b, u, v, _ = map(move, draw(512, value_dim))
    out = tattn.tensor_attention(q, [a, b], [u, v], plan=plan)
    return tattn.measure_error(q, [a, b], [u, v], out, rows=512)[0]


def million(move: Callable[[np.ndarray], Any]) -> None:
    """Forward and gradient of 10^6 rows, and the memory beyond inputs and outputs."""

    def peak() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))

    def now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    n = 1_000_000
    passes(move, 1000)[0]()
    q, a, b, u, v, g = map(move, draw(n))
    plan = tattn.plan(q, [a, b], [u, v])
    before = now()
    start = time.perf_counter()
    out, pullback = tattn.tensor_attention_vjp(q, [a, b], [u, v], plan=plan)
    forward = time.perf_counter() - start
    dquery, dkeys, dvalues = pullback(g)
    total = time.perf_counter() - start
    outputs = 4 * n * (sum(x.shape[-1] for x in (out, dquery, *dkeys, *dvalues)) + 2)
    print(plan)
    extra = max(0, peak() - before - outputs) / 2**20
    print(f"forward {forward:.1f} s, with gradient {total:.1f} s; {extra:.0f} MiB beyond inputs and outputs")


if __name__ == "__main__":
    main()
