"""Theorem 5.3 seen from above: what degree, rank and cost an error of 1/n demands as entries grow past (log n)^(1/3).

Operations are counted, not timed. The degree is the least that any polynomial needs, whatever computes it
(`tattn.approximation.exponential.least_error`), so that float64 does not limit what is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from math import ceil, log, sqrt
from typing import Any

import numpy as np

from tattn.approximation.exponential import least_error, smallest
from tattn.features.monomials import rank
from tattn.planning import plan_for
from tattn.planning.settings import MAX_RANK

from .plots import COLOURS, legend_below, panels, style
from .tables import Row, Table, column, distinct, markdown, short, where

_DIMS = (4, 8, 16)
_TOLS = (1e-2, 1e-3, 1e-6)
_FIXED = (0.5, 1.0, 1.5, 2.0)
_MOST_DEGREE = 2000
RULES: dict[str, Callable[[int], int]] = {"d = 8": lambda n: 8, "d = ⌈ln n⌉": lambda n: ceil(log(n))}


def measure(quick: bool, watch: Callable[..., Iterable[Any]]) -> dict[str, Table]:
    """Degrees and ranks against B; the exponent of the cost; operations over (n, B); borders."""
    step = 4 if quick else 1
    degrees: Table = []
    for tol in _TOLS:
        for entries in watch(np.arange(0.4, 2.61, 0.1)[::step].round(2).tolist()):
            degrees.append(_degrees(tol, entries))
    growth = [
        _exponent(1 << power, share) for power in (10, 20, 30, 40) for share in np.arange(0.2, 1.41, 0.05)[::step]
    ]
    fixed = [_exponent(1 << power, b / log(1 << power) ** (1 / 3)) for b in _FIXED for power in range(5, 41, 5)]
    cells, borders = [], []
    sizes = [(rule, 1 << power) for rule in RULES for power in range(5, 31, 5 if quick else 1)]
    for rule, n in watch(sizes):
        borders.append(_border(rule, n))
        cells += [_cell(rule, n, float(b)) for b in np.arange(0.4, 4.01, 0.1)[::step].round(2)]
    return {
        "border-degree": degrees,
        "border-exponent": growth,
        "border-fixed": fixed,
        "border-map": cells,
        "border": borders,
    }


def _degrees(tol: float, entries: float) -> Row:
    """Degree that every polynomial needs, that of ours where float64 has one, and ranks."""
    bound = entries**3
    ours = smallest(bound, lambda p: p.degree >= 1 and p.delta <= _delta(tol), max_degree=60)
    degree = needed(tol, bound)
    ranks = {f"rank_{d}": rank(d, degree) for d in _DIMS}
    return {
        "tol": tol,
        "entries": entries,
        "bound": bound,
        "degree": degree,
        "ours": ours.degree if ours else "",
        **ranks,
    }


def _delta(tol: float) -> float:
    """The relative error δ of P with which the output is off by `tol` at most."""
    return tol / sqrt(1 + tol**2)


@cache
def needed(tol: float, bound: float) -> int:
    """The least degree g ≥ 1 with which a polynomial can have the relative error δ(tol) on [−bound, bound].

    Below R − 1 none comes closer than about a half, though `least_error` alone does not show it.
    """
    return next(g for g in range(max(1, ceil(bound) - 1), _MOST_DEGREE) if least_error(g, bound) <= _delta(tol))


def _operations(n: int, dim: int) -> tuple[float, float]:
    """Operations of the exact method, and of the polynomial one for each monomial; dv = d."""
    exact = plan_for(n=n, dim=dim, bound=1.0, dtype="float64", method="exact")
    linear = plan_for(n=n, dim=dim, bound=1.0, dtype="float64", degree=1)
    return exact.flops_exact, linear.flops_polynomial / linear.rank


def _exponent(n: int, share: float) -> Row:
    """For B = share · (ln n)^(1/3) and d = ⌈ln n⌉: the exponent of n that the operations amount to."""
    dim, entries = ceil(log(n)), share * log(n) ** (1 / 3)
    degree = needed(1 / n, entries**3)
    exact, monomial = _operations(n, dim)
    operations = monomial * rank(dim, degree)
    return {
        "n": n,
        "dim": dim,
        "share": share,
        "entries": entries,
        "bound": entries**3,
        "degree": degree,
        "rank": float(rank(dim, degree)),
        "exponent": log(operations) / log(n),
        "exact_exponent": log(exact) / log(n),
    }


def _cell(rule: str, n: int, entries: float) -> Row:
    """Operations of the polynomial method over those of the exact one."""
    dim = RULES[rule](n)
    degree = needed(1 / n, entries**3)
    exact, monomial = _operations(n, dim)
    ratio = monomial * rank(dim, degree) / exact
    return {"rule": rule, "n": n, "dim": dim, "entries": entries, "degree": degree, "ratio": ratio}


def _border(rule: str, n: int) -> Row:
    """The largest B at which the polynomial method takes fewer operations, and at which it is certified to 1/n."""
    dim = RULES[rule](n)
    exact, monomial = _operations(n, dim)
    degree = 0
    while monomial * rank(dim, degree + 1) <= exact:
        degree += 1
    cheaper = _largest(lambda r: r <= degree + 1 and least_error(degree, r) <= _delta(1 / n)) if degree else 0.0

    def certified(dtype: str) -> float:
        def can(bound: float) -> bool:
            try:
                plan_for(n=n, dim=dim, bound=bound, tol=1 / n, dtype=dtype, method="polynomial")
            except ValueError:
                return False
            return True

        return float(_largest(can) ** (1 / 3))

    return {
        "rule": rule,
        "n": n,
        "dim": dim,
        "degree": degree,
        "cheaper": cheaper ** (1 / 3),
        "certified_float64": certified("float64"),
        "certified_float32": certified("float32"),
        "log_third": log(n) ** (1 / 3),
    }


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest R up to which something holds, to a percent; 0 if it does not at 0.01."""
    low, high = 0.01, 2000.0
    if not holds(low):
        return 0.0
    while high / low > 1.01:
        middle = sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def plots(tables: dict[str, Table]) -> dict[str, Any]:
    """Degree, rank and exponent against B; the border over (n, B)."""
    figure, ((left, middle), (right, last)) = panels(2, 2, height=3.6)
    degrees = tables["border-degree"]
    for i, (tol,) in enumerate(distinct(degrees, "tol")):
        mine = where(degrees, tol=tol)
        left.plot(column(mine, "entries"), column(mine, "degree"), **style(i, label=f"error {tol:g}"))
    left.set(xlabel="B (scores within B³)", ylabel="degree", title="least degree of any polynomial")
    left.legend(fontsize="small")
    tol = _TOLS[1]
    for i, dim in enumerate(_DIMS):
        mine = where(degrees, tol=tol)
        middle.semilogy(column(mine, "entries"), column(mine, f"rank_{dim}"), **style(i, label=f"d = {dim}"))
    middle.set(xlabel="B", ylabel="rank C(d + g, g)", title=f"rank for an error of {tol:g}")
    middle.legend(fontsize="small")
    growth = tables["border-exponent"]
    for i, (n,) in enumerate(distinct(growth, "n")):
        mine = where(growth, n=n)
        right.plot(column(mine, "share"), column(mine, "exponent"), **style(i, label=f"n = 2^{round(log(n, 2))}"))
        # In the same colour, the exact method.
        right.axhline(mine[0]["exact_exponent"], color=COLOURS[i], linestyle=":", linewidth=1)
    right.set(
        xlabel="B / (ln n)^(1/3)",
        ylabel="log(operations) / log n",
        title="error 1/n, d = ⌈ln n⌉ (···: exact)",
        ylim=(1, 5),
    )
    right.legend(fontsize="small")

    fixed = tables["border-fixed"]
    for i, (entries,) in enumerate(distinct(fixed, "entries")):
        mine = where(fixed, entries=entries)
        last.plot(column(mine, "n"), column(mine, "exponent"), **style(i, label=f"B = {entries:g}"))
    last.plot(column(mine, "n"), column(mine, "exact_exponent"), color="#000000", linestyle=":", label="exact")
    last.set(xscale="log", xlabel="n", ylabel="log(operations) / log n", title="error 1/n, d = ⌈ln n⌉", ylim=(1, 5))
    last.legend(fontsize="small", ncols=2)

    maps, axes = panels(len(RULES), height=4.2)
    for axis, rule in zip(axes[0], RULES, strict=True):
        cells = where(tables["border-map"], rule=rule)
        n, b = (np.array(sorted({row[name] for row in cells})) for name in ("n", "entries"))
        ratio = np.log10([[where(cells, n=int(i), entries=float(j))[0]["ratio"] for i in n] for j in b])
        drawn = axis.pcolormesh(
            n, b, np.clip(ratio, -8, 8), cmap="PuOr_r", vmin=-8, vmax=8, shading="nearest", rasterized=True
        )
        mine = where(tables["border"], rule=rule)
        lines = (
            ("cheaper", "operations as many as exact", "-", 6),
            ("certified_float64", "certified to 1/n, float64", "--", 2),
            ("certified_float32", "certified to 1/n, float32", "-.", 3),
            ("log_third", "(ln n)^(1/3)", ":", 6),
        )
        for name, label, dashes, colour in lines:
            axis.plot(column(mine, "n"), column(mine, name), color=COLOURS[colour], linestyle=dashes, label=label)
        axis.set(xscale="log", xlabel="n", ylabel="B", title=f"error 1/n, {rule}", ylim=(b[0], b[-1]))
    maps.colorbar(drawn, ax=axes[0, -1], label="log10(polynomial / exact operations)")
    legend_below(maps, axes[0, 0])
    return {"border-growth": figure, "border-map": maps}


def words(tables: dict[str, Table]) -> str:
    """What the tables say."""
    growth, borders = tables["border-exponent"], tables["border"]
    sizes = [n for (n,) in distinct(growth, "n")]
    shares = [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
    lines = []
    for share in shares:
        line = [f"{share:g}"]
        for n in sizes:
            row = min(where(growth, n=n), key=lambda row: abs(row["share"] - share))
            line.append(f"{row['degree']}, {short(row['rank'])}, {row['exponent']:.2f}")
        lines.append(line)
    exact = ["exact", *(f"{where(growth, n=n)[0]['exact_exponent']:.2f}" for n in sizes)]
    heads = ["B / (ln n)^(1/3)", *(f"n = 2^{round(log(n, 2))}, d = {where(growth, n=n)[0]['dim']}" for n in sizes)]
    chosen = sorted({row["n"] for row in borders})
    picked = [chosen[i] for i in sorted({0, len(chosen) // 3, 2 * len(chosen) // 3, len(chosen) - 1})]
    border_lines = [
        [
            f"2^{round(log(row['n'], 2))}",
            str(row["dim"]),
            f"{row['log_third']:.2f}",
            f"{row['cheaper']:.2f}",
            f"{row['certified_float64']:.2f}",
            f"{row['certified_float32']:.2f}" if row["certified_float32"] else "never",
        ]
        for rule in RULES
        for row in where(borders, rule=rule)
        if row["n"] in picked
    ]
    logarithmic = where(borders, rule="d = ⌈ln n⌉")
    quotients = [row["cheaper"] / row["log_third"] for row in logarithmic]
    degrees = tables["border-degree"]
    known = [row for row in degrees if row["ours"] != ""]
    extra = max(row["ours"] - row["degree"] for row in known)
    least, most = (f"2^{round(log(n, 2))}" for n in (chosen[0], chosen[-1]))
    spread = max(
        max(x) - min(x)
        for (share,) in distinct(growth, "share")
        for x in [column([row for row in where(growth, share=share) if row["n"] > sizes[0]], "exponent")]
    )
    one = where(tables["border-fixed"], entries=1)
    fell = f"{one[0]['exponent']:.2f} at n = {one[0]['n']:,} to {one[-1]['exponent']:.2f} at 2^{round(log(one[-1]['n'], 2))}"
    border_heads = ["n", "d", "(ln n)^(1/3)", "B, fewer operations", "B, certified, float64", "B, certified, float32"]
    return f"""\
**An illustration, not a proof.** Theorem 5.3 says that under SETH *no* algorithm stays truly subcubic once B grows a
little faster than (log n)^(1/3), with d = Θ(log n). What can be shown is what happens to *this* algorithm there: the
degree that an error of 1/n demands, C(d + g, g) with it, and the B from which on n³ is cheaper. Operations are counted,
not timed. The degree is the least that any polynomial can have on [−B³, B³], whatever computes it, by a lower bound of
its error, or B³ − 1 where that is more, below which none comes closer than about a half. Those that the library fits in
float64 need at most {extra} more ({len(known)} of {len(degrees)} settings; in the others float64 has none).

![Degree, rank and exponent of the cost as B grows](border-growth.png)

Degree, rank and the exponent log(operations) / log n, for an error of 1/n, d = ⌈ln n⌉ and B in units of (ln n)^(1/3):

{markdown([*lines, exact], heads)}

In these units the exponent hardly depends on n (by at most {spread:.2f} beyond the least n shown): that is what makes
(log n)^(1/3) the place of the threshold, and it rises steadily with B. Where B grows less, the exponent falls with n, and
slowly: for B = 1 from {fell}. The theorem's n^(o(1)) is large for every n that
fits a machine when d grows with n; for the d of a head, which does not, see the times above.

![The border between polynomial and exact over n and B](border-map.png)

{markdown(border_lines, border_heads)}

With d = ⌈ln n⌉ the border is at {min(quotients):.2f} to {max(quotients):.2f} times (ln n)^(1/3), for n of {least} to
{most}. With d fixed the rank is a power of the degree, and the border soon lies higher: hardness needs d to grow.
"Certified" adds what the library demands before it promises 1/n for every input with such a B: rounding within the
tolerance, and a rank of at most {MAX_RANK:,}. In float32 it ends soon, as 1/n nears a unit in the last place.

Tables: [degree and rank](border-degree.csv), [exponents](border-exponent.csv), [the same for fixed B](border-fixed.csv),
[operations over (n, B)](border-map.csv), [borders](border.csv)."""
