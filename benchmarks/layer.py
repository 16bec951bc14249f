"""The layer beside `nn.MultiheadAttention`: time of degrees, what bounds and degrees learn, and lengths.

    python -m benchmarks.layer [--only default learning rows] [--out docs/layers]

On one thread; every time is the least of several that take turns. Writes tables as CSV, and from them default.md and rows.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tattn
from evidence.machine import description
from evidence.tables import Table, distinct, load, markdown, save, where
from examples.triple_detection import Ordinary, Task, made, tensor_attention, train
from tattn.nn import AttentionConfig

from .lengths import LAYER_MARKS, between_marks
from .turns import seconds

EMBED, HEADS = 64, 8
BOUNDS, DEGREES = (1.0, 2.0, 3.0), (3, 4, 5, 6)
LEARNED = (3, 4, 6)
ROWS = (256, 1024, 2048, 4096, 16384)
# Triple detection with fewer rows and a smaller modulus than in examples/: learned in few steps.
TASK, STEPS, BATCH, RATE, SEEDS = Task(8, 8, 41), 600, 128, 1e-2, 3


class Causal(nn.MultiheadAttention):
    """`nn.MultiheadAttention` as people write it for speed: its projections around a fused causal call."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(..., n, embed_dim) → the same."""
        projections = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        heads = (*x.shape[:-1], self.num_heads, self.head_dim)
        q, k, v = (y.reshape(heads).transpose(-2, -3) for y in projections)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.out_proj(out.transpose(-2, -3).flatten(-2))
        return projected


class Every(nn.MultiheadAttention):
    """`nn.MultiheadAttention` of a row to all rows."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(..., n, embed_dim) → the same."""
        out: Tensor = super().forward(x, x, x, need_weights=False)[0]
        return out


def steps_of(layers: list[nn.Module], batch: int, rows: int) -> list[Callable[[], Any]]:
    """Forward and backward of each, to its weights and its input."""
    drawn = torch.randn(batch, rows, EMBED, requires_grad=True)

    def step(layer: nn.Module, x: Tensor = drawn) -> None:
        torch.autograd.backward(layer(x).sum())

    for layer in layers:
        step(layer, drawn[:, :1024])
    return [partial(step, layer) for layer in layers]


def default() -> Table:
    """Forward and backward at 1,024 rows for every degree, over `nn.MultiheadAttention`; any bound takes the same time."""
    layers = [tattn.nn.TensorAttention(EMBED, HEADS, degree=degree) for degree in DEGREES]
    table = []
    for batch, repeats in ((1, 9), (8, 4)):
        ordinary, *times = seconds(steps_of([Every(EMBED, HEADS, batch_first=True), *layers], batch, 1024), repeats)
        for degree, layer, time in zip(DEGREES, layers, times, strict=True):
            rank = layer.plan.rank  # type: ignore[union-attr]
            table.append(
                {"batch": batch, "degree": degree, "rank": rank, "seconds": time, "ordinary_seconds": ordinary}
            )
    return table


def learning() -> Table:
    """Share of numbers told right in triple detection after few steps, for every bound, degree and seed; degree 0 is ordinary."""
    table = []
    for bound, degree in [(0.0, 0), *((b, g) for b in BOUNDS for g in LEARNED)]:
        for seed in range(SEEDS):
            pairs = tensor_attention(8, 8, bound=bound or 1.0, degree=degree or 1)
            attention = pairs if degree else partial(Ordinary, heads=8, head_dim=8)
            last = train(made(attention, seed), TASK, STEPS, BATCH, RATE, seed, STEPS, lambda r: r)[-1]
            table.append({
                "bound": bound, "degree": degree, "seed": seed, "right": last["right"], "majority": last["majority"],
            })  # fmt: skip
    return table


def rows() -> Table:
    """The default layer over `nn.MultiheadAttention`, all rows and causal, forward and backward, at several lengths."""
    table = []
    for n in ROWS:
        pairs = {
            "all rows": [Every(EMBED, HEADS, batch_first=True), tattn.nn.TensorAttention(EMBED, HEADS)],
            "causal": [Causal(EMBED, HEADS, batch_first=True), tattn.nn.TensorAttention(EMBED, HEADS, causal=True)],
        }
        for sees, layers in pairs.items():
            ordinary, ours = seconds(steps_of(layers, 1, n), 9 if n < 4096 else 3 if n < 16384 else 2)
            table.append({"sees": sees, "rows": n, "ordinary_seconds": ordinary, "seconds": ours})
    return table


def default_page(times: Table, learned: Table) -> str:
    """Both tables of the default as one."""
    lines = []
    for bound, degree in [(0, 0), *((b, g) for b in BOUNDS for g in DEGREES)]:
        right = (
            ", ".join(f"{100 * row['right']:.0f}" for row in where(learned, bound=bound, degree=degree)) or "not run"
        )
        if not degree:
            lines.append(["`nn.MultiheadAttention`", "–", "–", "1", "1", right])
            continue
        error = AttentionConfig(EMBED, HEADS, bound=bound, degree=degree).plan().error  # type: ignore[union-attr]
        of_batch = [where(times, batch=batch, degree=degree)[0] for batch in (1, 8)]
        shares = [f"{row['seconds'] / row['ordinary_seconds']:.2f}" for row in of_batch]
        lines.append([f"bound {bound:g}, degree {degree}", f"{of_batch[0]['rank']:,}", f"{error:.2g}", *shares, right])
    heads = ["layer", "rank", "error", "time, batch 1", "time, batch 8", "% right, three seeds"]
    return "\n\n".join([
        markdown(lines, heads),
        f"Time: forward and backward over `nn.MultiheadAttention`, embed {EMBED}, {HEADS} heads, 1,024 rows, {machine()}. "
        f"Right: [triple detection](examples/triple_detection.md) with {TASK.rows} numbers below {TASK.modulus}, 8 heads of "
        f"8 channels, after {STEPS} steps; always saying the more frequent answer gets {100 * learned[0]['majority']:.0f} %.",
    ])  # fmt: skip


def rows_page(table: Table) -> str:
    """A column for each length."""
    lines = []
    for (sees,) in distinct(table, "sees"):
        mine = where(table, sees=sees)
        for name, key in (("`nn.MultiheadAttention`", "ordinary_seconds"), ("`tattn.nn.TensorAttention`", "seconds")):
            lines.append([f"{name}, {sees}", *(f"{1000 * row[key]:,.0f} ms" for row in mine)])
        lines.append([f"ratio, {sees}", *(f"{row['seconds'] / row['ordinary_seconds']:.2f}" for row in mine)])
    heads = ["rows", *(f"{n:,}" for n in ROWS)]
    return "\n\n".join([
        markdown(lines, heads),
        f"Forward and backward of `TensorAttention({EMBED}, {HEADS})` and `nn.MultiheadAttention({EMBED}, {HEADS})`, batch 1, "
        f"{machine()}. Ordinary causal attention is `scaled_dot_product_attention(..., is_causal=True)` between the same "
        "projections.",
    ])  # fmt: skip


def machine() -> str:
    """What ran it."""
    about = description("torch")
    return f"float32, one thread of {about['cpu']}, torch {about['torch']}"


PARTS: dict[str, Callable[[], Table]] = {"default": default, "learning": learning, "rows": rows}


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "layers")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    given.out.mkdir(parents=True, exist_ok=True)
    for part in given.only:
        save(PARTS[part](), given.out / f"{part}.csv")
    tables = {part: load(given.out / f"{part}.csv") for part in PARTS if (given.out / f"{part}.csv").exists()}
    if {"default", "learning"} <= tables.keys():
        (given.out / "default.md").write_text(
            default_page(tables["default"], tables["learning"]) + "\n", encoding="utf-8"
        )
    if "rows" in tables:
        page = rows_page(tables["rows"])
        (given.out / "rows.md").write_text(page + "\n", encoding="utf-8")
        readme = Path(__file__).parent.parent / "README.md"
        if given.out == parser.get_default("out"):
            readme.write_text(between_marks(readme.read_text(encoding="utf-8"), page, LAYER_MARKS), encoding="utf-8")


if __name__ == "__main__":
    main()
