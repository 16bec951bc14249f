"""How the plots look: colours that all readers can tell apart (Okabe and Ito), small files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def style(i: int, **more: Any) -> dict[str, Any]:
    """Colour and marker of the i-th line."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.3,
        **more,
    }


def drawing() -> Any:
    """pyplot, without a screen; ModuleNotFoundError says what to install."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install --group demo") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def panels(columns: int, rows: int = 1, height: float = 3.7, **options: Any) -> tuple[Any, Any]:
    """A figure and its axes, (rows, columns), with grids."""
    figure, axes = drawing().subplots(
        rows, columns, figsize=(4.4 * columns, height * rows), layout="constrained", squeeze=False, **options
    )
    for a in axes.flat:
        a.grid(alpha=0.25)
    return figure, axes


def legend_below(figure: Any, axis: Any, columns: int = 4) -> None:
    """One legend for all panels, of the lines of one of them."""
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize="small", frameon=False
    )


def save_plot(figure: Any, path: Path, dpi: int = 100) -> None:
    """Write a PNG and forget the figure."""
    figure.savefig(path, dpi=dpi, metadata={"Software": None})
    drawing().close(figure)
