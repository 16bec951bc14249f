"""What plans promise, choose and say; ranges, estimates and the check of an answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tracemalloc
from dataclasses import FrozenInstanceError
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import dense

import tattn
from tattn.__main__ import main
from tattn.bounds.score_range import exponents
from tattn.checks import checked_inputs
from tattn.planning import measured
from tattn.planning.banded import banded_candidates


def draw(
    seed: int = 0, n: int = 60, dim: int = 4, size: float = 1.0
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    query, *keys = rng.uniform(-size, size, (3, n, dim))
    return query, keys, list(rng.normal(size=(2, n, 3)))


def scores(query: np.ndarray, keys: list[np.ndarray], scale: float) -> np.ndarray:
    return scale * np.einsum("...ic,...jc,...kc->...ijk", query, *keys)


def test_a_plan_is_frozen_hashable_and_readable() -> None:
    plan = tattn.plan(*draw())
    assert hash(plan) == hash(tattn.plan(*draw()))
    assert plan == tattn.plan(*draw())
    with pytest.raises(FrozenInstanceError):
        plan.degree = 3  # type: ignore[misc]
    text = str(plan)
    for word in ("polynomial", "degree, rank", f"{plan.rank}", "certified", "reason", "flop"):
        assert word in text


def test_auto_takes_the_cheaper() -> None:
    assert tattn.plan_for(n=10, dim=8, bound=1.0).method == "exact"
    assert tattn.plan_for(n=100_000, dim=8, bound=1.0).method == "polynomial"
    far = tattn.plan_for(n=100_000, dim=8, bound=9.0)
    assert far.method == "exact"
    assert "no polynomial meets tol" in far.reason
    for n in (30, 100, 300):
        plan = tattn.plan_for(n=n, dim=3, bound=1.0)
        assert (plan.method == "exact") == (plan.flops_exact <= plan.flops_polynomial)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_smallest_degree_that_meets_tol(dtype: str) -> None:
    for bound in (0.2, 1.0, 1.5):
        for tol in (1e-1, 1e-2, 2e-3):
            plan = tattn.plan_for(n=1000, dim=4, bound=bound, tol=tol, dtype=dtype, method="polynomial")
            assert plan.error <= tol
            if plan.degree > 1:
                less = tattn.plan_for(n=1000, dim=4, bound=bound, degree=plan.degree - 1, dtype=dtype)
                assert less.error > tol


def test_taylor_needs_a_higher_degree() -> None:
    needed = {
        series: tattn.plan_for(n=10**5, dim=4, bound=2.0, dtype="float64", method="polynomial", series=series)
        for series in ("minimax", "taylor")
    }
    assert needed["taylor"].degree >= needed["minimax"].degree + 2


def test_float32_serves_a_range_of_two() -> None:
    """The range of a layer that is bounded by construction, at the default tolerance."""
    plan = tattn.plan_for(n=10**6, dim=8, bound=2.0, method="polynomial")
    assert plan.error <= 1e-3


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.grid("jax")
def test_the_range_holds_every_score(library: Any, seed: int) -> None:
    """Heads, shared keys, masks, huge channels; and the range is not far from the truth."""
    rng = np.random.default_rng(seed)
    kinds = [lambda s: rng.normal(size=s), lambda s: rng.standard_t(2.5, s), lambda s: rng.uniform(-1, 1, s)]
    kind = kinds[seed % 3]
    query, keys = kind((2, 3, 40, 4)), [kind((2, 1, 30, 4)), kind((20, 4))]
    if seed % 2:
        query, keys[0] = query * [1e5, 1, 1, 1], keys[0] * [1e-4, 1, 1, 10]
    mask = rng.random((2, 1, 30)) < 0.6
    mask[..., 0] = True
    keys[0][~mask] = 1e6
    given = library.arrays(query, keys)
    inputs = checked_inputs(given[0], given[1], None, library.arrays([mask, None]))
    found = measured(inputs, 0.25)
    x = scores(query, [np.where(mask[..., None], keys[0], 0), keys[1]], 0.25)
    assert np.abs(x).max() <= found.bound
    means = np.where(mask[:, :, None, :, None], x, 0).sum((-1, -2)) / (mask.sum(-1)[..., None] * 20)
    assert found.lowest_mean <= means.min()
    assert found.lowest_mean >= means.min() - 0.02 * found.bound


def test_the_range_of_aligned_corners_is_tight() -> None:
    query, keys = np.ones((5, 4)), [np.ones((6, 4)), -np.ones((7, 4))]
    plan = tattn.plan(query, keys, method="exact")
    assert 1 <= plan.bound <= 1.05


def test_holder_beats_channels_on_rows_of_one_length() -> None:
    """Random directions of one norm: far below the channel bound."""
    rng = np.random.default_rng(0)
    rows = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(3, 500, 16))]
    channels = np.prod([np.abs(x).max(0) for x in rows], axis=0).sum()
    assert tattn.plan(rows[0], rows[1:], scale=1.0, method="exact").bound < 0.8 * channels


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.grid
def test_the_range_is_the_smallest_of_all_bounds(library: Any, views: int, seed: int) -> None:
    """Entries, channels, and Hölder's with channels balanced by largest entries or by root mean squares; rows in several blocks."""
    rng = np.random.default_rng(seed)
    lengths = [30_000, 300, 20, 500][: views + 1]
    kinds = [lambda s: rng.normal(size=s), lambda s: rng.standard_t(2, s), lambda s: np.sign(rng.normal(size=s))]
    rows = [kinds[(seed + i) % 3]((n, 5)) * 10.0 ** rng.uniform(-1, 1, 5) for i, n in enumerate(lengths)]
    rows[-1][:, seed % 5] *= seed > 2
    masks = [rng.random(n) < 0.7 for n in lengths[1:]]
    given = library.arrays(rows)
    found = measured(checked_inputs(given[0], given[1:], None, library.arrays(masks)), 0.25)
    seen = [rows[0], *(x[mask] for x, mask in zip(rows[1:], masks, strict=True))]
    tops = [np.abs(x).max(axis=0) for x in seen]
    counted = [rows[0], *(np.where(mask[:, None], x, 0) for x, mask in zip(rows[1:], masks, strict=True))]
    spreads = [np.sqrt((c**2).sum(axis=0) / len(x)) for c, x in zip(counted, seen, strict=True)]
    entries = 0.25 * 5 * np.prod([t.max() for t in tops])
    bounds = [entries, 0.25 * np.prod(tops, axis=0).sum()]
    for sizes in np.array([tops, spreads]):
        alive = (sizes > 0).all(axis=0)
        units = np.exp(np.log(sizes[:, alive]).mean(axis=0) - np.log(sizes[:, alive]))
        for ps in exponents(views):
            norms = [np.linalg.norm(x[:, alive] * u, p, axis=1).max() for x, u, p in zip(seen, units, ps, strict=True)]
            bounds.append(0.25 * np.prod(norms))
    np.testing.assert_allclose(found.bound, min(bounds), rtol=1e-9)
    np.testing.assert_allclose(found.entries, entries, rtol=1e-12)


def test_the_range_of_channels_that_balance_at_the_ends_of_float32(library: Any) -> None:
    """Units and reciprocals of such entries vanish in libraries that take the smallest numbers for 0."""
    for sizes in ([1.6e-18, 1.6e-21, 9.4e37], [9.4e37, 2.6e-38, 0.3], [3e-38, 3e38, 2.0], [1e30, 1e30, 3e-38]):
        for dim in (1, 3):
            rows = [np.full((6, dim), 1.0) * size * 0.9 ** np.arange(6)[:, None] for size in sizes]
            rows[np.argmax(sizes)][:, 1:] *= 1e-3
            given = library.arrays([x.astype(np.float32) for x in rows])
            found = measured(checked_inputs(given[0], given[1:], None, None), 1.0)
            score = np.prod(sizes) * (1 + 1e-3 * (dim - 1))
            np.testing.assert_allclose(found.bound, score, rtol=2e-4)
            assert found.bound >= score * (1 - 1e-6)


def test_ranges_take_no_memory_for_many_problems() -> None:
    query, *keys = np.random.default_rng(0).normal(size=(3, 64, 2048, 8)).astype(np.float32)
    inputs = checked_inputs(query, keys, keys, None)
    tracemalloc.start()
    measured(inputs, 0.25)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A view takes 4 MiB.
    assert peak < 3 << 20


def test_a_plan_is_checked_on_other_data() -> None:
    query, keys, values = draw()
    plan = tattn.plan(query, keys, values, method="polynomial")
    tattn.tensor_attention(0.9 * query, keys, values, plan=plan)
    with pytest.raises(tattn.PlanError, match=r"serves scores up to .*the data's may reach"):
        tattn.tensor_attention(2 * query, keys, values, plan=plan)
    promise = tattn.plan(query, keys, values, bound=plan.bound, method="polynomial")
    tattn.tensor_attention(2 * query, keys, values, plan=promise)


@pytest.mark.thorough("jax")
def test_an_estimated_plan_is_not_certified_and_can_be_checked(library: Any) -> None:
    """Rows of large norm that never meet: the certified range is far beyond what scores do."""
    rng = np.random.default_rng(0)
    query, *keys = rng.standard_t(4, (3, 800, 16)).astype(np.float32)
    values = list(rng.normal(size=(2, 800, 4)).astype(np.float32))
    query, keys, values = library.arrays(query, keys, values)
    assert tattn.plan(query, keys, values, scale=0.01).method == "exact"
    plan = tattn.plan(query, keys, values, scale=0.01, bound="estimated", tol=1e-2)
    assert (plan.method, plan.certified, plan.source) == ("polynomial", False, "estimate")
    assert "estimated" in str(plan)
    out = tattn.tensor_attention(query, keys, values, plan=plan)
    largest, mean = tattn.measure_error(query, keys, values, out, scale=0.01)
    assert mean <= largest <= plan.error


def test_measure_error_finds_an_error() -> None:
    query, keys, values = draw()
    out = dense(query, keys, values).out
    largest, mean = tattn.measure_error(query, keys, values, out, rows=60)
    assert largest < 1e-14
    sizes = np.abs(values[0]).max(0) * np.abs(values[1]).max(0)
    out = out.copy()
    out[17, 1] += 0.25 * sizes[1]
    largest, mean = tattn.measure_error(query, keys, values, out, rows=60)
    np.testing.assert_allclose([largest, mean], [0.25, 0.25 / out.size], rtol=1e-9)
    assert tattn.measure_error(query, keys, values, out, rows=4, seed=1) == tattn.measure_error(
        query, keys, values, out, rows=4, seed=1
    )


@pytest.mark.libraries("torch")
def test_estimates_under_gradients() -> None:
    """A torch input that records gradients plans without a warning and without a graph."""
    torch = pytest.importorskip("torch")
    query, keys, values = draw()
    q = torch.tensor(query, requires_grad=True)
    k, v = [torch.tensor(x) for x in keys], [torch.tensor(x) for x in values]
    for bound in (None, "estimated"):
        plan = tattn.plan(q, k, v, bound=bound)
        out = tattn.tensor_attention(q, k, v, plan=plan)
        tattn.measure_error(q, k, v, out)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--n", "1000000", "--dim", "8", "--bound", "1", "--tol", "1e-3"]
    assert main(arguments) == 0
    assert str(tattn.plan_for(n=10**6, dim=8, bound=1.0)) in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0

    def no_number(name: str) -> None:
        pytest.fail(f"{name} is no JSON")

    planned = json.loads(capsys.readouterr().out, parse_constant=no_number)
    assert (planned["method"], planned["seconds"]) == ("polynomial", None)
    assert main(["plan", "--n", "10", "--dim", "8", "--bound", "-1"]) == 2
    assert "bound should be finite and above 0" in capsys.readouterr().err
    done = subprocess.run([sys.executable, "-m", "tattn", "--version"], capture_output=True, text=True, check=True)
    assert tattn.__version__ in done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    "shape",
    [(300_000, 1, 8, 8, 4), (256, 96, 8, 16, 6), (20_000, 1, 24, 24, 3), (4_000, 1, 16, 64, 5), (512, 1024, 4, 8, 4)],
)
def test_memory_stays_in_what_was_stated(shape: tuple[int, ...]) -> None:
    """That of the plan, for one problem and for many; as the operating system counts it."""
    script = """
import resource, sys, numpy as np, tattn
from reference import through_features
def peak(): return 1024 * next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
def now(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
rng = np.random.default_rng(0)
def call(n, heads, dim, value_dim, degree):
    q, a, b = rng.random((3, heads, n, dim), dtype=np.float32)
    u, v, g = rng.random((3, heads, n, value_dim), dtype=np.float32)
    plan = tattn.plan(q, [a, b], [u, v], bound=1.0, degree=degree)
    # Nine rows have fewer scores than features.
    few = through_features(plan)
    tattn.tensor_attention(q[:1, :9], [a[:1, :9], b[:1, :9]], [u[:1, :9], v[:1, :9]], plan=few)
    # What numba takes is no memory of a call.
    tattn.warm_up()
    before = now()
    out, pullback = tattn.tensor_attention_vjp(q, [a, b], [u, v], plan=plan)
    forward = peak() - before - out.nbytes
    dq, dk, dv = pullback(g)
    outputs = sum(x.nbytes for x in (out, dq, *dk, *dv))
    print(forward / plan.bytes_polynomial, (peak() - before - outputs) / plan.bytes_polynomial, plan.bytes_polynomial / 2**20)
call(*map(int, sys.argv[1:]))
"""
    # Another thread would have buffers of its own.
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", script, *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=alone)
    forward, gradient, stated = map(float, done.stdout.split())
    assert 0.2 < forward < 1
    assert gradient < 2
    assert stated < 128


def test_a_plan_holds_for_its_own_rows_in_another_order() -> None:
    rng = np.random.default_rng(0)
    for seed in range(20):
        query, keys, values = draw(seed)
        single = [a.astype(np.float32) for a in (query, *keys, *values)]
        plan = tattn.plan(single[0], single[1:3], single[3:], method="polynomial", tol=1e-2)
        rows = rng.permutation(60)
        tattn.tensor_attention(
            single[0][rows], [k[rows] for k in single[1:3]], [v[rows] for v in single[3:]], plan=plan
        )


def test_an_exact_plan_is_checked_on_other_data() -> None:
    query, keys, values = draw()
    plan = tattn.plan(query, keys, values, method="exact")
    with pytest.raises(tattn.PlanError, match="serves scores up to"):
        tattn.tensor_attention(300 * query, keys, values, plan=plan)


def test_auto_warns_where_even_exact_cannot_meet_tol() -> None:
    query, keys, values = draw(size=300.0)
    single = [a.astype(np.float32) for a in (query, *keys, *values)]
    with pytest.warns(UserWarning, match="cannot be met in float32: rounding of scores") as caught:
        plan = tattn.plan(single[0], single[1:3], single[3:])
        tattn.plan_for(n=1000, dim=4, bound=plan.bound)
        tattn.tensor_attention(single[0], single[1:3], single[3:])
    assert [warning.filename for warning in caught] == [__file__] * 3
    assert plan.method == "exact"
    assert plan.error > 1e-3
    assert "rounding is above tol" in plan.reason


def test_ranges_that_underflow_and_overflow() -> None:
    query, keys = np.ones((3, 2), np.float32), [np.full((4, 2), 1e25, np.float32)] * 2
    assert 1.9 <= tattn.plan(query, keys, scale=1e-50, method="exact").bound <= 2.2


def test_a_degree_for_scores_beyond_the_dtype_is_refused_as_such() -> None:
    query, keys = np.full((3, 2), 1e30, np.float32), [np.full((4, 2), 1e30, np.float32)] * 2
    with pytest.raises(tattn.PlanError, match="scores may reach inf, where no polynomial of degree 3"):
        tattn.plan(query, keys, degree=3)


def test_an_estimate_for_more_channels_than_any_basis_has_is_exact() -> None:
    query, *keys = np.random.default_rng(0).uniform(-1, 1, (3, 4, 1 << 18))
    made = tattn.plan(query, keys, bound="estimated")
    assert (made.method, made.reason) == ("exact", "no degree has a rank that a plan accepts")
    with pytest.raises(tattn.PlanError, match="degree 1 at dim 262144 has rank 262,145, beyond"):
        tattn.plan(query, keys, bound="estimated", method="polynomial")


def test_what_an_estimate_does_not_go_with() -> None:
    query, keys, values = draw()
    with pytest.raises(ValueError, match="series cannot be combined with bound='estimated'"):
        tattn.plan(query, keys, values, bound="estimated", series="taylor")
    keys[0][3, 1] = np.nan
    with pytest.raises(ValueError, match=r"keys\[0\] should hold finite numbers, got NaN"):
        tattn.measure_error(query, keys, values, np.zeros((60, 3)))


def test_estimates_of_many_heads_on_shared_keys_stay_small() -> None:
    """Only the problems and rows that are sampled are copied."""
    import tracemalloc

    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(64, 8, 32)).astype(np.float32), rng.normal(size=(40_000, 32)).astype(np.float32)
    tracemalloc.start()
    tattn.plan(query, [key], bound="estimated", degree=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 << 20


# Workers.

RATES = {"workers": 64, "bandwidth": 1e9, "flops": 1e10}


def test_what_workers_send_and_how_long_they_take() -> None:
    one = tattn.plan_for(n=10**6, dim=4, value_dim=7, bound=1.0, order=4)
    plan = tattn.plan_for(n=10**6, dim=4, value_dim=7, bound=1.0, order=4, **RATES)
    # Three views, rank × (dv + 1) numbers of eight bytes, once round the ring to add and once to tell.
    assert plan.bytes_sent == pytest.approx(2 * 63 / 64 * 3 * one.rank * 8 * 8)
    computing, sending = one.flops_polynomial / 64 / 1e10, plan.bytes_sent / 1e9
    assert plan.seconds == pytest.approx(computing + sending)
    assert plan.seconds_gradient == pytest.approx(3 * computing + 2 * sending)
    # Ten times the rows: nothing more to send.
    longer = tattn.plan_for(n=10**7, dim=4, value_dim=7, bound=1.0, order=4, **RATES)
    assert longer.bytes_sent == plan.bytes_sent
    assert longer.seconds - sending == pytest.approx(10 * computing)
    text = str(plan)
    assert f"workers            64, each sends {plan.bytes_sent / 1e3:.3g} kB forward and as much backward" in text
    assert f"estimated time     {plan.seconds:.3g} s, {plan.seconds_gradient:.3g} s with the gradient" in text
    # What was not asked for is not said.
    assert one.seconds == inf
    assert "workers" not in str(one)
    assert "estimated time" not in str(tattn.plan_for(n=10**6, dim=4, bound=1.0, workers=64, bandwidth=1e9))
    assert tattn.plan_for(n=10**6, dim=4, bound=1.0, flops=1e9).seconds == pytest.approx(
        tattn.plan_for(n=10**6, dim=4, bound=1.0).flops_polynomial / 1e9
    )


def test_causal_workers_summarize_their_rows_besides() -> None:
    given = {"n": (10**6, 10**6, 2 * 10**6), "dim": 4, "value_dim": 7, "bound": 1.0, "causal": True}
    one, plan = tattn.plan_for(**given), tattn.plan_for(**given, **RATES)
    assert plan.bytes_sent == tattn.plan_for(**given | {"causal": False}, **RATES).bytes_sent
    operations = one.flops_polynomial + 3 * 10**6 * one.rank * (2 * 8 + 1)
    assert plan.flops_polynomial == pytest.approx(operations)
    assert plan.seconds == pytest.approx(operations / 64 / 1e10 + plan.bytes_sent / 1e9)
    assert tattn.plan_for(**given, workers=1).flops_polynomial == one.flops_polynomial


def test_plans_for_workers_differ_in_costs_alone() -> None:
    rows = np.zeros((2, 4), np.float32)
    summaries = [
        tattn.summarize([rows, rows], [rows, rows], tattn.plan_for(n=10**6, dim=4, bound=1.0, **options))
        for options in ({}, RATES)
    ]
    assert float((summaries[0] + summaries[1]).counts[0]) == 4


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"workers": 0}, ValueError, r"^workers should be at least 1, got 0"),
        ({"workers": 2.0}, TypeError, r"^workers should be a whole number, got float"),
        ({"workers": 2, "bandwidth": 0.0}, ValueError, r"^bandwidth should be finite and above 0, got 0.0"),
        ({"flops": -1.0}, ValueError, r"^flops should be finite and above 0, got -1.0"),
        ({"bandwidth": 1e9}, ValueError, r"^bandwidth should come with workers, got 1000000000.0 alone"),
        ({"workers": 2, "method": "exact"}, tattn.PlanError, r"^a plan for workers .* got exact: exact was asked for"),
        ({"workers": 2, "bound": None, "series": "banded"}, tattn.PlanError, r"^a plan for workers .* got banded"),
        ({"workers": 2, "window": (9, 9)}, tattn.PlanError, r"^a plan for workers .* got exact: exact takes"),
        (
            {"workers": 2, "window": (900, 900)},
            tattn.PlanError,
            r"^a plan for workers should have no window, .* got \(900, 900\)",
        ),
    ],
)
def test_refused_for_workers(options: dict[str, Any], error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        tattn.plan_for(**{"n": 10**6, "dim": 4, "bound": 1.0, **options})


def printed(capsys: pytest.CaptureFixture[str], plan: tattn.Plan) -> None:
    """The plan was printed, and how long it takes on this machine."""
    *lines, here = capsys.readouterr().out.splitlines()
    assert "\n".join(lines) == str(plan)
    assert here.startswith("here, with NumPy   about ")


def test_options_of_plans_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--n=1000", "--dim=4", "--series=banded", "--degree=3"]) == 0
    printed(capsys, tattn.plan_for(n=1000, dim=4, series="banded", degree=3))
    assert main(["plan", "--n=1000", "--dim=4", "--bound=1", "--causal"]) == 0
    printed(capsys, tattn.plan_for(n=1000, dim=4, bound=1.0, causal=True))
    assert main(["plan", "--n=1000", "--dim=4", "--bound=1", "--window", "8", "16"]) == 0
    printed(capsys, tattn.plan_for(n=1000, dim=4, bound=1.0, window=[8, 16]))
    with pytest.raises(SystemExit):
        main(["plan", "--n=1000", "--dim=4"])
    assert "--bound is required" in capsys.readouterr().err


def test_workers_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--n=1000000", "--dim=4", "--bound=1", "--workers=64", "--bandwidth=1e9", "--flops=1e10"]) == 0
    assert capsys.readouterr().out.strip() == str(tattn.plan_for(n=10**6, dim=4, bound=1.0, **RATES))


def test_an_estimate_from_masked_rows_alone_is_none() -> None:
    rng = np.random.default_rng(2)
    query, *keys = rng.uniform(-1, 1, (3, 400, 12)).astype(np.float32)
    mask = np.zeros(400, bool)
    mask[123] = True
    assert tattn.plan(query, keys, key_masks=[mask, mask], bound="estimated", tol=1e-2).method == "exact"
    with pytest.raises(tattn.PlanError, match="estimated not to meet"):
        tattn.plan(query, keys, key_masks=[mask, mask], bound="estimated", tol=1e-2, method="polynomial")


# Huge numbers.

HUGE = (10**3, 10**5, 10**9, 2**63 - 1, 2**63, 10**120, 10**400, 10**5000)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n": 10**120}, r"^n should be at most 9,223,372,036,854,775,807, got about 10\^120$"),
        ({"n": -(10**5000)}, r"^n should be at least 1, got about -10\^5000$"),
        ({"n": [5, 10**19, 5]}, r"^n\[1\] should be at most 9,"),
        ({"dim": 10**400}, r"^dim should be at most 9,223,372,036,854,775,807, got about 10\^400$"),
        ({"dim": 10**18, "method": "polynomial"}, r"takes degree 5 and rank about 10\^88 at dim"),
        (
            {"dim": 10**5, "degree": 1},
            r"^degree 1 at dim 100000 has rank 100,001 .* rank of 2,684 for 100,000 channels$",
        ),
        ({"order": 400}, r"^order should be at most 64, got 400$"),
        ({"order": 10**9}, r"^order should be at most 64, got 1000000000$"),
        ({"dim": 1, "degree": 2000}, r"^degree should be at most 100, got 2000$"),
        ({"dim": 1, "degree": 200_000, "series": "taylor"}, r"^degree should be at most 100, got 200000$"),
        ({"dim": 1, "degree": 2000, "series": "banded"}, r"^degree should be at most 100, got 2000$"),
        (
            {"n": 10**9, "bands": 10**6, "series": "banded"},
            r"^bands should be at most 406 for order 3, got 1000000: each",
        ),
        ({"order": 12, "series": "banded"}, r"^bands should be at most 4 for order 12, got 8: each tuple of bands"),
        ({"order": 40, "series": "banded"}, r"^order should be at most 32 with series 'banded', got 40$"),
        ({"moment": 10**30, "series": "banded"}, r"^moment should be at most 9,.* got about 10\^30$"),
        ({"value_dim": 10**400}, r"^value_dim should be at most 9,"),
        ({"workers": 10**400}, r"^workers should be at most 9,"),
        ({"window": (5, 10**20)}, r"^window\[1\] should be at most 9,"),
        ({"tol": 10**5000}, r"^tol should be finite and above 0, got about 10\^5000$"),
    ],
)
def test_huge_numbers_are_refused_by_name_at_once(options: dict[str, Any], match: str) -> None:
    bound = None if options.get("series") == "banded" else 1.0
    start = time.process_time()
    with pytest.raises(ValueError, match=match):
        tattn.plan_for(**{"n": 1000, "dim": 4, "bound": bound, **options})
    assert time.process_time() - start < 1


@pytest.mark.filterwarnings("ignore:tol=0.001 cannot be met in float32")
@pytest.mark.parametrize("name", ["n", "dim", "order", "value_dim", "degree", "bands", "moment", "workers", "window"])
def test_a_huge_number_gives_a_plan_or_is_refused(name: str) -> None:
    for number in HUGE:
        for options in (
            {"bound": 1.0},
            {"bound": 1.0, "method": "exact"},
            {"bound": 9.0, "dtype": "float64", "causal": True},
            {"series": "banded", "degree": number, "dim": 1},
        ):
            value = (number, number) if name == "window" else number
            start = time.process_time()
            try:
                made = tattn.plan_for(**{"n": 1000, "dim": 4, **options, name: value})
            except ValueError:
                pass
            else:
                assert "rows" in str(made)
            assert time.process_time() - start < 1


def test_more_channels_than_a_table_of_exponents_has_room_for() -> None:
    query, *keys = np.random.default_rng(0).uniform(-1, 1, (3, 3, 100_000))
    # Unequal channels would have a pruned basis looked for.
    keys[0][:, 10:] *= 1e-3
    tracemalloc.start()
    start = time.process_time()
    for options in ({"degree": 1}, {"degree": 1, "bound": "estimated"}, {"method": "polynomial"}):
        with pytest.raises(ValueError, match="beyond the largest rank of 2,684 for 100,000 channels"):
            tattn.plan(query, keys, **options)
    assert tattn.plan(query, keys).method == "exact"
    assert time.process_time() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def test_more_views_than_arrays_have_dimensions() -> None:
    rows = np.ones((2, 1))
    with pytest.raises(ValueError, match=r"^keys should be at most 63 arrays, got 64$"):
        tattn.tensor_attention(rows, [rows] * 64, [rows] * 64)
    # Each tuple of bands would have a polynomial of its own.
    rows = np.ones((40, 1))
    tried = [len(banded_candidates(checked_inputs(rows, [rows] * m, None, None).problem(1.0))) for m in (7, 8)]
    assert tried == [5, 0]
