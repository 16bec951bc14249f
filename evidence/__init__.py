"""Evidence for what the paper claims: tables (CSV), plots (PNG) and a page made of the tables alone.

Each part measures rows for its tables, draws plots of them and says in words what they show. Tables are saved and read
back before anything is drawn or said, so that a page can be made again from its tables, and holds nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tattn.terminal import writable_folder

from . import border, growth, heads, learning, quality, stability
from .machine import description
from .page import page
from .plots import drawing, save_plot
from .tables import Table, load, save


class Part(NamedTuple):
    """One question, its measurements, plots and words."""

    name: str
    title: str
    measure: Callable[[bool, Callable[..., Iterable[Any]]], dict[str, Table]]
    plots: Callable[[dict[str, Table]], dict[str, Any]]
    words: Callable[[dict[str, Table]], str]


PARTS = (
    Part("growth", "Time and memory against n", growth.measure, growth.plots, growth.words),
    Part("quality", "Error against degree, range and dtype", quality.measure, quality.plots, quality.words),
    Part("stability", "Where rounding takes over", stability.measure, stability.plots, stability.words),
    Part("border", "Beyond the assumption", border.measure, border.plots, border.words),
    Part("heads", "The assumption on real heads", heads.measure, heads.plots, heads.words),
    Part("learning", "Learning with the approximate gradient", learning.measure, learning.plots, learning.words),
)


def run(*, out: str | None = None, quick: bool = False, only: Sequence[str] = ()) -> None:
    """Measure the parts asked for, and make the page from all tables in the folder.

    Parameters
    ----------
    out : str, optional
        Folder for tables, plots and ``index.md``; docs/evidence, or build/evidence for a quick run.
    quick : bool
        Smaller sizes: to see that everything runs, not to be quoted.
    only : sequence of str
        Names of parts; all if empty.

    Raises
    ------
    ValueError
        For a part that does not exist.
    ModuleNotFoundError
        If a package is missing; says what to install.
    """
    unknown = sorted(set(only) - {part.name for part in PARTS})
    if unknown:
        raise ValueError(f"parts are {', '.join(part.name for part in PARTS)}; got {', '.join(unknown)}")
    chosen = [part for part in PARTS if not only or part.name in only]
    drawing()
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"evidence needs {error.name}: pip install --group demo") from error
    if any(part.name == "heads" for part in chosen):
        heads.check()
    folder = writable_folder("out", out or ("build/evidence" if quick else "docs/evidence"))
    for part in chosen:

        def watch(items: Iterable[Any], name: str = part.name) -> Iterable[Any]:
            found: Iterable[Any] = tqdm(list(items), desc=name)
            return found

        start = sum(os.times()[:4])
        for name, table in part.measure(quick, watch).items():
            save(table, folder / f"{name}.csv")
        about = {
            "part": part.name,
            "quick": quick,
            "seconds": sum(os.times()[:4]) - start,
            **description("torch", "matplotlib"),
        }
        save([about], folder / f"machine-{part.name}.csv")
    write(folder, plot=[part.name for part in chosen])
    print(folder / "index.md")


def write(folder: Path, plot: Sequence[str] = ()) -> None:
    """Make the page from the tables in the folder, and the plots of some parts."""
    tables = {path.stem: load(path) for path in sorted(folder.glob("*.csv"))}
    sections = []
    for part in PARTS:
        if f"machine-{part.name}" not in tables:
            continue
        if part.name in plot:
            for name, figure in part.plots(tables).items():
                save_plot(figure, folder / f"{name}.png")
        sections.append((part.name, part.title, part.words(tables)))
    text = page(sections, [row for name, rows in tables.items() if name.startswith("machine-") for row in rows])
    (folder / "index.md").write_text(text, encoding="utf-8")
