"""The benchmarks: answers that are known at any length, and a report that holds what its tables say."""

from __future__ import annotations

import importlib.util
import json
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import benchmarks.__main__
import tattn
from benchmarks import goals, lengths, page, report
from benchmarks.libraries import Library, Torch
from benchmarks.measure import Measure
from benchmarks.problem import Problem, draw
from benchmarks.rivals import einsum_numpy
from evidence.apart import stored
from evidence.growth import overtaking
from evidence.tables import Row, Table, load, where

ROOT = Path(__file__).parents[1]
PLOTS = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="package missing: matplotlib")


class Benchmark:
    """What a case needs of the fixture of pytest-benchmark."""

    def __init__(self) -> None:
        self.group = ""
        self.extra_info: dict[str, Any] = {}
        self.stats = types.SimpleNamespace(stats=types.SimpleNamespace(min=0.0))

    def pedantic(self, function: Any, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            function()
        self.stats.stats.min = 1e-3 * (1 + len(self.extra_info))


def case(group: str, method: str, problem: Problem, gradient: bool, seconds: float, **more: Any) -> dict[str, Any]:
    """One case as pytest-benchmark writes it."""
    benchmark, library = Benchmark(), Library("cpu", 1)
    plan = None
    if method.startswith("polynomial"):
        n, dim = problem.arrays[0].shape
        plan = tattn.plan_for(n=n, dim=dim, value_dim=problem.grad.shape[1], bound=1.0, degree=4, method="polynomial")
    options: dict[str, Any] = {"plan": plan} if plan else {"method": "exact"}
    if method == "dense einsum":
        run = library.forward(einsum_numpy, problem.arrays)
    else:
        run = library.attention(problem.arrays, problem.grad if gradient else None, **options)
    Measure(benchmark, library, 1, quick=True)(group, method, problem, run, plan=plan, **more)
    return {"extra_info": benchmark.extra_info, "stats": {"min": seconds, "rounds": 2}}


def timed(group: str, method: str, seconds: float, beside: float | None, **facts: Any) -> dict[str, Any]:
    """A case whose result is checked elsewhere, and what takes turns with it."""
    benchmark = Benchmark()
    measure = Measure(benchmark, Library("cpu", 1), facts.pop("threads", 1), quick=True)
    shape = {"gradient": True, "n": 64, "dim": 8, "value_dim": 8, "degree": 4}
    measure.times(group, method, list, list if beside else None, **(shape | facts))
    if beside:
        benchmark.extra_info["bare_seconds"] = beside
    return {"extra_info": benchmark.extra_info, "stats": {"min": seconds, "rounds": 2}}


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """Two lengths of every group that NumPy has, with times that are made up: ours take n, the definition n³."""
    cases = []
    for n in (64, 128):
        problem = draw(n, 8, 8)
        for gradient in (False, True):
            more = {"beside": lambda: 2e-3}
            cases.append(case("limit", "polynomial", problem, gradient, 2.2e-3, **more))
            cases.append(case("rivals", "polynomial, degree 4", problem, gradient, 1e-6 * n))
        cases.append(case("growth", "polynomial", problem, True, 1e-6 * n))
        cases.append(case("rivals", "dense einsum", problem, False, 1e-10 * n**3))
        cases.append(case("rivals", "exact", problem, False, 3e-10 * n**3))
    for n in (128, 256):
        problem = draw(n, 16, 16)
        cases.append(case("rivals", "exact", problem, False, 1e-9 * n**3))
        cases.append(case("rivals", "dense einsum", problem, False, 2e-9 * n**3))
    cases.append(case("overhead", "with a plan", draw(16, 8, 8), False, 1e-4))
    cases.append(timed("causal", "causal over all rows", 3e-3, 2e-3, error=1e-6, certified=1e-3))
    cases.append(timed("million", "causal in float32, from float64", 1.0, None, error=2e-3, certified=1e-3))
    cases.append(timed("tokens", "one token a call", 64 * 50e-6, None, gradient=False))
    cases.append(timed("layers", "layer over ordinary, causal", 1e-3, 4e-3, n=16384))
    cases.append(timed("heads", "8 heads, causal", 3e-3, None))
    cases.append(timed("heads", "8 heads, causal", 2e-3, None, threads=2))
    cases.append(timed("compiling", "gradient over that of einsum", 3.0, 1.0))
    cases.append(timed("system", "exact", 1.0, None, system_share=0.04))
    return {"machine_info": {"cpu": "some", "quick": True, "commit": "1"}, "benchmarks": cases}


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("n", [16, 64, 192])
def test_what_is_expected_of_a_long_call_is_what_the_definition_gives(n: int, views: int) -> None:
    problem = draw(n, 3, 5, views)
    ones = [np.ones((1, width)) for width in (3, 5)] if views == 1 else [None, None]
    query, *rest = (x.astype(np.float64) for x in problem.arrays)
    keys, values = (
        [*part, *(o for o in (one,) if o is not None)]
        for part, one in zip((rest[:views], rest[views:]), ones, strict=True)
    )
    out, d_query, *grads = stored(query, *keys, *values, problem.grad.astype(np.float64))
    found = [out, d_query, *grads[:views], *grads[2 : 2 + views]]
    for got, expected, places in zip(found, problem.expected, problem.places, strict=True):
        np.testing.assert_allclose(got, expected[places], rtol=1e-10, atol=1e-14)


def test_a_wrong_answer_is_no_benchmark() -> None:
    problem = draw(64, 4, 4)
    out, pullback = tattn.tensor_attention_vjp(
        problem.arrays[0], problem.arrays[1:3], problem.arrays[3:], method="exact"
    )
    d_query, d_keys, d_values = pullback(problem.grad)
    result = [out, d_query, *d_keys, *d_values]
    assert problem.errors(result, None)["gradient_error"] < 1e-5
    plan = tattn.plan_for(n=64, dim=4, value_dim=4, bound=1.0, degree=4, method="polynomial")
    with pytest.raises(AssertionError, match="error 1"):
        problem.errors([out + 1.5, *result[1:]], plan)
    with pytest.raises(AssertionError, match="rounding of a gradient"):
        problem.errors([out, d_query, *d_keys, d_values[0], 2 * d_values[1]], None)
    with pytest.raises(AssertionError, match="of the query's gradient"):
        problem.errors([out, 1e3 + d_query, *d_keys, *d_values], plan)


@pytest.mark.parametrize("views", [1, 2])
def test_a_polynomial_is_what_its_coefficients_say(views: int) -> None:
    """And not only as near to exp as its plan states: that would let a wrong gradient of values pass."""
    problem = draw(128, 4, 4, views)
    plan = tattn.plan_for(n=128, dim=4, value_dim=4, order=views + 1, bound=1.0, degree=2, method="polynomial")
    query, *rest = problem.arrays
    out, pullback = tattn.tensor_attention_vjp(query, rest[:views], rest[views:], plan=plan)
    d_query, d_keys, d_values = pullback(problem.grad)
    result = [out, d_query, *d_keys, *d_values]
    errors = problem.errors(result, plan)
    assert errors["error"] > 1e-4 and errors["gradient_error"] > 1e-3
    for i in range(1, len(result)):
        with pytest.raises(AssertionError, match="rounding of a gradient"):
            problem.errors([r * (1.01 if j == i else 1) for j, r in enumerate(result)], plan)
    with pytest.raises(AssertionError, match=r"rounding [0-9]"):
        problem.errors([out + 1e-4, *result[1:]], plan)


def test_what_a_case_records(content: dict[str, Any]) -> None:
    rows, machines = report.rows_of([content, content])
    assert len(machines) == 1
    limit = where(rows, group="limit", gradient=True, n=128)[0]
    assert limit["rank"] == 495
    assert 0 < limit["error"] <= limit["certified"] < 2e-3
    assert goals.ratio(limit) == pytest.approx(1.1)
    assert where(rows, method="dense einsum", n=64)[0]["error"] < 1e-6


def test_goals_and_crossings_are_those_of_the_times(content: dict[str, Any]) -> None:
    rows, _ = report.rows_of([content])
    found = goals.goals(rows)
    assert [row["met"] for row in found if "nine bare products" in row["goal"]] == [True, True]
    (exact,) = (row for row in found if "exact method" in row["goal"])
    assert (exact["measured"], exact["met"]) == (pytest.approx(2.0), False)
    others = {row["goal"].partition(",")[0]: (row["measured"], row["met"]) for row in found}
    assert {
        name: other for name, other in others.items() if name not in ("over nine bare products", exact["goal"])
    } == {
        "causal over all rows": (pytest.approx(1.5), True),
        "causal over many rows": (pytest.approx(2.0), False),
        "µs a token": (pytest.approx(50.0), True),
        "layer over ordinary": (pytest.approx(0.25), False),
        "two threads over one": (pytest.approx(1.5), False),
        "JAX: time to compile a gradient": (pytest.approx(3.0), False),
        "exact gradient": (0.04, True),
        "exact method": (pytest.approx(2.0), False),
        "2^20 rows": ("", ""),
    }
    # 1e-6 n = 1e-10 n³ at n = 100; the slower exact method does not count.
    (crossing,) = where(goals.breaks_even(rows), gradient=False)
    assert crossing["crossing"] == pytest.approx(100, rel=1e-6)


def test_what_is_asked_of_jax_is_asked_of_it_alone(content: dict[str, Any]) -> None:
    rows, _ = report.rows_of([content])
    (row, _) = where(rows, group="limit", gradient=True)
    found = goals.goals([{**row, "library": name} for name in ("jax", "numpy")])
    assert [x["asked"] for x in found if "nine bare products" in x["goal"]] == [1.8, 1.2]


def test_rivals_that_took_turns_are_compared_by_those() -> None:
    problem = draw(128, 16, 16)
    cases = [
        case("rivals", "exact", problem, False, 2e-3, beside=lambda: 3e-3),
        case("rivals", "SDPA over pair keys", problem, False, 8e-3),
    ]
    for one in cases:
        one["extra_info"]["library"] = "torch"
    rows, _ = report.rows_of([{"machine_info": {}, "benchmarks": cases}])
    assert goals.speedups(rows, "torch", "SDPA over pair keys", 16, False) == [(128, pytest.approx(1.5))]


def test_where_a_polynomial_never_gains_there_is_no_crossing() -> None:
    def rows(*seconds: float) -> list[dict[str, Any]]:
        return [{"n": 64 << i, "seconds": s} for i, s in enumerate(seconds)]

    assert overtaking(rows(1, 2, 4), rows(2, 4, 8)) == (np.inf, False)
    # Fits to the lengths behind may meet before the last of them.
    assert overtaking(rows(1, 1, 40, 20), rows(30, 30, 30, 21)) == (512, False)


def test_a_report_is_of_one_run(content: dict[str, Any], tmp_path: Path) -> None:
    for commit in "12":
        text = json.dumps({**content, "machine_info": {"quick": True, "commit": commit}})
        (tmp_path / f"{commit}.json").write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match="are of different commits, 1, 2"):
        report.main([str(tmp_path)])


def test_a_process_that_measured_nothing_is_noticed(content: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    assert not benchmarks.__main__._measured(file)
    for text in ("", json.dumps({**content, "benchmarks": []})):
        file.write_text(text, encoding="utf-8")
        assert not benchmarks.__main__._measured(file)
    file.write_text(json.dumps(content), encoding="utf-8")
    assert benchmarks.__main__._measured(file)


@PLOTS
def test_a_report_of_a_small_run(content: dict[str, Any], tmp_path: Path) -> None:
    report.write([json.loads(json.dumps(content))], tmp_path / "docs")
    text = (tmp_path / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert "A quick run" in text
    assert "| ≤\N{NO-BREAK SPACE}1.20 | 1.10 | met |" in text
    assert "| ≥\N{NO-BREAK SPACE}3.00 | 2.00 | **not met** |" in text
    # What a goal means stands before what came of it.
    assert text.index("**Over nine bare products.**") < text.index("| met |")
    assert "* **Long sequences.** 128 rows of 8 channels, forward and gradient: numpy " in text
    assert "| 100 (dense einsum) |" in text
    assert "forward + gradient | 3 ms | 2 ms | **1.50** | 1.0e-6 | 0.001 |" in text
    for name in re.findall(r"\]\((benchmarks/[^)]+)\)", text):
        assert (tmp_path / "docs" / name).stat().st_size > 0, name


@PLOTS
def test_the_report_of_a_gpu_stays_apart(content: dict[str, Any], tmp_path: Path) -> None:
    given = json.loads(json.dumps(content))
    assert report.destination([given], tmp_path) == tmp_path / "docs"
    for one in given["benchmarks"]:
        one["extra_info"]["device"] = "Some GPU"
    docs = report.destination([given], tmp_path)
    assert docs == tmp_path / "docs" / "gpu"
    report.write([given], docs)
    text = (docs / "benchmarks.md").read_text(encoding="utf-8")
    assert text.startswith("---\norphan: true\n---\n\n# Benchmarks on Some GPU\n")
    assert "tried.md" not in text


def committed() -> dict[str, Table]:
    return {name: load(ROOT / "docs" / "benchmarks" / f"{name}.csv") for name in report.TABLES}


def test_the_page_is_made_of_its_tables() -> None:
    assert (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8") == page.page(committed())


def lengths_measured() -> tuple[Table, Row]:
    table, (machine,) = (load(ROOT / "docs" / "lengths" / f"{name}.csv") for name in ("measured", "machine"))
    return table, machine


def test_the_table_of_the_readme_is_what_was_measured() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == lengths.between_marks(text, lengths.readme(*lengths_measured()))
    layers = (ROOT / "docs" / "layers" / "rows.md").read_text(encoding="utf-8").strip()
    assert text == lengths.between_marks(text, layers, lengths.LAYER_MARKS)
    with pytest.raises(ValueError, match="the text should hold"):
        lengths.between_marks("no marks", "table")


def test_what_was_not_measured_is_extrapolated_and_said_so() -> None:
    table, machine = lengths_measured()
    last = where(table, method="exact")[-1]
    assert lengths.expected(table, "exact", 2 * last["n"], "seconds") == pytest.approx(8 * last["seconds"])
    (row,) = (line for line in lengths.readme(table, machine).splitlines() if line.startswith("| 1,048,576 |"))
    _, _, ordinary, exact, ours, *_ = row.split("|")
    assert "≈" in ordinary and "≈" in exact and "≈" not in ours
    assert all(row["error"] <= row["certified"] for row in where(table, method="tattn"))


@pytest.mark.libraries("torch")
def test_methods_take_turns_until_one_would_take_too_long() -> None:
    import torch

    threads = torch.get_num_threads()
    table = lengths.measure(Torch("cpu", 1), (64, 128, 256), 0.0)
    torch.set_num_threads(threads)
    # The first length is always measured.
    assert [(row["method"], row["n"]) for row in table] == [(name, 64) for name in lengths.METHODS]
    assert all(row["seconds"] > 0 and row["gradient_seconds"] > 0 for row in table)
