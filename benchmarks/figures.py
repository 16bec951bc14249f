"""The plots of the report."""

from __future__ import annotations

from typing import Any

from evidence.plots import COLOURS, legend_below, panels, style
from evidence.tables import Table, column, distinct, where

from .goals import LIMITS, passes, ratio


def figures(measured: Table, goals: Table) -> dict[str, Any]:
    """All that there is data for, by name."""
    found = {
        "goals": _goals([row for row in goals if row["met"] != ""]),
        "limit": _limit(where(measured, group="limit")),
        "growth": _growth(where(measured, group="growth")),
    }
    rivals = where(measured, group="rivals")
    for (library,) in distinct(rivals, "library"):
        found[f"rivals-{library}"] = _rivals([row for row in where(rivals, library=library) if row["dim"] < 64])
    return {name: figure for name, figure in found.items() if figure is not None}


def _goals(rows: Table) -> Any:
    """A bar for each goal: what was measured in parts of what was asked, or the inverse where more is better."""
    if not rows:
        return None
    figure, ((axis,),) = panels(1, 1, height=1 + 0.22 * len(rows))
    figure.set_figwidth(10)
    shares = [
        row["measured"] / row["asked"] if row["sign"] == "≤" else row["asked"] / max(row["measured"], 1e-9)
        for row in rows
    ]
    places = range(len(rows))
    # A share near 0 would hide the others.
    axis.barh(
        places, [max(share, 0.05) for share in shares], color=[COLOURS[2] if row["met"] else COLOURS[1] for row in rows]
    )
    axis.axvline(1, color="black", linewidth=1)
    axis.set(xscale="log", xlim=(0.04, max(4, 1.1 * max(shares))), ylim=(len(rows) - 0.4, -0.6))
    axis.set_xticks([0.1, 0.2, 0.5, 1, 2, 4], ["0.1", "0.2", "0.5", "1", "2", "4"])
    axis.minorticks_off()
    axis.set_yticks(places, [f"{row['goal']}: {row['case']}" for row in rows], fontsize="x-small")
    axis.set_xlabel("in parts of the goal: green is met")
    return figure


def _limit(rows: Table) -> Any:
    """Bars of ratios, a panel for forward and one with the gradient."""
    if not rows:
        return None
    figure, axes = panels(1, 2, height=3.4, sharex=True)
    figure.set_figwidth(9)
    cases = sorted(distinct(rows, "dim", "value_dim", "degree"))
    bars = sorted(distinct(rows, "library", "threads"), key=lambda bar: (bar[0], bar[1]))
    colours = {name: COLOURS[i] for i, name in enumerate(sorted({bar[0] for bar in bars}))}
    width = 0.84 / len(bars)
    for axis, gradient in zip(axes.flat, (False, True), strict=True):
        for i, (library, threads) in enumerate(bars):
            mine = where(rows, library=library, threads=threads, gradient=gradient)
            places = [cases.index((row["dim"], row["value_dim"], row["degree"])) for row in mine]
            axis.bar(
                [x + (i - (len(bars) - 1) / 2) * width for x in places],
                [ratio(row) for row in mine],
                0.9 * width,
                color=colours[library],
                alpha=1.0 if threads == 1 else 0.45,
                label=f"{library}, {threads} thread{'s' * (threads > 1)}",
            )
        axis.axhline(1, color="black", linewidth=1)
        axis.set(ylabel="time over bare products", title=passes(gradient))
    for value_dim, most in LIMITS.items():
        if (8, value_dim, 4) in cases:
            at = cases.index((8, value_dim, 4))
            axes[1, 0].plot([at - 0.46, at + 0.46], [most, most], color=COLOURS[3], linewidth=2, label="_")
    labels = [f"d = {dim}\ndv = {value_dim}\ndegree {degree}" for dim, value_dim, degree in cases]
    axes[1, 0].set_xticks(range(len(cases)), labels, fontsize="small")
    legend_below(figure, axes[1, 0], 6)
    return figure


def _growth(rows: Table) -> Any:
    """Time and memory against n."""
    if not rows:
        return None
    figure, ((times, memory),) = panels(2, height=4.2)
    for i, (library, dim) in enumerate(distinct(rows, "library", "dim")):
        mine = where(rows, library=library, dim=dim)
        look = style(i, label=f"{library}, d = {dim}")
        times.loglog(column(mine, "n"), column(mine, "seconds"), **look)
        told = [row for row in mine if row["peak_bytes"]]
        memory.semilogx(column(told, "n"), [row["peak_bytes"] / 2**20 for row in told], **look)
    times.set(xlabel="n", ylabel="seconds", title="time, forward + gradient")
    memory.set(xlabel="n", ylabel="MiB beyond inputs and outputs", title="memory at the peak")
    memory.set_ylim(bottom=0)
    legend_below(figure, times, 4)
    return figure


def _look(method: str) -> dict[str, Any]:
    """Polynomials in colours, our exact method in black, others dashed in grey and blue."""
    if method.startswith("polynomial"):
        degree = int(method[-1])
        return style(
            degree, color=("#E69F00", "#CC79A7", "#009E73", "#D55E00", "", "#882255")[degree - 2], linewidth=1.8
        )
    if method == "exact":
        return style(0, color="black")
    greys = {"SDPA over pair keys": COLOURS[0], "dense einsum": "#777777", "nth_order_attend": "#BBBBBB"}
    return style(len(method), color=greys.get(method, "#999999"), linestyle="--")


def _rivals(rows: Table) -> Any:
    """Time against n, a column for each d, a row for each pass; polynomials drawn through, exact methods dashed."""
    if not rows:
        return None
    dims = sorted({*column(rows, "dim")})
    figure, axes = panels(len(dims), 2, height=3.5, sharex=True, sharey=True)
    methods = [method for (method,) in distinct(rows, "method")]
    methods.sort(key=lambda name: (name.startswith("polynomial"), name == "exact", name))
    for line, gradient in zip(axes, (False, True), strict=True):
        for axis, dim in zip(line, dims, strict=True):
            for method in methods:
                mine = where(rows, method=method, dim=dim, gradient=gradient)
                look = _look(method)
                name = {"exact": "tattn, exact"}.get(method, method.replace("polynomial", "tattn, polynomial"))
                # Empty lines too: one panel gives the legend of all.
                axis.loglog(column(mine, "n"), column(mine, "seconds"), label=name, **look)
            axis.set_title(f"d = dv = {dim}, {passes(gradient)}")
    for axis in axes[-1]:
        axis.set_xlabel("n")
    for axis in axes[:, 0]:
        axis.set_ylabel("seconds")
    legend_below(figure, axes[0, 0], 3)
    return figure
