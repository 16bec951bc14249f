"""Sums over all triangles of points on a sphere, weighted by a smooth kernel, to a tolerance that is asked for.

For every point i, S_i = Σ_jk w_j w_k exp(κ (x_i·x_j + x_i·x_k + x_j·x_k)): how much weight stands in triangles with a corner at i,
the closer their corners the more. Nothing is learned here: the library serves as a fast kernel sum. The truth comes from the
addition theorem of spherical harmonics in float64.

`python -m examples.sphere_triplets` measures and writes tables, a plot and a page into docs/examples; with --quick into
build/examples.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import tattn
from evidence.plots import panels, style
from evidence.tables import Table, column, distinct, markdown, seconds, short, where

from . import shared

NAME = "sphere_triplets"
KAPPA, HARMONICS = 0.5, 14
TOLERANCES = (1e-2, 1e-4, 1e-6)
Floats = NDArray[np.float64]


class Sums(NamedTuple):
    """S_i / exp(lse_i) and lse (n,), the largest stated error, and the plan."""

    mean: Floats
    lse: Floats
    error: float
    plan: tattn.Plan


def points(n: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Unit vectors (n, 3), half of them in clusters, and their weights (n,) between 0.5 and 1.5."""
    centres = rng.normal(size=(20, 3))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    clustered = centres[rng.integers(0, 20, n // 2)] + 0.1 * rng.normal(size=(n // 2, 3))
    x = np.concatenate([clustered, rng.normal(size=(n - n // 2, 3))])
    return x / np.linalg.norm(x, axis=1, keepdims=True), rng.uniform(0.5, 1.5, n)


def by_tensor_attention(x: Floats, weights: Floats, tol: float) -> Sums:
    """The sums as attention: the triangle's three products are the score, weights are the values, and lse undoes the softmax."""
    query, keys = tattn.scores.strassen(x, [x, x])
    values = [weights[:, None], weights[:, None]]
    out, lse, error, plan = tattn.tensor_attention(
        query, keys, values, scale=KAPPA, tol=tol, method="polynomial", return_lse=True, return_error=True,
        return_plan=True,
    )  # fmt: skip
    return Sums(out[:, 0], lse, float(error.max()), plan)


def by_harmonics(x: Floats, weights: Floats, rows: int = 2048) -> Floats:
    """S (n,): exp(κ x·y) = Σ_l λ_l Σ_m Y_lm(x) Y_lm(y), so that S_i = Σ_lm λ_l (Σ_j w_j exp(κ x_i·x_j) Y_lm(x_j))²."""
    harmonics, factors = real_harmonics(x), bessel_factors()
    moments = harmonics.T @ (weights[:, None] * harmonics)
    blocks = [harmonics[start : start + rows] for start in range(0, len(x), rows)]
    return np.concatenate([(((block * factors) @ moments) ** 2) @ factors for block in blocks])


def real_harmonics(x: Floats) -> Floats:
    """Real spherical harmonics of unit vectors, (n, (L + 1)²), orthonormal on the sphere."""
    z, across = x[:, 2], x[:, 0] + 1j * x[:, 1]
    columns: list[Floats] = [np.empty(0)] * (HARMONICS + 1) ** 2
    for m in range(HARMONICS + 1):
        # Legendre functions over sin^m, by the recursion in l; the powers of `across` bring the sines back.
        before, now = np.zeros_like(z), np.full_like(z, math.prod(range(1, 2 * m, 2)))
        turned = across**m
        for degree in range(m, HARMONICS + 1):
            norm = math.sqrt(
                (2 * degree + 1)
                / (4 * math.pi)
                * math.factorial(degree - m)
                / math.factorial(degree + m)
                * (2 if m else 1)
            )
            columns[degree * (degree + 1) + m] = norm * now * turned.real
            if m:
                columns[degree * (degree + 1) - m] = norm * now * turned.imag
            before, now = now, ((2 * degree + 1) * z * now - (degree + m) * before) / (degree - m + 1)
    return np.stack(columns, 1)


def bessel_factors() -> Floats:
    """4π i_l(κ), once for every m, ((L + 1)²,): modified spherical Bessel functions by their series."""
    factors = []
    for degree in range(HARMONICS + 1):
        first = KAPPA**degree / math.prod(range(1, 2 * degree + 2, 2))
        terms, term = [], first
        for k in range(1, 30):
            terms.append(term)
            term *= KAPPA**2 / 2 / k / (2 * degree + 2 * k + 1)
        factors += [4 * math.pi * math.fsum(terms)] * (2 * degree + 1)
    return np.asarray(factors)


def directly(x: Floats, weights: Floats) -> Floats:
    """S (n,) over all triangles: n² numbers of memory, and n³ products in one product of matrices."""
    kernel = np.exp(KAPPA * (x @ x.T))
    weighted = kernel * weights
    return ((weighted @ kernel) * weighted).sum(1)


def sums(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """Time, stated and measured error by tolerance and number of points; and the time of the harmonics."""
    rows = []
    lengths = (1024, 2048) if given.quick else (4096, 16384, 65536)
    for n in watch(lengths, "points"):
        x, weights = points(n, np.random.default_rng(given.seed))
        start = time.process_time()
        truth = by_harmonics(x, weights)
        of_truth = time.process_time() - start
        normaliser, largest = by_harmonics(x, np.ones(n)), weights.max() ** 2
        size = float((largest * normaliser / truth).max())
        for tol in TOLERANCES[:2] if given.quick else TOLERANCES:
            start = time.process_time()
            found = by_tensor_attention(x, weights, tol)
            spent = time.process_time() - start
            # `tol` is relative to the largest weight of a pair, and the sum to its own size.
            of_mean = np.abs(found.mean - truth / normaliser).max() / largest
            of_sum = np.abs(found.mean * np.exp(found.lse) / truth - 1).max()
            rows.append({
                "points": n, "tol": tol, "degree": found.plan.degree, "rank": found.plan.rank, "stated": found.error,
                "measured": float(of_mean), "stated of sum": (1 + size * found.error) / (1 - found.error) - 1,
                "measured of sum": float(of_sum), "seconds": spent, "harmonics": of_truth,
            })  # fmt: skip
    return rows


def triangles(given: argparse.Namespace, watch: shared.Watch) -> Table:
    """Every triangle in turn: how far the harmonics are from that, and how long it takes."""
    rows = []
    for n in watch((256, 512) if given.quick else (512, 1024, 2048), "all triangles"):
        x, weights = points(n, np.random.default_rng(given.seed))
        start = time.process_time()
        truth = directly(x, weights)
        spent = time.process_time() - start
        rows.append({"points": n, "seconds": spent, "apart": float(np.abs(by_harmonics(x, weights) / truth - 1).max())})
    return rows


PARTS: dict[str, shared.Part] = {"sums": sums, "triangles": triangles}


def plot(rows: Table) -> Any:
    """Time against the number of points, and errors against the tolerance."""
    figure, ((of_time, of_error),) = panels(2, height=4.0)
    for i, (tol,) in enumerate(distinct(rows, "tol")):
        mine = where(rows, tol=tol)
        of_time.loglog(column(mine, "points"), column(mine, "seconds"), **style(i, label=f"tol = {tol:g}"))
    first = where(rows, tol=rows[0]["tol"])
    of_time.loglog(column(first, "points"), column(first, "harmonics"), **style(3, label="harmonics", linestyle="--"))
    last = where(rows, points=rows[-1]["points"])
    for i, name in enumerate(("stated", "measured")):
        of_error.loglog(
            column(last, "tol"), column(last, name), **style(i, label=f"{name}, {last[0]['points']:,} points")
        )
    of_error.loglog(
        column(last, "tol"), column(last, "tol"), color="#000000", linestyle=":", linewidth=1, label="asked for"
    )
    of_time.set_xscale("log", base=2)
    of_time.set(xlabel="points", ylabel="processor seconds")
    of_error.set(xlabel="tol", ylabel="error of S / N, of the largest w w")
    for axis in (of_time, of_error):
        axis.legend(fontsize="small")
    return figure


def page(tables: dict[str, Table]) -> str:
    """What the tables say."""
    rows, every = tables["sums"], tables["triangles"]
    of_sums = [
        [
            f"{r['points']:,}", f"{r['tol']:g}", f"{r['degree']}", f"{r['rank']:,}", short(r["stated"]), short(r["measured"]),
            short(r["stated of sum"]), short(r["measured of sum"]), seconds(r["seconds"]), seconds(r["harmonics"]),
        ]
        for r in rows
    ]  # fmt: skip
    of_every = [[f"{r['points']:,}", seconds(r["seconds"]), short(r["apart"])] for r in every]
    heads = [
        "points",
        "tol",
        "degree",
        "rank",
        "error stated",
        "measured",
        "of S stated",
        "measured",
        "time",
        "harmonics",
    ]
    top, cubic = rows[-1], every[-1]
    hours = cubic["seconds"] * (top["points"] / cubic["points"]) ** 3 / 3600
    slowest = max(column(where(rows, points=top["points"]), "seconds"))
    return f"""\
# Sums over triangles on a sphere

Points x_i on a sphere carry weights w_i between 0.5 and 1.5. For every point,

    S_i = Σ_jk w_j w_k exp(κ (x_i·x_j + x_i·x_k + x_j·x_k)),    κ = {KAPPA:g},

is the weight of all triangles with a corner there, the closer their corners the more: a three-point statistic with a smooth
kernel. Nothing is learned. The score is a sum of three products: `tattn.scores.strassen` writes it as nine channels.
Weights are the values, and lse gives back the sum that softmax divides by:

```python
query, keys = tattn.scores.strassen(x, [x, x])
options = {{"tol": 1e-6, "method": "polynomial", "return_lse": True}}
out, lse = tattn.tensor_attention(query, keys, [w, w], scale={KAPPA:g}, **options)
sums = out * np.exp(lse)[:, None]
```

The truth comes from the addition theorem, exp(κ x·y) = Σ_l 4π i_l(κ) Σ_m Y_lm(x) Y_lm(y), up to l = {HARMONICS} in float64: then
S_i = Σ_lm 4π i_l (Σ_j w_j exp(κ x_i·x_j) Y_lm(x_j))², in time linear in the number of points as well. It agrees with the sum
over every triangle:

{markdown(of_every, ["points", "time of every triangle", "harmonics are apart by"])}

![Time and error](sphere_triplets.png)

Half of the points are uniform, half in twenty clusters. *Error* is that of S / N, where N is the sum without weights, relative to
the largest product of two weights, as `tol` is. *Of S* is the relative error of the sum itself. Its stated bound follows from
those of the answer and of lse. Errors are the largest over all points; time is that of one thread, without gradient.

{markdown(of_sums, heads)}

At {top["points"]:,} points every triangle would take {hours:,.1f} hours at the rate of the first table; the slowest sum here takes
{seconds(slowest)}. At {rows[0]["points"]:,} points and the smallest `tol`, the sum over every triangle is
about as fast. No measured error exceeds what was stated. A stated error assumes that every triangle errs by the most that any
score in the range can, with the worst sign; errors of many triangles cancel, and it is {_margin(rows)} times the measured one.

The harmonics are faster. They know that points are on a sphere and that the kernel depends on angles alone. Attention to pairs
knows the score only, and takes [any other](../api/scores.md) in its place. A larger κ is where this ends: the range of the scores
grows with it, then the degree, and with that the rank.
"""


def _margin(rows: Table) -> str:
    """How many times the measured error is below the stated one."""
    margins = [r["stated"] / r["measured"] for r in rows]
    return f"{short(min(margins))} to {short(max(margins))}"


def main() -> None:
    """Measure, and write what was found."""
    given = shared.options(__doc__, steps=0, quick_steps=0, batch=0, rate=0.0).parse_args()
    shared.run(NAME, given, PARTS, plot, page)


if __name__ == "__main__":
    main()
