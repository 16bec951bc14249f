"""What examples that learn share: the loop of training, and what is told of nets that are judged at many lengths."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from evidence.plots import panels, style
from evidence.tables import Table, column, distinct, seconds, where

Watched = Callable[..., Iterable[int]]


def train(
    net: nn.Module, loss: Callable[[], Tensor], rate: float, steps: int, looks: int, watch: Watched, warm: int = 30
) -> Iterator[tuple[int, float]]:
    """Adam with warm-up and a cosine; now and then the steps so far and their processor seconds, and at the end.

    ``loss()`` draws a batch and judges the net.
    """
    optimiser = torch.optim.Adam(net.parameters(), rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda t: min(1, (t + 1) / warm) * 0.5 * (1 + math.cos(math.pi * t / steps))
    )
    spent, every = 0.0, max(1, steps // looks)
    for step in watch(range(1, steps + 1)):
        start = time.process_time()
        found = loss()
        optimiser.zero_grad()
        found.backward()
        optimiser.step()
        schedule.step()
        spent += time.process_time() - start
        if step % every == 0 or step == steps:
            yield step, spent


def ends(rows: Table, name: str) -> Table:
    """What the finished nets do at all lengths."""
    return [r for r in where(rows, model=name) if r["step"] == r["steps"]]


def mean_right(rows: Table, m: int) -> float:
    """Of right answers at length `m`, in %."""
    found = column(where(rows, rows=m), "right")
    return 100 * sum(found) / len(found)


def plot(rows: Table, models: Collection[str], trained: int, chance: float) -> tuple[Any, Any, Any]:
    """The figure and its two axes: right answers against processor time of training, a line for every seed; and by length."""
    figure, ((by_time, by_rows),) = panels(2, height=4.0)
    for i, (name,) in enumerate(distinct(rows, "model")):
        for (seed,) in distinct(where(rows, model=name), "seed") if name in models else ():
            mine = where(rows, model=name, seed=seed, rows=trained)
            by_time.plot(column(mine, "seconds"), [100 * r for r in column(mine, "right")], **style(i, markersize=3))
        final = ends(rows, name)
        lengths = [m for (m,) in distinct(final, "rows")]
        found = {m: [100 * r for r in column(where(final, rows=m), "right")] for m in lengths}
        looks = style(i, label=name, linestyle="-" if name in models else "--")
        by_rows.plot(lengths, [sum(f) / len(f) for f in found.values()], **looks)
        for m, each in found.items():
            by_rows.plot([m] * len(each), each, **style(i, linestyle="", alpha=0.35))
    for axis in (by_time, by_rows):
        axis.axhline(100 * chance, color="#000000", linestyle=":", linewidth=1)
        axis.set_ylim(0, 103)
        axis.set_ylabel("% right")
    by_rows.set_xscale("log", base=2)
    by_time.set_xlabel("processor seconds of training")
    return figure, by_time, by_rows


def of_models(rows: Table, models: Collection[str], trained: int, lengths: list[int]) -> list[list[str]]:
    """Every model at all lengths, as the lines of a table."""
    lines = []
    for (name,) in distinct(rows, "model"):
        final = ends(rows, name)
        cells = []
        for m in lengths:
            found = [100 * r for r in column(where(final, rows=m), "right")]
            spread = f" ± {(max(found) - min(found)) / 2:.1f}" if len(found) > 1 else ""
            cells.append(f"{sum(found) / len(found):.1f}{spread}")
        if name in models:
            spent = column(where(final, rows=trained), "seconds")
            facts = [f"{final[0]['parameters']:,}", f"{final[0]['steps']:,}", seconds(sum(spent) / len(spent))]
        lines.append([name, *(facts if name in models else "–––"), *cells])
    return lines
