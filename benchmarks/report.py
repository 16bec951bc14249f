"""Tables, plots and a page from the JSON of pytest-benchmark.

    python -m benchmarks.report [build/benchmarks/full] [--docs FOLDER]

Tables are saved and read back before anything is drawn or said, so the page holds nothing but what stands in them and what
docs/benchmarks/tried.md says. The report of a quick run stays beside its JSON, and that of a GPU goes into docs/gpu.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from evidence.plots import save_plot
from evidence.tables import Row, Table, load, save

from .figures import figures
from .goals import goals
from .page import page

_ROOT = Path(__file__).parent.parent
TABLES = ("measured", "machine", "goals")


def rows_of(contents: Sequence[Row]) -> tuple[Table, Table]:
    """All cases of some JSON files, and the machines they ran on, each once."""
    measured = [
        {**case["extra_info"], "seconds": case["stats"]["min"], "rounds": case["stats"]["rounds"]}
        for content in contents
        for case in content["benchmarks"]
        # What failed is not recorded.
        if case["extra_info"]
    ]
    machines = [content["machine_info"] for content in contents]
    return measured, [m for i, m in enumerate(machines) if m not in machines[:i]]


def write(contents: Sequence[Row], docs: Path) -> None:
    """Tables and plots into docs/benchmarks, and the page docs/benchmarks.md."""
    measured, machines = rows_of(contents)
    folder = docs / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in zip(TABLES, (measured, machines, goals(measured)), strict=True):
        save(table, folder / f"{name}.csv")
    tables = {name: load(folder / f"{name}.csv") for name in TABLES}
    drawn = figures(tables["measured"], tables["goals"])
    for old in folder.glob("*.png"):
        old.unlink()
    for name, figure in drawn.items():
        save_plot(figure, folder / f"{name}.png")
    (docs / "benchmarks.md").write_text(page(tables), encoding="utf-8")


def destination(contents: Sequence[Row], root: Path) -> Path:
    """The folder for page, tables and plots: runs on a GPU stay apart."""
    on_gpu = any(row["device"] != "cpu" for row in rows_of(contents)[0])
    return root / "docs" / "gpu" if on_gpu else root / "docs"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the report of a folder of JSON files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=_ROOT / "build" / "benchmarks" / "full")
    parser.add_argument("--docs", type=Path, help="folder for page, tables and plots")
    given = parser.parse_args(arguments)
    # A process that skipped all, or died, may leave an empty file.
    files = [file for file in sorted(given.folder.glob("*.json")) if file.stat().st_size]
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if not any(content["benchmarks"] for content in contents):
        sys.exit(f"nothing was measured in {given.folder}: run python -m benchmarks first")
    commits = sorted({content["machine_info"].get("commit", "unknown") for content in contents})
    if len(commits) > 1:
        sys.exit(
            f"files in {given.folder} are of different commits, {', '.join(commits)}: a report is of one run of everything"
        )
    quick = any(content["machine_info"]["quick"] for content in contents)
    docs = given.docs or (given.folder / "report" if quick else destination(contents, _ROOT))
    write(contents, docs)
    print(docs / "benchmarks.md")


if __name__ == "__main__":
    main()
