"""What the suite is to show, from the table of its measurements: ratios and whether each is what it should be."""

from __future__ import annotations

from itertools import product

from evidence.growth import overtaking
from evidence.tables import Row, Table, column, distinct, where

# dv → largest ratio of forward and gradient to nine bare products, d = 8, degree 4, one thread; NumPy and torch.
LIMITS = {8: 1.5, 64: 1.3}
STORED = "scores stored, gradient by hand"
# The exact method is to be this many times as fast as these, forward and with the gradient: NumPy does not differentiate einsum.
SPEEDUPS = {
    "torch": (("SDPA over pair keys", (False, True), 1.0),),
    "numpy": (("dense einsum", (False,), 3.0), ("einsum by default", (False,), 3.0), (STORED, (True,), 3.0)),
}
# No rival is asked for a call that would take longer, in seconds.
LONGEST = 4.0
# But where a goal is about it.
LONGEST_JUDGED = 20.0


def ratio(row: Row) -> float:
    """Time over that of the bare products that took turns with it."""
    return float(row["seconds"] / row["bare_seconds"])


def passes(gradient: bool) -> str:
    """What was timed."""
    return "forward + gradient" if gradient else "forward"


def goals(measured: Table) -> Table:
    """Each goal with its figure: name, case, what is asked, what was measured and met."""
    return [*_of_the_limit(measured), *_of_threads(measured), *_of_exact(measured), *_on_a_gpu(measured)]


def _of_the_limit(measured: Table) -> Table:
    found = []
    for value_dim, most in LIMITS.items():
        for row in where(measured, group="limit", gradient=True, dim=8, degree=4, value_dim=value_dim, threads=1):
            if row["library"].startswith("jax"):
                continue
            case = f"{row['library']}, dv = {value_dim}, n = {row['n']:,}"
            found.append(_goal("over nine bare products, d = 8, degree 4, one thread", case, "≤", most, ratio(row)))
    return found


def _of_threads(measured: Table) -> Table:
    found = []
    for row in where(measured, group="limit", gradient=True, dim=8, degree=4, threads=2):
        same = {k: row[k] for k in ("library", "value_dim", "n", "degree", "dim", "group", "gradient")}
        alone = where(measured, threads=1, **same)
        if alone and row["value_dim"] in LIMITS and row["library"] != "jax":
            faster = alone[0]["seconds"] / row["seconds"]
            case = f"{row['library']}, dv = {row['value_dim']}, n = {row['n']:,}: {faster:.2f} times as fast as on one"
            name = "the same ratio on two threads, no larger than on one"
            found.append(_goal(name, case, "≤", ratio(alone[0]), ratio(row)))
    return found


def _of_exact(measured: Table) -> Table:
    """The least advantage over the lengths from 128 to 1,024 that both ran."""
    found = []
    asked = [(library, *one) for library, several in SPEEDUPS.items() for one in several]
    measured = [{**row, "library": str(row["library"]).partition("-")[0]} for row in measured]
    for (library, rival, both, least), dim in product(asked, (16, 64)):
        for gradient in both:
            pairs = speedups(measured, library, rival, dim, gradient)
            pairs = [(n, times) for n, times in pairs if 128 <= n <= 1024]
            if pairs:
                n, times = min(pairs, key=lambda pair: pair[1])
                case = f"d = {dim}, {passes(gradient)}, worst of n = {pairs[0][0]}…{pairs[-1][0]:,}, at {n:,}"
                name = f"exact method, times as fast as {rival}, {library}"
                found.append(_goal(name, case, "≥", least, times))
    return found


def speedups(measured: Table, library: str, rival: str, dim: int, gradient: bool) -> list[tuple[int, float]]:
    """(n, time of the rival over that of the exact method) where both ran."""
    rivals = where(measured, group="rivals", library=library, dim=dim, gradient=gradient)
    ours = {row["n"]: row for row in where(rivals, method="exact")}
    found = []
    for row in where(rivals, method=rival):
        if row["n"] in ours:
            mine = ours[row["n"]]
            # Fused attention took turns with ours where the two are compared.
            beside = mine["bare_seconds"] if rival.startswith("SDPA") and mine["bare_seconds"] else row["seconds"]
            found.append((row["n"], beside / mine["seconds"]))
    return found


def _on_a_gpu(measured: Table) -> Table:
    found = []
    for row in where(measured, group="growth", n=1 << 20, threads=1):
        if row["device"] != "cpu":
            case = f"{row['library']}, d = {row['dim']}: {row['seconds']:.3g} s, over nine bare products"
            found.append(_goal(f"2^20 rows, forward + gradient on {row['device']}", case, "", "", ratio(row)))
    if not found:
        some = any(row["device"] != "cpu" for row in measured)
        why = "not among what was measured" if some else "no CUDA device: not run"
        found.append(_goal("2^20 rows, forward + gradient on a GPU", why, "", "", ""))
    return found


def _goal(name: str, case: str, sign: str, asked: float | str, got: float | str) -> Row:
    met: str | bool = ""
    if not isinstance(asked, str) and not isinstance(got, str):
        met = got <= asked if sign == "≤" else got >= asked
    return {"goal": name, "case": case, "sign": sign, "asked": asked, "measured": got, "met": met}


def breaks_even(measured: Table) -> Table:
    """For each library, d, degree and pass: from which n on the polynomial is faster than every exact method.

    `crossing` is 0 where it was at all n; `seen` whether it lies between lengths that were measured, and is not from fits.
    """
    found = []
    rivals = where(measured, group="rivals")
    for library, dim, gradient in distinct(rivals, "library", "dim", "gradient"):
        mine = where(rivals, library=library, dim=dim, gradient=gradient)
        exact = [row for row in mine if row["degree"] == ""]
        best = [min(where(exact, n=n), key=lambda row: float(row["seconds"])) for n in sorted({*column(exact, "n")})]
        for (degree,) in distinct([row for row in mine if row["degree"] != ""], "degree"):
            ours = where(mine, degree=degree)
            if len(best) < 2 or len(ours) < 2:
                continue
            crossing, seen = overtaking(best, ours)
            last = ours[-1]
            rival = next((row for row in best if row["n"] >= crossing), best[-1])["method"]
            about = {"library": library, "dim": dim, "gradient": gradient, "degree": degree}
            errors = {k: last[k] for k in ("rank", "certified", "error", "error_of_spread", "gradient_error")}
            found.append({**about, **errors, "best": rival, "crossing": crossing, "seen": seen})
    return found
