"""The polynomial method score by score: the numbers of the polynomial method, taken where that is cheaper and as accurate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import CASES, KINDS, assert_close, draw, ratios, run, sample
from numpy.polynomial.polynomial import polyder, polyval
from reference import Dense, dense, score_by_score, through_features, value_sizes

import tattn
from tattn.bounds.rounding import scores_round_less


# Room for 16 scores: a few rows of each view in a block.
@pytest.mark.parametrize("blocks", [{}, {"workspace": 256}], ids=["one block", "blocks"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.grid
def test_it_is_the_definition_with_its_polynomial(library: Any, case: dict[str, Any], blocks: dict[str, int]) -> None:
    if blocks and library.name == "jax" and case["broadcast"]:
        pytest.skip("JAX compiles every block for long")
    call = draw(**case, seed=2 if blocks else 0)
    plan = tattn.plan_for(n=9, dim=3, order=case["views"] + 1, bound=1.0, degree=3 if blocks else 4, dtype="float64")
    plan = score_by_score(plan)
    with library.backend.using(**blocks):
        got, _ = run(library, call, plan=plan)
    p = plan.coefficients
    expected = dense(
        call.query, call.keys, call.values, masks=call.masks, grad_out=call.grad_out, grad_lse=call.grad_lse,
        function=lambda x: polyval(x, p), derivative=lambda x: polyval(x, polyder(p)),
    )  # fmt: skip
    assert_close(got, expected, 1e-12)


def test_short_calls_take_it_and_long_ones_do_not(library: Any) -> None:
    """One plan for all lengths: what it computes is the same function, to the last bit by the way that is taken."""
    plan = tattn.plan_for(n=1000, dim=8, bound=1.0, degree=4, dtype="float64")
    p, rng = plan.coefficients, np.random.default_rng(0)
    for n in (6, 60):
        drawn = [rng.uniform(-1, 1, (n, 8)) for _ in range(3)]
        query, *keys = library.arrays(*drawn)
        by_plan, scores, features = (
            library.numpy(tattn.tensor_attention(query, keys, keys, plan=way))
            for way in (plan, score_by_score(plan), through_features(plan))
        )
        expected = dense(*drawn[:1], drawn[1:], drawn[1:], function=lambda x: polyval(x, p)).out
        np.testing.assert_allclose(by_plan, expected, rtol=1e-12, atol=1e-12)
        taken, other = (scores, features) if n == 6 else (features, scores)
        np.testing.assert_array_equal(by_plan, taken)
        assert (by_plan != other).any()


def test_the_plan_says_so() -> None:
    options: dict[str, Any] = {"dim": 16, "bound": 3.0, "degree": 4}
    short, long = (tattn.plan_for(n=n, **options) for n in (12, 1000))
    assert "score by score" in str(short)
    assert "score by score" not in str(long)
    assert (short.error, short.grad_error, short.coefficients) == (long.error, long.grad_error, long.coefficients)
    assert "score by score" not in str(tattn.plan_for(n=12, dim=16, degree=2, series="banded"))
    assert "score by score" not in str(tattn.plan_for(n=12, dim=16, bound=1.0))  # exact


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_no_error_exceeds_the_plan(kind: str, dtype: str, draws: Callable[[int], range]) -> None:
    """The same plan, the same promise, wherever the rounding is found to be no more than that of features."""
    tried = 0
    precision = np.float64 if dtype == "float32" else np.longdouble
    seeds = draws(200)
    for seed in seeds:
        rng = np.random.default_rng(seed)
        views, bound = int(rng.integers(1, 4)), float(rng.choice([0.1, 0.5, 1.0, 2.0, 3.0]))
        drawn, scale = sample(kind, seed, views, bound, dtype)
        plan = tattn.plan(
            drawn.query, drawn.keys, drawn.values, scale=scale, bound=bound * (1 + 1e-6), degree=int(rng.integers(1, 9))
        )
        if not np.isfinite(plan.error) or not rounds_less(plan):
            continue
        plan = score_by_score(plan)
        out, pullback = tattn.tensor_attention_vjp(drawn.query, drawn.keys, drawn.values, plan=plan)
        dquery, dkeys, dvalues = pullback(drawn.grad)
        truth = dense(drawn.query, drawn.keys, drawn.values, scale=scale, grad_out=drawn.grad, precision=precision)
        found = ratios(plan, drawn, Dense(out, out, dquery, list(dkeys), list(dvalues)), truth)
        assert max(found) <= 1, (seed, found, str(plan))
        tried += 1
    assert tried > len(seeds) / 4


def rounds_less(plan: tattn.Plan) -> bool:
    return scores_round_less(
        plan.coefficients, plan.bound, dim=plan.dim, rank=plan.rank, value_dim=128, lengths=plan.lengths
    )


@pytest.mark.parametrize("value", [1 / 3, 0.1, 0.7])
def test_sums_of_one_number_stay_within_the_rounding_model(value: float) -> None:
    n, dim = 48, 4
    query = np.full((4, dim), -value, np.float32)
    keys = [np.full((n, dim), value, np.float32)] * 2
    values = list(np.random.default_rng(0).choice(np.float32([value, 1]), (2, n, 3)))
    scale = 2 / (dim * float(np.float32(value)) ** 3)
    plan = tattn.plan_for(n=(4, n, n), dim=dim, bound=2 * (1 + 1e-6), degree=8, scale=scale, value_dim=3)
    assert rounds_less(plan)
    assert plan.error < 0.01
    out = tattn.tensor_attention(query, keys, values, plan=score_by_score(plan))
    exact = values[0].astype(float).mean(0) * values[1].astype(float).mean(0)
    assert (np.abs(out - exact) <= plan.error * value_sizes(values)[0]).all()


def test_more_rounding_than_stated_is_not_taken() -> None:
    """Long chains over the channels, at a degree that repeats them, with a low rank: a promise that features keep.

    22,500 pairs add up in chains of 128 and in what adds up 176 of those. That leaves room for the roundings of small scores alone.
    """
    coefficients = tattn.plan_for(n=100, dim=64, bound=2.0, degree=2).coefficients
    options: dict[str, Any] = {"dim": 64, "rank": 2145, "value_dim": 128}
    assert scores_round_less(coefficients, 0.1, **options, lengths=(9, 9, 9))
    assert scores_round_less(coefficients, 0.1, **options, lengths=(150, 150, 150))
    assert scores_round_less(coefficients, 2.0, **options, lengths=(100, 100, 100))
    assert not scores_round_less(coefficients, 2.0, **options, lengths=(150, 150, 150))
    assert not scores_round_less(coefficients, 2.0, **options, lengths=(500, 500, 500))


def test_large_values_of_a_view_do_not_overflow() -> None:
    """Sums over pairs are means, view by view, as they are of features."""
    rng = np.random.default_rng(0)
    query, *keys = rng.uniform(-1, 1, (3, 12, 4)).astype(np.float32)
    values = [np.full((12, 4), 5e36, np.float32), np.ones((12, 4), np.float32)]
    plan = tattn.plan_for(n=12, dim=4, bound=1.0, degree=4)
    out = tattn.tensor_attention(query, keys, values, plan=score_by_score(plan))
    np.testing.assert_allclose(out, 5e36, rtol=1e-5)


def test_lengths_are_those_of_all_views() -> None:
    plan = tattn.plan_for(n=12, dim=4, bound=1.0, degree=4)
    with pytest.raises(ValueError, match=r"^lengths should be 3 numbers of rows, .* got \(12, 12\)"):
        plan.by_scores((12, 12), 4)
