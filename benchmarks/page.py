"""The words and tables of the report, made of its tables alone."""

from __future__ import annotations

from math import isfinite, isinf

from evidence.growth import fit
from evidence.tables import Row, Table, column, distinct, listed, markdown, mebibytes, seconds, short, where

from .goals import LONGEST, LONGEST_JUDGED, STORED, breaks_even, passes, ratio, speedups

_INTRO = """\
{title}

<!-- Made by `python -m benchmarks.report` from the tables in docs/benchmarks. Changes made by hand are lost. -->

{gains}

`nox -s bench` measures all of this and writes this page, or where there is a CUDA device that of the GPU, into `docs/gpu`;
`-- --quick` takes minutes and writes elsewhere.
"""
_HOW = """\
float32. Every result is first compared with the definition in float64: rows are drawn from 64 distinct ones, so that the
answer for any length is known from a small problem, gradients included. A case whose error is above its certified bound
fails, and so does an exact one whose error is above rounding. Query and keys have entries from ±0.7 to ±1 and the scale is
1/d, so scores lie within ±1 and fill much of it. *Error* is relative to max|u| max|v|, as `tol` is; *of spread* is the same
difference relative to how far the outputs of two rows are apart: stricter, and nothing that is certified. *Of gradients* is the
largest difference in a gradient over its largest entry. A polynomial is also compared with the definition that has P in place of
exp, outputs and all gradients, which it is to be but for rounding. Each library and
number of threads has a process of its own. Times are the shortest of two rounds or more, after a call to warm up, and
waited for.
"""
_ERRORS = {
    "error": "error",
    "error_of_spread": "of spread",
    "certified": "certified",
    "gradient_error": "of gradients",
}
# What each kind of goal asks and means, by the beginning of its name.
_MEANING = {
    "over nine bare products": """\
**Over nine bare products.** Forward and gradient by the polynomial are nine matrix products and some passes over rows. The ratio
is the time of the call over that of the products alone, run by the same library: 1.00 would mean that nothing else takes time, 1.50
that half as much again does. A compiled loop that keeps a tile of monomials in the cache may take less.""",
    "causal over all rows": """\
**Causal over all rows.** A row to the rows before it, over a row to all rows, both by the polynomial; the two take turns. A
third of the pairs is seen, but sums of every prefix are read in place of one.""",
    "µs a token": """\
**Tokens.** `DecodingState.step` with one token, checks included, and with many.""",
    "layer over ordinary": """\
**Layers.** `TensorAttention(64, 8)` over `nn.MultiheadAttention(64, 8)`, which sees no pairs; causal: over
`scaled_dot_product_attention` between the same projections.""",
    "two threads over one": """\
**Two threads.** Times as fast as on one thread, forward and gradient.""",
    "JAX": """\
**Compiling in JAX.** Time until the gradient is compiled, over that of the program that people write by einsum.""",
    "exact method": """\
**The exact method against what you would write otherwise.** Times as fast, at the worst of several lengths: SDPA over pair keys is
torch's fused attention over all n² pairs, einsum stores all n³ scores. Below 1.00 the other one is faster.""",
    "2^20 rows": """\
**A million rows on a GPU**, if there was one.""",
}
_GOALS_DRAWN = """\
![Each goal, and what was measured in parts of it](benchmarks/goals.png)

Bars: what was measured in parts of what was asked, or the inverse where more is better. A bar that ends left of 1 meets its
goal."""
_QUICK = "**A quick run, of small sizes and few rounds: it shows that all runs, and is not to be quoted.**\n"


def page(tables: dict[str, Table]) -> str:
    """The whole page."""
    measured, machines = tables["measured"], tables["machine"]
    devices = [device for (device,) in distinct(measured, "device") if device != "cpu"]
    # Of the page of a GPU, which is there only if one was, no other page can know.
    title = "---\norphan: true\n---\n\n# Benchmarks on " + listed(devices) if devices else "# Benchmarks"
    beside = _beside(measured)
    parts = [_INTRO.format(title=title, gains=_gains(measured))]
    if any(column(machines, "quick")):
        parts.append(_QUICK)
    parts += [
        f"## How it is measured\n\n{_HOW}",
        _section("Goals", _goals(tables["goals"]), tables["goals"]),
        "" if devices else "```{include} benchmarks/tried.md\n```\n",
        _section(
            "Over the bare matrix products", _limit(where(measured, group="limit")), where(measured, group="limit")
        ),
        _section("Growth", _growth(where(measured, group="growth")), where(measured, group="growth")),
        _section("Causal calls, tokens, layers", beside, beside),
        _section("Rivals", _rivals(measured), where(measured, group="rivals")),
        _section(
            "Attention of order two, as context",
            _order_one(where(measured, group="order one")),
            where(measured, group="order one"),
        ),
        _section("Short calls", _overhead(where(measured, group="overhead")), where(measured, group="overhead")),
        "## Machine\n\n" + _machine(machines, measured),
        "Tables: [all cases](benchmarks/measured.csv), [goals](benchmarks/goals.csv), [machine](benchmarks/machine.csv).\n",
    ]
    return "\n".join(part for part in parts if part)


def _section(title: str, words: str, rows: Table | str) -> str:
    return f"## {title}\n\n{words.strip()}\n" if rows else f"## {title}\n\nNot measured in this run.\n"


def _gains(measured: Table) -> str:
    """What a user gains, in a few sentences."""
    points = []
    grown = where(measured, group="growth")
    for n, dim in distinct(where(grown, n=max(column(grown, "n"), default=0)), "n", "dim"):
        rows = where(grown, n=n, dim=dim)
        took = [f"{row['library']} {seconds(row['seconds'])}" for row in rows]
        told = [row["peak_bytes"] for row in rows if row["peak_bytes"]]
        memory = f", with at most {mebibytes(max(told))} MiB beyond inputs and outputs" if told else ""
        points.append(
            f"* **Long sequences.** {n:,} rows of {dim} channels, forward and gradient: {', '.join(took)}{memory}. The error is "
            f"{short(rows[0]['error'])}, certified {short(rows[0]['certified'])}."
        )
    early = [
        f"{max(row['crossing'], 64):,.0f} rows ({row['library']}, {row['dim']} channels)"
        for row in breaks_even(measured)
        if row["gradient"] and row["dim"] in (8, 16) and row["degree"] == 4 and isfinite(row["crossing"])
    ]
    if early:
        points.append(
            "* **Not only long ones.** Gradient included, degree 4 is faster than every exact method from about these lengths on: "
            f"{', '.join(early)}."
        )
    points.append("* **Exact calls** store no n³ scores, and not even the n² pairs.")
    return "What you gain, on one thread, for attention over all pairs of rows:\n\n" + "\n".join(points)


def _goals(goals: Table) -> str:
    shown = [text for name, text in _MEANING.items() if any(str(row["goal"]).startswith(name) for row in goals)]
    words = "Goals say how near the code is to what the machine could do. One that is not met costs time, and no accuracy.\n\n"
    return words + "\n\n".join(shown) + f"\n\n{_GOALS_DRAWN}\n\n" + _goals_table(goals)


def _goals_table(goals: Table) -> str:
    lines = []
    for row in goals:
        verdict = {True: "met", False: "**not met**"}.get(row["met"], "–")
        # No-break spaces: a number stays with its sign.
        asked = f"{row['sign']}\N{NO-BREAK SPACE}{row['asked']:.2f}" if row["asked"] != "" else "–"
        got = f"{row['measured']:.2f}" if row["measured"] != "" else "–"
        case = row["case"].replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}").replace("…", " to ")
        lines.append([row["goal"], case, asked, got, verdict])
    return markdown(lines, ["goal", "case", "asked", "measured", "verdict"])


def _limit(rows: Table) -> str:
    lines = []
    for row in rows:
        if row["gradient"]:
            same = ("library", "threads", "n", "dim", "value_dim", "degree")
            forward = where(rows, gradient=False, **{k: row[k] for k in same})
            lines.append(
                [
                    row["library"],
                    str(row["threads"]),
                    f"{row['n']:,}",
                    str(row["dim"]),
                    str(row["value_dim"]),
                    str(row["degree"]),
                    f"{row['rank']:,}",
                    seconds(forward[0]["seconds"]) if forward else "–",
                    f"{ratio(forward[0]):.2f}" if forward else "–",
                    seconds(row["seconds"]),
                    f"**{ratio(row):.2f}**",
                    *_errors(row),
                    _memory(row),
                ]
            )
    heads = ["library", "threads", "n", "d", "dv", "degree", "rank", "forward", "over 3 products", "with gradient"]
    heads += ["over 9 products", *_ERRORS.values(), "MiB"]
    return f"""\
The polynomial method is three products (rank × n)·(n × (dv + 1)) forward and nine with the gradient; a bare product of that
shape takes turns with the call in the same process. Where the features of the bare product would take more than 256 MiB,
fewer rows are multiplied and the time is scaled. Threads that shared a product spin on their processor for a while: where there are
two, the call comes 0.3 s later. MiB: memory at the peak of the process beyond that before the call and its outputs, of the call
with its gradient; a dash where memory that the process had before was enough, on two threads, which leave some behind, and for
JAX, which does not tell it.

![Time over that of the bare products](benchmarks/limit.png)

Bars: time over that of the bare products, lighter on two threads; the short lines are the goals.

{markdown(lines, heads)}"""


def _growth(rows: Table) -> str:
    lines = []
    for library, dim in distinct(rows, "library", "dim"):
        mine = where(rows, library=library, dim=dim)
        slope = f"{fit(mine)[0]:.2f}" if len(mine) > 1 else "–"
        last = mine[-1]
        a_row = f"{last['seconds'] / last['n'] * 1e6:.2f} µs"
        lines.append([library, str(dim), f"{mine[0]['n']:,}", f"{last['n']:,}", slope, seconds(last["seconds"]), a_row])
        lines[-1] += [_memory(last), *_errors(last)]
    heads = ["library", "d", "n from", "to", "exponent", "time at the largest", "a row", "MiB there"]
    return f"""\
Forward and gradient at degree 4, dv = d, one thread. The exponent is the slope of log time over log n at the three largest lengths.

![Time and memory against n](benchmarks/growth.png)

Left: time of a call. Right: memory at its peak beyond inputs and outputs. Blocks of rows take as much whatever the length; what
grows is a few numbers a row, such as the normaliser, beside the 3 d + 4 dv numbers of inputs and outputs. JAX does not tell it.

{markdown(lines, [*heads, *_ERRORS.values()])}"""


def _beside(measured: Table) -> str:
    """What is compared with one other call, a line for each; nothing if there is none."""
    lines = []
    for row in measured:
        if row["group"] not in ("causal", "million", "tokens", "heads", "layers", "compiling"):
            continue
        beside = row["bare_seconds"] != ""
        lines.append(
            [
                row["method"],
                row["library"],
                str(row["threads"]),
                f"{row['n']:,}",
                str(row["value_dim"]),
                passes(row["gradient"]),
                seconds(row["seconds"]),
                seconds(row["bare_seconds"]) if beside else "–",
                f"**{ratio(row):.2f}**" if beside else "–",
                *(short(row[k]) if row[k] != "" else "–" for k in ("error", "certified")),
            ]
        )
    heads = ["what", "library", "threads", "n", "dv", "pass", "time", "beside", "ratio", "error", "certified"]
    words = """\
d = 8, degree 4, rank 495. *Beside* is the time of what the call is compared with, which took turns with it: the call that sees
all rows, ordinary attention, the compilation of einsum. Errors of causal calls are those of the first 256 rows and of the last,
whose output is known; of a million rows the largest difference from float64. [Causal attention](causal.md) and
[layers](layers.md) have more."""
    return f"{words}\n\n{markdown(lines, heads)}" if lines else ""


def _rivals(measured: Table) -> str:
    rows = where(measured, group="rivals")
    libraries = [name for (name,) in distinct(rows, "library")]
    plots = "\n\n".join(
        f"![Time against n in {name}](benchmarks/rivals-{name}.png)\n\n{name}: exact methods dashed, ours in black, "
        "polynomials drawn through, at the errors in the table. A line ends where the next call would take "
        f"{LONGEST:g} s ({LONGEST_JUDGED:g} s where a goal is about it) or 4 GiB."
        for name in libraries
    )
    return f"""\
What users would write otherwise, or install, for the same attention over pairs, dv = d, one thread. *SDPA over pair keys*: torch's
`scaled_dot_product_attention` over the n² keys a_j ∘ b_k and values u_j ∘ v_k, which is the same function and stores no
scores. `naive_two_simplicial_attend` and `nth_order_attend` are those of simplicial-attention; they combine values as we do and
divide scores by √d, so their query carries another 1/√d. Gradients are those of the library's autograd, and in NumPy those of
the definition written by hand with all scores stored.

{plots}

### How far each goes

{_furthest(rows)}

### From which length the polynomial is faster

Against the fastest exact method at each n, ours among them. Exact methods are right to rounding ({_rounding(rows)} at most);
the error of each polynomial stands beside it, and falls to that of the exact ones where d leaves room for the degree. In
brackets the exact method that was the fastest there; ~: where fits to the largest lengths meet, or the
last length where the exact method was faster, if that is later; ≤: at every length that both ran.

{_break_even(measured)}

### The exact method against its rivals

Time of the rival over ours, so how many times as fast ours is; SDPA over pair keys took turns with ours where both are
torch's and goals are about it.

{_exact(measured)}"""


def _furthest(rows: Table) -> str:
    lines = []
    for library, dim, method in distinct(rows, "library", "dim", "method"):
        if dim == 64:
            continue
        mine = where(rows, library=library, dim=dim, method=method)
        line = [library, str(dim), method]
        for gradient in (False, True):
            ran = where(mine, gradient=gradient)
            line += [f"{ran[-1]['n']:,}", seconds(ran[-1]["seconds"]), _memory(ran[-1])] if ran else ["–"] * 3
        last = mine[-1]
        lines.append([*line, *_errors(last)])
    heads = [
        "library",
        "d",
        "method",
        "forward: largest n",
        "time",
        "MiB",
        "forward + gradient: largest n",
        "time",
        "MiB",
    ]
    return markdown(lines, [*heads, *_ERRORS.values()])


def _rounding(rows: Table) -> str:
    """The largest error of an exact method."""
    return short(max(row["error"] for row in rows if row["degree"] == ""))


def _break_even(measured: Table) -> str:
    rows = breaks_even(measured)
    lines = []
    for library, dim, degree in distinct(rows, "library", "dim", "degree"):
        mine = where(rows, library=library, dim=dim, degree=degree)
        crossings = []
        for gradient in (False, True):
            found = where(mine, gradient=gradient)
            crossings.append(_crossing(found[0], measured) if found else "–")
        lines.append([library, str(dim), str(degree), f"{mine[0]['rank']:,}", *_errors(mine[-1]), *crossings])
    heads = ["library", "d", "degree", "rank", *_ERRORS.values(), "forward", "forward + gradient"]
    return markdown(lines, heads)


def _crossing(row: Row, measured: Table) -> str:
    if row["crossing"] == 0:
        return f"≤ {min(column(where(measured, group='rivals', dim=row['dim']), 'n'))}"
    if isinf(row["crossing"]):
        return f"never ({row['best']})"
    return f"{'' if row['seen'] else '~ '}{row['crossing']:,.0f} ({row['best']})"


def _exact(measured: Table) -> str:
    lines = []
    rows = where(measured, group="rivals", method="exact")
    lengths = sorted({*column(rows, "n")})
    for library, dim, gradient in distinct(rows, "library", "dim", "gradient"):
        for rival in ("dense einsum", "einsum by default", STORED, "SDPA over pair keys"):
            pairs = dict(speedups(measured, library, rival, dim, gradient))
            if pairs:
                cells = [f"{pairs[n]:.2f}" if n in pairs else "–" for n in lengths]
                lines.append([library, str(dim), passes(gradient), rival, *cells])
    return markdown(lines, ["library", "d", "pass", "rival", *(f"n = {n:,}" for n in lengths)])


def _order_one(rows: Table) -> str:
    lines = []
    lengths = sorted({*column(rows, "n")})
    for dim, method in distinct(rows, "dim", "method"):
        for gradient in (False, True):
            mine = where(rows, dim=dim, method=method, gradient=gradient)
            if mine:
                times = {row["n"]: seconds(row["seconds"]) for row in mine}
                cells = [times.get(n, "–") for n in lengths]
                lines.append([str(dim), method, passes(gradient), *cells, *_errors(mine[-1])])
    heads = ["d", "method", "pass", *(f"n = {n:,}" for n in lengths), *_ERRORS.values()]
    return f"""\
One view is ordinary attention, which a polynomial serves as well. torch, one thread. *FastAttention, m*: that of
performer-pytorch with m random features, drawn with a seed; its error is that of one draw, and nothing bounds it.

{markdown(lines, heads)}"""


def _overhead(rows: Table) -> str:
    lines = []
    for library, method in distinct(rows, "library", "method"):
        cells = []
        for gradient in (False, True):
            mine = where(rows, library=library, method=method, gradient=gradient)
            cells.append(seconds(mine[0]["seconds"]) if mine else "–")
        lines.append([library, method, *cells])
    words = "16 rows, d = dv = 8, one thread: there is hardly anything to compute. JAX runs under jit unless it says otherwise."
    return f"{words}\n\n{markdown(lines, ['library', 'call', 'forward', 'forward + gradient'])}"


def _machine(machines: Table, measured: Table) -> str:
    threads = listed(sorted({*column(measured, "threads")}))
    lines = [f"* threads: {threads}, each in processes of their own"]
    for name in machines[0]:
        values = list(dict.fromkeys(str(row[name]) for row in machines))
        lines.append(f"* {name}: {', '.join(values)}")
    devices = sorted({*column(measured, "device")} - {"cpu"})
    lines.append(f"* accelerator: {', '.join(devices) or 'none; what needs one was skipped'}")
    return "\n".join(lines) + "\n"


def _errors(row: Row) -> list[str]:
    return [short(row[k]) if row[k] != "" else "–" for k in _ERRORS]


def _memory(row: Row) -> str:
    return mebibytes(row["peak_bytes"]) if row["peak_bytes"] else "–"
