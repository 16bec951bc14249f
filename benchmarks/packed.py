"""Packed documents: a row of many short documents beside a row of one long one, and beside a loop over documents.

    python -m benchmarks.packed [--documents 10000] [--out docs/packed]

NumPy and torch on one thread; processor time, the least of calls that take turns. Writes a table as CSV, and from it packed.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import tattn
from evidence.machine import description
from evidence.tables import Table, load, markdown, save

from .libraries import make_library
from .turns import seconds

SHORTEST, LONGEST, DIM, DEGREE = 5, 500, 8, 4
ROUNDS = 2


def measure(name: str, documents: int) -> Table:
    """Seconds of one long document, of packed ones, and of a loop over these; forward, and with the gradient."""
    library = make_library(name, "cpu", 1)
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(SHORTEST, LONGEST + 1, documents))])
    n = int(offsets[-1])
    arrays = [library.array(rng.uniform(-1, 1, (n, DIM)).astype(np.float32)) for _ in range(6)]
    options = {"dim": DIM, "value_dim": DIM, "bound": 1.0, "degree": DEGREE, "method": "polynomial"}
    table = []
    for causal in (False, True):
        plan = tattn.plan_for(n=LONGEST, causal=causal, **options)  # type: ignore[arg-type]
        call = partial(attend, plan=plan, causal=causal)
        cuts = [slice(*pair) for pair in pairwise(offsets.tolist())]
        for gradient in (False, True):
            runs: list[Callable[[], Any]] = [
                partial(call, arrays, gradient),
                partial(call, arrays, gradient, offsets=offsets),
                partial(one_by_one, call, arrays, gradient, cuts),
            ]
            long, packed, loop = seconds(runs, ROUNDS)
            table.append({
                "library": name, "causal": int(causal), "gradient": int(gradient), "documents": documents, "rows": n,
                "rank": plan.rank, "long_seconds": long, "packed_seconds": packed, "loop_seconds": loop,
            })  # fmt: skip
    return table


def attend(arrays: list[Any], gradient: bool, **options: Any) -> None:
    """One call, and its gradient if asked for."""
    query, a, b, u, v, grad = arrays
    if not gradient:
        tattn.tensor_attention(query, [a, b], [u, v], **options)
        return
    _, pullback = tattn.tensor_attention_vjp(query, [a, b], [u, v], **options)
    pullback(grad)


def one_by_one(call: Callable[..., None], arrays: list[Any], gradient: bool, cuts: list[slice]) -> None:
    """A call for every document."""
    for cut in cuts:
        call([x[cut] for x in arrays], gradient)


def page(table: Table) -> str:
    """The table as it stands in the documentation."""
    lines = [
        [
            row["library"], "causal" if row["causal"] else "all rows", "gradient" if row["gradient"] else "forward",
            f"{1e6 * row['long_seconds'] / row['rows']:.2f} µs", f"{row['packed_seconds'] / row['long_seconds']:.2f}",
            f"{row['loop_seconds'] / row['packed_seconds']:.1f}",
        ]
        for row in table
    ]  # fmt: skip
    heads = ["library", "a row sees", "call", "a row of one long document", "packed over long", "loop over packed"]
    about, first = description("torch"), table[0]
    return "\n\n".join([
        markdown(lines, heads),
        f"{first['documents']:,} documents of {SHORTEST} to {LONGEST} rows, {first['rows']:,} in all, d = dv = {DIM}, two views, "
        f"degree {DEGREE}, rank {first['rank']:,}, float32, processor time on one thread of {about['cpu']}.",
    ])  # fmt: skip


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "packed")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    save([row for name in ("numpy", "torch") for row in measure(name, given.documents)], given.out / "packed.csv")
    (given.out / "packed.md").write_text(page(load(given.out / "packed.csv")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
