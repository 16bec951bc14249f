"""Quality of the polynomial: measured and certified error against degree, range, dtype and series."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tattn.attention import tensor_attention_vjp
from tattn.planning import plan

from .plots import legend_below, panels, style
from .tables import Row, Table, column, distinct, markdown, short, where

_DIM = 4
_RANGES = (0.5, 1.0, 2.0, 3.0)
_NARROW = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
# Half the distance of the smallest numbers of float16; those of bfloat16 are far below what occurs.
_SMALLEST = {"float16": 2.0**-25, "bfloat16": 0.0}


def measure(quick: bool, watch: Callable[..., Iterable[Any]]) -> dict[str, Table]:
    """Errors over draws, dtypes, ranges, series and degrees."""
    n, degrees = (24, range(1, 6)) if quick else (96, range(1, 13))
    dtypes = ["float64", "float32", "float16"]
    if importlib.util.find_spec("torch"):
        dtypes.append("bfloat16")
    rows = []
    cases = [(draw, dtype, bound) for draw in DRAWS for dtype in dtypes for bound in _RANGES]
    for draw, dtype, bound in watch(cases):
        arrays, back = _arrays(draw, dtype, bound, n)
        truth = _vjp([back(x) for x in arrays], method="exact")
        for series in ("minimax", "taylor"):
            for degree in degrees:
                given: Row = {"draw": draw, "dtype": dtype, "range": bound, "series": series, "degree": degree}
                rows.append({**given, **_errors(arrays, truth, back, series, degree, bound, dtype)})
    return {"quality": rows}


def _corners(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.choice([-1.0, 1.0], shape)


def _uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(-1, 1, shape)


DRAWS = {"uniform": _uniform, "corners": _corners}


def _arrays(draw: str, dtype: str, bound: float, n: int) -> tuple[list[Any], Callable[..., Any]]:
    """q, a, b, u, v, g in a dtype, entries of q, a and b within ±bound^(1/3); and how they come back to float64."""
    rng = np.random.default_rng(0)
    drawn = [bound ** (1 / 3) * DRAWS[draw](rng, (n, _DIM)) for _ in range(3)]
    drawn += [rng.uniform(-1, 1, (n, _DIM)) for _ in range(3)]
    if dtype != "bfloat16":
        return [x.astype(dtype) for x in drawn], lambda x: x.astype(np.float64)
    import torch

    def back(x: Any) -> np.ndarray:
        found: np.ndarray = x.to(torch.float64).numpy()
        return found

    return [torch.from_numpy(x).to(torch.bfloat16) for x in drawn], back


def _vjp(arrays: list[Any], **options: Any) -> list[Any]:
    """Output and gradients of query and keys."""
    q, a, b, u, v, g = arrays
    out, pullback = tensor_attention_vjp(q, [a, b], [u, v], **options)
    dq, (da, db), _ = pullback(g)
    return [out, dq, da, db]


def _errors(
    arrays: list[Any],
    truth: list[np.ndarray],
    back: Callable[..., Any],
    series: str,
    degree: int,
    bound: float,
    dtype: str,
) -> Row:
    """Measured beside certified errors; those of gradients in the units of `Plan.grad_error`."""
    q, a, b, u, v, g = (np.abs(back(x)) for x in arrays)
    none = {"error": "", "certified": "", "grad_error": "", "grad_certified": ""}
    try:
        # The bound of the draw, and a little for entries that rounding to the dtype made larger.
        planned = plan(*_call(arrays), degree=degree, series=series, bound=1.02 * bound)
    except ValueError:
        return none
    if not planned.certified:
        return none
    found = [back(x) for x in _vjp(arrays, plan=planned)]
    size = u.max(0) * v.max(0)
    weight = (g * size).sum(axis=1, keepdims=True) / _DIM
    tops = [x.max(0) for x in (q, a, b)]
    units = [size, weight * tops[1] * tops[2], weight.sum() * tops[0] * tops[2], weight.sum() * tops[0] * tops[1]]
    error, *grads = (float((np.abs(x - y) / unit).max()) for x, y, unit in zip(found, truth, units, strict=True))
    # Casting the answer: half a unit in its last place, of an output of at most 1 and gradients of at most 2 units.
    cast, least = _NARROW.get(dtype, 0.0), _SMALLEST.get(dtype, 0.0)
    finest = [least / float(np.min(unit)) for unit in units]
    return {
        "error": error,
        "certified": planned.error + cast * (1 + planned.error) + finest[0],
        "grad_error": max(grads),
        "grad_certified": planned.grad_error + cast * (2 + planned.grad_error) + max(finest[1:]),
    }


def _call(arrays: list[Any]) -> tuple[Any, list[Any], list[Any]]:
    q, a, b, u, v, _ = arrays
    return q, [a, b], [u, v]


def plots(tables: dict[str, Table]) -> dict[str, Any]:
    """Error against degree: a row of panels for output and gradient by range, and one by dtype."""
    rows = [row for row in tables["quality"] if row["error"] != ""]
    ranges = [r for (r,) in distinct(rows, "range")]
    dtypes = [d for (d,) in distinct(rows, "dtype")]
    ticks = sorted(set(column(rows, "degree")))[1::2]
    figure, axes = panels(len(ranges), 2, sharex=True, sharey=True, height=3.2)
    for column_of, bound in enumerate(ranges):
        for row_of, (kind, promised) in enumerate((("error", "certified"), ("grad_error", "grad_certified"))):
            axis = axes[row_of, column_of]
            for i, series in enumerate(("minimax", "taylor")):
                mine = where(rows, draw="corners", dtype="float64", range=bound, series=series)
                look = style(i, label=f"{series.capitalize()}, measured")
                axis.semilogy(column(mine, "degree"), column(mine, kind), **look)
                axis.semilogy(
                    column(mine, "degree"), column(mine, promised),
                    **{**look, "linestyle": "--", "marker": "", "label": f"{series.capitalize()}, certified"},
                )  # fmt: skip
            axis.set(title=f"{'output' if row_of == 0 else 'gradients'}, R = {bound:g}", ylim=(1e-16, 30))
            if row_of:
                axis.set(xlabel="degree", xticks=ticks)
        axes[0, 0].set(ylabel="error of the output")
        axes[1, 0].set(ylabel="error of dq, da, db")
    legend_below(figure, axes[0, 0])
    by_dtype, dtype_axes = panels(len(ranges), sharey=True, height=4.0)
    for axis, bound in zip(dtype_axes[0], ranges, strict=True):
        for i, dtype in enumerate(dtypes):
            mine = where(rows, draw="corners", dtype=dtype, range=bound, series="minimax")
            look = style(i, label=f"{dtype}, measured")
            axis.semilogy(column(mine, "degree"), column(mine, "error"), **look)
            axis.semilogy(
                column(mine, "degree"), column(mine, "certified"),
                **{**look, "linestyle": "--", "marker": "", "label": f"{dtype}, certified"},
            )  # fmt: skip
        axis.set(title=f"output, R = {bound:g}", xlabel="degree", xticks=ticks, ylim=(1e-16, 30))
    dtype_axes[0, 0].set(ylabel="error of the output")
    legend_below(by_dtype, dtype_axes[0, 0])
    return {"quality-degree": figure, "quality-dtype": by_dtype}


def words(tables: dict[str, Table]) -> str:
    """What the table says."""
    everything = tables["quality"]
    rows = [row for row in everything if row["error"] != ""]
    broken = [r for r in rows if r["error"] > r["certified"] or r["grad_error"] > r["grad_certified"]]
    verdict = (
        f"In all {len(rows)} settings every measured error, of output and gradients, is below its certified bound."
        if not broken
        else f"**In {len(broken)} of {len(rows)} settings a measured error exceeds its bound.**"
    )
    dtypes = [d for (d,) in distinct(rows, "dtype")]
    absent = "" if "bfloat16" in dtypes else " bfloat16 was left out: NumPy has none, and torch was not there."
    certified = [
        row["certified"] / row["error"]
        for row in where(rows, dtype="float64", draw="corners", series="minimax")
        if row["error"] > 1e-12
    ]
    easy = [
        row["certified"] / row["error"]
        for row in where(rows, dtype="float64", draw="uniform", series="minimax")
        if row["error"] > 1e-12
    ]
    tols = (1e-2, 1e-4, 1e-6)
    lines = []
    for (bound,) in distinct(rows, "range"):
        line = [f"{bound:g}"]
        for tol in tols:
            for series in ("minimax", "taylor"):
                line.append(_least(where(rows, draw="corners", dtype="float64", range=bound, series=series), tol))
        lines.append(line)
    heads = ["R", *(f"{tol:g}, {series}" for tol in tols for series in ("minimax", "Taylor"))]
    reached = [
        [dtype, *(_best(where(rows, draw="corners", dtype=dtype, range=r, series="minimax")) for (r,) in distinct(rows, "range"))]
        for dtype in dtypes
    ]  # fmt: skip
    hard, usual = (short(float(np.median(x))) for x in (certified, easy))
    most = max(column(rows, "degree"))
    return f"""\
Output and gradients of query and keys against the exact method in float64 on the same inputs, which were rounded to
the dtype before: the error is that of the polynomial and of the arithmetic, not of the inputs. float16 and bfloat16
compute in float32 and round the answer, which the bound counts.{absent} Errors of the output are relative to max|u| max|v|,
those of gradients in the units of `Plan.grad_error`. d = {_DIM}; "corners" are entries ±R^(1/3), so that scores reach ±R;
"uniform" ones seldom do. R = B³ is promised to the plan.

{verdict} A bound that holds for all inputs is loose for most: at the median {hard} times the measured error at corners
and {usual} times for uniform entries (output, float64, minimax).

![Error of output and gradient against degree, minimax beside Taylor](quality-degree.png)

The least degree whose output is *certified* to an error, minimax beside the paper's Taylor polynomial (–: none up to
{most}):

{markdown(lines, heads)}

![Error of the output against degree in each dtype](quality-dtype.png)

The least error of the output over the degrees, measured / certified, by dtype and R:

{markdown(reached, ["dtype", *(f"R = {r:g}" for (r,) in distinct(rows, "range"))])}

Table: [all errors](quality.csv)."""


def _least(rows: Table, tol: float) -> str:
    return next((str(row["degree"]) for row in rows if row["certified"] <= tol), "–")


def _best(rows: Table) -> str:
    return f"{short(min(column(rows, 'error')))} / {short(min(column(rows, 'certified')))}"
