"""Attention to a file that is larger than memory may be, under ``ulimit -v``; NumPy alone.

    python examples/streaming.py [--rows 10000000] [--limit 1024] [--folder DIRECTORY]

Keys and values of two views pass once, in pieces, and leave a summary; queries then pass in pieces, too. The limit is set on the
process itself, before any row is written. To have an exact answer to compare with, the file repeats one block of rows: attention to
all of it is attention to the block, and lse differs by the logarithm of the number of pairs of blocks.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # each thread of a BLAS reserves address space of its own
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

import tattn

DIM, BLOCK, PIECE = 8, 1000, 250_000
NAMES = ("query", "a", "b", "u", "v")


def pieces(path: Path, rows: int) -> Iterator[np.ndarray]:
    """The rows of a file, some at a time: a memmap of the whole would count as address space, which is limited."""
    for start in range(0, rows, PIECE):
        count = min(PIECE, rows - start)
        yield np.fromfile(path, np.float32, count * DIM, offset=4 * start * DIM).reshape(count, DIM)


def peak() -> int:
    """The most address space that this process has had, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmPeak"):
            return int(line.split()[1]) << 10
    raise OSError("the system does not say")


def main(arguments: list[str] | None = None) -> float:
    """Stream, and compare: the largest error, relative to max|u| max|v|."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**7, help=f"a multiple of {BLOCK}")
    parser.add_argument("--limit", type=int, default=1024, help="MiB of address space; 0 for none")
    parser.add_argument("--folder", help="where there is room for the file")
    given = parser.parse_args(arguments)
    rows, repeats = given.rows, given.rows // BLOCK
    assert rows % BLOCK == 0
    if given.limit:
        resource.setrlimit(resource.RLIMIT_AS, (given.limit << 20,) * 2)

    rng = np.random.default_rng(0)
    block = {name: rng.uniform(0 if name in "uv" else -1, 1, (BLOCK, DIM)).astype(np.float32) for name in NAMES}
    plan = tattn.plan_for(n=rows, dim=DIM, bound=1.0, degree=4)
    print(plan)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        files = {name: Path(folder) / name for name in NAMES}
        for name, file in files.items():
            with file.open("wb") as opened:
                for _ in range(repeats):
                    block[name].tofile(opened)
        size = sum(file.stat().st_size for file in files.values())
        print(f"{rows:,} rows, {size / 2**20:,.0f} MiB in files, {given.limit:,} MiB of address space allowed")
        start = time.perf_counter()
        empty = [np.zeros((0, DIM), np.float32)] * 2
        summary = tattn.summarize(empty, empty, plan)
        for a, b, u, v in zip(*(pieces(files[name], rows) for name in NAMES[1:]), strict=True):
            summary = summary.update([a, b], [u, v])
        summarized = time.perf_counter()
        # Queries are repeated as well: what the first block gets is what all get.
        worst, expected = 0.0, None
        for query in pieces(files["query"], rows):
            out, lse = summary.attend(query, return_lse=True)
            if expected is None:
                checked = query[:50]
                expected = tattn.tensor_attention(
                    checked, [block["a"], block["b"]], [block["u"], block["v"]], method="exact", return_lse=True
                )
                lse_error = np.abs(lse[:50] - (expected[1] + 2 * np.log(repeats))).max()
            worst = max(worst, float(np.abs(out[:50] - expected[0]).max()))
        answered = time.perf_counter()
        highest = peak()
        if given.limit and size > given.limit << 20:
            try:
                [np.fromfile(file, np.float32) for file in files.values()]
            except MemoryError:
                print("the files cannot be read at once: MemoryError")
            else:
                raise AssertionError("the limit does not hold")
    sizes = [np.abs(block[name]).max() for name in ("u", "v")]
    worst /= float(sizes[0] * sizes[1])
    print(f"summary of {summary.counts[0]:,.0f} rows of each view in {summarized - start:.0f} s")
    print(f"answers to {rows:,} queries in {answered - summarized:.0f} s")
    print(f"error {worst:.1e} against exact, certified {plan.error:.1e}; lse off by {lse_error:.1e}")
    print(f"peak of address space {highest / 2**20:,.0f} MiB")
    return worst


if __name__ == "__main__":
    main()
