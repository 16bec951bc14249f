"""Rows spread over 1, 2 and 4 processes of this machine, beside the model of docs/scaling.md.

    python -m benchmarks.scaling [--rows 200000] [--processes 1 2 4] [--out docs/scaling]

Forward and gradient of torch by gloo, one thread a process, started by torchrun. Writes measured.csv and measured.md; the error
of the output against one process stands beside the time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

import tattn
from evidence.machine import description
from evidence.tables import Table, save

DIM = VALUE_DIM = 8
DEGREE = 4
REPEATS = 9
COMPARED = 256
_ROOT = Path(__file__).parent.parent


def worker(rows: int, kept: Path) -> None:
    """One process: its share of the rows, timed together with the others; the first of all says what came out."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    rank, size = dist.get_rank(), dist.get_world_size()
    rng = np.random.default_rng(0)
    mine = slice(rank * rows // size, (rank + 1) * rows // size)
    # All draw all, so that shards are those of one call.
    drawn = [torch.tensor(rng.random((rows, DIM), dtype=np.float32)[mine]) for _ in range(6)]
    q, a, b = (2 * x - 1 for x in drawn[:3])
    u, v, g = drawn[3:]
    plan = tattn.plan_for(n=rows, dim=DIM, bound=1.0, degree=DEGREE)
    inputs = [x.requires_grad_() for x in (q, a, b, u, v)]

    def attention() -> Any:
        out = tattn.distributed.tensor_attention(q, [a, b], [u, v], plan=plan, check=False)
        torch.autograd.grad(out, inputs, g)
        return out

    def together(function: Callable[[], Any], repeats: int) -> tuple[float, float]:
        """Shortest time from when all begin until all are done, and processor time of the busiest, in seconds."""
        times, busy = [], []
        for i in range(repeats + 1):
            dist.barrier()
            start, used = time.perf_counter(), time.process_time()
            function()
            mine = torch.tensor(time.process_time() - used)
            dist.all_reduce(mine, dist.ReduceOp.MAX)
            if i:
                times.append(time.perf_counter() - start)
                busy.append(float(mine))
        return min(times), min(busy)

    seconds, processor = together(attention, REPEATS)
    nothing, _ = together(lambda: None, 50)
    buffer = torch.zeros(2 * plan.rank * (VALUE_DIM + 1), dtype=torch.float64)
    summing = max(0.0, together(lambda: dist.all_reduce(buffer), 50)[0] - nothing)
    if rank == 0:
        np.save(kept, attention()[:COMPARED].detach().numpy())
        result = {"seconds": seconds, "processor": processor, "one_sum": summing, "bytes": buffer.nbytes}
        print(json.dumps(result), flush=True)
    else:
        attention()
    dist.destroy_process_group()


def measured(rows: int, processes: int, folder: Path) -> dict[str, Any]:
    """What the processes say, and the rows of the output that are compared."""
    kept = folder / f"{processes}.npy"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
         "-m", "benchmarks.scaling", "--rows", str(rows), "--worker", str(kept)],
        check=True, capture_output=True, text=True, cwd=_ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "out": np.load(kept)}


def page(table: Table, rows: int, machine: dict[str, Any]) -> str:
    """The table in words."""
    lines = [
        "| processes | rows of each | processor time of each, s | share of one process's | 1/p | from start to end, s | model, s | "
        "one sum of the summaries, s | bytes in it | error against one process |",
        "| --: " * 10 + "|",
    ]
    for row in table:
        lines.append(
            f"| {row['processes']} | {row['rows_each']:,} | {row['processor_seconds']:.3g} | "
            f"{row['processor_seconds'] / table[0]['processor_seconds']:.2f} | {1 / row['processes']:.2f} | {row['seconds']:.3g} | "
            f"{row['model_seconds']:.3g} | {row['one_sum_seconds']:.2g} | {row['bytes']:,} | {row['error']:.1e} |"
        )
    cores = machine["cores"]
    more = [row["processes"] for row in table if row["processes"] > cores]
    shared = (
        f"It has {cores} cores: {' and '.join(map(str, more))} processes share them, so nothing can be gained beyond {cores}, and "
        "the model divides by the number of cores there."
        if more
        else f"It has {cores} cores, as many as processes or more."
    )
    about = (
        f"{rows:,} rows in query and in each of two views, d = dv = {DIM}, degree {DEGREE}, float32, forward and gradient, torch "
        f"{machine['torch']} and gloo on one machine ({machine['cpu']}), the shortest of {REPEATS}. {shared} Other work ran on "
        "it, too: processor time does not see that, time from start to end does. Errors are relative to max|u| max|v|."
    )
    return "\n".join([about, "", *lines, ""])


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=_ROOT / "docs" / "scaling")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.rows, given.worker)
        return
    machine = description("torch")
    table: Table = []
    alone: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory() as folder:
        for processes in given.processes:
            found = measured(given.rows, processes, Path(folder))
            alone = alone or found
            busy = min(processes, machine["cores"]) / min(given.processes[0], machine["cores"])
            table.append(
                {
                    "processes": processes,
                    "rows_each": given.rows // processes,
                    "processor_seconds": found["processor"],
                    "seconds": found["seconds"],
                    # One sum forward, one backward; what one process took is the measure of the rest.
                    "model_seconds": alone["seconds"] / busy + 2 * found["one_sum"],
                    "one_sum_seconds": found["one_sum"],
                    "bytes": found["bytes"],
                    "error": float(np.abs(found["out"] - alone["out"]).max()),
                }
            )
            print(table[-1], flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    save(table, given.out / "measured.csv")
    (given.out / "measured.md").write_text(page(table, given.rows, machine), encoding="utf-8")


if __name__ == "__main__":
    main()
