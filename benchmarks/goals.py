"""What the suite is to show, from the table of its measurements: ratios and whether each is what it should be."""

from __future__ import annotations

from evidence.growth import overtaking
from evidence.tables import Row, Table, column, distinct, where

# dv → largest ratio of forward and gradient to nine bare products, d = 8, degree 4, one thread; NumPy and torch.
LIMITS = {8: 1.2, 64: 1.4}
LIMIT_OF_JAX = 1.8
STORED = "scores stored, gradient by hand"
FUSED = "SDPA over pair keys"
# The exact method is to be this many times as fast as these, forward and with the gradient: NumPy does not differentiate einsum.
SPEEDUPS = {
    "torch": ((FUSED, (False, True), {8: 1.0, 16: 1.0, 64: 1.25}),),
    "numpy": (
        ("dense einsum", (False,), {16: 3.0, 64: 3.0}),
        ("einsum by default", (False,), {16: 3.0, 64: 3.0}),
        (STORED, (True,), {16: 3.0, 64: 3.0}),
    ),
}
# Times as fast as on one thread.
ON_TWO_THREADS = 1.8
# Microseconds of a token, by how many a call takes.
OF_A_TOKEN = {"one token a call": 60.0, "4,096 tokens a call": 10.0}
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
    return [
        *_of_the_limit(measured),
        *_of_causal(measured),
        *_of_tokens(measured),
        *_of_layers(measured),
        *_of_threads(measured),
        *_of_exact(measured),
        *_of_jax(measured),
        *_on_a_gpu(measured),
    ]


def _of_the_limit(measured: Table) -> Table:
    found = []
    for value_dim, most in LIMITS.items():
        for row in where(measured, group="limit", gradient=True, dim=8, degree=4, value_dim=value_dim, threads=1):
            case = f"{row['library']}, dv = {value_dim}, n = {row['n']:,}"
            asked = LIMIT_OF_JAX if row["library"].startswith("jax") else most
            found.append(_goal("over nine bare products, d = 8, degree 4, one thread", case, "≤", asked, ratio(row)))
    return found


def _of_causal(measured: Table) -> Table:
    found = []
    for row in where(measured, group="causal"):
        case = f"{row['library']}, dv = {row['value_dim']}, n = {row['n']:,}, {passes(row['gradient'])}"
        most = 2.5 if row["gradient"] else 1.5
        found.append(_goal("causal over all rows, d = 8, degree 4", case, "≤", most, ratio(row)))
    for row in where(measured, group="million"):
        case = f"{row['n']:,} rows, float32 against float64, in parts of the stated error"
        found.append(_goal("causal over many rows", case, "≤", 1.0, row["error"] / row["certified"]))
    return found


def _of_tokens(measured: Table) -> Table:
    return [
        _goal("µs a token, rank 495, dv = 8", f"{row['library']}, {name}", "≤", most, 1e6 * row["seconds"] / row["n"])
        for name, most in OF_A_TOKEN.items()
        for row in where(measured, group="tokens", method=name)
    ]


def _of_layers(measured: Table) -> Table:
    """At most ordinary attention's time from 1,024 rows on, causal from 2,048, and a fifth of it at 16,384."""
    found = []
    for row in where(measured, group="layers"):
        causal = row["method"].endswith("causal")
        if row["n"] >= (2048 if causal else 1024):
            most = 0.2 if causal and row["n"] == 16384 else 1.0
            found.append(_goal(row["method"], f"{row['n']:,} rows, forward + gradient", "≤", most, ratio(row)))
    return found


def _of_threads(measured: Table) -> Table:
    found = []
    rows = [row for row in where(measured, group="limit", dim=8, degree=4) if row["value_dim"] in LIMITS]
    for row in [*rows, *where(measured, group="heads")]:
        same = ("group", "library", "method", "value_dim", "n", "gradient")
        alone = where(measured, threads=1, degree=4, dim=8, **{k: row[k] for k in same})
        if row["threads"] == 2 and row["gradient"] and alone and row["library"] != "jax":
            what = row["method"] if row["group"] == "heads" else f"dv = {row['value_dim']}"
            case = f"{row['library']}, {what}, n = {row['n']:,}"
            found.append(_goal("two threads over one", case, "≥", ON_TWO_THREADS, alone[0]["seconds"] / row["seconds"]))
    return found


def _of_jax(measured: Table) -> Table:
    return [
        _goal("JAX: time to compile a gradient, over that of einsum", f"dv = {row['value_dim']}", "≤", 2.0, ratio(row))
        for row in where(measured, group="compiling")
    ]


def _of_exact(measured: Table) -> Table:
    """The least advantage over the lengths from 128 to 1,024 that both ran."""
    found = []
    asked = [
        (library, rival, both, dim, least)
        for library, several in SPEEDUPS.items()
        for rival, both, of_dims in several
        for dim, least in of_dims.items()
    ]
    measured = [{**row, "library": str(row["library"]).partition("-")[0]} for row in measured]
    for library, rival, both, dim, least in asked:
        for gradient in both:
            pairs = speedups(measured, library, rival, dim, gradient)
            pairs = [(n, times) for n, times in pairs if 128 <= n <= 1024]
            if pairs:
                n, times = min(pairs, key=lambda pair: pair[1])
                case = f"d = {dim}, {passes(gradient)}, worst of n = {pairs[0][0]}…{pairs[-1][0]:,}, at {n:,}"
                name = f"exact method, times as fast as {rival}, {library}"
                found.append(_goal(name, case, "≥", least, times))
    for row in where(measured, group="system"):
        case = f"{row['library']}, d = {row['dim']}, n = {row['n']}"
        found.append(
            _goal("exact gradient, share of time in the system for memory", case, "≤", 0.05, row["system_share"])
        )
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
