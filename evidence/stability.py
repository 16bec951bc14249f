"""Numerical stability: measured error against degree as the range grows, beside the polynomial's and rounding's bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from math import exp, inf, sqrt
from typing import Any

import numpy as np

from tattn.approximation.exponential import minimax
from tattn.attention import tensor_attention
from tattn.planning import plan

from .plots import legend_below, panels, style
from .tables import Row, Table, column, distinct, markdown, short, where

_DIM = 2
_RANGES = {"float32": (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0), "float64": (0.5, 1.0, 2.0, 4.0, 8.0, 12.0, 16.0)}
_UNIT = {"float32": 2.0**-24, "float64": 2.0**-53}
_NEED = 1e-3


def measure(quick: bool, watch: Callable[..., Iterable[Any]]) -> dict[str, Table]:
    """Errors for each dtype, draw, range and degree, and where they stop falling."""
    n, degrees = (16, (2, 6, 10, 14)) if quick else (64, tuple(range(1, 33)))
    rows = []
    cases = [(dtype, draw, bound) for dtype in _RANGES for draw in DRAWS for bound in _RANGES[dtype]]
    for dtype, draw, bound in watch(cases):
        arrays = [x.astype(dtype) for x in _arrays(draw, bound, n)]
        truth = _answer([x.astype(np.float64) for x in arrays], method="exact")
        for degree in degrees:
            given: Row = {"dtype": dtype, "draw": draw, "range": bound, "degree": degree}
            rows.append({**given, **_errors(arrays, truth, degree, bound)})
    return {"stability": rows, "stability-floors": floors(rows)}


def _uniform(rng: np.random.Generator, n: int) -> np.ndarray:
    """Scores on both sides, means near 0: normalisers are of the size of their terms."""
    return rng.uniform(-1, 1, (3, n, _DIM))


def _one_sided(rng: np.random.Generator, n: int) -> np.ndarray:
    """Every second query has all its scores near −R: its normaliser is e^(2R) times smaller than the terms of P(−R)."""
    q, a, b = rng.uniform(0.9, 1, (3, n, _DIM))
    q[::2] *= -1
    return np.stack([q, a, b])


DRAWS = {"centred": _uniform, "one-sided": _one_sided}


def _arrays(draw: str, bound: float, n: int) -> list[np.ndarray]:
    """q, a, b, u, v, g with scores within ±bound."""
    rng = np.random.default_rng(0)
    q, a, b = bound ** (1 / 3) * DRAWS[draw](rng, n)
    return [q, a, b, *rng.uniform(-1, 1, (3, n, _DIM))]


def _answer(arrays: list[np.ndarray], **options: Any) -> np.ndarray:
    q, a, b, u, v, _ = arrays
    found: np.ndarray = tensor_attention(q, [a, b], [u, v], **options)
    return found


def _errors(arrays: list[np.ndarray], truth: np.ndarray, degree: int, bound: float) -> Row:
    """Measured error, and what the plan promises: polynomial, rounding (its ρ) and both."""
    q, a, b, u, v, _ = arrays
    size = np.abs(u).max(0) * np.abs(v).max(0)
    try:
        planned = plan(q, [a, b], [u, v], degree=degree)
    except ValueError:
        return {"error": "", "polynomial": inf, "rho": inf, "certified": inf}
    found = _answer(arrays, plan=planned)
    error = float((np.abs(found - truth) / size).max()) if np.isfinite(found).all() else inf
    delta = minimax(degree, planned.bound).delta
    polynomial = delta / sqrt(1 - delta**2) if delta < 1 else inf
    # error = polynomial + 2 ρ / (1 − δ − ρ), solved for ρ
    share = planned.error - polynomial
    rho = share * (1 - delta) / (2 + share) if planned.error < inf else inf
    return {"error": error, "polynomial": polynomial, "rho": rho, "certified": planned.error}


def floors(rows: Table) -> Table:
    """For each dtype, draw and range: the least error, the degree that first comes within twice of it, and the bounds."""
    found = []
    for dtype, draw, bound in distinct(rows, "dtype", "draw", "range"):
        mine = [row for row in where(rows, dtype=dtype, draw=draw, range=bound) if row["error"] != ""]
        least = min(column(mine, "error"), default=inf)
        degree = next((row["degree"] for row in mine if row["error"] <= 2 * least), "")
        certified = min(mine, key=lambda row: row["certified"])
        found.append(
            {
                "dtype": dtype,
                "draw": draw,
                "range": bound,
                "unit": _UNIT[dtype],
                "floor": least,
                "floor_degree": degree,
                "amplified_units": exp(2 * bound) * _UNIT[dtype],
                "certified_floor": certified["certified"],
                "certified_degree": certified["degree"],
                "rho": certified["rho"],
            }
        )
    return found


def plots(tables: dict[str, Table]) -> dict[str, Any]:
    """Error against degree for each dtype and draw; and the floors against the range."""
    rows = [row for row in tables["stability"] if row["error"] != ""]
    figure, axes = panels(2, 2, height=3.6)
    for i, dtype in enumerate(_RANGES):
        for j, draw in enumerate(DRAWS):
            axis = axes[i, j]
            for number, (bound,) in enumerate(distinct(where(rows, dtype=dtype), "range")):
                mine = where(rows, dtype=dtype, draw=draw, range=bound)
                look = style(number, label=f"R = {bound:g}")
                axis.semilogy(column(mine, "degree"), [_shown(x) for x in column(mine, "error")], **look)
                look = {**look, "marker": "", "linestyle": ":", "label": None}
                axis.semilogy(column(mine, "degree"), [_shown(x) for x in column(mine, "rho")], **look)
            axis.set(title=f"{dtype}, {draw} scores", xlabel="degree", ylabel="error (—•), model's ρ (···)")
            axis.set_ylim(_UNIT[dtype] / 100, 1e3)
            axis.legend(fontsize="x-small", ncols=3, loc="upper right")
    floors_figure, ((left, right),) = panels(2)
    for axis, dtype in ((left, "float32"), (right, "float64")):
        for number, draw in enumerate(DRAWS):
            mine = where(tables["stability-floors"], dtype=dtype, draw=draw)
            look = style(number, label=f"{draw}, measured")
            axis.semilogy(column(mine, "range"), column(mine, "floor"), **look)
            axis.semilogy(
                column(mine, "range"), [_shown(x) for x in column(mine, "certified_floor")],
                **{**look, "linestyle": "--", "label": f"{draw}, certified"},
            )  # fmt: skip
        axis.semilogy(
            column(mine, "range"), column(mine, "amplified_units"), color="#000000", linestyle=":", label="e^(2R) units"
        )
        axis.set(title=dtype, xlabel="R = B³", ylabel="least error over the degrees", ylim=(_UNIT[dtype] / 100, 10))
    legend_below(floors_figure, left, 5)
    return {"stability-degree": figure, "stability-floors": floors_figure}


def _shown(number: float) -> float:
    """Infinity is a gap."""
    return number if number < inf else float("nan")


def words(tables: dict[str, Table]) -> str:
    """What the tables say."""
    rows = [row for row in tables["stability"] if row["error"] != "" and row["certified"] < inf]
    broken = [row for row in rows if row["error"] > row["certified"]]
    verdict = (
        f"No measured error exceeds its bound ({len(rows)} settings with one)."
        if not broken
        else f"**{len(broken)} of {len(rows)} measured errors exceed their bound.**"
    )
    lines = [
        [
            row["dtype"],
            row["draw"],
            f"{row['range']:g}",
            short(row["floor"]),
            str(row["floor_degree"]),
            short(row["amplified_units"]),
            short(row["rho"]),
            short(row["certified_floor"]),
        ]
        for row in tables["stability-floors"]
    ]
    served = []
    for dtype in _RANGES:
        for draw in DRAWS:
            mine = where(tables["stability-floors"], dtype=dtype, draw=draw)
            measured_to = max((row["range"] for row in mine if row["floor"] <= _NEED), default=0)
            certified_to = max((row["range"] for row in mine if row["certified_floor"] <= _NEED), default=0)
            served.append(
                f"* {dtype}, {draw} scores: {_NEED:g} is reached up to R = {measured_to:g} as measured, and up to "
                f"R = {certified_to:g} as certified"
            )
    served[-1] += "."
    worse, example = max((_rise(tables, row), i) for i, row in enumerate(tables["stability-floors"]))
    at = tables["stability-floors"][example]
    where_at = f"{at['dtype']}, {at['draw']}, R = {at['range']:g}"
    jump = (
        "A higher degree is not always better: where float64 hardly represents the polynomial its error jumps, up to\n"
        f"{short(worse)} times that of a lower degree ({where_at}).\n"
        "The bounds see it, and `plan` takes the least degree that serves.\n\n"
        if worse > 10
        else ""
    )
    heads = ["dtype", "scores", "R", "floor", "at degree", "e^(2R) units", "ρ", "certified floor"]
    return f"""\
As the degree grows the polynomial's error falls and rounding remains. Its terms are of size e^R, while a normaliser may
be as small as e^−R: up to e^(2R) units in the last place may be lost, if a query's scores all lie near −R ("one-sided"), and
far fewer if they lie around zero ("centred"). The rounding model's ρ ([error bounds](../errors.md)) is bounded by the lowest
mean score of a row, so it sees the difference. d = {_DIM}; half precision computes in float32. {verdict}

![Error against degree for growing ranges](stability-degree.png)

Where a line has no point the plan refuses: no polynomial of that degree resembles exp on the range in float64. The floor is the
least error over all degrees, "at degree" the first that comes within twice of it. Errors are relative to max|u| max|v|,
and averages of random values are far smaller, so a floor can be below one unit in the last place:

![Least error over the degrees against the range](stability-floors.png)

{markdown(lines, heads)}

{jump}What that leaves to use, of the ranges that were tried:

{chr(10).join(served)}

Tables: [all errors](stability.csv), [floors](stability-floors.csv)."""


def _rise(tables: dict[str, Table], row: Row) -> float:
    """In a floor's setting, the largest error over the least of all lower degrees."""
    mine = where(tables["stability"], dtype=row["dtype"], draw=row["draw"], range=row["range"])
    errors = [x["error"] for x in mine if x["error"] != ""]
    return max((later / least for later, least in zip(errors[1:], accumulate(errors, min), strict=False)), default=1.0)
