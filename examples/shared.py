"""What the examples share: their options, a bar of progress, tables, a plot and a page."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from evidence.plots import save_plot
from evidence.tables import Table, load, save

try:
    from tqdm import tqdm
except ImportError:  # no bar, then
    tqdm = None

Watch = Callable[..., Iterable[Any]]
Part = Callable[[argparse.Namespace, Watch], Table]


def options(about: str | None, *, steps: int, quick_steps: int, batch: int, rate: float) -> argparse.ArgumentParser:
    """The options that all examples have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{quick_steps} steps, to see that all runs")
    parser.add_argument("--only", metavar="PART", action="append", help="some parts; 'page' measures nothing")
    parser.add_argument("--steps", type=int, help=f"{steps:,} if not given")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--out", type=Path, help="docs/examples; build/examples if quick")
    parser.set_defaults(usual_steps=steps, quick_steps=quick_steps)
    return parser


def run(
    name: str, given: argparse.Namespace, parts: dict[str, Part], plot: Callable[..., Any], page: Callable[..., str]
) -> None:
    """Measure the parts asked for, and write tables, the plot of the first part and the page of all."""
    given.steps = given.steps or (given.quick_steps if given.quick else given.usual_steps)
    folder = given.out or Path("build/examples" if given.quick else "docs/examples")
    folder.mkdir(parents=True, exist_ok=True)

    def watch(items: Iterable[Any], words: str) -> Iterable[Any]:
        if tqdm is None:
            print(words, flush=True)
            return items
        watched: Iterable[Any] = tqdm(items, desc=words)
        return watched

    paths = {part: folder / f"{name}-{part}.csv" for part in parts}
    for part in given.only or parts:
        if part != "page":
            save(parts[part](given, watch), paths[part])
    if all(path.exists() for path in paths.values()):
        tables = {part: load(path) for part, path in paths.items()}
        save_plot(plot(next(iter(tables.values()))), folder / f"{name}.png")
        (folder / f"{name}.md").write_text(written(name, tables, page), encoding="utf-8")
        print(folder / f"{name}.md")


def written(name: str, tables: dict[str, Table], page: Callable[..., str]) -> str:
    """The page of an example, with where it comes from and links to its tables."""
    made = f"<!-- Made by `python -m examples.{name}` from the tables beside it. Changes made by hand are lost. -->"
    links = ", ".join(f"[{part}]({name}-{part}.csv)" for part in tables)
    text = page(tables).replace("\n\n", f"\n\n{made}\n\n", 1)
    return f"{text}\nTables: {links}.\n"
