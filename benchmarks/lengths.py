"""Time against length: ordinary attention, attention over pairs exactly, and `tattn`; the table and the picture of README.

    python -m benchmarks.lengths [--quick | --report]

torch on one thread, a few minutes. Tables and picture go into docs/lengths, the table between the marks of README.md; those of a
quick run go into build/lengths.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tattn
from evidence.machine import description
from evidence.plots import COLOURS, drawing, save_plot
from evidence.tables import Row, Table, column, duration, load, markdown, save, short, where

from .libraries import Library, Run, make_library
from .problem import draw
from .rivals import fused

_ROOT = Path(__file__).parent.parent
_MARKS = "<!-- lengths: made by `python -m benchmarks.lengths` -->", "<!-- end of lengths -->"
# Of the table of layers, which `benchmarks.layer` measures.
LAYER_MARKS = "<!-- layers: made by `python -m benchmarks.layer` -->", "<!-- end of layers -->"
LENGTHS = tuple(1 << i for i in range(8, 21))
SHOWN = tuple(1 << i for i in range(10, 21, 2))
DIM, DEGREE = 8, 4
# Name → how time grows with the length.
METHODS = {"ordinary": 2, "exact": 3, "tattn": 1}
NAMES = {"ordinary": "ordinary attention", "exact": "over pairs, exactly", "tattn": "over pairs, `tattn`"}
# No call that would take longer, in seconds, is measured.
LONGEST, LONG, ROUNDS = 20.0, 0.5, 12


def measure(library: Library, lengths: tuple[int, ...], longest: float) -> Table:
    """Least seconds of the methods, which take turns: forward, and with the gradient; for ours the errors, too."""
    found: Table = []
    for n in lengths:
        problem = draw(n, DIM, DIM)
        arrays, grad = [library.array(x) for x in problem.arrays], library.array(problem.grad)
        plan = tattn.plan_for(n=n, dim=DIM, value_dim=DIM, bound=1.0, degree=DEGREE, method="polynomial")
        query, key, _, value, _ = arrays
        runs: dict[str, tuple[Run, Run]] = {
            "ordinary": (
                library.forward(fused, [query, key, value]),
                library.gradient(fused, [query, key, value], grad),
            ),
            "exact": (
                library.attention(arrays, None, method="exact"),
                library.attention(arrays, grad, method="exact"),
            ),
            "tattn": (library.attention(arrays, None, plan=plan), library.attention(arrays, grad, plan=plan)),
        }
        ran = [name for name in METHODS if expected(found, name, n, "gradient_seconds") <= longest]
        for name in ran:
            # Warm, and for ours compared with the definition and the bounds.
            result = [library.numpy(x) for x in runs[name][1]()] if name != "ordinary" else []
            errors = problem.errors(result, plan if name == "tattn" else None) if result else {}
            found.append(
                {
                    "method": name,
                    "n": n,
                    "seconds": "",
                    "gradient_seconds": "",
                    "certified": plan.error if name == "tattn" else "",
                    "error": errors.get("error", ""),
                    "gradient_error": errors.get("gradient_error", ""),
                }
            )
        for i in range(ROUNDS):
            for name in ran:
                (row,) = where(found, method=name, n=n)
                # Long calls take two rounds.
                if i > 1 and row["gradient_seconds"] > LONG:
                    continue
                for which, run in zip(("seconds", "gradient_seconds"), runs[name], strict=True):
                    row[which] = min(seconds(run), row[which] or float("inf"))
    return found


def seconds(run: Callable[[], Any]) -> float:
    """Processor time of one call: on one thread that of a clock, unless others use the processor."""
    start = time.process_time()
    run()
    return time.process_time() - start


def expected(table: Table, name: str, n: int, which: str) -> float:
    """Seconds at a length, from the longest that was measured and how time grows; 0 if none was."""
    known = where(table, method=name)
    if not known:
        return 0.0
    last = known[-1]
    grown: float = last[which] * (n / last["n"]) ** METHODS[name]
    return grown


def readme(table: Table, machine: Row) -> str:
    """The table of README."""
    lines = []
    for n in SHOWN:
        cells = []
        for name in METHODS:
            measured = where(table, method=name, n=n)
            known = measured or table
            times = [duration(expected(known, name, n, which)) for which in ("seconds", "gradient_seconds")]
            cells.append(" / ".join(times) if measured else f"*≈ {times[0]} / {times[1]}*")
        (ours,) = where(table, method="tattn", n=n)
        errors = [short(ours[which]) for which in ("certified", "error", "gradient_error")]
        lines.append([f"{n:,}", *cells, f"{errors[0]} / {errors[1]}", errors[2]])
    heads = ["rows", *NAMES.values(), "error: certified / measured", "of gradients, measured"]
    return f"""\
{markdown(lines, heads)}

Forward / forward with gradient: processor time of one head of {DIM} channels, scores within ±1, degree {DEGREE}, float32,
torch {machine["torch"].partition("+")[0]}, one thread of an {machine["cpu"]}. *≈* is extrapolated from the longest call that was
measured, as n² or n³. Errors are fractions of max|u| max|v|, for gradients of their largest entry. From
`python -m benchmarks.lengths`.

![Time against rows: ordinary attention, over pairs exactly, and tattn](docs/lengths/times.png)"""


def figure(table: Table) -> Any:
    """Time of forward and gradient against the length; dashed where it was not measured."""
    drawn, axis = drawing().subplots(figsize=(8, 4.6), layout="constrained")
    last = max(column(table, "n"))
    for name, colour in zip(METHODS, (COLOURS[2], COLOURS[1], COLOURS[0]), strict=True):
        mine = where(table, method=name)
        label = NAMES[name].replace("`", "")
        axis.loglog(column(mine, "n"), column(mine, "gradient_seconds"), "o-", color=colour, ms=4, label=label)
        end = mine[-1]["n"]
        if end < last:
            ahead = [end, last]
            times = [expected(table, name, n, "gradient_seconds") for n in ahead]
            axis.loglog(ahead, times, "--", color=colour, label=f"{label}, extrapolated")
    units = {"1 ms": 1e-3, "1 s": 1.0, "1 min": 60.0, "1 hour": 3600.0, "1 day": 86400.0, "1 year": 3.156e7}
    units["100 years"] = 3.156e9
    axis.set_yticks(list(units.values()), list(units))
    axis.set_xticks(SHOWN, [f"{n:,}" for n in SHOWN])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.set(xlabel="rows", ylabel="forward and gradient, one thread")
    axis.legend(frameon=False, fontsize="small")
    return drawn


def between_marks(text: str, table: str, marks: tuple[str, str] = _MARKS) -> str:
    """The text with what stands between the marks replaced."""
    start, end = marks
    head, found, rest = text.partition(start)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the text should hold {start} and after it {end}")
    return f"{head}{start}\n\n{table}\n\n{end}{tail}"


def main() -> None:
    """Measure, save and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 16,384 rows: not to be quoted")
    parser.add_argument("--report", action="store_true", help="only the table and the picture, of what was measured")
    given = parser.parse_args()
    folder = _ROOT / "build" / "lengths" if given.quick else _ROOT / "docs" / "lengths"
    folder.mkdir(parents=True, exist_ok=True)
    if not given.report:
        lengths, longest = (LENGTHS[:7], 1.0) if given.quick else (LENGTHS, LONGEST)
        save(measure(make_library("torch", "cpu", 1), lengths, longest), folder / "measured.csv")
        save([description("torch")], folder / "machine.csv")
    table, (machine,) = load(folder / "measured.csv"), load(folder / "machine.csv")
    save_plot(figure(table), folder / "times.png", dpi=120)
    if not given.quick:
        file = _ROOT / "README.md"
        file.write_text(between_marks(file.read_text(encoding="utf-8"), readme(table, machine)), encoding="utf-8")
    print(folder)


if __name__ == "__main__":
    main()
